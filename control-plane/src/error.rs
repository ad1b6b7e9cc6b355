//! Errors of requests. `api::problem` turns them into responses.

use std::borrow::Cow;

use axum::http::StatusCode;
use contract::json::InputError;
use contract::outcome::Outcome;

/// The rules of the database that keep one admin key alive, and one that can be used from where the caller is.
const LAST_ADMIN: &str = "api_keys_last_admin";
const LAST_ADMIN_HERE: &str = "api_keys_last_admin_here";

/// What a handler may fail with. The command line, which may show internal errors, prints it.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// 400: the request does not make sense. The field and the remedy.
    #[error("{}{detail}", field.as_ref().map(|field| format!("{field}: ")).unwrap_or_default())]
    Invalid {
        /// Which field of the body, by its path, or of the path or the query; none for the request as a whole.
        field: Option<Cow<'static, str>>,
        /// What is wrong and what to do.
        detail: String,
    },
    /// 400: a request that the framework could not read, with its status and what was wrong with it.
    #[error("{1}")]
    Unreadable(StatusCode, String),
    /// 401, 403: the caller's key was not admitted.
    #[error("the key was refused: {}", .0.name())]
    Refused(Outcome),
    /// 403: the key is good, but not for this.
    #[error("{0}")]
    Forbidden(String),
    /// 404: no such thing. What was looked for.
    #[error("{0}")]
    NotFound(String),
    /// 409: it contradicts what is there.
    #[error("{0}")]
    Conflict(String),
    /// 409: the same request is still running.
    #[error("the same request is still running")]
    InProgress,
    /// 412: what is to be changed is not as the client believes.
    #[error("{0}")]
    Precondition(String),
    /// 422: an Idempotency-Key that another request had.
    #[error("{0}")]
    Mismatch(&'static str),
    /// 410: it was there and is no longer kept. What, and what to do.
    #[error("{0}")]
    Gone(String),
    /// 429: too many requests of this caller. When to come back.
    #[error("too many requests; come back in {retry_after_s} s")]
    TooMany { retry_after_s: u64 },
    /// 429: as much as one owner or one sync key may have. Which bound that is, what to do, and when to come back.
    #[error("{detail}")]
    BoundReached { detail: String, retry_after_s: u64 },
    /// 503: the database, the mirror or a queue cannot take it now. Why, for the client.
    #[error("{0}")]
    Unavailable(&'static str),
    /// 500, or 503 if the database is away.
    #[error("the database: {0}")]
    Database(sqlx::Error),
    /// 500: what should not have happened, for the log.
    #[error("{0}")]
    Internal(String),
}

impl ApiError {
    /// A bad field.
    pub fn invalid(field: impl Into<Cow<'static, str>>, detail: impl Into<String>) -> Self {
        Self::Invalid { field: Some(field.into()), detail: detail.into() }
    }

    /// The same error of a field that is part of another.
    pub fn below(self, parent: &str) -> Self {
        match self {
            Self::Invalid { field: Some(field), detail } => Self::invalid(format!("{parent}.{field}"), detail),
            other => other,
        }
    }

    /// The field that is wrong, if it is one.
    #[cfg(test)]
    pub(crate) fn field(&self) -> Option<&str> {
        match self {
            Self::Invalid { field, .. } => field.as_deref(),
            _ => None,
        }
    }
}

/// What is wrong with the body as JSON.
impl From<InputError> for ApiError {
    fn from(InputError { path, detail, .. }: InputError) -> Self {
        if path.is_empty() {
            return Self::Invalid { field: None, detail: format!("The body {detail}.") };
        }
        Self::invalid(path, detail)
    }
}

impl From<sqlx::Error> for ApiError {
    fn from(error: sqlx::Error) -> Self {
        let detail = match error.as_database_error().and_then(|error| error.constraint()) {
            Some(LAST_ADMIN) => {
                "This is the last key with the scope admin that is valid for more than one day. Create another admin key first."
            }
            Some(LAST_ADMIN_HERE) => {
                "After this change, no admin key that is valid for more than one day could be used from your address. Add \
                 your address to allowed_addresses, or create an admin key without allowed_addresses first."
            }
            _ => return Self::Database(error),
        };
        Self::Conflict(detail.into())
    }
}

/// Whether the database cannot work at the moment, so that the same call may succeed later.
pub fn is_away(error: &sqlx::Error) -> bool {
    let passing = |code: &str| {
        // Connection exceptions, resources, shutting down or starting up; a deadlock, a lock or a statement given up.
        ["08", "53", "57P"].iter().any(|class| code.starts_with(class)) || ["40P01", "55P03", "57014"].contains(&code)
    };
    match error {
        sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::Io(_) | sqlx::Error::Tls(_) => true,
        sqlx::Error::Database(error) => error.code().is_some_and(|code| passing(&code)),
        _ => false,
    }
}
