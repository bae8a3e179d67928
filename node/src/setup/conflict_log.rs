//! The SQL objects of the conflict log: the table in partitions by week, its views, its upkeep, who may review it.
//!
//! Invariants: 1. a line's partition follows from the losing version alone (`lost_at`, the time of its stamp), so that
//!        `(conflict_id, lost_at)` is as unique as `conflict_id` is, across partitions. 2. lines go by partition once
//!        every one of them was detected longer ago than the retention.
//! Not here: writing lines (`crate::apply`), reading and reviewing them (`crate::review`)

use super::objects::Object;

/// The role that reads the log and marks its lines; a person's role is made a member of it.
pub const REVIEWER: &str = "anabranch_reviewer";

/// What a reviewer may do, as `GRANT` wants it: (privileges, object).
pub const REVIEWER_MAY: [(&str, &str); 8] = [
    ("USAGE", "SCHEMA anabranch"),
    ("SELECT", "anabranch.conflict_history"),
    (
        "UPDATE (status, reviewed_by, reviewed_at, note)",
        "anabranch.conflict_history",
    ),
    ("SELECT", "anabranch.conflict_storm"),
    ("SELECT", "anabranch.conflict_open"),
    ("SELECT", "anabranch.conflict_summary"),
    ("SELECT", "anabranch.node"),
    // What the nodes are called, the gone ones included.
    ("SELECT", "anabranch.member"),
];

/// Lines by which somebody is still to delete a row, or to restore its parent: nothing else says so.
macro_rules! to_do {
    () => {
        "status = 'new' AND note IS NULL AND conflict_type = 'foreign_key_missing' \
         AND conflict_resolution IN ('delete_child', 'restore_parent')"
    };
}

/// Whose row such a line is about.
macro_rules! writer {
    () => {
        "CASE loser WHEN 'local' THEN coalesce(local_origin, remote_origin) ELSE coalesce(remote_origin, local_origin) END"
    };
}

/// A condition in SQL: by this line somebody is still to delete a row, or to restore its parent.
pub(crate) const TO_DO: &str = to_do!();

/// In SQL: the node that is to do it, which wrote the line's row.
pub(crate) const WRITER: &str = writer!();

/// How the function that makes partitions and drops them is made.
macro_rules! upkeep_made {
    () => {
        "LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET lock_timeout = '300ms'"
    };
}

/// Its body. It says in its first line how it is made, so whatever is changed of either, an installation that has it otherwise is told by it.
macro_rules! upkeep_body {
    () => {
        concat!(
            "\n-- ",
            upkeep_made!(),
            "
DECLARE
    week timestamptz;
    part text;
    did  text[] := '{}';
    -- Lines by which this node is still to delete a row, or to restore its parent: nothing else says so.
    kept text := format($k$(",
            to_do!(),
            "
        AND ",
            writer!(),
            " = %s)$k$,
        coalesce((SELECT n.node_id FROM anabranch.node AS n), 0));
BEGIN
    IF NOT has_table_privilege(session_user, 'anabranch.progress', 'UPDATE') THEN
        RAISE insufficient_privilege USING MESSAGE = 'anabranch.conflict_upkeep is for the daemon only';
    END IF;
    FOR week IN SELECT date_trunc('week', at) + n * interval '7 days' FROM generate_series(0, 2) AS n LOOP
        part := 'conflict_history_p' || to_char(week, 'YYYYMMDD');
        CONTINUE WHEN to_regclass('anabranch.' || part) IS NOT NULL;
        LOCK TABLE anabranch.conflict_history, anabranch.conflict_history_rest IN ACCESS EXCLUSIVE MODE;
        EXECUTE format('CREATE TABLE anabranch.%I (LIKE anabranch.conflict_history INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', part);
        EXECUTE format('WITH moved AS (DELETE FROM anabranch.conflict_history_rest WHERE lost_at >= %L AND lost_at < %L
            RETURNING *) INSERT INTO anabranch.%I SELECT * FROM moved', week, week + interval '7 days', part);
        EXECUTE format('ALTER TABLE anabranch.conflict_history ATTACH PARTITION anabranch.%I FOR VALUES FROM (%L) TO (%L)',
            part, week, week + interval '7 days');
        did := did || ('made ' || part);
    END LOOP;
    FOR part IN SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'anabranch.conflict_history'::regclass AND c.relname ~ '^conflict_history_p[0-9]{8}$'
          AND to_date(right(c.relname, 8), 'YYYYMMDD') + 7 < at - retention ORDER BY 1
    LOOP
        EXECUTE format('ALTER TABLE anabranch.conflict_history DETACH PARTITION anabranch.%I', part);
        -- Writes of long ago that were found to have lost only lately stay.
        EXECUTE format('INSERT INTO anabranch.conflict_history SELECT h.* FROM anabranch.%I AS h WHERE h.detected_at >= %L OR %s',
            part, at - retention, kept);
        EXECUTE format('DROP TABLE anabranch.%I', part);
        did := did || ('dropped ' || part);
    END LOOP;
    EXECUTE format('DELETE FROM anabranch.conflict_history_rest AS h WHERE greatest(h.detected_at, h.lost_at) < %L AND NOT coalesce(%s, false)',
        at - retention, kept);
    RETURN did;
END
"
        )
    };
}

/// All of it. Every init but that of an older release makes it so.
macro_rules! upkeep {
    () => {
        concat!(
            "CREATE OR REPLACE FUNCTION anabranch.conflict_upkeep(at timestamptz, retention interval) RETURNS text[]\n",
            upkeep_made!(),
            " AS $f$",
            upkeep_body!(),
            "$f$;
COMMENT ON FUNCTION anabranch.conflict_upkeep(timestamptz, interval) IS 'Makes the partitions of the next weeks and drops those past the retention. Called by the daemon.';\n"
        )
    };
}

/// Makes it so where another release has made it. (Older ones let lines go by which something was still to be done, or took a session's
/// temporary tables for the server's own, with the rights of who ran `init`.)
pub(super) const UPKEEP: &str = upkeep!();

/// What the server has of it (`pg_proc.prosrc`), if it is this one.
pub(super) const UPKEEP_BODY: &str = upkeep_body!();

/// The log itself. Made together with its partitions for this week and the next two.
pub(super) const HISTORY: Object = Object {
    name: "conflict_history",
    privileges: "SELECT, INSERT, UPDATE, DELETE",
    sql: concat!(
        "CREATE TABLE IF NOT EXISTS anabranch.conflict_history (
    conflict_id         uuid        NOT NULL,
    lost_at             timestamptz NOT NULL DEFAULT clock_timestamp(),
    detected_at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    node                text        NOT NULL,
    node_id             int         NOT NULL,
    schema_name         text        NOT NULL,
    table_name          text        NOT NULL,
    key                 jsonb       NOT NULL,
    conflict_type       text        NOT NULL,
    policy              text        NOT NULL,
    policy_version      text,
    conflict_resolution text        NOT NULL,
    loser               text        NOT NULL CHECK (loser IN ('local', 'remote', 'both')),
    local_tuple         jsonb,
    remote_tuple        jsonb,
    applied_tuple       jsonb,
    changed_columns     text[],
    lost_columns        text[],
    redacted_columns    text[],
    local_origin        int,
    local_xid           bigint,
    local_lsn           pg_lsn,
    local_commit_time   timestamptz,
    local_stamp         text,
    local_saw           pg_lsn,
    remote_origin       int,
    remote_xid          bigint,
    remote_lsn          pg_lsn,
    remote_commit_time  timestamptz,
    remote_stamp        text,
    remote_saw          pg_lsn,
    transaction_group   text,
    apply_xid           bigint,
    constraint_name     text,
    error               jsonb,
    status              text        NOT NULL DEFAULT 'new' CHECK (status IN ('new', 'acknowledged', 'replayed', 'dismissed')),
    reviewed_by         text,
    reviewed_at         timestamptz,
    note                text,
    PRIMARY KEY (conflict_id, lost_at)
) PARTITION BY RANGE (lost_at);
CREATE TABLE IF NOT EXISTS anabranch.conflict_history_rest PARTITION OF anabranch.conflict_history DEFAULT;
CREATE INDEX IF NOT EXISTS conflict_history_time ON anabranch.conflict_history (detected_at);
CREATE INDEX IF NOT EXISTS conflict_history_table ON anabranch.conflict_history (schema_name, table_name, detected_at);
CREATE INDEX IF NOT EXISTS conflict_history_new ON anabranch.conflict_history (detected_at) WHERE status = 'new';
CREATE INDEX IF NOT EXISTS conflict_history_key ON anabranch.conflict_history USING gin (key jsonb_path_ops);
CREATE INDEX IF NOT EXISTS conflict_history_group ON anabranch.conflict_history (transaction_group);
COMMENT ON TABLE anabranch.conflict_history IS 'Every write that lost against a concurrent one, and every row that could not be applied. Each node keeps its own; a losing write has the same conflict_id on all of them. Not published.';
COMMENT ON COLUMN anabranch.conflict_history.conflict_id IS 'Made from table, key and losing version (and the foreign key that refers to nothing): the same on every node.';
COMMENT ON COLUMN anabranch.conflict_history.lost_at IS 'Time of the losing version''s stamp; the partition follows from it.';
COMMENT ON COLUMN anabranch.conflict_history.key IS 'Primary key as {\"column\": value}.';
COMMENT ON COLUMN anabranch.conflict_history.conflict_type IS 'As PostgreSQL 18 names them: insert_exists, update_origin_differs, update_deleted, delete_origin_differs, delete_missing, multiple_unique_conflicts; and others of ours (never update_exists or update_missing: docs/conflicts.md). clock_drift: one of these between which the time decided, and that was not the time of a commit; error says more.';
COMMENT ON COLUMN anabranch.conflict_history.policy IS 'Who wins, by which rule.';
COMMENT ON COLUMN anabranch.conflict_history.policy_version IS 'Version of the policy in force.';
COMMENT ON COLUMN anabranch.conflict_history.conflict_resolution IS 'apply_remote, keep_local, merge or skip; of a row without its parent keep, delete_child or restore_parent.';
COMMENT ON COLUMN anabranch.conflict_history.loser IS 'Whose write was lost: local, remote or both; of foreign_key_missing the side that has the row.';
COMMENT ON COLUMN anabranch.conflict_history.local_tuple IS 'The row as it was here; null when there was none. {\"unread_bytes\": .., \"type\": ..} or {\"unread_text\": .., \"type\": ..} in the place of a value: no table here could read it, or jsonb does not take it, or it is the null of JSON. Generated columns are left out. {\"too_long\": bytes, \"type\": ..}: the line would have been too long.';
COMMENT ON COLUMN anabranch.conflict_history.remote_tuple IS 'The row as it came in; null for a delete.';
COMMENT ON COLUMN anabranch.conflict_history.applied_tuple IS 'The row as it is after the resolution, folded of all its versions where columns are merged; null when it is gone.';
COMMENT ON COLUMN anabranch.conflict_history.changed_columns IS 'Columns in which the two rows differ; all of them where one side has no row.';
COMMENT ON COLUMN anabranch.conflict_history.lost_columns IS 'Columns whose value in the losing row is not in the applied one.';
COMMENT ON COLUMN anabranch.conflict_history.redacted_columns IS 'Columns that were not written to the log, by conflict_log.redact.';
COMMENT ON COLUMN anabranch.conflict_history.local_origin IS 'Node id that made the local version.';
COMMENT ON COLUMN anabranch.conflict_history.local_stamp IS '16 hexadecimal digits (NTP64 time), a dot, node id. Compares as text between equal node ids; the time decides first.';
COMMENT ON COLUMN anabranch.conflict_history.local_saw IS 'How much of remote_origin the local transaction had seen: less than remote_lsn.';
COMMENT ON COLUMN anabranch.conflict_history.remote_saw IS 'How much of local_origin the remote transaction had seen: less than local_lsn.';
COMMENT ON COLUMN anabranch.conflict_history.transaction_group IS 'The stamp of the losing transaction: other rows of it that lost have the same one, on every node.';
COMMENT ON COLUMN anabranch.conflict_history.apply_xid IS 'Transaction on this server that applied the resolution.';
COMMENT ON COLUMN anabranch.conflict_history.constraint_name IS 'Constraint or unique index that the row broke.';
COMMENT ON COLUMN anabranch.conflict_history.error IS '{\"sqlstate\", \"message\", \"detail\", \"context\"} of a row that the server refused; or why the row lost, where that was not the policy alone. Of clock_drift also conflict_type: what it is but for the times.';
COMMENT ON COLUMN anabranch.conflict_history.status IS 'new, acknowledged, replayed or dismissed. Of this node''s line alone.';
",
        upkeep!(),
        "SELECT anabranch.conflict_upkeep(clock_timestamp(), '100 years');"
    ),
};

/// The index by which the lines of one transaction are found.
pub(super) const GROUP_INDEX: &str = "conflict_history_group";

/// Makes it where an older release has made the log. Nothing but the time that a look-up takes depends on it, so the layout is the same
/// with and without. No lines are written while it is made.
pub(super) const INDEX_GROUPS: &str =
    "CREATE INDEX IF NOT EXISTS conflict_history_group ON anabranch.conflict_history (transaction_group);";

/// What was counted and not kept while conflicts came faster than the log's limit.
pub(super) const STORM: Object = Object {
    name: "conflict_storm",
    privileges: "SELECT, INSERT, UPDATE, DELETE",
    sql: "CREATE TABLE IF NOT EXISTS anabranch.conflict_storm (
    minute         timestamptz NOT NULL,
    schema_name    text        NOT NULL,
    table_name     text        NOT NULL,
    conflict_type  text        NOT NULL,
    losing_origin  int         NOT NULL,
    winning_origin int         NOT NULL,
    count          bigint      NOT NULL,
    PRIMARY KEY (minute, schema_name, table_name, conflict_type, losing_origin, winning_origin)
);
COMMENT ON TABLE anabranch.conflict_storm IS 'Losing writes that are only counted: conflicts came faster than conflict_log.lines_per_second for longer than conflict_log.burst_lines lasted. Their values are not kept here. Not published.';
COMMENT ON COLUMN anabranch.conflict_storm.minute IS 'When they were detected.';
COMMENT ON COLUMN anabranch.conflict_storm.losing_origin IS 'Node id; 0 when unknown.';",
};

/// What nobody has looked at yet.
pub(super) const OPEN: Object = Object {
    name: "conflict_open",
    privileges: "SELECT",
    sql: "CREATE OR REPLACE VIEW anabranch.conflict_open AS
SELECT h.conflict_id, h.detected_at, h.schema_name, h.table_name, h.key, h.conflict_type, h.conflict_resolution,
    CASE h.loser WHEN 'local' THEN h.local_origin WHEN 'remote' THEN h.remote_origin END AS losing_origin,
    CASE h.loser WHEN 'local' THEN h.remote_origin WHEN 'remote' THEN h.local_origin END AS winning_origin,
    h.lost_columns,
    (SELECT jsonb_object_agg(v.key, v.value)
     FROM jsonb_each(CASE h.loser WHEN 'local' THEN h.local_tuple ELSE h.remote_tuple END) AS v
     WHERE h.lost_columns IS NULL OR v.key = ANY (h.lost_columns)) AS lost_values,
    h.applied_tuple, h.transaction_group, h.error
FROM anabranch.conflict_history AS h WHERE h.status = 'new';
COMMENT ON VIEW anabranch.conflict_open IS 'Lines of the conflict log that nobody has reviewed, with the values that were lost.';",
};

/// How many of what.
pub(super) const SUMMARY: Object = Object {
    name: "conflict_summary",
    privileges: "SELECT",
    sql: "CREATE OR REPLACE VIEW anabranch.conflict_summary AS
SELECT h.schema_name, h.table_name, h.conflict_type,
    CASE h.loser WHEN 'local' THEN h.local_origin WHEN 'remote' THEN h.remote_origin END AS losing_origin,
    CASE h.loser WHEN 'local' THEN h.remote_origin WHEN 'remote' THEN h.local_origin END AS winning_origin,
    h.status, count(*) AS count, min(h.detected_at) AS first_at, max(h.detected_at) AS last_at
FROM anabranch.conflict_history AS h GROUP BY 1, 2, 3, 4, 5, 6
UNION ALL
SELECT s.schema_name, s.table_name, s.conflict_type, nullif(s.losing_origin, 0), nullif(s.winning_origin, 0),
    'counted', sum(s.count)::bigint, min(s.minute), max(s.minute)
FROM anabranch.conflict_storm AS s GROUP BY 1, 2, 3, 4, 5;
COMMENT ON VIEW anabranch.conflict_summary IS 'Conflicts by table, type, nodes and status. Status counted: of a storm, counted and not kept.';",
};

/// A table of the layout before partitions makes way.
pub(super) const SET_ASIDE: &str = "ALTER TABLE anabranch.conflict_history RENAME TO conflict_history_before;
ALTER INDEX anabranch.conflict_history_pkey RENAME TO conflict_history_before_pkey;
DROP INDEX IF EXISTS anabranch.conflict_history_time, anabranch.conflict_history_table, anabranch.conflict_history_type,
    anabranch.conflict_history_key;";

/// Its lines, into the new one. The stamp's upper 32 bits are seconds since 1970.
pub(super) const BRING_OVER: &str = "INSERT INTO anabranch.conflict_history (conflict_id, lost_at, detected_at, node, node_id, schema_name,
    table_name, key, conflict_type, policy, conflict_resolution, loser, local_tuple, remote_tuple, applied_tuple, local_origin,
    local_xid, local_lsn, local_commit_time, local_stamp, remote_origin, remote_xid, remote_lsn, remote_commit_time, remote_stamp,
    transaction_group, apply_xid, error)
SELECT conflict_id, to_timestamp((('x' || left(s.stamp, 8))::bit(32)::bigint & 4294967295)
        + floor((('x' || substr(s.stamp, 9, 8))::bit(32)::bigint & 4294967295) * 1000000.0 / 4294967296) / 1000000),
    detected_at, node, node_id, schema_name,
    table_name, key, conflict_type, policy, conflict_resolution, loser, local_tuple, remote_tuple, applied_tuple, local_origin,
    local_xid, local_lsn, local_commit_time, local_stamp, remote_origin, remote_xid, remote_lsn, remote_commit_time, remote_stamp,
    nullif(s.stamp, '0000000000000000.0'), apply_xid, error
FROM anabranch.conflict_history_before,
    LATERAL (SELECT coalesce(CASE loser WHEN 'local' THEN local_stamp ELSE remote_stamp END, '0000000000000000.0') AS stamp) AS s;
DROP TABLE anabranch.conflict_history_before;";

/// Gives the reviewers' role its rights, where there is one.
pub(super) fn grant_reviewer() -> String {
    let mut out = format!("DO $$ BEGIN IF EXISTS (SELECT FROM pg_roles WHERE rolname = '{REVIEWER}') THEN\n");
    for (privileges, on) in REVIEWER_MAY {
        out.push_str(&format!("  GRANT {privileges} ON {on} TO {REVIEWER};\n"));
    }
    out + "END IF; END $$;"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_keeps_of_upkeep_says_all_that_it_is_made_of() {
        let made = UPKEEP.split("$f$").collect::<Vec<_>>();
        assert_eq!((made.len(), made[1]), (3, UPKEEP_BODY));
        let settings = made[0].split_once("RETURNS text[]\n").unwrap().1;
        let first = UPKEEP_BODY.lines().nth(1).unwrap();
        assert_eq!(first.strip_prefix("-- "), settings.strip_suffix(" AS "));
        assert!(HISTORY.sql.contains(UPKEEP));
    }
}
