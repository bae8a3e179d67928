//! Anabranch measured side by side with its peers, in one run on one machine.
//!
//! * [`work`]    – tables and what is written to them.
//! * [`stage`]   – servers and systems, and which of them stand still.
//! * [`usage`]   – CPU and memory of processes.
//! * [`backlog`] – catching up: rows a second.
//! * [`lag`]     – commit to visible.
//! * [`overhead`] – what the source still takes.
//! * [`both`]    – both nodes write, and collide.
//! * [`catchup`] – a node that was away.
//! * [`large`]   – one huge transaction.
//! * [`fanout`]  – more peers.
//! * [`copy`]    – the first copy.
//! * [`all`]     – all of these, in pieces.
//! * [`results`] – records and medians.
//! * [`bars`]    – ratios, and what is asked of them.
//! * [`report`]  – tables and JSON.
//! * [`machine`] – what it was measured on.
//! * [`plot`]    – SVG.
//!
//! Nothing here asserts how long something takes. `docs/performance.md` says what is measured and how.

mod all;
mod backlog;
mod bars;
mod both;
mod catchup;
mod copy;
mod fanout;
mod lag;
mod large;
mod machine;
mod overhead;
mod plot;
mod report;
mod results;
mod stage;
mod usage;
mod work;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use machine::Machine;
use results::{Line, Medians, Record};
use stage::System;
use work::{Shape, Work};

/// Measures Anabranch, native logical replication and pglogical side by side. Needs scripts/setup.sh --bench, and
/// `anabranch` built beside it (cargo build --release --bins).
#[derive(Parser)]
#[command(name = "anabranch-bench", version)]
struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Args)]
struct Common {
    /// Systems to measure; all of them without this.
    #[arg(long, value_delimiter = ',')]
    systems: Vec<System>,
    /// Times that everything is measured; the systems take turns.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Append every measurement to this file, a line of JSON each.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Verb {
    /// Let each receiver catch up on a backlog: rows/s, CPU, memory.
    Backlog {
        #[command(flatten)]
        common: Common,
        /// Kinds of work; all of them without this.
        #[arg(long, value_delimiter = ',')]
        only: Vec<Work>,
        /// Row shapes; both without this.
        #[arg(long, value_delimiter = ',')]
        shapes: Vec<Shape>,
        /// Share of the full amount of rows.
        #[arg(long, default_value_t = 1.0)]
        scale: f64,
    },
    /// Time from commit to visible at the other node.
    Lag {
        #[command(flatten)]
        common: Common,
        /// Commits a second.
        #[arg(long, value_delimiter = ',', default_values_t = all::RATES)]
        rates: Vec<u32>,
        /// Seconds of each measurement.
        #[arg(long, default_value_t = 10.0)]
        seconds: f64,
    },
    /// pgbench's simple update at the source, replicated or not: transactions/s.
    Overhead {
        #[command(flatten)]
        common: Common,
        /// Sessions that write.
        #[arg(long, default_value_t = all::CLIENTS.0)]
        clients: u32,
        /// pgbench's scale: so many times 100,000 accounts.
        #[arg(long, default_value_t = all::CLIENTS.1)]
        scale: u64,
        /// Seconds of each measurement.
        #[arg(long, default_value_t = 10)]
        seconds: u32,
    },
    /// Both nodes write at once (our systems): throughput, lag, conflicts.
    Both {
        #[command(flatten)]
        common: Common,
        /// Percentages of writes that collide.
        #[arg(long, value_delimiter = ',', default_values_t = all::COLLIDING)]
        colliding: Vec<u32>,
        /// Seconds of each measurement.
        #[arg(long, default_value_t = 10.0)]
        seconds: f64,
    },
    /// A node is away while the other writes (our systems): catching up, journal, memory.
    CatchUp {
        #[command(flatten)]
        common: Common,
        /// Single-row updates that are written meanwhile; ten minutes of 3,000 a second without this.
        #[arg(long, default_value_t = all::UPDATES)]
        updates: u64,
    },
    /// One transaction of very many rows: lag and memory.
    Large {
        #[command(flatten)]
        common: Common,
        /// Its rows.
        #[arg(long, default_value_t = all::LARGE_ROWS)]
        rows: u64,
        /// Seconds that a system may need for it.
        #[arg(long, default_value_t = all::LARGE_PATIENCE.as_secs())]
        patience: u64,
    },
    /// The same rows for more and more peers (our system, 15): CPU and memory at the source.
    FanOut {
        /// Times that everything is measured.
        #[arg(long, default_value_t = 3)]
        rounds: usize,
        /// Append every measurement to this file, a line of JSON each.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Numbers of peers.
        #[arg(long, value_delimiter = ',', default_values_t = all::PEERS)]
        peers: Vec<usize>,
        /// Rows, 500 a transaction.
        #[arg(long, default_value_t = all::FAN_OUT_ROWS)]
        rows: u64,
    },
    /// An empty server gets a copy of a table with two more indexes, by `anabranch join` or CREATE SUBSCRIPTION.
    Copy {
        #[command(flatten)]
        common: Common,
        /// Its rows.
        #[arg(long, default_value_t = all::COPY_ROWS)]
        rows: u64,
    },
    /// All of these in turn, in pieces: those whose lines the file of --json has already are left out, so a run that was
    /// interrupted goes on when it is started again. Prints everything that the file holds then.
    All {
        #[command(flatten)]
        common: Common,
        /// Kinds of measurements; all of them without this.
        #[arg(long, value_delimiter = ',')]
        only: Vec<all::Kind>,
        /// Share of the full amount of rows.
        #[arg(long, default_value_t = 1.0)]
        scale: f64,
        /// Seconds of each measurement by the clock: lag, overhead, both.
        #[arg(long, default_value_t = 10.0)]
        seconds: f64,
        /// Begin nothing that would not be measured within so many minutes.
        #[arg(long)]
        minutes: Option<u64>,
        /// Write the backlog's rates as bars to this file.
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
    },
    /// Print what files of JSON lines hold: the machine, medians, ratios, and whether the bars are met.
    Report {
        files: Vec<PathBuf>,
        /// Tables, or one JSON document.
        #[arg(long, value_enum, default_value_t = Output::Table)]
        output: Output,
        /// Write the backlog's rates as bars to this file.
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
    },
}

/// How a report looks.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

impl Verb {
    /// Where measurements are kept.
    const fn json(&self) -> Option<&PathBuf> {
        match self {
            Self::Backlog { common, .. }
            | Self::Lag { common, .. }
            | Self::Overhead { common, .. }
            | Self::Both { common, .. }
            | Self::CatchUp { common, .. }
            | Self::Large { common, .. }
            | Self::Copy { common, .. }
            | Self::All { common, .. } => common.json.as_ref(),
            Self::FanOut { json, .. } => json.as_ref(),
            Self::Report { .. } => None,
        }
    }
}

impl Common {
    fn systems(&self) -> Vec<System> {
        match self.systems.as_slice() {
            [] => System::value_variants().to_vec(),
            chosen => chosen.to_vec(),
        }
    }
}

/// Keeps and shows what comes.
struct Sink {
    json: Option<PathBuf>,
    machine: Machine,
    /// What a single command's lines say of their size.
    scale: Option<f64>,
    seconds: Option<f64>,
    lines: Vec<Line>,
}

impl Sink {
    /// Keeps and shows what a single command measured.
    fn take(&mut self, record: Record) {
        eprintln!("bench: {record}");
        let line = Line {
            record,
            machine: Some(self.machine.clone()),
            piece: None,
            scale: self.scale,
            seconds: self.seconds,
        };
        self.keep(vec![line]);
    }

    fn keep(&mut self, lines: Vec<Line>) {
        if let Some(path) = &self.json
            && let Err(error) = results::append(path, &lines)
        {
            eprintln!("bench: cannot write {}: {error}", path.display());
        }
        self.lines.extend(lines);
    }
}

/// What counts of a file ([`results::latest`]); nothing, and why is said, where it cannot be read.
fn lines_of(file: &Path) -> Option<Vec<Line>> {
    results::read(file)
        .inspect_err(|error| eprintln!("bench: cannot read {}: {error}", file.display()))
        .ok()
        .map(results::latest)
}

/// Prints the medians, and where they were measured; of lines that do not say it nothing is known.
fn print(lines: &[Line], medians: &Medians, output: Output) {
    let machines: BTreeSet<&Machine> = lines.iter().filter_map(|line| line.machine.as_ref()).collect();
    if output == Output::Json {
        println!("{:#}", report::json(&machines, medians));
        return;
    }
    for machine in &machines {
        println!("Measured on: {machine}\n");
    }
    for table in [report::backlog_table(medians), report::figures_table(medians)] {
        if table.row_count() > 0 {
            println!("{table}\n");
        }
    }
}

#[tokio::main]
async fn main() -> std::process::ExitCode {
    let command = Command::parse();
    let began = std::time::Instant::now();
    let mut sink = Sink {
        json: command.verb.json().cloned(),
        // Where the servers' folders are made.
        machine: Machine::this(&std::env::temp_dir()),
        scale: None,
        seconds: None,
        lines: Vec::new(),
    };
    let mut output = Output::Table;
    let mut plot_to = None;
    let mut failed = Vec::new();
    match command.verb {
        Verb::Backlog {
            common,
            only,
            shapes,
            scale,
        } => {
            let works = if only.is_empty() {
                Work::value_variants().to_vec()
            } else {
                only
            };
            let shapes = if shapes.is_empty() {
                Shape::value_variants().to_vec()
            } else {
                shapes
            };
            let jobs = all::jobs(&works, &shapes, scale);
            sink.scale = Some(scale);
            backlog::measure(&common.systems(), &jobs, 0..common.rounds, |record| {
                sink.take(record);
            })
            .await;
        }
        Verb::Lag {
            common,
            rates,
            seconds,
        } => {
            sink.seconds = Some(seconds);
            lag::measure(&common.systems(), &rates, seconds, 0..common.rounds, |record| {
                sink.take(record);
            })
            .await;
        }
        Verb::Overhead {
            common,
            clients,
            scale,
            seconds,
        } => {
            let load = overhead::Load {
                scale,
                clients,
                seconds,
            };
            sink.seconds = Some(f64::from(seconds));
            overhead::measure(&common.systems(), load, 0..common.rounds, |record| {
                sink.take(record);
            })
            .await;
        }
        Verb::Both {
            common,
            colliding,
            seconds,
        } => {
            sink.seconds = Some(seconds);
            both::measure(
                &common.systems(),
                &colliding,
                seconds,
                0..common.rounds,
                |record| {
                    sink.take(record);
                },
            )
            .await;
        }
        Verb::CatchUp { common, updates } => {
            catchup::measure(&common.systems(), updates, 0..common.rounds, |record| {
                sink.take(record);
            })
            .await;
        }
        Verb::Large {
            common,
            rows,
            patience,
        } => {
            let patience = Duration::from_secs(patience);
            large::measure(&common.systems(), rows, patience, 0..common.rounds, |record| {
                sink.take(record);
            })
            .await;
        }
        Verb::Copy { common, rows } => {
            copy::measure(&common.systems(), rows, 0..common.rounds, |record| {
                sink.take(record);
            })
            .await;
        }
        Verb::FanOut {
            rounds, peers, rows, ..
        } => {
            fanout::measure(&peers, rows, 0..rounds, |record| sink.take(record)).await;
        }
        Verb::All {
            common,
            only,
            scale,
            seconds,
            minutes,
            svg,
        } => {
            plot_to = svg;
            if let Some(file) = common.json.as_deref().filter(|file| file.exists()) {
                let Some(lines) = lines_of(file) else {
                    return std::process::ExitCode::FAILURE;
                };
                sink.lines = lines;
            }
            let kinds = if only.is_empty() {
                all::Kind::value_variants().to_vec()
            } else {
                only
            };
            let plan = all::Plan {
                systems: common.systems(),
                kinds,
                scale,
                seconds,
            };
            if let Some(why) = plan.impossible() {
                eprintln!("bench: {why}");
                return std::process::ExitCode::FAILURE;
            }
            let known = sink.lines.clone();
            if let Some(why) = plan.unlike(&known, &sink.machine) {
                eprintln!("bench: the file cannot be continued here: {why}");
                return std::process::ExitCode::FAILURE;
            }
            let within = minutes.map(|minutes| Duration::from_secs(minutes * 60));
            let machine = sink.machine.clone();
            let lacking = plan
                .measure(common.rounds, &known, &machine, within, |lines| {
                    sink.keep(lines);
                })
                .await;
            sink.lines = results::latest(sink.lines);
            if lacking.left > 0 {
                eprintln!(
                    "bench: {} pieces are left; the same command goes on with them",
                    lacking.left
                );
            }
            failed = lacking.failed;
        }
        Verb::Report {
            files,
            output: how,
            svg,
        } => {
            (output, plot_to) = (how, svg);
            for file in &files {
                let Some(lines) = lines_of(file) else {
                    return std::process::ExitCode::FAILURE;
                };
                sink.lines.extend(lines);
            }
        }
    }
    let records: Vec<Record> = sink.lines.iter().map(|line| line.record.clone()).collect();
    let medians = results::medians(&records);
    if let Some(path) = plot_to
        && let Err(error) = std::fs::write(&path, plot::backlog(&medians))
    {
        eprintln!("bench: cannot write {}: {error}", path.display());
        return std::process::ExitCode::FAILURE;
    }
    print(&sink.lines, &medians, output);
    eprintln!("bench: took {:.0} s", began.elapsed().as_secs_f64());
    if failed.is_empty() {
        return std::process::ExitCode::SUCCESS;
    }
    eprintln!(
        "bench: {} pieces failed; the same command tries them again: {}",
        failed.len(),
        failed.join("; ")
    );
    std::process::ExitCode::FAILURE
}
