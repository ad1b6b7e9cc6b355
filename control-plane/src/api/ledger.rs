//! `/v1/users/{id}/balance` and `/ledger`: credits of a user. Only admins book. Whether requests cost credits and the refill
//! are settings of the user, see [`super::users`].

use axum::http::StatusCode;
use axum::response::Response;
use contract::json::null_is_default;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::api::auth::Caller;
use crate::api::call::Call;
use crate::api::extract::Json;
use crate::api::idempotency::{IdempotentRequest, IdempotentResponse};
use crate::api::openapi::{Conflict, IdempotencyKey};
use crate::api::pagination::{self, All, List, PageQuery};
use crate::api::users::ById;
use crate::credits::{self, Account, Kind, LedgerRow, parse_amount, parse_note};
use crate::domain::Timestamp;
use crate::error::ApiError;
use crate::users::lock::unknown;

/// An entry to be booked: credits that are added, or taken away.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"amount": 1_000, "note": "invoice 2027-001"}))]
pub struct EntryBody {
    /// How many: 1 to 10^12 for a `top_up`, -10^12 to 10^12 for a `correction`.
    #[schema(example = 1_000, minimum = -1_000_000_000_000_i64, maximum = 1_000_000_000_000_i64)]
    amount: i64,
    /// `top_up` unless given. A `correction` may be negative.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, inline)]
    kind: ByHand,
    /// Why, for people.
    #[schema(example = "invoice 2027-001", max_length = 200)]
    note: Option<String>,
}

/// Kinds of entries that administrators book.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ByHand {
    /// Credits that were bought or given.
    #[default]
    TopUp,
    /// Corrects an earlier entry.
    Correction,
}

/// A row of the ledger.
#[derive(Debug, Serialize, ToSchema)]
pub struct EntryView {
    /// Counted up with each row of all users.
    id: i64,
    /// When it was booked.
    at: Timestamp,
    /// `top_up`, `refill`, `usage` or `correction`.
    #[schema(example = "top_up")]
    kind: String,
    /// Credits that came in or, below zero, went out.
    amount: i64,
    /// The balance with it.
    balance: i64,
    /// Why.
    note: String,
    /// The key that made it; null for those that were made by themselves, and for users who are no administrators.
    #[schema(required)]
    actor_key_id: Option<Uuid>,
    /// Of a refill: when it was due.
    #[schema(required)]
    refill_due: Option<Timestamp>,
}

impl EntryView {
    /// An entry as a caller may read it. Who an administrator is, is for administrators to know.
    fn shown_to(caller: &Caller, entry: LedgerRow) -> Self {
        let shown = Self::from(entry);
        if caller.is_admin() { shown } else { Self { actor_key_id: None, ..shown } }
    }
}

impl From<LedgerRow> for EntryView {
    fn from(entry: LedgerRow) -> Self {
        Self {
            id: entry.id,
            at: entry.at.into(),
            kind: entry.kind,
            amount: entry.amount,
            balance: entry.balance,
            note: entry.note,
            actor_key_id: entry.actor_key_id,
            refill_due: entry.refill_due.map(Into::into),
        }
    }
}

/// The credits of a user.
#[derive(Debug, Serialize, ToSchema)]
pub struct BalanceView {
    /// The sum of the ledger. It can be below zero, by what was spent while Envoys did not reach the control plane.
    balance: i64,
    /// Credits that Envoys hold and have not reported as spent.
    held: i64,
    /// The balance minus `held`, and never below zero: what Envoys can still be granted.
    available: i64,
}

impl From<Account> for BalanceView {
    fn from(account: Account) -> Self {
        Self {
            balance: account.balance,
            held: account.held,
            available: account.balance.saturating_sub(account.held).max(0),
        }
    }
}

/// A page of the ledger, the newest row first.
#[derive(Debug, Serialize, ToSchema)]
pub struct LedgerPage {
    /// The rows.
    entries: Vec<EntryView>,
    /// The `cursor` for the next page; null on the last page.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// Get the balance of a user.
#[utoipa::path(
    operation_id = "getBalance",
    get, path = "/v1/users/{id}/balance", tag = "credits", params(ById),
    responses((status = 200, description = "The balance", body = BalanceView))
)]
pub async fn balance(Call { app, caller, path }: Call<ById>) -> Result<Json<BalanceView>, ApiError> {
    caller.require_user_or_admin(path.id)?;
    let account = credits::account(&app.pool, path.id).await?.ok_or_else(|| unknown(path.id))?;
    Ok(Json(account.into()))
}

/// Book an entry: add credits to a user's balance, or correct it.
///
/// The first top-up makes the user metered. When credits arrive at an empty balance, every Envoy admits the user's requests
/// again at once.
#[utoipa::path(
    operation_id = "createLedgerEntry",
    post, path = "/v1/users/{id}/ledger", tag = "credits", request_body = EntryBody, params(ById, IdempotencyKey),
    responses(Conflict, (status = 201, description = "The entry", body = EntryView))
)]
pub async fn book(
    Call { app, caller, path }: Call<ById>,
    mut request: IdempotentRequest,
) -> Result<Response, ApiError> {
    caller.require_admin()?;
    let body: EntryBody = request.body().await?;
    let kind = match body.kind {
        ByHand::TopUp => Kind::TopUp,
        ByHand::Correction => Kind::Correction,
    };
    let amount = parse_amount(body.amount, kind)?;
    let note = parse_note(body.note)?;
    let response = request.respond(&app.writer, &caller, async |change| {
        let entry = credits::credit(change, path.id, kind, amount, &note).await?;
        IdempotentResponse::new(StatusCode::CREATED, &EntryView::from(entry))
    });
    response.await
}

/// List the changes of a user's balance, the newest first.
///
/// Usage that is no longer kept by the hour is one entry per day.
#[utoipa::path(
    operation_id = "listLedgerEntries",
    get, path = "/v1/users/{id}/ledger", tag = "credits", params(ById, PageQuery),
    responses((status = 200, description = "A page of the ledger", body = LedgerPage))
)]
pub async fn ledger(
    Call { app, caller, path }: Call<ById>,
    List { page, .. }: List<All, i64>,
) -> Result<Response, ApiError> {
    caller.require_user_or_admin(path.id)?;
    credits::account(&app.pool, path.id).await?.ok_or_else(|| unknown(path.id))?;
    let mut entries = credits::ledger(&app.pool, path.id, page.after, page.read()).await?;
    let next = page.cut(&mut entries, |entry| entry.id);
    let entries = entries.into_iter().map(|entry| EntryView::shown_to(&caller, entry)).collect();
    Ok(pagination::reply(LedgerPage { entries, next_cursor: next.cursor }, next.link))
}
