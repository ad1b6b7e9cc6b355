//! What the operations of the OpenAPI document share: error responses, headers of responses, and that an operation without a
//! key says so.

use std::collections::BTreeMap;

use utoipa::IntoResponses;
use utoipa::openapi::header::{Header, HeaderBuilder};
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::{ContentBuilder, Object, OpenApi, Ref, RefOr, Response, ResponseBuilder, Type};

const REQUEST_ID: &str = "x-request-id";
const RETRY_AFTER: &str = "retry-after";
const AUTHENTICATE: &str = "www-authenticate";

/// Completes the document that the handlers' attributes make.
pub(super) fn complete(openapi: OpenApi) -> OpenApi {
    let mut openapi = add_request_timeout(openapi);
    for operation in openapi.paths.paths.values_mut().flat_map(operations) {
        // An empty list means that the operation needs no key. Without a list the document would leave it open.
        operation.security.get_or_insert_default();
        let idempotent = takes_idempotency_key(operation);
        for (status, response) in &mut operation.responses.responses {
            let RefOr::T(response) = response else { continue };
            let is_problem = response.content.contains_key("application/problem+json");
            let special = match status.as_str() {
                "401" => Some(AUTHENTICATE),
                "409" if idempotent => Some(RETRY_AFTER),
                "429" | "503" if is_problem => Some(RETRY_AFTER),
                _ => None,
            };
            for name in special.into_iter().chain([REQUEST_ID]) {
                let header = Ref::new(format!("#/components/headers/{name}"));
                response.headers.entry(name.to_owned()).or_insert(RefOr::Ref(header));
            }
        }
    }
    openapi.components.get_or_insert_default().headers.extend(headers());
    openapi
}

/// The operations of a path.
fn operations(path: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let PathItem { get, put, post, delete, patch, .. } = path;
    [get, put, post, delete, patch].into_iter().filter_map(Option::as_mut)
}

fn takes_idempotency_key(operation: &Operation) -> bool {
    let parameters = operation.parameters.iter().flatten();
    parameters
        .filter_map(|parameter| match parameter {
            RefOr::T(parameter) => Some(parameter),
            RefOr::Ref(_) => None,
        })
        .any(|parameter| parameter.name.eq_ignore_ascii_case("Idempotency-Key"))
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
    [
        (REQUEST_ID, header(Type::String, request_id, "0199f0a6-3b7c-7d52-9a3e-4f6d1c2b8e90".into())),
        (RETRY_AFTER, header(Type::Integer, retry_after, 1.into())),
        (AUTHENTICATE, header(Type::String, authenticate, "ApiKey realm=\"portcullis\"".into())),
    ]
    .map(|(name, header)| (name.to_owned(), header))
    .into()
}

/// The error responses of every route that takes a key.
pub(super) struct ReadErrors;

/// The error responses of every route that takes a key and a body.
pub(super) struct WriteErrors;

impl IntoResponses for ReadErrors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        problems(&[
            ("400", "The request is not valid"),
            ("401", "The key is missing or not valid"),
            ("403", "The key must not do this"),
            ("429", "Too many requests"),
            ("503", "The database is not available"),
        ])
    }
}

impl IntoResponses for WriteErrors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let mut all = ReadErrors::responses();
        all.extend(problems(&[("413", "Body too large"), ("415", "Body not JSON")]));
        all
    }
}

/// Adds 408 to every route that takes a body, see [`super::body_timeout`]. A route that describes it by itself is left alone.
fn add_request_timeout(mut openapi: OpenApi) -> OpenApi {
    let late = problems(&[("408", "The body did not arrive in time")]);
    for operation in openapi.paths.paths.values_mut().flat_map(operations) {
        if operation.request_body.is_some() {
            for (status, response) in &late {
                operation.responses.responses.entry(status.clone()).or_insert_with(|| response.clone());
            }
        }
    }
    openapi
}

fn problems(known: &[(&str, &str)]) -> BTreeMap<String, RefOr<Response>> {
    let problem = |description: &str| {
        let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build();
        ResponseBuilder::new().description(description).content("application/problem+json", content).build()
    };
    known.iter().map(|(status, description)| ((*status).to_owned(), RefOr::T(problem(description)))).collect()
}
