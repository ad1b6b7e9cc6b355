//! Import of keys in bulk.

use std::time::Instant;

use crate::support::{Fixture, request, revision, rows, scalar, scalars};
use axum::body::{Body, Bytes};
use contract::hash::KeyHash;
use contract::key::{KeyKind, Secret};
use contract::pepper::Pepper;
use control_plane::audit::Actor;
use control_plane::change::{FeedWaker, Writer};
use control_plane::keys::import::{Code, Import};
use futures_util::{StreamExt, stream};
use serde_json::json;
use sqlx::PgPool;
use sqlx::postgres::PgListener;

fn line(number: usize) -> String {
    let (email, key) = (format!("user{}@example.com", number % 5_000), format!("imported-key-{number:08}"));
    json!({"email": email, "name": format!("key {number}"), "key": key}).to_string()
}

fn key(number: usize) -> Secret {
    Secret::from_presented(format!("imported-key-{number:08}"))
}

/// Longer than a screen: one import, whole.
#[sqlx::test(migrations = "./migrations")]
async fn good_lines_are_kept_and_bad_ones_told_by_number_without_the_key(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, ours) = fixture.key("user@example.com", &[]).await;
    let reply = fixture.call("POST", &format!("/v1/keys/{id}/rotate"), &admin, None).await;
    let rotated = reply.json()["secret"].as_str().unwrap().to_owned();
    let own_form = Secret::generate(KeyKind::Live, &mut getrandom::SysRng).unwrap();
    let hashed = |key: &str| format!("sha256:{}", hex::encode(KeyHash::of(key.as_bytes()).0));
    let lines = [
        json!({
            "email": "User@Example.com", "name": "Everything", "hash": hashed("a key of sixteen"), "prefix": "abc",
            "scopes": ["orders:read", "orders:write"], "expires_at": "2030-01-01T00:00:00Z", "disabled": true,
            "rate_limits": [{"name": "burst", "requests": 10, "window_seconds": 1, "shared": false}],
        })
        .to_string(),
        String::new(),
        json!({"email": "new@example.com", "name": "plain", "key": "a-key-of-another-system"}).to_string(),
        json!({"email": "new@example.com", "name": "twice", "hash": hashed("a-key-of-another-system")}).to_string(),
        "{\"email\": \"secret-key-that-must-not-show\"".into(),
        json!({"email": "nobody", "name": "x", "key": "secret-key-that-must-not-show"}).to_string(),
        json!({"email": "u@example.com", "name": "x", "keys": "secret-key-that-must-not-show"}).to_string(),
        "x".repeat(16_385),
        json!({"email": "u@example.com", "name": "short", "key": "fifteen-letters"}).to_string(),
        json!({"email": "u@example.com", "name": "there", "key": rotated}).to_string(),
        json!({"email": "u@example.com", "name": "retired", "key": ours.reveal()}).to_string(),
        json!({"email": "u@example.com", "name": "own form", "key": own_form.reveal()}).to_string(),
    ];
    // Editors put a byte-order mark before a text: the first line counts all the same. The stream is cut anywhere.
    let text = format!("\u{feff}{}", lines.join("\n"));
    let pieces: Vec<_> =
        text.as_bytes().chunks(7).map(|piece| Ok::<_, String>(Bytes::copy_from_slice(piece))).collect();
    let reply = fixture.import(&admin, Body::from_stream(stream::iter(pieces))).await;
    let bad = |line: u64, code: &str, reason: &str| json!({"line": line, "code": code, "reason": reason});
    let expected = json!({
        "imported": 3, "failed": 8, "errors_truncated": false,
        "errors": [
            bad(4, "duplicate", "this key stands in an earlier line"),
            bad(5, "invalid", "the line is not JSON: EOF while parsing an object at line 1 column 41"),
            bad(6, "invalid", "email: must be an email address such as user@example.com"),
            bad(7, "invalid", "the line has a field that is not known"),
            bad(8, "too_long", "a line has at most 16384 bytes"),
            bad(9, "invalid", "key: must have 16 to 1024 visible ASCII characters"),
            bad(10, "duplicate", "this key exists already"),
            bad(11, "duplicate", "this key exists already"),
        ],
    });
    assert_eq!((reply.status, reply.json()), (200, expected));
    assert_eq!((reply.header("content-type"), reply.header("cache-control")), ("application/json", "no-store"));
    assert!(!String::from_utf8(reply.body).unwrap().contains("must-not-show"));

    assert_eq!(fixture.opens(&Secret::from_presented("a-key-of-another-system".into())).await, "allowed");
    assert_eq!(fixture.opens(&Secret::from_presented("a key of sixteen".into())).await, "disabled");
    let listed = fixture.get("/v1/keys?name=everything", &admin).await.json();
    let everything = &listed["keys"][0];
    let shown = ["email", "name", "prefix", "scopes", "rate_limits", "generation", "state", "expires_at"];
    assert_eq!(
        json!(shown.map(|field| everything[field].clone())),
        json!([
            "user@example.com", "Everything", "abc", ["orders:read", "orders:write"],
            [{"name": "burst", "requests": 10, "window_seconds": 1, "burst": 10, "shared": false}],
            1, "disabled", "2030-01-01T00:00:00Z",
        ])
    );
    let own = fixture.get("/v1/keys", &own_form).await.json();
    assert_eq!(own["keys"][0]["prefix"], json!(own_form.display_prefix()));
    let sql = "select string_agg(concat(k::text, (select string_agg(a::text, ' ') from audit a)), ' ') from api_keys k";
    let kept: String = scalar(&pool, sql).await;
    assert!(!kept.contains("a-key-of-another-system"));

    // All of it once more does no harm.
    let before = revision(&pool).await;
    let again = fixture.import(&admin, lines.join("\n")).await.json();
    assert_eq!((&again["imported"], &again["failed"]), (&json!(0), &json!(11)));
    assert_eq!(revision(&pool).await, before, "nothing for filters to learn");
}

#[sqlx::test(migrations = "./migrations")]
async fn a_line_has_all_that_a_key_can_have_and_a_dry_run_writes_nothing(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    for (path, body) in
        [("/v1/roles/reader", json!({"scopes": ["orders:read"]})), ("/v1/plans/gold", json!({"scopes": ["gold"]}))]
    {
        assert_eq!(fixture.put(path, &admin, &body).await.status, 201);
    }
    let line = |fields: serde_json::Value| {
        let mut line = json!({"email": "u@example.com", "name": "n"});
        line.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        line.to_string()
    };
    let quota = json!({"requests": 5, "period": "day"});
    let lines = [
        line(json!({
            "key": "a-key-with-everything", "roles": ["reader"], "plan": "gold", "quota": quota, "cost": 7,
            "allowed_addresses": ["192.0.2.0/24"],
        })),
        line(json!({"key": "a-key-without-a-plan", "plan": "silver"})),
        line(json!({"key": "a-key-without-a-role", "roles": ["reader", "writer"]})),
        line(json!({"key": "a-key-that-is-plain"})),
    ]
    .join("\n");
    let expected = json!({
        "imported": 2, "failed": 2, "errors_truncated": false,
        "errors": [
            {"line": 2, "code": "invalid", "reason": "there is no plan silver"},
            {"line": 3, "code": "invalid", "reason": "there is no role writer"},
        ],
    });
    let before = revision(&pool).await;
    let dry = async |value: &str| {
        let uri = format!("/v1/keys/import?dry_run={value}");
        let mut request = request("POST", &uri, Some(&admin), lines.clone());
        request.headers_mut().insert("content-type", "application/x-ndjson".parse().unwrap());
        fixture.send(request).await
    };
    assert_eq!(dry("true").await.expect(200), expected);
    dry("yes").await.assert_invalid("dry_run", "must be true or false");
    assert_eq!(revision(&pool).await, before);
    let written = "select (select count(*) from user_preferences where email = 'u@example.com')
        + (select count(*) from audit where action like 'import%')";
    assert_eq!(scalar::<i64>(&pool, written).await, 0);

    assert_eq!(fixture.import(&admin, lines.clone()).await.expect(200), expected);
    let id: uuid::Uuid = scalar(&pool, "select id from api_keys where cost = 7").await;
    let key = fixture.get(&format!("/v1/keys/{id}"), &admin).await.expect(200);
    for (field, value) in [
        ("roles", json!(["reader"])),
        ("plan", json!("gold")),
        ("effective_scopes", json!(["orders:read", "gold"])),
        ("cost", json!(7)),
        ("allowed_addresses", json!(["192.0.2.0/24"])),
    ] {
        assert_eq!(key[field], value, "{field}");
    }
    assert_eq!(key["quota_usage"]["remaining"], 5, "{key}");
    // The same again, in a dry run too.
    let codes = |reply: serde_json::Value| {
        let errors = reply["errors"].as_array().unwrap().iter().map(|error| error["code"].as_str().unwrap().to_owned());
        errors.collect::<Vec<_>>()
    };
    let again = ["duplicate", "invalid", "invalid", "duplicate"];
    assert_eq!(codes(dry("true").await.expect(200)), again);
    assert_eq!(codes(fixture.import(&admin, lines).await.expect(200)), again);
}

#[sqlx::test(migrations = "./migrations")]
async fn only_lines_of_json_and_tables_are_imported(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let reply = fixture.send(request("POST", "/v1/keys/import", Some(&admin), line(1))).await;
    let detail = "Send one JSON object a line with Content-Type: application/x-ndjson, or a table with text/csv.";
    assert_eq!((reply.status, &reply.json()["detail"]), (415, &json!(detail)));
    let empty = json!({"imported": 0, "failed": 0, "errors": [], "errors_truncated": false});
    assert_eq!(fixture.import(&admin, "").await.json(), empty);
    let table = async |text: &str| {
        let mut request = request("POST", "/v1/keys/import", Some(&admin), text.to_owned());
        request.headers_mut().insert("content-type", "text/csv; header=present".parse().unwrap());
        fixture.send(request).await
    };
    assert_eq!(table("").await.expect(200), empty);
    let text = "email,name,key,scopes,kind,metadata.tenant,disabled\r\n\
        user@example.com,\"One, of a table\",a-key-in-a-table,a:read b:*,test,Acme,\r\n\
        user@example.com,Two,a-key-in-a-table,,,,\r\n\
        user@example.com,Three,short,,,,\r\n\
        user@example.com,Four,another-key-of-it,,,,perhaps";
    let expected = json!({
        "imported": 1, "failed": 3, "errors_truncated": false,
        "errors": [
            {"line": 3, "code": "duplicate", "reason": "this key stands in an earlier line"},
            {"line": 4, "code": "invalid", "reason": "key: must have 16 to 1024 visible ASCII characters"},
            {"line": 5, "code": "invalid", "reason": "disabled: must be true or false"},
        ],
    });
    assert_eq!(table(text).await.expect(200), expected);
    let key = &fixture.get("/v1/keys?name=table", &admin).await.json()["keys"][0];
    assert_eq!(
        (&key["name"], &key["scopes"], &key["kind"], &key["metadata"]),
        (&json!("One, of a table"), &json!(["a:read", "b:*"]), &json!("test"), &json!({"tenant": "Acme"}))
    );
    // A first line that names no columns may be a key.
    let reply = table("user@example.com,x,a-key-that-must-not-show").await;
    assert!(reply.status == 400 && !String::from_utf8(reply.body).unwrap().contains("must-not-show"));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_hundred_thousand_keys_come_in_with_one_call(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let text = (0..100_000).map(line).collect::<Vec<_>>().join("\n");
    let pieces: Vec<_> = text.into_bytes().chunks(60_000).map(Bytes::copy_from_slice).collect();
    let start = Instant::now();
    let reply = fixture.import(&admin, Body::from_stream(stream::iter(pieces.into_iter().map(Ok::<_, String>)))).await;
    let took = start.elapsed();
    let all = json!({"imported": 100_000, "failed": 0, "errors": [], "errors_truncated": false});
    assert_eq!((reply.status, reply.json()), (200, all));
    println!("import: 100,000 keys of 5,000 users in {took:.1?}");
    for number in [0, 1, 50_000, 99_999] {
        assert_eq!(fixture.opens(&key(number)).await, "allowed");
    }
    fixture.in_step().await;
    assert_eq!(fixture.app.store.keys(), 100_001);
    let sql = "select action, count(*) from audit where action like '%import%' group by action order by action";
    let audited: Vec<(String, i64)> = rows(&pool, sql).await;
    assert_eq!(audited, [("import.commit".into(), 100), ("import.finish".into(), 1), ("key.import".into(), 100_000)]);
}

#[sqlx::test(migrations = "./migrations")]
async fn lines_beyond_the_limit_are_reported_once_and_counted(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    // Only the first thousand invalid lines are listed.
    let text = format!("{}{}", "{}\n".repeat(1_005), line(1));
    let report = fixture.import(&admin, text).await.json();
    assert_eq!(
        (&report["imported"], &report["failed"], &report["errors_truncated"]),
        (&json!(1), &json!(1_005), &json!(true))
    );
    let errors = report["errors"].as_array().unwrap();
    let last = json!({"line": 1_000, "code": "invalid", "reason": "email: is missing"});
    assert_eq!((errors.len(), errors.last()), (1_000, Some(&last)));

    let text = format!("{}{}\n{}\n", "\n".repeat(100_000), line(1), line(2));
    let reason = "an import has at most 100000 lines; this one and all after it were not taken";
    let expected = json!({
        "imported": 0, "failed": 2, "errors": [{"line": 100_001, "code": "too_many", "reason": reason}],
        "errors_truncated": false,
    });
    assert_eq!(fixture.import(&admin, text).await.json(), expected);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_revocation_does_not_wait_for_an_import(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, other) = fixture.key("other@example.com", &[]).await;
    // The import gets its lines for as long as the revocation is not done.
    let (done, is_done) = tokio::sync::watch::channel(false);
    let mut committed = PgListener::connect_with(&pool).await.unwrap();
    committed.listen("portcullis_changes").await.unwrap();
    let pieces = stream::iter(0_usize..100).take_while(move |_| {
        let going = !*is_done.borrow();
        async move { going }
    });
    let pieces = pieces.map(|chunk| {
        let lines: Vec<_> = (chunk * 1_000..(chunk + 1) * 1_000).map(line).collect();
        Ok::<_, String>(Bytes::from(lines.join("\n") + "\n"))
    });
    let (imported, waited) = tokio::join!(fixture.import(&admin, Body::from_stream(pieces)), async {
        // Each committed chunk sends a notification.
        while scalar::<i64>(&pool, "select count(*) from api_keys").await < 3_000 {
            committed.recv().await.unwrap();
        }
        let start = Instant::now();
        assert_eq!(fixture.delete(&format!("/v1/keys/{id}"), &admin).await.status, 204);
        let waited = start.elapsed();
        done.send(true).unwrap();
        waited
    });
    let imported = imported.json()["imported"].as_u64().unwrap();
    println!("import: a revocation took {waited:.1?} beside an import that had {imported} lines to go on with");
    assert!((3_000..100_000).contains(&imported), "{imported}: the import was under way all the while");
    assert_eq!(fixture.opens(&other).await, "revoked");
}

#[sqlx::test(migrations = "./migrations")]
async fn with_a_pepper_a_key_that_was_imported_without_one_is_still_the_same_key(pool: PgPool) {
    let pepper = Pepper::parse(&"5e".repeat(32)).unwrap();
    let writer = Writer::new(pool.clone(), FeedWaker::default());
    let import = async |numbers: std::ops::Range<usize>, pepper: Option<&Pepper>| {
        let mut import = Import::new(writer.clone(), Actor::system(), pepper.cloned());
        let lines: Vec<String> = numbers.map(line).collect();
        assert!(import.take(lines.join("\n").as_bytes()).await.unwrap());
        import.finish().await.unwrap()
    };
    assert_eq!(import(0..2, None).await.imported, 2);
    let report = import(0..4, Some(&pepper)).await;
    assert_eq!((report.imported, report.failed), (2, 2));
    assert_eq!(
        report.errors.iter().map(|bad| (bad.line, bad.code)).collect::<Vec<_>>(),
        [1, 2].map(|line| (line, Code::Duplicate))
    );
    assert_eq!(import(2..4, Some(&pepper)).await.failed, 2);
    let stored: Vec<Vec<u8>> = scalars(&pool, "select hash from api_keys order by name").await;
    let plain = |number| key(number).hash();
    let expected = [plain(0), plain(1), pepper.hash(&plain(2)), pepper.hash(&plain(3))].map(|hash| hash.0.to_vec());
    assert_eq!(stored, expected);
}
