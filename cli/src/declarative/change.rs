//! The difference between a resource as it is and as it is declared, field by field.

use std::fmt;
use std::io::{self, Write};

use serde_json::Value;

use super::mark::Mark;
use super::resource::{Content, Resource};
use super::yaml::join;

/// A resource that differs.
#[derive(Debug)]
pub struct Change {
    /// Its kind.
    pub resource: Resource,
    /// Its name; the address of a user.
    pub name: String,
    /// What is to be done.
    pub action: Action,
    /// The resource as it is to be, without the mark.
    pub content: Content,
    /// The members that differ.
    pub fields: Vec<Field>,
}

/// What is to be done with a resource.
#[derive(Debug)]
pub enum Action {
    /// It does not exist.
    Create,
    /// It differs.
    Update(Version),
    /// It is managed, and no file has it.
    Delete(Version),
}

/// The version that was compared.
#[derive(Clone, Debug)]
pub struct Version {
    /// The name in paths: that of the resource, or the id of a user.
    pub id: String,
    /// The ETag.
    pub etag: String,
    /// The mark in the description.
    pub mark: Option<Mark>,
}

/// A member that differs.
#[derive(Debug, PartialEq, Eq)]
pub struct Field {
    /// Its path.
    path: String,
    /// Its value in the control plane, if it has one.
    before: Option<Value>,
    /// Its value in the files, if they have one.
    after: Option<Value>,
}

/// The tense in which a command describes each change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tense {
    /// `diff`.
    Would,
    /// `apply`, before it writes.
    Will,
    /// `apply`, afterwards.
    Done,
}

impl Change {
    /// The change in words, such as `would create plan gold`.
    pub fn in_words(&self, tense: Tense) -> String {
        let words = match self.action {
            Action::Create => ["would create", "will create", "created"],
            Action::Update(_) => ["would change", "will change", "changed"],
            Action::Delete(_) => ["would delete", "will delete", "deleted"],
        };
        let [would, will, done] = words;
        let verb = match tense {
            Tense::Would => would,
            Tense::Will => will,
            Tense::Done => done,
        };
        format!("{verb} {} {}", self.resource.name(), self.name)
    }

    /// Writes the change with its fields.
    pub fn show(&self, out: &mut impl Write, tense: Tense) -> io::Result<()> {
        writeln!(out, "{}", self.in_words(tense))?;
        self.fields.iter().try_for_each(|field| writeln!(out, "  {field}"))
    }
}

impl Field {
    /// Whether it is this member of the resource, or part of it.
    pub fn is_within(&self, member: &str) -> bool {
        self.path.strip_prefix(member).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.path)?;
        match (&self.before, &self.after) {
            (Some(before), Some(after)) => write!(f, "{before} -> {after}"),
            (Some(before), None) => write!(f, "{before} -> nothing"),
            (None, Some(after)) => write!(f, "{after}"),
            (None, None) => Ok(()),
        }
    }
}

/// The members that differ. Objects, and lists of objects, are compared member by member.
pub fn fields(before: &Content, after: &Content) -> Vec<Field> {
    let mut all = Vec::new();
    compare_members(before, after, "", &mut all);
    all
}

fn compare_members(before: &Content, after: &Content, path: &str, all: &mut Vec<Field>) {
    let added = after.keys().filter(|name| !before.contains_key(*name));
    for name in before.keys().chain(added) {
        compare(before.get(name), after.get(name), &join(path, name), all);
    }
}

fn compare(before: Option<&Value>, after: Option<&Value>, path: &str, all: &mut Vec<Field>) {
    let has_objects = |list: &[Value]| list.iter().any(Value::is_object);
    match (before, after) {
        (before, after) if before == after => {}
        (Some(Value::Object(before)), Some(Value::Object(after))) => compare_members(before, after, path, all),
        (Some(Value::Array(before)), Some(Value::Array(after))) if has_objects(before) && has_objects(after) => {
            for place in 0..before.len().max(after.len()) {
                compare(before.get(place), after.get(place), &format!("{path}[{place}]"), all);
            }
        }
        (before, after) => {
            all.push(Field { path: path.to_owned(), before: before.cloned(), after: after.cloned() });
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn content(value: Value) -> Content {
        let Value::Object(content) = value else { panic!("not an object: {value}") };
        content
    }

    #[test]
    fn only_what_differs_is_shown_with_its_path() {
        let before = content(json!({
            "description": "", "scopes": ["a"], "quota": {"requests": 5, "period": "day"}, "same": [{"x": 1}],
            "rate_limits": [{"name": "minute", "requests": 5}, {"name": "hour", "requests": 9}],
        }));
        let after = content(json!({
            "description": "gold", "scopes": ["a", "b"], "quota": null, "same": [{"x": 1}], "cost": 3,
            "rate_limits": [{"name": "minute", "requests": 6, "burst": 1}],
        }));
        let shown: Vec<String> = fields(&before, &after).iter().map(ToString::to_string).collect();
        let expected = [
            r#"description: "" -> "gold""#,
            r#"quota: {"period":"day","requests":5} -> null"#,
            "rate_limits[0].requests: 5 -> 6",
            "rate_limits[0].burst: 1",
            r#"rate_limits[1]: {"name":"hour","requests":9} -> nothing"#,
            r#"scopes: ["a"] -> ["a","b"]"#,
            "cost: 3",
        ];
        assert_eq!(shown, expected);
        assert_eq!(fields(&after, &after), []);
    }

    #[test]
    fn a_change_is_shown_in_words() {
        let change = Change {
            resource: Resource::Plan,
            name: "gold".into(),
            action: Action::Create,
            content: Content::new(),
            fields: fields(&Content::new(), &content(json!({"cost": 3}))),
        };
        let mut out = Vec::new();
        change.show(&mut out, Tense::Would).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "would create plan gold\n  cost: 3\n");
        assert_eq!(change.in_words(Tense::Done), "created plan gold");
    }
}
