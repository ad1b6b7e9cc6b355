//! Connections of clients: how many there may be, and how long each may wait for its client.

pub mod admission;
pub mod connection;
pub mod delivery;
pub mod wait_budget;

use std::net::IpAddr;

/// The address of a client: an IPv4 address, or a /64 of IPv6, within which a client chooses addresses freely.
pub(crate) fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() >> 64 << 64).into()),
        IpAddr::V4(address) => IpAddr::V4(address),
    }
}
