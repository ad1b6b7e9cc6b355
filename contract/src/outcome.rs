//! The closed list of outcomes of a request, in one table.
//!
//! Codes are stable: usage reports and the database contain them. Names are stable too: responses, statistics and the REST
//! API contain them.

use serde::{Deserialize, Serialize};

/// The base of every problem `type`; the code follows it. `docs/src/reference/problems.md` has a heading for each code. No
/// public site serves the documentation yet. `.invalid` is reserved and cannot be registered (RFC 6761, section 6.4).
pub const PROBLEMS: &str = "https://portcullis.invalid/reference/problems.html#";

/// How a refused request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// `title` of the problem (RFC 9457): the same for every occurrence.
    pub title: &'static str,
    /// `detail` of the problem: what the client can do about it.
    pub detail: &'static str,
}

/// Defines [`Outcome`] from rows of code, variant and name. A row of a refusal has status, title and detail too.
macro_rules! outcomes {
    ($($(#[$doc:meta])* $code:literal $variant:ident $name:literal $(=> $status:literal $title:literal $detail:literal)?;)*) => {
        /// The outcome of one request.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        #[repr(u8)]
        pub enum Outcome {
            $($(#[$doc])* $variant = $code,)*
        }

        impl Outcome {
            /// Every outcome, in the order of the codes.
            pub const ALL: [Self; [$($code),*].len()] = [$(Self::$variant),*];

            /// The name, as it appears in responses (`code`), statistics and the REST API.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// The problem type (RFC 9457, section 3.1.1).
            #[must_use]
            pub fn problem_type(self) -> String {
                format!("{PROBLEMS}{}", self.name())
            }

            /// By code.
            const REFUSALS: [Option<Refusal>; Self::ALL.len()] = [$(outcomes!(@refusal $($status $title $detail)?)),*];
        }
    };
    (@refusal) => { None };
    (@refusal $status:literal $title:literal $detail:literal) => {
        Some(Refusal { status: $status, title: $title, detail: $detail })
    };
}

outcomes! {
    /// The key is good for this request.
    0 Allowed "allowed";
    /// The request has no key.
    1 Missing "missing" => 401 "API key missing"
        "Send your API key where this service expects it.";
    /// No such key exists.
    2 Unknown "unknown" => 401 "API key unknown"
        "No such API key. Check that it was copied whole.";
    /// The key was revoked.
    3 Revoked "revoked" => 401 "API key revoked"
        "This API key was revoked. Ask its owner for a new one.";
    /// The key has expired.
    4 Expired "expired" => 401 "API key expired"
        "This API key has expired. Ask its owner for a new one.";
    /// The key is switched off.
    5 Disabled "disabled" => 401 "API key disabled"
        "This API key is switched off. Its owner can switch it on again, or only an administrator if one switched it off.";
    /// The key lacks a scope that the route requires.
    6 ScopeDenied "scope_denied" => 403 "Scope denied"
        "This API key lacks a scope that the request needs.";
    /// The client's address is in none of the key's networks.
    7 AddressDenied "address_denied" => 403 "Address denied"
        "This API key may not be used from the client's address.";
    /// Too many requests in a short time.
    8 RateLimited "rate_limited" => 429 "Rate limit exceeded"
        "Too many requests. Wait as long as Retry-After says.";
    /// The quota of the current window is used up.
    9 QuotaExceeded "quota_exceeded" => 429 "Quota exceeded"
        "The quota of this API key is used up for now.";
    /// The balance of credits is used up.
    10 CreditsExhausted "credits_exhausted" => 429 "Credits exhausted"
        "The credits of this API key's owner are used up. Top them up to go on.";
    /// The filter has not loaded the keys yet.
    11 NotReady "not_ready" => 503 "Keys not loaded"
        "The gateway has not loaded its API keys yet. Try again shortly.";
    /// The filter's keys are older than its operator allows.
    12 Stale "stale" => 503 "Keys out of date"
        "The gateway has lost touch with its key store. Try again shortly.";
    /// The key has a restriction that this filter does not understand.
    13 Unsupported "unsupported" => 503 "Key not supported"
        "The gateway is too old to judge this API key. Its operator must update it.";
    /// Admitted without a check: the operator chose that for a filter without keys, or with stale ones.
    14 FailedOpen "failed_open";
    /// Admitted without a key, as the policy of the route allows.
    15 Anonymous "anonymous";
    /// The filter does not have the policy that the route names.
    16 PolicyUnknown "policy_unknown" => 503 "Policy unknown"
        "The gateway is not configured for this route. Its operator must name its policy.";
    /// The control plane did not answer, and the Envoy has no allowance of the quota or the credits, or of a shared rate limit
    /// with `on_limits_unreachable.rate_limits: deny`.
    17 LimitsUnavailable "limits_unavailable" => 503 "Limits unavailable"
        "The gateway cannot check a rate limit, the quota or the credits of this API key at present. Try again shortly.";
    /// The route does not accept keys of this kind.
    18 KindDenied "kind_denied" => 403 "Kind of API key denied"
        "Keys of this kind are not accepted here. Use a live key in production and a test key for tests.";
}

impl Outcome {
    /// The number that usage reports and the database contain.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The outcome of a code; `None` for a code of a later version.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// How the outcome is answered; `None` if the request goes upstream.
    #[must_use]
    pub fn refusal(self) -> Option<Refusal> {
        Self::REFUSALS.get(usize::from(self.code())).copied().flatten()
    }

    /// Whether the request goes upstream.
    #[must_use]
    pub fn goes_upstream(self) -> bool {
        self.refusal().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_of_an_outcome_is_its_place_in_the_list() {
        for (place, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(outcome.code()), place);
            assert_eq!(Outcome::from_code(outcome.code()), Some(outcome));
        }
        assert_eq!(Outcome::from_code(19), None);
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
