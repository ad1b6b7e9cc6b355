//! Values that keys, roles, plans and users share. Each is parsed once from what a client sends, with an error that names the
//! field and the remedy. No value contains a control character, which PostgreSQL refuses or which breaks a line of the log.

pub mod attributes;
pub mod calendar;
pub mod email;
pub mod kind;
pub mod name;
pub mod patch;
pub mod per;
pub mod preconditions;
pub mod quota;
pub mod rate_limit;
pub mod record;
pub mod scopes;
pub mod time_range;
pub mod timestamp;

pub use attributes::{Attributes, AttributesPatch, Metadata};
pub use calendar::{Every, Window, Zone};
pub use email::Email;
pub use kind::KindBody;
pub use name::KeyName;
pub use patch::Patch;
pub use per::PerBody;
pub use preconditions::Preconditions;
pub use quota::{Period, Quota, QuotaBody, parse_key_quota};
pub use rate_limit::{RateLimitBody, parse_key_rate_limits, parse_rate_limits};
pub use scopes::{ADMIN, SYNC, Scopes};
pub use time_range::TimeRange;
pub use timestamp::{Timestamp, default_expiry, parse_expiry, parse_time, round_up_to_second};
