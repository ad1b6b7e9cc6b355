//! Keys of finished calls in the memory of the control plane: almost none are left. A test cannot show
//! that no copy is ever left. A control plane that does not overwrite what it frees keeps more than half of them.
#![cfg(target_os = "linux")]

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::process::Stdio;

use contract::key::{KeyKind, Secret};
use control_plane::keys::create::generate;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::binary::{command, serving, url};

/// Calls, each with a key of its own, of which some are made by the calls.
const CALLS: usize = 60;

/// What may be left: the connection keeps the last bytes that it read until it ends, and a thread what lies on its stack.
const LEFT: usize = 3;

/// Calls over a connection and reads the answer: its status and its body.
fn call(connection: &mut BufReader<TcpStream>, request: &str) -> (u16, String) {
    connection.get_mut().write_all(request.as_bytes()).unwrap();
    let mut line = String::new();
    connection.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).unwrap().parse().unwrap();
    let mut length = 0;
    while line != "\r\n" {
        line.clear();
        connection.read_line(&mut line).unwrap();
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    connection.read_exact(&mut body).unwrap();
    (status, String::from_utf8(body).unwrap())
}

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
    let (running, address, _) = serving(serve, "/v1/keys", &admin);

    let mut connection = BufReader::new(TcpStream::connect(address).unwrap());
    let mut secrets: Vec<String> = Vec::new();
    let head = "HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n";
    for number in 0..CALLS {
        // Keys in a header, in a body and in a reply.
        let (request, secret) = match number % 3 {
            0 => {
                let key: Secret = generate(KeyKind::Live).unwrap();
                (format!("GET /v1/keys {head}x-api-key: {}\r\n\r\n", key.reveal()), Some(key.reveal().to_owned()))
            }
            1 => {
                let key = generate(KeyKind::Live).unwrap();
                let body = json!({"key": key.reveal()}).to_string();
                let length = format!("content-length: {}\r\n", body.len());
                let request = format!("POST /v1/explain {head}{length}x-api-key: {}\r\n\r\n{body}", admin.reveal());
                (request, Some(key.reveal().to_owned()))
            }
            _ => {
                let body = json!({"email": "u@example.com", "name": "n"}).to_string();
                let length = format!("content-length: {}\r\n", body.len());
                (format!("POST /v1/keys {head}{length}x-api-key: {}\r\n\r\n{body}", admin.reveal()), None)
            }
        };
        let (status, reply) = call(&mut connection, &request);
        assert_eq!(status, [401, 200, 201][number % 3], "{reply}");
        let shown = || serde_json::from_str::<Value>(&reply).unwrap()["secret"].as_str().unwrap().to_owned();
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
