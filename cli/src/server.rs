//! Client of a control plane: its settings, requests and errors.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::Value;
use ureq::http::Response;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use crate::CommandError;

/// The environment variable with the key of the caller.
const KEY: &str = "PORTCULLIS_KEY";

const TIMEOUT: Duration = Duration::from_secs(30);

/// Longest response that is read, in bytes.
const RESPONSE_BYTES: u64 = 64 << 20;

/// Settings of the connection to a control plane. The key of the caller comes from `PORTCULLIS_KEY`, or from a file.
#[derive(Args, Clone, Debug)]
pub struct Server {
    /// URL of the control plane
    #[arg(long, env = "PORTCULLIS_SERVER", default_value = "http://127.0.0.1:8081", value_name = "URL")]
    server: String,
    /// File with the key of the caller. Without it, the value of PORTCULLIS_KEY
    #[arg(long, env = "PORTCULLIS_KEY_FILE", value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// CA bundle in PEM for verifying the certificate of the control plane. Without it, the public CAs of Mozilla
    #[arg(long, env = "PORTCULLIS_CA_FILE", value_name = "FILE")]
    ca_file: Option<PathBuf>,
}

/// A client of a control plane.
#[derive(Debug)]
pub struct Client {
    server: String,
    key: String,
    agent: Agent,
}

impl Server {
    /// A client with the key of the caller.
    ///
    /// # Errors
    /// [`CommandError::Invalid`] without a key, and for a file that cannot be read.
    pub fn client(&self) -> Result<Client, CommandError> {
        let key = match (&self.key_file, std::env::var(KEY)) {
            (Some(file), _) => read(file)?.trim().to_owned(),
            (None, Ok(key)) => key,
            (None, Err(_)) => {
                let why = format!("set {KEY} to a key of the control plane, or name a file with it by --key-file");
                return Err(CommandError::Invalid(why));
            }
        };
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(CommandError::Invalid(format!(
                "the key in {KEY} or --key-file is empty or has characters other than visible ASCII"
            )));
        }
        let mut tls = TlsConfig::builder();
        if let Some(file) = &self.ca_file {
            tls = tls.root_certs(RootCerts::from(certificates(file)?));
        }
        // A redirect would send the key elsewhere.
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_global(Some(TIMEOUT))
            .user_agent(concat!("portcullis/", env!("CARGO_PKG_VERSION")))
            .tls_config(tls.build());
        Ok(Client { server: self.server.trim_end_matches('/').to_owned(), key, agent: config.build().into() })
    }
}

impl Client {
    /// Gets a resource.
    ///
    /// # Errors
    /// [`CommandError::Unreachable`] and [`CommandError::Refused`].
    pub fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Value, CommandError> {
        let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(query).finish();
        let mark = if query.is_empty() { "" } else { "?" };
        let request = self.agent.get(format!("{}{path}{mark}{query}", self.server)).header("x-api-key", &self.key);
        self.answer(request.call())
    }

    /// Posts a body.
    ///
    /// # Errors
    /// [`CommandError::Unreachable`] and [`CommandError::Refused`].
    pub fn post(&self, path: &str, body: &Value) -> Result<Value, CommandError> {
        let request = self.agent.post(format!("{}{path}", self.server)).header("x-api-key", &self.key);
        self.answer(request.header("content-type", "application/json").send(body.to_string()))
    }

    fn answer(&self, response: Result<Response<Body>, ureq::Error>) -> Result<Value, CommandError> {
        let unreachable =
            |why: ureq::Error| CommandError::Unreachable { server: self.server.clone(), why: why.to_string() };
        let mut response = response.map_err(unreachable)?;
        let status = response.status().as_u16();
        let text = response.body_mut().with_config().limit(RESPONSE_BYTES).read_to_string().map_err(unreachable)?;
        let body = serde_json::from_str::<Value>(&text);
        if (200..300).contains(&status) {
            return body.map_err(|_| CommandError::Refused {
                status,
                detail: "the response is not JSON; check that --server is a control plane of Portcullis".into(),
            });
        }
        let body = body.unwrap_or_default();
        let detail = body["detail"]
            .as_str()
            .unwrap_or("the response is not a problem document; check that --server is a control plane of Portcullis");
        let field = body["field"].as_str().map(|field| format!("{field}: ")).unwrap_or_default();
        Err(CommandError::Refused { status, detail: format!("{field}{detail}") })
    }
}

fn read(file: &Path) -> Result<String, CommandError> {
    std::fs::read_to_string(file).map_err(|error| CommandError::Invalid(format!("{}: {error}", file.display())))
}

fn certificates(file: &Path) -> Result<Vec<Certificate<'static>>, CommandError> {
    let text = read(file)?;
    let found: Vec<_> = parse_pem(text.as_bytes())
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if found.is_empty() {
        return Err(CommandError::Invalid(format!("{}: has no certificate in PEM", file.display())));
    }
    Ok(found)
}
