//! Splits a stream into lines. Lines that are too long are dropped.

/// Longest line, in bytes. A key with all its fields fits.
pub const LINE_BYTES: usize = 16 * 1_024;

/// A line, without its line end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    Whole(Vec<u8>),
    /// Longer than [`LINE_BYTES`].
    TooLong,
}

/// The incomplete line, at most [`LINE_BYTES`].
#[derive(Debug, Default)]
pub struct Lines {
    begun: Vec<u8>,
    too_long: bool,
    number: u64,
}

impl Lines {
    /// Takes bytes up to the next line end, and returns the line. Without a line end, it keeps the bytes for the next call.
    pub fn next(&mut self, bytes: &mut &[u8]) -> Option<(u64, Line)> {
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let (piece, rest) = match end {
            Some(end) => (&bytes[..end], &bytes[end + 1..]),
            None => (*bytes, &[][..]),
        };
        *bytes = rest;
        if self.begun.len() + piece.len() > LINE_BYTES {
            self.too_long = true;
            self.begun.clear();
        } else if !self.too_long {
            self.begun.extend_from_slice(piece);
        }
        end.map(|_| self.done())
    }

    /// The last line, if it has no line end.
    pub fn rest(&mut self) -> Option<(u64, Line)> {
        (self.too_long || !self.begun.is_empty()).then(|| self.done())
    }

    fn done(&mut self) -> (u64, Line) {
        self.number += 1;
        let text = std::mem::take(&mut self.begun);
        let line = if std::mem::take(&mut self.too_long) { Line::TooLong } else { Line::Whole(text) };
        (self.number, line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_out_whole_however_the_stream_is_cut() {
        let long = "x".repeat(LINE_BYTES);
        let text = format!("one\n\n{long}\n{long}y\nlast");
        let expected = [
            (1, Line::Whole(b"one".into())),
            (2, Line::Whole(Vec::new())),
            (3, Line::Whole(long.into_bytes())),
            (4, Line::TooLong),
            (5, Line::Whole(b"last".into())),
        ];
        for size in [1, 2, 3, 4_096, LINE_BYTES, text.len()] {
            let (mut lines, mut found) = (Lines::default(), Vec::new());
            for mut piece in text.as_bytes().chunks(size) {
                while let Some(line) = lines.next(&mut piece) {
                    found.push(line);
                }
            }
            found.extend(lines.rest());
            assert_eq!(found, expected, "pieces of {size}");
        }
    }
}
