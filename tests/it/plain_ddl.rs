//! Plain DDL travels by itself where `ddl.capture` says so: once, at its place among the rows, or not at all and with a word.

use anabranch_tests::Cluster;
use anabranch_tests::cluster::{Node, init};
use anabranch_tests::daemon::{anabranch, anabranch_ok, anabranch_refuses};
use anabranch_tests::session::Session;

const CONFIG: &str = "[ddl]\nroles = [\"app\"]\ncapture = true\n";
const SCHEMA: &str = "create table item (id int primary key, n int)";
const TRAVELLED: &str = "select count(*) from anabranch.ddl";

async fn doctor(node: &Node) -> String {
    let output = anabranch(&["doctor", "--config", node.daemon.config_arg()]).await;
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What psql says beside the outcome when a role runs one command there: NOTICE, WARNING, ERROR, hints.
fn psql(node: &Node, user: &str, command: &str) -> String {
    let output = node
        .server
        .client("psql", "app")
        .env("PGUSER", user)
        .args(["-X", "-c", command])
        .output()
        .expect("psql runs");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Each statement as a message of its own.
async fn each(session: &Session, statements: &[&str]) {
    for statement in statements {
        session.run(statement).await;
    }
}

/// Waits until a column is there.
async fn wait_column(cluster: &Cluster, node: usize, table: &str, column: &str) {
    let there = format!(
        "select count(*) from pg_attribute a join pg_class c on c.oid = a.attrelid \
         where c.relname = '{table}' and a.attname = '{column}'"
    );
    cluster.wait_value(node, &there, "1").await;
}

async fn refused(session: &Session, statement: &str) -> String {
    session.try_run(statement).await.expect_err(statement).to_string()
}

#[tokio::test]
async fn plain_ddl_travels_once_at_its_place_among_the_rows_from_any_node_and_by_either_protocol() {
    let cluster = Cluster::of([15, 18]).schema(SCHEMA).config(CONFIG).start().await;
    for (node, other) in [(0, 1), (1, 0)] {
        let app = cluster.session(node).await;
        let first = node * 100;
        each(
            &app,
            &[
                "begin",
                &format!("insert into item (id, n) values ({first}, 1)"),
                &format!("/* in; the midst */ alter table item add column note_{node} text not null default 'a;b'; -- so;"),
                &format!("insert into item (id, n, note_{node}) values ({first} + 1, 2, 'after')"),
                &format!("create table fresh_{node} (id int primary key, v text)"),
                &format!("insert into fresh_{node} values (1, repeat('long', 1000))"),
                "savepoint s",
                "create table given_up (id int primary key)",
                "rollback to s",
                "commit",
            ],
        )
        .await;
        for statement in [
            format!("create type mood_{node} as enum ('sad', 'glad')"),
            format!("alter table fresh_{node} add column mood mood_{node};"),
            format!("-- an index\ncreate index fresh_v_{node} on fresh_{node} (left(v, 10))"),
            format!("comment on table fresh_{node} is E'it\\'s; new'"),
            format!("create function two_{node}() returns int begin atomic select 1; select 2; end"),
            format!("create view glad_{node} as select * from fresh_{node} where mood = 'glad'"),
        ] {
            app.try_extended(&statement)
                .await
                .unwrap_or_else(|error| panic!("{statement}: {error}"));
        }
        app.run(&format!("insert into fresh_{node} values (2, 'x', 'glad')"))
            .await;
        wait_column(&cluster, other, &format!("fresh_{node}"), "mood").await;
        cluster
            .wait_value(
                other,
                &format!("select count(*) from fresh_{node} where mood = 'glad'"),
                "1",
            )
            .await;
    }
    cluster.converge().await;
    cluster.expect(TRAVELLED, "16").await;
    cluster
        .expect(
            "select string_agg(concat_ws(' ', id, n, note_0, note_1), ',' order by id) from item",
            "0 1 a;b a;b,1 2 after a;b,100 1 a;b a;b,101 2 a;b after",
        )
        .await;
    cluster
        .expect(
            "select two_0() + two_1() || obj_description('fresh_0'::regclass)",
            "4it's; new",
        )
        .await;
    // Said in the other ways it travels once, too, and as one statement.
    let app = cluster.session(0).await;
    app.run("select anabranch.replicate_ddl('alter table item add column a int; alter table item add column b text')")
        .await;
    app.run("do $$ begin perform anabranch.replicate_ddl('alter table item add column c int'); end $$")
        .await;
    wait_column(&cluster, 1, "item", "c").await;
    let config = cluster.nodes[1].daemon.config_arg();
    anabranch_ok(&["ddl", "alter table item add column d int", "--config", config]).await;
    app.run("drop view glad_0").await;
    app.run("drop table fresh_0, fresh_1 cascade").await;
    app.run("insert into item (id, c) values (7, 7)").await;
    cluster
        .wait_value(1, "select count(*) from item where c = 7", "1")
        .await;
    cluster.wait_value(0, TRAVELLED, "21").await;
    cluster.converge().await;
    cluster.expect(TRAVELLED, "21").await;
    cluster
        .expect("select count(*) from pg_class where relname in ('fresh_0', 'fresh_1', 'glad_0', 'glad_1', 'given_up')", "0")
        .await;
    for node in [0, 1] {
        let status = cluster.status(node).await;
        assert_eq!(status["alarms"], serde_json::json!([]), "{status}");
    }
}

#[tokio::test]
async fn what_cannot_be_taken_apart_is_refused_with_all_that_is_beside_it() {
    let cluster = Cluster::of([15, 18]).schema(SCHEMA).config(CONFIG).start().await;
    for node in [0, 1] {
        let app = cluster.session(node).await;
        app.run(
            "set anabranch.capture = off; create function helper() returns int language plpgsql security definer as \
            $$ begin alter table item add column helped int; return 1; end $$; reset anabranch.capture",
        )
        .await;
        let several = "one of several statements in one string";
        let within = "run by a function or a DO block";
        for (statement, words) in [
            (
                "alter table item add column a int; alter table item add column b int",
                several,
            ),
            (
                "insert into item values (1, 1); alter table item add column a int",
                several,
            ),
            (
                "alter table item add column a int; insert into item values (1, 1)",
                several,
            ),
            ("select '; '; create table a (id int primary key)", several),
            ("begin; alter table item add column a int; commit", several),
            ("do $$ begin alter table item add column a int; end $$", within),
            ("do $$ begin execute 'drop table item'; end $$", within),
            ("do $$ begin create table a (id int primary key); end $$", within),
            ("select helper()", within),
            // As by `replicate_ddl`.
            ("create table keyless (v text)", "has no primary key"),
            ("create unlogged table u (id int primary key)", "is unlogged"),
            ("alter table item drop constraint item_pkey", "has no primary key"),
            ("create table filled as select 1 as id", "has no primary key"),
            ("select 1 as id into filled", "SELECT is no DDL"),
        ] {
            let said = refused(&app, statement).await;
            let _ = app.try_run("rollback").await;
            assert!(said.contains(words), "{statement}: {said}");
        }
        app.run("insert into item values (5, 5)").await;
        let said = refused(&app, "alter table item add column at timestamptz default now()").await;
        assert!(said.contains("other values at each node"), "{said}");
        app.run("delete from item").await;
        app.run("set standard_conforming_strings = off").await;
        let said = refused(&app, r"comment on table item is 'it\'s; x'").await;
        assert!(said.contains("has a backslash"), "{said}");
        app.run("reset standard_conforming_strings").await;
        // One who has nothing to do with it cannot lead it past by a function of the owner's.
        let admin = cluster.admin(node).await;
        admin.run("create role mallory login").await;
        admin.run("set session authorization mallory").await;
        let said = refused(&admin, "set anabranch.capture = off; select helper()").await;
        assert!(said.contains(within), "{said}");
        let hint = psql(
            &cluster.nodes[node],
            "app",
            "alter table item add column a int; select 1",
        );
        assert!(hint.contains("HINT:  Send each statement by itself"), "{hint}");
    }
    cluster.converge().await;
    cluster.expect("select count(*) from item", "0").await;
    cluster
        .expect("select string_agg(attname, ' ' order by attnum) from pg_attribute where attrelid = 'item'::regclass and attnum > 0", "id n")
        .await;
    cluster
        .expect(
            "select count(*) from pg_class where relname in ('a', 'keyless', 'u', 'filled')",
            "0",
        )
        .await;
    cluster.expect(TRAVELLED, "0").await;
}

#[tokio::test]
async fn what_is_a_nodes_own_stays_there_and_nobody_is_locked_out() {
    let cluster = Cluster::of([15, 18])
        .schema(SCHEMA)
        .schema("create schema private; create table private.log (id int primary key, n int)")
        .config(CONFIG)
        .start()
        .await;
    for node in [0, 1] {
        let here = &cluster.nodes[node];
        let app = cluster.session(node).await;
        each(
            &app,
            &[
                "create temp table scratch (id serial, n int)",
                "create index on scratch (n)",
                "alter table scratch add column m int; alter table scratch drop column m",
                "drop table scratch",
                "do $$ begin create temp table scratch (id int); drop table scratch; end $$",
                "create table private.more (id serial primary key, v text); create index more_v on private.more (v)",
                "alter table private.log add column note text",
                "comment on column private.log.note is 'of this node'",
                "drop index private.more_v",
                "drop table private.more",
                "do $$ begin alter table private.log drop column note; end $$",
                "create table if not exists item (id int); select 1",
                "reindex table item",
            ],
        )
        .await;
        for command in [
            "create index concurrently item_n on item (n)",
            "drop index concurrently item_n",
        ] {
            let said = psql(here, "app", command);
            assert!(
                said.contains("NOTICE") && said.contains("stays at this node: CONCURRENTLY"),
                "{said}"
            );
        }
        cluster.admin(node).await.run("create role reader").await;
        let said = psql(here, "app", "grant select on item to reader");
        assert!(said.contains("NOTICE:  GRANT stays at this node"), "{said}");
        // Who is none of `ddl.roles` is told, and never refused.
        for command in [
            "alter table item add column super int",
            "alter table item drop column super",
            "do $$ begin create table item_2 (id int primary key); end $$; select 1",
        ] {
            let said = psql(here, "postgres", command);
            assert!(
                said.contains("WARNING") && said.contains("DDL of role postgres does not travel"),
                "{command}: {said}"
            );
        }
        for command in [
            "create table private.super (id int)",
            "drop table private.super",
            // Of no publication, so of nobody else either.
            "drop table item_2",
            "create temp table s (id int)",
        ] {
            assert_eq!(psql(here, "postgres", command), "", "{command}");
        }
        app.run("set anabranch.capture = off").await;
        app.run("create table own (id int primary key); drop table own")
            .await;
        app.run("reset anabranch.capture").await;
    }
    cluster.converge().await;
    cluster.expect(TRAVELLED, "0").await;

    // A fault of ours is in nobody's way but the roles', and theirs know the way out.
    let here = &cluster.nodes[0];
    let admin = cluster.admin(0).await;
    admin.run("set anabranch.capture = off; alter function anabranch.capture_ddl(text, text, name, boolean) rename to gone").await;
    let said = psql(here, "postgres", "create table broken (id int primary key)");
    assert!(
        said.contains("WARNING:  anabranch cannot tell") && !said.contains("ERROR"),
        "{said}"
    );
    admin.run("drop table broken").await;
    let app = cluster.session(0).await;
    let said = refused(&app, "create table broken (id int primary key)").await;
    assert!(said.contains("capture_ddl"), "{said}");
    app.run("set anabranch.capture = off; create table broken (id int primary key); drop table broken")
        .await;
    admin.run("alter event trigger anabranch_capture_2_start disable; alter event trigger anabranch_capture_2_drop disable; \
        alter event trigger anabranch_capture_2_end disable").await;
    let other = cluster.session(0).await;
    other.run("create table broken (id int primary key)").await;
    other.run("drop table broken").await;
    let said = doctor(here).await;
    assert!(said.contains("3 event trigger(s) are disabled"), "{said}");
}

#[tokio::test]
async fn init_makes_it_and_takes_it_away_doctor_tells_and_remove_leaves_nothing() {
    let mut cluster = Cluster::of([15, 18]).schema(SCHEMA).config(CONFIG).start().await;
    let triggers = "select count(*) from pg_event_trigger";
    cluster.expect(triggers, "6").await;
    for node in [0, 1] {
        let here = &cluster.nodes[node];
        assert!(doctor(here).await.contains("plain DDL of app travels"));
        assert!(!init(here, &["--dry-run"]).await.contains("EVENT TRIGGER"));
        // Somebody drops one of them.
        cluster
            .admin(node)
            .await
            .run("drop event trigger anabranch_capture_2_end")
            .await;
        assert!(doctor(here).await.contains("the event triggers are not there"));
        let planned = init(here, &["--dry-run"]).await;
        assert!(
            planned.contains("CREATE EVENT TRIGGER anabranch_capture_2_end"),
            "{planned}"
        );
        assert!(init(here, &[]).await.contains("said plainly, too"));
        assert!(doctor(here).await.contains("plain DDL of app travels"));
        // Switched off.
        here.daemon
            .edit_config(|text| text.replace("capture = true", "capture = false"));
        assert!(
            doctor(here)
                .await
                .contains("event triggers that capture plain DDL are there")
        );
        init(here, &[]).await;
        let said = doctor(here).await;
        assert!(
            !said.contains("ddl.capture") && !said.contains("ddl.roles"),
            "{said}"
        );
        here.daemon
            .edit_config(|text| text.replace("roles = [\"app\"]", "roles = []"));
        let said = doctor(here).await;
        assert!(
            said.contains("DDL of the roles of before still travels"),
            "{said}"
        );
        here.daemon
            .edit_config(|text| text.replace("roles = []", "roles = [\"app\"]"));
        let app = cluster.session(node).await;
        app.run("create table by_hand (id int primary key); drop table by_hand")
            .await;
        app.run(&format!(
            "select anabranch.replicate_ddl('create table said_{node} (id int primary key)')"
        ))
        .await;
    }
    cluster.expect(triggers, "0").await;
    for node in [0, 1] {
        cluster
            .wait_value(
                node,
                "select count(*) from pg_class where relname in ('said_0', 'said_1')",
                "2",
            )
            .await;
        let here = &cluster.nodes[node];
        here.daemon
            .edit_config(|text| text.replace("capture = false", "capture = true"));
        init(here, &[]).await;
    }
    cluster
        .session(0)
        .await
        .run("alter table said_0 add column more int")
        .await;
    cluster
        .session(0)
        .await
        .run("insert into said_0 values (1, 1)")
        .await;
    cluster.converge().await;
    cluster.expect("select more from said_0", "1").await;
    for node in [0, 1] {
        let here = &mut cluster.nodes[node];
        here.daemon.stop();
        let admin = here.server.dsn("postgres", "app");
        let config = here.daemon.config_arg();
        anabranch_ok(&[
            "remove",
            "--yes",
            "--without-leaving",
            "--config",
            config,
            "--admin-dsn",
            &admin,
        ])
        .await;
    }
    cluster.expect(triggers, "0").await;
    cluster
        .expect(
            "select count(*) from pg_namespace where nspname like 'anabranch%'",
            "0",
        )
        .await;
    let here = &cluster.nodes[0];
    here.daemon
        .edit_config(|text| text.replace("roles = [\"app\"]", "roles = []"));
    let said = anabranch_refuses(&["config", "--config", here.daemon.config_arg()]).await;
    assert!(
        said.contains("ddl.capture") && said.contains("name the owners of the tables in ddl.roles"),
        "{said}"
    );
}

#[tokio::test]
async fn a_server_joins_and_captures_as_the_others_do() {
    let mut cluster = Cluster::of([15, 18]).schema(SCHEMA).config(CONFIG).start().await;
    cluster.run(0, "insert into item values (1, 1)").await;
    let node = cluster.add_server(18).await;
    cluster.nodes[node]
        .daemon
        .edit_config(|text| text.to_owned() + CONFIG);
    cluster.join(node, 0).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.expect("select count(*) from pg_event_trigger", "6").await;
    let app = cluster.session(node).await;
    app.run("alter table item add column more int").await;
    app.run("insert into item values (2, 2, 2)").await;
    wait_column(&cluster, 0, "item", "more").await;
    cluster
        .wait_value(0, "select more from item where id = 2", "2")
        .await;
    cluster.converge().await;
    cluster.expect(TRAVELLED, "1").await;
}

#[tokio::test]
async fn a_string_is_taken_apart_as_the_server_takes_it_apart_or_not_at_all() {
    let cluster = Cluster::of([15, 18])
        .schema(SCHEMA)
        .config(CONFIG)
        .without_daemons()
        .start()
        .await;
    for node in [0, 1] {
        let admin = cluster.admin(node).await;
        for (text, statements) in [
            ("alter table a add b int", "1"),
            ("-- x; y\nalter table a add b int; -- z;", "1"),
            ("/* a; /* b; */ ; */ alter table a ; /* ; */", "1"),
            (" ; ; ", "0"),
            ("a; b", "2"),
            ("a 'x;y'' ;' ; b", "2"),
            (r"comment on table a is E'it\'s; x'", "1"),
            (r"comment on table a is E'it\\'; drop", "2"),
            (r"comment on table a is 'it\'; drop", "2"),
            ("comment on table a is E'x'\n 'it\\'s; ok'", "1"),
            (r"select date'2020-01-01\'; b", "2"),
            ("create table \"a;b\"\"c;\" (x int)", "1"),
            ("create function f() as $$ a; $x$ b; $$ ; b", "2"),
            ("create function f() as $x$ a; $$ b; $x$", "1"),
            ("select a$b$; c$b$ from x", "2"),
            ("do '$$'; b; select '$$'", "3"),
            (
                "create rule r as on insert to t do (insert into a values (1); select 2);",
                "1",
            ),
            (
                "create function f() returns int begin atomic select 1; select case when true then 1 end; end; drop table x",
                "2",
            ),
            (
                "create function f() returns int begin atomic select begin from x; end; drop table x",
                "∅",
            ),
            ("/* open ; ", "∅"),
            ("it's", "∅"),
            ("a (;", "∅"),
        ] {
            let quoted = text.replace('\'', "''");
            let told = admin
                .value(&format!("select cardinality(anabranch.statements('{quoted}'))"))
                .await;
            assert_eq!(told, statements, "{text}");
        }
    }
}

#[tokio::test]
async fn what_literals_mean_to_a_session_travels_with_its_ddl() {
    let cluster = Cluster::of([15, 18]).schema(SCHEMA).config(CONFIG).start().await;
    let app = cluster.session(0).await;
    each(
        &app,
        &[
            "insert into item values (1, 1)",
            "set timezone = 'Europe/Berlin'",
            "set datestyle = 'SQL, DMY'",
            "set intervalstyle = 'sql_standard'",
            "alter table item add column at timestamptz not null default '02/01/2020 00:00'",
            "alter table item add column lasts interval not null default '-1 2:03:04'",
            "select anabranch.replicate_ddl('alter table item add column due date default ''03/04/2021''')",
            // Its table comes behind it, as in what pg_dump writes.
            "set check_function_bodies = off",
            "create function later() returns bigint language sql as 'select count(*) from later_made'",
            "create table later_made (id int primary key)",
        ],
    )
    .await;
    wait_column(&cluster, 1, "later_made", "id").await;
    cluster.converge().await;
    for node in 0..2 {
        let admin = cluster.admin(node).await;
        let read = "select extract(epoch from at)::int8 || ' ' || extract(epoch from lasts)::int8 || ' ' || to_char(due, 'YYYY-MM-DD') from item";
        assert_eq!(
            admin.value(read).await,
            "1577919600 -93784 2021-04-03",
            "n{}",
            node + 1
        );
        assert_eq!(admin.value("select public.later()").await, "0");
        // What runs behind it in the same session reads as before.
        assert_eq!(
            admin
                .value("select count(*) from anabranch.ddl where command like 'SET LOCAL%'")
                .await,
            "5"
        );
    }
}

#[tokio::test]
async fn ddl_that_would_part_the_nodes_is_refused() {
    let cluster = Cluster::of([15, 15])
        .schema("create table item (id serial primary key, n int); create index item_n on item (n)")
        .config(CONFIG)
        .start()
        .await;
    let app = cluster.session(0).await;
    app.run("create temporary table mine (id int)").await;
    for (statement, why) in [
        (
            "alter sequence item_id_seq restart with 5000",
            "the same next ids",
        ),
        ("alter sequence item_id_seq increment by 3", "the same next ids"),
        ("drop owned by app", "DROP OWNED"),
        (
            "select anabranch.replicate_ddl('drop owned by app')",
            "DROP OWNED",
        ),
        ("drop table mine, item", "not"),
    ] {
        let said = refused(&app, statement).await;
        assert!(said.contains(why), "{statement}: {said}");
    }
    let before = cluster.session(1).await;
    each(
        &before,
        &[
            "begin isolation level repeatable read",
            "select count(*) from item",
        ],
    )
    .await;
    app.run("create table later (id int primary key)").await;
    wait_column(&cluster, 1, "later", "id").await;
    let said = refused(&before, "alter table later add column n int").await;
    assert!(
        said.contains("READ COMMITTED") || said.contains("before a table was published"),
        "{said}"
    );
    before.run("rollback").await;
    before.run("alter table later add column n int").await;
    wait_column(&cluster, 0, "later", "n").await;
    cluster.converge().await;
}

#[tokio::test]
async fn long_ddl_is_taken_apart_in_little_more_than_its_length() {
    let cluster = Cluster::of([15, 15]).schema(SCHEMA).config(CONFIG).start().await;
    let app = cluster.session(0).await;
    let strings: Vec<String> = (0..4_000)
        .map(|at| format!("when {at} then 'it is ''{at}'' -- ; $$'"))
        .collect();
    let view = format!(
        "create view told as select case id {} end as said from item /* end ; */",
        strings.join(" ")
    );
    app.run(&view).await;
    app.run("insert into item values (7, 0)").await;
    cluster.converge().await;
    let said = cluster.admin(1).await.value("select said from public.told").await;
    assert_eq!(said, "it is '7' -- ; $$");
    assert_eq!(cluster.admin(1).await.value(TRAVELLED).await, "1");
}
