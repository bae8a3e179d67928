//! Transactions whose DDL cannot be run here: put aside, told about, tried again.
//!
//! In:   work that ended at a statement      Out: the same work again, an alarm and a line of `status` meanwhile
//! Holds: one transaction for each origin that waits
//! Invariants: nothing of an origin is applied before what is parked of it, and nothing that depends on that
//! On crash: read from the journal again
//! Not here: running the statement (`ddl`)

use std::time::Duration;

use anabranch_proto::NodeId;
use tokio::sync::watch;
use tokio::time::Instant;

use super::ddl::Stuck;
use super::failure::Failure;
use super::work::Work;
use super::{Applier, Seat};
use crate::names::Names;
use crate::shared::{lock, now_us};
use crate::status::StuckDdl;

/// Between two tries, at first and at last.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// A lock that is not granted for so long is an alarm.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// How work ended.
pub(super) enum Outcome {
    /// It is committed.
    Done,
    /// Told to stop before.
    Stopped,
    /// A statement in it cannot be run here; it is rolled back, and can begin again.
    Stuck(Box<Stuck>),
}

/// One transaction that waits.
pub(super) struct Parked {
    pub(super) origin: NodeId,
    work: Work,
    since: Instant,
    since_us: i64,
    pause: Duration,
    due: Instant,
}

impl Parked {
    pub(super) fn new(work: Work) -> Self {
        let origin = work.reaches().iter().map(|(origin, _)| origin).next();
        Self {
            origin: origin.unwrap_or(NodeId(0)),
            work,
            since: Instant::now(),
            since_us: now_us(),
            pause: PAUSE_MIN,
            due: Instant::now(),
        }
    }
}

fn alarm(origin: NodeId) -> String {
    format!("ddl_{origin}")
}

impl Applier {
    /// One that is to be tried again now.
    pub(super) fn take_due(&mut self) -> Option<Parked> {
        let now = Instant::now();
        let at = self.parked.iter().position(|parked| parked.due <= now)?;
        Some(self.parked.remove(at))
    }

    /// Tries a parked transaction again.
    pub(super) async fn try_parked(
        &mut self,
        seat: &mut Seat,
        mut parked: Parked,
        stop: &watch::Receiver<bool>,
    ) -> Result<(), Failure> {
        match self.until_done(seat, &mut parked.work, stop).await? {
            Outcome::Done => {
                self.applied.join(&parked.work.reaches());
                self.note_applied(&parked.work);
                self.shared.alarms.clear(&alarm(parked.origin));
                lock(&self.shared.stuck_ddl).retain(|stuck| stuck.node != parked.origin.0);
                self.tell_stuck();
                Ok(())
            }
            Outcome::Stopped => Ok(()),
            Outcome::Stuck(stuck) => {
                parked.pause = (parked.pause * 2).min(PAUSE_MAX);
                self.park(seat, parked, &stuck).await
            }
        }
    }

    /// Puts a transaction aside and says why.
    pub(super) async fn park(
        &mut self,
        seat: &Seat,
        mut parked: Parked,
        stuck: &Stuck,
    ) -> Result<(), Failure> {
        let shown = self.explain(seat, &parked, stuck).await;
        let is_alarming = !shown.waits_for_lock || parked.since.elapsed() >= LOCK_PATIENCE;
        if is_alarming {
            self.shared
                .alarms
                .raise(&alarm(parked.origin), shown.text.clone());
        }
        {
            let mut all = lock(&self.shared.stuck_ddl);
            all.retain(|other| other.node != parked.origin.0);
            all.push(shown);
        }
        parked.due = Instant::now() + parked.pause;
        self.parked.push(parked);
        self.tell_stuck();
        Ok(())
    }

    /// Others are decided meanwhile: what they meet of these is rolled back.
    fn tell_stuck(&self) {
        let large = self.parked.iter().filter(|parked| parked.work.is_large());
        let stuck = large.flat_map(|parked| parked.work.stamps()).collect();
        lock(&self.shared.resolver).set_stuck(stuck);
    }

    async fn explain(&self, seat: &Seat, parked: &Parked, stuck: &Stuck) -> StuckDdl {
        let (ddl, error) = (&stuck.ddl, stuck.error.to_string());
        let waits_for_lock = stuck.waits_for_lock();
        // What cannot be asked now is asked at the next try.
        let names = Names::known(&self.config, &self.shared);
        let known = (&names, self.shared.lasting.as_ref());
        let concurrent = ddl.concurrent(&seat.session.client, known).await;
        let concurrent = concurrent.unwrap_or_default();
        let origin = names.with_id(ddl.origin.0);
        let command: String = ddl.command.split_whitespace().collect::<Vec<_>>().join(" ");
        let command: String = command.chars().take(200).collect();
        let mut text = if waits_for_lock {
            format!(
                "`{command}` of node {origin} waits for a lock that another session holds here ({error}); the transactions of node \
                 {origin} wait behind it. It is tried again every few seconds, so that nobody queues behind it for long: end what holds \
                 the table (pg_locks)"
            )
        } else {
            format!(
                "`{command}` of node {origin} cannot be run here: {error}. The transactions of node {origin} wait, others go on. Mend what \
                 is in the way, it is tried again every few seconds; or bring about by hand what it does, and say `anabranch ddl --done {}`",
                ddl.id
            )
        };
        if !concurrent.is_empty() && !waits_for_lock {
            text.push_str(&format!(
                ". At the same time, neither having seen the other, was run at {}: perhaps two nodes changed one thing, \
                 see docs/errors/ddl-is-stuck.md",
                concurrent.join("; ")
            ));
        }
        StuckDdl {
            id: ddl.id.to_string(),
            node: ddl.origin.0,
            command,
            since: jiff::Timestamp::from_microsecond(parked.since_us)
                .map_or_else(|_| String::new(), |time| time.to_string()),
            waits_for_lock,
            error,
            concurrent,
            text,
        }
    }
}
