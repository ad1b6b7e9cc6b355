//! Shadow mode: no request is refused, and the upstream, the operator and usage learn which would
//! have been.

use anyhow::{Context, Result};
use contract::id::OwnerId;
use contract::outcome::Outcome;
use contract::record::{Budget, Flags, Per, RateLimit, Record};
use http_body_util::Full;
use hyper::Request;
use limits::pool::PoolId;
use portcullis_tests::expect::{IDENTITY, SCOPED, assert_refused, assert_upstream};
use portcullis_tests::fake_control_plane::Faults;
use portcullis_tests::filter_harness::{FilterHarness, record, with};
use portcullis_tests::http::{Reply, with_key};
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};

const HEADER: &str = "x-portcullis-shadow";

/// The request went upstream without identity, and with the header that names the outcome.
#[track_caller]
fn assert_shadowed(reply: &Reply, outcome: Outcome) {
    let headers = assert_upstream(reply, &[HEADER]);
    assert_eq!(headers[HEADER], json!([outcome.name()]));
}

/// A key for each outcome.
fn keys() -> Vec<(&'static str, Record)> {
    let credits = Some(Budget { fill: 1, resets_at_s: None, per: Per::Key });
    let limit = RateLimit { name: "own".into(), requests: 1, window_s: 3_600, burst: 1, shared: true, per: Per::Key };
    let keys = [
        (
            "good",
            with(1, |r| {
                r.scopes = vec!["orders:read".into()];
                r.credits = credits;
            }),
        ),
        ("revoked", with(2, |r| r.flags = Flags::REVOKED)),
        ("scopeless", record(3)),
        (
            "limited",
            with(4, |r| {
                r.scopes = vec!["orders:read".into()];
                r.rate_limits = vec![limit];
                r.credits = credits;
            }),
        ),
    ];
    let all_the_others = ["quotaless", "creditless", "elsewhere", "off", "ended"];
    let others = all_the_others.into_iter().zip(5..).map(|(name, number)| {
        let record = with(number, |r| {
            r.scopes = vec!["orders:read".into()];
            match name {
                "quotaless" => r.quota = Some(Budget { fill: 1, resets_at_s: None, per: Per::Key }),
                "creditless" => {
                    // An owner of its own.
                    r.owner_id.0 = [0x33; 16];
                    r.credits = Some(Budget { fill: 1, resets_at_s: None, per: Per::Key });
                }
                "elsewhere" => r.networks = vec!["192.0.2.0/24".parse().unwrap()],
                "off" => r.flags = Flags::DISABLED,
                _ => r.expires_at_s = Some(1),
            }
        });
        (name, record)
    });
    keys.into_iter().chain(others).collect()
}

#[tokio::test]
async fn a_policy_in_shadow_refuses_nothing_and_tells_what_it_would_have_refused() -> Result<()> {
    let policies = json!({"dark": {"shadow": true, "scopes": {"all": ["orders:read"]}}});
    let keys = keys();
    let harness = FilterHarness::builder().policies(&policies).route("/dark", "dark").start(&keys).await?;
    harness.control_plane.limits().set_left(PoolId::of_credits(OwnerId([0x22; 16])), 10, None);
    assert_upstream(&harness.get("/dark", Some("good")).await?, &SCOPED);
    assert_upstream(&harness.get("/dark", Some("limited")).await?, &SCOPED);
    let would_be = [
        (None, Outcome::Missing),
        (Some("stranger"), Outcome::Unknown),
        (Some("revoked"), Outcome::Revoked),
        (Some("scopeless"), Outcome::ScopeDenied),
        (Some("limited"), Outcome::RateLimited),
        (Some("quotaless"), Outcome::QuotaExceeded),
        (Some("creditless"), Outcome::CreditsExhausted),
        (Some("elsewhere"), Outcome::AddressDenied),
        (Some("off"), Outcome::Disabled),
        (Some("ended"), Outcome::Expired),
    ];
    for (key, outcome) in would_be {
        assert_shadowed(&harness.get("/dark", key).await?, outcome);
        let stat = |kind| format!("{kind}.{}_total", outcome.name());
        harness.stat_is(&stat("shadow_decisions"), 1).await?;
        harness.stat_is(&stat("decisions"), 0).await?;
    }
    // Other routes refuse as ever.
    assert_refused(&harness.get("/", Some("revoked")).await?, Outcome::Revoked, &[]);
    for (_, outcome) in would_be {
        let reported = async || (harness.control_plane.reported_in_shadow(outcome) == 1).then_some(());
        eventually(&format!("{outcome:?} to be reported"), reported).await?;
    }
    // Workers publish on their own, so what was enforced may come later.
    let enforced = async || (harness.control_plane.reported(Outcome::Revoked) == 1).then_some(());
    eventually("the refusal to be reported", enforced).await?;
    let paid = async || (harness.control_plane.reported_cost(Outcome::Allowed) == 2).then_some(());
    eventually("what was allowed to be reported", paid).await?;
    let reported = [Outcome::Revoked, Outcome::Missing].map(|outcome| harness.control_plane.reported(outcome));
    assert_eq!(reported, [1, 0]);

    harness.send(Request::get("/dark/logged").body(Full::default())?).await?;
    let line: Value = serde_json::from_str(&harness.envoy.log().wait_for("/dark/logged").await?)?;
    assert_eq!((&line["shadow"], &line["refused"], &line["status"]), (&json!("missing"), &Value::Null, &json!(200)));
    Ok(())
}

#[tokio::test]
async fn in_shadow_everywhere_not_even_missing_keys_or_policies_refuse_a_request() -> Result<()> {
    let plugin = json!({"shadow": true, "max_staleness": "60s"});
    // Only damaged updates, so that there are no keys yet.
    let faults = Faults { updates: u32::MAX, ..Faults::default() };
    let keys = [("good", record(1))];
    let harness = FilterHarness::builder().plugin(plugin.clone()).faults(faults);
    let harness = harness.start_unsynced(&keys).await?;
    assert_shadowed(&harness.get("/", Some("good")).await?, Outcome::NotReady);
    harness.stat_is("shadow_decisions.not_ready_total", 1).await?;

    let faults = Faults { age_s: 3_600, ..Faults::default() };
    let harness = FilterHarness::builder().plugin(plugin.clone()).faults(faults).start(&keys).await?;
    assert_shadowed(&harness.get("/", Some("good")).await?, Outcome::Stale);

    let harness = FilterHarness::builder().plugin(plugin).policies(&json!({"read": {}})).route("/typo", "raed");
    let harness = harness.start(&keys).await?;
    assert_shadowed(&harness.get("/typo", Some("good")).await?, Outcome::PolicyUnknown);
    Ok(())
}

#[tokio::test]
async fn in_shadow_everywhere_good_keys_have_their_identity() -> Result<()> {
    let harness = FilterHarness::builder().plugin(json!({"shadow": true})).start(&[("good", record(1))]).await?;
    assert_upstream(&harness.get("/", Some("good")).await?, &IDENTITY);
    assert_shadowed(&harness.get("/", Some("stranger")).await?, Outcome::Unknown);
    Ok(())
}

#[tokio::test]
async fn only_the_filter_sets_the_shadow_header() -> Result<()> {
    let policies = json!({"dark": {"shadow": true}, "open": {"key": "anonymous_allowed"}});
    let harness = FilterHarness::builder().policies(&policies).route("/dark", "dark").route("/open", "open");
    let harness = harness.start(&[("good", record(1))]).await?;
    let claim = async |path: &str, key: Option<&str>| {
        let request = Request::get(path).header(HEADER, "allowed").header("X-Portcullis-Shadow", "expired");
        let request = with_key(request, key);
        harness.send(request.body(Full::default()).context("a request")?).await
    };
    assert_upstream(&claim("/", Some("good")).await?, &IDENTITY);
    assert_upstream(&claim("/dark", Some("good")).await?, &IDENTITY);
    assert_upstream(&claim("/open", None).await?, &[]);
    assert_shadowed(&claim("/dark", None).await?, Outcome::Missing);
    Ok(())
}
