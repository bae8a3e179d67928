//! Values of log lines that are no values of their columns: marked where they are written, and known again where they are read.
//!
//! In:   bytes that no table here could read, JSON that `jsonb` does not take      Out: `{"unread_bytes": .., "type": ..}` or
//!       `{"unread_text": .., "type": ..}` in the row's place for the value
//! Must never: be written into a table again

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use tokio_postgres::{Error, GenericClient};

use super::Columns;
use crate::pg;

/// A value that the log holds only as what it was sent as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unread {
    /// The binary form of its type, as `\x` and hexadecimal digits.
    #[serde(rename = "unread_bytes", default, skip_serializing_if = "Option::is_none")]
    bytes: Option<String>,
    /// Its JSON, which `jsonb` does not take.
    #[serde(rename = "unread_text", default, skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    /// Name of the type.
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
            type_name: type_name.to_owned(),
        }
    }

    /// Of a `json` column, say.
    #[must_use]
    pub fn text(type_name: &str, text: &str) -> Self {
        Self {
            bytes: None,
            text: Some(text.to_owned()),
            type_name: type_name.to_owned(),
        }
    }

    /// Is this one?
    #[must_use]
    pub fn of(value: &RawValue) -> Option<Self> {
        let json = value.get();
        let read: Self = json.starts_with('{').then(|| serde_json::from_str(json).ok())??;
        (read.bytes.is_some() != read.text.is_some()).then_some(read)
    }

    /// As the log holds it.
    #[must_use]
    pub fn to_json(&self) -> Box<RawValue> {
        to_raw_value(self).unwrap_or_default()
    }
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.bytes, &self.text) {
            (Some(bytes), _) => write!(f, "{bytes} (bytes of {})", self.type_name),
            (None, text) => f.write_str(text.as_deref().unwrap_or_default()),
        }
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
    client.batch_execute("SAVEPOINT unread").await?;
    match client.query_one("SELECT $1::text::jsonb::text", &[&json]).await {
        Ok(row) => {
            client.batch_execute("RELEASE SAVEPOINT unread").await?;
            row.try_get(0).map(Some)
        }
        Err(error) if pg::is_transient(&error) => Err(error),
        Err(_) => {
            let undo = "ROLLBACK TO SAVEPOINT unread; RELEASE SAVEPOINT unread";
            client.batch_execute(undo).await?;
            Ok(None)
        }
    }
}

/// Are these one value? Whoever marks one names its type as it knows it.
pub(super) fn are_one(one: &RawValue, other: &RawValue) -> bool {
    match (Unread::of(one), Unread::of(other)) {
        (Some(one), Some(other)) => (one.bytes, one.text) == (other.bytes, other.text),
        _ => one.get() == other.get(),
    }
}

/// Names of those of a row's values that are none.
pub(super) fn unread(columns: &BTreeMap<String, Box<RawValue>>) -> impl Iterator<Item = &String> {
    let unread = columns.iter().filter(|(_, value)| Unread::of(value).is_some());
    unread.map(|(name, _)| name)
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
    }

    #[test]
    fn what_is_marked_is_known_again_and_other_documents_are_not() {
        let bytes = Unread::bytes("text", b"x");
        assert_eq!(bytes.to_json().get(), r#"{"unread_bytes":"\\x78","type":"text"}"#);
        assert_eq!(bytes.to_string(), "\\x78 (bytes of text)");
        let text = Unread::text("json", r#"{"a": "\u0000"}"#);
        assert_eq!(text.to_string(), r#"{"a": "\u0000"}"#);
        for one in [bytes, text] {
            assert_eq!(Unread::of(&one.to_json()), Some(one));
        }
        for other in [
            r#""\\x78""#,
            "{}",
            r#"{"type": "text"}"#,
            r#"{"unread_text": "a", "type": "text", "more": 1}"#,
            r#"{"unread_text": "a", "unread_bytes": "b", "type": "text"}"#,
        ] {
            let other: Box<RawValue> = serde_json::from_str(other).unwrap();
            assert_eq!(Unread::of(&other), None, "{other}");
        }
    }
}
