//! The resources of a control plane: lists, single ones with their ETags, and conditional writes. Methods and paths are those of
//! the OpenAPI document.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::change::Version;
use super::mark::{self, Mark};
use super::resource::{Content, Normalize, Normalized, Resource};
use crate::CommandError;
use crate::document::{Document, Operation};
use crate::operations::pages;
use crate::server::{Answer, Client, Request};

/// Users are compared by these members only.
const OF_USERS: [&str; 2] = ["plan", "refill"];

/// The end of the addresses of erased users, who can keep a plan.
const ERASED: &str = "@erased.invalid";

/// How often a request is sent again that the control plane refused for its rate limit.
const REPEATS: usize = 30;

/// How long to wait before that.
const PAUSE: Duration = Duration::from_secs(1);

/// The header with the version that a write is meant for.
const IF_MATCH: &str = "if-match";

/// A client for resources.
#[derive(Debug)]
pub struct ControlPlane<'a> {
    pub client: Client,
    pub document: Document<'a>,
    pub normalize: Normalize,
}

/// A resource of the control plane.
#[derive(Debug)]
pub struct Present {
    /// The members, without the mark.
    pub content: Content,
    /// The name in paths: that of the resource, or the id of a user.
    pub id: String,
    /// The mark in the description.
    pub mark: Option<Mark>,
}

impl ControlPlane<'_> {
    /// All resources of a kind, by name. Of users those that have a plan or a refill.
    pub fn list(&self, resource: Resource) -> Result<BTreeMap<String, Present>, CommandError> {
        let operation = self.operation(resource.list())?;
        let list = operation.list.as_deref().unwrap_or_default();
        let page = pages(&self.client, &Request::get(&operation.path), list, usize::MAX)?;
        let entries = page.get(list).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let is_declarable = |user: &Value| {
            let is_erased = user["email"].as_str().is_some_and(|email| email.ends_with(ERASED));
            !is_erased && OF_USERS.iter().any(|member| !user[*member].is_null())
        };
        let wanted = entries.iter().filter(|entry| resource != Resource::User || is_declarable(entry));
        wanted.map(|entry| self.present(resource, entry)).collect()
    }

    /// The user with this address.
    pub fn user(&self, email: &str) -> Result<Option<Present>, CommandError> {
        let query = [("email".to_owned(), email.to_owned())];
        let operation = self.operation(Resource::User.list())?;
        let answer = self.send(&Request { query: &query, ..Request::get(&operation.path) })?;
        match &answer.body["users"][0] {
            Value::Null => Ok(None),
            user => Ok(Some(self.present(Resource::User, user)?.1)),
        }
    }

    /// A resource with its version; none if there is none.
    pub fn get(&self, resource: Resource, id: &str) -> Result<Option<(Present, Version)>, CommandError> {
        let operation = self.operation(resource.get())?;
        let answer = match self.send(&Request::get(&operation.path_of(id))) {
            Err(CommandError::Refused { status: 404, .. }) => return Ok(None),
            answer => answer?,
        };
        let present = self.present(resource, &answer.body)?.1;
        let version = Version { id: id.to_owned(), etag: etag(&answer)?, mark: present.mark.clone() };
        Ok(Some((present, version)))
    }

    /// Creates a role, a plan or a policy.
    pub fn create(&self, resource: Resource, name: &str, content: &Content) -> Result<(), CommandError> {
        let condition = ("if-none-match", "*".to_owned());
        self.write(resource.write(), name, condition, Some(content)).map(|_| ())
    }

    /// Creates a user, and sets the plan and the refill.
    pub fn create_user(&self, email: &str, content: &Content) -> Result<(), CommandError> {
        let operation = self.operation("createUser")?;
        let body = Some(json!({"email": email}).to_string().into_bytes());
        let answer = self.send(&Request { method: &operation.method, body, ..Request::get(&operation.path) })?;
        // 200 is the answer if there is the user already, whom another writer created since the comparison.
        if answer.status != 201 {
            return Err(CommandError::Refused { status: 412, detail: "the user exists".into() });
        }
        let id = answer.body["id"].as_str().unwrap_or_default();
        let members: Content = content.iter().filter(|(_, value)| !value.is_null()).map(owned).collect();
        if members.is_empty() {
            return Ok(());
        }
        let condition = (IF_MATCH, etag(&answer)?);
        self.write(Resource::User.write(), id, condition, Some(&members)).map(|_| ())
    }

    /// Writes a resource in place of this version. Of users only the members that `changed` names are
    /// written, so that another member keeps what another writer gives it.
    pub fn update(
        &self,
        resource: Resource,
        version: &Version,
        content: &Content,
        changed: impl Fn(&str) -> bool,
    ) -> Result<Version, CommandError> {
        let content = match (resource, &version.mark) {
            (Resource::User, _) => content.iter().filter(|(name, _)| changed(name)).map(owned).collect(),
            (_, Some(mark)) => mark.add_to(content.clone()),
            (_, None) => content.clone(),
        };
        let condition = (IF_MATCH, version.etag.clone());
        let answer = self.write(resource.write(), &version.id, condition, Some(&content))?;
        Ok(Version { etag: etag(&answer)?, ..version.clone() })
    }

    /// Deletes this version of a role, a plan or a policy.
    pub fn delete(&self, operation: &str, version: &Version) -> Result<(), CommandError> {
        self.write(operation, &version.id, (IF_MATCH, version.etag.clone()), None).map(|_| ())
    }

    fn write(
        &self,
        operation: &str,
        id: &str,
        condition: (&'static str, String),
        body: Option<&Content>,
    ) -> Result<Answer, CommandError> {
        let operation = self.operation(operation)?;
        let body = body.map(|content| serde_json::to_vec(content).unwrap_or_default());
        let (method, path) = (operation.method.as_str(), operation.path_of(id));
        self.send(&Request { method, body, headers: &[condition], ..Request::get(&path) })
    }

    fn operation(&self, id: &str) -> Result<Operation, CommandError> {
        self.document.operation(id).ok_or_else(|| CommandError::Invalid(format!("the OpenAPI document has no {id}")))
    }

    /// Sends a request, again after a pause if there were too many.
    fn send(&self, request: &Request<'_>) -> Result<Answer, CommandError> {
        for _ in 0..REPEATS {
            match self.client.send(request) {
                Err(CommandError::Refused { status: 429, .. }) => thread::sleep(PAUSE),
                answer => return answer,
            }
        }
        self.client.send(request)
    }

    /// A resource of a response.
    fn present(&self, resource: Resource, shown: &Value) -> Result<(String, Present), CommandError> {
        let text = |member: &str| shown[member].as_str().unwrap_or_default().to_owned();
        let members: Vec<String> = match resource {
            Resource::User => OF_USERS.map(str::to_owned).into(),
            _ => self.operation(resource.write())?.body.into_iter().flatten().map(|member| member.name).collect(),
        };
        let member = |name: String| shown.get(&name).map(|value| (name.clone(), value.clone()));
        let content: Content = members.into_iter().filter_map(member).collect();
        let (content, mark) = mark::split(content);
        let name = text(resource.key());
        let normalized = (self.normalize)(resource, &name, &content.into());
        let Normalized { name, content } = normalized.map_err(|invalid| {
            let (kind, server) = (resource.name(), self.client.server());
            CommandError::Invalid(format!(
                "{kind} {name} of {server}: {}: {}; use the version of portcullis that runs there",
                invalid.field, invalid.detail
            ))
        })?;
        let id = if resource == Resource::User { text("id") } else { name.clone() };
        Ok((name, Present { content, id, mark }))
    }
}

fn owned((name, value): (&String, &Value)) -> (String, Value) {
    (name.clone(), value.clone())
}

fn etag(answer: &Answer) -> Result<String, CommandError> {
    let missing = || CommandError::Invalid("the response has no ETag; check what is between here and --server".into());
    answer.etag.clone().ok_or_else(missing)
}
