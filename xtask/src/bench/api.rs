//! How fast keys are made, read and revoked: through the REST API, and as the same statements by pgbench, in turn.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portcullis_tests::http::{Connection, Outgoing};
use portcullis_tests::stack::Stack;
use portcullis_tests::tools;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;

use super::Options;
use super::report::{Bound, Report};
use super::statements::Statements;
use super::stats::{Estimate, Samples};
use super::store::{self, milliseconds, seconds};
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

    /// A script of all that the control plane asks of the database for one call.
    fn script(self, all: &Statements) -> Result<String> {
        const KEY: &str = "(select id from pgbench_keys where n = :n)";
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
            Self::Get => {
                let owner = format!(
                    "(select email from user_preferences p join api_keys k on k.owner_id = p.id where k.id = {KEY})"
                );
                [
                    "\\set n random(1, 1000)\n".into(),
                    caller + ";\n",
                    one(KEY)? + ";\n",
                    all.with(&["select s.generation as \"generation!\", s.prefix"], &[KEY])? + ";\n",
                    all.with(&["select coalesce(k.quota, d.quota) as quota, k.quota_exceeded"], &[KEY])? + ";\n",
                    all.with(&["select p.id as owner_id, p.balance"], &[&owner])? + ";\n",
                    shown(KEY)? + ";\n",
                    all.with(&["from retired_secrets where key_id = k.id"], &[KEY])? + ";\n",
                    all.with(&["select s.epoch, count(*)"], &["0", "60", "24"])? + ";\n",
                ]
                .concat()
            }
            Self::Revoke => [
                "select nextval('pgbench_next') as n \\gset\n".into(),
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
    let Some(pgbench) = pgbench()? else {
        report.note(
            "Suite api: left out, for there is no pgbench: install it (Debian: postgresql-contrib or postgresql-15).",
        );
        return Ok(());
    };
    let stack = store::start(0).await?;
    let home = TempDir::with_prefix("portcullis-bench-")?;
    let statements = Statements::read()?;
    let (rounds, calls) = if options.quick { (2, 1_000) } else { (5, 3_000) };
    for verb in Verb::ALL {
        let script = home.path().join(format!("{}.sql", verb.name()));
        std::fs::write(&script, verb.script(&statements)?)?;
        let (mut ours, mut theirs, mut p99) = (Samples::default(), Samples::default(), Samples::default());
        for round in 1..=rounds {
            progress(&format!("suite api: {}, round {round} of {rounds}", verb.name()));
            let ids = if verb == Verb::Create { Vec::new() } else { made(&stack, calls).await? };
            if verb != Verb::Create {
                number_keys(&stack).await?;
            }
            let (rate, latencies) = call(&stack, verb, calls, ids).await?;
            if verb == Verb::Revoke {
                // What has been revoked is not revoked again.
                made(&stack, calls).await?;
                number_keys(&stack).await?;
            }
            ours.push(rate);
            p99.push(latencies.quantile(0.99));
            theirs.push(by_pgbench(&pgbench, &stack, calls, &script)?);
        }
        let plain = |samples: &Samples| Estimate::of([samples], |[value]| value);
        let ratio = Estimate::of([&ours, &theirs], |[ours, theirs]| ours / theirs);
        let name = verb.name();
        report.figure(SUITE, format!("pgbench, the statements of {name}"), "1/s", plain(&theirs));
        report.compared(
            SUITE,
            format!("Portcullis, {name}"),
            "1/s",
            plain(&ours),
            Some((ratio.lower_quartile, "pgbench")),
        );
        report.figure(SUITE, format!("Portcullis, {name}, p99"), "ms", plain(&p99));
        if verb == Verb::Create {
            report.target("key creation ÷ pgbench of the same statements", Bound::AtLeast(0.7), "", ratio);
        }
    }
    Ok(())
}

/// Of the path, or beside the server's programs.
fn pgbench() -> Result<Option<PathBuf>> {
    let beside = tools::postgres(&progress)?.join("pgbench");
    Ok(Some(beside).filter(|file| file.is_file()).or_else(|| tools::on_path("pgbench")))
}

/// Makes so many keys and gives their ids.
async fn made(stack: &Stack, keys: usize) -> Result<Vec<String>> {
    let sql = format!(
        "with owners as (
            insert into user_preferences (id, email)
            select gen_random_uuid(), 'made-' || gen_random_uuid() || '@example.com' from generate_series(1, {keys})
            returning id
        ), keys as (
            insert into api_keys (id, owner_id, name, hash, prefix, revision)
            select gen_random_uuid(), id, 'Made', sha256(convert_to(id::text, 'UTF8')), 'sk_abc123', 0 from owners
            returning id
        )
        select string_agg(id::text, ' ') from keys"
    );
    Ok(stack.database.text(&sql).await?.split(' ').map(str::to_owned).collect())
}

/// Numbers the keys that are not revoked, the newest first, for pgbench to choose from.
async fn number_keys(stack: &Stack) -> Result<()> {
    let sql = "
        drop table if exists pgbench_keys; drop sequence if exists pgbench_next;
        create sequence pgbench_next cache 1;
        create table pgbench_keys as
            select row_number() over (order by revision desc, id) as n, id from api_keys where revoked_at is null and name = 'Made';
        create unique index on pgbench_keys (n); analyze pgbench_keys";
    stack.database.execute(sql).await.map(|_| ())
}

/// Calls so often; gives calls per second and how long each took, in milliseconds.
async fn call(stack: &Stack, verb: Verb, calls: usize, ids: Vec<String>) -> Result<(f64, Samples)> {
    let key = stack.control_plane.settings().admin_key;
    let (ids, next) = (Arc::new(ids), Arc::new(AtomicUsize::new(0)));
    let mut callers = JoinSet::new();
    let run = stack.database.number("select revision from store_state").await?;
    let start = Instant::now();
    for _ in 0..CALLERS {
        let mut connection = Connection::open(stack.control_plane.address()).await?;
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
    let mut latencies = Samples::default();
    while let Some(took) = callers.join_next().await {
        for one in took?? {
            latencies.push(milliseconds(one));
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let rate = calls as f64 / seconds(start.elapsed());
    Ok((rate, latencies))
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

fn by_pgbench(pgbench: &Path, stack: &Stack, calls: usize, script: &Path) -> Result<f64> {
    let each = (calls / CALLERS).to_string();
    let mut command = Command::new(pgbench);
    command.args(["--no-vacuum", "--protocol=prepared", "--jobs=1", "--client"]).arg(CALLERS.to_string());
    let hash = stack.control_plane.settings().admin_key.hash().0;
    let admin: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    command.arg(format!("--define=admin={admin}"));
    command.args(["--transactions", &each, "--file"]).arg(script).arg(&stack.database.url);
    let output = read(command)?;
    let line = output.lines().find_map(|line| line.strip_prefix("tps = "));
    let rate = line.and_then(|line| line.split(' ').next()).and_then(|rate| rate.parse().ok());
    rate.with_context(|| format!("pgbench says what cannot be understood:\n{output}"))
}
