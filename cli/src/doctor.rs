//! `portcullis doctor`: checks of a deployment, with advice for each failure.

use std::io::Write;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use clap::Args;
use serde_json::Value;

use crate::server::{Answer, Client, Server};
use crate::{CommandError, output};

/// Clocks may differ by this much, in seconds.
const CLOCK_S: u64 = 5;

/// How often Envoys that lack a change are asked for again.
const SETTLING_ATTEMPTS: u32 = 12;

/// The pause between two such requests.
const SETTLING_PAUSE: Duration = Duration::from_millis(250);

/// An Envoy whose requests have waited for longer than this to be counted has a backlog, in seconds.
const LAG_S: f64 = 60.0;

/// Check the control plane, its clock, the Envoys and the keys, and say what to do
#[derive(Args, Clone, Debug)]
pub struct Doctor {
    #[command(flatten)]
    server: Server,
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Finding {
    check: &'static str,
    state: State,
    /// What was found, and what to do unless the check passed.
    found: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Passed,
    Warning,
    Failed,
}

impl Finding {
    const fn new(check: &'static str, state: State, found: String) -> Self {
        Self { check, state, found }
    }
}

impl Doctor {
    /// Runs all checks that can run, and writes what they find.
    ///
    /// # Errors
    /// [`CommandError::Unhealthy`] if a check failed.
    pub fn run(&self, out: &mut impl Write) -> Result<(), CommandError> {
        let client = self.server.client()?;
        let findings = examine(&client);
        let rows: Vec<[String; 3]> = findings
            .iter()
            .map(|finding| {
                let state = match finding.state {
                    State::Passed => "ok",
                    State::Warning => "warning",
                    State::Failed => "FAILED",
                };
                [finding.check.to_owned(), state.to_owned(), finding.found.clone()]
            })
            .collect();
        output::table(out, &["CHECK", "RESULT", "FOUND"], &rows)?;
        match findings.iter().filter(|finding| finding.state == State::Failed).count() {
            0 => Ok(()),
            failed => Err(CommandError::Unhealthy { failed, checks: findings.len() }),
        }
    }
}

fn examine(client: &Client) -> Vec<Finding> {
    let mut findings = vec![transport(client.server())];
    let ready = match client.ask("/readyz") {
        Ok(answer) => answer,
        Err(error) => {
            findings.push(Finding::new("reachable", State::Failed, error.to_string()));
            return findings;
        }
    };
    findings.push(Finding::new("reachable", State::Passed, client.server().to_owned()));
    findings.push(readiness(&ready));
    findings.push(clock(ready.date.as_deref(), SystemTime::now()));
    let envoys = settled_envoys(client);
    findings.push(key(&envoys));
    if let Ok(Answer { status: 200, body, .. }) = &envoys {
        findings.extend(check_envoys(body["envoys"].as_array().map_or(&[], Vec::as_slice)));
        findings.push(usable_key(client));
    }
    findings
}

/// The Envoys. They apply a change within milliseconds. While a live one lacks a change, this asks again, for 3 s at most.
fn settled_envoys(client: &Client) -> Result<Answer, CommandError> {
    let mut attempts = 0;
    loop {
        let envoys = client.ask("/v1/envoys?limit=200")?;
        let lacks = |envoy: &Value| envoy["live"] == true && envoy["up_to_date"] == false;
        let is_settled = !envoys.body["envoys"].as_array().is_some_and(|all| all.iter().any(lacks));
        if is_settled || attempts == SETTLING_ATTEMPTS {
            return Ok(envoys);
        }
        attempts += 1;
        std::thread::sleep(SETTLING_PAUSE);
    }
}

fn transport(server: &str) -> Finding {
    let authority = server.split("://").nth(1).unwrap_or_default().split('/').next().unwrap_or_default();
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    let is_local = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    let (state, found) = match (server.starts_with("https://"), is_local) {
        (true, _) => (State::Passed, "TLS".to_owned()),
        (false, true) => (State::Passed, "plain text on this machine".to_owned()),
        (false, false) => {
            let why = "keys travel in plain text; serve with --tls-cert-file and --tls-key-file, and use https://";
            (State::Warning, why.to_owned())
        }
    };
    Finding::new("transport", state, found)
}

fn readiness(ready: &Answer) -> Finding {
    let finding = |state, found: &str| Finding::new("readiness", state, found.to_owned());
    match (ready.body["database"].as_bool(), ready.body["mirror"].as_bool()) {
        (Some(true), Some(true)) => finding(State::Passed, "the database answers, and the keys are loaded"),
        (Some(false), _) => finding(
            State::Failed,
            "the database does not answer; check PostgreSQL and the control plane's --database-url",
        ),
        (Some(true), Some(false)) => {
            finding(State::Failed, "the keys are not loaded yet; read the control plane's log")
        }
        _ => finding(State::Failed, "the answer is not that of a control plane of Portcullis; check --server"),
    }
}

/// Compares the clock of this machine with that of the control plane.
fn clock(date: Option<&str>, now: SystemTime) -> Finding {
    let Some(theirs) = date.and_then(|date| httpdate::parse_http_date(date).ok()) else {
        return Finding::new("clock", State::Warning, "the answer has no date; a proxy may have removed it".to_owned());
    };
    let off = now.duration_since(theirs).or_else(|_| theirs.duration_since(now)).map_or(u64::MAX, |off| off.as_secs());
    if off <= CLOCK_S {
        return Finding::new("clock", State::Passed, format!("is within {CLOCK_S} s of this machine's"));
    }
    let found = format!(
        "differs from this machine's by {off} s; synchronize both with NTP: the control plane and Envoys check expiry by their clocks"
    );
    Finding::new("clock", State::Failed, found)
}

fn key(envoys: &Result<Answer, CommandError>) -> Finding {
    let (state, found) = match envoys {
        Ok(Answer { status: 200, .. }) => (State::Passed, "is accepted, and has the scope admin".to_owned()),
        Ok(Answer { status: 403, .. }) => {
            (State::Warning, "is accepted, but lacks the scope admin; Envoys were not checked".to_owned())
        }
        Ok(Answer { status: 401, .. }) => {
            (State::Failed, "the control plane refuses it; create an admin key with portcullis admin create-key --name NAME --scope admin".to_owned())
        }
        Ok(Answer { status, .. }) => (State::Failed, format!("the control plane answered {status}")),
        Err(error) => (State::Failed, error.to_string()),
    };
    Finding::new("key", state, found)
}

fn check_envoys(envoys: &[Value]) -> Vec<Finding> {
    let live: Vec<&Value> = envoys.iter().filter(|envoy| envoy["live"] == true).collect();
    if live.is_empty() {
        let found = "none is live; in Envoy's log, look for lines of portcullis about the sync key and the cluster of the \
                     control plane";
        return vec![Finding::new("Envoys", State::Failed, found.to_owned())];
    }
    let named = |of: &[&Value]| {
        let name = |envoy: &&Value| envoy["address"].as_str().or(envoy["id"].as_str()).unwrap_or("?").to_owned();
        of.iter().map(name).collect::<Vec<_>>().join(", ")
    };
    let behind: Vec<&Value> = live.iter().filter(|envoy| envoy["up_to_date"] != true).copied().collect();
    let step = if behind.is_empty() {
        Finding::new("Envoys", State::Passed, format!("every live Envoy has every change; live: {}", live.len()))
    } else {
        let found = format!(
            "{} of {} live Envoys lack changes: {}; check the gauge wasmcustom.portcullis.sync.age_seconds of each",
            behind.len(),
            live.len(),
            named(&behind)
        );
        Finding::new("Envoys", State::Failed, found)
    };
    let is_late = |envoy: &&&Value| envoy["usage"]["lag_seconds"].as_f64().is_some_and(|lag_s| lag_s > LAG_S);
    let late: Vec<&Value> = live.iter().filter(is_late).copied().collect();
    let usage = if late.is_empty() {
        Finding::new("usage", State::Passed, "no Envoy has a backlog of reports".to_owned())
    } else {
        let found = format!(
            "{} have had no acknowledgement of their usage for {LAG_S} s; see the log of the control plane",
            named(&late)
        );
        Finding::new("usage", State::Warning, found)
    };
    let ours = env!("CARGO_PKG_VERSION");
    let differs = |envoy: &&&Value| envoy["version"].as_str().is_some_and(|version| version != ours);
    let others: Vec<&Value> = live.iter().filter(differs).copied().collect();
    let versions = if others.is_empty() {
        Finding::new("versions", State::Passed, format!("all filters have version {ours}, as this program"))
    } else {
        let found = format!(
            "the filters on {} have another version than this program ({ours}); install one version everywhere",
            named(&others)
        );
        Finding::new("versions", State::Warning, found)
    };
    vec![step, usage, versions]
}

/// Whether an active key without the scopes admin and sync exists.
fn usable_key(client: &Client) -> Finding {
    let keys = match client.get("/v1/keys", &[("state", "active"), ("limit", "100")]) {
        Ok(page) => page["keys"].as_array().cloned().unwrap_or_default(),
        Err(error) => return Finding::new("keys", State::Failed, error.to_string()),
    };
    let is_for_clients = |key: &&Value| {
        let scopes = key["scopes"].as_array().map_or(&[][..], Vec::as_slice);
        !scopes.iter().any(|scope| scope == "sync" || scope == "admin")
    };
    match keys.iter().find(is_for_clients) {
        Some(key) => {
            let prefix = key["prefix"].as_str().unwrap_or_default();
            Finding::new("keys", State::Passed, format!("{prefix}… and others can call your services"))
        }
        None => {
            let found = "no active key is for clients; create one with portcullis keys create --email … --name …";
            Finding::new("keys", State::Warning, found.to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn answer(status: u16, body: Value) -> Answer {
        Answer { status, body, etag: None, date: None }
    }

    fn states(findings: &[Finding]) -> Vec<(&'static str, State)> {
        findings.iter().map(|finding| (finding.check, finding.state)).collect()
    }

    #[test]
    fn keys_in_plain_text_on_a_network_are_a_warning() {
        let of = |server: &str| transport(server).state;
        for well in ["https://keys.example.com", "http://127.0.0.1:8081", "http://localhost", "http://[::1]:1"] {
            assert_eq!(of(well), State::Passed, "{well}");
        }
        for open in ["http://keys.example.com", "http://localhost.example.com:1", "http://127.0.0.1.example.com"] {
            assert_eq!(of(open), State::Warning, "{open}");
        }
    }

    #[test]
    fn readiness_and_the_key_say_what_to_do() {
        let ready = |database, mirror| readiness(&answer(503, json!({"database": database, "mirror": mirror})));
        assert_eq!(ready(true, true).state, State::Passed);
        assert!(ready(false, true).found.contains("--database-url") && ready(true, false).found.contains("log"));
        assert!(readiness(&answer(200, json!("hello"))).found.contains("--server"));
        let key = |status| key(&Ok(answer(status, Value::Null)));
        assert_eq!(
            [200, 403, 401, 500].map(|status| key(status).state),
            [State::Passed, State::Warning, State::Failed, State::Failed,]
        );
    }

    #[test]
    fn a_clock_that_is_off_fails() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let at = |off: i64| {
            httpdate::fmt_http_date(
                now.checked_add(Duration::from_secs(1_000)).unwrap()
                    - Duration::from_secs((1_000 - off).unsigned_abs()),
            )
        };
        for (off, state) in
            [(0, State::Passed), (5, State::Passed), (-5, State::Passed), (6, State::Failed), (-600, State::Failed)]
        {
            assert_eq!(clock(Some(&at(off)), now).state, state, "{off}");
        }
        assert_eq!(clock(None, now).state, State::Warning);
    }

    #[test]
    fn envoys_must_be_live_in_step_and_of_one_version() {
        let envoy = |live: bool, up_to_date: bool, lag_s: f64, version: &str| {
            json!({
                "id": "1", "address": "192.0.2.7", "live": live, "up_to_date": up_to_date, "version": version,
                "usage": {"lag_seconds": lag_s},
            })
        };
        let ours = env!("CARGO_PKG_VERSION");
        assert_eq!(states(&check_envoys(&[envoy(false, true, 0.0, ours)])), [("Envoys", State::Failed)]);
        let well = check_envoys(&[envoy(true, true, 1.0, ours), envoy(false, false, 999.0, "9.9.9")]);
        assert_eq!(states(&well), [("Envoys", State::Passed), ("usage", State::Passed), ("versions", State::Passed)]);
        let ill = check_envoys(&[envoy(true, false, 61.0, "9.9.9"), envoy(true, true, 0.0, ours)]);
        assert_eq!(states(&ill), [("Envoys", State::Failed), ("usage", State::Warning), ("versions", State::Warning)]);
        assert!(ill.iter().all(|finding| finding.found.contains("192.0.2.7")));
    }
}
