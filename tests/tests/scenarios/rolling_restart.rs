//! Three Envoys that are restarted one after another, as a new version is rolled out, while a client uses half of its limit.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use futures_util::future::{join_all, try_join};
use portcullis_tests::http::{Reply, get_request, send};
use portcullis_tests::process::Signal;
use portcullis_tests::stack::{Stack, wait_for_status};
use portcullis_tests::wait::eventually;
use serde_json::json;

const ENVOYS: usize = 3;

/// Which Envoys a load balancer sends requests to, and how many are under way at each.
#[derive(Default)]
struct Rotation {
    is_out: [AtomicBool; ENVOYS],
    under_way: [AtomicUsize; ENVOYS],
    next: AtomicUsize,
    is_over: AtomicBool,
}

impl Rotation {
    /// Sends a request to the next Envoy that is in the rotation.
    async fn send(&self, stack: &Stack, key: &str) -> Result<Reply> {
        let place = loop {
            let place = self.next.fetch_add(1, Ordering::SeqCst) % ENVOYS;
            // The count rises first, so that an Envoy that is taken out has no request that the restart does not see.
            self.under_way[place].fetch_add(1, Ordering::SeqCst);
            if !self.is_out[place].load(Ordering::SeqCst) {
                break place;
            }
            self.under_way[place].fetch_sub(1, Ordering::SeqCst);
        };
        let reply = send(stack.envoys[place].address(), get_request("/orders", Some(key))?).await;
        self.under_way[place].fetch_sub(1, Ordering::SeqCst);
        reply
    }

    /// Takes an Envoy out, restarts it, and takes it in again once it is ready.
    async fn restart(&self, stack: &Stack, place: usize) -> Result<()> {
        self.is_out[place].store(true, Ordering::SeqCst);
        let idle = async || (self.under_way[place].load(Ordering::SeqCst) == 0).then_some(());
        eventually("the last response of an Envoy", idle).await?;
        let envoy = &stack.envoys[place];
        envoy.stop(Signal::SIGTERM).await?;
        envoy.restart().await?;
        wait_for_status(envoy, Some("no such key"), 401).await?;
        self.is_out[place].store(false, Ordering::SeqCst);
        Ok(())
    }
}

/// Sends requests at a pace until the restarts are over, `most` requests at most, and asserts that each was admitted. Returns
/// how many it sent.
async fn half_load(stack: &Stack, rotation: &Rotation, key: &str, pace: Duration, most: u64) -> Result<u64> {
    let mut ticks = tokio::time::interval(pace);
    let mut sent = 0;
    while sent < most && !rotation.is_over.load(Ordering::SeqCst) {
        ticks.tick().await;
        let reply = rotation.send(stack, key).await?;
        assert_eq!(reply.status, 200, "request {sent}: {reply:?}");
        sent += 1;
    }
    Ok(sent)
}

/// Sends this many requests at once, to the Envoys in rotation. Returns how many were admitted.
async fn at_once(stack: &Stack, rotation: &Rotation, key: &str, requests: usize) -> Result<u64> {
    let replies = join_all((0..requests).map(|_| rotation.send(stack, key))).await;
    let replies = replies.into_iter().collect::<Result<Vec<_>>>()?;
    assert!(replies.iter().all(|reply| [200, 429].contains(&reply.status)), "{replies:?}");
    Ok(replies.iter().filter(|reply| reply.status == 200).count() as u64)
}

/// Restarts the Envoys while a client of a limit sends requests at a pace, `most` requests at most.
async fn survives(requests: u32, window_s: u32, pace: Duration, most: u64) -> Result<()> {
    let stack = Stack::builder().envoys(ENVOYS).plugin(&json!({"rate_limit": null})).start().await?;
    let limit = json!([{"name": "limit", "requests": requests, "window_seconds": window_s}]);
    let body = json!({"email": "ada@example.com", "name": "restarts", "rate_limits": limit});
    let (_, key) = stack.rest().create_with(body).await?;
    stack.in_step().await?;

    let rotation = Rotation::default();
    let start = Instant::now();
    let restarts = async {
        for place in 0..ENVOYS {
            rotation.restart(&stack, place).await?;
        }
        rotation.is_over.store(true, Ordering::SeqCst);
        Ok(())
    };
    let (half, ()) = try_join(half_load(&stack, &rotation, &key, pace, most), restarts).await?;
    let (per_second, all) = (f64::from(requests) / f64::from(window_s), f64::from(requests));
    let restarted = start.elapsed();
    let left = (all - half as f64 + restarted.as_secs_f64() * per_second).min(all);
    let start = Instant::now();
    let rest = at_once(&stack, &rotation, &key, 2 * requests as usize).await? as f64;
    println!(
        "{requests} in {window_s} s: {half} while Envoys were restarted in {restarted:.1?}, then {rest} of {left:.1}"
    );
    // The client gets what is left and what comes back meanwhile, and no more. A limit may run behind by the tokens of 0.3 s
    // and one.
    assert!(rest <= left + start.elapsed().as_secs_f64() * per_second, "{rest} of {left:.1}");
    assert!(rest >= left - 0.3 * per_second - 2.0, "{rest} of {left:.1}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_uses_half_of_10_a_minute_is_not_refused_while_envoys_are_restarted_one_after_another()
-> Result<()> {
    // Faster than one in twelve seconds, so that the restarts meet them.
    survives(10, 60, Duration::from_millis(1_500), 5).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_uses_half_of_100_a_second_is_not_refused_while_envoys_are_restarted_one_after_another()
-> Result<()> {
    survives(100, 1, Duration::from_millis(20), u64::MAX).await
}
