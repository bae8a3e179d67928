//! The donor's snapshot, held by the joining command itself: beside the donor's daemon, so that either of them may be killed.
//!
//! In:   a cut            Out: the same cut by a name that is good while this command lives; word of a donor's daemon that is away
//! Holds: a session at the donor's server, idle in a transaction
//! Must never: ask for another cut; end a join, but where the donor says that the cut is worth nothing any more, or that the node is no member
//! On crash: the session ends, and with it its hold; the donor's daemon has its own
//! Not here: the donor's hold (`crate::donor`), waiting where nothing can be done meanwhile ([`super::waiting`])

use std::future::Future;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_postgres::Client;

use super::waiting::{QUIET, connect_donor_as};
use super::{Error, Event, Options, Report, on_snapshot, sql};
use crate::config::Config;
use crate::donor::{CUT_VOID, Cut, ID_TAKEN};
use crate::link::{Asked, Identity, JoinError, Joining};
use crate::pg::snapshot;

/// Between two words to the donor's daemon and server.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// An answer that takes longer is none.
const ANSWER_MAX: Duration = Duration::from_secs(15);

/// A transaction on the snapshot, which others can be begun on.
pub(super) struct Keeper {
    client: Client,
    cut: Cut,
}

impl Keeper {
    /// Holds what is held by whoever the cut names.
    pub(super) async fn open(options: &Options, cut: &Cut) -> Result<Self, Error> {
        let client = connect_donor_as(&options.donor_dsn, "join-snapshot").await?;
        let sees = on_snapshot(&client, cut).await?;
        let snapshot = snapshot::export(&client)
            .await
            .map_err(sql("hold the donor's snapshot"))?;
        let cut = Cut {
            snapshot,
            sees,
            ..cut.clone()
        };
        Ok(Self { client, cut })
    }

    /// The cut, by the name that is good while this lives.
    pub(super) const fn cut(&self) -> &Cut {
        &self.cut
    }

    /// Has its session ended?
    pub(super) fn is_lost(&self) -> bool {
        self.client.is_closed()
    }

    /// A word, so that nothing between here and the server takes the connection for a dead one.
    async fn beat(&self) {
        // What fails ends the session, or comes again.
        let _ = timeout(ANSWER_MAX, self.client.batch_execute("SELECT 1")).await;
    }
}

/// What it takes to see after a donor's daemon.
#[derive(Clone, Copy)]
pub(super) struct Watch<'a> {
    pub(super) config: &'a Config,
    pub(super) options: &'a Options,
    pub(super) identity: &'a Identity,
    pub(super) report: &'a Report,
}

impl Watch<'_> {
    /// Does `work`, and sees meanwhile to it that the donor's daemon holds the snapshot, too: one that was started again takes it over. With
    /// `on`, which says what goes on meanwhile, one that is away is told of.
    ///
    /// # Errors
    /// Those of the work; and when the donor says that the cut is worth nothing, or that the node was dropped.
    pub(super) async fn during<T>(
        self,
        keeper: &mut Keeper,
        on: Option<&str>,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let (stop, stopped) = watch::channel(false);
        let mut watching = std::pin::pin!(self.watch(keeper, on, stopped));
        let mut work = std::pin::pin!(work);
        let void = tokio::select! {
            biased;
            done = &mut work => {
                stop.send_replace(true);
                // To its end: a word that reached the donor after it was told to let the snapshot go would have it held again.
                let _ = watching.await;
                return done;
            }
            void = &mut watching => void,
        };
        match void {
            Some(void) => Err(void),
            None => work.await,
        }
    }

    /// Until it is stopped, or the work is worth nothing: then with the donor's words.
    async fn watch(
        self,
        keeper: &mut Keeper,
        on: Option<&str>,
        mut stop: watch::Receiver<bool>,
    ) -> Option<Error> {
        let mut donor: Option<Joining> = None;
        let mut away = Away {
            watch: self,
            on,
            since: None,
            said: String::new(),
        };
        loop {
            tokio::select! {
                _ = stop.changed() => return None,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            keeper.beat().await;
            let cut = keeper.cut().clone();
            let asked = timeout(ANSWER_MAX, self.ask(&mut donor, &cut)).await;
            let failed = match asked {
                Ok(Ok(Asked::Cut(held))) => {
                    away.is_over();
                    if keeper.is_lost()
                        && held.is_same_place(&cut)
                        && let Ok(again) = Keeper::open(self.options, &held).await
                    {
                        *keeper = again;
                    }
                    continue;
                }
                // Its stages begin anew.
                Ok(Ok(Asked::Waiting(_))) => continue,
                // (One that was dropped meanwhile need not copy to the end.)
                Ok(Err(refused)) if matches!(refused.refusal_code(), Some(CUT_VOID | ID_TAKEN)) => {
                    return Some(refused.into());
                }
                Ok(Err(failed)) => failed.to_string(),
                Err(_) => format!("it does not answer within {} s", ANSWER_MAX.as_secs()),
            };
            donor = None;
            away.tell(&failed);
        }
    }

    async fn ask(self, donor: &mut Option<Joining>, cut: &Cut) -> Result<Asked, JoinError> {
        let connected = match donor.take() {
            Some(connected) => connected,
            None => Joining::connect(self.config, &self.options.donor, self.identity).await?,
        };
        donor.insert(connected).hold(cut).await
    }
}

/// A donor's daemon that does not hold the snapshot, in words for whoever watches.
struct Away<'a> {
    watch: Watch<'a>,
    /// What goes on meanwhile; nothing is said without.
    on: Option<&'a str>,
    since: Option<Instant>,
    said: String,
}

impl Away<'_> {
    fn tell(&mut self, failed: &str) {
        let Some(on) = self.on else { return };
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() < QUIET || self.said == failed {
            return;
        }
        failed.clone_into(&mut self.said);
        let donor = &self.watch.options.donor.name;
        let on = format!(
            "donor `{donor}`: {failed} ({on} meanwhile, on the snapshot, which this command holds, too)"
        );
        (self.watch.report)(Event::Waiting { on });
    }

    fn is_over(&mut self) {
        self.since = None;
        if self.said.is_empty() {
            return;
        }
        self.said.clear();
        let donor = &self.watch.options.donor.name;
        let text = format!("donor `{donor}` answers again, and holds the snapshot");
        (self.watch.report)(Event::Note { text });
    }
}
