//! What the filter needs from its host, as small traits. A shell implements them for one host; everything else in this
//! crate is the same for every host.
//!
//! Calls that return data are marked: through proxy-wasm they cost several times as much as the others.

use std::net::IpAddr;
use std::time::Duration;

use crate::shared::Cells;

/// Everything that a host offers outside of a request. Copies of a host are handles of the same host.
pub trait Host: Cells + Clock + Random + Log + Stats + Cluster + Wake + Clone {}

impl<T: Cells + Clock + Random + Log + Stats + Cluster + Wake + Clone> Host for T {}

/// The wall clock.
pub trait Clock {
    /// Nanoseconds of Unix time.
    fn now_ns(&self) -> u64;
}

/// The randomness of the operating system.
pub trait Random {
    /// Fills `bytes`. Returns whether it could; if not, `bytes` is as it was.
    fn fill(&self, bytes: &mut [u8]) -> bool;
}

/// `N` random bytes; `None` if the system has no randomness.
pub fn random_bytes<const N: usize>(random: &impl Random) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    random.fill(&mut bytes).then_some(bytes)
}

/// The log of the host.
pub trait Log {
    /// Logs at level info.
    fn info(&self, message: &str);

    /// Logs at level warning.
    fn warn(&self, message: &str);

    /// Logs at level error.
    fn error(&self, message: &str);
}

/// The host's number for a counter or gauge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MetricId(pub u32);

/// The statistics of the host: one value of each name for the whole process.
pub trait Stats {
    /// Defines a counter; `None` if the host refuses.
    fn define_counter(&self, name: &str) -> Option<MetricId>;

    /// Defines a gauge; `None` if the host refuses.
    fn define_gauge(&self, name: &str) -> Option<MetricId>;

    /// Adds to a counter or gauge.
    fn add(&self, metric: MetricId, more: u64);

    /// Sets a gauge.
    fn set(&self, metric: MetricId, value: u64);

    /// The value of a metric; 0 if the host is configured not to keep it.
    fn value(&self, metric: MetricId) -> u64;
}

/// A call to a cluster of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call<'a> {
    /// The name of the cluster.
    pub cluster: &'a str,
    /// Pseudo-headers and headers.
    pub headers: Vec<(&'static str, &'a str)>,
    /// The body, if the call has one.
    pub body: Option<&'a [u8]>,
    /// After this time the host gives up and reports a failure.
    pub timeout: Duration,
}

/// Calls to clusters.
pub trait Cluster {
    /// Sends a call. The response comes later, with the token that this returns. `None` if the host has no such cluster.
    fn dispatch(&self, call: &Call<'_>) -> Option<u32>;
}

/// Calls from outside of a request. A call that is sent while a request is handled belongs to that request, and is dropped
/// when the client leaves.
pub trait Wake {
    /// Makes the host call [`Filter::on_wake`](crate::filter::Filter::on_wake) soon, outside of the present request.
    fn wake(&self);
}

/// The response to a call.
pub trait CallResponse {
    /// The status; `None` if the call failed without a response (returns data).
    fn status(&self) -> Option<u16>;

    /// A header, if it is a number (returns data).
    fn number(&self, header: &str) -> Option<u64>;

    /// The body (returns data).
    fn body(&self) -> Vec<u8>;
}

/// Where the host may have the name of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyPlace<'a> {
    /// The field `policy` in the route's metadata for Portcullis.
    Route,
    /// The same of its virtual host.
    VirtualHost,
    /// This annotation of the resource that the route was made of.
    Annotation(&'a str),
    /// The name of the route, which every route may have.
    RouteName,
}

/// One request while its headers or trailers are processed.
pub trait Stream {
    /// The value of the first header of this name (returns data). Any bytes.
    fn header(&self, name: &str) -> Option<Vec<u8>>;

    /// The values of all headers of this name, joined by commas in their order; `None` if there are none or all are empty
    /// (returns data). A host that cannot join them returns the first.
    fn header_lines(&self, name: &str) -> Option<Vec<u8>>;

    /// The policy that is named in this place, if one is (returns data). Metadata of another shape, or a host that does not
    /// answer, counts as an empty name, which no policy has.
    fn named_policy(&self, place: PolicyPlace<'_>) -> Option<String>;

    /// The address of the client, as far as the host trusts it (returns data).
    fn client_address(&self) -> Option<IpAddr>;

    /// Sets a header in place of all headers of this name.
    fn set_header(&mut self, name: &str, value: &[u8]);

    /// Removes all headers of this name.
    fn remove_header(&mut self, name: &str);

    /// Removes all trailers of this name.
    fn remove_trailer(&mut self, name: &str);

    /// Sets filter state, for the access log.
    fn set_filter_state(&mut self, name: &str, value: &str);

    /// Answers the request in place of the upstream.
    fn send_reply(&mut self, reply: &Reply);

    /// Lets a request go on that was held with [`Flow::Wait`].
    fn resume(&mut self);
}

/// A reply in place of the upstream's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// The headers, besides those that Envoy adds.
    pub headers: Vec<(&'static str, String)>,
    /// The body: a problem.
    pub body: String,
}

/// What the host does with a request next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// It goes on to the next filter and to the upstream.
    Continue,
    /// It ends here: the filter has answered it.
    Stop,
    /// It is held until [`Stream::resume`], or until it is answered.
    Wait,
}

/// What the host gives the filter at its start.
pub trait Environment {
    /// The plugin configuration (returns data).
    fn configuration(&self) -> Vec<u8>;

    /// An environment variable that the host passes on.
    fn variable(&self, name: &str) -> Option<String>;

    /// Whether the filter may read properties, such as the metadata of a route: the host may restrict it (returns data).
    fn may_read_properties(&self) -> bool;
}
