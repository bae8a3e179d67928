//! Everything, in pieces: one after the other, and not those whose lines a file has already.
//!
//! A piece has servers of its own, so each can be the last of a run. All pieces of a round come before the next round:
//! whenever it ends, most has been measured equally often.

use std::collections::BTreeSet;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::ValueEnum;
use futures_util::FutureExt as _;

use crate::machine::Machine;
use crate::results::{Key, Line, Record, turns};
use crate::stage::{System, not_installed};
use crate::work::{Job, Shape, Work};
use crate::{backlog, both, catchup, copy, fanout, lag, large, overhead};

/// A kind of measurement, named as its own command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    Backlog,
    Lag,
    Overhead,
    Both,
    CatchUp,
    Large,
    FanOut,
    Copy,
}

/// Commits a second of the lag.
pub const RATES: [u32; 2] = [200, 3_000];
/// Percentages of writes that collide.
pub const COLLIDING: [u32; 3] = [0, 1, 10];
/// Numbers of peers.
pub const PEERS: [usize; 3] = [1, 3, 7];
/// Updates while a node is away: ten minutes of 3,000 a second.
pub const UPDATES: u64 = 1_800_000;
/// Rows of one large transaction.
pub const LARGE_ROWS: u64 = 10_000_000;
/// Rows for each number of peers.
pub const FAN_OUT_ROWS: u64 = 1_000_000;
/// Rows of the first copy.
pub const COPY_ROWS: u64 = 5_000_000;
/// Sessions of the overhead, and pgbench's scale.
pub const CLIENTS: (u32, u64) = (4, 10);
/// How long a system may need for one large transaction.
pub const LARGE_PATIENCE: Duration = Duration::from_secs(1_800);

/// What is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    pub systems: Vec<System>,
    pub kinds: Vec<Kind>,
    /// Share of the full amount of rows.
    pub scale: f64,
    /// Seconds of what runs by the clock.
    pub seconds: f64,
}

/// What a run did not bring.
#[derive(Debug, Default)]
pub struct Lacking {
    /// How many pieces were not begun.
    pub left: usize,
    /// Which pieces failed, with their rounds.
    pub failed: Vec<String>,
}

/// What has servers of its own.
#[derive(Clone, Copy, Debug)]
enum Piece {
    Backlog(Job),
    Lag,
    Overhead,
    Both(System),
    CatchUp(System),
    Large(System),
    FanOut(usize),
    Copy(System),
}

impl Piece {
    /// Does it take as long as it is told to, whatever it manages meanwhile?
    const fn is_by_the_clock(self) -> bool {
        matches!(self, Self::Lag | Self::Overhead | Self::Both(_))
    }
}

impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Backlog(job) => write!(f, "backlog of {} {}", job.work, job.shape),
            Self::Lag => f.write_str("lag"),
            Self::Overhead => f.write_str("overhead"),
            Self::Both(system) => write!(f, "both with {system}"),
            Self::CatchUp(system) => write!(f, "catch-up with {system}"),
            Self::Large(system) => write!(f, "large with {system}"),
            Self::FanOut(peers) => write!(f, "fan-out to {peers}"),
            Self::Copy(system) => write!(f, "copy with {system}"),
        }
    }
}

/// Work on these shapes; TPC-B brings its own tables, so it is there once, with the first shape.
pub fn jobs(works: &[Work], shapes: &[Shape], scale: f64) -> Vec<Job> {
    let mut jobs = Vec::new();
    for &shape in shapes {
        for &work in works {
            if work != Work::TpcB || shape == shapes[0] {
                jobs.push(Job { work, shape, scale });
            }
        }
    }
    jobs
}

impl Plan {
    fn scaled(&self, amount: u64) -> u64 {
        ((amount as f64 * self.scale).round() as u64).max(1_000)
    }

    fn load(&self) -> overhead::Load {
        overhead::Load {
            scale: CLIENTS.1,
            clients: CLIENTS.0,
            seconds: self.seconds.ceil() as u32,
        }
    }

    /// The pieces of a round; what each system does alone, in turn.
    fn pieces(&self, round: usize) -> Vec<Piece> {
        let in_turn = turns(&self.systems, round);
        let ours: Vec<System> = in_turn
            .iter()
            .copied()
            .filter(|system| system.is_ours())
            .collect();
        let mut pieces = Vec::new();
        for kind in &self.kinds {
            match kind {
                Kind::Backlog => {
                    let jobs = jobs(Work::value_variants(), Shape::value_variants(), self.scale);
                    pieces.extend(jobs.into_iter().map(Piece::Backlog));
                }
                Kind::Lag => pieces.push(Piece::Lag),
                Kind::Overhead => pieces.push(Piece::Overhead),
                Kind::Both => pieces.extend(ours.iter().copied().map(Piece::Both)),
                Kind::CatchUp => pieces.extend(ours.iter().copied().map(Piece::CatchUp)),
                Kind::Large => pieces.extend(in_turn.iter().copied().map(Piece::Large)),
                Kind::FanOut if self.systems.contains(&fanout::SYSTEM) => {
                    pieces.extend(turns(&PEERS, round).into_iter().map(Piece::FanOut));
                }
                Kind::FanOut => {}
                Kind::Copy => {
                    let copying = in_turn.iter().filter(|system| copy::is_measured(**system));
                    pieces.extend(copying.copied().map(Piece::Copy));
                }
            }
        }
        pieces
    }

    /// The records that a piece makes.
    fn keys(&self, piece: Piece) -> Vec<Key> {
        let key = |work: String, shape: &str, system: String| (work, shape.to_owned(), system);
        let systems = || self.systems.iter().map(ToString::to_string);
        match piece {
            Piece::Backlog(job) => systems()
                .map(|system| key(job.work.to_string(), &job.shape.to_string(), system))
                .collect(),
            Piece::Lag => RATES
                .iter()
                .flat_map(|&rate| systems().map(move |system| key(lag::work(rate), "", system)))
                .collect(),
            Piece::Overhead => systems()
                .chain([overhead::ALONE.to_owned()])
                .map(|system| key(overhead::work(CLIENTS.0), "", system))
                .collect(),
            Piece::Both(system) => COLLIDING
                .iter()
                .map(|&percentage| key(both::work(percentage), "", system.to_string()))
                .collect(),
            Piece::CatchUp(system) => {
                let work = catchup::work(self.scaled(UPDATES));
                vec![key(work, "", system.to_string())]
            }
            Piece::Large(system) => {
                let work = large::work(self.scaled(LARGE_ROWS));
                vec![key(work, "narrow", system.to_string())]
            }
            Piece::FanOut(peers) => {
                let work = fanout::work(self.scaled(FAN_OUT_ROWS));
                vec![key(work, &fanout::shape(peers), fanout::SYSTEM.to_string())]
            }
            Piece::Copy(system) => {
                let work = copy::work(self.scaled(COPY_ROWS));
                vec![key(work, "narrow", system.to_string())]
            }
        }
    }

    /// Has a file all lines of a piece, of systems that were measured together?
    fn has(&self, known: &[Line], piece: Piece, round: usize) -> bool {
        let of = |key: &Key| -> BTreeSet<Option<u64>> {
            known
                .iter()
                .filter(|line| is_of(&line.record, key, round))
                .map(|line| line.piece)
                .collect()
        };
        let keys = self.keys(piece);
        let together = keys.iter().map(of).reduce(|one, other| &one & &other);
        together.is_some_and(|pieces| !pieces.is_empty())
    }

    /// Why what comes here could not be put beside the lines of a file: ratios are those of one machine and one size.
    pub fn unlike(&self, known: &[Line], machine: &Machine) -> Option<String> {
        if let Some(other) = known
            .iter()
            .filter_map(|line| line.machine.as_ref())
            .find(|other| *other != machine)
        {
            return Some(format!("it was measured on another machine: {other}"));
        }
        for line in known {
            let sizes = [
                ("scale", line.scale, self.scale),
                ("seconds", line.seconds, self.seconds),
            ];
            for (option, has, would) in sizes {
                if let Some(has) = has
                    && (has - would).abs() > 1e-9
                {
                    let Record { work, shape, .. } = &line.record;
                    return Some(format!(
                        "{work} {shape} was measured with --{option} {has} there and would be with {would} here: choose the same"
                    ));
                }
            }
        }
        // Older lines do not say it, but how many rows they are of.
        for piece in self.pieces(0) {
            let Piece::Backlog(job) = piece else { continue };
            let rows = job.written().rows as f64;
            let (work, shape) = (job.work.to_string(), job.shape.to_string());
            let of_job = |record: &&Record| record.work == work && record.shape == shape;
            let mut others = known.iter().map(|line| &line.record).filter(of_job);
            if let Some(other) = others.find(|record| record.values.get("rows") != Some(&rows)) {
                let has = other.values.get("rows").copied().unwrap_or(0.0);
                return Some(format!(
                    "{work} {shape} has {has} rows there and would have {rows} here: choose the same --scale"
                ));
            }
        }
        None
    }

    /// Why some of the systems could be measured by no piece on this machine.
    pub fn impossible(&self) -> Option<String> {
        let pieces = self.pieces(0);
        let keys = pieces.iter().flat_map(|piece| self.keys(*piece));
        let named: Vec<String> = keys.map(|key| key.2).collect();
        let asked = |system: &&System| named.contains(&system.to_string());
        let systems: Vec<System> = self.systems.iter().filter(asked).copied().collect();
        not_installed(&systems)
    }

    /// Seconds that a piece takes on a machine with two cores, roughly: servers are started, tables are filled, everybody
    /// writes, applies and compares.
    fn guess(&self, piece: Piece) -> f64 {
        let count = self.systems.len() as f64;
        let scaled = |amount| self.scaled(amount) as f64;
        match piece {
            Piece::Backlog(job) => {
                let (rows, filled) = (job.written().rows as f64, job.filled() as f64);
                15.0 + count * (3.0 + rows * 50e-6 + filled * 20e-6)
            }
            Piece::Lag => 20.0 + count * RATES.len() as f64 * (self.seconds + 4.0),
            Piece::Overhead => 20.0 + count * 20.0 + (count + 1.0) * (self.seconds + 8.0),
            Piece::Both(_) => 15.0 + COLLIDING.len() as f64 * (self.seconds + 16.0),
            Piece::CatchUp(_) => 30.0 + scaled(UPDATES) * 60e-6,
            Piece::Large(_) => 15.0 + scaled(LARGE_ROWS) * 18e-6,
            Piece::FanOut(peers) => {
                let peers = peers as f64;
                20.0 + peers * (10.0 + scaled(FAN_OUT_ROWS) * 15e-6)
            }
            Piece::Copy(_) => 15.0 + scaled(COPY_ROWS) * 40e-6,
        }
    }

    /// Measures what `known` lacks of so many rounds. No piece is begun that would end after `within`, by what those before took; at
    /// least one is. The lines of a piece come together, once it is whole: half of one is measured anew, with all its systems. One that
    /// fails (they panic) is told, and the others are measured nevertheless.
    pub async fn measure(
        &self,
        rounds: usize,
        known: &[Line],
        machine: &Machine,
        within: Option<Duration>,
        mut done: impl FnMut(Vec<Line>),
    ) -> Lacking {
        let mut lacking = Lacking::default();
        let all =
            (0..rounds).flat_map(|round| self.pieces(round).into_iter().map(move |piece| (round, piece)));
        let missing: Vec<(usize, Piece)> = all
            .filter(|(round, piece)| !self.has(known, *piece, *round))
            .collect();
        let guess = |from: usize| -> f64 {
            let rest = missing.iter().skip(from);
            rest.map(|(_, piece)| self.guess(*piece)).sum()
        };
        let began = Instant::now();
        for (at, &(round, piece)) in missing.iter().enumerate() {
            let elapsed = began.elapsed().as_secs_f64();
            let guessed = guess(0) - guess(at);
            let pace = if guessed > 0.0 { elapsed / guessed } else { 1.0 };
            let end = elapsed + self.guess(piece) * pace;
            if at > 0 && within.is_some_and(|within| end > within.as_secs_f64()) {
                lacking.left = missing.len() - at;
                break;
            }
            eprintln!(
                "bench: {} of {} pieces: {piece}, round {round}; all that is left takes about {:.0} minutes (a guess, better \
                 with each piece)",
                at + 1,
                missing.len(),
                guess(at) * pace / 60.0
            );
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let mut records = Vec::new();
            let mut take = |record: Record| {
                eprintln!("bench: {record}");
                records.push(record);
            };
            if !ends_well(self.one(piece, round, &mut take)).await {
                eprintln!("bench: {piece}, round {round}, failed (why is said above); nothing of it is kept");
                lacking.failed.push(format!("{piece}, round {round}"));
                continue;
            }
            let line = |record| Line {
                record,
                machine: Some(machine.clone()),
                piece: Some(since.as_millis() as u64),
                scale: Some(self.scale),
                seconds: piece.is_by_the_clock().then_some(self.seconds),
            };
            done(records.into_iter().map(line).collect());
        }
        lacking
    }

    async fn one(&self, piece: Piece, round: usize, done: &mut impl FnMut(Record)) {
        let rounds = round..round + 1;
        match piece {
            Piece::Backlog(job) => backlog::measure(&self.systems, &[job], rounds, done).await,
            Piece::Lag => lag::measure(&self.systems, &RATES, self.seconds, rounds, done).await,
            Piece::Overhead => overhead::measure(&self.systems, self.load(), rounds, done).await,
            Piece::Both(system) => both::measure(&[system], &COLLIDING, self.seconds, rounds, done).await,
            Piece::CatchUp(system) => {
                catchup::measure(&[system], self.scaled(UPDATES), rounds, done).await;
            }
            Piece::Large(system) => {
                let rows = self.scaled(LARGE_ROWS);
                large::measure(&[system], rows, LARGE_PATIENCE, rounds, done).await;
            }
            Piece::FanOut(peers) => {
                fanout::measure(&[peers], self.scaled(FAN_OUT_ROWS), rounds, done).await;
            }
            Piece::Copy(system) => copy::measure(&[system], self.scaled(COPY_ROWS), rounds, done).await,
        }
    }
}

/// Does a piece come to its end? If it panics all that it had is dropped by then, which stops its servers and daemons.
async fn ends_well(piece: impl Future<Output = ()>) -> bool {
    AssertUnwindSafe(piece).catch_unwind().await.is_ok()
}

fn is_of(record: &Record, key: &Key, round: usize) -> bool {
    record.round == round && record.work == key.0 && record.shape == key.1 && record.system == key.2
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::bars;

    fn whole(scale: f64) -> Plan {
        Plan {
            systems: System::value_variants().to_vec(),
            kinds: Kind::value_variants().to_vec(),
            scale,
            seconds: 10.0,
        }
    }

    /// The lines of some pieces of a round.
    fn lines(plan: &Plan, pieces: &[Piece], round: usize) -> Vec<Line> {
        let mut lines = Vec::new();
        for &piece in pieces {
            for (work, shape, system) in plan.keys(piece) {
                let mut values = std::collections::BTreeMap::new();
                if let Piece::Backlog(job) = piece {
                    values.insert("rows".to_owned(), job.written().rows as f64);
                }
                let record = Record {
                    work,
                    shape,
                    system,
                    round,
                    values,
                };
                lines.push(Line {
                    record,
                    machine: None,
                    piece: None,
                    scale: None,
                    seconds: None,
                });
            }
        }
        lines
    }

    fn machine() -> Machine {
        Machine::this(&std::env::temp_dir())
    }

    #[test]
    fn the_whole_holds_all_that_has_a_bar() {
        let plan = whole(1.0);
        let pieces = plan.pieces(0);
        let works: BTreeSet<String> = pieces
            .iter()
            .flat_map(|piece| plan.keys(*piece))
            .map(|key| key.0)
            .collect();
        assert_eq!(bars::without(&works), Vec::<&str>::new());
        // Seven kinds of work on narrow rows, six on wide ones.
        let jobs = pieces.iter().filter(|piece| matches!(piece, Piece::Backlog(_)));
        assert_eq!(jobs.count(), 13);
    }

    #[test]
    fn a_run_goes_on_behind_the_last_piece_that_is_whole() {
        let plan = whole(0.3);
        let pieces = plan.pieces(0);
        let mut known = lines(&plan, &pieces[..3], 0);
        // One system of the third is missing.
        known.pop();
        let missing = |round: usize| -> Vec<bool> {
            pieces
                .iter()
                .map(|piece| !plan.has(&known, *piece, round))
                .take(4)
                .collect()
        };
        assert_eq!(missing(0), [false, false, true, true]);
        assert_eq!(missing(1), [true; 4]);
        assert_eq!(plan.unlike(&known, &machine()), None);
    }

    #[test]
    fn a_piece_is_there_only_with_systems_that_were_measured_together() {
        let plan = whole(0.3);
        let piece = Piece::Lag;
        let mut known = lines(&plan, &[piece], 0);
        for line in &mut known {
            line.piece = Some(1);
        }
        assert!(plan.has(&known, piece, 0));
        known[0].piece = Some(2);
        assert!(!plan.has(&known, piece, 0));
    }

    #[tokio::test]
    async fn a_piece_that_panics_has_dropped_what_it_had_and_others_go_on() {
        let server = Rc::new(());
        let held = Rc::clone(&server);
        let piece = async move {
            tokio::task::yield_now().await;
            assert_eq!(Rc::strong_count(&held), 0, "on purpose");
        };
        assert!(!ends_well(piece).await);
        assert_eq!(Rc::strong_count(&server), 1);
        assert!(ends_well(tokio::task::yield_now()).await);
    }

    #[test]
    fn another_size_or_machine_is_not_put_beside_it() {
        let small = whole(0.1);
        let mut known = lines(&small, &small.pieces(0), 0);
        let here = machine();
        assert_eq!(small.unlike(&known, &here), None);
        let why = whole(1.0).unlike(&known, &here).unwrap();
        assert!(why.contains("--scale"), "{why}");
        // What has no rows of the backlog by which to know it.
        let mut copy = lines(&small, &[Piece::Copy(System::Native15)], 0);
        assert_eq!(whole(1.0).unlike(&copy, &here), None);
        copy[0].scale = Some(0.1);
        assert_eq!(small.unlike(&copy, &here), None);
        let why = whole(1.0).unlike(&copy, &here).unwrap();
        assert!(why.contains("--scale 0.1 there"), "{why}");
        let mut lag = lines(&small, &[Piece::Lag], 0);
        lag[0].seconds = Some(2.0);
        let why = small.unlike(&lag, &here).unwrap();
        assert!(why.contains("--seconds 2 there"), "{why}");
        let elsewhere = Machine {
            cores: here.cores + 1,
            ..here.clone()
        };
        known[0].machine = Some(elsewhere);
        let why = small.unlike(&known, &here).unwrap();
        assert!(why.contains("another machine"), "{why}");
    }
}
