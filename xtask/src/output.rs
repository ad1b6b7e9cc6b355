//! The only file that prints: results to standard output, progress and errors to standard error.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "printing is what a command is for")]

use std::process::ExitCode;

/// A result.
pub(crate) fn say(line: &str) {
    println!("{line}");
}

/// What is being done, before it takes long.
pub(crate) fn progress(line: &str) {
    eprintln!("… {line}");
}

/// What went wrong, with its causes, in one line unless a log follows.
pub(crate) fn failed(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}
