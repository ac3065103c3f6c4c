//! The data path: which model a request is for, and what becomes of its bytes
//! on their way to a worker and back.

#[path = "../../../workers/stub/checksum.rs"]
mod checksum;

mod bodies;
mod calls;
mod calls_to_worker;
mod endings;
mod filters;
mod headers;
mod heartbeats;
mod hostile;
pub(crate) mod http2;
mod kept;
mod limits;
mod naming;
mod oip;
mod port;
mod refusals;
pub(crate) mod rig;
mod trailers;
mod upgrade;
