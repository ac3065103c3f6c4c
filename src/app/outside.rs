//! Calls of the API, which are answered in the other runtime than the one that serves
//! their connection.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use axum::body::Body as ApiBody;
use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::{Request, Response};
use tokio::runtime::Handle;
use tokio::task::JoinError;
use tokio_util::task::AbortOnDropHandle;

use crate::control::Refusal;
use crate::reply::Fault;
use crate::telemetry;

/// A request's body that both runtimes have. As long as somebody has it hyper does not
/// give the connection up, and the answer is to be there first.
#[derive(Clone)]
struct Shared(Arc<Mutex<Incoming>>);

impl Shared {
    fn body(&self) -> MutexGuard<'_, Incoming> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Body for Shared {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut *self.body()).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body().size_hint()
    }
}

/// Has a call answered in another runtime, as long as its client waits.
pub(super) async fn answer<A>(
    runtime: Handle,
    request: Request<Incoming>,
    answer: impl FnOnce(Request<ApiBody>) -> A,
) -> Response<ApiBody>
where
    A: Future<Output = Response<ApiBody>> + Send + 'static,
{
    let (head, body) = request.into_parts();
    let body = Shared(Arc::new(Mutex::new(body)));
    let request = Request::from_parts(head, ApiBody::new(body.clone()));
    let task = {
        let _entered = runtime.enter();
        AbortOnDropHandle::new(telemetry::spawn_often("call", answer(request)))
    };
    let answered = task.await.map_err(JoinError::try_into_panic);
    drop(body);
    match answered {
        Ok(answer) => answer,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        Err(Err(_)) => Fault::Refused(Refusal::ShuttingDown).response(ApiBody::from),
    }
}
