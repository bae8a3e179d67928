//! One line of the conflict log as values.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::Unread;

/// A row's columns; values are the server's own JSON text.
pub type Columns = BTreeMap<String, Box<RawValue>>;

/// What a person has said about a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Nothing yet.
    New,
    /// Seen; to be thought about no more.
    Acknowledged,
    /// No concern.
    Dismissed,
    /// The lost values were written again.
    Replayed,
}

impl Status {
    /// Every status, in the order of review.
    pub const ALL: [Self; 4] = [Self::New, Self::Acknowledged, Self::Dismissed, Self::Replayed];

    /// As in the table.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Acknowledged => "acknowledged",
            Self::Dismissed => "dismissed",
            Self::Replayed => "replayed",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Status {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|status| status.as_str() == text);
        found.ok_or_else(|| {
            format!("`{text}` is not a status; expected new, acknowledged, dismissed or replayed")
        })
    }
}

/// One line of `anabranch.conflict_history`; columns as commented there.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs)] // the table's comments say what each is
pub struct Line {
    pub conflict_id: String,
    pub detected_at: String,
    pub lost_at: String,
    pub node: String,
    pub node_id: u16,
    pub schema_name: String,
    pub table_name: String,
    pub key: Columns,
    pub conflict_type: String,
    pub policy: String,
    pub policy_version: Option<String>,
    pub conflict_resolution: String,
    pub loser: String,
    pub local_tuple: Option<Columns>,
    pub remote_tuple: Option<Columns>,
    pub applied_tuple: Option<Columns>,
    pub changed_columns: Option<Vec<String>>,
    pub lost_columns: Option<Vec<String>>,
    pub redacted_columns: Option<Vec<String>>,
    pub local_origin: Option<u16>,
    pub local_xid: Option<u64>,
    pub local_lsn: Option<String>,
    pub local_commit_time: Option<String>,
    pub local_stamp: Option<String>,
    pub local_saw: Option<String>,
    pub remote_origin: Option<u16>,
    pub remote_xid: Option<u64>,
    pub remote_lsn: Option<String>,
    pub remote_commit_time: Option<String>,
    pub remote_stamp: Option<String>,
    pub remote_saw: Option<String>,
    pub transaction_group: Option<String>,
    pub apply_xid: Option<u64>,
    pub constraint_name: Option<String>,
    pub error: Option<Refusal>,
    pub status: Status,
    pub reviewed_by: Option<String>,
    pub reviewed_at: Option<String>,
    pub note: Option<String>,
}

/// What the server said of a row that it refused.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs)] // PostgreSQL's names
pub struct Refusal {
    pub sqlstate: Option<String>,
    pub message: Option<String>,
    pub detail: Option<String>,
    #[serde(default)]
    pub context: Option<String>,
    /// Of `clock_drift`: the type that the conflict has but for the times.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conflict_type: Option<String>,
}

impl Line {
    /// `schema.table`.
    #[must_use]
    pub fn table(&self) -> String {
        format!("{}.{}", self.schema_name, self.table_name)
    }

    /// `id=7, part=2`.
    #[must_use]
    pub fn key_text(&self) -> String {
        let pairs = self
            .key
            .iter()
            .map(|(name, value)| format!("{name}={}", cell(value)));
        let hidden = self.redacted_columns.iter().flatten();
        let all: Vec<String> = if self.key.is_empty() {
            hidden.map(|name| format!("{name}=[redacted]")).collect()
        } else {
            pairs.collect()
        };
        all.join(", ")
    }

    /// Whoever asks for what was detected before this, and has seen this line last, leaves none out. RFC 3339; this line is the first of
    /// them again, since others may have been detected at the same time.
    #[must_use]
    pub fn until(&self) -> String {
        let time = self.detected_at.parse::<Timestamp>().ok();
        let next = time.and_then(|time| time.checked_add(SignedDuration::from_micros(1)).ok());
        next.map_or_else(|| self.detected_at.clone(), |next| next.to_string())
    }

    /// Was the local write the one that lost?
    #[must_use]
    pub fn local_lost(&self) -> bool {
        self.loser == "local"
    }

    /// Node id of the losing write.
    #[must_use]
    pub fn losing_origin(&self) -> Option<u16> {
        if self.local_lost() {
            self.local_origin
        } else {
            self.remote_origin
        }
    }

    /// Node id of the winning write.
    #[must_use]
    pub fn winning_origin(&self) -> Option<u16> {
        if self.local_lost() {
            self.remote_origin
        } else {
            self.local_origin
        }
    }

    /// The row that was lost; none when a delete was, or when it is not known here.
    #[must_use]
    pub const fn losing_tuple(&self) -> Option<&Columns> {
        if matches!(self.loser.as_bytes(), b"local") {
            self.local_tuple.as_ref()
        } else {
            self.remote_tuple.as_ref()
        }
    }

    /// The row that won, if it is known here; none when a delete did.
    #[must_use]
    pub const fn winning_tuple(&self) -> Option<&Columns> {
        if matches!(self.loser.as_bytes(), b"local") {
            self.remote_tuple.as_ref()
        } else {
            self.local_tuple.as_ref()
        }
    }

    /// What met what: the type of the conflict but for the times, which `clock_drift` does not tell of lines of earlier releases.
    #[must_use]
    pub fn met(&self) -> &str {
        let of_drift = self
            .error
            .as_ref()
            .and_then(|error| error.conflict_type.as_deref());
        match self.conflict_type.as_str() {
            "clock_drift" => of_drift.unwrap_or("clock_drift"),
            kind => kind,
        }
    }

    /// Is it of a row that a foreign key leaves without its parent? Nothing of it is lost; `loser` is the side that has the row.
    #[must_use]
    pub fn is_orphan(&self) -> bool {
        self.conflict_type == "foreign_key_missing"
    }

    /// Is what was lost a row that no replicated write had made?
    #[must_use]
    pub fn is_of_nobody(&self) -> bool {
        self.conflict_type == "insert_exists" && self.local_lost() && self.local_origin.is_none()
    }

    /// Was what was lost a delete that was in no stream: on a promoted server, before what this lacked was put back?
    #[must_use]
    pub fn is_unheard_delete(&self) -> bool {
        let has_no_stamp = self.local_origin.is_some() && self.local_stamp.is_none();
        self.conflict_type == "update_deleted" && self.local_lost() && has_no_stamp
    }

    /// Was a delete lost, rather than values?
    #[must_use]
    pub fn lost_a_delete(&self) -> bool {
        self.losing_tuple().is_none()
            && match self.met() {
                "update_deleted" | "delete_missing" if self.local_lost() => true,
                "delete_origin_differs" | "delete_missing" => !self.local_lost(),
                "clock_drift" => self.winning_tuple().is_some(),
                _ => false,
            }
    }

    /// Is this column's value lost?
    #[must_use]
    pub fn is_lost(&self, column: &str) -> bool {
        self.lost_columns.iter().flatten().any(|name| name == column)
    }

    /// Do the two rows differ in this column?
    #[must_use]
    pub fn is_changed(&self, column: &str) -> bool {
        self.changed_columns.iter().flatten().any(|name| name == column)
    }

    /// Every column of the three rows and those that were redacted, sorted.
    #[must_use]
    pub fn columns(&self) -> Vec<&str> {
        let tuples = [&self.local_tuple, &self.remote_tuple, &self.applied_tuple];
        let shown = tuples.into_iter().flatten().flat_map(BTreeMap::keys);
        let hidden = self.redacted_columns.iter().flatten();
        let mut names: Vec<&str> = shown.chain(hidden).map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        // The key first: it says which row.
        names.sort_by_key(|name| !self.key.contains_key(*name));
        names
    }

    /// A value of one of the three rows for people; empty when there is no row.
    #[must_use]
    pub fn shown(&self, tuple: Option<&Columns>, column: &str) -> String {
        let redacted = self.redacted_columns.iter().flatten().any(|name| name == column);
        match tuple {
            None => String::new(),
            Some(_) if redacted => "[redacted]".to_owned(),
            Some(tuple) => tuple.get(column).map_or_else(String::new, |value| cell(value)),
        }
    }
}

/// JSON for people: text without quotes, NULL; of what is no value of its column what it is.
#[must_use]
pub fn cell(value: &RawValue) -> String {
    let text: String = match value.get() {
        "null" => "NULL".to_owned(),
        text if text.starts_with('"') => serde_json::from_str(text).unwrap_or_else(|_| text.to_owned()),
        text => Unread::of(value).map_or_else(|| text.to_owned(), |unread| unread.to_string()),
    };
    visible(&text)
}

/// Control characters as escapes: what somebody has written into a row moves no terminal's cursor, and begins no line of its own.
#[must_use]
pub fn visible(text: &str) -> String {
    visible_but(text, &[]).into_owned()
}

/// The same, where these characters stay.
#[must_use]
pub fn visible_but<'t>(text: &'t str, kept: &[char]) -> Cow<'t, str> {
    let steers = |letter: char| letter.is_control() && !kept.contains(&letter);
    if !text.contains(steers) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len().saturating_mul(2));
    for letter in text.chars() {
        match steers(letter) {
            true => out.extend(letter.escape_default()),
            false => out.push(letter),
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(kind: &str, loser: &str, of: Option<&str>, local: Option<i32>, remote: Option<i32>) -> Line {
        let row = |id: Option<i32>| id.map(|id| serde_json::json!({ "id": id }));
        serde_json::from_value(serde_json::json!({
            "conflict_id": "x", "detected_at": "", "lost_at": "", "node": "n", "node_id": 1, "schema_name": "s",
            "table_name": "t", "key": {}, "conflict_type": kind, "policy": "p", "conflict_resolution": "keep_local",
            "loser": loser, "status": "new", "local_tuple": row(local), "remote_tuple": row(remote),
            "error": of.map(|of| serde_json::json!({ "sqlstate": null, "message": "", "detail": null, "conflict_type": of })),
        }))
        .unwrap()
    }

    #[test]
    fn a_value_is_one_line_and_commands_no_terminal() {
        let value = serde_json::value::to_raw_value("a\tb\nc\u{1b}[2J\u{9b}1m \u{e9}").unwrap();
        assert_eq!(cell(&value), "a\\tb\\nc\\u{1b}[2J\\u{9b}1m \u{e9}");
    }

    #[test]
    fn a_delete_that_lost_by_a_time_that_was_not_its_commits_is_a_lost_delete() {
        let lost = |line: &Line| line.lost_a_delete();
        assert!(lost(&line(
            "delete_origin_differs",
            "remote",
            None,
            Some(1),
            None
        )));
        let of = Some("delete_origin_differs");
        assert!(lost(&line("clock_drift", "remote", of, Some(1), None)));
        // Of all nodes' lines the rows are left out.
        assert!(lost(&line("clock_drift", "remote", of, None, None)));
        assert!(lost(&line(
            "clock_drift",
            "local",
            Some("update_deleted"),
            None,
            Some(1)
        )));
        // The delete won.
        assert!(!lost(&line("clock_drift", "local", of, Some(1), None)));
        assert!(!lost(&line(
            "clock_drift",
            "remote",
            Some("update_deleted"),
            None,
            Some(1)
        )));
        assert!(!lost(&line(
            "clock_drift",
            "remote",
            Some("update_origin_differs"),
            None,
            None
        )));
        // As earlier releases wrote it.
        assert!(lost(&line("clock_drift", "remote", None, Some(1), None)));
        assert!(!lost(&line("clock_drift", "remote", None, Some(1), Some(1))));
    }
}
