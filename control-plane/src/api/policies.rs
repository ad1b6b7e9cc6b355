//! `/v1/policies`: what is required of requests, and which requests a policy is for. All handlers are for admins.

use axum::http::StatusCode;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::api::call::Call;
use crate::api::definitions::{ByName, put_reply, reply};
use crate::api::envoys::{AppliedOn, applied_on};
use crate::api::extract::Query;
use crate::api::idempotency::{IdempotentRequest, IdempotentResponse};
use crate::api::openapi::{Conditions, Conflict, IdempotencyKey};
use crate::api::pagination::{self, All, List, PageQuery};
use crate::change::Change;
use crate::definitions::Kind;
use crate::definitions::policy::{KeyNeedBody, MatchBody, PolicyBody, PolicyRateLimitBody, ScopesBody};
use crate::definitions::store::{self, Definition};
use crate::definitions::uses;
use crate::domain::{KindBody, Preconditions, Timestamp};
use crate::error::ApiError;

/// A policy.
#[derive(Debug, Serialize, ToSchema)]
pub struct PolicyView {
    /// The name by which routes refer to it. `default` is that of the policy for requests without another.
    #[schema(example = "orders-read")]
    name: String,
    /// For people.
    description: String,
    /// Whether a request needs a key.
    key: KeyNeedBody,
    /// Kinds of keys that are accepted; null for both.
    #[schema(required)]
    kinds: Option<Vec<KindBody>>,
    /// Scopes that the key must have; null if it needs none.
    #[schema(required, inline)]
    scopes: Option<ScopesBody>,
    /// Credits that a request costs; null if that is the cost of the key.
    #[schema(required)]
    cost: Option<u32>,
    /// Limits of the requests under this policy.
    rate_limits: Vec<PolicyRateLimitBody>,
    /// Whether nothing is refused.
    shadow: bool,
    /// Whether the hashes of unknown keys are captured.
    capture_unknown: bool,
    /// Whether the owner of a route may name the policy.
    from_annotation: bool,
    /// The requests that the policy is for although their route names no policy.
    #[serde(rename = "match")]
    matches: Vec<MatchBody>,
    /// Since when there is one of that name.
    created_at: Timestamp,
}

impl PolicyView {
    fn of(definition: Definition) -> Self {
        let policy = definition.policy.map(|policy| policy.0).unwrap_or_default();
        let body = PolicyBody::of(&definition.description, &policy);
        Self {
            name: definition.name,
            description: body.description,
            key: body.key,
            kinds: body.kinds,
            scopes: body.scopes,
            cost: body.cost,
            rate_limits: body.rate_limits,
            shadow: body.shadow,
            capture_unknown: body.capture_unknown,
            from_annotation: body.from_annotation,
            matches: body.matches,
            created_at: definition.created_at.into(),
        }
    }
}

/// A policy, and on how many Envoys it is in force.
#[derive(Debug, Serialize, ToSchema)]
pub struct PolicyDetails {
    #[serde(flatten)]
    view: PolicyView,
    /// By how many Envoys the last change was applied.
    applied_on: AppliedOn,
    /// The last report that a route of an Envoy named the policy, accurate to ten minutes; null if none did.
    #[schema(required)]
    last_named_at: Option<Timestamp>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct DeleteQuery {
    /// Delete it although routes of Envoys named it within the last two hours.
    #[serde(default)]
    #[param(required = false)]
    force: bool,
}

super::pagination::page!(PolicyPage "A page of policies, by name." { policies: PolicyView = "The policies." });

/// List policies by name.
///
/// As long as there is none, every request needs a key. With the first policy comes one of the name `default`.
#[utoipa::path(
    operation_id = "listPolicies",
    get, path = "/v1/policies", tag = "policies", params(PageQuery),
    responses((status = 200, description = "A page of the list", body = PolicyPage))
)]
pub async fn list(Call { app, caller, .. }: Call, List { page, .. }: List<All, String>) -> Result<Response, ApiError> {
    caller.require_admin()?;
    let mut found = store::list(&app.pool, Kind::Policy, page.after.as_deref(), page.read()).await?;
    let next = page.cut(&mut found, |last| last.name.clone());
    let policies = found.into_iter().map(PolicyView::of).collect();
    Ok(pagination::reply(PolicyPage { policies, next_cursor: next.cursor }, next.link))
}

/// Get a policy.
#[utoipa::path(
    operation_id = "getPolicy",
    get, path = "/v1/policies/{name}", tag = "policies", params(ByName),
    responses((status = 200, description = "The policy", body = PolicyDetails))
)]
pub async fn get(Call { app, caller, path }: Call<ByName>) -> Result<Response, ApiError> {
    let name = path.parse(&caller)?;
    let found = store::get(&app.pool, Kind::Policy, &name).await?.ok_or_else(|| store::missing(Kind::Policy, &name))?;
    let applied_on = applied_on(&app, found.revision).await?;
    let last_named_at = uses::last_named(&mut *app.pool.acquire().await?, found.number).await?.map(|(at, _)| at);
    Ok(reply(StatusCode::OK, found.version, PolicyDetails { view: PolicyView::of(found), applied_on, last_named_at }))
}

/// Create a policy, or replace it as a whole.
///
/// A change reaches every Envoy as fast as a revocation does.
#[utoipa::path(
    operation_id = "putPolicy",
    put, path = "/v1/policies/{name}", tag = "policies", params(ByName, Conditions, IdempotencyKey),
    request_body = PolicyBody,
    responses(
        Conflict,
        (status = 200, description = "Replaced, or the same as before", body = PolicyView),
        (status = 201, description = "Created", body = PolicyView),
    )
)]
pub async fn put(
    Call { app, caller, path }: Call<ByName>,
    preconditions: Preconditions,
    mut request: IdempotentRequest,
) -> Result<Response, ApiError> {
    let name = path.parse(&caller)?;
    let content = request.body::<PolicyBody>().await?.parse(&name)?;
    let put = async |change: &mut Change| {
        let put = store::put(change, Kind::Policy, &name, &content, &preconditions).await?;
        put_reply(put, PolicyView::of)
    };
    request.respond(&app.writer, &caller, put).await
}

/// Delete a policy that is not in use.
///
/// A policy with `match` is in use, and one that routes of Envoys named within the last two hours. Envoys answer 503
/// `policy_unknown` to requests whose route still names it.
#[utoipa::path(
    operation_id = "deletePolicy",
    delete, path = "/v1/policies/{name}", tag = "policies", params(ByName, DeleteQuery, Conditions, IdempotencyKey),
    responses(Conflict, (status = 204, description = "Deleted"))
)]
pub async fn delete(
    Call { app, caller, path }: Call<ByName>,
    Query(query): Query<DeleteQuery>,
    preconditions: Preconditions,
    request: IdempotentRequest,
) -> Result<Response, ApiError> {
    let name = path.parse(&caller)?;
    let remove = async |change: &mut Change| {
        store::remove(change, Kind::Policy, &name, &preconditions, query.force).await?;
        Ok(IdempotentResponse::no_content())
    };
    request.respond(&app.writer, &caller, remove).await
}
