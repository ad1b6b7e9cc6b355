//! The administrator. While requests flow, it creates, revokes, disables and rotates keys, sets
//! expiries and tops up credits through whichever control plane responds, and tells the oracle the
//! results.
//!
//! A call without a response may have been carried out, or may still be, by a control plane that is
//! paused. The oracle then expects nothing of that key, and the administrator revokes it until the
//! API confirms that.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use hyper::Method;
use portcullis_harness::dice::Dice;
use portcullis_harness::http::Reply;
use portcullis_harness::rest::{Rest, id_and_secret};
use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::JoinHandle;

use crate::limited::{self, Group, METERED, Pools, Raised, TEAM, TEAM_PLAN, TopUp, credit, credit_first};
use crate::oracle::{Oracle, Standing};
use crate::stack::TortureStack;

/// Time limit of a call. The API stops waiting for locks and connections after three seconds.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(8);

/// Number of keys that never change.
const STEADY: usize = 12;

/// Maximum number of other active keys.
const ALIVE: usize = 30;

/// Maximum number of active keys among them that are limited by their owner's plan.
const TEAM_ALIVE: usize = 3;

/// Attempts to top up after the run, if none succeeded during it.
const LAST_TRIES: usize = 100;

/// A key that may be changed.
#[derive(Clone, Debug)]
struct Key {
    id: String,
    secret: usize,
    /// Secrets from before a rotation, which may still work.
    old: Vec<usize>,
    disabled: bool,
    /// Whether it shares the limits of its owner.
    of_team: bool,
}

/// The administrator's records. They are restored together with the database.
#[derive(Clone, Debug, Default)]
pub struct Book {
    made: u64,
    alive: Vec<Key>,
    /// Keys to revoke until the API confirms it.
    doomed: Vec<Key>,
    /// Notes of confirmed top-ups.
    pub top_ups: Vec<String>,
    /// A top-up that is not confirmed.
    unconfirmed: Option<TopUp>,
    quotas: Vec<Raised>,
}

#[derive(Debug)]
pub struct Driver {
    stack: Arc<TortureStack>,
    oracle: Arc<Oracle>,
    book: Mutex<Book>,
    pools: Pools,
    stop: AtomicBool,
}

impl Driver {
    /// Creates the steady keys.
    pub async fn start(stack: &Arc<TortureStack>, oracle: &Arc<Oracle>) -> Result<Arc<Self>> {
        let book = Mutex::new(Book::default());
        let pools = Pools::add(oracle, stack.envoys.len());
        let (stack, oracle) = (Arc::clone(stack), Arc::clone(oracle));
        let this = Arc::new(Self { stack, oracle, book, pools, stop: false.into() });
        let rest = this.stack.rest(0)?;
        let mut book = this.book.lock().await;
        for number in 0..STEADY {
            let metered = number == 0;
            let email = if metered { METERED.to_owned() } else { format!("steady{number}@example.com") };
            let (id, secret) = rest.create(&email).await?;
            let pools: &[usize] = if metered { &[pools.credits] } else { &[] };
            this.oracle.add(&id, &secret, None, pools, None);
        }
        book.top_ups.push(credit_first(&rest, &this.oracle, &pools).await?);
        book.quotas = limited::create(&rest, &this.oracle, &pools).await?;
        drop(book);
        this.oracle.all_are_steady();
        Ok(this)
    }

    /// Makes one change after another until [`stop`](Self::stop).
    pub fn run(self: &Arc<Self>, seed: u64, pause: Duration) -> JoinHandle<()> {
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let mut dice = Dice::new(seed);
            // A short run on a busy machine makes few changes, so every run starts with these.
            let mut first = true;
            let mut last_tries = 0..LAST_TRIES;
            loop {
                tokio::time::sleep(dice.between(pause / 2, pause * 3 / 2)).await;
                let mut book = this.book.lock().await;
                let has_topped_up = book.top_ups.len() > 1;
                if this.stop.load(Ordering::Relaxed) && (has_topped_up || last_tries.next().is_none()) {
                    return;
                }
                let changed = if std::mem::take(&mut first) {
                    this.raise_all(&mut book, &mut dice).await
                } else {
                    this.change(&mut book, &mut dice).await
                };
                if let Err(error) = changed {
                    this.oracle.broken(&format!("the REST API: {error:#}"));
                }
            }
        })
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Holds the administrator back, and shows what it knows.
    pub async fn hold(&self) -> MutexGuard<'_, Book> {
        self.book.lock().await
    }

    async fn change(&self, book: &mut Book, dice: &mut Dice) -> Result<()> {
        let rest = self.stack.rest(dice.below(16))?;
        if let Some(doomed) = book.doomed.pop() {
            return self.revoke(book, &rest, doomed).await;
        }
        if let Some(top_up) = book.unconfirmed.clone() {
            return self.top_up(book, &rest, top_up).await;
        }
        let team = book.alive.iter().filter(|key| key.of_team).count();
        let key = |book: &mut Book, dice: &mut Dice| book.alive.swap_remove(dice.below(book.alive.len()));
        match dice.below(100) {
            _ if book.alive.len() < 4 => self.create(book, &rest, None, false).await,
            0..6 if team < TEAM_ALIVE => self.create(book, &rest, None, true).await,
            0..30 if book.alive.len() < ALIVE => self.create(book, &rest, None, false).await,
            30..38 => self.create(book, &rest, Some(2 + dice.below(8)), false).await,
            38..45 => self.top_up(book, &rest, self.new_top_up(dice)).await,
            45..50 => {
                let number = dice.below(book.quotas.len());
                self.raise(book, &rest, number).await
            }
            50..65 => {
                let key = key(book, dice);
                self.switch(book, &rest, key).await
            }
            65..80 => {
                let (key, grace) = (key(book, dice), [0, 0, 2, 4][dice.below(4)]);
                self.rotate(book, &rest, key, grace).await
            }
            _ => {
                let key = key(book, dice);
                self.revoke(book, &rest, key).await
            }
        }
    }

    /// Tops up the credits and raises each quota.
    async fn raise_all(&self, book: &mut Book, dice: &mut Dice) -> Result<()> {
        let rest = self.stack.rest(dice.below(16))?;
        self.top_up(book, &rest, self.new_top_up(dice)).await?;
        for number in 0..book.quotas.len() {
            self.raise(book, &rest, number).await?;
        }
        Ok(())
    }

    async fn raise(&self, book: &mut Book, rest: &Rest, number: usize) -> Result<()> {
        match book.quotas.get_mut(number) {
            Some(quota) => quota.raise(rest, &self.oracle).await,
            None => Ok(()),
        }
    }

    fn new_top_up(&self, dice: &mut Dice) -> TopUp {
        limited::top_up(&self.oracle, &self.pools, format!("{}", dice.number()))
    }

    /// Creates a key: one that shares the limits of its owner, or one of a new owner, since filters remember only the last few
    /// revoked keys of an owner.
    async fn create(&self, book: &mut Book, rest: &Rest, ends_in_s: Option<usize>, of_team: bool) -> Result<()> {
        book.made += 1;
        let email = if of_team { TEAM.to_owned() } else { format!("churn{}@example.com", book.made) };
        let mut body = json!({"email": email, "name": "Torture"});
        if of_team {
            body["plan"] = TEAM_PLAN.into();
        }
        if let Some(seconds) = ends_in_s {
            body["expires_in_seconds"] = seconds.into();
        }
        let Some(reply) = call(rest, Method::POST, "/v1/keys", Some(&body)).await? else { return Ok(()) };
        let (id, secret) = id_and_secret(&reply)?;
        let ends_at = reply["expires_at"].as_str().map(humantime::parse_rfc3339).transpose()?;
        let secret = self.add(&id, &secret, ends_at, of_team);
        if ends_in_s.is_none() {
            book.alive.push(Key { id, secret, old: Vec::new(), disabled: false, of_team });
        }
        Ok(())
    }

    fn add(&self, id: &str, secret: &str, ends_at: Option<SystemTime>, of_team: bool) -> usize {
        if of_team {
            self.oracle.add(id, secret, ends_at, &self.pools.of(Group::Team), Some(Group::Team as usize))
        } else {
            self.oracle.add(id, secret, ends_at, &[], None)
        }
    }

    async fn revoke(&self, book: &mut Book, rest: &Rest, key: Key) -> Result<()> {
        let secrets = || key.old.iter().copied().chain([key.secret]);
        secrets().for_each(|secret| self.oracle.doubt(secret));
        let asked = call_for(rest, Method::DELETE, &format!("/v1/keys/{}", key.id), None).await;
        match asked? {
            // 404, 409: an earlier call without a response revoked it, or the restored database does not have it.
            Some(reply) if matches!(reply.status, 200 | 204 | 404 | 409) => {
                secrets().for_each(|secret| self.oracle.settle(secret, Standing::Dead, None));
            }
            Some(reply) => anyhow::bail!("revoking answered {} {:?}", reply.status, reply.body),
            None => book.doomed.push(key),
        }
        Ok(())
    }

    async fn switch(&self, book: &mut Book, rest: &Rest, mut key: Key) -> Result<()> {
        // The model does not track old secrets of a disabled key.
        key.old.drain(..).for_each(|old| self.oracle.doubt(old));
        self.oracle.doubt(key.secret);
        let body = json!({"disabled": !key.disabled});
        match call(rest, Method::PATCH, &format!("/v1/keys/{}", key.id), Some(&body)).await? {
            None => book.doomed.push(key),
            Some(_) => {
                key.disabled = !key.disabled;
                let standing = if key.disabled { Standing::Dead } else { Standing::Good };
                self.oracle.settle(key.secret, standing, None);
                book.alive.push(key);
            }
        }
        Ok(())
    }

    async fn rotate(&self, book: &mut Book, rest: &Rest, mut key: Key, grace_s: u64) -> Result<()> {
        if key.disabled {
            return self.switch(book, rest, key).await;
        }
        self.oracle.doubt(key.secret);
        let asked = SystemTime::now();
        let body = json!({"grace_seconds": grace_s});
        match call(rest, Method::POST, &format!("/v1/keys/{}/rotate", key.id), Some(&body)).await? {
            None => book.doomed.push(key),
            Some(reply) => {
                let (id, secret) = id_and_secret(&reply)?;
                if grace_s == 0 {
                    self.oracle.settle(key.secret, Standing::Dead, None);
                } else {
                    // The expiry is on the next whole second by the clock of the database, which is this machine's. Its start is
                    // unknown, since the call may have waited for locks.
                    let now = SystemTime::now();
                    let latest = now + Duration::from_secs(grace_s + 1);
                    let earlier = now.duration_since(asked).unwrap_or_default() + Duration::from_secs(1);
                    self.oracle.settle(key.secret, Standing::Good, Some((latest, earlier)));
                }
                key.old.push(key.secret);
                key.secret = self.add(&id, &secret, None, key.of_team);
                book.alive.push(key);
            }
        }
        Ok(())
    }

    async fn top_up(&self, book: &mut Book, rest: &Rest, top_up: TopUp) -> Result<()> {
        let user = json!({"email": METERED});
        let Some(user) = call(rest, Method::POST, "/v1/users", Some(&user)).await? else {
            book.unconfirmed = Some(top_up);
            return Ok(());
        };
        let path = format!("/v1/users/{}", user["id"].as_str().context("a user without an id")?);
        match credit(rest, &path, &top_up).await {
            Some(201) => {
                book.unconfirmed = None;
                self.oracle.filled(self.pools.credits, top_up.2);
                book.top_ups.push(top_up.0);
            }
            // A retry with the same idempotency key is booked once. 404: the database was restored between the two calls.
            None | Some(503 | 409 | 404) => book.unconfirmed = Some(top_up),
            Some(status) => anyhow::bail!("a top-up answered {status}"),
        }
        Ok(())
    }
}

/// A call with a JSON response. None if there was no response, or one that asks for a retry.
async fn call(rest: &Rest, method: Method, path: &str, body: Option<&Value>) -> Result<Option<Value>> {
    match call_for(rest, method.clone(), path, body).await? {
        None => Ok(None),
        Some(reply) if matches!(reply.status, 200 | 201) => reply.json().map(Some),
        // The restored database may lack the key, or a call without a response may have changed it.
        Some(reply) if matches!(reply.status, 404 | 409) => Ok(None),
        Some(reply) => anyhow::bail!("{method} {path} answered {} {:?}", reply.status, reply.body),
    }
}

pub(crate) async fn call_for(rest: &Rest, method: Method, path: &str, body: Option<&Value>) -> Result<Option<Reply>> {
    match tokio::time::timeout(CALL_TIMEOUT, rest.call(method, path, body)).await {
        Err(_) | Ok(Err(_)) => Ok(None),
        Ok(Ok(reply)) if reply.status == 503 => Ok(None),
        Ok(Ok(reply)) => Ok(Some(reply)),
    }
}
