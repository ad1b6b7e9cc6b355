//! The REST API as an administrator uses it.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use contract::key::Secret;
use hyper::Method;
use serde_json::{Value, json};

use crate::http::{self, Reply};

/// Calls the REST API of one control plane with one key.
#[derive(Clone, Debug)]
pub struct Rest {
    /// The control plane.
    pub address: SocketAddr,
    /// The caller's key.
    pub key: Secret,
}

impl Rest {
    /// Any call.
    ///
    /// # Errors
    /// If the control plane does not answer.
    pub async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Reply> {
        http::send_json(self.address, method, path, Some(self.key.reveal()), body).await
    }

    /// Generates the user's key, in place of the one there was.
    ///
    /// # Errors
    /// If that does not succeed.
    pub async fn generate(&self, email: &str) -> Result<String> {
        let body = json!({"email": email, "key_name": "Test Key"});
        let answer = self.succeed(Method::POST, "/api/user/key", Some(&body)).await?;
        Ok(answer["key"].as_str().context("no key in the answer")?.to_owned())
    }

    /// Revokes the user's key.
    ///
    /// # Errors
    /// If that does not succeed.
    pub async fn revoke(&self, email: &str) -> Result<()> {
        self.succeed(Method::DELETE, &format!("/api/user/key/{email}"), None).await.map(|_| ())
    }

    /// The status of the user's key: `keyPreference`.
    ///
    /// # Errors
    /// If that does not succeed.
    pub async fn status(&self, email: &str) -> Result<Value> {
        let mut answer = self.succeed(Method::GET, &format!("/api/user/key/{email}"), None).await?;
        Ok(answer["keyPreference"].take())
    }

    async fn succeed(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value> {
        let reply = self.call(method.clone(), path, body).await?;
        ensure!(reply.status == 200, "{method} {path}: {} {:?}", reply.status, reply.body);
        let answer = reply.json()?;
        ensure!(answer["success"] == true, "{method} {path}: {answer}");
        Ok(answer)
    }
}
