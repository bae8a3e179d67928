//! What was measured, as one line of JSON each, and the medians of it.

use std::collections::BTreeMap;
use std::fs::{File, read_to_string};
use std::io::Write as _;
use std::path::Path;

use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};

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

/// Appends records to a file, a line each.
pub fn append(path: &Path, records: &[Record]) -> std::io::Result<()> {
    let mut file = File::options().create(true).append(true).open(path)?;
    for record in records {
        writeln!(file, "{}", serde_json::to_string(record)?)?;
    }
    Ok(())
}

/// Reads such a file.
pub fn read(path: &Path) -> std::io::Result<Vec<Record>> {
    let text = read_to_string(path)?;
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    lines.map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// (work, shape, system) -> figure -> median over the rounds.
pub type Medians = BTreeMap<(String, String, String), BTreeMap<String, f64>>;

/// The medians, and with each how many rounds it is of (`rounds`), the least and the most of `rows_per_s`.
pub fn medians(records: &[Record]) -> Medians {
    let mut all: BTreeMap<(String, String, String), BTreeMap<String, Vec<f64>>> = BTreeMap::new();
    for record in records {
        let key = (record.work.clone(), record.shape.clone(), record.system.clone());
        let figures = all.entry(key).or_default();
        for (name, &value) in &record.values {
            figures.entry(name.clone()).or_default().push(value);
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

/// Backlog: rate, ratio to native of the same version, CPU per million rows, memory.
pub fn backlog_table(medians: &Medians) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "work",
        "rows",
        "system",
        "rows/s",
        "min..max",
        "txn/s",
        "of native-15",
        "of native-18",
        "CPU s per 1M rows",
        "walsender",
        "apply",
        "echo",
        "daemons",
        "daemon MiB",
    ]);
    for at in 3..14 {
        if let Some(column) = table.column_mut(at) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let systems = systems(medians);
    let mut jobs: Vec<(String, String)> = Vec::new();
    for key in medians.keys() {
        let job = (key.0.clone(), key.1.clone());
        if medians[key].contains_key("rows_per_s") && !jobs.contains(&job) {
            jobs.push(job);
        }
    }
    for (work, shape) in jobs {
        let of = |system: &str| medians.get(&(work.clone(), shape.clone(), system.to_owned()));
        let rate = |system: &str| of(system).and_then(|figures| figures.get("rows_per_s").copied());
        for system in &systems {
            let Some(figures) = of(system) else { continue };
            let get = |name: &str| figures.get(name).copied().unwrap_or(0.0);
            let ratio = |to: &str| match rate(to) {
                Some(to) if to > 0.0 => format!("{:.2}x", get("rows_per_s") / to),
                _ => "-".to_owned(),
            };
            let per_million = |name: &str| short(get(name) / get("rows") * 1e6);
            table.add_row([
                work.clone(),
                shape.clone(),
                system.clone(),
                short(get("rows_per_s")),
                format!(
                    "{}..{}",
                    short(get("rows_per_s_min")),
                    short(get("rows_per_s_max"))
                ),
                short(get("txns_per_s")),
                ratio("native-15"),
                ratio("native-18"),
                per_million("cpu_total"),
                per_million("cpu_walsender"),
                per_million("cpu_apply"),
                per_million("cpu_echo_walsender"),
                short((get("cpu_source_daemon") + get("cpu_target_daemon")) / get("rows") * 1e6),
                format!("{:.0}+{:.0}", get("mib_source_daemon"), get("mib_target_daemon")),
            ]);
        }
    }
    table
}

/// Everything else: every figure of every system, one row each.
pub fn figures_table(medians: &Medians) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["work", "shape", "system", "figure", "median"]);
    for ((work, shape, system), figures) in medians {
        if figures.contains_key("rows_per_s") {
            continue;
        }
        for (name, value) in figures {
            table.add_row([work, shape, system, name, &short(*value)]);
        }
    }
    table
}
