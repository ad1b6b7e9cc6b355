//! Bounds on what one owner and one sync key may create.

/// The bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Keys that the keys of one owner may make, and rotations, in 24 hours.
    pub owner_keys_per_day: u32,
    /// Live Envoys that one sync key may have.
    pub envoys_per_sync_key: u32,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { owner_keys_per_day: 200, envoys_per_sync_key: 1_000 }
    }
}
