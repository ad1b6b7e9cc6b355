//! `cargo xtask up --upstream`: Envoy in front of the user's own service, given by URL.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use portcullis_tests::certificates::{Authority, For, Identity};
use portcullis_tests::control_plane::fresh_key;
use portcullis_tests::demo::DemoApi;
use portcullis_tests::envoy::{Envoy, Settings};
use portcullis_tests::envoy_config::Replacements;
use portcullis_tests::fake_control_plane::{FakeControlPlane, Faults};
use portcullis_tests::filter_harness::record;
use portcullis_tests::http::{Reply, send};
use portcullis_tests::log::Log;
use portcullis_tests::service::Service;
use portcullis_tests::tools::silently;
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// An Envoy in front of a service, with one key.
struct Protected {
    envoy: Envoy,
    _control_plane: FakeControlPlane,
    _home: TempDir,
}

impl Protected {
    async fn start(service: Service) -> Result<Self> {
        let home = TempDir::with_prefix("portcullis-")?;
        let control_plane = FakeControlPlane::start(&[("good", record(1))], Faults::default()).await?;
        let nowhere = SocketAddr::from((HERE, 9));
        let replacements = Replacements {
            service: Some(service),
            plugin: json!({"policies": {"open": {"key": "anonymous_allowed"}}}).as_object().cloned().context("JSON")?,
            routes: vec![("/open".into(), "open".into())],
            ..Replacements::between(control_plane.address(), nowhere)
        };
        let settings = Settings::new(replacements, fresh_key()?);
        let log = Log::create(&home.path().join("envoy.log"))?;
        let envoy = Envoy::start(settings, &home.path().join("envoy"), log, &silently).await?;
        let keys = async || (envoy.stat("wasmcustom.portcullis_keys").await.ok()? == 1).then_some(());
        eventually("Envoy to have the key", keys).await?;
        Ok(Self { envoy, _control_plane: control_plane, _home: home })
    }

    async fn get(&self, path: &str, key: &str) -> Result<Reply> {
        let request = Request::get(path).header("x-api-key", key).header("x-forwarded-host", "forged.example");
        send(self.envoy.address(), request.body(Full::default())?).await
    }

    /// What the service received of a request with the key, whole.
    async fn received(&self, path: &str) -> Result<Value> {
        let reply = self.get(path, "good").await?;
        assert_eq!(reply.status, 200, "{reply:?}");
        Ok(reply.json()?["headers"].take())
    }
}

#[tokio::test]
async fn a_service_is_reached_by_name_or_address_and_is_called_by_its_own_name() -> Result<()> {
    let v4 = DemoApi::start(SocketAddr::from((HERE, 0))).await?;
    let mut services = vec![format!("localhost:{}", v4.address().port()), v4.address().to_string()];
    // Not every machine has IPv6.
    let v6 = DemoApi::start(SocketAddr::from((Ipv6Addr::LOCALHOST, 0))).await.ok();
    services.extend(v6.iter().map(|v6| v6.address().to_string()));
    for authority in services {
        let protected = Protected::start(Service::parse(&format!("http://{authority}")).map_err(anyhow::Error::msg)?);
        let protected = protected.await?;
        for path in ["/", "/open/a?b=1"] {
            let headers = protected.received(path).await?;
            assert_eq!(headers["host"], json!([authority]), "{path}");
            // The name that the client called, and not the header that it sent.
            assert_eq!(headers["x-forwarded-host"], json!([protected.envoy.address().to_string()]), "{path}");
            assert_eq!(headers["x-api-key"], Value::Null);
            assert_eq!(headers["x-consumer-id"].as_array().map(Vec::len), Some(1));
        }
        assert_eq!(protected.get("/", "no such key").await?.status, 401);
    }
    Ok(())
}

/// A service that speaks TLS and answers with the headers that it received. Ends with the runtime.
async fn secure_service(identity: &Identity) -> Result<u16> {
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(identity.certificate.as_bytes())?],
            PrivateKeyDer::from_pem_slice(identity.key.as_bytes())?,
        )?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind((HERE, 0)).await?;
    let port = listener.local_addr()?.port();
    let answer = |request: Request<Incoming>| async move {
        let text = |value: &hyper::header::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        let headers: Value =
            request.headers().iter().map(|(name, value)| (name.to_string(), json!([text(value)]))).collect();
        Ok::<_, std::convert::Infallible>(Response::new(Full::<axum::body::Bytes>::from(
            json!({"headers": headers}).to_string(),
        )))
    };
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // Clients that do not trust the certificate close the connection.
                if let Ok(stream) = acceptor.accept(stream).await {
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)).await;
                }
            });
        }
    });
    Ok(port)
}

#[tokio::test]
async fn a_service_with_tls_is_called_only_if_its_certificate_is_good() -> Result<()> {
    let authority = Authority::new("own")?;
    let home = TempDir::with_prefix("portcullis-")?;
    let file = home.path().join("ca.pem");
    std::fs::write(&file, &authority.certificate)?;
    let others = home.path().join("others.pem");
    std::fs::write(&others, Authority::new("others")?.certificate)?;
    let good = secure_service(&authority.issue(&["localhost"], For::Servers)?).await?;
    let misnamed = secure_service(&authority.issue(&["other.example"], For::Servers)?).await?;
    let by_address = secure_service(&authority.issue(&["127.0.0.1"], For::Servers)?).await?;
    for (authority, trusted, reached) in [
        (format!("localhost:{good}"), &file, true),
        (format!("127.0.0.1:{by_address}"), &file, true),
        (format!("localhost:{misnamed}"), &file, false),
        (format!("localhost:{good}"), &others, false),
    ] {
        let service = Service::parse(&format!("https://{authority}"));
        let service =
            service.and_then(|service| service.trusting(Some(trusted.clone()))).map_err(anyhow::Error::msg)?;
        let protected = Protected::start(service).await?;
        if reached {
            assert_eq!(protected.received("/").await?["host"], json!([authority]));
        } else {
            let reply = protected.get("/", "good").await?;
            assert_eq!(reply.status, 503, "{reply:?}");
            let failed: u64 =
                protected.envoy.stats("cluster.upstream.ssl.fail_verify").await?.iter().map(|(_, n)| n).sum();
            assert!(failed > 0);
        }
    }
    Ok(())
}
