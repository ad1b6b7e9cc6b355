//! What the operations of the OpenAPI document share: parameters, error responses, headers of responses, and that an operation
//! without a key says so.

use std::collections::BTreeMap;

use utoipa::openapi::header::{Header, HeaderBuilder};
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::security::SecurityRequirement;
use utoipa::openapi::{ContentBuilder, Deprecated, Object, OpenApi, Ref, RefOr, Response, ResponseBuilder, Type};
use utoipa::{IntoParams, IntoResponses};

const LINK: &str = "link";
const REQUEST_ID: &str = "x-request-id";
const RETRY_AFTER: &str = "retry-after";
const AUTHENTICATE: &str = "www-authenticate";
const ETAG: &str = "etag";
const LOCATION: &str = "location";

/// The tag of routes that need no key.
const PLATFORM: &str = "platform";

/// Schemas of resources with a version, which their responses have as the ETag.
const VERSIONED: [&str; 8] =
    ["CreateReply", "KeyDetails", "KeyView", "PlanView", "PolicyDetails", "PolicyView", "RoleView", "UserView"];

/// Refusals that a call with a key can meet at every route.
const REFUSALS: [(&str, &str); 5] = [
    ("400", "The request is not valid"),
    ("401", "The key is missing or not accepted"),
    ("403", "The key is not permitted to do this"),
    ("429", "Too many requests, or a bound of one owner is reached"),
    ("503", "The database is not available"),
];

/// The request is for a version.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[allow(dead_code, reason = "for the document; `Preconditions` reads the headers")]
pub(super) struct IfMatch {
    /// The ETag that the change is meant for, or `*`: the resource must exist.
    #[param(rename = "If-Match", required = false)]
    if_match: Option<String>,
}

/// The request is for a version, or for a resource that does not exist.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[allow(dead_code, reason = "for the document; `Preconditions` reads the headers")]
pub(super) struct Conditions {
    /// The ETag that the change is meant for, or `*`: the resource must exist.
    #[param(rename = "If-Match", required = false)]
    if_match: Option<String>,
    /// `*`: the resource must not exist.
    #[param(rename = "If-None-Match", required = false)]
    if_none_match: Option<String>,
}

/// The request can be sent again.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[allow(dead_code, reason = "for the document; `IdempotentRequest` reads the header")]
pub(super) struct IdempotencyKey {
    /// A unique name of the request, so that it can be sent again safely.
    #[param(rename = "Idempotency-Key", required = false)]
    idempotency_key: Option<String>,
}

/// Of a route whose change can contradict what exists.
pub(super) struct Conflict;

/// Of a route that looks for something that its path does not name. Those with an id in the path have it without this.
pub(super) struct NotFound;

impl IntoResponses for Conflict {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let running = "or the first request with the same Idempotency-Key is still running";
        problems(&[("409", &format!("The change contradicts what exists, as `detail` says, {running}"))])
    }
}

impl IntoResponses for NotFound {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        problems(&[("404", "There is no such resource")])
    }
}

fn problems(known: &[(&str, &str)]) -> BTreeMap<String, RefOr<Response>> {
    let problem = |description: &str| {
        let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build();
        ResponseBuilder::new().description(description).content("application/problem+json", content).build()
    };
    known.iter().map(|(status, description)| ((*status).to_owned(), RefOr::T(problem(description)))).collect()
}

/// Completes the document that the handlers' attributes make.
pub(super) fn complete(mut openapi: OpenApi) -> OpenApi {
    for (path, item) in &mut openapi.paths.paths {
        let (is_legacy, names_resource) = (path.starts_with("/api/user/"), path.contains('{'));
        let PathItem { get, put, post, delete, patch, .. } = item;
        for (method, operation) in [("get", get), ("put", put), ("post", post), ("delete", delete), ("patch", patch)] {
            let Some(operation) = operation else { continue };
            if is_legacy {
                operation.deprecated = Some(Deprecated::True);
            } else if names_resource && method != "put" {
                // PUT creates what its path names.
                add(operation, NotFound::responses());
            }
            complete_operation(operation, method == "post");
        }
    }
    openapi.components.get_or_insert_default().headers.extend(headers());
    openapi
}

/// Adds the key that the operation needs, responses that follow from what it takes, and the headers of all responses.
fn complete_operation(operation: &mut Operation, creates: bool) {
    if operation.tags.iter().flatten().any(|tag| tag == PLATFORM) {
        // An empty list means that the operation needs no key. Without a list the document would leave it open.
        operation.security = Some(Vec::new());
    } else {
        operation.security = Some(vec![SecurityRequirement::new("api_key", [""; 0])]);
        add(operation, problems(&REFUSALS));
    }
    if let Some(body) = operation.request_body.as_ref().and_then(here) {
        let is_json = body.content.contains_key("application/json");
        // See `super::body_timeout`.
        add(operation, problems(&[("408", "The body did not arrive in time")]));
        if is_json {
            add(operation, problems(&[("413", "Body too large"), ("415", "Body not JSON")]));
        }
    }
    if takes(operation, "If-Match") {
        add(operation, problems(&[("412", "The resource is not what If-Match or If-None-Match asks for")]));
    }
    let is_idempotent = takes(operation, "Idempotency-Key");
    if is_idempotent {
        add(operation, problems(&[("422", "Another request used this Idempotency-Key")]));
    }
    let is_list = takes(operation, "cursor");
    for (status, response) in &mut operation.responses.responses {
        let RefOr::T(response) = response else { continue };
        let is_problem = response.content.contains_key("application/problem+json");
        let special = match status.as_str() {
            "200" if is_list => Some(LINK),
            "401" => Some(AUTHENTICATE),
            "409" if is_idempotent => Some(RETRY_AFTER),
            "429" | "503" if is_problem => Some(RETRY_AFTER),
            _ => None,
        };
        let version = has_version(response).then_some(ETAG);
        let location = version.filter(|_| creates).map(|_| LOCATION);
        for name in [special, version, location, Some(REQUEST_ID)].into_iter().flatten() {
            let header = Ref::new(format!("#/components/headers/{name}"));
            response.headers.entry(name.to_owned()).or_insert(RefOr::Ref(header));
        }
    }
}

fn has_version(response: &Response) -> bool {
    let content = response.content.get("application/json").and_then(here);
    match content.and_then(|content| content.schema.as_ref()) {
        Some(RefOr::Ref(schema)) => VERSIONED.iter().any(|name| schema.ref_location.ends_with(&format!("/{name}"))),
        _ => false,
    }
}

/// Adds responses. One that the operation describes itself is left alone.
fn add(operation: &mut Operation, responses: BTreeMap<String, RefOr<Response>>) {
    for (status, response) in responses {
        operation.responses.responses.entry(status).or_insert(response);
    }
}

fn takes(operation: &Operation, name: &str) -> bool {
    let parameters = operation.parameters.iter().flatten().filter_map(here);
    parameters.into_iter().any(|parameter| parameter.name.eq_ignore_ascii_case(name))
}

/// What stands here, rather than among the components.
const fn here<T>(of: &RefOr<T>) -> Option<&T> {
    match of {
        RefOr::T(of) => Some(of),
        RefOr::Ref(_) => None,
    }
}

fn headers() -> BTreeMap<String, RefOr<Header>> {
    let header = |kind: Type, description: &str, example: serde_json::Value| {
        let header = HeaderBuilder::new().schema(Some(Object::with_type(kind)));
        RefOr::T(header.description(Some(description)).example(Some(example)).build())
    };
    let request_id = "The id of the request, as it stands in the log and in the audit trail.";
    let retry_after = "After how many seconds the request can be sent again. A 409 carries it only while the first \
                       request with the same Idempotency-Key is still running.";
    let authenticate = "How to present a key.";
    let link = "The next page, if there is one (RFC 8288).";
    let etag = "The version of the resource, for If-Match.";
    let location = "Where to find the resource.";
    let next = "</v1/keys?cursor=IjAxOTlmMGE2Ig&limit=100>; rel=\"next\"";
    [
        (LINK, header(Type::String, link, next.into())),
        (REQUEST_ID, header(Type::String, request_id, "0199f0a6-3b7c-7d52-9a3e-4f6d1c2b8e90".into())),
        (RETRY_AFTER, header(Type::Integer, retry_after, 1.into())),
        (AUTHENTICATE, header(Type::String, authenticate, "ApiKey realm=\"portcullis\"".into())),
        (ETAG, header(Type::String, etag, "\"7\"".into())),
        (LOCATION, header(Type::String, location, "/v1/keys/0199f0a6-3b7c-7d52-9a3e-4f6d1c2b8e90".into())),
    ]
    .map(|(name, header)| (name.to_owned(), header))
    .into()
}
