//! Secrets among the settings. The variable `NAME` holds the secret, or `NAME_FILE` names a file that holds it.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;

/// Longest secret that is read from a file, in bytes.
const MOST_BYTES: u64 = 64 * 1_024;

/// The secret of this name; `None` if neither variable is set. An empty variable counts as not set. An error has nothing of
/// the secret.
pub fn read(name: &str) -> Result<Option<String>, String> {
    choose(name, |variable| std::env::var_os(variable))
}

/// The file that `NAME_FILE` names, as [`read`] takes it; `None` if that variable is not set.
pub fn read_file(name: &str) -> Result<Option<String>, String> {
    let file_variable = format!("{name}_FILE");
    if std::env::var_os(&file_variable).is_none_or(|path| path.is_empty()) { Ok(None) } else { read(name) }
}

fn choose(name: &str, variable: impl Fn(&str) -> Option<OsString>) -> Result<Option<String>, String> {
    let file_variable = format!("{name}_FILE");
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    match (set(name), set(&file_variable)) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err(format!("{name} and {file_variable} are both set; set only one")),
        (Some(value), None) => value.into_string().map(Some).map_err(|_| format!("{name}: is not UTF-8")),
        (None, Some(path)) => {
            let shown = path.display();
            let fault = |why: &dyn std::fmt::Display| format!("{file_variable}: {shown}: {why}");
            let mut content = String::new();
            let file = File::open(&path).map_err(|error| fault(&error))?;
            let read = file.take(MOST_BYTES.saturating_add(1)).read_to_string(&mut content);
            let bytes = read.map_err(|error| fault(&error))?;
            if bytes as u64 > MOST_BYTES {
                return Err(fault(&format!("is longer than {MOST_BYTES} bytes")));
            }
            // Editors and `echo` end the line.
            let secret = content.strip_suffix('\n').unwrap_or(&content);
            let secret = secret.strip_suffix('\r').unwrap_or(secret);
            if secret.is_empty() { Err(fault(&"is empty")) } else { Ok(Some(secret.to_owned())) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(value: Option<&str>, file: Option<&str>) -> Result<Option<String>, String> {
        choose("SECRET", |variable| match variable {
            "SECRET" => value.map(Into::into),
            "SECRET_FILE" => file.map(Into::into),
            other => panic!("{other}"),
        })
    }

    #[test]
    fn a_secret_comes_from_its_variable_or_from_the_file_that_is_named_but_not_from_both() {
        let path = std::env::temp_dir().join(format!("portcullis-secret-{}", uuid::Uuid::now_v7()));
        let file = path.to_str();
        assert_eq!(chosen(None, None), Ok(None));
        assert_eq!(chosen(Some(""), Some("")), Ok(None));
        assert_eq!(chosen(Some("here"), Some("")), Ok(Some("here".into())));
        let missing = chosen(None, file).unwrap_err();
        assert_eq!(missing, format!("SECRET_FILE: {}: No such file or directory (os error 2)", path.display()));
        for (content, secret) in
            [("there", "there"), ("there\n", "there"), ("there\r\n", "there"), (" t \n\n", " t \n")]
        {
            std::fs::write(&path, content).unwrap();
            assert_eq!(chosen(Some(""), file), Ok(Some(secret.into())), "{content:?}");
        }
        assert_eq!(chosen(Some("here"), file), Err("SECRET and SECRET_FILE are both set; set only one".into()));
        std::fs::write(&path, "\n").unwrap();
        assert_eq!(chosen(None, file), Err(format!("SECRET_FILE: {}: is empty", path.display())));
        std::fs::write(&path, [b'x'; 65_537]).unwrap();
        assert_eq!(chosen(None, file), Err(format!("SECRET_FILE: {}: is longer than 65536 bytes", path.display())));
        std::fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(chosen(None, file).unwrap_err().ends_with("stream did not contain valid UTF-8"));
        std::fs::remove_file(&path).unwrap();
        assert!(chosen(None, Some("/")).unwrap_err().starts_with("SECRET_FILE: /: "));
    }
}
