//! TLS certificates and keys. They are read again on SIGHUP and when the files change. If new files are invalid,
//! the ones before stay in use.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{Error, RootCertStore, ServerConfig};
use tracing::{info, warn};

/// How often the files are checked for changes.
const LOOK: Duration = Duration::from_secs(5);

/// Protocols of clients, the preferred one first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Where certificates and keys lie, in PEM.
#[derive(Clone, Debug)]
pub struct Files {
    /// The certificate, followed by those between it and its authority.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// The authorities that a client's certificate must come from. None: clients need no certificate.
    pub client_ca: Option<PathBuf>,
}

#[derive(PartialEq, Eq)]
struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

/// The certificate in use.
pub struct Tls {
    files: Files,
    current: RwLock<(Contents, Arc<ServerConfig>)>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tls({:?})", self.files)
    }
}

impl Tls {
    /// Reads the files.
    pub fn load(files: Files) -> Result<Self, String> {
        let contents = files.read()?;
        let config = Arc::new(files.config(&contents)?);
        Ok(Self { files, current: RwLock::new((contents, config)) })
    }

    /// For the next connection.
    pub fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner).1))
    }

    /// Reads the files again if they have changed. Returns whether they have. If they are invalid, the certificate in use
    /// stays.
    pub fn refresh(&self) -> Result<bool, String> {
        let contents = self.files.read()?;
        if self.current.read().unwrap_or_else(PoisonError::into_inner).0 == contents {
            return Ok(false);
        }
        let config = Arc::new(self.files.config(&contents)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = (contents, config);
        Ok(true)
    }

    /// Follows changes of the files. Returns only if the process cannot receive signals.
    pub async fn follow(self: Arc<Self>) {
        let mut hangup = match signal(SignalKind::hangup()) {
            Ok(hangup) => hangup,
            Err(error) => {
                warn!(%error, "cannot handle SIGHUP");
                return;
            }
        };
        let mut look = tokio::time::interval(LOOK);
        let mut complaint = String::new();
        loop {
            tokio::select! {
                _ = look.tick() => {}
                Some(()) = hangup.recv() => complaint.clear(),
            }
            let this = Arc::clone(&self);
            match tokio::task::spawn_blocking(move || this.refresh()).await {
                Ok(Ok(true)) => {
                    complaint.clear();
                    info!("reloaded the certificates");
                }
                Ok(Ok(false)) => complaint.clear(),
                // A file may be invalid while it is written. If it stays invalid, log it once.
                Ok(Err(why)) if why != complaint => {
                    warn!(%why, "could not reload the certificates; the loaded ones stay in use");
                    complaint = why;
                }
                Ok(Err(_)) | Err(_) => {}
            }
        }
    }
}

impl Files {
    fn read(&self) -> Result<Contents, String> {
        let read = |setting, file: &Path| std::fs::read(file).map_err(|error| wrong(setting, file, &error));
        Ok(Contents {
            certificate: read("--tls-cert-file", &self.certificate)?,
            key: read("--tls-key-file", &self.key)?,
            client_ca: self.client_ca.as_deref().map(|file| read("--tls-client-ca-file", file)).transpose()?,
        })
    }

    fn config(&self, contents: &Contents) -> Result<ServerConfig, String> {
        let provider = Arc::new(ring::default_provider());
        let chain = certificates("--tls-cert-file", &self.certificate, &contents.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&contents.key)
            .map_err(|_| wrong("--tls-key-file", &self.key, &"holds no private key in PEM"))?;
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS: {error}"))?;
        let builder = match (&self.client_ca, &contents.client_ca) {
            (Some(file), Some(pem)) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates("--tls-client-ca-file", file, pem)? {
                    roots.add(certificate).map_err(|error| wrong("--tls-client-ca-file", file, &error))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                builder
                    .with_client_cert_verifier(verifier.map_err(|error| wrong("--tls-client-ca-file", file, &error))?)
            }
            _ => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|error| match error {
            Error::InconsistentKeys(_) => wrong("--tls-key-file", &self.key, &"is not the key of the certificate"),
            Error::InvalidCertificate(_) => wrong("--tls-cert-file", &self.certificate, &error),
            _ => wrong("--tls-key-file", &self.key, &error),
        })?;
        config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).into();
        Ok(config)
    }
}

fn certificates(setting: &str, file: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        _ => Err(wrong(setting, file, &"holds no certificate in PEM")),
    }
}

fn wrong(setting: &str, file: &Path, what: &dyn std::fmt::Display) -> String {
    format!("{setting} {}: {what}", file.display())
}
