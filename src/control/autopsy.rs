//! What a worker died of.

use nix::libc::SIGKILL;
use tracing::warn;

use super::task::Task;
use crate::memory::Killer;
use crate::model::{Domain, WorkerId};
use crate::worker::ExitStatus;

impl Task {
    /// Finds out what ended a worker that was not told to go. Returns how it
    /// ended, as text, and where it ran out of memory.
    pub(super) fn autopsy(
        &mut self,
        worker: &WorkerId,
        status: &ExitStatus,
        last_lines: &[String],
    ) -> (String, Vec<Domain>) {
        let model = &self.policy.models()[&worker.model];
        let unexpected = model.generation == worker.generation && !model.is_leaving();
        if !unexpected {
            return (status.to_string(), Vec::new());
        }
        let gpus: Vec<_> = model
            .domains()
            .into_iter()
            .filter(|d| *d != Domain::Host)
            .collect();
        let now = self.clock.now();
        self.oom.notice(now, self.memory.oom_counters());
        let killed = *status == ExitStatus::Signal(SIGKILL);
        let Some(killer) = self.oom.killer(now, killed) else {
            let lacked_vram = last_lines.iter().any(|line| tells_of_full_gpu(line));
            let domains = if lacked_vram { gpus } else { Vec::new() };
            return (status.to_string(), domains);
        };
        *self.counters.kills.entry(killer.as_str()).or_default() += 1;
        let (by, domains) = match killer {
            Killer::OomInCgroup => (
                ", most likely because its cgroup ran out of memory",
                vec![Domain::Host],
            ),
            Killer::OomInSystem => (
                ", most likely because the machine ran out of memory",
                vec![Domain::Host],
            ),
            Killer::Stranger => (", sent by another program", Vec::new()),
        };
        warn!(%worker, %status, verdict = killer.as_str(), "worker was killed");
        (format!("{status}{by}"), domains)
    }
}

/// Returns whether a line is what engines print when a GPU has no room left:
/// PyTorch, llama.cpp, and the drivers of NVIDIA and AMD.
fn tells_of_full_gpu(line: &str) -> bool {
    let signs = [
        "CUDA out of memory",
        "HIP out of memory",
        "cudaMalloc failed: out of memory",
        "CUDA error: out of memory",
        "CUDA_ERROR_OUT_OF_MEMORY",
        "hipErrorOutOfMemory",
        "NV_ERR_NO_MEMORY",
    ];
    signs.iter().any(|sign| line.contains(sign))
}
