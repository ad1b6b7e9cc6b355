//! Imports the usage that Envoys wrote into their logs when they ended.
//!
//! A line counts if Envoy's own log prefix begins it and a sync key has signed it, and only for reporters of that key.
//! Access logs also contain text that clients sent, so an unsigned line proves nothing. Reports that arrived before are
//! skipped by their number, so a log can be imported again.

use std::io::BufRead;
use std::time::Duration;

use contract::usage::{Report, read_reports};
use contract::usage_log::{MARK, SignedReports};
use serde_json::{Map, Value};
use sqlx::PgPool;
use uuid::Uuid;

use super::apply::{Applied, NEW_REPORTERS, Submission, apply};
use super::ingest::{REPORTS, check, no_later_than, now};
use super::log_keys::Verifier;
use super::retention::REPORTER_DAYS;

/// Most refused lines that an import reports with the reason. It only counts further ones.
const TOLD: usize = 1_000;

/// What stands before the name of the plugin in each message that a filter logs.
const MESSAGE: &str = "wasm log";

const OLD: &str = "the usage is older than the 90 days for which the numbers of reports are kept, so it may have been applied \
                   before: import logs sooner";

const ELSEWHERE: &str = "the usage does not stand where Envoy's own log prefix begins the line, as in \
                         `[2027-01-31 12:00:00.000][1][warning][wasm] [source/…] wasm log …: portcullis-usage …`: \
                         a client may have sent it. Give the log as Envoy wrote it, with nothing before its prefix";

/// What an import found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Reports that were applied.
    pub applied: usize,
    /// Reports that had been applied before.
    pub known: usize,
    /// Lines with the mark that were refused: their number, and why. The first thousand.
    pub bad: Vec<(usize, String)>,
    /// How many lines were refused.
    pub refused: usize,
}

impl Imported {
    fn refuse(&mut self, line: usize, why: String) {
        self.refused += 1;
        if self.bad.len() < TOLD {
            self.bad.push((line, why));
        }
    }

    fn refuse_all(&mut self, found: &[Found], why: &str) {
        let mut lines: Vec<usize> = found.iter().map(|found| found.line).collect();
        lines.dedup();
        for line in lines {
            self.refuse(line, why.to_owned());
        }
    }
}

/// A report of a line that was verified.
struct Found {
    line: usize,
    sync_key: Uuid,
    report: Report,
}

/// Imports all that is in a log.
///
/// # Errors
/// If the log cannot be read or the database does not take it; what was applied until then stays applied.
pub async fn import(pool: &PgPool, log: impl BufRead) -> Result<Imported, Box<dyn std::error::Error>> {
    let verifier = Verifier::load(pool).await?;
    let mut imported = Imported::default();
    let mut found = Vec::new();
    for (number, line) in (1..).zip(log.split(b'\n')) {
        match read(&line?, &verifier) {
            Ok((sync_key, reports)) => {
                found.extend(reports.into_iter().map(|report| Found { line: number, sync_key, report }));
            }
            Err(Some(why)) => imported.refuse(number, why),
            Err(None) => {}
        }
    }
    // The lines of one Envoy may stand in any order, as where logs were joined: a number that comes late would be skipped.
    found.sort_by_key(|found| (found.report.reporter, found.sync_key, found.report.seq));
    let of_one =
        |one: &Found, next: &Found| (one.report.reporter, one.sync_key) == (next.report.reporter, next.sync_key);
    for found in found.chunk_by(of_one).flat_map(|all| all.chunks(REPORTS)) {
        let Some(Found { sync_key, report, .. }) = found.first() else { continue };
        let submission = Submission {
            reporter: report.reporter,
            sync_key: Some(*sync_key),
            reports: found.iter().map(|found| found.report.clone()).collect(),
        };
        for applied in apply(pool, &[submission]).await? {
            match applied {
                Applied::UpTo { fresh, .. } => {
                    imported.applied += fresh;
                    imported.known += found.len() - fresh;
                }
                Applied::Foreign => imported.refuse_all(
                    found,
                    &format!(
                        "the Envoy {} belongs to another sync key than the one that signed the line",
                        report.reporter
                    ),
                ),
                Applied::TooMany => imported.refuse_all(
                    found,
                    &format!(
                        "the sync key that signed the line has had {NEW_REPORTERS} new Envoys within a day: import the \
                         line again tomorrow"
                    ),
                ),
            }
        }
    }
    imported.bad.sort();
    Ok(imported)
}

/// The reports of a line and the sync key that signed them. No error if the line has no usage.
fn read(line: &[u8], verifier: &Verifier) -> Result<(Uuid, Vec<Report>), Option<String>> {
    let signed = signed_usage(line)?.ok_or(None)?;
    let sync_key = verifier.signer(&signed)?;
    let mut reports = read_reports(&signed.reports).map_err(|error| error.to_string())?;
    check(&reports).map_err(|error| error.to_string())?;
    if reports.iter().any(|report| may_be_forgotten(report, now())) {
        return Err(Some(OLD.into()));
    }
    no_later_than(&mut reports, now());
    Ok((sync_key, reports))
}

/// Whether the number of a report may be forgotten by now. A report arrives in the hour of its newest count or later, and its
/// number is kept for [`REPORTER_DAYS`] from then.
fn may_be_forgotten(report: &Report, now: Duration) -> bool {
    let kept = Duration::from_hours(24) * REPORTER_DAYS.unsigned_abs();
    let newest = report.counts.iter().map(|count| Duration::from_hours(count.of.hour.into())).max();
    newest.is_some_and(|newest| newest < now.saturating_sub(kept))
}

/// The reports of a line, not verified yet. None if the line has no usage.
///
/// # Errors
/// Why usage in the line does not count.
pub fn signed_usage(line: &[u8]) -> Result<Option<SignedReports>, String> {
    let Some(text) = signed_text(line)? else { return Ok(None) };
    SignedReports::parse(&text).map(Some).map_err(|error| error.to_string())
}

/// What follows the mark, if the line has it.
fn signed_text(line: &[u8]) -> Result<Option<Vec<u8>>, String> {
    let mark = MARK.as_bytes();
    if !line.windows(mark.len()).any(|window| window == mark) {
        return Ok(None);
    }
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let message = if line.starts_with(b"{") { json_message(line) } else { plain_message(line).map(<[u8]>::to_vec) };
    // The plugin's name follows, which the operator chose, and the first colon ends it.
    let text = message.as_deref().and_then(|message| {
        let colon = message.windows(2).position(|window| window == b": ")?;
        message.get(colon + 2..)?.strip_prefix(mark)
    });
    text.map(|text| Some(text.to_vec())).ok_or_else(|| ELSEWHERE.into())
}

/// The message behind Envoy's default prefix, `[%Y-%m-%d %T.%e][%t][%l][%n] [%g:%#] `, in which the place in Envoy's source
/// may be missing.
fn plain_message(line: &[u8]) -> Option<&[u8]> {
    let (time, rest) = bracketed(line)?;
    let digits = |text: &[u8]| !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let shape: Vec<u8> = time.iter().map(|byte| if byte.is_ascii_digit() { b'0' } else { *byte }).collect();
    let (thread, rest) = bracketed(rest)?;
    let (level, rest) = bracketed(rest)?;
    let (logger, rest) = bracketed(rest)?;
    let prefix = shape.starts_with(b"0000-00-00 00:00:00.") && digits(&time[20..]) && digits(thread);
    if !prefix || !level.iter().all(u8::is_ascii_lowercase) || logger != b"wasm" {
        return None;
    }
    let rest = rest.strip_prefix(b" ")?;
    let rest = bracketed(rest).and_then(|(_place, rest)| rest.strip_prefix(b" ")).unwrap_or(rest);
    rest.starts_with(MESSAGE.as_bytes()).then_some(rest)
}

fn bracketed(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let inside = line.strip_prefix(b"[")?;
    let end = inside.iter().position(|byte| *byte == b']')?;
    Some((&inside[..end], &inside[end + 1..]))
}

/// The message of a line in JSON, as Envoy writes it with `log_format.json_format` or a `--log-format` with `%j`: the one
/// text of the object that a filter can have logged.
fn json_message(line: &[u8]) -> Option<Vec<u8>> {
    let object: Map<String, Value> = serde_json::from_slice(line).ok()?;
    let mut messages = object.values().filter_map(Value::as_str).filter(|text| text.starts_with(MESSAGE));
    let message = messages.next().filter(|_| messages.next().is_none())?;
    Some(message.as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(line: &str) -> Option<String> {
        match signed_text(line.as_bytes()) {
            Ok(text) => Some(String::from_utf8(text.unwrap()).unwrap()),
            Err(why) => {
                assert_eq!(why, ELSEWHERE);
                None
            }
        }
    }

    #[test]
    fn usage_is_found_behind_the_prefix_that_envoy_writes() {
        for line in [
            "[2026-11-24 02:44:59.439][1][warning][wasm] [source/extensions/common/wasm/context.cc:1195] wasm log portcullis portcullis: portcullis-usage 0aFf 12",
            "[2026-11-24 02:44:59.439][17][error][wasm] wasm log: portcullis-usage 0aFf 12\r",
            r#"{"level": "warning", "time": "2026", "message": "wasm log portcullis: portcullis-usage 0aFf 12"}"#,
        ] {
            assert_eq!(found(line).as_deref(), Some("0aFf 12"), "{line}");
        }
        assert_eq!(signed_text(b"\xff\xfe nothing here"), Ok(None));
        assert_eq!(signed_text(b"[2026-11-24 02:44:59.436][1][warning][main] caught ENVOY_SIGTERM"), Ok(None));
    }

    #[test]
    fn usage_anywhere_else_is_refused() {
        for line in [
            "portcullis-usage 0aff 12",
            "wasm log portcullis: portcullis-usage 0aff 12",
            "[2026-11-24T02:44:59.439Z] \"GET / HTTP/1.1\" 401 - \"portcullis-usage 0aff 12\"",
            "[2026-11-24 02:44:59.439] \"GET /\" wasm log x: portcullis-usage 0aff 12",
            "[2026-11-24 02:44:59.439][1][warning][main] wasm log x: portcullis-usage 0aff 12",
            "[2026-11-24 02:44:59.x][1][warning][wasm] wasm log x: portcullis-usage 0aff 12",
            "[][1][warning][wasm] wasm log x: portcullis-usage 0aff 12",
            "[2026-11-24 02:44:59.439][1][warning][wasm] wasm log x: agent: portcullis-usage 0aff 12",
            "[2026-11-24 02:44:59.439][1][warning][wasm] agent portcullis-usage 0aff 12",
            "envoy-1  | [2026-11-24 02:44:59.439][1][warning][wasm] wasm log x: portcullis-usage 0aff 12",
            r#"{"user_agent": "portcullis-usage 0aff 12"}"#,
            r#"{"message": "wasm log x: portcullis-usage 0aff 12", "agent": "wasm log x: portcullis-usage 0aff 12"}"#,
            r#"{"message": {"inner": "wasm log x: portcullis-usage 0aff 12"}}"#,
            r#"{"message": "wasm log x: portcullis-usage 0aff 12""#,
        ] {
            assert_eq!(found(line), None, "{line}");
        }
    }
}
