//! Output of results as a table, JSON or CSV.

use std::io::{self, Write};

use clap::ValueEnum;
use serde_json::{Map, Value};

/// The format of a result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Aligned columns, for people.
    #[default]
    Table,
    /// The JSON of the REST API; for a list, the entries of all its pages.
    Json,
    /// Comma-separated values, for spreadsheets.
    Csv,
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
pub fn table<R: AsRef<[String]>>(to: &mut impl Write, names: &[&str], rows: &[R]) -> io::Result<()> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let lines = || std::iter::once(names.as_slice()).chain(rows.iter().map(AsRef::as_ref));
    let mut widths = vec![0; names.len()];
    for line in lines() {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for line in lines() {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        writeln!(to, "{}", cells.join("  ").trim_end())?;
    }
    Ok(())
}

/// Writes entries with these members as columns.
///
/// # Errors
/// If the output cannot be written.
pub fn entries(to: &mut impl Write, columns: &[&str], entries: &[Value]) -> io::Result<()> {
    let names: Vec<String> = columns.iter().map(|column| column.replace('_', " ").to_uppercase()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let row = |entry: &Value| columns.iter().map(|column| cell(&entry[*column])).collect::<Vec<String>>();
    table(to, &names, &entries.iter().map(row).collect::<Vec<_>>())
}

/// Writes the members of an object, one on a line.
///
/// # Errors
/// If the output cannot be written.
pub fn members(to: &mut impl Write, members: &Map<String, Value>) -> io::Result<()> {
    let width = members.keys().map(String::len).max().unwrap_or_default();
    for (name, value) in members {
        let line = format!("{name:width$}  {}", cell(value));
        writeln!(to, "{}", line.trim_end())?;
    }
    Ok(())
}

/// Writes entries as comma-separated values (RFC 4180), with all of their members as columns.
///
/// # Errors
/// If the output cannot be written.
pub fn csv(to: &mut impl Write, entries: &[Value]) -> io::Result<()> {
    let mut columns: Vec<&String> = Vec::new();
    for name in entries.iter().filter_map(Value::as_object).flat_map(Map::keys) {
        if !columns.contains(&name) {
            columns.push(name);
        }
    }
    let quoted = |text: &str| match text.contains(['"', ',', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    };
    let names: Vec<String> = columns.iter().map(|name| quoted(name)).collect();
    write!(to, "{}\r\n", names.join(","))?;
    for entry in entries {
        let cells: Vec<String> = columns.iter().map(|name| quoted(&safe(&cell(&entry[name.as_str()])))).collect();
        write!(to, "{}\r\n", cells.join(","))?;
    }
    Ok(())
}

/// The text of a value. Several texts are separated by spaces.
fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(all) if all.iter().all(Value::is_string) => all.iter().map(cell).collect::<Vec<_>>().join(" "),
        other => other.to_string(),
    }
}

/// Keeps a spreadsheet from taking a text for a formula.
fn safe(cell: &str) -> String {
    let is_formula = cell.starts_with(['=', '+', '-', '@', '\t', '\r']) && cell.parse::<f64>().is_err();
    if is_formula { format!("'{cell}") } else { cell.to_owned() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut out = Vec::new();
        table(&mut out, &["CHECK", "SAW"], &[["expiry".into(), "it ends".into()], ["é".into(), String::new()]])
            .unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "CHECK   SAW\nexpiry  it ends\né\n");
    }

    #[test]
    fn entries_are_tables_lines_and_comma_separated_values() {
        let entries = [
            json!({"id": 1, "name": "a, \"b\"", "scopes": ["x", "y"]}),
            json!({"id": -2, "name": "=1+1", "scopes": [], "quota": {"requests": 5}}),
        ];
        let mut out = Vec::new();
        super::entries(&mut out, &["id", "scopes"], &entries).unwrap();
        members(&mut out, entries[1].as_object().unwrap()).unwrap();
        csv(&mut out, &entries).unwrap();
        let expected = "\
ID  SCOPES
1   x y
-2
id      -2
name    =1+1
quota   {\"requests\":5}
scopes
id,name,scopes,quota\r
1,\"a, \"\"b\"\"\",x y,\r
-2,'=1+1,,\"{\"\"requests\"\":5}\"\r
";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
