//! Client of a control plane: its settings, requests and errors.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::Value;
use ureq::http::Response;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use crate::CommandError;
use crate::login::Login;

/// The environment variable with the key of the caller.
const KEY: &str = "PORTCULLIS_KEY";

/// The URL of a control plane on the same machine.
const DEFAULT: &str = "http://127.0.0.1:8081";

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Imports of many keys take their time.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(300);

/// Longest response that is read, in bytes.
const RESPONSE_BYTES: u64 = 64 << 20;

/// Settings of the connection to a control plane. The key of the caller comes from a file, from `PORTCULLIS_KEY`, or from
/// `portcullis login`.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Connection")]
pub struct Server {
    /// URL of the control plane [default: that of `portcullis login`, or http://127.0.0.1:8081]
    #[arg(long, env = "PORTCULLIS_SERVER", value_name = "URL")]
    server: Option<String>,
    /// File with the key of the caller [default: PORTCULLIS_KEY, or the key of `portcullis login`]
    #[arg(long, env = "PORTCULLIS_KEY_FILE", value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// CA bundle in PEM for verifying the certificate of the control plane [default: the public CAs of Mozilla]
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
        let given = (&self.key_file, std::env::var(KEY));
        let needs_login = self.server.is_none() || matches!(given, (None, Err(_)));
        let login = if needs_login { Login::read()? } else { None };
        let server = self.url(login.as_ref());
        let key = match (given.0, given.1, login) {
            (Some(file), ..) => read(file)?.trim().to_owned(),
            (None, Ok(key), _) => key,
            // The key of a login is for its server only.
            (None, Err(_), Some(login)) if login.server == server => login.key,
            (None, Err(_), login) => {
                let other = login.map(|login| format!("; the login is for {}", login.server)).unwrap_or_default();
                let why = format!("no key for {server}: run portcullis login, set {KEY}, or give --key-file{other}");
                return Err(CommandError::Invalid(why));
            }
        };
        self.client_with(server, key)
    }

    /// The URL of the control plane.
    #[must_use]
    pub fn url(&self, login: Option<&Login>) -> String {
        let server = self.server.as_deref().or_else(|| login.map(|login| login.server.as_str()));
        server.unwrap_or(DEFAULT).trim_end_matches('/').to_owned()
    }

    /// A client with this key.
    ///
    /// # Errors
    /// [`CommandError::Invalid`] if the URL or the key is invalid.
    pub fn client_with(&self, server: String, key: String) -> Result<Client, CommandError> {
        if !["http://", "https://"].iter().any(|scheme| server.starts_with(scheme)) {
            return Err(CommandError::Invalid(format!("--server: must be a URL such as {DEFAULT}, and is {server}")));
        }
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(CommandError::Invalid("the key is empty or has characters other than visible ASCII".into()));
        }
        let mut tls = TlsConfig::builder();
        if let Some(file) = &self.ca_file {
            tls = tls.root_certs(RootCerts::from(certificates(file)?));
        }
        // A redirect would send the key elsewhere.
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(RESPONSE_TIMEOUT))
            .user_agent(concat!("portcullis/", env!("CARGO_PKG_VERSION")))
            .allow_non_standard_methods(true)
            .tls_config(tls.build());
        Ok(Client { server, key, agent: config.build().into() })
    }
}

/// A request to the control plane.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The HTTP method, in capitals.
    pub method: &'a str,
    /// The path, percent-encoded.
    pub path: &'a str,
    /// Parameters of the query.
    pub query: &'a [(String, String)],
    /// Further headers.
    pub headers: &'a [(&'static str, String)],
    /// The body.
    pub body: Option<Vec<u8>>,
    /// The media type of the body.
    pub content_type: &'a str,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The JSON of the body; null without one, or if it is not JSON.
    pub body: Value,
    /// The version of the resource.
    pub etag: Option<String>,
    /// The time of the control plane, as its `Date` header has it.
    pub date: Option<String>,
}

impl Client {
    /// The URL of the control plane.
    #[must_use]
    pub fn server(&self) -> &str {
        &self.server
    }

    /// Gets a resource.
    ///
    /// # Errors
    /// [`CommandError::Unreachable`] and [`CommandError::Refused`].
    pub fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Value, CommandError> {
        let query: Vec<_> = query.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Ok(self.send(&Request { query: &query, ..Request::get(path) })?.body)
    }

    /// Posts a body.
    ///
    /// # Errors
    /// [`CommandError::Unreachable`] and [`CommandError::Refused`].
    pub fn post(&self, path: &str, body: &Value) -> Result<Value, CommandError> {
        let body = Some(body.to_string().into_bytes());
        Ok(self.send(&Request { method: "POST", body, ..Request::get(path) })?.body)
    }

    /// Sends a request.
    ///
    /// # Errors
    /// [`CommandError::Unreachable`] and [`CommandError::Refused`].
    pub fn send(&self, request: &Request<'_>) -> Result<Answer, CommandError> {
        let (answer, is_json) = self.exchange(request)?;
        let foreign =
            |what: &str| format!("the response is not {what}; check that --server is a control plane of Portcullis");
        let detail = match (&answer.body, (200..300).contains(&answer.status)) {
            (_, true) if is_json => return Ok(answer),
            (_, true) => foreign("JSON"),
            (body, false) => {
                let detail = body["detail"].as_str().map_or_else(|| foreign("a problem document"), str::to_owned);
                let field = body["field"].as_str().map(|field| format!("{field}: ")).unwrap_or_default();
                format!("{field}{detail}")
            }
        };
        Err(CommandError::Refused { status: answer.status, detail })
    }

    /// Gets a resource, whatever the status of the answer is.
    ///
    /// # Errors
    /// [`CommandError::Unreachable`].
    pub fn ask(&self, path: &str) -> Result<Answer, CommandError> {
        Ok(self.exchange(&Request::get(path))?.0)
    }

    /// The answer, and whether it is JSON or empty.
    fn exchange(&self, request: &Request<'_>) -> Result<(Answer, bool), CommandError> {
        let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(request.query).finish();
        let mark = if query.is_empty() { "" } else { "?" };
        let mut builder = ureq::http::Request::builder()
            .method(request.method)
            .uri(format!("{}{}{mark}{query}", self.server, request.path))
            .header("x-api-key", &self.key);
        for (name, value) in request.headers {
            builder = builder.header(*name, value);
        }
        let invalid = |error: ureq::http::Error| CommandError::Invalid(format!("the request is invalid: {error}"));
        match &request.body {
            Some(body) => {
                let built = builder.header("content-type", request.content_type).body(body.as_slice());
                self.read(self.agent.run(built.map_err(invalid)?))
            }
            None => self.read(self.agent.run(builder.body(()).map_err(invalid)?)),
        }
    }

    fn read(&self, response: Result<Response<Body>, ureq::Error>) -> Result<(Answer, bool), CommandError> {
        let unreachable =
            |why: ureq::Error| CommandError::Unreachable { server: self.server.clone(), why: why.to_string() };
        let mut response = response.map_err(unreachable)?;
        let status = response.status().as_u16();
        let header = |name: &str| response.headers().get(name)?.to_str().ok().map(str::to_owned);
        let (etag, date) = (header("etag"), header("date"));
        let text = response.body_mut().with_config().limit(RESPONSE_BYTES).read_to_string().map_err(unreachable)?;
        let body = if text.is_empty() { Ok(Value::Null) } else { serde_json::from_str::<Value>(&text) };
        let is_json = body.is_ok();
        Ok((Answer { status, body: body.unwrap_or_default(), etag, date }, is_json))
    }

    /// The id of the only key with this prefix. `setting` names the argument in errors.
    ///
    /// # Errors
    /// [`CommandError::Invalid`] if there is no such key, or several, or if the prefix is that of an old secret.
    pub fn key_of_prefix(&self, setting: &str, prefix: &str) -> Result<String, CommandError> {
        let page = self.get("/v1/keys", &[("prefix", prefix), ("limit", "10")])?;
        let keys = page["keys"].as_array().map(Vec::as_slice).unwrap_or_default();
        let text = |key: &Value, field: &str| key[field].as_str().unwrap_or_default().to_owned();
        let invalid = |why: String| Err(CommandError::Invalid(format!("{setting}: {why}")));
        match keys {
            [key] => {
                let shown = text(key, "prefix");
                let known = prefix.replacen("sk_live_", "sk_", 1).replacen("sk_test_", "sk_", 1);
                let known = known.trim_end_matches(['.', '…']);
                if !shown.starts_with(known) && !known.starts_with(&shown) {
                    return invalid(format!(
                        "{prefix} is the start of an old secret of the key {}; use its id for the present secret",
                        text(key, "id")
                    ));
                }
                Ok(text(key, "id"))
            }
            [] => invalid(format!("no key begins with {prefix}")),
            several => {
                let which =
                    |key: &Value| format!("{} ({}, {})", text(key, "id"), text(key, "email"), text(key, "name"));
                let which: Vec<String> = several.iter().map(which).collect();
                invalid(format!("several keys begin with {prefix}; name one by its id: {}", which.join("; ")))
            }
        }
    }

    /// The id of the user with this address.
    ///
    /// # Errors
    /// [`CommandError::Invalid`] if no user has this address.
    pub fn user_of_email(&self, email: &str) -> Result<String, CommandError> {
        let page = self.get("/v1/users", &[("email", email)])?;
        let id = page["users"][0]["id"].as_str().map(str::to_owned);
        id.ok_or_else(|| CommandError::Invalid(format!("ID: there is no user {email}")))
    }
}

impl<'a> Request<'a> {
    /// A request for a resource.
    #[must_use]
    pub const fn get(path: &'a str) -> Self {
        Self { method: "GET", path, query: &[], headers: &[], body: None, content_type: "application/json" }
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
