//! A policy that is changed while the cluster runs: no row is decided by two policies, whoever is down or killed meanwhile.

use std::fs;
use std::process::Output;
use std::time::Duration;

use anabranch_tests::Cluster;
use anabranch_tests::daemon::{anabranch, anabranch_ok, anabranch_refuses};
use anabranch_tests::process::{Signal, signal};
use anabranch_tests::proxy::Mode;
use anabranch_tests::wait::until;
use serde_json::Value;
use tokio::task::JoinHandle;

const TABLES: [&str; 5] = ["first", "late", "prio", "chosen", "plain"];

const FORMER: &str = r#"
    [[table]]
    name = "public.first"
    policy = "first_update_wins"
    [[table]]
    name = "public.prio"
    policy = "origin_priority"
    priority = ["n1", "n2"]
    [[table]]
    name = "public.chosen"
    policy = "script"
    script = "chosen.rhai"
"#;

/// Each of the tables is decided by something else.
const NEXT: &str = r#"
    [[table]]
    name = "public.late"
    policy = "first_update_wins"
    [[table]]
    name = "public.prio"
    policy = "origin_priority"
    priority = ["n3"]
    [[table]]
    name = "public.chosen"
    policy = "first_update_wins"
    [[table]]
    name = "public.plain"
    policy = "script"
    script = "chosen.rhai"
"#;

const CHOSEN: &str = "fn resolve(versions) { versions.len() / 2 }";

/// Three nodes; every table holds the rows 1 and 2.
async fn start() -> Cluster {
    let schema: Vec<String> = TABLES
        .iter()
        .map(|table| format!("create table {table} (id int primary key, v text)"))
        .collect();
    let cluster = Cluster::of([15, 15, 18])
        .schema(&schema.join("; "))
        .policy(FORMER)
        .script("chosen.rhai", CHOSEN)
        .start()
        .await;
    for table in TABLES {
        cluster
            .run(0, &format!("insert into {table} values (1, 'base'), (2, 'base')"))
            .await;
    }
    cluster.converge().await;
    cluster
}

fn all(table: &str) -> String {
    format!("select coalesce(string_agg(id || '=' || v, ' ' order by id), 'none') from {table}")
}

/// `anabranch policy change` at a node, until it ends.
fn change_policy(cluster: &Cluster, node: usize, policy: &str) -> JoinHandle<Output> {
    let file = cluster.nodes[node].data_dir.with_file_name("next.toml");
    fs::write(&file, policy).expect("write the policy");
    let config = cluster.nodes[node].daemon.config_arg().to_owned();
    tokio::spawn(async move {
        let file = file.to_str().expect("a path in UTF-8");
        anabranch(&["--output", "json", "policy", "change", file, "--config", &config]).await
    })
}

async fn expect_changed(change: JoinHandle<Output>) {
    let output = change.await.expect("wait for the change");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let erred = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{erred}");
    assert!(said.contains(r#""event":"changed""#), "{said}");
}

/// The change that a node's status shows.
async fn shown(cluster: &Cluster, node: usize) -> Value {
    cluster.status_or_null(node).await["policy"]["change"].clone()
}

/// The nodes that have said so of the only change, as a node knows.
async fn who(cluster: &Cluster, node: usize, fact: &str) -> String {
    let sql = format!(
        "select coalesce(string_agg(node_id::text, ' ' order by node_id), '') from anabranch.policy_change where fact = '{fact}'"
    );
    cluster.admin(node).await.value(&sql).await
}

async fn wait_who(cluster: &Cluster, node: usize, fact: &str, nodes: &str) {
    until(&format!("{nodes} have {fact}"), async || {
        who(cluster, node, fact).await == nodes
    })
    .await;
}

/// Nodes write the same few rows of every table, all at once.
async fn write_everywhere(cluster: &Cluster, nodes: &[usize], rounds: usize) {
    let statement = |table: &str, node: usize, round: usize| {
        let row = (node * 7 + round * 3) % 4;
        match (round + node) % 5 {
            0 => format!("delete from {table} where id = {row}"),
            _ => format!(
                "insert into {table} values ({row}, '{node}.{round}') on conflict (id) do update set v = excluded.v"
            ),
        }
    };
    let sessions = futures_util::future::join_all(nodes.iter().map(|&node| cluster.session(node))).await;
    let all = nodes.iter().zip(&sessions).map(async |(&node, session)| {
        for round in 0..rounds {
            for table in TABLES {
                // A lock that the applier waits for may be refused; that write was not made.
                let _ = session.try_run(&statement(table, node, round)).await;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    futures_util::future::join_all(all).await;
}

#[tokio::test]
async fn a_policy_changes_while_all_write_with_one_member_down_at_first_and_another_killed() {
    let mut cluster = start().await;
    cluster.nodes[2].daemon.kill();
    let change = change_policy(&cluster, 0, NEXT);
    until("it waits for the member that is down", async || {
        let change = shown(&cluster, 0).await;
        change["phase"] == "asking" && change["waits_for"] == serde_json::json!(["n3"])
    })
    .await;
    write_everywhere(&cluster, &[0, 1, 2], 30).await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let said = anabranch_ok(&["policy", "show", "--config", &config]).await;
    assert!(said.contains("waits for n3"), "{said}");
    cluster.nodes[2].daemon.start();
    let second = cluster.nodes[1].daemon.pid().expect("it runs");
    let kill = async {
        until("the change is made", async || {
            !who(&cluster, 0, "passed").await.is_empty()
        })
        .await;
        signal(second, Signal::KILL);
    };
    futures_util::future::join(write_everywhere(&cluster, &[0, 1, 2], 500), kill).await;
    cluster.nodes[1].daemon.kill();
    cluster.nodes[1].daemon.start();
    futures_util::future::join(
        write_everywhere(&cluster, &[0, 1, 2], 100),
        expect_changed(change),
    )
    .await;
    // However long that took, all decide by the new policy now.
    write_everywhere(&cluster, &[0, 1, 2], 100).await;
    cluster.converge().await;
    // Both policies have decided something.
    let policies = "select string_agg(distinct policy, '; ' order by policy) from anabranch.conflict_history \
        where table_name = 'late'";
    for node in cluster.all() {
        let said = cluster.admin(node).await.value(policies).await;
        assert_eq!(said, "first_update_wins; last_update_wins", "n{}", node + 1);
        until("its end is known", async || {
            shown(&cluster, node).await == Value::Null
        })
        .await;
    }
    // And the new one alone decides now, also after a start, whatever the files say.
    cluster.kill_daemons();
    cluster.start_daemons();
    cluster.converge().await;
    cluster
        .apart(&[
            (
                0,
                "insert into first values (9, 'early'); insert into late values (9, 'early')",
            ),
            (
                1,
                "insert into first values (9, 'last'); insert into late values (9, 'last')",
            ),
        ])
        .await;
    cluster.expect("select v from first where id = 9", "last").await;
    cluster.expect("select v from late where id = 9", "early").await;
    for node in cluster.all() {
        until("the file of before is alarmed", async || {
            let alarms = cluster.status(node).await["alarms"].to_string();
            alarms.contains("agreed-policy")
        })
        .await;
    }
    refuses_who_joins_with_the_former(&mut cluster).await;
}

/// A node that joins needs the new policy.
async fn refuses_who_joins_with_the_former(cluster: &mut Cluster) {
    let node = cluster.add_server(15).await;
    let command = cluster.join_command(node, 0);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let refused = anabranch_refuses(&command).await;
    assert!(refused.contains("install the same policy file"), "{refused}");
    let agreed = cluster.nodes[0].data_dir.join("agreed-policy/policy.toml");
    let policy = cluster.nodes[node].data_dir.with_file_name("policy.toml");
    fs::copy(agreed, policy).expect("copy the policy");
    cluster.join(node, 0).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
}

#[tokio::test]
async fn what_is_concurrent_with_an_old_write_is_decided_by_the_former_policy_at_every_node() {
    let cluster = start().await;
    // Nobody votes before we hold the vote of the node that asks, which is the last.
    cluster.isolate_all();
    let change = change_policy(&cluster, 0, NEXT);
    wait_who(&cluster, 0, "asked", "1").await;
    // The node that asked cannot make it yet: its vote waits for ours.
    let holds = cluster.admin(0).await;
    holds.run("begin").await;
    holds
        .run(
            "insert into anabranch.policy_change (change_id, fact, node_id, asked_by) \
             select change_id, 'voted', 1, 1 from anabranch.policy_change where fact = 'asked'",
        )
        .await;
    cluster.heal();
    wait_who(&cluster, 0, "voted", "2 3").await;
    cluster.partition(&[2], &[0, 1]);
    holds.run("rollback").await;
    for node in [0, 1] {
        wait_who(&cluster, node, "passed", "1 2").await;
    }
    // The third node has not come to the change: what it writes is old.
    assert_eq!(who(&cluster, 2, "passed").await, "");
    cluster
        .run(
            2,
            "update late set v = 'old' where id = 1; update first set v = 'old' where id = 1",
        )
        .await;
    cluster.isolate_all();
    for table in ["late", "first"] {
        cluster
            .run(0, &format!("update {table} set v = 'new a' where id = 2"))
            .await;
        cluster.run(1, &format!("update {table} set v = 'new b'")).await;
    }
    cluster.heal();
    expect_changed(change).await;
    cluster.converge().await;
    cluster.expect(&all("late"), "1=new b 2=new a").await;
    cluster.expect(&all("first"), "1=old 2=new b").await;
    assert!(!cluster.conflicts().await.is_empty());
    for node in cluster.all() {
        for line in cluster.conflicts_at(node).await {
            let is_old = line.key()["id"] == 1;
            let policy = match (line.0["table_name"].as_str(), is_old) {
                (Some("late"), true) | (Some("first"), false) => "last_update_wins",
                _ => "first_update_wins",
            };
            assert_eq!(line.0["policy"], policy, "n{}: {}", node + 1, line.0);
        }
    }
}

#[tokio::test]
async fn what_cannot_be_changed_while_the_cluster_runs_is_refused_and_nothing_is_changed() {
    let cluster = Cluster::of([15, 18])
        .schema("create table account (id int primary key, name text unique, n int not null)")
        .policy("")
        .start()
        .await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let file = cluster.nodes[0].data_dir.with_file_name("next.toml");
    let file = file.to_str().expect("a path in UTF-8").to_owned();
    for (rest, said) in [
        ("policy = \"first_update_wins\"", "unique key(s)"),
        ("columns = { n = \"delta\" }", "merge columns"),
        ("policy = \"first_update_wrong\"", "first_update_wrong"),
    ] {
        fs::write(&file, format!("[[table]]\nname = \"public.account\"\n{rest}\n"))
            .expect("write the policy");
        let refused = anabranch_refuses(&["policy", "change", &file, "--config", &config]).await;
        assert!(refused.contains(said), "{refused}");
    }
    fs::write(&file, "").expect("write the policy");
    let same = anabranch_ok(&["policy", "change", &file, "--config", &config]).await;
    assert!(same.contains("nothing to change"), "{same}");
    assert_eq!(who(&cluster, 0, "asked").await, "");
}

#[tokio::test]
async fn a_change_is_called_off_while_a_member_is_waited_for_and_one_that_a_member_refuses_is_off() {
    let mut cluster = start().await;
    cluster.nodes[2].daemon.kill();
    let change = change_policy(&cluster, 0, NEXT);
    until("it is asked for", async || {
        shown(&cluster, 1).await["phase"] == "asking"
    })
    .await;
    let other = cluster.nodes[1].daemon.config_arg().to_owned();
    let refused = anabranch_refuses(&["policy", "change", "--cancel", "--config", &other]).await;
    assert!(refused.contains("`n1` asked for it"), "{refused}");
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let said = anabranch_ok(&["policy", "change", "--cancel", "--config", &config]).await;
    assert!(said.contains("called off"), "{said}");
    let output = change.await.expect("wait for the change");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains(r#""why":"cancelled""#));
    until("the second has heard of it", async || {
        who(&cluster, 1, "voted").await.starts_with('1')
    })
    .await;
    // The third has a table that the others have without a unique key.
    cluster
        .run(2, "create unique index late_key on late (id, v)")
        .await;
    cluster.nodes[2].daemon.start();
    let output = change_policy(&cluster, 1, NEXT)
        .await
        .expect("wait for the change");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        !output.status.success() && said.contains("`n3` refuses"),
        "{said}"
    );
    cluster.run(2, "drop index late_key").await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "update late set v = 'early'"),
            (1, "update late set v = 'last'"),
        ])
        .await;
    cluster.expect(&all("late"), "1=last 2=last").await;
}

#[tokio::test]
async fn a_change_by_files_that_not_all_members_can_make_is_taken_back() {
    let mut cluster = start().await;
    let other = FORMER.replace("first_update_wins", "last_update_wins");
    let put = |cluster: &Cluster, nodes: &[usize], policy: &str| {
        for &node in nodes {
            let path = cluster.nodes[node].data_dir.with_file_name("policy.toml");
            fs::write(path, policy).expect("write the policy");
        }
    };
    cluster.wait_settled().await;
    // The third has something open that the others have never heard of.
    cluster.partition(&[2], &[0, 1]);
    cluster.run(2, "update first set v = 'open' where id = 2").await;
    cluster.journalled(2).await;
    for node in &mut cluster.nodes {
        node.daemon.stop();
    }
    put(&cluster, &[0, 1, 2], &other);
    cluster.nodes[0].daemon.start();
    cluster.nodes[1].daemon.start();
    let config = cluster.nodes[2].daemon.config_arg().to_owned();
    let refused = anabranch_refuses(&["run", "--config", &config]).await;
    assert!(refused.contains("put the former policy back"), "{refused}");
    // The two have written, and decided by the other policy.
    cluster.converge_among(&[0, 1], Duration::from_secs(60)).await;
    cluster.isolate_all();
    cluster.run(0, "update first set v = 'early' where id = 1").await;
    cluster.run(1, "update first set v = 'last' where id = 1").await;
    cluster.set_lines(&[0], &[1], Mode::Pass);
    cluster.converge_among(&[0, 1], Duration::from_secs(60)).await;
    assert_eq!(cluster.value(0, "select v from first where id = 1").await, "last");
    for node in [0, 1] {
        cluster.nodes[node].daemon.stop();
    }
    put(&cluster, &[0, 1, 2], FORMER);
    cluster.heal();
    cluster.start_daemons();
    cluster.converge().await;
    cluster.expect(&all("first"), "1=early 2=open").await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_policy_names_a_node_that_joined_later_though_nobodys_peers_do() {
    const NEW: &str =
        "[[table]]\nname = \"public.prio\"\npolicy = \"origin_priority\"\npriority = [\"n3\", \"n1\"]\n";
    let mut cluster = Cluster::of([15, 15])
        .schema("create table prio (id int primary key, v text)")
        .policy("")
        .start()
        .await;
    cluster.run(0, "insert into prio values (1, 'base')").await;
    let late = cluster.add_server(15).await;
    cluster.join(late, 0).await;
    cluster.nodes[late].daemon.start();
    cluster.wait_writable(late).await;
    cluster.converge().await;
    let peers = fs::read_to_string(cluster.nodes[1].daemon.config()).expect("read the configuration");
    assert!(!peers.contains("n3"), "{peers}");

    let file = cluster.nodes[0].data_dir.with_file_name("next.toml");
    fs::write(&file, NEW).expect("write the policy");
    let file = file.to_str().expect("a path in UTF-8").to_owned();
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let said = anabranch_ok(&["policy", "check", &file, "--config", &config]).await;
    assert!(said.contains("1 rule(s)"), "{said}");
    let diff = anabranch(&["policy", "diff", &file, "--config", &config]).await;
    let said = String::from_utf8_lossy(&diff.stdout).into_owned();
    assert!(said.contains("+ public.prio: origin_priority 3 1"), "{said}");
    expect_changed(change_policy(&cluster, 0, NEW)).await;
    let hash = cluster.status(0).await["policy"]["hash"].clone();
    for node in cluster.all() {
        fs::write(cluster.nodes[node].data_dir.with_file_name("policy.toml"), NEW).expect("write the policy");
    }
    until("the file is taken for what was agreed on", async || {
        let mut all = Vec::new();
        for node in cluster.all() {
            all.push(cluster.status_or_null(node).await["alarms"] == serde_json::json!([]));
        }
        all.iter().all(|quiet| *quiet)
    })
    .await;
    cluster.kill_daemons();
    cluster.start_daemons();
    cluster.converge().await;
    for node in cluster.all() {
        assert_eq!(cluster.status(node).await["policy"]["hash"], hash);
    }
    cluster.nodes[late].daemon.stop();
    cluster.run(late, "update prio set v = 'preferred'").await;
    cluster.run(1, "update prio set v = 'lesser'").await;
    cluster.nodes[late].daemon.start();
    cluster.converge().await;
    cluster.expect(&all("prio"), "1=preferred").await;
}
