//! Keys of finished calls in the memory of the control plane: almost none are left. A test cannot show
//! that no copy is ever left. A control plane that does not overwrite what it frees keeps more than half of them.
#![cfg(target_os = "linux")]

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::Stdio;

use axum::body::Bytes;
use axum::http::Request;
use contract::key::{KeyKind, Secret};
use control_plane::keys::create::generate;
use portcullis_tests::http::Connection;
use serde_json::json;
use sqlx::PgPool;

use crate::binary::{command, serving, url};

/// Calls, each with a key of its own, of which some are made by the calls.
const CALLS: usize = 60;

/// What may be left: the connection keeps the last bytes that it read until it ends, and a thread what lies on its stack.
const LEFT: usize = 3;

/// By how many bytes a text is looked for before it is compared.
const START: usize = 8;

/// How many of the texts, which have one length, stand anywhere in the memory that a process can write to.
fn found_in_memory(process: u32, texts: &[String]) -> usize {
    let memory = File::open(format!("/proc/{process}/mem")).unwrap();
    let mut found = vec![false; texts.len()];
    let start = |text: &String| *text.as_bytes().first_chunk::<START>().unwrap();
    let places: HashMap<[u8; START], usize> = texts.iter().map(start).zip(0..).collect();
    let length = texts[0].len();
    for line in BufReader::new(File::open(format!("/proc/{process}/maps")).unwrap()).lines() {
        let line = line.unwrap();
        let mut fields = line.split(' ');
        let (range, rights) = (fields.next().unwrap(), fields.next().unwrap());
        if !rights.starts_with("rw") {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|address| u64::from_str_radix(address, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        // Some of what is mapped cannot be read, as guard pages.
        if memory.read_exact_at(&mut bytes, start).is_err() {
            continue;
        }
        for window in bytes.windows(length) {
            if let Some(place) = window.first_chunk().and_then(|start| places.get::<[u8; START]>(start)) {
                found[*place] |= window == texts[*place].as_bytes();
            }
        }
    }
    found.into_iter().filter(|found| *found).count()
}

#[sqlx::test(migrations = "./migrations")]
async fn memory_holds_almost_no_keys_of_finished_calls(pool: PgPool) {
    let admin = generate(KeyKind::Live).unwrap();
    let mut serve = command(&["serve", "--listen", "127.0.0.1:0", "--log-level", "warn", "--api-burst", "1000"]);
    serve.env("DATABASE_URL", url(&pool)).env("PORTCULLIS_ADMIN_KEY", admin.reveal());
    serve.stdout(Stdio::null()).stderr(Stdio::null());
    let (running, address, _) = serving(serve, "/v1/keys", &admin).await;

    let mut connection = Connection::open(address).await.unwrap();
    let mut secrets: Vec<String> = Vec::new();
    for number in 0..CALLS {
        // Keys in a header, in a body and in a reply.
        let key: Secret = generate(KeyKind::Live).unwrap();
        let (method, uri, caller, body, status) = match number % 3 {
            0 => ("GET", "/v1/keys", &key, String::new(), 401),
            1 => ("POST", "/v1/explain", &admin, json!({"key": key.reveal()}).to_string(), 200),
            _ => ("POST", "/v1/keys", &admin, json!({"email": "u@example.com", "name": "n"}).to_string(), 201),
        };
        let request = Request::builder().method(method).uri(uri).header("x-api-key", caller.reveal());
        let request = request.header("content-type", "application/json").body(Bytes::from(body).into()).unwrap();
        let reply = connection.send(request).await.unwrap();
        assert_eq!(reply.status, status, "{reply:?}");
        let secret = (status != 201).then(|| key.reveal().to_owned());
        let shown = || reply.json().unwrap()["secret"].as_str().unwrap().to_owned();
        secrets.push(secret.unwrap_or_else(shown));
    }
    // The random characters alone: a tag or a prefix may stand anywhere.
    let parts: Vec<String> = secrets.iter().map(|secret| secret["sk_live_".len() + 6..].to_owned()).collect();
    let process = running.0.id();
    let left = found_in_memory(process, &parts);
    println!("of {CALLS} keys, {left} are left in memory");
    // The search finds what is there: the bootstrap key stands in the environment.
    let bootstrap = vec![admin.reveal()["sk_live_".len() + 6..].to_owned()];
    assert_eq!(found_in_memory(process, &bootstrap), 1);
    assert!(left <= LEFT, "of {CALLS} keys, {left} are left in memory");
}
