//! Many runs: suites, shrinking, and what every run leaves behind.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};

use crate::checker::{self, Outcome, Verdict};
use crate::history::History;
use crate::nemesis;
use crate::run::{self, Options};
use crate::{Result, args, report};

/// What to run.
#[derive(Debug, Args)]
pub struct SuiteArgs {
    /// Which suite.
    #[arg(value_enum)]
    suite: Suite,
    /// Length of the whole `full` suite.
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    out: args::Out,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// Some three minutes: partitions, kills and clocks under two workloads.
    Smoke,
    /// Every workload under every nemesis, again and again with other seeds.
    Full,
    /// Every negative control: each must be caught.
    Controls,
}

/// A finished run.
#[derive(Debug)]
pub struct Done {
    /// All together.
    pub outcome: Outcome,
    /// One by one.
    pub verdicts: Vec<Verdict>,
    /// Its history.
    pub history: History,
    /// Its files, without extension.
    pub name: PathBuf,
}

/// Runs one, writes its files, prints its verdicts.
pub fn one(options: &Options, out: &Path) -> Result<Done> {
    if let Some(why) = nemesis::impossible(&options.nemesis) {
        return Err(format!("the nemesis `{}` is impossible here: {why}", options.nemesis).into());
    }
    let done = quietly(options, out)?;
    args::print_verdicts(&done.verdicts);
    println!("history: {}", done.name.with_extension("jsonl").display());
    println!("report:  {}", done.name.with_extension("html").display());
    println!("again:   {}", done.history.header.command);
    Ok(done)
}

fn quietly(options: &Options, out: &Path) -> Result<Done> {
    std::fs::create_dir_all(out)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let history = runtime.block_on(run::run(options))?;
    runtime.shutdown_timeout(Duration::from_secs(5));
    let verdicts = checker::check(&history);
    let broken = options
        .broken
        .as_ref()
        .map_or(String::new(), |(rule, _)| format!("-without-{rule}"));
    let name = out.join(format!(
        "{}-{}{broken}-{}",
        options.workload.name, options.nemesis, options.seed
    ));
    history.write(&name.with_extension("jsonl"))?;
    std::fs::write(name.with_extension("html"), report::html(&history, &verdicts))?;
    std::fs::write(
        name.with_extension("verdict.json"),
        serde_json::to_string_pretty(&serde_json::json!({
            "outcome": Outcome::of(&verdicts), "command": history.header.command, "checks": verdicts,
        }))?,
    )?;
    Ok(Done {
        outcome: Outcome::of(&verdicts),
        verdicts,
        history,
        name,
    })
}

/// Runs a suite.
pub fn run(_args: &SuiteArgs) -> Result<Outcome> {
    Err("not yet".into())
}

/// Runs with ever less while it stays violated.
pub fn shrink(_history: &History, _options: &Options, _runs: usize, _out: &Path) -> Result<Outcome> {
    Err("not yet".into())
}

/// The build that can break rules.
pub fn broken_program(_rule: &str) -> Result<PathBuf> {
    Err("not yet".into())
}
