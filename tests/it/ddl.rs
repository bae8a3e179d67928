//! DDL travels in the stream: at its place among the rows, and where it cannot be run its origin waits.

use std::time::Duration;

use anabranch_tests::Cluster;
use anabranch_tests::cluster::init;
use anabranch_tests::daemon::{anabranch_ok, anabranch_refuses};
use anabranch_tests::load::{self, Load};
use anabranch_tests::proxy::Mode;
use anabranch_tests::wait::{PATIENCE, until, until_ok};
use serde_json::Value;

const CONFIG: &str = "[ddl]\nroles = [\"app\"]\n";
const SCHEMA: &str = "create table item (id int primary key, n int)";

/// `anabranch ddl` at one node.
async fn ddl(cluster: &Cluster, node: usize, args: &[&str]) -> String {
    let config = cluster.nodes[node].daemon.config_arg();
    anabranch_ok(&[&["ddl", "--config", config], args].concat()).await
}

/// Waits until this node says that a statement of another waits, and returns what it says.
async fn wait_stuck(cluster: &Cluster, node: usize, origin: usize) -> Value {
    until_ok(
        &format!("n{} is stuck on n{}'s DDL", node + 1, origin + 1),
        PATIENCE,
        async || {
            let status = cluster.status_or_null(node).await;
            let all = status["ddl"].as_array().cloned().unwrap_or_default();
            let stuck = all.into_iter().find(|stuck| stuck["node"] == origin + 1);
            stuck.ok_or(status)
        },
    )
    .await
}

async fn assert_nothing_waits(cluster: &Cluster, node: usize) {
    until("nothing waits, and no alarm stands", async || {
        let status = cluster.status_or_null(node).await;
        status["ddl"] == serde_json::json!([]) && status["alarms"] == serde_json::json!([])
    })
    .await;
}

#[tokio::test]
async fn a_column_is_added_under_load_at_all_nodes_and_rows_with_it_follow_at_once() {
    let cluster = Cluster::of([15, 18, 15])
        .schema(load::SCHEMA)
        .schema(SCHEMA)
        .config(CONFIG)
        .start()
        .await;
    let load = Load::start(&cluster, &[0, 1, 2], load::Options::default());
    cluster.run(2, "insert into item values (1, 1)").await;
    cluster.wait_value(0, "select count(*) from item", "1").await;
    // In one transaction: rows before it, the change, rows after it.
    cluster
        .run(
            0,
            "begin; update item set n = 2 where id = 1; insert into item values (2, 2); \
             select anabranch.replicate_ddl('alter table item add column note text not null default ''none'''); \
             insert into item values (3, 3, 'after'); update item set note = 'changed' where id = 1; commit",
        )
        .await;
    cluster
        .run(0, "insert into item values (4, 4, 'right behind')")
        .await;
    // The table that the load writes to changes, too: a column with a default that rewrites nothing, and an index.
    for change in [
        "alter table kv add column note text not null default 'new'",
        "create index kv_note on kv (note)",
    ] {
        ddl(&cluster, 1, &[change, "--lock-timeout", "60"]).await;
    }
    // A key that the load does not write, so that nobody's later write can beat it.
    cluster.run(1, "insert into kv values (1000, '{}', 'seen')").await;
    for node in [0, 2] {
        cluster
            .wait_value(
                node,
                "select count(*) from pg_class where relname = 'kv_note'",
                "1",
            )
            .await;
        cluster
            .wait_value(node, "select count(*) from kv where note = 'seen'", "1")
            .await;
    }
    cluster
        .run(2, "insert into item values (5, 5, 'from another node')")
        .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let ledger = load.stop().await;
    cluster.converge_within(Duration::from_secs(120)).await;
    ledger.account_among(&cluster, &[0, 1, 2]).await;
    cluster
        .expect(
            "select string_agg(id || ' ' || n || ' ' || note, ',' order by id) from item",
            "1 2 changed,2 2 none,3 3 after,4 4 right behind,5 5 from another node",
        )
        .await;
    // A table that had no value to store out of line has one now.
    cluster
        .expect("select relreplident from pg_class where relname = 'item'", "f")
        .await;
    cluster
        .expect("select count(*) from anabranch.quarantine", "0")
        .await;
    cluster.expect("select count(*) from anabranch.ddl", "3").await;
}

#[tokio::test]
async fn a_table_a_type_and_an_index_are_created_and_used_in_the_same_breath_at_every_version() {
    let cluster = Cluster::of([18, 15]).schema(SCHEMA).config(CONFIG).start().await;
    cluster
        .run(
            0,
            "begin; select anabranch.replicate_ddl('create type mood as enum (''sad'', ''glad''); \
                 create table person (id int primary key, name text, mood mood); create index on person (name)'); \
             insert into person values (1, 'amber', 'glad'), (2, repeat('long ', 1000), 'sad'); commit",
        )
        .await;
    cluster
        .wait_value(1, "select count(*) from pg_class where relname = 'person'", "1")
        .await;
    cluster
        .run(
            1,
            "update person set mood = 'sad' where id = 1; insert into person values (3, 'birch', null)",
        )
        .await;
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(id || coalesce(mood::text, '-'), ',' order by id) from person",
            "1sad,2sad,3-",
        )
        .await;
    cluster
        .expect("select max(length(name)) from person", "5000")
        .await;
    // A large transaction with DDL in it: it comes in pieces.
    cluster
        .run(
            1,
            "begin; insert into person select i, repeat('x', 200) from generate_series(10, 4000) i; \
             select anabranch.replicate_ddl('alter table person add column age int default 7'); \
             insert into person select i, repeat('y', 200), 'glad', i from generate_series(4001, 8000) i; commit",
        )
        .await;
    let added = "select count(*) from pg_attribute where attrelid = 'person'::regclass and attname = 'age'";
    cluster.wait_value(0, added, "1").await;
    cluster
        .wait_value(0, "select count(*) from person where age = id", "4000")
        .await;
    cluster.converge().await;
    ddl(&cluster, 0, &["drop table person; drop type mood"]).await;
    cluster
        .wait_value(1, "select count(*) from pg_class where relname = 'person'", "0")
        .await;
    cluster.run(0, "insert into item values (1, 1)").await;
    cluster.converge().await;
    for node in [0, 1] {
        assert_nothing_waits(&cluster, node).await;
    }
    let listed = ddl(&cluster, 1, &[]).await;
    assert!(
        listed.contains("drop table person") && listed.contains("run"),
        "{listed}"
    );
}

#[tokio::test]
async fn a_node_that_cannot_run_it_makes_its_origin_wait_while_others_flow_and_goes_on_when_mended() {
    let mut cluster = Cluster::of([15, 18, 15])
        .schema(SCHEMA)
        .config(CONFIG)
        .start()
        .await;
    cluster.run(1, "create table extra (id int primary key)").await;
    cluster.nodes[2].daemon.stop();
    cluster
        .run(
            0,
            "begin; insert into item values (1, 1); \
             select anabranch.replicate_ddl('create table extra (id int primary key, v text)'); \
             insert into extra values (1, 'first'); commit; insert into item values (2, 2)",
        )
        .await;
    let stuck = wait_stuck(&cluster, 1, 0).await;
    assert!(stuck["error"].to_string().contains("already exists"), "{stuck}");
    let shown = anabranch_ok(&["status", "--config", cluster.nodes[1].daemon.config_arg()]).await;
    assert!(
        shown.contains("ALARM") && shown.contains("anabranch ddl --done"),
        "{shown}"
    );
    // Others flow: what was written without having seen it, and what is written at the node that waits.
    cluster.run(2, "insert into item values (3, 3)").await;
    cluster.nodes[2].daemon.start();
    cluster
        .wait_value(1, "select count(*) from item where id = 3", "1")
        .await;
    cluster.run(1, "insert into item values (4, 4)").await;
    for node in [0, 2] {
        cluster.wait_value(node, "select count(*) from item", "4").await;
    }
    assert_eq!(
        cluster
            .value(1, "select count(*) from item where id in (1, 2)")
            .await,
        "0",
        "a transaction is whole, and nothing of its origin passes it"
    );
    // Nothing of it is lost by a crash.
    cluster.nodes[1].daemon.kill();
    cluster.nodes[1].daemon.start();
    wait_stuck(&cluster, 1, 0).await;
    cluster.run(1, "drop table extra").await;
    cluster.wait_value(1, "select count(*) from item", "4").await;
    assert_nothing_waits(&cluster, 1).await;
    cluster.run(1, "insert into extra values (2, 'second')").await;
    cluster.converge().await;
    cluster
        .expect("select string_agg(v, ',' order by id) from extra", "first,second")
        .await;
}

#[tokio::test]
async fn two_nodes_that_change_one_thing_at_once_are_told_and_go_on_when_it_is_done_by_hand() {
    let cluster = Cluster::of([15, 15]).schema(SCHEMA).config(CONFIG).start().await;
    cluster.converge().await;
    cluster.isolate_all();
    ddl(&cluster, 0, &["alter table item add column colour text"]).await;
    ddl(&cluster, 1, &["alter table item add column colour int"]).await;
    cluster.run(0, "insert into item values (1, 1, 'red')").await;
    cluster.heal();
    for (node, origin, theirs) in [
        (0, 1, "node n1 (1): alter table item add column colour text"),
        (1, 0, "node n2 (2): alter table item add column colour int"),
    ] {
        let stuck = wait_stuck(&cluster, node, origin).await;
        assert!(stuck["concurrent"].to_string().contains(theirs), "{stuck}");
        assert!(
            stuck["text"]
                .to_string()
                .contains("neither having seen the other"),
            "{stuck}"
        );
        // By name, for whom does not know the ids.
        let name = format!("of node n{0} ({0}) cannot be run here", origin + 1);
        assert!(stuck["text"].to_string().contains(&name), "{stuck}");
        let listed = ddl(&cluster, node, &[]).await;
        assert!(
            listed.contains(&format!("n{} ({})", origin + 1, origin + 1)),
            "{listed}"
        );
    }
    // It shall be text: node 2 takes its own back, and runs the other's then; node 1 has what is wanted.
    cluster.run(1, "alter table item drop column colour").await;
    let id = wait_stuck(&cluster, 0, 1).await["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let unknown = anabranch_refuses(&[
        "ddl",
        "--done",
        "nonsense",
        "--config",
        cluster.nodes[0].daemon.config_arg(),
    ])
    .await;
    assert!(unknown.contains("does not name one"), "{unknown}");
    let done = ddl(&cluster, 0, &["--done", &id]).await;
    assert!(done.contains("counts as done"), "{done}");
    for node in [0, 1] {
        assert_nothing_waits(&cluster, node).await;
    }
    cluster.run(1, "insert into item values (2, 2, 'blue')").await;
    cluster.converge_within(PATIENCE).await;
    cluster
        .expect("select string_agg(colour, ',' order by id) from item", "red,blue")
        .await;
    let listed = ddl(&cluster, 0, &[]).await;
    assert!(listed.contains("by hand"), "{listed}");
}

/// Texts of the alarm that says that statements of two nodes changed one thing.
async fn conflicts(cluster: &Cluster, node: usize) -> Vec<String> {
    let status = cluster.status_or_null(node).await;
    let alarms = status["alarms"].as_array().cloned().unwrap_or_default();
    let alarms = alarms.iter().filter(|alarm| alarm["name"] == "ddl_conflict");
    alarms.map(|alarm| alarm["text"].to_string()).collect()
}

const CHANGEABLE: &str = "
    create table other (id int primary key, v text);
    create table item_note (id int primary key, v text);
    create type mood as enum ('sad', 'glad');
    create function price() returns int language sql as 'select 1'";

#[tokio::test]
async fn statements_of_two_nodes_that_run_at_both_and_change_one_thing_are_told() {
    let mut cluster = Cluster::of([15, 18])
        .schema(SCHEMA)
        .schema(CHANGEABLE)
        .config(CONFIG)
        .start()
        .await;
    // On different things, or the same at both; and what only adds to one table.
    cluster.isolate_all();
    for (node, statements) in [
        (
            0,
            [
                "alter table other alter column v set default 'a'",
                "alter table item_note alter column v set default 'same'",
                "alter table item add column a int",
                "create table child (id int primary key, other int references other)",
            ],
        ),
        (
            1,
            [
                "alter table item alter column n set default 7",
                "alter table item_note alter column v set default 'same'",
                "alter table item add column b int",
                "alter table other add column more int",
            ],
        ),
    ] {
        for statement in statements {
            ddl(&cluster, node, &[statement]).await;
        }
    }
    cluster.heal();
    cluster.converge().await;
    for node in cluster.all() {
        assert_nothing_waits(&cluster, node).await;
        assert_eq!(conflicts(&cluster, node).await, [] as [String; 0]);
    }
    for (one, two, what) in [
        (
            "alter table other alter column v set default 'one'",
            "alter table other alter column v set default 'two'",
            "column v of table",
        ),
        (
            "create or replace function price() returns int language sql as 'select 10'",
            "create or replace function price() returns int language sql as 'select 20'",
            "function",
        ),
        (
            "alter table other add column if not exists extra int default 1",
            "alter table other add column if not exists extra int default 2",
            "column extra of table",
        ),
        (
            "alter type mood add value 'calm'",
            "alter type mood add value 'cross'",
            "type",
        ),
    ] {
        cluster.isolate_all();
        ddl(&cluster, 0, &[one]).await;
        ddl(&cluster, 1, &[two]).await;
        cluster.heal();
        cluster.converge().await;
        for (node, first, then) in [(0, (one, 1), (two, 2)), (1, (two, 2), (one, 1))] {
            let said = format!(
                "`{}` of node n{1} ({1}) and then `{2}` of node n{3} ({3}) ({what} ",
                first.0, first.1, then.0, then.1
            );
            until(&format!("n{} tells that {said}", node + 1), async || {
                let texts = conflicts(&cluster, node).await;
                texts.iter().any(|text| text.contains(&said))
            })
            .await;
        }
    }
    // One is told to a node that waits there for the lock of the other, which is said and not committed yet.
    let (first, second) = (
        "alter table item_note alter column v set default 'first'",
        "alter table item_note alter column v set default 'second'",
    );
    let holder = cluster.session(1).await;
    let quoted = second.replace('\'', "''");
    holder
        .run(&format!("begin; select anabranch.replicate_ddl('{quoted}')"))
        .await;
    ddl(&cluster, 0, &[first]).await;
    let waits = "select count(*) > 0 from pg_stat_activity where application_name = 'anabranch:apply' and wait_event_type = 'Lock'";
    cluster.wait_value(1, waits, "t").await;
    holder.run("commit").await;
    cluster.converge().await;
    for (node, said) in [
        (0, format!("`{first}` of node n1 (1) and then `")),
        (
            1,
            format!("{second}` of node n2 (2) and then `{first}` of node n1 (1)"),
        ),
    ] {
        until(&format!("n{} tells that {said}", node + 1), async || {
            let texts = conflicts(&cluster, node).await;
            texts.iter().any(|text| text.contains(&said))
        })
        .await;
    }
    // What is told to be done about it.
    let price = "select price()";
    assert_ne!(cluster.value(0, price).await, cluster.value(1, price).await);
    let again = "create or replace function price() returns int language sql as 'select 20'";
    ddl(&cluster, 0, &[again]).await;
    cluster.converge().await;
    cluster.expect(price, "20").await;
    let texts = conflicts(&cluster, 1).await;
    for node in cluster.all() {
        cluster.nodes[node].daemon.stop();
        cluster.nodes[node].daemon.start();
    }
    cluster.converge().await;
    for node in cluster.all() {
        assert_eq!(
            conflicts(&cluster, node).await,
            [] as [String; 0],
            "was {texts:?}"
        );
    }
}

#[tokio::test]
async fn what_waits_counts_as_done_by_hand_also_while_the_daemon_is_down() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).config(CONFIG).start().await;
    cluster
        .run(1, "create table extra (id int primary key, v text)")
        .await;
    cluster
        .run(
            0,
            "select anabranch.replicate_ddl('create table extra (id int primary key, v text)')",
        )
        .await;
    let stuck = wait_stuck(&cluster, 1, 0).await;
    let id = stuck["id"].as_str().expect("an id").to_owned();
    cluster.nodes[1].daemon.stop();
    let config = cluster.nodes[1].daemon.config_arg().to_owned();
    let refused = anabranch_refuses(&["ddl", "--done", &id[..8], "--config", &config]).await;
    assert!(refused.contains("give the whole id"), "{refused}");
    let done = ddl(&cluster, 1, &["--done", &id]).await;
    assert!(done.contains("counts as done"), "{done}");
    cluster.nodes[1].daemon.start();
    cluster.run(0, "insert into extra values (1, 'behind it')").await;
    cluster
        .wait_value(1, "select string_agg(v, ',') from extra", "behind it")
        .await;
    assert_nothing_waits(&cluster, 1).await;
    cluster.run(1, "insert into extra values (2, 'from here')").await;
    cluster.converge().await;
    cluster.nodes[1].daemon.stop();
    let refused = anabranch_refuses(&["ddl", "--done", &id, "--config", &config]).await;
    assert!(refused.contains("has run at this node"), "{refused}");
    cluster.nodes[1].daemon.start();
}

#[tokio::test]
async fn a_statement_that_waits_for_a_lock_lets_users_and_other_origins_pass() {
    let cluster = Cluster::of([15, 15, 15])
        .schema(SCHEMA)
        .config(CONFIG)
        .start()
        .await;
    cluster.run(0, "insert into item values (0, 0)").await;
    cluster.converge().await;
    let holder = cluster.session(1).await;
    holder.run("begin; select count(*) from item").await;
    ddl(&cluster, 0, &["alter table item add column late int"]).await;
    let stuck = wait_stuck(&cluster, 1, 0).await;
    assert_eq!(stuck["waits_for_lock"], true, "{stuck}");
    // Readers and writers of the table get through, since nobody queues for long.
    for id in 1..6 {
        cluster
            .run(1, &format!("insert into item values ({id}, {id})"))
            .await;
    }
    holder.run("commit").await;
    cluster
        .wait_value(
            1,
            "select count(*) from pg_attribute where attrelid = 'item'::regclass and attname = 'late'",
            "1",
        )
        .await;
    cluster.converge_within(PATIENCE).await;
    assert_nothing_waits(&cluster, 1).await;
}

#[tokio::test]
async fn a_session_that_is_ended_in_the_midst_of_a_statement_is_opened_again() {
    let mut cluster = Cluster::of([15, 15])
        .schema(SCHEMA)
        .config(CONFIG)
        .config("[apply]\nlock_timeout_ms = 60000\n")
        .start()
        .await;
    let holder = cluster.session(1).await;
    holder.run("begin; select count(*) from item").await;
    ddl(&cluster, 0, &["alter table item add column late int"]).await;
    let waiting = "pg_stat_activity where application_name = 'anabranch:apply' and wait_event_type = 'Lock'";
    cluster
        .wait_value(1, &format!("select count(*) from {waiting}"), "1")
        .await;
    let pid = cluster.nodes[1].daemon.pid();
    let admin = cluster.admin(1).await;
    admin
        .run(&format!("select pg_terminate_backend(pid) from {waiting}"))
        .await;
    holder.run("commit").await;
    cluster
        .wait_value(
            1,
            "select count(*) from pg_attribute where attrelid = 'item'::regclass and attname = 'late'",
            "1",
        )
        .await;
    cluster.run(0, "insert into item values (1, 1)").await;
    cluster.converge_within(PATIENCE).await;
    assert_eq!(
        cluster.nodes[1].daemon.pid(),
        pid,
        "{}",
        cluster.nodes[1].daemon.log()
    );
}

#[tokio::test]
async fn a_statement_behind_rows_that_are_tried_again_is_not_forgotten() {
    let cluster = Cluster::of([15, 15])
        .schema(SCHEMA)
        .config(CONFIG)
        .config("[apply]\nlock_timeout_ms = 200\n")
        .start()
        .await;
    cluster.run(0, "insert into item values (1, 1)").await;
    cluster.converge().await;
    let user = cluster.session(1).await;
    user.run("begin; select from item where id = 1 for update").await;
    cluster
        .run(
            0,
            "begin; update item set n = 2 where id = 1; \
             select anabranch.replicate_ddl('create table fresh (id int primary key)'); \
             insert into fresh values (1); commit",
        )
        .await;
    until("the row is tried again", async || {
        cluster.nodes[1]
            .daemon
            .log()
            .contains("apply transaction starts again")
    })
    .await;
    user.run("commit").await;
    cluster
        .wait_value(1, "select n from item where id = 1", "2")
        .await;
    cluster.converge().await;
    cluster.expect("select count(*) from fresh", "1").await;
    assert_nothing_waits(&cluster, 1).await;
}

#[tokio::test]
async fn what_must_not_travel_is_refused_where_it_is_said_and_changes_nothing() {
    let cluster = Cluster::of([15, 18]).schema(SCHEMA).config(CONFIG).start().await;
    let app = cluster.session(0).await;
    app.run("insert into item values (1, 1)").await;
    cluster.converge().await;
    for (statement, words) in [
        (
            "create index concurrently on item (n)",
            "CONCURRENTLY cannot run in a transaction",
        ),
        ("/* a remark */ vacuum item", "upkeep of one server"),
        ("create temp table t (id int primary key)", "is of one session"),
        (
            "create or replace temporary view v as select 1",
            "is of one session",
        ),
        ("create table pg_temp.t (id int primary key)", "is of one session"),
        ("update item set n = 1", "no DDL that can be replicated"),
        ("set role postgres", "no DDL that can be replicated"),
        ("create table keyless (v text)", "has no primary key"),
        (
            "create table floating (f float8 primary key)",
            "equal values can look different",
        ),
        ("alter table item drop constraint item_pkey", "has no primary key"),
        (
            "alter table item add column r regclass",
            "numbers that mean other objects at other nodes",
        ),
        (
            "create domain solid as text not null; alter table item add column s solid generated always as (n::text || '!') stored",
            "of a domain that refuses NULL",
        ),
        ("create unlogged table u (id int primary key)", "is unlogged"),
        (
            "alter table item add column a int default 1; update item set n = 2",
            "UPDATE is no DDL",
        ),
        (
            "create table filled as select 1 as id; alter table filled add primary key (id)",
            "would be replicated from here on, and has rows",
        ),
        (
            "alter table item add column at timestamptz default now()",
            "other values at each node",
        ),
        (
            "alter table item add column id2 bigserial",
            "other values at each node",
        ),
        (
            "alter table item add column id2 int generated always as identity",
            "other values at each node",
        ),
        (
            "alter table item add column u uuid default gen_random_uuid()",
            "other values at each node",
        ),
    ] {
        let quoted = statement.replace('\'', "''");
        let refused = app
            .try_run(&format!("select anabranch.replicate_ddl('{quoted}')"))
            .await
            .expect_err(statement);
        assert!(refused.to_string().contains(words), "{statement}: {}", refused);
        let said =
            anabranch_refuses(&["ddl", statement, "--config", cluster.nodes[0].daemon.config_arg()]).await;
        assert!(
            said.contains("nothing was changed") && said.contains(words),
            "{said}"
        );
    }
    app.run("set standard_conforming_strings = off").await;
    let refused = app
        .try_run(r"select anabranch.replicate_ddl(E'create view v as select ''\\'' as v')")
        .await
        .expect_err("a backslash");
    assert!(refused.to_string().contains("reads otherwise"), "{}", refused);
    app.run("reset standard_conforming_strings").await;
    // As a superuser it would run as a superuser everywhere.
    let refused = cluster
        .admin(0)
        .await
        .try_run("select anabranch.replicate_ddl('create table s (id int primary key)')")
        .await
        .expect_err("a superuser's DDL");
    assert!(refused.to_string().contains("is not replicated"), "{}", refused);
    // Nobody can say it in another's name, and nobody but the daemon runs what others said.
    cluster
        .admin(0)
        .await
        .run("create role mallory login; grant usage on schema anabranch to mallory")
        .await;
    let refused = app
        .try_run("select anabranch.note_ddl('postgres', 'alter role app superuser', 'public', '{}')")
        .await
        .expect_err("another's name");
    assert!(refused.to_string().contains("is not replicated"), "{}", refused);
    for call in [
        "set role mallory; select anabranch.note_ddl('app', 'drop table item', 'public', '{}')",
        "set role mallory; select anabranch.replicate_ddl('create table m (id int primary key)')",
        "set role app; insert into anabranch.ddl values (gen_random_uuid(), 1, 'app', 'drop table item', '', '0/0')",
    ] {
        let refused = cluster.admin(0).await.try_run(call).await.expect_err(call);
        assert_eq!(refused.code, "42501", "{call}: {}", refused);
    }
    // Code that the owner lets run cannot become the daemon.
    app.run(
        "create function become() returns int language plpgsql as \
         $$ begin perform set_config('role', 'none', true); return 1; end $$",
    )
    .await;
    cluster
        .run(1, "create function become() returns int language plpgsql as $$ begin perform set_config('role', 'none', true); return 1; end $$")
        .await;
    app.run("select anabranch.replicate_ddl('alter table item add check (become() = 1)')")
        .await;
    let stuck = wait_stuck(&cluster, 1, 0).await;
    assert!(
        stuck["error"]
            .to_string()
            .contains("within security-definer function"),
        "{stuck}"
    );
    cluster
        .expect(
            "select count(*) from pg_class where relname in ('keyless', 'floating', 'u', 's', 'm', 'filled')",
            "0",
        )
        .await;
}

#[tokio::test]
async fn a_statement_that_is_said_again_by_a_heal_does_not_run_again() {
    let cluster = Cluster::of([15, 18]).schema(SCHEMA).config(CONFIG).start().await;
    cluster
        .run(
            0,
            "select anabranch.replicate_ddl('alter table item add column a int')",
        )
        .await;
    cluster.run(0, "insert into item values (1, 1, 1)").await;
    cluster.converge().await;
    // As a heal writes rows again that nobody may have decoded (`node/src/heal/again.rs`).
    let admin = cluster.admin(0).await;
    admin
        .run("insert into anabranch.clock (node_id, witness_us) values (0, 1) on conflict do nothing")
        .await;
    admin
        .run(
            "begin; update anabranch.clock set witness_us = 1 where node_id = 0; update anabranch.ddl set id = id; commit",
        )
        .await;
    cluster
        .run(
            0,
            "select anabranch.replicate_ddl('alter table item add column b int')",
        )
        .await;
    cluster.run(0, "insert into item values (2, 2, 2, 2)").await;
    cluster.converge().await;
    cluster.expect("select sum(b) from item", "2").await;
    assert_nothing_waits(&cluster, 1).await;
}

#[tokio::test]
async fn what_code_of_a_statement_sets_for_its_session_is_set_back() {
    let cluster = Cluster::of([15, 18]).schema(SCHEMA).config(CONFIG).start().await;
    cluster.run(0, "insert into item values (1, 1)").await;
    cluster.converge().await;
    // A schema in which a function of the server has a namesake, and code that puts it first. A temporary table that was used lets nobody
    // set back for how many of them there is room.
    cluster
        .run_everywhere(
            "create schema first; grant usage on schema first to public; \
             create table first.called (who name); grant insert on first.called to public; \
             create function first.set_config(text, text, boolean) returns text language plpgsql as \
             $$ begin insert into first.called values (current_user); return pg_catalog.set_config($1, $2, $3); end $$; \
             create function first.place() returns int language plpgsql as \
             $$ begin perform pg_catalog.set_config('search_path', 'first, pg_catalog', false); \
             perform pg_catalog.set_config('work_mem', '12345', false); \
             perform pg_catalog.set_config('temp_buffers', '2000', false); \
             create temp table if not exists scratch (n int); insert into pg_temp.scratch values (1); return 1; end $$",
        )
        .await;
    let n = "select format_type(atttypid, null) from pg_attribute where attrelid = 'public.item'::regclass and attname = 'n'";
    cluster
        .run(
            0,
            "select anabranch.replicate_ddl('alter table item alter n type bigint using n * first.place()')",
        )
        .await;
    cluster.wait_value(1, n, "bigint").await;
    ddl(
        &cluster,
        0,
        &["alter table item alter n type numeric using n * first.place()"],
    )
    .await;
    cluster.wait_value(1, n, "numeric").await;
    for node in cluster.all() {
        let id = node + 2;
        cluster
            .run(node, &format!("insert into item values ({id}, {id})"))
            .await;
    }
    cluster.converge().await;
    cluster.expect("select count(*) from first.called", "0").await;
}

#[tokio::test]
async fn a_table_with_rows_is_not_attached_to_one_that_is_replicated() {
    let cluster = Cluster::of([15, 18])
        .schema("create table part (id int primary key, n int) partition by range (id)")
        .config(CONFIG)
        .start()
        .await;
    for node in [0, 1] {
        for table in ["here", "there"] {
            let create = format!("create table part_{table} (id int primary key, n int)");
            cluster.run(node, &create).await;
        }
    }
    cluster.run(0, "insert into part_here values (1, 1)").await;
    let attach = "alter table part attach partition part_here for values from (0) to (10)";
    let config = cluster.nodes[0].daemon.config_arg();
    let said = anabranch_refuses(&["ddl", attach, "--config", config]).await;
    assert!(
        said.contains("public.part_here would be replicated from here on, and has rows")
            && said.contains("anabranch tables add public.part_here"),
        "{said}"
    );
    cluster.run(0, "delete from part_here").await;
    ddl(&cluster, 0, &[attach]).await;
    cluster.run(0, "insert into part values (1, 1)").await;
    cluster.converge().await;
    // What was replicated before may have rows.
    let again = format!(
        "alter table part detach partition part_here; {}",
        attach.replace("10", "20")
    );
    ddl(&cluster, 0, &[&again]).await;
    cluster.run(0, "insert into part values (15, 15)").await;
    cluster.converge().await;
    // Rows that are at another node alone.
    cluster.run(1, "insert into part_there values (21, 21)").await;
    let attach = "alter table part attach partition part_there for values from (20) to (30)";
    ddl(&cluster, 0, &[attach]).await;
    let stuck = wait_stuck(&cluster, 1, 0).await;
    assert!(stuck["error"].to_string().contains("has rows"), "{stuck}");
    cluster.run(1, "delete from part_there").await;
    assert_nothing_waits(&cluster, 1).await;
    cluster.run(1, "insert into part values (22, 22)").await;
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(id::text, ' ' order by id) from part",
            "1 15 22",
        )
        .await;
}

#[tokio::test]
async fn a_partition_that_was_detached_is_attached_again_once_init_has_run() {
    let cluster = Cluster::of([15, 18])
        .schema(
            "create table part (id int primary key, n int) partition by range (id); \
             create table part_low partition of part for values from (0) to (10)",
        )
        .config(CONFIG)
        .start()
        .await;
    cluster.run(0, "insert into part values (1, 1)").await;
    cluster.converge().await;
    ddl(&cluster, 0, &["alter table part detach partition part_low"]).await;
    let partitions = "select count(*) from pg_inherits where inhparent = 'part'::regclass";
    cluster.wait_value(1, partitions, "0").await;
    let attach = "alter table part attach partition part_low for values from (0) to (20)";
    let config = cluster.nodes[0].daemon.config_arg();
    let said = anabranch_refuses(&["ddl", attach, "--config", config]).await;
    assert!(
        said.contains("run `anabranch init` at every node first"),
        "{said}"
    );
    for node in &cluster.nodes {
        init(node, &[]).await;
    }
    ddl(&cluster, 0, &[attach]).await;
    cluster.wait_value(1, partitions, "1").await;
    cluster.run(1, "insert into part values (15, 15)").await;
    cluster.converge().await;
}

#[tokio::test]
async fn a_row_of_a_node_that_had_not_run_the_ddl_has_in_the_new_column_what_the_ddl_gives_to_rows() {
    // The third node hears of the two in one order, and in the other.
    for first in [0, 1] {
        let cluster = Cluster::of([15, 18, 15])
            .schema(SCHEMA)
            .config(CONFIG)
            .start()
            .await;
        cluster
            .run(1, "insert into item select i, i from generate_series(1, 3) i")
            .await;
        cluster.converge().await;
        cluster.isolate_all();
        let alter = "alter table item add column note text default 'none', add column at timestamptz";
        ddl(&cluster, 0, &[alter]).await;
        cluster
            .run(0, "update item set note = 'x', at = now() where id < 3")
            .await;
        // Later, and without the column: its rows win.
        cluster
            .run(
                1,
                "update item set n = 100 where id = 1; delete from item where id = 2; \
                 insert into item values (2, 200); insert into item values (4, 400)",
            )
            .await;
        cluster.set_lines(&[first], &[2], Mode::Pass);
        let theirs = [
            "select count(*) from item where to_jsonb(item) ->> 'note' = 'x'",
            "select count(*) from item where n >= 100",
        ];
        cluster.wait_value(2, theirs[first], ["2", "3"][first]).await;
        cluster.heal();
        cluster.converge().await;
        let rows = "select string_agg(concat_ws(' ', id, n, note, at), ', ' order by id) from item";
        cluster
            .expect(rows, "1 100 none, 2 200 none, 3 3 none, 4 400 none")
            .await;
        // Everybody knows by now where it was said: a node that lacks the column from here on has had it dropped.
        for node in cluster.all() {
            let noted = "select string_agg(concat_ws(' ', node_id, value), ', ' order by attnum) from anabranch.added_column";
            cluster.wait_value(node, noted, "1 none, 1").await;
        }
        let unknown = "select count(*) from anabranch.added_column where lsn is null";
        cluster.expect(unknown, "0").await;
        // What was written in it of these rows lost to rows that did not have it.
        let lost = cluster.conflicts().await;
        assert_eq!(lost.len(), 2, "{lost:?}");
    }
}

#[tokio::test]
async fn a_row_of_a_node_that_had_not_run_a_change_of_type_has_what_the_change_makes_of_it() {
    let cluster = Cluster::of([15, 18, 15])
        .schema(
            "create table orders (id int primary key, amount int, code varchar(10), pad char(8), price numeric(10,2), n smallint, flag bool); \
             create table named (name varchar(10) primary key, v int); create table summed (id int primary key, n int, code varchar(5)); \
             create table cents (id int primary key, amount int); create table times (id int primary key, at timestamp); \
             create table narrow (id int primary key, v bigint)",
        )
        .schema_of(0, "alter table orders add constraint small check (id <> 5)")
        .policy("[[table]]\nname = \"public.summed\"\npolicy = \"column_merge\"\ncolumns = { n = \"delta\" }\n")
        .config(&format!("{CONFIG}[apply]\nquarantine_retry_ms = 500\n"))
        .start()
        .await;
    let seed = "insert into orders values (1, 10, 'a', 'ab', 1.50, 1, true), (2, 20, 'b', 'cd', 2.50, 2, false), (3, 30, 'c', 'ef', 0, 3, null); \
        insert into named values ('a', 1), ('b', 2); insert into cents values (1, 100)";
    cluster.run(0, seed).await;
    cluster.converge().await;
    let waiting =
        "select coalesce(string_agg(table_name, ' ' order by table_name), 'none') from anabranch.quarantine";
    // This one waits for another reason, and is of the former types.
    cluster
        .run(1, "insert into orders values (5, 50, 'e', 'ef', 5.49, 5, null)")
        .await;
    cluster.wait_value(0, waiting, "orders").await;
    cluster.wait_value(2, "select count(*) from orders", "4").await;
    cluster.isolate_all();
    for change in [
        "alter table orders alter amount type bigint, alter column code set data type text, alter pad type varchar(20), \
         alter price type int, alter n type text, alter flag type text",
        "alter table named alter name type text",
        "alter table summed alter code type text",
        // What others have of these is not known, or depends on a setting.
        "alter table cents alter amount type numeric(12,2) using amount / 100.0",
        "alter table times alter at type timestamptz",
        "alter table narrow alter v type int",
    ] {
        ddl(&cluster, 0, &[change]).await;
    }
    for (node, sql) in [
        (1, "update orders set amount = 21 where id = 2"),
        (0, "update orders set amount = 5000000000 where id = 2"),
        (0, "update orders set amount = 11 where id = 1"),
        (1, "update orders set amount = 12, price = 7.5 where id = 1"),
        (1, "delete from orders where id = 3"),
        (
            1,
            "insert into orders values (4, 40, 'd   ', 'gh', -0.5, -4, true)",
        ),
        (
            0,
            "insert into orders values (10, 6000000000, 'more than ten letters', 'x', 1, 'n', 'f')",
        ),
        (1, "delete from named where name = 'a'"),
        (1, "update named set v = 3"),
        (1, "insert into named values ('c  ', 4)"),
        (1, "insert into summed values (1, 1, 'x')"),
        (1, "delete from cents"),
        (1, "insert into cents values (2, 500)"),
        (1, "insert into times values (1, '2026-01-01 12:00')"),
        (1, "insert into narrow values (1, 3000000000), (2, 2)"),
    ] {
        cluster.run(node, sql).await;
    }
    // The third node has these rows before it runs the statements, the first one behind them.
    cluster.set_lines(&[1], &[2], Mode::Pass);
    cluster.wait_value(2, "select count(*) from narrow", "2").await;
    cluster.heal();
    cluster.wait_value(0, "select count(*) from narrow", "1").await;
    cluster.run(0, "alter table orders drop constraint small").await;
    cluster.wait_value(0, waiting, "cents narrow times").await;
    assert_eq!(cluster.value(0, "select count(*) from cents").await, "0");
    // A value that the type does not hold is in the way of the statement, too.
    for node in [1, 2] {
        let stuck = wait_stuck(&cluster, node, 0).await;
        assert!(stuck["error"].to_string().contains("out of range"), "{stuck}");
    }
    cluster.run(1, "update narrow set v = 1 where id = 1").await;
    cluster.wait_value(0, waiting, "cents times").await;
    for node in [1, 2] {
        let changed = "select atttypid::regtype from pg_attribute where attrelid = 'narrow'::regclass and attname = 'v'";
        cluster.wait_value(node, changed, "integer").await;
        assert_nothing_waits(&cluster, node).await;
    }
    cluster
        .run(1, "update cents set amount = amount; update times set at = at")
        .await;
    cluster.wait_value(0, waiting, "none").await;
    cluster.converge().await;
    for (rows, expected) in [
        (
            "select string_agg(concat_ws('|', id, amount, code, pad, price, n, flag), ' ' order by id) from orders",
            "1|12|a|ab|8|1|true 2|5000000000|b|cd|3|2|false 4|40|d   |gh|-1|-4|true 5|50|e|ef|5|5 10|6000000000|more than ten letters|x|1|n|f",
        ),
        (
            "select string_agg(concat_ws('|', name, v), ' ' order by name) from named",
            "b|3 c  |4",
        ),
        ("select concat_ws('|', id, n, code) from summed", "1|1|x"),
        ("select concat_ws('|', id, amount) from cents", "2|5.00"),
        ("select at::text from times", "2026-01-01 12:00:00+00"),
        (
            "select string_agg(concat_ws('|', id, v), ' ' order by id) from narrow",
            "1|1 2|2",
        ),
        (waiting, "none"),
    ] {
        cluster.expect(rows, expected).await;
    }
    // The write that lost is shown as it would be here.
    let lost = "select string_agg(concat_ws(' ', loser, local_tuple ->> 'amount', remote_tuple ->> 'amount'), ', ' order by key ->> 'id') \
        from anabranch.conflict_history where table_name = 'orders' and conflict_type = 'update_origin_differs'";
    assert_eq!(cluster.value(0, lost).await, "local 11 12, remote 5000000000 21");
    // A row that waits, since its table has another name here, comes into the one that is given the name then: that is told.
    cluster.partition(&[1], &[0, 2]);
    ddl(&cluster, 0, &["alter table times rename to past"]).await;
    cluster
        .wait_value(2, "select (to_regclass('past') is not null)::text", "true")
        .await;
    cluster.run(1, "insert into times values (2, '2026-01-02')").await;
    cluster.heal();
    cluster.wait_value(2, waiting, "times").await;
    ddl(
        &cluster,
        0,
        &["create table fresh (id int primary key, at timestamptz); alter table fresh rename to times"],
    )
    .await;
    cluster.wait_value(2, waiting, "none").await;
    until("n3 tells that it is of another table", async || {
        let status = cluster.status_or_null(2).await;
        let alarms = status["alarms"].as_array().cloned().unwrap_or_default();
        alarms.iter().any(|alarm| alarm["name"] == "other_table")
    })
    .await;
}

#[tokio::test]
async fn a_truncate_of_a_node_that_had_not_run_a_change_of_the_keys_type_stops_nothing() {
    let cluster = Cluster::of([15, 18])
        .schema("create table entry (id int primary key, v int)")
        .config(CONFIG)
        .start()
        .await;
    cluster.run(0, "insert into entry values (1, 1), (2, 2)").await;
    cluster.converge().await;
    cluster.isolate_all();
    cluster.run(1, "truncate entry").await;
    ddl(&cluster, 0, &["alter table entry alter id type bigint"]).await;
    cluster.heal();
    cluster.wait_value(0, "select count(*) from entry", "0").await;
    cluster.run(0, "insert into entry values (5000000000, 5)").await;
    cluster.converge().await;
    cluster
        .expect("select concat_ws(' ', id, v) from entry", "5000000000 5")
        .await;
}

#[tokio::test]
async fn a_row_that_is_to_be_put_right_behind_a_change_of_its_keys_type_stops_nothing() {
    let cluster = Cluster::of([15, 18])
        .schema("create table counter (id int primary key, n int); create table other (id int primary key, v int)")
        .policy(
            "[[table]]\nname = \"public.counter\"\npolicy = \"column_merge\"\ncolumns = { n = \"delta\" }\n",
        )
        .config(&format!(
            "{CONFIG}[apply]\nlock_timeout_ms = 200\nquarantine_retry_ms = 500\n"
        ))
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into counter values (1, 0); insert into other values (1, 0)",
        )
        .await;
    cluster.converge().await;
    // What comes in is decided, and waits for a lock: what is written here meanwhile is to be put right behind it.
    let holder = cluster.session(0).await;
    holder
        .run("begin; select from other where id = 1 for update")
        .await;
    cluster
        .run(
            1,
            "begin; update counter set n = n + 10 where id = 1; update other set v = 1 where id = 1; commit",
        )
        .await;
    let waits = "select least(count(*), 1) from pg_stat_activity where application_name = 'anabranch:apply' and wait_event_type = 'Lock'";
    cluster.wait_value(0, waits, "1").await;
    cluster.run(0, "update counter set n = n + 1 where id = 1").await;
    let change = "alter table counter alter id type bigint";
    ddl(&cluster, 0, &[change, "--lock-timeout", "60"]).await;
    holder.run("commit").await;
    cluster
        .wait_value(
            1,
            "select concat_ws(' ', n, pg_typeof(id)) from counter",
            "11 bigint",
        )
        .await;
    // The row waits until it is written again, and nothing with it.
    cluster
        .wait_value(0, "select count(*) from anabranch.quarantine", "1")
        .await;
    cluster.run(1, "update other set v = 2 where id = 1").await;
    cluster
        .run(1, "update counter set n = n + 100 where id = 1")
        .await;
    cluster.converge().await;
    cluster
        .expect("select concat_ws(' ', id, n) from counter", "1 111")
        .await;
}

#[tokio::test]
async fn a_default_that_comes_behind_its_column_is_none_of_rows_that_nobody_gave_it() {
    let mut cluster = Cluster::of([15, 16]).schema(SCHEMA).config(CONFIG).start().await;
    cluster.run(1, "insert into item values (1, 1)").await;
    cluster.converge().await;
    cluster.isolate_all();
    let sql = "begin; select anabranch.replicate_ddl('alter table item add column at timestamptz'); \
        select anabranch.replicate_ddl('alter table item alter column at set default now()'); \
        update item set at = '2020-01-01'; commit";
    cluster.run(0, sql).await;
    cluster.run(1, "insert into item values (2, 2)").await;
    // Its place in the stream is looked up by a daemon that has not seen it said.
    cluster.journalled(0).await;
    cluster.nodes[0].daemon.kill();
    cluster.nodes[0].daemon.start();
    cluster.heal();
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(concat_ws(' ', id, at::date), ', ' order by id) from item",
            "1 2020-01-01, 2",
        )
        .await;
    cluster.run(1, "insert into item values (3, 3)").await;
    cluster.converge().await;
    cluster
        .expect("select (at > '2020-01-02')::text from item where id = 3", "true")
        .await;
}

#[tokio::test]
async fn a_column_that_ddl_added_and_somebody_dropped_by_hand_is_left_alone_at_the_others() {
    let cluster = Cluster::of([15, 15]).schema(SCHEMA).config(CONFIG).start().await;
    ddl(
        &cluster,
        0,
        &["alter table item add column note text default 'none'"],
    )
    .await;
    cluster.run(0, "insert into item values (1, 1, 'kept')").await;
    cluster.converge().await;
    cluster.run(1, "update item set note = 'mine' where id = 1").await;
    cluster.converge().await;
    cluster.run(1, "alter table item drop column note").await;
    cluster.run(1, "update item set n = 2 where id = 1").await;
    cluster
        .wait_value(0, "select concat_ws(' ', n, note) from item", "2 mine")
        .await;
}

#[tokio::test]
async fn values_of_every_kind_are_given_to_rows_that_lack_them_whatever_became_of_their_type() {
    let cluster = Cluster::of([15, 18])
        .schema(
            "create table kinds (id int primary key, n int); create table written (id int primary key, n int); \
             create type mood as enum ('sad', 'glad'); create domain grade as int default 3 check (value > 0)",
        )
        .config(&format!("{CONFIG}[apply]\nquarantine_retry_ms = 500\n"))
        .start()
        .await;
    cluster.isolate_all();
    let alter = "alter table kinds add column c char(3) default 'abc', add column b bit(3) default b'101', \
        add column m mood default 'sad', add column x box default '((1,1),(0,0))', \
        add column l int[] default '{1,2}', add column t text default 'it''s', add column q text";
    ddl(&cluster, 0, &[alter]).await;
    // A domain that has a condition: the rows are written, and the catalog has no value any more.
    let alter = "alter table written add column g grade, add column m mood default 'sad'";
    ddl(&cluster, 0, &[alter]).await;
    ddl(&cluster, 0, &["alter type mood rename value 'sad' to 'low'"]).await;
    cluster
        .run(
            0,
            "insert into kinds values (1, 1, 'xyz', b'111', 'glad', '((2,2),(0,0))', '{}', 'y', 'z')",
        )
        .await;
    cluster
        .run(
            1,
            "insert into kinds values (2, 2); insert into written values (1, 1)",
        )
        .await;
    cluster.heal();
    let why = "select string_agg(concat_ws(' ', table_name, message), ', ') from anabranch.quarantine";
    until("one waits, as its value is none now", async || {
        let why = cluster.value(0, why).await;
        why.starts_with("written ") && why.contains("new column m cannot be read") && !why.contains("kinds")
    })
    .await;
    ddl(&cluster, 0, &["alter type mood rename value 'low' to 'sad'"]).await;
    cluster
        .wait_value(0, "select count(*) from anabranch.quarantine", "0")
        .await;
    cluster.converge().await;
    let row = "select concat_ws(' ', c, b, m, x, l::text, t, q) from kinds where id = 2";
    cluster.expect(row, "abc 101 sad (1,1),(0,0) {1,2} it's").await;
    cluster
        .expect("select concat_ws(' ', n, g, m) from written", "1 3 sad")
        .await;
}

#[tokio::test]
async fn a_script_and_a_merged_table_have_in_new_columns_of_new_rows_what_the_ddl_gave() {
    let cluster = Cluster::of([15, 15])
        .schema("create table chosen (id int primary key, n int); create table summed (id int primary key, n int)")
        .config(CONFIG)
        .script(
            "most.rhai",
            "fn resolve(versions) { let best = 0; for i in 1..versions.len() { if versions[i].row.n > versions[best].row.n { best = i; } } best }",
        )
        .policy(
            "[[table]]\nname = \"public.chosen\"\npolicy = \"script\"\nscript = \"most.rhai\"\n\
             [[table]]\nname = \"public.summed\"\npolicy = \"column_merge\"\ncolumns = { n = \"delta\" }\n",
        )
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into chosen values (1, 1); insert into summed values (1, 1)",
        )
        .await;
    cluster.converge().await;
    cluster.isolate_all();
    for table in ["chosen", "summed"] {
        ddl(
            &cluster,
            0,
            &[&format!("alter table {table} add column c int default 5")],
        )
        .await;
        ddl(
            &cluster,
            0,
            &[&format!("alter table {table} alter column c set default 7")],
        )
        .await;
        cluster
            .run(0, &format!("update {table} set n = n + 1, c = 9 where id = 1"))
            .await;
        cluster
            .run(
                1,
                &format!("update {table} set n = n + 10 where id = 1; insert into {table} values (2, 2)"),
            )
            .await;
    }
    cluster.heal();
    cluster.converge().await;
    // One row of two; and what each has changed.
    cluster
        .expect(
            "select string_agg(concat_ws(' ', id, n, c), ', ' order by id) from chosen",
            "1 11 5, 2 2 5",
        )
        .await;
    cluster
        .expect(
            "select string_agg(concat_ws(' ', id, n, c), ', ' order by id) from summed",
            "1 12 9, 2 2 5",
        )
        .await;
}

#[tokio::test]
async fn a_table_that_is_empty_here_may_have_rows_elsewhere_so_its_columns_get_no_values_of_each_node() {
    let cluster = Cluster::of([15, 18]).schema(SCHEMA).config(CONFIG).start().await;
    for node in cluster.all() {
        let app = cluster.session(node).await;
        let add =
            "select anabranch.replicate_ddl('alter table item add column at timestamptz default now()')";
        let refused = app
            .try_run(add)
            .await
            .expect_err("rows may be elsewhere")
            .to_string();
        assert!(
            refused.contains("other values at each node")
                && refused.contains("other nodes may have written some"),
            "{refused}"
        );
        let said = anabranch_refuses(&[
            "ddl",
            "alter table item add column id2 bigserial",
            "--config",
            cluster.nodes[node].daemon.config_arg(),
        ])
        .await;
        assert!(said.contains("other nodes may have written some"), "{said}");
    }
    // Of one that is new nobody has any, also not behind a savepoint.
    cluster
        .run(
            0,
            "begin; savepoint s; select anabranch.replicate_ddl('create table fresh (id int primary key)'); release s; \
             select anabranch.replicate_ddl('alter table fresh add column at timestamptz not null default now()'); \
             insert into fresh values (1); commit",
        )
        .await;
    cluster.converge().await;
    cluster.run(1, "insert into fresh values (2)").await;
    cluster.converge().await;
    cluster.expect("select count(at)::text from fresh", "2").await;
}

#[tokio::test]
async fn a_row_with_a_column_that_is_gone_here_is_held_and_logged_and_the_next_write_takes_its_place() {
    let cluster = Cluster::of([15, 15])
        .schema("create table wide (id int primary key, a int, b int)")
        .config(CONFIG)
        .start()
        .await;
    cluster.run(0, "insert into wide values (1, 1, 1)").await;
    cluster.converge().await;
    cluster.isolate_all();
    ddl(&cluster, 0, &["alter table wide drop column b"]).await;
    cluster.run(1, "insert into wide values (2, 2, 2)").await;
    cluster.heal();
    cluster
        .wait_value(
            0,
            "select string_agg(sqlstate, ',') from anabranch.quarantine",
            "42703",
        )
        .await;
    assert_eq!(
        cluster
            .value(
                0,
                "select string_agg(conflict_type, ',') from anabranch.conflict_history"
            )
            .await,
        "column_missing"
    );
    let gone = "select count(*) from pg_attribute where attrelid = 'wide'::regclass and attname = 'b'";
    cluster.wait_value(1, gone, "0").await;
    cluster.run(1, "update wide set a = 3 where id = 2").await;
    cluster
        .wait_value(0, "select count(*) from anabranch.quarantine", "0")
        .await;
    cluster.converge().await;
    cluster
        .expect("select string_agg(a::text, ',' order by id) from wide", "1,3")
        .await;
}

#[tokio::test]
async fn a_row_that_is_deleted_where_a_column_still_is_goes_where_that_is_gone() {
    let cluster = Cluster::of([15, 18])
        .schema(
            "create table item (id int primary key, a int, note int); create table summed (id int primary key, n int, note int); \
             create table parent (id int primary key, note int); create table child (id int primary key, parent int references parent); \
             create index on child (parent)",
        )
        .policy("[[table]]\nname = \"public.summed\"\npolicy = \"column_merge\"\ncolumns = { n = \"delta\" }\n")
        .config(&format!("{CONFIG}[apply]\nquarantine_retry_ms = 500\n"))
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into item values (7, 7, 7), (8, 8, 8); insert into summed values (1, 1, 1), (2, 2, 2); insert into parent values (1, 1)",
        )
        .await;
    cluster.converge().await;
    cluster.isolate_all();
    for table in ["item", "summed", "parent"] {
        ddl(&cluster, 0, &[&format!("alter table {table} drop column note")]).await;
    }
    cluster
        .run(
            0,
            "update summed set n = 10 where id = 1; insert into child values (1, 1)",
        )
        .await;
    // What is moved is a row that goes, and one that comes.
    for sql in [
        "delete from item where id = 7",
        "update item set id = 9 where id = 8",
        "insert into item values (10, 10, 10)",
        "delete from item where id = 10",
        "delete from summed",
        "delete from parent",
    ] {
        cluster.run(1, sql).await;
    }
    cluster.heal();
    let waiting = "select coalesce(string_agg(table_name, ', '), 'none') from anabranch.quarantine";
    cluster
        .wait_value(0, "select (select count(*) from item) + (select count(*) from summed) + (select count(*) from parent)", "0")
        .await;
    cluster.wait_value(0, waiting, "item").await;
    // Who lost its parent is told as ever.
    for node in cluster.all() {
        let orphans =
            "select count(*) from anabranch.conflict_history where conflict_type = 'foreign_key_missing'";
        cluster.wait_value(node, orphans, "1").await;
    }
    let gone = "select count(*) from pg_attribute where attrelid = 'parent'::regclass and attname = 'note'";
    cluster.wait_value(1, gone, "0").await;
    cluster.run(1, "update item set a = 9").await;
    cluster.wait_value(0, waiting, "none").await;
    cluster.converge().await;
    cluster
        .expect("select string_agg(id || ' ' || a, ', ') from item", "9 9")
        .await;
}

#[tokio::test]
async fn a_column_that_was_added_by_hand_here_first_is_known_when_rows_with_it_come() {
    for config in ["", "missing_columns = \"drop\"\n"] {
        let cluster = Cluster::of([15, 15])
            .schema("create table wide (id int primary key, a int)")
            .config(&format!("{CONFIG}{config}"))
            .start()
            .await;
        // The table is known as it was.
        cluster.run(0, "insert into wide values (1, 1)").await;
        cluster.converge().await;
        for node in [1, 0] {
            cluster.run(node, "alter table wide add column b int").await;
        }
        cluster.run(0, "update wide set b = 2").await;
        cluster.converge().await;
        cluster.expect("select a || ' ' || b from wide", "1 2").await;
        cluster.expect_no_conflict().await;
    }
}

#[tokio::test]
async fn a_row_that_is_written_without_a_column_lets_go_what_waited_before_it() {
    let cluster = Cluster::of([15, 15])
        .schema("create table wide (id int primary key, a int)")
        .schema_of(1, "alter table wide add constraint small check (a < 100)")
        .config(&format!(
            "{CONFIG}missing_columns = \"drop\"\n[apply]\nquarantine_retry_ms = 500\n"
        ))
        .start()
        .await;
    let waiting = "select count(*) from anabranch.quarantine";
    cluster.run(0, "insert into wide values (1, 1000)").await;
    cluster.wait_value(1, waiting, "1").await;
    cluster.run(0, "alter table wide add column b int").await;
    cluster.run(0, "update wide set a = 2, b = 2 where id = 1").await;
    cluster.wait_value(1, waiting, "0").await;
    assert_eq!(cluster.value(1, "select a from wide").await, "2");
    // The line of the value that is nowhere else here waits for somebody.
    let lines = "select string_agg(conflict_type || ' ' || status, ', ' order by conflict_type) \
        from anabranch.conflict_history";
    cluster
        .wait_value(1, lines, "check_violation acknowledged, column_missing new")
        .await;
    // Had the row waited on, it could be written once nothing forbids it and the later one is forgotten.
    cluster.run(1, "alter table wide drop constraint small").await;
    cluster.wait_settled().await;
    cluster.run(1, "alter table wide add column b int").await;
    cluster.run(0, "update wide set b = 3 where id = 1").await;
    cluster.converge().await;
    cluster.expect("select a || ' ' || b from wide", "2 3").await;
}

#[tokio::test]
async fn a_column_that_is_gone_here_can_be_left_out_and_its_value_is_in_the_log() {
    let cluster = Cluster::of([15, 15])
        .schema("create table wide (id int primary key, a int, b int, c text)")
        .config(&format!("{CONFIG}missing_columns = \"drop\"\n"))
        .start()
        .await;
    cluster.run(0, "insert into wide values (1, 1, 1, 'x')").await;
    cluster.converge().await;
    cluster.isolate_all();
    ddl(&cluster, 0, &["alter table wide drop column b"]).await;
    ddl(&cluster, 0, &["alter table wide drop column c"]).await;
    cluster.run(0, "insert into wide values (5, 5)").await;
    cluster
        .run(1, "insert into wide values (2, 2, 2, 'y'), (3, 3, null, null)")
        .await;
    cluster.run(1, "update wide set a = 4 where id = 1").await;
    cluster.heal();
    cluster.converge().await;
    // Also the other way: to the one that has not dropped them yet.
    cluster
        .expect(
            "select string_agg(id || '=' || a, ' ' order by id) from wide",
            "1=4 2=2 3=3 5=5",
        )
        .await;
    assert_eq!(
        cluster
            .value(0, "select count(*) from anabranch.quarantine")
            .await,
        "0"
    );
    let lines = "select string_agg(concat_ws(' ', key ->> 'id', conflict_type, conflict_resolution, lost_columns, \
        remote_tuple -> 'b' ->> 'unread_bytes', remote_tuple -> 'c' ->> 'unread_bytes', remote_tuple -> 'c' ->> 'type', \
        remote_tuple ->> 'a'), '; ' order by (key ->> 'id')::int) \
        from anabranch.conflict_history where conflict_type = 'column_missing'";
    assert_eq!(
        cluster.value(0, lines).await,
        "1 column_missing skip {b,c} \\x00000001 \\x78 pg_catalog.text 4; 2 column_missing skip {b,c} \\x00000002 \\x79 pg_catalog.text 2"
    );
    // The column is there again. What was sent is no value of it that anybody here could write.
    ddl(&cluster, 0, &["alter table wide add column c text"]).await;
    let line = "select conflict_id::text from anabranch.conflict_history \
        where conflict_type = 'column_missing' and key ->> 'id' = '2'";
    let id = cluster.value(0, line).await;
    let config = cluster.nodes[0].daemon.config_arg();
    let replay = ["conflicts", "--config", config, "replay", &id];
    for how in [&[][..], &["--force"], &["--columns", "c", "--force"]] {
        let said = anabranch_refuses(&[&replay[..], how].concat()).await;
        assert!(said.contains("column(s) c not as values"), "{said}");
    }
    cluster.converge().await;
    cluster.expect("select count(c)::text from wide", "0").await;
    assert_eq!(
        cluster
            .value(
                1,
                "select count(*) from anabranch.conflict_history where conflict_type = 'column_missing'"
            )
            .await,
        "0"
    );
}

#[tokio::test]
async fn a_default_that_comes_behind_its_column_in_one_statement_is_none_of_rows_that_were_elsewhere() {
    let cluster = Cluster::of([15, 18]).schema(SCHEMA).config(CONFIG).start().await;
    cluster.isolate_all();
    // Nobody has a row where it is said: none tells what rows have.
    let alter = "alter table item add column a int, alter column a set default 5, add column b int default 6";
    ddl(&cluster, 0, &[alter]).await;
    cluster.run(1, "insert into item values (1, 1)").await;
    cluster.heal();
    cluster.converge().await;
    let rows = "select string_agg(concat_ws(' ', id, coalesce(a, 0), b), ', ' order by id) from item";
    cluster.expect(rows, "1 0 6").await;
    cluster.run(1, "insert into item values (2, 2)").await;
    cluster.converge().await;
    cluster.expect(rows, "1 0 6, 2 5 6").await;
}

/// A domain with a condition: the rows are written, so the catalog has no value of the column, and where there is no row nothing tells.
#[tokio::test]
async fn what_a_foreign_key_does_when_its_parent_goes_is_no_default_that_comes_behind_its_column() {
    let cluster = Cluster::of([15, 18])
        .schema(
            "create table kind (id int primary key); create domain kind_id as int check (value > 0); \
             create table item (id int primary key)",
        )
        .config(CONFIG)
        .start()
        .await;
    cluster.run(0, "insert into kind values (7)").await;
    cluster.converge().await;
    cluster.isolate_all();
    let alter = "alter table item add column kind kind_id default 7 references kind on delete set default on update set default";
    ddl(&cluster, 0, &[alter]).await;
    cluster.run(1, "insert into item values (1)").await;
    cluster.heal();
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(concat_ws(' ', id, kind), ', ') from item",
            "1 7",
        )
        .await;
}
