//! Judging what was read: server settings, the daemon's role, and whether what is there is ours.

use std::net::SocketAddr;

use super::conflict_log::HISTORY;
use super::error::Error;
use super::facts::{Facts, NodeRow, Role, Slot};
use super::finding::{Finding, Level};
use super::grants;
use super::objects::{FORMAT, other_layout};
use super::pattern::Patterns;
use super::plan::mismatch;
use super::select::select;
use super::snowflake::SEQUENCES;
use super::sql::{ident, literal};
use super::table::Table;
use crate::config::Config;

/// Refuses a database that is another node's than the configuration's: an administrator's connection string, or the variable that holds it,
/// may lead to any, and what is done there would be done to that node.
///
/// # Errors
/// What differs.
pub fn same_node(node: Option<&NodeRow>, config: &Config) -> Result<(), Error> {
    match node.and_then(|node| mismatch(node, config)) {
        None => Ok(()),
        Some(differs) => Err(Error::Refused(format!(
            "the database is not that of this configuration: {differs}; correct --admin-dsn \
             ($ANABRANCH_ADMIN_DSN), or --config"
        ))),
    }
}

/// Settings of the server.
#[must_use]
pub fn server(facts: &Facts) -> Vec<Finding> {
    let server = &facts.server;
    let slot_is_there = facts.ours.slot.is_some();
    let mut out = vec![match server.major() {
        15..=18 => Finding::ok("version", &server.version),
        major if major < 15 => Finding::fail(
            "version",
            &server.version,
            "upgrade the server to PostgreSQL 15 or later",
        ),
        _ => Finding::warn(
            "version",
            &server.version,
            "newer than 18, the last version that was tested",
        ),
    }];
    if server.in_recovery {
        out.push(Finding::fail(
            "recovery",
            "the server is a standby",
            "point postgres.dsn at the primary",
        ));
    }
    out.push(if server.wal_level == "logical" {
        Finding::ok("wal_level", "logical")
    } else {
        Finding::fail(
            "wal_level",
            &server.wal_level,
            "ALTER SYSTEM SET wal_level = 'logical'; and restart the server",
        )
    });
    let room = |name: &str, used: i32, max: i32, mine: bool| {
        let found = format!("{used} of {max} in use");
        if mine || used < max {
            Finding::ok(name, found)
        } else {
            Finding::fail(
                name,
                found,
                format!(
                    "ALTER SYSTEM SET {name} = {}; and restart the server",
                    (max + 5).max(10)
                ),
            )
        }
    };
    out.push(room(
        "max_replication_slots",
        server.slots_used,
        server.slots_max,
        slot_is_there,
    ));
    let streaming = facts
        .ours
        .slot
        .as_ref()
        .is_some_and(|slot| slot.active_pid.is_some());
    out.push(room(
        "max_wal_senders",
        server.senders_used,
        server.senders_max,
        streaming,
    ));
    out.push(if server.encoding == "UTF8" {
        Finding::ok("server_encoding", "UTF8")
    } else {
        Finding::fail(
            "server_encoding",
            &server.encoding,
            "move the data to a database made with ENCODING 'UTF8'; members exchange text as UTF-8",
        )
    });
    if server.slot_wal_keep_mib >= 0 {
        out.push(Finding::warn(
            "max_slot_wal_keep_size",
            format!("{} MiB", server.slot_wal_keep_mib),
            "if the daemon is away until more WAL than this is written, its slot is lost and the node must be healed; \
             -1 keeps everything",
        ));
    }
    if server.slot_idle_timeout_s > 0 {
        out.push(Finding::warn(
            "idle_replication_slot_timeout",
            format!("{} s", server.slot_idle_timeout_s),
            "a daemon that is away for longer loses its slot, and the node must be healed; 0 switches it off",
        ));
    }
    out
}

/// Is what is written down for the others, by which they reach this node, an address of all machines, and so of none?
#[must_use]
pub fn advertised(config: &Config) -> Option<Finding> {
    let address = config.listen.advertised();
    let is_any = address
        .parse::<SocketAddr>()
        .is_ok_and(|address| address.ip().is_unspecified());
    is_any.then(|| {
        Finding::warn(
            "listen.advertise",
            format!("others would be told {address}, at which each reaches only itself"),
            "set listen.advertise to the host:port by which the others reach this node; where `anabranch init` has written down the other \
             one, it takes an entry in `peers` of every node that joins",
        )
    })
}

/// May the role that runs `init` do what is to be done? `tables` are those to be changed or published.
#[must_use]
pub fn session(facts: &Facts, tables: &[&Table]) -> Vec<Finding> {
    let server = &facts.server;
    let name = &server.session_role;
    let mut out = Vec::new();
    if server.session_superuser {
        return out;
    }
    if !server.session_replication && facts.ours.slot.is_none() {
        out.push(Finding::fail(
            "admin role",
            format!("{name} may not create replication slots"),
            format!(
                "connect as a superuser with --admin-dsn, or ALTER ROLE {} REPLICATION",
                ident(name)
            ),
        ));
    }
    if !server.session_may_create && (!facts.ours.schema || facts.ours.publication.is_none()) {
        out.push(Finding::fail(
            "admin role",
            format!("{name} may not create a schema and a publication"),
            format!(
                "connect as a superuser with --admin-dsn, or GRANT CREATE ON DATABASE {} TO {}",
                ident(&server.database),
                ident(name)
            ),
        ));
    }
    if !facts.role.superuser && (!facts.role.may_set_replication_role || !facts.role.reads_all_stats) {
        out.push(Finding::fail(
            "admin role",
            format!("{name} may not grant role {} what it lacks on this server", facts.role.name),
            "connect as a superuser with --admin-dsn, or let a superuser run the output of `anabranch grants` first",
        ));
    }
    let listed = |table: &Table| {
        facts
            .ours
            .publication
            .as_ref()
            .is_some_and(|publication| publication.tables.contains(&table.oid))
    };
    for table in tables
        .iter()
        .filter(|table| !table.owned && !listed(table) && table.ancestors.is_empty())
    {
        out.push(Finding::fail(
            format!("table {}.{}", table.schema, table.name),
            format!("is not owned by {name}, so it cannot publish it"),
            "connect as a superuser or as the owner with --admin-dsn",
        ));
    }
    out
}

/// The daemon's role: what only a superuser can give. `init` grants the rest itself.
#[must_use]
pub fn role(facts: &Facts, tables: &[&Table]) -> Vec<Finding> {
    let role = &facts.role;
    let check = format!("role {}", role.name);
    if role.oid.is_none() {
        return vec![Finding::fail(
            check,
            "does not exist",
            "create it: `anabranch grants` prints the SQL for a superuser",
        )];
    }
    if role.superuser {
        return vec![Finding::warn(
            check,
            "is a superuser, which the daemon does not need",
            "use a role of its own: `anabranch grants` prints the SQL",
        )];
    }
    attributes(role, tables, &check)
}

fn attributes(role: &Role, tables: &[&Table], check: &str) -> Vec<Finding> {
    let name = ident(&role.name);
    let needs_bypass = tables.iter().find(|table| table.row_security);
    let mut out = Vec::new();
    if !role.login {
        out.push(Finding::fail(
            check,
            "may not log in",
            format!("ALTER ROLE {name} LOGIN"),
        ));
    }
    if !role.replication {
        out.push(Finding::fail(
            check,
            "may not replicate",
            format!("ALTER ROLE {name} REPLICATION"),
        ));
    }
    if let (Some(table), false) = (needs_bypass, role.bypass_rls) {
        out.push(Finding::fail(
            check,
            format!("is bound by row-level security, which {} has", table.sql_name()),
            format!("ALTER ROLE {name} BYPASSRLS"),
        ));
    }
    if out.is_empty() {
        out.push(Finding::ok(check, "exists, may log in and replicate"));
    }
    out
}

/// What the daemon's role lacks of what `anabranch grants` gives it, for the tables that are replicated here. (What is to be made yet, or
/// published, `init` grants.)
#[must_use]
pub fn lacking(mut facts: Facts, patterns: &Patterns) -> Vec<Finding> {
    let there = &facts.ours.tables;
    let is_there =
        |name: &String| name.is_empty() || there.contains(name) || SEQUENCES.contains(&name.as_str());
    facts.role.lacks_in_ours.retain(|(name, _)| is_there(name));
    let listed = facts.ours.publication.as_ref().map_or(&[][..], |it| &it.tables);
    let is_published = |table: &&Table| {
        let mut oids = std::iter::once(&table.oid).chain(&table.ancestors);
        oids.any(|oid| listed.contains(oid))
    };
    let published: Vec<&Table> = select(&facts, patterns)
        .all
        .into_iter()
        .filter(is_published)
        .collect();
    let mut out = role(&facts, &published);
    out.retain(|finding| finding.level == Level::Fail);
    let missing = grants::missing(&facts, &published);
    out.extend(
        missing
            .iter()
            .map(|grant| Finding::fail(format!("privilege {}", grant.what), "missing", &grant.give)),
    );
    let ours = grants::missing_in_ours(&facts);
    out.extend(
        ours.iter()
            .map(|step| Finding::fail("privilege in schema anabranch", "missing", &step.sql)),
    );
    out
}

/// Is the schema one of an older release? `init` brings it up to date; nothing else must be done with it before.
#[must_use]
pub fn older_layout(facts: &Facts) -> Option<Finding> {
    let format = facts.ours.node.as_ref()?.format;
    if format < FORMAT { layout(format) } else { None }
}

/// Does the conflict log lack an index of this release? It is slow to read then, and nothing else.
#[must_use]
pub fn slow_log(facts: &Facts) -> Option<Finding> {
    let has_log = facts.ours.tables.iter().any(|table| table == HISTORY.name);
    (has_log && !facts.ours.group_index).then(|| {
        Finding::warn(
            "conflict log",
            "has no index by transaction: `conflicts show` and the page read all of it for one line",
            "run `anabranch init`, which makes it; no line is written meanwhile",
        )
    })
}

/// Would upkeep of the conflict log, which has the rights of who ran `init`, run what a session has made?
#[must_use]
pub fn open_upkeep(facts: &Facts) -> Option<Finding> {
    facts.ours.open_upkeep.then(|| {
        Finding::warn(
            "conflict log",
            "its upkeep, as an older release made it, takes a session's temporary tables for the server's: whoever has the daemon's \
             connection can get the rights of who ran `init` by that",
            "run `anabranch init`, which ends it",
        )
    })
}

/// Is a join of this database unfinished? It does for itself what `init` does, when all is copied; a node that `init` made of what is there
/// before would be given up along with the join.
#[must_use]
pub fn unfinished_join(facts: &Facts) -> Option<Finding> {
    facts.ours.join.then(|| {
        Finding::fail(
            "schema anabranch_join",
            "a join was begun in this database and is not finished",
            "run `anabranch join` again, which goes on with it, or give it up with `anabranch join --abandon`, which empties the database; \
             one that was a node before has that schema by mistake: DROP SCHEMA anabranch_join CASCADE",
        )
    })
}

fn layout(format: i32) -> Option<Finding> {
    let remedy = other_layout(format)?;
    let found = format!("has layout {format}, this release knows {FORMAT}");
    Some(Finding::fail("schema anabranch", found, remedy))
}

/// Is what is there ours, of this node, and of no newer release?
#[must_use]
pub fn ownership(facts: &Facts, config: &Config) -> Vec<Finding> {
    let ours = &facts.ours;
    let slot_name = &config.postgres.slot;
    let mut out = Vec::new();
    let Some(node) = &ours.node else {
        if ours.publication.is_some() {
            out.push(Finding::fail(
                format!("publication {}", config.postgres.publication),
                "exists, but this database was never set up for Anabranch",
                "drop it, or choose another name in postgres.publication",
            ));
        }
        out.extend(
            ours.slot
                .as_ref()
                .map(|slot| foreign_slot(slot_name, slot, &facts.server.database)),
        );
        return out;
    };
    if node.format > FORMAT {
        out.extend(layout(node.format));
    }
    if node.system_identifier != facts.server.system_identifier {
        out.push(Finding::fail(
            "server identity",
            format!(
                "this database is a copy: node {} was set up on server {}, this is server {}",
                node.name, node.system_identifier, facts.server.system_identifier
            ),
            "a copy must not write under the name of its original: run `anabranch remove --without-leaving` here, then let it \
             join as a new node",
        ));
    }
    if let Some(differs) = mismatch(node, config) {
        out.push(Finding::fail(
            "node identity",
            differs,
            "put the configuration right: a node's name and id are fixed for life; or start afresh with `anabranch remove`",
        ));
    }
    out.extend(slot(facts, config, node.slot_start.is_some()));
    out.extend(publication(facts, config, node.slot_start.is_some()));
    out
}

/// A slot of that name in a database that is not set up. Names of slots are the server's, so it may be another node's.
fn foreign_slot(name: &str, slot: &Slot, database: &str) -> Finding {
    let check = format!("slot {name}");
    if slot.database == database {
        return Finding::fail(
            check,
            "exists, but this database was never set up for Anabranch: it may be somebody else's",
            format!(
                "choose another name in postgres.slot; or, if nobody needs it any more, SELECT pg_drop_replication_slot({})",
                literal(name)
            ),
        );
    }
    let found = if slot.database.is_empty() {
        "exists, and is a physical one, of a standby or a backup".to_owned()
    } else {
        format!(
            "exists, and is of database {}: maybe another node's",
            slot.database
        )
    };
    Finding::fail(
        check,
        found,
        "choose another name in postgres.slot; leave that one alone",
    )
}

/// The publication of a node that was set up. `started` tells whether its slot once existed.
fn publication(facts: &Facts, config: &Config, started: bool) -> Option<Finding> {
    let name = ident(&config.postgres.publication);
    let check = format!("publication {}", config.postgres.publication);
    let Some(publication) = &facts.ours.publication else {
        return started.then(|| {
            Finding::warn(
                check,
                "is gone: what was written here since then is in no stream",
                "`anabranch init` makes it again; then run `anabranch heal`, which sends what was written",
            )
        });
    };
    if publication.open_ended {
        return Some(Finding::fail(
            check,
            "publishes all tables or whole schemas",
            format!(
                "ALTER PUBLICATION {name} DROP TABLES IN SCHEMA ...; one that is FOR ALL TABLES must be dropped: stop the daemon, DROP \
                 PUBLICATION {name}, run `anabranch init`, then `anabranch heal`"
            ),
        ));
    }
    (!publication.filtered.is_empty()).then(|| {
        let filtered = publication.filtered.join(", ");
        Finding::fail(
            check,
            format!("has a column list or row filter on {filtered}"),
            format!(
                "ALTER PUBLICATION {name} DROP TABLE {filtered}; run `anabranch init`, which puts it in whole; then compare: `anabranch \
                 verify`"
            ),
        )
    })
}

/// The slot of a node that was set up. `started` tells whether it once existed.
fn slot(facts: &Facts, config: &Config, started: bool) -> Option<Finding> {
    let name = &config.postgres.slot;
    let check = format!("slot {name}");
    let Some(slot) = &facts.ours.slot else {
        return started.then(|| {
            Finding::fail(
                check,
                "is gone; what was written here since then is unknown to the peers",
                "run `anabranch heal`, which says what it would do with --dry-run",
            )
        });
    };
    if slot.plugin != "pgoutput" || slot.database != facts.server.database {
        return Some(Finding::fail(
            check,
            format!("is of plugin {} in database {}", slot.plugin, slot.database),
            "it is not Anabranch's: choose another name in postgres.slot",
        ));
    }
    if slot.wal_status == "lost" {
        return Some(Finding::fail(
            check,
            "is lost: the server removed WAL that the daemon had not read",
            "raise max_slot_wal_keep_size, then run `anabranch heal`",
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::facts::Publication;
    use super::super::table::Kind;
    use super::*;

    #[test]
    fn an_older_layout_is_for_init_and_a_newer_one_for_a_newer_release() {
        let remedy = |format| layout(format).map(|finding| finding.remedy);
        assert_eq!(remedy(FORMAT), None);
        assert!(remedy(FORMAT - 1).unwrap().contains("anabranch init"));
        assert!(
            remedy(FORMAT + 1)
                .unwrap()
                .contains("release of Anabranch that made it")
        );
    }

    #[test]
    fn what_is_lacking_is_of_tables_that_are_replicated_and_objects_that_are_there() {
        let table = |oid: u32, name: &str, ancestors: &[u32]| Table {
            oid,
            schema: "public".to_owned(),
            name: name.to_owned(),
            kind: Kind::Table,
            persistence: "p".to_owned(),
            ancestors: ancestors.to_vec(),
            identity: "d".to_owned(),
            identity_index: None,
            has_toast: false,
            generated_stored: false,
            generated_virtual: false,
            row_security: oid == 2,
            foreign_keys: 0,
            foreign_keys_unindexed: Vec::new(),
            checks: 0,
            exclusions: 0,
            periods: 0,
            uniques: 0,
            unique_keys: Vec::new(),
            replica_triggers: Vec::new(),
            of_extension: false,
            owned: false,
            key: None,
            misfits: Vec::new(),
            lacks: vec!["UPDATE".to_owned()],
            lacks_schemas: Vec::new(),
        };
        let mut facts = Facts {
            tables: vec![
                table(1, "new", &[]),
                table(2, "part", &[9]),
                table(3, "item", &[]),
            ],
            ..Facts::default()
        };
        facts.role.name = "anabranch".to_owned();
        facts.role.oid = Some(10);
        (facts.role.login, facts.role.replication) = (true, true);
        (facts.role.may_set_replication_role, facts.role.may_connect) = (true, true);
        facts.role.reads_all_stats = true;
        facts.ours.tables = vec!["clock".to_owned()];
        let lacks = ["clock", "of_a_later_release"];
        facts.role.lacks_in_ours = lacks.map(|name| (name.to_owned(), "INSERT".to_owned())).to_vec();
        facts.ours.publication = Some(Publication {
            tables: vec![3, 9],
            ..Publication::default()
        });
        let patterns = Patterns::parse(&["public.*".to_owned()]).unwrap();
        let remedies = |facts: &Facts| -> Vec<String> {
            let lacking = lacking(facts.clone(), &patterns);
            lacking.into_iter().map(|finding| finding.remedy).collect()
        };
        assert_eq!(
            remedies(&facts),
            [
                "ALTER ROLE anabranch BYPASSRLS",
                "GRANT UPDATE ON TABLE public.part TO anabranch;",
                "GRANT UPDATE ON TABLE public.item TO anabranch;",
                "GRANT INSERT ON TABLE anabranch.clock TO anabranch;",
            ]
        );
        facts.role.superuser = true;
        assert!(remedies(&facts).is_empty());
    }

    #[test]
    fn an_address_of_all_machines_is_none_for_the_others() {
        let mut config = Config::example();
        for (address, advertise, is_told) in [
            ("0.0.0.0:7400", None, true),
            ("[::]:7400", None, true),
            ("0.0.0.0:7400", Some("0.0.0.0:7400"), true),
            ("0.0.0.0:7400", Some("alpha.example.com:7400"), false),
            ("10.0.0.1:7400", None, false),
        ] {
            config.listen.address = address.parse().unwrap();
            config.listen.advertise = advertise.map(str::to_owned);
            assert_eq!(advertised(&config).is_some(), is_told, "{address} {advertise:?}");
        }
    }

    #[test]
    fn the_slot_of_another_database_is_never_to_be_dropped() {
        let slot = |database: &str| Slot {
            database: database.to_owned(),
            ..Slot::default()
        };
        for other in ["other", ""] {
            let finding = foreign_slot("anabranch", &slot(other), "shop");
            assert!(!finding.remedy.contains("drop"), "{finding:?}");
            assert!(finding.remedy.contains("postgres.slot"), "{finding:?}");
        }
        let finding = foreign_slot("it's", &slot("shop"), "shop");
        assert!(
            finding.remedy.contains("pg_drop_replication_slot('it''s')"),
            "{finding:?}"
        );
    }
}
