//! The SQL that makes an ordinary role fit to run the daemon: the one place that says which privileges it needs.

use super::conflict_log;
use super::facts::Facts;
use super::objects::OBJECTS;
use super::pattern::Patterns;
use super::plan::Step;
use super::snowflake::SEQUENCES;
use super::sql::{dollar_quote, ident, literal, qualified};
use super::table::{PRIVILEGES, Table};

/// A privilege that is missing: the statement that gives it and the one that takes it back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// For people.
    pub what: String,
    /// `GRANT ...;`
    pub give: String,
    /// `REVOKE ...;`
    pub take_back: String,
    /// Is it a privilege of the whole server rather than of the database?
    pub server_wide: bool,
    /// Schema, and table in it, that it is about: once they are gone there is nothing to take back.
    pub on: Option<(String, Option<String>)>,
}

impl Grant {
    fn new(what: impl Into<String>, privilege: &str, on: &str, role: &str) -> Self {
        let role = ident(role);
        let on = if on.is_empty() {
            String::new()
        } else {
            format!(" ON {on}")
        };
        Self {
            what: what.into(),
            give: format!("GRANT {privilege}{on} TO {role};"),
            take_back: format!("REVOKE {privilege}{on} FROM {role};"),
            server_wide: false,
            on: None,
        }
    }

    /// The statements as one step of a plan that remembers how to undo it.
    #[must_use]
    pub fn step(&self) -> Step {
        let text = |name: Option<&String>| name.map_or("NULL".to_owned(), |name| literal(name));
        let undo = format!(
            "INSERT INTO anabranch.undo VALUES ({}, {}, {}, {}) ON CONFLICT DO NOTHING;",
            literal(&self.take_back),
            self.server_wide,
            text(self.on.as_ref().map(|on| &on.0)),
            text(self.on.as_ref().and_then(|on| on.1.as_ref())),
        );
        Step::new(format!("grant {}", self.what), format!("{}\n{undo}", self.give))
    }
}

/// Server-wide privileges: setting `session_replication_role`, and seeing what other sessions wait for.
#[must_use]
pub fn server_wide(role: &str, major: i32) -> [Grant; 2] {
    let mut set = Grant::new(
        "SET of session_replication_role",
        "SET",
        "PARAMETER session_replication_role",
        role,
    );
    set.server_wide = true;
    let mut stats = Grant::new("pg_read_all_stats", "pg_read_all_stats", "", role);
    stats.server_wide = true;
    if major >= 16 {
        // From 16 on membership says itself whether it is inherited, whatever the role's own INHERIT says.
        stats.give = format!("GRANT pg_read_all_stats TO {} WITH INHERIT TRUE;", ident(role));
    }
    [set, stats]
}

/// Everything that the role lacks for the tables `all`, apart from role attributes and schema `anabranch`.
#[must_use]
pub fn missing(facts: &Facts, all: &[&Table]) -> Vec<Grant> {
    let role = &facts.role;
    if role.superuser {
        return Vec::new();
    }
    let mut out = Vec::new();
    let [set, stats] = server_wide(&role.name, facts.server.major());
    if !role.may_set_replication_role {
        out.push(set);
    }
    if !role.reads_all_stats {
        out.push(stats);
    }
    if !role.may_connect {
        let on = format!("DATABASE {}", ident(&facts.server.database));
        out.push(Grant::new("CONNECT", "CONNECT", &on, &role.name));
    }
    let mut schemas: Vec<&str> = all
        .iter()
        .flat_map(|table| table.lacks_schemas.iter().map(String::as_str))
        .collect();
    schemas.sort_unstable();
    schemas.dedup();
    for schema in schemas {
        let mut grant = Grant::new(
            format!("USAGE on schema {schema}"),
            "USAGE",
            &format!("SCHEMA {}", ident(schema)),
            &role.name,
        );
        grant.on = Some((schema.to_owned(), None));
        out.push(grant);
    }
    for table in all.iter().filter(|table| !table.lacks.is_empty()) {
        let what = format!("{} on {}", table.lacks.join(", "), table.sql_name());
        let on = format!("TABLE {}", table.sql_name());
        let mut grant = Grant::new(what, &table.lacks.join(", "), &on, &role.name);
        grant.on = Some((table.schema.clone(), Some(table.name.clone())));
        out.push(grant);
    }
    out
}

/// What the role lacks on sequences that columns of the tables `all` take their values from, as far as this session may give it.
/// The daemon does not need it; [`crate::heal`] does, where a promoted server is to hand out no value twice.
#[must_use]
pub fn missing_on_sequences(facts: &Facts, all: &[&Table]) -> Vec<Grant> {
    let role = &facts.role;
    if role.superuser {
        return Vec::new();
    }
    let mut out: Vec<Grant> = Vec::new();
    for sequence in &role.lacks_sequences {
        if !all.iter().any(|table| table.oid == sequence.table_oid) {
            continue;
        }
        let (name, privileges) = (
            qualified(&sequence.schema, &sequence.name),
            sequence.lacks.join(", "),
        );
        let what = format!("{privileges} on {name}");
        let mut grant = Grant::new(what, &privileges, &format!("SEQUENCE {name}"), &role.name);
        grant.on = Some((sequence.schema.clone(), Some(sequence.name.clone())));
        // One sequence may serve several columns.
        if !out.contains(&grant) {
            out.push(grant);
        }
    }
    out
}

/// What the role lacks in schema `anabranch`. Needs no undo: it goes with the schema.
#[must_use]
pub fn missing_in_ours(facts: &Facts) -> Vec<Step> {
    if facts.role.superuser {
        return Vec::new();
    }
    let lacks = &facts.role.lacks_in_ours;
    lacks
        .iter()
        .map(|(table, privileges)| {
            let (on, name) = if table.is_empty() {
                ("SCHEMA anabranch".to_owned(), "schema anabranch".to_owned())
            } else {
                let kind = if SEQUENCES.contains(&table.as_str()) {
                    "SEQUENCE"
                } else {
                    "TABLE"
                };
                (
                    format!("{kind} {}", qualified("anabranch", table)),
                    format!("anabranch.{table}"),
                )
            };
            let grant = Grant::new("", privileges, &on, &facts.role.name);
            Step::new(format!("grant {privileges} on {name}"), grant.give)
        })
        .collect()
}

/// What a grant script is for.
#[derive(Debug, Clone)]
pub struct Script<'a> {
    /// The daemon's role.
    pub role: &'a str,
    /// Server version, 15 and up.
    pub major: i32,
    /// The database, if known.
    pub database: Option<&'a str>,
    /// Chosen tables, when a server was asked; else the patterns speak.
    pub tables: Option<&'a [&'a Table]>,
    /// `postgres.tables`.
    pub patterns: &'a Patterns,
}

/// The whole script, for a superuser to run before `init`; running it again is harmless.
#[must_use]
pub fn script(script: &Script<'_>) -> String {
    let role = ident(script.role);
    let quote = dollar_quote(&[&role]);
    let mut out = vec![
        format!("-- Privileges for Anabranch's daemon on PostgreSQL {}. Run as a superuser, in the replicated", script.major),
        "-- database, before `anabranch init`. Give the role a password with \\password, or a line in pg_hba.conf.".to_owned(),
        format!(
            "DO {quote} BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = {}) THEN CREATE ROLE {role}; END IF; END {quote};",
            literal(script.role)
        ),
        format!("ALTER ROLE {role} LOGIN REPLICATION;"),
    ];
    match script.tables {
        Some(tables) if tables.iter().any(|table| table.row_security) => {
            out.push(format!(
                "ALTER ROLE {role} BYPASSRLS; -- a replicated table has row-level security"
            ));
        }
        Some(_) => {}
        None => out.push(format!(
            "-- ALTER ROLE {role} BYPASSRLS; -- only if a replicated table has row-level security"
        )),
    }
    out.push("-- Replicated rows must not fire ordinary triggers and foreign keys a second time.".to_owned());
    out.extend(
        server_wide(script.role, script.major)
            .into_iter()
            .map(|grant| grant.give),
    );
    if let Some(database) = script.database {
        out.push(format!(
            "GRANT CONNECT ON DATABASE {} TO {role};",
            ident(database)
        ));
    }
    let privileges = PRIVILEGES.join(", ");
    match script.tables {
        Some(tables) => on_tables(tables, &privileges, &role, &mut out),
        None => on_patterns(script.patterns, &privileges, &role, &mut out),
    }
    out.push("-- Schema anabranch: `anabranch init` does this part itself; needed again only when the role changes.".to_owned());
    out.push(format!(
        "DO {quote} BEGIN IF to_regnamespace('anabranch') IS NOT NULL THEN"
    ));
    out.push(format!("  GRANT USAGE ON SCHEMA anabranch TO {role};"));
    out.extend(OBJECTS.iter().map(|object| {
        format!(
            "  GRANT {} ON anabranch.{} TO {role};",
            object.privileges, object.name
        )
    }));
    out.push(format!("END IF; END {quote};"));
    reviewers(&mut out);
    out.join("\n") + "\n"
}

/// The role for people who review conflicts; it sees the log whole, whatever row-level security its tables have.
fn reviewers(out: &mut Vec<String>) {
    let role = conflict_log::REVIEWER;
    out.push(format!(
        "-- For people who review conflicts: GRANT {role} TO somebody; reads the log, may change nothing but the review's columns."
    ));
    out.push(format!(
        "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN CREATE ROLE {role} NOLOGIN; END IF; END $$;"
    ));
    out.push("DO $$ BEGIN IF to_regclass('anabranch.conflict_open') IS NOT NULL THEN".to_owned());
    out.extend(
        conflict_log::REVIEWER_MAY
            .iter()
            .map(|(privileges, on)| format!("  GRANT {privileges} ON {on} TO {role};")),
    );
    out.push("END IF; END $$;".to_owned());
}

fn on_tables(tables: &[&Table], privileges: &str, role: &str, out: &mut Vec<String>) {
    let mut schemas: Vec<&str> = tables
        .iter()
        .flat_map(|table| {
            table
                .lacks_schemas
                .iter()
                .map(String::as_str)
                .chain([table.schema.as_str()])
        })
        .collect();
    schemas.sort_unstable();
    schemas.dedup();
    out.extend(
        schemas
            .iter()
            .map(|schema| format!("GRANT USAGE ON SCHEMA {} TO {role};", ident(schema))),
    );
    out.extend(
        tables
            .iter()
            .map(|table| format!("GRANT {privileges} ON TABLE {} TO {role};", table.sql_name())),
    );
}

fn on_patterns(patterns: &Patterns, privileges: &str, role: &str, out: &mut Vec<String>) {
    for pattern in patterns.iter().filter(|pattern| !pattern.exclude) {
        if pattern.schema.contains('*') {
            out.push(format!(
                "-- {}.{}: which schemas that is only the server knows; run `anabranch grants --connect`",
                pattern.schema, pattern.table
            ));
            continue;
        }
        let schema = ident(&pattern.schema);
        out.push(format!("GRANT USAGE ON SCHEMA {schema} TO {role};"));
        if pattern.is_exact() {
            let table = qualified(&pattern.schema, &pattern.table);
            out.push(format!("GRANT {privileges} ON TABLE {table} TO {role};"));
        } else {
            out.push(format!(
                "GRANT {privileges} ON ALL TABLES IN SCHEMA {schema} TO {role};"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_roles_name_ends_no_statement() {
        let sql = script(&Script {
            role: "ana$f$",
            major: 15,
            database: None,
            tables: None,
            patterns: &Patterns::default(),
        });
        assert!(
            sql.contains("rolname = 'ana$f$') THEN CREATE ROLE \"ana$f$\"; END IF; END $f1$;"),
            "{sql}"
        );
        assert_eq!(sql.matches("$f1$").count(), 4, "{sql}");
    }
}
