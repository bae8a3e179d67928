//! The laws on small histories: every order of arrival that respects what covers what, enumerated.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use anabranch_conflict::frontier::{Frontier, Order, Policy};
use anabranch_conflict::table::{self, AgainstTruncate, OnRow};
use anabranch_conflict::{Fold, TableVersion, Verdict, Version, admit};
use anabranch_proto::{NodeId, Position, Stamp};
use proptest::prelude::*;

use crate::sim::oracle::{Event, truth_of};
use crate::sim::{Key, Txn, Value, Writes};

const KEY: Key = Key { table: 0, id: 0 };

/// A step of one of three nodes.
#[derive(Debug, Clone)]
enum Step {
    Put(usize, i64),
    Delete(usize, i64),
    Truncate(usize, i64),
    /// Truncates and puts, in one transaction.
    Replace(usize, i64),
    /// Applies everything that the other node holds.
    Pull(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let (node, time_us) = (0usize..3, 0i64..4);
    prop_oneof![
        4 => (node.clone(), time_us.clone()).prop_map(|(n, t)| Step::Put(n, t)),
        2 => (node.clone(), time_us.clone()).prop_map(|(n, t)| Step::Delete(n, t)),
        1 => (node.clone(), time_us.clone()).prop_map(|(n, t)| Step::Truncate(n, t)),
        1 => (node.clone(), time_us).prop_map(|(n, t)| Step::Replace(n, t)),
        6 => (node.clone(), node).prop_map(|(n, m)| Step::Pull(n, m)),
    ]
}

/// Plays the steps with real folds; at most seven transactions.
fn history(steps: &[Step]) -> Vec<Event> {
    let mut events: Vec<Event> = Vec::new();
    let mut folds: Vec<Fold> = (1..=3).map(|node| Fold::new(NodeId(node))).collect();
    let mut known: Vec<Vec<usize>> = vec![Vec::new(); 3];
    for step in steps {
        let (node, time_us, writes) = match *step {
            Step::Pull(to, from) => {
                for at in known[from].clone() {
                    if !known[to].contains(&at) {
                        let txn = &events[at].txn;
                        folds[to].echo([(txn.stamp.node, txn.position, txn.stamp)]);
                        known[to].push(at);
                    }
                }
                continue;
            }
            Step::Put(node, us) => (node, us, (vec![], Some(Some([events.len() as i64, 0, 0, 0])))),
            Step::Delete(node, us) => (node, us, (vec![], Some(None))),
            Step::Truncate(node, us) => (node, us, (vec![KEY.table], None)),
            Step::Replace(node, us) => (
                node,
                us,
                (vec![KEY.table], Some(Some([events.len() as i64, 0, 0, 0]))),
            ),
        };
        if events.len() == 7 {
            continue;
        }
        let mut truth = BTreeMap::new();
        for &at in &known[node] {
            let txn = &events[at].txn;
            let upto = truth.entry(txn.stamp.node.0).or_insert(0);
            *upto = txn.position.lsn.0.max(*upto);
        }
        let position = Position::new(1, events.len() as u64 + 1);
        let stamp = folds[node].begin_local(time_us, 0).stamp;
        let deps = folds[node].commit_local(position).unwrap();
        let rows = writes.1.map(|value| (KEY, value)).into_iter().collect();
        let writes = Writes {
            truncates: writes.0,
            rows,
            ..Writes::default()
        };
        known[node].push(events.len());
        events.push(Event {
            txn: Rc::new(Txn {
                stamp,
                position,
                deps,
                writes,
            }),
            truth,
        });
    }
    events
}

/// Calls `visit` with every order of the transactions in which each comes after what it depends on.
fn for_each_order(history: &[Event], visit: &mut dyn FnMut(&[&Txn])) {
    fn extend<'a>(history: &'a [Event], order: &mut Vec<&'a Txn>, visit: &mut dyn FnMut(&[&Txn])) {
        if order.len() == history.len() {
            visit(order);
        }
        for event in history {
            let is_in = |txn: &Txn| order.iter().any(|other| other.stamp == txn.stamp);
            let seen = |other: &&Event| event.txn.deps.covers(other.txn.stamp.node, other.txn.position);
            if !is_in(&event.txn) && history.iter().filter(seen).all(|other| is_in(&other.txn)) {
                order.push(&event.txn);
                extend(history, order, visit);
                order.pop();
            }
        }
    }
    extend(history, &mut Vec::new(), visit);
}

/// A row under last update wins, without forgetting.
#[derive(Default)]
struct Row {
    current: Option<(Version, Option<Value>)>,
    truncate: Option<TableVersion>,
    log: BTreeSet<Stamp>,
}

impl Row {
    fn meet(&mut self, txn: &Txn) {
        if !txn.writes.truncates.is_empty() {
            let truncate = TableVersion {
                stamp: txn.stamp,
                position: txn.position,
            };
            if let Some((version, _)) = &self.current {
                match table::admit_truncate(version, &truncate, &txn.deps) {
                    OnRow::Survives => {}
                    OnRow::Gone => self.current = None,
                    OnRow::GoneOver => {
                        self.log.insert(version.stamp);
                        self.current = None;
                    }
                }
            }
            self.truncate = Some(table::latest(self.truncate, truncate));
        }
        let Some(&value) = txn.writes.rows.get(&KEY) else {
            return;
        };
        let incoming = txn.version(KEY);
        if table::admit_row(self.truncate.as_ref(), &incoming, &txn.deps) == AgainstTruncate::Loses {
            self.log.insert(incoming.stamp);
            return;
        }
        let current = self.current.map(|(version, _)| version);
        match admit(current.as_ref(), &incoming, &txn.deps) {
            Verdict::Wins => self.current = Some((incoming, value)),
            Verdict::WinsOver => {
                self.log.extend(current.map(|version| version.stamp));
                self.current = Some((incoming, value));
            }
            Verdict::Loses => drop(self.log.insert(incoming.stamp)),
            Verdict::Known => panic!("{incoming:?} met twice"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_order_of_arrival_ends_in_the_same_row_and_reports_what_it_must(
        steps in prop::collection::vec(step(), 1..25),
    ) {
        let history = history(&steps);
        let truth = truth_of(&history, KEY);
        for_each_order(&history, &mut |order| {
            let mut row = Row::default();
            for txn in order {
                row.meet(txn);
            }
            assert_eq!(row.current.and_then(|(_, value)| value), truth.value, "{order:?}");
            assert!(row.log.is_superset(&truth.must), "{:?} lacks some of {truth:?}: {order:?}", row.log);
            assert!(row.log.is_subset(&truth.may), "{:?} is more than {truth:?}: {order:?}", row.log);
        });
    }

    #[test]
    fn every_order_of_arrival_ends_in_the_same_frontier_and_choice(
        steps in prop::collection::vec(step(), 1..25),
        priorities in [0u32..3, 0u32..3, 0u32..3],
    ) {
        let mut history = history(&steps);
        history.retain(|event| event.txn.writes.truncates.is_empty());
        let map = priorities.iter().zip(1..).map(|(priority, node)| (NodeId(node), *priority)).collect();
        let policies = [
            Order::LastUpdateWins,
            Order::FirstUpdateWins,
            Order::OriginPriority(map),
        ]
        .map(|order| Policy {
            order,
            ..Policy::default()
        });
        let mut first: Option<Frontier<Option<Value>>> = None;
        for_each_order(&history, &mut |order| {
            let mut frontier = Frontier::new();
            for txn in order {
                frontier.admit(txn.version(KEY), txn.writes.rows[&KEY], &txn.deps);
            }
            let first = first.get_or_insert_with(|| frontier.clone());
            assert_eq!(&frontier, first, "{order:?}");
            for policy in &policies {
                assert_eq!(frontier.resolve(policy), first.resolve(policy));
            }
        });
        // Last update wins needs no frontier.
        let chosen = first.as_ref().and_then(|frontier| frontier.resolve(&Policy::default()));
        prop_assert_eq!(chosen.and_then(|member| member.value), truth_of(&history, KEY).value);
    }

    #[test]
    fn what_a_transaction_covers_has_a_lower_stamp(steps in prop::collection::vec(step(), 1..40)) {
        let history = history(&steps);
        for event in &history {
            for other in &history {
                if event.txn.deps.covers(other.txn.stamp.node, other.txn.position) {
                    prop_assert!(other.txn.stamp < event.txn.stamp);
                }
            }
        }
    }
}
