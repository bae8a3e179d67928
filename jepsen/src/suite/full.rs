//! `suite full`: every workload under every nemesis.
//!
//! In:   what was chosen, how long, which part        Out: runs, in an order in which any beginning has the most to say
//! Not here: running them (`super`)

use std::str::FromStr;

use super::{Outcome, SuiteArgs, many, on, options};
use crate::policy::Rule;
use crate::report::{self, Summary};
use crate::run::Options;
use crate::system::System;
use crate::{Result, args, nemesis, workload};

/// What a run takes beside its load: servers and daemons started, quiet, everything read and judged. Seconds.
const BESIDE: u64 = 15;

/// Shortest load: a fault has to fit in.
const SHORTEST: u64 = 10;

/// One part of so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shard {
    /// From 1.
    part: usize,
    of: usize,
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let read = || {
            let (part, of) = text.split_once('/')?;
            let (part, of) = (part.parse().ok()?, of.parse().ok()?);
            (1..=of).contains(&part).then_some(Self { part, of })
        };
        read().ok_or_else(|| format!("`{text}` is no part: say `2/3` for the second of three"))
    }
}

/// A workload under a nemesis.
struct Pair {
    workload: &'static str,
    nemesis: &'static str,
    /// Added to the first seed, so that a nemesis does not do the same to every workload.
    number: u64,
}

/// All pairs, in rounds: in each round every nemesis once, and workloads in turn, so that after one round all nemeses and all
/// workloads were there.
fn pairs() -> Vec<Pair> {
    let workloads = workload::all();
    let count = workloads.len();
    let places = (0..count)
        .flat_map(|round| (0..nemesis::ALL.len()).map(move |nemesis| ((nemesis + round) % count, nemesis)));
    let named = places.filter_map(|(workload, nemesis)| {
        let (workload, nemesis) = (workloads.get(workload)?, nemesis::ALL.get(nemesis)?);
        let fits = nemesis::unfit(nemesis.name, workload).is_none();
        fits.then_some((workload.name, nemesis))
    });
    (0..)
        .zip(named)
        .map(|(number, (workload, nemesis))| Pair {
            workload,
            nemesis: nemesis.name,
            number,
        })
        .collect()
}

/// Runs the chosen ones.
pub(super) fn run(args: &SuiteArgs) -> Result<Outcome> {
    let chosen = |only: &[String], name: &str| only.is_empty() || only.iter().any(|one| one == name);
    for name in &args.only {
        args::workload(name)?;
    }
    for name in &args.nemesis {
        args::nemesis_exists(name)?;
    }
    let Shard { part, of } = args.shard;
    let all = pairs();
    let is_ruled = |pair: &Pair| {
        let workload = workload::Workload::named(pair.workload);
        workload.is_some_and(|workload| super::is_ruled(args, &workload, pair.nemesis))
    };
    let wanted = all
        .iter()
        .filter(|pair| chosen(&args.only, pair.workload) && chosen(&args.nemesis, pair.nemesis))
        .filter(|pair| args.policy == Rule::default() || is_ruled(pair));
    // The same length for all parts, whichever has one pair more.
    let count = wanted.clone().count().div_ceil(of).max(1);
    let seconds = (args.minutes * 60 / u64::try_from(count)?)
        .saturating_sub(BESIDE)
        .max(SHORTEST);
    let first = args.seed.unwrap_or(1);
    let runs = wanted
        .skip((part - 1) * count)
        .take(count)
        .map(|pair| Ok(on(args, of_system(args.system, pair, seconds, first)?)))
        .collect::<Result<Vec<_>>>()?;
    if runs.is_empty() {
        return Err("nothing is left to run of what was chosen".into());
    }
    let name = args.title("full", args.system);
    let title = match of {
        1 => name,
        _ => format!("{name}-{part}of{of}"),
    };
    many::run(&title, &runs, args)
}

fn of_system(system: System, pair: &Pair, seconds: u64, first_seed: u64) -> Result<Options> {
    let mut options = options(pair.workload, pair.nemesis, seconds, first_seed + pair.number)?;
    if system != System::Anabranch {
        options.servers = system.servers();
        options.system = system;
    }
    Ok(options)
}

/// Verdicts by nemesis and workload, as far as they were asked.
pub(super) fn grid(runs: &[Summary]) -> String {
    let workloads: Vec<&str> = workload::all()
        .iter()
        .map(|workload| workload.name)
        .filter(|name| runs.iter().any(|run| run.workload == *name))
        .collect();
    let mut header = vec!["nemesis"];
    header.extend(&workloads);
    let networks = many::networks(runs);
    let each = nemesis::ALL
        .iter()
        .flat_map(|nemesis| networks.iter().map(move |network| (nemesis.name, *network)));
    let rows = each.filter_map(|(nemesis, network)| {
        let of: Vec<&Summary> = runs
            .iter()
            .filter(|run| run.nemesis == nemesis && run.network == network)
            .collect();
        let cell = |workload: &&str| {
            let words = of
                .iter()
                .filter(|run| run.workload == *workload)
                .map(|run| run.outcome.as_str());
            words.collect::<Vec<_>>().join(" ")
        };
        let mut cells = vec![report::on_network(nemesis, network)];
        cells.extend(workloads.iter().map(cell));
        // Whatever was left out of the usual runs is seen to be.
        (network.is_empty() || !of.is_empty()).then_some(cells)
    });
    report::terminal(&header, rows)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_pair_is_there_once_and_the_first_round_has_every_workload_and_every_nemesis() {
        let all = pairs();
        let runnable = workload::all();
        let distinct: BTreeSet<_> = all.iter().map(|pair| (pair.workload, pair.nemesis)).collect();
        assert_eq!(distinct.len(), all.len());
        let unfit = |nemesis: &nemesis::Nemesis| {
            let unfit = |workload: &&workload::Workload| nemesis::unfit(nemesis.name, workload).is_some();
            runnable.iter().filter(unfit).count()
        };
        let left_out: usize = nemesis::ALL.iter().map(unfit).sum();
        assert_eq!(all.len() + left_out, runnable.len() * nemesis::ALL.len());
        let first = &all[..nemesis::ALL.len()];
        let workloads: BTreeSet<_> = first.iter().map(|pair| pair.workload).collect();
        let nemeses: BTreeSet<_> = first.iter().map(|pair| pair.nemesis).collect();
        assert_eq!(
            (workloads.len(), nemeses.len()),
            (runnable.len(), nemesis::ALL.len())
        );
    }

    #[test]
    fn a_part_is_said_as_one_of_so_many() {
        assert_eq!("2/3".parse(), Ok(Shard { part: 2, of: 3 }));
        for wrong in ["0/3", "4/3", "2", "a/b", "1/0", ""] {
            assert!(wrong.parse::<Shard>().is_err(), "{wrong}");
        }
    }
}
