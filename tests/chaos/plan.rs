//! What is to be done and asked, from a seed alone: the same seed gives the
//! same deeds at the same times and the same requests in the same order. Nothing
//! here does anything.

use std::fmt;
use std::time::Duration;

/// Models that are asked for, and how often of a hundred requests.
pub(crate) const SHARES: [(&str, u64); 9] = [
    ("red", 20),
    ("green", 13),
    ("blue", 13),
    ("gold", 12),
    ("mist", 8),
    ("husk", 9),
    ("pipe", 9),
    ("clan", 8),
    ("late", 8),
];
/// The model that has a child to be killed.
pub(crate) const PARENT: &str = "clan";
/// The model that listens late, so that its port can be stolen.
pub(crate) const LATE: &str = "late";
/// Requests a second.
pub(crate) const RATE: u64 = 25;

/// Numbers that look random (splitmix64, Steele et al., OOPSLA 2014).
#[derive(Clone, Debug)]
pub(crate) struct Draw(u64);

impl Draw {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From `low` to below `high`.
    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low)
    }

    fn millis(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_millis(self.between(low, high))
    }

    /// Picks one by its share of all.
    fn by_share<T: Copy>(&mut self, of: &[(T, u64)]) -> T {
        let all = of.iter().map(|(_, share)| share).sum();
        let mut left = self.between(0, all);
        for (one, share) in of {
            if left < *share {
                return *one;
            }
            left -= share;
        }
        unreachable!("shares add up")
    }

    fn model(&mut self) -> &'static str {
        SHARES[usize::try_from(self.between(0, 9)).expect("a small number")].0
    }
}

/// How residentd hears of a changed configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    Api,
    Hangup,
    /// It looks at its files.
    Watch,
}

/// One thing that is done to residentd, its workers or its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    KillWorker(&'static str),
    KillChild,
    /// SIGSTOP; SIGCONT after that time, or never.
    StopWorker(&'static str, Option<Duration>),
    HangWorker(&'static str),
    /// It ignores SIGTERM from now on, and is unloaded.
    SlowDeath(&'static str),
    /// It takes 150 MiB more than was ever expected of it.
    Grow(&'static str),
    /// It takes more than there is.
    Exhaust(&'static str),
    /// Every start of it fails for so long.
    CrashStarts(&'static str, Duration),
    /// No start of it comes to an end for so long.
    HangStarts(&'static str, Duration),
    /// A stranger listens on the port of its next worker, first.
    StealPort(Duration),
    /// A stranger listens where its worker was a moment ago.
    InheritPort(&'static str, Duration),
    /// The wall clock is off by so many seconds from now on.
    SetClock(i64),
    FillDisk(Duration),
    /// No file can be made in the state folder.
    NoNewFiles(Duration),
    ReloadInvalid(Word),
    ReloadChanged(&'static str, Word),
    /// The model is gone, and is there again after that time.
    ReloadWithout(&'static str, Duration, Word),
    /// Mebibytes.
    Limit(u64),
    Load(&'static str),
    Unload(&'static str),
    Restart(&'static str),
    Pin(&'static str, Duration),
    Cleanup,
    KillResidentd(Duration),
    EndResidentd,
    /// Another one takes over while it runs.
    UpgradeResidentd,
    PauseResidentd(Duration),
}

impl fmt::Display for Deed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A deed and when it is done, from the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) at: Duration,
    pub(crate) deed: Deed,
}

/// Plans the deeds of so long a run. In its last quarter residentd is left
/// running, so that what it would lose by and by has had time to show.
pub(crate) fn deeds(seed: u64, length: Duration) -> Vec<Step> {
    let mut draw = Draw::new(seed ^ 0xdeed);
    let mut steps = Vec::new();
    let mut at = draw.millis(500, 1500);
    while at < length {
        let deed = deed(&mut draw);
        let restarts = matches!(
            deed,
            Deed::KillResidentd(_) | Deed::EndResidentd | Deed::UpgradeResidentd
        );
        if !restarts || at < length * 3 / 4 {
            steps.push(Step { at, deed });
        }
        at += draw.millis(200, 1200);
    }
    steps
}

#[derive(Clone, Copy)]
enum Kind {
    Worker,
    Start,
    Memory,
    Machine,
    Reload,
    Operator,
    Residentd,
}

fn deed(draw: &mut Draw) -> Deed {
    let kinds = [
        (Kind::Worker, 36),
        (Kind::Start, 12),
        (Kind::Memory, 8),
        (Kind::Machine, 10),
        (Kind::Reload, 10),
        (Kind::Operator, 16),
        (Kind::Residentd, 12),
    ];
    match draw.by_share(&kinds) {
        Kind::Worker => to_worker(draw),
        Kind::Start => to_start(draw),
        Kind::Memory => to_memory(draw),
        Kind::Machine => to_machine(draw),
        Kind::Reload => reload(draw),
        Kind::Operator => operator(draw),
        Kind::Residentd => match draw.between(0, 15) {
            0..5 => Deed::KillResidentd(draw.millis(0, 1500)),
            5 | 6 => Deed::EndResidentd,
            7..12 => Deed::UpgradeResidentd,
            _ => Deed::PauseResidentd(draw.millis(100, 1500)),
        },
    }
}

fn to_worker(draw: &mut Draw) -> Deed {
    let model = draw.model();
    match draw.between(0, 36) {
        0..14 => Deed::KillWorker(model),
        14..18 => Deed::KillChild,
        18..23 => Deed::StopWorker(model, Some(draw.millis(50, 3000))),
        23..26 => Deed::StopWorker(model, None),
        26..31 => Deed::HangWorker(model),
        _ => Deed::SlowDeath(model),
    }
}

fn to_start(draw: &mut Draw) -> Deed {
    let model = draw.model();
    match draw.between(0, 12) {
        0..3 => Deed::CrashStarts(model, draw.millis(500, 4000)),
        3..5 => Deed::HangStarts(model, draw.millis(500, 4000)),
        5..9 => Deed::StealPort(draw.millis(1000, 5000)),
        _ => Deed::InheritPort(model, draw.millis(1000, 5000)),
    }
}

fn to_memory(draw: &mut Draw) -> Deed {
    let model = draw.model();
    match draw.between(0, 8) {
        0..2 => Deed::Grow(model),
        2 => Deed::Exhaust(model),
        3 => Deed::Limit(900),
        _ => Deed::Limit(draw.between(140, 360)),
    }
}

fn to_machine(draw: &mut Draw) -> Deed {
    match draw.between(0, 10) {
        0..4 => {
            let seconds = i64::try_from(draw.between(1, 400_000_000)).expect("a small number");
            let ahead = draw.between(0, 2) == 0;
            Deed::SetClock(if ahead { seconds } else { -seconds })
        }
        4..8 => Deed::FillDisk(draw.millis(500, 6000)),
        _ => Deed::NoNewFiles(draw.millis(500, 6000)),
    }
}

fn reload(draw: &mut Draw) -> Deed {
    let word = match draw.between(0, 3) {
        0 => Word::Api,
        1 => Word::Hangup,
        _ => Word::Watch,
    };
    match draw.between(0, 10) {
        0..3 => Deed::ReloadInvalid(word),
        3..7 => Deed::ReloadChanged(draw.model(), word),
        _ => Deed::ReloadWithout(draw.model(), draw.millis(500, 3000), word),
    }
}

fn operator(draw: &mut Draw) -> Deed {
    let model = draw.model();
    match draw.between(0, 16) {
        0..5 => Deed::Load(model),
        5..10 => Deed::Unload(model),
        10..12 => Deed::Restart(model),
        12..15 => Deed::Pin(model, draw.millis(500, 5000)),
        _ => Deed::Cleanup,
    }
}

/// What a client does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// Reads the answer as it comes.
    Reads,
    /// Leaves after that time, whatever has come.
    Leaves(Duration),
    /// Reads a little at a time.
    Dawdles,
}

/// What a request has its worker do beside answering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whim {
    None,
    /// It dies of it after that many parts; of 0 before the head.
    Dies(u64),
    /// It closes the connection without an answer.
    Drops,
    /// It answers 500.
    Fails,
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ask {
    pub(crate) number: u64,
    pub(crate) model: &'static str,
    pub(crate) chat: bool,
    pub(crate) stream: bool,
    pub(crate) parts: u64,
    pub(crate) pace_ms: u64,
    pub(crate) delay_ms: u64,
    pub(crate) part_bytes: u64,
    pub(crate) manner: Manner,
    pub(crate) whim: Whim,
}

/// Plans the request with this number.
pub(crate) fn ask(seed: u64, number: u64) -> Ask {
    let mut draw = Draw::new(seed ^ number.wrapping_mul(0x5851_f42d_4c95_7f2d));
    let draw = &mut draw;
    let stream = draw.between(0, 10) < 4;
    let model = match draw.between(0, 100) {
        0 => "nobody",
        _ => draw.by_share(&SHARES),
    };
    let parts = if stream { draw.between(2, 40) } else { 3 };
    let manner = match draw.between(0, 20) {
        0 | 1 => Manner::Leaves(draw.millis(1, 800)),
        2 if stream => Manner::Dawdles,
        _ => Manner::Reads,
    };
    let whim = match draw.between(0, 200) {
        0 => Whim::Dies(0),
        1 if stream => Whim::Dies(draw.between(1, parts)),
        2 | 3 => Whim::Drops,
        4..7 => Whim::Fails,
        _ => Whim::None,
    };
    Ask {
        number,
        model,
        chat: draw.between(0, 2) == 0,
        stream,
        parts,
        pace_ms: if stream { draw.between(0, 60) } else { 0 },
        delay_ms: draw.by_share(&[(0, 6), (20, 3), (200, 1)]),
        part_bytes: if manner == Manner::Dawdles {
            64 << 10
        } else {
            32
        },
        manner,
        whim,
    }
}

#[test]
fn a45_the_same_seed_plans_the_same_and_another_one_something_else() {
    let length = Duration::from_secs(600);
    assert_eq!(deeds(7, length), deeds(7, length));
    assert_ne!(deeds(7, length), deeds(8, length));
    let asks = |seed| (0..1000).map(|n| ask(seed, n)).collect::<Vec<_>>();
    assert_eq!(asks(7), asks(7));
    assert_ne!(asks(7), asks(8));
    // A longer run begins as a shorter one does, its end aside.
    let short = deeds(7, length / 2);
    let calm = |step: &&Step| step.at < length / 4;
    assert!(
        short
            .iter()
            .filter(calm)
            .eq(deeds(7, length).iter().filter(calm))
    );
}
