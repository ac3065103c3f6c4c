//! Amounts of memory.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub, SubAssign};

/// An amount of memory in bytes. Arithmetic saturates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

impl Bytes {
    /// No bytes.
    pub const ZERO: Self = Self(0);
    /// More than any machine has.
    pub const MAX: Self = Self(u64::MAX);

    /// Returns `n` KiB.
    #[must_use]
    pub const fn kib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 10))
    }

    /// Returns `n` MiB.
    #[must_use]
    pub const fn mib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 20))
    }

    /// Returns `n` GiB.
    #[must_use]
    pub const fn gib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 30))
    }

    /// Returns the number of bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Returns the number of bytes as a float, for ratios and metrics.
    #[must_use]
    #[expect(
        clippy::cast_precision_loss,
        reason = "a ratio or a gauge needs no more than 53 bits"
    )]
    pub const fn as_f64(self) -> f64 {
        self.0 as f64
    }

    /// Returns `percent` hundredths of this, rounded down.
    #[must_use]
    pub fn percent(self, percent: u64) -> Self {
        let scaled = u128::from(self.0) * u128::from(percent) / 100;
        Self(u64::try_from(scaled).unwrap_or(u64::MAX))
    }

    /// Returns the text of `formatted_*` in the memory API: divided by 1024
    /// until under 1024, two decimals, unit `B KB MB GB TB PB`.
    #[must_use]
    pub fn formatted(self) -> String {
        self.scaled(["B", "KB", "MB", "GB", "TB", "PB"])
    }

    fn scaled(self, units: [&str; 6]) -> String {
        let mut value = self.as_f64();
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < units.len() {
            value /= 1024.0;
            unit += 1;
        }
        format!("{value:.2} {}", units[unit])
    }
}

impl Add for Bytes {
    type Output = Self;
    fn add(self, rhs: Self) -> Self {
        Self(self.0.saturating_add(rhs.0))
    }
}

impl Sub for Bytes {
    type Output = Self;
    fn sub(self, rhs: Self) -> Self {
        Self(self.0.saturating_sub(rhs.0))
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, rhs: Self) {
        *self = *self + rhs;
    }
}

impl SubAssign for Bytes {
    fn sub_assign(&mut self, rhs: Self) {
        *self = *self - rhs;
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, Add::add)
    }
}

/// Shows the amount in binary units: `1.50 GiB`.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.scaled(["B", "KiB", "MiB", "GiB", "TiB", "PiB"]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formatted_text_is_the_memory_apis() {
        assert_eq!(Bytes(2_147_483_648).formatted(), "2.00 GB");
        assert_eq!(Bytes(0).formatted(), "0.00 B");
        assert_eq!(Bytes(1023).formatted(), "1023.00 B");
        assert_eq!(Bytes(1536).formatted(), "1.50 KB");
        assert_eq!(Bytes::gib(3_000_000).formatted(), "2.86 PB");
        assert_eq!(Bytes::gib(1).to_string(), "1.00 GiB");
    }

    #[test]
    fn arithmetic_saturates_instead_of_wrapping() {
        assert_eq!(Bytes(1) - Bytes(2), Bytes::ZERO);
        assert_eq!(Bytes::MAX + Bytes(1), Bytes::MAX);
        assert_eq!(
            [Bytes::MAX, Bytes(5)].into_iter().sum::<Bytes>(),
            Bytes::MAX
        );
        assert_eq!(Bytes::MAX.percent(50).0, u64::MAX / 2);
    }
}
