//! README and the book: their commands print what the pages say, and their lists have what the programs have.
//!
//! The commands of a page are pasted whole into interactive shells, as they stand, several times on the same stack.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use contract::outcome::Outcome;
use portcullis_tests::stack::Stack;
use portcullis_tests::{http, paths, shell, tools};
use serde_json::{Value, json};

/// What a shell prints behind each block, before the status of its last command.
const MARK: &str = "--- end of block: ";
/// Makes bash and zsh note that a command of a block failed, unless it was a condition.
const NOTE_FAILURES: &str = "FAILED=; trap 'FAILED=\" after a command that failed\"' ERR\n";
/// Kinds of blocks that are for the reader only.
const EXAMPLES: [&str; 4] = ["", "shell", "yaml", "json"];
/// No page takes longer, on a busy machine either.
const LONGEST: Duration = Duration::from_secs(300);

/// A block of commands, and what the page says that it prints.
#[derive(Debug, PartialEq, Eq)]
struct Block {
    commands: String,
    expected: String,
}

/// The blocks of a page: each ```` ```sh ```` with the ```` ```text ```` that follows it, if one does. No test runs blocks of
/// [`EXAMPLES`].
fn blocks(page: &str) -> Result<Vec<Block>> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut expects = false;
    let mut rest = page;
    while let Some((_, opened)) = rest.split_once("\n```") {
        let (kind, body) = opened.split_once('\n').context("a fence without a line")?;
        let (text, after) = body.split_once("```").context("a block without an end")?;
        match (kind, blocks.last_mut()) {
            ("sh", _) => blocks.push(Block { commands: text.to_owned(), expected: String::new() }),
            ("text", Some(block)) if expects => text.clone_into(&mut block.expected),
            (kind, _) if EXAMPLES.contains(&kind) => {}
            _ => bail!("a block of the kind {kind:?} that belongs to no commands: {text}"),
        }
        expects = kind == "sh";
        rest = after;
    }
    Ok(blocks)
}

/// The shells to paste into, one after the other: bash twice and, where there is one, zsh. They are interactive: zsh then
/// takes a comment for arguments, and bash gives an exclamation mark its meaning.
fn shells() -> Vec<Command> {
    let mut shells = Vec::new();
    let bash = ("bash", &["--norc", "--noprofile", "-i", "+m"][..]);
    for (name, arguments) in [bash, bash, ("zsh", &["-f", "-i", "+m"])] {
        // A machine without bash fails when the shell is started.
        if name == "zsh" && tools::on_path(name).is_none() {
            println!("not pasted into zsh: this machine has none");
            continue;
        }
        let mut shell = Command::new(name);
        shell.args(arguments).env("PS1", "").env("HISTFILE", "/dev/null");
        shells.push(shell);
    }
    shells
}

/// Pastes all blocks into a shell. Returns what it printed for each, with the status of the block, and its errors.
async fn paste(mut shell: Command, home: &Path, blocks: &[Block]) -> Result<(Vec<(String, String)>, String)> {
    let mut pasted = NOTE_FAILURES.to_owned();
    for block in blocks {
        pasted.push_str(&block.commands);
        writeln!(pasted, "echo '{MARK}'$?$FAILED; FAILED=")?;
    }
    let pasted_file = home.join("pasted");
    std::fs::write(&pasted_file, pasted)?;
    // Commands that read the standard input would eat what was pasted behind them, as they would in a terminal.
    shell.current_dir(home).stdin(std::fs::File::open(pasted_file)?);
    let mut shell = tokio::process::Command::from(shell);
    shell.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = tokio::time::timeout(LONGEST, shell.output()).await.context("the shell did not end")??;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok((ended_blocks(&printed), String::from_utf8_lossy(&output.stderr).into_owned()))
}

/// What each block printed, and its status.
fn ended_blocks(mut printed: &str) -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    while let Some((block, after)) = printed.split_once(MARK) {
        let (status, rest) = after.split_once('\n').unwrap_or((after, ""));
        blocks.push((block.to_owned(), status.to_owned()));
        printed = rest;
    }
    blocks
}

async fn demo_stack() -> Result<Stack> {
    Stack::builder().control_plane_arguments(&["--usage-event-interval", "1s"]).start().await
}

/// A stack, and what the commands of a page find: `target/up/env`, `target/debug/portcullis` and the directory `docs`.
async fn shell_home(stack: &Stack) -> Result<PathBuf> {
    let home = stack.directory();
    std::fs::create_dir_all(home.join("target/up"))?;
    std::fs::create_dir_all(home.join("target/debug"))?;
    symlink(paths::control_plane(), home.join("target/debug/portcullis"))?;
    symlink(paths::workspace().join("docs"), home.join("docs"))?;
    let admin = stack.control_plane.settings().admin_key;
    let (api, gate) = (stack.control_plane.address(), stack.envoy().address());
    shell::write_environment(&home.join("target/up/env"), api, gate, &admin)?;
    Ok(home)
}

/// What one run leaves behind must not change what the next one prints.
async fn prints_what_it_says(name: &str, home: &Path, blocks: &[Block]) -> Result<()> {
    for (run, shell) in (1..).zip(shells()) {
        let program = shell.get_program().to_string_lossy().into_owned();
        let (printed, errors) = paste(shell, home, blocks).await?;
        for (number, block) in blocks.iter().enumerate() {
            let (got, status) =
                printed.get(number).map_or(("nothing at all", "none"), |(got, status)| (got.as_str(), status.as_str()));
            ensure!(
                got == block.expected && status == "0",
                "{name}, run {run} in {program}: the commands\n{}printed\n{got}with status {status}, and not\n{}with \
                 status 0\nerrors:\n{errors}",
                block.commands,
                block.expected,
            );
        }
    }
    Ok(())
}

fn page(file: &str) -> Result<String> {
    std::fs::read_to_string(paths::workspace().join(file)).with_context(|| format!("{file} cannot be read"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_of_every_tutorial_print_what_the_page_says_any_number_of_times_in_bash_and_zsh() -> Result<()> {
    let stack = demo_stack().await?;
    let home = shell_home(&stack).await?;
    let (mut tutorials, mut expecting) = (0, 0);
    for path in paths::markdown_below(&paths::workspace().join("docs/src"))? {
        let page = std::fs::read_to_string(&path)?;
        if !page.contains("\n```sh\n") {
            continue;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let blocks = blocks(&page).with_context(|| name.clone())?;
        prints_what_it_says(&name, &home, &blocks).await?;
        tutorials += 1;
        expecting += blocks.iter().filter(|block| !block.expected.is_empty()).count();
    }
    ensure!(tutorials >= 10 && expecting >= 45, "only {tutorials} pages and {expecting} blocks say what they print");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_of_the_readme_print_what_it_says_any_number_of_times_in_bash_and_zsh() -> Result<()> {
    let stack = demo_stack().await?;
    let home = shell_home(&stack).await?;
    let blocks = blocks(&page("README.md")?)?;
    let expecting = blocks.iter().filter(|block| !block.expected.is_empty()).count();
    ensure!(expecting == 4, "{expecting} blocks say what they print");
    prints_what_it_says("README.md", &home, &blocks).await?;
    the_page_of_metrics_has_what_the_programs_show(&stack).await
}

/// What stands in backquotes in the first cell of each row of the tables, the parts of a list each by itself.
fn first_cells(page: &str) -> BTreeSet<String> {
    let cells = page.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    let cells = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    cells.map(str::to_owned).collect()
}

/// Fails if a page lacks something that the programs have, or has something that they lack.
fn same(page: &str, listed: &BTreeSet<String>, shown: &BTreeSet<String>) -> Result<()> {
    let missing: Vec<_> = shown.difference(listed).collect();
    let invented: Vec<_> = listed.difference(shown).collect();
    ensure!(missing.is_empty() && invented.is_empty(), "{page} lacks {missing:?}, and invents {invented:?}");
    Ok(())
}

async fn the_page_of_metrics_has_what_the_programs_show(stack: &Stack) -> Result<()> {
    let file = "docs/src/reference/metrics.md";
    let page = page(file)?;
    let mut listed = first_cells(&page);
    listed.retain(|cell| cell.starts_with("portcullis_") || cell.starts_with("wasmcustom."));
    let of_envoy = listed.split_off("wasmcustom.");
    // Distributions are shown once they have a value.
    let limits = json!([{"name": "hour", "requests": 9, "window_seconds": 3_600}]);
    let body = json!({"email": "metrics@example.com", "name": "Limited", "rate_limits": limits});
    let (_, key) = stack.rest().create_with(body).await?;
    stack.in_step().await?;
    http::send(stack.envoy().address(), http::get_request("/orders", Some(&key))?).await?;
    let shown = http::get(stack.control_plane.address(), "/metrics").await?;
    let shown = String::from_utf8_lossy(&shown.body).into_owned();
    let types = shown.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let metrics: BTreeSet<_> = types.filter(|name| name.starts_with("portcullis_")).map(str::to_owned).collect();
    ensure!(metrics.len() > 20, "{metrics:?}");
    // A metric with labels is shown once it has a value.
    let is_labelled = |name: &str| {
        let row = page.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        row.and_then(|row| row.split('|').nth(3)).is_some_and(|labels| labels.contains('`'))
    };
    listed.retain(|name| metrics.contains(name) || !is_labelled(name));
    same(file, &listed, &metrics)?;
    let mut statistics = BTreeSet::new();
    for (statistic, _) in stack.envoy().stats("wasmcustom.portcullis.").await? {
        let kinds = ["decisions", "shadow_decisions"].map(|kind| format!("wasmcustom.portcullis.{kind}."));
        let outcome = kinds.iter().find(|kind| statistic.starts_with(*kind)).map(|kind| format!("{kind}<code>_total"));
        statistics.insert(outcome.unwrap_or(statistic));
    }
    same(file, &of_envoy, &statistics)
}

#[test]
fn the_page_of_outcomes_has_every_outcome_with_its_status_and_no_other() -> Result<()> {
    let file = "docs/src/reference/outcomes.md";
    let page = page(file)?;
    for outcome in Outcome::ALL {
        let status = outcome.refusal().map(|refusal| format!(" {} |", refusal.status)).unwrap_or_default();
        let row = format!("| `{}` |{status}", outcome.name());
        ensure!(page.contains(&row), "{file} does not have {row}");
    }
    let names = Outcome::ALL.iter().map(|outcome| outcome.name().to_owned()).collect();
    let listed =
        first_cells(&page).into_iter().filter(|cell| cell.bytes().all(|b| b == b'_' || b.is_ascii_lowercase()));
    same(file, &listed.collect(), &names)
}

/// What the control plane prints.
fn output_of(arguments: &[&str]) -> Result<String> {
    let output = Command::new(paths::control_plane()).args(arguments).output()?;
    ensure!(output.status.success(), "{arguments:?} failed");
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn the_page_of_settings_has_every_flag_of_the_control_plane_and_no_other() -> Result<()> {
    let file = "docs/src/operating/control-plane.md";
    let help = output_of(&["serve", "--help"])?;
    let flags =
        help.lines().filter_map(|line| Some(format!("--{}", line.trim().strip_prefix("--")?.split(' ').next()?)));
    let flags: BTreeSet<_> = flags.collect();
    ensure!(flags.len() > 20, "{flags:?}");
    let listed = first_cells(&page(file)?).into_iter().filter(|cell| cell.starts_with("--"));
    same(file, &listed.collect(), &flags)
}

/// The routes of the page's tables, each with its method: `GET /v1/roles`, `GET`, `PUT /v1/roles/{name}` are three.
fn routes(page: &str) -> Result<BTreeSet<String>> {
    let mut routes = BTreeSet::new();
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let cell = line.split('|').nth(1).context("a row without a cell")?;
        let mut methods = Vec::new();
        for part in cell.split('`').skip(1).step_by(2) {
            let (method, path) = part.split_once(' ').unwrap_or((part, ""));
            methods.push(method);
            if !path.is_empty() {
                routes.extend(methods.drain(..).map(|method| format!("{method} {path}")));
            }
        }
        ensure!(methods.is_empty(), "{cell} names methods without a path");
    }
    Ok(routes)
}

#[test]
fn the_page_of_the_rest_api_has_every_route_with_its_method_and_no_other() -> Result<()> {
    let file = "docs/src/reference/rest-api.md";
    let document: Value = serde_json::from_str(&output_of(&["openapi"])?)?;
    let mut documented = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().context("no paths")? {
        let methods = methods.as_object().context("no methods")?.keys().filter(|key| *key != "parameters");
        documented.extend(methods.map(|method| format!("{} {path}", method.to_uppercase())));
    }
    // The page lists probes in a sentence.
    for probe in ["GET /healthz", "GET /readyz"] {
        ensure!(documented.remove(probe), "{probe} is not in the document");
    }
    same(file, &routes(&page(file)?)?, &documented)
}

#[test]
fn routes_of_one_path_may_share_it() -> Result<()> {
    let page = "| `GET /a`, `GET`, `PUT /a/{id}` | what |\n| `DELETE /b` | `GET /c` |\n";
    let expected = ["DELETE /b", "GET /a", "GET /a/{id}", "PUT /a/{id}"].map(str::to_owned);
    assert_eq!(routes(page)?, BTreeSet::from(expected));
    assert!(routes("| `GET` | what |\n").is_err());
    Ok(())
}

#[test]
fn commands_and_what_they_print_are_told_apart() -> Result<()> {
    let page = "a\n```sh\none\n```\nb\n\n```text\n1\n```\n\n```yaml\nc: d\n```\n\n```sh\ntwo\n```\n";
    let block = |commands: &str, expected: &str| Block { commands: commands.into(), expected: expected.into() };
    assert_eq!(blocks(page)?, [block("one\n", "1\n"), block("two\n", "")]);
    for malformed in ["\n```text\n1\n```\n", "\n```sh\n", "\n```sh\n1\n```\n\n```yaml\n2\n```\n\n```text\n3\n```\n"] {
        assert!(blocks(malformed).is_err(), "{malformed}");
    }
    Ok(())
}
