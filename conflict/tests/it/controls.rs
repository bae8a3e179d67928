//! Negative controls: each breaks one rule, and the simulator must notice. If one of these fails, the simulator
//! has gone blind, and what [`crate::convergence`] says is worth nothing.

use anabranch_conflict::frontier::{Deletes, Order, Policy};

use crate::sim::oracle::Failure;
use anabranch_conflict::merge::number::Kind as Number;
use anabranch_conflict::merge::{List, Rule};

use crate::sim::change::{How, Pick, Switch};
use crate::sim::checked::Check;
use crate::sim::{Arbiter, Choice, Columns, Joining, Merging, Reconcile, Rules, collections, groups, run};

/// The right rules but for one change.
fn broken(change: impl FnOnce(&mut Rules)) -> Rules {
    let mut rules = Rules::default();
    change(&mut rules);
    rules
}

/// Asserts that one of the first `within` seeds fails as `expected` says.
fn assert_noticed(rules: &Rules, within: u64, expected: fn(&Failure) -> bool) {
    assert_noticed_from(0, rules, within, expected);
}

/// The same of what few seeds notice: begins with one that did.
fn assert_noticed_from(seed: u64, rules: &Rules, within: u64, expected: fn(&Failure) -> bool) {
    let fails = |seed: &u64| run(*seed, rules, false).is_err_and(|failure| expected(&failure));
    let first = (seed..within).chain(0..seed).find(fails);
    eprintln!("first noticed with seed {first:?}");
    assert!(first.is_some(), "not noticed in {within} runs");
}

fn diverges(failure: &Failure) -> bool {
    matches!(failure, Failure::Rows(_))
}

fn overwrites(failure: &Failure) -> bool {
    matches!(failure, Failure::Overwritten(_))
}

fn logs_wrongly(failure: &Failure) -> bool {
    matches!(failure, Failure::Missing(_) | Failure::Unfounded(_))
}

fn names_otherwise(failure: &Failure) -> bool {
    matches!(failure, Failure::Unfounded(text) if text.contains("has another id"))
}

/// Any wrong end of the rows or of the log.
fn goes_wrong(failure: &Failure) -> bool {
    diverges(failure) || overwrites(failure) || logs_wrongly(failure)
}

#[test]
fn stability_learned_on_the_side_is_noticed() {
    let rules = broken(|rules| rules.gossip = true);
    assert_noticed(&rules, 2_000, diverges);
    assert_noticed(&rules, 2_000, logs_wrongly);
}

#[test]
fn heartbeats_ahead_of_the_decoder_are_noticed() {
    assert_noticed_from(
        1_908,
        &broken(|rules| rules.hasty_heartbeats = true),
        20_000,
        |failure| diverges(failure) || logs_wrongly(failure),
    );
}

#[test]
fn tombstones_dropped_early_are_noticed() {
    assert_noticed(&broken(|rules| rules.drop_tombstones = true), 2_000, diverges);
}

/// Rows end equal all the same: the decoder meets the write that was overwritten before the echo of what overwrote it, so a
/// repair puts it back. But for that long it is gone for all who look.
#[test]
fn a_slow_path_without_the_fence_is_noticed() {
    assert_noticed(&broken(|rules| rules.fence = false), 2_000, overwrites);
}

#[test]
fn statements_without_the_guard_are_noticed() {
    assert_noticed(&broken(|rules| rules.guard = false), 2_000, overwrites);
}

#[test]
fn absent_keys_that_are_not_reconciled_are_noticed() {
    assert_noticed(
        &broken(|rules| rules.reconcile = Reconcile::Never),
        2_000,
        diverges,
    );
}

#[test]
fn repairing_only_rows_that_a_local_delete_won_is_noticed() {
    assert_noticed_from(
        875,
        &broken(|rules| rules.reconcile = Reconcile::WinningDeletes),
        20_000,
        diverges,
    );
}

#[test]
fn forgetting_a_row_under_repair_is_noticed() {
    assert_noticed(&broken(|rules| rules.forget_under_repair = true), 2_000, diverges);
}

#[test]
fn equal_times_decided_by_the_applying_node_are_noticed() {
    let rules = broken(|rules| {
        rules.arbiter = Arbiter::LocalOnEqualTime;
        rules.frozen_clocks = true;
    });
    assert_noticed(&rules, 2_000, diverges);
}

#[test]
fn origin_priority_over_the_current_version_is_noticed() {
    let rules = broken(|rules| {
        rules.arbiter = Arbiter::PriorityOfCurrent;
        rules.truncates = false;
    });
    assert_noticed(&rules, 20_000, diverges);
}

/// First update wins, with one rule broken.
fn broken_first_update(change: impl FnOnce(&mut Rules)) -> Rules {
    broken(|rules| {
        rules.arbiter = Arbiter::Ranked(Policy {
            order: Order::FirstUpdateWins,
            deletes: Deletes::ByStamp,
        });
        change(rules);
    })
}

#[test]
fn winners_that_come_back_and_are_not_written_are_noticed() {
    let rules = broken_first_update(|rules| rules.forget_comebacks = true);
    assert_noticed(&rules, 2_000, diverges);
}

#[test]
fn a_truncate_that_spares_what_lost_is_noticed() {
    let rules = broken_first_update(|rules| rules.truncate_spares_losers = true);
    assert_noticed(&rules, 2_000, diverges);
}

/// Merged columns, with one rule broken.
fn broken_merge(how: Merging, change: impl FnOnce(&mut Rules)) -> Rules {
    broken(|rules| {
        rules.arbiter = Arbiter::Merged(how);
        change(rules);
    })
}

#[test]
fn columns_merged_into_the_row_as_they_arrive_are_noticed() {
    assert_noticed(&broken_merge(Merging::Incremental, |_| {}), 2_000, diverges);
}

#[test]
fn a_least_value_of_which_the_greatest_is_kept_is_noticed() {
    let greatest = Rule::Max(Number::Integer(8));
    let rules = broken_merge(Merging::Folded, |rules| {
        rules.columns = Columns::Mirrored(greatest);
    });
    assert_noticed(&rules, 2_000, diverges);
}

#[test]
fn a_refused_version_that_counts_as_not_applied_is_noticed() {
    let rules = broken_merge(Merging::Folded, |rules| {
        rules.truncates = false;
        rules.check = Some(Check::NotApplied);
    });
    assert_noticed(&rules, 2_000, diverges);
}

#[test]
fn versions_forgotten_above_one_that_is_not_stable_are_noticed() {
    assert_noticed(&broken_merge(Merging::ForgetAnyStable, |_| {}), 20_000, diverges);
}

#[test]
fn versions_let_go_before_they_are_stable_are_noticed() {
    assert_noticed(&broken_merge(Merging::LetGoUnstable, |_| {}), 2_000, diverges);
}

#[test]
fn versions_let_go_that_one_which_is_left_does_not_cover_are_noticed() {
    assert_noticed(&broken_merge(Merging::LetGoUncovered, |_| {}), 20_000, diverges);
}

#[test]
fn a_script_that_is_asked_about_two_versions_of_several_is_noticed() {
    let rules = broken_merge(Merging::ChosenOfTwo(Choice::Highest), |_| {});
    assert_noticed(&rules, 2_000, diverges);
}

/// Columns of collections, with one of them merged as `how` says, or by another rule.
fn broken_collections(how: Merging, rule: Option<(usize, Rule)>) -> Rules {
    let mut rules = collections::RULES;
    if let Some((at, rule)) = rule {
        rules[at] = rule;
    }
    broken_merge(how, |broken| broken.columns = Columns::Collections(rules))
}

fn differs(failure: &Failure) -> bool {
    matches!(failure, Failure::Rows(text) if text.contains(" holds "))
}

#[test]
fn a_set_a_list_and_a_document_changed_as_updates_arrive_are_noticed() {
    for at in [1, 2, 3] {
        assert_noticed(&broken_collections(Merging::Arriving(at), None), 5_000, differs);
    }
}

#[test]
fn a_set_a_list_and_a_document_that_the_last_writer_decides_are_noticed() {
    for at in [1, 2, 3] {
        let rules = broken_collections(Merging::Folded, Some((at, Rule::Unit(at as u16))));
        assert_noticed(&rules, 2_000, diverges);
    }
}

#[test]
fn a_set_that_is_appended_to_and_a_list_that_is_a_set_are_noticed() {
    let int4 = 23;
    let list = Rule::Append(List::Array(int4));
    assert_noticed(
        &broken_collections(Merging::Folded, Some((1, list))),
        2_000,
        diverges,
    );
    let set = Rule::Set(int4);
    assert_noticed(
        &broken_collections(Merging::Folded, Some((2, set))),
        2_000,
        diverges,
    );
}

#[test]
fn collections_forgotten_above_a_version_that_is_not_stable_are_noticed() {
    assert_noticed(
        &broken_collections(Merging::ForgetAnyStable, None),
        20_000,
        diverges,
    );
}

#[test]
fn columns_of_a_group_that_are_merged_each_by_itself_are_noticed() {
    let mixes =
        |failure: &Failure| matches!(failure, Failure::Rows(text) if text.contains("of no one writer"));
    for meant in groups::all() {
        if meant != groups::APART {
            let rules = broken_merge(Merging::Folded, |rules| {
                rules.columns = Columns::Groups(groups::APART, meant);
            });
            assert_noticed(&rules, 2_000, mixes);
        }
    }
}

#[test]
fn checkpoints_past_pending_repairs_are_noticed() {
    assert_noticed_from(
        9_839,
        &broken(|rules| rules.careless_checkpoints = true),
        20_000,
        diverges,
    );
}

#[test]
fn own_writes_met_again_after_an_answer_are_noticed() {
    assert_noticed_from(
        3_425,
        &broken(|rules| rules.forget_answers = true),
        20_000,
        logs_wrongly,
    );
}

#[test]
fn conflicts_that_each_node_names_by_itself_are_noticed() {
    assert_noticed(&broken(|rules| rules.own_ids = true), 2_000, names_otherwise);
}

/// The right rules but for one change, where nodes join all the time.
fn broken_joins(change: impl FnOnce(&mut Rules)) -> Rules {
    broken(|rules| {
        rules.join_often = true;
        change(rules);
    })
}

#[test]
fn a_joiner_that_members_hear_of_after_the_cut_is_noticed() {
    let rules = broken_joins(|rules| rules.joining = Joining::AfterCut);
    assert_noticed(&rules, 5_000, goes_wrong);
}

#[test]
fn a_joiner_that_members_know_only_once_it_speaks_is_noticed() {
    let rules = broken_joins(|rules| rules.joining = Joining::OnSight);
    assert_noticed(&rules, 5_000, goes_wrong);
}

#[test]
fn a_joiner_that_knows_nothing_of_unsettled_rows_is_noticed() {
    assert_noticed(
        &broken_joins(|rules| rules.joiner_index = false),
        5_000,
        goes_wrong,
    );
}

#[test]
fn a_joiner_that_trusts_a_copy_with_a_repair_under_way_is_noticed() {
    assert_noticed(
        &broken_joins(|rules| rules.joiner_repairs = false),
        5_000,
        goes_wrong,
    );
}

#[test]
fn a_journal_that_lets_go_what_is_stable_at_once_is_noticed() {
    let rules = broken_first_update(|rules| rules.hasty_trimming = true);
    assert_noticed_from(5_306, &rules, 20_000, diverges);
}

/// A change of the policy that is made wrongly.
fn broken_change(old: Pick, new: Pick, how: How) -> Rules {
    Switch { old, new, how }.rules()
}

#[test]
fn a_policy_that_each_node_changes_when_it_hears_of_it_is_noticed() {
    let rules = broken_change(Pick::Last, Pick::First, How::OnHearing);
    assert_noticed(&rules, 2_000, diverges);
}

#[test]
fn a_policy_that_the_last_version_of_a_row_chooses_is_noticed() {
    let rules = broken_change(Pick::Last, Pick::First, How::ByTheLastVersion);
    assert_noticed(&rules, 5_000, diverges);
}

#[test]
fn a_change_that_is_made_while_some_keep_one_version_of_a_row_is_noticed() {
    let rules = broken_change(Pick::Last, Pick::First, How::Unasked);
    assert_noticed(&rules, 2_000, diverges);
}

#[test]
fn a_policy_of_before_that_is_forgotten_once_all_have_made_the_change_is_noticed() {
    let rules = broken_change(Pick::Last, Pick::First, How::Hasty);
    assert_noticed(&rules, 20_000, goes_wrong);
}
