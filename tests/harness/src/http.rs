//! An HTTP client for one connection at a time, with requests of any shape: header bytes that are
//! not text, repeated headers, keys of many kilobytes.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::client::conn::http2;
use hyper::http::request::Builder;
use hyper::{HeaderMap, Method, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::net::TcpStream;

/// Time limit of a response. Only held polls take longer.
pub const TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    /// A header that occurs once and is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut all = self.headers.get_all(name).iter();
        let first = all.next()?.to_str().ok()?;
        all.next().is_none().then_some(first)
    }

    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body)
            .with_context(|| format!("{} with a body that is no JSON: {:?}", self.status, self.body))
    }
}

pub type OutgoingBody = Full<Bytes>;

pub type Outgoing = Request<OutgoingBody>;

#[derive(Debug)]
pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
    authority: String,
}

impl Connection {
    pub async fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await.with_context(|| format!("nobody listens at {address}"))?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Self { sender, authority: address.to_string() })
    }

    /// Whether the server has not closed it, as far as is known.
    pub fn is_open(&self) -> bool {
        !self.sender.is_closed()
    }

    /// Sends a request and waits for the whole response.
    pub async fn send(&mut self, mut request: Outgoing) -> Result<Reply> {
        // A request may name another host.
        if !request.headers().contains_key("host") {
            request.headers_mut().insert("host", self.authority.parse()?);
        }
        let exchange = async {
            self.sender.ready().await?;
            whole(self.sender.send_request(request).await?).await
        };
        let reply = tokio::time::timeout(TIMEOUT, exchange);
        Ok(reply.await.map_err(|_| anyhow!("{} does not answer", self.authority))??)
    }

    pub async fn get(&mut self, path: &str, key: Option<&str>) -> Result<Reply> {
        self.send(get_request(path, key)?).await
    }
}

/// A `GET` with a key, if one is given.
pub fn get_request(path: &str, key: Option<&str>) -> Result<Outgoing> {
    Ok(with_key(Request::get(path), key).body(Full::default())?)
}

/// Adds a key to a request, if one is given.
pub fn with_key(request: Builder, key: Option<&str>) -> Builder {
    match key {
        Some(key) => request.header("x-api-key", key),
        None => request,
    }
}

/// Waits for the body.
pub async fn whole(response: Response<Incoming>) -> hyper::Result<Reply> {
    let (head, body) = response.into_parts();
    Ok(Reply { status: head.status.as_u16(), headers: head.headers, body: body.collect().await?.to_bytes() })
}

/// One `GET` on a connection of its own.
pub async fn get(address: SocketAddr, path: &str) -> Result<Reply> {
    Connection::open(address).await?.get(path, None).await
}

/// One request on a connection of its own.
pub async fn send(address: SocketAddr, request: Outgoing) -> Result<Reply> {
    Connection::open(address).await?.send(request).await
}

/// One HTTP/2 connection, for any number of requests at once.
#[derive(Debug)]
pub struct Http2Connection<B>(http2::SendRequest<B>);

impl<B> Http2Connection<B>
where
    B: hyper::body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    pub async fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await.with_context(|| format!("nobody listens at {address}"))?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Self(sender))
    }

    /// Sends a request, whose URI names the authority, and waits for the whole response.
    pub async fn send(&self, request: Request<B>) -> Result<Reply> {
        let mut sender = self.0.clone();
        let exchange = async {
            sender.ready().await?;
            whole(sender.send_request(request).await?).await
        };
        let reply = tokio::time::timeout(TIMEOUT, exchange);
        Ok(reply.await.context("the server does not answer")??)
    }
}

/// One request over HTTP/2, on a connection of its own. Its URI names the authority.
pub async fn over_http_2<B>(address: SocketAddr, request: Request<B>) -> Result<Reply>
where
    B: hyper::body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    Http2Connection::open(address).await?.send(request).await
}

/// One JSON request on a connection of its own.
pub async fn send_json(
    address: SocketAddr,
    method: Method,
    path: &str,
    key: Option<&str>,
    body: Option<&Value>,
) -> Result<Reply> {
    let request = with_key(Request::builder().method(method).uri(path), key);
    let request = match body {
        None => request.body(Full::default())?,
        Some(body) => request.header("content-type", "application/json").body(body.to_string().into())?,
    };
    send(address, request).await
}
