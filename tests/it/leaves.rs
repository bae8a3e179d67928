//! A member that is alive leaves: nothing of it is lost, and the others close its stream.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use anabranch_tests::Cluster;
use anabranch_tests::daemon::{anabranch, anabranch_ok, anabranch_refuses, program};
use anabranch_tests::load::{self, Load};
use anabranch_tests::postgres::DATABASE;
use anabranch_tests::process::{mortal, spawn};
use anabranch_tests::wait::{PATIENCE, until};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

const SCHEMA: &str = "create table item (id int primary key, v text)";

/// Arguments of `anabranch leave` for a node.
fn leave_args(cluster: &Cluster, node: usize, more: &[&str]) -> Vec<String> {
    let node = &cluster.nodes[node];
    let admin = node.server.dsn("postgres", DATABASE);
    let args = [
        "leave",
        "--config",
        node.daemon.config_arg(),
        "--admin-dsn",
        &admin,
    ];
    args.iter().chain(more).map(|arg| (*arg).to_owned()).collect()
}

fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// Begins it; the events come when it is through.
fn begin_leave(cluster: &Cluster, node: usize, more: &[&str]) -> JoinHandle<String> {
    let args = leave_args(cluster, node, &[&["--output", "json"], more].concat());
    tokio::spawn(async move { anabranch_ok(&strs(&args)).await })
}

/// Begins it; the events are in this file as they come.
fn begin_leave_to(cluster: &Cluster, node: usize, more: &[&str], events: &Path) -> JoinHandle<String> {
    let args = leave_args(cluster, node, &[&["--output", "json"], more].concat());
    let mut command = mortal(&program(), "KILL", false);
    command
        .args(args)
        .stdout(File::create(events).expect("make a file"));
    let mut leave = spawn(command).expect("start the command");
    let events = events.to_owned();
    tokio::task::spawn_blocking(move || {
        let status = leave.wait().expect("wait for the command");
        let said = fs::read_to_string(events).expect("read the events");
        assert!(status.success(), "{said}");
        said
    })
}

/// Waits until the command has said that it waits for these.
async fn wait_said_to_wait_for(events: &Path, names: &[&str]) {
    until(&format!("the command waits for {names:?}"), async || {
        let said = fs::read_to_string(events).expect("read the events");
        // The last line may be half of one.
        let mut events = said
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        events.any(|event| event["event"] == "waiting" && event["for"] == json!(names))
    })
    .await;
}

async fn end_leave(leave: JoinHandle<String>) -> Vec<Value> {
    let said = tokio::time::timeout(Duration::from_secs(120), leave)
        .await
        .expect("leaving ends")
        .expect("the command runs");
    let events: Vec<Value> = said
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    assert_eq!(events.last().expect("an end")["event"], "left", "{events:?}");
    events
}

/// Waits until `status` of the leaving node says that it waits for this, in this phase.
async fn wait_waits_for(cluster: &Cluster, node: usize, phase: &str, names: &[&str]) {
    until(
        &format!("n{} is {phase} and waits for {names:?}", node + 1),
        async || {
            let leaving = cluster.status_or_null(node).await["leaving"].clone();
            leaving["phase"] == phase && leaving["waits_for"] == json!(names)
        },
    )
    .await;
}

/// All that stay say that the node left, have its stream to the same end, and it is nobody's peer any more.
async fn assert_gone(cluster: &Cluster, stay: &[usize], node: usize) {
    let id = node + 1;
    let end =
        format!("select epoch || ' ' || lsn from anabranch.member where node_id = {id} and fact = 'dropped'");
    let applied = format!("select epoch || ' ' || lsn from anabranch.progress where origin = {id}");
    for &at in stay {
        cluster
            .wait_value(at, &format!("select ({end}) = ({applied})"), "t")
            .await;
        until("the node is no peer any more", async || {
            let status = cluster.status_or_null(at).await;
            let peers = status["peers"].as_array().map(Vec::len);
            peers == Some(stay.len() - 1) && status["dropping"] == json!([])
        })
        .await;
    }
    let ends = stay.iter().map(|&at| cluster.value(at, &end));
    let mut ends: Vec<String> = futures_util::future::join_all(ends).await;
    ends.dedup();
    assert_eq!(ends.len(), 1, "{ends:?}");
    let status = cluster.status(node).await;
    assert_eq!(status["leaving"]["phase"], "left", "{status}");
    assert_eq!(
        cluster
            .value(node, "select count(*) from pg_replication_slots")
            .await,
        "0",
        "its slot would keep WAL"
    );
}

#[tokio::test]
async fn a_node_leaves_under_load_with_all_that_it_wrote_and_becomes_an_ordinary_database() {
    let mut cluster = Cluster::of([15, 18, 15]).schema(load::SCHEMA).start().await;
    let load = Load::start(&cluster, &[0, 1], load::Options::default());
    let theirs = Load::start(
        &cluster,
        &[2],
        load::Options {
            seed: 3,
            ..load::Options::default()
        },
    );
    cluster
        .wait_value(
            0,
            "select (select count(*) from witness where node = 3) > 20",
            "t",
        )
        .await;
    let leave = begin_leave(&cluster, 2, &[]);
    // Who was connected before may go on writing, and is waited for by name.
    until("the sessions of the load are waited for", async || {
        let leaving = cluster.status_or_null(2).await["leaving"].clone();
        leaving["phase"] == "draining" && leaving["waits_for"].to_string().contains("of app")
    })
    .await;
    let before: i64 = cluster
        .value(2, "select count(*) from witness where node = 3")
        .await
        .parse()
        .expect("a count");
    cluster
        .wait_value(
            2,
            &format!("select count(*) > {before} from witness where node = 3"),
            "t",
        )
        .await;
    let refused = cluster
        .session(2)
        .await
        .try_run("insert into witness values ('new session', 3)")
        .await
        .expect_err("new sessions do not write");
    assert_eq!(refused.code, "25006");
    let theirs = theirs.stop().await;
    end_leave(leave).await;
    assert_gone(&cluster, &[0, 1], 2).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let load = load.stop().await;
    cluster.converge_among(&[0, 1], Duration::from_secs(120)).await;
    load.account_among(&cluster, &[0, 1]).await;
    theirs.account_among(&cluster, &[0, 1]).await;
    // It says what it is, also when it is started anew.
    cluster.nodes[2].daemon.stop();
    cluster.nodes[2].daemon.start();
    until("it says that it has left", async || {
        cluster.status_or_null(2).await["leaving"]["phase"] == "left"
    })
    .await;
    let shown = anabranch_ok(&["status", "--config", cluster.nodes[2].daemon.config_arg()]).await;
    assert!(
        shown.contains("left the cluster") && shown.contains("anabranch remove"),
        "{shown}"
    );
    // Nothing of the others is told from here, and nobody takes that for an answer.
    let config = cluster.nodes[2].daemon.config_arg();
    let logs = anabranch_ok(&["conflicts", "list", "--all-nodes", "--config", config]).await;
    assert!(
        logs.contains("NOT COMPLETE") && logs.contains("has left its cluster"),
        "{logs}"
    );
    let compared = anabranch_refuses(&["verify", "--config", config]).await;
    assert!(
        compared.contains("NOT COMPLETE: this node has left its cluster"),
        "{compared}"
    );
    let again = anabranch_ok(&strs(&leave_args(&cluster, 2, &[]))).await;
    assert!(again.contains("node `n3` (id 3) has left"), "{again}");
    let back = anabranch_refuses(&strs(&leave_args(&cluster, 2, &["--cancel"]))).await;
    assert!(back.contains("too late"), "{back}");
    cluster.nodes[2].daemon.stop();
    let admin = cluster.nodes[2].server.dsn("postgres", DATABASE);
    let config = cluster.nodes[2].daemon.config_arg().to_owned();
    anabranch_ok(&["remove", "--yes", "--config", &config, "--admin-dsn", &admin]).await;
    cluster
        .run(2, "insert into witness values ('on its own', 3)")
        .await;
    let left = "select count(*) from pg_namespace where nspname = 'anabranch'";
    assert_eq!(cluster.value(2, left).await, "0");
}

#[tokio::test]
async fn leaving_waits_for_a_member_that_is_down_by_name_and_outlives_a_kill_of_the_leaving_daemon() {
    let mut cluster = Cluster::of([15, 15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, "insert into item values (1, 'before')").await;
    cluster.converge().await;
    cluster.nodes[1].daemon.stop();
    cluster.run(2, "insert into item values (2, 'last words')").await;
    let events = cluster.dir().join("leave.ndjson");
    let leave = begin_leave_to(&cluster, 2, &["--end-sessions"], &events);
    wait_waits_for(&cluster, 2, "draining", &["n2"]).await;
    wait_said_to_wait_for(&events, &["n2"]).await;
    let shown = anabranch_ok(&["status", "--config", cluster.nodes[2].daemon.config_arg()]).await;
    assert!(shown.contains("leaving: waits for n2"), "{shown}");
    cluster.nodes[2].daemon.kill();
    cluster.run(0, "insert into item values (3, 'meanwhile')").await;
    cluster.nodes[2].daemon.start();
    wait_waits_for(&cluster, 2, "draining", &["n2"]).await;
    let said_so = "select count(*) from anabranch.member where fact = 'dropping'";
    assert_eq!(cluster.value(2, said_so).await, "0", "goodbye before all have it");
    cluster.nodes[1].daemon.start();
    // Once more, at the worst moment: goodbye is in the WAL, and may be on its way or not.
    cluster.wait_value(2, said_so, "1").await;
    cluster.nodes[2].daemon.kill();
    tokio::time::sleep(Duration::from_millis(300)).await;
    cluster.nodes[2].daemon.start();
    let events = end_leave(leave).await;
    let waited = events
        .iter()
        .find(|event| event["event"] == "waiting" && event["for"] == json!(["n2"]));
    assert!(waited.is_some(), "{events:?}");
    assert_gone(&cluster, &[0, 1], 2).await;
    cluster.converge_among(&[0, 1], PATIENCE).await;
    for node in [0, 1] {
        let all = "select string_agg(id::text, ',' order by id) from item";
        assert_eq!(cluster.value(node, all).await, "1,2,3");
    }
}

#[tokio::test]
async fn leaving_can_be_called_off_and_of_two_nodes_the_one_that_stays_goes_on_alone() {
    let cluster = Cluster::of([15, 15])
        .schema("create table item (id int generated by default as identity primary key, v text)")
        .start()
        .await;
    for node in [0, 1] {
        let node = &cluster.nodes[node];
        let admin = node.server.dsn("postgres", DATABASE);
        let config = node.daemon.config_arg();
        anabranch_ok(&["sequences", "apply", "--config", config, "--admin-dsn", &admin]).await;
    }
    let refused = anabranch_refuses(&strs(&leave_args(&cluster, 1, &["--cancel"]))).await;
    assert!(refused.contains("is not leaving"), "{refused}");
    // Whoever may make the database read only, but not note why, does neither.
    let admin = cluster.admin(1).await;
    let owner = "select datdba::regrole::text from pg_database where datname = current_database()";
    let owner = admin.value(owner).await;
    admin.run("alter database app owner to anabranch").await;
    let refused = anabranch_refuses(&["leave", "--config", cluster.nodes[1].daemon.config_arg()]).await;
    assert!(
        refused.contains("permission denied") && refused.contains("--admin-dsn"),
        "{refused}"
    );
    let read_only = "select count(*) from pg_db_role_setting where setconfig::text like '%read_only%'";
    assert_eq!(admin.value(read_only).await, "0");
    admin.run(&format!("alter database app owner to {owner}")).await;
    // A session that stays keeps it from going through.
    let old = cluster.session(1).await;
    // It is none of ours for its name.
    old.run("set application_name = 'anabranch:shop'").await;
    let args = leave_args(&cluster, 1, &[]);
    let leave = tokio::spawn(async move { anabranch(&strs(&args)).await });
    until("the session is waited for", async || {
        let leaving = cluster.status_or_null(1).await["leaving"].clone();
        leaving["text"].to_string().contains("of app")
    })
    .await;
    // Also where the daemon's role may not see any more when it began.
    admin.run("revoke pg_read_all_stats from anabranch").await;
    until("a session that cannot be seen is waited for", async || {
        let leaving = cluster.status_or_null(1).await["leaving"].clone();
        let text = leaving["text"].to_string();
        text.contains("of app") && text.contains("which this role may not see")
    })
    .await;
    admin.run("grant pg_read_all_stats to anabranch").await;
    // As where the clock was set back since.
    admin
        .run("update anabranch.leaving set since = since + interval '1 hour'")
        .await;
    until("it is told why new sessions are waited for", async || {
        let leaving = cluster.status_or_null(1).await["leaving"].clone();
        leaving["text"].to_string().contains("was set back")
    })
    .await;
    old.run("insert into item (v) values ('an old session writes')")
        .await;
    let stays = anabranch_ok(&strs(&leave_args(&cluster, 1, &["--cancel"]))).await;
    assert!(stays.contains("node `n2` stays"), "{stays}");
    let output = leave.await.expect("the command ends");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("cancelled"), "{said}");
    cluster
        .run(1, "insert into item (v) values ('and so do new ones')")
        .await;
    cluster.converge().await;
    until("its status says that it stays", async || {
        cluster.status_or_null(1).await["leaving"] == Value::Null
    })
    .await;
    // In earnest, ending the session.
    end_leave(begin_leave(&cluster, 1, &["--end-sessions"])).await;
    assert!(old.try_run("select 1").await.is_err(), "the session was ended");
    assert_gone(&cluster, &[0], 1).await;
    // What is its alone stays its alone.
    cluster
        .run(
            0,
            "insert into item (v) select 'alone' from generate_series(1, 40)",
        )
        .await;
    let shares = "select string_agg(distinct (id % 16)::text, ',') from item where v = 'alone'";
    assert_eq!(cluster.value(0, shares).await, "1");
    until("what it writes becomes stable without the other", async || {
        let status = cluster.status_or_null(0).await;
        let at = |what: &str| status["positions"][what]["1"]["lsn"].as_str().map(str::to_owned);
        at("stable").is_some() && status["peers"] == json!([])
    })
    .await;
    let alone = anabranch_refuses(&strs(&leave_args(&cluster, 0, &[]))).await;
    assert!(
        alone.contains("only member") && alone.contains("anabranch remove"),
        "{alone}"
    );
}

#[tokio::test]
async fn of_two_that_are_told_to_leave_the_second_ends_as_the_only_member() {
    let cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, "insert into item values (1, 'here')").await;
    cluster.run(1, "insert into item values (2, 'there')").await;
    cluster.converge().await;
    let leaves = [begin_leave(&cluster, 0, &[]), begin_leave(&cluster, 1, &[])];
    let mut ends = Vec::new();
    for leave in leaves {
        let said = tokio::time::timeout(Duration::from_secs(120), leave)
            .await
            .expect("leaving ends")
            .expect("the command runs");
        let last: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        ends.push(last["event"].as_str().unwrap().to_owned());
    }
    // Both left, if their goodbyes crossed.
    assert!(ends.iter().any(|end| end == "left"), "{ends:?}");
    for (node, end) in ends.iter().enumerate() {
        assert_eq!(cluster.value(node, "select count(*) from item").await, "2");
        // It may have begun anew since it told the command, and says so again once it has looked.
        until(&format!("n{} says that it is {end}", node + 1), async || {
            cluster.status(node).await["leaving"]["phase"] == end.as_str()
        })
        .await;
        if end == "alone" {
            let stays = anabranch_ok(&strs(&leave_args(&cluster, node, &["--cancel"]))).await;
            assert!(stays.contains("stays"), "{stays}");
            cluster
                .run(node, "insert into item values (3, 'goes on alone')")
                .await;
        }
    }
}

/// Says goodbye by hand, whatever the others have.
async fn say_goodbye(cluster: &Cluster, node: usize) {
    let id = node + 1;
    let goodbye = format!(
        "insert into anabranch.leaving default values; \
         insert into anabranch.member (node_id, fact, name, address, incarnation, epoch, lsn, said_by) \
         select node_id, 'dropping', name, address, incarnation, 0, '0/0', node_id from anabranch.member \
         where node_id = {id} and fact = 'founder'"
    );
    cluster.admin(node).await.run(&goodbye).await;
}

#[tokio::test]
async fn rows_written_after_goodbye_are_still_told_of_when_the_node_has_left() {
    let cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.converge().await;
    cluster.isolate_all();
    say_goodbye(&cluster, 1).await;
    wait_waits_for(&cluster, 1, "goodbye", &["n1"]).await;
    cluster.run(1, "insert into item values (1, 'too late')").await;
    until("it is an alarm", async || {
        cluster.status_or_null(1).await["alarms"][0]["name"] == "leaving"
    })
    .await;
    cluster.heal();
    until("it has left", async || {
        cluster.status_or_null(1).await["leaving"]["phase"] == "left"
    })
    .await;
    let status = cluster.status(1).await;
    assert_eq!(status["alarms"][0]["name"], "leaving", "{status:#}");
}

#[tokio::test]
async fn the_last_two_whose_goodbyes_cross_have_both_left() {
    let cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.converge().await;
    cluster.isolate_all();
    for node in cluster.all() {
        say_goodbye(&cluster, node).await;
        wait_waits_for(&cluster, node, "goodbye", &[if node == 0 { "n2" } else { "n1" }]).await;
    }
    cluster.heal();
    for node in cluster.all() {
        until("it has left", async || {
            cluster.status_or_null(node).await["leaving"]["phase"] == "left"
        })
        .await;
        cluster
            .wait_value(node, "select count(*) from pg_replication_slots", "0")
            .await;
        cluster
            .wait_value(
                node,
                "select count(*) from anabranch.leaving where left_at is not null",
                "1",
            )
            .await;
    }
}
