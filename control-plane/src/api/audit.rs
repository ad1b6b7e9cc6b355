//! `GET /v1/audit`: the audit trail, the newest entry first. Users see the entries of their own keys.

use std::ops::RangeInclusive;

use axum::response::Response;
use serde::Deserialize;
use utoipa::IntoParams;
use uuid::Uuid;

use super::extract::search_text;
use super::pagination::{self, List, PageQuery};
use crate::api::auth::Caller;
use crate::api::call::Call;
use crate::audit::{self, AuditEntry, AuditFilter};
use crate::domain::parse_time;
use crate::error::ApiError;

/// Longest action or target to look for, in characters.
const TEXT_CHARS: RangeInclusive<usize> = 0..=254;

/// Which entries, and how many.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct AuditQuery {
    /// Only what was done to this key.
    key_id: Option<Uuid>,
    /// Only what this key did.
    actor_key_id: Option<Uuid>,
    /// Only this.
    #[param(example = "key.rotate", max_length = 254)]
    action: Option<String>,
    /// Only what was done to this user, role or plan.
    #[param(example = "user@example.com", max_length = 254)]
    target: Option<String>,
    /// From when on (RFC 3339).
    #[param(example = "2026-05-01T00:00:00Z", format = DateTime)]
    from: Option<String>,
    /// Until before when (RFC 3339).
    #[param(example = "2026-05-08T00:00:00Z", format = DateTime)]
    to: Option<String>,
}

/// Shown to users in place of the address of an administrator.
const ADMINISTRATOR: &str = "an administrator";

/// An entry as a caller may read it. Another actor than the caller is an administrator: only administrators read which one, and
/// from which address.
fn shown_to(caller: &Caller, entry: AuditEntry) -> AuditEntry {
    if caller.is_admin() || entry.actor_email.as_ref().is_none_or(|email| *email == caller.email) {
        return entry;
    }
    let actor_email = Some(ADMINISTRATOR.to_owned());
    AuditEntry { actor_key_id: None, actor_email, address: None, request_id: None, ..entry }
}

pagination::page!(AuditPage "A page of the trail, the newest first." { entries: AuditEntry = "The entries." });

/// List the audit trail, the newest entry first.
///
/// Users see the entries of their own keys.
#[utoipa::path(
    operation_id = "listAuditEntries",
    get, path = "/v1/audit", tag = "audit", params(AuditQuery, PageQuery),
    responses((status = 200, description = "A page of the trail", body = AuditPage))
)]
pub async fn trail(
    Call { app, caller, .. }: Call,
    List { query, page }: List<AuditQuery, i64>,
) -> Result<Response, ApiError> {
    caller.require_manager()?;
    let time = |field, text: &Option<String>| text.as_deref().map(|text| parse_time(field, text)).transpose();
    let filter = AuditFilter {
        key_id: query.key_id,
        actor_key_id: query.actor_key_id,
        action: search_text("action", query.action.as_deref(), TEXT_CHARS)?,
        target: search_text("target", query.target.as_deref(), TEXT_CHARS)?,
        from: time("from", &query.from)?,
        to: time("to", &query.to)?,
        owner: (!caller.is_admin()).then_some((caller.owner_id, caller.email.as_str())),
    };
    let mut entries = audit::trail(&app.pool, &filter, page.after, page.read()).await?;
    let next = page.cut(&mut entries, |entry| entry.id);
    let entries = entries.into_iter().map(|entry| shown_to(&caller, entry)).collect();
    Ok(pagination::reply(AuditPage { entries, next_cursor: next.cursor }, next.link))
}
