//! What is done on each command.

use std::time::Duration;

use super::command::{LimitReport, LimitRequest, Reply};
use super::task::{Pending, Task};
use super::{
    CleanupReport, CleanupRequest, Command, Explanation, Lease, LimitSource, LogTail, Refusal, What,
};
use crate::clock::Timestamp;
use crate::model::{Domain, ModelName};
use crate::policy::{CleanupOrder, Event, Phase, Ticket};

/// How long a cleanup waits for bytes unless the request says otherwise.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(30);

impl Task {
    pub(super) fn obey(&mut self, command: Command) {
        match command {
            Command::Acquire {
                ticket,
                model,
                deadline,
                reply,
            } => self.acquire((ticket, deadline), model, reply),
            Command::Load {
                ticket,
                model,
                deadline,
                reply,
            } => {
                self.waiting.insert(ticket, Pending::Done(reply));
                self.feed(Event::Load {
                    ticket,
                    model,
                    deadline,
                });
            }
            Command::Unload {
                ticket,
                model,
                reply,
            } => {
                self.waiting.insert(ticket, Pending::Done(reply));
                self.feed(Event::Unload { ticket, model });
            }
            Command::Cleanup {
                ticket,
                request,
                reply,
            } => self.clean_up(ticket, request, reply),
            Command::Pin {
                model,
                pinned,
                reply,
            } => {
                let answer = self.pin(model, pinned);
                self.answers.put(reply, answer);
            }
            Command::Limit { request, reply } => {
                let answer = self.set_limit(request);
                self.answers.put(reply, answer);
            }
            Command::Weigh { model, reply } => {
                let answer = self.weigh(model);
                self.answers.put(reply, answer);
            }
            Command::Explain { model, reply } => {
                let answer = self.explain(model);
                self.answers.put(reply, answer);
            }
            Command::Tail {
                model,
                lines,
                reply,
            } => {
                let answer = self.known_tail(model, lines);
                self.answers.put(reply, answer);
            }
            Command::Reload {
                origin,
                outcome,
                reply,
            } => self.reload(origin, outcome, reply),
            Command::Ping { reply } => self.answers.put(reply, Ok(())),
            Command::HandOver { reply } => self.hand_over(reply),
            Command::TakeAgain { reply } => self.take_again(reply),
            Command::LeaveTo { heir, reply } => self.leave_to(&heir, reply),
            Command::Shutdown { grace, reply } => {
                self.finishing.push(reply);
                self.begin_shutdown(grace);
            }
        }
    }

    fn acquire(&mut self, asked: (Ticket, Timestamp), model: ModelName, reply: Reply<Lease>) {
        if reply.is_closed() {
            return;
        }
        let (ticket, deadline) = asked;
        self.waiting
            .insert(ticket, Pending::Lease { reply, late: false });
        self.feed(Event::Acquire {
            ticket,
            model: model.clone(),
            deadline,
        });
        self.count_wait(ticket, &model);
    }

    fn begin_shutdown(&mut self, grace: Duration) {
        self.tell_of(None, What::Shutdown { grace });
        if grace.is_zero() {
            self.kill_all();
        }
        let until = self.clock.now() + grace;
        self.feed(Event::Shutdown { until });
    }

    fn known_tail(&self, model: ModelName, lines: usize) -> Result<LogTail, Refusal> {
        if !self.policy.models().contains_key(&model) {
            return Err(Refusal::UnknownModel(model));
        }
        Ok(self.tail_of(&model, lines))
    }

    fn explain(&mut self, model: ModelName) -> Result<Explanation, Refusal> {
        self.read_gates();
        let explanation = self.policy.explain(&model, self.clock.now());
        self.release_gates();
        explanation.ok_or(Refusal::UnknownModel(model))
    }

    fn weigh(&self, model: ModelName) -> Result<(), Refusal> {
        let state = self.policy.models().get(&model);
        let state = state.ok_or(Refusal::UnknownModel(model.clone()))?;
        self.memory.weigh(&state.worker());
        Ok(())
    }

    pub(super) fn pin(&mut self, model: ModelName, pinned: bool) -> Result<(), Refusal> {
        if !self.policy.models().contains_key(&model) {
            return Err(Refusal::UnknownModel(model));
        }
        self.tell_of(Some(model.clone()), What::Pin { pinned });
        self.feed(Event::Pin { model, pinned });
        Ok(())
    }

    fn clean_up(&mut self, ticket: Ticket, request: CleanupRequest, reply: Reply<CleanupReport>) {
        let unknown = request
            .models
            .iter()
            .flatten()
            .find(|name| !self.policy.models().contains_key(*name));
        if let Some(name) = unknown {
            let unknown = Refusal::UnknownModel(name.clone());
            self.answers.put(reply, Err(unknown));
            return;
        }
        self.waiting.insert(ticket, Pending::Cleanup(reply));
        let deadline = self.clock.now() + request.timeout.unwrap_or(CLEANUP_TIMEOUT);
        let order = CleanupOrder {
            target: request.target,
            models: request.models,
            all: request.all,
            force: request.force,
            dry_run: request.dry_run,
        };
        self.feed(Event::Cleanup {
            ticket,
            order,
            deadline,
        });
    }

    /// Counts a request that was not answered in the step it came with, unless
    /// it found a worker and only waits for a place in it.
    fn count_wait(&mut self, ticket: Ticket, model: &ModelName) {
        let model = self.policy.models().get(model);
        if model.is_some_and(|model| model.phase == Phase::Ready) {
            return;
        }
        if let Some(Pending::Lease { late, .. }) = self.waiting.get_mut(&ticket) {
            *late = true;
            self.counters.misses += 1;
        }
    }

    pub(super) fn set_limit(&mut self, request: LimitRequest) -> Result<LimitReport, Refusal> {
        let domain = request.domain;
        if !self.policy.domains().contains_key(&domain) {
            return Err(Refusal::UnknownDomain(domain));
        }
        if let Some(limit) = request.limit {
            self.tell_of(None, What::Limit { domain, limit });
            if domain == Domain::Host {
                self.limit_source = LimitSource::Api;
            }
            if request.persist {
                self.store.keep_limit(domain, limit);
            }
            self.limits_set.insert(domain, limit);
            self.feed(Event::Limit { domain, limit });
        }
        let books = self
            .policy
            .domains()
            .get(&domain)
            .copied()
            .unwrap_or_default();
        Ok(LimitReport {
            limit: books.shown_limit(domain),
            effective: books.budget(),
            usage: self.policy.usage(domain),
        })
    }
}
