//! A node whose replication slot is gone comes back with the rows that it has: `anabranch heal`.

use std::process::Output;
use std::time::Duration;

use anabranch_tests::cluster::create_cluster;
use anabranch_tests::daemon::{anabranch, anabranch_ok, anabranch_refuses, anabranch_within, program};
use anabranch_tests::load::{self, Load};
use anabranch_tests::postgres::DATABASE;
use anabranch_tests::session::Session;
use anabranch_tests::wait::{PATIENCE, until};
use anabranch_tests::{Cluster, Postgres, process};
use serde_json::Value;

pub(crate) const ITEMS: &str = "create table item (id int primary key, v text)";
pub(crate) const ROWS: &str = "select string_agg(id || '=' || v, ' ' order by id) from item";

/// A heal that takes longer hangs: a test that is killed for it would not tell of what.
const HEAL_WITHIN: Duration = Duration::from_secs(120);

/// `anabranch heal ..` to its end. It waits for others no longer than a test does for anything.
pub(crate) async fn run_heal(config: &str, args: &[&str]) -> Output {
    let wait: &[&str] = if args.contains(&"--wait") {
        &[]
    } else {
        &["--wait", "60"]
    };
    let all = [&["heal", "--config", config][..], wait, args].concat();
    anabranch_within(&all, HEAL_WITHIN).await
}

/// The same where it must refuse: all that it said.
pub(crate) async fn heal_refuses(config: &str, args: &[&str]) -> String {
    let output = run_heal(config, args).await;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(
        !output.status.success(),
        "it should have refused, but said:\n{said}"
    );
    said
}

/// `anabranch heal ..` at one node: exit code and report.
pub(crate) async fn heal(cluster: &Cluster, node: usize, args: &[&str]) -> (i32, Value) {
    let config = cluster.nodes[node].daemon.config_arg();
    let output = run_heal(config, &[&["--output", "json"][..], args].concat()).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let report = said.lines().last().unwrap_or_default();
    let report = serde_json::from_str(report).unwrap_or_else(|error| {
        let errors = String::from_utf8_lossy(&output.stderr);
        panic!("heal {args:?} gave no report ({error}): {said}{errors}")
    });
    (output.status.code().unwrap(), report)
}

/// Heals, and starts the daemon.
pub(crate) async fn healed(cluster: &mut Cluster, node: usize, args: &[&str]) -> Value {
    let (code, report) = heal(cluster, node, args).await;
    assert_eq!(code, 0, "{report:#}");
    cluster.nodes[node].daemon.start();
    report
}

/// What was done to the rows of `item`.
fn done(report: &Value, what: &str) -> i64 {
    let done = report["tables"]["public.item"].as_object();
    let mut counts = done.into_iter().flatten();
    let count = counts.find(|(said, _)| said.starts_with(what));
    count.map_or(0, |(_, count)| count.as_i64().unwrap())
}

/// Lines of the record that say this.
pub(crate) fn record(report: &Value, did: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(report["record"].as_str().unwrap()).expect("read the record");
    let lines = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines
        .filter(|line| line["did"].as_str().unwrap().starts_with(did))
        .collect()
}

pub(crate) fn keys(lines: &[Value]) -> Vec<i64> {
    let mut keys: Vec<i64> = lines
        .iter()
        .map(|line| line["key"]["id"].as_i64().unwrap())
        .collect();
    keys.sort_unstable();
    keys
}

/// Waits until the daemon has written down a horizon that is behind what was committed before.
pub(crate) async fn horizon_passes(cluster: &Cluster, node: usize) {
    let next = cluster
        .value(node, "select pg_snapshot_xmax(pg_current_snapshot())")
        .await;
    let next: u64 = next.parse().unwrap();
    let path = cluster.nodes[node].data_dir.join("horizon.json");
    until("the horizon is kept", async || {
        let kept: Value = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).unwrap(),
            Err(_) => return false,
        };
        kept["xid"].as_u64().unwrap() >= next
    })
    .await;
}

/// Rows 1 to `count` at every node, written at this one, whose daemon has written down a horizon behind them.
pub(crate) async fn base(cluster: &Cluster, node: usize, count: u32) {
    let sql = format!("insert into item select i, 'base' from generate_series(1, {count}) i");
    cluster.run(node, &sql).await;
    cluster.converge().await;
    horizon_passes(cluster, node).await;
}

/// The daemon ends, and its slot is dropped.
async fn lose_slot(cluster: &mut Cluster, node: usize) {
    cluster.nodes[node].daemon.stop();
    drop_slot(cluster, node).await;
}

async fn drop_slot(cluster: &Cluster, node: usize) {
    let admin = cluster.admin(node).await;
    until("the slot is dropped", async || {
        admin
            .try_run("select pg_drop_replication_slot('anabranch')")
            .await
            .is_ok()
    })
    .await;
}

/// Keys and loser's values of the conflict log, sorted.
pub(crate) async fn lost(cluster: &Cluster) -> Vec<String> {
    let mut lost = Vec::new();
    for conflict in cluster.conflicts().await {
        let (local, remote) = (&conflict.local()["v"], &conflict.remote()["v"]);
        lost.push(format!("{} {local} {remote}", conflict.key()["id"]));
    }
    lost.sort();
    lost
}

#[tokio::test]
async fn a_dropped_slot_is_healed_while_both_sides_have_written() {
    let mut cluster = Cluster::of([15, 18]).schema(ITEMS).start().await;
    base(&cluster, 0, 30).await;
    // Both came to the database after that horizon, and are no gap.
    cluster.run(0, "update item set v = 'sent' where id = 28").await;
    cluster
        .run(1, "update item set v = 'received' where id = 29")
        .await;
    cluster.converge().await;
    lose_slot(&mut cluster, 0).await;

    cluster
        .run(
            0,
            "insert into item select i, 'gap' from generate_series(101, 105) i",
        )
        .await;
    cluster.run(0, "update item set v = 'gap' where id <= 6").await;
    cluster
        .run(
            0,
            "begin; savepoint s; update item set v = 'gap' where id = 7; release s; commit",
        )
        .await;
    cluster
        .run(0, "delete from item where id between 11 and 14")
        .await;
    cluster.run(0, "update item set id = 120 where id = 15").await;
    cluster
        .run(1, "update item set v = 'n2' where id in (2, 3)")
        .await;
    cluster.run(1, "delete from item where id = 4").await;
    cluster
        .run(1, "update item set v = 'n2' where id in (11, 20)")
        .await;
    cluster
        .run(1, "insert into item values (101, 'n2'), (201, 'n2')")
        .await;

    cluster.nodes[0].daemon.start();
    let status = cluster.nodes[0].daemon.wait_exit(PATIENCE).expect("it ends");
    assert!(!status.success());
    let said = cluster.nodes[0].daemon.log();
    assert!(said.contains("anabranch heal"), "{said}");

    let (code, report) = heal(&cluster, 0, &["--dry-run"]).await;
    assert_eq!(
        (code, done(&report, "would be written again")),
        (0, 13),
        "{report:#}"
    );
    let slots = "select count(*) from pg_replication_slots";
    assert_eq!(cluster.value(0, slots).await, "0");

    let report = healed(&mut cluster, 0, &[]).await;
    assert_eq!(done(&report, "written again"), 13, "{report:#}");
    let again = [1, 2, 3, 4, 5, 6, 7, 101, 102, 103, 104, 105, 120];
    assert_eq!(keys(&record(&report, "written again")), again);
    assert_eq!(keys(&record(&report, "brought back")), [12, 13, 14, 15]);
    assert_eq!(keys(&record(&report, "deleted here unheard of, and back")), [11]);
    cluster.converge().await;
    // What was written at the other meanwhile is later, as far as anybody knows.
    let expected = "1=gap 2=n2 3=n2 5=gap 6=gap 7=gap 8=base 9=base 10=base 11=n2 12=base 13=base 14=base 15=base \
        16=base 17=base 18=base 19=base 20=n2 21=base 22=base 23=base 24=base 25=base 26=base 27=base 28=sent \
        29=received 30=base 101=n2 102=gap 103=gap 104=gap 105=gap 120=gap 201=n2";
    // Row 120 was row 15 and has its value.
    cluster
        .expect(ROWS, &expected.replace("120=gap", "120=base"))
        .await;
    let lost = lost(&cluster).await;
    assert_eq!(lost.len(), 4, "{lost:?}");
    for (key, line) in [101, 2, 3, 4].into_iter().zip(&lost) {
        assert!(
            line.starts_with(&format!("{key} ")) && line.contains("gap"),
            "{lost:?}"
        );
    }
    // And it goes on as ever, also over another restart.
    cluster.run(0, "update item set v = 'after' where id = 12").await;
    cluster.run(1, "update item set v = 'after' where id = 102").await;
    cluster.converge().await;
    cluster.nodes[0].daemon.stop();
    cluster.run(0, "update item set v = 'again' where id = 13").await;
    cluster.nodes[0].daemon.start();
    cluster.converge().await;
    assert_eq!(cluster.conflicts().await.len(), 4);
}

#[tokio::test]
async fn times_of_commits_decide_where_the_server_keeps_them() {
    let mut cluster = Cluster::of([18, 15])
        .schema(ITEMS)
        .conf(0, "track_commit_timestamp = on")
        .start()
        .await;
    base(&cluster, 0, 6).await;
    lose_slot(&mut cluster, 0).await;
    cluster
        .run(0, "update item set v = 'early' where id in (1, 2)")
        .await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    cluster
        .run(1, "update item set v = 'n2' where id in (2, 3)")
        .await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    cluster
        .run(0, "update item set v = 'late' where id in (3, 4)")
        .await;
    cluster.run(0, "delete from item where id = 6").await;
    // What people are told.
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let told = async |args: &[&str]| {
        let output = run_heal(&config, args).await;
        let steps = String::from_utf8_lossy(&output.stderr).into_owned();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        println!("$ anabranch heal {}\n{steps}{said}", args.join(" "));
        assert!(output.status.success());
        said
    };
    let said = told(&["--dry-run"]).await;
    assert!(
        said.contains("would be written again") && said.contains("nothing was changed"),
        "{said}"
    );
    let said = told(&[]).await;
    assert!(
        said.contains("brought back") && said.ends_with("healed\n"),
        "{said}"
    );
    cluster.nodes[0].daemon.start();
    cluster.converge().await;
    cluster
        .expect(ROWS, "1=early 2=n2 3=late 4=late 5=base 6=base")
        .await;
    assert_eq!(lost(&cluster).await.len(), 2);
}

#[tokio::test]
async fn deletes_go_everywhere_when_told_so() {
    let mut cluster = Cluster::of([15, 15, 15])
        .schema(ITEMS)
        .schema("create table priced (id int primary key, n numeric(10,4))")
        .schema_of(2, "alter table priced alter n type numeric(10,2)")
        .schema("create table wide (n numeric primary key, v numeric)")
        .schema("create table late (id int primary key, v text)")
        .start()
        .await;
    let wide = "insert into wide values (123456789012345678901234567890.5, 98765432109876543210.10)";
    cluster.run(1, wide).await;
    cluster.run(1, "insert into late values (1, 'base')").await;
    base(&cluster, 1, 6).await;
    lose_slot(&mut cluster, 1).await;
    cluster.run(1, "delete from wide").await;
    cluster.run(1, "delete from item where id <= 3").await;
    cluster.run(2, "update item set v = 'n3' where id = 2").await;
    // This row is written elsewhere between its coming back and its deletion.
    cluster
        .run(
            1,
            "delete from late;
             create function hold() returns trigger language plpgsql as
                 $$ begin perform pg_advisory_xact_lock(7); return new; end $$;
             create trigger hold before insert on late for each row execute function hold();
             alter table late enable always trigger hold",
        )
        .await;
    let (holder, admin, writer) = (
        cluster.session(1).await,
        cluster.admin(1).await,
        cluster.session(2).await,
    );
    holder.run("select pg_advisory_lock(7)").await;
    let write_between = async {
        let waits = "select count(*) from pg_stat_activity where wait_event = 'advisory'";
        until("the row is being brought back", async || {
            admin.number(waits).await > 0
        })
        .await;
        writer.run("update late set v = 'later'").await;
        holder.run("select pg_advisory_unlock(7)").await;
    };
    let (report, ()) = tokio::join!(healed(&mut cluster, 1, &["--deleted", "delete"]), write_between);
    cluster.run(1, "drop trigger hold on late").await;
    cluster.converge().await;
    cluster.expect(ROWS, "2=n3 4=base 5=base 6=base").await;
    cluster.expect("select count(*) from wide", "0").await;
    cluster.expect("select v from late", "later").await;
    let gone = record(&report, "deleted everywhere");
    let (gone, wide): (Vec<Value>, Vec<Value>) =
        gone.into_iter().partition(|line| line["table"] == "public.item");
    assert_eq!(keys(&gone), [1, 3]);
    assert_eq!(gone[0]["row"]["v"], "base");
    assert_eq!(wide.len(), 1, "{wide:?}");
    // Digit by digit.
    let text = std::fs::read_to_string(report["record"].as_str().unwrap()).expect("read the record");
    let row = r#""row":{"n":123456789012345678901234567890.5,"v":98765432109876543210.10}"#;
    assert!(text.contains(row), "{text}");
    cluster.expect_no_conflict().await;
    // It is said, and keeps no heal from its end.
    let notes = report["notes"].to_string();
    assert!(
        notes.contains("column n has another length or precision"),
        "{notes}"
    );
    assert!(
        notes.contains("public.late: 1 rows that were to be deleted everywhere are not"),
        "{notes}"
    );
}

#[tokio::test]
async fn a_heal_waits_for_the_others_and_begins_anew_when_the_slot_is_lost_again() {
    let mut cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    base(&cluster, 0, 4).await;
    // What waits in quarantine is no gap, nor is what the table has of that row, though both came behind the horizon.
    let open = cluster.session(0).await;
    open.run("begin").await;
    open.run("select pg_current_xact_id()").await;
    let refuses = "alter table item add constraint fits check (v <> 'refused')";
    cluster.run(0, refuses).await;
    cluster
        .run(1, "update item set v = 'received' where id = 4")
        .await;
    cluster.converge().await;
    cluster.run(1, "update item set v = 'refused' where id = 4").await;
    cluster
        .wait_value(0, "select count(*) from anabranch.quarantine", "1")
        .await;
    lose_slot(&mut cluster, 0).await;
    open.run("rollback").await;
    cluster.run(0, "alter table item drop constraint fits").await;
    cluster.nodes[1].daemon.stop();
    cluster.run(0, "update item set v = 'gap' where id = 1").await;
    cluster.run(0, "delete from item where id = 2").await;
    let (code, report) = heal(&cluster, 0, &["--wait", "3"]).await;
    assert_eq!((code, &report["healed"]), (1, &Value::Bool(false)), "{report:#}");
    assert!(report["problems"].to_string().contains("n2"), "{report:#}");
    drop_slot(&cluster, 0).await;
    cluster
        .run(0, "update item set v = 'second gap' where id = 3")
        .await;
    cluster.nodes[1].daemon.start();
    healed(&mut cluster, 0, &[]).await;
    cluster.converge().await;
    cluster.expect(ROWS, "1=gap 2=base 3=second gap 4=refused").await;
}

/// Waits until the load has committed some transactions more at the first node.
async fn until_more_is_written(cluster: &Cluster) {
    let admin = cluster.admin(0).await;
    let witnesses = "select count(*) from witness where node = 1";
    let before = admin.number(witnesses).await;
    until("more is written", async || {
        admin.number(witnesses).await > before + 10
    })
    .await;
}

/// The slot is lost under load at all nodes, by the server's own doing; it is healed under load.
async fn healed_under_load(versions: [u32; 2], conf: &str) {
    let mut cluster = Cluster::of(versions)
        .schema(load::SCHEMA)
        .conf(0, conf)
        .start()
        .await;
    horizon_passes(&cluster, 0).await;
    let options = load::Options {
        keys: 300,
        pause: Duration::from_millis(40),
        ..load::Options::default()
    };
    let load = Load::start(&cluster, &[0, 1], options);
    tokio::time::sleep(Duration::from_secs(3)).await;
    cluster.nodes[0].daemon.kill();
    until_more_is_written(&cluster).await;
    let admin = cluster.admin(0).await;
    until("the slot is lost", async || {
        let fill = "select count(pg_logical_emit_message(false, 'filler', repeat('x', 1000000))) from generate_series(1, 20)";
        admin.run(fill).await;
        admin.run("select pg_switch_wal(); checkpoint").await;
        let status = "select coalesce(min(wal_status), 'gone') from pg_replication_slots where slot_name = 'anabranch'";
        admin.value(status).await == "lost"
    })
    .await;
    cluster.nodes[0].daemon.start();
    let status = cluster.nodes[0].daemon.wait_exit(PATIENCE).expect("it ends");
    assert!(!status.success());
    let report = healed(&mut cluster, 0, &[]).await;
    assert_eq!(report["healed"], true, "{report:#}");
    let ledger = load.stop().await;
    cluster.converge().await;
    ledger.account(&cluster).await;
    let again = report["tables"]["public.witness"]["written again"].as_i64();
    assert!(again.is_some_and(|rows| rows > 10), "{report:#}");
}

#[tokio::test]
async fn a_slot_lost_to_max_slot_wal_keep_size_is_healed_under_load() {
    healed_under_load([15, 18], "max_slot_wal_keep_size = 32MB").await;
}

#[tokio::test]
async fn a_slot_lost_to_its_idle_timeout_is_healed_under_load() {
    healed_under_load([18, 15], "idle_replication_slot_timeout = 1s").await;
}

/// A `heal` that was killed after a while; the daemon must not run behind it.
async fn killed_heal(cluster: &mut Cluster, node: usize, so_far: impl AsyncFnMut() -> bool) {
    let mut command = process::mortal(&program(), "KILL", false);
    command.args(["heal", "--config", cluster.nodes[node].daemon.config_arg()]);
    let mut child = process::spawn(command).expect("start it");
    until("it has come so far", so_far).await;
    child.kill().expect("kill it");
    child.wait().expect("wait for it");
    cluster.nodes[node].daemon.start();
    let status = cluster.nodes[node].daemon.wait_exit(PATIENCE).expect("it ends");
    assert!(!status.success());
    let said = cluster.nodes[node].daemon.log();
    assert!(said.contains("not finished"), "{said}");
}

/// Does the heal at this server wait for somebody's lock?
async fn waits_for_a_table(admin: &Session) -> bool {
    let waits = "select count(*) from pg_stat_activity where application_name like 'anabranch:heal%' \
        and wait_event = 'relation'";
    admin.number(waits).await > 0
}

#[tokio::test]
async fn a_heal_killed_at_any_time_goes_on() {
    let mut cluster = Cluster::of([15, 15])
        .schema(ITEMS)
        .schema("create table later (id int primary key, v text)")
        .conf(0, "track_commit_timestamp = on")
        .start()
        .await;
    cluster.run(0, "insert into later values (1, 'base')").await;
    base(&cluster, 0, 6).await;
    lose_slot(&mut cluster, 0).await;
    for id in 1..=4 {
        cluster
            .run(0, &format!("update item set v = 'gap' where id = {id}"))
            .await;
    }
    cluster
        .run(1, "update item set v = 'n2' where id in (4, 5)")
        .await;
    // An open transaction keeps the slot from being made.
    let open = cluster.session(0).await;
    open.run("begin; update item set v = 'open' where id = 6").await;
    let state = cluster.nodes[0].data_dir.join("heal.json");
    killed_heal(&mut cluster, 0, async || state.exists()).await;
    open.run("commit").await;
    cluster.run(0, "update later set v = 'gap'").await;
    // Somebody holds a table that is written again after the other; no transaction that the slot waits for.
    open.run("begin; lock table later in share mode").await;
    let admin = cluster.admin(0).await;
    killed_heal(&mut cluster, 0, async || waits_for_a_table(&admin).await).await;
    open.run("commit").await;
    cluster.run(0, "update item set v = 'after' where id = 4").await;
    let report = healed(&mut cluster, 0, &[]).await;
    let again = record(&report, "written again");
    let (items, later): (Vec<Value>, Vec<Value>) =
        again.into_iter().partition(|line| line["table"] == "public.item");
    assert_eq!(keys(&items), [1, 2, 3, 4, 6], "{report:#}");
    assert_eq!(keys(&later), [1], "{report:#}");
    cluster.converge().await;
    cluster
        .expect(ROWS, "1=gap 2=gap 3=gap 4=after 5=n2 6=open")
        .await;
    cluster.expect("select v from later", "gap").await;
    // Whether the first of two local writes has a line depends on when it was met.
    for node in cluster.all() {
        let lost = cluster.conflicts_at(node).await;
        assert!(
            !lost.is_empty() && lost.iter().all(|line| line.key()["id"] == 4),
            "{lost:#?}"
        );
    }
}

#[tokio::test]
async fn a_heal_that_waits_for_a_writer_says_for_whom_and_loses_nothing_when_it_is_ended() {
    let mut cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    base(&cluster, 0, 3).await;
    lose_slot(&mut cluster, 0).await;
    cluster.run(0, "update item set v = 'gap' where id = 1").await;
    let open = cluster.session(0).await;
    open.run("begin; update item set v = 'open' where id = 2").await;
    let writer = open.value("select pg_backend_pid()").await;

    let log = cluster.dir().join("heal.log");
    let file = std::fs::File::create(&log).expect("make its log");
    let mut command = process::mortal(&program(), "KILL", false);
    command
        .args(["heal", "--config", cluster.nodes[0].daemon.config_arg()])
        .stdout(file.try_clone().expect("share its log"))
        .stderr(file);
    let mut child = process::spawn(command).expect("start it");
    let said = || std::fs::read_to_string(&log).expect("read its log");
    let waits = format!("session {writer} of ");
    until("it says for whom it waits", async || said().contains(&waits)).await;
    process::signal(child.id(), process::Signal::INT);
    let status = process::wait_exit(&mut child, PATIENCE).expect("it ends");
    let said = said();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(
        said.contains("interrupted, and nothing is lost") && said.contains("Run `anabranch heal` again"),
        "{said}"
    );
    // The writer is there still, and nobody waits for it any more.
    let slots = "select count(*) from pg_replication_slots";
    cluster.wait_value(0, slots, "0").await;
    refuses(&mut cluster, 0, "not finished");
    open.run("commit").await;
    healed(&mut cluster, 0, &[]).await;
    cluster.converge().await;
    cluster.expect(ROWS, "1=gap 2=open 3=base").await;
}

#[tokio::test]
async fn a_node_that_is_alone_is_healed_without_anybody_to_compare_with() {
    let mut cluster = Cluster::of([15]).bare().schema(ITEMS).start().await;
    create_cluster(&cluster.nodes[0]).await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    cluster.nodes[0].daemon.start();
    cluster
        .run(
            0,
            "insert into item select i, 'base' from generate_series(1, 20) i",
        )
        .await;
    horizon_passes(&cluster, 0).await;
    lose_slot(&mut cluster, 0).await;
    cluster
        .run(
            0,
            "insert into item select i, 'gap' from generate_series(101, 105) i",
        )
        .await;
    cluster.run(0, "delete from item where id <= 3").await;
    let report = healed(&mut cluster, 0, &[]).await;
    assert_eq!(report["healed"], true, "{report:#}");
    assert_eq!(done(&report, "written again"), 5, "{report:#}");
    assert!(
        report["notes"].to_string().contains("no other node"),
        "{report:#}"
    );
    let count = "select count(*) from item";
    assert_eq!(cluster.value(0, count).await, "22");
    // It is over, and whoever joins gets all of it.
    cluster.status(0).await;
    let said = anabranch_refuses(&["heal", "--config", &config]).await;
    assert!(said.contains("nothing to heal"), "{said}");
    let node = cluster.add_server(15).await;
    cluster.join(node, 0).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.run(0, "update item set v = 'after' where id = 101").await;
    cluster.converge().await;
    cluster.expect(count, "22").await;
}

#[tokio::test]
async fn what_is_not_lost_is_not_healed() {
    let mut cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let said = anabranch_refuses(&["heal", "--config", &config]).await;
    assert!(said.contains("nothing to heal"), "{said}");
    let horizon = cluster.nodes[0].data_dir.join("horizon.json");
    until("a horizon", async || horizon.exists()).await;
    cluster.nodes[0].daemon.stop();
    let said = anabranch_refuses(&["heal", "--config", &config]).await;
    assert!(said.contains("nothing to heal"), "{said}");
    drop_slot(&cluster, 0).await;
    std::fs::remove_file(&horizon).expect("remove the horizon");
    let said = anabranch_refuses(&["heal", "--config", &config]).await;
    assert!(said.contains("horizon.json"), "{said}");
}

#[tokio::test]
async fn a_promoted_standby_that_lacks_nothing_is_healed() {
    let mut cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    base(&cluster, 0, 4).await;
    cluster.nodes[0].daemon.stop();
    // The same files, as a standby that has all of its primary's WAL has them.
    cluster.nodes[0].server.stop();
    let signal = cluster.nodes[0].server.data_dir().join("standby.signal");
    std::fs::write(signal, "").expect("make it a standby");
    cluster.nodes[0].server.start().await;
    let admin = cluster.admin(0).await;
    assert_eq!(admin.value("select pg_is_in_recovery()::text").await, "true");
    admin.run("select pg_promote()").await;
    // A base backup has no slots.
    drop_slot(&cluster, 0).await;
    cluster.run(0, "update item set v = 'gap' where id = 1").await;
    cluster.run(1, "update item set v = 'n2' where id = 2").await;
    healed(&mut cluster, 0, &[]).await;
    cluster.converge().await;
    cluster.expect(ROWS, "1=gap 2=n2 3=base 4=base").await;
    cluster.expect_no_conflict().await;
    let timeline = "select left(pg_walfile_name(pg_current_wal_lsn()), 8)";
    assert_eq!(admin.value(timeline).await, "00000002");
}

#[tokio::test]
async fn a_server_restored_from_an_older_copy_is_not_healed() {
    let mut cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    cluster
        .run(0, "insert into item values (1, 'in the backup')")
        .await;
    cluster.converge().await;
    let backup = cluster.back_up(0).await;
    cluster.run(0, "insert into item values (2, 'after it')").await;
    cluster.converge().await;
    horizon_passes(&cluster, 0).await;
    cluster.put_back(0, &backup);
    cluster.nodes[0].server.start().await;
    drop_slot(&cluster, 0).await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let said = anabranch_refuses(&["heal", "--config", &config]).await;
    assert!(said.contains("restored from an older copy"), "{said}");
    // Also once its WAL and its transactions are past all that the journal knows.
    let admin = cluster.admin(0).await;
    admin
        .run("do $$ begin for i in 1..3000 loop insert into item values (1000 + i, 'x'); commit; end loop; end $$")
        .await;
    admin.run("select pg_switch_wal()").await;
    let said = anabranch_refuses(&["heal", "--config", &config]).await;
    assert!(said.contains("heartbeat") && said.contains("restored"), "{said}");
}

/// The standby gets no WAL from now on; what it was sent before it has replayed.
pub(crate) async fn cut_off(standby: &mut Postgres) {
    standby.set_conf(&["primary_conninfo = ''"]);
    let admin = standby.admin().await;
    admin.run("select pg_reload_conf()").await;
    let receives = "select count(*) from pg_stat_wal_receiver";
    until("it receives nothing", async || admin.number(receives).await == 0).await;
}

/// The daemon of a node refuses to run and says this.
pub(crate) fn refuses(cluster: &mut Cluster, node: usize, why: &str) {
    let daemon = &mut cluster.nodes[node].daemon;
    daemon.start();
    let status = daemon.wait_exit(PATIENCE).expect("it ends");
    assert!(!status.success());
    let said = daemon.log();
    assert!(said.contains(why), "{said}");
}

/// A standby that lacks the end of what its primary had committed is promoted.
async fn a_lost_tail_is_put_back(versions: [u32; 2]) {
    let mut cluster = Cluster::of(versions)
        .schema(ITEMS)
        .schema("create table code (id int primary key, v text unique)")
        .schema("create table gone (id int primary key, v text)")
        .schema("create table narrow (id int primary key, v varchar(20))")
        .schema_of(0, "alter table narrow alter column v type varchar(5)")
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into code values (1, 'a'), (2, 'b'); insert into gone values (1, 'x'), (2, 'y')",
        )
        .await;
    cluster.run(0, "insert into narrow values (1, 'base')").await;
    base(&cluster, 0, 30).await;
    let mut standby = cluster.standby(0).await;
    cut_off(&mut standby).await;

    // The tail: the old primary and the others have it. LSNs of the new timeline stay below its end for long.
    let filler = "select count(pg_logical_emit_message(false, 'filler', repeat('x', 1000000))) from generate_series(1, 40)";
    cluster.admin(0).await.run(filler).await;
    cluster
        .run(0, "update item set v = 'tail' where id in (1, 2, 8)")
        .await;
    cluster
        .run(
            0,
            "insert into item select i, 'tail' from generate_series(101, 105) i",
        )
        .await;
    cluster
        .run(
            0,
            "insert into item select i, repeat('large', 20) from generate_series(1001, 6000) i",
        )
        .await;
    cluster.run(0, "delete from item where id in (11, 13)").await;
    cluster.run(0, "update item set id = 112 where id = 12").await;
    cluster.run(0, "begin; update code set v = 'c' where id = 1; update code set v = 'a' where id = 2; update code set v = 'b' where id = 1; commit").await;
    cluster.run(0, "truncate gone").await;
    cluster.run(0, "insert into gone values (3, 'z')").await;
    cluster.converge().await;
    // Over it by another, which the old primary had applied; and by the primary over that.
    cluster
        .run(1, "update item set v = 'n2' where id in (2, 3, 4)")
        .await;
    cluster.run(1, "insert into item values (201, 'n2')").await;
    cluster.run(1, "delete from item where id = 14").await;
    cluster.converge().await;
    cluster
        .run(0, "update item set v = 'tail over n2' where id = 3")
        .await;
    cluster.converge().await;
    // It waits in quarantine at the old primary, whose table does not take it, and the standby has not even that.
    cluster.run(1, "update narrow set v = 'far too long'").await;
    cluster
        .wait_value(0, "select count(*) from anabranch.quarantine", "1")
        .await;
    // What the other has not got is in the journal alone.
    cluster.nodes[1].daemon.stop();
    cluster.run(0, "update item set v = 'journal' where id = 5").await;
    horizon_passes(&cluster, 0).await;

    cluster.nodes[0].server.kill();
    cluster.nodes[0].daemon.stop();
    cluster.promote(0, standby).await;
    refuses(&mut cluster, 0, "anabranch heal");
    // Written before anybody knows: over the tail, and elsewhere.
    cluster
        .run(0, "update item set v = v || ' and since' where id in (8, 9)")
        .await;
    cluster.run(0, "delete from item where id = 1").await;
    cluster.run(0, "insert into item values (301, 'since')").await;
    cluster
        .run(
            0,
            "insert into item select i, repeat('since', 20) from generate_series(20001, 25000) i",
        )
        .await;
    cluster
        .run(1, "update item set v = 'n2 later' where id in (5, 6, 101)")
        .await;
    cluster.nodes[1].daemon.start();

    let (code, report) = heal(&cluster, 0, &["--dry-run"]).await;
    let notes = report["notes"].to_string();
    assert!(code == 0 && notes.contains("would be put back"), "{report:#}");
    assert_eq!(done(&report, "would be written again"), 5_003, "{report:#}");
    let (code, report) = heal(&cluster, 0, &[]).await;
    // One row is nowhere here, since the table does not take it.
    assert_eq!(code, 1, "{report:#}");
    assert_eq!(report["healed"], true, "{report:#}");
    let differ = report["differences"].as_object().unwrap();
    assert_eq!(differ.keys().collect::<Vec<_>>(), ["public.narrow"], "{report:#}");
    let refused = record(&report, "refused by the server");
    assert_eq!(keys(&refused), [1]);
    let why = refused[0]["why"].as_str().unwrap();
    assert!(why.contains("22001"), "{refused:#?}");
    assert!(refused[0]["row"]["v"]["unread_bytes"].is_string(), "{refused:#?}");
    cluster
        .run(0, "alter table narrow alter column v type varchar(20)")
        .await;
    cluster.nodes[0].daemon.start();
    cluster.arrive_among(&[0, 1], PATIENCE).await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    anabranch_ok(&["repair", "--from", "n2", "narrow", "--config", &config]).await;
    assert!(
        report["notes"].to_string().contains("were put back"),
        "{report:#}"
    );
    let back: Vec<Value> = record(&report, "put back")
        .into_iter()
        .filter(|line| line["table"] == "public.item")
        .collect();
    let wanted = [1, 2, 3, 4, 5, 101, 102, 103, 104, 105, 112, 201];
    assert_eq!(keys(&back)[..wanted.len()], wanted);
    assert_eq!(back.len(), wanted.len() + 5_000);
    let deleted = record(&report, "put back, though deleted here since");
    assert_eq!(keys(&deleted), [1]);
    assert_eq!(deleted[0]["row"]["v"], "tail");
    let kept = record(&report, "kept");
    assert_eq!(keys(&kept), [8]);
    assert_eq!(kept[0]["was"]["v"], "tail");
    let again = keys(&record(&report, "written again"));
    assert_eq!((&again[..3], again.len()), (&[8, 9, 301][..], 5_003));
    cluster.converge().await;
    // The delete that so lost has a line here alone, and is made again by it.
    let mut told = cluster.conflicts_at(0).await;
    told.retain(|line| line.kind() == "update_deleted");
    assert_eq!(told.len(), 1, "{told:#?}");
    let line = &told[0];
    assert_eq!(line.key()["id"], 1, "{line:#?}");
    assert_eq!(line.0["loser"], "local", "{line:#?}");
    assert_eq!(line.local(), &Value::Null, "{line:#?}");
    assert_eq!(line.applied()["v"], "tail", "{line:#?}");
    let id = line.id().replace('"', "");
    let said = anabranch_ok(&["conflicts", "--config", &config, "explain", &id]).await;
    assert!(
        said.contains("deleted at n1 after its server had been promoted"),
        "{said}"
    );
    anabranch_ok(&["conflicts", "--config", &config, "replay", &id]).await;
    cluster.converge().await;
    // The rest of the log is equal at both.
    let line = "delete from anabranch.conflict_history where conflict_type = 'update_deleted'";
    cluster.admin(0).await.run(line).await;
    // Row 5 was written at the other without the tail, at the same time as far as anybody can tell, and later.
    let rows = "select string_agg(id || '=' || v, ' ' order by id) from item where id < 1000";
    let expected = "2=n2 3=tail over n2 4=n2 5=n2 later 6=n2 later 7=base 8=base and since 9=base and since 10=base \
        15=base 16=base 17=base 18=base 19=base 20=base 21=base 22=base 23=base 24=base 25=base 26=base 27=base 28=base \
        29=base 30=base 101=n2 later 102=tail 103=tail 104=tail 105=tail 112=base 201=n2 301=since";
    cluster.expect(rows, expected).await;
    cluster
        .expect("select count(*) from item where id > 1000", "10000")
        .await;
    cluster
        .expect("select string_agg(id || v, ' ' order by id) from code", "1b 2a")
        .await;
    cluster
        .expect("select string_agg(id || v, ' ') from gone", "3z")
        .await;
    let lost = lost(&cluster).await;
    assert!(lost.len() == 1 && lost[0].starts_with("5 "), "{lost:?}");
    // And it goes on as ever, also over restarts.
    cluster.run(0, "update item set v = 'after' where id = 102").await;
    cluster.run(1, "update item set v = 'after' where id = 103").await;
    cluster.converge().await;
    cluster.nodes[0].daemon.kill();
    cluster.run(0, "update item set v = 'again' where id = 103").await;
    cluster
        .run(
            0,
            "insert into item select i, repeat('large', 20) from generate_series(7001, 12000) i",
        )
        .await;
    cluster.nodes[0].daemon.start();
    cluster.converge().await;
    cluster.expect("select v from item where id = 103", "again").await;
    cluster
        .expect("select count(*) from item where id > 7000", "10000")
        .await;
    assert_eq!(cluster.conflicts().await.len(), 1);
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn what_a_promoted_standby_of_15_lacks_is_put_back() {
    a_lost_tail_is_put_back([15, 18]).await;
}

#[tokio::test]
async fn what_a_promoted_standby_of_18_lacks_is_put_back() {
    a_lost_tail_is_put_back([18, 15]).await;
}

#[tokio::test]
async fn nothing_acknowledged_under_load_is_lost_with_a_promotion() {
    let mut cluster = Cluster::of([15, 18]).schema(load::SCHEMA).start().await;
    horizon_passes(&cluster, 0).await;
    let options = load::Options {
        keys: 300,
        pause: Duration::from_millis(40),
        ..load::Options::default()
    };
    let load = Load::start(&cluster, &[0, 1], options);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut standby = cluster.standby(0).await;
    cut_off(&mut standby).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    until_more_is_written(&cluster).await;
    let before = load.stop().await;
    // What was committed is decoded: without that it would be gone with the server.
    horizon_passes(&cluster, 0).await;
    let options = load::Options { seed: 2, ..options };
    let load = Load::start(&cluster, &[1], options);
    cluster.nodes[0].server.kill();
    cluster.nodes[0].daemon.kill();
    cluster.promote(0, standby).await;
    let report = healed(&mut cluster, 0, &[]).await;
    let back = report["tables"]["public.witness"]["put back"].as_i64();
    assert!(back.is_some_and(|rows| rows > 10), "{report:#}");
    let later = Load::start(&cluster, &[0], load::Options { seed: 3, ..options });
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (load, later) = (load.stop().await, later.stop().await);
    cluster.converge().await;
    for ledger in [before, load, later] {
        ledger.account(&cluster).await;
    }
}

#[tokio::test]
async fn a_heal_of_a_lost_tail_killed_at_any_time_goes_on() {
    let mut cluster = Cluster::of([15, 15])
        .schema(ITEMS)
        .schema("create table later (id int primary key, v text)")
        .start()
        .await;
    cluster.run(0, "insert into later values (1, 'base')").await;
    base(&cluster, 0, 6).await;
    let mut standby = cluster.standby(0).await;
    cut_off(&mut standby).await;
    cluster
        .run(
            0,
            "update item set v = 'tail' where id <= 2; update later set v = 'tail'",
        )
        .await;
    cluster.converge().await;
    horizon_passes(&cluster, 0).await;
    cluster.nodes[0].server.kill();
    cluster.nodes[0].daemon.stop();
    cluster.promote(0, standby).await;
    cluster.run(0, "update item set v = 'since' where id = 3").await;
    // Somebody holds a table that is put back after the other.
    let open = cluster.session(0).await;
    open.run("begin; lock table later in share mode").await;
    let admin = cluster.admin(0).await;
    killed_heal(&mut cluster, 0, async || waits_for_a_table(&admin).await).await;
    open.run("commit").await;
    // An open transaction, which holds no table of the tail, keeps the slot from being made, once all is back.
    open.run("begin; select pg_current_xact_id()").await;
    killed_heal(&mut cluster, 0, async || {
        let made = "select count(*) from pg_replication_slots where slot_name = 'anabranch'";
        admin.number(made).await > 0
    })
    .await;
    assert_eq!(admin.value("select v from later").await, "tail");
    open.run("update item set v = 'open' where id = 6; commit").await;
    cluster.run(1, "update item set v = 'n2' where id = 1").await;
    let report = healed(&mut cluster, 0, &[]).await;
    assert_eq!(keys(&record(&report, "written again")), [3, 6], "{report:#}");
    cluster.converge().await;
    cluster
        .expect(ROWS, "1=n2 2=tail 3=since 4=base 5=base 6=open")
        .await;
    cluster.expect("select v from later", "tail").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn a_promoted_standby_that_took_the_slot_over_and_lacks_nothing_needs_no_heal() {
    let mut cluster = Cluster::of([18, 15]).schema(ITEMS).start().await;
    base(&cluster, 0, 6).await;
    let admin = cluster.admin(0).await;
    admin
        .run("select pg_create_physical_replication_slot('standby', true)")
        .await;
    let mut standby = Postgres::standby_of(&cluster.nodes[0].server, &cluster.dir().join("standby"));
    standby.set_conf(&[
        "primary_slot_name = 'standby'",
        "hot_standby_feedback = on",
        "sync_replication_slots = on",
    ]);
    standby.start().await;
    let there = standby.admin().await;
    until("the standby has the slot", async || {
        // The slot must move on past where the standby's copy of it begins.
        cluster.run(0, "update item set v = 'base' where id = 6").await;
        admin.run("select pg_log_standby_snapshot()").await;
        let synced = "select count(*) from pg_replication_slots where slot_name = 'anabranch' and synced and not temporary";
        there.number(synced).await == 1
    })
    .await;
    cluster.run(0, "update item set v = 'n1' where id = 1").await;
    cluster.run(1, "update item set v = 'n2' where id = 2").await;
    cluster.converge().await;
    cluster.nodes[0].daemon.stop();
    let end = admin.value("select pg_current_wal_flush_lsn()::text").await;
    until("the standby has all", async || {
        let has = format!("select (pg_last_wal_replay_lsn() >= '{end}')::int");
        there.number(&has).await == 1
    })
    .await;
    cluster.promote(0, standby).await;
    cluster
        .run(0, "update item set v = 'promoted' where id in (1, 3)")
        .await;
    cluster.run(1, "update item set v = 'n2' where id = 4").await;
    cluster.nodes[0].daemon.start();
    cluster.converge().await;
    cluster.nodes[0].daemon.kill();
    cluster.run(0, "update item set v = 'again' where id = 3").await;
    cluster.nodes[0].daemon.start();
    cluster.converge().await;
    cluster
        .expect(ROWS, "1=promoted 2=n2 3=again 4=n2 5=base 6=base")
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn ddl_of_a_lost_tail_is_run_once_by_a_heal_that_was_killed_behind_it() {
    let mut cluster = Cluster::of([15, 18])
        .schema(ITEMS)
        .config("[ddl]\nroles = [\"app\"]\n")
        .start()
        .await;
    base(&cluster, 0, 4).await;
    let mut standby = cluster.standby(0).await;
    cut_off(&mut standby).await;
    // Of this node, and of another's that the old primary had applied.
    cluster
        .run(
            0,
            "begin; select anabranch.replicate_ddl('alter table item add column n int'); \
             update item set v = 'tail', n = 1 where id = 1; commit",
        )
        .await;
    cluster.converge().await;
    cluster
        .run(
            1,
            "begin; select anabranch.replicate_ddl('create table extra (id int primary key)'); \
             insert into extra values (1); commit",
        )
        .await;
    cluster.converge().await;
    // The tail is what this one had seen when it last wrote.
    cluster.run(0, "update item set n = 2 where id = 2").await;
    cluster.converge().await;
    horizon_passes(&cluster, 0).await;
    cluster.nodes[0].server.kill();
    cluster.nodes[0].daemon.stop();
    cluster.promote(0, standby).await;
    // The tail is put back, and then the slot cannot be made.
    let open = cluster.session(0).await;
    open.run("begin; select pg_current_xact_id()").await;
    let admin = cluster.admin(0).await;
    killed_heal(&mut cluster, 0, async || {
        let made = "select count(*) from pg_replication_slots where slot_name = 'anabranch'";
        admin.number(made).await > 0
    })
    .await;
    let back = "select string_agg(id || ' ' || n, ', ' order by id) from item where n is not null";
    assert_eq!(admin.value(back).await, "1 1, 2 2");
    assert_eq!(admin.value("select count(*) from extra").await, "1");
    open.run("commit").await;
    healed(&mut cluster, 0, &[]).await;
    cluster.run(0, "insert into extra values (2)").await;
    cluster.converge().await;
    cluster.expect(back, "1 1, 2 2").await;
    cluster.expect("select count(*) from extra", "2").await;
    cluster.expect("select count(*) from anabranch.ddl", "2").await;
    cluster.expect_no_conflict().await;
}

const OTHER: &str = "create table other (id int primary key)";

/// `item` is taken out of replication at a node, whose daemon knows it then.
async fn remove_items(cluster: &Cluster, node: usize) {
    let of = &cluster.nodes[node];
    of.daemon
        .edit_config(|text| text.replace("\"public.*\"", "\"public.*\", \"!public.item\""));
    let (config, admin) = (of.daemon.config_arg(), of.server.dsn("postgres", DATABASE));
    anabranch_ok(&[
        "tables",
        "remove",
        "item",
        "--config",
        config,
        "--admin-dsn",
        &admin,
    ])
    .await;
    until("the daemon passes it over", async || {
        let status = cluster.status_or_null(node).await;
        status["apply"]["passed_over"]["public.item"].is_u64()
    })
    .await;
}

/// Waits until a node has passed over what came with this row of `other`.
async fn passed_over(cluster: &Cluster, node: usize, id: u32) {
    let there = format!("select count(*) from other where id = {id}");
    cluster.wait_value(node, &there, "1").await;
}

#[tokio::test]
async fn a_heal_leaves_a_table_alone_that_was_removed_here() {
    let mut cluster = Cluster::of([15, 18, 15])
        .schema(ITEMS)
        .schema(OTHER)
        .start()
        .await;
    base(&cluster, 0, 6).await;
    remove_items(&cluster, 0).await;
    // What one has not heard of is settled nowhere.
    cluster.nodes[2].daemon.stop();
    cluster.run(0, "update item set v = 'here' where id = 4").await;
    cluster
        .run(
            1,
            "begin; delete from item where id in (4, 5); insert into other values (1); commit",
        )
        .await;
    passed_over(&cluster, 0, 1).await;
    lose_slot(&mut cluster, 0).await;
    cluster.nodes[2].daemon.start();
    let report = healed(&mut cluster, 0, &[]).await;
    let notes = report["notes"].to_string();
    assert!(
        notes.contains("public.item: is not replicated at this node"),
        "{report:#}"
    );
    cluster.arrive_among(&[0, 1, 2], PATIENCE).await;
    let here = "1=base 2=base 3=base 4=here 5=base 6=base";
    assert_eq!(cluster.value(0, ROWS).await, here);
    assert_eq!(cluster.value(2, ROWS).await, "1=base 2=base 3=base 6=base");
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn a_lost_tail_is_put_back_without_a_table_that_was_removed_here() {
    let mut cluster = Cluster::of([15, 15]).schema(ITEMS).schema(OTHER).start().await;
    base(&cluster, 0, 4).await;
    remove_items(&cluster, 0).await;
    cluster.run(0, "update item set v = 'here' where id = 1").await;
    let mut standby = cluster.standby(0).await;
    cut_off(&mut standby).await;
    cluster
        .run(
            1,
            "begin; update item set v = 'n2' where id <= 2; insert into other values (1); commit",
        )
        .await;
    passed_over(&cluster, 0, 1).await;
    cluster.run(0, "insert into other values (2)").await;
    cluster.arrive_among(&[0, 1], PATIENCE).await;
    horizon_passes(&cluster, 0).await;
    cluster.nodes[0].server.kill();
    cluster.nodes[0].daemon.stop();
    cluster.promote(0, standby).await;
    healed(&mut cluster, 0, &[]).await;
    cluster.arrive_among(&[0, 1], PATIENCE).await;
    assert_eq!(cluster.value(0, ROWS).await, "1=here 2=base 3=base 4=base");
    cluster.expect("select count(*) from other", "2").await;
}

#[tokio::test]
async fn a_start_leaves_a_table_alone_that_was_removed_here() {
    // The slot is not confirmed behind what is applied, as long as this node writes nothing, heartbeats included.
    let mut cluster = Cluster::of([15, 18])
        .schema(ITEMS)
        .schema(OTHER)
        .config_of(0, "[clock]\nwitness_interval_ms = 60000\n")
        .start()
        .await;
    cluster
        .run(
            1,
            "insert into item select i, 'base' from generate_series(1, 6) i",
        )
        .await;
    cluster.converge().await;
    cluster.partition(&[0], &[1]);
    cluster.run(0, "update item set v = 'n1' where id = 5").await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    cluster
        .run(
            1,
            "begin; delete from item where id = 5; insert into other values (1); commit",
        )
        .await;
    remove_items(&cluster, 0).await;
    cluster.heal();
    passed_over(&cluster, 0, 1).await;
    // What was passed over is met again at its place, and beats the write from before.
    cluster.nodes[0].daemon.kill();
    cluster.nodes[0].daemon.start();
    for _ in 0..2 {
        cluster.arrive_among(&[0, 1], PATIENCE).await;
    }
    assert_eq!(cluster.value(1, "select count(*) from item").await, "5");
    assert_eq!(cluster.value(0, "select v from item where id = 5").await, "n1");
}

/// The nodes of which a node knows that they have said this of the only change of the policy.
async fn who_said(cluster: &Cluster, node: usize, fact: &str) -> String {
    let sql = format!(
        "select coalesce(string_agg(node_id::text, ' ' order by node_id), '') from anabranch.policy_change where fact = '{fact}'"
    );
    cluster.value(node, &sql).await
}

#[tokio::test]
async fn what_was_said_of_a_change_of_the_policy_is_said_again_after_the_slot_was_lost() {
    let mut cluster = Cluster::of([15, 18]).schema(ITEMS).policy("").start().await;
    base(&cluster, 1, 4).await;
    cluster.nodes[0].daemon.stop();
    let file = cluster.nodes[1].data_dir.with_file_name("next.toml");
    let next = "[[table]]\nname = \"public.item\"\npolicy = \"first_update_wins\"\n";
    std::fs::write(&file, next).expect("write the policy");
    let config = cluster.nodes[1].daemon.config_arg().to_owned();
    let change = tokio::spawn(async move {
        let file = file.to_str().expect("a path in UTF-8");
        anabranch(&["policy", "change", file, "--config", &config]).await
    });
    until("it is asked for", async || {
        who_said(&cluster, 1, "asked").await == "2"
    })
    .await;
    // The vote by which the change is made waits for the other's, and is nowhere but in the table when the slot is lost.
    let vote = cluster.admin(1).await;
    vote.run(
        "begin; insert into anabranch.policy_change (change_id, fact, node_id, asked_by) \
         select change_id, 'voted', 2, 2 from anabranch.policy_change where fact = 'asked'",
    )
    .await;
    cluster.nodes[0].daemon.start();
    until("the other has voted", async || {
        who_said(&cluster, 1, "voted").await == "1"
    })
    .await;
    cluster.nodes[1].daemon.kill();
    vote.run("commit").await;
    drop_slot(&cluster, 1).await;
    let report = healed(&mut cluster, 1, &[]).await;
    let again = &report["tables"]["anabranch.policy_change"]["written again"];
    assert_eq!(*again, 1, "{report:#}");
    for node in [0, 1] {
        until("all have switched", async || {
            who_said(&cluster, node, "switched").await == "1 2"
        })
        .await;
    }
    change.await.expect("wait for the command");
    cluster
        .apart(&[
            (0, "update item set v = 'early' where id = 1"),
            (1, "update item set v = 'late' where id = 1"),
        ])
        .await;
    cluster.expect("select v from item where id = 1", "early").await;
}
