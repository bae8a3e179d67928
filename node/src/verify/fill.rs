//! Adding a table that has rows: those of one node are brought to the nodes that lack them, while everybody writes.
//!
//! In:   tables that every node has alike, and that all but the source replicate already            Out: rows at the nodes that lack
//!       them; then a comparison
//! Holds: keys of a portion, rows of a few of them
//! Invariants: 1. a row is written only where there is none, as it is at the source, at a common cut of its writes (see
//!        [`super`]) and while its watch is untouched; 2. what differs otherwise is left, and told by the comparison; 3. nothing is
//!        read at a node before those who wrote the table before it was replicated there have ended; 4. it ends: a row that is not
//!        there once it is written is written a few times, one that cannot be written for long is left
//! On crash: what was written is equal and is passed by when it is run again
//! Not here: the publication (`crate::setup::tables`), the write itself (`crate::apply::mend`)
//!
//! # Why this is right
//!
//! From the moment when all nodes publish the table every write of it is a version, and versions converge whatever rows they
//! meet. What is left are rows that no version has made: each node has what it had before. A row without a version counts as written
//! by something that everybody knows, so whatever writes it covers it; and the cut proves of a row that all nodes
//! have met the same versions of it. Images that differ then differ by what was there before, and the image at the source is what
//! those versions make of it there. Written at a node without the row by its applier, as an echo, it is nobody's news: it has no stamp,
//! wins over no write that is on its way, adds to no merged column, and is not written again at the source.
//!
//! Writing the rows again at the source, as local transactions, was the alternative (it is what a heal does). Each would be
//! the newest write of its row: an application's write at another node that is on its way, or comes from behind a partition, would lose to a
//! copy of something old. In exchange it would not need all nodes at once.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use anabranch_proto::link as pb;
use anabranch_proto::schema::full_name;
use bytes::Bytes;
use futures_util::future::try_join_all;
use tokio::time::Instant;

use super::blocks;
use super::decided::{Decided, decided, key_of};
use super::repair::{WRITTEN_MAX, unlike};
use super::run::{Pace, ROWS_AT_ONCE, Run, Table};
use super::shape::{same_columns, shape, unfit};
use super::talk::{Error, MOVED, Talk};
use super::{Action, Event, Report, TableReport};

/// Rows that are brought at once, at most.
const BROUGHT_AT_ONCE: usize = 500;
/// Rounds that a node may fail for some rows: it waits for a minute each time before it says that it does not catch up.
const FAILURES_MAX: u32 = 5;
/// How long who asked may take to put the tables into the publication.
const PUBLISHED_WITHIN: Duration = Duration::from_secs(300);
/// Reasons that are kept, at most.
const REFUSED_MAX: usize = 1_000;

/// Why a row was not brought.
struct Refused {
    key: serde_json::Value,
    action: Action,
}

impl Run {
    /// Adds `names` with the rows of the node `from`.
    pub(super) async fn add(
        &mut self,
        (names, from, dry_run): (&[(String, String)], &str, bool),
        report: &mut Report,
    ) -> Result<(), Error> {
        let Some(source) = self.talks.iter().position(|talk| talk.name == from) else {
            report
                .problems
                .push(format!("there is no node `{from}` among those that answer"));
            return Ok(());
        };
        let opened = self.open_all(names).await?;
        report.problems = unfit(&self.talks, &opened);
        report.problems.extend(self.unready(&opened, names, source));
        if !report.problems.is_empty() || dry_run {
            return Ok(());
        }
        // From here on rows that are missing are no drift.
        for talk in &mut self.talks {
            talk.adding(names, false).await?;
        }
        let tables = names
            .iter()
            .map(|(schema, name)| full_name(schema, name))
            .collect();
        let ready = Event::Started {
            nodes: report.nodes.clone(),
            tables,
        };
        let _ = self.events.send(ready).await;
        self.published(names, source).await?;
        let what = "waiting for transactions that wrote it before it was replicated";
        for (schema, name) in names {
            let table = full_name(schema, name);
            let step = Event::Step {
                table,
                what: what.to_owned(),
                rows: 0,
            };
            let _ = self.events.send(step).await;
        }
        try_join_all(self.talks.iter_mut().map(|talk| talk.adding(names, true))).await?;
        let opened = self.open_all(&[]).await?;
        for (schema, name) in names {
            let (table, mut result) = shape(&self.talks, &opened, schema, name);
            let done = match &table {
                Some(table) => self.add_one(table, source, &mut result).await,
                None => Ok(()),
            };
            report.tables.push(result);
            match done {
                Err(error) if error.passing => report.problems.push(format!("{schema}.{name}: {error}")),
                done => done?,
            }
        }
        Ok(())
    }

    async fn open_all(&mut self, also: &[(String, String)]) -> Result<Vec<pb::VerifyOpened>, Error> {
        try_join_all(self.talks.iter_mut().map(|talk| talk.open(also))).await
    }

    /// Why the tables cannot be added: everything, with what to do where.
    fn unready(&self, opened: &[pb::VerifyOpened], names: &[(String, String)], source: usize) -> Vec<String> {
        let mut said = Vec::new();
        for (schema, name) in names {
            let table = format!("{schema}.{name}");
            let of = |opened: &pb::VerifyOpened| {
                let mut tables = opened.tables.iter();
                tables
                    .find(|table| table.schema == *schema && table.name == *name)
                    .cloned()
            };
            let Some(right) = opened.get(source).and_then(of) else {
                said.push(format!("{table}: is not here, or has no primary key"));
                continue;
            };
            if !right.problem.is_empty() {
                said.push(right.problem);
                continue;
            }
            for (place, (talk, opened)) in self.talks.iter().zip(opened).enumerate() {
                let node = &talk.name;
                match of(opened) {
                    _ if place == source => {}
                    None => said.push(format!(
                        "{table}: is not at node {node}, or has no primary key there: create it as it is here, without its rows, add it \
                         to postgres.tables there, and run `anabranch init`"
                    )),
                    Some(other) if !other.problem.is_empty() => {
                        said.push(format!("at node {node}: {}", other.problem));
                    }
                    Some(other) => {
                        let differs = same_columns(&right, &other);
                        if !differs.is_empty() {
                            let differs = differs.join("; ");
                            said.push(format!("{table}: is another table at node {node}: {differs}; make both the same"));
                        } else if other.unpublished {
                            said.push(format!(
                                "{table}: is not replicated by node {node}: add it to postgres.tables there, and run `anabranch init`"
                            ));
                        }
                    }
                }
            }
        }
        said
    }

    /// Waits until the source publishes the tables.
    async fn published(&mut self, names: &[(String, String)], source: usize) -> Result<(), Error> {
        let until = Instant::now() + PUBLISHED_WITHIN;
        let Some(talk) = self.talks.get_mut(source) else {
            return Ok(());
        };
        loop {
            let opened = talk.open(&[]).await?;
            let is_there = |name: &(String, String)| {
                let mut tables = opened.tables.iter();
                tables.any(|table| table.schema == name.0 && table.name == name.1)
            };
            if names.iter().all(is_there) {
                return Ok(());
            }
            if Instant::now() >= until || self.events.is_closed() {
                return Err(talk.error("the tables did not get into the publication; run this again"));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn add_one(&mut self, table: &Table, source: usize, result: &mut TableReport) -> Result<(), Error> {
        let refused = self.fill(table, source, result).await?;
        let compared = self.table(table, result).await;
        for refused in refused {
            let mut rows = result.differences.iter_mut();
            if let Some(row) = rows.find(|row| row.key == refused.key) {
                row.actions.push(refused.action);
            }
        }
        compared
    }

    /// Brings the rows of `source` to those that lack them.
    async fn fill(
        &mut self,
        table: &Table,
        source: usize,
        result: &mut TableReport,
    ) -> Result<Vec<Refused>, Error> {
        let scan = table.scan(self.options.rate);
        let all_rows = table.rows.saturating_mul(self.talks.len() as u64);
        self.step(table, "hashing blocks", all_rows).await;
        let nodes = self.blocks(table, &scan).await?;
        let mut differing = blocks::differing(&nodes);
        let alone = blocks::alone(&nodes, source, &mut differing);
        drop(nodes);
        let mut refused = Vec::new();
        // What others have nothing of is not compared: the source alone reads it, once, and waits whenever there is enough to bring.
        let wanted = blocks::bitmap(scan.bits, &alone);
        let mut from = (!alone.is_empty()).then_some(0);
        let mut found = 0;
        while let Some(page) = from {
            let rows = all_rows.saturating_sub(found * self.talks.len() as u64);
            self.step(table, "looking which rows are missing", rows).await;
            let keys = self.keys_at((table, &scan), (source, page), wanted.clone());
            let (keys, next) = keys.await?;
            found += keys.len() as u64;
            self.bring_all(table, keys, source, (result, &mut refused))
                .await?;
            from = next;
        }
        while !differing.is_empty() {
            let some = blocks::portion(&mut differing, ROWS_AT_ONCE);
            self.step(table, "looking which rows are missing", all_rows).await;
            let candidates = self.candidates(table, &scan, &some).await?;
            self.bring_all(table, candidates, source, (result, &mut refused))
                .await?;
        }
        Ok(refused)
    }

    /// Brings rows, some at a time, and no faster than the rate.
    async fn bring_all(
        &mut self,
        table: &Table,
        keys: Vec<Bytes>,
        source: usize,
        (result, refused): (&mut TableReport, &mut Vec<Refused>),
    ) -> Result<(), Error> {
        let count = keys.len() as u64;
        self.step(table, &format!("bringing {count} rows"), count).await;
        let began = Instant::now();
        let mut done = 0_u64;
        for some in keys.chunks(BROUGHT_AT_ONCE) {
            self.bring(table, some.to_vec(), source, (result, refused))
                .await?;
            done += some.len() as u64;
            let brought = Event::Brought {
                table: table.full_name(),
                rows: some.len() as u64,
            };
            let _ = self.events.send(brought).await;
            if let Some(due) = (done * 1_000).checked_div(self.options.rate) {
                tokio::time::sleep_until(began + Duration::from_millis(due)).await;
            }
        }
        Ok(())
    }

    /// Brings some rows, in rounds: a row is done once a round has seen it equal, or not to be brought.
    async fn bring(
        &mut self,
        table: &Table,
        mut left: Vec<Bytes>,
        source: usize,
        (result, refused): (&mut TableReport, &mut Vec<Refused>),
    ) -> Result<(), Error> {
        let mut pace = Pace::new(self.options.patience_s);
        let mut written: HashSet<(Bytes, usize)> = HashSet::new();
        let mut times: HashMap<Bytes, u32> = HashMap::new();
        let (mut at_once, mut failures) = (left.len(), 0);
        while !left.is_empty() {
            let rest = left.split_off(at_once.clamp(1, left.len()));
            let (_, states) = match self.round(table, &left, Some(source)).await {
                Ok(round) => round,
                // A node is late, or waits for a lock.
                Err(error) if error.passing && failures < FAILURES_MAX => {
                    failures += 1;
                    left.extend(rest);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let mut mends: Vec<Vec<pb::VerifyMendRow>> = vec![Vec::new(); self.talks.len()];
            let mut again: Vec<Bytes> = Vec::new();
            let (mut unsent, mut done) = (0, 0);
            for (at, key) in left.iter().enumerate() {
                let state = |node: usize| states.get(node).and_then(|states| states.get(at));
                let right = state(source);
                match decided(&self.talks, &table.columns, &states, at) {
                    Decided::Equal => {
                        done += 1;
                        for (node, talk) in self.talks.iter().enumerate() {
                            if written.contains(&(key.clone(), node)) {
                                *result.brought.entry(talk.name.clone()).or_default() += 1;
                            }
                        }
                    }
                    Decided::Moved => again.push(key.clone()),
                    // The comparison tells of them.
                    Decided::Quarantined(_) => done += 1,
                    Decided::Different(difference) => {
                        let others = difference.images.values().flatten().any(|&image| image > 1);
                        let Some(right) = right.filter(|right| right.present && !others) else {
                            done += 1;
                            continue;
                        };
                        if right.row.is_empty() && left.len() == 1 {
                            done += 1;
                            let action = Action {
                                node: self.name_of(source),
                                what: "nothing".to_owned(),
                                refused: Some(
                                    "the row is larger than 3 MiB: UPDATE it here, setting a column to itself, and it travels".to_owned(),
                                ),
                            };
                            refuse(refused, difference.key, action);
                            continue;
                        }
                        if times.get(key).is_some_and(|&times| times >= WRITTEN_MAX) {
                            done += 1;
                            let lacks = |node: &usize| state(*node).is_some_and(|state| !state.present);
                            let node = (0..self.talks.len()).find(lacks).unwrap_or(source);
                            let action = Action {
                                node: self.name_of(node),
                                what: "insert".to_owned(),
                                refused: Some(unlike(&[])),
                            };
                            refuse(refused, difference.key, action);
                            continue;
                        }
                        again.push(key.clone());
                        if right.row.is_empty() {
                            unsent += 1;
                            continue;
                        }
                        for (node, rows) in mends.iter_mut().enumerate() {
                            if state(node).is_some_and(|state| !state.present) {
                                written.insert((key.clone(), node));
                                rows.push(pb::VerifyMendRow {
                                    at: u32::try_from(at).unwrap_or(u32::MAX),
                                    row: right.row.clone(),
                                });
                            }
                        }
                    }
                }
            }
            let outcomes = match self.mend(mends).await {
                Ok(outcomes) => outcomes,
                // Whether they were written another round tells.
                Err(error) if error.passing && failures < FAILURES_MAX => {
                    failures += 1;
                    Vec::new()
                }
                Err(error) => return Err(error),
            };
            let mut wrote: BTreeSet<usize> = BTreeSet::new();
            for (node, outcome) in outcomes {
                let at = outcome.at as usize;
                let Some(key) = left.get(at) else { continue };
                if outcome.refused.is_empty() {
                    wrote.insert(at);
                    continue;
                }
                if outcome.refused == MOVED {
                    continue;
                }
                again.retain(|other| other != key);
                done += 1;
                let action = Action {
                    node,
                    what: "insert".to_owned(),
                    refused: Some(outcome.refused),
                };
                refuse(refused, key_of(&states, at), action);
            }
            for key in wrote.iter().filter_map(|&at| left.get(at)) {
                *times.entry(key.clone()).or_default() += 1;
            }
            // What did not fit an answer comes in smaller portions.
            at_once = if unsent > 0 {
                (left.len() - unsent).max(1)
            } else {
                BROUGHT_AT_ONCE
            };
            left = again;
            left.extend(rest);
            // What was written is looked at again at once.
            if !wrote.is_empty() || done > 0 {
                pace = Pace::new(self.options.patience_s);
            } else if !left.is_empty() && unsent == 0 && !pace.again().await {
                // Written all the time: every such write travels whole. Or locked. The comparison tells.
                break;
            }
        }
        Ok(())
    }

    fn name_of(&self, place: usize) -> String {
        self.talks
            .get(place)
            .map_or_else(String::new, |talk: &Talk| talk.name.clone())
    }
}

fn refuse(refused: &mut Vec<Refused>, key: serde_json::Value, action: Action) {
    if refused.len() < REFUSED_MAX {
        refused.push(Refused { key, action });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    use pb::verify_request::Ask;
    use pb::verify_response::Answer;
    use tokio::sync::mpsc;

    use super::super::Options;
    use super::super::run::tests::node;
    use super::*;
    use crate::shared::lock;

    #[tokio::test]
    async fn what_the_others_have_nothing_of_is_read_at_the_source_alone_and_once() {
        let read = Arc::new(Mutex::new(Vec::new()));
        let watched = Arc::new(Mutex::new(Vec::new()));
        let answers = |id: u16| {
            let (read, watched, count) = (Arc::clone(&read), Arc::clone(&watched), AtomicUsize::new(0));
            move |ask: Ask| match ask {
                Ask::Scan(scan) if scan.wanted.is_empty() => {
                    let (count, hash) = if id == 1 { (3, 5) } else { (0, 0) };
                    vec![
                        Answer::Blocks(pb::VerifyBlocks {
                            first: 0,
                            counts: vec![count],
                            hashes: vec![hash],
                        }),
                        Answer::Done(pb::VerifyDone {}),
                    ]
                }
                Ask::Scan(scan) => {
                    lock(&read).push((id, scan.first_page));
                    // It stops behind two.
                    let (keys, next_page) = if scan.first_page == 0 {
                        (vec!["b", "a"], 7)
                    } else {
                        (vec!["c"], 0)
                    };
                    let rows = keys.into_iter().map(|key| pb::VerifyRow {
                        key: Bytes::from_static(key.as_bytes()),
                        hash: 5,
                    });
                    vec![
                        Answer::Rows(pb::VerifyRows { rows: rows.collect() }),
                        Answer::Progress(pb::VerifyProgress { rows: 2, next_page }),
                        Answer::Done(pb::VerifyDone {}),
                    ]
                }
                Ask::Watch(watch) => {
                    count.store(watch.keys.len(), Ordering::Relaxed);
                    if id == 1 {
                        lock(&watched).extend(watch.keys);
                    }
                    vec![Answer::Watched(pb::VerifyWatched { vector: Vec::new() })]
                }
                // As if a write of each had come everywhere meanwhile.
                Ask::Look(_) => {
                    let state = pb::VerifyState {
                        present: true,
                        hash: 5,
                        ..pb::VerifyState::default()
                    };
                    let states = vec![state; count.load(Ordering::Relaxed)];
                    vec![Answer::Looked(pb::VerifyLooked { states })]
                }
                _ => vec![Answer::Done(pb::VerifyDone {})],
            }
        };
        let (events, _heard) = mpsc::channel(1_000);
        let mut run = Run {
            talks: vec![node(1, answers(1)), node(2, answers(2)), node(3, answers(3))],
            options: Options::default(),
            events,
        };
        let table = Table {
            schema: "public".to_owned(),
            name: "t".to_owned(),
            columns: vec!["id".to_owned()],
            rows: 3,
        };
        let filled = run.fill(&table, 0, &mut TableReport::default()).await;
        assert!(filled.unwrap().is_empty());
        assert_eq!(*lock(&read), [(1, 0), (1, 7)]);
        assert_eq!(*lock(&watched), ["a", "b", "c"]);
    }
}
