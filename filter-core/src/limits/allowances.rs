//! The calls of one VM for allowances of limits that count over all Envoys.
//!
//! The cells of the limits have what the Envoy holds, so every VM spends from it, reports usage and hands tokens back. Each VM
//! reports on its tick what its requests have spent, and asks at once for requests that wait. A cell of its own has the contact
//! of the Envoy with the control plane, which each VM reads on its tick.

use std::cell::{Cell as Slot, RefCell};

use contract::codec::{self, Magic};
use contract::hash::KeyHash;
use contract::id::ReporterId;
use contract::record::Record;
use contract::update::{Entry, Update};
use limits::asking::{Asking, Due, REMEMBERED, Sent};
use limits::contact::Contact;
use limits::holding::{AfterUse, Holding};
use limits::message::{Answer, Ask, Call, Grant, POOLS};
use limits::pool::PoolId;
use limits::{AGAIN_MS, IDLE_MS, TICK_MS};

use super::cell::{Entries, cell_of};
use super::charge::prepare;
use crate::host::{CallResponse, Host, random_bytes};
use crate::keys::KeyLookup;
use crate::leader::control_plane::{ask, explain};
use crate::setup::Setup;
use crate::shared::{CellKey, Cells, SharedData};
use crate::time::NS_PER_MS;
use crate::usage::collector::open;
use crate::vm::Vm;

/// Keys whose limits are asked for together.
const LEARNED_AT_ONCE: usize = 100;

/// The first bytes of [`CellKey::EndedPools`].
const ENDED_POOLS: Magic = Magic(*b"PKE1");

/// The state of one VM.
#[derive(Debug, Default)]
pub struct Allowances {
    asking: RefCell<Asking>,
    contact: Slot<Contact>,
    /// When any VM of this Envoy last asked for a pool, in milliseconds of Unix time.
    used_ms: Slot<u64>,
    reporter: Slot<Option<ReporterId>>,
    /// The root context was woken and has not asked yet.
    is_woken: Slot<bool>,
    /// Keys with limits whose records have come, see [`learn`].
    arrived: RefCell<Vec<KeyHash>>,
}

/// Whether the control plane answered the call that requests waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// The control plane answered.
    Yes,
    /// It did not.
    No,
}

impl Allowances {
    /// The contact with the control plane.
    pub const fn contact(&self) -> Contact {
        self.contact.get()
    }

    #[cfg(test)]
    pub(crate) fn set_contact(&self, contact: Contact) {
        self.contact.set(contact);
    }

    /// Tokens of a pool that requests of this VM wait for.
    pub fn waiting(&self, pool: &PoolId) -> u64 {
        self.asking.borrow().waiting(pool)
    }

    /// Whether no request should wait, because the control plane does not answer.
    pub fn is_unreachable(&self) -> bool {
        self.asking.borrow().is_unreachable()
    }

    /// A request needs tokens of a pool.
    pub fn needed(&self, pool: PoolId) {
        self.asking.borrow_mut().needed(pool);
    }

    /// Queues a pool for the next call, which reports its use and asks for its state.
    pub fn queue(&self, pool: PoolId) {
        self.asking.borrow_mut().queue(pool);
    }

    /// A request waits for tokens. `is_again`: the control plane has just said that only other Envoys have them.
    pub fn need(&self, pool: PoolId, tokens: u64, is_again: bool) {
        self.asking.borrow_mut().need(pool, tokens, is_again);
    }

    /// A request was decided without tokens that it needs, because it may not wait.
    pub fn ask_for(&self, pool: PoolId, tokens: u64) {
        self.asking.borrow_mut().ask_for(pool, tokens);
    }

    /// A request was taken from these pools. The flag says whether little is left.
    pub fn note_spent(&self, pools: &[(PoolId, bool)]) {
        let mut asking = self.asking.borrow_mut();
        pools.iter().for_each(|(pool, is_low)| asking.spent(*pool, *is_low));
    }

    /// Whether the root context should be woken to ask. Returns `true` once, until the root context has called.
    pub fn must_wake(&self) -> bool {
        !self.is_woken.get() && self.asking.borrow().is_urgent() && !self.is_woken.replace(true)
    }

    /// Requests that wait are decided again and say again what they need.
    pub fn start_over(&self) {
        self.asking.borrow_mut().start_over();
    }

    /// The time until the next tick, in milliseconds. It is short while requests wait for what other Envoys hold.
    pub fn tick_ms(&self) -> u64 {
        if self.asking.borrow().is_to_ask_again() { AGAIN_MS } else { TICK_MS }
    }

    /// A tick has come before its time because requests wait for what other Envoys hold.
    pub fn ask_again(&self) {
        self.asking.borrow_mut().ask_again();
    }

    /// Reads the contact with the control plane, as other VMs know it. Returns whether the Envoy may decide by itself for
    /// longer than this VM knew.
    pub fn refresh(&self, data: &SharedData<impl Cells>) -> bool {
        let before = self.contact.get();
        if let Some(cell) = data.get(CellKey::Contact) {
            let (contact, used_ms) = read_contact(&cell.value);
            self.note_contact(contact, used_ms, &[]);
        }
        self.contact.get().alone_until_ms > before.alone_until_ms
    }

    /// `answered`: the pools whose state has just come.
    fn note_contact(&self, contact: Contact, used_ms: u64, answered: &[PoolId]) {
        self.used_ms.set(used_ms);
        let before = self.contact.replace(contact);
        // The control plane has answered another VM, so this one may let requests wait again.
        if contact.answered_ms > before.answered_ms {
            self.asking.borrow_mut().on_answer();
        }
        if before.alone_term != contact.alone_term {
            self.asking.borrow_mut().queue_all_but(answered);
        }
    }

    /// The store has new records. Those of keys with limits are noted until it is known whether the Envoy is alone.
    pub fn note_arrived(&self, update: &Update<'_>) {
        let contact = self.contact.get();
        if contact.answered_ms > 0 && !contact.was_alone() {
            return;
        }
        let mut arrived = self.arrived.borrow_mut();
        let with_limits = update.entries().filter_map(|entry| match entry {
            Entry::Put { hash, record } => {
                Record::from_bytes(&record).is_ok_and(|record| has_limits(&record)).then_some(hash)
            }
            _ => None,
        });
        let room = REMEMBERED.saturating_sub(arrived.len());
        arrived.extend(with_limits.take(room));
    }

    /// Whether the leader's calls must show that the Envoy is live.
    fn is_in_use(&self, now_ms: u64) -> bool {
        let is_used = now_ms.saturating_sub(self.used_ms.get()) < IDLE_MS.saturating_mul(2);
        let knows_all = self.contact.get().was_alone() && !self.asking.borrow().is_new();
        is_used || knows_all || !self.arrived.borrow().is_empty()
    }
}

/// Calls if there is something to ask or report. On a tick, reports all that was spent. The leader's call shows that the Envoy
/// is live and brings recalls.
pub fn call<H: Host, K: KeyLookup>(vm: &Vm<H, K>, setup: &Setup, is_tick: bool, leads: bool) {
    let allowances = &vm.allowances;
    allowances.is_woken.set(false);
    let now_ns = vm.host().now_ns();
    let now_ms = now_ns / NS_PER_MS;
    learn(vm, now_ns);
    let is_tick = is_tick || allowances.asking.borrow().has_missed_tick();
    if is_tick {
        hand_back_unused(vm, now_ms);
        hand_back_idle(vm, now_ms);
    } else if !allowances.asking.borrow().is_urgent() {
        return;
    }
    let Some(due) = allowances.asking.borrow_mut().due(is_tick, now_ms) else { return };
    if due.is_empty() && !(is_tick && leads && allowances.is_in_use(now_ms)) {
        return;
    }
    let asks: Vec<Ask> = due.iter().filter_map(|due| ask_for(vm, *due, now_ns)).collect();
    // The grants come in the order of the asks.
    let pools: Vec<PoolId> = asks.iter().map(|ask| ask.pool).collect();
    match send(vm, setup, asks, false) {
        Some(token) => allowances.asking.borrow_mut().sent(token, pools, now_ms),
        None => on_failure(vm, &Sent { sent_ms: now_ms, pools }, "the call could not be sent"),
    }
}

/// An Envoy that is alone asks for the limits of keys before their first request, so that no request waits. An Envoy
/// among others would be granted nothing.
fn learn<H: Host, K: KeyLookup>(vm: &Vm<H, K>, now_ns: u64) {
    let Allowances { arrived, contact, asking, .. } = &vm.allowances;
    let contact = contact.get();
    let mut arrived = arrived.borrow_mut();
    if contact.answered_ms > 0 && !contact.was_alone() {
        arrived.clear();
    }
    if arrived.is_empty() || !contact.is_alone(now_ns / NS_PER_MS) || asking.borrow().has_queued() {
        return;
    }
    let first = arrived.len().saturating_sub(LEARNED_AT_ONCE);
    for hash in arrived.drain(first..) {
        if let Some(key) = vm.keys.find(&hash, None) {
            prepare(&vm.data, &vm.allowances, &key, now_ns);
        }
    }
}

fn has_limits(record: &Record) -> bool {
    record.plan.is_some() || record.quota.is_some() || record.credits.is_some() || !record.rate_limits.is_empty()
}

/// If this token is that of the call under way: applies its answer.
pub fn on_response<H: Host, K>(vm: &Vm<H, K>, token: u32, response: &impl CallResponse) -> Option<Reached> {
    let sent = vm.allowances.asking.borrow_mut().take_response(token)?;
    let answer = match response.status() {
        Some(200) => Answer::read(&response.body()).map_err(|error| error.to_string()),
        status => Err(explain(status, "ask for allowances")),
    };
    match answer {
        Ok(answer) => {
            apply(vm, &sent, &answer);
            Some(Reached::Yes)
        }
        Err(why) => {
            on_failure(vm, &sent, &why);
            Some(Reached::No)
        }
    }
}

fn on_failure<H: Host, K>(vm: &Vm<H, K>, sent: &Sent, why: &str) {
    let was_reachable = !vm.allowances.is_unreachable();
    vm.allowances.asking.borrow_mut().on_failure(sent);
    vm.stats.count_allowance_failure();
    if was_reachable && vm.allowances.is_unreachable() {
        vm.host().warn(&format!("allowances of shared limits cannot be asked for: {why}"));
    }
}

/// The VM ends, and hands back the allowances of the pools that it knows. Envoy drops the calls of a worker that ends. So the
/// last VM, that of the main thread, calls for all. `is_last`: this is the last VM.
pub fn end<H: Host, K>(vm: &Vm<H, K>, setup: &Setup, is_last: bool) {
    let now_ns = vm.host().now_ns();
    let noted = vm.data.update(CellKey::EndedPools, |cell| {
        let mut asking = vm.allowances.asking.borrow_mut();
        let others: Vec<PoolId> = codec::decode(ENDED_POOLS, cell).unwrap_or_default();
        others.into_iter().for_each(|pool| asking.needed(pool));
        codec::encode(ENDED_POOLS, &asking.known()).map(|bytes| (bytes, ())).map_err(|_| ())
    });
    // It may have had no tick since the control plane answered another VM.
    vm.allowances.refresh(&vm.data);
    let pools = vm.allowances.asking.borrow_mut().all();
    pools.iter().for_each(|pool| hand_back(vm, *pool));
    // If the cell could not be written, the last VM reports only the pools that it knows itself.
    let _ = noted;
    if !is_last {
        return;
    }
    let asks =
        pools.into_iter().filter_map(|pool| ask_for(vm, Due { pool, need: 0, least: 0, is_unused: false }, now_ns));
    let used = asks.filter(|ask| ask.granted > 0 || ask.spent > 0);
    let asks: Vec<Ask> = used.map(|ask| Ask { want: 0, ..ask }).collect();
    let mut chunks = asks.chunks(POOLS).peekable();
    if chunks.peek().is_none() {
        let _ = send(vm, setup, Vec::new(), true);
    }
    while let Some(chunk) = chunks.next() {
        let _ = send(vm, setup, chunk.to_vec(), chunks.peek().is_none());
    }
}

fn send<H: Host, K>(vm: &Vm<H, K>, setup: &Setup, asks: Vec<Ask>, is_last: bool) -> Option<u32> {
    let allowances = &vm.allowances;
    if allowances.reporter.get().is_none() {
        allowances.reporter.set(random_bytes(vm.host()).map(ReporterId).and_then(|ours| open(&vm.data, ours)));
    }
    let reporter = allowances.reporter.get()?;
    vm.stats.count_allowance_call();
    ask(vm.host(), setup, &Call { reporter, is_last, asks }, allowances.contact().was_alone())
}

fn apply<H: Host, K>(vm: &Vm<H, K>, sent: &Sent, answer: &Answer) {
    let allowances = &vm.allowances;
    let now_ms = vm.now_ms();
    let used_ms = if sent.pools.is_empty() { allowances.used_ms.get() } else { now_ms };
    let written = vm.data.update(CellKey::Contact, |cell| {
        let (mut contact, used_before_ms) = read_contact(cell);
        contact.answered(sent.sent_ms, now_ms, answer.live, answer.alone_ms);
        let used_ms = used_ms.max(used_before_ms);
        Ok::<_, (Contact, u64)>((write_contact(&contact, used_ms), (contact, used_ms)))
    });
    if let Ok((contact, used_ms)) = written {
        allowances.note_contact(contact, used_ms, &sent.pools);
    }
    allowances.asking.borrow_mut().on_answer();
    vm.stats.set_live_envoys(answer.live);
    for (pool, grant) in sent.pools.iter().zip(&answer.grants) {
        apply_grant(vm, *pool, grant, sent.sent_ms, now_ms);
    }
    for pool in answer.recalls.iter().take(POOLS) {
        hand_back(vm, *pool);
        allowances.asking.borrow_mut().queue(*pool);
    }
}

fn apply_grant<H: Host, K>(vm: &Vm<H, K>, pool: PoolId, grant: &Grant, sent_ms: u64, now_ms: u64) {
    let contact = vm.allowances.contact();
    change(vm, pool, &mut |holding| {
        holding.apply(grant, &contact, sent_ms);
        !(holding.is_settled(grant) && holding.is_idle(now_ms))
    });
}

fn ask_for<H: Host, K>(vm: &Vm<H, K>, due: Due, now_ns: u64) -> Option<Ask> {
    let contact = vm.allowances.contact();
    let mut ask = None;
    let is_written = change(vm, due.pool, &mut |holding| {
        ask = Some(holding.ask(due, &contact, now_ns));
        true
    });
    ask.filter(|_| is_written)
}

fn hand_back<H: Host, K>(vm: &Vm<H, K>, pool: PoolId) {
    change(vm, pool, &mut |holding| {
        holding.hand_back();
        true
    });
}

/// Hands tokens of fast limits back that were not used for a tick.
fn hand_back_unused<H: Host, K>(vm: &Vm<H, K>, now_ms: u64) {
    let unused = vm.allowances.asking.borrow_mut().unused();
    for pool in unused {
        // Most have nothing to hand back, and reading a cell is cheaper than writing it.
        let cell = vm.data.get(cell_of(pool.subject));
        let Some(mut after) = cell.map(|cell| Entries::read(&cell.value).holding(&pool).hand_back_after_use(now_ms))
        else {
            continue;
        };
        if after == AfterUse::HandedBack {
            let is_written = change(vm, pool, &mut |holding| {
                after = holding.hand_back_after_use(now_ms);
                true
            });
            after = if is_written { after } else { AfterUse::InUse };
        }
        let mut asking = vm.allowances.asking.borrow_mut();
        match after {
            AfterUse::KeepsAll => {}
            AfterUse::HandedBack => asking.queue_unused(pool),
            AfterUse::InUse => asking.watch(pool),
        }
    }
}

/// Pools that were not used for [`IDLE_MS`].
fn hand_back_idle<H: Host, K>(vm: &Vm<H, K>, now_ms: u64) {
    let was_alone = vm.allowances.contact().was_alone();
    let idle = vm.allowances.asking.borrow_mut().idle(was_alone, now_ms);
    for pool in idle {
        let is_idle = vm
            .data
            .get(cell_of(pool.subject))
            .is_some_and(|cell| Entries::read(&cell.value).holding(&pool).is_idle(now_ms));
        if is_idle {
            hand_back(vm, pool);
            vm.allowances.asking.borrow_mut().queue(pool);
        }
    }
}

/// Changes what is held of a pool. `change` returns whether to keep it. Returns whether it was written: not after too much
/// contention.
fn change<H: Host, K>(vm: &Vm<H, K>, pool: PoolId, change: &mut dyn FnMut(&mut Holding) -> bool) -> bool {
    let now_ns = vm.host().now_ns();
    let changed = vm.data.update(cell_of(pool.subject), |cell| {
        let mut entries = Entries::read(cell);
        let mut holding = entries.holding(&pool);
        if change(&mut holding) {
            entries.set_holding(&pool, holding);
        } else {
            entries.remove(&pool);
        }
        Ok::<_, ()>((entries.write(now_ns), ()))
    });
    changed.is_ok()
}

const CONTACT_WORDS: usize = 6;

fn read_contact(bytes: &[u8]) -> (Contact, u64) {
    let (words, _) = bytes.as_chunks::<8>();
    let words = <[[u8; 8]; CONTACT_WORDS]>::try_from(words).unwrap_or_default().map(u64::from_le_bytes);
    let [since_ms, answered_ms, live, alone_term, alone_until_ms, used_ms] = words;
    let (live, alone_term) = (u32::try_from(live).unwrap_or_default(), u32::try_from(alone_term).unwrap_or_default());
    (Contact { since_ms, answered_ms, live, alone_term, alone_until_ms }, used_ms)
}

fn write_contact(contact: &Contact, used_ms: u64) -> Vec<u8> {
    let Contact { since_ms, answered_ms, live, alone_term, alone_until_ms } = *contact;
    let words = [since_ms, answered_ms, live.into(), alone_term.into(), alone_until_ms, used_ms];
    words.map(u64::to_le_bytes).concat()
}

#[cfg(test)]
mod tests;
