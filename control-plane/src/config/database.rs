//! The address and the password of the database: `DATABASE_URL` and the variables of PostgreSQL's own programs
//! (`PGPASSWORD`, `PGPASSFILE`). Each secret may stand in a file.

use sqlx::postgres::PgConnectOptions;

use super::{Database, secret_setting};

/// The variable of `--database-url`.
const URL: &str = "DATABASE_URL";
const PASSWORD: &str = "PGPASSWORD";
const PASSWORD_FILES: &str = "PGPASSFILE";

/// What special characters in a URL need, and the way around it.
const REMEDY: &str = "percent-encode special characters of the password, or leave the password out and set PGPASSWORD or PGPASSWORD_FILE";

/// Options to connect to the database. An error has no password.
pub fn options(database: &Database) -> Result<PgConnectOptions, String> {
    let (given, from_file) =
        (database.database_url.as_deref().filter(|url| !url.is_empty()), secret_setting::read_file(URL));
    let url = match (given, from_file?) {
        (Some(url), None) => url.to_owned(),
        (None, Some(url)) => url,
        (Some(_), Some(_)) => {
            return Err(format!("{URL} (--database-url) and {URL}_FILE are both set; set only one"));
        }
        (None, None) => return Err(format!("{URL}: is not set; set it to postgres://user@host:port/database")),
    };
    let options = parse(&url)?;
    if let Some(path) = std::env::var_os(PASSWORD_FILES).filter(|path| !path.is_empty()) {
        std::fs::File::open(&path).map_err(|error| format!("{PASSWORD_FILES}: {}: {error}", path.display()))?;
    }
    // sqlx reads PGPASSWORD by itself, but not the file.
    match secret_setting::read_file(PASSWORD)? {
        Some(_) if has_password(&url) => {
            Err(format!("{URL} contains a password and {PASSWORD}_FILE is set; set only one"))
        }
        Some(password) => Ok(options.password(&password)),
        None => Ok(options),
    }
}

fn parse(url: &str) -> Result<PgConnectOptions, String> {
    if !(url.starts_with("postgres://") || url.starts_with("postgresql://")) {
        return Err(format!("{URL}: must have the form postgres://user@host:port/database"));
    }
    // Such a URL can be parsed, but names another host than was meant.
    if url.contains('#') || (!authority(url).contains('@') && url.contains('@')) {
        return Err(format!("{URL}: has a # / or ? that ends its user, password or host; {REMEDY}"));
    }
    let options: PgConnectOptions = url.parse().map_err(|error| format!("{URL}: {error}; {REMEDY}"))?;
    Ok(options.application_name("portcullis"))
}

/// User, password, host and port.
fn authority(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split(['/', '?', '#']).next().unwrap_or_default()
}

fn has_password(url: &str) -> bool {
    let user = authority(url).rsplit_once('@').map_or("", |(user, _)| user);
    let query = url.split_once('?').map_or("", |(_, query)| query);
    user.contains(':') || query.split('&').any(|parameter| parameter.starts_with("password="))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_that_breaks_the_url_is_an_error_that_tells_the_remedy_and_not_the_password() {
        for url in [
            "postgres://portcullis:secret/x@host/db",
            "postgres://portcullis:12/x@host/db",
            "postgres://portcullis:12?x@host/db",
            "postgres://portcullis:secret#x@host/db",
            "postgres://portcullis:#x@host/db",
            "postgres://portcullis:secret/@host:5432/db",
        ] {
            let error = parse(url).unwrap_err();
            assert!(error.starts_with("DATABASE_URL: ") && error.ends_with(REMEDY), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
        assert_eq!(
            parse("nonsense").unwrap_err(),
            "DATABASE_URL: must have the form postgres://user@host:port/database"
        );
        for url in [
            "postgres://u:a%2Fb%23c%40d@host/db?sslmode=disable",
            "postgres://localhost/db?host=/tmp/x",
            "postgresql://u@h/db?application_name=a@b",
        ] {
            assert!(parse(url).is_ok(), "{url}");
        }
    }

    #[test]
    fn a_password_is_found_wherever_a_url_has_it() {
        for (url, expected) in [
            ("postgres://u:p@h/db", true),
            ("postgres://u@h:5432/db", false),
            ("postgres://h:5432/db?sslmode=disable&password=x", true),
            ("postgres:///db?host=/tmp", false),
        ] {
            assert_eq!(has_password(url), expected, "{url}");
        }
    }
}
