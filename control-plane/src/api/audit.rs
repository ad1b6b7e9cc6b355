//! `GET /v1/audit`: the audit trail, the newest entry first. Users see the entries of their own keys.

use std::ops::RangeInclusive;

use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::extract::search_text;
use super::pagination::{self, List, PageQuery};
use crate::api::auth::Caller;
use crate::api::call::Call;
use crate::audit::{self, AuditFilter, AuditRow};
use crate::domain::{Timestamp, parse_time};
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

/// Who did what.
#[derive(Debug, Serialize, ToSchema)]
pub struct AuditEntry {
    /// Ascending with time.
    id: i64,
    /// When.
    at: Timestamp,
    /// The key that called; null for the command line, and for an administrator if the caller is none.
    #[schema(required)]
    actor_key_id: Option<Uuid>,
    /// Its owner's email address; `an administrator` if that is one and the caller is none.
    #[schema(required, example = "admin@example.com")]
    actor_email: Option<String>,
    /// Where the call came from; null for an administrator if the caller is none.
    #[schema(required, example = "192.0.2.7")]
    address: Option<String>,
    /// The id of the request, as in the log; null for an administrator if the caller is none.
    #[schema(required)]
    request_id: Option<String>,
    /// The action.
    #[schema(example = "key.rotate")]
    action: String,
    /// To which key, if it was one.
    #[schema(required)]
    key_id: Option<Uuid>,
    /// To what else: a user's address, the name of a role or plan.
    #[schema(required)]
    target: Option<String>,
    /// Details, such as each changed field.
    #[schema(value_type = Object)]
    detail: Value,
}

/// Shown to users in place of the address of an administrator.
const ADMINISTRATOR: &str = "an administrator";

impl AuditEntry {
    /// An entry as a caller may read it. Another actor than the caller is an administrator: only administrators read
    /// which one, and from which address.
    fn shown_to(caller: &Caller, entry: AuditRow) -> Self {
        let hidden = !caller.is_admin() && entry.actor_email.as_ref().is_some_and(|email| *email != caller.email);
        let shown = Self::from(entry);
        if !hidden {
            return shown;
        }
        let actor_email = Some(ADMINISTRATOR.to_owned());
        Self { actor_key_id: None, actor_email, address: None, request_id: None, ..shown }
    }
}

impl From<AuditRow> for AuditEntry {
    fn from(entry: AuditRow) -> Self {
        Self {
            id: entry.id,
            at: entry.at.into(),
            actor_key_id: entry.actor_key_id,
            actor_email: entry.actor_email,
            address: entry.address,
            request_id: entry.request_id,
            action: entry.action,
            key_id: entry.key_id,
            target: entry.target,
            detail: entry.detail,
        }
    }
}

/// A page of the trail, the newest first.
#[derive(Debug, Serialize, ToSchema)]
pub struct AuditPage {
    /// The entries.
    entries: Vec<AuditEntry>,
    /// The `cursor` for the next page; null on the last page.
    #[schema(required)]
    next_cursor: Option<String>,
}

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
    let entries = entries.into_iter().map(|entry| AuditEntry::shown_to(&caller, entry)).collect();
    Ok(pagination::reply(AuditPage { entries, next_cursor: next.cursor }, next.link))
}
