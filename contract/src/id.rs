//! Names made of a fixed number of bytes: who a key is, who owns it, which database and which reporter speak.
//!
//! In binary form they are their bytes alone; in JSON they are their usual text.

extern crate alloc;

use core::fmt;
use core::str::FromStr;

use uuid::Uuid;

/// A named array of bytes with the traits that every such name needs. `Display` and `FromStr` are up to the type.
macro_rules! byte_name {
    ($(#[$doc:meta])* $name:ident, $bytes:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $bytes]);

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    let text = <alloc::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                    text.parse().map_err(serde::de::Error::custom)
                } else {
                    <[u8; $bytes]>::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}
pub(crate) use byte_name;

/// The same for the names that are UUIDs.
macro_rules! uuid_name {
    ($(#[$doc:meta])* $name:ident) => {
        byte_name! { $(#[$doc])* $name, 16 }

        impl From<Uuid> for $name {
            fn from(uuid: Uuid) -> Self {
                Self(uuid.into_bytes())
            }
        }

        impl From<$name> for Uuid {
            fn from(name: $name) -> Self {
                Self::from_bytes(name.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                Uuid::from_bytes(self.0).hyphenated().fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse::<Uuid>().map(Into::into)
            }
        }
    };
}

uuid_name! {
    /// Names a key for as long as it lives: the same before and after a change of its secret.
    KeyId
}
uuid_name! {
    /// Names the owner of keys: the consumer that the upstream hears of.
    OwnerId
}
uuid_name! {
    /// Names one life of the database. Revisions compare only within one epoch.
    Epoch
}
uuid_name! {
    /// Names one Envoy process as a source of usage reports.
    ReporterId
}
