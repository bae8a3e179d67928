//! Policies: the same row everywhere, the one that the table's policy prefers, whatever arrived first where.

use std::fs;
use std::time::Duration;

use anabranch_tests::Cluster;
use anabranch_tests::daemon::{anabranch, anabranch_ok, anabranch_refuses};
use anabranch_tests::postgres::DATABASE;
use anabranch_tests::proxy::Mode;
use anabranch_tests::wait::{PATIENCE, until};
use serde_json::json;

const SCHEMA: &str = "create table first (id int primary key, v text);
    create table prio (id int primary key, v text);
    create table gone (id int primary key, v text);
    create table kept (id int primary key, v text);
    create table late (id int primary key, v text);
    create table chosen (id int primary key, v text)";

const POLICY: &str = r#"
    [[table]]
    name = "public.first"
    policy = "first_update_wins"
    [[table]]
    name = "public.prio"
    policy = "origin_priority"
    priority = ["n1", "n2"]
    [[table]]
    name = "public.gone"
    deletes = "delete_wins"
    [[table]]
    name = "public.kept"
    deletes = "update_wins"
    [[table]]
    name = "public.chosen"
    policy = "script"
    script = "chosen.rhai"
"#;

/// n2's row, else the middle one: what comes in can make another win than itself or the row that stood.
const CHOSEN: &str = r#"
    fn resolve(versions) {
        for i in 0..versions.len() {
            if versions[i].origin == "n2" && !versions[i].deleted { return i; }
        }
        versions.len() / 2
    }
"#;

/// Three nodes; every table holds the row `(1, 'base')`.
async fn start() -> Cluster {
    let cluster = Cluster::of([15, 15, 18])
        .schema(SCHEMA)
        .policy(POLICY)
        .script("chosen.rhai", CHOSEN)
        .config("[apply]\nquarantine_retry_ms = 500\n")
        .start()
        .await;
    for table in ["first", "prio", "gone", "kept", "late", "chosen"] {
        cluster
            .run(0, &format!("insert into {table} values (1, 'base')"))
            .await;
    }
    cluster.converge().await;
    cluster
}

fn all(table: &str) -> String {
    format!("select coalesce(string_agg(id || '=' || v, ' ' order by id), 'none') from {table}")
}

#[tokio::test]
async fn each_table_ends_as_its_own_policy_says() {
    let cluster = start().await;
    let update = |table: &str, v: &str| format!("update {table} set v = '{v}'");
    cluster
        .apart(&[
            (2, &update("first", "earliest")),
            (1, &update("first", "middle")),
            (0, &update("first", "latest")),
            (1, &update("prio", "second")),
            (0, &update("prio", "preferred")),
            (2, &update("prio", "latest")),
            (1, "delete from gone"),
            (0, &update("gone", "updated later")),
            (1, &update("kept", "updated")),
            (0, "delete from kept"),
            (1, &update("late", "earlier")),
            (0, &update("late", "later")),
        ])
        .await;
    cluster.expect(&all("first"), "1=earliest").await;
    cluster.expect(&all("prio"), "1=preferred").await;
    cluster.expect(&all("gone"), "none").await;
    cluster.expect(&all("kept"), "1=updated").await;
    cluster.expect(&all("late"), "1=later").await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 7, "{log:#?}");
    for (policy, lines) in [
        ("first_update_wins", 2),
        ("origin_priority 1 2", 2),
        ("last_update_wins, delete_wins", 1),
        ("last_update_wins, update_wins", 1),
        ("last_update_wins", 1),
    ] {
        let named = log.iter().filter(|line| line.0["policy"] == policy).count();
        assert_eq!(named, lines, "{policy}: {log:#?}");
    }
    // What comes after is no conflict, and wins.
    for table in ["first", "prio"] {
        cluster.run(2, &update(table, "after")).await;
    }
    cluster.converge().await;
    cluster.expect(&all("first"), "1=after").await;
    cluster.expect(&all("prio"), "1=after").await;
    assert_eq!(cluster.conflicts().await.len(), 7);
}

/// A row of n2 is put right, since a local write met one that is preferred; whether another met that, only the fence tells.
#[tokio::test]
async fn a_fence_that_the_server_refuses_after_a_repair_is_alarmed_and_tried_again() {
    let cluster = start().await;
    let admin = cluster.admin(1).await;
    // Not while rows are locked for what is being written: only behind it.
    admin
        .run(
            "create function refuse() returns trigger language plpgsql as $$ begin
                 if not exists (select from pg_locks where relation = 'public.prio'::regclass and pid <> pg_backend_pid()) then
                     raise 'no room';
                 end if;
                 return new;
             end $$;
             create trigger refuse before update on anabranch.fence for each row execute function refuse()",
        )
        .await;
    let holder = cluster.admin(1).await;
    holder.run("begin; update prio set v = 'second'").await;
    // Of a row that is not there nothing is locked, so it is looked at again behind the repair.
    cluster.run(0, "delete from prio").await;
    let waits = "select count(*) from pg_stat_activity where application_name = 'anabranch:apply' and wait_event_type = 'Lock'";
    cluster.wait_value(1, waits, "1").await;
    holder.run("commit").await;
    until("an alarm says so", async || {
        let alarms = cluster.status_or_null(1).await["alarms"].to_string();
        alarms.contains("\"apply\"") && alarms.contains("no room")
    })
    .await;
    admin.run("drop trigger refuse on anabranch.fence").await;
    cluster.converge().await;
    cluster.expect("select count(*) from prio", "0").await;
    until("the alarm is over", async || {
        !cluster.status_or_null(1).await["alarms"]
            .to_string()
            .contains("\"apply\"")
    })
    .await;
}

#[tokio::test]
async fn a_version_that_had_lost_comes_back_when_its_winner_is_overwritten_by_less() {
    let cluster = start().await;
    // n1 and n2 write apart; n3 sees n1's alone, and overwrites it. n2 is preferred to n3.
    cluster.isolate_all();
    cluster.run(0, "update prio set v = 'first choice'").await;
    cluster.run(1, "update prio set v = 'second choice'").await;
    cluster.set_lines(&[0], &[2], Mode::Pass);
    cluster.wait_value(2, &all("prio"), "1=first choice").await;
    cluster.isolate_all();
    // Now n1 meets n2's, which loses, before it hears of n3's.
    cluster.set_lines(&[0], &[1], Mode::Pass);
    cluster.wait_value(1, &all("prio"), "1=first choice").await;
    cluster
        .wait_value(0, "select count(*) from anabranch.conflict_history", "1")
        .await;
    cluster.run(2, "update prio set v = 'overwritten'").await;
    // n1's server does not take it back at first: its line is not that of one that lost any more.
    let admin = cluster.admin(0).await;
    admin
        .run("alter table prio add constraint refused check (v <> 'second choice')")
        .await;
    cluster.heal();
    let lines = "select string_agg(concat_ws(' ', conflict_resolution, remote_tuple->>'v', status), ', ' \
        order by conflict_resolution) from anabranch.conflict_history";
    let said = |status: &str| format!("keep_local overwritten new, skip second choice {status}");
    cluster.wait_value(0, lines, &said("new")).await;
    admin.run("alter table prio drop constraint refused").await;
    cluster.converge().await;
    cluster.expect(&all("prio"), "1=second choice").await;
    cluster.wait_value(0, lines, &said("acknowledged")).await;
    for node in cluster.all() {
        let log = cluster.conflicts_at(node).await;
        assert!(
            log.iter().any(|line| line.everything().contains("overwritten")),
            "n{}: {log:#?}",
            node + 1
        );
    }
}

#[tokio::test]
async fn a_truncate_is_by_stamp_and_uncovers_what_had_lost() {
    let cluster = start().await;
    cluster
        .apart(&[
            (0, "update first set v = 'older, preferred'"),
            (1, "truncate first"),
            (2, "update first set v = 'newer'"),
        ])
        .await;
    cluster.expect(&all("first"), "1=newer").await;
    let log = cluster.conflicts_at(1).await;
    assert!(
        log.iter()
            .any(|line| line.everything().contains("older, preferred")),
        "{log:#?}"
    );
}

#[tokio::test]
async fn rows_made_and_removed_apart_end_as_the_policy_says() {
    let cluster = start().await;
    cluster
        .apart(&[
            (0, "insert into first values (2, 'first')"),
            (1, "insert into first values (2, 'second')"),
            (
                2,
                "insert into first values (2, 'third'); update first set v = 'third again' where id = 2",
            ),
            (2, "insert into gone values (3, 'x')"),
            (1, "insert into gone values (3, 'y')"),
            (1, "delete from gone where id = 3"),
            (0, "update gone set id = 4 where id = 1"),
            (2, "update gone set v = 'stays behind?' where id = 1"),
        ])
        .await;
    cluster.expect(&all("first"), "1=base 2=first").await;
    cluster.expect(&all("gone"), "4=base").await;
}

#[tokio::test]
async fn a_local_write_that_loses_is_overwritten_at_its_own_node() {
    let cluster = start().await;
    for round in 0..5 {
        cluster
            .apart(&[
                (0, &format!("update first set v = 'early {round}'")),
                (1, &format!("update first set v = 'late {round}'")),
                (2, "delete from first"),
            ])
            .await;
        cluster.expect(&all("first"), &format!("1=early {round}")).await;
    }
}

/// The first three nodes write the same few rows of every table, all at once.
async fn write_everywhere(cluster: &Cluster, rounds: usize) {
    let statements = |node: usize, round: usize| {
        let row = (node * 7 + round * 3) % 4;
        ["first", "prio", "gone", "kept", "chosen"].map(|table| match (round + node) % 5 {
            0 => format!("delete from {table} where id = {row}"),
            1 if round % 20 == 1 => format!("truncate {table}"),
            _ => format!(
                "insert into {table} values ({row}, '{node}.{round}') on conflict (id) do update set v = excluded.v"
            ),
        })
    };
    let sessions = futures_util::future::join_all((0..3).map(|node| cluster.session(node))).await;
    let all: Vec<_> = sessions
        .iter()
        .enumerate()
        .map(async |(node, session)| {
            for round in 0..rounds {
                for sql in statements(node, round) {
                    // A lock that the applier waits for may be refused; that write was not made.
                    let _ = session.try_run(&sql).await;
                }
            }
        })
        .collect();
    futures_util::future::join_all(all).await;
}

#[tokio::test]
async fn nodes_converge_under_every_policy_while_all_of_them_write_the_same_rows() {
    let cluster = start().await;
    write_everywhere(&cluster, 150).await;
    cluster.converge().await;
    let mut repairs = 0;
    for node in cluster.all() {
        repairs += cluster.status(node).await["apply"]["repairs"]
            .as_i64()
            .unwrap_or(0);
    }
    assert!(repairs > 0, "no local write ever met a concurrent one");
}

#[tokio::test]
async fn a_server_joins_under_every_policy_while_all_write_the_same_rows() {
    let mut cluster = start().await;
    let node = cluster.add_server(15).await;
    let join = async {
        cluster.join(node, 0).await;
        // It begins while the others go on.
    };
    futures_util::future::join(write_everywhere(&cluster, 600), join).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_server_joins_with_the_versions_that_lost_and_may_come_back() {
    let mut cluster = start().await;
    // As above: n1 and n2 know both of their versions, n3 knows n1's alone, and overwrites it while it is away.
    cluster.isolate_all();
    cluster.run(2, "update first set v = 'earliest'").await;
    cluster.run(0, "update prio set v = 'first choice'").await;
    cluster.run(1, "update prio set v = 'second choice'").await;
    cluster.run(1, "update first set v = 'middle'").await;
    cluster.run(0, "update first set v = 'latest'").await;
    cluster.line(2, 0).set(Mode::Pass);
    cluster.wait_value(2, &all("prio"), "1=first choice").await;
    cluster.nodes[2].daemon.kill();
    cluster.run(2, "update prio set v = 'overwritten'").await;
    cluster.set_lines(&[0], &[1], Mode::Pass);
    cluster.wait_value(1, &all("prio"), "1=first choice").await;
    let node = cluster.add_server(15).await;
    cluster.join(node, 1).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_value(node, &all("prio"), "1=first choice").await;
    cluster.heal();
    cluster.nodes[2].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    cluster.expect(&all("prio"), "1=second choice").await;
    cluster.expect(&all("first"), "1=earliest").await;
}

#[tokio::test]
async fn a_server_with_another_policy_does_not_join() {
    let mut cluster = start().await;
    let node = cluster.add_server(15).await;
    let policy = cluster.nodes[node].data_dir.with_file_name("policy.toml");
    fs::write(&policy, POLICY.replace("delete_wins", "update_wins")).expect("write the policy");
    let command = cluster.join_command(node, 0);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let refused = anabranch_refuses(&command).await;
    assert!(refused.contains("install the same policy file"), "{refused}");
}

#[tokio::test]
async fn conflicts_survive_killed_daemons_under_a_policy() {
    let mut cluster = start().await;
    for round in 0..3 {
        cluster.isolate_all();
        cluster
            .run(0, &format!("update first set v = 'early {round}'"))
            .await;
        cluster
            .run(1, &format!("update first set v = 'late {round}'"))
            .await;
        cluster
            .run(1, &format!("update prio set v = 'lesser {round}'"))
            .await;
        cluster
            .run(0, &format!("update prio set v = 'preferred {round}'"))
            .await;
        cluster.kill_daemons();
        cluster.heal();
        cluster.start_daemons();
        cluster.converge().await;
        cluster.expect(&all("first"), &format!("1=early {round}")).await;
        cluster
            .expect(&all("prio"), &format!("1=preferred {round}"))
            .await;
    }
    assert_eq!(cluster.conflicts().await.len(), 6);
}

/// n1 overwrites n2's row knowingly, and n3 takes in both at once. It is killed before its slot has passed that: once it has started,
/// it must not meet n1's write first, and take n2's, which is preferred, for one that n1 did not know.
#[tokio::test]
async fn a_restart_meets_what_came_in_together_as_it_was_decided() {
    // No heartbeat of n3's moves its slot.
    let mut cluster = Cluster::of([15, 15, 15])
        .schema("create table prio (id int primary key, v text); create table held (id int primary key)")
        .policy(
            "[[table]]\nname = \"public.prio\"\npolicy = \"origin_priority\"\npriority = [\"n2\", \"n3\"]\n",
        )
        .config_of(
            2,
            "[clock]\nwitness_interval_ms = 3600000\nmax_drift_ms = 3600000\n",
        )
        .start()
        .await;
    // Its only one waits for a peer's clock.
    let is_written = "select witness_us > 0 from anabranch.clock where node_id = 3";
    cluster.wait_value(2, is_written, "t").await;
    cluster.run(0, "insert into prio values (1, 'base')").await;
    cluster.converge().await;
    let holder = cluster.admin(2).await;
    holder
        .run("begin; lock table held in access exclusive mode")
        .await;
    cluster.run(0, "insert into held values (1)").await;
    let waits = "select count(*) from pg_stat_activity where application_name = 'anabranch:apply' and wait_event_type = 'Lock'";
    cluster.wait_value(2, waits, "1").await;
    cluster.run(1, "update prio set v = 'overwritten'").await;
    cluster.wait_value(0, &all("prio"), "1=overwritten").await;
    cluster.run(0, "update prio set v = 'lesser'").await;
    cluster.run(2, "update prio set v = 'preferred'").await;
    for node in [0, 1] {
        cluster.wait_value(node, &all("prio"), "1=preferred").await;
    }
    // The other two are at n3 by then.
    tokio::time::sleep(Duration::from_millis(500)).await;
    holder.run("commit").await;
    let is_logged = "select count(*) > 0 from anabranch.conflict_history";
    cluster.wait_value(2, is_logged, "t").await;
    cluster.nodes[2].daemon.kill();
    cluster.nodes[2].daemon.start();
    cluster.converge().await;
    cluster.expect(&all("prio"), "1=preferred").await;
}

#[tokio::test]
async fn nodes_with_different_policies_refuse_each_other() {
    let mut cluster = Cluster::of([15, 15])
        .schema(SCHEMA)
        .policy(POLICY)
        .script("chosen.rhai", CHOSEN)
        .without_daemons()
        .start()
        .await;
    let policy = cluster.nodes[1].data_dir.with_file_name("policy.toml");
    fs::write(&policy, POLICY.replace("delete_wins", "update_wins")).expect("write the policy");
    cluster.start_daemons();
    until("the peers have refused each other", async || {
        cluster
            .nodes
            .iter()
            .any(|node| node.daemon.log().contains("install the same policy file"))
    })
    .await;
}

#[tokio::test]
async fn a_policy_changes_only_when_nothing_is_open() {
    let mut cluster = start().await;
    let other = POLICY.replace("first_update_wins", "last_update_wins");
    let path = |cluster: &Cluster, node: usize| cluster.nodes[node].data_dir.with_file_name("policy.toml");
    // A write that the others have not got: its node keeps its policy.
    cluster.isolate_all();
    cluster.run(0, "update first set v = 'open'").await;
    cluster.journalled(0).await;
    cluster.nodes[0].daemon.stop();
    fs::write(path(&cluster, 0), &other).expect("write the policy");
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let refused = anabranch_refuses(&["run", "--config", &config]).await;
    assert!(refused.contains("put the former policy back"), "{refused}");
    fs::write(path(&cluster, 0), POLICY).expect("write the policy");
    cluster.nodes[0].daemon.start();
    cluster.heal();
    cluster.converge().await;
    // Nobody writes any more, and everyone knows that everyone has everything.
    cluster.wait_settled().await;
    for node in &mut cluster.nodes {
        node.daemon.stop();
    }
    for node in cluster.all() {
        fs::write(path(&cluster, node), &other).expect("write the policy");
    }
    cluster.start_daemons();
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "update first set v = 'earlier'"),
            (1, "update first set v = 'later'"),
        ])
        .await;
    cluster.expect(&all("first"), "1=later").await;
    assert_eq!(
        cluster.conflicts().await.last().expect("a line").applied(),
        &json!({"id": 1, "v": "later"})
    );
}

#[tokio::test]
async fn what_the_former_policy_decided_stays_for_nodes_that_join_and_start_again() {
    const SCHEMA: &str = "create table first (id int primary key, v text); \
        create table counter (id int primary key, n int not null); alter table counter replica identity full; \
        create table back (id int primary key, v text)";
    let mut cluster = Cluster::of([15, 18])
        .schema(SCHEMA)
        .policy("[[table]]\nname = \"public.back\"\ndeletes = \"update_wins\"\n")
        .start()
        .await;
    for table in ["first", "back"] {
        cluster
            .run(0, &format!("insert into {table} values (1, 'base')"))
            .await;
    }
    cluster.run(0, "insert into counter values (1, 100)").await;
    cluster.converge().await;
    const CHANGE: &str = "update first set v = 'V'; update counter set n = n + 1;";
    cluster
        .apart(&[
            (
                0,
                &format!("{} update back set v = 'kept'", CHANGE.replace('V', "earlier")),
            ),
            (1, &format!("{} delete from back", CHANGE.replace('V', "later"))),
        ])
        .await;
    let expect = async |cluster: &Cluster, n: &str| {
        cluster.converge().await;
        cluster.expect("select v from first", "later").await;
        cluster.expect("select v from back", "kept").await;
        cluster.expect("select n from counter", n).await;
    };
    // One of the increments lost, and has its line.
    expect(&cluster, "101").await;
    cluster.wait_settled().await;
    for node in &mut cluster.nodes {
        node.daemon.stop();
    }
    let other = "[[table]]\nname = \"public.first\"\npolicy = \"first_update_wins\"\n\
        [[table]]\nname = \"public.counter\"\ncolumns = { n = \"delta\" }\n";
    for node in cluster.all() {
        let path = cluster.nodes[node].data_dir.with_file_name("policy.toml");
        fs::write(path, other).expect("write the policy");
    }
    cluster.start_daemons();
    expect(&cluster, "101").await;
    let node = cluster.add_server(15).await;
    cluster.join(node, 0).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    expect(&cluster, "101").await;
    cluster.run(0, "update counter set n = n + 10").await;
    cluster.kill_daemons();
    cluster.run(1, "update counter set n = n + 100").await;
    cluster.start_daemons();
    expect(&cluster, "211").await;
}

#[tokio::test]
async fn a_running_daemon_keeps_its_policy_whatever_becomes_of_the_file() {
    let mut cluster = Cluster::of([15, 15])
        .schema("create table item (id int primary key, v text)")
        .policy("[[table]]\nname = \"public.item\"\npolicy = \"first_update_wins\"\n")
        .start()
        .await;
    for node in cluster.all() {
        let path = cluster.nodes[node].data_dir.with_file_name("policy.toml");
        fs::write(path, "[[table]]\nname = \"half of a wo").expect("write the policy");
    }
    // New sets of members and a server that comes back begin the stages anew.
    cluster.nodes[0].server.kill();
    cluster.nodes[0].server.start().await;
    cluster.run(0, "insert into item values (1, 'a')").await;
    cluster.converge().await;
    assert!(cluster.nodes.iter_mut().all(|node| node.daemon.runs()));
}

#[tokio::test]
async fn rows_that_exclude_each_other_wait_until_one_of_them_goes() {
    let cluster = Cluster::of([15, 18])
        .schema("create table booking (id int primary key, during int4range, exclude using gist (during with &&))")
        .policy("[[table]]\nname = \"public.booking\"\nexclusion_constraints = \"quarantine\"")
        .start()
        .await;
    cluster.isolate_all();
    cluster.run(0, "insert into booking values (1, '[1,5)')").await;
    cluster.run(1, "insert into booking values (2, '[3,9)')").await;
    cluster.heal();
    const WAITING: &str = "select string_agg(key->>'id', ' ') from anabranch.quarantine";
    const LINES: &str = "select string_agg(key->>'id', ' ') from anabranch.conflict_history \
        where conflict_type = 'exclusion_violation' and error->>'sqlstate' = '23P01'";
    for (node, other) in [(0, "2"), (1, "1")] {
        cluster.wait_value(node, WAITING, other).await;
        cluster.wait_value(node, LINES, other).await;
    }
    cluster.run(0, "delete from booking where id = 1").await;
    cluster.converge().await;
    for node in cluster.all() {
        let ids = "select string_agg(id::text, ' ') from booking";
        cluster.wait_value(node, ids, "2").await;
        cluster
            .wait_value(node, "select count(*) from anabranch.quarantine", "0")
            .await;
    }
    // A unique key of periods is one, too, and nobody has accepted that of this table.
    let stay = "create table stay (id int primary key, rooms int4range, during int4range, \
        unique (rooms, during without overlaps))";
    cluster.run(1, stay).await;
    let said = anabranch(&["doctor", "--config", cluster.nodes[1].daemon.config_arg()]).await;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let refused = "has 1 exclusion constraint(s): rows of two nodes that exclude each other";
    assert!(
        said.contains("table public.stay") && said.contains(refused),
        "{said}"
    );
    assert!(!said.contains("unique_keys"), "{said}");
    // It stops no `init` where the table was replicated before anybody asked.
    let admin = cluster.nodes[1].server.dsn("postgres", DATABASE);
    let config = cluster.nodes[1].daemon.config_arg();
    let init = ["init", "--config", config, "--admin-dsn", &admin];
    let said = anabranch_refuses(&init).await;
    assert!(said.contains(refused), "{said}");
    let publish = "alter publication anabranch add table only stay";
    cluster.admin(1).await.run(publish).await;
    let said = anabranch_ok(&init).await;
    assert!(said.contains(refused), "{said}");
}

#[tokio::test]
async fn a_delete_that_met_an_update_with_a_wrong_clock_is_told_by_what_decided_and_can_be_replayed() {
    const DAY_S: i64 = 24 * 60 * 60;
    let cluster = Cluster::of([15, 15])
        .schema(
            "create table late (id int primary key, v text); create table gone (id int primary key, v text); \
             create table tick (n int primary key)",
        )
        .policy("[[table]]\nname = \"public.gone\"\ndeletes = \"delete_wins\"")
        .clock(0, 22_000 * DAY_S)
        .start()
        .await;
    cluster
        .run(
            1,
            "insert into late values (1, 'base'); insert into gone values (1, 'base')",
        )
        .await;
    cluster.converge().await;
    cluster.isolate_all();
    cluster.run(1, "delete from late; delete from gone").await;
    // Both nodes count on from the time to which the wrong clock is held back. Some writes more, and its stamps are the later.
    for n in 0..20 {
        cluster.run(0, &format!("insert into tick values ({n})")).await;
    }
    let ahead = "update late set v = 'ahead'; update gone set v = 'ahead'";
    cluster.run(0, ahead).await;
    cluster.heal();
    cluster.converge().await;
    cluster.expect(&all("late"), "1=ahead").await;
    cluster.expect(&all("gone"), "none").await;
    assert_eq!(cluster.conflicts().await.len(), 2);
    for node in cluster.all() {
        for line in cluster.conflicts_at(node).await {
            let is_late = line.0["table_name"] == "late";
            // The rule of `gone` decides whatever the times are.
            assert_eq!(line.kind() == "clock_drift", is_late, "n{}: {line:#?}", node + 1);
            let met = line.0["error"]["conflict_type"].as_str();
            assert_eq!(met.is_some(), is_late, "n{}: {line:#?}", node + 1);
        }
    }
    let config = cluster.nodes[1].daemon.config_arg();
    let late = ["--table", "late", "--config", config];
    let said = anabranch_ok(&[&["conflicts", "list"], &late[..]].concat()).await;
    assert!(
        said.contains("clock_drift") && said.contains("(delete)"),
        "{said}"
    );
    let said = anabranch_ok(&[&["conflicts", "list", "--all-nodes"], &late[..]].concat()).await;
    assert!(said.contains("(delete)"), "{said}");
    let lines = cluster.conflicts_at(1).await;
    let line = lines.iter().find(|line| line.0["table_name"] == "late");
    let id = line
        .and_then(|line| line.0["conflict_id"].as_str())
        .expect("a line");
    anabranch_ok(&["conflicts", "replay", id, "--config", config]).await;
    cluster.converge().await;
    cluster.expect(&all("late"), "none").await;
}

/// Takes a node out of `peers` of another's configuration.
fn forget_peer(cluster: &Cluster, node: usize, peer: &str) {
    let is_other = |part: &&str| !part.contains(&format!("name = \"{peer}\""));
    cluster.nodes[node].daemon.edit_config(|text| {
        let mut parts = text.split("[[peers]]");
        let first = parts.next().expect("a configuration").to_owned();
        parts
            .filter(is_other)
            .fold(first, |text, part| text + "[[peers]]" + part)
    });
}

#[tokio::test]
async fn a_policy_may_go_on_to_name_a_node_that_has_left() {
    const NAMED: &str =
        "[[table]]\nname = \"public.prio\"\npolicy = \"origin_priority\"\npriority = [\"n3\", \"n1\"]\n";
    let mut cluster = Cluster::of([15, 15, 15])
        .schema(SCHEMA)
        .policy(NAMED)
        .start()
        .await;
    cluster.run(2, "insert into prio values (1, 'base')").await;
    cluster.converge().await;
    let hash = cluster.status(0).await["policy"]["hash"].clone();
    leave(&cluster, 2).await;
    for node in [0, 1] {
        forget_peer(&cluster, node, "n3");
        cluster.nodes[node].daemon.stop();
    }
    for node in [0, 1] {
        cluster.nodes[node].daemon.start();
    }
    cluster.arrive_among(&[0, 1], PATIENCE).await;
    for node in [0, 1] {
        assert_eq!(cluster.status(node).await["policy"]["hash"], hash);
    }
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let said = anabranch_ok(&["policy", "check", "--config", &config, "--output", "json"]).await;
    let checked: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(checked["hash"], hash, "{said}");
    let said = anabranch_ok(&["policy", "show", "--config", &config]).await;
    assert!(said.contains("origin_priority 3 1"), "{said}");
    for args in [
        &["doctor"][..],
        &["init", "--dry-run", "--admin-dsn", &admin_of(&cluster, 0)],
    ] {
        let output = anabranch(&[args, &["--config", &config]].concat()).await;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let erred = String::from_utf8_lossy(&output.stderr);
        assert!(
            !said.contains("no node is called") && !erred.contains("no node is called"),
            "{said}{erred}"
        );
    }
    // And it decides.
    cluster.partition(&[0], &[1]);
    cluster.run(0, "update prio set v = 'preferred'").await;
    cluster.run(1, "update prio set v = 'lesser'").await;
    cluster.heal();
    cluster.arrive_among(&[0, 1], PATIENCE).await;
    for node in [0, 1] {
        cluster.wait_value(node, &all("prio"), "1=preferred").await;
    }

    // Where nobody can be asked only `peers` is known, which is said.
    cluster.nodes[0].daemon.stop();
    cluster.nodes[0].server.stop();
    let refused = anabranch_refuses(&["policy", "check", "--config", &config]).await;
    assert!(
        refused.contains("no node is called `n3`") && refused.contains("the database cannot be asked"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_server_joins_under_a_policy_that_names_members_it_has_no_peers_for() {
    const NAMED: &str = "[[table]]\nname = \"public.prio\"\npolicy = \"origin_priority\"\npriority = [\"n3\", \"n2\", \"n1\"]\n";
    let mut cluster = Cluster::of([15, 15, 15])
        .schema(SCHEMA)
        .policy(NAMED)
        .start()
        .await;
    cluster.run(2, "insert into prio values (1, 'base')").await;
    cluster.converge().await;
    leave(&cluster, 2).await;
    cluster.arrive_among(&[0, 1], PATIENCE).await;
    let node = cluster.add_server(15).await;
    // One that has left, and a member of which the joiner has not been told.
    forget_peer(&cluster, node, "n3");
    forget_peer(&cluster, node, "n2");
    cluster.join(node, 0).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.arrive_among(&[0, 1, node], PATIENCE).await;
    let hash = |status: serde_json::Value| status["policy"]["hash"].clone();
    assert_eq!(hash(cluster.status(node).await), hash(cluster.status(0).await));
    assert_eq!(cluster.value(node, &all("prio")).await, "1=base");
}

async fn leave(cluster: &Cluster, node: usize) {
    let config = cluster.nodes[node].daemon.config_arg();
    anabranch_ok(&[
        "leave",
        "--config",
        config,
        "--admin-dsn",
        &admin_of(cluster, node),
    ])
    .await;
}

fn admin_of(cluster: &Cluster, node: usize) -> String {
    cluster.nodes[node].server.dsn("postgres", DATABASE)
}
