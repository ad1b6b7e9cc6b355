//! Suite `limits`, second part: how many allowances the control plane grants, for each second and for
//! each second of CPU. Callers hold allowances as Envoys do, and ask for all of them repeatedly.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use contract::id::{KeyId, ReporterId};
use contract::key::Secret;
use contract::rate::{Rate, tag};
use contract::record::{Per, RateLimit};
use limits::asking::Due;
use limits::contact::Contact;
use limits::holding::{Holding, Limited};
use limits::message::{Answer, Call};
use limits::pool::{Kind, PoolId};
use portcullis_harness::http::Connection;
use portcullis_harness::output::progress;
use portcullis_harness::stack::Stack;
use sqlx::types::Uuid;
use tokio::task::JoinSet;

use crate::Options;
use crate::report::Report;
use crate::stats::{Estimate, Samples};
use crate::store::{self, Used};

const GRANTS: &str = "limits: allowances granted, eight callers";
const BY_CORE: &str = "limits: allowances granted by second of processor";

/// Envoys that call at once.
const CALLERS: u8 = 8;
/// Keys, each with a limit.
const KEYS: u64 = 4_000;
const LIMIT: &str = "limit";

/// A limit that is never used up.
fn limit() -> RateLimit {
    let requests = 1_000_000;
    RateLimit { name: LIMIT.into(), requests, window_s: 1, burst: requests, shared: true, per: Per::Key }
}

/// One caller in place of an Envoy, and what it holds of its pools.
struct Caller {
    connection: Connection,
    reporter: ReporterId,
    sync_key: Secret,
    contact: Contact,
    pools: Vec<(PoolId, Holding)>,
}

impl Caller {
    async fn open(stack: &Stack, number: u8, keys: &[Uuid]) -> Result<Self> {
        let pool = |key: &Uuid| PoolId { kind: Kind::Rate, subject: KeyId(key.into_bytes()).into(), tag: tag(LIMIT) };
        Ok(Self {
            connection: Connection::open(stack.control_plane.address()).await?,
            reporter: ReporterId([number; 16]),
            sync_key: stack.control_plane.settings().sync_key,
            contact: Contact::default(),
            pools: keys.iter().map(|key| (pool(key), Holding::default())).collect(),
        })
    }

    /// Spends a token of each pool, asks for one more, and notes the answer. Returns how many grants it has.
    async fn call(&mut self) -> Result<usize> {
        let rate = Rate::of(&limit());
        let (sent_ns, mut asks) = (now_ns()?, Vec::with_capacity(self.pools.len()));
        for (pool, holding) in &mut self.pools {
            // Without a token, the request waits for the answer.
            let _ = holding.spend(1, Limited::Rate(&rate), 0, &self.contact, sent_ns);
            asks.push(holding.ask(Due { pool: *pool, need: 1, least: 1, is_unused: false }, &self.contact, sent_ns));
        }
        let before: Vec<u64> = asks.iter().map(|ask| ask.granted).collect();
        let body = Call { reporter: self.reporter, is_last: false, asks }.write()?;
        let request = axum::http::Request::post("/sync/v1/allowances").header("x-api-key", self.sync_key.reveal());
        let reply = self.connection.send(request.body(body.into())?).await?;
        ensure!(reply.status == 200, "a call was answered with {}: {:?}", reply.status, reply.body);
        let answer = Answer::read(&reply.body)?;
        ensure!(answer.grants.len() == self.pools.len(), "{} grants", answer.grants.len());
        let sent_ms = sent_ns / 1_000_000;
        self.contact.answered(sent_ms, now_ns()? / 1_000_000, answer.live, answer.alone_ms);
        for ((_, holding), grant) in self.pools.iter_mut().zip(&answer.grants) {
            holding.apply(grant, &self.contact, sent_ms);
        }
        Ok(answer.grants.iter().zip(before).filter(|(grant, before)| grant.granted > *before).count())
    }
}

fn now_ns() -> Result<u64> {
    Ok(u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos())?)
}

/// All callers call again and again for a while.
async fn call_all(callers: Vec<Caller>, lasts: Duration) -> Result<(Vec<Caller>, usize)> {
    let (mut running, start) = (JoinSet::new(), Instant::now());
    for mut caller in callers {
        running.spawn(async move {
            let mut grants = 0;
            while start.elapsed() < lasts {
                grants += caller.call().await?;
            }
            anyhow::Ok((caller, grants))
        });
    }
    let (mut callers, mut grants) = (Vec::new(), 0);
    while let Some(done) = running.join_next().await {
        let (caller, of_caller) = done??;
        callers.push(caller);
        grants += of_caller;
    }
    Ok((callers, grants))
}

pub(crate) async fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let stack = store::start(0).await?;
    stack.insert_keys(KEYS).await?;
    let limits = format!(
        r#"[{{"name": "{LIMIT}", "requests": 1000000, "window_s": 1, "burst": 1000000, "shared": true, "per": "key"}}]"#
    );
    stack.database.execute(&format!("update api_keys set rate_limits = '{limits}'")).await?;
    stack.database.execute("analyze").await?;
    let mut connection = stack.database.connect().await?;
    let ids: Vec<Uuid> = sqlx::query_scalar("select id from api_keys order by id").fetch_all(&mut connection).await?;
    let postmaster = store::postmaster(&stack).await?;
    let (rounds, lasts) = if options.quick { (2, 500) } else { (8, 1_500) };
    let lasts = Duration::from_millis(lasts);
    for pools in [1, 20, 400] {
        let mut callers = Vec::new();
        for number in 0..CALLERS {
            let keys = ids.chunks(pools).nth(number.into()).context("too few keys")?;
            callers.push(Caller::open(&stack, number, keys).await?);
        }
        // The first caller may decide by itself for a short time. Until it no longer does, the control plane grants the others
        // nothing.
        (callers, _) = call_all(callers, Duration::from_secs(1)).await?;
        // Seconds for each grant.
        let (mut times, mut control_plane, mut both) = (Samples::default(), Samples::default(), Samples::default());
        for round in 1..=rounds {
            progress(&format!("suite limits: {pools} pools in a call, round {round} of {rounds}"));
            let (before, start) = (Used::read(&stack, postmaster)?, Instant::now());
            let grants;
            (callers, grants) = call_all(callers, lasts).await?;
            ensure!(grants > 0, "nothing was granted");
            let (of_control_plane, of_database) = Used::read(&stack, postmaster)?.since(&before);
            times.push(start.elapsed().as_secs_f64() / grants as f64);
            control_plane.push(of_control_plane / grants as f64);
            both.push((of_control_plane + of_database) / grants as f64);
        }
        let rate = |times: &Samples| Estimate::of([times], |[time]| 1.0 / time);
        let name = format!("{pools} pools in a call").replace("1 pools", "1 pool");
        report.figure(GRANTS, name.as_str(), "grants/s", rate(&times));
        report.figure(BY_CORE, format!("{name}, control plane alone"), "grants/s", rate(&control_plane));
        report.figure(BY_CORE, format!("{name}, with PostgreSQL"), "grants/s", rate(&both));
    }
    Ok(())
}
