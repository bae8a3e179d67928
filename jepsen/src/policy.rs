//! Policies under which workloads of plain rows can be run: what all nodes are told, and what has to be decided by it.
//!
//! In:   a name, of the command line or of a header; versions of a row        Out: a policy file; the version that the row becomes
//! Invariants: 1. what has to be decided is what `anabranch-conflict` reads in the policy file (a test compares them); 2. a version is
//!        chosen of the whole frontier, of all versions that there are, so nothing of who came first goes in
//! Not here: judging by it (`crate::checker`); the columns that `counter`, `bank` and `tpcb` add (`crate::workload`)

use anabranch_conflict::frontier::{Deletes, Frontier, Order, Policy};
use anabranch_proto::NodeId;
use clap::ValueEnum;

use crate::checker::Check;
use crate::history::History;
use crate::nemesis;
use crate::system::System;
use crate::truth::Version;
use crate::workload::Workload;

/// What decides between concurrent writes of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Rule {
    /// The highest stamp: no policy file.
    #[default]
    LastUpdateWins,
    /// The lowest stamp.
    FirstUpdateWins,
    /// n2 before n1, and both before all others.
    OriginPriority,
    /// Any delete is preferred to every put.
    DeleteWins,
    /// Any put is preferred to every delete.
    UpdateWins,
}

/// What holds only where a later write never loses to an earlier one: a row may show a version again that somebody knows to be overwritten.
const NOT_OF_OTHERS: &[Check] = &[Check::Causal, Check::Visible, Check::Atomic, Check::Session];

impl Rule {
    /// As on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::LastUpdateWins => "last_update_wins",
            Self::FirstUpdateWins => "first_update_wins",
            Self::OriginPriority => "origin_priority",
            Self::DeleteWins => "delete_wins",
            Self::UpdateWins => "update_wins",
        }
    }

    /// The rule of a name; a header that names none has the usual one.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "" => Some(Self::default()),
            name => Self::value_variants()
                .iter()
                .copied()
                .find(|rule| rule.name() == name),
        }
    }

    /// What a history was run under. What this program does not know is not judged at all.
    pub fn of(history: &History) -> Self {
        Self::named(&history.header.policy).unwrap_or_default()
    }

    /// Its name, where it is not the usual one.
    pub fn unusual(self) -> Option<&'static str> {
        (self != Self::default()).then(|| self.name())
    }

    /// The policy file of all nodes, if there has to be one.
    pub fn file(self) -> Option<String> {
        let says = match self {
            Self::LastUpdateWins => return None,
            Self::FirstUpdateWins => "policy = \"first_update_wins\"",
            Self::OriginPriority => "policy = \"origin_priority\"\npriority = [\"n2\", \"n1\"]",
            Self::DeleteWins => "deletes = \"delete_wins\"",
            Self::UpdateWins => "deletes = \"update_wins\"",
        };
        Some(format!("[[table]]\nname = \"public.kv*\"\n{says}\n"))
    }

    /// What it has to decide.
    pub fn decides(self) -> Policy {
        let (order, deletes) = match self {
            Self::LastUpdateWins => (Order::LastUpdateWins, Deletes::ByStamp),
            Self::FirstUpdateWins => (Order::FirstUpdateWins, Deletes::ByStamp),
            Self::OriginPriority => {
                let ranks = [(NodeId(2), 2), (NodeId(1), 1)];
                (Order::OriginPriority(ranks.into()), Deletes::ByStamp)
            }
            Self::DeleteWins => (Order::LastUpdateWins, Deletes::DeleteWins),
            Self::UpdateWins => (Order::LastUpdateWins, Deletes::UpdateWins),
        };
        Policy { order, deletes }
    }

    /// The version that a row becomes, of all that there are, in the order of their stamps.
    pub fn winner<'a>(
        self,
        mut versions: impl DoubleEndedIterator<Item = &'a Version>,
    ) -> Option<&'a Version> {
        if self == Self::LastUpdateWins {
            return versions.next_back();
        }
        let frontier = frontier(versions);
        let winner = frontier.resolve(&self.decides())?;
        Some(winner.value)
    }

    /// Why it is not for this, if so.
    pub fn unfit(self, workload: &Workload, nemesis: &str, system: System) -> Option<&'static str> {
        if self == Self::LastUpdateWins {
            return None;
        }
        if system != System::Anabranch {
            return Some("policies are Anabranch's");
        }
        if workload.adds || workload.claims || workload.appends {
            return Some("it is for workloads whose rows are single values");
        }
        nemesis::heals(nemesis).then_some("what a gap held comes again as other versions")
    }

    /// Of the checks of a workload those that its outcome must stand.
    pub fn of_checks(self, checks: &mut Vec<Check>) {
        if self == Self::LastUpdateWins {
            return;
        }
        // That a value was written at all is a part of `causal` that holds.
        let reads = checks.contains(&Check::Causal);
        checks.retain(|check| !NOT_OF_OTHERS.contains(check));
        if reads {
            checks.push(Check::ThinAir);
        }
    }
}

/// The versions of a row that no other knew of. They are given in the order of their stamps, so none before one that it knew of.
pub fn frontier<'a>(versions: impl Iterator<Item = &'a Version>) -> Frontier<&'a Version> {
    let mut frontier = Frontier::new();
    for version in versions {
        frontier.admit(version.decided(), version, &version.deps);
    }
    frontier
}

#[cfg(test)]
mod tests {
    use anabranch_conflict::policy::Policies;

    use super::*;
    use crate::workload;

    #[test]
    fn what_has_to_be_decided_is_what_the_file_says() {
        let members = [1, 2, 3].map(|id| (format!("n{id}"), NodeId(id)));
        for rule in Rule::value_variants() {
            let file = rule.file().unwrap_or_default();
            let read = Policies::parse(&file, &members.clone().into(), |_| Err("none".to_owned()));
            let read = read.unwrap();
            // `tables` has kv1, kv2, ...
            for table in ["kv", "kv40"] {
                assert_eq!(read.of("public", table).policy, rule.decides(), "{rule:?}");
            }
            assert!(read.is_last_writer("public", "witness"));
        }
    }

    #[test]
    fn each_has_the_name_of_the_command_line() {
        for rule in Rule::value_variants() {
            let name = rule.to_possible_value().unwrap().get_name().to_owned();
            assert_eq!(name, rule.name());
            assert_eq!(Rule::named(&name), Some(*rule));
        }
        assert_eq!(Rule::named(""), Some(Rule::LastUpdateWins));
        assert_eq!(Rule::named("latest"), None);
    }

    #[test]
    fn it_is_for_workloads_of_plain_rows_and_asks_what_holds_under_it() {
        let rule = Rule::FirstUpdateWins;
        let fit: Vec<&str> = workload::all()
            .iter()
            .filter(|workload| rule.unfit(workload, "none", System::Anabranch).is_none())
            .map(|workload| workload.name)
            .collect();
        assert_eq!(
            fit,
            [
                "register", "set", "causal", "atomic", "mix", "toast", "tables", "bulk"
            ]
        );
        for name in fit {
            let mut checks = Workload::named(name).unwrap().checks("anabranch");
            rule.of_checks(&mut checks);
            let asks = |check: &Check| checks.contains(check);
            assert!(
                asks(&Check::FinalValue) && asks(&Check::LogsEqual) && !asks(&Check::Session),
                "{name}"
            );
            let thin_air = checks.iter().filter(|check| **check == Check::ThinAir).count();
            assert_eq!(thin_air, usize::from(name != "set"), "{name}");
        }
        let mix = Workload::named("mix").unwrap();
        assert!(rule.unfit(&mix, "heal", System::Anabranch).is_some());
        assert!(rule.unfit(&mix, "kill", System::Native).is_some());
    }
}
