//! The address of a client: what Envoy says of it comes in (`192.0.2.1:443`, `[2001:db8::1]:443`), the address goes out, and
//! what limits are counted by where there is no key.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Reads an address with its port, as Envoy writes it. Any bytes; `None` for what is no address, such as a pipe.
#[must_use]
pub fn read(text: &[u8]) -> Option<IpAddr> {
    let address: SocketAddr = std::str::from_utf8(text).ok()?.parse().ok()?;
    Some(address.ip().to_canonical())
}

/// A client without a key: its IPv4 address, or the network of 64 bits that its IPv6 address is in, since whoever has one
/// address of such a network has all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client(pub [u8; 16]);

impl Client {
    /// All clients whose address Envoy does not tell.
    pub const UNKNOWN: Self = Self([0; 16]);

    /// The client at an address.
    #[must_use]
    pub const fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self(address.to_ipv6_mapped().octets()),
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Self(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).octets())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_are_read_with_their_ports_and_anything_else_is_no_address() {
        let seen = |text: &str| read(text.as_bytes()).map(|address| address.to_string());
        assert_eq!(seen("192.0.2.1:0").as_deref(), Some("192.0.2.1"));
        assert_eq!(seen("[2001:db8::1]:65535").as_deref(), Some("2001:db8::1"));
        assert_eq!(seen("[::ffff:192.0.2.1]:80").as_deref(), Some("192.0.2.1"));
        for text in ["", "192.0.2.1", "2001:db8::1", "/tmp/socket", "192.0.2.1:65536", "envoy://internal"] {
            assert_eq!(seen(text), None, "{text}");
        }
        assert_eq!(read(b"\xff\xfe"), None);
    }

    #[test]
    fn a_client_is_an_address_or_a_network_of_64_bits() {
        let client = |text: &str| Client::of(text.parse().unwrap());
        assert_ne!(client("192.0.2.1"), client("192.0.2.2"));
        assert_eq!(client("192.0.2.1"), client("::ffff:192.0.2.1"));
        assert_eq!(client("2001:db8::1"), client("2001:db8::ffff:1:2:3"));
        assert_ne!(client("2001:db8::1"), client("2001:db8:0:1::1"));
    }
}
