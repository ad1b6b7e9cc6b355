//! Attributes of users and keys: an external id and metadata. They mean nothing to Portcullis. The filter can pass them upstream.

use std::collections::BTreeMap;

use contract::record::Attribute;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::Patch;
use crate::error::ApiError;

const EXTERNAL_ID_CHARS: usize = 128;
const ENTRIES: usize = 16;
const NAME_BYTES: usize = 32;
const VALUE_CHARS: usize = 512;
/// Most bytes of all names and values, as headers have them. Every Envoy keeps them.
const METADATA_BYTES: usize = 2_048;

/// Characters to encode: those that a header cannot contain, and `%`. The encoder adds all that are not ASCII.
const ENCODED: &AsciiSet = &CONTROLS.add(b'%');

/// Names and values of any JSON, except null.
pub type Metadata = BTreeMap<String, Value>;

/// Attributes, as the database has them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external_id: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: Metadata,
}

/// A change of attributes. `None` and [`Patch::Keep`] keep the present value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttributesPatch {
    pub external_id: Patch<String>,
    pub metadata: Option<Metadata>,
}

impl AttributesPatch {
    /// Checks the fields of a client.
    pub fn check(self) -> Result<Self, ApiError> {
        if let Patch::Set(id) = &self.external_id
            && !((1..=EXTERNAL_ID_CHARS).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            let detail = format!("must have 1 to {EXTERNAL_ID_CHARS} visible ASCII characters");
            return Err(ApiError::invalid("external_id", detail));
        }
        let metadata = self.metadata.iter().flatten();
        if metadata.clone().count() > ENTRIES {
            return Err(ApiError::invalid("metadata", format!("must have at most {ENTRIES} entries")));
        }
        for (name, value) in metadata {
            let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'_' | b'-');
            if !(1..=NAME_BYTES).contains(&name.len()) || !name.bytes().all(allowed) {
                let detail = format!("each name must have 1 to {NAME_BYTES} characters of a-z, 0-9, _ and -");
                return Err(ApiError::invalid("metadata", detail));
            }
            if let Some(detail) = fault(value) {
                return Err(ApiError::invalid(format!("metadata.{name}"), detail));
            }
        }
        let bytes = self.metadata.iter().flatten().map(|(name, value)| name.len() + of_header(value).len());
        if bytes.sum::<usize>() > METADATA_BYTES {
            let detail = format!(
                "must have at most {METADATA_BYTES} bytes in all, as compact JSON with characters that are not ASCII percent-encoded"
            );
            return Err(ApiError::invalid("metadata", detail));
        }
        Ok(self)
    }

    /// Whether it changes nothing.
    pub const fn is_empty(&self) -> bool {
        self.external_id.is_keep() && self.metadata.is_none()
    }

    /// The change as JSON that is merged into the column: an absent member is kept and null removes it. `None`: no change.
    pub fn merge(&self) -> Option<Value> {
        let mut members = Map::new();
        if let Some(id) = self.external_id.clone().given() {
            members.insert("external_id".into(), json!(id));
        }
        if let Some(metadata) = &self.metadata {
            members.insert("metadata".into(), if metadata.is_empty() { Value::Null } else { json!(metadata) });
        }
        (!members.is_empty()).then_some(Value::Object(members))
    }

    /// The attributes of a new key or user, as JSON for the column.
    pub fn column(&self) -> Option<Value> {
        let members: Map<_, _> = match self.merge() {
            Some(Value::Object(members)) => members.into_iter().filter(|(_, value)| !value.is_null()).collect(),
            _ => Map::new(),
        };
        (!members.is_empty()).then_some(Value::Object(members))
    }
}

/// What is wrong with a value.
fn fault(value: &Value) -> Option<String> {
    match value {
        Value::Null => Some("must not be null: leave the entry out".into()),
        Value::String(text) if !(1..=VALUE_CHARS).contains(&text.chars().count()) || text.trim() != text => {
            Some(format!("must have 1 to {VALUE_CHARS} characters, and no space at the start or the end"))
        }
        value if has_control_characters(value) => Some("must not have control characters".into()),
        _ => None,
    }
}

/// Whether a text in this value has control characters. PostgreSQL cannot store all of them.
fn has_control_characters(value: &Value) -> bool {
    let in_text = |text: &str| text.chars().any(char::is_control);
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
        Value::String(text) => in_text(text),
        Value::Array(values) => values.iter().any(has_control_characters),
        Value::Object(members) => members.iter().any(|(name, value)| in_text(name) || has_control_characters(value)),
    }
}

/// A value as a header has it: a text as it is, anything else as JSON.
fn of_header(value: &Value) -> String {
    match value {
        Value::String(text) => encoded(text),
        other => encoded(&other.to_string()),
    }
}

fn encoded(value: &str) -> String {
    utf8_percent_encode(value, ENCODED).to_string()
}

/// The attributes of a key and its owner, as filters get them.
pub(crate) fn for_filters(key: Option<Attributes>, owner: Option<Attributes>) -> Vec<Attribute> {
    let mut attributes = Vec::new();
    for (whose, Attributes { external_id, metadata }) in
        [("key", key), ("owner", owner)].into_iter().filter_map(|(whose, of)| Some((whose, of?)))
    {
        let id = external_id.map(|id| ("external_id".to_owned(), encoded(&id)));
        let metadata = metadata.into_iter().map(|(name, value)| (format!("metadata.{name}"), of_header(&value)));
        let named = id.into_iter().chain(metadata);
        attributes.extend(named.map(|(name, value)| Attribute { name: format!("{whose}.{name}"), value }));
    }
    attributes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patch(external_id: &str, metadata: &[(&str, &str)]) -> AttributesPatch {
        let metadata = metadata.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        AttributesPatch { external_id: Patch::Set(external_id.into()), metadata: Some(metadata) }
    }

    #[test]
    fn attributes_are_bounded_and_an_error_names_the_field() {
        let long = "x".repeat(VALUE_CHARS);
        assert!(patch(&"x".repeat(EXTERNAL_ID_CHARS), &[("tenant_id-1", &long)]).check().is_ok());
        let longer = format!("{long}x");
        for (patch, field) in [
            (patch("", &[]), "external_id"),
            (patch("a b", &[]), "external_id"),
            (patch(&"x".repeat(EXTERNAL_ID_CHARS + 1), &[]), "external_id"),
            (patch("a", &[("", "a")]), "metadata"),
            (patch("a", &[("A", "a")]), "metadata"),
            (patch("a", &[("tenant", "")]), "metadata.tenant"),
            (patch("a", &[("tenant", " a")]), "metadata.tenant"),
            (patch("a", &[("tenant", "a\nb")]), "metadata.tenant"),
            (patch("a", &[("tenant", &longer)]), "metadata.tenant"),
        ] {
            assert_eq!(patch.check().unwrap_err().field(), Some(field));
        }
        let large = patch("a", &[("a", &"é".repeat(400))]);
        assert_eq!(large.check().unwrap_err().field(), Some("metadata"));
        let many: Metadata = (0..=ENTRIES).map(|n| (format!("n{n}"), json!(n))).collect();
        let many = AttributesPatch { metadata: Some(many), ..AttributesPatch::default() };
        assert_eq!(many.check().unwrap_err().field(), Some("metadata"));
    }

    #[test]
    fn a_value_is_any_json_but_null() {
        let of = |value: Value| AttributesPatch {
            metadata: Some([("limits".to_owned(), value)].into()),
            ..AttributesPatch::default()
        };
        for good in [json!(5), json!(false), json!({"seats": [1, null, {"é": "ü"}]}), json!([])] {
            assert!(of(good).check().is_ok());
        }
        for bad in
            [json!(null), json!(["a\u{0}"]), json!({"a\n": 1}), json!({"a": {"b": "\t"}}), json!(["x".repeat(2_048)])]
        {
            let error = of(bad.clone()).check().unwrap_err();
            assert!(error.field().unwrap().starts_with("metadata"), "{bad}");
        }
    }

    #[test]
    fn an_absent_field_is_kept_and_an_empty_one_is_removed() {
        assert_eq!(AttributesPatch::default().merge(), None);
        let removal = AttributesPatch { external_id: Patch::Clear, metadata: Some(Metadata::new()) };
        assert_eq!(removal.merge(), Some(json!({"external_id": null, "metadata": null})));
        assert_eq!((removal.column(), removal.is_empty()), (None, false));
        let set = patch("a", &[("b", "c")]);
        assert_eq!(set.merge(), Some(json!({"external_id": "a", "metadata": {"b": "c"}})));
        assert_eq!(set.merge(), set.column());
    }

    #[test]
    fn characters_that_a_header_cannot_contain_are_percent_encoded() {
        let metadata = [("name".to_owned(), json!("Zoë & 5%")), ("seats".to_owned(), json!({"é": [5, true]}))].into();
        let owner = Attributes { external_id: Some("cus_1".into()), metadata };
        let attribute = |name: &str, value: &str| Attribute { name: name.into(), value: value.into() };
        assert_eq!(
            for_filters(Some(Attributes { external_id: Some("k".into()), ..Attributes::default() }), Some(owner)),
            [
                attribute("key.external_id", "k"),
                attribute("owner.external_id", "cus_1"),
                attribute("owner.metadata.name", "Zo%C3%AB & 5%25"),
                attribute("owner.metadata.seats", "{\"%C3%A9\":[5,true]}"),
            ]
        );
        assert_eq!(for_filters(None, None), []);
    }
}
