//! `portcullis diff`, `apply`, `dump` and `validate`: roles, plans, policies, and the plans and refills of users, as files.
//!
//! The REST API stays the only way to write. What a resource means, with its defaults, comes from the server's own types by
//! [`Normalize`], and methods and paths come from the OpenAPI document.

mod apply;
mod change;
mod compare;
mod control_plane;
mod files;
mod mark;
mod resource;
mod yaml;

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use self::change::Tense;
use self::compare::{Comparison, compare};
use self::control_plane::ControlPlane;
use self::files::Declarations;
use self::mark::Mark;
pub use self::resource::{Content, Invalid, Normalize, Normalized, Resource};
use crate::CommandError;
use crate::document::Document;
use crate::server::Server;

/// A command on a directory of declarations.
#[derive(Clone, Debug, Subcommand)]
pub enum Declarative {
    /// Say what apply would change. The exit code is 2 if anything differs
    Diff(Compare),
    /// Bring roles, plans, policies and users to what files declare
    Apply(Compare),
    /// Write roles, plans, policies, and users with a plan or a refill to files
    Dump(Dump),
    /// Check files without a control plane
    Validate(Directory),
}

/// The files.
#[derive(Args, Clone, Debug)]
pub struct Directory {
    /// Directory with roles.yaml, plans.yaml, policies.yaml and users.yaml, or some of them
    #[arg(short = 'f', long = "directory", value_name = "DIR")]
    directory: PathBuf,
}

/// The files and the control plane to compare.
#[derive(Args, Clone, Debug)]
pub struct Compare {
    #[command(flatten)]
    files: Directory,
    /// Delete roles, plans and policies that apply created, with the same --manager, and that the files no longer have
    #[arg(long)]
    prune: bool,
    /// Name of the manager, where several directories are applied to one control plane
    #[arg(long, value_name = "NAME", value_parser = mark::parse_manager)]
    manager: Option<String>,
    #[command(flatten)]
    server: Server,
}

/// The files to write, and the control plane to read.
#[derive(Args, Clone, Debug)]
pub struct Dump {
    #[command(flatten)]
    files: Directory,
    /// Replace files that exist
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    server: Server,
}

impl Declarative {
    /// Runs the command.
    ///
    /// # Errors
    /// Each variant of [`CommandError`]; [`CommandError::Different`] if `diff` finds differences.
    pub fn run(&self, document: Document<'_>, normalize: Normalize, out: &mut impl Write) -> Result<(), CommandError> {
        let connect =
            |server: &Server| Ok::<_, CommandError>(ControlPlane { client: server.client()?, document, normalize });
        match self {
            Self::Diff(given) => {
                let declarations = given.files.read(normalize, out)?;
                let found = compare(&connect(&given.server)?, &declarations, &given.mark(), given.prune)?;
                found.show(out, Tense::Would)?;
                match found.changes.len() {
                    0 => Ok(writeln!(out, "Nothing differs.")?),
                    differences => Err(CommandError::Different { differences }),
                }
            }
            Self::Apply(given) => {
                let declarations = given.files.read(normalize, out)?;
                let control_plane = connect(&given.server)?;
                let found = compare(&control_plane, &declarations, &given.mark(), given.prune)?;
                found.show(out, Tense::Will)?;
                if found.changes.is_empty() {
                    writeln!(out, "Nothing differs.")?;
                }
                apply::write(&control_plane, found.changes, &given.mark(), out)
            }
            Self::Dump(given) => given.run(&connect(&given.server)?, out),
            Self::Validate(files) => {
                let declarations = files.read(normalize, out)?;
                let of = |resource: &Resource| declarations.resources.get(resource).map_or(0, |all| all.len());
                let [roles, plans, policies, users] = Resource::ALL.each_ref().map(of);
                writeln!(out, "Valid: {roles} roles, {plans} plans, {policies} policies, {users} users.")?;
                Ok(())
            }
        }
    }
}

impl Compare {
    fn mark(&self) -> Mark {
        Mark::of(self.manager.as_deref())
    }
}

impl Directory {
    /// Reads the files, and writes what is wrong with them.
    fn read(&self, normalize: Normalize, out: &mut impl Write) -> Result<Declarations, CommandError> {
        let declarations = files::read(&self.directory, normalize)?;
        for problem in &declarations.problems {
            writeln!(out, "{problem}")?;
        }
        match declarations.problems.len() {
            0 => Ok(declarations),
            problems => Err(CommandError::InvalidFiles { problems }),
        }
    }
}

impl Dump {
    fn run(&self, control_plane: &ControlPlane<'_>, out: &mut impl Write) -> Result<(), CommandError> {
        files::check_absent(&self.files.directory, self.overwrite)?;
        for resource in Resource::ALL {
            let mut all = control_plane.list(resource)?;
            for (name, present) in &mut all {
                // What is not written has its default.
                let defaults = compare::defaults(control_plane.normalize, resource, name);
                present.content.retain(|member, value| defaults.get(member) != Some(&*value));
            }
            let number = all.len();
            let content = all.into_iter().map(|(name, present)| (name, present.content)).collect();
            files::write(&self.files.directory, resource, content)?;
            writeln!(out, "{}: {number} {}", self.files.directory.join(resource.file()).display(), resource.plural())?;
        }
        Ok(())
    }
}

impl Comparison {
    fn show(&self, out: &mut impl Write, tense: Tense) -> Result<(), CommandError> {
        for change in &self.changes {
            change.show(out, tense)?;
        }
        for unlisted in &self.unlisted {
            writeln!(out, "{unlisted} is managed and in no file; --prune deletes it")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Rules like those of the control plane: roles and plans have a description and scopes, users a plan.
    pub fn normalize(resource: Resource, name: &str, value: &Value) -> Result<Normalized, Invalid> {
        let invalid = |field: &str, detail: &str| Invalid { field: field.into(), detail: detail.into() };
        let Value::Object(given) = value else { return Err(invalid("", "must be an object")) };
        let (name, known, defaults) = match resource {
            Resource::User => (name.to_lowercase(), &["plan"][..], json!({})),
            _ => (name.to_owned(), &["description", "scopes"][..], json!({"description": "", "scopes": []})),
        };
        if let Some(unknown) = given.keys().find(|name| !known.contains(&name.as_str())) {
            return Err(invalid(unknown, "is not a known field"));
        }
        let Value::Object(mut content) = defaults else { return Err(invalid("", "")) };
        content.extend(given.clone());
        Ok(Normalized { name, content })
    }
}
