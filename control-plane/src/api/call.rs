//! What every call of the management API comes with.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use super::App;
use super::auth::Caller;
use super::extract::Path;
use crate::error::ApiError;

/// A call with an admitted key, and the parameters of its path. The key is judged first.
pub struct Call<P = ()> {
    pub app: App,
    pub caller: Caller,
    pub path: P,
}

impl<P: DeserializeOwned + Send> FromRequestParts<App> for Call<P> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let caller = Caller::from_request_parts(parts, app).await?;
        let Path(path) = Path::from_request_parts(parts, app).await?;
        Ok(Self { app: app.clone(), caller, path })
    }
}
