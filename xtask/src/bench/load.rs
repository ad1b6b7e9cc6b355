//! The load generator: h2load, of the path or unpacked from Debian's package; else oha, compiled by cargo. Requests go
//! over one HTTP/2 connection with many streams, so that Envoy is never idle and the generator costs little itself.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use portcullis_tests::tools;

use super::machine::{self, Cores};
use crate::output::progress;
use crate::run::{cargo, read, run};

/// Streams in flight.
const STREAMS: &str = "32";
const OHA_VERSION: &str = "1.16.0";

/// An installed load generator.
#[derive(Clone, Debug)]
pub(super) struct Generator {
    kind: Kind,
    core: usize,
}

#[derive(Clone, Debug)]
enum Kind {
    H2load { program: PathBuf, libraries: Option<PathBuf> },
    Oha { program: PathBuf },
}

/// How requests were answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answers {
    /// With a status 2xx.
    pub(super) good: u64,
    /// With a status 4xx.
    pub(super) refused: u64,
    /// Otherwise or not at all.
    pub(super) failed: u64,
}

impl Generator {
    /// Finds or installs one, without root.
    pub(super) fn install(cores: Cores) -> Result<Self> {
        let core = cores.load;
        if let Some(program) = tools::on_path("h2load") {
            return Ok(Self { kind: Kind::H2load { program, libraries: None }, core });
        }
        let kind = match from_debian() {
            Ok(kind) => kind,
            Err(why) => {
                progress(&format!("h2load cannot be had ({why:#}); taking oha, which costs more itself"));
                let program = tools::on_path("oha").map_or_else(compiled_oha, Ok)?;
                Kind::Oha { program }
            }
        };
        Ok(Self { kind, core })
    }

    /// What it is, for the report.
    pub(super) const fn name(&self) -> &'static str {
        match self.kind {
            Kind::H2load { .. } => "h2load",
            Kind::Oha { .. } => "oha",
        }
    }

    /// Sends so many requests to the addresses of a file, one a line, in turn.
    pub(super) async fn send(&self, requests: u64, addresses: &Path) -> Result<Answers> {
        let requests = requests.to_string();
        let mut command = match &self.kind {
            Kind::H2load { program, libraries } => {
                let mut command = Command::new(program);
                command.args(["-n", &requests, "-c", "1", "-m", STREAMS, "-i"]).arg(addresses);
                command.envs(libraries.as_ref().map(|directory| ("LD_LIBRARY_PATH", directory)));
                command
            }
            Kind::Oha { program } => {
                let mut command = Command::new(program);
                command.args(["--no-tui", "--output-format", "json", "--http2", "-c", "1", "-p", STREAMS]);
                command.args(["-n", &requests, "--urls-from-file"]).arg(addresses);
                command
            }
        };
        machine::pin(&mut command, self.core)?;
        let output = tokio::task::spawn_blocking(move || read(command)).await??;
        match self.kind {
            Kind::H2load { .. } => h2load_answers(&output),
            Kind::Oha { .. } => oha_answers(&output),
        }
        .with_context(|| format!("the load generator says what cannot be understood:\n{output}"))
    }
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

fn oha_answers(output: &str) -> Option<Answers> {
    let output: serde_json::Value = serde_json::from_str(output).ok()?;
    let sum = |name: &str, wanted: &dyn Fn(&str) -> bool| -> Option<u64> {
        let all = output[name].as_object()?;
        Some(all.iter().filter(|(name, _)| wanted(name)).filter_map(|(_, count)| count.as_u64()).sum())
    };
    let codes = "statusCodeDistribution";
    let (good, refused) = (sum(codes, &|code| code.starts_with('2'))?, sum(codes, &|code| code.starts_with('4'))?);
    let others = sum(codes, &|_| true)? - good - refused;
    Some(Answers { good, refused, failed: others + sum("errorDistribution", &|_| true)? })
}

/// Debian's package and what it needs beside the usual, unpacked into target/tools. Nothing of it is installed.
fn from_debian() -> Result<Kind> {
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
    Ok(Kind::H2load { program, libraries: libraries() })
}

fn compiled_oha() -> Result<PathBuf> {
    let home = tools::tools().join(format!("oha-{OHA_VERSION}"));
    let program = home.join("bin/oha");
    if !program.is_file() {
        progress(&format!("installing oha {OHA_VERSION} into {} (some minutes)", home.display()));
        let mut install =
            cargo(&["install", "oha", "--version", OHA_VERSION, "--no-default-features", "--locked", "--root"]);
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
    fn what_oha_says_is_understood() {
        let output = r#"{"statusCodeDistribution": {"200": 9, "401": 2, "503": 1}, "errorDistribution": {"reset": 4}}"#;
        assert_eq!(oha_answers(output), Some(Answers { good: 9, refused: 2, failed: 5 }));
        assert_eq!(oha_answers("no JSON"), None);
    }
}
