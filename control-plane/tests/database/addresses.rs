//! Email addresses: each spelling of an address leads to one user, and look-alikes are refused.

use std::process::Command;

use serde_json::json;
use sqlx::PgPool;

use crate::binary::url;
use crate::support::binary;
use crate::support::{Fixture, encoded, scalar};

const FACE: &str = "must not have the character U+212A, which stands for another character: write that";

#[sqlx::test(migrations = "./migrations")]
async fn an_address_with_a_letter_that_stands_for_another_is_refused_everywhere(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let kate = json!({"email": "kate@example.com", "key_name": "hers"});
    let hers = fixture.post("/api/user/key", &admin, &kate).await;
    assert_eq!(hers.status, 200);
    let before = fixture.get("/api/user/key/kate@example.com", &admin).await.json();

    for trap in ["\u{212a}ate@example.com", "kate@example.\u{212a}om", "KATE@e\u{212a}ample.com"] {
        let body = json!({"email": trap, "key_name": "theirs"});
        fixture.post("/api/user/key", &admin, &body).await.assert_invalid("email", FACE);
        let body = json!({"email": trap, "name": "theirs"});
        fixture.post("/v1/keys", &admin, &body).await.assert_invalid("email", FACE);
        let of = encoded(trap);
        for (method, uri, body) in [
            ("GET", format!("/api/user/key/{of}"), None),
            ("DELETE", format!("/api/user/key/{of}"), None),
            ("GET", format!("/api/user/usage/{of}"), None),
            ("GET", format!("/v1/keys?email={of}"), None),
            ("GET", format!("/v1/usage?email={of}"), None),
            ("GET", format!("/v1/users?email={of}"), None),
            ("POST", "/v1/users".into(), Some(json!({"email": trap}))),
        ] {
            let reply = fixture.call(method, &uri, &admin, body.as_ref()).await;
            assert_eq!(reply.status, 400, "{method} {uri}: {}", String::from_utf8_lossy(&reply.body));
            reply.assert_invalid("email", FACE);
        }
        let line = json!({"email": trap, "name": "n", "key": "a-key-of-another-system"}).to_string();
        let report = fixture.import(&admin, line).await.json();
        assert_eq!(report["errors"][0]["reason"], format!("email: {FACE}"));
        let mut create = Command::new(binary());
        create.args(["admin", "create-key", "--scope", "orders", "--name", "n", "--email", trap]);
        let output = create.args(["--database-url", &url(&pool)]).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.success(), said), (false, format!("portcullis: --email: {FACE}\n")));
    }
    let after = fixture.get("/api/user/key/kate@example.com", &admin).await.json();
    assert_eq!(before, after);
    assert_eq!(scalar::<i64>(&pool, "select count(*) from user_preferences").await, 2);
}

#[sqlx::test(migrations = "./migrations")]
async fn one_user_may_be_spelt_with_unicode_or_punycode_composed_or_decomposed(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let canonical = "jos\u{e9}@xn--bcher-kva.example";
    let spellings = [
        canonical,
        "jos\u{e9}@b\u{fc}cher.example",
        "jose\u{301}@bu\u{308}cher.example",
        "JOS\u{e9}@XN--BCHER-KVA.example",
        "Jose\u{301}@B\u{dc}CHER.Example",
    ];
    for spelling in spellings {
        let made = fixture.post("/v1/keys", &admin, json!({"email": spelling, "name": "n"})).await;
        assert_eq!((made.status, &made.json()["email"]), (201, &json!(canonical)), "{spelling}");
        let line =
            json!({"email": spelling, "name": "n", "key": format!("imported-{}", encoded(spelling))}).to_string();
        assert_eq!(fixture.import(&admin, line).await.json()["imported"], 1);
    }
    for spelling in spellings {
        let of = encoded(spelling);
        let keys = fixture.get(&format!("/v1/keys?email={of}"), &admin).await.json();
        assert_eq!(keys["keys"].as_array().unwrap().len(), 10, "{spelling}");
        let users = fixture.get(&format!("/v1/users?email={of}"), &admin).await.json();
        assert_eq!(users["users"][0]["email"], canonical);
        let found = fixture.get(&format!("/v1/users?email_prefix={of}"), &admin).await.json();
        assert_eq!(found["users"].as_array().unwrap().len(), 1, "{spelling}");
    }
    // Only ASCII letters have another case: these are two users, whatever the locale of the database is.
    for email in ["\u{c9}va@example.com", "\u{e9}va@example.com"] {
        let made = fixture.post("/v1/keys", &admin, json!({"email": email, "name": "n"})).await;
        assert_eq!((made.status, &made.json()["email"]), (201, &json!(email)));
    }
}
