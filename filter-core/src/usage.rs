//! Usage on its way out of an Envoy: requests are counted in each VM, the counts are merged into shared data, and the
//! leader freezes them into reports that it repeats until they are acknowledged.
//!
//! ```text
//! Counts (a VM's own) ─ publish ─▶ usage cells ─ collect ─▶ outbox { frozen report, pending } ─▶ control plane
//! ```
//! Every step is one write of one cell, so a count is always in exactly one place. A VM that traps loses what it counted
//! since its last publish and nothing else. Counts of the same key, outcome and hour are merged at each step, so an
//! outage costs memory by active keys and not by requests.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use contract::id::ReporterId;
use contract::outcome::Outcome;
use contract::usage::{Count, KeyRef, REPORT_COUNTS, Report, SHADOW, Subject};

use crate::cells::{Cells, Names, Raced, update};
use crate::mixed::Mixed;

/// Cells that VMs publish to. VMs take them in turn; those beyond share.
pub const SLOTS: u16 = 64;

/// Most reports that are sent together.
pub const BATCH_REPORTS: usize = 4;

const HOUR_MS: u64 = 3_600_000;

/// What leases paid for one request, or should have paid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drawn {
    /// Of its owner's credits.
    pub credits: u32,
    /// Of its key's quota.
    pub quota: bool,
}

/// What one VM counted since it last published.
#[derive(Debug, Default)]
pub struct Counts {
    counts: BySubject,
}

type BySubject = HashMap<Subject, Count, BuildHasherDefault<Mixed>>;

impl Counts {
    /// Counts one decided request; `shadowed` if it should have been refused and was not.
    /// `drawn`: credits and, of its key's quota, requests that leases paid for it. If they could not pay its credits, those
    /// that it would have cost are told, so that the next lease is large enough.
    pub fn add(&mut self, key: Option<KeyRef>, outcome: Outcome, shadowed: bool, drawn: Drawn, now_ms: u64) {
        let hour = u32::try_from(now_ms.checked_div(HOUR_MS).unwrap_or_default()).unwrap_or(u32::MAX);
        let code = outcome.code() | if shadowed { SHADOW } else { 0 };
        let of = Subject { key, outcome: code, hour };
        let Drawn { credits, quota } = match outcome {
            Outcome::Allowed => drawn,
            Outcome::CreditsExhausted => Drawn { quota: false, ..drawn },
            _ => Drawn::default(),
        };
        let one = Count { of, requests: 1, cost: credits.into(), drawn: quota.into(), last_ms: now_ms };
        self.counts.entry(of).and_modify(|count| count.add(&one)).or_insert(one);
    }

    /// Moves everything into the usage cell of a slot. What cannot be moved now stays for the next time.
    pub fn publish(&mut self, cells: &impl Cells, names: &Names, slot: u16) {
        if self.counts.is_empty() {
            return;
        }
        let published = update(cells, &names.usage(slot), |old| {
            if old.is_empty() {
                // As it is most of the time: the leader has taken what was there.
                return Ok::<_, ()>((cell::write_counts(self.counts.values()), ()));
            }
            let mut all = Merged::default();
            all.extend(&cell::read_counts(old));
            all.extend(self.counts.values());
            Ok((cell::write_counts(all.0.values()), ()))
        });
        if published == Ok(()) {
            self.counts.clear();
        }
    }
}

/// Takes the next usage slot for a VM that starts.
pub fn take_slot(cells: &impl Cells, names: &Names) -> u16 {
    let taken = update(cells, &names.slots(), |cell| {
        let next = cell.first_chunk::<2>().map_or(0, |bytes| u16::from_le_bytes(*bytes));
        let after = next.saturating_add(1).checked_rem(SLOTS).unwrap_or_default();
        Ok::<_, u16>((after.to_le_bytes().to_vec(), next))
    });
    taken.unwrap_or_default()
}

/// What the leader holds for the control plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outbox {
    /// This Envoy process.
    pub reporter: ReporterId,
    /// The number of the newest frozen report; 0 before the first.
    pub frozen_seq: u64,
    /// Frozen and not yet acknowledged, in ascending order of their numbers. One, unless an Envoy said its last words.
    pub frozen: Vec<(u64, Vec<Count>)>,
    /// What came since.
    pub pending: Vec<Count>,
}

impl Outbox {
    /// Reads the outbox; `None` before the first leader opened it.
    pub fn read(cells: &impl Cells, names: &Names) -> Option<Self> {
        cell::read_outbox(&cells.get(&names.outbox())?.value)
    }

    /// Opens the outbox under the given reporter, unless a leader has done so before. Returns the one that counts.
    pub fn open(cells: &impl Cells, names: &Names, reporter: ReporterId) -> Option<ReporterId> {
        let opened = change(cells, names, |outbox| match outbox {
            Some(outbox) => Err(outbox.reporter),
            None => Ok((Self { reporter, frozen_seq: 0, frozen: Vec::new(), pending: Vec::new() }, reporter)),
        });
        opened.ok().map(|(_, reporter)| reporter)
    }

    /// The reports that wait for their acknowledgement, as many as fit one batch.
    #[must_use]
    pub fn reports(&self) -> Vec<Report> {
        self.batches().next().unwrap_or_default()
    }

    /// All reports that wait for their acknowledgement, batch by batch.
    pub fn batches(&self) -> impl Iterator<Item = Vec<Report>> {
        let report =
            |(seq, counts): &(u64, Vec<Count>)| Report { reporter: self.reporter, seq: *seq, counts: counts.clone() };
        self.frozen.chunks(BATCH_REPORTS).map(move |batch| batch.iter().map(report).collect())
    }

    fn freeze_one(&mut self) {
        let rest = self.pending.split_off(self.pending.len().min(REPORT_COUNTS));
        self.frozen_seq = self.frozen_seq.saturating_add(1);
        self.frozen.push((self.frozen_seq, std::mem::replace(&mut self.pending, rest)));
    }

    /// Requests that no acknowledged report has told of.
    #[must_use]
    pub fn requests(&self) -> u64 {
        let counts = self.frozen.iter().flat_map(|(_, counts)| counts).chain(&self.pending);
        counts.fold(0, |sum, count| sum.saturating_add(count.requests))
    }
}

/// Requests that no acknowledged report has told of; none before the first leader opened the outbox.
pub fn waiting(cells: &impl Cells, names: &Names) -> u64 {
    cells.get(&names.outbox()).map_or(0, |outbox| cell::requests(&outbox.value))
}

/// Moves what VMs have published into the outbox. Whoever is cut off here by a trap loses what it had taken out: no more
/// than one interval.
pub fn collect(cells: &impl Cells, names: &Names) {
    let mut taken: Vec<Vec<Count>> = Vec::new();
    for slot in 0..SLOTS {
        let name = names.usage(slot);
        let Some(cell) = cells.get(&name) else { continue };
        // A VM that publishes at this moment wins, and its cell is taken the next time.
        if !cell.value.is_empty() && cells.put(&name, &[], Some(cell.version)).is_ok() {
            taken.push(cell::read_counts(&cell.value));
        }
    }
    let taken = merged(taken);
    if taken.is_empty() {
        return;
    }
    let kept = change(cells, names, |outbox| match outbox {
        None => Err(false),
        Some(mut outbox) => {
            outbox.pending = merged(vec![outbox.pending, taken.clone()]);
            Ok((outbox, true))
        }
    });
    if !matches!(kept, Ok((_, true))) {
        // No outbox to put them in: back to where they come from, to be collected again.
        let mut counts = Counts { counts: taken.into_iter().map(|count| (count.of, count)).collect() };
        counts.publish(cells, names, 0);
    }
}

/// What to freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freeze {
    /// What is pending, as much as fits one report, if none waits for its acknowledgement.
    Pending,
    /// The same, and a report without counts if nothing is pending.
    EvenNothing,
    /// As the last words of an Envoy: all that is pending, into as many reports as it takes.
    All,
}

/// Freezes what is pending. Returns the outbox as it is then.
pub fn freeze(cells: &impl Cells, names: &Names, what: Freeze) -> Option<Outbox> {
    let frozen = change(cells, names, |outbox| {
        let mut outbox = outbox.ok_or(None)?;
        let reports = match what {
            Freeze::Pending if outbox.frozen.is_empty() => usize::from(!outbox.pending.is_empty()),
            Freeze::EvenNothing if outbox.frozen.is_empty() => 1,
            Freeze::Pending | Freeze::EvenNothing => 0,
            Freeze::All => outbox.pending.len().div_ceil(REPORT_COUNTS),
        };
        if reports == 0 {
            return Err(Some(outbox));
        }
        (0..reports).for_each(|_| outbox.freeze_one());
        Ok((outbox, None))
    });
    frozen.ok().and_then(|(changed, unchanged)| changed.or(unchanged))
}

/// Forgets the frozen reports that the control plane has.
pub fn acknowledge(cells: &impl Cells, names: &Names, reporter: ReporterId, seq: u64) {
    let done = change(cells, names, |outbox| match outbox {
        Some(mut outbox) if outbox.reporter == reporter && outbox.frozen.iter().any(|(frozen, _)| *frozen <= seq) => {
            outbox.frozen.retain(|(frozen, _)| *frozen > seq);
            Ok((outbox, ()))
        }
        _ => Err(()),
    });
    // Left frozen, a report is sent again and acknowledged again.
    let _ = done;
}

/// Changes the outbox; gives what was written, if something was, and what `change` says.
fn change<T>(
    cells: &impl Cells,
    names: &Names,
    change: impl Fn(Option<Outbox>) -> Result<(Outbox, T), T>,
) -> Result<(Option<Outbox>, T), Raced> {
    update(cells, &names.outbox(), |old| match change(cell::read_outbox(old)) {
        Ok((outbox, result)) => Ok((cell::write_outbox(&outbox), (Some(outbox), result))),
        Err(result) => Err((None, result)),
    })
}

/// Counts by subject, in no order.
#[derive(Default)]
struct Merged(BySubject);

impl Merged {
    fn extend<'a>(&mut self, counts: impl IntoIterator<Item = &'a Count>) {
        for count in counts {
            self.0.entry(count.of).and_modify(|sum| sum.add(count)).or_insert(*count);
        }
    }
}

/// Several lists of counts, each without two of one subject, as one such list.
fn merged(mut lists: Vec<Vec<Count>>) -> Vec<Count> {
    lists.retain(|list| !list.is_empty());
    // As it is most of the time: there is nothing to merge.
    if lists.len() <= 1 {
        return lists.pop().unwrap_or_default();
    }
    let mut merged = Merged::default();
    lists.iter().for_each(|list| merged.extend(list));
    merged.0.into_values().collect()
}

mod cell;
#[cfg(test)]
mod tests;
