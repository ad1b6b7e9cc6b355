//! What reports draw from stocks: new reports come in, the ledger, the quotas' windows and the leases are brought up to date,
//! and what each Envoy is granted goes out.
//!
//! Keys without a quota, a plan or limits and whose owner is not metered cost nothing here: `Sums::drawing` leaves them
//! out. What [`needs`] looks at, that query and the index behind it (`api_keys_drawing`) must look at too.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use contract::budget::Stock;
use contract::outcome::Outcome;
use contract::record::{Budget, RateLimit};
use contract::usage::{Count, GRANTS, Grant, Report, SHADOW};
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::lease::{self, Heard, Row, Subject, UsedTable, share, stock};
use crate::credits::{self, Locked};
use crate::domain::Quota;
use crate::quota::{self, Use};

const SHARE: i16 = Stock::Share.code() as i16;
const QUOTA: i16 = Stock::Quota.code() as i16;
const CREDITS: i16 = Stock::Credits.code() as i16;

/// Reports of one Envoy that were not applied before.
#[derive(Debug)]
pub(super) struct Fresh<'a> {
    /// The Envoy process.
    pub reporter: Uuid,
    /// The number of the last of them.
    pub seq: u64,
    /// How many seconds they tell of.
    pub elapsed_s: f64,
    /// Whether the Envoy itself sent them and hears the answer. Log lines are of Envoys that have ended.
    pub hears: bool,
    /// The reports.
    pub reports: Vec<&'a Report>,
}

impl Fresh<'_> {
    fn is_quiet(&self) -> bool {
        self.reports.iter().all(|report| report.counts.is_empty())
    }
}

/// A key whose use draws from a stock.
struct Need {
    key: Uuid,
    owner: Uuid,
    metered: bool,
    /// Its limits that Envoys share.
    shared: Vec<RateLimit>,
    cost: u64,
    quota: Option<Quota>,
    quota_budget: Budget,
}

/// What was counted of a key, or of all keys of an owner.
#[derive(Clone, Copy, Default)]
struct Seen {
    allowed: u64,
    /// Of those: what drew from a lease of the key's quota.
    drawn: u64,
    cost: u64,
    limited: u64,
    over_quota: u64,
    unpaid: u64,
    /// What the requests that were not paid for would have cost.
    wanted: u64,
    /// What a request that was not paid for costs, on average; of several keys, the most.
    price: u64,
}

impl Seen {
    fn add(&mut self, count: &Count) {
        let Count { of, requests, cost, drawn, .. } = *count;
        let sum = |to: &mut u64, more: u64| *to = to.saturating_add(more);
        if of.outcome == Outcome::Allowed.code() {
            sum(&mut self.allowed, requests);
            sum(&mut self.drawn, drawn);
            sum(&mut self.cost, cost);
            return;
        }
        // What was told and not enforced is demand as well.
        match Outcome::from_code(of.outcome & !SHADOW) {
            Some(Outcome::RateLimited) => sum(&mut self.limited, requests),
            Some(Outcome::QuotaExceeded) => sum(&mut self.over_quota, requests),
            Some(Outcome::CreditsExhausted) => {
                sum(&mut self.unpaid, requests);
                sum(&mut self.wanted, cost);
            }
            _ => {}
        }
    }

    fn merge(&mut self, other: &Self) {
        self.cost = self.cost.saturating_add(other.cost);
        self.unpaid = self.unpaid.saturating_add(other.unpaid);
        self.price = self.price.max(other.price);
    }
}

/// What Envoys are told, by their ids.
pub(super) type Told = HashMap<Uuid, Vec<Grant>>;

/// Books what new reports have used and gives what each Envoy is granted with the answer. `keys`: those that they count and
/// that may draw from a stock. Envoys in `repeated` did not hear
/// the answer to their last report and are told again.
pub(super) async fn draw(
    connection: &mut PgConnection,
    fresh: &[Fresh<'_>],
    keys: &[Uuid],
    repeated: &[(Uuid, u64)],
    now: OffsetDateTime,
) -> Result<Told, sqlx::Error> {
    let mut told = Told::new();
    for (reporter, grant) in lease::repeat(connection, repeated).await? {
        told.entry(reporter).or_default().push(grant);
    }
    let (needs, held_of) = needs(connection, fresh, keys).await?;
    if needs.is_empty() && held_of.is_empty() {
        return Ok(told);
    }
    let seen = seen(fresh, &needs);

    // Users first, in the order of their ids, as everywhere.
    let mut owners: BTreeSet<Uuid> = needs.values().filter(|need| need.metered).map(|need| need.owner).collect();
    owners.extend(held_of);
    let owners: Vec<Uuid> = owners.into_iter().collect();
    let locked = if owners.is_empty() { Vec::new() } else { credits::lock(connection, &owners).await? };
    let locked: BTreeMap<Uuid, Locked> =
        locked.into_iter().filter(|owner| owner.metered).map(|owner| (owner.id, owner)).collect();

    let listens = fresh.iter().any(|fresh| fresh.hears);
    let subjects = if listens { subjects(&needs, &locked) } else { Vec::new() };
    let (mut table, mut used_of) =
        if subjects.is_empty() { Default::default() } else { lease::load(connection, &subjects).await? };

    let with_quota = needs.values().filter_map(|need| Some((need, need.quota.as_ref()?)));
    let counted: BTreeMap<Uuid, (&Quota, i64)> = with_quota
        .map(|(need, quota)| {
            let allowed = seen
                .iter()
                .filter(|((_, key), _)| *key == need.key)
                .fold(0_u64, |sum, (_, seen)| sum.saturating_add(seen.allowed));
            (need.key, (quota, i64::try_from(allowed).unwrap_or(i64::MAX)))
        })
        .collect();
    let used = if counted.is_empty() { BTreeMap::new() } else { quota::count(connection, &counted).await? };

    let costs = costs(&locked, &needs, &seen);
    let stocks = Stocks::of(&needs, &locked, &used, &costs);
    let now_ms = i64::try_from(now.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX);
    if listens {
        count_limits(&needs, &seen, &mut used_of, now_ms);
    }
    let (grants, changed) = grant(fresh, &needs, &seen, &stocks, &mut table, &used_of, now_ms);
    metrics::counter!("portcullis_lease_grants_total").increment(changed.len() as u64);
    lease::keep(connection, &changed).await?;
    lease::keep_used(connection, &used_of).await?;
    told.extend(grants);

    // From here on `store_state` may be held, until the transaction ends.
    credits::book_usage(connection, &costs).await?;
    let over = used.iter().filter_map(|(key, used)| {
        let need = needs.get(key)?;
        let quota = need.quota.as_ref().filter(|quota| used.exceeds(quota))?;
        Some((*key, used.used, used.opens_at(quota, need.quota_budget.starter.into())))
    });
    quota::shut(connection, &over.collect::<Vec<_>>()).await?;
    Ok(told)
}

/// Of some keys, and of those that the Envoys hold something of: those that draw from a stock; and the owners whose credits
/// the Envoys hold.
async fn needs(
    connection: &mut PgConnection,
    fresh: &[Fresh<'_>],
    keys: &[Uuid],
) -> Result<(BTreeMap<Uuid, Need>, Vec<Uuid>), sqlx::Error> {
    let reporters: Vec<Uuid> = fresh.iter().filter(|fresh| fresh.hears).map(|fresh| fresh.reporter).collect();
    if keys.is_empty() && reporters.is_empty() {
        return Ok((BTreeMap::new(), Vec::new()));
    }
    let rows = sqlx::query!(
        r#"select k.id as "key?", k.owner_id as "owner!", k.credits_starter is not null as "metered!",
            coalesce(k.quota, d.quota) as quota, s.shared as "shared: Json<Vec<RateLimit>>", k.cost as "cost!", k.quota_starter,
            k.quota_turn as "quota_turn!"
        from (
            select unnest($1::uuid[]) as id
            union
            select subject from leases where reporter = any($2) and stock < 2 and held > case stock when 0 then 0 else spent end
        ) of
        join api_keys k on k.id = of.id
        left join definitions d on d.number = coalesce(k.plan_number, k.owner_plan_number) and not d.removed
        cross join lateral (
            select jsonb_path_query_array(
                case when k.rate_limits <> '[]' then k.rate_limits else coalesce(d.rate_limits, '[]') end,
                '$[*] ? (@.shared == true)'
            ) as shared
        ) s
        where k.credits_starter is not null or coalesce(k.quota, d.quota) is not null or s.shared <> '[]'
        union all
        select null, subject, true, null, '[]', 0, null, 0
        from leases where reporter = any($2) and stock = 2 and held > spent"#,
        keys,
        &reporters
    )
    .fetch_all(connection)
    .await?;
    let (mut needs, mut owners) = (BTreeMap::new(), Vec::new());
    for row in rows {
        let Some(key) = row.key else {
            owners.push(row.owner);
            continue;
        };
        let quota = Quota::of(row.quota);
        let starter = quota.as_ref().map_or(0, |quota| quota.starter(row.quota_starter));
        let quota_budget = Budget {
            starter: u32::try_from(starter).unwrap_or(u32::MAX),
            turn: row.quota_turn.cast_unsigned(),
            resets_at_s: None,
        };
        let cost = u64::from(row.cost.cast_unsigned());
        let shared = row.shared.map(|limits| limits.0).unwrap_or_default();
        let need = Need { key, owner: row.owner, metered: row.metered, shared, cost, quota, quota_budget };
        needs.insert(key, need);
    }
    Ok((needs, owners))
}

/// What each Envoy, by its place, has counted of each key that draws from a stock.
fn seen(fresh: &[Fresh<'_>], needs: &BTreeMap<Uuid, Need>) -> BTreeMap<(usize, Uuid), Seen> {
    let mut all = BTreeMap::<(usize, Uuid), Seen>::new();
    for (place, fresh) in fresh.iter().enumerate() {
        for count in fresh.reports.iter().flat_map(|report| &report.counts) {
            let Some(key) = count.of.key.map(|key| Uuid::from(key.id)) else { continue };
            let Some(need) = needs.get(&key) else { continue };
            let seen = all.entry((place, key)).or_default();
            seen.add(count);
            if seen.unpaid > 0 {
                // Older filters do not tell what their routes would have cost.
                let told = seen.wanted.div_ceil(seen.unpaid);
                seen.price = if told > 0 { told } else { need.cost.max(1) };
            }
        }
    }
    all
}

fn subjects(needs: &BTreeMap<Uuid, Need>, owners: &BTreeMap<Uuid, Locked>) -> Vec<Subject> {
    let shares = needs.values().filter(|need| !need.shared.is_empty()).map(|need| (SHARE, need.key));
    let quotas = needs.values().filter(|need| need.quota.is_some()).map(|need| (QUOTA, need.key));
    shares.chain(quotas).chain(owners.keys().map(|owner| (CREDITS, *owner))).collect()
}

/// What requests have cost each owner.
fn costs(
    locked: &BTreeMap<Uuid, Locked>,
    needs: &BTreeMap<Uuid, Need>,
    seen: &BTreeMap<(usize, Uuid), Seen>,
) -> Vec<(Locked, u64)> {
    let mut costs: BTreeMap<Uuid, u64> = BTreeMap::new();
    for ((_, key), seen) in seen {
        if let Some(need) = needs.get(key) {
            let cost = costs.entry(need.owner).or_default();
            *cost = cost.saturating_add(seen.cost);
        }
    }
    locked.values().map(|owner| (*owner, costs.get(&owner.id).copied().unwrap_or(0))).collect()
}

/// Counts what was admitted of limits that Envoys share.
fn count_limits(
    needs: &BTreeMap<Uuid, Need>,
    seen: &BTreeMap<(usize, Uuid), Seen>,
    used_of: &mut UsedTable,
    now_ms: i64,
) {
    for need in needs.values().filter(|need| !need.shared.is_empty()) {
        let of_it = seen.iter().filter(|((_, key), _)| *key == need.key);
        let allowed = of_it.fold(0_u64, |sum, (_, seen)| sum.saturating_add(seen.allowed));
        used_of.entry(need.key).or_default().count(&need.shared, allowed, now_ms);
    }
}

/// What is left of each stock, with these reports, and its turn.
struct Stocks(BTreeMap<Subject, (i64, Budget)>);

impl Stocks {
    fn of(
        needs: &BTreeMap<Uuid, Need>,
        locked: &BTreeMap<Uuid, Locked>,
        used: &BTreeMap<Uuid, Use>,
        costs: &[(Locked, u64)],
    ) -> Self {
        let quotas = used.iter().filter_map(|(key, used)| {
            let need = needs.get(key)?;
            let left = need.quota.as_ref()?.requests.saturating_sub(used.used);
            Some(((QUOTA, *key), (left, need.quota_budget)))
        });
        let credits = costs.iter().filter(|(owner, _)| locked.contains_key(&owner.id)).map(|(owner, cost)| {
            let left = owner.balance.saturating_add(credits::usage(owner.balance, *cost));
            let budget = Budget {
                starter: owner.credits_starter.max(0).cast_unsigned(),
                turn: owner.credits_turn.cast_unsigned(),
                resets_at_s: None,
            };
            ((CREDITS, owner.id), (left, budget))
        });
        Self(quotas.chain(credits).collect())
    }
}

/// What an owner has in all, for an Envoy that refused requests for the lack of credits: whether waiting helps.
fn balance(subject: Subject, heard: &Heard, stocks: &Stocks) -> Option<Grant> {
    let (left, budget) = stocks.0.get(&subject).filter(|_| subject.0 == CREDITS && heard.refused > 0)?;
    let amount = u64::try_from(*left).unwrap_or_default();
    Some(Grant { stock: Stock::Balance.code(), of: subject.1.into_bytes(), amount, turn: budget.turn })
}

/// Answers each Envoy that hears, one after the other; gives the rows that have changed beside.
// Longer than a screen: its two passes over the Envoys share all of their state.
fn grant(
    fresh: &[Fresh<'_>],
    needs: &BTreeMap<Uuid, Need>,
    seen: &BTreeMap<(usize, Uuid), Seen>,
    stocks: &Stocks,
    table: &mut BTreeMap<Subject, Vec<Row>>,
    used_of: &UsedTable,
    now_ms: i64,
) -> (Told, Vec<(Subject, Row)>) {
    let hearing = || fresh.iter().enumerate().filter(|(_, fresh)| fresh.hears);
    let mut holdings: HashMap<Uuid, Vec<Subject>> = HashMap::new();
    for (subject, rows) in &*table {
        for row in rows.iter().filter(|row| row.held > if subject.0 == SHARE { 0 } else { row.spent }) {
            holdings.entry(row.reporter).or_default().push(*subject);
        }
    }
    let mut heard: Vec<(usize, Subject, Heard)> = Vec::new();
    for (place, fresh) in hearing() {
        let blank = Heard {
            seq: fresh.seq,
            now_ms,
            elapsed_s: fresh.elapsed_s,
            quiet: fresh.is_quiet(),
            spent: 0,
            refused: 0,
            price: 1,
        };
        let mut of_owners = BTreeMap::<Uuid, Seen>::new();
        let mut counted = BTreeMap::<Subject, Heard>::new();
        for ((_, key), seen) in seen.range((place, Uuid::nil())..=(place, Uuid::max())) {
            let Some(need) = needs.get(key) else { continue };
            if !need.shared.is_empty() {
                counted.insert((SHARE, *key), Heard { spent: seen.allowed, refused: seen.limited, ..blank });
            }
            if need.quota.is_some() {
                counted.insert((QUOTA, *key), Heard { spent: seen.drawn, refused: seen.over_quota, ..blank });
            }
            of_owners.entry(need.owner).or_default().merge(seen);
        }
        for (owner, seen) in of_owners {
            let price = seen.price.max(1);
            counted.insert((CREDITS, owner), Heard { spent: seen.cost, refused: seen.unpaid, price, ..blank });
        }
        counted.retain(|subject, heard| heard.used() > 0 && table.contains_key(subject));
        // What it holds of others and does not use.
        for subject in holdings.get(&fresh.reporter).into_iter().flatten() {
            counted.entry(*subject).or_insert(blank);
        }
        heard.extend(counted.into_iter().map(|(subject, heard)| (place, subject, heard)));
    }

    // What was spent is noted of all before any is granted more.
    for (place, subject, heard) in &heard {
        let (Some(fresh), Some(rows)) = (fresh.get(*place), table.get_mut(subject)) else { continue };
        let me = lease::place(rows, fresh.reporter);
        if let (Some((_, budget)), Some(row)) = (stocks.0.get(subject), rows.get_mut(me)) {
            stock::spend(row, heard, budget);
        }
    }
    let (mut told, mut changed) = (Told::new(), Vec::new());
    for (place, subject, heard) in &heard {
        let (Some(fresh), Some(rows)) = (fresh.get(*place), table.get_mut(subject)) else { continue };
        let me = lease::place(rows, fresh.reporter);
        let grants = told.entry(fresh.reporter).or_default();
        let turn = match stocks.0.get(subject) {
            // The rest is answered with later reports; until then it holds what it holds.
            _ if grants.len() >= GRANTS => {
                changed.extend(rows.get(me).map(|row| (*subject, row.clone())));
                continue;
            }
            Some((left, budget)) => {
                stock::answer(rows, me, heard, *left, budget);
                budget.turn
            }
            None if subject.0 == SHARE => {
                share::answer(rows, me, heard);
                0
            }
            None => continue,
        };
        let Some(row) = rows.get(me) else { continue };
        grants.push(lease::grant(*subject, row, turn));
        grants.extend(balance(*subject, heard, stocks));
        if subject.0 == SHARE
            && let Some(used) = used_of.get(&subject.1)
        {
            grants.extend(used.grants(subject.1, now_ms));
        }
        changed.push((*subject, row.clone()));
    }
    (told, changed)
}
