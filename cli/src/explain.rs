//! `portcullis explain`: why a request is decided as it is.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use clap::Args;
use serde_json::{Value, json};

use crate::CommandError;
use crate::output::{self, Format};
use crate::server::{Client, Server};

/// The request to explain.
#[derive(Args, Clone, Debug)]
pub struct Explain {
    #[command(flatten)]
    server: Server,
    /// URL that the client calls: scheme, host, path and query
    #[arg(long)]
    url: String,
    /// The method of the request
    #[arg(long, default_value = "GET")]
    method: String,
    /// A header that policies match by, as NAME:VALUE; may be given several times
    #[arg(long = "header", value_name = "NAME:VALUE")]
    headers: Vec<String>,
    /// The key, by the first characters of its secret, such as sk_live_abc123
    #[arg(long, value_name = "PREFIX", group = "which")]
    key_prefix: Option<String>,
    /// The key, by its id
    #[arg(long, value_name = "ID", group = "which")]
    key_id: Option<String>,
    /// Read the key from the first line of standard input. Without --key-prefix, --key-id and --key-stdin, the request has no
    /// key
    #[arg(long, group = "which")]
    key_stdin: bool,
    /// Name of the policy, for a route that names one. No match is looked for then
    #[arg(long, value_name = "NAME")]
    policy: Option<String>,
    /// What names the policy in Envoy's configuration: route_metadata, virtual_host_metadata, annotation, route_name or
    /// route_name_prefix [default: route_metadata]
    #[arg(long, value_name = "SOURCE", requires = "policy")]
    policy_source: Option<String>,
    /// The address of the client, for keys that are bound to networks
    #[arg(long, value_name = "IP")]
    address: Option<String>,
    /// Time of the request (RFC 3339) [default: now]
    #[arg(long, value_name = "TIME")]
    time: Option<String>,
    /// Format of the result
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Explain {
    /// Asks the control plane, and writes what it answers.
    ///
    /// # Errors
    /// Each variant of [`CommandError`].
    pub fn run(self, input: &mut impl Read, out: &mut impl Write) -> Result<(), CommandError> {
        let client = self.server.client()?;
        let body = self.body(&client, input)?;
        let answer = client.post("/v1/explain", &body)?;
        match self.output {
            Format::Json => output::json(out, &answer)?,
            Format::Table => show(out, &answer)?,
            Format::Csv => output::csv(out, answer["checks"].as_array().map_or(&[], Vec::as_slice))?,
        }
        Ok(())
    }

    fn body(&self, client: &Client, input: &mut impl Read) -> Result<Value, CommandError> {
        let (host, path) = split(&self.url)?;
        let mut body = json!({"method": self.method, "headers": headers(&self.headers)?, "host": host, "path": path});
        let mut set = |field: &str, value: Option<&str>| {
            if let Some(value) = value {
                body[field] = value.into();
            }
        };
        set("policy", self.policy.as_deref());
        set("policy_source", self.policy_source.as_deref());
        set("address", self.address.as_deref());
        set("time", self.time.as_deref());
        let id = match &self.key_prefix {
            Some(prefix) => Some(client.key_of_prefix("--key-prefix", prefix)?),
            None => self.key_id.clone(),
        };
        set("key_id", id.as_deref());
        if self.key_stdin {
            let mut text = String::new();
            input.read_to_string(&mut text)?;
            let key = text.lines().next().unwrap_or_default().trim();
            if key.is_empty() {
                return Err(CommandError::Invalid("--key-stdin: standard input has no key".into()));
            }
            set("key", Some(key));
        }
        Ok(body)
    }
}

/// The host and the path of a URL.
fn split(url: &str) -> Result<(&str, &str), CommandError> {
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
    let (host, path) = match rest {
        Some(rest) => match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, "/"),
        },
        None => ("", ""),
    };
    if host.is_empty() || host.contains(['?', '#', '@']) {
        let why = "--url: must be a URL such as https://api.example.com/orders";
        return Err(CommandError::Invalid(why.into()));
    }
    // A client sends no fragment.
    Ok((host, path.split('#').next().unwrap_or(path)))
}

/// Headers by name. Of several with one name the first counts, as in the filter.
fn headers(lines: &[String]) -> Result<BTreeMap<String, String>, CommandError> {
    let header = |line: &String| {
        let (name, value) = line.split_once(':').filter(|(name, _)| !name.trim().is_empty())?;
        Some((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
    };
    // The first comes last, so that it stays.
    let all: Option<_> = lines.iter().rev().map(header).collect();
    all.ok_or_else(|| CommandError::Invalid("--header: must be NAME:VALUE".into()))
}

fn show(out: &mut impl Write, answer: &Value) -> std::io::Result<()> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let reply = match (answer["status"].as_u64(), answer["shadow"].as_bool()) {
        (Some(status), _) => format!("Envoy answers {status}"),
        (None, Some(true)) => "the request goes upstream, since the policy is in shadow mode".to_owned(),
        (None, _) => "the request goes upstream".to_owned(),
    };
    writeln!(out, "{}: {reply}\n", text(&answer["outcome"]))?;
    let rows: Vec<[String; 3]> = answer["checks"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|check| {
            let result = match check["passed"].as_bool() {
                Some(true) => "passes".to_owned(),
                Some(false) => text(&check["outcome"]),
                None => "-".to_owned(),
            };
            [text(&check["name"]), result, text(&check["saw"])]
        })
        .collect();
    output::table(out, &["CHECK", "RESULT", "INPUT"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_has_a_host_and_a_path() {
        assert_eq!(
            split("https://api.example.com:8443/orders?page=2#top").unwrap(),
            ("api.example.com:8443", "/orders?page=2")
        );
        assert_eq!(split("http://api.example.com").unwrap(), ("api.example.com", "/"));
        for bad in ["", "/orders", "api.example.com/orders", "https://", "https:///a", "https://u@h/", "https://h?x"] {
            assert!(split(bad).unwrap_err().to_string().starts_with("--url: "), "{bad}");
        }
    }

    #[test]
    fn a_header_is_a_name_and_a_value() {
        let lines = ["X-Model: gpt-5".to_owned(), "a:b:c".to_owned(), "x-model: other".to_owned()];
        let expected = [("x-model".to_owned(), "gpt-5".to_owned()), ("a".to_owned(), "b:c".to_owned())];
        assert_eq!(headers(&lines).unwrap(), expected.into());
        assert!(headers(&["nothing".to_owned()]).is_err() && headers(&[":x".to_owned()]).is_err());
    }

    #[test]
    fn an_answer_is_shown_as_a_table() {
        let answer = json!({
            "outcome": "expired", "status": 401, "policy": "default", "shadow": false,
            "checks": [
                {"name": "key", "passed": true, "saw": "key sk_a"},
                {"name": "expiry", "passed": false, "saw": "it ended", "outcome": "expired"},
                {"name": "rate_limit", "passed": null, "saw": "none"},
            ],
        });
        let mut out = Vec::new();
        show(&mut out, &answer).unwrap();
        let expected = "\
expired: Envoy answers 401

CHECK       RESULT   INPUT
key         passes   key sk_a
expiry      expired  it ended
rate_limit  -        none
";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
