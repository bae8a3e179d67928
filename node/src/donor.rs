//! The donor's part in a join: it says that the joiner is a member, cuts its own WAL, and keeps the snapshot open.
//!
//! In:   what a joiner asks, again and again        Out: a fact in the stream; a snapshot and the place where it is cut
//! Holds: one connection for each node that copies from here, with its snapshot
//! Invariants: 1. the WAL is cut only when the stages of this node run with the joiner as a member: by then the fact
//!        lies below the cut in this node's stream, and nothing is forgotten here that the copy may need; 2. asking again
//!        changes nothing; 3. a cut is there as long as its joiner is a member that is not ready, whatever becomes of it: WAL is
//!        kept and nothing is vacuumed for it; 4. nobody but the attempt that it was made for ends it sooner; 5. a cut that another
//!        process of this node has made is held again only while this node's stream is the one that it is a place of
//! On crash: the snapshot is gone, unless the joiner lives, which holds it, too, and hands it back to the next process; the fact stays. All
//!        else that a joiner is told of a cut follows from its place, the journal and the membership
//! Not here: the joiner's part (`crate::join`), the journal that it gets (`crate::link`)

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anabranch_proto::{Lsn, NodeId, Position};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use crate::config::{Config, has_port, is_name};
use crate::heal;
use crate::membership::{self, Fact, FactKind, Membership};
use crate::pg::snapshot;
use crate::shared::{Shared, lock};
use crate::source::{self, Walsender};
use crate::{pg, policy_change, setup};

/// A node that wants to join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joiner {
    /// Its id, never used before.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Its incarnation: tells one attempt from another.
    pub incarnation: String,
    /// Where its daemon will be reached.
    pub address: String,
}

impl Joiner {
    fn attempt(&self, state: Copying) -> Attempt {
        Attempt {
            incarnation: self.incarnation.clone(),
            state,
        }
    }
}

/// A place in this node's WAL, and the snapshot of everything before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Name of the exported snapshot: good while whoever exported it keeps it.
    pub snapshot: String,
    /// A digest of what the snapshot sees, by which it is told from another of the same name; empty where nobody has looked.
    pub sees: String,
    /// The server's timeline.
    pub epoch: u32,
    /// Where it is cut.
    pub lsn: Lsn,
}

impl Cut {
    /// Is it the same place? Then it is the same copy, whoever keeps the snapshot and whatever that is called.
    #[must_use]
    pub fn is_same_place(&self, other: &Self) -> bool {
        (self.epoch, self.lsn) == (other.epoch, other.lsn)
    }
}

/// Refusal: no session has the snapshot that shall be held.
pub const SNAPSHOT_GONE: &str = "snapshot_gone";
/// Refusal: the donor's stream is not the one any more that was cut; what is copied is worth nothing.
pub const CUT_VOID: &str = "cut_void";

/// Refusal: the id is another's, or was this one's until it was dropped. For good.
pub const ID_TAKEN: &str = "id_taken";

/// Refusal: another member has the name.
pub const NAME_TAKEN: &str = "name_taken";

/// Refusal: this member knows nothing of a join that shall be given up. Another may.
pub const UNKNOWN_JOIN: &str = "unknown_join";

/// What a joiner is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It cannot be: a stable code, and why and what to do.
    Refused(&'static str, String),
    /// Ask again; what is waited for.
    Waiting(String),
    /// Copy this.
    Cut(Cut),
}

/// The donor cannot do its part.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A statement failed.
    #[error("the donor's database: {}", crate::error::sql(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// No replication connection, or no slot.
    #[error("the donor cannot cut its WAL: {0}")]
    Source(#[from] source::Error),
    /// The connection string.
    #[error(transparent)]
    Connect(#[from] pg::Error),
    /// Looking at sessions failed.
    #[error(transparent)]
    Setup(#[from] setup::Error),
    /// Whether the node was healed since a cut is not known.
    #[error("heal.json in node.data_dir cannot be read: {0}")]
    Heal(std::io::Error),
}

enum Copying {
    Cutting(JoinHandle<Result<(Walsender, Cut), Error>>),
    Open { holder: Holder, cut: Cut },
}

/// The connection that keeps a snapshot.
enum Holder {
    /// It has cut the WAL, and is not used any more.
    Walsender { _connection: Walsender },
    /// It has taken over from the joiner what an earlier process of this node, or a connection that was lost, has cut.
    Session(Arc<Client>),
}

/// A cut, and whose it is.
struct Attempt {
    incarnation: String,
    state: Copying,
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Copying::Cutting(task) = &self.state {
            task.abort();
        }
    }
}

/// The cuts of this process; they outlive a new beginning of the stages.
#[derive(Default)]
pub struct Donor(Mutex<BTreeMap<NodeId, Attempt>>);

/// Between two looks whether the slot has passed a cut.
const LOOK_EVERY: Duration = Duration::from_millis(50);

impl Donor {
    /// Where it is cut for a joiner.
    async fn cut_of(&self, joiner: NodeId) -> Option<Cut> {
        match self.0.lock().await.get(&joiner)?.state {
            Copying::Open { ref cut, .. } => Some(cut.clone()),
            Copying::Cutting(_) => None,
        }
    }

    /// Lets the snapshot of this attempt go, if there is one.
    pub async fn end(&self, joiner: &Joiner) {
        let mut copying = self.0.lock().await;
        if copying
            .get(&joiner.id)
            .is_some_and(|attempt| attempt.incarnation == joiner.incarnation)
        {
            copying.remove(&joiner.id);
        }
    }

    /// Lets go what no joiner needs any more: of those that are no members, which were dropped in the middle, and of those that are ready,
    /// which could not say that they have copied. Where somebody asks at this moment, it is left to the next time.
    pub fn end_useless(&self, members: &Membership) {
        let Ok(mut copying) = self.0.try_lock() else {
            return;
        };
        if copying.is_empty() {
            return;
        }
        let (live, ready) = (members.live(), members.ready());
        copying.retain(|joiner, _| {
            let is_needed = live.contains(joiner) && !ready.contains(joiner);
            if !is_needed {
                tracing::info!(%joiner, "the snapshot of a node that joins no more is let go");
            }
            is_needed
        });
    }
}

/// The donor with what it works on.
#[derive(Clone)]
pub struct Seat {
    /// The cuts.
    pub donor: Arc<Donor>,
    /// An SQL session.
    pub sql: Arc<Client>,
    /// The stages' state.
    pub shared: Arc<Shared>,
    /// With the members that the stages run with as its peers.
    pub config: Arc<Config>,
}

/// The temporary slot that a cut is made with.
#[must_use]
pub fn slot_name(config: &Config, joiner: NodeId) -> String {
    let slot: String = config.postgres.slot.chars().take(40).collect();
    format!("{slot}_join_{joiner}")
}

impl Seat {
    /// Takes a join as far as it goes now.
    ///
    /// # Errors
    /// When the database or the cut fails; asking again tries again.
    pub async fn ask(&self, joiner: &Joiner) -> Result<Answer, Error> {
        if let Some(refused) = self.refuses(joiner) {
            return Ok(refused);
        }
        let known = lock(&self.shared.members).entry(joiner.id).is_some();
        if let Some(refused) = self.goes(known) {
            return Ok(refused);
        }
        if !known {
            // Once said, all members have it for ever.
            if !is_name(&joiner.name) || !has_port(&joiner.address) {
                let text = format!(
                    "{:?} is no name of a node, or {:?} no host:port at which the others reach it: correct `node.name` and \
                     `listen.advertise` of the node that joins",
                    joiner.name, joiner.address
                );
                return Ok(Answer::Refused("malformed", text));
            }
            if let Some(joins) = lock(&self.shared.joining).clone() {
                return Ok(Answer::Waiting(format!(
                    "the donor, which takes no writes yet ({joins})"
                )));
            }
            // A change that is asked for waits for all members: it must know of this one, or this one comes after it.
            let _first = self.shared.policy_votes.lock().await;
            let live = membership::read(&self.sql).await?.live();
            let changes = policy_change::read(&self.sql).await?.changes;
            if changes.unfinished(&live).is_some() {
                return Ok(Answer::Waiting(
                    "a change of the policy to end (`anabranch status` at the donor)".to_owned(),
                ));
            }
            let fact = Fact {
                node: joiner.id,
                kind: FactKind::Joined,
                name: joiner.name.clone(),
                address: joiner.address.clone(),
                incarnation: joiner.incarnation.clone(),
                position: Position::ZERO,
                by: self.config.node.id,
            };
            membership::say(&self.sql, &fact).await?;
        }
        if !self.config.peers.iter().any(|peer| peer.id == joiner.id) {
            return Ok(Answer::Waiting("the donor to take it in as a member".to_owned()));
        }
        self.cut(joiner).await
    }

    /// Nobody can copy from who goes: once this node has said goodbye nobody takes its stream. Before that it waits for those that
    /// join already, and takes no others.
    fn goes(&self, known: bool) -> Option<Answer> {
        let own = self.config.node.id;
        let is_out = {
            let members = lock(&self.shared.members);
            members.dropping().contains(&own) || members.dropped().contains_key(&own)
        };
        let leaves = lock(&self.shared.leaving).is_some();
        (is_out || leaves && !known).then(|| {
            let text = format!(
                "node `{}` leaves the cluster, or is being dropped from it: join through another member (`--from`), or let it stay first \
                 (`anabranch leave --cancel` there, while it can)",
                self.config.node.name
            );
            Answer::Refused("leaving", text)
        })
    }

    /// Waits until every conflict before the cut has its line in the log here. Some are found only when a local commit is decoded,
    /// so their lines come after the snapshot; the slot does not pass such a commit before. `cut` is where the joiner says that it is; zero
    /// where it does not say.
    pub async fn until_recorded(&self, joiner: NodeId, cut: Lsn) {
        let cut = if cut > Lsn(0) {
            Some(cut)
        } else {
            self.donor.cut_of(joiner).await.map(|cut| cut.lsn)
        };
        if let Some(cut) = cut {
            while self.shared.confirmed.load(Ordering::Relaxed) < cut.0 {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }

    /// Has the snapshot of a cut that was made here held by this process, too, if it is not: the joiner holds it, and this one has begun since,
    /// or has lost its connection. Makes no other cut.
    ///
    /// # Errors
    /// When the database fails; asking again tries again.
    pub async fn hold(&self, joiner: &Joiner, theirs: &Cut) -> Result<Answer, Error> {
        if let Some(refused) = self.refuses(joiner) {
            return Ok(refused);
        }
        if lock(&self.shared.members).entry(joiner.id).is_none() {
            return Ok(void("does not know of this join any more"));
        }
        if let Some(refused) = self.goes(true) {
            return Ok(refused);
        }
        if !self.config.peers.iter().any(|peer| peer.id == joiner.id) {
            return Ok(Answer::Waiting("the donor to take it in as a member".to_owned()));
        }
        let mut copying = self.donor.0.lock().await;
        if let Some(cut) = self.still(held(&copying, joiner), joiner.id).await? {
            return Ok(Answer::Cut(cut));
        }
        if let Some(void) = self.is_void(theirs)? {
            return Ok(void);
        }
        let (client, _driver) = pg::connect(&self.config.postgres, "donor").await?;
        match snapshot::begin(&client, &theirs.snapshot, &theirs.sees).await {
            Ok(_) => {}
            Err(snapshot::Unusable::Gone(why)) => {
                let text = format!("no session at the donor's server has the snapshot any more ({why})");
                return Ok(Answer::Refused(SNAPSHOT_GONE, text));
            }
            Err(snapshot::Unusable::Failed(error)) => return Err(error.into()),
        }
        let snapshot = snapshot::export(&client).await?;
        if !says_joined(&client, joiner).await? {
            return Ok(void("did not know of this join where the copy is cut"));
        }
        let cut = Cut {
            snapshot,
            ..theirs.clone()
        };
        tracing::info!(joiner = %joiner.id, snapshot = cut.snapshot, lsn = %cut.lsn, "the snapshot of a node that joins is taken over from it");
        let state = Copying::Open {
            holder: Holder::Session(Arc::new(client)),
            cut: cut.clone(),
        };
        copying.insert(joiner.id, joiner.attempt(state));
        Ok(Answer::Cut(cut))
    }

    /// Is a cut none of this node's stream as it is now? A daemon that is started again goes on with its stream where that was, with this
    /// joiner as a member from the beginning, so that what was true of the cut stays true. But a heal begins it at another place: what was
    /// committed before that place, and not decoded, may be in the copy and come again behind it under other stamps.
    fn is_void(&self, held: &Cut) -> Result<Option<Answer>, Error> {
        let place = |epoch, lsn| Position { epoch, lsn };
        let healed = heal::State::read(&self.config.node.data_dir).map_err(Error::Heal)?;
        let began = healed.and_then(|state| Some(place(state.timeline, state.slot_at?)));
        if began.is_some_and(|began| began > place(held.epoch, held.lsn)) {
            return Ok(Some(void("was healed since the copy was cut")));
        }
        let timeline = self.shared.timeline.load(Ordering::Relaxed);
        Ok((timeline != held.epoch).then(|| void("is on another timeline since the copy was cut")))
    }

    fn refuses(&self, joiner: &Joiner) -> Option<Answer> {
        let members = lock(&self.shared.members);
        let taken = |text: String| Some(Answer::Refused(ID_TAKEN, text));
        if members.dropped().contains_key(&joiner.id) {
            return taken(format!(
                "node id {} belonged to a node that was dropped: an id is used once, choose another `node.id`",
                joiner.id
            ));
        }
        match members.entry(joiner.id) {
            Some(fact) if fact.incarnation != joiner.incarnation || fact.kind == FactKind::Founder => {
                return taken(format!(
                    "node id {} is that of member `{}`: choose another `node.id`, or `anabranch node drop {}` first if \
                     an earlier attempt to join left it",
                    joiner.id, fact.name, fact.name
                ));
            }
            _ => {}
        }
        let namesake = members
            .live()
            .into_iter()
            .filter(|&id| id != joiner.id)
            .filter_map(|id| members.entry(id))
            .find(|fact| fact.name == joiner.name);
        namesake.map(|fact| {
            let text = format!(
                "`{}` is the name of node {}: choose another `node.name`",
                fact.name, fact.node
            );
            Answer::Refused(NAME_TAKEN, text)
        })
    }

    async fn cut(&self, joiner: &Joiner) -> Result<Answer, Error> {
        let id = joiner.id;
        let mut copying = self.donor.0.lock().await;
        let slot = slot_name(&self.config, id);
        if let Some(cut) = self.still(held(&copying, joiner), joiner.id).await? {
            return Ok(Answer::Cut(cut));
        }
        match copying.get_mut(&id) {
            Some(Attempt {
                incarnation,
                state: Copying::Cutting(task),
            }) if *incarnation == joiner.incarnation => {
                if !task.is_finished() {
                    let on = setup::writers(&self.sql).await?;
                    let on = if on.is_empty() {
                        "the donor's server to make a slot".to_owned()
                    } else {
                        on.join("; ")
                    };
                    return Ok(Answer::Waiting(on));
                }
                let made = task.await;
                copying.remove(&id);
                if let Ok(made) = made {
                    let (connection, cut) = made?;
                    tracing::info!(joiner = %id, snapshot = cut.snapshot, lsn = %cut.lsn, "cut for a node that joins");
                    let state = Copying::Open {
                        holder: Holder::Walsender {
                            _connection: connection,
                        },
                        cut: cut.clone(),
                    };
                    copying.insert(id, joiner.attempt(state));
                    return Ok(Answer::Cut(cut));
                }
            }
            // Its connection is gone, or it is of an attempt that is over.
            _ => drop(copying.remove(&id)),
        }
        // An earlier process of this node was making it: its backend waits on, for the same, and does not notice that nobody wants it.
        if self.is_open(&slot).await? {
            let on = setup::writers(&self.sql).await?;
            let of_before = "the donor's server to let go of a slot of before";
            return Ok(Answer::Waiting(if on.is_empty() {
                of_before.to_owned()
            } else {
                format!("{of_before}, which waits for {}", on.join("; "))
            }));
        }
        let dsn = pg::dsn(&self.config.postgres)?;
        let task = tokio::spawn(async move {
            let mut connection = Box::pin(Walsender::connect(&dsn, "donor")).await?;
            let epoch = connection.identify().await?.timeline;
            let made = connection.cut(&slot).await?;
            let cut = Cut {
                snapshot: made.snapshot.unwrap_or_default(),
                sees: String::new(),
                epoch,
                lsn: made.consistent_point,
            };
            Ok((connection, cut))
        });
        copying.insert(id, joiner.attempt(Copying::Cutting(task)));
        Ok(Answer::Waiting("the donor's server to make a slot".to_owned()))
    }

    /// A cut, if the connection that keeps its snapshot is still there.
    async fn still(
        &self,
        held: Option<(Cut, Option<Arc<Client>>)>,
        joiner: NodeId,
    ) -> Result<Option<Cut>, Error> {
        let Some((cut, session)) = held else {
            return Ok(None);
        };
        let is_open = match session {
            Some(session) => session.batch_execute("SELECT 1").await.is_ok(),
            None => self.is_open(&slot_name(&self.config, joiner)).await?,
        };
        Ok(is_open.then_some(cut))
    }

    /// Is a slot's own connection still there, as the server sees it?
    async fn is_open(&self, slot: &str) -> Result<bool, Error> {
        let row = self
            .sql
            .query_one(
                "SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1 AND active)",
                &[&slot],
            )
            .await?;
        Ok(row.try_get(0)?)
    }

    /// A join is given up: the joiner is no member after all. Where this node does not know of it that says nothing of the others: the one
    /// through which it was begun may be cut off from here, and comes back with the fact.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn abandon(&self, joiner: &Joiner) -> Result<Answer, Error> {
        // Not what the stages know: they meet a fact that this node has said a moment later.
        let known = membership::read(&self.sql).await?.entry(joiner.id).cloned();
        let Some(fact) = known.filter(|fact| fact.incarnation == joiner.incarnation) else {
            self.donor.end(joiner).await;
            let text = format!("member `{}` does not know of this join", self.config.node.name);
            return Ok(Answer::Refused(UNKNOWN_JOIN, text));
        };
        if lock(&self.shared.members).ready().contains(&joiner.id) {
            let text = format!(
                "node `{}` takes writes: `anabranch node drop` takes it out",
                fact.name
            );
            return Ok(Answer::Refused("ready", text));
        }
        self.donor.end(joiner).await;
        let dropped = Fact {
            kind: FactKind::Dropped,
            by: self.config.node.id,
            ..fact
        };
        membership::say(&self.sql, &dropped).await?;
        Ok(Answer::Waiting(String::new()))
    }
}

/// The cut of this attempt, with the session that keeps its snapshot, if it is not the slot's own connection.
fn held(copying: &BTreeMap<NodeId, Attempt>, joiner: &Joiner) -> Option<(Cut, Option<Arc<Client>>)> {
    let attempt = copying.get(&joiner.id)?;
    match &attempt.state {
        Copying::Open { holder, cut } if attempt.incarnation == joiner.incarnation => {
            let session = match holder {
                Holder::Walsender { .. } => None,
                Holder::Session(session) => Some(Arc::clone(session)),
            };
            Some((cut.clone(), session))
        }
        _ => None,
    }
}

/// A refusal: what the donor has done, or does not know, makes what is copied worth nothing.
fn void(since: &str) -> Answer {
    Answer::Refused(CUT_VOID, format!("the donor {since}"))
}

/// Does the snapshot that this session is on know of the join? (Looked at within a savepoint: its lock is not kept.)
async fn says_joined(client: &Client, joiner: &Joiner) -> Result<bool, tokio_postgres::Error> {
    client.batch_execute("SAVEPOINT look").await?;
    let row = client
        .query_one(
            "SELECT EXISTS (SELECT FROM anabranch.member WHERE node_id = $1 AND fact = 'joined' AND incarnation = $2)",
            &[&i32::from(joiner.id.0), &joiner.incarnation],
        )
        .await?;
    let says = row.try_get(0)?;
    client.batch_execute("ROLLBACK TO look; RELEASE look").await?;
    Ok(says)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joiner(id: u16, incarnation: &str) -> Joiner {
        Joiner {
            id: NodeId(id),
            name: format!("n{id}"),
            incarnation: incarnation.to_owned(),
            address: format!("host{id}:1"),
        }
    }

    /// With cuts that are never made.
    async fn donor(of: &[Joiner]) -> Donor {
        let donor = Donor::default();
        for joiner in of {
            let task = tokio::spawn(std::future::pending());
            let attempt = joiner.attempt(Copying::Cutting(task));
            donor.0.lock().await.insert(joiner.id, attempt);
        }
        donor
    }

    async fn of(donor: &Donor) -> Vec<u16> {
        donor.0.lock().await.keys().map(|id| id.0).collect()
    }

    #[tokio::test]
    async fn no_other_attempt_ends_a_cut() {
        let donor = donor(&[joiner(3, "this"), joiner(4, "this")]).await;
        donor.end(&joiner(3, "another")).await;
        assert_eq!(of(&donor).await, [3, 4]);
        donor.end(&joiner(3, "this")).await;
        assert_eq!(of(&donor).await, [4]);
    }

    #[tokio::test]
    async fn cuts_of_nodes_that_join_no_more_are_let_go() {
        let donor = donor(&[3, 4, 5, 6].map(|id| joiner(id, "this"))).await;
        let fact = |node: u16, kind| Fact {
            node: NodeId(node),
            kind,
            name: format!("n{node}"),
            address: String::new(),
            incarnation: "this".to_owned(),
            position: Position::ZERO,
            by: NodeId(1),
        };
        // The third is dropped, the fourth ready, and of the sixth nobody knows.
        let members: Membership = [
            fact(1, FactKind::Founder),
            fact(3, FactKind::Joined),
            fact(3, FactKind::Dropped),
            fact(4, FactKind::Joined),
            fact(4, FactKind::Ready),
            fact(5, FactKind::Joined),
        ]
        .into_iter()
        .collect();
        donor.end_useless(&members);
        assert_eq!(of(&donor).await, [5]);
    }
}
