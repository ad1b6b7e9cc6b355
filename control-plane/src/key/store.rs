//! Keys and users in PostgreSQL: parsed values come in, rows go out. A secret is made here and leaves once, to whoever asked
//! for it; only its hash and prefix are written. What changes takes the caller's transaction and notes who did it there, so
//! that the fact, its audit and its reply commit together or not at all.
//!
//! Locks are taken in one order, so that no two changes wait for each other: the row of the user (of several: by id), then
//! rows of definitions (see [`crate::definition::store`]), then `store_state` (by [`hold`], or by a trigger with the first
//! change of a key), then rows of keys. Where usage is booked, the rows of leases and quotas come between users and
//! `store_state`: see `usage/apply.rs`.

use contract::hash::KeyHash;
use contract::key::{KeyKind, Secret};
use contract::record::Record;
use serde_json::json;
use sqlx::types::Json;
use sqlx::{PgConnection, PgExecutor, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use super::allowance::{self, Act};
use super::domain::{Email, KeyName, Scopes, StoredLimit, Timestamp};
use super::forget::forget_ended;
use super::permissions::{Permissions, Permitted, Resolved, permit};
use super::revoke::revoke_row;
use crate::audit::{self, Actor, Deed};
use crate::error::ApiError;
use crate::quota::Quota;
use crate::transaction::transact;

/// A key as people see it.
#[derive(Clone, Debug)]
pub struct Key {
    /// Names the key for as long as it lives.
    pub id: Uuid,
    /// Whom it belongs to.
    pub owner_id: Uuid,
    /// The owner's address.
    pub email: String,
    /// What people call it.
    pub name: String,
    /// What people recognise it by; none for keys of a foreign form.
    pub prefix: Option<String>,
    /// Scopes granted to it.
    pub scopes: Vec<String>,
    /// Its own rate limits.
    pub rate_limits: Json<Vec<StoredLimit>>,
    /// Which of its secrets is the present one, from 1.
    pub generation: i32,
    /// Counted up with each change.
    pub version: i64,
    /// Whether it is switched off.
    pub disabled: bool,
    /// Whether an admin has done so: then only an admin switches it on again.
    pub disabled_by_admin: bool,
    /// When it was made.
    pub created_at: OffsetDateTime,
    /// When it ends.
    pub expires_at: Option<OffsetDateTime>,
    /// When it was revoked.
    pub revoked_at: Option<OffsetDateTime>,
    /// When it was last used, as far as filters have reported.
    pub last_used_at: Option<OffsetDateTime>,
    /// Allowed requests of all its secrets.
    pub usage_count: i64,
}

/// A key to be made.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// Whom it is for; made a user if not one yet.
    pub email: Email,
    /// What people call it.
    pub name: KeyName,
    /// Live or test.
    pub kind: KeyKind,
    /// Scopes granted to it.
    pub scopes: Scopes,
    /// Its own rate limits.
    pub rate_limits: Vec<StoredLimit>,
    /// What else it may.
    pub permissions: Permissions,
    /// When it ends.
    pub expires_at: Option<OffsetDateTime>,
    /// How many live keys its owner may have with it; as many as they like if none.
    pub at_most: Option<i64>,
    /// How many keys and rotations its owner may make in 24 hours with it; as many as they like if none.
    pub per_day: Option<u32>,
}

/// Live keys that a user may make for themselves, so that no key of a user can fill the memory of every Envoy. Admins
/// make as many as they like.
pub const LIVE_KEYS: i64 = 100;

impl NewKey {
    /// A live key that grants nothing in particular and does not end.
    #[must_use]
    pub fn plain(email: Email, name: KeyName) -> Self {
        let (scopes, rate_limits, permissions) = (Scopes::default(), Vec::new(), Permissions::default());
        let kind = KeyKind::Live;
        Self { email, name, kind, scopes, rate_limits, permissions, expires_at: None, at_most: None, per_day: None }
    }
}

/// What authentication needs of a key.
#[derive(Clone, Debug)]
pub struct Found {
    /// What a filter would know of it.
    pub record: Record,
    /// The owner's address.
    pub email: String,
    /// What is the key's own.
    pub own: Own,
}

/// What a key has of its own rather than by its plan or its owner.
#[derive(Clone, Debug, Default)]
pub struct Own {
    /// Its plan, by number.
    pub plan: Option<i32>,
    /// Its quota.
    pub quota: Option<Quota>,
}

/// The user's side of the primary key.
#[derive(Clone, Debug, Default)]
pub struct PrimaryStatus {
    /// Credits.
    pub balance: i64,
    /// The primary key, unless it was revoked.
    pub key: Option<Key>,
}

/// Finds a key by its hash.
///
/// # Errors
/// Those of the database.
pub async fn find_by_hash(pool: &PgPool, hash: &KeyHash) -> Result<Option<Found>, ApiError> {
    let row = sqlx::query!(
        r#"select k.id, k.owner_id, s.generation as "generation!", k.scopes,
            k.rate_limits as "rate_limits: Json<Vec<StoredLimit>>", k.cost, least(k.expires_at, s.ends_at) as expires_at,
            k.disabled, k.quota_exceeded, k.credits_exhausted, k.revoked_at,
            coalesce(k.plan_number, k.owner_plan_number) as plan_number, k.role_numbers, k.networks, k.quota_starter,
            k.quota_turn, k.quota_resets_at, k.credits_starter, k.credits_turn, p.email,
            k.plan_number as own_plan, k.quota as "quota: Json<Quota>"
        from (
            select id, generation, null::timestamptz as ends_at from api_keys where hash = $1
            union all
            select key_id, generation, ends_at from retired_secrets where hash = $1
        ) s
        join api_keys k on k.id = s.id join user_preferences p on p.id = k.owner_id"#,
        hash.0.as_slice()
    )
    .fetch_optional(pool)
    .await?;
    Ok(row.map(|row| {
        let own = Own { plan: row.own_plan, quota: row.quota.map(|quota| quota.0) };
        Found { record: record_of!(row), email: row.email, own }
    }))
}

/// A key that was made.
#[derive(Debug)]
pub struct Made {
    /// The key.
    pub key: Key,
    /// Its secret, which nobody can ask for later.
    pub secret: Secret,
    /// What it may, if that is known without asking.
    pub permitted: Option<Permitted>,
}

/// Makes a key.
///
/// # Errors
/// Those of the database and of the operating system's randomness.
pub async fn create(connection: &mut PgConnection, actor: &Actor, new: NewKey) -> Result<Made, ApiError> {
    let secret = generate(new.kind)?;
    let user = lock_user(connection, &new.email).await?;
    allow(connection, user.id, &new).await?;
    let permissions = new.permissions.resolve(connection).await?;
    let id = Uuid::now_v7();
    // The key comes last: it takes the lock that orders the changes of all keys.
    audit::note(connection, actor, Deed::to_key("key.create", id, told(&new))).await?;
    let row = insert(connection, id, user.id, &new, &permissions, &secret).await?;
    let permitted = row.is_plain(&permissions).then(|| Permitted::plain(new.scopes.as_slice(), row.cost));
    let key = Key {
        id,
        owner_id: user.id,
        email: new.email.as_str().into(),
        name: new.name.as_str().into(),
        prefix: secret.display_prefix(),
        scopes: new.scopes.as_slice().into(),
        rate_limits: Json(new.rate_limits),
        generation: row.generation,
        version: row.version,
        disabled: false,
        disabled_by_admin: false,
        created_at: row.created_at,
        expires_at: new.expires_at,
        revoked_at: None,
        last_used_at: None,
        usage_count: 0,
    };
    Ok(Made { key, secret, permitted })
}

/// What the audit trail tells of a new key.
fn told(new: &NewKey) -> serde_json::Value {
    json!({
        "email": new.email.as_str(), "name": new.name.as_str(), "scopes": new.scopes.as_slice(),
        "expires_at": new.expires_at.map(Timestamp::from),
    })
}

/// Makes the user's primary key anew; the one before it dies with the same commit. `may` judges by its scopes whether it
/// may.
///
/// # Errors
/// Those of `may`, of the database and of the operating system's randomness.
pub async fn replace_primary(
    connection: &mut PgConnection,
    actor: &Actor,
    new: &NewKey,
    may: impl Fn(&[String]) -> Result<(), ApiError>,
) -> Result<Secret, ApiError> {
    let secret = generate(new.kind)?;
    let user = lock_user(connection, &new.email).await?;
    allow(connection, user.id, new).await?;
    let permissions = new.permissions.resolve(connection).await?;
    if let Some(old) = user.primary_key_id {
        revoke_row(connection, actor, old, may).await?;
    }
    let id = Uuid::now_v7();
    insert(connection, id, user.id, new, &permissions, &secret).await?;
    sqlx::query!("update user_preferences set primary_key_id = $2 where id = $1", user.id, id)
        .execute(&mut *connection)
        .await?;
    audit::note(connection, actor, Deed::to_key("key.generate", id, told(new))).await?;
    Ok(secret)
}

/// Enters a key that was given from outside, unless it is there already; a key that is there stays as it is. Says
/// whether it was entered.
///
/// # Errors
/// Those of the database.
pub async fn insert_given(
    pool: &PgPool,
    secret: &Secret,
    name: &KeyName,
    scopes: &Scopes,
    email: &Email,
) -> Result<bool, ApiError> {
    transact(pool, async |connection| {
        let user = lock_user(connection, email).await?;
        let hash = secret.hash();
        let there = sqlx::query_scalar!(
            r#"select exists (select from api_keys where hash = $1) as "there!""#,
            hash.0.as_slice()
        )
        .fetch_one(&mut *connection)
        .await?;
        if !there {
            let new = NewKey { scopes: scopes.clone(), ..NewKey::plain(email.clone(), name.clone()) };
            let id = Uuid::now_v7();
            insert(connection, id, user.id, &new, &Resolved::default(), secret).await?;
            audit::note(connection, &Actor::system(), Deed::to_key("key.create", id, told(&new))).await?;
        }
        Ok(!there)
    })
    .await
}

/// A key that nobody else changes until the transaction ends.
#[derive(Debug)]
pub struct Held(Key);

impl std::ops::Deref for Held {
    type Target = Key;

    fn deref(&self) -> &Key {
        &self.0
    }
}

/// Holds a key: takes the lock that orders all changes that filters see, then reads the key. Takes no revision: if nothing
/// is changed then, no filter is woken.
///
/// # Errors
/// Those of the database.
pub async fn hold(connection: &mut PgConnection, id: Uuid) -> Result<Option<Held>, ApiError> {
    lock_store(connection).await?;
    Ok(get(connection, id).await?.map(Held))
}

/// Takes the lock of `store_state`.
pub(super) async fn lock_store(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query!("select one from store_state for no key update").fetch_one(connection).await.map(|_| ())
}

/// Reads one key.
///
/// # Errors
/// Those of the database.
pub async fn get(executor: impl PgExecutor<'_>, id: Uuid) -> Result<Option<Key>, ApiError> {
    let key = sqlx::query_as!(
        Key,
        r#"select id as "id!", owner_id as "owner_id!", email as "email!", name as "name!", prefix, scopes as "scopes!",
            rate_limits as "rate_limits!: Json<Vec<StoredLimit>>", generation as "generation!", version as "version!",
            disabled as "disabled!", disabled_by_admin as "disabled_by_admin!", created_at as "created_at!", expires_at,
            revoked_at, last_used_at, usage_count as "usage_count!"
        from keys_with_usage where id = $1"#,
        id
    )
    .fetch_optional(executor)
    .await?;
    Ok(key)
}

/// Reads a user's balance and primary key. One statement finds the key, so that a key that is being replaced is there before
/// and after. An unknown user has neither.
///
/// # Errors
/// Those of the database.
pub async fn primary(pool: &PgPool, email: &Email) -> Result<PrimaryStatus, ApiError> {
    let balance = sqlx::query_scalar!("select balance from user_preferences where email = $1", email.as_str())
        .fetch_optional(pool)
        .await?;
    let Some(balance) = balance else { return Ok(PrimaryStatus::default()) };
    let key = sqlx::query_as!(
        Key,
        r#"select id as "id!", owner_id as "owner_id!", email as "email!", name as "name!", prefix, scopes as "scopes!",
            rate_limits as "rate_limits!: Json<Vec<StoredLimit>>", generation as "generation!", version as "version!",
            disabled as "disabled!", disabled_by_admin as "disabled_by_admin!", created_at as "created_at!", expires_at,
            revoked_at, last_used_at, usage_count as "usage_count!"
        from keys_with_usage
        where id = (select primary_key_id from user_preferences where email = $1) and revoked_at is null"#,
        email.as_str()
    )
    .fetch_optional(pool)
    .await?;
    Ok(PrimaryStatus { balance, key })
}

/// A user whose row is held.
pub(crate) struct User {
    pub(crate) id: Uuid,
    primary_key_id: Option<Uuid>,
    /// Of what is set of them; none of a user who was made just now.
    pub(crate) version: Option<i64>,
}

/// Finds or makes the user and holds their row until the transaction ends.
pub(crate) async fn lock_user(connection: &mut PgConnection, email: &Email) -> Result<User, ApiError> {
    let new = Uuid::now_v7();
    let user = sqlx::query!(
        "insert into user_preferences (id, email) values ($1, $2)
        on conflict (email) do update set email = excluded.email returning id, primary_key_id, version",
        new,
        email.as_str()
    )
    .fetch_one(connection)
    .await;
    let user = user.map_err(|error| match error.as_database_error().and_then(|error| error.constraint()) {
        // The database and Rust may differ about the lower case of a letter that is new to one of them.
        Some("user_preferences_email_lower") => ApiError::invalid("email", "must be in lower case"),
        _ => error.into(),
    })?;
    let version = Some(user.version).filter(|_| user.id != new);
    Ok(User { id: user.id, primary_key_id: user.primary_key_id, version })
}

/// Refuses a key beyond what its owner, whose row is held, may make in a day.
async fn allow(connection: &mut PgConnection, owner_id: Uuid, new: &NewKey) -> Result<(), ApiError> {
    match new.per_day {
        Some(per_day) => allowance::take(connection, owner_id, Act::Make, per_day).await,
        None => Ok(()),
    }
}

struct Inserted {
    generation: i32,
    version: i64,
    created_at: OffsetDateTime,
    cost: i32,
    owner_plan_number: Option<i32>,
}

impl Inserted {
    /// Whether nothing applies to it but what stands in its own row.
    const fn is_plain(&self, permissions: &Resolved) -> bool {
        permissions.is_nothing() && self.owner_plan_number.is_none()
    }
}

async fn insert(
    connection: &mut PgConnection,
    id: Uuid,
    owner_id: Uuid,
    new: &NewKey,
    permissions: &Resolved,
    secret: &Secret,
) -> Result<Inserted, ApiError> {
    if let Some(most) = new.at_most {
        let live = sqlx::query_scalar!(
            r#"select count(*) as "live!" from api_keys
            where owner_id = $1 and revoked_at is null and (expires_at is null or expires_at > now())"#,
            owner_id
        )
        .fetch_one(&mut *connection)
        .await?;
        if live >= most {
            let detail = format!("This user has {most} live keys. Revoke one that is not needed, or ask an admin.");
            return Err(ApiError::Conflict(detail));
        }
    }
    let inserted = sqlx::query_as!(
        Inserted,
        "insert into api_keys (id, owner_id, name, hash, prefix, scopes, rate_limits, expires_at)
        values ($1, $2, $3, $4, $5, $6, $7, $8) returning generation, version, created_at, cost, owner_plan_number",
        id,
        owner_id,
        new.name.as_str(),
        &secret.hash().0[..],
        secret.display_prefix(),
        new.scopes.as_slice(),
        Json(&new.rate_limits) as _,
        new.expires_at
    )
    .fetch_one(&mut *connection)
    .await;
    let inserted = inserted.map_err(|error| match error.as_database_error().and_then(|error| error.constraint()) {
        Some("api_keys_hash_key") => ApiError::Conflict("this key exists already".into()),
        _ => error.into(),
    })?;
    // The lock that orders all changes is held from here to the end: nothing is asked that is known.
    if !inserted.is_plain(permissions) {
        permit(connection, id, permissions).await?;
    }
    // Keys that expire do so without a call: the next key that a user makes has filters forget the oldest.
    if new.per_day.is_some() {
        forget_ended(connection, owner_id).await?;
    }
    Ok(inserted)
}

/// Makes a secret, which nobody knows yet.
///
/// # Errors
/// Those of the operating system's randomness.
pub fn generate(kind: KeyKind) -> Result<Secret, ApiError> {
    Secret::generate(kind, &mut getrandom::SysRng)
        .map_err(|error| ApiError::Internal(format!("the operating system gives no random bytes: {error}")))
}
