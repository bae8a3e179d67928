//! Which lines of the log: conditions with their parameters, all as text, which the server casts.

use serde::{Deserialize, Serialize};
use tokio_postgres::types::ToSql;

/// Lines with the two origins named by what became of their writes.
pub(super) const LINES: &str = "(SELECT c.*, \
    CASE c.loser WHEN 'local' THEN c.local_origin WHEN 'remote' THEN c.remote_origin END AS losing_origin, \
    CASE c.loser WHEN 'local' THEN c.remote_origin WHEN 'remote' THEN c.local_origin END AS winning_origin \
    FROM anabranch.conflict_history AS c) AS h";

/// What was only counted, under the same names.
pub(super) const STORMS: &str = "(SELECT s.schema_name, s.table_name, s.conflict_type, s.minute AS detected_at, s.count, \
    nullif(s.losing_origin, 0) AS losing_origin, nullif(s.winning_origin, 0) AS winning_origin \
    FROM anabranch.conflict_storm AS s) AS h";

/// Which lines. Every condition that is given must hold. Travels between daemons as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Filter {
    /// Beginning of the id.
    pub id: Option<String>,
    /// Detected at or after, RFC 3339.
    pub since: Option<String>,
    /// Detected before, RFC 3339.
    pub until: Option<String>,
    /// `schema.table`, or a table in any schema.
    pub table: Option<String>,
    /// Conflict type.
    pub kind: Option<String>,
    /// JSON objects, one of which the key contains.
    pub keys: Vec<String>,
    /// Node id that made either side.
    pub node: Option<u16>,
    /// Node id that made the winning side.
    pub winner: Option<u16>,
    /// Review status.
    pub status: Option<String>,
    /// Transaction group.
    pub group: Option<String>,
    /// At most so many lines.
    pub limit: u32,
}

impl Default for Filter {
    fn default() -> Self {
        Self {
            id: None,
            since: None,
            until: None,
            table: None,
            kind: None,
            keys: Vec::new(),
            node: None,
            winner: None,
            status: None,
            group: None,
            limit: 50,
        }
    }
}

/// A filter as SQL.
#[derive(Debug, Default)]
pub(super) struct Query {
    /// Of lines and of counts.
    common: Vec<String>,
    /// Of lines alone.
    lines: Vec<String>,
    parameters: Vec<String>,
}

impl Query {
    pub(super) fn of_lines(&self) -> String {
        join(self.common.iter().chain(&self.lines))
    }

    /// None when counts can say nothing about what is asked for.
    pub(super) fn of_storms(&self) -> Option<String> {
        self.lines.is_empty().then(|| join(self.common.iter()))
    }

    pub(super) fn parameters(&self) -> Vec<&(dyn ToSql + Sync)> {
        let each = self.parameters.iter();
        each.map(|parameter| parameter as &(dyn ToSql + Sync)).collect()
    }

    /// Each `?` of `condition` stands for one of `parameters`; through text, so that all have one type on the wire.
    fn condition(&mut self, condition: &str, parameters: &[&str]) -> String {
        let mut condition = condition.to_owned();
        for parameter in parameters {
            self.parameters.push((*parameter).to_owned());
            condition = condition.replacen('?', &format!("${}::text", self.parameters.len()), 1);
        }
        condition
    }
}

fn join<'a>(conditions: impl Iterator<Item = &'a String>) -> String {
    let all: Vec<&str> = conditions.map(String::as_str).collect();
    if all.is_empty() {
        "true".to_owned()
    } else {
        all.join(" AND ")
    }
}

impl Filter {
    pub(super) fn query(&self) -> Query {
        let mut query = Query::default();
        let mut common = Vec::new();
        for (condition, value) in [
            ("h.detected_at >= ?::timestamptz", self.since.clone()),
            ("h.detected_at < ?::timestamptz", self.until.clone()),
            ("h.conflict_type = ?", self.kind.clone()),
            (
                "?::int IN (h.losing_origin, h.winning_origin)",
                self.node.map(|id| id.to_string()),
            ),
            ("h.winning_origin = ?::int", self.winner.map(|id| id.to_string())),
        ] {
            if let Some(value) = value {
                common.push(query.condition(condition, &[&value]));
            }
        }
        if let Some(table) = &self.table {
            common.push(match table.split_once('.') {
                Some((schema, table)) => {
                    query.condition("h.schema_name = ? AND h.table_name = ?", &[schema, table])
                }
                None => query.condition("h.table_name = ?", &[table]),
            });
        }
        let mut lines = Vec::new();
        for (condition, value) in [
            ("starts_with(h.conflict_id::text, ?)", &self.id),
            ("h.status = ?", &self.status),
            ("h.transaction_group = ?", &self.group),
        ] {
            if let Some(value) = value {
                lines.push(query.condition(condition, &[value]));
            }
        }
        if !self.keys.is_empty() {
            let any: Vec<String> = self
                .keys
                .iter()
                .map(|key| query.condition("h.key @> ?::jsonb", &[key]))
                .collect();
            lines.push(format!("({})", any.join(" OR ")));
        }
        (query.common, query.lines) = (common, lines);
        query
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_and_parameters_stay_in_step() {
        let filter = Filter {
            table: Some("public.t".to_owned()),
            keys: vec![r#"{"id":7}"#.to_owned(), r#"{"id":"7"}"#.to_owned()],
            node: Some(2),
            ..Filter::default()
        };
        let query = filter.query();
        assert_eq!(
            query.of_lines(),
            "$1::text::int IN (h.losing_origin, h.winning_origin) AND h.schema_name = $2::text AND h.table_name = $3::text \
             AND (h.key @> $4::text::jsonb OR h.key @> $5::text::jsonb)"
        );
        assert_eq!(
            query.parameters,
            ["2", "public", "t", r#"{"id":7}"#, r#"{"id":"7"}"#]
        );
        assert_eq!(query.of_storms(), None);
        assert_eq!(Filter::default().query().of_storms(), Some("true".to_owned()));
    }
}
