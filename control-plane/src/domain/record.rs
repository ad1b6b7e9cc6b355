//! The record that filters know of a key, from the columns of its row.

use contract::network::Network;
use contract::record::{Budget, Further, Requires};
use time::OffsetDateTime;

/// Builds the record of a key from a row. A macro, since sqlx gives the rows of two queries two types.
macro_rules! record_of {
    ($row:expr) => {{
        let (rate_limits, alone) = $crate::domain::StoredLimit::apart($row.rate_limits.0);
        let further = $crate::domain::record::further(
            $row.plan_number,
            &$row.networks,
            ($row.quota_starter, $row.quota_turn, $row.quota_resets_at),
            ($row.credits_starter, $row.credits_turn),
            alone,
        );
        contract::record::Record {
            requires: $crate::domain::record::requires(&further),
            key_id: contract::id::KeyId::from($row.id),
            owner_id: contract::id::OwnerId::from($row.owner_id),
            generation: $row.generation.cast_unsigned(),
            flags: contract::record::Flags::default()
                .with(contract::record::Flags::REVOKED, $row.revoked_at.is_some())
                .with(contract::record::Flags::DISABLED, $row.disabled)
                .with(contract::record::Flags::QUOTA_EXCEEDED, $row.quota_exceeded)
                .with(contract::record::Flags::CREDITS_EXHAUSTED, $row.credits_exhausted),
            expires_at_s: $row.expires_at.map(|end| u64::try_from(end.unix_timestamp()).unwrap_or_default()),
            cost: $row.cost.cast_unsigned(),
            rate_limits,
            scopes: $row.scopes,
            roles: $row.role_numbers.into_iter().map(i32::cast_unsigned).collect(),
            address_list: None,
            further,
        }
    }};
}
pub(crate) use record_of;

/// The part of a record that restricts a key further.
pub(crate) fn further(
    plan: Option<i32>,
    networks: &[String],
    quota: (Option<i32>, i32, Option<OffsetDateTime>),
    credits: (Option<i32>, i32),
    alone: u32,
) -> Further {
    let seconds = |at: OffsetDateTime| u64::try_from(at.unix_timestamp()).unwrap_or_default();
    let budget = |starter: Option<i32>, turn: i32, resets_at: Option<OffsetDateTime>| {
        starter.map(|starter| Budget {
            starter: starter.max(0).cast_unsigned(),
            turn: turn.cast_unsigned(),
            resets_at_s: resets_at.map(seconds),
        })
    };
    Further {
        plan: plan.map(i32::cast_unsigned),
        networks: self::networks(networks),
        quota: budget(quota.0, quota.1, quota.2),
        credits: budget(credits.0, credits.1, None),
        alone,
    }
}

/// Parses the networks from which a key can be used. An invalid network, which was written by hand, becomes one that contains no
/// address.
pub(crate) fn networks(texts: &[String]) -> Vec<Network> {
    let nowhere = || "::/128".parse().ok();
    texts.iter().filter_map(|text| text.parse().ok().or_else(nowhere)).collect()
}

/// What a filter must understand to enforce the record.
pub(crate) fn requires(further: &Further) -> Requires {
    let needed = [
        (Requires::PLAN, further.plan.is_some()),
        (Requires::NETWORKS, !further.networks.is_empty()),
        (Requires::BUDGETS, further.quota.is_some() || further.credits.is_some()),
    ];
    Requires(needed.into_iter().filter(|(_, needed)| *needed).fold(0, |bits, (bit, _)| bits | bit.0))
}
