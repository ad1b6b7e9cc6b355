//! Which policy a request gets on a real Envoy: each source of a policy's name, and each form of a match.

use anyhow::Result;
use contract::outcome::Outcome;
use http_body_util::Full;
use hyper::{Method, Request};
use portcullis_harness::dice::Dice;
use portcullis_tests::expect::assert_refused;
use portcullis_tests::filter_harness::{FilterHarness, with};
use portcullis_tests::http::{get_request, send};
use portcullis_tests::stack::{Stack, wait_for_path};
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};

/// Policies that each require a scope of their own name.
fn named(names: &[&str]) -> Value {
    names.iter().map(|name| ((*name).to_owned(), json!({"scopes": {"all": [name]}}))).collect()
}

/// A key for each policy, with the scope that it requires.
fn keys<'a>(names: &[&'a str]) -> Vec<(&'a str, contract::record::Record)> {
    (1..)
        .zip(names)
        .map(|(number, name)| (*name, with(number, |record| record.scopes = vec![(*name).to_owned()])))
        .collect()
}

/// The policies that apply to a request: those whose key passes.
async fn applying<'a>(
    harness: &FilterHarness,
    names: &[&'a str],
    method: &Method,
    path: &str,
    headers: &[(&str, &str)],
) -> Result<Vec<&'a str>> {
    let mut passed = Vec::new();
    for name in names {
        let mut request = Request::builder().method(method).uri(path).header("x-api-key", *name);
        for (header, value) in headers {
            request = request.header(*header, *value);
        }
        let reply = harness.send(request.body(Full::default())?).await?;
        if reply.status == 200 {
            passed.push(*name);
        } else {
            assert_refused(&reply, Outcome::ScopeDenied, &[]);
        }
    }
    Ok(passed)
}

/// Before the route for everything.
const ROUTES: &str = "- match: { prefix: /route }
                          metadata: { filter_metadata: { portcullis: { policy: route } } }
                          route: { cluster: upstream }
                        - match: { prefix: /annotated }
                          metadata:
                            filter_metadata:
                              envoy-gateway:
                                resources:
                                  - kind: HTTPRoute
                                    namespace: default
                                    name: reports
                                    sectionName: all
                                    annotations: { portcullis-policy: annotation }
                          route: { cluster: upstream }
                        - match: { prefix: /forbidden }
                          metadata:
                            filter_metadata:
                              envoy-gateway:
                                resources:
                                  - kind: HTTPRoute
                                    namespace: default
                                    name: reports
                                    sectionName: all
                                    annotations: { portcullis-policy: platform }
                          route: { cluster: upstream }
                        - match: { prefix: /name-of-the-platform }
                          name: platform
                          route: { cluster: upstream }
                        - match: { prefix: /prefix-of-the-platform }
                          name: policy.platform
                          route: { cluster: upstream }
                        - match: { prefix: /other-annotation }
                          metadata:
                            filter_metadata:
                              envoy-gateway: { resources: [ { kind: HTTPRoute, annotations: { other: route } } ] }
                          route: { cluster: upstream }
                        - match: { prefix: /prefixed }
                          name: policy.prefixed
                          route: { cluster: upstream }
                        - match: { prefix: /misspelt }
                          name: policy.perfixed
                          route: { cluster: upstream }
                        - match: { prefix: /named }
                          name: named
                          route: { cluster: upstream }
                        - match: { prefix: /unnamed }
                          name: default/httproute/0
                          route: { cluster: upstream }
                        ";
const MATCH: &str = "- match: { prefix: / }";
const DOMAINS: &str = "domains: [\"*\"]\n";
const HOST: &str = "domains: [\"*\"]
                      metadata: { filter_metadata: { portcullis: { policy: host } } }
";

#[tokio::test]
async fn each_source_names_the_policy_and_the_first_that_does_decides() -> Result<()> {
    const NAMES: [&str; 8] = ["route", "annotation", "prefixed", "named", "rule", "host", "platform", "default"];
    let sources = json!(["route_metadata", {"annotation": "portcullis-policy"}, {"route_name_prefix": "policy."},
        "route_name", "rules", "virtual_host_metadata"]);
    let mut policies = named(&NAMES);
    policies["platform"]["from_annotation"] = false.into();
    policies["rule"]["match"] = json!([{"path": {"prefix": "/ruled"}}, {"path": {"prefix": "/route"}}]);
    for has_host in [true, false] {
        let harness = FilterHarness::builder().plugin(json!({"policy_sources": sources})).policies(&policies);
        let harness = harness.edit(MATCH, &format!("{ROUTES}{MATCH}"));
        let harness = if has_host { harness.edit(DOMAINS, HOST) } else { harness };
        let harness = harness.start(&keys(&NAMES)).await?;
        let last = if has_host { "host" } else { "default" };
        for (path, name) in [
            ("/route", "route"),
            ("/annotated", "annotation"),
            ("/other-annotation", last),
            ("/prefixed", "prefixed"),
            ("/named", "named"),
            ("/unnamed", last),
            ("/ruled/1", "rule"),
            ("/", last),
        ] {
            assert_eq!(applying(&harness, &NAMES, &Method::GET, path, &[]).await?, [name], "{path}");
        }
        // What the owner of a route may not name, and what does not exist.
        for path in ["/forbidden", "/name-of-the-platform", "/prefix-of-the-platform", "/misspelt"] {
            for name in NAMES {
                assert_refused(&harness.get(path, Some(name)).await?, Outcome::PolicyUnknown, &[]);
            }
        }
        for line in [
            "the annotation portcullis-policy of a route names the policy \"platform\", which has from_annotation false",
            "the name of a route names the policy \"perfixed\", which does not exist",
        ] {
            assert!(!harness.envoy.log().lines_with(line).is_empty(), "{line}");
        }
        // A policy that is withdrawn while a source names it.
        harness.remove_policies(&["route", "annotation", "prefixed", "named", "host"]).await?;
        let unknown = if has_host {
            &["/route", "/annotated", "/prefixed", "/"][..]
        } else {
            &["/route", "/annotated", "/prefixed"]
        };
        for path in unknown {
            let reply = harness.get(path, Some("default")).await?;
            assert_eq!(reply.status, 503, "{path}");
            assert_refused(&reply, Outcome::PolicyUnknown, &[]);
        }
        harness.stat_is("decisions.policy_unknown_total", 4 * NAMES.len() as u64 + unknown.len() as u64).await?;
        for (source, name) in [
            ("the metadata of a route", "route"),
            ("the annotation portcullis-policy of a route", "annotation"),
            ("the name of a route", "prefixed"),
            ("the metadata of a virtual host", "host"),
        ] {
            let line = format!("{source} names the policy {name:?}, which does not exist");
            assert_eq!(harness.envoy.log().lines_with(&line).is_empty(), name == "host" && !has_host, "{line}");
        }
        // Every route has a name. That of a policy that is gone is one among others, so the next source decides.
        if !has_host {
            assert_eq!(applying(&harness, &NAMES, &Method::GET, "/named", &[]).await?, ["default"]);
        }
    }
    Ok(())
}

#[tokio::test]
async fn each_form_of_a_match_picks_a_policy_and_the_most_specific_applies() -> Result<()> {
    const NAMES: [&str; 8] = ["exact", "prefix", "template", "post", "host", "suffix", "model", "default"];
    let mut policies = named(&NAMES);
    for (name, matches) in [
        ("exact", json!([{"path": {"exact": "/orders/new"}}])),
        ("prefix", json!([{"path": {"prefix": "/orders"}}])),
        ("template", json!([{"path": {"template": "/orders/{id}/items"}}])),
        ("post", json!([{"path": {"prefix": "/orders"}, "methods": ["POST", "PUT"]}])),
        ("host", json!([{"hosts": ["api.example.com"]}])),
        ("suffix", json!([{"hosts": ["*.example.com"]}])),
        ("model", json!([{"path": {"prefix": "/orders"}, "header": {"name": "x-model", "value": "gpt-*"}}])),
    ] {
        policies[name]["match"] = matches;
    }
    let harness = FilterHarness::builder().policies(&policies).start(&keys(&NAMES)).await?;
    let plain: [(&str, &str); 0] = [];
    for (method, path, headers, name) in [
        (Method::GET, "/orders", &plain[..], "prefix"),
        (Method::GET, "/orders/new?x=/", &plain, "exact"),
        (Method::GET, "/orders/7/items", &plain, "template"),
        (Method::GET, "/orders/7/items/8", &plain, "prefix"),
        (Method::GET, "/orders-old", &plain, "default"),
        (Method::POST, "/orders/7", &plain, "post"),
        (Method::POST, "/orders/new", &plain, "exact"),
        (Method::POST, "/orders/7", &[("x-model", "gpt-5")], "model"),
        (Method::GET, "/orders", &[("x-model", "other")], "prefix"),
        (Method::GET, "/orders", &[("host", "API.example.com:8080")], "host"),
        (Method::GET, "/orders", &[("host", "b.example.com")], "suffix"),
        (Method::GET, "/orders", &[("host", "example.com")], "prefix"),
        // Other spellings of a path that has a rule.
        (Method::GET, "//orders/./new", &plain, "exact"),
        (Method::GET, "/orders/x/../new", &plain, "exact"),
        (Method::GET, "/x/../%6Frders;v=1/new", &plain, "exact"),
        (Method::GET, "/", &plain, "default"),
    ] {
        assert_eq!(applying(&harness, &NAMES, &method, path, headers).await?, [name], "{method} {path} {headers:?}");
    }
    // Envoy accepts a host that no name can have. Rules for suffixes would not see all of it.
    let long = format!("{}.example.com", "a".repeat(260));
    let request = Request::get("/orders").header("x-api-key", "default").header("host", long);
    assert_refused(&harness.send(request.body(Full::default())?).await?, Outcome::PolicyUnknown, &[]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_obeys_a_policy_once_its_change_is_answered_and_refuses_when_it_is_gone() -> Result<()> {
    let stack = Stack::builder().route("/named", "named").policies(&json!({"named": {}})).envoys(2).start().await?;
    let (rest, key) = (stack.rest(), stack.working_key("ada@example.com").await?);
    let ask = async |path: &str, key: Option<&str>| -> Result<Vec<u16>> {
        let mut statuses = Vec::new();
        for envoy in &stack.envoys {
            statuses.push(send(envoy.address(), get_request(path, key)?).await?.status);
        }
        Ok(statuses)
    };
    let change = async |method: &str, name: &str, body: Option<Value>| -> Result<u16> {
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(format!("/v1/policies/{name}"))
            .header("x-api-key", rest.key.reveal())
            .header("content-type", "application/json")
            .header("prefer", "wait=5");
        Ok(send(rest.address, request.body(body.into())?).await?.status)
    };
    for _ in 0..5 {
        let scoped = json!({"scopes": {"all": ["reports:read"]}, "match": [{"path": {"prefix": "/reports"}}]});
        assert!([200, 201].contains(&change("PUT", "reports", Some(scoped)).await?));
        assert_eq!((ask("/reports/1", Some(&key)).await?, ask("/", Some(&key)).await?), (vec![403; 2], vec![200; 2]));
        let open = json!({"key": "anonymous_allowed", "match": [{"path": {"prefix": "/reports"}}]});
        assert_eq!(change("PUT", "reports", Some(open)).await?, 200);
        assert_eq!((ask("/reports/1", None).await?, ask("/", None).await?), (vec![200; 2], vec![401; 2]));
    }
    let applied_on = rest.get("/v1/policies/reports").await?["applied_on"].take();
    assert_eq!((&applied_on["envoys"], &applied_on["applied"]), (&json!(2), &json!(2)));
    assert_eq!(change("PUT", "default", Some(json!({"key": "optional"}))).await?, 200);
    assert_eq!(ask("/", None).await?, [200; 2]);
    assert_eq!((ask("/named", Some(&key)).await?, ask("/named", None).await?), (vec![200; 2], vec![401; 2]));
    // A route names the policy, so it is in use.
    let named = async || rest.get("/v1/policies/named").await.ok()?["last_named_at"].is_string().then_some(());
    eventually("the name to be reported", named).await?;
    assert_eq!(change("DELETE", "named", None).await?, 409);
    assert_eq!(ask("/named", Some(&key)).await?, [200; 2]);
    assert_eq!(rest.get("/v1/policies/reports").await?["last_named_at"], Value::Null, "its rule picks it");
    assert_eq!(change("DELETE", "named?force=true", None).await?, 204);
    assert_eq!(ask("/named", Some(&key)).await?, [503; 2]);
    for envoy in &stack.envoys {
        envoy.wait_for_stat("wasmcustom.portcullis.decisions.policy_unknown_total", |refused| refused == 1).await?;
        assert!(!envoy.log().lines_with("names the policy \"named\", which does not exist").is_empty());
    }
    Ok(())
}

/// Random policies and random requests: `explain` names the policy that Envoy applies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn explain_and_envoy_pick_the_same_policy_for_random_requests() -> Result<()> {
    const PATHS: [&str; 6] = ["/a", "/a/b", "/a/{x}", "/{x}/b", "/a/b/c", "/b"];
    let mut dice = Dice::new(18);
    let pick = |dice: &mut Dice, all: &[&'static str]| all.get(dice.below(all.len())).copied().unwrap_or_default();
    let stack = Stack::start().await?;
    let rest = stack.rest();
    let mut names = Vec::new();
    for number in 0..60 {
        let path = pick(&mut dice, &PATHS);
        let form = match (path.contains('{'), dice.below(2)) {
            (true, _) => "template",
            (false, 0) => "exact",
            (false, _) => "prefix",
        };
        let mut rule = json!({"path": {form: path}});
        if dice.below(3) == 0 {
            rule["methods"] = json!([pick(&mut dice, &["GET", "POST"])]);
        }
        if dice.below(3) == 0 {
            rule["hosts"] = json!([pick(&mut dice, &["x.example", "*.example", "y.example"])]);
        }
        if dice.below(4) == 0 {
            rule["header"] = json!({"name": "x-model", "value": pick(&mut dice, &["m", "m*", "n"])});
        }
        let name = format!("p{number}");
        let body = json!({"scopes": {"all": [name]}, "match": [rule]});
        // The control plane refuses a policy whose match conflicts with an earlier one.
        if rest.call(Method::PUT, &format!("/v1/policies/{name}"), Some(&body)).await?.status == 201 {
            names.push(name);
        }
    }
    assert!(names.len() > 20, "{names:?}");
    names.push("default".into());
    rest.expect(Method::PUT, "/v1/policies/default", Some(&json!({"scopes": {"all": ["default"]}})), 200).await?;
    let mut keys = std::collections::BTreeMap::new();
    for name in &names {
        let body = json!({"email": "ada@example.com", "name": name, "scopes": [name]});
        keys.insert(name.clone(), rest.create_with(body).await?.1);
    }
    let (_, none) = rest.create("ada@example.com").await?;
    stack.in_step().await?;
    wait_for_path(stack.envoy(), "/", Some(&none), 403).await?;
    let mut by_rule = 0;
    for _ in 0..300 {
        let (method, host) = (pick(&mut dice, &["GET", "POST"]), pick(&mut dice, &["x.example", "y.example", "z.org"]));
        let path: String =
            (0..dice.below(4)).map(|_| format!("/{}", pick(&mut dice, &["a", "b", "c", "%61"]))).collect();
        let path = if path.is_empty() { "/".to_owned() } else { path };
        let model = (dice.below(2) == 0).then(|| pick(&mut dice, &["m", "mn", "n"]));
        let headers: Value = model.iter().map(|model| ("x-model".to_owned(), json!(model))).collect();
        let body = json!({"method": method, "path": path, "host": host, "headers": headers});
        let explained = rest.expect(Method::POST, "/v1/explain", Some(&body), 200).await?;
        let name = explained["policy"].as_str().unwrap_or_default();
        by_rule += usize::from(name != "default");
        let key = keys.get(name).map_or("", String::as_str);
        for (key, status) in [(key, 200), (none.as_str(), 403)] {
            let mut request =
                Request::builder().method(method).uri(&path).header("host", host).header("x-api-key", key);
            if let Some(model) = model {
                request = request.header("x-model", model);
            }
            let reply = send(stack.envoy().address(), request.body(Full::default())?).await?;
            assert_eq!(reply.status, status, "{body}: {name}");
        }
    }
    assert!(by_rule > 100, "{by_rule}");
    Ok(())
}
