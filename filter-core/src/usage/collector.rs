//! The leader's work on usage: it moves published counts into the outbox, freezes them into reports, and removes reports that
//! the control plane has acknowledged.

use contract::id::ReporterId;
use contract::usage::Count;

use super::codec;
use super::counter::{BySubject, Counts, SLOTS, add_to};
use super::outbox::{Freeze, Outbox};
use crate::shared::{CellKey, Cells, Conflict, SharedData};

/// Reads the outbox; `None` before the first leader opened it.
pub fn read(data: &SharedData<impl Cells>) -> Option<Outbox> {
    codec::read_outbox(&data.get(CellKey::Outbox)?.value)
}

/// Opens the outbox under this reporter, unless an earlier leader has opened it. Returns the reporter of the outbox.
pub fn open(data: &SharedData<impl Cells>, reporter: ReporterId) -> Option<ReporterId> {
    let opened = change(data, |outbox| match outbox {
        Some(outbox) => Err(outbox.reporter),
        None => Ok((Outbox::new(reporter), reporter)),
    });
    opened.ok().map(|(_, reporter)| reporter)
}

/// Requests that no acknowledged report contains; 0 before the first leader opened the outbox.
pub fn pending_requests(data: &SharedData<impl Cells>) -> u64 {
    data.get(CellKey::Outbox).map_or(0, |outbox| codec::requests(&outbox.value))
}

/// Moves the counts that VMs have published into the outbox. A trap in between loses the counts of one tick at most.
pub fn collect(data: &SharedData<impl Cells>) {
    let mut published: Vec<Vec<Count>> = Vec::new();
    for slot in 0..SLOTS {
        let key = CellKey::Usage(slot);
        let Some(cell) = data.get(key) else { continue };
        // If a VM publishes at this moment, its cell is collected the next time.
        if !cell.value.is_empty() && data.put(key, &[], Some(cell.version)).is_ok() {
            published.push(codec::read_counts(&cell.value));
        }
    }
    let counts = merge(published);
    if counts.is_empty() {
        return;
    }
    let kept = change(data, |outbox| match outbox {
        None => Err(false),
        Some(mut outbox) => {
            outbox.pending = merge(vec![outbox.pending, counts.clone()]);
            Ok((outbox, true))
        }
    });
    if !matches!(kept, Ok((_, true))) {
        // Without an outbox, they go back to a usage cell, to be collected again.
        let mut counts = Counts { counts: counts.into_iter().map(|count| (count.of, count)).collect() };
        counts.publish(data, 0);
    }
}

/// Freezes pending counts. Returns the outbox as it is then.
pub fn freeze(data: &SharedData<impl Cells>, what: Freeze) -> Option<Outbox> {
    let frozen = change(data, |outbox| {
        let mut outbox = outbox.ok_or(None)?;
        if outbox.freeze(what) { Ok((outbox, None)) } else { Err(Some(outbox)) }
    });
    frozen.ok().and_then(|(changed, unchanged)| changed.or(unchanged))
}

/// Removes the reports up to this number, which the control plane has stored.
pub fn acknowledge(data: &SharedData<impl Cells>, reporter: ReporterId, seq: u64) {
    let done = change(data, |outbox| match outbox {
        Some(mut outbox) if outbox.reporter == reporter && outbox.frozen.iter().any(|(frozen, _)| *frozen <= seq) => {
            outbox.frozen.retain(|(frozen, _)| *frozen > seq);
            Ok((outbox, ()))
        }
        _ => Err(()),
    });
    // A report that stays frozen is sent again and acknowledged again.
    let _ = done;
}

/// Changes the outbox. Returns the outbox if it was written, and the result of `change`.
fn change<T>(
    data: &SharedData<impl Cells>,
    change: impl Fn(Option<Outbox>) -> Result<(Outbox, T), T>,
) -> Result<(Option<Outbox>, T), Conflict> {
    data.update(CellKey::Outbox, |old| match change(codec::read_outbox(old)) {
        Ok((outbox, result)) => Ok((codec::write_outbox(&outbox), (Some(outbox), result))),
        Err(result) => Err((None, result)),
    })
}

/// Merges lists of counts, each without two counts of one subject, into one such list.
fn merge(mut lists: Vec<Vec<Count>>) -> Vec<Count> {
    lists.retain(|list| !list.is_empty());
    // The usual case: there is nothing to merge.
    if lists.len() <= 1 {
        return lists.pop().unwrap_or_default();
    }
    let mut sums = BySubject::default();
    lists.iter().for_each(|list| add_to(&mut sums, list));
    sums.into_values().collect()
}
