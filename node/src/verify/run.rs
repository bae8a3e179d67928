//! The coordinator: asks every node, finds candidates, decides each by a common cut of its writes.
//!
//! In:   conversations with all nodes            Out: events, a report
//! Holds: blocks of one table; rows of some blocks of it
//! Invariants: every node takes part, or the verdict is not that all is equal
//! Not here: why this is sound ([`super`]), what the states of a row say ([`super::decided`]), what tables have in common
//! ([`super::shape`]), mending ([`super::repair`])

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anabranch_proto::Vector;
use anabranch_proto::link as pb;
use anabranch_proto::schema::{full_name, split_name};
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::try_join_all;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::blocks::{self, Blocks, Rows};
use super::decided::{Decided, decided, key_of};
use super::shape::{chosen, shape, unfit};
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

impl Table {
    pub(super) fn full_name(&self) -> String {
        full_name(&self.schema, &self.name)
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
pub async fn run(mut talks: Vec<Talk>, absent: Vec<String>, options: Options, events: mpsc::Sender<Event>) {
    let mut report = Report {
        verdict: Verdict::Unknown,
        nodes: talks.iter().map(|talk| talk.name.clone()).collect(),
        problems: absent.clone(),
        absent,
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
        for talk in &mut talks {
            talk.tell(events.clone());
        }
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
            .map(|(schema, name)| full_name(schema, name))
            .collect();
        let started = Event::Started {
            nodes: report.nodes.clone(),
            tables: names,
        };
        let _ = self.events.send(started).await;
        for (schema, name) in tables {
            let (table, mut result) = shape(&self.talks, &opened, &schema, &name);
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
        let mut proven = Vec::new();
        let compared = self.compare(table, &mut proven, result).await;
        // What is proven, and mended, stays so whatever fails behind it.
        result
            .differences
            .extend(proven.into_iter().map(|row| row.difference));
        compared
    }

    async fn compare(
        &mut self,
        table: &Table,
        proven: &mut Vec<Proven>,
        result: &mut TableReport,
    ) -> Result<(), Error> {
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
                self.decide(table, chunk.to_vec(), (proven, result)).await?;
            }
        }
        if let Some(repair) = self.options.repair.clone() {
            self.repair(table, proven, &repair, result).await?;
        }
        Ok(())
    }

    async fn snapshots(&mut self, table: &Table) -> Result<(), Error> {
        let talks = self.talks.iter_mut();
        let all = all(talks.map(|talk| talk.snapshot(&table.schema, &table.name)));
        all.await.map(drop)
    }

    pub(super) async fn blocks(&mut self, table: &Table, scan: &Scan) -> Result<Vec<Blocks>, Error> {
        // All at about the same moment: less is in flight between them.
        self.snapshots(table).await?;
        let (events, name) = (&self.events, &table.full_name());
        let scans = self.talks.iter_mut();
        all(scans.map(|talk| scan_blocks(talk, scan, events, name))).await
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
        all(scans).await?;
        let rows = rows.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(rows.candidates())
    }

    /// Keys of the rows of some blocks at one node, from a page on, as many as are held at once; and the page to go on from, if there are
    /// more.
    pub(super) async fn keys_at(
        &mut self,
        (table, scan): (&Table, &Scan),
        (place, page): (usize, u64),
        wanted: Bytes,
    ) -> Result<(Vec<Bytes>, Option<u64>), Error> {
        let (events, name) = (&self.events, &table.full_name());
        let (mut keys, mut next, mut before) = (Vec::new(), None, 0);
        let Some(talk) = self.talks.get_mut(place) else {
            return Ok((keys, next));
        };
        talk.scan_part(scan, wanted, (page, ROWS_AT_ONCE)).await?;
        loop {
            match talk.scanned().await? {
                Scanned::Progress(rows) => tell(events, name, &talk.name, rows, &mut before).await,
                Scanned::Stopped(rows, page) => {
                    tell(events, name, &talk.name, rows, &mut before).await;
                    next = Some(page);
                }
                Scanned::Rows(some) => keys.extend(some.into_iter().map(|(key, _)| key)),
                Scanned::Blocks(..) => {}
                Scanned::End => break,
            }
        }
        // A row that was written while it was read may have been met twice.
        keys.sort_unstable();
        keys.dedup();
        Ok((keys, next))
    }

    /// Decides candidates, round by round; adds those whose difference is proven.
    async fn decide(
        &mut self,
        table: &Table,
        mut left: Vec<Bytes>,
        (proven, result): (&mut Vec<Proven>, &mut TableReport),
    ) -> Result<(), Error> {
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
        Ok(())
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
        for vector in all(watched).await? {
            upto.join(&vector);
        }
        let (cut, columns) = (&upto, &table.columns);
        let looks = self.talks.iter_mut().enumerate();
        let looks = looks.map(|(at, talk)| talk.look(cut, columns, CATCH_UP, whole == Some(at)));
        let states = all(looks).await?;
        Ok((upto, states))
    }
}

/// What every node says, in their order, or what went wrong. What ends a conversation is told at once: nothing is asked after it. Of what
/// passes the first is told when all are heard to the end: else the next question would meet the answer to this one.
async fn all<T>(
    each: impl IntoIterator<Item = impl Future<Output = Result<T, Error>>>,
) -> Result<Vec<T>, Error> {
    let each = each.into_iter().enumerate();
    let mut each: FuturesUnordered<_> = each.map(|(at, one)| async move { (at, one.await) }).collect();
    let (mut said, mut failed) = (BTreeMap::new(), BTreeMap::new());
    while let Some((at, one)) = each.next().await {
        match one {
            Ok(one) => drop(said.insert(at, one)),
            Err(error) if error.passing => drop(failed.insert(at, error)),
            Err(error) => return Err(error),
        }
    }
    failed
        .into_values()
        .next()
        .map_or_else(|| Ok(said.into_values().collect()), Err)
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
            Scanned::Rows(_) | Scanned::Stopped(..) => {}
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
            Scanned::Blocks(..) | Scanned::Stopped(..) => {}
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

fn split(name: &str) -> Option<(String, String)> {
    let (schema, name) = split_name(name);
    Some((schema?, name))
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use anabranch_proto::NodeId;
    use pb::verify_request::Ask;
    use pb::verify_response::Answer;
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    /// A node that answers a question with all of these.
    pub(crate) fn node(id: u16, answers: impl Fn(Ask) -> Vec<Answer> + Send + 'static) -> Talk {
        let (ask, mut questions) = mpsc::channel::<pb::VerifyRequest>(1);
        let (out, heard) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Some(question) = questions.recv().await {
                for answer in answers(question.ask.unwrap()) {
                    let answer = Some(answer);
                    if out.send(Ok(pb::VerifyResponse { answer })).await.is_err() {
                        return;
                    }
                }
            }
        });
        let heard = ReceiverStream::new(heard).boxed();
        Talk::new(NodeId(id), format!("n{id}"), ask, heard)
    }

    #[tokio::test]
    async fn a_scan_that_fails_at_one_node_is_read_to_its_end_at_the_others() {
        let done = || Answer::Done(pb::VerifyDone {});
        let whole = move |ask: Ask| match ask {
            Ask::Scan(_) => {
                let progress = (1..20).map(|rows| pb::VerifyProgress { rows, next_page: 0 });
                let progress = progress.map(Answer::Progress);
                progress.chain([done()]).collect()
            }
            _ => vec![done()],
        };
        let lacking = move |ask: Ask| match ask {
            Ask::Scan(scan) if scan.name == "lacking" => vec![Answer::Failed("no column".to_owned())],
            _ => vec![done()],
        };
        let (events, _heard) = mpsc::channel(1_000);
        let mut run = Run {
            talks: vec![node(1, whole), node(2, lacking), node(3, whole)],
            options: Options::default(),
            events,
        };
        let table = |name: &str| Table {
            schema: "public".to_owned(),
            name: name.to_owned(),
            columns: Vec::new(),
            rows: 0,
        };
        let (one, other) = (table("lacking"), table("whole"));
        let error = run.blocks(&one, &one.scan(0)).await.map(drop).unwrap_err();
        assert!(
            error.passing && error.to_string().contains("n2: no column"),
            "{error}"
        );
        let error = run
            .candidates(&one, &one.scan(0), &[0])
            .await
            .map(drop)
            .unwrap_err();
        assert!(error.passing, "{error}");
        let blocks = run.blocks(&other, &other.scan(0)).await.unwrap();
        assert_eq!(blocks.len(), 3);
    }

    #[tokio::test]
    async fn what_ends_a_conversation_is_said_before_what_passes() {
        let passing = |ask: Ask| match ask {
            Ask::Snapshot(_) => vec![Answer::Failed("a lock".to_owned())],
            _ => Vec::new(),
        };
        let strange = |_: Ask| vec![Answer::Looked(pb::VerifyLooked { states: Vec::new() })];
        let (events, _heard) = mpsc::channel(1_000);
        let mut run = Run {
            talks: vec![node(1, passing), node(2, strange)],
            options: Options::default(),
            events,
        };
        let table = Table {
            schema: "public".to_owned(),
            name: "t".to_owned(),
            columns: Vec::new(),
            rows: 0,
        };
        let error = run.snapshots(&table).await.unwrap_err();
        assert!(!error.passing && error.to_string().contains("n2"), "{error}");
        // Also while a node is long in answering.
        run.talks = vec![node(1, |_| Vec::new()), node(2, strange)];
        let told = tokio::time::timeout(Duration::from_secs(10), run.snapshots(&table)).await;
        let error = told.expect("it is told at once").unwrap_err();
        assert!(!error.passing && error.to_string().contains("n2"), "{error}");
    }

    #[tokio::test]
    async fn what_is_proven_is_told_though_a_node_is_late_when_it_is_to_be_mended() {
        let row = |hash: i64| {
            let looks = AtomicUsize::new(0);
            move |ask: Ask| match ask {
                Ask::Scan(scan) if scan.wanted.is_empty() => vec![
                    Answer::Blocks(pb::VerifyBlocks {
                        first: 0,
                        counts: vec![1],
                        hashes: vec![hash],
                    }),
                    Answer::Done(pb::VerifyDone {}),
                ],
                Ask::Scan(_) => {
                    let key = Bytes::from_static(b"k");
                    let rows = vec![pb::VerifyRow { key, hash }];
                    vec![
                        Answer::Rows(pb::VerifyRows { rows }),
                        Answer::Done(pb::VerifyDone {}),
                    ]
                }
                Ask::Watch(_) => vec![Answer::Watched(pb::VerifyWatched { vector: Vec::new() })],
                Ask::Look(_) if looks.fetch_add(1, Ordering::Relaxed) > 0 => {
                    vec![Answer::Failed("it does not catch up".to_owned())]
                }
                Ask::Look(_) => {
                    let states = vec![pb::VerifyState {
                        present: true,
                        hash,
                        key: r#"{"id": 1}"#.to_owned(),
                        ..pb::VerifyState::default()
                    }];
                    vec![Answer::Looked(pb::VerifyLooked { states })]
                }
                _ => vec![Answer::Done(pb::VerifyDone {})],
            }
        };
        let (events, _heard) = mpsc::channel(1_000);
        let repair = super::super::Repair {
            from: Some("n1".to_owned()),
            dry_run: false,
            absent_at: None,
        };
        let mut run = Run {
            talks: vec![node(1, row(5)), node(2, row(6))],
            options: Options {
                repair: Some(repair),
                ..Options::default()
            },
            events,
        };
        let table = Table {
            schema: "public".to_owned(),
            name: "t".to_owned(),
            columns: vec!["id".to_owned()],
            rows: 1,
        };
        let mut result = TableReport::default();
        let error = run.table(&table, &mut result).await.unwrap_err();
        assert!(error.passing, "{error}");
        let [row] = result.differences.as_slice() else {
            panic!("{result:?}")
        };
        assert!(!row.mended && row.key["id"] == 1, "{row:?}");
    }

    #[tokio::test]
    async fn what_nodes_say_keeps_their_order() {
        let one = |at: u64| async move {
            tokio::time::sleep(Duration::from_millis(40 - 10 * at)).await;
            Ok(at)
        };
        assert_eq!(all((0..4).map(one)).await.unwrap(), [0, 1, 2, 3]);
    }
}
