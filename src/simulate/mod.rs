//! The policy over a recorded day, under a virtual clock: will these models fit
//! this box, and what would a larger one buy?
//!
//! What decides is the same [`Policy::step`](crate::policy::Policy::step) that
//! decides in a running residentd. What is played here is everything around it:
//! clients, gates, workers and the memory of the machine.
//!
//! | file | holds |
//! | --- | --- |
//! | `table` | the models: name, size, load time, from a CSV table |
//! | `trace` | the requests: when, for which model, how long, from a CSV table |
//! | `log` | the same, from residentd's own access log |
//! | `machine` | the virtual machine: workers, gates, memory, and the queue of what happens when |
//! | `journal` | what happened in it, a line for each thing |
//! | `workload` | models and the requests for them, put together |
//! | `study` | one workload under one policy and limit, and its figures |
//! | `offline` | a plan that knows the future, to compare with |
//! | `report` | figures as a table, as JSON, as a chart and as a sentence |
//! | `plot` | figures as an SVG picture |

mod input;
mod journal;
mod log;
mod machine;
mod offline;
mod plot;
mod report;
mod study;
mod table;
mod trace;
mod workload;

pub use input::InputError;
pub use journal::{Entry, What};
pub use log::read as read_log;
pub use machine::{Fault, Machine, Outcome, Program, Wish};
pub use offline::{Plan, plan};
pub use plot::svg;
pub use report::{answer, chart, enough, json, remark, rows};
pub use study::{Figures, Mode, Rules, Waits, run, steps};
pub use table::read as read_models;
pub use trace::read as read_trace;
pub use workload::{Demand, Memory, ModelFacts, Request, Workload, WorkloadError};
