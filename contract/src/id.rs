//! Identifiers with a fixed number of bytes. Messages have them as byte strings, which decode faster than arrays; JSON has
//! the usual text.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

/// A newtype around an array of bytes with the traits of every identifier but `Display` and `FromStr`.
macro_rules! byte_name {
    ($(#[$doc:meta])* $name:ident, $bytes:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $bytes]);

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    crate::codec::byte_array::serialize(&self.0, serializer)
                }
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                    text.parse().map_err(serde::de::Error::custom)
                } else {
                    crate::codec::byte_array::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}
pub(crate) use byte_name;

/// The same for UUIDs, with `Display` and `FromStr`.
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
    /// A key. A rotation changes its secret and keeps its id.
    KeyId
}
uuid_name! {
    /// The owner of keys, which the upstream gets as the consumer.
    OwnerId
}
uuid_name! {
    /// One life of the database. Revisions are comparable within one epoch only.
    Epoch
}
uuid_name! {
    /// One Envoy process as a source of usage reports.
    ReporterId
}
