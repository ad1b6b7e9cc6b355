//! `/v1/users`: the owners of keys. Users see themselves; only admins list and change users.

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::definitions::Conditions;
use super::extract::{Json, Path, Query};
use super::legacy::ByEmail;
use super::openapi::{ReadErrors, WriteErrors};
use super::pagination;
use crate::App;
use crate::api::auth::Caller;
use crate::api::preconditions::etag;
use crate::api::problem::Problem;
use crate::definitions::Name;
use crate::domain::Preconditions;
use crate::domain::{Email, Patch, Timestamp};
use crate::error::ApiError;
use crate::keys::revoke::revoke_all;
use crate::users::{self, User};

/// How many keys a user has.
#[derive(Debug, Serialize, ToSchema)]
pub struct KeyCounts {
    /// Keys that are neither revoked nor expired.
    live: i64,
    /// Keys that were ever made.
    total: i64,
}

/// A user.
#[derive(Debug, Serialize, ToSchema)]
pub struct UserView {
    /// The id of the user, which the upstream gets as the consumer.
    id: Uuid,
    /// The email address.
    #[schema(example = "user@example.com")]
    email: String,
    /// The plan of keys that have none of their own.
    #[schema(required, example = "gold")]
    plan: Option<String>,
    /// Credits.
    balance: i64,
    /// Whether requests cost credits. Otherwise they are free.
    metered: bool,
    /// Since when there is the user.
    created_at: Timestamp,
    /// How many keys the user has.
    keys: KeyCounts,
}

impl UserView {
    fn of(user: User) -> Self {
        Self {
            id: user.id,
            email: user.email,
            plan: user.plan,
            balance: user.balance,
            metered: user.metered,
            created_at: user.created_at.into(),
            keys: KeyCounts { live: user.live_keys, total: user.total_keys },
        }
    }
}

/// A page of users, by address.
#[derive(Debug, Serialize, ToSchema)]
pub struct UserPage {
    /// The users.
    users: Vec<UserView>,
    /// What to send as `cursor` for the next page; null on the last one.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// Which users, and how many.
#[derive(Debug, Deserialize, Serialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct UsersQuery {
    /// Only those whose address starts with this. Domains are kept in ASCII: give the start of `xn--…`, or a whole address.
    #[param(example = "user@", max_length = 254)]
    email_prefix: Option<String>,
    /// `next_cursor` of the page before.
    #[param(max_length = 254)]
    cursor: Option<String>,
    /// How many users; 50 unless given.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<i64>,
}

/// What became of a user's keys.
#[derive(Debug, Serialize, ToSchema)]
pub struct RevokeKeysReply {
    /// Keys that were revoked now.
    #[schema(minimum = 0)]
    revoked: i64,
    /// Keys with the scope admin or sync, which only an admin's key revokes.
    #[schema(minimum = 0)]
    kept: i64,
}

/// What to change of a user: at least one field.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"plan": "gold"}))]
pub struct UserBody {
    /// The plan of keys that have none of their own; null for none.
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "gold", max_length = 64)]
    plan: Patch<String>,
}

/// List users by email address.
#[utoipa::path(
    operation_id = "listUsers",
    get, path = "/v1/users", tag = "users", params(UsersQuery), security(("api_key" = [])),
    responses(
        ReadErrors,
        (status = 200, description = "A page of users", body = UserPage,
            headers(("link" = String, description = "The next page, if there is one (RFC 8288)"))),
    )
)]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    Query(query): Query<UsersQuery>,
) -> Result<Response, ApiError> {
    let limit = pagination::limit(query.limit)?;
    let prefix = part_of_address("email_prefix", query.email_prefix)?;
    let after = part_of_address("cursor", query.cursor)?;
    caller.require_admin()?;
    let mut page = users::list(&app.pool, &prefix, &after, limit + 1).await?;
    let next_cursor = pagination::cut(&mut page, limit, |last| last.email.clone());
    let next = next_cursor.clone().map(|cursor| {
        let email_prefix = Some(prefix).filter(|prefix| !prefix.is_empty());
        pagination::next_link("/v1/users", &UsersQuery { email_prefix, cursor: Some(cursor), limit: Some(limit) })
    });
    let users = page.into_iter().map(UserView::of).collect();
    Ok(pagination::reply(UserPage { users, next_cursor }, next))
}

/// Get a user.
///
/// The ETag changes with plan, metered and refill. It does not change with the balance or the number of keys.
#[utoipa::path(
    operation_id = "getUser",
    get, path = "/v1/users/{email}", tag = "users", security(("api_key" = [])),
    params(ByEmail),
    responses(
        ReadErrors,
        (status = 200, description = "The user", body = UserView,
            headers(("etag" = String, description = "The version of what is set of the user"))),
        (status = 404, description = "No such user", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn get(State(app): State<App>, caller: Caller, Path(path): Path<ByEmail>) -> Result<Response, ApiError> {
    let email = Email::parse(&path.email)?;
    caller.require_owner_or_admin(&email)?;
    let user = users::get(&app.pool, &email).await?.ok_or_else(|| unknown(&email))?;
    Ok(show(user))
}

/// Change a user.
///
/// The user is created if there is none.
#[utoipa::path(
    operation_id = "updateUser",
    patch, path = "/v1/users/{email}", tag = "users", params(ByEmail, Conditions),
    request_body = UserBody, security(("api_key" = [])),
    responses(
        WriteErrors,
        (status = 200, description = "The user as they are now", body = UserView,
            headers(("etag" = String, description = "The version of what is set of the user"))),
        (status = 412, description = "The user is not what If-Match or If-None-Match asks for", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn patch(
    State(app): State<App>,
    caller: Caller,
    preconditions: Preconditions,
    Path(path): Path<ByEmail>,
    Json(body): Json<UserBody>,
) -> Result<Response, ApiError> {
    let email = Email::parse(&path.email)?;
    let plan = body.plan.try_map(|name| Name::parse("plan", &name))?;
    let Some(plan) = plan.given() else {
        return Err(ApiError::Invalid { field: None, detail: "Set plan.".into() });
    };
    caller.require_admin()?;
    let user = app
        .writer
        .change(&caller.actor, async |change| users::set_plan(change, &email, plan.as_ref(), &preconditions).await);
    let user = user.await?;
    Ok(show(user))
}

/// Revoke all keys of a user.
///
/// The key of the caller is revoked too if it is one of them.
#[utoipa::path(
    operation_id = "revokeUserKeys",
    post, path = "/v1/users/{email}/revoke-keys", tag = "users", params(ByEmail), security(("api_key" = [])),
    responses(
        ReadErrors,
        (status = 200, description = "How many were revoked", body = RevokeKeysReply),
        (status = 403, description = "Another user's keys", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such user", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "The last admin key", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn revoke_keys(
    State(app): State<App>,
    caller: Caller,
    Path(path): Path<ByEmail>,
) -> Result<Json<RevokeKeysReply>, ApiError> {
    let email = Email::parse(&path.email)?;
    caller.require_owner_or_admin(&email)?;
    let all = app.writer.change(&caller.actor, async |change| {
        revoke_all(change, &email, caller.is_admin()).await?.ok_or_else(|| unknown(&email))
    });
    let all = all.await?;
    Ok(Json(RevokeKeysReply { revoked: all.revoked, kept: all.kept }))
}

fn show(user: User) -> Response {
    ([(header::ETAG, etag(user.version))], Json(UserView::of(user))).into_response()
}

fn unknown(email: &Email) -> ApiError {
    ApiError::NotFound(format!("There is no user {email}."))
}

/// What may stand at the start of an address: any text that PostgreSQL can hold, as addresses are kept.
fn part_of_address(field: &'static str, text: Option<String>) -> Result<String, ApiError> {
    let text = text.unwrap_or_default();
    if text.chars().any(char::is_control) || text.chars().count() > 254 {
        return Err(ApiError::invalid(field, "must have at most 254 characters and no control characters"));
    }
    Ok(Email::start(&text))
}
