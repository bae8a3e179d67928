//! Both steps of the cut, as the head of [`super::super`] says.
//!
//! In:   keys, then a vector            Out: what is applied here; states of the rows at that vector
//! Holds: a watch on the keys in the resolver, until another is set or the conversation ends
//! Not here: what the states say together (`super::super::decided`)

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::Vector;
use anabranch_proto::link as pb;
use futures_util::StreamExt;

use super::mend::encode;
use super::scan::known;
use super::{Conversation, Error, Set, WHOLE_BYTES_MAX};
use crate::apply::fence::Fence;
use crate::apply::plan::Source;
use crate::apply::write::{Parameter, parameters, references};
use crate::index::RowKey;
use crate::link::{vector_from_wire, vector_to_wire};
use crate::pg::xid;
use crate::shared::lock;

/// The decoder may be behind a large transaction. Nobody waits for us meanwhile.
const FENCE_PATIENCE: Duration = Duration::from_secs(30);

/// How long own transactions may take from being decoded to being framed.
const FRAMED_PATIENCE: Duration = Duration::from_secs(10);

const QUARANTINED: &str = "SELECT key_bytes FROM anabranch.quarantine \
    WHERE schema_name = $1 AND table_name = $2 AND key_bytes = ANY ($3)";

impl Conversation {
    pub(super) fn unwatch(&mut self) {
        if let Some(set) = self.watched.take() {
            lock(&self.seat.shared.resolver).unwatch(set.id);
        }
    }

    async fn fence(&mut self) -> Result<(), Error> {
        let fence = match self.fence.take().filter(|fence| !fence.is_closed()) {
            Some(fence) => fence,
            None => Fence::open(&self.seat.config).await?,
        };
        let passed = fence.pass_within(&self.seat.shared, FENCE_PATIENCE).await;
        self.fence = Some(fence);
        Ok(passed?)
    }

    /// Step 1 of the cut.
    pub(super) async fn watch(&mut self, watch: pb::VerifyWatch) -> Result<pb::VerifyWatched, Error> {
        let table = self.table(&watch.schema, &watch.name).await?;
        let images = watch.keys.iter().map(|key| table.image_of_canonical(key));
        let images = images.collect::<Result<Vec<_>, _>>()?;
        self.unwatch();
        let (id, keys) = {
            let mut resolver = lock(&self.seat.shared.resolver);
            let table = resolver.table_id(&table.desc);
            let keys = watch.keys.iter();
            let keys: Vec<RowKey> = keys.map(|key| RowKey::from_canonical(table, key)).collect();
            (resolver.watch(keys.iter().cloned()), keys)
        };
        self.watched = Some(Arc::new(Set {
            id,
            table,
            images,
            keys,
        }));
        self.position().await
    }

    /// A vector that has everything that could be seen here before it was asked for.
    pub(super) async fn position(&mut self) -> Result<pb::VerifyWatched, Error> {
        self.fence().await?;
        let shared = &self.seat.shared;
        let decoded = *shared.decoded.borrow();
        let mut framed = shared.framed.subscribe();
        let reached = framed.wait_for(|framed| *framed >= decoded);
        match tokio::time::timeout(FRAMED_PATIENCE, reached).await {
            Ok(Ok(_)) => {}
            _ => {
                let text = "its own transactions do not get into its journal; see `anabranch status` there";
                return Err(Error::Other(text.to_owned()));
            }
        }
        let mut vector = shared.applied.borrow().clone();
        vector.raise(shared.node, *shared.own.borrow());
        Ok(pb::VerifyWatched {
            vector: vector_to_wire(&vector),
        })
    }

    /// Waits until all of `upto` is applied here.
    async fn wait_applied(&self, upto: &Vector, patience: Duration) -> Result<(), Error> {
        let shared = &self.seat.shared;
        let others: Vector = upto.iter().filter(|(node, _)| *node != shared.node).collect();
        let mut applied = shared.applied.subscribe();
        let reached = applied.wait_for(|applied| applied.includes(&others));
        match tokio::time::timeout(patience, reached).await {
            Ok(Ok(_)) => Ok(()),
            _ => {
                let applied = shared.applied.borrow().clone();
                let late = others
                    .iter()
                    .find(|(node, position)| !applied.covers(*node, *position));
                let late = late.map_or_else(String::new, |(node, position)| {
                    format!(
                        " of node {node} it has applied up to {}, and not to {position}",
                        applied.get(node)
                    )
                });
                Err(Error::Other(format!(
                    "it does not catch up within {} s:{late}; see `anabranch status` there",
                    patience.as_secs()
                )))
            }
        }
    }

    /// Step 2 of the cut.
    pub(super) async fn look(&mut self, look: &pb::VerifyLook) -> Result<pb::VerifyLooked, Error> {
        let patience = Duration::from_millis(look.patience_ms.into());
        self.wait_applied(&vector_from_wire(&look.upto), patience).await?;
        // It stays where the end of the conversation, which may come in the middle, ends it.
        let set = self.watched.clone();
        let set = set.ok_or_else(|| Error::Other("nothing is watched".to_owned()))?;
        self.look_at(&set, look).await
    }

    async fn look_at(&mut self, set: &Set, look: &pb::VerifyLook) -> Result<pb::VerifyLooked, Error> {
        known(&set.table, &look.columns)?;
        let before = lock(&self.seat.shared.resolver).watched(set.id, &set.keys)?;
        self.snapshot().await?;
        let mut states = vec![pb::VerifyState::default(); set.keys.len()];
        self.read(set, look, &mut states).await?;
        let sql = self.sql()?;
        let canonical: Vec<&[u8]> = set.keys.iter().map(RowKey::canonical).collect();
        let (schema, name) = (&set.table.desc.schema, &set.table.desc.name);
        let kept = sql.query(QUARANTINED, &[schema, name, &canonical]).await?;
        let kept = kept.iter().map(|row| row.try_get::<_, Vec<u8>>(0));
        let kept = kept.collect::<Result<HashSet<_>, _>>()?;
        let xids: Vec<i64> = before
            .iter()
            .map(|row| i64::from(row.local_xid))
            .filter(|&xid| xid != 0)
            .collect();
        let hidden = sql.query(&xid::hidden(), &[&xids]).await?;
        let hidden = hidden.iter().map(|row| row.try_get::<_, i64>(0));
        let hidden = hidden.collect::<Result<HashSet<_>, _>>()?;
        self.end_snapshot().await?;
        // What is visible above is known to the resolver below.
        self.fence().await?;
        let after = lock(&self.seat.shared.resolver).watched(set.id, &set.keys)?;
        for (((state, key), before), after) in states.iter_mut().zip(&set.keys).zip(before).zip(after) {
            state.moved = after.moved || hidden.contains(&i64::from(before.local_xid));
            state.quarantined = kept.contains(key.canonical());
        }
        Ok(pb::VerifyLooked { states })
    }

    async fn read(
        &self,
        set: &Set,
        look: &pb::VerifyLook,
        states: &mut [pb::VerifyState],
    ) -> Result<(), Error> {
        let (sql, table) = (self.sql()?, &set.table);
        let params = keys(set)?;
        let text = table.look_sql(&look.columns, look.details, look.whole);
        let rows = sql.query_raw(&text, references(&params)).await?;
        let mut rows = std::pin::pin!(rows);
        let mut bytes = 0;
        while let Some(row) = rows.next().await {
            let row = row?;
            let Some(state) = place(&row).and_then(|at| states.get_mut(at)) else {
                continue;
            };
            state.present = true;
            state.hash = row.try_get(1)?;
            if look.details {
                state.column_hashes = row.try_get(2)?;
            }
            if look.whole && bytes < WHOLE_BYTES_MAX {
                let image = table.row_image(&row, if look.details { 3 } else { 2 })?;
                let put = encode(&table.desc, image);
                if bytes + put.len() <= WHOLE_BYTES_MAX {
                    bytes += put.len();
                    state.row = put;
                }
            }
        }
        if look.details {
            for row in sql.query(&table.keys_sql(), &references(&params)).await? {
                if let Some(state) = place(&row).and_then(|at| states.get_mut(at)) {
                    state.key = row.try_get(1)?;
                }
            }
        }
        Ok(())
    }
}

/// The parameters of a statement over the watched keys.
fn keys(set: &Set) -> Result<Vec<Parameter>, Error> {
    let mut rows = set.table.plan.rows();
    for image in &set.images {
        rows.push(&Source::Key(image))?;
    }
    let (array, text) = rows.finish();
    Ok(parameters(array, None, text))
}

fn place(row: &tokio_postgres::Row) -> Option<usize> {
    let ordinal: i64 = row.try_get(0).ok()?;
    usize::try_from(ordinal).ok()?.checked_sub(1)
}
