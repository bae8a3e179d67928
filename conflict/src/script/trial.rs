//! Trying a script before it decides anything: made-up conflicts of two to four versions.
//!
//! In:   a script        Out: why it is refused; how often it failed
//! Holds: nothing. The conflicts are made of the script's own words, by a fixed sequence of numbers: the same at every node
//! Invariants: a script that fails at a made-up row is not refused, since columns may be of any type; one that returns
//!        what is no choice is
//! Not here: rows that somebody gives (the command `policy test`)

use std::collections::BTreeMap;

use anabranch_proto::{NodeId, Stamp};
use rust_decimal::Decimal;
use uhlc::NTP64;

use super::{Candidate, Failure, FailureKind, Refusal, Script, Value};

const CONFLICTS: u64 = 96;
/// Columns are made up for so many words.
const WORDS_MAX: usize = 64;

/// What came of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trial {
    /// Made-up conflicts.
    pub conflicts: usize,
    /// In so many of them the script failed.
    pub failed: usize,
    /// The first failure.
    pub first: Option<Failure>,
}

pub(super) fn run(script: &Script) -> Result<Trial, Refusal> {
    let words = words(script.text());
    let mut trial = Trial::default();
    for seed in 0..CONFLICTS {
        let candidates = conflict(&words, &mut Dice(seed));
        let outcome = script.choose(&candidates);
        trial.conflicts += 1;
        if let Some(failure) = &outcome.failure {
            if failure.kind == FailureKind::Choice {
                return Err(Refusal::NoChoice {
                    versions: candidates.len(),
                    failure: failure.clone(),
                });
            }
            trial.failed += 1;
            trial.first.get_or_insert_with(|| failure.clone());
        }
    }
    Ok(trial)
}

/// The identifiers and quoted texts of a script.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    for word in text.split(|c: char| !c.is_alphanumeric() && c != '_') {
        if !word.is_empty() && words.len() < WORDS_MAX && !words.iter().any(|known| known == word) {
            words.push(word.to_owned());
        }
    }
    words
}

/// A fixed sequence of numbers that looks like chance (splitmix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % (limit.max(1) as u64)).unwrap_or(0)
    }
}

fn conflict(words: &[String], dice: &mut Dice) -> Vec<Candidate> {
    // Each column has one type in all versions.
    let types: Vec<usize> = words.iter().map(|_| dice.below(4)).collect();
    let count = 2 + dice.below(3);
    let mut out = Vec::with_capacity(count);
    for node in 1..=count {
        let row = (dice.below(5) > 0).then(|| {
            let columns = words
                .iter()
                .zip(&types)
                .map(|(word, kind)| (word.clone(), value(*kind, words, dice)));
            columns.collect::<BTreeMap<_, _>>()
        });
        let origin = if dice.below(2) == 0 {
            words.get(dice.below(words.len())).cloned()
        } else {
            None
        };
        out.push(Candidate {
            stamp: Stamp {
                time: NTP64(dice.next() >> 8),
                node: NodeId(u16::try_from(node).unwrap_or(u16::MAX)),
            },
            origin: origin.unwrap_or_else(|| format!("node{node}")),
            row,
        });
    }
    out
}

fn value(kind: usize, words: &[String], dice: &mut Dice) -> Value {
    if dice.below(8) == 0 {
        return Value::Null;
    }
    let number = i64::try_from(dice.below(20)).unwrap_or(0) - 4;
    match kind {
        0 => Value::Integer(number),
        1 => Value::Decimal(Decimal::new(number, 1)),
        2 => Value::Bool(dice.below(2) == 0),
        _ if dice.below(2) == 0 => Value::Text(number.to_string()),
        _ => Value::Text(words.get(dice.below(words.len())).cloned().unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_conflicts_are_the_same_each_time_and_of_every_kind() {
        let words = words("fn resolve(v) { v[0].row.price }");
        assert_eq!(words, ["fn", "resolve", "v", "0", "row", "price"]);
        let all: Vec<Vec<Candidate>> = (0..CONFLICTS)
            .map(|seed| conflict(&words, &mut Dice(seed)))
            .collect();
        assert_eq!(all[7], conflict(&words, &mut Dice(7)));
        for count in 2..=4 {
            assert!(all.iter().any(|candidates| candidates.len() == count));
        }
        assert!(all.iter().flatten().any(|candidate| candidate.row.is_none()));
    }
}
