//! Quotas of keys and plans: requests of a key in a window of time.

use contract::json::null_is_default;
use contract::record::Per;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::calendar::{ANCHOR_DAYS, Every, is_time_zone};
use super::per::{PER_OWNER, PerBody};
use crate::error::ApiError;

const REQUESTS: i64 = 1_000_000_000_000;
const WINDOW_S: std::ops::RangeInclusive<i64> = 60..=31_622_400;
const UTC: &str = "UTC";
/// Stands for the time zone of the user.
pub const OWNER: &str = "owner";

/// A quota, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quota {
    /// Requests per window.
    pub requests: i64,
    pub period: Period,
    /// Calendar periods only; UTC unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// Months only: the day on which they begin; the first unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anchor_day: Option<i8>,
    /// Rolling windows only: the length in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_s: Option<i64>,
    /// Whose it is. Only a plan has quotas for an owner.
    #[serde(default)]
    pub per: Per,
}

/// What windows there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Period {
    /// From midnight to midnight.
    Day,
    /// From Monday to Monday.
    Week,
    /// From the first to the first, or from `anchor_day` to `anchor_day`.
    Month,
    /// A sliding window of `window_seconds`.
    Rolling,
}

impl Period {
    /// The name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Week => "week",
            Self::Month => "month",
            Self::Rolling => "rolling",
        }
    }

    /// The calendar period; none for a rolling window.
    pub const fn calendar(self) -> Option<Every> {
        match self {
            Self::Day => Some(Every::Day),
            Self::Week => Some(Every::Week),
            Self::Month => Some(Every::Month),
            Self::Rolling => None,
        }
    }
}

impl Quota {
    /// Parses the stored JSON. `None` if it is invalid.
    pub fn of(value: Option<serde_json::Value>) -> Option<Self> {
        value.and_then(|value| serde_json::from_value(value).ok())
    }

    /// The quota with the time zone of the user, UTC if there is none, in place of [`OWNER`]. The database does the same for the
    /// quotas of keys: `quota_in_zone` in the schema.
    #[must_use]
    pub fn in_zone(mut self, owner_zone: Option<&str>) -> Self {
        if self.time_zone.as_deref() == Some(OWNER) {
            self.time_zone = Some(owner_zone.unwrap_or(UTC).to_owned());
        }
        self
    }

    /// The time zone of a calendar period.
    pub fn zone(&self) -> &str {
        self.time_zone.as_deref().unwrap_or(UTC)
    }

    /// The day on which months begin.
    pub fn anchor_day(&self) -> i8 {
        self.anchor_day.unwrap_or(1)
    }

    /// The length of a rolling window, in seconds.
    pub fn window_s(&self) -> i64 {
        self.window_s.unwrap_or(86_400).clamp(1, 366 * 86_400)
    }

    /// The name of the kind of window. A quota of another kind begins a new window.
    pub fn kind(&self) -> String {
        match self.period {
            Period::Rolling => format!("rolling/{}", self.window_s()),
            Period::Month if self.anchor_day() != 1 => format!("month/{}/{}", self.zone(), self.anchor_day()),
            period => format!("{}/{}", period.name(), self.zone()),
        }
    }
}

/// A quota as clients write and read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QuotaBody {
    /// How many requests are allowed.
    #[schema(example = 100_000, minimum = 1, maximum = 1_000_000_000_000_i64)]
    pub requests: i64,
    /// In which time.
    #[schema(inline, example = "month")]
    pub period: Period,
    /// In which time zone a day, week or month begins: a name of the IANA database, or `owner` for that of the user; UTC unless
    /// given. Not with `rolling`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "Europe/Berlin", max_length = 64)]
    pub time_zone: Option<String>,
    /// On which day of the month a month begins, and on the last day of a shorter month; 1 unless given. With `month` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = 15, minimum = 1, maximum = 31)]
    pub anchor_day: Option<i8>,
    /// How long the window is, in seconds. With `rolling`, and only then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 60, maximum = 31_622_400)]
    pub window_seconds: Option<i64>,
    /// Plans only: `owner` if all keys of a user that have the plan share one quota; `key` unless given.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "PerBody::is_key")]
    #[schema(nullable, inline)]
    pub per: PerBody,
}

impl QuotaBody {
    /// Shows a quota.
    pub fn of(quota: &Quota) -> Self {
        Self {
            requests: quota.requests,
            period: quota.period,
            time_zone: quota.time_zone.clone(),
            anchor_day: quota.anchor_day,
            window_seconds: quota.window_s,
            per: quota.per.into(),
        }
    }

    /// Parses a quota.
    pub fn parse(self) -> Result<Quota, ApiError> {
        let bad = |detail: String| ApiError::invalid("quota", detail);
        if !(1..=REQUESTS).contains(&self.requests) {
            return Err(bad(format!("requests must be a number from 1 to {REQUESTS}")));
        }
        let rolling = self.period == Period::Rolling;
        let (least, most) = (WINDOW_S.start(), WINDOW_S.end());
        let (time_zone, window_s) = match (rolling, self.time_zone, self.window_seconds) {
            (true, None, Some(window)) if WINDOW_S.contains(&window) => (None, Some(window)),
            (true, None, _) => {
                return Err(bad(format!("a rolling quota needs window_seconds, a number from {least} to {most}")));
            }
            (true, Some(_), _) => return Err(bad("a rolling quota has no time_zone".into())),
            (false, _, Some(_)) => return Err(bad("window_seconds goes with the period rolling only".into())),
            (false, zone, None) => (Some(parse_time_zone(zone)?), None),
        };
        let anchor_day = match self.anchor_day {
            Some(_) if self.period != Period::Month => {
                return Err(bad("anchor_day goes with the period month only".into()));
            }
            Some(day) if !ANCHOR_DAYS.contains(&day) => {
                return Err(bad("anchor_day must be a day from 1 to 31".into()));
            }
            day => day,
        };
        let per = self.per.into();
        Ok(Quota { requests: self.requests, period: self.period, time_zone, anchor_day, window_s, per })
    }
}

/// Parses the quota of a single key, which is never that of an owner.
///
/// # Errors
/// What is wrong with `quota`.
pub fn parse_key_quota(body: QuotaBody) -> Result<Quota, ApiError> {
    if body.per == PerBody::Owner {
        return Err(ApiError::invalid("quota", PER_OWNER));
    }
    body.parse()
}

fn parse_time_zone(zone: Option<String>) -> Result<String, ApiError> {
    let zone = zone.unwrap_or_else(|| UTC.into());
    if zone != OWNER && !is_time_zone(&zone) {
        let detail = "time_zone must be a time zone of the IANA database such as Europe/Berlin, or owner";
        return Err(ApiError::invalid("quota", detail));
    }
    Ok(zone)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(period: Period) -> QuotaBody {
        QuotaBody { requests: 1, period, time_zone: None, anchor_day: None, window_seconds: None, per: PerBody::Key }
    }

    #[test]
    fn a_calendar_has_a_time_zone_and_a_rolling_window_a_length() {
        let month = QuotaBody { time_zone: Some("Europe/Berlin".into()), ..body(Period::Month) }.parse().unwrap();
        assert_eq!((month.time_zone.as_deref(), month.window_s), (Some("Europe/Berlin"), None));
        assert_eq!(body(Period::Day).parse().unwrap().time_zone.as_deref(), Some("UTC"));
        let anchored = QuotaBody { anchor_day: Some(31), ..body(Period::Month) }.parse().unwrap();
        assert_eq!((anchored.anchor_day(), anchored.kind()), (31, "month/UTC/31".into()));
        let of_owner = QuotaBody { time_zone: Some("owner".into()), ..body(Period::Week) };
        assert_eq!(QuotaBody::of(&of_owner.clone().parse().unwrap()), of_owner);
        let rolling = QuotaBody { window_seconds: Some(60), ..body(Period::Rolling) };
        assert_eq!(QuotaBody::of(&rolling.clone().parse().unwrap()), rolling);
        for bad in [
            QuotaBody { requests: 0, ..body(Period::Day) },
            QuotaBody { requests: 1_000_000_000_001, ..body(Period::Day) },
            QuotaBody { time_zone: Some("a b".into()), ..body(Period::Week) },
            QuotaBody { time_zone: Some(String::new()), ..body(Period::Week) },
            QuotaBody { time_zone: Some("posix/UTC".into()), ..body(Period::Week) },
            QuotaBody { time_zone: Some("Nowhere/Else".into()), ..body(Period::Week) },
            QuotaBody { window_seconds: Some(60), ..body(Period::Day) },
            QuotaBody { anchor_day: Some(0), ..body(Period::Month) },
            QuotaBody { anchor_day: Some(32), ..body(Period::Month) },
            QuotaBody { anchor_day: Some(1), ..body(Period::Week) },
            body(Period::Rolling),
            QuotaBody { window_seconds: Some(59), ..body(Period::Rolling) },
            QuotaBody { window_seconds: Some(31_622_401), ..body(Period::Rolling) },
            QuotaBody { time_zone: Some("UTC".into()), window_seconds: Some(60), ..body(Period::Rolling) },
        ] {
            assert_eq!(bad.clone().parse().unwrap_err().field(), Some("quota"), "{bad:?}");
        }
    }

    #[test]
    fn the_json_of_the_database_leads_back_and_nonsense_is_no_quota() {
        let json = serde_json::json!({"requests": 5, "period": "week", "time_zone": "Europe/Berlin", "per": "key"});
        let quota = Quota::of(Some(json.clone())).unwrap();
        assert_eq!((quota.period, quota.zone()), (Period::Week, "Europe/Berlin"));
        assert_eq!(serde_json::to_value(&quota).unwrap(), json);
        assert_eq!(Quota::of(Some(serde_json::json!({"requests": "many"}))), None);
    }
}
