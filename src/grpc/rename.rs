//! Gives a text in each message of a call another value, as the messages pass.

use bytes::{Bytes, BytesMut};

use super::{Finder, Found, Message, PREFIX};

/// Replaces a field in every message of a body that comes in pieces. Of a message
/// only what stands before the field is held back. A message that has no such
/// field, is compressed, or is none, passes as it is.
#[derive(Debug)]
pub struct Renamer {
    field: u32,
    name: String,
    /// So much of a message is held back at most; one whose field is not within it
    /// passes as it is.
    most: usize,
    finder: Finder,
    /// So much of the message that is under way is still to pass.
    passing: u64,
    /// What comes is no message: all of it passes.
    is_lost: bool,
}

impl Renamer {
    /// Sets the field of this number to `name`, where it is within the first `most`
    /// bytes of its message.
    #[must_use]
    pub fn new(field: u32, name: String, most: usize) -> Self {
        Self {
            field,
            name,
            most,
            finder: Finder::new(field.into()),
            passing: 0,
            is_lost: false,
        }
    }

    /// Takes the next piece of the body and returns what goes on in its place;
    /// perhaps nothing yet.
    pub fn feed(&mut self, mut piece: Bytes) -> Bytes {
        let mut out = BytesMut::new();
        while !piece.is_empty() {
            if self.is_lost {
                out.extend_from_slice(&piece);
                break;
            }
            if self.passing > 0 {
                let now = usize::try_from(self.passing).unwrap_or(usize::MAX);
                let now = piece.split_to(now.min(piece.len()));
                self.passing -= size(now.len());
                out.extend_from_slice(&now);
                continue;
            }
            // What is behind the message belongs to the next one.
            let now = self.finder.room().min(piece.len());
            let found = self.finder.feed(&piece.split_to(now));
            self.decide(&found, &mut out);
        }
        out.freeze()
    }

    /// Ends the body: returns what was held back.
    pub fn finish(&mut self) -> Bytes {
        let finder = std::mem::replace(&mut self.finder, Finder::new(self.field.into()));
        finder.read.into()
    }

    fn decide(&mut self, found: &Found, out: &mut BytesMut) {
        let place = match found {
            Found::More if self.finder.read.len() < self.most => return,
            Found::Text(_) => self.finder.place(),
            Found::Malformed => {
                self.is_lost = true;
                None
            }
            Found::More | Found::Absent | Found::Compressed => None,
        };
        let finder = std::mem::replace(&mut self.finder, Finder::new(self.field.into()));
        let end = finder.end().unwrap_or(0);
        self.passing = end.saturating_sub(size(finder.read.len()));
        let replaced = place.and_then(|place| {
            let field = Message::default().text(self.field, &self.name).0;
            let length = end - size(PREFIX) - size(place.len()) + size(field.len());
            Some((place, field, u32::try_from(length).ok()?))
        });
        match replaced {
            Some((place, field, length)) => {
                out.extend_from_slice(&finder.read[..1]);
                out.extend_from_slice(&length.to_be_bytes());
                out.extend_from_slice(&finder.read[PREFIX..place.start]);
                out.extend_from_slice(&field);
                out.extend_from_slice(&finder.read[place.end..]);
            }
            None => out.extend_from_slice(&finder.read),
        }
    }
}

fn size(length: usize) -> u64 {
    u64::try_from(length).expect("a length fits 64 bits")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn renamed(body: &[u8], pieces: &[usize], most: usize) -> Vec<u8> {
        let mut renamer = Renamer::new(1, "org/model-of-theirs".into(), most);
        let mut out = Vec::new();
        let (mut rest, mut sizes) = (body, pieces.iter().cycle());
        while !rest.is_empty() {
            let size = sizes.next().copied().unwrap_or(1).clamp(1, rest.len());
            let (piece, behind) = rest.split_at(size);
            out.extend_from_slice(&renamer.feed(Bytes::copy_from_slice(piece)));
            rest = behind;
        }
        out.extend_from_slice(&renamer.finish());
        out
    }

    fn message(before: u64, name: &str, raw: &str) -> Message {
        Message::default()
            .number(9, before)
            .text(1, name)
            .text(7, raw)
    }

    #[test]
    fn messages_without_the_field_compressed_ones_and_what_is_none_pass_as_they_are() {
        let without = Message::default().number(3, 5).text(2, "x").frame();
        let next = message(3, "a", "raw").frame();
        let compressed = [&[1, 0, 0, 0, 3][..], b"abc"].concat();
        let body = [&without[..], &compressed, &next].concat();
        let changed = message(3, "org/model-of-theirs", "raw").frame();
        let expected = [&without[..], &compressed, &changed].concat();
        for piece in 1..=body.len() {
            assert_eq!(renamed(&body, &[piece], 1000), expected, "{piece}");
        }
        for bad in [
            &b"\x02\0\0\0\x02ab and so on"[..],
            b"\0\0\0\0\x03\x0a\x05ablue and so on",
            b"\0\0",
        ] {
            assert_eq!(renamed(bad, &[3], 1000), bad);
        }
        // Too far behind.
        let far = Message::default()
            .text(7, &"x".repeat(500))
            .text(1, "a")
            .frame();
        let body = [&far[..], &next].concat();
        let expected = [&far[..], &changed].concat();
        assert_eq!(renamed(&body, &[64], 200), expected);
    }

    proptest! {
        #[test]
        fn every_message_of_a_stream_is_renamed_whatever_the_pieces(
            messages in proptest::collection::vec((0_u64.., "[a-z]{1,200}", "[a-z]{0,300}"), 1..6),
            pieces in proptest::collection::vec(1_usize..400, 1..8),
        ) {
            let frames = |name: Option<&str>| -> Vec<u8> {
                let all = messages.iter();
                let all = all.map(|(n, own, raw)| message(*n, name.unwrap_or(own), raw).frame());
                all.flatten().collect()
            };
            let out = renamed(&frames(None), &pieces, 4096);
            prop_assert_eq!(out, frames(Some("org/model-of-theirs")));
        }
    }
}
