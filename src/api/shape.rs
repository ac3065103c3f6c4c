//! Errors in the shape of the protocol that was spoken: the Open Inference
//! Protocol has its own, over REST and over gRPC.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{CONTENT_LENGTH, RETRY_AFTER};
use axum::middleware::Next;
use axum::response::Response;

use crate::reply::{self, Speech};

/// What an error says, kept with its answer.
#[derive(Clone, Debug)]
pub(super) struct Said(pub(super) String);

/// Puts an error of any handler, of the guard or of the router into the words
/// of whoever asked.
pub(super) async fn shape(request: Request, next: Next) -> Response {
    let speech = Speech::of(&request);
    let mut response = next.run(request).await;
    let Some(Said(message)) = response.extensions_mut().remove() else {
        return response;
    };
    match speech {
        Speech::Native | Speech::Anthropic => response,
        Speech::OpenInference => {
            response.headers_mut().remove(CONTENT_LENGTH);
            *response.body_mut() = Body::from(reply::open_inference(&message));
            response
        }
        Speech::Grpc => {
            let retry = response.headers().get(RETRY_AFTER);
            let retry = retry.and_then(|seconds| seconds.to_str().ok()?.parse().ok());
            let code = reply::code_of(response.status());
            // Made of no content, so that the status stands in the headers.
            reply::refusal(code, &message, retry.map(Duration::from_secs), |_| {
                Body::empty()
            })
        }
    }
}
