//! Orphans as lines of the conflict log show them.
//!
//! In:   a row as JSON, which may have any value of type `json`        Out: JSON that `jsonb` takes
//! Invariants: values that `jsonb` takes stay as they are; others are marked ([`crate::review::Unread`]), as in every line
//! Not here: marking them (`crate::review`); whether a row *may* have such a value is seen here, since many orphans are read at once and
//!        the server is not to be asked about each
//!
//! What `json` takes and `jsonb` does not: the character 0, halves of surrogate pairs alone, and numbers that no `numeric` can be.

use anabranch_proto::schema::TableDesc;

use super::super::failure::Failure;
use super::super::loss::Tuple;
use super::super::write::Writer;
use crate::review::as_jsonb;

/// Of numbers with more digits than this, its exponent counted in, it is not known here whether `numeric` takes them. (It takes 131072
/// before the point, 16383 after it.)
const DIGITS_MAX: u64 = 16_000;

impl Writer<'_> {
    /// The row; none where it is too long for a line.
    pub(super) async fn shown(&self, row: String, table: &TableDesc) -> Result<Tuple, Failure> {
        if is_taken(&row) {
            return Ok(Tuple::Json(row));
        }
        let type_of = |name: &str| {
            let column = table.columns.iter().find(|column| column.name == name);
            column.map_or_else(String::new, |column| column.type_name.clone())
        };
        let shown = as_jsonb(&self.session.client, &row, &type_of).await?;
        Ok(shown.map_or(Tuple::None, Tuple::Json))
    }
}

/// Does `jsonb` surely take this JSON, as the server wrote it?
fn is_taken(json: &str) -> bool {
    let mut rest = json;
    while let Some(at) = rest.find(|c: char| c == '"' || c == '-' || c.is_ascii_digit()) {
        rest = rest.get(at..).unwrap_or_default();
        let after = match rest.strip_prefix('"') {
            Some(text) => after_string(text),
            None => after_number(rest),
        };
        let Some(after) = after else { return false };
        rest = after;
    }
    true
}

/// What comes after a string, which begins behind its quote; none if it is not taken.
fn after_string(text: &str) -> Option<&str> {
    let mut rest = text;
    // Half of a pair that came before.
    let mut is_half = false;
    loop {
        let at = rest.find(['"', '\\'])?;
        if is_half && at > 0 {
            return None;
        }
        let (escape, after) = rest.get(at..)?.split_at_checked(1)?;
        if escape == "\"" {
            return (!is_half).then_some(after);
        }
        let (kind, after) = after.split_at_checked(1)?;
        if kind != "u" {
            if is_half {
                return None;
            }
            rest = after;
            continue;
        }
        let (digits, after) = after.split_at_checked(4)?;
        is_half = match (u32::from_str_radix(digits, 16).ok()?, is_half) {
            (0xD800..=0xDBFF, false) => true,
            (0xDC00..=0xDFFF, true) => false,
            (0 | 0xD800..=0xDFFF, _) | (_, true) => return None,
            _ => false,
        };
        rest = after;
    }
}

/// What comes after a number; none if it may not be taken.
fn after_number(text: &str) -> Option<&str> {
    let is_in = |c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.' | 'e' | 'E');
    let end = text.find(|c: char| !is_in(c)).unwrap_or(text.len());
    let (number, after) = text.split_at_checked(end)?;
    let (digits, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let exponent: i64 = exponent.parse().ok()?;
    let length = u64::try_from(digits.len())
        .ok()?
        .checked_add(exponent.unsigned_abs())?;
    (length <= DIGITS_MAX).then_some(after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_jsonb_takes_is_told_from_what_it_does_not() {
        for taken in [
            "{}",
            r#"{"id":1,"v":"a \" b \\u0000 c","n":null,"x":-1.5e-7}"#,
            r#"{"v":"\u0001 \uD83D\uDE00 \ud83d\ude00 \u00e9"}"#,
            r#"{"doc":[1e999, 12345678901234567890.5, {"a":true}]}"#,
        ] {
            assert!(is_taken(taken), "{taken}");
        }
        for refused in [
            r#"{"v":"\u0000"}"#,
            r#"{"v":"\\\u0000"}"#,
            r#"{"\u0000":1}"#,
            r#"["\ud83d"]"#,
            r#"["\ud83d x"]"#,
            r#"["\ud83d\n"]"#,
            r#"["\ud83d\u0041"]"#,
            r#"["\ude00"]"#,
            r#"["\ud83d\ud83d\ude00"]"#,
            "1e999999",
            "-1E-999999",
            "1e99999999999999999999",
        ] {
            assert!(!is_taken(refused), "{refused}");
        }
    }
}
