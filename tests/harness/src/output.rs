//! The terminal: results go to standard output, progress and errors to standard error. No other module prints.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "commands print")]

use std::process::ExitCode;

pub fn say(line: &str) {
    println!("{line}");
}

/// Prints what starts now, before it takes long.
pub fn progress(line: &str) {
    eprintln!("… {line}");
}

/// Prints an error with its causes, in one line unless it contains a log.
pub fn failed(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

/// Runs a command to its end, and turns an error into the exit code of the program.
pub fn exit_code(command: impl Future<Output = anyhow::Result<()>>) -> ExitCode {
    let runtime = crate::paths::find_workspace().and_then(|_| Ok(tokio::runtime::Runtime::new()?));
    match runtime.and_then(|runtime| runtime.block_on(command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}
