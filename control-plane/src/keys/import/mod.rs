//! Imports keys of another system from lines of JSON, a thousand per transaction, so that a revocation waits for
//! one of them only. A bad line is reported by its number, with a reason that contains no part of the key; the
//! other lines are imported. [`lines`] splits the stream, [`mod@line`] parses a line, [`chunk`] writes a thousand.

pub mod chunk;
pub mod line;
pub mod lines;

use std::collections::HashSet;

use contract::hash::KeyHash;
use contract::json::BYTE_ORDER_MARK;
use contract::pepper::Pepper;
use serde_json::json;
use sqlx::PgPool;
use time::OffsetDateTime;

use self::line::{ImportedKey, parse};
use self::lines::{Line, Lines};
use crate::audit::{self, Actor, AuditEvent};
use crate::error::ApiError;

/// Lines that one import takes. What it remembers of each is its hash, so that the same key twice is noticed.
pub const LINES: u64 = 100_000;

/// Keys that are written together.
pub const CHUNK: usize = 1_000;

/// Bad lines that are told; those after them are only counted.
pub const ERRORS: usize = 1_000;

/// Lines after the last that are read to be counted, so that whoever sends them hears the answer.
const BEYOND: u64 = 100_000;

/// Why a line was not taken. The codes are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// A field is missing or wrong, or it is no JSON.
    Invalid,
    /// The key is there already.
    Duplicate,
    /// The line is too long.
    TooLong,
    /// There are too many lines.
    TooMany,
}

impl Code {
    /// The code as clients read it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::Duplicate => "duplicate",
            Self::TooLong => "too_long",
            Self::TooMany => "too_many",
        }
    }
}

/// A line that was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLine {
    /// Its number, from 1.
    pub line: u64,
    /// What is wrong, for programs.
    pub code: Code,
    /// What is wrong, in words.
    pub reason: String,
}

/// What became of an import.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Lines that are keys now.
    pub imported: u64,
    /// Lines that were not taken.
    pub failed: u64,
    /// The first of them, by number.
    pub errors: Vec<BadLine>,
    /// Whether there are more than are told.
    pub errors_truncated: bool,
}

/// A line that was understood.
#[derive(Debug)]
struct Accepted {
    line: u64,
    key: ImportedKey,
    /// What is stored of the key.
    stored: KeyHash,
}

/// An import under way: bytes come in as they arrive.
#[derive(Debug)]
pub struct Import {
    pool: PgPool,
    actor: Actor,
    pepper: Option<Pepper>,
    lines: Lines,
    seen: HashSet<KeyHash>,
    chunk: Vec<Accepted>,
    so_far: Imported,
    over: bool,
}

impl Import {
    /// Begins. With a pepper, keys are stored under their peppered hash.
    #[must_use]
    pub fn new(pool: PgPool, actor: Actor, pepper: Option<Pepper>) -> Self {
        let so_far = Imported::default();
        Self {
            pool,
            actor,
            pepper,
            lines: Lines::default(),
            seen: HashSet::new(),
            chunk: Vec::new(),
            so_far,
            over: false,
        }
    }

    /// Takes the next bytes. Says whether more are of use.
    ///
    /// # Errors
    /// Those of the database. What was committed stays; to send it again does no harm, since those lines are duplicates.
    pub async fn take(&mut self, mut bytes: &[u8]) -> Result<bool, ApiError> {
        while !self.over
            && let Some((number, line)) = self.lines.next(&mut bytes)
        {
            self.line(number, line).await?;
        }
        Ok(!self.over)
    }

    /// Ends: takes the last line, if it has no end of its own, and commits what is left.
    ///
    /// # Errors
    /// As those of [`Import::take`].
    pub async fn finish(mut self) -> Result<Imported, ApiError> {
        if !self.over
            && let Some((number, line)) = self.lines.rest()
        {
            self.line(number, line).await?;
        }
        self.commit().await?;
        let Imported { imported, failed, .. } = self.so_far;
        let detail = json!({"imported": imported, "failed": failed});
        let mut connection = self.pool.acquire().await?;
        let event = AuditEvent { action: "import.finish", key_id: None, target: None, detail };
        audit::record(&mut connection, &self.actor, event).await?;
        self.so_far.errors.sort_by_key(|bad| bad.line);
        Ok(self.so_far)
    }

    async fn line(&mut self, number: u64, line: Line) -> Result<(), ApiError> {
        if number > LINES {
            if number == LINES + 1 {
                let reason = format!("an import has at most {LINES} lines; this one and all after it were not taken");
                self.fail(number, Code::TooMany, reason);
            } else {
                self.so_far.failed += 1;
            }
            self.over = number >= LINES + BEYOND;
            return Ok(());
        }
        let text = match line {
            Line::Whole(text) => text,
            Line::TooLong => {
                self.fail(number, Code::TooLong, format!("a line has at most {} bytes", lines::LINE_BYTES));
                return Ok(());
            }
        };
        let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&text);
        if text.iter().all(u8::is_ascii_whitespace) {
            return Ok(());
        }
        match parse(text, OffsetDateTime::now_utc()) {
            Err(reason) => self.fail(number, Code::Invalid, reason),
            Ok(key) if !self.seen.insert(key.hash) => {
                self.fail(number, Code::Duplicate, "this key stands in an earlier line".into());
            }
            Ok(key) => {
                let stored = self.pepper.as_ref().map_or(key.hash, |pepper| pepper.hash(&key.hash));
                self.chunk.push(Accepted { line: number, key, stored });
            }
        }
        if self.chunk.len() >= CHUNK { self.commit().await } else { Ok(()) }
    }

    async fn commit(&mut self) -> Result<(), ApiError> {
        let chunk = std::mem::take(&mut self.chunk);
        if chunk.is_empty() {
            return Ok(());
        }
        let refused = chunk::write(&self.pool, &self.actor, &chunk).await?;
        self.so_far.imported += (chunk.len() - refused.len()) as u64;
        for (number, code, reason) in refused {
            self.fail(number, code, reason);
        }
        Ok(())
    }

    fn fail(&mut self, line: u64, code: Code, reason: String) {
        self.so_far.failed += 1;
        if self.so_far.errors.len() < ERRORS {
            self.so_far.errors.push(BadLine { line, code, reason });
        } else {
            self.so_far.errors_truncated = true;
        }
    }
}
