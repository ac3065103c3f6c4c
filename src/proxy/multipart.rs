//! Finds a small field in the beginning of a `multipart/form-data` body
//! (RFC 7578).

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

/// Returns the text of the field, once all of it is in `read`.
pub(super) fn field(read: &[u8], boundary: &str, wanted: &str) -> Option<String> {
    let mark = format!("--{boundary}");
    let end = format!("\r\n--{boundary}");
    let mut starts = memmem::find_iter(read, mark.as_bytes());
    starts.find_map(|at| {
        let part = &read[at + mark.len()..];
        let head_end = memmem::find(part, b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&part[..head_end]).into_owned();
        if !names(&head, wanted) {
            return None;
        }
        let value = &part[head_end + 4..];
        let length = memmem::find(value, end.as_bytes())?;
        Some(String::from_utf8_lossy(&value[..length]).into_owned())
    })
}

/// Whether a part's head names this field.
fn names(head: &str, wanted: &str) -> bool {
    head.lines()
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

    #[test]
    fn a_field_is_found_when_all_of_it_is_there() {
        let kind = "multipart/form-data; boundary=\"xyz\"";
        let boundary = boundary(kind).expect("a boundary");
        let body = b"--xyz\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nmodel\r\n\
            --xyz\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nwhisper\r\n--xyz--\r\n";
        assert_eq!(field(body, &boundary, "model").as_deref(), Some("whisper"));
        for cut in 0..body.len() - 9 {
            let seen = field(&body[..cut], &boundary, "model");
            assert!(
                seen.is_none() || seen.as_deref() == Some("whisper"),
                "cut at {cut}: {seen:?}"
            );
        }
        assert_eq!(super::boundary("application/json"), None);
    }
}
