//! Scripts at their limits, where a process would die of them.

use std::collections::BTreeMap;

use anabranch_conflict::script::{Candidate, FailureKind, Script, Value};
use anabranch_proto::{NodeId, Stamp};
use uhlc::NTP64;

#[test]
fn the_deepest_script_fits_a_small_stack() {
    // As many expressions within each other as a function may have, or nearly, in calls within calls.
    let deep = 12;
    let nested = format!("{}down(n + 1){}", "(1 + ".repeat(deep), ")".repeat(deep));
    let text = format!(
        "fn down(n) {{ {nested} }} fn resolve(versions) {{ if versions[0].row?.c == 70 {{ down(0); }} 0 }}"
    );
    let run = move || {
        let script = Script::new("deep.rhai", &text).unwrap();
        let version = |time| Candidate {
            stamp: Stamp {
                time: NTP64(time),
                node: NodeId(1),
            },
            origin: "a".to_owned(),
            row: Some(BTreeMap::from([("c".to_owned(), Value::Integer(70))])),
        };
        let outcome = script.choose(&[version(1), version(2)]);
        outcome.failure.map(|failure| failure.kind)
    };
    // A worker of the daemon has two megabytes.
    let thread = std::thread::Builder::new()
        .stack_size(1 << 20)
        .spawn(run)
        .unwrap();
    assert_eq!(thread.join().unwrap(), Some(FailureKind::Limit));
}
