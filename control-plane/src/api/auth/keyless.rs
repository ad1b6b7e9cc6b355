//! Calls of routes that need no key.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use contract::policy::Policy;

use super::presented_key::PresentedKey;
use crate::App;
use crate::error::ApiError;

/// A call of a route that needs no key. It counts against the owner of a good key, and otherwise against its address.
#[derive(Clone, Copy, Debug)]
pub struct Keyless;

impl FromRequestParts<App> for Keyless {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let mut presented = PresentedKey::read(app, parts);
        presented.count_unless_admitted(Policy::PLAIN).await?;
        if let Some(record) = presented.admitted(Policy::PLAIN) {
            app.rate_limiter.count_owner(record.owner_id.into())?;
        }
        Ok(Self)
    }
}
