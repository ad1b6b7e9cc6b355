//! What outcomes are called outside, and back: a code as usage carries it comes in, its name goes out. One place, so that
//! every reply, table and event calls them the same.

use contract::outcome::Outcome;
use contract::usage::SHADOW;

/// What stands before the name of an outcome that was told and not enforced.
const SHADOWED: &str = "shadow:";
/// What stands before the number of an outcome that this program does not know yet.
const NEWER: &str = "outcome_";

/// The name of a code. Newer outcomes, which filters may report before this program knows them, have their number; those
/// that were told and not enforced have `shadow:` before theirs.
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

#[cfg(test)]
mod tests {
    use super::*;

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
