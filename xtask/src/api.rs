//! Step `api`: schemathesis generates valid and invalid requests from the OpenAPI document and sends them to the control
//! plane, with the key of an admin and with the key of a user. A response with status 500 or above fails the step, and so
//! does a response that the document does not describe.

use anyhow::{Context, Result, bail, ensure};
use contract::key::Secret;
use hyper::Method;
use portcullis_harness::control_plane::{ControlPlane, Settings};
use portcullis_harness::http;
use portcullis_harness::log::Log;
use portcullis_harness::postgres::Postgres;
use serde_json::json;

use crate::tools;

/// Requests for each operation and phase, with the admin's key and with the user's. The seed makes them the same in every
/// run.
const EXAMPLES: [&str; 2] = ["40", "10"];
const SEED: &str = "20261125";

/// The checks of each response. Whether valid requests succeed is not checked: a document cannot express all rules, such as
/// that a time must lie in the future.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,\
                      response_schema_conformance,unsupported_method";

/// Teaches schemathesis what the document cannot express.
const HOOKS: &str = include_str!("../schemathesis_hooks.py");

/// Tests the control plane that is built.
pub(crate) async fn check() -> Result<()> {
    let server = Postgres::private().await?;
    let database = server.create_database().await?;
    let home = tempfile::TempDir::with_prefix("portcullis-api-")?;
    let log = Log::create(&home.path().join("control-plane.log"))?;
    let control_plane = ControlPlane::start(Settings::generous(&database)?, home.path(), log).await?;
    let admin_key = control_plane.settings().admin_key;

    let document = http::get(control_plane.address(), "/openapi.json").await?.body;
    let address = control_plane.address();
    for (as_user, examples) in [false, true].into_iter().zip(EXAMPLES) {
        let new = json!({"email": "generated@portcullis.example", "name": "asks"});
        let made =
            http::send_json(address, Method::POST, "/v1/keys", Some(admin_key.reveal()), Some(&new)).await?.json()?;
        let text = |field: &str| made[field].as_str().map(ToOwned::to_owned).with_context(|| format!("no {field}"));
        let (user_key, id) = (Secret::from_presented(text("secret")?), text("id")?);
        let (key, spared) =
            (if as_user { &user_key } else { &admin_key }, format!("{id},{},{}", text("email")?, text("owner_id")?));
        let home = tempfile::TempDir::with_prefix("portcullis-api-")?;
        let mut generated = tools::schemathesis()?;
        std::fs::write(home.path().join("openapi.json"), &document)?;
        std::fs::write(home.path().join("hooks.py"), HOOKS)?;
        generated.current_dir(home.path()).env("SCHEMATHESIS_HOOKS", "hooks").env("SPARED", &spared);
        generated.args(["run", "openapi.json"]);
        generated.arg("--url").arg(format!("http://{address}"));
        generated.arg("--header").arg(format!("X-API-Key: {}", key.reveal()));
        generated.args(["--checks", CHECKS, "--max-examples", examples, "--seed", SEED, "--continue-on-failure"]);
        generated.args(["--phases", "examples,coverage,fuzzing", "--no-color", "--suppress-health-check", "all"]);
        generated.args(["--request-timeout", "120", "--warnings", "off"]);
        let status = tokio::task::spawn_blocking(move || generated.status()).await?.context("python3 cannot be run")?;
        control_plane.must_run()?;
        let path = if as_user { format!("/v1/keys/{id}") } else { "/v1/keys".to_owned() };
        let still = http::send_json(address, Method::GET, &path, Some(key.reveal()), None).await?;
        let told = String::from_utf8_lossy(&still.body).into_owned();
        ensure!(
            still.status == 200,
            "a request revoked the key that the test uses, so later requests tested nothing: {told}"
        );
        if !status.success() {
            bail!(
                "the REST API differs from its OpenAPI document; the end of its log:\n{}",
                control_plane.log().tail(20)
            );
        }
    }
    Ok(())
}
