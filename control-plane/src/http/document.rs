//! What all operations of the OpenAPI document have in common: the headers of their responses, and that an operation
//! without a key says so.

use std::collections::BTreeMap;

use utoipa::openapi::header::{Header, HeaderBuilder};
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::{Object, OpenApi, Ref, RefOr, Type};

use super::refusals;

const REQUEST_ID: &str = "x-request-id";
const RETRY_AFTER: &str = "retry-after";
const AUTHENTICATE: &str = "www-authenticate";

/// Completes the document that the handlers' attributes make.
pub(super) fn complete(openapi: OpenApi) -> OpenApi {
    let mut openapi = refusals::told_of_slow_bodies(openapi);
    for operation in openapi.paths.paths.values_mut().flat_map(operations) {
        // An empty list says that the operation needs no key; without a list the document would leave that open.
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
pub(super) fn operations(path: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
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
