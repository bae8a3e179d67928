//! A member is lost for good: the others agree where its stream ends, and go on without it.

use std::time::Duration;

use anabranch_tests::Cluster;
use anabranch_tests::daemon::{anabranch, anabranch_ok, anabranch_refuses};
use anabranch_tests::load::{self, Load};
use anabranch_tests::proxy::Mode;
use anabranch_tests::wait::{PATIENCE, until};
use serde_json::Value;
use tokio::task::JoinHandle;

const SCHEMA: &str = "create table item (id int primary key, v text)";

/// Daemon and server at once, as a machine that burns.
fn lose(cluster: &mut Cluster, node: usize) {
    cluster.nodes[node].daemon.kill();
    cluster.nodes[node].server.kill();
}

/// Begins `anabranch node drop` at one node; its standard output comes when it is through.
fn begin_drop(cluster: &Cluster, at: usize, node: &str) -> JoinHandle<String> {
    let config = cluster.nodes[at].daemon.config_arg().to_owned();
    let node = node.to_owned();
    tokio::spawn(async move {
        anabranch_ok(&["node", "drop", &node, "--config", &config, "--output", "json"]).await
    })
}

async fn end_drop(drop: JoinHandle<String>) -> Vec<Value> {
    let said = tokio::time::timeout(Duration::from_secs(120), drop)
        .await
        .expect("the drop ends")
        .expect("the command runs");
    said.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

/// Waits until one node's daemon has noticed that another one's is gone: before that it is not lost, and nobody drops it.
pub(crate) async fn wait_parted(cluster: &Cluster, at: usize, node: usize) {
    until(&format!("n{} misses n{}", at + 1, node + 1), async || {
        let status = cluster.status_or_null(at).await;
        let peers = status["peers"].as_array().cloned().unwrap_or_default();
        peers
            .iter()
            .any(|peer| peer["id"] == node + 1 && peer["connected"] == false)
    })
    .await;
}

/// Waits until these facts about a node are known at one node.
async fn wait_fact(cluster: &Cluster, at: usize, node: usize, fact: &str) {
    let sql = format!(
        "select count(*) > 0 from anabranch.member where node_id = {} and fact = '{fact}'",
        node + 1
    );
    cluster.wait_value(at, &sql, "t").await;
}

/// Waits until `status` at one node names these members as waited for by the drop of a node.
async fn wait_waits_for(cluster: &Cluster, at: usize, node: usize, names: &[&str]) {
    until(&format!("n{}'s status waits for {names:?}", at + 1), async || {
        let status = cluster.status_or_null(at).await;
        let drops = status["dropping"].as_array().cloned().unwrap_or_default();
        drops
            .iter()
            .any(|drop| drop["id"] == node + 1 && drop["waits_for"] == serde_json::json!(names))
    })
    .await;
}

/// Every survivor says the same end of the lost node's stream, and has applied exactly that.
async fn assert_closed_alike(cluster: &Cluster, survivors: &[usize], node: usize) {
    let id = node + 1;
    let end =
        format!("select epoch || ' ' || lsn from anabranch.member where node_id = {id} and fact = 'dropped'");
    let applied = format!("select epoch || ' ' || lsn from anabranch.progress where origin = {id}");
    // Whoever knows that it is closed has applied all of it.
    for &survivor in survivors {
        wait_fact(cluster, survivor, node, "dropped").await;
    }
    let expected = cluster.value(survivors[0], &applied).await;
    for &survivor in survivors {
        assert_eq!(cluster.value(survivor, &end).await, expected, "n{}", survivor + 1);
        assert_eq!(
            cluster.value(survivor, &applied).await,
            expected,
            "n{}",
            survivor + 1
        );
        until("the lost node is no peer any more", async || {
            let status = cluster.status_or_null(survivor).await;
            let peers = status["peers"].as_array().map(Vec::len);
            peers == Some(survivors.len() - 1) && status["dropping"] == serde_json::json!([])
        })
        .await;
    }
}

/// Waits until a dropped node that came back is refused by all, and says what to do.
async fn wait_told_to_join_again(cluster: &Cluster, node: usize) {
    until("the dropped node is told how to join again", async || {
        let status = cluster.status_or_null(node).await;
        let refused = status["peers"].as_array().is_some_and(|peers| {
            peers
                .iter()
                .all(|peer| peer["refusal"].to_string().contains("[dropped]"))
        });
        let alarms = status["alarms"].to_string();
        refused && alarms.contains("was dropped from the cluster") && alarms.contains("anabranch join")
    })
    .await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_lost_node_is_dropped_where_the_furthest_survivor_is_and_another_takes_its_place() {
    let mut cluster = Cluster::of([18, 15, 15]).schema(SCHEMA).start().await;
    // What the lost node wrote last has reached one survivor only.
    cluster.partition(&[0], &[1, 2]);
    cluster.run(2, "insert into item values (1, 'last words')").await;
    cluster.wait_value(1, "select count(*) from item", "1").await;
    lose(&mut cluster, 2);
    cluster.run(0, "insert into item values (2, 'alone')").await;
    let drop = begin_drop(&cluster, 0, "n3");
    wait_waits_for(&cluster, 0, 2, &["n2"]).await;
    cluster.set_lines(&[0], &[1], Mode::Pass);
    let said = end_drop(drop).await;
    assert_eq!(said.last().expect("an end")["event"], "dropped", "{said:?}");
    cluster.converge_among(&[0, 1], PATIENCE).await;
    for survivor in [0, 1] {
        assert_eq!(cluster.value(survivor, "select count(*) from item").await, "2");
    }
    assert_closed_alike(&cluster, &[0, 1], 2).await;
    // It comes back with something that nobody has, and is told.
    cluster.set_lines(&[0, 1], &[2], Mode::Pass);
    cluster.nodes[2].server.start().await;
    cluster.run(2, "insert into item values (3, 'too late')").await;
    cluster.nodes[2].daemon.start();
    wait_told_to_join_again(&cluster, 2).await;
    let more = anabranch_refuses(&[
        "node",
        "drop",
        "n1",
        "--config",
        cluster.nodes[0].daemon.config_arg(),
    ])
    .await;
    assert!(more.contains("`n1` is this node"), "{more}");
    cluster.nodes[2].daemon.stop();
    // An empty database takes its place, and gets what the lost node wrote, too.
    let node = cluster.add_server(15).await;
    cluster.join(node, 1).await;
    // It waits for a member that is lost before it has heard of it, until that is dropped, too.
    lose(&mut cluster, 0);
    cluster.nodes[node].daemon.start();
    until("the joiner says for whom it waits", async || {
        let status = cluster.status_or_null(node).await;
        status["node"]["state"].to_string().contains("node n1 (1)")
    })
    .await;
    wait_parted(&cluster, 1, 0).await;
    end_drop(begin_drop(&cluster, 1, "n1")).await;
    cluster.wait_writable(node).await;
    cluster
        .run(node, "insert into item values (4, 'the new one')")
        .await;
    cluster.converge_among(&[1, node], PATIENCE).await;
    assert_eq!(
        cluster
            .value(node, "select string_agg(id::text, ',' order by id) from item")
            .await,
        "1,2,4"
    );
}

#[tokio::test]
async fn a_drop_under_load_brings_a_survivor_that_lags_up_to_the_end_of_the_lost_stream() {
    let mut cluster = Cluster::of([15, 18, 15]).schema(load::SCHEMA).start().await;
    let load = Load::start(&cluster, &[0, 1], load::Options::default());
    let lost = Load::start(
        &cluster,
        &[2],
        load::Options {
            seed: 3,
            ..load::Options::default()
        },
    );
    let theirs = "select count(*) from witness where node = 3";
    cluster
        .wait_value(0, &format!("select ({theirs}) > 20"), "t")
        .await;
    cluster.partition(&[0], &[1, 2]);
    until("the other survivor is far ahead", async || {
        let count = async |node| cluster.value(node, theirs).await.parse::<i64>().expect("a count");
        count(1).await > count(0).await + 200
    })
    .await;
    lose(&mut cluster, 2);
    let drop = begin_drop(&cluster, 0, "n3");
    wait_waits_for(&cluster, 0, 2, &["n2"]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before: i64 = cluster.value(0, theirs).await.parse().expect("a count");
    cluster.set_lines(&[0], &[1], Mode::Pass);
    end_drop(drop).await;
    let held: i64 = cluster.value(1, theirs).await.parse().expect("a count");
    assert!(
        held > before,
        "the first survivor did not lag ({before} of {held}): this proves nothing"
    );
    assert_eq!(
        cluster.value(0, theirs).await,
        held.to_string(),
        "at the end of the drop"
    );
    assert_closed_alike(&cluster, &[0, 1], 2).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let ledger = load.stop().await;
    let lost = lost.stop().await;
    assert!(
        lost.perhaps_committed() >= usize::try_from(held).expect("a count"),
        "more of it than it committed"
    );
    cluster.converge_among(&[0, 1], Duration::from_secs(120)).await;
    ledger.account_among(&cluster, &[0, 1]).await;
}

#[tokio::test]
async fn a_drop_waits_for_a_survivor_that_is_down_says_for_whom_and_ends_when_it_is_back() {
    let mut cluster = Cluster::of([15, 15, 15]).schema(SCHEMA).start().await;
    cluster.run(2, "insert into item values (1, 'last words')").await;
    cluster.converge().await;
    cluster.nodes[1].daemon.stop();
    lose(&mut cluster, 2);
    wait_parted(&cluster, 0, 2).await;
    let drop = begin_drop(&cluster, 0, "3");
    wait_waits_for(&cluster, 0, 2, &["n2"]).await;
    let shown = anabranch_ok(&["status", "--config", cluster.nodes[0].daemon.config_arg()]).await;
    assert!(
        shown.contains("n3 is being dropped: waits for n2 to say"),
        "{shown}"
    );
    // A daemon that begins again goes on with it, and takes nothing from the lost node meanwhile.
    cluster.nodes[0].daemon.kill();
    cluster.nodes[0].daemon.start();
    cluster.nodes[2].server.start().await;
    cluster
        .run(2, "insert into item values (2, 'after it was given up')")
        .await;
    cluster.nodes[2].daemon.start();
    wait_waits_for(&cluster, 0, 2, &["n2"]).await;
    until("the lost node is kept away", async || {
        cluster.status_or_null(2).await["peers"]
            .as_array()
            .is_some_and(|peers| {
                peers
                    .iter()
                    .any(|peer| peer["last_error"].to_string().contains("being dropped"))
            })
    })
    .await;
    lose(&mut cluster, 2);
    cluster
        .run(0, "insert into item values (3, 'writes go on')")
        .await;
    cluster.nodes[1].daemon.start();
    let said = end_drop(drop).await;
    let waited = said
        .iter()
        .find(|event| event["event"] == "waiting" && event["for"] == serde_json::json!(["n2"]));
    assert!(waited.is_some(), "{said:?}");
    cluster.converge_among(&[0, 1], PATIENCE).await;
    assert_closed_alike(&cluster, &[0, 1], 2).await;
    assert_eq!(
        cluster
            .value(0, "select string_agg(id::text, ',' order by id) from item")
            .await,
        "1,3"
    );
    // It comes back, and is told; what it wrote alone goes nowhere.
    cluster.nodes[2].server.start().await;
    cluster.nodes[2].daemon.start();
    wait_told_to_join_again(&cluster, 2).await;
    for survivor in [0, 1] {
        assert_eq!(cluster.value(survivor, "select count(*) from item").await, "2");
    }
}

#[tokio::test]
async fn a_drop_goes_on_when_the_member_that_began_it_is_lost_and_dropped_too() {
    let mut cluster = Cluster::of([15, 15, 15, 15]).schema(SCHEMA).start().await;
    cluster.partition(&[1], &[0, 2, 3]);
    cluster
        .run(3, "insert into item values (1, 'last words of node 4')")
        .await;
    for node in [0, 2] {
        cluster.wait_value(node, "select count(*) from item", "1").await;
    }
    lose(&mut cluster, 3);
    wait_parted(&cluster, 2, 3).await;
    let config = cluster.nodes[2].daemon.config_arg().to_owned();
    let first = tokio::spawn(async move { anabranch(&["node", "drop", "n4", "--config", &config]).await });
    wait_waits_for(&cluster, 2, 3, &["n2"]).await;
    wait_fact(&cluster, 0, 3, "dropping").await;
    lose(&mut cluster, 2);
    let output = first.await.expect("the command ends with its server");
    assert!(!output.status.success());
    cluster.set_lines(&[0], &[1], Mode::Pass);
    end_drop(begin_drop(&cluster, 1, "n3")).await;
    for lost in [2, 3] {
        assert_closed_alike(&cluster, &[0, 1], lost).await;
    }
    cluster.converge_among(&[0, 1], PATIENCE).await;
    assert_eq!(cluster.value(1, "select count(*) from item").await, "1");
}

#[tokio::test]
async fn a_drop_that_cannot_be_is_refused_with_what_to_do() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let refused = async |node: &str| anabranch_refuses(&["node", "drop", node, "--config", &config]).await;
    let said = refused("oak").await;
    assert!(
        said.contains("`oak` is no member of this cluster; its members are `n1` (id 1), `n2` (id 2)"),
        "{said}"
    );
    let said = refused("1").await;
    assert!(
        said.contains("`n1` is this node: run this at a member that stays"),
        "{said}"
    );
    let said = refused("n2").await;
    assert!(said.contains("`n2` is not lost"), "{said}");
    assert!(said.contains("stop its daemon first"), "{said}");
    expect_no_drop(&cluster).await;
    cluster.nodes[1].daemon.stop();
    cluster.nodes[0].daemon.stop();
    let said = refused("n2").await;
    assert!(said.contains("no daemon answers"), "{said}");
    expect_no_drop(&cluster).await;
    cluster.nodes[0].daemon.start();
    until("n1 answers", async || {
        anabranch(&["status", "--config", &config]).await.status.success()
    })
    .await;
    let said = end_drop(begin_drop(&cluster, 0, "n2")).await;
    let end = said.last().expect("an end").clone();
    assert_eq!((&end["event"], &end["id"]), (&"dropped".into(), &2.into()));
    // Once more, by its id: it is so already.
    let again = end_drop(begin_drop(&cluster, 0, "2")).await;
    assert_eq!(again, [end]);
    assert_eq!(
        cluster
            .value(0, "select count(*) from anabranch.member where fact = 'dropped'")
            .await,
        "1"
    );
    // The one that is left goes on alone.
    cluster.run(0, "insert into item values (1, 'alone')").await;
    until("what it writes becomes stable without the other", async || {
        let status = cluster.status_or_null(0).await;
        let at = |what: &str| status["positions"][what]["1"]["lsn"].as_str().map(str::to_owned);
        at("stable").is_some() && status["peers"] == serde_json::json!([])
    })
    .await;
}

/// Nobody has begun a drop.
async fn expect_no_drop(cluster: &Cluster) {
    assert_eq!(
        cluster
            .value(
                0,
                "select count(*) from anabranch.member where fact not in ('founder', 'joined', 'ready')"
            )
            .await,
        "0"
    );
}
