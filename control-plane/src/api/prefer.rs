//! `Prefer: wait=SECONDS` (RFC 7240): the response to a change comes once every live Envoy has the change, or when the time is over.

use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::App;
use crate::error::ApiError;
use crate::sync::filters;

const PREFER: HeaderName = HeaderName::from_static("prefer");
const APPLIED: HeaderName = HeaderName::from_static("preference-applied");

/// Longest wait, in seconds.
const LONGEST_S: u64 = 10;

/// Pauses between two looks at the state of the Envoys: the first one, and the longest.
const PAUSES: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(250)];

/// Holds the response to a change back until the Envoys have it, if the request asks for that.
pub async fn wait_for_envoys(State(app): State<App>, request: Request, next: Next) -> Response {
    if request.method().is_safe() {
        return next.run(request).await;
    }
    let wait_s = match wait_of(request.headers()) {
        Ok(wait_s) => wait_s,
        Err(error) => return error.into_response(),
    };
    let mut response = next.run(request).await;
    let Some(wait_s) = wait_s.filter(|_| response.status().is_success()) else { return response };
    let mut stopping = app.stopping.clone();
    let applied = tokio::select! {
        applied = tokio::time::timeout(Duration::from_secs(wait_s), applied_on_all(&app)) => applied,
        _ = stopping.wait_for(|stopping| *stopping) => return response,
    };
    match applied {
        Ok(Ok(())) => drop(
            HeaderValue::try_from(format!("wait={wait_s}")).map(|value| response.headers_mut().insert(APPLIED, value)),
        ),
        // The change is committed all the same.
        Ok(Err(error)) => tracing::warn!(%error, "could not read which Envoys have a change"),
        Err(_) => {}
    }
    response
}

/// The seconds of the preference `wait`. Other preferences are left alone.
fn wait_of(headers: &HeaderMap) -> Result<Option<u64>, ApiError> {
    let texts = headers.get_all(PREFER).iter().filter_map(|value| value.to_str().ok());
    let mut preferences = texts.flat_map(|text| text.split(',')).map(|preference| {
        let (preference, _parameters) = preference.split_once(';').unwrap_or((preference, ""));
        let (name, value) = preference.split_once('=').unwrap_or((preference, ""));
        (name.trim(), value.trim().trim_matches('"'))
    });
    let Some((_, value)) = preferences.find(|(name, _)| name.eq_ignore_ascii_case("wait")) else { return Ok(None) };
    let wait_s = value.parse().ok().filter(|seconds| (1..=LONGEST_S).contains(seconds));
    let detail = || ApiError::invalid("Prefer", format!("wait must be a number of seconds from 1 to {LONGEST_S}"));
    wait_s.map(Some).ok_or_else(detail)
}

/// Returns once all live Envoys have what is committed now.
async fn applied_on_all(app: &App) -> Result<(), sqlx::Error> {
    let revision = filters::position(&app.pool).await?.revision;
    let [mut pause, longest] = PAUSES;
    loop {
        // What the Envoys of this process said. Other replicas write theirs four times a second.
        app.filters.write(&app.pool).await?;
        let rollout = filters::rollout(&app.pool, revision).await?;
        if rollout.applied == rollout.filters {
            return Ok(());
        }
        tokio::time::sleep(pause).await;
        pause = longest.min(pause * 2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_is_found_among_other_preferences_and_bounded() {
        let wait = |texts: &[&'static str]| {
            let headers = texts.iter().map(|text| (PREFER, HeaderValue::from_static(text))).collect();
            wait_of(&headers)
        };
        assert_eq!(wait(&[]).unwrap(), None);
        assert_eq!(wait(&["respond-async"]).unwrap(), None);
        assert_eq!(wait(&["respond-async, Wait = 2", "wait=5"]).unwrap(), Some(2));
        assert_eq!(wait(&["return=minimal", "wait=\"10\"; x=y"]).unwrap(), Some(10));
        for bad in ["wait", "wait=0", "wait=11", "wait=2.5", "wait=-1"] {
            assert_eq!(wait(&[bad]).unwrap_err().field(), Some("Prefer"), "{bad}");
        }
    }
}
