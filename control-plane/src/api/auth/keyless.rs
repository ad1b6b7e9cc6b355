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
        let presented = PresentedKey::read(app, parts);
        match presented.admitted(Policy::PLAIN) {
            Some(record) => app.rate_limiter.count_owner(record.owner_id.into())?,
            None => app.rate_limiter.count_address(presented.address)?,
        }
        Ok(Self)
    }
}
