//! The `anabranch` command against real servers: set-up, examination, removal, the conflict log.

// What helps a test may fail like a test.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod review;
mod sequences;
mod server;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use server::Server;

/// One node: a server with an application's database, and a configuration.
struct Node {
    server: Server,
    folder: tempfile::TempDir,
}

impl Node {
    async fn new() -> Self {
        Self::with_conf("").await
    }

    async fn with_conf(conf: &str) -> Self {
        let node = Self {
            server: Server::start(conf).await,
            folder: tempfile::tempdir().unwrap(),
        };
        node.configure("");
        node
    }

    fn configure(&self, postgres: &str) {
        let text = format!(
            "[node]\nname = \"a\"\nid = 1\ndata_dir = \"{}\"\n[cluster]\nid = \"c\"\n[listen]\naddress = \"127.0.0.1:0\"\n\
             [[peers]]\nname = \"b\"\nid = 2\naddress = \"127.0.0.1:1\"\n[postgres]\ndsn = \"{}\"\n{postgres}\n",
            self.data_dir().display(),
            self.server.dsn("anabranch"),
        );
        std::fs::write(self.config(), text).unwrap();
    }

    fn config(&self) -> PathBuf {
        self.folder.path().join("anabranch.toml")
    }

    fn data_dir(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// `anabranch ARGS` with the superuser as administrator.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = program();
        command
            .args(args)
            .arg("--config")
            .arg(self.config())
            .env("ANABRANCH_ADMIN_DSN", self.server.dsn("postgres"));
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", both(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn refused(&self, args: &[&str], code: i32) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", both(&output));
        both(&output)
    }

    /// What a new user does: grants, then init.
    async fn set_up(&self) {
        let grants = self.ok(&["grants"]);
        self.server.admin().await.batch_execute(&grants).await.unwrap();
        self.ok(&["init"]);
    }

    fn doctor(&self) -> Vec<Value> {
        let output = program()
            .args(["doctor", "--output", "json", "--config"])
            .arg(self.config())
            .output()
            .unwrap();
        let report: Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", both(&output)));
        let findings = report["findings"].as_array().unwrap().clone();
        let fails = findings.iter().any(|finding| finding["level"] == "fail");
        assert_eq!(output.status.code(), Some(i32::from(fails)));
        findings
    }

    /// Does `doctor` fail `check`, with words and a remedy that hold these?
    fn doctor_fails(&self, check: &str, found: &str, remedy: &str) {
        let findings = self.doctor();
        let has = |finding: &&Value, key: &str, text: &str| finding[key].as_str().unwrap().contains(text);
        let hit = findings.iter().find(|finding| {
            finding["level"] == "fail"
                && has(finding, "check", check)
                && has(finding, "found", found)
                && has(finding, "remedy", remedy)
        });
        assert!(
            hit.is_some(),
            "no failure {check}: {found} ({remedy}) in {findings:#?}"
        );
    }
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
    command.env("NO_COLOR", "1").stdin(Stdio::null());
    command
}

fn both(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

const SCHEMA: &str = "
    CREATE TYPE mood AS ENUM ('good', 'bad');
    CREATE TABLE plain (id int PRIMARY KEY, n numeric(5, 1));
    CREATE TABLE \"Wide Table\" (id uuid, mood mood, body text, PRIMARY KEY (id, mood));
    CREATE TABLE had_full (id int PRIMARY KEY, body text);
    ALTER TABLE had_full REPLICA IDENTITY FULL;
    CREATE TABLE by_index (id int PRIMARY KEY, other int NOT NULL, body text);
    CREATE UNIQUE INDEX by_index_other ON by_index (other);
    ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_other;
    CREATE TABLE parted (id int, day date, body text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
    CREATE TABLE parted_a PARTITION OF parted FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
    CREATE TABLE parted_b PARTITION OF parted DEFAULT;
    CREATE VIEW seen AS SELECT * FROM plain;
    INSERT INTO plain VALUES (1, 1);";

#[tokio::test]
async fn init_is_idempotent_and_a_dry_run_changes_nothing() {
    let node = Node::new().await;
    let admin = node.server.admin().await;
    admin.batch_execute(SCHEMA).await.unwrap();
    admin.batch_execute(&node.ok(&["grants"])).await.unwrap();
    let before = node.server.dump().await;
    let sql = node.ok(&["init", "--dry-run"]);
    assert!(sql.contains("CREATE PUBLICATION anabranch FOR TABLE"), "{sql}");
    assert!(
        sql.contains("ALTER TABLE public.\"Wide Table\" REPLICA IDENTITY FULL;"),
        "{sql}"
    );
    // On 17 and later a standby may take it over.
    let major = server::value(
        &admin,
        "SELECT (current_setting('server_version_num')::int / 10000)::text",
    )
    .await;
    let slot = match major.as_str() {
        "15" | "16" => "pg_create_logical_replication_slot('anabranch', 'pgoutput')",
        _ => "pg_create_logical_replication_slot('anabranch', 'pgoutput', false, false, true)",
    };
    assert!(sql.contains(slot), "{sql}");
    assert_eq!(node.server.dump().await, before, "a dry run changed the database");

    let done = node.ok(&["init"]);
    assert!(
        done.contains("done: create logical replication slot anabranch"),
        "{done}"
    );
    let identities =
        "SELECT string_agg(relname || ' ' || relreplident::text, ', ' ORDER BY relname) FROM pg_class
                      WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'";
    assert_eq!(
        server::value(&admin, identities).await,
        "Wide Table f, by_index f, had_full f, parted_a f, parted_b f, plain d"
    );
    let published = "SELECT string_agg(prrelid::regclass::text, ', ' ORDER BY prrelid::regclass::text)
                     FROM pg_publication_rel";
    assert_eq!(
        server::value(&admin, published).await,
        "\"Wide Table\", anabranch.clock, anabranch.ddl, anabranch.member, anabranch.policy_change, anabranch.progress, anabranch.sequence, by_index, had_full, parted, plain"
    );
    let members = "SELECT string_agg(origin || ' ' || epoch || ' ' || lsn, ', ' ORDER BY origin) FROM anabranch.progress";
    assert_eq!(server::value(&admin, members).await, "1 0 0/0, 2 0 0/0");
    assert_eq!(
        server::value(&admin, "SELECT (slot_start = (SELECT confirmed_flush_lsn FROM pg_replication_slots))::text FROM anabranch.node").await,
        "true"
    );

    let after = node.server.dump().await;
    assert!(node.ok(&["init"]).contains("nothing to do"));
    assert_eq!(
        node.ok(&["init", "--dry-run"]).trim_end().lines().last(),
        Some("-- nothing to do")
    );
    assert_eq!(
        node.server.dump().await,
        after,
        "a second init changed the database"
    );

    admin
        .batch_execute("CREATE TABLE later (id int PRIMARY KEY, body text)")
        .await
        .unwrap();
    node.doctor_fails("table public.later", "not in the publication", "anabranch init");
    let extended = node.ok(&["init"]);
    assert!(extended.contains("add 1 table(s) to publication"), "{extended}");
    assert!(server::value(&admin, published).await.contains("later"));
    assert!(
        node.doctor().iter().all(|finding| finding["level"] != "fail"),
        "{:#?}",
        node.doctor()
    );
}

#[tokio::test]
async fn what_a_dry_run_of_init_prints_does_what_init_does() {
    let node = Node::new().await;
    let admin = node.server.admin().await;
    admin.batch_execute(SCHEMA).await.unwrap();
    admin.batch_execute(&node.ok(&["grants"])).await.unwrap();
    // As it is, into psql.
    let sql = node.ok(&["init", "--dry-run"]);
    admin.batch_execute(&sql).await.unwrap();
    assert!(node.ok(&["init"]).contains("nothing to do"));
    let findings = node.doctor();
    assert!(
        findings.iter().all(|finding| finding["level"] != "fail"),
        "{findings:#?}"
    );
}

#[tokio::test]
async fn every_table_is_listed_with_why_it_is_replicated_or_not() {
    let node = Node::new().await;
    let policy = node.folder.path().join("policy.toml");
    std::fs::write(
        &policy,
        "[[table]]\nname = \"public.plain\"\npolicy = \"first_update_wins\"\n",
    )
    .unwrap();
    let config = std::fs::read_to_string(node.config()).unwrap();
    let config = config.replace("[cluster]\n", "[cluster]\npolicy = \"policy.toml\"\n");
    let tables = "tables = [\"public.*\", \"!public.tmp_*\", \"app.named\"]\n";
    let config = config.replace("[postgres]\n", &format!("[postgres]\n{tables}"));
    std::fs::write(node.config(), config).unwrap();
    let admin = node.server.admin().await;
    let more = "CREATE TABLE tmp_x (id int PRIMARY KEY); CREATE SCHEMA app; CREATE TABLE app.other (id int PRIMARY KEY);
        CREATE TABLE app.named (id int PRIMARY KEY); ANALYZE plain;";
    admin.batch_execute(SCHEMA).await.unwrap();
    admin.batch_execute(more).await.unwrap();
    node.set_up().await;
    let after = "CREATE TABLE later (id int PRIMARY KEY); CREATE TABLE keyless (id int);
        ALTER PUBLICATION anabranch ADD TABLE app.other;";
    admin.batch_execute(after).await.unwrap();
    let listed: Value = serde_json::from_str(&node.ok(&["tables", "list", "--output", "json"])).unwrap();
    let text = |table: &Value, key: &str| table[key].as_str().unwrap_or("-").to_owned();
    let lines: Vec<String> = listed["tables"]
        .as_array()
        .unwrap()
        .iter()
        .map(|table| {
            assert!(
                table["bytes"].is_u64() && table["obstacles"].is_array(),
                "{table}"
            );
            [
                "table",
                "state",
                "why",
                "partition_of",
                "identity",
                "policy",
                "advice",
            ]
            .map(|key| text(table, key))
            .join(" | ")
        })
        .collect();
    let add = |name: &str| {
        format!("`anabranch tables add {name}` at the node that has its rows; `anabranch init` at the others")
    };
    let (all, public) = ("chosen by \"public.*\"", "public");
    let expected = [
        "app.named | replicated | named by \"app.named\" | - | default | last_update_wins | -".to_owned(),
        "app.other | not_chosen | no pattern of postgres.tables | - | default | last_update_wins | `anabranch tables remove \
         app.other`, or add \"app.other\" to postgres.tables"
            .to_owned(),
        format!("{public}.Wide Table | replicated | {all} | - | full | last_update_wins | -"),
        format!("{public}.by_index | replicated | {all} | - | full | last_update_wins | -"),
        format!("{public}.had_full | replicated | {all} | - | full | last_update_wins | -"),
        format!(
            "{public}.keyless | not_yet | {all} | - | default | last_update_wins | what stands in the way is named by `anabranch \
             doctor`"
        ),
        format!("{public}.later | not_yet | {all} | - | default | last_update_wins | {}", add("public.later")),
        format!("{public}.parted | replicated | {all} | - | default | last_update_wins | -"),
        format!("{public}.parted_a | replicated | its partitioned table is | public.parted | full | last_update_wins | -"),
        format!("{public}.parted_b | replicated | its partitioned table is | public.parted | full | last_update_wins | -"),
        format!("{public}.plain | replicated | {all} | - | default | first_update_wins | -"),
        format!("{public}.tmp_x | not_replicated | excluded by \"!public.tmp_*\" | - | default | last_update_wins | -"),
    ];
    assert_eq!(lines, expected);
    let of = |name: &str| {
        let tables = listed["tables"].as_array().unwrap();
        tables
            .iter()
            .find(|table| table["table"] == name)
            .unwrap()
            .clone()
    };
    assert_eq!(of("public.plain")["rows"], 1);
    assert_eq!(of("public.later")["rows"], Value::Null);
    assert!(
        of("public.keyless")["obstacles"][0]["found"]
            .as_str()
            .unwrap()
            .contains("no primary key")
    );
    let shown = node.ok(&["tables", "list"]);
    assert!(
        shown.contains("NOT YET")
            && shown.contains("STILL")
            && shown.contains("public.keyless: has no primary key"),
        "{shown}"
    );

    // Out again: while a pattern chooses it, and by the name that is written.
    let refused = node.refused(&["tables", "remove", "plain"], 1);
    assert!(
        refused.contains("add \"!public.plain\" to postgres.tables"),
        "{refused}"
    );
    let refused = node.refused(&["tables", "remove", "app.named"], 1);
    assert!(
        refused.contains("take \"app.named\" out of postgres.tables"),
        "{refused}"
    );
    let refused = node.refused(&["tables", "remove", "parted_a"], 1);
    assert!(refused.contains("is a partition of public.parted"), "{refused}");
    let sql = node.ok(&["tables", "remove", "app.other", "--dry-run"]);
    assert!(
        sql.contains("ALTER PUBLICATION anabranch DROP TABLE ONLY app.other;"),
        "{sql}"
    );
    let done = node.ok(&["tables", "remove", "app.other"]);
    assert!(
        done.contains("not replicated any more at this node: app.other"),
        "{done}"
    );
    let shown = node.ok(&["tables", "list"]);
    assert!(
        !shown.contains("STILL") && shown.contains("passed over here"),
        "{shown}"
    );
}

#[tokio::test]
async fn what_cannot_be_replicated_is_refused_by_name_with_a_remedy() {
    let node = Node::new().await;
    let admin = node.server.admin().await;
    admin
        .batch_execute(
            "CREATE COLLATION nocase (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
             CREATE DOMAIN serial_number AS int8;
             CREATE TABLE fine (id serial_number PRIMARY KEY);
             CREATE TABLE no_key (a int);
             CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY);
             CREATE TABLE float_key (id float8 PRIMARY KEY);
             CREATE TABLE nocase_key (id text COLLATE nocase PRIMARY KEY);
             CREATE TABLE made_key (a int, id int GENERATED ALWAYS AS (a + 1) STORED PRIMARY KEY);
             CREATE TABLE late_key (id int PRIMARY KEY DEFERRABLE);
             CREATE TABLE whole (id int, body text) PARTITION BY LIST (id);
             CREATE TABLE whole_1 PARTITION OF whole (PRIMARY KEY (id)) FOR VALUES IN (1)",
        )
        .await
        .unwrap();
    admin.batch_execute(&node.ok(&["grants"])).await.unwrap();
    let before = node.server.dump().await;
    let said = node.refused(&["init", "--output", "json"], 1);
    for (table, remedy) in [
        ("no_key", "ALTER TABLE public.no_key ADD PRIMARY KEY"),
        ("unlogged", "ALTER TABLE public.unlogged SET LOGGED"),
        ("float_key", "double precision"),
        ("nocase_key", "nondeterministic"),
        ("made_key", "DROP EXPRESSION"),
        ("late_key", "DEFERRABLE"),
        ("whole", "ALTER TABLE public.whole ADD PRIMARY KEY"),
    ] {
        assert!(said.contains(remedy), "{table}: {said}");
        assert!(
            said.contains(&format!("!public.{table}\\\"")),
            "{table} can be excluded: {said}"
        );
    }
    assert!(!said.contains("table public.fine"), "{said}");
    assert_eq!(
        node.server.dump().await,
        before,
        "a refused init changed the database"
    );

    node.configure(
        "tables = [\"public.*\", \"!public.no_key\", \"!public.unlogged\", \"!public.*_key\", \"!public.whole*\"]",
    );
    let done = node.ok(&["init"]);
    assert!(done.contains("1 table(s) are replicated: public.fine"), "{done}");
    node.configure("tables = [\"public.fine\", \"public.absent\"]");
    assert!(node.refused(&["init"], 1).contains("does not exist"));
}

#[tokio::test]
async fn the_printed_grants_suffice_for_an_ordinary_role() {
    let node = Node::new().await;
    let admin = node.server.admin().await;
    admin.batch_execute(SCHEMA).await.unwrap();
    admin
        .batch_execute("CREATE SCHEMA app; CREATE TABLE app.secured (id int PRIMARY KEY, n int);
                        ALTER TABLE app.secured ENABLE ROW LEVEL SECURITY; REVOKE CONNECT ON DATABASE app FROM PUBLIC")
        .await
        .unwrap();
    node.configure("tables = [\"public.*\", \"app.*\"]");
    admin.batch_execute(&node.ok(&["grants"])).await.unwrap();
    let said = node.refused(&["init"], 1);
    assert!(said.contains("ALTER ROLE anabranch BYPASSRLS"), "{said}");
    // Asked, the server names each table, and the attribute that only row-level security needs.
    let exact = node.ok(&["grants", "--connect"]);
    assert!(
        exact.contains("ON TABLE app.secured TO anabranch;")
            && exact.contains("\nALTER ROLE anabranch BYPASSRLS"),
        "{exact}"
    );
    admin.batch_execute(&exact).await.unwrap();
    node.ok(&["init"]);
    let findings = node.doctor();
    assert!(
        findings.iter().all(|finding| finding["level"] != "fail"),
        "{findings:#?}"
    );

    let daemon = node.server.session("anabranch").await;
    assert_eq!(
        server::value(
            &daemon,
            "SELECT rolsuper::text FROM pg_roles WHERE rolname = current_user"
        )
        .await,
        "false"
    );
    daemon
        .batch_execute(
            "BEGIN; SET LOCAL session_replication_role = replica;
             UPDATE anabranch.progress SET epoch = 1, lsn = '0/1' WHERE origin = 2;
             INSERT INTO plain VALUES (2, 2); UPDATE plain SET n = 3; DELETE FROM plain;
             INSERT INTO \"Wide Table\" VALUES (gen_random_uuid(), 'good', 'x');
             INSERT INTO parted_a VALUES (1, '2026-02-02', 'x');
             INSERT INTO app.secured VALUES (1, 1); TRUNCATE app.secured, plain;
             INSERT INTO anabranch.conflict_history (conflict_id, node, node_id, schema_name, table_name, key,
                 conflict_type, policy, conflict_resolution, loser)
             VALUES (gen_random_uuid(), 'a', 1, 'public', 'plain', '{\"id\": 1}', 'insert_exists',
                 'last_update_wins', 'skip', 'remote');
             INSERT INTO anabranch.quarantine (schema_name, table_name, key_bytes, key, origin, epoch, lsn, stamp, change,
                 sqlstate, message) VALUES ('public', 'plain', '', '{}', 2, 1, '0/1', '', '', '23514', 'check');
             DELETE FROM anabranch.quarantine;
             COMMIT;
             UPDATE anabranch.clock SET witness_us = 1 WHERE node_id = 1;
             UPDATE anabranch.fence SET n = n + 1;
             SELECT pg_visible_in_snapshot('1'::xid8, pg_current_snapshot()), pg_current_wal_insert_lsn(),
                 pg_try_advisory_lock(1), (SELECT system_identifier FROM pg_control_system());
             SELECT * FROM pg_logical_slot_peek_binary_changes('anabranch', NULL, NULL, 'proto_version', '1',
                 'publication_names', 'anabranch')",
        )
        .await
        .unwrap();
    // What another session waits for, which section 8 of the design needs, is hidden from ordinary roles.
    assert_eq!(
        server::value(
            &daemon,
            "SELECT bool_or(query <> '<insufficient privilege>')::text FROM pg_stat_activity
                                WHERE usename = 'postgres' AND backend_type = 'client backend'"
        )
        .await,
        "true"
    );
    for statement in [
        "CREATE TABLE public.x (a int)",
        "UPDATE anabranch.node SET name = 'z'",
        "DROP TABLE plain",
    ] {
        assert!(
            daemon.batch_execute(statement).await.is_err(),
            "{statement} should be refused"
        );
    }
    for version in ["15", "16", "17", "18"] {
        let sql = node.ok(&["grants", "--role", "Other Role", "--pg-version", version]);
        assert!(
            sql.contains("GRANT SET ON PARAMETER session_replication_role TO \"Other Role\";"),
            "{sql}"
        );
        assert_eq!(sql.contains("WITH INHERIT TRUE"), version != "15");
    }
}

#[tokio::test]
async fn doctor_names_each_broken_precondition() {
    let node = Node::with_conf("wal_level = replica\nmax_replication_slots = 0").await;
    let admin = node.server.admin().await;
    node.doctor_fails("connection", "anabranch", "pg_hba.conf");
    admin
        .batch_execute("CREATE ROLE anabranch LOGIN; CREATE TABLE t (id int PRIMARY KEY, body text)")
        .await
        .unwrap();
    node.doctor_fails("wal_level", "replica", "ALTER SYSTEM SET wal_level = 'logical'");
    node.doctor_fails(
        "max_replication_slots",
        "0 of 0",
        "ALTER SYSTEM SET max_replication_slots = 10",
    );
    node.doctor_fails(
        "role anabranch",
        "may not replicate",
        "ALTER ROLE anabranch REPLICATION",
    );
    node.doctor_fails(
        "session_replication_role",
        "permission denied",
        "GRANT SET ON PARAMETER",
    );
    node.doctor_fails(
        "privilege SELECT, INSERT, UPDATE, DELETE, TRUNCATE on public.t",
        "missing",
        "GRANT SELECT",
    );
    node.doctor_fails("replication connection", "", "REPLICATION");
    node.doctor_fails("schema anabranch", "not set up", "anabranch init");
    let said = node.refused(&["init"], 1);
    assert!(
        said.contains("wal_level") && said.contains("ALTER SYSTEM"),
        "{said}"
    );
    drop(admin);

    let node = Node::new().await;
    let admin = node.server.admin().await;
    admin
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY, body text)")
        .await
        .unwrap();
    node.set_up().await;
    let breaks = [
        (
            "ALTER TABLE t REPLICA IDENTITY DEFAULT",
            "table public.t",
            "replica identity other than FULL",
            "anabranch init",
        ),
        (
            "ALTER PUBLICATION anabranch DROP TABLE t",
            "table public.t",
            "not in the publication",
            "anabranch init",
        ),
        (
            "ALTER PUBLICATION anabranch SET (publish = 'insert')",
            "publication",
            "omits",
            "anabranch init",
        ),
        (
            "REVOKE TRUNCATE ON t FROM anabranch",
            "privilege TRUNCATE on public.t",
            "missing",
            "GRANT TRUNCATE",
        ),
        (
            "REVOKE UPDATE ON anabranch.clock FROM anabranch",
            "schema anabranch",
            "missing",
            "GRANT SELECT",
        ),
        (
            "DELETE FROM anabranch.progress WHERE origin = 2",
            "members",
            "node 2",
            "anabranch init",
        ),
    ];
    for (sql, check, found, remedy) in breaks {
        admin.batch_execute(sql).await.unwrap();
        node.doctor_fails(check, found, remedy);
        // And `init` mends it.
        node.ok(&["init"]);
        let left = node.doctor();
        assert!(
            left.iter().all(|finding| finding["level"] != "fail"),
            "after {sql}: {left:#?}"
        );
    }
    admin
        .batch_execute("ALTER ROLE anabranch CONNECTION LIMIT 11")
        .await
        .unwrap();
    node.doctor_fails(
        "connection limit of the role",
        "of 11 11 are left for the daemon, which needs 13 all the time and up to 25 at times",
        "ALTER ROLE anabranch CONNECTION LIMIT 35",
    );
    admin
        .batch_execute("ALTER ROLE anabranch CONNECTION LIMIT -1")
        .await
        .unwrap();
    admin
        .batch_execute("ALTER TABLE t DROP CONSTRAINT t_pkey")
        .await
        .unwrap();
    node.doctor_fails("table public.t", "no primary key", "ADD PRIMARY KEY");
    admin
        .batch_execute("ALTER TABLE t ADD PRIMARY KEY (id)")
        .await
        .unwrap();
    admin
        .batch_execute(
            "CREATE TABLE u (id int PRIMARY KEY, code text UNIQUE, name text, during int4range, \
             lower_name text GENERATED ALWAYS AS (lower(name)) STORED UNIQUE, \
             EXCLUDE USING gist (during WITH &&)); CREATE UNIQUE INDEX ON u (md5(name))",
        )
        .await
        .unwrap();
    let policy = node.folder.path().join("policy.toml");
    std::fs::write(
        &policy,
        "[[table]]\nname = \"public.u\"\npolicy = \"first_update_wins\"",
    )
    .unwrap();
    let doctor = |policy: &Path| {
        let mut command = program();
        command.args(["doctor", "--config"]).arg(node.config());
        both(&command.env("ANABRANCH_CLUSTER__POLICY", policy).output().unwrap())
    };
    let said = doctor(&policy);
    for expected in [
        "unique key(s) \"u_code_key\", \"u_lower_name_key\", \"u_md5_idx\": the table has a policy other than last_update_wins",
        "has 1 exclusion constraint(s): rows of two nodes that exclude each other could never be the same",
    ] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    std::fs::write(
        &policy,
        "[[table]]\nname = \"public.u\"\nexclusion_constraints = \"quarantine\"",
    )
    .unwrap();
    let said = doctor(&policy);
    for unexpected in ["a policy other than", "could never be the same", "u_code_key"] {
        assert!(!said.contains(unexpected), "{unexpected}: {said}");
    }
    let refused = "unique key(s) \"u_lower_name_key\", \"u_md5_idx\": the daemon cannot compare the values";
    let remedy = "in the policy file: [[table]] with name and unique_keys = \"pairwise\"";
    assert!(said.contains(refused) && said.contains(remedy), "{said}");
    // It is no table of the publication yet, and does not become one.
    let init = |policy: &Path| {
        let mut command = node.command(&["init", "--dry-run"]);
        command.env("ANABRANCH_CLUSTER__POLICY", policy).output().unwrap()
    };
    let output = init(&policy);
    assert_eq!(output.status.code(), Some(1), "{}", both(&output));
    assert!(both(&output).contains(remedy), "{}", both(&output));
    std::fs::write(
        &policy,
        "[[table]]\nname = \"public.u\"\nexclusion_constraints = \"quarantine\"\nunique_keys = \"pairwise\"",
    )
    .unwrap();
    let said = doctor(&policy);
    assert!(
        said.contains("accepted by unique_keys = \"pairwise\"") && !said.contains(remedy),
        "{said}"
    );
    let output = init(&policy);
    assert!(output.status.success(), "{}", both(&output));
    admin.batch_execute("DROP TABLE u").await.unwrap();
    admin
        .batch_execute("UPDATE anabranch.node SET system_identifier = '1'")
        .await
        .unwrap();
    node.doctor_fails("server identity", "is a copy", "anabranch remove");
    admin.batch_execute("UPDATE anabranch.node SET system_identifier = (SELECT system_identifier FROM pg_control_system())").await.unwrap();
    admin
        .batch_execute("SELECT pg_drop_replication_slot('anabranch')")
        .await
        .unwrap();
    node.doctor_fails("slot anabranch", "is gone", "anabranch heal");
    assert!(node.refused(&["init"], 1).contains("is gone"));

    std::fs::create_dir_all(node.data_dir()).unwrap();
    std::fs::write(node.folder.path().join("file"), "").unwrap();
    let mut command = program();
    command.args(["doctor", "--config"]).arg(node.config());
    command.env("ANABRANCH_NODE__DATA_DIR", node.folder.path().join("file/below"));
    command
        .env("ANABRANCH_LISTEN__ADDRESS", "203.0.113.1:9")
        .env("ANABRANCH_LISTEN__INSECURE", "true");
    for key in ["CA", "CERT", "KEY"] {
        command.env(format!("ANABRANCH_TLS__{key}"), "/nonexistent.pem");
    }
    let said = both(&command.output().unwrap());
    for expected in ["node.data_dir", "listen.address", "/nonexistent.pem", "peer b"] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
}

#[tokio::test]
async fn remove_leaves_nothing_behind() {
    let node = Node::new().await;
    let admin = node.server.admin().await;
    admin.batch_execute(SCHEMA).await.unwrap();
    // Only what needs a superuser: the rest init grants, and must take back.
    admin
        .batch_execute("CREATE ROLE anabranch LOGIN REPLICATION")
        .await
        .unwrap();
    let (before, globals) = (node.server.dump().await, node.server.globals().await);
    node.ok(&["init"]);
    admin
        .batch_execute("CREATE TABLE doomed (id int PRIMARY KEY, body text)")
        .await
        .unwrap();
    node.ok(&["init"]);
    admin.batch_execute("DROP TABLE doomed").await.unwrap();
    std::fs::create_dir_all(node.data_dir().join("journal")).unwrap();
    std::fs::write(node.data_dir().join("journal/1"), "x").unwrap();
    let incarnation = server::value(&admin, "SELECT incarnation::text FROM anabranch.node").await;
    let owner = format!(r#"{{"node_id": 1, "cluster_id": "c", "incarnation": "{incarnation}"}}"#);
    std::fs::write(node.data_dir().join("node.json"), owner).unwrap();
    std::fs::write(node.data_dir().join("heal-1.ndjson"), "x").unwrap();
    assert_ne!(node.server.dump().await, before);

    let said = node.refused(&["remove"], 2);
    assert!(said.contains("--yes"), "{said}");
    assert_ne!(node.server.dump().await, before, "removed without being told");
    let done = node.ok(&["remove", "--yes"]);
    assert!(done.contains("done: drop replication slot anabranch"), "{done}");
    assert_eq!(node.server.dump().await, before);
    assert_eq!(node.server.globals().await, globals);
    assert_eq!(
        server::value(&admin, "SELECT count(*)::text FROM pg_replication_slots").await,
        "0"
    );
    // The record of a heal is not the daemon's alone.
    assert!(done.contains("left") && done.contains("heal-1.ndjson"), "{done}");
    std::fs::remove_file(node.data_dir().join("heal-1.ndjson")).unwrap();
    assert_eq!(std::fs::read_dir(node.data_dir()).unwrap().count(), 0);
    assert!(node.ok(&["remove", "--yes"]).contains("nothing to remove"));
    // And the node can be made again.
    node.ok(&["init"]);
}

/// A node that was dropped while it caught up, say, and a copy that is not finished.
#[tokio::test]
async fn remove_opens_the_database_of_a_joiner_for_writes_unless_the_join_is_unfinished() {
    let node = Node::new().await;
    let admin = node.server.admin().await;
    node.set_up().await;
    admin
        .batch_execute(
            "UPDATE anabranch.member SET fact = 'joined' WHERE node_id = 1;
             CREATE SCHEMA anabranch_join;
             DO $$ BEGIN
                 EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = on', current_database());
             END $$",
        )
        .await
        .unwrap();
    let said = node.refused(&["remove", "--yes"], 1);
    assert!(said.contains("anabranch join --abandon"), "{said}");
    let is_set = "SELECT count(*)::text FROM pg_db_role_setting WHERE setconfig::text LIKE '%default_transaction_read_only%'";
    assert_eq!(server::value(&admin, is_set).await, "1");
    admin.batch_execute("DROP SCHEMA anabranch_join").await.unwrap();
    let done = node.ok(&["remove", "--yes"]);
    assert!(done.contains("done: open the database for writes"), "{done}");
    assert_eq!(server::value(&admin, is_set).await, "0");
}

/// Version 18 refuses UPDATE under identity FULL while a generated column is not published, and can publish only stored
/// ones; older versions know neither.
#[tokio::test]
async fn tables_with_generated_columns_stay_writable_or_are_refused() {
    let node = Node::new().await;
    let admin = node.server.admin().await;
    let stored =
        "CREATE TABLE made (id int PRIMARY KEY, body text, up text GENERATED ALWAYS AS (upper(body)) STORED);
                  INSERT INTO made VALUES (1, 'x')";
    admin.batch_execute(stored).await.unwrap();
    node.set_up().await;
    admin
        .batch_execute("UPDATE made SET body = 'y'; DELETE FROM made")
        .await
        .unwrap();
    let version: i32 = server::value(&admin, "SHOW server_version_num")
        .await
        .parse()
        .unwrap();
    if version >= 180_000 {
        let virtual_column =
            "CREATE TABLE unmade (id int PRIMARY KEY, body text, up text GENERATED ALWAYS AS (upper(body)))";
        admin.batch_execute(virtual_column).await.unwrap();
        assert!(
            node.refused(&["init"], 1)
                .contains("make the generated columns STORED")
        );
    } else {
        assert_eq!(node.ok(&["init", "--dry-run"]).trim(), "-- nothing to do");
    }
}

#[tokio::test]
async fn what_is_not_ours_is_neither_taken_over_nor_removed() {
    let node = Node::new().await;
    let admin = node.server.admin().await;
    admin
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY)")
        .await
        .unwrap();
    admin.batch_execute(&node.ok(&["grants"])).await.unwrap();
    admin.batch_execute("CREATE PUBLICATION anabranch").await.unwrap();
    admin
        .batch_execute("SELECT pg_create_logical_replication_slot('anabranch', 'pgoutput')")
        .await
        .unwrap();
    let said = node.refused(&["init"], 1);
    assert!(said.contains("pg_drop_replication_slot"), "{said}");
    assert!(node.ok(&["remove", "--yes"]).contains("nothing to remove"));
    assert_eq!(
        server::value(&admin, "SELECT count(*)::text FROM pg_replication_slots").await,
        "1"
    );
    node.configure("slot = \"other\"\npublication = \"other\"");
    node.ok(&["init"]);
    // Another identity under the same database is refused.
    let output = node
        .command(&["init"])
        .env("ANABRANCH_NODE__ID", "7")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(both(&output).contains("fixed for life"), "{}", both(&output));
    // Nor is anything done to the node that a connection string leads to where another one was meant.
    let meant_for_another: [&[&str]; 7] = [
        &["sequences", "plan"],
        &["sequences", "apply"],
        &["sequences", "status"],
        &["tables", "list"],
        &["tables", "remove", "t"],
        &["leave"],
        &["leave", "--cancel"],
    ];
    for args in meant_for_another {
        let mut command = node.command(args);
        let output = command.env("ANABRANCH_NODE__ID", "7").output().unwrap();
        let said = both(&output);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(
            said.contains("node.id is 1 in the database and 7 in the configuration"),
            "{args:?}: {said}"
        );
    }
}

#[tokio::test]
async fn the_slot_of_another_database_is_not_to_be_dropped() {
    let node = Node::new().await;
    let admin = node.server.admin().await;
    admin.batch_execute(&node.ok(&["grants"])).await.unwrap();
    admin.batch_execute("CREATE DATABASE other").await.unwrap();
    let dsn = node.server.dsn("postgres");
    let dsn = format!("{}dbname=other", dsn.split("dbname=").next().unwrap());
    let (other, connection) = tokio_postgres::connect(&dsn, tokio_postgres::NoTls)
        .await
        .unwrap();
    tokio::spawn(connection);
    let make = "SELECT pg_create_logical_replication_slot('anabranch', 'pgoutput')";
    other.batch_execute(make).await.unwrap();
    let said = node.refused(&["init"], 1);
    assert!(
        said.contains("is of database other") && said.contains("choose another name in postgres.slot"),
        "{said}"
    );
    assert!(!said.contains("pg_drop_replication_slot"), "{said}");
    node.configure("slot = \"second\"");
    node.ok(&["init"]);
}

#[tokio::test]
async fn waiting_for_other_transactions_is_said() {
    let node = Node::new().await;
    let admin = node.server.admin().await;
    admin
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY)")
        .await
        .unwrap();
    admin.batch_execute(&node.ok(&["grants"])).await.unwrap();
    admin
        .batch_execute("BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'forgotten'")
        .await
        .unwrap();
    let mut child = node
        .command(&["init"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut lines = std::io::BufRead::lines(stderr).map(Result::unwrap);
    let said: Vec<String> = lines
        .by_ref()
        .take_while(|line| !line.contains("forgotten"))
        .collect();
    assert!(
        said.iter()
            .any(|line| line.contains("waiting to create logical replication slot")),
        "{said:?}"
    );
    admin.batch_execute("COMMIT PREPARED 'forgotten'").await.unwrap();
    lines.for_each(drop);
    assert!(child.wait().unwrap().success());
    assert!(node.doctor().iter().all(|finding| finding["level"] != "fail"));
}

#[tokio::test]
async fn the_conflict_log_is_listed_and_shown() {
    let node = Node::new().await;
    let admin = node.server.admin().await;
    admin
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY)")
        .await
        .unwrap();
    node.set_up().await;
    assert!(node.ok(&["conflicts", "list"]).contains("no conflicts"));
    admin
        .batch_execute(
            "INSERT INTO anabranch.conflict_history (conflict_id, detected_at, node, node_id, schema_name, table_name, key,
                 conflict_type, policy, conflict_resolution, loser, local_origin, remote_origin, local_tuple, remote_tuple,
                 applied_tuple)
             SELECT ('00000000-0000-0000-0000-00000000000' || n)::uuid, now() - n * interval '1 hour', 'a', 1, 'public',
                 CASE WHEN n < 5 THEN 't' ELSE 'u' END, jsonb_build_object('id', n, 'name', 'k' || n),
                 CASE WHEN n % 2 = 0 THEN 'update_origin_differs' ELSE 'insert_exists' END, 'last_update_wins',
                 'apply_remote', 'local', 1, CASE WHEN n < 4 THEN 2 ELSE 3 END, '{\"id\": 1, \"v\": \"here\"}',
                 '{\"id\": 1, \"v\": \"there\"}', '{\"id\": 1, \"v\": \"there\"}' FROM generate_series(1, 9) n",
        )
        .await
        .unwrap();
    let ids = |args: &[&str]| -> String {
        let all = [&["conflicts", "list", "--output", "json"], args].concat();
        let rows: Value = serde_json::from_str(&node.ok(&all)).unwrap();
        let last = |row: &Value| row["conflict_id"].as_str().unwrap().chars().last().unwrap();
        rows.as_array().unwrap().iter().map(last).collect()
    };
    assert_eq!(ids(&[]), "123456789");
    assert_eq!(ids(&["--limit", "2"]), "12");
    assert_eq!(ids(&["--since", "3h30m"]), "123");
    assert_eq!(ids(&["--since", "5h30m", "--until", "210m ago"]), "45");
    assert_eq!(ids(&["--table", "public.u"]), "56789");
    assert_eq!(ids(&["--table", "t", "--type", "insert_exists"]), "13");
    assert_eq!(ids(&["--key", "id=4"]), "4");
    assert_eq!(ids(&["--key", "name=k7,id=7"]), "7");
    assert_eq!(ids(&["--key", "{\"name\": \"k8\"}"]), "8");
    assert_eq!(ids(&["--node", "b"]), "123");
    assert_eq!(ids(&["--node", "3", "--limit", "1"]), "4");
    let shown = node.ok(&["conflicts", "show", "00000000-0000-0000-0000-000000000003"]);
    assert!(
        shown.contains("here") && shown.contains("there") && shown.contains("insert_exists"),
        "{shown}"
    );
    assert!(
        node.refused(&["conflicts", "show", "0000"], 1)
            .contains("more than one")
    );
    assert!(
        node.refused(&["conflicts", "show", "ffff"], 1)
            .contains("no conflict")
    );
    node.refused(&["conflicts", "list", "--since", "soonish"], 2);
    node.refused(&["conflicts", "list", "--limit", "0"], 2);
}

#[tokio::test]
async fn doctor_tells_what_is_to_be_left_out_of_the_log_and_is_not() {
    let node = Node::new().await;
    let admin = node.server.admin().await;
    admin.batch_execute(SCHEMA).await.unwrap();
    node.configure(
        "[conflict_log]\nredact = [\"public.plain.n\", \"public.parted_*.body\", \"public.parted.body\", \"public.plain.m\"]",
    );
    node.set_up().await;
    let findings = node.doctor();
    let told: Vec<(&str, &str)> = findings
        .iter()
        .map(|finding| {
            (
                finding["check"].as_str().unwrap(),
                finding["found"].as_str().unwrap(),
            )
        })
        .filter(|(check, _)| check.starts_with("conflict_log.redact"))
        .collect();
    let [(parted, of_partitions), (plain, of_none)] = told.as_slice() else {
        panic!("{told:?}");
    };
    assert_eq!(
        (*parted, *plain),
        (
            "conflict_log.redact: public.parted.body",
            "conflict_log.redact: public.plain.m"
        )
    );
    assert!(
        of_partitions.contains("names of its partitions") && of_none.contains("no table here"),
        "{told:?}"
    );
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("anabranch.toml");
    std::fs::write(
        &path,
        "[node]\nnaem = \"a\"\n[postgres]\ndsn = \"host=/x user=u password=hunter2 wrong\"\n",
    )
    .unwrap();
    for verb in [&["run"][..], &["init"], &["doctor"], &["status"], &["config"]] {
        let output = program().args(verb).arg("--config").arg(&path).output().unwrap();
        let said = both(&output).split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(output.status.code(), Some(1), "{verb:?}: {said}");
        assert!(
            said.contains("did you mean `name`?") && said.contains("cluster.id"),
            "{verb:?}: {said}"
        );
        assert!(!said.contains("hunter2"), "{verb:?}: {said}");
    }
}

#[test]
fn a_log_that_takes_nothing_ends_nothing() {
    // As a file on a disk that is full: the warning, and the error that ends it.
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let status = program()
        .args(["run", "--config", "/nonexistent/anabranch.toml"])
        .env("ANABRANCH_LOG", "anabranch_node=loud")
        .stderr(full)
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn wrong_usage_ends_with_two_and_completions_are_printed() {
    for args in [
        &["frobnicate"][..],
        &["grants", "--pg-version", "14"],
        &["status", "--output", "xml"],
    ] {
        assert_eq!(
            program().args(args).output().unwrap().status.code(),
            Some(2),
            "{args:?}"
        );
    }
    for shell in ["bash", "zsh", "fish"] {
        let output = program().args(["completion", shell]).output().unwrap();
        assert!(
            output.status.success()
                && both(&output).contains("quarantine") | both(&output).contains("doctor")
        );
    }
}

/// The first thing that a new user runs.
#[test]
fn the_demo_ends_with_equal_rows_and_two_losers_in_every_log_and_leaves_nothing() {
    let args = ["demo", "--non-interactive", "--output", "json"];
    let output = program().args(args).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", both(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    let events: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let all = |name: &str| -> Vec<&Value> { events.iter().filter(|event| event["event"] == name).collect() };
    assert_eq!(all("set_up").len(), 3, "{text}");
    let equal = all("equal");
    assert_eq!(equal.len(), 2, "{text}");
    assert_eq!(equal[0]["rows"].as_array().unwrap().len(), 3, "{text}");
    let stocks: Vec<&Value> = all("holds")
        .into_iter()
        .map(|held| &held["rows"][0]["stock"])
        .collect();
    assert_eq!(stocks, ["7", "8", "9"], "they were not apart: {text}");
    // Whoever wrote last.
    assert_eq!(equal[1]["rows"][0]["note"], "counted at cedar", "{text}");
    let losers = all("logged")[0]["conflict_ids"].as_array().map(Vec::len);
    assert_eq!(losers, Some(2), "{text}");
    assert_eq!(events.last().unwrap()["event"], "stopped", "{text}");
    let folder = events[0]["folder"].as_str().unwrap();
    assert!(!Path::new(folder).exists(), "{folder} is left");
}

#[test]
fn status_without_a_daemon_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = config_without_a_server(folder.path());
    let output = program()
        .args(["status", "--config"])
        .arg(&path)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(both(&output).contains("no daemon answers"), "{}", both(&output));
    let shown = program()
        .args(["config", "--config"])
        .arg(&path)
        .env("ANABRANCH_NODE__NAME", "z")
        .output()
        .unwrap();
    let shown = both(&shown);
    assert!(
        shown.contains("name = \"z\"") && shown.contains("password=***") && !shown.contains("hunter2"),
        "{shown}"
    );
}

fn config_without_a_server(folder: &Path) -> PathBuf {
    let path = folder.join("anabranch.toml");
    let text = format!(
        "[node]\nname = \"a\"\nid = 1\ndata_dir = \"{}\"\n[cluster]\nid = \"c\"\n[listen]\naddress = \"127.0.0.1:0\"\n\
         [postgres]\ndsn = \"host={} user=u dbname=d password=hunter2\"\n",
        folder.display(),
        folder.display()
    );
    std::fs::write(&path, text).unwrap();
    path
}

/// A deadline only so that a hanging program fails the test; nothing is asserted about time.
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn sigterm_drains_the_daemon_and_ends_it_with_zero() {
    let node = Node::new().await;
    node.server
        .admin()
        .await
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY)")
        .await
        .unwrap();
    node.set_up().await;
    let mut child = node
        .command(&["run", "--log-format", "json"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let ask = || node.run(&["status", "--output", "json"]);
    let started = std::time::Instant::now();
    let status = loop {
        let output = ask();
        if output.status.success() {
            break serde_json::from_slice::<Value>(&output.stdout).unwrap();
        }
        assert!(child.try_wait().unwrap().is_none(), "the daemon ended");
        assert!(started.elapsed() < PATIENCE, "{}", both(&output));
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(status["node"]["name"], "a");
    assert!(node.ok(&["status"]).contains("node a (1) of cluster c"));
    assert!(node.refused(&["remove", "--yes"], 1).contains("stop it first"));
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", both(&output));
    let log = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(
        lines.iter().any(|line| line["fields"]["message"] == "draining"),
        "{log}"
    );
    assert!(node.refused(&["status"], 1).contains("no daemon answers"));
}

/// A configuration without a server behind it, and a policy file beside it.
fn with_policy(policy: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text = "[node]\nname = \"a\"\nid = 1\ndata_dir = \"/nowhere\"\n[cluster]\nid = \"c\"\npolicy = \"policy.toml\"\n\
        [listen]\naddress = \"127.0.0.1:0\"\n[[peers]]\nname = \"b\"\nid = 2\naddress = \"127.0.0.1:1\"\n\
        [postgres]\ndsn = \"host=/nowhere dbname=d user=u\"\n";
    std::fs::write(folder.path().join("anabranch.toml"), text).unwrap();
    std::fs::write(folder.path().join("policy.toml"), policy).unwrap();
    folder
}

/// `anabranch policy ARGS`: exit code and all that was said.
fn policy(folder: &Path, args: &[&str]) -> (i32, String) {
    let output = program()
        .arg("policy")
        .args(args)
        .arg("--config")
        .arg(folder.join("anabranch.toml"))
        .current_dir(folder)
        .output()
        .unwrap();
    (output.status.code().unwrap(), both(&output))
}

const HEAVIEST: &str = "fn resolve(versions) {\n    let best = 0;\n    for i in 1..versions.len() {\n        if !versions[i].deleted \
    && (versions[best].deleted || versions[i].row.weight >= versions[best].row.weight) { best = i; }\n    }\n    best\n}\n";

#[test]
fn a_script_is_checked_with_its_place_and_its_text_decides() {
    let folder =
        with_policy("[[table]]\nname = \"public.a\"\npolicy = \"script\"\nscript = \"heaviest.rhai\"\n");
    let script = folder.path().join("heaviest.rhai");
    let (code, said) = policy(folder.path(), &["check"]);
    assert!(
        code == 1 && said.contains("cannot read the script heaviest.rhai"),
        "{said}"
    );
    std::fs::write(&script, HEAVIEST.replace("let best = 0;", "let best = ;")).unwrap();
    let (code, said) = policy(folder.path(), &["check"]);
    assert!(
        code == 1 && said.contains("`public.a`: script heaviest.rhai: line 2, column 16"),
        "{said}"
    );
    std::fs::write(&script, HEAVIEST).unwrap();
    let (code, said) = policy(folder.path(), &["check"]);
    assert!(code == 0 && said.contains("tried with 96 conflicts"), "{said}");
    let (code, said) = policy(folder.path(), &["check", "--output", "json"]);
    let report: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(
        (code, &report["scripts"][0]["name"]),
        (0, &Value::from("heaviest.rhai"))
    );
    let (code, said) = policy(folder.path(), &["show", "--table", "public.a"]);
    assert!(code == 0 && said.contains("script heaviest.rhai ("), "{said}");

    // Beside another policy file lies another script of the same name.
    let other = folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::copy(folder.path().join("policy.toml"), other.join("policy.toml")).unwrap();
    std::fs::write(other.join("heaviest.rhai"), HEAVIEST.replace(">=", ">")).unwrap();
    let (code, said) = policy(folder.path(), &["diff", "other/policy.toml"]);
    assert_eq!(code, 1);
    assert!(
        said.contains("weight > versions[best]") && said.contains("+ public.a: script heaviest.rhai ("),
        "{said}"
    );
}

#[test]
fn a_script_is_tried_with_conflicts_that_are_written_down() {
    let folder = tempfile::tempdir().unwrap();
    let test = |script: &str, rows: &str, args: &[&str]| {
        std::fs::write(folder.path().join("s.rhai"), script).unwrap();
        std::fs::write(folder.path().join("rows.json"), rows).unwrap();
        let command = ["policy", "test", "s.rhai", "--rows", "rows.json"];
        let output = program()
            .args(command)
            .args(args)
            .current_dir(folder.path())
            .output()
            .unwrap();
        (output.status.code().unwrap(), both(&output))
    };
    let heavy = r#"[{"name": "heavy", "expect": 0, "versions": [
        {"origin": "berlin", "row": {"id": 1, "weight": 12345678901234567.0000000002}},
        {"origin": "oslo", "deleted": true},
        {"origin": "kyiv", "row": {"id": 1, "weight": 12345678901234567.0000000001}}]}]"#;
    let (code, said) = test(HEAVIEST, heavy, &[]);
    assert!(
        code == 0 && said.contains("heavy") && said.contains("ok"),
        "{said}"
    );
    let (code, said) = test(HEAVIEST, &heavy.replace("\"expect\": 0", "\"expect\": 2"), &[]);
    assert!(code == 1 && said.contains("version 2 was expected"), "{said}");

    // An error, with its place.
    let (code, said) = test(HEAVIEST, &heavy.replace("weight", "mass"), &["--output", "json"]);
    let report: Value = serde_json::from_str(&said).unwrap();
    let conflict = &report["conflicts"][0];
    assert_eq!(
        (code, &report["ok"], &conflict["chosen"]),
        (1, &Value::from(false), &Value::from(2)),
        "{said}"
    );
    assert_eq!(
        (&conflict["error"]["line"], &conflict["error"]["sqlstate"]),
        (&Value::from(4), &Value::from("38000"))
    );
    let (code, said) = test("fn resolve(versions) {\n  let }", heavy, &[]);
    assert!(code == 1 && said.contains("s.rhai: line 2, column 7"), "{said}");

    for (rows, said_of) in [
        ("[{\"versions\": []}]", "has 0 versions"),
        ("[{", "line 1"),
        (
            &heavy.replace("\"deleted\": true", "\"deleted\": false"),
            "either",
        ),
        (
            &heavy.replace("\"expect\": 0", "\"expect\": 3"),
            "the last one is 2",
        ),
    ] {
        let (code, said) = test(HEAVIEST, rows, &[]);
        assert!(code == 2 && said.contains(said_of), "{said_of}: {said}");
    }
}

#[test]
fn a_policy_file_is_checked_shown_and_compared_without_a_server() {
    let folder = with_policy(
        "[[table]]\nname = \"public.price_*\"\npolicy = \"origin_priority\"\npriority = [\"b\", \"a\"]\n",
    );
    let (code, said) = policy(folder.path(), &["check", "--output", "json"]);
    // Behind it, on standard error: the database does not answer.
    let (report, warning) = said.split_once("\nanabranch: ").unwrap();
    let report: Value = serde_json::from_str(report).unwrap();
    assert_eq!((code, &report["rules"]), (0, &Value::from(1)));
    assert!(warning.contains("only those in `peers`"), "{warning}");
    let (code, said) = policy(folder.path(), &["show", "--table", "public.price_eu"]);
    assert!(code == 0 && said.contains("origin_priority 2 1"), "{said}");
    let (code, said) = policy(folder.path(), &["show", "--table", "public.other"]);
    assert!(code == 0 && said.contains("last_update_wins"), "{said}");
    let (code, said) = policy(folder.path(), &["show", "--table", "other"]);
    assert!(code == 2 && said.contains("write schema.table"), "{said}");

    std::fs::write(
        folder.path().join("new.toml"),
        "[[table]]\nname = \"public.*\"\ndeletes = \"delete_wins\"",
    )
    .unwrap();
    let (code, said) = policy(folder.path(), &["diff", "new.toml"]);
    assert_eq!(code, 1);
    assert!(said.contains("- public.price_*: origin_priority 2 1"), "{said}");
    assert!(
        said.contains("+ public.*: last_update_wins, delete_wins"),
        "{said}"
    );
    let (code, said) = policy(folder.path(), &["diff", "policy.toml"]);
    assert!(code == 0 && said.contains("the same decisions"), "{said}");

    std::fs::write(
        folder.path().join("policy.toml"),
        "[[table]]\nname = \"public.a\"\npolicy = \"newest\"",
    )
    .unwrap();
    let (code, said) = policy(folder.path(), &["check"]);
    assert!(code == 1 && said.contains("unknown variant `newest`"), "{said}");
    let (code, said) = policy(folder.path(), &["check", "missing.toml"]);
    assert!(
        code == 1 && said.contains("cannot read the policy file"),
        "{said}"
    );
}
