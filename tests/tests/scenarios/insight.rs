//! What operators see: the explanation of a decision, counts, exports to other systems, and the
//! progress of each Envoy.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use hyper::Method;
use portcullis_tests::control_plane::GENEROUS;
use portcullis_tests::http::{self, Reply};
use portcullis_tests::load::{Load, Plan, with_status};
use portcullis_tests::process::Signal;
use portcullis_tests::rest::Rest;
use portcullis_tests::stack::{Stack, wait_for_status};
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};

/// Makes a key; its id and secret.
async fn create(rest: &Rest, email: &str, scopes: &[&str]) -> Result<(String, String)> {
    rest.create_with(json!({"email": email, "name": "a key", "scopes": scopes})).await
}

/// What Envoy made of a request: the outcome as far as an answer tells it, and the status of a refusal.
fn answered(reply: &Reply) -> Result<(Option<String>, Option<u16>)> {
    if reply.status == 200 {
        return Ok((None, None));
    }
    let code = reply.json()?["code"].as_str().context("no code")?.to_owned();
    Ok((Some(code), Some(reply.status)))
}

/// Longer than a screen: one table.
#[tokio::test]
async fn explain_says_what_envoy_answers_whatever_is_wrong_with_the_key_and_whatever_the_route_asks() -> Result<()> {
    for policy in [
        json!({"scopes": {"all": ["orders:read"]}}),
        json!({"scopes": {"any": ["orders:read", "orders:list"]}, "shadow": true}),
        json!({"key": "anonymous_allowed"}),
        json!({"key": "optional"}),
    ] {
        let stack = Stack::builder()
            .plugin(&json!({"rate_limit": null}))
            .policies(&json!({"default": policy}))
            .start_unsynced()
            .await?;
        let rest = stack.rest();
        let mut presented = vec![None, Some("sk_live_nobody".to_owned())];
        for (number, (scopes, change)) in [
            (&["orders:read"][..], None),
            (&["orders:*"], None),
            (&["orders:write"], None),
            (&["orders:read"], Some("revoked_at = now()")),
            (&["orders:read"], Some("expires_at = now()")),
            (&["orders:read"], Some("disabled = true")),
            (&["orders:read"], Some("networks = '{192.0.2.0/24}'")),
            (&["orders:read"], Some("networks = '{127.0.0.0/8}'")),
            (&["orders:read"], Some("quota_exceeded = true")),
        ]
        .into_iter()
        .enumerate()
        {
            let (id, key) = create(&rest, &format!("user{number}@example.com"), scopes).await?;
            if let Some(change) = change {
                stack.database.execute(&format!("update api_keys set {change} where id = '{id}'")).await?;
            }
            presented.push(Some(key));
        }
        stack.in_step().await?;
        for key in &presented {
            let reply = stack.get(key.as_deref()).await?;
            let (code, status) = answered(&reply)?;
            let mut asked = json!({"path": "/orders?page=2", "address": "127.0.0.1"});
            if let Some(key) = key {
                asked["key"] = key.as_str().into();
            }
            let explained = rest.call(Method::POST, "/v1/explain", Some(&asked)).await?;
            let explained = explained.json()?;
            assert_eq!(explained["status"], json!(status), "{policy}: {explained}");
            if let Some(code) = code {
                assert_eq!(explained["outcome"], code, "{policy}: {explained}");
            }
            // The secret is not in the answer, and in no log.
            if let Some(key) = key {
                assert!(!explained.to_string().contains(key.as_str()));
                assert!(!stack.control_plane.log().text().contains(key.as_str()));
            }
        }
    }
    Ok(())
}

/// The user has `allowed` requests, and some that were refused.
async fn allowed_and_refused_are_apart_in_a_bill(rest: &Rest, allowed: u64) -> Result<()> {
    let path = "/v1/usage?email=ada@example.com";
    let refused = rest.get(&format!("{path}&outcome=disabled")).await?["usage"][0]["refused"].clone();
    for zone in ["Europe/Berlin", "Pacific/Auckland"] {
        for interval in ["day", "week", "month"] {
            let bill = rest.get(&format!("{path}&group_by=user&time_zone={zone}&interval={interval}")).await?;
            assert_eq!(bill["time_zone"], zone);
            let rows = bill["usage"].as_array().context("no sums")?;
            // A new day may have begun meanwhile.
            ensure!((1..=2).contains(&rows.len()), "{bill}");
            let sum = |field: &str| rows.iter().filter_map(|row| row[field].as_u64()).sum::<u64>();
            assert_eq!((sum("allowed"), json!(sum("refused")), sum("other")), (allowed, refused.clone(), 0), "{bill}");
            for row in rows {
                let start = row["start"].as_str().context("no start")?;
                ensure!(start.contains("T00:00:00+") && row["email"] == "ada@example.com", "{row}");
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn real_requests_are_summed_by_interval_and_outcome_as_json_and_csv() -> Result<()> {
    let stack = Stack::builder().plugin(&json!({"rate_limit": null})).start().await?;
    let rest = stack.rest();
    let (id, key) = create(&rest, "ada@example.com", &["orders:read"]).await?;
    let plan = json!({});
    rest.expect(Method::PUT, "/v1/plans/gold", Some(&plan), 201).await?;
    rest.patch(&format!("/v1/keys/{id}"), json!({"plan": "gold"})).await?;
    wait_for_status(stack.envoy(), Some(&key), 200).await?;
    for _ in 0..9 {
        assert_eq!(stack.get(Some(&key)).await?.status, 200);
    }
    stack.database.execute(&format!("update api_keys set disabled = true where id = '{id}'")).await?;
    stack.wait_for_status(Some(&key), 401).await?;
    let allowed = stack.demo.requests();
    for interval in ["hour", "day", "week", "month", "total"] {
        let path = format!("/v1/usage?group_by=key,user,scope,outcome&key_id={id}&interval={interval}");
        let counted = async || {
            let usage = rest.get(&path).await.ok()?["usage"].as_array()?.clone();
            // A new hour may begin meanwhile.
            let sum = |outcome: &str| -> u64 {
                let rows = usage.iter().filter(|row| row["outcome"] == outcome);
                rows.filter_map(|row| row["requests"].as_u64()).sum()
            };
            (sum("allowed") >= allowed && sum("disabled") >= 1).then_some((sum("allowed"), usage.clone()))
        };
        let (sum, usage) = eventually("all requests to be counted", counted).await?;
        assert_eq!(sum, allowed);
        let row = &usage[0];
        assert_eq!((&row["key_id"], &row["email"]), (&json!(id), &json!("ada@example.com")));
        assert_eq!((&row["scope"], row.get("start").is_some()), (&json!("orders:read"), interval != "total"));
    }
    let by_plan = rest.get("/v1/usage?group_by=plan&outcome=allowed").await?;
    assert_eq!(
        by_plan["usage"],
        json!([{
            "plan": "gold", "requests": allowed, "allowed": allowed, "refused": 0, "other": 0, "cost": 0
        }])
    );
    let path = format!("/v1/usage?group_by=outcome&key_id={id}&outcome=allowed&format=csv");
    let csv = rest.call(Method::GET, &path, None).await?;
    assert_eq!(csv.header("content-type"), Some("text/csv; charset=utf-8; header=present"));
    let expected = format!("outcome,requests,allowed,refused,other,cost\r\nallowed,{allowed},{allowed},0,0,0\r\n");
    assert_eq!(std::str::from_utf8(&csv.body)?, expected);
    allowed_and_refused_are_apart_in_a_bill(&rest, allowed).await?;
    // Those without a known key count for the operator.
    let keyless = async || {
        let usage = rest.get("/v1/usage?group_by=key,outcome").await.ok()?["usage"].as_array()?.clone();
        usage.iter().any(|row| row["key_id"].is_null() && row["outcome"] == "unknown").then_some(())
    };
    eventually("requests with an unknown key to be counted", keyless).await
}

/// A reader that takes over usage and remembers the last event that it took.
#[derive(Default)]
struct Meter {
    cursor: String,
    ids: std::collections::BTreeSet<String>,
    requests: BTreeMap<String, u64>,
}

impl Meter {
    /// Reads all new events; keeps its state if the control plane does not answer.
    async fn read(&mut self, rest: &Rest) -> Result<()> {
        loop {
            let path =
                format!("/v1/usage/events?after={}&limit=2", if self.cursor.is_empty() { "0" } else { &self.cursor });
            let reply = rest.call(Method::GET, &path, None).await?;
            ensure!(reply.status == 200, "{path}: {} {:?}", reply.status, reply.body);
            ensure!(reply.header("content-type") == Some("application/cloudevents-batch+json"), "{:?}", reply.headers);
            let events = reply.json()?.as_array().cloned().unwrap_or_default();
            if events.is_empty() {
                return Ok(());
            }
            for event in &events {
                ensure!(event["specversion"] == "1.0" && event["type"] == "dev.portcullis.usage.v1", "{event}");
                let id = event["id"].as_str().context("no id")?;
                ensure!(self.ids.insert(id.to_owned()), "{event} came twice");
                let outcome = event["data"]["outcome"].as_str().context("no outcome")?;
                let requests = event["data"]["requests"].as_u64().context("no requests")?;
                *self.requests.entry(outcome.to_owned()).or_default() += requests;
            }
            self.cursor = reply.header("portcullis-cursor").context("no cursor")?.to_owned();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_metering_system_takes_over_every_request_once_though_the_control_plane_is_killed_and_restarted() -> Result<()>
{
    const REQUESTS: u64 = 5_000;
    let arguments = [&GENEROUS[..], &["--usage-event-interval", "1s"]].concat();
    let stack = Stack::builder()
        .envoys(2)
        .plugin(&json!({"rate_limit": null}))
        .control_plane_arguments(&arguments)
        .start()
        .await?;
    let rest = stack.rest();
    let (_, key) = create(&rest, "ada@example.com", &[]).await?;
    stack.wait_for_status(Some(&key), 200).await?;
    let before = stack.demo.requests();
    let load = Load::start(Plan { requests: REQUESTS, ..Plan::endless(&stack.envoys, vec![key], Some(1_000)) });
    let mut meter = Meter::default();
    for (share, signal) in [(3, Signal::SIGKILL), (2, Signal::SIGTERM)] {
        let what = format!("a part of {share} of the requests");
        eventually(&what, async || (load.sent() >= REQUESTS / share).then_some(())).await?;
        meter.read(&rest).await?;
        stack.control_plane.stop(signal).await?;
        stack.control_plane.restart().await?;
    }
    let answers = load.finish().await;
    assert_eq!(with_status(&answers, 200), REQUESTS, "{answers:?}");
    let all = before + REQUESTS;
    let taken = async || {
        meter.read(&rest).await.ok()?;
        (meter.requests.get("allowed").copied().unwrap_or_default() >= all).then_some(())
    };
    eventually("an event for every request", taken).await?;
    assert_eq!(meter.requests.get("allowed"), Some(&all));
    let usage = rest.get("/v1/usage?group_by=outcome&outcome=allowed").await?;
    let expected = json!([{
        "outcome": "allowed", "requests": all, "allowed": all, "refused": 0, "other": 0, "cost": 0
    }]);
    assert_eq!(usage["usage"], expected);
    // Who reads it all again reads the same.
    let mut again = Meter::default();
    again.read(&rest).await?;
    assert_eq!((again.ids, again.requests), (meter.ids, meter.requests));
    Ok(())
}

#[tokio::test]
async fn a_revocation_tells_on_how_many_envoys_it_is_applied_and_for_how_long_one_lags() -> Result<()> {
    let stack = Stack::builder().envoys(2).start().await?;
    let rest = stack.rest();
    let revoked = async |email: &str| -> Result<String> {
        let (id, key) = create(&rest, email, &[]).await?;
        // The stopped one does not answer.
        wait_for_status(stack.envoy(), Some(&key), 200).await?;
        let reply = rest.call(Method::DELETE, &format!("/v1/keys/{id}"), None).await?;
        ensure!(reply.status == 204, "{} {:?}", reply.status, reply.body);
        Ok(format!("/v1/keys/{id}"))
    };
    let applied_on = async |path: &str| -> Result<Value> { Ok(rest.get(path).await?["applied_on"].clone()) };
    let everywhere = json!({"envoys": 2, "applied": 2, "max_lag_seconds": null, "unreachable": 0});

    let path = revoked("one@example.com").await?;
    let applied = async || (applied_on(&path).await.ok()? == everywhere).then_some(());
    eventually("the revocation to be applied on both Envoys", applied).await?;
    let envoys = rest.get("/v1/envoys").await?;
    let shown = envoys["envoys"].as_array().context("no Envoys")?.clone();
    assert_eq!(shown.len(), 2, "{envoys}");
    for filter in &shown {
        assert_eq!((&filter["live"], &filter["address"]), (&json!(true), &json!("127.0.0.1")), "{filter}");
        assert_eq!(filter["epoch"], envoys["epoch"], "{filter}");
    }

    let stopped = stack.envoys.last().context("no Envoy")?;
    stopped.signal(Signal::SIGSTOP)?;
    let began = Instant::now();
    let path = revoked("two@example.com").await?;
    let lagging = async |more_than: f64| {
        let applied = applied_on(&path).await.ok()?;
        let oldest = applied["max_lag_seconds"].as_f64()?;
        (applied["envoys"] == 2 && applied["applied"] == 1 && oldest > more_than).then_some(oldest)
    };
    let first = eventually("one of two Envoys to have the revocation", async || lagging(0.0).await).await?;
    let later = eventually("the other to lag for longer", async || lagging(first + 1.0).await).await?;
    let most = began.elapsed().as_secs_f64();
    ensure!(later <= most, "{later} of {most}");
    let behind = rest.get("/v1/envoys").await?;
    let behind = behind["envoys"].as_array().context("no Envoys")?.clone();
    assert_eq!(behind.iter().filter(|filter| filter["up_to_date"] == false).count(), 1, "{behind:?}");

    stopped.signal(Signal::SIGCONT)?;
    let applied = async || (applied_on(&path).await.ok()? == everywhere).then_some(());
    eventually("the revocation to be applied on both Envoys again", applied).await?;
    assert_eq!(http::get(stack.control_plane.address(), "/readyz").await?.status, 200);
    stack.in_step().await
}

#[tokio::test]
async fn the_command_line_explains_what_envoy_answers() -> Result<()> {
    let stack = Stack::start().await?;
    let rest = stack.rest();
    let policy = json!({"kinds": ["live"], "match": [{"hosts": ["api.example.com"], "path": {"prefix": "/orders"}}]});
    rest.expect(Method::PUT, "/v1/policies/orders", Some(&policy), 201).await?;
    let test_key = json!({"email": "ada@example.com", "name": "a test key", "kind": "test"});
    let (id, key) = rest.create_with(&test_key).await?;
    rest.create_with(&test_key).await?;
    let explain = async |arguments: &[&str], server: &str| {
        let mut command = tokio::process::Command::new(portcullis_tests::paths::control_plane());
        command.args(["explain", "--server", server]).args(arguments).env("PORTCULLIS_KEY", rest.key.reveal());
        let output = command.output().await?;
        let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        anyhow::Ok((output.status.success(), said.concat()))
    };
    let server = format!("http://{}/", rest.address);
    let url = ["--url", "https://api.example.com/orders?page=2"];
    let (ended_well, said) = explain(&[&url[..], &["--key-prefix", &key[..14]]].concat(), &server).await?;
    assert!(ended_well && said.starts_with("kind_denied: Envoy answers 403\n\nCHECK "), "{said}");
    let kind = said.lines().find(|line| line.starts_with("kind ")).context("no check of the kind")?;
    assert!(kind.ends_with("kind_denied  the route accepts live, the kind of the key is test"), "{kind}");
    let (_, said) = explain(&["--url", "http://api.example.com", "--key-id", &id, "-o", "json"], &server).await?;
    assert_eq!(serde_json::from_str::<Value>(&said)?["outcome"], "allowed");
    let (_, said) = explain(&url, &server).await?;
    assert!(said.starts_with("missing: Envoy answers 401"), "{said}");
    for (arguments, at, expected) in [
        (
            &["--key-prefix", "sk_live_000000"][..],
            &*server,
            "portcullis: --key-prefix: no key begins with sk_live_000000\n",
        ),
        (
            &["--key-prefix", "sk_"],
            &server,
            "portcullis: --key-prefix: several keys begin with sk_; name one by its id: ",
        ),
        (
            &["--address", "here"],
            &server,
            "portcullis: the control plane answered 400: address: must be an IPv4 or IPv6 address",
        ),
        (&[], "http://127.0.0.1:1", "portcullis: http://127.0.0.1:1 cannot be reached: "),
    ] {
        let (ended_well, said) = explain(&[&url[..], arguments].concat(), at).await?;
        assert!(!ended_well && said.starts_with(expected), "{said}");
    }
    Ok(())
}
