//! An HTTP client over TLS, with a chosen authority, client certificate and ALPN protocols.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::certificates::Identity;
use crate::http::{Outgoing, Reply, TIMEOUT, whole};

#[derive(Clone, Debug)]
pub struct Client(Arc<ClientConfig>);

impl Client {
    /// A client that trusts this authority (in PEM), presents this certificate, and offers these protocols.
    pub fn new(authority: &str, identity: Option<&Identity>, protocols: &[&str]) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.as_bytes())?)?;
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some(Identity { certificate, key }) => builder.with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(certificate.as_bytes())?],
                PrivateKeyDer::from_pem_slice(key.as_bytes())?,
            )?,
        };
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        Ok(Self(Arc::new(config)))
    }

    /// Sends one request on a new connection to the server of this name. Returns the protocol too.
    pub async fn send(&self, address: SocketAddr, name: &str, request: Outgoing) -> Result<(Reply, &'static str)> {
        tokio::time::timeout(TIMEOUT, self.exchange(address, name, request)).await.context("no answer")?
    }

    pub fn speaking(&self, protocols: &[&str]) -> Self {
        let mut config = ClientConfig::clone(&self.0);
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        Self(Arc::new(config))
    }

    /// A new connection to the server of this name.
    pub async fn connect(&self, address: SocketAddr, name: &str) -> Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::try_from(name.to_owned())?;
        Ok(TlsConnector::from(Arc::clone(&self.0)).connect(name, stream).await?)
    }

    async fn exchange(
        &self,
        address: SocketAddr,
        authority: &str,
        mut request: Outgoing,
    ) -> Result<(Reply, &'static str)> {
        let stream = self.connect(address, authority).await?;
        let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let io = TokioIo::new(stream);
        let response = if http2 {
            let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
            *request.uri_mut() = format!("https://{authority}{path}").parse()?;
            let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
            tokio::spawn(connection);
            sender.send_request(request).await?
        } else {
            request.headers_mut().insert("host", authority.parse()?);
            let (mut sender, connection) = http1::handshake(io).await?;
            tokio::spawn(connection);
            sender.send_request(request).await?
        };
        Ok((whole(response).await?, if http2 { "h2" } else { "http/1.1" }))
    }
}
