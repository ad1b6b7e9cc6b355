//! The directory of declarations: one file for each kind of resource, with the resources by name.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

use super::mark;
use super::resource::{Content, Invalid, Normalize, Normalized, Resource};
use super::yaml::{self, Tree};
use crate::CommandError;

/// What a directory declares.
#[derive(Debug, Default)]
pub struct Declarations {
    /// The kinds that have a file. Those without are not compared.
    pub resources: BTreeMap<Resource, BTreeMap<String, Declaration>>,
    /// What is wrong, with file, line and field.
    pub problems: Vec<String>,
}

/// A resource in a file.
#[derive(Debug)]
pub struct Declaration {
    /// The members, with defaults.
    pub content: Content,
    /// File and line.
    pub place: String,
}

/// Reads a directory.
///
/// # Errors
/// [`CommandError::Invalid`] if files cannot be read, or if there are none.
pub fn read(directory: &Path, normalize: Normalize) -> Result<Declarations, CommandError> {
    let failed = |path: &Path, error: std::io::Error| CommandError::Invalid(format!("{}: {error}", path.display()));
    let mut all = Declarations::default();
    let mut names: Vec<String> = Vec::new();
    for entry in fs::read_dir(directory).map_err(|error| failed(directory, error))? {
        let entry = entry.map_err(|error| failed(directory, error))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    let known = Resource::ALL.map(Resource::file).join(", ");
    for name in names.iter().filter(|name| name.ends_with(".yaml") || name.ends_with(".yml")) {
        let path = directory.join(name);
        match Resource::ALL.into_iter().find(|resource| resource.file() == name) {
            Some(resource) => {
                let text = fs::read_to_string(&path).map_err(|error| failed(&path, error))?;
                all.add(resource, &path.display().to_string(), &text, normalize);
            }
            None => all.problems.push(format!("{}: is not one of the files {known}", path.display())),
        }
    }
    if all.resources.is_empty() && all.problems.is_empty() {
        return Err(CommandError::Invalid(format!("{}: has none of the files {known}", directory.display())));
    }
    Ok(all)
}

/// Refuses to replace files, unless that is wanted.
///
/// # Errors
/// [`CommandError::Invalid`] for a file that exists.
pub fn check_absent(directory: &Path, overwrite: bool) -> Result<(), CommandError> {
    let mut paths = Resource::ALL.into_iter().map(|resource| directory.join(resource.file()));
    match paths.find(|path| !overwrite && path.exists()) {
        Some(path) => Err(CommandError::Invalid(format!("{}: exists; give --overwrite to replace it", path.display()))),
        None => Ok(()),
    }
}

/// Writes the file of one kind.
///
/// # Errors
/// [`CommandError::Invalid`] if it cannot be written.
pub fn write(directory: &Path, resource: Resource, resources: BTreeMap<String, Content>) -> Result<(), CommandError> {
    let path = directory.join(resource.file());
    let failed = |error: std::io::Error| CommandError::Invalid(format!("{}: {error}", path.display()));
    fs::create_dir_all(directory).map_err(failed)?;
    let all: Content = resources.into_iter().map(|(name, content)| (name, Value::Object(content))).collect();
    fs::write(&path, yaml::write(&all)).map_err(failed)
}

impl Declarations {
    /// Adds the resources of a file, or what is wrong with them.
    fn add(&mut self, resource: Resource, file: &str, text: &str, normalize: Normalize) {
        let tree = match Tree::parse(text) {
            Ok(tree) => tree,
            Err(error) => return self.problems.push(format!("{file}:{}: {}", error.line, error.detail)),
        };
        let Value::Object(members) = &tree.value else {
            let (what, name) = (resource.plural(), resource.key());
            return self.problems.push(format!("{file}:1: must be a mapping of {what} by {name}"));
        };
        let of_kind = self.resources.entry(resource).or_default();
        let mut by_line: Vec<_> = members.iter().map(|(name, value)| (tree.line(name), name, value)).collect();
        by_line.sort_unstable_by_key(|(line, ..)| *line);
        for (line, name, value) in by_line {
            match check(resource, name, value, normalize) {
                Ok(Normalized { name: canonical, content }) => {
                    let place = format!("{file}:{line}");
                    if let Some(other) = of_kind.get(&canonical) {
                        let (what, other) = (resource.name(), &other.place);
                        self.problems.push(format!("{place}: {name}: is the same {what} as in {other}"));
                        continue;
                    }
                    of_kind.insert(canonical, Declaration { content, place });
                }
                Err(Invalid { field, detail }) => {
                    let path = if field.is_empty() { name.clone() } else { format!("{name}.{field}") };
                    self.problems.push(format!("{file}:{}: {path}: {detail}", tree.line(&path)));
                }
            }
        }
    }
}

fn check(resource: Resource, name: &str, value: &Value, normalize: Normalize) -> Result<Normalized, Invalid> {
    let normalized = normalize(resource, name, value)?;
    if let Some(mark) = mark::split(normalized.content.clone()).1 {
        let detail = format!("must not end with {}, which apply adds", mark.as_str());
        return Err(Invalid { field: "description".into(), detail });
    }
    Ok(normalized)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::normalize;
    use super::*;

    #[test]
    fn a_problem_names_file_line_and_field() {
        let mut all = Declarations::default();
        let text = "gold:\n  description: good\n\nsilver:\n  scopes: [a]\n  requets: 5\n\"1\": []\n";
        all.add(Resource::Plan, "plans.yaml", text, normalize);
        all.add(Resource::Role, "roles.yaml", "a: {description: \"x [managed by portcullis apply]\"}", normalize);
        all.add(Resource::User, "users.yaml", "A@x.org: {plan: a}\na@x.org: {}\n", normalize);
        all.add(Resource::Policy, "policies.yaml", "[]", normalize);
        let expected = [
            "plans.yaml:6: silver.requets: is not a known field",
            "plans.yaml:7: 1: must be an object",
            "roles.yaml:1: a.description: must not end with [managed by portcullis apply], which apply adds",
            "users.yaml:2: a@x.org: is the same user as in users.yaml:1",
            "policies.yaml:1: must be a mapping of policies by name",
        ];
        assert_eq!(all.problems, expected);
        let plans = &all.resources[&Resource::Plan];
        assert_eq!(plans.keys().collect::<Vec<_>>(), ["gold"]);
        assert_eq!(Value::Object(plans["gold"].content.clone()), json!({"description": "good", "scopes": []}));
    }

    #[test]
    fn a_directory_has_known_files_only_and_dump_replaces_none_by_accident() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let none = read(path, normalize).unwrap_err().to_string();
        assert!(none.ends_with(": has none of the files roles.yaml, plans.yaml, policies.yaml, users.yaml"), "{none}");
        let plans: BTreeMap<String, Content> = [("gold".to_owned(), Content::new())].into();
        check_absent(path, false).unwrap();
        write(path, Resource::Plan, plans).unwrap();
        let again = check_absent(path, false).unwrap_err().to_string();
        assert!(again.ends_with("plans.yaml: exists; give --overwrite to replace it"), "{again}");
        check_absent(path, true).unwrap();
        fs::write(path.join("policy.yml"), "").unwrap();
        fs::write(path.join("README.md"), "").unwrap();
        let all = read(path, normalize).unwrap();
        assert!(all.resources[&Resource::Plan].contains_key("gold") && all.resources.len() == 1);
        assert!(matches!(&all.problems[..], [one] if one.contains("policy.yml: is not one of the files ")));
    }
}
