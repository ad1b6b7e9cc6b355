//! The binary: its commands, its errors in one line, and its end on SIGTERM.

use std::net::SocketAddr;
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use contract::key::{KeyKind, Secret, check};
use contract::update::{Header, Update};
use portcullis_tests::http::{Connection, Reply};
use portcullis_tests::wait::eventually;
use sqlx::PgPool;

use crate::support::{EARLY, scalars};

pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(crate::support::binary());
    for (variable, _) in std::env::vars_os() {
        let name = variable.as_encoded_bytes();
        if [&b"DATABASE_URL"[..], b"PORTCULLIS_", b"PGPASS"].iter().any(|ours| name.starts_with(ours)) {
            command.env_remove(variable);
        }
    }
    command.args(arguments);
    command
}

fn run(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn printed(output: &Output) -> &str {
    assert!(output.status.success(), "{output:?}");
    std::str::from_utf8(&output.stdout).unwrap().trim_end()
}

/// The one line that says what is wrong.
fn complaint(output: &Output) -> &str {
    assert!(!output.status.success(), "{output:?}");
    let said = std::str::from_utf8(&output.stderr).unwrap().trim_end();
    assert_eq!((said.lines().count(), output.stdout.len()), (1, 0), "{said}");
    said
}

/// Where the test's own database is.
pub fn url(pool: &PgPool) -> String {
    let database = pool.connect_options().get_database().unwrap().to_owned();
    let server = std::env::var("DATABASE_URL").unwrap();
    let (address, parameters) = server.split_once('?').unwrap_or((&server, ""));
    let (address, _) = address.rsplit_once('/').unwrap();
    format!("{address}/{database}?{parameters}")
}

/// Ends with the test, however that ends.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn get(address: SocketAddr, uri: &str, key: &Secret) -> Option<Reply> {
    Connection::open(address).await.ok()?.get(uri, Some(key.reveal())).await.ok()
}

/// Starts a control plane and waits until it answers this request; its address, and the answer. It writes its address to a
/// file of its own.
pub async fn serving(mut serve: Command, uri: &str, key: &Secret) -> (Running, SocketAddr, Reply) {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("address");
    let running = Running(serve.env("PORTCULLIS_ADDRESS_FILE", &file).spawn().unwrap());
    let answered = async || {
        let address = std::fs::read_to_string(&file).ok()?.parse().ok()?;
        let reply = get(address, uri, key).await?;
        (reply.status == 200).then_some((address, reply))
    };
    let (address, reply) = eventually("the control plane to start", answered).await.unwrap();
    (running, address, reply)
}

#[test]
fn a_key_is_generated_without_a_database() {
    let [one, other] = [run(&["admin", "generate-key"]), run(&["admin", "generate-key"])];
    assert_eq!(check(printed(&one)), Ok(KeyKind::Live));
    assert_ne!(printed(&one), printed(&other));
    let help = run(&["admin", "--help"]);
    assert!(printed(&help).contains("PORTCULLIS_ADMIN_KEY"), "{}", printed(&help));
}

#[test]
fn the_openapi_document_is_printed() {
    let output = run(&["openapi"]);
    let document: serde_json::Value = serde_json::from_str(printed(&output)).unwrap();
    assert_eq!(document["info"]["title"], "Portcullis");
}

#[test]
fn a_bad_setting_is_named_in_one_line() {
    for arguments in [
        &["serve", "--database-url", "nonsense", "--listen", "127.0.0.1:0"][..],
        &["admin", "new-epoch", "--database-url", "postgres://nobody@127.0.0.1:1/nothing"],
    ] {
        let output = run(arguments);
        let said = complaint(&output);
        assert!(said.starts_with("portcullis: DATABASE_URL: "), "{said}");
    }
    let create = ["admin", "create-key", "--database-url", "x", "--name", "n"];
    for (rest, what) in [
        (&["--scope", "orders"][..], "--email: "),
        (&["--scope", "a b"], "--scope: each scope must have"),
        (&["--scope", "sync", "--email", "nobody"], "--email: must "),
        (
            &["--scope", "sync", "--expires-in", "60"],
            "invalid value '60' for '--expires-in <DURATION>': must be a number and its unit, such as 500ms, 30s, ",
        ),
    ] {
        let output = run(&[&create[..], rest].concat());
        assert!(complaint(&output).starts_with(&format!("portcullis: {what}")), "{output:?}");
    }
    for (flag, value, why) in [
        ("--read-timeout <DURATION>", "10", "must be a number and its unit"),
        ("--read-timeout <DURATION>", "10m", "must be from 1s to 5m"),
        ("--audit-retention <DURATION>", "36h", "must be whole days, such as 90d, or forever"),
        ("--api-burst <N>", "0", "must be a whole number from 1 to 4294967295"),
        ("--listen <ADDRESS>", "localhost", "must be an address and a port"),
    ] {
        let name = flag.split(' ').next().unwrap();
        let variable = format!("PORTCULLIS_{}", name[2..].to_uppercase().replace('-', "_"));
        // From the environment or from the command line: the error is the same.
        for output in [run(&["serve", name, value]), command(&["serve"]).env(variable, value).output().unwrap()] {
            let expected = format!("portcullis: invalid value '{value}' for '{flag}': {why}");
            assert!(complaint(&output).starts_with(&expected), "{output:?}");
        }
    }
    let output = run(&["serve", "--database-url", "postgres://x", "--log-level", "info,noise=loud"]);
    assert!(complaint(&output).starts_with("portcullis: --log-level: "), "{output:?}");
}

#[test]
fn a_secret_has_one_source_and_an_error_names_the_setting_and_not_the_secret() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "of-a-file\n").unwrap();
    let path = file.path().to_str().unwrap();
    let nowhere = "postgres://somebody@127.0.0.1:1/nothing";
    for (settings, error) in [
        (&[][..], "DATABASE_URL: is not set; set it to"),
        (&[("DATABASE_URL_FILE", path)], "DATABASE_URL: must have the form postgres://"),
        (&[("DATABASE_URL_FILE", "/missing")], "DATABASE_URL_FILE: /missing: No such file"),
        (&[("DATABASE_URL", nowhere), ("DATABASE_URL_FILE", path)], "DATABASE_URL and DATABASE_URL_FILE are both set"),
        (&[("DATABASE_URL", "postgres://a:in-the-url/x@host/db")], "DATABASE_URL: has a # / or ? that ends its user"),
        (
            &[("DATABASE_URL", "postgres://a:in-the-url@host/db"), ("PGPASSWORD_FILE", path)],
            "DATABASE_URL contains a password and PGPASSWORD_FILE is set",
        ),
        (&[("DATABASE_URL", nowhere), ("PGPASSFILE", "/missing")], "PGPASSFILE: /missing: No such file"),
        (
            &[("DATABASE_URL", nowhere), ("PGPASSWORD", "in-the-url"), ("PGPASSWORD_FILE", path)],
            "PGPASSWORD and PGPASSWORD_FILE are both set",
        ),
        (
            &[("DATABASE_URL", nowhere), ("PORTCULLIS_ADMIN_KEY_FILE", path)],
            "PORTCULLIS_ADMIN_KEY: the key starts with",
        ),
        (&[("DATABASE_URL", nowhere), ("PORTCULLIS_PEPPER_FILE", path)], "PORTCULLIS_PEPPER: a pepper has 64"),
        (
            &[("DATABASE_URL", nowhere), ("PORTCULLIS_SYNC_KEY", "in-the-url"), ("PORTCULLIS_SYNC_KEY_FILE", path)],
            "PORTCULLIS_SYNC_KEY and PORTCULLIS_SYNC_KEY_FILE are both set",
        ),
    ] {
        let output = command(&["serve", "--listen", "127.0.0.1:0"]).envs(settings.iter().copied()).output().unwrap();
        let said = complaint(&output);
        assert!(said.starts_with(&format!("portcullis: {error}")), "{said}");
        assert!(!said.contains("of-a-file") && !said.contains("in-the-url"), "{said}");
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn keys_and_epochs_are_made_from_the_command_line(pool: PgPool) {
    let url = url(&pool);
    let create = |rest: &[&str]| {
        let output = run(&[&["admin", "create-key", "--database-url", &url, "--name", "n"], rest].concat());
        Secret::from_presented(printed(&output).to_owned())
    };
    let sync = create(&["--scope", "sync"]);
    let lifetime_days = async |key: Secret| {
        let found = control_plane::keys::read::find_by_hash(&pool, &key.hash()).await.unwrap().unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        found.record.expires_at_s.map(|end| (end.saturating_sub(now) + 43_200) / 86_400)
    };
    let admin = &["--scope", "admin"][..];
    assert_eq!(lifetime_days(create(admin)).await, Some(90));
    assert_eq!(lifetime_days(create(&[admin, &["--no-expiry"]].concat())).await, None);
    assert_eq!(lifetime_days(create(&[admin, &["--expires-in", "1d"]].concat())).await, Some(1));
    let user = create(&["--scope", "orders", "--email", "user@example.com", "--expires-in", "60s"]);
    for (key, email, expires) in [(sync, "operator@portcullis.invalid", false), (user, "user@example.com", true)] {
        let found = control_plane::keys::read::find_by_hash(&pool, &key.hash()).await.unwrap().unwrap();
        assert_eq!((found.email.as_str(), found.record.expires_at_s.is_some()), (email, expires));
    }
    let epoch = async || sqlx::query_scalar::<_, uuid::Uuid>("select epoch from store_state").fetch_one(&pool).await;
    let before = epoch().await.unwrap();
    let output = run(&["admin", "new-epoch", "--database-url", &url]);
    let now = epoch().await.unwrap();
    assert!(now != before && printed(&output).contains(&now.to_string()), "{output:?}");
}

#[sqlx::test(migrations = "./migrations")]
async fn keys_are_imported_from_the_command_line(pool: PgPool) {
    let url = url(&pool);
    let file = tempfile::NamedTempFile::new().unwrap();
    let line = |name: &str| {
        format!("{{\"email\": \"user@example.com\", \"name\": \"{name}\", \"key\": \"a-key-named-{name}\"}}\n")
    };
    std::fs::write(&file, format!("\u{feff}{}", line("alpha"))).unwrap();
    let import = || run(&["keys", "import", "--database-url", &url, file.path().to_str().unwrap()]);
    assert_eq!(printed(&import()), "keys imported: 1, lines refused: 0");
    std::fs::write(&file, line("alpha") + &line("beta1")).unwrap();
    let output = import();
    let said = String::from_utf8_lossy(&output.stderr);
    let expected = "line 1: duplicate: this key exists already\nportcullis: some lines were refused\n";
    assert_eq!((output.status.success(), &*said), (false, expected));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "keys imported: 1, lines refused: 1\n");
    for name in ["alpha", "beta1"] {
        let key = Secret::from_presented(format!("a-key-named-{name}"));
        let found = control_plane::keys::read::find_by_hash(&pool, &key.hash()).await.unwrap();
        assert_eq!(found.unwrap().email, "user@example.com");
    }
    let actors: Vec<Option<uuid::Uuid>> =
        scalars(&pool, "select actor_key_id from audit where action = 'import.finish'").await;
    assert_eq!(actors, [None, None]);
}

#[sqlx::test(migrations = "./migrations")]
async fn an_import_shows_its_progress_on_a_terminal(pool: PgPool) {
    const IN_A_TERMINAL: &str = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))";
    let file = tempfile::NamedTempFile::new().unwrap();
    let line =
        |number| format!("{{\"email\": \"user@example.com\", \"name\": \"n\", \"key\": \"a-key-{number:060}\"}}\n");
    std::fs::write(&file, (0..3_000).map(line).collect::<String>()).unwrap();
    let mut python = Command::new("python3");
    python.args(["-c", IN_A_TERMINAL]).arg(crate::support::binary());
    python.args(["keys", "import", "--database-url", &url(&pool)]).arg(file.path()).stdin(Stdio::null());
    let output = python.output().unwrap();
    let said = printed(&output);
    let mut lines = said.split(['\r', '\n']).filter(|line| !line.is_empty()).rev();
    assert_eq!(lines.next(), Some("keys imported: 3000, lines refused: 0"));
    let steps: Vec<u32> = lines
        .rev()
        .map(|line| line.strip_suffix(" keys imported, 0 lines refused …").unwrap_or_else(|| panic!("{line:?}")))
        .map(|imported| imported.parse().unwrap())
        .collect();
    assert!(steps.len() > 1 && steps.is_sorted() && steps.iter().all(|step| (1..=3_000).contains(step)), "{steps:?}");
}

#[sqlx::test(migrations = "./migrations")]
async fn on_sigterm_the_control_plane_answers_held_polls_and_ends(pool: PgPool) {
    let sync = control_plane::keys::create::generate(KeyKind::Live).unwrap();
    let mut serve = command(&["serve", "--listen", "127.0.0.1:0", "--log-level", "warn"]);
    serve.env("DATABASE_URL", url(&pool)).env("PORTCULLIS_SYNC_KEY", sync.reveal());
    serve.stdout(Stdio::null()).stderr(Stdio::null());
    let (mut running, address, snapshot) = serving(serve, "/sync/v1/keys", &sync).await;
    let Header { epoch, revision, .. } = Update::read(&snapshot.body).unwrap().header;
    let held = tokio::spawn(async move {
        get(address, &format!("/sync/v1/keys?epoch={epoch}&revision={revision}"), &sync).await.unwrap().status
    });
    let is_held = async || {
        let metrics = portcullis_tests::http::get(address, "/metrics").await.ok()?.body;
        String::from_utf8_lossy(&metrics).contains("portcullis_sync_polls_in_flight 1\n").then_some(())
    };
    eventually("the poll to be held", is_held).await.unwrap();

    let signalled = Instant::now();
    let id = running.0.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    assert_eq!(held.await.unwrap(), 200);
    assert!(running.0.wait().unwrap().success());
    // The poll would have ended by itself after 25 s.
    assert!(signalled.elapsed() < EARLY, "it took {:?}", signalled.elapsed());
}

#[sqlx::test(migrations = "./migrations")]
async fn an_invalid_different_or_missing_pepper_stops_the_start(pool: PgPool) {
    let url = url(&pool);
    let with = |pepper: &str, arguments: &[&str]| {
        let mut command = command(arguments);
        command.args(["--database-url", &url]).env("PORTCULLIS_PEPPER", pepper).stdin(Stdio::null());
        command.output().unwrap()
    };
    let (ours, other) = ("5e".repeat(32), "e5".repeat(32));
    let import = ["keys", "import", "-"];
    let serve = ["serve", "--listen", "127.0.0.1:0", "--log-level", "off"];
    assert!(complaint(&with("5e", &import)).starts_with("portcullis: PORTCULLIS_PEPPER: a pepper has 64"));
    // As long as there was none, there need not be one.
    printed(&with("", &import));
    printed(&with(&ours, &import));
    for (pepper, what) in [(&*other, "differs from the pepper"), ("", "is not set")] {
        for arguments in [&import[..], &serve] {
            let output = with(pepper, arguments);
            let said = complaint(&output);
            assert!(said.starts_with(&format!("portcullis: PORTCULLIS_PEPPER: {what}")), "{said}");
        }
    }
    printed(&with(&ours, &import));
}
