//! How fast keys are made, read and revoked: through the REST API, and as the same statements by pgbench, in turn.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portcullis_tests::http::{Connection, Outgoing};
use portcullis_tests::process::Signal;
use portcullis_tests::stack::Stack;
use portcullis_tests::tools;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;

use super::Options;
use super::report::{Bound, Report};
use super::statements::Statements;
use super::stats::{Estimate, Samples};
use super::store::{self, Used, milliseconds, seconds};
use crate::output::progress;
use crate::run::read;

const SUITE: &str = "api: REST, eight callers";
const CALLERS: usize = 8;

/// What is asked for, with the statements that it comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Create,
    Get,
    Revoke,
}

impl Verb {
    const ALL: [Self; 3] = [Self::Create, Self::Get, Self::Revoke];

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
        let next = format!("\\set turn :turn + 1\n\\set n (:turn - 1) * {CALLERS} + :client_id + 1\n");
        let caller = all.with(&["select k.id, k.owner_id, s.generation"], &["decode(:admin, 'hex')"])?;
        let noted = |key: &str| {
            let parts = ["insert into audit (", "action, key_id, target, detail)", "values ("];
            let note = ["null", "'a@example.com'", "'127.0.0.1'", "null", "'key.bench'", key, "null", "'{}'"];
            all.with(&parts, &note)
        };
        let shown = |key: &str| all.with(&["select k.id as \"id!\", k.networks"], &[&format!("array[{key}]")]);
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
                all.with(&["select s.epoch, count(*)"], &["0", "60", "24"])? + ";\n",
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
pub(super) async fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let (target, bound) = ("key creation ÷ pgbench of the same statements", Bound::AtLeast(0.7));
    let Some(pgbench) = pgbench()? else {
        report.target(target, bound, "", None);
        report.note(
            "Suite api: left out, for there is no pgbench: install it (Debian: postgresql-contrib or postgresql-15).",
        );
        return Ok(());
    };
    let stack = store::start(0).await?;
    let home = TempDir::with_prefix("portcullis-bench-")?;
    let statements = Statements::read()?;
    let (rounds, calls) = if options.quick { (2, 1_000) } else { (12, 1_200) };
    let mut batch = 0;
    let postmaster = store::postmaster(&stack).await?;
    for verb in Verb::ALL {
        let script = home.path().join(format!("{}.sql", verb.name()));
        std::fs::write(&script, verb.script(&statements)?)?;
        let (mut ours, mut theirs) = (Measured::default(), Measured::default());
        // One round before those that count: connections and caches are cold.
        for round in 0..=rounds {
            progress(&format!("suite api: {}, round {round} of {rounds}", verb.name()));
            batch += 1;
            let ids = if verb == Verb::Create { Vec::new() } else { made(&stack, batch, calls).await? };
            settled(&stack).await?;
            let before = Used::read(&stack, postmaster)?;
            let by_us = call(&stack, verb, calls, ids).await?;
            let used_by_us = Used::read(&stack, postmaster)?.since(&before);
            batch += 1;
            if verb != Verb::Create {
                made(&stack, batch, calls).await?;
            }
            settled(&stack).await?;
            // Awake, it would read what pgbench changes.
            stack.control_plane.signal(Signal::SIGSTOP)?;
            let before = Used::read(&stack, postmaster)?;
            let by_pgbench = by_pgbench(&pgbench, &stack, batch, calls, &script);
            let used_by_pgbench = Used::read(&stack, postmaster)?.since(&before);
            stack.control_plane.signal(Signal::SIGCONT)?;
            let by_pgbench = by_pgbench?;
            settled(&stack).await?;
            if verb == Verb::Revoke {
                let left = left(&stack, batch).await?;
                ensure!(left == 0, "{left} of {calls} keys are not those that pgbench means");
            }
            if round > 0 {
                ours.push(&by_us, used_by_us, calls);
                theirs.push(&by_pgbench, used_by_pgbench, calls);
            }
        }
        let rate = |times: &Samples| Estimate::of([times], |[time]| 1.0 / time);
        let plain = |samples: &Samples| Estimate::of([samples], |[value]| value);
        let ratio = Estimate::by_the_round(&theirs.seconds, &ours.seconds);
        let (by_us, by_pgbench) =
            (format!("Portcullis, {}", verb.name()), format!("pgbench, the statements of {}", verb.name()));
        report.figure(SUITE, by_pgbench.as_str(), "1/s", rate(&theirs.seconds));
        report.compared(SUITE, by_us.as_str(), "1/s", rate(&ours.seconds), Some((ratio, "pgbench")));
        report.figure(SUITE, format!("{by_pgbench}, p99"), "ms", plain(&theirs.p99_ms));
        let longer = Estimate::by_the_round(&ours.p99_ms, &theirs.p99_ms);
        report.compared(SUITE, format!("{by_us}, p99"), "ms", plain(&ours.p99_ms), Some((longer, "pgbench")));
        report.figure(SUITE, format!("{by_pgbench}, PostgreSQL's CPU"), "µs", plain(&theirs.database_us));
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

/// One round of calls.
struct Calls {
    /// How long all of them took together, by call.
    seconds: f64,
    /// How long each took.
    latencies_ms: Samples,
}

/// What the rounds took, a sample each.
#[derive(Default)]
struct Measured {
    /// By call.
    seconds: Samples,
    p99_ms: Samples,
    /// Of the processor, by call.
    control_plane_us: Samples,
    database_us: Samples,
}

impl Measured {
    fn push(&mut self, calls: &Calls, (control_plane_s, database_s): (f64, f64), number: usize) {
        self.seconds.push(calls.seconds);
        self.p99_ms.push(calls.latencies_ms.quantile(0.99));
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        let by_call = 1e6 / number as f64;
        self.control_plane_us.push(control_plane_s * by_call);
        self.database_us.push(database_s * by_call);
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

/// Calls so often.
async fn call(stack: &Stack, verb: Verb, calls: usize, ids: Vec<String>) -> Result<Calls> {
    let key = stack.control_plane.settings().admin_key;
    let (ids, next) = (Arc::new(ids), Arc::new(AtomicUsize::new(0)));
    let mut callers = JoinSet::new();
    let run = stack.database.number("select revision from store_state").await?;
    let mut connections = Vec::new();
    for _ in 0..CALLERS {
        connections.push(Connection::open(stack.control_plane.address()).await?);
    }
    // Like pgbench's, the time does not include connecting.
    let start = Instant::now();
    for mut connection in connections {
        let (ids, next, key) = (Arc::clone(&ids), Arc::clone(&next), key.reveal().to_owned());
        callers.spawn(async move {
            let mut took: Vec<Duration> = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= calls {
                    return Ok(took);
                }
                let request = request(verb, &key, &format!("rest-{run}-{number}@example.com"), ids.get(number))?;
                let asked = Instant::now();
                let reply = connection.send(request).await?;
                took.push(asked.elapsed());
                ensure!((200..300).contains(&reply.status), "{verb:?}: {} {:?}", reply.status, reply.body);
            }
        });
    }
    let mut latencies_ms = Samples::default();
    while let Some(took) = callers.join_next().await {
        for one in took?? {
            latencies_ms.push(milliseconds(one));
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let seconds = seconds(start.elapsed()) / calls as f64;
    Ok(Calls { seconds, latencies_ms })
}

fn request(verb: Verb, key: &str, email: &str, id: Option<&String>) -> Result<Outgoing> {
    let builder = axum::http::Request::builder().header("x-api-key", key);
    let of_key = || Ok::<_, anyhow::Error>(format!("/v1/keys/{}", id.context("no key to ask for")?));
    Ok(match verb {
        Verb::Create => {
            let body: Value = json!({"email": email, "name": "Bench"});
            let builder = builder.method("POST").uri("/v1/keys").header("content-type", "application/json");
            builder.body(body.to_string().into())?
        }
        Verb::Get => builder.method("GET").uri(of_key()?).body(Default::default())?,
        Verb::Revoke => builder.method("DELETE").uri(of_key()?).body(Default::default())?,
    })
}

/// The same by pgbench, of the keys of a batch.
fn by_pgbench(pgbench: &Path, stack: &Stack, batch: u32, calls: usize, script: &Path) -> Result<Calls> {
    let log = TempDir::with_prefix("portcullis-bench-")?;
    let each = (calls / CALLERS).to_string();
    let mut command = Command::new(pgbench);
    command.args(["--no-vacuum", "--protocol=prepared", "--jobs=1", "--client"]).arg(CALLERS.to_string());
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
fn warm(done: &[Transaction]) -> Option<Calls> {
    const COLD: u64 = 6;
    let cold = done.iter().filter(|one| one.number <= COLD).map(|one| one.ended_us).max_by(f64::total_cmp)?;
    let end = done.iter().map(|one| one.ended_us).max_by(f64::total_cmp)?;
    let rest: Vec<f64> = done.iter().filter(|one| one.ended_us > cold).map(|one| one.took_us / 1_000.0).collect();
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let seconds = (end - cold) / 1e6 / rest.len() as f64;
    let mut latencies_ms = Samples::default();
    rest.into_iter().for_each(|took| latencies_ms.push(took));
    seconds.is_finite().then_some(Calls { seconds, latencies_ms })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_pgbench_counts_what_comes_after_the_slowest_client_is_warm() {
        let log = "0 1 9000 0 100 0\n0 6 9000 0 100 500000\n1 1 9000 0 101 0\n0 7 4000 0 101 500000\n1 6 9000 0 102 0\n\
            0 8 1000 0 102 250000\n1 7 3000 0 102 500000\n";
        let done: Vec<Transaction> = log.lines().map(|line| Transaction::read(line).unwrap()).collect();
        let Calls { seconds, latencies_ms } = warm(&done).unwrap();
        assert_eq!((seconds, latencies_ms.quantile(0.0), latencies_ms.quantile(1.0)), (0.25, 1.0, 3.0));
        assert!(Transaction::read("0 1 skipped 0 100 0").is_none());
        assert!(warm(&done[..2]).is_none());
    }
}
