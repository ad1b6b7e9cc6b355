//! External ids and metadata of users and keys: set by admins, found by external id, and sent to filters.

use contract::key::Secret;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::support::{Fixture, revision};

/// What filters get of a key, as `name=value`.
async fn sent(pool: &PgPool, key: &Secret) -> Vec<String> {
    let found = control_plane::keys::read::find_by_hash(pool, &key.hash()).await.unwrap().unwrap();
    found.record.attributes.into_iter().map(|attribute| format!("{}={}", attribute.name, attribute.value)).collect()
}

#[sqlx::test(migrations = "./migrations")]
async fn attributes_of_a_user_reach_all_keys_and_those_of_a_key_only_that_key(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let body = json!({
        "email": "user@example.com", "name": "n", "external_id": "key_1", "metadata": {"project": "Suche & Zoë"},
    });
    let (id, key) = fixture.created(&admin, body).await;
    assert_eq!(sent(&pool, &key).await, ["key.external_id=key_1", "key.metadata.project=Suche & Zo%C3%AB"]);
    let uri = fixture.user("user@example.com").await;
    let before = revision(&pool).await;
    let change = json!({"external_id": "cus_1", "metadata": {"tenant": "acme", "terms": {"seats": 5, "end": null}}});
    let user = fixture.patch(&uri, &admin, &change).await;
    assert_eq!((&user.json()["external_id"], &user.json()["metadata"]), (&json!("cus_1"), &change["metadata"]));
    // Filters learn of the change of each key.
    assert!(revision(&pool).await > before);
    let (_, second) = fixture.key("user@example.com", &[]).await;
    for (key, own) in [(&key, 2), (&second, 0)] {
        assert_eq!(
            sent(&pool, key).await[own..],
            [
                "owner.external_id=cus_1",
                "owner.metadata.tenant=acme",
                "owner.metadata.terms={\"end\":null,\"seats\":5}",
            ]
        );
    }
    // The same again is no change.
    let (etag, before) = (user.header("etag").to_owned(), revision(&pool).await);
    let again = fixture.patch(&uri, &admin, &change).await;
    assert_eq!((again.header("etag"), revision(&pool).await), (&*etag, before));
    // What is not given stays, and what is null or empty goes.
    let key_uri = format!("/v1/keys/{id}");
    fixture.patch(&key_uri, &admin, json!({"external_id": null})).await.expect(200);
    fixture.patch(&uri, &admin, json!({"metadata": {}})).await.expect(200);
    assert_eq!(sent(&pool, &key).await, ["key.metadata.project=Suche & Zo%C3%AB", "owner.external_id=cus_1"]);
    fixture.patch(&key_uri, &admin, json!({"metadata": {}})).await.expect(200);
    fixture.patch(&uri, &admin, json!({"external_id": null})).await.expect(200);
    assert_eq!(sent(&pool, &key).await, Vec::<String>::new());
    let trail = fixture.get("/v1/audit?action=user.update", &admin).await.json();
    assert_eq!(trail["entries"][2]["detail"], change);
}

#[sqlx::test(migrations = "./migrations")]
async fn users_and_keys_are_found_by_the_ids_of_another_system(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let user = json!({"email": "a@example.com", "external_id": "cus_a", "metadata": {"tenant": "a"}});
    let created = fixture.post("/v1/users", &admin, user).await.expect(201);
    assert_eq!((&created["external_id"], &created["metadata"]), (&json!("cus_a"), &json!({"tenant": "a"})));
    // A user that was there keeps what it has.
    let again = json!({"email": "a@example.com", "external_id": "cus_b"});
    assert_eq!(fixture.post("/v1/users", &admin, again).await.expect(200)["external_id"], "cus_a");
    let taken = json!({"email": "b@example.com", "external_id": "cus_a"});
    let detail = "Another user has this external_id. Give each user their own.";
    fixture.post("/v1/users", &admin, taken).await.assert_conflict(detail);
    let list = async |uri: &str, list: &str| {
        let found = fixture.get(uri, &admin).await.expect(200);
        found[list].as_array().unwrap().iter().map(|entry| entry["id"].clone()).collect::<Vec<Value>>()
    };
    assert_eq!(list("/v1/users?external_id=cus_a", "users").await, [created["id"].clone()]);
    assert_eq!(list("/v1/users?external_id=cus", "users").await, Vec::<Value>::new());
    let (id, _) = fixture.created(&admin, json!({"email": "a@example.com", "name": "n", "external_id": "k"})).await;
    assert_eq!(list("/v1/keys?external_id=k", "keys").await, [json!(id)]);
    assert_eq!(list("/v1/keys?external_id=K", "keys").await, Vec::<Value>::new());
}

#[sqlx::test(migrations = "./migrations")]
async fn only_admins_set_attributes_and_an_error_names_the_field(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, key) = fixture.key("user@example.com", &[]).await;
    let uri = format!("/v1/keys/{id}");
    for (field, value) in [("external_id", json!("x")), ("metadata", json!({"a": "b"}))] {
        let mut body = json!({});
        body[field] = value;
        assert_eq!(fixture.patch(&uri, &key, &body).await.status, 403, "{body}");
        body["email"] = "user@example.com".into();
        body["name"] = "n".into();
        assert_eq!(fixture.post("/v1/keys", &key, &body).await.status, 403, "{body}");
    }
    let nobody = format!("/v1/users/{}", Uuid::nil());
    for (body, field) in [
        (json!({"external_id": ""}), "external_id"),
        (json!({"metadata": {"A": "b"}}), "metadata"),
        (json!({"metadata": {"a": null}}), "metadata.a"),
        (json!({"metadata": {"a": ""}}), "metadata.a"),
    ] {
        for uri in [&uri, &nobody] {
            let reply = fixture.patch(uri, &admin, &body).await;
            assert_eq!((reply.status, &reply.json()["field"]), (400, &json!(field)), "{body}");
        }
    }
}
