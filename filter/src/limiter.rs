//! Rate limits: how often a key was used comes in, whether it may be used once more goes out. The arithmetic is
//! `contract::rate`; here is its memory.
//!
//! The times live in cells that all VMs share and each change of a cell insists on the version that it read, so limits are
//! exact for an Envoy process. Beside the times of a key stands the share of its limits that this Envoy was granted, so
//! that a request costs one read and one write however many limits there are.
//!
//! A cell forgets times that have passed, and shares that nobody used for an hour, whenever it is written, so it holds
//! about as many as keys were used lately. Keys are known ones; client addresses are anybody's, so they have cells of their
//! own and those are bounded.

use contract::hash::KeyHash;
use contract::id::KeyId;
use contract::rate::{Rate, WHOLE};
use contract::record::RateLimit;

use crate::address::Client;
use crate::cells::{Cells, Names, Raced, update};

/// Cells for keys: the last 16 bits of the key's id name one.
pub const KEY_CELLS: u32 = 65_536;

/// Cells for client addresses.
pub const ADDRESS_CELLS: u16 = 4_096;

/// Most entries of a cell for addresses, 32 bytes each, so that all of them take 64 MiB at the most. Beyond it the address
/// that has rested longest is forgotten, which gives it a fresh burst.
pub const ADDRESS_ENTRIES: usize = 512;

/// A granted share that was not used for so long is forgotten: the default share applies again.
pub const SHARE_REST_S: u32 = 3_600;

const SECOND_NS: u64 = 1_000_000_000;

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

    fn cell(self, names: &Names) -> String {
        match self {
            Self::Key(key) => {
                let [.., high, low] = key.0;
                names.limiter(u16::from_be_bytes([high, low]))
            }
            // Clients choose their addresses: the hash spreads them.
            Self::Client(client) => {
                let bucket = KeyHash::of(&client.0).bucket();
                names.addresses(bucket.checked_rem(ADDRESS_CELLS).unwrap_or_default())
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

    /// A limit of a key, by its place.
    #[must_use]
    pub fn of_place(place: usize) -> Self {
        // Records have few limits; all beyond the last number would share one.
        Self(u64::from(u8::try_from(place).unwrap_or(u8::MAX)))
    }

    /// A limit of a policy, by its name, which configurations keep while places change.
    #[must_use]
    pub fn of_policy(name: &str) -> Self {
        let [a, b, c, d, e, f, g, ..] = KeyHash::of(name.as_bytes()).0;
        // Beyond all places and below the share.
        Self(u64::from_le_bytes([a, b, c, d, e, f, g, 1]))
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

/// Takes one request from each limit of a subject, or from none of them if one refuses: the one with the longest wait.
/// Of shared limits this Envoy judges the share that it was granted, or else the default share.
///
/// # Errors
/// [`Refused`].
pub fn take(
    cells: &impl Cells,
    names: &Names,
    subject: Subject,
    limits: &[Limit<'_>],
    default_share: u32,
    now_ns: u64,
) -> Result<(), Refused> {
    let taken = update(cells, &subject.cell(names), |cell| {
        let mut entries = Entries::read(cell);
        let share = entries.use_share(subject, now_ns).unwrap_or(default_share);
        let judged = Judged { subject, limits, share, now_ns };
        match entries.take(&judged) {
            Ok(()) => Ok((entries.write(now_ns, subject.most_entries()), Ok(()))),
            Err(refused) if entries.settle(&judged) => {
                Ok((entries.write(now_ns, subject.most_entries()), Err(refused)))
            }
            Err(refused) => Err(Err(refused)),
        }
    });
    // Nobody gets through to the cell: as good as used up.
    taken.unwrap_or(Err(Refused { limit: 0, retry_after_s: 1 }))
}

/// Notes the share of a key's limits that this Envoy was granted. The default share need not be noted.
///
/// # Errors
/// [`Raced`], as good as never.
pub fn grant(
    cells: &impl Cells,
    names: &Names,
    key: KeyId,
    share: u32,
    default_share: u32,
    now_ns: u64,
) -> Result<(), Raced> {
    let subject = Subject::Key(key);
    update(cells, &subject.cell(names), |cell| {
        let mut entries = Entries::read(cell);
        let before = entries.0.len();
        entries.0.retain(|entry| entry.id != key.0 || entry.tag != Tag::SHARE);
        if share == default_share && entries.0.len() == before {
            return Err(());
        }
        if share != default_share {
            entries.0.push(Entry { id: key.0, tag: Tag::SHARE, value: share_value(share, now_ns) });
        }
        Ok((entries.write(now_ns, subject.most_entries()), ()))
    })
}

/// A share and when it was last used, in seconds of Unix time.
fn share_value(share: u32, now_ns: u64) -> u64 {
    u64::from(share) << 32 | u64::from(seconds(now_ns))
}

fn seconds(now_ns: u64) -> u32 {
    u32::try_from(now_ns.checked_div(SECOND_NS).unwrap_or_default()).unwrap_or(u32::MAX)
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
}

impl Entry {
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
        let share = u32::try_from(entry.value >> 32).unwrap_or(WHOLE);
        entry.value = share_value(share, now_ns);
        Some(share)
    }

    fn take(&mut self, judged: &Judged<'_>) -> Result<(), Refused> {
        let id = judged.subject.id();
        let mut next = Vec::with_capacity(judged.limits.len());
        let mut worst: Option<Refused> = None;
        for (place, tag, rate) in judged.rates() {
            let arrival_ns = self.0.iter().find(|entry| entry.id == id && entry.tag == tag).map(|entry| entry.value);
            match rate.take(arrival_ns, judged.now_ns) {
                Ok(next_ns) => next.push((tag, next_ns)),
                Err(wait_ns) => {
                    let retry_after_s = wait_ns.div_ceil(SECOND_NS);
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
            match self.0.iter_mut().find(|entry| entry.id == id && entry.tag == tag) {
                Some(entry) => entry.value = value,
                None => self.0.push(Entry { id, tag, value }),
            }
        }
        Ok(())
    }

    /// Brings times that were set before the clock stepped back, or under a larger limit, within reach again, so that a key
    /// is not refused until the clock has caught up. Clocks of workers that differ by a blink are no step. Returns whether
    /// anything changed.
    fn settle(&mut self, judged: &Judged<'_>) -> bool {
        let id = judged.subject.id();
        let mut changed = false;
        for (_, tag, rate) in judged.rates() {
            let Some(entry) = self.0.iter_mut().find(|entry| entry.id == id && entry.tag == tag) else { continue };
            let reach_ns = rate.within_reach(entry.value, judged.now_ns);
            if entry.value > reach_ns.saturating_add(SECOND_NS) {
                entry.value = reach_ns;
                changed = true;
            }
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cells::memory::MemoryCells;

    const KEY: KeyId = KeyId([7; 16]);
    const NOW: u64 = 1_800_000_000 * SECOND_NS;
    const MS: u64 = 1_000_000;

    fn names() -> Names {
        Names::of("cluster", "default")
    }

    fn limit(requests: u32, window_s: u32, burst: u32) -> RateLimit {
        RateLimit { name: "default".into(), requests, window_s, burst }
    }

    fn placed(limits: &[RateLimit], shared: bool) -> Vec<Limit<'_>> {
        let placed = |(place, limit)| Limit { limit, tag: Tag::of_place(place), shared };
        limits.iter().enumerate().map(placed).collect()
    }

    fn take_of(cells: &MemoryCells, key: KeyId, limits: &[RateLimit], now_ns: u64) -> Result<(), Refused> {
        take(cells, &names(), Subject::Key(key), &placed(limits, false), 1, now_ns)
    }

    fn admitted(cells: &MemoryCells, limits: &[RateLimit], at: impl IntoIterator<Item = u64>) -> usize {
        at.into_iter().filter(|now| take_of(cells, KEY, limits, *now).is_ok()).count()
    }

    /// How many of a hundred are admitted of a shared limit, when nothing else was granted but what `cells` remember.
    fn admitted_of_share(cells: &MemoryCells, default_share: u32, now_ns: u64) -> usize {
        let limits = [limit(100, 1, 100)];
        let limits = placed(&limits, true);
        let subject = Subject::Key(KEY);
        (0..100).filter(|_| take(cells, &names(), subject, &limits, default_share, now_ns).is_ok()).count()
    }

    fn client(address: &str) -> Subject {
        Subject::Client(Client::of(address.parse().unwrap()))
    }

    #[test]
    fn a_burst_is_admitted_and_then_the_steady_rate() {
        let cells = MemoryCells::default();
        let limits = [limit(10, 1, 5)];
        assert_eq!(admitted(&cells, &limits, [NOW; 20]), 5);
        // One token each 100 ms; asked every 10 ms for two seconds.
        assert_eq!(admitted(&cells, &limits, (1..=200).map(|tick| NOW + tick * 10 * MS)), 20);
    }

    #[test]
    fn a_refusal_says_when_to_come_back_and_that_is_true() {
        let cells = MemoryCells::default();
        let limits = [limit(1, 10, 1)];
        assert_eq!(take_of(&cells, KEY, &limits, NOW), Ok(()));
        let refused = take_of(&cells, KEY, &limits, NOW + 500 * MS).unwrap_err();
        assert_eq!(refused, Refused { limit: 0, retry_after_s: 10 });
        assert!(take_of(&cells, KEY, &limits, NOW + 9_999 * MS).is_err());
        assert_eq!(take_of(&cells, KEY, &limits, NOW + 10_000 * MS), Ok(()));
    }

    #[test]
    fn with_several_limits_all_or_none_are_taken() {
        let cells = MemoryCells::default();
        let limits = [limit(100, 1, 100), limit(2, 3_600, 2)];
        assert_eq!(admitted(&cells, &limits, [NOW; 10]), 2);
        let refused = take_of(&cells, KEY, &limits, NOW).unwrap_err();
        assert_eq!(refused, Refused { limit: 1, retry_after_s: 1_800 });
        // The eight refused requests have not touched the first limit.
        assert_eq!(admitted(&cells, &limits[..1], [NOW; 200]), 98);
    }

    #[test]
    fn keys_that_share_a_cell_do_not_share_a_limit() {
        let cells = MemoryCells::default();
        let mut neighbour = KEY;
        neighbour.0[0] = 8;
        let limits = [limit(1, 60, 1)];
        assert_eq!(take_of(&cells, KEY, &limits, NOW), Ok(()));
        assert_eq!(take_of(&cells, neighbour, &limits, NOW), Ok(()));
        assert!(take_of(&cells, KEY, &limits, NOW).is_err());
        assert!(take_of(&cells, neighbour, &limits, NOW).is_err());
        assert_eq!(cells.names().len(), 1);
    }

    #[test]
    fn a_cell_forgets_the_keys_that_have_rested() {
        let cells = MemoryCells::default();
        let limits = [limit(1, 1, 1)];
        for number in 0..100 {
            let mut key = KEY;
            key.0[0] = number;
            assert_eq!(take_of(&cells, key, &limits, NOW), Ok(()));
        }
        assert_eq!(take_of(&cells, KEY, &limits, NOW + 5 * SECOND_NS), Ok(()));
        let cell = cells.get(&names().limiter(0x0707)).unwrap();
        assert_eq!(cell.value.len(), ENTRY_BYTES);
    }

    #[test]
    fn two_workers_that_meet_take_two_tokens() {
        let cells = MemoryCells::default();
        let limits = [limit(1, 60, 1)];
        let other = limits.clone();
        cells.before_next_put(move |cells| assert_eq!(take_of(cells, KEY, &other, NOW), Ok(())));
        assert!(take_of(&cells, KEY, &limits, NOW).is_err());
    }

    #[test]
    fn a_clock_that_steps_back_costs_a_burst_at_the_most() {
        let cells = MemoryCells::default();
        let limits = [limit(10, 1, 5)];
        assert_eq!(admitted(&cells, &limits, [NOW; 10]), 5);
        let back = NOW - 3_600 * SECOND_NS;
        assert_eq!(admitted(&cells, &limits, [back; 10]), 0);
        assert_eq!(admitted(&cells, &limits, [back + SECOND_NS; 10]), 5);
    }

    #[test]
    fn a_limit_of_nothing_admits_one_burst_a_window() {
        let cells = MemoryCells::default();
        assert_eq!(admitted(&cells, &[limit(0, 1, 0)], [NOW; 3]), 1);
    }

    #[test]
    fn of_a_shared_limit_an_envoy_admits_its_share_and_of_others_the_whole() {
        let cells = MemoryCells::default();
        assert_eq!(admitted_of_share(&cells, WHOLE / 4, NOW), 25);
        let cells = MemoryCells::default();
        grant(&cells, &names(), KEY, WHOLE / 10, WHOLE / 4, NOW).unwrap();
        assert_eq!(admitted_of_share(&cells, WHOLE / 4, NOW), 10);
        let cells = MemoryCells::default();
        grant(&cells, &names(), KEY, WHOLE / 10, WHOLE / 4, NOW).unwrap();
        assert_eq!(admitted(&cells, &[limit(100, 1, 100)], [NOW; 200]), 100);
    }

    #[test]
    fn a_share_is_remembered_as_long_as_it_is_used_and_an_hour_more() {
        let cells = MemoryCells::default();
        grant(&cells, &names(), KEY, WHOLE / 10, WHOLE, NOW).unwrap();
        let half_an_hour = |number: u64| NOW + number * 1_800 * SECOND_NS;
        for number in 1..10 {
            assert_eq!(admitted_of_share(&cells, WHOLE, half_an_hour(number)), 10);
        }
        assert_eq!(admitted_of_share(&cells, WHOLE, half_an_hour(12)), 100);
    }

    #[test]
    fn a_share_that_is_the_default_again_takes_no_room() {
        let cells = MemoryCells::default();
        grant(&cells, &names(), KEY, WHOLE, WHOLE, NOW).unwrap();
        assert_eq!(cells.names(), Vec::<String>::new());
        grant(&cells, &names(), KEY, 5, WHOLE, NOW).unwrap();
        grant(&cells, &names(), KEY, 7, WHOLE, NOW).unwrap();
        let bytes = || cells.get(&names().limiter(0x0707)).unwrap().value.len();
        assert_eq!(bytes(), ENTRY_BYTES);
        grant(&cells, &names(), KEY, WHOLE, WHOLE, NOW).unwrap();
        assert_eq!(bytes(), 0);
    }

    #[test]
    fn a_policys_limit_stands_beside_those_of_the_key() {
        let cells = MemoryCells::default();
        let (own, policy) = (limit(100, 1, 100), limit(3, 60, 3));
        let own = Limit { limit: &own, tag: Tag::of_place(0), shared: false };
        let of = |name| Limit { limit: &policy, tag: Tag::of_policy(name), shared: false };
        let admitted = |limits: &[Limit<'_>]| {
            (0..10).filter(|_| take(&cells, &names(), Subject::Key(KEY), limits, 1, NOW).is_ok()).count()
        };
        assert_eq!(admitted(&[own, of("search")]), 3);
        assert_eq!(admitted(&[own, of("export")]), 3);
        assert_eq!(admitted(&[own]), 10);
    }

    #[test]
    fn clients_without_a_key_are_told_apart_by_address_and_v6_by_network() {
        let cells = MemoryCells::default();
        let limits = [limit(1, 60, 1)];
        let one = |client| take(&cells, &names(), client, &placed(&limits, false), WHOLE, NOW).is_ok();
        assert!(one(client("192.0.2.1")) && one(client("192.0.2.2")) && one(client("2001:db8::1")));
        assert!(!one(client("192.0.2.1")) && !one(client("2001:db8::ffff")) && one(client("2001:db8:0:1::1")));
        assert!(cells.names().iter().all(|name| name.contains(":a")));
    }

    #[test]
    fn a_cell_of_addresses_is_bounded_and_keeps_those_that_are_furthest_ahead() {
        let mut entries = Entries(Vec::new());
        for number in 0..600_u64 {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&number.to_be_bytes());
            entries.0.push(Entry { id, tag: Tag(0), value: NOW + 1 + number });
        }
        let bytes = entries.write(NOW, ADDRESS_ENTRIES);
        assert_eq!(bytes.len(), ADDRESS_ENTRIES * ENTRY_BYTES);
        let least = Entries::read(&bytes).0.iter().map(|entry| entry.value).min();
        assert_eq!(least, Some(NOW + 600 - ADDRESS_ENTRIES as u64 + 1));
    }
}
