//! Tables as CSV (RFC 4180): fields come in, lines go out. A field that a spreadsheet would take for a formula gets an
//! apostrophe in front, so that no name of a key or scope runs anything on the machine of whoever opens the file.

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
    let formula = text.starts_with(['=', '+', '-', '@', '\t', '\r', '\n']) && text.parse::<i64>().is_err();
    if !formula && !text.contains([',', '"', '\r', '\n']) {
        out.push_str(text);
        return;
    }
    out.push('"');
    if formula {
        out.push('\'');
    }
    out.push_str(&text.replace('"', "\"\""));
    out.push('"');
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
            ("\t=1", "\"'\t=1\"\r\n"),
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
