//! Texts that must never be shown.

use std::fmt;

use subtle::ConstantTimeEq;

/// A token. What it is reaches no log, event, answer or message: there is no
/// `Display`, and `Debug` shows only that there is one.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes a token: one or more visible ASCII characters, so that it can stand
    /// in a header. `None` for any other text.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let is_good = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        is_good.then(|| Self(text.to_owned()))
    }

    /// Returns the text, for whoever has to send it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Returns whether `given` is this token. How long that takes tells nothing
    /// but whether the lengths are the same.
    #[must_use]
    pub fn is(&self, given: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(given).into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_known_and_never_shown() {
        let secret = Secret::new("sk-planted").expect("a token");
        assert!(secret.is(b"sk-planted") && secret.reveal() == "sk-planted");
        for wrong in ["", "sk-plante", "sk-planted2", "SK-planted", "sk-plantee"] {
            assert!(!secret.is(wrong.as_bytes()), "{wrong:?}");
        }
        assert_eq!(
            format!("{secret:?} {:#?}", Some(&secret))
                .matches("planted")
                .count(),
            0
        );
    }

    #[test]
    fn a_text_that_no_header_could_carry_is_no_token() {
        for bad in ["", " ", "a b", "a\n", "ä", "a\u{7f}"] {
            assert!(Secret::new(bad).is_none(), "{bad:?}");
        }
    }
}
