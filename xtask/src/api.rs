//! The REST API against its own OpenAPI document: schemathesis makes requests out of the document, good ones and bad ones,
//! and looks at each answer. Refused are answers of 500 and more, and those that the document does not describe.

use anyhow::{Context, Result, bail, ensure};
use hyper::Method;
use portcullis_tests::control_plane::{self, ControlPlane, fresh_key};
use portcullis_tests::log::Log;
use portcullis_tests::postgres::Postgres;
use portcullis_tests::{http, tools};

use crate::output::progress;
use crate::run::{cargo, run};

/// Requests for each operation and each way of making them. With the seed they are the same in every run.
const EXAMPLES: &str = "40";
const SEED: &str = "20261125";

/// What is asked of each answer. Not asked is whether every request that fits the document is taken and every other refused:
/// a document cannot say all rules, such as that a time must lie in the future.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,\
                      response_schema_conformance,unsupported_method";

/// Runs it.
pub(crate) async fn check() -> Result<()> {
    run(cargo(&["build", "--locked", "--package", "control-plane"]))?;
    let mut schemathesis = tools::schemathesis(&progress)?;
    let server = Postgres::private().await?;
    let database = server.create_database().await?;
    let home = tempfile::TempDir::with_prefix("portcullis-api-")?;
    let log = Log::create(&home.path().join("control-plane.log"))?;
    let admin_key = fresh_key()?;
    let settings = control_plane::Settings {
        listen: ([127, 0, 0, 1], 0).into(),
        database_url: database.url.clone(),
        admin_key: admin_key.clone(),
        sync_key: fresh_key()?,
        arguments: ["--api-rate-limit", "100000", "--api-burst", "100000"].map(Into::into).into(),
        log_level: "info".into(),
        environment: Vec::new(),
    };
    let control_plane = ControlPlane::start(settings, home.path(), log).await?;

    let document = home.path().join("openapi.json");
    std::fs::write(&document, http::get(control_plane.address(), "/openapi.json").await?.body)?;
    schemathesis.current_dir(home.path()).arg("run").arg(&document);
    schemathesis.arg("--url").arg(format!("http://{}", control_plane.address()));
    // With the admin's key: without it the rest would only show that strangers are refused.
    schemathesis.arg("--header").arg(format!("X-API-Key: {}", admin_key.reveal()));
    schemathesis.args(["--checks", CHECKS, "--max-examples", EXAMPLES, "--seed", SEED, "--continue-on-failure"]);
    schemathesis.args(["--phases", "examples,coverage,fuzzing", "--no-color", "--suppress-health-check", "all"]);
    // It does not know how to write lines of JSON; imports have tests of their own.
    schemathesis.args(["--exclude-path", "/v1/keys/import"]);
    schemathesis.args(["--request-timeout", "30", "--warnings", "off"]);
    let status = tokio::task::spawn_blocking(move || schemathesis.status()).await?.context("python3 cannot be run")?;
    control_plane.must_run()?;
    let still =
        http::send_json(control_plane.address(), Method::GET, "/v1/keys", Some(admin_key.reveal()), None).await?;
    ensure!(
        still.status == 200,
        "the requests revoked the key that they came with, and the rest of them showed nothing"
    );
    if !status.success() {
        bail!("the REST API does not keep to its document; what it logged:\n{}", control_plane.log().tail(20));
    }
    Ok(())
}
