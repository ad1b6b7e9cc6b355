//! Durations as the JSON of Protocol Buffers, and so Envoy's configuration, writes them: `"60s"`, `"0.250s"`.

use core::fmt;

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};

/// A whole number of seconds, written with its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seconds(pub u64);

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(SecondsVisitor)
    }
}

struct SecondsVisitor;

impl Visitor<'_> for SecondsVisitor {
    type Value = Seconds;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("whole seconds with their unit, such as \"60s\"")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Seconds, E> {
        let digits = text.strip_suffix('s').filter(|number| number.bytes().all(|byte| byte.is_ascii_digit()));
        let seconds = digits.and_then(|number| number.parse().ok());
        seconds.map(Seconds).ok_or_else(|| E::invalid_value(Unexpected::Other("text"), &self))
    }
}

/// A duration in milliseconds, written in seconds with their unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Milliseconds(pub u64);

impl<'de> Deserialize<'de> for Milliseconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(MillisecondsVisitor)
    }
}

struct MillisecondsVisitor;

impl Visitor<'_> for MillisecondsVisitor {
    type Value = Milliseconds;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("seconds with at most three decimals and their unit, such as \"0.25s\"")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Milliseconds, E> {
        let ms = text.strip_suffix('s').and_then(milliseconds);
        ms.map(Milliseconds).ok_or_else(|| E::invalid_value(Unexpected::Other("text"), &self))
    }
}

fn milliseconds(text: &str) -> Option<u64> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(whole) || !is_number(decimals) || decimals.len() > 3 {
        return None;
    }
    let thousandths: u64 = format!("{decimals:0<3}").parse().ok()?;
    whole.parse::<u64>().ok()?.checked_mul(1_000)?.checked_add(thousandths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_have_up_to_three_decimals() {
        for (text, expected) in [
            ("0.25", Some(250)),
            ("0", Some(0)),
            ("1.005", Some(1_005)),
            ("0.", None),
            (".5", None),
            ("0.0001", None),
            ("-1", None),
            ("1e3", None),
            ("", None),
        ] {
            assert_eq!(milliseconds(text), expected, "{text}");
        }
    }
}
