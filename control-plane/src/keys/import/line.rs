//! Parses one line of an import. An error contains no part of the key, wherever in the line the key stood.

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use contract::hash::KeyHash;
use contract::json::{Fault, InputError, null_is_default, read, read_value};
use contract::key::{KeyKind, PRESENTED_BYTES, Secret};
use serde::Deserialize;
use serde_json::Value;
use time::OffsetDateTime;
use utoipa::ToSchema;

use crate::domain::{
    AttributesPatch, Email, KeyName, KindBody, Metadata, Patch, QuotaBody, RateLimitBody, Scopes, default_expiry,
    parse_expiry,
};
use crate::error::ApiError;
use crate::keys::permissions::{Permissions, PermissionsPatch};

/// Shortest plain key. Shorter ones could be guessed.
const KEY_BYTES: usize = 16;

/// Longest prefix: shorter than the shortest key, so that no whole key is stored as a prefix.
const PREFIX_BYTES: usize = 12;

/// Base64 with or without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// One line of the body.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
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
    /// Its SHA-256, as hexadecimal digits or base64. Not with `key`.
    #[schema(pattern = "^sha256:([0-9a-fA-F]{64}|[0-9A-Za-z+/_-]{43}=?)$")]
    hash: Option<String>,
    /// The start of the secret, by which people recognise it; of keys of our own form it is known.
    #[schema(min_length = 1, max_length = 12)]
    prefix: Option<String>,
    /// Scopes to grant.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, max_items = 32)]
    scopes: Vec<String>,
    /// Its own rate limits.
    #[schema(max_items = 8)]
    rate_limits: Option<Vec<RateLimitBody>>,
    /// Names of its roles, at most 16.
    #[schema(max_items = 16)]
    roles: Option<Vec<String>>,
    /// The name of its own plan.
    plan: Option<String>,
    /// Its own quota.
    quota: Option<QuotaBody>,
    /// Credits that a request costs unless its policy says otherwise; 1 unless given.
    #[schema(minimum = 0, maximum = 1_000_000)]
    cost: Option<i64>,
    /// Networks or addresses from which it can be used; all unless given.
    #[schema(max_items = 32)]
    allowed_addresses: Option<Vec<String>>,
    /// Whether it is for production or for tests. Without it, a key in the format of Portcullis has the kind of its first
    /// characters; any other key is live.
    #[schema(inline)]
    kind: Option<KindBody>,
    /// Its id in another system.
    #[schema(min_length = 1, max_length = 128)]
    external_id: Option<String>,
    /// Metadata that the filter can pass upstream, at most 16 entries.
    #[schema(value_type = Option<BTreeMap<String, serde_json::Value>>)]
    metadata: Option<Metadata>,
    /// When it ends: RFC 3339.
    #[schema(format = DateTime)]
    expires_at: Option<String>,
    /// Whether it is disabled.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable)]
    disabled: bool,
}

/// A parsed line.
#[derive(Clone, Debug)]
pub struct ImportedKey {
    /// The address of the owner.
    pub email: Email,
    pub name: KeyName,
    /// SHA-256 of the key.
    pub hash: KeyHash,
    pub prefix: Option<String>,
    pub kind: KeyKind,
    pub scopes: Scopes,
    pub permissions: Permissions,
    pub expires_at: Option<OffsetDateTime>,
    pub disabled: bool,
}

/// Parses a line of JSON.
pub fn parse(line: &[u8], now: OffsetDateTime) -> Result<ImportedKey, String> {
    parse_body(read(line).map_err(|error| unreadable(&error))?, now)
}

/// Parses a line that is a JSON object already: that of a table.
pub fn parse_value(line: &Value, now: OffsetDateTime) -> Result<ImportedKey, String> {
    parse_body(read_value(line).map_err(|error| unreadable(&error))?, now)
}

fn parse_body(body: ImportLine, now: OffsetDateTime) -> Result<ImportedKey, String> {
    let (key, hash) = (body.key.clone(), body.hash.clone());
    check(body, now).map_err(|error| {
        let reason = error.to_string();
        // If columns of a table were mixed up, the key may be in the field for a name, which errors repeat.
        let repeats_key = [key, hash].into_iter().flatten().any(|key| !key.is_empty() && reason.contains(&key));
        if repeats_key { "a field other than key or hash has the key".into() } else { reason }
    })
}

fn check(body: ImportLine, now: OffsetDateTime) -> Result<ImportedKey, ApiError> {
    let (hash, known_prefix, known_kind) = match (body.key, body.hash) {
        (Some(key), None) => plain(key)?,
        (None, Some(hash)) => (hashed(&hash)?, None, None),
        _ => return Err(ApiError::invalid("key", "give either key or hash")),
    };
    let scopes = Scopes::parse(body.scopes)?;
    let expires_at = parse_expiry(body.expires_at.as_deref(), None, now)?.or(default_expiry(&scopes, now));
    Ok(ImportedKey {
        email: Email::parse(&body.email)?,
        name: KeyName::parse("name", &body.name)?,
        hash,
        prefix: body.prefix.map(prefix).transpose()?.or(known_prefix),
        kind: body.kind.map(KeyKind::from).or(known_kind).unwrap_or_default(),
        scopes,
        permissions: Permissions::parse(PermissionsPatch {
            roles: body.roles,
            plan: body.plan.map_or(Patch::Keep, Patch::Set),
            allowed_addresses: body.allowed_addresses,
            quota: body.quota.map_or(Patch::Keep, Patch::Set),
            cost: body.cost,
            rate_limits: body.rate_limits,
            attributes: AttributesPatch {
                external_id: body.external_id.map_or(Patch::Keep, Patch::Set),
                metadata: body.metadata,
            },
        })?,
        expires_at,
        disabled: body.disabled,
    })
}

fn plain(key: String) -> Result<(KeyHash, Option<String>, Option<KeyKind>), ApiError> {
    if !(KEY_BYTES..=PRESENTED_BYTES).contains(&key.len()) || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        let detail = format!("must have {KEY_BYTES} to {PRESENTED_BYTES} visible ASCII characters");
        return Err(ApiError::invalid("key", detail));
    }
    let kind = contract::key::check(&key).ok();
    let secret = Secret::from_presented(key);
    Ok((secret.hash(), secret.display_prefix(), kind))
}

fn hashed(text: &str) -> Result<KeyHash, ApiError> {
    let decoded = text.strip_prefix("sha256:").and_then(|text| match text.len() {
        64 => hex::decode(text).ok(),
        _ => BASE64.decode(text.replace('-', "+").replace('_', "/")).ok(),
    });
    let bytes = decoded.and_then(|bytes| bytes.try_into().ok());
    let detail = "must be sha256: and 64 hexadecimal digits, or the 32 bytes in base64";
    bytes.map(KeyHash).ok_or_else(|| ApiError::invalid("hash", detail))
}

fn prefix(text: String) -> Result<String, ApiError> {
    if !(1..=PREFIX_BYTES).contains(&text.len()) || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        let detail = format!("must have 1 to {PREFIX_BYTES} visible ASCII characters");
        return Err(ApiError::invalid("prefix", detail));
    }
    Ok(text)
}

/// The name of an unknown field may be a key, so the error does not repeat it.
fn unreadable(error: &InputError) -> String {
    let InputError { parent, path, fault, detail } = error;
    match (fault, parent.as_str()) {
        (Fault::Unknown, "") => "the line has a field that is not known".into(),
        (Fault::Unknown, parent) => format!("{parent}: has a field that is not known"),
        (_, _) if path.is_empty() => format!("the line {detail}"),
        (_, _) => format!("{path}: {detail}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use time::macros::datetime;

    use super::*;

    const KEY: &str = "0123456789abcdef";

    /// A line with these fields beside the owner and the name.
    fn with(fields: &Value) -> Value {
        let mut line = json!({"email": "u@example.com", "name": "n"});
        line.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        line
    }

    fn parsed(line: &Value) -> Result<ImportedKey, String> {
        parse(line.to_string().as_bytes(), datetime!(2026-01-01 00:00 UTC))
    }

    #[test]
    fn a_plain_key_and_its_hash_are_the_same_key() {
        let plain = parsed(&with(&json!({"key": KEY}))).unwrap();
        let hash = format!("sha256:{}", hex::encode(KeyHash::of(KEY.as_bytes()).0));
        let hashed = parsed(&with(&json!({"hash": hash, "prefix": "012"}))).unwrap();
        assert_eq!(plain.hash, hashed.hash);
        assert_eq!((plain.prefix, hashed.prefix.as_deref()), (None, Some("012")));
        for alphabet in [base64::prelude::BASE64_STANDARD, base64::prelude::BASE64_URL_SAFE_NO_PAD] {
            let hash = format!("sha256:{}", alphabet.encode(KeyHash::of(KEY.as_bytes()).0));
            assert_eq!(parsed(&with(&json!({"hash": hash}))).unwrap().hash, plain.hash, "{hash}");
        }
        let longest = "x".repeat(PRESENTED_BYTES);
        assert!(parsed(&with(&json!({"key": longest}))).is_ok());
    }

    #[test]
    fn what_is_wrong_is_said_without_the_key() {
        let key = "lower-case-secret-of-some-length";
        for (line, reason) in [
            (json!({"name": "n", "key": key}), "email: is missing"),
            (with(&json!({})), "key: give either key or hash"),
            (with(&json!({"key": key, "hash": key})), "key: give either key or hash"),
            (with(&json!({"key": "0123456789abcde"})), "key: must have 16 to 1024 visible ASCII characters"),
            (with(&json!({"key": "0123456789abcdef "})), "key: must have 16 to 1024 visible ASCII characters"),
            (
                with(&json!({"hash": "sha256:00"})),
                "hash: must be sha256: and 64 hexadecimal digits, or the 32 bytes in base64",
            ),
            (with(&json!({"key": key, "prefix": key})), "prefix: must have 1 to 12 visible ASCII characters"),
            (with(&json!({"key": key, "expires_at": "2020-01-01T00:00:00Z"})), "expires_at: must be in the future"),
            (
                with(&json!({"key": key, "rate_limits": [{"name": key, "requests": 0, "window_seconds": 1}]})),
                "a field other than key or hash has the key",
            ),
        ] {
            assert_eq!(parsed(&line).unwrap_err(), reason, "{line}");
        }
        let good = |field: &str, value: Value| with(&json!({"key": KEY, (field): value}));
        let limit = json!({"name": "n", "requests": 1, "window_seconds": 1});
        let unknown = json!({"name": "n", "requests": 1, "window_seconds": 1, (key): 1});
        for (line, reason) in [
            (good("scopes", json!(key)), "scopes: must be an array"),
            (good("scopes", json!(["a", 1])), "scopes[1]: must be a string"),
            (good("rate_limits", json!([limit, 5])), "rate_limits[1]: must be an object"),
            (good("rate_limits", json!([["n", 1, 1]])), "rate_limits[0]: must be an object"),
            (
                good("rate_limits", json!([limit, {"name": "n", "requests": 1}])),
                "rate_limits[1].window_seconds: is missing",
            ),
            (good("rate_limits", json!([unknown])), "rate_limits[0]: has a field that is not known"),
            (good("disabled", json!("yes")), "disabled: must be true or false"),
            (good("cost", json!(-1)), "cost: must be a number from 0 to 1000000"),
            (good("plan", json!("Gold")), "plan: each name must have 1 to 64 characters of a-z, 0-9, _ and -"),
            (good("allowed_addresses", json!(["x"])), "allowed_addresses: entry 0: "),
            (good("name", json!(null)), "name: must be a string"),
            (good(key, json!(1)), "the line has a field that is not known"),
            (json!([key]), "the line must be an object"),
            (json!(key), "the line must be an object"),
        ] {
            let said = parsed(&line).unwrap_err();
            assert!(said.starts_with(reason), "{line}: {said}");
        }
        let nulls = with(&json!({
            "key": KEY, "hash": null, "prefix": null, "scopes": null, "rate_limits": null, "expires_at": null, "disabled": null,
            "roles": null, "plan": null, "quota": null, "cost": null, "allowed_addresses": null,
        }));
        assert!(parsed(&nulls).is_ok());
        let broken = parse(format!("{{\"key\": {key}").as_bytes(), datetime!(2026-01-01 00:00 UTC)).unwrap_err();
        assert!(broken.starts_with("the line is not JSON: ") && !broken.contains(key), "{broken}");
    }
}
