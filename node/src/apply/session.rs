//! The one session that applies: its settings, prepared statements and table cache.
//!
//! Invariants: the session holds the advisory lock that fences a second daemon, for as long as it lives. Only a session
//! that a daemon of this data folder opened, and that is hence without a daemon, is ended for it. Outside of a transaction that
//! [`BEGIN`] has begun it writes nothing: what is sent behind a BEGIN that fails is refused.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anabranch_proto::schema::{ColumnDesc, TableDesc};
use anabranch_proto::{NodeId, Position, Vector};
use bytes::{Bytes, BytesMut};
use tokio_postgres::types::{Format, IsNull, ToSql, Type};
use tokio_postgres::{Client, Statement};

use super::catalog::{self, LocalTable};
use super::failure::Failure;
use super::foreign::{self, KeysByTable, Links, TableName};
use super::late::{self, Extended};
use super::own_tables::OwnTables;
use super::passed_over::Rule;
use super::plan::{Mismatch, Plan};
use super::retyped::{self, Retyped, RetypedTables};
use crate::broken;
use crate::config::{Config, MissingColumns};
use crate::pg;
use crate::pg::xid::{self, Snapshot};
use crate::shared::{Shared, Visibility};
use crate::small_file;

/// Begins an apply transaction. Statements are sent behind it without waiting for its answer. Should it fail (it may be
/// cancelled), each of them would be a transaction of its own, with rows that pass for local writes; so the session is read
/// only by default.
pub(crate) const BEGIN: &str = "BEGIN READ WRITE";

/// First key of the advisory lock, the letters "anab"; the second is the node's id.
const LOCK_CLASS: i32 = 0x616e_6162;

/// Why a session cannot begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] pg::Error),
    /// A statement failed.
    #[error("preparing the apply session: {}", crate::error::sql(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// Another daemon works on this database.
    #[error(
        "another daemon is connected to this database as its replicator (advisory lock {LOCK_CLASS}, {0} is held): \
         stop it first; if it ran on a machine that is gone, end its session with pg_terminate_backend"
    )]
    Fenced(u16),
}

/// Why a table cannot be applied to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TableError {
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
}

/// The apply session.
pub(crate) struct Session {
    pub(crate) client: Client,
    backend: i32,
    statements: HashMap<String, Statement>,
    tables: HashMap<(String, String), Arc<LocalTable>>,
    /// By the description's address, which the entry keeps alive.
    plans: HashMap<usize, (Arc<TableDesc>, Arc<Plan>)>,
    /// Such with columns more.
    pub(super) extended: Extended,
    /// Such with columns of other types.
    retyped: RetypedTables,
    own_tables: Arc<OwnTables>,
    /// Are there any in `anabranch.added_column`?
    added_columns: Option<bool>,
    /// How much DDL of this node the plans know of ([`Shared::own_ddl`]).
    own_ddl: u64,
    /// Transactions that shall still do without COPY, since one was refused.
    copy_pause: u32,
    /// Read with the first table.
    foreign: Option<KeysByTable>,
    /// Nothing is looked for by them.
    ignores_foreign: bool,
    /// Rows are written without columns that their table here does not have.
    drops_columns: bool,
    /// Which tables are not replicated here.
    pub(crate) passed_over: Rule,
    /// How much DDL of this node they were read behind.
    passed_over_of: u64,
    /// Where there is more: how much, and the place in the stream up to which all must be visible before they are read for good.
    unread_ddl: Option<(u64, Position)>,
    /// Origins whose rows of `anabranch.progress` were there.
    with_progress: HashSet<NodeId>,
    /// What the last transaction's first statement saw.
    pub(crate) snapshot: Option<Snapshot>,
}

/// How many transactions do without COPY after one was refused: where two nodes insert the same keys, the next
/// would be refused as well, and a refused one is all for nothing.
const COPY_PAUSE: u32 = 100;

/// So many own transactions are asked about at once: many may wait behind the first that is not visible.
const ASKED_AT_ONCE: usize = 10_000;

/// After how many looks at the lock its holder is ended, if it is a session of this data folder: one second.
const STALE_AFTER: i32 = 4;

/// Which session holds the lock, in `node.data_dir`: `PID BACKEND_START`, the latter as the server prints it.
const HOLDER_FILE: &str = "apply-session";

/// Writes down that this session holds the lock. Where that fails, a successor waits for people if need be.
async fn remember(client: &Client, dir: &Path) -> Result<(), Error> {
    let me = "SELECT pid || ' ' || backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()";
    let me: String = client.query_one(me, &[]).await?.try_get(0)?;
    if let Err(error) = small_file::replace(&dir.join(HOLDER_FILE), me.as_bytes()) {
        tracing::warn!(%error, "cannot write {HOLDER_FILE} in node.data_dir");
    }
    Ok(())
}

/// Ends the session that holds the lock, if a daemon of this data folder opened it. The folder is locked by this daemon,
/// so that one is gone (or this very one, and its connection is lost); but a backend that waits for a lock, or whose
/// host went without a word, does not notice.
async fn end_stale(client: &Client, node: i32, dir: &Path) -> Result<(), Error> {
    let end = "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity USING (pid) \
        WHERE locktype = 'advisory' AND granted AND datname = current_database() AND pg_locks.database = datid \
        AND classid = $1::int4::oid AND objid = $2::int4::oid AND objsubid = 2 AND pid || ' ' || backend_start = $3";
    let Ok(ours) = std::fs::read_to_string(dir.join(HOLDER_FILE)) else {
        return Ok(());
    };
    if client
        .query_opt(end, &[&LOCK_CLASS, &node, &ours])
        .await?
        .is_some()
    {
        tracing::warn!(session = ours, "ended the apply session of a daemon that is gone");
    }
    Ok(())
}

impl Session {
    pub(crate) async fn open(config: &Config) -> Result<Self, Error> {
        let (client, _driver) = pg::connect(&config.postgres, "apply").await?;
        client
            .batch_execute(&format!(
                "SET session_replication_role = replica; SET lock_timeout = {}; SET synchronous_commit = off; \
                 SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET enable_hashjoin = off; \
                 SET enable_mergejoin = off; SET enable_material = off; SET jit = off; \
                 SET default_transaction_read_only = on",
                config.apply.lock_timeout_ms
            ))
            .await?;
        client.batch_execute(pg::ROW_SECURITY_OF_OTHERS).await?;
        let node = i32::from(config.node.id.0);
        // The session of a daemon that was just killed may take a moment to go.
        for attempt in 0..20 {
            let locked = client
                .query_one(
                    "SELECT pg_try_advisory_lock($1, $2), pg_backend_pid()",
                    &[&LOCK_CLASS, &node],
                )
                .await?;
            if locked.try_get(0)? {
                let backend = locked.try_get(1)?;
                remember(&client, &config.node.data_dir).await?;
                return Ok(Self {
                    client,
                    backend,
                    statements: HashMap::new(),
                    tables: HashMap::new(),
                    plans: HashMap::new(),
                    extended: Extended::default(),
                    retyped: RetypedTables::default(),
                    own_tables: Arc::default(),
                    added_columns: None,
                    own_ddl: 0,
                    copy_pause: 0,
                    foreign: None,
                    ignores_foreign: false,
                    drops_columns: config.ddl.missing_columns == MissingColumns::Drop,
                    passed_over: Rule::of(config),
                    passed_over_of: 0,
                    unread_ddl: None,
                    with_progress: HashSet::new(),
                    snapshot: None,
                });
            }
            tracing::debug!(attempt, "advisory lock is held by another session");
            if attempt == STALE_AFTER {
                end_stale(&client, node, &config.node.data_dir).await?;
            }
            tokio::time::sleep(std::time::Duration::from_millis(250)).await;
        }
        Err(Error::Fenced(config.node.id.0))
    }

    /// Is the role still the one that the open transaction's first statement has set `row_security` for? (What is prepared already sees
    /// as before; what is prepared anew sees what policies show.)
    pub(crate) async fn sees_as_at_begin(&self) -> Result<bool, tokio_postgres::Error> {
        const SAME: &str = "SELECT (rolsuper OR rolbypassrls) = (current_setting('row_security') = 'on') FROM pg_roles \
            WHERE rolname = current_user";
        self.client.query_one(SAME, &[]).await?.try_get(0)
    }

    /// Is one of the own transactions up to `position`, or among `others` (32 bits of their ids), which are decoded, not visible here yet? (Where
    /// commits wait for peers nobody may wait for them: false.)
    pub(crate) async fn hides(
        &mut self,
        shared: &Shared,
        position: Position,
        others: &HashSet<u32>,
    ) -> Result<bool, tokio_postgres::Error> {
        if *shared.visibility.borrow() == Visibility::BeforeDependents
            || broken::is(broken::Rule::VisibilityGate)
        {
            return Ok(false);
        }
        let mut unseen = shared.unseen_up_to(position, others);
        if let Some(snapshot) = &self.snapshot {
            unseen.retain(|&xid| !snapshot.shows(xid));
        }
        if unseen.is_empty() {
            return Ok(false);
        }
        let hidden = self.prepare(&xid::hidden()).await?;
        for some in unseen.chunks(ASKED_AT_ONCE) {
            let ids: Vec<i64> = some.iter().copied().map(i64::from).collect();
            if !self.client.query(&hidden, &[&ids]).await?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Tells upkeep which backend this is, so that it can look what it waits for.
    pub(crate) fn show(&self, shared: &Shared) {
        shared.apply_backend.store(self.backend, Ordering::Relaxed);
    }

    /// Which descriptions of tables are this node's.
    pub(crate) fn set_own_tables(&mut self, own: Arc<OwnTables>) {
        self.own_tables = own;
    }

    /// See [`Self::set_own_tables`].
    pub(crate) fn own_tables(&self) -> &OwnTables {
        &self.own_tables
    }

    /// Rows of `anabranch.progress` that are there: such a transaction was committed.
    pub(crate) fn note_progress(&mut self, reached: &Vector) {
        self.with_progress
            .extend(reached.iter().map(|(origin, _)| origin));
    }

    /// Is there a row of it for `origin`, as far as is known?
    pub(crate) fn has_progress(&self, origin: NodeId) -> bool {
        self.with_progress.contains(&origin)
    }

    /// One was not there.
    pub(crate) fn forget_progress(&mut self) {
        self.with_progress.clear();
    }

    /// The statement for `sql`, prepared once.
    pub(crate) async fn prepare(&mut self, sql: &str) -> Result<Statement, tokio_postgres::Error> {
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        let statement = self.client.prepare(sql).await?;
        if self.statements.len() >= 10_000 {
            self.statements.clear();
        }
        self.statements.insert(sql.to_owned(), statement.clone());
        Ok(statement)
    }

    /// The statement for `sql`, if it is prepared.
    pub(crate) fn prepared(&self, sql: &str) -> Option<Statement> {
        self.statements.get(sql).cloned()
    }

    /// What [`Self::plan`] gives, if that is known without asking the server.
    pub(crate) fn known_plan(&self, table: &Arc<TableDesc>) -> Option<Arc<Plan>> {
        let (_, plan) = self.plans.get(&(Arc::as_ptr(table) as usize))?;
        Some(Arc::clone(plan))
    }

    /// How rows described by `table` are written here.
    pub(crate) async fn plan(&mut self, table: &Arc<TableDesc>) -> Result<Arc<Plan>, TableError> {
        self.planned(table, true).await
    }

    /// The same; `None` where the table is not here or differs.
    pub(crate) async fn plan_if_fit(&mut self, table: &Arc<TableDesc>) -> Result<Option<Arc<Plan>>, Failure> {
        match self.plan(table).await {
            Ok(plan) => Ok(Some(plan)),
            Err(TableError::Catalog(catalog::Error::Sql(error))) => Err(Failure::Sql(error)),
            Err(_) => Ok(None),
        }
    }

    /// `whole`: rows are written by it, and not only found.
    async fn planned(&mut self, table: &Arc<TableDesc>, whole: bool) -> Result<Arc<Plan>, TableError> {
        let address = Arc::as_ptr(table) as usize;
        if let Some((_, plan)) = self.plans.get(&address) {
            return Ok(Arc::clone(plan));
        }
        let name = (table.schema.clone(), table.name.clone());
        let known = self.tables.get(&name).cloned();
        // It may have been made a moment ago, by somebody who means it for this node alone.
        if known.is_none()
            && !table.is_own()
            && self
                .passed_over
                .passes(&self.client, &name.0, &name.1)
                .await
                .map_err(catalog::Error::from)?
        {
            return Err(catalog::Error::Missing(name.0, name.1, catalog::APART).into());
        }
        let (drops, is_own) = (self.drops_columns, self.own_tables.holds(table));
        let mut plan = match known.map(|local| Plan::of(table, local, drops, is_own)) {
            Some(Ok(plan)) if plan.takes_all => plan,
            // Perhaps somebody has altered it since it was looked at: what it lacks may be there, what is generated may be no more.
            _ => {
                // Own DDL may be in the stream before others see it here; that of our own tables is `init`'s.
                let mut local = if table.is_own() {
                    catalog::load(&self.client, &table.schema, &table.name).await?
                } else {
                    catalog::load_settled(&self.client, &table.schema, &table.name).await?
                };
                local.links = self.links(&name).await.map_err(catalog::Error::from)?;
                let local = Arc::new(local);
                self.tables.insert(name, Arc::clone(&local));
                Plan::of(table, local, drops, is_own)?
            }
        };
        if whole
            && !plan.absent.is_empty()
            && !table.is_own()
            && self.has_added_columns().await.map_err(catalog::Error::from)?
        {
            plan.late = late::load(&self.client, &plan.local, &plan.absent).await?;
        }
        let plan = Arc::new(plan);
        if self.plans.len() >= 10_000 {
            self.plans.clear();
        }
        // Else it is looked at each time. (A description of a key alone was made for this once.)
        if plan.takes_all && whole {
            self.plans.insert(address, (Arc::clone(table), Arc::clone(&plan)));
        }
        Ok(plan)
    }

    /// How rows described by `table` are found here: by their key, whatever their other columns are.
    pub(crate) async fn plan_of_key(&mut self, table: &Arc<TableDesc>) -> Result<Arc<Plan>, TableError> {
        match self.plan(table).await {
            Err(TableError::Mismatch(
                Mismatch::NoColumn(..) | Mismatch::Type(..) | Mismatch::Added(..) | Mismatch::NoForm(..),
            )) => {
                // A key that is of another type, and the same.
                let retyped = self.retyped(table).await.map_err(catalog::Error::from)?;
                let table = retyped.map_or_else(|| Arc::clone(table), |retyped| Arc::clone(&retyped.table));
                self.planned(&Arc::new(table.key_alone()), false).await
            }
            planned => planned,
        }
    }

    /// How the table is emptied that `table` describes by a key which is another one here, or of another type: by the one that it has. Rows are
    /// not found by what `table` says.
    pub(crate) async fn plan_of_here(&mut self, table: &Arc<TableDesc>) -> Result<Arc<Plan>, TableError> {
        let name = (table.schema.clone(), table.name.clone());
        let Some(local) = self.tables.get(&name).cloned() else {
            return self.plan_of_key(table).await;
        };
        let key = local.key.iter().filter_map(|&at| local.columns.get(at));
        let columns: Vec<ColumnDesc> = key
            .map(|column| ColumnDesc {
                name: column.name.clone(),
                type_oid: column.type_oid,
                type_mod: -1,
                type_name: column.type_name.clone(),
            })
            .collect();
        let here = TableDesc {
            key: (0u16..).take(columns.len()).collect(),
            columns,
            ..TableDesc::clone(table)
        };
        self.planned(&Arc::new(here), false).await
    }

    /// How rows of a description get to fit that does not for the types of columns; `None` where it fits, or they do not get to.
    pub(super) async fn retyped(
        &mut self,
        table: &Arc<TableDesc>,
    ) -> Result<Option<Arc<Retyped>>, tokio_postgres::Error> {
        if table.is_own() || self.known_plan(table).is_some() {
            return Ok(None);
        }
        if let Some(known) = self.retyped.get(table) {
            return Ok(known);
        }
        let name = (table.schema.clone(), table.name.clone());
        let is_own = self.own_tables.holds(table);
        // As far as is known: where it has changed since, it does not fit when it is written, and all is read anew.
        let local = self.tables.get(&name);
        if local.is_some_and(|local| retyped::has_same_types(table, local, is_own)) {
            return Ok(None);
        }
        match self.plan(table).await {
            Err(TableError::Mismatch(Mismatch::Type(..))) => {}
            Err(TableError::Catalog(catalog::Error::Sql(error))) => return Err(error),
            Ok(_) | Err(_) => return Ok(None),
        }
        let Some(local) = self.tables.get(&name).cloned() else {
            return Ok(None);
        };
        let found = retyped::load(&self.client, table, &local, is_own).await?;
        Ok(self.retyped.insert(table, found))
    }

    /// The foreign keys of a table.
    pub(crate) async fn links(&mut self, table: &TableName) -> Result<Links, tokio_postgres::Error> {
        if self.ignores_foreign {
            return Ok(Links::default());
        }
        if self.foreign.is_none() {
            self.foreign = Some(KeysByTable::new(foreign::load(&self.client).await?));
        }
        Ok(self
            .foreign
            .as_ref()
            .map_or_else(Links::default, |keys| keys.of(table)))
    }

    /// Tables have no foreign keys from now on.
    pub(crate) fn ignore_foreign_keys(&mut self) {
        self.ignores_foreign = true;
        self.forget_tables();
    }

    /// Somebody has changed them.
    pub(crate) fn read_foreign_keys_again(&mut self) {
        self.ignores_foreign = false;
        self.forget_tables();
    }

    /// May the next transaction copy? Counts it.
    pub(crate) const fn may_copy(&mut self) -> bool {
        let may = self.copy_pause == 0;
        self.copy_pause = self.copy_pause.saturating_sub(1);
        may
    }

    /// A COPY was refused.
    pub(crate) const fn pause_copy(&mut self) {
        self.copy_pause = COPY_PAUSE;
    }

    /// Forgets tables and statements: something changed under us.
    pub(crate) fn forget_tables(&mut self) {
        self.statements.clear();
        self.tables.clear();
        self.plans.clear();
        self.extended.clear();
        self.retyped.clear();
        self.added_columns = None;
        self.foreign = None;
    }

    /// Has DDL added any column to any table?
    pub(super) async fn has_added_columns(&mut self) -> Result<bool, tokio_postgres::Error> {
        match self.added_columns {
            Some(any) => Ok(any),
            None => {
                let any = late::any(&self.client).await?;
                self.added_columns = Some(any);
                Ok(any)
            }
        }
    }

    /// So much DDL of this node was met: what was known of tables before is forgotten.
    pub(super) fn note_own_ddl(&mut self, said: u64) {
        if self.own_ddl != said {
            self.own_ddl = said;
            self.forget_tables();
        }
    }

    /// Reads anew which tables are not replicated here, once DDL of this node was met: it may have brought one into replication, and from
    /// then on others send its rows. As long as it is not known that such DDL is visible, each time.
    pub(super) async fn read_passed_over(&mut self, shared: &Shared) -> Result<(), tokio_postgres::Error> {
        let said = shared.own_ddl.load(Ordering::Acquire);
        if said == self.passed_over_of {
            return Ok(());
        }
        let upto = match self.unread_ddl {
            Some((of, upto)) if of == said => upto,
            _ => shared.last_decoded(),
        };
        self.unread_ddl = Some((said, upto));
        let is_seen = shared.is_visible(upto);
        shared.passed_over.read(&self.client, &self.passed_over).await?;
        if is_seen {
            self.passed_over_of = said;
        }
        Ok(())
    }

    /// Is that all that there was?
    pub(super) const fn knows_own_ddl(&self, said: u64) -> bool {
        self.own_ddl == said
    }
}

/// A parameter whose binary image is made already.
#[derive(Debug)]
pub(crate) struct Raw(pub(crate) Bytes);

impl ToSql for Raw {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        out.extend_from_slice(&self.0);
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        Format::Binary
    }

    tokio_postgres::types::to_sql_checked!();
}
