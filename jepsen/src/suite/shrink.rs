//! Shrinking: a violated run again with ever fewer faults, clients and seconds, while the same check stays violated.
//!
//! Times are whole seconds, as the command line and histories have them.
//!
//! Real processes interleave as they like, so a run that was violated once need not be again: what is tried and holds is not
//! proved innocent, and what comes out is small, not smallest.

use std::path::Path;
use std::time::Duration;

use super::{Done, away_from, quietly, violated};
use crate::Result;
use crate::checker::{self, Outcome};
use crate::history::History;
use crate::nemesis::Planned;
use crate::run::Options;

/// Shortest load that is tried.
const SHORTEST: Duration = Duration::from_secs(4);

/// Tries less and less, at most `runs` times.
pub fn shrink(file: &Path, history: &History, first: &Options, runs: usize, out: &Path) -> Result<Outcome> {
    let wanted = violated(&checker::check(history));
    if wanted.is_empty() {
        return Err("nothing to shrink: this history violates nothing".into());
    }
    let out = away_from(file, out.join("shrink"));
    let mut smallest = first.clone();
    smallest.plan = Some(first.plan());
    smallest.progress = false;
    let mut found: Option<Done> = None;
    let mut tried = smaller(&smallest).into_iter();
    for number in 1..=runs {
        let Some(candidate) = tried.next() else { break };
        let done = quietly(&candidate, &out.join(number.to_string()))?;
        println!(
            "[{number}/{runs}] {} faults, {} s, {} clients a node: {} {}",
            candidate.plan().len(),
            candidate.length.as_secs(),
            candidate.clients,
            done.outcome.word(),
            done.failed().join(", ")
        );
        if violated(&done.verdicts)
            .iter()
            .any(|check| wanted.contains(check))
        {
            tried = smaller(&candidate).into_iter();
            smallest = candidate;
            found = Some(done);
        }
    }
    let Some(done) = found else {
        println!("nothing smaller was violated in {runs} runs at most: the history stays as it is");
        return Ok(Outcome::Unknown);
    };
    println!(
        "smallest that was violated: {} s, {} clients a node, faults:",
        smallest.length.as_secs(),
        smallest.clients
    );
    for planned in smallest.plan() {
        let faults: Vec<String> = planned.faults.iter().map(ToString::to_string).collect();
        println!(
            "  after {:?}, for {:?}: {}",
            planned.after,
            planned.length,
            faults.join(" and ")
        );
    }
    println!(
        "again: anabranch-jepsen replay {}",
        done.name.with_extension("jsonl").display()
    );
    Ok(Outcome::Violated)
}

/// As many whole seconds as it takes.
fn whole(length: Duration) -> Duration {
    Duration::from_secs(length.as_secs() + u64::from(length.subsec_nanos() > 0))
}

/// What is less than this, the largest steps first: half of the faults, each fault, some time, a client.
fn smaller(from: &Options) -> Vec<Options> {
    let plan = from.plan();
    let with = |plan: Vec<Planned>| {
        let needed: Duration = plan.iter().map(|one| one.after + one.length).sum();
        let mut next = from.clone();
        next.length = from
            .length
            .min(whole(needed + Duration::from_secs(3)))
            .max(SHORTEST);
        next.plan = Some(plan);
        next
    };
    let mut candidates = Vec::new();
    if plan.len() > 1 {
        let (first, second) = plan.split_at(plan.len() / 2);
        candidates.extend([with(first.to_vec()), with(second.to_vec())]);
    }
    if plan.len() > 3 {
        candidates.extend((0..plan.len()).map(|gone| {
            let mut plan = plan.clone();
            plan.remove(gone);
            with(plan)
        }));
    }
    let needed: Duration = plan.iter().map(|one| one.after + one.length).sum();
    let shorter = whole(from.length.mul_f64(0.6).max(needed)).max(SHORTEST);
    if shorter < from.length {
        let mut next = from.clone();
        next.length = shorter;
        candidates.push(next);
    }
    if from.clients > 1 {
        let mut next = from.clone();
        next.clients -= 1;
        candidates.push(next);
    }
    candidates
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_candidate_is_less_and_the_end_is_reached() {
        let mut options = super::super::options("register", "partition", 60, 1).unwrap();
        options.plan = Some(options.plan());
        let size = |options: &Options| (options.plan().len(), options.length, options.clients);
        let mut steps = 0;
        loop {
            let candidates = smaller(&options);
            for next in &candidates {
                let (a, b) = (size(next), size(&options));
                assert!(a.0 <= b.0 && a.1 <= b.1 && a.2 <= b.2 && a != b);
                assert_eq!(next.length.subsec_nanos(), 0);
            }
            let Some(next) = candidates.into_iter().next_back() else {
                break;
            };
            options = next;
            steps += 1;
            assert!(steps < 1_000);
        }
        assert_eq!(options.clients, 1);
    }
}
