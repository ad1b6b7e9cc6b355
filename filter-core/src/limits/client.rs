//! Limits of requests without a key, for each client address. Each Envoy enforces them by itself.

use contract::rate::{Rate, tag};
use contract::record::RateLimit;

use super::cell::{Entries, cell_of_client};
use super::charge::{CONTENTION_MS, OF_POLICY};
use super::retry_after::{Exceeded, RetryAfter};
use crate::address::Client;
use crate::shared::{Cells, SharedData};
use crate::time::{MS_PER_S, NS_PER_MS};

/// Takes a request without a key from the limits of its policy, or from none of them. Returns how long to wait if one refuses.
pub fn charge_client(
    data: &SharedData<impl Cells>,
    client: Client,
    limits: &[RateLimit],
    now_ns: u64,
) -> Option<RetryAfter> {
    let taken = data.update(cell_of_client(client), |cell| {
        let (mut taken, mut untaken) = (Entries::read(cell), Entries::read(cell));
        let (mut refused, mut is_corrected) = (None, false);
        for (place, limit) in limits.iter().enumerate() {
            let (rate, tag) = (Rate::of(limit), tag(&limit.name) | OF_POLICY);
            let before_ns = taken.arrival(client.0, tag);
            match (rate.take(before_ns, now_ns), before_ns) {
                (Ok(arrival_ns), _) => taken.set_arrival(client.0, tag, arrival_ns),
                (Err(wait_ns), before_ns) => {
                    refused = refused.max(Some((wait_ns, place)));
                    if let Some(before_ns) = before_ns {
                        let after_ns = rate.after_clock_step(before_ns, now_ns);
                        is_corrected |= after_ns != before_ns;
                        untaken.set_arrival(client.0, tag, after_ns);
                    }
                }
            }
        }
        match refused {
            None => {
                taken.bound();
                Ok((taken.write(now_ns), None))
            }
            Some(_) if is_corrected => Ok((untaken.write(now_ns), refused)),
            Some(_) => Err(refused),
        }
    });
    let (wait_ms, limit) = match taken {
        Ok(None) => return None,
        Ok(Some((wait_ns, place))) => (wait_ns.div_ceil(NS_PER_MS), place),
        Err(_) => (CONTENTION_MS, 0),
    };
    let retry_after_s = wait_ms.div_ceil(MS_PER_S).max(1);
    Some(RetryAfter::Limits(limits.to_vec(), Exceeded { limit, retry_after_s }))
}
