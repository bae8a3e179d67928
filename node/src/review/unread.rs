//! Values of log lines that are no values of their columns: marked where they are written, and known again where they are read.
//!
//! In:   bytes that no table here could read, JSON that `jsonb` does not take, the null of JSON (a row as JSON shows NULL so), values that
//!       no line has room for
//! Out:  `{"unread_bytes": .., "type": ..}`, `{"unread_text": .., "type": ..}` or `{"too_long": .., "type": ..}` in the row's place for
//!       the value
//! Must never: be written into a table again, but for that null, which is known from its mark

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use tokio_postgres::{Error, GenericClient};

use super::Columns;
use crate::pg;
use crate::setup::sql::literal;

/// What lines of earlier releases have, as a text, in the place of a value that was too long; its number of bytes stands before it.
const TOO_LONG: &str = " bytes of JSON: too long for the conflict log)";
/// Such a value had more bytes than this.
const TOO_LONG_MIN: u64 = 1 << 20;
/// A value of `json` or `jsonb`.
const JSON_NULL: &str = "null";
/// OIDs of `json` and `jsonb`.
const JSON: u32 = 114;
const JSONB: u32 = 3802;

/// A value that the log holds only as what it was sent as, or of which it only says how long it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unread {
    /// The binary form of its type, as `\x` and hexadecimal digits.
    #[serde(rename = "unread_bytes", default, skip_serializing_if = "Option::is_none")]
    bytes: Option<String>,
    /// Its JSON, which `jsonb` does not take.
    #[serde(rename = "unread_text", default, skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    /// Bytes of its JSON, which the line has no room for.
    #[serde(rename = "too_long", default, skip_serializing_if = "Option::is_none")]
    too_long: Option<u64>,
    /// Name of the type; empty where it is not known.
    #[serde(rename = "type")]
    type_name: String,
}

impl Unread {
    /// Of a column whose type no table here has.
    #[must_use]
    pub fn bytes(type_name: &str, bytes: &[u8]) -> Self {
        Self {
            bytes: Some(format!("\\x{}", hex::encode(bytes))),
            text: None,
            too_long: None,
            type_name: type_name.to_owned(),
        }
    }

    /// Of a `json` column, say.
    #[must_use]
    pub fn text(type_name: &str, text: &str) -> Self {
        Self {
            bytes: None,
            text: Some(text.to_owned()),
            too_long: None,
            type_name: type_name.to_owned(),
        }
    }

    /// Of a value whose JSON has so many bytes that its line would be too long.
    #[must_use]
    pub fn too_long(type_name: &str, bytes: u64) -> Self {
        Self {
            bytes: None,
            text: None,
            too_long: Some(bytes),
            type_name: type_name.to_owned(),
        }
    }

    /// Is this one?
    #[must_use]
    pub fn of(value: &RawValue) -> Option<Self> {
        let json = value.get();
        if json.starts_with("\"(") {
            return Self::of_earlier_release(json);
        }
        let read: Self = json.starts_with('{').then(|| serde_json::from_str(json).ok())??;
        let said = [read.bytes.is_some(), read.text.is_some(), read.too_long.is_some()];
        (said.into_iter().filter(|is_said| *is_said).count() == 1).then_some(read)
    }

    /// See [`TOO_LONG`]. (A text that a table really holds may read so, too. It is shown as it is, and not written again from here.)
    fn of_earlier_release(json: &str) -> Option<Self> {
        let bytes = json
            .strip_prefix("\"(")?
            .strip_suffix('"')?
            .strip_suffix(TOO_LONG)?;
        let bytes = bytes.parse().ok().filter(|bytes| *bytes > TOO_LONG_MIN)?;
        Some(Self::too_long("", bytes))
    }

    /// Is it one of which nothing but the length is known?
    #[must_use]
    pub const fn is_too_long(&self) -> bool {
        self.too_long.is_some()
    }

    /// Is it the null of JSON, which is a value as any? A row as JSON shows NULL so.
    #[must_use]
    pub fn is_json_null(&self) -> bool {
        self.text.as_deref() == Some(JSON_NULL)
    }

    /// As the log holds it.
    #[must_use]
    pub fn to_json(&self) -> Box<RawValue> {
        to_raw_value(self).unwrap_or_default()
    }
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.bytes, &self.text, self.too_long) {
            (Some(bytes), ..) => write!(f, "{bytes} (bytes of {})", self.type_name),
            (None, Some(text), _) => f.write_str(text),
            (None, None, bytes) => write!(f, "({}{TOO_LONG}", bytes.unwrap_or_default()),
        }
    }
}

/// SQL that goes behind the `jsonb` of a row, and marks what is the null of JSON there. `columns`: the names of the row's columns, OIDs and
/// names of their types, and their values in SQL. Nothing for most tables. (Qualified: a session may have the search path of users.)
pub(crate) fn json_nulls<'c>(columns: impl Iterator<Item = (&'c str, u32, &'c str, String)>) -> String {
    let mark = |(name, type_oid, type_name, value): (&str, u32, &str, String)| {
        let (_, kind) = json_type(type_oid)?;
        let mark = BTreeMap::from([(name, Unread::text(type_name, JSON_NULL))]);
        let mark = literal(&serde_json::to_string(&mark).ok()?);
        Some(format!(
            " OPERATOR(pg_catalog.||) CASE WHEN pg_catalog.{kind}({value}) OPERATOR(pg_catalog.=) 'null' \
             THEN {mark}::pg_catalog.jsonb ELSE '{{}}'::pg_catalog.jsonb END"
        ))
    };
    columns.filter_map(mark).collect()
}

/// SQL for the value of a column: its mark, where it is the null of JSON.
pub(crate) fn or_json_null(type_oid: u32, type_name: &str, value: String) -> String {
    let Some((name, kind)) = json_type(type_oid) else {
        return value;
    };
    let mark = Unread::text(type_name, JSON_NULL).to_json();
    format!(
        "CASE WHEN pg_catalog.{kind}({value}) OPERATOR(pg_catalog.=) 'null' THEN {}::pg_catalog.{name} ELSE {value} END",
        literal(mark.get())
    )
}

/// The name of a type of JSON, and of what tells the kind of its values.
const fn json_type(type_oid: u32) -> Option<(&'static str, &'static str)> {
    match type_oid {
        JSON => Some(("json", "json_typeof")),
        JSONB => Some(("jsonb", "jsonb_typeof")),
        _ => None,
    }
}

/// The text of `jsonb` for a row that `row_to_json` made, with values that it does not take marked; `type_of` names a column's type.
/// None where it is too long. The session is in a transaction, which goes on.
pub(crate) async fn as_jsonb(
    client: &(impl GenericClient + Sync),
    row: &str,
    type_of: &(dyn Fn(&str) -> String + Sync),
) -> Result<Option<String>, Error> {
    if let Some(text) = jsonb(client, row).await? {
        return Ok(Some(text));
    }
    // Raw: what `jsonb` does not take, nobody else would who reads values.
    let Ok(mut columns) = serde_json::from_str::<Columns>(row) else {
        return Ok(None);
    };
    for (name, value) in &mut columns {
        if jsonb(client, value.get()).await?.is_none() {
            *value = Unread::text(&type_of(name), value.get()).to_json();
        }
    }
    match serde_json::to_string(&columns) {
        Ok(marked) => jsonb(client, &marked).await,
        Err(_) => Ok(None),
    }
}

/// JSON as `jsonb` has it; none where it does not take it.
async fn jsonb(client: &(impl GenericClient + Sync), json: &str) -> Result<Option<String>, Error> {
    let asked = async { client.query_one("SELECT $1::text::jsonb::text", &[&json]).await };
    match pg::attempt(client, asked).await? {
        Ok(row) => row.try_get(0).map(Some),
        Err(_) => Ok(None),
    }
}

/// Are these one value? Whoever marks one names its type as it knows it. Of one that was too long nobody can say.
pub(super) fn are_one(one: &RawValue, other: &RawValue) -> bool {
    match (Unread::of(one), Unread::of(other)) {
        (Some(one), Some(other)) if one.is_too_long() || other.is_too_long() => false,
        (Some(one), Some(other)) => (one.bytes, one.text) == (other.bytes, other.text),
        _ => one.get() == other.get(),
    }
}

/// Those of a row's values that are none, with their columns' names.
pub(super) fn unread(columns: &Columns) -> impl Iterator<Item = (&String, Unread)> {
    let each = columns.iter();
    each.filter_map(|(name, value)| Some((name, Unread::of(value)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_the_same_whoever_names_its_type() {
        let document = r#"{"a": "\u0000"}"#;
        let [ours, theirs] = ["json", "pg_catalog.json"].map(|of| Unread::text(of, document).to_json());
        assert!(are_one(&ours, &theirs));
        assert!(!are_one(&ours, &Unread::text("json", "1e999999").to_json()));
        assert!(!are_one(
            &ours,
            &Unread::bytes("json", document.as_bytes()).to_json()
        ));
        assert!(!are_one(&ours, &to_raw_value(document).unwrap()));
        let long = Unread::too_long("json", 94_371_842).to_json();
        assert!(!are_one(&long, &long));
    }

    #[test]
    fn the_null_of_json_is_no_missing_value() {
        let columns = [
            ("id", 23, "pg_catalog.int4", "t.id".to_owned()),
            ("it's", 3802, "pg_catalog.jsonb", "t.\"it's\"".to_owned()),
            ("j", 114, "pg_catalog.json", "t.j".to_owned()),
        ];
        let sql = json_nulls(columns.into_iter());
        for part in [
            "CASE WHEN pg_catalog.jsonb_typeof(t.\"it's\") OPERATOR(pg_catalog.=) 'null' THEN \
             '{\"it''s\":{\"unread_text\":\"null\",\"type\":\"pg_catalog.jsonb\"}}'::pg_catalog.jsonb ELSE '{}'::pg_catalog.jsonb END",
            "pg_catalog.json_typeof(t.j)",
        ] {
            assert!(sql.contains(part), "{part} is not in {sql}");
        }
        assert_eq!(sql.matches("||").count(), 2, "{sql}");
        assert_eq!(or_json_null(23, "pg_catalog.int4", "t.id".to_owned()), "t.id");
        assert_eq!(
            or_json_null(114, "pg_catalog.json", "t.j".to_owned()),
            "CASE WHEN pg_catalog.json_typeof(t.j) OPERATOR(pg_catalog.=) 'null' THEN \
             '{\"unread_text\":\"null\",\"type\":\"pg_catalog.json\"}'::pg_catalog.json ELSE t.j END"
        );
        let null = Unread::text("jsonb", "null");
        assert!(null.is_json_null() && !Unread::text("jsonb", "\"null\"").is_json_null());
        assert_eq!(Unread::of(&null.to_json()), Some(null));
        let missing: Box<RawValue> = Box::default();
        assert_eq!(Unread::of(&missing), None);
    }

    #[test]
    fn what_is_marked_is_known_again_and_other_documents_are_not() {
        let bytes = Unread::bytes("text", b"x");
        assert_eq!(bytes.to_json().get(), r#"{"unread_bytes":"\\x78","type":"text"}"#);
        assert_eq!(bytes.to_string(), "\\x78 (bytes of text)");
        let text = Unread::text("json", r#"{"a": "\u0000"}"#);
        assert_eq!(text.to_string(), r#"{"a": "\u0000"}"#);
        let long = Unread::too_long("text", 94_371_842);
        assert_eq!(long.to_json().get(), r#"{"too_long":94371842,"type":"text"}"#);
        let said = "(94371842 bytes of JSON: too long for the conflict log)";
        assert_eq!(long.to_string(), said);
        for one in [bytes, text, long] {
            assert_eq!(Unread::of(&one.to_json()), Some(one));
        }
        let of_earlier = Unread::of(&to_raw_value(said).unwrap());
        assert_eq!(of_earlier, Some(Unread::too_long("", 94_371_842)));
        for other in [
            r#""\\x78""#,
            "{}",
            r#"{"type": "text"}"#,
            r#"{"unread_text": "a", "type": "text", "more": 1}"#,
            r#"{"unread_text": "a", "unread_bytes": "b", "type": "text"}"#,
            r#"{"unread_text": "a", "too_long": 7, "type": "text"}"#,
            r#"{"too_long": -7, "type": "text"}"#,
            r#""(7 bytes of JSON: too long for the conflict log)""#,
            r#""(many bytes of JSON: too long for the conflict log)""#,
        ] {
            let other: Box<RawValue> = serde_json::from_str(other).unwrap();
            assert_eq!(Unread::of(&other), None, "{other}");
        }
    }
}
