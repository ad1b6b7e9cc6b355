//! Ports for processes that listen again on the same port after a restart.
//!
//! The operating system chooses ports from its range for outgoing connections. While the listening
//! process is down, the system may give its port to a connection of another test, and Envoy lets two
//! processes listen on one port. These ports are outside of that range, and no two test programs
//! reserve the same one.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use anyhow::{Result, anyhow, bail};

/// Below the ports that Linux (from 32768) and macOS (from 49152) give to outgoing connections, and above those that
/// `cargo xtask up` uses.
const FIRST: u16 = 12_000;
const NUMBER: u16 = 20_000;

/// Any free port of this machine.
pub const LOCAL: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// A port that is reserved until this is dropped.
#[derive(Debug)]
pub struct Port {
    address: SocketAddr,
    /// The kernel gives a UDP port to one program at a time. Nothing here uses UDP for anything else.
    _reservation: UdpSocket,
}

impl Port {
    /// Reserves a port of this address on which no process listens.
    pub fn reserve(ip: IpAddr) -> Result<Self> {
        for _ in 0..1_000 {
            let mut random = [0; 2];
            getrandom::fill(&mut random).map_err(|error| anyhow!("no randomness: {error}"))?;
            let address = SocketAddr::from((ip, FIRST + u16::from_ne_bytes(random) % NUMBER));
            let Ok(reservation) = UdpSocket::bind(address) else { continue };
            if TcpListener::bind(address).is_ok() {
                return Ok(Self { address, _reservation: reservation });
            }
        }
        bail!("no port of {ip} from {FIRST} on is free")
    }

    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_free_and_stays_reserved_until_it_is_dropped() {
        let port = Port::reserve(LOCAL.ip()).unwrap();
        let address = port.address();
        assert!((FIRST..FIRST + NUMBER).contains(&address.port()));
        drop(TcpListener::bind(address).unwrap());
        assert!(UdpSocket::bind(address).is_err());
        drop(port);
        assert!(UdpSocket::bind(address).is_ok());
    }
}
