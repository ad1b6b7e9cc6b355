//! The record that filters know of a key, from the columns of its row.

use contract::key::KeyKind;
use contract::network::Network;
use contract::record::{Budget, Per};
use time::OffsetDateTime;

/// Builds the record of a key from a row. A macro, since sqlx gives the rows of two queries two types.
macro_rules! record_of {
    ($row:expr) => {{
        use contract::record::{Budget, Flags, Per, Record, Requires};
        use $crate::domain::attributes::for_filters;
        use $crate::domain::record::{kind, networks, quota, seconds};

        let mut record = Record {
            requires: Requires::default(),
            key_id: $row.id.into(),
            owner_id: $row.owner_id.into(),
            generation: $row.generation.cast_unsigned(),
            kind: kind(&$row.kind),
            flags: Flags::default()
                .with(Flags::REVOKED, $row.revoked_at.is_some())
                .with(Flags::DISABLED, $row.disabled)
                .with(Flags::QUOTA_EXCEEDED, $row.quota_exceeded)
                .with(Flags::CREDITS_EXHAUSTED, $row.credits_exhausted),
            expires_at_s: $row.expires_at.map(seconds),
            cost: $row.cost.cast_unsigned(),
            rate_limits: $row.rate_limits.0,
            scopes: $row.scopes,
            roles: $row.role_numbers.into_iter().map(i32::cast_unsigned).collect(),
            plan: $row.plan_number.map(i32::cast_unsigned),
            networks: networks(&$row.networks),
            quota: quota($row.quota_shared, $row.quota_fill, $row.quota_resets_at),
            credits: $row.metered.then(|| Budget {
                fill: $row.credits_fill.cast_unsigned(),
                resets_at_s: None,
                per: Per::Owner,
            }),
            attributes: for_filters(
                $row.attributes.map(|attributes| attributes.0),
                $row.owner_attributes.map(|attributes| attributes.0),
            ),
        };
        record.requires = record.restrictions();
        record
    }};
}
pub(crate) use record_of;

/// The kind of a key by its name.
pub(crate) fn kind(name: &str) -> KeyKind {
    if name == KeyKind::Test.name() { KeyKind::Test } else { KeyKind::Live }
}

/// Seconds of Unix time; 0 for times before 1970.
pub(crate) fn seconds(at: OffsetDateTime) -> u64 {
    u64::try_from(at.unix_timestamp()).unwrap_or_default()
}

/// A quota; `is_shared`: by all keys of the owner that have the plan; `None` without a quota.
pub(crate) fn quota(is_shared: Option<bool>, fill: i32, resets_at: Option<OffsetDateTime>) -> Option<Budget> {
    let per = if is_shared? { Per::Owner } else { Per::Key };
    Some(Budget { fill: fill.cast_unsigned(), resets_at_s: resets_at.map(seconds), per })
}

/// Parses the networks from which a key can be used. An invalid network, which was written by hand, becomes one that contains no
/// address.
pub(crate) fn networks(texts: &[String]) -> Vec<Network> {
    let nowhere = || "::/128".parse().ok();
    texts.iter().filter_map(|text| text.parse().ok().or_else(nowhere)).collect()
}
