//! The writes that bring a control plane to what is declared.

use std::io::Write;

use serde_json::Value;

use super::change::{Action, Change, Tense};
use super::control_plane::ControlPlane;
use super::mark::Mark;
use super::resource::Resource;
use crate::CommandError;

/// The member of a policy with its rules. A policy that has rules is in use and cannot be deleted.
const MATCH: &str = "match";

/// Writes all changes. One that contradicts what is there, such as a rule that another policy still has, is tried again after
/// the others.
///
/// # Errors
/// [`CommandError::Conflict`] if another writer changed a resource after the comparison. Changes before it are written.
pub fn write(
    control_plane: &ControlPlane<'_>,
    changes: Vec<Change>,
    manager: &Mark,
    out: &mut impl Write,
) -> Result<(), CommandError> {
    let mut left = changes;
    loop {
        let (mut refused, mut last) = (Vec::new(), None);
        let before = left.len();
        for mut change in left {
            match write_one(control_plane, &mut change, manager) {
                Ok(()) => writeln!(out, "{}", change.in_words(Tense::Done))?,
                Err(error @ CommandError::Refused { status: 409, .. }) => {
                    last.get_or_insert(failure(&change, error));
                    refused.push(change);
                }
                Err(error) => return Err(failure(&change, error)),
            }
        }
        match last {
            None => return Ok(()),
            Some(error) if refused.len() == before => return Err(error),
            Some(_) => left = refused,
        }
    }
}

fn write_one(control_plane: &ControlPlane<'_>, change: &mut Change, manager: &Mark) -> Result<(), CommandError> {
    let resource = change.resource;
    match (&mut change.action, resource) {
        (Action::Create, Resource::User) => control_plane.create_user(&change.name, &change.content),
        (Action::Create, _) => control_plane.create(resource, &change.name, &manager.add_to(change.content.clone())),
        (Action::Update(version), _) => {
            let changed = |name: &str| change.fields.iter().any(|field| field.is_within(name));
            control_plane.update(resource, version, &change.content, changed).map(|_| ())
        }
        (Action::Delete(version), _) => {
            let Some(operation) = resource.delete() else { return Ok(()) };
            let has_rules = change.content.get(MATCH).and_then(Value::as_array).is_some_and(|rules| !rules.is_empty());
            if has_rules {
                change.content.remove(MATCH);
                *version = control_plane.update(resource, version, &change.content, |_| true)?;
            }
            control_plane.delete(operation, version)
        }
    }
}

/// The error of a change.
fn failure(change: &Change, error: CommandError) -> CommandError {
    let what = format!("{} {}", change.resource.name(), change.name);
    match (error, &change.action) {
        (CommandError::Refused { status: 412, .. }, _)
        | (CommandError::Refused { status: 404, .. }, Action::Update(_) | Action::Delete(_)) => {
            CommandError::Conflict(what)
        }
        (CommandError::Refused { status, detail }, _) => {
            CommandError::Refused { status, detail: format!("{what}: {detail}") }
        }
        (other, _) => other,
    }
}
