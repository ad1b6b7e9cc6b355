//! Networks that a key may be used from: `192.0.2.0/24` or `2001:db8::/32` comes in, whether an address is in it goes out.
//! An address alone is a network of one. Refused are prefixes that are too long and addresses with bits beyond theirs.

extern crate alloc;

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::str::FromStr;

use serde::{Deserialize, Serialize};

/// A network in CIDR notation (RFC 4632, RFC 4291). In JSON: that text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Network {
    bits: u128,
    prefix: u8,
    v6: bool,
}

/// Why a text is no network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// No address, or no number behind the slash.
    #[error("must be an address or a network such as 192.0.2.0/24 or 2001:db8::/32")]
    Form,
    /// More bits than such an address has.
    #[error("the prefix is longer than the address")]
    Prefix,
    /// Bits beyond the prefix are set: it is not clear which network is meant.
    #[error("the address has bits beyond its prefix; write the first address of the network")]
    Host,
}

/// What stands before the 32 bits of an IPv4 address that is written as an IPv6 one, `::ffff:192.0.2.7` (RFC 4291, section
/// 2.5.5.2), and how many bits that are.
const MAPPED: u128 = 0xffff;
const MAPPED_BITS: u8 = 96;

impl Network {
    /// The one form of a network: an IPv4 network that is written as an IPv6 one is the IPv4 network.
    fn canonical(bits: u128, prefix: u8, v6: bool) -> Self {
        let mapped = v6 && bits.checked_shr(32) == Some(MAPPED);
        match prefix.checked_sub(MAPPED_BITS) {
            Some(prefix) if mapped => Self { bits: bits & u128::from(u32::MAX), prefix, v6: false },
            _ => Self { bits, prefix, v6 },
        }
    }

    /// Whether an address is in the network. An IPv4 address that is written as an IPv6 one counts as IPv4.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let (bits, v6) = bits_of(address.to_canonical());
        v6 == self.v6 && masked(bits, self.prefix, v6) == self.bits
    }

    /// Whether every address of another network is in this one.
    #[must_use]
    pub fn holds(&self, other: &Self) -> bool {
        other.v6 == self.v6 && other.prefix >= self.prefix && masked(other.bits, self.prefix, self.v6) == self.bits
    }
}

fn bits_of(address: IpAddr) -> (u128, bool) {
    match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()), false),
        IpAddr::V6(address) => (address.to_bits(), true),
    }
}

const fn width(v6: bool) -> u8 {
    if v6 { 128 } else { 32 }
}

fn masked(bits: u128, prefix: u8, v6: bool) -> u128 {
    let host_bits = u32::from(width(v6).saturating_sub(prefix));
    let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
    bits & mask
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let (bits, v6) = bits_of(address.parse::<IpAddr>().map_err(|_| NetworkError::Form)?);
        let prefix = match prefix {
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                digits.parse::<u8>().map_err(|_| NetworkError::Form)?
            }
            Some(_) => return Err(NetworkError::Form),
            None => width(v6),
        };
        if prefix > width(v6) {
            return Err(NetworkError::Prefix);
        }
        if masked(bits, prefix, v6) != bits {
            return Err(NetworkError::Host);
        }
        Ok(Self::canonical(bits, prefix, v6))
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = match u32::try_from(self.bits) {
            Ok(bits) if !self.v6 => IpAddr::V4(Ipv4Addr::from_bits(bits)),
            _ => IpAddr::V6(Ipv6Addr::from_bits(self.bits)),
        };
        write!(f, "{address}/{}", self.prefix)
    }
}

impl Serialize for Network {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return serializer.collect_str(self);
        }
        match u32::try_from(self.bits) {
            Ok(bits) if !self.v6 => (self.prefix, Some(bits), None::<u128>).serialize(serializer),
            _ => (self.prefix, None::<u32>, Some(self.bits)).serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;

        if deserializer.is_human_readable() {
            let text = <alloc::borrow::Cow<'de, str>>::deserialize(deserializer)?;
            return text.parse().map_err(D::Error::custom);
        }
        let (prefix, v4, v6) = <(u8, Option<u32>, Option<u128>)>::deserialize(deserializer)?;
        let (bits, v6) = match (v4, v6) {
            (Some(bits), None) => (u128::from(bits), false),
            (None, Some(bits)) => (bits, true),
            _ => return Err(D::Error::custom("neither IPv4 nor IPv6")),
        };
        if prefix > width(v6) || masked(bits, prefix, v6) != bits {
            return Err(D::Error::custom(NetworkError::Prefix));
        }
        Ok(Self::canonical(bits, prefix, v6))
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

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
        // Nor do bytes bring the other form in.
        let written = (120_u8, None::<u32>, Some(0xffff_c000_0200_u128));
        let bytes = postcard::to_allocvec(&written).unwrap();
        assert_eq!(postcard::from_bytes::<Network>(&bytes), Ok(network("192.0.2.0/24")));
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
    fn what_is_no_network_is_refused_with_the_reason() {
        for text in ["", "192.0.2", "192.0.2.0/", "192.0.2.0/+8", "192.0.2.0/x", "example.com", "1.2.3.4/256"] {
            assert_eq!(text.parse::<Network>(), Err(NetworkError::Form), "{text}");
        }
        assert_eq!("192.0.2.0/33".parse::<Network>(), Err(NetworkError::Prefix));
        assert_eq!("192.0.2.1/24".parse::<Network>(), Err(NetworkError::Host));
        assert_eq!("2001:db8::1/32".parse::<Network>(), Err(NetworkError::Host));
    }

    #[test]
    fn the_text_and_the_bytes_lead_back_to_the_network() {
        for text in ["192.0.2.0/24", "192.0.2.7/32", "0.0.0.0/0", "2001:db8::/32", "::/0", "::1/128"] {
            assert_eq!(network(text).to_string(), text);
            let bytes = postcard::to_allocvec(&network(text)).unwrap();
            assert_eq!(postcard::from_bytes::<Network>(&bytes), Ok(network(text)));
        }
    }
}
