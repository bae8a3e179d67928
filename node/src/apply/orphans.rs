//! Orphans: rows that an apply transaction leaves with a foreign key that refers to nothing.
//!
//! In:   keys of the rows written, by way of [`Writer::note_touched`]        Out: lines for the conflict log
//! Holds: those keys until the transaction ends; of a large one only those that may still be orphans, up to a bound, and past
//!        it all rows of the table are looked at
//! Invariants: 1. tables without foreign keys cost nothing; others one indexed query for each key and apply transaction,
//!        never one a row; 2. a parent that a row refers to is locked as by PostgreSQL's own triggers, and who removes one locks
//!        its row: so of a local and a remote writer one sees the other; 3. what is looked at is what is there at the end of
//!        the transaction: the order of writes in it, deferred constraints and rows that were refused make no difference
//! Not here: the text of the queries ([`question`]), which of them are conflicts ([`judge`]), what becomes of them (`crate::daemon`)

mod gone;
mod judge;
mod question;
mod shown;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use anabranch_conflict::Version;
use anabranch_proto::schema::TableDesc;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use self::gone::Gone;
use super::batch::{Action, Write};
use super::failure::{Failure, Recovery};
use super::foreign::{ForeignKey, TableName};
use super::loss::Loss;
use super::plan::{Plan, Source, quote};
use super::write::{Parameter, Writer, keys_of, parameters, references};
use crate::index::RowKey;

/// Bytes of keys that are kept of a large transaction; past it whole tables are looked at.
const KEPT_BYTES: usize = 16 << 20;

/// Beside its key.
const ROW_BYTES: usize = 96;

/// What a transaction wrote of tables with foreign keys.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    tables: BTreeMap<TableName, Rows>,
    /// Of tables that are referred to by something else than their primary key: what the rows had there before, as JSON,
    /// and the write that came over it.
    former: BTreeMap<TableName, BTreeMap<String, Version>>,
    /// Tables of which so many rows went, or may have become orphans, that nobody remembers which.
    whole: BTreeSet<TableName>,
    /// Rows that go, where their children want them back.
    gone: Gone,
}

#[derive(Debug)]
struct Rows {
    desc: Arc<TableDesc>,
    /// The last write of each; in the order in which they are looked at, and their parents locked.
    rows: BTreeMap<RowKey, Touch>,
}

#[derive(Debug, Clone, Copy)]
struct Touch {
    is_put: bool,
    version: Version,
}

/// The rows that a query starts from.
enum From {
    /// Children, by their keys.
    Children(Arc<Plan>),
    /// Parents that went, by their keys.
    Parents(Arc<Plan>),
    /// Values that parents had, as JSON of this table's columns.
    Former(TableName),
    /// All children.
    All,
}

/// An orphan of a foreign key may be among these rows, or among those that referred to them.
struct Suspects {
    key: Arc<ForeignKey>,
    from: From,
    params: Vec<Parameter>,
    json: Vec<String>,
    /// By place in the parameters: the row, where it is named by its key, and the write of it.
    rows: Vec<(Option<RowKey>, Version)>,
}

impl Touched {
    fn is_empty(&self) -> bool {
        self.tables.is_empty() && self.former.is_empty() && self.whole.is_empty()
    }

    fn byte_count(&self) -> usize {
        let rows = self.tables.values().flat_map(|rows| rows.rows.keys());
        let rows: usize = rows.map(|key| key.heap_len() + ROW_BYTES).sum();
        let former = self.former.values().flat_map(BTreeMap::keys);
        rows + former.map(|json| json.len() + ROW_BYTES).sum::<usize>()
    }
}

fn name_of(plan: &Plan) -> TableName {
    (plan.local.schema.clone(), plan.local.name.clone())
}

impl Writer<'_> {
    /// Remembers what is about to be written, if its table has a part in foreign keys.
    pub(super) async fn note_touched(&mut self, plan: &Plan, actions: &[&Action]) -> Result<(), Failure> {
        let links = &plan.local.links;
        if links.is_empty() || actions.is_empty() {
            return Ok(());
        }
        if links.is_referred_to_otherwise() {
            self.note_former(plan, actions).await?;
        }
        if !links.referring.is_empty() {
            self.note_gone(plan, actions).await?;
        }
        for action in actions {
            let is_put = matches!(action.write, Write::Put(_));
            let matters = if is_put { &links.held } else { &links.referring };
            let name = || name_of(plan);
            if matters.is_empty() {
                // It may have been the other thing before.
                if let Some(rows) = self.touched.tables.get_mut(&name()) {
                    rows.rows.remove(&action.key);
                }
                continue;
            }
            let rows = self.touched.tables.entry(name()).or_insert_with(|| Rows {
                desc: Arc::clone(&action.table),
                rows: BTreeMap::new(),
            });
            let version = action.version;
            rows.rows.insert(action.key.clone(), Touch { is_put, version });
        }
        Ok(())
    }

    /// What these rows have in columns that others refer to, beside the primary key: the stream does not say it.
    async fn note_former(&mut self, plan: &Plan, actions: &[&Action]) -> Result<(), Failure> {
        let keys = plan.local.links.referring.iter().filter(|key| !key.to_primary);
        let columns: BTreeSet<&str> = keys
            .flat_map(|key| key.pairs.iter().map(|pair| pair.parent.as_str()))
            .collect();
        let pairs: Vec<String> = columns
            .into_iter()
            .map(|name| format!("'{}', t.{}", name.replace('\'', "''"), quote(name)))
            .collect();
        let sql = format!(
            "{} FOR UPDATE OF t",
            plan.read(&format!("jsonb_build_object({})::text", pairs.join(", ")))
        );
        let (array, text) = keys_of(plan, actions)?.finish();
        let params = parameters(array, None, text);
        let statement = self.session.prepare(&sql).await?;
        let found = self
            .session
            .client
            .query(&statement, &references(&params))
            .await?;
        let former = self.touched.former.entry(name_of(plan)).or_default();
        for row in found {
            let at = usize::try_from(row.try_get::<_, i64>(0)?).unwrap_or(0);
            if let Some(action) = at.checked_sub(1).and_then(|at| actions.get(at)) {
                former.insert(row.try_get(1)?, action.version);
            }
        }
        Ok(())
    }

    /// All rows of a table went, or all but some.
    pub(super) fn note_emptied(&mut self, plan: &Plan) {
        if !plan.local.links.referring.is_empty() {
            self.touched.whole.insert(name_of(plan));
        }
    }

    /// In the middle of a large transaction: forgets the rows of which it is known by now that they are no orphans and made
    /// none. Those that are left may still be mended by what comes.
    pub(super) async fn sift_touched(&mut self) -> Result<(), Failure> {
        if self.touched.is_empty() {
            return Ok(());
        }
        self.sift(true).await.map_err(about_keys)?;
        if self.touched.byte_count() > KEPT_BYTES {
            let touched = &mut self.touched;
            let names = std::mem::take(&mut touched.tables).into_keys();
            touched
                .whole
                .extend(names.chain(std::mem::take(&mut touched.former).into_keys()));
        }
        Ok(())
    }

    /// The lines for rows that this transaction, which is about to commit, leaves without their parents.
    pub(crate) async fn orphans(&mut self, may_wait: bool) -> Result<Vec<Loss>, Failure> {
        if self.touched.is_empty() {
            return Ok(Vec::new());
        }
        self.find_orphans(may_wait).await.map_err(about_keys)
    }

    async fn find_orphans(&mut self, may_wait: bool) -> Result<Vec<Loss>, Failure> {
        self.sift(may_wait).await?;
        if self.touched.is_empty() {
            return Ok(Vec::new());
        }
        let suspects = self.suspects().await?;
        let gone = std::mem::take(&mut self.touched).gone;
        self.judge(&suspects, may_wait, &gone).await
    }

    /// Asks of each foreign key which of the rows may be, or may have made, orphans; forgets the others.
    async fn sift(&mut self, may_wait: bool) -> Result<(), Failure> {
        let (mut keys, mut former) = (HashSet::new(), HashSet::new());
        for suspects in self.suspects().await? {
            let Some(sql) = suspects.question(may_wait) else {
                continue;
            };
            for row in self.ask(&suspects, &sql).await? {
                let Some(at) = place(&row)? else { continue };
                if let Some((Some(key), _)) = suspects.rows.get(at) {
                    keys.insert(key.clone());
                }
                if let (From::Former(name), Some(json)) = (&suspects.from, suspects.json.get(at)) {
                    former.insert((name.clone(), json.clone()));
                }
            }
        }
        let touched = &mut self.touched;
        for rows in touched.tables.values_mut() {
            rows.rows.retain(|key, _| keys.contains(key));
        }
        touched.tables.retain(|_, rows| !rows.rows.is_empty());
        for (name, values) in &mut touched.former {
            values.retain(|json, _| former.contains(&(name.clone(), json.clone())));
        }
        touched.former.retain(|_, values| !values.is_empty());
        Ok(())
    }

    /// For each foreign key the rows to be looked at; those that came first, for one that is found twice.
    async fn suspects(&mut self) -> Result<Vec<Suspects>, Failure> {
        let mut out = Vec::new();
        for (name, rows) in &self.touched.tables {
            let links = self.session.links(name).await?;
            // Rows that went need not be described as the table is here.
            let plan = match self.session.plan_of_key(&rows.desc).await.map_err(Failure::from) {
                Ok(plan) => plan,
                // Its rows are not here any more, or were all refused.
                Err(Failure::Table(_)) => continue,
                // What the server refused has ended the transaction, whose COMMIT would pass for one.
                Err(failure) => return Err(failure),
            };
            for (is_put, keys) in [(true, &links.held), (false, &links.referring)] {
                let some = rows.rows.iter().filter(|(_, touch)| touch.is_put == is_put);
                let some = some.map(|(key, touch)| (Some(key.clone()), touch.version));
                let some: Vec<(Option<RowKey>, Version)> = some.collect();
                if some.is_empty() {
                    continue;
                }
                for key in keys.iter().filter(|key| is_put || key.to_primary) {
                    let mut array = plan.rows();
                    for row in some.iter().filter_map(|row| row.0.as_ref()) {
                        let image = rows.desc.image_of_canonical(row.canonical())?;
                        array.push(&Source::Key(&image))?;
                    }
                    let (array, text) = array.finish();
                    let plan = Arc::clone(&plan);
                    out.push(Suspects {
                        key: Arc::clone(key),
                        from: if is_put {
                            From::Children(plan)
                        } else {
                            From::Parents(plan)
                        },
                        params: parameters(array, None, text),
                        json: Vec::new(),
                        rows: some.clone(),
                    });
                }
            }
        }
        for (name, values) in &self.touched.former {
            let links = self.session.links(name).await?;
            for key in links.referring.into_iter().filter(|key| !key.to_primary) {
                out.push(Suspects {
                    key,
                    from: From::Former(name.clone()),
                    params: Vec::new(),
                    json: values.keys().cloned().collect(),
                    rows: values.values().map(|version| (None, *version)).collect(),
                });
            }
        }
        for name in &self.touched.whole {
            let links = self.session.links(name).await?;
            for key in links.held.into_iter().chain(links.referring) {
                out.push(Suspects {
                    key,
                    from: From::All,
                    params: Vec::new(),
                    json: Vec::new(),
                    rows: Vec::new(),
                });
            }
        }
        out.sort_by_key(|suspects| !matches!(suspects.from, From::Children(_)));
        Ok(out)
    }

    /// Runs a statement over the suspects.
    async fn ask(&mut self, suspects: &Suspects, sql: &str) -> Result<Vec<Row>, Failure> {
        // The session's plans go by indexes. Without one each parent would be a scan of the children; so they are one together.
        let scans = !suspects.key.is_indexed && !matches!(suspects.from, From::Children(_));
        if scans {
            self.session
                .client
                .batch_execute("SET LOCAL enable_hashjoin = on")
                .await?;
        }
        let statement = self.session.prepare(sql).await?;
        let json = [&suspects.json as &(dyn ToSql + Sync)];
        let params = match suspects.from {
            From::Children(_) | From::Parents(_) => references(&suspects.params),
            From::Former(_) => json.to_vec(),
            From::All => Vec::new(),
        };
        let rows = self.session.client.query(&statement, &params).await?;
        if scans {
            self.session
                .client
                .batch_execute("SET LOCAL enable_hashjoin = off")
                .await?;
        }
        Ok(rows)
    }
}

/// The place in the parameters that a row begins with.
fn place(row: &Row) -> Result<Option<usize>, tokio_postgres::Error> {
    let ordinal: i64 = row.try_get(0)?;
    Ok(usize::try_from(ordinal)
        .ok()
        .and_then(|ordinal| ordinal.checked_sub(1)))
}

fn about_keys(failure: Failure) -> Failure {
    match failure.recovery() {
        Recovery::Isolate | Recovery::Stand => Failure::ForeignKeys(Box::new(failure)),
        _ => failure,
    }
}
