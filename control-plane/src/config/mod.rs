//! The command line and the environment. An error is one line that names the setting. Secrets come from the
//! environment or from files, since every user of a machine can read command lines.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use contract::key::{Secret, check};
use contract::pepper::Pepper;

pub mod bounds;
pub mod database;
mod secret_setting;

use self::bounds::Bounds;

/// The control plane of Portcullis: API keys for Envoy.
#[derive(Debug, Parser)]
#[command(name = "portcullis", version, about, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the binary can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the REST API and the filters
    Serve(Box<Serve>),
    /// Manage the database directly
    #[command(subcommand)]
    Admin(Admin),
    /// Work on many keys
    #[command(subcommand)]
    Keys(Keys),
    /// Work on usage
    #[command(subcommand)]
    Usage(Usage),
    /// Print the OpenAPI document of the REST API
    Openapi,
}

/// The database, for every command that needs it.
#[derive(Args, Clone)]
pub struct Database {
    /// PostgreSQL, as postgres://user@host:port/database; or DATABASE_URL_FILE names a file with the URL. The password is part
    /// of the URL, or comes from PGPASSWORD, from a file that PGPASSWORD_FILE names, or from PGPASSFILE
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Database(…)")
    }
}

/// Settings of `serve`.
#[derive(Args, Debug)]
pub struct Serve {
    /// The database.
    #[command(flatten)]
    pub database: Database,

    /// Address and port to listen on; port 0 takes a free one
    #[arg(long, env = "PORTCULLIS_LISTEN", default_value = "127.0.0.1:8081")]
    pub listen: SocketAddr,

    /// File to write the bound address to, once requests are accepted
    #[arg(long, env = "PORTCULLIS_ADDRESS_FILE")]
    pub address_file: Option<PathBuf>,

    /// Certificate chain in PEM, leaf first. Without it, connections are in plain text. Reloaded on SIGHUP and when the file
    /// changes
    #[arg(long, env = "PORTCULLIS_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// Private key of the certificate, in PEM
    #[arg(long, env = "PORTCULLIS_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// CA bundle in PEM for verifying client certificates (enables mTLS)
    #[arg(long, env = "PORTCULLIS_TLS_CLIENT_CA", value_name = "FILE", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,

    /// Time-out in seconds for a TLS handshake, for the head of a request on an idle connection, for each MiB of a request
    /// body, and for each 64 KiB of a response
    #[arg(long, env = "PORTCULLIS_READ_TIMEOUT_SECONDS", default_value = "30", value_parser = clap::value_parser!(u64).range(1..=300))]
    pub read_timeout_seconds: u64,

    /// Connections at once. The limit of open files (ulimit -n) lowers it
    #[arg(long, env = "PORTCULLIS_MAX_CONNECTIONS", default_value = "16384", value_parser = clap::value_parser!(u32).range(16..=1_000_000))]
    pub max_connections: u32,

    /// Connections at once of one address, those that presented a sync key not counted. Raise it where a load balancer or NAT
    /// makes many clients one address. IPv6 addresses count by their /64
    #[arg(long, env = "PORTCULLIS_MAX_CONNECTIONS_PER_ADDRESS", default_value = "256", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_connections_per_address: u32,

    /// Connections of --max-connections that only clients with a sync key get; a quarter if left out
    #[arg(long, env = "PORTCULLIS_CONNECTIONS_RESERVED_FOR_SYNC", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub connections_reserved_for_sync: Option<u32>,

    /// Connections to the database
    #[arg(long, env = "PORTCULLIS_DATABASE_CONNECTIONS", default_value = "16", value_parser = clap::value_parser!(u32).range(2..=1000))]
    pub database_connections: u32,

    /// Requests a second that one caller of the REST API may make: the owner of a key, with all keys together; without a good
    /// key, an address
    #[arg(long, env = "PORTCULLIS_API_RATE_LIMIT", default_value = "50")]
    pub api_rate_limit: NonZeroU32,

    /// Requests that one caller of the REST API may make at once after a pause
    #[arg(long, env = "PORTCULLIS_API_BURST", default_value = "100")]
    pub api_burst: NonZeroU32,

    /// Polling interval for changes that LISTEN/NOTIFY missed, in milliseconds
    #[arg(long, env = "PORTCULLIS_POLL_INTERVAL_MS", default_value = "1000", value_parser = clap::value_parser!(u64).range(10..=60_000))]
    pub poll_interval_ms: u64,

    /// How long the poll of a filter is held when there is no change, in seconds; filters wait 40
    #[arg(long, env = "PORTCULLIS_LONG_POLL_SECONDS", default_value = "25", value_parser = clap::value_parser!(u64).range(1..=30))]
    pub long_poll_seconds: u64,

    /// How long filters can tell a revoked or expired key from an unknown one, in days
    #[arg(long, env = "PORTCULLIS_REVOKED_RETENTION_DAYS", default_value = "30", value_parser = clap::value_parser!(i32).range(0..=3650))]
    pub revoked_retention_days: i32,

    /// Keys that the keys of one user may make for that user, and rotations, together, in 24 hours; and ten times as many changes
    /// of keys. Keys with the scope admin are not bound, and revoking is not
    #[arg(long, env = "PORTCULLIS_OWNER_KEYS_PER_DAY", default_value_t = Bounds::default().owner_keys_per_day, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub owner_keys_per_day: u32,

    /// Live Envoys that one sync key may have. More get the keys and a millionth of each shared limit, and their reports are answered 429.
    /// An Envoy that is silent for 60 seconds does not count
    #[arg(long, env = "PORTCULLIS_ENVOYS_PER_SYNC_KEY", default_value_t = Bounds::default().envoys_per_sync_key, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub envoys_per_sync_key: u32,

    /// How long the rows of keys are kept that filters have forgotten, in days since the key ended; 0 for ever. A key
    /// whose usage is still kept by the hour or by the day stays
    #[arg(long, env = "PORTCULLIS_ENDED_KEY_DAYS", default_value = "0", value_parser = clap::value_parser!(i32).range(0..=36500))]
    pub ended_key_days: i32,

    /// How long the audit trail is kept, in days; 0 for ever
    #[arg(long, env = "PORTCULLIS_AUDIT_DAYS", default_value = "0", value_parser = clap::value_parser!(i32).range(0..=36500))]
    pub audit_days: i32,

    /// JSON file with the policies and routes of the Envoys, for explaining requests by path and by policy
    #[arg(long, env = "PORTCULLIS_POLICIES_FILE", value_name = "FILE")]
    pub policies: Option<PathBuf>,

    /// How long usage is kept by the hour, in days; after that by the day
    #[arg(long, env = "PORTCULLIS_USAGE_HOURLY_DAYS", default_value = "90", value_parser = clap::value_parser!(i32).range(1..=3650))]
    pub usage_hourly_days: i32,

    /// How long usage is kept by the day, in days; 0 for ever
    #[arg(long, env = "PORTCULLIS_USAGE_DAILY_DAYS", default_value = "1100", value_parser = clap::value_parser!(i32).range(0..=36500))]
    pub usage_daily_days: i32,

    /// How often usage is written as events for other systems, in seconds
    #[arg(long, env = "PORTCULLIS_USAGE_EVENT_SECONDS", default_value = "60", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub usage_event_seconds: u64,

    /// How long usage events are kept, in days
    #[arg(long, env = "PORTCULLIS_USAGE_EVENT_DAYS", default_value = "30", value_parser = clap::value_parser!(i32).range(1..=3650))]
    pub usage_event_days: i32,

    /// How long each booking of usage stays a row of the ledger, in days; older rows are summed up by day
    #[arg(long, env = "PORTCULLIS_LEDGER_DETAIL_DAYS", default_value = "35", value_parser = clap::value_parser!(i32).range(1..=3650))]
    pub ledger_detail_days: i32,

    /// Format of the log
    #[arg(long, env = "PORTCULLIS_LOG_FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,

    /// Log filter: a level, or a list such as info,control_plane=debug
    #[arg(long, env = "PORTCULLIS_LOG", default_value = "info")]
    pub log: String,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// For programs: one JSON object a line
    Json,
}

/// Commands below `admin`.
#[derive(Debug, Subcommand)]
pub enum Admin {
    /// Create a key and print it. It is never shown again
    CreateKey {
        /// The database.
        #[command(flatten)]
        database: Database,
        /// A scope of the key, such as admin or sync; may be given several times
        #[arg(long = "scope", required = true)]
        scopes: Vec<String>,
        /// A name for people
        #[arg(long)]
        name: String,
        /// The user that the key belongs to; may be left out if its scopes are only admin and sync
        #[arg(long)]
        email: Option<String>,
        /// In how many seconds the key expires; by default never, an admin key after 90 days
        #[arg(long)]
        expires_in_seconds: Option<i64>,
        /// Let an admin key never expire
        #[arg(long, conflicts_with = "expires_in_seconds")]
        no_expiry: bool,
    },
    /// Generate a key and print it, for PORTCULLIS_ADMIN_KEY or PORTCULLIS_SYNC_KEY. Stores nothing and needs no database
    GenerateKey,
    /// Make every filter load all keys again. Needed after the files of the database were restored by hand
    NewEpoch {
        /// The database.
        #[command(flatten)]
        database: Database,
    },
}

/// Commands below `keys`.
#[derive(Debug, Subcommand)]
pub enum Keys {
    /// Import keys of another system: one JSON object a line, as POST /v1/keys/import takes them
    Import {
        /// The database.
        #[command(flatten)]
        database: Database,
        /// The lines, or - for standard input
        #[arg(default_value = "-")]
        file: PathBuf,
    },
}

/// Commands below `usage`.
#[derive(Debug, Subcommand)]
pub enum Usage {
    /// Import usage that Envoys logged when they ended; usage that had arrived before is skipped
    Import {
        /// The database.
        #[command(flatten)]
        database: Database,
        /// Envoy's log, or - for standard input
        #[arg(default_value = "-")]
        file: PathBuf,
    },
}

/// Whom keys belong to that are made for the operator rather than for a user.
pub const OPERATOR: &str = "operator@portcullis.invalid";

/// The environment variable with the first admin key.
pub const ADMIN_KEY: &str = "PORTCULLIS_ADMIN_KEY";
/// The environment variable with the key of the filters.
pub const SYNC_KEY: &str = "PORTCULLIS_SYNC_KEY";

/// Holds the pepper of imported keys.
pub const PEPPER: &str = "PORTCULLIS_PEPPER";

/// A key that is given in the environment or in a file, to be stored (as its hash) if it is not there yet.
///
/// # Errors
/// One line, if it is not of our form. The line has nothing of the key.
pub fn given_key(variable: &str) -> Result<Option<Secret>, String> {
    let Some(text) = secret_setting::read(variable)? else { return Ok(None) };
    match check(&text) {
        Ok(_) => Ok(Some(Secret::from_presented(text))),
        Err(error) => Err(format!("{variable}: {error}; `portcullis admin generate-key` makes one")),
    }
}

/// The pepper of imported keys that the environment or a file gives.
///
/// # Errors
/// One line, if it is none. The line has nothing of it.
pub fn given_pepper() -> Result<Option<Pepper>, String> {
    let Some(text) = secret_setting::read(PEPPER)? else { return Ok(None) };
    Pepper::parse(&text).map(Some).map_err(|error| format!("{PEPPER}: {error}"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_database_url_is_never_printed() {
        let database = Database { database_url: Some("postgres://user:secret@host/db".into()) };
        assert_eq!(format!("{database:?}"), "Database(…)");
    }
}
