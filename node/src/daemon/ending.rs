//! How a life of the stages ends: what ends it, and how long a stage may take then.
//!
//! In:   stages, events of the links, the journal's writer      Out: the error of this life
//! Must never: ask a stage that has ended once more; wait for ever for one that was told to stop
//! Not here: what comes after (`run`), leaving (`leaving`)

use std::time::Duration;

use tokio::sync::watch;

use super::Error;
use crate::journal::Journal;
use crate::link::{self, LinkEvent};
use crate::shared::{Shared, lock};

/// Waits a while for a stage that was told to stop, then cuts it.
pub(super) async fn wind_up<T>(task: &mut tokio::task::JoinHandle<T>, patience: Duration) {
    // A finished handle may have been asked already, and must not be asked twice.
    if !task.is_finished() && tokio::time::timeout(patience, &mut *task).await.is_err() {
        task.abort();
    }
}

/// What a stage's end means; a stage that was told to stop ends well.
pub(super) fn stage<E: Into<Error>>(
    name: &'static str,
    ended: Result<Result<(), E>, tokio::task::JoinError>,
) -> Result<(), Error> {
    match ended {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(Error::Ended(name)),
    }
}

/// Waits for what ends this life.
pub(super) async fn fatal_event(
    events: Option<tokio::sync::mpsc::Receiver<LinkEvent>>,
    shared: &Shared,
) -> Error {
    let Some(mut events) = events else {
        return std::future::pending().await;
    };
    while let Some(event) = events.recv().await {
        match event {
            LinkEvent::WentBack(back) => return Error::WentBack(back.to_string()),
            LinkEvent::JournalFailed { reason } => return Error::LinkJournal(reason),
            // Peers tell it: the fact itself need not have arrived here.
            LinkEvent::Refused { refusal, .. }
                if refusal.is(link::RefusalCode::Left) && lock(&shared.members).said_goodbye(shared.node) =>
            {
                return Error::Left;
            }
            LinkEvent::Unreadable { origin, text } => {
                let text = format!(
                    "the journal of this node cannot be read where transactions of node {origin} are, so peers do not get them from here: {text}"
                );
                shared.alarms.raise("journal_damaged", text);
            }
            LinkEvent::Refused { refusal, .. } if refusal.is(link::RefusalCode::Dropped) => {
                shared.alarms.raise("dropped", refusal.text);
            }
            _ => {}
        }
    }
    std::future::pending().await
}

/// Waits until the value is true.
pub(super) async fn changed(mut value: watch::Receiver<bool>) {
    if value.wait_for(|&value| value).await.is_err() {
        std::future::pending().await
    }
}

/// Waits until the journal takes nothing more.
pub(super) async fn poisoned(journal: &Journal) -> Error {
    journal.poisoned().await.into()
}
