//! Users: `/v1/users`.

use crate::support::gateway::answer;
use crate::support::{Fixture, change_key, encoded, execute, id_of, revision, rows, scalar, scalars};
use contract::id::ReporterId;
use contract::key::Secret;
use control_plane::keys::purge::delete_ended;
use limits::message::{Ask, Call};
use limits::pool::{Kind, PoolId, Subject};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

const USER: &str = "user@example.com";
const CHANGED: &str =
    "The resource has changed since it was read. Read it again and repeat the change with its new ETag.";

#[sqlx::test(migrations = "./migrations")]
async fn a_user_has_a_plan_a_balance_and_counted_keys(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (_, user) = fixture.key("user@example.com", &[]).await;
    let (revoked, _) = fixture.key("user@example.com", &[]).await;
    let (expired, _) = fixture.key("user@example.com", &[]).await;
    fixture.delete(&format!("/v1/keys/{revoked}"), &admin).await;
    change_key(&pool, expired, "expires_at = now()").await;
    fixture.put("/v1/plans/gold", &admin, json!({})).await;
    let found = fixture.get("/v1/users?email=User@Example.com", &user).await.json();
    let id = found["users"][0]["id"].as_str().unwrap();
    let uri = &format!("/v1/users/{id}");
    assert_eq!(fixture.user(USER).await, *uri);
    let read = fixture.get(uri, &user).await;
    assert_eq!(found, json!({"users": [read.json()], "next_cursor": null}));
    let mut expected = json!({
        "id": id, "email": "user@example.com", "external_id": null, "metadata": {}, "time_zone": null, "plan": null, "balance": 0, "metered": false, "refill": null,
        "refill_at": null, "created_at": read.json()["created_at"], "keys": {"live": 1, "total": 3},
    });
    assert_eq!((read.status, read.json()), (200, expected.clone()));

    let patch = async |body: Value| fixture.patch(uri, &admin, &body).await;
    let patched = patch(json!({"plan": "gold"})).await;
    expected["plan"] = "gold".into();
    assert_eq!((patched.status, patched.json()), (200, expected.clone()));
    let before = revision(&pool).await;
    assert_eq!(patch(json!({"plan": "gold"})).await.json(), expected);
    assert_eq!(revision(&pool).await, before, "nothing changed: nothing for filters to learn");
    patch(json!({})).await.assert_problem(400, "invalid", "Set at least one field.", None);
    let detail = "there is no plan silver; create it with PUT /v1/plans/silver";
    patch(json!({"plan": "silver"})).await.assert_invalid("plan", detail);
    assert_eq!(fixture.get(uri, &user).await.json(), expected);
    assert_eq!(patch(json!({"plan": null})).await.json()["plan"], Value::Null);

    let audit: Vec<(String, Option<String>, Value)> =
        rows(&pool, "select action, target, detail from audit where action like 'user.%' order by id").await;
    let changed = |plan: Value| ("user.update".to_owned(), Some("user@example.com".to_owned()), json!({"plan": plan}));
    assert_eq!(audit, [changed("gold".into()), changed(Value::Null)]);
}

#[sqlx::test(migrations = "./migrations")]
async fn the_address_of_a_user_changes_and_keys_and_credits_stay(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, key) = fixture.key(USER, &[]).await;
    fixture.key("other@example.com", &[]).await;
    let uri = fixture.user(USER).await;
    fixture.post(&format!("{uri}/ledger"), &admin, json!({"amount": 5})).await.expect(201);
    let tag = fixture.get(&uri, &admin).await.header("etag").to_owned();
    let changed = fixture.patch(&uri, &admin, json!({"email": "New@Example.com"})).await;
    assert_eq!((&changed.expect(200)["email"], &changed.json()["balance"]), (&json!("new@example.com"), &json!(5)));
    assert_ne!(changed.header("etag"), tag);
    assert_eq!(fixture.get(&format!("/v1/keys/{id}"), &key).await.expect(200)["email"], "new@example.com");
    assert_eq!(fixture.user("new@example.com").await, uri);
    assert!(fixture.get("/v1/users?email=user%40example.com", &admin).await.json()["users"] == json!([]));
    let same = fixture.patch(&uri, &admin, json!({"email": "new@example.com"})).await;
    assert_eq!(same.header("etag"), changed.header("etag"), "nothing changed");
    let taken = fixture.patch(&uri, &admin, json!({"email": "other@example.com", "metered": true})).await;
    taken.assert_conflict("Another user has the address other@example.com.");
    assert_eq!(fixture.get(&uri, &admin).await.json()["metered"], true, "metered by the top-up");
    fixture
        .patch(&uri, &key, json!({"email": "mine@example.com"}))
        .await
        .assert_forbidden("Use a key with the scope admin.");
    let trail = fixture.get("/v1/audit?action=user.update", &admin).await.json();
    let details: Vec<_> = trail["entries"].as_array().unwrap().iter().map(|entry| entry["detail"].clone()).collect();
    assert_eq!(details, [json!({"email": "new@example.com"})]);
    // A new user with the old address sees nothing of the former.
    let (_, next) = fixture.key(USER, &[]).await;
    let of_old = fixture.get("/v1/audit?target=user%40example.com", &next).await.json();
    assert_eq!(of_old["entries"], json!([]));
    let of_new = fixture.get("/v1/audit?target=new%40example.com", &key).await.json();
    assert_eq!(of_new["entries"].as_array().unwrap().len(), 2);
}

#[sqlx::test(migrations = "./migrations")]
async fn an_erased_user_is_named_nowhere_and_what_was_counted_stays(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let body = json!({
        "email": USER, "name": "Ada's laptop", "allowed_addresses": ["192.0.2.7"], "metadata": {"of": "Ada"},
    });
    let (id, key) = fixture.created(&admin, body.clone()).await;
    let (second, _) = fixture.created(&admin, body.clone()).await;
    // The trail outlives the row of an ended key.
    let (gone, _) = fixture.created(&admin, body).await;
    fixture.patch(&format!("/v1/keys/{gone}"), &admin, json!({"name": "Ada's watch"})).await.expect(200);
    change_key(&pool, gone, "revoked_at = now() - interval '31 days', withdrawn = true").await;
    assert_eq!(delete_ended(&pool, 30).await.unwrap(), 1);
    change_key(&pool, id, "networks = '{}'").await;
    let uri = fixture.user(USER).await;
    fixture.post(&format!("{uri}/ledger"), &admin, json!({"amount": 5, "note": "for Ada"})).await.expect(201);
    let quota = json!({"quota": {"requests": 10, "period": "month"}});
    fixture.patch(&format!("/v1/keys/{id}"), &admin, quota).await.expect(200);
    fixture.post(&format!("/v1/keys/{id}/quota/reset"), &admin, json!({"note": "Ada asked"})).await.expect(200);
    fixture.patch(&format!("/v1/keys/{id}"), &key, json!({"name": "Ada's phone"})).await.expect(200);
    fixture.patch(&format!("/v1/keys/{second}"), &admin, json!({"allowed_addresses": ["192.0.2.9"]})).await.expect(200);
    fixture.delete(&uri, &key).await.assert_forbidden("Use a key with the scope admin.");
    let known = json!({"email": "ada@example.com", "external_id": "Ada", "metadata": {"name": "Ada"}});
    fixture.patch(&uri, &admin, known).await.expect(200);
    change_key(&pool, second, "name = 'erased'").await;
    // A key that filters do not have any longer misses the changes of its user.
    let (third, _) = fixture.created(&admin, json!({"email": "ada@example.com", "name": "Ada's old phone"})).await;
    change_key(&pool, third, "revoked_at = now(), withdrawn = true").await;

    let user_id = uri.rsplit('/').next().unwrap();
    let pseudonym = format!("erased-{user_id}@erased.invalid");
    assert_eq!(fixture.delete(&uri, &admin).await.expect(200), json!({"email": pseudonym, "revoked": 2}));
    let user = fixture.get(&uri, &admin).await.expect(200);
    assert_eq!((&user["email"], &user["balance"], &user["keys"]["total"]), (&json!(pseudonym), &json!(5), &json!(3)));
    let shown = fixture.get(&format!("/v1/keys/{id}"), &admin).await.expect(200);
    assert_eq!(
        (&shown["name"], &shown["state"], &shown["email"]),
        (&json!("erased"), &json!("revoked"), &json!(pseudonym))
    );
    // No table has any of it.
    let dump: Vec<(String,)> = rows(
        &pool,
        "select row_to_json(t)::text from audit t union all select row_to_json(t)::text from api_keys t
        union all select row_to_json(t)::text from user_preferences t
        union all select row_to_json(t)::text from ledger t",
    )
    .await;
    let dump: String = dump.into_iter().map(|(row,)| row).collect();
    for text in [USER, "ada@example.com", "Ada", "192.0.2."] {
        assert!(!dump.contains(text), "{text} in {dump}");
    }
    let trail = fixture.get(&format!("/v1/audit?target={}", encoded(&pseudonym)), &admin).await.json();
    let actions: Vec<_> = trail["entries"].as_array().unwrap().iter().map(|entry| entry["action"].clone()).collect();
    assert_eq!(actions, ["user.erase", "user.revoke_keys", "user.update", "ledger.create"]);
    let seen = format!("select count(*) from audit where actor_email = '{pseudonym}' and address is not null");
    assert_eq!(scalar::<i64>(&pool, seen).await, 0, "client addresses of what the user did");
    // Again, it changes nothing more. A new user may have the address.
    assert_eq!(fixture.delete(&uri, &admin).await.expect(200)["revoked"], 0);
    assert_ne!(fixture.user(USER).await, uri);
    let own = fixture.user("admin@example.com").await;
    let detail = "The key of this call belongs to the user. Use a key of another administrator.";
    fixture.delete(&own, &admin).await.assert_conflict(detail);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_user_is_created_once_by_address_and_by_nothing_else(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let nobody = Uuid::nil();
    let detail = format!("There is no user {nobody}.");
    for (method, path, body) in [
        ("GET", "", None),
        ("PATCH", "", Some(json!({"plan": null}))),
        ("PATCH", "", Some(json!({"metered": true}))),
        ("POST", "/revoke-keys", None),
        ("GET", "/balance", None),
        ("GET", "/ledger", None),
        ("POST", "/ledger", Some(json!({"amount": 1}))),
    ] {
        let reply = fixture.call(method, &format!("/v1/users/{nobody}{path}"), &admin, body.as_ref()).await;
        reply.assert_not_found(&detail);
    }
    let create = async |email: &str| fixture.post("/v1/users", &admin, json!({"email": email})).await;
    let found = async || fixture.get("/v1/users?email=new@example.com", &admin).await.json();
    assert_eq!(found().await, json!({"users": [], "next_cursor": null}));
    let made = create("New@Example.com").await;
    assert_eq!((made.status, &made.json()["email"]), (201, &json!("new@example.com")));
    let uri = made.header("location");
    assert_eq!((uri, made.header("etag")), (&*format!("/v1/users/{}", id_of(&made.json())), "\"1\""));
    let again = create("new@example.com").await;
    assert_eq!((again.status, again.json(), again.header("location")), (200, made.json(), uri));
    assert_eq!(found().await, json!({"users": [made.json()], "next_cursor": null}));
    let audited: Vec<(String, Option<String>)> =
        rows(&pool, "select action, target from audit where action like 'user.%'").await;
    assert_eq!(audited, [("user.create".into(), Some("new@example.com".into()))]);

    assert_eq!(fixture.patch(uri, &admin, json!({"plan": "none"})).await.status, 400);
    fixture.put("/v1/plans/gold", &admin, json!({})).await;
    let made = fixture.patch(uri, &admin, json!({"plan": "gold"})).await;
    assert_eq!((made.status, &made.json()["plan"]), (200, &json!("gold")));
    assert_eq!(made.json()["keys"], json!({"live": 0, "total": 0}));
    // Keys that are made later have the plan too.
    let body = json!({"email": "new@example.com", "name": "x"});
    let key = fixture.post("/v1/keys", &admin, &body).await.json();
    assert_eq!((&key["plan"], &key["effective_plan"]), (&Value::Null, &json!("gold")));
}

#[sqlx::test(migrations = "./migrations")]
async fn pages_hold_every_user_once_by_address_and_prefix(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    for email in ["a+3@example.com", "a+1@example.com", "a+2@example.com", "b@example.com", "a_1@example.com"] {
        fixture.key(email, &[]).await;
    }
    let pages = fixture.pages("/v1/users", "email_prefix=A%2B&", "users", "email", &admin).await;
    assert_eq!(pages, [vec!["a+1@example.com", "a+2@example.com"], vec!["a+3@example.com"]]);
    let all = fixture.get("/v1/users", &admin).await.json();
    assert_eq!(all["users"].as_array().unwrap().len(), 6);
    // A percent sign is a character like others.
    let none = fixture.get("/v1/users?email_prefix=%25", &admin).await.json();
    assert_eq!(none, json!({"users": [], "next_cursor": null}));
    let text = "must have at most 254 characters and no control characters";
    for (query, field, detail) in [
        ("limit=201", "limit", "must be a number from 1 to 200"),
        ("email_prefix=a%00", "email_prefix", text),
        ("cursor=%0A", "cursor", "must be the next_cursor of the page before"),
    ] {
        fixture.get(&format!("/v1/users?{query}"), &admin).await.assert_invalid(field, detail);
    }
}

/// The ETag of the user.
async fn tag(fixture: &Fixture, key: &Secret) -> String {
    let reply = fixture.get(&fixture.user(USER).await, key).await;
    assert_eq!(reply.status, 200, "{}", reply.json());
    reply.header("etag").to_owned()
}

#[sqlx::test(migrations = "./migrations")]
async fn a_user_is_changed_only_as_the_client_has_seen_them(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (_, user) = fixture.key("user@example.com", &[]).await;
    for name in ["gold", "silver"] {
        fixture.put(&format!("/v1/plans/{name}"), &admin, json!({})).await;
    }
    assert_eq!(tag(&fixture, &user).await, "\"1\"");
    let path = fixture.user(USER).await;
    let patch = async |body: Value, tag: &str| {
        fixture.call_with("PATCH", &path, &admin, Some(&body), &[("if-match", tag)]).await
    };
    let refill = json!({"refill": {"amount": 5, "period": "day", "time_zone": "UTC"}});
    for (body, before, after) in [
        (json!({"plan": "gold"}), "\"1\"", "\"2\""),
        (json!({"metered": true}), "\"7\", \"2\"", "\"3\""),
        (refill.clone(), "\"3\"", "\"4\""),
        // Nothing to change is no change.
        (refill, "*", "\"4\""),
        (json!({"plan": "gold"}), "*", "\"4\""),
    ] {
        let reply = patch(body.clone(), before).await;
        assert_eq!((reply.status, reply.header("etag")), (200, after), "{body}");
        assert_eq!(tag(&fixture, &user).await, after, "{body}");
    }
    for body in [json!({"plan": "silver"}), json!({"metered": false})] {
        for tag in ["\"3\"", "W/\"4\""] {
            patch(body.clone(), tag).await.assert_problem(412, "precondition_failed", CHANGED, None);
        }
        let detail = "if-match must be * or a list of entity tags such as \"7\"";
        patch(body, "4").await.assert_problem(400, "invalid", detail, None);
    }
    // Several settings change together.
    let reply = patch(json!({"plan": "silver", "metered": false, "refill": null}), "\"4\"").await;
    let shown = reply.json();
    assert_eq!((&shown["plan"], &shown["metered"], &shown["refill"]), (&json!("silver"), &json!(false), &Value::Null));
}

#[sqlx::test(migrations = "./migrations")]
async fn top_ups_and_usage_do_not_change_the_etag_of_a_user(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (_, user) = fixture.key("user@example.com", &[]).await;
    let top_up = async || {
        let ledger = format!("{}/ledger", fixture.user(USER).await);
        assert_eq!(fixture.post(&ledger, &admin, json!({"amount": 1_000})).await.status, 201);
    };
    // The first top-up makes the user metered, which is set from then on.
    top_up().await;
    assert_eq!(tag(&fixture, &user).await, "\"2\"");
    top_up().await;
    let sql = "insert into ledger (owner_id, kind, amount, balance) select id, 'usage', -700, 0 from user_preferences where email = 'user@example.com'";
    execute(&pool, sql).await;
    fixture.key("user@example.com", &[]).await;
    assert_eq!(fixture.get(&fixture.user(USER).await, &user).await.json()["balance"], 1_300);
    assert_eq!(tag(&fixture, &user).await, "\"2\"");
}

#[sqlx::test(migrations = "./migrations")]
async fn of_changes_of_a_user_at_the_same_time_that_expect_the_same_version_one_is_made(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (_, user) = fixture.key("user@example.com", &[]).await;
    fixture.put("/v1/plans/gold", &admin, json!({})).await;
    let path = fixture.user(USER).await;
    let one = async |body: Value| {
        fixture.call_with("PATCH", &path, &admin, Some(&body), &[("if-match", "\"1\"")]).await.status
    };
    let refill = |amount: i64| json!({"refill": {"amount": amount, "period": "day"}});
    let (a, b, c, d) =
        tokio::join!(one(json!({"plan": "gold"})), one(json!({"metered": true})), one(refill(1)), one(refill(2)));
    let mut statuses = [a, b, c, d];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 412, 412, 412]);
    // A refill also makes the user metered: two things in two statements.
    let now = tag(&fixture, &user).await;
    assert!(["\"2\"", "\"3\""].contains(&&*now), "{now}");
}

#[sqlx::test(migrations = "./migrations")]
async fn quotas_and_usage_can_be_of_the_time_zone_of_the_owner(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let daily = json!({"quota": {"requests": 10, "period": "day", "time_zone": "owner"}});
    fixture.put("/v1/plans/daily", &admin, daily).await.expect(201);
    let body = json!({"email": USER, "name": "n", "plan": "daily"});
    let (id, key) = fixture.created(&admin, body).await;
    let quota = async || {
        let quota = fixture.get(&format!("/v1/keys/{id}/quota"), &admin).await.expect(200);
        (quota["time_zone"].clone(), quota["window_end"].as_str().unwrap()[11..].to_owned())
    };
    assert_eq!(quota().await, (json!("UTC"), "00:00:00Z".to_owned()));
    let uri = fixture.user(USER).await;
    let fill = || scalar::<i32>(&pool, format!("select quota_fill from api_keys where id = '{id}'"));
    let before = fill().await;
    let user = fixture.patch(&uri, &admin, json!({"time_zone": "Asia/Tokyo"})).await.expect(200);
    assert_eq!(user["time_zone"], "Asia/Tokyo");
    assert_eq!(fill().await, before + 1, "filters ask for the new window");
    assert_eq!(quota().await, (json!("Asia/Tokyo"), "15:00:00Z".to_owned()));
    // A key's own quota too, and one that is made or imported later.
    let own = json!({"quota": {"requests": 5, "period": "week", "time_zone": "owner"}});
    fixture.patch(&format!("/v1/keys/{id}"), &admin, own).await.expect(200);
    assert_eq!(quota().await, (json!("Asia/Tokyo"), "15:00:00Z".to_owned()));
    let line = json!({"email": USER, "name": "imported", "key": "a-key-of-another-system", "plan": "daily"});
    fixture.import(&admin, line.to_string()).await.expect(200);
    let zones = "select distinct applied_quota ->> 'time_zone' from api_keys where applied_quota is not null";
    assert_eq!(scalars::<String>(&pool, zones).await, ["Asia/Tokyo"]);
    // Usage is asked for in the same way.
    let of_key = format!("/v1/keys/{id}/usage?time_zone=owner");
    let of_user = format!("/v1/usage?time_zone=owner&email={USER}");
    for (uri, caller) in [(&of_key, &admin), (&of_user, &admin), (&"/v1/usage?time_zone=owner".into(), &key)] {
        assert_eq!(fixture.get(uri, caller).await.expect(200)["time_zone"], "Asia/Tokyo", "{uri}");
    }
    let reply = fixture.get("/v1/usage?time_zone=owner", &admin).await;
    reply.assert_invalid("time_zone", "owner goes with email, which names the owner");
    let reply = fixture.patch(&uri, &admin, json!({"time_zone": "owner"})).await;
    reply.assert_invalid("time_zone", "must be a name of the IANA time zone database such as Europe/Berlin");
    fixture.patch(&uri, &admin, json!({"time_zone": null})).await.expect(200);
    assert_eq!(quota().await, (json!("UTC"), "00:00:00Z".to_owned()));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_quota_of_an_owner_in_their_time_zone_is_granted_once(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let daily = json!({"quota": {"requests": 10, "period": "day", "time_zone": "owner", "per": "owner"}});
    fixture.put("/v1/plans/daily", &admin, daily).await.expect(201);
    fixture.created(&admin, json!({"email": USER, "name": "n", "plan": "daily"})).await;
    let uri = fixture.user(USER).await;
    let owner: Uuid = uri.rsplit('/').next().unwrap().parse().unwrap();
    let plan: i32 = scalar(&pool, "select number from definitions where kind = 'plan'").await;
    let pool_id = PoolId { kind: Kind::Quota, subject: Subject(owner.into_bytes()), tag: plan.cast_unsigned().into() };
    for zone in [json!(null), json!("Asia/Tokyo")] {
        fixture.patch(&uri, &admin, json!({"time_zone": zone})).await.expect(200);
        let kind = format!("day/{}", zone.as_str().unwrap_or("UTC"));
        // Eight of ten are used in the present window.
        execute(&pool, "delete from quota_use").await;
        let used = format!(
            "insert into quota_use (subject, plan_number, window_start, window_end, kind, used)
            values ('{owner}', {plan}, now() - interval '1 hour', now() + interval '1 hour', '{kind}', 8)"
        );
        execute(&pool, used).await;
        let ask = Ask { need: 1, least: 1, want: 100, ..Ask::new(pool_id, 1) };
        let call = Call { reporter: ReporterId([7; 16]), is_last: false, asks: vec![ask] };
        let grant = answer(&fixture, &sync, &call).await.grants[0];
        assert_eq!(grant.held + grant.left, 2, "{kind}: {grant:?}");
    }
}
