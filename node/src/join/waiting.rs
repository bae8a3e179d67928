//! Waiting for the donor: its daemon or its server may be starting, or go away and come back.
//!
//! In:   what failed            Out: another try, with a word for whoever watches; or what failed, after the limit
//! Must never: wait for what does not pass by itself, such as a wrong password; wait for this node's own server
//! Not here: what is done anew (the parent module)

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;

use super::{Error, Event, Options, Report};
use crate::donor::{CUT_VOID, SNAPSHOT_GONE};
use crate::link::{self, JoinError};
use crate::pg::{self, Dsn};

/// A failure that passes sooner is nobody's concern: the donor's daemon begins anew when it takes the joiner in.
pub(super) const QUIET: Duration = Duration::from_secs(3);
/// Between two tries.
const TRY_EVERY: Duration = Duration::from_millis(500);

/// What is left of the donor's time.
pub(super) struct Patience<'a> {
    options: &'a Options,
    report: &'a Report,
    since: Option<Instant>,
    said: String,
}

impl<'a> Patience<'a> {
    pub(super) const fn new(options: &'a Options, report: &'a Report) -> Self {
        Self {
            options,
            report,
            since: None,
            said: String::new(),
        }
    }

    /// The donor has answered.
    pub(super) fn answered(&mut self) {
        self.since = None;
        self.said.clear();
    }

    /// Waits for another try.
    ///
    /// # Errors
    /// What failed: it does not pass by itself, or the limit is reached.
    pub(super) async fn wait(&mut self, failed: Error) -> Result<(), Error> {
        if !failed.is_of_donor() {
            return Err(failed);
        }
        let waited = self.since.get_or_insert_with(Instant::now).elapsed();
        if waited >= Duration::from_secs(self.options.wait_s.into()) {
            return Err(failed);
        }
        if waited >= QUIET {
            let on = format!("donor `{}`: {failed}", self.options.donor.name);
            if on != self.said {
                (self.report)(Event::Waiting { on: on.clone() });
                self.said = on;
            }
        }
        tokio::time::sleep(TRY_EVERY).await;
        Ok(())
    }
}

/// A session at the donor's server.
pub(crate) async fn connect_donor(dsn: &Dsn) -> Result<Client, Error> {
    connect_donor_as(dsn, "join").await
}

/// The same, under a name of its own in `pg_stat_activity`.
pub(super) async fn connect_donor_as(dsn: &Dsn, purpose: &str) -> Result<Client, Error> {
    let connected = pg::connect_dsn(dsn, purpose).await;
    let (client, _driver) = connected.map_err(Error::DonorServer)?;
    Ok(client)
}

/// Does the donor refuse because of the snapshot alone?
pub(super) fn is_of_snapshot(refused: &JoinError) -> bool {
    matches!(refused.refusal_code(), Some(CUT_VOID | SNAPSHOT_GONE))
}

/// Is the donor's server away? Then whatever failed failed of that.
pub(super) async fn away(options: &Options) -> Option<Error> {
    let failed = connect_donor(&options.donor_dsn).await.err()?;
    failed.is_of_donor().then_some(failed)
}

impl Error {
    /// Is it that what is copied is of a snapshot that cannot be gone on with?
    pub(super) fn is_of_snapshot(&self) -> bool {
        match self {
            Self::Snapshot(_) => true,
            Self::Donor(refused) => is_of_snapshot(refused),
            _ => false,
        }
    }

    /// Is it that the donor's daemon or server is away, as it may not be in a moment, or another cut is to be asked for?
    pub(super) fn is_of_donor(&self) -> bool {
        match self {
            Self::DonorServer(error) => error.is_transient(),
            Self::Donor(JoinError::Call { .. }) => true,
            Self::Donor(JoinError::Link(error)) => matches!(
                error,
                link::Error::Connect { .. }
                    | link::Error::Resolve { .. }
                    | link::Error::Broken { .. }
                    | link::Error::Stalled { .. }
            ),
            Self::Snapshot(_) | Self::Donor(JoinError::Refused(_)) => self.is_of_snapshot(),
            Self::Sql { source, .. } => pg::is_lost(source),
            _ => false,
        }
    }
}
