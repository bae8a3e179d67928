//! Every key is in `docs/configuration.md`, and nothing else is.

use std::collections::BTreeSet;

use toml::Value;

use super::Config;

const PAGE: &str = include_str!("../../../docs/configuration.md");

/// Names of all keys, with dots; of a list of tables those of its first.
fn keys(value: &Value, name: &str, into: &mut BTreeSet<String>) {
    match value {
        Value::Table(table) => {
            for (key, value) in table {
                let name = if name.is_empty() {
                    key.clone()
                } else {
                    format!("{name}.{key}")
                };
                keys(value, &name, into);
            }
        }
        Value::Array(list) if list.first().is_some_and(Value::is_table) => keys(&list[0], name, into),
        _ => {
            into.insert(name.to_owned());
        }
    }
}

#[test]
fn every_key_has_a_row_and_every_row_is_a_key() {
    let mut known = BTreeSet::new();
    keys(&Value::try_from(Config::example()).unwrap(), "", &mut known);
    let rows = PAGE.lines().filter_map(|line| line.strip_prefix("| `"));
    let documented: BTreeSet<String> = rows
        .filter_map(|row| row.split(" |").next())
        .flat_map(|cell| cell.split(", "))
        .map(|key| key.trim_matches('`').to_owned())
        .collect();
    assert_eq!(known, documented);
}
