//! A publication that somebody drops, makes anew, or takes something out of: what is written meanwhile is decoded as nothing, and
//! must not be lost in silence.

use anabranch_tests::Cluster;
use anabranch_tests::cluster::initialise;
use anabranch_tests::daemon::anabranch;
use anabranch_tests::wait::{PATIENCE, until};
use serde_json::Value;

use crate::heals::{ITEMS, ROWS, base, heal, healed, horizon_passes, keys, record, run_heal};

/// When the publication goes.
#[derive(Clone, Copy, PartialEq)]
enum While {
    Running,
    Stopped,
    /// And nothing is remembered of it: the decoder alone can tell.
    StoppedAndForgotten,
}

/// The alarm of node 0 about its publication; empty where it does not stand.
async fn alarm(cluster: &Cluster) -> String {
    let status = cluster.status_or_null(0).await;
    let alarms = status["alarms"].as_array().cloned().unwrap_or_default();
    let texts = alarms.iter().filter_map(|alarm| alarm["text"].as_str());
    let found = texts.filter(|text| text.contains("rows that were written here may not have been sent"));
    found.map(str::to_owned).collect()
}

async fn alarm_says(cluster: &Cluster, words: &[&str]) {
    until(&format!("the alarm says {words:?}"), async || {
        let text = alarm(cluster).await;
        words.iter().all(|word| text.contains(word))
    })
    .await;
}

async fn alarm_is_over(cluster: &Cluster) {
    until("the alarm is over", async || {
        cluster.status_or_null(0).await["alarms"].is_array() && alarm(cluster).await.is_empty()
    })
    .await;
}

/// `anabranch VERB ..` at node 0, which compares: exit code and report.
async fn compare(cluster: &Cluster, args: &[&str]) -> (i32, Value) {
    let config = cluster.nodes[0].daemon.config_arg();
    let (verb, rest) = args.split_first().unwrap();
    let all = [&[*verb, "--config", config, "--output", "json"], rest].concat();
    let output = anabranch(&all).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let report = said.lines().last().unwrap_or_default();
    let report = serde_json::from_str(report).unwrap_or_else(|error| panic!("no report ({error}): {said}"));
    (output.status.code().unwrap(), report)
}

/// Node 0's daemon ends, and says this.
async fn ends(cluster: &mut Cluster, words: &[&str]) {
    let status = cluster.nodes[0].daemon.wait_exit(PATIENCE).expect("it ends");
    assert!(!status.success());
    let log = cluster.nodes[0].daemon.log();
    let last = log.lines().last().unwrap_or_default();
    for word in words {
        assert!(last.contains(word), "{word}: {last}");
    }
}

/// What is written is not sent; the daemon ends, does not start again whatever is made of the publication, and `heal` sends it.
async fn a_gap_is_healed(versions: [u32; 2], when: While, break_it: &str) {
    let mut cluster = Cluster::of(versions).schema(ITEMS).start().await;
    base(&cluster, 0, 8).await;
    if when != While::Running {
        cluster.nodes[0].daemon.stop();
    }
    cluster.admin(0).await.run(break_it).await;
    cluster.run(0, "insert into item values (101, 'gap')").await;
    cluster
        .run(0, "update item set v = 'gap' where id in (1, 2)")
        .await;
    cluster.run(0, "delete from item where id = 3").await;
    cluster
        .run(1, "update item set v = 'n2' where id in (2, 4)")
        .await;
    if when == While::Running {
        ends(
            &mut cluster,
            &["publication anabranch", "anabranch init", "anabranch heal"],
        )
        .await;
        let (code, refused) = heal_output(&cluster).await;
        assert!(code == 1 && refused.contains("anabranch init"), "{refused}");
    }
    initialise(&cluster.nodes[0]).await;
    cluster.run(0, "update item set v = 'after' where id = 5").await;
    if when == While::StoppedAndForgotten {
        let file = cluster.nodes[0].data_dir.join("publication.json");
        std::fs::remove_file(file).unwrap();
        cluster.nodes[0].daemon.start();
        ends(
            &mut cluster,
            &["did not exist at the place being decoded", "anabranch heal"],
        )
        .await;
    }
    cluster.nodes[0].daemon.start();
    ends(&mut cluster, &["publication anabranch", "anabranch heal"]).await;

    let report = healed(&mut cluster, 0, &[]).await;
    assert_eq!(
        keys(&record(&report, "written again")),
        [1, 2, 5, 101],
        "{report:#}"
    );
    assert_eq!(keys(&record(&report, "brought back")), [3]);
    cluster.run(0, "update item set v = 'on' where id = 6").await;
    cluster.run(1, "update item set v = 'on' where id = 7").await;
    cluster.converge().await;
    cluster
        .expect(ROWS, "1=gap 2=n2 3=base 4=n2 5=after 6=on 7=on 8=base 101=gap")
        .await;
    // And over another start.
    cluster.nodes[0].daemon.stop();
    cluster.nodes[0].daemon.start();
    cluster.run(0, "update item set v = 'still' where id = 8").await;
    cluster.converge().await;
    assert_eq!(alarm(&cluster).await, "");
}

/// Exit code of `heal`, and all that it said.
async fn heal_output(cluster: &Cluster) -> (i32, String) {
    let output = run_heal(cluster.nodes[0].daemon.config_arg(), &[]).await;
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap(), said)
}

const DROP: &str = "drop publication anabranch";

#[tokio::test]
async fn a_publication_dropped_under_a_daemon_ends_it_and_is_healed_on_15() {
    a_gap_is_healed([15, 18], While::Running, DROP).await;
}

#[tokio::test]
async fn a_publication_dropped_under_a_daemon_ends_it_and_is_healed_on_18() {
    a_gap_is_healed([18, 15], While::Running, DROP).await;
}

#[tokio::test]
async fn a_publication_dropped_while_the_daemon_was_off_is_healed() {
    a_gap_is_healed([18, 15], While::Stopped, DROP).await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_decoder_of_15_to_18_stops_where_there_was_no_publication() {
    for version in [15, 16, 17, 18] {
        a_gap_is_healed([version, 15], While::StoppedAndForgotten, DROP).await;
    }
}

/// Some of what is written after this may be sent still, until the daemon has noticed; all of it is in the end.
async fn noticed_and_healed(versions: [u32; 2], break_it: &str) {
    let mut cluster = Cluster::of(versions).schema(ITEMS).start().await;
    base(&cluster, 0, 8).await;
    cluster.admin(0).await.run(break_it).await;
    cluster.run(0, "insert into item values (101, 'gap')").await;
    cluster.run(0, "update item set v = 'gap' where id = 1").await;
    cluster.run(1, "update item set v = 'n2' where id = 4").await;
    ends(
        &mut cluster,
        &["publication anabranch", "anabranch init", "anabranch heal"],
    )
    .await;
    cluster.run(0, "update item set v = 'later' where id = 2").await;
    // Nothing shows any more.
    initialise(&cluster.nodes[0]).await;
    cluster.nodes[0].daemon.start();
    ends(&mut cluster, &["publication anabranch", "anabranch heal"]).await;
    healed(&mut cluster, 0, &[]).await;
    cluster.run(0, "update item set v = 'on' where id = 6").await;
    cluster.run(1, "update item set v = 'on' where id = 7").await;
    cluster.converge().await;
    cluster
        .expect(ROWS, "1=gap 2=later 3=base 4=n2 5=base 6=on 7=on 8=base 101=gap")
        .await;
}

#[tokio::test]
async fn operations_that_are_left_out_end_the_daemon_and_are_healed() {
    noticed_and_healed([15, 18], "alter publication anabranch set (publish = 'insert')").await;
}

#[tokio::test]
async fn a_publication_via_the_root_ends_the_daemon_and_is_healed() {
    let via = "alter publication anabranch set (publish_via_partition_root = true)";
    noticed_and_healed([18, 15], via).await;
}

#[tokio::test]
async fn a_publication_without_the_daemons_own_table_ends_it_and_is_healed() {
    let away = "alter publication anabranch drop table anabranch.progress";
    noticed_and_healed([18, 15], away).await;
}

/// Rows that node 0 alone has are unsent until they are repaired; the alarm stands until then.
async fn mended_by_repair(cluster: &mut Cluster, rows: &str) {
    // The alarm outlives the daemon.
    cluster.nodes[0].daemon.stop();
    cluster.nodes[0].daemon.start();
    alarm_says(
        cluster,
        &["public.item", "anabranch verify public.item", "--from n1"],
    )
    .await;
    let (code, report) = compare(cluster, &["verify"]).await;
    assert_eq!(code, 1, "{report:#}");
    alarm_says(cluster, &["public.item"]).await;
    let (code, report) = compare(cluster, &["repair", "--from", "n1", "public.item"]).await;
    assert_eq!(code, 0, "{report:#}");
    let (code, report) = compare(cluster, &["verify"]).await;
    assert_eq!(code, 0, "{report:#}");
    alarm_is_over(cluster).await;
    cluster.run(0, "update item set v = 'on' where id = 6").await;
    cluster.run(1, "update item set v = 'on' where id = 7").await;
    cluster.converge().await;
    cluster.expect(ROWS, rows).await;
}

async fn a_table_taken_out(versions: [u32; 2]) {
    let mut cluster = Cluster::of(versions).schema(ITEMS).start().await;
    base(&cluster, 0, 8).await;
    assert_eq!(alarm(&cluster).await, "");
    cluster
        .admin(0)
        .await
        .run("alter publication anabranch drop table item")
        .await;
    cluster.run(0, "insert into item values (101, 'unsent')").await;
    cluster
        .run(0, "update item set v = 'unsent' where id in (1, 2)")
        .await;
    cluster.run(0, "delete from item where id = 3").await;
    // What others write is applied all the same.
    cluster
        .run(1, "update item set v = 'n2' where id in (2, 4)")
        .await;
    cluster
        .wait_value(0, "select v from item where id = 2", "n2")
        .await;
    alarm_says(
        &cluster,
        &[
            "public.item",
            "is not published",
            "anabranch init",
            "tables remove",
        ],
    )
    .await;
    initialise(&cluster.nodes[0]).await;
    alarm_says(&cluster, &["public.item", "anabranch verify"]).await;
    mended_by_repair(
        &mut cluster,
        "1=unsent 2=n2 4=n2 5=base 6=on 7=on 8=base 101=unsent",
    )
    .await;
}

#[tokio::test]
async fn a_table_taken_out_of_the_publication_by_hand_is_alarmed_until_it_is_verified_on_15() {
    a_table_taken_out([15, 18]).await;
}

#[tokio::test]
async fn a_table_taken_out_of_the_publication_by_hand_is_alarmed_until_it_is_verified_on_18() {
    a_table_taken_out([18, 15]).await;
}

#[tokio::test]
async fn what_was_changed_and_changed_back_while_the_daemon_was_off_is_alarmed() {
    let away_and_back = [
        (
            "alter publication anabranch drop table item",
            "alter publication anabranch add table only item",
        ),
        (
            "alter publication anabranch set (publish = 'insert')",
            "alter publication anabranch set (publish = 'insert, update, delete, truncate')",
        ),
    ];
    let mut cluster = Cluster::of([15, 18]).schema(ITEMS).start().await;
    base(&cluster, 0, 8).await;
    for (round, (away, back)) in away_and_back.into_iter().enumerate() {
        horizon_passes(&cluster, 0).await;
        cluster.nodes[0].daemon.stop();
        cluster.admin(0).await.run(away).await;
        cluster
            .run(0, &format!("update item set v = 'unsent {round}' where id = 1"))
            .await;
        cluster.admin(0).await.run(back).await;
        cluster.nodes[0].daemon.start();
        alarm_says(&cluster, &["public.item"]).await;
        let expected = format!("1=unsent {round} 2=base 3=base 4=base 5=base 6=on 7=on 8=base");
        mended_by_repair(&mut cluster, &expected).await;
    }
}

#[tokio::test]
async fn a_comparison_from_before_an_old_transaction_has_ended_does_not_end_the_alarm() {
    let cluster = Cluster::of([15, 18]).schema(ITEMS).start().await;
    base(&cluster, 0, 3).await;
    let admin = cluster.admin(0).await;
    let old = cluster.session(0).await;
    admin.run("alter publication anabranch drop table item").await;
    old.run("begin; update item set v = 'late' where id = 1").await;
    admin.run("alter publication anabranch add table only item").await;
    alarm_says(&cluster, &["public.item", "still runs"]).await;
    let (code, report) = compare(&cluster, &["verify", "public.item"]).await;
    assert_eq!(code, 0, "{report:#}");
    alarm_says(&cluster, &["public.item", "still runs"]).await;
    old.run("commit").await;
    alarm_says(&cluster, &["public.item", "anabranch verify"]).await;
    let (_, report) = compare(&cluster, &["repair", "--from", "n1"]).await;
    assert_eq!(report["verdict"], "equal", "{report:#}");
    alarm_is_over(&cluster).await;
    cluster.converge().await;
    cluster.expect(ROWS, "1=late 2=base 3=base").await;
}

#[tokio::test]
async fn a_heal_is_refused_while_the_publication_lacks_a_table() {
    let mut cluster = Cluster::of([18, 15]).schema(ITEMS).start().await;
    base(&cluster, 0, 3).await;
    cluster.nodes[0].daemon.stop();
    cluster.admin(0).await.run(DROP).await;
    let part = "create publication anabranch for table only anabranch.progress, only anabranch.clock, only anabranch.member, \
        only anabranch.sequence, only anabranch.ddl";
    cluster.admin(0).await.run(part).await;
    cluster.run(0, "update item set v = 'gap' where id = 1").await;
    let (code, said) = heal_output(&cluster).await;
    assert!(
        code == 1 && said.contains("is not published") && said.contains("anabranch init"),
        "{said}"
    );
    initialise(&cluster.nodes[0]).await;
    let (code, report) = heal(&cluster, 0, &["--dry-run"]).await;
    assert_eq!(code, 0, "{report:#}");
    healed(&mut cluster, 0, &[]).await;
    cluster.converge().await;
    cluster.expect(ROWS, "1=gap 2=base 3=base").await;
}
