//! Parsers of the values of flags. An error says what a value must be.

use std::fmt::Display;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use axum::http::HeaderValue;
use axum::http::uri::Authority;

/// The value of a retention without end.
pub const FOREVER: &str = "forever";

const DAY: Duration = Duration::from_hours(24);

/// How long something is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeepFor {
    Days(i32),
    Forever,
}

impl KeepFor {
    /// The days; none if it is kept for ever.
    pub const fn days(self) -> Option<i32> {
        match self {
            Self::Days(days) => Some(days),
            Self::Forever => None,
        }
    }
}

/// An address to listen on.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "must be an address and a port, such as 127.0.0.1:8081".into())
}

/// The origin of a page, as browsers write it.
pub fn origin(text: &str) -> Result<HeaderValue, String> {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or_default();
    let is_authority = !host.is_empty() && !host.contains('@') && host.parse::<Authority>().is_ok();
    let value = HeaderValue::from_str(text).ok().filter(|_| is_authority && text.to_lowercase() == text);
    value.ok_or_else(|| "must be origins in lower case without a path, such as https://keys.example.com".into())
}

/// A whole number within bounds.
pub fn number<T: Copy + Display + FromStr + PartialOrd>(
    least: T,
    most: T,
) -> impl Fn(&str) -> Result<T, String> + Clone {
    move |text| {
        let number = text.parse().ok().filter(|number| (least..=most).contains(number));
        number.ok_or_else(|| format!("must be a whole number from {least} to {most}"))
    }
}

/// A duration within bounds, which are written as the value is.
pub fn duration(least: &'static str, most: &'static str) -> impl Fn(&str) -> Result<Duration, String> + Clone {
    move |text| {
        let bounds = parse(least)?..=parse(most)?;
        let duration = parse(text)?;
        if bounds.contains(&duration) { Ok(duration) } else { Err(format!("must be from {least} to {most}")) }
    }
}

/// A number of whole days, which is written as a duration.
pub fn days(least: &'static str, most: &'static str) -> impl Fn(&str) -> Result<i32, String> + Clone {
    let parse = duration(least, most);
    move |text| {
        let duration = parse(text)?;
        let days = i32::try_from(duration.as_secs() / DAY.as_secs()).ok();
        days.filter(|days| DAY * days.unsigned_abs() == duration)
            .ok_or_else(|| "must be whole days, such as 90d".into())
    }
}

/// The same, or `forever`.
pub fn days_or_forever(least: &'static str, most: &'static str) -> impl Fn(&str) -> Result<KeepFor, String> + Clone {
    let parse = days(least, most);
    move |text| {
        if text == FOREVER {
            return Ok(KeepFor::Forever);
        }
        parse(text).map(KeepFor::Days).map_err(|error| format!("{error}, or {FOREVER}"))
    }
}

/// Units of the same length everywhere: humantime's months and years are averages, and `M` is easily taken for minutes.
const UNITS: [&str; 5] = ["ms", "s", "m", "h", "d"];

fn parse(text: &str) -> Result<Duration, String> {
    let mut units = text.split(|char: char| !char.is_ascii_alphabetic()).filter(|unit| !unit.is_empty()).peekable();
    let has_units = units.peek().is_some() && units.all(|unit| UNITS.contains(&unit));
    humantime::parse_duration(text)
        .ok()
        .filter(|_| has_units)
        .ok_or_else(|| "must be a number and its unit, such as 500ms, 30s, 5m, 2h or 90d".into())
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    #[test]
    fn a_duration_has_a_unit_and_stays_within_its_bounds() {
        let timeout = duration("500ms", "5m");
        for (text, expected) in [("500ms", 500), ("30s", 30_000), ("1m 30s", 90_000), ("5m", 300_000)] {
            assert_eq!(timeout(text), Ok(Duration::from_millis(expected)), "{text}");
        }
        for text in ["", "0", "30", "s", "30 apples", "-1s", "1M", "1month", "1y"] {
            let error = timeout(text).unwrap_err();
            assert!(error.starts_with("must be a number and its unit, such as 500ms"), "{text}: {error}");
        }
        for text in ["499ms", "301s", "1d"] {
            assert_eq!(timeout(text), Err("must be from 500ms to 5m".into()));
        }
    }

    #[test]
    fn a_retention_is_whole_days_and_endless_only_where_that_makes_sense() {
        let retention = days("0d", "3650d");
        for (text, expected) in [("0d", 0), ("90d", 90), ("48h", 2), ("3650d", 3650)] {
            assert_eq!(retention(text), Ok(expected), "{text}");
        }
        assert_eq!(retention("36h"), Err("must be whole days, such as 90d".into()));
        assert_eq!(retention("3651d"), Err("must be from 0d to 3650d".into()));
        assert!(retention(FOREVER).is_err());
        let endless = days_or_forever("1d", "36500d");
        assert_eq!(endless(FOREVER).map(KeepFor::days), Ok(None));
        assert_eq!(endless("90d").map(KeepFor::days), Ok(Some(90)));
        assert_eq!(endless("0d"), Err("must be from 1d to 36500d, or forever".into()));
    }

    #[test]
    fn an_origin_is_a_scheme_and_a_host_and_nothing_more() {
        for text in ["https://keys.example.com", "http://localhost:3000", "http://[::1]:80"] {
            assert_eq!(origin(text).unwrap(), text);
        }
        let bad = [
            "",
            "*",
            "null",
            "keys.example.com",
            "https://",
            "https://a/",
            "https://a/b",
            "ftp://a",
            "https://u@a",
            "https://A",
        ];
        for text in bad {
            let why = "must be origins in lower case without a path, such as https://keys.example.com";
            assert_eq!(origin(text), Err(why.into()), "{text}");
        }
    }

    #[test]
    fn a_number_and_an_address_say_what_they_must_be() {
        assert_eq!(number(2_u32, 1_000)("16"), Ok(16));
        for text in ["1", "1001", "-3", "x", ""] {
            assert_eq!(number(2_u32, 1_000)(text), Err("must be a whole number from 2 to 1000".into()));
        }
        assert!(number(NonZeroU32::MIN, NonZeroU32::MAX)("0").is_err());
        assert!(address("[::1]:0").is_ok() && address("localhost").unwrap_err().contains("127.0.0.1:8081"));
    }
}
