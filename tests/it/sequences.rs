//! Ids by sequences at every node: they never collide once the sequences are divided.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anabranch_tests::Cluster;
use anabranch_tests::daemon::{anabranch, anabranch_ok};
use anabranch_tests::postgres::DATABASE;
use anabranch_tests::wait::{PATIENCE, until, until_ok};
use tokio::task::JoinHandle;

const SCHEMA: &str = "
    create table ser (id serial primary key, node int not null);
    create table ident (id bigint generated always as identity primary key, node int not null)";

/// Runs `anabranch sequences VERB` at a node; what it said, and whether it ended with 0.
async fn sequences(cluster: &Cluster, node: usize, verb: &str) -> (bool, String) {
    let node = &cluster.nodes[node];
    let admin = node.server.dsn("postgres", DATABASE);
    let config = node.daemon.config_arg();
    let output = anabranch(&["sequences", verb, "--config", config, "--admin-dsn", &admin]).await;
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), said)
}

async fn apply(cluster: &Cluster, node: usize) {
    let (ok, said) = sequences(cluster, node, "apply").await;
    assert!(ok, "{said}");
}

/// Waits until a node has heard from all members that it is safe.
async fn wait_safe(cluster: &Cluster, node: usize) {
    until_ok("its sequences are safe", PATIENCE, async || {
        let (ok, said) = sequences(cluster, node, "status").await;
        if ok { Ok(()) } else { Err(said) }
    })
    .await;
}

/// A client that inserts by both kinds of columns until stopped; the ids that were committed, of each.
struct Client {
    stop: Arc<AtomicBool>,
    ids: JoinHandle<[Vec<i64>; 2]>,
}

async fn insert(cluster: &Cluster, node: usize) -> Client {
    let session = cluster.session(node).await;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let ids = tokio::spawn(async move {
        let mut ids = [Vec::new(), Vec::new()];
        while !stopped.load(Ordering::Relaxed) || ids[0].len() <= 10 {
            for (table, ids) in ["ser", "ident"].iter().zip(&mut ids) {
                let sql = format!("insert into {table} (node) values ({node}) returning id");
                ids.push(session.number(&sql).await);
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        ids
    });
    Client { stop, ids }
}

/// Stops the clients, and checks that no id was given twice and every row is everywhere.
async fn settle(cluster: &Cluster, clients: Vec<Client>) {
    let mut all = [Vec::new(), Vec::new()];
    for client in clients {
        client.stop.store(true, Ordering::Relaxed);
        let ids = client.ids.await.expect("no INSERT fails");
        assert!(
            ids.iter().all(|ids| ids.len() > 10),
            "a client wrote next to nothing"
        );
        for (all, ids) in all.iter_mut().zip(ids) {
            all.extend(ids);
        }
    }
    cluster.converge().await;
    for (table, ids) in ["ser", "ident"].iter().zip(all) {
        let distinct: BTreeSet<i64> = ids.iter().copied().collect();
        assert_eq!(distinct.len(), ids.len(), "{table}: an id was given twice");
        cluster
            .expect(&format!("select count(*) from {table}"), &ids.len().to_string())
            .await;
    }
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn ids_never_collide_under_load_at_every_node_while_another_joins() {
    let mut cluster = Cluster::of([15, 18]).schema(SCHEMA).start().await;
    for node in [0, 1] {
        apply(&cluster, node).await;
    }
    for node in [0, 1] {
        wait_safe(&cluster, node).await;
    }
    let mut clients = Vec::new();
    for node in [0, 0, 1, 1] {
        clients.push(insert(&cluster, node).await);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let joiner = cluster.add_server(18).await;
    cluster.join(joiner, 0).await;
    cluster.nodes[joiner].daemon.start();
    cluster.wait_writable(joiner).await;
    clients.push(insert(&cluster, joiner).await);
    clients.push(insert(&cluster, joiner).await);
    tokio::time::sleep(Duration::from_secs(2)).await;
    for node in cluster.all() {
        wait_safe(&cluster, node).await;
    }
    settle(&cluster, clients).await;
    for (node, offset) in [(0, "1"), (1, "2"), (2, "3")] {
        let offsets = format!(
            "select string_agg(distinct (id % 16)::text, ',') from (select id, node from ser union all select id, node from ident) x
             where node = {node}"
        );
        assert_eq!(cluster.value(0, &offsets).await, offset);
    }
}

#[tokio::test]
async fn a_joiner_takes_no_writes_before_it_has_divided_what_was_made_and_divided_behind_its_cut() {
    const DDL: &str = "[ddl]\nroles = [\"app\"]\n";
    let mut cluster = Cluster::of([15, 18]).schema(SCHEMA).config(DDL).start().await;
    for node in [0, 1] {
        apply(&cluster, node).await;
    }
    let joiner = cluster.add_server(18).await;
    cluster.nodes[joiner]
        .daemon
        .edit_config(|text| text.to_owned() + DDL);
    cluster.join(joiner, 0).await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let statement = "create table later (id serial primary key, node int not null)";
    anabranch_ok(&["ddl", "--config", &config, statement]).await;
    let there = "select (to_regclass('later') is not null)::text";
    cluster.wait_value(1, there, "true").await;
    for node in [0, 1] {
        apply(&cluster, node).await;
    }
    cluster.nodes[joiner].daemon.start();
    until("it says what is to be done", async || {
        let state = cluster.status_or_null(joiner).await["node"]["state"].to_string();
        state.contains("later_id_seq") && state.contains("anabranch sequences apply")
    })
    .await;
    let read_only = "show default_transaction_read_only";
    assert_eq!(cluster.session(joiner).await.value(read_only).await, "on");
    apply(&cluster, joiner).await;
    cluster.wait_writable(joiner).await;
    for node in cluster.all() {
        wait_safe(&cluster, node).await;
    }
    for node in cluster.all() {
        let rows = format!("insert into later (node) select {node} from generate_series(1, 20)");
        cluster.run(node, &rows).await;
    }
    cluster.converge().await;
    cluster.expect("select count(*) from later", "60").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn a_cluster_is_divided_while_one_node_writes_and_then_all_do() {
    let cluster = Cluster::of([15, 18, 15]).schema(SCHEMA).start().await;
    let mut clients = vec![insert(&cluster, 0).await];
    // The ones that do not write go first, so what the first hands out meanwhile goes past what they begin with.
    for node in [1, 2] {
        apply(&cluster, node).await;
    }
    for table in ["ser", "ident"] {
        let rows = cluster.value(0, &format!("select count(*) from {table}")).await;
        let more = format!("select count(*) > {rows} + 64 from {table}");
        cluster.wait_value(0, &more, "t").await;
    }
    apply(&cluster, 0).await;
    wait_safe(&cluster, 0).await;
    for node in [1, 2] {
        cluster
            .wait_value(
                node,
                "select count(*) from anabranch.sequence where increment = 16",
                "6",
            )
            .await;
        let (ok, said) = sequences(&cluster, node, "status").await;
        assert!(!ok && said.contains("node 1 may have"), "{said}");
        apply(&cluster, node).await;
        wait_safe(&cluster, node).await;
        clients.push(insert(&cluster, node).await);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    settle(&cluster, clients).await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_sequence_that_ddl_makes_anew_is_safe_once_every_node_has_divided_it() {
    let cluster = Cluster::of([15, 18])
        .schema(SCHEMA)
        .config("[ddl]\nroles = [\"app\"]\n")
        .start()
        .await;
    for node in [0, 1] {
        apply(&cluster, node).await;
    }
    for node in [0, 1] {
        wait_safe(&cluster, node).await;
    }
    let config = cluster.nodes[0].daemon.config_arg();
    let ddl = async |statement: &str| anabranch_ok(&["ddl", "--config", config, statement]).await;
    let said = ddl("drop table ser").await;
    assert!(!said.contains("sequences apply"), "{said}");
    let said = ddl("create table ser (id serial primary key, node int not null)").await;
    assert!(
        said.contains("public.ser_id_seq") && said.contains("anabranch sequences apply"),
        "{said}"
    );
    apply(&cluster, 0).await;
    // The other takes back what it had said of the one before.
    let said = "select count(*) from anabranch.sequence where sequence_name = 'ser_id_seq' and node_id = 2";
    cluster.wait_value(0, said, "0").await;
    let (ok, status) = sequences(&cluster, 0, "status").await;
    assert!(!ok && status.contains("has not taken its share yet"), "{status}");
    let alarm = async || cluster.status_or_null(1).await["alarms"].to_string();
    until("the other says that it has not divided it", async || {
        alarm()
            .await
            .contains("public.ser_id_seq: divided at other nodes and not here")
    })
    .await;
    apply(&cluster, 1).await;
    for node in [0, 1] {
        wait_safe(&cluster, node).await;
    }
    until("nobody says so any more", async || alarm().await == "[]").await;
    assert_eq!(
        cluster
            .value(0, "select count(*) from anabranch.sequence where increment = 16")
            .await,
        "4"
    );
}

#[tokio::test]
async fn a_sequence_that_went_back_below_its_own_rows_is_lifted() {
    let cluster = Cluster::of([15, 18]).schema(SCHEMA).start().await;
    apply(&cluster, 0).await;
    apply(&cluster, 1).await;
    wait_safe(&cluster, 0).await;
    for _ in 0..5 {
        cluster.run(0, "insert into ser (node) values (0)").await;
        // Values of the other's share, however high, are not this node's to hand out.
        cluster
            .run(1, "insert into ser (node) values (1), (1), (1)")
            .await;
    }
    cluster.converge().await;
    assert!(
        sequences(&cluster, 0, "status").await.0,
        "nothing has gone back yet"
    );
    // As a standby has it that was promoted without the last of what its primary handed out.
    let session = cluster.session(0).await;
    let first = session
        .number("select min(id)::bigint from ser where node = 0")
        .await;
    cluster
        .admin(0)
        .await
        .run(&format!("select setval('ser_id_seq', {first}, true)"))
        .await;
    let (safe, said) = sequences(&cluster, 0, "status").await;
    assert!(!safe && said.contains("in public.ser.id already"), "{said}");
    assert!(
        session
            .try_run("insert into ser (node) values (0)")
            .await
            .is_err(),
        "it handed out what is in a row"
    );
    apply(&cluster, 0).await;
    wait_safe(&cluster, 0).await;
    session.run("insert into ser (node) values (0)").await;
    cluster.converge().await;
    cluster.expect("select count(*) from ser", "21").await;
}

const WIDE: &str = "
    create table ser (id bigserial primary key, node int not null);
    create table ident (id bigint generated always as identity primary key, node int not null)";
const SNOWFLAKE: &str = "[sequences]\nmethod = \"snowflake\"\n";
/// Below every snowflake id.
const LOWEST: i64 = (366 * 86_400_000) << 22;

#[tokio::test]
async fn snowflake_ids_never_collide_while_nodes_change_to_them_one_by_one_and_another_joins() {
    let mut cluster = Cluster::of([15, 18]).schema(WIDE).config(SNOWFLAKE).start().await;
    // The second node hands out small values until it changes; the first none.
    let mut clients = vec![insert(&cluster, 1).await];
    apply(&cluster, 0).await;
    wait_safe(&cluster, 0).await;
    clients.push(insert(&cluster, 0).await);
    clients.push(insert(&cluster, 0).await);
    let (safe, said) = sequences(&cluster, 1, "status").await;
    assert!(!safe && said.contains("is to have snowflake ids"), "{said}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    apply(&cluster, 1).await;
    wait_safe(&cluster, 1).await;
    clients.push(insert(&cluster, 1).await);
    let joiner = cluster.add_server(18).await;
    cluster.nodes[joiner]
        .daemon
        .edit_config(|text| format!("{text}{SNOWFLAKE}"));
    cluster.join(joiner, 0).await;
    cluster.nodes[joiner].daemon.start();
    cluster.wait_writable(joiner).await;
    wait_safe(&cluster, joiner).await;
    clients.push(insert(&cluster, joiner).await);
    clients.push(insert(&cluster, joiner).await);
    tokio::time::sleep(Duration::from_secs(2)).await;
    for node in cluster.all() {
        wait_safe(&cluster, node).await;
    }
    settle(&cluster, clients).await;
    for (node, bits) in [(0, "1"), (1, "2"), (2, "3")] {
        let sql = format!(
            "select string_agg(distinct ((id >> 12) & 1023)::text, ',') from (select id, node from ser union all select id, node from ident) x
             where node = {node} and id >= {LOWEST}"
        );
        assert_eq!(cluster.value(0, &sql).await, bits);
    }
    // And small ones there were, of the node that changed under load.
    let small = format!("select string_agg(distinct node::text, ',') from ser where id < {LOWEST}");
    assert_eq!(cluster.value(0, &small).await, "1");
}

#[tokio::test]
async fn a_partitioned_table_with_snowflake_ids_gets_its_identity_back_when_all_is_removed() {
    let cluster = Cluster::of([18])
        .schema(
            "create table ev (id bigint generated always as identity, at int, primary key (id, at)) partition by range (at);
             create table ev_0 partition of ev for values from (0) to (10)",
        )
        .config(SNOWFLAKE)
        .without_daemons()
        .start()
        .await;
    let identities = "select string_agg(concat_ws(' ', attrelid::regclass, attidentity), ', ' order by attrelid::regclass::text) \
        from pg_attribute where attname = 'id' and attrelid::regclass::text in ('ev', 'ev_0')";
    let before = cluster.value(0, identities).await;
    apply(&cluster, 0).await;
    let id = cluster
        .value(0, "insert into ev (at) values (1) returning id")
        .await;
    assert!(id.parse::<i64>().expect("an id") >= LOWEST, "{id}");
    let node = &cluster.nodes[0];
    let admin = node.server.dsn("postgres", DATABASE);
    let args = [
        "remove",
        "--yes",
        "--config",
        node.daemon.config_arg(),
        "--admin-dsn",
        &admin,
    ];
    anabranch_ok(&args).await;
    assert_eq!(cluster.value(0, identities).await, before);
    assert_eq!(
        cluster
            .value(0, "insert into ev (at) values (2) returning id")
            .await,
        "1"
    );
}

/// Many sessions that draw ids until stopped; how many, and how many of them are distinct.
async fn draw(cluster: &Cluster, clock_s: &[i64]) -> (usize, usize) {
    let stop = Arc::new(AtomicBool::new(false));
    let mut sessions = Vec::new();
    for _ in 0..6 {
        let session = cluster.admin(0).await;
        let stop = Arc::clone(&stop);
        sessions.push(tokio::spawn(async move {
            let mut ids = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                ids.extend(
                    session
                        .column("select anabranch.snowflake() from generate_series(1, 200)")
                        .await,
                );
            }
            ids
        }));
    }
    for _ in 0..5 {
        for &error_s in clock_s {
            cluster.nodes[0].server.set_clock(error_s);
            tokio::time::sleep(Duration::from_millis(60)).await;
        }
    }
    stop.store(true, Ordering::Relaxed);
    let mut all = Vec::new();
    for session in sessions {
        all.extend(session.await.expect("no SELECT fails"));
    }
    let distinct: BTreeSet<&String> = all.iter().collect();
    (all.len(), distinct.len())
}

#[tokio::test]
async fn a_node_gives_no_snowflake_id_twice_while_its_clock_is_set_to_and_fro() {
    let cluster = Cluster::of([15, 18])
        .schema(WIDE)
        .clock(0, 0)
        .without_daemons()
        .start()
        .await;
    let clock_s = [0, -3_600, 1, -1, 0, 3_600, -7_200];
    let (drawn, distinct) = draw(&cluster, &clock_s).await;
    assert!(drawn > 1_000, "{drawn} ids are not many");
    assert_eq!(drawn, distinct, "an id was given twice");
    let admin = cluster.admin(0).await;
    let held =
        "select count(*) from pg_locks where locktype = 'advisory' and classid = 7020382937104375907 >> 32";
    assert_eq!(admin.value(held).await, "0", "a lock was left behind");
    // The same load finds a function that goes by the clock.
    admin
        .run(
            "create or replace function anabranch.snowflake() returns bigint language sql volatile as
             $$ select ((date_part('epoch', clock_timestamp()) * 1000)::bigint << 22) | (1 << 12)
                     | (nextval('anabranch.snowflake_seq') % 4) $$",
        )
        .await;
    let (drawn, distinct) = draw(&cluster, &clock_s).await;
    assert!(distinct < drawn, "this load would find nothing");
}

/// Inserts until the server dies; the ids that were acknowledged.
fn insert_until_death(session: anabranch_tests::session::Session) -> JoinHandle<Vec<String>> {
    tokio::spawn(async move {
        let mut ids = Vec::new();
        loop {
            let sql = "insert into ser (node) select 0 from generate_series(1, 20) returning id";
            match session.try_rows(sql).await {
                Ok(rows) => ids.extend(rows.into_iter().filter_map(|row| row.into_iter().next()?)),
                Err(refused) => {
                    assert!(refused.is_disconnect(), "{refused}");
                    return ids;
                }
            }
        }
    })
}

#[tokio::test]
async fn a_server_killed_while_its_clock_stood_still_gives_no_snowflake_id_twice() {
    // It stands still: what a crash made the server forget, the clock would have it give once more.
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now_s = now.expect("after 1970").as_secs();
    let mut cluster = Cluster::of([15, 18])
        .schema(WIDE)
        .config(SNOWFLAKE)
        .stopped_clock(0, i64::try_from(now_s).expect("a clock"))
        .start()
        .await;
    apply(&cluster, 0).await;
    let mut all = Vec::new();
    for _ in 0..3 {
        let before = cluster.value(0, "select count(*) from ser").await;
        let mut clients = Vec::new();
        for _ in 0..4 {
            clients.push(insert_until_death(cluster.session(0).await));
        }
        // Each client may miss the answer to its last twenty.
        let enough = format!("select count(*) >= {before} + 80 + 80 from ser");
        cluster.wait_value(0, &enough, "t").await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        cluster.nodes[0].server.kill();
        for client in clients {
            all.extend(client.await.expect("nothing but the server fails"));
        }
        cluster.nodes[0].server.start().await;
    }
    cluster.nodes[0].server.set_clock(-86_400);
    let session = cluster.session(0).await;
    session
        .run("insert into ser (node) select 0 from generate_series(1, 1000)")
        .await;
    assert!(all.len() > 200, "{} ids are not many", all.len());
    let distinct: BTreeSet<&String> = all.iter().collect();
    assert_eq!(distinct.len(), all.len(), "an id was given twice");
    cluster.converge().await;
    let acknowledged = format!(
        "select count(*) from ser where id in ({})",
        all.iter().map(String::as_str).collect::<Vec<_>>().join(",")
    );
    cluster.expect(&acknowledged, &all.len().to_string()).await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn ids_of_ranges_never_collide_under_load_at_every_node_while_another_joins() {
    const RANGE: &str = "[sequences]\nmethod = \"range\"\n";
    let mut cluster = Cluster::of([15, 18]).schema(WIDE).config(RANGE).start().await;
    // The second counts from one until it changes, below all ranges.
    let mut clients = vec![insert(&cluster, 1).await];
    apply(&cluster, 0).await;
    let (safe, said) = sequences(&cluster, 0, "status").await;
    assert!(!safe && said.contains("has not taken its range yet"), "{said}");
    clients.push(insert(&cluster, 0).await);
    clients.push(insert(&cluster, 0).await);
    tokio::time::sleep(Duration::from_secs(1)).await;
    apply(&cluster, 1).await;
    wait_safe(&cluster, 0).await;
    wait_safe(&cluster, 1).await;
    let joiner = cluster.add_server(18).await;
    cluster.nodes[joiner]
        .daemon
        .edit_config(|text| format!("{text}{RANGE}"));
    cluster.join(joiner, 0).await;
    cluster.nodes[joiner].daemon.start();
    cluster.wait_writable(joiner).await;
    clients.push(insert(&cluster, joiner).await);
    clients.push(insert(&cluster, joiner).await);
    tokio::time::sleep(Duration::from_secs(2)).await;
    for node in cluster.all() {
        wait_safe(&cluster, node).await;
    }
    settle(&cluster, clients).await;
    for (node, ranges) in [(0, "1"), (1, "0,2"), (2, "3")] {
        let sql = format!(
            "select string_agg(distinct (id >> 40)::text, ',') from (select id, node from ser union all select id, node from ident) x
             where node = {node}"
        );
        assert_eq!(cluster.value(0, &sql).await, ranges);
    }
}
