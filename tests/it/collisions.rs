//! Unique keys that the server alone can compare by, and rows that it refuses: the nodes end equal, nothing waits for ever, and a
//! row that had to go takes its children with it.

use std::time::Duration;

use anabranch_tests::Cluster;
use anabranch_tests::daemon::{anabranch, anabranch_ok, anabranch_refuses};
use anabranch_tests::process::{self, Signal};
use anabranch_tests::wait::{PATIENCE, until};

use crate::claims::expect_logged;

const WAITING: &str = "select count(*) from anabranch.quarantine";

/// All tables may have keys that the daemon cannot compare by.
const PAIRWISE: &str = "[[table]]\nname = \"public.*\"\nunique_keys = \"pairwise\"";

fn ids(table: &str) -> String {
    format!("select coalesce(string_agg(id::text, ' ' order by id), 'none') from {table}")
}

#[tokio::test]
async fn of_two_rows_the_later_stays_where_the_index_has_an_equality_of_its_own() {
    let cluster = Cluster::of([15, 15])
        .schema("create extension citext")
        .schema(
            "create collation anycase (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
        )
        .schema("create table mail (id int primary key, v citext unique)")
        .schema("create table gap (id int primary key, v citext, n int, unique nulls not distinct (v, n))")
        .schema("create table word (id int primary key, v varchar(9), w text)")
        .schema("create unique index word_v on word (v collate anycase)")
        .schema("create unique index word_w on word ((w || '!') collate anycase)")
        .policy(
            "[[table]]\nname = \"public.mail\"\npolicy = \"first_update_wins\"\nunique_keys = \"pairwise\"\n\
             [[table]]\nname = \"public.gap\"\npolicy = \"first_update_wins\"\nunique_keys = \"pairwise\"\n\
             [[table]]\nname = \"public.word\"\nunique_keys = \"pairwise\"",
        )
        .start()
        .await;
    cluster
        .apart(&[
            (0, "insert into mail values (1, 'Foo'), (3, 'bar')"),
            (
                0,
                "insert into gap values (1, 'Foo', null), (3, null, null), (5, null, 7)",
            ),
            (
                0,
                "insert into word values (1, 'Foo', 'x'), (3, 'y', 'Foo'), (5, 'z', 'z')",
            ),
            (1, "insert into mail values (2, 'foo'), (4, 'baz')"),
            (
                1,
                "insert into gap values (2, 'fOO', null), (4, null, null), (6, 'foo', 7)",
            ),
            (1, "insert into word values (2, 'fOO', 'X1'), (4, 'y1', 'fOO')"),
        ])
        .await;
    cluster.expect(&ids("mail"), "2 3 4").await;
    cluster.expect(&ids("gap"), "2 4 5 6").await;
    cluster.expect(&ids("word"), "2 4 5").await;
    cluster.expect(WAITING, "0").await;
    expect_logged(&cluster, "1 1 1 3 3").await;
}

#[tokio::test]
async fn of_two_rows_the_later_stays_by_a_generated_column_and_by_a_type_that_travels_as_text() {
    let cluster = Cluster::of([15, 18])
        .schema(
            "create table person (id int primary key, email text, lower_email text generated always as (lower(email)) stored unique)",
        )
        // What is generated is of the column's own length, and one of several parts.
        .schema(
            "create table place (id int primary key, \"Row\" int, name text, \
             code varchar(3) generated always as (upper(name)::varchar(3)) stored, unique (code, \"Row\"))",
        )
        .schema("create extension isn; create table book (id int primary key, number isbn unique)")
        .policy(PAIRWISE)
        .start()
        .await;
    cluster
        .apart(&[
            (0, "insert into person values (1, 'X@y'), (3, 'a@b'), (5, null)"),
            (0, "insert into place values (1, 1, 'abcd'), (3, 2, 'abcd')"),
            (0, "insert into book values (1, '0-393-04002-X')"),
            (1, "insert into person values (2, 'x@Y'), (4, null)"),
            (1, "insert into place values (2, 1, 'ABCx')"),
            (1, "insert into book values (2, '0-393-04002-X')"),
            // The other way: what came first stays away where it comes in.
            (1, "insert into person values (6, 'Z')"),
            (0, "insert into person values (7, 'z')"),
        ])
        .await;
    cluster.expect(&ids("person"), "2 3 4 5 7").await;
    cluster.expect(&ids("place"), "2 3").await;
    cluster.expect(&ids("book"), "2").await;
    cluster.expect(WAITING, "0").await;
    expect_logged(&cluster, "1 1 1 6").await;
}

const DOCS: &str = "create table doc (id int primary key, v text, w text); \
    create unique index doc_v on doc (md5(v)); create unique index doc_w on doc (md5(w))";

#[tokio::test]
async fn a_row_that_two_rows_go_for_by_two_keys_is_written() {
    let cluster = Cluster::of([15, 18]).schema(DOCS).policy(PAIRWISE).start().await;
    cluster
        .apart(&[
            (
                0,
                "insert into doc values (1, 'x', null), (2, null, 'y'), (3, 'z', 'z')",
            ),
            (1, "insert into doc values (4, 'x', 'y')"),
        ])
        .await;
    cluster.expect(&ids("doc"), "3 4").await;
    cluster.expect(WAITING, "0").await;
    expect_logged(&cluster, "1 2").await;
}

#[tokio::test]
async fn a_row_that_waits_and_then_loses_to_another_waits_no_more() {
    let cluster = Cluster::of([15, 15])
        .schema(DOCS)
        .schema_of(1, "alter table doc add constraint small check (id > 1)")
        .policy(PAIRWISE)
        .config("[apply]\nquarantine_retry_ms = 500\n")
        .start()
        .await;
    cluster.isolate_all();
    cluster.run(0, "insert into doc values (1, 'x', null)").await;
    cluster.run(1, "insert into doc values (2, 'x', null)").await;
    cluster.heal();
    cluster.wait_value(0, &ids("doc"), "2").await;
    cluster.wait_value(1, WAITING, "1").await;
    cluster.run(1, "alter table doc drop constraint small").await;
    cluster.wait_value(1, WAITING, "0").await;
    cluster.converge().await;
    cluster.expect(&ids("doc"), "2").await;
    expect_logged(&cluster, "1").await;
}

/// Parents by a key that the daemon compares by, and by one that it cannot; the children of both go with them.
const FAMILIES: &str = "create table parent (id int primary key, code text unique); \
    create table child (id int primary key, parent int references parent); create index on child (parent); \
    create table owner (id int primary key, code text); create unique index owner_code on owner (md5(code)); \
    create table pet (id int primary key, owner int references owner); create index on pet (owner)";
const DELETE: &str = "[[table]]\nname = \"public.child\"\nforeign_keys = \"delete_child\"\n\
    [[table]]\nname = \"public.pet\"\nforeign_keys = \"delete_child\"\n\
    [[table]]\nname = \"public.owner\"\nunique_keys = \"pairwise\"";
async fn families() -> Cluster {
    let cluster = Cluster::of([15, 15])
        .schema(FAMILIES)
        .policy(DELETE)
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into parent values (1, 'a'), (2, 'b'); insert into child values (1, 1), (2, 2); \
             insert into owner values (1, 'a'), (2, 'b'); insert into pet values (1, 1), (2, 2)",
        )
        .await;
    cluster.converge().await;
    cluster
}

/// The server process that sends the first node's changes to its daemon stops while these are committed, and what the other
/// node has written before or after arrives.
async fn while_blind(cluster: &Cluster, local: &str, remote: &str, local_first: bool) {
    let sender = "select active_pid from pg_replication_slots where slot_name = 'anabranch'";
    let sender = cluster.value(0, sender).await;
    let sender = sender.parse().expect("the daemon reads its slot");
    process::signal(sender, Signal::STOP);
    cluster.isolate_all();
    let writes = [(0, local), (1, remote)];
    let [first, second] = if local_first {
        writes
    } else {
        [writes[1], writes[0]]
    };
    cluster.run(first.0, first.1).await;
    cluster.run(second.0, second.1).await;
    cluster.heal();
    // Long enough for the write to arrive, and to wait for the decoder.
    tokio::time::sleep(Duration::from_secs(3)).await;
    process::signal(sender, Signal::CONT);
}

/// Waits until these tables have rows of these ids at every node, and no others.
async fn expect_left(cluster: &Cluster, left: [(&str, &str); 2]) {
    for node in cluster.all() {
        for (table, rows) in left {
            cluster.wait_value(node, &ids(table), rows).await;
        }
    }
    cluster.converge().await;
    for (table, rows) in left {
        cluster.expect(&ids(table), rows).await;
    }
    cluster.expect(WAITING, "0").await;
}

#[tokio::test]
async fn children_of_a_local_parent_that_is_not_decoded_when_it_goes_go_with_it() {
    let cluster = families().await;
    let local = "insert into parent values (3, 'x'); insert into child values (10, 3)";
    while_blind(&cluster, local, "insert into parent values (4, 'x')", true).await;
    expect_left(&cluster, [("parent", "1 2 4"), ("child", "1 2")]).await;
}

#[tokio::test]
async fn children_of_a_parent_that_is_taken_out_for_one_that_is_not_decoded_go_with_it() {
    let cluster = families().await;
    let local = "insert into parent values (3, 'x'); insert into child values (10, 1)";
    while_blind(
        &cluster,
        local,
        "update parent set code = 'x' where id = 1",
        false,
    )
    .await;
    expect_left(&cluster, [("parent", "2 3"), ("child", "2")]).await;
}

#[tokio::test]
async fn children_of_a_parent_that_goes_by_a_key_that_the_daemon_cannot_read_go_with_it() {
    let cluster = families().await;
    cluster
        .apart(&[
            // A parent that goes where it was written, and one that came in too late.
            (
                0,
                "insert into owner values (3, 'x'); insert into pet values (10, 3)",
            ),
            (1, "insert into owner values (4, 'x')"),
            (1, "update owner set code = 'y' where id = 1"),
            (
                0,
                "insert into owner values (5, 'y'); insert into pet values (11, 1)",
            ),
        ])
        .await;
    expect_left(&cluster, [("owner", "2 4 5"), ("pet", "2")]).await;
}

#[tokio::test]
async fn a_key_that_nodes_may_decide_otherwise_is_refused_or_alarmed_until_it_is_accepted() {
    const FIRST: &str = "[[table]]\nname = \"public.*\"\npolicy = \"first_update_wins\"\n";
    const ACCEPTED: &str = "unique_keys = \"pairwise\"\n";
    const KEY: &str = "create unique index item_v on item (v)";
    const PART: &str = "create table part (id int, n int, v text, primary key (id, n)) partition by list (n); \
        create table part_1 partition of part for values in (1)";
    // Two rows never meet by a key that has all of the primary key in it.
    let mut cluster = Cluster::of([15, 18])
        .schema("create table item (id int primary key, v text, unique (v, id))")
        .schema(PART)
        .config("[ddl]\nroles = [\"app\"]\n")
        .policy(FIRST)
        .without_daemons()
        .start()
        .await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let named = |said: &str| said.contains("\"item_v\"") && !said.contains("item_v_id_key");
    let remedy = "unique_keys = \"pairwise\"";
    // A node that has never run does not begin with it.
    cluster.admin(0).await.run(KEY).await;
    let daemon = &mut cluster.nodes[0].daemon;
    daemon.start();
    assert!(!daemon.wait_exit(PATIENCE).expect("it ends").success());
    let log = daemon.log();
    assert!(log.contains("item_v") && log.contains("unique_keys"), "{log}");
    cluster.admin(0).await.run("drop index item_v").await;
    cluster.start_daemons();
    cluster.converge().await;
    let refused = anabranch_refuses(&["ddl", "--config", &config, KEY]).await;
    assert!(named(&refused) && refused.contains(remedy), "{refused}");
    anabranch_ok(&["policy", "check", "--config", &config]).await;
    // One that is made by hand stops no node, nor does it one that is started again.
    for node in cluster.all() {
        let admin = cluster.admin(node).await;
        admin.run(KEY).await;
        admin.run("alter table part add unique (v, n)").await;
    }
    for node in &mut cluster.nodes {
        node.daemon.stop();
    }
    cluster.start_daemons();
    cluster.converge().await;
    for node in cluster.all() {
        until("the key is alarmed", async || {
            let alarms = cluster.status_or_null(node).await["alarms"].to_string();
            alarms.contains("\"unique_keys\"")
                && alarms.contains("item_v")
                && !alarms.contains("item_v_id_key")
        })
        .await;
    }
    // A partition more has it as well, which is no other key than before.
    let partition = "create table part_2 partition of part for values in (2)";
    anabranch_ok(&["ddl", "--config", &config, partition]).await;
    let partitions = "select count(*) from pg_inherits where inhparent = 'part'::regclass";
    cluster.wait_value(1, partitions, "2").await;
    let said = anabranch(&["doctor", "--config", &config]).await;
    assert!(!said.status.success());
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(named(&said) && said.contains(remedy), "{said}");
    let refused = anabranch_refuses(&["policy", "check", "--config", &config]).await;
    assert!(named(&refused) && refused.contains(remedy), "{refused}");
    // Nor can the policy become another one without a word on it.
    let file = cluster.nodes[0].data_dir.with_file_name("next.toml");
    let next = file.to_str().expect("a path in UTF-8").to_owned();
    let change: [&str; 5] = ["policy", "change", &next, "--config", &config];
    let other = format!("{FIRST}deletes = \"delete_wins\"\n");
    std::fs::write(&file, other).expect("write the policy");
    let refused = anabranch_refuses(&change).await;
    assert!(named(&refused) && refused.contains(remedy), "{refused}");
    let accepted = format!("{FIRST}{ACCEPTED}");
    std::fs::write(&file, &accepted).expect("write the policy");
    anabranch_ok(&["policy", "check", &next, "--config", &config]).await;
    let former = cluster.status(0).await["policy"]["hash"].clone();
    anabranch_ok(&change).await;
    for node in &cluster.nodes {
        let path = node.data_dir.with_file_name("policy.toml");
        std::fs::write(path, &accepted).expect("write the policy");
    }
    for node in cluster.all() {
        until("the new policy alone is in force", async || {
            let policy = cluster.status_or_null(node).await["policy"].clone();
            policy["hash"].is_string() && policy["hash"] != former && policy["change"].is_null()
        })
        .await;
        // That life began without alarms, and looks at keys some seconds later: at foreign ones once it has said what is wrong with the others.
        let now = cluster.value(node, "select clock_timestamp()::text").await;
        let looked = format!(
            "select count(*) > 0 from pg_stat_activity where application_name = 'anabranch:key watch' \
             and query like '%c.conname::text%' and query_start > '{now}'"
        );
        cluster.wait_value(node, &looked, "t").await;
        let alarms = cluster.status(node).await["alarms"].to_string();
        assert!(!alarms.contains("unique_keys"), "{alarms}");
    }
    let said = anabranch(&["doctor", "--config", &config]).await;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("accepted by unique_keys = \"pairwise\""), "{said}");
    cluster.converge().await;
}
