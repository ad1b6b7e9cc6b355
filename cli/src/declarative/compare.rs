//! The comparison of declarations with a control plane.

use std::collections::BTreeMap;

use super::change::{Action, Change, fields};
use super::control_plane::{ControlPlane, Present};
use super::files::{Declaration, Declarations};
use super::mark::Mark;
use super::resource::{Content, Normalize, Resource};
use crate::CommandError;

/// The policy that the control plane does not delete.
const DEFAULT_POLICY: &str = "default";

/// What differs.
#[derive(Debug, Default)]
pub struct Comparison {
    /// In the order of writes.
    pub changes: Vec<Change>,
    /// Managed resources that no file has, in words. Empty with `prune`, which makes changes of them.
    pub unlisted: Vec<String>,
}

/// Compares each kind that has a file. With `prune`, resources of this manager that no file has are to be deleted.
///
/// # Errors
/// Those of the requests.
pub fn compare(
    control_plane: &ControlPlane<'_>,
    declarations: &Declarations,
    manager: &Mark,
    prune: bool,
) -> Result<Comparison, CommandError> {
    let mut found = Comparison::default();
    let mut deletions = Vec::new();
    for (resource, declared) in &declarations.resources {
        // The control plane may have many users that no file has.
        let present = match resource {
            Resource::User => of_users(control_plane, declared)?,
            _ => control_plane.list(*resource)?,
        };
        for (name, declaration) in in_order(declared) {
            found.changes.extend(change(control_plane, *resource, name, declaration, present.get(name), manager)?);
        }
        for (name, present) in &present {
            let is_unlisted = present.mark.as_ref() == Some(manager) && !declared.contains_key(name);
            if !is_unlisted || (*resource == Resource::Policy && name == DEFAULT_POLICY) {
                continue;
            }
            if prune {
                deletions.extend(deletion(control_plane, *resource, name, manager)?);
            } else {
                found.unlisted.push(format!("{} {name}", resource.name()));
            }
        }
    }
    // A resource is deleted after those that refer to it.
    found.changes.extend(deletions.into_iter().rev());
    Ok(found)
}

/// By name, but the policy `default` first: the control plane creates it with any other policy.
fn in_order(declared: &BTreeMap<String, Declaration>) -> impl Iterator<Item = (&String, &Declaration)> {
    let is_default = |(name, _): &(&String, &Declaration)| name.as_str() == DEFAULT_POLICY;
    declared.iter().filter(is_default).chain(declared.iter().filter(move |entry| !is_default(entry)))
}

fn of_users(
    control_plane: &ControlPlane<'_>,
    declared: &BTreeMap<String, Declaration>,
) -> Result<BTreeMap<String, Present>, CommandError> {
    let mut present = BTreeMap::new();
    for email in declared.keys() {
        present.extend(control_plane.user(email)?.map(|user| (email.clone(), user)));
    }
    Ok(present)
}

/// The change that brings one resource to what is declared, if it differs.
fn change(
    control_plane: &ControlPlane<'_>,
    resource: Resource,
    name: &str,
    declaration: &Declaration,
    listed: Option<&Present>,
    manager: &Mark,
) -> Result<Option<Change>, CommandError> {
    let after = &declaration.content;
    let differs = |present: &Present| before(&present.content, after) != *after;
    let current = match listed {
        Some(listed) if !differs(listed) => return Ok(None),
        // Read again, with the ETag of exactly what is compared.
        Some(listed) => control_plane.get(resource, &listed.id)?,
        None => None,
    };
    let (action, before) = match current {
        Some((present, _)) if !differs(&present) => return Ok(None),
        Some((present, version)) => (Action::Update(version), before(&present.content, after)),
        None => {
            check_mark(control_plane.normalize, resource, name, declaration, manager)?;
            (Action::Create, defaults(control_plane.normalize, resource, name))
        }
    };
    let fields = fields(&before, after);
    Ok(Some(Change { resource, name: name.to_owned(), action, content: after.clone(), fields }))
}

/// The members that are declared: those of a user that are not given keep their values.
fn before(present: &Content, declared: &Content) -> Content {
    let is_declared = |(name, _): &(&String, _)| declared.contains_key(*name);
    present.iter().filter(is_declared).map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// What a resource is if its file gives no member.
pub fn defaults(normalize: Normalize, resource: Resource, name: &str) -> Content {
    normalize(resource, name, &Content::new().into()).map(|normalized| normalized.content).unwrap_or_default()
}

/// The description of a new resource has room for the mark.
fn check_mark(
    normalize: Normalize,
    resource: Resource,
    name: &str,
    declaration: &Declaration,
    manager: &Mark,
) -> Result<(), CommandError> {
    if resource == Resource::User {
        return Ok(());
    }
    let marked = manager.add_to(declaration.content.clone());
    let checked = normalize(resource, name, &marked.into());
    checked.map(|_| ()).map_err(|invalid| {
        let (place, mark) = (&declaration.place, manager.as_str());
        CommandError::Invalid(format!(
            "{place}: {name}.{}: {} with {mark}, which apply adds",
            invalid.field, invalid.detail
        ))
    })
}

fn deletion(
    control_plane: &ControlPlane<'_>,
    resource: Resource,
    name: &str,
    manager: &Mark,
) -> Result<Option<Change>, CommandError> {
    let current = control_plane.get(resource, name)?.filter(|(present, _)| present.mark.as_ref() == Some(manager));
    Ok(current.map(|(present, version)| Change {
        resource,
        name: name.to_owned(),
        action: Action::Delete(version),
        content: present.content,
        fields: Vec::new(),
    }))
}
