//! Sync with filters: snapshots, changes and held polls.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::support::{EARLY, Fixture, Reply, execute, revision, revoke, rows};
use contract::hash::{BUCKETS, KeyHash};
use contract::id::Epoch;
use contract::key::Secret;
use contract::record::{Flags, Record};
use contract::update::{Entry, Header, Part, Update, UpdateView};
use sqlx::PgPool;

/// A reader as simple as can be: applies updates to a map.
#[derive(Default)]
pub(crate) struct Reader {
    pub(crate) keys: BTreeMap<KeyHash, Record>,
    pub(crate) epoch: Option<Epoch>,
    pub(crate) revision: u64,
}

impl Reader {
    pub(crate) fn apply(&mut self, reply: &Reply) -> Header {
        assert_eq!((reply.status, reply.header("content-type")), (200, "application/vnd.portcullis.update"));
        let update = Update::read(&reply.body).unwrap();
        if let Part::Snapshot { from, to } = update.header.part {
            self.keys.retain(|hash, _| !(from..to).contains(&u32::from(hash.bucket())));
        }
        for entry in update.entries() {
            match entry {
                Entry::Put { hash, record } => {
                    self.keys.insert(hash, Record::from_bytes(&record).unwrap());
                }
                Entry::Remove { hash } => {
                    self.keys.remove(&hash);
                }
                Entry::Define { .. } | Entry::Undefine { .. } => {
                    panic!("there are no roles and plans")
                }
            }
        }
        self.epoch = Some(update.header.epoch);
        self.revision = update.header.revision;
        update.header
    }

    pub(crate) fn poll(&self) -> String {
        match self.epoch {
            None => "/sync/v1/keys".into(),
            Some(epoch) => format!("/sync/v1/keys?epoch={epoch}&revision={}", self.revision),
        }
    }

    pub(crate) async fn follow(&mut self, fixture: &Fixture, sync: &Secret) -> Header {
        let reply = fixture.get(&self.poll(), sync).await;
        self.apply(&reply)
    }
}

/// The header of an update that a reader without keys receives.
pub(crate) async fn received(fixture: &Fixture, uri: &str, sync: &Secret) -> Header {
    Reader::default().apply(&fixture.get(uri, sync).await)
}

pub(crate) async fn synced(fixture: &Fixture, sync: &Secret) -> Reader {
    let mut reader = Reader::default();
    let header = reader.follow(fixture, sync).await;
    assert_eq!(header.part, Part::Snapshot { from: 0, to: BUCKETS });
    reader
}

/// A fixture, the key of a filter, and a reader that has every key.
pub(crate) async fn in_step(pool: &PgPool) -> (Fixture, Secret, Reader) {
    let (fixture, sync) = Fixture::with_sync(pool).await;
    fixture.in_step().await;
    let reader = synced(&fixture, &sync).await;
    (fixture, sync, reader)
}

async fn stored(pool: &PgPool) -> BTreeMap<KeyHash, bool> {
    let rows: Vec<(Vec<u8>, bool)> =
        rows(pool, "select hash, revoked_at is not null from api_keys where not withdrawn").await;
    rows.into_iter().map(|(hash, revoked)| (KeyHash(hash.try_into().unwrap()), revoked)).collect()
}

#[sqlx::test(migrations = "./migrations")]
async fn a_snapshot_and_the_changes_after_it_are_the_table(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (first, _) = fixture.key("a@example.com", &["orders:read"]).await;
    fixture.in_step().await;
    let mut reader = synced(&fixture, &sync).await;
    assert_eq!(reader.keys.len(), 2);

    fixture.key("b@example.com", &[]).await;
    revoke(&pool, first).await;
    fixture.in_step().await;
    let header = reader.follow(&fixture, &sync).await;
    assert!(matches!(header.part, Part::Changes { .. }));
    assert_eq!((header.total_keys, header.revision), (3, revision(&pool).await));
    let read: BTreeMap<_, _> =
        reader.keys.iter().map(|(hash, record)| (*hash, record.flags.contains(Flags::REVOKED))).collect();
    assert_eq!(read, stored(&pool).await);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_poll_is_held_until_a_key_changes(pool: PgPool) {
    let (fixture, sync, mut reader) = in_step(&pool).await;
    let uri = reader.poll();
    let mut poll = Box::pin(fixture.get(&uri, &sync));
    // The poll is under way and has no answer.
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut poll).await.is_err());
    let (id, secret) = fixture.key("a@example.com", &[]).await;
    let reply = tokio::time::timeout(EARLY, poll).await.expect("the change ends the poll");
    reader.apply(&reply);
    assert_eq!(reader.keys[&secret.hash()].key_id, id.into());
}

#[sqlx::test(migrations = "./migrations")]
async fn a_reader_that_does_not_want_to_wait_is_told_at_once_that_it_has_everything(pool: PgPool) {
    let (fixture, sync, mut reader) = in_step(&pool).await;
    let after = reader.revision;
    let uri = format!("{}&wait=0", reader.poll());
    let reply = tokio::time::timeout(EARLY, fixture.get(&uri, &sync)).await.expect("the answer comes at once");
    assert_eq!(reader.apply(&reply).part, Part::Changes { after });
}

#[sqlx::test(migrations = "./migrations")]
async fn held_polls_end_at_once_when_the_process_ends(pool: PgPool) {
    let (fixture, sync, mut reader) = in_step(&pool).await;
    let before = (reader.revision, reader.keys.clone());
    let uri = reader.poll();
    let mut poll = Box::pin(fixture.get(&uri, &sync));
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut poll).await.is_err());
    fixture.stop();
    let reply = tokio::time::timeout(EARLY, poll).await.expect("the stop ends the poll");
    let header = reader.apply(&reply);
    assert_eq!(header.part, Part::Changes { after: before.0 });
    assert_eq!((reader.revision, reader.keys), before);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_snapshot_of_several_updates_holds_every_key_once(pool: PgPool) {
    let (_, sync) = crate::support::key(&pool, "operator@example.com", &["sync"]).await;
    let sql = "insert into api_keys (id, owner_id, name, hash)
        select gen_random_uuid(), (select id from user_preferences limit 1), 'bulk', sha256(n::text::bytea)
        from generate_series(1, 40000) n";
    execute(&pool, sql).await;
    let fixture = Fixture::new(&pool).await;
    let mut reader = Reader::default();
    let mut updates = 1;
    let mut header = reader.apply(&fixture.get("/sync/v1/keys", &sync).await);
    while let Part::Snapshot { to, .. } = header.part
        && to < BUCKETS
    {
        let uri = format!("/sync/v1/keys?epoch={}&cursor={to}", header.epoch);
        let reply = fixture.get(&uri, &sync).await;
        assert!(reply.body.len() < 1_100_000, "an update of {} bytes", reply.body.len());
        header = reader.apply(&reply);
        assert!(matches!(header.part, Part::Snapshot { from, .. } if from == to));
        updates += 1;
    }
    assert!(updates > 1);
    assert_eq!(reader.keys.into_keys().collect::<Vec<_>>(), stored(&pool).await.into_keys().collect::<Vec<_>>());
}

#[sqlx::test(migrations = "./migrations")]
async fn a_reader_of_another_epoch_or_of_the_future_gets_a_snapshot(pool: PgPool) {
    let (fixture, sync, reader) = in_step(&pool).await;
    let epoch = reader.epoch.unwrap();
    for uri in [
        "/sync/v1/keys?epoch=00000000-0000-0000-0000-000000000001&revision=1".to_owned(),
        format!("/sync/v1/keys?epoch={epoch}&revision={}", reader.revision + 5),
        "/sync/v1/keys?epoch=00000000-0000-0000-0000-000000000001&cursor=700".to_owned(),
    ] {
        let header = received(&fixture, &uri, &sync).await;
        assert_eq!((header.epoch, header.part), (epoch, Part::Snapshot { from: 0, to: BUCKETS }), "{uri}");
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn an_invalid_poll_is_refused_with_its_field(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    for (query, field) in [
        ("revision=1", Some("epoch")),
        ("cursor=1", Some("epoch")),
        ("epoch=00000000-0000-0000-0000-000000000001&cursor=65536", Some("cursor")),
        ("epoch=nonsense&revision=1", None),
        ("revision=-1", None),
    ] {
        let reply = fixture.get(&format!("/sync/v1/keys?{query}"), &sync).await;
        assert_eq!(reply.status, 400, "{query}");
        if let Some(field) = field {
            assert_eq!(reply.json()["field"], field, "{query}");
        }
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn a_poll_may_name_its_reporter_and_version(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let uri = "/sync/v1/keys?reporter=00000000-0000-0000-0000-000000000001&version=7";
    let reply = fixture.get(uri, &sync).await;
    assert_eq!(Update::read(&reply.body).unwrap().header.part, Part::Snapshot { from: 0, to: BUCKETS });
}

#[sqlx::test(migrations = "./migrations")]
async fn people_can_read_an_update_as_json(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    fixture.in_step().await;
    let json = [("accept", "application/json")];
    let reply = fixture.call_with("GET", "/sync/v1/keys", &sync, None, &json).await;
    let view: UpdateView = serde_json::from_value(reply.json()).unwrap();
    let binary = fixture.get("/sync/v1/keys", &sync).await;
    assert_eq!(view, Update::read(&binary.body).unwrap().view().unwrap());
}
