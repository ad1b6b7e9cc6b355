//! `/v1/users/{email}/credits` and `/ledger`: credits of a user. Only admins change them.

use axum::extract::State;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use contract::json::null_is_default;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::App;
use crate::api::auth::Caller;
use crate::api::extract::{Json, Path, Query};
use crate::api::idempotency::{IdempotentRequest, IdempotentResponse};
use crate::api::legacy::ByEmail;
use crate::api::openapi::{ReadErrors, WriteErrors};
use crate::api::pagination;
use crate::api::preconditions::etag;
use crate::api::problem::Problem;
use crate::credits::{self, Account, AccountChange, Kind, LedgerRow, Refill, parse_amount, parse_note};
use crate::domain::Preconditions;
use crate::domain::{Email, Patch, Timestamp};
use crate::error::ApiError;

/// Credits to be added, or taken away.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"amount": 1_000, "note": "invoice 2027-001"}))]
pub struct CreditBody {
    /// How many: 1 to 10^12 for a `top_up`, -10^12 to 10^12 for a `correction`.
    #[schema(example = 1_000, minimum = -1_000_000_000_000_i64, maximum = 1_000_000_000_000_i64)]
    amount: i64,
    /// `top_up` unless given. The first top-up makes the user metered; a `correction` may be negative.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, inline)]
    kind: ByHand,
    /// Why, for people.
    #[schema(example = "invoice 2027-001", max_length = 200)]
    note: Option<String>,
}

/// What rows of the ledger are made by hand.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ByHand {
    /// Credits that were bought or given.
    #[default]
    TopUp,
    /// What was wrong before.
    Correction,
}

/// A row of the ledger.
#[derive(Debug, Serialize, ToSchema)]
pub struct EntryView {
    /// Counted up with each row of all users.
    id: i64,
    /// When it was booked.
    at: Timestamp,
    /// What it is: `top_up`, `refill`, `usage` or `correction`.
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

/// What was booked.
#[derive(Debug, Serialize, ToSchema)]
pub struct Credited {
    /// The row of the ledger.
    entry: EntryView,
    /// The balance with it.
    balance: i64,
}

/// What stands on a user's account.
#[derive(Debug, Serialize, ToSchema)]
pub struct AccountView {
    /// The user's email address.
    #[schema(example = "user@example.com")]
    email: String,
    /// The sum of the ledger. It can be below zero, by what Envoys spent before they learned that it was exhausted.
    balance: i64,
    /// Whether requests cost credits; otherwise they are free.
    metered: bool,
    /// What Envoys hold of it and have not reported as spent.
    leased: i64,
    /// What is left beside: balance less leased, and never below zero.
    available: i64,
    /// What an Envoy may spend before it was leased any.
    starter: i32,
    /// Scheduled credits.
    #[schema(required)]
    refill: Option<Refill>,
    /// When it next does.
    #[schema(required)]
    refill_at: Option<Timestamp>,
}

impl AccountView {
    fn of(email: &Email, account: Account) -> Self {
        Self {
            email: email.as_str().into(),
            balance: account.balance,
            metered: account.metered,
            leased: account.leased,
            available: account.balance.saturating_sub(account.leased).max(0),
            starter: if account.metered { account.credits_starter } else { 0 },
            refill: account.refill.map(|refill| refill.0),
            refill_at: account.refill_at.map(Into::into),
        }
    }
}

/// What of an account is to be changed.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"metered": true}))]
pub struct AccountPatch {
    /// Whether requests cost credits. A refill switches it on unless this says otherwise.
    metered: Option<bool>,
    /// Scheduled credits, from the next midnight on; null: none.
    #[serde(default)]
    #[schema(value_type = Option<Refill>)]
    refill: Patch<Refill>,
}

/// Which rows, and how many.
#[derive(Debug, Deserialize, Serialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct LedgerQuery {
    /// `next_cursor` of the page before.
    #[param(minimum = 1)]
    cursor: Option<i64>,
    /// How many rows; 50 unless given.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<i64>,
}

/// A page of the ledger, the newest row first.
#[derive(Debug, Serialize, ToSchema)]
pub struct LedgerPage {
    /// The rows.
    entries: Vec<EntryView>,
    /// What to send as `cursor` for the next page; null on the last one.
    #[schema(required)]
    next_cursor: Option<i64>,
}

/// Add credits to a user's balance, or correct it.
///
/// The user is created if there is none. When credits arrive at an empty balance, every Envoy admits the user's requests
/// again at once.
#[utoipa::path(
    operation_id = "addCredits",
    post, path = "/v1/users/{email}/credits", tag = "credits", request_body = CreditBody,
    params(ByEmail, ("Idempotency-Key" = Option<String>, Header, description = "A unique name of the request, so that it can be sent again safely")),
    security(("api_key" = [])),
    responses(
        WriteErrors,
        (status = 201, description = "The row of the ledger", body = Credited),
        (status = 409, description = "The balance would be out of bounds, or the first request with the same Idempotency-Key is still running", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "Another request used this Idempotency-Key", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn credit(
    State(app): State<App>,
    caller: Caller,
    Path(path): Path<ByEmail>,
    mut request: IdempotentRequest,
) -> Result<Response, ApiError> {
    caller.require_admin()?;
    let body: CreditBody = request.body().await?;
    let email = Email::parse(&path.email)?;
    let kind = match body.kind {
        ByHand::TopUp => Kind::TopUp,
        ByHand::Correction => Kind::Correction,
    };
    let amount = parse_amount(body.amount, kind)?;
    let note = parse_note(body.note)?;
    let response = request.respond(&app.writer, &caller, async |change| {
        let entry = credits::credit(change, &email, kind, amount, &note).await?;
        let balance = entry.balance;
        IdempotentResponse::new(StatusCode::CREATED, &Credited { entry: entry.into(), balance })
    });
    response.await
}

/// Change whether a user's requests cost credits, and the user's refill.
#[utoipa::path(
    operation_id = "updateCredits",
    patch, path = "/v1/users/{email}/credits", tag = "credits", request_body = AccountPatch, security(("api_key" = [])),
    params(ByEmail, ("If-Match" = Option<String>, Header, description = "The ETag that the change is meant for")),
    responses(
        WriteErrors,
        (status = 200, description = "The account as it is now", body = AccountView,
            headers(("etag" = String, description = "The version of what is set of the user"))),
        (status = 404, description = "No such user", body = Problem, content_type = "application/problem+json"),
        (status = 412, description = "The user was changed since", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn update(
    State(app): State<App>,
    caller: Caller,
    preconditions: Preconditions,
    Path(path): Path<ByEmail>,
    Json(body): Json<AccountPatch>,
) -> Result<Response, ApiError> {
    caller.require_admin()?;
    let email = Email::parse(&path.email)?;
    if body.metered.is_none() && body.refill.is_keep() {
        return Err(ApiError::Invalid { field: None, detail: "Set metered, refill or both.".into() });
    }
    if let Patch::Set(refill) = &body.refill {
        refill.check()?;
    }
    let account_change = AccountChange { metered: body.metered, refill: body.refill };
    let account = app
        .writer
        .change(&caller.actor, async |change| credits::update(change, &email, account_change, &preconditions).await);
    account.await?.map(|account| show(&email, account)).ok_or_else(|| unknown(&email))
}

/// Get the credits of a user.
///
/// The ETag is that of the user. It changes with plan, metered and refill. It does not change with the balance.
#[utoipa::path(
    operation_id = "getCredits",
    get, path = "/v1/users/{email}/credits", tag = "credits", security(("api_key" = [])),
    params(ByEmail),
    responses(
        ReadErrors,
        (status = 200, description = "The account", body = AccountView,
            headers(("etag" = String, description = "The version of what is set of the user"))),
        (status = 404, description = "No such user", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn account(State(app): State<App>, caller: Caller, Path(path): Path<ByEmail>) -> Result<Response, ApiError> {
    let email = Email::parse(&path.email)?;
    caller.require_owner_or_admin(&email)?;
    let account = credits::account(&app.pool, &email).await?.ok_or_else(|| unknown(&email))?;
    Ok(show(&email, account))
}

/// List the changes of a user's balance, the newest first.
///
/// Usage that is no longer kept by the hour is one entry per day.
#[utoipa::path(
    operation_id = "listLedgerEntries",
    get, path = "/v1/users/{email}/ledger", tag = "credits", params(ByEmail, LedgerQuery), security(("api_key" = [])),
    responses(
        ReadErrors,
        (status = 200, description = "A page of the ledger", body = LedgerPage,
            headers(("link" = String, description = "The next page, if there is one (RFC 8288)"))),
        (status = 404, description = "No such user", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn ledger(
    State(app): State<App>,
    caller: Caller,
    uri: Uri,
    Path(path): Path<ByEmail>,
    Query(query): Query<LedgerQuery>,
) -> Result<Response, ApiError> {
    let email = Email::parse(&path.email)?;
    caller.require_owner_or_admin(&email)?;
    let limit = pagination::limit(query.limit)?;
    let account = credits::account(&app.pool, &email).await?.ok_or_else(|| unknown(&email))?;
    // One entry more than the limit shows whether there is a next page.
    let mut entries = credits::ledger(&app.pool, account.owner_id, query.cursor, limit + 1).await?;
    let next_cursor = pagination::cut(&mut entries, limit, |entry| entry.id);
    let next = next_cursor
        .map(|cursor| pagination::next_link(uri.path(), &LedgerQuery { cursor: Some(cursor), limit: Some(limit) }));
    let entries = entries.into_iter().map(|entry| EntryView::shown_to(&caller, entry)).collect();
    Ok(pagination::reply(LedgerPage { entries, next_cursor }, next))
}

fn show(email: &Email, account: Account) -> Response {
    ([(header::ETAG, etag(account.version))], Json(AccountView::of(email, account))).into_response()
}

fn unknown(email: &Email) -> ApiError {
    ApiError::NotFound(format!("There is no user {email}."))
}
