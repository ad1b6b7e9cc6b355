//! One request: headers in, decision, reply or upstream. Never pauses and never calls out.

use std::rc::Rc;

use contract::outcome::Outcome;
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

use crate::core::Core;
use crate::host;
use filter_core::config::{Config, SHADOW_HEADER};
use filter_core::cookie;
use filter_core::credential::{self, Found};
use filter_core::judge::Verdict;
use filter_core::reply::{RequestFacts, is_grpc, reply, request_id};
use filter_core::source::{Left, Source};

/// Filter state for the access log: the key's id, if the key is known, as `wasm.portcullis.key_id`.
const KEY_ID_STATE: &str = "portcullis.key_id";

/// Filter state for the access log: the outcome, if the request was refused, as `wasm.portcullis.refused`.
const REFUSED_STATE: &str = "portcullis.refused";

/// The same, if it would have been refused, as `wasm.portcullis.shadow`.
const SHADOW_STATE: &str = "portcullis.shadow";

/// The header by which Envoy tells requests apart in its access log.
const REQUEST_ID: &str = "x-request-id";

pub(crate) struct Request {
    pub(crate) core: Rc<Core>,
    pub(crate) config: Rc<Config>,
}

impl Context for Request {}

impl HttpContext for Request {
    fn on_http_request_headers(&mut self, _headers: usize, _end_of_stream: bool) -> Action {
        #[cfg(feature = "trap")]
        crate::trap::spring();
        let config = &*self.config;
        let found = credential::find(&config.key_sources, value_of);
        let verdict = self.core.decide(config, found.credential);
        if let Some(known) = verdict.key.as_ref().filter(|_| config.access_log_state) {
            host::set_filter_state(KEY_ID_STATE, &known.key);
        }
        let outcome = verdict.outcome;
        if !verdict.shadowed
            && let Some(reply) = reply(outcome, &config.challenge, &verdict.wait, request_facts)
        {
            if config.access_log_state {
                host::set_filter_state(REFUSED_STATE, outcome.name());
            }
            conceal(config);
            host::send_reply(&reply);
            return Action::Pause;
        }
        tell_upstream(config, &verdict);
        if config.strip_key {
            strip(config, &found);
        }
        Action::Continue
    }

    /// Envoy calls this only for requests that have trailers; others pay nothing for it.
    fn on_http_request_trailers(&mut self, _trailers: usize) -> Action {
        for name in &self.config.trailers_removed {
            host::remove_request_trailer(name);
        }
        Action::Continue
    }
}

/// The value of the header that a source stands in. All lines of it where lines have other uses than the key; of other
/// headers the first line counts, and they are removed with all their lines.
fn value_of(source: &Source) -> Option<Vec<u8>> {
    match source {
        Source::Header(_) | Source::Query(_) => host::request_header(source.header()),
        Source::Bearer(_) => host::request_header_lines(source.header()),
        Source::Cookie(_) => {
            let joined = host::request_header_lines(source.header())?;
            // Without a comma there is only one line. With one there may be, and the first line has to be known.
            if !joined.contains(&b',') {
                return Some(joined);
            }
            Some(cookie::merged(&host::request_header(source.header()).unwrap_or_default(), &joined))
        }
    }
}

/// What the reply to a refused request needs to know of it.
fn request_facts(status: u16) -> RequestFacts {
    RequestFacts {
        id: host::request_header(REQUEST_ID).as_deref().and_then(request_id),
        is_grpc: status == 429 && host::request_header("content-type").as_deref().is_some_and(is_grpc),
    }
}

/// Removes what stands in a key's place from the path and the cookies of a refused request, since access logs show those.
fn conceal(config: &Config) {
    for source in &config.key_sources {
        if let Source::Query(_) | Source::Cookie(_) = source
            && let Some(value) = value_of(source)
        {
            cut(source, &value);
        }
    }
}

/// Sets the headers for the upstream in place of whatever the client sent under their names. Refused requests go nowhere,
/// so only here can a client's headers reach the upstream.
fn tell_upstream(config: &Config, verdict: &Verdict) {
    let identity = &config.identity;
    let known = verdict.key.as_ref().filter(|_| verdict.outcome == Outcome::Allowed);
    let headers = [
        (&identity.consumer, known.map(|known| &*known.owner)),
        (&identity.credential, known.map(|known| &*known.key)),
        (&identity.scopes, known.and_then(|known| known.scopes.as_deref())),
    ];
    for (name, value) in headers {
        match (name, value) {
            (Some(name), Some(value)) => host::replace_request_header(name, value),
            (Some(name), None) => host::remove_request_header(name),
            (None, _) => {}
        }
    }
    for name in &identity.unused {
        host::remove_request_header(name);
    }
    if verdict.shadowed {
        if config.access_log_state {
            host::set_filter_state(SHADOW_STATE, verdict.outcome.name());
        }
        host::replace_request_header(SHADOW_HEADER, verdict.outcome.name());
    } else {
        host::remove_request_header(SHADOW_HEADER);
    }
    for name in &config.remove_headers {
        host::remove_request_header(name);
    }
}

/// Removes the key from where it stood, and from every other place where it stands as well. Headers that have no other use
/// are removed in any case. Only where several places are configured are others looked at.
fn strip(config: &Config, found: &Found<'_>) {
    for source in &config.key_sources {
        if let Source::Header(name) = source {
            host::remove_request_header(name);
        }
    }
    let Some((place, value)) = &found.at else { return };
    if !matches!(place, Source::Header(_)) {
        cut(place, value);
    }
    let Some(key) = place.find(value) else { return };
    for other in &config.key_sources {
        if other == *place || matches!(other, Source::Header(_)) {
            continue;
        }
        // Read anew: what was cut may have stood in the same header.
        let Some(value) = value_of(other) else { continue };
        if other.holds(&value, &key) {
            cut(other, &value);
        }
    }
}

/// Leaves of a header what is no key.
fn cut(source: &Source, value: &[u8]) {
    match source.without(value) {
        Left::Nothing => host::remove_request_header(source.header()),
        Left::Value(left) if left == value => {}
        Left::Value(left) => host::replace_request_header_bytes(source.header(), &left),
    }
}
