//! `POST /v1/keys/import`. The body is read as a stream, and never held in memory as a whole.

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use futures_util::StreamExt;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::api::call::Call;
use crate::api::extract::{Json, Query};
use crate::api::problem::Problem;
use crate::error::ApiError;
use crate::keys::import::line::ImportLine;
use crate::keys::import::{Import, ImportReply};

/// How to import.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ImportQuery {
    /// Check the lines and report what would be imported, but write nothing.
    #[serde(default)]
    #[param(required = false)]
    dry_run: bool,
}

/// Import keys of another system.
///
/// The body is one JSON object per line, or, as `text/csv`, a table whose first line names the columns: the same fields, with a
/// column `metadata.NAME` for each entry of the metadata. Entries of lists are separated by spaces. A table cannot have `quota`
/// or `rate_limits`. There are at most 100,000 lines of at most 16 KiB. Valid lines are imported, a thousand
/// per transaction, whatever the other lines contain. If the import ends early (400, 408, 503), the lines that were
/// committed stay imported. The same body can be sent again: those lines are then reported as duplicates. With `dry_run`,
/// the lines are only checked. To show progress, a client can send the lines in several requests of 1,000.
#[utoipa::path(
    operation_id = "importKeys",
    post, path = "/v1/keys/import", tag = "keys", params(ImportQuery),
    request_body(content = ImportLine, content_type = "application/x-ndjson"),
    responses(
        (status = 200, description = "The result of each line", body = ImportReply),
        (status = 400, description = "The body broke off; what was written until then stays", body = Problem, content_type = "application/problem+json"),
        (status = 408, description = "The body did not arrive in time; what was written until then stays", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "Body neither NDJSON nor CSV", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The database is not available; what was written until then stays", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn import(
    Call { app, caller, .. }: Call,
    Query(query): Query<ImportQuery>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<ImportReply>, ApiError> {
    caller.require_admin()?;
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    let is = |known: &&str| kind.eq_ignore_ascii_case(known);
    let is_table = is(&"text/csv");
    if !is_table && !["application/x-ndjson", "application/ndjson"].iter().any(is) {
        let detail = "Send one JSON object a line with Content-Type: application/x-ndjson, or a table with text/csv.";
        return Err(ApiError::Unreadable(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail.into()));
    }
    let mut import = Import::new(app.writer.clone(), caller.actor, app.pepper.clone()).dry_run(query.dry_run);
    if is_table {
        import = import.table();
    }
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|_| ApiError::Unreadable(StatusCode::BAD_REQUEST, "The body ended early.".into()))?;
        if !import.take(&piece).await? {
            break;
        }
    }
    Ok(Json(import.finish().await?))
}
