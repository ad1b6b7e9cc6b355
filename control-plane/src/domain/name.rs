//! Names of keys.

use crate::error::ApiError;

const NAME_CHARS: usize = 100;

/// What people call a key: 1 to 100 characters, without space around them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyName(String);

impl KeyName {
    /// Parses a name that stands in `field`.
    pub fn parse(field: &'static str, text: &str) -> Result<Self, ApiError> {
        let text = text.trim();
        if text.is_empty() || text.chars().count() > NAME_CHARS {
            return Err(ApiError::invalid(field, format!("must have 1 to {NAME_CHARS} characters")));
        }
        if text.chars().any(char::is_control) {
            return Err(ApiError::invalid(field, "must not contain control characters"));
        }
        Ok(Self(text.into()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_trimmed_and_bounded_in_characters() {
        assert_eq!(KeyName::parse("name", "  Ключ ").unwrap().as_str(), "Ключ");
        assert!(KeyName::parse("name", &"é".repeat(100)).is_ok());
        for bad in ["", "   ", "a\0b", "a\nb", &"é".repeat(101)] {
            assert_eq!(KeyName::parse("key_name", bad).unwrap_err().field(), Some("key_name"), "{bad:?}");
        }
    }
}
