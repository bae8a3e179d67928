//! Histories: what happened in a run, as JSON lines. Everything that a checker knows is in here, so that it can
//! be asked again without the cluster.
//!
//! In:   a run, or a file        Out: [`History`]; a file
//! Invariants: 1. a file that is read and written again is the same; 2. an unknown `kind` is an error, not skipped
//! Not here: the truth that follows from it (`crate::truth`), other checkers' formats (`crate::export`)

use std::fmt;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::nemesis::Planned;
use crate::system::System;

/// One line of a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Event {
    /// The first line.
    Header(Header),
    /// An operation of a client begins or ends.
    Op(Op),
    /// A fault begins, ends, or could not run.
    Fault(Fault),
    /// A server or daemon ended by itself.
    Death(Death),
    /// A node whose slot was gone was healed.
    Healed(Healed),
    /// One committed transaction in a node's WAL, in its order.
    Commit(Commit),
    /// One table of one node at the end.
    Final(Final),
    /// One line of a node's conflict log.
    Line(Line),
    /// What a node said of itself at one moment.
    Sample(Sample),
    /// The last line.
    End(End),
}

/// What was run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Header {
    /// Of this format: 1.
    pub format: u32,
    /// Name of the workload.
    pub workload: String,
    /// Name of the nemesis.
    pub nemesis: String,
    /// `anabranch`, `native` or `pglogical`.
    pub system: String,
    /// `proxy` or `veth`; histories of before there were two say neither.
    pub network: String,
    /// Fixes operations and fault schedule, not the interleaving of real processes.
    pub seed: u64,
    /// Major versions of the servers, in order of node ids 1, 2, ...
    pub servers: Vec<u32>,
    /// Length of the load, seconds.
    pub seconds: u64,
    /// Clients at each node.
    pub clients: usize,
    /// Keys of each table.
    pub keys: i64,
    /// Pause between a client's transactions, milliseconds.
    pub pause_ms: u64,
    /// What decides between concurrent writes of a row, where it is not the last update.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub policy: String,
    /// The rule that was broken on purpose.
    pub broken: Option<String>,
    /// The faults, as planned; what the seed says where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<Vec<Planned>>,
    /// How long was waited for quiet, seconds; 0 is the usual.
    pub patience_seconds: u64,
    /// The command that runs it again.
    pub command: String,
    /// Start of the run, microseconds since the Unix epoch.
    pub started_us: i64,
    /// Why the run was given up before its end; then this is what was known by then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut_short: Option<String>,
}

impl Header {
    /// Was it Anabranch that was on trial?
    pub fn is_anabranch(&self) -> bool {
        System::named(&self.system) == Some(System::Anabranch)
    }
}

/// How an operation stands, as in Jepsen: `info` may have happened or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// It begins.
    Invoke,
    /// It was acknowledged.
    Ok,
    /// It did not happen.
    Fail,
    /// Nobody knows.
    Info,
}

/// One step of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What is done.
    pub act: Act,
    /// Table.
    pub table: String,
    /// Primary key.
    pub key: i64,
    /// Read: what was found, `None` for no row. Write: what is written, once in a run. Where rows hold lists: the last element.
    pub value: Option<i64>,
    /// Where rows hold lists: the whole list, as it was read, or as it was after the write. Of a row of pgbench_history its teller, branch
    /// and account.
    pub list: Option<Vec<i64>>,
    /// Of many rows: the last key, where [`Self::key`] is the first.
    pub last: Option<i64>,
}

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Act {
    /// Reads a row.
    #[serde(rename = "r")]
    Read,
    /// Reads the sum of a whole table.
    #[serde(rename = "s")]
    Total,
    /// Writes a row, there or not.
    #[serde(rename = "w")]
    Write,
    /// Deletes a row.
    #[serde(rename = "d")]
    Delete,
    /// Updates many rows by one statement, those of them that are there.
    #[serde(rename = "w+")]
    WriteMany,
    /// Puts many rows by one statement, there or not.
    #[serde(rename = "p+")]
    PutMany,
    /// Deletes many rows by one statement.
    #[serde(rename = "d+")]
    DeleteMany,
    /// Updates many rows by one statement, and takes it back to a savepoint.
    #[serde(rename = "u+")]
    UndoneMany,
    /// Gives the transaction up, after all else: nothing of it may ever be seen.
    #[serde(rename = "x")]
    GiveUp,
}

impl Act {
    /// Does it only look?
    pub const fn reads(self) -> bool {
        matches!(self, Self::Read | Self::Total)
    }
}

/// `[act, table, key, value]`, and the list where there is one; for many rows the last key as a sixth part.
impl Serialize for Step {
    fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        match (&self.list, self.last) {
            (None, None) => (self.act, &self.table, self.key, self.value).serialize(to),
            (Some(list), None) => (self.act, &self.table, self.key, self.value, list).serialize(to),
            (list, last) => (self.act, &self.table, self.key, self.value, list, last).serialize(to),
        }
    }
}

impl<'de> Deserialize<'de> for Step {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        from.deserialize_seq(StepOf)
    }
}

struct StepOf;

impl<'de> Visitor<'de> for StepOf {
    type Value = Step;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a step: act, table, key, value, perhaps a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> std::result::Result<Step, A::Error> {
        let short = |count| A::Error::invalid_length(count, &self);
        Ok(Step {
            act: from.next_element()?.ok_or_else(|| short(0))?,
            table: from.next_element()?.ok_or_else(|| short(1))?,
            key: from.next_element()?.ok_or_else(|| short(2))?,
            value: from.next_element()?.ok_or_else(|| short(3))?,
            list: from.next_element::<Option<Vec<i64>>>()?.flatten(),
            last: from.next_element()?,
        })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let act = match self.act {
            Act::Read => "r",
            Act::Total => "s",
            Act::Write => "w",
            Act::Delete => "d",
            Act::WriteMany => "w+",
            Act::PutMany => "p+",
            Act::DeleteMany => "d+",
            Act::UndoneMany => "u+",
            Act::GiveUp => return f.write_str("x"),
        };
        write!(f, "{act}({}/{}", self.table, self.key)?;
        if let Some(last) = self.last {
            write!(f, "..{last}")?;
        }
        match self.value {
            Some(value) => write!(f, " = {value})"),
            None if self.act.reads() => write!(f, " = nothing)"),
            None => write!(f, ")"),
        }
    }
}

/// An operation, always one transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Op {
    /// Microseconds since the run began.
    pub at_us: i64,
    /// How it stands.
    pub stage: Stage,
    /// One connection's life: a client that had to connect again goes on as another process.
    pub process: u64,
    /// Where, 1, 2, ...
    pub node: u16,
    /// The transaction: its witness row's id.
    pub txn: i64,
    /// What it does; with what was read once it is `ok`.
    pub steps: Vec<Step>,
    /// Why it is not `ok`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

/// A fault's moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Microseconds since the run began.
    pub at_us: i64,
    /// Which.
    pub name: String,
    /// `start`, `stop`, or `impossible`: then it did not happen and was not survived. `idle` follows the `stop` of one that met nothing:
    /// that was not survived either, nor was what is [`LEFT_OUT`].
    pub phase: String,
    /// Where and how.
    pub detail: String,
}

/// The phase of a fault that was planned, and for which no time was left.
pub const LEFT_OUT: &str = "left-out";

impl Fault {
    /// Does it say that nothing was survived?
    pub fn is_of_nothing(&self) -> bool {
        matches!(self.phase.as_str(), "impossible" | "idle" | LEFT_OUT)
    }
}

/// The end of a server or daemon that nobody ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Death {
    /// When it was found, microseconds since the run began.
    pub at_us: i64,
    /// Whose.
    pub node: u16,
    /// `server` or `daemon`.
    pub what: String,
    /// Its exit status.
    pub how: String,
    /// The fault that it had to end of, if there was one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub excuse: Option<String>,
    /// The last lines of its log.
    pub words: String,
}

/// A node that came back with the rows that it had, by `anabranch heal`. What its applications committed between the two places nobody
/// decoded; the rows of it were written again behind them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Healed {
    /// When it was done, microseconds since the run began.
    pub at_us: i64,
    /// Which.
    pub node: u16,
    /// Up to here its own stream had gone.
    pub journaled: u64,
    /// From here on it goes on.
    pub slot_at: u64,
    /// Rows that were written again.
    pub rows: u64,
}

/// A committed transaction in a node's WAL.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Whose WAL.
    pub node: u16,
    /// End of the commit record.
    pub lsn: u64,
    /// Its timestamp, microseconds since the Unix epoch.
    pub commit_us: i64,
    /// The first table it changed that counts: decides what the transaction is.
    pub first: First,
    /// Ids of witness rows in it.
    pub witnesses: Vec<i64>,
    /// Progress rows: (origin, LSN, stamp as 20 hexadecimal digits).
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub progress: Vec<(u16, u64, String)>,
    /// The clock witness in it, microseconds since the Unix epoch.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub clock_us: Option<i64>,
    /// Rows of a gap written again ([`Healed`]): not later than this, microseconds since the Unix epoch.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub again_us: Option<i64>,
    /// Rows of the workload's tables, in order; a `Read` never stands here.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub rows: Vec<Step>,
}

/// What a transaction's first change says it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum First {
    /// Nothing that is published.
    #[default]
    Nothing,
    /// The daemon's own apply transaction.
    Progress,
    /// The daemon's clock witness.
    Clock,
    /// An application's.
    User,
}

/// A table at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Final {
    /// Where.
    pub node: u16,
    /// Which.
    pub table: String,
    /// (key, value, the whole row's digest), by key.
    pub rows: Vec<(i64, Option<i64>, String)>,
    /// Where rows hold more: by key the list, or the unique value.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub more: Vec<(i64, Vec<i64>)>,
}

/// A line of a conflict log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Whose log.
    pub node: u16,
    /// The same on every node.
    pub id: String,
    /// The row's table.
    pub table: String,
    /// The row's key; `None` when it is not this harness's kind of key.
    pub key: Option<i64>,
    /// `update_origin_differs`, ...
    pub conflict: String,
    /// Stamp of the version that lost: 16 hexadecimal digits, a dot, node id.
    pub lost: String,
    /// Stamp of the version that stayed.
    pub won: String,
    /// The lost row's value, if the line shows the row.
    pub lost_value: Option<i64>,
    /// `new`, or what became of it since.
    #[serde(default)]
    pub status: String,
    /// The line as it is.
    pub text: String,
}

/// A node's state at one moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sample {
    /// Microseconds since the run began.
    pub at_us: i64,
    /// Whose.
    pub node: u16,
    /// WAL that the slot holds back, bytes; `None` when the server did not answer.
    pub slot_bytes: Option<i64>,
    /// The journal on disk, bytes; `None` when the daemon did not answer, as below.
    pub journal_bytes: Option<u64>,
    /// The largest lag of a peer, seconds.
    pub lag_seconds: Option<f64>,
    /// Rows in the index: what is not stable yet.
    pub index_entries: Option<u64>,
    /// Lines written to the conflict log since the daemon's start.
    pub conflicts: Option<u64>,
    /// The server's clock minus this machine's, microseconds.
    pub clock_us: Option<i64>,
    /// Alarms that stand.
    pub alarms: Vec<String>,
}

/// How the run ended.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct End {
    /// When the undoing of the last fault began, microseconds since the run began; where no fault was, when the load ended.
    pub healed_us: i64,
    /// When the load ended, microseconds since the run began; histories that do not say so mean it by [`Self::healed_us`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_us: Option<i64>,
    /// When what was written at every node after that was at every node; `None`: not within the patience.
    pub arrived_us: Option<i64>,
    /// When the rows of all nodes were equal; `None`: not within the patience.
    pub equal_us: Option<i64>,
    /// How long was waited, seconds.
    pub patience_seconds: u64,
    /// What differs at the end, for people.
    pub difference: Option<String>,
    /// Why what is in here is not all of it; then no check can say "holds".
    pub incomplete: Option<String>,
    /// Daemons or servers that ended by themselves, and other things to know.
    pub notes: Vec<String>,
    /// Warnings and errors in the logs of the daemons, the first of each: (node, line). Histories before they were kept have none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub said: Vec<(u16, String)>,
    /// Nodes that were lost for good, and of those whose slot was dropped what their daemons said.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<Lost>,
    /// Table of slots and journals after quiescence: (node, WAL that the slot is not confirmed to, journal bytes).
    pub rest: Vec<(u16, i64, u64)>,
    /// The same of the WAL that the slot holds back: (node, bytes). Histories before this was asked have none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub held_back: Vec<(u16, i64)>,
    /// The same of the rows that are not stable: (node, rows in the index); none where the daemon did not answer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unstable: Vec<(u16, Option<u64>)>,
    /// How long rest was waited for, seconds, and how often all that was known at some moment had become stable meanwhile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rest_after: Option<(u64, u64)>,
    /// Length of a journal's segment, bytes; 0 where that was not said.
    pub segment_bytes: u64,
    /// Nodes of whose journal and index nothing is asked at rest, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_asked: Vec<(u16, String)>,
    /// Alarms that stand at rest: (node, name, text).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub alarms: Vec<(u16, String, String)>,
}

impl End {
    /// When the load ended.
    pub fn load_ended_us(&self) -> i64 {
        self.load_us.unwrap_or(self.healed_us)
    }

    /// Something is missing in the history, or not as it should be, for this reason.
    pub fn miss(&mut self, why: &str) {
        let before = self.incomplete.take().map_or(String::new(), |text| text + "; ");
        self.incomplete = Some(before + why);
    }
}

/// A node that was lost for good.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lost {
    /// Which.
    pub node: u16,
    /// Did its daemon have to say why? Not when it was killed.
    pub must_tell: bool,
    /// What it said last.
    pub words: String,
}

/// A whole history.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    /// What was run.
    pub header: Header,
    /// Everything else, in order of arrival.
    pub events: Vec<Event>,
}

/// The end is one of so many last events. (Nothing is written behind it; tests plant things there.)
const END_WITHIN: usize = 1_000;

impl History {
    /// Operations in order.
    pub fn ops(&self) -> impl Iterator<Item = &Op> {
        self.events.iter().filter_map(|event| match event {
            Event::Op(op) => Some(op),
            _ => None,
        })
    }

    /// Faults in order.
    pub fn faults(&self) -> impl Iterator<Item = &Fault> {
        self.events.iter().filter_map(|event| match event {
            Event::Fault(fault) => Some(fault),
            _ => None,
        })
    }

    /// How many faults happened, and met anything.
    pub fn faults_done(&self) -> usize {
        let of = |phase: &str| self.faults().filter(|fault| fault.phase == phase).count();
        of("start").saturating_sub(of("idle"))
    }

    /// Commits; those of one node in the order of its WAL.
    pub fn commits(&self) -> impl Iterator<Item = &Commit> {
        self.events.iter().filter_map(|event| match event {
            Event::Commit(commit) => Some(commit),
            _ => None,
        })
    }

    /// Tables at the end.
    pub fn finals(&self) -> impl Iterator<Item = &Final> {
        self.events.iter().filter_map(|event| match event {
            Event::Final(table) => Some(table),
            _ => None,
        })
    }

    /// Lines of conflict logs.
    pub fn lines(&self) -> impl Iterator<Item = &Line> {
        self.events.iter().filter_map(|event| match event {
            Event::Line(line) => Some(line),
            _ => None,
        })
    }

    /// What ended by itself, in order.
    pub fn deaths(&self) -> impl Iterator<Item = &Death> {
        self.events.iter().filter_map(|event| match event {
            Event::Death(death) => Some(death),
            _ => None,
        })
    }

    /// Heals in order.
    pub fn healed(&self) -> impl Iterator<Item = &Healed> {
        self.events.iter().filter_map(|event| match event {
            Event::Healed(healed) => Some(healed),
            _ => None,
        })
    }

    /// Samples in order.
    pub fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.events.iter().filter_map(|event| match event {
            Event::Sample(sample) => Some(sample),
            _ => None,
        })
    }

    /// How it ended; `None` when the run was cut short.
    pub fn end(&self) -> Option<&End> {
        // The last of a million events, and asked for by each check of each commit: where there is none, it is not looked for in all of them.
        self.events
            .iter()
            .rev()
            .take(END_WITHIN)
            .find_map(|event| match event {
                Event::End(end) => Some(end),
                _ => None,
            })
    }

    /// The nodes' ids.
    pub fn nodes(&self) -> std::ops::RangeInclusive<u16> {
        1..=u16::try_from(self.header.servers.len()).unwrap_or(0)
    }

    /// Was the node lost for good?
    pub fn lost(&self, node: u16) -> bool {
        self.end()
            .is_some_and(|end| end.lost.iter().any(|lost| lost.node == node))
    }

    /// The nodes that are there at the end.
    pub fn survivors(&self) -> impl Iterator<Item = u16> {
        self.nodes().filter(|&node| !self.lost(node))
    }

    /// Writes it.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut file = BufWriter::new(std::fs::File::create(path)?);
        let header = Event::Header(self.header.clone());
        for event in std::iter::once(&header).chain(&self.events) {
            serde_json::to_writer(&mut file, event)?;
            file.write_all(b"\n")?;
        }
        file.flush()?;
        Ok(())
    }

    /// Reads it.
    pub fn read(path: &Path) -> Result<Self> {
        let file = std::fs::File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let mut history = Self::default();
        let mut headers = 0;
        for (number, line) in BufReader::new(file).lines().enumerate() {
            let line = line?;
            if line.trim().is_empty() {
                continue;
            }
            match serde_json::from_str(&line) {
                Ok(Event::Header(header)) => {
                    history.header = header;
                    headers += 1;
                }
                Ok(event) => history.events.push(event),
                Err(error) => return Err(format!("{}:{}: {error}", path.display(), number + 1).into()),
            }
        }
        if headers != 1 || history.header.format != 1 {
            let text = format!(
                "{}: not a history of this version: it must have one header of format 1",
                path.display()
            );
            return Err(text.into());
        }
        Ok(history)
    }
}
