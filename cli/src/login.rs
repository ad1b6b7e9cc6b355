//! `portcullis login` and `logout`: a key for further commands, in a file that its user alone can read.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::CommandError;
use crate::server::Server;

/// The environment variable with the path of the file.
const FILE: &str = "PORTCULLIS_LOGIN_FILE";

/// Store a key for further commands. Prompts for it, or reads it from standard input
#[derive(Args, Clone, Debug)]
pub struct LoginCommand {
    #[command(flatten)]
    server: Server,
}

/// A control plane, and the key that its user calls it with.
#[derive(Deserialize, Serialize)]
pub struct Login {
    /// URL of the control plane.
    pub server: String,
    /// The key.
    pub key: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Login({})", self.server)
    }
}

impl LoginCommand {
    /// Reads a key, tries it, and stores it.
    ///
    /// # Errors
    /// Each variant of [`CommandError`].
    pub fn run(&self, input: &mut impl Read, out: &mut impl Write) -> Result<(), CommandError> {
        // A login that cannot be read is replaced.
        let server = self.server.url(Login::read().ok().flatten().as_ref());
        let key = if std::io::stdin().is_terminal() {
            rpassword::prompt_password(format!("Key for {server}: "))?
        } else {
            let mut text = String::new();
            input.read_to_string(&mut text)?;
            text.lines().next().unwrap_or_default().to_owned()
        };
        let key = key.trim().to_owned();
        self.server.client_with(server.clone(), key.clone())?.get("/v1/keys", &[("limit", "1")])?;
        let file = Login { server, key }.write()?;
        writeln!(out, "The key works. It is stored in {}; portcullis logout removes it.", file.display())?;
        Ok(())
    }
}

/// Removes the stored key.
///
/// # Errors
/// [`CommandError::Invalid`] if the file cannot be removed.
pub fn log_out(out: &mut impl Write) -> Result<(), CommandError> {
    let file = path()?;
    match fs::remove_file(&file) {
        Ok(()) => writeln!(out, "Removed {}.", file.display())?,
        Err(error) if error.kind() == ErrorKind::NotFound => writeln!(out, "There is no login.")?,
        Err(error) => return Err(CommandError::Invalid(format!("{}: {error}", file.display()))),
    }
    Ok(())
}

impl Login {
    /// The stored login, if there is one.
    ///
    /// # Errors
    /// [`CommandError::Invalid`] if the file cannot be read.
    pub fn read() -> Result<Option<Self>, CommandError> {
        let Ok(file) = path() else { return Ok(None) };
        match fs::read_to_string(&file) {
            Ok(text) => serde_json::from_str(&text).map(Some).map_err(|_| {
                let file = file.display();
                CommandError::Invalid(format!("{file}: is not a login; run portcullis logout and portcullis login"))
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(CommandError::Invalid(format!("{}: {error}", file.display()))),
        }
    }

    fn write(&self) -> Result<PathBuf, CommandError> {
        let file = path()?;
        let failed = |error: std::io::Error| CommandError::Invalid(format!("{}: {error}", file.display()));
        if let Some(directory) = file.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
        }
        // A new file, since one that exists may be readable by others.
        match fs::remove_file(&file) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let mut opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file).map_err(failed)?;
        opened.write_all(&serde_json::to_vec(self).unwrap_or_default()).map_err(failed)?;
        Ok(file)
    }
}

fn path() -> Result<PathBuf, CommandError> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let file = || {
        Some(
            variable("XDG_CONFIG_HOME")
                .or_else(|| Some(variable("HOME")?.join(".config")))?
                .join("portcullis/login.json"),
        )
    };
    let none = || CommandError::Invalid(format!("there is no home directory for the login: set {FILE} to a path"));
    variable(FILE).or_else(file).ok_or_else(none)
}
