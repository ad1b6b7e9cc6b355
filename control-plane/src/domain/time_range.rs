//! Ranges of time of queries for usage: `from`, `to` and `time_zone`.
//!
//! Usage is stored by the hour of UTC, so a range begins and ends with such hours. Another instant is refused: to move it to
//! the next hour would add or leave out requests without a word.

use time::format_description::StaticFormatDescription;
use time::format_description::well_known::Rfc3339;
use time::macros::format_description;
use time::{Date, Duration, OffsetDateTime, PrimitiveDateTime, UtcOffset};

use super::calendar::{Local, Zone};
use super::timestamp::Timestamp;
use crate::error::ApiError;

const DATE: StaticFormatDescription = format_description!("[year]-[month]-[day]");
const MINUTE: StaticFormatDescription = format_description!("[year]-[month]-[day]T[hour]:[minute]");
const SECOND: StaticFormatDescription = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]");

const UTC: &str = "UTC";
const DEFAULT_SPAN: Duration = Duration::days(7);
/// Longest range: bounds the reply to some 9,000 hours of each outcome. The two hours are for changes of clocks.
const LONGEST: Duration = Duration::hours(366 * 24 + 2);

/// A range of whole hours of UTC: `from` is part of it, `to` is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimeRange {
    pub from: OffsetDateTime,
    pub to: OffsetDateTime,
    /// The time zone of the query.
    pub zone: Zone,
}

impl TimeRange {
    /// Parses a range: by default the seven days until the end of the present hour, in UTC.
    ///
    /// # Errors
    /// What is wrong with `from`, `to` or `time_zone`.
    pub fn parse(
        from: Option<&str>,
        to: Option<&str>,
        time_zone: Option<&str>,
        now: OffsetDateTime,
    ) -> Result<Self, ApiError> {
        let detail = "must be a time zone of the IANA database such as Europe/Berlin";
        let zone = Zone::find(time_zone.unwrap_or(UTC)).ok_or_else(|| ApiError::invalid("time_zone", detail))?;
        let from = from.map(|text| parse_hour("from", text, &zone)).transpose()?;
        let to = to.map_or_else(|| Ok(start_of_hour(now) + Duration::HOUR), |text| parse_hour("to", text, &zone))?;
        let from = match from {
            Some(from) => from,
            None => to.checked_sub(DEFAULT_SPAN).ok_or_else(|| ApiError::invalid("to", "lies too far back"))?,
        };
        if from >= to {
            return Err(ApiError::invalid("from", "must lie before to"));
        }
        if to - from > LONGEST {
            return Err(ApiError::invalid("from", "must lie at most 366 days before to"));
        }
        Ok(Self { from, to, zone })
    }

    /// An instant as replies carry it: with the offset of the time zone.
    pub fn show(&self, at: OffsetDateTime) -> Timestamp {
        Timestamp::with_offset(self.zone.local(at))
    }
}

/// Whether usage is stored from this instant on: whether it is the start of an hour of UTC.
pub fn is_hour(at: OffsetDateTime) -> bool {
    at == start_of_hour(at)
}

fn start_of_hour(at: OffsetDateTime) -> OffsetDateTime {
    let at = at.to_offset(UtcOffset::UTC);
    let into = Duration::minutes(at.minute().into()) + Duration::seconds(at.second().into());
    at - into - Duration::nanoseconds(at.nanosecond().into())
}

fn parse_hour(field: &'static str, text: &str, zone: &Zone) -> Result<OffsetDateTime, ApiError> {
    let at = parse_instant(field, text, zone)?;
    // RFC 3339 writes the years 0 to 9999, and an offset can lead beyond them.
    if !(1..=9998).contains(&at.year()) {
        return Err(ApiError::invalid(field, "must lie in the years 1 to 9998"));
    }
    if is_hour(at) {
        return Ok(at);
    }
    let before = start_of_hour(at);
    let [before, after, at] = [before, before.saturating_add(Duration::HOUR), at].map(Timestamp::from);
    let detail = format!(
        "must be the start of an hour of UTC, by which usage is stored, and {text} is {at}: give {before} or {after}"
    );
    Err(ApiError::invalid(field, detail))
}

/// Parses a date, which means its start, or a date and time. Without an offset they are of the time zone.
fn parse_instant(field: &'static str, text: &str, zone: &Zone) -> Result<OffsetDateTime, ApiError> {
    let rfc_3339 =
        |text: &str| OffsetDateTime::parse(text, &Rfc3339).ok().and_then(|time| time.checked_to_offset(UtcOffset::UTC));
    if let Some(at) = rfc_3339(text) {
        return Ok(at);
    }
    // In a query, a plus sign that is not encoded is a space.
    if text.contains(' ') && rfc_3339(&text.replace(' ', "+")).is_some() {
        return Err(ApiError::invalid(field, "must have the plus sign of its offset encoded as %2B"));
    }
    // The formats accept a sign before the year.
    if text.starts_with(|first: char| first.is_ascii_digit()) {
        if let Ok(day) = Date::parse(text, DATE) {
            return Ok(zone.start_of(day));
        }
        let local = PrimitiveDateTime::parse(text, SECOND).or_else(|_| PrimitiveDateTime::parse(text, MINUTE));
        if let Ok(local) = local {
            return of_local_time(field, text, local, zone);
        }
    }
    let detail = "must be a date such as 2027-01-31, or a date and time such as 2027-01-31T12:00:00, \
                  2027-01-31T12:00:00Z or 2027-01-31T12:00:00+01:00";
    Err(ApiError::invalid(field, detail))
}

fn of_local_time(
    field: &'static str,
    text: &str,
    local: PrimitiveDateTime,
    zone: &Zone,
) -> Result<OffsetDateTime, ApiError> {
    let name = zone.name();
    let detail = match zone.instant(local) {
        Local::Once(at) => return Ok(at),
        Local::Twice(first, second) => {
            let [first, second] = [first, second].map(|at| Timestamp::with_offset(zone.local(at)));
            format!("must have an offset, because {text} occurs twice in {name}: give {first} or {second}")
        }
        Local::Never => format!("must be another time, because clocks in {name} skip {text}"),
    };
    Err(ApiError::invalid(field, detail))
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-05-08 10:20:30.4 UTC);

    fn range(from: &str, to: &str, zone: &str) -> Result<(OffsetDateTime, OffsetDateTime), (String, String)> {
        match TimeRange::parse(Some(from), Some(to), Some(zone), NOW) {
            Ok(TimeRange { from, to, .. }) => Ok((from, to)),
            Err(ApiError::Invalid { field: Some(field), detail }) => Err((field.into_owned(), detail)),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_range_is_the_last_seven_days_and_the_present_hour_unless_given() {
        let TimeRange { from, to, zone } = TimeRange::parse(None, None, None, NOW).unwrap();
        assert_eq!((from, to), (datetime!(2026-05-01 11:00 UTC), datetime!(2026-05-08 11:00 UTC)));
        assert_eq!(zone.name(), "UTC");
        // The hour that begins now is in it.
        let TimeRange { to, .. } = TimeRange::parse(None, None, None, datetime!(2026-05-08 10:00 UTC)).unwrap();
        assert_eq!(to, datetime!(2026-05-08 11:00 UTC));
    }

    #[test]
    fn dates_and_times_without_an_offset_are_of_the_time_zone() {
        let may = (datetime!(2026-04-30 22:00 UTC), datetime!(2026-05-31 22:00 UTC));
        for (from, to) in [
            ("2026-05-01", "2026-06-01"),
            ("2026-05-01T00:00", "2026-06-01T00:00:00"),
            ("2026-04-30T22:00:00Z", "2026-06-01T00:00:00+02:00"),
            ("2026-04-30T20:00:00.000-02:00", "2026-06-01"),
        ] {
            assert_eq!(range(from, to, "Europe/Berlin"), Ok(may), "{from} {to}");
        }
        // Midnight is skipped, so that the day begins at 01:00.
        let cairo = range("2024-04-26", "2024-04-27", "Africa/Cairo").unwrap();
        assert_eq!(cairo, (datetime!(2024-04-25 22:00 UTC), datetime!(2024-04-26 21:00 UTC)));
        // A leap year, and a month in which clocks go back.
        assert!(range("2024-01-01", "2025-01-01", "Europe/Berlin").is_ok());
    }

    #[test]
    fn what_cannot_be_answered_exactly_is_refused_with_the_remedy() {
        let hour = |text: &str, at: &str, before: &str, after: &str| {
            format!(
                "must be the start of an hour of UTC, by which usage is stored, and {text} is {at}: give {before} or {after}"
            )
        };
        let form = "must be a date such as 2027-01-31, or a date and time such as 2027-01-31T12:00:00, \
                    2027-01-31T12:00:00Z or 2027-01-31T12:00:00+01:00";
        let half = hour("2026-05-01T10:30:00Z", "2026-05-01T10:30:00Z", "2026-05-01T10:00:00Z", "2026-05-01T11:00:00Z");
        let kolkata = hour("2026-05-01", "2026-04-30T18:30:00Z", "2026-04-30T18:00:00Z", "2026-04-30T19:00:00Z");
        let twice = "must have an offset, because 2026-10-25T02:00 occurs twice in Europe/Berlin: give \
                     2026-10-25T02:00:00+02:00 or 2026-10-25T02:00:00+01:00";
        let skipped = "must be another time, because clocks in Europe/Berlin skip 2026-03-29T02:00";
        for (from, zone, detail) in [
            ("2026-05-01T10:30:00Z", "UTC", half.as_str()),
            ("2026-05-01", "Asia/Kolkata", &kolkata),
            ("2026-10-25T02:00", "Europe/Berlin", twice),
            ("2026-03-29T02:00", "Europe/Berlin", skipped),
            ("2026-05-01T00:00:00 02:00", "UTC", "must have the plus sign of its offset encoded as %2B"),
            ("2026-05-01T00:00+02:00", "UTC", form),
            ("2026-05-01 00:00:00", "UTC", form),
            ("2026-5-1", "UTC", form),
            ("-2026-05-01", "UTC", form),
            ("2026-02-29", "UTC", form),
            ("yesterday", "UTC", form),
            ("", "UTC", form),
            ("2027-05-01", "UTC", "must lie before to"),
            ("2025-01-01", "UTC", "must lie at most 366 days before to"),
        ] {
            assert_eq!(range(from, "2027-01-01", zone), Err(("from".into(), detail.into())), "{from} {zone}");
        }
        let unknown = "must be a time zone of the IANA database such as Europe/Berlin";
        assert_eq!(range("2026-05-01", "2026-05-02", "CEST"), Err(("time_zone".into(), unknown.into())));
        for (first, zone) in
            [("0000-01-01", "Europe/Berlin"), ("0000-01-01T00:30:00+01:00", "UTC"), ("9999-01-01", "UTC")]
        {
            let years = "must lie in the years 1 to 9998";
            assert_eq!(range(first, first, zone), Err(("from".into(), years.into())), "{first}");
        }
        for last in ["9999-12-31", "9999-12-31T23:59:59Z", "9999-12-31T23:59:59-23:59", "0000-01-01"] {
            assert!(range(last, last, "America/New_York").is_err(), "{last}");
        }
    }

    #[test]
    fn times_are_shown_with_the_offset_of_the_time_zone() {
        let shown = |at: OffsetDateTime, zone: &str| {
            let zone = Zone::find(zone).unwrap();
            TimeRange { from: at, to: at, zone }.show(at).to_string()
        };
        assert_eq!(shown(datetime!(2026-04-30 22:00 UTC), "Europe/Berlin"), "2026-05-01T00:00:00+02:00");
        assert_eq!(shown(datetime!(2026-04-30 22:00 UTC), "UTC"), "2026-04-30T22:00:00Z");
        assert_eq!(shown(datetime!(1880-01-01 00:00 UTC), "Europe/Berlin"), "1880-01-01T00:00:00Z");
    }
}
