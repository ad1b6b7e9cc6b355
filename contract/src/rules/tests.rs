use super::*;

/// A request by its text, for tests.
#[derive(Clone, Debug, Default)]
struct Request {
    host: &'static str,
    path: &'static str,
    method: &'static str,
    header: Option<(&'static str, &'static str)>,
}

impl Target for Request {
    fn host(&self) -> Option<Vec<u8>> {
        Some(self.host.into())
    }

    fn path(&self) -> Option<Vec<u8>> {
        Some(self.path.into())
    }

    fn method(&self) -> Option<Vec<u8>> {
        Some(self.method.into())
    }

    fn header(&self, name: &str) -> Option<Vec<u8>> {
        self.header.filter(|(own, _)| *own == name).map(|(_, value)| value.into())
    }
}

fn get(host: &'static str, path: &'static str) -> Request {
    Request { host, path, method: "GET", header: None }
}

fn exact(path: &str) -> Match {
    Match { path: Some(PathMatch::Exact(path.into())), ..Match::default() }
}

fn prefix(path: &str) -> Match {
    Match { path: Some(PathMatch::Prefix(path.into())), ..Match::default() }
}

fn template(path: &str) -> Match {
    Match { path: Some(PathMatch::Template(path.into())), ..Match::default() }
}

fn host(host: &str, matches: Match) -> Match {
    Match { hosts: vec![host.into()], ..matches }
}

fn header(name: &str, value: &str, matches: Match) -> Match {
    Match { header: Some(HeaderMatch { name: name.into(), value: value.into() }), ..matches }
}

fn methods(methods: &[&str], matches: Match) -> Match {
    Match { methods: methods.iter().map(ToString::to_string).collect(), ..matches }
}

fn rules(rules: &[(&str, Match)]) -> Rules {
    for (_, matches) in rules {
        assert_eq!(matches.check(), Ok(()), "{matches}");
    }
    let policies: Vec<NamedPolicy> = rules
        .iter()
        .map(|(name, matches)| NamedPolicy {
            name: (*name).into(),
            matches: vec![matches.clone()],
            ..NamedPolicy::default()
        })
        .collect();
    Rules::new(policies.iter())
}

fn found<'a>(rules: &'a Rules, request: &Request) -> Option<&'a str> {
    rules.find(request).unwrap().map(|rule| rule.policy.as_str())
}

#[test]
fn the_most_specific_path_applies_segment_by_segment() {
    let rules = rules(&[
        ("all", prefix("/")),
        ("orders", prefix("/orders")),
        ("list", exact("/orders/")),
        ("one", template("/orders/{id}")),
        ("new", exact("/orders/new")),
        ("items", template("/orders/{id}/items")),
        ("new-below", prefix("/orders/new/x")),
    ]);
    for (path, policy) in [
        ("/", "all"),
        ("/orders-old", "all"),
        ("/Orders", "all"),
        ("/orders", "list"),
        ("/orders?id=/orders/new", "list"),
        ("/orders/", "list"),
        ("/orders/7", "one"),
        ("/orders/new", "new"),
        ("/orders/7/items", "items"),
        // The text `new` leads nowhere, so the variable does.
        ("/orders/new/items", "items"),
        ("/orders/new/x/y", "new-below"),
        ("/orders/7/lines", "orders"),
        ("/orders/7/items/8", "orders"),
    ] {
        assert_eq!(found(&rules, &get("a", path)), Some(policy), "{path}");
    }
}

#[test]
fn a_spelling_of_a_path_makes_no_difference() {
    let rules = rules(&[("strict", prefix("/strict")), ("open", prefix("/open"))]);
    for path in
        ["//strict", "/%73trict", "/strict;v=1/x", "/strict#/open", "/strict/%", "/strict/%zz", "/;a/strict/%ff"]
    {
        assert_eq!(found(&rules, &get("a", path)), Some("strict"), "{path}");
    }
    for path in ["/STRICT", "/%2573trict", "strict%20", "", "*"] {
        assert_eq!(found(&rules, &get("a", path)), None, "{path}");
    }
    assert_eq!(segments(b"/a%20b//c/").unwrap(), [&b"a b"[..], b"c"]);
}

#[test]
fn a_path_that_can_be_read_in_several_ways_fits_no_rule_and_is_an_error() {
    let rules = rules(&[("strict", prefix("/strict")), ("open", prefix("/open"))]);
    for path in [
        "/./strict",
        "/open/../strict",
        "/open/%2e%2e/strict",
        "/open/..;v=1/strict",
        "/strict/%2e%2e;/open",
        "/..",
        "/open/.%2E",
        "/open/x%2f..%2fstrict",
        "/open%5Cstrict",
        "/open%00",
    ] {
        assert_eq!(rules.find(&get("a", path)), Err(AmbiguousTarget), "{path}");
    }
    // Without rules the path is not looked at.
    assert_eq!(Rules::NONE.find(&get("a", "/..")), Ok(None));
}

#[test]
fn a_request_without_a_path_gets_the_rules_for_all_and_one_with_a_host_that_is_too_long_is_refused() {
    let rules = rules(&[("get", methods(&["GET"], Match::default())), ("host", host("*.a.b", Match::default()))]);
    assert_eq!(found(&rules, &get("x.a.b", "")), Some("host"));
    let long: &'static str = Box::leak(format!("{}a.b", "a.".repeat(30_000)).into_boxed_str());
    assert_eq!(rules.find(&get(long, "/")), Err(AmbiguousTarget));
    let longest: &'static str = Box::leak(format!("{}.a.b:65535", "a".repeat(250)).into_boxed_str());
    assert_eq!((longest.len(), found(&rules, &get(longest, "/"))), (260, Some("host")));
}

#[test]
fn the_host_is_more_specific_than_the_path_and_a_longer_suffix_than_a_shorter_one() {
    let rules = rules(&[
        ("path", exact("/a")),
        ("com", host("*.com", prefix("/"))),
        ("example", host("*.example.com", prefix("/"))),
        ("api", host("api.example.com", prefix("/a/b"))),
    ]);
    for (host, path, policy) in [
        ("other.org", "/a", Some("path")),
        ("other.org", "/b", None),
        ("x.com", "/a", Some("com")),
        ("com", "/a", Some("path")),
        ("x.y.example.com", "/a", Some("example")),
        ("API.Example.COM:8443", "/a/b/c", Some("api")),
        ("api.example.com.", "/a/b/c", Some("api")),
        ("api.example.com", "/a", Some("example")),
        ("[::1]:80", "/a", Some("path")),
    ] {
        assert_eq!(found(&rules, &get(host, path)), policy, "{host} {path}");
    }
}

#[test]
fn a_header_is_more_specific_than_methods_and_an_exact_value_than_a_prefix() {
    let rules = rules(&[
        ("plain", prefix("/v1")),
        ("post", methods(&["POST", "PUT"], prefix("/v1"))),
        ("gpt", header("x-model", "gpt-*", prefix("/v1"))),
        ("gpt-5", header("x-model", "gpt-5*", prefix("/v1"))),
        ("exact", header("x-model", "gpt-5", prefix("/v1"))),
        ("any-model", header("x-model", "*", prefix("/v1"))),
    ]);
    for (method, model, policy) in [
        ("GET", None, "plain"),
        ("POST", None, "post"),
        ("POST", Some("gpt-4"), "gpt"),
        ("POST", Some("gpt-5-mini"), "gpt-5"),
        ("GET", Some("gpt-5"), "exact"),
        ("GET", Some("other"), "any-model"),
    ] {
        let request = Request { method, header: model.map(|model| ("x-model", model)), ..get("a", "/v1/chat") };
        assert_eq!(found(&rules, &request), Some(policy), "{request:?}");
    }
}

#[test]
fn rules_that_the_order_cannot_tell_apart_conflict() {
    let ties = |one: Match, other: Match| conflict(&rules(&[("one", one), ("other", other)])).is_some();
    let gpt = |matches| header("x-model", "gpt-*", matches);
    for (one, other, expected) in [
        (exact("/a"), exact("/a/"), true),
        (exact("/a"), prefix("/a"), false),
        (template("/{a}/x"), template("/{b}/x"), true),
        (template("/{a}/x"), template("/y/{b}"), false),
        (methods(&["GET"], exact("/a")), methods(&["GET", "PUT"], exact("/a")), true),
        (methods(&["GET"], exact("/a")), methods(&["PUT"], exact("/a")), false),
        (methods(&["GET"], exact("/a")), exact("/a"), false),
        (host("a.b", exact("/a")), host("*.b", exact("/a")), false),
        (Match { hosts: vec!["a".into(), "b".into()], ..exact("/a") }, host("b", exact("/a")), true),
        (gpt(exact("/a")), header("x-model", "gpt-4", exact("/a")), false),
        (gpt(exact("/a")), header("x-model", "abc-*", exact("/a")), false),
        (gpt(exact("/a")), header("x-other", "gpt-*", exact("/a")), true),
        (header("x-a", "1", exact("/a")), header("x-b", "22", exact("/a")), true),
        (gpt(methods(&["GET"], exact("/a"))), gpt(exact("/a")), false),
    ] {
        assert_eq!(ties(one.clone(), other.clone()), expected, "{one} / {other}");
    }
    // A policy does not conflict with itself.
    assert!(conflict(&rules(&[("one", exact("/a")), ("one", exact("/a"))])).is_none());
}

#[test]
fn an_error_names_the_field() {
    for (matches, field) in [
        (Match::default(), ""),
        (host("Api", Match::default()), "hosts"),
        (host("a:80", Match::default()), "hosts"),
        (host("*", Match::default()), "hosts"),
        (host("a..b", Match::default()), "hosts"),
        (exact("a"), "path"),
        (exact("/a?b"), "path"),
        (exact("/a//b"), "path"),
        (exact("/a/../b"), "path"),
        (exact("/a/{id}"), "path"),
        (prefix("/%41"), "path"),
        (template("/a"), "path"),
        (template("/a/x{id}"), "path"),
        (template("/a/{}"), "path"),
        (methods(&["get"], Match::default()), "methods"),
        (header("X-Model", "a", Match::default()), "header.name"),
        (header("", "a", Match::default()), "header.name"),
        (header("x", "", Match::default()), "header.value"),
        (header("x", "a*b", Match::default()), "header.value"),
        (header("x", " a", Match::default()), "header.value"),
    ] {
        assert_eq!(matches.check().unwrap_err().field, field, "{matches}");
    }
}

#[test]
fn a_rule_is_described_in_words() {
    let all = methods(&["GET", "PUT"], host("*.a.b", header("x-model", "gpt-*", template("/orders/{id}"))));
    assert_eq!(all.to_string(), "GET or PUT, host *.a.b, path like /orders/{id}, header x-model: gpt-*");
    assert_eq!(prefix("/a").to_string(), "path /a and below");
}
