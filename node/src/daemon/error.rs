//! Why a life of the stages ended, or could not begin.
//!
//! In:   the errors of the stages            Out: what to do about it, for people; whether it may pass by itself
//! Must never: call transient what somebody must mend first: it would be tried again in silence
//! Not here: trying again (`run`), what is written down of an error (`publication_watch`)

use anabranch_proto::{Lsn, Position};

use super::IdentityError;
use crate::small_file::is_no_space;
use crate::{admin, apply, capture, index, journal, link, pg, policy_change, source};

/// The daemon cannot run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server cannot be reached.
    #[error(transparent)]
    Connect(#[from] pg::Error),
    /// This database, folder and configuration do not belong together.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] journal::Error),
    /// The row index cannot be made.
    #[error(transparent)]
    Index(#[from] index::Error),
    /// The slot cannot be decoded.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// Capture failed.
    #[error(transparent)]
    Capture(#[from] capture::Error),
    /// Apply failed.
    #[error(transparent)]
    Apply(#[from] apply::Error),
    /// Links failed.
    #[error("{}", crate::error::chain(.0))]
    Link(#[from] link::Error),
    /// The admin socket failed.
    #[error(transparent)]
    Admin(#[from] admin::Error),
    /// A statement failed.
    #[error("{}", crate::error::sql(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// Our server is older than what a peer has of it.
    #[error("{0}")]
    WentBack(String),
    /// A standby was promoted that lacks the end of our stream.
    #[error(
        "the journal holds this node's transactions up to {journaled}, but in this server's history timeline {} is {}: a \
         standby was promoted that lacks the end of it. Run `anabranch heal`, which puts back what it lacks \
         (docs/errors/the-server-went-back.md)", journaled.epoch, left_at(*left)
    )]
    Lacks {
        /// The journal's last own position.
        journaled: Position,
        /// Where the server's history left that timeline.
        left: Option<Lsn>,
    },
    /// The journal took no more of what peers sent.
    #[error("the journal takes no more frames: {0}")]
    LinkJournal(String),
    /// There is another set of live members, or another policy: the stages begin anew with it.
    #[error("the members or the policy have changed")]
    Members,
    /// The others have closed this node's stream, as it had asked.
    #[error("this node has left its cluster")]
    Left,
    /// The policy file.
    #[error(transparent)]
    Policy(#[from] crate::config::PolicyError),
    /// Which policy is in force.
    #[error(transparent)]
    InForce(#[from] Box<policy_change::force::Error>),
    /// Another policy than before, too early.
    #[error(
        "the policy is not the one that this node ran with, and there are writes that are not yet known to be applied at \
         every node: put the former policy back at all nodes (node.data_dir/policy.txt shows it) and start them, then change it by \
         `anabranch policy change` while they run; or stop all writes, wait until `anabranch status` shows no lag anywhere for a few \
         seconds, stop all daemons, and change the file at all nodes (docs/policies.md)"
    )]
    PolicyInUse,
    /// The policy of before cannot be read, or this one not kept.
    #[error(
        "policy.txt in node.data_dir cannot be read or written: {0}; free disk space or correct its permissions"
    )]
    PolicyFile(std::io::Error),
    /// A table is not fit for what it says.
    #[error("the policy does not fit the tables here:\n{0}")]
    Unfit(String),
    /// What was settled.
    #[error("settled.json in node.data_dir cannot be read: {0}; correct its permissions, or restore it")]
    Settled(std::io::Error),
    /// The journal cannot be read.
    #[error("reading the journal: {0}")]
    Unreadable(String),
    /// The slot is new, and what came before it is not written again yet.
    #[error(
        "a heal was begun here and is not finished, so rows that nobody has heard of could be overwritten: run `anabranch \
         heal` again"
    )]
    Healing,
    /// What is known of a heal.
    #[error("heal.json in node.data_dir cannot be read: {0}; correct its permissions, or restore it")]
    HealFile(std::io::Error),
    /// The server's timeline has the number of the one that this node ran on, and is another.
    #[error(
        "timeline {timeline} of this server begins at {found}, but the timeline of that number that this node has run on began at \
         {known}: two standbys were promoted apart, and this is the other one. Use the one that the node has run on; if that is \
         gone, the node is lost (docs/errors/when-a-node-is-lost.md)"
    )]
    OtherBranch {
        /// The number.
        timeline: u32,
        /// Where this one begins.
        found: Lsn,
        /// Where that of before began.
        known: Lsn,
    },
    /// What is known of the server.
    #[error(
        "server.json in node.data_dir cannot be read or written: {0}; correct its permissions, or free disk space"
    )]
    ServerFile(std::io::Error),
    /// The publication is not what it was.
    #[error(
        "publication {publication} {why}: what is written here meanwhile is not in the stream, and does not come into it by itself. \
         Run `anabranch init`, which mends the publication, then `anabranch heal`, which sends what was written \
         (docs/errors/the-publication-was-changed.md)"
    )]
    Publication {
        /// Its name.
        publication: String,
        /// What is wrong with it, or was.
        why: String,
    },
    /// What is known of the publication.
    #[error(
        "publication.json in node.data_dir cannot be read or written: {0}; correct its permissions, or free disk space"
    )]
    PublicationFile(std::io::Error),
    /// The server does not answer, and another was promoted.
    #[error("the server does not answer any more, and another one was promoted: {0}")]
    Moved(String),
    /// A stage ended by itself.
    #[error("{0} ended unexpectedly")]
    Ended(&'static str),
}

impl Error {
    /// May it pass by itself, such as a server that restarts?
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Moved(_) => true,
            _ if self.is_no_space() => true,
            Self::Connect(error) => error.is_transient(),
            Self::Source(error) => error.is_transient(),
            Self::Capture(error) => error.is_transient(),
            Self::Sql(error) | Self::Identity(IdentityError::Away(error)) => pg::is_transient(error),
            Self::InForce(error) => match error.as_ref() {
                policy_change::force::Error::Sql(error) => pg::is_transient(error),
                _ => false,
            },
            Self::Apply(apply::Error::Session(apply::SessionError::Connect(error))) => error.is_transient(),
            Self::Apply(
                apply::Error::Session(apply::SessionError::Sql(error)) | apply::Error::Sql(error),
            ) => pg::is_transient(error),
            Self::Apply(apply::Error::Fence(apply::fence::Error::Connect(error))) => error.is_transient(),
            Self::Apply(apply::Error::Fence(_) | apply::Error::Forgotten) => true,
            _ => false,
        }
    }

    /// Was a disk full? It may have space later, and nothing was written that anybody relies on.
    pub(super) fn is_no_space(&self) -> bool {
        match self {
            Self::PolicyFile(error)
            | Self::Settled(error)
            | Self::ServerFile(error)
            | Self::PublicationFile(error)
            | Self::Capture(capture::Error::Checkpoint(error)) => is_no_space(error),
            Self::Journal(error) => error.is_no_space(),
            Self::Index(error) => error.is_no_space(),
            Self::Capture(capture::Error::Resolve(error)) => error.is_no_space(),
            Self::Apply(apply::Error::NoSpace(_)) => true,
            _ => false,
        }
    }

    /// Does somebody have to say which server it is? One that is simply not up yet, as after a reboot, comes up by itself.
    pub(super) fn needs_a_choice(&self) -> bool {
        matches!(
            self,
            Self::Connect(pg::Error::SeveralPrimaries { .. } | pg::Error::Outdated { .. })
        )
    }

    /// The error of decoding, if a place of the stream cannot be passed, whatever is mended now.
    pub(super) const fn for_good(&self) -> Option<&source::Error> {
        match self {
            Self::Source(error) | Self::Capture(capture::Error::Source(error)) if error.is_for_good() => {
                Some(error)
            }
            _ => None,
        }
    }
}

/// Where a timeline was left, for people.
pub(crate) fn left_at(left: Option<Lsn>) -> String {
    left.map_or_else(|| "not there".to_owned(), |left| format!("left at {left}"))
}
