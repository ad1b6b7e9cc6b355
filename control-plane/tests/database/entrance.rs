//! What applies to every request: limits by owner and address, request ids, the index, and the newline at the end of
//! each answer.

use axum::body::Body;
use axum::http::HeaderValue;
use contract::key::Secret;
use serde_json::json;
use sqlx::PgPool;
use uuid::Uuid;

use crate::support::{Fixture, Reply, execute, request, revoke};

async fn get(fixture: &Fixture, uri: &str, key: Option<&Secret>) -> Reply {
    fixture.send(request("GET", uri, key, Body::empty())).await
}

async fn status(fixture: &Fixture, uri: &str, key: Option<&Secret>) -> u16 {
    get(fixture, uri, key).await.status
}

#[sqlx::test(migrations = "./migrations")]
async fn six_keys_of_one_owner_make_no_more_calls_than_one(pool: PgPool) {
    const BURST: u32 = 30;
    let fixture = Fixture::with_rate_limit(&pool, BURST).await;
    let mut keys = Vec::new();
    for _ in 0..6 {
        keys.push(fixture.key("one@example.com", &[]).await.1);
    }
    let (_, other) = fixture.key("other@example.com", &[]).await;
    fixture.in_step().await;
    let start = std::time::Instant::now();
    let mut admitted = 0_u64;
    for _ in 0..BURST {
        for key in &keys {
            admitted += u64::from(status(&fixture, "/api/user/key/one@example.com", Some(key)).await == 200);
        }
    }
    // One call comes back each second.
    let allowed = u64::from(BURST) + start.elapsed().as_secs() + 1;
    assert!((u64::from(BURST)..=allowed).contains(&admitted), "{admitted} of {} calls", 6 * BURST);
    assert_eq!(status(&fixture, "/api/user/key/other@example.com", Some(&other)).await, 200);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_key_that_the_mirror_does_not_know_yet_does_not_pay_for_guesses_from_its_address(pool: PgPool) {
    let fixture = Fixture::with_rate_limit(&pool, 3).await;
    let guess = Secret::from_presented("sk_live_guess".into());
    fixture.stop_feed();
    let uri = "/api/user/key/new@example.com";
    while status(&fixture, uri, Some(&guess)).await != 429 {}
    let (_, fresh) = fixture.key("new@example.com", &[]).await;
    let (_, sync) = fixture.key("operator@example.com", &["sync"]).await;
    assert_eq!(status(&fixture, uri, Some(&fresh)).await, 200);
    assert_eq!(status(&fixture, "/sync/v1/keys", Some(&sync)).await, 200);
    assert_eq!(status(&fixture, uri, Some(&guess)).await, 429);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_key_that_works_again_does_not_pay_for_guesses_from_its_address(pool: PgPool) {
    let fixture = Fixture::with_rate_limit(&pool, 3).await;
    let guess = Secret::from_presented("sk_live_guess".into());
    let (id, key) = fixture.key("user@example.com", &[]).await;
    let set = async |disabled: bool| {
        execute(&pool, format!("update api_keys set disabled = '{disabled}' where id = '{id}'")).await;
    };
    set(true).await;
    fixture.in_step().await;
    fixture.stop_feed();
    for uri in ["/api/user/key/user@example.com", "/openapi.json"] {
        while status(&fixture, uri, Some(&guess)).await != 429 {}
        set(true).await;
        assert_eq!(status(&fixture, "/api/user/key/user@example.com", Some(&key)).await, 429);
        set(false).await;
        assert_eq!(status(&fixture, uri, Some(&key)).await, 200, "{uri}");
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn routes_without_a_key_are_limited_by_address_and_probes_are_not(pool: PgPool) {
    for uri in ["/openapi.json", "/", "/metrics", "/nothing"] {
        let fixture = Fixture::with_rate_limit(&pool, 3).await;
        let (_, user) = fixture.key("user@example.com", &[]).await;
        fixture.in_step().await;
        while status(&fixture, uri, None).await != 429 {}
        assert_eq!(status(&fixture, "/healthz", None).await, 200);
        assert_eq!(status(&fixture, "/readyz", None).await, 200);
        // A good key pays for itself.
        assert_ne!(status(&fixture, uri, Some(&user)).await, 429, "{uri}");
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn a_key_that_no_longer_works_is_limited_by_its_address_before_the_database_is_asked(pool: PgPool) {
    let fixture = Fixture::with_rate_limit(&pool, 3).await;
    let (id, key) = fixture.key("user@example.com", &[]).await;
    revoke(&pool, id).await;
    fixture.in_step().await;
    // From now on a question to the database is answered with 503.
    fixture.app.pool.close().await;
    let mut statuses = Vec::new();
    while statuses.last() != Some(&429) {
        statuses.push(status(&fixture, "/v1/keys", Some(&key)).await);
        assert!(statuses.len() < 1_000, "never limited");
    }
    assert!(statuses[..statuses.len() - 1].iter().all(|status| *status == 503), "{statuses:?}");
}

#[sqlx::test(migrations = "./migrations")]
async fn every_answer_in_json_ends_with_a_newline(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    fixture.in_step().await;
    let body = json!({"email": "user@example.com", "name": "n"}).to_string();
    let mut poll = request("GET", "/sync/v1/keys", Some(&sync), Body::empty());
    poll.headers_mut().insert("accept", HeaderValue::from_static("application/json"));
    let mut made = request("POST", "/v1/keys", Some(&admin), body.clone());
    made.headers_mut().insert("idempotency-key", HeaderValue::from_static("one"));
    let mut again = request("POST", "/v1/keys", Some(&admin), body);
    again.headers_mut().insert("idempotency-key", HeaderValue::from_static("one"));
    let requests = [
        (200, request("GET", "/", None, Body::empty())),
        (200, request("GET", "/openapi.json", None, Body::empty())),
        (200, request("GET", "/readyz", None, Body::empty())),
        (200, request("GET", "/v1/keys", Some(&admin), Body::empty())),
        (200, request("GET", "/api/user/key/admin@example.com", Some(&admin), Body::empty())),
        (200, request("GET", "/v1/usage", Some(&admin), Body::empty())),
        (200, request("GET", "/v1/envoys", Some(&admin), Body::empty())),
        (200, poll),
        (201, made),
        (201, again),
        (401, request("GET", "/v1/keys", None, Body::empty())),
        (404, request("GET", "/nothing", None, Body::empty())),
        (405, request("DELETE", "/", None, Body::empty())),
        (400, request("POST", "/v1/keys", Some(&admin), "{")),
    ];
    for (status, request) in requests {
        let what = format!("{} {}", request.method(), request.uri());
        let reply = fixture.send(request).await;
        assert_eq!(reply.status, status, "{what}");
        assert!(reply.header("content-type").contains("json"), "{what}");
        assert!(reply.body.ends_with(b"}\n"), "{what}: {:?}", String::from_utf8_lossy(&reply.body));
        reply.json();
    }
    let index = get(&fixture, "/", None).await.json();
    for name in ["openapi", "alive", "ready"] {
        let uri = index[name].as_str().unwrap();
        assert_eq!(status(&fixture, uri, None).await, 200, "{uri}");
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn a_request_id_is_the_clients_uuid_or_one_of_ours(pool: PgPool) {
    let fixture = Fixture::new(&pool).await;
    let id_of = async |given: &str| {
        let mut request = request("GET", "/healthz", None, Body::empty());
        request.headers_mut().insert("x-request-id", HeaderValue::from_str(given).unwrap());
        fixture.send(request).await.header("x-request-id").to_owned()
    };
    let uuid = "0192f0c1-2f0e-7c3a-8a53-3f1f0a9f6e11";
    assert_eq!(id_of(uuid).await, uuid);
    for given in ["", "17", "an-id-of-somebody-else", "id\" status=200 \"", "Bearer:sk_live_key", &"a".repeat(5_000)] {
        let ours = id_of(given).await;
        assert!(ours != given && Uuid::try_parse(&ours).is_ok(), "{given}: {ours}");
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn pages_of_the_origins_that_are_named_may_call_and_no_others(pool: PgPool) {
    const PAGE: &str = "https://keys.example.com";
    let (mut fixture, admin) = Fixture::with_admin(&pool).await;
    let call = async |fixture: &Fixture, origin: &str| {
        let mut preflight = request("OPTIONS", "/v1/keys", None, Body::empty());
        for (name, value) in [
            ("origin", origin),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "x-api-key,content-type"),
        ] {
            preflight.headers_mut().insert(name, value.parse().unwrap());
        }
        let preflight = fixture.send(preflight).await;
        let reply = fixture.call_with("GET", "/v1/keys", &admin, None, &[("origin", origin)]).await;
        let allowed = |reply: &Reply| {
            let origin = reply.headers.get("access-control-allow-origin");
            (reply.status, origin.map(|origin| origin.to_str().unwrap().to_owned()))
        };
        [allowed(&preflight), allowed(&reply)]
    };
    assert_eq!(call(&fixture, PAGE).await, [(405, None), (200, None)]);
    fixture.configure(|app| app.cors_origins = [PAGE.parse().unwrap()].into());
    assert_eq!(call(&fixture, PAGE).await, [200, 200].map(|status| (status, Some(PAGE.to_owned()))));
    assert_eq!(call(&fixture, "https://other.example.com").await, [(200, None), (200, None)]);
}
