//! `cargo xtask up --upstream`: Envoy in front of the user's own service, given by URL.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use portcullis_tests::certificates::{Authority, For, Identity};
use portcullis_tests::demo::DemoApi;
use portcullis_tests::filter_harness::{FilterHarness, record};
use portcullis_tests::http::Reply;
use portcullis_tests::ports::LOCAL;
use portcullis_tests::service::Service;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// An Envoy in front of a service, with one key.
async fn protect(url: &str, authorities: Option<PathBuf>) -> Result<FilterHarness> {
    let service = Service::parse(url).and_then(|service| service.trusting(authorities)).map_err(anyhow::Error::msg)?;
    let policies = json!({"open": {"key": "anonymous_allowed"}});
    let harness = FilterHarness::builder().service(service).policies(&policies).route("/open", "open");
    harness.start(&[("good", record(1))]).await
}

async fn get(harness: &FilterHarness, path: &str, key: &str) -> Result<Reply> {
    let request = Request::get(path).header("x-api-key", key).header("x-forwarded-host", "forged.example");
    harness.send(request.body(Full::default())?).await
}

/// The headers that the service received of a request with the key.
async fn received(harness: &FilterHarness, path: &str) -> Result<Value> {
    let reply = get(harness, path, "good").await?;
    assert_eq!(reply.status, 200, "{reply:?}");
    Ok(reply.json()?["headers"].take())
}

#[tokio::test]
async fn a_service_is_reached_by_name_or_address_and_is_called_by_its_own_name() -> Result<()> {
    let v4 = DemoApi::start(LOCAL).await?;
    let mut services = vec![format!("localhost:{}", v4.address().port()), v4.address().to_string()];
    // Not every machine has IPv6.
    let v6 = DemoApi::start(SocketAddr::from((Ipv6Addr::LOCALHOST, 0))).await.ok();
    services.extend(v6.iter().map(|v6| v6.address().to_string()));
    for authority in services {
        let protected = protect(&format!("http://{authority}"), None).await?;
        for path in ["/", "/open/a?b=1"] {
            let headers = received(&protected, path).await?;
            assert_eq!(headers["host"], json!([authority]), "{path}");
            // The name that the client called, and not the header that it sent.
            assert_eq!(headers["x-forwarded-host"], json!([protected.envoy.address().to_string()]), "{path}");
            assert_eq!(headers["x-api-key"], Value::Null);
            assert_eq!(headers["x-consumer-id"].as_array().map(Vec::len), Some(1));
        }
        assert_eq!(get(&protected, "/", "no such key").await?.status, 401);
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
    let listener = TcpListener::bind(LOCAL).await?;
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
        let protected = protect(&format!("https://{authority}"), Some(trusted.clone())).await?;
        if reached {
            assert_eq!(received(&protected, "/").await?["host"], json!([authority]));
        } else {
            let reply = get(&protected, "/", "good").await?;
            assert_eq!(reply.status, 503, "{reply:?}");
            let failed: u64 =
                protected.envoy.stats("cluster.upstream.ssl.fail_verify").await?.iter().map(|(_, n)| n).sum();
            assert!(failed > 0);
        }
    }
    Ok(())
}
