//! The connection string names a server and its standby, and the daemon is always on the one that takes writes.

use std::time::Duration;

use anabranch_tests::daemon::{anabranch, anabranch_refuses};
use anabranch_tests::postgres::DATABASE;
use anabranch_tests::wait::{PATIENCE, until};
use anabranch_tests::{Cluster, Postgres};

use crate::heals::{ITEMS, ROWS, base, cut_off, healed, horizon_passes, refuses};

/// `host=..` and `port=..` of these servers.
fn hosts(servers: [&Postgres; 2]) -> String {
    let folders = servers.map(|server| {
        server
            .data_dir()
            .parent()
            .expect("a folder")
            .display()
            .to_string()
    });
    let ports = servers.map(|server| server.port().to_string());
    format!("host={} port={}", folders.join(","), ports.join(","))
}

/// From now on the configuration of node 0 names the standby, then its own server.
fn name_both(cluster: &mut Cluster, standby: &Postgres) {
    let node = &mut cluster.nodes[0];
    node.daemon.stop();
    let own = node.server.dsn("anabranch", "x");
    let own = own.split(" user=").next().expect("the host").to_owned();
    let both = format!(
        "{} target_session_attrs=read-write",
        hosts([standby, &node.server])
    );
    node.daemon.edit_config(|text| {
        assert!(text.contains(&own), "{text}");
        text.replace(&own, &both)
    });
    node.daemon.start();
}

/// Another server than the node's takes writes, on this timeline, and the daemon says so.
async fn two_are_noticed(cluster: &Cluster, timeline: u32) {
    let said = format!("takes writes on timeline {timeline}");
    until("the other server is noticed", async || {
        let alarms = cluster.status_or_null(0).await["alarms"].to_string();
        alarms.contains("two_primaries") && alarms.contains(&said)
    })
    .await;
}

/// The old primary runs beside the promoted one, which it does not know, and the node stays where it is.
async fn the_old_one_is_left_alone(cluster: &mut Cluster, old: &mut Postgres) {
    two_are_noticed(cluster, 1).await;
    old.admin()
        .await
        .run("create table nobody_reads_it (id int)")
        .await;
    cluster.run(0, "update item set v = 'stays' where id = 5").await;
    cluster.run(1, "update item set v = 'arrives' where id = 6").await;
    cluster.converge().await;
    // Also by a daemon that knows of before only what is in its folder.
    cluster.nodes[0].daemon.kill();
    cluster.nodes[0].daemon.start();
    cluster
        .run(0, "update item set v = 'stays again' where id = 5")
        .await;
    cluster.converge().await;
    // And when the right one is down, it is not taken for it.
    cluster.nodes[0].daemon.stop();
    cluster.nodes[0].server.stop();
    refuses(cluster, 0, "takes writes is of before");
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let said = anabranch_refuses(&["heal", "--config", &config]).await;
    assert!(said.contains("takes writes is of before"), "{said}");
    cluster.nodes[0].server.start().await;
    old.kill();
    cluster.nodes[0].daemon.start();
    cluster
        .run(1, "update item set v = 'arrives again' where id = 6")
        .await;
    cluster.converge().await;
}

/// The server is gone, and its standby, which has the slot and lacks nothing, is promoted.
async fn a_promoted_standby_is_found(is_frozen: bool) {
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
    name_both(&mut cluster, &standby);
    let there = standby.admin().await;
    until("the standby has the slot", async || {
        // The slot must move on past where the standby's copy of it begins.
        cluster.run(0, "update item set v = 'base' where id = 6").await;
        admin.run("select pg_log_standby_snapshot()").await;
        let synced = "select count(*) from pg_replication_slots where slot_name = 'anabranch' and synced and not temporary";
        there.number(synced).await == 1
    })
    .await;
    // From here on nothing is decoded that the standby lacks.
    cluster.nodes[0]
        .server
        .set_conf(&["synchronized_standby_slots = 'standby'"]);
    // What is written after this is not decoded before the setting is read.
    cluster.nodes[0].server.reload().await;
    cluster.run(0, "update item set v = 'n1' where id = 1").await;
    cluster.run(1, "update item set v = 'n2' where id = 2").await;
    cluster.converge().await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let said = anabranch(&["doctor", "--config", &config]).await;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("takes writes"), "{said}");

    let daemon = cluster.nodes[0].daemon.pid();
    if is_frozen {
        cluster.nodes[0].server.freeze(true);
    } else {
        cluster.nodes[0].server.kill();
    }
    there.run("select pg_promote()").await;
    let mut old = std::mem::replace(&mut cluster.nodes[0].server, standby);
    cluster
        .run(0, "update item set v = 'promoted' where id in (1, 3)")
        .await;
    cluster
        .run(1, "update item set v = 'n2 later' where id = 4")
        .await;
    if is_frozen {
        let said = "another one was promoted";
        until("the silent server is given up", async || {
            cluster.nodes[0].daemon.log().contains(said)
        })
        .await;
    }
    cluster.converge().await;
    assert_eq!(
        cluster.nodes[0].daemon.pid(),
        daemon,
        "the daemon went on by itself"
    );
    cluster
        .expect(ROWS, "1=promoted 2=n2 3=promoted 4=n2 later 5=base 6=base")
        .await;
    if is_frozen {
        old.freeze(false);
    } else {
        old.start().await;
    }
    the_old_one_is_left_alone(&mut cluster, &mut old).await;
    cluster
        .expect(
            ROWS,
            "1=promoted 2=n2 3=promoted 4=n2 later 5=stays again 6=arrives again",
        )
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn a_promoted_standby_is_found_without_a_change_of_the_configuration() {
    a_promoted_standby_is_found(false).await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_server_that_went_silent_is_left_for_the_standby_that_was_promoted() {
    a_promoted_standby_is_found(true).await;
}

#[tokio::test]
async fn of_two_servers_that_take_writes_none_is_taken_until_it_is_known_which() {
    let mut cluster = Cluster::of([15, 18]).schema(ITEMS).start().await;
    base(&cluster, 0, 6).await;
    let mut standby = cluster.standby(0).await;
    name_both(&mut cluster, &standby);
    cut_off(&mut standby).await;
    cluster.run(0, "update item set v = 'tail' where id = 1").await;
    cluster.converge().await;
    horizon_passes(&cluster, 0).await;

    cluster.nodes[0].server.kill();
    standby.admin().await.run("select pg_promote()").await;
    let mut old = std::mem::replace(&mut cluster.nodes[0].server, standby);
    let status = cluster.nodes[0].daemon.wait_exit(PATIENCE).expect("it ends");
    let said = cluster.nodes[0].daemon.log();
    assert!(!status.success() && said.contains("anabranch heal"), "{said}");
    // The old one comes back before that is done.
    old.start().await;
    refuses(&mut cluster, 0, "several hosts of postgres.dsn take writes");
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let said = anabranch_refuses(&["heal", "--config", &config]).await;
    assert!(
        said.contains("several hosts of postgres.dsn take writes"),
        "{said}"
    );
    old.kill();

    healed(&mut cluster, 0, &[]).await;
    cluster.run(1, "update item set v = 'n2' where id = 2").await;
    cluster.converge().await;
    cluster
        .expect(ROWS, "1=tail 2=n2 3=base 4=base 5=base 6=base")
        .await;
    old.start().await;
    the_old_one_is_left_alone(&mut cluster, &mut old).await;
    cluster
        .expect(ROWS, "1=tail 2=n2 3=base 4=base 5=stays again 6=arrives again")
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_server_with_too_many_connections_is_not_left_for_one_that_was_promoted() {
    let mut cluster = Cluster::of([15, 18]).schema(ITEMS).start().await;
    base(&cluster, 0, 6).await;
    let standby = cluster.standby(0).await;
    name_both(&mut cluster, &standby);
    cluster.converge().await;
    let writer = cluster.session(0).await;
    let mut crowd = Vec::new();
    standby.admin().await.run("select pg_promote()").await;
    // Longer than three looks; whatever a session gives back is taken at once.
    for _ in 0..100 {
        while let Ok(session) = cluster.nodes[0].server.try_session("app", DATABASE).await {
            crowd.push(session);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    two_are_noticed(&cluster, 2).await;
    writer.run("update item set v = 'n1' where id = 1").await;
    drop(crowd);
    until("there is room again", async || {
        let session = cluster.nodes[0].server.try_session("app", DATABASE).await;
        session.is_ok()
    })
    .await;
    cluster.run(1, "update item set v = 'n2' where id = 2").await;
    cluster.converge().await;
    cluster
        .expect(ROWS, "1=n1 2=n2 3=base 4=base 5=base 6=base")
        .await;
    let log = cluster.nodes[0].daemon.log();
    assert!(!log.contains("another one was promoted"), "{log}");
}
