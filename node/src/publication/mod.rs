//! Is the publication as it was? What is written while it lacks something is decoded as nothing, and no later look at the stream
//! tells: so what it was made of is written down, and compared for as long as the node lives.
//!
//! In:   the catalog ([`read`]), `publication.json` of `node.data_dir`      Out: the same, brought up to date; faults, doubts
//! Holds: nothing
//! Invariants: 1. what is broken stays so until `anabranch heal` has made a new slot and has written again what may be missing;
//!        2. a doubt stays until all nodes were compared and the table was found equal; 3. who restores what was taken away by hand
//!        leaves a trace, since an entry of a publication that is made again has another oid
//! On crash: read again; between two looks nothing is forgotten
//! Not here: when it is looked at, and what becomes of it (`crate::daemon`, `crate::heal`)
//!
//! *Broken* is what makes the daemon blind or mistake its own transactions for others': there it ends. Tables of applications are
//! *doubted*: an alarm, since everything else goes on, and a comparison can mend them.

mod read;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;

use anabranch_proto::schema::split_name;
use serde::{Deserialize, Serialize};

use crate::setup::sql::{ident, qualified};
use crate::small_file;

pub(crate) use read::{Now, Published, now};

/// In `node.data_dir`.
const FILE: &str = "publication.json";

/// Tables of ours without which the stream cannot be read.
const NEEDED: [&str; 3] = ["anabranch.progress", "anabranch.clock", "anabranch.member"];

/// A table that is published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listed {
    /// Its [`full_name`](anabranch_proto::schema::full_name).
    pub(crate) name: String,
    /// Oids of the rows of `pg_publication_rel` by which it is: its own, or those of tables that it is a partition of.
    pub(crate) entries: BTreeSet<u32>,
}

impl Listed {
    fn is_own(&self) -> bool {
        self.name.starts_with("anabranch.")
    }

    /// Has it been published all the time, as far as its entries tell?
    fn is_kept_by(&self, now: &Self) -> bool {
        self.entries.intersection(&now.entries).next().is_some()
    }
}

/// What is remembered of the publication.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kept {
    /// Of `pg_publication`; 0 where nothing was ever read.
    oid: u32,
    /// The transaction that wrote its row: another one when an option or the owner is changed.
    xmin: u32,
    /// `publish_generated_columns = stored`.
    generated: bool,
    /// By oid of the table.
    tables: BTreeMap<u32, Listed>,
    /// Every transaction below this had ended when the publication was last seen to be good, 64 bits.
    good_xid: Option<u64>,
    /// Why decoding must not go on; stays until the node is healed.
    broken: Option<String>,
    /// Tables of which writes may not have been sent, each with the reason.
    doubts: BTreeMap<String, String>,
}

/// What one look says of now, beside what is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Faults {
    /// Tables that are not published now as they should be, with what to do.
    pub(crate) tables: BTreeMap<String, String>,
    /// Tables that this look gives a reason to doubt, whether they were doubted before or not: no comparison that began before it counts.
    pub(crate) doubted: BTreeSet<String>,
    /// Of the publication as a whole.
    pub(crate) whole: Vec<String>,
}

impl Kept {
    /// What was kept last; none where no daemon has looked.
    ///
    /// # Errors
    /// When there is a file that cannot be read.
    pub(crate) fn read(dir: &Path) -> io::Result<Option<Self>> {
        match std::fs::read(dir.join(FILE)) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text).map_err(io::Error::other)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Keeps it, durably.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn keep(&self, dir: &Path) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(io::Error::other)?;
        small_file::replace(&dir.join(FILE), &text)
    }

    /// Decoding has met a place at which the publication cannot be used. It stays there, whatever is done to the publication
    /// now.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub(crate) fn mark_broken(dir: &Path, why: &str) -> io::Result<()> {
        let mut kept = Self::read(dir)?.unwrap_or_default();
        if kept.broken.is_some() {
            return Ok(());
        }
        kept.broken = Some(why.to_owned());
        kept.keep(dir)
    }

    /// Is, or was, this table published, as far as a daemon has seen? Not once it was removed by `anabranch tables remove`, or dropped.
    pub(crate) fn has_table(&self, oid: u32) -> bool {
        self.tables.contains_key(&oid)
    }

    /// Why decoding must not go on.
    pub(crate) fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// Tables of which writes may not have been sent, each with the reason.
    pub(crate) const fn doubts(&self) -> &BTreeMap<String, String> {
        &self.doubts
    }

    /// All nodes hold the same rows of this table.
    pub(crate) fn settle(&mut self, table: &str) {
        self.doubts.remove(table);
    }

    /// From here on transactions may not have been decoded.
    pub(crate) const fn good_xid(&self) -> Option<u64> {
        self.good_xid
    }

    /// As nothing but the time differs from what was kept before.
    pub(crate) fn differs_from(&self, other: &Self) -> bool {
        let timeless = |of: &Self| Self {
            good_xid: None,
            ..of.clone()
        };
        timeless(self) != timeless(other)
    }

    /// Begins with the publication as it is: nothing is known of before, but for what was doubted.
    pub(crate) fn begin(now: &Now, published: &Published, doubts: BTreeMap<String, String>) -> Self {
        Self {
            oid: published.oid,
            xmin: published.xmin,
            generated: published.generated,
            tables: published.listed(),
            good_xid: Some(now.xmin),
            broken: None,
            doubts,
        }
    }

    /// With a reason why decoding must not go on.
    pub(crate) fn with_broken(mut self, why: &str) -> Self {
        self.broken = Some(why.to_owned());
        self
    }

    /// The same, where transactions from this one on may be missing.
    pub(crate) fn since(mut self, xid: Option<u64>) -> Self {
        self.good_xid = xid.into_iter().chain(self.good_xid).min();
        self
    }

    /// The same, after what was missing is written again.
    pub(crate) fn healed(mut self) -> Self {
        self.broken = None;
        self
    }

    /// Compares with what is there, takes it in, and says what is wrong with it now.
    pub(crate) fn compare(&mut self, now: &Now) -> Faults {
        if self.broken.is_none() {
            self.broken = self.breakage(now);
        }
        let (Some(published), None) = (&now.published, &self.broken) else {
            return Faults::default();
        };
        let mut faults = Faults::default();
        // Stored generated columns are let in by `init` and by DDL that travels, once, and nothing is unsent by that.
        let is_let_in = published.generated && !self.generated;
        if published.xmin != self.xmin && !is_let_in {
            let names: Vec<String> = self.applications().map(|listed| listed.name.clone()).collect();
            for name in names {
                self.doubt(
                    &name,
                    "the publication's options or its owner were changed: what it left out meanwhile is not known",
                    &mut faults,
                );
            }
        }
        (self.xmin, self.generated) = (published.xmin, published.generated);
        if published.open_ended {
            faults
                .whole
                .push("it publishes whole schemas, with tables that nobody has checked".to_owned());
        }
        self.compare_tables(now, published, &mut faults);
        self.good_xid = Some(now.xmin);
        faults
    }

    /// Tables of applications.
    fn applications(&self) -> impl Iterator<Item = &Listed> {
        self.tables.values().filter(|listed| !listed.is_own())
    }

    /// The first reason is the one that is told; each begins the settling anew.
    fn doubt(&mut self, name: &str, why: &str, faults: &mut Faults) {
        faults.doubted.insert(name.to_owned());
        self.doubts
            .entry(name.to_owned())
            .or_insert_with(|| why.to_owned());
    }

    /// What makes the daemon blind, or mistake its own transactions for others'.
    fn breakage(&self, now: &Now) -> Option<String> {
        let Some(published) = &now.published else {
            return Some("does not exist".to_owned());
        };
        if self.oid != 0 && published.oid != self.oid {
            return Some("was dropped and created again".to_owned());
        }
        if let Some(why) = unusable(published) {
            return Some(why);
        }
        let listed = published.listed();
        let own = self.tables.iter().filter(|(_, table)| table.is_own());
        for (oid, table) in own {
            let is_kept = listed.get(oid).is_some_and(|now| table.is_kept_by(now));
            // Made again by `init` of another release it has another oid, and was never without.
            if !is_kept && now.relations.contains_key(oid) {
                return Some(format!("was without {} for a while, or is", table.name));
            }
        }
        None
    }

    fn compare_tables(&mut self, now: &Now, published: &Published, faults: &mut Faults) {
        let listed = published.listed();
        let before = std::mem::take(&mut self.tables);
        let mut kept: BTreeMap<u32, Listed> = BTreeMap::new();
        for (oid, table) in before {
            if table.is_own() {
                continue;
            }
            match listed.get(&oid) {
                Some(is) => {
                    if is.name != table.name
                        && let Some(why) = self.doubts.remove(&table.name)
                    {
                        self.doubt(&is.name, &why, faults);
                    }
                    if !table.is_kept_by(is) {
                        let why = "it was taken out of the publication and put in again";
                        self.doubt(&is.name, why, faults);
                    }
                }
                None if now.removed.contains(&table.name) => self.settle(&table.name),
                // Made anew by somebody, and published.
                None if !now.relations.contains_key(&oid)
                    && listed.values().any(|is| is.name == table.name) => {}
                None if now.relations.contains_key(&oid)
                    || now.relations.values().any(|name| *name == table.name) =>
                {
                    let name = now.relations.get(&oid).unwrap_or(&table.name).clone();
                    let why = "it was taken out of the publication, or made anew by hand";
                    self.doubt(&name, why, faults);
                    let remedy = format!(
                        "is not published: run `anabranch init`, which puts it in again, or `anabranch tables remove {name}` if \
                         it was meant"
                    );
                    faults.tables.insert(name.clone(), remedy);
                    kept.insert(oid, Listed { name, ..table });
                }
                // Dropped.
                None => self.settle(&table.name),
            }
        }
        for table in published.tables.values().filter(|table| table.filtered) {
            let name = &table.listed.name;
            let why = "the publication has a row filter or a column list for it";
            self.doubt(name, why, faults);
            let remedy = format!(
                "has a row filter or a column list: ALTER PUBLICATION .. DROP TABLE {}, and run `anabranch init`, which puts \
                 it in whole",
                in_sql(name)
            );
            faults.tables.insert(name.clone(), remedy);
        }
        kept.extend(listed);
        self.tables = kept;
    }

    /// Why a node cannot be healed with the publication as it is: what is written from now on would not be sent either.
    pub(crate) fn unfit(&self, now: &Now) -> Option<String> {
        let Some(published) = &now.published else {
            return Some("it does not exist".to_owned());
        };
        if let Some(why) = unusable(published) {
            return Some(format!("it {why}"));
        }
        let mut after = Self::begin(now, published, BTreeMap::new());
        after.tables.extend(self.tables.clone());
        // Entries that are made again are what the heal is for.
        after.tables.extend(published.listed());
        let mut faults = Faults::default();
        after.compare_tables(now, published, &mut faults);
        let fault = faults.tables.into_iter().next();
        fault.map(|(table, what)| format!("{table} {what}"))
    }
}

/// As a statement names a table.
fn in_sql(table: &str) -> String {
    match split_name(table) {
        (Some(schema), name) => qualified(&schema, &name),
        (None, name) => ident(&name),
    }
}

/// What of the publication itself makes the stream useless.
pub(crate) fn unusable(published: &Published) -> Option<String> {
    if published.via_root {
        return Some("publishes via the partition root".to_owned());
    }
    if !published.all_operations {
        return Some("omits some operations".to_owned());
    }
    let names: BTreeSet<&str> = published
        .tables
        .values()
        .map(|table| table.listed.name.as_str())
        .collect();
    let lacks = NEEDED.into_iter().find(|name| !names.contains(name));
    lacks.map(|name| format!("lacks {name}"))
}

#[cfg(test)]
pub(crate) mod tests;
