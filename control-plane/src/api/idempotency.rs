//! Idempotent requests (draft-ietf-httpapi-idempotency-key-header). A request with an `Idempotency-Key` is handled
//! once; for a day, the same request gets the same response. Change and response commit together. A request that
//! failed has changed nothing and may be sent again.
//!
//! Responses contain new secrets. They are stored encrypted (XChaCha20-Poly1305) under a key that is derived from
//! the secret of the caller. That secret is not stored, so the database alone decrypts no response.

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, IF_MATCH, IF_NONE_MATCH, LOCATION};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use contract::hash::KeyHash;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::extract::{Json, json_line};
use super::preconditions::etag;
use crate::api::auth::{Caller, KEY_HEADER};
use crate::change::{Change, Writer};
use crate::error::ApiError;

/// The header that names a request.
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Longest name of a request.
const KEY_BYTES: usize = 255;

/// How long an answer is kept, as PostgreSQL reads it.
pub const KEPT_HOURS: i32 = 24;

/// The domain of the derivation of the sealing key (domain separation).
const DOMAIN: &[u8] = b"portcullis idempotent reply v1\0";

/// A request that may come again: the last argument of its handler. Its body is read with [`IdempotentRequest::body`]; it is done with
/// [`IdempotentRequest::respond`].
pub struct IdempotentRequest {
    named: Option<NamedRequest>,
    request: Request,
    empty: bool,
}

struct NamedRequest {
    key: String,
    /// Of method, path, query, preconditions and body.
    fingerprint: KeyHash,
    cipher: XChaCha20Poly1305,
}

/// An answer in JSON, or without a body.
#[derive(Clone, Debug)]
pub struct IdempotentResponse {
    status: StatusCode,
    location: Option<String>,
    etag: Option<HeaderValue>,
    body: Vec<u8>,
}

impl IdempotentResponse {
    /// An answer without further headers.
    pub fn new(status: StatusCode, body: &impl Serialize) -> Result<Self, ApiError> {
        let body = json_line(body).map_err(|error| ApiError::Internal(error.to_string()))?;
        Ok(Self { status, location: None, etag: None, body })
    }

    /// 204.
    pub const fn no_content() -> Self {
        Self { status: StatusCode::NO_CONTENT, location: None, etag: None, body: Vec::new() }
    }

    /// With the entity tag of what was made or changed.
    pub fn with_version(mut self, version: i64) -> Self {
        self.etag = Some(etag(version));
        self
    }

    /// With the address and the entity tag of the key that was made or rotated.
    pub fn of_key(mut self, id: Uuid, version: i64) -> Self {
        self.location = Some(format!("/v1/keys/{id}"));
        self.with_version(version)
    }
}

impl IntoResponse for IdempotentResponse {
    fn into_response(self) -> Response {
        if self.body.is_empty() {
            return self.status.into_response();
        }
        let mut response = (self.status, self.body).into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(location) = self.location.and_then(|location| HeaderValue::try_from(location).ok()) {
            headers.insert(LOCATION, location);
        }
        if let Some(etag) = self.etag {
            headers.insert(ETAG, etag);
        }
        response
    }
}

impl IdempotentRequest {
    /// Reads the body as JSON.
    pub async fn body<T: DeserializeOwned>(&mut self) -> Result<T, ApiError> {
        let request = std::mem::take(&mut self.request);
        Ok(Json::from_request(request, &()).await?.0)
    }

    /// Reads the body as JSON, if there is one.
    pub async fn body_or_default<T: DeserializeOwned + Default>(&mut self) -> Result<T, ApiError> {
        if self.empty { Ok(T::default()) } else { self.body().await }
    }

    /// Makes a change and stores its response in the same transaction. If the request was handled before, the stored response
    /// is given again and `work` does not run. Call it after all checks that need no database.
    ///
    /// 409 while the first request runs; 422 if another request used the key before, 403 for an old secret of the caller;
    /// those of `work`. Then nothing was changed.
    pub async fn respond(
        self,
        writer: &Writer,
        caller: &Caller,
        work: impl AsyncFnOnce(&mut Change) -> Result<IdempotentResponse, ApiError>,
    ) -> Result<Response, ApiError> {
        let named = self.named;
        let response = writer.change(&caller.actor, async |change| {
            let Some(named) = named else { return work(change).await };
            if let Some(stored) = named.stored(change, caller).await? {
                return Ok(stored);
            }
            let response = work(change).await?;
            named.store(change, caller.key_id, &response).await?;
            Ok(response)
        });
        Ok(response.await?.into_response())
    }
}

impl NamedRequest {
    async fn stored(
        &self,
        connection: &mut PgConnection,
        caller: &Caller,
    ) -> Result<Option<IdempotentResponse>, ApiError> {
        let caller_id = caller.key_id;
        // Held until the transaction ends. The next request with this key sees what was committed before.
        let KeyHash(name) = KeyHash::of(&[caller_id.as_bytes(), self.key.as_bytes()].concat());
        let lock = name.first_chunk().map_or(0, |first| i64::from_be_bytes(*first));
        let alone = sqlx::query_scalar!(r#"select pg_try_advisory_xact_lock($1) as "alone!""#, lock)
            .fetch_one(&mut *connection)
            .await?;
        if !alone {
            return Err(ApiError::InProgress);
        }
        let kept = sqlx::query!(
            "select r.fingerprint, r.status, r.location, r.etag, r.nonce, r.body, k.generation
            from idempotent_replies r join api_keys k on k.id = r.caller_key_id
            where r.caller_key_id = $1 and r.idempotency_key = $2
                and r.created_at > now() - make_interval(hours => $3)",
            caller_id,
            self.key,
            KEPT_HOURS
        )
        .fetch_optional(connection)
        .await?;
        let Some(kept) = kept else { return Ok(None) };
        if kept.fingerprint != self.fingerprint.0 {
            let detail = "Another request used this Idempotency-Key. Use a new one for each request.";
            return Err(ApiError::Mismatch(detail));
        }
        // The answer may hold the secret that replaced the caller's. A thief of the old secret must not get it.
        if !caller.presents(kept.generation) {
            let detail = "This request was handled before, and an old secret cannot read its response. Use the current secret, or \
                          ask an admin to rotate the key.";
            return Err(ApiError::Forbidden(detail.into()));
        }
        let nonce: [u8; 24] = kept.nonce.try_into().map_err(|_| ApiError::Internal("a nonce of odd length".into()))?;
        let sealed = Payload { msg: &kept.body, aad: &self.bound(caller_id) };
        let body = self.cipher.decrypt(&XNonce::from(nonce), sealed).map_err(|_| {
            let detail = "The first request used another secret of this key. Only that secret can read the response.";
            ApiError::Mismatch(detail)
        })?;
        let status = u16::try_from(kept.status).ok().and_then(|status| StatusCode::from_u16(status).ok());
        Ok(Some(IdempotentResponse {
            status: status.ok_or_else(|| ApiError::Internal("a status out of range".into()))?,
            location: kept.location,
            etag: kept.etag.and_then(|etag| HeaderValue::try_from(etag).ok()),
            body,
        }))
    }

    async fn store(
        &self,
        connection: &mut PgConnection,
        caller: Uuid,
        answer: &IdempotentResponse,
    ) -> Result<(), ApiError> {
        let mut nonce = [0_u8; 24];
        getrandom::fill(&mut nonce)
            .map_err(|error| ApiError::Internal(format!("the operating system gives no random bytes: {error}")))?;
        let open = Payload { msg: &answer.body, aad: &self.bound(caller) };
        let sealed = self.cipher.encrypt(&XNonce::from(nonce), open);
        let sealed = sealed.map_err(|_| ApiError::Internal("an answer could not be sealed".into()))?;
        let status = i16::try_from(answer.status.as_u16()).unwrap_or_default();
        // What stands there is older than a day.
        sqlx::query!(
            "insert into idempotent_replies
                (caller_key_id, idempotency_key, fingerprint, status, location, etag, nonce, body)
            values ($1, $2, $3, $4, $5, $6, $7, $8)
            on conflict (caller_key_id, idempotency_key) do update set fingerprint = excluded.fingerprint,
                status = excluded.status, location = excluded.location, etag = excluded.etag, nonce = excluded.nonce,
                body = excluded.body, created_at = now()",
            caller,
            self.key,
            &self.fingerprint.0[..],
            status,
            answer.location,
            answer.etag.as_ref().and_then(|etag| etag.to_str().ok()),
            &nonce[..],
            sealed
        )
        .execute(connection)
        .await?;
        Ok(())
    }

    /// The context that an answer is sealed with, so that none can replace another.
    fn bound(&self, caller: Uuid) -> Vec<u8> {
        [caller.as_bytes(), &self.fingerprint.0[..], self.key.as_bytes()].concat()
    }
}

impl<S: Send + Sync> FromRequest<S> for IdempotentRequest {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let key = name_of(request.headers())?;
        let (parts, body) = request.into_parts();
        let bytes = Bytes::from_request(Request::from_parts(parts.clone(), body), state).await;
        let bytes = bytes.map_err(|error| super::extract::unread(&error))?;
        let named = key.map(|key| {
            let presented = parts.headers.get(KEY_HEADER).map_or(&[][..], HeaderValue::as_bytes);
            let target = parts.uri.path_and_query().map_or("", |target| target.as_str());
            let condition = |name| parts.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
            let (matches, none_match) = (condition(IF_MATCH), condition(IF_NONE_MATCH));
            let head = format!("{} {target}\n{matches}\n{none_match}\n", parts.method);
            NamedRequest {
                key,
                fingerprint: KeyHash::of(&[head.as_bytes(), &bytes].concat()),
                cipher: XChaCha20Poly1305::new(&KeyHash::of(&[DOMAIN, presented].concat()).0.into()),
            }
        });
        Ok(Self { named, empty: bytes.is_empty(), request: Request::from_parts(parts, Body::from(bytes)) })
    }
}

/// The name of the request: a string of structured fields (RFC 9651); without quotes it is understood too.
fn name_of(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut given = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(first) = given.next() else { return Ok(None) };
    let text = first.to_str().ok().filter(|_| given.next().is_none());
    let text = text.map(|text| text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(text));
    let good = text.filter(|text| {
        (1..=KEY_BYTES).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"')
    });
    match good {
        Some(text) => Ok(Some(text.to_owned())),
        None => {
            let detail = format!("Idempotency-Key must have 1 to {KEY_BYTES} visible ASCII characters");
            Err(ApiError::Invalid { field: None, detail })
        }
    }
}

/// Forgets answers that are older than a day. Says how many.
pub async fn tidy(pool: &PgPool) -> Result<u64, sqlx::Error> {
    let forgotten = sqlx::query!(
        "delete from idempotent_replies where created_at < now() - make_interval(hours => $1)",
        KEPT_HOURS
    )
    .execute(pool)
    .await?;
    Ok(forgotten.rows_affected())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_one_name_with_or_without_quotes() {
        let named = |values: &[&[u8]]| {
            let values = values.iter().map(|value| (IDEMPOTENCY_KEY, HeaderValue::from_bytes(value).unwrap()));
            name_of(&values.collect()).ok()
        };
        assert_eq!(named(&[]), Some(None));
        for good in [&b"\"8e03978e-40d5\""[..], b"8e03978e-40d5"] {
            assert_eq!(named(&[good]), Some(Some("8e03978e-40d5".into())));
        }
        for bad in [&b""[..], b"\"\"", b"a b", b"\xff", b"\"a\"b\"", &[b'a'; 256]] {
            assert_eq!(named(&[bad]), None, "{bad:?}");
        }
        assert_eq!(named(&[b"a", b"a"]), None);
    }
}
