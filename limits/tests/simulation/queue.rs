//! The events that are to come, in the order of their time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Events of one time come in the order in which they were added.
pub struct Queue<T> {
    order: BinaryHeap<Reverse<(u64, u64, usize)>>,
    events: Vec<Option<T>>,
    free: Vec<usize>,
    next: u64,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { order: BinaryHeap::new(), events: Vec::new(), free: Vec::new(), next: 0 }
    }
}

impl<T> Queue<T> {
    pub fn add(&mut self, at_ns: u64, event: T) {
        let place = self.free.pop().unwrap_or(self.events.len());
        if place == self.events.len() {
            self.events.push(None);
        }
        self.events[place] = Some(event);
        self.order.push(Reverse((at_ns, self.next, place)));
        self.next += 1;
    }

    /// The next event up to a time, and its time.
    pub fn pop(&mut self, until_ns: u64) -> Option<(u64, T)> {
        self.order.peek().filter(|first| first.0.0 <= until_ns)?;
        let Reverse((at_ns, _, place)) = self.order.pop()?;
        self.free.push(place);
        Some((at_ns, self.events[place].take()?))
    }
}
