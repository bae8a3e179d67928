//! The benchmark runs from end to end, at a size that says nothing about speed.

use std::path::Path;
use std::process::Command;

/// What `anabranch-bench` prints with these arguments.
fn bench(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_anabranch-bench"))
        .args(arguments)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).unwrap()
}

/// What it writes to a file with these arguments.
fn records_in(json: &Path, arguments: &[&str]) -> Vec<serde_json::Value> {
    bench(&[arguments, &["--json", json.to_str().unwrap()]].concat());
    let lines = std::fs::read_to_string(json).unwrap();
    lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn records(arguments: &[&str]) -> Vec<serde_json::Value> {
    let dir = tempfile::tempdir().unwrap();
    records_in(&dir.path().join("records.jsonl"), arguments)
}

fn figure(record: &serde_json::Value, name: &str) -> f64 {
    record["values"][name]
        .as_f64()
        .unwrap_or_else(|| panic!("no {name} in {record}"))
}

#[test]
fn a_tiny_backlog_is_measured_arrives_whole_and_is_reported_and_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("records.jsonl");
    let arguments = [
        "backlog",
        "--systems=anabranch-15,native-15",
        "--only=insert-500,update-one",
        "--shapes=narrow",
        "--rounds=1",
        "--scale=0.001",
    ];
    let records = records_in(&json, &arguments);
    assert_eq!(records.len(), 4);
    for record in records {
        assert!(figure(&record, "rows_per_s") > 0.0, "{record}");
        assert!(record["values"]["cpu_total"].is_number(), "{record}");
        assert!(record["machine"]["cores"].as_u64().unwrap() > 0, "{record}");
    }
    let svg = dir.path().join("bars.svg");
    let table = bench(&["report", json.to_str().unwrap(), "--svg", svg.to_str().unwrap()]);
    assert!(
        table.contains("Measured on: ") && table.contains("at least 1.5 of native-15"),
        "{table}"
    );
    let drawn = std::fs::read_to_string(svg).unwrap();
    assert_eq!(drawn.matches("<rect x=").count(), 4, "{drawn}");
}

#[test]
fn a_short_lag_is_measured_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("records.jsonl");
    let arguments = ["lag", "--systems=anabranch-15,native-15", "--rounds=1"];
    let records = records_in(&json, &[&arguments[..], &["--rates=200", "--seconds=1"]].concat());
    assert_eq!(records.len(), 2);
    for record in &records {
        assert!(figure(record, "commits_per_s") > 0.0, "{record}");
        assert!(figure(record, "p50_ms") <= figure(record, "p99_ms"), "{record}");
        assert!(figure(record, "p99_ms") <= figure(record, "max_ms"), "{record}");
    }
    let report = bench(&["report", "--output=json", json.to_str().unwrap()]);
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["machines"].as_array().unwrap().len(), 1, "{report}");
    let ours = &report["medians"][0];
    let p50 = &ours["figures"]["p50_ms"];
    assert_eq!(
        (&ours["system"], &p50["bars"][0]["bar"]),
        (&"anabranch-15".into(), &"at most 1".into())
    );
    assert!(
        p50["bars"][0]["met"].is_boolean() && p50["ratios"]["native-15"].is_number(),
        "{report}"
    );
}

#[test]
fn a_tiny_overhead_is_measured_with_and_without() {
    let arguments = ["overhead", "--systems=anabranch-15,native-15", "--rounds=1"];
    let records = records(&[&arguments[..], &["--scale=1", "--seconds=1"]].concat());
    assert_eq!(records.len(), 3);
    for record in records {
        assert!(figure(&record, "tps") > 0.0, "{record}");
        let drained = record["values"]["drain_s"].is_number();
        assert_eq!(drained, record["system"] != "alone", "{record}");
    }
}

#[test]
fn a_little_writing_at_both_nodes_is_measured_and_collides() {
    let arguments = ["both", "--systems=anabranch-15", "--rounds=1"];
    let records = records(&[&arguments[..], &["--colliding=50", "--seconds=2"]].concat());
    assert_eq!(records.len(), 1);
    for name in [
        "commits_per_s",
        "drain_s",
        "conflicts",
        "conflicts_percent",
        "aimed_percent",
    ] {
        assert!(figure(&records[0], name) > 0.0, "{}", records[0]);
    }
}

#[test]
fn a_short_absence_a_small_large_transaction_and_one_peer_are_measured() {
    let arguments = [
        "catch-up",
        "--systems=anabranch-15",
        "--rounds=1",
        "--updates=2000",
    ];
    let away = records(&arguments).remove(0);
    for name in [
        "updates_per_s",
        "mib_source_daemon",
        "mib_target_daemon",
        "journal_mib_source_away",
    ] {
        assert!(figure(&away, name) > 0.0, "no {name}: {away}");
    }
    let arguments = ["large", "--systems=anabranch-15", "--rounds=2", "--rows=2000"];
    let mut rounds = records(&arguments);
    assert_eq!(rounds.len(), 2);
    let large = rounds.remove(1);
    assert_eq!(large["round"], 1);
    assert!(
        figure(&large, "lag_s") > 0.0 && figure(&large, "arrived") > 0.0,
        "{large}"
    );
    let arguments = ["fan-out", "--peers=1", "--rows=20000", "--rounds=1"];
    let fan_out = records(&arguments).remove(0);
    for name in ["cpu_walsender", "cpu_source_daemon", "mib_source_daemon"] {
        assert!(figure(&fan_out, name) > 0.0, "no {name}: {fan_out}");
    }
}

#[test]
fn a_run_of_everything_measures_only_what_its_file_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("records.jsonl");
    let svg = dir.path().join("bars.svg");
    let run = |systems: &str| {
        let svg = format!("--svg={}", svg.to_str().unwrap());
        let arguments = [
            "all",
            "--only=copy",
            "--rounds=1",
            "--scale=0.0004",
            &svg,
            systems,
        ];
        records_in(&json, &arguments)
    };
    let first = run("--systems=anabranch-15");
    assert_eq!(first.len(), 1);
    let both = run("--systems=anabranch-15,native-18");
    assert_eq!(both.len(), 2);
    assert_eq!(both[0], first[0]);
    assert_eq!(
        (&both[1]["work"], &both[1]["system"]),
        (&"first-copy-2000".into(), &"native-18".into())
    );
    for record in both {
        assert!(figure(&record, "rows_per_s") > 0.0, "{record}");
    }
    assert!(svg.exists());
}
