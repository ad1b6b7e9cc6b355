//! Networks that a key may be used from, such as `192.0.2.0/24` or `2001:db8::/32`. An address alone is a network of one.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A network in CIDR notation (RFC 4632, RFC 4291) without bits beyond its prefix.
///
/// An IPv4 network that is written as an IPv6 one, such as `::ffff:192.0.2.0/120`, becomes the IPv4 network (RFC 4291,
/// section 2.5.5.2). In JSON: the text. In messages: address and prefix as IPv6, also of IPv4 networks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Network(IpNet);

/// Why a text is not a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// There is no address, or no number after the slash.
    #[error("must be an address or a network such as 192.0.2.0/24 or 2001:db8::/32")]
    Form,
    /// The prefix has more bits than the address.
    #[error("the prefix is longer than the address")]
    Prefix,
    /// Bits beyond the prefix are set, so it is not clear which network is meant.
    #[error("the address has bits beyond its prefix; write the first address of the network")]
    Host,
}

/// Bits before the IPv4 address in an IPv6 address that maps it.
const MAPPED_BITS: u8 = 96;

impl Network {
    fn new(address: IpAddr, prefix: u8) -> Result<Self, NetworkError> {
        let net = IpNet::new(address, prefix).map_err(|_| NetworkError::Prefix)?;
        if net.trunc() != net {
            return Err(NetworkError::Host);
        }
        let canonical = address.to_canonical();
        if canonical == address {
            return Ok(Self(net));
        }
        // The bits before the IPv4 address are set, so the prefix covers them.
        IpNet::new(canonical, prefix.saturating_sub(MAPPED_BITS)).map(Self).map_err(|_| NetworkError::Prefix)
    }

    /// Whether an address is in the network. An IPv4 address that is written as an IPv6 one counts as IPv4.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        // Smaller than ipnet's comparison with the first and the last address of the network.
        IpNet::new(address.to_canonical(), self.0.prefix_len()).is_ok_and(|net| net.trunc() == self.0)
    }

    /// Whether every address of another network is in this one.
    #[must_use]
    pub fn holds(&self, other: &Self) -> bool {
        self.0.contains(&other.0)
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let (address, digits) = text.split_once('/').unzip();
        let address: IpAddr = address.unwrap_or(text).parse().map_err(|_| NetworkError::Form)?;
        match digits {
            None => Ok(Self(address.to_canonical().into())),
            // A number may have a sign in Rust.
            Some(digits) if !digits.bytes().all(|byte| byte.is_ascii_digit()) => Err(NetworkError::Form),
            Some(digits) => Self::new(address, digits.parse().map_err(|_| NetworkError::Form)?),
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Network {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return serializer.collect_str(self);
        }
        let (bits, prefix) = match self.0 {
            IpNet::V4(net) => (net.addr().to_ipv6_mapped().to_bits(), net.prefix_len().saturating_add(MAPPED_BITS)),
            IpNet::V6(net) => (net.addr().to_bits(), net.prefix_len()),
        };
        (bits, prefix).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            return <Cow<'de, str>>::deserialize(deserializer)?.parse().map_err(D::Error::custom);
        }
        let (bits, prefix) = Deserialize::deserialize(deserializer)?;
        Self::new(Ipv6Addr::from_bits(bits).into(), prefix).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> Network {
        text.parse().unwrap()
    }

    fn holds(text: &str, address: &str) -> bool {
        network(text).contains(address.parse().unwrap())
    }

    #[test]
    fn an_address_is_in_the_network_that_shares_its_prefix() {
        assert!(holds("192.0.2.0/24", "192.0.2.255") && !holds("192.0.2.0/24", "192.0.3.0"));
        assert!(holds("192.0.2.7", "192.0.2.7") && !holds("192.0.2.7", "192.0.2.8"));
        assert!(holds("2001:db8::/32", "2001:db8:ffff::1") && !holds("2001:db8::/32", "2001:db9::"));
        assert!(holds("0.0.0.0/0", "203.0.113.9") && holds("::/0", "2001:db8::1"));
    }

    #[test]
    fn the_two_families_are_kept_apart_but_for_mapped_addresses() {
        assert!(!holds("0.0.0.0/0", "2001:db8::1") && !holds("::/0", "192.0.2.1"));
        assert!(holds("192.0.2.0/24", "::ffff:192.0.2.1"));
    }

    #[test]
    fn an_ipv4_network_that_is_written_as_an_ipv6_one_is_the_ipv4_network() {
        for (text, expected) in [
            ("::ffff:192.0.2.7", "192.0.2.7/32"),
            ("::FFFF:c000:207/128", "192.0.2.7/32"),
            ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            // Neither is in the mapped block.
            ("::192.0.2.7", "::c000:207/128"),
            ("64:ff9b::192.0.2.7", "64:ff9b::c000:207/128"),
        ] {
            assert_eq!(network(text).to_string(), expected, "{text}");
        }
        for address in ["192.0.2.9", "::ffff:192.0.2.9"] {
            assert!(holds("::ffff:192.0.2.0/120", address), "{address}");
        }
        assert!(!holds("::ffff:192.0.2.0/120", "192.0.3.9"));
        assert!(network("192.0.0.0/16").holds(&network("::ffff:192.0.2.0/120")));
        // A prefix of IPv4 behind an address of IPv6 is ambiguous.
        assert_eq!("::ffff:192.0.2.0/24".parse::<Network>(), Err(NetworkError::Host));
        // The same holds for encoded networks.
        let address = u128::from_be_bytes([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 0]);
        let decoded = |prefix: u8| postcard::from_bytes(&postcard::to_allocvec(&(address, prefix)).unwrap());
        assert_eq!(decoded(120), Ok(network("192.0.2.0/24")));
        for prefix in [24, 118, 129] {
            assert!(decoded(prefix).is_err(), "{prefix}");
        }
    }

    #[test]
    fn a_network_holds_itself_and_narrower_ones() {
        for (wide, narrow, expected) in [
            ("192.0.2.0/24", "192.0.2.0/24", true),
            ("192.0.2.0/24", "192.0.2.7", true),
            ("192.0.2.0/24", "192.0.0.0/16", false),
            ("192.0.2.0/24", "192.0.3.0/25", false),
            ("0.0.0.0/0", "::/0", false),
            ("::/0", "2001:db8::/32", true),
        ] {
            assert_eq!(network(wide).holds(&network(narrow)), expected, "{wide} {narrow}");
        }
    }

    #[test]
    fn a_text_that_is_not_a_network_is_refused_with_the_reason() {
        for text in ["", "192.0.2", "192.0.2.0/", "192.0.2.0/+8", "192.0.2.0/x", "example.com", "1.2.3.4/256"] {
            assert_eq!(text.parse::<Network>(), Err(NetworkError::Form), "{text}");
        }
        assert_eq!("192.0.2.0/33".parse::<Network>(), Err(NetworkError::Prefix));
        assert_eq!("192.0.2.1/24".parse::<Network>(), Err(NetworkError::Host));
        assert_eq!("2001:db8::1/32".parse::<Network>(), Err(NetworkError::Host));
    }

    #[test]
    fn a_network_is_decoded_as_it_was_from_text_and_from_bytes() {
        for text in ["192.0.2.0/24", "192.0.2.7/32", "0.0.0.0/0", "2001:db8::/32", "::/0", "::1/128"] {
            assert_eq!(network(text).to_string(), text);
            let bytes = postcard::to_allocvec(&network(text)).unwrap();
            assert_eq!(postcard::from_bytes::<Network>(&bytes), Ok(network(text)));
        }
    }
}
