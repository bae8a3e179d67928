//! Do the database, the data folder and the configuration belong together?

use std::path::PathBuf;

use anabranch_proto::{Lsn, NodeId};
use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use crate::config::Config;
use crate::membership::{self, Membership};
use crate::setup::objects::{FORMAT, other_layout};
use crate::source::Identity;

/// They do not.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// `anabranch init` has not run.
    #[error("this database is not prepared ({0}); run `anabranch init` with this configuration first")]
    NotInitialized(String),
    /// A join was begun here, and was not finished.
    #[error(
        "a join was begun in this database and is not finished, so this node is no copy of its donor yet: run `anabranch join` \
         again, which goes on with it, or give it up with `anabranch join --abandon`, which empties the database"
    )]
    JoinUnfinished,
    /// Another release made the schema.
    #[error(
        "schema anabranch of this database has layout {found}, this release knows {FORMAT}: {}",
        other_layout(*found).unwrap_or_default()
    )]
    OtherLayout {
        /// From `anabranch.node`.
        found: i32,
    },
    /// The server went away while it was asked.
    #[error("cannot read anabranch.node: {}", crate::error::sql(.0))]
    Away(tokio_postgres::Error),
    /// The database is another node.
    #[error("this database was prepared as {found}, the configuration says {expected}; correct {key}")]
    OtherNode {
        /// What the database says.
        found: String,
        /// What the configuration says.
        expected: String,
        /// The key.
        key: &'static str,
    },
    /// The configuration names a peer that is no member.
    #[error(
        "peers names node {id} ({name}), which is no member of this cluster: let it join with `anabranch join`, or take \
         it out of peers (a cluster that has not begun yet: run `anabranch init` again at every node)"
    )]
    NoMember {
        /// Its id.
        id: NodeId,
        /// Its name.
        name: String,
    },
    /// This node was dropped.
    #[error(
        "this node was dropped from its cluster: run `anabranch remove`, empty the database and node.data_dir, give it \
         an id that was never used, and `anabranch join` it"
    )]
    Dropped,
    /// This node has left: a state rather than a fault.
    #[error("{}", super::left::REMEDY)]
    Left,
    /// The server is another one.
    #[error(
        "this database was prepared on the server with system identifier {expected}, but this server is {found}: it \
         looks like a restored copy; remove Anabranch from it (`anabranch remove --without-leaving`) and join it as a new \
         node"
    )]
    OtherServer {
        /// From `anabranch.node`.
        expected: String,
        /// From the server.
        found: String,
    },
    /// The folder is another database's.
    #[error(
        "node.data_dir {} belongs to incarnation {found} of a node, the database is incarnation {expected}: one of both was \
         replaced; restore the right folder, or empty it if the database was prepared anew", path.display()
    )]
    OtherFolder {
        /// The file that says so.
        path: PathBuf,
        /// Its incarnation.
        found: String,
        /// The database's.
        expected: String,
    },
    /// The folder cannot be used.
    #[error("node.data_dir: {} : {source}; correct its owner, mode or place", path.display())]
    Folder {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// What `anabranch.node` says.
#[derive(Debug, Clone)]
pub(crate) struct NodeRow {
    /// Made by `anabranch init`.
    pub incarnation: String,
    /// The server that it ran on.
    pub system_identifier: String,
    /// Where the slot began.
    pub slot_start: Lsn,
}

#[derive(Serialize, Deserialize)]
struct Owner {
    node_id: u16,
    cluster_id: String,
    incarnation: String,
}

const READ: &str = "SELECT node_id, name, cluster_id, incarnation::text, system_identifier, \
    coalesce((slot_start - '0/0')::int8, 0) FROM anabranch.node";

/// Compares `anabranch.node` and the data folder with the configuration.
pub(crate) async fn check(config: &Config, sql: &Client) -> Result<NodeRow, IdentityError> {
    // First: of what a join has made so far, all may be there but the checkpoint. Without that the stream would be begun with a fold
    // that knows nothing of what was copied.
    let unfinished = sql.query_one("SELECT to_regnamespace('anabranch_join') IS NOT NULL", &[]);
    if unfinished
        .await
        .and_then(|row| row.try_get(0))
        .map_err(unreadable)?
    {
        return Err(IdentityError::JoinUnfinished);
    }
    check_layout(sql).await?;
    let row = sql.query_opt(READ, &[]).await.map_err(unreadable)?;
    let row = row.ok_or_else(|| IdentityError::NotInitialized("anabranch.node is empty".to_owned()))?;
    let node_id: i32 = row.try_get(0).map_err(unreadable)?;
    let (name, cluster_id): (String, String) = (
        row.try_get(1).map_err(unreadable)?,
        row.try_get(2).map_err(unreadable)?,
    );
    let of_config = [
        (node_id.to_string(), config.node.id.to_string(), "node.id"),
        (name, config.node.name.clone(), "node.name"),
        (cluster_id, config.cluster.id.clone(), "cluster.id"),
    ];
    for (found, expected, key) in of_config {
        if found != expected {
            return Err(IdentityError::OtherNode { found, expected, key });
        }
    }
    let slot_start: i64 = row.try_get(5).map_err(unreadable)?;
    let row = NodeRow {
        incarnation: row.try_get(3).map_err(unreadable)?,
        system_identifier: row.try_get(4).map_err(unreadable)?,
        slot_start: Lsn(u64::try_from(slot_start).unwrap_or(0)),
    };
    // A log of an older layout, which `init` brings up to date.
    let log = sql.query_one("SELECT to_regclass('anabranch.conflict_open') IS NOT NULL", &[]);
    if !log.await.and_then(|row| row.try_get(0)).map_err(unreadable)? {
        let text = "the conflict log has an older layout";
        return Err(IdentityError::NotInitialized(text.to_owned()));
    }
    check_folder(config, &row)?;
    Ok(row)
}

/// Asked by itself, and first: of the rest nothing is known where another release made it.
async fn check_layout(sql: &Client) -> Result<(), IdentityError> {
    let row = sql.query_opt("SELECT format FROM anabranch.node", &[]).await;
    let format = row.and_then(|row| row.map(|row| row.try_get(0)).transpose());
    let format: Option<i32> = format.map_err(unreadable)?;
    match format.filter(|&format| other_layout(format).is_some()) {
        Some(found) => Err(IdentityError::OtherLayout { found }),
        None => Ok(()),
    }
}

/// The server is away, or the tables are not as this release makes them.
fn unreadable(error: tokio_postgres::Error) -> IdentityError {
    if crate::pg::is_transient(&error) {
        IdentityError::Away(error)
    } else {
        IdentityError::NotInitialized(crate::error::sql(&error))
    }
}

/// Who is a member by `anabranch.member`, this node among them; as a daemon begins with it, whose `peers` name nobody else.
pub(crate) async fn members(config: &Config, sql: &Client) -> Result<Membership, IdentityError> {
    let members = known_members(config, sql).await?;
    check_peers(config, &members)?;
    Ok(members)
}

/// The same whatever `peers` says: nothing for a daemon to end for that runs, as one does whose node has just become ready.
pub(super) async fn known_members(config: &Config, sql: &Client) -> Result<Membership, IdentityError> {
    let members = membership::read(sql).await.map_err(unreadable)?;
    let has_left = sql
        .query_one(
            "SELECT EXISTS (SELECT FROM anabranch.leaving WHERE left_at IS NOT NULL)",
            &[],
        )
        .await
        .and_then(|row| row.try_get(0))
        .map_err(unreadable)?;
    let is_dropped = members.dropped().contains_key(&config.node.id);
    if has_left || is_dropped && members.said_goodbye(config.node.id) {
        return Err(IdentityError::Left);
    }
    if is_dropped {
        return Err(IdentityError::Dropped);
    }
    if members.entry(config.node.id).is_none() {
        let text = format!("anabranch.member knows nothing of node {}", config.node.id);
        return Err(IdentityError::NotInitialized(text));
    }
    Ok(members)
}

fn check_peers(config: &Config, members: &Membership) -> Result<(), IdentityError> {
    let catches_up = !members.ready().contains(&config.node.id);
    for peer in &config.peers {
        if members.entry(peer.id).is_some() {
            continue;
        }
        if catches_up {
            // It may join at the same time through another member: what tells of it is still on its way here.
            tracing::warn!(
                "peers names node {} ({}), which is not known here as a member yet",
                peer.id,
                peer.name
            );
            continue;
        }
        return Err(IdentityError::NoMember {
            id: peer.id,
            name: peer.name.clone(),
        });
    }
    Ok(())
}

fn check_folder(config: &Config, row: &NodeRow) -> Result<(), IdentityError> {
    let dir = &config.node.data_dir;
    let path = dir.join("node.json");
    let failed = |source| IdentityError::Folder {
        path: path.clone(),
        source,
    };
    crate::small_file::make_folder(dir).map_err(failed)?;
    if let Ok(Some(who)) = crate::small_file::open_to(dir) {
        tracing::warn!(
            "{who} may look into node.data_dir {}, which holds rows of all replicated tables: chmod 700 it",
            dir.display()
        );
    }
    let owner = Owner {
        node_id: config.node.id.0,
        cluster_id: config.cluster.id.clone(),
        incarnation: row.incarnation.clone(),
    };
    match std::fs::read(&path) {
        Ok(bytes) => {
            let found = serde_json::from_slice::<Owner>(&bytes).map(|owner| owner.incarnation);
            let found = found.unwrap_or_else(|_| "that cannot be read".to_owned());
            if found != owner.incarnation {
                return Err(IdentityError::OtherFolder {
                    path,
                    found,
                    expected: owner.incarnation,
                });
            }
            Ok(())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let text = serde_json::to_vec_pretty(&owner)
                .map_err(std::io::Error::other)
                .map_err(failed)?;
            crate::small_file::replace(&path, &text).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

/// The witness for what was committed before the daemon's own: a time of this machine from before the first
/// decoding, kept in the database so that decoding again gives the same stamps. Without it the first transactions
/// of a server with a wild clock would be stamped by that clock alone.
pub(super) async fn first_witness(sql: &Client) -> Result<i64, tokio_postgres::Error> {
    // No node has the id 0, so no fold takes the row for a witness when it comes by in the stream.
    const FIRST: &str = "SELECT witness_us FROM anabranch.clock WHERE node_id = 0";
    if let Some(row) = sql.query_opt(FIRST, &[]).await? {
        return row.try_get(0);
    }
    // `local`: before decoding begins a synchronous standby that is this daemon could not answer.
    sql.batch_execute(&format!(
        "BEGIN READ WRITE; SET LOCAL synchronous_commit = local; \
         INSERT INTO anabranch.clock (node_id, witness_us) VALUES (0, {}) ON CONFLICT DO NOTHING; COMMIT",
        crate::shared::now_us()
    ))
    .await?;
    sql.query_one(FIRST, &[]).await?.try_get(0)
}

/// Compares the server with the one that was prepared.
pub(crate) fn check_server(_: &Config, row: &NodeRow, server: &Identity) -> Result<(), IdentityError> {
    let found = server.system_id.to_string();
    if found != row.system_identifier {
        return Err(IdentityError::OtherServer {
            expected: row.system_identifier.clone(),
            found,
        });
    }
    Ok(())
}
