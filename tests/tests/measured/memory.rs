//! Memory of a control plane that loads the whole store repeatedly, as after every restore of the
//! database.

use anyhow::{Result, ensure};
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;

/// Times that the store is loaded until memory is measured first, and from then on.
const LOADS: [u64; 2] = [10, 40];

/// Keys that are made before each load: what lives on takes its place among what the last load has left.
const KEYS: u64 = 3;

/// How much of a key stays in memory, in KiB, and much to spare.
const KEY: u64 = 2;

/// What else it may have grown by, in KiB: buffers, and parts of the program that were not needed before.
const SLACK: u64 = 1_024;

/// A new epoch begins, and the store is loaded.
async fn load(stack: &Stack) -> Result<()> {
    let loaded = || stack.control_plane.log().lines_with("loaded the key store").len();
    for number in 0..KEYS {
        stack.rest().create(&format!("user{number}@example.com")).await?;
    }
    let before = loaded();
    stack.database.execute("update store_state set epoch = gen_random_uuid()").await?;
    // This wakes the feed.
    stack.rest().create("user@example.com").await?;
    eventually("the store to be loaded", async || (loaded() > before).then_some(())).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_loaded_again_and_again_takes_no_more_memory_than_its_keys() -> Result<()> {
    let stack = Stack::builder().envoys(0).start().await?;
    let mut resident_kib = Vec::new();
    for loads in LOADS {
        for _ in 0..loads {
            load(&stack).await?;
        }
        resident_kib.push(stack.control_plane.resident_kib()?);
    }
    let [first, last] = resident_kib[..] else { unreachable!("it is measured twice") };
    let keys = LOADS[1] * (KEYS + 1);
    println!("memory: {first} KiB, and {last} KiB when the store had been loaded {} times more", LOADS[1]);
    ensure!(last <= first + keys * KEY + SLACK, "it grew from {first} to {last} KiB with {keys} keys");
    Ok(())
}
