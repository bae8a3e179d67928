//! The joiner's side of a join: asks its donor, and takes over what the donor's journal holds.
//!
//! In:   the donor's answers and frames           Out: a cut to copy from; frames in the joiner's own journal
//! Holds: one connection
//! On crash: asked again; the journal says what is held already
//! Not here: copying (`crate::join`)

use std::future::Future;
use std::time::Duration;

use anabranch_proto::link as pb;
use anabranch_proto::link::link_client::LinkClient;
use anabranch_proto::{Lsn, NodeId, Stamp, Vector};
use tokio::time::Instant;
use tonic::transport::Channel;

use super::client::{connect, describe};
use super::clock::unix_us;
use super::handshake::{Identity, Refusal};
use super::{BadFrame, Error, wire};
use crate::config::{self, Config};
use crate::donor::Cut;
use crate::journal::{self, Journal};

/// The donor does not answer as it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// No connection.
    #[error("{}", crate::error::chain(.0))]
    Link(#[from] Error),
    /// It cannot be.
    #[error("the donor refuses: {0}")]
    Refused(Refusal),
    /// The call failed; it may succeed later.
    #[error("the donor `{donor}`: {text}")]
    Call {
        /// Its name.
        donor: String,
        /// What it said.
        text: String,
    },
    /// It sends what cannot be.
    #[error("the donor sent a {0}")]
    Frame(#[from] BadFrame),
    /// The own journal failed.
    #[error(transparent)]
    Journal(#[from] journal::Error),
}

impl JoinError {
    /// The code of the donor's refusal, if it is one.
    #[must_use]
    pub fn refusal_code(&self) -> Option<&str> {
        match self {
            Self::Refused(refusal) => Some(&refusal.code),
            _ => None,
        }
    }
}

/// What the donor says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// Ask again; what it waits for.
    Waiting(String),
    /// There is a cut.
    Cut(Cut),
}

/// What a seed waits for, for whoever watches: told when it begins to, and again as long as it does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SeedWaits {
    /// The own journal has no room; in words.
    Room(String),
    /// The donor, which is silent: it has not recorded yet what was committed before the cut.
    Donor,
}

/// Between two looks whether the journal has room.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A donor that is silent for so long waits for something itself.
const DONOR_QUIET: Duration = Duration::from_secs(5);
/// What goes on being waited for is told of again after this.
const TOLD_AGAIN: Duration = Duration::from_secs(60);

/// Says what the journal waits for while it has no room: it does so in silence, and for ever if nobody makes any.
struct Room<'a> {
    journal: &'a Journal,
    say: &'a (dyn Fn(SeedWaits) + Send + Sync),
    /// What was said, and when.
    said: Option<(String, Instant)>,
}

impl Room<'_> {
    async fn wait<T>(&mut self, asked: impl Future<Output = T>) -> T {
        let mut asked = std::pin::pin!(asked);
        loop {
            tokio::select! {
                biased;
                done = &mut asked => return done,
                () = tokio::time::sleep(LOOK_EVERY) => self.look(),
            }
        }
    }

    fn look(&mut self) {
        let Some(why) = self.journal.stats().stalled else {
            self.said = None;
            return;
        };
        let is_said = |(said, at): &(String, Instant)| *said == why && at.elapsed() < TOLD_AGAIN;
        if !self.said.as_ref().is_some_and(is_said) {
            (self.say)(SeedWaits::Room(format!("the journal of this node: {why}")));
            self.said = Some((why, Instant::now()));
        }
    }
}

/// A joiner that talks to its donor.
pub struct Joining {
    client: LinkClient<Channel>,
    donor: config::Peer,
    hello: pb::Hello,
    address: String,
}

impl Joining {
    /// Connects to the donor.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub async fn connect(
        config: &Config,
        donor: &config::Peer,
        identity: &Identity,
    ) -> Result<Self, JoinError> {
        Ok(Self {
            client: connect(config, donor).await?,
            donor: donor.clone(),
            hello: identity.hello(&Vector::new(), unix_us()),
            address: config.listen.advertised(),
        })
    }

    /// In the place of a connection that broke: what the donor has told over that one is known.
    #[must_use]
    pub fn instead_of(mut self, broken: &Self) -> Self {
        self.hello.founders.clone_from(&broken.hello.founders);
        self
    }

    fn failed(&self, status: &tonic::Status) -> JoinError {
        JoinError::Call {
            donor: self.donor.name.clone(),
            text: describe(status),
        }
    }

    /// What it holds of each origin, itself included, durable or not; for a member.
    ///
    /// # Errors
    /// When it refuses or the call fails.
    pub async fn holds(&mut self) -> Result<Vector, JoinError> {
        let welcome = match self.client.greet(self.hello.clone()).await {
            Ok(welcome) => welcome.into_inner(),
            Err(status) => return Err(self.failed(&status)),
        };
        if !welcome.refusal_code.is_empty() {
            return Err(JoinError::Refused(Refusal {
                code: welcome.refusal_code,
                text: welcome.refusal,
            }));
        }
        Ok(wire::vector_from_wire(&welcome.hello.unwrap_or_default().holds))
    }

    /// Asks for the next step.
    ///
    /// # Errors
    /// When the donor refuses or the call fails.
    pub async fn ask(&mut self, step: pb::JoinStep) -> Result<Asked, JoinError> {
        let request = pb::JoinRequest {
            step: step.into(),
            ..pb::JoinRequest::default()
        };
        self.request(request).await
    }

    /// Has the donor's daemon hold a cut whose snapshot is held here. It may answer with another cut, if it holds that.
    ///
    /// # Errors
    /// When the donor refuses ([`crate::donor::SNAPSHOT_GONE`], [`crate::donor::CUT_VOID`]) or the call fails.
    pub async fn hold(&mut self, cut: &Cut) -> Result<Asked, JoinError> {
        let request = pb::JoinRequest {
            step: pb::JoinStep::Hold.into(),
            snapshot: cut.snapshot.clone(),
            sees: cut.sees.clone(),
            epoch: cut.epoch,
            lsn: cut.lsn.0,
            ..pb::JoinRequest::default()
        };
        self.request(request).await
    }

    async fn request(&mut self, request: pb::JoinRequest) -> Result<Asked, JoinError> {
        let request = pb::JoinRequest {
            hello: Some(self.hello.clone()),
            address: self.address.clone(),
            ..request
        };
        let answer = match self.client.join(request).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => return Err(self.failed(&status)),
        };
        if !answer.refusal_code.is_empty() {
            return Err(JoinError::Refused(Refusal {
                code: answer.refusal_code,
                text: answer.refusal,
            }));
        }
        // The members of the beginning are the donor's, whatever was configured here.
        if let Some(hello) = answer.hello {
            self.hello.founders = hello.founders;
        }
        Ok(if answer.snapshot.is_empty() {
            Asked::Waiting(answer.waiting)
        } else {
            Asked::Cut(Cut {
                snapshot: answer.snapshot,
                sees: String::new(),
                epoch: answer.epoch,
                lsn: Lsn(answer.lsn),
            })
        })
    }

    /// Brings the own journal to where the donor's is now, once the donor has recorded all that happened before `cut` (zero
    /// where nothing is copied). Returns what it
    /// holds then, and what is settled of it (see [`crate::resolve::Resolver::settle`]), with the stamp that nothing which the donor let
    /// go is above. `say` hears what is waited for: room in the own journal, or the donor.
    ///
    /// # Errors
    /// When the call or the journal fails.
    pub async fn seed(
        &mut self,
        journal: &Journal,
        cut: Lsn,
        say: &(dyn Fn(SeedWaits) + Send + Sync),
    ) -> Result<(Vector, (Vector, Stamp)), JoinError> {
        let mut room = Room {
            journal,
            say,
            said: None,
        };
        let request = pb::SeedRequest {
            hello: Some(self.hello.clone()),
            holds: wire::vector_to_wire(&journal.appended_vector()),
            cut: cut.0,
        };
        let mut stream = match self.client.seed(request).await {
            Ok(stream) => stream.into_inner(),
            Err(status) => return Err(self.failed(&status)),
        };
        let (mut last, mut settled, mut low) = (None, Vector::new(), Stamp::ZERO);
        let mut said: Option<Instant> = None;
        // The donor's last message has no frames. Where its stages begin anew in the middle, the stream ends as if all were said.
        let mut is_whole = false;
        loop {
            let message = loop {
                match tokio::time::timeout(DONOR_QUIET, stream.message()).await {
                    Ok(message) => break message,
                    Err(_) if said.is_some_and(|at| at.elapsed() < TOLD_AGAIN) => {}
                    Err(_) => {
                        say(SeedWaits::Donor);
                        said = Some(Instant::now());
                    }
                }
            };
            let message = match message {
                Ok(message) => message,
                Err(status) => return Err(self.failed(&status)),
            };
            let Some(message) = message else { break };
            is_whole = message.frames.is_empty();
            settled.join(&wire::vector_from_wire(&message.settled));
            if let Ok(bytes) = message.low.as_ref().try_into() {
                low = Stamp::from_bytes(bytes);
            }
            for frame in message.frames {
                let frame = wire::frame_from_wire(frame)?;
                if frame.meta.last > journal.appended_of(frame.meta.origin)
                    || frame.meta.kind == journal::FrameKind::Part
                {
                    last = Some(room.wait(journal.append(frame)).await?);
                }
            }
        }
        if let Some(seq) = last {
            room.wait(journal.wait_durable(seq)).await?;
        }
        if !is_whole {
            let status = tonic::Status::unavailable("it broke off what it was sending of its journal");
            return Err(self.failed(&status));
        }
        Ok((journal.appended_vector(), (settled, low)))
    }

    /// The donor's node id.
    #[must_use]
    pub const fn donor(&self) -> NodeId {
        self.donor.id
    }
}
