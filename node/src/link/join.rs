//! The donor's side of a join, over the link's port: the same checks and certificates as for a member.
//!
//! In:   a joiner's questions            Out: the donor's answers; frames of the journal
//! Holds: nothing
//! Not here: what is answered (`crate::donor`)

use std::sync::Arc;

use anabranch_proto::link as pb;
use anabranch_proto::{Lsn, NodeId, Vector};
use tokio::sync::mpsc;
use tonic::Status;

use super::handshake::{self, Refusal};
use super::limits::BATCH_BYTES;
use super::shared::Shared;
use super::{chain, wire};
use crate::donor::{Answer, Cut, Joiner};
use crate::journal::{self, FrameKind, FrameMeta};
use crate::shared::lock;

/// Answers a joiner.
pub(super) async fn answer(shared: &Shared, request: pb::JoinRequest) -> Result<pb::JoinResponse, Status> {
    let hello = request.hello.clone().unwrap_or_default();
    let ours = pb::JoinResponse {
        hello: Some(shared.hello()),
        ..pb::JoinResponse::default()
    };
    let refuse = |refusal: Refusal| pb::JoinResponse {
        refusal: refusal.text,
        refusal_code: refusal.code,
        ..ours.clone()
    };
    let id = match handshake::check_joiner(&shared.identity, &hello) {
        Ok(id) => id,
        Err(refusal) => return Ok(refuse(refusal)),
    };
    let Some(seat) = &shared.donor else {
        return Err(Status::unimplemented("this daemon is no donor"));
    };
    let joiner = Joiner {
        id,
        name: hello.node_name.clone(),
        incarnation: hello.incarnation.clone(),
        address: request.address.clone(),
    };
    let step = request.step();
    let answered = match step {
        pb::JoinStep::Cut => seat.ask(&joiner).await,
        pb::JoinStep::Copied => {
            seat.donor.end(&joiner).await;
            Ok(Answer::Waiting(String::new()))
        }
        pb::JoinStep::Abandon => seat.abandon(&joiner).await,
        pb::JoinStep::Hold => {
            let held = Cut {
                snapshot: request.snapshot,
                sees: request.sees,
                epoch: request.epoch,
                lsn: Lsn(request.lsn),
            };
            seat.hold(&joiner, &held).await
        }
    };
    Ok(
        match answered.map_err(|error| Status::unavailable(chain(&error)))? {
            Answer::Refused(code, text) => pb::JoinResponse {
                refusal: text,
                refusal_code: code.to_owned(),
                ..ours
            },
            Answer::Waiting(waiting) => pb::JoinResponse { waiting, ..ours },
            Answer::Cut(cut) => pb::JoinResponse {
                snapshot: cut.snapshot,
                epoch: cut.epoch,
                lsn: cut.lsn.0,
                ..ours
            },
        },
    )
}

/// Streams what the journal holds beyond `holds`, one origin after the other, to its end of this moment, or of ours as far as members
/// are told of it. It ends for a node that copies from here when the log has a line for all that happened before its cut.
pub(super) async fn seed(
    shared: Arc<Shared>,
    (joiner, cut): (NodeId, Lsn),
    holds: Vector,
    out: mpsc::Sender<Result<pb::SeedResponse, Status>>,
) {
    // What dropped nodes wrote last may be unsettled still.
    let identity = &shared.identity;
    let origins = identity
        .sorted_members()
        .into_iter()
        .chain(identity.dropped.iter().copied());
    for origin in origins {
        if let Err(error) = seed_origin(&shared, origin, &holds, &out).await {
            // Nobody waits if the joiner is gone.
            let _ = out.send(Err(Status::unavailable(chain(&error)))).await;
            return;
        }
    }
    if let Some(seat) = &shared.donor {
        tokio::select! {
            () = seat.until_recorded(joiner, cut) => {}
            () = out.closed() => return,
        }
    }
    let settled = shared
        .donor
        .as_ref()
        .map(|seat| lock(&seat.shared.settled).clone());
    let low = shared
        .donor
        .as_ref()
        .map(|seat| lock(&seat.shared.low).to_bytes().to_vec());
    let last = pb::SeedResponse {
        frames: Vec::new(),
        settled: wire::vector_to_wire(&settled.unwrap_or_default()),
        low: low.unwrap_or_default().into(),
    };
    let _ = out.send(Ok(last)).await;
}

/// Does the gate keep this frame? Members get the pieces of a large transaction all the same. Who takes a journal over would get them
/// again with each question, until the end is let go.
fn waits(shared: &Shared, meta: &FrameMeta) -> bool {
    match meta.kind {
        FrameKind::Part if meta.origin == shared.identity.id => *shared.gate.borrow() <= meta.last,
        _ => !shared.lets_go(meta),
    }
}

async fn seed_origin(
    shared: &Shared,
    origin: NodeId,
    holds: &Vector,
    out: &mpsc::Sender<Result<pb::SeedResponse, Status>>,
) -> Result<(), journal::Error> {
    let journal = &shared.journal;
    let after = holds.get(origin).max(journal.stats().oldest.get(origin));
    let mut cursor = match journal.cursor(origin, after) {
        // Nothing is held yet, so it may begin where the journal does.
        Err(journal::Error::Trimmed { oldest, .. })
            if holds.get(origin) == anabranch_proto::Position::ZERO =>
        {
            journal.cursor(origin, oldest)?
        }
        cursor => cursor?,
    };
    let (mut frames, mut bytes) = (Vec::new(), 0);
    loop {
        let located = cursor.try_next()?;
        let located = located.filter(|located| !waits(shared, &located.frame.meta));
        let end = located.is_none();
        if let Some(located) = located {
            bytes += located.frame.payload.len() + 64;
            frames.push(wire::frame_to_wire(located.frame));
        }
        if bytes >= BATCH_BYTES || (end && !frames.is_empty()) {
            let response = pb::SeedResponse {
                frames: std::mem::take(&mut frames),
                settled: Vec::new(),
                low: bytes::Bytes::new(),
            };
            bytes = 0;
            if out.send(Ok(response)).await.is_err() {
                return Ok(());
            }
        }
        if end {
            return Ok(());
        }
    }
}
