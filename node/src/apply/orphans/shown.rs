//! Rows as the conflict log can take them.
//!
//! In:   a row as JSON, which may have any value of type `json`        Out: JSON that `jsonb` takes
//! Invariants: values that `jsonb` takes stay as they are; others are shown as the text that they are
//!
//! What `json` takes and `jsonb` does not: the character 0, halves of surrogate pairs alone, and numbers that no `numeric` can be.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

/// Of numbers with more digits than this, its exponent counted in, it is not asked whether `numeric` takes them. (It takes 131072 before the
/// point, 16383 after it.)
const DIGITS_MAX: u64 = 16_000;

/// The row, with columns as texts where their values are not for `jsonb`.
pub(super) fn as_jsonb(json: String) -> String {
    if is_taken(&json) {
        return json;
    }
    let Ok(mut columns) = serde_json::from_str::<BTreeMap<String, Box<RawValue>>>(&json) else {
        return json;
    };
    for value in columns.values_mut() {
        if !is_taken(value.get())
            && let Ok(text) = serde_json::value::to_raw_value(value.get())
        {
            *value = text;
        }
    }
    serde_json::to_string(&columns).unwrap_or(json)
}

/// Does `jsonb` take this JSON, as the server wrote it?
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

    #[test]
    fn only_the_columns_that_are_not_taken_are_texts() {
        let row = r#"{"id":7,"doc":{"a": "\u0000"},"big":1e999999,"v":"é"}"#;
        let shown: serde_json::Value = serde_json::from_str(&as_jsonb(row.to_owned())).unwrap();
        let expected = serde_json::json!({"id": 7, "doc": r#"{"a": "\u0000"}"#, "big": "1e999999", "v": "é"});
        assert_eq!(shown, expected);
        let fine = r#"{"id":7, "v":"x"}"#;
        assert_eq!(as_jsonb(fine.to_owned()), fine);
    }
}
