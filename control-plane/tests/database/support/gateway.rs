//! One Envoy with the filter's side of shared limits: it spends allowances, calls for more, and reports what it used.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use contract::id::ReporterId;
use contract::key::Secret;
use contract::outcome::Outcome;
use limits::asking::Due;
use limits::contact::Contact;
use limits::holding::{Holding, Limited, Spent};
use limits::message::{Answer, Ask, Call};
use limits::pool::PoolId;
use sqlx::PgPool;
use uuid::Uuid;

use super::reports::{Envoy, coded};
use super::{Fixture, Reply, execute, request};

pub struct Gateway {
    pub id: ReporterId,
    sync: Secret,
    reports: Envoy,
    pub contact: Contact,
    pub holdings: BTreeMap<PoolId, Holding>,
    /// Pools that were recalled.
    recalled: Vec<PoolId>,
    /// Requests and their cost that were not reported yet, by key.
    unreported: BTreeMap<Uuid, (u64, u64)>,
}

/// A call under a sync key.
pub async fn call(fixture: &Fixture, sync: &Secret, call: &Call) -> Reply {
    fixture.send(request("POST", "/sync/v1/allowances", Some(sync), call.write().unwrap())).await
}

/// The answer to a call that is in order.
pub async fn answer(fixture: &Fixture, sync: &Secret, asked: &Call) -> Answer {
    let reply = call(fixture, sync, asked).await;
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    assert_eq!(reply.header("content-type"), "application/vnd.portcullis.allowances");
    let answer = Answer::read(&reply.body).unwrap();
    assert_eq!(answer.grants.len(), asked.asks.len());
    answer
}

/// Ends the time in which one Envoy judges by itself.
pub async fn end_alone(pool: &PgPool) {
    execute(pool, "update lone_caller set until = 'epoch'").await;
}

/// Envoys of which none is alone.
pub async fn gateways(fixture: &Fixture, sync: &Secret, count: u8) -> Vec<Gateway> {
    let mut gateways: Vec<Gateway> = (1..=count).map(|number| Gateway::new(number, sync)).collect();
    for _ in 0..2 {
        for gateway in &mut gateways {
            gateway.call(fixture, &[]).await;
        }
        end_alone(&fixture.pool).await;
    }
    for gateway in &mut gateways {
        let answer = gateway.call(fixture, &[]).await;
        assert_eq!((answer.live, answer.alone_ms), (count.into(), 0));
    }
    gateways
}

impl Gateway {
    pub fn new(number: u8, sync: &Secret) -> Self {
        Self {
            id: ReporterId([number; 16]),
            sync: Secret::from_presented(sync.reveal().into()),
            reports: Envoy::new(number, sync),
            contact: Contact::default(),
            holdings: BTreeMap::new(),
            recalled: Vec::new(),
            unreported: BTreeMap::new(),
        }
    }

    /// Calls for tokens that requests wait for, and hands back what was recalled.
    pub async fn call(&mut self, fixture: &Fixture, needs: &[(PoolId, u64)]) -> Answer {
        self.call_with(fixture, needs, false).await
    }

    async fn call_with(&mut self, fixture: &Fixture, needs: &[(PoolId, u64)], is_last: bool) -> Answer {
        let now = now();
        let (sent_ms, now_ns) = (ms(now), u64::try_from(now.as_nanos()).unwrap());
        let mut needs: BTreeMap<PoolId, u64> = needs.iter().copied().collect();
        for pool in std::mem::take(&mut self.recalled) {
            self.holdings.entry(pool).or_default().hand_back();
            needs.entry(pool).or_default();
        }
        let asks: Vec<Ask> = needs
            .iter()
            .map(|(&pool, &need)| {
                let due = Due { pool, need, least: need, is_unused: false };
                self.holdings.entry(pool).or_default().ask(due, &self.contact, now_ns)
            })
            .collect();
        let answer = answer(fixture, &self.sync, &Call { reporter: self.id, is_last, asks }).await;
        self.contact.answered(sent_ms, ms(self::now()), answer.live, answer.alone_ms);
        for (pool, grant) in needs.keys().zip(&answer.grants) {
            self.holdings.entry(*pool).or_default().apply(grant, &self.contact, sent_ms);
        }
        self.recalled.extend(&answer.recalls);
        answer
    }

    /// A request that needs tokens of a pool; whether it is admitted.
    pub async fn request(&mut self, fixture: &Fixture, key: Uuid, of: &[(PoolId, Limited<'_>, u64)]) -> bool {
        for _ in 0..10 {
            let now_ns = u64::try_from(now().as_nanos()).unwrap();
            let mut refusal = None;
            for (place, (pool, limited, cost)) in of.iter().enumerate() {
                let spent = self.holdings.entry(*pool).or_default().spend(*cost, *limited, 0, &self.contact, now_ns);
                if !matches!(spent, Spent::Yes { .. }) {
                    for (pool, _, cost) in &of[..place] {
                        self.holdings.entry(*pool).or_default().refund(*cost);
                    }
                    refusal = Some(spent);
                    break;
                }
            }
            match refusal {
                None => {
                    let cost = of.iter().map(|(_, _, cost)| *cost).max().unwrap_or_default();
                    let unreported = self.unreported.entry(key).or_default();
                    *unreported = (unreported.0 + 1, unreported.1 + cost);
                    return true;
                }
                Some(Spent::Wait { for_others: true }) => return false,
                Some(Spent::Wait { .. }) => {
                    let needs: Vec<_> = of.iter().map(|(pool, _, cost)| (*pool, *cost)).collect();
                    self.call(fixture, &needs).await;
                }
                Some(_) => return false,
            }
        }
        panic!("the request goes on waiting: {:?}", self.holdings);
    }

    /// Reports what was used.
    pub async fn report(&mut self, fixture: &Fixture) {
        let counts: Vec<_> = std::mem::take(&mut self.unreported)
            .into_iter()
            .map(|(key, (requests, cost))| coded(key, Outcome::Allowed.code(), requests, cost))
            .collect();
        self.reports.report(fixture, &counts).await;
    }

    /// Ends: hands back all that it holds.
    pub async fn end(&mut self, fixture: &Fixture) {
        self.recalled.extend(self.holdings.keys());
        self.call_with(fixture, &[], true).await;
        self.report(fixture).await;
    }
}

pub fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

fn ms(at: Duration) -> u64 {
    u64::try_from(at.as_millis()).unwrap()
}
