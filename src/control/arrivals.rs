//! What the controller's task waits for.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::{Command, Signal};
use crate::clock::{Clock, Timestamp};
use crate::memory::Reading;
use crate::worker::WorkerEvent;

/// Where it comes from.
pub(super) struct Arrivals {
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) signals: mpsc::UnboundedReceiver<Signal>,
    pub(super) events: mpsc::UnboundedReceiver<WorkerEvent>,
    pub(super) readings: watch::Receiver<Arc<Reading>>,
}

/// One thing that arrives.
pub(super) enum Arrival {
    Command(Command),
    Signal(Signal),
    Worker(WorkerEvent),
    Reading,
    Wake,
    /// Every handle is gone: nobody can ask any more.
    Abandoned,
}

impl Arrivals {
    /// Waits for the next one, at the latest until `wake`.
    pub(super) async fn next(&mut self, clock: Clock, wake: Option<Timestamp>) -> Arrival {
        let wake = async {
            match wake {
                Some(at) => tokio::time::sleep_until(clock.instant(at)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(event) = self.events.recv() => Arrival::Worker(event),
            Some(signal) = self.signals.recv() => Arrival::Signal(signal),
            Ok(()) = self.readings.changed() => Arrival::Reading,
            command = self.commands.recv() => command.map_or(Arrival::Abandoned, Arrival::Command),
            () = wake => Arrival::Wake,
        }
    }

    /// Returns what is here already.
    pub(super) fn ready_now(&mut self) -> Option<Arrival> {
        let event = self.events.try_recv().ok().map(Arrival::Worker);
        let signal = || self.signals.try_recv().ok().map(Arrival::Signal);
        let command = || self.commands.try_recv().ok().map(Arrival::Command);
        event.or_else(signal).or_else(command)
    }

    /// Returns the newest reading, which is no news from then on.
    pub(super) fn newest_reading(&mut self) -> Arc<Reading> {
        self.readings.borrow_and_update().clone()
    }
}
