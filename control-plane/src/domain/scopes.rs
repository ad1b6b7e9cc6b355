//! Scopes of keys, roles and plans.

use std::collections::HashSet;

use crate::error::ApiError;

/// The scope that opens every management call.
pub const ADMIN: &str = "admin";
/// The scope of filters: sync and usage reports.
pub const SYNC: &str = "sync";

const SCOPES: usize = 32;
const SCOPE_CHARS: usize = 64;

/// Scopes of a key: at most 32, each once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scopes(Vec<String>);

impl Scopes {
    /// Parses a list of scopes; repeated ones count once.
    pub fn parse(scopes: Vec<String>) -> Result<Self, ApiError> {
        if scopes.len() > SCOPES {
            return Err(ApiError::invalid("scopes", format!("must have at most {SCOPES} entries")));
        }
        let allowed =
            |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b':' | b'/' | b'_' | b'.' | b'*' | b'-');
        if !scopes.iter().all(|scope| (1..=SCOPE_CHARS).contains(&scope.len()) && scope.bytes().all(allowed)) {
            let detail = format!("each scope must have 1 to {SCOPE_CHARS} characters of a-z, A-Z, 0-9 and : / _ . * -");
            return Err(ApiError::invalid("scopes", detail));
        }
        let looks_reserved = |scope: &&String| {
            [ADMIN, SYNC].iter().any(|reserved| scope.eq_ignore_ascii_case(reserved) && scope != reserved)
        };
        if let Some(scope) = scopes.iter().find(looks_reserved) {
            return Err(ApiError::invalid("scopes", format!("{scope} is not a scope: write it in lower case")));
        }
        let mut seen = HashSet::new();
        Ok(Self(scopes.into_iter().filter(|scope| seen.insert(scope.clone())).collect()))
    }

    /// The scopes, in the order in which they were given.
    pub fn as_slice(&self) -> &[String] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_deduplicated_in_order_and_bounded() {
        let list = |scopes: &[&str]| Scopes::parse(scopes.iter().map(|scope| (*scope).into()).collect());
        assert_eq!(list(&["b:*", "a.r_w-1", "b:*"]).unwrap().as_slice(), ["b:*", "a.r_w-1"]);
        assert_eq!(list(&["Orders.Read", "https://x/y", "orders.read"]).unwrap().as_slice().len(), 3);
        assert!(Scopes::parse(vec!["x".repeat(64)]).is_ok());
        for bad in [vec![String::new()], vec!["x".repeat(65)], vec!["a b".into()], vec!["a".into(); 33]] {
            assert_eq!(Scopes::parse(bad).unwrap_err().field(), Some("scopes"));
        }
        for bad in ["Admin", "SYNC"] {
            assert!(list(&[bad]).is_err(), "{bad} would be taken for a scope of the control plane");
        }
    }
}
