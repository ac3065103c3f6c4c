//! Finds a small field in the beginning of a `multipart/form-data` body
//! (RFC 7578).

use std::ops::Range;

use memchr::memmem;

/// Returns the boundary when the content type is multipart form data.
pub(super) fn boundary(content_type: &str) -> Option<String> {
    let (kind, parameters) = content_type.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    parameters.split(';').find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        let value = value.trim().trim_matches('"');
        (name.trim().eq_ignore_ascii_case("boundary") && !value.is_empty())
            .then(|| value.to_owned())
    })
}

/// The field looked for.
const FIELD: &str = "model";
/// Headers of a part, and values, longer than this are not the ones looked
/// for.
const LONGEST: usize = 8 << 10;

/// Looks for the field while a body comes in, each byte at most a few times.
#[derive(Debug)]
pub(super) struct Finder {
    mark: Vec<u8>,
    read: Vec<u8>,
    /// What is before this was looked at.
    done: usize,
    /// Where the field's text is, when it was found.
    found: Range<usize>,
}

impl Finder {
    pub(super) fn new(boundary: &str) -> Self {
        Self {
            mark: format!("\r\n--{boundary}").into_bytes(),
            // The first mark may do without a line before it.
            read: b"\r\n".to_vec(),
            done: 0,
            found: 0..0,
        }
    }

    /// Returns where in the body the text is that [`Finder::feed`] returned.
    pub(super) fn place(&self) -> Range<usize> {
        // Less the line that was put before the body.
        self.found.start - 2..self.found.end - 2
    }

    /// Takes the next piece; returns the field's text once all of it came.
    pub(super) fn feed(&mut self, piece: &[u8]) -> Option<String> {
        self.read.extend_from_slice(piece);
        loop {
            let Some(at) = memmem::find(&self.read[self.done..], &self.mark) else {
                // A mark that began stays to be looked at.
                let whole = self.read.len().saturating_sub(self.mark.len());
                self.done = self.done.max(whole);
                return None;
            };
            let part = self.done + at + self.mark.len();
            let Some(length) = find_near(&self.read[part..], b"\r\n\r\n") else {
                self.done = part - self.mark.len();
                return None;
            };
            let head_end = length.map(|length| part + length);
            let ours = head_end.filter(|end| names(&self.read[part..*end], FIELD));
            let Some(end) = ours else {
                self.done = head_end.unwrap_or(part);
                continue;
            };
            let value = end + 4;
            match find_near(&self.read[value..], &self.mark) {
                None => {
                    self.done = part - self.mark.len();
                    return None;
                }
                Some(None) => self.done = value,
                Some(Some(length)) => {
                    self.found = value..value + length;
                    let text = &self.read[self.found.clone()];
                    return Some(String::from_utf8_lossy(text).into_owned());
                }
            }
        }
    }
}

/// Looks for `wanted` near the beginning: `None` while it may still come,
/// `Some(None)` when it is too far off.
fn find_near(bytes: &[u8], wanted: &[u8]) -> Option<Option<usize>> {
    let near = &bytes[..bytes.len().min(LONGEST)];
    match memmem::find(near, wanted) {
        Some(at) => Some(Some(at)),
        None => (bytes.len() >= LONGEST).then_some(None),
    }
}

/// Whether a part's head names this field.
fn names(head: &[u8], wanted: &str) -> bool {
    String::from_utf8_lossy(head)
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| name.trim().eq_ignore_ascii_case("content-disposition"))
        .flat_map(|(_, value)| value.split(';'))
        .filter_map(|parameter| parameter.split_once('='))
        .any(|(name, value)| {
            name.trim().eq_ignore_ascii_case("name") && value.trim().trim_matches('"') == wanted
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &[u8] = b"--xyz\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nmodel\r\n--xy\r\n\r\n\
        --xyz\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nwhisper\r\n--xyz--\r\n";

    fn find(body: &[u8], piece: usize) -> Option<String> {
        let mut finder = Finder::new("xyz");
        body.chunks(piece).find_map(|part| finder.feed(part))
    }

    #[test]
    fn a_boundary_is_taken_from_the_type_of_form_data_only() {
        let kind = "multipart/form-data; boundary=\"xyz\"";
        assert_eq!(boundary(kind).as_deref(), Some("xyz"));
        assert_eq!(boundary("application/json"), None);
        assert_eq!(boundary("multipart/mixed; boundary=xyz"), None);
    }

    #[test]
    fn a_field_is_found_when_all_of_it_is_there_whatever_the_pieces() {
        for piece in 1..=BODY.len() {
            let mut finder = Finder::new("xyz");
            let found = BODY.chunks(piece).find_map(|part| finder.feed(part));
            assert_eq!(found.as_deref(), Some("whisper"), "{piece}");
            assert_eq!(&BODY[finder.place()], b"whisper", "{piece}");
        }
        // The mark after the value is needed, the rest is not.
        let needed = BODY.len() - b"--\r\n".len();
        for cut in 0..BODY.len() {
            let expected = (cut >= needed).then(|| "whisper".to_owned());
            assert_eq!(find(&BODY[..cut], BODY.len()), expected, "cut at {cut}");
        }
    }

    #[test]
    fn a_megabyte_in_single_bytes_is_looked_through_at_once() {
        let mut body = b"--xyz\r\nx: y".to_vec();
        body.resize(1 << 20, b'-');
        body.extend_from_slice(b"\r\n");
        body.extend_from_slice(BODY);
        let clock = crate::clock::Clock::start();
        assert_eq!(find(&body, 1).as_deref(), Some("whisper"));
        // Looking through all of it at each byte took minutes.
        assert!(clock.now().since_start() < std::time::Duration::from_secs(5));
    }
}
