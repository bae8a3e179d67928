//! Medians, ratios and bars, as tables and as JSON.

use std::collections::BTreeSet;

use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use crate::bars::{native_of, ratio, verdicts};
use crate::machine::Machine;
use crate::results::{CPU_PER_MILLION, Key, Medians, is_backlog, short, systems};

/// A ratio as a table shows it.
fn times(ratio: Option<f64>) -> String {
    ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}x"))
}

/// All bars of a figure, as a table shows them.
fn bars(medians: &Medians, key: &Key, figure: &str) -> String {
    let all: Vec<String> = verdicts(medians, key, figure)
        .iter()
        .map(ToString::to_string)
        .collect();
    all.join("; ")
}

/// The ratio of a figure to native's of the same version; nothing for native itself.
fn of_native(medians: &Medians, key: &Key, figure: &str) -> Option<f64> {
    let native = native_of(&key.2).filter(|native| *native != key.2)?;
    ratio(medians, key, figure, native)
}

/// Backlog: rate, ratio to native, CPU per million rows, memory, bars.
pub fn backlog_table(medians: &Medians) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    let header = [
        "work",
        "rows",
        "system",
        "rows/s",
        "min..max",
        "txn/s",
        "of native-15",
        "of native-18",
        "bar",
        "CPU s per 1M rows",
        "of native",
        "bar",
        "walsender",
        "apply",
        "echo",
        "daemons",
        "daemon MiB",
    ];
    table.set_header(header);
    for at in 3..header.len() {
        if let Some(column) = table.column_mut(at) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let systems = systems(medians);
    let mut jobs: Vec<(&String, &String)> = medians
        .iter()
        .filter(|(_, figures)| is_backlog(figures))
        .map(|(key, _)| (&key.0, &key.1))
        .collect();
    jobs.dedup();
    for (work, shape) in jobs {
        for system in &systems {
            let key = (work.clone(), shape.clone(), system.clone());
            let Some(figures) = medians.get(&key) else {
                continue;
            };
            let get = |name: &str| figures.get(name).copied().unwrap_or(0.0);
            let per_million = |cpu: f64| short(cpu / get("rows").max(1.0) * 1e6);
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
                times(ratio(medians, &key, "rows_per_s", "native-15")),
                times(ratio(medians, &key, "rows_per_s", "native-18")),
                bars(medians, &key, "rows_per_s"),
                short(get(CPU_PER_MILLION)),
                times(of_native(medians, &key, CPU_PER_MILLION)),
                bars(medians, &key, CPU_PER_MILLION),
                per_million(get("cpu_walsender")),
                per_million(get("cpu_apply")),
                per_million(get("cpu_echo_walsender")),
                per_million(get("cpu_source_daemon") + get("cpu_target_daemon")),
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
    table.set_header(["work", "shape", "system", "figure", "median", "of native", "bar"]);
    for (key, figures) in medians.iter().filter(|(_, figures)| !is_backlog(figures)) {
        for (name, value) in figures {
            table.add_row([
                key.0.clone(),
                key.1.clone(),
                key.2.clone(),
                name.clone(),
                short(*value),
                times(of_native(medians, key, name)),
                bars(medians, key, name),
            ]);
        }
    }
    table
}

/// The same for programs: `machines`, and `medians` with the `ratios` of each figure and its `bars`.
pub fn json(machines: &BTreeSet<&Machine>, medians: &Medians) -> Value {
    let all: Vec<Value> = medians
        .iter()
        .map(|(key, figures)| {
            let figures: serde_json::Map<String, Value> = figures
                .iter()
                .map(|(name, value)| (name.clone(), figure(medians, key, name, *value)))
                .collect();
            json!({"work": key.0, "shape": key.1, "system": key.2, "figures": figures})
        })
        .collect();
    json!({"machines": machines, "medians": all})
}

fn figure(medians: &Medians, key: &Key, name: &str, median: f64) -> Value {
    let bars: Vec<Value> = verdicts(medians, key, name)
        .into_iter()
        .map(|verdict| json!({"bar": verdict.bar, "value": verdict.value, "met": verdict.met}))
        .collect();
    let ratios: serde_json::Map<String, Value> = ["native-15", "native-18"]
        .into_iter()
        .filter(|native| *native != key.2)
        .filter_map(|native| Some((native.to_owned(), json!(ratio(medians, key, name, native)?))))
        .collect();
    json!({"median": median, "ratios": ratios, "bars": bars})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{Record, medians};

    fn record(work: &str, system: &str, values: &[(&str, f64)]) -> Record {
        Record {
            work: work.to_owned(),
            shape: "narrow".to_owned(),
            system: system.to_owned(),
            round: 0,
            values: values
                .iter()
                .map(|&(name, value)| (name.to_owned(), value))
                .collect(),
        }
    }

    #[test]
    fn a_copy_is_no_backlog_and_costs_are_compared() {
        let backlog = |cpu| {
            [
                ("rows_per_s", 100.0),
                ("txns_per_s", 1.0),
                ("rows", 2e6),
                ("cpu_total", cpu),
            ]
        };
        let copy = [("rows_per_s", 50.0), ("seconds", 2.0)];
        let records = [
            record("insert-500", "anabranch-15", &backlog(40.0)),
            record("insert-500", "native-15", &backlog(20.0)),
            record("first-copy-9", "anabranch-15", &copy),
        ];
        let medians = medians(&records);
        let table = backlog_table(&medians).to_string();
        assert!(
            table.contains("2.00x") && !table.contains("first-copy") && !table.contains("NaN"),
            "{table}"
        );
        assert!(table.contains("at most 1.5 of native-15: not met"), "{table}");
        assert!(figures_table(&medians).to_string().contains("first-copy-9"));
        let json = json(&BTreeSet::new(), &medians);
        let ours = &json["medians"][1];
        assert_eq!(ours["system"], "anabranch-15");
        let cpu = &ours["figures"][CPU_PER_MILLION];
        assert_eq!(
            (&cpu["median"], &cpu["ratios"]["native-15"]),
            (&json!(20.0), &json!(2.0))
        );
        assert_eq!(cpu["bars"][0]["met"], false);
    }
}
