//! What a commit may wait for: our own journal, or the peers.

use std::time::Duration;

use anabranch_tests::wait::until;
use anabranch_tests::{Builder, Cluster, Session};
use tokio::task::JoinHandle;

/// Commits at every node wait for its daemon, as far as `synchronous_commit` asks for it.
async fn waiting_cluster<const N: usize>(versions: [u32; N], names: &str) -> Cluster {
    waiting_cluster_under(versions, names, "").await
}

async fn waiting_cluster_under<const N: usize>(versions: [u32; N], names: &str, policy: &str) -> Cluster {
    let built = Cluster::of(versions).policy(policy);
    waiting(built, names).await
}

async fn waiting(built: Builder, names: &str) -> Cluster {
    let mut cluster = built
        .schema("create table item (id int primary key, v text, n int not null default 0)")
        .start()
        .await;
    cluster.run(0, "insert into item values (1, 'first')").await;
    cluster.converge().await;
    for node in cluster.all() {
        cluster.nodes[node]
            .server
            .set_conf(&[&format!("synchronous_standby_names = '{names}'")]);
        cluster.nodes[node].server.reload().await;
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
async fn a_commit_that_waits_for_a_majority_waits_on_when_the_journal_is_full() {
    let built = Cluster::of([15, 15]).config("[journal]\nmax_size_mib = 3\nsegment_mib = 1\n");
    let mut cluster = waiting(built, "\"anabranch:decode\"").await;
    cluster.nodes[1].daemon.stop();
    let session = patient_session(&cluster, 0, "remote_apply").await;
    let waiting = tokio::spawn(async move { session.run("insert into item values (2, 'waits')").await });
    cluster
        .wait_value(
            0,
            "select count(*) from pg_stat_activity where wait_event = 'SyncRep'",
            "1",
        )
        .await;
    // What does not shrink when it is packed, until the journal takes no more.
    let others = patient_session(&cluster, 0, "local").await;
    others
        .run(
            "do $$ begin for i in 10..300 loop insert into item values (i, (select string_agg(gen_random_uuid()::text, '') \
             from generate_series(1, 1000))); commit; end loop; end $$",
        )
        .await;
    until("the journal takes no more", async || {
        cluster.status(0).await["alarms"].to_string().contains("journal")
    })
    .await;
    // The daemon reports once a second while it cannot go on.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(
        !waiting.is_finished(),
        "the commit was answered as applied at a majority, and is at one node of two"
    );
    waiting.abort();
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

/// Both nodes write one row at once, again and again, and each commit waits for its daemon with the row locked; until they have met.
async fn meet(cluster: &Cluster, levels: [&str; 2], statements: &'static [&'static str]) {
    for _ in 0..10 {
        write_at_once(cluster, levels, statements).await;
        let logs =
            futures_util::future::join_all(cluster.all().into_iter().map(|node| cluster.conflicts_at(node)));
        if logs.await.iter().all(|log| !log.is_empty()) {
            return;
        }
    }
    panic!("the writers never met, so this test showed nothing");
}

async fn write_at_once(cluster: &Cluster, levels: [&str; 2], statements: &'static [&'static str]) {
    // Nobody begins before all are there, or the first could be through before the other has connected.
    let mut sessions = Vec::new();
    for node in cluster.all() {
        sessions.push(patient_session(cluster, node, levels[node]).await);
    }
    let mut writers = Vec::new();
    for (node, session) in sessions.into_iter().enumerate() {
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
        cluster.let_commits_go(node).await;
    }
    commit.await.expect("the commit returns");
    until("both are seen", async || {
        admin.number("select count(*) from item where id > 1").await == 2
    })
    .await;
    cluster.converge().await;
    cluster.expect_no_conflict().await;
}

/// How many commits of applications wait.
const WAITING: &str =
    "select count(*) from pg_stat_activity where wait_event = 'SyncRep' and usename = 'app'";

/// A transaction of the second node, which wrote and deleted row 2 and then changed row 1, waits at the first one for the session that is
/// returned, and holds row 1. It has seen to the second row by then, where there was none.
async fn held_up(cluster: &Cluster) -> Session {
    let here = patient_session(cluster, 0, "local").await;
    here.run("begin; select from item where id = 1 for update").await;
    let there = patient_session(cluster, 1, "local").await;
    there
        .run(
            "insert into item values (2, 'theirs'); delete from item where id = 2; \
             update item set v = 'theirs' where id = 1",
        )
        .await;
    cluster
        .wait_value(
            0,
            "select count(*) from pg_stat_activity where application_name = 'anabranch:apply' and wait_event_type = 'Lock'",
            "1",
        )
        .await;
    here
}

/// While a remote transaction that deletes a row is applied, that row is written here, and once more by a commit that waits: for what was found
/// about the first of both to be recorded, which must not wait for the row.
#[tokio::test]
async fn a_row_that_is_to_go_is_not_waited_for_where_a_later_commit_holds_it_that_waits_itself() {
    // What the second node writes is later than what is committed here a moment after it.
    let built = Cluster::of([15, 15])
        .clock(1, 30)
        .config("[apply]\nlock_timeout_ms = 60000\n");
    let cluster = waiting(built, "\"anabranch:decode\"").await;
    let here = held_up(&cluster).await;
    let first = patient_session(&cluster, 0, "local").await;
    first.run("insert into item values (2, 'first')").await;
    let second = patient_session(&cluster, 0, "on").await;
    let commit = tokio::spawn(async move { second.run("update item set v = 'second' where id = 2").await });
    cluster.wait_value(0, WAITING, "1").await;
    cluster.wait_decoded(0).await;
    here.run("commit").await;
    until("the commit returns", async || commit.is_finished()).await;
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(id || '=' || v, ' ' order by id) from item",
            "1=theirs",
        )
        .await;
}

#[tokio::test]
async fn a_delete_that_wins_over_a_row_that_nobody_sees_yet_deletes_it_once_it_is_seen() {
    wins_over_what_nobody_sees("").await;
}

#[tokio::test]
async fn so_does_one_of_a_table_that_is_merged() {
    wins_over_what_nobody_sees("[[table]]\nname = \"public.item\"\npolicy = \"column_merge\"\n").await;
}

async fn wins_over_what_nobody_sees(policy: &str) {
    // The second standby never comes: the commit stays invisible.
    let names = "FIRST 2 (\"anabranch:decode\", \"never\")";
    let mut cluster = waiting_cluster_under([15, 18], names, policy).await;
    cluster.partition(&[0], &[1]);
    let waiting = patient_session(&cluster, 0, "on").await;
    let commit = tokio::spawn(async move { waiting.run("insert into item values (2, 'ours')").await });
    cluster.wait_value(0, WAITING, "1").await;
    cluster.wait_decoded(0).await;
    // They have not seen each other, and the other one is later.
    let other = patient_session(&cluster, 1, "local").await;
    other
        .run("insert into item values (2, 'theirs'); delete from item where id = 2")
        .await;
    other.run("insert into item values (3, 'behind')").await;
    cluster.heal();
    cluster
        .wait_value(0, "select count(*) from item where id = 3", "1")
        .await;
    assert!(!commit.is_finished(), "the commit does not wait");
    for node in cluster.all() {
        cluster.let_commits_go(node).await;
    }
    commit.await.expect("the commit returns");
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(id || '=' || v, ' ' order by id) from item",
            "1=first 3=behind",
        )
        .await;
}

/// What was found about a local commit is recorded, for the slot to move, before the remote transaction is through that deletes its row: when that runs again
/// the commit is not visible yet.
async fn is_found_behind_the_first_try(policy: &str) {
    // What the second node writes is later than what is committed here a moment after it. The second standby never comes.
    let built = Cluster::of([15, 15]).clock(1, 30).policy(policy);
    let mut cluster = waiting(built, "FIRST 2 (\"anabranch:decode\", \"never\")").await;
    let here = held_up(&cluster).await;
    let ours = patient_session(&cluster, 0, "on").await;
    let commit = tokio::spawn(async move { ours.run("insert into item values (2, 'ours')").await });
    cluster.wait_value(0, WAITING, "1").await;
    let upto = cluster.value(0, "select pg_current_wal_flush_lsn()").await;
    let recorded = format!("select bool_and(confirmed_flush_lsn >= '{upto}') from pg_replication_slots");
    cluster.wait_value(0, &recorded, "t").await;
    here.run("commit").await;
    cluster
        .wait_value(0, "select v from item where id = 1", "theirs")
        .await;
    assert!(!commit.is_finished(), "the commit does not wait");
    for node in cluster.all() {
        cluster.let_commits_go(node).await;
    }
    commit.await.expect("the commit returns");
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(id || '=' || v, ' ' order by id) from item",
            "1=theirs",
        )
        .await;
}

#[tokio::test]
async fn a_row_that_was_found_before_the_delete_that_wins_was_tried_again_goes_once_it_is_seen() {
    is_found_behind_the_first_try("").await;
}

#[tokio::test]
async fn so_does_one_that_is_merged() {
    is_found_behind_the_first_try("[[table]]\nname = \"public.item\"\npolicy = \"column_merge\"\n").await;
}

/// The catalog still says that it is generated: such columns stay at their node.
#[tokio::test]
async fn values_of_a_column_that_a_commit_which_waits_has_made_an_ordinary_one_are_sent() {
    let mut cluster = Cluster::of([18, 18])
        .schema(
            "create table line (id int primary key, qty int not null, total int generated always as (qty * 10) stored)",
        )
        .policy("[[table]]\nname = \"public.line\"\npolicy = \"column_merge\"\n")
        .start()
        .await;
    cluster.run(0, "insert into line values (1, 2)").await;
    cluster.converge().await;
    let alter = "alter table line alter total drop expression";
    cluster.run(1, alter).await;
    wait_for(&mut cluster, "FIRST 2 (\"anabranch:decode\", \"never\")").await;
    let waiting = patient_session(&cluster, 0, "on").await;
    let write = format!("begin; {alter}; update line set total = 7; commit");
    let commit = tokio::spawn(async move { waiting.run(&write).await });
    cluster.wait_value(1, "select total from line", "7").await;
    wait_for(&mut cluster, "").await;
    commit.await.expect("the commit returns");
    cluster.converge().await;
    cluster.expect("select total from line", "7").await;
}

/// Two nodes of two rows.
async fn two_rows() -> Cluster {
    let cluster = Cluster::of([15, 18])
        .schema("create table item (id int primary key, v text, n int not null default 0)")
        .config("[clock]\nwitness_interval_ms = 200")
        .start()
        .await;
    cluster
        .run(0, "insert into item values (0, 'seen'), (1, 'seen')")
        .await;
    cluster.converge().await;
    cluster
}

/// The first node's server waits for these standbys.
async fn wait_for(cluster: &mut Cluster, names: &str) {
    cluster.nodes[0]
        .server
        .set_conf(&[&format!("synchronous_standby_names = '{names}'")]);
    cluster.nodes[0].server.reload().await;
}

const GATED: &str = "transactions are sent once they are visible here";

async fn until_gated(cluster: &Cluster) {
    until("the first daemon knows of the standby", async || {
        cluster.nodes[0].daemon.log().contains(GATED)
    })
    .await;
}

/// A commit at the first node that waits for a standby which never comes, and what it has inserted.
async fn unseen(cluster: &Cluster) -> (JoinHandle<()>, i32) {
    let waiting = "select count(*) from pg_stat_activity where wait_event = 'SyncRep' and usename = 'app'";
    let admin = cluster.admin(0).await;
    let id = 2;
    let session = cluster.session(0).await;
    let commit = tokio::spawn(async move {
        session
            .run(&format!("insert into item values ({id}, 'unseen')"))
            .await;
    });
    until("the commit waits", async || {
        assert!(!commit.is_finished(), "the commit does not wait");
        admin.number(waiting).await == 1
    })
    .await;
    (commit, id)
}

/// Ends the wait of such a commit: it is done then.
async fn give_up_waiting(cluster: &Cluster, commit: JoinHandle<()>) {
    cluster
        .admin(0)
        .await
        .run("select pg_cancel_backend(pid) from pg_stat_activity where wait_event = 'SyncRep' and usename = 'app'")
        .await;
    commit.await.expect("the commit returns");
}

async fn is_sent_only_once_it_is_seen(cluster: &mut Cluster, (commit, id): (JoinHandle<()>, i32)) {
    until("the nodes are connected", async || {
        let (here, there) = (cluster.status_or_null(0).await, cluster.status_or_null(1).await);
        here["peers"][0]["connected"] == true && there["peers"][0]["connected"] == true
    })
    .await;
    // Behind it, so it comes after it.
    let behind = patient_session(cluster, 0, "local").await;
    behind.run("update item set v = 'behind' where id = 1").await;
    let of_both = format!("select string_agg(v, ' ' order by id) from item where id in (1, {id})");
    for _ in 0..30 {
        assert_eq!(
            cluster.value(0, &of_both).await,
            "behind",
            "the commit does not wait"
        );
        assert_eq!(cluster.value(1, &of_both).await, "seen", "sent before it is seen");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    give_up_waiting(cluster, commit).await;
    cluster.wait_value(1, &of_both, "behind unseen").await;
    wait_for(cluster, "").await;
    cluster.converge().await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn a_commit_that_waits_while_the_daemon_starts_is_not_seen_elsewhere_first() {
    let mut cluster = two_rows().await;
    cluster.nodes[0].daemon.stop();
    wait_for(&mut cluster, "never").await;
    let unseen = unseen(&cluster).await;
    cluster.nodes[0].daemon.start();
    is_sent_only_once_it_is_seen(&mut cluster, unseen).await;
}

#[tokio::test]
async fn a_commit_that_waits_is_not_seen_elsewhere_first_after_a_restart_either() {
    let mut cluster = two_rows().await;
    wait_for(&mut cluster, "never").await;
    until_gated(&cluster).await;
    let unseen = unseen(&cluster).await;
    // Behind it, and visible.
    let behind = patient_session(&cluster, 0, "local").await;
    behind.run("update item set v = 'behind' where id = 0").await;
    // Neither is decoded again.
    let written = cluster.value(0, "select pg_current_wal_insert_lsn()").await;
    let passed = format!("select bool_and(confirmed_flush_lsn >= '{written}') from pg_replication_slots");
    cluster.wait_value(0, &passed, "t").await;
    cluster.nodes[0].daemon.stop();
    cluster.nodes[0].daemon.start();
    is_sent_only_once_it_is_seen(&mut cluster, unseen).await;
    cluster.expect("select v from item where id = 0", "behind").await;
}

#[tokio::test]
async fn thousands_of_commits_behind_one_that_waits_are_let_go_and_upkeep_goes_on() {
    let mut cluster = two_rows().await;
    wait_for(&mut cluster, "never").await;
    until_gated(&cluster).await;
    let (commit, _) = unseen(&cluster).await;
    let writer = patient_session(&cluster, 0, "local").await;
    let write = |count: i32| {
        format!(
            "do $$ begin for i in 1..{count} loop update item set n = n + 1 where id = 1; commit; end loop; end $$"
        )
    };
    let mut written = 5_000;
    writer.run(&write(written)).await;
    assert_eq!(cluster.value(1, "select n from item where id = 1").await, "0");
    give_up_waiting(&cluster, commit).await;
    // As fast as one session can, so that the queue may never be empty.
    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    let writing = tokio::spawn(async move {
        while stopped.try_recv().is_err() {
            writer.run(&write(500)).await;
            written += 500;
        }
        written
    });
    let witness = "select witness_us from anabranch.clock where node_id = 1";
    for _ in 0..3 {
        let last = cluster.value(0, witness).await;
        until("another witness is written", async || {
            cluster.value(0, witness).await != last
        })
        .await;
    }
    stop.send(()).expect("the writer runs");
    let written = writing.await.expect("the writer succeeds");
    cluster
        .wait_value(1, "select n from item where id = 1", &written.to_string())
        .await;
    wait_for(&mut cluster, "").await;
    cluster.converge().await;
    cluster.expect_no_conflict().await;
}
