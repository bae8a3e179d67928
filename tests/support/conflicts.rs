//! The conflict log as values.

use serde_json::Value;

use crate::session::Session;

/// One line of `anabranch.conflict_history`.
#[derive(Clone, Debug)]
pub struct Conflict(pub Value);

impl Conflict {
    fn text(&self, column: &str) -> &str {
        let value = self
            .0
            .get(column)
            .unwrap_or_else(|| panic!("the conflict log has no column {column}: {}", self.0));
        value.as_str().unwrap_or("")
    }

    /// The same on every node.
    pub fn id(&self) -> String {
        self.0["conflict_id"].to_string()
    }

    /// `update_origin_differs`, `insert_exists`, `update_deleted`, ...
    pub fn kind(&self) -> &str {
        self.text("conflict_type")
    }

    /// `apply_remote`, `keep_local`, `merge` or `skip`.
    pub fn resolution(&self) -> &str {
        self.text("conflict_resolution")
    }

    /// The row's key.
    pub fn key(&self) -> &Value {
        &self.0["key"]
    }

    /// The row that was here.
    pub fn local(&self) -> &Value {
        &self.0["local_tuple"]
    }

    /// The row that came in.
    pub fn remote(&self) -> &Value {
        &self.0["remote_tuple"]
    }

    /// The row that stands now.
    pub fn applied(&self) -> &Value {
        &self.0["applied_tuple"]
    }

    /// All of it as text, to search for a value.
    pub fn everything(&self) -> String {
        self.0.to_string()
    }
}

/// The whole log of one node, oldest first.
pub async fn read(session: &Session) -> Vec<Conflict> {
    session
        .column("select to_jsonb(h)::text from anabranch.conflict_history h order by h.detected_at, h.conflict_id")
        .await
        .iter()
        .map(|line| Conflict(serde_json::from_str(line).expect("the server writes JSON")))
        .collect()
}
