//! JSON as a server says it, in which no number becomes another one.
//!
//! In:   text            Out: a [`Value`]
//! Not here: where the text itself can be kept, which is better (`crate::heal`, `crate::review`)

use std::collections::BTreeMap;

use serde_json::value::RawValue;
use serde_json::{Map, Value};

/// Documents are looked through as deep as this; what lies deeper is as a [`Value`] has it.
const DEPTH_MAX: u32 = 16;

/// What this JSON says; a number that a [`Value`] does not hold digit by digit (a `numeric` of many) is a string. None where it is no JSON.
pub(super) fn exact(text: &str) -> Option<Value> {
    exact_within(text, DEPTH_MAX)
}

fn exact_within(text: &str, depth: u32) -> Option<Value> {
    let text = text.trim();
    match text.as_bytes().first()? {
        b'{' if depth > 0 => {
            let fields: BTreeMap<String, Box<RawValue>> = serde_json::from_str(text).ok()?;
            let fields = fields
                .into_iter()
                .map(|(name, value)| Some((name, exact_within(value.get(), depth - 1)?)));
            fields.collect::<Option<Map<String, Value>>>().map(Value::Object)
        }
        b'[' if depth > 0 => {
            let values: Vec<Box<RawValue>> = serde_json::from_str(text).ok()?;
            let values = values.iter().map(|value| exact_within(value.get(), depth - 1));
            values.collect::<Option<Vec<Value>>>().map(Value::Array)
        }
        b'-' | b'0'..=b'9' => number(text),
        _ => serde_json::from_str(text).ok(),
    }
}

fn number(text: &str) -> Option<Value> {
    // Is it one?
    serde_json::from_str::<&RawValue>(text).ok()?;
    Some(match serde_json::from_str::<Value>(text) {
        Ok(value) if decimal(&value.to_string()) == decimal(text) => value,
        _ => Value::String(text.to_owned()),
    })
}

/// Sign, the digits between the zeros at both ends, and the power of ten of the last one: the same for equal numbers. None where the
/// exponent is none that a number of a server has.
fn decimal(text: &str) -> Option<(bool, String, i64)> {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (text, 0),
    };
    let (is_negative, mantissa) = match mantissa.strip_prefix('-') {
        Some(mantissa) => (true, mantissa),
        None => (false, mantissa),
    };
    let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{part}");
    let significant = digits.trim_end_matches('0');
    let zeros = i64::try_from(digits.len() - significant.len()).ok()?;
    let significant = significant.trim_start_matches('0');
    if significant.is_empty() {
        return Some((false, String::new(), 0));
    }
    let power = i64::from(exponent) - i64::try_from(part.len()).ok()? + zeros;
    Some((is_negative, significant.to_owned(), power))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn no_number_becomes_another_one() {
        let long = "123456789012345678901234567890.5";
        let huge = format!("9{}", "0".repeat(400));
        let text = format!(
            r#"{{"a": 1, "b": {long}, "c": [{long}, -0.10, 1e2], "d": {huge}, "e": "x", "f": null, "g": 9223372036854775808}}"#
        );
        let expected = json!({
            "a": 1, "b": long, "c": [long, -0.1, 100.0], "d": huge, "e": "x", "f": null, "g": 9_223_372_036_854_775_808_u64,
        });
        assert_eq!(exact(&text), Some(expected));
        for other in ["", "{", "1 2", "-", "nothing", "1e"] {
            assert_eq!(exact(other), None, "{other}");
        }
        assert_eq!(exact("1e-99999999999"), Some(json!("1e-99999999999")));
    }
}
