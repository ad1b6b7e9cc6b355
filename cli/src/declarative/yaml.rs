//! YAML as JSON values, with the line of each member.

use std::collections::HashMap;

use saphyr::{LoadableYamlNode, MarkedYaml, Scalar, ScalarStyle, Yaml, YamlData, YamlEmitter};
use serde_json::{Map, Number, Value};

/// A document.
#[derive(Debug)]
pub struct Tree {
    /// The document as JSON.
    pub value: Value,
    /// Lines by path, such as `gold.rate_limits[0].name`.
    lines: HashMap<String, usize>,
}

/// Why a text is not YAML, or has what JSON has not.
#[derive(Debug, PartialEq, Eq)]
pub struct SyntaxError {
    /// The line, from 1.
    pub line: usize,
    /// What is wrong.
    pub detail: String,
}

impl Tree {
    /// Parses a text of one document. An empty one is an empty mapping.
    pub fn parse(text: &str) -> Result<Self, SyntaxError> {
        let malformed = |error: saphyr::ScanError| SyntaxError {
            line: error.marker().line(),
            detail: format!("is not YAML: {}", error.info()),
        };
        let documents = MarkedYaml::load_from_str(text).map_err(malformed)?;
        let mut tree = Self { value: Value::Object(Map::new()), lines: HashMap::new() };
        match documents.as_slice() {
            [] => {}
            [one] => match tree.json(one, "")? {
                Value::Null => {}
                value => tree.value = value,
            },
            [_, second, ..] => return Err(refused(second, "must have one document only")),
        }
        Ok(tree)
    }

    /// The line of the member at this path, or else of the closest one around it.
    pub fn line(&self, path: &str) -> usize {
        let mut path = path;
        loop {
            if let Some(line) = self.lines.get(path) {
                return *line;
            }
            match path.rfind(['.', '[']).and_then(|end| path.get(..end)) {
                Some(around) => path = around,
                None => return 1,
            }
        }
    }

    fn json(&mut self, node: &MarkedYaml<'_>, path: &str) -> Result<Value, SyntaxError> {
        Ok(match &node.data {
            YamlData::Value(scalar) => {
                return scalar_json(scalar).ok_or_else(|| refused(node, "must be a finite number"));
            }
            YamlData::Sequence(items) => {
                let mut list = Vec::new();
                for (place, item) in items.iter().enumerate() {
                    let path = format!("{path}[{place}]");
                    list.push(self.json(item, &path)?);
                    self.lines.insert(path, item.span.start.line());
                }
                list.into()
            }
            YamlData::Mapping(members) => {
                let mut object = Map::new();
                for (key, value) in members {
                    let YamlData::Value(Scalar::String(name)) = &key.data else {
                        return Err(refused(key, "has a name that is not text; quote it"));
                    };
                    let path = join(path, name);
                    object.insert(name.clone().into_owned(), self.json(value, &path)?);
                    self.lines.insert(path, key.span.start.line());
                }
                object.into()
            }
            YamlData::Tagged(..) => return Err(refused(node, "has a tag; write the value without it")),
            YamlData::Representation(..) | YamlData::Alias(_) | YamlData::BadValue => {
                return Err(refused(node, "has a value that cannot be read"));
            }
        })
    }
}

/// The path of a member.
pub fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn refused(node: &MarkedYaml<'_>, detail: &str) -> SyntaxError {
    SyntaxError { line: node.span.start.line(), detail: detail.to_owned() }
}

fn scalar_json(scalar: &Scalar<'_>) -> Option<Value> {
    Some(match scalar {
        Scalar::Null => Value::Null,
        Scalar::Boolean(boolean) => (*boolean).into(),
        Scalar::Integer(integer) => (*integer).into(),
        Scalar::FloatingPoint(float) => Number::from_f64(float.into_inner())?.into(),
        Scalar::String(text) => text.as_ref().into(),
    })
}

/// Writes a mapping as YAML.
pub fn write(content: &Map<String, Value>) -> String {
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = YamlEmitter::new(&mut text).dump(&mapping(content));
    format!("{}\n", text.strip_prefix("---").unwrap_or(&text).trim())
}

fn mapping(content: &Map<String, Value>) -> Yaml<'_> {
    Yaml::Mapping(content.iter().map(|(name, value)| (text(name), yaml(value))).collect())
}

fn yaml(value: &Value) -> Yaml<'_> {
    match value {
        Value::Null => Yaml::Representation("null".into(), ScalarStyle::Plain, None),
        Value::Bool(boolean) => Yaml::Value(Scalar::Boolean(*boolean)),
        Value::Number(number) => Yaml::Representation(number.to_string().into(), ScalarStyle::Plain, None),
        Value::String(content) => text(content),
        Value::Array(items) => Yaml::Sequence(items.iter().map(yaml).collect()),
        Value::Object(content) => mapping(content),
    }
}

fn text(content: &str) -> Yaml<'_> {
    Yaml::Value(Scalar::String(content.into()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn each_member_has_its_line_and_a_path_without_one_that_of_its_parent() {
        let tree =
            Tree::parse("# Plans\ngold:\n  scopes: [a, b]\n  rate_limits:\n    - name: minute\n      requests: 5\n");
        let tree = tree.unwrap();
        assert_eq!(
            tree.value,
            json!({"gold": {"scopes": ["a", "b"], "rate_limits": [{"name": "minute", "requests": 5}]}})
        );
        for (path, line) in [
            ("gold", 2),
            ("gold.scopes", 3),
            ("gold.rate_limits[0]", 5),
            ("gold.rate_limits[0].requests", 6),
            ("gold.rate_limits[0].window_seconds", 5),
            ("gold.quota.period", 2),
            ("other", 1),
        ] {
            assert_eq!(tree.line(path), line, "{path}");
        }
    }

    #[test]
    fn what_json_has_not_is_refused_with_its_line() {
        for (text, line, detail) in [
            ("a: 1\nb: ]\nc: 2\n", 2, "is not YAML: "),
            ("a: 1\na: 2\n", 2, "is not YAML: duplicated key in mapping"),
            ("a: 1\n1: 2\n", 2, "has a name that is not text; quote it"),
            ("a: !key 2\n", 1, "has a tag; write the value without it"),
            ("a: .nan\n", 1, "must be a finite number"),
            ("a: 1\n---\nb: 2\n", 3, "must have one document only"),
        ] {
            let error = Tree::parse(text).unwrap_err();
            assert!(error.line == line && error.detail.starts_with(detail), "{text:?}: {error:?}");
        }
        for empty in ["", "# nothing\n", "---\n", "{}"] {
            assert_eq!(Tree::parse(empty).unwrap().value, json!({}), "{empty:?}");
        }
    }

    #[test]
    fn a_mapping_is_written_for_people() {
        let content =
            json!({"gold": {"quota": null, "scopes": ["orders:read", "a"], "limits": [], "shadow": true, "n": 5}});
        let expected =
            "gold:\n  limits: []\n  n: 5\n  quota: null\n  scopes:\n    - \"orders:read\"\n    - a\n  shadow: true\n";
        assert_eq!(write(content.as_object().unwrap()), expected);
        assert_eq!(write(&Map::new()), "{}\n");
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            words().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(words(), inner, 0..4)
                    .prop_map(|all| Value::Object(all.into_iter().collect())),
            ]
        })
    }

    /// Texts that YAML takes for something else unless they are quoted.
    const ODD: [&str; 16] =
        ["", "~", "null", "true", "no", "1", "0x1f", "1.5", "-", "- a", "a: b", "#", "a #b", "2026-01-01", "...", "?"];

    fn words() -> impl Strategy<Value = String> {
        let odd = prop::sample::select(&ODD[..]).prop_map(str::to_owned);
        prop_oneof![any::<String>(), "[a-z*:/{}'\" .@-]{0,12}", odd]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(content in prop::collection::btree_map(words(), value(), 0..5)) {
            let content: Map<String, Value> = content.into_iter().collect();
            let text = write(&content);
            let tree = Tree::parse(&text);
            prop_assert!(tree.is_ok(), "{text}: {tree:?}");
            prop_assert_eq!(tree.unwrap().value, Value::Object(content), "{}", text);
        }
    }
}
