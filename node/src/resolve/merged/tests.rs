use std::sync::Mutex;

use anabranch_conflict::policy::Policies;
use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::ColumnDesc;
use anabranch_proto::stamp::NTP64;
use anabranch_proto::txn::{Change, PutOp};
use anabranch_proto::{NodeId, Position};

use super::*;
use crate::index::RowIndex;
use crate::resolve::Choice;

fn table(columns: &[&str]) -> Arc<TableDesc> {
    let column = |name: &&str| ColumnDesc {
        name: (*name).to_owned(),
        type_oid: 20,
        type_mod: -1,
        type_name: "pg_catalog.int8".to_owned(),
    };
    Arc::new(TableDesc {
        schema: "public".to_owned(),
        name: "counter".to_owned(),
        columns: columns.iter().map(column).collect(),
        key: vec![0],
        identity_full: true,
    })
}

fn row(values: &[i64]) -> RowImage {
    let values: Vec<[u8; 8]> = values.iter().map(|value| value.to_be_bytes()).collect();
    RowImage::build(values.iter().map(|value| Cell::Binary(value)))
}

fn at(node: u16, time: u64) -> (Stamp, Position) {
    let stamp = Stamp {
        time: NTP64(time),
        node: NodeId(node),
    };
    (stamp, Position::new(1, time))
}

fn seen(of: &[(u16, u64)]) -> Vector {
    let of = of.iter();
    of.map(|&(node, time)| (NodeId(node), Position::new(1, time)))
        .collect()
}

fn resolver(dir: &tempfile::TempDir) -> Resolver {
    let text = "[[table]]\nname = \"public.counter\"\npolicy = \"column_merge\"\ncolumns = { n = \"delta\" }";
    let policies = Policies::parse(text, &BTreeMap::new(), |_| Err(String::new())).unwrap();
    let index = RowIndex::new(dir.path(), 1 << 20).unwrap();
    Resolver::new(NodeId(1), index, policies)
}

/// A write of an earlier life.
fn rebuild(
    resolver: &mut Resolver,
    table: &Arc<TableDesc>,
    (old, new): (&[i64], &[i64]),
    at: (Stamp, Position),
    deps: &Vector,
) {
    let change = Change::Put {
        table: Arc::clone(table),
        op: PutOp::Update,
        row: row(new),
        old_key: None,
        former: Some(row(old)),
    };
    resolver.rebuild(&change, at, deps).unwrap();
}

fn in_memory(_: Version) -> Result<Written, Error> {
    unreachable!("what versions did is in memory")
}

/// Gives the resolver back with the row that it folded.
fn folded(resolver: Resolver, table: &Arc<TableDesc>) -> (Resolver, Folded) {
    let resolver = Mutex::new(resolver);
    let key = crate::shared::lock(&resolver)
        .key_of_row(table, &row(&[1, 0]))
        .unwrap();
    let no_script = |_: &Choice| -> Result<Option<Folded>, Error> { unreachable!("no script chooses") };
    let folded = fold(&resolver, &key, &[], in_memory, no_script);
    (resolver.into_inner().unwrap(), folded.unwrap().unwrap())
}

#[test]
fn a_version_that_the_journal_still_has_and_that_is_in_the_base_counts_as_seen() {
    let dir = tempfile::tempdir().unwrap();
    let (mut resolver, table) = (resolver(&dir), table(&["id", "n"]));
    resolver.settle(seen(&[(1, 10), (2, 20)]));
    resolver.begin_rebuild(Vector::new(), at(2, 15).0);
    // Up to what may be gone: it is in the old row of the lowest that is not settled.
    rebuild(
        &mut resolver,
        &table,
        (&[1, 100], &[1, 130]),
        at(1, 10),
        &seen(&[]),
    );
    // Settled, and had not seen it.
    rebuild(
        &mut resolver,
        &table,
        (&[1, 100], &[1, 101]),
        at(2, 20),
        &seen(&[]),
    );
    rebuild(
        &mut resolver,
        &table,
        (&[1, 130], &[1, 135]),
        at(3, 30),
        &seen(&[(1, 10)]),
    );
    resolver.rebuilt();
    let (_, folded) = folded(resolver, &table);
    assert_eq!(folded.row.unwrap().as_bytes(), row(&[1, 136]).as_bytes());
}

#[test]
fn a_column_that_no_version_has_is_left_to_the_server_and_one_that_came_is_as_it_was_found() {
    let dir = tempfile::tempdir().unwrap();
    let (mut resolver, before) = (resolver(&dir), table(&["id", "n"]));
    let after = table(&["id", "flag", "n"]);
    resolver.begin_rebuild(Vector::new(), Stamp::ZERO);
    rebuild(
        &mut resolver,
        &before,
        (&[1, 100], &[1, 110]),
        at(1, 10),
        &seen(&[]),
    );
    rebuild(
        &mut resolver,
        &after,
        (&[1, 7, 100], &[1, 7, 105]),
        at(2, 20),
        &seen(&[]),
    );
    resolver.rebuilt();
    let (mut resolver, both) = folded(resolver, &before);
    let names = |folded: &Folded| -> Vec<String> {
        let columns = folded.table.columns.iter();
        columns.map(|column| column.name.clone()).collect()
    };
    assert_eq!(names(&both), ["id", "n", "flag"]);
    assert_eq!(both.row.unwrap().as_bytes(), row(&[1, 115, 7]).as_bytes());
    // Who has seen all, and whose table has the column no more, says nothing of it.
    rebuild(
        &mut resolver,
        &before,
        (&[1, 115], &[1, 200]),
        at(1, 30),
        &seen(&[(1, 10), (2, 20)]),
    );
    let (_, last) = folded(resolver, &before);
    assert_eq!(
        (names(&last), last.table.key.clone()),
        (vec!["id".to_owned(), "n".to_owned()], vec![0])
    );
    assert_eq!(last.row.unwrap().as_bytes(), row(&[1, 200]).as_bytes());
    assert_eq!(last.all.columns.len(), 3);
}

/// The earliest version is chosen.
fn with_a_script(dir: &tempfile::TempDir) -> Resolver {
    let text = "[[table]]\nname = \"public.counter\"\npolicy = \"script\"\nscript = \"first.rhai\"";
    let script = |_: &str| Ok("fn resolve(versions) { 0 }".to_owned());
    let policies = Policies::parse(text, &BTreeMap::new(), script).unwrap();
    let index = RowIndex::new(dir.path(), 1 << 20).unwrap();
    Resolver::new(NodeId(1), index, policies)
}

#[test]
fn a_choice_is_made_without_the_lock_and_again_if_another_version_came_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let (mut resolver, table) = (with_a_script(&dir), table(&["id", "n"]));
    let write = |resolver: &mut Resolver, node: u16, time: u64| {
        let values = [1, i64::from(node)];
        rebuild(resolver, &table, (&[1, 0], &values), at(node, time), &seen(&[]));
    };
    resolver.begin_rebuild(Vector::new(), Stamp::ZERO);
    write(&mut resolver, 2, 20);
    write(&mut resolver, 3, 30);
    let key = resolver.key_of_row(&table, &row(&[1, 0])).unwrap();
    let resolver = Mutex::new(resolver);
    let mut asked = Vec::new();
    let choose = |choice: &Choice| -> Result<Option<Folded>, Error> {
        let mut resolver = resolver
            .try_lock()
            .expect("the resolver is locked while a script runs");
        asked.push(choice.origins().map(|node| node.0).collect::<Vec<_>>());
        // Decoded meanwhile, and earlier than both.
        if asked.len() == 1 {
            write(&mut resolver, 1, 10);
        }
        Ok(choice.make(&BTreeMap::new()))
    };
    let folded = fold(&resolver, &key, &[], in_memory, choose).unwrap().unwrap();
    assert_eq!(asked, [vec![2, 3], vec![1, 2, 3]]);
    assert_eq!(folded.top.stamp, at(1, 10).0);
    let shown = resolver.lock().unwrap().current(&key).unwrap().unwrap();
    assert_eq!(shown.version.stamp, at(1, 10).0);
}

#[test]
fn what_versions_did_is_read_without_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    let (mut resolver, table) = (resolver(&dir), table(&["id", "n"]));
    resolver.begin_rebuild(Vector::new(), Stamp::ZERO);
    rebuild(
        &mut resolver,
        &table,
        (&[1, 100], &[1, 110]),
        at(1, 10),
        &seen(&[]),
    );
    rebuild(
        &mut resolver,
        &table,
        (&[1, 100], &[1, 105]),
        at(2, 20),
        &seen(&[]),
    );
    let key = resolver.key_of_row(&table, &row(&[1, 0])).unwrap();
    // As beyond the bytes that are kept.
    let effects = std::mem::take(&mut resolver.merged.rows.get_mut(&key).unwrap().effects);
    let resolver = Mutex::new(resolver);
    let read = |version: Version| -> Result<Written, Error> {
        drop(
            resolver
                .try_lock()
                .expect("the resolver is locked while the journal is read"),
        );
        Ok(Written::clone(&effects[&version.stamp]))
    };
    let folded = fold(&resolver, &key, &[], read, |_| Ok(None)).unwrap().unwrap();
    assert_eq!(folded.row.unwrap().as_bytes(), row(&[1, 115]).as_bytes());
}

#[test]
fn a_transaction_that_alters_its_table_between_two_writes_counts_from_what_the_first_one_saw() {
    let written = |columns: &[&str], old: &[i64], new: &[i64]| {
        let (old, new) = (row(old), row(new));
        Written::new(&table(columns), &Vector::new(), (Some(&new), Some(&old)))
    };
    for (before, after, whole) in [
        // A column came: nobody had it before, and it is as it came.
        (
            written(&["id", "n"], &[1, 10], &[1, 15]),
            written(&["id", "n", "z"], &[1, 15, 0], &[1, 15, 7]),
            written(&["id", "n", "z"], &[1, 10, 0], &[1, 15, 7]),
        ),
        // One went and one came: as many as before.
        (
            written(&["id", "a", "n"], &[1, 3, 10], &[1, 4, 15]),
            written(&["id", "n", "z"], &[1, 15, 0], &[1, 15, 7]),
            written(&["id", "n", "z"], &[1, 10, 0], &[1, 15, 7]),
        ),
    ] {
        let both = before.then(after);
        assert_eq!(both.effect, whole.effect);
        assert_eq!(both.table.columns, whole.table.columns);
    }
}
