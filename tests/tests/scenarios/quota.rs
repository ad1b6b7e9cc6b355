//! Quotas: a number of requests in a window, and again with the next window. For one key over three
//! Envoys, and for every kind of window.

use anyhow::{Context, Result};
use contract::outcome::Outcome;
use portcullis_tests::envoy::Envoy;
use portcullis_tests::expect::assert_refused;
use portcullis_tests::http::{get_request, send};
use portcullis_tests::load::{Load, Plan, with_status};
use portcullis_tests::stack::{Stack, wait_for_status};
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};

const ADA: &str = "ada@example.com";
const REQUESTS: u64 = 320;

async fn key_path(stack: &Stack) -> Result<String> {
    let sql = format!("select primary_key_id::text from user_preferences where email = '{ADA}'");
    Ok(format!("/v1/keys/{}", stack.database.text(&sql).await?))
}

async fn quota(stack: &Stack) -> Result<Value> {
    stack.rest().get(&format!("{}/quota", key_path(stack).await?)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quota_is_shared_by_all_envoys_and_opens_by_itself_with_the_next_window() -> Result<()> {
    let stack = Stack::builder().envoys(3).plugin(&json!({"rate_limit": null})).start().await?;
    let key = stack.rest().generate(ADA).await?;
    stack.wait_for_status(Some(&key), 200).await?;
    let before = stack.demo.requests();
    stack.wait_for_usage(ADA, before).await?;
    let body = json!({"quota": {"requests": REQUESTS, "period": "day", "time_zone": "UTC"}});
    stack.rest().patch(&key_path(&stack).await?, body).await?;
    stack.in_step().await?;

    let load = Load::start(Plan {
        targets: stack.envoys.iter().map(Envoy::address).collect(),
        keys: vec![key.clone()],
        connections: 6,
        requests: u64::MAX,
        per_second: Some(600),
    });
    eventually("the quota to be used up", async || (quota(&stack).await.ok()?["exceeded"] == true).then_some(()))
        .await?;
    for envoy in &stack.envoys {
        wait_for_status(envoy, Some(&key), 429).await?;
    }
    let answers = load.stop().await;
    assert_eq!(with_status(&answers, 200) + with_status(&answers, 429), answers.values().sum::<u64>(), "{answers:?}");
    let admitted = stack.demo.requests() - before;
    assert_eq!(admitted, REQUESTS);
    for envoy in &stack.envoys {
        let reply = send(envoy.address(), get_request("/orders", Some(&key))?).await?;
        assert_refused(&reply, Outcome::QuotaExceeded, &[]);
        // Until midnight.
        let wait: u64 = reply.header("retry-after").context("no retry-after")?.parse()?;
        assert!((1..=86_400).contains(&wait), "{wait}");
    }
    let shown = async || (quota(&stack).await.ok()?["used"] == admitted).then_some(());
    eventually("all requests to be counted", shown).await?;
    let seen = quota(&stack).await?;
    assert_eq!((&seen["remaining"], &seen["resets_at"]), (&json!(0), &seen["window_end"]));

    // Midnight is in three seconds: each Envoy knows the time, and admits requests again.
    stack.database.execute("update quota_use set window_end = now() + interval '3 seconds'").await?;
    stack.change_key(ADA, "quota_resets_at = now() + interval '3 seconds', quota_fill = quota_fill + 1").await?;
    for envoy in &stack.envoys {
        wait_for_status(envoy, Some(&key), 200).await?;
    }
    let counted = async || (quota(&stack).await.ok()?["used"].as_u64()? < REQUESTS).then_some(());
    eventually("a window that begins anew", counted).await
}

/// The weekday, from 1 for Monday, and the day of the month on which the window ends, where the quota says it is midnight.
async fn ends_on(stack: &Stack, view: &Value, zone: &str) -> Result<(u8, u8)> {
    let end = view["window_end"].as_str().context("no window_end")?;
    let sql = format!("select to_char('{end}'::timestamptz at time zone '{zone}', 'ID DD HH24:MI:SS')");
    let shown = stack.database.text(&sql).await?;
    let mut parts = shown.split(' ');
    let mut part = || parts.next().context("too few parts");
    let (weekday, day) = (part()?.parse()?, part()?.parse()?);
    assert_eq!(part()?, "00:00:00", "{shown}");
    Ok((weekday, day))
}

/// Longer than a screen: one story.
#[tokio::test]
async fn a_quota_of_every_period_is_used_up_says_when_it_opens_and_opens_then() -> Result<()> {
    let stack = Stack::start().await?;
    let rest = stack.rest();
    for (number, quota) in [
        json!({"requests": 4, "period": "day", "time_zone": "Asia/Kathmandu"}),
        json!({"requests": 4, "period": "week", "time_zone": "Europe/Berlin"}),
        json!({"requests": 4, "period": "month", "time_zone": "America/St_Johns"}),
        json!({"requests": 4, "period": "rolling", "window_seconds": 3_600}),
    ]
    .into_iter()
    .enumerate()
    {
        let body = json!({"email": format!("user{number}@example.com"), "name": "with a quota", "quota": quota});
        let (id, key) = rest.create_with(body).await?;
        let path = format!("/v1/keys/{id}/quota");
        let before = stack.demo.requests();
        wait_for_status(stack.envoy(), Some(&key), 200).await?;
        let used_up = async || {
            send(stack.envoy().address(), get_request("/orders", Some(&key)).ok()?).await.ok()?;
            let view = rest.get(&path).await.ok()?;
            (view["exceeded"] == true).then_some(view)
        };
        let view = eventually("the quota to be used up", used_up).await?;
        assert_eq!((&view["used"], &view["remaining"]), (&json!(4), &json!(0)), "{view}");
        assert_eq!(stack.demo.requests() - before, 4, "one Envoy admits just the quota");
        wait_for_status(stack.envoy(), Some(&key), 429).await?;
        let reply = send(stack.envoy().address(), get_request("/orders", Some(&key))?).await?;
        assert_refused(&reply, Outcome::QuotaExceeded, &[]);
        let wait: u64 = reply.header("retry-after").context("no retry-after")?.parse()?;
        let (period, zone) = (&quota["period"], quota["time_zone"].as_str().unwrap_or("UTC"));
        let most = match period.as_str() {
            Some("day") => {
                ends_on(&stack, &view, zone).await?;
                86_400 + 3_600
            }
            Some("week") => {
                assert_eq!(ends_on(&stack, &view, zone).await?.0, 1, "{view}");
                // An hour more at most, where clocks are set back.
                7 * 86_400 + 3_600
            }
            Some("month") => {
                assert_eq!(ends_on(&stack, &view, zone).await?.1, 1, "{view}");
                31 * 86_400 + 3_600
            }
            _ => 3_660,
        };
        assert!((1..=most).contains(&wait), "{period}: {wait}");
        // So long ago: the window has passed, or has rolled on.
        let past = "update quota_use set window_start = window_start - interval '40 days',
            window_end = now() - interval '40 days' where subject = ";
        stack.database.execute(&format!("{past}'{id}'")).await?;
        let soon = "update api_keys set quota_resets_at = now() + interval '2 seconds', quota_fill = quota_fill + 1
            where id = ";
        stack.database.execute(&format!("{soon}'{id}'")).await?;
        wait_for_status(stack.envoy(), Some(&key), 200).await?;
        let counted = async || {
            let view = rest.get(&path).await.ok()?;
            (view["used"].as_u64()? == 1).then_some(())
        };
        eventually("a window that begins anew", counted).await?;
    }
    Ok(())
}
