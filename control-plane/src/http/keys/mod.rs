//! All keys, many to a user, below `/v1/keys`. What every call here shares: which key a path names, how a key is shown,
//! and that a key of somebody else is answered like one that does not exist.

pub mod import;
pub mod quota;
pub mod read;
pub mod rotate;
pub mod usage;
pub mod write;

use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, PgExecutor};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

// What `#[utoipa::path]` makes beside each handler goes with it.
pub use import::{__path_import, import};
pub use quota::{__path_quota, quota};
pub use read::{__path_get, __path_list, get, list};
pub use rotate::{__path_cut_off, __path_rotate, cut_off, rotate};
pub use usage::{__path_usage, usage};
pub use write::{__path_create, __path_patch, __path_revoke, create, patch, revoke};

use crate::App;
use crate::auth::Caller;
use crate::condition::Condition;
use crate::error::ApiError;
use crate::key::domain::{RateLimitBody, Timestamp};
use crate::key::permissions::{self, Permitted};
use crate::key::revoke::name_address;
use crate::key::store::{self, Held, Key};

/// Which key.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct ById {
    /// The key's id.
    id: Uuid,
}

/// Whether a key opens anything at the moment, and if not, why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It is good.
    Active,
    /// It is switched off and can be switched on again.
    Disabled,
    /// Its time is over.
    Expired,
    /// It was revoked for good.
    Revoked,
}

impl State {
    /// Its name.
    const fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Disabled => "disabled",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        }
    }

    fn of(key: &Key, now: OffsetDateTime) -> Self {
        if key.revoked_at.is_some() {
            Self::Revoked
        } else if key.expires_at.is_some_and(|end| now >= end) {
            Self::Expired
        } else if key.disabled {
            Self::Disabled
        } else {
            Self::Active
        }
    }
}

/// A key, without its secret.
#[derive(Debug, Serialize, ToSchema)]
pub struct KeyView {
    /// Names the key for as long as it lives.
    id: Uuid,
    /// Whom it belongs to.
    owner_id: Uuid,
    /// The owner's email address.
    #[schema(example = "user@example.com")]
    email: String,
    /// What people call it.
    #[schema(example = "Production Key")]
    name: String,
    /// What people recognise it by; null for keys of a foreign form.
    #[schema(required, example = "sk_abc123")]
    prefix: Option<String>,
    /// Scopes granted to it.
    scopes: Vec<String>,
    /// Its own rate limits; without any the filter's default applies.
    rate_limits: Vec<RateLimitBody>,
    /// Which of its secrets is the present one, from 1.
    generation: i32,
    /// Whether it opens anything at the moment.
    state: State,
    /// Whether an admin has switched it off: then only an admin switches it on again.
    disabled_by_admin: bool,
    /// When it was made.
    created_at: Timestamp,
    /// When it ends, if ever.
    #[schema(required)]
    expires_at: Option<Timestamp>,
    /// When it was revoked.
    #[schema(required)]
    revoked_at: Option<Timestamp>,
    /// When it was last used, as far as filters have reported.
    #[schema(required)]
    last_used_at: Option<Timestamp>,
    /// Requests that were allowed with it.
    usage_count: i64,
    /// What it may.
    #[serde(flatten)]
    permitted: Permitted,
}

impl KeyView {
    fn of(key: Key, permitted: Permitted, now: OffsetDateTime) -> Self {
        Self {
            state: State::of(&key, now),
            disabled_by_admin: key.disabled_by_admin,
            permitted,
            id: key.id,
            owner_id: key.owner_id,
            email: key.email,
            name: key.name,
            prefix: key.prefix,
            scopes: key.scopes,
            rate_limits: key.rate_limits.iter().map(RateLimitBody::of).collect(),
            generation: key.generation,
            created_at: key.created_at.into(),
            expires_at: key.expires_at.map(Into::into),
            revoked_at: key.revoked_at.map(Into::into),
            last_used_at: key.last_used_at.map(Into::into),
            usage_count: key.usage_count,
        }
    }
}

/// Shows keys. What they may is read after them: a tag that is older than what it stands by makes a change fail, and does not
/// overwrite another.
async fn show_all(executor: impl PgExecutor<'_>, keys: Vec<Key>) -> Result<Vec<KeyView>, ApiError> {
    let ids: Vec<_> = keys.iter().map(|key| key.id).collect();
    let mut permitted = permissions::of_keys(executor, &ids).await?;
    let now = OffsetDateTime::now_utc();
    let view = |key: Key| permitted.remove(&key.id).map(|permitted| KeyView::of(key, permitted, now));
    Ok(keys.into_iter().filter_map(view).collect())
}

/// Shows one key.
async fn show(executor: impl PgExecutor<'_>, key: Key) -> Result<KeyView, ApiError> {
    let id = key.id;
    let view = show_all(executor, vec![key]).await?.pop();
    view.ok_or_else(|| ApiError::Internal(format!("key {id} is gone")))
}

/// Reads a key that the caller manages. One of somebody else is not there for them.
async fn managed(app: &App, caller: &Caller, id: Uuid) -> Result<Key, ApiError> {
    caller.require_manager()?;
    let key = store::get(&app.pool, id).await?.filter(|key| caller.manages(key.owner_id));
    key.ok_or_else(|| there_is_none(id))
}

/// Holds a key that the caller may change, if it is as they expect. Nobody who may not is let to hold anything.
async fn held(
    connection: &mut PgConnection,
    caller: &Caller,
    id: Uuid,
    condition: &Condition,
) -> Result<Held, ApiError> {
    caller.require_manager()?;
    let may = |key: &Key| {
        if caller.manages(key.owner_id) { caller.require_changeable(&key.scopes) } else { Err(there_is_none(id)) }
    };
    may(&store::get(&mut *connection, id).await?.ok_or_else(|| there_is_none(id))?)?;
    let held = store::hold(connection, id).await?.ok_or_else(|| there_is_none(id))?;
    may(&held)?;
    condition.check(Some(held.version))?;
    name_address(connection, &caller.actor, &held.scopes).await?;
    Ok(held)
}

fn there_is_none(id: Uuid) -> ApiError {
    ApiError::NotFound(format!("There is no key {id}."))
}
