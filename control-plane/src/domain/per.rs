//! Who shares a rate limit or a quota.

use contract::record::Per;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Why a limit or a quota of a single key is refused.
pub(super) const PER_OWNER: &str =
    "per must be key for the limits and the quota of a single key; per owner goes with a plan, whose keys share it";

/// Who shares a rate limit or a quota, as clients write and read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PerBody {
    /// Each key has its own.
    #[default]
    Key,
    /// All keys of a user that have the plan share one.
    Owner,
}

impl PerBody {
    /// Whether it is the default, which answers leave out.
    #[must_use]
    pub const fn is_key(&self) -> bool {
        matches!(self, Self::Key)
    }
}

impl From<Per> for PerBody {
    fn from(per: Per) -> Self {
        match per {
            Per::Key => Self::Key,
            Per::Owner => Self::Owner,
        }
    }
}

impl From<PerBody> for Per {
    fn from(per: PerBody) -> Self {
        match per {
            PerBody::Key => Self::Key,
            PerBody::Owner => Self::Owner,
        }
    }
}
