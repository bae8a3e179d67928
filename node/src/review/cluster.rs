//! The logs of all nodes as one: lines joined by their id, and which node did not answer.
//!
//! In:   the answer of each node            Out: [`Joined`]; what to ask the nodes next
//! Holds: the newest conflicts of the logs read so far
//! Invariants: 1. a node that gives no answer is named with the reason, never left out; 2. a conflict is shown with every node that has
//!        it, whatever its line is like there: what the filter lets through at one node is asked for by its id at all others;
//!        3. none is left out for one that is older
//! Not here: asking the nodes (`crate::link`)

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use super::{Error, Filter, Line, Place, Status, list, storm_count};

/// Most lines that one node gives at once, and most conflicts in what is joined.
pub const LINES_MAX: u32 = 10_000;
/// Lines of a node that are read at once: at first, and once many are wanted.
const PAGE_MIN: u32 = 100;
const PAGE_MAX: u32 = 1_000;

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
    /// Losing writes that it only counted. Where the filter [is of lines alone](Filter::is_of_lines_alone) nobody knows which of
    /// them would pass.
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
    /// The logs were not read to their ends, which would have taken too long: of conflicts before this time some may be missing.
    #[serde(default)]
    pub unread_before: Option<String>,
}

impl Joined {
    /// One sentence for each node whose log is missing, and one if the rest is not whole.
    #[must_use]
    pub fn missing(&self) -> Vec<String> {
        let away = self.nodes.iter().filter(|node| !node.answered);
        let away = away.map(|node| {
            let why = node.error.as_deref().unwrap_or("no answer");
            format!(
                "the log of node {} ({}) is missing here: {why}",
                node.name, node.id
            )
        });
        let unread = self.unread_before.iter().map(|time| {
            format!(
                "reading took too long; of conflicts that were detected before {time} some may be missing"
            )
        });
        away.chain(unread).collect()
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
    // The first question tells of them all.
    let is_first = filter.ids.is_empty() && filter.behind.is_none();
    let only_counted = match is_first {
        true => storm_count(client, &filter).await?,
        false => 0,
    };
    Ok(Answer { lines, only_counted })
}

/// A question for the node at a place in the list of members.
pub type Question = (usize, Filter);
/// Its answer, or the reason for none.
pub type Answered = (usize, Result<Answer, String>);

/// Reads the logs of all members as one, in rounds: pages of each, then by their ids the lines that a page has not given.
///
/// A page holds what passes at its node, the status included. So a conflict that passes is in the pages of some node: its furthest status is
/// the status somewhere, and the first that detected it is a node, too. Whether it passes is then decided of all its lines.
#[derive(Debug)]
pub struct Reading {
    filter: Filter,
    nodes: Vec<Node>,
    /// Those that pass.
    found: BTreeMap<String, Conflict>,
    /// Lines of conflicts that the last pages have brought, with the places of their nodes.
    met: BTreeMap<String, Vec<(usize, Line)>>,
    /// Lines in the next pages.
    page: u32,
}

#[derive(Debug)]
struct Node {
    asked: Asked,
    /// The last line of its last page.
    upto: Option<Place>,
    /// There is nothing behind that, or no answer.
    is_read: bool,
}

impl Node {
    fn lose(&mut self, error: String) {
        self.asked.answered = false;
        self.asked.error.get_or_insert(error);
        self.is_read = true;
    }
}

impl Reading {
    /// Of these members: id and name.
    #[must_use]
    pub fn new(filter: &Filter, members: impl IntoIterator<Item = (u16, String)>) -> Self {
        let node = |(id, name)| Node {
            asked: Asked {
                id,
                name,
                answered: true,
                error: None,
                only_counted: 0,
            },
            upto: None,
            is_read: false,
        };
        let limit = filter.limit.clamp(1, LINES_MAX);
        Self {
            filter: Filter {
                limit,
                ..filter.clone()
            },
            nodes: members.into_iter().map(node).collect(),
            found: BTreeMap::new(),
            met: BTreeMap::new(),
            page: limit.saturating_mul(2).clamp(PAGE_MIN, PAGE_MAX),
        }
    }

    /// The next page of each log that may hold something newer than what would be shown; nothing at the end.
    #[must_use]
    pub fn pages(&self) -> Vec<Question> {
        let last = self.last_shown();
        let wanted = |node: &Node| {
            let is_behind = || match (last, &node.upto) {
                (Some(last), Some(upto)) => instant(&upto.detected_at) < last,
                _ => false,
            };
            !node.is_read && !is_behind()
        };
        let nodes = self.nodes.iter().enumerate();
        nodes
            .filter(|(_, node)| wanted(node))
            .map(|(at, node)| {
                let filter = Filter {
                    limit: self.page(),
                    behind: node.upto.clone(),
                    ..self.filter.clone()
                };
                (at, filter)
            })
            .collect()
    }

    /// Takes in what [`Self::pages`] were answered.
    pub fn paged(&mut self, answers: Vec<Answered>) {
        let page = self.page() as usize;
        for (at, answer) in answers {
            let Some(node) = self.nodes.get_mut(at) else {
                continue;
            };
            let answer = match answer {
                Ok(answer) => answer,
                Err(error) => {
                    node.lose(error);
                    continue;
                }
            };
            if node.upto.is_none() {
                node.asked.only_counted = answer.only_counted;
            }
            let last = answer.lines.last().map(place);
            // The same again would be an end, too: it goes no further.
            node.is_read = answer.lines.len() < page || last.is_none() || last == node.upto;
            node.upto = last.or_else(|| node.upto.take());
            for line in answer.lines {
                if !self.found.contains_key(&line.conflict_id) {
                    let lines = self.met.entry(line.conflict_id.clone()).or_default();
                    lines.push((at, line));
                }
            }
        }
        self.page = self.page.saturating_mul(2).min(PAGE_MAX);
    }

    /// Of each node, by their ids, the lines that others have given and it has not.
    #[must_use]
    pub fn others(&self) -> Vec<Question> {
        let nodes = self
            .nodes
            .iter()
            .enumerate()
            .filter(|(_, node)| node.asked.answered);
        let question = |at| {
            let lacking = |lines: &[(usize, Line)]| lines.iter().all(|(of, _)| *of != at);
            let met = self.met.iter().filter(|(_, lines)| lacking(lines));
            let ids: Vec<String> = met.map(|(id, _)| id.clone()).collect();
            let limit = u32::try_from(ids.len()).unwrap_or(LINES_MAX);
            let filter = Filter {
                ids,
                limit,
                ..Filter::default()
            };
            (at, filter)
        };
        nodes
            .map(|(at, _)| question(at))
            .filter(|(_, filter)| !filter.ids.is_empty())
            .collect()
    }

    /// Takes in what [`Self::others`] were answered, and joins.
    pub fn heard(&mut self, answers: Vec<Answered>) {
        for (at, answer) in answers {
            match answer {
                Ok(answer) => {
                    for line in answer.lines {
                        if let Some(lines) = self.met.get_mut(&line.conflict_id) {
                            lines.push((at, line));
                        }
                    }
                }
                Err(error) => {
                    if let Some(node) = self.nodes.get_mut(at) {
                        node.lose(error);
                    }
                }
            }
        }
        for (id, lines) in std::mem::take(&mut self.met) {
            if let Some(conflict) = self.join(lines).filter(|conflict| self.passes(conflict)) {
                self.found.insert(id, conflict);
            }
        }
    }

    /// What was read.
    #[must_use]
    pub fn end(self) -> Joined {
        // Where it ended early.
        let unread = self.pages().into_iter().filter_map(|(at, _)| {
            let upto = self.nodes.get(at)?.upto.as_ref()?;
            Some(upto.detected_at.clone())
        });
        let unread_before = unread.max_by_key(|time| instant(time));
        let mut conflicts: Vec<Conflict> = self.found.into_values().collect();
        conflicts.sort_by_cached_key(|conflict| {
            (
                std::cmp::Reverse(instant(&conflict.line.detected_at)),
                conflict.line.conflict_id.clone(),
            )
        });
        conflicts.truncate(self.filter.limit as usize);
        Joined {
            nodes: self.nodes.into_iter().map(|node| node.asked).collect(),
            conflicts,
            unread_before,
        }
    }

    /// So many that all ids of one round can be asked for at once.
    fn page(&self) -> u32 {
        let nodes = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX).max(1);
        self.page.min(LINES_MAX / nodes).max(1)
    }

    fn join(&self, lines: Vec<(usize, Line)>) -> Option<Conflict> {
        let mut at = BTreeMap::new();
        for (place, line) in &lines {
            at.insert(self.nodes.get(*place)?.asked.name.clone(), line.status);
        }
        let first = lines.into_iter().map(|(_, line)| line);
        let line = first.min_by_key(|line| instant(&line.detected_at))?;
        let status = at.values().copied().max()?;
        Some(Conflict { line, at, status })
    }

    /// What each line says differently at each node is asked of the conflict.
    fn passes(&self, conflict: &Conflict) -> bool {
        let status = self.filter.status.as_deref();
        let since = self.filter.since.as_deref().map(instant);
        status.is_none_or(|status| status == conflict.status.as_str())
            && since.is_none_or(|since| instant(&conflict.line.detected_at) >= since)
    }

    /// When the last of those was detected that would be shown now; none while there is room for more.
    fn last_shown(&self) -> Option<Timestamp> {
        let times = self.found.values().map(|each| instant(&each.line.detected_at));
        let mut newest: Vec<Timestamp> = times.collect();
        newest.sort_unstable_by(|a, b| b.cmp(a));
        newest.get(self.filter.limit.saturating_sub(1) as usize).copied()
    }
}

fn place(line: &Line) -> Place {
    Place {
        detected_at: line.detected_at.clone(),
        conflict_id: line.conflict_id.clone(),
    }
}

/// What cannot be read is older than all.
fn instant(text: &str) -> Timestamp {
    text.parse().unwrap_or(Timestamp::MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Detected at this minute.
    fn line(id: &str, minute: u32, status: &str) -> Line {
        let at = format!("2026-01-02T10:{minute:02}:00.5+00:00");
        serde_json::from_value(serde_json::json!({
            "conflict_id": id, "detected_at": at, "lost_at": at, "node": "n", "node_id": 1, "schema_name": "s",
            "table_name": "t", "key": {}, "conflict_type": "insert_exists", "policy": "p", "conflict_resolution": "skip",
            "loser": "local", "status": status,
        }))
        .unwrap()
    }

    /// As a node answers.
    fn answer(log: &[Line], filter: &Filter) -> Answer {
        let order = |at: &str, id: &str| (std::cmp::Reverse(instant(at)), id.to_owned());
        let mut lines: Vec<Line> = log
            .iter()
            .filter(|line| {
                filter
                    .status
                    .as_ref()
                    .is_none_or(|status| status == line.status.as_str())
            })
            .filter(|line| filter.ids.is_empty() || filter.ids.contains(&line.conflict_id))
            .filter(|line| {
                let since = filter.since.as_deref().map(instant);
                since.is_none_or(|since| instant(&line.detected_at) >= since)
            })
            .filter(|line| {
                filter.behind.as_ref().is_none_or(|behind| {
                    order(&line.detected_at, &line.conflict_id)
                        > order(&behind.detected_at, &behind.conflict_id)
                })
            })
            .cloned()
            .collect();
        lines.sort_by_key(|line| order(&line.detected_at, &line.conflict_id));
        lines.truncate(filter.limit as usize);
        Answer {
            lines,
            only_counted: 0,
        }
    }

    /// Reads these logs, or the reasons for none, to the end.
    fn read(logs: &[Result<Vec<Line>, &str>], filter: &Filter) -> Joined {
        let members = (1..).zip(["a", "b", "c"].map(str::to_owned));
        let mut reading = Reading::new(filter, members.take(logs.len()));
        let ask = |questions: Vec<Question>| -> Vec<Answered> {
            let answers = questions.into_iter().map(|(at, filter)| {
                let log = logs[at].as_ref();
                (
                    at,
                    log.map(|log| answer(log, &filter))
                        .map_err(|&error| error.to_owned()),
                )
            });
            answers.collect()
        };
        loop {
            let pages = reading.pages();
            if pages.is_empty() {
                return reading.end();
            }
            reading.paged(ask(pages));
            let others = reading.others();
            reading.heard(ask(others));
        }
    }

    /// `id status at/at`, in order.
    fn shown(joined: &Joined) -> Vec<String> {
        let each = joined.conflicts.iter().map(|conflict| {
            let at: Vec<&str> = conflict.at.keys().map(String::as_str).collect();
            format!(
                "{} {} {}",
                conflict.line.conflict_id,
                conflict.status,
                at.join("/")
            )
        });
        each.collect()
    }

    fn limit(limit: u32) -> Filter {
        Filter {
            limit,
            ..Filter::default()
        }
    }

    #[test]
    fn lines_are_joined_by_id_and_a_node_without_an_answer_is_named() {
        let logs = [
            Ok(vec![line("x", 2, "new"), line("y", 1, "new")]),
            Ok(vec![line("x", 3, "replayed")]),
            Err("connection refused"),
        ];
        let joined = read(&logs, &limit(10));
        assert_eq!(shown(&joined), ["x replayed a/b", "y new a"]);
        assert!(joined.conflicts[0].line.detected_at.contains("10:02"));
        assert_eq!(
            joined.missing(),
            ["the log of node c (3) is missing here: connection refused"]
        );
    }

    #[test]
    fn a_status_is_of_the_conflict_and_not_of_some_line_of_it() {
        let new = || Ok(vec![line("x", 2, "new"), line("y", 1, "new")]);
        let logs = [
            Ok(vec![line("x", 2, "acknowledged"), line("y", 1, "new")]),
            new(),
            new(),
        ];
        let of = |status: &str| {
            let filter = Filter {
                status: Some(status.to_owned()),
                ..limit(1)
            };
            shown(&read(&logs, &filter))
        };
        assert_eq!(of("new"), ["y new a/b/c"]);
        assert_eq!(of("acknowledged"), ["x acknowledged a/b/c"]);
        assert_eq!(of("replayed"), [""; 0]);
    }

    #[test]
    fn a_status_that_few_have_is_looked_for_to_the_end() {
        let ids: Vec<String> = (0..1_200).map(|n| format!("{n:04}")).collect();
        let log = |status: &str| Ok(ids.iter().map(|id| line(id, 9, status)).collect::<Vec<_>>());
        let mut logs = [log("dismissed"), log("new")];
        logs[0].as_mut().unwrap()[1_150].status = Status::New;
        let filter = Filter {
            status: Some("new".to_owned()),
            ..limit(5)
        };
        assert_eq!(shown(&read(&logs, &filter)), ["1150 new a/b"]);
    }

    #[test]
    fn what_one_node_has_found_only_now_is_listed_with_all_that_found_it_before() {
        let old: Vec<Line> = (0..300)
            .map(|n| line(&format!("old {n:03}"), 1, "dismissed"))
            .collect();
        let new: Vec<Line> = (0..200)
            .map(|n| line(&format!("new {n:03}"), 20, "new"))
            .collect();
        let there = || Ok([old.clone(), new.clone()].concat());
        // It was away: what the others found first it has just found.
        let late: Vec<Line> = (0..300)
            .map(|n| line(&format!("old {n:03}"), 30, "new"))
            .collect();
        let logs = [there(), there(), Ok([late, new.clone()].concat())];
        let joined = shown(&read(&logs, &limit(50)));
        assert_eq!(joined.len(), 50);
        for (at, line) in joined.iter().enumerate() {
            assert_eq!(*line, format!("new {at:03} new a/b/c"));
        }
        let joined = shown(&read(&logs, &limit(201)));
        assert_eq!(joined.last().unwrap(), "old 000 dismissed a/b/c");
        // Its hour is that of who found it first.
        let filter = Filter {
            since: Some("2026-01-02T10:25:00Z".to_owned()),
            ..limit(50)
        };
        assert_eq!(shown(&read(&logs, &filter)), [""; 0]);
    }

    #[test]
    fn a_reading_that_ends_early_says_how_far_it_is() {
        let log: Vec<Line> = (0..150).map(|n| line(&format!("{n:03}"), 9, "new")).collect();
        let mut reading = Reading::new(&limit(120), [(1, "a".to_owned())]);
        reading.page = 100;
        let pages = reading.pages();
        reading.paged(vec![(0, Ok(answer(&log, &pages[0].1)))]);
        reading.heard(Vec::new());
        let joined = reading.end();
        assert_eq!(joined.conflicts.len(), 100);
        assert!(joined.missing()[0].contains("before 2026-01-02T10:09:00.5+00:00"));
    }
}
