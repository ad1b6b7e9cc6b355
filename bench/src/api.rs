//! Suite `api`: how fast keys are created, read and revoked, through the REST API by a load
//! generator, and as the same statements by pgbench. In each round both run one after the other, in
//! random order.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use portcullis_harness::cargo::read;
use portcullis_harness::output::progress;
use portcullis_harness::process::Signal;
use portcullis_harness::stack::Stack;
use portcullis_harness::tools;
use serde_json::json;
use tempfile::TempDir;

use crate::Options;
use crate::load::{Calls, Generator, Took, What};
use crate::report::{Bound, Report};
use crate::statements::Statements;
use crate::stats::{Estimate, Random, Samples};
use crate::store::{self, Used};

const SUITE: &str = "api: REST, eight calls at once";
const AT_ONCE: usize = 8;
/// Owners of whom each creation takes one by lot.
const OWNERS: usize = 20_000;

/// What is asked for, with the statements that it comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Create,
    Get,
    Revoke,
}

impl Verb {
    const ALL: [Self; 3] = [Self::Create, Self::Get, Self::Revoke];

    const fn method(self) -> &'static str {
        match self {
            Self::Create => "POST",
            Self::Get => "GET",
            Self::Revoke => "DELETE",
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Get => "get",
            Self::Revoke => "revoke",
        }
    }

    /// A script of all that the control plane asks of the database for one call. What it needs to know of a key it makes of
    /// the key's number, as [`made`] does, so that it asks nothing else. Each transaction takes a key that no other takes.
    fn script(self, all: &Statements) -> Result<String> {
        const KEY: &str = "md5(:batch::text || '-' || :n::text)::uuid";
        const OWNER: &str = "'made-' || :batch::text || '-' || :n::text || '@example.com'";
        let next = format!("\\set turn :turn + 1\n\\set n (:turn - 1) * {AT_ONCE} + :client_id + 1\n");
        let caller = all.with(&["select k.id, k.owner_id, s.generation"], &["decode(:admin, 'hex')"])?;
        let noted = |key: &str| {
            let parts = ["insert into audit (", "action, key_id, target, detail)", "values ("];
            let note = ["null", "'a@example.com'", "'127.0.0.1'", "null", "'key.bench'", key, "null", "'{}'"];
            all.with(&parts, &note)
        };
        let shown = |key: &str| all.with(&["select k.id as \"id!\", k.networks", "where k.id = $1"], &[key]);
        let one = |key: &str| all.with(&["select k.id, k.owner_id, p.email", "where k.id = $1"], &[key]);
        let lines = match self {
            Self::Create => {
                let owner = "'pgbench-' || :n::text || '@example.com'";
                let id = "md5(:n::text)::uuid";
                let hash = "sha256(convert_to(:n::text || random()::text, 'UTF8'))";
                let key = [id, ":id", "'Bench'", hash, "'sk_abc123'", "'{}'", "'[]'", "null"];
                let user = ["insert into user_preferences (id, email)", "returning id, primary_key_id"];
                let into = ["insert into api_keys (id, owner_id, name, hash", "values ("];
                [
                    "\\set n random(1, 1000000000000)\n".into(),
                    caller + ";\nbegin;\n",
                    all.with(&user, &["gen_random_uuid()", owner])? + " \\gset\n",
                    noted(id)? + ";\n",
                    all.with(&into, &key)? + ";\ncommit;\n",
                ]
                .concat()
            }
            Self::Get => [
                next,
                caller + ";\n",
                one(KEY)? + ";\n",
                all.with(&["select s.generation as \"generation!\", s.prefix"], &[KEY])? + ";\n",
                all.with(&["select coalesce(k.quota, d.quota) as quota, k.quota_exceeded"], &[KEY])? + ";\n",
                all.with(&["select p.id as owner_id, p.balance"], &[OWNER])? + ";\n",
                shown(KEY)? + ";\n",
                all.with(&["from retired_secrets where key_id = k.id"], &[KEY])? + ";\n",
                all.with(&["select s.epoch, f.filters"], &["0", "'60 s'", "'24 h'"])? + ";\n",
            ]
            .concat(),
            Self::Revoke => [
                next,
                caller + ";\nbegin;\n",
                one(KEY)? + ";\n",
                all.with(&["select one from store_state for no key update"], &[])? + ";\n",
                one(KEY)? + ";\n",
                all.with(&["select scopes, revoked_at is not null as \"revoked!\""], &[KEY])? + ";\n",
                all.with(&["update api_keys set revoked_at = now() where id = $1"], &[KEY])? + ";\n",
                noted(KEY)? + ";\ncommit;\n",
            ]
            .concat(),
        };
        Ok(lines)
    }
}

/// Measures.
pub(crate) async fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let (target, bound) = ("key creation ÷ pgbench of the same statements", Bound::AtLeast(0.7));
    let Some(pgbench) = pgbench()? else {
        report.target(target, bound, "", None);
        report.note(
            "Suite api: left out, for there is no pgbench: install it (Debian: postgresql-contrib or postgresql-15).",
        );
        return Ok(());
    };
    let generators = Generators { without_body: Generator::install()?, with_body: Generator::oha() };
    let stack = store::start(0).await?;
    let home = TempDir::with_prefix("portcullis-bench-")?;
    let statements = Statements::read()?;
    let (rounds, number) = if options.quick { (2, 1_000) } else { (12, 1_200) };
    let mut random = Random::new(5);
    let mut bench = Bench { postmaster: store::postmaster(&stack).await?, stack, number, batch: 0 };
    for verb in Verb::ALL {
        let generator = match generators.of(verb) {
            Ok(generator) => generator,
            Err(why) => {
                report.note(format!("Suite api: {} left out: {why}", verb.name()));
                if verb == Verb::Create {
                    report.target(target, bound, "", None);
                }
                continue;
            }
        };
        let script = home.path().join(format!("{}.sql", verb.name()));
        std::fs::write(&script, verb.script(&statements)?)?;
        let (mut ours, mut theirs) = (Measured::default(), Measured::default());
        // One round before those that count: connections and caches are cold.
        for round in 0..=rounds {
            progress(&format!("suite api: {}, round {round} of {rounds}", verb.name()));
            let mut sides = [Side::Ours, Side::Theirs];
            random.shuffle(&mut sides);
            for side in sides {
                let found = match side {
                    Side::Ours => bench.call(verb, generator).await?,
                    Side::Theirs => bench.by_pgbench(verb, &pgbench, &script).await?,
                };
                if round > 0 {
                    match side {
                        Side::Ours => ours.push(&found),
                        Side::Theirs => theirs.push(&found),
                    }
                }
            }
        }
        let rate = |times: &Samples| Estimate::of([times], |[time]| 1.0 / time);
        let plain = |samples: &Samples| Estimate::of([samples], |[value]| value);
        let ratio = Estimate::by_the_round(&theirs.seconds, &ours.seconds);
        let (by_us, by_pgbench) =
            (format!("Portcullis, {}", verb.name()), format!("pgbench, the statements of {}", verb.name()));
        report.figure(SUITE, by_pgbench.as_str(), "1/s", rate(&theirs.seconds));
        report.compared(SUITE, by_us.as_str(), "1/s", rate(&ours.seconds), Some((ratio, "pgbench")));
        // Of the rounds' the median: their lower quartile would be no p99.
        let p99 = |samples: &Samples| Estimate::at(samples, 0.5);
        report.figure(SUITE, format!("{by_pgbench}, p99"), "ms", p99(&theirs.p99_ms));
        let longer = Estimate::by_the_round(&ours.p99_ms, &theirs.p99_ms);
        report.compared(SUITE, format!("{by_us}, p99"), "ms", p99(&ours.p99_ms), Some((longer, "pgbench")));
        report.figure(
            SUITE,
            format!("{by_pgbench}, PostgreSQL's CPU (with connecting)"),
            "µs",
            plain(&theirs.database_us),
        );
        let more = Estimate::by_the_round(&ours.database_us, &theirs.database_us);
        let database = format!("{by_us}, PostgreSQL's CPU");
        report.compared(SUITE, database, "µs", plain(&ours.database_us), Some((more, "pgbench")));
        report.figure(SUITE, format!("{by_us}, the control plane's CPU"), "µs", plain(&ours.control_plane_us));
        if verb == Verb::Create {
            report.target(target, bound, "", ratio);
        }
    }
    Ok(())
}

/// Who makes the calls.
struct Generators {
    without_body: Generator,
    with_body: Result<Generator>,
}

impl Generators {
    fn of(&self, verb: Verb) -> Result<&Generator, String> {
        match (verb, &self.without_body) {
            (Verb::Create, _) => self.with_body.as_ref().map_err(|error| format!("there is no oha: {error:#}")),
            (_, Generator::Oha { .. }) => Err("it takes h2load, since oha does not ask for each key once".into()),
            (_, h2load) => Ok(h2load),
        }
    }
}

/// Which of the two is measured.
#[derive(Clone, Copy, Debug)]
enum Side {
    Ours,
    Theirs,
}

/// What one round took.
struct Found {
    /// How long all calls took together, by call.
    seconds: f64,
    p99_ms: f64,
    /// Of the processor, by call.
    control_plane_us: f64,
    database_us: f64,
}

/// What the rounds took, a sample each.
#[derive(Default)]
struct Measured {
    seconds: Samples,
    p99_ms: Samples,
    control_plane_us: Samples,
    database_us: Samples,
}

impl Measured {
    fn push(&mut self, found: &Found) {
        self.seconds.push(found.seconds);
        self.p99_ms.push(found.p99_ms);
        self.control_plane_us.push(found.control_plane_us);
        self.database_us.push(found.database_us);
    }
}

/// The stack, and how far the batches are counted.
struct Bench {
    stack: Stack,
    postmaster: u32,
    /// Calls in a round.
    number: usize,
    batch: u32,
}

impl Bench {
    /// Makes a batch of keys, if a call is of one that is there, and gives their ids.
    async fn prepare(&mut self, verb: Verb) -> Result<Vec<String>> {
        self.batch += 1;
        let ids = if verb == Verb::Create { Vec::new() } else { made(&self.stack, self.batch, self.number).await? };
        settled(&self.stack).await?;
        Ok(ids)
    }

    fn found(&self, seconds: f64, p99_ms: f64, before: &Used) -> Result<Found> {
        let (control_plane_s, database_s) = Used::read(&self.stack, self.postmaster)?.since(before);
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        let by_call = 1e6 / self.number as f64;
        let (control_plane_us, database_us) = (control_plane_s * by_call, database_s * by_call);
        Ok(Found { seconds, p99_ms, control_plane_us, database_us })
    }

    /// Through the REST API.
    async fn call(&mut self, verb: Verb, generator: &Generator) -> Result<Found> {
        let ids = self.prepare(verb).await?;
        let keys = format!("http://{}/v1/keys", self.stack.control_plane.address());
        let what = if verb == Verb::Create {
            let batch = self.batch;
            let body = |n| json!({"email": format!("rest-{batch}-{n}@example.com"), "name": "Bench"}).to_string();
            What::Bodies(keys, (0..OWNERS).map(body).collect())
        } else {
            What::Addresses(ids.iter().map(|id| format!("{keys}/{id}")).collect())
        };
        let key = self.stack.control_plane.settings().admin_key.reveal().to_owned();
        let calls = Calls { method: verb.method(), key, in_flight: AT_ONCE, number: self.number, what };
        let before = Used::read(&self.stack, self.postmaster)?;
        let Took { seconds, p99_ms } = generator.call(&calls).await?;
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        let seconds = seconds / self.number as f64;
        self.found(seconds, p99_ms, &before)
    }

    /// The same by pgbench.
    async fn by_pgbench(&mut self, verb: Verb, pgbench: &Path, script: &Path) -> Result<Found> {
        self.prepare(verb).await?;
        // Awake, the control plane would read what pgbench changes.
        self.stack.control_plane.signal(Signal::SIGSTOP)?;
        let before = Used::read(&self.stack, self.postmaster)?;
        let done = by_pgbench(pgbench, &self.stack, self.batch, self.number, script);
        let found = done.and_then(|(seconds, p99_ms)| self.found(seconds, p99_ms, &before));
        self.stack.control_plane.signal(Signal::SIGCONT)?;
        let found = found?;
        settled(&self.stack).await?;
        if verb == Verb::Revoke {
            let left = left(&self.stack, self.batch).await?;
            ensure!(left == 0, "{left} of {} keys are not those that pgbench means", self.number);
        }
        Ok(found)
    }
}

/// Of the path, or beside the server's programs.
fn pgbench() -> Result<Option<PathBuf>> {
    let beside = tools::postgres(&progress)?.join("pgbench");
    Ok(Some(beside).filter(|file| file.is_file()).or_else(|| tools::on_path("pgbench")))
}

/// Makes so many keys, numbered from 1 in a batch of their own, and gives their ids.
async fn made(stack: &Stack, batch: u32, keys: usize) -> Result<Vec<String>> {
    let sql = format!(
        "with numbers as (
            select {batch} || '-' || n as number from generate_series(1, {keys}) n
        ), owners as (
            insert into user_preferences (id, email)
            select gen_random_uuid(), 'made-' || number || '@example.com' from numbers
            returning id, email
        ), keys as (
            insert into api_keys (id, owner_id, name, hash, prefix, revision)
            select md5(number)::uuid, id, 'Made', sha256(convert_to(id::text, 'UTF8')), 'sk_abc123', 0
            from numbers join owners on email = 'made-' || number || '@example.com'
            returning id
        )
        select string_agg(id::text, ' ') from keys"
    );
    Ok(stack.database.text(&sql).await?.split(' ').map(str::to_owned).collect())
}

/// Waits until the control plane has read all changes, so that one round is not slowed down by another.
async fn settled(stack: &Stack) -> Result<()> {
    let revision = stack.database.number("select revision from store_state").await?;
    #[expect(clippy::cast_precision_loss, reason = "far below where numbers are rounded")]
    store::reaches(stack, "portcullis_mirror_revision", revision as f64).await
}

/// How many keys of a batch are not revoked.
async fn left(stack: &Stack, batch: u32) -> Result<i64> {
    let sql = format!(
        "select count(*) from api_keys k join user_preferences p on p.id = k.owner_id
        where p.email like 'made-{batch}-%' and k.revoked_at is null"
    );
    stack.database.number(&sql).await
}

/// Has pgbench run a script, on the keys of a batch; gives the seconds by run, and the p99 in milliseconds.
fn by_pgbench(pgbench: &Path, stack: &Stack, batch: u32, calls: usize, script: &Path) -> Result<(f64, f64)> {
    let log = TempDir::with_prefix("portcullis-bench-")?;
    let each = (calls / AT_ONCE).to_string();
    let mut command = Command::new(pgbench);
    command.args(["--no-vacuum", "--protocol=prepared", "--jobs=1", "--client"]).arg(AT_ONCE.to_string());
    let hash = stack.control_plane.settings().admin_key.hash().0;
    let admin: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    command.arg(format!("--define=admin={admin}")).arg(format!("--define=batch={batch}")).arg("--define=turn=0");
    command.arg("--log").arg(format!("--log-prefix={}", log.path().join("log").display()));
    command.args(["--transactions", &each, "--file"]).arg(script).arg(&stack.database.url);
    read(command)?;
    let mut done = Vec::new();
    for file in std::fs::read_dir(log.path())? {
        for line in std::fs::read_to_string(file?.path())?.lines() {
            let transaction = Transaction::read(line);
            done.push(transaction.with_context(|| format!("pgbench logs what cannot be understood: {line}"))?);
        }
    }
    warm(&done).context("pgbench made too few transactions")
}

/// A line of pgbench's log.
struct Transaction {
    /// Of its client, from 1 on.
    number: u64,
    took_us: f64,
    ended_us: f64,
}

impl Transaction {
    /// Client, number, microseconds that it took, script, and when it ended: seconds, microseconds.
    fn read(line: &str) -> Option<Self> {
        let fields: Vec<f64> = line.split(' ').map_while(|field| field.parse().ok()).collect();
        let [_, _, took_us, _, seconds, microseconds, ..] = fields[..] else { return None };
        let number = line.split(' ').nth(1)?.parse().ok()?;
        Some(Self { number, took_us, ended_us: seconds * 1e6 + microseconds })
    }
}

/// What pgbench did once each of its clients had behind it what the control plane's connections have: five runs of each
/// statement, which PostgreSQL plans each time, and a sixth by the plan that it keeps.
fn warm(done: &[Transaction]) -> Option<(f64, f64)> {
    const COLD: u64 = 6;
    let cold = done.iter().filter(|one| one.number <= COLD).map(|one| one.ended_us).max_by(f64::total_cmp)?;
    let end = done.iter().map(|one| one.ended_us).max_by(f64::total_cmp)?;
    let rest: Vec<f64> = done.iter().filter(|one| one.ended_us > cold).map(|one| one.took_us / 1_000.0).collect();
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let seconds = (end - cold) / 1e6 / rest.len() as f64;
    seconds.is_finite().then(|| (seconds, Samples::in_groups([rest]).quantile(0.99)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_pgbench_counts_what_comes_after_the_slowest_client_is_warm() {
        let log = "0 1 9000 0 100 0\n0 6 9000 0 100 500000\n1 1 9000 0 101 0\n0 7 4000 0 101 500000\n1 6 9000 0 102 0\n\
            0 8 1000 0 102 250000\n1 7 3000 0 102 500000\n";
        let done: Vec<Transaction> = log.lines().map(|line| Transaction::read(line).unwrap()).collect();
        // Two count, of 1 and 3 ms.
        assert_eq!(warm(&done), Some((0.25, 2.98)));
        assert!(Transaction::read("0 1 skipped 0 100 0").is_none());
        assert!(warm(&done[..2]).is_none());
    }
}
