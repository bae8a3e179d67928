//! What the nodes' tables have in common, and whether the nodes can be compared at all.
//!
//! In:   what each node says of itself and its tables            Out: tables to compare, what differs of them, what stands in the way
//! Not here: their rows ([`super::run`])

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::NodeId;
use anabranch_proto::link as pb;
use anabranch_proto::schema::{full_name, name_fits, split_name};

use super::TableReport;
use super::run::Table;
use super::talk::Talk;

/// Why these nodes cannot be compared.
pub(super) fn unfit(talks: &[Talk], opened: &[pb::VerifyOpened]) -> Vec<String> {
    let mut problems = Vec::new();
    let Some(first) = opened.first() else {
        return problems;
    };
    let mut ids: Vec<u32> = talks.iter().map(|talk| u32::from(talk.id.0)).collect();
    ids.sort_unstable();
    for (talk, opened) in talks.iter().zip(opened) {
        let name = &talk.name;
        if opened.members != ids || opened.dropped != first.dropped {
            let named: Vec<String> = opened
                .members
                .iter()
                .map(|id| NodeId(u16::try_from(*id).unwrap_or(0)).to_string())
                .collect();
            problems.push(format!(
                "node {name} knows other members ({}): a join or a drop is under way; wait until it is done",
                named.join(", ")
            ));
        }
        if opened.encoding != first.encoding {
            problems.push(format!(
                "node {name} has encoding {}, another {}: their texts cannot be hashed alike",
                opened.encoding, first.encoding
            ));
        }
        if opened.probe != first.probe {
            problems.push(format!(
                "the server of node {name} hashes otherwise than another: machines of different byte order cannot be compared"
            ));
        }
    }
    problems
}

/// How two nodes' tables differ.
pub(super) fn same_columns(right: &pb::VerifyTable, other: &pb::VerifyTable) -> Vec<String> {
    let mut said = Vec::new();
    if right.key != other.key {
        let (key, there) = (right.key.join(", "), other.key.join(", "));
        said.push(format!("its key is ({key}) here and ({there}) there"));
    }
    let types = |table: &pb::VerifyTable| -> BTreeMap<String, String> {
        table
            .columns
            .iter()
            .cloned()
            .zip(table.types.iter().cloned())
            .collect()
    };
    let (here, there) = (types(right), types(other));
    for (name, is) in &here {
        match there.get(name) {
            None => said.push(format!("column {name} is not there")),
            Some(other) if other != is => said.push(format!("column {name} is {is} here and {other} there")),
            Some(_) => {}
        }
    }
    for name in there.keys().filter(|name| !here.contains_key(*name)) {
        said.push(format!("column {name} is only there"));
    }
    said
}

pub(super) type Names = BTreeSet<(String, String)>;

/// Tables that the patterns choose, and patterns that choose none.
pub(super) fn chosen(patterns: &[String], opened: &[pb::VerifyOpened]) -> (Names, Vec<String>) {
    let tables = opened.iter().flat_map(|opened| &opened.tables);
    let tables: Names = tables
        .map(|table| (table.schema.clone(), table.name.clone()))
        .collect();
    if patterns.is_empty() {
        return (tables, Vec::new());
    }
    let fits = |pattern: &str, schema: &str, name: &str| match split_name(pattern) {
        (Some(of_schema), of_name) => name_fits(&of_schema, schema) && name_fits(&of_name, name),
        (None, of_name) => name_fits(&of_name, name),
    };
    let unknown = patterns
        .iter()
        .filter(|pattern| !tables.iter().any(|(schema, name)| fits(pattern, schema, name)))
        .cloned()
        .collect();
    let tables = tables
        .into_iter()
        .filter(|(schema, name)| patterns.iter().any(|pattern| fits(pattern, schema, name)));
    (tables.collect(), unknown)
}

/// A table as it can be compared, and its report with what of it differs already.
pub(super) fn shape(
    talks: &[Talk],
    opened: &[pb::VerifyOpened],
    schema: &str,
    name: &str,
) -> (Option<Table>, TableReport) {
    let mut report = TableReport {
        table: full_name(schema, name),
        ..TableReport::default()
    };
    let said = &mut report.shape;
    let mut here: Vec<(&str, &pb::VerifyTable)> = Vec::new();
    for (talk, opened) in talks.iter().zip(opened) {
        let mut tables = opened.tables.iter();
        match tables.find(|table| table.schema == schema && table.name == name) {
            Some(table) if table.problem.is_empty() => here.push((&talk.name, table)),
            Some(table) => said.push(format!("at node {}: {}", talk.name, table.problem)),
            None => said.push(format!("node {} does not replicate it", talk.name)),
        }
    }
    let Some((first_name, first)) = here.first().copied().filter(|_| said.is_empty()) else {
        return (None, report);
    };
    for (name, table) in &here {
        if table.key != first.key {
            said.push(format!(
                "its key is ({}) at node {first_name} and ({}) at node {name}",
                first.key.join(", "),
                table.key.join(", ")
            ));
        }
    }
    if !said.is_empty() {
        return (None, report);
    }
    let all: BTreeSet<&String> = here.iter().flat_map(|(_, table)| &table.columns).collect();
    let (mut columns, mut rows) = (Vec::new(), 0);
    for column in all {
        let without = here.iter().filter(|(_, table)| !table.columns.contains(column));
        let without: Vec<&str> = without.map(|(name, _)| *name).collect();
        if without.is_empty() {
            report.types.extend(other_types(column, &here));
            columns.push(column.clone());
        } else {
            said.push(format!(
                "column {column} is not there at node {}",
                without.join(", ")
            ));
        }
    }
    for (_, table) in &here {
        rows = rows.max(table.rows);
    }
    let table = Table {
        schema: schema.to_owned(),
        name: name.to_owned(),
        columns,
        rows,
    };
    (Some(table), report)
}

/// Nodes where a column is of another type than at the first, or of another length or precision: there a row that comes is not what it was.
fn other_types(column: &str, here: &[(&str, &pb::VerifyTable)]) -> Vec<String> {
    let type_of = |table: &pb::VerifyTable| {
        let at = table.columns.iter().position(|name| name == column)?;
        Some((table.types.get(at)?.clone(), table.type_mods.get(at).copied()))
    };
    let mut types = here
        .iter()
        .filter_map(|(node, table)| Some((node, type_of(table)?)));
    let Some((first_node, (first, first_mod))) = types.next() else {
        return Vec::new();
    };
    let differs = types.filter_map(|(node, (other, other_mod))| {
        if other != first {
            return Some(format!(
                "column {column} is {first} at node {first_node} and {other} at node {node}"
            ));
        }
        let is_same = first_mod.zip(other_mod).is_none_or(|(first, other)| first == other);
        (!is_same).then(|| {
            format!(
                "column {column} has another length or precision at node {node} than at node {first_node} ({first})"
            )
        })
    });
    differs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(tables: &[(&str, &[&str])]) -> pb::VerifyOpened {
        let tables = tables.iter().map(|(name, columns)| pb::VerifyTable {
            schema: "public".to_owned(),
            name: (*name).to_owned(),
            columns: columns.iter().map(|&column| column.to_owned()).collect(),
            types: columns.iter().map(|_| "pg_catalog.int4".to_owned()).collect(),
            key: vec!["id".to_owned()],
            rows: 1,
            ..pb::VerifyTable::default()
        });
        pb::VerifyOpened {
            tables: tables.collect(),
            ..pb::VerifyOpened::default()
        }
    }

    #[test]
    fn every_way_in_which_two_tables_differ_is_said() {
        let one = opened(&[("item", &["id", "a", "b"])]).tables.remove(0);
        assert_eq!(same_columns(&one, &one), Vec::<String>::new());
        let mut other = opened(&[("item", &["id", "b", "c"])]).tables.remove(0);
        other.types[1] = "pg_catalog.text".to_owned();
        other.key = vec!["b".to_owned()];
        let expected = [
            "its key is (id) here and (b) there",
            "column a is not there",
            "column b is pg_catalog.int4 here and pg_catalog.text there",
            "column c is only there",
        ];
        assert_eq!(same_columns(&one, &other), expected);
    }

    #[test]
    fn another_type_or_precision_is_told_where_it_is_known() {
        let table = |type_name: &str, type_mods: &[i32]| pb::VerifyTable {
            types: vec!["pg_catalog.int4".to_owned(), type_name.to_owned()],
            type_mods: type_mods.to_vec(),
            ..opened(&[("item", &["id", "n"])]).tables.remove(0)
        };
        let one = table("pg_catalog.numeric", &[-1, 655_366]);
        let said = |other: &pb::VerifyTable| other_types("n", &[("a", &one), ("b", &one), ("c", other)]);
        assert_eq!(said(&one), Vec::<String>::new());
        assert_eq!(said(&table("pg_catalog.numeric", &[])), Vec::<String>::new());
        assert_eq!(
            said(&table("pg_catalog.numeric", &[-1, 655_368])),
            ["column n has another length or precision at node c than at node a (pg_catalog.numeric)"]
        );
        assert_eq!(
            said(&table("pg_catalog.text", &[-1, -1])),
            ["column n is pg_catalog.numeric at node a and pg_catalog.text at node c"]
        );
    }

    #[test]
    fn tables_are_chosen_by_name_or_pattern() {
        let opened = [
            opened(&[("item", &["id"]), ("part", &["id"])]),
            opened(&[("extra", &["id"])]),
        ];
        let names = |patterns: &[&str]| {
            let patterns: Vec<String> = patterns.iter().map(|&text| text.to_owned()).collect();
            let (tables, unknown) = chosen(&patterns, &opened);
            let tables: Vec<String> = tables.into_iter().map(|(_, name)| name).collect();
            (tables.join(" "), unknown.join(" "))
        };
        assert_eq!(names(&[]), ("extra item part".to_owned(), String::new()));
        assert_eq!(
            names(&["item", "public.p*"]),
            ("item part".to_owned(), String::new())
        );
        assert_eq!(
            names(&["other.*", "nix"]),
            (String::new(), "other.* nix".to_owned())
        );
    }
}
