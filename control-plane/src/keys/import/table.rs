//! Lines of a table as lines of an import. The first line names the columns. The format is CSV (RFC 4180), but a cell cannot
//! contain a line break. An error repeats no part of a line, since any cell may be a key.

use serde_json::{Map, Value};

/// Columns whose cells are texts.
const TEXTS: [&str; 9] = ["email", "name", "key", "hash", "prefix", "plan", "kind", "external_id", "expires_at"];
/// Columns whose cells are lists, with spaces between their entries.
const LISTS: [&str; 3] = ["scopes", "roles", "allowed_addresses"];
const NUMBER: &str = "cost";
const SWITCH: &str = "disabled";
/// The prefix of columns with metadata.
const METADATA: &str = "metadata.";

/// The columns of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Columns(Vec<String>);

impl Columns {
    /// Reads the first line.
    ///
    /// # Errors
    /// If a column is unknown or occurs twice, or a required one is absent.
    pub fn read(line: &[u8]) -> Result<Self, String> {
        let names: Vec<String> = cells(line)?.into_iter().map(|name| name.trim().to_ascii_lowercase()).collect();
        let known = |name: &str| {
            TEXTS.contains(&name)
                || LISTS.contains(&name)
                || [NUMBER, SWITCH].contains(&name)
                || name.starts_with(METADATA)
        };
        for (place, name) in names.iter().enumerate() {
            if !known(name) {
                return Err(format!(
                    "column {} has no known name; the first line names the columns, which may be {}, {}, {NUMBER}, {SWITCH} \
                     and {METADATA}NAME; quotas and rate limits need lines of JSON",
                    place + 1,
                    TEXTS.join(", "),
                    LISTS.join(", ")
                ));
            }
            if names.iter().skip(place + 1).any(|other| other == name) {
                return Err(format!(
                    "column {} has the name of another column; give each column a name of its own",
                    place + 1
                ));
            }
        }
        for needed in ["email", "name"] {
            if !names.iter().any(|name| name == needed) {
                return Err(format!("the first line must name a column {needed}"));
            }
        }
        Ok(Self(names))
    }

    /// A line as the JSON object of an import. An empty cell leaves its field out.
    ///
    /// # Errors
    /// Why the line cannot be read.
    pub fn object(&self, line: &[u8]) -> Result<Value, String> {
        let cells = cells(line)?;
        if cells.len() != self.0.len() {
            return Err(format!("the line has {} cells, the first line has {}", cells.len(), self.0.len()));
        }
        let (mut fields, mut metadata) = (Map::new(), Map::new());
        for (name, cell) in self.0.iter().zip(cells) {
            let cell = cell.trim();
            if cell.is_empty() {
                continue;
            }
            if let Some(entry) = name.strip_prefix(METADATA) {
                metadata.insert(entry.to_owned(), cell.into());
            } else {
                fields.insert(name.clone(), value(name, cell)?);
            }
        }
        if !metadata.is_empty() {
            fields.insert("metadata".into(), metadata.into());
        }
        Ok(fields.into())
    }
}

fn value(column: &str, cell: &str) -> Result<Value, String> {
    if LISTS.contains(&column) {
        return Ok(cell.split_whitespace().collect());
    }
    match column {
        NUMBER => cell.parse::<i64>().map(Value::from).map_err(|_| format!("{NUMBER}: must be a whole number")),
        SWITCH => match cell.to_ascii_lowercase().as_str() {
            "true" => Ok(true.into()),
            "false" => Ok(false.into()),
            _ => Err(format!("{SWITCH}: must be true or false")),
        },
        _ => Ok(cell.into()),
    }
}

fn cells(line: &[u8]) -> Result<Vec<String>, String> {
    let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(line);
    let mut record = csv::StringRecord::new();
    match reader.read_record(&mut record) {
        Ok(_) => {}
        Err(_) => return Err("the line is not UTF-8".into()),
    }
    // Lines are split before they are parsed, so a quoted cell cannot contain a line break, and a file of an old Macintosh is one
    // line.
    if line.trim_ascii_end().contains(&b'\r') {
        return Err("a line must end with a line feed, or with a carriage return and a line feed".into());
    }
    if line.iter().filter(|byte| **byte == b'"').count() % 2 == 1 {
        return Err("a quoted cell must end on its line".into());
    }
    Ok(record.iter().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn cells_become_fields_of_their_types_and_empty_ones_are_left_out() {
        let columns = Columns::read(b"Email,name,key,scopes,cost,disabled,metadata.tenant\r").unwrap();
        let line = br#"u@example.com,"Legacy, old",0123456789abcdef,a:read  b:*,5,TRUE,"Acme ""A"" Ltd""#;
        let expected = json!({
            "email": "u@example.com", "name": "Legacy, old", "key": "0123456789abcdef", "scopes": ["a:read", "b:*"],
            "cost": 5, "disabled": true, "metadata": {"tenant": "Acme \"A\" Ltd"},
        });
        assert_eq!(columns.object(line), Ok(expected));
        let expected = json!({"email": "u@example.com", "name": "n", "key": "0123456789abcdef"});
        assert_eq!(columns.object(b"u@example.com,n,0123456789abcdef,,,,\r"), Ok(expected));
    }

    #[test]
    fn an_error_says_what_is_wrong_and_repeats_nothing_of_the_line() {
        for (first, reason) in [
            ("email,name,0123456789abcdef", "column 3 has no known name"),
            ("email,name,email", "column 1 has the name of another column"),
            ("email,key", "the first line must name a column name"),
        ] {
            let error = Columns::read(first.as_bytes()).unwrap_err();
            assert!(error.starts_with(reason) && !error.contains("0123"), "{error}");
        }
        let columns = Columns::read(b"email,name,cost,disabled").unwrap();
        for (line, reason) in [
            ("a,b", "the line has 2 cells, the first line has 4"),
            ("a,b,many,", "cost: must be a whole number"),
            ("a,b,,yes", "disabled: must be true or false"),
            ("a,b,1,true\rc,d,1,true", "a line must end with a line feed, or with a carriage return and a line feed"),
            ("a,\"b,1,true", "a quoted cell must end on its line"),
        ] {
            assert_eq!(columns.object(line.as_bytes()), Err(reason.to_owned()), "{line}");
        }
        assert_eq!(columns.object(b"\xff,b,,"), Err("the line is not UTF-8".to_owned()));
    }
}
