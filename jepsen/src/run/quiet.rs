//! The end of a run: quiet, and everything that can be read.

use std::time::Duration;

use anabranch_tests::cluster::Cluster;
use anabranch_tests::postgres::{DATABASE, tail};
use anabranch_tests::{Session, daemon, rows};
use futures_util::future::join_all;
use indicatif::ProgressBar;

use super::Options;
use super::rounds::{Reached, Rounds};
use crate::clock::Clock;
use crate::history::{End, Event, Final, Line, Lost};
use crate::nemesis::{Fault, RECOVERY, Toll, answers};
use crate::record::Record;
use crate::system::System;
use crate::workload::Table;
use crate::{Result, wal};

/// How long to wait for rest once all is equal and read, at least.
const REST_WITHIN: Duration = Duration::from_secs(40);

/// And so many rounds ([`Rounds`]): a journal has let go what was written last after five or so. Each is a second or two, and several times that
/// where compilers have the machine.
const ROUNDS: u64 = 10;

/// But no longer than this.
const REST_AT_MOST: Duration = Duration::from_secs(120);

/// How often servers are asked to say what is running.
const LET_GO_EVERY: Duration = Duration::from_secs(3);

/// What is written into it goes through all journals, and is nothing else to anybody.
pub(super) const BALLAST_TABLE: &str = "create table ballast (k bigint primary key, pad text not null)";

/// So many segments of ballast: more than a journal may have at rest.
const BALLAST_SEGMENTS: u64 = 5;

/// A row of ballast, bytes; less than what PostgreSQL stores out of line.
const BALLAST_ROW_BYTES: i64 = 1_600;

/// Rows of ballast in a transaction: a frame or so.
const BALLAST_ROWS: usize = 200;

/// How long a server or a daemon may take to answer then.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// The same when it is asked for the last time: who is late is not silent.
const LAST_ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// Waits until every server takes sessions: one may still be recovering from the last fault, and patience is for what comes after.
async fn answering(cluster: &Cluster, survivors: &[usize]) {
    let until = tokio::time::Instant::now() + RECOVERY;
    join_all(survivors.iter().map(async |&at| {
        let server = &cluster.nodes[at].server;
        while !answers(server).await && tokio::time::Instant::now() < until {
            tokio::time::sleep(ANSWERS_WITHIN / 10).await;
        }
    }))
    .await;
}

/// What all is done with once the load has ended.
pub(super) struct Ending<'a> {
    pub(super) cluster: &'a mut Cluster,
    pub(super) toll: &'a Toll,
    pub(super) options: &'a Options,
    pub(super) clock: Clock,
    pub(super) record: &'a Record,
    pub(super) bar: &'a ProgressBar,
}

impl Ending<'_> {
    /// Quiet, everything read, rest.
    pub(super) async fn whole(mut self, end: &mut End) {
        let all = self.cluster.all().into_iter();
        let survivors: Vec<usize> = all.filter(|at| !self.toll.lost.contains(at)).collect();
        self.bar.set_message("waiting for quiet");
        self.quiesce(&survivors, end).await;
        self.watch().await;
        self.bury(end).await;
        self.bar.set_message("reading everything");
        if let Err(why) = self.collect().await {
            end.miss(&why.to_string());
        }
        self.watch().await;
        self.bar.set_message("waiting for rest");
        self.rest(&survivors, end).await;
    }

    /// Tells what ended by itself, and starts it again: who dies now is no better than who did so under the load.
    async fn watch(&mut self) {
        let deaths = self.toll.watch(self.cluster, self.clock.now_us());
        if !deaths.is_empty() {
            self.record.tell_all(deaths.into_iter().map(Event::Death));
            self.toll.revive(self.cluster).await;
        }
    }

    /// Waits until what is written now is at every node that is left, rows are equal and logs stand still.
    async fn quiesce(&mut self, survivors: &[usize], end: &mut End) {
        answering(self.cluster, survivors).await;
        self.watch().await;
        let deadline = tokio::time::Instant::now() + self.options.patience;
        let sessions: Vec<Session> = join_all(survivors.iter().map(|&at| self.cluster.admin(at))).await;
        let ids: Vec<String> = survivors.iter().map(|at| (at + 1).to_string()).collect();
        for (session, id) in sessions.iter().zip(&ids) {
            session
                .run(&format!("insert into marker values ({id}, 1000000)"))
                .await;
        }
        let expected = ids.join(",");
        let sql = "select string_agg(node::text, ',' order by node) from marker where n = 1000000";
        while tokio::time::Instant::now() < deadline {
            let arrived = join_all(sessions.iter().map(|session| session.value(sql))).await;
            if arrived.iter().all(|found| *found == expected) {
                end.arrived_us = Some(self.clock.now_us());
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
            self.watch().await;
        }
        while tokio::time::Instant::now() < deadline {
            match rows::equal(&sessions).await {
                Ok(()) => {
                    end.equal_us = Some(self.clock.now_us());
                    end.difference = None;
                    break;
                }
                Err(difference) => end.difference = Some(difference),
            }
            // Once all has arrived, a difference does not go away by waiting much longer.
            if end
                .arrived_us
                .is_some_and(|at| self.clock.now_us() - at > 15_000_000)
            {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            self.watch().await;
        }
        if self.options.system != System::Anabranch {
            return;
        }
        // Lines of late findings are still on their way: wait until the logs stand still. Refused rows are tried again every 10 s.
        let mut before = Vec::new();
        for _ in 0..50 {
            let lines = "select count(*) || ' ' || (select count(*) from anabranch.quarantine) from anabranch.conflict_history";
            let counts = join_all(sessions.iter().map(|session| session.value(lines))).await;
            if counts == before && counts.iter().all(|count| count.ends_with(" 0")) {
                break;
            }
            before = counts;
            tokio::time::sleep(Duration::from_millis(500)).await;
            self.watch().await;
        }
    }

    /// Notes what was lost for good, and starts servers of lost nodes again, without their daemons, so that their WAL can be read.
    async fn bury(&mut self, end: &mut End) {
        for &at in &self.toll.lost {
            let node = &mut self.cluster.nodes[at];
            if !node.server.runs() {
                node.server.start().await;
            }
            let dropped = self.options.plan().iter().any(|planned| {
                let drops = |fault: &Fault| *fault == Fault::DropSlot(at);
                planned.faults.iter().any(drops)
            });
            end.lost.push(Lost {
                node: u16::try_from(node.id).unwrap_or(0),
                must_tell: dropped,
                words: tail(&node.daemon.log(), 6),
            });
        }
    }

    /// Reads tables, logs and WAL.
    async fn collect(&mut self) -> Result<()> {
        let workload = &self.options.workload;
        let tables = workload.all_tables();
        for at in self.cluster.all() {
            let node = &self.cluster.nodes[at];
            let id = u16::try_from(node.id)?;
            let admin = node.server.admin().await;
            for table in &tables {
                let more = workload.more_sql();
                let (name, key, value) = (&table.name, table.key, table.value);
                let sql =
                    format!("select {key}, {value}, md5(t::text){more} from public.{name} t order by {key}");
                self.record
                    .tell(Event::Final(table_of(&admin, id, name, &sql).await?));
            }
            let sql = "select id, node, md5(t::text) from public.witness t order by id";
            self.record.tell(Event::Final(
                table_of(&admin, id, crate::checker::durable::WITNESS, sql).await?,
            ));
            if self.options.system == System::Anabranch {
                let conflicts = anabranch_tests::conflicts::read(&admin).await;
                let lines = conflicts
                    .iter()
                    .map(|conflict| Event::Line(line(id, &conflict.0, &tables)));
                self.record.tell_all(lines);
            }
            let commits = wal::read(&admin, id, &tables).await?;
            self.record.tell_all(commits.into_iter().map(Event::Commit));
            self.watch().await;
        }
        Ok(())
    }

    /// Fills journals that have hardly been used, waits until nothing is unstable any more and journals and slots have let go what they
    /// may, and notes what they hold then, and which alarms stand.
    async fn rest(&mut self, survivors: &[usize], end: &mut End) {
        if self.options.system != System::Anabranch {
            return;
        }
        end.segment_bytes = super::SEGMENT_MIB << 20;
        let kept_for = kept_for(self.options, end);
        let not_filled = match kept_for {
            None => self.fill_journals(survivors, end.segment_bytes).await.err(),
            Some(_) => None,
        };
        let began = tokio::time::Instant::now();
        let mut let_go = began;
        let mut rounds = Rounds::default();
        let at_rest = loop {
            // Before it is asked, or not long after.
            if tokio::time::Instant::now() >= let_go {
                join_all(survivors.iter().map(|&at| let_wal_go(self.cluster, at))).await;
                let_go = tokio::time::Instant::now() + LET_GO_EVERY;
            }
            let at_rest = looks(self.cluster, survivors, ANSWERS_WITHIN).await;
            rounds.look(at_rest.iter().map(|rest| &rest.reached));
            let is_small = |rest: &Rest| rest.is_small(end.segment_bytes, kept_for.is_some());
            // Nothing becomes stable any more where all is kept for somebody.
            let is_enough = kept_for.is_some() || rounds.count() >= ROUNDS;
            let waited = began.elapsed();
            let is_over = waited >= REST_AT_MOST || (is_enough && waited >= REST_WITHIN);
            if is_over || at_rest.iter().all(is_small) {
                break at_rest;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
            self.watch().await;
        };
        end.rest_after = Some((began.elapsed().as_secs(), rounds.count()));
        let is_any_late = at_rest.iter().any(Rest::is_late);
        let at_rest = if is_any_late {
            looks(self.cluster, survivors, LAST_ANSWER_WITHIN).await
        } else {
            at_rest
        };
        for rest in at_rest {
            let untried = || {
                let why = rest.untried(end.segment_bytes)?;
                let more = not_filled
                    .as_ref()
                    .map(|why| format!(", and no more could be: {why}"));
                Some(why + more.as_deref().unwrap_or_default())
            };
            if let Some(why) = kept_for.clone().or_else(untried) {
                end.not_asked.push((rest.node, why));
            }
            if kept_for.is_none() {
                end.unstable.push((rest.node, rest.entries));
            }
            end.rest.push((rest.node, rest.held, rest.journal.bytes));
            end.held_back.push((rest.node, rest.held_back));
            let alarms = rest.alarms.into_iter();
            end.alarms
                .extend(alarms.map(|(name, text)| (rest.node, name, text)));
        }
    }

    /// Writes as much as a journal may have at rest, and more, where one has hardly a second segment: else nothing could go from it, and
    /// nobody could say that it lets anything go. All that is judged of the load was read before.
    async fn fill_journals(&mut self, survivors: &[usize], segment: u64) -> Result<()> {
        let all = looks(self.cluster, survivors, ANSWERS_WITHIN).await;
        if all.iter().all(|rest| rest.untried(segment).is_none()) {
            return Ok(());
        }
        // What one node writes is in all journals.
        let Some(&at) = survivors.first() else {
            return Ok(());
        };
        let server = &self.cluster.nodes[at].server;
        let refused = |error: anabranch_tests::session::Refused| error.to_string();
        let admin = server.try_session("postgres", DATABASE).await.map_err(refused)?;
        let rows = i64::try_from(BALLAST_SEGMENTS * segment)? / BALLAST_ROW_BYTES;
        for first in (0..rows).step_by(BALLAST_ROWS) {
            // Text that does not compress, in rows that are not stored out of line.
            let sql = format!(
                "insert into ballast select k, (select string_agg(md5(k || ' ' || i), '') from generate_series(1, {}) i) \
                 from generate_series({first}, {}) k",
                BALLAST_ROW_BYTES / 32,
                first + i64::try_from(BALLAST_ROWS)? - 1
            );
            admin.try_run(&sql).await.map_err(refused)?;
        }
        Ok(())
    }
}

/// The oldest WAL that a slot needs is known from records of what is running, which a server that has little to do writes four times a
/// minute, and at each checkpoint. So there is one.
async fn let_wal_go(cluster: &Cluster, at: usize) {
    let checkpoint = async {
        let admin = cluster.nodes[at]
            .server
            .try_session("postgres", DATABASE)
            .await
            .ok()?;
        admin.try_run("checkpoint").await.ok()
    };
    let _ = tokio::time::timeout(ANSWERS_WITHIN, checkpoint).await;
}

/// Why journals grow for good: for a member that is away all is kept, until another one is told that it is lost.
fn kept_for(options: &Options, end: &End) -> Option<String> {
    let plan = options.plan();
    let faults: Vec<&Fault> = plan.iter().flat_map(|planned| &planned.faults).collect();
    let is_kept = |lost: &&Lost| {
        let is_it = |fault: &&Fault| matches!(fault, Fault::Drop(node) if node + 1 == usize::from(lost.node));
        !faults.iter().any(is_it)
    };
    let lost = end.lost.iter().find(is_kept)?;
    Some(format!(
        "n{} is lost, and nobody was told so: all is kept for it",
        lost.node
    ))
}

/// How all are, as far as they answer in time.
async fn looks(cluster: &Cluster, survivors: &[usize], within: Duration) -> Vec<Rest> {
    join_all(survivors.iter().map(|&at| Rest::of(cluster, at, within))).await
}

/// A node at rest.
struct Rest {
    node: u16,
    /// WAL that the slot is not confirmed to, bytes.
    held: i64,
    /// WAL that the server keeps for the slot, bytes.
    held_back: i64,
    journal: Files,
    /// Rows in the index; `None` where the daemon does not answer.
    entries: Option<u64>,
    /// How far it is; nothing where the daemon does not answer.
    reached: Reached,
    /// Name and text.
    alarms: Vec<(String, String)>,
}

/// WAL that a slot holds back at rest, bytes, is waited for until it is this. Behind a checkpoint pages stand whole in the WAL again, each
/// of 8 KiB.
const HELD_BACK_WAITED_FOR: i64 = 1 << 19;

impl Rest {
    async fn of(cluster: &Cluster, at: usize, within: Duration) -> Self {
        let node = &cluster.nodes[at];
        let held = async {
            let admin = node.server.try_session("postgres", DATABASE).await.ok()?;
            let sql = "select (pg_current_wal_insert_lsn() - confirmed_flush_lsn)::bigint, \
                       (pg_current_wal_insert_lsn() - restart_lsn)::bigint from pg_replication_slots where slot_name = 'anabranch'";
            let rows = admin.try_rows(sql).await.ok()?;
            let mut both = rows.into_iter().flatten().flatten();
            let mut next = || both.next()?.parse::<i64>().ok();
            Some((next()?, next()?))
        };
        let held = tokio::time::timeout(within, held).await.ok().flatten();
        // Without a slot all is held back.
        let (held, held_back) = held.unwrap_or((i64::MAX, i64::MAX));
        let asking = daemon::status(&node.data_dir);
        let status = tokio::time::timeout(within, asking).await.ok().flatten();
        let status = status.unwrap_or_default();
        let alarms = status["alarms"].as_array().into_iter().flatten();
        let text =
            |alarm: &serde_json::Value, name: &str| alarm[name].as_str().unwrap_or_default().to_owned();
        Self {
            node: u16::try_from(node.id).unwrap_or(0),
            held,
            held_back,
            journal: Files::of(&node.data_dir.join("journal")),
            entries: status["index"]["entries"].as_u64(),
            reached: Reached::of(&status),
            alarms: alarms
                .map(|alarm| (text(alarm, "name"), text(alarm, "text")))
                .collect(),
        }
    }

    /// Did its daemon or its server not answer in time, or not at all?
    fn is_late(&self) -> bool {
        self.entries.is_none() || self.held == i64::MAX
    }

    /// Is there nothing more to wait for?
    fn is_small(&self, segment: u64, is_kept: bool) -> bool {
        // Two segments, and whatever small files there are.
        let is_trimmed = self.journal.bytes <= 2 * segment + segment / 2;
        let journal = is_kept || (self.entries == Some(0) && is_trimmed);
        journal && self.held < 1 << 16 && self.held_back < HELD_BACK_WAITED_FOR && self.alarms.is_empty()
    }

    /// Why nothing is asked of the journal: the first of its segments is there still, and it has hardly a second one.
    fn untried(&self, segment: u64) -> Option<String> {
        (self.journal.has_first && self.journal.bytes <= 2 * segment)
            .then(|| "less than two segments were written".to_owned())
    }
}

/// The files of a journal.
struct Files {
    bytes: u64,
    /// Is the first segment that was ever written still there?
    has_first: bool,
}

impl Files {
    fn of(dir: &std::path::Path) -> Self {
        use std::os::unix::fs::MetadataExt;
        let mut files = Self {
            bytes: 0,
            has_first: false,
        };
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let Ok(data) = entry.metadata() else { continue };
            if data.is_file() {
                files.bytes += data.blocks() * 512;
            }
            // Segments are named by the number of their first frame.
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(".seg"));
            files.has_first |= number.is_some_and(|number| number.parse() == Ok(0_u64));
        }
        files
    }
}

async fn table_of(admin: &Session, node: u16, table: &str, sql: &str) -> Result<Final> {
    let mut rows = Vec::new();
    let mut all_more = Vec::new();
    for row in admin.try_rows(sql).await.map_err(|error| error.to_string())? {
        let mut columns = row.into_iter();
        let mut next = || columns.next().flatten();
        let (key, value, digest, more) = (next(), next(), next(), next());
        let key = key.unwrap_or_default().parse()?;
        let value = value.map(|text: String| text.parse()).transpose()?;
        rows.push((key, value, digest.unwrap_or_default()));
        if let Some(more) = more {
            all_more.push((key, serde_json::from_str(&more)?));
        }
    }
    Ok(Final {
        node,
        table: table.to_owned(),
        rows,
        more: all_more,
    })
}

fn line(node: u16, json: &serde_json::Value, tables: &[Table]) -> Line {
    let text = |name: &str| json[name].as_str().unwrap_or_default().to_owned();
    let (lost, won) = match text("loser").as_str() {
        "local" => ("local", "remote"),
        _ => ("remote", "local"),
    };
    let name = text("table_name");
    let table = tables.iter().find(|table| table.name == name);
    let (key, value) = table.map_or(("k", "v"), |table| (table.key, table.value));
    Line {
        node,
        id: text("conflict_id"),
        table: name,
        key: json["key"][key].as_i64(),
        conflict: text("conflict_type"),
        lost: text(&format!("{lost}_stamp")),
        won: text(&format!("{won}_stamp")),
        lost_value: json[format!("{lost}_tuple")][value].as_i64(),
        status: text("status"),
        text: json.to_string().chars().take(900).collect(),
    }
}

/// Warnings and errors that are kept of a daemon's log at most, and letters of each.
const SAID: (usize, usize) = (150, 500);

/// Is it a line of a log that somebody should look at?
fn is_grave(line: &str) -> bool {
    // Before the text there are the time, the level and the place in the code.
    line.split_whitespace()
        .take(2)
        .any(|word| matches!(word, "WARN" | "ERROR"))
}

/// What the daemons said of errors, for the report: their folders are gone when somebody reads it.
pub(super) fn keep_logs(node: &anabranch_tests::cluster::Node, end: &mut End) {
    let log = node.daemon.log();
    let id = u16::try_from(node.id).unwrap_or(0);
    let grave = log.lines().filter(|line| is_grave(line)).take(SAID.0);
    end.said
        .extend(grave.map(|line| (id, line.chars().take(SAID.1).collect::<String>())));
    for line in log.lines().filter(|line| line.contains("panicked")) {
        end.notes.push(format!("{}: {line}", node.name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_told_from_lines_that_speak_of_some() {
        assert!(is_grave(
            "2026-11-30T17:07:33.126371Z  WARN anabranch_node::daemon::said: starting again"
        ));
        assert!(is_grave("2026-11-30T17:07:33.126371Z ERROR anabranch: it ended"));
        assert!(!is_grave(
            "2026-11-30T17:07:33.126371Z  INFO anabranch_node::link: the peer said ERROR"
        ));
        assert!(!is_grave(""));
    }
}
