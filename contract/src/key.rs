//! The format of generated keys.
//!
//! ```text
//! sk_live_ 0a1B2c…(30 random characters) 4Xy0zQ(6 characters of checksum)      44 characters in all
//! ```
//!
//! All characters after the tag are base62 (`0-9A-Za-z`, in that order of value). The checksum is the CRC-32 (the one of
//! zlib and PNG) of the 38 characters before it, as a base62 number of six digits, the highest first. With it, a client or a
//! secret scanner detects a mistyped key offline. It is not a security measure.
//!
//! Imported keys may have any format, so the decision on a request does not check it.

use std::fmt;

use rand_core::TryCryptoRng;
use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

use crate::hash::KeyHash;

/// The tag of keys for production use.
pub const LIVE_TAG: &str = "sk_live_";
/// The tag of keys for tests.
pub const TEST_TAG: &str = "sk_test_";
/// Random characters after the tag: 30 × log2(62) = 178.6 bits.
pub const RANDOM_CHARS: usize = 30;
/// Checksum characters at the end: 62⁶ > 2³².
pub const CHECKSUM_CHARS: usize = 6;
/// Length of every generated key, in characters and bytes: one block of SHA-256 with its padding.
pub const KEY_CHARS: usize = LIVE_TAG.len() + RANDOM_CHARS + CHECKSUM_CHARS;

/// Longest key that is looked up or can be imported, in bytes. A longer one is unknown without a look-up, which bounds the
/// work that one request without a valid key can cause.
pub const PRESENTED_BYTES: usize = 1_024;

const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
/// The largest multiple of 62 that fits a byte. Larger bytes are discarded, so that all characters are equally likely.
const UNBIASED_BYTES: u8 = 248;
const PREFIX_TAG: &str = "sk_";
const PREFIX_RANDOM_CHARS: usize = 6;

/// Whether a key is for production or for tests. A policy may accept only one of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyKind {
    /// `sk_live_…`
    #[default]
    Live,
    /// `sk_test_…`
    Test,
}

impl KeyKind {
    /// Its name, as in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Test => "test",
        }
    }

    /// The first characters of every key of this kind.
    #[must_use]
    pub const fn tag(self) -> &'static str {
        match self {
            Self::Live => LIVE_TAG,
            Self::Test => TEST_TAG,
        }
    }
}

/// A whole API key, zeroed when it is dropped. `Debug` prints none of it, and there is no `Display`: every place that reveals
/// it calls [`Secret::reveal`].
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Generates a key. In production, `rng` must be the operating system's source of randomness.
    ///
    /// # Errors
    /// The error of `rng`.
    pub fn generate<R: TryCryptoRng>(kind: KeyKind, rng: &mut R) -> Result<Self, R::Error> {
        let mut text = String::with_capacity(KEY_CHARS);
        text.push_str(kind.tag());
        let mut random = [0_u8; RANDOM_CHARS];
        while text.len() < KEY_CHARS.saturating_sub(CHECKSUM_CHARS) {
            rng.try_fill_bytes(&mut random)?;
            let characters = random.iter().filter(|byte| **byte < UNBIASED_BYTES).map(|byte| digit(u32::from(*byte)));
            let missing = KEY_CHARS.saturating_sub(CHECKSUM_CHARS).saturating_sub(text.len());
            text.extend(characters.take(missing));
        }
        let checksum = checksum(&text);
        text.extend(checksum);
        Ok(Self(text))
    }

    /// A key of any format, as a client sent it.
    #[must_use]
    pub fn from_presented(text: String) -> Self {
        Self(text)
    }

    /// The key itself. Call it only where the key is shown to its owner or hashed.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// The hash that is stored and looked up instead of the key.
    #[must_use]
    pub fn hash(&self) -> KeyHash {
        KeyHash::of(self.0.as_bytes())
    }

    /// The characters by which people recognise the key: `sk_` and the first six random characters.
    /// `None` for a key of another format: an imported key has no prefix unless the import gives one.
    #[must_use]
    pub fn display_prefix(&self) -> Option<String> {
        let kind = check(&self.0).ok()?;
        let random = self.0.get(kind.tag().len()..)?.get(..PREFIX_RANDOM_CHARS)?;
        let mut prefix = String::from(PREFIX_TAG);
        prefix.push_str(random);
        Some(prefix)
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// The prefix, as it is stored, that people mean by what they have in hand: `sk_live_0a1B2c…`, `sk_0a1B2c` or a part of these.
/// `None` if the text is no part of a generated key. Prefixes of imported keys may be anything.
#[must_use]
pub fn stored_prefix(text: &str) -> Option<String> {
    let rest = [LIVE_TAG, TEST_TAG].into_iter().find_map(|tag| text.strip_prefix(tag))?;
    let random = rest.chars().take(PREFIX_RANDOM_CHARS);
    Some(PREFIX_TAG.chars().chain(random).collect())
}

/// Why a text is not a generated key. No variant contains any of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormError {
    /// The text starts with neither tag.
    #[error("the key starts with neither {LIVE_TAG} nor {TEST_TAG}")]
    Tag,
    /// Not 44 characters.
    #[error("the key is not {KEY_CHARS} characters long")]
    Length,
    /// A character after the tag is not base62.
    #[error("the key has a character other than 0-9, A-Z and a-z after its tag")]
    Character,
    /// The checksum differs: the key was mistyped or not copied whole.
    #[error("the key's checksum does not match: it was mistyped or cut short")]
    Checksum,
}

/// Checks the format of a generated key, offline.
///
/// # Errors
/// The first fault, in the order of [`FormError`]'s variants.
pub fn check(text: &str) -> Result<KeyKind, FormError> {
    let kind =
        [KeyKind::Live, KeyKind::Test].into_iter().find(|kind| text.starts_with(kind.tag())).ok_or(FormError::Tag)?;
    if text.len() != KEY_CHARS {
        return Err(FormError::Length);
    }
    if !text.bytes().skip(kind.tag().len()).all(|byte| byte.is_ascii_alphanumeric()) {
        return Err(FormError::Character);
    }
    let (body, given) = text.split_at_checked(KEY_CHARS.saturating_sub(CHECKSUM_CHARS)).ok_or(FormError::Length)?;
    if given.chars().eq(checksum(body)) { Ok(kind) } else { Err(FormError::Checksum) }
}

fn checksum(body: &str) -> impl Iterator<Item = char> + use<> {
    let crc = crc32fast::hash(body.as_bytes());
    [62_u32.pow(5), 62_u32.pow(4), 62_u32.pow(3), 62_u32.pow(2), 62, 1]
        .into_iter()
        .map(move |weight| digit(crc.checked_div(weight).unwrap_or_default()))
}

fn digit(value: u32) -> char {
    let index = usize::try_from(value % 62).unwrap_or_default();
    char::from(ALPHABET.get(index).copied().unwrap_or(b'0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = "sk_live_abcdefABCDEF0123456789abcdefgh";

    fn sample() -> String {
        let mut text = String::from(SAMPLE);
        text.extend(checksum(SAMPLE));
        text
    }

    #[test]
    fn a_key_of_our_form_is_recognised_by_its_checksum() {
        // zlib.crc32(b"sk_live_abcdefABCDEF0123456789abcdefgh") = 3986953280 = 4Loqg4 in base62.
        assert_eq!(sample(), format!("{SAMPLE}4Loqg4"));
        assert_eq!(check(&sample()), Ok(KeyKind::Live));
        assert_eq!(sample().len(), KEY_CHARS);
    }

    #[test]
    fn the_prefix_is_found_in_any_beginning_of_a_key() {
        for (text, prefix) in [
            ("sk_live_", "sk_"),
            ("sk_test_abc", "sk_abc"),
            ("sk_live_abcdef", "sk_abcdef"),
            (sample().as_str(), "sk_abcdef"),
        ] {
            assert_eq!(stored_prefix(text).as_deref(), Some(prefix), "{text}");
        }
        assert_eq!([stored_prefix("sk_abcdef"), stored_prefix("4eC39H")], [None, None]);
        let prefix = Secret::from_presented(sample()).display_prefix();
        assert_eq!(stored_prefix(&sample()), prefix);
    }

    #[test]
    fn every_mistyped_character_is_noticed() {
        let good = sample();
        for position in LIVE_TAG.len()..KEY_CHARS {
            let mut bad = good.clone().into_bytes();
            bad[position] = if bad[position] == b'x' { b'y' } else { b'x' };
            let bad = String::from_utf8(bad).unwrap();
            assert_eq!(check(&bad), Err(FormError::Checksum), "position {position}");
        }
    }

    #[test]
    fn each_fault_of_form_has_its_name() {
        assert_eq!(check(""), Err(FormError::Tag));
        assert_eq!(check("pk_live_abc"), Err(FormError::Tag));
        assert_eq!(check("sk_live_abc"), Err(FormError::Length));
        assert_eq!(check(&format!("sk_live_{}", "é".repeat(18))), Err(FormError::Character));
        assert_eq!(check(&sample().replace('F', "-")), Err(FormError::Character));
    }

    #[test]
    fn the_display_prefix_is_the_one_of_the_documentation() {
        assert_eq!(Secret::from_presented(sample()).display_prefix().as_deref(), Some("sk_abcdef"));
        assert_eq!(Secret::from_presented("legacy-key-of-another-system".into()).display_prefix(), None);
    }

    #[test]
    fn debug_prints_nothing_of_the_key() {
        let secret = Secret::from_presented(sample());
        assert_eq!(format!("{secret:?}"), "Secret(…)");
    }

    #[test]
    fn keys_from_the_operating_system_are_well_formed_and_differ() {
        let mut rng = getrandom::SysRng;
        let one = Secret::generate(KeyKind::Live, &mut rng).unwrap();
        let other = Secret::generate(KeyKind::Live, &mut rng).unwrap();
        assert_eq!(check(one.reveal()), Ok(KeyKind::Live));
        assert_ne!(one.reveal(), other.reveal());
        assert_eq!(check(Secret::generate(KeyKind::Test, &mut rng).unwrap().reveal()), Ok(KeyKind::Test));
    }

    #[test]
    fn every_character_of_the_alphabet_is_drawn_about_equally_often() {
        let mut rng = getrandom::SysRng;
        let mut seen = [0_u32; 128];
        for _ in 0..2_000 {
            let secret = Secret::generate(KeyKind::Live, &mut rng).unwrap();
            for byte in secret.reveal().bytes().skip(LIVE_TAG.len()).take(RANDOM_CHARS) {
                seen[usize::from(byte)] += 1;
            }
        }
        // 60,000 draws over 62 characters: 968 expected, standard deviation 31; eight of them either way.
        for byte in ALPHABET {
            assert!(
                (720..1_220).contains(&seen[usize::from(*byte)]),
                "{} drawn {} times",
                char::from(*byte),
                seen[usize::from(*byte)]
            );
        }
    }
}
