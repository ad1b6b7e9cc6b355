//! Bytes on a socket, for requests that no HTTP library sends, and as much of the responses as can
//! be parsed.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Silence after which the response counts as complete. Longer than any time limit that is tested.
const QUIET: Duration = Duration::from_secs(30);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    pub bytes: Vec<u8>,
    /// Whether the server closed the connection.
    pub closed: bool,
}

impl Heard {
    /// The statuses of the HTTP/1 responses, in their order.
    pub fn statuses(&self) -> Vec<u16> {
        let text = String::from_utf8_lossy(&self.bytes);
        let after = |line: &str| line.strip_prefix("HTTP/1.1 ")?.split(' ').next()?.parse().ok();
        // A body without an end of line may stand before the next answer.
        text.match_indices("HTTP/1.1 ").filter_map(|(at, _)| after(text.get(at..)?)).collect()
    }

    /// The body of the first HTTP/1 response with a length.
    pub fn body(&self) -> String {
        let text = String::from_utf8_lossy(&self.bytes);
        text.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned()
    }
}

/// Sends the bytes and reads until this number of responses has come, the connection ends or the server is silent. 0 stands
/// for HTTP/2, where any frame is enough.
pub async fn say(address: SocketAddr, bytes: &[u8], answers: usize) -> Result<Heard> {
    let mut stream = TcpStream::connect(address).await.with_context(|| format!("nobody listens at {address}"))?;
    stream.set_nodelay(true)?;
    let (mut reader, mut writer) = stream.split();
    let mut heard = Heard { bytes: Vec::new(), closed: false };
    let hear = async {
        let mut piece = [0; 8_192];
        loop {
            match tokio::time::timeout(QUIET, reader.read(&mut piece)).await {
                Err(_) => return,
                Ok(Ok(0) | Err(_)) => {
                    heard.closed = true;
                    return;
                }
                Ok(Ok(read)) => heard.bytes.extend(piece.get(..read).unwrap_or_default()),
            }
            let enough = match answers {
                // HTTP/2: headers, a reset or the farewell.
                0 => frames(&heard.bytes).iter().any(|(kind, ..)| [1, 3, 7].contains(kind)),
                answers => complete(&heard.bytes) >= answers,
            };
            if enough {
                return;
            }
        }
    };
    // A server that refuses early stops reading.
    let (_, ()) = tokio::join!(writer.write_all(bytes), hear);
    Ok(heard)
}

/// The number of complete HTTP/1 responses that have a length or no body.
fn complete(bytes: &[u8]) -> usize {
    let text = String::from_utf8_lossy(bytes);
    let (mut rest, mut found) = (&*text, 0);
    while let Some((head, body)) = rest.split_once("\r\n\r\n") {
        let length =
            head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:").map(str::to_owned));
        let length: usize = length.and_then(|length| length.trim().parse().ok()).unwrap_or_default();
        let Some(next) = body.get(length..) else { break };
        rest = next;
        found += 1;
    }
    found
}

/// One frame of HTTP/2 (RFC 9113, section 4.1).
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or_default().to_be_bytes();
    let [_, length @ ..] = length;
    [&length[..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Header fields as literals without indexing or compression (RFC 7541, section 6.2.2), each of up to 126 bytes.
pub fn fields(all: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in all {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap_or_default() & 0x7f);
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

/// The start of an HTTP/2 connection: preface and empty SETTINGS.
pub fn opening() -> Vec<u8> {
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(4, 0, 0, &[])].concat()
}

/// The frames in bytes: kind, flags, stream and payload.
pub fn frames(mut bytes: &[u8]) -> Vec<(u8, u8, u32, Vec<u8>)> {
    let mut all = Vec::new();
    while let Some((&[a, b, c, kind, flags, s0, s1, s2, s3], rest)) = bytes.split_first_chunk::<9>() {
        let length = usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap_or_default();
        let Some(payload) = rest.get(..length) else { break };
        all.push((kind, flags, u32::from_be_bytes([s0, s1, s2, s3]), payload.to_vec()));
        bytes = rest.get(length..).unwrap_or_default();
    }
    all
}
