//! The REST API as an administrator uses it.

use std::borrow::Borrow;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use contract::key::Secret;
use hyper::{Method, Request};
use serde_json::{Value, json};

use crate::http::{self, Reply};

/// Calls the REST API of one control plane with one key.
#[derive(Clone, Debug)]
pub struct Rest {
    pub address: SocketAddr,
    pub key: Secret,
}

impl Rest {
    pub async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Reply> {
        http::send_json(self.address, method, path, Some(self.key.reveal()), body).await
    }

    /// Generates the user's key, in place of the one there was.
    pub async fn generate(&self, email: &str) -> Result<String> {
        let body = json!({"email": email, "key_name": "Test Key"});
        let answer = self.succeed(Method::POST, "/api/user/key", Some(&body)).await?;
        Ok(answer["key"].as_str().context("no key in the answer")?.to_owned())
    }

    pub async fn revoke(&self, email: &str) -> Result<()> {
        self.succeed(Method::DELETE, &format!("/api/user/key/{email}"), None).await.map(|_| ())
    }

    /// The status of the user's key: `keyPreference`.
    pub async fn status(&self, email: &str) -> Result<Value> {
        let mut answer = self.succeed(Method::GET, &format!("/api/user/key/{email}"), None).await?;
        Ok(answer["keyPreference"].take())
    }

    /// The path of a user, who is created if there is none with this address.
    pub async fn user(&self, email: &str) -> Result<String> {
        let reply = self.call(Method::POST, "/v1/users", Some(&json!({"email": email}))).await?;
        ensure!([200, 201].contains(&reply.status), "POST /v1/users: {} {:?}", reply.status, reply.body);
        let id = reply.json()?["id"].as_str().context("a user without an id")?.to_owned();
        Ok(format!("/v1/users/{id}"))
    }

    /// A call that answers with JSON and this status.
    pub async fn expect(&self, method: Method, path: &str, body: Option<&Value>, status: u16) -> Result<Value> {
        let reply = self.call(method.clone(), path, body).await?;
        ensure!(reply.status == status, "{method} {path}: {} {:?}", reply.status, reply.body);
        reply.json()
    }

    pub async fn get(&self, path: &str) -> Result<Value> {
        self.expect(Method::GET, path, None, 200).await
    }

    pub async fn post(&self, path: &str, body: impl Borrow<Value>) -> Result<Value> {
        self.expect(Method::POST, path, Some(body.borrow()), 201).await
    }

    pub async fn patch(&self, path: &str, body: impl Borrow<Value>) -> Result<Value> {
        self.expect(Method::PATCH, path, Some(body.borrow()), 200).await
    }

    /// Creates a key of the user; its id and the key itself.
    pub async fn create(&self, email: &str) -> Result<(String, String)> {
        self.create_with(json!({"email": email, "name": "Test Key"})).await
    }

    /// Creates a key with these fields; its id and the key itself.
    pub async fn create_with(&self, body: impl Borrow<Value>) -> Result<(String, String)> {
        id_and_secret(&self.post("/v1/keys", body).await?)
    }

    /// Imports keys: one JSON object a line.
    pub async fn import(&self, lines: String) -> Result<Value> {
        let request = Request::post("/v1/keys/import")
            .header("x-api-key", self.key.reveal())
            .header("content-type", "application/x-ndjson")
            .body(lines.into())?;
        let reply = http::send(self.address, request).await?;
        ensure!(reply.status == 200, "import: {} {:?}", reply.status, reply.body);
        reply.json()
    }

    async fn succeed(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value> {
        let reply = self.call(method.clone(), path, body).await?;
        ensure!(reply.status == 200, "{method} {path}: {} {:?}", reply.status, reply.body);
        let answer = reply.json()?;
        ensure!(answer["success"] == true, "{method} {path}: {answer}");
        Ok(answer)
    }
}

/// The id and the secret of a key that was created.
pub fn id_and_secret(key: &Value) -> Result<(String, String)> {
    let text = |field: &str| key[field].as_str().map(ToOwned::to_owned).context("a field is missing");
    Ok((text("id")?, text("secret")?))
}
