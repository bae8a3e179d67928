use anabranch_conflict::policy::Policies;
use anabranch_proto::row::Cell;
use anabranch_proto::schema::ColumnDesc;
use anabranch_proto::stamp::NTP64;
use anabranch_proto::txn::{Change, PutOp};
use anabranch_proto::{NodeId, Position};

use super::*;
use crate::index::RowIndex;
use crate::resolve::Quarantined;
use crate::resolve::unique::UniqueKey;

const OWN: NodeId = NodeId(1);
const OTHER: NodeId = NodeId(2);

struct Case {
    _dir: tempfile::TempDir,
    resolver: Resolver,
    table: Arc<TableDesc>,
}

/// A table of a key and a value of one byte, which is unique.
fn case() -> Case {
    let dir = tempfile::tempdir().unwrap();
    let index = RowIndex::new(dir.path(), 1 << 20).unwrap();
    let mut resolver = Resolver::new(OWN, index, Policies::default());
    let column = |name: &str| ColumnDesc {
        name: name.to_owned(),
        type_oid: 17,
        type_mod: -1,
        type_name: "pg_catalog.bytea".to_owned(),
    };
    let table = Arc::new(TableDesc {
        schema: "s".to_owned(),
        name: "t".to_owned(),
        columns: vec![column("k"), column("v")],
        key: vec![0],
        identity_full: false,
    });
    let key = UniqueKey::of_columns("t_v_key", vec!["v".to_owned()], true);
    let name = ("s".to_owned(), "t".to_owned());
    resolver.set_unique_keys([(name, vec![key])].into_iter().collect());
    Case {
        _dir: dir,
        resolver,
        table,
    }
}

fn row(key: u8, value: u8) -> RowImage {
    let value = [value];
    let cell = if value == [0] {
        Cell::Null
    } else {
        Cell::Binary(&value)
    };
    RowImage::build([Cell::Binary(&[key]), cell].into_iter())
}

fn version(time: u64, node: NodeId) -> Version {
    Version {
        stamp: Stamp {
            time: NTP64(time),
            node,
        },
        position: Position::new(1, time),
        kind: Kind::Put,
    }
}

impl Case {
    fn key(&mut self, key: u8) -> RowKey {
        let table = Arc::clone(&self.table);
        self.resolver.key_of_row(&table, &row(key, 1)).unwrap()
    }

    fn local(&mut self, time: u64, rows: &[(u8, u8)]) {
        let txn = LocalTxn {
            stamp: version(time, OWN).stamp,
            position: version(time, OWN).position,
            xid: 700,
            commit_us: 0,
        };
        let seen: Vector = [(OWN, Position::new(1, time - 1))].into_iter().collect();
        for &(key, value) in rows {
            let change = Change::Put {
                table: Arc::clone(&self.table),
                op: PutOp::Update,
                row: row(key, value),
                old_key: None,
                former: None,
            };
            self.resolver.local(&change, &txn, &seen).unwrap();
        }
        self.resolver.local_end(&txn, &seen).unwrap();
    }

    fn remote(&mut self, time: u64, rows: &[(u8, u8)]) -> Vec<Yielded> {
        let mut claims = TxnClaims::default();
        let (version, table) = (version(time, OTHER), Arc::clone(&self.table));
        for &(key, value) in rows {
            let (key, image) = (self.key(key), row(key, value));
            let images = (Some(&image), None, None);
            self.resolver
                .remote((&table, &key), version, &Vector::new(), images, 800)
                .unwrap();
            self.resolver
                .claim(&mut claims, (&table, &key), version, Some(&image))
                .unwrap();
        }
        self.resolver.end_claims(&mut claims, &Vector::new()).unwrap()
    }

    fn is_there(&mut self, key: u8) -> bool {
        let key = self.key(key);
        self.resolver.current(&key).unwrap().unwrap().is_there()
    }
}

#[test]
fn a_local_row_that_comes_too_early_is_a_finding_once_what_it_yields_to_is_applied() {
    let mut case = case();
    assert!(case.remote(20, &[(1, 7)]).is_empty());
    case.local(10, &[(2, 7)]);
    assert!(case.is_there(1) && !case.is_there(2));
    let found = case.resolver.take_found().unwrap();
    assert_eq!(found.len(), 1);
    assert!(!found[0].local_won && found[0].log && found[0].repair);
    assert_eq!(found[0].key, case.key(2));
    let rival = found[0].rival.as_ref().unwrap();
    assert_eq!((rival.key.clone(), &*rival.constraint), (case.key(1), "t_v_key"));
    assert!(!found[0].is_due(&Vector::new()));
    case.resolver.defer(found);
    case.resolver.found_done();
    assert!(!case.resolver.has_found());
    assert!(case.resolver.found_from().is_some(), "the slot waits");
    let applied = [(OTHER, Position::new(1, 20))].into_iter().collect();
    case.resolver.applied(&applied);
    assert!(case.resolver.has_found());
}

#[test]
fn a_row_that_waits_in_quarantine_and_yields_to_a_local_one_is_let_go_of() {
    let mut case = case();
    assert!(case.remote(10, &[(1, 7), (3, 9)]).is_empty());
    let table = Arc::clone(&case.table);
    let [yields, stays] = [1, 3].map(|key| case.key(key));
    for key in [&yields, &stays] {
        let waits = Quarantined {
            stamp: version(10, OTHER).stamp,
            after: Position::ZERO,
        };
        case.resolver.quarantine(&table, key, waits).unwrap();
    }
    case.resolver.put_aside_ended(true);
    case.local(20, &[(2, 7)]);
    assert!(!case.is_there(1));
    // Else it would come back once its version and the other one's are known everywhere, and forgotten.
    assert!(case.resolver.needs_all());
    let overtaken: Vec<RowKey> = case
        .resolver
        .take_overtaken()
        .into_iter()
        .map(|(_, key)| key)
        .collect();
    assert_eq!(overtaken, [yields]);
    assert!(case.resolver.quarantined().contains_key(&stays));
}

#[test]
fn a_remote_row_that_comes_too_early_yields_also_when_it_is_tried_again() {
    let mut case = case();
    case.local(20, &[(1, 7)]);
    for _ in 0..2 {
        let yielded = case.remote(10, &[(2, 7)]);
        assert_eq!(yielded.len(), 1);
        assert!(yielded[0].incoming);
        assert!(case.is_there(1) && !case.is_there(2));
    }
    assert!(case.resolver.take_found().unwrap().is_empty());
    // A later write of the row has its own fate.
    assert!(case.remote(30, &[(2, 8)]).is_empty());
    assert!(case.is_there(2));
}

#[test]
fn what_a_transaction_only_passes_through_is_nobodys() {
    let mut case = case();
    case.local(10, &[(1, 7)]);
    assert!(case.remote(20, &[(2, 7), (2, 8), (3, 0), (4, 0)]).is_empty());
    assert!([1, 2, 3, 4].into_iter().all(|key| case.is_there(key)));
    let yielded = case.remote(30, &[(5, 7)]);
    assert_eq!(yielded.len(), 1);
    assert!(!yielded[0].incoming && !case.is_there(1));
}

#[test]
fn a_row_that_yields_takes_its_value_from_all_rows_that_the_server_let_be() {
    let mut case = case();
    // One value here, and two or more to the server.
    case.local(10, &[(1, 7), (2, 7)]);
    case.local(30, &[(3, 7)]);
    assert!([1, 2, 3].into_iter().all(|key| case.is_there(key)));
    let yielded = case.remote(20, &[(4, 7)]);
    assert_eq!(yielded.iter().filter(|row| row.incoming).count(), 1);
    assert_eq!(yielded.len(), 3);
    let there: Vec<u8> = (1..=4).filter(|key| case.is_there(*key)).collect();
    assert_eq!(there, [3]);
    // As where the remote one was there first.
    let mut case = self::case();
    case.remote(20, &[(4, 7)]);
    case.local(10, &[(1, 7), (2, 7)]);
    case.local(30, &[(3, 7)]);
    let there: Vec<u8> = (1..=4).filter(|key| case.is_there(*key)).collect();
    assert_eq!(there, [3]);
}

#[test]
fn who_hands_a_value_on_is_asked_after_no_more() {
    let mut case = case();
    for at in 0..20_u8 {
        let rows = [(at, 0), (at + 1, 7)];
        case.local(10 + u64::from(at), &rows[usize::from(at == 0)..]);
        let kept = format!("{:?}", case.resolver.registers.claims);
        assert_eq!(kept.matches("Claim {").count(), 1, "{kept}");
    }
    let yielded = case.remote(100, &[(50, 7)]);
    assert_eq!(yielded.len(), 1, "{yielded:?}");
    assert_eq!(yielded[0].key, case.key(20));
}

#[test]
fn a_row_of_a_copy_that_is_looked_at_since_it_yields_has_a_line() {
    let mut case = case();
    let table = Arc::clone(&case.table);
    let mut rebuild = |key: u8, value: u8, time: u64, node: NodeId, deps: &Vector| {
        let change = Change::Put {
            table: Arc::clone(&table),
            op: PutOp::Insert,
            row: row(key, value),
            old_key: None,
            former: None,
        };
        let version = version(time, node);
        let at = (version.stamp, version.position);
        case.resolver.rebuild(&change, at, deps).unwrap();
        case.resolver.history_end(deps, None).unwrap();
    };
    rebuild(1, 7, 5, OTHER, &Vector::new());
    rebuild(2, 7, 6, NodeId(3), &Vector::new());
    let moved = [(NodeId(3), Position::new(1, 6))].into_iter().collect();
    rebuild(2, 8, 9, NodeId(3), &moved);
    case.resolver
        .distrust(std::slice::from_ref(&table), Lsn(50), false)
        .unwrap();
    let found = case.resolver.take_found().unwrap();
    assert_eq!(found.len(), 1);
    assert!(found[0].log && found[0].repair && found[0].lsn == Lsn(50));
    assert_eq!(found[0].key, case.key(1));
    assert_eq!(
        found[0].rival.as_ref().map(|rival| rival.key.clone()),
        Some(case.key(2))
    );
}

#[test]
fn a_table_without_unique_keys_claims_nothing() {
    let mut case = case();
    case.resolver.set_unique_keys(UniqueKeys::new());
    case.local(20, &[(1, 7)]);
    assert!(case.remote(10, &[(2, 7)]).is_empty());
    assert_eq!(case.resolver.registers.claims.len(), 0);
}
