//! Which orphans are conflicts, and what is logged of them.
//!
//! In:   rows that may be, or may have made, orphans        Out: lines of type `foreign_key_missing`
//! Invariants: 1. what is judged is known: the rows are locked, and the decoder has passed the lock; 2. an orphan's id is made of
//!        the key's name, the row and the version that it has, so it is one on all nodes
//! Not here: the rule ([`anabranch_conflict::orphan`])

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use anabranch_conflict::orphan::{self, Parent};
use anabranch_conflict::policy::ForeignKeys;
use anabranch_conflict::{ConflictType, Resolution, Version};
use anabranch_proto::Vector;
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;

use super::super::failure::Failure;
use super::super::foreign::{ForeignKey, TableName};
use super::super::loss::{KeyFrom, Loser, Loss, Refusal, Tuple};
use super::super::plan::quote;
use super::super::write::Writer;
use super::gone::Gone;
use super::question::{ORPHANS_MAX, sql_name};
use super::{From, Suspects, place};
use crate::index::RowKey;
use crate::review::or_json_null;
use crate::shared::lock;
use crate::verify::table::{self, Compared};

/// The row `t` as JSON, as lines show it: with the null of JSON told from NULL.
fn whole(table: &TableDesc) -> String {
    let columns = table.columns.iter().map(|column| {
        let name = quote(&column.name);
        let value = or_json_null(column.type_oid, &column.type_name, format!("t.{name}"));
        format!("{value} AS {name}")
    });
    let columns = columns.collect::<Vec<_>>().join(", ");
    format!("(SELECT row_to_json(r.*)::text FROM (SELECT {columns}) AS r)")
}

/// A row without a parent.
struct Orphan {
    key: Arc<ForeignKey>,
    table: Arc<TableDesc>,
    /// Image of its key.
    image: RowImage,
    shown: Tuple,
    detail: String,
    /// The parent's key, by the description of a table that may have had it; none where that is not known.
    parent: Option<(Arc<TableDesc>, RowImage)>,
    /// The write that took the parent away, if that was found first.
    removed_by: Option<Version>,
    /// Did the row come in with this transaction?
    is_incoming: bool,
}

/// Tables as they are read.
pub(super) type Known = HashMap<TableName, Arc<Compared>>;

impl Writer<'_> {
    pub(super) async fn judge(
        &mut self,
        suspects: &[Suspects],
        may_wait: bool,
        gone: &Gone,
    ) -> Result<Vec<Loss>, Failure> {
        let (mut known, mut orphans) = (Known::new(), Vec::new());
        for some in suspects {
            let children = match &some.from {
                From::Children(plan) => vec![super::name_of(plan)],
                _ => some.key.children.clone(),
            };
            for child in &children {
                orphans.extend(self.read_orphans(some, child, &mut known, may_wait).await?);
            }
        }
        if orphans.is_empty() {
            return Ok(Vec::new());
        }
        self.fence.pass(self.shared).await?;
        let (mut lines, mut seen) = (Vec::new(), HashSet::new());
        for orphan in orphans {
            let row = lock(&self.shared.resolver).key_of_image(&orphan.table, &orphan.image)?;
            if !seen.insert((orphan.key.name.clone(), row.clone())) {
                continue;
            }
            let (key, parent) = (Arc::clone(&orphan.key), orphan.parent.clone());
            let Some(mut line) = self.judge_one(orphan, row)? else {
                continue;
            };
            // Only who wrote the row brings its parent back: the others need not know what it was.
            let is_own = line
                .losing()
                .is_some_and(|version| version.origin() == self.shared.node);
            if let (Some(parent), Resolution::RestoreParent, true) = (parent, line.resolution, is_own) {
                let again = self.parents_again(gone, &key, parent, &mut known).await?;
                line.reason
                    .iter_mut()
                    .for_each(|reason| reason.parents.clone_from(&again));
            }
            lines.push(line);
        }
        Ok(lines)
    }

    async fn read_orphans(
        &mut self,
        suspects: &Suspects,
        child: &TableName,
        known: &mut Known,
        may_wait: bool,
    ) -> Result<Vec<Orphan>, Failure> {
        let key = &suspects.key;
        let Some(of_child) = self.known(known, child).await? else {
            return Ok(Vec::new());
        };
        let of_parent = match key.parents.first().filter(|_| key.to_primary) {
            Some(parent) => self.known(known, parent).await?,
            None => None,
        };
        // No `to_jsonb`: a value that it refuses would keep all other orphans from being found.
        let mut columns = vec![whole(&of_child.desc), detail(key)];
        columns.push(of_child.images(of_child.desc.key_columns()));
        if of_parent.is_some() {
            columns.extend(key.values_of("t"));
        }
        let sql = suspects.details(&sql_name(child), &columns.join(", "), may_wait);
        let rows = self.ask(suspects, &sql).await?;
        if rows.len() >= ORPHANS_MAX {
            tracing::warn!(
                constraint = key.name,
                "more than {ORPHANS_MAX} rows lost their parents at once: the others are not in the conflict log"
            );
        }
        let key_width = of_child.desc.key.len();
        let mut out = Vec::with_capacity(rows.len());
        for row in rows {
            let parent = match &of_parent {
                Some(parent) => Some((Arc::clone(&parent.desc), parent.key_image(&row, 3 + key_width)?)),
                None => None,
            };
            let is_incoming = matches!(suspects.from, From::Children(_));
            let written = place(&row)?.and_then(|at| suspects.rows.get(at));
            out.push(Orphan {
                key: Arc::clone(key),
                table: Arc::clone(&of_child.desc),
                image: of_child.key_image(&row, 3)?,
                shown: self.shown(row.try_get(1)?, &of_child.desc).await?,
                detail: row.try_get(2)?,
                parent,
                removed_by: written.map(|written| written.1).filter(|_| !is_incoming),
                is_incoming,
            });
        }
        Ok(out)
    }

    pub(super) async fn known(
        &self,
        known: &mut Known,
        name: &TableName,
    ) -> Result<Option<Arc<Compared>>, Failure> {
        if let Some(table) = known.get(name) {
            return Ok(Some(Arc::clone(table)));
        }
        match Compared::load(&self.session.client, &name.0, &name.1).await {
            Ok(table) => {
                let table = Arc::new(table);
                known.insert(name.clone(), Arc::clone(&table));
                Ok(Some(table))
            }
            Err(table::Error::Catalog(super::super::catalog::Error::Sql(error))) => Err(error.into()),
            // Without a key it is not replicated.
            Err(_) => Ok(None),
        }
    }

    fn judge_one(&self, orphan: Orphan, row: RowKey) -> Result<Option<Loss>, Failure> {
        let (current, parent) = {
            let mut resolver = lock(&self.shared.resolver);
            let parent = match &orphan.parent {
                Some((desc, image)) => orphan.key.parent_now(&mut resolver, desc, image)?,
                None => Parent::Unknown,
            };
            (resolver.current(&row)?, parent)
        };
        if current.is_some_and(|entry| !entry.is_there()) {
            // It is about to go itself.
            return Ok(None);
        }
        let judged = orphan::Orphan {
            child: current.map(|entry| entry.version),
            parent,
            removed_by: orphan.removed_by,
            to_primary: orphan.key.to_primary,
        };
        let Some(sides) = orphan::judge(&judged, |one, other| self.had_seen(one, other))? else {
            return Ok(None);
        };
        let (child, removed_by) = (sides.child, sides.removed_by);
        Ok(Some(self.line_of_orphan(orphan, row, child, removed_by)))
    }

    /// Had the transaction of `one` seen `other`?
    fn had_seen(&self, one: Version, other: Version) -> Result<bool, Failure> {
        let recent = lock(&self.shared.recent).get(one.stamp);
        let deps: Option<Arc<Vector>> = match recent {
            Some(info) => Some(info.deps),
            None => self.lookup.header(one)?.map(|header| Arc::new(header.deps)),
        };
        let same = one.stamp == other.stamp;
        Ok(same || deps.is_some_and(|deps| other.covered_by(&deps)))
    }

    fn line_of_orphan(
        &self,
        orphan: Orphan,
        row: RowKey,
        child: Option<Version>,
        removed_by: Option<Version>,
    ) -> Loss {
        let foreign_keys = lock(&self.shared.resolver).foreign_keys(&orphan.table);
        let child_tuple = orphan.shown;
        let (loser, local, remote, local_tuple, remote_tuple) = if orphan.is_incoming {
            (Loser::Remote, removed_by, child, Tuple::None, child_tuple)
        } else {
            (Loser::Local, child, removed_by, child_tuple, Tuple::None)
        };
        Loss {
            table: orphan.table,
            key: row,
            key_from: KeyFrom::Key(orphan.image),
            kind: ConflictType::ForeignKeyMissing,
            resolution: match foreign_keys {
                ForeignKeys::Keep => Resolution::Keep,
                ForeignKeys::DeleteChild => Resolution::DeleteChild,
                ForeignKeys::RestoreParent => Resolution::RestoreParent,
            },
            loser,
            local,
            remote,
            local_tuple,
            remote_tuple,
            refusal: None,
            is_decoded: false,
            lost_columns: None,
            reason: Some(Refusal {
                sqlstate: "23503".to_owned(),
                message: format!(
                    "the row that foreign key constraint \"{}\" refers to is gone",
                    orphan.key.name
                ),
                detail: Some(orphan.detail),
                context: None,
                constraint: Some(orphan.key.name.clone()),
                parents: None,
            }),
        }
    }
}

/// As the server words it: `Key (order_id)=(7) is not present in table "orders".`
fn detail(key: &ForeignKey) -> String {
    let literal = |text: &str| format!("'{}'", text.replace('\'', "''"));
    let names: Vec<&str> = key.pairs.iter().map(|pair| pair.child.as_str()).collect();
    let values: Vec<String> = key
        .pairs
        .iter()
        .map(|pair| format!("t.{}::text", quote(&pair.child)))
        .collect();
    let (before, after) = (
        format!("Key ({})=(", names.join(", ")),
        format!(") is not present in table {}.", key.parent),
    );
    format!(
        "{} || concat_ws(', ', {}) || {}",
        literal(&before),
        values.join(", "),
        literal(&after)
    )
}
