//! Hostile input: text that SQL, shells or parsers could take for code, endless bodies, forged reports. Each request
//! gets a problem or is taken literally.

use std::convert::Infallible;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::http::HeaderValue;
use contract::id::{KeyId, ReporterId};
use contract::key::Secret;
use contract::outcome::Outcome;
use contract::usage::{Ack, Count, KeyRef, Report, Subject, write_reports};
use control_plane::api;
use futures_util::{StreamExt, stream};
use portcullis_tests::wait::DEADLINE;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::support::reports::submit;
use crate::support::{Fixture, Reply, encoded, request, scalar};

/// What might be taken for something else by SQL, a shell, a log, a header, a terminal, a template, a path or a parser.
fn traps() -> Vec<String> {
    let mut traps: Vec<String> = [
        "'; drop table api_keys; --",
        "' or '1'='1",
        "\" or \"\"=\"",
        "$1",
        "\\'; select pg_sleep(10); --",
        "%' or email like '%",
        "a\r\nx-api-key: sk_live_x",
        "a\r\n\r\nHTTP/1.1 200 OK",
        "a\0b",
        "\0",
        "\u{1b}[31mred",
        "\u{202e}gnp.exe",
        "\u{feff}",
        "\u{200b}",
        "e\u{301}",
        "\u{fffd}\u{10ffff}",
        "ÄÖÜß İı ſ K",
        "<script>alert(1)</script>",
        "{{7*7}} ${7*7} #{7*7}",
        "../../etc/passwd",
        "..%2f..%2fetc",
        "file:///etc/passwd",
        "null",
        "undefined",
        "NaN",
        "1e400",
        "-1",
        "{}",
        "[]",
    ]
    .map(str::to_owned)
    .into();
    traps.push("a".repeat(5_000));
    traps.push("é".repeat(2_000));
    traps
}

async fn call(fixture: &Fixture, method: &str, uri: &str, admin: &Secret, body: &Value) -> Reply {
    fixture.send(request(method, uri, Some(admin), body.to_string())).await
}

/// The reply is a problem, with nothing in its headers that the client wrote there.
fn assert_harmless(reply: &Reply, allowed: &[u16], what: &str) {
    let status = reply.status;
    assert!(allowed.contains(&status), "{what}: {status} {:?}", String::from_utf8_lossy(&reply.body));
    if status >= 400 {
        assert_eq!(reply.header("content-type"), "application/problem+json", "{what}");
        assert_eq!(reply.json()["status"], status, "{what}");
    }
    assert!(reply.headers.get("x-api-key").is_none(), "{what}");
}

/// Longer than a screen: every field and route takes each trap.
#[sqlx::test(migrations = "./migrations")]
async fn text_in_any_field_is_refused_or_kept_to_the_letter(pool: PgPool) {
    let fixture = Fixture::with_rate_limit(&pool, 1_000_000).await;
    let (id, admin) = fixture.key("admin@example.com", &["admin"]).await;
    let (victim, _) = fixture.key("victim@example.com", &[]).await;
    for trap in traps() {
        let good = json!({"email": "a@example.com", "name": "n", "scopes": ["s"], "kind": "live",
            "rate_limits": [{"name": "n", "requests": 1, "window_seconds": 1, "burst": 1}]});
        for field in ["/email", "/name", "/kind", "/scopes/0", "/rate_limits/0/name", "/rate_limits/0/requests"] {
            let mut body = good.clone();
            *body.pointer_mut(field).unwrap() = trap.clone().into();
            let reply = fixture.post("/v1/keys", &admin, &body).await;
            assert_harmless(&reply, &[201, 400, 413], &format!("{field} {trap:?}"));
            if reply.status == 201 {
                let created = reply.json();
                let kept = if field == "/email" { trap.to_ascii_lowercase() } else { trap.trim().to_owned() };
                assert!(created.pointer(field).is_some_and(|value| *value == kept), "{field} {trap:?}: {created}");
                let id = created["id"].as_str().unwrap();
                let read = fixture.get(&format!("/v1/keys/{id}"), &admin).await;
                assert_eq!(read.json().pointer(field), created.pointer(field));
            }
        }
        for field in ["expires_at", "expires_in_seconds", "disabled", "owner_id", "hash", "revision"] {
            let mut body = good.clone();
            body[field] = trap.clone().into();
            let reply = fixture.post("/v1/keys", &admin, &body).await;
            assert_harmless(&reply, &[400, 413], &format!("{field} {trap:?}"));
        }
        let mut body = json!({"email": "a@example.com", "key_name": "n"});
        for field in ["email", "key_name"] {
            body[field] = trap.clone().into();
            let reply = fixture.post("/api/user/key", &admin, &body).await;
            assert_harmless(&reply, &[200, 400, 413], &format!("{field} {trap:?}"));
            body = json!({"email": "a@example.com", "key_name": "n"});
        }
        let reply = fixture.patch(&format!("/v1/keys/{id}"), &admin, json!({"name": trap})).await;
        assert_harmless(&reply, &[200, 400, 413], &format!("name {trap:?}"));

        let text = encoded(&trap);
        for uri in [
            format!("/api/user/key/{text}"),
            format!("/api/user/usage/{text}"),
            format!("/v1/keys/{text}"),
            format!("/v1/keys/{text}/usage"),
            format!("/v1/keys?email={text}"),
            format!("/v1/keys?cursor={text}"),
            format!("/v1/keys?limit={text}"),
            format!("/v1/keys?{text}=1"),
            format!("/v1/keys/{id}/usage?from={text}"),
            format!("/v1/keys/{id}/usage?to={text}"),
            format!("/v1/keys/{id}/usage?time_zone={text}"),
            format!("/{text}"),
        ] {
            let reply = fixture.get(&uri, &admin).await;
            assert_harmless(&reply, &[200, 400, 404], &uri);
        }
        for uri in [format!("/v1/keys/{text}"), format!("/api/user/key/{text}")] {
            let reply = fixture.delete(&uri, &admin).await;
            assert_harmless(&reply, &[400, 404], &uri);
        }
    }
    let alive: bool = scalar(&pool, format!("select revoked_at is null from api_keys where id = '{victim}'")).await;
    assert!(alive);
}

/// What has a body beside keys: method, route, a body that is good, and the fields in it that take text.
fn bodies(id: Uuid, user: &str) -> Vec<(&'static str, String, Value, &'static [&'static str])> {
    let key = format!("/v1/keys/{id}");
    let limits = json!([{"name": "n", "requests": 1, "window_seconds": 1, "burst": 1}]);
    let quota = json!({"requests": 1, "period": "day", "time_zone": "UTC"});
    vec![
        ("PATCH", key.clone(), json!({"roles": ["r"]}), &["/roles/0"]),
        ("PATCH", key.clone(), json!({"plan": "p"}), &["/plan"]),
        ("PATCH", key.clone(), json!({"allowed_addresses": ["::1"]}), &["/allowed_addresses/0"]),
        ("PATCH", key.clone(), json!({"rate_limits": limits}), &["/rate_limits/0/name"]),
        ("PATCH", key.clone(), json!({"expires_at": "2100-01-01T00:00:00Z"}), &["/expires_at"]),
        ("PATCH", key.clone(), json!({"quota": quota}), &["/quota/period", "/quota/time_zone", "/quota/requests"]),
        ("POST", format!("{key}/rotate"), json!({"kind": "live", "grace_seconds": 0}), &["/kind", "/grace_seconds"]),
        ("PUT", "/v1/roles/r".into(), json!({"description": "d", "scopes": ["s"]}), &["/description", "/scopes/0"]),
        (
            "PUT",
            "/v1/plans/p".into(),
            json!({"description": "d", "scopes": ["s"], "rate_limits": limits, "quota": quota}),
            &["/description", "/scopes/0", "/rate_limits/0/name", "/quota/time_zone"],
        ),
        (
            "PUT",
            "/v1/policies/p".into(),
            json!({"description": "d", "scopes": {"all": ["s"]}, "match": [{"hosts": ["h"], "path": {"exact": "/p"}}]}),
            &["/description", "/scopes/all/0", "/match/0/hosts/0", "/match/0/path/exact"],
        ),
        ("PATCH", user.to_owned(), json!({"plan": "p"}), &["/plan"]),
        (
            "POST",
            format!("{user}/ledger"),
            json!({"amount": 1, "kind": "top_up", "note": "n"}),
            &["/amount", "/kind", "/note"],
        ),
        (
            "PATCH",
            user.to_owned(),
            json!({"refill": {"amount": 1, "period": "day", "time_zone": "UTC", "mode": "add"}}),
            &["/refill", "/refill/period", "/refill/time_zone", "/refill/mode"],
        ),
        (
            "POST",
            "/v1/explain".into(),
            json!({"key": "k", "method": "GET", "path": "/", "address": "::1", "time": "2026-05-15T14:30:00Z"}),
            &["/key", "/method", "/path", "/address", "/time"],
        ),
        ("POST", "/v1/explain".into(), json!({"key_id": id, "policy": "p"}), &["/key_id", "/policy"]),
        ("POST", "/v1/explain".into(), json!({"policy": {"scopes": {"all": ["s"]}}}), &["/policy/scopes/all/0"]),
    ]
}

/// Longer than a screen: every field and route takes each trap.
#[sqlx::test(migrations = "./migrations")]
async fn text_in_any_field_beside_keys_is_refused_or_taken_literally(pool: PgPool) {
    const ANSWERS: [u16; 10] = [200, 201, 204, 400, 404, 405, 409, 412, 413, 422];
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    let user = fixture.user("a@example.com").await;
    for trap in traps() {
        for (method, uri, good, fields) in bodies(id, &user) {
            for field in fields {
                let mut body = good.clone();
                *body.pointer_mut(field).unwrap() = trap.clone().into();
                let reply = call(&fixture, method, &uri, &admin, &body).await;
                assert_harmless(&reply, &ANSWERS, &format!("{method} {uri} {field} {trap:?}"));
            }
        }
        let text = encoded(&trap);
        for route in ["/v1/roles/", "/v1/plans/", "/v1/policies/", "/v1/users/"] {
            for method in ["GET", "DELETE", "PATCH"] {
                let reply = call(&fixture, method, &format!("{route}{text}"), &admin, &json!({"plan": null})).await;
                assert_harmless(&reply, &ANSWERS, &format!("{method} {route} {trap:?}"));
            }
        }
        for uri in [
            "/v1/keys?name=",
            "/v1/keys?prefix=",
            "/v1/keys?state=",
            "/v1/keys?last_used_before=",
            "/v1/users?email=",
            "/v1/users?cursor=",
            &format!("{user}/ledger?cursor="),
            "/v1/roles?cursor=",
            "/v1/usage?group_by=",
            "/v1/usage?interval=",
            "/v1/usage?key_id=",
            "/v1/usage?email=",
            "/v1/usage?plan=",
            "/v1/usage?scope=",
            "/v1/usage?outcome=",
            "/v1/usage?from=",
            "/v1/usage?time_zone=",
            "/v1/usage?format=",
            "/v1/usage?cursor=",
            "/v1/usage/events?after=",
            "/v1/audit?action=",
            "/v1/audit?target=",
            "/v1/audit?actor_key_id=",
            "/v1/audit?cursor=",
            "/v1/envoys?cursor=",
        ] {
            let reply = fixture.get(&format!("{uri}{text}"), &admin).await;
            assert_harmless(&reply, &[200, 400, 404], &format!("{uri} {trap:?}"));
        }
        // What no header can hold does not come so far.
        for header in ["idempotency-key", "if-match", "content-type", "accept", "x-request-id"] {
            let mut request = request("PATCH", &format!("/v1/keys/{id}"), Some(&admin), r#"{"name": "n"}"#);
            let Ok(value) = HeaderValue::from_bytes(trap.as_bytes()) else { continue };
            request.headers_mut().insert(header, value);
            let reply = fixture.send(request).await;
            assert_harmless(&reply, &[200, 400, 412, 415], &format!("{header} {trap:?}"));
        }
        let line = json!({"email": trap, "name": trap, "key": trap, "prefix": trap, "scopes": [trap]}).to_string();
        assert_harmless(&fixture.import(&admin, line).await, &[200], &format!("a line of {trap:?}"));
    }
    let tables: i64 = scalar(&pool, "select count(*) from api_keys where revoked_at is null").await;
    assert!(tables >= 2);
}

#[sqlx::test(migrations = "./migrations")]
async fn json_of_any_shape_is_answered(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let deep = |open: &str, close: &str, depth: usize| open.repeat(depth) + &close.repeat(depth);
    let shapes = [
        deep("[", "]", 5_000),
        deep("{\"a\":", "}", 2_000),
        format!(r#"{{"email": {}, "name": "n"}}"#, deep("[", "]", 3_000)),
        r#"{"email": "a@example.com", "email": "b@example.com", "name": "n"}"#.into(),
        r#"{"email": "\ud800@example.com", "name": "n"}"#.into(),
        r#"{"email": "a@example.com", "name": "\u0000"}"#.into(),
        r#"{"email": "a@example.com", "name": "n", "expires_in_seconds": 99999999999999999999999}"#.into(),
        r#"{"email": "a@example.com", "name": "n", "expires_in_seconds": 1.5}"#.into(),
        r#"{"email": "a@example.com", "name": "n"} {}"#.into(),
        "\u{feff}{}".into(),
        "null".into(),
        String::new(),
    ];
    for shape in shapes {
        let reply = fixture.send(request("POST", "/v1/keys", Some(&admin), shape.clone())).await;
        assert_harmless(&reply, &[400], &shape[..shape.len().min(80)]);
    }
    let reply = fixture.send(request("POST", "/v1/keys", Some(&admin), vec![0xff; 100])).await;
    assert_harmless(&reply, &[400], "bytes that are no text");
    let reply = fixture.send(request("POST", "/v1/keys", Some(&admin), vec![b' '; 16 * 1_024 + 1])).await;
    assert_harmless(&reply, &[413], "a body that is too large");
    let (_, sync) = fixture.key("operator@example.com", &["sync"]).await;
    let reply = fixture.send(request("POST", "/sync/v1/usage", Some(&sync), vec![0; (4 << 20) + 1])).await;
    assert_harmless(&reply, &[413], "a report that is too large");
    assert_eq!(reply.json()["code"], "too_large");
}

#[sqlx::test(migrations = "./migrations")]
async fn a_body_that_arrives_too_slowly_is_answered_with_408(pool: PgPool) {
    let (mut fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    fixture.router = api::router_with_read_timeout(fixture.app.clone(), None, Duration::from_millis(300));
    // A byte every 50 ms, without end.
    let drops = || {
        stream::repeat(()).then(async |()| {
            tokio::time::sleep(Duration::from_millis(50)).await;
            Ok::<_, Infallible>(Bytes::from_static(b" "))
        })
    };
    for (uri, key) in [("/v1/keys", &admin), ("/sync/v1/usage", &sync)] {
        for body in [Body::from_stream(drops()), Body::from_stream(stream::pending::<Result<Bytes, Infallible>>())] {
            let answered = fixture.send(request("POST", uri, Some(key), body));
            let reply = tokio::time::timeout(DEADLINE, answered).await.unwrap();
            assert_harmless(&reply, &[408], uri);
            assert_eq!((reply.json()["code"].as_str(), reply.header("connection")), (Some("timeout"), "close"));
        }
    }
}

const REPORTER: ReporterId = ReporterId([9; 16]);

fn report(reporter: ReporterId, seq: u64, key: Option<Uuid>, hour: u32, requests: u64) -> Report {
    let key = key.map(|id| KeyRef { id: KeyId::from(id), generation: 1 });
    let of = Subject { key, outcome: Outcome::Allowed.code(), hour };
    Report { reporter, seq, counts: vec![Count { of, requests, cost: requests, last_ms: u64::from(hour) * 3_600_000 }] }
}

async fn counted(pool: &PgPool, id: Uuid) -> i64 {
    scalar(pool, format!("select coalesce(sum(requests), 0)::bigint from usage_hourly where key_id = '{id}'")).await
}

#[sqlx::test(migrations = "./migrations")]
async fn replayed_reordered_and_forged_reports_count_nothing(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (_, stolen) = fixture.key("operator@example.com", &["sync"]).await;
    let (id, user) = fixture.key("user@example.com", &[]).await;
    let hour = u32::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() / 3_600).unwrap();
    let of = |seq, requests| report(REPORTER, seq, Some(id), hour, requests);
    let acknowledged = |reply: &Reply| Ack::read(&reply.body).unwrap().seq;

    assert_eq!(acknowledged(&submit(&fixture, &sync, &[of(1, 10)]).await), 1);
    assert_eq!(acknowledged(&submit(&fixture, &sync, &[of(3, 10)]).await), 3);
    // Replayed, late, and under a known number with other counts.
    for again in [&[of(1, 10)][..], &[of(2, 10)], &[of(3, 1_000)], &[of(1, 10), of(2, 10), of(3, 10)]] {
        assert_eq!(acknowledged(&submit(&fixture, &sync, again).await), 3);
        assert_eq!(counted(&pool, id).await, 20);
    }
    for disorder in [&[of(5, 1), of(4, 1)][..], &[of(4, 1), of(4, 1)], &[of(0, 1)], &[]] {
        assert_harmless(&submit(&fixture, &sync, disorder).await, &[400], "out of order");
    }
    // Another sync key, and keys that are none.
    let forged = submit(&fixture, &stolen, &[of(4, 1_000)]).await;
    assert_harmless(&forged, &[403], "another's reporter");
    assert_eq!(forged.json()["code"], "forbidden");
    assert_harmless(&submit(&fixture, &user, &[of(4, 1_000)]).await, &[403], "a user's key");
    let mixed = [of(4, 1), report(ReporterId([8; 16]), 5, Some(id), hour, 1)];
    assert_harmless(&submit(&fixture, &sync, &mixed).await, &[400], "two reporters in one message");
    // More requests than an Envoy can count, and damaged bytes.
    assert_harmless(&submit(&fixture, &sync, &[of(4, u64::MAX)]).await, &[400], "too many");
    let mut bytes = write_reports(&[of(4, 1)]).unwrap();
    for place in 0..bytes.len() {
        bytes[place] ^= 0x10;
        let reply = fixture.send(request("POST", "/sync/v1/usage", Some(&sync), bytes.clone())).await;
        assert_harmless(&reply, &[400], "a changed byte");
        bytes[place] ^= 0x10;
    }
    assert_eq!(counted(&pool, id).await, 20);

    // Impossible times are clamped. Counts of keys that are not in the database are dropped.
    let times = [report(REPORTER, 4, Some(id), 0, 1), report(REPORTER, 5, Some(id), u32::MAX, 1)];
    assert_eq!(acknowledged(&submit(&fixture, &sync, &times).await), 5);
    let nobody = report(REPORTER, 6, Some(Uuid::now_v7()), hour, 1);
    assert_eq!(acknowledged(&submit(&fixture, &sync, &[nobody]).await), 6);
    let sql = "select min(hour) > now() - interval '367 days' and max(hour) <= now() and count(distinct key_id) = 1
        from usage_hourly";
    let sane: bool = scalar(&pool, sql).await;
    assert!(sane && counted(&pool, id).await == 22);
}
