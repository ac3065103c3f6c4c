//! Applies what a model's configuration changes in the bodies of its requests.
//! A model without such keys never comes here: its bodies pass as they come.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::Bytes;
use hyper::http::request;

use super::held::Held;
use super::multipart::{self, Finder, Seen};
use super::resolve::{is_encoded, kind, may_be_else};
use super::rewrite::rewrite;
use crate::model::{Bytes as Size, Filter, ModelSpec};
use crate::reply::Fault;

/// What is changed of a body that is held.
#[derive(Debug)]
pub(super) enum Change {
    /// Nothing.
    None,
    /// All of it, to this.
    Whole(Bytes),
    /// A name within it.
    Name {
        /// Where the name is, in bytes.
        place: Range<usize>,
        /// What it becomes.
        name: Bytes,
    },
    /// A name in each message of a call: in the field of this number, this.
    Messages(u32, String),
}

impl Change {
    /// Returns what the worker gets in the place of what is held.
    pub(super) fn of(&self, held: &Held) -> VecDeque<Bytes> {
        match self {
            // Messages are changed as they pass.
            Self::None | Self::Messages(..) => held.pieces(),
            Self::Whole(body) => VecDeque::from([body.clone()]),
            Self::Name { place, name } => spliced(held.pieces(), place, name),
        }
    }
}

/// Decides what is changed of a body, which is read for that: all of it if it
/// is JSON, and up to the model's name if it is a form, at most about `most`
/// bytes.
pub(super) async fn change(
    spec: &ModelSpec,
    head: &request::Parts,
    held: &mut Held,
    most: Size,
) -> Result<Change, Fault> {
    let filter = &spec.requests.filter;
    let is_without_body = held.is_whole() && held.size() == 0;
    if filter.is_empty() || is_without_body {
        return Ok(Change::None);
    }
    let boundary = multipart::boundary(kind(head));
    let concerns = match &boundary {
        Some(_) => filter.model.is_some(),
        None => !may_be_else(kind(head)),
    };
    if !concerns {
        return Ok(Change::None);
    }
    if is_encoded(head) {
        let why = format!(
            "the body is compressed, so it cannot be changed as {} is configured: send it plain",
            spec.name
        );
        return Err(Fault::BadRequest(why));
    }
    let changed = match (boundary, &filter.model) {
        (Some(boundary), Some(model)) => {
            let finder = Finder::new(&boundary);
            Box::pin(in_form(finder, model, held, most)).await?
        }
        _ => in_json(filter, held, most).await?,
    };
    changed.ok_or_else(|| Fault::FilterTooLong {
        model: spec.name.clone(),
        most,
    })
}

/// Returns the changed JSON; `None` when there is more of it than may be read.
async fn in_json(filter: &Filter, held: &mut Held, most: Size) -> Result<Option<Change>, Fault> {
    if !held.read_up_to(most.get()).await? {
        return Ok(None);
    }
    match rewrite(filter, &held.joined()) {
        Ok(Some(body)) => Ok(Some(Change::Whole(body.into()))),
        Ok(None) => Ok(Some(Change::None)),
        Err(error) => {
            let why = format!("the body is not JSON: {error}");
            Err(Fault::BadRequest(why))
        }
    }
}

/// Puts `model` in the place of a form's field `model`; `None` when there is
/// none within what may be read.
async fn in_form(
    mut finder: Finder,
    model: &str,
    held: &mut Held,
    most: Size,
) -> Result<Option<Change>, Fault> {
    let mut read = held.pieces();
    let mut looked_at: u64 = 0;
    loop {
        if looked_at >= most.get() {
            return Ok(None);
        }
        let next = match read.pop_front() {
            Some(piece) => Some(piece),
            None => held.read().await?,
        };
        let Some(piece) = next else {
            return Ok(Some(Change::None));
        };
        looked_at += u64::try_from(piece.len()).unwrap_or(u64::MAX);
        match finder.feed(&piece) {
            Seen::Found(_) => {
                let (place, name) = (finder.place(), Bytes::copy_from_slice(model.as_bytes()));
                return Ok(Some(Change::Name { place, name }));
            }
            Seen::Absent => return Ok(Some(Change::None)),
            Seen::More => {}
        }
    }
}

/// Returns the pieces with another text in this place.
pub(super) fn spliced(
    pieces: VecDeque<Bytes>,
    place: &Range<usize>,
    text: &Bytes,
) -> VecDeque<Bytes> {
    let mut changed = VecDeque::with_capacity(pieces.len() + 2);
    let mut at = 0;
    for piece in pieces {
        let within = |offset: usize| offset.saturating_sub(at).min(piece.len());
        let (start, end) = (within(place.start), within(place.end));
        if start > 0 {
            changed.push_back(piece.slice(..start));
        }
        if (at..at + piece.len()).contains(&place.start) {
            changed.push_back(text.clone());
        }
        if end < piece.len() {
            changed.push_back(piece.slice(end..));
        }
        at += piece.len();
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_name_is_replaced_whatever_the_pieces() {
        let form = |name: &str| {
            format!(
                "--b\r\ncontent-disposition: form-data; name=\"file\"\r\n\r\nmodel\r\n\
                 --b\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\n{name}\r\n--b--\r\n"
            )
        };
        for asked in ["whisper", "w", ""] {
            let (body, expected) = (form(asked), form("org/whisper-large"));
            for size in 1..=body.len() {
                let pieces: VecDeque<_> = body
                    .as_bytes()
                    .chunks(size)
                    .map(Bytes::copy_from_slice)
                    .collect();
                let mut finder = Finder::new("b");
                let mut seen = pieces.iter().map(|piece| finder.feed(piece));
                let seen = seen.find(|seen| *seen != Seen::More);
                assert_eq!(seen, Some(Seen::Found(asked.to_owned())));
                let changed = spliced(
                    pieces,
                    &finder.place(),
                    &Bytes::from_static(b"org/whisper-large"),
                );
                let changed: Vec<u8> = changed.iter().flatten().copied().collect();
                let changed = String::from_utf8(changed).expect("text");
                assert_eq!(changed, expected, "{asked:?} in pieces of {size}");
            }
        }
    }
}
