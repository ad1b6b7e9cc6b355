//! Output of results: JSON, or a table.

use std::io::{self, Write};

use clap::ValueEnum;
use serde_json::Value;

/// The format of a result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Aligned columns, for people.
    #[default]
    Table,
    /// JSON, as the REST API returns it.
    Json,
}

/// Writes JSON over several lines.
///
/// # Errors
/// If the output cannot be written.
pub fn json(to: &mut impl Write, value: &Value) -> io::Result<()> {
    writeln!(to, "{value:#}")
}

/// Writes rows in columns that are as wide as their widest cell. Lines have no trailing spaces.
///
/// # Errors
/// If the output cannot be written.
pub fn table<const N: usize>(to: &mut impl Write, names: [&str; N], rows: &[[String; N]]) -> io::Result<()> {
    let names = names.map(str::to_owned);
    let lines = || std::iter::once(&names).chain(rows);
    let mut widths = [0; N];
    for line in lines() {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for line in lines() {
        let cells: Vec<String> = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        writeln!(to, "{}", cells.join("  ").trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut out = Vec::new();
        table(&mut out, ["CHECK", "SAW"], &[["expiry".into(), "it ends".into()], ["é".into(), String::new()]]).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "CHECK   SAW\nexpiry  it ends\né\n");
    }
}
