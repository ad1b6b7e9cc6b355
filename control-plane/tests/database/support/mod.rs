//! What database tests share: an app over the test's own database, and requests to its router.
#![allow(dead_code, reason = "each test crate uses its part of it")]

pub mod reports;
pub mod slow_rollback;

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, StatusCode};
use contract::hash::KeyHash;
use contract::key::Secret;
use control_plane::api::rate_limit::CallerRateLimiter;
use control_plane::audit::Actor;
use control_plane::change::{FeedWaker, Writer};
use control_plane::config::bounds::Bounds;
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
use serde_json::Value;
use sqlx::PgPool;
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
    pub async fn new(pool: PgPool) -> Self {
        Self::with_rate_limit(pool, 10_000).await
    }

    pub async fn with_rate_limit(pool: PgPool, burst: u32) -> Self {
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
            filters: Registry::bounded(1_000),
            bounds: Bounds::default(),
            policies: Arc::default(),
            rate_limiter: Arc::new(CallerRateLimiter::new(NonZeroU32::MIN, burst)),
            database: Arc::default(),
            long_poll: HELD,
            stopping,
        };
        let feed = tokio::spawn(app.feed.clone().run(Duration::from_secs(60)));
        let mut positions = app.store.positions();
        positions.wait_for(Option::is_some).await.unwrap();
        let router = api::router(app.clone(), None);
        Self { app, router, pool, stop, feed }
    }

    /// Tells the app to end.
    pub fn stop(&self) {
        self.stop.send(true).unwrap();
    }

    /// Polls are held for a moment only. That bounds the time to look at the database too, so only for tests without it.
    pub fn shorten_polls(&mut self) {
        self.app.long_poll = Duration::from_millis(100);
        self.router = api::router(self.app.clone(), None);
    }

    /// From here on the mirror stays as it is, as that of a replica that has not heard yet.
    pub fn stop_feed(&self) {
        self.feed.abort();
    }

    /// Makes a key; its id and secret.
    pub async fn key(&self, email: &str, scopes: &[&str]) -> (Uuid, Secret) {
        key(&self.pool, email, scopes).await
    }

    /// The path of a user, who is created if there is none with this address.
    pub async fn user(&self, email: &str) -> String {
        let sql = "insert into user_preferences (id, email) values ($1, $2)
            on conflict (email) do update set email = excluded.email returning id";
        let id: Uuid = sqlx::query_scalar(sql).bind(Uuid::now_v7()).bind(email).fetch_one(&self.pool).await.unwrap();
        format!("/v1/users/{id}")
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
        Reply { status: parts.status, headers: parts.headers, body }
    }
}

pub struct Reply {
    pub status: StatusCode,
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

    /// What a problem says.
    #[track_caller]
    pub fn assert_problem(&self, status: u16, code: &str, detail: &str, field: Option<&str>) {
        let body = self.json();
        assert_eq!((self.status.as_u16(), &body["code"], &body["detail"]), (status, &code.into(), &detail.into()));
        assert_eq!(body.get("field").and_then(Value::as_str), field);
        assert_eq!(self.header("content-type"), "application/problem+json");
    }
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
    let revision: i64 = sqlx::query_scalar("select revision from store_state").fetch_one(pool).await.unwrap();
    revision.cast_unsigned()
}

pub fn request(method: &str, uri: &str, key: Option<&Secret>, body: impl Into<Body>) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(uri);
    if let Some(key) = key {
        request = request.header("x-api-key", key.reveal());
    }
    request.header("content-type", "application/json").body(body.into()).unwrap()
}

pub fn hash(secret: &Secret) -> KeyHash {
    secret.hash()
}
