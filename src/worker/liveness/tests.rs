use super::*;
use crate::model::ModelName;

const LEADER: ProcessKey = ProcessKey {
    pid: 7,
    start_time: 70,
};

fn live() -> Live {
    Live {
        silent: Duration::from_secs(300),
        errors: 5,
        ..Live::default()
    }
}

fn judge() -> Judge {
    let mut judge = Judge::new(live(), Timestamp::START);
    judge.is_local = Some(true);
    judge
}

/// A look after so many seconds, at a worker in which so many requests wait and
/// whose one process has computed for so many milliseconds.
fn seen(seconds: u64, waiting: u32, cpu: u64) -> Seen {
    let effort = Effort {
        cpu: Duration::from_millis(cpu),
        major_faults: 0,
        state: 'S',
    };
    Seen {
        at: Timestamp::from_millis(seconds * 1000),
        pulse: PulseReading {
            inside: waiting,
            waiting,
            ..PulseReading::default()
        },
        efforts: BTreeMap::from([(LEADER, effort)]),
        leader: LEADER,
    }
}

impl Seen {
    fn with(mut self, change: impl FnOnce(&mut PulseReading)) -> Self {
        change(&mut self.pulse);
        self
    }

    fn state_is(mut self, state: char) -> Self {
        let leader = self.efforts.get_mut(&LEADER);
        leader.expect("it is looked at").state = state;
        self
    }
}

/// Looks every ten seconds, from the first second of `over` to its last.
fn watch(
    judge: &mut Judge,
    over: std::ops::RangeInclusive<u64>,
    look: impl Fn(u64) -> Seen,
) -> Option<(u64, Ailment)> {
    let mut looks = over.step_by(10);
    looks.find_map(|second| Some((second, judge.look(&look(second))?)))
}

#[test]
fn requests_that_wait_while_nothing_computes_are_a_hang_after_two_minutes() {
    let found = watch(&mut judge(), 10..=200, |s| seen(s, 3, 500 + s));
    let (second, ailment) = found.expect("it hangs");
    assert_eq!(second, 130, "two minutes from the first look on");
    let seconds = Duration::from_secs;
    assert_eq!(
        ailment,
        Ailment::Still {
            waiting: 3,
            silent: seconds(120),
            still: seconds(120),
            cpu: Duration::from_millis(120)
        }
    );
}

#[test]
fn who_computes_reads_is_heard_or_is_held_up_does_not_hang() {
    let busy = |s: u64| seen(s, 1, s * 20);
    assert_eq!(watch(&mut judge(), 0..=300, busy).map(|f| f.0), Some(300));
    let mut patient = judge();
    patient.live.silent = Duration::ZERO;
    let heard = |s: u64| seen(s, 1, 0).with(|pulse| pulse.heard = s / 100);
    let read = |s: u64| {
        let mut seen = seen(s, 1, 0);
        let leader = seen.efforts.get_mut(&LEADER);
        leader.expect("it is looked at").major_faults = s * 10;
        seen
    };
    let held_up = |s: u64| seen(s, 1, 0).with(|pulse| pulse.inside = 2);
    let nobody = |s: u64| seen(s, 0, 0);
    let starved = |s: u64| seen(s, 1, 0).state_is('R');
    let debugged = |s: u64| seen(s, 1, 0).state_is('t');
    for look in [
        &busy as &dyn Fn(u64) -> Seen,
        &heard,
        &read,
        &held_up,
        &nobody,
        &starved,
        &debugged,
    ] {
        assert_eq!(watch(&mut patient, 0..=3600, look), None);
        patient.silence = None;
    }
    patient.is_local = Some(false);
    let elsewhere = |s: u64| seen(s, 1, 0);
    assert_eq!(watch(&mut patient, 0..=3600, elsewhere), None);
}

#[test]
fn by_silent_computing_is_no_excuse_and_no_byte_for_anybody_counts() {
    let mut judge = judge();
    let one_hears = |s: u64| seen(s, 2, s * 900).with(|pulse| pulse.heard = s / 200);
    assert_eq!(watch(&mut judge, 0..=3600, one_hears), None);
    let found = watch(&mut judge, 3610..=4200, |s| {
        seen(s, 2, s * 900).with(|pulse| pulse.heard = 18)
    });
    let (_, ailment) = found.expect("five minutes without a byte");
    assert_eq!(
        ailment,
        Ailment::Silent {
            waiting: 2,
            silent: Duration::from_secs(300)
        }
    );
}

#[test]
fn a_row_of_errors_counts_and_zero_switches_it_off() {
    let errors =
        |count| seen(1, 0, 0).with(|pulse| (pulse.errors, pulse.error_status) = (count, 500));
    assert_eq!(judge().look(&errors(4)), None);
    let found = judge().look(&errors(5));
    let five = Ailment::Errors {
        times: 5,
        status: 500,
    };
    assert_eq!(found, Some(five));
    let mut off = judge();
    off.live.errors = 0;
    assert_eq!(off.look(&errors(5000)), None);
}

/// Answers a probe so often, each taking ten seconds.
fn probe(judge: &mut Judge, answers: &[Answer], look: impl Fn(u64) -> Seen) -> Option<Ailment> {
    let mut seconds = (0..).step_by(11);
    answers.iter().find_map(|answer| {
        let second = seconds.next().expect("it has no end");
        judge.probed(*answer, &look(second), &look(second + 10))
    })
}

#[test]
fn probes_that_fail_three_times_in_a_row_tell_and_one_that_passes_forgives() {
    use Answer::{Nothing, Passes, Refused, Status};
    let idle = |s| seen(s, 0, s);
    let row = [Nothing, Refused, Passes, Status(500), Nothing];
    assert_eq!(probe(&mut judge(), &row, idle), None);
    let over = Duration::from_secs(32);
    let times = 3;
    let found = |last| probe(&mut judge(), &[Nothing, Refused, last], idle);
    assert_eq!(found(Nothing), Some(Ailment::NoAnswer { times, over }));
    assert_eq!(found(Refused), Some(Ailment::Refuses { times, over }));
    let wrong = Ailment::WrongStatus {
        times,
        over,
        status: 503,
    };
    assert_eq!(found(Status(503)), Some(wrong));
    let stopped = |s| seen(s, 1, 0).state_is('T');
    let found = probe(&mut judge(), &[Nothing; 3], stopped);
    assert_eq!(found, Some(Ailment::Stopped { times, over }));
    let hung = |s| seen(s, 1, 0);
    let found = probe(&mut judge(), &[Nothing; 3], hung);
    assert_eq!(found, Some(Ailment::NoAnswer { times, over }));
}

#[test]
fn no_answer_does_not_count_of_a_busy_worker_nor_of_one_that_is_held_up_or_debugged() {
    use Answer::{Nothing, Refused, Status};
    let busy = |s: u64| seen(s, 1, s * 100);
    let heard = |s: u64| seen(s, 1, 0).with(|pulse| pulse.heard = s);
    let held_up = |s: u64| seen(s, 1, 0).with(|pulse| pulse.inside = 2);
    let debugged = |s: u64| seen(s, 0, 0).state_is('t');
    for look in [&busy as &dyn Fn(u64) -> Seen, &heard, &held_up, &debugged] {
        assert_eq!(probe(&mut judge(), &[Nothing; 9], look), None);
    }
    // That no place is free is no fault while somebody has one.
    assert_eq!(probe(&mut judge(), &[Status(503); 9], busy), None);
    // But computing with nobody inside, and a closed port, are.
    let alone = |s: u64| seen(s, 0, s * 100);
    assert!(probe(&mut judge(), &[Nothing; 3], alone).is_some());
    assert!(probe(&mut judge(), &[Refused; 3], busy).is_some());
}

#[test]
fn only_a_worker_of_which_nothing_is_heard_is_probed() {
    let mut judge = judge();
    let look = |judge: &mut Judge, seen: &Seen| {
        let wanted = judge.wants_probe(seen);
        assert_eq!(judge.look(seen), None);
        wanted
    };
    assert!(!look(&mut judge, &seen(1, 0, 0)), "it was ready just now");
    assert!(look(&mut judge, &seen(10, 0, 0)));
    assert_eq!(
        judge.probed(Answer::Passes, &seen(10, 0, 0), &seen(10, 0, 0)),
        None
    );
    let heard = |s, heard| seen(s, 1, 0).with(|pulse| pulse.heard = heard);
    assert!(!look(&mut judge, &heard(20, 1)));
    assert!(!look(&mut judge, &heard(30, 2)));
    assert!(look(&mut judge, &heard(40, 2)));
    // A refused connection does not wait for its turn, nor a second failure.
    assert_eq!(
        judge.probed(Answer::Passes, &heard(40, 2), &heard(40, 2)),
        None
    );
    let refused = heard(41, 2).with(|pulse| pulse.refused = 1);
    assert!(look(&mut judge, &refused) && !look(&mut judge, &refused));
    assert_eq!(judge.probed(Answer::Refused, &refused, &refused), None);
    assert!(look(&mut judge, &refused));
    assert_eq!(judge.pause(), AGAIN);
}

#[test]
fn looks_are_spread_and_never_come_with_everything_off() {
    let worker = |name: &str| WorkerId {
        model: ModelName::new(name).expect("a name"),
        generation: 1,
    };
    let first = |name| judge().first_pause(&worker(name));
    let pauses = ["a", "b", "c", "d", "e"].map(first);
    let (least, most) = (Duration::from_secs(5), Duration::from_secs(15));
    assert!(pauses.iter().all(|pause| (least..most).contains(pause)));
    assert!(pauses.iter().any(|pause| *pause != pauses[0]));
    let off = Live {
        probe: Duration::ZERO,
        still: Duration::ZERO,
        silent: Duration::ZERO,
        ..live()
    };
    let year = Duration::from_secs(365 * 86_400);
    assert!(Judge::new(off, Timestamp::START).first_pause(&worker("a")) > year);
}
