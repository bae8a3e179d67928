//! Many runs: suites, controls, shrinking, and what every run leaves behind.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::checker::{self, Answer, Check, Outcome, Verdict};
use crate::history::{End, History, Stage};
use crate::nemesis::{self, Network};
use crate::policy::Rule;
use crate::record::{self, Record};
use crate::report::Summary;
use crate::run::{self, Options};
use crate::system::System;
use crate::workload::Workload;
use crate::{Result, args, report};

pub mod controls;
mod full;
pub mod many;
pub mod shrink;

/// What a run may take beside its load and its patience with the system, before it is given up.
const BESIDE: Duration = Duration::from_secs(300);

/// Load of each run of `smoke`.
const SMOKE_SECONDS: u64 = 16;

/// What to run.
#[derive(Debug, Args)]
pub struct SuiteArgs {
    /// Which suite.
    #[arg(value_enum)]
    suite: Suite,
    /// Length of the whole `full` suite, shared out among its runs; each takes some ten seconds more.
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// The first seed: 1 if not said; each control's own for `controls`. Every pair of `full` has one of its own, counted from it.
    #[arg(long)]
    seed: Option<u64>,
    /// K/N: the K-th of N parts of `full`, as long as said by `--minutes`. Each part has as much of every workload and nemesis as can be.
    #[arg(long, default_value = "1/1")]
    shard: full::Shard,
    /// Only these workloads, or, for `controls`, only these rules.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these nemeses.
    #[arg(long, value_delimiter = ',')]
    nemesis: Vec<String>,
    /// Major version of each node's server, for `smoke` and `full`, as many as there are nodes: 15,18,15 if not said, or the system's own.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(15..=18))]
    servers: Vec<u32>,
    /// What is on trial, for `full`: the same pairs are run of others, to compare.
    #[arg(long, value_enum, default_value = "anabranch")]
    system: System,
    /// How nodes reach each other, for `smoke` and `full`.
    #[arg(long, value_enum, default_value = "proxy")]
    network: Network,
    /// What decides between concurrent writes of a row, for `smoke` and `full`: those workloads are run whose rows are single values.
    #[arg(long, value_enum, default_value = "last_update_wins")]
    policy: Rule,
    /// A table, or the same as JSON or Markdown; progress goes to standard error.
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
    #[command(flatten)]
    out: args::Out,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
    /// For documents.
    Markdown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// Some three minutes: partitions, kills and clocks under five workloads.
    Smoke,
    /// Every workload under every nemesis.
    Full,
    /// Every negative control: each must be caught.
    Controls,
}

impl SuiteArgs {
    /// Does any of its runs need a network namespace of its own, or is better in one?
    pub fn wants_namespace(&self) -> bool {
        let chosen = |name: &str| self.nemesis.is_empty() || self.nemesis.iter().any(|one| one == name);
        let mut all = nemesis::ALL.iter().map(|nemesis| nemesis.name);
        let lossy = self.suite == Suite::Full && all.any(|name| nemesis::wants_packets(name) && chosen(name));
        lossy || self.network == Network::Veth
    }

    /// The name of its results: those of another system or network do not take the place of the usual ones.
    fn title(&self, suite: &str, system: System) -> String {
        let mut title = suite.to_owned();
        if system != System::Anabranch {
            title.push_str(&format!("-{}", system.name()));
        }
        if self.network != Network::Proxy {
            title.push_str(&format!("-{}", self.network.name()));
        }
        if let Some(policy) = self.policy.unusual() {
            title.push_str(&format!("-{policy}"));
        }
        title
    }
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

impl Done {
    fn failed(&self) -> Vec<String> {
        if let Some(why) = &self.history.header.cut_short {
            // Most checks have nothing to say then, and all for this reason.
            let violated = self.violated().into_iter().map(Check::name);
            return violated.chain([why.clone()]).collect();
        }
        let holds = |verdict: &&Verdict| !matches!(verdict.answer, Answer::Holds { .. });
        self.verdicts
            .iter()
            .filter(holds)
            .map(|verdict| verdict.check.name())
            .collect()
    }

    /// Says why the run was given up, if it was, and where what is known of it stands.
    fn tell_if_cut_short(&self) {
        if let Some(why) = &self.history.header.cut_short {
            let file = self.name.with_extension("jsonl");
            eprintln!(
                "the run was cut short: {why}; what was written down by then is in {}",
                file.display()
            );
        }
    }

    fn violated(&self) -> Vec<Check> {
        violated(&self.verdicts)
    }

    fn summary(&self) -> Summary {
        let header = &self.history.header;
        let broken = header
            .broken
            .as_ref()
            .map_or(String::new(), |rule| format!(", without {rule}"));
        let phase = |name: &str| self.history.faults().filter(|fault| fault.phase == name).count();
        let end = self.history.end();
        let since =
            |from: fn(&End) -> i64| end.and_then(|end| Some((end.equal_us? - from(end)) as f64 / 1e6));
        let page = self.name.with_extension("html");
        let network = unusual(&header.network);
        let run = report::run_name(&header.workload, Rule::of(&self.history), &header.nemesis);
        Summary {
            workload: header.workload.clone(),
            nemesis: header.nemesis.clone(),
            run: format!("{}{broken}", report::on_network(&run, &network)),
            network,
            seed: header.seed,
            acknowledged: self.history.ops().filter(|op| op.stage == Stage::Ok).count(),
            faults: (self.history.faults_done(), phase("impossible") + phase("idle")),
            variants: variants(&self.history),
            recovery: since(|end| end.healed_us),
            quiet: since(End::load_ended_us),
            outcome: self.outcome.word().to_owned(),
            failed: self.failed(),
            again: header.command.clone(),
            page: page
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
        }
    }
}

/// Faults that happened and met anything, by their kind.
fn variants(history: &History) -> BTreeMap<String, usize> {
    let nodes = history.header.servers.len();
    let planned = history.header.plan.iter().flatten();
    let kinds = planned.flat_map(|planned| &planned.faults);
    let kinds: BTreeMap<String, String> = kinds
        .map(|fault| (fault.to_string(), fault.variant(nodes)))
        .collect();
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for fault in history.faults() {
        let Some(kind) = kinds.get(&fault.name) else {
            continue;
        };
        let count = counts.entry(kind.clone()).or_default();
        match fault.phase.as_str() {
            "start" => *count += 1,
            // It had begun.
            "idle" => *count = count.saturating_sub(1),
            _ => {}
        }
    }
    counts.retain(|_, count| *count > 0);
    counts
}

/// A network's name, where it is not the usual one.
fn unusual(network: &str) -> String {
    match Network::named(network) {
        Some(Network::Proxy) => String::new(),
        _ => network.to_owned(),
    }
}

/// The checks that are violated.
fn violated(verdicts: &[Verdict]) -> Vec<Check> {
    let violated = |verdict: &&Verdict| matches!(verdict.answer, Answer::Violated { .. });
    verdicts
        .iter()
        .filter(violated)
        .map(|verdict| verdict.check)
        .collect()
}

/// Runs one, writes its files, prints its verdicts.
pub fn one(options: &Options, out: &Path) -> Result<Done> {
    let done = quietly(options, out)?;
    args::print_verdicts(&done.verdicts);
    println!("history: {}", done.name.with_extension("jsonl").display());
    println!("report:  {}", done.name.with_extension("html").display());
    println!("again:   {}", done.history.header.command);
    Ok(done)
}

/// Why it cannot run here, or at all.
fn impossible(options: &Options) -> Option<String> {
    let network = options.network.name();
    let no_network = options
        .network
        .impossible()
        .map(|why| format!("the network `{network}` is impossible here: {why}"));
    let here = || {
        let cannot = options.network.cannot(&options.nemesis).map(str::to_owned);
        let why = cannot.or_else(|| nemesis::impossible(&options.nemesis))?;
        Some(format!(
            "the nemesis `{}` is impossible here: {why}",
            options.nemesis
        ))
    };
    let unfit = || {
        let why = nemesis::unfit(&options.nemesis, &options.workload)?;
        let (nemesis, workload) = (&options.nemesis, options.workload.name);
        Some(format!("the nemesis `{nemesis}` is not for `{workload}`: {why}"))
    };
    let unruled = || {
        let why = options
            .policy
            .unfit(&options.workload, &options.nemesis, options.system)?;
        let policy = options.policy.name();
        Some(format!("the policy `{policy}` is not for this: {why}"))
    };
    no_network
        .or_else(here)
        .or_else(unfit)
        .or_else(unruled)
        .or_else(|| options.system.impossible(&options.servers, &options.nemesis))
}

/// The files of a run, without extension, and without a dot that would be taken for one: what is run otherwise has another name, but for faults that were chosen by hand or shrunk.
fn file_name(options: &Options) -> String {
    let broken = options
        .broken
        .as_ref()
        .map_or(String::new(), |(rule, _)| format!("-without-{rule}"));
    let system = match options.system {
        System::Anabranch => String::new(),
        other => format!("-{}", other.name()),
    };
    let network = match options.network {
        Network::Proxy => String::new(),
        other => format!("-{}", other.name()),
    };
    let policy = options
        .policy
        .unusual()
        .map_or(String::new(), |policy| format!("-{policy}"));
    let servers: Vec<String> = options.servers.iter().map(ToString::to_string).collect();
    format!(
        "{}-{}{policy}{broken}{system}{network}-{}-on-{}-{}s-{}clients-{}keys",
        options.workload.name,
        options.nemesis,
        options.seed,
        servers.join("-"),
        options.length.as_secs(),
        options.clients,
        options.keys
    )
}

/// Runs one and writes its files; also of a run that is given up, once its load has begun.
fn quietly(options: &Options, out: &Path) -> Result<Done> {
    if let Some(why) = impossible(options) {
        return Err(why.into());
    }
    std::fs::create_dir_all(out)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // The cluster's tools panic where a test would fail: here nobody can tell then.
    let most = options.length + options.patience + BESIDE;
    let record = Record::default();
    let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        runtime.block_on(async { tokio::time::timeout(most, run::run(options, &record)).await })
    }));
    runtime.shutdown_timeout(Duration::from_secs(5));
    let cut_short = match ran {
        Ok(Ok(Ok(()))) => None,
        Ok(Ok(Err(error))) => Some(error.to_string()),
        Ok(Err(_)) => Some(format!("the run was not at its end after {most:?}")),
        Err(panic) => Some(format!("the harness could not go on: {}", record::said(&*panic))),
    };
    let Some(mut history) = record.take() else {
        let why = cut_short.unwrap_or_else(|| "nothing was run".to_owned());
        return Err(why.into());
    };
    history.header.cut_short = cut_short;
    let verdicts = checker::check(&history);
    let name = out.join(file_name(options));
    history.write(&name.with_extension("jsonl"))?;
    std::fs::write(name.with_extension("html"), report::html(&history, &verdicts))?;
    // Where no register or list is written there is nothing that other checkers could read.
    if let Ok(edn) = crate::export::edn(&history) {
        std::fs::write(name.with_extension("edn"), edn)?;
        std::fs::write(name.with_extension("plume.txt"), crate::export::plume(&history)?)?;
    }
    std::fs::write(
        name.with_extension("verdict.json"),
        serde_json::to_string_pretty(&serde_json::json!({
            "outcome": Outcome::of(&verdicts), "command": history.header.command, "checks": verdicts,
        }))?,
    )?;
    let done = Done {
        outcome: Outcome::of(&verdicts),
        verdicts,
        history,
        name,
    };
    done.tell_if_cut_short();
    Ok(done)
}

/// This folder, or one in it, so that nothing that is written there takes the place of `file` or of what stands beside it.
pub fn away_from(file: &Path, mut folder: PathBuf) -> PathBuf {
    let is_in = |folder: &Path| match (file.canonicalize(), folder.canonicalize()) {
        (Ok(file), Ok(folder)) => file.starts_with(folder),
        // What is not there yet holds nothing.
        _ => false,
    };
    while is_in(&folder) {
        folder.push("again");
    }
    folder
}

/// The usual options.
fn options(workload: &str, nemesis: &str, seconds: u64, seed: u64) -> Result<Options> {
    let workload = args::workload(workload)?;
    Ok(Options {
        keys: workload.keys,
        workload,
        system: System::Anabranch,
        nemesis: nemesis.to_owned(),
        policy: Rule::default(),
        network: Network::Proxy,
        servers: vec![15, 18, 15],
        length: Duration::from_secs(seconds),
        seed,
        clients: 3,
        pause: Duration::from_millis(10),
        broken: None,
        plan: None,
        patience: run::PATIENCE,
        progress: false,
    })
}

/// Runs a suite.
pub fn run(args: &SuiteArgs) -> Result<Outcome> {
    match args.suite {
        Suite::Smoke => {
            let runs = smoke(args.seed.unwrap_or(1))?.into_iter();
            let runs: Vec<Options> = runs
                .map(|options| on(args, options))
                .filter(|options| is_ruled(args, &options.workload, &options.nemesis))
                .collect();
            many::run(&args.title("smoke", System::Anabranch), &runs, args)
        }
        Suite::Full => full::run(args),
        Suite::Controls
            if !args.servers.is_empty()
                || args.network != Network::Proxy
                || args.policy != Rule::default() =>
        {
            Err("each control is caught on what it is known for: `--servers`, `--network` and `--policy` are for `smoke` and `full`".into())
        }
        Suite::Controls => {
            std::fs::create_dir_all(&args.out.out)?;
            controls::all(&args.only, args.seed, args.output, &args.out.out)
        }
    }
}

/// Is the policy for this workload under this nemesis?
fn is_ruled(args: &SuiteArgs, workload: &Workload, nemesis: &str) -> bool {
    args.policy.unfit(workload, nemesis, args.system).is_none()
}

/// On these servers, if any are said, this network, and by this policy.
fn on(args: &SuiteArgs, options: Options) -> Options {
    Options {
        servers: match args.servers.as_slice() {
            [] => options.servers,
            said => said.to_vec(),
        },
        network: args.network,
        policy: args.policy,
        ..options
    }
}

/// Each as long as three faults take: a partition, a kill, a clock.
fn smoke(first_seed: u64) -> Result<Vec<Options>> {
    ["register", "mix", "atomic", "append", "unique"]
        .into_iter()
        .zip(first_seed..)
        .map(|(workload, seed)| options(workload, "smoke", SMOKE_SECONDS, seed))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nemesis::Fault;

    #[test]
    fn what_is_run_otherwise_has_another_name() {
        let usual = options("register", "kill", 10, 1).unwrap();
        let changes: [fn(&mut Options); 10] = [
            |_| {},
            |options| options.servers = vec![15, 15, 15],
            |options| options.length = Duration::from_secs(20),
            |options| options.keys = 4,
            |options| options.clients = 1,
            |options| options.seed = 2,
            |options| options.system = System::Native,
            |options| options.network = Network::Veth,
            |options| options.policy = Rule::DeleteWins,
            |options| options.broken = Some(("tie".to_owned(), PathBuf::new())),
        ];
        let names = changes.map(|change| {
            let mut options = usual.clone();
            change(&mut options);
            file_name(&options)
        });
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len(), "{names:?}");
        assert!(names.iter().all(|name| !name.contains('.')), "{names:?}");
    }

    #[test]
    fn a_history_is_not_written_over_by_what_replays_it() {
        let dir = anabranch_tests::postgres::open_dir("jepsen-replay-");
        let folder = dir.path().join("replay");
        let first = dir.path().join("a.jsonl");
        std::fs::write(&first, "").unwrap();
        assert_eq!(away_from(&first, folder.clone()), folder);
        std::fs::create_dir_all(folder.join("again")).unwrap();
        for place in ["replay/a.jsonl", "replay/again/a.jsonl"] {
            let file = dir.path().join(place);
            std::fs::write(&file, "").unwrap();
            let into = away_from(&file, folder.clone());
            assert!(into.starts_with(&folder) && !file.starts_with(&into), "{into:?}");
        }
    }

    #[test]
    fn faults_that_happened_are_counted_by_their_kind_and_not_by_their_nodes() {
        use crate::history::{Event, Fault as Told, Header};
        let cut = |a: &[usize], b: &[usize]| Fault::Cut {
            a: a.to_vec(),
            b: b.to_vec(),
            silent: true,
        };
        let all: [usize; 5] = [0, 1, 2, 3, 4];
        let faults = [
            (cut(&[2], &[0, 1, 3, 4]), "start"),
            (cut(&[0], &[1, 2, 3, 4]), "start"),
            (cut(&[0, 1, 2], &[3, 4]), "start"),
            (cut(&[0, 3], &[1, 4]), "start"),
            (cut(&all, &all), "start"),
            (Fault::KillDaemon(0), "start"),
            (Fault::KillDaemon(1), "impossible"),
            (Fault::Slow { ms: 7 }, "start"),
            (Fault::Slow { ms: 7 }, "idle"),
        ];
        let planned = nemesis::Planned {
            after: Duration::ZERO,
            faults: faults.iter().map(|(fault, _)| fault.clone()).collect(),
            length: Duration::ZERO,
        };
        let told = |(fault, phase): &(Fault, &str)| {
            Event::Fault(Told {
                at_us: 0,
                name: fault.to_string(),
                phase: (*phase).to_owned(),
                detail: String::new(),
            })
        };
        let history = History {
            header: Header {
                servers: vec![15; 5],
                plan: Some(vec![planned]),
                ..Header::default()
            },
            events: faults.iter().map(told).collect(),
        };
        let expected = [
            ("kill -9 of the daemon of a node", 1),
            ("lines silent: a bridge", 1),
            ("lines silent: all alone", 1),
            ("lines silent: halves", 1),
            ("lines silent: one off", 2),
        ];
        let expected = expected.map(|(kind, count)| (kind.to_owned(), count));
        assert_eq!(variants(&history), BTreeMap::from(expected));
    }

    #[test]
    fn every_run_of_smoke_has_a_partition_a_kill_and_a_wrong_clock() {
        for options in smoke(1).unwrap() {
            let plan = options.plan();
            let any = |is: fn(&Fault) -> bool| plan.iter().flat_map(|planned| &planned.faults).any(is);
            let kills = |fault: &Fault| {
                matches!(
                    fault,
                    Fault::KillDaemon(_) | Fault::KillServer(_) | Fault::KillNode(_) | Fault::KillAll
                )
            };
            let clocks = |fault: &Fault| matches!(fault, Fault::Skew { .. } | Fault::Strobe { .. });
            let name = options.workload.name;
            assert!(plan.len() >= 3 && any(kills) && any(clocks), "{name}: {plan:?}");
        }
    }
}
