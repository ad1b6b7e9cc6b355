//! The key that a request presents in the header `X-API-Key`. The control plane decides by the same function as the filter.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use axum::extract::ConnectInfo;
use axum::http::request::Parts;
use contract::decision::{Facts, Presented, decide};
use contract::definition::{Definition, Definitions};
use contract::hash::KeyHash;
use contract::key::PRESENTED_BYTES;
use contract::outcome::Outcome;
use contract::pepper::hashes;
use contract::policy::Policy;
use contract::record::Record;
use time::OffsetDateTime;

use crate::App;
use crate::error::ApiError;
use crate::keys::model::StoredKey;
use crate::keys::read::find_by_secret;
use crate::net::connection::Peer;

/// The header that carries the key of the caller. Of several, the first counts, as in Envoy.
pub const KEY_HEADER: &str = "x-api-key";

/// How long a key that the mirror does not admit waits for the mirror to be brought up to date.
const CATCH_UP: Duration = Duration::from_secs(3);

/// The key that a request presents, and the address to limit if it is refused.
pub(super) struct PresentedKey<'a> {
    app: &'a App,
    pub(super) bytes: &'a [u8],
    address: IpAddr,
    /// None if what is presented cannot be a key.
    plain: Option<KeyHash>,
    /// The record of the key in the mirror.
    pub(super) mirrored: Option<Record>,
    /// Whether the call has counted against the address.
    is_counted: bool,
}

impl<'a> PresentedKey<'a> {
    /// Finds the key of a request in the mirror and counts the call against its address unless the mirror admits the key.
    pub(super) async fn find(app: &'a App, parts: &'a Parts, policy: &Policy) -> Result<Self, ApiError> {
        if app.store.position().is_none() {
            return Err(ApiError::Unavailable("The key store is not loaded yet. Try again shortly."));
        }
        let mut presented = Self::read(app, parts);
        presented.count_unless_admitted(policy).await?;
        Ok(presented)
    }

    /// Counts a call against its address unless the mirror admits its key. This happens before the database is asked, so
    /// guesses cost the database no more than the limit.
    ///
    /// Beyond the limit the mirror is brought up to date first, once for all calls that wait. So a key that was created or
    /// enabled a moment ago does not pay for guesses from its address.
    pub(super) async fn count_unless_admitted(&mut self, policy: &Policy) -> Result<(), ApiError> {
        if self.admitted(policy).is_some() {
            return Ok(());
        }
        let Err(too_many) = self.count_refused() else { return Ok(()) };
        if self.plain.is_some() {
            let _ = tokio::time::timeout(CATCH_UP, self.app.feed.catch_up()).await;
            self.mirrored = self.lookup();
        }
        if self.admitted(policy).is_some() { Ok(()) } else { Err(too_many) }
    }

    pub(super) fn read(app: &'a App, parts: &'a Parts) -> Self {
        let bytes = parts.headers.get(KEY_HEADER).map_or(&[][..], |value| value.as_bytes());
        let plain = (1..=PRESENTED_BYTES).contains(&bytes.len()).then(|| KeyHash::of(bytes));
        let mut presented = Self { app, bytes, address: peer(parts), plain, mirrored: None, is_counted: false };
        presented.mirrored = presented.lookup();
        presented
    }

    /// The record of the key in the mirror now.
    fn lookup(&self) -> Option<Record> {
        hashes(self.plain?, self.app.pepper.as_ref()).find_map(|hash| self.app.store.find(&hash))
    }

    /// The record of the key in the mirror, if it admits the key.
    pub(super) fn admitted(&self, policy: &Policy) -> Option<&Record> {
        self.mirrored.as_ref().filter(|record| self.decide(Some(record), policy) == Outcome::Allowed)
    }

    /// The record of the key in the database.
    pub(super) async fn stored(&self) -> Result<Option<StoredKey>, ApiError> {
        match self.plain {
            Some(plain) => find_by_secret(&self.app.pool, plain, self.app.pepper.as_ref()).await,
            None => Ok(None),
        }
    }

    /// Counts the call against its address, once.
    fn count_refused(&mut self) -> Result<(), ApiError> {
        if !self.is_counted {
            self.is_counted = true;
            self.app.rate_limiter.count_address(self.address)?;
        }
        Ok(())
    }

    /// Admits the key or refuses it. A refusal counts against the address, once.
    pub(super) fn admit(mut self, record: Option<Record>, policy: &Policy) -> Result<Record, ApiError> {
        match (self.decide(record.as_ref(), policy), record) {
            (Outcome::Allowed, Some(record)) => Ok(record),
            (outcome, _) => {
                self.count_refused()?;
                Err(ApiError::Refused(outcome))
            }
        }
    }

    /// Decides as the filter does.
    /// Quota and credits are for the services behind Envoy: callers that have used them up still manage their keys.
    fn decide(&self, record: Option<&Record>, policy: &Policy) -> Outcome {
        let presented = match record {
            Some(record) => Presented::Key(record),
            None if self.bytes.is_empty() => Presented::Missing,
            None => Presented::Unknown,
        };
        let now_s = u64::try_from(OffsetDateTime::now_utc().unix_timestamp()).unwrap_or_default();
        // Scopes of roles and plans do not apply to the control plane. An empty definition stands for the plan, so that the
        // decision needs no mirror.
        let plan = record.and_then(|record| record.plan);
        let definitions = Definitions::new(plan.map(|number| (number, Definition::default())).into_iter().collect());
        let facts = Facts {
            policy,
            definitions: &definitions,
            address: Some(self.address),
            metered: false,
            ..Facts::at(now_s)
        };
        decide(presented, &facts)
    }
}

/// The address of the caller; the unspecified address where the server does not know it.
pub(super) fn peer(parts: &Parts) -> IpAddr {
    let peer = parts.extensions.get::<ConnectInfo<Peer>>().map(|info| info.0.0.ip().to_canonical());
    peer.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_address_is_that_of_ipv4() {
        let (mut parts, ()) = axum::http::Request::new(()).into_parts();
        parts.extensions.insert(ConnectInfo(Peer("[::ffff:192.0.2.1]:1".parse().unwrap())));
        assert_eq!(peer(&parts), "192.0.2.1".parse::<IpAddr>().unwrap());
    }
}
