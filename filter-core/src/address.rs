//! Addresses of clients, and the unit by which requests without a key are limited.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Reads an address with its port as Envoy writes it: `192.0.2.1:443`, `[2001:db8::1]:443`. `None` for other bytes, such as the
/// path of a pipe.
#[must_use]
pub fn read(text: &[u8]) -> Option<IpAddr> {
    let address: SocketAddr = std::str::from_utf8(text).ok()?.parse().ok()?;
    Some(address.ip().to_canonical())
}

/// A client without a key: its IPv4 address, or the /64 network of its IPv6 address, because a client usually owns all
/// addresses of such a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client(pub [u8; 16]);

impl Client {
    /// All clients without a known address.
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
    fn addresses_of_both_families_are_read_and_other_text_is_refused() {
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
