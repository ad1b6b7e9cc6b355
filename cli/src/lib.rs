//! Commands that call the REST API of a control plane.

#![forbid(unsafe_code)]

pub mod explain;
pub mod output;
pub mod server;

/// Why a command failed, in one line.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// An argument or a setting is invalid, or names a key that does not exist.
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
    /// The result could not be written.
    #[error("the result could not be written: {0}")]
    Output(#[from] std::io::Error),
}
