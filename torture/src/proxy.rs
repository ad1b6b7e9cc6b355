//! A proxy between an Envoy and the control planes that drops, delays, cuts or corrupts responses on
//! demand.
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
use tokio::task::JoinSet;

const FRAME_HEADER: usize = 9;
const DATA: u8 = 0;

/// Magic bytes of the messages.
const UPDATE: &[u8] = b"PKS1";
const ACK: &[u8] = b"PKA1";
const GRANTS: &[u8] = b"PKG1";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manipulation {
    /// The connection ends before an acknowledgement of usage is forwarded. Answers with allowances are not forwarded.
    LoseAcknowledgements,
    /// The connection ends in the middle of an update.
    CutUpdates,
    /// Updates, acknowledgements and allowances are replaced by other bytes of the same length.
    Corrupt,
}

/// A running proxy. It ends, and all its connections with it, when dropped.
#[derive(Debug)]
pub struct Proxy {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    _listening: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    backends: Vec<SocketAddr>,
    next: AtomicUsize,
    /// The number of a backend that new connections avoid.
    avoided: AtomicUsize,
    manipulation: Mutex<Option<Manipulation>>,
    delay_ms: AtomicU64,
    manipulated: AtomicU64,
}

impl Proxy {
    /// Starts it on a free port in front of these backends.
    pub async fn start(backends: Vec<SocketAddr>, first: usize) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (next, avoided, manipulation) = (AtomicUsize::new(first), AtomicUsize::new(usize::MAX), Mutex::new(None));
        let (delay_ms, manipulated) = (AtomicU64::new(0), AtomicU64::new(0));
        let shared = Arc::new(Shared { backends, next, avoided, manipulation, delay_ms, manipulated });
        let mut _listening = JoinSet::new();
        _listening.spawn(listen(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, _listening })
    }

    pub fn set_manipulation(&self, manipulation: Option<Manipulation>) {
        *self.shared.manipulation.lock().unwrap_or_else(PoisonError::into_inner) = manipulation;
    }

    /// New connections avoid a backend, as behind a load balancer that checks whether backends respond.
    pub fn avoid(&self, backend: Option<usize>) {
        self.shared.avoided.store(backend.unwrap_or(usize::MAX), Ordering::Relaxed);
    }

    pub fn manipulated(&self) -> u64 {
        self.shared.manipulated.load(Ordering::Relaxed)
    }

    /// Sets the delay of every frame of a response.
    pub fn set_delay(&self, delay: Duration) {
        self.shared.delay_ms.store(delay.as_millis().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
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
        let place = (turn + number) % shared.backends.len();
        let Some(backend) = shared.backends.get(place) else { return };
        if place == shared.avoided.load(Ordering::Relaxed) {
            continue;
        }
        let Ok(server) = TcpStream::connect(backend).await else { continue };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let (client_in, client_out) = client.into_split();
        let (server_in, server_out) = server.into_split();
        tokio::select! {
            () = forward_requests(client_in, server_out) => {}
            () = forward_responses(server_in, client_out, &shared) => {}
        }
        return;
    }
}

/// Never returns: a connection ends with its responses, which a server may still send after the last request.
async fn forward_requests(mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
    let _ = tokio::io::copy(&mut from, &mut to).await;
    let _ = to.shutdown().await;
    std::future::pending::<()>().await;
}

/// Returns when the server ends the connection, the client is gone, or a manipulation ends it.
async fn forward_responses(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, shared: &Shared) {
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
        let manipulation = *shared.manipulation.lock().unwrap_or_else(PoisonError::into_inner);
        match manipulation.map(|manipulation| manipulate(manipulation, kind, &mut frame)) {
            None | Some(Forwarded::Unchanged | Forwarded::CorruptedGrants) => {}
            Some(Forwarded::Dropped) => continue,
            Some(Forwarded::Corrupted) => {
                shared.manipulated.fetch_add(1, Ordering::Relaxed);
            }
            Some(Forwarded::Start(bytes)) => {
                shared.manipulated.fetch_add(1, Ordering::Relaxed);
                let _ = to.write_all(&frame[..bytes]).await;
                return;
            }
        }
        if to.write_all(&frame).await.is_err() {
            return;
        }
    }
}

/// The part of a frame that is forwarded.
#[derive(Debug, PartialEq, Eq)]
enum Forwarded {
    Unchanged,
    Corrupted,
    /// These come four times a second, so a fault does not end with the first one.
    CorruptedGrants,
    Dropped,
    Start(usize),
}

fn manipulate(manipulation: Manipulation, kind: u8, frame: &mut [u8]) -> Forwarded {
    let bytes = frame.len();
    let Some((_, data)) = frame.split_at_mut_checked(FRAME_HEADER).filter(|_| kind == DATA) else {
        return Forwarded::Unchanged;
    };
    let (update, ack, grants) = (data.starts_with(UPDATE), data.starts_with(ACK), data.starts_with(GRANTS));
    match manipulation {
        Manipulation::LoseAcknowledgements if grants => Forwarded::Dropped,
        Manipulation::LoseAcknowledgements if ack => Forwarded::Start(0),
        Manipulation::CutUpdates if update => Forwarded::Start(FRAME_HEADER + (bytes - FRAME_HEADER) / 2),
        Manipulation::Corrupt if update || ack || grants => {
            // The magic bytes stay, so that only the checksum shows the corruption.
            for (place, byte) in data.iter_mut().enumerate().skip(UPDATE.len()) {
                *byte = byte.wrapping_mul(31).wrapping_add((place % 251) as u8);
            }
            if grants { Forwarded::CorruptedGrants } else { Forwarded::Corrupted }
        }
        Manipulation::LoseAcknowledgements | Manipulation::CutUpdates | Manipulation::Corrupt => Forwarded::Unchanged,
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
    fn each_manipulation_changes_its_own_messages_and_no_others() {
        let (update, ack, other) = (frame(b"PKS1abcdefgh"), frame(b"PKA1abcdefgh"), frame(b"{\"code\":1}"));
        let grants = frame(b"PKG1abcdefgh");
        for (manipulation, of_update, of_ack, of_grants) in [
            (Manipulation::LoseAcknowledgements, Forwarded::Unchanged, Forwarded::Start(0), Forwarded::Dropped),
            (Manipulation::CutUpdates, Forwarded::Start(15), Forwarded::Unchanged, Forwarded::Unchanged),
            (Manipulation::Corrupt, Forwarded::Corrupted, Forwarded::Corrupted, Forwarded::CorruptedGrants),
        ] {
            assert_eq!(manipulate(manipulation, DATA, &mut update.clone()), of_update);
            assert_eq!(manipulate(manipulation, DATA, &mut ack.clone()), of_ack);
            assert_eq!(manipulate(manipulation, DATA, &mut grants.clone()), of_grants);
            let mut untouched = other.clone();
            assert_eq!(manipulate(manipulation, DATA, &mut untouched), Forwarded::Unchanged);
            assert_eq!(untouched, other);
            // A frame of headers that happens to look like it.
            assert_eq!(manipulate(manipulation, 1, &mut update.clone()), Forwarded::Unchanged);
        }
    }

    #[test]
    fn corruption_keeps_the_frame_and_the_magic_bytes_and_nothing_else() {
        let update = frame(b"PKS1abcdefgh");
        let mut corrupted = update.clone();
        manipulate(Manipulation::Corrupt, DATA, &mut corrupted);
        assert_eq!(corrupted[..FRAME_HEADER + 4], update[..FRAME_HEADER + 4]);
        assert!(corrupted[FRAME_HEADER + 4..].iter().zip(&update[FRAME_HEADER + 4..]).all(|(new, old)| new != old));
    }

    #[tokio::test]
    async fn new_connections_avoid_a_backend_that_is_out() {
        let first = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let second = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let backends = vec![first.local_addr().unwrap(), second.local_addr().unwrap()];
        let proxy = Proxy::start(backends, 0).await.unwrap();
        proxy.avoid(Some(0));
        for _ in 0..3 {
            let _client = TcpStream::connect(proxy.address).await.unwrap();
            second.accept().await.unwrap();
        }
        proxy.avoid(None);
        // Three connections came before, so it is the turn of the second one, and then of the first one.
        for backend in [&second, &first] {
            let _client = TcpStream::connect(proxy.address).await.unwrap();
            backend.accept().await.unwrap();
        }
    }
}
