//! Commands that call the REST API of a control plane.

#![forbid(unsafe_code)]

pub mod api;
pub mod declarative;
pub mod doctor;
pub mod document;
pub mod explain;
pub mod login;
pub mod operations;
pub mod output;
pub mod server;

use std::io::Read;

/// Why a command failed, in one line.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// An argument or a setting is invalid, or names a key or a user that does not exist.
    #[error("{0}")]
    Invalid(String),
    /// The control plane could not be reached.
    #[error("{server} cannot be reached: {why}; give its URL with --server or PORTCULLIS_SERVER")]
    Unreachable {
        /// The URL of the control plane.
        server: String,
        /// What failed.
        why: String,
    },
    /// The control plane refused the request.
    #[error("the control plane answered {status}: {detail}")]
    Refused {
        /// The status of the answer.
        status: u16,
        /// The detail of the problem, with the field if it names one.
        detail: String,
    },
    /// Checks failed.
    #[error("{failed} of {checks} checks failed")]
    Unhealthy {
        /// How many failed.
        failed: usize,
        /// How many ran.
        checks: usize,
    },
    /// Files of declarations are invalid. What is wrong with them is written before.
    #[error("{problems} {} in the files", if *problems == 1 { "error" } else { "errors" })]
    InvalidFiles {
        /// How many errors there are.
        problems: usize,
    },
    /// Declarations differ from the control plane. The differences are written before.
    #[error("{differences} {}", if *differences == 1 { "difference" } else { "differences" })]
    Different {
        /// How many resources differ.
        differences: usize,
    },
    /// Another writer changed a resource between its comparison and the write.
    #[error(
        "{0} was changed by another writer after it was compared, and is left as it is; see portcullis diff, and apply again"
    )]
    Conflict(String),
    /// The result could not be written.
    #[error("the result could not be written: {0}")]
    Output(#[from] std::io::Error),
}

/// The text of a file, or of standard input for `-`.
fn read(file: &str, input: &mut impl Read) -> Result<String, CommandError> {
    if file == "-" {
        let mut text = String::new();
        input.read_to_string(&mut text)?;
        return Ok(text);
    }
    std::fs::read_to_string(file).map_err(|error| CommandError::Invalid(format!("{file}: {error}")))
}
