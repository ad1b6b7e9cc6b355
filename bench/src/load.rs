//! The load generator: h2load, of the path or unpacked from Debian's package; else oha, compiled by cargo, which is also taken
//! for calls with a body each. Requests go over one HTTP/2 connection with many streams, so that Envoy is never idle and
//! the generator costs little itself.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use portcullis_harness::cargo::{cargo, read, run};
use portcullis_harness::output::progress;
use portcullis_harness::tools;
use serde_json::Value;
use tempfile::TempDir;

use crate::machine;
use crate::stats::Samples;

/// Streams in flight.
const STREAMS: &str = "32";
const OHA_VERSION: &str = "1.16.0";

/// An installed load generator.
#[derive(Clone, Debug)]
pub(crate) enum Generator {
    /// With where its libraries are, if not where the system looks.
    H2load {
        program: PathBuf,
        libraries: Option<PathBuf>,
    },
    Oha {
        program: PathBuf,
    },
}

/// How requests were answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answers {
    /// With a status 2xx.
    pub(crate) good: u64,
    /// With a status 4xx.
    pub(crate) refused: u64,
    /// Otherwise or not at all.
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

/// Calls of an API, over one HTTP/2 connection.
#[derive(Clone, Debug)]
pub(crate) struct Calls {
    pub(crate) method: &'static str,
    pub(crate) key: String,
    pub(crate) in_flight: usize,
    pub(crate) number: usize,
    pub(crate) what: What,
}

/// What is called.
#[derive(Clone, Debug)]
pub(crate) enum What {
    /// Each of these addresses once, in this order.
    Addresses(Vec<String>),
    /// One address, with JSON chosen at random from these lines.
    Bodies(String, Vec<String>),
}

/// What calls took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Took {
    /// From the first question to the last answer; of oha, with connecting.
    pub(crate) seconds: f64,
    /// Of a hundred calls one took longer.
    pub(crate) p99_ms: f64,
}

impl Generator {
    /// Finds or installs one, without root.
    pub(crate) fn install() -> Result<Self> {
        if let Some(program) = tools::on_path("h2load") {
            return Ok(Self::H2load { program, libraries: None });
        }
        from_debian().or_else(|why| {
            progress(&format!("h2load cannot be had ({why:#}); taking oha, which costs more itself"));
            Self::oha()
        })
    }

    /// The one that can send a body of its own with each call.
    pub(crate) fn oha() -> Result<Self> {
        Ok(Self::Oha { program: tools::on_path("oha").map_or_else(compiled_oha, Ok)? })
    }

    /// What it is, for the report.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::H2load { .. } => "h2load",
            Self::Oha { .. } => "oha",
        }
    }

    fn command(&self) -> Command {
        match self {
            Self::H2load { program, libraries } => {
                let mut command = Command::new(program);
                command.envs(libraries.as_ref().map(|directory| ("LD_LIBRARY_PATH", directory)));
                command
            }
            Self::Oha { program } => {
                let mut command = Command::new(program);
                command.args(["--no-tui", "--output-format", "json"]);
                command
            }
        }
    }

    /// Runs it; it ends with whoever waits for it.
    async fn run(&self, command: Command) -> Result<(Answers, String)> {
        let output = tokio::process::Command::from(command).kill_on_drop(true).output().await?;
        let why = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{} failed: {}", self.name(), why.trim());
        let output = String::from_utf8_lossy(&output.stdout).into_owned();
        let answers = match self {
            Self::H2load { .. } => h2load_answers(&output),
            Self::Oha { .. } => oha_answers(&output),
        };
        let answers = answers.with_context(|| not_understood(&output))?;
        Ok((answers, output))
    }

    /// Sends so many requests over one connection to the addresses of a file, one a line, from one core: in turn, or by lot if
    /// it is oha.
    pub(crate) async fn send(&self, requests: u64, addresses: &Path, core: usize) -> Result<Answers> {
        let mut command = self.sending(requests, 1, addresses);
        machine::pin(&mut command, core)?;
        Ok(self.run(command).await?.0)
    }

    /// The same over several connections, from any core.
    pub(crate) async fn spread(&self, requests: u64, connections: usize, addresses: &Path) -> Result<Answers> {
        Ok(self.run(self.sending(requests, connections, addresses)).await?.0)
    }

    fn sending(&self, requests: u64, connections: usize, addresses: &Path) -> Command {
        let (requests, connections) = (requests.to_string(), connections.to_string());
        let mut command = self.command();
        command.args(["-n", &requests, "-c", &connections]);
        match self {
            Self::H2load { .. } => command.args(["-m", STREAMS, "-i"]),
            Self::Oha { .. } => command.args(["--http2", "-p", STREAMS, "--urls-from-file"]),
        };
        command.arg(addresses);
        command
    }

    /// Keeps requests flowing for a while.
    pub(crate) async fn flow(&self, flow: &Flow) -> Result<Answers> {
        let mut command = self.command();
        let (connections, seconds) = (flow.connections.to_string(), flow.lasts.as_secs());
        let (header, address) = (format!("x-api-key: {}", flow.key), format!("http://{}/", flow.to));
        command.args(["-c", &connections, "-H", &header]);
        match self {
            Self::H2load { .. } => {
                let by_each = (flow.per_second / flow.connections.max(1)).to_string();
                command.args(["--h1", "--rps", &by_each, "-D", &seconds.to_string()])
            }
            Self::Oha { .. } => {
                command.args(["-q", &flow.per_second.to_string(), "-z", &format!("{seconds}s")]);
                // Or else it counts what is under way at the end as failed.
                command.arg("--wait-ongoing-requests-after-deadline")
            }
        };
        command.arg(&address);
        Ok(self.run(command).await?.0)
    }

    /// Calls, and fails if not all calls succeed.
    pub(crate) async fn call(&self, calls: &Calls) -> Result<Took> {
        let home = TempDir::with_prefix("portcullis-bench-")?;
        let (list, log) = (home.path().join("list"), home.path().join("log"));
        let (number, in_flight) = (calls.number.to_string(), calls.in_flight.to_string());
        let mut command = self.command();
        command.args(["-c", "1", "-n", &number, "-H", &format!("x-api-key: {}", calls.key)]);
        match (self, &calls.what) {
            (Self::H2load { .. }, What::Addresses(addresses)) => {
                std::fs::write(&list, addresses.join("\n"))?;
                command.args(["-m", &in_flight, "-H", &format!(":method: {}", calls.method), "-i"]).arg(&list);
                command.arg(format!("--log-file={}", log.display()));
            }
            (Self::Oha { .. }, What::Bodies(address, bodies)) => {
                std::fs::write(&list, bodies.join("\n"))?;
                command.args(["--http2", "-p", &in_flight, "-m", calls.method, "-T", "application/json", "-Z"]);
                command.arg(&list).arg(address);
            }
            _ => bail!("{} cannot make such calls", self.name()),
        }
        let (answers, output) = self.run(command).await?;
        let expected = Answers { good: calls.number as u64, refused: 0, failed: 0 };
        ensure!(answers == expected, "{}: {answers:?} instead of {expected:?}", calls.method);
        let took = match self {
            Self::H2load { .. } => h2load_took(&std::fs::read_to_string(&log)?),
            Self::Oha { .. } => oha_took(&output),
        };
        took.with_context(|| not_understood(&output))
    }
}

fn not_understood(output: &str) -> String {
    format!("the load generator says what cannot be understood:\n{output}")
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

/// Of its log, a line a request: when it was sent, in microseconds, the status, and how many microseconds it took.
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

/// Debian's package and what it needs beside the usual, unpacked into target/tools. Nothing of it is installed.
fn from_debian() -> Result<Generator> {
    const PACKAGES: [&str; 5] = ["nghttp2-client", "libnghttp2-14", "libev4", "libc-ares2", "libjemalloc2"];
    let home = tools::tools().join("h2load");
    let (program, done) = (home.join("usr/bin/h2load"), home.join(".complete"));
    let libraries = || {
        let directories = std::fs::read_dir(home.join("usr/lib")).ok()?;
        directories.flatten().map(|entry| entry.path()).find(|path| path.join("libev.so.4").exists())
    };
    if !done.is_file() {
        for needed in ["apt-get", "dpkg-deb"] {
            if tools::on_path(needed).is_none() {
                bail!("it is in no package that can be unpacked here: no {needed}");
            }
        }
        progress(&format!("unpacking {} into {}", PACKAGES.join(", "), home.display()));
        let packages = home.join("packages");
        std::fs::create_dir_all(&packages)?;
        let mut download = Command::new("apt-get");
        // The sandbox user of apt need not be able to enter this directory.
        download.args(["download", "--quiet", "-o", "APT::Sandbox::User=root"]).args(PACKAGES).current_dir(&packages);
        read(download).context("run `apt-get update`, or install nghttp2-client")?;
        for package in std::fs::read_dir(&packages)? {
            let mut unpack = Command::new("dpkg-deb");
            unpack.arg("--extract").arg(package?.path()).arg(&home);
            read(unpack)?;
        }
        let mut version = Command::new(&program);
        version.arg("--version").envs(libraries().map(|directory| ("LD_LIBRARY_PATH", directory)));
        read(version)?;
        std::fs::write(done, [])?;
    }
    Ok(Generator::H2load { program, libraries: libraries() })
}

fn compiled_oha() -> Result<PathBuf> {
    let home = tools::tools().join(format!("oha-{OHA_VERSION}"));
    let program = home.join("bin/oha");
    if !program.is_file() {
        progress(&format!("installing oha {OHA_VERSION} into {} (some minutes)", home.display()));
        let mut install = cargo(&["install", "oha", "--version", OHA_VERSION, "--locked", "--root"]);
        install.arg(&home).env("CARGO_TARGET_DIR", tools::tools().join("build"));
        run(install).context("no load generator: put h2load (of nghttp2) or oha on the path")?;
    }
    ensure!(program.is_file(), "{} is missing after its installation", program.display());
    Ok(program)
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
