//! Parses one line of an import. An error contains no part of the key, wherever in the line the key stood.

use contract::hash::KeyHash;
use contract::json::{Fault, InputError, null_is_default, read};
use contract::key::{PRESENTED_BYTES, Secret};
use contract::record::RateLimit;
use serde::Deserialize;
use time::OffsetDateTime;

use crate::domain::{Email, KeyName, RateLimitBody, Scopes, default_expiry, parse_expiry, parse_key_rate_limits};
use crate::error::ApiError;

/// Shortest plain key. Shorter ones could be guessed.
const KEY_BYTES: usize = 16;

/// Longest prefix: shorter than the shortest key, so that no whole key is stored as a prefix.
const PREFIX_BYTES: usize = 12;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    email: String,
    name: String,
    key: Option<String>,
    hash: Option<String>,
    prefix: Option<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    scopes: Vec<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    rate_limits: Vec<RateLimitBody>,
    expires_at: Option<String>,
    #[serde(default, deserialize_with = "null_is_default")]
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
    pub scopes: Scopes,
    pub rate_limits: Vec<RateLimit>,
    pub expires_at: Option<OffsetDateTime>,
    pub disabled: bool,
}

/// Parses a line.
///
/// # Errors
/// What is wrong with it, without any part of the key.
pub fn parse(line: &[u8], now: OffsetDateTime) -> Result<ImportedKey, String> {
    let body: Body = read(line).map_err(|error| unreadable(&error))?;
    let (key, hash) = (body.key.clone(), body.hash.clone());
    check(body, now).map_err(|error| {
        let reason = error.to_string();
        // If columns of a table were mixed up, the key may be in the field for a name, which errors repeat.
        let repeats_key = [key, hash].into_iter().flatten().any(|key| !key.is_empty() && reason.contains(&key));
        if repeats_key { "a field other than key or hash has the key".into() } else { reason }
    })
}

fn check(body: Body, now: OffsetDateTime) -> Result<ImportedKey, ApiError> {
    let (hash, known_prefix) = match (body.key, body.hash) {
        (Some(key), None) => plain(key)?,
        (None, Some(hash)) => (hashed(&hash)?, None),
        _ => return Err(ApiError::invalid("key", "give either key or hash")),
    };
    let scopes = Scopes::parse(body.scopes)?;
    let expires_at = parse_expiry(body.expires_at.as_deref(), None, now)?.or(default_expiry(&scopes, now));
    Ok(ImportedKey {
        email: Email::parse(&body.email)?,
        name: KeyName::parse("name", &body.name)?,
        hash,
        prefix: body.prefix.map(prefix).transpose()?.or(known_prefix),
        scopes,
        rate_limits: parse_key_rate_limits(body.rate_limits)?,
        expires_at,
        disabled: body.disabled,
    })
}

fn plain(key: String) -> Result<(KeyHash, Option<String>), ApiError> {
    if !(KEY_BYTES..=PRESENTED_BYTES).contains(&key.len()) || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        let detail = format!("must have {KEY_BYTES} to {PRESENTED_BYTES} visible ASCII characters");
        return Err(ApiError::invalid("key", detail));
    }
    let secret = Secret::from_presented(key);
    Ok((secret.hash(), secret.display_prefix()))
}

fn hashed(text: &str) -> Result<KeyHash, ApiError> {
    let digits = text.strip_prefix("sha256:").filter(|digits| digits.len() == 64);
    let bytes = digits.and_then(|digits| hex::decode(digits).ok()).and_then(|bytes| bytes.try_into().ok());
    bytes.map(KeyHash).ok_or_else(|| ApiError::invalid("hash", "must be sha256: and 64 hexadecimal digits"))
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
    use serde_json::{Value, json};
    use time::macros::datetime;

    use super::*;

    const KEY: &str = "0123456789abcdef";

    fn parsed(line: &Value) -> Result<ImportedKey, String> {
        parse(line.to_string().as_bytes(), datetime!(2026-01-01 00:00 UTC))
    }

    #[test]
    fn a_plain_key_and_its_hash_are_the_same_key() {
        let plain = parsed(&json!({"email": "u@example.com", "name": "n", "key": KEY})).unwrap();
        let hash = format!("sha256:{}", hex::encode(KeyHash::of(KEY.as_bytes()).0));
        let hashed = parsed(&json!({"email": "u@example.com", "name": "n", "hash": hash, "prefix": "012"})).unwrap();
        assert_eq!(plain.hash, hashed.hash);
        assert_eq!((plain.prefix, hashed.prefix.as_deref()), (None, Some("012")));
        let longest = "x".repeat(PRESENTED_BYTES);
        assert!(parsed(&json!({"email": "u@example.com", "name": "n", "key": longest})).is_ok());
    }

    #[test]
    fn what_is_wrong_is_said_without_the_key() {
        let key = "lower-case-secret-of-some-length";
        for (line, reason) in [
            (json!({"name": "n", "key": key}), "email: is missing"),
            (json!({"email": "u@example.com", "name": "n"}), "key: give either key or hash"),
            (json!({"email": "u@example.com", "name": "n", "key": key, "hash": key}), "key: give either key or hash"),
            (
                json!({"email": "u@example.com", "name": "n", "key": "0123456789abcde"}),
                "key: must have 16 to 1024 visible ASCII characters",
            ),
            (
                json!({"email": "u@example.com", "name": "n", "key": "0123456789abcdef "}),
                "key: must have 16 to 1024 visible ASCII characters",
            ),
            (
                json!({"email": "u@example.com", "name": "n", "hash": "sha256:00"}),
                "hash: must be sha256: and 64 hexadecimal digits",
            ),
            (
                json!({"email": "u@example.com", "name": "n", "key": key, "prefix": key}),
                "prefix: must have 1 to 12 visible ASCII characters",
            ),
            (
                json!({"email": "u@example.com", "name": "n", "key": key, "expires_at": "2020-01-01T00:00:00Z"}),
                "expires_at: must be in the future",
            ),
            (
                json!({"email": "u@example.com", "name": "n", "key": key,
                    "rate_limits": [{"name": key, "requests": 0, "window_seconds": 1}]}),
                "a field other than key or hash has the key",
            ),
        ] {
            assert_eq!(parsed(&line).unwrap_err(), reason, "{line}");
        }
        let good = |field: &str, value: Value| {
            let mut line = json!({"email": "u@example.com", "name": "n", "key": KEY});
            line[field] = value;
            line
        };
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
            (good("name", json!(null)), "name: must be a string"),
            (good(key, json!(1)), "the line has a field that is not known"),
            (json!([key]), "the line must be an object"),
            (json!(key), "the line must be an object"),
        ] {
            assert_eq!(parsed(&line).unwrap_err(), reason, "{line}");
        }
        let nulls = json!({"email": "u@example.com", "name": "n", "key": KEY, "hash": null, "prefix": null, "scopes": null,
            "rate_limits": null, "expires_at": null, "disabled": null});
        assert!(parsed(&nulls).is_ok());
        let broken = parse(format!("{{\"key\": {key}").as_bytes(), datetime!(2026-01-01 00:00 UTC)).unwrap_err();
        assert!(broken.starts_with("the line is not JSON: ") && !broken.contains(key), "{broken}");
    }
}
