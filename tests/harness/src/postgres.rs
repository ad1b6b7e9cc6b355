//! A private PostgreSQL server, reached through a Unix socket, so that it needs no port. It can be stopped, killed and
//! restarted for tests, and kept between runs for `cargo xtask up`.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::unistd::{User, geteuid};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tempfile::TempDir;

use crate::cargo::read;
use crate::log::Log;
use crate::process::{Process, Signal};
use crate::tools::{self, Say, silently};

#[derive(Debug)]
pub struct Postgres {
    binaries: PathBuf,
    data: PathBuf,
    /// Not below the data: the path of a socket may be no longer than about 100 bytes.
    sockets: TempDir,
    pub log: Log,
    process: Mutex<Option<Process>>,
    /// The home of data that are deleted with the server.
    _temporary: Option<TempDir>,
    /// Commits wait for the disk. Without that they are faster and do not survive a crash of the machine, but one of the server
    /// alone.
    is_durable: bool,
}

impl Postgres {
    /// A private server, whose data are deleted with it.
    pub async fn private() -> Result<Self> {
        Self::temporary(false).await
    }

    /// The same, but commits wait for the disk as in production, for measurements.
    pub async fn durable() -> Result<Self> {
        Self::temporary(true).await
    }

    async fn temporary(is_durable: bool) -> Result<Self> {
        let home = TempDir::with_prefix("portcullis-pg-")?;
        open_to_all(home.path())?;
        let (data, log) = (home.path().join("data"), Log::create(&home.path().join("postgres.log"))?);
        Self::make(&data, Some(home), is_durable, log, &silently).await
    }

    /// A server on data that persist.
    pub async fn kept(data: &Path, log: Log, say: Say<'_>) -> Result<Self> {
        Self::make(data, None, true, log, say).await
    }

    async fn make(data: &Path, temporary: Option<TempDir>, is_durable: bool, log: Log, say: Say<'_>) -> Result<Self> {
        let binaries = tools::postgres(say)?;
        let sockets = TempDir::with_prefix("pcpg")?;
        open_to_all(sockets.path())?;
        if let Some(user) = substitute()? {
            std::fs::create_dir_all(data)?;
            ensure!(
                [0, user.uid.as_raw()].contains(&std::fs::metadata(data)?.uid()),
                "{} belongs to somebody else",
                data.display()
            );
            for directory in [data, sockets.path()] {
                chown(directory, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
            }
        }
        if !data.join("PG_VERSION").is_file() {
            let mut initdb = as_ordinary_user(Command::new(binaries.join("initdb")))?;
            // Trust: only the socket leads in, and only those who may enter its directory reach it.
            initdb.args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-instructions"]);
            if temporary.is_some() {
                initdb.arg("--no-sync");
            }
            initdb.arg("--pgdata").arg(data);
            read(initdb)?;
        }
        let (data, process) = (data.to_owned(), Mutex::new(None));
        let server = Self { binaries, data, sockets, log, process, _temporary: temporary, is_durable };
        server.start().await?;
        Ok(server)
    }

    /// Starts the server after it was stopped.
    pub async fn start(&self) -> Result<()> {
        let mut server = as_ordinary_user(Command::new(self.binaries.join("postgres")))?;
        server.arg("-D").arg(&self.data).arg("-k").arg(self.sockets.path());
        server.args(["-c", "listen_addresses=", "-c", "max_connections=300"]);
        if !self.is_durable {
            server.args(["-c", "fsync=off", "-c", "full_page_writes=off"]);
        }
        // SIGQUIT: all its processes end at once, and the next start recovers.
        let process = Process::spawn("PostgreSQL", server, &self.log, Signal::SIGQUIT)?;
        let url = self.url("postgres");
        let ready = async || PgConnection::connect(&url).await.ok();
        process.eventually("PostgreSQL to accept connections", ready).await?;
        *self.process.lock().unwrap_or_else(PoisonError::into_inner) = Some(process);
        Ok(())
    }

    /// Stops the server: `SIGINT` in good order, `SIGQUIT` as in a crash.
    pub async fn stop(&self, signal: Signal) -> Result<()> {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner).take();
        process.ok_or_else(|| anyhow!("PostgreSQL does not run"))?.stop(signal).await?;
        Ok(())
    }

    pub fn must_run(&self) -> Result<()> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(Ok(()), Process::must_run)
    }

    /// Creates a database with a unique name.
    pub async fn create_database(&self) -> Result<Database> {
        create_in(&self.url("postgres")).await
    }

    /// The database of this name. Creates it if there is none.
    pub async fn database(&self, name: &str) -> Result<Database> {
        let database = Database { url: self.url(name) };
        if PgConnection::connect(&database.url).await.is_err() {
            create(&self.url("postgres"), name).await?;
        }
        Ok(database)
    }

    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@localhost/{database}?host={}", self.sockets.path().display())
    }
}

#[derive(Clone, Debug)]
pub struct Database {
    pub url: String,
}

impl Database {
    pub async fn connect(&self) -> Result<PgConnection> {
        PgConnection::connect(&self.url).await.with_context(|| format!("cannot connect to {}", self.url))
    }

    /// Runs statements without parameters, and returns how many rows they changed.
    pub async fn execute(&self, sql: &str) -> Result<u64> {
        let done = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut self.connect().await?).await?;
        Ok(done.rows_affected())
    }

    /// The only number that a query returns.
    pub async fn number(&self, sql: &str) -> Result<i64> {
        Ok(sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut self.connect().await?).await?)
    }

    /// The only text that a query returns.
    pub async fn text(&self, sql: &str) -> Result<String> {
        Ok(sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut self.connect().await?).await?)
    }
}

/// A database for one test: on the server of `DATABASE_URL`, or else on a server that the tests of this process share and
/// that ends with the last of them.
pub async fn test_database() -> Result<(Database, Option<Arc<Postgres>>)> {
    if let Ok(server) = std::env::var("DATABASE_URL") {
        return Ok((create_in(&server).await?, None));
    }
    static SHARED: tokio::sync::Mutex<Weak<Postgres>> = tokio::sync::Mutex::const_new(Weak::new());
    let mut shared = SHARED.lock().await;
    let server = match shared.upgrade() {
        Some(server) => server,
        None => Arc::new(Postgres::private().await?),
    };
    *shared = Arc::downgrade(&server);
    drop(shared);
    Ok((server.create_database().await?, Some(server)))
}

async fn create_in(server: &str) -> Result<Database> {
    static MADE: AtomicU32 = AtomicU32::new(0);
    // The server of `DATABASE_URL` may hold databases of earlier test programs and of other machines.
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| anyhow!("no randomness: {error}"))?;
    let name = format!("test_{:016x}_{}", u64::from_ne_bytes(random), MADE.fetch_add(1, Ordering::Relaxed));
    create(server, &name).await?;
    Ok(Database { url: of_database(server, &name) })
}

/// The URL of another database of the same server.
fn of_database(url: &str, name: &str) -> String {
    let (address, options) = url.split_once('?').map_or((url, String::new()), |(a, o)| (a, format!("?{o}")));
    let authority = address.find("://").map_or(0, |scheme| scheme.saturating_add(3));
    let server = address[authority..].find('/').map_or(address, |slash| &address[..authority.saturating_add(slash)]);
    format!("{server}/{name}{options}")
}

async fn create(server: &str, name: &str) -> Result<()> {
    let mut connection = PgConnection::connect(server).await?;
    sqlx::raw_sql(AssertSqlSafe(format!("create database {name}"))).execute(&mut connection).await?;
    Ok(())
}

fn open_to_all(directory: &Path) -> Result<()> {
    Ok(std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))?)
}

/// The user that runs PostgreSQL in place of root: `postgres`, or else `nobody`.
fn substitute() -> Result<Option<User>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    for name in ["postgres", "nobody"] {
        if let Some(user) = User::from_name(name)? {
            return Ok(Some(user));
        }
    }
    bail!("PostgreSQL refuses to run as root, and there is neither a user postgres nor a user nobody")
}

fn as_ordinary_user(mut command: Command) -> Result<Command> {
    // PostgreSQL wants to read its working directory.
    command.current_dir("/");
    if let Some(user) = substitute()? {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_database_of_a_server_has_its_address_and_options() {
        assert_eq!(
            of_database("postgres://a:b@host:5432/one?host=/tmp/x", "two"),
            "postgres://a:b@host:5432/two?host=/tmp/x"
        );
        assert_eq!(of_database("postgres://localhost", "two"), "postgres://localhost/two");
        assert_eq!(of_database("postgres:///one", "two"), "postgres:///two");
    }
}
