//! The keys with shared limits, quotas and credits, and the administrator's calls that raise them.

use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use axum::body::Bytes;
use http_body_util::Full;
use hyper::{Method, Request};
use portcullis_harness::http::{self, Reply};
use portcullis_harness::rest::Rest;
use serde_json::{Value, json};

use crate::driver::{CALL_TIMEOUT, call_for};
use crate::limit_model::Capacity;
use crate::oracle::Oracle;

/// The user whose credits are topped up.
pub(crate) const METERED: &str = "metered@example.com";

/// The user whose keys have the plan [`TEAM_PLAN`].
pub(crate) const TEAM: &str = "team@example.com";
pub(crate) const TEAM_PLAN: &str = "team";

/// Tokens of a quota at first, and by how many it is raised: enough for some seconds.
const STEP: u64 = 50;

/// Credits of a top-up: enough for some seconds of requests of one key.
const TOP_UP: u64 = 40;

/// Keys with limits that have clients of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    /// A rate limit that the load stays within.
    Within,
    /// A slow rate limit that is overloaded.
    Slow,
    /// A quota that is never used up.
    Ample,
    /// A quota that is used up, and raised now and then.
    Tight,
    /// The keys of one owner, who has a rate limit and a quota.
    Team,
}

impl Group {
    pub(crate) const ALL: [Self; 5] = [Self::Within, Self::Slow, Self::Ample, Self::Tight, Self::Team];

    /// Interval between two requests of a client. Each group has one client for each Envoy.
    pub(crate) const fn period(self) -> Duration {
        Duration::from_millis(match self {
            Self::Within => 250,
            Self::Tight => 333,
            Self::Slow | Self::Ample | Self::Team => 500,
        })
    }
}

/// Numbers of the pools of the oracle.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pools {
    within: usize,
    slow: usize,
    ample: usize,
    tight: usize,
    team_rate: usize,
    team_quota: usize,
    pub(crate) credits: usize,
    /// Requests a second of the rate limit that the load stays within.
    within_rate: u64,
}

/// Burst and rate of the slow limit, and of that of the team.
const SLOW: (u64, u64) = (5, 1);
const TEAM_RATE: (u64, u64) = (5, 5);

impl Pools {
    /// Adds them to the oracle.
    pub(crate) fn add(oracle: &Oracle, envoys: usize) -> Self {
        let rate = |name, (burst, per_second): (u64, u64)| {
            let interval = Duration::from_secs(1) / u32::try_from(per_second).unwrap_or(1);
            oracle.add_pool(name, "rate_limited", Capacity::Rate { interval, burst })
        };
        let stock = |name, code| oracle.add_pool(name, code, Capacity::Stock);
        // The load is 4 requests a second for each Envoy.
        let within_rate = 8 * envoys as u64;
        Self {
            within: rate("rate limit, half used", (within_rate, within_rate)),
            slow: rate("rate limit, overloaded", SLOW),
            ample: stock("quota, never used up", "quota_exceeded"),
            tight: stock("quota, used up", "quota_exceeded"),
            team_rate: rate("rate limit of an owner", TEAM_RATE),
            team_quota: stock("quota of an owner", "quota_exceeded"),
            credits: stock("credits", "credits_exhausted"),
            within_rate,
        }
    }

    pub(crate) fn of(&self, group: Group) -> Vec<usize> {
        match group {
            Group::Within => vec![self.within],
            Group::Slow => vec![self.slow],
            Group::Ample => vec![self.ample],
            Group::Tight => vec![self.tight],
            Group::Team => vec![self.team_rate, self.team_quota],
        }
    }

    /// The body that creates a key of a group.
    fn key(&self, group: Group) -> Value {
        let mut body = json!({"email": format!("{group:?}@example.com"), "name": "Torture"});
        match group {
            Group::Within => body["rate_limits"] = json!([rate_limit((self.within_rate, self.within_rate))]),
            Group::Slow => body["rate_limits"] = json!([rate_limit(SLOW)]),
            Group::Ample => body["quota"] = quota(1_000_000),
            Group::Tight => body["quota"] = quota(STEP),
            Group::Team => (body["email"], body["plan"]) = (TEAM.into(), TEAM_PLAN.into()),
        }
        body
    }
}

/// A minute at this burst and rate a second.
fn rate_limit((burst, per_second): (u64, u64)) -> Value {
    json!({"name": "minute", "requests": per_second * 60, "window_seconds": 60, "burst": burst})
}

/// A time zone whose day begins or ends neither during the run nor within some minutes of it, since clocks are shifted.
static TIME_ZONE: LazyLock<&str> = LazyLock::new(|| {
    const HOUR: u64 = 3_600;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    // A day in Auckland begins at 11 or 12 hours UTC.
    if (HOUR..13 * HOUR).contains(&(now.as_secs() % (24 * HOUR))) { "UTC" } else { "Pacific/Auckland" }
});

/// A quota of a day.
fn quota(requests: u64) -> Value {
    json!({"requests": requests, "period": "day", "time_zone": *TIME_ZONE})
}

fn plan(requests: u64) -> Value {
    let (mut rate_limit, mut quota) = (rate_limit(TEAM_RATE), quota(requests));
    (rate_limit["per"], quota["per"]) = ("owner".into(), "owner".into());
    json!({"rate_limits": [rate_limit], "quota": quota})
}

/// A quota that the administrator raises.
#[derive(Clone, Debug)]
pub(crate) struct Raised {
    pool: usize,
    path: String,
    of_plan: bool,
    /// Requests that were confirmed.
    requests: u64,
    /// Requested total, and the number of the fill.
    unconfirmed: Option<(u64, usize)>,
}

/// A top-up: its note, its credits, and the number of the fill.
pub(crate) type TopUp = (String, u64, usize);

/// Creates the keys. Returns the quotas to raise.
pub(crate) async fn create(rest: &Rest, oracle: &Oracle, pools: &Pools) -> Result<Vec<Raised>> {
    rest.expect(Method::PUT, &format!("/v1/plans/{TEAM_PLAN}"), Some(&plan(STEP)), 201).await?;
    let mut raised = Vec::new();
    let filled = |pool, tokens| oracle.filled(pool, oracle.ask_to_fill(pool, tokens));
    let mut raise = |pool, path, of_plan| {
        filled(pool, STEP);
        raised.push(Raised { pool, path, of_plan, requests: STEP, unconfirmed: None });
    };
    filled(pools.ample, 1_000_000);
    for (number, group) in Group::ALL.into_iter().enumerate() {
        for _ in 0..if group == Group::Team { 3 } else { 1 } {
            let (id, secret) = rest.create_with(pools.key(group)).await?;
            oracle.add(&id, &secret, None, &pools.of(group), Some(number));
            if group == Group::Tight {
                raise(pools.tight, format!("/v1/keys/{id}"), false);
            }
        }
    }
    raise(pools.team_quota, format!("/v1/plans/{TEAM_PLAN}"), true);
    Ok(raised)
}

impl Raised {
    /// Raises the quota, or asks again. It never goes down: a late call does not find the version that it expects.
    pub(crate) async fn raise(&mut self, rest: &Rest, oracle: &Oracle) -> Result<()> {
        let (requests, fill) = *self.unconfirmed.get_or_insert_with(|| {
            let more = STEP + oracle.overdrawn(self.pool);
            (self.requests + more, oracle.ask_to_fill(self.pool, more))
        });
        let Some(reply) = call_for(rest, Method::GET, &self.path, None).await? else { return Ok(()) };
        let Some(version) = reply.header("etag").filter(|_| reply.status == 200) else { return Ok(()) };
        if reply.json()?["quota"]["requests"] != requests {
            let (method, body) = if self.of_plan {
                (Method::PUT, plan(requests))
            } else {
                (Method::PATCH, json!({"quota": quota(requests)}))
            };
            let headers = [("if-match", version)];
            match send(rest, method, &self.path, &body, headers).await.map(|reply| reply.status) {
                Some(200) => {}
                None | Some(404 | 409 | 412 | 503) => return Ok(()),
                Some(status) => anyhow::bail!("raising a quota answered {status}"),
            }
        }
        (self.requests, self.unconfirmed) = (requests, None);
        oracle.filled(self.pool, fill);
        Ok(())
    }
}

/// A new top-up that was not sent yet.
pub(crate) fn top_up(oracle: &Oracle, pools: &Pools, note: String) -> TopUp {
    let credits = TOP_UP + oracle.overdrawn(pools.credits);
    (note, credits, oracle.ask_to_fill(pools.credits, credits))
}

/// Tops up the credits of a user. Returns the status, if there is a response.
pub(crate) async fn credit(rest: &Rest, user: &str, (note, credits, _): &TopUp) -> Option<u16> {
    let body = json!({"amount": credits, "note": note});
    let headers = [("idempotency-key", note.as_str())];
    send(rest, Method::POST, &format!("{user}/ledger"), &body, headers).await.map(|reply| reply.status)
}

/// Makes the user of the credits metered, and tops them up.
pub(crate) async fn credit_first(rest: &Rest, oracle: &Oracle, pools: &Pools) -> Result<String> {
    let top_up = top_up(oracle, pools, "0".into());
    let status = credit(rest, &rest.user(METERED).await?, &top_up).await.context("no response to a top-up")?;
    ensure!(status == 201, "a top-up answered {status}");
    oracle.filled(pools.credits, top_up.2);
    Ok(top_up.0)
}

async fn send(rest: &Rest, method: Method, path: &str, body: &Value, headers: [(&str, &str); 1]) -> Option<Reply> {
    let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    let request = headers.into_iter().fold(request, |request, (name, value)| request.header(name, value));
    let request = request.header("x-api-key", rest.key.reveal()).body(Full::<Bytes>::from(body.to_string())).ok()?;
    tokio::time::timeout(CALL_TIMEOUT, http::send(rest.address, request)).await.ok()?.ok()
}
