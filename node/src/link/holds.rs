//! What is held of each origin, and the one door through which received frames enter the journal.
//!
//! In:   checked frames from any number of links            Out: appended frames; a [`Verdict`] to the link
//! Holds: per origin the last position, and how far the large transaction in progress has come
//! Invariants: 1. the journal's order of an origin is the order of acceptance: judged and appended under one lock;
//!             2. accepted frames leave no gap; 3. pieces of one large transaction are appended in order, each once,
//!             and pieces of another writing of it only after a new first piece; 4. two links that carry different
//!             writings of a transaction do not throw each other out: while the link that brought the pieces lives,
//!             the other's are passed over.
//! On crash: rebuilt from the journal's vector; pieces of an unfinished transaction are asked for again from the first.
//! Not here: what a link asks for (`receive.rs`), unpacking and applying (they follow the journal).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex as StdMutex, PoisonError, Weak};

use anabranch_proto::{NodeId, Position, Vector};
use tokio::sync::Mutex;

use crate::journal::{self, Frame, FrameKind, FrameMeta, Journal};

/// Stands for one live stream from a peer; dropping it gives up the large transactions it was bringing.
#[derive(Debug, Clone)]
pub(super) struct LinkToken(Arc<()>);

impl LinkToken {
    pub(super) fn new() -> Self {
        Self(Arc::new(()))
    }

    fn is(&self, owner: &Weak<()>) -> bool {
        owner.upgrade().is_some_and(|owner| Arc::ptr_eq(&owner, &self.0))
    }
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is in the journal, at this sequence number.
    Accepted(u64),
    /// Everything in it is held already.
    Duplicate,
    /// Something before it is missing: ask again from the held position.
    Gap,
    /// Another live link is bringing another writing of this transaction: ask again when that one is gone.
    PassedOver,
    /// The origin is paused.
    Paused,
    /// Our own, or of a node that is not a member.
    NotWanted,
}

/// A large transaction in progress.
#[derive(Debug, Clone)]
struct Run {
    id: u64,
    next_part: u32,
    owner: Weak<()>,
}

/// What is held of one origin.
#[derive(Debug, Clone, Default)]
struct Held {
    position: Position,
    run: Option<Run>,
}

/// What to do with a frame.
#[derive(Debug)]
enum Judgement {
    Accept(Held),
    Reject(Verdict),
}

/// The rules. Pure.
fn judge(held: &Held, meta: &FrameMeta, link: &LinkToken) -> Judgement {
    match meta.kind {
        FrameKind::Whole => {
            if meta.last <= held.position {
                Judgement::Reject(Verdict::Duplicate)
            } else if meta.prev <= held.position {
                Judgement::Accept(Held {
                    position: meta.last,
                    run: None,
                })
            } else {
                Judgement::Reject(Verdict::Gap)
            }
        }
        FrameKind::Part | FrameKind::End => judge_piece(held, meta, link),
    }
}

fn judge_piece(held: &Held, meta: &FrameMeta, link: &LinkToken) -> Judgement {
    let done = match meta.kind {
        FrameKind::End => meta.last <= held.position,
        FrameKind::Whole | FrameKind::Part => meta.prev < held.position,
    };
    if done {
        return Judgement::Reject(Verdict::Duplicate);
    }
    if meta.prev != held.position {
        return Judgement::Reject(Verdict::Gap);
    }
    match &held.run {
        Some(run) if run.id == meta.part_run && meta.part < run.next_part => {
            Judgement::Reject(Verdict::Duplicate)
        }
        Some(run) if run.id == meta.part_run && meta.part == run.next_part => accept_piece(meta, link),
        Some(run) if run.id != meta.part_run && run.owner.strong_count() > 0 && !link.is(&run.owner) => {
            Judgement::Reject(Verdict::PassedOver)
        }
        _ if meta.part == 0 => accept_piece(meta, link),
        _ => Judgement::Reject(Verdict::Gap),
    }
}

fn accept_piece(meta: &FrameMeta, link: &LinkToken) -> Judgement {
    if meta.kind == FrameKind::End {
        return Judgement::Accept(Held {
            position: meta.last,
            run: None,
        });
    }
    let Some(next_part) = meta.part.checked_add(1) else {
        return Judgement::Reject(Verdict::Gap);
    };
    let run = Run {
        id: meta.part_run,
        next_part,
        owner: Arc::downgrade(&link.0),
    };
    Judgement::Accept(Held {
        position: meta.last,
        run: Some(run),
    })
}

#[derive(Debug, Default)]
struct Origin {
    held: Mutex<Held>,
    /// A copy of `held.position`, readable while an append is under way.
    position: StdMutex<Position>,
    paused: StdMutex<Option<String>>,
}

/// Everything held of other nodes.
#[derive(Debug)]
pub(super) struct Holds {
    origins: BTreeMap<NodeId, Origin>,
}

impl Holds {
    /// Starts from what the journal or the database holds of each of `members`.
    pub(super) fn new(own: NodeId, members: &[NodeId], held: &Vector) -> Self {
        let origin = |id: NodeId| {
            let position = held.get(id);
            Origin {
                held: Mutex::new(Held { position, run: None }),
                position: StdMutex::new(position),
                paused: StdMutex::default(),
            }
        };
        Self {
            origins: members
                .iter()
                .filter(|&&id| id != own)
                .map(|&id| (id, origin(id)))
                .collect(),
        }
    }

    /// Other nodes, in order.
    pub(super) fn origins(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.origins.keys().copied()
    }

    /// The last position accepted of an origin.
    pub(super) fn position(&self, origin: NodeId) -> Position {
        self.origins
            .get(&origin)
            .map_or(Position::ZERO, |origin| *lock(&origin.position))
    }

    /// Judges a frame and appends it if it fits. Must be driven to its end: between append and update nothing may
    /// be dropped, or the frame would be taken for missing and appended twice.
    pub(super) async fn accept(
        &self,
        frame: Frame,
        link: &LinkToken,
        journal: &Journal,
    ) -> Result<Verdict, journal::Error> {
        let Some(origin) = self.origins.get(&frame.meta.origin) else {
            return Ok(Verdict::NotWanted);
        };
        let mut held = origin.held.lock().await;
        if lock(&origin.paused).is_some() {
            return Ok(Verdict::Paused);
        }
        match judge(&held, &frame.meta, link) {
            Judgement::Reject(verdict) => Ok(verdict),
            Judgement::Accept(next) => {
                let seq = journal.append(frame).await?;
                *held = next;
                *lock(&origin.position) = held.position;
                Ok(Verdict::Accepted(seq))
            }
        }
    }

    /// Is a large transaction of this origin coming in over a live link other than `link`?
    pub(super) async fn brought_by_other(&self, origin: NodeId, link: &LinkToken) -> bool {
        let Some(origin) = self.origins.get(&origin) else {
            return false;
        };
        let held = origin.held.lock().await;
        held.run
            .as_ref()
            .is_some_and(|run| run.owner.strong_count() > 0 && !link.is(&run.owner))
    }

    /// This link will not go on with the large transaction it was bringing.
    pub(super) async fn release(&self, origin: NodeId, link: &LinkToken) {
        let Some(origin) = self.origins.get(&origin) else {
            return;
        };
        let mut held = origin.held.lock().await;
        if let Some(run) = held.run.as_mut().filter(|run| link.is(&run.owner)) {
            run.owner = Weak::new();
        }
    }

    /// Stops accepting an origin, for a reason that people will read. False when it is not another member.
    pub(super) fn pause(&self, origin: NodeId, reason: &str) -> bool {
        let Some(origin) = self.origins.get(&origin) else {
            return false;
        };
        *lock(&origin.paused) = Some(reason.to_owned());
        true
    }

    /// Accepts an origin again. False when it was not paused.
    pub(super) fn resume(&self, origin: NodeId) -> bool {
        self.origins
            .get(&origin)
            .is_some_and(|origin| lock(&origin.paused).take().is_some())
    }

    /// Why an origin is paused.
    pub(super) fn paused(&self, origin: NodeId) -> Option<String> {
        self.origins
            .get(&origin)
            .and_then(|origin| lock(&origin.paused).clone())
    }
}

fn lock<T>(mutex: &StdMutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
