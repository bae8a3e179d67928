//! What a commit may wait for: our own journal, or the peers.

use std::time::Duration;

use anabranch_tests::wait::until;
use anabranch_tests::{Cluster, Session};

/// Commits at every node wait for its daemon, as far as `synchronous_commit` asks for it.
async fn waiting_cluster<const N: usize>(versions: [u32; N], names: &str) -> Cluster {
    waiting_cluster_under(versions, names, "").await
}

async fn waiting_cluster_under<const N: usize>(versions: [u32; N], names: &str, policy: &str) -> Cluster {
    let mut cluster = Cluster::of(versions)
        .schema("create table item (id int primary key, v text, n int not null default 0)")
        .policy(policy)
        .start()
        .await;
    cluster.run(0, "insert into item values (1, 'first')").await;
    cluster.converge().await;
    for node in cluster.all() {
        cluster.nodes[node]
            .server
            .set_conf(&[&format!("synchronous_standby_names = '{names}'")]);
        cluster.admin(node).await.run("select pg_reload_conf()").await;
        // Walsenders take part once they have read the setting themselves.
        cluster
            .wait_value(
                node,
                "select count(*) from pg_stat_replication where application_name = 'anabranch:decode' \
                 and sync_state in ('sync', 'quorum')",
                "1",
            )
            .await;
    }
    cluster
}

async fn patient_session(cluster: &Cluster, node: usize, level: &str) -> Session {
    let session = cluster.session(node).await;
    session.run(&format!("set synchronous_commit = {level}")).await;
    session
}

#[tokio::test]
async fn a_commit_that_asks_for_it_returns_when_a_majority_has_applied_it() {
    let cluster = waiting_cluster([15, 18], "\"anabranch:decode\"").await;
    for node in cluster.all() {
        let session = patient_session(&cluster, node, "remote_apply").await;
        for round in 0..10 {
            let v = format!("{node}.{round}");
            session
                .run(&format!("update item set v = '{v}' where id = 1"))
                .await;
            // Of two a majority is both.
            cluster.expect("select v from item where id = 1", &v).await;
        }
    }
    cluster.converge().await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn a_commit_that_waits_for_the_journal_needs_no_peer() {
    let mut cluster = waiting_cluster([15, 15], "\"anabranch:decode\"").await;
    cluster.nodes[1].daemon.stop();
    let session = patient_session(&cluster, 0, "on").await;
    session.run("update item set v = 'journalled' where id = 1").await;
    cluster.nodes[1].daemon.start();
    cluster.converge().await;
    cluster
        .expect("select v from item where id = 1", "journalled")
        .await;
}

/// Both nodes write one row at once, again and again, and each commit waits for its daemon with the row locked.
async fn meet(cluster: &Cluster, levels: [&str; 2], statements: &'static [&'static str]) {
    let mut writers = Vec::new();
    for node in cluster.all() {
        let session = patient_session(cluster, node, levels[node]).await;
        writers.push(tokio::spawn(async move {
            for round in 0..40 {
                session.run(statements[(round + node) % statements.len()]).await;
            }
        }));
    }
    for writer in writers {
        tokio::time::timeout(Duration::from_secs(150), writer)
            .await
            .expect("the nodes wait for each other")
            .expect("the writer succeeds");
    }
    cluster.converge().await;
    for node in cluster.all() {
        assert!(
            !cluster.conflicts_at(node).await.is_empty(),
            "the writers never met, so this test showed nothing"
        );
    }
}

#[tokio::test]
async fn nodes_whose_commits_wait_for_each_other_on_one_row_all_go_on() {
    let cluster = waiting_cluster([15, 18], "\"anabranch:decode\"").await;
    meet(
        &cluster,
        ["remote_apply", "remote_apply"],
        &["update item set n = n + 1 where id = 1"],
    )
    .await;
}

#[tokio::test]
async fn deletes_whose_commits_wait_hold_up_nothing_that_they_wait_for() {
    let cluster = waiting_cluster([15, 18], "\"anabranch:decode\"").await;
    for levels in [
        ["on", "on"],
        ["on", "remote_apply"],
        ["remote_apply", "remote_apply"],
    ] {
        meet(
            &cluster,
            levels,
            &[
                "insert into item values (1, 'again') on conflict (id) do update set n = item.n + 1",
                "delete from item where id = 1",
                "insert into item values (1, 'once more') on conflict (id) do nothing",
            ],
        )
        .await;
    }
}

#[tokio::test]
async fn commits_that_wait_for_each_other_and_lose_to_earlier_ones_all_go_on() {
    const POLICY: &str = "[[table]]\nname = \"public.item\"\npolicy = \"first_update_wins\"";
    let cluster = waiting_cluster_under([15, 18], "\"anabranch:decode\"", POLICY).await;
    for levels in [["on", "remote_apply"], ["remote_apply", "remote_apply"]] {
        meet(
            &cluster,
            levels,
            &[
                "insert into item values (1, 'again') on conflict (id) do update set n = item.n + 1",
                "delete from item where id = 1",
                "update item set n = n + 1 where id = 1",
            ],
        )
        .await;
    }
}

/// The first of two concurrent writes stays, and a remote transaction leaves it alone. While that transaction waits for
/// another row, the first one is deleted by a commit that waits, later than the remote write: so that wins now.
#[tokio::test]
async fn what_lost_to_a_write_that_a_waiting_commit_then_overwrites_is_written_after_all() {
    const POLICY: &str = "[[table]]\nname = \"public.item\"\npolicy = \"first_update_wins\"";
    let cluster = waiting_cluster_under([15, 18], "\"anabranch:decode\"", POLICY).await;
    cluster.run(0, "insert into item values (2, 'base')").await;
    cluster.converge().await;
    cluster.isolate_all();
    let here = patient_session(&cluster, 1, "local").await;
    here.run("update item set v = 'earliest' where id = 1").await;
    let there = patient_session(&cluster, 0, "local").await;
    there
        .run("begin; update item set v = 'remote' where id = 1; update item set v = 'remote' where id = 2; commit")
        .await;
    here.run("begin; select from item where id = 2 for update").await;
    cluster.heal();
    cluster
        .wait_value(
            1,
            "select count(*) > 0 from pg_stat_activity where usename = 'anabranch' and wait_event_type = 'Lock'",
            "t",
        )
        .await;
    // It returns once its conflict is recorded, and that is before the remote transaction is applied.
    let deleting = patient_session(&cluster, 1, "on").await;
    deleting.run("delete from item where id = 1").await;
    here.run("commit").await;
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(id || '=' || v, ' ' order by id) from item",
            "1=remote 2=remote",
        )
        .await;
}

#[tokio::test]
async fn what_answers_a_commit_that_waits_is_not_seen_before_it() {
    // The second standby never comes: commits that wait for it are sent to peers, but stay invisible here.
    let mut cluster = waiting_cluster([15, 18], "FIRST 2 (\"anabranch:decode\", \"never\")").await;
    let admin = cluster.admin(0).await;
    let waiting = patient_session(&cluster, 0, "on").await;
    let commit = tokio::spawn(async move { waiting.run("insert into item values (2, 'question')").await });
    cluster
        .wait_value(1, "select v from item where id = 2", "question")
        .await;
    let answering = patient_session(&cluster, 1, "local").await;
    answering.run("insert into item values (3, 'answer')").await;
    for _ in 0..30 {
        let seen = admin.column("select v from item where id > 1 order by id").await;
        assert!(
            seen.first().is_none_or(|first| first == "question"),
            "the answer is visible before its question: {seen:?}"
        );
        assert!(seen.is_empty(), "the commit does not wait: {seen:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for node in cluster.all() {
        cluster.nodes[node]
            .server
            .set_conf(&["synchronous_standby_names = ''"]);
        cluster.admin(node).await.run("select pg_reload_conf()").await;
    }
    commit.await.expect("the commit returns");
    until("both are seen", async || {
        admin.number("select count(*) from item where id > 1").await == 2
    })
    .await;
    cluster.converge().await;
    cluster.expect_no_conflict().await;
}
