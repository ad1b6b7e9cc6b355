//! Credits. Every change of a balance is a row of the ledger. Admins add top-ups and corrections, [`refill`] books
//! scheduled credits, usage is booked with the reports, and [`rollup`] keeps the ledger short.

pub mod refill;
pub mod rollup;
mod store;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use crate::domain::calendar::{ANCHOR_DAYS, is_time_zone};
use crate::domain::{Every, Window};
use crate::error::ApiError;

pub use store::{Account, LedgerRow, Locked, account, book_usage, credit, ledger, lock, update};

/// Most credits of a top-up or a correction.
pub const AMOUNT: i64 = 1_000_000_000_000;

/// Largest balance, above or below zero, after a top-up or a correction. JSON readers represent it exactly.
pub const BALANCE: i64 = 1_000_000_000_000_000;

const NOTE_CHARS: usize = 200;

/// What a row of the ledger is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Credits that were bought or given.
    TopUp,
    /// Credits that came by schedule.
    Refill,
    /// Credits that requests have cost.
    Usage,
    /// What was wrong before.
    Correction,
}

impl Kind {
    /// The name, as the database has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::TopUp => "top_up",
            Self::Refill => "refill",
            Self::Usage => "usage",
            Self::Correction => "correction",
        }
    }
}

/// Credits that come in by themselves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Refill {
    /// How many.
    #[schema(example = 1_000, minimum = 1, maximum = 1_000_000_000_000_i64)]
    pub amount: i64,
    /// How often.
    pub period: Every,
    /// Where it is midnight: a name of the IANA time zone database.
    #[serde(default = "utc", deserialize_with = "null_is_utc")]
    #[schema(nullable, example = "Europe/Berlin", max_length = 64)]
    pub time_zone: String,
    /// On which day of the month it comes, and on the last day of a shorter month; 1 unless given. With `month` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = 15, minimum = 1, maximum = 31)]
    pub anchor_day: Option<i8>,
    /// The balance is filled up to this and no further; any balance grows unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = 10_000, minimum = 1, maximum = 1_000_000_000_000_i64)]
    pub up_to: Option<i64>,
}

fn utc() -> String {
    "UTC".into()
}

fn null_is_utc<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Option::deserialize(deserializer).map(|zone| zone.unwrap_or_else(utc))
}

impl Refill {
    /// Checks the numbers and the time zone.
    ///
    /// # Errors
    /// What is wrong with `refill`.
    pub fn check(&self) -> Result<(), ApiError> {
        for (field, value) in [("amount", Some(self.amount)), ("up_to", self.up_to)] {
            if value.is_some_and(|value| !(1..=AMOUNT).contains(&value)) {
                return Err(ApiError::invalid("refill", format!("{field} must be a number from 1 to {AMOUNT}")));
            }
        }
        if self.anchor_day.is_some_and(|day| self.period != Every::Month || !ANCHOR_DAYS.contains(&day)) {
            let detail = "anchor_day must be a day from 1 to 31, and goes with the period month only";
            return Err(ApiError::invalid("refill", detail));
        }
        if !is_time_zone(&self.time_zone) {
            let detail = "time_zone must be a name of the IANA time zone database such as Europe/Berlin";
            return Err(ApiError::invalid("refill", detail));
        }
        Ok(())
    }

    /// The first time after `now` when it is due.
    #[must_use]
    pub fn next(&self, now: OffsetDateTime) -> OffsetDateTime {
        Window::anchored(now, self.period, self.anchor_day.unwrap_or(1), &self.time_zone).end
    }

    /// The credits that it adds to a balance.
    #[must_use]
    pub fn amount(&self, balance: i64) -> i64 {
        self.up_to.map_or(self.amount, |most| most.saturating_sub(balance).clamp(0, self.amount))
    }
}

/// Parses the note of a row.
///
/// # Errors
/// What is wrong with `note`.
pub fn parse_note(note: Option<String>) -> Result<String, ApiError> {
    let note = note.unwrap_or_default().trim().to_owned();
    if note.chars().count() > NOTE_CHARS || note.chars().any(char::is_control) {
        let detail = format!("must have at most {NOTE_CHARS} characters and no control characters");
        return Err(ApiError::invalid("note", detail));
    }
    Ok(note)
}

/// Parses the amount of a top-up or a correction.
///
/// # Errors
/// What is wrong with `amount` or `kind`.
pub fn parse_amount(amount: i64, kind: Kind) -> Result<i64, ApiError> {
    match kind {
        Kind::TopUp if (1..=AMOUNT).contains(&amount) => Ok(amount),
        Kind::TopUp => {
            let detail = format!("must be a number from 1 to {AMOUNT}; to take credits away, give kind correction");
            Err(ApiError::invalid("amount", detail))
        }
        Kind::Correction if amount != 0 && (-AMOUNT..=AMOUNT).contains(&amount) => Ok(amount),
        Kind::Correction => {
            Err(ApiError::invalid("amount", format!("must be a number from -{AMOUNT} to {AMOUNT} other than 0")))
        }
        Kind::Refill | Kind::Usage => Err(ApiError::invalid("kind", "must be top_up or correction")),
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn a_top_up_adds_and_a_correction_may_take_away() {
        assert_eq!(parse_amount(AMOUNT, Kind::TopUp).unwrap(), AMOUNT);
        assert_eq!(parse_amount(-5, Kind::Correction).unwrap(), -5);
        for (amount, kind) in [
            (0, Kind::TopUp),
            (-1, Kind::TopUp),
            (AMOUNT + 1, Kind::TopUp),
            (0, Kind::Correction),
            (-AMOUNT - 1, Kind::Correction),
            (i64::MIN, Kind::Correction),
            (1, Kind::Usage),
        ] {
            assert!(parse_amount(amount, kind).is_err(), "{amount} {kind:?}");
        }
    }

    #[test]
    fn a_refill_adds_or_fills_up() {
        let refill = Refill { amount: 100, period: Every::Day, time_zone: utc(), anchor_day: None, up_to: None };
        assert_eq!((refill.amount(-50), refill.amount(1_000)), (100, 100));
        let up_to = Refill { up_to: Some(120), ..refill };
        assert_eq!([-50, 20, 50, 120, 500].map(|balance| up_to.amount(balance)), [100, 100, 70, 0, 0]);
        assert!(up_to.check().is_ok());
        for bad in [
            Refill { amount: 0, ..up_to.clone() },
            Refill { anchor_day: Some(1), ..up_to.clone() },
            Refill { period: Every::Month, anchor_day: Some(32), ..up_to.clone() },
            Refill { time_zone: "Nowhere/Else".into(), ..up_to.clone() },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
        let month = Refill { period: Every::Month, anchor_day: Some(15), ..up_to };
        assert!(month.check().is_ok());
        assert_eq!(month.next(datetime!(2026-03-15 00:00 UTC)), datetime!(2026-04-15 00:00 UTC));
    }

    #[test]
    fn a_note_is_short_and_plain() {
        assert_eq!(parse_note(Some("  thanks ".into())).unwrap(), "thanks");
        assert!(parse_note(Some("x".repeat(201))).is_err() && parse_note(Some("a\0b".into())).is_err());
    }
}
