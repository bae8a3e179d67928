//! One peer's Pull, from the sending side: reads journal cursors and streams their frames as they are.
//!
//! In:   the peer's requests, journal cursors of the origins it wants        Out: messages of frames and status
//! Holds: one frame per wanted origin, and [`CREDIT_BYTES`] under way
//! Invariants: 1. at most the credit is sent beyond what the peer consumed (one larger frame when nothing is under
//!             way); 2. our own frames beyond the gate wait; 3. origins take turns: while the frame whose turn it is lacks credit,
//!             the others wait, too; 4. something is sent every [`PULSE`]; 5. what the peer says only ever moves its own stream.
//! On crash: the peer asks again from what it holds.
//! Not here: who is welcome (`server.rs`).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anabranch_proto::link as pb;
use anabranch_proto::{NodeId, Position, Vector};
use futures_util::future::select_all;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tonic::{Status, Streaming};

use super::clock::unix_us;
use super::handshake::Refusal;
use super::limits::{
    BATCH_BYTES, BATCH_BYTES_MAX, CREDIT_BYTES, FRAME_OVERHEAD_BYTES, PULSE, REPORT_INTERVAL,
    REPORT_INTERVAL_MIN,
};
use super::peer::{Live, Peer};
use super::shared::{LinkEvent, Shared};
use super::{chain, wire};
use crate::journal::{self, Cursor, Frame, Located};

/// A watched value whose closed channel waits for ever instead of spinning.
struct Watched<T> {
    value: watch::Receiver<T>,
    open: bool,
}

impl<T> Watched<T> {
    fn new(value: watch::Receiver<T>) -> Self {
        Self { value, open: true }
    }

    async fn changed(&mut self) {
        if self.open && self.value.changed().await.is_ok() {
            return;
        }
        self.open = false;
        std::future::pending::<()>().await;
    }
}

/// Changes of our positions, of which a peer is to hear.
pub(super) struct News {
    applied: Watched<Vector>,
    others: Watched<()>,
}

impl News {
    pub(super) fn of(shared: &Shared) -> Self {
        Self {
            applied: Watched::new(shared.applied.clone()),
            others: Watched::new(shared.positions_changed.clone()),
        }
    }

    pub(super) async fn changed(&mut self) {
        tokio::select! {
            () = self.applied.changed() => {}
            () = self.others.changed() => {}
        }
    }
}

/// A wanted origin.
struct Subscription {
    origin: NodeId,
    /// None once it cannot be served.
    cursor: Option<Cursor>,
    /// The next frame to send.
    pending: Option<Frame>,
}

/// How many bytes a frame counts against credit and batch.
fn weight(frame: &Frame) -> u64 {
    u64::try_from(frame.payload.len().saturating_add(FRAME_OVERHEAD_BYTES)).unwrap_or(u64::MAX)
}

/// One welcomed Pull.
pub(super) struct Session {
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    live: Live,
    out: mpsc::Sender<Result<pb::PullResponse, Status>>,
    wanted: Vec<Subscription>,
    turn: usize,
    sent_bytes: u64,
    consumed_bytes: u64,
    want_generation: u64,
    echo_clock_us: i64,
    unavailable: Vec<pb::Unavailable>,
    /// When the next status goes out at the latest, and when the last one did.
    status_at: Instant,
    status_sent: Instant,
}

impl Session {
    pub(super) fn new(
        shared: Arc<Shared>,
        peer: Arc<Peer>,
        live: Live,
        out: mpsc::Sender<Result<pb::PullResponse, Status>>,
    ) -> Self {
        let now = Instant::now();
        Self {
            shared,
            peer,
            live,
            out,
            wanted: Vec::new(),
            turn: 0,
            sent_bytes: 0,
            consumed_bytes: 0,
            want_generation: 0,
            echo_clock_us: 0,
            unavailable: Vec::new(),
            status_at: now,
            status_sent: now,
        }
    }

    /// Serves until either side ends it.
    pub(super) async fn run(mut self, first: pb::PullRequest, inbound: Streaming<pb::PullRequest>) {
        let name = self.peer.config.name.clone();
        tracing::info!(
            peer = name,
            protocol = self.live.protocol,
            "a peer receives from us"
        );
        let welcome = pb::Welcome {
            hello: Some(self.shared.hello()),
            ..pb::Welcome::default()
        };
        let mut response = self.status();
        response.welcome = Some(welcome);
        if self.out.send(Ok(response)).await.is_err() {
            return;
        }
        let end = match self.take(first) {
            Ok(()) => self.exchange(inbound).await,
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = end {
            // The peer connects again and hears the refusal with its code. Nobody waits if it is gone already.
            let _ = self
                .out
                .try_send(Err(Status::failed_precondition(refusal.to_string())));
        }
        tracing::info!(peer = name, "a peer receives from us no more");
    }

    async fn exchange(&mut self, mut inbound: Streaming<pb::PullRequest>) -> Result<(), Refusal> {
        let shared = Arc::clone(&self.shared);
        let mut gate = Watched::new(shared.gate.clone());
        let mut positions = News::of(&shared);
        let mut stop = Box::pin(shared.stopped());
        loop {
            self.fill();
            let sendable = self.sendable();
            let due =
                self.echo_clock_us != 0 || !self.unavailable.is_empty() || self.status_at <= Instant::now();
            let (gated, waiting) = (self.is_gated(), self.is_waiting());
            tokio::select! {
                biased;
                () = &mut stop => return Ok(()),
                request = inbound.message() => match request {
                    Ok(Some(request)) => self.take(request)?,
                    Ok(None) => return Ok(()),
                    Err(status) => {
                        tracing::debug!(peer = self.peer.config.name, error = chain(&status), "a pull broke");
                        return Ok(());
                    }
                },
                room = has_room(&self.out), if sendable || due => {
                    // This task alone sends, so the room that was there is there still.
                    let response = self.compose();
                    if !room || self.out.try_send(Ok(response)).is_err() {
                        return Ok(());
                    }
                }
                () = self.out.closed() => return Ok(()),
                (at, found) = next_frame(&mut self.wanted), if waiting => self.found(at, found),
                () = gate.changed(), if gated => {}
                // Not once a status is due for it: however many more come until then, it says all.
                () = positions.changed(), if self.status_at > self.status_sent + REPORT_INTERVAL => {
                    self.status_at = self.status_at.min(self.status_sent + REPORT_INTERVAL);
                }
                () = tokio::time::sleep_until(self.status_at), if !due => {}
            }
        }
    }

    /// Takes over a request.
    fn take(&mut self, request: pb::PullRequest) -> Result<(), Refusal> {
        self.consumed_bytes = self
            .consumed_bytes
            .max(request.consumed_bytes)
            .min(self.sent_bytes);
        if request.clock_us != 0 {
            self.echo_clock_us = request.clock_us;
        }
        if request.has_want {
            self.want(&request);
        }
        if request.journaled.is_empty() && request.applied.is_empty() {
            return Ok(());
        }
        let (journaled, applied) = (
            wire::vector_from_wire(&request.journaled),
            wire::vector_from_wire(&request.applied),
        );
        self.shared
            .take_report(&self.peer, &journaled, &applied, request.is_full)
    }

    /// Replaces what is wanted.
    fn want(&mut self, request: &pb::PullRequest) {
        self.want_generation = request.want_generation;
        let mut before = std::mem::take(&mut self.wanted);
        for entry in &request.want {
            let Some((origin, after)) = wire::entry_from_wire(entry) else {
                continue;
            };
            // A node that joined during a drop may lack the end of the dropped one's stream.
            let identity = &self.shared.identity;
            let known = identity.members.contains(&origin) || identity.dropped.contains(&origin);
            if !known || self.wanted.iter().any(|other| other.origin == origin) {
                continue;
            }
            let kept = before
                .iter()
                .position(|other| other.origin == origin && other.cursor.is_some());
            match kept {
                Some(at) if !request.reposition.contains(&entry.node_id) => {
                    self.wanted.push(before.swap_remove(at))
                }
                _ => {
                    let subscription = self.subscribe(origin, after);
                    self.wanted.push(subscription);
                }
            }
        }
    }

    fn subscribe(&mut self, origin: NodeId, after: Position) -> Subscription {
        let cursor = match self.shared.journal.cursor(origin, after) {
            Ok(cursor) => Some(cursor),
            Err(error) => {
                self.give_up(origin, &error);
                None
            }
        };
        Subscription {
            origin,
            cursor,
            pending: None,
        }
    }

    /// The origin cannot be served: the peer is told, and nothing more of it is sent.
    fn give_up(&mut self, origin: NodeId, error: &journal::Error) {
        let code = if is_trimmed(error) {
            "trimmed"
        } else {
            "unreadable"
        };
        let text = chain(error);
        tracing::warn!(peer = self.peer.config.name, %origin, code, "cannot serve an origin to a peer: {text}");
        // A journal that is being closed is no damage.
        if matches!(error, journal::Error::Corrupt { .. } | journal::Error::Io { .. }) {
            self.shared.send(LinkEvent::Unreadable {
                origin,
                text: text.clone(),
            });
        }
        self.unavailable.push(pb::Unavailable {
            node_id: u32::from(origin.0),
            code: code.to_owned(),
            text,
        });
    }

    /// Takes what the journal has at hand, one frame per origin.
    fn fill(&mut self) {
        for at in 0..self.wanted.len() {
            self.fill_one(at);
        }
    }

    fn fill_one(&mut self, at: usize) {
        let Some(subscription) = self.wanted.get_mut(at) else {
            return;
        };
        let Some(cursor) = subscription
            .cursor
            .as_mut()
            .filter(|_| subscription.pending.is_none())
        else {
            return;
        };
        match cursor.try_next() {
            Ok(None) => {}
            Ok(Some(located)) => self.found(at, Ok(located)),
            Err(error) => self.found(at, Err(error)),
        }
    }

    fn found(&mut self, at: usize, found: Result<Located, journal::Error>) {
        let Some(subscription) = self.wanted.get_mut(at) else {
            return;
        };
        match found {
            Ok(located) => subscription.pending = Some(located.frame),
            Err(error) => {
                subscription.cursor = None;
                let origin = subscription.origin;
                self.give_up(origin, &error);
            }
        }
    }

    fn has_credit(&self, frame: &Frame) -> bool {
        let under_way = self.sent_bytes.saturating_sub(self.consumed_bytes);
        under_way == 0 || under_way.saturating_add(weight(frame)) <= CREDIT_BYTES
    }

    /// The next frame of an origin, unless it waits for the gate.
    fn passing(&self, at: usize) -> Option<&Frame> {
        let frame = self.wanted.get(at)?.pending.as_ref()?;
        self.shared.lets_go(&frame.meta).then_some(frame)
    }

    /// Whose turn it is: of those that have a frame. It stays so until that has gone: a large frame would wait for ever for credit that the
    /// small ones of the others take as soon as there is a little.
    fn in_turn(&self) -> Option<usize> {
        let count = self.wanted.len();
        let mut all = (0..count).map(|step| self.turn.wrapping_add(step) % count);
        all.find(|&at| self.passing(at).is_some())
    }

    fn sendable(&self) -> bool {
        let frame = self.in_turn().and_then(|at| self.passing(at));
        frame.is_some_and(|frame| self.has_credit(frame))
    }

    fn is_gated(&self) -> bool {
        let mut pending = self
            .wanted
            .iter()
            .filter_map(|subscription| subscription.pending.as_ref());
        pending.any(|frame| !self.shared.lets_go(&frame.meta))
    }

    fn is_waiting(&self) -> bool {
        self.wanted
            .iter()
            .any(|subscription| subscription.cursor.is_some() && subscription.pending.is_none())
    }

    fn status(&mut self) -> pb::PullResponse {
        let positions = self.shared.positions();
        self.status_sent = Instant::now();
        self.status_at = self.status_sent + PULSE;
        let reports = if positions.commits_wait {
            REPORT_INTERVAL_MIN
        } else {
            REPORT_INTERVAL
        };
        pb::PullResponse {
            clock_us: unix_us(),
            report_interval_ms: u32::try_from(reports.as_millis()).unwrap_or(u32::MAX),
            journaled: wire::vector_to_wire(&positions.journaled),
            applied: wire::vector_to_wire(&positions.applied),
            is_full: positions.is_full,
            ..pb::PullResponse::default()
        }
    }

    /// The next message: status if it is due, and as many frames as fit, origins taking turns.
    fn compose(&mut self) -> pb::PullResponse {
        let mut response = if self.status_at <= Instant::now() {
            self.status()
        } else {
            pb::PullResponse::default()
        };
        response.clock_us = unix_us();
        response.echo_clock_us = std::mem::take(&mut self.echo_clock_us);
        response.want_generation = self.want_generation;
        response.unavailable = std::mem::take(&mut self.unavailable);
        let mut batch_bytes = 0;
        while batch_bytes < BATCH_BYTES
            && let Some(at) = self.in_turn()
            && let Some(frame) = self.take_frame(at, batch_bytes)
        {
            batch_bytes = batch_bytes.saturating_add(usize::try_from(weight(&frame)).unwrap_or(usize::MAX));
            response.frames.push(wire::frame_to_wire(frame));
            self.fill_one(at);
        }
        response
    }

    fn take_frame(&mut self, at: usize, batch_bytes: usize) -> Option<Frame> {
        let frame = self.passing(at)?;
        let bytes = weight(frame);
        let too_much = batch_bytes > 0
            && usize::try_from(bytes)
                .unwrap_or(usize::MAX)
                .saturating_add(batch_bytes)
                > BATCH_BYTES_MAX;
        if too_much || !self.has_credit(frame) {
            return None;
        }
        self.sent_bytes = self.sent_bytes.saturating_add(bytes);
        self.turn = at.wrapping_add(1);
        let frame = self.wanted.get_mut(at)?.pending.take()?;
        let payload = u64::try_from(frame.payload.len()).unwrap_or(u64::MAX);
        self.peer.bytes_out.fetch_add(payload, Ordering::Relaxed);
        Some(frame)
    }
}

/// Waits for room in the channel; false when nobody reads it any more.
async fn has_room<T>(out: &mpsc::Sender<T>) -> bool {
    out.reserve().await.is_ok()
}

fn is_trimmed(error: &journal::Error) -> bool {
    matches!(error, journal::Error::Trimmed { .. })
}

/// The next frame of any origin that has none pending, and which one.
async fn next_frame(wanted: &mut [Subscription]) -> (usize, Result<Located, journal::Error>) {
    let waiting: Vec<_> = wanted
        .iter_mut()
        .enumerate()
        .filter(|(_, subscription)| subscription.pending.is_none())
        .filter_map(|(at, subscription)| {
            let cursor = subscription.cursor.as_mut()?;
            Some(Box::pin(async move { (at, cursor.next().await) }))
        })
        .collect();
    if waiting.is_empty() {
        return std::future::pending().await;
    }
    select_all(waiting).await.0
}
