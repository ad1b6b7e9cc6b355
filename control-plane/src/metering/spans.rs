//! The spans of time that sums of usage run over, and whether the stored usage can be cut at their ends.
//!
//! Usage is stored by the hour of UTC, and after a while by the day of UTC (see [`super::retention`]). A query whose spans cut
//! an hour or a day that is stored as a whole is refused, so that each sum is exact.

use time::{Duration, OffsetDateTime};

use crate::domain::time_range::is_hour;
use crate::domain::{Every, TimeRange, Timestamp};
use crate::error::ApiError;

/// The time span of each sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interval {
    /// In UTC.
    Hour,
    /// A period of the calendar in the time zone of the range.
    Calendar(Every),
    /// The whole range.
    Total,
}

/// Consecutive spans that cover a range of time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spans {
    /// The start of each span. The first one may lie before the range.
    starts: Vec<OffsetDateTime>,
    /// The start of the range, the ends between the spans, and the end of the range.
    pub cuts: Vec<OffsetDateTime>,
}

impl Spans {
    /// # Errors
    /// Spans of this time zone begin within hours of UTC.
    pub fn new(interval: Interval, range: &TimeRange) -> Result<Self, ApiError> {
        let TimeRange { from, to, zone } = range;
        let starts: Vec<OffsetDateTime> = match interval {
            Interval::Hour => {
                let after = |at: &OffsetDateTime| at.checked_add(Duration::HOUR);
                std::iter::successors(Some(*from), after).take_while(|at| at < to).collect()
            }
            Interval::Calendar(every) => {
                zone.windows(every, *from, *to).into_iter().map(|window| window.start).collect()
            }
            Interval::Total => vec![*from],
        };
        let mut cuts = starts.clone();
        if let Some(first) = cuts.first_mut() {
            *first = *from;
        }
        if let Some(start) = cuts.iter().find(|start| !is_hour(**start)) {
            let detail = format!(
                "must have an offset of whole hours: usage is stored by the hour of UTC, and a {interval} of {zone} begins \
                 at {start}. Give another time zone, or the interval hour or total",
                interval = interval.name(),
                zone = zone.name(),
                start = Timestamp::from(*start),
            );
            return Err(ApiError::invalid("time_zone", detail));
        }
        cuts.push(*to);
        Ok(Self { starts, cuts })
    }

    /// The start of a span, by its number from 1.
    pub fn start(&self, number: i32) -> Option<OffsetDateTime> {
        self.starts.get(usize::try_from(number).ok()?.checked_sub(1)?).copied()
    }
}

impl Interval {
    /// As queries name it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hour => "hour",
            Self::Calendar(Every::Day) => "day",
            Self::Calendar(Every::Week) => "week",
            Self::Calendar(Every::Month) => "month",
            Self::Total => "total",
        }
    }

    /// By the name that queries give it.
    pub fn named(name: &str) -> Option<Self> {
        let every = [Every::Day, Every::Week, Every::Month].map(Self::Calendar);
        [Self::Hour, Self::Total].into_iter().chain(every).find(|interval| interval.name() == name)
    }
}

/// The refusal of a query whose spans cut a stored day: the newest one that they cut, by its start.
pub fn refuse_cut(day: OffsetDateTime, interval: Interval, range: &TimeRange) -> ApiError {
    let end = day.saturating_add(Duration::DAY);
    let is_cut_at = |at: OffsetDateTime| day < at && at < end;
    let shown = Timestamp::from(end);
    if is_cut_at(range.to) {
        let detail = format!("must be midnight of UTC: usage before {shown} is stored by the day of UTC only");
        return ApiError::invalid("to", detail);
    }
    let (field, remedy) = if is_cut_at(range.from) {
        ("from", "must be midnight of UTC")
    } else if interval == Interval::Hour {
        ("interval", "must be day, week, month or total")
    } else {
        ("time_zone", "must be UTC")
    };
    let detail =
        format!("{remedy}, or from must be {shown} or later: usage before that is stored by the day of UTC only");
    ApiError::invalid(field, detail)
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;
    use crate::domain::Zone;

    fn range(from: OffsetDateTime, to: OffsetDateTime, zone: &str) -> TimeRange {
        TimeRange { from, to, zone: Zone::find(zone).unwrap() }
    }

    #[test]
    fn spans_follow_the_calendar_of_the_time_zone() {
        // Clocks go back on 25 October, a Sunday.
        let october = range(datetime!(2026-10-23 22:00 UTC), datetime!(2026-10-26 23:00 UTC), "Europe/Berlin");
        let days = Spans::new(Interval::Calendar(Every::Day), &october).unwrap();
        let [first, sunday, monday] =
            [datetime!(2026-10-23 22:00 UTC), datetime!(2026-10-24 22:00 UTC), datetime!(2026-10-25 23:00 UTC)];
        assert_eq!(days.cuts, [first, sunday, monday, october.to]);
        assert_eq!([0, 1, 3, 4].map(|number| days.start(number)), [None, Some(first), Some(monday), None]);

        // The first week and the first month began before the range.
        let weeks = Spans::new(Interval::Calendar(Every::Week), &october).unwrap();
        assert_eq!(weeks.cuts, [first, monday, october.to]);
        assert_eq!(weeks.start(1), Some(datetime!(2026-10-18 22:00 UTC)));
        let months = Spans::new(Interval::Calendar(Every::Month), &october).unwrap();
        assert_eq!((months.cuts, months.starts[0]), (vec![first, october.to], datetime!(2026-09-30 22:00 UTC)));

        let hours = Spans::new(Interval::Hour, &october).unwrap();
        assert_eq!(
            (hours.starts.len(), hours.cuts.len(), hours.start(73)),
            (73, 74, Some(datetime!(2026-10-26 22:00 UTC)))
        );
        assert_eq!(Spans::new(Interval::Total, &october).unwrap().cuts, [first, october.to]);
    }

    #[test]
    fn days_that_begin_within_an_hour_of_utc_are_refused() {
        let (from, to) = (datetime!(2026-05-01 00:00 UTC), datetime!(2026-05-03 00:00 UTC));
        let detail = "must have an offset of whole hours: usage is stored by the hour of UTC, and a day of Asia/Kolkata begins \
                      at 2026-05-01T18:30:00Z. Give another time zone, or the interval hour or total";
        match Spans::new(Interval::Calendar(Every::Day), &range(from, to, "Asia/Kolkata")) {
            Err(ApiError::Invalid { field, detail: refusal }) => {
                assert_eq!((field.as_deref(), refusal.as_str()), (Some("time_zone"), detail));
            }
            spans => panic!("{spans:?}"),
        }
        assert!(
            Spans::new(Interval::Calendar(Every::Month), &range(from, to, "Asia/Kolkata")).is_ok(),
            "no month begins"
        );
        // Its offset is 10:30 in winter and 11:00 in summer.
        let summer = range(datetime!(2026-01-01 00:00 UTC), datetime!(2026-01-09 00:00 UTC), "Australia/Lord_Howe");
        assert!(Spans::new(Interval::Calendar(Every::Day), &summer).is_ok());
        assert!(Spans::new(Interval::Calendar(Every::Day), &range(from, to, "Australia/Lord_Howe")).is_err());
    }

    #[test]
    fn spans_end_at_the_end_of_the_calendar() {
        let (from, to) = (datetime!(9999-12-30 00:00 UTC), datetime!(9999-12-31 23:00 UTC));
        for every in [Every::Day, Every::Week, Every::Month] {
            let _ = Spans::new(Interval::Calendar(every), &range(from, to, "Europe/Berlin"));
        }
    }

    #[test]
    fn a_query_that_cuts_a_stored_day_is_refused_by_the_field_that_cuts_it() {
        let day = datetime!(2026-01-31 00:00 UTC);
        let (before, within, after) =
            (datetime!(2026-01-01 00:00 UTC), datetime!(2026-01-31 23:00 UTC), datetime!(2026-03-01 00:00 UTC));
        let or_later =
            ", or from must be 2026-02-01T00:00:00Z or later: usage before that is stored by the day of UTC only";
        for (from, to, interval, field, remedy) in [
            (within, after, Interval::Total, "from", "must be midnight of UTC"),
            (before, after, Interval::Hour, "interval", "must be day, week, month or total"),
            (before, after, Interval::Calendar(Every::Month), "time_zone", "must be UTC"),
        ] {
            let refusal = refuse_cut(day, interval, &range(from, to, "Europe/Berlin"));
            assert_eq!(refusal.field(), Some(field));
            assert_eq!(refusal.to_string(), format!("{field}: {remedy}{or_later}"));
        }
        for from in [before, within - Duration::HOUR] {
            let refusal = refuse_cut(day, Interval::Hour, &range(from, within, "UTC"));
            let detail =
                "to: must be midnight of UTC: usage before 2026-02-01T00:00:00Z is stored by the day of UTC only";
            assert_eq!(refusal.to_string(), detail);
        }
    }
}
