//! One request: header in, decision, reply or upstream. Never pauses and never calls out.

use std::rc::Rc;

use contract::outcome::Outcome;
use contract::record::Record;
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

use crate::config::Config;
use crate::core::{Core, Decided};
use crate::credential;
use crate::host;
use crate::reply::reply;

/// Filter state for the access log: the key's id, if the key is known, as `wasm.portcullis.key_id`.
const KEY_ID_STATE: &str = "portcullis.key_id";

/// Filter state for the access log: the outcome, if the request was refused, as `wasm.portcullis.refused`.
const REFUSED_STATE: &str = "portcullis.refused";

pub(crate) struct Request {
    pub(crate) core: Rc<Core>,
    pub(crate) config: Rc<Config>,
}

impl Context for Request {}

impl HttpContext for Request {
    fn on_http_request_headers(&mut self, _headers: usize, _end_of_stream: bool) -> Action {
        let config = &*self.config;
        let credential = credential::read(host::request_header(&config.key_header).as_deref());
        let Decided { outcome, record, refused } = self.core.decide(config, credential);
        if let Some(record) = &record {
            host::set_filter_state(KEY_ID_STATE, &record.key_id.to_string());
        }
        let refused = refused.as_ref().map(|(limit, refused)| (limit, *refused));
        if let Some(reply) = reply(outcome, &config.challenge, refused) {
            host::set_filter_state(REFUSED_STATE, outcome.name());
            host::send_reply(&reply);
            return Action::Pause;
        }
        let record = record.filter(|_| outcome == Outcome::Allowed);
        tell_upstream(config, record.as_ref());
        Action::Continue
    }
}

/// Sets the identity headers in place of whatever the client sent under their names, and removes the key. Refused
/// requests go nowhere, so only here can a client's headers reach the upstream.
fn tell_upstream(config: &Config, record: Option<&Record>) {
    let identity = &config.identity;
    let scopes = record.map(|record| record.scopes.join(" ")).filter(|scopes| !scopes.is_empty());
    let headers = [
        (&identity.consumer, record.map(|record| record.owner_id.to_string())),
        (&identity.credential, record.map(|record| record.key_id.to_string())),
        (&identity.scopes, scopes),
    ];
    for (name, value) in headers {
        match (name, value) {
            (Some(name), Some(value)) => host::replace_request_header(name, &value),
            (Some(name), None) => host::remove_request_header(name),
            (None, _) => {}
        }
    }
    for name in &identity.unused {
        host::remove_request_header(name);
    }
    if config.strip_key {
        host::remove_request_header(&config.key_header);
    }
}
