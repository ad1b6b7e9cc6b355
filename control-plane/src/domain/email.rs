//! Email addresses in one canonical form, so that one user has one address.
//!
//! The domain is kept as A-labels (UTS 46, RFC 5890), which is how domain names are compared. The local part is kept in
//! normalisation form C, with ASCII letters in lower case: composed and decomposed letters are the same letters. No other
//! letter changes its case, since which letters correspond depends on the language.
//!
//! Characters that another character replaces on the way to that form are refused, as are invisible ones. Otherwise
//! a user could register what looks or behaves like the address of another user. The rules follow UTS 39, section 3.3.1.

use std::fmt;
use std::iter::once;

use email_address::{EmailAddress, Options};
use icu_properties::props::{DefaultIgnorableCodePoint, GeneralCategory, GeneralCategoryGroup};
use icu_properties::{CodePointMapData, CodePointSetData};
use idna::AsciiDenyList;
use idna::uts46::{DnsLength, Hyphens, Uts46};
use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;

use crate::error::ApiError;

const EMAIL_CHARS: usize = 254;

const FORM: &str = "must be an email address such as user@example.com";

/// An email address in its canonical form: at most 254 characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Email(String);

impl Email {
    /// Parses an address and brings it into its canonical form.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let bad = |detail: String| ApiError::invalid("email", detail);
        let too_long = |text: &str| text.chars().count() > EMAIL_CHARS;
        if too_long(text) {
            return Err(bad(format!("must have at most {EMAIL_CHARS} characters")));
        }
        if text.chars().any(|character| character.is_control() || character.is_whitespace()) {
            return Err(bad(FORM.into()));
        }
        let (local, domain) = text.rsplit_once('@').ok_or_else(|| bad(FORM.into()))?;
        let canonical = format!("{}@{}", local_part(local).map_err(bad)?, domain_part(domain).map_err(bad)?);
        if too_long(&canonical) {
            return Err(bad(format!("must have at most {EMAIL_CHARS} characters, its domain in ASCII")));
        }
        let options = Options::default().without_display_text().without_domain_literal();
        EmailAddress::parse_with_options(&canonical, options).map_err(|_| bad(FORM.into()))?;
        Ok(Self(canonical))
    }

    /// What may stand at the start of canonical addresses: a whole address in its canonical form, any other text in
    /// normalisation form C with ASCII letters in lower case.
    pub fn start(text: &str) -> String {
        Self::parse(text).map_or_else(|_| lower_case(text), |email| email.0)
    }

    /// The address.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Email {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn local_part(local: &str) -> Result<String, String> {
    // "kate"@example.com is the same mailbox as kate@example.com (RFC 5321, section 4.1.2).
    if local.starts_with('"') {
        return Err("must not be quoted: leave out the quotation marks".into());
    }
    if local.is_ascii() {
        return Ok(local.to_ascii_lowercase());
    }
    if local.starts_with(is_combining_mark) {
        return Err(FORM.into());
    }
    check_characters(local)?;
    for character in local.nfc().filter(|character| !character.is_ascii()) {
        let category = CodePointMapData::<GeneralCategory>::new().get(character);
        let letter = GeneralCategoryGroup::Letter.contains(category) || GeneralCategoryGroup::Mark.contains(category);
        if !letter && category != GeneralCategory::DecimalNumber {
            return Err(refused(character, "is neither a letter nor a digit"));
        }
        if CodePointSetData::new::<DefaultIgnorableCodePoint>().contains(character) {
            return Err(refused(character, "is invisible"));
        }
        if !once(character).nfkc().eq(once(character).nfc()) {
            return Err(refused(character, "stands for other characters: write those"));
        }
    }
    let canonical = lower_case(local);
    check_digits(&canonical)?;
    Ok(canonical)
}

fn domain_part(domain: &str) -> Result<String, String> {
    check_characters(domain)?;
    let ascii = Uts46::new()
        .to_ascii(domain.as_bytes(), AsciiDenyList::STD3, Hyphens::CheckFirstLast, DnsLength::Verify)
        .map_err(|_| "must have the name of a domain behind its @, such as example.com".to_owned())?;
    let (shown, _) = Uts46::new().to_unicode(ascii.as_bytes(), AsciiDenyList::STD3, Hyphens::CheckFirstLast);
    // UTS 46 replaces many characters by others, and drops some. What was typed must be what is meant, but for its case.
    let (mut typed, mut meant) = (domain.split('.'), shown.split('.'));
    loop {
        match (typed.next(), meant.next()) {
            (None, None) => break,
            (Some(typed), Some(_)) if typed.is_ascii() => {}
            (Some(typed), Some(meant)) if typed.nfc().flat_map(char::to_lowercase).nfc().eq(meant.chars()) => {}
            _ => {
                return Err(
                    "must not have characters in its domain that stand for others or are invisible: write the \
                            domain as its owner does"
                        .into(),
                );
            }
        }
    }
    shown.split('.').try_for_each(check_digits)?;
    Ok(ascii.into_owned())
}

/// In normalisation form C, with ASCII letters in lower case. A letter may compose with an accent in lower case only.
fn lower_case(text: &str) -> String {
    text.nfc().map(|character| character.to_ascii_lowercase()).nfc().collect()
}

/// Refuses characters that normalisation replaces by one other character, such as the Kelvin sign by the letter K.
fn check_characters(text: &str) -> Result<(), String> {
    let replaced = |character: &char| {
        let mut normal = once(*character).nfc();
        normal.next() != Some(*character) && normal.next().is_none()
    };
    match text.chars().find(replaced) {
        Some(character) => Err(refused(character, "stands for another character: write that")),
        None => Ok(()),
    }
}

/// Refuses digits of several scripts beside each other (UTS 39, section 5.3), which look alike and differ in value.
fn check_digits(text: &str) -> Result<(), String> {
    let category = CodePointMapData::<GeneralCategory>::new();
    let is_digit = |character: char| category.get(character) == GeneralCategory::DecimalNumber;
    // The digits of a script stand in a row, from zero on.
    let zero = |digit: char| (0..10).map_while(|back| before(digit, back)).take_while(|digit| is_digit(*digit)).last();
    let mut zeros = text.chars().filter(|character| is_digit(*character)).map(zero);
    let first = zeros.next();
    if first.is_some_and(|first| zeros.any(|other| other != first)) {
        return Err("must not mix digits of several scripts".into());
    }
    Ok(())
}

fn before(character: char, back: u32) -> Option<char> {
    u32::from(character).checked_sub(back).and_then(char::from_u32)
}

fn refused(character: char, why: &str) -> String {
    format!("must not have the character U+{:04X}, which {why}", u32::from(character))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> String {
        Email::parse(text).unwrap_or_else(|error| panic!("{text:?}: {error}")).as_str().to_owned()
    }

    fn refusal(text: &str) -> String {
        match Email::parse(text) {
            Err(ApiError::Invalid { field, detail }) => {
                assert_eq!(field.as_deref(), Some("email"), "{text:?}");
                detail
            }
            other => panic!("{text:?} was not refused: {other:?}"),
        }
    }

    #[test]
    fn an_email_is_kept_in_lower_case_and_nonsense_is_refused() {
        assert_eq!(parsed("User+Tag@Example.COM"), "user+tag@example.com");
        for bad in [
            "",
            "user",
            "user@",
            "@example.com",
            "a\0b@example.com",
            "a b@example.com",
            "U <u@example.com>",
            "u@example.com.",
            "u@.example.com",
            "u@-example.com",
            "u@[192.0.2.1]",
            "(comment)u@example.com",
            "u..v@example.com",
        ] {
            refusal(bad);
        }
        assert!(refusal(&format!("u@{}.com", "x".repeat(250))).contains("254"));
        assert_eq!(refusal("\"kate\"@example.com"), "must not be quoted: leave out the quotation marks");
    }

    #[test]
    fn one_domain_has_one_spelling() {
        for spelling in [
            "bücher.example",
            "BÜCHER.example",
            "bu\u{308}cher.EXAMPLE",
            "xn--bcher-kva.example",
            "XN--BCHER-KVA.example",
        ] {
            assert_eq!(parsed(&format!("Kate@{spelling}")), "kate@xn--bcher-kva.example");
        }
        // The sharp s is a letter of its own, as registries have it since IDNA 2008; final sigma is too.
        assert_eq!(parsed("u@straße.example"), "u@xn--strae-oqa.example");
        assert_ne!(parsed("u@βόλος.example"), parsed("u@βόλοσ.example"));
    }

    #[test]
    fn composed_and_decomposed_letters_are_one_address() {
        assert_eq!(parsed("jose\u{301}@example.com"), "jos\u{e9}@example.com");
        assert_eq!(parsed("jos\u{e9}@example.com"), "jos\u{e9}@example.com");
        // Case is of ASCII only, whichever form the letter came in.
        assert_eq!(parsed("\u{c9}VA@example.com"), "\u{c9}va@example.com");
        assert_eq!(parsed("E\u{301}VA@example.com"), "\u{c9}va@example.com");
        // J with caron composes in lower case only.
        assert_eq!(parsed("J\u{30c}@example.com"), "\u{1f0}@example.com");
        assert_eq!(parsed("Ключ@example.com"), "Ключ@example.com");
        assert_eq!(parsed("ユーザー@example.com"), "ユーザー@example.com");
    }

    #[test]
    fn what_would_become_another_address_is_refused() {
        let kelvin = "must not have the character U+212A, which stands for another character: write that";
        assert_eq!(refusal("\u{212a}ate@example.com"), kelvin);
        assert_eq!(refusal("kate@\u{212a}ate.example"), kelvin);
        for (text, why) in [
            ("\u{212b}sa@example.com", "stands for another character"),
            ("\u{ff4b}ate@example.com", "stands for other characters"),
            ("\u{fb01}n@example.com", "stands for other characters"),
            ("kat\u{1d49}@example.com", "stands for other characters"),
            ("k\u{ad}ate@example.com", "neither a letter nor a digit"),
            ("ka\u{200b}te@example.com", "neither a letter nor a digit"),
            ("ka\u{200d}te@example.com", "neither a letter nor a digit"),
            ("\u{202e}etak@example.com", "neither a letter nor a digit"),
            ("ka\u{feff}te@example.com", "neither a letter nor a digit"),
            ("kate\u{fe0f}@example.com", "is invisible"),
            ("kate\u{34f}@example.com", "is invisible"),
            ("kate\u{115f}@example.com", "is invisible"),
            ("\u{2615}@example.com", "neither a letter nor a digit"),
            ("kate\u{2024}x@example.com", "neither a letter nor a digit"),
            ("user1\u{661}@example.com", "digits of several scripts"),
            ("\u{301}kate@example.com", "must be an email address"),
            ("kate@ex\u{ad}ample.com", "in its domain"),
            ("kate@ex\u{200b}ample.com", "in its domain"),
            ("kate@\u{ff45}xample.com", "in its domain"),
            ("kate@example\u{3002}com", "in its domain"),
            ("kate@\u{2460}.example", "in its domain"),
            ("kate@xn--a.example", "the name of a domain"),
            ("kate@ex\u{202e}ample.com", "the name of a domain"),
            ("kate@a_b.example", "the name of a domain"),
            ("kate\u{ff20}example.com", "must be an email address"),
        ] {
            let refusal = refusal(text);
            assert!(refusal.contains(why), "{text:?}: {refusal}");
        }
    }

    #[test]
    fn a_canonical_address_is_its_own_canonical_form() {
        for text in [
            "J\u{30c}o\u{308}@B\u{fc}cher.example",
            "Ünï@xn--bcher-kva.example",
            "٣٣@example.com",
            "\u{1112}\u{1161}\u{11ab}@한국.kr",
        ] {
            let once = parsed(text);
            assert_eq!(parsed(&once), once);
        }
    }

    #[test]
    fn the_start_of_an_address_is_looked_for_as_addresses_are_kept() {
        assert_eq!(Email::start("Jose\u{301}"), "jos\u{e9}");
        assert_eq!(Email::start("kate@Bücher.example"), "kate@xn--bcher-kva.example");
        assert_eq!(Email::start("%_"), "%_");
    }
}
