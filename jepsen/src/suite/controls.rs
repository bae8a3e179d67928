//! Negative controls: each broken rule must be noticed, and the same run with the rule whole must hold.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::{Done, options, quietly};
use crate::checker::{Answer, Check, Outcome};
use crate::run::Options;
use crate::{Result, report};

/// A negative control: what is known to catch it.
struct Control {
    /// The rule that is broken.
    rule: &'static str,
    workload: &'static str,
    nemesis: &'static str,
    seconds: u64,
    keys: i64,
    /// Runs, with the seeds that follow, before it counts as not caught.
    tries: u64,
}

const fn control(
    rule: &'static str,
    (workload, nemesis): (&'static str, &'static str),
    seconds: u64,
    keys: i64,
    tries: u64,
) -> Control {
    Control {
        rule,
        workload,
        nemesis,
        seconds,
        keys,
        tries,
    }
}

/// Every rule that can be broken.
const CONTROLS: &[Control] = &[
    control("fence", ("register", "none"), 15, 4, 3),
    control("guard", ("register", "none"), 15, 4, 3),
    control("stability", ("mix", "partition"), 30, 4, 6),
    control("frontier", ("register", "none"), 10, 4, 2),
    control("tombstone", ("mix", "partition"), 20, 8, 3),
    // In chains nobody writes another's row, so no lock held by who waits for COMMIT stops the applier.
    control("visibility-gate", ("causal", "standby"), 25, 12, 3),
    control("journal-fsync", ("register", "power"), 25, 16, 4),
    control("tie", ("register", "none"), 10, 4, 2),
];

/// Every control must be caught, and hold when the rule is whole: then this holds.
pub fn all(only: &[String], seed: u64, out: &Path) -> Result<Outcome> {
    let mut rows = Vec::new();
    let mut outcome = Outcome::Holds;
    for rule in only {
        known(rule)?;
    }
    for control in CONTROLS {
        if !only.is_empty() && !only.iter().any(|rule| rule == control.rule) {
            continue;
        }
        let began = Instant::now();
        let (worst, word, how) = match catch(control, seed, out) {
            Ok(caught) => caught,
            Err(error) => (Outcome::Unknown, "could not tell", error.to_string()),
        };
        outcome = outcome.max(worst);
        let took = format!("{} s", began.elapsed().as_secs());
        println!("{}: {word} {how}", control.rule);
        rows.push(vec![control.rule.to_owned(), word.to_owned(), took, how]);
    }
    println!("{}", report::terminal(&["broken rule", "", "took", "how"], rows));
    println!("=> {}", outcome.word());
    Ok(outcome)
}

/// Runs a control until it is caught, then the same with the rule whole.
fn catch(control: &Control, seed: u64, out: &Path) -> Result<(Outcome, &'static str, String)> {
    let program = broken_program(control.rule)?;
    for seed in seed..seed + control.tries {
        let mut options = control.options(seed)?;
        options.broken = Some((control.rule.to_owned(), program.clone()));
        let done = quietly(&options, out)?;
        if done.outcome != Outcome::Violated {
            continue;
        }
        options.broken = None;
        return Ok(compared(seed, &done, &quietly(&options, out)?));
    }
    Ok((
        Outcome::Violated,
        "NOT CAUGHT",
        format!("in {} runs", control.tries),
    ))
}

/// What was caught counts if the same checks hold, and none is violated, with the rule whole. (Others may have had nothing to look
/// at.)
fn compared(seed: u64, broken: &Done, whole: &Done) -> (Outcome, &'static str, String) {
    let caught = broken.violated();
    let names: Vec<String> = caught.iter().map(|check| check.name()).collect();
    let how = format!("seed {seed}, by {}", names.join(", "));
    let holds = |check: &Check| {
        whole
            .verdicts
            .iter()
            .any(|verdict| verdict.check == *check && matches!(verdict.answer, Answer::Holds { .. }))
    };
    if whole.outcome != Outcome::Violated && caught.iter().all(holds) {
        return (Outcome::Holds, "caught", how);
    }
    let how = format!("{how}; with the rule whole: {}", whole.failed().join(", "));
    (Outcome::Violated, "NOT TOLD APART", how)
}

impl Control {
    fn options(&self, seed: u64) -> Result<Options> {
        let mut options = options(self.workload, self.nemesis, self.seconds, seed)?;
        options.keys = self.keys;
        options.clients = 4;
        options.pause = Duration::from_millis(2);
        options.patience = Duration::from_secs(30);
        Ok(options)
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

/// The build that can break rules, made once, in a file of its own: cargo would put it in the place of the other.
pub fn broken_program(rule: &str) -> Result<PathBuf> {
    known(rule)?;
    let whole = anabranch_tests::daemon::program();
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
            .args(["build", "--quiet", "--locked", "-p", "anabranch"]);
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
    build(&["--features", "break"])?;
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
