//! What a second run of a join knows of the first: the attempt's incarnation, in `join.json` of the daemon's folder;
//! and in the database itself what is done, each committed together with it.

use std::path::{Path, PathBuf};

use anabranch_proto::NodeId;
use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use super::{Error, io, sql};
use crate::config::Config;
use crate::donor::Cut;

const FILE: &str = "join.json";
/// The step after which nothing of the donor is needed any more.
const COPIED: &str = "all but materialised views";

/// Form of what is kept in schema `anabranch_join`. What was begun in another form is not gone on with: its words for what is done are
/// others. Nor is it thrown away unasked: another release held other databases for empty, and may have begun in one that is not.
const FORM: i32 = 2;

/// An attempt to join.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) incarnation: String,
    /// Ids of the members that were asked to take this node in: each may have said that it is a member.
    #[serde(default)]
    pub(crate) asked: Vec<u16>,
    /// As which node, once one was asked: under another id they would wait for this one for ever.
    #[serde(default)]
    node: Option<u16>,
    #[serde(skip)]
    path: PathBuf,
}

impl State {
    /// The attempt that was begun here, or a new one.
    pub(crate) fn open(config: &Config) -> Result<Self, Error> {
        let dir = &config.node.data_dir;
        crate::small_file::make_folder(dir).map_err(io(format!("make {}", dir.display())))?;
        if let Some(begun) = Self::begun(config)? {
            return Ok(begun);
        }
        for name in ["journal", "node.json", "checkpoint.json"] {
            if dir.join(name).exists() {
                return Err(Error::Refused(format!(
                    "node.data_dir {} holds another node's {name}: empty the folder, or choose another",
                    dir.display()
                )));
            }
        }
        let state = Self {
            incarnation: uuid::Uuid::new_v4().to_string(),
            asked: Vec::new(),
            node: None,
            path: dir.join(FILE),
        };
        state.keep()?;
        Ok(state)
    }

    fn keep(&self) -> Result<(), Error> {
        let text = serde_json::to_vec_pretty(self).unwrap_or_default();
        crate::small_file::replace(&self.path, &text).map_err(io("write join.json"))
    }

    /// A member is to be asked to take this node in. Written down before it is: whoever gives the join up must know all that may have.
    pub(crate) fn will_ask(&mut self, member: NodeId, own: NodeId) -> Result<(), Error> {
        let is_asked = self.asked.contains(&member.0);
        if is_asked && self.node == Some(own.0) {
            return Ok(());
        }
        if !is_asked {
            self.asked.push(member.0);
        }
        self.node = Some(own.0);
        self.keep()
    }

    /// The one that was asked refuses its id, or its name: nobody waits for it, and it may come with others.
    pub(crate) fn was_refused(&mut self) -> Result<(), Error> {
        if self.asked.len() > 1 {
            return Ok(());
        }
        self.node = None;
        self.keep()
    }

    /// The attempt that was begun here, if any was.
    pub(crate) fn begun(config: &Config) -> Result<Option<Self>, Error> {
        let path = config.node.data_dir.join(FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io("read join.json")(error)),
        };
        let state: Self = serde_json::from_slice(&bytes).map_err(|error| {
            Error::Refused(format!(
                "{} cannot be read ({error}): move it away, then give the join up with `--abandon`",
                path.display()
            ))
        })?;
        if let Some(node) = state.node.filter(|&node| node != config.node.id.0) {
            return Err(Error::Refused(format!(
                "the join that was begun here is that of node {node}, and members may know it: set node.id to {node} again, and go on with \
                 it, or give it up with `--abandon` before another id is taken"
            )));
        }
        Ok(Some(Self { path, ..state }))
    }

    /// Has this attempt made the database a node, with nothing left to do in it? Only the file was not removed yet.
    pub(crate) async fn is_complete(&self, admin: &Client) -> Result<bool, tokio_postgres::Error> {
        let row = admin
            .query_one(
                "SELECT to_regclass('anabranch.node') IS NOT NULL AND to_regnamespace('anabranch_join') IS NULL",
                &[],
            )
            .await?;
        if !row.try_get::<_, bool>(0)? {
            return Ok(false);
        }
        let row = admin
            .query_one(
                "SELECT EXISTS (SELECT FROM anabranch.node WHERE incarnation::text = $1)",
                &[&self.incarnation],
            )
            .await?;
        row.try_get(0)
    }

    /// Is all done but what is made of the copy alone? Then the donor's snapshot is let go: no other may be asked for.
    pub(crate) async fn is_copied(&self, config: &Config, admin: &Client) -> Result<bool, Error> {
        let row = admin
            .query_one(
                "SELECT to_regclass('anabranch.node') IS NOT NULL AND to_regclass('anabranch_join.done') IS NOT NULL \
                 AND to_regclass('anabranch_join.view') IS NOT NULL",
                &[],
            )
            .await
            .map_err(sql("read what is done"))?;
        let is_there: bool = row.try_get(0).map_err(sql("read what is done"))?;
        if !is_there || !is_done(admin, COPIED).await? {
            return Ok(false);
        }
        let row = admin
            .query_one(
                "SELECT EXISTS (SELECT FROM anabranch.node WHERE incarnation::text = $1)",
                &[&self.incarnation],
            )
            .await
            .map_err(sql("read anabranch.node"))?;
        let is_ours: bool = row.try_get(0).map_err(sql("read anabranch.node"))?;
        // (Written before it was said.)
        Ok(is_ours && config.node.data_dir.join("checkpoint.json").exists())
    }

    /// The attempt is over.
    pub(crate) fn remove(&self) -> Result<(), Error> {
        if let Some(dir) = self.path.parent() {
            super::stage::forget(dir);
        }
        std::fs::remove_file(&self.path).map_err(io("remove join.json"))
    }
}

/// Was a join begun with this folder, and is not over?
pub(super) fn is_begun(data_dir: &Path) -> bool {
    data_dir.join(FILE).exists()
}

/// Makes the schema that remembers what is done, and the database read only by default.
pub(crate) async fn prepare(admin: &Client) -> Result<(), Error> {
    admin
        .batch_execute(
            "CREATE SCHEMA IF NOT EXISTS anabranch_join;
             CREATE TABLE IF NOT EXISTS anabranch_join.cut (snapshot text, epoch bigint, lsn text);
             ALTER TABLE anabranch_join.cut ADD COLUMN IF NOT EXISTS form int;
             CREATE TABLE IF NOT EXISTS anabranch_join.dump (section text PRIMARY KEY, sql text NOT NULL);
             CREATE TABLE IF NOT EXISTS anabranch_join.pieces (relation oid PRIMARY KEY, blocks bigint NOT NULL, piece bigint NOT NULL);
             CREATE TABLE IF NOT EXISTS anabranch_join.done (what text PRIMARY KEY);
             CREATE TABLE IF NOT EXISTS anabranch_join.view (place bigint NOT NULL, name text PRIMARY KEY);
             DO $$ BEGIN
                 -- Looked at once: what the join makes is not among it.
                 IF to_regclass('anabranch_join.was_there') IS NULL THEN
                     CREATE TABLE anabranch_join.was_there (classid oid, objid oid, PRIMARY KEY (classid, objid));
                     INSERT INTO anabranch_join.was_there
                         SELECT tableoid, oid FROM pg_extension UNION ALL SELECT tableoid, oid FROM pg_default_acl;
                 END IF;
             END $$;
             DO $$ BEGIN
                 EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = on', current_database());
             END $$",
        )
        .await
        .map_err(sql("prepare the database"))
}

/// Is the database, with an unfinished join in it, a node that this attempt has not made? What a join would throw away is not its own.
/// (Until the slot is made an attempt's own row may have another incarnation.)
pub(crate) async fn foreign_node(
    admin: &Client,
    begun: Option<&State>,
) -> Result<Option<String>, tokio_postgres::Error> {
    let row = admin
        .query_one(
            "SELECT to_regclass('anabranch.node') IS NOT NULL AND to_regnamespace('anabranch_join') IS NOT NULL",
            &[],
        )
        .await?;
    if !row.try_get::<_, bool>(0)? {
        return Ok(None);
    }
    let incarnation = begun.map(|begun| begun.incarnation.as_str());
    let row = admin
        .query_opt(
            "SELECT node_id, name FROM anabranch.node
             WHERE slot_start IS NOT NULL AND incarnation::text IS DISTINCT FROM $1::text",
            &[&incarnation],
        )
        .await?;
    row.map(|row| {
        let (id, name): (i32, String) = (row.try_get(0)?, row.try_get(1)?);
        Ok(format!(
            "is node {id} ({name}), which the join of this node.data_dir has not made"
        ))
    })
    .transpose()
}

/// What to do about it.
pub(crate) const FOREIGN_NODE: &str = "if it was a node before, it has schema anabranch_join by mistake: DROP SCHEMA anabranch_join CASCADE, \
     and ALTER DATABASE ... RESET default_transaction_read_only; if it is an unfinished join's whose join.json is lost, make another \
     database, and join under another node.id";

/// True when what is there is of another cut.
///
/// # Errors
/// When it was begun by another release, or the database fails.
pub(crate) async fn begin(admin: &Client, cut: &Cut) -> Result<bool, Error> {
    let row = admin
        .query_opt("SELECT epoch, lsn, form FROM anabranch_join.cut", &[])
        .await
        .map_err(sql("read what was copied before"))?;
    let Some(row) = row else {
        remember_cut(admin, cut).await?;
        return Ok(false);
    };
    let values = || -> Result<(i64, String, Option<i32>), tokio_postgres::Error> {
        Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))
    };
    let (epoch, lsn, form) = values().map_err(sql("read what was copied before"))?;
    if form != Some(FORM) {
        return Err(Error::Refused(
            "this join was begun by another release of anabranch, and cannot be gone on with: look whether anything in the database is \
             to be kept, then give the join up with `--abandon`, which drops all objects that are no extension's, and begin again with another \
             `node.id`"
                .to_owned(),
        ));
    }
    // Whatever its snapshot is called now: whoever holds it gives it another name.
    Ok(epoch != i64::from(cut.epoch) || lsn != cut.lsn.to_string())
}

/// Writes down which cut is copied, with nothing done of it.
pub(crate) async fn remember_cut(admin: &Client, cut: &Cut) -> Result<(), Error> {
    prepare(admin).await?;
    admin
        .batch_execute(&format!(
            "BEGIN; TRUNCATE anabranch_join.cut, anabranch_join.dump, anabranch_join.pieces, anabranch_join.done, anabranch_join.view; \
             INSERT INTO anabranch_join.cut (snapshot, epoch, lsn, form) VALUES ({}, {}, '{}', {FORM}); COMMIT",
            crate::setup::sql::literal(&cut.snapshot),
            cut.epoch,
            cut.lsn
        ))
        .await
        .map_err(sql("remember the snapshot"))
}

/// Is a step done?
pub(crate) async fn is_done(admin: &Client, what: &str) -> Result<bool, Error> {
    let row = admin
        .query_one(
            "SELECT EXISTS (SELECT FROM anabranch_join.done WHERE what = $1)",
            &[&what],
        )
        .await
        .map_err(sql("read what is done"))?;
    row.try_get(0).map_err(sql("read what is done"))
}

/// See [`State::is_copied`].
pub(crate) async fn say_copied(admin: &Client) -> Result<(), Error> {
    admin
        .batch_execute(&done(COPIED))
        .await
        .map_err(sql("write down that all is copied"))
}

/// The statement that says so; it belongs into the step's own transaction.
pub(crate) fn done(what: &str) -> String {
    format!(
        "INSERT INTO anabranch_join.done VALUES ({}) ON CONFLICT DO NOTHING;",
        crate::setup::sql::literal(what)
    )
}

/// The same for a step that must not be done twice: fails with `UNIQUE_VIOLATION` when it is done. (The last words of a run that was
/// killed may be carried out after the next run has looked.)
pub(crate) fn done_once(what: &str) -> String {
    format!(
        "INSERT INTO anabranch_join.done VALUES ({});",
        crate::setup::sql::literal(what)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_join_that_members_may_know_goes_on_under_its_id_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::example();
        config.node.data_dir = dir.path().to_owned();
        config.node.id = NodeId(5);
        let mut state = State::open(&config).unwrap();
        state.will_ask(NodeId(1), config.node.id).unwrap();
        assert_eq!(State::open(&config).unwrap().incarnation, state.incarnation);
        config.node.id = NodeId(6);
        let refused = State::open(&config).map(drop).unwrap_err().to_string();
        assert!(refused.contains("that of node 5"), "{refused}");
        state.was_refused().unwrap();
        assert_eq!(State::open(&config).unwrap().asked, [1]);
        // Another may have taken it in before.
        config.node.id = NodeId(5);
        state.will_ask(NodeId(2), config.node.id).unwrap();
        state.was_refused().unwrap();
        config.node.id = NodeId(6);
        assert!(State::open(&config).is_err());
    }
}
