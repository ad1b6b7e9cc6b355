//! Shared by the database tests: an app over the test's own database, and requests to its router.

pub mod gateway;
pub mod reports;
pub mod server;
pub mod slow_rollback;

use std::borrow::Borrow;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request};
use contract::key::Secret;
use contract::sightings::Sightings;
use control_plane::allowances::Allowances;
use control_plane::api::rate_limit::CallerRateLimiter;
use control_plane::audit::Actor;
use control_plane::change::{FeedWaker, Writer};
use control_plane::domain::{Email, KeyName, Scopes};
use control_plane::keys::lock::lock_key;
use control_plane::keys::model::{CreatedKey, NewKey};
use control_plane::keys::{create, revoke};
use control_plane::metering::Ingest;
use control_plane::sync::Store;
use control_plane::sync::feed::Feed;
use control_plane::sync::registry::Registry;
use control_plane::{App, api};
use portcullis_tests::paths;
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, FromRow, PgPool};
use tokio::sync::watch;
use tower::ServiceExt;
use uuid::Uuid;

/// How long the control plane holds a poll that nothing ends.
pub const HELD: Duration = Duration::from_secs(60);

/// A poll that ends within this time was ended by an event. It is far below [`HELD`] and the longest time that a client may
/// ask for, and far above what a busy machine needs.
pub const EARLY: Duration = Duration::from_secs(20);

/// The control plane as cargo built it for these tests. Read when the test runs, since a checkout may be copied with its
/// target directory.
pub fn binary() -> PathBuf {
    std::env::var_os("CARGO_BIN_EXE_portcullis").map_or_else(paths::control_plane, PathBuf::from)
}

/// An app whose mirror is fed as in production, and the router over it.
pub struct Fixture {
    pub app: App,
    pub router: Router,
    pub pool: PgPool,
    stop: watch::Sender<bool>,
    feed: tokio::task::JoinHandle<()>,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.feed.abort();
    }
}

impl Fixture {
    pub async fn new(pool: &PgPool) -> Self {
        Self::with_rate_limit(pool, 10_000).await
    }

    /// A fixture and an admin key.
    pub async fn with_admin(pool: &PgPool) -> (Self, Secret) {
        let fixture = Self::new(pool).await;
        let (_, admin) = fixture.key("admin@example.com", &["admin"]).await;
        (fixture, admin)
    }

    /// A fixture and the key of a filter.
    pub async fn with_sync(pool: &PgPool) -> (Self, Secret) {
        let fixture = Self::new(pool).await;
        let (_, sync) = fixture.key("operator@example.com", &["sync"]).await;
        (fixture, sync)
    }

    /// A fixture, an admin key and the key of a filter.
    pub async fn with_admin_and_sync(pool: &PgPool) -> (Self, Secret, Secret) {
        let (fixture, admin) = Self::with_admin(pool).await;
        let (_, sync) = fixture.key("operator@example.com", &["sync"]).await;
        (fixture, admin, sync)
    }

    pub async fn with_rate_limit(pool: &PgPool, burst: u32) -> Self {
        let (stop, stopping) = watch::channel(false);
        let (usage, _) = Ingest::start(pool.clone());
        let burst = NonZeroU32::new(burst).unwrap();
        let store = Store::new();
        let app = App {
            pool: pool.clone(),
            feed: Feed::new(pool.clone(), store.clone()),
            writer: Writer::new(pool.clone(), store.waker().clone()),
            store,
            pepper: None,
            usage,
            allowances: Allowances::start(pool.clone()),
            filters: Registry::bounded(1_000),
            cors_origins: Arc::default(),
            owner_keys_per_day: 200,
            rate_limiter: Arc::new(CallerRateLimiter::new(NonZeroU32::MIN, burst)),
            database: Arc::default(),
            long_poll: HELD,
            stopping,
        };
        let feed = tokio::spawn(app.feed.clone().run(Duration::from_secs(60)));
        let mut positions = app.store.positions();
        positions.wait_for(Option::is_some).await.unwrap();
        let router = api::router(app.clone(), None);
        Self { app, router, pool: pool.clone(), stop, feed }
    }

    /// Changes a setting of the app, before the first request.
    pub fn configure(&mut self, change: impl FnOnce(&mut App)) {
        change(&mut self.app);
        self.router = api::router(self.app.clone(), None);
    }

    /// Tells the app to end.
    pub fn stop(&self) {
        self.stop.send(true).unwrap();
    }

    /// Polls are held for a moment only. That bounds the time to look at the database too, so only for tests without it.
    pub fn shorten_polls(&mut self) {
        self.configure(|app| app.long_poll = Duration::from_millis(100));
    }

    /// Stops updates of the mirror, as on a replica that lags.
    pub fn stop_feed(&self) {
        self.feed.abort();
    }

    /// Makes a key; its id and secret.
    pub async fn key(&self, email: &str, scopes: &[&str]) -> (Uuid, Secret) {
        key(&self.pool, email, scopes).await
    }

    /// The path of a user, who is created if there is none with this address.
    pub async fn user(&self, email: &str) -> String {
        let sql = format!(
            "insert into user_preferences (id, email) values ('{}', '{email}')
            on conflict (email) do update set email = excluded.email returning id",
            Uuid::now_v7()
        );
        format!("/v1/users/{}", scalar::<Uuid>(&self.pool, sql).await)
    }

    pub async fn get(&self, uri: &str, key: &Secret) -> Reply {
        self.call("GET", uri, key, None).await
    }

    pub async fn delete(&self, uri: &str, key: &Secret) -> Reply {
        self.call("DELETE", uri, key, None).await
    }

    pub async fn post(&self, uri: &str, key: &Secret, body: impl Borrow<Value>) -> Reply {
        self.call("POST", uri, key, Some(body.borrow())).await
    }

    pub async fn put(&self, uri: &str, key: &Secret, body: impl Borrow<Value>) -> Reply {
        self.call("PUT", uri, key, Some(body.borrow())).await
    }

    pub async fn patch(&self, uri: &str, key: &Secret, body: impl Borrow<Value>) -> Reply {
        self.call("PATCH", uri, key, Some(body.borrow())).await
    }

    /// Creates a key of user@example.com, with these fields of the request.
    pub async fn create(&self, caller: &Secret, fields: Value) -> Reply {
        let mut body = json!({"email": "user@example.com", "name": "n"});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        self.post("/v1/keys", caller, body).await
    }

    /// Creates a key from the body of a request; its id and secret.
    pub async fn created(&self, caller: &Secret, body: Value) -> (Uuid, Secret) {
        let created = self.post("/v1/keys", caller, body).await.expect(201);
        (id_of(&created), secret_of(&created))
    }

    /// `allowed`, or the code of the problem that a key is refused with.
    pub async fn opens(&self, key: &Secret) -> Value {
        let reply = self.get("/v1/keys", key).await;
        if reply.status == 200 { json!("allowed") } else { reply.json()["code"].clone() }
    }

    /// Sends what a filter has seen.
    pub async fn note(&self, sync: &Secret, sightings: &Sightings) -> Reply {
        self.send(request("POST", "/sync/v1/sightings", Some(sync), sightings.write().unwrap())).await
    }

    /// Imports lines of keys.
    pub async fn import(&self, key: &Secret, lines: impl Into<Body>) -> Reply {
        let mut request = request("POST", "/v1/keys/import", Some(key), lines);
        request.headers_mut().insert("content-type", "application/x-ndjson; charset=utf-8".parse().unwrap());
        self.send(request).await
    }

    /// One field of every entry, by page. Each page but the last links to the next one, which asks for the same.
    pub async fn pages(&self, path: &str, asked: &str, list: &str, field: &str, key: &Secret) -> Vec<Vec<Value>> {
        self.pages_while(path, asked, list, field, key, async || {}).await
    }

    /// The same while something happens after each page.
    pub async fn pages_while(
        &self,
        path: &str,
        asked: &str,
        list: &str,
        field: &str,
        key: &Secret,
        meanwhile: impl AsyncFn(),
    ) -> Vec<Vec<Value>> {
        let (mut uri, mut pages) = (format!("{path}?{asked}limit=2"), Vec::new());
        loop {
            let reply = self.get(&uri, key).await;
            let page = reply.expect(200);
            pages.push(page[list].as_array().unwrap().iter().map(|entry| entry[field].clone()).collect());
            meanwhile().await;
            let Some(cursor) = page["next_cursor"].as_str() else {
                assert!(page["next_cursor"].is_null() && !reply.headers.contains_key("link"));
                return pages;
            };
            uri = format!("{path}?{asked}cursor={cursor}&limit=2");
            assert_eq!(reply.header("link"), format!("<{uri}>; rel=\"next\""));
        }
    }

    /// One call of the REST API, with a JSON body if there is one.
    pub async fn call(&self, method: &str, uri: &str, key: &Secret, body: Option<&Value>) -> Reply {
        self.call_with(method, uri, key, body, &[]).await
    }

    /// One call with further headers.
    pub async fn call_with(
        &self,
        method: &str,
        uri: &str,
        key: &Secret,
        body: Option<&Value>,
        headers: &[(&'static str, &str)],
    ) -> Reply {
        let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
        let mut request = request(method, uri, Some(key), body);
        for (name, value) in headers {
            request.headers_mut().append(*name, value.parse().unwrap());
        }
        self.send(request).await
    }

    /// Waits until the mirror has the present revision of the database.
    pub async fn in_step(&self) -> u64 {
        let now = revision(&self.pool).await;
        let mut positions = self.app.store.positions();
        let at = positions.wait_for(|at| at.is_some_and(|(_, at)| at >= now)).await.unwrap();
        at.unwrap().1
    }

    pub async fn send(&self, request: Request<Body>) -> Reply {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = to_bytes(body, 32 << 20).await.unwrap().to_vec();
        Reply { status: parts.status.as_u16(), headers: parts.headers, body }
    }
}

pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    #[track_caller]
    pub fn assert_ok(&self) {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
    }

    /// The body of an answer that has this status.
    #[track_caller]
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        self.json()
    }

    /// The secret that the answer shows.
    #[track_caller]
    pub fn secret(&self) -> Secret {
        secret_of(&self.json())
    }

    /// Asserts that a field of the request is wrong.
    #[track_caller]
    pub fn assert_invalid(&self, field: &str, detail: &str) {
        self.assert_problem(400, "invalid", detail, Some(field));
    }

    #[track_caller]
    pub fn assert_forbidden(&self, detail: &str) {
        self.assert_problem(403, "forbidden", detail, None);
    }

    #[track_caller]
    pub fn assert_not_found(&self, detail: &str) {
        self.assert_problem(404, "not_found", detail, None);
    }

    #[track_caller]
    pub fn assert_conflict(&self, detail: &str) {
        self.assert_problem(409, "conflict", detail, None);
    }

    /// Asserts status, code, detail and field of a problem.
    #[track_caller]
    pub fn assert_problem(&self, status: u16, code: &str, detail: &str, field: Option<&str>) {
        let body = self.json();
        assert_eq!((self.status, &body["code"], &body["detail"]), (status, &code.into(), &detail.into()));
        assert_eq!(body.get("field").and_then(Value::as_str), field);
        assert_eq!(self.header("content-type"), "application/problem+json");
    }
}

/// The secret that an answer shows, in `key` below `/api`.
#[track_caller]
pub fn secret_of(answer: &Value) -> Secret {
    Secret::from_presented(answer.get("secret").unwrap_or(&answer["key"]).as_str().unwrap().into())
}

#[track_caller]
pub fn id_of(answer: &Value) -> Uuid {
    answer["id"].as_str().unwrap().parse().unwrap()
}

/// Percent-encodes everything, for a path or a query.
pub fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

/// Executes a statement of the test; how many rows it changed.
pub async fn execute(pool: &PgPool, sql: impl Into<String>) -> u64 {
    sqlx::query(AssertSqlSafe(sql.into())).execute(pool).await.unwrap().rows_affected()
}

/// Sets columns of a key by hand.
pub async fn change_key(pool: &PgPool, id: Uuid, columns: &str) {
    execute(pool, format!("update api_keys set {columns} where id = '{id}'")).await;
}

/// The only value that a query finds.
pub async fn scalar<T>(pool: &PgPool, sql: impl Into<String>) -> T
where
    (T,): for<'r> FromRow<'r, PgRow>,
    T: Send + Unpin,
{
    row::<(T,)>(pool, sql).await.0
}

/// The values of the only column.
pub async fn scalars<T>(pool: &PgPool, sql: impl Into<String>) -> Vec<T>
where
    (T,): for<'r> FromRow<'r, PgRow>,
    T: Send + Unpin,
{
    rows::<(T,)>(pool, sql).await.into_iter().map(|(value,)| value).collect()
}

/// The only row that a query finds.
pub async fn row<T: for<'r> FromRow<'r, PgRow> + Send + Unpin>(pool: &PgPool, sql: impl Into<String>) -> T {
    sqlx::query_as(AssertSqlSafe(sql.into())).fetch_one(pool).await.unwrap()
}

pub async fn rows<T: for<'r> FromRow<'r, PgRow> + Send + Unpin>(pool: &PgPool, sql: impl Into<String>) -> Vec<T> {
    sqlx::query_as(AssertSqlSafe(sql.into())).fetch_all(pool).await.unwrap()
}

/// Waits until a statement waits for a lock.
pub async fn lock_wait(pool: &PgPool) {
    let waits =
        "select exists (select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock')";
    let waiting = async || scalar::<bool>(pool, waits).await.then_some(());
    eventually("a wait for a lock", waiting).await.unwrap();
}

pub async fn key(pool: &PgPool, email: &str, scopes: &[&str]) -> (Uuid, Secret) {
    let new = NewKey {
        scopes: Scopes::parse(scopes.iter().map(ToString::to_string).collect()).unwrap(),
        ..NewKey::plain(Email::parse(email).unwrap(), KeyName::parse("name", "a key").unwrap())
    };
    let created = writer(pool).change(&Actor::system(), async |change| create::create(change, new).await).await;
    let CreatedKey { key, secret, .. } = created.unwrap();
    (key.id, secret)
}

/// Revokes a key for good.
pub async fn revoke(pool: &PgPool, id: Uuid) {
    let (writer, actor) = (writer(pool), Actor::system());
    let revoked = writer.change(&actor, async |change| {
        let key = lock_key(change, id).await?.unwrap();
        revoke::revoke(change, &key).await
    });
    revoked.await.unwrap();
}

/// Writes as another process does: no feed is woken.
pub fn writer(pool: &PgPool) -> Writer {
    Writer::new(pool.clone(), FeedWaker::default())
}

pub async fn revision(pool: &PgPool) -> u64 {
    scalar::<i64>(pool, "select revision from store_state").await.cast_unsigned()
}

pub fn request(method: &str, uri: &str, key: Option<&Secret>, body: impl Into<Body>) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(uri);
    if let Some(key) = key {
        request = request.header("x-api-key", key.reveal());
    }
    request.header("content-type", "application/json").body(body.into()).unwrap()
}
