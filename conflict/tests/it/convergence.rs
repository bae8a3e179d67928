//! Clusters that behave as they should come to the same rows, the right ones, and log every loss.
//!
//! `ANABRANCH_SIM_SEED=7 cargo test -p anabranch-conflict --test it clusters -- --nocapture` runs seed 7 alone
//! and tells what happened.

use crate::sim::{Arbiter, Counts, Rules, run};

/// The one seed to run, if the environment names one.
fn replayed() -> Option<u64> {
    std::env::var("ANABRANCH_SIM_SEED")
        .ok()
        .map(|seed| seed.parse().expect("ANABRANCH_SIM_SEED is a number"))
}

/// Runs every seed; panics at the first that fails.
fn run_all(seeds: std::ops::Range<u64>, rules: &Rules) -> Counts {
    let mut counts = Counts::default();
    let (seeds, trace) = match replayed() {
        Some(seed) => (seed..seed + 1, true),
        None => (seeds, false),
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
    let counts = run_all(0..10_000, &Rules::default());
    if replayed().is_none() {
        for (what, count) in counts.all() {
            assert!(count > 5, "the simulator hardly tries {what}: {count}");
        }
    }
}

#[test]
fn clusters_with_colliding_times_converge() {
    let rules = Rules {
        frozen_clocks: true,
        ..Rules::default()
    };
    run_all(0..3_000, &rules);
}

#[test]
fn clusters_with_origin_priority_over_the_frontier_converge() {
    let rules = Rules {
        arbiter: Arbiter::PriorityOfFrontier,
        truncates: false,
        ..Rules::default()
    };
    run_all(0..3_000, &rules);
}

#[test]
fn clusters_that_nodes_join_all_the_time_converge() {
    let rules = Rules {
        join_often: true,
        ..Rules::default()
    };
    run_all(0..3_000, &rules);
}
