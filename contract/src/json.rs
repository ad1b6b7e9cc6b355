//! JSON input: bodies of the REST API, lines of an import, the file of policies, the plugin configuration of the filter.
//!
//! An error names the field by its path, such as `rate_limits[0].name`, and never repeats a value, which may be a key. serde
//! also reads a struct from an array, field by field in the order of declaration. [`read`] refuses such an array at every
//! depth.

mod objects_only;
mod seconds;

use std::fmt;

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};
use serde_path_to_error::{Path, Segment, Track};

use self::objects_only::ObjectsOnly;
pub use self::seconds::{Milliseconds, Seconds};

/// The mark that some editors put before UTF-8. A reader of JSON may ignore it (RFC 8259, section 8.1).
pub const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Longest name of an unknown field that an error repeats, in bytes. A generated key is longer.
const REPEATED_BYTES: usize = 32;

/// What is wrong with an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputError {
    /// The path of the field, such as `rate_limits[0].name`. Empty if the input as a whole is wrong.
    pub path: String,
    /// The path of the object that has the field; that of the field itself if its value is wrong.
    pub parent: String,
    /// The kind of fault.
    pub fault: Fault,
    /// What is wrong with the field, such as `must be a string`.
    pub detail: String,
}

/// The kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The input is not JSON.
    Syntax,
    /// A field is missing.
    Missing,
    /// A field is not known. Its name is part of the path only if it is short, since it comes from the input.
    Unknown,
    /// A field is given twice.
    Duplicate,
    /// A value is wrong.
    Value,
}

impl fmt::Display for InputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() { f.write_str(&self.detail) } else { write!(f, "{}: {}", self.path, self.detail) }
    }
}

impl std::error::Error for InputError {}

/// Reads a value from JSON.
///
/// # Errors
/// The first field that is wrong.
pub fn read<'de, T: Deserialize<'de>>(text: &'de [u8]) -> Result<T, InputError> {
    let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text);
    let mut json = serde_json::Deserializer::from_slice(text);
    let mut track = Track::new();
    let read = T::deserialize(serde_path_to_error::Deserializer::new(ObjectsOnly(&mut json), &mut track));
    let not_json = |error: serde_json::Error| {
        let detail = format!("is not JSON: {error}");
        InputError { path: String::new(), parent: String::new(), fault: Fault::Syntax, detail }
    };
    match read {
        Ok(value) => json.end().map(|()| value).map_err(not_json),
        // serde_json reports some wrong values as wrong syntax.
        Err(error) => Err(serde_json::from_slice::<IgnoredAny>(text)
            .map_or_else(not_json, |_| InputError::new(&track.path(), &error.to_string()))),
    }
}

/// Reads a value from parsed JSON.
///
/// # Errors
/// The first field that is wrong.
pub fn read_value<'de, T: Deserialize<'de>>(value: &'de serde_json::Value) -> Result<T, InputError> {
    let mut track = Track::new();
    let read = T::deserialize(serde_path_to_error::Deserializer::new(ObjectsOnly(value), &mut track));
    read.map_err(|error| InputError::new(&track.path(), &error.to_string()))
}

/// For optional fields: null means the same as no field.
///
/// # Errors
/// Those of the value.
pub fn null_is_default<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: Deserialize<'de> + Default,
    D: Deserializer<'de>,
{
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

impl InputError {
    /// Translates an error message of serde's and its path.
    #[must_use]
    pub fn new(path: &Path, message: &str) -> Self {
        let (path, message) = (text_of(path), without_position(message));
        let named = |fault, name: &str, detail: &str| {
            let parent = path.strip_suffix(name).map_or(path.as_str(), |parent| parent.trim_end_matches('.'));
            Self { path: join(parent, name), parent: parent.to_owned(), fault, detail: detail.to_owned() }
        };
        if let Some(name) = message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
            return named(Fault::Missing, name, "is missing");
        }
        if let Some(name) = message.strip_prefix("duplicate field `").and_then(|rest| rest.strip_suffix('`')) {
            return named(Fault::Duplicate, name, "is given twice");
        }
        if let Some(rest) = message.strip_prefix("unknown field `") {
            let (name, known) = rest.rsplit_once("`, expected ").unwrap_or((rest, ""));
            let parent = named(Fault::Unknown, name, "").parent;
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
            let name = if name.len() <= REPEATED_BYTES && name.bytes().all(plain) { name } else { "" };
            let known = known.strip_prefix("one of ").unwrap_or(known);
            let detail = match (name, known) {
                ("", "") => "has a field that is not known".to_owned(),
                ("", known) => format!("has a field that is not known; the fields are {known}"),
                (_, "") => "is not a known field".to_owned(),
                (_, known) => format!("is not a known field; the fields are {known}"),
            };
            return Self { path: join(&parent, name), parent, fault: Fault::Unknown, detail };
        }
        Self { parent: path.clone(), path, fault: Fault::Value, detail: detail_of(message) }
    }
}

/// An error message of serde's about a value, without the value and without names of Rust types.
#[must_use]
pub fn detail_of(message: &str) -> String {
    let typed = ["invalid type: ", "invalid value: ", "invalid length ", "unknown variant "];
    if typed.into_iter().any(|start| message.starts_with(start)) {
        let expected = message.rsplit_once(", expected ").map_or("", |(_, expected)| expected);
        return format!("must be {}", in_words(expected));
    }
    let known = match message {
        // serde_json's message if an enum is expected and the value is neither a string nor an object.
        "expected value" => "is not one of the values that it can have",
        // Numbers in a path or a query are parsed from text.
        "invalid digit found in string" | "cannot parse integer from empty string" => "must be a whole number",
        "number too large to fit in target type" => "is too large",
        "number too small to fit in target type" => "is too small",
        "provided string was not `true` or `false`" => "must be true or false",
        message if message.starts_with("UUID parsing failed") => "must be a UUID",
        message => message,
    };
    known.to_owned()
}

/// A type that serde expected, in terms of JSON.
#[must_use]
pub fn in_words(expected: &str) -> &str {
    match expected {
        "a boolean" | "bool" => "true or false",
        "a string" | "a borrowed string" | "a character" | "string" | "str" => "a string",
        "u8" => "a whole number from 0 to 255",
        "u16" => "a whole number from 0 to 65535",
        "u32" => "a whole number from 0 to 4294967295",
        "u64" | "usize" | "u128" => "a whole number that is not negative",
        "i8" | "i16" | "i32" | "i64" | "isize" | "i128" => "a whole number",
        "f32" | "f64" => "a number",
        "a sequence" => "an array",
        "a map" => "an object",
        "unit" => "null",
        "string or map" => "a string or an object",
        "Uuid" => "a UUID",
        "" => "another value",
        other if other.starts_with("struct ") => "an object",
        other if other.starts_with("enum ") => "one of the values that it can have",
        other => other,
    }
}

/// The message without the line and column that serde_json adds.
fn without_position(message: &str) -> &str {
    let position =
        |rest: &str| rest.split_once(" column ").is_some_and(|(line, column)| digits(line) && digits(column));
    match message.rsplit_once(" at line ") {
        Some((message, rest)) if position(rest) => message,
        _ => message,
    }
}

fn digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn text_of(path: &Path) -> String {
    path.iter().fold(String::new(), |path, segment| match segment {
        Segment::Seq { index } => format!("{path}[{index}]"),
        Segment::Map { key: name } | Segment::Enum { variant: name } => join(&path, name),
        Segment::Unknown => path,
    })
}

fn join(path: &str, name: &str) -> String {
    match (path, name) {
        (path, "") => path.to_owned(),
        ("", name) => name.to_owned(),
        (path, name) => format!("{path}.{name}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Order {
        amount: i64,
        kind: Kind,
        note: Option<String>,
        #[serde(default, deserialize_with = "null_is_default")]
        lines: Vec<Line>,
        #[serde(default)]
        by_name: BTreeMap<String, Line>,
        more: Option<More>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Line {
        item: String,
        count: u32,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Kind {
        TopUp,
        Correction,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum More {
        None,
        Inner(Line),
        List(Vec<Line>),
    }

    fn refused(text: &str) -> (String, String) {
        let InputError { path, detail, .. } = read::<Order>(text.as_bytes()).unwrap_err();
        let value: Result<serde_json::Value, _> = serde_json::from_str(text);
        // A text with a field twice has no such value.
        if let Ok(value) = value
            && !detail.contains("twice")
        {
            assert_eq!(read_value::<Order>(&value).unwrap_err().path, path, "{text}");
        }
        (path, detail)
    }

    #[test]
    fn an_object_is_read_and_null_means_the_same_as_no_field() {
        let expected = Order {
            amount: 5,
            kind: Kind::TopUp,
            note: None,
            lines: vec![],
            by_name: BTreeMap::new(),
            more: Some(More::None),
        };
        let text = r#"{"amount": 5, "kind": "top_up", "note": null, "lines": null, "more": "none"}"#;
        assert_eq!(read::<Order>(text.as_bytes()).unwrap(), expected);
        assert_eq!(read::<Order>(format!("\u{feff}{text}").as_bytes()).unwrap(), expected);
    }

    #[test]
    fn an_array_is_refused_where_a_struct_is_expected() {
        let start = r#"{"amount": 5, "kind": "top_up""#;
        for (text, path) in [
            (r#"[5, "top_up", "x"]"#.to_owned(), ""),
            (format!(r#"{start}, "lines": [["a", 1]]}}"#), "lines[0]"),
            (format!(r#"{start}, "lines": [{{"item": "a", "count": 1}}, ["a", 1]]}}"#), "lines[1]"),
            (format!(r#"{start}, "by_name": {{"x": ["a", 1]}}}}"#), "by_name.x"),
            (format!(r#"{start}, "more": {{"inner": ["a", 1]}}}}"#), "more.inner"),
            (format!(r#"{start}, "more": {{"list": [["a", 1]]}}}}"#), "more.list[0]"),
        ] {
            assert_eq!(refused(&text), (path.to_owned(), "must be an object".to_owned()), "{text}");
        }
    }

    #[test]
    fn an_error_names_the_field_by_its_path_and_no_rust_type() {
        let start = r#"{"amount": 5, "kind": "top_up""#;
        for (text, path, detail) in [
            ("5".to_owned(), "", "must be an object"),
            ("null".to_owned(), "", "must be an object"),
            (r#"{"kind": "top_up"}"#.to_owned(), "amount", "is missing"),
            (r#"{"amount": "5", "kind": "top_up"}"#.to_owned(), "amount", "must be a whole number"),
            (r#"{"amount": null, "kind": "top_up"}"#.to_owned(), "amount", "must be a whole number"),
            (r#"{"amount": 1.5, "kind": "top_up"}"#.to_owned(), "amount", "must be a whole number"),
            (r#"{"amount": 5, "kind": "x, expected y"}"#.to_owned(), "kind", "must be `top_up` or `correction`"),
            (r#"{"amount": 5, "kind": 7}"#.to_owned(), "kind", "is not one of the values that it can have"),
            (format!(r#"{start}, "note": {{}}}}"#), "note", "must be a string"),
            (format!(r#"{start}, "lines": {{}}}}"#), "lines", "must be an array"),
            (format!(r#"{start}, "lines": [{{"item": "a"}}]}}"#), "lines[0].count", "is missing"),
            (
                format!(r#"{start}, "lines": [{{"item": "a", "count": -1}}]}}"#),
                "lines[0].count",
                "must be a whole number from 0 to 4294967295",
            ),
            (
                format!(r#"{start}, "lines": [{{"item": "a", "count": 1, "price": 1}}]}}"#),
                "lines[0].price",
                "is not a known field; the fields are `item` or `count`",
            ),
            (format!(r#"{start}, "amount": 6}}"#), "amount", "is given twice"),
            (format!(r#"{start}, "lines": [{{"item": "a", "item": "b"}}]}}"#), "lines[0].item", "is given twice"),
        ] {
            assert_eq!(refused(&text), (path.to_owned(), detail.to_owned()), "{text}");
        }
    }

    #[test]
    fn no_value_and_no_long_name_is_repeated() {
        let secret = "sk_live_0123456789012345678901234567890123456";
        for text in [
            format!(r#"{{"amount": "{secret}", "kind": "top_up"}}"#),
            format!(r#"{{"amount": 5, "kind": "{secret}"}}"#),
            format!(r#"{{"amount": 5, "kind": "top_up", "{secret}": 1}}"#),
            format!(r#"{{"amount": 5, "kind": "top_up", "lines": ["{secret}"]}}"#),
            format!(r#"{{"amount": 5, "kind": "top_up", "lines": [{{"{secret}": 1}}]}}"#),
        ] {
            let error = read::<Order>(text.as_bytes()).unwrap_err().to_string();
            assert!(!error.contains("0123456789") && !error.is_empty(), "{error}");
        }
    }

    #[test]
    fn an_input_that_is_not_json_is_a_fault_of_syntax() {
        for text in ["", "{", "{}x", r#"{"amount": }"#, "\u{feff}\u{feff}{}"] {
            let error = read::<Order>(text.as_bytes()).unwrap_err();
            assert_eq!((error.fault, error.path.as_str()), (Fault::Syntax, ""), "{text}");
            assert!(error.detail.starts_with("is not JSON: "), "{error}");
        }
    }
}
