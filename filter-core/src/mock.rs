//! A host in memory, for tests: it behaves as Envoy does, records all calls, and fails where a test asks for it.

use std::cell::{Cell as Slot, RefCell};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use crate::host::{
    Call, CallResponse, Clock, Cluster, Environment, Log, MetricId, PolicyPlace, Random, Reply, Stats, Stream, Wake,
};
use crate::shared::{Cell, Cells, Conflict, SharedData};

/// The cells of one store on a mock host.
pub(crate) type TestData = SharedData<MockHost>;

/// Cells on a new host.
pub(crate) fn new_data() -> TestData {
    SharedData::new(MockHost::default(), "cluster", "default")
}

/// A host. Copies are handles of the same host, as the VMs of one Envoy have them.
#[derive(Clone, Debug, Default)]
pub(crate) struct MockHost(Rc<State>);

/// A part of a cell's name, and what happens before the next write of such a cell.
type BeforePut = (String, Box<dyn FnOnce()>);

#[derive(Default)]
struct State {
    cells: RefCell<BTreeMap<String, Cell>>,
    versions: Slot<u32>,
    reads: Slot<u32>,
    writes: Slot<u32>,
    refuses_writes: Slot<bool>,
    refused_cell: RefCell<Option<String>>,
    before_put: RefCell<Option<BeforePut>>,
    now_ns: Slot<u64>,
    clock_reads: Slot<u32>,
    drawn: Slot<u64>,
    has_no_randomness: Slot<bool>,
    log: RefCell<Vec<(&'static str, String)>>,
    metrics: RefCell<Vec<(String, u64)>>,
    refuses_metrics: Slot<bool>,
    calls: RefCell<Vec<SentCall>>,
    has_no_cluster: Slot<bool>,
    wakes: Slot<u32>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("State").finish_non_exhaustive()
    }
}

/// A call that was dispatched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SentCall {
    pub(crate) token: u32,
    pub(crate) cluster: String,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Vec<u8>,
    pub(crate) timeout: Duration,
}

impl SentCall {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(header, _)| *header == name).map_or("", |(_, value)| value)
    }
}

impl MockHost {
    /// Runs `act` once, just before the next write of a cell.
    pub(crate) fn before_next_put(&self, act: impl FnOnce() + 'static) {
        self.before_put_of("", act);
    }

    /// Runs `act` once, just before the next write of a cell with `part` in its name.
    pub(crate) fn before_put_of(&self, part: &str, act: impl FnOnce() + 'static) {
        *self.0.before_put.borrow_mut() = Some((part.to_owned(), Box::new(act)));
    }

    pub(crate) fn refuse_writes(&self, refuses: bool) {
        self.0.refuses_writes.set(refuses);
    }

    /// Refuses writes of cells with `part` in their name.
    pub(crate) fn refuse_writes_of(&self, part: &str, refuses: bool) {
        *self.0.refused_cell.borrow_mut() = refuses.then(|| part.to_owned());
    }

    pub(crate) fn cell_names(&self) -> Vec<String> {
        self.0.cells.borrow().keys().cloned().collect()
    }

    pub(crate) fn reads(&self) -> u32 {
        self.0.reads.get()
    }

    pub(crate) fn writes(&self) -> u32 {
        self.0.writes.get()
    }

    pub(crate) fn set_now_ms(&self, now_ms: u64) {
        self.0.now_ns.set(now_ms * 1_000_000);
    }

    pub(crate) fn clock_reads(&self) -> u32 {
        self.0.clock_reads.get()
    }

    pub(crate) fn without_randomness(&self, without: bool) {
        self.0.has_no_randomness.set(without);
    }

    /// Takes the lines of the log, with their levels.
    pub(crate) fn take_log(&self) -> Vec<(&'static str, String)> {
        self.0.log.take()
    }

    pub(crate) fn refuse_metrics(&self, refuses: bool) {
        self.0.refuses_metrics.set(refuses);
    }

    pub(crate) fn defined(&self, metric: &str) -> bool {
        self.0.metrics.borrow().iter().any(|(name, _)| name == metric)
    }

    /// The value of a metric, 0 if it is not defined.
    pub(crate) fn metric(&self, metric: &str) -> u64 {
        self.0.metrics.borrow().iter().find(|(name, _)| name == metric).map_or(0, |(_, value)| *value)
    }

    /// How often the filter asked to be woken since the last time.
    pub(crate) fn take_wakes(&self) -> u32 {
        self.0.wakes.take()
    }

    pub(crate) fn without_cluster(&self, without: bool) {
        self.0.has_no_cluster.set(without);
    }

    /// Takes the calls that were dispatched since the last time.
    pub(crate) fn take_calls(&self) -> Vec<SentCall> {
        self.0.calls.take()
    }

    fn push_log(&self, level: &'static str, message: &str) {
        self.0.log.borrow_mut().push((level, message.to_owned()));
    }

    fn define(&self, name: &str) -> Option<MetricId> {
        if self.0.refuses_metrics.get() {
            return None;
        }
        let mut metrics = self.0.metrics.borrow_mut();
        let place = metrics.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
            metrics.push((name.to_owned(), 0));
            metrics.len() - 1
        });
        Some(MetricId(place as u32))
    }

    fn with_metric<T>(&self, metric: MetricId, act: impl FnOnce(&mut u64) -> T) -> T {
        act(&mut self.0.metrics.borrow_mut()[metric.0 as usize].1)
    }
}

impl Cells for MockHost {
    fn get(&self, name: &str) -> Option<Cell> {
        self.0.reads.set(self.0.reads.get() + 1);
        self.0.cells.borrow().get(name).cloned()
    }

    fn put(&self, name: &str, value: &[u8], seen: Option<u32>) -> Result<(), Conflict> {
        let act = self.0.before_put.borrow_mut().take_if(|(part, _)| name.contains(part.as_str()));
        if let Some((_, act)) = act {
            act();
        }
        let present = self.0.cells.borrow().get(name).map(|cell| cell.version);
        let is_refused = self.0.refused_cell.borrow().as_ref().is_some_and(|part| name.contains(part.as_str()));
        if present != seen || self.0.refuses_writes.get() || is_refused {
            return Err(Conflict);
        }
        self.0.versions.set(self.0.versions.get() + 1);
        self.0.writes.set(self.0.writes.get() + 1);
        let cell = Cell { value: value.to_vec(), version: self.0.versions.get() };
        self.0.cells.borrow_mut().insert(name.to_owned(), cell);
        Ok(())
    }
}

impl Clock for MockHost {
    fn now_ns(&self) -> u64 {
        self.0.clock_reads.set(self.0.clock_reads.get() + 1);
        self.0.now_ns.get()
    }
}

impl Wake for MockHost {
    fn wake(&self) {
        self.0.wakes.set(self.0.wakes.get() + 1);
    }
}

impl Random for MockHost {
    fn fill(&self, bytes: &mut [u8]) -> bool {
        if self.0.has_no_randomness.get() {
            return false;
        }
        // Every draw is another number, the same in every run.
        self.0.drawn.set(self.0.drawn.get() + 1);
        let mut mixed = self.0.drawn.get().wrapping_mul(0x9E37_79B9_7F4A_7C15);
        for byte in bytes {
            mixed = mixed.rotate_left(11).wrapping_mul(0x0000_0100_0000_01b3);
            *byte = (mixed >> 56) as u8;
        }
        true
    }
}

impl Log for MockHost {
    fn info(&self, message: &str) {
        self.push_log("info", message);
    }

    fn warn(&self, message: &str) {
        self.push_log("warn", message);
    }

    fn error(&self, message: &str) {
        self.push_log("error", message);
    }
}

impl Stats for MockHost {
    fn define_counter(&self, name: &str) -> Option<MetricId> {
        self.define(name)
    }

    fn define_gauge(&self, name: &str) -> Option<MetricId> {
        self.define(name)
    }

    fn add(&self, metric: MetricId, more: u64) {
        self.with_metric(metric, |value| *value += more);
    }

    fn set(&self, metric: MetricId, value: u64) {
        self.with_metric(metric, |present| *present = value);
    }

    fn value(&self, metric: MetricId) -> u64 {
        self.with_metric(metric, |value| *value)
    }
}

impl Cluster for MockHost {
    fn dispatch(&self, call: &Call<'_>) -> Option<u32> {
        if self.0.has_no_cluster.get() {
            return None;
        }
        self.0.drawn.set(self.0.drawn.get() + 1);
        let token = self.0.drawn.get() as u32;
        let headers = call.headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        let Call { cluster, body, timeout, .. } = *call;
        let body = body.unwrap_or_default().to_vec();
        self.0.calls.borrow_mut().push(SentCall { token, cluster: cluster.to_owned(), headers, body, timeout });
        Some(token)
    }
}

/// A response to a call.
#[derive(Clone, Debug, Default)]
pub(crate) struct MockResponse {
    pub(crate) status: Option<u16>,
    pub(crate) age_s: Option<u64>,
    pub(crate) body: Vec<u8>,
}

impl MockResponse {
    pub(crate) fn ok(body: Vec<u8>) -> Self {
        Self { status: Some(200), age_s: None, body }
    }

    pub(crate) fn of_status(status: u16) -> Self {
        Self { status: Some(status), ..Self::default() }
    }
}

impl CallResponse for MockResponse {
    fn status(&self) -> Option<u16> {
        self.status
    }

    fn number(&self, header: &str) -> Option<u64> {
        self.age_s.filter(|_| header == "age")
    }

    fn body(&self) -> Vec<u8> {
        self.body.clone()
    }
}

/// A request.
#[derive(Clone, Debug, Default)]
pub(crate) struct MockStream {
    headers: Vec<(String, Vec<u8>)>,
    pub(crate) trailers: Vec<String>,
    pub(crate) policy: Option<String>,
    pub(crate) host_policy: Option<String>,
    pub(crate) annotation: Option<String>,
    pub(crate) route_name: Option<String>,
    pub(crate) address: Option<IpAddr>,
    pub(crate) filter_state: Vec<(String, String)>,
    pub(crate) reply: Option<Reply>,
    pub(crate) is_resumed: bool,
    /// How many calls changed a header or filter state.
    pub(crate) writes: u32,
    reads: RefCell<Vec<String>>,
}

impl MockStream {
    pub(crate) fn with<'a>(headers: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let headers = headers.into_iter().map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec()));
        Self { headers: headers.collect(), ..Self::default() }
    }

    pub(crate) fn push(&mut self, name: &str, value: &[u8]) {
        self.headers.push((name.to_owned(), value.to_vec()));
    }

    pub(crate) fn headers(&self) -> Vec<(&str, &str)> {
        self.headers.iter().map(|(name, value)| (name.as_str(), std::str::from_utf8(value).unwrap())).collect()
    }

    /// How many calls returned data.
    pub(crate) fn reads(&self) -> usize {
        self.reads.borrow().len()
    }

    /// Takes the calls that returned data.
    pub(crate) fn take_reads(&self) -> Vec<String> {
        self.reads.take()
    }

    fn read(&self, what: &str) {
        self.reads.borrow_mut().push(what.to_owned());
    }

    fn lines<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Vec<u8>> {
        self.headers.iter().filter(move |(header, _)| header == name).map(|(_, value)| value)
    }
}

impl Stream for MockStream {
    fn header(&self, name: &str) -> Option<Vec<u8>> {
        self.read(name);
        self.lines(name).next().cloned()
    }

    fn header_lines(&self, name: &str) -> Option<Vec<u8>> {
        self.read(&format!("lines of {name}"));
        let lines: Vec<&[u8]> = self.lines(name).map(Vec::as_slice).collect();
        Some(lines.join(&b","[..])).filter(|joined| !joined.is_empty())
    }

    fn named_policy(&self, place: PolicyPlace<'_>) -> Option<String> {
        let (name, policy) = match place {
            PolicyPlace::Route => ("policy", &self.policy),
            PolicyPlace::VirtualHost => ("host policy", &self.host_policy),
            PolicyPlace::Annotation(_) => ("annotation", &self.annotation),
            PolicyPlace::RouteName => ("route name", &self.route_name),
        };
        self.read(name);
        policy.clone()
    }

    fn client_address(&self) -> Option<IpAddr> {
        self.read("address");
        self.address
    }

    fn set_header(&mut self, name: &str, value: &[u8]) {
        self.writes += 1;
        let place = self.headers.iter().position(|(header, _)| header == name);
        match place {
            Some(place) => {
                self.headers[place].1 = value.to_vec();
                let mut index = 0;
                self.headers.retain(|(header, _)| {
                    index += 1;
                    header != name || index - 1 == place
                });
            }
            None => self.push(name, value),
        }
    }

    fn remove_header(&mut self, name: &str) {
        self.writes += 1;
        self.headers.retain(|(header, _)| header != name);
    }

    fn remove_trailer(&mut self, name: &str) {
        self.trailers.retain(|trailer| trailer != name);
    }

    fn set_filter_state(&mut self, name: &str, value: &str) {
        self.writes += 1;
        self.filter_state.push((name.to_owned(), value.to_owned()));
    }

    fn send_reply(&mut self, reply: &Reply) {
        self.reply = Some(reply.clone());
    }

    fn resume(&mut self) {
        self.is_resumed = true;
    }
}

/// What a filter finds at its start.
#[derive(Clone, Debug, Default)]
pub(crate) struct MockEnvironment {
    pub(crate) configuration: String,
    pub(crate) variables: BTreeMap<String, String>,
    pub(crate) hides_properties: bool,
}

impl Environment for MockEnvironment {
    fn configuration(&self) -> Vec<u8> {
        self.configuration.clone().into_bytes()
    }

    fn variable(&self, name: &str) -> Option<String> {
        self.variables.get(name).cloned()
    }

    fn may_read_properties(&self) -> bool {
        !self.hides_properties
    }
}
