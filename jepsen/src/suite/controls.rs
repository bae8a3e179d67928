//! Negative controls: each broken rule must be noticed, and the same run with the rule whole must hold.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Done, Output, options, quietly};
use crate::checker::{Answer, Check, Outcome};
use crate::run::Options;
use crate::{Result, report};

/// A negative control: under what it is known to be caught, as quickly as it can be.
struct Control {
    /// The rule that is broken.
    rule: &'static str,
    workload: &'static str,
    nemesis: &'static str,
    seconds: u64,
    keys: i64,
    /// The first seed that is tried.
    seed: u64,
    /// Runs, with the seeds that follow, before it counts as not caught.
    tries: u64,
}

const fn control(
    rule: &'static str,
    (workload, nemesis): (&'static str, &'static str),
    seconds: u64,
    keys: i64,
    (seed, tries): (u64, u64),
) -> Control {
    Control {
        rule,
        workload,
        nemesis,
        seconds,
        keys,
        seed,
        tries,
    }
}

/// Every rule that can be broken. Those that the same run catches share the one with the rule whole.
const CONTROLS: &[Control] = &[
    control("fence", ("register", "none"), 12, 4, (1, 4)),
    control("guard", ("register", "none"), 12, 4, (1, 4)),
    control("frontier", ("register", "none"), 12, 4, (1, 4)),
    control("tie", ("register", "none"), 12, 4, (1, 4)),
    // The entry of a row is forgotten while what another node wrote to it before is held up; nobody may write that row meanwhile.
    control("stability", ("register", "deaf"), 20, 600, (1, 4)),
    // What the others wrote to a row while it was deleted here arrives after that.
    control("tombstone", ("mix", "apart"), 15, 8, (1, 4)),
    // In chains nobody writes another's row, so no lock held by who waits for COMMIT stops the applier.
    control("visibility-gate", ("causal", "standby"), 25, 12, (1, 4)),
    control("journal-fsync", ("register", "power"), 25, 16, (1, 4)),
    control(CARRY, ("register", "move"), 20, 8, (1, 4)),
];

/// The one rule that is the harness's own: sessions that move wait until the other node knows what they saw.
pub const CARRY: &str = "carry";

/// What became of a control.
#[derive(Debug, Serialize)]
struct Row {
    rule: &'static str,
    /// Workload and nemesis.
    under: String,
    /// Seconds of load of each run.
    seconds: u64,
    /// `caught`, `NOT CAUGHT`, `NOT TOLD APART` or `could not tell`.
    verdict: &'static str,
    /// The seed of the run that was violated, or the last one tried.
    seed: u64,
    /// Runs with the rule broken.
    runs: u64,
    /// The checks that were violated.
    by: Vec<String>,
    /// What the same run says with the rule whole.
    whole: String,
    /// The history that was violated.
    history: Option<PathBuf>,
    /// All its runs together.
    took_seconds: u64,
    #[serde(skip)]
    outcome: Outcome,
}

/// Every control must be caught, and hold when the rule is whole: then this holds.
pub fn all(only: &[String], seed: Option<u64>, output: Output, out: &Path) -> Result<Outcome> {
    for rule in only {
        known(rule)?;
    }
    let chosen = CONTROLS
        .iter()
        .filter(|control| only.is_empty() || only.iter().any(|rule| rule == control.rule));
    let chosen: Vec<&Control> = chosen.collect();
    let mut whole = Whole::default();
    let mut rows = Vec::new();
    for (number, control) in (1..).zip(&chosen) {
        let began = Instant::now();
        let place = format!("[{number}/{}] {}", chosen.len(), control.rule);
        let mut row = control.row(seed);
        if let Err(error) = control.catch(&mut row, &mut whole, &place, out) {
            row.whole = error.to_string();
        }
        row.took_seconds = began.elapsed().as_secs();
        eprintln!("{place}: {} by {}", row.verdict, row.by.join(", "));
        rows.push(row);
    }
    let outcome = rows
        .iter()
        .map(|row| row.outcome)
        .max()
        .unwrap_or(Outcome::Unknown);
    let json = serde_json::to_string_pretty(&serde_json::json!({ "outcome": outcome, "controls": rows }))?;
    std::fs::write(out.join("controls.json"), &json)?;
    match output {
        Output::Json => println!("{json}"),
        Output::Markdown => println!("{}", markdown(&rows)),
        Output::Table => {
            println!("{}", table(&rows));
            println!("=> {}", outcome.word());
        }
    }
    Ok(outcome)
}

fn table(rows: &[Row]) -> String {
    let header = [
        "broken rule",
        "verdict",
        "by",
        "under",
        "seed",
        "runs",
        "took",
        "rule whole",
    ];
    let cells = rows.iter().map(|row| {
        vec![
            row.rule.to_owned(),
            row.verdict.to_owned(),
            row.by.join(", "),
            format!("{}, {} s", row.under, row.seconds),
            row.seed.to_string(),
            row.runs.to_string(),
            format!("{} s", row.took_seconds),
            row.whole.clone(),
        ]
    });
    report::terminal(&header, cells)
}

fn markdown(rows: &[Row]) -> String {
    let mut out = "| rule | under | seed, runs | verdict | violated | with the rule whole |\n|---|---|---|---|---|---|\n".to_owned();
    for row in rows {
        out.push_str(&format!(
            "| `{}` | {}, {} s | {}, {} | {} | {} | {} |\n",
            row.rule,
            row.under,
            row.seconds,
            row.seed,
            row.runs,
            row.verdict,
            row.by.join(", "),
            row.whole
        ));
    }
    out
}

/// Runs with all rules whole, by what was run.
#[derive(Default)]
struct Whole(HashMap<String, Done>);

impl Whole {
    /// The run of these options, made once.
    fn of(&mut self, options: &Options, place: &str, out: &Path) -> Result<&Done> {
        match self.0.entry(options.command()) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(new) => {
                eprintln!("{place}: the same with the rule whole, seed {}", options.seed);
                Ok(new.insert(quietly(options, out)?))
            }
        }
    }
}

impl Control {
    fn row(&self, seed: Option<u64>) -> Row {
        Row {
            rule: self.rule,
            under: format!("{}/{}", self.workload, self.nemesis),
            seconds: self.seconds,
            verdict: "could not tell",
            seed: seed.unwrap_or(self.seed),
            runs: 0,
            by: Vec::new(),
            whole: String::new(),
            history: None,
            took_seconds: 0,
            outcome: Outcome::Unknown,
        }
    }

    /// Runs until the broken rule is caught, then the same with the rule whole.
    fn catch(&self, row: &mut Row, whole: &mut Whole, place: &str, out: &Path) -> Result<()> {
        let program = broken_program(self.rule)?;
        let mut told = false;
        for seed in row.seed..row.seed + self.tries {
            (row.seed, row.runs) = (seed, row.runs + 1);
            eprintln!("{place}: {} for {} s, seed {seed}", row.under, self.seconds);
            let mut options = self.options(seed)?;
            options.broken = Some((self.rule.to_owned(), program.clone()));
            let done = quietly(&options, out)?;
            told |= done.outcome == Outcome::Holds;
            if done.outcome == Outcome::Violated {
                options.broken = None;
                row.history = Some(done.name.with_extension("jsonl"));
                compared(row, &done, whole.of(&options, place, out)?);
                return Ok(());
            }
        }
        if told {
            (row.outcome, row.verdict) = (Outcome::Violated, "NOT CAUGHT");
        }
        Ok(())
    }

    fn options(&self, seed: u64) -> Result<Options> {
        let mut options = options(self.workload, self.nemesis, self.seconds, seed)?;
        options.keys = self.keys;
        options.clients = 4;
        options.pause = Duration::from_millis(2);
        options.patience = Duration::from_secs(30);
        Ok(options)
    }
}

/// What was caught counts if the same checks hold, and none is violated, with the rule whole. (Others may have had nothing to look
/// at.)
fn compared(row: &mut Row, broken: &Done, whole: &Done) {
    let caught = broken.violated();
    row.by = caught.iter().map(|check| check.name()).collect();
    let holds = |check: &Check| {
        whole
            .verdicts
            .iter()
            .any(|verdict| verdict.check == *check && matches!(verdict.answer, Answer::Holds { .. }))
    };
    if whole.outcome != Outcome::Violated && caught.iter().all(holds) {
        (row.outcome, row.verdict) = (Outcome::Holds, "caught");
        whole.outcome.word().clone_into(&mut row.whole);
    } else {
        (row.outcome, row.verdict) = (Outcome::Violated, "NOT TOLD APART");
        row.whole = format!("not held: {}", whole.failed().join(", "));
    }
}

/// Is there such a rule?
fn known(rule: &str) -> Result<()> {
    if CONTROLS.iter().any(|control| control.rule == rule) {
        return Ok(());
    }
    let rules: Vec<&str> = CONTROLS.iter().map(|control| control.rule).collect();
    Err(format!("there is no rule `{rule}`; there are {}", rules.join(", ")).into())
}

/// The build that can break this rule, made once, in a file of its own: cargo would put it in the place of the other.
pub fn broken_program(rule: &str) -> Result<PathBuf> {
    known(rule)?;
    let whole = anabranch_tests::daemon::program();
    if rule == CARRY {
        return Ok(whole);
    }
    let profile = whole.parent().ok_or("the program is in no folder")?;
    let broken = profile.join("anabranch-that-breaks-rules");
    if broken.exists() && newer(&broken, &whole) {
        return Ok(broken);
    }
    let release = profile.ends_with("release");
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let build = |features: &[&str]| -> Result<()> {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo
            .current_dir(&workspace)
            // Of the whole workspace, or other features of the dependencies are chosen, and all of them built again.
            .args([
                "build",
                "--quiet",
                "--locked",
                "--workspace",
                "--bin",
                "anabranch",
            ]);
        if release {
            cargo.arg("--release");
        }
        let status = cargo.args(features).status()?;
        if status.success() {
            Ok(())
        } else {
            Err("cargo could not build the program".into())
        }
    };
    eprintln!("building the program that can break rules");
    build(&["--features", "anabranch/break"])?;
    let copied = std::fs::copy(&whole, &broken);
    // Whatever happened: the whole program is put back.
    build(&[])?;
    copied?;
    Ok(broken)
}

/// Was `a` written after `b`'s build began? Putting the whole program back may renew its time by seconds.
fn newer(a: &Path, b: &Path) -> bool {
    let time = |path: &Path| std::fs::metadata(path).and_then(|data| data.modified()).ok();
    match (time(a), time(b)) {
        (Some(a), Some(b)) => a + Duration::from_secs(120) >= b,
        _ => false,
    }
}
