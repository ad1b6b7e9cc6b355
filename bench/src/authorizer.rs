//! The fastest gRPC authorizer that tonic allows: it does not read a `CheckRequest` and always
//! responds `OK`. It is a process of its own, so that its CPU time does not count as Envoy's.

use std::future::{Ready, ready};
use std::path::PathBuf;

use anyhow::Result;
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::routing::post;
use bytes::Buf;
use clap::Args;
use tokio::net::TcpListener;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::server::{Grpc, UnaryService};
use tonic::{Response, Status};

/// Where to announce its address.
#[derive(Args)]
pub(crate) struct Options {
    /// File to write the bound address to.
    #[arg(long)]
    address_file: PathBuf,
}

/// Serves until it is killed.
pub(crate) async fn serve(options: &Options) -> Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    // Renamed, so that a reader who waits for the file sees all of it.
    let part = options.address_file.with_extension("part");
    std::fs::write(&part, listener.local_addr()?.to_string())?;
    std::fs::rename(part, &options.address_file)?;
    let router = Router::new().route("/envoy.service.auth.v3.Authorization/Check", post(check));
    Ok(axum::serve(listener, router).await?)
}

async fn check(request: Request) -> axum::http::Response<Body> {
    Grpc::new(Unread).unary(Yes, request).await.map(Body::new)
}

/// An empty `CheckResponse`: no status, which is status 0, OK.
struct Yes;

impl UnaryService<()> for Yes {
    type Response = ();
    type Future = Ready<Result<Response<()>, Status>>;

    fn call(&mut self, _: tonic::Request<()>) -> Self::Future {
        ready(Ok(Response::new(())))
    }
}

/// Codec that ignores requests and encodes empty responses.
#[derive(Clone, Copy)]
struct Unread;

impl Codec for Unread {
    type Encode = ();
    type Decode = ();
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Unread {
    type Item = ();
    type Error = Status;

    fn encode(&mut self, (): (), _: &mut EncodeBuf<'_>) -> Result<(), Status> {
        Ok(())
    }
}

impl Decoder for Unread {
    type Item = ();
    type Error = Status;

    fn decode(&mut self, message: &mut DecodeBuf<'_>) -> Result<Option<()>, Status> {
        message.advance(message.remaining());
        Ok(Some(()))
    }
}
