//! Roles, plans, policies, and the plans and refills of users as files: `portcullis diff`, `apply`, `dump` and `validate`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::response::Response;
use hyper::Method;
use portcullis_tests::dice::Dice;
use portcullis_tests::http::{self, get_request};
use portcullis_tests::ports::LOCAL;
use portcullis_tests::rest::Rest;
use portcullis_tests::stack::Stack;
use portcullis_tests::{demo, shell as files};
use serde_json::{Map, Value, json};
use tokio::task::JoinSet;

use crate::command_line::{CommandOutput, Shell, log_in};

/// A directory of declarations, and the shell of its administrator.
struct Administrator {
    shell: Shell,
    directory: PathBuf,
}

impl Administrator {
    async fn of(stack: &Stack) -> Result<Self> {
        let shell = log_in(stack).await?;
        let directory = shell.home.path().join("declared");
        std::fs::create_dir(&directory)?;
        Ok(Self { shell, directory })
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        Ok(std::fs::write(self.directory.join(file), text)?)
    }

    async fn run(&self, verb: &str, flags: &[&str]) -> Result<CommandOutput> {
        let directory = self.directory.to_str().context("a path that is not UTF-8")?;
        self.shell.run(&[&[verb, "-f", directory], flags].concat(), "").await
    }

    /// What a command that must succeed prints.
    async fn prints(&self, verb: &str, flags: &[&str]) -> Result<String> {
        let ended = self.run(verb, flags).await?;
        ensure!(ended.code == 0 && ended.stderr.is_empty(), "{verb} {flags:?}: {ended:?}");
        Ok(ended.stdout)
    }

    /// Runs `diff`, which must find this number of differences, and returns what it prints.
    async fn differences(&self, number: usize, flags: &[&str]) -> Result<String> {
        let ended = self.run("diff", flags).await?;
        let plural = if number == 1 { "" } else { "s" };
        assert_eq!((ended.code, ended.stderr), (2, format!("portcullis: {number} difference{plural}\n")));
        Ok(ended.stdout)
    }

    /// The text of each file.
    fn texts(&self) -> Result<Vec<String>> {
        let read = |file: &str| Ok(std::fs::read_to_string(self.directory.join(file))?);
        ["roles.yaml", "plans.yaml", "policies.yaml", "users.yaml"].map(read).into_iter().collect()
    }
}

const NOTHING: &str = "Nothing differs.\n";

/// The versions of all definitions and users: a write that changes something raises one.
async fn versions(stack: &Stack) -> Result<String> {
    let definitions = "select string_agg(kind || name || version || removed, ' ' order by number) from definitions";
    let users = "select string_agg(email || version, ' ' order by id) from user_preferences";
    stack.database.text(&format!("select concat(({definitions}), ({users}))")).await
}

#[tokio::test]
async fn files_are_applied_once_and_prune_deletes_only_what_apply_created() -> Result<()> {
    let stack = Stack::builder().plugin(&json!({"rate_limit": null})).start().await?;
    let (admin, rest) = (Administrator::of(&stack).await?, stack.rest());
    let (_, key) = rest.create("ada@example.com").await?;
    rest.expect(Method::PUT, "/v1/plans/by-hand", Some(&json!({"description": "of the console"})), 201).await?;
    let ask = async |path: &str| -> Result<u16> {
        stack.in_step().await?;
        Ok(http::send(stack.envoy().address(), get_request(path, Some(&key))?).await?.status)
    };
    admin.write("roles.yaml", "support:\n  scopes: [orders:read]\nold: {}\n")?;
    admin.write("plans.yaml", "gold:\n  description: For production\n  quota: {requests: 1000, period: month}\n")?;
    admin.write(
        "policies.yaml",
        "reports:\n  scopes: {all: [reports:read]}\n  match:\n    - path: {prefix: /reports}\n",
    )?;
    admin
        .write("users.yaml", "Ada@example.com: {plan: gold}\nbob@example.com:\n  refill: {amount: 5, period: day}\n")?;
    assert_eq!(admin.prints("validate", &[]).await?, "Valid: 2 roles, 1 plans, 1 policies, 2 users.\n");
    let fields = [
        "role old",
        "role support\n  scopes: [] -> [\"orders:read\"]",
        "plan gold\n  description: \"\" -> \"For production\"\n  quota: null -> {\"period\":\"month\",\"requests\":1000,\"time_zone\":\"UTC\"}",
        "policy reports\n  match: [] -> [{\"path\":{\"prefix\":\"/reports\"}}]\n  scopes: null -> {\"all\":[\"reports:read\"]}",
    ];
    let created: String = fields.iter().map(|what| format!("would create {what}\n")).collect();
    let users = "would change user ada@example.com\n  plan: null -> \"gold\"\nwould create user bob@example.com\n  \
                 refill: {\"amount\":5,\"period\":\"day\",\"time_zone\":\"UTC\"}\n";
    let differences = format!("{created}{users}");
    assert_eq!(admin.differences(6, &[]).await?, differences);
    assert_eq!(ask("/reports").await?, 200);
    let written = "created role old\ncreated role support\ncreated plan gold\ncreated policy reports\nchanged user \
                   ada@example.com\ncreated user bob@example.com\n";
    let applied = admin.prints("apply", &[]).await?;
    assert_eq!(applied, format!("{}{written}", differences.replace("would", "will")));
    assert_eq!(ask("/reports").await?, 403);

    let before = versions(&stack).await?;
    for (verb, flags) in [("diff", &[][..]), ("apply", &[]), ("diff", &["--prune"]), ("apply", &["--prune"])] {
        assert_eq!(admin.prints(verb, flags).await?, NOTHING, "{verb} {flags:?}");
    }
    assert_eq!(versions(&stack).await?, before);

    // The rule moves to another policy, and the control plane admits it to one policy at a time.
    admin.write("roles.yaml", "support:\n  scopes: [orders:read, orders:write]\n")?;
    admin.write("policies.yaml", "all-reports: {match: [{path: {prefix: /reports}}]}\n")?;
    let unlisted = "role old is managed and in no file; --prune deletes it\n";
    let support = "would change role support\n  scopes: [\"orders:read\"] -> [\"orders:read\",\"orders:write\"]\n";
    let moved = "would create policy all-reports\n  match: [] -> [{\"path\":{\"prefix\":\"/reports\"}}]\n";
    let kept = "policy reports is managed and in no file; --prune deletes it\n";
    assert_eq!(admin.differences(2, &[]).await?, format!("{support}{moved}{unlisted}{kept}"));
    let pruned = format!("{support}{moved}would delete policy reports\nwould delete role old\n");
    assert_eq!(admin.differences(4, &["--prune"]).await?, pruned);
    let refused = admin.run("apply", &[]).await?;
    assert!(
        refused.code == 1
            && refused.stderr.starts_with("portcullis: the control plane answered 409: policy all-reports: "),
        "{refused:?}"
    );
    let applied = admin.prints("apply", &["--prune"]).await?;
    let written = "deleted policy reports\ndeleted role old\ncreated policy all-reports\n";
    assert!(applied.ends_with(written), "{applied}");
    assert_eq!(ask("/reports").await?, 200);
    assert_eq!(admin.prints("diff", &["--prune"]).await?, NOTHING);
    assert_eq!(rest.get("/v1/plans/by-hand").await?["description"], "of the console");
    let described = &rest.get("/v1/plans/gold").await?["description"];
    assert_eq!(described, "For production [managed by portcullis apply]");

    // Each manager deletes its own.
    let files = std::fs::read_dir(&admin.directory)?.map(|file| Ok(file?.path())).collect::<Result<Vec<_>>>()?;
    for file in files {
        std::fs::write(file, "")?;
    }
    assert_eq!(admin.prints("diff", &["--prune", "--manager", "billing"]).await?, NOTHING);

    // An empty file has nothing, and a missing one says nothing. Users are never deleted.
    std::fs::remove_file(admin.directory.join("policies.yaml"))?;
    admin.write("roles.yaml", "")?;
    admin.write("users.yaml", "ada@example.com: {plan: null}\n")?;
    admin.write("plans.yaml", "{}")?;
    let applied = admin.prints("apply", &["--prune"]).await?;
    let written = "changed user ada@example.com\ndeleted plan gold\ndeleted role support\n";
    assert!(applied.ends_with(written), "{applied}");
    assert_eq!(ask("/reports").await?, 200);
    assert_eq!(rest.get("/v1/users?email=bob@example.com").await?["users"][0]["refill"]["amount"], 5);
    Ok(())
}

#[tokio::test]
async fn files_with_errors_are_refused_with_file_line_and_field() -> Result<()> {
    let admin = {
        let shell = Shell::new()?;
        let directory = shell.home.path().join("declared");
        std::fs::create_dir(&directory)?;
        Administrator { shell, directory }
    };
    admin.write(
        "plans.yaml",
        "gold:\n  rate_limits:\n    - name: minute\n      requets: 5\n      window_seconds: 60\n",
    )?;
    admin.write(
        "policies.yaml",
        "reports:\n  cost: -1\nstatus:\n  scopes: {all: [a]}\n  match:\n    - path: {prefix: reports}\n",
    )?;
    admin.write("users.yaml", "ada@example.com:\n  plan: gold\n  metered: true\n")?;
    admin.write("keys.yaml", "")?;
    let directory = admin.directory.display().to_string();
    for verb in ["validate", "diff", "apply"] {
        let ended = admin.run(verb, &[]).await?;
        let places: Vec<String> = ended.stdout.lines().map(|line| line.replace(&format!("{directory}/"), "")).collect();
        let expected = [
            "keys.yaml: is not one of the files roles.yaml, plans.yaml, policies.yaml, users.yaml",
            "plans.yaml:4: gold.rate_limits[0].requets: is not a known field; the fields are ",
            "policies.yaml:2: reports.cost: ",
            "policies.yaml:6: status.match[0].path",
            "users.yaml:3: ada@example.com.metered: is not a known field; the fields are `plan` or `refill`",
        ];
        assert_eq!(places.len(), expected.len(), "{places:#?}");
        for (place, expected) in places.iter().zip(expected) {
            assert!(place.starts_with(expected), "{place}");
        }
        assert_eq!((ended.code, ended.stderr.as_str()), (1, "portcullis: 5 errors in the files\n"), "{verb}");
    }
    Ok(())
}

/// Forwards requests to a control plane. Before the first write, it sends another one.
async fn second_writer(rest: Rest, write: (Method, String, Value)) -> Result<(SocketAddr, JoinSet<()>)> {
    let left = Arc::new(Mutex::new(Some(write)));
    let forward = move |request: Request| {
        let (rest, left) = (rest.clone(), left.clone());
        async move {
            let is_write = request.method() != Method::GET;
            let write = if is_write { left.lock().unwrap_or_else(PoisonError::into_inner).take() } else { None };
            if let Some((method, path, body)) = write {
                let reply = rest.call(method, &path, Some(&body)).await.expect("the other write is sent");
                assert!(reply.status < 300, "{path}: {reply:?}");
            }
            forward(rest.address, request).await.expect("the request is forwarded")
        }
    };
    demo::serve(LOCAL, Router::new().fallback(forward)).await
}

async fn forward(to: SocketAddr, request: Request) -> Result<Response> {
    let (mut parts, body) = request.into_parts();
    parts.headers.remove("host");
    let body = to_bytes(body, 1 << 20).await?;
    let reply = http::send(to, hyper::Request::from_parts(parts, body.into())).await?;
    let mut response = Response::builder().status(reply.status).body(Body::from(reply.body))?;
    response.headers_mut().extend(reply.headers.get("etag").map(|etag| (hyper::header::ETAG, etag.clone())));
    Ok(response)
}

#[tokio::test]
async fn a_change_by_another_writer_after_the_comparison_is_a_conflict_and_stays() -> Result<()> {
    let stack = Stack::builder().envoys(0).start().await?;
    let (admin, rest) = (Administrator::of(&stack).await?, stack.rest());
    let key_file = admin.shell.home.path().join("key");
    files::write_secret(&key_file, rest.key.reveal())?;
    let gold = |scopes: &str| format!("gold: {{scopes: [{scopes}]}}\n");
    let user = rest.user("ada@example.com").await?;
    let other = json!({"scopes": ["other"]});
    for (what, file, text, write) in [
        ("plan gold", "plans.yaml", gold("a"), (Method::PUT, "/v1/plans/gold".to_owned(), other.clone())),
        (
            "plan gold",
            "plans.yaml",
            gold("a"),
            (Method::PUT, "/v1/plans/gold".to_owned(), json!({"scopes": ["again"]})),
        ),
        (
            "user bob@example.com",
            "users.yaml",
            "bob@example.com: {}".into(),
            (Method::POST, "/v1/users".to_owned(), json!({"email": "bob@example.com"})),
        ),
        (
            "user ada@example.com",
            "users.yaml",
            "ada@example.com: {plan: gold}".into(),
            (Method::PATCH, user, json!({"time_zone": "Europe/Berlin"})),
        ),
    ] {
        for old in ["plans.yaml", "users.yaml"] {
            let _ = std::fs::remove_file(admin.directory.join(old));
        }
        admin.write(file, &text)?;
        let (address, _server) = second_writer(rest.clone(), write).await?;
        let server = format!("http://{address}");
        let key_file = key_file.to_str().context("a path that is not UTF-8")?;
        let ended = admin.run("apply", &["--server", &server, "--key-file", key_file]).await?;
        let conflict = "was changed by another writer after it was compared, and is left as it is; see portcullis diff, and \
                        apply again";
        assert_eq!((ended.code, ended.stderr), (1, format!("portcullis: {what} {conflict}\n")));
        assert!(!ended.stdout.contains("created ") && !ended.stdout.contains("changed "), "{}", ended.stdout);
    }
    assert_eq!(rest.get("/v1/plans/gold").await?["scopes"], json!(["again"]));
    assert_eq!(rest.get("/v1/users?email=ada@example.com").await?["users"][0]["plan"], Value::Null);
    Ok(())
}

/// Texts of descriptions, also such as YAML takes for something else.
const TEXTS: [&str; 12] = [
    "",
    "For production",
    "a: b # c",
    "yes",
    "null",
    "~",
    "- item",
    "\"quoted\" 'text' \\",
    "{flow}",
    "2026-12-01",
    "1.5",
    "ünïcode 漢字",
];

const SCOPES: [&str; 5] = ["orders:read", "orders:*", "*", "a", "no"];

fn one_of<'a, T>(dice: &mut Dice, all: &'a [T]) -> &'a T {
    &all[dice.below(all.len())]
}

fn scopes(dice: &mut Dice) -> Value {
    SCOPES.iter().filter(|_| dice.below(2) == 0).copied().collect()
}

/// An object whose members are left out now and then, and null at times.
fn some_of(dice: &mut Dice, members: Value) -> Value {
    let Value::Object(members) = members else { return members };
    let kept = members.into_iter().filter_map(|(name, value)| match dice.below(4) {
        0 => None,
        1 => Some((name, Value::Null)),
        _ => Some((name, value)),
    });
    kept.collect::<Map<_, _>>().into()
}

fn limits(dice: &mut Dice, subjects: &[&str]) -> Value {
    let mut limit = |name: &str| {
        let per = *one_of(dice, subjects);
        let optional = json!({"burst": 1 + dice.below(9), "per": per});
        let mut limit = some_of(dice, optional);
        for (field, value) in [("requests", dice.below(1_000)), ("window_seconds", dice.below(1_000))] {
            limit[field] = (value + 1).into();
        }
        limit["name"] = name.into();
        limit
    };
    ["minute", "hour", "1"].map(&mut limit).into_iter().take(dice.below(4)).collect()
}

fn plan(dice: &mut Dice) -> Value {
    let quotas = [
        json!({"requests": 5, "period": "day"}),
        json!({"requests": 1_000_000_000_000_i64, "period": "month", "time_zone": "owner", "anchor_day": 31, "per": "owner"}),
        json!({"requests": 7, "period": "rolling", "window_seconds": 60, "per": null}),
    ];
    let members = json!({
        "description": one_of(dice, &TEXTS), "scopes": scopes(dice), "rate_limits": limits(dice, &["key", "owner"]),
        "quota": one_of(dice, &quotas),
    });
    some_of(dice, members)
}

fn policy(dice: &mut Dice, number: usize) -> Value {
    let subjects = [&["key", "owner"][..], &["key", "owner", "address"]];
    let is_open = dice.below(2);
    let scopes = [json!({"all": ["orders:read", "no"]}), json!({"any": ["a", "b"]}), Value::Null];
    let rules = [
        json!({"path": {"prefix": format!("/{number}/a")}}),
        json!({"path": {"exact": format!("/{number}/b")}, "methods": ["GET", "HEAD"]}),
        json!({"path": {"template": format!("/{number}/{{id}}/c")}, "hosts": ["api.example.com", "*.example.org"]}),
        json!({"path": {"prefix": format!("/{number}/d")}, "header": {"name": "x-model", "value": "gpt-*"}}),
    ];
    let rules: Value = rules.into_iter().filter(|_| dice.below(2) == 0).collect();
    let members = json!({
        "description": one_of(dice, &TEXTS), "kinds": one_of(dice, &[json!(["live"]), json!(["test", "live"]), Value::Null]),
        "scopes": one_of(dice, &scopes), "cost": dice.below(5), "shadow": dice.below(2) == 0,
        "from_annotation": dice.below(2) == 0, "match": rules,
    });
    let mut policy = some_of(dice, members);
    policy["key"] =
        one_of(dice, &[["required", "required"], ["optional", "anonymous_allowed"]][is_open]).to_owned().into();
    policy["rate_limits"] = limits(dice, subjects[is_open]);
    if is_open == 1 {
        policy["scopes"] = Value::Null;
    }
    policy
}

/// Writes random definitions by the REST API, and deletes one.
async fn write_some(rest: &Rest, dice: &mut Dice) -> Result<()> {
    rest.call(Method::DELETE, &format!("/v1/roles/{}", dice.below(4)), None).await?;
    let put = async |path: String, body: Value| -> Result<()> {
        let reply = rest.call(Method::PUT, &path, Some(&body)).await?;
        ensure!([200, 201].contains(&reply.status), "{path} {body}: {reply:?}");
        Ok(())
    };
    for number in 0..dice.below(5) {
        let role = json!({"description": one_of(dice, &TEXTS), "scopes": scopes(dice)});
        put(format!("/v1/roles/{number}"), some_of(dice, role)).await?;
    }
    for number in 0..dice.below(5) {
        put(format!("/v1/plans/plan-{number}"), plan(dice)).await?;
    }
    for number in 0..dice.below(5) {
        put(format!("/v1/policies/policy-{number}"), policy(dice, number)).await?;
    }
    let refills = [
        json!({"amount": 5, "period": "day"}),
        json!({"amount": 1_000, "period": "month", "anchor_day": 31, "up_to": 10_000, "time_zone": "Europe/Berlin"}),
    ];
    put("/v1/plans/plan-0".to_owned(), plan(dice)).await?;
    for number in 0..dice.below(5) {
        let path = rest.user(&format!("o'hara+{number}@müller.example")).await?;
        // A dump has no user without both.
        let mut body = json!({"plan": "plan-0", "refill": one_of(dice, &refills)});
        match dice.below(3) {
            0 => body["plan"] = Value::Null,
            1 => body["refill"] = Value::Null,
            _ => {}
        }
        rest.patch(&path, body).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_dump_of_any_definitions_changes_nothing_and_makes_another_control_plane_the_same() -> Result<()> {
    let seed = std::env::var("PORTCULLIS_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let mut dice = Dice::new(seed);
    println!("seed {seed}; PORTCULLIS_SEED sets another");
    let (stack, copy) = (Stack::builder().envoys(0).start().await?, Stack::builder().envoys(0).start().await?);
    let (admin, copier) = (Administrator::of(&stack).await?, Administrator::of(&copy).await?);
    let files = |directory: &Path| directory.to_str().map(str::to_owned).context("a path that is not UTF-8");
    for round in 0..12 {
        write_some(&stack.rest(), &mut dice).await?;
        let before = versions(&stack).await?;
        admin.prints("dump", &["--overwrite"]).await?;
        let dumped = admin.texts()?;
        for (verb, flags) in [("validate", &[][..]), ("diff", &["--prune"]), ("apply", &["--prune"])] {
            let printed = admin.prints(verb, flags).await?;
            assert!(verb == "validate" || printed == NOTHING, "round {round}: {verb}: {printed}{dumped:#?}");
        }
        assert_eq!(versions(&stack).await?, before, "round {round}");

        let of_first = files(&admin.directory)?;
        let applied = copier.shell.run(&["apply", "-f", &of_first, "--prune"], "").await?;
        assert_eq!((applied.code, applied.stderr.as_str()), (0, ""), "round {round}: {}{dumped:#?}", applied.stdout);
        copier.prints("dump", &["--overwrite"]).await?;
        assert_eq!(copier.texts()?, dumped, "round {round}");
    }
    Ok(())
}
