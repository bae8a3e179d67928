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
fn what_the_journal_lacks_counts_as_seen() {
    let dir = tempfile::tempdir().unwrap();
    let (mut resolver, table) = (resolver(&dir), table(&["id", "n"]));
    resolver.settle(seen(&[(1, 25), (2, 20)]));
    // The first one, from 100 to 130, is gone.
    resolver.begin_rebuild(seen(&[(1, 10)]), Stamp::ZERO);
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
        (&[1, 130], &[1, 140]),
        at(1, 25),
        &seen(&[(1, 10)]),
    );
    rebuild(
        &mut resolver,
        &table,
        (&[1, 131], &[1, 136]),
        at(3, 30),
        &seen(&[(1, 10), (2, 20)]),
    );
    resolver.rebuilt();
    let (_, folded) = folded(resolver, &table);
    assert_eq!(folded.row.unwrap().as_bytes(), row(&[1, 146]).as_bytes());
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
    assert_eq!(last.all.columns.len(), 2);
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

/// An update by this node, decoded.
fn local(resolver: &mut Resolver, table: &Arc<TableDesc>, (old, new): (i64, i64), time: u64, deps: &Vector) {
    let change = Change::Put {
        table: Arc::clone(table),
        op: PutOp::Update,
        row: row(&[1, new]),
        old_key: None,
        former: Some(row(&[1, old])),
    };
    let (stamp, position) = at(1, time);
    let txn = LocalTxn {
        stamp,
        position,
        xid: 700,
        commit_us: 0,
    };
    resolver.local(&change, &txn, deps).unwrap();
}

/// An update by another node, about to be applied.
fn remote(
    resolver: &mut Resolver,
    table: &Arc<TableDesc>,
    (old, new): (i64, i64),
    (node, time): (u16, u64),
    deps: &Vector,
) -> Decision {
    let (stamp, position) = at(node, time);
    let version = Version {
        stamp,
        position,
        kind: Kind::Put,
    };
    let (old, new) = (row(&[1, old]), row(&[1, new]));
    let key = resolver.key_of_row(table, &new).unwrap();
    let images = (Some(&new), None, Some(&old));
    resolver
        .remote((table, &key), version, deps, images, 800)
        .unwrap()
}

#[test]
fn a_row_that_one_node_writes_all_the_time_is_kept_from_what_is_not_everywhere_on() {
    const LAG: u64 = 20;
    let dir = tempfile::tempdir().unwrap();
    let (mut resolver, table) = (resolver(&dir), table(&["id", "n"]));
    let key = resolver.key_of_row(&table, &row(&[1, 0])).unwrap();
    let mut bytes = 0;
    for time in 1..=5_000u64 {
        let value = i64::try_from(time).unwrap();
        local(
            &mut resolver,
            &table,
            (value - 1, value),
            time,
            &seen(&[(1, time - 1)]),
        );
        if time % 10 == 0 {
            let stable = seen(&[(1, time.saturating_sub(LAG))]);
            resolver.forget_stable(&stable, &stable, None).unwrap();
            let count = resolver.versions(&key).len();
            assert!(count as u64 <= LAG, "{count} versions are kept");
            assert_eq!(resolver.merged.rows[&key].effects.len(), count);
            assert!(resolver.merged.wanted.is_empty());
            bytes = bytes.max(resolver.merged.bytes);
        }
    }
    assert!(bytes < 100 * 1024, "{bytes} bytes of what versions did are kept");
    // One that has not seen the last ten is added to what is left of them.
    let met = remote(
        &mut resolver,
        &table,
        (4_990, 5_990),
        (2, 6_000),
        &seen(&[(1, 4_990)]),
    );
    assert!(matches!(met, Decision::Fold { .. }), "{met:?}");
    let (resolver, folded) = folded(resolver, &table);
    assert_eq!(folded.row.unwrap().as_bytes(), row(&[1, 6_000]).as_bytes());
    assert_eq!(resolver.merged.rows[&key].history.begin(&[]), 10);
}

#[test]
fn a_row_that_was_raced_once_is_let_go_up_to_what_covers_both() {
    let dir = tempfile::tempdir().unwrap();
    let (mut resolver, table) = (resolver(&dir), table(&["id", "n"]));
    let key = resolver.key_of_row(&table, &row(&[1, 0])).unwrap();
    let times = |resolver: &Resolver| -> Vec<u64> {
        let versions = resolver.versions(&key).iter();
        versions.map(|version| version.position.lsn.0).collect()
    };
    local(&mut resolver, &table, (0, 1), 1, &seen(&[]));
    remote(&mut resolver, &table, (0, 10), (2, 2), &seen(&[]));
    local(&mut resolver, &table, (11, 12), 3, &seen(&[(1, 1), (2, 2)]));
    local(&mut resolver, &table, (12, 13), 4, &seen(&[(1, 3), (2, 2)]));
    // The first is stable, and the second has not seen it.
    let stable = seen(&[(1, 1)]);
    resolver.forget_stable(&stable, &stable, None).unwrap();
    assert_eq!(times(&resolver), [1, 2, 3, 4]);
    let stable = seen(&[(1, 1), (2, 2)]);
    resolver.forget_stable(&stable, &stable, None).unwrap();
    assert_eq!(times(&resolver), [3, 4]);
    // Met again, it is in what is below.
    let again = remote(&mut resolver, &table, (0, 10), (2, 2), &seen(&[]));
    assert!(matches!(again, Decision::Fold { .. }), "{again:?}");
    assert_eq!(times(&resolver), [3, 4]);
    remote(&mut resolver, &table, (12, 112), (2, 5), &seen(&[(1, 3), (2, 2)]));
    let (_, folded) = folded(resolver, &table);
    assert_eq!(folded.row.unwrap().as_bytes(), row(&[1, 113]).as_bytes());
}

#[test]
fn what_is_stable_and_in_the_journal_alone_is_asked_for_until_it_can_go() {
    let dir = tempfile::tempdir().unwrap();
    let (mut resolver, table) = (resolver(&dir), table(&["id", "n"]));
    let key = resolver.key_of_row(&table, &row(&[1, 0])).unwrap();
    local(&mut resolver, &table, (0, 1), 1, &seen(&[]));
    remote(&mut resolver, &table, (0, 10), (2, 2), &seen(&[]));
    remote(&mut resolver, &table, (1, 101), (3, 3), &seen(&[(1, 1)]));
    // As beyond the bytes that are kept.
    resolver.merged.rows.get_mut(&key).unwrap().effects.clear();
    let forget = |resolver: &mut Resolver, stable: &Vector| {
        resolver.forget_stable(stable, stable, None).unwrap();
        resolver.wanted()
    };
    assert_eq!(forget(&mut resolver, &seen(&[])), BTreeMap::new());
    let wanted = forget(&mut resolver, &seen(&[(1, 1), (2, 2)]));
    let places = [(1, 1), (2, 2)].map(|(node, time)| (NodeId(node), Position::new(1, time)));
    assert_eq!(wanted, BTreeMap::from(places));
    local(
        &mut resolver,
        &table,
        (111, 112),
        4,
        &seen(&[(1, 1), (2, 2), (3, 3)]),
    );
    let wanted = forget(&mut resolver, &seen(&[(1, 1), (2, 2), (3, 3)]));
    assert_eq!(wanted, BTreeMap::new());
    assert_eq!(resolver.versions(&key).len(), 1);
}

/// The counter, a number of `width` bytes, before and after an update.
fn of_width(width: usize, values: [i64; 2]) -> (Arc<TableDesc>, [RowImage; 2]) {
    let mut table = TableDesc::clone(&table(&["id", "n"]));
    if width == 4 {
        table.columns[1].type_oid = 23;
        table.columns[1].type_name = "pg_catalog.int4".to_owned();
    }
    let id = 1i64.to_be_bytes();
    let rows = values.map(|value| {
        let bytes = value.to_be_bytes();
        let cells = [Cell::Binary(&id), Cell::Binary(&bytes[8 - width..])];
        RowImage::build(cells.into_iter())
    });
    (Arc::new(table), rows)
}

#[test]
fn a_counter_whose_type_was_changed_is_of_that_of_the_last_write_and_adds_up() {
    let most = i64::from(i32::MAX);
    for (before, low, high) in [(most, (4, -10), (8, 20)), (100, (8, 20), (4, -10))] {
        let dir = tempfile::tempdir().unwrap();
        let mut resolver = resolver(&dir);
        resolver.begin_rebuild(Vector::new(), Stamp::ZERO);
        for (node, (width, what)) in [(1, low), (2, high)] {
            let (table, [former, row]) = of_width(width, [before, before + what]);
            let change = Change::Put {
                table,
                op: PutOp::Update,
                row,
                old_key: None,
                former: Some(former),
            };
            let at = at(node, u64::from(node));
            resolver.rebuild(&change, at, &seen(&[])).unwrap();
        }
        let (table, [_, both]) = of_width(high.0, [before, before + 10]);
        let (_, folded) = folded(resolver, &table);
        assert_eq!(folded.table.columns, table.columns);
        assert_eq!(folded.row.unwrap().as_bytes(), both.as_bytes());
        assert!(folded.left_out.is_empty());
    }
}

#[test]
fn a_truncate_takes_what_was_folded_into_the_base_from_a_row_that_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (mut resolver, table) = (resolver(&dir), table(&["id", "n"]));
    let key = resolver.key_of_row(&table, &row(&[1, 0])).unwrap();
    let id = resolver.table_id(&table);
    let truncate = |resolver: &mut Resolver| {
        let (stamp, position) = at(3, 8);
        let deps = seen(&[(1, 1), (2, 8)]);
        resolver
            .remote_truncate(id, TableVersion { stamp, position }, &deps)
            .unwrap()
    };
    local(&mut resolver, &table, (0, 5), 1, &seen(&[]));
    for time in 2..=9u64 {
        let value = i64::try_from(time).unwrap();
        let deps = seen(&[(2, time - 1)]);
        remote(&mut resolver, &table, (value - 2, value - 1), (2, time), &deps);
    }
    let stable = seen(&[(1, 1), (2, 8)]);
    resolver.forget_stable(&stable, &stable, None).unwrap();
    let (mut resolver, both) = folded(resolver, &table);
    assert_eq!(both.row.unwrap().as_bytes(), row(&[1, 13]).as_bytes());
    assert_eq!(resolver.versions(&key).len(), 1);
    assert!(!resolver.is_image_of(&key, at(2, 9).0));
    // The one that is left had not seen what this node added, and comes after the truncate.
    let said = truncate(&mut resolver);
    assert_eq!(said.survivors, std::slice::from_ref(&key));
    assert_eq!(said.folded, std::slice::from_ref(&key));
    let (_, left) = folded(resolver, &table);
    assert_eq!(left.row.unwrap().as_bytes(), row(&[1, 8]).as_bytes());

    // A row that is the image of its version already stays as it is.
    let dir = tempfile::tempdir().unwrap();
    let mut resolver = self::resolver(&dir);
    assert_eq!(resolver.table_id(&table), id);
    remote(&mut resolver, &table, (7, 8), (2, 9), &seen(&[]));
    assert!(resolver.is_image_of(&key, at(2, 9).0));
    let said = truncate(&mut resolver);
    assert_eq!(said.survivors, [key]);
    assert!(said.folded.is_empty());
}
