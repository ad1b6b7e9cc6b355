//! Keys in the control plane: what clients say of them is parsed in [`domain`], what is kept of them is read and written
//! in [`store`], what was counted of them is read in [`usage`].

/// The record that filters know of a key, from a row with the columns that make it up. A macro, since the rows of two
/// checked queries are of two types.
macro_rules! record_of {
    ($row:expr) => {
        contract::record::Record {
            requires: contract::record::Requires::default(),
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
            rate_limits: $row.rate_limits.0,
            scopes: $row.scopes,
            roles: Vec::new(),
            address_list: $row.address_list_id.map(i32::cast_unsigned),
        }
    };
}
pub(crate) use record_of;

pub mod domain;
pub mod store;
pub mod usage;
