//! The whole stack for a test: a database, a control plane, a demo API and Envoys with the filter,
//! shared with no other test.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use hyper::Method;
use serde_json::{Map, Value};
use tempfile::TempDir;

use crate::control_plane::{self, ControlPlane, GENEROUS};
use crate::demo::DemoApi;
use crate::envoy::{self, Envoy};
use crate::envoy_config::Replacements;
use crate::http;
use crate::log::Log;
use crate::ports::LOCAL;
use crate::postgres::{self, Database, Postgres};
use crate::rest::Rest;
use crate::tools::silently;
use crate::wait::eventually;

/// The statistic with the revision of an Envoy's store.
pub const STORE_REVISION: &str = "wasmcustom.portcullis.store.revision";
/// The statistic with the number of its keys.
pub const STORE_KEYS: &str = "wasmcustom.portcullis.store.keys";

/// A running stack. Its parts end when dropped, in the order of the fields.
#[derive(Debug)]
pub struct Stack {
    pub envoys: Vec<Envoy>,
    pub demo: DemoApi,
    pub control_plane: ControlPlane,
    pub database: Database,
    /// The server of the database, shared with other tests unless the test asked for its own; none if `DATABASE_URL`
    /// names one.
    pub postgres: Option<Arc<Postgres>>,
    directory: TempDir,
}

#[derive(Clone, Debug)]
pub struct Builder {
    envoys: usize,
    workers: usize,
    /// The addresses are filled in at the start.
    replacements: Replacements,
    /// By name.
    policies: Map<String, Value>,
    debug_logs: bool,
    own_postgres: bool,
    is_durable: bool,
    environment: Vec<(String, String)>,
    arguments: Vec<String>,
}

impl Stack {
    /// One Envoy with two workers, unless the test changes that.
    pub fn builder() -> Builder {
        Builder {
            envoys: 1,
            workers: 2,
            replacements: Replacements::between(LOCAL, LOCAL),
            policies: Map::new(),
            debug_logs: false,
            own_postgres: false,
            is_durable: false,
            environment: Vec::new(),
            arguments: GENEROUS.map(Into::into).into(),
        }
    }

    /// The stack that most tests want.
    pub async fn start() -> Result<Self> {
        Self::builder().start().await
    }

    /// The REST API, with the admin key.
    pub fn rest(&self) -> Rest {
        Rest { address: self.control_plane.address(), key: self.control_plane.settings().admin_key }
    }

    /// The first Envoy.
    pub fn envoy(&self) -> &Envoy {
        self.envoys.first().expect("the stack has an Envoy")
    }

    /// Sends a request to the first Envoy.
    pub async fn get(&self, key: Option<&str>) -> Result<http::Reply> {
        http::send(self.envoy().address(), http::get_request("/orders?page=2", key)?).await
    }

    /// Waits until every Envoy responds with this status to the key.
    pub async fn wait_for_status(&self, key: Option<&str>, status: u16) -> Result<()> {
        for envoy in &self.envoys {
            wait_for_status(envoy, key, status).await?;
        }
        Ok(())
    }

    /// Waits until every Envoy has every change of the database.
    pub async fn in_step(&self) -> Result<()> {
        let revision: u64 = self.database.text("select revision::text from store_state").await?.parse()?;
        for envoy in &self.envoys {
            envoy.wait_for_stat(STORE_REVISION, |now| now >= revision).await?;
        }
        Ok(())
    }

    /// Generates the user's key and waits until every Envoy admits it, which takes one or more requests that are counted.
    pub async fn working_key(&self, email: &str) -> Result<String> {
        let key = self.rest().generate(email).await?;
        self.wait_for_status(Some(&key), 200).await?;
        Ok(key)
    }

    /// Waits until the status of the user's key shows this number of requests.
    pub async fn wait_for_usage(&self, email: &str, requests: u64) -> Result<Value> {
        let rest = self.rest();
        let counted = async || {
            let status = rest.status(email).await.ok()?;
            (status["usageCount"] == requests).then_some(status)
        };
        match eventually(&format!("{requests} requests counted for {email}"), counted).await {
            Err(error) => Err(error.context(format!("the status is {}", rest.status(email).await?))),
            done => done,
        }
    }

    /// Changes columns of the user's primary key directly in the database, where the REST API has no operation.
    pub async fn change_key(&self, email: &str, columns: &str) -> Result<()> {
        let keys = format!("id = (select primary_key_id from user_preferences where email = '{email}')");
        let changed = self.database.execute(&format!("update api_keys set {columns} where {keys}")).await?;
        ensure!(changed == 1, "{changed} keys of {email} were changed");
        Ok(())
    }

    /// Inserts keys directly into the database. Key number n is the text `key-n`, as if imported from elsewhere.
    pub async fn insert_keys(&self, keys: u64) -> Result<()> {
        let users = keys / 10;
        let insert = format!(
            "insert into user_preferences (id, email)
            select gen_random_uuid(), 'many-' || n || '@example.com' from generate_series(1, {users}) n;
            insert into api_keys (id, owner_id, name, hash, revision)
            select gen_random_uuid(), owner.id, 'Many', sha256(convert_to('key-' || n, 'UTF8')), 0
            from generate_series(1, {keys}) n
            join user_preferences owner on owner.email = 'many-' || (n % {users} + 1) || '@example.com'"
        );
        self.database.execute(&insert).await.map(|_| ())
    }

    /// The id of a user: `x-consumer-id` at the upstream.
    pub async fn owner_id(&self, email: &str) -> Result<String> {
        self.database.text(&format!("select id::text from user_preferences where email = '{email}'")).await
    }

    /// A directory that is deleted with the stack.
    pub fn directory(&self) -> PathBuf {
        self.directory.path().to_owned()
    }
}

/// Waits until an Envoy responds with this status to the key.
pub async fn wait_for_status(envoy: &Envoy, key: Option<&str>, status: u16) -> Result<()> {
    wait_for_path(envoy, "/", key, status).await
}

/// The same for a path.
pub async fn wait_for_path(envoy: &Envoy, path: &str, key: Option<&str>, status: u16) -> Result<()> {
    let mut last = None;
    let what = format!("status {status} of {path}");
    let seen = async || {
        let request = http::get_request(path, key).ok()?;
        last = http::send(envoy.address(), request).await.ok();
        last.as_ref().is_some_and(|reply| reply.status == status).then_some(())
    };
    let waited = eventually(&what, seen).await;
    waited.with_context(|| format!("the last answer was {last:?}; Envoy's log ends:\n{}", envoy.log().tail(10)))
}

impl Builder {
    pub const fn envoys(mut self, envoys: usize) -> Self {
        self.envoys = envoys;
        self
    }

    pub const fn workers(mut self, workers: usize) -> Self {
        self.workers = workers;
        self
    }

    /// Fields of the filter's configuration.
    pub fn plugin(mut self, plugin: &Value) -> Self {
        self.replacements.plugin = plugin.as_object().expect("the plugin configuration is an object").clone();
        self
    }

    /// Policies by name, as `PUT /v1/policies/{name}` takes them. They are there before Envoy starts.
    pub fn policies(mut self, policies: &Value) -> Self {
        self.policies = policies.as_object().expect("the policies are an object").clone();
        self
    }

    /// A route for paths with this prefix that names a policy.
    pub fn route(mut self, prefix: &str, policy: &str) -> Self {
        self.replacements.routes.push((prefix.to_owned(), policy.to_owned()));
        self
    }

    /// An access log with the user agents of clients.
    pub fn log_user_agents(mut self) -> Self {
        self.replacements.edit("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "%REQ(USER-AGENT)%");
        self
    }

    pub const fn debug_logs(mut self) -> Self {
        self.debug_logs = true;
        self
    }

    /// A PostgreSQL server of its own, which can be stopped without harm to other tests.
    pub const fn own_postgres(mut self) -> Self {
        self.own_postgres = true;
        self
    }

    /// A PostgreSQL server of its own whose commits wait for the disk, as in production.
    pub const fn durable_postgres(mut self) -> Self {
        (self.own_postgres, self.is_durable) = (true, true);
        self
    }

    /// An environment variable of the control plane and of every Envoy.
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Arguments of `serve`, in place of [`GENEROUS`].
    pub fn control_plane_arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        self
    }

    /// Starts it, and waits until every Envoy has its keys and so refuses an unknown one.
    pub async fn start(self) -> Result<Stack> {
        let stack = self.start_unsynced().await?;
        stack.wait_for_status(Some("no such key"), 401).await?;
        Ok(stack)
    }

    /// Starts it without waiting for the filters to have their keys.
    pub async fn start_unsynced(self) -> Result<Stack> {
        let (database, postgres) = if self.own_postgres {
            let server = if self.is_durable { Postgres::durable().await? } else { Postgres::private().await? };
            let server = Arc::new(server);
            (server.create_database().await?, Some(server))
        } else {
            postgres::test_database().await?
        };
        let mut directory = TempDir::with_prefix("portcullis-")?;
        // PORTCULLIS_KEEP=1 keeps the logs of a scenario that fails.
        directory.disable_cleanup(std::env::var_os("PORTCULLIS_KEEP").is_some());
        let settings = control_plane::Settings {
            arguments: self.arguments,
            log_level: if self.debug_logs { "debug" } else { "info" }.into(),
            environment: self.environment.clone(),
            ..control_plane::Settings::generous(&database)?
        };
        let sync_key = settings.sync_key.clone();
        let log = Log::create(&directory.path().join("control-plane.log"))?;
        let control_plane = ControlPlane::start(settings, directory.path(), log).await?;
        let rest = Rest { address: control_plane.address(), key: control_plane.settings().admin_key };
        for (name, policy) in &self.policies {
            let reply = rest.call(Method::PUT, &format!("/v1/policies/{name}"), Some(policy)).await?;
            ensure!([200, 201].contains(&reply.status), "the policy {name}: {} {:?}", reply.status, reply.body);
        }
        let demo = DemoApi::start(LOCAL).await?;
        let mut envoys = Vec::new();
        for number in 0..self.envoys {
            let (control_plane, upstream) = (control_plane.address(), demo.address());
            let replacements = Replacements { control_plane, upstream, ..self.replacements.clone() };
            let home = directory.path().join(format!("envoy-{number}"));
            let log = Log::create(&directory.path().join(format!("envoy-{number}.log")))?;
            let mut settings = envoy::Settings::new(replacements, sync_key.clone());
            (settings.workers, settings.environment) = (self.workers, self.environment.clone());
            if self.debug_logs {
                settings.log_level = "debug".into();
            }
            envoys.push(Envoy::start(settings, &home, log, &silently).await?);
        }
        Ok(Stack { envoys, demo, control_plane, database, postgres, directory })
    }
}
