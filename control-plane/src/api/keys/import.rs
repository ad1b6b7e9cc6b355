//! `POST /v1/keys/import`. The body is read as a stream, and never held in memory as a whole.

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use futures_util::StreamExt;
use serde::Serialize;
use utoipa::ToSchema;

use crate::api::call::Call;
use crate::api::extract::Json;
use crate::api::problem::Problem;
use crate::domain::RateLimitBody;
use crate::error::ApiError;
use crate::keys::import::{BadLine, Import, Imported};

/// One line of the body.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "for the document; lines are read where they are imported")]
#[schema(example = json!({"email": "user@example.com", "name": "Legacy", "key": "a-key-of-another-system"}))]
pub struct ImportLine {
    /// The email address of its owner.
    #[schema(example = "user@example.com", max_length = 254)]
    email: String,
    /// A name for people.
    #[schema(min_length = 1, max_length = 100)]
    name: String,
    /// The key itself: 16 to 1,024 visible ASCII characters. Not with `hash`.
    #[schema(min_length = 16, max_length = 1_024)]
    key: Option<String>,
    /// Its SHA-256. Not with `key`.
    #[schema(pattern = "^sha256:[0-9a-fA-F]{64}$")]
    hash: Option<String>,
    /// The start of the secret, by which people recognise it; of keys of our own form it is known.
    #[schema(min_length = 1, max_length = 12)]
    prefix: Option<String>,
    /// Scopes to grant.
    #[schema(max_items = 32)]
    scopes: Option<Vec<String>>,
    /// Its own rate limits.
    #[schema(max_items = 8)]
    rate_limits: Option<Vec<RateLimitBody>>,
    /// When it ends: RFC 3339.
    #[schema(format = DateTime)]
    expires_at: Option<String>,
    /// Whether it is disabled.
    disabled: Option<bool>,
}

/// A line that was not taken.
#[derive(Debug, Serialize, ToSchema)]
pub struct ImportError {
    /// Its number, from 1.
    line: u64,
    /// The error, for programs: `invalid`, `duplicate`, `too_long`, `too_many`.
    #[schema(value_type = String, example = "duplicate")]
    code: &'static str,
    /// What is wrong, in words.
    reason: String,
}

impl From<BadLine> for ImportError {
    fn from(bad: BadLine) -> Self {
        Self { line: bad.line, code: bad.code.name(), reason: bad.reason }
    }
}

/// The result of an import.
#[derive(Debug, Serialize, ToSchema)]
pub struct ImportReply {
    /// Lines that are keys now.
    imported: u64,
    /// Lines that were not taken.
    failed: u64,
    /// The first thousand of them.
    #[schema(max_items = 1_000)]
    errors: Vec<ImportError>,
    /// Whether there are more errors than listed.
    errors_truncated: bool,
}

impl From<Imported> for ImportReply {
    fn from(imported: Imported) -> Self {
        Self {
            imported: imported.imported,
            failed: imported.failed,
            errors: imported.errors.into_iter().map(Into::into).collect(),
            errors_truncated: imported.errors_truncated,
        }
    }
}

/// Import keys of another system.
///
/// The body holds one JSON object per line, at most 100,000 lines of at most 16 KiB. Valid lines are imported, a thousand
/// per transaction, whatever the other lines contain. If the import ends early (400, 408, 503), the lines that were
/// committed stay imported. The same body can be sent again: those lines are then reported as duplicates.
#[utoipa::path(
    operation_id = "importKeys",
    post, path = "/v1/keys/import", tag = "keys",
    request_body(content = ImportLine, content_type = "application/x-ndjson"),
    responses(
        (status = 200, description = "The result of each line", body = ImportReply),
        (status = 400, description = "The body broke off; what was written until then stays", body = Problem, content_type = "application/problem+json"),
        (status = 408, description = "The body did not arrive in time; what was written until then stays", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "Body not NDJSON", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The database is not available; what was written until then stays", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn import(
    Call { app, caller, .. }: Call,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<ImportReply>, ApiError> {
    caller.require_admin()?;
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !["application/x-ndjson", "application/ndjson"].iter().any(|known| kind.eq_ignore_ascii_case(known)) {
        let detail = "Send one JSON object a line, with Content-Type: application/x-ndjson.";
        return Err(ApiError::Unreadable(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail.into()));
    }
    let mut import = Import::new(app.writer.clone(), caller.actor, app.pepper.clone());
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|_| ApiError::Unreadable(StatusCode::BAD_REQUEST, "The body ended early.".into()))?;
        if !import.take(&piece).await? {
            break;
        }
    }
    Ok(Json(import.finish().await?.into()))
}
