//! The load generators. h2load sends each address of a list once, in order, and costs little itself.
//! Only oha can send a different body with each request, which creating keys needs, but it picks
//! addresses at random. Requests share HTTP/2 connections with many streams, so that Envoy is never
//! idle.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portcullis_harness::cargo::{cargo, run};
use portcullis_harness::output::progress;
use portcullis_harness::tools;
use serde_json::Value;
use tempfile::TempDir;

use crate::machine;
use crate::stats::Samples;

/// Streams in flight.
const STREAMS: &str = "32";
/// h2load and those of its libraries that a system may lack.
const DEBIAN_PACKAGES: [&str; 5] = ["nghttp2-client", "libnghttp2-14", "libev4", "libc-ares2", "libjemalloc2"];
const OHA_VERSION: &str = "1.16.0";

/// h2load of nghttp2: of the path, or unpacked from Debian's package.
#[derive(Clone, Debug)]
pub(crate) struct H2load {
    program: PathBuf,
    /// The directory of its libraries, if it is unpacked.
    libraries: Option<PathBuf>,
}

/// oha: of the path, or compiled.
#[derive(Clone, Debug)]
pub(crate) struct Oha(PathBuf);

/// Numbers of responses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answers {
    /// With a status 2xx.
    pub(crate) good: u64,
    /// With a status 4xx.
    pub(crate) refused: u64,
    /// With another status or without a response.
    pub(crate) failed: u64,
}

/// Requests with one key at a pace, over HTTP/1.1.
#[derive(Clone, Debug)]
pub(crate) struct Flow {
    pub(crate) to: SocketAddr,
    pub(crate) key: String,
    pub(crate) connections: u32,
    /// Over all connections.
    pub(crate) per_second: u32,
    pub(crate) lasts: Duration,
}

/// Calls of the REST API, over one HTTP/2 connection.
#[derive(Clone, Debug)]
pub(crate) struct Calls {
    pub(crate) method: &'static str,
    pub(crate) key: String,
    pub(crate) in_flight: usize,
    pub(crate) number: usize,
}

/// Latency of calls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Took {
    /// From the first request to the last response; of oha, including connecting.
    pub(crate) seconds: f64,
    /// 99th percentile of latency.
    pub(crate) p99_ms: f64,
}

impl H2load {
    /// Finds or unpacks it, without root.
    pub(crate) fn install() -> Result<Self> {
        if let Some(program) = tools::on_path("h2load") {
            return Ok(Self { program, libraries: None });
        }
        let home = tools::tools().join("h2load");
        let unpacked = tools::unpack_debian(&DEBIAN_PACKAGES, &home, &progress)?;
        ensure!(unpacked, "there is no h2load: install nghttp2 (Debian: nghttp2-client)");
        let directories = std::fs::read_dir(home.join("usr/lib"))?;
        let libraries = directories.flatten().map(|entry| entry.path()).find(|path| path.join("libev.so.4").exists());
        Ok(Self { program: home.join("usr/bin/h2load"), libraries })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.envs(self.libraries.as_ref().map(|directory| ("LD_LIBRARY_PATH", directory)));
        command
    }

    /// Sends requests over one connection to the addresses of a file, one a line, from one core.
    pub(crate) async fn send(&self, requests: u64, addresses: &Path, core: usize) -> Result<Answers> {
        let mut command = self.sending(requests, 1, addresses);
        machine::pin(&mut command, core)?;
        Ok(finish(command, h2load_answers).await?.0)
    }

    /// The same over several connections, from any core.
    pub(crate) async fn spread(&self, requests: u64, connections: usize, addresses: &Path) -> Result<Answers> {
        Ok(finish(self.sending(requests, connections, addresses), h2load_answers).await?.0)
    }

    fn sending(&self, requests: u64, connections: usize, addresses: &Path) -> Command {
        let mut command = self.command();
        command.args(["-n", &requests.to_string(), "-c", &connections.to_string(), "-m", STREAMS, "-i"]).arg(addresses);
        command
    }

    /// Keeps requests flowing for a while.
    pub(crate) async fn flow(&self, flow: &Flow) -> Result<Answers> {
        let mut command = self.command();
        let by_connection = flow.per_second / flow.connections.max(1);
        command.args(["--h1", "-c", &flow.connections.to_string(), "--rps", &by_connection.to_string()]);
        command.args(["-D", &flow.lasts.as_secs().to_string(), "-H", &format!("x-api-key: {}", flow.key)]);
        command.arg(format!("http://{}/", flow.to));
        Ok(finish(command, h2load_answers).await?.0)
    }

    /// Calls each of these addresses once, in this order. All calls must succeed.
    pub(crate) async fn call(&self, calls: &Calls, addresses: &[String]) -> Result<Took> {
        let home = TempDir::with_prefix("portcullis-bench-")?;
        let (list, log) = (home.path().join("list"), home.path().join("log"));
        std::fs::write(&list, addresses.join("\n"))?;
        let mut command = self.command();
        command.args(["-c", "1", "-n", &calls.number.to_string(), "-m", &calls.in_flight.to_string()]);
        command.args(["-H", &format!("x-api-key: {}", calls.key), "-H", &format!(":method: {}", calls.method), "-i"]);
        command.arg(&list).arg(format!("--log-file={}", log.display()));
        let (answers, output) = finish(command, h2load_answers).await?;
        calls.succeeded(answers)?;
        h2load_took(&std::fs::read_to_string(&log)?).with_context(|| not_parsed(&output))
    }
}

impl Oha {
    /// Finds or compiles it.
    pub(crate) fn install() -> Result<Self> {
        if let Some(program) = tools::on_path("oha") {
            return Ok(Self(program));
        }
        let home = tools::tools().join(format!("oha-{OHA_VERSION}"));
        let program = home.join("bin/oha");
        if !program.is_file() {
            progress(&format!("installing oha {OHA_VERSION} into {} (some minutes)", home.display()));
            let mut install = cargo(&["install", "oha", "--version", OHA_VERSION, "--locked", "--root"]);
            install.arg(&home).env("CARGO_TARGET_DIR", tools::tools().join("build"));
            run(install)?;
        }
        Ok(Self(program))
    }

    /// Calls an address with bodies chosen at random from these. All calls must succeed.
    pub(crate) async fn call(&self, calls: &Calls, address: &str, bodies: &[String]) -> Result<Took> {
        let home = TempDir::with_prefix("portcullis-bench-")?;
        let list = home.path().join("list");
        std::fs::write(&list, bodies.join("\n"))?;
        let mut command = Command::new(&self.0);
        command.args(["--no-tui", "--output-format", "json", "--http2", "-c", "1", "-n", &calls.number.to_string()]);
        command.args(["-p", &calls.in_flight.to_string(), "-H", &format!("x-api-key: {}", calls.key)]);
        command.args(["-m", calls.method, "-T", "application/json", "-Z"]).arg(&list).arg(address);
        let (answers, output) = finish(command, oha_answers).await?;
        calls.succeeded(answers)?;
        oha_took(&output).with_context(|| not_parsed(&output))
    }
}

impl Calls {
    fn succeeded(&self, answers: Answers) -> Result<()> {
        let expected = Answers { good: self.number as u64, refused: 0, failed: 0 };
        ensure!(answers == expected, "{}: {answers:?} instead of {expected:?}", self.method);
        Ok(())
    }
}

/// Runs a load generator to its end. It is killed when the future is dropped.
async fn finish(command: Command, parse: fn(&str) -> Option<Answers>) -> Result<(Answers, String)> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = tokio::process::Command::from(command).kill_on_drop(true).output().await?;
    let why = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} failed: {}", why.trim());
    let output = String::from_utf8_lossy(&output.stdout).into_owned();
    let answers = parse(&output).with_context(|| not_parsed(&output))?;
    Ok((answers, output))
}

fn not_parsed(output: &str) -> String {
    format!("cannot parse the output of the load generator:\n{output}")
}

/// `status codes: 10000 2xx, 0 3xx, 0 4xx, 0 5xx`
fn h2load_answers(output: &str) -> Option<Answers> {
    let line = |start: &str| output.lines().find_map(|line| line.strip_prefix(start));
    let number = |line: &str, name: &str| {
        let part = line.split(',').find(|part| part.trim().ends_with(name))?;
        part.split_whitespace().next()?.parse::<u64>().ok()
    };
    let total = number(line("requests: ")?, "total")?;
    let codes = line("status codes: ")?;
    let (good, refused) = (number(codes, "2xx")?, number(codes, "4xx")?);
    Some(Answers { good, refused, failed: total.saturating_sub(good + refused) })
}

/// Its log has one line for each request: time sent in microseconds, status, latency in microseconds.
fn h2load_took(log: &str) -> Option<Took> {
    let (mut first, mut last, mut latencies) = (f64::INFINITY, f64::NEG_INFINITY, Samples::default());
    for line in log.lines() {
        let mut fields = line.split('\t').map(|field| field.parse::<f64>());
        let (Some(Ok(sent)), Some(Ok(_)), Some(Ok(took))) = (fields.next(), fields.next(), fields.next()) else {
            return None;
        };
        (first, last) = (first.min(sent), last.max(sent + took));
        latencies.push(took);
    }
    let seconds = (last - first) / 1e6;
    seconds.is_finite().then(|| Took { seconds, p99_ms: latencies.quantile(0.99) / 1e3 })
}

fn oha_answers(output: &str) -> Option<Answers> {
    let output: Value = serde_json::from_str(output).ok()?;
    let sum = |name: &str, wanted: &dyn Fn(&str) -> bool| -> Option<u64> {
        let all = output[name].as_object()?;
        Some(all.iter().filter(|(name, _)| wanted(name)).filter_map(|(_, count)| count.as_u64()).sum())
    };
    let codes = "statusCodeDistribution";
    let (good, refused) = (sum(codes, &|code| code.starts_with('2'))?, sum(codes, &|code| code.starts_with('4'))?);
    let others = sum(codes, &|_| true)? - good - refused;
    Some(Answers { good, refused, failed: others + sum("errorDistribution", &|_| true)? })
}

fn oha_took(output: &str) -> Option<Took> {
    let output: Value = serde_json::from_str(output).ok()?;
    let p99_s = output["latencyPercentiles"]["p99"].as_f64()?;
    Some(Took { seconds: output["summary"]["total"].as_f64()?, p99_ms: p99_s * 1e3 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_h2load_says_is_understood() {
        let output = "finished in 1.00s, 10.00 req/s\n\
            requests: 12 total, 12 started, 12 done, 9 succeeded, 3 failed, 0 errored, 0 timeout\n\
            status codes: 9 2xx, 0 3xx, 2 4xx, 1 5xx\n";
        assert_eq!(h2load_answers(output), Some(Answers { good: 9, refused: 2, failed: 1 }));
        assert_eq!(h2load_answers("status codes: 9 2xx"), None);
    }

    #[test]
    fn what_h2load_logs_is_understood() {
        let log = "1000000\t200\t4000\n1001000\t200\t9000\n1002000\t404\t1000\n";
        assert_eq!(h2load_took(log), Some(Took { seconds: 0.01, p99_ms: 8.9 }));
        assert_eq!(h2load_took("1000000\t200\n"), None);
        assert_eq!(h2load_took(""), None);
    }

    #[test]
    fn what_oha_says_is_understood() {
        let output = r#"{"statusCodeDistribution": {"200": 9, "401": 2, "503": 1}, "errorDistribution": {"reset": 4}}"#;
        assert_eq!(oha_answers(output), Some(Answers { good: 9, refused: 2, failed: 5 }));
        assert_eq!(oha_answers("no JSON"), None);
        let output = r#"{"summary": {"total": 1.5}, "latencyPercentiles": {"p95": 0.002, "p99": 0.25}}"#;
        assert_eq!(oha_took(output), Some(Took { seconds: 1.5, p99_ms: 250.0 }));
    }
}
