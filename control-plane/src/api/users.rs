//! `/v1/users`: the owners of keys. Users see themselves; only admins list, create and change users.
//!
//! A path has the id of a user, never the email address: paths end up in logs, and an id does not change.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::extract::Json;
use super::openapi::{Conflict, IfMatch};
use super::pagination::{self, List, PageQuery};
use crate::api::call::Call;
use crate::api::preconditions::etag;
use crate::audit::AuditEvent;
use crate::credits::{self, Refill};
use crate::definitions::Name;
use crate::domain::calendar::is_time_zone;
use crate::domain::{AttributesPatch, Email, Metadata, Patch, Preconditions};
use crate::error::ApiError;
use crate::keys::revoke::{RevokeKeysReply, revoke_all};
use crate::users::erase::EraseReply;
use crate::users::lock::{lock_user, unknown};
use crate::users::{self, UserView};

/// Which user.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct ById {
    /// The id of the user, which keys show as `owner_id`.
    pub(super) id: Uuid,
}

pagination::page!(UserPage "A page of users, by address." { users: UserView = "The users." });

/// Which users, and how many.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct UsersQuery {
    /// Only the user with this address. Callers without the scope `admin` look up their own only.
    #[param(example = "user@example.com", max_length = 254)]
    email: Option<String>,
    /// Only those whose address starts with this. Domains are kept in ASCII: give the start of `xn--…`, or a whole address.
    #[param(example = "user@", max_length = 254)]
    email_prefix: Option<String>,
    /// Only the user with this external id.
    #[param(example = "cus_42", max_length = 128)]
    external_id: Option<String>,
}

/// The user to be there.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"email": "user@example.com"}))]
pub struct CreateUserBody {
    /// The email address.
    #[schema(example = "user@example.com", max_length = 254)]
    email: String,
    /// The user's id in another system. It must be unique.
    #[schema(example = "cus_42", min_length = 1, max_length = 128)]
    external_id: Option<String>,
    /// Metadata that the filter can pass upstream, at most 16 entries.
    #[schema(value_type = Option<BTreeMap<String, serde_json::Value>>, example = json!({"tenant": "acme"}))]
    metadata: Option<Metadata>,
}

/// A change of a user: at least one field.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"plan": "gold"}))]
pub struct UserBody {
    /// The new email address. Keys, credits and the id of the user stay.
    #[schema(example = "new@example.com", max_length = 254)]
    email: Option<String>,
    /// The plan of keys that have none of their own; null for none.
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "gold", max_length = 64)]
    plan: Patch<String>,
    /// The user's id in another system; null removes it. It must be unique.
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "cus_42", min_length = 1, max_length = 128)]
    external_id: Patch<String>,
    /// Metadata that the filter can pass upstream, at most 16 entries; replaces all present entries.
    #[schema(value_type = Option<BTreeMap<String, serde_json::Value>>, example = json!({"tenant": "acme"}))]
    metadata: Option<Metadata>,
    /// The time zone of quotas and usage whose `time_zone` is `owner` (IANA); null for UTC. A change begins new windows.
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "Europe/Berlin", max_length = 64)]
    time_zone: Patch<String>,
    /// Whether requests cost credits. A refill switches it on unless this says otherwise.
    metered: Option<bool>,
    /// Scheduled credits, from the next midnight on; null for none.
    #[serde(default)]
    #[schema(value_type = Option<Refill>)]
    refill: Patch<Refill>,
}

/// List users by email address, or look one up.
#[utoipa::path(
    operation_id = "listUsers",
    get, path = "/v1/users", tag = "users", params(UsersQuery, PageQuery),
    responses((status = 200, description = "A page of users", body = UserPage))
)]
pub async fn list(
    Call { app, caller, .. }: Call,
    List { query, page }: List<UsersQuery, String>,
) -> Result<Response, ApiError> {
    let email = query.email.as_deref().map(Email::parse).transpose()?;
    let prefix = start_of_address(query.email_prefix)?;
    match &email {
        Some(email) => caller.require_owner_or_admin(email)?,
        None => caller.require_admin()?,
    }
    let after = page.after.as_deref().unwrap_or_default();
    let id = query.external_id.as_deref();
    if id.is_some_and(|id| id.contains('\0')) {
        return Err(ApiError::invalid("external_id", "must have no control characters"));
    }
    let mut users = users::list(&app.pool, email.as_ref(), id, &prefix, after, page.read()).await?;
    let next = page.cut(&mut users, |last| last.email.clone());
    Ok(pagination::reply(UserPage { users, next_cursor: next.cursor }, next.link))
}

/// Create a user.
///
/// If there is a user with this address already, that user is returned, unchanged. Creating a key for an address creates its
/// user too.
#[utoipa::path(
    operation_id = "createUser",
    post, path = "/v1/users", tag = "users", request_body = CreateUserBody,
    responses(
        (status = 200, description = "The user that was there already", body = UserView),
        (status = 201, description = "The new user", body = UserView),
    )
)]
pub async fn create(Call { app, caller, .. }: Call, Json(body): Json<CreateUserBody>) -> Result<Response, ApiError> {
    let email = Email::parse(&body.email)?;
    caller.require_admin()?;
    let external_id = body.external_id.map_or(Patch::Keep, Patch::Set);
    let attributes = AttributesPatch { external_id, metadata: body.metadata }.check()?;
    let created = app.writer.change(&caller.actor, async |change| {
        let (id, is_new) = users::create(change, &email, &attributes).await?;
        let user = users::get(&mut **change, id).await?.ok_or_else(|| unknown(id))?;
        Ok::<_, ApiError>((user, is_new))
    });
    let (user, is_new) = created.await?;
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    let location = [(header::LOCATION, format!("/v1/users/{}", user.id))];
    Ok((status, location, show(user)).into_response())
}

/// Get a user.
///
/// The ETag changes with email, plan, external id, metadata, time zone, metered and refill. It does not change with the balance or the
/// number of keys.
#[utoipa::path(
    operation_id = "getUser",
    get, path = "/v1/users/{id}", tag = "users", params(ById),
    responses((status = 200, description = "The user", body = UserView))
)]
pub async fn get(Call { app, caller, path }: Call<ById>) -> Result<Response, ApiError> {
    caller.require_user_or_admin(path.id)?;
    let user = users::get(&app.pool, path.id).await?.ok_or_else(|| unknown(path.id))?;
    Ok(show(user))
}

/// Change a user.
///
/// Fields that are not given keep their values.
#[utoipa::path(
    operation_id = "updateUser",
    patch, path = "/v1/users/{id}", tag = "users", request_body = UserBody, params(ById, IfMatch),
    responses(Conflict, (status = 200, description = "The user as it is now", body = UserView))
)]
pub async fn update(
    Call { app, caller, path }: Call<ById>,
    preconditions: Preconditions,
    Json(body): Json<UserBody>,
) -> Result<Response, ApiError> {
    caller.require_admin()?;
    let email = body.email.as_deref().map(Email::parse).transpose()?;
    let plan = body.plan.try_map(|name| Name::parse("plan", &name))?.given();
    let attributes = AttributesPatch { external_id: body.external_id, metadata: body.metadata }.check()?;
    let time_zone = body.time_zone.try_map(parse_time_zone)?.given();
    let is_empty = email.is_none() && plan.is_none() && attributes.is_empty() && time_zone.is_none();
    if is_empty && body.metered.is_none() && body.refill.is_keep() {
        return Err(ApiError::Invalid { field: None, detail: "Set at least one field.".into() });
    }
    if let Patch::Set(refill) = &body.refill {
        refill.check()?;
    }
    let user = app.writer.change(&caller.actor, async |change| {
        let user = lock_user(change, path.id).await?;
        preconditions.check(Some(user.version))?;
        // All entries of the trail are searched, before the locks that other changes need.
        let has_new_email = match &email {
            Some(email) => users::set_email(change, &user, email).await?,
            None => false,
        };
        // The plan first: it locks a definition, and a change of `metered` locks the store, which comes later in the order of locks.
        let has_new_plan = match &plan {
            Some(plan) => users::set_plan(change, user.id, plan.as_ref()).await?,
            None => false,
        };
        let has_new_zone = match &time_zone {
            Some(zone) => users::set_time_zone(change, user.id, zone.as_deref()).await?,
            None => false,
        };
        let has_new_attributes = users::set_attributes(change, user.id, &attributes).await?;
        let mut changed = credits::update(change, &(&user).into(), body.metered, body.refill).await?;
        if let Some(plan) = plan.filter(|_| has_new_plan) {
            changed.insert("plan".into(), plan.as_ref().map(Name::as_str).into());
        }
        if let Some(Value::Object(fields)) = attributes.merge().filter(|_| has_new_attributes) {
            changed.extend(fields);
        }
        if let Some(zone) = time_zone.filter(|_| has_new_zone) {
            changed.insert("time_zone".into(), zone.into());
        }
        if has_new_email {
            changed.insert("email".into(), email.as_ref().map(Email::as_str).into());
        }
        if !changed.is_empty() {
            let target = email.as_ref().map_or(user.email.as_str(), Email::as_str);
            change.record(AuditEvent::on("user.update", target, changed.into())).await?;
        }
        users::get(&mut **change, path.id).await?.ok_or_else(|| unknown(path.id))
    });
    Ok(show(user.await?))
}

/// Revoke all keys of a user.
///
/// The key of the caller is revoked too if it is one of them.
#[utoipa::path(
    operation_id = "revokeUserKeys",
    post, path = "/v1/users/{id}/revoke-keys", tag = "users", params(ById),
    responses(Conflict, (status = 200, description = "How many were revoked", body = RevokeKeysReply))
)]
pub async fn revoke_keys(Call { app, caller, path }: Call<ById>) -> Result<Json<RevokeKeysReply>, ApiError> {
    caller.require_user_or_admin(path.id)?;
    let revoked = app.writer.change(&caller.actor, async |change| revoke_all(change, path.id, caller.is_admin()).await);
    Ok(Json(revoked.await?))
}

/// Erase a user.
///
/// All keys of the user are revoked. The email address, external ids, metadata, the names of keys, their networks and the notes
/// of bookings are replaced or removed wherever they stand, in the audit trail too. Ids, counts and amounts stay.
#[utoipa::path(
    operation_id = "eraseUser",
    delete, path = "/v1/users/{id}", tag = "users", params(ById, IfMatch),
    responses(Conflict, (status = 200, description = "The user is erased", body = EraseReply))
)]
pub async fn erase(
    Call { app, caller, path }: Call<ById>,
    preconditions: Preconditions,
) -> Result<Json<EraseReply>, ApiError> {
    caller.require_admin()?;
    if caller.owner_id == path.id {
        let detail = "The key of this call belongs to the user. Use a key of another administrator.";
        return Err(ApiError::Conflict(detail.into()));
    }
    let erased = app.writer.change(&caller.actor, async |change| {
        preconditions.check(Some(lock_user(change, path.id).await?.version))?;
        users::erase::erase(change, path.id).await
    });
    Ok(Json(erased.await?))
}

fn parse_time_zone(zone: String) -> Result<String, ApiError> {
    if is_time_zone(&zone) {
        return Ok(zone);
    }
    Err(ApiError::invalid("time_zone", "must be a name of the IANA time zone database such as Europe/Berlin"))
}

fn show(user: UserView) -> Response {
    ([(header::ETAG, etag(user.version))], Json(user)).into_response()
}

/// The start of an address: any text that PostgreSQL can hold, as addresses are kept.
fn start_of_address(text: Option<String>) -> Result<String, ApiError> {
    let text = text.unwrap_or_default();
    if text.chars().any(char::is_control) || text.chars().count() > 254 {
        let detail = "must have at most 254 characters and no control characters";
        return Err(ApiError::invalid("email_prefix", detail));
    }
    Ok(Email::start(&text))
}
