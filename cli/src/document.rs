//! The operations of the REST API, as its OpenAPI document describes them.

use serde_json::Value;

/// An OpenAPI document.
#[derive(Clone, Copy, Debug)]
pub struct Document<'a>(pub &'a Value);

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// The HTTP method, in capitals.
    pub method: String,
    /// The path, with its parameters in braces.
    pub path: String,
    /// What it does, in one line.
    pub summary: String,
    /// Parameters of the path, in order.
    pub path_parameters: Vec<Input>,
    /// Parameters of the query.
    pub query: Vec<Input>,
    /// Headers that the operation takes, in lower case.
    pub headers: Vec<String>,
    /// Members of the body; `None` if it takes no JSON.
    pub body: Option<Vec<Input>>,
    /// The member of the response that has a page of entries.
    pub list: Option<String>,
}

/// A parameter, or a member of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// Its name.
    pub name: String,
    /// What it is, in one line.
    pub help: String,
    /// Its type.
    pub kind: Kind,
    /// A request without it is invalid.
    pub is_required: bool,
}

/// The type of an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Text, or a time.
    Text,
    /// A number.
    Number,
    /// True or false.
    Flag,
    /// One of these texts.
    Choice(Vec<String>),
    /// Several texts.
    Texts,
    /// An object, or several.
    Json,
}

impl Operation {
    /// The path with this value for each of its parameters, percent-encoded.
    #[must_use]
    pub fn path_of(&self, value: &str) -> String {
        let names = self.path_parameters.iter().map(|parameter| parameter.name.as_str());
        names.fold(self.path.clone(), |path, name| fill(&path, name, value))
    }
}

/// A path with this value for a parameter, percent-encoded.
pub(crate) fn fill(path: &str, parameter: &str, value: &str) -> String {
    let encoded: String = form_urlencoded::byte_serialize(value.as_bytes()).collect();
    path.replace(&format!("{{{parameter}}}"), &encoded.replace('+', "%20"))
}

impl<'a> Document<'a> {
    /// The operation with this id.
    #[must_use]
    pub fn operation(self, id: &str) -> Option<Operation> {
        let paths = self.0["paths"].as_object()?;
        let all = paths.iter().flat_map(|(path, item)| {
            let methods = item.as_object().into_iter().flatten();
            methods.map(move |(method, operation)| (path, method, operation))
        });
        let (path, method, operation) = all.into_iter().find(|(_, _, operation)| operation["operationId"] == id)?;
        let of = |place: &str| -> Vec<Input> {
            let parameters = operation["parameters"].as_array().into_iter().flatten();
            parameters.filter(|parameter| parameter["in"] == place).map(|parameter| self.parameter(parameter)).collect()
        };
        let json = |content: &'a Value| Some(&content["application/json"]["schema"]).filter(|schema| !schema.is_null());
        let body = json(&operation["requestBody"]["content"]).map(|schema| self.members(schema));
        let response = operation["responses"].as_object()?.iter().find(|(status, _)| status.starts_with('2'));
        let page = response.and_then(|(_, response)| json(&response["content"])).map(|schema| self.resolve(schema));
        let list = page.filter(|page| page["properties"]["next_cursor"].is_object()).and_then(|page| {
            let members = page["properties"].as_object()?;
            members.iter().find(|(_, member)| member["type"] == "array").map(|(name, _)| name.clone())
        });
        Some(Operation {
            method: method.to_uppercase(),
            path: path.clone(),
            summary: text(&operation["summary"]).trim_end_matches('.').to_owned(),
            path_parameters: of("path"),
            query: of("query"),
            headers: of("header").into_iter().map(|header| header.name.to_ascii_lowercase()).collect(),
            body,
            list,
        })
    }

    fn parameter(self, parameter: &Value) -> Input {
        Input {
            name: text(&parameter["name"]),
            help: first_sentence(&parameter["description"]),
            kind: self.kind(&parameter["schema"]),
            is_required: parameter["required"] == true,
        }
    }

    fn members(self, schema: &Value) -> Vec<Input> {
        let object = self.resolve(schema);
        let required =
            |name: &str| object["required"].as_array().is_some_and(|names| names.iter().any(|of| of == name));
        let members = object["properties"].as_object().into_iter().flatten();
        let member = |(name, schema): (&String, &Value)| Input {
            name: name.clone(),
            help: first_sentence(self.describing(schema)),
            kind: self.kind(schema),
            is_required: required(name),
        };
        members.map(member).collect()
    }

    /// A schema without references, and without null as an alternative.
    fn resolve<'b>(self, schema: &'b Value) -> &'b Value
    where
        'a: 'b,
    {
        let mut schema = schema;
        loop {
            if let Some(name) = schema["$ref"].as_str().and_then(|of| of.strip_prefix("#/components/schemas/")) {
                schema = &self.0["components"]["schemas"][name];
            } else if let Some([one, null]) = schema["oneOf"].as_array().map(Vec::as_slice)
                && null["type"] == "null"
            {
                schema = one;
            } else {
                return schema;
            }
        }
    }

    fn describing<'b>(self, schema: &'b Value) -> &'b Value
    where
        'a: 'b,
    {
        match schema["oneOf"].as_array().and_then(|all| all.first()) {
            _ if schema["description"].is_string() => &schema["description"],
            Some(one) if one["description"].is_string() => &one["description"],
            Some(one) => &self.resolve(one)["description"],
            None => &self.resolve(schema)["description"],
        }
    }

    fn kind(self, schema: &Value) -> Kind {
        let schema = self.resolve(schema);
        if let Some(choices) = schema["enum"].as_array() {
            return Kind::Choice(choices.iter().map(text).collect());
        }
        let is = |name: &str| {
            schema["type"] == name || schema["type"].as_array().is_some_and(|types| types.iter().any(|of| of == name))
        };
        if is("array") {
            let items = self.resolve(&schema["items"]);
            return if items["type"] == "string" { Kind::Texts } else { Kind::Json };
        }
        if is("string") {
            Kind::Text
        } else if is("integer") || is("number") {
            Kind::Number
        } else if is("boolean") {
            Kind::Flag
        } else {
            Kind::Json
        }
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// The first sentence of a description, without its full stop.
fn first_sentence(description: &Value) -> String {
    let all = text(description).replace('\n', " ");
    let end = all.find(". ").unwrap_or(all.len());
    all.get(..end).unwrap_or_default().trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn document() -> Value {
        json!({
            "paths": {"/v1/things/{id}": {"patch": {
                "operationId": "updateThing", "summary": "Change a thing.",
                "parameters": [
                    {"name": "id", "in": "path", "required": true, "description": "Its id.", "schema": {"type": "string"}},
                    {"name": "If-Match", "in": "header", "schema": {"type": "string"}},
                    {"name": "dry_run", "in": "query", "description": "Only check. Write nothing.", "schema": {"type": "boolean"}},
                ],
                "requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Body"}}}},
                "responses": {"200": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Page"}}}}},
            }}},
            "components": {"schemas": {
                "Body": {"required": ["name"], "properties": {
                    "name": {"type": "string", "description": "Its name."},
                    "cost": {"type": ["integer", "null"]},
                    "kind": {"oneOf": [{"$ref": "#/components/schemas/Kind"}, {"type": "null"}]},
                    "roles": {"type": ["array", "null"], "items": {"type": "string"}},
                    "quota": {"oneOf": [{"type": "object", "description": "Its quota."}, {"type": "null"}]},
                }},
                "Kind": {"type": "string", "enum": ["live", "test"], "description": "Its kind."},
                "Page": {"properties": {"next_cursor": {"type": ["string", "null"]}, "things": {"type": "array"}}},
            }},
        })
    }

    #[test]
    fn an_operation_has_parameters_a_body_and_a_page() {
        let document = document();
        let input = |name: &str, help: &str, kind: Kind, is_required: bool| Input {
            name: name.into(),
            help: help.into(),
            kind,
            is_required,
        };
        let expected = Operation {
            method: "PATCH".into(),
            path: "/v1/things/{id}".into(),
            summary: "Change a thing".into(),
            path_parameters: vec![input("id", "Its id", Kind::Text, true)],
            query: vec![input("dry_run", "Only check", Kind::Flag, false)],
            headers: vec!["if-match".into()],
            body: Some(vec![
                input("cost", "", Kind::Number, false),
                input("kind", "Its kind", Kind::Choice(vec!["live".into(), "test".into()]), false),
                input("name", "Its name", Kind::Text, true),
                input("quota", "Its quota", Kind::Json, false),
                input("roles", "", Kind::Texts, false),
            ]),
            list: Some("things".into()),
        };
        let mut found = Document(&document).operation("updateThing").unwrap();
        found.body.as_mut().unwrap().sort_by(|one, other| one.name.cmp(&other.name));
        assert_eq!(found, expected);
        assert_eq!(found.path_of("a b/c@d"), "/v1/things/a%20b%2Fc%40d");
        assert_eq!(Document(&document).operation("other"), None);
    }
}
