//! Sizes, durations and thresholds as people write them.

use std::time::Duration;

use super::Threshold;
use super::problem::Complaint;
use crate::model::Bytes;

const SIZE_UNITS: [(&str, u64); 9] = [
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

/// In nanoseconds.
const TIME_UNITS: [(&str, u64); 4] = [
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Longer waits are mistakes, and timers must not overflow.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Digits after the point that count: more is less than a byte or a
/// nanosecond.
const FRACTION_DIGITS: usize = 18;

/// Reads a size: a number and one of `B KiB MiB GiB TiB KB MB GB TB`, or a
/// plain number of bytes. Fractions of a byte are dropped.
///
/// # Errors
/// What is wrong with the text, and what a size looks like.
pub fn size(text: &str) -> Result<Bytes, Complaint> {
    let fix = r#"write a number of bytes or e.g. "8GiB""#;
    let complaint = |what: &str| Complaint::new(format!("{text:?} is {what}"), fix);
    let number = Number::split(text).ok_or_else(|| complaint("not a size"))?;
    let factor = match number.unit {
        "" if number.fraction.is_empty() => 1,
        unit => find(&SIZE_UNITS, unit).ok_or_else(|| complaint("not a size"))?,
    };
    let bytes = number.times(factor);
    Ok(Bytes(bytes.ok_or_else(|| complaint("too large a size"))?))
}

/// Reads a duration: a number and one of `ms s m h`.
///
/// # Errors
/// What is wrong with the text, and what a duration looks like.
pub fn duration(text: &str) -> Result<Duration, Complaint> {
    let complaint = |what: &str, fix: &str| Complaint::new(format!("{text:?} is {what}"), fix);
    let no_duration = || complaint("not a duration", r#"write e.g. "90s" (units: ms s m h)"#);
    let too_long = || complaint("too long", "write at most ten years");
    let number = Number::split(text).ok_or_else(no_duration)?;
    let factor = find(&TIME_UNITS, number.unit).ok_or_else(no_duration)?;
    let duration = Duration::from_nanos(number.times(factor).ok_or_else(too_long)?);
    if duration > LONGEST {
        return Err(too_long());
    }
    Ok(duration)
}

/// Reads a threshold: a size, or a whole percentage such as `10%`.
///
/// # Errors
/// What is wrong with the text, and what a threshold looks like.
pub(super) fn threshold(text: &str) -> Result<Threshold, Complaint> {
    if let Some(percent) = text.strip_suffix('%') {
        return match percent.trim_end().parse::<u8>() {
            Ok(percent) if percent <= 100 && !text.starts_with('+') => {
                Ok(Threshold::Percent(percent))
            }
            _ => Err(Complaint::new(
                format!("{text:?} is not a percentage"),
                r#"write a whole number from "0%" to "100%""#,
            )),
        };
    }
    size(text).map(Threshold::Size).map_err(|mut complaint| {
        complaint.fix = r#"write e.g. "10%" or "1GiB""#.to_owned();
        complaint
    })
}

/// Writes a size so that [`size`] reads the same: in the largest binary unit
/// that divides it.
#[must_use]
pub fn write_size(bytes: Bytes) -> String {
    let units = SIZE_UNITS.iter().filter(|(name, _)| name.contains('i'));
    for (name, factor) in units.rev() {
        if bytes.0 != 0 && bytes.0.is_multiple_of(*factor) {
            return format!("{}{name}", bytes.0 / factor);
        }
    }
    format!("{}B", bytes.0)
}

/// Writes a duration of whole milliseconds so that [`duration`] reads the
/// same: in the largest unit that divides it.
#[must_use]
pub fn write_duration(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    for (name, factor) in TIME_UNITS.iter().rev() {
        if nanos != 0 && nanos.is_multiple_of(u128::from(*factor)) {
            return format!("{}{name}", nanos / u128::from(*factor));
        }
    }
    format!("{}ms", duration.as_millis())
}

fn find(units: &[(&str, u64)], unit: &str) -> Option<u64> {
    let found = units.iter().find(|(name, _)| *name == unit);
    found.map(|(_, factor)| *factor)
}

/// A decimal number and the unit behind it.
struct Number<'a> {
    whole: &'a str,
    fraction: &'a str,
    unit: &'a str,
}

impl<'a> Number<'a> {
    /// Splits `1.5 GiB` into its parts. `None` when it does not begin with a
    /// number.
    fn split(text: &'a str) -> Option<Self> {
        let text = text.trim();
        let digits = |text: &str| {
            text.find(|c: char| !c.is_ascii_digit())
                .unwrap_or(text.len())
        };
        let (whole, rest) = text.split_at(digits(text));
        if whole.is_empty() {
            return None;
        }
        let (fraction, unit) = match rest.strip_prefix('.') {
            Some(rest) => {
                let (fraction, unit) = rest.split_at(digits(rest));
                if fraction.is_empty() {
                    return None;
                }
                (fraction, unit)
            }
            None => ("", rest),
        };
        Some(Self {
            whole,
            fraction,
            unit: unit.trim_start(),
        })
    }

    /// Returns the number times `factor`, rounded down; `None` when that is
    /// over `u64::MAX`.
    fn times(&self, factor: u64) -> Option<u64> {
        let factor = u128::from(factor);
        let whole = u128::from(self.whole.parse::<u64>().ok()?).checked_mul(factor)?;
        let kept = &self.fraction[..self.fraction.len().min(FRACTION_DIGITS)];
        let mut part = 0;
        let mut scale = 1;
        for digit in kept.bytes() {
            part = part * 10 + u128::from(digit - b'0');
            scale *= 10;
        }
        u64::try_from(whole.checked_add(part * factor / scale)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_take_binary_and_decimal_units_and_plain_bytes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1B", 1),
            ("1KiB", 1024),
            ("1.5GiB", 3 << 29),
            ("8 GiB", 8 << 30),
            ("2TiB", 2 << 40),
            ("1KB", 1000),
            ("0.5MB", 500_000),
            ("3GB", 3_000_000_000),
            ("1TB", 1_000_000_000_000),
            ("0.33333333333333333333333GiB", 357_913_941),
        ] {
            assert_eq!(size(text), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_said_with_an_example() {
        for text in [
            "",
            "12 parsecs",
            "GiB",
            "-1GiB",
            "+1",
            "1.5",
            "1,5GiB",
            "8gib",
            "8G",
            ".5GiB",
            "1.GiB",
            "0x10",
            "1e9",
            "٣GiB",
            "inf",
            "NaN",
        ] {
            let complaint = size(text).expect_err(text);
            assert_eq!(complaint.what, format!("{text:?} is not a size"));
            assert!(complaint.fix.contains("8GiB"));
        }
        let over = size("99999999999TiB").expect_err("over 2^64");
        assert_eq!(over.what, r#""99999999999TiB" is too large a size"#);
        assert!(size("99999999999999999999999").is_err());
    }

    #[test]
    fn durations_need_a_unit_and_have_an_end() {
        for (text, millis) in [
            ("250ms", 250),
            ("90s", 90_000),
            ("1.5s", 1500),
            ("10m", 600_000),
            ("0.5h", 1_800_000),
            ("0s", 0),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "90", "0", "-1s", "1d", "1m30s", "soon", "s"] {
            let complaint = duration(text).expect_err(text);
            assert_eq!(complaint.what, format!("{text:?} is not a duration"));
        }
        for text in ["999999h", "99999999999999999999s"] {
            let complaint = duration(text).expect_err(text);
            assert_eq!(complaint.what, format!("{text:?} is too long"));
        }
    }

    #[test]
    fn a_threshold_is_a_percentage_or_a_size() {
        assert_eq!(threshold("10%"), Ok(Threshold::Percent(10)));
        assert_eq!(threshold("100 %"), Ok(Threshold::Percent(100)));
        assert_eq!(threshold("1GiB"), Ok(Threshold::Size(Bytes::gib(1))));
        for text in ["101%", "-1%", "+5%", "7.5%", "%", "ten", ""] {
            assert!(threshold(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_size_written_and_read_is_the_same(bytes in any::<u64>(), shift in 0u32..50) {
            let bytes = Bytes(bytes >> shift << shift);
            prop_assert_eq!(size(&write_size(bytes)), Ok(bytes));
            prop_assert_eq!(size(&bytes.0.to_string()), Ok(bytes));
        }

        #[test]
        fn a_duration_written_and_read_is_the_same(millis in 0u64..300_000_000_000, step in 0usize..4) {
            let step = [1, 1000, 60_000, 3_600_000][step];
            let time = Duration::from_millis(millis / step * step);
            prop_assert_eq!(duration(&write_duration(time)), Ok(time));
        }

        #[test]
        fn junk_is_refused_without_a_panic(text in r"[0-9.\-+%a-zA-Z ]{0,30}|\PC{0,20}") {
            let _ = (size(&text), duration(&text), threshold(&text));
        }
    }
}
