//! Replication slots, seen from an SQL session.

use anabranch_proto::Lsn;
use tokio_postgres::Client;
use tokio_postgres::types::{PgLsn, Type};

use super::Error;
pub use super::walsender::{NewSlot, Snapshot};

/// A logical slot as `pg_replication_slots` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Name.
    pub name: String,
    /// Process that reads it now.
    pub active_pid: Option<i32>,
    /// Decoding starts here or later.
    pub confirmed_flush: Lsn,
    /// The oldest WAL that the server keeps for it.
    pub restart: Lsn,
    /// `wal_status`: `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: String,
}

/// Looks for the slot and checks that it is one for pgoutput in this database.
///
/// # Errors
/// When it is another kind of slot, or the lookup fails.
pub async fn find(sql: &Client, name: &str) -> Result<Option<Slot>, Error> {
    let rows = sql
        .query_typed(
            "SELECT slot_type, coalesce(plugin, ''), coalesce(database = current_database(), false), \
                 active_pid, coalesce(confirmed_flush_lsn, '0/0'), coalesce(restart_lsn, '0/0'), \
                 coalesce(wal_status, '') \
             FROM pg_replication_slots WHERE slot_name = $1",
            &[(&name, Type::TEXT)],
        )
        .await
        .map_err(|source| lookup(name, source))?;
    let Some(row) = rows.first() else { return Ok(None) };
    let read = || -> Result<_, tokio_postgres::Error> {
        let fit: (String, String, bool) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let lsn = |at: usize| row.try_get::<_, PgLsn>(at).map(|lsn| Lsn(u64::from(lsn)));
        let slot = Slot {
            name: name.to_owned(),
            active_pid: row.try_get(3)?,
            confirmed_flush: lsn(4)?,
            restart: lsn(5)?,
            wal_status: row.try_get(6)?,
        };
        Ok((fit, slot))
    };
    let ((kind, plugin, here), slot) = read().map_err(|source| lookup(name, source))?;
    let problem = match (kind.as_str(), plugin.as_str(), here) {
        ("logical", "pgoutput", true) => return Ok(Some(slot)),
        ("logical", "pgoutput", false) => "belongs to another database".to_owned(),
        ("logical", plugin, _) => format!("is for the plugin {plugin}"),
        (kind, ..) => format!("is a {kind} slot"),
    };
    Err(Error::SlotUnfit {
        slot: name.to_owned(),
        problem,
    })
}

/// As [`find`], for a slot that must be there and have its WAL.
///
/// # Errors
/// Also when it is missing or has lost WAL.
pub async fn require(sql: &Client, name: &str) -> Result<Slot, Error> {
    match find(sql, name).await? {
        None => Err(Error::SlotMissing {
            slot: name.to_owned(),
        }),
        Some(slot) if slot.wal_status == "lost" => Err(Error::SlotLost {
            slot: name.to_owned(),
        }),
        Some(slot) => Ok(slot),
    }
}

/// Drops the slot if it is there and not in use.
///
/// # Errors
/// When it is in use, or the server refuses.
pub async fn drop_if_exists(sql: &Client, name: &str) -> Result<(), Error> {
    sql.query_typed(
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1",
        &[(&name, Type::TEXT)],
    )
    .await
    .map(drop)
    .map_err(|source| Error::Catalog {
        what: format!("drop replication slot {name}"),
        source,
    })
}

fn lookup(name: &str, source: tokio_postgres::Error) -> Error {
    Error::Catalog {
        what: format!("look up replication slot {name}"),
        source,
    }
}
