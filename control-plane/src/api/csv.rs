//! Tables as CSV (RFC 4180), safe to open in a spreadsheet.
//!
//! A spreadsheet runs formulas of the files that it opens. An apostrophe therefore stands before each character
//! that could begin a formula: at the start of a field, and after each separator within it, since spreadsheets of
//! other locales separate fields by other characters.

use unicode_normalization::UnicodeNormalization;

/// Separators of fields in spreadsheets, besides tabs and line ends.
const SEPARATORS: [char; 5] = [',', ';', '|', ':', '\u{ff1b}'];

/// Adds one line.
pub fn line<'a>(out: &mut String, fields: impl IntoIterator<Item = &'a str>) {
    for (place, text) in fields.into_iter().enumerate() {
        if place > 0 {
            out.push(',');
        }
        field(out, text);
    }
    out.push_str("\r\n");
}

fn field(out: &mut String, text: &str) {
    let number = text.parse::<i64>().is_ok();
    let formula = |place: usize| !number && begins_formula(text, place);
    let marked = text.char_indices().any(|(place, _)| formula(place));
    if !marked && !text.contains([',', '"', '\r', '\n']) {
        out.push_str(text);
        return;
    }
    out.push('"');
    for (place, character) in text.char_indices() {
        if formula(place) {
            out.push('\'');
        }
        if character == '"' {
            out.push('"');
        }
        out.push(character);
    }
    out.push('"');
}

/// Whether the text from this place on would be a formula, were it a field of its own.
fn begins_formula(text: &str, place: usize) -> bool {
    let (before, from) = text.split_at_checked(place).unwrap_or((text, ""));
    // Full-width and small forms are signs of formulas too.
    let sign = from.chars().take(1).nfkc().next().is_some_and(|first| ['=', '+', '-', '@'].contains(&first));
    let skipped = |character: char| character.is_whitespace() || character == '"' || character == '\'';
    let separator = |character: char| SEPARATORS.contains(&character) || character.is_control();
    let blank = before.trim_end_matches(|character| skipped(character) && !separator(character));
    sign && (blank.is_empty() || blank.ends_with(separator))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_quoted_where_they_must_be_and_formulas_become_text() {
        for (text, expected) in [
            ("a b", "a b\r\n"),
            ("", "\r\n"),
            ("-12", "-12\r\n"),
            ("a,b", "\"a,b\"\r\n"),
            ("say \"a\"", "\"say \"\"a\"\"\"\r\n"),
            ("two\nlines", "\"two\nlines\"\r\n"),
            ("=1+1", "\"'=1+1\"\r\n"),
            ("+1+1", "\"'+1+1\"\r\n"),
            ("-1+1", "\"'-1+1\"\r\n"),
            ("@SUM(A1)", "\"'@SUM(A1)\"\r\n"),
            ("\t=1", "\"\t'=1\"\r\n"),
            (" =1", "\" '=1\"\r\n"),
            ("x;=1+1", "\"x;'=1+1\"\r\n"),
            ("x; @A1;-1", "\"x; '@A1;'-1\"\r\n"),
            ("x;\"=1+1\"", "\"x;\"\"'=1+1\"\"\"\r\n"),
            ("x,+1|=2", "\"x,'+1|'=2\"\r\n"),
            ("x\t=1", "\"x\t'=1\"\r\n"),
            ("x\n=1", "\"x\n'=1\"\r\n"),
            ("\u{ff1d}1+1", "\"'\u{ff1d}1+1\"\r\n"),
            ("\u{ff0b}1", "\"'\u{ff0b}1\"\r\n"),
            ("\u{fe63}1", "\"'\u{fe63}1\"\r\n"),
            ("\u{ff20}A1", "\"'\u{ff20}A1\"\r\n"),
            ("a-b", "a-b\r\n"),
            ("user+tag@example.com", "user+tag@example.com\r\n"),
            ("orders:read", "orders:read\r\n"),
            ("2026-05-15T14:30:00Z", "2026-05-15T14:30:00Z\r\n"),
        ] {
            let mut out = String::new();
            line(&mut out, [text]);
            assert_eq!(out, expected);
        }
        let mut out = String::new();
        line(&mut out, ["a", "", "b"]);
        assert_eq!(out, "a,,b\r\n");
    }
}
