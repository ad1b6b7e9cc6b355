//! The command line and the environment. An error is one line that names the setting. Secrets come from the
//! environment or from files, since every user of a machine can read command lines.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use axum::http::HeaderValue;
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use contract::key::{Secret, check};
use contract::pepper::Pepper;
use portcullis_cli::api::Api;
use portcullis_cli::declarative::Declarative;
use portcullis_cli::doctor::Doctor;
use portcullis_cli::explain::Explain;
use portcullis_cli::login::LoginCommand;

pub mod database;
mod secret_setting;
mod values;

pub use self::values::KeepFor;
use self::values::{FOREVER, address, days, days_or_forever, duration, number, origin};

/// What `serve --help` says of all settings.
const ABOUT_SETTINGS: &str = "\
Each setting is a flag or an environment variable, and the flag wins. A duration is a number with its unit: 500ms, 30s, 5m, 2h \
or 90d. Secrets come from the environment, from PORTCULLIS_ADMIN_KEY, PORTCULLIS_SYNC_KEY and PORTCULLIS_PEPPER, or from the \
files that these names with _FILE appended give.";

/// The control plane of Portcullis, API keys for Envoy, and a client of its REST API.
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
    #[command(after_help = ABOUT_SETTINGS)]
    Serve(Box<Serve>),
    /// Manage the database directly
    #[command(subcommand)]
    Admin(Admin),
    /// API keys: create, find, change, revoke and import them
    #[command(subcommand)]
    Keys(Keys),
    /// Usage of keys: reports, events and import
    #[command(subcommand)]
    Usage(Usage),
    /// Say why a request is allowed or refused, with each check
    Explain(Explain),
    Login(LoginCommand),
    /// Remove the key that `portcullis login` stored
    Logout,
    Doctor(Doctor),
    Api(Api),
    #[command(flatten)]
    Declarative(Declarative),
    /// Print a script that completes commands in a shell
    Completion {
        /// The shell
        shell: Shell,
    },
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

    /// Address and port to listen on. Port 0 takes a free one
    #[arg(long, env = "PORTCULLIS_LISTEN", value_name = "ADDRESS", default_value = "127.0.0.1:8081", value_parser = address)]
    pub listen: SocketAddr,

    /// File to write the bound address to, once requests are accepted
    #[arg(long, env = "PORTCULLIS_ADDRESS_FILE", value_name = "FILE")]
    pub address_file: Option<PathBuf>,

    /// Certificate chain in PEM, leaf first. Without it, connections are in plain text. Reloaded on SIGHUP and when the file
    /// changes
    #[arg(long, env = "PORTCULLIS_TLS_CERT_FILE", value_name = "FILE", requires = "tls_key_file")]
    pub tls_cert_file: Option<PathBuf>,

    /// Private key of the certificate, in PEM
    #[arg(long, env = "PORTCULLIS_TLS_KEY_FILE", value_name = "FILE", requires = "tls_cert_file")]
    pub tls_key_file: Option<PathBuf>,

    /// CA bundle in PEM for verifying client certificates (enables mTLS)
    #[arg(long, env = "PORTCULLIS_TLS_CLIENT_CA_FILE", value_name = "FILE", requires = "tls_cert_file")]
    pub tls_client_ca_file: Option<PathBuf>,

    /// Time-out for a TLS handshake, for the head of a request on an idle connection, for each MiB of a request body, and for
    /// each 64 KiB of a response
    #[arg(long, env = "PORTCULLIS_READ_TIMEOUT", value_name = "DURATION", default_value = "30s", value_parser = duration("1s", "5m"))]
    pub read_timeout: Duration,

    /// Connections at a time. The limit of open files (ulimit -n) lowers it
    #[arg(long, env = "PORTCULLIS_MAX_CONNECTIONS", value_name = "N", default_value = "16384", value_parser = number(16_u32, 1_000_000))]
    pub max_connections: u32,

    /// Connections of one address at a time. Connections that presented a sync key do not count. Raise it where a load
    /// balancer or NAT makes many clients one address. IPv6 addresses count by their /64
    #[arg(long, env = "PORTCULLIS_MAX_CONNECTIONS_PER_ADDRESS", value_name = "N", default_value = "256", value_parser = number(1_u32, 1_000_000))]
    pub max_connections_per_address: u32,

    /// Connections of --max-connections that only clients with a sync key get [default: a quarter]
    #[arg(long, env = "PORTCULLIS_CONNECTIONS_RESERVED_FOR_SYNC", value_name = "N", value_parser = number(0_u32, 1_000_000))]
    pub connections_reserved_for_sync: Option<u32>,

    /// Connections to the database
    #[arg(long, env = "PORTCULLIS_DATABASE_CONNECTIONS", value_name = "N", default_value = "16", value_parser = number(2_u32, 1_000))]
    pub database_connections: u32,

    /// Requests a second that one caller of the REST API may make. A caller is the owner of a key, with all keys together;
    /// without a good key, an address
    #[arg(long, env = "PORTCULLIS_API_RATE_LIMIT", value_name = "N", default_value = "50", value_parser = number(NonZeroU32::MIN, NonZeroU32::MAX))]
    pub api_rate_limit: NonZeroU32,

    /// Requests that one caller of the REST API may make at once after a pause
    #[arg(long, env = "PORTCULLIS_API_BURST", value_name = "N", default_value = "100", value_parser = number(NonZeroU32::MIN, NonZeroU32::MAX))]
    pub api_burst: NonZeroU32,

    /// Origins whose pages may call the REST API from browsers, separated by commas
    #[arg(long, env = "PORTCULLIS_CORS_ORIGINS", value_name = "ORIGINS", value_delimiter = ',', value_parser = origin)]
    pub cors_origins: Vec<HeaderValue>,

    /// How often the database is asked for changes that LISTEN/NOTIFY missed
    #[arg(long, env = "PORTCULLIS_DATABASE_POLL_INTERVAL", value_name = "DURATION", default_value = "1s", value_parser = duration("10ms", "1m"))]
    pub database_poll_interval: Duration,

    /// How long the poll of a filter is held when there is no change. Filters wait 40s
    #[arg(long, env = "PORTCULLIS_LONG_POLL_TIMEOUT", value_name = "DURATION", default_value = "25s", value_parser = duration("1s", "30s"))]
    pub long_poll_timeout: Duration,

    /// How long filters can tell a revoked or expired key from an unknown one
    #[arg(long, env = "PORTCULLIS_REVOKED_RETENTION", value_name = "DURATION", default_value = "30d", value_parser = days("0d", "3650d"))]
    pub revoked_retention: i32,

    /// Keys and rotations, together, that the keys of one user may create for that user in 24 hours. Ten times as many changes
    /// of keys are allowed. Keys with the scope admin are not bound, and revoking is not
    #[arg(long, env = "PORTCULLIS_OWNER_KEYS_PER_DAY", value_name = "N", default_value = "200", value_parser = number(1_u32, 1_000_000))]
    pub owner_keys_per_day: u32,

    /// Maximum number of live Envoys of one sync key. Further Envoys get the keys, but their reports and calls for allowances
    /// are answered 429. An Envoy that is silent for 60 seconds does not count
    #[arg(long, env = "PORTCULLIS_ENVOYS_PER_SYNC_KEY", value_name = "N", default_value = "1000", value_parser = number(1_u32, 10_000))]
    pub envoys_per_sync_key: u32,

    /// How long the row of a key is kept after the key ended, or forever. A key that filters can still tell from an unknown
    /// one stays, and so does a key whose usage is kept
    #[arg(long, env = "PORTCULLIS_ENDED_KEY_RETENTION", value_name = "DURATION", default_value = FOREVER, value_parser = days_or_forever("1d", "36500d"))]
    pub ended_key_retention: KeepFor,

    /// How long the audit trail is kept, or forever
    #[arg(long, env = "PORTCULLIS_AUDIT_RETENTION", value_name = "DURATION", default_value = FOREVER, value_parser = days_or_forever("1d", "36500d"))]
    pub audit_retention: KeepFor,

    /// How long usage is kept by the hour. After that it is kept by the day
    #[arg(long, env = "PORTCULLIS_USAGE_HOURLY_RETENTION", value_name = "DURATION", default_value = "90d", value_parser = days("1d", "3650d"))]
    pub usage_hourly_retention: i32,

    /// How long usage is kept by the day, or forever
    #[arg(long, env = "PORTCULLIS_USAGE_DAILY_RETENTION", value_name = "DURATION", default_value = "1100d", value_parser = days_or_forever("1d", "36500d"))]
    pub usage_daily_retention: KeepFor,

    /// How often usage is written as events for other systems
    #[arg(long, env = "PORTCULLIS_USAGE_EVENT_INTERVAL", value_name = "DURATION", default_value = "1m", value_parser = duration("1s", "1h"))]
    pub usage_event_interval: Duration,

    /// How long usage events are kept
    #[arg(long, env = "PORTCULLIS_USAGE_EVENT_RETENTION", value_name = "DURATION", default_value = "30d", value_parser = days("1d", "3650d"))]
    pub usage_event_retention: i32,

    /// How long each booking of usage stays a row of the ledger. Older rows are summed by day
    #[arg(long, env = "PORTCULLIS_LEDGER_DETAIL_RETENTION", value_name = "DURATION", default_value = "35d", value_parser = days("1d", "3650d"))]
    pub ledger_detail_retention: i32,

    /// Format of the log
    #[arg(long, env = "PORTCULLIS_LOG_FORMAT", value_name = "FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,

    /// What is logged: error, warn, info, debug, trace or off, or a list with levels of modules such as
    /// info,control_plane::sync=debug. RUST_LOG is not read
    #[arg(long, env = "PORTCULLIS_LOG_LEVEL", value_name = "LEVEL", default_value = "info")]
    pub log_level: String,
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
        /// How long the key is valid [default: an admin key 90d, any other key without end]
        #[arg(long, value_name = "DURATION", value_parser = duration("1s", "3650d"))]
        expires_in: Option<Duration>,
        /// Let an admin key never expire
        #[arg(long, conflicts_with = "expires_in")]
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

/// What an import reads.
#[derive(Args, Debug)]
pub struct Source {
    /// The database.
    #[command(flatten)]
    pub database: Database,
    /// The file, or - for standard input
    #[arg(default_value = "-")]
    pub file: PathBuf,
}

/// Commands below `keys`.
#[derive(Debug, Subcommand)]
pub enum Keys {
    /// Import keys of another system: one JSON object a line, or a table in a file whose name ends with .csv, as POST
    /// /v1/keys/import takes them
    Import {
        #[command(flatten)]
        source: Source,

        /// Check the lines and report what would be imported, but write nothing
        #[arg(long)]
        dry_run: bool,

        /// Read a table, whatever the name of the file
        #[arg(long)]
        csv: bool,
    },
}

/// Commands below `usage`.
#[derive(Debug, Subcommand)]
pub enum Usage {
    /// Import usage that Envoys logged when they ended; usage that had arrived before is skipped
    Import(Source),
}

/// Whom keys belong to that are made for the operator rather than for a user.
pub const OPERATOR: &str = "operator@portcullis.invalid";

/// The environment variable with the first admin key.
pub const ADMIN_KEY: &str = "PORTCULLIS_ADMIN_KEY";
/// The environment variable with the key of the filters.
pub const SYNC_KEY: &str = "PORTCULLIS_SYNC_KEY";

/// Holds the pepper of imported keys.
pub const PEPPER: &str = "PORTCULLIS_PEPPER";

/// A key that is given in the environment or in a file, to be stored (as its hash) if it is not there yet. An error has
/// nothing of the key.
pub fn given_key(variable: &str) -> Result<Option<Secret>, String> {
    let Some(text) = secret_setting::read(variable)? else { return Ok(None) };
    match check(&text) {
        Ok(_) => Ok(Some(Secret::from_presented(text))),
        Err(error) => Err(format!("{variable}: {error}; `portcullis admin generate-key` makes one")),
    }
}

/// The pepper of imported keys that the environment or a file gives. An error has nothing of it.
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
    fn a_flag_and_its_variable_share_their_name_and_a_default_is_a_value_that_the_flag_takes() {
        let serve = Cli::command().find_subcommand("serve").unwrap().clone();
        let settings = serve.get_arguments().filter(|setting| setting.get_long() != Some("database-url"));
        let mut found = 0;
        for setting in settings {
            let flag = setting.get_long().unwrap();
            let variable = format!("PORTCULLIS_{}", flag.to_uppercase().replace('-', "_"));
            assert_eq!(setting.get_env().unwrap(), &*variable);
            found += 1;
        }
        assert!(found > 20, "{found}");
        assert!(Cli::try_parse_from(["portcullis", "serve"]).is_ok());
    }

    #[test]
    fn the_database_url_is_never_printed() {
        let database = Database { database_url: Some("postgres://user:secret@host/db".into()) };
        assert_eq!(format!("{database:?}"), "Database(…)");
    }
}
