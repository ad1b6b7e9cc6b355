//! What one VM does for one store, whichever of Envoy's contexts calls: it decides requests, and on each tick publishes
//! its counts and, if it leads, syncs the store and reports usage.
//!
//! It belongs to the VM and not to a root context: after a configuration update the same VM serves the old root context
//! and the new one, and both must see the same counts and the same conversation.

use std::cell::{Cell as Slot, RefCell};
use std::rc::Rc;
use std::time::Duration;

use contract::decision::{Facts, Presented, decide};
use contract::id::ReporterId;
use contract::outcome::Outcome;
use contract::page::{Header, Page};
use contract::record::Record;
use contract::usage::{Ack, KeyRef, Report, write_reports};

use crate::cells::Names;
use crate::config::{Config, WhenBlind};
use crate::credential::Credential;
use crate::host::{self, Call, SharedData};
use crate::lease::{self, Holder};
use crate::limiter::{self, Limit, Refused};
use crate::metrics::Metrics;
use crate::store::{self, State};
use crate::sync::{POLL_TIMEOUT_MS, Progress, Sync};
use crate::usage::{self, Counts, Outbox};

const REPORT_TIMEOUT_MS: u64 = 10_000;
const NS_PER_MS: u64 = 1_000_000;
const MS_PER_S: u64 = 1_000;

thread_local! {
    static CORES: RefCell<Vec<Rc<Core>>> = const { RefCell::new(Vec::new()) };
}

/// One VM's part in one store.
pub(crate) struct Core {
    names: Names,
    me: Holder,
    slot: Slot<Option<u16>>,
    metrics: Metrics,
    state: Slot<Option<State>>,
    counts: RefCell<Counts>,
    /// The conversation with the control plane, while this VM leads.
    leading: RefCell<Option<Leading>>,
}

struct Leading {
    sync: Sync,
    reporter: ReporterId,
    /// The report that is under way: token, since when, and what it will acknowledge.
    report: Option<(u32, u64)>,
    report_failures: u32,
    report_at_ms: u64,
}

/// What came of a request.
pub(crate) struct Decided {
    pub(crate) outcome: Outcome,
    pub(crate) record: Option<Record>,
    pub(crate) refused: Option<(Limit, Refused)>,
}

impl Core {
    /// The core of this VM for the store that a configuration names.
    ///
    /// # Errors
    /// If the system has no randomness, without which VMs and Envoys cannot be told apart.
    pub(crate) fn of(config: &Config) -> Result<Rc<Self>, String> {
        let names = Names::of(&config.cluster, &config.store);
        CORES.with_borrow_mut(|cores| {
            if let Some(known) = cores.iter().find(|core| core.names == names) {
                return Ok(Rc::clone(known));
            }
            let me = host::random_bytes().map(u64::from_le_bytes).ok_or("the system has no randomness")?;
            let core = Rc::new(Self::new(names, Holder(me.max(1))));
            cores.push(Rc::clone(&core));
            Ok(core)
        })
    }

    fn new(names: Names, me: Holder) -> Self {
        Self {
            names,
            me,
            slot: Slot::new(None),
            metrics: Metrics::define(),
            state: Slot::new(None),
            counts: RefCell::default(),
            leading: RefCell::new(None),
        }
    }

    /// Decides one request and counts it.
    pub(crate) fn decide(&self, config: &Config, credential: Credential) -> Decided {
        let now_ns = host::now_ns();
        let now_ms = now_ns.checked_div(NS_PER_MS).unwrap_or_default();
        let decided = self.blind(config, now_ms).map_or_else(
            || self.judge(config, credential, now_ns),
            |outcome| Decided { outcome, record: None, refused: None },
        );
        let key = decided.record.as_ref().map(|record| KeyRef { id: record.key_id, generation: record.generation });
        let cost = decided.record.as_ref().map_or(0, |record| record.cost);
        self.counts.borrow_mut().add(key, decided.outcome, cost, now_ms);
        self.metrics.decided(decided.outcome);
        decided
    }

    /// What to do with any request, if the store cannot be asked. The state is read anew on each tick, and on each request
    /// as long as there is none.
    fn blind(&self, config: &Config, now_ms: u64) -> Option<Outcome> {
        if self.state.get().is_none() {
            self.state.set(store::state(&SharedData, &self.names));
        }
        let (outcome, choice) = match (self.state.get(), config.max_staleness_ms) {
            (None, _) => (Outcome::NotReady, config.on_not_ready),
            (Some(state), Some(limit_ms)) if now_ms.saturating_sub(state.synced_ms) > limit_ms => {
                (Outcome::Stale, config.on_stale)
            }
            (Some(_), _) => return None,
        };
        Some(match choice {
            WhenBlind::Refuse => outcome,
            WhenBlind::Allow => Outcome::FailedOpen,
        })
    }

    fn judge(&self, config: &Config, credential: Credential, now_ns: u64) -> Decided {
        let record = match credential {
            Credential::Presented(hash) => store::find(&SharedData, &self.names, &hash),
            Credential::Missing | Credential::Oversized => None,
        };
        let presented = match (&credential, &record) {
            (Credential::Missing, _) => Presented::Nothing,
            (_, None) => Presented::Stranger,
            (_, Some(record)) => Presented::Key(record),
        };
        let now_s = now_ns.checked_div(NS_PER_MS.saturating_mul(MS_PER_S)).unwrap_or_default();
        let outcome = decide(presented, &Facts::at(now_s));
        let refused =
            record.as_ref().filter(|_| outcome == Outcome::Allowed).and_then(|r| self.limit(config, r, now_ns));
        let outcome = if refused.is_some() { Outcome::RateLimited } else { outcome };
        Decided { outcome, record, refused }
    }

    /// Takes a request from the key's limits, or from the default; says which refused.
    fn limit(&self, config: &Config, record: &Record, now_ns: u64) -> Option<(Limit, Refused)> {
        let own: Vec<Limit> = record.rate_limits.iter().map(Limit::from).collect();
        let limits = if own.is_empty() { config.rate_limit.as_slice() } else { &own };
        if limits.is_empty() {
            return None;
        }
        let refused = limiter::take(&SharedData, &self.names, record.key_id, limits, now_ns).err()?;
        limits.get(refused.limit).map(|limit| (limit.clone(), refused))
    }

    /// What is to be done every quarter of a second.
    pub(crate) fn tick(&self, config: &Config, key: &str) {
        let now_ms = now_ms();
        self.publish();
        self.state.set(store::state(&SharedData, &self.names));
        if !self.lead(now_ms) {
            return;
        }
        usage::collect(&SharedData, &self.names);
        self.poll(config, key, now_ms);
        self.report(config, key, now_ms);
        self.show(now_ms);
    }

    /// The VM's root context ends: everything counted goes into shared data and, if this VM leads or nobody does, out.
    pub(crate) fn end(&self, config: &Config, key: &str) {
        self.publish();
        if !self.lead(now_ms()) {
            return;
        }
        usage::collect(&SharedData, &self.names);
        let last = usage::freeze(&SharedData, &self.names, true);
        for reports in last.iter().flat_map(Outbox::batches) {
            let _ = send(config, key, &reports);
            // Nobody is left to hear the answer. Importing what did arrive does nothing.
            log_reports(&reports);
        }
        *self.leading.borrow_mut() = None;
        lease::release(&SharedData, &self.names, self.me);
    }

    /// An answer to a call of this VM. Whoever called, it is told to the conversation.
    pub(crate) fn answered(&self, config: &Config, key: &str, token: u32, body_bytes: usize) {
        let now_ms = now_ms();
        let (sync, report) = {
            let mut leading = self.leading.borrow_mut();
            let Some(leading) = leading.as_mut() else { return };
            (leading.sync.answered(token), leading.report.take_if(|(awaited, _)| *awaited == token).is_some())
        };
        let status = host::answer_status();
        if sync {
            let applied = match status {
                Some(200) => {
                    // What the control plane tells may be older than its answer, if it has lost its database.
                    let age_ms = host::answer_number::<u64>("age").unwrap_or_default().saturating_mul(MS_PER_S);
                    self.apply(&host::answer_body(body_bytes), now_ms.saturating_sub(age_ms))
                }
                _ => Err(explain(status, "sync")),
            };
            if let Err(why) = applied {
                self.sync_failed(&why, now_ms);
            }
            // A change was applied: ask for the next before anything else, so that no tick lies between two changes.
            self.poll(config, key, now_ms);
        } else if report {
            let acknowledged = match status {
                Some(200) => Ack::read(&host::answer_body(body_bytes)).map_err(|error| error.to_string()),
                Some(400 | 413) => self.give_up(status),
                _ => Err(explain(status, "report usage")),
            };
            self.reported(acknowledged, now_ms);
        }
    }

    fn publish(&self) {
        let mut counts = self.counts.borrow_mut();
        let slot = self.slot.get().unwrap_or_else(|| usage::take_slot(&SharedData, &self.names));
        self.slot.set(Some(slot));
        counts.publish(&SharedData, &self.names, slot);
    }

    /// Whether this VM leads; becoming the leader, it starts from what the store and the outbox hold.
    fn lead(&self, now_ms: u64) -> bool {
        let mut leading = self.leading.borrow_mut();
        if !lease::hold(&SharedData, &self.names, self.me, now_ms) {
            *leading = None;
            return false;
        }
        if leading.is_none() {
            let Some(ours) = host::random_bytes().map(ReporterId) else { return false };
            let Some(reporter) = Outbox::open(&SharedData, &self.names, ours) else { return false };
            let sync = Sync::from(store::state(&SharedData, &self.names).as_ref());
            *leading = Some(Leading { sync, reporter, report: None, report_failures: 0, report_at_ms: 0 });
        }
        true
    }

    fn poll(&self, config: &Config, key: &str, now_ms: u64) {
        let mut leading = self.leading.borrow_mut();
        let Some(leading) = leading.as_mut() else { return };
        let Some(path) = leading.sync.due(leading.reporter, now_ms) else { return };
        match call(config, key, "GET", &path, None, POLL_TIMEOUT_MS).dispatch() {
            Some(token) => leading.sync.sent(token, now_ms),
            None => {
                let cluster = &config.cluster;
                leading.sync.failed(now_ms, random());
                self.metrics.sync_failures.increment();
                host::warn(&format!("Envoy has no usable cluster {cluster:?}: check control_plane.cluster"));
            }
        }
    }

    fn apply(&self, body: &[u8], synced_ms: u64) -> Result<(), String> {
        let page = Page::read(body).map_err(|error| format!("the page was refused: {error}"))?;
        let mut leading = self.leading.borrow_mut();
        let Some(sync) = leading.as_mut().map(|leading| &mut leading.sync) else { return Ok(()) };
        let progress = sync.judge(&page.header);
        if progress == Progress::Misplaced {
            sync.restart();
            return Err("the page does not continue the store: starting over".into());
        }
        let applied = self.lower(&page.header).and_then(|()| store::apply(&SharedData, &self.names, self.me, &page));
        let applied = applied.and_then(|()| match progress {
            Progress::Complete { epoch, revision, keys } => {
                let state = State { epoch, revision, keys, synced_ms };
                store::set_state(&SharedData, &self.names, self.me, &state)?;
                if self.state.get().is_none() {
                    host::info(&format!("{keys} keys loaded, revision {revision}"));
                }
                self.state.set(Some(state));
                self.metrics.store_version.set(revision);
                self.metrics.keys.set(keys);
                Ok(())
            }
            Progress::Partial | Progress::Misplaced => Ok(()),
        });
        match applied {
            Ok(()) => sync.applied(&page.header),
            // Whoever leads now goes on from what the store says.
            Err(store::Deposed) => *leading = None,
        }
        Ok(())
    }

    /// Should a page go back behind what the store holds, the store is said to be no further than the page before any of
    /// it is written: whoever takes over in the middle then asks for all that came after.
    fn lower(&self, header: &Header) -> Result<(), store::Deposed> {
        match store::state(&SharedData, &self.names) {
            Some(state) if state.epoch == header.epoch && state.revision > header.revision => {
                let lowered = State { revision: header.revision, ..state };
                store::set_state(&SharedData, &self.names, self.me, &lowered)
            }
            _ => Ok(()),
        }
    }

    fn sync_failed(&self, why: &str, now_ms: u64) {
        self.metrics.sync_failures.increment();
        let mut leading = self.leading.borrow_mut();
        let Some(leading) = leading.as_mut() else { return };
        let pause_ms = leading.sync.failed(now_ms, random());
        host::warn(&format!("sync failed, trying again in {pause_ms} ms: {why}"));
    }

    fn report(&self, config: &Config, key: &str, now_ms: u64) {
        let mut leading = self.leading.borrow_mut();
        let Some(leading) = leading.as_mut() else { return };
        let under_way =
            leading.report.is_some_and(|(_, since_ms)| now_ms.abs_diff(since_ms) < REPORT_TIMEOUT_MS.saturating_mul(2));
        let pausing = leading.report_at_ms > now_ms && leading.report_at_ms.saturating_sub(now_ms) <= REPORT_TIMEOUT_MS;
        if under_way || pausing {
            return;
        }
        let Some(outbox) = usage::freeze(&SharedData, &self.names, false) else { return };
        let reports = outbox.reports();
        if !reports.is_empty() {
            leading.report = send(config, key, &reports).map(|token| (token, now_ms));
        }
    }

    fn reported(&self, acknowledged: Result<Ack, String>, now_ms: u64) {
        let mut leading = self.leading.borrow_mut();
        let Some(leading) = leading.as_mut() else { return };
        match acknowledged {
            Ok(Ack { reporter, seq }) => {
                usage::acknowledge(&SharedData, &self.names, reporter, seq);
                leading.report_failures = 0;
                leading.report_at_ms = 0;
            }
            Err(why) => {
                self.metrics.report_failures.increment();
                let pause_ms = 250_u64.checked_shl(leading.report_failures).unwrap_or(u64::MAX).min(5_000);
                leading.report_failures = leading.report_failures.saturating_add(1).min(16);
                leading.report_at_ms = now_ms.saturating_add(pause_ms);
                host::warn(&format!("usage report failed, trying again in {pause_ms} ms: {why}"));
            }
        }
    }

    /// The control plane will never take these reports as they are. So that they do not hold up all that come after, they
    /// go to the log, from where they can be imported once the cause is found.
    fn give_up(&self, status: Option<u16>) -> Result<Ack, String> {
        let reports = Outbox::read(&SharedData, &self.names).map(|outbox| outbox.reports()).unwrap_or_default();
        let last = reports.last().ok_or("the control plane refused nothing")?;
        host::error(&format!("usage reports were refused for good: {}; they follow", explain(status, "report usage")));
        log_reports(&reports);
        self.metrics.report_failures.increment();
        Ok(Ack { reporter: last.reporter, seq: last.seq })
    }

    /// Brings the gauges up to date.
    fn show(&self, now_ms: u64) {
        if let Some(state) = self.state.get() {
            self.metrics.store_version.set(state.revision);
            self.metrics.keys.set(state.keys);
            let age_ms = now_ms.saturating_sub(state.synced_ms);
            self.metrics.sync_age.set(age_ms.checked_div(MS_PER_S).unwrap_or_default());
        }
        let pending = Outbox::read(&SharedData, &self.names).map_or(0, |outbox| outbox.requests());
        self.metrics.usage_pending.set(pending);
    }
}

fn now_ms() -> u64 {
    host::now_ns().checked_div(NS_PER_MS).unwrap_or_default()
}

fn random() -> u64 {
    host::random_bytes().map(u64::from_le_bytes).unwrap_or_default()
}

/// The line that `control-plane usage import` reads.
fn log_reports(reports: &[Report]) {
    let line = write_reports(reports).map(hex::encode).unwrap_or_default();
    host::warn(&format!("portcullis-usage {line}"));
}

fn call<'a>(
    config: &'a Config,
    key: &'a str,
    method: &'a str,
    path: &'a str,
    body: Option<&'a [u8]>,
    timeout_ms: u64,
) -> Call<'a> {
    let Config { cluster, authority, .. } = config;
    Call { cluster, authority, key, method, path, body, timeout: Duration::from_millis(timeout_ms) }
}

fn send(config: &Config, key: &str, reports: &[Report]) -> Option<u32> {
    let body = write_reports(reports).ok()?;
    call(config, key, "POST", "/sync/v1/usage", Some(&body), REPORT_TIMEOUT_MS).dispatch()
}

fn explain(status: Option<u16>, what: &str) -> String {
    match status {
        None => "the control plane did not answer".into(),
        Some(401) => {
            "the control plane does not know the sync key (401): check the environment variable that holds it".into()
        }
        Some(403) => format!("the sync key may not {what} (403): it needs the scope sync, and the reporter to itself"),
        Some(status) => format!("the control plane answered {status}"),
    }
}
