//! Connections as filters need them: what is written leaves at once, and what an Envoy sent just before it ended is still
//! read. A connection on which no request comes in time is ended.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// By how much the end of a connection is told later than it came. An Envoy that ends sends its last report, resets the
/// stream and closes the connection in one go; HTTP/2 as hyper has it drops requests that arrive together with the end.
const END_DELAY: Duration = Duration::from_millis(50);

/// One connection, in the clear or within TLS.
#[derive(Debug)]
pub struct Connection<S> {
    stream: S,
    ending: Option<Pin<Box<Sleep>>>,
    silence: Option<(Pin<Box<Sleep>>, Begun)>,
}

/// Says that a request has come.
#[derive(Clone, Debug, Default)]
pub struct Begun(Arc<AtomicBool>);

impl Begun {
    /// A request has come.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The address of the other end.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

impl<S> Connection<S> {
    /// A connection that ends unless a request has come before `patience` is over. Which protocol it speaks is not known
    /// before, so the timers of the protocols do not run yet.
    pub fn new(stream: S, patience: Duration, begun: Begun) -> Self {
        Self { stream, ending: None, silence: Some((Box::pin(tokio::time::sleep(patience)), begun)) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        if let Some((deadline, begun)) = &mut self.silence {
            if begun.0.load(Ordering::Relaxed) {
                self.silence = None;
            } else if deadline.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(std::io::ErrorKind::TimedOut.into()));
            }
        }
        if self.ending.is_none() {
            let before = buf.filled().len();
            let room = buf.remaining() > 0;
            match ready!(Pin::new(&mut self.stream).poll_read(cx, buf)) {
                // TLS without a farewell: the connection broke, or the process at the other end was killed.
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {}
                read => read?,
            }
            if buf.filled().len() > before || !room {
                return Poll::Ready(Ok(()));
            }
            self.ending = Some(Box::pin(tokio::time::sleep(END_DELAY)));
        }
        match &mut self.ending {
            Some(ending) => ending.as_mut().poll(cx).map(Ok),
            None => Poll::Ready(Ok(())),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
