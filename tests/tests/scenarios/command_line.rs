//! The commands of `portcullis` that call the REST API, as an administrator uses them beside a real Envoy.

use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use anyhow::{Context, Result};
use portcullis_tests::http::{get_request, send};
use portcullis_tests::paths;
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;

/// A shell of an administrator: a home directory of its own, and no settings of others.
pub(crate) struct Shell {
    pub(crate) home: TempDir,
}

/// What a command printed, and its exit code.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CommandOutput {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Shell {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { home: TempDir::with_prefix("portcullis-")? })
    }

    pub(crate) async fn run(&self, arguments: &[&str], input: &str) -> Result<CommandOutput> {
        let mut command = tokio::process::Command::new(paths::control_plane());
        command.args(arguments).env_clear().env("HOME", self.home.path()).env("PATH", "/usr/bin:/bin");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        child.stdin.take().context("no stdin")?.write_all(input.as_bytes()).await?;
        let output = child.wait_with_output().await?;
        let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        Ok(CommandOutput { code: output.status.code().context("no code")?, stdout, stderr })
    }

    /// What a command that must succeed prints.
    pub(crate) async fn prints(&self, arguments: &[&str]) -> Result<String> {
        let ended = self.run(arguments, "").await?;
        anyhow::ensure!(ended.code == 0 && ended.stderr.is_empty(), "{arguments:?}: {ended:?}");
        Ok(ended.stdout)
    }

    async fn json(&self, arguments: &[&str]) -> Result<Value> {
        Ok(serde_json::from_str(&self.prints(&[arguments, &["-o", "json"]].concat()).await?)?)
    }
}

fn text(value: &Value) -> Result<&str> {
    value.as_str().with_context(|| format!("no text: {value}"))
}

/// A stack, and a shell that is logged in.
async fn logged_in() -> Result<(Stack, Shell)> {
    let stack = Stack::builder().plugin(&json!({"rate_limit": null})).start().await?;
    let shell = log_in(&stack).await?;
    Ok((stack, shell))
}

/// A shell that is logged in to this stack.
pub(crate) async fn log_in(stack: &Stack) -> Result<Shell> {
    let (rest, shell) = (stack.rest(), Shell::new()?);
    let server = format!("http://{}", rest.address);
    let ended = shell.run(&["login", "--server", &server], &format!("{}\n", rest.key.reveal())).await?;
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{ended:?}");
    assert!(!ended.stdout.contains(rest.key.reveal()), "{}", ended.stdout);
    Ok(shell)
}

#[tokio::test]
async fn a_login_is_readable_by_its_user_only_and_for_its_server_only() -> Result<()> {
    let (stack, shell) = logged_in().await?;
    let file = shell.home.path().join(".config/portcullis/login.json");
    assert_eq!(std::fs::metadata(&file)?.permissions().mode() & 0o777, 0o600);
    let other = shell.run(&["keys", "list", "--server", "http://127.0.0.1:9"], "").await?;
    let server = format!("http://{}", stack.control_plane.address());
    let why = format!(
        "portcullis: no key for http://127.0.0.1:9: run portcullis login, set PORTCULLIS_KEY, or give --key-file; the login is \
         for {server}\n"
    );
    assert_eq!(other, CommandOutput { code: 1, stdout: String::new(), stderr: why });
    let wrong = shell.run(&["login"], "sk_live_not-a-key\n").await?;
    assert!(wrong.code == 1 && wrong.stderr.starts_with("portcullis: the control plane answered 401: "), "{wrong:?}");
    assert!(shell.prints(&["keys", "list"]).await?.starts_with("ID "), "the login before stays");
    shell.prints(&["logout"]).await?;
    assert!(!file.exists());
    assert_eq!(shell.prints(&["logout"]).await?, "There is no login.\n");
    assert_eq!(shell.run(&["keys", "list"], "").await?.code, 1);
    Ok(())
}

#[tokio::test]
async fn an_administrator_manages_keys_users_credits_and_policies() -> Result<()> {
    let (stack, shell) = logged_in().await?;
    let ask = async |path: &str, key: &str| -> Result<u16> {
        Ok(send(stack.envoy().address(), get_request(path, Some(key))?).await?.status)
    };
    let created = shell.json(&[
        "keys",
        "create",
        "--email",
        "ada@example.com",
        "--name",
        "Reports, daily",
        "--scopes",
        "a:b,c:d",
    ]);
    let created = created.await?;
    let (id, key) = (text(&created["id"])?, text(&created["secret"])?);
    assert_eq!(created["scopes"], json!(["a:b", "c:d"]));
    stack.in_step().await?;
    assert_eq!(ask("/orders", key).await?, 200);

    let matches = r#"[{"path": {"prefix": "/reports"}}]"#;
    // The command ends once Envoy has the policy.
    let scopes = r#"{"all": ["reports:read"]}"#;
    shell.prints(&["policies", "set", "reports", "--scopes", scopes, "--match", matches, "--wait", "5"]).await?;
    assert_eq!(ask("/reports", key).await?, 403);
    let listed = shell.prints(&["policies", "list"]).await?;
    assert!(listed.lines().any(|line| line.starts_with("reports ")), "{listed}");

    // Keys by the first characters of their secrets, and users by their addresses.
    shell.prints(&["keys", "update", &key[..14], "--disabled"]).await?;
    stack.in_step().await?;
    assert_eq!(ask("/orders", key).await?, 401);
    shell
        .prints(&["keys", "update", id, "--disabled=false", "--cost", "3", "--metadata", r#"{"team": "blue"}"#])
        .await?;
    let shown = shell.prints(&["keys", "show", id]).await?;
    for line in ["cost ", "metadata "] {
        assert!(shown.lines().any(|shown| shown.starts_with(line)), "{shown}");
    }
    shell.prints(&["users", "update", "ada@example.com", "--metered"]).await?;
    let booked = shell.json(&["credits", "book", "ada@example.com", "--amount", "10", "--note", "invoice 1"]).await?;
    assert_eq!(booked["balance"], 10);
    shell.prints(&["credits", "book", "ada@example.com", "--amount", "-1", "--kind", "correction"]).await?;
    stack.in_step().await?;
    assert_eq!([ask("/orders", key).await?, ask("/orders", key).await?, ask("/orders", key).await?], [200; 3]);
    assert_eq!(ask("/orders", key).await?, 429, "nine credits are spent");
    let counted = async || {
        let usage = shell.prints(&["usage", "report", "--group-by", "key", "-o", "csv"]).await.ok()?;
        usage.lines().any(|line| line.contains(id)).then_some(usage)
    };
    let usage = eventually("the usage to be reported", counted).await?;
    assert!(usage.lines().next().is_some_and(|names| names.contains("allowed")), "{usage}");
    let empty =
        async || (shell.json(&["credits", "show", "ada@example.com"]).await.ok()?["balance"] == 0).then_some(());
    eventually("the credits to be booked", empty).await?;

    let rotated = shell.json(&["keys", "rotate", id]).await?;
    assert_ne!(text(&rotated["secret"])?, key);
    let revoked = shell.run(&["keys", "revoke", id], "").await?;
    assert_eq!(revoked, CommandOutput { code: 0, stdout: String::new(), stderr: String::new() });
    stack.in_step().await?;
    assert_eq!(ask("/orders", text(&rotated["secret"])?).await?, 401);
    let audit = shell.json(&["audit", "list", "--key-id", id]).await?;
    let actions: Vec<&Value> =
        audit["entries"].as_array().into_iter().flatten().map(|entry| &entry["action"]).collect();
    assert!(actions.contains(&&json!("key.revoke")) && actions.contains(&&json!("key.rotate")), "{actions:?}");
    Ok(())
}

#[tokio::test]
async fn lists_are_as_long_as_asked_and_the_body_may_be_a_file() -> Result<()> {
    let (stack, shell) = logged_in().await?;
    stack.insert_keys(1_200).await?;
    let rows =
        async |limit: &str| anyhow::Ok(shell.prints(&["keys", "list", "--limit", limit]).await?.lines().count() - 1);
    assert_eq!((rows("7").await?, rows("600").await?), (7, 600));
    assert!(rows("0").await? > 1_200);
    assert_eq!(shell.prints(&["keys", "list"]).await?.lines().count(), 101);
    let plan = json!({"description": "of a file", "scopes": ["a:b"]}).to_string();
    let set = ["plans", "set", "gold", "--body", "-", "--description", "of a flag", "-o", "json"];
    let set: Value = serde_json::from_str(&shell.run(&set, &plan).await?.stdout)?;
    assert_eq!((&set["description"], &set["scopes"]), (&json!("of a flag"), &json!(["a:b"])));
    let listed: Value = serde_json::from_str(&shell.prints(&["api", "get", "/v1/plans?limit=5"]).await?)?;
    assert_eq!(listed["plans"][0]["name"], "gold");
    assert_eq!(shell.json(&["plans", "show", "gold"]).await?["scopes"], json!(["a:b"]));
    shell.prints(&["plans", "delete", "gold", "--if-match", "\"1\""]).await?;
    Ok(())
}

#[tokio::test]
async fn wrong_commands_name_the_argument_and_doctor_says_what_stands_in_the_way() -> Result<()> {
    let (stack, shell) = logged_in().await?;
    for (arguments, code, says) in [
        (&["keys", "create", "--email", "a@example.com"][..], 1, "--name: is required unless --body has name"),
        (&["keys", "create", "--email", "a", "--name", "n"], 1, "the control plane answered 400: email: "),
        (&["keys", "update", "sk_live_000000", "--cost", "1"], 1, "ID: no key begins with sk_live_000000"),
        (&["keys", "update", "x", "--cost", "much"], 1, "--cost: must be a number"),
        (&["keys", "update", "x", "--quota", "{"], 1, "--quota: must be JSON: "),
        (&["users", "show", "bob@example.com"], 1, "ID: there is no user bob@example.com"),
        (&["keys", "create", "--kind", "other"], 2, "invalid value 'other' for '--kind"),
        (&["keys", "bogus"], 2, "unrecognized subcommand 'bogus'"),
        (&["keys", "show"], 2, "the following required arguments were not provided: <ID>"),
        (&["api", "GET", "v1/keys"], 1, "PATH: must begin with /, such as /v1/keys"),
    ] {
        let ended = shell.run(arguments, "").await?;
        assert_eq!(ended.code, code, "{arguments:?}: {ended:?}");
        assert!(ended.stderr.starts_with(&format!("portcullis: {says}")), "{arguments:?}: {}", ended.stderr);
        assert_eq!((ended.stderr.lines().count(), ended.stdout.as_str()), (1, ""), "{arguments:?}");
    }
    let well = shell.run(&["doctor"], "").await?;
    assert_eq!(well.code, 0, "{well:?}");
    assert!(well.stdout.lines().any(|line| line.starts_with("keys") && line.contains("warning")), "{}", well.stdout);
    shell.prints(&["keys", "create", "--email", "ada@example.com", "--name", "first"]).await?;
    let well = shell.prints(&["doctor"]).await?;
    assert!(!well.contains("warning") && !well.contains("FAILED"), "{well}");
    for shell_name in ["bash", "zsh", "fish"] {
        assert!(shell.prints(&["completion", shell_name]).await?.contains("rotate"), "{shell_name}");
    }
    let gone = shell.run(&["doctor", "--server", "http://127.0.0.1:9", "--key-file", "/dev/stdin"], "a-key").await?;
    let reachable = gone.stdout.lines().find(|line| line.starts_with("reachable")).context("no check")?;
    assert!(reachable.contains("FAILED") && reachable.contains("http://127.0.0.1:9 cannot be reached"), "{reachable}");
    assert_eq!((gone.code, gone.stderr.as_str()), (1, "portcullis: 1 of 2 checks failed\n"));
    let server = format!("http://{}", stack.control_plane.address());
    let no_key = shell.run(&["doctor", "--server", &server, "--key-file", "/dev/stdin"], "sk_live_none").await?;
    assert!(no_key.code == 1 && no_key.stdout.contains("the control plane refuses it"), "{no_key:?}");
    Ok(())
}
