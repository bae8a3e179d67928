//! What the newest write of a row was, while the journal tells.
//!
//! In:   keys of one table, this node's journal            Out: for each the newest version and its image, or that it is not known; images
//!       of others
//! Holds: one image for each key, or what is asked for of others
//! Invariants: what is given is the newest of *all* versions applied everywhere, those included that the journal has let go
//! On crash: asked again
//! Not here: what is made of it ([`super::repair`])
//!
//! The highest stamp in the journal need not be the row's newest write: that may have left the journal, which goes by
//! whole segments of all origins, not by stamps. But where the write's transaction had *seen* everything that is gone
//! (its dependencies include the position of every origin at which the journal begins), it covers every version that is gone,
//! so under last update wins none of them can be what the row shows. Else the newest write is not known.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::Change;
use anabranch_proto::wire::Malformed;
use anabranch_proto::{NodeId, Position, Stamp, Vector};

use crate::apply::failure::Failure;
use crate::apply::feed::{Feed, Pieces};
use crate::journal::{self, Journal};

/// A row's newest write.
#[derive(Debug, Clone)]
pub(crate) struct Newest {
    pub(crate) stamp: Stamp,
    /// What its transaction had seen, itself included.
    pub(crate) knows: Arc<Vector>,
    /// Nothing that the journal has let go can be newer.
    pub(crate) is_known: bool,
    /// Its image; none when it deleted the row.
    pub(crate) image: Option<(Arc<TableDesc>, RowImage)>,
}

/// What writes made of rows, by the canonical keys of these.
pub(crate) type Images = HashMap<Vec<u8>, Vec<(Arc<TableDesc>, RowImage)>>;

/// The journal cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Journal(#[from] journal::Error),
    #[error("reading the journal: {0}")]
    Failure(#[from] Failure),
    #[error("reading the journal: {0}")]
    Malformed(#[from] Malformed),
}

/// The newest write of each of `keys` (canonical) among what is at or below `upto`; `settled` is what may have left any
/// journal. Reads the whole journal: blocks.
pub(crate) fn find(
    journal: &Journal,
    origins: &[NodeId],
    (upto, settled): (&Vector, &Vector),
    (schema, name): (&str, &str),
    keys: &[Vec<u8>],
) -> Result<HashMap<Vec<u8>, Newest>, Error> {
    let mut begins = Vector::new();
    let mut feeds = Vec::new();
    for &origin in origins {
        let (mut feed, begin) = Feed::oldest(journal, origin)?;
        // A journal that begins with another's (a joiner's) does not say where an origin begins that it holds nothing of.
        let unsaid = begin == Position::ZERO && feed.peek()?.is_none();
        begins.raise(origin, if unsaid { settled.get(origin) } else { begin });
        feeds.push(feed);
    }
    let wanted: HashSet<&[u8]> = keys.iter().map(Vec::as_slice).collect();
    let mut found: HashMap<Vec<u8>, Newest> = HashMap::new();
    for mut feed in feeds {
        let origin = feed.origin;
        while let Some(head) = feed.peek()? {
            if head.header().position > upto.get(origin) {
                break;
            }
            let Some(head) = feed.take() else { break };
            let (stamp, deps) = (head.header().stamp, head.header().deps.clone());
            let mut knows = deps;
            knows.raise(origin, head.header().position);
            let is_known = knows.includes(&begins);
            let knows = Arc::new(knows);
            let mut meet = |key: &[u8], image: Option<(Arc<TableDesc>, RowImage)>| {
                // Of one transaction the last write counts.
                if found.get(key).is_none_or(|known| known.stamp <= stamp) {
                    let newest = Newest {
                        stamp,
                        knows: Arc::clone(&knows),
                        is_known,
                        image,
                    };
                    found.insert(key.to_vec(), newest);
                }
            };
            let mut pieces = Pieces::of_head(journal, head)?;
            while let Some(mut piece) = pieces.next_piece()? {
                while let Some(change) = piece.next_change()? {
                    let of_table = |table: &TableDesc| table.schema == schema && table.name == name;
                    if !change.tables().iter().any(|table| of_table(table)) {
                        continue;
                    }
                    if let Change::Truncate { .. } = change {
                        keys.iter().for_each(|key| meet(key, None));
                    }
                    change.each_row(|table, key, row| {
                        if wanted.contains(key) {
                            meet(key, row.map(|(row, _)| (Arc::clone(table), row.clone())));
                        }
                        Ok::<_, Malformed>(())
                    })?;
                }
            }
        }
    }
    Ok(found)
}

/// What all writes of each of `keys` (canonical) at or below `upto` made of it, without those that what stands at the key covers, and
/// without deletes. Reads the whole journal: blocks.
pub(crate) fn images(
    journal: &Journal,
    origins: &[NodeId],
    upto: &Vector,
    (schema, name): (&str, &str),
    keys: &HashMap<Vec<u8>, Option<Arc<Vector>>>,
) -> Result<Images, Error> {
    let mut found = Images::new();
    for &origin in origins {
        let (mut feed, _) = Feed::oldest(journal, origin)?;
        while let Some(head) = feed.peek()? {
            let position = head.header().position;
            if position > upto.get(origin) {
                break;
            }
            let Some(head) = feed.take() else { break };
            let mut pieces = Pieces::of_head(journal, head)?;
            while let Some(mut piece) = pieces.next_piece()? {
                while let Some(change) = piece.next_change()? {
                    let of_table = |table: &Arc<TableDesc>| table.schema == schema && table.name == name;
                    if !change.tables().iter().any(of_table) {
                        continue;
                    }
                    change.each_row(|table, key, row| {
                        if let (Some(without), Some((row, _))) = (keys.get(key), row)
                            && !without.as_ref().is_some_and(|past| past.covers(origin, position))
                        {
                            let images = found.entry(key.to_vec()).or_default();
                            images.push((Arc::clone(table), row.clone()));
                        }
                        Ok::<_, Malformed>(())
                    })?;
                }
            }
        }
    }
    Ok(found)
}
