//! `GET /v1/keys/{id}`.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::quota::QuotaView;
use super::view::KeyView;
use super::{ById, managed, show};
use crate::App;
use crate::api::call::Call;
use crate::api::envoys::{AppliedOn, key_applied_on};
use crate::api::extract::Json;
use crate::api::preconditions::etag;
use crate::credits;
use crate::domain::Preconditions;
use crate::error::ApiError;
use crate::keys::rotate::{SecretView, secrets};

/// A key with what belongs to it.
#[derive(Debug, Serialize, ToSchema)]
pub struct KeyDetails {
    /// The key.
    #[serde(flatten)]
    view: KeyView,
    /// Its secrets that filters still know, the newest first: the use of an old one shows when it is safe to
    /// revoke it.
    secrets: Vec<SecretView>,
    /// Use of its quota, and the requests that Envoys hold; null without a quota.
    #[schema(required)]
    quota_usage: Option<QuotaView>,
    /// Credits of its owner, and those that Envoys hold; null if the owner is not metered.
    #[schema(required)]
    credits: Option<CreditsView>,
    /// By how many Envoys its last change was applied, as they say themselves.
    applied_on: AppliedOn,
}

/// The credits of a key's owner.
#[derive(Debug, Serialize, ToSchema)]
pub struct CreditsView {
    /// The sum of the ledger.
    balance: i64,
    /// Credits that Envoys hold and have not reported as spent.
    held: i64,
    /// Credits that all requests so far have cost.
    spent: i64,
}

impl CreditsView {
    async fn read(app: &App, owner_id: Uuid) -> Result<Option<Self>, ApiError> {
        let account = credits::account(&app.pool, owner_id).await?;
        let Some(account) = account.filter(|account| account.metered) else { return Ok(None) };
        Ok(Some(Self { balance: account.balance, held: account.held, spent: account.spent }))
    }
}

/// Get a key.
///
/// The ETag changes with the settings of the key. It does not change with its usage or with the Envoys that applied it.
#[utoipa::path(
    operation_id = "getKey",
    get, path = "/v1/keys/{id}", tag = "keys",
    params(ById, ("If-None-Match" = Option<String>, Header, description = "ETags that the client has already")),
    responses(
        (status = 200, description = "The key", body = KeyDetails),
        (status = 304, description = "The client has this version already"),
    )
)]
pub async fn get(Call { app, caller, path }: Call<ById>, preconditions: Preconditions) -> Result<Response, ApiError> {
    let key = managed(&app, &caller, path.id).await?;
    let tag = [(header::ETAG, etag(key.version))];
    if preconditions.is_known(key.version) {
        return Ok((StatusCode::NOT_MODIFIED, tag).into_response());
    }
    let secrets = secrets(&app.pool, key.id).await?;
    let quota_usage = QuotaView::read(&app.pool, key.id).await?;
    let credits = CreditsView::read(&app, key.owner_id).await?;
    let view = show(&app.pool, key).await?;
    let applied_on = key_applied_on(&app, path.id).await?;
    Ok((tag, Json(KeyDetails { view, secrets, quota_usage, credits, applied_on })).into_response())
}
