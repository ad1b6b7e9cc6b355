//! Outcome codes: their names, the same in all replies, tables and events, and which of them are refusals.

use contract::outcome::Outcome;
use contract::usage::SHADOW;

/// Precedes the name of a refusal that was shadowed, not enforced.
const SHADOWED: &str = "shadow:";
/// Precedes the code of an outcome that this version does not know.
const NEWER: &str = "outcome_";

/// The name of a code. Filters of a newer version may report outcomes that this version does not know.
#[must_use]
pub fn name(code: i16) -> String {
    let shadow = i16::from(SHADOW);
    if (shadow..=i16::from(u8::MAX)).contains(&code) {
        return format!("{SHADOWED}{}", name(code - shadow));
    }
    let known = u8::try_from(code).ok().and_then(Outcome::from_code);
    known.map_or_else(|| format!("{NEWER}{code}"), |outcome| outcome.name().to_owned())
}

/// The code of a name.
#[must_use]
pub fn code(name: &str) -> Option<i16> {
    if let Some(name) = name.strip_prefix(SHADOWED) {
        let shadow = i16::from(SHADOW);
        return code(name).filter(|code| *code < shadow).map(|code| code + shadow);
    }
    let known = Outcome::ALL.into_iter().find(|outcome| outcome.name() == name);
    let newer = || name.strip_prefix(NEWER)?.parse::<u8>().ok().filter(|code| *code < SHADOW).map(i16::from);
    known.map(|outcome| i16::from(outcome.code())).or_else(newer)
}

/// The code of requests that were allowed. Only these cost credits.
pub const ALLOWED: i16 = Outcome::Allowed as i16;

/// Whether Envoy refused requests of this code. It did not if shadow mode let them through, and may not have if the code is of
/// a newer version.
#[must_use]
pub fn is_refusal(code: i16) -> bool {
    let known = u8::try_from(code).ok().and_then(Outcome::from_code);
    known.is_some_and(|outcome| !outcome.goes_upstream())
}

/// The codes of refusals.
#[must_use]
pub fn refusals() -> Vec<i16> {
    (0..=i16::from(u8::MAX)).filter(|code| is_refusal(*code)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_that_went_upstream_are_no_refusals() {
        let known = i16::try_from(Outcome::ALL.len()).unwrap();
        let (refused, upstream): (Vec<_>, Vec<_>) = (0..known).partition(|code| is_refusal(*code));
        assert_eq!(refusals(), refused);
        assert_eq!(upstream.into_iter().map(name).collect::<Vec<_>>(), ["allowed", "failed_open", "anonymous"]);
        assert_eq!(name(ALLOWED), "allowed");
        assert!(!is_refusal(known) && !is_refusal(136) && !is_refusal(-1));
    }

    #[test]
    fn every_code_has_a_name_that_leads_back() {
        for number in 0..=i16::from(u8::MAX) {
            assert_eq!(code(&name(number)), Some(number), "{}", name(number));
        }
        assert_eq!(
            (name(8), name(136), name(99)),
            ("rate_limited".into(), "shadow:rate_limited".into(), "outcome_99".into())
        );
        assert_eq!(name(227), "shadow:outcome_99");
        for nothing in ["", "Allowed", "outcome_", "outcome_200", "outcome_256", "shadow:", "shadow:shadow:allowed"] {
            assert_eq!(code(nothing), None, "{nothing}");
        }
    }
}
