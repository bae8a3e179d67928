//! One welcomed stream, from the receiving side.
//!
//! In:   messages of the peer               Out: frames in the journal; requests that say what is wanted and consumed
//! Holds: the request that is not sent yet; per wanted origin what is expected
//! Invariants: 1. a frame is judged only if it was chosen after our newest word on where its origin shall start;
//!             2. requests are cumulative, so one that must wait is merged with the next; 3. the task is never
//!             dropped between the judgement and the append of a frame; 4. silence ends the stream, and has others asked before it does.
//! On crash: the next stream starts from what the journal holds.
//! Not here: judging frames (`holds.rs`), which origins to want (`peer.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant as StdInstant};

use anabranch_proto::link as pb;
use anabranch_proto::{NodeId, Position};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Streaming;

use super::client::describe;
use super::clock::ClockFilter;
use super::holds::{LinkToken, Verdict};
use super::limits::{
    CLIENT_TICK, CONSUMED_STEP_BYTES, FRAME_OVERHEAD_BYTES, PULSE, RELAY_AFTER_SILENCE, REPORT_INTERVAL,
    REPORT_INTERVAL_MIN, STALL_TIMEOUT, UNAVAILABLE_RETRY,
};
use super::peer::Peer;
use super::session::News;
use super::shared::{LinkEvent, Shared};
use super::{Error, chain, wire};
use crate::journal;

/// A wanted origin, seen from here.
#[derive(Debug, Default)]
struct Expected {
    /// Frames chosen under an older want are not looked at.
    since_generation: u64,
    /// Where the last gap was found; a second one at the same place means that the peer has nothing before it.
    gap_at: Option<Position>,
    /// Nothing is expected before this; then it is asked for again.
    retry_at: Option<Instant>,
    /// Frames were passed over: the origin is paused, or another link is bringing the same large transaction.
    passed_over: bool,
    /// Shall start again at the held position.
    reposition: bool,
}

/// One stream.
pub(super) struct Receiver {
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    link: LinkToken,
    requests: mpsc::Sender<pb::PullRequest>,
    /// What the next request says; none when there is nothing to say.
    outgoing: Option<pb::PullRequest>,
    expected: BTreeMap<NodeId, Expected>,
    generation: u64,
    consumed_bytes: u64,
    consumed_said: u64,
    clock: ClockFilter,
    ping_at: Instant,
    report_at: Instant,
    report_sent: Instant,
    /// Between two reports, as the peer wants them.
    report_interval: Duration,
}

impl Receiver {
    pub(super) fn new(shared: Arc<Shared>, peer: Arc<Peer>, requests: mpsc::Sender<pb::PullRequest>) -> Self {
        let now = Instant::now();
        Self {
            shared,
            peer,
            link: LinkToken::new(),
            requests,
            outgoing: None,
            expected: BTreeMap::new(),
            generation: 0,
            consumed_bytes: 0,
            consumed_said: 0,
            clock: ClockFilter::default(),
            ping_at: now,
            report_at: now,
            report_sent: now,
            report_interval: REPORT_INTERVAL_MIN,
        }
    }

    /// Receives until the links stop (`Ok`) or the stream is no good any more.
    pub(super) async fn run(
        mut self,
        first: pb::PullResponse,
        mut responses: Streaming<pb::PullResponse>,
    ) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        let mut stop = Box::pin(shared.stopped());
        let mut positions = News::of(&shared);
        let mut ticks = tokio::time::interval(CLIENT_TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.note_holds(&first)?;
        self.take(first).await?;
        let mut heard = Instant::now();
        let mut silent = Duration::ZERO;
        loop {
            self.flush();
            tokio::select! {
                () = &mut stop => return Ok(()),
                message = tokio::time::timeout_at(heard + STALL_TIMEOUT, responses.message()) => {
                    let message = message.map_err(|_| self.stalled())?.map_err(|status| self.broken(describe(&status)))?;
                    let message = message.ok_or_else(|| self.broken("the peer ended it".to_owned()))?;
                    self.take(message).await?;
                    // Counted from the end of the work: a slow journal of ours is not the peer's silence.
                    (heard, silent) = (Instant::now(), Duration::ZERO);
                }
                _ = ticks.tick() => {
                    self.shared.check_shunned(&self.peer)?;
                    // By ticks, not by the clock: while we did not run ourselves nobody was silent.
                    silent = silent.saturating_add(CLIENT_TICK);
                    if silent >= RELAY_AFTER_SILENCE {
                        self.peer.unserved();
                    }
                    self.tick().await;
                }
                // Not once a report is due for it: however many more come until then, it says all.
                () = positions.changed(), if self.report_at > self.report_sent + self.report_interval => {
                    self.report_at = self.report_at.min(self.report_sent + self.report_interval);
                }
                () = tokio::time::sleep_until(self.report_at) => self.report(),
            }
        }
    }

    fn stalled(&self) -> Error {
        Error::Stalled {
            peer: self.peer.config.name.clone(),
            seconds: STALL_TIMEOUT.as_secs(),
        }
    }

    fn broken(&self, reason: String) -> Error {
        Error::Broken {
            peer: self.peer.config.name.clone(),
            reason,
        }
    }

    /// A peer that had nothing new of its own when it welcomed us needs no relay any more.
    fn note_holds(&self, first: &pb::PullResponse) -> Result<(), Error> {
        let hello = first.welcome.as_ref().and_then(|welcome| welcome.hello.as_ref());
        let holds = wire::vector_from_wire(hello.map(|hello| hello.holds.as_slice()).unwrap_or_default());
        let own = self.peer.config.id;
        if holds.get(own) <= self.shared.holds.position(own) {
            self.peer.delivered();
        }
        Ok(())
    }

    /// Everything in one message.
    async fn take(&mut self, message: pb::PullResponse) -> Result<(), Error> {
        if message.echo_clock_us != 0
            && let Some(clock) = self
                .clock
                .echo(message.echo_clock_us, message.clock_us, StdInstant::now())
        {
            self.peer.set_clock(clock);
        }
        if message.report_interval_ms != 0 {
            let wanted = Duration::from_millis(u64::from(message.report_interval_ms));
            self.report_interval = wanted.clamp(REPORT_INTERVAL_MIN, REPORT_INTERVAL);
        }
        if !message.journaled.is_empty() || !message.applied.is_empty() {
            let (journaled, applied) = (
                wire::vector_from_wire(&message.journaled),
                wire::vector_from_wire(&message.applied),
            );
            self.shared
                .take_report(&self.peer, &journaled, &applied, message.is_full)?;
        }
        for unavailable in &message.unavailable {
            self.note_unavailable(unavailable, message.want_generation).await;
        }
        for frame in message.frames {
            self.take_frame(frame, message.want_generation).await?;
        }
        Ok(())
    }

    async fn take_frame(&mut self, frame: pb::Frame, generation: u64) -> Result<(), Error> {
        let payload = u64::try_from(frame.payload.len()).unwrap_or(u64::MAX);
        let overhead = u64::try_from(FRAME_OVERHEAD_BYTES).unwrap_or_default();
        let frame = wire::frame_from_wire(frame).map_err(|source| Error::Frame {
            peer: self.peer.config.name.clone(),
            source,
        })?;
        let meta = frame.meta;
        let expected = self
            .expected
            .get(&meta.origin)
            .is_some_and(|it| generation >= it.since_generation);
        if expected {
            let accepted = self
                .shared
                .holds
                .accept(frame, &self.link, &self.shared.journal)
                .await;
            match accepted {
                Ok(verdict) => self.note_verdict(meta.origin, meta.last, meta.prev, verdict),
                Err(error) => {
                    // What it says of the frame is this link's fault; anything else is the journal's end.
                    if !matches!(
                        error,
                        journal::Error::OutOfOrder { .. } | journal::Error::BadFrame { .. }
                    ) {
                        self.shared.fail_journal(chain(&error));
                    }
                    return Err(error.into());
                }
            }
        }
        self.peer.bytes_in.fetch_add(payload, Ordering::Relaxed);
        self.consumed_bytes = self
            .consumed_bytes
            .saturating_add(payload)
            .saturating_add(overhead);
        if self.consumed_bytes.saturating_sub(self.consumed_said) >= CONSUMED_STEP_BYTES {
            self.say_consumed();
            self.flush();
        }
        Ok(())
    }

    fn note_verdict(&mut self, origin: NodeId, last: Position, prev: Position, verdict: Verdict) {
        let Some(expected) = self.expected.get_mut(&origin) else {
            return;
        };
        match verdict {
            Verdict::Accepted(_) | Verdict::Duplicate => {
                expected.gap_at = None;
                self.peer.note_received(origin, last);
                if origin == self.peer.config.id {
                    self.peer.delivered();
                }
            }
            Verdict::Gap => self.note_gap(origin, prev),
            Verdict::PassedOver | Verdict::Paused | Verdict::NotWanted => {
                expected.since_generation = u64::MAX;
                expected.passed_over = true;
            }
        }
    }

    /// Something is missing: ask again from what is held, but not over and over for what the peer does not have.
    fn note_gap(&mut self, origin: NodeId, prev: Position) {
        let held = self.shared.holds.position(origin);
        let Some(expected) = self.expected.get_mut(&origin) else {
            return;
        };
        expected.since_generation = u64::MAX;
        if expected.gap_at.replace(held) != Some(held) {
            expected.reposition = true;
            return self.want();
        }
        expected.retry_at = Some(Instant::now() + UNAVAILABLE_RETRY);
        let text = format!("it has nothing of node {origin} between {held} and {prev}");
        self.note_unserved(origin);
        self.complain(origin, held, text);
    }

    async fn note_unavailable(&mut self, unavailable: &pb::Unavailable, generation: u64) {
        let Some(origin) = wire::node_id(unavailable.node_id) else {
            return;
        };
        let Some(expected) = self.expected.get_mut(&origin) else {
            return;
        };
        if expected.since_generation != u64::MAX && generation < expected.since_generation {
            return;
        }
        expected.since_generation = u64::MAX;
        expected.retry_at = Some(Instant::now() + UNAVAILABLE_RETRY);
        self.shared.holds.release(origin, &self.link).await;
        let held = self.shared.holds.position(origin);
        self.note_unserved(origin);
        self.complain(
            origin,
            held,
            format!("it cannot serve node {origin} from {held}: {}", unavailable.text),
        );
    }

    /// What the peer cannot give of its own stream, others may hold.
    fn note_unserved(&self, origin: NodeId) {
        if origin == self.peer.config.id {
            self.peer.unserved();
        }
    }

    fn complain(&self, origin: NodeId, held: Position, text: String) {
        if self.peer.complain(&text) {
            tracing::warn!(peer = self.peer.config.name, "{text}");
            self.shared.send(LinkEvent::Unavailable {
                peer: self.peer.config.id,
                origin,
                held,
                text,
            });
        }
    }

    /// Looks after what is wanted and what is to be said.
    async fn tick(&mut self) {
        let mut wanted = self
            .shared
            .peers
            .wanted_of(self.peer.config.id, StdInstant::now());
        wanted.retain(|&origin| self.shared.holds.paused(origin).is_none());
        let mut changed = false;
        let gone: Vec<NodeId> = self
            .expected
            .keys()
            .copied()
            .filter(|origin| !wanted.contains(origin))
            .collect();
        for origin in gone {
            self.expected.remove(&origin);
            self.shared.holds.release(origin, &self.link).await;
            changed = true;
        }
        for &origin in &wanted {
            changed |= self.look_after(origin).await;
        }
        if changed {
            let own = self.peer.config.id;
            self.peer.set_relaying(
                wanted
                    .into_iter()
                    .filter(|&origin| origin != own)
                    .collect::<BTreeSet<_>>(),
            );
            self.want();
        }
        if self.consumed_bytes > self.consumed_said {
            self.say_consumed();
        }
        let now = Instant::now();
        if self.ping_at <= now {
            self.ping_at = now + PULSE;
            let ping = self.clock.ping(crate::shared::steady_us(), StdInstant::now());
            self.outgoing().clock_us = ping;
        }
    }

    /// True when the origin must be asked for (again).
    async fn look_after(&mut self, origin: NodeId) -> bool {
        let Some(expected) = self.expected.get_mut(&origin) else {
            self.expected.insert(
                origin,
                Expected {
                    reposition: true,
                    ..Expected::default()
                },
            );
            return true;
        };
        if expected.retry_at.take_if(|at| *at <= Instant::now()).is_some() {
            (expected.gap_at, expected.reposition) = (None, true);
            return true;
        }
        if expected.passed_over && !self.shared.holds.brought_by_other(origin, &self.link).await {
            (expected.passed_over, expected.reposition) = (false, true);
            return true;
        }
        false
    }

    /// Puts the whole list of wanted origins into the next request.
    fn want(&mut self) {
        self.generation = self.generation.saturating_add(1);
        let generation = self.generation;
        let holds = &self.shared.holds;
        let mut want = Vec::new();
        let mut reposition = Vec::new();
        for (&origin, expected) in &mut self.expected {
            if expected.retry_at.is_some() {
                continue;
            }
            want.push(wire::entry_to_wire(origin, holds.position(origin)));
            if std::mem::take(&mut expected.reposition) {
                expected.since_generation = generation;
                reposition.push(u32::from(origin.0));
            }
        }
        let outgoing = self.outgoing();
        (outgoing.has_want, outgoing.want_generation, outgoing.want) = (true, generation, want);
        outgoing.reposition.append(&mut reposition);
    }

    fn say_consumed(&mut self) {
        self.consumed_said = self.consumed_bytes;
        self.outgoing();
    }

    fn report(&mut self) {
        self.report_sent = Instant::now();
        self.report_at = self.report_sent + PULSE;
        let positions = self.shared.positions();
        let outgoing = self.outgoing();
        outgoing.journaled = wire::vector_to_wire(&positions.journaled);
        outgoing.applied = wire::vector_to_wire(&positions.applied);
        outgoing.is_full = positions.is_full;
    }

    fn outgoing(&mut self) -> &mut pb::PullRequest {
        self.outgoing.get_or_insert_default()
    }

    /// Sends what there is to say if the transport takes it; otherwise it is merged with what comes.
    fn flush(&mut self) {
        let Some(mut request) = self.outgoing.take() else {
            return;
        };
        let Ok(permit) = self.requests.try_reserve() else {
            // Full, or closed: then reading the responses says why.
            self.outgoing = Some(request);
            return;
        };
        request.consumed_bytes = self.consumed_bytes;
        self.consumed_said = self.consumed_bytes;
        permit.send(request);
    }
}
