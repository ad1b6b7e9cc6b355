//! The tours of README and docs/tour.md print the output that they show. Each page is pasted whole
//! into interactive shells, several times on the same stack.

use std::fmt::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portcullis_tests::stack::Stack;
use portcullis_tests::{paths, policies, shell, tools};

/// What a shell prints between two blocks.
const MARK: &str = "--- next block ---";
/// No page takes longer, on a busy machine either.
const LONGEST: Duration = Duration::from_secs(300);

/// A block of commands, and what the page says that it prints.
#[derive(Debug, PartialEq, Eq)]
struct Block {
    commands: String,
    expected: String,
}

/// The blocks of a page: each ```` ```sh ```` with the ```` ```text ```` that follows it, if one does.
fn blocks(page: &str) -> Result<Vec<Block>> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut rest = page;
    while let Some((_, opened)) = rest.split_once("\n```") {
        let (kind, body) = opened.split_once('\n').context("a fence without a line")?;
        let (text, after) = body.split_once("```").context("a block without an end")?;
        match (kind, blocks.last_mut()) {
            ("sh", _) => blocks.push(Block { commands: text.to_owned(), expected: String::new() }),
            ("text", Some(block)) if block.expected.is_empty() => text.clone_into(&mut block.expected),
            _ => anyhow::bail!("a block of the kind {kind:?} that belongs to no commands: {text}"),
        }
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

/// Pastes all blocks into a shell, and gives what it printed for each, and its errors.
async fn paste(mut shell: Command, home: &Path, blocks: &[Block]) -> Result<(Vec<String>, String)> {
    let mut pasted = String::new();
    for block in blocks {
        pasted.push_str(&block.commands);
        writeln!(pasted, "echo '{MARK}'")?;
    }
    let pasted_file = home.join("pasted");
    std::fs::write(&pasted_file, pasted)?;
    // Commands that read the standard input would eat what was pasted behind them, as they would in a terminal.
    shell.current_dir(home).stdin(std::fs::File::open(pasted_file)?);
    let mut shell = tokio::process::Command::from(shell);
    shell.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = tokio::time::timeout(LONGEST, shell.output()).await.context("the shell did not end")??;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let mark = format!("{MARK}\n");
    let printed = printed.split(&mark).map(str::to_owned).collect();
    Ok((printed, String::from_utf8_lossy(&output.stderr).into_owned()))
}

async fn demo_stack() -> Result<Stack> {
    let (plugin, routes) = policies::for_envoy()?;
    let file = policies::file();
    let arguments = ["--usage-event-seconds", "1", "--policies", file.to_str().context("a path")?];
    let mut builder = Stack::builder().plugin(&plugin.into()).control_plane_arguments(&arguments);
    for (prefix, policy) in &routes {
        builder = builder.route(prefix, policy);
    }
    builder.start().await
}

/// What one run leaves behind must not change what the next one prints.
async fn prints_what_it_says(page: &str, least: usize) -> Result<()> {
    let blocks = blocks(page)?;
    let expecting = blocks.iter().filter(|block| !block.expected.is_empty()).count();
    ensure!(expecting >= least, "only {expecting} blocks say what they print");
    let stack = demo_stack().await?;
    let home = stack.directory();
    std::fs::create_dir_all(home.join("target/up"))?;
    let admin = stack.control_plane.settings().admin_key;
    let (api, gate) = (stack.control_plane.address(), stack.envoy().address());
    shell::write_environment(&home.join("target/up/env"), api, gate, &admin)?;
    for (run, shell) in (1..).zip(shells()) {
        let name = shell.get_program().to_string_lossy().into_owned();
        let (printed, errors) = paste(shell, &home, &blocks).await?;
        for (number, block) in blocks.iter().enumerate() {
            let got = printed.get(number).map_or("nothing at all", String::as_str);
            ensure!(
                got == block.expected,
                "run {run} in {name}: the commands\n{}printed\n{got}and not\n{}\nerrors:\n{errors}",
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
async fn the_whole_tour_prints_what_it_says_any_number_of_times_in_bash_and_zsh() -> Result<()> {
    prints_what_it_says(&page("docs/tour.md")?, 14).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_steps_in_the_readme_print_what_they_say_any_number_of_times_in_bash_and_zsh() -> Result<()> {
    let readme = page("README.md")?;
    let (_, steps) = readme.split_once("<!-- first steps -->").context("README has no first steps")?;
    let (steps, _) = steps.split_once("<!-- end of the first steps -->").context("the first steps have no end")?;
    prints_what_it_says(steps, 4).await
}

#[test]
fn commands_and_what_they_print_are_told_apart() -> Result<()> {
    let page = "a\n```sh\none\n```\nb\n\n```text\n1\n```\n\n```sh\ntwo\n```\n";
    let block = |commands: &str, expected: &str| Block { commands: commands.into(), expected: expected.into() };
    assert_eq!(blocks(page)?, [block("one\n", "1\n"), block("two\n", "")]);
    assert!(blocks("\n```text\n1\n```\n").is_err() && blocks("\n```sh\n").is_err());
    Ok(())
}
