//! The filter alone: an Envoy with it, a fake control plane and a demo API, without a database.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use anyhow::{Context, Result};
use contract::id::{KeyId, OwnerId};
use contract::policy::NamedPolicy;
use contract::record::Record;
use serde_json::Value;
use tempfile::TempDir;

use crate::control_plane::fresh_key;
use crate::demo::DemoApi;
use crate::envoy::{Envoy, Settings};
use crate::envoy_config::Replacements;
use crate::fake_control_plane::{Change, FIRST_POLICY, FakeControlPlane, Faults};
use crate::http::{Outgoing, Reply, get_request, send};
use crate::log::Log;
use crate::paths;
use crate::policy;
use crate::ports::LOCAL;
use crate::service::Service;
use crate::tools::silently;

/// The running parts. They end when dropped.
#[derive(Debug)]
pub struct FilterHarness {
    /// Envoy with two workers.
    pub envoy: Envoy,
    pub demo: DemoApi,
    pub control_plane: FakeControlPlane,
    /// The numbers of the policies in the store, by name.
    policies: BTreeMap<String, u32>,
    _home: TempDir,
}

#[derive(Clone, Debug)]
pub struct Builder {
    faults: Faults,
    /// The addresses are filled in at the start.
    replacements: Replacements,
    changes: Vec<Change<'static>>,
    policies: Vec<NamedPolicy>,
    traps: bool,
}

impl FilterHarness {
    /// The template without changes.
    pub fn builder() -> Builder {
        let (faults, replacements) = (Faults::default(), Replacements::between(LOCAL, LOCAL));
        Builder { faults, replacements, changes: Vec::new(), policies: Vec::new(), traps: false }
    }

    /// Starts it with the records of these keys, and waits until Envoy has them.
    pub async fn start(keys: &[(&str, Record)]) -> Result<Self> {
        Self::builder().start(keys).await
    }

    /// A request with a key in the usual header.
    pub async fn get(&self, path: &str, key: Option<&str>) -> Result<Reply> {
        self.send(get_request(path, key)?).await
    }

    pub async fn send(&self, request: Outgoing) -> Result<Reply> {
        send(self.envoy.address(), request).await
    }

    /// Repeats a request with a key. Returns how many responses had status 200, and the last response.
    pub async fn get_many(&self, times: usize, path: &str, key: Option<&str>) -> Result<(usize, Reply)> {
        let mut allowed = 0;
        let mut last = self.get(path, key).await?;
        for number in 1..=times {
            allowed += usize::from(last.status == 200);
            if number < times {
                last = self.get(path, key).await?;
            }
        }
        Ok((allowed, last))
    }

    /// Changes the store and waits until Envoy has it.
    pub async fn change(&self, changes: &[Change<'_>]) -> Result<()> {
        let revision = self.control_plane.change(changes);
        self.stat_is("store.revision", revision).await
    }

    /// Removes policies by name, and waits until Envoy knows.
    pub async fn remove_policies(&self, names: &[&str]) -> Result<()> {
        let number = |name: &&str| self.policies.get(*name).map(|number| Change::Undefine(*number));
        let changes: Option<Vec<_>> = names.iter().map(number).collect();
        self.change(&changes.context("no such policy")?).await
    }

    /// Waits until a statistic of the filter has this value.
    pub async fn stat_is(&self, name: &str, value: u64) -> Result<()> {
        self.envoy.wait_for_stat(&format!("wasmcustom.portcullis.{name}"), |now| now == value).await
    }
}

impl Builder {
    /// Fields of the filter's configuration.
    pub fn plugin(mut self, plugin: Value) -> Self {
        if let Value::Object(plugin) = plugin {
            self.replacements.plugin = plugin;
        }
        self
    }

    /// Policies by name, in the JSON of the REST API.
    pub fn policies(mut self, policies: &Value) -> Self {
        let policies = policies.as_object().into_iter().flatten().map(|(name, body)| policy::named(name, body));
        self.policies.extend(policies);
        self
    }

    pub const fn faults(mut self, faults: Faults) -> Self {
        self.faults = faults;
        self
    }

    /// A route for paths with this prefix that names a policy.
    pub fn route(mut self, prefix: &str, policy: &str) -> Self {
        self.replacements.routes.push((prefix.to_owned(), policy.to_owned()));
        self
    }

    /// A change of the store before Envoy starts.
    pub fn change(mut self, change: Change<'static>) -> Self {
        self.changes.push(change);
        self
    }

    /// One trusted proxy in front of Envoy.
    pub fn behind_a_proxy(self) -> Self {
        self.edit("xff_num_trusted_hops: 0", "xff_num_trusted_hops: 1")
    }

    /// A service in place of the demo API.
    pub fn service(mut self, service: Service) -> Self {
        self.replacements.service = Some(service);
        self
    }

    /// Replaces a text that occurs once in the template.
    pub fn edit(mut self, marker: &str, new: &str) -> Self {
        self.replacements.edit(marker, new);
        self
    }

    /// A listener for IPv4 and IPv6 on one socket.
    pub fn both_families(mut self) -> Self {
        self.replacements.listener = (Ipv6Addr::UNSPECIFIED, 0).into();
        self
    }

    /// Uses the filter that traps on demand.
    pub const fn that_can_trap(mut self) -> Self {
        self.traps = true;
        self
    }

    /// Starts it with the records of these keys, and waits until Envoy has them.
    pub async fn start(self, keys: &[(&str, Record)]) -> Result<FilterHarness> {
        let harness = self.start_unsynced(keys).await?;
        // The statistic is written after the store, so every worker has the keys.
        harness.stat_is("store.keys", keys.len().try_into()?).await?;
        Ok(harness)
    }

    /// Starts it without waiting for Envoy to have the keys.
    pub async fn start_unsynced(self, keys: &[(&str, Record)]) -> Result<FilterHarness> {
        let mut home = TempDir::with_prefix("portcullis-")?;
        home.disable_cleanup(std::env::var_os("PORTCULLIS_KEEP").is_some());
        let (demo, control_plane) = (DemoApi::start(LOCAL).await?, FakeControlPlane::start(keys, self.faults).await?);
        let numbered = || (FIRST_POLICY..).zip(&self.policies);
        let policies = numbered().map(|(number, policy)| (policy.name.clone(), number)).collect();
        let changes = numbered().map(|(number, policy)| Change::Define(number, policy.clone().into()));
        control_plane.change(&self.changes.into_iter().chain(changes).collect::<Vec<_>>());
        let (address, upstream) = (control_plane.address(), demo.address());
        let replacements = Replacements { control_plane: address, upstream, ..self.replacements };
        let settings = Settings::new(replacements, fresh_key()?);
        let log = Log::create(&home.path().join("envoy.log"))?;
        let directory = home.path().join("envoy");
        let envoy = Envoy::prepare(settings, &directory, log, &silently)?;
        if self.traps {
            let filter = paths::trap_wasm();
            std::fs::copy(&filter, directory.join("portcullis.wasm"))
                .with_context(|| format!("{} is missing; run `cargo xtask wasm --for-faults`", filter.display()))?;
        }
        envoy.restart().await?;
        Ok(FilterHarness { envoy, demo, control_plane, policies, _home: home })
    }
}

/// The record of a plain key.
pub fn record(number: u8) -> Record {
    Record::plain(KeyId([number; 16]), OwnerId([0x22; 16]))
}

/// The record of a plain key with a change.
pub fn with(number: u8, change: impl FnOnce(&mut Record)) -> Record {
    let mut record = record(number);
    change(&mut record);
    record
}
