//! README's tour with curl does what it says: each line runs as it stands there, and its answer has in it what stands behind
//! the arrow.

use std::fmt::Write;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use portcullis_tests::paths;
use portcullis_tests::policies;
use portcullis_tests::stack::Stack;

/// A line that tells what to expect is tried until it is so: changes take some milliseconds, counts a quarter of a second.
const TRY: &str = r#"
try() {
  for _ in $(seq 200); do
    got=$(eval "$2" 2>&1) || true
    case "$got" in *"$1"*) return 0 ;; esac
    sleep 0.1
  done
  printf 'in vain for %s from: %s\nit gave: %s\n' "$1" "$2" "$got" >&2
  exit 1
}
"#;

/// The commands of the tour, as one program. The number of lines that expect something beside it.
fn program(readme: &str) -> Result<(String, usize)> {
    let (_, tour) = readme.split_once("<!-- tour -->").context("README has no tour")?;
    let (tour, _) = tour.split_once("<!-- end of the tour -->").context("README's tour has no end")?;
    let blocks = tour.split("```sh\n").skip(1).filter_map(|block| block.split("```").next());
    let (mut program, mut expected) = (format!("set -euo pipefail\n{TRY}"), 0);
    let mut command = String::new();
    for line in blocks.flat_map(str::lines) {
        let (text, expectation) = match line.split_once("# → ") {
            Some((text, expectation)) => (text.trim_end(), Some(expectation.trim())),
            None => (line, None),
        };
        command.push_str(text);
        command.push('\n');
        if text.ends_with('|') || text.ends_with('\\') {
            continue;
        }
        match expectation {
            None => program.push_str(&command),
            Some(expectation) => {
                expected += 1;
                writeln!(program, "try {} {}", quoted(expectation), quoted(command.trim_end()))?;
            }
        }
        command.clear();
    }
    Ok((program, expected))
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_of_the_tour_in_the_readme_does_what_it_says() -> Result<()> {
    let (plugin, routes) = policies::for_envoy()?;
    let file = policies::file();
    let arguments = [
        "--api-rate-limit",
        "10000",
        "--api-burst",
        "20000",
        "--usage-event-seconds",
        "1",
        "--policies",
        file.to_str().context("a path")?,
    ];
    let mut builder = Stack::builder().plugin(&plugin.into()).control_plane_arguments(&arguments);
    for (prefix, policy) in &routes {
        builder = builder.route(prefix, policy);
    }
    let stack = builder.start().await?;
    let readme = std::fs::read_to_string(paths::workspace().join("README.md"))?;
    let (program, expected) = program(&readme)?;
    ensure!(expected > 40, "the tour expects something of {expected} lines only");
    let program = program
        .replace("http://127.0.0.1:8081", &format!("http://{}", stack.control_plane.address()))
        .replace("http://127.0.0.1:10000", &format!("http://{}", stack.envoy().address()))
        .replace("$(cat target/up/admin.key)", stack.control_plane.settings().admin_key.reveal());
    let mut bash = Command::new("bash");
    bash.arg("-c").arg(program);
    let output = tokio::task::spawn_blocking(move || bash.output()).await??;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{told}\nEnvoy's log ends:\n{}", stack.envoy().log().tail(5));
    Ok(())
}
