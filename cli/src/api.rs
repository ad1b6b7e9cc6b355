//! `portcullis api`: any request of the REST API.

use std::io::{Read, Write};

use clap::Args;
use serde_json::Value;

use crate::server::{Request, Server};
use crate::{CommandError, output};

/// Send a request to the REST API, and print the JSON of the answer
#[derive(Args, Clone, Debug)]
pub struct Api {
    /// The HTTP method
    #[arg(value_name = "METHOD")]
    method: String,
    /// Path and query, such as /v1/keys?limit=1
    #[arg(value_name = "PATH")]
    path: String,
    /// File with the body, - for standard input
    #[arg(long, value_name = "FILE")]
    body: Option<String>,
    /// Media type of the body
    #[arg(long, value_name = "TYPE", default_value = "application/json")]
    content_type: String,
    #[command(flatten)]
    server: Server,
}

impl Api {
    /// Sends the request, and writes the answer.
    ///
    /// # Errors
    /// Each variant of [`CommandError`].
    pub fn run(&self, input: &mut impl Read, out: &mut impl Write) -> Result<(), CommandError> {
        if !self.path.starts_with('/') {
            return Err(CommandError::Invalid("PATH: must begin with /, such as /v1/keys".into()));
        }
        let body = self.body.as_ref().map(|file| crate::read(file, input)).transpose()?;
        let request = Request {
            method: &self.method.to_uppercase(),
            body: body.map(String::into_bytes),
            content_type: &self.content_type,
            ..Request::get(&self.path)
        };
        match self.server.client()?.send(&request)?.body {
            Value::Null => {}
            answer => output::json(out, &answer)?,
        }
        Ok(())
    }
}
