//! What is kept of leases: subjects come in, the rows of all Envoys of each go out, and back.
//!
//! A transaction locks the row of `lease_locks` of a subject before it reads or changes the leases of the subject, so that
//! reports of two Envoys at once see each other. Rows are locked in the order of their subjects.

use std::collections::BTreeMap;

use contract::budget::Stock;
use contract::usage::Grant;
use sqlx::types::Json;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::Row;
use super::used::Used;

/// A stock ([`Stock::code`](contract::budget::Stock::code)) and the key or owner that it is of.
pub type Subject = (i16, Uuid);

/// The rows of each subject.
pub type Table = BTreeMap<Subject, Vec<Row>>;

/// How far the limits of each key are used.
pub type UsedTable = BTreeMap<Uuid, Used>;

/// How often lock rows are inserted again that [`tidy`] deleted in between.
const TRIES: usize = 3;

/// Locks subjects and reads their rows, and how far the limits of keys among them are used.
// Longer than a screen because of its statements.
pub async fn load(connection: &mut PgConnection, subjects: &[Subject]) -> Result<(Table, UsedTable), sqlx::Error> {
    let mut used = UsedTable::new();
    let (stocks, ids): (Vec<i16>, Vec<Uuid>) = subjects.iter().copied().unzip();
    for left in (0..TRIES).rev() {
        let locked = sqlx::query!(
            r#"select l.subject, l.used as "used: Json<Used>" from unnest($1::smallint[], $2::uuid[]) as of (stock, subject)
            join lease_locks l on l.stock = of.stock and l.subject = of.subject
            order by l.stock, l.subject for update of l"#,
            &stocks,
            &ids
        )
        .fetch_all(&mut *connection)
        .await?;
        if locked.len() == subjects.len() {
            used.extend(locked.into_iter().filter(|row| !row.used.is_empty()).map(|row| (row.subject, row.used.0)));
            break;
        }
        if left == 0 {
            return Err(sqlx::Error::Protocol("leases cannot be locked".into()));
        }
        sqlx::query!(
            "insert into lease_locks (stock, subject)
            select stock, subject from unnest($1::smallint[], $2::uuid[]) as of (stock, subject)
            order by stock, subject on conflict do nothing",
            &stocks,
            &ids
        )
        .execute(&mut *connection)
        .await?;
    }
    // A statement of its own: it sees what was committed while the locks were waited for.
    let rows = sqlx::query!(
        r#"select l.stock, l.subject, l.reporter, l.told, l.held, l.told_seq, l.turn, l.spent, l.rest, l.demand,
            (extract(epoch from l.renewed_at) * 1000)::bigint as "renewed_ms!",
            (extract(epoch from greatest(l.renewed_at, r.reported_at)) * 1000)::bigint as "heard_ms!"
        from unnest($1::smallint[], $2::uuid[]) as of (stock, subject)
        join leases l on l.stock = of.stock and l.subject = of.subject
        left join usage_reporters r on r.reporter = l.reporter
        order by l.stock, l.subject, l.reporter"#,
        &stocks,
        &ids
    )
    .fetch_all(connection)
    .await?;
    let mut table: Table = subjects.iter().map(|subject| (*subject, Vec::new())).collect();
    for row in rows {
        table.entry((row.stock, row.subject)).or_default().push(Row {
            reporter: row.reporter,
            told: row.told.cast_unsigned(),
            held: row.held.cast_unsigned(),
            told_seq: row.told_seq.cast_unsigned(),
            turn: row.turn.cast_unsigned(),
            spent: row.spent.cast_unsigned(),
            rest: row.rest.cast_unsigned(),
            demand: row.demand,
            renewed_ms: row.renewed_ms,
            heard_ms: row.heard_ms,
        });
    }
    Ok((table, used))
}

/// Writes how far limits are used.
pub async fn keep_used(connection: &mut PgConnection, used: &UsedTable) -> Result<(), sqlx::Error> {
    if used.is_empty() {
        return Ok(());
    }
    let keys: Vec<Uuid> = used.keys().copied().collect();
    let used: Vec<Json<&Used>> = used.values().map(Json).collect();
    sqlx::query!(
        "update lease_locks set used = new.used from unnest($1::uuid[], $2::jsonb[]) as new (subject, used)
        where lease_locks.stock = 0 and lease_locks.subject = new.subject and lease_locks.used is distinct from new.used",
        &keys,
        &used as &[Json<&Used>]
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Writes rows that have changed.
pub async fn keep(connection: &mut PgConnection, changed: &[(Subject, Row)]) -> Result<(), sqlx::Error> {
    if changed.is_empty() {
        return Ok(());
    }
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let stocks: Vec<i16> = changed.iter().map(|((stock, _), _)| *stock).collect();
    let subjects: Vec<Uuid> = changed.iter().map(|((_, subject), _)| *subject).collect();
    let reporters: Vec<Uuid> = changed.iter().map(|(_, row)| row.reporter).collect();
    let told: Vec<i64> = changed.iter().map(|(_, row)| signed(row.told)).collect();
    let held: Vec<i64> = changed.iter().map(|(_, row)| signed(row.held)).collect();
    let seqs: Vec<i64> = changed.iter().map(|(_, row)| signed(row.told_seq)).collect();
    let turns: Vec<i32> = changed.iter().map(|(_, row)| row.turn.cast_signed()).collect();
    let spent: Vec<i64> = changed.iter().map(|(_, row)| signed(row.spent)).collect();
    let rests: Vec<i64> = changed.iter().map(|(_, row)| signed(row.rest)).collect();
    let demands: Vec<f64> = changed.iter().map(|(_, row)| row.demand).collect();
    let renewed: Vec<i64> = changed.iter().map(|(_, row)| row.renewed_ms.max(0)).collect();
    sqlx::query!(
        "insert into leases (stock, subject, reporter, told, held, told_seq, turn, spent, rest, demand, renewed_at)
        select stock, subject, reporter, told, held, told_seq, turn, spent, rest, demand, to_timestamp(renewed_ms / 1000.0)
        from unnest($1::smallint[], $2::uuid[], $3::uuid[], $4::bigint[], $5::bigint[], $6::bigint[], $7::int[],
                $8::bigint[], $9::bigint[], $10::double precision[], $11::bigint[])
            as new (stock, subject, reporter, told, held, told_seq, turn, spent, rest, demand, renewed_ms)
        on conflict (stock, subject, reporter) do update set told = excluded.told, held = excluded.held,
            told_seq = excluded.told_seq, turn = excluded.turn, spent = excluded.spent, rest = excluded.rest,
            demand = excluded.demand, renewed_at = excluded.renewed_at",
        &stocks,
        &subjects,
        &reporters,
        &told,
        &held,
        &seqs,
        &turns,
        &spent,
        &rests,
        &demands,
        &renewed
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// What Envoys were told last, for those that did not hear it: in answer to the report of that number.
pub async fn repeat(connection: &mut PgConnection, of: &[(Uuid, u64)]) -> Result<Vec<(Uuid, Grant)>, sqlx::Error> {
    if of.is_empty() {
        return Ok(Vec::new());
    }
    let (reporters, seqs): (Vec<Uuid>, Vec<i64>) =
        of.iter().map(|(reporter, seq)| (*reporter, seq.cast_signed())).unzip();
    let rows = sqlx::query!(
        r#"select l.reporter, l.stock, l.subject, l.told, l.rest, l.turn, l.demand, k.used as "used?: Json<Used>",
            (extract(epoch from now()) * 1000)::bigint as "now_ms!"
        from unnest($1::uuid[], $2::bigint[]) as of (reporter, seq)
        join leases l on l.reporter = of.reporter and l.told_seq = of.seq
        left join lease_locks k on k.stock = l.stock and k.subject = l.subject
        order by l.stock, l.subject"#,
        &reporters,
        &seqs
    )
    .fetch_all(connection)
    .await?;
    let mut grants = Vec::with_capacity(rows.len());
    for row in rows {
        let (told, rest) = (row.told.cast_unsigned(), row.rest.cast_unsigned());
        let told = Row { told, rest, demand: row.demand, ..Row::new(row.reporter) };
        let (subject, turn) = ((row.stock, row.subject), row.turn.cast_unsigned());
        grants.push((row.reporter, grant(subject, &told, turn)));
        let used = row.used.filter(|_| row.stock == i16::from(Stock::Share.code()));
        let used = used.map(|used| used.grants(row.subject, row.now_ms)).unwrap_or_default();
        grants.extend(used.into_iter().map(|used| (row.reporter, used)));
    }
    Ok(grants)
}

/// What the Envoy of a row is told. One that wants a share and has none yet has one part per million of it, which lets it
/// ask; a share of nothing is left to others.
pub fn grant(subject: Subject, row: &Row, turn: u32) -> Grant {
    let stock = u8::try_from(subject.0).unwrap_or(u8::MAX);
    let waits = stock == Stock::Share.code() && row.told == 0 && row.demand > 0.0;
    let amount = if waits { 1 } else { row.told.saturating_add(row.rest) };
    Grant { stock, of: subject.1.into_bytes(), amount, turn }
}

/// Forgets what Envoys held that are gone, and lock rows of subjects without leases, and counts what is held. What an
/// Envoy has spent is kept for a week after it was last heard of: it counts from the start of its process.
pub async fn tidy(pool: &PgPool) -> Result<u64, sqlx::Error> {
    let locks = sqlx::query!(
        "delete from lease_locks where (stock, subject) in (
            select k.stock, k.subject from lease_locks k
            where k.created_at < now() - interval '1 hour'
                and not exists (select from leases l where l.stock = k.stock and l.subject = k.subject)
                and not exists (
                    select from jsonb_each_text(k.used) u where u.value::bigint > extract(epoch from now()) * 1000
                )
            limit 10000 for update of k skip locked
        )"
    )
    .execute(pool)
    .await?;
    let gone = sqlx::query!(
        "delete from leases where (stock, subject, reporter) in (
            select l.stock, l.subject, l.reporter from leases l
            left join usage_reporters r on r.reporter = l.reporter left join filters f on f.reporter = l.reporter
            where l.renewed_at < now() - interval '1 hour' and case
                when l.stock = 0 then l.held = 0 or coalesce(r.reported_at < now() - interval '1 hour', true)
                else coalesce(greatest(r.reported_at, f.seen_at) < now() - interval '7 days', true)
            end
            limit 10000 for update of l skip locked
        )"
    )
    .execute(pool)
    .await?;
    let held = sqlx::query!(
        r#"select s.stock as "stock!", count(l.reporter) as "held!" from unnest('{0, 1, 2}'::smallint[]) as s (stock)
        left join leases l on l.stock = s.stock and l.held > case l.stock when 0 then 0 else l.spent end
        group by s.stock"#
    )
    .fetch_all(pool)
    .await?;
    for row in held {
        let stock = ["share", "quota", "credits"].get(usize::try_from(row.stock).unwrap_or(usize::MAX));
        metrics::gauge!("portcullis_leases", "stock" => *stock.unwrap_or(&"other")).set(row.held as f64);
    }
    Ok(locks.rows_affected() + gone.rows_affected())
}
