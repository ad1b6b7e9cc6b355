//! Roles and what keys have by them, over the real router and a real PostgreSQL.

use crate::support::{Fixture, Reply, revision};
use contract::definition::Definition;
use contract::id::Epoch;
use contract::key::Secret;
use contract::page::{Entry, Page, Part};
use serde_json::{Value, json};
use sqlx::PgPool;

const ADMIN: &[&str] = &["admin"];

async fn admin(fixture: &Fixture) -> Secret {
    fixture.key("admin@example.com", ADMIN).await.1
}

async fn put(fixture: &Fixture, admin: &Secret, name: &str, scopes: &[&str]) -> Reply {
    fixture.call("PUT", &format!("/v1/roles/{name}"), admin, Some(&json!({"scopes": scopes}))).await
}

#[sqlx::test(migrations = "./migrations")]
async fn a_role_is_made_replaced_and_deleted_under_its_tag(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let admin = admin(&fixture).await;
    let uri = "/v1/roles/support_2-x";
    let body = json!({"description": " Helps people ", "scopes": ["orders:read", "users:*", "orders:read"]});
    let made = fixture.call_with("PUT", uri, &admin, Some(&body), &[("if-none-match", "*")]).await;
    let created_at = made.json()["created_at"].clone();
    let mut expected = json!({
        "name": "support_2-x", "description": "Helps people", "scopes": ["orders:read", "users:*"],
        "created_at": created_at,
    });
    assert_eq!((made.status.as_u16(), made.header("etag"), made.json()), (201, "\"1\"", expected.clone()));
    let read = fixture.call("GET", uri, &admin, None).await;
    assert_eq!((read.status.as_u16(), read.header("etag"), read.json()), (200, "\"1\"", expected.clone()));

    // What says the same wakes nobody.
    let before = revision(&pool).await;
    let same = fixture.call("PUT", uri, &admin, Some(&body)).await;
    assert_eq!((same.status.as_u16(), same.header("etag"), same.json()), (200, "\"1\"", expected.clone()));
    assert_eq!(revision(&pool).await, before);

    let body = json!({"scopes": []});
    let changed = fixture.call_with("PUT", uri, &admin, Some(&body), &[("if-match", "\"1\"")]).await;
    expected["description"] = "".into();
    expected["scopes"] = json!([]);
    assert_eq!((changed.status.as_u16(), changed.header("etag"), changed.json()), (200, "\"2\"", expected.clone()));
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
    assert_eq!(fixture.call("GET", uri, &admin, None).await.json(), expected);

    let gone = fixture.call_with("DELETE", uri, &admin, None, &[("if-match", "\"2\"")]).await;
    assert_eq!((gone.status.as_u16(), gone.body.len()), (204, 0));
    for method in ["GET", "DELETE"] {
        let reply = fixture.call(method, uri, &admin, None).await;
        reply.assert_problem(404, "not_found", "There is no role support_2-x.", None);
    }
    // The name is free again, the number is not.
    assert_eq!(put(&fixture, &admin, "support_2-x", &["a"]).await.status.as_u16(), 201);
    let numbers: Vec<i32> =
        sqlx::query_scalar("select number from definitions order by number").fetch_all(&pool).await.unwrap();
    assert!(numbers.len() == 2 && numbers[0] < numbers[1], "{numbers:?}");

    let audit: Vec<(String, String, Value, String)> = sqlx::query_as(
        "select action, target, detail, actor_email from audit where target = 'support_2-x' order by id",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
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
    let fixture = Fixture::new(pool.clone()).await;
    let admin = admin(&fixture).await;
    put(&fixture, &admin, "reader", &["orders:read", "users:read"]).await;
    put(&fixture, &admin, "writer", &["orders:write", "orders:read"]).await;
    let body = json!({
        "email": "user@example.com", "name": "x", "scopes": ["own", "users:read"], "roles": ["writer", "reader", "writer"],
    });
    let made = fixture.call("POST", "/v1/keys", &admin, Some(&body)).await;
    assert_eq!(made.status.as_u16(), 201, "{}", made.json());
    let made = made.json();
    assert_eq!(made["roles"], json!(["writer", "reader"]));
    assert_eq!(made["effective_scopes"], json!(["own", "users:read", "orders:write", "orders:read"]));
    let uri = format!("/v1/keys/{}", made["id"].as_str().unwrap());
    let listed = fixture.call("GET", "/v1/keys?email=user@example.com", &admin, None).await.json();
    // Lists and changes say nothing of secrets, stocks and Envoys.
    let shown = async || {
        let mut shown = fixture.call("GET", &uri, &admin, None).await.json();
        for only in ["secrets", "quota_usage", "credits", "applied_on"] {
            assert!(shown.as_object_mut().unwrap().remove(only).is_some(), "{only}");
        }
        shown
    };
    assert_eq!(listed["keys"], json!([shown().await]));
    assert_eq!(listed["keys"][0]["roles"], made["roles"]);

    fixture.in_step().await;
    let secret = Secret::from_presented(made["secret"].as_str().unwrap().into());
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
    let patched = fixture.call("PATCH", &uri, &admin, Some(&json!({"roles": ["reader"]}))).await.json();
    assert_eq!((&patched["roles"], &patched["scopes"]), (&json!(["reader"]), &json!(["own", "users:read"])));
    let before = revision(&pool).await;
    assert_eq!(fixture.call("PATCH", &uri, &admin, Some(&json!({"roles": ["reader"]}))).await.json(), patched);
    assert_eq!(revision(&pool).await, before, "nothing changed: nothing for filters to learn");
    let detail = "there is no role nobody; create it with PUT /v1/roles/nobody";
    for (method, uri, body) in [
        ("PATCH", &*uri, json!({"name": "not this either", "roles": ["reader", "nobody"]})),
        ("POST", "/v1/keys", json!({"email": "user@example.com", "name": "x", "roles": ["nobody"]})),
    ] {
        fixture.call(method, uri, &admin, Some(&body)).await.assert_problem(400, "invalid", detail, Some("roles"));
    }
    assert_eq!(shown().await, patched);
    let none = fixture.call("PATCH", &uri, &admin, Some(&json!({"roles": []}))).await.json();
    assert_eq!((&none["roles"], &none["effective_scopes"]), (&json!([]), &json!(["own", "users:read"])));
    fixture.in_step().await;
    assert_eq!(scopes(), ["own", "users:read"]);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_changed_role_is_told_as_one_small_page(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let admin = admin(&fixture).await;
    let (_, sync) = fixture.key("operator@example.com", &["sync"]).await;
    put(&fixture, &admin, "reader", &["orders:read"]).await;
    for _ in 0..5 {
        let body = json!({"email": "user@example.com", "name": "x", "roles": ["reader"]});
        assert_eq!(fixture.call("POST", "/v1/keys", &admin, Some(&body)).await.status.as_u16(), 201);
    }
    let at = fixture.in_step().await;
    let number: i32 = sqlx::query_scalar("select number from definitions").fetch_one(&pool).await.unwrap();
    let (epoch, _) = fixture.app.store.position().unwrap();
    let changes = async |epoch: Epoch, at: u64| {
        let uri = format!("/sync/v1/keys?epoch={epoch}&revision={at}");
        fixture.call("GET", &uri, &sync, None).await
    };
    put(&fixture, &admin, "reader", &["orders:list"]).await;
    let reply = changes(epoch, at).await;
    let page = Page::read(&reply.body).unwrap();
    assert_eq!((page.header.part, page.header.revision), (Part::Changes { after: at }, at + 1));
    let told: Vec<_> = page.entries().collect();
    let expected = Definition { scopes: vec!["orders:list".into()], ..Definition::default() }.to_bytes().unwrap();
    assert_eq!(told, [Entry::Define { number: number.cast_unsigned(), definition: &expected }]);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_role_in_use_is_not_deleted(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let admin = admin(&fixture).await;
    put(&fixture, &admin, "reader", &["orders:read"]).await;
    let mut keys = Vec::new();
    for _ in 0..2 {
        let body = json!({"email": "user@example.com", "name": "x", "roles": ["reader"]});
        let made = fixture.call("POST", "/v1/keys", &admin, Some(&body)).await.json();
        keys.push(format!("/v1/keys/{}", made["id"].as_str().unwrap()));
    }
    let delete = async || fixture.call("DELETE", "/v1/roles/reader", &admin, None).await;
    let detail = "The role reader is used by 2 keys. Remove it from them first.";
    delete().await.assert_problem(409, "conflict", detail, None);
    fixture.call("DELETE", &keys[0], &admin, None).await;
    let detail = "The role reader is used by 1 key. Remove it from them first.";
    delete().await.assert_problem(409, "conflict", detail, None);
    fixture.call("PATCH", &keys[1], &admin, Some(&json!({"roles": []}))).await;
    assert_eq!(delete().await.status.as_u16(), 204);
    assert_eq!(fixture.call("GET", &keys[0], &admin, None).await.json()["roles"], json!([]));
}

#[sqlx::test(migrations = "./migrations")]
async fn whoever_gives_a_role_away_keeps_it_from_being_deleted_meanwhile(pool: PgPool) {
    use control_plane::definitions::{Kind, Name, store};

    let fixture = Fixture::new(pool.clone()).await;
    let admin = admin(&fixture).await;
    put(&fixture, &admin, "reader", &["orders:read"]).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    let name = Name::parse("roles", "reader").unwrap();
    let mut giving = pool.begin().await.unwrap();
    let numbers = store::numbers(&mut giving, Kind::Role, std::slice::from_ref(&name)).await.unwrap();
    let delete = fixture.call("DELETE", "/v1/roles/reader", &admin, None);
    let give = async {
        // The removal is seen to wait, and not overtaken.
        let waits = "select exists (
            select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'
        )";
        while !sqlx::query_scalar::<_, bool>(waits).fetch_one(&pool).await.unwrap() {
            tokio::task::yield_now().await;
        }
        let update = "update api_keys set role_numbers = $2 where id = $1";
        sqlx::query(update).bind(id).bind(&numbers).execute(&mut *giving).await.unwrap();
        giving.commit().await.unwrap();
    };
    let (deleted, ()) = tokio::join!(delete, give);
    let detail = "The role reader is used by 1 key. Remove it from them first.";
    deleted.assert_problem(409, "conflict", detail, None);

    // A replacement keeps nobody waiting.
    let mut giving = pool.begin().await.unwrap();
    store::numbers(&mut giving, Kind::Role, &[name]).await.unwrap();
    assert_eq!(put(&fixture, &admin, "reader", &["orders:list"]).await.status.as_u16(), 200);
    giving.commit().await.unwrap();
}

#[sqlx::test(migrations = "./migrations")]
async fn changes_of_all_kinds_at_once_never_wait_for_each_other_in_a_circle(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let admin = admin(&fixture).await;
    let plan = |requests: i64| json!({"quota": {"requests": requests, "period": "day"}});
    fixture.call("PUT", "/v1/plans/gold", &admin, Some(&plan(100))).await;
    put(&fixture, &admin, "reader", &["a"]).await;
    let owner = fixture.user("user@example.com").await;
    let statuses = std::sync::Mutex::new(std::collections::BTreeMap::<u16, u32>::new());
    let many = async |method: &str, uri: &str, body: &(dyn Fn(i64) -> Option<Value> + Sync)| {
        for round in 0..20 {
            let reply = fixture.call(method, uri, &admin, body(round).as_ref()).await;
            let status = reply.status.as_u16();
            assert!(matches!(status, 200 | 201 | 204 | 400 | 404 | 409), "{method} {uri}: {}", reply.json());
            *statuses.lock().unwrap().entry(status).or_default() += 1;
        }
    };
    let key = |_| Some(json!({"email": "user@example.com", "name": "x", "plan": "gold", "roles": ["reader"]}));
    let other = |_| Some(json!({"email": "user@example.com", "name": "x", "roles": ["reader"]}));
    let primary = |_| Some(json!({"email": "user@example.com", "key_name": "x"}));
    let user = |round| Some(json!({"plan": (round % 2 == 0).then_some("gold")}));
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
    // Whatever came first: the starters are those of the plan as it is now.
    let wrong: i64 = sqlx::query_scalar(
        "select count(*) from api_keys k left join definitions d on d.number = coalesce(plan_number, owner_plan_number)
        where revoked_at is null and quota_starter is distinct from (d.quota ->> 'requests')::bigint / 16",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(wrong, 0);
    let dangling: i64 = sqlx::query_scalar(
        "select count(*) from api_keys k join definitions d
            on d.number = coalesce(plan_number, owner_plan_number) or d.number = any(role_numbers)
        where d.removed and k.revoked_at is null",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(dangling, 0);
    assert!(statuses.lock().unwrap()[&201] > 20, "{statuses:?}");
}

#[sqlx::test(migrations = "./migrations")]
async fn what_opens_the_control_plane_is_granted_to_a_key_only(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let admin = admin(&fixture).await;
    for kind in ["role", "plan"] {
        for scope in ["admin", "sync"] {
            let uri = format!("/v1/{kind}s/root");
            let reply = fixture.call("PUT", &uri, &admin, Some(&json!({"scopes": ["a", scope]}))).await;
            let detail = format!("must not contain {scope}, which can be granted to a key only");
            reply.assert_problem(400, "invalid", &detail, Some("scopes"));
            let insert = "insert into definitions (kind, name, scopes) values ($1, 'root', array[$2])";
            let error = sqlx::query(insert).bind(kind).bind(scope).execute(&pool).await.unwrap_err().to_string();
            assert!(error.contains("definitions_scopes"), "{error}");
        }
    }
    // Scopes that a key has by a role are not its own to give: they would outlive a change of the role.
    put(&fixture, &admin, "reader", &["orders:read"]).await;
    let body = json!({"email": "user@example.com", "name": "x", "scopes": ["users:*"], "roles": ["reader"]});
    let made = fixture.call("POST", "/v1/keys", &admin, Some(&body)).await.json();
    let user = Secret::from_presented(made["secret"].as_str().unwrap().into());
    let create = async |scope: &str| {
        let body = json!({"email": "user@example.com", "name": "x", "scopes": [scope]});
        fixture.call("POST", "/v1/keys", &user, Some(&body)).await
    };
    let detail =
        "This key cannot grant the scope orders:read, which it does not have itself. Use a key with the scope admin.";
    create("orders:read").await.assert_problem(403, "forbidden", detail, None);
    let made = create("users:read").await;
    assert_eq!((made.status.as_u16(), &made.json()["roles"]), (201, &json!([])));
}

#[sqlx::test(migrations = "./migrations")]
async fn roles_and_plans_are_for_admins(pool: PgPool) {
    let fixture = Fixture::new(pool).await;
    let admin = admin(&fixture).await;
    let (_, user) = fixture.key("user@example.com", &["orders:read"]).await;
    let (_, sync) = fixture.key("operator@example.com", &["sync"]).await;
    put(&fixture, &admin, "reader", &["a"]).await;
    let detail = "Use a key with the scope admin.";
    for key in [&user, &sync] {
        for kind in ["roles", "plans"] {
            let body = json!({"scopes": ["b"]});
            for (method, uri, body) in [
                ("GET", format!("/v1/{kind}"), None),
                ("GET", format!("/v1/{kind}/reader"), None),
                ("PUT", format!("/v1/{kind}/reader"), Some(&body)),
                ("DELETE", format!("/v1/{kind}/reader"), None),
            ] {
                fixture.call(method, &uri, key, body).await.assert_problem(403, "forbidden", detail, None);
            }
        }
    }
    assert_eq!(fixture.call("GET", "/v1/roles/reader", &admin, None).await.json()["scopes"], json!(["a"]));
}

#[sqlx::test(migrations = "./migrations")]
async fn pages_hold_every_role_once_by_name(pool: PgPool) {
    let fixture = Fixture::new(pool).await;
    let admin = admin(&fixture).await;
    for name in ["c", "a", "e", "b", "d"] {
        put(&fixture, &admin, name, &[]).await;
    }
    fixture.call("PUT", "/v1/plans/b2", &admin, Some(&json!({}))).await;
    fixture.call("DELETE", "/v1/roles/d", &admin, None).await;
    let (mut uri, mut seen) = ("/v1/roles?limit=2".to_owned(), Vec::new());
    loop {
        let reply = fixture.call("GET", &uri, &admin, None).await;
        let page = reply.json();
        seen.push(page["roles"].as_array().unwrap().iter().map(|role| role["name"].clone()).collect::<Vec<_>>());
        let Some(cursor) = page["next_cursor"].as_str() else {
            assert!(page["next_cursor"].is_null() && !reply.headers.contains_key("link"));
            break;
        };
        uri = format!("/v1/roles?cursor={cursor}&limit=2");
        assert_eq!(reply.header("link"), format!("<{uri}>; rel=\"next\""));
    }
    assert_eq!(seen, [vec!["a", "b"], vec!["c", "e"]]);
    for (query, field, detail) in [
        ("limit=0", "limit", "must be a number from 1 to 200"),
        ("limit=201", "limit", "must be a number from 1 to 200"),
        ("cursor=A", "cursor", "must be the next_cursor of the page before"),
    ] {
        let reply = fixture.call("GET", &format!("/v1/roles?{query}"), &admin, None).await;
        reply.assert_problem(400, "invalid", detail, Some(field));
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn there_are_a_thousand_roles_at_most_and_removed_ones_do_not_count(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let admin = admin(&fixture).await;
    let bulk = "insert into definitions (kind, name, removed)
        select 'role', 'r' || n, n = 1 from generate_series(1, 1000) n";
    sqlx::query(bulk).execute(&pool).await.unwrap();
    assert_eq!(put(&fixture, &admin, "last", &[]).await.status.as_u16(), 201);
    let detail = "There are 1000 roles already. Delete a role that is not needed.";
    put(&fixture, &admin, "one-more", &[]).await.assert_problem(409, "conflict", detail, None);
    assert_eq!(put(&fixture, &admin, "last", &["a"]).await.status.as_u16(), 200);
    assert_eq!(fixture.call("PUT", "/v1/plans/gold", &admin, Some(&json!({}))).await.status.as_u16(), 201);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_wrong_field_of_a_role_is_named(pool: PgPool) {
    let fixture = Fixture::new(pool).await;
    let admin = admin(&fixture).await;
    let name = "each name must have 1 to 64 characters of a-z, 0-9, _ and -";
    for (uri, body, field, detail) in [
        ("/v1/roles/Admin", json!({}), Some("name"), name),
        (&*format!("/v1/roles/{}", "x".repeat(65)), json!({}), Some("name"), name),
        ("/v1/roles/a%00b", json!({}), Some("name"), name),
        (
            "/v1/roles/a",
            json!({"scopes": ["UP"]}),
            Some("scopes"),
            "each scope must have 1 to 64 characters of a-z, 0-9 and : _ . * -",
        ),
        ("/v1/roles/a", json!({"scopes": vec!["a"; 33]}), Some("scopes"), "must have at most 32 entries"),
        (
            "/v1/roles/a",
            json!({"description": "a\u{0}b"}),
            Some("description"),
            "must have at most 500 characters and no control characters",
        ),
    ] {
        fixture.call("PUT", uri, &admin, Some(&body)).await.assert_problem(400, "invalid", detail, field);
    }
    let reply = fixture.call("PUT", "/v1/roles/a", &admin, Some(&json!({"rate_limits": []}))).await;
    assert_eq!((reply.status.as_u16(), &reply.json()["code"]), (400, &json!("invalid")));
    assert_eq!(fixture.call("GET", "/v1/roles", &admin, None).await.json()["roles"], json!([]));
}
