//! Resources that files declare, for `portcullis diff`, `apply`, `dump` and `validate`: parsed by the types of the REST API, so
//! that a file is valid if the control plane takes it.

use contract::json::read_value;
use portcullis_cli::declarative::{Content, Invalid, Normalized, Resource};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::plans::PlanBody;
use super::roles::RoleBody;
use crate::credits::Refill;
use crate::definitions::Name;
use crate::definitions::policy::PolicyBody;
use crate::domain::{Email, Patch};
use crate::error::ApiError;

/// What files say of a user. Members that are not given keep their values, as in `PATCH /v1/users/{id}`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DeclaredUser {
    #[serde(default)]
    plan: Patch<String>,
    #[serde(default)]
    refill: Patch<Refill>,
}

/// Parses a resource as the handlers of the REST API do, and shows it as they do.
pub fn normalize(resource: Resource, name: &str, value: &Value) -> Result<Normalized, Invalid> {
    if resource == Resource::User {
        // The address is the name of the resource, and no field of it.
        let email = Email::parse(name).map_err(|error| Invalid { field: String::new(), ..invalid(error) })?;
        let content = read::<DeclaredUser>(value)?.content().map_err(invalid)?;
        return Ok(Normalized { name: email.as_str().to_owned(), content });
    }
    let parsed = Name::parse("name", name).map_err(|error| Invalid { field: String::new(), ..invalid(error) })?;
    let content = match resource {
        Resource::Role => members(read::<RoleBody>(value)?.normalize()),
        Resource::Plan => members(read::<PlanBody>(value)?.normalize()),
        Resource::Policy => members(read::<PolicyBody>(value)?.normalize(&parsed)),
        Resource::User => Ok(Content::new()),
    };
    Ok(Normalized { name: name.to_owned(), content: content.map_err(invalid)? })
}

impl DeclaredUser {
    fn content(self) -> Result<Content, ApiError> {
        let plan = self.plan.try_map(|name| Name::parse("plan", &name).map(|_| name))?;
        let refill = self.refill.try_map(|refill| refill.check().map(|()| refill))?;
        let mut content = Content::new();
        if let Some(plan) = plan.given() {
            content.insert("plan".into(), plan.into());
        }
        if let Some(refill) = refill.given() {
            content.insert("refill".into(), json(&refill)?);
        }
        Ok(content)
    }
}

fn read<T: DeserializeOwned>(value: &Value) -> Result<T, Invalid> {
    read_value(value).map_err(|error| Invalid { field: error.path, detail: error.detail })
}

fn members(body: Result<impl Serialize, ApiError>) -> Result<Content, ApiError> {
    match json(&body?)? {
        Value::Object(content) => Ok(content),
        other => Err(ApiError::Internal(format!("not an object: {other}"))),
    }
}

fn json(value: &impl Serialize) -> Result<Value, ApiError> {
    serde_json::to_value(value).map_err(|error| ApiError::Internal(error.to_string()))
}

fn invalid(error: ApiError) -> Invalid {
    match error {
        ApiError::Invalid { field, detail } => Invalid { field: field.unwrap_or_default().into(), detail },
        other => Invalid { field: String::new(), detail: other.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_resource_has_all_defaults_and_stays_the_same_when_it_is_normalised_again() {
        let limit = json!({"name": "minute", "requests": 5, "window_seconds": 60});
        let full = json!({"name": "minute", "requests": 5, "window_seconds": 60, "burst": 5, "shared": true});
        for (resource, name, given, expected) in [
            (Resource::Role, "support", json!({}), json!({"description": "", "scopes": []})),
            (
                Resource::Plan,
                "gold",
                json!({"description": " a ", "scopes": ["x", "x"], "rate_limits": [limit], "quota": {"requests": 1, "period": "day"}}),
                json!({
                    "description": "a", "scopes": ["x"], "rate_limits": [full],
                    "quota": {"requests": 1, "period": "day", "time_zone": "UTC"},
                }),
            ),
            (
                Resource::Policy,
                "reports",
                json!({"scopes": {"any": ["a"]}, "match": [{"path": {"prefix": "/a"}}]}),
                json!({
                    "description": "", "key": "required", "kinds": null, "scopes": {"any": ["a"]}, "cost": null,
                    "rate_limits": [], "shadow": false, "capture_unknown": false, "from_annotation": true,
                    "match": [{"path": {"prefix": "/a"}}],
                }),
            ),
            (Resource::User, "Ada@Example.com", json!({}), json!({})),
            (
                Resource::User,
                "ada@example.com",
                json!({"plan": null, "refill": {"amount": 5, "period": "month"}}),
                json!({"plan": null, "refill": {"amount": 5, "period": "month", "time_zone": "UTC"}}),
            ),
        ] {
            let normalized = normalize(resource, name, &given).unwrap();
            assert_eq!(Value::Object(normalized.content.clone()), expected);
            assert_eq!(normalized.name, name.to_lowercase());
            assert_eq!(normalize(resource, name, &expected).unwrap().content, normalized.content);
        }
    }

    #[test]
    fn what_the_rest_api_refuses_is_refused_with_its_field() {
        for (resource, name, given, field, detail) in [
            (Resource::Role, "Support", json!({}), "", "each name must have 1 to 64 characters"),
            (Resource::Role, "a", json!({"scopes": ["admin"]}), "scopes", "must not contain admin"),
            (
                Resource::Role,
                "a",
                json!({"quota": null}),
                "quota",
                "is not a known field; the fields are `description`",
            ),
            (Resource::Role, "a", json!([]), "", "must be an object"),
            (Resource::Plan, "a", json!({"rate_limits": [{"name": "m"}]}), "rate_limits[0].requests", "is missing"),
            (
                Resource::Plan,
                "a",
                json!({"quota": {"requests": 1, "period": "rolling"}}),
                "quota",
                "a rolling quota needs",
            ),
            (Resource::Policy, "a", json!({"match": [{"path": {"prefix": "a"}}]}), "match[0].path", ""),
            (Resource::User, "ada", json!({}), "", "must be an email address"),
            (
                Resource::User,
                "a@x.org",
                json!({"metered": true}),
                "metered",
                "is not a known field; the fields are `plan`",
            ),
            (Resource::User, "a@x.org", json!({"plan": "Gold"}), "plan", "each name must have"),
            (Resource::User, "a@x.org", json!({"refill": {"amount": 0, "period": "day"}}), "refill", "amount must be"),
        ] {
            let error = normalize(resource, name, &given).unwrap_err();
            assert!(error.field == field && error.detail.starts_with(detail), "{given}: {error:?}");
        }
    }
}
