//! Errors for people: what PostgreSQL said, whole.

use std::fmt::Write as _;

/// A server's error with its SQLSTATE, detail and hint; tokio-postgres alone prints "db error".
#[must_use]
pub fn sql(error: &tokio_postgres::Error) -> String {
    let Some(db) = error.as_db_error() else {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(inner) = source {
            let _ = write!(text, ": {inner}");
            source = inner.source();
        }
        return text;
    };
    let mut text = format!("{} (SQLSTATE {})", db.message(), db.code().code());
    for (name, part) in [("detail", db.detail()), ("hint", db.hint())] {
        if let Some(part) = part {
            let _ = write!(text, "; {name}: {part}");
        }
    }
    if crate::pg::is_of_row_security(error) {
        text.push_str(
            "; rows would be left out, which this role must see: as a superuser, ALTER ROLE ... BYPASSRLS",
        );
    }
    text
}

/// An error with its causes, outermost first, each said once.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        // The server's own message hides behind a bare `db error`.
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
