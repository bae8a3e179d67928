//! Rows that differ although nothing is on its way: somebody wrote past the replication.

use anabranch_tests::Cluster;
use anabranch_tests::wait::{PATIENCE, until, until_ok};

const ITEMS: &str = "create table item (id int primary key, v text)";

/// A superuser's transaction that passes for the daemon's own, which is not sent.
async fn write_past_the_replication(cluster: &Cluster, node: usize, sql: &str) {
    let admin = cluster.admin(node).await;
    admin
        .run(&format!(
            "begin; update anabranch.progress set lsn = lsn; {sql}; commit"
        ))
        .await;
}

/// The drift alarm of node 1, once it counts `rows`.
async fn alarm_of(cluster: &Cluster, rows: u64) -> String {
    let counted = format!("{rows} row(s) since the start");
    let what = format!("{rows} drifted row(s) are counted and alarmed");
    until_ok(&what, PATIENCE, async || {
        let status = cluster.status(1).await;
        let alarms = status["alarms"].as_array().expect("alarms").clone();
        let texts = alarms.iter().filter_map(|alarm| alarm["text"].as_str());
        let mut drift =
            texts.filter(|text| text.contains("not as the stream says") && text.contains(&counted));
        match drift.next() {
            Some(alarm) if status["apply"]["drifted_rows"] == rows => Ok(alarm.to_owned()),
            _ => Err(status),
        }
    })
    .await
}

#[tokio::test]
async fn rows_that_are_not_as_the_stream_says_are_alarmed_and_end_equal() {
    let cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    cluster
        .run(
            0,
            "insert into item select i, 'base' from generate_series(1, 5) i",
        )
        .await;
    cluster.converge().await;
    write_past_the_replication(
        &cluster,
        1,
        "delete from item where id in (1, 2); insert into item values (9, 'planted')",
    )
    .await;
    cluster.run(0, "update item set v = 'seen' where id = 1").await;
    cluster.arrive_among(&[0, 1], PATIENCE).await;
    let alarm = alarm_of(&cluster, 1).await;
    assert!(
        alarm.contains("public.item") && alarm.contains("UPDATE found no row"),
        "{alarm}"
    );

    cluster.run(0, "delete from item where id = 2").await;
    cluster.arrive_among(&[0, 1], PATIENCE).await;
    let alarm = alarm_of(&cluster, 2).await;
    assert!(alarm.contains("DELETE found no row"), "{alarm}");

    cluster
        .run(0, "insert into item values (9, 'the real one')")
        .await;
    cluster.arrive_among(&[0, 1], PATIENCE).await;
    let alarm = alarm_of(&cluster, 3).await;
    assert!(alarm.contains("INSERT found a row"), "{alarm}");

    let rows = "select string_agg(id || '=' || v, ' ' order by id) from item";
    cluster
        .expect(rows, "1=seen 3=base 4=base 5=base 9=the real one")
        .await;
    // No node's write lost; but the planted row is nowhere else.
    let lines = cluster.conflicts_at(1).await;
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert_eq!(lines[0].kind(), "insert_exists");
    assert_eq!(lines[0].local()["v"], "planted");
    assert_eq!(lines[0].remote()["v"], "the real one");
    assert_eq!(cluster.conflicts_at(0).await.len(), 0);
}

#[tokio::test]
async fn what_drifted_is_told_until_the_daemon_is_stopped() {
    let cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    cluster.run(0, "insert into item values (1, 'base')").await;
    cluster.converge().await;
    write_past_the_replication(&cluster, 1, "delete from item where id = 1").await;
    cluster.run(0, "update item set v = 'seen' where id = 1").await;
    cluster.arrive_among(&[0, 1], PATIENCE).await;
    let alarm = alarm_of(&cluster, 1).await;
    let before = cluster.status(1).await;
    // Its stages begin anew, in the same process.
    let decoder =
        "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = 'anabranch'";
    cluster.admin(1).await.run(decoder).await;
    until("the stages run again", async || {
        let node = cluster.status_or_null(1).await["node"].clone();
        node.is_object() && node["started_at"] != before["node"]["started_at"]
    })
    .await;
    let after = cluster.status(1).await;
    assert_eq!(after["node"]["boot_id"], before["node"]["boot_id"]);
    assert_eq!(alarm_of(&cluster, 1).await, alarm, "{after:#}");
}
