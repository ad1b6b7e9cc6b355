//! A hash for tables whose keys are ids. The control plane draws most of their bits at random, so nobody can make them collide,
//! and a hash that withstands it would cost more than the rest of a look-up.

use std::hash::Hasher;

/// The hash of what was written so far.
#[derive(Debug, Default)]
pub struct Mixed(u64);

impl Mixed {
    fn mix(&mut self, word: u64) {
        // The fraction of the golden ratio (Knuth, The Art of Computer Programming, volume 3, section 6.4).
        self.0 = (self.0.rotate_left(26) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

impl Hasher for Mixed {
    fn write(&mut self, bytes: &[u8]) {
        let mut words = bytes.chunks_exact(8);
        words.by_ref().for_each(|word| self.mix(word.iter().fold(0, |all, byte| all << 8 | u64::from(*byte))));
        words.remainder().iter().for_each(|byte| self.mix(u64::from(*byte)));
    }

    fn write_u8(&mut self, word: u8) {
        self.mix(word.into());
    }

    fn write_u32(&mut self, word: u32) {
        self.mix(word.into());
    }

    fn write_usize(&mut self, _length: usize) {
        // Lengths of arrays, always the same, and which variant, which the following tells.
    }

    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
}
