//! The benchmark runs from end to end, at a size that says nothing about speed.

use std::process::Command;

/// What `anabranch-bench` writes with these arguments.
fn records(arguments: &[&str]) -> Vec<serde_json::Value> {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("records.jsonl");
    let output = Command::new(env!("CARGO_BIN_EXE_anabranch-bench"))
        .args(arguments)
        .arg("--json")
        .arg(&json)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let lines = std::fs::read_to_string(&json).unwrap();
    lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn figure(record: &serde_json::Value, name: &str) -> f64 {
    record["values"][name]
        .as_f64()
        .unwrap_or_else(|| panic!("no {name} in {record}"))
}

#[test]
fn a_tiny_backlog_is_measured_and_arrives_whole() {
    let records = records(&[
        "backlog",
        "--systems=anabranch-15,native-15",
        "--only=insert-500,update-one",
        "--shapes=narrow",
        "--rounds=1",
        "--scale=0.001",
    ]);
    assert_eq!(records.len(), 4);
    for record in records {
        assert!(figure(&record, "rows_per_s") > 0.0, "{record}");
        assert!(record["values"]["cpu_total"].is_number(), "{record}");
    }
}

#[test]
fn a_tiny_overhead_is_measured_with_and_without() {
    let arguments = ["overhead", "--systems=anabranch-15,native-15", "--rounds=1"];
    let records = records(&[&arguments[..], &["--scale=1", "--seconds=1"]].concat());
    assert_eq!(records.len(), 3);
    for record in records {
        assert!(figure(&record, "tps") > 0.0, "{record}");
    }
}

#[test]
fn a_little_writing_at_both_nodes_is_measured_and_collides() {
    let arguments = ["both", "--systems=anabranch-15", "--rounds=1"];
    let records = records(&[&arguments[..], &["--colliding=50", "--seconds=2"]].concat());
    assert_eq!(records.len(), 1);
    for name in ["commits_per_s", "drain_s", "conflicts"] {
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
    assert!(figure(&records(&arguments)[0], "updates_per_s") > 0.0);
    let arguments = ["large", "--systems=anabranch-15", "--rounds=1", "--rows=2000"];
    let large = records(&arguments).remove(0);
    assert!(
        figure(&large, "lag_s") > 0.0 && figure(&large, "arrived") > 0.0,
        "{large}"
    );
    let arguments = ["fan-out", "--peers=1", "--rows=2000"];
    assert!(figure(&records(&arguments)[0], "cpu_walsender") >= 0.0);
}

#[test]
fn a_tiny_first_copy_is_measured() {
    let records = records(&[
        "copy",
        "--systems=anabranch-15,native-15",
        "--rounds=1",
        "--rows=2000",
    ]);
    assert_eq!(records.len(), 2);
    for record in records {
        assert!(figure(&record, "rows_per_s") > 0.0, "{record}");
    }
}
