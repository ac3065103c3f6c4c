//! `load`, `unload`, `pin` and `unpin`.

use hyper::Method;
use serde::Deserialize;

use super::args::{LoadArgs, ModelArgs};
use super::client::{Answer, CallError, Client};
use super::show;
use crate::model::ModelName;

/// Makes a model ready, waiting for it unless told otherwise.
pub(super) async fn load(args: LoadArgs) -> anyhow::Result<()> {
    let action = if args.no_wait {
        "load?wait=false"
    } else {
        "load"
    };
    act(args.model, action).await
}

/// Has an action carried out on a model and tells what became of it.
pub(super) async fn act(args: ModelArgs, action: &str) -> anyhow::Result<()> {
    let path = format!("{}/{action}", model_path(&args.model));
    let client = Client::new(&args.client)?;
    let answer = client.call(Method::POST, &path, String::new()).await?;
    show(&answer, args.client.json, message)
}

/// Returns the path of a model. A slash in its name is encoded, so that no
/// name is taken for a name and an action.
pub(super) fn model_path(model: &ModelName) -> String {
    format!("/api/v1/models/{}", model.as_str().replace('/', "%2F"))
}

/// Returns the answer's own words.
pub(super) fn message(answer: &Answer) -> Result<String, CallError> {
    #[derive(Deserialize)]
    struct Data {
        message: String,
    }
    answer.data().map(|data: Data| data.message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slash_in_a_name_is_encoded() {
        let name = ModelName::new("org/nano:e5").expect("a valid name");
        assert_eq!(model_path(&name), "/api/v1/models/org%2Fnano:e5");
    }
}
