//! A quick checksum of a stream, whatever pieces it arrives in.
//!
//! Not cryptographic: it finds lost, doubled, swapped and changed bytes, which
//! is what a proxy could do to a body. A test computes the same over what it
//! sent.

/// Takes bytes in, eight at a time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Checksum {
    hash: u64,
    length: u64,
    pending: [u8; 8],
}

impl Checksum {
    /// Returns the checksum of `bytes` as it is shown: 16 hex digits.
    pub(crate) fn of(bytes: &[u8]) -> String {
        let mut checksum = Self::default();
        checksum.update(bytes);
        checksum.hex()
    }

    /// Takes the next bytes of the stream.
    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        let held = usize::try_from(self.length % 8).expect("less than eight");
        self.length += u64::try_from(bytes.len()).expect("a length fits 64 bits");
        if held > 0 {
            let taken = bytes.len().min(8 - held);
            self.pending[held..held + taken].copy_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if held + taken < 8 {
                return;
            }
            self.mix(u64::from_le_bytes(self.pending));
        }
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.mix(u64::from_le_bytes(*word));
        }
        self.pending[..rest.len()].copy_from_slice(rest);
    }

    /// Returns how many bytes came so far.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Returns the checksum of what came so far, as 16 hex digits.
    pub(crate) fn hex(&self) -> String {
        let mut last = self.clone();
        let held = usize::try_from(self.length % 8).expect("less than eight");
        last.pending[held..].fill(0);
        last.mix(u64::from_le_bytes(last.pending));
        last.mix(self.length);
        format!("{:016x}", last.hash)
    }

    fn mix(&mut self, word: u64) {
        self.hash = (self.hash.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_change_the_sum() {
        let bytes: Vec<u8> = (0..1000_u32).map(|n| (n * 7 % 251) as u8).collect();
        let whole = Checksum::of(&bytes);
        for piece in [1, 3, 7, 8, 9, 64, 999] {
            let mut checksum = Checksum::default();
            bytes.chunks(piece).for_each(|part| checksum.update(part));
            assert_eq!(checksum.hex(), whole, "pieces of {piece}");
            assert_eq!(checksum.length(), 1000);
        }
    }

    #[test]
    fn a_lost_doubled_or_swapped_byte_changes_the_sum() {
        let sum = Checksum::of(b"one two three four");
        for other in [
            &b"one two three fou"[..],
            b"one two three fourr",
            b"two one three four",
            b"one two three four\0",
        ] {
            assert_ne!(Checksum::of(other), sum);
        }
    }
}
