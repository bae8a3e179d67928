//! Tables taken in with the rows that one node has, and taken out, while everybody writes.

use std::collections::BTreeMap;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anabranch_tests::Cluster;
use anabranch_tests::cluster::{grant, initialise};
use anabranch_tests::daemon::{anabranch, anabranch_ok, program};
use anabranch_tests::load::{self, Load};
use anabranch_tests::postgres::DATABASE;
use anabranch_tests::process;
use anabranch_tests::wait::until;
use serde_json::Value;

const ITEM: &str = "create table item (id int primary key, v text, n int not null default 0, body text)";
/// Some rows have a value that is stored out of line.
const ROWS: &str = "insert into item select i, 'old', 0, case when i % 500 = 0 then \
    (select string_agg(md5(i::text || j), '') from generate_series(1, 200) j) end from generate_series(1, 20000) i";

/// Not so hot that the appliers wait for its rows most of the time.
const LOAD: load::Options = load::Options {
    clients: 1,
    keys: 500,
    delete_one_in: 0,
    pause: Duration::from_millis(15),
    seed: 1,
};

/// `anabranch VERB.. ` with the superuser as administrator: exit code, standard output, and all that it said.
async fn ask(cluster: &Cluster, node: usize, args: &[&str]) -> (i32, String, String) {
    let of = &cluster.nodes[node];
    let dsn = of.server.dsn("postgres", DATABASE);
    let more = ["--config", of.daemon.config_arg(), "--admin-dsn", &dsn];
    let output = anabranch(&[args, &more].concat()).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let all = said.clone() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap(), said, all)
}

/// The report of `tables add` at a node.
async fn add(cluster: &Cluster, node: usize, args: &[&str]) -> (i32, Value) {
    let (code, said, all) = ask(
        cluster,
        node,
        &[&["tables", "add", "--output", "json"], args].concat(),
    )
    .await;
    let report = said
        .lines()
        .last()
        .and_then(|line| serde_json::from_str(line).ok());
    (code, report.unwrap_or_else(|| panic!("no report: {all}")))
}

async fn init(cluster: &Cluster, node: usize) {
    let (code, _, all) = ask(cluster, node, &["init"]).await;
    assert_eq!(code, 0, "{all}");
}

/// Makes a table that no publication has at every node.
async fn create(cluster: &Cluster, sql: &str) {
    cluster.run_everywhere(sql).await;
}

fn problems(report: &Value) -> String {
    report["problems"]
        .as_array()
        .unwrap()
        .iter()
        .map(|text| text.as_str().unwrap())
        .collect::<Vec<_>>()
        .join("\n")
}

/// A client at each node that writes rows of its own: those whose id leaves the node's place when divided by the number of nodes.
struct Writers {
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<BTreeMap<i64, Option<i64>>>>,
}

impl Writers {
    async fn start(cluster: &Cluster, sql: fn(i64, i64) -> String) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = Vec::new();
        let count = cluster.all().len() as i64;
        for node in cluster.all() {
            let session = cluster.session(node).await;
            let stop = Arc::clone(&stop);
            tasks.push(tokio::spawn(async move {
                let (mut acknowledged, mut number, mut at) = (BTreeMap::new(), 0_i64, node as i64);
                // Until something can be said of what all of them wrote.
                while !stop.load(Ordering::Relaxed) || (acknowledged.len() as i64) <= 300 / count {
                    number += 1;
                    at = (at * 7_919 + 13) % 7_000;
                    // Every fifth is a new row.
                    let id = if number % 5 == 0 {
                        100_000 + number * count
                    } else {
                        at * count
                    } + node as i64;
                    let rows = session.rows(&sql(id, number)).await;
                    for row in rows {
                        let value =
                            |at: usize| row.get(at).cloned().flatten().and_then(|text| text.parse().ok());
                        if let Some(id) = value(0) {
                            acknowledged.insert(id, value(1));
                        }
                    }
                    tokio::time::sleep(Duration::from_millis(8)).await;
                }
                acknowledged
            }));
        }
        Self { stop, tasks }
    }

    /// For each row that a client has written last, what it made of it; none for a delete.
    async fn stop(self) -> BTreeMap<i64, Option<i64>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = BTreeMap::new();
        for task in self.tasks {
            all.extend(task.await.unwrap());
        }
        all
    }
}

/// Inserts, updates and deletes; gives the row's id and what it is now.
fn write_item(id: i64, number: i64) -> String {
    if id >= 100_000 {
        format!("insert into item values ({id}, 'new', {number}) returning id, n")
    } else if number % 7 == 0 {
        format!("delete from item where id = {id} returning id, null")
    } else {
        format!("update item set v = 'written', n = {number} where id = {id} returning id, n")
    }
}

async fn expect_acknowledged(cluster: &Cluster, acknowledged: &BTreeMap<i64, Option<i64>>) {
    assert!(
        acknowledged.len() > 300,
        "only {} rows were written",
        acknowledged.len()
    );
    for node in cluster.all() {
        let rows = cluster.admin(node).await.rows("select id, n from item").await;
        let rows: BTreeMap<i64, i64> = rows
            .into_iter()
            .map(|row| {
                (
                    row[0].as_ref().unwrap().parse().unwrap(),
                    row[1].as_ref().unwrap().parse().unwrap(),
                )
            })
            .collect();
        for (id, n) in acknowledged {
            assert_eq!(rows.get(id), n.as_ref(), "row {id} at n{}", node + 1);
        }
    }
}

async fn expect_no_lines_of(cluster: &Cluster, table: &str) {
    for node in cluster.all() {
        let lines = cluster.conflicts_at(node).await;
        let of = lines.iter().find(|line| line.0["table_name"] == table);
        assert!(of.is_none(), "n{}: {of:#?}", node + 1);
    }
}

#[tokio::test]
async fn a_table_is_added_with_its_rows_while_all_nodes_write_it_and_others() {
    let cluster = Cluster::of([15, 15, 18]).schema(load::SCHEMA).start().await;
    create(&cluster, ITEM).await;
    cluster.run(0, ROWS).await;
    for node in [1, 2] {
        init(&cluster, node).await;
    }
    let load = Load::start(&cluster, &[0, 1, 2], LOAD);
    let writers = Writers::start(&cluster, write_item).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (code, report) = add(&cluster, 0, &["item"]).await;
    assert_eq!(code, 0, "{report:#}");
    let item = &report["tables"][0];
    assert_eq!(item["table"], "public.item");
    for node in ["n2", "n3"] {
        let brought = item["brought"][node].as_u64().unwrap();
        assert!((10_000..=20_000).contains(&brought), "{report:#}");
    }
    assert_eq!(item["differences"], serde_json::json!([]), "{report:#}");
    let acknowledged = writers.stop().await;
    let ledger = load.stop().await;
    cluster.converge().await;
    ledger.account(&cluster).await;
    expect_acknowledged(&cluster, &acknowledged).await;
    expect_no_lines_of(&cluster, "item").await;
    cluster
        .expect("select count(*) from item where length(body) = 6400 and id % 500 = 0 or body is null and id % 500 <> 0 or id > 100000",
            &cluster.value(0, "select count(*) from item").await)
        .await;
    // Added once more: nothing is brought.
    let (code, report) = add(&cluster, 2, &["public.it*"]).await;
    assert_eq!(code, 0, "{report:#}");
    assert_eq!(report["tables"][0]["brought"], Value::Null, "{report:#}");
}

/// More than one portion: what the source has alone is read from page to page, not once more for each portion.
#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_table_of_more_rows_than_are_held_at_once_is_read_once_for_what_is_to_be_brought() {
    // A scan stops behind whole pieces of about half of what is held, so after three of them at the latest.
    const MANY: u64 = 500_000;
    let cluster = Cluster::of([15, 15]).start().await;
    create(&cluster, "create table many (id int primary key, v text)").await;
    let rows = format!("insert into many select i, 'old' from generate_series(1, {MANY}) i");
    cluster.run(0, &rows).await;
    // How many rows were read is told by its estimate.
    cluster.run(0, "analyze many").await;
    init(&cluster, 1).await;
    let args = ["tables", "add", "--output", "json", "--rate", "0", "many"];
    let (code, said, all) = ask(&cluster, 0, &args).await;
    assert_eq!(code, 0, "{all}");
    let events: Vec<Value> = said
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let looked = events
        .iter()
        .filter(|event| event["event"] == "step" && event["what"] == "looking which rows are missing");
    assert!(looked.count() > 1, "{all}");
    let report = events.last().unwrap();
    assert_eq!(report["tables"][0]["brought"]["n2"], MANY, "{report:#}");
    let read = |node: &str| -> u64 {
        let reads = events
            .iter()
            .filter(|event| event["event"] == "read" && event["node"] == node);
        reads.map(|event| event["rows"].as_u64().unwrap()).sum()
    };
    // Hashed, read, and compared at the end; at the other only the last.
    assert!(read("n1") < MANY * 7 / 2, "{}", read("n1"));
    assert!(read("n2") < MANY * 3 / 2, "{}", read("n2"));
    cluster
        .expect("select count(*) from many", &MANY.to_string())
        .await;
}

fn spawn_add(cluster: &Cluster, node: usize, args: &[&str]) -> Child {
    spawn_add_to(cluster, node, args, Stdio::null())
}

/// The same; what it says goes to `out`.
fn spawn_add_to(cluster: &Cluster, node: usize, args: &[&str], out: Stdio) -> Child {
    let of = &cluster.nodes[node];
    let dsn = of.server.dsn("postgres", DATABASE);
    let mut command = process::mortal(&program(), "KILL", false);
    command
        .args([
            "tables",
            "add",
            "--config",
            of.daemon.config_arg(),
            "--admin-dsn",
            &dsn,
        ])
        .args(args)
        .stdout(out)
        .stderr(Stdio::null());
    process::spawn(command).expect("start the command")
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn an_add_that_was_killed_goes_on_where_it_was() {
    let mut cluster = Cluster::of([15, 15]).start().await;
    create(&cluster, ITEM).await;
    cluster
        .run(
            0,
            "insert into item select i, 'old' from generate_series(1, 6000) i",
        )
        .await;
    init(&cluster, 1).await;
    let count = "select count(*) from item";
    let mut child = spawn_add(&cluster, 0, &["item", "--rate", "1000"]);
    until("some rows were brought", async || {
        let rows: u64 = cluster.value(1, count).await.parse().unwrap();
        rows > 500
    })
    .await;
    child.kill().unwrap();
    child.wait().unwrap();
    // Nobody asks any more, so nothing is brought any more, as soon as that is noticed.
    let mut rows: u64 = 0;
    until("nothing is brought any more", async || {
        let before = rows;
        tokio::time::sleep(Duration::from_secs(1)).await;
        rows = cluster.value(1, count).await.parse().unwrap();
        rows == before
    })
    .await;
    assert!(rows < 5_500, "{rows} rows are there: it was killed too late");
    // The daemon and its peer die in the middle, too.
    let mut child = spawn_add(&cluster, 0, &["item", "--rate", "1000"]);
    until("more rows were brought", async || {
        let now: u64 = cluster.value(1, count).await.parse().unwrap();
        now > rows
    })
    .await;
    cluster.kill_daemons();
    // Not 1, which would say that nothing was changed.
    assert_eq!(child.wait().unwrap().code(), Some(2));
    cluster.start_daemons();
    cluster.arrive_among(&[0, 1], Duration::from_secs(60)).await;
    let rows: u64 = cluster.value(1, count).await.parse().unwrap();
    assert!(rows < 6_000, "killed too late");
    let (code, report) = add(&cluster, 0, &["item"]).await;
    assert_eq!(code, 0, "{report:#}");
    assert_eq!(report["tables"][0]["brought"]["n2"], 6_000 - rows, "{report:#}");
    cluster.converge().await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn what_stands_in_the_way_of_an_add_is_said_with_what_to_do_and_nothing_is_changed() {
    let mut cluster = Cluster::of([15, 15, 15]).start().await;
    cluster.run(0, ITEM).await;
    cluster
        .run(
            1,
            "create table item (id int primary key, v int, n int not null default 0)",
        )
        .await;
    let published = "select count(*) from pg_publication_tables where tablename = 'item'";
    let (code, report) = add(&cluster, 0, &["item"]).await;
    assert_eq!(code, 1, "{report:#}");
    let said = problems(&report);
    let differs = "is another table at node n2: column body is not there; column v is pg_catalog.text here and pg_catalog.int4 there";
    assert!(said.contains(differs), "{said}");
    assert!(
        said.contains("is not at node n3") && said.contains("create it as it is here"),
        "{said}"
    );

    cluster
        .run(1, "alter table item alter v type text, add body text")
        .await;
    cluster.run(2, ITEM).await;
    init(&cluster, 2).await;
    let (code, report) = add(&cluster, 0, &["item"]).await;
    assert_eq!(code, 1, "{report:#}");
    let said = problems(&report);
    assert!(
        said.contains(
            "is not replicated by node n2: add it to postgres.tables there, and run `anabranch init`"
        ),
        "{said}"
    );
    assert!(!said.contains("n3"), "{said}");

    init(&cluster, 1).await;
    cluster.nodes[2].daemon.stop();
    let (code, report) = add(&cluster, 0, &["item", "--wait", "0"]).await;
    assert_eq!(code, 1, "{report:#}");
    assert!(problems(&report).contains("node n3"), "{report:#}");
    cluster.nodes[2].daemon.start();
    cluster.arrive_among(&[0, 1, 2], Duration::from_secs(60)).await;

    cluster.nodes[0]
        .daemon
        .edit_config(|text| text.replace("\"public.*\"", "\"public.*\", \"!public.i*\""));
    let (code, _, all) = ask(&cluster, 0, &["tables", "add", "item"]).await;
    assert_eq!(code, 1, "{all}");
    assert!(
        all.contains("is excluded by \"!public.i*\"") && all.contains("nothing was changed"),
        "{all}"
    );
    let (code, _, all) = ask(&cluster, 0, &["tables", "add", "nix"]).await;
    assert_eq!(code, 1, "{all}");
    assert!(all.contains("there is no table `nix` here"), "{all}");
    cluster.nodes[0]
        .daemon
        .edit_config(|text| text.replace(", \"!public.i*\"", ""));

    assert_eq!(cluster.value(0, published).await, "0");
    let (code, _, all) = ask(&cluster, 0, &["tables", "add", "item", "--dry-run"]).await;
    assert_eq!(code, 0, "{all}");
    assert!(
        all.contains("ALTER PUBLICATION anabranch ADD TABLE ONLY public.item") && all.contains("ready"),
        "{all}"
    );
    let (code, report) = add(&cluster, 0, &["item", "--dry-run"]).await;
    assert_eq!(code, 0, "{report:#}");
    let sql = report["sql"].as_str().unwrap_or_default();
    assert!(sql.contains("ADD TABLE ONLY public.item"), "{report:#}");
    assert_eq!(cluster.value(0, published).await, "0");
    let (code, report) = add(&cluster, 0, &["item"]).await;
    assert_eq!(code, 0, "{report:#}");
}

#[tokio::test]
async fn an_add_waits_for_a_member_that_is_away_by_name() {
    let mut cluster = Cluster::of([15, 15, 15]).start().await;
    create(&cluster, ITEM).await;
    cluster
        .run(
            0,
            "insert into item select i, 'old' from generate_series(1, 50) i",
        )
        .await;
    init(&cluster, 1).await;
    init(&cluster, 2).await;
    cluster.nodes[2].daemon.stop();
    let events = cluster.dir().join("add.ndjson");
    let file = std::fs::File::create(&events).expect("make a file");
    let mut child = spawn_add_to(&cluster, 0, &["item", "--output", "json"], file.into());
    let said = || std::fs::read_to_string(&events).expect("read the events");
    until("it says for whom it waits", async || {
        said()
            .lines()
            .any(|line| line.contains("\"waiting\"") && line.contains("node n3"))
    })
    .await;
    assert!(child.try_wait().unwrap().is_none(), "{}", said());
    let published = "select count(*) from pg_publication_tables where tablename = 'item'";
    assert_eq!(cluster.value(0, published).await, "0");
    cluster.nodes[2].daemon.start();
    until("it ends", async || child.try_wait().unwrap().is_some()).await;
    assert!(child.wait().unwrap().success(), "{}", said());
    cluster.converge().await;
    cluster.expect("select count(*) from item", "50").await;
}

#[tokio::test]
async fn a_transaction_that_wrote_the_table_before_it_was_replicated_is_waited_for() {
    let cluster = Cluster::of([15, 15]).start().await;
    // Without values that may be stored out of line: no replica identity to be changed, which would wait for it, too.
    create(&cluster, "create table item (id int primary key, v int)").await;
    cluster.run(0, "insert into item values (1, 1), (2, 1)").await;
    init(&cluster, 1).await;
    let early = cluster.session(0).await;
    early
        .run("begin; insert into item values (3, 2); update item set v = 2 where id = 2")
        .await;
    let mut child = spawn_add(&cluster, 0, &["item"]);
    cluster
        .wait_value(
            0,
            "select count(*) from pg_publication_tables where tablename = 'item'",
            "1",
        )
        .await;
    // Who begins now is decoded, and not waited for; nor who begins before it has looked, so once it has: what is seen first may be
    // the look's preparation.
    let looked = "select coalesce(max(query_start)::text, '') from pg_stat_activity where application_name = 'anabranch:verify' \
        and state like 'idle%' and query like '%l.virtualtransaction%'";
    let admin = cluster.admin(0).await;
    let mut first = String::new();
    until("it has looked who writes", async || {
        let at = admin.value(looked).await;
        if first.is_empty() {
            first.clone_from(&at);
        }
        !at.is_empty() && at != first
    })
    .await;
    let late = cluster.session(0).await;
    late.run("begin; insert into item values (4, 3)").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(child.try_wait().unwrap().is_none(), "it does not wait");
    early.run("commit").await;
    let ended = tokio::task::spawn_blocking(move || child.wait().unwrap())
        .await
        .unwrap();
    assert!(ended.success());
    late.run("commit").await;
    cluster.converge().await;
    cluster
        .expect("select string_agg(v::text, ' ' order by id) from item", "1 2 2 3")
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn rows_that_really_were_different_have_a_line_or_are_left_and_said() {
    let cluster = Cluster::of([15, 18]).start().await;
    create(&cluster, ITEM).await;
    cluster
        .run(
            0,
            "insert into item select i, 'old' from generate_series(1, 100) i",
        )
        .await;
    // Before it is replicated there: equal, different, and of its own.
    cluster
        .run(
            1,
            "insert into item values (10, 'old'), (11, 'other'), (500, 'its own')",
        )
        .await;
    init(&cluster, 1).await;
    // And from then on, while the first node is cut off. What it is sent before it publishes the table needs privileges.
    grant(&cluster.nodes[0].server, cluster.nodes[0].daemon.config_arg()).await;
    cluster.partition(&[0], &[1]);
    cluster
        .run(1, "insert into item values (20, 'mine'), (21, 'old')")
        .await;
    let (code, report) = add(&cluster, 0, &["item", "--wait", "0"]).await;
    assert_eq!(code, 1, "{report:#}");
    assert!(problems(&report).contains("node n2"), "{report:#}");
    cluster.heal();
    cluster.arrive_among(&[0, 1], Duration::from_secs(60)).await;
    let (code, report) = add(&cluster, 0, &["item"]).await;
    assert_eq!(code, 1, "{report:#}");
    let item = &report["tables"][0];
    assert_eq!(item["brought"]["n2"], 96, "{report:#}");
    let mut differ: Vec<i64> = item["differences"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["key"]["id"].as_i64().unwrap())
        .collect();
    differ.sort_unstable();
    assert_eq!(differ, [11, 500], "{report:#}");
    let value = "select v from item where id = ";
    assert_eq!(cluster.value(0, &format!("{value}20")).await, "mine");
    assert_eq!(cluster.value(1, &format!("{value}11")).await, "other");

    // The row that went for a write of the other node is in the log; an equal one is not.
    let lines = cluster.conflicts_at(0).await;
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert_eq!(lines[0].kind(), "insert_exists");
    assert_eq!(lines[0].key()["id"], 20);
    assert_eq!(lines[0].local()["v"], "old");
    assert_eq!(lines[0].remote()["v"], "mine");
    assert_eq!(lines[0].0["loser"], "local");
    assert_eq!(lines[0].0["local_origin"], Value::Null);
    assert_eq!(cluster.conflicts_at(1).await.len(), 0);

    // What only the other node has, comes from there.
    let (code, report) = add(&cluster, 1, &["item"]).await;
    assert_eq!(code, 1, "{report:#}");
    assert_eq!(report["tables"][0]["brought"]["n1"], 1, "{report:#}");
    let config = cluster.nodes[0].daemon.config_arg();
    anabranch_ok(&["repair", "--from", "n1", "item", "--config", config]).await;
    cluster
        .expect(
            "select count(*) || ' ' || min(v) from item where id in (11, 500) or v = 'old'",
            "100 its own",
        )
        .await;
}

#[tokio::test]
async fn a_row_that_a_trigger_takes_away_again_is_left_with_the_reason_and_the_add_ends() {
    let cluster = Cluster::of([15, 15]).start().await;
    create(&cluster, ITEM).await;
    cluster.run(0, "insert into item values (1, 'a'), (2, 'b')").await;
    init(&cluster, 1).await;
    cluster
        .run(
            1,
            "create function take() returns trigger language plpgsql as $$ begin delete from public.item where id = new.id; return null; end $$;
             create trigger take after insert on item for each row when (new.id = 1) execute function take();
             alter table item enable always trigger take",
        )
        .await;
    let (code, report) = add(&cluster, 0, &["item"]).await;
    assert_eq!(code, 1, "{report:#}");
    let item = &report["tables"][0];
    assert_eq!(item["brought"]["n2"], 1, "{report:#}");
    let differences = item["differences"].as_array().unwrap();
    assert_eq!(differences.len(), 1, "{report:#}");
    assert_eq!(differences[0]["key"]["id"], 1, "{report:#}");
    let actions = differences[0]["actions"].to_string();
    assert!(actions.contains("did not become what was written"), "{report:#}");
    assert_eq!(cluster.value(1, "select string_agg(v, '') from item").await, "b");
}

#[tokio::test]
async fn counters_count_every_increment_once_while_their_table_is_added() {
    let policy = "[[table]]\nname = \"public.item\"\ncolumns = { n = \"delta\" }\n";
    let cluster = Cluster::of([15, 15, 15]).policy(policy).start().await;
    create(&cluster, ITEM).await;
    cluster
        .run(
            0,
            "insert into item select i, 'old', 1000 from generate_series(1, 3000) i",
        )
        .await;
    for node in [1, 2] {
        init(&cluster, node).await;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = Vec::new();
    for node in cluster.all() {
        let (session, stop) = (cluster.session(node).await, Arc::clone(&stop));
        tasks.push(tokio::spawn(async move {
            let (mut added, mut at) = (0_u64, node as u64);
            while !stop.load(Ordering::Relaxed) || added <= 100 {
                at = (at * 7_919 + 13) % 3_000;
                let sql = format!(
                    "update item set n = n + 1 where id in ({}, {}) returning id",
                    at + 1,
                    at % 20 + 1
                );
                added += session.rows(&sql).await.len() as u64;
                tokio::time::sleep(Duration::from_millis(8)).await;
            }
            added
        }));
    }
    let (code, report) = add(&cluster, 0, &["item"]).await;
    assert_ne!(code, 1, "{report:#}");
    tokio::time::sleep(Duration::from_millis(500)).await;
    stop.store(true, Ordering::Relaxed);
    let mut added = 0;
    for task in tasks {
        added += task.await.unwrap();
    }
    assert!(added > 300, "{added} increments");
    cluster.converge().await;
    cluster
        .expect("select sum(n)::text from item", &(3_000_000 + added).to_string())
        .await;
    expect_no_lines_of(&cluster, "item").await;
}

#[tokio::test]
async fn a_table_is_removed_while_the_others_write_it_and_nothing_else_is_touched() {
    let mut cluster = Cluster::of([15, 15, 18])
        .schema(load::SCHEMA)
        .schema(ITEM)
        .schema("create table other (id int primary key)")
        .start()
        .await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    let identity = "select relreplident::text from pg_class where relname = 'item'";
    assert_eq!(cluster.value(0, identity).await, "f");
    let load = Load::start(&cluster, &[0, 1, 2], LOAD);
    let writers = Writers::start(&cluster, write_item).await;
    let (code, _, all) = ask(&cluster, 0, &["tables", "remove", "item"]).await;
    assert_eq!(code, 1, "{all}");
    assert!(
        all.contains("add \"!public.item\" to postgres.tables") && all.contains("nothing was changed"),
        "{all}"
    );
    let published = "select count(*) from pg_publication_tables where tablename = 'item'";
    assert_eq!(cluster.value(0, published).await, "1");

    cluster.nodes[0]
        .daemon
        .edit_config(|text| text.replace("\"public.*\"", "\"public.*\", \"!public.item\""));
    // A row that could not be written here is nobody's concern any more.
    cluster
        .run(0, "alter table item add constraint small check (v <> 'refused')")
        .await;
    cluster.run(1, "insert into item values (-1, 'refused')").await;
    cluster
        .wait_value(0, "select count(*) from anabranch.quarantine", "1")
        .await;
    let (code, _, all) = ask(&cluster, 0, &["tables", "remove", "item"]).await;
    assert_eq!(code, 0, "{all}");
    assert!(
        all.contains("not replicated any more at this node: public.item"),
        "{all}"
    );
    assert_eq!(cluster.value(0, published).await, "0");
    assert_eq!(cluster.value(0, identity).await, "d");
    assert_eq!(
        cluster
            .value(0, "select count(*) from anabranch.quarantine")
            .await,
        "0"
    );
    let rows = "select count(*) from item where id <= 20000";
    let kept: u64 = cluster.value(0, rows).await.parse().unwrap();
    assert!(kept > 10_000, "{kept}");

    // From here on what is written to it stays where it is written; everything else goes on.
    cluster.run(0, "insert into item values (-10, 'here')").await;
    cluster.run(1, "insert into item values (-11, 'there')").await;
    cluster
        .run(
            1,
            "begin; insert into item values (-12, 'there'); insert into other values (12); commit",
        )
        .await;
    cluster.arrive_among(&[0, 1, 2], Duration::from_secs(60)).await;
    assert_eq!(
        cluster
            .value(0, "select string_agg(id::text, ' ') from item where id < -1")
            .await,
        "-10"
    );
    assert_eq!(
        cluster
            .value(
                2,
                "select string_agg(id::text, ' ' order by id) from item where id < -1"
            )
            .await,
        "-12 -11"
    );
    cluster.expect("select count(*) from other", "1").await;
    let status = cluster.status(0).await;
    assert!(
        status["apply"]["passed_over"]["public.item"].as_u64().unwrap() > 1,
        "{status:#}"
    );

    // Also over a restart, and with the table gone.
    writers.stop().await;
    cluster.nodes[0].daemon.kill();
    cluster.run(0, "drop table item").await;
    cluster.run(1, "update item set v = 'later' where id % 10 = 0; truncate item; insert into item values (1, 'again')").await;
    cluster.nodes[0].daemon.start();
    let ledger = load.stop().await;
    cluster.arrive_among(&[0, 1, 2], Duration::from_secs(60)).await;
    ledger.account(&cluster).await;
    assert_eq!(
        cluster.value(2, "select string_agg(v, ' ') from item").await,
        "again"
    );
    assert_eq!(
        cluster
            .value(0, "select count(*) from anabranch.quarantine")
            .await,
        "0"
    );
    until("no alarm stands", async || {
        cluster.status(0).await["alarms"] == serde_json::json!([])
    })
    .await;

    // And in again.
    cluster.nodes[0]
        .daemon
        .edit_config(|text| text.replace(", \"!public.item\"", ""));
    cluster.run(0, ITEM).await;
    init(&cluster, 0).await;
    assert_eq!(
        cluster
            .value(0, "select count(*) from anabranch.removed_table")
            .await,
        "0"
    );
    let (code, report) = add(&cluster, 1, &["item"]).await;
    assert_eq!(code, 0, "{report:#}");
    cluster.run(0, "insert into item values (2, 'from n1')").await;
    cluster.run(2, "insert into item values (3, 'from n3')").await;
    until("it is replicated again", async || {
        cluster
            .values("select count(*) from item")
            .await
            .iter()
            .all(|count| count == "3")
    })
    .await;
}

/// Texts of a table's rows, in order: `1=here 2=there`.
fn all(table: &str) -> String {
    format!("select coalesce(string_agg(id || '=' || v, ' ' order by id), '') from {table}")
}

/// Waits until a node has applied what the others have committed.
async fn arrive(cluster: &Cluster) {
    cluster
        .arrive_among(&cluster.all(), Duration::from_secs(60))
        .await;
}

/// Lets the daemon's role of a node write every table, also those to come: what it may not write it could not overwrite.
async fn grant_all(cluster: &Cluster, node: usize) {
    // A node that has just joined is read only for a while.
    let sql = "begin read write; grant all on all tables in schema public to anabranch; \
        alter default privileges for role app in schema public grant all on tables to anabranch; commit";
    cluster.admin(node).await.run(sql).await;
}

/// A row of `tables list`.
async fn listed(cluster: &Cluster, node: usize, table: &str) -> Value {
    let (code, said, all) = ask(cluster, node, &["tables", "list", "--output", "json"]).await;
    assert_eq!(code, 0, "{all}");
    let list: Value = serde_json::from_str(&said).expect("JSON");
    let tables = list["tables"].as_array().expect("tables");
    let found = tables.iter().find(|row| row["table"] == table).cloned();
    found.unwrap_or_else(|| panic!("{table} is not listed: {list:#}"))
}

#[tokio::test]
async fn a_table_that_a_node_never_chose_is_its_own_there_until_it_is_chosen_and_added() {
    const SESSION: &str = "create table session (id int primary key, v text)";
    const PARTS: &str = "create table part (id int, v text, primary key (id)) partition by range (id); \
        create table part_1 partition of part for values from (0) to (100); \
        create table kept (id int, v text, primary key (id)) partition by range (id); \
        create table kept_1 partition of kept for values from (0) to (100)";
    const LIST: &str = "tables = [\"public.*\", \"!public.session\", \"!public.part*\", \"!public.made\"]";
    let mut cluster = Cluster::of([15, 15, 18])
        .schema("create table other (id int primary key)")
        .schema(SESSION)
        .schema(PARTS)
        .bare()
        .without_daemons()
        .start()
        .await;
    cluster.nodes[1]
        .daemon
        .edit_config(|text| text.replace("tables = [\"public.*\"]", LIST));
    for node in &cluster.nodes {
        initialise(node).await;
    }
    grant_all(&cluster, 1).await;
    cluster.start_daemons();
    cluster
        .run(1, "insert into session values (1, 'here'), (2, 'here')")
        .await;
    cluster
        .run(
            0,
            "begin; insert into session values (1, 'there'), (3, 'there'); insert into part values (1, 'there'); \
             insert into kept values (1, 'there'); insert into other values (1); commit",
        )
        .await;
    arrive(&cluster).await;
    assert_eq!(cluster.value(1, &all("session")).await, "1=here 2=here");
    assert_eq!(cluster.value(2, &all("session")).await, "1=there 3=there");
    assert_eq!(cluster.value(1, &all("part")).await, "");
    // By its partitioned table it is chosen and published.
    cluster.expect(&all("kept"), "1=there").await;
    cluster.expect("select count(*) from other", "1").await;
    let passed = cluster.status(1).await["apply"]["passed_over"].clone();
    assert_eq!(
        passed,
        serde_json::json!({ "public.session": 2, "public.part_1": 1 })
    );
    assert_eq!(
        cluster.status(0).await["apply"]["passed_over"],
        serde_json::json!({})
    );
    let (_, said, _) = ask_doctor(&cluster, 1).await;
    assert!(
        said.contains("public.session") && said.contains("is sent by another node and not chosen"),
        "{said}"
    );
    let row = listed(&cluster, 1, "public.session").await;
    assert_eq!(
        (&row["state"], &row["passed_over"]),
        (&"not_replicated".into(), &true.into()),
        "{row:#}"
    );
    assert_eq!(row["why"], "excluded by \"!public.session\"");
    assert_eq!(listed(&cluster, 1, "public.other").await["passed_over"], false);
    cluster.expect_no_conflict().await;

    // Over a kill, with a truncate among what comes.
    cluster.nodes[1].daemon.kill();
    cluster
        .run(
            2,
            "update session set v = 'later'; truncate session, other; insert into session values (2, 'later')",
        )
        .await;
    cluster.nodes[1].daemon.start();
    arrive(&cluster).await;
    assert_eq!(cluster.value(1, &all("session")).await, "1=here 2=here");
    cluster.expect("select count(*) from other", "0").await;

    // One that is not here at all waits in the quarantine; once it is, what was refused is nobody's concern.
    for node in [0, 2] {
        cluster
            .run(node, "create table made (id int primary key, v text)")
            .await;
        init(&cluster, node).await;
    }
    cluster.run(0, "insert into made values (1, 'there')").await;
    cluster
        .wait_value(
            1,
            "select string_agg(sqlstate, ' ') from anabranch.quarantine",
            "42P01",
        )
        .await;
    cluster
        .run(
            1,
            "create table made (id int primary key, v text); insert into made values (2, 'here')",
        )
        .await;
    // At once: nobody has looked since it was made.
    cluster
        .run(
            0,
            "update made set v = 'later'; insert into made values (2, 'there'); truncate made",
        )
        .await;
    cluster
        .run(0, "insert into made values (2, 'there'), (3, 'there')")
        .await;
    cluster
        .wait_value(1, "select count(*) from anabranch.quarantine", "0")
        .await;
    arrive(&cluster).await;
    assert_eq!(cluster.value(1, &all("made")).await, "2=here");
    until("no alarm stands, and no line is open", async || {
        cluster.status(1).await["alarms"] == serde_json::json!([])
            && cluster
                .admin(1)
                .await
                .value("select count(*) from anabranch.conflict_open")
                .await
                == "0"
    })
    .await;

    // Chosen, and added with the rows of the others.
    cluster.run(1, "truncate session; delete from made").await;
    cluster.nodes[1]
        .daemon
        .edit_config(|text| text.replace(LIST, "tables = [\"public.*\"]"));
    init(&cluster, 1).await;
    let (code, report) = add(&cluster, 0, &["session", "made", "part"]).await;
    assert_eq!(code, 0, "{report:#}");
    cluster.run(1, "insert into session values (9, 'n2')").await;
    cluster.run(0, "insert into session values (8, 'n1')").await;
    arrive(&cluster).await;
    cluster.expect(&all("session"), "2=later 8=n1 9=n2").await;
    cluster.expect(&all("made"), "2=there 3=there").await;
    cluster.expect(&all("part"), "1=there").await;
    cluster.nodes[1].daemon.kill();
    cluster.nodes[1].daemon.start();
    cluster.run(0, "update session set v = 'end' where id = 9").await;
    cluster.converge().await;
    cluster.expect(&all("session"), "2=later 8=n1 9=end").await;
}

/// `anabranch doctor`, which takes no administrator.
async fn ask_doctor(cluster: &Cluster, node: usize) -> (i32, String, String) {
    let config = cluster.nodes[node].daemon.config_arg();
    let output = anabranch(&["doctor", "--config", config]).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let all = said.clone() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap(), said, all)
}

#[tokio::test]
async fn rows_behind_the_statement_that_makes_a_table_stay_away_where_it_is_not_chosen() {
    let mut cluster = Cluster::of([15, 15])
        .schema("create table other (id int primary key)")
        .config("[ddl]\nroles = [\"app\"]\n")
        .bare()
        .without_daemons()
        .start()
        .await;
    cluster.nodes[1]
        .daemon
        .edit_config(|text| text.replace("\"public.*\"", "\"public.*\", \"!public.made\""));
    for node in &cluster.nodes {
        initialise(node).await;
    }
    grant_all(&cluster, 1).await;
    cluster.start_daemons();
    cluster
        .run(
            0,
            "begin; insert into other values (1); \
             select anabranch.replicate_ddl('create table public.made (id int primary key, v text)'); \
             insert into made values (1, 'there'); insert into other values (2); commit",
        )
        .await;
    cluster.run(0, "insert into made values (2, 'there')").await;
    arrive(&cluster).await;
    assert_eq!(cluster.value(1, &all("made")).await, "");
    cluster.expect("select count(*) from other", "2").await;
    cluster
        .expect("select count(*) from anabranch.quarantine", "0")
        .await;
    let status = cluster.status(1).await;
    assert_eq!(status["apply"]["passed_over"]["public.made"], 2, "{status:#}");
}

#[tokio::test]
async fn rows_of_a_partition_are_passed_over_no_more_from_the_statement_on_that_attaches_it() {
    let mut cluster = Cluster::of([15, 18])
        .schema(
            "create table part (id int primary key, v text) partition by range (id); \
             create table piece (id int primary key, v text)",
        )
        .config("[ddl]\nroles = [\"app\"]\n")
        .bare()
        .without_daemons()
        .start()
        .await;
    for node in &cluster.nodes {
        node.daemon
            .edit_config(|text| text.replace("\"public.*\"", "\"public.part\", \"public.marker\""));
        initialise(node).await;
    }
    cluster.start_daemons();
    arrive(&cluster).await;
    cluster
        .run(
            0,
            "select anabranch.replicate_ddl('alter table public.part attach partition public.piece for values from (0) to (10)')",
        )
        .await;
    let partitions = "select count(*) from pg_inherits where inhparent = 'part'::regclass";
    cluster.wait_value(1, partitions, "1").await;
    // Before the node that said it has had time for a look at its catalog.
    cluster.run(1, "insert into part values (1, 'there')").await;
    cluster.run(0, "insert into part values (2, 'here')").await;
    arrive(&cluster).await;
    cluster.expect(&all("part"), "1=there 2=here").await;
}

#[tokio::test]
async fn a_table_that_a_node_had_removed_and_that_ddl_makes_anew_is_replicated_there() {
    let cluster = Cluster::of([15, 18])
        .schema("create table item (id int primary key, v text); create table other (id int primary key)")
        .config("[ddl]\nroles = [\"app\"]\n")
        .start()
        .await;
    let daemon = &cluster.nodes[1].daemon;
    daemon.edit_config(|text| text.replace("\"public.*\"", "\"public.*\", \"!public.item\""));
    let (code, _, said) = ask(&cluster, 1, &["tables", "remove", "item"]).await;
    assert_eq!(code, 0, "{said}");
    cluster.run_everywhere("drop table item").await;
    // Chosen again, while there is no such table.
    daemon.edit_config(|text| text.replace(", \"!public.item\"", ""));
    init(&cluster, 1).await;
    cluster
        .run(
            0,
            "begin; select anabranch.replicate_ddl('create table public.item (id int primary key, v text)'); \
             insert into item values (1, 'there'); commit",
        )
        .await;
    arrive(&cluster).await;
    cluster.run(1, "insert into item values (2, 'here')").await;
    cluster.run(0, "insert into item values (3, 'there')").await;
    arrive(&cluster).await;
    cluster.expect(&all("item"), "1=there 2=here 3=there").await;
}

#[tokio::test]
async fn a_table_that_was_taken_out_of_the_publication_by_hand_goes_on_being_applied_until_it_is_removed() {
    let mut cluster = Cluster::of([15, 15])
        .schema("create table item (id int primary key, v text)")
        .start()
        .await;
    // Not chosen any more, and still published.
    cluster.nodes[1]
        .daemon
        .edit_config(|text| text.replace("\"public.*\"", "\"public.*\", \"!public.item\""));
    cluster.nodes[1].daemon.stop();
    cluster.nodes[1].daemon.start();
    cluster.run(0, "insert into item values (1, 'a')").await;
    arrive(&cluster).await;
    cluster.expect(&all("item"), "1=a").await;
    cluster
        .admin(1)
        .await
        .run("alter publication anabranch drop table item")
        .await;
    until("the alarm stands", async || {
        cluster.status(1).await["alarms"]
            .as_array()
            .is_some_and(|alarms| alarms.iter().any(|alarm| alarm["name"] == "publication"))
    })
    .await;
    // More than a look.
    tokio::time::sleep(Duration::from_secs(3)).await;
    cluster.run(0, "insert into item values (2, 'b')").await;
    arrive(&cluster).await;
    cluster.expect(&all("item"), "1=a 2=b").await;
    assert_eq!(listed(&cluster, 1, "public.item").await["passed_over"], false);
    cluster.nodes[1].daemon.kill();
    cluster.nodes[1].daemon.start();
    cluster.run(0, "insert into item values (3, 'c')").await;
    arrive(&cluster).await;
    cluster.expect(&all("item"), "1=a 2=b 3=c").await;
    let (code, _, said) = ask(&cluster, 1, &["tables", "remove", "item"]).await;
    assert_eq!(code, 0, "{said}");
    cluster.run(0, "insert into item values (4, 'd')").await;
    arrive(&cluster).await;
    assert_eq!(cluster.value(1, &all("item")).await, "1=a 2=b 3=c");
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_table_that_the_donor_has_removed_is_apart_at_the_joiner_too_until_both_take_it_in() {
    let mut cluster = Cluster::of([15, 15])
        .schema("create table other (id int primary key)")
        .schema("create table orders (id int primary key, v text)")
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into orders values (1, 'a'), (2, 'a'); insert into other values (1)",
        )
        .await;
    cluster.converge().await;
    let exclude = |text: &str| text.replace("\"public.*\"", "\"public.*\", \"!public.orders\"");
    cluster.nodes[0].daemon.edit_config(exclude);
    let (code, _, said) = ask(&cluster, 0, &["tables", "remove", "orders"]).await;
    assert_eq!(code, 0, "{said}");
    let delta = cluster.add_server(15).await;
    cluster.nodes[delta].daemon.edit_config(exclude);
    cluster.join(delta, 0).await;
    cluster
        .run(1, "update orders set v = 'before' where id = 1")
        .await;
    grant_all(&cluster, delta).await;
    cluster.nodes[delta].daemon.start();
    cluster.wait_writable(delta).await;
    cluster
        .run(
            1,
            "insert into orders values (3, 'b'); delete from orders where id = 2",
        )
        .await;
    arrive(&cluster).await;
    assert_eq!(cluster.value(delta, &all("orders")).await, "");
    assert_eq!(cluster.value(0, &all("orders")).await, "1=a 2=a");
    assert_eq!(
        cluster
            .value(delta, "select count(*) from anabranch.quarantine")
            .await,
        "0"
    );

    for node in [0, delta] {
        cluster.nodes[node]
            .daemon
            .edit_config(|text| text.replace(", \"!public.orders\"", ""));
        cluster.run(node, "truncate orders").await;
        init(&cluster, node).await;
    }
    let (code, report) = add(&cluster, 1, &["orders"]).await;
    assert_eq!(code, 0, "{report:#}");
    cluster.run(delta, "insert into orders values (4, 'delta')").await;
    cluster.converge().await;
    cluster.expect(&all("orders"), "1=before 3=b 4=delta").await;
}
