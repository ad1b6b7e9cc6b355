//! The binary `portcullis`. It reads the command line and runs the command. An error is one line.

#![forbid(unsafe_code)]

use std::alloc::System;
use std::fs::File;
use std::io::{BufReader, IsTerminal, Read, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};
use contract::key::KeyKind;
use control_plane::audit::Actor;
use control_plane::change::{FeedWaker, Writer};
use control_plane::config::{Admin, Cli, Command, Keys, OPERATOR, Usage, given_pepper};
use control_plane::domain::{ADMIN, Email, KeyName, SYNC, Scopes, default_expiry, parse_expiry};
use control_plane::error::ApiError;
use control_plane::keys::create;
use control_plane::keys::import::{Import, ImportReply};
use control_plane::keys::model::{CreatedKey, NewKey};
use control_plane::server::Failure;
use control_plane::server::schema::connect;
use control_plane::sync::feed;
use control_plane::{api, metering, server};
use portcullis_cli::CommandError;
use portcullis_cli::document::Document;
use portcullis_cli::login::log_out;
use portcullis_cli::operations;
use sqlx::PgPool;
use time::OffsetDateTime;
use zeroizing_alloc::ZeroAlloc;

/// Overwrites memory when it is freed, so that no key stays in it.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<System> = ZeroAlloc(System);

#[tokio::main]
async fn main() -> ExitCode {
    match start().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => match error.downcast::<clap::Error>() {
            Ok(error) if error.use_stderr() => {
                let _ = writeln!(std::io::stderr(), "portcullis: {}", one_line(&error.render().to_string()));
                ExitCode::from(2)
            }
            Ok(help) => help.exit(),
            Err(error) => {
                let _ = writeln!(std::io::stderr(), "portcullis: {error}");
                match error.downcast_ref() {
                    Some(CommandError::Different { .. }) => ExitCode::from(2),
                    _ => ExitCode::FAILURE,
                }
            }
        },
    }
}

/// Reads the command line and runs the command.
async fn start() -> Result<(), Failure> {
    let document = serde_json::to_value(api::openapi_document())?;
    let document = Document(&document);
    let mut command = operations::add_to(Cli::command(), document)?;
    let matches = command.try_get_matches_from_mut(std::env::args_os())?;
    if operations::run(&matches, document, &mut std::io::stdin(), &mut std::io::stdout())? {
        return Ok(());
    }
    match Cli::from_arg_matches(&matches)?.command {
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut command, "portcullis", &mut std::io::stdout());
            Ok(())
        }
        Command::Declarative(command) => Ok(command.run(document, api::declared::normalize, &mut std::io::stdout())?),
        other => run(other).await,
    }
}

async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Serve(settings) => server::serve(*settings).await,
        Command::Explain(explain) => Ok(explain.run(&mut std::io::stdin(), &mut std::io::stdout())?),
        Command::Login(login) => Ok(login.run(&mut std::io::stdin(), &mut std::io::stdout())?),
        Command::Logout => Ok(log_out(&mut std::io::stdout())?),
        Command::Doctor(doctor) => Ok(doctor.run(&mut std::io::stdout())?),
        Command::Api(api) => Ok(api.run(&mut std::io::stdin(), &mut std::io::stdout())?),
        Command::Completion { .. } | Command::Declarative(_) => {
            Err("internal error: the command is handled before".into())
        }
        Command::Openapi => print(&api::openapi_document().to_pretty_json()?),
        Command::Admin(Admin::CreateKey { database, scopes, name, email, expires_in, no_expiry }) => {
            let scopes = Scopes::parse(scopes).map_err(at("--scope"))?;
            let operators = scopes.as_slice().iter().all(|scope| [ADMIN, SYNC].contains(&scope.as_str()));
            let email = match &email {
                Some(email) => email,
                None if operators => OPERATOR,
                None => {
                    return Err("--email: is required, unless the only scopes are admin and sync".into());
                }
            };
            let now = OffsetDateTime::now_utc();
            let lifetime_s = expires_in.map(|duration| i64::try_from(duration.as_secs())).transpose()?;
            let expiry = parse_expiry(None, lifetime_s, now)?;
            let new = NewKey {
                expires_at: expiry.or(default_expiry(&scopes, now).filter(|_| !no_expiry)),
                scopes,
                ..NewKey::plain(
                    Email::parse(email).map_err(at("--email"))?,
                    KeyName::parse("name", &name).map_err(at("--name"))?,
                )
            };
            let writer = Writer::new(connect(&database).await?, FeedWaker::default());
            let created = writer.change(&Actor::system(), async |change| create::create(change, new).await).await?;
            let CreatedKey { key, secret, .. } = created;
            writeln!(std::io::stderr(), "created key {}; this is the only time it is shown:", key.id)?;
            print(secret.reveal())
        }
        Command::Admin(Admin::GenerateKey) => print(create::generate(KeyKind::Live)?.reveal()),
        Command::Admin(Admin::NewEpoch { database }) => {
            let epoch = feed::new_epoch(&connect(&database).await?).await?;
            print(&format!("the epoch is now {epoch}; every filter loads all keys again"))
        }
        Command::Keys(Keys::Import { source, dry_run, csv }) => {
            let (pool, pepper) = (connect(&source.database).await?, given_pepper()?);
            control_plane::keys::pepper::check(&pool, pepper.as_ref()).await?;
            let import = Import::new(Writer::new(pool, FeedWaker::default()), Actor::system(), pepper).dry_run(dry_run);
            let is_table = csv || source.file.extension().is_some_and(|kind| kind.eq_ignore_ascii_case("csv"));
            let import = if is_table { import.table() } else { import };
            import_keys(import, open(&source.file)?).await
        }
        Command::Usage(Usage::Import(source)) => {
            import_usage(&connect(&source.database).await?, open(&source.file)?).await
        }
    }
}

/// Opens a file, or standard input for `-`.
fn open(file: &Path) -> Result<Box<dyn Read>, String> {
    if file == Path::new("-") {
        return Ok(Box::new(std::io::stdin()));
    }
    let opened = File::open(file).map_err(|error| format!("{}: {error}", file.display()))?;
    Ok(Box::new(opened))
}

async fn import_usage(pool: &PgPool, log: impl Read) -> Result<(), Failure> {
    let imported = metering::import::import(pool, BufReader::new(log)).await?;
    for (line, why) in &imported.bad {
        writeln!(std::io::stderr(), "line {line}: {why}")?;
    }
    let metering::import::Imported { applied, known, bad, refused } = imported;
    if refused > bad.len() {
        writeln!(std::io::stderr(), "and {} more lines", refused - bad.len())?;
    }
    print(&format!("reports applied: {applied}, known before: {known}, lines refused: {refused}"))?;
    if refused == 0 { Ok(()) } else { Err("some lines were refused and not booked".into()) }
}

async fn import_keys(mut import: Import, mut lines: impl Read) -> Result<(), Failure> {
    let (mut piece, mut shown) = (vec![0; 64 * 1_024], (0, 0));
    let shows_progress = std::io::stderr().is_terminal();
    loop {
        let length = lines.read(&mut piece)?;
        if length == 0 || !import.take(piece.get(..length).unwrap_or_default()).await? {
            break;
        }
        let ImportReply { imported, failed, .. } = import.so_far();
        if shows_progress && (*imported, *failed) != shown {
            shown = (*imported, *failed);
            write!(std::io::stderr(), "\r{imported} keys imported, {failed} lines refused …")?;
        }
    }
    if shown != (0, 0) {
        writeln!(std::io::stderr())?;
    }
    let imported = import.finish().await?;
    for bad in &imported.errors {
        writeln!(std::io::stderr(), "line {}: {}: {}", bad.line, <&str>::from(bad.code), bad.reason)?;
    }
    print(&format!("keys imported: {}, lines refused: {}", imported.imported, imported.failed))?;
    if imported.failed == 0 { Ok(()) } else { Err("some lines were refused".into()) }
}

/// What is wrong with the command line, without the advice that follows it.
fn one_line(rendered: &str) -> String {
    let lines: Vec<_> = rendered.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    lines.join(" ").trim_start_matches("error: ").to_owned()
}

/// The error of a field, as that of a flag.
fn at(flag: &'static str) -> impl FnOnce(ApiError) -> String {
    move |error| match error {
        ApiError::Invalid { detail, .. } => format!("{flag}: {detail}"),
        other => other.to_string(),
    }
}

fn print(text: &str) -> Result<(), Failure> {
    writeln!(std::io::stdout(), "{text}")?;
    Ok(())
}
