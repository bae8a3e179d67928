//! The journal is lost, damaged or an older copy, while the server and its slot are there: it is made anew of what the other
//! members' journals hold.
//!
//! In:   the journal as it is, the slot, `anabranch.progress`, every other member's journal      Out: a whole journal, the old one
//!       beside it; no slot, where the slot has passed own transactions that no member holds
//! Holds: the seat while it writes
//! Invariants: 1. nothing is put in the journal's place before it is known to hold all that is needed; 2. what was there is moved
//!        aside, never deleted; 3. a daemon that is started in between refuses: the slot is past what the journal holds
//! On crash: run again, it begins anew
//! Not here: what the slot has passed and nobody holds: that is a lost slot (the parent module)
//!
//! Why this is enough is in `docs/design.md`, section 9.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{NodeId, Position, Stamp, Vector};
use tokio::time::Instant;

use super::{Error, Event, Horizons, Options, Phase, Report, State, Watch, io, refused};
use crate::apply::{Seat, progress};
use crate::config::Config;
use crate::journal::{self, Journal, RealDisk};
use crate::link::{Identity, JoinError, Joining, SeedWaits};
use crate::membership::Membership;
use crate::shared::now_us;
use crate::source::{self, Timelines, slot};
use crate::{capture, daemon, pg, policy_change};

/// Where the new journal is made, beside the old one.
const NEW: &str = "journal.new";
/// How a member says that it goes by another policy.
const OTHER_POLICY: &str = "policy_hash";
/// Between two tries to reach a member.
const TRY_EVERY: Duration = Duration::from_secs(1);

/// What is wrong with the journal, and what it must hold.
pub(super) struct Lost {
    why: String,
    /// Of each origin, this node included: up to here.
    needs: Vector,
    confirmed: anabranch_proto::Lsn,
    slot_start: anabranch_proto::Lsn,
    timelines: Timelines,
    incarnation: String,
}

/// Looks at the whole journal. None: it is as it must be, or the slot is lost as well.
pub(super) async fn look(config: &Config, watch: &Watch) -> Result<Option<Lost>, Error> {
    let node = config.node.id;
    let (sql, _driver) = pg::connect(&config.postgres, "heal").await?;
    let node_row = daemon::check_identity(config, &sql).await?;
    let found = slot::find(&sql, &config.postgres.slot).await?;
    let Some(slot) = found.filter(|slot| slot.wal_status != "lost") else {
        return Ok(None);
    };
    watch(Event::Step {
        what: "reading the journal".to_owned(),
    });
    let (identity, timelines) = source::identify(&pg::dsn(&config.postgres)?, "heal").await?;
    daemon::check_server(config, &node_row, &identity)?;
    let confirmed = slot.confirmed_flush;
    let own = match capture::read_checkpoint(&config.node.data_dir, confirmed, &timelines) {
        Some((_, fold)) => fold.vector().get(node),
        // Never past the end of an own frame, but for such a checkpoint.
        None if confirmed > node_row.slot_start => timelines.position(confirmed),
        None => Position::ZERO,
    };
    let (mut needs, _) = progress::read(&sql, node).await?;
    needs.raise(node, own);
    let options = daemon::journal_options(config);
    let wanted = needs.clone();
    let read = tokio::task::spawn_blocking(move || why_lost(options, &wanted)).await;
    let why = read.map_err(|_| Error::Unreadable("it ended unexpectedly".to_owned()))??;
    Ok(why.map(|why| Lost {
        why,
        needs,
        confirmed,
        slot_start: node_row.slot_start,
        timelines,
        incarnation: node_row.incarnation.clone(),
    }))
}

/// What is wrong with the journal; every payload is read. Another node's, or one of another format, is an error.
fn why_lost(options: journal::Options, needs: &Vector) -> Result<Option<String>, journal::Error> {
    let damaged = |error| match error {
        journal::Error::Corrupt { file, offset, what } => Ok(Some(format!(
            "journal file {} is damaged at byte {offset} ({what})",
            file.display()
        ))),
        error => Err(error),
    };
    let (journal, recovered) = match Journal::open(options, Arc::new(RealDisk)) {
        Ok(opened) => opened,
        Err(error) => return damaged(error),
    };
    if let Some(lacks) = lacking(needs, &recovered.last) {
        return Ok(Some(format!(
            "the journal in node.data_dir is lost, or an older copy: {lacks}"
        )));
    }
    for (origin, _) in recovered.last.iter() {
        if let Err(error) = read_all(&journal, origin) {
            return damaged(error);
        }
    }
    Ok(None)
}

fn read_all(journal: &Journal, origin: NodeId) -> Result<(), journal::Error> {
    let oldest = journal.stats().oldest.get(origin);
    let mut cursor = match journal.cursor(origin, oldest) {
        Err(journal::Error::Trimmed { oldest, .. }) => journal.cursor(origin, oldest)?,
        cursor => cursor?,
    };
    while cursor.try_next()?.is_some() {}
    Ok(())
}

/// What is not held of what is needed, for people.
fn lacking(needs: &Vector, held: &Vector) -> Option<String> {
    let lacks: Vec<String> = needs
        .iter()
        .filter(|(origin, position)| held.get(*origin) < *position)
        .map(|(origin, position)| {
            let held = held.get(origin);
            format!("transactions of node {origin} are needed up to {position}, and are there up to {held}")
        })
        .collect();
    (!lacks.is_empty()).then(|| lacks.join("; "))
}

/// Another member, and what its journal holds.
struct Donor {
    name: String,
    link: Joining,
    holds: Vector,
}

/// What is done about it.
pub(super) enum Outcome {
    /// It is whole, or would be made so: nothing else is to do.
    Whole(Report),
    /// The slot has passed what nobody holds, and is gone now: what was committed since is found in the tables.
    SlotToo(String),
}

/// Makes the journal anew.
pub(super) async fn run(
    config: &Config,
    options: &Options,
    lost: Lost,
    watch: &Watch,
) -> Result<Outcome, Error> {
    let dir = &config.node.data_dir;
    let node = config.node.id;
    let file = config.policy_file()?;
    // Nobody else runs this node meanwhile.
    let _seat = Seat::take(config).await?;
    let (sql, _driver) = pg::connect(&config.postgres, "heal").await?;
    let members = daemon::read_members(config, &sql).await?;
    let file = file.policies(&config.names(&policy_change::Body::names(&members)))?;
    let in_force = policy_change::force::find(config, &file, &sql, &members)
        .await
        .map_err(|error| Error::Refused(error.to_string()))?;
    let state = State::read(dir).map_err(io("read heal.json in node.data_dir"))?;
    refuse_where_more_was_said(config, &members, state.as_ref(), &lost.why)?;
    let others = members.peers(node, &config.peers);
    if others.is_empty() {
        return refused(alone(&lost.why));
    }
    watch(Event::Step {
        what: format!("{}: asking the other members what they hold", lost.why),
    });
    let identity = |hash| Identity::of(config, &lost.incarnation, hash).knowing(&members);
    let mut identities = VecDeque::from([identity(in_force.policies.hash())]);
    let horizons = Horizons::read(dir).map_err(io("read horizon.json"))?;
    // The folder is a new one, and does not tell whether the members put the file of before back since: they do.
    if in_force.is_file_stale && in_force.change.is_none() && horizons.is_empty() {
        identities.push_back(identity(file.hash()));
    }
    let mut donors = Vec::new();
    let until = Instant::now() + Duration::from_secs(options.wait_s.into());
    for peer in others {
        donors.push(reach(config, &peer, &mut identities, until, watch).await?);
        // All others are to go by the same.
        identities.truncate(1);
    }
    let goes_by_file = in_force.is_file_stale
        && identities
            .front()
            .is_some_and(|identity| identity.policy_hash == file.hash());
    let mut held = Vector::new();
    for donor in &donors {
        held.join(&donor.holds);
    }
    let end = end_of_own(config, &lost, &held)?;
    let names: Vec<&str> = donors.iter().map(|donor| donor.name.as_str()).collect();
    let names = names.join(", ");
    let short = end.as_ref().map(|(end, _)| {
        format!(
            "of this node's own transactions, which the slot has passed up to {}, nobody holds those behind {end}: they are in the \
             tables here alone",
            lost.needs.get(node)
        )
    });
    let mut report = Report {
        dry_run: options.dry_run,
        journaled: held.get(node).to_string(),
        journal_made_anew: true,
        ..Report::default()
    };
    if options.dry_run {
        let then = short.map_or_else(
            || "hold all that is needed".to_owned(),
            |short| format!("hold the rest; {short}, and would be written again, as after a lost slot"),
        );
        report.notes.push(format!(
            "{}. {names} {then}: the journal would be made anew of theirs, and this one moved aside",
            lost.why
        ));
        return Ok(Outcome::Whole(report));
    }
    watch(Event::Step {
        what: format!("making the journal anew of what {names} hold"),
    });
    // Who holds most of this node's own stream comes first: the others only add to it.
    donors.sort_by_key(|donor| std::cmp::Reverse(donor.holds.get(node)));
    let own_end = end.as_ref().map(|(end, _)| *end);
    let (settled, low) = fetch(config, &lost, own_end, (donors.as_mut_slice(), watch)).await?;
    daemon::keep_settled(dir, &settled, low).map_err(io("write down what is settled"))?;
    // The others have welcomed this one.
    if goes_by_file {
        in_force
            .go_by_file(dir, &file)
            .map_err(io("write down the policy"))?;
    } else if !dir.join("policy.txt").exists() {
        daemon::keep_policy(dir, &in_force.policies).map_err(|error| Error::Refused(error.to_string()))?;
    }
    if let Some((_, horizons)) = &end {
        horizons.rewrite(dir).map_err(io("write horizon.json"))?;
        // It tells of what is not in the journal any more.
        capture::forget_checkpoint(dir).map_err(io("remove checkpoint.json"))?;
    }
    let aside = put_in_place(dir).map_err(io("put the new journal in its place"))?;
    let text = format!(
        "{}. The journal was made anew of what {names} hold; the old one is {aside}",
        lost.why
    );
    if let Some(short) = short {
        slot::drop_if_exists(&sql, &config.postgres.slot).await?;
        return Ok(Outcome::SlotToo(format!("{text}; {short}")));
    }
    report.healed = true;
    report
        .notes
        .push(format!("{text}. It is all that is needed: start the daemon"));
    Ok(Outcome::Whole(report))
}

/// What a node can do whose journal is nowhere else. Nobody needs what was in it: who joins copies the tables.
fn alone(why: &str) -> String {
    format!(
        "{why}. This cluster has no other node: what the journal held is nowhere else, and nobody needs it, since all rows are in this \
         database. Begin a cluster anew with it: `anabranch conflicts export` if the conflict log is to be kept, `anabranch remove`, then as at \
         first `anabranch grants` and `anabranch cluster create` (docs/errors/the-journal-was-lost.md)"
    )
}

/// Of some things the others have this node's word.
fn refuse_where_more_was_said(
    config: &Config,
    members: &Membership,
    state: Option<&State>,
    why: &str,
) -> Result<(), Error> {
    if !members.ready().contains(&config.node.id) {
        return refused(format!(
            "{why}. This node is joining still: `anabranch join --abandon`, and begin anew"
        ));
    }
    if let Some(node) = members.dropping().into_iter().next() {
        return refused(format!(
            "{why}. And `{}` is being dropped: how far this node held its transactions cannot be said again without the journal. \
             Drop this node as well (docs/errors/when-a-node-is-lost.md)",
            members.name(node)
        ));
    }
    if state.is_some_and(|state| state.phase == Phase::Begun) {
        return refused(format!(
            "{why}. And a heal was begun here that needs it: this node is lost (docs/errors/when-a-node-is-lost.md)"
        ));
    }
    Ok(())
}

/// Waits for a member, and asks what it holds. Of `identities` the first is said, and the next where that is of another policy.
async fn reach(
    config: &Config,
    peer: &crate::config::Peer,
    identities: &mut VecDeque<Identity>,
    until: Instant,
    watch: &Watch,
) -> Result<Donor, Error> {
    let mut said = String::new();
    loop {
        let Some(identity) = identities.front() else {
            return refused("no policy is known");
        };
        let asked = async {
            let mut link = Joining::connect(config, peer, identity).await?;
            let holds = link.holds().await?;
            Ok::<_, JoinError>(Donor {
                name: peer.name.clone(),
                link,
                holds,
            })
        };
        let answer = asked.await;
        match answer {
            Ok(donor) => return Ok(donor),
            Err(JoinError::Refused(refusal)) if refusal.code == OTHER_POLICY && identities.len() > 1 => {
                identities.pop_front();
                continue;
            }
            Err(JoinError::Refused(refusal)) => return refused(refusal.to_string()),
            Err(error) if Instant::now() > until => {
                return refused(format!(
                    "{error}. Every other member is needed: what only one of them holds may be what was lost here. Start it, and \
                     run this again"
                ));
            }
            Err(error) => {
                let on = format!("`{}`: {error}", peer.name);
                if on != said {
                    watch(Event::Waiting { on: on.clone() });
                    said = on;
                }
            }
        }
        tokio::time::sleep(TRY_EVERY).await;
    }
}

/// Where the own stream ends, and what is known of the transactions up to there, if that is before what the slot has passed;
/// nothing, if all is held.
fn end_of_own(config: &Config, lost: &Lost, held: &Vector) -> Result<Option<(Position, Horizons)>, Error> {
    let node = config.node.id;
    let is_lost = |lacks: &str| {
        refused(format!(
            "{}. All members together do not hold what it held: {lacks}. If there is a copy of the folder as it was when the daemon \
             last ran, put it back; else this node is lost: keep a dump of its database, then `anabranch node drop {}` at another \
             member (docs/errors/when-a-node-is-lost.md)",
            lost.why, config.node.name
        ))
    };
    let (end, wanted) = (held.get(node), lost.needs.get(node));
    let mut others = held.clone();
    others.raise(node, wanted);
    if let Some(lacks) = lacking(&lost.needs, &others) {
        return is_lost(&lacks);
    }
    if end >= wanted {
        return Ok(None);
    }
    let mut horizons = Horizons::read(&config.node.data_dir).map_err(io("read horizon.json"))?;
    horizons.cut(&lost.timelines, end);
    if horizons.is_empty() {
        return is_lost(&format!(
            "transactions of this node are needed up to {wanted}, and are there up to {end}; and no horizon.json in node.data_dir \
             tells which rows they wrote"
        ));
    }
    Ok(Some((end, horizons)))
}

/// Fills the new journal, and looks whether a daemon can begin with it. `end`: where the own stream ends, if the slot is to go.
async fn fetch(
    config: &Config,
    lost: &Lost,
    end: Option<Position>,
    (donors, watch): (&mut [Donor], &Watch),
) -> Result<(Vector, Stamp), Error> {
    let node = config.node.id;
    let mut options = daemon::journal_options(config);
    options.dir = config.node.data_dir.join(NEW);
    match std::fs::remove_dir_all(&options.dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(io("remove what an earlier heal had fetched")(error));
        }
        _ => {}
    }
    let opened = tokio::task::spawn_blocking(move || Journal::open(options, Arc::new(RealDisk))).await;
    let (journal, _) =
        opened.map_err(|_| Error::Unreadable("opening it ended unexpectedly".to_owned()))??;
    let mut settled = None;
    for donor in donors {
        let name = donor.name.clone();
        let say = |waits: SeedWaits| {
            let on = match waits {
                SeedWaits::Room(on) => on,
                SeedWaits::Donor => format!("`{name}`, which has sent nothing of its journal for a while"),
            };
            watch(Event::Waiting { on });
        };
        let (_, of_donor) = donor
            .link
            .seed(&journal, anabranch_proto::Lsn(0), &say)
            .await
            .map_err(|error| Error::Refused(format!("{error}: run this again")))?;
        // Of the first: what it had let go is what is not there. The others add what comes later.
        settled.get_or_insert(of_donor);
    }
    let Some(settled) = settled else {
        return refused("this cluster has no other node: the journal is nowhere else");
    };
    let fetched = journal.appended_vector();
    let mut held = fetched.clone();
    // Nothing is needed of an origin all of which is settled.
    held.join(&settled.0);
    let own = fetched.get(node);
    held.raise(node, own);
    let mut needs = lost.needs.clone();
    if let Some(end) = end {
        needs = needs
            .iter()
            .map(|(origin, position)| (origin, if origin == node { end } else { position }))
            .collect();
    }
    if own < needs.get(node) {
        return refused(format!(
            "the members do not send what they hold of node {node}: run this again"
        ));
    }
    if let Some(lacks) = lacking(&needs, &held) {
        return refused(format!(
            "the members do not send what they hold: {lacks}: run this again"
        ));
    }
    if end.is_none() {
        refuse_where_it_begins_late(config, lost, &journal)?;
    }
    if let Some((origin, position)) = settled
        .0
        .iter()
        .find(|(origin, position)| *origin != node && lost.needs.get(*origin) < *position)
    {
        return refused(format!(
            "the members take transactions of node {origin} up to {position} for applied here, and the database shows {}: it was \
             restored from an older copy (docs/errors/the-server-went-back.md)",
            lost.needs.get(origin)
        ));
    }
    journal.close().await?;
    Ok(settled)
}

/// All that is decoded again must be there, and the place to begin from. The members keep what this node has not told them, in
/// its own stream, to be applied; what it has told them, and has still to decode again, they may have let go.
fn refuse_where_it_begins_late(config: &Config, lost: &Lost, journal: &Journal) -> Result<(), Error> {
    let node = config.node.id;
    let kept = capture::read_checkpoint(&config.node.data_dir, lost.confirmed, &lost.timelines);
    let kept_at = kept.as_ref().map(|(at, _)| *at);
    let own = journal.appended_vector().get(node);
    let slot = (lost.confirmed, lost.slot_start);
    let begun = capture::begin_checkpoint(kept, journal, node, own, slot, &lost.timelines)
        .map_err(|error| Error::Unreadable(error.to_string()))?;
    let (is_kept, fold) = (kept_at == Some(begun.start), begun.fold);
    for (origin, _) in journal.appended_vector().iter() {
        let Some(begins) = beginning(journal, origin)? else {
            continue;
        };
        let needed = fold.vector().get(origin);
        // The own frame that ends there is the checkpoint, where no file is.
        let is_late = if origin == node && !is_kept {
            begins >= lost.needs.get(node) && begins != Position::ZERO
        } else {
            begins > needed
        };
        if is_late {
            return refused(format!(
                "{}. The members have let go of transactions of node {origin} that this node has still to decode with: theirs begin \
                 at {begins}. This node is lost (docs/errors/when-a-node-is-lost.md)",
                lost.why
            ));
        }
    }
    Ok(())
}

/// Where what a journal holds of an origin begins; none if it holds nothing. Members have let go of what came before, as a rule.
fn beginning(journal: &Journal, origin: NodeId) -> Result<Option<Position>, journal::Error> {
    let mut cursor = match journal.cursor(origin, Position::ZERO) {
        Err(journal::Error::Trimmed { oldest, .. }) => journal.cursor(origin, oldest)?,
        cursor => cursor?,
    };
    Ok(cursor.try_skim()?.map(|(meta, _)| meta.prev))
}

/// The old one goes aside, the new one takes its place. Says where the old one is.
fn put_in_place(dir: &Path) -> std::io::Result<String> {
    let (now, new) = (dir.join("journal"), dir.join(NEW));
    let aside = dir.join(format!("journal.lost-{}", now_us()));
    match std::fs::rename(&now, &aside) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::rename(new, now)?;
    std::fs::File::open(dir)?.sync_all()?;
    Ok(aside.display().to_string())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::journal::{Codec, Frame, FrameKind, FrameMeta};

    #[tokio::test]
    async fn it_is_told_where_a_journal_begins_of_which_members_have_let_go_the_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let options = journal::Options {
            dir: dir.path().to_owned(),
            segment_bytes: 64 << 10,
            max_bytes: 1 << 30,
            sync_within: Duration::from_micros(200),
            node: NodeId(1),
            cluster: "test".to_owned(),
        };
        let (journal, _) = Journal::open(options, Arc::new(RealDisk)).unwrap();
        for (origin, prev, last) in [(2, 0x500, 0x600), (3, 0, 0x100), (2, 0x600, 0x700)] {
            let meta = FrameMeta {
                origin: NodeId(origin),
                prev: Position::new(u32::from(prev > 0), prev),
                last: Position::new(1, last),
                kind: FrameKind::Whole,
                txn_count: 1,
                part: 0,
                part_run: 0,
                codec: Codec::Plain,
                raw_len: 1,
            };
            let payload = Bytes::from_static(b"x");
            let seq = journal.append(Frame { meta, payload }).await.unwrap();
            journal.wait_durable(seq).await.unwrap();
        }
        let begins = |origin| beginning(&journal, NodeId(origin)).unwrap();
        assert_eq!(begins(2), Some(Position::new(1, 0x500)));
        assert_eq!(begins(3), Some(Position::ZERO));
        assert_eq!(begins(4), None);
    }
}
