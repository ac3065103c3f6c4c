//! Parameters of a call, taken one by one: what is unknown, given twice or
//! does not parse is an error that names it.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use axum::extract::Query;
use axum::http::Uri;

use super::envelope::ApiError;

/// The query of a call.
#[derive(Debug)]
pub(crate) struct Params(BTreeMap<String, String>);

impl Params {
    /// Takes the query apart.
    ///
    /// # Errors
    /// A parameter that is given twice.
    pub(crate) fn of(uri: &Uri) -> Result<Self, ApiError> {
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(uri)
            .map_err(|error| ApiError::BadRequest(format!("the query does not parse: {error}")))?;
        let mut params = BTreeMap::new();
        for (key, value) in pairs {
            if params.contains_key(&key) {
                return Err(ApiError::BadRequest(format!("{key} is given twice")));
            }
            params.insert(key, value);
        }
        Ok(Self(params))
    }

    /// Takes the text of one parameter.
    pub(crate) fn text(&mut self, key: &str) -> Option<String> {
        self.0.remove(key)
    }

    /// Takes one parameter as a `T`; `expected` says what one looks like.
    pub(crate) fn parsed<T: FromStr>(
        &mut self,
        key: &str,
        expected: &str,
    ) -> Result<Option<T>, ApiError> {
        let Some(text) = self.text(key) else {
            return Ok(None);
        };
        let value = text.trim().parse();
        value
            .map(Some)
            .map_err(|_| bad_value(key, &format_args!("{text:?}"), expected))
    }

    /// Takes one parameter that is `true` or `false`; absent is `absent`.
    pub(crate) fn flag(&mut self, key: &str, absent: bool) -> Result<bool, ApiError> {
        match self.text(key).as_deref() {
            None => Ok(absent),
            Some("true" | "1" | "") => Ok(true),
            Some("false" | "0") => Ok(false),
            Some(other) => Err(bad_value(key, &format_args!("{other:?}"), "true or false")),
        }
    }

    /// Ends the taking.
    ///
    /// # Errors
    /// A parameter that nobody took.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        match self.0.into_keys().next() {
            None => Ok(()),
            Some(key) => Err(ApiError::BadRequest(format!("unknown parameter {key}"))),
        }
    }
}

/// Builds the error for a value that is not what it has to be.
pub(crate) fn bad_value(key: &str, got: &dyn Display, expected: &str) -> ApiError {
    ApiError::BadRequest(format!("{key} must be {expected}, not {got}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(query: &str) -> Result<Params, ApiError> {
        Params::of(&format!("/x?{query}").parse().expect("a valid address"))
    }

    #[test]
    fn what_is_unknown_or_given_twice_is_named() {
        let twice = params("a=1&a=2").expect_err("given twice");
        assert_eq!(twice.to_string(), "a is given twice");
        let unknown = params("a=1").and_then(Params::finish).expect_err("unknown");
        assert_eq!(unknown.to_string(), "unknown parameter a");
    }

    #[test]
    fn a_flag_is_true_or_false_and_nothing_else() {
        let mut all = params("a=true&b=0&c=maybe&d").expect("each once");
        assert!(all.flag("a", false).expect("true"));
        assert!(!all.flag("b", true).expect("0"));
        let error = all.flag("c", true).expect_err("maybe");
        assert_eq!(error.to_string(), "c must be true or false, not \"maybe\"");
        assert!(all.flag("d", false).expect("named without a value"));
        assert!(all.flag("absent", true).expect("absent"));
    }
}
