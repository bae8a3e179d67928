//! Plain DDL that travels by itself: event triggers in the database, made by `init` where `ddl.capture` asks for them.
//!
//! In:   [`Facts`], the configuration      Out: SQL for the stage of [`super::ddl`], findings
//! Invariants: 1. what travels is the text of one statement that one of `ddl.roles` has run here by itself, never a guess at a piece of
//!             one; what cannot be told so fails where it is run; 2. whoever is none of these is never refused anything by it;
//!             3. what Anabranch does itself is passed by
//! Not here: what a statement must fulfil, and how it travels ([`super::ddl`])
//!
//! Each event has two triggers, which fire in the order of their names. The first runs as whoever says the statement, and notes who
//! that is and under which `search_path`; the second is SECURITY DEFINER, as the functions behind `replicate_ddl` are, so it needs no
//! rights of the session's. What was before a statement is kept for what comes behind it in settings of the transaction. A session can
//! write these, and gains nothing: the first trigger writes them anew, and who may run DDL as a role is asked again where it is noted.
//!
//! The server tells an event trigger the whole string that the client sent. It is the statement's own text if that is the only one in
//! it (`anabranch.statements`) and nothing ran the statement in its course: then the call stack (`PG_CONTEXT`) has one line.

use super::ddl::{CONCURRENTLY, any, covers, like};
use super::facts::Facts;
use super::finding::Finding;
use super::pattern::Patterns;
use super::sql::{fill, literal};
use crate::config::Config;

const OBJECTS: &str = include_str!("plain_ddl.sql");

/// Names of the event triggers. They are in no schema, so every dump of the database has them.
pub(crate) const TRIGGERS: [&str; 6] = [
    "anabranch_capture_1_start",
    "anabranch_capture_2_start",
    "anabranch_capture_1_drop",
    "anabranch_capture_2_drop",
    "anabranch_capture_1_end",
    "anabranch_capture_2_end",
];

const FUNCTIONS: [&str; 5] = [
    "capture_who()",
    "capture()",
    "capture_schema(name)",
    "capture_relations()",
    "capture_ddl(text, text, name, boolean)",
];

/// One of these event triggers, as the catalog has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trigger {
    /// Its name.
    pub name: String,
    /// When it fires (`pg_event_trigger.evtenabled`): `D` never, `R` in replica sessions only.
    pub enabled: String,
}

impl Trigger {
    /// Does it fire in ordinary sessions?
    fn fires(&self) -> bool {
        !matches!(self.enabled.as_str(), "D" | "R")
    }
}

/// Are all of them there?
pub(super) const fn is_made(facts: &Facts) -> bool {
    facts.ours.ddl.capture.len() == TRIGGERS.len()
}

/// Is there what the configuration asks for: all of them, or none?
pub(super) fn is_as_wanted(facts: &Facts, config: &Config) -> bool {
    if config.ddl.capture {
        is_made(facts)
    } else {
        facts.ours.ddl.capture.is_empty()
    }
}

/// Those that somebody has switched off.
pub(super) fn disabled(facts: &Facts, config: &Config) -> Option<Finding> {
    let off: Vec<&Trigger> = facts
        .ours
        .ddl
        .capture
        .iter()
        .filter(|trigger| !trigger.fires())
        .collect();
    let first = off.first().filter(|_| config.ddl.capture)?;
    Some(Finding::warn(
        "ddl.capture",
        format!(
            "{} event trigger(s) are disabled: plain DDL stays at this node, or fails",
            off.len()
        ),
        format!(
            "as a superuser: ALTER EVENT TRIGGER {} ENABLE, and so on; or ddl.capture = false, and `anabranch init`",
            first.name
        ),
    ))
}

/// For `doctor`: is plain DDL captured, and is it to be?
pub(super) fn examine(facts: &Facts, config: &Config) -> Option<Finding> {
    if !is_as_wanted(facts, config) {
        let found = if config.ddl.capture {
            "the event triggers are not there: plain DDL stays at this node"
        } else {
            "is false, and event triggers that capture plain DDL are there"
        };
        let remedy = "run `anabranch init`, as a superuser";
        return Some(Finding::warn("ddl.capture", found, remedy));
    }
    disabled(facts, config).or_else(|| {
        config.ddl.capture.then(|| {
            let found = format!("plain DDL of {} travels", config.ddl.roles.join(", "));
            Finding::ok("ddl.capture", found)
        })
    })
}

/// Makes functions and event triggers; the functions of [`super::ddl`] must be there.
pub(super) fn script(daemon: &str, roles: &[String], patterns: &Patterns) -> String {
    let roles: Vec<String> = roles.iter().map(|role| literal(role)).collect();
    let schemas = |exclude: bool| {
        any(patterns
            .iter()
            // One that excludes single tables leaves the rest of its schema in.
            .filter(|pattern| pattern.exclude == exclude && (!exclude || pattern.table == "*"))
            .map(|pattern| format!("n.nspname LIKE {}", like(&pattern.schema))))
    };
    let places: [(&str, &str); 7] = [
        ("@ROLES@", &format!("ARRAY[{}]::name[]", roles.join(", "))),
        ("@INCLUDED@", &covers(patterns, false)),
        ("@EXCLUDED@", &covers(patterns, true)),
        ("@INCLUDED_SCHEMAS@", &schemas(false)),
        ("@EXCLUDED_SCHEMAS@", &schemas(true)),
        // In a string with escapes: how others are read is the session's matter.
        ("@CONCURRENTLY@", &CONCURRENTLY.replace('\\', "\\\\")),
        ("@DAEMON@", &literal(daemon)),
    ];
    fill(OBJECTS, &places).trim_end().to_owned()
}

/// The statements that take it all away, the triggers first.
pub(super) fn remove() -> String {
    let triggers = TRIGGERS.map(|name| format!("DROP EVENT TRIGGER IF EXISTS {name};"));
    let functions = FUNCTIONS.map(|name| format!("DROP FUNCTION IF EXISTS anabranch.{name};"));
    [triggers.as_slice(), functions.as_slice()].concat().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_is_taken_away_again() {
        let patterns = ["public.*", "shop.a_b", "!public.log", "!shop_old.*"].map(str::to_owned);
        let patterns = Patterns::parse(&patterns).unwrap();
        let sql = script("it's", &["app".to_owned(), "Shop Owner".to_owned()], &patterns);
        assert!(!sql.contains('@'), "{sql}");
        assert!(sql.contains("ARRAY['app', 'Shop Owner']::name[]") && sql.contains("session_user = 'it''s'"));
        let schemas =
            r"(n.nspname LIKE 'public' OR n.nspname LIKE 'shop') AND NOT (n.nspname LIKE E'shop\\_old')";
        assert!(sql.contains(schemas), "{sql}");
        let remove = remove();
        for line in sql.lines() {
            if let Some(rest) = line.strip_prefix("CREATE EVENT TRIGGER ") {
                let name = rest.split(' ').next().unwrap();
                assert!(
                    TRIGGERS.contains(&name) && remove.contains(&format!("{name};")),
                    "{name}"
                );
            }
        }
        assert_eq!(sql.matches("CREATE EVENT TRIGGER").count(), TRIGGERS.len());
        assert_eq!(sql.matches("CREATE FUNCTION").count(), FUNCTIONS.len());
    }
}
