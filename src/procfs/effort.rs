//! Whether processes do something: the time they computed, what they read from
//! disk to go on, and whether a signal stopped them.

use std::path::Path;
use std::time::Duration;

use super::{LONGEST_STAT, ProcessKey, ProcessStat, read_stat};

/// What one process did since it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// Time on a processor, its own and the kernel's for it; as fine as the
    /// kernel's ticks, 10 ms.
    pub cpu: Duration,
    /// Pages it had to wait for a disk for.
    pub major_faults: u64,
    /// See [`ProcessStat::state`].
    pub state: char,
}

impl Effort {
    /// Reads it; `None` when the process is gone.
    #[must_use]
    pub fn read(process: ProcessKey) -> Option<Self> {
        let mut line = [0_u8; LONGEST_STAT];
        let read = read_stat(Path::new("/proc"), process.pid, &mut line)?;
        let stat = ProcessStat::parse(&line[..read])?;
        (stat.key == process).then_some(())?;
        Self::parse(&line[..read], stat.state)
    }

    fn parse(line: &[u8], state: char) -> Option<Self> {
        let text = String::from_utf8_lossy(line);
        let rest = &text[text.rfind(')')? + 1..];
        // Fields 12, 14 and 15; the first after the name is the third.
        let mut fields = rest.split_ascii_whitespace().skip(9);
        let major_faults = fields.next()?.parse().ok()?;
        let user: u64 = fields.nth(1)?.parse().ok()?;
        let system: u64 = fields.next()?.parse().ok()?;
        let ticks = rustix::param::clock_ticks_per_second().max(1);
        let millis = (user + system).saturating_mul(1000) / ticks;
        Some(Self {
            cpu: Duration::from_millis(millis),
            major_faults,
            state,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_was_computed_and_waited_for() {
        let line = b"4242 (a) S 9 (b)) T 17 4242 99 0 -1 4194560 100 200 7 400 150 50 9 9 20 0 1 0 123456 1000000 77";
        let effort = Effort::parse(line, 'T').expect("a valid line");
        let ticks = rustix::param::clock_ticks_per_second();
        assert_eq!(effort.cpu, Duration::from_millis(200_000 / ticks));
        assert_eq!((effort.major_faults, effort.state), (7, 'T'));
    }

    #[test]
    fn this_process_computes_and_one_before_it_with_its_pid_does_not() {
        let pid = i32::try_from(std::process::id()).expect("a pid fits");
        let key = ProcessStat::read(pid).expect("it runs").key;
        let before = Effort::read(key).expect("it runs").cpu;
        let mut sum = 0_u64;
        while Effort::read(key).expect("it runs").cpu == before {
            sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(7));
        }
        let start_time = key.start_time - 1;
        assert_eq!(Effort::read(ProcessKey { start_time, ..key }), None);
    }
}
