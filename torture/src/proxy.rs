//! A proxy between an Envoy and the control planes, which on demand drops, delays, cuts or corrupts
//! responses.
//!
//! It parses HTTP/2 only down to frame boundaries (RFC 9113, section 4.1), and recognises messages
//! by their magic bytes, so that it can corrupt an update inside valid frames.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

const FRAME_HEADER: usize = 9;
const DATA: u8 = 0;

/// Magic bytes of the messages.
const UPDATE: &[u8] = b"PKS1";
const ACK: &[u8] = b"PKA1";

/// Manipulation of responses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mischief {
    /// The connection ends before an acknowledgement is forwarded.
    LoseAcknowledgements,
    /// The connection ends in the middle of an update.
    CutUpdates,
    /// Pages and acknowledgements are replaced by other bytes of the same length.
    Spoil,
}

/// A running proxy. It ends, and all its connections with it, when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    listening: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    backends: Vec<SocketAddr>,
    next: AtomicUsize,
    mischief: Mutex<Option<Mischief>>,
    delay_ms: AtomicU64,
    done: AtomicU64,
}

impl Proxy {
    /// Starts it on a free port in front of these backends.
    pub async fn start(backends: Vec<SocketAddr>, first: usize) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (next, delay_ms, done) = (AtomicUsize::new(first), AtomicU64::new(0), AtomicU64::new(0));
        let shared = Arc::new(Shared { backends, next, mischief: Mutex::new(None), delay_ms, done });
        let listening = tokio::spawn(listen(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, listening })
    }

    /// Its address.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sets the manipulation of all matching responses.
    pub fn set_mischief(&self, mischief: Option<Mischief>) {
        *self.shared.mischief.lock().unwrap_or_else(PoisonError::into_inner) = mischief;
    }

    /// The number of manipulated responses.
    pub fn done(&self) -> u64 {
        self.shared.done.load(Ordering::Relaxed)
    }

    /// Sets the delay of every frame of a response.
    pub fn set_delay(&self, delay: Duration) {
        self.shared.delay_ms.store(delay.as_millis().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                connections.spawn(connection(client, Arc::clone(&shared)));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Forwards one connection to the backends in turn, skipping those that refuse it.
async fn connection(client: TcpStream, shared: Arc<Shared>) {
    let turn = shared.next.fetch_add(1, Ordering::Relaxed);
    for number in 0..shared.backends.len() {
        let Some(backend) = shared.backends.get((turn + number) % shared.backends.len()) else { return };
        let Ok(server) = TcpStream::connect(backend).await else { continue };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let (client_in, client_out) = client.into_split();
        let (server_in, server_out) = server.into_split();
        tokio::select! {
            () = there(client_in, server_out) => {}
            () = back(server_in, client_out, &shared) => {}
        }
        return;
    }
}

async fn there(mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
    let _ = tokio::io::copy(&mut from, &mut to).await;
    let _ = to.shutdown().await;
    // What the server still has to say is passed on, as TCP would.
    tokio::time::sleep(Duration::from_millis(500)).await;
}

async fn back(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, shared: &Shared) {
    loop {
        let mut frame = vec![0; FRAME_HEADER];
        if from.read_exact(&mut frame).await.is_err() {
            let _ = to.shutdown().await;
            return;
        }
        let (length, kind) = match frame[..] {
            [high, middle, low, kind, ..] => (u32::from_be_bytes([0, high, middle, low]) as usize, kind),
            _ => return,
        };
        frame.resize(FRAME_HEADER + length, 0);
        if from.read_exact(&mut frame[FRAME_HEADER..]).await.is_err() {
            return;
        }
        let delay = shared.delay_ms.load(Ordering::Relaxed);
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        let mischief = *shared.mischief.lock().unwrap_or_else(PoisonError::into_inner);
        match mischief.map(|mischief| applied(mischief, kind, &mut frame)) {
            None | Some(Passed::Whole) => {}
            Some(Passed::Spoilt) => {
                shared.done.fetch_add(1, Ordering::Relaxed);
            }
            Some(Passed::First(bytes)) => {
                shared.done.fetch_add(1, Ordering::Relaxed);
                let _ = to.write_all(&frame[..bytes]).await;
                return;
            }
        }
        if to.write_all(&frame).await.is_err() {
            return;
        }
    }
}

/// What becomes of a frame.
#[derive(Debug, PartialEq, Eq)]
enum Passed {
    Whole,
    Spoilt,
    First(usize),
}

fn applied(mischief: Mischief, kind: u8, frame: &mut [u8]) -> Passed {
    let bytes = frame.len();
    let Some((_, data)) = frame.split_at_mut_checked(FRAME_HEADER).filter(|_| kind == DATA) else {
        return Passed::Whole;
    };
    let (update, ack) = (data.starts_with(UPDATE), data.starts_with(ACK));
    match mischief {
        Mischief::LoseAcknowledgements if ack => Passed::First(0),
        Mischief::CutUpdates if update => Passed::First(FRAME_HEADER + (bytes - FRAME_HEADER) / 2),
        Mischief::Spoil if update || ack => {
            // The mark stays, so that the checksum has to find it out.
            for (place, byte) in data.iter_mut().enumerate().skip(UPDATE.len()) {
                *byte = byte.wrapping_mul(31).wrapping_add((place % 251) as u8);
            }
            Passed::Spoilt
        }
        Mischief::LoseAcknowledgements | Mischief::CutUpdates | Mischief::Spoil => Passed::Whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(data: &[u8]) -> Vec<u8> {
        let mut frame = vec![0, 0, data.len() as u8, DATA, 0, 0, 0, 0, 1];
        frame.extend(data);
        frame
    }

    #[test]
    fn each_mischief_is_done_to_the_messages_that_it_means_and_to_no_others() {
        let (update, ack, other) = (frame(b"PKS1abcdefgh"), frame(b"PKA1abcdefgh"), frame(b"{\"code\":1}"));
        for (mischief, of_update, of_ack) in [
            (Mischief::LoseAcknowledgements, Passed::Whole, Passed::First(0)),
            (Mischief::CutUpdates, Passed::First(15), Passed::Whole),
            (Mischief::Spoil, Passed::Spoilt, Passed::Spoilt),
        ] {
            assert_eq!(applied(mischief, DATA, &mut update.clone()), of_update);
            assert_eq!(applied(mischief, DATA, &mut ack.clone()), of_ack);
            let mut untouched = other.clone();
            assert_eq!(applied(mischief, DATA, &mut untouched), Passed::Whole);
            assert_eq!(untouched, other);
            // A frame of headers that happens to look like it.
            assert_eq!(applied(mischief, 1, &mut update.clone()), Passed::Whole);
        }
    }

    #[test]
    fn garbage_keeps_the_frame_and_the_mark_and_nothing_else() {
        let update = frame(b"PKS1abcdefgh");
        let mut spoilt = update.clone();
        applied(Mischief::Spoil, DATA, &mut spoilt);
        assert_eq!(spoilt[..FRAME_HEADER + 4], update[..FRAME_HEADER + 4]);
        assert!(spoilt[FRAME_HEADER + 4..].iter().zip(&update[FRAME_HEADER + 4..]).all(|(new, old)| new != old));
    }
}
