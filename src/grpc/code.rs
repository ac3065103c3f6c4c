//! The status of a call that others answered, and what it stands for in HTTP.

use hyper::header::HeaderMap;

use super::STATUS;

/// Reads the number of a call's status, where it is in these headers or trailers.
/// What is no number is `UNKNOWN`, as clients take it.
#[must_use]
pub fn given(headers: &HeaderMap) -> Option<u16> {
    const UNKNOWN: u16 = 2;
    let value = headers.get(STATUS)?;
    let number = value.to_str().ok().and_then(|text| text.parse().ok());
    Some(number.unwrap_or(UNKNOWN))
}

/// Returns the status of HTTP that the number of a call's status stands for, so
/// that calls and other requests can be counted together.
#[must_use]
pub const fn http_of(status: u16) -> u16 {
    match status {
        0 => 200,
        // The client's mistakes: it cancelled, its argument, the state, the range.
        1 => 499,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        // Exists already, aborted.
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        // Unknown, internal, lost data, and what there is not.
        _ => 500,
    }
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    #[test]
    fn a_status_that_is_no_number_is_unknown_and_none_is_none() {
        let mut headers = HeaderMap::new();
        assert_eq!(given(&headers), None);
        for (text, number) in [("0", 0), ("14", 14), ("", 2), ("-1", 2), ("x", 2)] {
            headers.insert(STATUS, HeaderValue::from_static(text));
            assert_eq!(given(&headers), Some(number), "{text}");
        }
        assert_eq!((http_of(0), http_of(13), http_of(99)), (200, 500, 500));
    }
}
