use anabranch_conflict::policy::Policies;
use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::ColumnDesc;
use anabranch_proto::stamp::NTP64;
use anabranch_proto::txn::{Change, PutOp};
use anabranch_proto::{Lsn, NodeId, Position};

use super::*;
use crate::index::RowIndex;
use crate::resolve::{Found, LocalTxn, Quarantined};

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

fn seen(of: &[(NodeId, u64)]) -> Vector {
    let of = of.iter();
    of.map(|&(node, time)| (node, Position::new(1, time))).collect()
}

/// What waits in quarantine, by the other node.
fn waiting(time: u64) -> Quarantined {
    Quarantined {
        stamp: stamp(time, OTHER),
        after: Position::ZERO,
    }
}

/// The same, as it is read at the start.
fn loaded(time: u64) -> Version {
    Version {
        stamp: stamp(time, OTHER),
        position: Position::new(1, time),
        kind: Kind::Put,
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
    let members = [("a".to_owned(), OWN), ("b".to_owned(), OTHER)].into();
    let script = |_: &str| Ok("fn resolve(versions) { 0 }".to_owned());
    let policies = Policies::parse(policy, &members, script).unwrap();
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

    fn emptied(&self) -> Change {
        Change::Truncate {
            tables: vec![Arc::clone(&self.table)],
            cascade: false,
            restart_identity: false,
        }
    }

    fn remote(&mut self, key: u8, time: u64) -> Decision {
        self.remote_that_saw(key, time, &Vector::new())
    }

    fn remote_that_saw(&mut self, key: u8, time: u64, deps: &Vector) -> Decision {
        let version = Version {
            stamp: stamp(time, OTHER),
            position: Position::new(1, time),
            kind: Kind::Put,
        };
        let (row, key) = (row(key), self.key(key));
        let images = (Some(&row), None, None);
        self.resolver
            .remote((&self.table, &key), version, deps, images, 800)
            .unwrap()
    }

    fn local(&mut self, key: u8, time: u64) {
        let change = self.insert(key);
        self.local_change(&change, time, &Vector::new());
    }

    fn local_truncate(&mut self, time: u64, seen: &Vector) {
        let change = self.emptied();
        self.local_change(&change, time, seen);
    }

    fn local_change(&mut self, change: &Change, time: u64, seen: &Vector) {
        let txn = LocalTxn {
            stamp: stamp(time, OWN),
            position: Position::new(1, time),
            xid: 700,
            commit_us: 0,
        };
        self.resolver.local(change, &txn, seen).unwrap();
    }

    /// Meets the other node's change of an earlier life at its echo.
    fn replay(&mut self, change: &Change, time: u64, deps: &Vector) {
        let at = (stamp(time, OTHER), Position::new(1, time));
        self.resolver.replay(change, at, deps, Lsn(77)).unwrap();
    }

    /// Meets a change of an earlier life, after the slot was lost.
    fn relive(&mut self, change: &Change, at: (u64, NodeId), deps: &Vector) {
        let (time, node) = at;
        let txn = LocalTxn {
            stamp: stamp(time, node),
            position: Position::new(1, time),
            xid: 700,
            commit_us: 0,
        };
        self.resolver.relive(change, &txn, deps, Lsn(77)).unwrap();
    }

    fn is_waiting(&mut self, key: u8) -> bool {
        let key = self.key(key);
        self.resolver.quarantined().contains_key(&key)
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
fn a_delete_that_is_decided_again_does_not_take_the_row_for_gone_under_any_policy() {
    let first = POLICIES[1];
    let delete_wins = "[[table]]\nname = \"public.t\"\ndeletes = \"delete_wins\"\n";
    for (policy, time, has_seen) in [("", 9, false), (first, 5, false), (delete_wins, 5, false)]
        .into_iter()
        .chain(["", first, delete_wins].map(|policy| (policy, 9, true)))
    {
        let mut case = case(policy);
        case.local(1, 7);
        let deps = if has_seen {
            seen(&[(OWN, 7)])
        } else {
            Vector::new()
        };
        let delete = Version {
            stamp: stamp(time, OTHER),
            position: Position::new(1, time),
            kind: Kind::Delete,
        };
        let (image, key) = (row(1), case.key(1));
        let images = (None, Some(&image), None);
        for (xid, is_again) in [(800, false), (801, true), (801, false), (802, true)] {
            let met = case
                .resolver
                .remote((&case.table, &key), delete, &deps, images, xid);
            let Decision::Apply { expect, unsure, .. } = met.unwrap() else {
                panic!("{policy}: it wins")
            };
            let is_met = xid == 801 && !is_again;
            let present = match (is_again, is_met) {
                (true, _) => None,
                (false, met) => Some(!met),
            };
            assert_eq!((expect.present, unsure), (present, is_again), "{policy} {xid}");
        }
    }
}

#[test]
fn a_row_that_a_transaction_writes_twice_has_lost_to_nobody() {
    for policy in &POLICIES[..2] {
        let mut case = case(policy);
        case.local(1, 5);
        case.local(1, 5);
        let found = case.resolver.take_found().unwrap();
        assert!(found.is_empty(), "{policy}: {found:#?}");
        case.remote(2, 6);
        let again = case.remote(2, 6);
        assert!(
            matches!(again, Decision::Apply { beaten: None, .. }),
            "{policy}: {again:?}"
        );
    }
}

#[test]
fn a_version_that_is_put_back_is_put_back_in_another_try_as_well() {
    let mut case =
        case("[[table]]\nname = \"public.t\"\npolicy = \"origin_priority\"\npriority = [\"a\", \"b\"]\n");
    let by = |node: NodeId, time: u64| Version {
        stamp: stamp(time, node),
        position: Position::new(1, time),
        kind: Kind::Put,
    };
    let (third, fourth) = (NodeId(3), NodeId(4));
    let (image, key) = (row(1), case.key(1));
    let mut meet = |version: Version, deps: &Vector, xid: u32| {
        let images = (Some(&image), None, None);
        let met = case
            .resolver
            .remote((&case.table, &key), version, deps, images, xid);
        met.unwrap()
    };
    let none = Vector::new();
    let is_kept = |decision: Decision| matches!(decision, Decision::Keep { .. });
    let puts_back = |decision: Decision| match decision {
        Decision::Restore { winner, .. } => winner.version.stamp == stamp(6, OTHER),
        _ => false,
    };
    // The first node's is preferred, then the second's.
    assert!(matches!(meet(by(OTHER, 6), &none, 700), Decision::Apply { .. }));
    assert!(matches!(meet(by(OWN, 5), &none, 701), Decision::Apply { .. }));
    let (last, deps) = (by(third, 9), seen(&[(OWN, 5)]));
    assert!(puts_back(meet(last, &deps, 800)));
    assert!(is_kept(meet(last, &deps, 800)), "it is written by this try");
    assert!(puts_back(meet(last, &deps, 801)), "that was rolled back");
    assert!(is_kept(meet(last, &deps, 801)));
    // Others leave the row as it is, also when they are tried again.
    for xid in [900, 901] {
        assert!(is_kept(meet(by(fourth, 12), &none, xid)), "{xid}");
    }
}

#[test]
fn a_version_that_was_put_back_by_what_waits_for_ddl_is_put_back_whoever_has_come_since() {
    let [third, fourth] = [3, 4].map(NodeId);
    let none = Vector::new();
    for truncates in [false, true] {
        let mut case =
            case("[[table]]\nname = \"public.t\"\npolicy = \"origin_priority\"\npriority = [\"a\", \"b\"]\n");
        let (image, key) = (row(1), case.key(1));
        let meet = |case: &mut Case, (time, node): (u64, NodeId), deps: &Vector, xid: u32| {
            let version = Version {
                stamp: stamp(time, node),
                position: Position::new(1, time),
                kind: Kind::Put,
            };
            let images = (Some(&image), None, None);
            let met = case
                .resolver
                .remote((&case.table, &key), version, deps, images, xid);
            met.unwrap()
        };
        meet(&mut case, (6, OTHER), &none, 700);
        meet(&mut case, (5, OWN), &none, 701);
        let (last, deps) = ((9, third), seen(&[(OWN, 5)]));
        assert!(matches!(
            meet(&mut case, last, &deps, 800),
            Decision::Restore { .. }
        ));
        case.resolver.set_stuck(vec![stamp(9, third)]);
        // In the table is what it has seen.
        assert!(matches!(
            meet(&mut case, (12, fourth), &none, 900),
            Decision::Keep { .. }
        ));
        if truncates {
            let truncate = TableVersion {
                stamp: stamp(5, fourth),
                position: Position::new(1, 5),
            };
            let said = case.resolver.remote_truncate(case.id, truncate, &none).unwrap();
            let restored: Vec<Stamp> = said.restored.iter().map(|(_, version)| version.stamp).collect();
            assert_eq!(restored, [stamp(6, OTHER)]);
        }
        assert!(matches!(
            meet(&mut case, last, &deps, 801),
            Decision::Restore { .. }
        ));
    }
}

#[test]
fn a_version_that_is_put_back_before_a_truncate_by_the_same_transaction_comes_back_behind_it() {
    let mut case =
        case("[[table]]\nname = \"public.t\"\npolicy = \"origin_priority\"\npriority = [\"a\", \"b\"]\n");
    case.local(1, 5);
    // It loses, and is above the truncate.
    assert!(matches!(case.remote(1, 12), Decision::Keep { .. }));
    let (at, deps) = (stamp(10, NodeId(3)), seen(&[(OWN, 5)]));
    let version = Version {
        stamp: at,
        position: Position::new(1, 10),
        kind: Kind::Put,
    };
    let (image, key) = (row(1), case.key(1));
    let images = (Some(&image), None, None);
    let met = case
        .resolver
        .remote((&case.table, &key), version, &deps, images, 800);
    assert!(matches!(met.unwrap(), Decision::Restore { .. }));
    let truncate = TableVersion {
        stamp: at,
        position: version.position,
    };
    let said = case.resolver.remote_truncate(case.id, truncate, &deps).unwrap();
    let restored: Vec<Stamp> = said.restored.iter().map(|(_, version)| version.stamp).collect();
    assert_eq!((said.survivors, restored), (Vec::new(), vec![stamp(12, OTHER)]));
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
        for change in [case.insert(1), case.insert(2), case.emptied(), case.insert(2)] {
            let at = (stamp(10, OTHER), Position::new(1, 10));
            case.resolver.rebuild(&change, at, &Vector::new()).unwrap();
        }
        assert_eq!(case.is_there(1), Some(false), "{policy}");
        assert_eq!(case.is_there(2), Some(true), "{policy}");
    }
}

#[test]
fn a_rebuilt_row_of_a_commit_that_nobody_sees_yet_is_known_to_be_of_that() {
    for policy in POLICIES {
        let mut case = case(policy);
        let (change, at) = (case.insert(1), (stamp(10, OWN), Position::new(1, 10)));
        case.resolver.rebuild(&change, at, &Vector::new()).unwrap();
        case.resolver.rebuilt_by(&change, at, 700).unwrap();
        let key = case.key(1);
        let current = case.resolver.current(&key).unwrap().unwrap();
        assert_eq!(current.xid, 700, "{policy}");
    }
    let mut case = case("");
    let (change, at) = (case.insert(1), (stamp(10, OWN), Position::new(1, 10)));
    case.resolver.rebuild(&change, at, &Vector::new()).unwrap();
    case.resolver.rebuilt_by(&change, at, 700).unwrap();
    // Of an earlier version nothing is noted.
    case.resolver
        .rebuilt_by(&change, (stamp(9, OWN), Position::new(1, 9)), 699)
        .unwrap();
    let Decision::Apply { expect, .. } = case.remote(1, 20) else {
        panic!("it is the later one")
    };
    assert_eq!(expect.xid, 700);
}

#[test]
fn a_rebuilt_row_that_nobody_sees_yet_stays_known_where_another_version_loses_to_it() {
    let mut case =
        case("[[table]]\nname = \"public.t\"\npolicy = \"first_update_wins\"\ndeletes = \"delete_wins\"\n");
    let (change, at) = (case.insert(1), (stamp(10, OWN), Position::new(1, 10)));
    case.resolver.rebuild(&change, at, &Vector::new()).unwrap();
    case.resolver.rebuilt_by(&change, at, 700).unwrap();
    let at = (stamp(20, OTHER), Position::new(1, 20));
    case.resolver.rebuild(&change, at, &Vector::new()).unwrap();
    let key = case.key(1);
    let current = case.resolver.current(&key).unwrap().unwrap();
    assert_eq!((current.version.stamp, current.xid), (stamp(10, OWN), 700));
    let delete = Version {
        stamp: stamp(30, OTHER),
        position: Position::new(1, 30),
        kind: Kind::Delete,
    };
    let image = row(1);
    let images = (None, Some(&image), None);
    let decision = case
        .resolver
        .remote((&case.table, &key), delete, &Vector::new(), images, 800)
        .unwrap();
    let Decision::Apply { expect, .. } = decision else {
        panic!("a delete wins")
    };
    assert_eq!(expect.xid, 700);
}

#[test]
fn a_local_truncate_after_the_write_that_raced_sees_to_the_row_as_well() {
    for policy in POLICIES {
        let mut case = case(policy);
        // Decided, not written yet; and here an insert, then a truncate.
        case.remote(1, 6);
        case.local(1, 8);
        case.resolver.take_found().unwrap();
        case.local_truncate(10, &Vector::new());
        let key = case.key(1);
        let found = case.resolver.take_found().unwrap();
        let of_row = |found: &&Found| {
            found.key == key && found.remote.stamp == stamp(6, OTHER) && (found.repair || found.settle)
        };
        assert_eq!(found.iter().filter(of_row).count(), 1, "{policy}: {found:#?}");
    }
}

#[test]
fn a_local_write_that_is_decoded_again_does_not_overtake_what_has_seen_it() {
    for policy in POLICIES {
        let mut case = case(policy);
        let key = case.key(1);
        case.resolver.quarantine(&case.table, &key, waiting(8)).unwrap();
        case.local(1, 5);
        assert!(case.is_waiting(1), "{policy}");
        let change = case.insert(1);
        case.replay(&change, 8, &seen(&[(OWN, 5)]));
        assert!(case.is_waiting(1), "{policy}");
        assert!(case.resolver.take_overtaken().is_empty(), "{policy}");
        assert!(case.resolver.take_found().unwrap().is_empty(), "{policy}");
        case.resolver.found_done();
        // A later one does.
        let change = case.insert(1);
        case.local_change(&change, 9, &seen(&[(OTHER, 8)]));
        assert!(!case.is_waiting(1), "{policy}");
        assert_eq!(case.resolver.take_overtaken().len(), 1, "{policy}");
    }
}

#[test]
fn a_local_write_that_lost_to_a_refused_row_does_not_overtake_it_unless_the_row_is_settled_anew() {
    for policy in POLICIES {
        let mut case = case(policy);
        let key = case.key(1);
        case.remote(1, 8);
        case.resolver.quarantine(&case.table, &key, waiting(8)).unwrap();
        // Concurrent and earlier, decoded once the other waits.
        case.local(1, 5);
        let found = case.resolver.take_found().unwrap();
        assert_eq!(found.len(), 1, "{policy}: {found:#?}");
        // The finding has it refused again, if it still is.
        assert_eq!(case.is_waiting(1), !found[0].settle, "{policy}");
        assert_eq!(found[0].settle, !policy.is_empty(), "{policy}");
    }
}

#[test]
fn what_overtook_a_row_in_quarantine_is_known_until_that_is_let_go_of() {
    for policy in POLICIES {
        let mut case = case(policy);
        let key = case.key(1);
        case.resolver.quarantine(&case.table, &key, waiting(8)).unwrap();
        case.resolver.put_aside_ended(true);
        let change = case.insert(1);
        case.local_change(&change, 9, &seen(&[(OTHER, 8)]));
        let stable = seen(&[(OWN, 9), (OTHER, 8)]);
        let is_known = |case: &mut Case| {
            case.resolver.forget_stable(&stable, &stable, Some(701)).unwrap();
            case.is_there(1).is_some()
        };
        assert!(is_known(&mut case), "{policy}");
        assert_eq!(case.resolver.take_overtaken().len(), 1, "{policy}");
        assert!(is_known(&mut case), "{policy}: it is being let go of");
        case.resolver.released();
        assert!(!is_known(&mut case), "{policy}");
    }
}

#[test]
fn nothing_is_forgotten_before_what_an_earlier_life_left_in_quarantine_is_compared_with_it() {
    let mut case = case("");
    case.local(1, 9);
    let key = case.key(1);
    case.resolver.load_quarantined(key, loaded(8));
    let stable = seen(&[(OWN, 9)]);
    for is_judged in [false, true] {
        case.resolver.forget_stable(&stable, &stable, Some(701)).unwrap();
        assert_eq!(case.is_there(1).is_none(), is_judged);
        case.resolver.quarantine_judged();
        case.resolver.forget_stable(&stable, &stable, Some(701)).unwrap();
    }
}

#[test]
fn what_was_overtaken_is_so_still_when_the_transaction_that_put_its_row_there_again_is_rolled_back() {
    for policy in POLICIES {
        for is_committed in [true, false] {
            let mut case = case(policy);
            let key = case.key(1);
            case.resolver.quarantine(&case.table, &key, waiting(8)).unwrap();
            case.resolver.put_aside_ended(true);
            let change = case.insert(1);
            case.local_change(&change, 9, &seen(&[(OTHER, 8)]));
            case.remote_that_saw(1, 12, &seen(&[(OWN, 9)]));
            case.resolver.quarantine(&case.table, &key, waiting(12)).unwrap();
            case.resolver.put_aside_ended(is_committed);
            assert_eq!(case.is_waiting(1), is_committed, "{policy}");
            let let_go_of = usize::from(!is_committed);
            assert_eq!(case.resolver.take_overtaken().len(), let_go_of, "{policy}");
            // What waited before it, and was not overtaken, waits again.
            let other = case.key(2);
            case.resolver
                .quarantine(&case.table, &other, waiting(20))
                .unwrap();
            case.resolver.put_aside_ended(true);
            case.resolver
                .quarantine(&case.table, &other, waiting(21))
                .unwrap();
            case.resolver.put_aside_ended(is_committed);
            let waits = if is_committed { 21 } else { 20 };
            assert_eq!(
                case.resolver.quarantined().get(&other),
                Some(&waiting(waits)),
                "{policy}"
            );
        }
    }
}

#[test]
fn a_row_that_a_hidden_commit_holds_is_known_for_that_in_another_try_too() {
    let mut case = case("");
    let key = case.key(1);
    let held = Quarantined {
        stamp: stamp(8, OTHER),
        after: Position::new(1, 5),
    };
    let is_visible = |upto: u64| move |after: Position| after <= Position::new(1, upto);
    for is_committed in [false, true] {
        case.resolver.quarantine(&case.table, &key, held).unwrap();
        assert!(case.resolver.is_held(&key, is_visible(4)));
        case.resolver.put_aside_ended(is_committed);
        assert_eq!(case.is_waiting(1), is_committed);
        case.resolver.forget_held_before(is_visible(4));
        assert!(case.resolver.is_held(&key, is_visible(4)));
    }
    case.resolver.forget_held_before(is_visible(5));
    assert!(!case.resolver.is_held(&key, is_visible(5)));
    let other = case.key(2);
    case.resolver.quarantine(&case.table, &other, waiting(8)).unwrap();
    case.resolver.put_aside_ended(false);
    assert!(!case.resolver.is_held(&other, is_visible(0)), "refused, not held");
}

const SCRIPT: &str = "[[table]]\nname = \"public.t\"\npolicy = \"script\"\nscript = \"t.rhai\"\n";

#[test]
fn a_refused_row_that_a_script_had_chosen_waits_after_a_start_too() {
    let mut case = case(SCRIPT);
    let (change, key) = (case.insert(1), case.key(1));
    case.resolver.load_quarantined(key.clone(), loaded(8));
    for (time, node) in [(8, OTHER), (9, NodeId(3))] {
        let at = (stamp(time, node), Position::new(1, time));
        case.resolver.rebuild(&change, at, &Vector::new()).unwrap();
    }
    let is_due = |case: &Case| case.resolver.is_still_due(&key, stamp(8, OTHER), true).unwrap();
    assert!(is_due(&case), "nobody has asked the script yet");
    case.local_change(&change, 12, &seen(&[(OTHER, 8)]));
    assert!(!is_due(&case), "it is written over");
}

#[test]
fn a_refused_row_of_which_all_is_settled_waits_after_a_start_until_it_is_overtaken() {
    const THIRD: NodeId = NodeId(3);
    // Another node's version that lost to it, by the policy: the journal may hold that alone, and a script's choice is not in it.
    let cases = [
        (POLICIES[0], 7, false),
        (POLICIES[1], 9, false),
        (POLICIES[2], 7, false),
        (SCRIPT, 9, false),
        (SCRIPT, 9, true),
    ];
    for (policy, lost, is_met) in cases {
        for is_seen in [false, true] {
            let mut case = case(policy);
            let (change, key) = (case.insert(1), case.key(1));
            case.resolver.settle(seen(&[(OTHER, 8), (THIRD, 12)]));
            case.resolver.load_quarantined(key.clone(), loaded(8));
            let mut rebuild = |time, node, deps: &Vector| {
                let at = (stamp(time, node), Position::new(1, time));
                case.resolver.rebuild(&change, at, deps).unwrap();
            };
            if is_met {
                rebuild(8, OTHER, &Vector::new());
            }
            rebuild(lost, THIRD, &Vector::new());
            if is_seen {
                rebuild(12, THIRD, &seen(&[(OTHER, 8), (THIRD, lost)]));
            }
            case.resolver.rebuilt();
            case.resolver.restore_loaded(false).unwrap();
            assert_eq!(case.is_waiting(1), !is_seen, "{policy}");
            let is_due = case.resolver.is_still_due(&key, stamp(8, OTHER), true).unwrap();
            assert_eq!(is_due, !is_seen, "{policy}");
        }
    }
}

#[test]
fn a_refused_row_that_the_former_policy_had_chosen_waits_once_another_is_in_force() {
    const THIRD: NodeId = NodeId(3);
    let mut case = case(POLICIES[1]);
    let (change, key) = (case.insert(1), case.key(1));
    case.resolver.settle(seen(&[(OTHER, 8), (THIRD, 7)]));
    case.resolver.load_quarantined(key.clone(), loaded(8));
    for (time, node) in [(7, THIRD), (8, OTHER)] {
        let at = (stamp(time, node), Position::new(1, time));
        case.resolver.rebuild(&change, at, &Vector::new()).unwrap();
    }
    case.resolver.rebuilt();
    // The policy of today would have kept the first one.
    for is_closed in [false, true] {
        case.resolver.restore_loaded(is_closed).unwrap();
        let is_due = case.resolver.is_still_due(&key, stamp(8, OTHER), true).unwrap();
        assert_eq!(is_due, is_closed);
    }
}

#[test]
fn a_row_that_is_refused_behind_a_later_local_write_is_overtaken_by_it() {
    for policy in POLICIES {
        let mut case = case(policy);
        let key = case.key(1);
        case.local(1, 9);
        case.resolver.quarantine(&case.table, &key, waiting(8)).unwrap();
        // Where all versions count, the row is as they say.
        let is_by_stamp = policy.is_empty();
        assert_eq!(case.is_waiting(1), !is_by_stamp, "{policy}");
        assert_eq!(
            !case.resolver.take_overtaken().is_empty(),
            is_by_stamp,
            "{policy}"
        );
    }
}

#[test]
fn a_remote_insert_that_raced_a_local_truncate_is_found_again_after_a_restart() {
    for policy in POLICIES {
        let mut case = case(policy);
        case.local_truncate(10, &Vector::new());
        // Decided before the truncate was decoded, and committed behind it.
        let (deleted, inserted) = (
            Change::Delete {
                table: Arc::clone(&case.table),
                key: row(2),
            },
            case.insert(1),
        );
        case.replay(&deleted, 5, &Vector::new());
        case.replay(&inserted, 6, &Vector::new());
        // This one had seen it.
        let inserted = case.insert(3);
        case.replay(&inserted, 12, &seen(&[(OWN, 10)]));
        let key = case.key(1);
        let found = case.resolver.take_found().unwrap();
        let of = |found: &Found| {
            let is_mended = found.repair || found.settle;
            found.key == key && is_mended && found.log && found.local_won && found.lsn == Lsn(77)
        };
        assert!(found.len() == 1 && of(&found[0]), "{policy}: {found:#?}");
        assert_eq!(found[0].remote.stamp, stamp(6, OTHER), "{policy}");
        assert_eq!(case.is_there(1), Some(false), "{policy}");
        assert_eq!(case.is_there(3), Some(true), "{policy}");
    }
}

#[test]
fn an_own_row_that_lost_to_a_remote_truncate_is_found_again_after_a_restart() {
    for policy in POLICIES {
        let mut case = case(policy);
        case.local(1, 5);
        case.local(2, 6);
        let emptied = case.emptied();
        case.replay(&emptied, 10, &Vector::new());
        let found = case.resolver.take_found().unwrap();
        let mut lost: Vec<_> = found
            .iter()
            .map(|found| (found.local.stamp, found.remote.stamp, found.log, found.local_won))
            .collect();
        lost.sort();
        let by_truncate = |time| (stamp(time, OWN), stamp(10, OTHER), true, false);
        assert_eq!(lost, [by_truncate(5), by_truncate(6)], "{policy}");
    }
}

#[test]
fn what_a_truncate_removed_does_not_come_back_once_that_is_forgotten_after_a_restart() {
    const THIRD: NodeId = NodeId(3);
    for relived in [false, true] {
        let mut case = case(POLICIES[1]);
        // The truncate has not seen the second row, which lost to the first.
        let (first, second, emptied) = (case.insert(1), case.insert(1), case.emptied());
        let met = [
            (first, 5, OTHER, Vector::new()),
            (second, 6, THIRD, Vector::new()),
            (emptied, 10, OTHER, seen(&[(OTHER, 5)])),
        ];
        for (change, time, node, deps) in met {
            let (stamp, position) = (stamp(time, node), Position::new(1, time));
            let txn = LocalTxn {
                stamp,
                position,
                xid: 700,
                commit_us: 0,
            };
            let resolver = &mut case.resolver;
            let met = if relived {
                resolver.relive(&change, &txn, &deps, Lsn(77))
            } else {
                resolver.rebuild(&change, (stamp, position), &deps)
            };
            met.unwrap();
        }
        let stable = seen(&[(OTHER, 10)]);
        for _ in 0..60 {
            case.resolver.forget_stable(&stable, &stable, None).unwrap();
        }
        let decision = case.remote_that_saw(1, 12, &seen(&[(OTHER, 10)]));
        assert!(
            matches!(decision, Decision::Apply { beaten: None, .. }),
            "{decision:?}"
        );
    }
}

#[test]
fn a_conflict_with_an_own_write_is_found_again_after_the_slot_was_lost_under_every_policy() {
    for policy in POLICIES {
        for [first, second] in [[OWN, OTHER], [OTHER, OWN]] {
            let mut case = case(policy);
            let change = case.insert(1);
            case.relive(&change, (5, first), &Vector::new());
            case.relive(&change, (8, second), &Vector::new());
            // This one had seen all.
            let seen_all = seen(&[(OWN, 8), (OTHER, 8)]);
            case.relive(&change, (9, first), &seen_all);
            let found = case.resolver.take_found().unwrap();
            let [found] = found.as_slice() else {
                panic!("{policy} {first}: {found:#?}")
            };
            let own = if first == OWN { 5 } else { 8 };
            let versions = (found.local.stamp, found.remote.stamp);
            assert_eq!(
                versions,
                (stamp(own, OWN), stamp(13 - own, OTHER)),
                "{policy} {first}"
            );
            // Lines of merged rows are made of the versions of a finding.
            let is_merged = policy == POLICIES[2];
            assert_eq!(
                (found.log, found.settle),
                (!is_merged, !policy.is_empty()),
                "{policy}"
            );
            let own_won = (first == OWN) == (policy == POLICIES[1]);
            assert!(is_merged || found.local_won == own_won, "{policy} {first}");
        }
    }
}

#[test]
fn a_truncate_of_tables_with_different_policies_is_found_again_for_each_after_the_slot_was_lost() {
    for policy in POLICIES {
        for [writer, emptier] in [[OWN, OTHER], [OTHER, OWN]] {
            let mut case = case(policy);
            let plain = Arc::new(TableDesc {
                name: "plain".to_owned(),
                ..TableDesc::clone(&case.table)
            });
            let tables = vec![Arc::clone(&case.table), plain];
            for table in &tables {
                let change = Change::Put {
                    table: Arc::clone(table),
                    op: PutOp::Insert,
                    row: row(1),
                    old_key: None,
                    former: None,
                };
                case.relive(&change, (5, writer), &Vector::new());
            }
            let emptied = Change::Truncate {
                tables: tables.clone(),
                cascade: false,
                restart_identity: false,
            };
            case.relive(&emptied, (10, emptier), &Vector::new());
            let found = case.resolver.take_found().unwrap();
            for table in &tables {
                let mut of_table = found.iter().filter(|found| found.table.name == table.name);
                let (own, other) = if writer == OWN { (5, 10) } else { (10, 5) };
                let is_line = |found: &Found| {
                    let versions = (found.local.stamp, found.remote.stamp);
                    found.log && versions == (stamp(own, OWN), stamp(other, OTHER))
                };
                assert!(
                    of_table.any(is_line),
                    "{policy} {writer} {}: {found:#?}",
                    table.name
                );
            }
        }
    }
}

#[test]
fn a_refused_row_that_won_over_a_later_own_write_waits_after_the_slot_was_lost_too() {
    let mut case = case(POLICIES[1]);
    let (change, key) = (case.insert(1), case.key(1));
    case.resolver.load_quarantined(key, loaded(8));
    // Nothing of it is left to put right.
    case.resolver.settle(seen(&[(OWN, 9), (OTHER, 8)]));
    case.relive(&change, (8, OTHER), &Vector::new());
    case.relive(&change, (9, OWN), &Vector::new());
    assert!(case.resolver.take_found().unwrap().is_empty());
    assert!(case.is_waiting(1));
}

#[test]
fn newer_rows_that_are_about_to_be_written_race_with_a_local_truncate() {
    let mut case = case("");
    case.remote(1, 5);
    case.remote(2, 20);
    case.local_truncate(10, &seen(&[(OTHER, 5)]));
    assert!(case.resolver.take_found().unwrap().is_empty());
    let [old, new] = [1, 2].map(|key| case.key(key));
    assert!(!case.resolver.is_raced_for(&old));
    assert!(case.resolver.is_raced_for(&new), "it may find no row");
    assert_eq!(case.is_there(2), Some(true));
    case.resolver.found_done();
    let echoed = seen(&[(OTHER, 20)]);
    case.resolver
        .forget_stable(&Vector::new(), &echoed, None)
        .unwrap();
    assert!(!case.resolver.is_raced_for(&new));
}
