//! Calendar windows of quotas, refills and sums of usage: days, weeks and months of a time zone.
//!
//! A day begins at the first instant whose local date is that day or a later one. This holds where clocks skip midnight
//! (Africa/Cairo), repeat it (America/Havana) or skip a day (Pacific/Apia), so each instant lies in exactly one window.
//!
//! The time zone database is compiled in, so that all replicas agree whatever their systems have. PostgreSQL stores the start
//! and the end of windows and computes none, except for the days of UTC to which old usage is rolled up.

use std::ops::RangeInclusive;
use std::sync::LazyLock;

use jiff::civil::{Date, Time};
use jiff::tz::{AmbiguousOffset, Offset, TimeZone, TimeZoneDatabase};
use jiff::{Timestamp, ToSpan};
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, PrimitiveDateTime, UtcOffset};
use utoipa::ToSchema;

static ZONES: LazyLock<TimeZoneDatabase> = LazyLock::new(TimeZoneDatabase::bundled);

/// A period of the calendar: of a quota, or between two refills of credits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Every {
    /// At midnight.
    Day,
    /// At midnight before Monday.
    Week,
    /// At midnight before the first, or before another day of the month.
    Month,
}

/// The first and the last day on which months can begin.
pub const ANCHOR_DAYS: RangeInclusive<i8> = 1..=31;

impl Every {
    /// The first day of the period that contains a day. Months begin on the anchor day.
    fn first_day(self, day: Date, anchor_day: i8) -> Date {
        match self {
            Self::Day => day,
            Self::Week => day.saturating_sub(i64::from(day.weekday().to_monday_zero_offset()).days()),
            Self::Month => {
                let first = anchored(day.first_of_month(), anchor_day);
                if first <= day { first } else { anchored(day.first_of_month().saturating_sub(1.month()), anchor_day) }
            }
        }
    }

    /// The first day of the period after the one that begins with `first`.
    fn next(self, first: Date, anchor_day: i8) -> Date {
        match self {
            Self::Day => first.saturating_add(1.day()),
            Self::Week => first.saturating_add(1.week()),
            Self::Month => anchored(first.first_of_month().saturating_add(1.month()), anchor_day),
        }
    }
}

/// The anchor day of the month that begins on `first`, or the last day of a shorter month.
fn anchored(first: Date, anchor_day: i8) -> Date {
    first.with().day(anchor_day.clamp(1, first.days_in_month())).build().unwrap_or(first)
}

/// A span of time: `start` is part of it, `end` is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub start: OffsetDateTime,
    pub end: OffsetDateTime,
}

impl Window {
    /// The window that contains an instant. An unknown time zone counts as UTC: a newer version may have stored its name.
    pub fn containing(at: OffsetDateTime, every: Every, time_zone: &str) -> Self {
        Self::anchored(at, every, 1, time_zone)
    }

    /// The same. Months begin on the anchor day, or on their last day if they are shorter.
    pub fn anchored(at: OffsetDateTime, every: Every, anchor_day: i8, time_zone: &str) -> Self {
        Zone::find(time_zone).unwrap_or(Zone(TimeZone::UTC)).window(at, every, anchor_day)
    }
}

/// A time zone of the IANA database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zone(TimeZone);

/// The instant of a local time: clocks can skip or repeat a time when they change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Local {
    Once(OffsetDateTime),
    Twice(OffsetDateTime, OffsetDateTime),
    Never,
}

impl Zone {
    /// By its name, in the spelling of the database.
    pub fn find(name: &str) -> Option<Self> {
        find(name).map(Self)
    }

    pub fn name(&self) -> &str {
        self.0.iana_name().unwrap_or("UTC")
    }

    fn window(&self, at: OffsetDateTime, every: Every, anchor_day: i8) -> Window {
        let Self(zone) = self;
        let at = timestamp(at);
        let mut first = every.first_day(zone.to_datetime(at).date(), anchor_day);
        let mut next = every.next(first, anchor_day);
        // After clocks went back over midnight, the local date is that of the day before for a while.
        while first < next && start_of_day(zone, next) <= at {
            (first, next) = (next, every.next(next, anchor_day));
        }
        Window { start: offset_date_time(start_of_day(zone, first)), end: offset_date_time(start_of_day(zone, next)) }
    }

    /// The windows from the one that contains `from` to the last one that begins before `to`, without gaps.
    pub fn windows(&self, every: Every, from: OffsetDateTime, to: OffsetDateTime) -> Vec<Window> {
        let mut windows = vec![self.window(from, every, 1)];
        while let Some(last) = windows.last().copied()
            // At the end of the calendar a window has no length.
            && last.start < last.end
            && last.end < to
        {
            windows.push(self.window(last.end, every, 1));
        }
        windows
    }

    /// The first instant of a day.
    pub fn start_of(&self, day: time::Date) -> OffsetDateTime {
        offset_date_time(start_of_day(&self.0, civil(day)))
    }

    pub fn instant(&self, local: PrimitiveDateTime) -> Local {
        let (hour, minute, second, nanosecond) = local.as_hms_nano();
        let [hour, minute, second] = [hour, minute, second].map(u8::cast_signed);
        let time = civil(local.date()).at(hour, minute, second, nanosecond.cast_signed());
        let at = |offset: Offset| offset_date_time(offset.to_timestamp(time).unwrap_or(Timestamp::MAX));
        match self.0.to_ambiguous_timestamp(time).offset() {
            AmbiguousOffset::Unambiguous { offset } => Local::Once(at(offset)),
            AmbiguousOffset::Fold { before, after } => Local::Twice(at(before), at(after)),
            AmbiguousOffset::Gap { .. } => Local::Never,
        }
    }

    /// The same instant, with the offset of the time zone; in UTC if that offset is no whole number of minutes, which RFC 3339
    /// cannot express. Local mean times until about 1930 had such offsets.
    pub fn local(&self, at: OffsetDateTime) -> OffsetDateTime {
        let seconds = self.0.to_offset(timestamp(at)).seconds();
        let offset = UtcOffset::from_whole_seconds(seconds).ok().filter(|offset| offset.seconds_past_minute() == 0);
        offset.and_then(|offset| at.checked_to_offset(offset)).unwrap_or(at)
    }
}

/// Whether this is the name of a time zone in the IANA database, in its spelling.
pub fn is_time_zone(name: &str) -> bool {
    find(name).is_some()
}

fn find(name: &str) -> Option<TimeZone> {
    // `Factory` is the database's entry for a machine whose time zone is not set.
    let is_named = |zone: &TimeZone| zone.iana_name() == Some(name) && !zone.is_unknown() && name != "Factory";
    ZONES.get(name).ok().filter(is_named)
}

/// The first instant whose local date is this day or a later one.
fn start_of_day(zone: &TimeZone, day: Date) -> Timestamp {
    let midnight = zone.to_ambiguous_timestamp(day.to_datetime(Time::midnight()));
    let start = match midnight.offset() {
        AmbiguousOffset::Unambiguous { .. } | AmbiguousOffset::Fold { .. } => midnight.earlier(),
        // `later` gives an instant at or after the change of clocks that skips midnight; the day begins with the change.
        AmbiguousOffset::Gap { .. } => midnight.later().map(|later| {
            let after = later.saturating_add(1.nanosecond()).unwrap_or(later);
            zone.preceding(after).next().map_or(later, |change| change.timestamp())
        }),
    };
    start.unwrap_or(Timestamp::MAX)
}

fn civil(day: time::Date) -> Date {
    let year = i16::try_from(day.year()).unwrap_or(i16::MAX);
    Date::new(year, u8::from(day.month()).cast_signed(), day.day().cast_signed()).unwrap_or(Date::MAX)
}

fn timestamp(at: OffsetDateTime) -> Timestamp {
    Timestamp::from_nanosecond(at.unix_timestamp_nanos()).unwrap_or(Timestamp::MAX)
}

fn offset_date_time(at: Timestamp) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(at.as_nanosecond()).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    fn at(text: &str) -> OffsetDateTime {
        offset_date_time(text.parse().unwrap())
    }

    /// The day of each instant by its definition: the latest local date that there has been until then. Between changes of
    /// clocks local dates never go back, so only the instants before the changes and `at` itself need a look.
    fn latest_date(zone: &TimeZone, changes: &[Timestamp], at: Timestamp) -> Date {
        let until = changes.partition_point(|change| *change <= at);
        let before = changes[..until].iter().rev().take(4).map(|change| *change - 1.nanosecond());
        before.chain([at]).map(|at| zone.to_datetime(at).date()).max().unwrap()
    }

    #[test]
    fn every_instant_lies_in_exactly_one_window_around_every_change_of_clocks_until_2040() {
        let (from, to) = ("1969-01-01T00:00Z".parse().unwrap(), "2041-01-01T00:00Z".parse().unwrap());
        let nanosecond = time::Duration::nanoseconds(1);
        let mut checked = 0;
        for name in ZONES.available() {
            let Some(zone) = find(name.as_str()) else { continue };
            let changes: Vec<Timestamp> =
                zone.following(from).map(|change| change.timestamp()).take_while(|change| *change < to).collect();
            let day_of = |(every, anchor_day): (Every, i8), at: OffsetDateTime| {
                let at = Timestamp::from_nanosecond(at.unix_timestamp_nanos()).unwrap();
                every.first_day(latest_date(&zone, &changes, at), anchor_day)
            };
            let periods =
                [(Every::Day, 1), (Every::Week, 1), (Every::Month, 1), (Every::Month, 15), (Every::Month, 31)];
            let instants = changes.iter().copied().flat_map(|change| {
                [-86_400, -3_600, -1, 0, 1, 1_800, 3_600, 43_200].map(|seconds: i64| change + seconds.seconds())
            });
            for (instant, every) in instants.flat_map(|at| periods.map(|every| (at, every))) {
                let at = offset_date_time(instant);
                let window = Window::anchored(at, every.0, every.1, name.as_str());
                let Window { start, end } = window;
                let day = day_of(every, at);
                assert!(start <= at && at < end, "{name} {every:?} {at} {window:?}");
                assert!(
                    day_of(every, start) == day && day_of(every, start - nanosecond) < day,
                    "{name} {every:?} {at} {window:?}"
                );
                assert!(
                    day_of(every, end) > day && day_of(every, end - nanosecond) == day,
                    "{name} {every:?} {at} {window:?}"
                );
                checked += 1;
            }
        }
        assert!(checked > 100_000, "{checked}");
    }

    #[test]
    fn a_day_whose_midnight_is_skipped_or_repeated_has_23_or_25_hours() {
        for (zone, instant, start, end) in [
            // Clocks go from 00:00 to 01:00.
            ("Africa/Cairo", "2024-04-26T09:00Z", "2024-04-25T22:00Z", "2024-04-26T21:00Z"),
            ("America/Santiago", "2024-09-08T09:00Z", "2024-09-08T04:00Z", "2024-09-09T03:00Z"),
            ("Asia/Beirut", "2024-03-31T09:00Z", "2024-03-30T22:00Z", "2024-03-31T21:00Z"),
            // Clocks go from 24:00 back to 23:00.
            ("Africa/Cairo", "2024-10-31T21:30Z", "2024-10-30T21:00Z", "2024-10-31T22:00Z"),
            // Clocks go from 01:00 back to 00:00.
            ("America/Havana", "2024-11-03T04:30Z", "2024-11-03T04:00Z", "2024-11-04T05:00Z"),
            ("America/Havana", "2024-11-03T05:30Z", "2024-11-03T04:00Z", "2024-11-04T05:00Z"),
            ("Atlantic/Azores", "2024-10-27T00:30Z", "2024-10-27T00:00Z", "2024-10-28T01:00Z"),
            // 30 December 2011 was left out.
            ("Pacific/Apia", "2011-12-30T09:00Z", "2011-12-29T10:00Z", "2011-12-30T10:00Z"),
        ] {
            let expected = Window { start: at(start), end: at(end) };
            assert_eq!(Window::containing(at(instant), Every::Day, zone), expected, "{zone} {instant}");
        }
    }

    #[test]
    fn weeks_begin_on_mondays_and_months_on_the_first() {
        let now = datetime!(2026-03-29 12:00 UTC);
        let window = |every, zone: &str| Window::containing(now, every, zone);
        let week = Window { start: at("2026-03-22T23:00Z"), end: at("2026-03-29T22:00Z") };
        assert_eq!(window(Every::Week, "Europe/Berlin"), week);
        let month = Window { start: at("2026-02-28T23:00Z"), end: at("2026-03-31T22:00Z") };
        assert_eq!(window(Every::Month, "Europe/Berlin"), month);
        assert_eq!(window(Every::Day, "Nowhere/Else"), window(Every::Day, "UTC"));
        for last in [OffsetDateTime::from_unix_timestamp(253_402_300_799).unwrap(), datetime!(-9999-01-01 00:00 UTC)] {
            let _ = Window::containing(last, Every::Month, "Europe/Berlin");
        }
    }

    #[test]
    fn months_begin_on_the_anchor_day_or_on_their_last_day() {
        let starts = |anchor_day| {
            let mut at = datetime!(2028-01-10 12:00 UTC);
            [(); 4].map(|()| {
                let window = Window::anchored(at, Every::Month, anchor_day, "UTC");
                assert!(window.start <= at && at < window.end);
                at = window.end;
                (u8::from(window.start.month()), window.start.day())
            })
        };
        assert_eq!(starts(1), [(1, 1), (2, 1), (3, 1), (4, 1)]);
        assert_eq!(starts(10), [(1, 10), (2, 10), (3, 10), (4, 10)]);
        assert_eq!(starts(11), [(12, 11), (1, 11), (2, 11), (3, 11)]);
        assert_eq!(starts(31), [(12, 31), (1, 31), (2, 29), (3, 31)]);
    }

    #[test]
    fn a_time_zone_is_known_by_the_name_that_the_database_gives_it() {
        for known in ["UTC", "Europe/Berlin", "Etc/GMT+5", "America/Argentina/Buenos_Aires", "US/Pacific"] {
            assert!(is_time_zone(known), "{known}");
        }
        for unknown in
            ["", "utc", "europe/berlin", "Europe", "Etc/Unknown", "posix/UTC", "localtime", "Factory", "CEST"]
        {
            assert!(!is_time_zone(unknown), "{unknown}");
        }
    }
}
