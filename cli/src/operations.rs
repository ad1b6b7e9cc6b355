//! The commands `portcullis NOUN VERB`: each is one operation of the REST API, with the flags that the OpenAPI document gives it.

use std::io::{Read, Write};

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, ArgMatches, Args as _, FromArgMatches as _, value_parser};
use serde_json::{Map, Value};

use crate::CommandError;
use crate::document::{Document, Input, Kind, Operation, fill};
use crate::output::{self, Format};
use crate::server::{Client, Request, Server};

/// The commands of one noun.
#[derive(Debug)]
pub struct Noun {
    name: &'static str,
    about: &'static str,
    /// The names of the commands, and the ids of their operations.
    verbs: &'static [(&'static str, &'static str)],
    /// Columns of a table, as far as entries have them.
    columns: &'static [&'static str],
}

const fn noun(
    name: &'static str,
    about: &'static str,
    verbs: &'static [(&'static str, &'static str)],
    columns: &'static [&'static str],
) -> Noun {
    Noun { name, about, verbs, columns }
}

/// All nouns.
pub const NOUNS: &[Noun] = &[
    noun(
        "keys",
        "API keys",
        &[
            ("list", "listKeys"),
            ("show", "getKey"),
            ("create", "createKey"),
            ("update", "updateKey"),
            ("rotate", "rotateKey"),
            ("revoke", "revokeKey"),
            ("revoke-secret", "revokeKeySecret"),
            ("usage", "getKeyUsage"),
            ("quota", "getKeyQuota"),
            ("reset-quota", "resetKeyQuota"),
            ("unknown", "listUnknownKeys"),
            ("forget-unknown", "deleteUnknownKeys"),
        ],
        &["id", "prefix", "name", "email", "state", "plan", "expires_at", "last_used_at", "hash", "last_seen_at"],
    ),
    noun(
        "users",
        "Users, who own keys and credits",
        &[
            ("list", "listUsers"),
            ("show", "getUser"),
            ("create", "createUser"),
            ("update", "updateUser"),
            ("revoke-keys", "revokeUserKeys"),
            ("erase", "eraseUser"),
        ],
        &["id", "email", "plan", "metered", "balance", "created_at"],
    ),
    noun(
        "credits",
        "Credits of users",
        &[("show", "getBalance"), ("ledger", "listLedgerEntries"), ("book", "createLedgerEntry")],
        &["id", "at", "kind", "amount", "balance", "note"],
    ),
    noun(
        "plans",
        "Plans: limits and quotas of users and keys",
        &[("list", "listPlans"), ("show", "getPlan"), ("set", "putPlan"), ("delete", "deletePlan")],
        &["name", "scopes", "description"],
    ),
    noun(
        "roles",
        "Roles: scopes of keys",
        &[("list", "listRoles"), ("show", "getRole"), ("set", "putRole"), ("delete", "deleteRole")],
        &["name", "scopes", "description"],
    ),
    noun(
        "policies",
        "Policies: what requests need",
        &[("list", "listPolicies"), ("show", "getPolicy"), ("set", "putPolicy"), ("delete", "deletePolicy")],
        &["name", "key", "scopes", "cost", "shadow", "match", "description"],
    ),
    noun(
        "usage",
        "Usage of keys",
        &[("report", "getUsage"), ("events", "listUsageEvents")],
        &["start", "key_id", "email", "plan", "scope", "outcome", "requests", "allowed", "refused", "cost"],
    ),
    noun(
        "envoys",
        "Envoys that load keys",
        &[("list", "listEnvoys")],
        &["id", "address", "version", "live", "up_to_date", "revisions_behind", "seen_at"],
    ),
    noun(
        "audit",
        "The audit trail",
        &[("list", "listAuditEntries")],
        &["id", "at", "actor_email", "action", "target", "key_id"],
    ),
];

/// Parameters of lists that the command itself sets, or that ask for another format than JSON.
const OF_PAGES: [&str; 3] = ["cursor", "format", "limit"];

/// Entries of a page.
const PAGE: usize = 200;

/// The value that clears a member.
const NULL: &str = "null";

/// Adds the commands of all nouns. A noun that the command has already gets further verbs.
///
/// # Errors
/// The id of an operation that the document does not have.
pub fn add_to(mut command: clap::Command, document: Document<'_>) -> Result<clap::Command, String> {
    for noun in NOUNS {
        let mut verbs = Vec::new();
        for (verb, id) in noun.verbs {
            let operation = document.operation(id).ok_or_else(|| format!("the OpenAPI document has no {id}"))?;
            verbs.push(verb_command(verb, &operation));
        }
        command = match command.find_subcommand(noun.name) {
            Some(_) => command.mut_subcommand(noun.name, |known| known.subcommands(verbs)),
            None => command.subcommand(
                clap::Command::new(noun.name).about(noun.about).subcommand_required(true).subcommands(verbs),
            ),
        };
    }
    Ok(command)
}

fn verb_command(verb: &'static str, operation: &Operation) -> clap::Command {
    let mut command = clap::Command::new(verb);
    for (place, parameter) in operation.path_parameters.iter().enumerate() {
        let arg = Arg::new(parameter.name.clone()).required(true).index(place + 1).help(parameter.help.clone());
        command = command.arg(arg.value_name(parameter.name.to_uppercase()));
    }
    let is_list = operation.list.is_some();
    for input in &operation.query {
        if !(is_list && OF_PAGES.contains(&input.name.as_str())) {
            command = command.arg(flag(input, input.is_required));
        }
    }
    if is_list {
        let rows = Arg::new("limit").long("limit").value_name("N").value_parser(value_parser!(usize));
        // A sum needs all rows.
        let most = if verb == "report" { "0" } else { "100" };
        command = command.arg(rows.default_value(most).help("Maximum number of entries; 0 for all"));
    }
    for input in operation.body.iter().flatten() {
        command = command.arg(flag(input, false));
    }
    if operation.body.is_some() {
        let body = Arg::new("body").long("body").value_name("FILE");
        command = command.arg(body.help("File with the body in JSON, - for standard input. Flags replace its members"));
    }
    for (header, name, value, help) in HEADERS {
        // Each change can wait for the Envoys.
        let is_known = operation.headers.iter().any(|of| of == header);
        if is_known || (*header == PREFER && operation.method != "GET") {
            command = command.arg(Arg::new(*name).long(*name).value_name(*value).help(*help));
        }
    }
    let format = Arg::new("output").short('o').long("output").value_name("FORMAT");
    command =
        command.arg(format.value_parser(value_parser!(Format)).default_value("table").help("Format of the result"));
    // augment_args replaces the help text of the command, so it is set after that.
    Server::augment_args(command).about(operation.summary.clone()).long_about(None)
}

const PREFER: &str = "prefer";

/// Headers of operations: the header, the flag, its value, and its help.
const HEADERS: &[(&str, &str, &str, &str)] = &[
    ("if-match", "if-match", "ETAG", "Change it only if it still has this ETag"),
    (
        "idempotency-key",
        "idempotency-key",
        "KEY",
        "A unique key of the request. The control plane applies requests with the same key once",
    ),
    ("if-none-match", "if-none-match", "*", "Create it only if it does not exist"),
    (PREFER, "wait", "SECONDS", "Wait until every live Envoy has the change, at most this long: 1 to 10"),
];

fn flag(input: &Input, is_required: bool) -> Arg {
    let arg = Arg::new(input.name.clone()).long(input.name.replace('_', "-")).required(is_required);
    let arg = arg.help(input.help.clone()).allow_negative_numbers(true);
    match &input.kind {
        Kind::Text => arg.value_name("TEXT"),
        Kind::Number => arg.value_name("N"),
        Kind::Flag => arg.value_name("BOOL").num_args(0..=1).require_equals(true).default_missing_value("true"),
        Kind::Choice(choices) => {
            let values = choices.iter().map(String::as_str).chain([NULL]);
            arg.value_parser(PossibleValuesParser::new(values.map(str::to_owned))).hide_possible_values(false)
        }
        Kind::Texts => arg.value_name("TEXT,…").value_delimiter(',').action(ArgAction::Append),
        Kind::Json => arg.value_name("JSON"),
    }
}

/// Runs the command that was given, if it is one of a noun. Returns whether it was.
///
/// # Errors
/// Each variant of [`CommandError`].
pub fn run(
    matches: &ArgMatches,
    document: Document<'_>,
    input: &mut impl Read,
    out: &mut impl Write,
) -> Result<bool, CommandError> {
    let Some((noun, of_noun)) = matches.subcommand() else { return Ok(false) };
    let Some(noun) = NOUNS.iter().find(|known| known.name == noun) else { return Ok(false) };
    let Some((verb, given)) = of_noun.subcommand() else { return Ok(false) };
    let Some((_, id)) = noun.verbs.iter().find(|(known, _)| *known == verb) else { return Ok(false) };
    let invalid = |error: clap::Error| CommandError::Invalid(error.to_string());
    let client = Server::from_arg_matches(given).map_err(invalid)?.client()?;
    let operation = document.operation(id).ok_or_else(|| CommandError::Invalid(format!("no operation {id}")))?;
    Run { noun, operation, given, client }.run(input, out)?;
    Ok(true)
}

struct Run<'a> {
    noun: &'a Noun,
    operation: Operation,
    given: &'a ArgMatches,
    client: Client,
}

impl Run<'_> {
    fn run(&self, input: &mut impl Read, out: &mut impl Write) -> Result<(), CommandError> {
        let request = Request {
            method: &self.operation.method,
            path: &self.path()?,
            query: &self.query(),
            headers: &self.headers(),
            body: self.body(input)?.as_ref().map(|body| serde_json::to_vec(body).unwrap_or_default()),
            content_type: "application/json",
        };
        let format = self.given.get_one("output").copied().unwrap_or_default();
        match &self.operation.list {
            Some(list) => self.write_list(out, format, list, pages(&self.client, &request, list, self.most())?),
            None => self.write(out, format, self.client.send(&request)?.body),
        }
    }

    /// The path of the operation. Keys can be named by the first characters of their secrets, and users by their addresses.
    fn path(&self) -> Result<String, CommandError> {
        let mut path = self.operation.path.clone();
        for parameter in &self.operation.path_parameters {
            let given = self.text(&parameter.name).unwrap_or_default();
            let value = match (parameter.name.as_str(), given) {
                ("id", prefix) if prefix.starts_with("sk_") => self.client.key_of_prefix("ID", prefix)?,
                ("id", email) if email.contains('@') => self.client.user_of_email(email)?,
                (_, other) => other.to_owned(),
            };
            path = fill(&path, &parameter.name, &value);
        }
        Ok(path)
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.given.try_get_one::<String>(name).ok().flatten().map(String::as_str)
    }

    fn query(&self) -> Vec<(String, String)> {
        let given = |input: &Input| match input.kind {
            Kind::Texts => self.texts(&input.name).map(|texts| texts.join(",")),
            _ => self.text(&input.name).map(str::to_owned),
        };
        let is_list = self.operation.list.is_some();
        let paged = |input: &&Input| !(is_list && OF_PAGES.contains(&input.name.as_str()));
        self.operation
            .query
            .iter()
            .filter(paged)
            .filter_map(|input| given(input).map(|value| (input.name.clone(), value)))
            .collect()
    }

    fn texts(&self, name: &str) -> Option<Vec<String>> {
        self.given.try_get_many::<String>(name).ok().flatten().map(|texts| texts.cloned().collect())
    }

    fn headers(&self) -> Vec<(&'static str, String)> {
        let mut headers = Vec::new();
        for (header, name, ..) in HEADERS {
            if let Some(value) = self.text(name) {
                let value = if *header == PREFER { format!("wait={value}") } else { value.to_owned() };
                headers.push((*header, value));
            }
        }
        headers
    }

    fn body(&self, input: &mut impl Read) -> Result<Option<Value>, CommandError> {
        let Some(members) = &self.operation.body else { return Ok(None) };
        let mut body = match self.text("body") {
            Some(file) => object(&crate::read(file, input)?)?,
            None => Map::new(),
        };
        for member in members {
            if let Some(value) = self.member(member)? {
                body.insert(member.name.clone(), value);
            }
        }
        let missing = members.iter().find(|member| member.is_required && !body.contains_key(&member.name));
        if let Some(missing) = missing {
            let flag = missing.name.replace('_', "-");
            return Err(CommandError::Invalid(format!("--{flag}: is required unless --body has {}", missing.name)));
        }
        Ok(Some(body.into()))
    }

    fn member(&self, member: &Input) -> Result<Option<Value>, CommandError> {
        let invalid =
            |what: &str| CommandError::Invalid(format!("--{}: must be {what}", member.name.replace('_', "-")));
        if member.kind == Kind::Texts {
            let Some(texts) = self.texts(&member.name) else { return Ok(None) };
            let texts: Vec<String> = texts.into_iter().filter(|text| !text.is_empty()).collect();
            return Ok(Some(if texts == [NULL] { Value::Null } else { texts.into() }));
        }
        let Some(text) = self.text(&member.name) else { return Ok(None) };
        let value = match member.kind {
            _ if text == NULL => Value::Null,
            Kind::Text | Kind::Choice(_) | Kind::Texts => text.into(),
            Kind::Number => serde_json::from_str::<serde_json::Number>(text).map_err(|_| invalid("a number"))?.into(),
            Kind::Flag => text.parse::<bool>().map_err(|_| invalid("true or false"))?.into(),
            Kind::Json => serde_json::from_str(text).map_err(|error| invalid(&format!("JSON: {error}")))?,
        };
        Ok(Some(value))
    }

    /// The number of entries that the caller wants.
    fn most(&self) -> usize {
        self.given.get_one("limit").copied().filter(|most| *most > 0).unwrap_or(usize::MAX)
    }

    fn write_list(
        &self,
        out: &mut impl Write,
        format: Format,
        list: &str,
        page: Map<String, Value>,
    ) -> Result<(), CommandError> {
        let entries = page.get(list).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let has = |column: &&&str| entries.is_empty() || entries.iter().any(|entry| !entry[**column].is_null());
        match format {
            Format::Json => output::json(out, &page.into())?,
            Format::Table => {
                let columns: Vec<&str> = self.noun.columns.iter().filter(has).copied().collect();
                output::entries(out, &columns, entries)?;
            }
            Format::Csv => output::csv(out, entries)?,
        }
        Ok(())
    }

    fn write(&self, out: &mut impl Write, format: Format, answer: Value) -> Result<(), CommandError> {
        match (format, answer) {
            (_, Value::Null) => {}
            (Format::Json, answer) => output::json(out, &answer)?,
            (Format::Table, Value::Object(members)) => output::members(out, &members)?,
            (Format::Table, answer) => output::json(out, &answer)?,
            (Format::Csv, Value::Array(entries)) => output::csv(out, &entries)?,
            (Format::Csv, answer) => output::csv(out, &[answer])?,
        }
        Ok(())
    }
}

/// The first page, with the entries of all pages, up to `most` of them.
pub(crate) fn pages(
    client: &Client,
    request: &Request<'_>,
    list: &str,
    most: usize,
) -> Result<Map<String, Value>, CommandError> {
    let (mut first, mut entries) = (None::<Map<String, Value>>, Vec::new());
    let mut query = request.query.to_vec();
    let mut cursor = None;
    loop {
        let left = most.saturating_sub(entries.len());
        let mut of_page = query.clone();
        of_page.push(("limit".to_owned(), left.min(PAGE).to_string()));
        of_page.extend(cursor.take().map(|cursor| ("cursor".to_owned(), cursor)));
        let answer = client.send(&Request { query: &of_page, body: None, ..*request })?.body;
        let Value::Object(mut page) = answer else {
            return Err(CommandError::Invalid(
                "the answer is not a page; check that --server is a control plane".into(),
            ));
        };
        if let Some(Value::Array(more)) = page.remove(list) {
            entries.extend(more);
        }
        let next = page.remove("next_cursor").and_then(|next| next.as_str().map(str::to_owned));
        if first.is_none() {
            // A cursor is valid for this span only.
            for name in ["from", "to", "time_zone"] {
                if let Some(given) = page.get(name).and_then(Value::as_str).filter(|_| !has(&query, name)) {
                    query.push((name.to_owned(), given.to_owned()));
                }
            }
        }
        let whole = first.get_or_insert(page);
        match next.filter(|_| entries.len() < most) {
            Some(next) => cursor = Some(next),
            None => {
                whole.insert(list.to_owned(), entries.into());
                return Ok(std::mem::take(whole));
            }
        }
    }
}

fn object(text: &str) -> Result<Map<String, Value>, CommandError> {
    serde_json::from_str(text).map_err(|error| CommandError::Invalid(format!("--body: must be a JSON object: {error}")))
}

fn has(query: &[(String, String)], name: &str) -> bool {
    query.iter().any(|(given, _)| given == name)
}
