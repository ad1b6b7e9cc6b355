//! The closed list of what can come of a request, and what each outcome is called, answered and counted as.
//!
//! Codes are stable for ever: they stand in usage reports and in the database. Names are stable too: they stand in
//! replies, statistics and the REST API.

use serde::{Deserialize, Serialize};

/// Where problem types are described: the base of every `type`, to which the code is added. The page is
/// `docs/src/reference/problems.md`, which has a heading for each code. No public site serves the documentation yet, so the
/// host is one that nobody can own (RFC 6761, section 6.4).
pub const PROBLEMS: &str = "https://portcullis.invalid/reference/problems.html#";

/// What came of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Outcome {
    /// The key is good for this request.
    Allowed = 0,
    /// No key was presented.
    Missing = 1,
    /// No such key.
    Unknown = 2,
    /// The key was revoked.
    Revoked = 3,
    /// The key's time is over.
    Expired = 4,
    /// The key is switched off.
    Disabled = 5,
    /// The key lacks a scope that the route needs.
    ScopeDenied = 6,
    /// The client's address is not on the key's list.
    AddressDenied = 7,
    /// Too many requests in a short time.
    RateLimited = 8,
    /// The quota of the running window is used up.
    QuotaExceeded = 9,
    /// The balance of credits is used up.
    CreditsExhausted = 10,
    /// The filter has not loaded the keys yet.
    NotReady = 11,
    /// The filter's keys are older than its operator allows.
    Stale = 12,
    /// The key carries a restriction that this filter is too old to judge.
    Unsupported = 13,
    /// Let through without a check, as the operator chose for a filter that has no keys yet or only stale ones.
    FailedOpen = 14,
    /// Let through without a key, as the route's policy allows.
    Anonymous = 15,
    /// The route names a policy that the filter does not have.
    PolicyUnknown = 16,
}

/// How an outcome is answered. [`Outcome::Allowed`], [`Outcome::Anonymous`] and [`Outcome::FailedOpen`] go upstream and are
/// not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// `title` of the problem (RFC 9457): the same for every occurrence.
    pub title: &'static str,
    /// `detail` of the problem: what the client can do about it.
    pub detail: &'static str,
}

impl Outcome {
    /// Every outcome, in the order of the codes.
    pub const ALL: [Self; 17] = [
        Self::Allowed,
        Self::Missing,
        Self::Unknown,
        Self::Revoked,
        Self::Expired,
        Self::Disabled,
        Self::ScopeDenied,
        Self::AddressDenied,
        Self::RateLimited,
        Self::QuotaExceeded,
        Self::CreditsExhausted,
        Self::NotReady,
        Self::Stale,
        Self::Unsupported,
        Self::FailedOpen,
        Self::Anonymous,
        Self::PolicyUnknown,
    ];

    /// The number that stands in usage reports.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The outcome of a code; `None` for the codes of newer versions.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// The name, as it stands in replies (`code`), statistics and the REST API.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Missing => "missing",
            Self::Unknown => "unknown",
            Self::Revoked => "revoked",
            Self::Expired => "expired",
            Self::Disabled => "disabled",
            Self::ScopeDenied => "scope_denied",
            Self::AddressDenied => "address_denied",
            Self::RateLimited => "rate_limited",
            Self::QuotaExceeded => "quota_exceeded",
            Self::CreditsExhausted => "credits_exhausted",
            Self::NotReady => "not_ready",
            Self::Stale => "stale",
            Self::Unsupported => "unsupported",
            Self::FailedOpen => "failed_open",
            Self::Anonymous => "anonymous",
            Self::PolicyUnknown => "policy_unknown",
        }
    }

    /// The problem type (RFC 9457, section 3.1.1).
    #[must_use]
    pub fn problem_type(self) -> String {
        format!("{PROBLEMS}{}", self.name())
    }

    /// How the outcome is answered; `None` if the request goes upstream.
    #[must_use]
    pub const fn refusal(self) -> Option<Refusal> {
        let (status, title, detail) = match self {
            Self::Allowed | Self::FailedOpen | Self::Anonymous => return None,
            Self::Missing => (401, "API key missing", "Send your API key where this service expects it."),
            Self::Unknown => (401, "API key unknown", "No such API key. Check that it was copied whole."),
            Self::Revoked => (401, "API key revoked", "This API key was revoked. Ask its owner for a new one."),
            Self::Expired => (401, "API key expired", "This API key has expired. Ask its owner for a new one."),
            Self::Disabled => (
                401,
                "API key disabled",
                "This API key is switched off. Its owner can switch it on again, or only an administrator if one switched it off.",
            ),
            Self::ScopeDenied => (403, "Scope denied", "This API key lacks a scope that the request needs."),
            Self::AddressDenied => (403, "Address denied", "This API key may not be used from the client's address."),
            Self::RateLimited => (429, "Rate limit exceeded", "Too many requests. Wait as long as Retry-After says."),
            Self::QuotaExceeded => (429, "Quota exceeded", "The quota of this API key is used up for now."),
            Self::CreditsExhausted => {
                (429, "Credits exhausted", "The credits of this API key's owner are used up. Top them up to go on.")
            }
            Self::NotReady => {
                (503, "Keys not loaded", "The gateway has not loaded its API keys yet. Try again shortly.")
            }
            Self::Stale => {
                (503, "Keys out of date", "The gateway has lost touch with its key store. Try again shortly.")
            }
            Self::Unsupported => {
                (503, "Key not supported", "The gateway is too old to judge this API key. Its operator must update it.")
            }
            Self::PolicyUnknown => (
                503,
                "Policy unknown",
                "The gateway is not configured for this route. Its operator must name its policy.",
            ),
        };
        Some(Refusal { status, title, detail })
    }

    /// Whether the request goes upstream.
    #[must_use]
    pub const fn goes_upstream(self) -> bool {
        self.refusal().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_places_in_the_list_and_lead_back() {
        for (place, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(outcome.code()), place);
            assert_eq!(Outcome::from_code(outcome.code()), Some(outcome));
        }
        assert_eq!(Outcome::from_code(17), None);
    }

    #[test]
    fn the_name_is_the_one_in_json() {
        for outcome in Outcome::ALL {
            assert_eq!(serde_json::to_value(outcome).unwrap(), outcome.name());
        }
    }

    #[test]
    fn statuses_are_those_that_clients_know_how_to_handle() {
        for outcome in Outcome::ALL {
            let status = outcome.refusal().map(|refusal| refusal.status);
            assert!(matches!(status, None | Some(401 | 403 | 429 | 503)), "{outcome:?}: {status:?}");
            assert_eq!(status.is_none(), outcome.goes_upstream());
        }
    }
}
