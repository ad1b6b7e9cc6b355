//! Delivery of responses over HTTP/2: a response that its client does not take within the read time-out ends.
//!
//! A client may answer PINGs and still grant a stream no flow-control window. Neither hyper nor h2 has a time-out for that.
//! So each stream's task counts the bytes of its response that the connection has not written yet. A stream without progress
//! is reset. Over HTTP/1.1 a response waits for the socket only, where [`crate::net::connection`] has the time-out.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::response::Response;
use bytes::Buf;
use hyper::body::{Frame, SizeHint};
use hyper::rt::Executor;
use tokio::sync::{Notify, watch};

/// Bytes that a client must take within the read time-out. Each time, the time-out begins anew.
pub(super) const RENEWED_BYTES: usize = 64 * 1_024;

/// Larger responses send their end only after the client took all of their data: until then the stream can be reset by
/// itself. For smaller ones this would cost a frame each; such a response that is not taken ends its connection. A proxy that
/// multiplexes many clients grants more than this from the start (RFC 9113, section 6.9.2): none of them can end it.
const SMALL_BYTES: usize = 16 * 1_024;

tokio::task_local! {
    /// The delivery of the stream whose task runs.
    static DELIVERY: Arc<Delivery>;
}

/// One response: how much of it the connection has not written.
#[derive(Debug, Default)]
struct Delivery {
    progress: watch::Sender<Progress>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    unwritten: usize,
    written: usize,
}

impl Delivery {
    fn add(&self, bytes: usize) {
        self.progress.send_if_modified(|progress| {
            let begins = progress.unwritten == 0 && bytes > 0;
            progress.unwritten = progress.unwritten.saturating_add(bytes);
            begins
        });
    }

    fn remove(&self, bytes: usize) {
        self.progress.send_if_modified(|progress| {
            progress.unwritten = progress.unwritten.saturating_sub(bytes);
            progress.written = progress.written.saturating_add(bytes);
            progress.unwritten == 0 && bytes > 0
        });
    }

    fn unwritten(&self) -> usize {
        self.progress.borrow().unwritten
    }

    /// Returns when the connection has written everything that it was given.
    async fn written(&self) {
        // The sender is in `self`.
        let _ = self.progress.subscribe().wait_for(|progress| progress.unwritten == 0).await;
    }

    /// Returns when the client keeps the response waiting for longer than `timeout`.
    async fn stalled(&self, timeout: Duration) {
        let mut progress = self.progress.subscribe();
        loop {
            let Ok(begun) = progress.wait_for(|progress| progress.unwritten > 0).await.map(|now| now.written) else {
                return;
            };
            let late = tokio::time::timeout(timeout, self.written()).await.is_err();
            if late && self.progress.borrow().written.saturating_sub(begun) < RENEWED_BYTES {
                return;
            }
        }
    }
}

/// Data of a response that reports to its `Delivery` what has been written.
#[derive(Debug)]
pub struct Tracked {
    bytes: Bytes,
    delivery: Option<Arc<Delivery>>,
}

impl Buf for Tracked {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        if let Some(delivery) = &self.delivery {
            delivery.remove(count);
        }
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if let Some(delivery) = &self.delivery {
            delivery.remove(self.bytes.remaining());
        }
    }
}

/// The body of a response on its way to the client.
pub struct DeliveredBody {
    body: Body,
    delivery: Option<Arc<Delivery>>,
    /// Waits until a large body's data is written, before its end is sent.
    written: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

/// Puts a response under the time-out of the stream whose task runs, if it is one of HTTP/2.
pub fn deliver(response: Response) -> axum::http::Response<DeliveredBody> {
    let delivery = DELIVERY.try_with(Arc::clone).ok();
    response.map(|body| DeliveredBody { body, delivery, written: None })
}

impl HttpBody for DeliveredBody {
    type Data = Tracked;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Tracked>, axum::Error>>> {
        if let Some(written) = &mut self.written {
            ready!(written.as_mut().poll(cx));
            self.written = None;
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let delivery = self.delivery.clone();
        let large =
            frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()).map_or(0, Bytes::len) > SMALL_BYTES;
        if let Some(delivery) = delivery.clone().filter(|_| large) {
            self.written = Some(Box::pin(async move { delivery.written().await }));
        }
        Poll::Ready(frame.map(|frame| {
            frame.map(|frame| {
                frame.map_data(|bytes| {
                    if let Some(delivery) = &delivery {
                        delivery.add(bytes.len());
                    }
                    Tracked { bytes, delivery }
                })
            })
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.written.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The streams of one connection over HTTP/2.
#[derive(Debug, Default)]
pub struct Streams {
    counts: watch::Sender<StreamCounts>,
    stuck: Notify,
}

/// Streams that began, and those of them that have not ended. A stream can begin and end before a waiting task runs, so the
/// number of open streams alone does not say whether there was one.
#[derive(Clone, Copy, Debug, Default)]
struct StreamCounts {
    begun: u64,
    open: usize,
}

impl Streams {
    /// Returns when there has been no stream for so long since the last one. Before the first stream it does not return.
    pub async fn idle(&self, timeout: Duration) {
        let mut counts = self.counts.subscribe();
        loop {
            let Ok(begun) = counts.wait_for(|now| now.begun > 0 && now.open == 0).await.map(|now| now.begun) else {
                return;
            };
            if tokio::time::timeout(timeout, counts.wait_for(|now| now.begun != begun)).await.is_err() {
                return;
            }
        }
    }

    /// Returns when a response is stuck that cannot be reset by itself any more, so that the connection has to end.
    pub async fn stuck(&self) {
        self.stuck.notified().await;
    }

    async fn run(&self, stream: impl Future, timeout: Duration) {
        self.counts.send_modify(|now| {
            now.begun = now.begun.wrapping_add(1);
            now.open = now.open.saturating_add(1);
        });
        let _open = Closing(&self.counts);
        let delivery: Arc<Delivery> = Arc::default();
        {
            let mut stream = pin!(DELIVERY.scope(Arc::clone(&delivery), stream));
            tokio::select! {
                _ = stream.as_mut() => {}
                // Dropped, h2 resets it and forgets its data.
                () = delivery.stalled(timeout) => return timed_out(),
            }
        }
        if delivery.unwritten() == 0 {
            return;
        }
        tokio::select! {
            () = delivery.written() => {}
            () = delivery.stalled(timeout) => {
                timed_out();
                self.stuck.notify_one();
            }
        }
    }
}

pub(super) fn timed_out() {
    metrics::counter!("portcullis_responses_timed_out_total").increment(1);
}

/// Counts a stream as ended when dropped.
struct Closing<'a>(&'a watch::Sender<StreamCounts>);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|now| now.open = now.open.saturating_sub(1));
    }
}

/// Runs the streams of one connection, each with the time-out.
#[derive(Clone, Debug)]
pub struct StreamExecutor {
    /// Where they are counted.
    pub streams: Arc<Streams>,
    /// How long a client may keep a response waiting.
    pub timeout: Duration,
}

impl<F> Executor<F> for StreamExecutor
where
    F: Future + Send + 'static,
{
    fn execute(&self, stream: F) {
        let Self { streams, timeout } = self.clone();
        tokio::spawn(async move { streams.run(stream, timeout).await });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_whose_stream_ended_before_anything_waited_becomes_idle() {
        let streams = Streams::default();
        streams.run(async {}, Duration::from_secs(60)).await;
        let idle = streams.idle(Duration::from_millis(10));
        assert!(tokio::time::timeout(Duration::from_secs(60), idle).await.is_ok());
    }

    #[tokio::test]
    async fn a_connection_with_an_open_stream_is_not_idle() {
        let streams = Streams::default();
        let open = streams.run(std::future::pending::<()>(), Duration::from_secs(60));
        let idle = tokio::time::timeout(Duration::from_millis(300), streams.idle(Duration::from_millis(10)));
        tokio::select! {
            () = open => unreachable!("the stream is pending"),
            idle = idle => assert!(idle.is_err()),
        }
    }
}
