//! Clusters that behave as they should come to the same rows, the right ones, and log every loss.
//!
//! `ANABRANCH_SIM_SEED=7 cargo test -p anabranch-conflict --test it clusters -- --nocapture` runs seed 7 alone
//! and tells what happened. `ANABRANCH_SIM_TIMES=10` runs ten times as many seeds.

use anabranch_conflict::frontier::{Deletes, Order, Policy};
use anabranch_proto::NodeId;

use crate::sim::change::{How, Pick, Switch};
use crate::sim::checked::Check;
use crate::sim::merged::LEAST;
use crate::sim::{Arbiter, Choice, Columns, Counts, Merging, Rules, collections, groups, priority, run};

/// The one seed to run, if the environment names one.
fn replayed() -> Option<u64> {
    std::env::var("ANABRANCH_SIM_SEED")
        .ok()
        .map(|seed| seed.parse().expect("ANABRANCH_SIM_SEED is a number"))
}

/// All seeds together must have tried each of these more often than `least` times. One that is replayed alone need not.
fn assert_tried<const N: usize>(least: u32, tried: [(&str, u32); N]) {
    if replayed().is_some() {
        return;
    }
    for (what, count) in tried {
        assert!(count > least, "the simulator hardly tries {what}: {count}");
    }
}

/// How many times as many seeds shall run as CI has time for.
fn times() -> u64 {
    std::env::var("ANABRANCH_SIM_TIMES")
        .map_or(1, |times| times.parse().expect("ANABRANCH_SIM_TIMES is a number"))
}

/// Runs every seed; panics at the first that fails.
fn run_all(seeds: std::ops::Range<u64>, rules: &Rules) -> Counts {
    let mut counts = Counts::default();
    let (seeds, trace) = match replayed() {
        Some(seed) => (seed..seed + 1, true),
        None => (
            seeds.start..seeds.start + (seeds.end - seeds.start) * times(),
            false,
        ),
    };
    for seed in seeds {
        match run(seed, rules, trace) {
            Ok(more) => counts.add(&more),
            Err(failure) => panic!("seed {seed}: {failure:?}; set ANABRANCH_SIM_SEED={seed} to run it alone"),
        }
    }
    counts
}

#[test]
fn clusters_converge_and_log_every_loss() {
    let counts = run_all(0..6_000, &Rules::default());
    assert_tried(5, counts.all());
}

#[test]
fn clusters_with_colliding_times_converge() {
    let rules = Rules {
        frozen_clocks: true,
        ..Rules::default()
    };
    run_all(0..2_000, &rules);
}

/// Every policy that chooses one version of the frontier.
fn ranked() -> Vec<Policy> {
    let priorities = (1..=9).map(|node| (NodeId(node), priority(NodeId(node))));
    let orders = [
        Order::LastUpdateWins,
        Order::FirstUpdateWins,
        Order::OriginPriority(priorities.collect()),
    ];
    let rules = [Deletes::ByStamp, Deletes::DeleteWins, Deletes::UpdateWins];
    orders
        .iter()
        .flat_map(|order| {
            rules.map(|deletes| Policy {
                order: order.clone(),
                deletes,
            })
        })
        .collect()
}

#[test]
fn clusters_converge_to_the_choice_of_every_policy_over_the_frontier() {
    for policy in ranked() {
        eprintln!("{policy:?}");
        let rules = Rules {
            arbiter: Arbiter::Ranked(policy.clone()),
            ..Rules::default()
        };
        let counts = run_all(0..700, &rules);
        // Under last update wins by stamp nothing that lost can ever be preferred again.
        if replayed().is_none() && !policy.is_last_writer() {
            assert!(
                counts.comebacks > 100,
                "hardly a winner comes back under {policy:?}: {}",
                counts.comebacks
            );
            assert!(
                counts.must_log > 1_000 && counts.truncate_lost_rows > 100,
                "{counts:?}"
            );
        }
    }
}

#[test]
fn clusters_converge_to_what_all_versions_make_of_a_row_whose_columns_are_merged() {
    let rules = Rules {
        arbiter: Arbiter::Merged(Merging::Folded),
        ..Rules::default()
    };
    let counts = run_all(0..3_000, &rules);
    assert_tried(
        500,
        [
            ("merges", counts.merges),
            ("sums left out", counts.left_out),
            ("versions folded into the base", counts.compacted),
            ("versions let go", counts.let_go),
            ("values lowered", counts.lowered),
            ("losers that must be logged", counts.must_log),
            ("rows lost to a truncate", counts.truncate_lost_rows),
            ("crashes", counts.crashes),
            ("joins", counts.joins),
        ],
    );
}

#[test]
fn clusters_converge_to_the_least_value_as_to_the_highest() {
    for join_often in [false, true] {
        let rules = Rules {
            arbiter: Arbiter::Merged(Merging::Folded),
            columns: Columns::Mirrored(LEAST),
            join_often,
            ..Rules::default()
        };
        let counts = run_all(0..600, &rules);
        assert_tried(
            50,
            [
                ("merges", counts.merges),
                ("values raised", counts.lowered),
                ("losers that must be logged", counts.must_log),
                ("crashes", counts.crashes),
                ("joins", counts.joins),
            ],
        );
    }
}

#[test]
fn clusters_that_nodes_join_all_the_time_converge_where_columns_are_merged() {
    let rules = Rules {
        arbiter: Arbiter::Merged(Merging::Folded),
        join_often: true,
        ..Rules::default()
    };
    run_all(0..1_500, &rules);
}

#[test]
fn clusters_whose_journals_go_file_by_file_converge_where_columns_are_merged() {
    for (columns, join_often) in [
        (Columns::Numbers, false),
        (Columns::Numbers, true),
        (Columns::Mirrored(LEAST), true),
        (Columns::Collections(collections::RULES), true),
    ] {
        let rules = Rules {
            arbiter: Arbiter::Merged(Merging::Folded),
            columns,
            coarse_trimming: Some(2),
            join_often,
            ..Rules::default()
        };
        run_all(0..600, &rules);
    }
}

/// Columns of which some are decided together.
fn grouped(groups: groups::Of) -> Rules {
    Rules {
        arbiter: Arbiter::Merged(Merging::Folded),
        columns: Columns::Groups(groups, groups),
        ..Rules::default()
    }
}

#[test]
fn clusters_converge_to_groups_of_columns_each_of_which_one_writer_wrote() {
    let mut counts = Counts::default();
    for (groups, nth) in groups::all().into_iter().zip(0..) {
        eprintln!("{groups:?}");
        counts.add(&run_all(nth * 200..(nth + 1) * 200, &grouped(groups)));
    }
    assert_tried(
        500,
        [
            ("merges", counts.merges),
            ("versions folded into the base", counts.compacted),
            ("versions let go", counts.let_go),
            ("losers that must be logged", counts.must_log),
            ("rows lost to a truncate", counts.truncate_lost_rows),
            ("crashes", counts.crashes),
            ("joins", counts.joins),
        ],
    );
}

#[test]
fn clusters_that_nodes_join_all_the_time_converge_where_columns_are_grouped() {
    for (groups, nth) in groups::all().into_iter().zip(0..) {
        let rules = Rules {
            join_often: true,
            ..grouped(groups)
        };
        run_all(nth * 100..(nth + 1) * 100, &rules);
    }
}

#[test]
fn clusters_converge_where_merged_rows_wait_that_a_check_refuses() {
    for check in [Check::AllWrite, Check::OneWrites] {
        let rules = Rules {
            arbiter: Arbiter::Merged(Merging::Folded),
            truncates: false,
            check: Some(check),
            ..Rules::default()
        };
        let counts = run_all(0..300, &rules);
        assert_tried(
            20,
            [
                ("refused rows", counts.refused),
                ("refused rows that fit later", counts.fitted),
                ("refused rows that a local write decides", counts.decided),
                ("rows that wait in the end", counts.waiting),
                ("versions folded into the base", counts.compacted),
                ("versions let go", counts.let_go),
            ],
        );
        if check == Check::OneWrites {
            assert_tried(20, [("crashes", counts.crashes), ("joins", counts.joins)]);
        }
    }
}

#[test]
fn clusters_converge_to_what_all_versions_make_of_sets_lists_and_documents() {
    let rules = Rules {
        arbiter: Arbiter::Merged(Merging::Folded),
        columns: Columns::Collections(collections::RULES),
        ..Rules::default()
    };
    let counts = run_all(0..800, &rules);
    assert_tried(
        150,
        [
            ("merges", counts.merges),
            ("versions folded into the base", counts.compacted),
            ("versions let go", counts.let_go),
            ("losers that must be logged", counts.must_log),
            ("rows lost to a truncate", counts.truncate_lost_rows),
            ("crashes", counts.crashes),
            ("joins", counts.joins),
        ],
    );
}

#[test]
fn clusters_that_nodes_join_all_the_time_converge_where_columns_are_sets_lists_and_documents() {
    let rules = Rules {
        arbiter: Arbiter::Merged(Merging::Folded),
        columns: Columns::Collections(collections::RULES),
        join_often: true,
        ..Rules::default()
    };
    run_all(0..1_000, &rules);
}

#[test]
fn clusters_that_nodes_join_all_the_time_converge() {
    let rules = Rules {
        join_often: true,
        ..Rules::default()
    };
    run_all(0..2_000, &rules);
}

#[test]
fn clusters_that_nodes_join_all_the_time_converge_to_the_choice_of_every_policy() {
    for policy in ranked() {
        eprintln!("{policy:?}");
        let rules = Rules {
            arbiter: Arbiter::Ranked(policy),
            join_often: true,
            ..Rules::default()
        };
        run_all(0..400, &rules);
    }
}

const CHOICES: [Choice; 3] = [Choice::Highest, Choice::Middle, Choice::Failing];

#[test]
fn clusters_converge_to_what_a_script_chooses() {
    for choice in CHOICES {
        eprintln!("{choice:?}");
        let rules = Rules {
            arbiter: Arbiter::Merged(Merging::Chosen(choice)),
            ..Rules::default()
        };
        let counts = run_all(0..700, &rules);
        assert_tried(
            100,
            [
                ("rows with several versions", counts.merges),
                ("forgotten entries", counts.forgotten),
                ("losers that must be logged", counts.must_log),
                ("rows lost to a truncate", counts.truncate_lost_rows),
                ("versions that come back", counts.comebacks),
                ("crashes", counts.crashes),
                ("joins", counts.joins),
            ],
        );
    }
}

#[test]
fn clusters_that_nodes_join_all_the_time_converge_to_what_a_script_chooses() {
    for choice in CHOICES {
        eprintln!("{choice:?}");
        let rules = Rules {
            arbiter: Arbiter::Merged(Merging::Chosen(choice)),
            join_often: true,
            ..Rules::default()
        };
        run_all(0..500, &rules);
    }
}

/// Every policy that can be changed while a cluster runs, to every other one.
fn switches() -> Vec<Switch> {
    let picks = [
        Pick::Last,
        Pick::First,
        Pick::Preferred,
        Pick::Deletes,
        Pick::Highest,
        Pick::Middle,
    ];
    let how = How::AtAPlaceOfEachStream;
    let to_others = |old: Pick| {
        let others = picks.into_iter().filter(move |new| *new != old);
        others.map(move |new| Switch { old, new, how })
    };
    picks.into_iter().flat_map(to_others).collect()
}

#[test]
fn clusters_whose_policy_is_changed_meanwhile_decide_no_row_by_two_policies() {
    let mut counts = Counts::default();
    for (switch, nth) in switches().into_iter().zip(0..) {
        eprintln!("{switch:?}");
        counts.add(&run_all(nth * 150..(nth + 1) * 150, &switch.rules()));
    }
    assert_tried(
        100,
        [
            ("changes", counts.changes),
            ("nodes that forget the policy of before", counts.switched),
            ("writes while some have forgotten it", counts.between),
            ("rows with old and new versions", counts.mixed),
            ("rows with several new versions", counts.all_new),
            ("rows with several versions", counts.merges),
            ("losers that must be logged", counts.must_log),
            ("rows lost to a truncate", counts.truncate_lost_rows),
            ("crashes", counts.crashes),
            ("joins", counts.joins),
        ],
    );
}

#[test]
fn clusters_that_nodes_join_all_the_time_converge_while_their_policy_is_changed() {
    for (switch, nth) in switches().into_iter().zip(0..) {
        let rules = Rules {
            join_often: true,
            ..switch.rules()
        };
        run_all(nth * 50..(nth + 1) * 50, &rules);
    }
}
