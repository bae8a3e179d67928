//! Values of columns, as scripts see them.
//!
//! In:   a column and its value as its origin sent it      Out: unit, boolean, integer, decimal or text
//! Invariants: 1. no number is rounded: what is no 64-bit integer and no [`Decimal`] is text; 2. the value is a function of the
//!        bytes that the origin sent, so it is the same at every node
//! Not here: the rows that scripts are tried with ([`super::trial`])

use std::fmt::Write as _;

use anabranch_proto::schema::ColumnDesc;
use rhai::Dynamic;
use rust_decimal::Decimal;

use crate::merge::Field;

/// One column's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// NULL; `()` in a script.
    Null,
    /// boolean
    Bool(bool),
    /// smallint, integer, bigint, oid
    Integer(i64),
    /// numeric, where it has at most 28 digits.
    Decimal(Decimal),
    /// Everything else.
    Text(String),
}

const USER_TYPES_FROM: u32 = 16384;

impl Value {
    /// A column's value. Text types and json are as they are; uuid, date and time as PostgreSQL writes them, in UTC; floats as
    /// the shortest text that reads back; labels of enums and citext; domains as what they are over; all other types as the bytes of
    /// their binary form, in hexadecimal.
    #[must_use]
    pub fn of(column: &ColumnDesc, field: &Field) -> Self {
        let type_oid = column.base_oid();
        match field {
            Field::Null | Field::Absent => Self::Null,
            Field::Text(text) => Self::of_text(type_oid, &String::from_utf8_lossy(text)),
            Field::Binary(bytes) => {
                Self::of_binary(type_oid, bytes).unwrap_or_else(|| Self::Text(unknown(type_oid, bytes)))
            }
        }
    }

    /// A number that is written so: an integer or a decimal where it is one exactly, else text.
    #[must_use]
    pub fn of_number(text: &str) -> Self {
        if let Ok(integer) = text.parse() {
            return Self::Integer(integer);
        }
        Self::of_numeric(text.to_owned())
    }

    fn of_numeric(text: String) -> Self {
        match Decimal::from_str_exact(&text) {
            Ok(decimal) => Self::Decimal(decimal),
            Err(_) => Self::Text(text),
        }
    }

    fn of_text(type_oid: u32, text: &str) -> Self {
        match type_oid {
            16 => Self::Bool(text == "t"),
            20 | 21 | 23 | 26 => text
                .parse()
                .map_or_else(|_| Self::Text(text.to_owned()), Self::Integer),
            1700 => Self::of_numeric(text.to_owned()),
            _ => Self::Text(text.to_owned()),
        }
    }

    fn of_binary(type_oid: u32, bytes: &[u8]) -> Option<Self> {
        Some(match type_oid {
            16 => Self::Bool(*bytes.first()? != 0),
            20 => Self::Integer(i64::from_be_bytes(bytes.try_into().ok()?)),
            21 => Self::Integer(i16::from_be_bytes(bytes.try_into().ok()?).into()),
            23 => Self::Integer(i32::from_be_bytes(bytes.try_into().ok()?).into()),
            26 => Self::Integer(u32::from_be_bytes(bytes.try_into().ok()?).into()),
            1700 => Self::of_numeric(numeric(bytes)?),
            700 => Self::Text(f32::from_be_bytes(bytes.try_into().ok()?).to_string()),
            701 => Self::Text(f64::from_be_bytes(bytes.try_into().ok()?).to_string()),
            // text, varchar, bpchar, name, json, xml
            25 | 1043 | 1042 | 19 | 114 | 142 => Self::Text(String::from_utf8(bytes.to_vec()).ok()?),
            // jsonb: a version, then the text
            3802 => Self::Text(String::from_utf8(bytes.get(1..)?.to_vec()).ok()?),
            2950 => Self::Text(uuid::Uuid::from_slice(bytes).ok()?.to_string()),
            1082 => Self::Text(date(i32::from_be_bytes(bytes.try_into().ok()?))),
            1083 => Self::Text(time(i64::from_be_bytes(bytes.try_into().ok()?))),
            1114 => Self::Text(timestamp(i64::from_be_bytes(bytes.try_into().ok()?), "")),
            1184 => Self::Text(timestamp(i64::from_be_bytes(bytes.try_into().ok()?), "+00")),
            _ => return None,
        })
    }

    pub(super) fn to_dynamic(&self) -> Dynamic {
        match self {
            Self::Null => Dynamic::UNIT,
            Self::Bool(value) => (*value).into(),
            Self::Integer(value) => (*value).into(),
            Self::Decimal(value) => Dynamic::from_decimal(*value),
            Self::Text(value) => value.as_str().into(),
        }
    }

    pub(super) fn text_len(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            _ => 0,
        }
    }
}

/// Of a type that is not known here. The label of an enum is its binary form, and a citext.
fn unknown(type_oid: u32, bytes: &[u8]) -> String {
    let is_odd = |letter: char| letter.is_control() && !matches!(letter, '\t' | '\n' | '\r');
    let label = std::str::from_utf8(bytes)
        .ok()
        .filter(|text| type_oid >= USER_TYPES_FROM && !text.chars().any(is_odd));
    label.map_or_else(
        || {
            let mut hex = String::from("\\x");
            for byte in bytes {
                let _ = write!(hex, "{byte:02x}");
            }
            hex
        },
        str::to_owned,
    )
}

/// A numeric as PostgreSQL writes it.
fn numeric(bytes: &[u8]) -> Option<String> {
    let word = |at: usize| {
        Some(i16::from_be_bytes(
            bytes.get(at * 2..at * 2 + 2)?.try_into().ok()?,
        ))
    };
    let (count, weight, sign, scale) = (word(0)?, i32::from(word(1)?), word(2)?.cast_unsigned(), word(3)?);
    match sign {
        0xC000 => return Some("NaN".to_owned()),
        0xD000 => return Some("Infinity".to_owned()),
        0xF000 => return Some("-Infinity".to_owned()),
        _ => {}
    }
    let count = i32::from(count);
    // Four decimal digits each, the first of them worth 10000 to the power of `weight`.
    let group = |power: i32| -> Option<i16> {
        let at = weight - power;
        if (0..count).contains(&at) {
            word(4 + usize::try_from(at).ok()?)
        } else {
            Some(0)
        }
    };
    let mut text = String::new();
    if sign == 0x4000 {
        text.push('-');
    }
    let mut whole = String::new();
    for power in (0..=weight.max(0)).rev() {
        let _ = write!(whole, "{:04}", group(power)?);
    }
    let whole = whole.trim_start_matches('0');
    text.push_str(if whole.is_empty() { "0" } else { whole });
    let scale = usize::try_from(scale).ok()?;
    if scale > 0 {
        let mut fraction = String::new();
        let mut power = -1;
        while fraction.len() < scale {
            let _ = write!(fraction, "{:04}", group(power)?);
            power -= 1;
        }
        text.push('.');
        text.push_str(fraction.get(..scale)?);
    }
    Some(text)
}

const DAY_US: i64 = 86_400_000_000;

/// Of days since 2000-01-01.
fn date(days: i32) -> String {
    match days {
        i32::MAX => "infinity".to_owned(),
        i32::MIN => "-infinity".to_owned(),
        days => {
            let (year, rest) = calendar(days.into());
            era(year, &rest, "")
        }
    }
}

/// Of microseconds since midnight.
fn time(us: i64) -> String {
    let (seconds, us) = (us.div_euclid(1_000_000), us.rem_euclid(1_000_000));
    let mut text = format!(
        "{:02}:{:02}:{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    );
    if us > 0 {
        let fraction = format!(".{us:06}");
        text.push_str(fraction.trim_end_matches('0'));
    }
    text
}

/// Of microseconds since 2000-01-01.
fn timestamp(us: i64, zone: &str) -> String {
    match us {
        i64::MAX => "infinity".to_owned(),
        i64::MIN => "-infinity".to_owned(),
        us => {
            let (year, rest) = calendar(us.div_euclid(DAY_US));
            era(year, &rest, &format!(" {}{zone}", time(us.rem_euclid(DAY_US))))
        }
    }
}

fn era(year: i64, rest: &str, tail: &str) -> String {
    if year > 0 {
        format!("{year:04}{rest}{tail}")
    } else {
        format!("{:04}{rest}{tail} BC", 1 - year)
    }
}

/// The year, and `-MM-DD`, of days since 2000-01-01, by the Gregorian calendar.
fn calendar(days: i64) -> (i64, String) {
    // Years begin in March, so that a leap day is the last of its year; 400 of them have 146,097 days.
    let days = days + 730_425;
    let (cycle, of_cycle) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let of_cycle_year = (of_cycle - of_cycle / 1_460 + of_cycle / 36_524 - of_cycle / 146_096) / 365;
    let of_year = of_cycle - (365 * of_cycle_year + of_cycle_year / 4 - of_cycle_year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = cycle * 400 + of_cycle_year + i64::from(month <= 2);
    (year, format!("-{month:02}-{day:02}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binary(type_oid: u32, bytes: &[u8]) -> Value {
        let column = ColumnDesc {
            name: "c".to_owned(),
            type_oid,
            type_mod: -1,
            type_name: String::new(),
        };
        Value::of(&column, &Field::Binary(bytes.to_vec().into()))
    }

    fn text(value: &str) -> Value {
        Value::Text(value.to_owned())
    }

    fn numeric_of(weight: i16, sign: u16, scale: i16, digits: &[i16]) -> Value {
        let mut bytes = Vec::new();
        bytes.extend((digits.len() as i16).to_be_bytes());
        bytes.extend(weight.to_be_bytes());
        bytes.extend(sign.to_be_bytes());
        bytes.extend(scale.to_be_bytes());
        digits.iter().for_each(|digit| bytes.extend(digit.to_be_bytes()));
        binary(1700, &bytes)
    }

    #[test]
    fn numerics_are_decimals_or_text_and_never_rounded() {
        let decimal = |text: &str| Value::Decimal(Decimal::from_str_exact(text).unwrap());
        assert_eq!(numeric_of(1, 0, 2, &[1, 2345, 6700]), decimal("12345.67"));
        assert_eq!(numeric_of(-1, 0x4000, 6, &[1, 2300]), decimal("-0.000123"));
        assert_eq!(numeric_of(0, 0, 2, &[]), decimal("0.00"));
        assert_eq!(numeric_of(2, 0, 0, &[7]), decimal("700000000"));
        // Thirty nines: a decimal has 28 digits.
        let nines = "9".repeat(30);
        assert_eq!(
            numeric_of(7, 0, 0, &[99, 9999, 9999, 9999, 9999, 9999, 9999, 9999]),
            text(&nines)
        );
        let tiny = format!("0.{}1", "0".repeat(35));
        assert_eq!(numeric_of(-9, 0, 36, &[1]), text(&tiny));
        assert_eq!(numeric_of(0, 0xC000, 0, &[]), text("NaN"));
        assert_eq!(numeric_of(0, 0xF000, 0, &[]), text("-Infinity"));
        assert_eq!(Value::of_number("1.50"), decimal("1.50"));
        assert_eq!(
            Value::of_number("9223372036854775808"),
            decimal("9223372036854775808")
        );
    }

    #[test]
    fn other_types_are_integers_or_text() {
        assert_eq!(binary(16, &[1]), Value::Bool(true));
        assert_eq!(binary(21, &[0xff, 0xfe]), Value::Integer(-2));
        assert_eq!(binary(20, &i64::MIN.to_be_bytes()), Value::Integer(i64::MIN));
        assert_eq!(binary(25, "grün".as_bytes()), text("grün"));
        assert_eq!(binary(3802, b"\x01{\"a\": 1}"), text("{\"a\": 1}"));
        assert_eq!(binary(701, &0.1f64.to_be_bytes()), text("0.1"));
        assert_eq!(binary(20_000, b"sad"), text("sad"));
        assert_eq!(
            binary(20_000, "two\nlines\tof citext".as_bytes()),
            text("two\nlines\tof citext")
        );
        assert_eq!(binary(20_000, &[0, 1]), text("\\x0001"));
        assert_eq!(binary(869, b"ab"), text("\\x6162"));
        // Damaged.
        assert_eq!(binary(23, &[1]), text("\\x01"));
        assert_eq!(binary(1700, &[0, 9, 0]), text("\\x000900"));
    }

    #[test]
    fn a_domain_is_what_it_is_over() {
        let domain = |over: u32, bytes: &[u8]| {
            let column = ColumnDesc {
                name: "c".to_owned(),
                type_oid: 20_000,
                type_mod: ColumnDesc::domain_over(over),
                type_name: "public.amount".to_owned(),
            };
            Value::of(&column, &Field::Binary(bytes.to_vec().into()))
        };
        // In letters it would be "ABCD".
        assert_eq!(domain(23, &[0x41, 0x42, 0x43, 0x44]), Value::Integer(0x4142_4344));
        assert_eq!(domain(25, b"\x01"), text("\u{1}"));
        assert_eq!(domain(16, &[0]), Value::Bool(false));
        assert_eq!(domain(16_383, b"ab"), text("\\x6162"));
    }

    #[test]
    fn times_are_written_as_postgres_writes_them_and_sort_as_text() {
        assert_eq!(binary(1082, &0i32.to_be_bytes()), text("2000-01-01"));
        assert_eq!(binary(1082, &59i32.to_be_bytes()), text("2000-02-29"));
        assert_eq!(binary(1082, &(-1i32).to_be_bytes()), text("1999-12-31"));
        assert_eq!(binary(1082, &9828i32.to_be_bytes()), text("2026-11-28"));
        assert_eq!(binary(1082, &(-730_119i32).to_be_bytes()), text("0001-01-01"));
        assert_eq!(binary(1082, &(-730_120i32).to_be_bytes()), text("0001-12-31 BC"));
        let us = 9828 * DAY_US + 3_723_040_500;
        assert_eq!(binary(1114, &us.to_be_bytes()), text("2026-11-28 01:02:03.0405"));
        assert_eq!(
            binary(1184, &us.to_be_bytes()),
            text("2026-11-28 01:02:03.0405+00")
        );
        assert_eq!(binary(1184, &i64::MAX.to_be_bytes()), text("infinity"));
        assert!(timestamp(us, "+00") < timestamp(us + 1, "+00"));
        assert!(timestamp(3_000_000, "+00") < timestamp(3_500_000, "+00"));
    }
}
