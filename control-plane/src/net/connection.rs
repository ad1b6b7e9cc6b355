//! Connections with time-outs for clients that send no request, or do not read a response. A connection reads what
//! an Envoy sent just before it closed.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::delivery::{RENEWED_BYTES, timed_out};
use super::wait_budget::WaitBudget;

/// Delay before the end of a connection is passed on. An Envoy that ends sends its last report, resets the stream and closes the
/// connection in one step, and hyper drops requests over HTTP/2 that arrive together with the end.
const END_DELAY: Duration = Duration::from_millis(50);

/// One connection, in the clear or within TLS.
#[derive(Debug)]
pub struct Connection<S> {
    stream: S,
    ending: Option<Pin<Box<Sleep>>>,
    silence: Option<(Pin<Box<Sleep>>, FirstRequest)>,
    /// Time in which writes may wait for the client to read.
    writing: WaitBudget,
}

/// Signals that a request has come.
#[derive(Clone, Debug, Default)]
pub struct FirstRequest(Arc<AtomicBool>);

impl FirstRequest {
    /// A request has come.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The address of the other end.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

impl<S> Connection<S> {
    /// A connection that ends unless a request has come before `timeout` is over. Which protocol it speaks is not known
    /// before, so the timers of the protocols do not run yet. It ends, too, if its client lets what is written wait for longer
    /// than that.
    pub fn new(stream: S, timeout: Duration, begun: FirstRequest) -> Self {
        let writing = WaitBudget::new(timeout, RENEWED_BYTES);
        Self { stream, ending: None, silence: Some((Box::pin(tokio::time::sleep(timeout)), begun)), writing }
    }

    /// Passes on the result of a write, or a time-out.
    fn check<T>(
        &mut self,
        cx: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
        bytes: impl FnOnce(&T) -> usize,
    ) -> Poll<io::Result<T>> {
        let written = ready!(self.writing.poll(cx, polled, |written| written.as_ref().map_or(0, bytes)));
        Poll::Ready(written.unwrap_or_else(|| {
            timed_out();
            Err(io::ErrorKind::TimedOut.into())
        }))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some((deadline, begun)) = &mut self.silence {
            if begun.0.load(Ordering::Relaxed) {
                self.silence = None;
            } else if deadline.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        if self.ending.is_none() {
            let before = buf.filled().len();
            let room = buf.remaining() > 0;
            match ready!(Pin::new(&mut self.stream).poll_read(cx, buf)) {
                // TLS without a farewell: the connection broke, or the process at the other end was killed.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
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
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.check(cx, written, |written| *written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.check(cx, written, |written| *written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.check(cx, flushed, |()| 0)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let closed = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.check(cx, closed, |()| 0)
    }
}
