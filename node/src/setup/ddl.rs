//! What lets DDL travel in the stream: functions in the database, made by `init` for the roles of `ddl.roles`.
//!
//! In:   [`Facts`], the configuration      Out: one stage of `init`'s plan
//! Invariants: 1. what comes from another node runs with the rights of an ordinary role that was named here, never with
//!             those of the daemon or of whoever ran `init`; 2. who may make it run at all nodes may become that role here
//! Not here: when it runs (`crate::apply::ddl`), what notices plain DDL ([`super::plain_ddl`])
//!
//! Why functions, and not `GRANT owner TO daemon`: a statement that runs after `SET ROLE owner` can say `RESET ROLE` and is
//! the daemon then (also out of a function in a column's default). Within a SECURITY DEFINER function the server refuses
//! every change of role. One for each role, *owned* by that role, in a schema that only the daemon may look into: its owner
//! cannot name it, so cannot make it SECURITY INVOKER.

use std::collections::BTreeMap;

use anabranch_conflict::policy::Policies;
use anabranch_proto::{NodeId, Position};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::PgLsn;

use super::facts::Facts;
use super::finding::Finding;
use super::merged;
use super::pairwise;
use super::pattern::{Pattern, Patterns};
use super::plain_ddl;
use super::plan::{Scope, Stage, Step};
use super::sequence;
use super::sql::{dollar_quote, fill, ident, literal};
use super::table::{KEY_TYPES, PRIVILEGES, misfit_sql};
use crate::apply::catalog::unique_keys;
use crate::config::Config;
use crate::pg::SEARCH_PATH;

/// Name of the table in schema `anabranch` by which statements travel.
pub const TABLE: &str = "ddl";
/// Name of the table in schema `anabranch` that says which columns statements have added, and what rows have in them that were there.
pub const ADDED: &str = "added_column";
/// Schema of the functions that run statements of other nodes.
pub const SCHEMA: &str = "anabranch_ddl";

/// The server's timeline.
const EPOCH: &str = "('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int8";

/// A role of `ddl.roles`, as the catalog has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DdlRole {
    /// Its name.
    pub name: String,
    /// Superuser?
    pub superuser: bool,
}

/// What is there of all this.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DdlFacts {
    /// The named roles that exist.
    pub roles: Vec<DdlRole>,
    /// Comment of schema `anabranch_ddl`, which tells what it was made from; none without the schema.
    pub made_from: Option<String>,
    /// The event triggers that capture plain DDL.
    pub capture: Vec<plain_ddl::Trigger>,
}

/// Can these roles be let run DDL?
pub(super) fn findings(facts: &Facts, config: &Config) -> Vec<Finding> {
    let mut out = unfit_roles(facts, config);
    if config.ddl.capture && !facts.server.session_superuser && !plain_ddl::is_made(facts) {
        out.push(Finding::fail(
            "ddl.capture",
            "only a superuser makes event triggers",
            "connect as a superuser with --admin-dsn",
        ));
    }
    out.extend(plain_ddl::disabled(facts, config));
    out
}

/// For `doctor`: can they, and has `init` let them as the configuration says? (What captures plain DDL is told by [`plain_ddl`].)
pub(super) fn examine(
    facts: &Facts,
    config: &Config,
    patterns: &Patterns,
    policies: &Policies,
) -> Vec<Finding> {
    let mut out = unfit_roles(facts, config);
    let is_as_made = facts.ours.node.is_none()
        || !plain_ddl::is_as_wanted(facts, config)
        || stage(facts, config, patterns, policies).is_none();
    if is_as_made {
        return out;
    }
    let roles = config.ddl.roles.join(", ");
    let found = match &facts.ours.ddl.made_from {
        _ if config.ddl.roles.is_empty() => {
            "is empty, and DDL of the roles of before still travels".to_owned()
        }
        None => {
            format!("DDL of {roles} does not travel from here, and that of other nodes would be stuck here")
        }
        Some(_) => {
            "what lets DDL travel was made with another configuration or policy, or by another release"
                .to_owned()
        }
    };
    let remedy = "run `anabranch init`, as a superuser";
    out.push(Finding::warn("ddl.roles", found, remedy));
    out
}

fn unfit_roles(facts: &Facts, config: &Config) -> Vec<Finding> {
    let mut out = Vec::new();
    for name in &config.ddl.roles {
        let check = format!("ddl.roles: {name}");
        let found = facts.ours.ddl.roles.iter().find(|role| role.name == *name);
        match found {
            None => out.push(Finding::fail(
                check,
                "the role does not exist",
                format!(
                    "CREATE ROLE {}, as on the other nodes; or take it out of ddl.roles",
                    ident(name)
                ),
            )),
            Some(role) if role.superuser => out.push(Finding::fail(
                check,
                "is a superuser: whoever may run DDL as this role at any node could do anything at this one",
                "name an ordinary role, and let it own the tables (ALTER TABLE ... OWNER TO)",
            )),
            Some(_) => {}
        }
    }
    out
}

/// Makes the functions, makes them anew when anything they are made from has changed, or takes them away.
pub(super) fn stage(
    facts: &Facts,
    config: &Config,
    patterns: &Patterns,
    policies: &Policies,
) -> Option<Stage> {
    let made_from = facts.ours.ddl.made_from.as_deref();
    let step = if config.ddl.roles.is_empty() {
        if made_from.is_none() && facts.ours.ddl.capture.is_empty() {
            return None;
        }
        Step::new("let no DDL travel any more", remove())
    } else {
        let mut script = script(&facts.role.name, &config.ddl.roles, (patterns, policies));
        if config.ddl.capture {
            script.push('\n');
            script.push_str(&plain_ddl::script(&facts.role.name, &config.ddl.roles, patterns));
        }
        let mark = format!("Anabranch: runs the DDL of other nodes ({})", digest(&script));
        if made_from == Some(mark.as_str()) && plain_ddl::is_as_wanted(facts, config) {
            return None;
        }
        let comment = format!("COMMENT ON SCHEMA {SCHEMA} IS {};", literal(&mark));
        let by_itself = if config.ddl.capture {
            ", said plainly, too"
        } else {
            ""
        };
        Step::new(
            format!(
                "let DDL travel that is run as {}{by_itself}",
                config.ddl.roles.join(", ")
            ),
            format!("{}\n{script}\n{comment}", remove()),
        )
    };
    Some(Stage {
        scope: Scope::Transaction,
        steps: vec![step],
    })
}

/// The statements that take it all away; what fires at the others first.
pub(super) fn remove() -> String {
    format!("{}\n{REMOVE}", plain_ddl::remove())
}

const REMOVE: &str = "DROP SCHEMA IF EXISTS anabranch_ddl CASCADE;
DROP FUNCTION IF EXISTS anabranch.replicate_ddl(text);
DROP FUNCTION IF EXISTS anabranch.note_ddl(name, text, text, oid[]);
DROP FUNCTION IF EXISTS anabranch.check_ddl(text);
DROP FUNCTION IF EXISTS anabranch.statements(text, int);
DROP FUNCTION IF EXISTS anabranch.check_new_columns(oid[], int2[]);
DROP FUNCTION IF EXISTS anabranch.note_columns(oid[], int2[], uuid);
DROP FUNCTION IF EXISTS anabranch.note_columns(oid[], int2[], uuid, int, bigint, pg_lsn);
DROP FUNCTION IF EXISTS anabranch.check_new_rows(oid[]);
DROP FUNCTION IF EXISTS anabranch.published_tables();
DROP FUNCTION IF EXISTS anabranch.adopt_tables(oid[]);";

fn digest(text: &str) -> String {
    format!("{:016x}", xxhash_rust::xxh3::xxh3_64(text.as_bytes()))
}

/// Name of the function that runs statements as `role`, quoted.
#[must_use]
pub fn runner(role: &str) -> String {
    format!(
        "{SCHEMA}.run_{:016x}",
        xxhash_rust::xxh3::xxh3_64(role.as_bytes())
    )
}

fn script(role: &str, roles: &[String], tables: (&Patterns, &Policies)) -> String {
    let daemon = ident(role);
    let mut out = vec![
        format!("CREATE SCHEMA {SCHEMA};"),
        format!("GRANT USAGE ON SCHEMA {SCHEMA} TO {daemon};"),
        STATEMENTS.to_owned(),
        check(),
        NEW_COLUMNS.to_owned(),
        NOTE_COLUMNS.to_owned(),
        PUBLISHED.to_owned(),
        NEW_ROWS.to_owned(),
        adopt_sql(role, tables),
        note(roles),
        REPLICATE.to_owned(),
        "REVOKE ALL ON FUNCTION anabranch.check_ddl(text), anabranch.check_new_columns(oid[], int2[]), anabranch.adopt_tables(oid[]),\n    \
         anabranch.check_new_rows(oid[]), anabranch.published_tables(), anabranch.statements(text, int),\n    \
         anabranch.note_columns(oid[], int2[], uuid, int, bigint, pg_lsn), anabranch.note_columns(oid[], int2[], uuid),\n    \
         anabranch.note_ddl(name, text, text, oid[]), anabranch.replicate_ddl(text) FROM PUBLIC;"
            .to_owned(),
        format!(
            "GRANT EXECUTE ON FUNCTION anabranch.check_ddl(text), anabranch.check_new_columns(oid[], int2[]),\n    \
             anabranch.adopt_tables(oid[]), anabranch.check_new_rows(oid[]), anabranch.published_tables(),\n    \
             anabranch.note_columns(oid[], int2[], uuid, int, bigint, pg_lsn), anabranch.statements(text, int) TO {daemon};"
        ),
    ];
    for role in roles {
        let (name, role) = (runner(role), ident(role));
        out.push(format!(
            "CREATE FUNCTION {name}(command text, path text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER\n    \
             SET search_path = pg_catalog, pg_temp\n    \
             SET enable_seqscan = on SET enable_hashjoin = on SET enable_mergejoin = on SET enable_material = on\n    \
             SET plan_cache_mode = auto SET client_min_messages = warning\n    \
             SET timezone = 'UTC' SET datestyle = 'ISO, MDY' SET intervalstyle = postgres SET check_function_bodies = off\n\
             AS $f$ BEGIN PERFORM set_config('search_path', path, true); EXECUTE command; END $f$;\n\
             ALTER FUNCTION {name}(text, text) OWNER TO {role};\n\
             REVOKE ALL ON FUNCTION {name}(text, text) FROM PUBLIC, {role};\n\
             GRANT EXECUTE ON FUNCTION {name}(text, text) TO {daemon};\n\
             GRANT USAGE ON SCHEMA anabranch TO {role};\n\
             GRANT EXECUTE ON FUNCTION anabranch.check_ddl(text), anabranch.check_new_columns(oid[], int2[]),\n    \
             anabranch.check_new_rows(oid[]), anabranch.published_tables(), anabranch.statements(text, int),\n    \
             anabranch.note_columns(oid[], int2[], uuid), anabranch.note_ddl(name, text, text, oid[]),\n    \
             anabranch.replicate_ddl(text) TO {role};"
        ));
    }
    out.join("\n")
}

/// `statements(command)`: the statements of a string, each without what is no SQL of its own.
const STATEMENTS: &str = include_str!("statements.sql");

/// A statement that cannot run in a transaction. A pattern, for a statement as [`STATEMENTS`] gives it.
pub(super) const CONCURRENTLY: &str = r"^(create\s+(unique\s+)?index|drop\s+index|reindex\s.*|refresh\s+materialized\s+view|alter\s+table\s.*\sdetach\s+partition\s.*)\s+concurrently\M";

fn check() -> String {
    CHECK.replace("@CONCURRENTLY@", CONCURRENTLY)
}

/// Refuses what is no DDL, and what cannot run in a transaction, in each statement of the string: rows that one of them
/// wrote would be written twice, by it and by those that travel. A guard against mistakes, not against its owner.
const CHECK: &str = r"CREATE FUNCTION anabranch.check_ddl(command text) RETURNS void LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET standard_conforming_strings = on
AS $f$
DECLARE
    statements text[] := anabranch.statements(command);
    bare text;
    verb text;
BEGIN
    IF statements IS NULL THEN
        RAISE EXCEPTION 'where the statements of this string end cannot be told' USING ERRCODE = '42601',
            HINT = 'Is a string, a comment or a parenthesis open? Does a function in SQL name something begin or end?';
    END IF;
    FOREACH bare IN ARRAY CASE WHEN statements = '{}' THEN ARRAY[''] ELSE statements END
    LOOP
        verb := upper(substring(bare from '^[A-Za-z]+'));
        IF bare ~* '^drop\s+owned\M' THEN
            RAISE EXCEPTION 'DROP OWNED takes what lets DDL travel with it: it cannot be replicated' USING ERRCODE = '0A000',
                HINT = 'DROP each object, or the schemas.';
        END IF;
        IF bare ~* '^create\s+(or\s+replace\s+)?((global|local)\s+)?temp(orary)?\M' OR bare ~* '^create\s.*\mpg_temp\s*\.' THEN
            RAISE EXCEPTION 'what is temporary is of one session: it cannot be replicated' USING ERRCODE = '0A000',
                HINT = 'Run it by itself, in each session that uses it.';
        END IF;
        IF bare ~* '@CONCURRENTLY@' THEN
            RAISE EXCEPTION 'CONCURRENTLY cannot run in a transaction, so it cannot be replicated' USING ERRCODE = '25001',
                HINT = 'Run it at every node by itself, or leave CONCURRENTLY out.';
        END IF;
        IF verb IN ('VACUUM', 'REINDEX', 'CLUSTER', 'ANALYZE', 'CHECKPOINT', 'REFRESH') THEN
            RAISE EXCEPTION '% is upkeep of one server, not replicated', verb USING ERRCODE = '0A000',
                HINT = 'Run it at every node by itself.';
        END IF;
        IF verb IS NULL OR verb NOT IN ('CREATE', 'ALTER', 'DROP', 'COMMENT', 'GRANT', 'REVOKE', 'SECURITY') THEN
            RAISE EXCEPTION '% is no DDL that can be replicated', coalesce(verb, 'an empty statement') USING ERRCODE = '0A000',
                HINT = 'CREATE, ALTER, DROP, COMMENT, GRANT, REVOKE and SECURITY LABEL can. Rows travel by themselves: write them beside it, in the same transaction.';
        END IF;
    END LOOP;
END $f$;";

/// `check_new_columns(tables, widths)`: refuses, behind a statement, a new column of a published table whose default gave
/// the rows that are there one value here and would give them another elsewhere: what ALTER TABLE writes into rows does not
/// travel. A table that is empty here may have rows elsewhere, unless it was made in this transaction: by the row that says which
/// schema it is in, which ALTER TABLE does not write again; it is seen, so a transaction that is still open is this one. `widths` are
/// the numbers of columns that the tables had before.
const NEW_COLUMNS: &str = r"CREATE FUNCTION anabranch.check_new_columns(tables oid[], widths int2[]) RETURNS void LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $f$
DECLARE
    fresh record;
    filled boolean;
    me bigint := pg_current_xact_id()::text::bigint;
    -- By how many transactions it was made before or behind the begin of this one, of which it may be a part.
    behind bigint;
    status text;
BEGIN
    FOR fresh IN
        SELECT a.attrelid::regclass AS rel, a.attname,
            (SELECT s.xmin::text::bigint FROM pg_depend s WHERE s.classid = 'pg_class'::regclass AND s.objid = a.attrelid AND s.objsubid = 0
                AND s.refclassid = 'pg_namespace'::regclass LIMIT 1) AS made_by
        FROM ROWS FROM (unnest(tables), unnest(widths)) AS t (rel, width)
        JOIN pg_attribute a ON a.attrelid = t.rel AND a.attnum > t.width AND NOT a.attisdropped
        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        JOIN pg_type y ON y.oid = a.atttypid
        CROSS JOIN LATERAL coalesce(d.adbin, y.typdefaultbin) AS e (bin)
        WHERE EXISTS (SELECT FROM pg_publication_rel r WHERE r.prrelid = a.attrelid) AND (a.attidentity <> '' OR (a.attgenerated = '' AND (e.bin::text ~ '(SQLVALUEFUNCTION|NEXTVALUEEXPR|COERCEVIAIO)' OR EXISTS (
            SELECT FROM regexp_matches(e.bin::text, ':(?:op)?funcid ([0-9]+)', 'g') AS m
            JOIN pg_proc p ON p.oid = m[1]::oid WHERE p.provolatile <> 'i'))))
    LOOP
        EXECUTE format('SELECT EXISTS (SELECT FROM %s)', fresh.rel) INTO filled;
        behind := fresh.made_by - (me & 4294967295);
        behind := behind - CASE WHEN behind > 2147483647 THEN 4294967296 WHEN behind < -2147483648 THEN -4294967296 ELSE 0 END;
        BEGIN
            status := pg_xact_status((me + behind)::text::xid8);
        EXCEPTION WHEN invalid_parameter_value THEN
            -- So long ago that it looks like one to come.
            status := NULL;
        END;
        IF filled OR status IS DISTINCT FROM 'in progress' THEN
            RAISE EXCEPTION 'the default of column % would give the rows of % other values at each node', fresh.attname, fresh.rel
                USING ERRCODE = '0A000',
                DETAIL = CASE WHEN filled THEN 'The table has rows.' ELSE 'The table has no rows here; other nodes may have written some.' END,
                HINT = 'In one transaction: add the column without it, set the default (ALTER COLUMN ... SET DEFAULT), and UPDATE the rows.';
        END IF;
    END LOOP;
END $f$;";

/// `note_columns(tables, widths, said, node, epoch, place)`: notes, behind a statement, which columns it added to published tables, and what
/// the rows that were there have in them now: [`ADDED`]. The last three are whose statement it is and where that was said, null there. The catalog
/// has the value where the statement did not write the rows; else any row has it; where there is none it is the default that would have been
/// written, if that is a literal (an expression of a user's is not for the rights of this function) and came with the column. `note_columns(tables, widths, said)` is for who says a
/// statement, of tables of its role.
const NOTE_COLUMNS: &str = r"CREATE FUNCTION anabranch.note_columns(tables oid[], widths int2[], said uuid, node int, epoch bigint, place pg_lsn)
    RETURNS void LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET row_security = off SET standard_conforming_strings = on
    SET timezone = 'UTC' SET datestyle = 'ISO, MDY' SET intervalstyle = postgres SET extra_float_digits = 1 SET bytea_output = hex
AS $f$
DECLARE
    fresh record;
    found text[];
BEGIN
    FOR fresh IN
        SELECT a.attrelid, a.attnum, a.attname, a.attrelid::regclass AS rel,
            CASE WHEN a.atthasmissing AND y.typdelim = ',' THEN a.attmissingval::text::text[] END AS missing,
            regexp_match(coalesce(pg_get_expr(d.adbin, d.adrelid), y.typdefault),
                '^(?:''((?:[^'']|'''')*)''(?:::[^''()]+(?:\([0-9, ]+\))?)?|([-0-9.]+|true|false))$') AS literal
        FROM ROWS FROM (unnest(tables), unnest(widths)) AS t (rel, width)
        JOIN pg_attribute a ON a.attrelid = t.rel AND a.attnum > t.width AND NOT a.attisdropped AND a.attgenerated = ''
        JOIN pg_type y ON y.oid = a.atttypid
        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE a.attrelid = ANY (anabranch.published_tables())
    LOOP
        found := fresh.missing;
        IF found IS NULL THEN
            BEGIN
                EXECUTE format('SELECT array_agg(CASE WHEN v IS NOT NULL THEN format(''%%s'', v) END) FROM (SELECT %I AS v FROM ONLY %s LIMIT 1) AS t',
                    fresh.attname, fresh.rel) INTO found;
            EXCEPTION WHEN insufficient_privilege THEN
                found := NULL;
            END;
            -- One that was set behind the column, in the same text, is given to no row that is there. What a foreign key does sets none.
            IF found IS NULL AND fresh.literal IS NOT NULL AND NOT EXISTS (SELECT FROM anabranch.ddl d, unnest(anabranch.statements(d.command)) AS s
                WHERE d.id = said AND regexp_replace(s, '\mon\s+(?:delete|update)\s+set\s+default\M', ' ', 'gi') ~* '\mset\s+default\M') THEN
                found := ARRAY[coalesce(replace(fresh.literal[1], '''''', ''''), fresh.literal[2])];
            END IF;
        END IF;
        INSERT INTO anabranch.added_column (rel, attnum, ddl, node_id, epoch, lsn, value)
            SELECT fresh.attrelid, fresh.attnum, said, coalesce(node, n.node_id), note_columns.epoch, place, found[1] FROM anabranch.node n
            ON CONFLICT ON CONSTRAINT added_column_pkey DO UPDATE SET ddl = excluded.ddl, node_id = excluded.node_id, epoch = excluded.epoch,
                lsn = excluded.lsn, value = excluded.value;
    END LOOP;
    DELETE FROM anabranch.added_column x WHERE NOT EXISTS (
        SELECT FROM pg_attribute a WHERE a.attrelid = x.rel AND a.attnum = x.attnum AND NOT a.attisdropped);
END $f$;
CREATE FUNCTION anabranch.note_columns(tables oid[], widths int2[], said uuid) RETURNS void LANGUAGE sql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $f$
    SELECT anabranch.note_columns(array_agg(t.rel ORDER BY t.rel), array_agg(t.width ORDER BY t.rel), said, NULL, NULL, NULL)
    FROM ROWS FROM (unnest(tables), unnest(widths)) AS t (rel, width)
    JOIN pg_class c ON c.oid = t.rel
    JOIN anabranch.ddl d ON d.id = said AND pg_has_role(session_user, d.role, 'MEMBER') AND pg_has_role(d.role, c.relowner, 'MEMBER')
$f$;";

/// `published_tables()`: tables whose rows travel, partitions under what the publication names as well.
const PUBLISHED: &str = r"CREATE FUNCTION anabranch.published_tables() RETURNS oid[] LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $f$
BEGIN
    RETURN ARRAY(SELECT DISTINCT coalesce(t.relid::oid, c.oid)
        FROM pg_publication_tables p
        JOIN pg_namespace n ON n.nspname = p.schemaname
        JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
        LEFT JOIN LATERAL pg_partition_tree(c.oid) t ON t.isleaf
        WHERE p.pubname = (SELECT publication FROM anabranch.node));
END $f$;";

/// `check_new_rows(published)`: refuses, behind a statement, a table with rows that was not published before it. They were
/// written by the statement, which would write others at each node; or before, and are here alone. A partition is published
/// by being attached.
const NEW_ROWS: &str = r"CREATE FUNCTION anabranch.check_new_rows(published oid[]) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $f$
DECLARE
    fresh record;
    filled boolean;
BEGIN
    FOR fresh IN
        SELECT c.oid::regclass AS rel, n.nspname, c.relname
        FROM unnest(anabranch.published_tables()) AS t (rel) JOIN pg_class c ON c.oid = t.rel JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'r' AND c.oid <> ALL (published)
    LOOP
        EXECUTE format('SELECT EXISTS (SELECT FROM ONLY %s)', fresh.rel) INTO filled;
        IF filled THEN
            RAISE EXCEPTION 'table %.% would be replicated from here on, and has rows, which would not', fresh.nspname, fresh.relname
                USING ERRCODE = '0A000',
                HINT = format('Create or attach it empty, then INSERT: that travels. Of a table that was there before, let `anabranch tables add %s.%s` bring the rows to the other nodes first; of a partition that was detached and not written to since, run `anabranch init` at every node first.', fresh.nspname, fresh.relname);
        END IF;
    END LOOP;
END $f$;";

/// `replicate_ddl`: runs as the caller, here; then the statement travels. What captures plain DDL passes it by.
const REPLICATE: &str = r"CREATE FUNCTION anabranch.replicate_ddl(command text) RETURNS uuid LANGUAGE plpgsql
AS $f$
DECLARE
    path text := pg_catalog.current_setting('search_path');
    tables oid[] := ARRAY(SELECT c.oid FROM pg_catalog.pg_class c WHERE c.relkind IN ('r', 'p') ORDER BY c.oid);
    widths int2[] := ARRAY(SELECT c.relnatts FROM pg_catalog.pg_class c WHERE c.relkind IN ('r', 'p') ORDER BY c.oid);
    published oid[] := anabranch.published_tables();
    capture text := pg_catalog.current_setting('anabranch.capture', true);
    said uuid;
BEGIN
    IF pg_catalog.current_setting('standard_conforming_strings') OPERATOR(pg_catalog.=) 'off' AND pg_catalog.strpos(command, E'\\') OPERATOR(pg_catalog.>) 0 THEN
        RAISE EXCEPTION 'a backslash reads otherwise at the other nodes: this cannot be replicated' USING ERRCODE = '0A000',
            HINT = 'SET standard_conforming_strings = on, and write strings with backslashes as E''...''.';
    END IF;
    PERFORM anabranch.check_ddl(command);
    PERFORM pg_catalog.set_config('anabranch.capture', 'off', true);
    EXECUTE command;
    PERFORM pg_catalog.set_config('anabranch.capture', coalesce(capture, ''), true);
    PERFORM anabranch.check_new_columns(tables, widths);
    said := anabranch.note_ddl(current_user, command, path, tables);
    PERFORM anabranch.note_columns(tables, widths, said);
    PERFORM anabranch.check_new_rows(published);
    RETURN said;
END $f$;
COMMENT ON FUNCTION anabranch.replicate_ddl(text) IS 'Runs a DDL statement here and, at its place in the stream, at every other node. The result is its id.';";

fn note(roles: &[String]) -> String {
    let roles: Vec<String> = roles.iter().map(|role| literal(role)).collect();
    let roles = roles.join(", ");
    let quote = dollar_quote(&[&roles]);
    format!(
        r"CREATE FUNCTION anabranch.note_ddl(role name, command text, path text, tables oid[]) RETURNS uuid LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS {quote}
DECLARE
    said uuid := gen_random_uuid();
    -- What literals mean to this session, where the runner would read them otherwise.
    reads text := (SELECT string_agg(format('SET LOCAL %s = %L; ', s.name, current_setting(s.name)), '' ORDER BY s.name)
        FROM (VALUES ('datestyle', ARRAY['ISO, MDY']), ('intervalstyle', ARRAY['postgres']), ('timezone', ARRAY['UTC', 'Etc/UTC'])) AS s (name, usual)
        WHERE current_setting(s.name) <> ALL (s.usual));
BEGIN
    IF role <> ALL (ARRAY[{roles}]::name[]) THEN
        RAISE EXCEPTION 'DDL of role % is not replicated', role USING ERRCODE = '42501',
            HINT = 'SET ROLE to the role that owns the tables; it must be in ddl.roles of every node, and `anabranch init` run there.';
    END IF;
    IF NOT pg_has_role(session_user, role, 'MEMBER') THEN
        RAISE EXCEPTION '% may not run DDL as %', session_user, role USING ERRCODE = '42501';
    END IF;
    PERFORM anabranch.adopt_tables(tables);
    INSERT INTO anabranch.ddl (id, node_id, role, command, search_path, after_lsn, epoch)
        SELECT said, n.node_id, role, coalesce(reads, '') || command, path, pg_current_wal_insert_lsn(), {EPOCH} FROM anabranch.node n;
    RETURN said;
END {quote};"
    )
}

/// `adopt_tables(before)`: brings the publication, replica identities and privileges up to date, in the transaction of the
/// statement, so that rows written right behind it travel. `before` are the tables that were there: others that the patterns
/// choose are taken in. Refuses what `init` would refuse.
fn adopt_sql(daemon: &str, (patterns, policies): (&Patterns, &Policies)) -> String {
    let key_types: Vec<String> = KEY_TYPES.iter().map(|name| literal(name)).collect();
    fill(
        ADOPT,
        &[
            ("@INCLUDED@", &covers(patterns, false)),
            ("@EXCLUDED@", &covers(patterns, true)),
            ("@MERGED@", &merged_sql(policies)),
            ("@KEY_TYPES@", &key_types.join(", ")),
            ("@MISFIT@", &misfit_sql()),
            ("@PRIVILEGES@", &PRIVILEGES.join(", ")),
            ("@USES@", sequence::USES),
            ("@DAEMON_NAME@", &literal(daemon)),
        ],
    )
}

/// Is the table `c` in the schema `n` one that a pattern includes, or excludes?
pub(super) fn covers(patterns: &Patterns, exclude: bool) -> String {
    let of_one = |pattern: &Pattern| {
        format!(
            "(n.nspname LIKE {} AND c.relname LIKE {})",
            like(&pattern.schema),
            like(&pattern.table)
        )
    };
    any(patterns
        .iter()
        .filter(|pattern| pattern.exclude == exclude)
        .map(of_one))
}

/// Conditions of which one must hold.
pub(super) fn any(conditions: impl Iterator<Item = String>) -> String {
    let all: Vec<String> = conditions.collect();
    if all.is_empty() {
        "false".to_owned()
    } else {
        all.join(" OR ")
    }
}

/// A name in which `*` stands for any run of characters, for LIKE.
pub(super) fn like(name: &str) -> String {
    let escaped = name.replace('\\', "\\\\").replace('_', "\\_").replace('%', "\\%");
    literal(&escaped.replace('*', "%"))
}

/// Does the policy merge the columns of the table `c` in the schema `n`? The first rule that fits decides.
fn merged_sql(policies: &Policies) -> String {
    if !policies.merges_columns() {
        return "false".to_owned();
    }
    let rules = policies.rules().iter().filter_map(|(name, policy)| {
        let (schema, table) = name.split_once('.')?;
        let (schema, table) = (like(schema), like(table));
        let merges = policy.columns.is_some();
        Some(format!(
            "WHEN n.nspname LIKE {schema} AND c.relname LIKE {table} THEN {merges}"
        ))
    });
    format!("CASE {} ELSE false END", rules.collect::<Vec<_>>().join(" "))
}

const ADOPT: &str = r#"CREATE FUNCTION anabranch.adopt_tables(before oid[]) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $f$
DECLARE
    daemon name := @DAEMON_NAME@;
    pub name := (SELECT publication FROM anabranch.node);
    t record;
    s record;
    problem text;
    privilege text;
    missing text[];
    undo text;
    capture text := current_setting('anabranch.capture', true);
BEGIN
    -- What follows is this node's own.
    PERFORM set_config('anabranch.capture', 'off', true);
    FOR t IN
        SELECT c.oid, n.nspname, c.relname, c.relpersistence FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence <> 't' AND c.oid <> ALL (before)
            AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'anabranch', 'anabranch_ddl', 'anabranch_join')
            AND (@INCLUDED@) AND NOT (@EXCLUDED@)
            AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
            AND NOT EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
                            WHERE p.pubname = pub AND r.prrelid = c.oid)
    LOOP
        IF t.relpersistence = 'u' THEN
            RAISE EXCEPTION 'table %.% is unlogged, its rows cannot be replicated', t.nspname, t.relname USING ERRCODE = '0A000',
                HINT = format('Make it LOGGED, or exclude it: add "!%s.%s" to postgres.tables and run `anabranch init`.', t.nspname, t.relname);
        END IF;
        EXECUTE format('ALTER PUBLICATION %I ADD TABLE ONLY %I.%I', pub, t.nspname, t.relname);
    END LOOP;
    -- One of that name may have been taken out here before: what others send of it was passed over.
    DELETE FROM anabranch.removed_table r USING pg_publication_tables p
        WHERE p.pubname = pub AND r.schema_name = p.schemaname AND r.table_name = p.tablename;
    FOR t IN
        SELECT c.oid, n.nspname, c.relname, c.relkind, c.relreplident, c.reltoastrelid <> 0 AS toasted,
            c.relkind = 'r' AND (@MERGED@) AS merged,
            EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND NOT a.attisdropped AND a.attgenerated = 's') AS stored,
            EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND NOT a.attisdropped AND a.attgenerated = 'v') AS virtual,
            (SELECT x.relname FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
             WHERE i.indrelid = c.oid AND i.indisreplident) AS identity_index
        FROM pg_publication_tables p JOIN pg_namespace n ON n.nspname = p.schemaname
        JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
        WHERE p.pubname = pub AND n.nspname <> 'anabranch'
    LOOP
        problem := (
            WITH RECURSIVE base AS (
                SELECT oid AS typ, oid AS base, typtype, typbasetype FROM pg_type
                WHERE oid IN (SELECT atttypid FROM pg_attribute WHERE attrelid = t.oid AND attnum > 0)
                UNION ALL
                SELECT b.typ, y.oid, y.typtype, y.typbasetype FROM base b JOIN pg_type y ON y.oid = b.typbasetype
                WHERE b.typtype = 'd')
            SELECT coalesce((
                SELECT CASE
                    WHEN count(*) = 0 THEN 'has no primary key'
                    WHEN bool_or(NOT i.indimmediate) THEN 'has a DEFERRABLE primary key'
                    WHEN bool_or(a.attgenerated <> '') THEN 'has a generated column in its primary key'
                    WHEN bool_or(NOT coalesce(l.collisdeterministic, true)) THEN 'has a nondeterministic collation in its primary key'
                    WHEN bool_or(y.typtype <> 'e' AND NOT (y.typnamespace = 'pg_catalog'::regnamespace
                        AND y.typname IN ('numeric', @KEY_TYPES@))) THEN 'has a primary key of a type in which equal values can look different'
                    END
                FROM pg_index i
                CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, place)
                JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
                JOIN base b ON b.typ = a.atttypid AND b.typtype <> 'd'
                JOIN pg_type y ON y.oid = b.base
                LEFT JOIN pg_collation l ON l.oid = a.attcollation
                WHERE i.indrelid = t.oid AND i.indisprimary AND k.place <= i.indnkeyatts
            ), (
                SELECT CASE m.what
                    WHEN 'number' THEN format('has a column %I of type %s, whose values are numbers that mean other objects at other nodes', m.attname, m.type_name)
                    WHEN 'no form' THEN format('has a column %I of type %s, which is made of a type without a binary form', m.attname, m.type_name)
                    WHEN 'beside' THEN format('has a column %I of type %s, an array or a domain, beside a column of a type without a binary form', m.attname, m.type_name)
                    ELSE format('has a column %I of a domain that refuses NULL (%s), and is generated or has no binary form', m.attname, m.type_name) END
                FROM (
                    SELECT a.attnum, a.attname, format_type(a.atttypid, a.atttypmod) AS type_name, @MISFIT@ AS what
                    FROM pg_attribute a JOIN base b ON b.typ = a.atttypid AND b.typtype <> 'd' JOIN pg_type y ON y.oid = b.base
                    LEFT JOIN pg_type e ON e.oid = y.typelem AND y.typcategory = 'A'
                    WHERE a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped) AS m
                WHERE m.what IS NOT NULL ORDER BY m.attnum LIMIT 1)));
        IF problem IS NULL AND t.toasted AND t.virtual THEN
            problem := 'has virtual generated columns and columns that may be stored out of line';
        END IF;
        IF problem IS NULL AND t.merged AND t.virtual THEN
            problem := 'has virtual generated columns, and the policy merges its columns';
        END IF;
        IF problem IS NOT NULL THEN
            RAISE EXCEPTION 'table %.% %: it cannot be replicated', t.nspname, t.relname, problem USING ERRCODE = '0A000',
                HINT = format('Change the statement, or exclude the table: add "!%s.%s" to postgres.tables of every node and run `anabranch init`.', t.nspname, t.relname);
        END IF;
        IF (t.toasted AND t.relkind = 'r' OR t.merged) AND t.relreplident <> 'f' THEN
            INSERT INTO anabranch.identity_before VALUES (t.nspname, t.relname, t.relreplident, t.identity_index) ON CONFLICT DO NOTHING;
            EXECUTE format('ALTER TABLE %I.%I REPLICA IDENTITY FULL', t.nspname, t.relname);
        END IF;
        -- Not where it is so already: the publication would count as changed.
        IF (t.toasted OR t.merged) AND t.stored AND current_setting('server_version_num')::int >= 180000
            AND (SELECT to_jsonb(p) ->> 'pubgencols' FROM pg_catalog.pg_publication p WHERE p.pubname = pub) IS DISTINCT FROM 's' THEN
            EXECUTE format('ALTER PUBLICATION %I SET (publish_generated_columns = stored)', pub);
        END IF;
        IF NOT has_schema_privilege(daemon, t.nspname, 'USAGE') THEN
            EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', t.nspname, daemon);
            INSERT INTO anabranch.undo VALUES (format('REVOKE USAGE ON SCHEMA %I FROM %I;', t.nspname, daemon), false, t.nspname, NULL)
                ON CONFLICT DO NOTHING;
        END IF;
        missing := ARRAY(SELECT p FROM unnest(string_to_array('@PRIVILEGES@', ', ')) p WHERE NOT has_table_privilege(daemon, t.oid, p));
        IF missing <> '{}' THEN
            privilege := array_to_string(missing, ', ');
            EXECUTE format('GRANT %s ON TABLE %I.%I TO %I', privilege, t.nspname, t.relname, daemon);
            undo := format('REVOKE %s ON TABLE %I.%I FROM %I;', privilege, t.nspname, t.relname, daemon);
            INSERT INTO anabranch.undo VALUES (undo, false, t.nspname, t.relname) ON CONFLICT DO NOTHING;
        END IF;
        FOR s IN
            SELECT DISTINCT n.nspname, c.relname, ARRAY(SELECT p FROM unnest(ARRAY['SELECT', 'UPDATE']) p
                WHERE NOT has_sequence_privilege(daemon, c.oid, p)) AS lacks
            FROM (@USES@) u JOIN pg_class c ON c.oid = u.seq AND c.relkind = 'S' JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE u.rel = t.oid AND n.nspname <> 'anabranch' AND pg_has_role(c.relowner, 'USAGE')
        LOOP
            CONTINUE WHEN s.lacks = '{}';
            privilege := array_to_string(s.lacks, ', ');
            EXECUTE format('GRANT %s ON SEQUENCE %I.%I TO %I', privilege, s.nspname, s.relname, daemon);
            undo := format('REVOKE %s ON SEQUENCE %I.%I FROM %I;', privilege, s.nspname, s.relname, daemon);
            INSERT INTO anabranch.undo VALUES (undo, false, s.nspname, s.relname) ON CONFLICT DO NOTHING;
        END LOOP;
    END LOOP;
    PERFORM set_config('anabranch.capture', coalesce(capture, ''), true);
END $f$;"#;

/// Why a statement was not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The server's words.
    #[error("{}", crate::error::sql(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// Nothing is set up for this role here.
    #[error(
        "this node runs no DDL as role {0}: name it in ddl.roles of the configuration and run `anabranch init` with it (again, if \
         it is named: the functions that it made are not as it makes them)"
    )]
    NotLet(String),
    /// Constraints that merging could break, columns that could not be merged any more, or unique keys without claims.
    #[error(
        "the policy would not fit the tables any more:\n{0}\nchange the policy first: a constraint may come at any time after it"
    )]
    Unfit(String),
}

/// The function that runs statements as `$2`, as `init` made it; and the tables there are.
const BEFORE: &str = "SELECT EXISTS (SELECT FROM pg_proc p JOIN pg_roles r ON r.oid = p.proowner \
        WHERE p.oid = to_regprocedure($1 || '(text, text)') AND p.prosecdef AND r.rolname = $2 AND NOT r.rolsuper), \
    to_regprocedure('anabranch.adopt_tables(oid[])') IS NOT NULL AND to_regprocedure('anabranch.check_new_rows(oid[])') IS NOT NULL, \
    t.oids, t.widths, current_setting('row_security') FROM (SELECT array_agg(oid ORDER BY oid) AS oids, array_agg(relnatts ORDER BY oid) AS widths \
    FROM pg_class WHERE relkind IN ('r', 'p')) AS t";

/// What code may set for the session that it runs in, but for what [`run`] sets around it, and what only the begin of a transaction says.
/// `temp_buffers` stays as code left it: the server sets it to nothing else once the session has used a temporary table, and no table of
/// ours is one.
const SETTINGS: &str = "SELECT jsonb_object_agg(name, setting)::text FROM pg_settings WHERE context = 'user' \
    AND name NOT IN ('row_security', 'temp_buffers', 'transaction_isolation', 'transaction_read_only', 'transaction_deferrable')";
/// Sets again what is not as it was.
const SET_AGAIN: &str = "WITH was AS MATERIALIZED (SELECT $1::text::jsonb AS known) \
    SELECT count(set_config(s.name, was.known ->> s.name, false)) FROM was, pg_settings s \
    WHERE jsonb_exists(was.known, s.name) AND s.setting IS DISTINCT FROM (was.known ->> s.name)";

/// The tables that were there before a statement, and how many columns each had or has had.
#[derive(Debug, Clone)]
pub struct Before {
    tables: Vec<u32>,
    widths: Vec<i16>,
}

/// Runs a statement in the open transaction with the rights of `role`, and brings the publication up to date. With `check_rows`,
/// refuses one that publishes a table with rows: not where the origin let it pass, being of a release that did not look.
///
/// # Errors
/// What stands in the way; the transaction is of no use any more.
pub async fn run(
    client: &Client,
    role: &str,
    command: &str,
    search_path: &str,
    check_rows: bool,
) -> Result<Before, RunError> {
    let runner = runner(role);
    let row = client.query_one(BEFORE, &[&runner, &role]).await?;
    if !row.try_get(0)? || !row.try_get(1)? {
        return Err(RunError::NotLet(role.to_owned()));
    }
    let published: Vec<u32> = client
        .query_one("SELECT anabranch.published_tables()", &[])
        .await?
        .try_get(0)?;
    let before = Before {
        tables: row.try_get(2)?,
        widths: row.try_get(3)?,
    };
    let of_others: String = row.try_get(4)?;
    let settings: String = client.query_one(SETTINGS, &[]).await?.try_get(0)?;
    // As in a session of the role's own: what the statement reads is what the role may see. Ours are otherwise (`pg::PINNED_OPTIONS`).
    client.batch_execute("SET LOCAL row_security = on").await?;
    client
        .execute(&format!("SELECT {runner}($1, $2)"), &[&command, &search_path])
        .await?;
    // A SET of code that the statement ran outlives the function, and this session has other rights than its role.
    client
        .batch_execute(&format!(
            "SET search_path = {SEARCH_PATH}; SET LOCAL row_security = off"
        ))
        .await?;
    client.execute(SET_AGAIN, &[&settings]).await?;
    client
        .execute("SELECT anabranch.adopt_tables($1)", &[&before.tables])
        .await?;
    if check_rows {
        client
            .execute("SELECT anabranch.check_new_rows($1)", &[&published])
            .await?;
    }
    // Rows of the same transaction may follow (`pg::ROW_SECURITY_OF_OTHERS`).
    client
        .execute("SELECT set_config('row_security', $1, true)", &[&of_others])
        .await?;
    Ok(before)
}

/// Notes which columns a statement of another node has added, behind [`run`]: `id` names it, and its transaction ended at `place` of
/// `origin`'s stream.
///
/// # Errors
/// What stands in the way; the transaction is of no use any more.
pub async fn note_columns(
    client: &Client,
    before: &Before,
    id: &str,
    (origin, place): (NodeId, Position),
) -> Result<(), RunError> {
    let (origin, epoch) = (i32::from(origin.0), i64::from(place.epoch));
    let lsn = PgLsn::from(place.lsn.0);
    client
        .execute(
            "SELECT anabranch.note_columns($1, $2, $3::text::uuid, $4, $5, $6)",
            &[&before.tables, &before.widths, &id, &origin, &epoch, &lsn],
        )
        .await?;
    Ok(())
}

/// As after a statement that was done by hand: as `init` does, takes in all tables that are chosen, whoever made them.
///
/// # Errors
/// When a table cannot be replicated any more.
pub async fn adopt(client: &Client) -> Result<(), RunError> {
    let row = client
        .query_one(
            "SELECT to_regprocedure('anabranch.adopt_tables(oid[])') IS NOT NULL",
            &[],
        )
        .await?;
    if row.try_get(0)? {
        client.execute("SELECT anabranch.adopt_tables('{}')", &[]).await?;
    }
    Ok(())
}

/// A statement that travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// Its id.
    pub id: String,
    /// Sequences that columns of replicated tables take values from since, as `schema.name`: each node is to divide them.
    pub sequences: Vec<String>,
}

/// Sequences that columns of replicated tables take values from, by oid.
async fn sequences(sql: &Client) -> Result<BTreeMap<u32, String>, tokio_postgres::Error> {
    let row = sql
        .query_one("SELECT publication::text FROM anabranch.node", &[])
        .await?;
    let tables = sequence::published(sql, row.try_get(0)?).await?;
    let tables: Vec<u32> = tables.into_iter().collect();
    let used = format!(
        "SELECT DISTINCT c.oid, n.nspname || '.' || c.relname FROM ({}) u \
         JOIN pg_class c ON c.oid = u.seq AND c.relkind = 'S' JOIN pg_namespace n ON n.oid = c.relnamespace \
         WHERE n.nspname <> 'anabranch' AND u.rel = ANY ($1)",
        sequence::USES
    );
    let rows = sql.query(&used, &[&tables]).await?;
    rows.iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect()
}

/// Unique keys that the nodes can decide otherwise, where the policy does not accept that.
async fn unclaimed(
    sql: &Client,
    policies: &Policies,
) -> Result<Vec<(pairwise::Place, Finding)>, tokio_postgres::Error> {
    let row = sql
        .query_one("SELECT publication::text FROM anabranch.node", &[])
        .await?;
    let compared = unique_keys(sql).await?;
    pairwise::placed(sql, row.try_get(0)?, policies, &compared).await
}

/// Runs a statement here, as [`run`], and lets it travel. Refuses one that makes a constraint which merging
/// columns by `policies` could break, after which a column could not be merged as they say, or that gives one with a rule another type; and
/// one that makes a unique key which the nodes can decide otherwise.
///
/// # Errors
/// What stands in the way; then nothing has happened.
pub async fn say(
    client: &mut Client,
    role: &str,
    command: &str,
    search_path: &str,
    lock_timeout_ms: u64,
    policies: &Policies,
) -> Result<Said, RunError> {
    let transaction = client.build_transaction().read_only(false).start().await?;
    let sql = transaction.client();
    sql.batch_execute(&format!("SET LOCAL lock_timeout = {lock_timeout_ms}"))
        .await?;
    sql.execute("SELECT anabranch.check_ddl($1)", &[&command])
        .await
        .map_err(|error| match error.code() {
            Some(code) if *code == SqlState::UNDEFINED_FUNCTION => RunError::NotLet(role.to_owned()),
            _ => RunError::Sql(error),
        })?;
    let known = merged::misfits(sql, policies).await?;
    let had = unclaimed(sql, policies).await?;
    let types = merged::types(sql, policies).await?;
    let used = sequences(sql).await?;
    let before = run(sql, role, command, search_path, true).await?;
    let mut fresh = merged::misfits(sql, policies).await?;
    fresh.retain(|new| {
        !known
            .iter()
            .any(|old| (&old.check, &old.found) == (&new.check, &new.found))
    });
    // A table that has one already is alarmed, and is not in the way of what takes it away.
    let keys = unclaimed(sql, policies).await?;
    fresh.extend(pairwise::come_since(&had, keys));
    let now = merged::types(sql, policies).await?;
    fresh.extend(types.changed(&now, "take its rule out of the policy for as long"));
    let fresh: Vec<String> = fresh
        .iter()
        .map(|new| format!("  {}: {}; {}", new.check, new.found, new.remedy))
        .collect();
    if !fresh.is_empty() {
        return Err(RunError::Unfit(fresh.join("\n")));
    }
    sql.execute(
        "SELECT anabranch.check_new_columns($1, $2)",
        &[&before.tables, &before.widths],
    )
    .await?;
    let row = sql
        .query_one(
            &format!(
                "INSERT INTO anabranch.ddl (id, node_id, role, command, search_path, after_lsn, epoch) \
                 SELECT gen_random_uuid(), n.node_id, $1, $2, $3, pg_current_wal_insert_lsn(), {EPOCH} FROM anabranch.node n \
                 RETURNING id::text"
            ),
            &[&role, &command, &search_path],
        )
        .await?;
    let id: String = row.try_get(0)?;
    sql.execute(
        "SELECT anabranch.note_columns($1, $2, $3::text::uuid, NULL, NULL, NULL)",
        &[&before.tables, &before.widths, &id],
    )
    .await?;
    let mut fresh = sequences(sql).await?;
    fresh.retain(|oid, _| !used.contains_key(oid));
    let said = Said {
        id,
        sequences: fresh.into_values().collect(),
    };
    transaction.commit().await?;
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_become_like_with_nothing_but_the_star_special() {
        let patterns = ["public.*", "shop.a_b%", "!public.log_*"].map(str::to_owned);
        let rules =
            "[[table]]\nname = \"shop.log_*\"\n[[table]]\nname = \"shop.*\"\ncolumns = { n = \"delta\" }";
        let policies = Policies::parse(rules, &BTreeMap::new(), |_| Err(String::new())).unwrap();
        let sql = adopt_sql("it's", (&Patterns::parse(&patterns).unwrap(), &policies));
        let merged = r"CASE WHEN n.nspname LIKE 'shop' AND c.relname LIKE E'log\\_%' THEN false WHEN n.nspname LIKE 'shop' AND c.relname LIKE '%' THEN true ELSE false END";
        assert!(sql.contains(merged), "{sql}");
        let included = r"(n.nspname LIKE 'public' AND c.relname LIKE '%') OR (n.nspname LIKE 'shop' AND c.relname LIKE E'a\\_b\\%')";
        assert!(sql.contains(included), "{sql}");
        assert!(sql.contains(r"c.relname LIKE E'log\\_%'"), "{sql}");
        assert!(
            sql.contains("daemon name := 'it''s';") && !sql.contains('@'),
            "{sql}"
        );
    }

    #[test]
    fn each_role_has_a_function_of_its_own_and_only_named_ones_may_say() {
        let roles = ["app", "Shop Owner"].map(str::to_owned);
        let sql = script("anabranch", &roles, (&Patterns::default(), &Policies::default()));
        assert_ne!(runner("app"), runner("Shop Owner"));
        for role in &roles {
            let owner = format!(
                "ALTER FUNCTION {}(text, text) OWNER TO {};",
                runner(role),
                ident(role)
            );
            assert!(sql.contains(&owner), "{sql}");
        }
        assert!(sql.contains("ARRAY['app', 'Shop Owner']::name[]"), "{sql}");
    }

    #[test]
    fn a_name_does_not_end_the_function_that_it_stands_in() {
        let roles = ["app$f$".to_owned()];
        let patterns = Patterns::parse(&["public.a$f$".to_owned()]).unwrap();
        let sql = script("ana$f1$", &roles, (&patterns, &Policies::default()));
        for (begin, end) in [
            ("adopt_tables(before oid[])", "$f2$"),
            ("note_ddl(role name", "$f1$"),
        ] {
            let made = sql.split_once(begin).unwrap().1;
            assert!(made.contains(&format!("\nAS {end}\nDECLARE\n")), "{made}");
            let body = made.split(end).nth(1).unwrap();
            assert!(body.ends_with("END ") && body.contains("$f$'"), "{body}");
        }
    }
}
