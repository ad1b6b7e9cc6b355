//! What one VM does between requests: on each tick it publishes its counts and, if it leads, syncs the store and reports
//! usage.

use std::time::Duration;

use contract::id::ReporterId;
use contract::page::{Header, Page};
use contract::rate::WHOLE;
use contract::usage::{Ack, Report, write_reports};
use contract::usage_log::LogKey;

use crate::core::Core;
use crate::host::{self, Call, SharedData};
use crate::root::TICK_MS;
use filter_core::config::Config;
use filter_core::grants;
use filter_core::lease;
use filter_core::reports::{REPORT_TIMEOUT_MS, Reports};
use filter_core::store::{self, State};
use filter_core::sync::{POLL_TIMEOUT_MS, Progress, Sync};
use filter_core::usage::{self, Freeze, Outbox};

const NS_PER_MS: u64 = 1_000_000;
const MS_PER_S: u64 = 1_000;

/// What the leader remembers of the conversation with the control plane.
pub(crate) struct Leading {
    sync: Sync,
    reports: Reports,
    reporter: ReporterId,
}

impl Core {
    /// What is to be done every quarter of a second.
    pub(crate) fn tick(&self, config: &Config, key: &str) {
        let now_ms = now_ms();
        self.publish();
        self.metrics.tell();
        self.quarter.set(self.quarter.get().wrapping_add(1) & 3);
        self.give_back(self.quarter.get(), now_ms);
        self.next_tick_ms.set(now_ms.saturating_add(TICK_MS));
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
        self.metrics.tell();
        for quarter in 0..4 {
            self.give_back(quarter, now_ms());
        }
        if !self.lead(now_ms()) {
            return;
        }
        usage::collect(&SharedData, &self.names);
        let last = usage::freeze(&SharedData, &self.names, Freeze::All);
        for reports in last.iter().flat_map(Outbox::batches) {
            let _ = send(config, key, &reports);
            // Nobody is left to hear the answer. Importing what did arrive does nothing.
            log_reports(key, &reports);
        }
        *self.leading.borrow_mut() = None;
        lease::release(&SharedData, &self.names, self.me);
    }

    /// An answer to a call of this VM. Whoever called, it is told to the conversation.
    pub(crate) fn answered(&self, config: &Config, key: &str, token: u32, status: Option<u16>, body_bytes: usize) {
        let now_ms = now_ms();
        let (sync, report) = {
            let mut leading = self.leading.borrow_mut();
            let Some(leading) = leading.as_mut() else { return };
            (leading.sync.answered(token), leading.reports.answered(token))
        };
        if sync {
            #[cfg(feature = "trap")]
            if status.is_some() {
                crate::trap::spring_on_answer();
            }
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
        } else if let Some(empty) = report {
            let acknowledged = match status {
                Some(200) => Ack::read(&host::answer_body(body_bytes)).map_err(|error| error.to_string()),
                Some(400 | 413) => self.give_up(key, status),
                _ => Err(explain(status, "report usage")),
            };
            self.reported(acknowledged, empty, now_ms);
        }
    }

    fn publish(&self) {
        let mut counts = self.counts.borrow_mut();
        let slot = self.slot.get().unwrap_or_else(|| usage::take_slot(&SharedData, &self.names));
        self.slot.set(Some(slot));
        counts.publish(&SharedData, &self.names, slot);
    }

    /// Gives back what was taken from the limits of a quarter of the keys and not used.
    fn give_back(&self, quarter: u8, now_ms: u64) {
        let share = self.state.get().map_or(WHOLE, |state| state.default_share());
        let now_ns = now_ms.saturating_mul(NS_PER_MS);
        self.slices.give_back(quarter, &SharedData, &self.names, share, now_ns);
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
            let reports = if reporter == ours { Reports::default() } else { Reports::taken_over() };
            *leading = Some(Leading { sync, reports, reporter });
        }
        true
    }

    fn poll(&self, config: &Config, key: &str, now_ms: u64) {
        let mut leading = self.leading.borrow_mut();
        let Some(leading) = leading.as_mut() else { return };
        let Some(path) = leading.sync.due(leading.reporter, self.pending.get(), now_ms) else { return };
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
        let applied = self
            .lower(&page.header)
            .and_then(|()| store::publish(&SharedData, &self.names, self.me, &page, &self.metrics.store_writes));
        let applied = applied.and_then(|()| match progress {
            Progress::Complete { epoch, revision, keys } => {
                let state = State { epoch, revision, keys, synced_ms, filters: page.header.filters };
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
        let Some(what) = leading.reports.due(now_ms) else { return };
        let Some(outbox) = usage::freeze(&SharedData, &self.names, what) else { return };
        let reports = outbox.reports();
        if reports.is_empty() {
            return;
        }
        if let Some(token) = send(config, key, &reports) {
            let empty = reports.iter().all(|report| report.counts.is_empty());
            leading.reports.sent(token, empty, now_ms);
        }
    }

    fn reported(&self, acknowledged: Result<Ack, String>, empty: bool, now_ms: u64) {
        let mut leading = self.leading.borrow_mut();
        let Some(leading) = leading.as_mut() else { return };
        match acknowledged {
            Ok(Ack { reporter, seq, grants }) => {
                // First what was granted: the next report says that it was heard.
                if reporter == leading.reporter {
                    let share = self.state.get().map_or(WHOLE, |state| state.default_share());
                    grants::apply(&SharedData, &self.names, &grants, share, now_ms.saturating_mul(NS_PER_MS));
                }
                usage::acknowledge(&SharedData, &self.names, reporter, seq);
                leading.reports.acknowledged(empty, !grants.is_empty(), now_ms);
            }
            Err(why) => {
                self.metrics.report_failures.increment();
                let pause_ms = leading.reports.failed(now_ms);
                host::warn(&format!("usage report failed, trying again in {pause_ms} ms: {why}"));
            }
        }
    }

    /// The control plane will never take these reports as they are. So that they do not hold up all that come after, they
    /// go to the log, from where they can be imported once the cause is found.
    fn give_up(&self, key: &str, status: Option<u16>) -> Result<Ack, String> {
        let reports = Outbox::read(&SharedData, &self.names).map(|outbox| outbox.reports()).unwrap_or_default();
        let last = reports.last().ok_or("the control plane refused nothing")?;
        host::error(&format!("usage reports were refused for good: {}; they follow", explain(status, "report usage")));
        log_reports(key, &reports);
        self.metrics.report_failures.increment();
        Ok(Ack { reporter: last.reporter, seq: last.seq, grants: Vec::new() })
    }

    /// Brings the gauges up to date.
    fn show(&self, now_ms: u64) {
        if let Some(state) = self.state.get() {
            self.metrics.store_version.set(state.revision);
            self.metrics.keys.set(state.keys);
            let age_ms = now_ms.saturating_sub(state.synced_ms);
            self.metrics.sync_age.set(age_ms.checked_div(MS_PER_S).unwrap_or_default());
        }
        let pending = usage::waiting(&SharedData, &self.names);
        self.metrics.usage_pending.set(pending);
        self.pending.set(pending);
    }
}

fn now_ms() -> u64 {
    host::now_ns().checked_div(NS_PER_MS).unwrap_or_default()
}

fn random() -> u64 {
    host::random_bytes().map(u64::from_le_bytes).unwrap_or_default()
}

/// The line that `control-plane usage import` reads.
fn log_reports(key: &str, reports: &[Report]) {
    if let Ok(reports) = write_reports(reports) {
        host::warn(&LogKey::derive(key.as_bytes()).line(&reports));
    }
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
