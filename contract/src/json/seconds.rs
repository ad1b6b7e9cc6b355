//! Durations as the JSON of Protocol Buffers, and so Envoy's configuration, writes them: `"60s"`.

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
