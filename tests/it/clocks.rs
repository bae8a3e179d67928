//! Clocks that are wrong: a little, a lot, and backwards.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anabranch_tests::Cluster;
use anabranch_tests::wait::{PATIENCE, until};

const DAY_S: i64 = 86_400;
const ITEMS: &str = "create table item (id int primary key, v text)";

/// Whoever writes later, having seen the other's write, wins, whatever the clocks say.
async fn later_writes_win_with_a_clock(error_s: i64) {
    let cluster = Cluster::of([15, 18, 15])
        .schema(ITEMS)
        .clock(0, error_s)
        .start()
        .await;
    cluster
        .run(0, "insert into item values (1, 'by the wrong clock')")
        .await;
    cluster.converge().await;
    for round in 0..6 {
        let node = [1, 0, 2][round % 3];
        cluster
            .run(node, &format!("update item set v = 'round {round}'"))
            .await;
        cluster.converge().await;
        cluster
            .expect("select v from item", &format!("round {round}"))
            .await;
    }
    cluster.run(1, "delete from item").await;
    cluster.converge().await;
    cluster.run(0, "insert into item values (1, 'again')").await;
    cluster.converge().await;
    cluster.expect("select v from item", "again").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn later_writes_win_over_a_node_five_seconds_ahead() {
    later_writes_win_with_a_clock(5).await;
}

#[tokio::test]
async fn later_writes_win_over_a_node_five_seconds_behind() {
    later_writes_win_with_a_clock(-5).await;
}

#[tokio::test]
async fn later_writes_win_after_a_clock_was_set_back() {
    let cluster = Cluster::of([15, 15]).schema(ITEMS).clock(0, 0).start().await;
    cluster.run(0, "insert into item values (1, 'before')").await;
    cluster.converge().await;
    cluster.nodes[0].server.set_clock(-3_600);
    cluster
        .run(0, "update item set v = 'an hour earlier by the clock'")
        .await;
    cluster.converge().await;
    cluster
        .expect("select v from item", "an hour earlier by the clock")
        .await;
    cluster.run(1, "update item set v = 'seen and changed'").await;
    cluster.converge().await;
    cluster.expect("select v from item", "seen and changed").await;
    cluster.expect_no_conflict().await;
}

/// Microseconds since 1970 of the highest stamp in a node's conflict log and progress table.
async fn highest_stamp_us(cluster: &Cluster, node: usize) -> i64 {
    let highest = cluster
        .value(node, "select coalesce(max(encode(substring(stamp from 1 for 4), 'hex')), '00000000') from anabranch.progress")
        .await;
    i64::from_str_radix(&highest, 16).expect("hexadecimal seconds") * 1_000_000
}

/// No stamp at these nodes is far ahead of the time.
async fn assert_not_ahead(cluster: &Cluster, nodes: &[usize]) {
    for &node in nodes {
        let ahead = highest_stamp_us(cluster, node).await - now_us();
        assert!(
            ahead < 10 * 60 * 1_000_000,
            "n{} holds stamps {} s ahead",
            node + 1,
            ahead / 1_000_000
        );
    }
}

fn now_us() -> i64 {
    i64::try_from(
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("after 1970")
            .as_micros(),
    )
    .expect("before 294246")
}

#[tokio::test]
async fn a_clock_years_ahead_is_clamped_and_alarmed_and_harms_nobody() {
    // About sixty years.
    let cluster = Cluster::of([15, 15, 15])
        .schema(ITEMS)
        .clock(0, 22_000 * DAY_S)
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into item values (1, 'from the future'), (2, 'from the future')",
        )
        .await;
    cluster.converge_among(&[0, 1, 2], PATIENCE).await;
    assert_not_ahead(&cluster, &[1, 2]).await;
    // The others are as they were: they may overwrite it, and agree.
    cluster.run(1, "update item set v = 'today' where id = 1").await;
    cluster.converge().await;
    cluster.expect("select v from item where id = 1", "today").await;
    until("the wrong clock is alarmed", async || {
        let log = cluster.nodes[0].daemon.log().to_lowercase();
        let status = cluster.status(0).await.to_string().to_lowercase();
        // An alarm is logged as an error, and stands in the status until it is over.
        log.lines()
            .any(|line| line.contains("error") && line.contains("clock"))
            && status.contains("clock")
    })
    .await;

    // Apart, the wrong clock wins for at most the allowed drift, not for sixty years.
    cluster.isolate_all();
    cluster
        .run(0, "update item set v = 'apart, from the future' where id = 2")
        .await;
    cluster
        .run(1, "update item set v = 'apart, today' where id = 2")
        .await;
    cluster.heal();
    cluster.converge().await;
    cluster.conflicts().await;
    // Whose write came later is not to be believed, and the log says so: at all nodes, with whose clock it was.
    for node in cluster.all() {
        let lines = cluster.conflicts_at(node).await;
        assert_eq!(lines.len(), 1, "n{}: {lines:#?}", node + 1);
        assert_eq!(lines[0].kind(), "clock_drift", "n{}: {lines:#?}", node + 1);
        let message = lines[0].0["error"]["message"].as_str().unwrap_or("");
        assert!(
            message.contains("update_origin_differs")
                && message.contains("the write of node 1 counts as")
                && message.contains("earlier than its server says"),
            "n{}: {message}",
            node + 1
        );
    }
    assert_not_ahead(&cluster, &[1, 2]).await;
}

#[tokio::test]
async fn a_clock_that_becomes_right_again_leaves_no_trace() {
    let cluster = Cluster::of([15, 15])
        .schema(ITEMS)
        .config("[clock]\nmax_drift_ms = 10000\n")
        .clock(0, 400 * DAY_S)
        .start()
        .await;
    cluster.run(0, "insert into item values (1, 'ahead')").await;
    cluster.converge().await;
    cluster.nodes[0].server.set_clock(0);
    cluster.run(0, "update item set v = 'right again'").await;
    cluster.converge().await;
    cluster.expect("select v from item", "right again").await;
    // Stamps were never more than the allowed drift ahead, so after a while the clock counts again: a later
    // write apart from an earlier one wins by the clock.
    let drift = Duration::from_secs(15);
    tokio::time::sleep(drift).await;
    cluster.isolate_all();
    cluster.run(0, "update item set v = 'earlier'").await;
    cluster.run(1, "update item set v = 'later'").await;
    cluster.heal();
    cluster.converge().await;
    cluster.expect("select v from item", "later").await;
}

#[tokio::test]
async fn a_machine_whose_clock_jumps_by_years_and_back_holds_nobody_up() {
    let cluster = Cluster::of([15, 15, 15]).schema(ITEMS).clocks().start().await;
    cluster.run(0, "insert into item values (1, 'before')").await;
    cluster.converge().await;
    // Server and daemon alike, as when the machine's clock is set; longer than the peers' clocks are remembered for.
    cluster.nodes[0].server.set_clock(400 * DAY_S);
    for round in 0..40 {
        cluster
            .run(0, &format!("update item set v = 'by the wrong clock {round}'"))
            .await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    cluster.nodes[0].server.set_clock(0);
    assert_not_ahead(&cluster, &[1, 2]).await;
    cluster.converge().await;
    cluster.run(1, "update item set v = 'seen and changed'").await;
    cluster.converge().await;
    cluster.expect("select v from item", "seen and changed").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn a_machine_that_comes_up_years_ahead_stamps_nothing_by_its_clock() {
    let mut cluster = Cluster::of([15, 15, 15]).schema(ITEMS).clocks().start().await;
    cluster.run(0, "insert into item values (1, 'before')").await;
    cluster.converge().await;
    cluster.nodes[0].daemon.kill();
    cluster.nodes[0].server.set_clock(400 * DAY_S);
    cluster.nodes[0].daemon.start();
    // The first witness of the daemon's new life is somewhere among them.
    for round in 0..30 {
        cluster
            .run(0, &format!("update item set v = 'by the wrong clock {round}'"))
            .await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.converge().await;
    assert_not_ahead(&cluster, &[1, 2]).await;
}

/// PostgreSQL's timeouts go by the wall clock: a deadlock of a user with the applier would last as long as the clock was
/// set back. The daemon ends it; and one that is started in its place does not wait for its session either.
async fn a_deadlock_while_the_clock_is_set_back(kill_the_daemon: bool) {
    let mut cluster = Cluster::of([15, 15, 15])
        .schema(ITEMS)
        // Long, so that the clock is set back while the applier waits, and not between two waits.
        .config("[apply]\nlock_timeout_ms = 5000\n")
        .clock(1, 0)
        .start()
        .await;
    cluster
        .run(0, "insert into item values (1, 'before'), (2, 'before')")
        .await;
    cluster.converge().await;
    let user = cluster.admin(1).await;
    user.run("set deadlock_timeout = '1h'").await;
    user.run("begin; update item set v = 'by the user' where id = 2")
        .await;
    cluster.run(0, "update item set v = 'from afar'").await;
    let admin = cluster.admin(1).await;
    until("the applier waits for row 2", async || {
        let waits = "select count(*) from pg_stat_activity where application_name = 'anabranch:apply' and wait_event_type = 'Lock'";
        admin.number(waits).await == 1
    })
    .await;
    cluster.nodes[1].server.set_clock(-3_600);
    let now = admin
        .number("select extract(epoch from clock_timestamp())::bigint")
        .await;
    assert!(now < now_us() / 1_000_000 - 3_000, "the clock is not set");
    if kill_the_daemon {
        cluster.nodes[1].daemon.kill();
        cluster.nodes[1].daemon.start();
    }
    // Waits for the applier, which holds row 1: a deadlock, unless the applier lets go.
    user.run("update item set v = 'by the user' where id = 1; commit")
        .await;
    cluster.converge().await;
    let log = cluster.nodes[1].daemon.log();
    let said = if kill_the_daemon {
        "ended the apply session"
    } else {
        "longer than its lock_timeout"
    };
    assert!(log.contains(said), "the daemon does not say what it did");
}

#[tokio::test]
async fn a_deadlock_while_the_clock_is_set_back_ends() {
    a_deadlock_while_the_clock_is_set_back(false).await;
}

#[tokio::test]
async fn a_daemon_killed_in_a_deadlock_while_the_clock_is_set_back_is_succeeded() {
    a_deadlock_while_the_clock_is_set_back(true).await;
}
