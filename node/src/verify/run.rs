//! The coordinator: asks every node, finds candidates, decides each by a common cut of its writes.
//!
//! In:   conversations with all nodes            Out: events, a report
//! Holds: blocks of one table; rows of some blocks of it
//! Invariants: every node takes part, or the verdict is not that all is equal
//! Not here: why this is sound ([`super`]), mending ([`super::repair`])

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anabranch_proto::link as pb;
use anabranch_proto::schema::name_fits;
use anabranch_proto::{NodeId, Vector};
use bytes::Bytes;
use futures_util::future::{join_all, try_join_all};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::blocks::{self, Blocks, Rows};
use super::talk::{Error, Scan, Scanned, Talk};
use crate::shared::lock;

use super::{Difference, Event, Options, Report, TableReport, Verdict};

/// Rows of differing blocks that are held at once.
pub(super) const ROWS_AT_ONCE: u64 = 300_000;
/// Rows that are decided at once.
const DECIDED_AT_ONCE: usize = 1_000;
/// How long a node may take to apply what the others had applied when rows were watched.
const CATCH_UP: Duration = Duration::from_secs(60);

/// All that is known of a run.
pub(super) struct Run {
    pub(super) talks: Vec<Talk>,
    pub(super) options: Options,
    pub(super) events: mpsc::Sender<Event>,
}

/// A table as all nodes have it.
pub(super) struct Table {
    pub(super) schema: String,
    pub(super) name: String,
    pub(super) columns: Vec<String>,
    pub(super) rows: u64,
}

/// A row whose images differ at a common cut.
pub(super) struct Proven {
    /// Canonical.
    pub(super) key: Bytes,
    pub(super) difference: Difference,
}

/// What a round says of a row.
pub(super) enum Decided {
    Equal,
    /// A write of it was met: another round.
    Moved,
    Quarantined(Difference),
    Different(Difference),
}

impl Table {
    pub(super) fn full_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    /// At each node so many rows in a second at most.
    pub(super) fn scan(&self, rate: u64) -> Scan {
        Scan {
            schema: self.schema.clone(),
            name: self.name.clone(),
            columns: self.columns.clone(),
            bits: blocks::bits_for(self.rows),
            rate,
        }
    }
}

/// Verifies, and repairs if told to. `absent` says why a member takes no part.
pub async fn run(talks: Vec<Talk>, absent: Vec<String>, options: Options, events: mpsc::Sender<Event>) {
    let mut report = Report {
        verdict: Verdict::Unknown,
        nodes: talks.iter().map(|talk| talk.name.clone()).collect(),
        problems: absent,
        tables: Vec::new(),
    };
    let source = options.repair.as_ref().and_then(|repair| repair.from.as_ref());
    if let Some(source) = source
        && !report.nodes.contains(source)
    {
        let text = format!("there is no node `{source}` to repair from among those that answer");
        report.problems.push(text);
    }
    if report.problems.is_empty() {
        let mut run = Run {
            talks,
            options,
            events: events.clone(),
        };
        let done = match run.options.add.clone() {
            None => run.all(&mut report).await,
            Some(add) => {
                // Each named whole.
                let names = run.options.tables.iter().filter_map(|name| split(name));
                let names: Vec<_> = names.collect();
                run.add((&names, &add.from, add.dry_run), &mut report).await
            }
        };
        if let Err(error) = done {
            report.problems.push(error.to_string());
        }
    }
    report.judge();
    // Who asked may be gone.
    let _ = events.send(Event::Report(report)).await;
}

impl Run {
    async fn all(&mut self, report: &mut Report) -> Result<(), Error> {
        let opened = try_join_all(self.talks.iter_mut().map(|talk| talk.open(&[]))).await?;
        report.problems = unfit(&self.talks, &opened);
        if !report.problems.is_empty() {
            return Ok(());
        }
        let (tables, unknown) = chosen(&self.options.tables, &opened);
        for pattern in unknown {
            let text = format!("`{pattern}` is no replicated table");
            report.problems.push(text);
        }
        let names = tables
            .iter()
            .map(|(schema, name)| format!("{schema}.{name}"))
            .collect();
        let started = Event::Started {
            nodes: report.nodes.clone(),
            tables: names,
        };
        let _ = self.events.send(started).await;
        for (schema, name) in tables {
            let (table, shape) = shape(&self.talks, &opened, &schema, &name);
            let mut result = TableReport {
                table: format!("{schema}.{name}"),
                shape,
                ..TableReport::default()
            };
            if let Some(table) = table {
                match self.table(&table, &mut result).await {
                    Ok(()) => {}
                    Err(error) if error.passing => report.problems.push(format!("{}: {error}", result.table)),
                    Err(error) => {
                        report.tables.push(result);
                        return Err(error);
                    }
                }
            }
            report.tables.push(result);
        }
        Ok(())
    }

    pub(super) async fn step(&self, table: &Table, what: &str, rows: u64) {
        let step = Event::Step {
            table: table.full_name(),
            what: what.to_owned(),
            rows,
        };
        let _ = self.events.send(step).await;
    }

    pub(super) async fn table(&mut self, table: &Table, result: &mut TableReport) -> Result<(), Error> {
        let scan = table.scan(self.options.rate);
        let all_rows = table.rows.saturating_mul(self.talks.len() as u64);
        self.step(table, "hashing blocks", all_rows).await;
        let nodes = self.blocks(table, &scan).await?;
        for (talk, blocks) in self.talks.iter().zip(&nodes) {
            let count = blocks.iter().map(|block| block.0).sum();
            result.rows.insert(talk.name.clone(), count);
        }
        result.blocks = 1 << scan.bits;
        let mut differing = blocks::differing(&nodes);
        drop(nodes);
        result.blocks_read = differing.len() as u64;
        let mut proven = Vec::new();
        while !differing.is_empty() {
            if proven.len() >= self.options.rows_max as usize {
                result.more = true;
                break;
            }
            let some = blocks::portion(&mut differing, ROWS_AT_ONCE);
            let what = format!("reading {} blocks that differ", some.len());
            self.step(table, &what, all_rows).await;
            let candidates = self.candidates(table, &scan, &some).await?;
            let what = format!("deciding {} rows", candidates.len());
            self.step(table, &what, 0).await;
            for chunk in candidates.chunks(DECIDED_AT_ONCE) {
                if proven.len() >= self.options.rows_max as usize {
                    result.more = true;
                    break;
                }
                proven.extend(self.decide(table, chunk.to_vec(), result).await?);
            }
        }
        if let Some(repair) = self.options.repair.clone() {
            self.repair(table, &mut proven, &repair, result).await?;
        }
        result
            .differences
            .extend(proven.into_iter().map(|row| row.difference));
        Ok(())
    }

    async fn snapshots(&mut self, table: &Table) -> Result<(), Error> {
        let all = self.talks.iter_mut();
        try_join_all(all.map(|talk| talk.snapshot(&table.schema, &table.name))).await?;
        Ok(())
    }

    pub(super) async fn blocks(&mut self, table: &Table, scan: &Scan) -> Result<Vec<Blocks>, Error> {
        // All at about the same moment: less is in flight between them.
        self.snapshots(table).await?;
        let (events, name) = (&self.events, &table.full_name());
        let scans = self.talks.iter_mut();
        try_join_all(scans.map(|talk| scan_blocks(talk, scan, events, name))).await
    }

    /// Keys of the rows of some blocks that are not read as the same everywhere.
    pub(super) async fn candidates(
        &mut self,
        table: &Table,
        scan: &Scan,
        blocks: &[u32],
    ) -> Result<Vec<Bytes>, Error> {
        self.snapshots(table).await?;
        let wanted = blocks::bitmap(scan.bits, blocks);
        let rows = Mutex::new(Rows::of(self.talks.len()));
        let (events, name, rows_of) = (&self.events, &table.full_name(), &rows);
        let scans = self.talks.iter_mut().enumerate();
        let scans = scans.map(|at| scan_rows(at, scan, wanted.clone(), rows_of, (events, name)));
        try_join_all(scans).await?;
        let rows = rows.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(rows.candidates())
    }

    /// Decides candidates, round by round; gives those whose difference is proven.
    async fn decide(
        &mut self,
        table: &Table,
        mut left: Vec<Bytes>,
        result: &mut TableReport,
    ) -> Result<Vec<Proven>, Error> {
        let mut proven = Vec::new();
        let mut pace = Pace::new(self.options.patience_s);
        let mut keys = Vec::new();
        while !left.is_empty() {
            let (_, states) = self.round(table, &left, None).await?;
            let mut again = Vec::new();
            keys.clear();
            for (at, key) in left.into_iter().enumerate() {
                match decided(&self.talks, &table.columns, &states, at) {
                    Decided::Equal => {}
                    Decided::Moved => {
                        keys.push(key_of(&states, at));
                        again.push(key);
                    }
                    Decided::Quarantined(difference) => result.quarantined.push(difference),
                    Decided::Different(difference) => proven.push(Proven { key, difference }),
                }
            }
            left = again;
            if !left.is_empty() && !pace.again().await {
                result.undecided.append(&mut keys);
                break;
            }
        }
        Ok(proven)
    }

    /// Both steps of the cut for some rows: the vector of the cut, and their states at each node. `whole` is the place of the node whose rows
    /// are wanted themselves.
    pub(super) async fn round(
        &mut self,
        table: &Table,
        keys: &[Bytes],
        whole: Option<usize>,
    ) -> Result<(Vector, Vec<Vec<pb::VerifyState>>), Error> {
        let watched = self.talks.iter_mut();
        let watched = watched.map(|talk| talk.watch(&table.schema, &table.name, keys.to_vec()));
        let mut upto = Vector::new();
        // All are heard to the end, whoever fails: else the next question would meet the answer to this one.
        for vector in join_all(watched).await {
            upto.join(&vector?);
        }
        let (cut, columns) = (&upto, &table.columns);
        let looks = self.talks.iter_mut().enumerate();
        let looks = looks.map(|(at, talk)| talk.look(cut, columns, CATCH_UP, whole == Some(at)));
        let states = join_all(looks).await.into_iter().collect::<Result<_, _>>()?;
        Ok((upto, states))
    }
}

async fn scan_blocks(
    talk: &mut Talk,
    scan: &Scan,
    events: &mpsc::Sender<Event>,
    table: &str,
) -> Result<Blocks, Error> {
    let mut blocks: Blocks = vec![(0, 0); 1 << scan.bits];
    let mut before = 0;
    talk.scan(scan, Bytes::new()).await?;
    loop {
        match talk.scanned().await? {
            Scanned::Progress(rows) => tell(events, table, &talk.name, rows, &mut before).await,
            Scanned::Blocks(first, some) => {
                let slots = blocks.iter_mut().skip(first as usize);
                slots.zip(some).for_each(|(slot, value)| *slot = value);
            }
            Scanned::Rows(_) => {}
            Scanned::End => return Ok(blocks),
        }
    }
}

async fn scan_rows(
    (at, talk): (usize, &mut Talk),
    scan: &Scan,
    wanted: Bytes,
    rows: &Mutex<Rows>,
    (events, table): (&mpsc::Sender<Event>, &str),
) -> Result<(), Error> {
    let mut before = 0;
    talk.scan(scan, wanted).await?;
    loop {
        match talk.scanned().await? {
            Scanned::Progress(rows) => tell(events, table, &talk.name, rows, &mut before).await,
            Scanned::Rows(some) => {
                let mut rows = lock(rows);
                some.into_iter().for_each(|(key, hash)| rows.add(at, key, hash));
            }
            Scanned::Blocks(..) => {}
            Scanned::End => return Ok(()),
        }
    }
}

/// Says how many more rows were read.
async fn tell(events: &mpsc::Sender<Event>, table: &str, node: &str, rows: u64, before: &mut u64) {
    let more = rows.saturating_sub(*before);
    *before = rows;
    let read = Event::Read {
        table: table.to_owned(),
        node: node.to_owned(),
        rows: more,
    };
    let _ = events.send(read).await;
}

/// Pauses between rounds, longer each time, until the patience is over.
pub(super) struct Pace {
    until: Instant,
    pause: Duration,
}

impl Pace {
    pub(super) fn new(patience_s: u32) -> Self {
        Self {
            until: Instant::now() + Duration::from_secs(patience_s.into()),
            pause: Duration::from_millis(10),
        }
    }

    /// Waits; false when it is over.
    pub(super) async fn again(&mut self) -> bool {
        if Instant::now() >= self.until {
            return false;
        }
        // Rows written at a steady beat shall not be met at that beat.
        let jitter = rand::random::<f64>() + 0.5;
        tokio::time::sleep(self.pause.mul_f64(jitter)).await;
        self.pause = (self.pause * 2).min(Duration::from_millis(500));
        true
    }
}

pub(super) fn key_of(states: &[Vec<pb::VerifyState>], at: usize) -> serde_json::Value {
    let key = states.iter().find_map(|of_node| Some(&of_node.get(at)?.key));
    key.and_then(|key| serde_json::from_str(key).ok())
        .unwrap_or_default()
}

/// What the states of the row at `at` say.
pub(super) fn decided(
    talks: &[Talk],
    columns: &[String],
    states: &[Vec<pb::VerifyState>],
    at: usize,
) -> Decided {
    let Some(row) = states.iter().map(|of_node| of_node.get(at)).collect() else {
        return Decided::Moved;
    };
    let row: Vec<&pb::VerifyState> = row;
    let names = talks.iter().map(|talk| talk.name.as_str());
    of_states(&names.collect::<Vec<_>>(), columns, &row)
}

fn of_states(names: &[&str], columns: &[String], row: &[&pb::VerifyState]) -> Decided {
    let image = |state: &pb::VerifyState| state.present.then_some(state.hash);
    let mut kinds: Vec<i64> = Vec::new();
    let mut images = BTreeMap::new();
    for (state, name) in row.iter().zip(names) {
        let number = image(state).map(|hash| {
            let place = kinds.iter().position(|&kind| kind == hash);
            let place = place.unwrap_or_else(|| {
                kinds.push(hash);
                kinds.len() - 1
            });
            u32::try_from(place + 1).unwrap_or(u32::MAX)
        });
        images.insert((*name).to_owned(), number);
    }
    let there: Vec<&&pb::VerifyState> = row.iter().filter(|state| state.present).collect();
    if kinds.len() <= 1 && (there.is_empty() || there.len() == row.len()) {
        return Decided::Equal;
    }
    let column_differs = |at: usize| {
        let values: BTreeSet<Option<&i64>> = there.iter().map(|state| state.column_hashes.get(at)).collect();
        values.len() > 1
    };
    let differing = columns.iter().enumerate().filter(|(at, _)| column_differs(*at));
    let key = row.first().map(|state| state.key.as_str()).unwrap_or_default();
    let difference = Difference {
        key: serde_json::from_str(key).unwrap_or_default(),
        images,
        columns: differing.map(|(_, name)| name.clone()).collect(),
        ..Difference::default()
    };
    if row.iter().any(|state| state.moved) {
        Decided::Moved
    } else if row.iter().any(|state| state.quarantined) {
        Decided::Quarantined(difference)
    } else {
        Decided::Different(difference)
    }
}

/// Why these nodes cannot be compared.
pub(super) fn unfit(talks: &[Talk], opened: &[pb::VerifyOpened]) -> Vec<String> {
    let mut problems = Vec::new();
    let Some(first) = opened.first() else {
        return problems;
    };
    let mut ids: Vec<u32> = talks.iter().map(|talk| u32::from(talk.id.0)).collect();
    ids.sort_unstable();
    for (talk, opened) in talks.iter().zip(opened) {
        let name = &talk.name;
        if opened.members != ids || opened.dropped != first.dropped {
            let named: Vec<String> = opened
                .members
                .iter()
                .map(|id| NodeId(u16::try_from(*id).unwrap_or(0)).to_string())
                .collect();
            problems.push(format!(
                "node {name} knows other members ({}): a join or a drop is under way; wait until it is done",
                named.join(", ")
            ));
        }
        if opened.encoding != first.encoding {
            problems.push(format!(
                "node {name} has encoding {}, another {}: their texts cannot be hashed alike",
                opened.encoding, first.encoding
            ));
        }
        if opened.probe != first.probe {
            problems.push(format!(
                "the server of node {name} hashes otherwise than another: machines of different byte order cannot be compared"
            ));
        }
    }
    problems
}

fn split(name: &str) -> Option<(String, String)> {
    let (schema, name) = name.split_once('.')?;
    Some((schema.to_owned(), name.to_owned()))
}

/// How two nodes' tables differ.
pub(super) fn same_columns(right: &pb::VerifyTable, other: &pb::VerifyTable) -> Vec<String> {
    let mut said = Vec::new();
    if right.key != other.key {
        let (key, there) = (right.key.join(", "), other.key.join(", "));
        said.push(format!("its key is ({key}) here and ({there}) there"));
    }
    let types = |table: &pb::VerifyTable| -> BTreeMap<String, String> {
        table
            .columns
            .iter()
            .cloned()
            .zip(table.types.iter().cloned())
            .collect()
    };
    let (here, there) = (types(right), types(other));
    for (name, is) in &here {
        match there.get(name) {
            None => said.push(format!("column {name} is not there")),
            Some(other) if other != is => said.push(format!("column {name} is {is} here and {other} there")),
            Some(_) => {}
        }
    }
    for name in there.keys().filter(|name| !here.contains_key(*name)) {
        said.push(format!("column {name} is only there"));
    }
    said
}

type Names = BTreeSet<(String, String)>;

/// Tables that the patterns choose, and patterns that choose none.
fn chosen(patterns: &[String], opened: &[pb::VerifyOpened]) -> (Names, Vec<String>) {
    let tables = opened.iter().flat_map(|opened| &opened.tables);
    let tables: Names = tables
        .map(|table| (table.schema.clone(), table.name.clone()))
        .collect();
    if patterns.is_empty() {
        return (tables, Vec::new());
    }
    let fits = |pattern: &str, schema: &str, name: &str| match pattern.split_once('.') {
        Some((of_schema, of_name)) => name_fits(of_schema, schema) && name_fits(of_name, name),
        None => name_fits(pattern, name),
    };
    let unknown = patterns
        .iter()
        .filter(|pattern| !tables.iter().any(|(schema, name)| fits(pattern, schema, name)))
        .cloned()
        .collect();
    let tables = tables
        .into_iter()
        .filter(|(schema, name)| patterns.iter().any(|pattern| fits(pattern, schema, name)));
    (tables.collect(), unknown)
}

/// A table as it can be compared, and what of it differs already.
pub(super) fn shape(
    talks: &[Talk],
    opened: &[pb::VerifyOpened],
    schema: &str,
    name: &str,
) -> (Option<Table>, Vec<String>) {
    let mut said = Vec::new();
    let mut here: Vec<(&str, &pb::VerifyTable)> = Vec::new();
    for (talk, opened) in talks.iter().zip(opened) {
        let mut tables = opened.tables.iter();
        match tables.find(|table| table.schema == schema && table.name == name) {
            Some(table) => here.push((&talk.name, table)),
            None => said.push(format!("node {} does not replicate it", talk.name)),
        }
    }
    let Some((first_name, first)) = here.first().copied().filter(|_| said.is_empty()) else {
        return (None, said);
    };
    for (name, table) in &here {
        if table.key != first.key {
            said.push(format!(
                "its key is ({}) at node {first_name} and ({}) at node {name}",
                first.key.join(", "),
                table.key.join(", ")
            ));
        }
    }
    if !said.is_empty() {
        return (None, said);
    }
    let all: BTreeSet<&String> = here.iter().flat_map(|(_, table)| &table.columns).collect();
    let (mut columns, mut rows) = (Vec::new(), 0);
    for column in all {
        let without = here.iter().filter(|(_, table)| !table.columns.contains(column));
        let without: Vec<&str> = without.map(|(name, _)| *name).collect();
        if without.is_empty() {
            columns.push(column.clone());
        } else {
            said.push(format!(
                "column {column} is not there at node {}",
                without.join(", ")
            ));
        }
    }
    for (_, table) in &here {
        rows = rows.max(table.rows);
    }
    let table = Table {
        schema: schema.to_owned(),
        name: name.to_owned(),
        columns,
        rows,
    };
    (Some(table), said)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(hash: i64) -> pb::VerifyState {
        pb::VerifyState {
            present: hash != 0,
            hash,
            key: r#"{"id": 1}"#.to_owned(),
            column_hashes: vec![1, hash],
            ..pb::VerifyState::default()
        }
    }

    fn decide(row: &[pb::VerifyState]) -> Decided {
        let columns = ["id".to_owned(), "v".to_owned()];
        of_states(&["a", "b", "c"], &columns, &row.iter().collect::<Vec<_>>())
    }

    #[test]
    fn only_what_is_quiet_everywhere_differs() {
        assert!(matches!(decide(&[state(5), state(5), state(5)]), Decided::Equal));
        assert!(matches!(decide(&[state(0), state(0), state(0)]), Decided::Equal));
        let Decided::Different(difference) = decide(&[state(5), state(6), state(0)]) else {
            panic!("no difference");
        };
        assert_eq!(difference.columns, ["v"]);
        let images: Vec<Option<u32>> = difference.images.into_values().collect();
        assert_eq!(images, [Some(1), Some(2), None]);
        assert!(matches!(
            decide(&[state(5), state(5), state(0)]),
            Decided::Different(_)
        ));
        let moved = pb::VerifyState {
            moved: true,
            ..state(5)
        };
        assert!(matches!(
            decide(&[moved.clone(), state(6), state(5)]),
            Decided::Moved
        ));
        assert!(matches!(decide(&[moved, state(5), state(5)]), Decided::Equal));
        let kept = pb::VerifyState {
            quarantined: true,
            ..state(0)
        };
        assert!(matches!(
            decide(&[kept, state(5), state(5)]),
            Decided::Quarantined(_)
        ));
    }

    fn opened(tables: &[(&str, &[&str])]) -> pb::VerifyOpened {
        let tables = tables.iter().map(|(name, columns)| pb::VerifyTable {
            schema: "public".to_owned(),
            name: (*name).to_owned(),
            columns: columns.iter().map(|&column| column.to_owned()).collect(),
            types: columns.iter().map(|_| "pg_catalog.int4".to_owned()).collect(),
            key: vec!["id".to_owned()],
            rows: 1,
            unpublished: false,
        });
        pb::VerifyOpened {
            tables: tables.collect(),
            ..pb::VerifyOpened::default()
        }
    }

    #[test]
    fn every_way_in_which_two_tables_differ_is_said() {
        let one = opened(&[("item", &["id", "a", "b"])]).tables.remove(0);
        assert_eq!(same_columns(&one, &one), Vec::<String>::new());
        let mut other = opened(&[("item", &["id", "b", "c"])]).tables.remove(0);
        other.types[1] = "pg_catalog.text".to_owned();
        other.key = vec!["b".to_owned()];
        let expected = [
            "its key is (id) here and (b) there",
            "column a is not there",
            "column b is pg_catalog.int4 here and pg_catalog.text there",
            "column c is only there",
        ];
        assert_eq!(same_columns(&one, &other), expected);
    }

    #[test]
    fn tables_are_chosen_by_name_or_pattern() {
        let opened = [
            opened(&[("item", &["id"]), ("part", &["id"])]),
            opened(&[("extra", &["id"])]),
        ];
        let names = |patterns: &[&str]| {
            let patterns: Vec<String> = patterns.iter().map(|&text| text.to_owned()).collect();
            let (tables, unknown) = chosen(&patterns, &opened);
            let tables: Vec<String> = tables.into_iter().map(|(_, name)| name).collect();
            (tables.join(" "), unknown.join(" "))
        };
        assert_eq!(names(&[]), ("extra item part".to_owned(), String::new()));
        assert_eq!(
            names(&["item", "public.p*"]),
            ("item part".to_owned(), String::new())
        );
        assert_eq!(
            names(&["other.*", "nix"]),
            (String::new(), "other.* nix".to_owned())
        );
    }
}
