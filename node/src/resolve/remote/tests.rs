use anabranch_conflict::policy::Policies;
use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::ColumnDesc;
use anabranch_proto::stamp::NTP64;
use anabranch_proto::txn::{Change, PutOp};
use anabranch_proto::{NodeId, Position};

use super::*;
use crate::index::RowIndex;
use crate::resolve::LocalTxn;

const OWN: NodeId = NodeId(1);
const OTHER: NodeId = NodeId(2);

struct Case {
    _dir: tempfile::TempDir,
    resolver: Resolver,
    table: Arc<TableDesc>,
    id: TableId,
}

fn row(key: u8) -> RowImage {
    RowImage::build([Cell::Binary(&[key])].into_iter())
}

fn stamp(time: u64, node: NodeId) -> Stamp {
    Stamp {
        time: NTP64(time),
        node,
    }
}

fn truncate(time: u64) -> TableVersion {
    TableVersion {
        stamp: stamp(time, OTHER),
        position: Position::new(1, time),
    }
}

fn case(policy: &str) -> Case {
    let dir = tempfile::tempdir().unwrap();
    let index = RowIndex::new(dir.path(), 1 << 20).unwrap();
    let policies =
        Policies::parse(policy, &std::collections::BTreeMap::new(), |_| Err(String::new())).unwrap();
    let mut resolver = Resolver::new(OWN, index, policies);
    let table = Arc::new(TableDesc {
        schema: "public".to_owned(),
        name: "t".to_owned(),
        columns: vec![ColumnDesc {
            name: "k".to_owned(),
            type_oid: 17,
            type_mod: -1,
            type_name: "pg_catalog.bytea".to_owned(),
        }],
        key: vec![0],
        identity_full: true,
    });
    let id = resolver.table_id(&table);
    Case {
        _dir: dir,
        resolver,
        table,
        id,
    }
}

impl Case {
    fn key(&mut self, key: u8) -> RowKey {
        self.resolver.key_of_row(&self.table, &row(key)).unwrap()
    }

    fn insert(&self, key: u8) -> Change {
        Change::Put {
            table: Arc::clone(&self.table),
            op: PutOp::Insert,
            row: row(key),
            old_key: None,
            former: None,
        }
    }

    fn remote(&mut self, key: u8, time: u64) -> Decision {
        let version = Version {
            stamp: stamp(time, OTHER),
            position: Position::new(1, time),
            kind: Kind::Put,
        };
        let (row, key) = (row(key), self.key(key));
        let images = (Some(&row), None, None);
        self.resolver
            .remote((&self.table, &key), version, &Vector::new(), images, 800)
            .unwrap()
    }

    fn local(&mut self, key: u8, time: u64) {
        let txn = LocalTxn {
            stamp: stamp(time, OWN),
            position: Position::new(1, time),
            xid: 700,
            commit_us: 0,
        };
        let change = self.insert(key);
        self.resolver.local(&change, &txn, &Vector::new()).unwrap();
    }

    fn truncate(&mut self, time: u64) -> Vec<RowKey> {
        let said = self
            .resolver
            .remote_truncate(self.id, truncate(time), &Vector::new());
        said.unwrap().survivors
    }

    fn is_there(&mut self, key: u8) -> Option<bool> {
        let key = self.key(key);
        let current = self.resolver.current(&key).unwrap();
        current.map(|entry| entry.is_there())
    }
}

const POLICIES: [&str; 3] = [
    "",
    "[[table]]\nname = \"public.t\"\npolicy = \"first_update_wins\"\n",
    "[[table]]\nname = \"public.t\"\npolicy = \"column_merge\"\n",
];

#[test]
fn a_truncate_that_is_done_again_leaves_what_comes_behind_it_and_finds_what_others_wrote_since() {
    for policy in POLICIES {
        let mut case = case(policy);
        case.local(1, 5);
        assert!(case.truncate(10).is_empty(), "{policy}");
        // By its own transaction, by the next in the same apply transaction, and here.
        case.remote(1, 10);
        case.remote(2, 11);
        case.local(3, 12);
        let own = [stamp(10, OTHER), stamp(11, OTHER)].into_iter().collect();
        let since = case
            .resolver
            .remote_truncate_again(case.id, truncate(10), &own)
            .unwrap();
        assert_eq!(since, [case.key(3)], "{policy}");
        assert_eq!(
            [1, 2, 3].map(|key| case.is_there(key)),
            [Some(true); 3],
            "{policy}"
        );
    }
}

#[test]
fn what_a_transaction_wrote_before_its_own_truncate_goes_with_it() {
    for policy in POLICIES {
        let mut case = case(policy);
        case.remote(1, 10);
        case.remote(2, 10);
        assert!(case.truncate(10).is_empty(), "{policy}");
        case.remote(2, 10);
        assert_eq!(case.is_there(1), Some(false), "{policy}");
        assert_eq!(case.is_there(2), Some(true), "{policy}");
        let key = case.key(1);
        assert!(case.resolver.versions(&key).is_empty(), "{policy}");
    }
}

#[test]
fn what_a_transaction_wrote_before_its_own_truncate_is_gone_after_a_restart_too() {
    for policy in POLICIES {
        let mut case = case(policy);
        let emptied = Change::Truncate {
            tables: vec![Arc::clone(&case.table)],
            cascade: false,
            restart_identity: false,
        };
        for change in [case.insert(1), case.insert(2), emptied, case.insert(2)] {
            let at = (stamp(10, OTHER), Position::new(1, 10));
            case.resolver.rebuild(&change, at, &Vector::new()).unwrap();
        }
        assert_eq!(case.is_there(1), Some(false), "{policy}");
        assert_eq!(case.is_there(2), Some(true), "{policy}");
    }
}

#[test]
fn a_local_truncate_after_the_write_that_raced_sees_to_the_row_as_well() {
    for policy in POLICIES {
        let mut case = case(policy);
        // Decided, not written yet; and here an insert, then a truncate.
        case.remote(1, 6);
        case.local(1, 8);
        case.resolver.take_found();
        let emptied = Change::Truncate {
            tables: vec![Arc::clone(&case.table)],
            cascade: false,
            restart_identity: false,
        };
        let txn = LocalTxn {
            stamp: stamp(10, OWN),
            position: Position::new(1, 10),
            xid: 701,
            commit_us: 0,
        };
        case.resolver.local(&emptied, &txn, &Vector::new()).unwrap();
        let key = case.key(1);
        let found = case.resolver.take_found();
        let of_row = |found: &&crate::resolve::Found| {
            found.key == key && found.remote.stamp == stamp(6, OTHER) && (found.repair || found.settle)
        };
        assert_eq!(found.iter().filter(of_row).count(), 1, "{policy}: {found:#?}");
    }
}
