//! Suite `api`: how fast keys are created, read and revoked, through the REST API, and as the same
//! statements by pgbench. In each round both run one after the other, in
//! random order.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hyper::Method;
use portcullis_harness::cargo::read;
use portcullis_harness::dice::Dice;
use portcullis_harness::output::progress;
use portcullis_harness::process::Signal;
use portcullis_harness::stack::Stack;
use portcullis_harness::tools;
use serde_json::json;
use tempfile::TempDir;

use crate::Options;
use crate::load::{Took, call, rest_call};
use crate::report::{Bound, Report};
use crate::statements::Statements;
use crate::stats::{Estimate, Samples, Side};
use crate::store;

const SUITE: &str = "api: REST, eight calls at once";
const AT_ONCE: usize = 8;

/// The measured calls, with their statements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Create,
    Get,
    Revoke,
}

impl Verb {
    const ALL: [Self; 3] = [Self::Create, Self::Get, Self::Revoke];

    const fn method(self) -> Method {
        match self {
            Self::Create => Method::POST,
            Self::Get => Method::GET,
            Self::Revoke => Method::DELETE,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Get => "get",
            Self::Revoke => "revoke",
        }
    }

    /// A script of all statements of the control plane for one call. It computes the attributes of a key from its number, as
    /// [`insert_keys`] does, and so needs no other query. Each transaction has a key of its own.
    fn script(self, all: &Statements) -> Result<String> {
        const KEY: &str = "md5(:batch::text || '-' || :n::text)::uuid";
        const OWNER: &str = "md5('owner-' || :batch::text || '-' || :n::text)::uuid";
        let next = format!("\\set turn :turn + 1\n\\set n (:turn - 1) * {AT_ONCE} + :client_id + 1\n");
        let caller = all.with(&["select k.id, k.owner_id, s.generation"], &["decode(:admin, 'hex')"])?;
        let noted = |key: &str| {
            let parts = ["insert into audit (", "action, key_id, target, detail)", "values ("];
            let note = ["null", "'a@example.com'", "'127.0.0.1'", "null", "'key.bench'", key, "null", "'{}'"];
            all.with(&parts, &note)
        };
        let shown = |key: &str| all.with(&["from key_permissions where id = $1"], &[key]);
        let one = |key: &str| all.with(&["from keys_with_usage where id = $1"], &[key]);
        let lines = match self {
            Self::Create => {
                let owner = "'pgbench-' || :n::text || '@example.com'";
                let id = "md5(:n::text)::uuid";
                let hash = "sha256(convert_to(:n::text || random()::text, 'UTF8'))";
                let plain = [id, ":id", "'Bench'", hash, "'sk_abc123'", "'{}'", "'[]'"];
                // Neither an expiry, nor roles, a plan, networks, a quota or a cost.
                let key = [&plain[..], &["null"; 6]].concat();
                let user = ["insert into user_preferences (id, email)", "returning id, email, primary_key_id"];
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
                all.with(&["from key_quotas q", "where q.id = $1"], &[KEY])? + ";\n",
                all.with(&["select p.balance, p.credits_spent as spent"], &[OWNER])? + ";\n",
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
                all.with(&["update api_keys set revoked_at = now() where id = $1"], &[KEY])? + ";\n",
                noted(KEY)? + ";\ncommit;\n",
            ]
            .concat(),
        };
        Ok(lines)
    }
}

pub(crate) async fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let (target, bound) = ("key creation ÷ pgbench of the same statements", Bound::AtLeast(0.7));
    let Some(pgbench) = pgbench()? else {
        report.target(target, bound, "", None);
        report.note(
            "Suite api left out, since there is no pgbench: install it (Debian: postgresql-contrib or postgresql-15).",
        );
        return Ok(());
    };
    let stack = store::start(0).await?;
    let home = TempDir::with_prefix("portcullis-bench-")?;
    let statements = Statements::read()?;
    let (rounds, number) = if options.quick { (2, 1_000) } else { (12, 1_200) };
    let mut bench = Bench { stack, pgbench, number, batch: 0, random: Dice::new(5) };
    for verb in Verb::ALL {
        let script = home.path().join(format!("{}.sql", verb.name()));
        std::fs::write(&script, verb.script(&statements)?)?;
        let [ours, theirs] = bench.rounds(rounds, verb, &script).await?;
        let ratio = show(verb, &ours, &theirs, report);
        if verb == Verb::Create {
            report.target(target, bound, "", ratio);
        }
    }
    Ok(())
}

/// Adds the figures of a verb to the report. Returns the ratio of the rates.
fn show(verb: Verb, ours: &Measured, theirs: &Measured, report: &mut Report) -> Estimate {
    let rate = |times: &Samples| Estimate::of([times], |[time]| 1.0 / time);
    let ratio = Estimate::by_the_round(&theirs.seconds, &ours.seconds);
    let (by_us, by_pgbench) =
        (format!("Portcullis, {}", verb.name()), format!("pgbench, the statements of {}", verb.name()));
    report.figure(SUITE, by_pgbench.as_str(), "1/s", rate(&theirs.seconds));
    report.compared(SUITE, by_us.as_str(), "1/s", rate(&ours.seconds), Some((ratio, "pgbench")));
    // The median of the rounds: their lower quartile would be no p99.
    let p99 = |samples: &Samples| Estimate::at(samples, 0.5);
    report.figure(SUITE, format!("{by_pgbench}, p99"), "ms", p99(&theirs.p99_ms));
    let longer = Estimate::by_the_round(&ours.p99_ms, &theirs.p99_ms);
    report.compared(SUITE, format!("{by_us}, p99"), "ms", p99(&ours.p99_ms), Some((longer, "pgbench")));
    ratio
}

/// Figures of all rounds.
#[derive(Default)]
struct Measured {
    /// Time of a call.
    seconds: Samples,
    p99_ms: Samples,
}

/// The stack, and the number of batches so far.
struct Bench {
    stack: Stack,
    pgbench: PathBuf,
    /// Calls in a round.
    number: usize,
    batch: u32,
    random: Dice,
}

impl Bench {
    /// Measures both sides in rounds, each in random order. The first round does not count: connections and caches are cold.
    async fn rounds(&mut self, rounds: usize, verb: Verb, script: &Path) -> Result<[Measured; 2]> {
        let (mut ours, mut theirs) = (Measured::default(), Measured::default());
        for round in 0..=rounds {
            progress(&format!("suite api: {}, round {round} of {rounds}", verb.name()));
            for side in Side::both(&mut self.random) {
                let (Took { seconds, p99_ms }, measured) = match side {
                    Side::Ours => (self.call(verb).await?, &mut ours),
                    Side::Theirs => (self.by_pgbench(verb, script).await?, &mut theirs),
                };
                if round > 0 {
                    measured.seconds.push(seconds);
                    measured.p99_ms.push(p99_ms);
                }
            }
        }
        Ok([ours, theirs])
    }

    /// Inserts a batch of keys if the call needs existing ones. Returns their ids.
    async fn prepare(&mut self, verb: Verb) -> Result<Vec<String>> {
        self.batch += 1;
        let ids =
            if verb == Verb::Create { Vec::new() } else { insert_keys(&self.stack, self.batch, self.number).await? };
        settled(&self.stack).await?;
        Ok(ids)
    }

    /// Through the REST API.
    async fn call(&mut self, verb: Verb) -> Result<Took> {
        let ids = self.prepare(verb).await?;
        let (batch, stack) = (self.batch, &self.stack);
        let create = |n| {
            let body = json!({"email": format!("rest-{batch}-{n}@example.com"), "name": "Bench"});
            rest_call(stack, verb.method(), "/v1/keys", Some(&body))
        };
        let of_one = |id: &String| rest_call(stack, verb.method(), &format!("/v1/keys/{id}"), None);
        let calls: Result<Vec<_>> = match verb {
            Verb::Create => (0..self.number).map(create).collect(),
            Verb::Get | Verb::Revoke => ids.iter().map(of_one).collect(),
        };
        let Took { seconds, p99_ms } = call(stack.control_plane.address(), AT_ONCE, calls?).await?;
        let seconds = seconds / self.number as f64;
        Ok(Took { seconds, p99_ms })
    }

    /// The same by pgbench.
    async fn by_pgbench(&mut self, verb: Verb, script: &Path) -> Result<Took> {
        self.prepare(verb).await?;
        // A running control plane would read the changes of pgbench.
        self.stack.control_plane.signal(Signal::SIGSTOP)?;
        let done = by_pgbench(&self.pgbench, &self.stack, self.batch, self.number, script);
        self.stack.control_plane.signal(Signal::SIGCONT)?;
        let (seconds, p99_ms) = done?;
        settled(&self.stack).await?;
        if verb == Verb::Revoke {
            let left = format!(
                "select count(*) from api_keys k join user_preferences p on p.id = k.owner_id
                where p.email like 'made-{}-%' and k.revoked_at is null",
                self.batch
            );
            let left = self.stack.database.number(&left).await?;
            ensure!(left == 0, "{left} of {} keys were not revoked by pgbench", self.number);
        }
        Ok(Took { seconds, p99_ms })
    }
}

/// On the path, or beside the programs of the server.
fn pgbench() -> Result<Option<PathBuf>> {
    let beside = tools::postgres(&progress)?.join("pgbench");
    Ok(Some(beside).filter(|file| file.is_file()).or_else(|| tools::on_path("pgbench")))
}

/// Inserts keys, numbered from 1 in their batch. Returns their ids.
async fn insert_keys(stack: &Stack, batch: u32, keys: usize) -> Result<Vec<String>> {
    let sql = format!(
        "with numbers as (
            select {batch} || '-' || n as number from generate_series(1, {keys}) n
        ), owners as (
            insert into user_preferences (id, email)
            select md5('owner-' || number)::uuid, 'made-' || number || '@example.com' from numbers
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

/// Waits until the control plane has read all changes, so that rounds do not slow each other down.
async fn settled(stack: &Stack) -> Result<()> {
    let revision = stack.database.number("select revision from store_state").await?;
    store::reaches(stack, "portcullis_mirror_revision", revision as f64).await
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
    let seconds = (end - cold) / 1e6 / rest.len() as f64;
    seconds.is_finite().then(|| (seconds, Samples::in_groups([rest]).quantile(0.99)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_statement_of_the_scripts_is_one_of_the_control_plane() {
        let all = Statements::read().unwrap();
        for verb in Verb::ALL {
            verb.script(&all).unwrap();
        }
    }

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
