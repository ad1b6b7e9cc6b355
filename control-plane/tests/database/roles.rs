//! Roles, and the scopes that keys have by them.

use crate::support::{Fixture, Reply, execute, lock_wait, revision, rows, scalar, scalars, secret_of};
use contract::codec::Bytes;
use contract::definition::Definition;
use contract::id::Epoch;
use contract::key::Secret;
use contract::update::{Entry, Part, Update};
use serde_json::{Value, json};
use sqlx::PgPool;

async fn put(fixture: &Fixture, admin: &Secret, name: &str, scopes: &[&str]) -> Reply {
    fixture.put(&format!("/v1/roles/{name}"), admin, json!({"scopes": scopes})).await
}

/// Longer than a screen: one story.
#[sqlx::test(migrations = "./migrations")]
async fn a_role_is_made_replaced_and_deleted_under_its_tag(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let uri = "/v1/roles/support_2-x";
    let body = json!({"description": " Helps people ", "scopes": ["orders:read", "users:*", "orders:read"]});
    let made = fixture.call_with("PUT", uri, &admin, Some(&body), &[("if-none-match", "*")]).await;
    let created_at = made.json()["created_at"].clone();
    let mut expected = json!({
        "name": "support_2-x", "description": "Helps people", "scopes": ["orders:read", "users:*"],
        "created_at": created_at,
    });
    assert_eq!((made.status, made.header("etag"), made.json()), (201, "\"1\"", expected.clone()));
    let read = fixture.get(uri, &admin).await;
    assert_eq!((read.status, read.header("etag"), read.json()), (200, "\"1\"", expected.clone()));

    // A replacement with the same content raises no revision.
    let before = revision(&pool).await;
    let same = fixture.put(uri, &admin, &body).await;
    assert_eq!((same.status, same.header("etag"), same.json()), (200, "\"1\"", expected.clone()));
    assert_eq!(revision(&pool).await, before);

    let body = json!({"scopes": []});
    let changed = fixture.call_with("PUT", uri, &admin, Some(&body), &[("if-match", "\"1\"")]).await;
    expected["description"] = "".into();
    expected["scopes"] = json!([]);
    assert_eq!((changed.status, changed.header("etag"), changed.json()), (200, "\"2\"", expected.clone()));
    let stale = "The resource has changed since it was read. Read it again and repeat the change with its new ETag.";
    let there = "The resource exists already, and If-None-Match demands that it does not.";
    for (header, method, uri, detail) in [
        (("if-match", "\"1\""), "PUT", uri, stale),
        (("if-match", "\"1\""), "DELETE", uri, stale),
        (("if-match", "*"), "PUT", "/v1/roles/nobody", stale),
        (("if-none-match", "*"), "PUT", uri, there),
    ] {
        let reply = fixture.call_with(method, uri, &admin, Some(&json!({"scopes": ["a"]})), &[header]).await;
        reply.assert_problem(412, "precondition_failed", detail, None);
    }
    let reply = fixture.call_with("PUT", uri, &admin, Some(&body), &[("if-match", "1")]).await;
    reply.assert_problem(400, "invalid", "if-match must be * or a list of entity tags such as \"7\"", None);
    assert_eq!(fixture.get(uri, &admin).await.json(), expected);

    let gone = fixture.call_with("DELETE", uri, &admin, None, &[("if-match", "\"2\"")]).await;
    assert_eq!((gone.status, gone.body.len()), (204, 0));
    for method in ["GET", "DELETE"] {
        fixture.call(method, uri, &admin, None).await.assert_not_found("There is no role support_2-x.");
    }
    // The name is free again, the number is not.
    assert_eq!(put(&fixture, &admin, "support_2-x", &["a"]).await.status, 201);
    let numbers: Vec<i32> = scalars(&pool, "select number from definitions order by number").await;
    assert!(numbers.len() == 2 && numbers[0] < numbers[1], "{numbers:?}");

    let sql = "select action, target, detail, actor_email from audit where target = 'support_2-x' order by id";
    let audit: Vec<(String, String, Value, String)> = rows(&pool, sql).await;
    let done = |action: &str, detail: Value| {
        (action.to_owned(), "support_2-x".to_owned(), detail, "admin@example.com".to_owned())
    };
    let expected = [
        done("role.create", json!({"scopes": ["orders:read", "users:*"]})),
        done("role.update", json!({"scopes": []})),
        done("role.delete", json!({})),
        done("role.create", json!({"scopes": ["a"]})),
    ];
    assert_eq!(audit, expected);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_key_has_the_scopes_of_its_roles_beside_its_own(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    put(&fixture, &admin, "reader", &["orders:read", "users:read"]).await;
    put(&fixture, &admin, "writer", &["orders:write", "orders:read"]).await;
    let body = json!({"scopes": ["own", "users:read"], "roles": ["writer", "reader", "writer"]});
    let made = fixture.create(&admin, body).await.expect(201);
    assert_eq!(made["roles"], json!(["writer", "reader"]));
    assert_eq!(made["effective_scopes"], json!(["own", "users:read", "orders:write", "orders:read"]));
    let uri = format!("/v1/keys/{}", made["id"].as_str().unwrap());
    let listed = fixture.get("/v1/keys?email=user@example.com", &admin).await.json();
    // Lists and changes say nothing of secrets, stocks and Envoys.
    let shown = async || {
        let mut shown = fixture.get(&uri, &admin).await.json();
        for only in ["secrets", "quota_usage", "credits", "applied_on"] {
            assert!(shown.as_object_mut().unwrap().remove(only).is_some(), "{only}");
        }
        shown
    };
    assert_eq!(listed["keys"], json!([shown().await]));
    assert_eq!(listed["keys"][0]["roles"], made["roles"]);

    fixture.in_step().await;
    let secret = secret_of(&made);
    let scopes = || {
        let record = fixture.app.store.find(&secret.hash()).unwrap();
        let definitions = fixture.app.store.definitions();
        definitions.scopes(&record).iter().map(|scope| (*scope).to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(json!(scopes()), made["effective_scopes"]);

    // A change of the role is known without a change of the key.
    put(&fixture, &admin, "writer", &["orders:*"]).await;
    fixture.in_step().await;
    assert_eq!(scopes(), ["own", "users:read", "orders:*", "orders:read"]);
    let patched = fixture.patch(&uri, &admin, json!({"roles": ["reader"]})).await.json();
    assert_eq!((&patched["roles"], &patched["scopes"]), (&json!(["reader"]), &json!(["own", "users:read"])));
    let before = revision(&pool).await;
    assert_eq!(fixture.patch(&uri, &admin, json!({"roles": ["reader"]})).await.json(), patched);
    assert_eq!(revision(&pool).await, before, "nothing changed: nothing for filters to learn");
    let detail = "there is no role nobody; create it with PUT /v1/roles/nobody";
    for (method, uri, body) in [
        ("PATCH", &*uri, json!({"name": "not this either", "roles": ["reader", "nobody"]})),
        ("POST", "/v1/keys", json!({"email": "user@example.com", "name": "x", "roles": ["nobody"]})),
    ] {
        fixture.call(method, uri, &admin, Some(&body)).await.assert_invalid("roles", detail);
    }
    assert_eq!(shown().await, patched);
    let none = fixture.patch(&uri, &admin, json!({"roles": []})).await.json();
    assert_eq!((&none["roles"], &none["effective_scopes"]), (&json!([]), &json!(["own", "users:read"])));
    fixture.in_step().await;
    assert_eq!(scopes(), ["own", "users:read"]);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_changed_role_is_sent_in_one_small_update(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (_, sync) = fixture.key("operator@example.com", &["sync"]).await;
    put(&fixture, &admin, "reader", &["orders:read"]).await;
    for _ in 0..5 {
        assert_eq!(fixture.create(&admin, json!({"roles": ["reader"]})).await.status, 201);
    }
    let at = fixture.in_step().await;
    let number: i32 = scalar(&pool, "select number from definitions").await;
    let (epoch, _) = fixture.app.store.position().unwrap();
    let changes = async |epoch: Epoch, at: u64| {
        let uri = format!("/sync/v1/keys?epoch={epoch}&revision={at}");
        fixture.get(&uri, &sync).await
    };
    put(&fixture, &admin, "reader", &["orders:list"]).await;
    let reply = changes(epoch, at).await;
    let update = Update::read(&reply.body).unwrap();
    assert_eq!((update.header.part, update.header.revision), (Part::Changes { after: at }, at + 1));
    let entries: Vec<_> = update.entries().collect();
    let expected = Definition { scopes: vec!["orders:list".into()], ..Definition::default() }.to_bytes().unwrap();
    assert_eq!(entries, [Entry::Define { number: number.cast_unsigned(), definition: Bytes(&expected) }]);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_role_in_use_is_not_deleted(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    put(&fixture, &admin, "reader", &["orders:read"]).await;
    let mut keys = Vec::new();
    for _ in 0..2 {
        let made = fixture.create(&admin, json!({"roles": ["reader"]})).await.json();
        keys.push(format!("/v1/keys/{}", made["id"].as_str().unwrap()));
    }
    let delete = async || fixture.delete("/v1/roles/reader", &admin).await;
    delete().await.assert_conflict("The role reader is used by 2 keys. Remove it from them first.");
    fixture.delete(&keys[0], &admin).await;
    delete().await.assert_conflict("The role reader is used by 1 key. Remove it from them first.");
    fixture.patch(&keys[1], &admin, json!({"roles": []})).await;
    assert_eq!(delete().await.status, 204);
    assert_eq!(fixture.get(&keys[0], &admin).await.json()["roles"], json!([]));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_role_that_is_being_given_to_a_key_is_not_deleted(pool: PgPool) {
    use control_plane::definitions::{Kind, Name, store};

    let (fixture, admin) = Fixture::with_admin(&pool).await;
    put(&fixture, &admin, "reader", &["orders:read"]).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    let name = Name::parse("roles", "reader").unwrap();
    let mut giving = pool.begin().await.unwrap();
    let numbers = store::numbers(&mut giving, Kind::Role, std::slice::from_ref(&name)).await.unwrap();
    let delete = fixture.delete("/v1/roles/reader", &admin);
    let give = async {
        // The removal is seen to wait, and not overtaken.
        lock_wait(&pool).await;
        let update = "update api_keys set role_numbers = $2 where id = $1";
        sqlx::query(update).bind(id).bind(&numbers).execute(&mut *giving).await.unwrap();
        giving.commit().await.unwrap();
    };
    let (deleted, ()) = tokio::join!(delete, give);
    deleted.assert_conflict("The role reader is used by 1 key. Remove it from them first.");

    // A replacement does not wait for the lock.
    let mut giving = pool.begin().await.unwrap();
    store::numbers(&mut giving, Kind::Role, &[name]).await.unwrap();
    assert_eq!(put(&fixture, &admin, "reader", &["orders:list"]).await.status, 200);
    giving.commit().await.unwrap();
}

#[sqlx::test(migrations = "./migrations")]
async fn concurrent_changes_of_all_kinds_never_deadlock(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let plan = |requests: i64| json!({"quota": {"requests": requests, "period": "day"}});
    fixture.put("/v1/plans/gold", &admin, &plan(100)).await;
    put(&fixture, &admin, "reader", &["a"]).await;
    let owner = fixture.user("user@example.com").await;
    let statuses = std::sync::Mutex::new(std::collections::BTreeMap::<u16, u32>::new());
    let many = async |method: &str, uri: &str, body: &(dyn Fn(i64) -> Option<Value> + Sync)| {
        for round in 0..20 {
            let reply = fixture.call(method, uri, &admin, body(round).as_ref()).await;
            let status = reply.status;
            assert!(matches!(status, 200 | 201 | 204 | 400 | 404 | 409), "{method} {uri}: {}", reply.json());
            *statuses.lock().unwrap().entry(status).or_default() += 1;
        }
    };
    let key = |_| Some(json!({"email": "user@example.com", "name": "x", "plan": "gold", "roles": ["reader"]}));
    let other = |_| Some(json!({"email": "user@example.com", "name": "x", "roles": ["reader"]}));
    let primary = |_| Some(json!({"email": "user@example.com", "key_name": "x"}));
    let user = |round| Some(json!({"plan": (round % 2 == 0).then_some("gold"), "metered": round % 4 < 2}));
    let role = |round: i64| Some(json!({"scopes": [format!("a{round}")]}));
    let replace = |round| Some(plan(16 * (round + 1)));
    tokio::join!(
        many("POST", "/v1/keys", &key),
        many("POST", "/v1/keys", &other),
        many("POST", "/api/user/key", &primary),
        many("PATCH", &owner, &user),
        many("PUT", "/v1/plans/gold", &replace),
        many("PUT", "/v1/roles/reader", &role),
        many("DELETE", "/v1/plans/gold", &|_| None),
        many("DELETE", "/v1/roles/reader", &|_| None),
    );
    // Whatever came first: the quotas are those of the plan as it is now.
    let sql =
        "select count(*) from api_keys k left join definitions d on d.number = coalesce(plan_number, owner_plan_number)
        where revoked_at is null and applied_quota is distinct from d.quota";
    let wrong: i64 = scalar(&pool, sql).await;
    assert_eq!(wrong, 0);
    let sql = "select count(*) from api_keys k join definitions d
            on d.number = coalesce(plan_number, owner_plan_number) or d.number = any(role_numbers)
        where d.removed and k.revoked_at is null";
    assert_eq!(scalar::<i64>(&pool, sql).await, 0);
    assert!(statuses.lock().unwrap()[&201] > 20, "{statuses:?}");
}

#[sqlx::test(migrations = "./migrations")]
async fn the_scopes_admin_and_sync_are_granted_to_keys_only(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    for kind in ["role", "plan"] {
        for scope in ["admin", "sync"] {
            let uri = format!("/v1/{kind}s/root");
            let reply = fixture.put(&uri, &admin, json!({"scopes": ["a", scope]})).await;
            reply.assert_invalid("scopes", &format!("must not contain {scope}, which can be granted to a key only"));
            let insert = "insert into definitions (kind, name, scopes) values ($1, 'root', array[$2])";
            let error = sqlx::query(insert).bind(kind).bind(scope).execute(&pool).await.unwrap_err().to_string();
            assert!(error.contains("definitions_scopes"), "{error}");
        }
    }
    // Scopes that a key has by a role are not its own to give: they would outlive a change of the role.
    put(&fixture, &admin, "reader", &["orders:read"]).await;
    let user = fixture.create(&admin, json!({"scopes": ["users:*"], "roles": ["reader"]})).await.secret();
    let create = async |scope: &str| fixture.create(&user, json!({"scopes": [scope]})).await;
    let detail =
        "This key cannot grant the scope orders:read, which it does not have itself. Use a key with the scope admin.";
    create("orders:read").await.assert_forbidden(detail);
    let made = create("users:read").await;
    assert_eq!((made.status, &made.json()["roles"]), (201, &json!([])));
}

#[sqlx::test(migrations = "./migrations")]
async fn pages_hold_every_role_once_by_name(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    for name in ["c", "a", "e", "b", "d"] {
        put(&fixture, &admin, name, &[]).await;
    }
    fixture.put("/v1/plans/b2", &admin, json!({})).await;
    fixture.delete("/v1/roles/d", &admin).await;
    let pages = fixture.pages("/v1/roles", "", "roles", "name", &admin).await;
    assert_eq!(pages, [vec!["a", "b"], vec!["c", "e"]]);
    for (query, field, detail) in [
        ("limit=0", "limit", "must be a number from 1 to 200"),
        ("limit=201", "limit", "must be a number from 1 to 200"),
        ("cursor=A", "cursor", "must be the next_cursor of the page before"),
    ] {
        fixture.get(&format!("/v1/roles?{query}"), &admin).await.assert_invalid(field, detail);
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn there_are_a_thousand_roles_at_most_and_removed_ones_do_not_count(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let bulk = "insert into definitions (kind, name, removed)
        select 'role', 'r' || n, n = 1 from generate_series(1, 1000) n";
    execute(&pool, bulk).await;
    assert_eq!(put(&fixture, &admin, "last", &[]).await.status, 201);
    let detail = "There are 1000 roles already. Delete a role that is not needed.";
    put(&fixture, &admin, "one-more", &[]).await.assert_conflict(detail);
    assert_eq!(put(&fixture, &admin, "last", &["a"]).await.status, 200);
    assert_eq!(fixture.put("/v1/plans/gold", &admin, json!({})).await.status, 201);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_wrong_field_of_a_role_is_named(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let name = "each name must have 1 to 64 characters of a-z, 0-9, _ and -";
    for (uri, body, field, detail) in [
        ("/v1/roles/Admin", json!({}), Some("name"), name),
        (&*format!("/v1/roles/{}", "x".repeat(65)), json!({}), Some("name"), name),
        ("/v1/roles/a%00b", json!({}), Some("name"), name),
        (
            "/v1/roles/a",
            json!({"scopes": ["a b"]}),
            Some("scopes"),
            "each scope must have 1 to 64 characters of a-z, A-Z, 0-9 and : / _ . * -",
        ),
        ("/v1/roles/a", json!({"scopes": vec!["a"; 33]}), Some("scopes"), "must have at most 32 entries"),
        (
            "/v1/roles/a",
            json!({"description": "a\u{0}b"}),
            Some("description"),
            "must have at most 500 characters and no control characters",
        ),
    ] {
        fixture.put(uri, &admin, &body).await.assert_problem(400, "invalid", detail, field);
    }
    let reply = fixture.put("/v1/roles/a", &admin, json!({"rate_limits": []})).await;
    assert_eq!((reply.status, &reply.json()["code"]), (400, &json!("invalid")));
    assert_eq!(fixture.get("/v1/roles", &admin).await.json()["roles"], json!([]));
}
