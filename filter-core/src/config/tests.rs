use contract::record::Per;

use super::*;

const MINIMAL: &str = r#"{"control_plane": {"cluster": "cp"}}"#;

fn error(json: &str) -> String {
    Config::parse(json.as_bytes()).unwrap_err().to_string()
}

fn with(fields: &str) -> String {
    format!(r#"{{"control_plane": {{"cluster": "cp"}}, {fields}}}"#)
}

#[test]
fn the_smallest_configuration_has_safe_defaults() {
    let config = Config::parse(MINIMAL.as_bytes()).unwrap();
    let expected = Config {
        cluster: "cp".into(),
        authority: "portcullis".into(),
        sync_key_env: "PORTCULLIS_SYNC_KEY".into(),
        pepper_env: None,
        pepper: None,
        store: "default".into(),
        key_sources: vec![Source::Header("x-api-key".into())],
        strip_key: true,
        identity: IdentityHeaders {
            consumer: Some("x-consumer-id".into()),
            credential: Some("x-credential-identifier".into()),
            scopes: Some("x-credential-scopes".into()),
            packed: None,
            attributes: vec![],
            unused: vec![],
        },
        envoy_removes_identity_headers: false,
        remove_headers: vec![],
        trailers_removed: {
            let [consumer, credential, scopes] = USUAL;
            let own = ["x-api-key", consumer, credential, scopes, "x-portcullis-shadow"];
            own.into_iter().chain(FOREIGN).map(str::to_owned).collect()
        },
        rate_limit: Some(RateLimit {
            name: "default".into(),
            requests: 1_000,
            window_s: 1,
            burst: 2_000,
            shared: false,
            per: Per::Key,
        }),
        access_log_state: true,
        rate_limit_state: false,
        policy_sources: vec![PolicySource::RouteMetadata, PolicySource::VirtualHostMetadata, PolicySource::Rules],
        are_sources_given: false,
        shadow: false,
        failure_mode: FailureModes { not_ready: FailureMode::Deny, stale: FailureMode::Deny },
        max_staleness_ms: None,
        limits_wait_ms: 250,
        on_limits_unreachable: LimitModes {
            rate_limits: RateMode::SafeRate,
            quotas: FailureMode::Deny,
            credits: FailureMode::Deny,
        },
        challenge: Challenge::new("portcullis", &[Source::Header("x-api-key".into())]).unwrap(),
    };
    assert_eq!(format!("{config:?}"), format!("{expected:?}"));
    let fields = [
        "store",
        "pepper_env",
        "key_header",
        "key_sources",
        "strip_key",
        "identity_headers",
        "envoy_removes_identity_headers",
        "remove_headers",
        "access_log_state",
        "rate_limit_state",
        "policy_sources",
        "shadow",
        "failure_mode",
        "max_staleness",
        "limits",
        "on_limits_unreachable",
        "realm",
    ];
    let nulls = fields.map(|field| format!("\"{field}\": null")).join(", ");
    let control_plane = r#"{"cluster": "cp", "authority": null, "sync_key_env": null}"#;
    let nulls = format!(r#"{{"control_plane": {control_plane}, {nulls}}}"#);
    assert_eq!(format!("{:?}", Config::parse(nulls.as_bytes()).unwrap()), format!("{expected:?}"));
}

#[test]
fn every_field_can_be_set() {
    let json = r#"{
        "control_plane": {"cluster": "cp", "authority": "keys.internal", "sync_key_env": "KEY"},
        "store": "second", "key_header": "Authorization-Key", "strip_key": false,
        "identity_headers": {
            "consumer": "X-Who", "credential": "", "scopes": "", "attributes": {"X-Tenant-Id": "owner.metadata.tenant"}
        },
        "rate_limit": {"requests": 5, "window": "60s"}, "access_log_state": false, "remove_headers": ["X-Tenant"],
        "failure_mode": {"not_ready": "allow", "stale": "allow"}, "max_staleness": "90s", "realm": "orders"
    }"#;
    let config = Config::parse(json.as_bytes()).unwrap();
    assert_eq!(config.key_sources, [Source::Header("authorization-key".into())]);
    let unused = USUAL.map(str::to_owned).to_vec();
    let attribute = AttributeHeader { header: "x-tenant-id".into(), attribute: "owner.metadata.tenant".into() };
    let expected = IdentityHeaders {
        consumer: Some("x-who".into()),
        credential: None,
        scopes: None,
        packed: None,
        attributes: vec![attribute],
        unused,
    };
    assert_eq!(config.identity, expected);
    let packed = with(
        r#""identity_headers": {"packed": "X-Identity", "scopes": "x-scopes"}, "envoy_removes_identity_headers": true"#,
    );
    let Config { identity, envoy_removes_identity_headers, .. } = Config::parse(packed.as_bytes()).unwrap();
    assert_eq!((identity.packed, identity.scopes), (Some("x-identity".into()), Some("x-scopes".into())));
    assert_eq!(
        (identity.credential, identity.unused, envoy_removes_identity_headers),
        (None, USUAL.map(str::to_owned).to_vec(), true)
    );
    assert_eq!(config.remove_headers, ["x-tenant"]);
    for name in [
        "x-tenant",
        "x-tenant-id",
        "x-who",
        "authorization-key",
        "x-consumer-id",
        "x-portcullis-shadow",
        "x-consumer-groups",
    ] {
        assert!(config.trailers_removed.iter().any(|removed| removed == name), "{name}");
    }
    assert_eq!(
        config.rate_limit,
        Some(RateLimit { name: "default".into(), requests: 5, window_s: 60, burst: 5, shared: false, per: Per::Key })
    );
    let open = FailureModes { not_ready: FailureMode::Allow, stale: FailureMode::Allow };
    assert_eq!(config.failure_mode, open);
    let failure_mode = |json: &str| Config::parse(with(json).as_bytes()).unwrap().failure_mode;
    let stale = FailureModes { stale: FailureMode::Allow, ..FailureModes::default() };
    assert_eq!(failure_mode(r#""failure_mode": {"not_ready": null, "stale": "allow"}"#), stale);
    assert_eq!((config.max_staleness_ms, config.strip_key, config.access_log_state), (Some(90_000), false, false));
    assert_eq!(Config::parse(with(r#""rate_limit": null"#).as_bytes()).unwrap().rate_limit, None);
}

#[test]
fn a_mistake_is_named_with_its_field_and_remedy() {
    assert!(error("").contains("at least {\"control_plane\""));
    assert_eq!(error("{}"), "control_plane: is missing");
    assert_eq!(error(r#"[{"cluster": "cp"}]"#), "must be an object");
    assert_eq!(error(r#"{"control_plane": ["cp", "portcullis", "KEY"]}"#), "control_plane: must be an object");
    assert_eq!(error(&with(r#""identity_headers": ["a", "b", "c"]"#)), "identity_headers: must be an object");
    assert_eq!(error(&with(r#""rate_limit": [5, 60, 5]"#)), "rate_limit: must be an object");
    assert_eq!(error(&with(r#""rate_limit": {"requests": 5}"#)), "rate_limit.window: is missing");
    assert!(error("{").contains("EOF"));
    assert!(error(&with(r#""rate_limits": {}"#)).starts_with("rate_limits: is not a known field; the fields are "));
    assert!(error(r#"{"control_plane": {"cluster": ""}}"#).contains("control_plane.cluster: must not be empty"));
    for field in ["control_plane.authority", "control_plane.sync_key_env", "store", "pepper_env"] {
        let json = match field.split_once('.') {
            Some((_, field)) => format!(r#"{{"control_plane": {{"cluster": "cp", "{field}": ""}}}}"#),
            None => with(&format!(r#""{field}": """#)),
        };
        assert_eq!(error(&json), format!("{field}: must not be empty"));
    }
    for field in ["consumer", "credential", "scopes", "packed"] {
        let json = with(&format!(r#""identity_headers": {{"{field}": ":path"}}"#));
        assert!(error(&json).starts_with(&format!("identity_headers.{field}: \":path\" is not a header name")));
    }
    assert!(error(&with(r#""key_header": ":path""#)).contains("key_header: \":path\" is not a header name"));
    assert!(error(&with(r#""key_header": "host""#)).contains("key_header"));
    assert!(error(&with(r#""key_header": "X-Consumer-Id""#)).contains("x-consumer-id is used twice"));
    assert!(error(&with(r#""rate_limit": {"requests": 0, "window": "1s"}"#)).contains("set the whole field to null"));
    assert!(
        error(&with(r#""rate_limit": {"requests": 1, "window": "0s"}"#)).contains("rate_limit.window: must be from")
    );
    for window in ["60", r#""60""#, r#""1m""#, r#""0.5s""#, r#""+5s""#, r#""s""#] {
        let limit = format!(r#""rate_limit": {{"requests": 1, "window": {window}}}"#);
        let expected = "rate_limit.window: must be whole seconds with their unit, such as \"60s\"";
        assert_eq!(error(&with(&limit)), expected, "{window}");
    }
    assert!(error(&with(r#""rate_limit": {"requests": 1, "window": "1s", "burst": 0}"#)).contains("burst"));
    assert!(error(&with(r#""max_staleness": "5s""#)).contains("max_staleness: must be at least \"60s\": "));
    let failure_mode = error(&with(r#""failure_mode": {"stale": "open"}"#));
    assert_eq!(failure_mode, "failure_mode.stale: must be `deny` or `allow`");
    let unknown = error(&with(r#""failure_mode": {"on_stale": "deny"}"#));
    assert_eq!(unknown, "failure_mode.on_stale: is not a known field; the fields are `not_ready` or `stale`");
    let packed = r#""identity_headers": {"packed": "X-Consumer-Id", "consumer": "x-consumer-id"}"#;
    assert!(error(&with(packed)).contains("x-consumer-id is used twice"));
    assert!(error(&with(r#""realm": "a\"b""#)).contains("realm"));
    assert!(error(&with(r#""remove_headers": ["host"]"#)).contains("remove_headers: \"host\" is not a header name"));
    assert!(error(&with(r#""remove_headers": ["X-Consumer-Id"]"#)).contains("x-consumer-id is used twice"));
    let many = serde_json::to_string(&vec!["x"; 65]).unwrap();
    assert!(error(&with(&format!(r#""remove_headers": {many}"#))).contains("remove_headers: name at most 64"));
}

#[test]
fn the_operator_chooses_how_long_requests_wait_and_what_happens_without_an_answer() {
    let config = |fields: &str| Config::parse(with(fields).as_bytes()).unwrap();
    for (text, ms) in [(r#"{"wait": "0s"}"#, 0), (r#"{"wait": "0.8s"}"#, 800), (r#"{"wait": null}"#, 250), ("{}", 250)]
    {
        assert_eq!(config(&format!(r#""limits": {text}"#)).limits_wait_ms, ms, "{text}");
    }
    let modes = config(r#""on_limits_unreachable": {"rate_limits": "deny", "quotas": "allow", "credits": null}"#);
    let expected = LimitModes { rate_limits: RateMode::Deny, quotas: FailureMode::Allow, credits: FailureMode::Deny };
    assert_eq!(modes.on_limits_unreachable, expected);
    let safe = config(r#""on_limits_unreachable": {"rate_limits": "safe_rate", "credits": "allow"}"#);
    let expected = LimitModes { credits: FailureMode::Allow, ..LimitModes::default() };
    assert_eq!(safe.on_limits_unreachable, expected);
    assert_eq!(
        config(r#""on_limits_unreachable": {"rate_limits": "allow"}"#).on_limits_unreachable.rate_limits,
        RateMode::Allow
    );

    let longest = "limits.wait: must be at most \"0.8s\"; with \"0s\" no request waits";
    assert_eq!(error(&with(r#""limits": {"wait": "0.801s"}"#)), longest);
    let form = "limits.wait: must be seconds with at most three decimals and their unit, such as \"0.25s\"";
    for wait in ["1", r#""250ms""#, r#""0.25""#] {
        assert_eq!(error(&with(&format!(r#""limits": {{"wait": {wait}}}"#))), form, "{wait}");
    }
    assert!(error(&with(r#""limits": {"waits": "1s"}"#)).starts_with("limits.waits: is not a known field"));
    let modes =
        |field: &str, value: &str| error(&with(&format!(r#""on_limits_unreachable": {{"{field}": "{value}"}}"#)));
    let three = "on_limits_unreachable.rate_limits: must be ";
    assert!(modes("rate_limits", "open").starts_with(three), "{}", modes("rate_limits", "open"));
    for field in ["quotas", "credits"] {
        let two = format!("on_limits_unreachable.{field}: must be `deny` or `allow`");
        assert_eq!(modes(field, "safe_rate"), two);
    }
    assert!(modes("limits", "deny").starts_with("on_limits_unreachable.limits: is not a known field"));
}

#[test]
fn keys_may_be_in_several_places() {
    let sources = r#""key_sources": [{"header": "X-Api-Key"}, {"bearer": true}, {"query": "a"}, {"query": "b"}]"#;
    let config = Config::parse(with(sources).as_bytes()).unwrap();
    let expected = [
        Source::Header("x-api-key".into()),
        Source::Bearer(true),
        Source::Query("a".into()),
        Source::Query("b".into()),
    ];
    assert_eq!(config.key_sources, expected);
    assert_eq!(config.challenge, Challenge::new("portcullis", &expected).unwrap());
    let wrong = |fields: &str| error(&with(&format!(r#""key_sources": [{{"bearer": true}}], {fields}"#)));
    assert!(wrong(r#""key_header": "x-key""#).contains("key_header is given too"));
    assert!(wrong(r#""identity_headers": {"consumer": "authorization"}"#).contains("used twice"));
    assert!(error(&with(r#""key_sources": [{"url": "a"}]"#)).starts_with("key_sources[0]"));
    assert!(error(&with(r#""key_header": "x-portcullis-shadow""#)).contains("used twice"));
}

#[test]
fn an_attribute_has_a_known_name_and_a_header_of_its_own() {
    let wrong = |attributes: &str| error(&with(&format!(r#""identity_headers": {{"attributes": {attributes}}}"#)));
    for attribute in ["", "tenant", "key.", "owner.name", "key.metadata.", "user.external_id"] {
        let message = wrong(&format!(r#"{{"x-a": "{attribute}"}}"#));
        assert!(message.starts_with("identity_headers.attributes.x-a: must be key.external_id"), "{message}");
    }
    assert!(wrong(r#"{"a b": "key.external_id"}"#).contains("is not a header name"));
    assert!(wrong(r#"{"x-api-key": "key.external_id"}"#).contains("used twice"));
    let many: Vec<String> = (0..17).map(|number| format!(r#""x-{number}": "key.external_id""#)).collect();
    assert!(wrong(&format!("{{{}}}", many.join(", "))).contains("at most 16"));
}

#[test]
fn the_sources_of_a_policys_name_are_the_operators_choice() {
    let json = with(
        r#""policy_sources": [{"annotation": "portcullis-policy"}, "route_name", {"route_name_prefix": "policy:"},
            "virtual_host_metadata", "route_metadata", "rules"]"#,
    );
    let sources = Config::parse(json.as_bytes()).unwrap().policy_sources;
    let expected = [
        PolicySource::Annotation("portcullis-policy".into()),
        PolicySource::RouteName,
        PolicySource::RouteNamePrefix("policy:".into()),
        PolicySource::VirtualHostMetadata,
        PolicySource::RouteMetadata,
        PolicySource::Rules,
    ];
    assert_eq!(sources, expected);
    assert_eq!(Config::parse(with(r#""policy_sources": []"#).as_bytes()).unwrap().policy_sources, []);
    let wrong = |sources: &str| error(&with(&format!(r#""policy_sources": {sources}"#)));
    assert_eq!(wrong(r#"["rules", "rules"]"#), "policy_sources: name each source once");
    assert!(wrong(r#"[{"annotation": ""}]"#).starts_with("policy_sources: annotation and route_name_prefix need 1 to"));
    assert!(wrong(r#"["rule"]"#).starts_with("policy_sources[0]"));
}
