//! Rate limits: how often a key was used comes in, whether it may be used once more goes out. The arithmetic is
//! `contract::rate`; here is its memory.
//!
//! The times live in cells that all VMs share and each change of a cell insists on the version that it read, so what is taken
//! is exact for an Envoy process; VMs may take some of it ahead, see [`super::slice`]. Beside the times of a key stands the share of its limits that this Envoy was granted, so
//! that a request costs one read and one write however many limits there are.
//!
//! A cell forgets times that have passed, and shares that nobody used for an hour, whenever it is written, so it holds
//! about as many as keys were used lately. Keys are known ones; client addresses are anybody's, so they have cells of their
//! own and those are bounded.

use contract::hash::KeyHash;
use contract::id::KeyId;
use contract::rate::{Rate, WHOLE, merged_ns, tag};
use contract::record::RateLimit;

use crate::address::Client;
use crate::shared::{CellKey, Cells, Conflict, SharedData};
use crate::time::NS_PER_S;

/// Cells for keys: the last 16 bits of the key's id name one.
pub const KEY_CELLS: u32 = 65_536;

/// Cells for client addresses.
pub const ADDRESS_CELLS: u16 = 4_096;

/// Most entries of a cell for addresses, 32 bytes each, so that all of them take 64 MiB at the most. Beyond it the address
/// that has rested longest is forgotten, which gives it a fresh burst.
pub const ADDRESS_ENTRIES: usize = 512;

/// A granted share that was not used for so long is forgotten: the default share applies again.
pub const SHARE_REST_S: u32 = 3_600;

/// One request in so many of a burst may be taken ahead at once.
pub const PART: u64 = 64;

const HUNDREDTH_NS: u64 = 10_000_000;

/// Whose limits are asked, and where they are remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Those of a key.
    Key(KeyId),
    /// Those of a client without a key.
    Client(Client),
}

impl Subject {
    fn id(self) -> [u8; 16] {
        match self {
            Self::Key(key) => key.0,
            Self::Client(client) => client.0,
        }
    }

    fn cell(self) -> CellKey {
        match self {
            Self::Key(key) => {
                let [.., high, low] = key.0;
                CellKey::KeyLimits(u16::from_be_bytes([high, low]))
            }
            // Clients choose their addresses: the hash spreads them.
            Self::Client(client) => {
                let bucket = KeyHash::of(&client.0).bucket();
                CellKey::ClientLimits(bucket % ADDRESS_CELLS)
            }
        }
    }

    const fn most_entries(self) -> usize {
        match self {
            Self::Key(_) => usize::MAX,
            Self::Client(_) => ADDRESS_ENTRIES,
        }
    }
}

/// One limit of a subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit<'a> {
    /// The limit.
    pub limit: &'a RateLimit,
    /// Tells it apart from the other limits of the subject.
    pub tag: Tag,
    /// Whether all Envoys judge it together, each its share.
    pub shared: bool,
}

/// Tells the limits of a subject apart where they are remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag(u64);

impl Tag {
    /// The entry that is no time but the granted share.
    const SHARE: Self = Self(u64::MAX);

    /// A limit of a key or its plan, by its name, which stays while places change.
    #[must_use]
    pub fn of_key(name: &str) -> Self {
        Self(tag(name))
    }

    /// A limit of a policy, by its name.
    #[must_use]
    pub fn of_policy(name: &str) -> Self {
        // Beyond all of keys and below the share.
        Self(tag(name) | 1 << 56)
    }
}

/// How far a limit that Envoys share is used over all of them, as the control plane told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Which of the key's limits.
    pub tag: Tag,
    /// How far ahead of now, in nanoseconds.
    pub ahead_ns: u64,
}

impl Used {
    /// What a grant tells of the limit with this number, in hundredths of a second.
    #[must_use]
    pub fn told(tag: u64, ahead: u32) -> Self {
        Self { tag: Tag(tag), ahead_ns: u64::from(ahead).saturating_mul(HUNDREDTH_NS) }
    }
}

/// A limit that refused a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Which of the limits, by place.
    pub limit: usize,
    /// After how many seconds, rounded up, a request will be admitted if none comes before.
    pub retry_after_s: u64,
}

/// What was taken from the limits of a subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// How many requests, one at least.
    pub requests: u32,
    /// The share of shared limits that they were taken from.
    pub share: u32,
}

/// Takes a request from each limit of a subject, or from none of them if one refuses: the one with the longest wait.
/// Of shared limits this Envoy judges the share that it was granted, or else the default share.
///
/// Takes as many as are `wanted`, but of no limit more than a [`PART`] of its burst, and one if that many are not left.
///
/// # Errors
/// [`Refused`].
pub fn take(
    data: &SharedData<impl Cells>,
    subject: Subject,
    limits: &[Limit<'_>],
    wanted: u32,
    default_share: u32,
    now_ns: u64,
) -> Result<Taken, Refused> {
    let taken = data.update(subject.cell(), |cell| {
        let mut entries = Entries::read(cell);
        let share = entries.use_share(subject, now_ns).unwrap_or(default_share);
        let judged = Judged { subject, limits, share, now_ns };
        let requests = judged.slice(wanted);
        let ahead = if requests > 1 { entries.take(&judged, requests).ok() } else { None };
        let requests = ahead.map_or(1, |()| requests);
        match ahead.map_or_else(|| entries.take(&judged, 1), Ok) {
            Ok(()) => Ok((entries.write(now_ns, subject.most_entries()), Ok(Taken { requests, share }))),
            Err(refused) if entries.settle(&judged) => {
                Ok((entries.write(now_ns, subject.most_entries()), Err(refused)))
            }
            Err(refused) => Err(Err(refused)),
        }
    });
    // Too much contention on the cell: treat the limit as exhausted.
    taken.unwrap_or(Err(Refused { limit: 0, retry_after_s: 1 }))
}

/// Gives back to the limits of a subject what was taken and not used. They must be the limits that it was taken from. Should
/// the share have grown since, what was taken became the smaller part of it ([`grant`]), and so does what is given back.
///
/// # Errors
/// [`Conflict`], as good as never.
pub fn give_back(
    data: &SharedData<impl Cells>,
    subject: Subject,
    limits: &[Limit<'_>],
    taken: Taken,
    default_share: u32,
    now_ns: u64,
) -> Result<(), Conflict> {
    data.update(subject.cell(), |cell| {
        let mut entries = Entries::read(cell);
        let present = entries.find(subject, Tag::SHARE).map_or(default_share, |entry| entry.share());
        let judged = Judged { subject, limits, share: taken.share.max(present), now_ns };
        let mut changed = false;
        for (_, tag, rate) in judged.rates() {
            // A time that has passed is full again.
            if let Some(entry) = entries.find(subject, tag).filter(|entry| entry.value > now_ns) {
                entry.value = rate.give_back(taken.requests, entry.value);
                changed = true;
            }
        }
        if changed { Ok((entries.write(now_ns, subject.most_entries()), ())) } else { Err(()) }
    })
}

/// Notes the share of a key's limits that this Envoy was granted; none if it has left it to others, so that it begins with
/// the default share when the key is used again. The default share need not be noted. What comes to a share is used as far
/// as the limits are over all Envoys.
///
/// # Errors
/// [`Conflict`], as good as never.
pub fn grant(
    data: &SharedData<impl Cells>,
    key: KeyId,
    share: Option<u32>,
    used: &[Used],
    default_share: u32,
    now_ns: u64,
) -> Result<(), Conflict> {
    let subject = Subject::Key(key);
    let grown = share.unwrap_or(default_share);
    data.update(subject.cell(), |cell| {
        let mut entries = Entries::read(cell);
        let before = entries.0.len();
        let had = entries.use_share(subject, now_ns).unwrap_or(default_share);
        entries.0.retain(|entry| entry.id != key.0 || entry.tag != Tag::SHARE);
        let noted = entries.0.len() != before;
        if grown == default_share && !noted {
            return Err(());
        }
        if grown > had {
            used.iter().for_each(|used| entries.merge(key, used, had, grown, now_ns));
        }
        if grown != default_share {
            entries.0.push(Entry { id: key.0, tag: Tag::SHARE, value: share_value(grown, now_ns) });
        }
        Ok((entries.write(now_ns, subject.most_entries()), ()))
    })
}

/// A share and when it was last used, in seconds of Unix time.
fn share_value(share: u32, now_ns: u64) -> u64 {
    u64::from(share) << 32 | u64::from(seconds(now_ns))
}

fn seconds(now_ns: u64) -> u32 {
    u32::try_from(now_ns / NS_PER_S).unwrap_or(u32::MAX)
}

/// What a cell holds: `id (16 bytes) │ tag (8 bytes) │ time, or share and second (8 bytes)`, repeated.
struct Entries(Vec<Entry>);

#[derive(Clone, Copy)]
struct Entry {
    id: [u8; 16],
    tag: Tag,
    value: u64,
}

const ENTRY_BYTES: usize = 32;

/// What is asked of a cell.
struct Judged<'a> {
    subject: Subject,
    limits: &'a [Limit<'a>],
    share: u32,
    now_ns: u64,
}

impl Judged<'_> {
    fn rates(&self) -> impl Iterator<Item = (usize, Tag, Rate)> {
        let rate = |limit: &Limit<'_>| Rate::of(limit.limit, if limit.shared { self.share } else { WHOLE });
        self.limits.iter().enumerate().map(move |(place, limit)| (place, limit.tag, rate(limit)))
    }

    /// How many of the requests that are wanted may be taken at once.
    fn slice(&self, wanted: u32) -> u32 {
        let part = |rate: Rate| u32::try_from(rate.burst() / PART).ok();
        self.rates().filter_map(|(_, _, rate)| part(rate)).fold(wanted, u32::min).max(1)
    }

    /// What a client is told to wait, in seconds: as the whole limit would have it, since shares change in less.
    fn retry_after_s(&self, place: usize, rate: &Rate, wait_ns: u64) -> u64 {
        let whole = self.limits.get(place).map_or(*rate, |limit| Rate::of(limit.limit, WHOLE));
        let longer_ns = rate.interval_ns().saturating_sub(whole.interval_ns());
        wait_ns.saturating_sub(longer_ns).div_ceil(NS_PER_S).max(1)
    }
}

impl Entry {
    /// What the entry that is no time says.
    fn share(&self) -> u32 {
        u32::try_from(self.value >> 32).unwrap_or(WHOLE)
    }

    fn is_worth_keeping(&self, now_ns: u64) -> bool {
        if self.tag == Tag::SHARE {
            let used_s = u32::try_from(self.value & u64::from(u32::MAX)).unwrap_or_default();
            used_s.abs_diff(seconds(now_ns)) <= SHARE_REST_S
        } else {
            self.value > now_ns
        }
    }
}

impl Entries {
    fn read(bytes: &[u8]) -> Self {
        let entry = |bytes: &[u8]| {
            let (id, rest) = bytes.split_first_chunk::<16>()?;
            let (tag, rest) = rest.split_first_chunk::<8>()?;
            let (value, _) = rest.split_first_chunk::<8>()?;
            Some(Entry { id: *id, tag: Tag(u64::from_le_bytes(*tag)), value: u64::from_le_bytes(*value) })
        };
        Self(bytes.chunks_exact(ENTRY_BYTES).filter_map(entry).collect())
    }

    fn write(mut self, now_ns: u64, most: usize) -> Vec<u8> {
        self.0.retain(|entry| entry.is_worth_keeping(now_ns));
        // A request adds one at the most, so this is done once.
        while self.0.len() > most {
            let nearest = self.0.iter().enumerate().min_by_key(|(_, entry)| entry.value).map(|(place, _)| place);
            self.0.swap_remove(nearest.unwrap_or_default());
        }
        let mut bytes = Vec::with_capacity(self.0.len().saturating_mul(ENTRY_BYTES));
        for entry in &self.0 {
            bytes.extend_from_slice(&entry.id);
            bytes.extend_from_slice(&entry.tag.0.to_le_bytes());
            bytes.extend_from_slice(&entry.value.to_le_bytes());
        }
        bytes
    }

    /// The share that was granted, which is used now.
    fn use_share(&mut self, subject: Subject, now_ns: u64) -> Option<u32> {
        let id = subject.id();
        let entry = self.0.iter_mut().find(|entry| entry.id == id && entry.tag == Tag::SHARE)?;
        if !entry.is_worth_keeping(now_ns) {
            return None;
        }
        let share = entry.share();
        entry.value = share_value(share, now_ns);
        Some(share)
    }

    fn find(&mut self, subject: Subject, tag: Tag) -> Option<&mut Entry> {
        let id = subject.id();
        self.0.iter_mut().find(|entry| entry.id == id && entry.tag == tag)
    }

    fn take(&mut self, judged: &Judged<'_>, requests: u32) -> Result<(), Refused> {
        let id = judged.subject.id();
        let mut next = Vec::with_capacity(judged.limits.len());
        let mut worst: Option<Refused> = None;
        for (place, tag, rate) in judged.rates() {
            let arrival_ns = self.0.iter().find(|entry| entry.id == id && entry.tag == tag).map(|entry| entry.value);
            match rate.take_ahead(requests, arrival_ns, judged.now_ns) {
                Ok(next_ns) => next.push((tag, next_ns)),
                Err(wait_ns) => {
                    let retry_after_s = judged.retry_after_s(place, &rate, wait_ns);
                    if worst.is_none_or(|worst| retry_after_s > worst.retry_after_s) {
                        worst = Some(Refused { limit: place, retry_after_s });
                    }
                }
            }
        }
        if let Some(refused) = worst {
            return Err(refused);
        }
        for (tag, value) in next {
            match self.find(judged.subject, tag) {
                Some(entry) => entry.value = value,
                None => self.0.push(Entry { id, tag, value }),
            }
        }
        Ok(())
    }

    /// Brings what all Envoys have used of a limit to the part of a share that has come.
    fn merge(&mut self, key: KeyId, used: &Used, share: u32, grown: u32, now_ns: u64) {
        let entry = self.0.iter_mut().find(|entry| entry.id == key.0 && entry.tag == used.tag);
        let own_ns = entry.as_ref().map_or(0, |entry| entry.value.saturating_sub(now_ns));
        let value = now_ns.saturating_add(merged_ns(own_ns, share, used.ahead_ns, grown));
        match entry {
            Some(entry) => entry.value = value,
            None => self.0.push(Entry { id: key.0, tag: used.tag, value }),
        }
    }

    /// Brings times that were set before the clock stepped back, or under a larger limit, within reach again, so that a key
    /// is not refused until the clock has caught up. Clocks of workers that differ by a blink are no step. Returns whether
    /// anything changed.
    fn settle(&mut self, judged: &Judged<'_>) -> bool {
        let mut changed = false;
        for (_, tag, rate) in judged.rates() {
            let Some(entry) = self.find(judged.subject, tag) else { continue };
            let reach_ns = rate.within_reach(entry.value, judged.now_ns);
            if entry.value > reach_ns.saturating_add(NS_PER_S) {
                entry.value = reach_ns;
                changed = true;
            }
        }
        changed
    }
}

#[cfg(test)]
mod tests;
