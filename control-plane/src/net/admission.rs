//! Admission of connections: how many there may be at once, of one address and in all, and what is reserved for filters.
//!
//! Clients are known only once a request presents a key. A connection beyond the bounds is therefore not closed at once: it
//! becomes a *newcomer*, which may only present a sync key. Later connections evict newcomers.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::sync::Notify;

use super::network_of;

/// File descriptors for everything else, such as the log, certificates that are read, and evicted connections.
const OTHER_DESCRIPTORS: u64 = 64;

/// Most evicted connections that still end. Beyond, new connections wait until one has ended, so that descriptors do not run out.
const ENDING: usize = 16;

/// Bounds of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// All connections at once.
    pub total: usize,
    /// Connections of one address that have not presented a sync key. IPv6 addresses count by their /64.
    pub by_address: usize,
    /// Connections of the total that are reserved for filters.
    pub reserved: usize,
}

impl Limits {
    /// Consistent bounds: at least one connection is not reserved, and one address gets at most half of these.
    pub fn new(total: usize, by_address: usize, reserved: Option<usize>) -> Self {
        let reserved = reserved.unwrap_or(total / 4).min(total.saturating_sub(1));
        let half = total.saturating_sub(reserved) / 2;
        Self { total, by_address: by_address.min(half).max(1), reserved }
    }

    const fn public(&self) -> usize {
        self.total.saturating_sub(self.reserved)
    }
}

/// The state of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    /// Within the bounds for clients without a sync key.
    Public,
    /// Beyond these bounds, and without a sync key so far.
    Newcomer,
    /// It has presented a sync key.
    Filter,
    /// It was evicted and still ends.
    Evicted,
}

/// The present connections.
#[derive(Debug)]
pub struct Admission {
    limits: Limits,
    places: Mutex<Places>,
    freed: Notify,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Full {
    /// Evicted connections still end.
    Ending,
    /// No connection can be evicted.
    Refused,
}

#[derive(Debug, Default)]
struct Places {
    next: u64,
    held: HashMap<u64, Arc<Place>>,
    public: usize,
    public_by_network: HashMap<IpAddr, usize>,
    /// The oldest first.
    newcomers: HashMap<IpAddr, BTreeSet<u64>>,
}

/// The place of one connection.
#[derive(Debug)]
pub struct Place {
    admission: Arc<Admission>,
    id: u64,
    network: IpAddr,
    /// A [`Kind`], changed only while the places are locked.
    kind: AtomicU8,
    evicted: Notify,
}

/// Holds the place of a connection until it is dropped.
#[derive(Debug)]
pub struct AdmittedConnection(Arc<Place>);

impl Admission {
    /// No connections yet.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, places: Mutex::default(), freed: Notify::new() })
    }

    /// Admits a connection from an address, unless there is no place left. May wait until an evicted connection has ended, which
    /// takes a moment.
    pub async fn admit(self: &Arc<Self>, address: IpAddr) -> Option<AdmittedConnection> {
        loop {
            let freed = self.freed.notified();
            match self.try_admit(address) {
                Ok(held) => return Some(held),
                Err(Full::Refused) => return None,
                Err(Full::Ending) => freed.await,
            }
        }
    }

    fn try_admit(self: &Arc<Self>, address: IpAddr) -> Result<AdmittedConnection, Full> {
        let network = network_of(address);
        let mut places = self.lock();
        let all = places.held.len();
        let of_network = places.public_by_network.get(&network).copied().unwrap_or(0);
        let fits = places.public < self.limits.public() && of_network < self.limits.by_address;
        if all >= self.limits.total.saturating_add(ENDING) {
            return Err(Full::Ending);
        }
        if all >= self.limits.total && !places.evict() {
            return Err(Full::Refused);
        }
        let kind = if fits { Kind::Public } else { Kind::Newcomer };
        let id = places.next;
        places.next = id.wrapping_add(1);
        let kind_now = AtomicU8::new(kind as u8);
        let place =
            Arc::new(Place { admission: Arc::clone(self), id, network, kind: kind_now, evicted: Notify::new() });
        places.enter(&place, kind);
        places.held.insert(id, Arc::clone(&place));
        metrics::gauge!("portcullis_connections").set(places.held.len() as f64);
        Ok(AdmittedConnection(place))
    }

    /// How many connections there are.
    pub fn open(&self) -> usize {
        self.lock().held.len()
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Places {
    fn enter(&mut self, place: &Place, kind: Kind) {
        place.kind.store(kind as u8, Ordering::Relaxed);
        match kind {
            Kind::Public => {
                self.public = self.public.saturating_add(1);
                let count = self.public_by_network.entry(place.network).or_default();
                *count = count.saturating_add(1);
            }
            Kind::Newcomer => {
                self.newcomers.entry(place.network).or_default().insert(place.id);
            }
            Kind::Filter | Kind::Evicted => {}
        }
    }

    fn leave(&mut self, place: &Place) {
        if place.is(Kind::Public) {
            self.public = self.public.saturating_sub(1);
            if let Some(count) = self.public_by_network.get_mut(&place.network) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.public_by_network.remove(&place.network);
                }
            }
        } else if place.is(Kind::Newcomer)
            && let Some(ids) = self.newcomers.get_mut(&place.network)
        {
            ids.remove(&place.id);
            if ids.is_empty() {
                self.newcomers.remove(&place.network);
            }
        }
    }

    /// Ends the oldest newcomer of the address that has the most of them, so that an address that floods evicts itself.
    fn evict(&mut self) -> bool {
        let crowd = self.newcomers.values().max_by_key(|ids| ids.len());
        let oldest = crowd.and_then(BTreeSet::first).and_then(|id| self.held.get(id)).cloned();
        let Some(oldest) = oldest else { return false };
        self.leave(&oldest);
        self.enter(&oldest, Kind::Evicted);
        oldest.evicted.notify_one();
        true
    }
}

impl Place {
    fn is(&self, kind: Kind) -> bool {
        self.kind.load(Ordering::Relaxed) == kind as u8
    }

    /// Whether the connection is a newcomer.
    pub fn is_newcomer(&self) -> bool {
        self.is(Kind::Newcomer)
    }

    /// Records that a request of the connection presented a valid sync key. The connection then has a reserved place.
    pub fn recognise_filter(&self) {
        if self.is(Kind::Filter) {
            return;
        }
        let mut places = self.admission.lock();
        if self.is(Kind::Public) || self.is(Kind::Newcomer) {
            places.leave(self);
            places.enter(self, Kind::Filter);
        }
    }

    /// Returns when the connection is evicted.
    pub async fn evicted(&self) {
        self.evicted.notified().await;
    }
}

impl AdmittedConnection {
    /// For requests of the connection.
    pub const fn place(&self) -> &Arc<Place> {
        &self.0
    }
}

impl Drop for AdmittedConnection {
    fn drop(&mut self) {
        let mut places = self.0.admission.lock();
        places.leave(&self.0);
        places.held.remove(&self.0.id);
        self.0.admission.freed.notify_waiters();
        metrics::gauge!("portcullis_connections").set(places.held.len() as f64);
    }
}

/// How many of the wanted connections the process has file descriptors for, beside those to the database. Raises the soft
/// limit of descriptors as far as the hard limit allows.
pub fn within_descriptors(wanted: usize, database: u32) -> usize {
    let others = OTHER_DESCRIPTORS.saturating_add(database.into());
    let needed = others.saturating_add(u64::try_from(wanted).unwrap_or(u64::MAX));
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return wanted };
    let raised = needed.min(hard);
    let has = if soft < raised && setrlimit(Resource::RLIMIT_NOFILE, raised, hard).is_ok() { raised } else { soft };
    let fits = usize::try_from(has.saturating_sub(others)).unwrap_or(usize::MAX);
    wanted.min(fits).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn admission(total: usize, by_address: usize, reserved: usize) -> Arc<Admission> {
        Admission::new(Limits { total, by_address, reserved })
    }

    #[test]
    fn the_bounds_of_few_connections_fit_together() {
        assert_eq!(Limits::new(16_384, 256, None), Limits { total: 16_384, by_address: 256, reserved: 4_096 });
        assert_eq!(Limits::new(200, 256, None), Limits { total: 200, by_address: 75, reserved: 50 });
        assert_eq!(Limits::new(1, 256, Some(9)), Limits { total: 1, by_address: 1, reserved: 0 });
    }

    #[test]
    fn an_address_has_its_bound_and_others_have_room() {
        let admission = admission(10, 2, 3);
        let one: Vec<_> = (0..3).map(|_| admission.try_admit(address(1)).unwrap()).collect();
        let newcomers: Vec<_> = one.iter().map(|held| held.place().is_newcomer()).collect();
        assert_eq!(newcomers, [false, false, true]);
        assert!(!admission.try_admit(address(2)).unwrap().place().is_newcomer());
        // An IPv6 client counts by its network, and an IPv4 address in IPv6 form as itself.
        let six = |text: &str| admission.try_admit(text.parse().unwrap()).unwrap();
        let six = [six("2001:db8::1"), six("2001:db8::2"), six("2001:db8::3"), six("::ffff:192.0.2.1")];
        let newcomers: Vec<_> = six.iter().map(|held| held.place().is_newcomer()).collect();
        assert_eq!(newcomers, [false, false, true, true]);
        drop(one);
        assert!(!admission.try_admit(address(1)).unwrap().place().is_newcomer());
    }

    #[test]
    fn a_filter_gets_in_while_strangers_hold_everything_and_keeps_its_place() {
        let admission = admission(4, 4, 2);
        let _strangers: Vec<_> = (0..4).map(|_| admission.try_admit(address(1)).unwrap()).collect();
        let filter = admission.try_admit(address(2)).unwrap();
        assert!(filter.place().is_newcomer());
        filter.place().recognise_filter();
        // Further strangers take the places of newcomers, never that of the filter.
        let more: Vec<_> = (0..10).map(|_| admission.try_admit(address(1)).unwrap()).collect();
        assert!(filter.place().is(Kind::Filter) && !filter.place().is_newcomer());
        assert_eq!(more.iter().filter(|held| held.place().is_newcomer()).count(), 1);
        // The first two, which are within the bounds, stay.
        assert_eq!(admission.lock().public, 2);
    }

    #[test]
    fn newcomers_of_one_address_take_no_room_from_others() {
        let admission = admission(4, 1, 1);
        let flood: Vec<_> = (0..4).map(|_| admission.try_admit(address(1)).unwrap()).collect();
        assert!(!admission.try_admit(address(2)).unwrap().place().is_newcomer());
        assert!(flood.iter().skip(1).any(|held| held.place().is(Kind::Evicted)));
    }

    #[test]
    fn an_address_that_floods_evicts_itself() {
        let admission = admission(6, 1, 5);
        let _first = admission.try_admit(address(1)).unwrap();
        let other = admission.try_admit(address(2)).unwrap();
        let flood: Vec<_> = (0..12).map_while(|_| admission.try_admit(address(1)).ok()).collect();
        assert_eq!(flood.len(), 12);
        assert!(other.place().is_newcomer(), "it was not evicted");
        assert_eq!(flood.iter().filter(|held| held.place().is(Kind::Evicted)).count(), 8);
        // So many may be ending, and no more.
        let more: Vec<_> = (0..99).map_while(|_| admission.try_admit(address(1)).ok()).collect();
        assert_eq!((more.len(), admission.open()), (8, 6 + ENDING));
        assert_eq!(admission.try_admit(address(1)).unwrap_err(), Full::Ending);
        drop((flood, more));
        assert_eq!(admission.open(), 2);
    }

    #[test]
    fn where_filters_hold_everything_nobody_gives_way() {
        let admission = admission(2, 1, 1);
        let filters: Vec<_> = (0..2).map(|_| admission.try_admit(address(1)).unwrap()).collect();
        filters.iter().for_each(|held| held.place().recognise_filter());
        assert_eq!(admission.try_admit(address(2)).unwrap_err(), Full::Refused);
    }
}
