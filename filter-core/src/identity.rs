//! The headers by which API gateways pass the identity of a caller to the upstream. An upstream that was once behind another
//! gateway may still trust its headers, so they are removed from requests of clients.

use crate::keys::StoredKey;

/// The whole identity in one header, as a dictionary of strings (RFC 9651, section 3.2):
/// `consumer="…", credential="…", scopes="orders:read orders:write"`. Without scopes the last member is absent.
///
/// Ids are UUIDs, and scopes have no characters that a string would have to escape.
#[must_use]
pub fn packed(key: &StoredKey) -> String {
    let StoredKey { owner_id, key_id, scopes, .. } = key;
    match scopes {
        Some(scopes) => format!("consumer=\"{owner_id}\", credential=\"{key_id}\", scopes=\"{scopes}\""),
        None => format!("consumer=\"{owner_id}\", credential=\"{key_id}\""),
    }
}

/// The default names of this filter's identity headers: consumer, credential, scopes.
pub const USUAL: [&str; 3] = ["x-consumer-id", "x-credential-identifier", "x-credential-scopes"];

/// The names that other gateways use. The configurations in `envoy/` remove them before any filter runs, which costs less than
/// in the filter. The filter removes them from trailers, and all headers that `remove_headers` names.
pub const FOREIGN: [&str; 16] = [
    // Kong and APISIX.
    "x-consumer-username",
    "x-consumer-custom-id",
    "x-consumer-groups",
    "x-anonymous-consumer",
    "x-credential-username",
    "x-authenticated-userid",
    "x-authenticated-user",
    "x-authenticated-email",
    "x-authenticated-scope",
    "x-authenticated-groups",
    // Their OpenID Connect plugins.
    "x-userinfo",
    // Google's Extensible Service Proxy and API Gateway.
    "x-endpoint-api-userinfo",
    "x-endpoint-api-consumer-number",
    "x-apigateway-api-userinfo",
    // RapidAPI.
    "x-rapidapi-user",
    "x-rapidapi-subscription",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SHADOW_HEADER;

    #[test]
    fn every_shipped_configuration_removes_identity_headers_of_clients_before_any_filter() {
        // Where cargo runs the test: the checkout may have been copied with its target directory.
        let package = std::env::var("CARGO_MANIFEST_DIR").unwrap();
        let folder = std::path::Path::new(&package).join("../envoy");
        let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
        let files: Vec<_> = files.filter(|file| file.extension().is_some_and(|kind| kind == "yaml")).collect();
        assert!(files.len() >= 2, "{files:?}");
        for file in files {
            let text = std::fs::read_to_string(&file).unwrap();
            let (_, rest) = text.split_once("early_header_mutation_extensions:").expect("early header mutation");
            let (_, list) = rest.split_once("mutations:\n").unwrap();
            let lines = list.lines().map(str::trim).filter(|line| !line.starts_with('#'));
            let removed = lines.map_while(|line| line.strip_prefix("- remove: "));
            let expected = USUAL.into_iter().chain([SHADOW_HEADER]).chain(FOREIGN);
            assert!(removed.eq(expected), "{}", file.display());
        }
    }

    #[test]
    fn names_are_in_lower_case_and_differ_from_those_of_the_filter() {
        for name in FOREIGN {
            assert_eq!(name, name.to_ascii_lowercase());
            assert!(!USUAL.contains(&name), "{name}");
        }
    }
}
