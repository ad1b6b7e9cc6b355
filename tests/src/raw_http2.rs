//! An HTTP/2 client at the level of frames, which controls its own windows. It answers SETTINGS and
//! PING.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::raw_http::{fields, frame};

/// Frame types (RFC 9113, section 6).
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const GOAWAY: u8 = 7;

const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_STREAM_AND_HEADERS: u8 = 5;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    /// Its stream, 0 for the connection.
    pub stream: u32,
    pub payload: Vec<u8>,
    /// Whether it ends its stream.
    pub ends: bool,
}

/// Connects from a given local address.
pub async fn connect(address: SocketAddr, from: Option<IpAddr>) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    if let Some(from) = from {
        socket.bind(SocketAddr::new(from, 0))?;
    }
    socket.connect(address).await.with_context(|| format!("no connection to {address}"))
}

#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Client {
    /// Connects, with this initial window for each stream.
    pub async fn open(address: SocketAddr, from: Option<IpAddr>, window: u32) -> Result<Self> {
        let mut stream = connect(address, from).await?;
        stream.set_nodelay(true)?;
        let settings = [&4_u16.to_be_bytes()[..], &window.to_be_bytes()].concat();
        let opening = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(SETTINGS, 0, 0, &settings)].concat();
        stream.write_all(&opening).await?;
        Ok(Self { stream, read: Vec::new() })
    }

    /// Requests a path on a new stream. Its number must be odd and higher than those before.
    pub async fn get(&mut self, stream: u32, path: &str, headers: &[(&str, &str)]) -> Result<()> {
        let pseudo = [(":method", "GET"), (":scheme", "http"), (":authority", "api"), (":path", path)];
        let request = frame(HEADERS, END_STREAM_AND_HEADERS, stream, &fields(&[&pseudo, headers].concat()));
        Ok(self.stream.write_all(&request).await?)
    }

    /// Increases the window of a stream, or of the connection for stream 0.
    pub async fn grant(&mut self, stream: u32, bytes: u32) -> Result<()> {
        Ok(self.stream.write_all(&frame(WINDOW_UPDATE, 0, stream, &bytes.to_be_bytes())).await?)
    }

    /// The next frame other than SETTINGS, PING and WINDOW_UPDATE; none after the end of the connection.
    pub async fn next(&mut self) -> Option<Frame> {
        loop {
            let Some((flags, next)) = self.parsed() else {
                let read = self.stream.read_buf(&mut self.read).await;
                if read.ok()? == 0 {
                    return None;
                }
                continue;
            };
            let acknowledged = flags & ACK == ACK;
            match next.kind {
                SETTINGS if !acknowledged => self.stream.write_all(&frame(SETTINGS, ACK, 0, &[])).await.ok()?,
                PING if !acknowledged => self.stream.write_all(&frame(PING, ACK, 0, &next.payload)).await.ok()?,
                SETTINGS | PING | WINDOW_UPDATE => {}
                _ => return Some(next),
            }
        }
    }

    /// A frame that was read, with its flags.
    fn parsed(&mut self) -> Option<(u8, Frame)> {
        let (&[a, b, c, kind, flags, s0, s1, s2, s3], rest) = self.read.split_first_chunk::<9>()?;
        let length = usize::try_from(u32::from_be_bytes([0, a, b, c])).ok()?;
        let payload = rest.get(..length)?.to_vec();
        self.read.drain(..9 + length);
        let ends = [DATA, HEADERS].contains(&kind) && flags & END_STREAM == END_STREAM;
        Some((flags, Frame { kind, stream: u32::from_be_bytes([s0 & 0x7f, s1, s2, s3]), payload, ends }))
    }
}
