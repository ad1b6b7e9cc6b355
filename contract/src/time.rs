//! Units of time.

/// Nanoseconds of a millisecond.
pub const NS_PER_MS: u64 = 1_000_000;
/// Nanoseconds of a second.
pub const NS_PER_S: u64 = 1_000_000_000;
/// Milliseconds of a second.
pub const MS_PER_S: u64 = 1_000;
/// Milliseconds of an hour.
pub const MS_PER_HOUR: u64 = 3_600_000;
/// Seconds of an hour.
pub const S_PER_HOUR: u64 = 3_600;
