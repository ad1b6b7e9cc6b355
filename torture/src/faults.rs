//! The faults, and the disruption that each one excuses: for how long the oracle accepts late
//! changes or failed requests, and how many requests may go uncounted. When a fault returns,
//! everything runs again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hyper::Method;
use portcullis_harness::dice::Dice;
use portcullis_harness::http;
use portcullis_harness::postgres::Database;
use portcullis_harness::process::Signal;
use portcullis_harness::wait::{eventually, eventually_within};

use crate::count::usage;
use crate::driver::Driver;
use crate::envoy_model::{BOUND, Hinders};
use crate::oracle::{Disruptions, Oracle};
use crate::plan::{Kind, Step};
use crate::proxy::Manipulation;
use crate::stack::TortureStack;
use crate::watch::Doing;

/// Recovery of an Envoy after repeated failures: its longest back-off before it tries a control plane again, and a margin.
const BACKOFF: Duration = Duration::from_secs(6);

/// Recovery after one failure: it tries again within a quarter of a second.
const ONE_FAILURE: Duration = Duration::from_secs(1);

/// Recovery of a control plane's feed of changes after its connections to PostgreSQL were cut.
const FEED: Duration = Duration::from_secs(3);

/// How long Envoy takes to detect a paused control plane: the keep-alive of its connection, 5 s and 3 s.
const KEEP_ALIVE: Duration = Duration::from_secs(8);

/// How long another VM takes to become the leader: the term of the last leader, and a tick or two.
const TERM: Duration = Duration::from_secs(4);

/// How long connections of an old listener are drained, and how long Envoy takes to replace a VM that trapped.
const SETTLE: Duration = Duration::from_secs(3);

/// How much later than a decision the gauge of pending usage contains it: a tick of the worker and one of the leader, 250 ms
/// each. The margin allows for late ticks on a busy machine.
const GAUGE_DELAY: Duration = Duration::from_secs(2);

/// What a trap may lose: one merge interval of one worker, 250 ms. The margin allows for a late tick on a busy machine.
/// Clients cannot distinguish workers, so all recent decisions of the Envoy may be lost.
const MERGE: Duration = Duration::from_secs(1);

/// Recovery of calls for allowances: each worker calls again on its next tick, 250 ms. The margin allows for calls that meet a
/// connection to PostgreSQL that was cut, and for late ticks on a busy machine.
const ALLOWANCES: Duration = Duration::from_secs(2);

/// How long an Envoy that was started may get no allowances, because another one still decides by itself: 0.75 s. The margin
/// allows for a busy machine.
const ALONE: Duration = Duration::from_secs(2);

/// How long what a killed Envoy holds is reserved: 60 s from its last call. The margin allows for a busy machine.
const HELD: Duration = Duration::from_secs(62);

/// Longest time in which disruptions follow on each other without a gap.
const LONGEST_DISRUPTIONS: Duration = Duration::from_secs(90);

#[derive(Clone, Debug)]
pub struct Faults {
    pub stack: Arc<TortureStack>,
    /// Learns of disruptions.
    pub oracle: Arc<Oracle>,
    /// Pauses while the database is restored.
    pub driver: Arc<Driver>,
    /// State for the watch.
    pub doing: Arc<Doing>,
    /// Whether the last Envoy and the last control plane never end, so that their memory can be compared.
    pub spare: bool,
    /// Whether there is time for long faults.
    pub long: bool,
    /// VMs that were trapped.
    pub traps: Arc<AtomicU64>,
}

impl Faults {
    /// Injects one fault and waits until it is over. Fails if the stack does not recover.
    pub async fn inject(&self, step: &Step) -> Result<()> {
        let spared = usize::from(self.spare);
        let (envoys, control_planes) = (self.stack.envoys.len(), self.stack.control_planes.len());
        let (envoy, control_plane) = (step.target % envoys, step.target % control_planes);
        let mortal_envoy = step.target % envoys.saturating_sub(spared).max(1);
        let mortal_control_plane = step.target % control_planes.saturating_sub(spared).max(1);
        match step.kind {
            Kind::ControlPlaneKill => self.end_control_plane(mortal_control_plane, Signal::SIGKILL, step).await,
            Kind::ControlPlaneTerm => self.end_control_plane(mortal_control_plane, Signal::SIGTERM, step).await,
            Kind::ControlPlanePause => self.pause_control_plane(control_plane, self.standstill(step.lasts)).await,
            Kind::ControlPlaneClock => self.control_plane_clock(control_plane, step).await,
            Kind::AnswerLost => self.manipulate(envoy, Manipulation::LoseAcknowledgements, step.lasts).await,
            Kind::AnswerCut => self.manipulate(envoy, Manipulation::CutUpdates, step.lasts).await,
            Kind::AnswerGarbage => self.manipulate(envoy, Manipulation::Corrupt, step.lasts).await,
            Kind::AnswerDelayed => self.delay(envoy, step).await,
            Kind::PostgresCrash => self.crash_postgres(step.lasts / 2).await,
            Kind::PostgresCut => self.cut_postgres().await,
            Kind::PostgresLock => self.lock_postgres(step.lasts + Duration::from_secs(2)).await,
            Kind::PostgresRestore => self.restore(step.lasts).await,
            Kind::EnvoyTerm => self.end_envoy(mortal_envoy, Signal::SIGTERM, false).await,
            Kind::EnvoyKill => self.end_envoy(mortal_envoy, Signal::SIGKILL, false).await,
            Kind::EnvoyDrain => self.end_envoy(mortal_envoy, Signal::SIGTERM, true).await,
            Kind::EnvoyTrap => self.trap(envoy).await,
            Kind::EnvoyUpdate => self.update(envoy, step.dice).await,
            Kind::EnvoyClock => self.envoy_clock(envoy, step).await,
        }
    }

    /// Begins a disruption of Envoys that control planes do not answer, with the times of recovery of changes and of allowances.
    fn hinder(&self, envoys: &[usize], changes: Duration, allowances: Duration) -> [Disruptions; 2] {
        let begin = |hinders, after| self.oracle.begin(hinders, envoys, after);
        [begin(Hinders::Changes, changes), begin(Hinders::Allowances, allowances)]
    }

    fn end(&self, disruptions: &[Disruptions]) {
        disruptions.iter().for_each(|disruptions| self.oracle.end(disruptions));
    }

    /// The others serve meanwhile. In one of four cases, unless some are spared, all end.
    async fn end_control_plane(&self, number: usize, signal: Signal, step: &Step) -> Result<()> {
        let everywhere = self.stack.everywhere();
        let all = step.dice.is_multiple_of(4) && !self.spare;
        let chosen: Vec<usize> = if all { (0..self.stack.control_planes.len()).collect() } else { vec![number] };
        let mut disruptions =
            vec![self.oracle.begin(Hinders::Changes, &everywhere, if all { BACKOFF } else { ONE_FAILURE })];
        // One of several that ends answers first what it was asked.
        if all || signal == Signal::SIGKILL {
            disruptions.push(self.oracle.begin(Hinders::Allowances, &everywhere, ALLOWANCES));
        }
        for number in &chosen {
            self.stack.control_planes.get(*number).context("no such control plane")?.stop(signal).await?;
        }
        if !all {
            self.end(&disruptions);
        }
        tokio::time::sleep(step.lasts / 2).await;
        for number in &chosen {
            self.stack.control_planes.get(*number).context("no such control plane")?.restart().await?;
        }
        if all {
            self.end(&disruptions);
        }
        Ok(())
    }

    /// Long enough for Envoys to notice. In a long run, the control plane is still paused when Envoys must have found another
    /// and obey.
    fn standstill(&self, lasts: Duration) -> Duration {
        if self.long { KEEP_ALIVE + BACKOFF + BOUND + lasts } else { KEEP_ALIVE + Duration::from_secs(1) }
    }

    /// How long an Envoy that reconnects may take to receive changes: longer if a control plane is paused.
    fn after(&self, usual: Duration) -> Duration {
        if self.doing.standing_still.load(Ordering::SeqCst) { usual + KEEP_ALIVE } else { usual }
    }

    async fn pause_control_plane(&self, number: usize, lasts: Duration) -> Result<()> {
        let control_plane = self.stack.control_planes.get(number).context("no such control plane")?;
        let disruptions = self.hinder(&self.stack.everywhere(), BACKOFF, ALLOWANCES);
        let avoid = |backend| self.stack.proxies.iter().for_each(|proxy| proxy.avoid(backend));
        self.doing.standing_still.store(true, Ordering::SeqCst);
        avoid(Some(number));
        control_plane.signal(Signal::SIGSTOP)?;
        // The disruption ends when Envoys notice and find another control plane, even if the pause lasts longer.
        tokio::time::sleep(lasts.min(KEEP_ALIVE)).await;
        self.end(&disruptions);
        tokio::time::sleep(lasts.saturating_sub(KEEP_ALIVE)).await;
        self.doing.standing_still.store(false, Ordering::SeqCst);
        let resumed = control_plane.signal(Signal::SIGCONT);
        avoid(None);
        resumed
    }

    async fn control_plane_clock(&self, number: usize, step: &Step) -> Result<()> {
        let clock = self.stack.control_plane_clocks.get(number).context("no such clock")?;
        clock.shift(minutes(step.dice))?;
        tokio::time::sleep(step.lasts).await;
        clock.shift(0)
    }

    async fn manipulate(&self, envoy: usize, manipulation: Manipulation, lasts: Duration) -> Result<()> {
        let proxy = self.stack.proxies.get(envoy).context("no such proxy")?;
        let disruptions = self.hinder(&[envoy], BACKOFF, ALLOWANCES);
        let before = proxy.manipulated();
        proxy.set_manipulation(Some(manipulation));
        tokio::time::sleep(lasts).await;
        let happened = async || (proxy.manipulated() > before).then_some(());
        let waited =
            eventually_within(&format!("a response to manipulate: {manipulation:?}"), KEEP_ALIVE * 4, happened).await;
        proxy.set_manipulation(None);
        self.end(&disruptions);
        waited
    }

    async fn delay(&self, envoy: usize, step: &Step) -> Result<()> {
        let proxy = self.stack.proxies.get(envoy).context("no such proxy")?;
        let delay = Duration::from_millis(200 + step.dice % 1_300);
        // Delayed frames delay those behind them.
        let disruptions = self.hinder(&[envoy], BACKOFF + delay, ALLOWANCES + delay);
        proxy.set_delay(delay);
        tokio::time::sleep(step.lasts).await;
        proxy.set_delay(Duration::ZERO);
        self.end(&disruptions);
        Ok(())
    }

    async fn crash_postgres(&self, lasts: Duration) -> Result<()> {
        let disruptions = self.hinder(&self.stack.everywhere(), FEED, ALLOWANCES);
        self.stack.postgres.stop(Signal::SIGQUIT).await?;
        tokio::time::sleep(lasts).await;
        self.stack.postgres.start().await?;
        self.end(&disruptions);
        Ok(())
    }

    async fn cut_postgres(&self) -> Result<()> {
        let disruptions = self.hinder(&self.stack.everywhere(), FEED, ALLOWANCES);
        let cut = self.server().execute(&cut_off(&self.database_name()?)).await;
        self.end(&disruptions);
        cut.map(|_| ())
    }

    /// For longer than changes wait for a lock, so that the API asks for a retry. Calls for allowances may have to wait, too.
    async fn lock_postgres(&self, lasts: Duration) -> Result<()> {
        let seconds = lasts.as_secs_f64();
        let lock = format!(
            "begin; select revision from store_state for update; lock table usage_hourly in share mode;
            select 1 from (select id from api_keys for update) locked limit 1; select pg_sleep({seconds}); commit"
        );
        let disruptions = self.oracle.begin(Hinders::Allowances, &self.stack.everywhere(), ALLOWANCES);
        let locked = self.stack.database.execute(&lock).await;
        self.oracle.end(&disruptions);
        locked.map(|_| ())
    }

    /// Copies the database, waits while changes continue, and then replaces the original by the copy.
    async fn restore(&self, lasts: Duration) -> Result<()> {
        let name = self.database_name()?;
        let (copy, gone) = (format!("{name}_copy"), format!("{name}_gone"));
        let everywhere = self.stack.everywhere();
        let server = self.server();
        let over = async || (!self.doing.between_epochs()).then_some(());
        eventually_within("the last restore to be over", LONGEST_DISRUPTIONS, over).await?;
        server.execute(&format!("drop database if exists {gone} with (force)")).await?;

        let book = self.driver.hold().await;
        let (keys, then) = (self.oracle.snapshot(), book.clone());
        let disruptions = self.hinder(&everywhere, FEED, ALLOWANCES);
        self.close(&name).await?;
        let copied = server.execute(&format!("create database {copy} template {name}")).await;
        server.execute(&format!("alter database {name} allow_connections true")).await?;
        self.end(&disruptions);
        copied?;
        // PostgreSQL copies a sequence with the numbers that its log reserves in advance. Without a checkpoint, a crash would
        // set the sequence back in the copy.
        server.execute("checkpoint").await?;
        drop(book);
        tokio::time::sleep(lasts).await;

        let mut book = self.driver.hold().await;
        let disruptions = self.hinder(&everywhere, FEED + BACKOFF, ALLOWANCES);
        self.doing.epochs.fetch_add(1, Ordering::SeqCst);
        self.oracle.doubt_all();
        self.close(&name).await?;
        server.execute(&format!("alter database {name} rename to {gone}")).await?;
        // Counts that only the replaced database had are lost.
        server.execute(&format!("alter database {gone} allow_connections true")).await?;
        let before = usage(&mut Database { url: self.stack.postgres.url(&copy) }.connect().await?).await?;
        let after = usage(&mut Database { url: self.stack.postgres.url(&gone) }.connect().await?).await?;
        server.execute(&cut_off(&copy)).await?;
        eventually("the copy to be free", async || {
            server.execute(&format!("alter database {copy} rename to {name}")).await.ok()
        })
        .await?;
        self.oracle.go_back(&keys);
        *book = then;
        self.oracle.restored(&before.lost_of(&after));
        let rest = self.stack.rest(0)?;
        let answers = async || rest.call(Method::GET, "/v1/keys?limit=1", None).await.ok().filter(|r| r.status == 200);
        eventually("the REST API to find the restored database", answers).await?;
        self.end(&disruptions);
        drop(book);
        self.end_epoch_change();
        Ok(())
    }

    /// Waits in the background until every Envoy must have the new epoch, while other faults go on. From then on, versions
    /// must not go back.
    fn end_epoch_change(&self) {
        let (doing, oracle, restored) = (Arc::clone(&self.doing), Arc::clone(&self.oracle), Instant::now());
        tokio::spawn(async move {
            // Faults that begin meanwhile extend the deadline. While one lasts, there is none.
            loop {
                match oracle.all_obey_by(restored) {
                    Some(by) if by <= Instant::now() => break,
                    Some(by) => tokio::time::sleep_until(by.into()).await,
                    None => tokio::time::sleep(Duration::from_millis(200)).await,
                }
            }
            doing.epochs.fetch_add(1, Ordering::SeqCst);
        });
    }

    /// Ends all connections to a database and refuses new ones.
    async fn close(&self, name: &str) -> Result<()> {
        let server = self.server();
        server.execute(&format!("alter database {name} allow_connections false")).await?;
        server.execute(&cut_off(name)).await?;
        let connected = format!("select count(*) from pg_stat_activity where datname = '{name}'");
        eventually("all connections to have ended", async || (server.number(&connected).await.ok()? == 0).then_some(()))
            .await
    }

    fn server(&self) -> Database {
        Database { url: self.stack.postgres.url("postgres") }
    }

    fn database_name(&self) -> Result<String> {
        let url = self.stack.database.url.split('?').next().unwrap_or_default();
        Ok(url.rsplit('/').next().context("the database has no name")?.to_owned())
    }

    async fn end_envoy(&self, number: usize, signal: Signal, drained: bool) -> Result<()> {
        let envoy = self.stack.envoys.get(number).context("no such Envoy")?;
        let requests = self.oracle.begin(Hinders::Requests, &[number], ONE_FAILURE);
        let changes = self.hinder(&[number], self.after(BACKOFF), ALONE);
        if drained {
            let drain = hyper::Request::post("/drain_listeners?graceful").body(http_body_util::Full::default())?;
            let reply = http::send(envoy.admin(), drain).await?;
            ensure!(reply.status == 200, "drain: {reply:?}");
            // As --drain-time-s.
            tokio::time::sleep(Duration::from_millis(1_200)).await;
        }
        if signal == Signal::SIGKILL {
            let reported = async || self.stack.stat(number, "usage.pending_requests").await;
            let pending = eventually("an Envoy to report pending usage", reported).await?;
            // After it, so that no decision falls between the two.
            self.stop(number, signal).await?;
            let recent = self.oracle.decided_within(number, GAUGE_DELAY);
            self.oracle.may_lose("not acknowledged when Envoy was killed", pending + recent);
            self.oracle.lose_uncounted(number, GAUGE_DELAY);
            self.oracle.hold(number, HELD);
        } else {
            self.stop(number, signal).await?;
        }
        envoy.restart().await?;
        self.oracle.end(&requests);
        self.end(&changes);
        Ok(())
    }

    async fn stop(&self, number: usize, signal: Signal) -> Result<()> {
        self.raise(number);
        let stopped = self.stack.envoys.get(number).context("no such Envoy")?.stop(signal).await;
        self.oracle.unready(number);
        self.raise(number);
        stopped.map(|_| ())
    }

    fn raise(&self, envoy: usize) {
        if let Some(life) = self.doing.envoys.get(envoy) {
            life.fetch_add(1, Ordering::SeqCst);
        }
    }

    async fn trap(&self, number: usize) -> Result<()> {
        let envoy = self.stack.envoys.get(number).context("no such Envoy")?;
        let disruptions = self.oracle.begin(Hinders::Requests, &[number], SETTLE);
        let changes = self.oracle.begin(Hinders::Changes, &[number], self.after(TERM));
        let request = hyper::Request::get("/").header("x-portcullis-trap", "1").body(http_body_util::Full::default())?;
        let reply = http::send(envoy.address(), request).await;
        let recent = self.oracle.decided_within(number, MERGE);
        self.traps.fetch_add(1, Ordering::Relaxed);
        self.oracle.may_lose("one merge interval of a worker whose VM trapped", recent);
        self.oracle.lose_uncounted(number, MERGE);
        self.oracle.end(&disruptions);
        self.oracle.end(&changes);
        ensure!(reply.as_ref().map_or(true, |reply| reply.status != 200), "a request that traps was let through");
        Ok(())
    }

    /// Changes the realm in the plugin configuration, which clients see in the challenge.
    async fn update(&self, number: usize, dice: u64) -> Result<()> {
        let envoy = self.stack.envoys.get(number).context("no such Envoy")?;
        let requests = self.oracle.begin(Hinders::Requests, &[number], SETTLE);
        let changes = self.oracle.begin(Hinders::Changes, &[number], self.after(TERM));
        let realm = format!("torture {dice:x}");
        envoy.change_settings(|settings| {
            settings.replacements.plugin.insert("realm".into(), realm.clone().into());
        });
        envoy.update_listener()?;
        let applied = async || {
            let reply = http::send(envoy.address(), http::get_request("/", None).ok()?).await;
            let decided = u64::from(reply.is_ok());
            self.oracle.probed(decided, 1 - decided);
            let reply = reply.ok()?;
            reply.header("www-authenticate").filter(|challenge| challenge.contains(&realm)).map(|_| ())
        };
        let waited = eventually("Envoy to apply the new configuration", applied).await;
        self.oracle.end(&requests);
        self.oracle.end(&changes);
        waited
    }

    /// Shifts the clock by minutes, and back. One of the two is a step backwards.
    async fn envoy_clock(&self, number: usize, step: &Step) -> Result<()> {
        let clock = self.stack.envoy_clocks.get(number).context("no such clock")?;
        let shift = minutes(step.dice);
        let off = Duration::from_secs(shift.unsigned_abs());
        let (behind, ahead) = if shift < 0 { (off, Duration::ZERO) } else { (Duration::ZERO, off) };
        self.oracle.clock(number, behind, ahead);
        for shift in [shift, 0] {
            // The step may end the term of the leader.
            let disruptions = self.oracle.begin(Hinders::Changes, &[number], self.after(TERM));
            clock.shift(shift)?;
            self.oracle.end(&disruptions);
            tokio::time::sleep(step.lasts).await;
        }
        // Requests that were decided by the old time have their response.
        self.oracle.clock(number, Duration::ZERO, Duration::ZERO);
        Ok(())
    }
}

fn cut_off(database: &str) -> String {
    format!(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = '{database}' and pid <> pg_backend_pid()"
    )
}

/// One to five minutes, ahead or behind, in seconds.
fn minutes(dice: u64) -> i64 {
    let mut dice = Dice::new(dice);
    let seconds = 60 + i64::try_from(dice.below(240)).unwrap_or_default();
    if dice.below(2) == 0 { seconds } else { -seconds }
}
