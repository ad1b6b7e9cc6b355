//! Filters, which call with a key that has the scope `sync`.

use std::sync::{Arc, LazyLock};

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use contract::policy::{Policy, ScopeNeed};
use uuid::Uuid;

use super::presented_key::PresentedKey;
use crate::App;
use crate::domain::SYNC;
use crate::error::ApiError;
use crate::net::admission::Place;

/// The policy for callers that are filters.
static SYNC_POLICY: LazyLock<Policy> =
    LazyLock::new(|| Policy { scopes: ScopeNeed::All(vec![SYNC.to_owned()]), ..Policy::default() });

/// A filter: the id of its key, which has the scope `sync`.
///
/// The mirror knows its key, so that Envoys are answered while the database is down; a key that the mirror does not know
/// may be newer than the mirror and is looked up in the database.
#[derive(Clone, Copy, Debug)]
pub struct SyncCaller(pub Uuid);

impl FromRequestParts<App> for SyncCaller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let presented = PresentedKey::find(app, parts, &SYNC_POLICY).await?;
        let record = match &presented.mirrored {
            Some(record) => Some(record.clone()),
            None => presented.stored().await?.map(|found| found.record),
        };
        let bytes = presented.bytes;
        let record = presented.admit(record, &SYNC_POLICY)?;
        if let Some(place) = parts.extensions.get::<Arc<Place>>() {
            place.recognise_filter();
        }
        app.usage.learn(record.key_id.into(), record.generation, bytes);
        Ok(Self(record.key_id.into()))
    }
}
