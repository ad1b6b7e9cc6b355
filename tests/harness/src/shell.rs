//! The file that `cargo xtask up` writes for shells: addresses of the stack, and the admin key.

use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use contract::key::Secret;

/// Writes the file, which only its owner can read: `API` is the URL of the REST API, `GATE` that of Envoy, `ADMIN` the admin
/// key.
pub fn write_environment(file: &Path, api: SocketAddr, gate: SocketAddr, admin: &Secret) -> Result<()> {
    write_secret(file, &format!("API='http://{api}'\nGATE='http://{gate}'\nADMIN='{}'\n", admin.reveal()))
}

/// Writes a file that only its owner can read.
pub fn write_secret(file: &Path, text: &str) -> Result<()> {
    // A file that was there before could have another mode.
    let _ = std::fs::remove_file(file);
    let opened = File::options().write(true).create_new(true).mode(0o600).open(file);
    let written = opened.and_then(|mut opened| opened.write_all(text.as_bytes()));
    written.with_context(|| format!("cannot write {}", file.display()))
}
