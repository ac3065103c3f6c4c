//! Finds a small field in the beginning of a `multipart/form-data` body
//! (RFC 7578), piece by piece.
//!
//! ```text
//! Outside ── a delimiter ──► Head ── ours ──► Value ── a delimiter ──► found
//!    ▲  └─ the last one ──► Over  │ another's    │ too long
//!    └────────────────────────────┴──────────────┘
//! ```
//!
//! Each byte is looked at once, and at the end of a piece as many again as a
//! delimiter has: whoever sends single bytes gains nothing by it.

use std::ops::Range;

use memchr::{memchr, memmem};

/// Longer boundaries are not taken for one; RFC 2046 allows 70 bytes.
const LONGEST_BOUNDARY: usize = 200;
/// White space that may stand behind a boundary, at most.
const MOST_PADDING: usize = 16;
/// The field looked for.
const FIELD: &str = "model";
/// Headers of a part, and values, longer than this are not the ones looked
/// for.
const LONGEST: usize = 8 << 10;
/// Ends the headers of a part.
const BLANK: &[u8] = b"\r\n\r\n";

/// Returns the boundary when the content type is multipart form data.
pub(super) fn boundary(content_type: &str) -> Option<String> {
    let (kind, rest) = content_type.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let boundary = parameter(rest, "boundary")?;
    let is_one = (1..=LONGEST_BOUNDARY).contains(&boundary.len());
    (is_one && !boundary.contains(['\r', '\n'])).then_some(boundary)
}

/// Returns the value of the first parameter of this name in
/// `a=b; c="d;\"e"`, without quotes.
fn parameter(mut rest: &str, wanted: &str) -> Option<String> {
    loop {
        let end = rest.find([';', '='])?;
        let (name, behind) = (rest[..end].trim(), &rest[end + 1..]);
        if rest[end..].starts_with(';') {
            rest = behind;
            continue;
        }
        let (value, behind) = value(behind);
        if name.eq_ignore_ascii_case(wanted) {
            return Some(value);
        }
        rest = behind;
    }
}

/// Returns a parameter's value and what stands behind it.
fn value(text: &str) -> (String, &str) {
    let end = |text: &str| text.find(';').unwrap_or(text.len());
    let Some(quoted) = text.trim_start().strip_prefix('"') else {
        let (value, behind) = text.split_at(end(text));
        return (value.trim().to_owned(), behind.trim_start_matches(';'));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => {
                let behind = &quoted[at + 1..];
                return (value, behind[end(behind)..].trim_start_matches(';'));
            }
            // Browsers of old write `\` in names of files as it is.
            '\\' => match characters.clone().next() {
                Some((_, escaped @ ('"' | '\\'))) => {
                    value.push(escaped);
                    characters.next();
                }
                _ => value.push('\\'),
            },
            other => value.push(other),
        }
    }
    (value, "")
}

/// What was seen of a form so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// The field's text.
    Found(String),
    /// Not yet: more of the body is needed.
    More,
    /// The form ended without it.
    Absent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Before a delimiter.
    Outside,
    /// Within the headers of a part, which begin here.
    Head(usize),
    /// Within the field's value, which begins here.
    Value(usize),
    /// Behind the last delimiter.
    Over,
}

/// What stands at a place where a delimiter may.
enum Delimiter {
    /// One, up to here: headers follow.
    Part(usize),
    Last,
    /// More is needed to tell.
    Partial,
    Not,
}

/// Looks for the field while a body comes in.
#[derive(Debug)]
pub(super) struct Finder {
    mark: memmem::Finder<'static>,
    read: Vec<u8>,
    stage: Stage,
    /// What is before this was looked at.
    looked: usize,
    /// Where the field's text is, when it was found.
    found: Range<usize>,
    /// Bytes that were looked at, those looked at twice counted twice.
    work: usize,
}

impl Finder {
    pub(super) fn new(boundary: &str) -> Self {
        let mark = format!("\r\n--{boundary}");
        Self {
            mark: memmem::Finder::new(mark.as_bytes()).into_owned(),
            // The first mark may do without a line before it.
            read: b"\r\n".to_vec(),
            stage: Stage::Outside,
            looked: 0,
            found: 0..0,
            work: 0,
        }
    }

    /// Returns where in the body the text is that [`Finder::feed`] returned.
    pub(super) fn place(&self) -> Range<usize> {
        // Less the line that was put before the body.
        self.found.start - 2..self.found.end - 2
    }

    /// Takes the next piece; returns the field's text once all of it came, and
    /// the delimiter behind it.
    pub(super) fn feed(&mut self, piece: &[u8]) -> Seen {
        self.read.extend_from_slice(piece);
        loop {
            let step = match self.stage {
                Stage::Outside => self.outside(),
                Stage::Head(start) => self.head(start),
                Stage::Value(start) => self.value(start),
                Stage::Over => Some(Seen::Absent),
            };
            if let Some(seen) = step {
                return seen;
            }
        }
    }

    /// Goes to the next delimiter, if it is here.
    fn outside(&mut self) -> Option<Seen> {
        let Some(at) = self.find_mark(self.read.len()) else {
            return Some(Seen::More);
        };
        self.pass(at)
    }

    /// Goes on behind the delimiter that may stand here.
    fn pass(&mut self, at: usize) -> Option<Seen> {
        match self.delimiter(at) {
            Delimiter::Partial => {
                self.looked = at;
                return Some(Seen::More);
            }
            Delimiter::Part(end) => (self.stage, self.looked) = (Stage::Head(end), end),
            Delimiter::Last => self.stage = Stage::Over,
            // Within headers it is one of them.
            Delimiter::Not => self.looked = at + 2,
        }
        None
    }

    /// Goes through the headers of a part line by line, up to the blank one.
    fn head(&mut self, start: usize) -> Option<Seen> {
        let near = self.read.len().min(start + LONGEST);
        let Some(line) = memchr(b'\r', &self.read[self.looked..near]) else {
            self.work += near - self.looked;
            self.looked = near;
            return self.more_or_outside(start);
        };
        let at = self.looked + line;
        self.work += line + 1;
        let (rest, mark) = (&self.read[at..], self.mark.needle());
        if rest.starts_with(BLANK) {
            let is_ours = names(&self.read[start..at], FIELD);
            // A delimiter may share the end of the blank line.
            self.looked = at + 2;
            self.stage = match is_ours {
                true => Stage::Value(at + BLANK.len()),
                false => Stage::Outside,
            };
        } else if rest.starts_with(mark) {
            return self.pass(at);
        } else if BLANK.starts_with(rest) || mark.starts_with(rest) {
            self.looked = at;
            return Some(Seen::More);
        } else {
            self.looked = at + 1;
        }
        None
    }

    /// Looks for the delimiter behind the field's value.
    fn value(&mut self, start: usize) -> Option<Seen> {
        let near = start + LONGEST + self.mark.needle().len();
        let Some(at) = self.find_mark(self.read.len().min(near)) else {
            return self.more_or_outside(start);
        };
        match self.delimiter(at) {
            Delimiter::Partial => {
                self.looked = at;
                Some(Seen::More)
            }
            Delimiter::Not => {
                self.looked = at + 2;
                None
            }
            Delimiter::Part(_) | Delimiter::Last => {
                self.found = start..at.max(start);
                let text = &self.read[self.found.clone()];
                Some(Seen::Found(String::from_utf8_lossy(text).into_owned()))
            }
        }
    }

    /// What began at `start` is too long, or there is more of it to come.
    fn more_or_outside(&mut self, start: usize) -> Option<Seen> {
        if self.read.len() < start + LONGEST + self.mark.needle().len() {
            return Some(Seen::More);
        }
        self.stage = Stage::Outside;
        None
    }

    /// Looks for the mark up to `end`; one that began there stays to be looked at.
    fn find_mark(&mut self, end: usize) -> Option<usize> {
        let (from, length) = (self.looked.min(end), self.mark.needle().len());
        let found = self.mark.find(&self.read[from..end]);
        self.work += found.map_or(end - from, |at| at + length);
        match found {
            Some(at) => Some(from + at),
            None => {
                self.looked = from.max((end + 1).saturating_sub(length));
                None
            }
        }
    }

    /// Tells a delimiter from a mark that something else follows.
    fn delimiter(&self, at: usize) -> Delimiter {
        let behind = at + self.mark.needle().len();
        let rest = &self.read[behind..];
        if rest.starts_with(b"--") {
            return Delimiter::Last;
        }
        let is_padding = |byte: &&u8| matches!(**byte, b' ' | b'\t');
        let padding = rest
            .iter()
            .take(MOST_PADDING)
            .take_while(is_padding)
            .count();
        let line = &rest[padding..];
        if line.starts_with(b"\r\n") {
            Delimiter::Part(behind + padding)
        } else if b"\r\n".starts_with(line) || rest == b"-" {
            Delimiter::Partial
        } else {
            Delimiter::Not
        }
    }
}

/// Whether a part's head names this field.
fn names(head: &[u8], wanted: &str) -> bool {
    String::from_utf8_lossy(head)
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| name.trim().eq_ignore_ascii_case("content-disposition"))
        .any(|(_, value)| parameter(value, "name").is_some_and(|name| name == wanted))
}

#[cfg(any(test, feature = "fuzzing"))]
impl Finder {
    /// Returns how many bytes were looked at, and how many were for each piece
    /// at most that had been looked at before.
    pub(super) fn work(&self) -> (usize, usize) {
        (self.work, self.mark.needle().len() + MOST_PADDING)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &[u8] = b"--xyz\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nmodel\r\n--xy\r\n\r\n\
        --xyz\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nwhisper\r\n--xyz--\r\n";

    fn find(body: &[u8], piece: usize) -> Seen {
        let mut finder = Finder::new("xyz");
        let mut seen = body.chunks(piece).map(|part| finder.feed(part));
        seen.find(|seen| *seen != Seen::More).unwrap_or(Seen::More)
    }

    fn found(text: &str) -> Seen {
        Seen::Found(text.to_owned())
    }

    /// A part of which the headers and the content are these.
    fn part(head: &str, content: &str) -> String {
        format!("--xyz\r\n{head}\r\n\r\n{content}\r\n")
    }

    const OURS: &str = "Content-Disposition: form-data; name=\"model\"";

    #[test]
    fn a_boundary_is_taken_from_the_type_of_form_data_only() {
        for (kind, expected) in [
            ("multipart/form-data; boundary=\"xyz\"", Some("xyz")),
            (
                "Multipart/Form-Data;charset=utf-8;Boundary=a=b",
                Some("a=b"),
            ),
            (
                "multipart/form-data; boundary=\"a;b \\\" c\"; x=y",
                Some("a;b \" c"),
            ),
            (
                "multipart/form-data; x=\"; boundary=no\"; boundary=yes",
                Some("yes"),
            ),
            ("multipart/form-data; boundary=\"\"", None),
            ("multipart/form-data; boundary", None),
            ("multipart/form-data", None),
            ("application/json", None),
            ("multipart/mixed; boundary=xyz", None),
        ] {
            assert_eq!(boundary(kind).as_deref(), expected, "{kind}");
        }
        // Each piece of a body would be compared with all of it.
        let long = |length| format!("multipart/form-data; boundary={}", "x".repeat(length));
        assert!(boundary(&long(200)).is_some());
        assert_eq!(boundary(&long(201)), None);
    }

    #[test]
    fn a_field_is_found_when_all_of_it_is_there_whatever_the_pieces() {
        for piece in 1..=BODY.len() {
            let mut finder = Finder::new("xyz");
            let mut seen = BODY.chunks(piece).map(|part| finder.feed(part));
            let seen = seen.find(|seen| *seen != Seen::More);
            assert_eq!(seen, Some(found("whisper")), "{piece}");
            assert_eq!(&BODY[finder.place()], b"whisper", "{piece}");
        }
        // The delimiter after the value is needed, the rest is not.
        let needed = BODY.len() - b"\r\n".len();
        for cut in 0..BODY.len() {
            let expected = match cut >= needed {
                true => found("whisper"),
                false => Seen::More,
            };
            assert_eq!(find(&BODY[..cut], BODY.len()), expected, "cut at {cut}");
        }
    }

    /// Each of these was told wrong before it was compared with a full parser.
    #[test]
    fn what_only_looks_like_the_field_is_not_it() {
        let (ours, end) = (part(OURS, "whisper"), "--xyz--\r\n");
        let file = |name: &str, content: &str| {
            let head =
                format!("Content-Disposition: form-data; name=\"file\"; filename=\"{name}\"");
            part(&head, content)
        };
        for (why, body, expected) in [
            (
                "a parameter within a quoted name of a file",
                file("a; name=model", "no") + &ours + end,
                found("whisper"),
            ),
            (
                "an escaped quote in a name of a file",
                file("a\\\"; name=\\\"model", "no") + &ours + end,
                found("whisper"),
            ),
            (
                "a longer boundary within a file",
                file("a", &format!("x\r\n--xyzz\r\n{OURS}\r\n\r\nno\r\n--xyzz")) + &ours + end,
                found("whisper"),
            ),
            (
                "a longer boundary within the value",
                part(OURS, "a\r\n--xyzz") + end,
                found("a\r\n--xyzz"),
            ),
            (
                "a part behind the end",
                file("a", "x") + end + &ours + end,
                Seen::Absent,
            ),
            (
                "headers without an end before the field",
                "--xyz\r\nx: y\r\n".to_owned() + &ours + end,
                found("whisper"),
            ),
            (
                "white space behind a boundary",
                ours.replacen("xyz", "xyz \t", 1) + end,
                found("whisper"),
            ),
            ("a value without content", part(OURS, "") + end, found("")),
            (
                "a part without content",
                format!("--xyz\r\n{OURS}\r\n\r\n{end}"),
                found(""),
            ),
            (
                "an extended name",
                part(&OURS.replace("name=", "name*="), "no") + &ours + end,
                found("whisper"),
            ),
            ("a form without parts", end.to_owned(), Seen::Absent),
        ] {
            for piece in 1..=body.len() {
                let seen = find(body.as_bytes(), piece);
                assert_eq!(seen, expected, "{why}, in pieces of {piece}");
            }
        }
    }

    /// Bodies that had the same bytes looked at again and again.
    #[test]
    fn no_byte_is_looked_at_more_than_a_few_times() {
        let mut dashes = b"--xyz\r\nx: y".to_vec();
        dashes.resize(1 << 20, b'-');
        let head = [b"--xyz\r\n", &b"x".repeat(1 << 20)[..]].concat();
        let value = part(OURS, &"x".repeat(1 << 20)).into_bytes();
        let marks = b"\r\n--xyz\r\n".repeat(100_000);
        let lines = b"\r\n--xy\r\n\r".repeat(100_000);
        for body in [dashes, head, value, marks, lines] {
            for piece in [1, 100, 10_000, body.len()] {
                let mut finder = Finder::new("xyz");
                let mut pieces = 0;
                for part in body.chunks(piece) {
                    assert_eq!(finder.feed(part), Seen::More);
                    pieces += 1;
                }
                let (work, again) = finder.work();
                let most = 3 * body.len() + pieces * again;
                assert!(work <= most, "{work} of {most} in pieces of {piece}");
            }
        }
    }
}
