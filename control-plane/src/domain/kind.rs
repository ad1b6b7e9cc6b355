//! Kinds of keys as clients write and read them.

use contract::key::KeyKind;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Whether a key is for production or for tests. A policy may accept only one of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum KindBody {
    /// For production: `sk_live_…`
    #[default]
    Live,
    /// For tests: `sk_test_…`
    Test,
}

impl From<KindBody> for KeyKind {
    fn from(kind: KindBody) -> Self {
        match kind {
            KindBody::Live => Self::Live,
            KindBody::Test => Self::Test,
        }
    }
}

impl From<KeyKind> for KindBody {
    fn from(kind: KeyKind) -> Self {
        match kind {
            KeyKind::Live => Self::Live,
            KeyKind::Test => Self::Test,
        }
    }
}
