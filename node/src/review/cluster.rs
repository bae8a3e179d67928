//! The logs of all nodes as one: lines joined by their id, and which node did not answer.
//!
//! In:   the answer of each node            Out: [`Joined`]
//! Invariants: a node that gives no answer is named with the reason, never left out
//! Not here: asking the nodes (`crate::link`)

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use super::{Error, Filter, Line, Status, list, storm_count};

/// Most lines that one node gives.
pub const LINES_MAX: u32 = 10_000;

/// What one node holds. Lines come without their rows.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// Newest first.
    pub lines: Vec<Line>,
    /// Losing writes that were only counted.
    pub only_counted: i64,
}

/// A node that was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Its id.
    pub id: u16,
    /// Its name.
    pub name: String,
    /// Did it answer?
    pub answered: bool,
    /// Why it did not.
    pub error: Option<String>,
    /// Losing writes that it only counted.
    pub only_counted: i64,
}

/// One conflict and where it is logged.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Conflict {
    /// The line of the node that detected it first, of those that answered.
    pub line: Line,
    /// Names of the nodes that have it, with the review status there.
    pub at: BTreeMap<String, Status>,
    /// The furthest status of all.
    pub status: Status,
}

/// All nodes' logs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Joined {
    /// Every member.
    pub nodes: Vec<Asked>,
    /// The newest first.
    pub conflicts: Vec<Conflict>,
}

impl Joined {
    /// One sentence for each node whose log is missing.
    #[must_use]
    pub fn missing(&self) -> Vec<String> {
        let away = self.nodes.iter().filter(|node| !node.answered);
        away.map(|node| {
            let why = node.error.as_deref().unwrap_or("no answer");
            format!(
                "the log of node {} ({}) is missing here: {why}",
                node.name, node.id
            )
        })
        .collect()
    }
}

/// This node's answer.
///
/// # Errors
/// When the server refuses.
pub async fn answer(client: &Client, filter: &Filter) -> Result<Answer, Error> {
    let filter = Filter {
        limit: filter.limit.min(LINES_MAX),
        ..filter.clone()
    };
    let mut lines = list(client, &filter).await?;
    for line in &mut lines {
        (line.local_tuple, line.remote_tuple, line.applied_tuple) = (None, None, None);
    }
    Ok(Answer {
        lines,
        only_counted: storm_count(client, &filter).await?,
    })
}

/// Joins what the nodes answered: (id, name, answer or the reason for none).
#[must_use]
pub fn join(answers: Vec<(u16, String, Result<Answer, String>)>, limit: u32) -> Joined {
    let mut out = Joined::default();
    let mut by_id: BTreeMap<String, Conflict> = BTreeMap::new();
    for (id, name, answer) in answers {
        let (answer, error) = match answer {
            Ok(answer) => (answer, None),
            Err(error) => (Answer::default(), Some(error)),
        };
        out.nodes.push(Asked {
            id,
            name: name.clone(),
            answered: error.is_none(),
            error,
            only_counted: answer.only_counted,
        });
        for line in answer.lines {
            let status = line.status;
            let conflict = by_id.entry(line.conflict_id.clone()).or_insert_with(|| Conflict {
                line: line.clone(),
                at: BTreeMap::new(),
                status,
            });
            conflict.at.insert(name.clone(), status);
            conflict.status = conflict.status.max(status);
            if line.detected_at < conflict.line.detected_at {
                conflict.line = line;
            }
        }
    }
    out.conflicts = by_id.into_values().collect();
    out.conflicts
        .sort_by(|a, b| b.line.detected_at.cmp(&a.line.detected_at));
    out.conflicts.truncate(limit as usize);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(id: &str, at: &str, status: &str) -> Line {
        serde_json::from_value(serde_json::json!({
            "conflict_id": id, "detected_at": at, "lost_at": at, "node": "n", "node_id": 1, "schema_name": "s",
            "table_name": "t", "key": {}, "conflict_type": "insert_exists", "policy": "p", "conflict_resolution": "skip",
            "loser": "local", "status": status,
        }))
        .unwrap()
    }

    #[test]
    fn lines_are_joined_by_id_and_a_node_without_an_answer_is_named() {
        let answer = |lines: Vec<Line>| {
            Ok(Answer {
                lines,
                only_counted: 0,
            })
        };
        let joined = join(
            vec![
                (
                    1,
                    "a".to_owned(),
                    answer(vec![
                        line("x", "2026-01-02", "new"),
                        line("y", "2026-01-01", "new"),
                    ]),
                ),
                (
                    2,
                    "b".to_owned(),
                    answer(vec![line("x", "2026-01-03", "replayed")]),
                ),
                (3, "c".to_owned(), Err("connection refused".to_owned())),
            ],
            10,
        );
        let ids: Vec<&str> = joined
            .conflicts
            .iter()
            .map(|each| each.line.conflict_id.as_str())
            .collect();
        assert_eq!(ids, ["x", "y"]);
        let first = joined.conflicts.first().unwrap();
        assert_eq!(first.status, Status::Replayed);
        assert_eq!(first.line.detected_at, "2026-01-02");
        assert_eq!(first.at.keys().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(
            joined.missing(),
            ["the log of node c (3) is missing here: connection refused"]
        );
    }
}
