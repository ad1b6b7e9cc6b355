//! The feed, which reads changes of keys from the database: every change, in the order of commits, and of one database
//! only.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::{Fixture, change_key, execute, lock_wait, revision, revoke, rows, scalar, writer};
use crate::sync::{Reader, in_step, received, synced};
use contract::hash::{BUCKETS, KeyHash};
use contract::id::Epoch;
use contract::record::Flags;
use contract::update::Part;
use control_plane::audit::Actor;
use control_plane::domain::Patch;
use control_plane::keys::lock::lock_key;
use control_plane::keys::permissions::ResolvedPermissions;
use control_plane::keys::purge::forget_old;
use control_plane::keys::read;
use control_plane::keys::update::{KeyPatch, update};
use control_plane::sync::feed;
use portcullis_tests::wait::DEADLINE;
use sqlx::PgPool;

#[sqlx::test(migrations = "./migrations")]
async fn a_reader_at_a_revision_has_every_change_up_to_it(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let writers: Vec<_> = (0..8)
        .map(|writer| {
            let pool = pool.clone();
            tokio::spawn(async move {
                for number in 0..25 {
                    let (id, _) = crate::support::key(&pool, &format!("{writer}@example.com"), &[]).await;
                    if number % 3 == 0 {
                        revoke(&pool, id).await;
                    }
                }
            })
        })
        .collect();
    let mut reader = Reader::default();
    loop {
        let finished = writers.iter().all(tokio::task::JoinHandle::is_finished);
        let now = if finished { fixture.in_step().await } else { 0 };
        if !finished || reader.revision < now {
            reader.follow(&fixture, &sync).await;
        }
        // Every key whose last change has a revision that the reader has seen is with the reader, in that state.
        let seen: Vec<(Vec<u8>, bool)> = rows(
            &pool,
            format!("select hash, revoked_at is not null from api_keys where revision <= {}", reader.revision),
        )
        .await;
        for (hash, revoked) in seen {
            let record = reader.keys.get(&KeyHash(hash.try_into().unwrap())).expect("a key that was seen");
            assert!(!revoked || record.flags.contains(Flags::REVOKED));
        }
        if finished && reader.revision >= now {
            break;
        }
    }
    assert_eq!(reader.keys.len(), 1 + 8 * 25);
}

/// Each change is of one key, and the n-th sets the cost of a request to n. So the revision alone determines the state of the
/// database.
#[sqlx::test(migrations = "./migrations")]
async fn a_reader_at_a_revision_has_what_the_database_was_then_and_nothing_newer(pool: PgPool) {
    const KEYS: u64 = 8;
    const LOOKS: usize = 200;
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let mut ids = Vec::new();
    for number in 0..KEYS {
        ids.push(fixture.key(&format!("user{number}@example.com"), &[]).await.0);
    }
    let first = fixture.in_step().await;
    let mut reader = synced(&fixture, &sync).await;
    assert_eq!(reader.revision, first);
    let enough = Arc::new(AtomicBool::new(false));
    let writes = tokio::spawn({
        let enough = Arc::clone(&enough);
        async move {
            let mut changes = 0;
            while !enough.load(Ordering::Relaxed) {
                changes += 1;
                let id = ids[usize::try_from(changes % KEYS).unwrap()];
                let cost = i32::try_from(changes).unwrap();
                execute(&pool, format!("update api_keys set cost = '{cost}' where id = '{id}'")).await;
            }
            (ids, changes)
        }
    });
    let mut seen = Vec::new();
    while seen.len() < LOOKS {
        reader.follow(&fixture, &sync).await;
        seen.push((reader.revision - first, reader.keys.clone()));
    }
    enough.store(true, Ordering::Relaxed);
    let (ids, changes) = writes.await.unwrap();
    while reader.revision < first + changes {
        reader.follow(&fixture, &sync).await;
        seen.push((reader.revision - first, reader.keys.clone()));
    }
    for (changes, keys) in seen {
        for record in keys.values() {
            let Some(place) = ids.iter().position(|id| record.key_id == (*id).into()) else { continue };
            // The last of the changes so far that was of this key.
            let last = (0..KEYS).filter_map(|back| changes.checked_sub(back)).find(|n| n % KEYS == place as u64);
            assert_eq!(u64::from(record.cost), last.filter(|n| *n > 0).unwrap_or(1), "after {changes} changes");
        }
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn however_many_keys_a_statement_changes_a_reader_has_them_all(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    for _ in 0..70 {
        fixture.key("many@example.com", &[]).await;
    }
    fixture.in_step().await;
    let mut reader = synced(&fixture, &sync).await;
    for (cost, number) in [(2_i32, 1), (3, 63), (4, 64), (5, 65), (6, 70)] {
        let sql = format!(
            "update api_keys set cost = '{cost}' where id in (select id from api_keys order by id limit '{number}')
            returning hash"
        );
        let changed: Vec<(Vec<u8>,)> = rows(&pool, sql).await;
        assert_eq!(changed.len() as i64, number);
        fixture.in_step().await;
        reader.follow(&fixture, &sync).await;
        for (hash,) in changed {
            assert_eq!(reader.keys[&KeyHash(hash.try_into().unwrap())].cost, cost.cast_unsigned());
        }
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn a_replica_that_has_not_heard_of_a_new_epoch_does_not_send_the_old_keys_again(pool: PgPool) {
    let (ahead, behind) = (Fixture::new(&pool).await, Fixture::new(&pool).await);
    let (_, sync) = ahead.key("operator@example.com", &["sync"]).await;
    let (revoked, secret) = ahead.key("a@example.com", &[]).await;
    ahead.in_step().await;
    behind.in_step().await;
    behind.stop_feed();
    let old = synced(&behind, &sync).await.epoch;
    revoke(&pool, revoked).await;
    let new = feed::new_epoch(&pool).await.unwrap();
    ahead.app.feed.refresh(None).await.unwrap();
    let mut reader = synced(&ahead, &sync).await;
    assert_eq!(reader.epoch, Some(new.into()));

    let uri = reader.poll();
    if let Ok(reply) = tokio::time::timeout(Duration::from_secs(1), behind.get(&uri, &sync)).await {
        reader.apply(&reply);
    }
    assert_ne!(reader.epoch, old);
    assert!(reader.keys[&secret.hash()].flags.contains(Flags::REVOKED));
    assert_eq!(behind.app.store.position().map(|(epoch, _)| epoch), reader.epoch);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_replica_without_its_database_keeps_readers_where_they_are(pool: PgPool) {
    let mut fixture = Fixture::new(&pool).await;
    let (_, sync) = fixture.key("operator@example.com", &["sync"]).await;
    fixture.in_step().await;
    let ours = synced(&fixture, &sync).await;
    fixture.stop_feed();
    fixture.shorten_polls();
    pool.close().await;
    let another = Epoch([9; 16]);
    for (epoch, revision) in [(ours.epoch.unwrap(), ours.revision + 5), (another, 1)] {
        let uri = format!("/sync/v1/keys?epoch={epoch}&revision={revision}");
        let header = received(&fixture, &uri, &sync).await;
        assert_eq!(
            (header.epoch, header.revision, header.part),
            (epoch, revision, Part::Changes { after: revision }),
            "{uri}"
        );
    }
    let uri = format!("/sync/v1/keys?epoch={another}&cursor=700");
    let reply = fixture.get(&uri, &sync).await;
    assert_eq!((reply.status, reply.header("retry-after")), (503, "1"));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_role_without_rights_on_the_server_still_identifies_its_database(pool: PgPool) {
    let restricted = "
        do $$ begin create role portcullis_restricted login; exception when duplicate_object or unique_violation then null;
        end $$;
        revoke execute on function pg_control_system() from public;
        grant select, update on store_state to portcullis_restricted;";
    sqlx::raw_sql(restricted).execute(&pool).await.unwrap();
    let options = pool.connect_options().as_ref().clone().username("portcullis_restricted");
    let theirs = PgPool::connect_with(options).await.unwrap();
    let epoch = async || sqlx::query_scalar::<_, uuid::Uuid>("select epoch from store_state").fetch_one(&pool).await;
    feed::identify(&theirs).await.unwrap();
    let drawn = epoch().await.unwrap();
    feed::identify(&theirs).await.unwrap();
    assert_eq!(epoch().await.unwrap(), drawn);
    let identity: String = scalar(&pool, "select identity from store_state").await;
    let parts: Vec<_> = identity.split('/').collect();
    assert!(parts.len() == 3 && parts[0] == "hidden" && parts[1] == "00000001", "{identity}");
    assert!(parts[2].parse::<u32>().is_ok(), "{identity}");
}

#[sqlx::test(migrations = "./migrations")]
async fn a_lost_connection_makes_the_feed_ask_who_the_database_is(pool: PgPool) {
    let fixture = Fixture::new(&pool).await;
    let (old, _) = fixture.app.store.position().unwrap();
    execute(&pool, "update store_state set identity = 'another'").await;
    let mut positions = fixture.app.store.positions();
    // Nothing else fails: the listening connection alone goes, as if the server had been replaced in a moment.
    let gone = "select pg_terminate_backend(pid) from pg_stat_activity
        where datname = current_database() and query ilike 'listen%'";
    while sqlx::query(gone).execute(&pool).await.unwrap().rows_affected() == 0 {
        tokio::task::yield_now().await;
    }
    let found = positions.wait_for(|at| at.is_some_and(|(epoch, _)| epoch != old));
    tokio::time::timeout(DEADLINE, found).await.expect("a new epoch begins").unwrap();
}

#[sqlx::test(migrations = "./migrations")]
async fn a_database_that_goes_back_or_is_another_begins_a_new_epoch(pool: PgPool) {
    let (fixture, sync, reader) = in_step(&pool).await;
    let old = reader.epoch.unwrap();
    let mut positions = fixture.app.store.positions();

    // As after a restore of older files: the revision is lower than it was.
    execute(&pool, "update store_state set revision = 0").await;
    fixture.app.store.waker().wake();
    let (second, _) = positions.wait_for(|at| at.is_some_and(|(epoch, _)| epoch != old)).await.unwrap().unwrap();
    assert_ne!(synced(&fixture, &sync).await.epoch, Some(old));

    // As after a restore of a dump: the epoch was drawn for another server.
    execute(&pool, "update store_state set identity = 'another'").await;
    feed::identify(&pool).await.unwrap();
    fixture.app.store.waker().wake();
    positions.wait_for(|at| at.is_some_and(|(epoch, _)| epoch != second)).await.unwrap();

    // And the same server does not.
    let before: uuid::Uuid = scalar(&pool, "select epoch from store_state").await;
    feed::identify(&pool).await.unwrap();
    let after: uuid::Uuid = scalar(&pool, "select epoch from store_state").await;
    assert_eq!(before, after);
}

#[sqlx::test(migrations = "./migrations")]
async fn keys_that_were_revoked_or_expired_long_ago_are_forgotten_and_their_rows_stay(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (id, secret) = fixture.key("a@example.com", &[]).await;
    revoke(&pool, id).await;
    let (expired, expired_secret) = fixture.key("a@example.com", &[]).await;
    let expire = async |days: i32| {
        let expire = "update api_keys set expires_at = now() - make_interval(days => $2) where id = $1";
        sqlx::query(expire).bind(expired).bind(days).execute(&pool).await.unwrap();
    };
    expire(29).await;
    fixture.in_step().await;
    let mut reader = synced(&fixture, &sync).await;
    assert!(reader.keys.contains_key(&expired_secret.hash()));
    assert!(reader.keys[&secret.hash()].flags.contains(Flags::REVOKED));
    assert_eq!(forget_old(&pool, 30).await.unwrap(), 0);
    change_key(&pool, id, "revoked_at = now() - interval '31 days'").await;
    expire(31).await;
    assert_eq!(forget_old(&pool, 30).await.unwrap(), 2);
    fixture.in_step().await;
    let header = reader.follow(&fixture, &sync).await;
    assert_eq!((reader.keys.contains_key(&secret.hash()), header.total_keys), (false, 1));
    assert!(!reader.keys.contains_key(&expired_secret.hash()));
    assert_eq!(read::get(&pool, id).await.unwrap().unwrap().id, id);

    // A control plane that starts now does not know the key, and a reader from before gets a snapshot.
    let restarted = Fixture::new(&pool).await;
    let uri = format!("/sync/v1/keys?epoch={}&revision=1", header.epoch);
    let header = received(&restarted, &uri, &sync).await;
    assert!(matches!(header.part, Part::Snapshot { .. }));
}

#[sqlx::test(migrations = "./migrations")]
async fn an_ended_key_that_gets_a_later_end_while_filters_forget_ended_keys_stays(pool: PgPool) {
    let (id, _) = crate::support::key(&pool, "a@example.com", &[]).await;
    let end = "update api_keys set expires_at = now() + make_interval(days => $2) where id = $1";
    sqlx::query(end).bind(id).bind(-31).execute(&pool).await.unwrap();
    let mut change = pool.begin().await.unwrap();
    sqlx::query(end).bind(id).bind(1).execute(&mut *change).await.unwrap();
    let forgetting = tokio::spawn({
        let pool = pool.clone();
        async move { forget_old(&pool, 30).await }
    });
    // It read the key as it was, and waits for the change.
    lock_wait(&pool).await;
    change.commit().await.unwrap();
    assert_eq!(forgetting.await.unwrap().unwrap(), 0);
    assert!(!scalar::<bool>(&pool, format!("select withdrawn from api_keys where id = '{id}'")).await);
}

#[sqlx::test(migrations = "./migrations")]
async fn the_hash_of_a_key_never_changes(pool: PgPool) {
    crate::support::key(&pool, "a@example.com", &[]).await;
    let change = "update api_keys set hash = sha256('another')";
    let error = sqlx::query(change).execute(&pool).await.unwrap_err().to_string();
    assert!(error.contains("retire the secret and give the key a new one"), "{error}");
}

#[sqlx::test(migrations = "./migrations")]
async fn a_change_without_effect_raises_no_revision(pool: PgPool) {
    let (id, _) = crate::support::key(&pool, "a@example.com", &[]).await;
    revoke(&pool, id).await;
    let (live, _) = crate::support::key(&pool, "a@example.com", &[]).await;
    let before = revision(&pool).await;
    assert_eq!(forget_old(&pool, 30).await.unwrap(), 0);
    revoke(&pool, id).await;
    let same = KeyPatch { disabled: Some(false), expires_at: Patch::Clear, ..KeyPatch::default() };
    let (writer, actor) = (writer(&pool), Actor::system());
    let changed = writer.change(&actor, async |change| {
        let key = lock_key(change, live).await?.unwrap();
        update(change, true, &key, same, &ResolvedPermissions::default()).await
    });
    changed.await.unwrap();
    assert_eq!(revision(&pool).await, before);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_lagging_replica_looks_before_it_continues_a_snapshot(pool: PgPool) {
    let behind = Fixture::new(&pool).await;
    let (_, sync) = behind.key("operator@example.com", &["sync"]).await;
    behind.in_step().await;
    behind.stop_feed();
    let (epoch, at) = behind.app.store.position().unwrap();
    let continued = async |epoch: Epoch, least: u64| {
        let uri = format!("/sync/v1/keys?epoch={epoch}&cursor=700&revision={least}");
        behind.get(&uri, &sync).await
    };

    // Recent enough: it does not look.
    let (newer, _) = behind.key("a@example.com", &[]).await;
    let header = Reader::default().apply(&continued(epoch, at).await);
    assert_eq!((header.revision, header.part), (at, Part::Snapshot { from: 700, to: BUCKETS }));

    // Behind: it looks, and goes on.
    revoke(&pool, newer).await;
    let now = revision(&pool).await;
    let header = Reader::default().apply(&continued(epoch, now).await);
    assert_eq!((header.revision, header.part), (now, Part::Snapshot { from: 700, to: BUCKETS }));

    // The database itself is behind: it was restored, and the snapshot starts over.
    let header = Reader::default().apply(&continued(epoch, now + 5).await);
    assert_eq!((header.revision, header.part), (now, Part::Snapshot { from: 0, to: BUCKETS }));

    // So it does with the epoch that begins then.
    execute(&pool, "update store_state set revision = revision - 1").await;
    let header = Reader::default().apply(&continued(epoch, now + 5).await);
    assert_eq!((header.epoch == epoch, header.part), (false, Part::Snapshot { from: 0, to: BUCKETS }));
    let epoch = header.epoch;

    // It cannot look: the reader waits.
    pool.close().await;
    let reply = continued(epoch, now + 5).await;
    assert_eq!((reply.status, reply.header("retry-after")), (503, "1"));
    assert_eq!(continued(epoch, now - 1).await.status, 200);
}
