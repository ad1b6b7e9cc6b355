//! The refusals that routes have in common, for the OpenAPI document.

use std::collections::BTreeMap;

use utoipa::IntoResponses;
use utoipa::openapi::{ContentBuilder, OpenApi, Ref, RefOr, Response, ResponseBuilder};

/// Of every route that reads.
pub(super) struct Reading;

/// Of every route that takes a body.
pub(super) struct Writing;

impl IntoResponses for Reading {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        problems(&[
            ("400", "Something in the request is wrong"),
            ("401", "No good key presented"),
            ("403", "Not for this key"),
            ("429", "Too many calls"),
            ("503", "The database is away"),
        ])
    }
}

impl IntoResponses for Writing {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let mut all = Reading::responses();
        all.extend(problems(&[("413", "Body too large"), ("415", "Body not JSON")]));
        all
    }
}

/// Adds to every route that takes a body what the server itself answers, whichever route it is: see
/// [`super::patience::limit`]. A route that says more about it is left as it is.
pub(super) fn told_of_slow_bodies(mut openapi: OpenApi) -> OpenApi {
    let late = problems(&[("408", "The body did not come in time")]);
    for operation in openapi.paths.paths.values_mut().flat_map(super::document::operations) {
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
