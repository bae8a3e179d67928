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
//! * [`results`] – records and medians.
//! * [`bars`]    – ratios, and what is asked of them.
//! * [`report`]  – tables and JSON.
//! * [`machine`] – what it was measured on.
//! * [`plot`]    – SVG.
//!
//! Nothing here asserts how long something takes. `docs/performance.md` says what is measured and how.

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
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use machine::Machine;
use results::{Line, Medians, Record};
use stage::System;
use work::{Job, Shape, Work};

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
        #[arg(long, value_delimiter = ',', default_values_t = [200, 3000])]
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
        #[arg(long, default_value_t = 4)]
        clients: u32,
        /// pgbench's scale: so many times 100,000 accounts.
        #[arg(long, default_value_t = 10)]
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
        #[arg(long, value_delimiter = ',', default_values_t = [0, 1, 10])]
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
        #[arg(long, default_value_t = 1_800_000)]
        updates: u64,
    },
    /// One transaction of very many rows: lag and memory.
    Large {
        #[command(flatten)]
        common: Common,
        /// Its rows.
        #[arg(long, default_value_t = 10_000_000)]
        rows: u64,
        /// Seconds that a system may need for it.
        #[arg(long, default_value_t = 1_800)]
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
        #[arg(long, value_delimiter = ',', default_values_t = [1, 3, 7])]
        peers: Vec<usize>,
        /// Rows, 500 a transaction.
        #[arg(long, default_value_t = 1_000_000)]
        rows: u64,
    },
    /// An empty server gets a copy of a table with two more indexes, by `anabranch join` or CREATE SUBSCRIPTION.
    Copy {
        #[command(flatten)]
        common: Common,
        /// Its rows.
        #[arg(long, default_value_t = 5_000_000)]
        rows: u64,
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
            | Self::Copy { common, .. } => common.json.as_ref(),
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
    lines: Vec<Line>,
}

impl Sink {
    fn take(&mut self, record: Record) {
        let line = Line {
            record,
            machine: Some(self.machine.clone()),
        };
        if let Some(path) = &self.json
            && let Err(error) = results::append(path, &line)
        {
            eprintln!("bench: cannot write {}: {error}", path.display());
        }
        let record = &line.record;
        let figures: Vec<String> = record
            .values
            .iter()
            .map(|(name, value)| format!("{name} {}", results::short(*value)))
            .collect();
        eprintln!(
            "bench: {} {} {} round {}: {}",
            record.work,
            record.shape,
            record.system,
            record.round,
            figures.join(", ")
        );
        self.lines.push(line);
    }
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
        lines: Vec::new(),
    };
    let mut output = Output::Table;
    let mut plot_to = None;
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
            let mut jobs = Vec::new();
            for &shape in &shapes {
                for &work in &works {
                    // TPC-B brings its own tables, whatever the shape.
                    if work != Work::TpcB || shape == shapes[0] {
                        jobs.push(Job { work, shape, scale });
                    }
                }
            }
            backlog::measure(&common.systems(), &jobs, common.rounds, |record| {
                sink.take(record)
            })
            .await;
        }
        Verb::Lag {
            common,
            rates,
            seconds,
        } => {
            lag::measure(&common.systems(), &rates, seconds, common.rounds, |record| {
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
            overhead::measure(&common.systems(), load, common.rounds, |record| {
                sink.take(record);
            })
            .await;
        }
        Verb::Both {
            common,
            colliding,
            seconds,
        } => {
            both::measure(&common.systems(), &colliding, seconds, common.rounds, |record| {
                sink.take(record);
            })
            .await;
        }
        Verb::CatchUp { common, updates } => {
            catchup::measure(&common.systems(), updates, common.rounds, |record| {
                sink.take(record);
            })
            .await;
        }
        Verb::Large {
            common,
            rows,
            patience,
        } => {
            let patience = std::time::Duration::from_secs(patience);
            large::measure(&common.systems(), rows, patience, common.rounds, |record| {
                sink.take(record);
            })
            .await;
        }
        Verb::Copy { common, rows } => {
            copy::measure(&common.systems(), rows, common.rounds, |record| sink.take(record)).await;
        }
        Verb::FanOut {
            rounds, peers, rows, ..
        } => {
            fanout::measure(&peers, rows, rounds, |record| sink.take(record)).await;
        }
        Verb::Report {
            files,
            output: how,
            svg,
        } => {
            (output, plot_to) = (how, svg);
            for file in &files {
                match results::read(file) {
                    Ok(lines) => sink.lines.extend(lines),
                    Err(error) => {
                        eprintln!("bench: cannot read {}: {error}", file.display());
                        return std::process::ExitCode::FAILURE;
                    }
                }
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
    std::process::ExitCode::SUCCESS
}
