//! Many runs, one after the other, and the table over them; also over those of several suites, such as the parts of one.
//!
//! In:   options, or the JSON files of suites        Out: a table, a page, JSON
//! Invariants: what was impossible, or of what nobody can tell, is counted as such, never as held

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Output, Suite, SuiteArgs, full, impossible, quietly, unusual};
use crate::checker::Outcome;
use crate::report::{self, Summary};
use crate::run::Options;
use crate::{Result, args, nemesis, workload};

/// What a run is called that could not be made.
const IMPOSSIBLE: &str = "impossible";

/// The JSON of a suite.
#[derive(Debug, Serialize, Deserialize)]
pub struct Runs {
    /// All together.
    outcome: Outcome,
    /// So many were to be.
    planned: usize,
    /// Those that were.
    runs: Vec<Summary>,
}

impl Runs {
    fn outcome_of(runs: &[Summary]) -> Outcome {
        let each = runs.iter().map(|run| match run.outcome.as_str() {
            word if word == Outcome::Holds.word() => Outcome::Holds,
            word if word == Outcome::Violated.word() => Outcome::Violated,
            _ => Outcome::Unknown,
        });
        each.max().unwrap_or(Outcome::Unknown)
    }

    fn count(&self, word: &str) -> usize {
        self.runs.iter().filter(|run| run.outcome == word).count()
    }
}

/// Runs them all, prints and writes a summary.
pub(super) fn run(title: &str, options: &[Options], args: &SuiteArgs) -> Result<Outcome> {
    let out = &args.out.out;
    std::fs::create_dir_all(out)?;
    let mut runs = Runs {
        outcome: Outcome::Holds,
        planned: options.len(),
        runs: Vec::new(),
    };
    for (number, options) in options.iter().enumerate() {
        let summary = one(options, out, args.output);
        eprintln!(
            "[{}/{}] {} seed {}: {} {}",
            number + 1,
            runs.planned,
            summary.run,
            summary.seed,
            summary.outcome,
            summary.failed.join(", ")
        );
        runs.runs.push(summary);
        runs.outcome = Runs::outcome_of(&runs.runs);
        // After each: a long suite that is ended early has told what it saw.
        std::fs::write(
            out.join(format!("{title}.html")),
            report::summary(title, &runs.runs),
        )?;
        let json = serde_json::to_string_pretty(&runs)?;
        std::fs::write(out.join(format!("{title}.json")), json)?;
    }
    print(&runs, args.output, args.suite == Suite::Full)?;
    Ok(runs.outcome)
}

fn one(options: &Options, out: &Path, output: Output) -> Summary {
    let network = unusual(options.network.name());
    let run = report::run_name(options.workload.name, options.policy, &options.nemesis);
    let without_history = |outcome: &str, why: String| Summary {
        workload: options.workload.name.to_owned(),
        nemesis: options.nemesis.clone(),
        run: report::on_network(&run, &network),
        network: network.clone(),
        seed: options.seed,
        acknowledged: 0,
        faults: (0, 0),
        variants: BTreeMap::new(),
        recovery: None,
        quiet: None,
        outcome: outcome.to_owned(),
        failed: vec![why],
        again: options.command(),
        page: String::new(),
    };
    if let Some(why) = impossible(options) {
        return without_history(IMPOSSIBLE, why);
    }
    match quietly(options, out) {
        Ok(done) => {
            if done.outcome != Outcome::Holds && output == Output::Table {
                args::print_verdicts(&done.verdicts);
                println!("again: {}", done.history.header.command);
            }
            done.summary()
        }
        Err(error) => without_history(Outcome::Unknown.word(), error.to_string()),
    }
}

/// One table of the JSON files of several suites; the page, too, if it is asked for.
pub fn merge(files: &[PathBuf], html: Option<&Path>, output: Output) -> Result<Outcome> {
    let mut all = Runs {
        outcome: Outcome::Unknown,
        planned: 0,
        runs: Vec::new(),
    };
    for file in files {
        let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
        let runs: Runs = serde_json::from_str(&text)
            .map_err(|error| format!("{}: not the JSON of a suite: {error}", file.display()))?;
        all.planned += runs.planned;
        all.runs.extend(runs.runs);
    }
    all.outcome = Runs::outcome_of(&all.runs);
    if let Some(html) = html {
        std::fs::write(html, report::summary("all runs", &all.runs))?;
    }
    print(&all, output, true)?;
    Ok(all.outcome)
}

fn print(runs: &Runs, output: Output, grid: bool) -> Result<()> {
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(runs)?),
        Output::Markdown => println!("{}", markdown(runs)),
        Output::Table => {
            println!("{}", table(&runs.runs));
            if grid {
                println!("{}", full::grid(&runs.runs));
                let tried = tried(&runs.runs).into_iter();
                let rows = tried.map(|(kind, count)| vec![kind.to_owned(), count.to_string()]);
                println!("{}", report::terminal(&["fault", "how often"], rows));
            }
            println!("{}", words(runs));
            println!("=> {}", runs.outcome.word());
        }
    }
    Ok(())
}

fn table(summaries: &[Summary]) -> String {
    let header = [
        "run",
        "seed",
        "acknowledged",
        "faults",
        "impossible",
        "equal after undoing",
        "after load",
        "verdict",
        "not held",
    ];
    let rows = summaries.iter().map(|run| {
        vec![
            run.run.clone(),
            run.seed.to_string(),
            run.acknowledged.to_string(),
            run.faults.0.to_string(),
            run.faults.1.to_string(),
            report::seconds(run.recovery),
            report::seconds(run.quiet),
            run.outcome.clone(),
            run.failed.join(", "),
        ]
    });
    report::terminal(&header, rows)
}

/// All in a paragraph.
fn words(runs: &Runs) -> String {
    let sum = |of: fn(&Summary) -> usize| runs.runs.iter().map(of).sum::<usize>();
    let recovery = span(&runs.runs, |run| run.recovery);
    let quiet = span(&runs.runs, |run| run.quiet);
    format!(
        "Of {} runs that were planned {} were made: {} hold, {} are violated, of {} nobody can tell, {} were impossible. {} \
         transactions were acknowledged, {} faults happened, {} could not be made. Rows were equal {recovery} after the undoing of the \
         last fault, which has the rest of the load in it, and {quiet} after the end of the load.",
        runs.planned,
        runs.runs.len() - runs.count(IMPOSSIBLE),
        runs.count(Outcome::Holds.word()),
        runs.count(Outcome::Violated.word()),
        runs.count(Outcome::Unknown.word()),
        runs.count(IMPOSSIBLE),
        sum(|run| run.acknowledged),
        sum(|run| run.faults.0),
        sum(|run| run.faults.1),
    )
}

/// How often each kind of fault happened in all of them together. Runs of before they were counted have none.
fn tried(runs: &[Summary]) -> BTreeMap<&str, usize> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (kind, count) in runs.iter().flat_map(|run| &run.variants) {
        *counts.entry(kind.as_str()).or_default() += count;
    }
    counts
}

/// From the shortest to the longest.
fn span(runs: &[Summary], of: fn(&Summary) -> Option<f64>) -> String {
    let seconds = || runs.iter().filter_map(of);
    match (seconds().reduce(f64::min), seconds().reduce(f64::max)) {
        (Some(least), Some(most)) => format!("{least:.1} to {most:.1} s"),
        _ => "never".to_owned(),
    }
}

/// For a document: in words, a row for each nemesis, each workload and each kind of fault, and what does not hold with the command that
/// runs it again.
fn markdown(runs: &Runs) -> String {
    let mut out = format!("{}\n\n", words(runs));
    let nemeses: Vec<&str> = nemesis::ALL
        .iter()
        .chain(nemesis::AIMED)
        .map(|one| one.name)
        .collect();
    let workloads: Vec<&str> = workload::all().iter().map(|one| one.name).collect();
    rows(&mut out, "nemesis", &nemeses, runs, |run| &run.nemesis);
    rows(&mut out, "workload", &workloads, runs, |run| &run.workload);
    let tried = tried(&runs.runs);
    if !tried.is_empty() {
        out.push_str("| fault | how often |\n|---|---|\n");
        for (kind, count) in tried {
            out.push_str(&format!("| {kind} | {count} |\n"));
        }
        out.push('\n');
    }
    let holds = Outcome::Holds.word();
    for run in runs.runs.iter().filter(|run| run.outcome != holds) {
        let failed = run.failed.join(", ");
        let pair = format!("`{}` / `{}`", run.workload, run.nemesis);
        let name = report::on_network(&pair, &run.network);
        out.push_str(&format!("* {name}: {}, {failed}: `{}`\n", run.outcome, run.again));
    }
    out
}

/// Those that any of these runs were on; the usual one, which has no name here, first.
pub(super) fn networks(runs: &[Summary]) -> BTreeSet<&str> {
    runs.iter().map(|run| run.network.as_str()).collect()
}

fn rows(out: &mut String, what: &str, names: &[&str], runs: &Runs, of: fn(&Summary) -> &str) {
    out.push_str(&format!(
        "| {what} | held | not | faults | impossible | acknowledged | equal after undoing | after load |\n|---|---|---|---|---|---|---|---|\n"
    ));
    let networks = networks(&runs.runs);
    let each = names
        .iter()
        .flat_map(|name| networks.iter().map(move |network| (*name, *network)));
    for (name, network) in each {
        let is_it = |run: &&Summary| of(run) == name && run.network == network;
        let of_name: Vec<Summary> = runs.runs.iter().filter(is_it).cloned().collect();
        if of_name.is_empty() {
            continue;
        }
        let held = of_name
            .iter()
            .filter(|run| run.outcome == Outcome::Holds.word())
            .count();
        let not = of_name.iter().filter(|run| run.outcome != Outcome::Holds.word());
        let not: Vec<String> = not
            .map(|run| {
                let other = if what == "nemesis" {
                    &run.workload
                } else {
                    &run.nemesis
                };
                format!("`{other}`: {}", run.outcome)
            })
            .collect();
        let sum = |of: fn(&Summary) -> usize| of_name.iter().map(of).sum::<usize>();
        out.push_str(&format!(
            "| {} | {held} of {} | {} | {} | {} | {} | {} | {} |\n",
            report::on_network(&format!("`{name}`"), network),
            of_name.len(),
            not.join("; "),
            sum(|run| run.faults.0),
            sum(|run| run.faults.1),
            sum(|run| run.acknowledged),
            span(&of_name, |run| run.recovery),
            span(&of_name, |run| run.quiet)
        ));
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(workload: &str, nemesis: &str, outcome: &str) -> Summary {
        Summary {
            workload: workload.to_owned(),
            nemesis: nemesis.to_owned(),
            network: String::new(),
            run: format!("{workload} / {nemesis}"),
            seed: 1,
            acknowledged: 100,
            faults: (2, 1),
            variants: BTreeMap::from([("a table of a node is locked".to_owned(), 2)]),
            recovery: Some(1.5),
            quiet: Some(0.5),
            outcome: outcome.to_owned(),
            failed: Vec::new(),
            again: "anabranch-jepsen run".to_owned(),
            page: String::new(),
        }
    }

    #[test]
    fn parts_are_merged_and_what_was_impossible_is_not_held() {
        let dir = anabranch_tests::postgres::open_dir("jepsen-merge-");
        let part = |name: &str, runs: Vec<Summary>| {
            let path = dir.path().join(name);
            let runs = Runs {
                outcome: Outcome::Holds,
                planned: 3,
                runs,
            };
            std::fs::write(&path, serde_json::to_string(&runs).unwrap()).unwrap();
            path
        };
        let held = part(
            "a.json",
            vec![run("mix", "kill", "holds"), run("set", "kill", "holds")],
        );
        let impossible = part("b.json", vec![run("mix", "power", IMPOSSIBLE)]);
        let merged = |files: &[PathBuf]| merge(files, None, Output::Json).unwrap();
        assert_eq!(merged(std::slice::from_ref(&held)), Outcome::Holds);
        assert_eq!(merged(&[held, impossible]), Outcome::Unknown);
        let runs = Runs {
            outcome: Outcome::Unknown,
            planned: 6,
            runs: vec![
                run("mix", "kill", "holds"),
                run("set", "kill", "VIOLATED"),
                run("mix", "power", IMPOSSIBLE),
            ],
        };
        assert_eq!(Runs::outcome_of(&runs.runs), Outcome::Violated);
        let text = markdown(&runs);
        for wanted in [
            "Of 6 runs that were planned 2 were made: 1 hold, 1 are violated, of 0 nobody can tell, 1 were impossible.",
            "| `kill` | 1 of 2 | `set`: VIOLATED | 4 | 2 | 200 | 1.5 to 1.5 s | 0.5 to 0.5 s |",
            "| `power` | 0 of 1 | `mix`: impossible |",
            "| a table of a node is locked | 6 |",
        ] {
            assert!(text.contains(wanted), "{text}");
        }
    }

    #[test]
    fn runs_on_another_network_than_the_usual_one_are_told_apart() {
        let mut options = super::super::options("mix", "kill", 10, 1).unwrap();
        options.network = nemesis::Network::Veth;
        // Nothing can be slow there, wherever this is run.
        options.nemesis = "slow".to_owned();
        let dir = anabranch_tests::postgres::open_dir("jepsen-network-");
        let impossible = one(&options, dir.path(), Output::Json);
        assert_eq!(
            (impossible.run.as_str(), impossible.network.as_str()),
            ("mix / slow, veth", "veth")
        );
        let veth = |nemesis: &str, outcome: &str| Summary {
            network: "veth".to_owned(),
            run: format!("mix / {nemesis}, veth"),
            ..run("mix", nemesis, outcome)
        };
        let runs = Runs {
            outcome: Outcome::Violated,
            planned: 3,
            runs: vec![
                veth("kill", "VIOLATED"),
                run("mix", "kill", "holds"),
                run("set", "clock", "holds"),
            ],
        };
        let text = markdown(&runs);
        for wanted in [
            "| `kill` | 1 of 1 |  |",
            "| `kill`, veth | 0 of 1 | `mix`: VIOLATED |",
            "| `mix`, veth | 0 of 1 | `kill`: VIOLATED |",
            "* `mix` / `kill`, veth: VIOLATED,",
        ] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        assert!(!text.contains("`clock`, veth"), "{text}");
        assert!(table(&runs.runs).contains("veth"));
        let grid = full::grid(&runs.runs);
        assert_eq!(grid.matches("veth").count(), 1, "{grid}");
        // The usual one has no name there either.
        let json = serde_json::to_string(&runs).unwrap();
        assert_eq!(json.matches("\"network\":\"veth\"").count(), 1, "{json}");
        assert_eq!(json.matches("\"network\"").count(), 1, "{json}");
        let again: Runs = serde_json::from_str(&json).unwrap();
        assert_eq!(again.runs[0].network, "veth");
        assert_eq!(again.runs[1].network, "");
    }
}
