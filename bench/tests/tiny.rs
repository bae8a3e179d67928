//! The benchmark runs from end to end, at a size that says nothing about speed.

use std::process::Command;

#[test]
fn a_tiny_backlog_is_measured_and_arrives_whole() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("records.jsonl");
    let output = Command::new(env!("CARGO_BIN_EXE_anabranch-bench"))
        .args([
            "backlog",
            "--systems=anabranch-15,native-15",
            "--only=insert-500,update-one",
        ])
        .args(["--shapes=narrow", "--rounds=1", "--scale=0.001", "--json"])
        .arg(&json)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let records: Vec<serde_json::Value> = std::fs::read_to_string(&json)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(records.len(), 4, "{said}");
    for record in records {
        assert!(record["values"]["rows_per_s"].as_f64().unwrap() > 0.0, "{record}");
        assert!(record["values"]["cpu_total"].is_number(), "{record}");
    }
}
