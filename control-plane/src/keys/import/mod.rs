//! Imports keys of another system from lines of JSON or a table, a thousand per transaction, so that a revocation waits for
//! one of them only. A bad line is reported by its number, with a reason that contains no part of the key; the
//! other lines are imported. Keys that exist already are duplicates, so an import can be repeated. [`mod@line`] parses
//! a line, [`table`] turns a line of a table into a JSON object, [`chunk`] writes a thousand.

pub mod chunk;
pub mod line;
pub mod table;

use std::collections::HashSet;

use bytes::{Bytes, BytesMut};
use contract::hash::KeyHash;
use contract::json::BYTE_ORDER_MARK;
use contract::pepper::Pepper;
use serde::Serialize;
use serde_json::json;
use time::OffsetDateTime;
use tokio_util::codec::{AnyDelimiterCodec, Decoder};
use utoipa::ToSchema;

use self::line::{ImportedKey, parse, parse_value};
use self::table::Columns;
use crate::audit::{Actor, AuditEvent};
use crate::change::{Change, Writer};
use crate::error::ApiError;

/// Most lines of an import. It keeps the hash of each in memory, to detect duplicates.
pub const LINES: u64 = 100_000;

/// Longest line, in bytes. A key with all its fields fits.
const LINE_BYTES: usize = 16 * 1_024;

/// Keys per transaction.
pub const CHUNK: usize = 1_000;

/// Most bad lines that are reported. Further ones are only counted.
pub const ERRORS: usize = 1_000;

/// Most lines beyond [`LINES`] that are read and counted, so that the client can finish sending and reads the answer.
const BEYOND: u64 = 100_000;

/// Why a line was not imported. The codes are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "&str")]
pub enum Code {
    /// The line cannot be read as JSON or CSV, or a field is missing or wrong.
    Invalid,
    /// The key exists already.
    Duplicate,
    /// The line is too long.
    TooLong,
    /// There are too many lines.
    TooMany,
}

impl From<Code> for &str {
    fn from(code: Code) -> Self {
        match code {
            Code::Invalid => "invalid",
            Code::Duplicate => "duplicate",
            Code::TooLong => "too_long",
            Code::TooMany => "too_many",
        }
    }
}

/// A line that was not taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct ImportError {
    /// Its number, from 1.
    pub line: u64,
    /// The error, for programs: `invalid`, `duplicate`, `too_long`, `too_many`.
    #[schema(value_type = String, example = "duplicate")]
    pub code: Code,
    /// What is wrong, in words.
    pub reason: String,
}

/// The result of an import.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct ImportReply {
    /// Lines that are keys now; in a dry run, lines that would be.
    pub imported: u64,
    /// Lines that were not taken.
    pub failed: u64,
    /// The first thousand of them.
    #[schema(max_items = 1_000)]
    pub errors: Vec<ImportError>,
    /// Whether there are more errors than listed.
    pub errors_truncated: bool,
}

/// A parsed line.
#[derive(Debug)]
struct Accepted {
    line: u64,
    key: ImportedKey,
    /// The hash to store: peppered, if there is a pepper.
    stored: KeyHash,
}

/// The form of the lines.
#[derive(Debug)]
enum Format {
    Json,
    /// With its columns, once the first line is read.
    Table(Option<Columns>),
}

/// A running import, to which bytes are passed as they arrive.
#[derive(Debug)]
pub struct Import {
    writer: Writer,
    actor: Actor,
    pepper: Option<Pepper>,
    /// Nothing is written.
    is_dry_run: bool,
    format: Format,
    /// Splits the bytes into lines, and drops lines that are too long.
    lines: AnyDelimiterCodec,
    /// The incomplete line.
    begun: BytesMut,
    /// Lines so far.
    number: u64,
    seen: HashSet<KeyHash>,
    chunk: Vec<Accepted>,
    so_far: ImportReply,
    over: bool,
}

impl Import {
    /// With a pepper, keys are stored under their peppered hash.
    pub fn new(writer: Writer, actor: Actor, pepper: Option<Pepper>) -> Self {
        Self {
            writer,
            actor,
            pepper,
            is_dry_run: false,
            format: Format::Json,
            lines: AnyDelimiterCodec::new_with_max_length(b"\n".into(), Vec::new(), LINE_BYTES),
            begun: BytesMut::new(),
            number: 0,
            seen: HashSet::new(),
            chunk: Vec::new(),
            so_far: ImportReply::default(),
            over: false,
        }
    }

    /// Only checks the lines, and writes nothing.
    #[must_use]
    pub const fn dry_run(mut self, is_dry_run: bool) -> Self {
        self.is_dry_run = is_dry_run;
        self
    }

    /// The lines are those of a table, whose first line names the columns.
    #[must_use]
    pub fn table(mut self) -> Self {
        self.format = Format::Table(None);
        self
    }

    /// The result so far. Not all of its lines may be committed.
    pub const fn so_far(&self) -> &ImportReply {
        &self.so_far
    }

    /// Imports the lines that the next bytes complete. Returns whether more bytes are wanted. If it fails, committed lines
    /// stay imported.
    pub async fn take(&mut self, bytes: &[u8]) -> Result<bool, ApiError> {
        self.begun.extend_from_slice(bytes);
        while !self.over
            && let Some(line) = self.lines.decode(&mut self.begun).transpose()
        {
            self.line(line.ok()).await?;
        }
        Ok(!self.over)
    }

    /// Imports the last line, which may lack a line end, and commits the last keys.
    pub async fn finish(mut self) -> Result<ImportReply, ApiError> {
        if !self.over
            && let Some(line) = self.lines.decode_eof(&mut self.begun).transpose()
        {
            self.line(line.ok()).await?;
        }
        self.commit().await?;
        let ImportReply { imported, failed, .. } = self.so_far;
        let detail = json!({"imported": imported, "failed": failed});
        let event = AuditEvent { action: "import.finish", key_id: None, target: None, detail };
        if !self.is_dry_run {
            self.writer.change(&self.actor, async |change| change.record(event).await).await?;
        }
        self.so_far.errors.sort_by_key(|bad| bad.line);
        Ok(self.so_far)
    }

    /// Takes a line; none is one that is too long.
    async fn line(&mut self, line: Option<Bytes>) -> Result<(), ApiError> {
        self.number += 1;
        let number = self.number;
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
        let Some(text) = line else {
            self.fail(number, Code::TooLong, format!("a line has at most {LINE_BYTES} bytes"));
            return Ok(());
        };
        let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&text);
        if text.iter().all(u8::is_ascii_whitespace) {
            return Ok(());
        }
        let parsed = match &mut self.format {
            Format::Json => parse(text, OffsetDateTime::now_utc()),
            Format::Table(Some(columns)) => {
                columns.object(text).and_then(|line| parse_value(&line, OffsetDateTime::now_utc()))
            }
            Format::Table(columns) => {
                let read = Columns::read(text);
                *columns =
                    Some(read.map_err(|detail| ApiError::Invalid {
                        field: None,
                        detail: format!("line {number}: {detail}"),
                    })?);
                return Ok(());
            }
        };
        match parsed {
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
        let is_dry_run = self.is_dry_run;
        let work = async |change: &mut Change| {
            if is_dry_run { chunk::check(change, &chunk).await } else { chunk::write(change, &chunk).await }
        };
        let refused = self.writer.change(&self.actor, work).await?;
        self.so_far.imported += (chunk.len() - refused.len()) as u64;
        for (number, code, reason) in refused {
            self.fail(number, code, reason);
        }
        Ok(())
    }

    fn fail(&mut self, line: u64, code: Code, reason: String) {
        self.so_far.failed += 1;
        if self.so_far.errors.len() < ERRORS {
            self.so_far.errors.push(ImportError { line, code, reason });
        } else {
            self.so_far.errors_truncated = true;
        }
    }
}
