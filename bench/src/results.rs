//! What was measured, as one line of JSON each, and the medians of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{File, read_to_string};
use std::io::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::machine::Machine;

/// Which rounds are measured.
pub type Rounds = std::ops::Range<usize>;

/// In what order they take turns in a round: each is the first of one.
pub fn turns<T: Clone>(all: &[T], round: usize) -> Vec<T> {
    let mut order = all.to_vec();
    order.rotate_left(round % all.len().max(1));
    order
}

/// One measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// `insert-one`, `lag-200`, ...
    pub work: String,
    /// `narrow`, `wide`, or nothing where that does not matter.
    pub shape: String,
    pub system: String,
    pub round: usize,
    /// Named figures, units last in the name: `seconds`, `rows`, `cpu_total` (seconds), `p50_ms`, ...
    pub values: BTreeMap<String, f64>,
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let figures: Vec<String> = self
            .values
            .iter()
            .map(|(name, value)| format!("{name} {}", short(*value)))
            .collect();
        write!(
            f,
            "{} {} {} round {}: {}",
            self.work,
            self.shape,
            self.system,
            self.round,
            figures.join(", ")
        )
    }
}

/// A line of a file: a record, and where it was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Line {
    #[serde(flatten)]
    pub record: Record,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Machine>,
    /// Of which piece of `all` it is: when that began, in milliseconds since 1970. Those of a piece were measured together. Nothing for
    /// lines of single commands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub piece: Option<u64>,
    /// Share of the full amount of rows, of those that are measured by it: all of `all`, and the backlog.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Seconds of what runs by the clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

/// Appends records to a file, a line each, all by one write: a run that is interrupted leaves all or none of them, and can be continued.
pub fn append(path: &Path, lines: &[Line]) -> std::io::Result<()> {
    let mut text = String::new();
    for line in lines {
        text.push_str(&serde_json::to_string(line)?);
        text.push('\n');
    }
    let mut file = File::options().create(true).append(true).open(path)?;
    file.write_all(text.as_bytes())
}

/// The lines of a file without those that a later piece of `all` measured anew: it takes the place of all that is there of the same
/// work, shape, system and round, since a ratio is one of systems that were measured together, and nothing counts twice. Lines of single
/// commands take nobody's place: whoever gives the same one twice wants both.
pub fn latest(lines: Vec<Line>) -> Vec<Line> {
    let mut replaced = BTreeSet::new();
    let mut kept: Vec<Line> = Vec::new();
    for line in lines.into_iter().rev() {
        let record = &line.record;
        let key: Key = (record.work.clone(), record.shape.clone(), record.system.clone());
        let place = (key, record.round);
        if replaced.contains(&place) {
            continue;
        }
        if line.piece.is_some() {
            replaced.insert(place);
        }
        kept.push(line);
    }
    kept.reverse();
    kept
}

/// Reads such a file.
pub fn read(path: &Path) -> std::io::Result<Vec<Line>> {
    let text = read_to_string(path)?;
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    lines.map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// CPU seconds of servers and daemons for each million rows, of records that say how many rows there were.
pub const CPU_PER_MILLION: &str = "cpu_s_per_million_rows";

/// Work, shape, system.
pub type Key = (String, String, String);

/// Figures by their names: medians over the rounds.
pub type Figures = BTreeMap<String, f64>;

/// All medians.
pub type Medians = BTreeMap<Key, Figures>;

/// Are these of the backlog? (The first copy has rows a second, too.)
pub fn is_backlog(figures: &Figures) -> bool {
    figures.contains_key("txns_per_s")
}

/// The medians, and with each how many rounds it is of (`rounds`), the least and the most of `rows_per_s`.
pub fn medians(records: &[Record]) -> Medians {
    let mut all: BTreeMap<(String, String, String), BTreeMap<String, Vec<f64>>> = BTreeMap::new();
    for record in records {
        let key = (record.work.clone(), record.shape.clone(), record.system.clone());
        let figures = all.entry(key).or_default();
        let mut take = |name: &str, value: f64| figures.entry(name.to_owned()).or_default().push(value);
        for (name, &value) in &record.values {
            take(name, value);
        }
        if let (Some(cpu), Some(&rows)) = (record.values.get("cpu_total"), record.values.get("rows"))
            && rows > 0.0
        {
            take(CPU_PER_MILLION, cpu / rows * 1e6);
        }
    }
    all.into_iter()
        .map(|(key, figures)| {
            let mut out = BTreeMap::new();
            for (name, mut values) in figures {
                values.sort_by(f64::total_cmp);
                out.insert("rounds".to_owned(), values.len() as f64);
                if name == "rows_per_s" {
                    out.insert("rows_per_s_min".to_owned(), values[0]);
                    out.insert("rows_per_s_max".to_owned(), values[values.len() - 1]);
                }
                let middle = (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0;
                out.insert(name, middle);
            }
            (key, out)
        })
        .collect()
}

/// A number as a table shows it.
pub fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 1e6 => format!("{:.2}M", value / 1e6),
        v if v >= 10_000.0 => format!("{:.0}k", value / 1e3),
        v if v >= 1_000.0 => format!("{:.1}k", value / 1e3),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Systems in the order of the table.
pub fn systems(medians: &Medians) -> Vec<String> {
    let order = [
        "anabranch-15",
        "native-15",
        "pglogical-15",
        "anabranch-18",
        "native-18",
    ];
    let has = |system: &&str| medians.keys().any(|key| key.2 == **system);
    order
        .iter()
        .filter(|system| has(system))
        .map(|&system| system.to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(round: usize, values: &[(&str, f64)]) -> Record {
        let values = values.iter().map(|&(name, value)| (name.to_owned(), value));
        Record {
            work: "insert-one".to_owned(),
            shape: "narrow".to_owned(),
            system: "native-15".to_owned(),
            round,
            values: values.collect(),
        }
    }

    /// The figures of rounds with these rates, rows and CPU seconds.
    fn figures(rounds: &[(f64, f64, f64)]) -> Figures {
        let records: Vec<Record> = rounds
            .iter()
            .enumerate()
            .map(|(round, &(rate, rows, cpu))| {
                record(round, &[("rows_per_s", rate), ("rows", rows), ("cpu_total", cpu)])
            })
            .collect();
        medians(&records).into_values().next().unwrap()
    }

    #[test]
    fn a_median_is_the_middle_one_or_between_the_two_in_the_middle() {
        let odd = figures(&[(30.0, 1e6, 1.0), (10.0, 1e6, 1.0), (11.0, 1e6, 1.0)]);
        assert_eq!((odd["rows_per_s"], odd["rounds"]), (11.0, 3.0));
        assert_eq!((odd["rows_per_s_min"], odd["rows_per_s_max"]), (10.0, 30.0));
        let even = figures(&[
            (40.0, 1e6, 1.0),
            (10.0, 1e6, 1.0),
            (20.0, 1e6, 1.0),
            (30.0, 1e6, 1.0),
        ]);
        assert_eq!(even["rows_per_s"], 25.0);
        assert_eq!(figures(&[(7.0, 1e6, 1.0)])["rows_per_s"], 7.0);
    }

    #[test]
    fn cpu_is_told_for_a_million_rows_of_each_round_whatever_its_size() {
        let found = figures(&[(1.0, 1e6, 4.0), (1.0, 5e5, 3.0), (1.0, 2e6, 10.0)]);
        assert_eq!(found[CPU_PER_MILLION], 5.0);
        assert!(!figures(&[(1.0, 0.0, 4.0)]).contains_key(CPU_PER_MILLION));
    }

    #[test]
    fn a_piece_takes_the_place_of_what_was_measured_before_it_and_single_commands_of_nothing() {
        let line = |round, rate, piece| Line {
            record: record(round, &[("rows_per_s", rate)]),
            machine: None,
            piece,
            scale: None,
            seconds: None,
        };
        let kept = |lines: Vec<Line>| -> Vec<f64> {
            let kept = latest(lines);
            kept.iter().map(|line| line.record.values["rows_per_s"]).collect()
        };
        let all = vec![
            line(0, 1.0, None),
            line(0, 2.0, Some(1)),
            line(1, 3.0, Some(1)),
            line(0, 4.0, Some(2)),
            line(0, 5.0, None),
            line(0, 6.0, None),
        ];
        assert_eq!(kept(all), [3.0, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn lines_come_back_as_they_were_appended_and_older_ones_say_less() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines.jsonl");
        let line = |piece| Line {
            record: record(1, &[("rows_per_s", 2.5)]),
            machine: None,
            piece,
            scale: None,
            seconds: None,
        };
        append(&path, &[line(Some(1_700_000_000_000)), line(None)]).unwrap();
        let sized = Line {
            scale: Some(0.3),
            seconds: Some(10.0),
            ..line(Some(3))
        };
        append(&path, &[sized]).unwrap();
        let back = read(&path).unwrap();
        let pieces: Vec<Option<u64>> = back.iter().map(|line| line.piece).collect();
        assert_eq!(pieces, [Some(1_700_000_000_000), None, Some(3)]);
        assert_eq!(back[0].record.values["rows_per_s"], 2.5);
        let sizes = back.iter().map(|line| (line.scale, line.seconds));
        let sizes: Vec<(Option<f64>, Option<f64>)> = sizes.collect();
        assert_eq!(sizes, [(None, None), (None, None), (Some(0.3), Some(10.0))]);
    }

    #[test]
    fn everybody_is_first_in_turn() {
        let first: Vec<char> = (0..3).map(|round| turns(&['a', 'b', 'c'], round)[0]).collect();
        assert_eq!(first, ['a', 'b', 'c']);
        assert_eq!(turns(&['a', 'b', 'c'], 4), ['b', 'c', 'a']);
        assert!(turns::<char>(&[], 1).is_empty());
    }
}
