//! Carries a plan out on a cluster, and undoes it.
//!
//! In:   a plan        Out: [`Event`]s: faults, and whatever ended by itself
//! Invariants: 1. whatever was begun is undone, but for nodes lost for good, or the run is given up; 2. what ended and was not ended by the
//!        nemesis is told, whenever it was; 3. what could not be begun is told as `impossible`, what met nothing as `idle`: neither
//!        counts as survived

use std::ops::RangeInclusive;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anabranch_tests::cluster::Cluster;
use anabranch_tests::disk::Disk;
use anabranch_tests::postgres::{DATABASE, Postgres, tail};
use anabranch_tests::process::{self, Signal};
use anabranch_tests::proxy::Mode;
use rand::Rng;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::{Fault, Lines, Part, Planned, Toll, heal};
use crate::clock::Clock;
use crate::history::{Death, Event, Fault as Told, LEFT_OUT};
use crate::record::Record;
use crate::shim::Shim;

/// How often somebody looks for what ended by itself.
const WATCH: Duration = Duration::from_millis(300);

/// How long a daemon may take to end on SIGTERM: longer than it needs on a busy machine, less than anybody would wait.
const ENDS_WITHIN: Duration = Duration::from_secs(60);

/// How long members may take to agree where a lost one's stream ends.
const DROPPED_WITHIN: Duration = Duration::from_secs(60);

/// How long a server may take to recover from a failed fsync. It syncs every file of its folder first, a thousand of them, which has
/// been seen to take more than two minutes on a disk that other runs were busy with. One of PostgreSQL 18 whose startup process died of a
/// failed fsync has been seen to stay "in recovery mode" for ever, with no startup process: it is killed then.
pub const RECOVERY: Duration = Duration::from_secs(200);

/// How long a server may take to do what a fault needs of it. One that another fault has stopped never answers.
const REACHED_WITHIN: Duration = Duration::from_secs(10);

/// How long a server may take to say what time it has.
const TIME_WITHIN: Duration = Duration::from_secs(2);

/// What a clock may be off beside what it was set to, microseconds.
const CLOCK_SLACK_US: i64 = 100_000;

/// This machine's time, microseconds since 1970.
fn epoch_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(0)
}

/// Does a server that showed this when it was asked, some time in the range, go by a clock that is so many seconds off? If not, by which it goes.
fn goes_by(shown_us: i64, asked_us: RangeInclusive<i64>, seconds: i64) -> Result<(), String> {
    let off_us = seconds * 1_000_000;
    let (first, last) = (asked_us.start() + off_us, asked_us.end() + off_us);
    if (first - CLOCK_SLACK_US..=last + CLOCK_SLACK_US).contains(&shown_us) {
        return Ok(());
    }
    let found = (shown_us - asked_us.start()) as f64 / 1e6;
    Err(format!("its server goes by a clock that is {found:.1} s off"))
}

/// Gives up where the server does not answer: then the fault cannot be made.
async fn reached(doing: impl Future<Output = Result<(), String>>) -> Result<(), String> {
    tokio::time::timeout(REACHED_WITHIN, doing)
        .await
        .unwrap_or_else(|_| Err(format!("the server did not answer within {REACHED_WITHIN:?}")))
}

/// Does the server take sessions?
pub async fn answers(server: &Postgres) -> bool {
    let asking = server.try_session("postgres", DATABASE);
    matches!(tokio::time::timeout(REACHED_WITHIN, asking).await, Ok(Ok(_)))
}

/// What a nemesis works on.
pub struct Scene<'a> {
    /// The cluster.
    pub cluster: &'a mut Cluster,
    /// A standby of the first node.
    pub standby: Option<&'a mut Postgres>,
    /// Disks of daemons and servers, in order of the nodes; none if the nemesis needs none.
    pub disks: Disks,
    /// The lines between the nodes.
    pub lines: Lines,
    /// What reaches into fsync, in order of the nodes; none if the nemesis needs none.
    pub shims: Vec<[Shim; 2]>,
    /// A table of the workload.
    pub table: String,
    /// The run's clock.
    pub clock: Clock,
    /// Where faults are told.
    pub record: Record,
    /// Locks that are held: sessions in a transaction.
    pub held: Vec<anabranch_tests::Session>,
    /// What may not be started again, and who may end.
    pub toll: Toll,
}

/// File systems of their own.
#[derive(Default)]
pub struct Disks {
    /// Of the daemons.
    pub daemons: Vec<Disk>,
    /// Of the servers.
    pub servers: Vec<Disk>,
}

impl Scene<'_> {
    /// Carries a plan out, then waits until `until` on the run's clock. Gives when the undoing of the last fault began, if any was
    /// begun; or why one cannot be undone: then what the system does from then on says nothing of it.
    pub async fn carry_out(
        &mut self,
        plan: &[Planned],
        seed: u64,
        until: Duration,
    ) -> Result<Option<i64>, String> {
        let mut random = StdRng::seed_from_u64(seed ^ 0x666c_6170);
        let mut undone_us = None;
        for (number, planned) in plan.iter().enumerate() {
            let left = until.saturating_sub(self.elapsed());
            if left < planned.after {
                self.leave_out(&plan[number..]);
                break;
            }
            self.wait(planned.after).await;
            let mut begun = Vec::new();
            for fault in planned.in_order() {
                if let Some((node, part)) = fault.excuses() {
                    self.toll.excused.push((node, part, fault.to_string()));
                }
                // Some take long to begin, and whoever writes feels them from then on.
                let at_us = self.clock.now_us();
                match self.begin(fault).await {
                    Ok(how) => {
                        self.toll.lost.extend(fault.loses());
                        self.tell(at_us, fault, "start", how);
                        begun.push(fault);
                    }
                    Err(why) => self.tell(at_us, fault, "impossible", why),
                }
            }
            let ends = tokio::time::Instant::now() + planned.length;
            while tokio::time::Instant::now() < ends {
                tokio::time::sleep(Duration::from_millis(random.random_range(100..500))).await;
                self.watch();
                for fault in &begun {
                    let stirred = self.stir(fault, &mut random);
                    stirred.map_err(|why| format!("`{fault}` does not go on: {why}"))?;
                }
            }
            for node in begun.iter().filter_map(|fault| fault.must_end()).map(|end| end.0) {
                self.until_ended(node).await;
            }
            let mut stuck = Vec::new();
            for fault in planned.in_order().into_iter().rev() {
                // What follows, such as a server's start, is recovery, and no more the fault.
                if begun.contains(&fault) {
                    let at_us = self.clock.now_us();
                    undone_us = Some(at_us);
                    let (did, idle) = self.outcome(fault);
                    self.tell(at_us, fault, "stop", did);
                    if let Some(why) = idle {
                        self.tell(at_us, fault, "idle", why);
                    }
                }
                // Also where it could not be begun: half of it may have been.
                if let Err(why) = self.undo(fault).await {
                    stuck.push(format!("`{fault}` cannot be undone: {why}"));
                }
            }
            if !stuck.is_empty() {
                return Err(stuck.join("; "));
            }
            self.watch();
            self.toll.revive(self.cluster).await;
            self.toll
                .excused
                .retain(|(node, _, _)| self.toll.lost.contains(node));
        }
        let left = until.saturating_sub(self.elapsed());
        self.wait(left).await;
        Ok(undone_us)
    }

    /// Tells of faults that are not begun: those before them took longer than was planned.
    fn leave_out(&self, plan: &[Planned]) {
        for fault in plan.iter().flat_map(|planned| &planned.faults) {
            let why = "those before it took too long".to_owned();
            self.tell(self.clock.now_us(), fault, LEFT_OUT, why);
        }
    }

    /// Waits, with an eye on what ends by itself; what does is started again.
    pub async fn wait(&mut self, length: Duration) {
        let ends = tokio::time::Instant::now() + length;
        loop {
            let left = ends.saturating_duration_since(tokio::time::Instant::now());
            tokio::time::sleep(left.min(WATCH)).await;
            if self.watch() {
                self.toll.revive(self.cluster).await;
            }
            if left.is_zero() {
                return;
            }
        }
    }

    /// Tells what ended by itself; did anything?
    fn watch(&mut self) -> bool {
        let deaths = self.toll.watch(self.cluster, self.clock.now_us());
        let any = !deaths.is_empty();
        for death in deaths {
            self.record.tell(Event::Death(death));
        }
        any
    }

    fn elapsed(&self) -> Duration {
        Duration::from_micros(self.clock.now_us().unsigned_abs())
    }

    fn tell(&self, at_us: i64, fault: &Fault, phase: &str, detail: String) {
        let told = Told {
            at_us,
            name: fault.to_string(),
            phase: phase.to_owned(),
            detail,
        };
        self.record.tell(Event::Fault(told));
    }

    /// Begins a fault; what is to be said of how, or why it cannot be.
    async fn begin(&mut self, fault: &Fault) -> Result<String, String> {
        self.watch();
        match fault {
            Fault::Cut { a, b, silent } => {
                let mode = if *silent { Mode::Stall } else { Mode::Cut };
                return self.lines.set(self.cluster, a, b, mode);
            }
            Fault::OneWay { from, to } => {
                let both = [
                    (*from, *to, Mode::StallRequests),
                    (*to, *from, Mode::StallAnswers),
                ];
                return self.lines.set_each(self.cluster, &both);
            }
            Fault::Deaf { node, to } => {
                return self.lines.set_each(self.cluster, &[(*node, *to, Mode::Stall)]);
            }
            Fault::Slow { ms } => {
                let all = self.cluster.all();
                return self.lines.set(self.cluster, &all, &all, Mode::Slow(*ms));
            }
            Fault::Lossy { node, percent } => return self.lines.lose(self.cluster, *node, *percent),
            Fault::KillDaemon(node) => {
                let daemon = &mut self.need_daemon()?.nodes[*node].daemon;
                if !daemon.runs() {
                    return Err("the daemon does not run".to_owned());
                }
                daemon.kill();
            }
            Fault::KillServer(node) => self.running_server(*node)?.kill(),
            Fault::KillNode(node) => {
                self.any_runs(&[*node])?;
                self.kill(&[*node]);
            }
            Fault::KillAll => {
                let all = self.cluster.all();
                self.any_runs(&all)?;
                self.kill(&all);
            }
            Fault::PauseDaemon(node) => self.pause_daemon(*node)?,
            Fault::PauseServer(node) => self.running_server(*node)?.freeze(true),
            Fault::PauseNode(node) => {
                self.pause_daemon(*node)?;
                self.running_server(*node)?.freeze(true);
            }
            Fault::PauseWalsender(node) => reached(self.walsender(*node)).await?,
            Fault::Skew { node, seconds } | Fault::Strobe { node, seconds } => {
                return self.move_clock(*node, *seconds).await;
            }
            Fault::Lock(node) => reached(self.lock(*node)).await?,
            Fault::Roll => self.roll().await,
            Fault::StandbyAway => {
                let standby = self.standby.as_mut().ok_or("there is no standby")?;
                if standby.ended().is_some() || !standby.runs() {
                    return Err("the standby does not run".to_owned());
                }
                standby.freeze(true);
            }
            Fault::PowerLoss(node) => {
                self.need_daemon()?.nodes[*node].daemon.kill();
                self.lose_power(*node, Part::Daemon)?;
            }
            Fault::ServerPowerLoss(node) => {
                self.cluster.nodes[*node].server.kill();
                self.lose_power(*node, Part::Server)?;
            }
            Fault::MachinePowerLoss(node) => {
                self.need_daemon()?;
                self.kill(&[*node]);
                self.lose_power(*node, Part::Daemon)?;
                self.lose_power(*node, Part::Server)?;
            }
            Fault::FullDisk(node, part) => {
                self.disk(*node, *part)?
                    .fill()
                    .map_err(|error| error.to_string())?;
            }
            Fault::HungDisk(node, part) => {
                self.disk(*node, *part)?
                    .freeze(true)
                    .map_err(|error| error.to_string())?;
            }
            Fault::FsyncFails(node, part) => self.shim(*node, *part)?.set("fail")?,
            Fault::FsyncSlow(node, part) => self.shim(*node, *part)?.set("slow 150")?,
            Fault::DropSlot(node) => reached(self.drop_slot(*node)).await?,
            Fault::Lose(node) => self.kill(&[*node]),
            Fault::Heal(node) => return self.heal(*node).await,
            Fault::Drop(node) => self.drop_member(*node).await?,
            Fault::Flap => return self.lines.set_each(self.cluster, &[]),
        }
        Ok(String::new())
    }

    fn need_daemon(&mut self) -> Result<&mut Cluster, String> {
        if self.toll.daemons {
            Ok(self.cluster)
        } else {
            Err("this system has no daemon".to_owned())
        }
    }

    fn running_server(&mut self, node: usize) -> Result<&mut Postgres, String> {
        let server = &mut self.cluster.nodes[node].server;
        if server.runs() {
            Ok(server)
        } else {
            Err("the server does not run".to_owned())
        }
    }

    /// Is there anything to kill at these nodes?
    fn any_runs(&mut self, nodes: &[usize]) -> Result<(), String> {
        let any = nodes.iter().any(|&at| {
            let node = &mut self.cluster.nodes[at];
            node.server.runs() || node.daemon.runs()
        });
        any.then_some(()).ok_or_else(|| "nothing runs there".to_owned())
    }

    /// What a fault that was begun has met, and why it met nothing if so, where that can be known. To be asked before it is undone.
    fn outcome(&self, fault: &Fault) -> (String, Option<String>) {
        let (what, met) = match fault {
            Fault::FsyncFails(node, part) | Fault::FsyncSlow(node, part) => (
                "calls of fsync",
                self.shim(*node, *part).ok().map(|shim| Ok(shim.met())),
            ),
            fault if fault.is_of_lines() => ("packets", self.lines.met()),
            _ => return (String::new(), None),
        };
        match met {
            None => (String::new(), None),
            Some(Ok(0)) => (String::new(), Some(format!("no {what} met it"))),
            Some(Ok(met)) => (format!("{met} {what} met it"), None),
            Some(Err(why)) => (String::new(), Some(format!("nobody knows what it met: {why}"))),
        }
    }

    /// Faults that move while they last.
    fn stir(&mut self, fault: &Fault, random: &mut StdRng) -> Result<(), String> {
        match fault {
            Fault::Flap => {
                let nodes = self.cluster.nodes.len();
                let (from, to) = (random.random_range(0..nodes), random.random_range(0..nodes));
                let mode = *Mode::FLAPPING.choose(random).unwrap_or(&Mode::Pass);
                self.lines.set_each(self.cluster, &[(from, to, mode)])?;
            }
            Fault::Strobe { node, seconds } => {
                let seconds = if random.random_range(0..2) == 0 {
                    0
                } else {
                    *seconds
                };
                self.set_clock(*node, seconds);
            }
            _ => {}
        }
        Ok(())
    }

    fn pause_daemon(&mut self, node: usize) -> Result<(), String> {
        let pid = self.need_daemon()?.nodes[node].daemon.pid();
        process::signal(pid.ok_or("the daemon does not run")?, Signal::STOP);
        Ok(())
    }

    fn resume_daemon(&mut self, node: usize) {
        if let Some(pid) = self.cluster.nodes[node].daemon.pid() {
            process::signal(pid, Signal::CONT);
        }
    }

    /// A server whose fsync failed is in recovery, or gives that up and ends: the fault is over once it has done one of both, or its
    /// operator has lost patience.
    async fn recover(&mut self, node: usize, fault: &Fault) {
        let until = tokio::time::Instant::now() + RECOVERY;
        while tokio::time::Instant::now() < until {
            // That it ended may have been told before.
            self.watch();
            let server = &self.cluster.nodes[node].server;
            if !server.runs() {
                return;
            }
            if answers(server).await {
                return;
            }
            tokio::time::sleep(WATCH).await;
        }
        let server = &mut self.cluster.nodes[node].server;
        // 18's postmaster says so for ever once its startup process has died of what it could not sync.
        self.record.tell(Event::Death(Death {
            at_us: self.clock.now_us(),
            node: u16::try_from(node + 1).unwrap_or(0),
            what: Part::Server.to_string(),
            how: format!("killed by its operator: it was in recovery for {RECOVERY:?}"),
            excuse: fault.excuses().map(|_| fault.to_string()),
            words: tail(&server.log(), 3),
        }));
        server.kill();
    }

    /// Undoes a fault, or what of it was begun; why it cannot be undone.
    async fn undo(&mut self, fault: &Fault) -> Result<(), String> {
        match fault {
            Fault::Cut { .. }
            | Fault::OneWay { .. }
            | Fault::Deaf { .. }
            | Fault::Flap
            | Fault::Slow { .. }
            | Fault::Lossy { .. } => self.lines.heal(self.cluster)?,
            Fault::KillDaemon(_) | Fault::KillServer(_) | Fault::KillNode(_) | Fault::KillAll => {
                self.toll.revive(self.cluster).await
            }
            Fault::PowerLoss(node) | Fault::ServerPowerLoss(node) | Fault::MachinePowerLoss(node) => {
                // On an empty folder nobody may be started.
                self.disks_are_there(*node)?;
                self.toll.revive(self.cluster).await;
            }
            Fault::FullDisk(node, part) => {
                if let Ok(disk) = self.disk(*node, *part) {
                    disk.try_empty().map_err(|error| error.to_string())?;
                }
            }
            Fault::HungDisk(node, part) => {
                if let Ok(disk) = self.disk(*node, *part) {
                    disk.freeze(false).map_err(|error| error.to_string())?;
                }
            }
            Fault::FsyncFails(node, part) | Fault::FsyncSlow(node, part) => {
                if let Ok(shim) = self.shim(*node, *part) {
                    shim.set("pass")?;
                }
                if *part == Part::Server {
                    self.recover(*node, fault).await;
                }
            }
            Fault::DropSlot(_) | Fault::Heal(_) | Fault::Lose(_) | Fault::Drop(_) => {}
            Fault::PauseNode(node) => {
                self.cluster.nodes[*node].server.freeze(false);
                self.resume_daemon(*node);
            }
            Fault::PauseDaemon(node) => self.resume_daemon(*node),
            Fault::PauseServer(node) | Fault::PauseWalsender(node) => {
                self.cluster.nodes[*node].server.freeze(false)
            }
            Fault::Skew { node, .. } | Fault::Strobe { node, .. } if self.has_clock(*node) => {
                self.set_clock(*node, 0);
            }
            Fault::Skew { .. } | Fault::Strobe { .. } => {}
            Fault::Lock(_) => self.held.clear(),
            Fault::Roll => {}
            Fault::StandbyAway => {
                if let Some(standby) = &mut self.standby {
                    standby.freeze(false);
                }
            }
        }
        Ok(())
    }

    fn disks_are_there(&mut self, node: usize) -> Result<(), String> {
        for part in [Part::Daemon, Part::Server] {
            let is_there = self.disk(node, part).map_or(true, |disk| disk.is_mounted());
            if !is_there {
                return Err(format!("the disk of the {part} could not be mounted again"));
            }
        }
        Ok(())
    }

    fn kill(&mut self, nodes: &[usize]) {
        for &node in nodes {
            if self.toll.daemons {
                self.cluster.nodes[node].daemon.kill();
            }
            self.cluster.nodes[node].server.kill();
        }
    }

    fn lose_power(&mut self, node: usize, part: Part) -> Result<(), String> {
        self.disk(node, part)?
            .lose_power()
            .map_err(|error| error.to_string())
    }

    fn disk(&mut self, node: usize, part: Part) -> Result<&mut Disk, String> {
        if part == Part::Daemon {
            self.need_daemon()?;
        }
        let disks = match part {
            Part::Server => &mut self.disks.servers,
            Part::Daemon => &mut self.disks.daemons,
        };
        disks
            .get_mut(node)
            .ok_or_else(|| format!("the {part} has no disk of its own"))
    }

    fn shim(&self, node: usize, part: Part) -> Result<&Shim, String> {
        if part == Part::Daemon && !self.toll.daemons {
            return Err("this system has no daemon".to_owned());
        }
        let [server, daemon] = self.shims.get(node).ok_or("nothing reaches into fsync")?;
        Ok(match part {
            Part::Server => server,
            Part::Daemon => daemon,
        })
    }

    /// As somebody would who is short of disk space: the daemon's connection is ended, and the slot dropped.
    async fn drop_slot(&mut self, node: usize) -> Result<(), String> {
        self.need_daemon()?;
        let server = &self.cluster.nodes[node].server;
        let admin = server
            .try_session("postgres", DATABASE)
            .await
            .map_err(|error| error.to_string())?;
        let end = "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = 'anabranch' and active";
        let drop = "select pg_drop_replication_slot('anabranch')";
        for _ in 0..500 {
            admin.try_run(end).await.map_err(|error| error.to_string())?;
            if admin.try_run(drop).await.is_ok() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Err("the daemon was always there first".to_owned())
    }

    /// One that stays is told; the others agree with it where the lost one's stream ends. That they do not is no fault that
    /// could not be made: it is noted, and `alive` finds it.
    async fn drop_member(&mut self, node: usize) -> Result<(), String> {
        let cluster = self.need_daemon()?;
        let name = cluster.nodes[node].name.clone();
        let at = (node + 1) % cluster.nodes.len();
        let daemon = &cluster.nodes[at].daemon;
        let command = ["node", "drop", &name];
        let dropping = daemon.anabranch(&command, &["--output", "json"]);
        let said = match tokio::time::timeout(DROPPED_WITHIN, dropping).await {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
            Err(_) => format!("it was not through after {DROPPED_WITHIN:?}"),
        };
        let note = format!("n{}: `node drop {name}` failed: {said}", at + 1);
        self.toll.notes.push(note);
        Ok(())
    }

    /// What the daemon's operator does, as its last words say: `anabranch heal`, then the daemon is started. That it fails is no fault that
    /// could not be made: it is noted, and `alive` finds it.
    async fn heal(&mut self, node: usize) -> Result<String, String> {
        if !self.toll.lost.contains(&node) {
            return Err("its slot was not dropped".to_owned());
        }
        let words = self.last_words(node).await;
        if !(words.contains("does not exist") && words.contains("anabranch heal")) {
            let note = format!(
                "n{}: its slot is gone, and its daemon does not say to heal: {words}",
                node + 1
            );
            self.toll.notes.push(note);
        }
        match heal::run(&self.cluster.nodes[node].daemon).await {
            Ok(report) => {
                let (at_us, id) = (self.clock.now_us(), u16::try_from(node + 1).unwrap_or(0));
                let rows = report.rows;
                self.record.tell(Event::Healed(report.of(id, at_us)));
                self.toll.lost.remove(&node);
                self.toll.excused.retain(|(excused, _, _)| *excused != node);
                self.cluster.nodes[node].daemon.start();
                Ok(format!("{rows} rows were written again"))
            }
            Err(why) => {
                let note = format!("n{}: `anabranch heal` failed: {why}", node + 1);
                self.toll.notes.push(note);
                Ok("it failed".to_owned())
            }
        }
    }

    /// Waits for the end of a daemon that has to end, some seconds.
    async fn until_ended(&mut self, node: usize) {
        for _ in 0..50 {
            self.watch();
            if !self.cluster.nodes[node].daemon.started() {
                break;
            }
            tokio::time::sleep(WATCH).await;
        }
    }

    /// What the daemon said before it ended; it is given some seconds.
    async fn last_words(&mut self, node: usize) -> String {
        self.until_ended(node).await;
        tail(&self.cluster.nodes[node].daemon.log(), 6)
    }

    async fn roll(&mut self) {
        for at in self.cluster.all() {
            self.watch();
            if self.toll.daemons {
                self.end_daemon(at).await;
            }
            let node = &mut self.cluster.nodes[at];
            node.server.stop();
            node.server.start().await;
            if self.toll.daemons && !node.daemon.started() {
                node.daemon.start();
            }
            tokio::time::sleep(Duration::from_millis(700)).await;
        }
    }

    /// SIGTERM to a daemon. That it does not end of it, or ends with an error, is no fault that could not be made: it is noted, and `alive`
    /// finds it.
    async fn end_daemon(&mut self, at: usize) {
        let daemon = &mut self.cluster.nodes[at].daemon;
        let Some(pid) = daemon.pid() else { return };
        process::signal(pid, Signal::TERM);
        let until = tokio::time::Instant::now() + ENDS_WITHIN;
        let status = loop {
            let status = daemon.wait_exit(Duration::ZERO);
            if status.is_some() || tokio::time::Instant::now() >= until {
                break status;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let said = match status {
            Some(status) if status.success() => return,
            Some(status) => format!("ended with {status}"),
            None => format!("did not end within {ENDS_WITHIN:?}, and was killed"),
        };
        daemon.kill();
        let words = tail(&daemon.log(), 6);
        let note = format!("n{}: on SIGTERM its daemon {said}: {words}", at + 1);
        self.toll.notes.push(note);
    }

    /// Not where faults were chosen that the nemesis does not make.
    fn has_clock(&self, node: usize) -> bool {
        !self.cluster.nodes[node].server.clock_env().is_empty()
    }

    fn set_clock(&mut self, node: usize, seconds: i64) {
        self.cluster.nodes[node].server.set_clock(seconds);
    }

    /// Sets a node's clock, and asks its server for the time: a clock that nobody goes by would be survived by everybody. Of a server that
    /// another fault has stopped nobody knows it.
    async fn move_clock(&mut self, node: usize, seconds: i64) -> Result<String, String> {
        if !self.has_clock(node) {
            return Err("the node has no clock of its own".to_owned());
        }
        self.set_clock(node, seconds);
        let server = &self.cluster.nodes[node].server;
        let asking = async {
            let admin = server.try_session("postgres", DATABASE).await.ok()?;
            let before_us = epoch_us();
            let sql = "select (extract(epoch from clock_timestamp()) * 1000000)::bigint";
            let rows = admin.try_rows(sql).await.ok()?;
            let shown_us = rows.into_iter().flatten().flatten().next()?.parse::<i64>().ok()?;
            Some((shown_us, before_us..=epoch_us()))
        };
        match tokio::time::timeout(TIME_WITHIN, asking).await {
            Ok(Some((shown_us, asked_us))) => goes_by(shown_us, asked_us, seconds).map(|()| String::new()),
            _ => Ok("its server did not say what time it has".to_owned()),
        }
    }

    async fn walsender(&mut self, node: usize) -> Result<(), String> {
        let admin = self.cluster.nodes[node]
            .server
            .try_session("postgres", "postgres")
            .await
            .map_err(|error| error.to_string())?;
        let sql = "select pid from pg_stat_replication limit 1";
        let rows = admin.try_rows(sql).await.map_err(|error| error.to_string())?;
        let pid = rows
            .into_iter()
            .flatten()
            .flatten()
            .next()
            .ok_or("there is no walsender")?;
        process::signal(pid.parse().map_err(|_| "no pid")?, Signal::STOP);
        Ok(())
    }

    async fn lock(&mut self, node: usize) -> Result<(), String> {
        let session = self.cluster.nodes[node]
            .server
            .try_session("app", DATABASE)
            .await
            .map_err(|error| error.to_string())?;
        let sql = format!("begin; lock table {} in exclusive mode", self.table);
        let locking = tokio::time::timeout(Duration::from_secs(5), session.try_run(&sql));
        match locking.await {
            Ok(Ok(())) => self.held.push(session),
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err("the lock was not granted within 5 s".to_owned()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_nobody_goes_by_is_no_fault() {
        let now_us = 1_700_000_000_000_000;
        let asked_us = now_us..=now_us + 300_000;
        for seconds in [1, -1, 300, -86_400 * 900] {
            let shown_us = now_us + seconds * 1_000_000 + 200_000;
            assert_eq!(goes_by(shown_us, asked_us.clone(), seconds), Ok(()));
            let why = goes_by(now_us + 200_000, asked_us.clone(), seconds).unwrap_err();
            assert!(why.contains("0.2 s off"), "{why}");
        }
        // Who took longer to answer than it is off may go by either.
        let long_us = now_us..=now_us + 2_000_000;
        assert_eq!(goes_by(now_us, long_us.clone(), -1), Ok(()));
        assert_eq!(goes_by(now_us + 1_500_000, long_us.clone(), 1), Ok(()));
        assert!(goes_by(now_us, long_us, -7).is_err());
    }
}
