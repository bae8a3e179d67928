//! The SQL objects that Anabranch keeps in a replicated database: schema `anabranch`.
//!
//! `progress`, `clock`, `member`, `sequence`, `ddl` and `policy_change` are in the publication, everything else is this node's own. Statements here are idempotent,
//! so `init` can be repeated, and each object is made by exactly one of them. The conflict log's are in [`super::conflict_log`].

use super::conflict_log::{HISTORY, OPEN, STORM, SUMMARY};

/// Layout of the objects below and of the functions for DDL, kept in `anabranch.node.format`. A release that changes them raises it and
/// brings the statements that lead from the version before. (2: `ddl.epoch`, `check_new_rows`, `published_tables`. 3: `added_column`,
/// `note_columns`.)
pub const FORMAT: i32 = 3;

/// What is to be done about a database whose layout is another one.
#[must_use]
pub const fn other_layout(format: i32) -> Option<&'static str> {
    if format < FORMAT {
        Some("run `anabranch init` of this release, which brings it up to date")
    } else if format > FORMAT {
        Some("run the release of Anabranch that made it, or a newer one")
    } else {
        None
    }
}

/// Tables whose changes travel in the node's stream.
pub const PUBLISHED: [&str; 6] = [
    "progress",
    "clock",
    "member",
    super::sequence::TABLE,
    super::ddl::TABLE,
    crate::policy_change::TABLE,
];

/// What an older release's `anabranch.sequence` lacks.
pub const SEQUENCE_METHOD: &str =
    "ALTER TABLE anabranch.sequence ADD COLUMN IF NOT EXISTS method text NOT NULL DEFAULT 'interleave';";

/// What an older release's `anabranch.ddl` lacks.
pub const DDL_EPOCH: &str =
    "ALTER TABLE anabranch.ddl ADD COLUMN IF NOT EXISTS epoch bigint NOT NULL DEFAULT 0;";

/// A table or view of ours: its name, and the statements that make it.
#[derive(Debug, Clone, Copy)]
pub struct Object {
    /// Name in schema `anabranch`.
    pub name: &'static str,
    /// What the daemon's role may do with it.
    pub privileges: &'static str,
    /// The statements, each ending in a semicolon.
    pub sql: &'static str,
}

/// The schema itself. Nobody but its owner, the daemon's role and the roles whose DDL travels can see into it.
pub const SCHEMA: &str = "CREATE SCHEMA IF NOT EXISTS anabranch;
COMMENT ON SCHEMA anabranch IS 'Anabranch: state of active-active replication. Written by its daemon only; `anabranch remove` takes it away.';";

/// Every table and view, in the order of making.
pub const OBJECTS: [Object; 20] = [
    NODE,
    PROGRESS,
    CLOCK,
    MEMBER,
    LEAVING,
    SEQUENCE,
    DDL,
    DDL_DONE,
    ADDED_COLUMN,
    POLICY_CHANGE,
    FENCE,
    HISTORY,
    STORM,
    OPEN,
    SUMMARY,
    QUARANTINE,
    IDENTITY,
    DEFAULT,
    REMOVED,
    UNDO,
];

const NODE: Object = Object {
    name: "node",
    privileges: "SELECT",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.node (
    node_id           int         PRIMARY KEY CHECK (node_id BETWEEN 1 AND 65535),
    name              text        NOT NULL,
    cluster_id        text        NOT NULL,
    incarnation       uuid        NOT NULL DEFAULT gen_random_uuid(),
    system_identifier text        NOT NULL,
    slot              text        NOT NULL,
    publication       text        NOT NULL,
    slot_start        pg_lsn,
    format            int         NOT NULL,
    created_at        timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE UNIQUE INDEX IF NOT EXISTS node_one_row ON anabranch.node ((true));
COMMENT ON TABLE anabranch.node IS 'Which node this database is. One row, fixed for the life of the node.';
COMMENT ON COLUMN anabranch.node.incarnation IS 'Made once by anabranch init: tells this database from another one under the same node id.';
COMMENT ON COLUMN anabranch.node.system_identifier IS 'The server that init ran on. A copy restored elsewhere has another, and is refused.';
COMMENT ON COLUMN anabranch.node.slot_start IS 'Where the logical slot began; null until init has made the slot.';
COMMENT ON COLUMN anabranch.node.format IS 'Version of the tables in this schema.';",
};

const PROGRESS: Object = Object {
    name: "progress",
    privileges: "SELECT, INSERT, UPDATE, DELETE",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.progress (
    origin int    PRIMARY KEY,
    epoch  bigint NOT NULL DEFAULT 0,
    lsn    pg_lsn NOT NULL DEFAULT '0/0',
    stamp  bytea  NOT NULL DEFAULT '\\x00000000000000000000'
) WITH (fillfactor = 50);
COMMENT ON TABLE anabranch.progress IS 'How far each member''s stream is applied here. The first statement of every apply transaction writes it: that is how the daemon knows its own transactions in the stream. Published; never write it by hand.';
COMMENT ON COLUMN anabranch.progress.origin IS 'Node id of the member whose stream it is. The row of the node itself stays at 0/0.';
COMMENT ON COLUMN anabranch.progress.epoch IS 'Timeline of the origin''s server.';
COMMENT ON COLUMN anabranch.progress.lsn IS 'End of the last applied commit record, in the origin''s WAL.';
COMMENT ON COLUMN anabranch.progress.stamp IS 'Highest stamp applied, ten bytes in order.';",
};

const CLOCK: Object = Object {
    name: "clock",
    privileges: "SELECT, INSERT, UPDATE, DELETE",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.clock (
    node_id    int         PRIMARY KEY,
    witness_us bigint      NOT NULL DEFAULT 0,
    written_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);
COMMENT ON TABLE anabranch.clock IS 'Clock witnesses: a time the members agree on, written every second. Bounds how far a wrong clock can push stamps. Published.';
COMMENT ON COLUMN anabranch.clock.witness_us IS 'Microseconds since 1970-01-01 UTC.';",
};

const MEMBER: Object = Object {
    name: "member",
    privileges: "SELECT, INSERT, UPDATE, DELETE",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.member (
    node_id     int         NOT NULL CHECK (node_id BETWEEN 1 AND 65535),
    fact        text        NOT NULL CHECK (fact IN ('founder', 'joined', 'ready', 'dropping', 'held', 'dropped')),
    name        text        NOT NULL,
    address     text        NOT NULL,
    incarnation text        NOT NULL DEFAULT '',
    epoch       bigint      NOT NULL DEFAULT 0,
    lsn         pg_lsn      NOT NULL DEFAULT '0/0',
    said_by     int         NOT NULL,
    said_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (node_id, fact, said_by, epoch, lsn)
);
COMMENT ON TABLE anabranch.member IS 'Who is a member: facts that only grow. They travel in the stream like rows, so that every member learns them at one place. Published; never write it by hand.';
COMMENT ON COLUMN anabranch.member.fact IS 'founder: there from the beginning (of each node''s own knowing, not sent). joined: a member that was copied. ready: takes writes. dropping: shall be no member any more; said by itself: it leaves. held: so far does the member that says it hold the stream of a node that is dropping; the furthest counts. dropped: no member any more, for ever; its stream ends at (epoch, lsn).';
COMMENT ON COLUMN anabranch.member.address IS 'host:port of its daemon, where no configuration says otherwise.';
COMMENT ON COLUMN anabranch.member.said_by IS 'Node id of the member that said so.';",
};

const LEAVING: Object = Object {
    name: "leaving",
    privileges: "SELECT, UPDATE",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.leaving (
    one     boolean     PRIMARY KEY DEFAULT true CHECK (one),
    since   timestamptz NOT NULL DEFAULT clock_timestamp(),
    left_at timestamptz
);
COMMENT ON TABLE anabranch.leaving IS 'Has a row once this node shall leave its cluster; written by `anabranch leave`. Not published.';
COMMENT ON COLUMN anabranch.leaving.since IS 'Sessions that began before this may still write; they are waited for.';
COMMENT ON COLUMN anabranch.leaving.left_at IS 'When it heard that the others had closed its stream. It is no member any more.';",
};

const SEQUENCE: Object = Object {
    name: super::sequence::TABLE,
    privileges: "SELECT, INSERT, UPDATE, DELETE",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.sequence (
    schema_name   text        NOT NULL,
    sequence_name text        NOT NULL,
    node_id       int         NOT NULL CHECK (node_id BETWEEN 1 AND 65535),
    increment     bigint      NOT NULL CHECK (increment > 0),
    base          bigint,
    said_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    method        text        NOT NULL DEFAULT 'interleave',
    PRIMARY KEY (schema_name, sequence_name, node_id)
);
COMMENT ON TABLE anabranch.sequence IS 'How each member divides each sequence; it writes only its own rows, by `anabranch sequences apply` and `anabranch join`. Published.';
COMMENT ON COLUMN anabranch.sequence.increment IS 'It hands out only values that leave its node id as the remainder when divided by this.';
COMMENT ON COLUMN anabranch.sequence.method IS 'interleave; range: it hands out only values from its node id times increment on, increment of them; snowflake: its columns take ids from anabranch.snowflake() instead.';
COMMENT ON COLUMN anabranch.sequence.base IS 'Highest value that it may have handed out by another rule before; the others begin above it. Null where there was none.';",
};

const DDL: Object = Object {
    name: super::ddl::TABLE,
    privileges: "SELECT, INSERT, UPDATE, DELETE",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.ddl (
    id          uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    node_id     int         NOT NULL,
    role        text        NOT NULL,
    command     text        NOT NULL,
    search_path text        NOT NULL,
    after_lsn   pg_lsn      NOT NULL,
    said_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    epoch       bigint      NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS ddl_said_at ON anabranch.ddl (said_at);
COMMENT ON TABLE anabranch.ddl IS 'DDL that travels: a row is run by every other node when it comes to it in the stream. Written by `anabranch ddl` and anabranch.replicate_ddl. Published; never write it by hand.';
COMMENT ON COLUMN anabranch.ddl.node_id IS 'Node that it was run at first.';
COMMENT ON COLUMN anabranch.ddl.role IS 'As whom it is run, at every node.';
COMMENT ON COLUMN anabranch.ddl.after_lsn IS 'A place in that node''s WAL before its commit.';
COMMENT ON COLUMN anabranch.ddl.epoch IS 'The timeline of that place; 0 where an older release said it.';",
};

const DDL_DONE: Object = Object {
    name: "ddl_done",
    privileges: "SELECT, INSERT",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.ddl_done (
    id      uuid        PRIMARY KEY,
    done_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE anabranch.ddl_done IS 'DDL of other nodes that was done by hand at this one: it is passed over. Written by `anabranch ddl --done`. Not published.';",
};

const ADDED_COLUMN: Object = Object {
    name: super::ddl::ADDED,
    privileges: "SELECT, INSERT, UPDATE, DELETE",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.added_column (
    rel     oid    NOT NULL,
    attnum  int2   NOT NULL,
    ddl     uuid   NOT NULL,
    node_id int    NOT NULL,
    epoch   bigint,
    lsn     pg_lsn,
    value   text,
    PRIMARY KEY (rel, attnum)
);
COMMENT ON TABLE anabranch.added_column IS 'Columns that DDL of anabranch.ddl added to replicated tables: a row that was written before its node had run that has the value that the statement gave to the rows it found. Not published.';
COMMENT ON COLUMN anabranch.added_column.node_id IS 'Node that said the statement.';
COMMENT ON COLUMN anabranch.added_column.epoch IS 'Timeline of lsn; null with it.';
COMMENT ON COLUMN anabranch.added_column.lsn IS 'Where its transaction ended there. Null at that node until its stream was read so far.';
COMMENT ON COLUMN anabranch.added_column.value IS 'What the rows have in it that were there, as text; pg_attribute.attmissingval goes before it.';",
};

const POLICY_CHANGE: Object = Object {
    name: crate::policy_change::TABLE,
    privileges: "SELECT, INSERT, UPDATE, DELETE",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.policy_change (
    change_id  uuid        NOT NULL,
    fact       text        NOT NULL CHECK (fact IN ('asked', 'voted', 'passed', 'done', 'switched')),
    node_id    int         NOT NULL CHECK (node_id BETWEEN 1 AND 65535),
    asked_by   int         NOT NULL,
    ready      boolean     NOT NULL DEFAULT true,
    body       text        NOT NULL DEFAULT '',
    number     bigint      NOT NULL DEFAULT 0,
    point_node int         NOT NULL DEFAULT 0,
    epoch      bigint      NOT NULL DEFAULT 0,
    lsn        pg_lsn      NOT NULL DEFAULT '0/0',
    said_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (change_id, fact, node_id)
);
COMMENT ON TABLE anabranch.policy_change IS 'Changes of the policy while the cluster runs: facts that only grow. They travel in the stream like rows. Written by `anabranch policy change` and the daemons. Published; never write it by hand.';
COMMENT ON COLUMN anabranch.policy_change.fact IS 'asked: both policies, in body. voted: ready, or not, and why; of the node that asked, last of all: the change is made here in its stream, or is off. passed: the node has come to that place (point_node, epoch, lsn). done: it needs the former policy no more. switched: it runs with the new one alone.';
COMMENT ON COLUMN anabranch.policy_change.node_id IS 'Node that says so.';",
};

const FENCE: Object = Object {
    name: "fence",
    privileges: "SELECT, INSERT, UPDATE, DELETE",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.fence (
    id int    PRIMARY KEY,
    n  bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
INSERT INTO anabranch.fence (id) VALUES (1) ON CONFLICT DO NOTHING;
COMMENT ON TABLE anabranch.fence IS 'A tiny synchronous write here makes the server flush its WAL, so that the decoder sees every commit before it. Not published.';",
};

const QUARANTINE: Object = Object {
    name: "quarantine",
    privileges: "SELECT, INSERT, UPDATE, DELETE",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.quarantine (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    schema_name text        NOT NULL,
    table_name  text        NOT NULL,
    key_bytes   bytea       NOT NULL,
    key         jsonb       NOT NULL,
    origin      int         NOT NULL,
    epoch       bigint      NOT NULL,
    lsn         pg_lsn      NOT NULL,
    stamp       bytea       NOT NULL,
    change      bytea       NOT NULL,
    sqlstate    text        NOT NULL,
    message     text        NOT NULL,
    detail      text,
    first_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    attempts    int         NOT NULL DEFAULT 1,
    UNIQUE (schema_name, table_name, key_bytes)
);
COMMENT ON TABLE anabranch.quarantine IS 'Rows that this server refuses (a CHECK, a missing column, a type), with the error. Tried again until they fit; nothing else waits for them. Not published.';
COMMENT ON COLUMN anabranch.quarantine.key_bytes IS 'Canonical bytes of the primary key.';
COMMENT ON COLUMN anabranch.quarantine.change IS 'The encoded change with the description of its table.';
COMMENT ON COLUMN anabranch.quarantine.attempts IS 'How often it was tried.';",
};

const IDENTITY: Object = Object {
    name: "identity_before",
    privileges: "SELECT",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.identity_before (
    schema_name text NOT NULL,
    table_name  text NOT NULL,
    identity    text NOT NULL CHECK (identity IN ('d', 'n', 'f', 'i')),
    index_name  text,
    PRIMARY KEY (schema_name, table_name)
);
COMMENT ON TABLE anabranch.identity_before IS 'Replica identities that init changed, as they were (pg_class.relreplident); remove restores them.';",
};

const DEFAULT: Object = Object {
    name: "default_before",
    privileges: "SELECT",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.default_before (
    schema_name text NOT NULL,
    table_name  text NOT NULL,
    column_name text NOT NULL,
    restore     text NOT NULL,
    PRIMARY KEY (schema_name, table_name, column_name)
);
COMMENT ON TABLE anabranch.default_before IS 'Columns that were given snowflake ids, and the statements that give them what they had; remove runs those. Not published.';",
};

const REMOVED: Object = Object {
    name: super::tables::remove::REMOVED,
    privileges: "SELECT",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.removed_table (
    schema_name text        NOT NULL,
    table_name  text        NOT NULL,
    removed_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (schema_name, table_name)
);
COMMENT ON TABLE anabranch.removed_table IS 'Tables that were taken out of replication here: what other nodes still send of them is passed over. Written by `anabranch tables remove`; `tables add`, `init` and DDL that makes it anew take a table out again. Not published.';",
};

const UNDO: Object = Object {
    name: "undo",
    privileges: "SELECT",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.undo (
    statement   text    PRIMARY KEY,
    server_wide boolean NOT NULL,
    on_schema   text,
    on_table    text
);
COMMENT ON TABLE anabranch.undo IS 'What takes back the privileges that init granted; remove runs it.';",
};
