//! An Envoy with several VMs on one mock host, and the control plane's side of shared limits, for tests.

use std::collections::BTreeMap;

use contract::hash::{BUCKETS, KeyHash};
use contract::id::{Epoch, KeyId, OwnerId};
use contract::record::{Budget, Per, RateLimit, Record};
use contract::update::{Header, Part, UpdateWriter};
use limits::ledger::{OtherEnvoys, Pool};
use limits::message::{Answer, Call};
use limits::pool::PoolId;

use super::allowances::Reached;
use crate::config::Config;
use crate::filter::Filter;
use crate::host::Flow;
use crate::mock::{MockHost, MockResponse, MockStream, SentCall};
use crate::setup::Setup;
use crate::store::CellStore;
use crate::time::NS_PER_MS;

/// The time at which each test starts, in milliseconds.
pub(crate) const NOW: u64 = 1_800_000_000_000;

pub(crate) fn record(number: u8) -> Record {
    Record::plain(KeyId([number; 16]), OwnerId([8; 16]))
}

/// So many requests a minute, which may all come at once.
pub(crate) fn limit(name: &str, requests: u32) -> RateLimit {
    RateLimit { name: name.into(), requests, window_s: 60, burst: requests, shared: false, per: Per::Key }
}

/// The same for all Envoys together.
pub(crate) fn shared(name: &str, requests: u32) -> RateLimit {
    RateLimit { shared: true, ..limit(name, requests) }
}

pub(crate) fn budget(fill: u32) -> Option<Budget> {
    Some(Budget { fill, resets_at_s: None, per: Per::Key })
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Admitted,
    Waits,
    /// The status, the code of the problem, and `Retry-After`.
    Refused(u16, String, Option<u64>),
}

impl Fate {
    pub(crate) fn refused(status: u16, code: &str, retry_after_s: Option<u64>) -> Self {
        Self::Refused(status, code.into(), retry_after_s)
    }

    fn of(flow: Flow, stream: &MockStream) -> Self {
        match flow {
            Flow::Continue => Self::Admitted,
            Flow::Wait => Self::Waits,
            Flow::Stop => {
                let reply = stream.reply.as_ref().unwrap();
                let body: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
                let header = reply.headers.iter().find(|(name, _)| *name == "retry-after");
                let retry_after_s = header.map(|(_, value)| value.parse().unwrap());
                Self::Refused(reply.status, body["code"].as_str().unwrap().to_owned(), retry_after_s)
            }
        }
    }
}

/// One VM as its shell runs it.
pub(crate) struct Worker {
    pub(crate) filter: Filter<MockHost, CellStore<MockHost>>,
    /// The requests that wait, and since when.
    pub(crate) waiting: Vec<(MockStream, u64)>,
    /// The calls for allowances that are not answered.
    pub(crate) calls: Vec<SentCall>,
    poll: Option<SentCall>,
    is_woken: bool,
}

pub(crate) struct Envoy {
    pub(crate) host: MockHost,
    pub(crate) setup: Setup,
    pub(crate) vms: Vec<Worker>,
}

impl Envoy {
    /// With one VM.
    pub(crate) fn new(fields: &str, keys: &[(&str, Record)]) -> Self {
        Self::with_vms(1, fields, keys)
    }

    /// Its first VM leads. All have ticked once, and the store has these keys.
    pub(crate) fn with_vms(vms: usize, fields: &str, keys: &[(&str, Record)]) -> Self {
        let json = format!(r#"{{"control_plane": {{"cluster": "cp"}}, "rate_limit": null{fields}}}"#);
        let config = Config::parse(json.as_bytes()).unwrap();
        let host = MockHost::default();
        host.set_now_ms(NOW);
        let setup = Setup { config, sync_key: "sync".into() };
        let worker = |_| Worker {
            filter: Filter::new(host.clone(), &setup.config).unwrap(),
            waiting: Vec::new(),
            calls: Vec::new(),
            poll: None,
            is_woken: false,
        };
        let mut envoy = Self { vms: (0..vms).map(worker).collect(), host, setup };
        assert_eq!(envoy.tick(0), []);
        envoy.update(1, keys);
        for vm in 1..vms {
            assert_eq!(envoy.tick(vm), []);
        }
        envoy
    }

    /// The leader gets these records.
    pub(crate) fn update(&mut self, revision: u64, keys: &[(&str, Record)]) {
        let mut keys: Vec<_> = keys.iter().map(|(key, record)| (KeyHash::of(key.as_bytes()), record)).collect();
        keys.sort_by_key(|(hash, _)| *hash);
        let mut writer = UpdateWriter::default();
        for (hash, record) in keys {
            writer.put(&hash, &record.to_bytes().unwrap());
        }
        let part =
            if revision == 1 { Part::Snapshot { from: 0, to: BUCKETS } } else { Part::Changes { after: revision - 1 } };
        let header = Header { epoch: Epoch([1; 16]), revision, total_keys: 1, part };
        let poll = self.vms[0].poll.take().unwrap();
        self.respond_to(0, &poll, &MockResponse::ok(writer.finish(&header).unwrap()));
    }

    /// A request with this key, and its stream.
    pub(crate) fn send(&mut self, vm: usize, key: &str) -> (Fate, MockStream) {
        let mut stream = MockStream::with([("x-api-key", key), ("x-consumer-id", "forged")]);
        let worker = &mut self.vms[vm];
        let flow = worker.filter.on_request_headers(&self.setup.config, &mut stream);
        let fate = Fate::of(flow, &stream);
        if flow == Flow::Wait {
            worker.waiting.push((stream.clone(), worker.filter.now_ms()));
        }
        self.collect(vm);
        (fate, stream)
    }

    pub(crate) fn ask(&mut self, vm: usize, key: &str) -> Fate {
        self.send(vm, key).0
    }

    /// How many requests of so many are admitted; the others are refused.
    pub(crate) fn admitted(&mut self, vm: usize, key: &str, requests: usize) -> usize {
        let fates: Vec<Fate> = (0..requests).map(|_| self.ask(vm, key)).collect();
        assert!(!fates.contains(&Fate::Waits), "{fates:?}");
        fates.iter().filter(|fate| **fate == Fate::Admitted).count()
    }

    /// The host wakes the root context if it was asked to.
    pub(crate) fn wake(&mut self, vm: usize) {
        assert!(std::mem::take(&mut self.vms[vm].is_woken), "nothing wakes the VM");
        self.vms[vm].filter.on_wake(&self.setup);
        self.collect(vm);
    }

    pub(crate) fn is_woken(&self, vm: usize) -> bool {
        self.vms[vm].is_woken
    }

    /// Ticks, and gives what became of the requests that waited.
    pub(crate) fn tick(&mut self, vm: usize) -> Vec<Fate> {
        let Self { setup, vms, .. } = self;
        let Worker { filter, waiting, .. } = &mut vms[vm];
        let mut fates = Vec::new();
        filter.on_tick(setup, |reached| fates = decide_again(filter, setup, waiting, reached));
        self.collect(vm);
        fates
    }

    pub(crate) fn tick_at(&mut self, vm: usize, now_ms: u64) -> Vec<Fate> {
        self.host.set_now_ms(now_ms);
        self.tick(vm)
    }

    /// The only call for allowances that is under way.
    pub(crate) fn call(&mut self, vm: usize) -> (SentCall, Call) {
        assert_eq!(self.vms[vm].calls.len(), 1, "{:?}", self.vms[vm].calls);
        let sent = self.vms[vm].calls.remove(0);
        let call = Call::read(&sent.body).unwrap();
        (sent, call)
    }

    /// A response to a call. Gives what became of the requests that waited.
    pub(crate) fn respond_to(&mut self, vm: usize, call: &SentCall, response: &MockResponse) -> Vec<Fate> {
        let Self { setup, vms, .. } = self;
        let Worker { filter, waiting, .. } = &mut vms[vm];
        let mut fates = Vec::new();
        let again = |reached| fates = decide_again(filter, setup, waiting, reached);
        filter.on_call_response(setup, call.token, response, again);
        self.collect(vm);
        fates
    }

    /// A response to the only call that is under way.
    pub(crate) fn respond(&mut self, vm: usize, response: &MockResponse) -> Vec<Fate> {
        let (sent, _) = self.call(vm);
        self.respond_to(vm, &sent, response)
    }

    /// The control plane answers the only call that is under way.
    pub(crate) fn serve(&mut self, vm: usize, plane: &mut Plane) -> Vec<Fate> {
        let (sent, call) = self.call(vm);
        let answer = plane.answer(&call, self.vms[vm].filter.now_ms() * NS_PER_MS);
        self.respond_to(vm, &sent, &MockResponse::ok(answer.write().unwrap()))
    }

    /// Takes the calls and wakes of this VM from the host, which all VMs share.
    fn collect(&mut self, vm: usize) {
        let worker = &mut self.vms[vm];
        let wakes = self.host.take_wakes();
        worker.is_woken |= wakes > 0;
        for call in self.host.take_calls() {
            match call.header(":path") {
                "/sync/v1/allowances" => worker.calls.push(call),
                path if path.starts_with("/sync/v1/keys") => worker.poll = Some(call),
                _ => {}
            }
        }
    }

    pub(crate) fn metric(&self, name: &str) -> u64 {
        self.host.metric(&format!("portcullis.{name}"))
    }
}

fn decide_again(
    filter: &Filter<MockHost, CellStore<MockHost>>,
    setup: &Setup,
    waiting: &mut Vec<(MockStream, u64)>,
    reached: Reached,
) -> Vec<Fate> {
    let mut fates = Vec::new();
    for (mut stream, since_ms) in std::mem::take(waiting) {
        let flow = filter.decide_again(&setup.config, &mut stream, since_ms, reached);
        assert_eq!(stream.is_resumed, flow == Flow::Continue);
        fates.push(Fate::of(flow, &stream));
        if flow == Flow::Wait {
            waiting.push((stream, since_ms));
        }
    }
    fates
}

/// The control plane's side.
#[derive(Debug, Default)]
pub(crate) struct Plane {
    pub(crate) pools: BTreeMap<PoolId, Pool>,
    pub(crate) live: u32,
    pub(crate) alone_ms: u32,
}

impl Plane {
    pub(crate) fn with(pools: impl IntoIterator<Item = (PoolId, limits::pool::Terms)>) -> Self {
        let pools = pools.into_iter().map(|(pool, terms)| (pool, Pool::new(terms)));
        Self { pools: pools.collect(), live: 2, alone_ms: 0 }
    }

    pub(crate) fn answer(&mut self, call: &Call, now_ns: u64) -> Answer {
        let mut grants = Vec::new();
        for ask in &call.asks {
            let pool = self.pools.get_mut(&ask.pool).expect("a pool of the test");
            grants.push(pool.answer(call.reporter, ask, OtherEnvoys::Several, now_ns));
        }
        let recalls = self.pools.iter().filter(|(_, pool)| {
            pool.holders.iter().any(|holder| holder.reporter == call.reporter && holder.is_recalled)
        });
        let recalls = recalls.map(|(pool, _)| *pool).collect();
        Answer { live: self.live, alone_ms: self.alone_ms, grants, recalls }
    }
}
