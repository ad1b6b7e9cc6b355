//! The mark in the description of a resource that `apply` created. `apply --prune` deletes no resource without it.
//!
//! The mark is on the control plane and not in a file beside the declarations: it is there for every machine that applies them,
//! people see it in the console, and it goes with the resource.

use super::resource::Content;

/// How each mark begins.
const START: &str = "[managed by portcullis apply";

const FIELD: &str = "description";

/// Most characters of the name of a manager.
const NAME_CHARS: usize = 32;

/// The mark of a manager: who deletes what is in no file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark(String);

impl Mark {
    /// The mark of the manager of this name, or of the one without a name.
    pub fn of(manager: Option<&str>) -> Self {
        Self(manager.map_or_else(|| format!("{START}]"), |name| format!("{START}: {name}]")))
    }

    /// The mark.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The resource with the mark.
    pub fn add_to(&self, mut content: Content) -> Content {
        let marked = match description(&content) {
            None | Some("") => self.0.clone(),
            Some(text) => format!("{text} {}", self.0),
        };
        content.insert(FIELD.to_owned(), marked.into());
        content
    }
}

/// Parses the name of a manager.
pub fn parse_manager(name: &str) -> Result<String, String> {
    let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
    if !(1..=NAME_CHARS).contains(&name.len()) || !name.bytes().all(allowed) {
        return Err(format!("must have 1 to {NAME_CHARS} characters of a-z, 0-9, _ and -"));
    }
    Ok(name.to_owned())
}

/// The resource without its mark, and the mark.
pub fn split(mut content: Content) -> (Content, Option<Mark>) {
    let mut mark = None;
    // Several are there only if people wrote them. The last one counts.
    while let Some((rest, found)) = description(&content).and_then(split_text) {
        let (rest, found) = (rest.to_owned(), Mark(found.to_owned()));
        content.insert(FIELD.to_owned(), rest.into());
        mark.get_or_insert(found);
    }
    (content, mark)
}

fn split_text(text: &str) -> Option<(&str, &str)> {
    let (rest, mark) = text.split_at_checked(text.rfind(START)?)?;
    let name = mark.strip_prefix(START)?.strip_suffix(']')?;
    let is_mark = name.is_empty() || name.strip_prefix(": ").is_some_and(|name| parse_manager(name).is_ok());
    is_mark.then(|| (rest.trim_end(), mark))
}

fn description(content: &Content) -> Option<&str> {
    content.get(FIELD)?.as_str()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn described(text: &str) -> Content {
        let Value::Object(content) = json!({"description": text, "scopes": []}) else { panic!() };
        content
    }

    #[test]
    fn a_mark_comes_and_goes_and_names_its_manager() {
        let (own, other) = (Mark::of(None), Mark::of(Some("billing-2")));
        assert_eq!(own.as_str(), "[managed by portcullis apply]");
        assert_eq!(other.as_str(), "[managed by portcullis apply: billing-2]");
        for text in
            ["", "For production", "ends in ]", "[managed by portcullis apply", "[managed by portcullis apply: A b]"]
        {
            assert_eq!(split(described(text)), (described(text), None));
            for mark in [&own, &other] {
                assert_eq!(split(mark.add_to(described(text))), (described(text), Some(mark.clone())));
            }
            assert_eq!(split(own.add_to(other.add_to(described(text)))), (described(text), Some(own.clone())));
        }
        assert_eq!(split(Content::new()), (Content::new(), None));
        assert!(parse_manager("a_b-1").is_ok() && parse_manager("").is_err() && parse_manager("A]").is_err());
    }
}
