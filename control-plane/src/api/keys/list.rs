//! `GET /v1/keys`.

use std::ops::RangeInclusive;

use axum::response::Response;
use contract::key::{check, stored_prefix};
use serde::Deserialize;
use utoipa::IntoParams;
use uuid::Uuid;

use super::show_all;
use super::view::{KeyState, KeyView};
use crate::api::call::Call;
use crate::api::extract::search_text;
use crate::api::pagination::{self, List, PageQuery};
use crate::definitions::Name;
use crate::domain::{Email, parse_time};
use crate::error::ApiError;
use crate::keys::read::{KeySearch, search};

/// Longest text to search for, in characters.
const TEXT_CHARS: RangeInclusive<usize> = 1..=100;
const EXTERNAL_ID_CHARS: RangeInclusive<usize> = 1..=128;

/// Which keys, and how many.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// Only this user's keys. Callers without the scope `admin` see only their own anyway.
    #[param(example = "user@example.com")]
    email: Option<String>,
    /// Only the keys of the user with this id, which upstreams get in `x-consumer-id`.
    owner_id: Option<Uuid>,
    /// Only keys with a secret, present or retired, whose prefix starts so: as it is shown, as `sk_abc123`, or the first
    /// characters of the key itself, as `sk_live_abc123…`. To find a key by all of it, use `POST /v1/keys/lookup`.
    #[param(example = "sk_abc", max_length = 100)]
    prefix: Option<String>,
    /// Only keys whose name contains this, in upper or lower case.
    #[param(example = "production", max_length = 100)]
    name: Option<String>,
    /// Only keys in this state.
    #[param(inline)]
    state: Option<KeyState>,
    /// Only keys with this external id.
    #[param(example = "key_42", max_length = 128)]
    external_id: Option<String>,
    /// Only keys that were last used before this time (RFC 3339), or made before it and never used.
    #[param(example = "2026-05-01T00:00:00Z", format = DateTime)]
    last_used_before: Option<String>,
    /// Only keys that expire before this time (RFC 3339).
    #[param(example = "2026-05-15T00:00:00Z", format = DateTime)]
    expires_before: Option<String>,
    /// Only keys to which this plan applies, their own or that of their user.
    #[param(example = "gold", max_length = 64)]
    plan: Option<String>,
    /// Only keys with this role.
    #[param(example = "support", max_length = 64)]
    role: Option<String>,
}

/// The stored prefixes that a text may mean. An imported key may have a prefix of any form.
fn prefixes(text: &str) -> Result<Vec<String>, ApiError> {
    let text = text.strip_suffix('…').or_else(|| text.strip_suffix("...")).unwrap_or(text);
    if text.is_empty() {
        return Err(ApiError::invalid("prefix", "must have a character before the dots"));
    }
    if check(text).is_ok() {
        let detail = "is a whole key, which must not stand in an address: send it in the body of POST /v1/keys/lookup";
        return Err(ApiError::invalid("prefix", detail));
    }
    Ok([text.to_owned()].into_iter().chain(stored_prefix(text)).collect())
}

pagination::page!(KeyPage "A page of keys, the newest first." { keys: KeyView = "The keys." });

/// List keys, the newest first.
#[utoipa::path(
    operation_id = "listKeys",
    get, path = "/v1/keys", tag = "keys", params(ListQuery, PageQuery),
    responses((status = 200, description = "A page of keys", body = KeyPage))
)]
pub async fn list(
    Call { app, caller, .. }: Call,
    List { query, page }: List<ListQuery, Uuid>,
) -> Result<Response, ApiError> {
    let asked = query.email.as_deref().map(Email::parse).transpose()?;
    match (&asked, query.owner_id) {
        (Some(email), _) => caller.require_owner_or_admin(email)?,
        (None, Some(id)) => caller.require_user_or_admin(id)?,
        (None, None) => caller.require_manager()?,
    }
    let name = |field, text: &Option<String>| text.as_deref().map(|text| Name::parse(field, text)).transpose();
    let (plan, role) = (name("plan", &query.plan)?, name("role", &query.role)?);
    let owner = if caller.is_admin() { asked.as_ref().map(Email::as_str) } else { Some(caller.email.as_str()) };
    let filter = KeySearch {
        email: owner,
        owner_id: query.owner_id,
        plan: plan.as_ref().map(Name::as_str),
        role: role.as_ref().map(Name::as_str),
        expires_before: query.expires_before.as_deref().map(|t| parse_time("expires_before", t)).transpose()?,
        prefixes: search_text("prefix", query.prefix.as_deref(), TEXT_CHARS)?.map(prefixes).transpose()?,
        name: search_text("name", query.name.as_deref(), TEXT_CHARS)?,
        state: query.state.map(KeyState::name),
        external_id: search_text("external_id", query.external_id.as_deref(), EXTERNAL_ID_CHARS)?,
        last_used_before: query.last_used_before.as_deref().map(|t| parse_time("last_used_before", t)).transpose()?,
    };
    let mut keys = search(&app.pool, &filter, page.after, page.read()).await?;
    let next = page.cut(&mut keys, |key| key.id);
    let keys = show_all(&app.pool, keys).await?;
    Ok(pagination::reply(KeyPage { keys, next_cursor: next.cursor }, next.link))
}
