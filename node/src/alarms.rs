//! The names of all alarms: what `anabranch status` shows, monitoring systems are told, and `docs/alarms.md` explains.
//!
//! Holds: the list alone
//! Invariants: a name is never given another meaning, and never dropped silently: people's rules are written by it
//! Not here: the alarms that stand ([`crate::shared::Alarms`]), who raises them

/// Every name. `N` stands for a node's id: there may be one such alarm for each node.
pub const NAMES: [&str; 33] = [
    "apply",
    "clock_ahead_N",
    "conflict_storm",
    "ddl_N",
    "ddl_conflict",
    "decoding",
    "decoding_stands",
    "drift",
    "dropped",
    "foreign_keys",
    "horizon",
    "joining",
    "journal",
    "journal_damaged",
    "leaving",
    "merge_groups",
    "metrics",
    "orphans",
    "other_table",
    "policy_file",
    "privileges",
    "publication",
    "publication_file",
    "quarantine",
    "sequences",
    "server",
    "server_clock",
    "settled",
    "triggers",
    "two_primaries",
    "unique_keys",
    "web",
    "witness",
];

/// Is `name` one of [`NAMES`], with a node's id for `N`?
#[must_use]
pub fn is_known(name: &str) -> bool {
    NAMES.iter().any(|known| match known.strip_suffix('N') {
        Some(family) => name
            .strip_prefix(family)
            .is_some_and(|id| id.parse::<u16>().is_ok()),
        None => name == *known,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    const PAGE: &str = include_str!("../../docs/alarms.md");

    /// String constants that a file gives to alarms: `raise("x"`, `const ALARM: &str = "x"`, `format!("x_{`.
    fn named_in(text: &str) -> Vec<String> {
        let mut found = Vec::new();
        for (before, family) in [
            (".raise(\"", false),
            (".clear(\"", false),
            ("const ALARM: &str = \"", false),
            ("format!(\"ddl_{", true),
            ("format!(\"clock_ahead_{", true),
        ] {
            let rests = text
                .match_indices(before)
                .map(|(at, _)| &text[at + before.len()..]);
            found.extend(rests.map(|rest| match family {
                true => {
                    let name = before.trim_start_matches("format!(\"").trim_end_matches('{');
                    format!("{name}N")
                }
                false => rest.split('"').next().unwrap().to_owned(),
            }));
        }
        found
    }

    fn read(folder: &Path, into: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(&path, into);
            } else if path.extension().is_some_and(|ext| ext == "rs") && !path.ends_with("alarms.rs") {
                into.push(std::fs::read_to_string(path).unwrap());
            }
        }
    }

    #[test]
    fn the_names_are_those_that_the_code_raises() {
        let mut texts = Vec::new();
        read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut texts);
        let raised: BTreeSet<String> = texts.iter().flat_map(|text| named_in(text)).collect();
        let listed: BTreeSet<String> = NAMES.map(str::to_owned).into();
        assert_eq!(raised, listed);
    }

    #[test]
    fn the_page_has_a_section_for_every_name_and_no_other() {
        let headings = PAGE.lines().filter_map(|line| line.strip_prefix("## `"));
        let sections: Vec<&str> = headings.map(|rest| rest.trim_end_matches('`')).collect();
        assert_eq!(sections, NAMES, "docs/alarms.md, in the order of the alphabet");
    }

    #[test]
    fn a_family_has_an_alarm_for_each_node_and_nothing_else() {
        for name in ["ddl_1", "clock_ahead_65535", "journal"] {
            assert!(is_known(name), "{name}");
        }
        for name in ["ddl_", "ddl_x", "ddl_70000", "journals", "clock"] {
            assert!(!is_known(name), "{name}");
        }
    }
}
