//! Reads sizes on the command lines of the worker programs.

/// Reads `4096`, `64K`, `64MiB` or `1.5G`; units are powers of 1024.
///
/// # Errors
/// A text for the user when the number or the unit is not one.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit_bytes = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" | "kib" => 1024.0,
        "m" | "mb" | "mib" => 1024.0 * 1024.0,
        "g" | "gb" | "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(format!("unknown unit {unit:?}, use K, M or G")),
    };
    let number: f64 = number
        .parse()
        .map_err(|_| format!("{text:?} is not a size such as 64MiB"))?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "only digits were read, and a float saturates"
    )]
    Ok((number * unit_bytes) as u64)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn units_are_powers_of_1024() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("64K"), Ok(64 << 10));
        assert_eq!(parse("64MiB"), Ok(64 << 20));
        assert_eq!(parse("1.5g"), Ok(3 << 29));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for bad in ["", "MiB", "1.2.3M", "-1", "5 apples"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
