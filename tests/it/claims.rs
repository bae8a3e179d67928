//! Values of unique keys that several nodes give out unseen by each other: all nodes end with the same rows, whoever
//! heard of whom first, and each row that had to go is in every log.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anabranch_tests::Cluster;
use anabranch_tests::daemon::{anabranch_ok, anabranch_refuses};
use anabranch_tests::proxy::Mode;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const PAIRS: &str = "create table pair (id int primary key, a text unique, b text, unique (b))";
const ALL: &str = "select coalesce(string_agg(concat_ws(':', id, a, b), ' ' order by id), 'none') from pair";
const LINES: &str = "select count(*) from anabranch.conflict_history";

/// The ids of rows with a line of their own, at every node.
pub(crate) async fn expect_logged(cluster: &Cluster, ids: &str) {
    const LOSERS: &str = "select coalesce(string_agg(key->>'id', ' ' order by (key->>'id')::int), 'none') \
        from anabranch.conflict_history where conflict_type = 'multiple_unique_conflicts'";
    for node in cluster.all() {
        cluster.wait_value(node, LOSERS, ids).await;
    }
}

#[tokio::test]
async fn of_three_writers_to_one_value_the_latest_has_it() {
    let cluster = Cluster::of([15, 15, 18]).schema(PAIRS).start().await;
    cluster
        .apart(&[
            (1, "insert into pair values (1, 'x', null)"),
            (2, "insert into pair values (2, 'x', null)"),
            (0, "insert into pair values (3, 'x', null)"),
        ])
        .await;
    cluster.expect(ALL, "3:x").await;
    expect_logged(&cluster, "1 2").await;
    let line = &cluster.conflicts_at(1).await[0];
    let text = line.everything();
    assert!(text.contains("pair_a_key") && text.contains("23505"), "{text}");
    // Whoever knows may take the value, under the parked row's key, too.
    cluster.run(1, "delete from pair where id = 3").await;
    cluster.converge().await;
    cluster.run(0, "insert into pair values (1, 'x', 'again')").await;
    cluster.converge().await;
    cluster.expect(ALL, "1:x:again").await;
    expect_logged(&cluster, "1 2").await;
}

#[tokio::test]
async fn a_row_that_lost_its_value_is_written_again_once_nobody_has_the_value() {
    let cluster = Cluster::of([15, 15]).schema(PAIRS).start().await;
    cluster
        .apart(&[
            (0, "insert into pair values (1, 'x', 'first')"),
            (1, "insert into pair values (2, 'x', 'second')"),
        ])
        .await;
    cluster.expect(ALL, "2:x:second").await;
    expect_logged(&cluster, "1").await;
    let id = cluster.conflicts_at(1).await[0].id().replace('"', "");
    let config = cluster.nodes[1].daemon.config_arg();
    let replay = ["conflicts", "replay", &id, "--by", "kim", "--config", config];
    // The key stands in the way, by force, too; nothing is changed.
    for force in [&[][..], &["--force"]] {
        let said = anabranch_refuses(&[&replay, force].concat()).await;
        assert!(said.contains("pair_a_key"), "{said}");
    }
    const STATUS: &str = "select concat_ws(' ', status, reviewed_by) from anabranch.conflict_history";
    assert_eq!(cluster.value(1, STATUS).await, "new");
    cluster.expect(ALL, "2:x:second").await;

    cluster.run(0, "update pair set a = 'y' where id = 2").await;
    cluster.converge().await;
    let said = anabranch_ok(&replay).await;
    assert!(said.contains("row inserted, column(s) id, a, b"), "{said}");
    cluster.converge().await;
    cluster.expect(ALL, "1:x:first 2:y:second").await;
    // Of this node's line alone; and writing it again is no conflict.
    assert_eq!(cluster.value(1, STATUS).await, "replayed kim");
    assert_eq!(cluster.value(0, STATUS).await, "new");
}

#[tokio::test]
async fn a_row_that_lost_one_value_still_takes_another_from_a_third_row() {
    let cluster = Cluster::of([15, 15, 15]).schema(PAIRS).start().await;
    cluster
        .apart(&[
            (0, "insert into pair values (1, 'x', 'p')"),
            (1, "insert into pair values (2, 'x', 'q')"),
            (2, "insert into pair values (3, 'y', 'q')"),
        ])
        .await;
    cluster.expect(ALL, "3:y:q").await;
    expect_logged(&cluster, "1 2").await;
}

/// Sharp s is two letters in upper case, so these are one value for the daemon, and two for any server.
#[tokio::test]
async fn a_row_that_its_server_let_be_beside_another_yields_to_a_third_whoever_comes_first() {
    let cluster = Cluster::of([15, 15, 18])
        .schema("create table pair (id int primary key, a text, b text)")
        .schema("create unique index pair_a on pair (lower(a))")
        .start()
        .await;
    cluster
        .apart(&[
            (0, "insert into pair values (1, 'Weiß')"),
            (1, "insert into pair values (3, 'weiß')"),
            (0, "insert into pair values (2, 'Weiss')"),
        ])
        .await;
    cluster.expect(ALL, "2:Weiss").await;
    expect_logged(&cluster, "1 3").await;
    // Whoever knows the other is let be.
    cluster.run(2, "insert into pair values (4, 'WEIß')").await;
    cluster.converge().await;
    cluster.expect(ALL, "2:Weiss 4:WEIß").await;
}

/// Nodes 1 and 2 hear of each other only once the winner has given its value up, node 3 before that.
async fn given_up(then: &str, end: &str) {
    let mut cluster = Cluster::of([15, 15, 15]).schema(PAIRS).start().await;
    cluster.isolate_all();
    cluster.run(0, "insert into pair values (1, 'x', null)").await;
    cluster.run(1, "insert into pair values (2, 'x', null)").await;
    cluster.set_lines(&[1], &[2], Mode::Pass);
    cluster.wait_value(2, ALL, "2:x").await;
    cluster.isolate_all();
    cluster.set_lines(&[0], &[2], Mode::Pass);
    cluster.wait_value(2, LINES, "1").await;
    cluster.isolate_all();
    cluster.run(1, then).await;
    cluster.nodes[2].daemon.kill();
    cluster.nodes[2].daemon.start();
    cluster.heal();
    cluster.converge().await;
    cluster.expect(ALL, end).await;
    expect_logged(&cluster, "1").await;
}

#[tokio::test]
async fn a_row_stays_away_when_the_winner_moves_off_its_value() {
    given_up("update pair set a = 'z' where id = 2", "2:z").await;
}

#[tokio::test]
async fn a_row_stays_away_when_the_winner_is_deleted() {
    given_up("delete from pair where id = 2", "none").await;
}

#[tokio::test]
async fn values_swapped_in_one_transaction_meet_a_claim_of_one_of_them() {
    let cluster = Cluster::of([15, 15, 15])
        .schema(PAIRS)
        .schema("create table slot (id int primary key, v text, unique (v) deferrable initially deferred)")
        .start()
        .await;
    for sql in [
        "insert into pair values (1, 'x', null), (2, 'y', null)",
        "insert into slot values (1, 'x'), (2, 'y')",
    ] {
        cluster.run(0, sql).await;
    }
    cluster.converge().await;
    cluster
        .apart(&[
            (
                0,
                "begin; update pair set a = 't' where id = 1; update pair set a = 'x' where id = 2; \
                 update pair set a = 'y' where id = 1; \
                 update slot set v = case v when 'x' then 'y' else 'x' end; commit",
            ),
            (
                1,
                "update pair set a = 'w' where id = 1; insert into pair values (3, 'x', null)",
            ),
            (
                1,
                "update slot set v = 'w' where id = 1; insert into slot values (3, 'x')",
            ),
            // The value that was only passed through belongs to nobody.
            (2, "insert into pair values (4, 't', null)"),
        ])
        .await;
    cluster.expect(ALL, "1:w 3:x 4:t").await;
    let slots = "select string_agg(id || ':' || v, ' ' order by id) from slot";
    cluster.expect(slots, "1:w 3:x").await;
    expect_logged(&cluster, "2 2").await;
    // Without a conflict a swap goes through.
    cluster
        .run(
            2,
            "begin; update pair set a = 't2' where id = 1; update pair set a = 'w' where id = 3; \
             update pair set a = 'x' where id = 1; commit",
        )
        .await;
    cluster.converge().await;
    cluster.expect(ALL, "1:x 3:w 4:t").await;
    expect_logged(&cluster, "2 2").await;
}

#[tokio::test]
async fn nulls_are_equal_where_the_key_says_so_and_equal_numbers_where_they_look_different() {
    let cluster = Cluster::of([15, 15, 15])
        .schema("create table n (id int primary key, v int, unique nulls not distinct (v))")
        .schema("create table d (id int primary key, v int unique, w numeric unique)")
        .start()
        .await;
    cluster
        .apart(&[
            (
                0,
                "insert into n values (1, null); insert into d values (1, null, 1.0)",
            ),
            (
                1,
                "insert into n values (2, null); insert into d values (2, null, 1.00)",
            ),
            (
                2,
                "insert into n values (3, null); insert into d values (3, null, 2)",
            ),
        ])
        .await;
    let ids = |table: &str| format!("select string_agg(id::text, ' ' order by id) from {table}");
    cluster.expect(&ids("n"), "3").await;
    cluster.expect(&ids("d"), "2 3").await;
    expect_logged(&cluster, "1 1 2").await;
}

/// As people have them: whatever the case, and only among rows that are not gone.
const PEOPLE: &str = "create table pair (id int primary key, a text, b varchar(9), gone bool not null default false); \
    create unique index pair_a on pair (lower(a)) where not gone; \
    create unique index pair_b on pair (coalesce(b, '1'), gone)";

#[tokio::test]
async fn keys_on_expressions_and_of_some_rows_are_one_rows_too() {
    let cluster = Cluster::of([15, 15, 18])
        .schema("create table person (id int primary key, mail text, gone_at timestamptz, name varchar(9), kind int)")
        .schema("create unique index person_mail on person (lower(mail)) where gone_at is null")
        .schema("create unique index person_name on person (coalesce(name, 'none')) where kind in (1, 2)")
        .start()
        .await;
    cluster
        .apart(&[
            (1, "insert into person values (1, 'Ann@x.org', null, 'a', 0)"),
            (2, "insert into person values (2, 'ann@X.org', null, 'b', 0)"),
            (
                0,
                "insert into person values (3, 'ann@x.org', now(), 'c', 1), (4, 'ann@x.org', now(), 'd', 3)",
            ),
            (
                1,
                "insert into person values (5, 'e', null, 'none', 1), (6, 'f', null, 'd', 2)",
            ),
            (
                2,
                "insert into person values (7, 'g', null, null, 2), (8, 'h', null, 'd', null)",
            ),
            (
                0,
                "insert into person values (9, 'i', null, 'none', 2), (10, 'G', null, 'j', 3)",
            ),
        ])
        .await;
    let all = "select string_agg(id::text, ' ' order by id) from person";
    cluster.expect(all, "2 3 4 6 8 9 10").await;
    expect_logged(&cluster, "1 5 7").await;
    let line = &cluster.conflicts_at(1).await[0];
    let text = line.everything();
    assert!(text.contains("person_") && text.contains("23505"), "{text}");
    // Back from the gone, where nobody else is known to be, meets who came meanwhile.
    cluster
        .apart(&[
            (0, "delete from person where id = 2"),
            (1, "update person set gone_at = now() where id = 2"),
            (2, "update person set gone_at = now() where id = 2"),
        ])
        .await;
    cluster
        .apart(&[
            (1, "update person set gone_at = null where id = 3"),
            (2, "update person set gone_at = null where id = 4"),
        ])
        .await;
    let gone =
        "select count(*) from anabranch.conflict_history where conflict_type = 'multiple_unique_conflicts'";
    for node in cluster.all() {
        cluster.wait_value(node, gone, "4").await;
        cluster
            .wait_value(node, "select count(*) from anabranch.quarantine", "0")
            .await;
    }
    let there = "select string_agg(id::text, ' ' order by id) from person where lower(mail) = 'ann@x.org' and gone_at is null";
    cluster.expect(there, "4").await;
}

#[tokio::test]
async fn of_two_rows_the_later_has_a_value_also_of_a_key_that_the_daemon_cannot_read() {
    let cluster = Cluster::of([15, 18])
        .schema("create table doc (id int primary key, v text, kind int)")
        .schema("create unique index doc_v on doc (md5(v)) where kind % 2 = 0")
        .policy("[[table]]\nname = \"public.doc\"\nunique_keys = \"pairwise\"")
        .start()
        .await;
    cluster
        .apart(&[
            (0, "insert into doc values (1, 'x', 2), (3, 'y', 1)"),
            (1, "insert into doc values (2, 'x', 4), (4, 'y', 1)"),
        ])
        .await;
    cluster
        .expect("select string_agg(id::text, ' ' order by id) from doc", "2 3 4")
        .await;
    expect_logged(&cluster, "1").await;
}

/// Rows with few values, inserted, moved and deleted at all nodes at once, with daemons that are killed meanwhile.
async fn under_load(schema: &str, seed: u64, kill: bool) {
    let mut cluster = Cluster::of([15, 15, 15]).schema(schema).start().await;
    let has_gone = schema.contains("gone");
    let until = Instant::now() + Duration::from_secs(6);
    let mut clients = Vec::new();
    for node in cluster.all() {
        let session = cluster.session(node).await;
        clients.push(tokio::spawn(async move {
            let mut random = StdRng::seed_from_u64(seed * 10 + node as u64);
            let (mut inserted, mut removed) = (BTreeSet::new(), BTreeSet::new());
            let mut id = (node + 1) * 1_000_000;
            while Instant::now() < until {
                let mut value = || match random.random_range(0..13) {
                    0 => "null".to_owned(),
                    n if n % 2 == 0 => format!("'k{}'", n / 2),
                    n => format!("'K{}'", n / 2),
                };
                let (a, b) = (value(), value());
                // Anybody's row, of those that are there.
                let any = format!("(select id from pair order by hashtext(id::text || '{id}') limit 1)");
                match random.random_range(0..10) {
                    0..5 => {
                        id += 1;
                        let sql = format!("insert into pair values ({id}, {a}, {b})");
                        if session.try_run(&sql).await.is_ok() {
                            inserted.insert(id.to_string());
                        }
                    }
                    5..8 => {
                        let gone = if has_gone && id % 3 == 0 {
                            ", gone = not gone"
                        } else {
                            ""
                        };
                        let _ = session
                            .try_run(&format!("update pair set a = {a}{gone} where id = {any}"))
                            .await;
                    }
                    _ => {
                        let sql = format!("delete from pair where id = {any} returning id::text");
                        if let Ok(rows) = session.try_rows(&sql).await {
                            removed.extend(rows.into_iter().flatten().flatten());
                        }
                    }
                }
            }
            (inserted, removed)
        }));
    }
    let mut random = StdRng::seed_from_u64(seed);
    while kill && Instant::now() + Duration::from_secs(1) < until {
        tokio::time::sleep(Duration::from_millis(random.random_range(200..900))).await;
        let node = random.random_range(0..3);
        cluster.nodes[node].daemon.kill();
        cluster.nodes[node].daemon.start();
    }
    let (mut inserted, mut removed) = (BTreeSet::new(), BTreeSet::new());
    for client in clients {
        let (some, gone) = client.await.expect("the client ends");
        inserted.extend(some);
        removed.extend(gone);
    }
    cluster.converge_within(Duration::from_secs(120)).await;
    let there = "select id::text from pair union select key->>'id' from anabranch.conflict_history";
    for node in cluster.all() {
        cluster
            .wait_value(node, "select count(*) from anabranch.quarantine", "0")
            .await;
        let known: BTreeSet<String> = cluster
            .admin(node)
            .await
            .column(there)
            .await
            .into_iter()
            .collect();
        let lost: Vec<&String> = inserted
            .iter()
            .filter(|id| !known.contains(*id) && !removed.contains(*id))
            .collect();
        assert!(lost.is_empty(), "n{}: {lost:?} of {}", node + 1, inserted.len());
    }
    eprintln!(
        "{} rows, {} removed, {} lines",
        inserted.len(),
        removed.len(),
        cluster.value(0, LINES).await
    );
}

#[tokio::test]
async fn three_nodes_that_give_out_few_values_end_equal_and_account_for_every_row() {
    under_load(PAIRS, 1, false).await;
}

#[tokio::test]
async fn three_nodes_that_give_out_few_values_while_daemons_are_killed_end_equal() {
    under_load(PAIRS, 2, true).await;
}

#[tokio::test]
async fn three_nodes_that_give_out_few_values_of_expressions_and_some_rows_while_daemons_are_killed_end_equal()
 {
    under_load(PEOPLE, 3, true).await;
}
