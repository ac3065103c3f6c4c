//! Pressure stall information: how much time tasks lose waiting for memory.
//!
//! Read only. It rises late without swap and also in an ordinary cold load of
//! mapped weights, so it explains; it never decides.

use super::PsiReading;

/// Parses `/proc/pressure/memory`; `None` when that is not what it is.
pub(super) fn parse(text: &str) -> Option<PsiReading> {
    let average = |kind: &str, key: &str| -> Option<f64> {
        text.lines()
            .find_map(|line| line.strip_prefix(kind))?
            .split_ascii_whitespace()
            .find_map(|field| field.strip_prefix(key)?.strip_prefix('='))?
            .parse()
            .ok()
    };
    Some(PsiReading {
        some_avg10: average("some ", "avg10")?,
        some_avg60: average("some ", "avg60")?,
        full_avg10: average("full ", "avg10")?,
        full_avg60: average("full ", "avg60")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_lines_are_read() {
        let text = "some avg10=1.50 avg60=0.25 avg300=0.01 total=123\n\
                    full avg10=0.75 avg60=0.12 avg300=0.00 total=45\n";
        assert_eq!(
            parse(text),
            Some(PsiReading {
                some_avg10: 1.5,
                some_avg60: 0.25,
                full_avg10: 0.75,
                full_avg60: 0.12,
            })
        );
    }

    #[test]
    fn anything_else_gives_nothing() {
        assert_eq!(parse(""), None);
    }
}
