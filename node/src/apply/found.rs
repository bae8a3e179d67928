//! Working off what the decoder found: conflicts that were decided before their local side was known.
//!
//! In:   [`Found`]s of the resolver        Out: log lines, and rows put right, in an apply transaction of its own
//! Not here: finding them (`crate::resolve`)

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use anabranch_conflict::record::classify;
use anabranch_conflict::{Kind, Op, Resolution};

use super::batch::{Action, Write};
use super::failure::Failure;
use super::loss::{KeyFrom, Loser, Loss, Tuple};
use super::write::Writer;
use crate::resolve::{Expect, Found};
use crate::shared::{Counters, Visibility, lock};

/// Findings that are put right at once.
const REPAIR_ROWS: usize = 1_000;

impl Writer<'_> {
    /// Puts the rows of findings right where that is needed, and gives their lines for the log.
    pub(crate) async fn reconcile(&mut self, found: &[Found]) -> Result<Vec<Loss>, Failure> {
        // What is confirmed to the slot because of this transaction must be durable with it.
        self.session
            .client
            .batch_execute("SET LOCAL synchronous_commit = local")
            .await?;
        let mut losses = Vec::new();
        // Many at once: each look at the decoder costs a flush of the server.
        for some in found.chunks(REPAIR_ROWS) {
            let mut standing = self.repair(some).await?;
            for (at, item) in some.iter().enumerate().filter(|(_, item)| item.log) {
                let mut line = line(item);
                if let Some(json) = standing.remove(&at) {
                    line.remote_tuple = Tuple::Json(json);
                }
                losses.push(line);
            }
        }
        Ok(losses)
    }

    /// Deletes won, but their rows may be there: they go. The JSON of those that were, by place in `found`.
    async fn repair(&mut self, found: &[Found]) -> Result<HashMap<usize, String>, Failure> {
        let mut tables: BTreeMap<(&str, &str), Vec<usize>> = BTreeMap::new();
        let hidden = self.hidden_writers(found).await?;
        let applied = self.shared.applied.borrow().clone();
        for (at, item) in found.iter().enumerate().filter(|(_, item)| item.repair) {
            if !applied.covers(item.remote.origin(), item.remote.position) {
                // Not written here yet: when it is, the local write is known.
                continue;
            }
            if item.local_txn.is_some_and(|txn| hidden.contains(&txn.xid)) {
                // Its lock is held until its commit is visible, which may wait for this very transaction. Had the
                // local write won, the remote one could not have passed the lock.
                if !item.local_won {
                    self.quarantine(&deletion(item)?, &Failure::Held).await?;
                }
                continue;
            }
            let name = (item.table.schema.as_str(), item.table.name.as_str());
            tables.entry(name).or_default().push(at);
        }
        let mut out = HashMap::new();
        for places in tables.into_values() {
            self.repair_table(found, &places, &mut out).await?;
        }
        Ok(out)
    }

    /// The local writers of `found` whose commits are decoded but not visible yet, since they wait for peers.
    async fn hidden_writers(&mut self, found: &[Found]) -> Result<HashSet<u32>, Failure> {
        const HIDDEN: &str = "SELECT xid FROM unnest($1::int8[]) AS xid, \
            (SELECT s, pg_snapshot_xmax(s)::text::int8 AS max FROM pg_current_snapshot() AS s) AS x \
            WHERE NOT pg_visible_in_snapshot((x.max - ((x.max - xid) & 4294967295))::text::xid8, x.s)";
        if *self.shared.visibility.borrow() != Visibility::BeforeDependents {
            return Ok(HashSet::new());
        }
        let repairs = found.iter().filter(|item| item.repair);
        let xids: Vec<i64> = repairs
            .filter_map(|item| Some(i64::from(item.local_txn?.xid)))
            .collect();
        let statement = self.session.prepare(HIDDEN).await?;
        let rows = self.session.client.query(&statement, &[&xids]).await?;
        let hidden = rows.iter().map(|row| row.try_get::<_, i64>(0));
        Ok(hidden
            .map(|xid| Ok(u32::try_from(xid?).unwrap_or(0)))
            .collect::<Result<_, tokio_postgres::Error>>()?)
    }

    async fn repair_table(
        &mut self,
        found: &[Found],
        places: &[usize],
        out: &mut HashMap<usize, String>,
    ) -> Result<(), Failure> {
        let items: Vec<(usize, &Found)> = places
            .iter()
            .filter_map(|&at| Some((at, found.get(at)?)))
            .collect();
        let Some((_, first)) = items.first() else {
            return Ok(());
        };
        let plan = match self.session.plan(&first.table).await {
            Ok(plan) => plan,
            Err(error) => {
                let failure = Failure::from(error);
                return if failure.is_transient() {
                    Err(failure)
                } else {
                    Ok(())
                };
            }
        };
        let actions = items
            .iter()
            .map(|(_, item)| deletion(item))
            .collect::<Result<Vec<_>, _>>()?;
        let all: Vec<&Action> = actions.iter().collect();
        let standing = self.lock_rows(&plan, &all).await?;
        if standing.iter().all(Option::is_none) {
            return Ok(());
        }
        self.fence.pass(self.shared).await?;
        let mut gone = Vec::new();
        {
            let resolver = lock(&self.shared.resolver);
            for ((&(at, item), action), row) in items.iter().zip(&actions).zip(standing) {
                let Some(row) = row else { continue };
                let current = resolver.current(&item.key)?;
                if current.is_some_and(|current| current.version.kind == Kind::Delete) {
                    gone.push(action);
                    // What stood there was the remote insert that lost, unless a local write came over it.
                    if item.local_won {
                        out.insert(at, row.json);
                    }
                }
            }
        }
        if !gone.is_empty() {
            self.run(&plan, &plan.delete_unguarded, &gone, false).await?;
            Counters::add(&self.shared.counters.repairs, gone.len() as u64);
        }
        Ok(())
    }
}

/// The winning delete of a finding, as a write.
fn deletion(item: &Found) -> Result<Action, Failure> {
    let winner = if item.local_won { item.local } else { item.remote };
    Ok(Action {
        table: Arc::clone(&item.table),
        key: item.key.clone(),
        write: Write::Delete(item.table.image_of_canonical(item.key.canonical())?),
        version: winner,
        op: Op::Delete,
        expect: Expect {
            present: None,
            xid: 0,
        },
        careful: true,
    })
}

fn line(item: &Found) -> Loss {
    let local_tuple = match (&item.local_row, item.local.kind) {
        (Some(row), _) => Tuple::Image(Arc::clone(&item.table), row.clone()),
        (None, Kind::Delete) => Tuple::None,
        (None, Kind::Put) => Tuple::Journal(item.local),
    };
    let remote_tuple = match item.remote.kind {
        Kind::Delete => Tuple::None,
        Kind::Put => Tuple::Journal(item.remote),
    };
    let op = match item.remote.kind {
        Kind::Delete => Op::Delete,
        Kind::Put => Op::Update,
    };
    let key_from = match (&item.local_row, &item.key_image) {
        (Some(row), _) => KeyFrom::Row(row.clone()),
        (None, Some(key)) => KeyFrom::Key(key.clone()),
        (None, None) => KeyFrom::Canonical,
    };
    Loss {
        table: Arc::clone(&item.table),
        key: item.key.clone(),
        key_from,
        kind: classify(op, item.local.kind),
        resolution: if item.local_won {
            Resolution::KeepLocal
        } else {
            Resolution::ApplyRemote
        },
        loser: if item.local_won {
            Loser::Remote
        } else {
            Loser::Local
        },
        local: Some(item.local),
        remote: Some(item.remote),
        local_tuple,
        remote_tuple,
        refusal: None,
    }
}
