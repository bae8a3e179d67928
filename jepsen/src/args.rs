//! The command line.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::checker::{self, Outcome, Verdict};
use crate::history::History;
use crate::nemesis::Network;
use crate::policy::Rule;
use crate::run::{self, Options};
use crate::system::{self, System};
use crate::workload::Workload;
use crate::{Result, export, nemesis, report, suite};

/// Tries to prove Anabranch wrong: real clusters, load, faults, histories, checkers.
///
/// Exit codes: 0 all checks hold, 1 one is violated, 2 nobody can tell.
#[derive(Debug, Parser)]
#[command(name = "anabranch-jepsen", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs one workload under one nemesis and judges it.
    Run(RunArgs),
    /// Runs several.
    Suite(suite::SuiteArgs),
    /// Judges a history file again, without a cluster.
    Check {
        /// The file.
        file: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Runs again what a history file says was run: same operations, same faults.
    Replay {
        /// The file.
        file: PathBuf,
        #[command(flatten)]
        out: Out,
    },
    /// Runs a violated history again with ever fewer faults and less time, while it stays violated.
    Shrink {
        /// The file.
        file: PathBuf,
        /// How many runs at most.
        #[arg(long, default_value_t = 12)]
        runs: usize,
        #[command(flatten)]
        out: Out,
    },
    /// Writes the HTML page of a history file, or makes one table of the JSON files of suites, such as the parts of one.
    Report {
        /// One `NAME.jsonl`, or any number of `full-1of3.json` and the like.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Where to write the page; beside a history if not said, nowhere for suites.
        #[arg(long)]
        html: Option<PathBuf>,
        /// How the table over suites is printed.
        #[arg(long, value_enum, default_value = "table")]
        output: suite::Output,
    },
    /// Writes a history for another checker.
    Export {
        /// The file.
        file: PathBuf,
        /// `edn` (Elle, rw-register) or `plume`.
        #[arg(long, default_value = "edn", value_parser = ["edn", "plume"])]
        format: String,
    },
    /// Says which workloads and faults work here.
    Doctor,
}

/// Where results go.
#[derive(Debug, Clone, Args)]
pub struct Out {
    /// A folder for histories and reports.
    #[arg(long, default_value = "target/jepsen")]
    pub out: PathBuf,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// What clients do.
    #[arg(long, default_value = "register")]
    workload: String,
    /// What goes wrong meanwhile.
    #[arg(long, default_value = "none")]
    nemesis: String,
    /// Length of the load.
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Fixes operations and faults, not the interleaving of real processes.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What is on trial: the same questions are asked of others, to compare.
    #[arg(long, value_enum, default_value = "anabranch")]
    system: System,
    /// How nodes reach each other, and what breaks their lines.
    #[arg(long, value_enum, default_value = "proxy")]
    network: Network,
    /// Major version of each node's server: three of 15 if not said, of 18 for `native`.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(15..=18))]
    servers: Vec<u32>,
    /// Clients at each node.
    #[arg(long, default_value_t = 3)]
    clients: usize,
    /// Keys of each table; the workload's own number if not said.
    #[arg(long)]
    keys: Option<i64>,
    /// Pause between a client's transactions.
    #[arg(long, default_value_t = 10)]
    pause_ms: u64,
    /// What decides between concurrent writes of a row, for workloads whose rows are single values.
    #[arg(long, value_enum, default_value = "last_update_wins")]
    policy: Rule,
    /// Breaks a rule on purpose, which a run must find: see `suite controls`.
    #[arg(long = "break", value_name = "RULE")]
    broken: Option<String>,
    /// How long to wait for quiet, seconds.
    #[arg(long, default_value_t = run::PATIENCE.as_secs())]
    patience: u64,
    /// These faults and no others, as a history's header has them; those that the seed gives if not said.
    #[arg(long, value_name = "JSON")]
    plan: Option<Plan>,
    #[command(flatten)]
    out: Out,
}

/// Faults that were chosen.
#[derive(Debug, Clone)]
struct Plan(Vec<nemesis::Planned>);

impl FromStr for Plan {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        serde_json::from_str(text).map(Self)
    }
}

/// Parses and does it.
pub fn main() -> Result<Outcome> {
    let cli = Cli::parse();
    if cli.command.wants_namespace() {
        nemesis::packets::enter();
    }
    match cli.command {
        Command::Run(args) => {
            let options = args.options()?;
            suite::one(&options, &args.out.out).map(|done| done.outcome)
        }
        Command::Suite(args) => suite::run(&args),
        Command::Check { file, json } => check(&file, json),
        Command::Replay { file, out } => {
            let options = options_of(&History::read(&file)?)?;
            let folder = suite::away_from(&file, out.out.join("replay"));
            suite::one(&options, &folder).map(|done| done.outcome)
        }
        Command::Shrink { file, runs, out } => {
            let history = History::read(&file)?;
            suite::shrink::shrink(&file, &history, &options_of(&history)?, runs, &out.out)
        }
        Command::Report { files, html, output } => {
            let file = match files.as_slice() {
                [one] if one.extension().is_some_and(|kind| kind == "jsonl") => one,
                many => return suite::many::merge(many, html.as_deref(), output),
            };
            let history = History::read(file)?;
            let verdicts = checker::check(&history);
            let html = html.unwrap_or_else(|| file.with_extension("html"));
            std::fs::write(&html, report::html(&history, &verdicts))?;
            println!("{}", html.display());
            Ok(Outcome::of(&verdicts))
        }
        Command::Export { file, format } => {
            let history = History::read(&file)?;
            let text = match format.as_str() {
                "plume" => export::plume(&history)?,
                _ => export::edn(&history)?,
            };
            print!("{text}");
            Ok(Outcome::Holds)
        }
        Command::Doctor => Ok(doctor()),
    }
}

impl Command {
    /// Does any run of it need a network namespace of its own, or is better in one?
    fn wants_namespace(&self) -> bool {
        let wants = |nemesis: &str, network: Option<Network>| {
            nemesis::wants_packets(nemesis) || network == Some(Network::Veth)
        };
        match self {
            Self::Run(args) => wants(&args.nemesis, Some(args.network)),
            Self::Suite(args) => args.wants_namespace(),
            Self::Replay { file, .. } | Self::Shrink { file, .. } => History::read(file)
                .is_ok_and(|history| wants(&history.header.nemesis, Network::named(&history.header.network))),
            // It tries there whether nodes can have a network.
            Self::Doctor => true,
            _ => false,
        }
    }
}

impl RunArgs {
    fn options(&self) -> Result<Options> {
        let workload = workload(&self.workload)?;
        nemesis_exists(&self.nemesis)?;
        let broken = match &self.broken {
            Some(rule) => Some((rule.clone(), suite::controls::broken_program(rule)?)),
            None => None,
        };
        Ok(Options {
            keys: self.keys.unwrap_or(workload.keys),
            workload,
            nemesis: self.nemesis.clone(),
            policy: self.policy,
            servers: if self.servers.is_empty() {
                self.system.servers()
            } else {
                self.servers.clone()
            },
            system: self.system,
            network: self.network,
            length: Duration::from_secs(self.seconds),
            seed: self.seed,
            clients: self.clients,
            pause: Duration::from_millis(self.pause_ms),
            broken,
            plan: self.plan.as_ref().map(|plan| plan.0.clone()),
            patience: Duration::from_secs(self.patience),
            progress: true,
        })
    }
}

/// The workload of a name, or which there are.
pub fn workload(name: &str) -> Result<Workload> {
    Workload::named(name).ok_or_else(|| {
        let names: Vec<&str> = crate::workload::all()
            .iter()
            .map(|workload| workload.name)
            .collect();
        format!("there is no workload `{name}`; there are {}", names.join(", ")).into()
    })
}

/// Is there a nemesis of this name?
pub fn nemesis_exists(name: &str) -> Result<()> {
    if nemesis::exists(name) {
        return Ok(());
    }
    let names: Vec<&str> = nemesis::ALL
        .iter()
        .chain(nemesis::AIMED)
        .map(|nemesis| nemesis.name)
        .collect();
    Err(format!("there is no nemesis `{name}`; there are {}", names.join(", ")).into())
}

/// What a history says was run.
fn options_of(history: &History) -> Result<Options> {
    let header = &history.header;
    let broken = match &header.broken {
        Some(rule) => Some((rule.clone(), suite::controls::broken_program(rule)?)),
        None => None,
    };
    Ok(Options {
        workload: workload(&header.workload)?,
        nemesis: header.nemesis.clone(),
        policy: Rule::named(&header.policy)
            .ok_or_else(|| format!("there is no policy `{}`", header.policy))?,
        system: System::named(&header.system)
            .ok_or_else(|| format!("there is no system `{}`", header.system))?,
        network: Network::named(&header.network)
            .ok_or_else(|| format!("there is no network `{}`", header.network))?,
        servers: header.servers.clone(),
        length: Duration::from_secs(header.seconds),
        seed: header.seed,
        clients: header.clients,
        keys: header.keys,
        pause: Duration::from_millis(header.pause_ms),
        broken,
        plan: header.plan.clone(),
        patience: match header.patience_seconds {
            0 => run::PATIENCE,
            seconds => Duration::from_secs(seconds),
        },
        progress: true,
    })
}

fn check(file: &Path, json: bool) -> Result<Outcome> {
    let history = History::read(file)?;
    let verdicts = checker::check(&history);
    if json {
        println!("{}", serde_json::to_string_pretty(&verdicts)?);
    } else {
        print_verdicts(&verdicts);
    }
    Ok(Outcome::of(&verdicts))
}

/// The table and every finding.
pub fn print_verdicts(verdicts: &[Verdict]) {
    println!("{}", report::table(verdicts));
    for verdict in verdicts {
        if let checker::Answer::Violated { findings, .. } = &verdict.answer {
            for finding in findings.iter().take(5) {
                println!("{}: {finding}", verdict.check.name());
            }
        }
    }
    println!("=> {}", Outcome::of(verdicts).word());
}

fn doctor() -> Outcome {
    println!("workloads");
    for workload in crate::workload::all() {
        println!("  {:<10} runs; {}", workload.name, workload.purpose);
    }
    println!("nemeses");
    for nemesis in nemesis::ALL.iter().chain(nemesis::AIMED) {
        let mut state = nemesis::impossible(nemesis.name)
            .map_or_else(|| "runs".to_owned(), |why| format!("impossible: {why}"));
        if nemesis::wants_packets(nemesis.name) {
            state += &nemesis::packets::impossible().map_or_else(
                || " (packets are dropped by nft)".to_owned(),
                |why| format!(" (the proxies lose them: {why})"),
            );
        }
        let all = crate::workload::all();
        let not = all
            .iter()
            .filter(|workload| nemesis::unfit(nemesis.name, workload).is_some());
        let not: Vec<&str> = not.map(|workload| workload.name).collect();
        if !not.is_empty() {
            state += &format!(", not with {}", not.join(", "));
        }
        println!("  {:<10} {state}; {}", nemesis.name, nemesis.purpose);
    }
    println!("networks");
    for network in [Network::Proxy, Network::Veth] {
        let state = network
            .impossible()
            .map_or_else(|| "runs".to_owned(), |why| format!("impossible: {why}"));
        let not = nemesis::ALL
            .iter()
            .filter(|nemesis| network.cannot(nemesis.name).is_some());
        let not: Vec<&str> = not.map(|nemesis| nemesis.name).collect();
        let not = if not.is_empty() {
            String::new()
        } else {
            format!("; not under {}", not.join(", "))
        };
        println!("  {:<10} {state}{not}", network.name());
    }
    println!("servers");
    for version in 15..=18 {
        let state = match system::is_here(version) {
            true => "is here",
            false => "is not here: run scripts/setup.sh",
        };
        println!("  PostgreSQL {version} {state}");
    }
    println!("other systems");
    for system in [System::Native, System::Pglogical] {
        let state = system
            .impossible(&system.servers(), "none")
            .map_or_else(|| "runs".to_owned(), |why| format!("impossible: {why}"));
        let not = nemesis::ALL.iter().map(|nemesis| nemesis.name);
        let not: Vec<&str> = not
            .filter(|name| state == "runs" && system.impossible(&system.servers(), name).is_some())
            .collect();
        println!("  {:<10} {state}; not under {}", system.name(), not.join(", "));
    }
    Outcome::Holds
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a shell makes of a command in which nothing but single quotes is special.
    fn words(command: &str) -> Vec<String> {
        let mut words = vec![String::new()];
        for (number, part) in command.split('\'').enumerate() {
            if number % 2 == 1 {
                words.last_mut().unwrap().push_str(part);
                continue;
            }
            let mut pieces = part.split(' ');
            words.last_mut().unwrap().push_str(pieces.next().unwrap());
            words.extend(pieces.map(str::to_owned));
        }
        words
    }

    fn parsed(command: &str) -> Options {
        match Cli::try_parse_from(words(command)).unwrap().command {
            Command::Run(args) => args.options().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_of_a_run_runs_the_same_again() {
        let usual = parsed("anabranch-jepsen run --workload mix --nemesis all --seconds 40 --seed 7");
        assert!(!usual.command().contains("--plan") && !usual.command().contains("--patience"));
        let mut shrunk = usual.clone();
        shrunk.servers = vec![15, 18];
        shrunk.system = System::Native;
        shrunk.policy = Rule::DeleteWins;
        shrunk.network = Network::Veth;
        (shrunk.clients, shrunk.keys) = (2, 5);
        shrunk.pause = Duration::from_millis(2);
        shrunk.patience = Duration::from_secs(30);
        shrunk.plan = Some(usual.plan().split_off(2));
        let mut of_the_seed = usual.clone();
        of_the_seed.plan = Some(usual.plan());
        let mut empty = usual.clone();
        empty.plan = Some(Vec::new());
        for options in [usual, shrunk, of_the_seed, empty] {
            let again = parsed(&options.command());
            assert_eq!(again.command(), options.command());
            assert_eq!(again.plan(), options.plan());
            assert_eq!(again.patience, options.patience);
            assert_eq!((again.servers, again.keys), (options.servers, options.keys));
            assert_eq!((again.network, again.policy), (options.network, options.policy));
            assert_eq!((again.clients, again.pause), (options.clients, options.pause));
        }
    }
}
