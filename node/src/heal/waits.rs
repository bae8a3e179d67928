//! What a heal waits for, for people; and that it may be ended while it waits.
//!
//! In:   sessions of the server; who ends it            Out: who is in the way; [`Error::Interrupted`]
//! Holds: nothing
//! Invariants: ending a heal loses nothing: run again, it goes on from what is on disk and at the server, like one that was killed
//! Not here: what it is that waits ([`super::healing`], [`super::tail`], [`super::again`])

use std::path::Path;

use tokio::sync::watch;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::{Error, Phase, State};
use crate::{pg, setup};

/// Turns true once the heal is to end.
pub type Stop = watch::Receiver<bool>;

/// A step of the heal of this folder's node, unless it is to end before.
pub(super) async fn unless<T>(
    stop: &Stop,
    dir: &Path,
    step: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::select! {
        done = step => done,
        () = told(stop.clone()) => Err(interrupted(dir)),
    }
}

/// Waits until the heal is to end.
pub(super) async fn told(mut stop: Stop) {
    // Where nobody is left to say it, it is not said.
    if stop.wait_for(|&stop| stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// What is left to do of a heal that ends now.
pub(super) fn interrupted(dir: &Path) -> Error {
    let phase = State::read(dir).ok().flatten().map(|state| state.phase);
    let left = match phase {
        Some(Phase::Begun) => {
            "Rows are still to be written again, and the daemon refuses to start until they are"
        }
        Some(Phase::Written) => {
            "All that was written here is written again; what was deleted is still to be looked for, also beside a daemon that runs"
        }
        Some(Phase::Done) | None => "No row was written again yet",
    };
    Error::Interrupted(format!(
        "interrupted, and nothing is lost. {left}. Run `anabranch heal` again: it goes on where it was"
    ))
}

/// Who is not to be seen.
const NOBODY: &str =
    "a transaction that has ended by now, or that this role cannot see (`pg_read_all_stats`)";

/// Whom the making of a slot waits for.
pub(super) async fn writers(sql: &Client) -> Result<String, Error> {
    let writers = setup::writers(sql).await?;
    Ok(if writers.is_empty() {
        NOBODY.to_owned()
    } else {
        writers.join("; ")
    })
}

/// Who holds tables, so that rows of them cannot be written.
pub(super) async fn holders(sql: &Client) -> Result<String, Error> {
    // Who reads is in nobody's way.
    let are = format!(
        "l.mode NOT IN ('AccessShareLock', 'RowShareLock') AND NOT {}",
        pg::own_session("current_user")
    );
    let holders = setup::lock_holders(sql, &are).await?;
    if holders.is_empty() {
        writers(sql).await
    } else {
        Ok(holders.join("; "))
    }
}

/// Ends whoever is making the slot: a backend that waits does not notice that nobody waits for it any more.
pub(super) async fn end_making(sql: &Client, slot: &str) -> Result<(), tokio_postgres::Error> {
    sql.query_typed(
        "SELECT pg_cancel_backend(a.pid) FROM pg_replication_slots s JOIN pg_stat_activity a ON a.pid = s.active_pid
         WHERE s.slot_name = $1 AND a.query ILIKE 'create_replication_slot%'",
        &[(&slot, Type::TEXT)],
    )
    .await
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_ends_a_heal_is_told_what_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let (ending, stop) = watch::channel(false);
        assert_eq!(unless(&stop, dir.path(), async { Ok(7) }).await.unwrap(), 7);
        ending.send_replace(true);
        let mut state = State::begin(7);
        for (phase, left) in [
            (Phase::Begun, "the daemon refuses to start"),
            (Phase::Written, "what was deleted"),
            (Phase::Done, "No row"),
        ] {
            state.phase = phase;
            state.keep(dir.path()).unwrap();
            let never = std::future::pending::<Result<(), Error>>();
            let said = unless(&stop, dir.path(), never).await.unwrap_err().to_string();
            assert!(
                said.contains(left) && said.contains("`anabranch heal` again"),
                "{said}"
            );
        }
    }
}
