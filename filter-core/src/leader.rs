//! The leader: the one VM of an Envoy that speaks with the control plane. It keeps the key store up to date and reports usage.
//!
//! Every VM has a [`Leader`], which does nothing while another VM leads.

use contract::id::ReporterId;
use contract::update::{Header, Update};
use contract::usage::{Ack, Report};

use crate::host::{CallResponse, Host, random_bytes};
use crate::keys::KeyStore;
use crate::setup::Setup;
use crate::shared::election::{NodeId, acquire, resign};
use crate::shared::fenced::NotLeader;
use crate::store::state::{self, StoreState};
use crate::time::MS_PER_S;
use crate::usage::collector::{acknowledge, collect, freeze, open, pending_requests, read};
use crate::usage::outbox::{Freeze, Outbox};
use crate::vm::Vm;

pub mod backoff;
pub mod control_plane;
pub mod reporter;
pub mod sync;

use control_plane::{explain, poll_store, send_reports, write_to_log};
use reporter::Reporter;
use sync::{Progress, StoreSync};

/// One VM's part in the election, and its work while it leads.
#[derive(Debug)]
pub struct Leader {
    node: NodeId,
    /// `None` while another VM leads.
    term: Option<Term>,
    /// Requests that no acknowledged report contains, as of the last tick.
    pending: u64,
}

/// What a leader remembers while it leads.
#[derive(Debug)]
struct Term {
    sync: StoreSync,
    reporter: Reporter,
    /// This Envoy process, as the control plane knows it.
    id: ReporterId,
}

impl Leader {
    /// The part of a VM that does not lead yet.
    #[must_use]
    pub const fn new(node: NodeId) -> Self {
        Self { node, term: None, pending: 0 }
    }

    /// Whether this VM leads, as of the last tick.
    #[must_use]
    pub const fn leads(&self) -> bool {
        self.term.is_some()
    }

    /// Takes or extends the leadership. If this VM leads, collects usage, polls the control plane, sends the next report and
    /// sets the gauges.
    pub fn tick<H: Host, K: KeyStore>(&mut self, vm: &Vm<H, K>, setup: &Setup, now_ms: u64) {
        if !self.lead(vm, now_ms) {
            return;
        }
        collect(&vm.data);
        self.poll(vm, setup, now_ms);
        self.report(vm, setup, now_ms);
        self.set_gauges(vm, now_ms);
    }

    /// Handles the response to a call of this VM.
    pub fn on_response<H: Host, K: KeyStore>(
        &mut self,
        vm: &Vm<H, K>,
        setup: &Setup,
        token: u32,
        response: &impl CallResponse,
    ) {
        let Some(term) = &mut self.term else { return };
        let now_ms = vm.now_ms();
        if term.sync.take_response(token) {
            if let Err(why) = self.on_update(vm, response, now_ms) {
                self.on_sync_failure(vm, &why, now_ms);
            }
            // The next poll starts at once and not on the next tick.
            self.poll(vm, setup, now_ms);
        } else if term.reporter.take_response(token) {
            match self.acknowledgement(vm, setup, response) {
                Ok(ack) => self.on_acknowledgement(vm, &ack),
                Err(why) => self.on_report_failure(vm, &why, now_ms),
            }
        }
    }

    /// The VM ends. If it leads, or no VM does, sends the last reports and resigns. Returns whether it did.
    pub fn end<H: Host, K: KeyStore>(&mut self, vm: &Vm<H, K>, setup: &Setup) -> bool {
        if !self.lead(vm, vm.now_ms()) {
            return false;
        }
        collect(&vm.data);
        let last = freeze(&vm.data, Freeze::All);
        for reports in last.iter().flat_map(Outbox::batches) {
            let _ = send_reports(vm.host(), setup, &reports);
            // No VM gets the response, so the log has the reports too. The import skips those that did arrive.
            write_to_log(vm.host(), &setup.sync_key, &reports);
        }
        self.term = None;
        resign(&vm.data, self.node);
        true
    }

    /// Takes or extends the leadership. A new leader starts from the store and the outbox of its predecessor.
    fn lead<H: Host, K>(&mut self, vm: &Vm<H, K>, now_ms: u64) -> bool {
        if !acquire(&vm.data, self.node, now_ms) {
            self.term = None;
            return false;
        }
        if self.term.is_none() {
            let Some(ours) = random_bytes(vm.host()).map(ReporterId) else { return false };
            let Some(id) = open(&vm.data, ours) else { return false };
            let sync = StoreSync::new(state::read(&vm.data).as_ref());
            self.term = Some(Term { sync, reporter: Reporter::default(), id });
        }
        true
    }

    fn poll<H: Host, K>(&mut self, vm: &Vm<H, K>, setup: &Setup, now_ms: u64) {
        let Some(term) = &mut self.term else { return };
        let Some(path) = term.sync.due(term.id, self.pending, now_ms) else { return };
        match poll_store(vm.host(), setup, &path) {
            Some(token) => term.sync.sent(token, now_ms),
            None => {
                term.sync.on_failure(now_ms, random(vm.host()));
                vm.stats.count_sync_failure();
                let cluster = &setup.config.cluster;
                vm.host().warn(&format!("Envoy has no usable cluster {cluster:?}: check control_plane.cluster"));
            }
        }
    }

    /// Applies the update of a response.
    fn on_update<H: Host, K: KeyStore>(
        &mut self,
        vm: &Vm<H, K>,
        response: &impl CallResponse,
        now_ms: u64,
    ) -> Result<(), String> {
        match response.status() {
            Some(200) => {}
            status => return Err(explain(status, "sync")),
        }
        // A control plane without its database answers with what it has, and says how old that is.
        let age_ms = response.number("age").unwrap_or_default().saturating_mul(MS_PER_S);
        let body = response.body();
        let update = Update::read(&body).map_err(|error| format!("the update is not readable: {error}"))?;
        let Some(term) = &mut self.term else { return Ok(()) };
        let progress = term.sync.classify(&update.header);
        if progress == Progress::Misplaced {
            term.sync.restart();
            return Err("the update does not continue the store: starting over".into());
        }
        match apply(vm, self.node, &update, progress, now_ms.saturating_sub(age_ms)) {
            Ok(()) => {
                term.sync.on_applied(&update.header);
                vm.allowances.note_arrived(&update);
            }
            // The new leader continues from the state of the store.
            Err(NotLeader) => self.term = None,
        }
        Ok(())
    }

    fn on_sync_failure<H: Host, K>(&mut self, vm: &Vm<H, K>, why: &str, now_ms: u64) {
        vm.stats.count_sync_failure();
        let Some(term) = &mut self.term else { return };
        let pause_ms = term.sync.on_failure(now_ms, random(vm.host()));
        vm.host().warn(&format!("sync failed, next try in {pause_ms} ms: {why}"));
    }

    fn report<H: Host, K>(&mut self, vm: &Vm<H, K>, setup: &Setup, now_ms: u64) {
        let Some(term) = &mut self.term else { return };
        if !term.reporter.is_due(now_ms) {
            return;
        }
        let Some(outbox) = freeze(&vm.data, Freeze::Pending) else { return };
        let reports = outbox.reports();
        if reports.is_empty() {
            return;
        }
        if let Some(token) = send_reports(vm.host(), setup, &reports) {
            term.reporter.sent(token, now_ms);
        }
    }

    /// The acknowledgement in a response.
    fn acknowledgement<H: Host, K>(
        &self,
        vm: &Vm<H, K>,
        setup: &Setup,
        response: &impl CallResponse,
    ) -> Result<Ack, String> {
        match response.status() {
            Some(200) => Ack::read(&response.body()).map_err(|error| error.to_string()),
            status @ Some(400 | 413) => give_up(vm, setup, status),
            status => Err(explain(status, "report usage")),
        }
    }

    fn on_acknowledgement<H: Host, K>(&mut self, vm: &Vm<H, K>, ack: &Ack) {
        let Some(term) = &mut self.term else { return };
        acknowledge(&vm.data, ack.reporter, ack.seq);
        term.reporter.on_acknowledged();
    }

    fn on_report_failure<H: Host, K>(&mut self, vm: &Vm<H, K>, why: &str, now_ms: u64) {
        vm.stats.count_report_failure();
        let Some(term) = &mut self.term else { return };
        let pause_ms = term.reporter.on_failure(now_ms);
        vm.host().warn(&format!("usage report failed, next try in {pause_ms} ms: {why}"));
    }

    fn set_gauges<H: Host, K>(&mut self, vm: &Vm<H, K>, now_ms: u64) {
        if let Some(state) = vm.state() {
            vm.stats.set_store(state.revision, state.keys);
            vm.stats.set_sync_age(now_ms.saturating_sub(state.synced_ms) / MS_PER_S);
        }
        self.pending = pending_requests(&vm.data);
        vm.stats.set_usage_pending(self.pending);
    }
}

/// Applies an update to the store, then sets the state of the store if the store is complete.
fn apply<H: Host, K: KeyStore>(
    vm: &Vm<H, K>,
    me: NodeId,
    update: &Update<'_>,
    progress: Progress,
    synced_ms: u64,
) -> Result<(), NotLeader> {
    let was_empty = vm.state().is_none();
    lower_state(vm, me, &update.header)?;
    vm.keys.apply(me, update)?;
    if let Progress::Complete { epoch, revision, keys } = progress {
        let state = StoreState { epoch, revision, keys, synced_ms };
        state::set(&vm.data, me, &state)?;
        vm.set_state(state);
        vm.stats.set_store(revision, keys);
        if was_empty {
            vm.host().info(&format!("{keys} keys loaded, revision {revision}"));
        }
    }
    Ok(())
}

/// Sets the state back before an update is applied that is older than the store: a VM that takes over in between then asks for
/// all later changes again.
fn lower_state<H: Host, K>(vm: &Vm<H, K>, me: NodeId, header: &Header) -> Result<(), NotLeader> {
    match state::read(&vm.data) {
        Some(state) if state.epoch == header.epoch && state.revision > header.revision => {
            state::set(&vm.data, me, &StoreState { revision: header.revision, ..state })
        }
        _ => Ok(()),
    }
}

/// Gives up reports that the control plane will never accept. They go to the log, from where they can be imported once the
/// cause is found, so that they do not block later reports.
fn give_up<H: Host, K>(vm: &Vm<H, K>, setup: &Setup, status: Option<u16>) -> Result<Ack, String> {
    let reports: Vec<Report> = read(&vm.data).map(|outbox| outbox.reports()).unwrap_or_default();
    let last = reports.last().ok_or("the control plane refused an empty batch")?;
    let why = explain(status, "report usage");
    vm.host().error(&format!("usage reports were refused for good: {why}; they follow"));
    write_to_log(vm.host(), &setup.sync_key, &reports);
    vm.stats.count_report_failure();
    Ok(Ack { reporter: last.reporter, seq: last.seq })
}

fn random(host: &impl Host) -> u64 {
    random_bytes(host).map(u64::from_le_bytes).unwrap_or_default()
}

#[cfg(test)]
mod tests;
