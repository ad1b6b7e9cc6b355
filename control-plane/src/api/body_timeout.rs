//! The read time-out for request bodies. It protects against slow uploads.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::error::ApiError;
use crate::net::wait_budget::WaitBudget;

/// The time-out restarts after this number of bytes, so that a large import over a slow connection can finish.
const RENEWED_BYTES: usize = 1 << 20;

/// Answers 408 if a client lets its body wait for longer than the time-out in all. Time in which the body waits for the control
/// plane does not count, as while the keys of an import are written.
pub async fn limit(State(read_timeout): State<Duration>, request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let version = request.version();
    let late = Arc::new(AtomicBool::new(false));
    let left = WaitBudget::new(read_timeout, RENEWED_BYTES);
    let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let request = request.map(|body| Body::new(Timed { body, left, announced, late: Arc::clone(&late) }));
    let response = next.run(request).await;
    if !late.load(Ordering::Relaxed) {
        return response;
    }
    let detail = format!("The body did not arrive within {} seconds.", read_timeout.as_secs());
    let mut response = ApiError::Unreadable(StatusCode::REQUEST_TIMEOUT, detail).into_response();
    if version < Version::HTTP_2 {
        // What is left of the body is not waited for.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

struct Timed {
    body: Body,
    left: WaitBudget,
    /// Bytes that are still to come, if the client said how many there are. Once they are here, the body is whole, whatever
    /// becomes of its stream: an Envoy that ends resets the stream of its last report right behind the last byte. The server still
    /// drops a handler that waits for something else when the reset arrives, such as the look-up of an unknown sync key.
    announced: Option<u64>,
    late: Arc<AtomicBool>,
}

impl HttpBody for Timed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, axum::Error>>> {
        if self.announced == Some(0) {
            return Poll::Ready(None);
        }
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        let length = |frame: &Option<Result<hyper::body::Frame<Bytes>, axum::Error>>| {
            frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()).map_or(0, Bytes::len)
        };
        let Some(frame) = ready!(self.left.poll(cx, polled, length)) else {
            self.late.store(true, Ordering::Relaxed);
            return Poll::Ready(Some(Err(axum::Error::new(std::io::Error::from(std::io::ErrorKind::TimedOut)))));
        };
        let bytes = u64::try_from(length(&frame)).unwrap_or(u64::MAX);
        self.announced = self.announced.map(|left| left.saturating_sub(bytes));
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.announced == Some(0) || self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use hyper::body::Frame;

    use super::*;

    /// A body that gives its pieces and then ends as HTTP/2 does when the client resets the stream.
    struct Reset(VecDeque<&'static [u8]>);

    impl HttpBody for Reset {
        type Data = Bytes;
        type Error = std::io::Error;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
            let piece = self.0.pop_front().map(|piece| Frame::data(Bytes::from_static(piece)));
            Poll::Ready(Some(piece.ok_or_else(|| std::io::ErrorKind::ConnectionReset.into())))
        }
    }

    async fn read(pieces: &[&'static [u8]], announced: Option<u64>) -> Result<Bytes, axum::Error> {
        let left = WaitBudget::new(Duration::from_secs(1), RENEWED_BYTES);
        let body = Body::new(Reset(pieces.iter().copied().collect()));
        let timed = Timed { body, left, announced, late: Arc::default() };
        axum::body::to_bytes(Body::new(timed), usize::MAX).await
    }

    #[tokio::test]
    async fn a_body_is_whole_once_its_announced_bytes_are_here_though_its_stream_is_reset() {
        assert_eq!(read(&[b"rep", b"ort"], Some(6)).await.unwrap(), &b"report"[..]);
        assert_eq!(read(&[], Some(0)).await.unwrap(), &b""[..]);
        assert!(read(&[b"rep"], Some(6)).await.is_err());
        assert!(read(&[b"report"], None).await.is_err());
    }
}
