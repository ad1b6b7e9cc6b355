//! The scripts, environments and health checks of docker-compose.yml, run as real processes without
//! a container engine. Only addresses and directories are replaced.

use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use portcullis_tests::containers::compose::Compose;
use portcullis_tests::demo::DemoApi;
use portcullis_tests::envoy::live;
use portcullis_tests::log::Log;
use portcullis_tests::ports::{LOCAL, Port};
use portcullis_tests::postgres::Postgres;
use portcullis_tests::process::{Process, Signal};
use portcullis_tests::rest::Rest;
use portcullis_tests::tools::{self, silently};
use portcullis_tests::wait::{DEADLINE, eventually};
use portcullis_tests::{http, paths};
use tempfile::TempDir;

/// All that a URL, a shell or YAML could stumble over.
const PASSWORD: &str = "a/b #c@d:e%f?g&h'i\"j\\k$l{m}ü";

/// A directory in place of the images and the volume.
struct Containers {
    home: TempDir,
    compose: Compose,
}

impl Containers {
    fn new() -> Result<Self> {
        let home = TempDir::with_prefix("portcullis-containers-")?;
        let (programs, secrets) = (home.path().join("bin"), home.path().join("secrets"));
        std::fs::create_dir_all(&programs)?;
        std::fs::create_dir_all(secrets)?;
        let root = paths::workspace();
        for script in ["make-secrets", "probe", "portcullis-envoy"] {
            symlink(root.join("containers").join(script), programs.join(script))?;
        }
        symlink(paths::control_plane(), programs.join("portcullis"))?;
        symlink(tools::envoy(&silently)?, programs.join("envoy"))?;
        std::fs::copy(root.join("envoy/minimal.yaml"), home.path().join("minimal.yaml"))?;
        std::fs::copy(paths::wasm(), home.path().join("portcullis.wasm"))?;
        let compose = Compose::parse(&std::fs::read_to_string(root.join("docker-compose.yml"))?)?;
        Ok(Self { home, compose })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn secret(&self, name: &str) -> Result<String> {
        let text = std::fs::read_to_string(self.path("secrets").join(name)).with_context(|| name.to_owned())?;
        Ok(text.trim_end_matches('\n').to_owned())
    }

    /// A program of the images, with nothing of this machine's settings.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env_clear().env("PATH", format!("{}:{path}", self.path("bin").display()));
        command.current_dir(self.home.path());
        command
    }

    fn make_secrets(&self, given: &[(&str, &str)]) -> Result<Output> {
        let mut make = self.command("make-secrets");
        Ok(make.arg(self.path("secrets")).envs(given.iter().copied()).output()?)
    }

    /// A program with the environment that its service has.
    fn service(&self, program: &str, service: &str) -> Command {
        let mut command = self.command(program);
        let secrets = self.path("secrets").display().to_string();
        for (name, value) in self.compose.environment(service) {
            command.env(name, value.replace("/secrets", &secrets));
        }
        command
    }

    /// Runs the health check of a service, with something in it replaced.
    fn health(&self, service: &str, replaced: &str, by: &str) -> Result<bool> {
        let words = self.compose.health_check(service)?;
        ensure!(words.iter().any(|word| word.contains(replaced)), "{service}: no {replaced} in {words:?}");
        let mut words = words.into_iter().map(|word| word.replace(replaced, by));
        let mut check = self.command(&words.next().context("no command")?);
        Ok(check.args(words).output()?.status.success())
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

fn mode(file: &Path) -> Result<u32> {
    Ok(std::fs::metadata(file)?.permissions().mode() & 0o777)
}

#[test]
fn secrets_are_made_on_the_first_start_and_kept_on_the_second() -> Result<()> {
    let containers = Containers::new()?;
    let first = containers.make_secrets(&[])?;
    assert!(first.status.success(), "{}", said(&first));
    let files = [("admin.key", 0o400), ("database.password", 0o400), ("pepper", 0o440), ("sync.key", 0o440)];
    let made = files.map(|(file, _)| containers.secret(file).unwrap());
    let [admin, password, pepper, sync] = &made;
    assert!(contract::key::check(admin).is_ok() && contract::key::check(sync).is_ok() && admin != sync);
    assert!(contract::pepper::Pepper::parse(pepper).is_ok());
    assert!(password.len() == 64 && password != pepper);
    let there: Vec<_> = std::fs::read_dir(containers.path("secrets"))?.collect();
    assert_eq!(there.len(), files.len());
    for (file, wanted) in files {
        assert_eq!(mode(&containers.path("secrets").join(file))?, wanted, "{file}");
        // All readers of the log see what the command prints.
        assert!(said(&first).contains(file) && !said(&first).contains(&containers.secret(file)?));
    }

    let second = containers.make_secrets(&[])?;
    assert!(second.status.success() && said(&second).is_empty(), "{}", said(&second));
    assert_eq!(files.map(|(file, _)| containers.secret(file).unwrap()), made);

    // A secret that is given takes the place of the one that was kept; but PostgreSQL has its password already.
    let given = containers.make_secrets(&[("PORTCULLIS_ADMIN_KEY", sync), ("POSTGRES_PASSWORD", password)])?;
    assert!(given.status.success(), "{}", said(&given));
    assert_eq!(&containers.secret("admin.key")?, sync);
    let other = containers.make_secrets(&[("POSTGRES_PASSWORD", PASSWORD)])?;
    assert!(!other.status.success() && said(&other).contains("POSTGRES_PASSWORD differs"), "{}", said(&other));
    assert_eq!(&containers.secret("database.password")?, password);
    Ok(())
}

/// A server that asks the role `portcullis` for its password.
async fn postgres_with_password(password: &str) -> Result<Postgres> {
    let server = Postgres::private().await?;
    let database = server.database("portcullis").await?;
    let quoted = password.replace('\'', "''");
    let hba = "local all postgres trust\nlocal all all scram-sha-256\n";
    database.execute(&format!("create role portcullis login superuser password '{quoted}'")).await?;
    let file = database.text("show hba_file").await?;
    // Everything after the first line is a line of its own.
    let copy = hba.trim_end().replace('\n', "'), ('");
    database.execute(&format!("copy (values ('{copy}')) to '{file}'")).await?;
    database.execute("select pg_reload_conf()").await?;
    Ok(server)
}

/// Starts Envoy as its image does. Returns the addresses of its admin interface and its listener too.
async fn envoy(
    containers: &Containers,
    control_plane: SocketAddr,
    more: &[(&str, &str)],
    log: &Log,
) -> Result<(Process, SocketAddr, SocketAddr)> {
    let mut envoy = containers.service("portcullis-envoy", "envoy");
    let admin_file = containers.path("admin.address");
    let _ = std::fs::remove_file(&admin_file);
    envoy.args(["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning", "--admin-address-path"]);
    envoy.arg(&admin_file).env("LISTEN", "127.0.0.1:0").env("ADMIN", "127.0.0.1:0");
    envoy.env("CONTROL_PLANE", control_plane.to_string()).envs(more.iter().copied());
    let envoy = Process::spawn("Envoy", envoy, log, Signal::SIGKILL)?;
    let (admin, gate) = live(&envoy, &admin_file, DEADLINE).await?;
    Ok((envoy, admin, gate))
}

/// Longer than a screen: one story.
#[tokio::test]
async fn the_stack_of_the_containers_works_with_any_password_and_its_health_checks_tell() -> Result<()> {
    let containers = Containers::new()?;
    let made = containers.make_secrets(&[("POSTGRES_PASSWORD", PASSWORD)])?;
    assert!(made.status.success(), "{}", said(&made));
    let postgres = postgres_with_password(PASSWORD).await?;
    let url = postgres.url("portcullis").replace("postgres://postgres@", "postgres://portcullis@");
    let (_, sockets) = url.split_once("?host=").context("no directory of sockets")?;
    // As a client of that server's version.
    symlink(tools::postgres(&silently)?.join("pg_isready"), containers.path("bin/pg_isready"))?;
    assert!(containers.health("postgres", "127.0.0.1", sockets)?);
    assert!(!containers.health("postgres", "127.0.0.1", "/nowhere")?);

    // Envoy comes first here, so that its health check has something to wait for.
    let demo = DemoApi::start(LOCAL).await?;
    // Envoy asks for it before the control plane listens.
    let port = Port::reserve(LOCAL.ip())?;
    let address = port.address();
    let log = Log::create(&containers.path("envoy.log"))?;
    let upstream = demo.address().to_string();
    let (envoy_process, admin, gate) = envoy(&containers, address, &[("UPSTREAM", upstream.as_str())], &log).await?;
    let (admin_port, rest_port) = (admin.port().to_string(), address.port().to_string());
    assert!(!containers.health("envoy", "9901", &admin_port)?, "healthy without keys");
    assert!(!containers.health("control-plane", "8081", &rest_port)?, "healthy without a process");

    let control_plane_log = Log::create(&containers.path("control-plane.log"))?;
    let mut serve = containers.service("portcullis", "control-plane");
    serve.args(["serve", "--log-format", "json", "--listen"]).arg(address.to_string()).env("DATABASE_URL", &url);
    let _control_plane = Process::spawn("the control plane", serve, &control_plane_log, Signal::SIGKILL)?;
    let healthy = async |service: &str, port: &str, its: &str| {
        eventually(service, async || containers.health(service, port, its).ok().filter(|healthy| *healthy)).await
    };
    healthy("control-plane", "8081", &rest_port).await?;
    healthy("envoy", "9901", &admin_port).await?;

    // The keys and the pepper came from the files.
    let admin_key = contract::key::Secret::from_presented(containers.secret("admin.key")?);
    let rest = Rest { address, key: admin_key };
    let key = rest.generate("ada@example.com").await?;
    let status = async |path: &str, key: Option<&str>| {
        Ok::<_, anyhow::Error>(http::send(gate, http::get_request(path, key)?).await?.status)
    };
    let good = async || (status("/orders", Some(&key)).await.ok()? == 200).then_some(());
    eventually("the key to reach Envoy", good).await?;
    assert_eq!(status("/orders", None).await?, 401);
    let log_of_probes = control_plane_log.lines_with("/readyz");
    assert!(log_of_probes.iter().all(|line| line.contains("503")), "{log_of_probes:?}");
    assert!(!log.text().contains("/stats") && !log.text().contains("/ready"));
    envoy_process.stop(Signal::SIGTERM).await?;
    Ok(())
}

/// Envoy of a service that has its configuration in docker-compose.yml.
async fn plain_envoy(
    containers: &Containers,
    service: &str,
    replaced: &[(&str, &str)],
    log: &Log,
) -> Result<(Process, SocketAddr)> {
    let mut words = containers.compose.command(service)?;
    let configuration = words.last_mut().context("no configuration")?;
    for (replaced, by) in replaced {
        ensure!(configuration.contains(replaced), "{service}: no {replaced}");
        *configuration = configuration.replace(replaced, by);
    }
    configuration.push_str("admin: { address: { socket_address: { address: 127.0.0.1, port_value: 0 } } }\n");
    let admin_file = containers.path(&format!("{service}.admin"));
    let mut envoy = containers.command("envoy");
    envoy.args(words).args(["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning"]);
    envoy.arg("--admin-address-path").arg(&admin_file);
    let envoy = Process::spawn(service, envoy, log, Signal::SIGKILL)?;
    let (_, address) = live(&envoy, &admin_file, DEADLINE).await?;
    Ok((envoy, address))
}

#[tokio::test]
async fn the_plain_envoys_of_the_containers_serve_and_their_health_checks_tell() -> Result<()> {
    let containers = Containers::new()?;
    let log = Log::create(&containers.path("plain.log"))?;
    let closed = Port::reserve(LOCAL.ip())?.address().port().to_string();

    let free = ("address: 0.0.0.0, port_value: 8080", "address: 127.0.0.1, port_value: 0");
    let (_upstream, upstream) = plain_envoy(&containers, "upstream", &[free], &log).await?;
    assert!(containers.health("upstream", "8080", &upstream.port().to_string())?);
    assert!(!containers.health("upstream", "8080", &closed)?);
    let reply = http::send(upstream, http::get_request("/orders?page=2", Some("of the demo"))?).await?;
    let answer = reply.json()?;
    assert_eq!((reply.status, &answer["method"], &answer["path"]), (200, &"GET".into(), &"/orders?page=2".into()));
    assert_eq!(answer["headers"]["x-api-key"], serde_json::json!(["of the demo"]));

    let free = ("address: 0.0.0.0, port_value: 8081", "address: 127.0.0.1, port_value: 0");
    let port = format!("address: 127.0.0.1, port_value: {}", upstream.port());
    let management = [free, ("address: control-plane, port_value: 8081", port.as_str())];
    let (_management, management) = plain_envoy(&containers, "management", &management, &log).await?;
    assert!(containers.health("management", "8081", &management.port().to_string())?);
    assert!(!containers.health("management", "8081", &closed)?);
    // What comes in goes to the control plane's address, which the other one has here.
    assert_eq!(http::get(management, "/v1/keys").await?.json()?["path"], "/v1/keys");
    Ok(())
}

#[test]
fn a_setting_that_cannot_be_is_named_and_nothing_starts() -> Result<()> {
    let containers = Containers::new()?;
    let refused = |settings: &[(&str, &str)]| -> Result<String> {
        let output = containers.command("portcullis-envoy").envs(settings.iter().copied()).output()?;
        assert!(!output.status.success() && output.stdout.is_empty(), "{}", said(&output));
        Ok(said(&output))
    };
    for (settings, error) in [
        (&[("UPSTREAM", "api")][..], "UPSTREAM: api is not of the form host:port"),
        (
            &[("UPSTREAM", "https://api:443")],
            "UPSTREAM: https://api:443: TLS to the upstream needs an Envoy configuration",
        ),
        (&[("UPSTREAM", "api:65536")], "UPSTREAM: api:65536: the port must be a number from 1 to 65535"),
        (&[("UPSTREAM", "a\" }:1")], "UPSTREAM: a\" }:1 is not of the form host:port"),
        (&[("PORTCULLIS_SYNC_KEY_FILE", "none")], "PORTCULLIS_SYNC_KEY_FILE: cannot read none"),
        (
            &[("PORTCULLIS_PEPPER", "x"), ("PORTCULLIS_PEPPER_FILE", "minimal.yaml")],
            "PORTCULLIS_PEPPER and PORTCULLIS_PEPPER_FILE are both set; set only one",
        ),
    ] {
        let said = refused(settings)?;
        assert!(said.starts_with(&format!("portcullis-envoy: {error}")), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    Ok(())
}
