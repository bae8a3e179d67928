//! Unique keys beside the primary one, on simulated clusters: whoever claims a value, in whatever order it is heard of,
//! all nodes end with the same rows, the keys hold at every node at all times, and every row that had to go is logged.
//! Rules that are simpler must be caught. Two values of the server may be one for the daemon.
//!
//! `ANABRANCH_SIM_SEED=7 cargo test -p anabranch-conflict --test it unique -- --nocapture` runs seed 7 alone,
//! `ANABRANCH_SIM_TIMES=10` ten times as many.

mod cluster;
mod node;

use cluster::{Counts, Failure, run};
use node::Rule;

fn replayed() -> Option<u64> {
    let seed = std::env::var("ANABRANCH_SIM_SEED").ok()?;
    Some(seed.parse().expect("ANABRANCH_SIM_SEED is a number"))
}

fn times() -> u64 {
    std::env::var("ANABRANCH_SIM_TIMES")
        .map_or(1, |times| times.parse().expect("ANABRANCH_SIM_TIMES is a number"))
}

#[test]
fn clusters_converge_and_unique_keys_hold_for_any_number_of_writers() {
    let mut counts = Counts::default();
    let seeds = replayed().map_or(0..20_000 * times(), |seed| seed..seed + 1);
    for seed in seeds {
        match run(seed, Rule::Claims) {
            Ok(more) => counts.add(&more),
            Err(failure) => panic!("seed {seed}: {failure:?}"),
        }
    }
    eprintln!("{counts:?}");
    if replayed().is_none() {
        for (what, count) in counts.all() {
            assert!(count > 200, "the simulator hardly tries {what}: {count}");
        }
    }
}

/// How many of the first `within` seeds end as `expected` says.
fn caught(rule: Rule, within: u64, expected: fn(&Failure) -> bool) -> usize {
    let fails = |seed: &u64| run(*seed, rule).is_err_and(|failure| expected(&failure));
    let count = (0..within).filter(fails).count();
    eprintln!("{rule:?}: {count} of {within}");
    count
}

const fn diverges(failure: &Failure) -> bool {
    matches!(failure, Failure::Diverged(_))
}

#[test]
fn the_later_evicts_and_the_earlier_is_refused_is_caught_diverging() {
    assert!(caught(Rule::Arrival, 2_000, diverges) > 50);
}

#[test]
fn the_highest_claim_alone_is_caught_where_the_server_lets_two_rows_be() {
    assert!(caught(Rule::Highest, 5_000, diverges) > 10);
}

#[test]
fn claims_that_go_when_their_row_moves_on_are_caught() {
    assert!(caught(Rule::CurrentOnly, 5_000, diverges) > 10);
}

#[test]
fn rows_that_yield_and_claim_nothing_any_more_are_caught() {
    assert!(caught(Rule::AliveOnly, 5_000, diverges) > 10);
}

#[test]
fn claims_forgotten_before_they_are_stable_are_caught() {
    assert!(caught(Rule::Forgetful, 5_000, diverges) > 10);
}

#[test]
fn a_journal_that_lets_go_of_a_winner_before_its_losers_is_caught() {
    let forgot = |failure: &Failure| matches!(failure, Failure::Forgot(..));
    assert!(caught(Rule::HastyTrim, 5_000, forgot) > 10);
}
