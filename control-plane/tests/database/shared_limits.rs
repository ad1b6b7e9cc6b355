//! Envoys together never admit more than a limit allows, and all of it.

use crate::support::gateway::{Gateway, end_alone, gateways};
use crate::support::{Fixture, change_key, execute, id_of, row, scalar, scalars};
use contract::id::{KeyId, OwnerId};
use contract::key::Secret;
use contract::rate::{Rate, tag};
use contract::record::{Per, RateLimit};
use limits::holding::Limited;
use limits::pool::{Kind, PoolId, owner_tag};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

fn limit() -> RateLimit {
    RateLimit { name: "a".into(), requests: 10, window_s: 100_000, burst: 10, shared: true, per: Per::Key }
}

fn quota_of(key: Uuid) -> PoolId {
    PoolId { kind: Kind::Quota, subject: KeyId::from(key).into(), tag: 0 }
}

/// Requests in turn over all Envoys, until each Envoy has refused some. Some are recalled in between. Returns how many were admitted.
async fn exhaust(fixture: &Fixture, gateways: &mut [Gateway], key: Uuid, of: &[(PoolId, Limited<'_>, u64)]) -> u64 {
    let (mut admitted, mut refused) = (0, 0);
    for round in 0..1_000 {
        let place = round % gateways.len();
        if gateways[place].request(fixture, key, of).await {
            (admitted, refused) = (admitted + 1, 0);
        } else {
            refused += 1;
            // Those that hold something learn of a recall.
            for gateway in gateways.iter_mut() {
                gateway.call(fixture, &[]).await;
                gateway.call(fixture, &[]).await;
            }
            tokio::time::sleep(std::time::Duration::from_millis(15)).await;
        }
        if round % 5 == 4 {
            gateways[place].report(fixture).await;
        }
        if refused > 3 * gateways.len() {
            break;
        }
    }
    for gateway in gateways {
        gateway.report(fixture).await;
    }
    admitted
}

#[sqlx::test(migrations = "./migrations")]
async fn several_envoys_admit_exactly_what_a_limit_a_quota_and_credits_allow(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let mut envoys = gateways(&fixture, &sync, 3).await;
    let create = async |body: Value| id_of(&fixture.create(&admin, body).await.expect(201));
    let limited = create(json!({"rate_limits": [{"name": "a", "requests": 10, "window_seconds": 100_000}]})).await;
    let rate = Rate::of(&limit());
    let of_limit = PoolId { kind: Kind::Rate, subject: KeyId::from(limited).into(), tag: tag("a") };
    assert_eq!(exhaust(&fixture, &mut envoys, limited, &[(of_limit, Limited::Rate(&rate), 1)]).await, 10);

    let counted = create(json!({"quota": {"requests": 60, "period": "month"}})).await;
    let of_quota = (quota_of(counted), Limited::Stock { fill: 1 }, 1);
    assert_eq!(exhaust(&fixture, &mut envoys, counted, &[of_quota]).await, 60);
    let view = fixture.get(&format!("/v1/keys/{counted}/quota"), &admin).await.expect(200);
    assert_eq!((&view["used"], &view["held"], &view["exceeded"]), (&json!(60), &json!(0), &json!(true)));

    // Each request costs 7 of 100.
    let user = fixture.user("user@example.com").await;
    fixture.post(&format!("{user}/ledger"), &admin, json!({"amount": 100})).await.expect(201);
    let paid = create(json!({"cost": 7})).await;
    let owner: Uuid = scalar(&pool, format!("select owner_id from api_keys where id = '{paid}'")).await;
    let of_credits = (PoolId::of_credits(owner.into()), Limited::Stock { fill: 1 }, 7);
    assert_eq!(exhaust(&fixture, &mut envoys, paid, &[of_credits]).await, 14);
    let balance = fixture.get(&format!("{user}/balance"), &admin).await.expect(200);
    assert_eq!(balance["balance"], 2);
    // More credits are spent at once, as the fill says that there are more.
    fixture.post(&format!("{user}/ledger"), &admin, json!({"amount": 40})).await.expect(201);
    let fill: i32 = scalar(&pool, format!("select credits_fill from api_keys where id = '{paid}'")).await;
    let of_credits = (PoolId::of_credits(owner.into()), Limited::Stock { fill: fill.cast_unsigned() }, 7);
    assert_eq!(exhaust(&fixture, &mut envoys, paid, &[of_credits]).await, 6);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_quota_that_is_raised_lowered_or_renewed_admits_exactly_that(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let mut envoys = gateways(&fixture, &sync, 2).await;
    let key = id_of(&fixture.create(&admin, json!({"quota": {"requests": 20, "period": "day"}})).await.expect(201));
    let set = async |requests: i64| {
        let quota = json!({"quota": {"requests": requests, "period": "day"}});
        fixture.patch(&format!("/v1/keys/{key}"), &admin, quota).await.expect(200);
        let (fill, exceeded): (i32, bool) =
            row(&pool, format!("select quota_fill, quota_exceeded from api_keys where id = '{key}'")).await;
        (fill.cast_unsigned(), exceeded)
    };
    let of = |fill: u32| [(quota_of(key), Limited::Stock { fill }, 1)];
    assert_eq!(exhaust(&fixture, &mut envoys, key, &of(1)).await, 20);
    assert_eq!(set(50).await, (2, false));
    assert_eq!(exhaust(&fixture, &mut envoys, key, &of(2)).await, 30);
    // Lowered below what is used, and raised again.
    assert_eq!(set(40).await, (3, true));
    assert_eq!(exhaust(&fixture, &mut envoys, key, &of(3)).await, 0);
    assert_eq!(set(55).await, (4, false));
    assert_eq!(exhaust(&fixture, &mut envoys, key, &of(4)).await, 5);
    // The next day begins.
    execute(&pool, "update quota_use set window_start = window_start - interval '1 day', window_end = now()").await;
    for envoy in &mut envoys {
        envoy.holdings.clear();
    }
    assert_eq!(exhaust(&fixture, &mut envoys, key, &of(4)).await, 55);
}

#[sqlx::test(migrations = "./migrations")]
async fn an_envoy_that_was_alone_hands_over_to_a_second_one(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let key = id_of(&fixture.create(&admin, json!({"quota": {"requests": 100, "period": "day"}})).await.expect(201));
    let of = [(quota_of(key), Limited::Stock { fill: 1 }, 1)];
    let mut first = Gateway::new(1, &sync);
    for _ in 0..30 {
        assert!(first.request(&fixture, key, &of).await);
    }
    assert!(first.contact.alone_until_ms > 0);
    // Its workers tell their usage on each tick.
    first.call(&fixture, &[(quota_of(key), 0)]).await;
    let mut second = Gateway::new(2, &sync);
    second.call(&fixture, &[]).await;
    first.call(&fixture, &[(quota_of(key), 0)]).await;
    assert_eq!(first.contact.alone_until_ms, 0);
    end_alone(&pool).await;
    let mut both = [first, second];
    assert_eq!(exhaust(&fixture, &mut both, key, &of).await, 70);
    // It ends, and the other goes on with a raised quota.
    let [mut first, second] = both;
    first.end(&fixture).await;
    fixture
        .patch(&format!("/v1/keys/{key}"), &admin, json!({"quota": {"requests": 110, "period": "day"}}))
        .await
        .expect(200);
    let of = [(quota_of(key), Limited::Stock { fill: 2 }, 1)];
    assert_eq!(exhaust(&fixture, &mut [second], key, &of).await, 10);
}

async fn keys_of_a_plan(fixture: &Fixture, admin: &Secret, plan: Value) -> (Vec<Uuid>, OwnerId, u32) {
    fixture.put("/v1/plans/team", admin, plan).await.expect(201);
    let mut keys = Vec::new();
    for _ in 0..3 {
        keys.push(id_of(&fixture.create(admin, json!({"plan": "team"})).await.expect(201)));
    }
    let (owner, plan): (Uuid, i32) =
        row(&fixture.pool, format!("select owner_id, plan_number from api_keys where id = '{}'", keys[0])).await;
    (keys, owner.into(), plan.cast_unsigned())
}

#[sqlx::test(migrations = "./migrations")]
async fn all_keys_of_a_user_share_a_limit_and_a_quota_per_owner(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let mut envoys = gateways(&fixture, &sync, 2).await;
    let plan = json!({
        "rate_limits": [{"name": "a", "requests": 10, "window_seconds": 100_000, "per": "owner"}],
        "quota": {"requests": 30, "period": "day", "per": "owner"},
    });
    let (keys, owner, plan) = keys_of_a_plan(&fixture, &admin, plan).await;
    let rate = Rate::of(&limit());
    let of_limit = PoolId { kind: Kind::Rate, subject: owner.into(), tag: owner_tag("a", Some(plan)) };
    let of_quota = PoolId { kind: Kind::Quota, subject: owner.into(), tag: plan.into() };
    let of = [(of_limit, Limited::Rate(&rate), 1), (of_quota, Limited::Stock { fill: 1 }, 1)];
    let mut admitted = 0;
    for key in &keys {
        for _ in 0..3 {
            admitted += u64::from(envoys[0].request(&fixture, *key, &of).await);
        }
    }
    // A rotated, a revoked and a new key change nothing of it.
    fixture.post(&format!("/v1/keys/{}/rotate", keys[0]), &admin, json!({})).await.expect(201);
    assert_eq!(fixture.delete(&format!("/v1/keys/{}", keys[1]), &admin).await.status, 204);
    let late = id_of(&fixture.create(&admin, json!({"plan": "team"})).await.expect(201));
    admitted += exhaust(&fixture, &mut envoys, late, &of).await;
    assert_eq!(admitted, 10);
    // The quota goes on without the limit.
    admitted += exhaust(&fixture, &mut envoys, keys[0], &of[1..]).await;
    assert_eq!(admitted, 30);
    for key in [keys[0], keys[2], late] {
        let view = fixture.get(&format!("/v1/keys/{key}/quota"), &admin).await.expect(200);
        assert_eq!(
            (&view["per"], &view["used"], &view["remaining"], &view["exceeded"]),
            (&json!("owner"), &json!(30), &json!(0), &json!(true))
        );
    }
    let shut: Vec<bool> =
        scalars(&pool, "select quota_exceeded from api_keys where plan_number is not null and revoked_at is null")
            .await;
    assert_eq!(shut, [true; 3]);
    // A key that is made now is refused, too. A key with a quota of its own is not.
    let next = id_of(&fixture.create(&admin, json!({"plan": "team"})).await.expect(201));
    let own = json!({"plan": "team", "quota": {"requests": 5, "period": "day"}});
    let own = id_of(&fixture.create(&admin, own).await.expect(201));
    let is_shut = async |key: Uuid| {
        scalar::<bool>(&pool, format!("select quota_exceeded from api_keys where id = '{key}'")).await
    };
    assert_eq!((is_shut(next).await, is_shut(own).await), (true, false));
    // A key of another user with the plan has a quota of its own.
    let other = json!({"email": "other@example.com", "name": "n", "plan": "team"});
    let other = id_of(&fixture.post("/v1/keys", &admin, other).await.expect(201));
    let view = fixture.get(&format!("/v1/keys/{other}/quota"), &admin).await.expect(200);
    assert_eq!((&view["used"], &view["exceeded"]), (&json!(0), &json!(false)));
    // A raised quota opens them all.
    let more = json!({"quota": {"requests": 40, "period": "day", "per": "owner"}});
    fixture.put("/v1/plans/team", &admin, more).await.expect(200);
    assert!(!is_shut(keys[0]).await && !is_shut(next).await);
    let of_quota = [(of_quota, Limited::Stock { fill: 2 }, 1)];
    assert_eq!(exhaust(&fixture, &mut envoys, next, &of_quota).await, 10);
    change_key(&pool, keys[0], "name = 'end'").await;
}
