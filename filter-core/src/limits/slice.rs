//! What a VM took from the limits of busy keys ahead of the requests that will use it: a key and its limits come in, whether
//! the request is admitted goes out, most of the time without a look at shared data.
//!
//! A slice is for several times the requests that its key made lately in this VM, up to [`MOST`] and a 64th of each burst
//! ([`limiter::PART`]); so limits with a burst below 128 know no slices and are exact in every moment. What is left of a slice
//! is given back after a second ([`Slices::give_back`]). How much a key that comes after a rest will need nobody knows, so
//! its first slice is for twice what keys of this VM usually make before they rest again. So
//! - in any span of time an Envoy admits no more than its limits, and what its VMs had ahead when the span began;
//! - a request may be refused while other VMs hold a slice that they do not use, for a second at the most.

use std::cell::{Cell as Slot, RefCell};
use std::collections::HashMap;

use contract::id::KeyId;
use contract::record::RateLimit;
use rustc_hash::FxBuildHasher;

use super::limiter::{self, Limit, Refused, Subject, Tag, Taken};
use crate::shared::{Cells, SharedData};

/// Most requests that a slice is for.
pub const MOST: u32 = 64;

/// A slice is for so many times the requests that its key made lately, from the second request on.
const AHEAD: u32 = 4;

/// The first slice after a rest is for so many times what keys usually make.
const AHEAD_AT_FIRST: u32 = 2;

/// One key that rests moves what is usual by this part of the difference.
const WEIGHT: u32 = 16;

/// What is usual is kept in this part of a request.
const SCALE: u32 = 256;

/// Most keys that a VM has slices of. Requests of others ask shared data each time.
const KEYS: usize = 4_096;

/// The limits that a request is judged by.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// Those of its key, of its plan or of the filter.
    pub own: &'a [RateLimit],
    /// That of its route, which each Envoy judges alone.
    pub route: Option<&'a RateLimit>,
}

impl<'a> Limits<'a> {
    /// Each of them.
    #[must_use]
    pub fn all(&self) -> Vec<Limit<'a>> {
        let own = self.own.iter().map(|limit| Limit { limit, tag: Tag::of_key(&limit.name), shared: limit.shared });
        let of_route = |limit: &'a RateLimit| Limit { limit, tag: Tag::of_policy(&limit.name), shared: false };
        own.chain(self.route.map(of_route)).collect()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.own.is_empty() && self.route.is_none()
    }
}

/// The slices of one VM.
#[derive(Debug, Default)]
pub struct Slices {
    /// The control plane draws the ids at random, so clients cannot make them collide, and a fast hash is enough.
    of_keys: RefCell<HashMap<KeyId, Slice, FxBuildHasher>>,
    /// How many requests of a key were admitted lately from its first to its rest, on average, in [`SCALE`]ths.
    usual: Slot<u32>,
}

#[derive(Debug, Default)]
struct Slice {
    /// Requests of its key, halved each second.
    asked: u32,
    /// Requests of its key that were admitted since it came, [`MOST`] at the most.
    came: u32,
    left: u32,
    from: Option<From>,
}

/// What a slice was taken from.
#[derive(Debug)]
struct From {
    own: Vec<RateLimit>,
    route: Option<RateLimit>,
    share: u32,
}

impl From {
    fn limits(&self) -> Limits<'_> {
        Limits { own: &self.own, route: self.route.as_ref() }
    }

    fn is(&self, limits: &Limits<'_>) -> bool {
        self.own == limits.own && self.route.as_ref() == limits.route
    }
}

impl Slices {
    /// Takes one request from the limits of a key, of which there is one at least. `now_ns` tells the time, if it is asked.
    ///
    /// # Errors
    /// [`Refused`], as [`limiter::take`].
    pub fn take(
        &self,
        data: &SharedData<impl Cells>,
        key: KeyId,
        limits: &Limits<'_>,
        default_share: u32,
        now_ns: impl Fn() -> u64,
    ) -> Result<(), Refused> {
        let take = |wanted| limiter::take(data, Subject::Key(key), &limits.all(), wanted, default_share, now_ns());
        let mut slices = self.of_keys.borrow_mut();
        if slices.len() >= KEYS && !slices.contains_key(&key) {
            return take(1).map(|_| ());
        }
        let slice = slices.entry(key).or_default();
        slice.asked = slice.asked.saturating_add(1).min(MOST);
        if slice.left > 0 {
            if slice.from.as_ref().is_some_and(|from| from.is(limits)) {
                slice.left = slice.left.saturating_sub(1);
                slice.comes();
                return Ok(());
            }
            // It comes on another route, or its limits have changed: the slice waits for others, or for the end of its second.
            return take(1).map(|_| slice.comes());
        }
        let wanted = if slice.came == 0 { self.wanted_at_first() } else { slice.asked.saturating_mul(AHEAD).min(MOST) };
        let Taken { requests, share } = take(wanted)?;
        slice.left = requests.saturating_sub(1);
        slice.comes();
        match &mut slice.from {
            _ if slice.left == 0 => {}
            Some(from) if from.is(limits) => from.share = share,
            from => {
                let Limits { own, route } = *limits;
                *from = Some(From { own: own.to_vec(), route: route.cloned(), share });
            }
        }
        Ok(())
    }

    /// Gives back what is left of the slices of one quarter of all keys, and forgets those that have rested. Due for each
    /// quarter once a second: one after the other, so that no tick has all the work.
    pub fn give_back(&self, quarter: u8, data: &SharedData<impl Cells>, default_share: u32, now_ns: u64) {
        self.of_keys.borrow_mut().retain(|key, slice| {
            // The last byte of an id is random.
            let [.., last] = key.0;
            if last & 3 != quarter {
                return true;
            }
            slice.give_back(data, *key, default_share, now_ns);
            slice.asked /= 2;
            if slice.asked == 0 {
                self.rests(slice.came);
            }
            slice.asked > 0
        });
    }

    /// What the first request of a key takes. Where keys come once and rest, nothing is left to give back.
    fn wanted_at_first(&self) -> u32 {
        match self.usual.get() / SCALE {
            0 | 1 => 1,
            usual => usual.saturating_mul(AHEAD_AT_FIRST).min(MOST),
        }
    }

    /// A key rests of which so many requests were admitted.
    fn rests(&self, came: u32) {
        let usual = self.usual.get();
        let rest = usual.saturating_sub(usual / WEIGHT);
        self.usual.set(rest.saturating_add(came.saturating_mul(SCALE) / WEIGHT));
    }
}

impl Slice {
    /// A request was admitted.
    fn comes(&mut self) {
        self.came = self.came.saturating_add(1).min(MOST);
    }

    fn give_back(&mut self, data: &SharedData<impl Cells>, key: KeyId, default_share: u32, now_ns: u64) {
        let left = std::mem::take(&mut self.left);
        let Some(from) = self.from.as_ref().filter(|_| left > 0) else { return };
        let (subject, taken) = (Subject::Key(key), Taken { requests: left, share: from.share });
        // Nobody gets through to the cell: those requests count as used.
        let _ = limiter::give_back(data, subject, &from.limits().all(), taken, default_share, now_ns);
    }
}

#[cfg(test)]
mod tests;
