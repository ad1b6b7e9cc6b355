//! Reads the last words of Envoys from their logs: lines with `portcullis-usage` and the reports in hexadecimal. What had
//! arrived before is skipped by its number, so a log can be imported as often as one likes.

use std::io::BufRead;

use contract::usage::{Report, read_reports};
use sqlx::PgPool;

use super::apply::{Applied, Submission, apply};
use super::ingest::{REPORTS, check, no_later_than, now};

/// What stands before the reports, with whatever Envoy puts before it.
const MARK: &str = "portcullis-usage ";

/// What an import found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Reports that were applied.
    pub applied: usize,
    /// Reports that had been applied before.
    pub known: usize,
    /// Lines that carry the mark and cannot be read: their number, and why.
    pub bad: Vec<(usize, String)>,
}

/// Imports all that is in a log.
///
/// # Errors
/// If the log cannot be read or the database does not take it; what was applied until then stays applied.
pub async fn import(pool: &PgPool, log: impl BufRead) -> Result<Imported, Box<dyn std::error::Error>> {
    let mut imported = Imported::default();
    let mut found = Vec::new();
    for (number, line) in (1..).zip(log.split(b'\n')) {
        let line = line?;
        let Some(text) = marked(&line) else { continue };
        match read(text) {
            Ok(reports) => found.extend(reports),
            Err(why) => imported.bad.push((number, why)),
        }
    }
    // The lines of one Envoy may stand in any order, as where logs were joined: a number that comes late would be skipped.
    found.sort_by_key(|report| (report.reporter, report.seq));
    for reports in found.chunk_by(|one, next| one.reporter == next.reporter).flat_map(|all| all.chunks(REPORTS)) {
        let Some(first) = reports.first() else { continue };
        let submission = Submission { reporter: first.reporter, sync_key: None, reports: reports.to_vec() };
        for applied in apply(pool, &[submission]).await? {
            let Applied::UpTo { fresh, .. } = applied else { continue };
            imported.applied += fresh;
            imported.known += reports.len() - fresh;
        }
    }
    Ok(imported)
}

fn read(text: &[u8]) -> Result<Vec<Report>, String> {
    let bytes = hex::decode(text).map_err(|error| error.to_string())?;
    let mut reports = read_reports(&bytes).map_err(|error| error.to_string())?;
    check(&reports).map_err(|error| error.to_string())?;
    no_later_than(&mut reports, now());
    Ok(reports)
}

/// The hexadecimal digits after the mark, if the line has it.
fn marked(line: &[u8]) -> Option<&[u8]> {
    let start = line.windows(MARK.len()).position(|window| window == MARK.as_bytes())? + MARK.len();
    let rest = &line[start..];
    let end = rest.iter().position(|byte| !byte.is_ascii_hexdigit()).unwrap_or(rest.len());
    Some(&rest[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reports_are_found_behind_whatever_envoy_puts_before_them() {
        assert_eq!(marked(b"[2026][warning][wasm] wasm log portcullis: portcullis-usage 0aFf\r"), Some(&b"0aFf"[..]));
        assert_eq!(marked(b"portcullis-usage "), Some(&b""[..]));
        assert_eq!(marked(b"\xff\xfe nothing here"), None);
    }
}
