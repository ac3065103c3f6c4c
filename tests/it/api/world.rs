//! A fixed world: four models, two of them alive, one GPU, a fixed clock; and
//! a controller that answers commands as told.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, Response, StatusCode};
use residentd::api::{ApiState, PeerAddr, router};
use residentd::clock::{Clock, Timestamp};
use residentd::control::*;
use residentd::gate::Gate;
use residentd::memory::*;
use residentd::model::*;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

/// Unix time of [`Timestamp::START`] in the fixed world.
pub(crate) const UNIX_START: f64 = 1_700_000_000.0;

/// What the test's controller answers to each command.
pub(crate) type Script = fn(Command);

/// The API over a fixed snapshot.
#[derive(Clone)]
pub(crate) struct World {
    router: axum::Router,
    /// The controller's end of the record of decisions.
    pub(crate) recorder: Arc<Recorder>,
    // Held so that the channels stay open.
    _snapshots: Arc<watch::Sender<Arc<Snapshot>>>,
    _signals: Arc<mpsc::UnboundedReceiver<Signal>>,
}

impl World {
    /// Builds the world; the runtime's clock should be paused.
    pub(crate) fn new(script: Script) -> Self {
        Self::of(snapshot(), script)
    }

    pub(crate) fn of(snapshot: Snapshot, script: Script) -> Self {
        let specs = snapshot.models.values().map(|view| Arc::clone(&view.spec));
        let routes = Arc::new(Routes::new(specs));
        let (commands, mut inbox) = mpsc::channel(COMMAND_QUEUE);
        #[expect(
            clippy::disallowed_methods,
            reason = "the handle's signals are unbounded by design"
        )]
        let (signals, heard) = mpsc::unbounded_channel();
        let (publish, snapshots) = watch::channel(Arc::new(snapshot));
        let clock = Clock::start_at(UNIX_START);
        let (recorder, decisions) = record(clock, 1);
        let seen = (snapshots, decisions);
        let controller = Controller::from_parts(routes, commands, signals, seen, clock);
        residentd::telemetry::spawn("controller", async move {
            while let Some(command) = inbox.recv().await {
                script(command);
            }
        });
        Self {
            router: router(ApiState::new(controller, None)),
            recorder: Arc::new(recorder),
            _snapshots: Arc::new(publish),
            _signals: Arc::new(heard),
        }
    }

    /// Returns the routes with every caller taken for one on this machine.
    pub(crate) fn local_router(&self) -> axum::Router {
        self.router.clone().layer(axum::Extension(local()))
    }

    pub(crate) async fn send(&self, mut request: Request<Body>, peer: Option<PeerAddr>) -> Answer {
        if let Some(peer) = peer {
            request.extensions_mut().insert(peer);
        }
        Answer::of(self.open(request).await).await
    }

    /// Sends a request whose answer is read piece by piece.
    pub(crate) async fn open(&self, request: Request<Body>) -> Response<Body> {
        let answer = self.router.clone().oneshot(request).await;
        answer.expect("the router answers everything")
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(call("GET", path, ""), None).await
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Answer {
        self.send(call("POST", path, body), Some(local())).await
    }
}

pub(crate) fn call(method: &str, path: &str, body: &str) -> Request<Body> {
    Request::builder()
        .method(method)
        .uri(path)
        .header("host", "localhost:8080")
        .body(Body::from(body.to_owned()))
        .expect("a valid request")
}

pub(crate) fn local() -> PeerAddr {
    PeerAddr(Some(SocketAddr::from(([127, 0, 0, 1], 4711))))
}

/// An answer, read to its end.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Answer {
    async fn of(response: Response<Body>) -> Self {
        let (parts, body) = response.into_parts();
        let bytes = to_bytes(body, usize::MAX).await.expect("a whole body");
        Self {
            status: parts.status,
            headers: parts.headers,
            body: String::from_utf8(bytes.to_vec()).expect("text"),
        }
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        let value = self.headers.get(name);
        value.map_or("", |value| value.to_str().expect("text"))
    }
}

/// A controller that is only asked why a model is not ready.
pub(crate) fn explains(command: Command) {
    let Command::Explain { model, reply } = command else {
        panic!("not an explanation: {command:?}");
    };
    let holder = Holder {
        model: name("gemma"),
        protection: Some(Protection::Busy),
        inside: 1,
        idle_since: at(40),
        holds: BTreeMap::from([(Domain::Host, Bytes::gib(2))]),
        parks: false,
    };
    let _ = reply.send(Ok(Explanation {
        model,
        at: at(60),
        phase: Phase::Stopped,
        why: Why::Evicted(EvictReason::MakeRoom {
            for_model: name("gemma"),
            domain: Domain::Host,
            need: Bytes::gib(2),
            room: Bytes::gib(1),
        }),
        since: at(50),
        outlook: Outlook::Waits {
            holders: vec![holder],
            behind: Vec::new(),
            shortage: Some(Shortage {
                domain: Domain::Host,
                need: Bytes::gib(3),
                room: Bytes::gib(1),
            }),
            drains_in: Some(Duration::from_secs(4)),
        },
        last_load: Some(Duration::from_millis(2500)),
        ready_in: None,
    }));
}

/// A controller that nobody may ask.
pub(crate) fn nobody_asks(command: Command) {
    panic!("nobody should ask {command:?}");
}

pub(crate) fn name(text: &str) -> ModelName {
    ModelName::new(text).expect("a valid name")
}

pub(crate) fn at(seconds: u64) -> Timestamp {
    Timestamp::from_start(Duration::from_secs(seconds))
}

fn spec(model: &str, kind: &str, aliases: &[&str]) -> Arc<ModelSpec> {
    Arc::new(ModelSpec {
        aliases: aliases.iter().map(|alias| name(alias)).collect(),
        kind: kind.to_owned(),
        ..ModelSpec::plain(name(model), vec!["worker".to_owned()])
    })
}

fn stopped(spec: Arc<ModelSpec>) -> ModelView {
    ModelView {
        spec,
        phase: Phase::Stopped,
        generation: 0,
        pid: None,
        ready: None,
        adopted: false,
        pinned: false,
        queued: 0,
        usage: None,
        expected: Expected::default(),
        peak: BTreeMap::new(),
        settled: BTreeMap::new(),
        last_used_before: None,
        accesses_before: 0,
        loads: 0,
        evictions: 0,
        last_eviction: None,
        last_load: None,
        restarts: 0,
        last_error: None,
        retry_at: None,
        file_size: Bytes::ZERO,
        cached: None,
    }
}

/// Ready, three requests served, one inside, memory on host and GPU.
fn gemma() -> ModelView {
    let spec = spec("gemma", "llm", &["gpt-4o-mini"]);
    let gate = Gate::open(at(10), None);
    for _ in 0..4 {
        assert!(gate.try_enter(Timestamp::START));
    }
    for second in [20, 30, 40] {
        gate.leave(at(second));
    }
    ModelView {
        phase: Phase::Ready,
        generation: 3,
        pid: Some(4242),
        ready: Some(Arc::new(ReadyWorker {
            id: WorkerId {
                model: spec.name.clone(),
                generation: 3,
            },
            upstream: Upstream::Tcp(SocketAddr::from(([127, 0, 0, 1], 9))),
            grpc_upstream: None,
            opened: Opened::default(),
            gate,
            pulse: Arc::default(),
            closing: CancellationToken::new(),
            serial: 1,
            since: at(10),
            loaded_in: None,
            is_heir: false,
            leader: None,
        })),
        queued: 2,
        usage: Some(Usage {
            processes: 2,
            rss: Bytes::mib(1536),
            anon: Bytes::gib(1),
            file: Bytes::mib(512),
            locked: Bytes::mib(64),
            pss: Some(Bytes::mib(1500)),
            pss_at: Some(at(11)),
            vram: vec![VramUsage {
                device: 0,
                bytes: Some(Bytes::gib(6)),
                source: VramSource::NvmlProcess,
                tainted: false,
            }],
            ..Usage::default()
        }),
        expected: Expected(BTreeMap::from([
            (Domain::Host, declared(Bytes::gib(2))),
            (Domain::Gpu(0), declared(Bytes::gib(6))),
        ])),
        peak: BTreeMap::from([
            (Domain::Host, Bytes::mib(1600)),
            (Domain::Gpu(0), Bytes::gib(6)),
        ]),
        settled: BTreeMap::from([(Domain::Host, Bytes::mib(1536))]),
        accesses_before: 100,
        loads: 3,
        evictions: 2,
        last_eviction: Some(LastEviction {
            reason: EvictReason::Idle {
                after: Duration::from_secs(600),
            },
            at: at(5),
        }),
        last_load: Some(Duration::from_millis(2500)),
        file_size: Bytes::mib(512),
        cached: Some(Bytes::mib(384)),
        ..stopped(spec)
    }
}

fn declared(bytes: Bytes) -> Expectation {
    Expectation {
        bytes,
        source: ExpectedSource::Declared,
    }
}

/// Idle and ready, its VRAM unknown; pinned by nobody.
fn nano() -> ModelView {
    let spec = spec("org/nano:e5", "embedding", &[]);
    ModelView {
        phase: Phase::Ready,
        generation: 1,
        pid: Some(4300),
        usage: Some(Usage {
            processes: 1,
            rss: Bytes::mib(512),
            anon: Bytes::mib(512),
            vram: vec![VramUsage {
                device: 0,
                bytes: None,
                source: VramSource::Unknown,
                tainted: false,
            }],
            ..Usage::default()
        }),
        last_used_before: Some(at(50)),
        accesses_before: 7,
        loads: 1,
        peak: BTreeMap::from([(Domain::Host, Bytes::mib(512))]),
        last_load: Some(Duration::from_secs(1)),
        ..stopped(spec)
    }
}

/// Failed and backing off.
fn broken() -> ModelView {
    ModelView {
        phase: Phase::Backoff,
        generation: 4,
        restarts: 4,
        last_error: Some("exit code 1".to_owned()),
        retry_at: Some(at(90)),
        ..stopped(spec("broken", "llm", &[]))
    }
}

/// The whole fixed view, at 60 s after the start.
pub(crate) fn snapshot() -> Snapshot {
    let views = [
        gemma(),
        nano(),
        broken(),
        stopped(spec("voice", "tts", &[])),
    ];
    let models: BTreeMap<_, _> = views
        .into_iter()
        .map(|view| (view.spec.name.clone(), view))
        .collect();
    Snapshot {
        seq: 12,
        at: at(60),
        memory: memory(&models),
        models,
        counters: Counters {
            admitted: 0,
            config: Reloads::default(),
            // Of 111 that were admitted.
            granted_late: 21,
            misses: 10,
            turned_away: 0,
            reloads: 4,
            loads: 5,
            load_failures: BTreeMap::from([("exit_code", 3), ("start_timeout", 1)]),
            crashes: 1,
            unhealthy: BTreeMap::from([("still", 1)]),
            evictions: BTreeMap::from([("idle", 1), ("make_room", 2)]),
            parks: BTreeMap::from([("make_room", 3)]),
            unparks: 2,
            kills: BTreeMap::from([("oom_cgroup_likely", 1)]),
            refusals: BTreeMap::from([("queue_full", 3)]),
            reclaim_shortfall: Bytes::mib(1),
        },
        state_error: None,
        draining: false,
    }
}

fn memory(models: &BTreeMap<ModelName, ModelView>) -> MemoryView {
    let domain = |domain, usage, limit, headroom, charged, level| DomainView {
        domain,
        usage,
        limit,
        headroom,
        charged,
        level,
    };
    MemoryView {
        reading: Arc::new(reading(models)),
        usage: Bytes::gib(2),
        limit: Bytes::mib(1920),
        limit_source: LimitSource::Env,
        level: PressureLevel::Soft,
        domains: vec![
            domain(
                Domain::Host,
                Bytes::gib(2),
                Bytes::mib(1920),
                Bytes::gib(5),
                Bytes::mib(2560),
                PressureLevel::Soft,
            ),
            domain(
                Domain::Gpu(0),
                Bytes::gib(6),
                Bytes::gib(22),
                Bytes::gib(17),
                Bytes::gib(6),
                PressureLevel::None,
            ),
        ],
        candidates: vec![Candidate {
            model: name("org/nano:e5"),
            would_free: Bytes::mib(512),
            would_free_vram: Bytes::ZERO,
            idle_since: at(0),
        }],
        recommended: vec![name("org/nano:e5")],
        protected: vec![(name("gemma"), Protection::Busy)],
        auto_cleanup: true,
    }
}

fn reading(models: &BTreeMap<ModelName, ModelView>) -> Reading {
    let workers = models.values().filter_map(|view| {
        let id = WorkerId {
            model: view.spec.name.clone(),
            generation: view.generation,
        };
        Some((id, view.usage.clone()?))
    });
    Reading {
        seq: 9,
        at: at(59),
        workers_at: at(59),
        devices_at: at(59),
        host: HostReading {
            total: Bytes::gib(16),
            available: Bytes::gib(12),
            swap_total: Bytes::gib(4),
            swap_free: Bytes::gib(3),
            headroom: Bytes::gib(5),
            cgroup: Some(CgroupReading {
                version: 2,
                path: "/kubepods/pod1".to_owned(),
                limit: Some(Bytes::gib(8)),
                current: Bytes::gib(4),
                working_set: Bytes::gib(3),
            }),
            psi: Some(PsiReading {
                some_avg10: 1.25,
                some_avg60: 0.5,
                full_avg10: 0.0,
                full_avg60: 0.25,
            }),
            oom: OomCounters::default(),
        },
        workers: workers.collect(),
        counted_twice: Bytes::ZERO,
        devices: vec![DeviceReading {
            index: 0,
            uuid: "GPU-5b2e".to_owned(),
            name: "NVIDIA L4".to_owned(),
            total: Some(Bytes::gib(24)),
            used: Some(Bytes::gib(7)),
            free: Some(Bytes::gib(17)),
            vendor: GpuVendor::Nvidia,
            unified: false,
            source: "nvml",
        }],
        device_error: None,
    }
}
