//! The load: requests by h2load, which sends each address of a list once, in order, and costs little
//! itself; and calls of the REST API with bodies that differ, by the client of the tests.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use hyper::{Method, Request};
use portcullis_harness::http::{Http2Connection, Outgoing};
use portcullis_harness::output::progress;
use portcullis_harness::stack::Stack;
use portcullis_harness::tools;
use serde_json::Value;

use crate::machine;
use crate::stats::Samples;

/// Streams in flight.
const STREAMS: &str = "32";
/// h2load and those of its libraries that a system may lack.
const DEBIAN_PACKAGES: [&str; 5] = ["nghttp2-client", "libnghttp2-14", "libev4", "libc-ares2", "libjemalloc2"];

/// h2load of nghttp2: of the path, or unpacked from Debian's package.
#[derive(Clone, Debug)]
pub(crate) struct H2load {
    program: PathBuf,
    /// The directory of its libraries, if it is unpacked.
    libraries: Option<PathBuf>,
}

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

/// Duration of calls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Took {
    /// From the first request to the last response.
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
        finish(command).await
    }

    /// The same over several connections, from any core.
    pub(crate) async fn spread(&self, requests: u64, connections: usize, addresses: &Path) -> Result<Answers> {
        finish(self.sending(requests, connections, addresses)).await
    }

    fn sending(&self, requests: u64, connections: usize, addresses: &Path) -> Command {
        let mut command = self.command();
        command.args(["-n", &requests.to_string(), "-c", &connections.to_string(), "-m", STREAMS, "-i"]).arg(addresses);
        command
    }

    /// Keeps requests with one key flowing for a while, over eight connections with HTTP/1.1.
    pub(crate) async fn flow(&self, to: SocketAddr, key: &str, per_second: u32, lasts: Duration) -> Result<Answers> {
        let mut command = self.command();
        command.args(["--h1", "-c", "8", "--rps", &(per_second / 8).to_string()]);
        command.args(["-D", &lasts.as_secs().to_string(), "-H", &format!("x-api-key: {key}")]);
        command.arg(format!("http://{to}/"));
        finish(command).await
    }
}

/// A call of the REST API, with the admin key.
pub(crate) fn rest_call(stack: &Stack, method: Method, path: &str, body: Option<&Value>) -> Result<Outgoing> {
    let address = format!("http://{}{path}", stack.control_plane.address());
    let key = stack.control_plane.settings().admin_key;
    let request = Request::builder().method(method).uri(address).header("x-api-key", key.reveal());
    Ok(match body {
        None => request.body(String::new().into())?,
        Some(body) => request.header("content-type", "application/json").body(body.to_string().into())?,
    })
}

/// Makes these calls over one HTTP/2 connection, a number of them at once. All must succeed.
pub(crate) async fn call(to: SocketAddr, at_once: usize, calls: Vec<Outgoing>) -> Result<Took> {
    let connection = Http2Connection::open(to).await?;
    let one = async |request| {
        let sent = Instant::now();
        let reply = connection.send(request).await?;
        ensure!((200..300).contains(&reply.status), "a call was answered with {}: {:?}", reply.status, reply.body);
        Ok(sent.elapsed())
    };
    let start = Instant::now();
    let latencies: Vec<Duration> = stream::iter(calls).map(one).buffer_unordered(at_once).try_collect().await?;
    let seconds = start.elapsed().as_secs_f64();
    let latencies = latencies.into_iter().map(|took| took.as_secs_f64() * 1e3).collect();
    Ok(Took { seconds, p99_ms: Samples::in_groups([latencies]).quantile(0.99) })
}

/// Runs h2load to its end. It is killed when the future is dropped.
async fn finish(command: Command) -> Result<Answers> {
    let output = tokio::process::Command::from(command).kill_on_drop(true).output().await?;
    ensure!(output.status.success(), "h2load failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    let output = String::from_utf8_lossy(&output.stdout);
    answers(&output).with_context(|| format!("cannot parse the output of h2load:\n{output}"))
}

/// `status codes: 10000 2xx, 0 3xx, 0 4xx, 0 5xx`
fn answers(output: &str) -> Option<Answers> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_of_h2load_gives_the_numbers_of_responses() {
        let output = "finished in 1.00s, 10.00 req/s\n\
            requests: 12 total, 12 started, 12 done, 9 succeeded, 3 failed, 0 errored, 0 timeout\n\
            status codes: 9 2xx, 0 3xx, 2 4xx, 1 5xx\n";
        assert_eq!(answers(output), Some(Answers { good: 9, refused: 2, failed: 1 }));
        assert_eq!(answers("status codes: 9 2xx"), None);
    }
}
