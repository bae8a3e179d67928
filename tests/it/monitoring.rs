//! What monitoring systems and moving sessions are told: `/metrics`, `status --check`, `anabranch wait`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anabranch_tests::Cluster;
use anabranch_tests::daemon::anabranch;
use anabranch_tests::http::request;
use anabranch_tests::postgres::free_port;
use anabranch_tests::proxy::Mode;
use anabranch_tests::wait::{until, until_ok};

/// Exit code and standard output.
async fn run(cluster: &Cluster, node: usize, args: &[&str]) -> (i32, String) {
    let config = cluster.nodes[node].daemon.config_arg();
    let output = anabranch(&[args, &["--config", config]].concat()).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.code().expect("an exit code"), said)
}

/// Every sample by its name and labels; empty while nobody answers.
async fn scrape(address: SocketAddr) -> BTreeMap<String, f64> {
    let Ok(answer) = request(address, "GET", "/metrics", &[], "").await else {
        return BTreeMap::new();
    };
    assert_eq!(answer.status, 200);
    let kind = answer.header("content-type");
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    let lines = answer.body.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').expect("a name and a value");
            (name.to_owned(), value.parse().expect("a number"))
        })
        .collect()
}

async fn until_sample(address: SocketAddr, name: &str, expected: f64) {
    until(&format!("{name} is {expected}"), async || {
        scrape(address).await.get(name) == Some(&expected)
    })
    .await;
}

#[tokio::test]
async fn metrics_and_check_tell_of_alarms_and_links_and_of_a_server_that_is_away() {
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let mut cluster = Cluster::of([15, 15])
        .schema("create table item (id int primary key, n int)")
        .config_of(0, &format!("[metrics]\nlisten = \"{address}\"\n"))
        .start()
        .await;
    cluster.run(0, "insert into item values (1, 1)").await;
    cluster.run(1, "insert into item values (2, 1)").await;
    cluster.converge().await;

    let samples = scrape(address).await;
    assert_eq!(samples.get("anabranch_running"), Some(&1.0));
    assert_eq!(samples.get("anabranch_alarms"), Some(&0.0));
    assert_eq!(samples.get("anabranch_link_up{peer=\"n2\"}"), Some(&1.0));
    for name in [
        "anabranch_applied_transactions_total",
        "anabranch_local_transactions_total",
        "anabranch_journal_bytes",
        "anabranch_applied_lsn_bytes{origin=\"2\"}",
    ] {
        assert!(
            samples.get(name).is_some_and(|&value| value > 0.0),
            "{name}: {samples:?}"
        );
    }
    let other = request(address, "GET", "/", &[], "").await.expect("an answer");
    assert_eq!(other.status, 404);
    assert_eq!(
        run(&cluster, 0, &["status", "--check"]).await,
        (0, "OK: node n1\n".to_owned())
    );

    // A row that this server refuses.
    cluster
        .run(
            0,
            "alter table item add constraint small check (n < 100) not valid",
        )
        .await;
    cluster.run(1, "insert into item values (3, 1000)").await;
    until_sample(address, "anabranch_alarm{name=\"quarantine\"}", 1.0).await;
    until_sample(address, "anabranch_quarantined_rows", 1.0).await;
    let status = cluster.status(0).await;
    assert_eq!(status["alarms"][0]["name"], "quarantine", "{status:#}");
    let (code, said) = run(&cluster, 0, &["status", "--check"]).await;
    assert_eq!(code, 2, "{said}");
    assert!(
        said.starts_with("CRITICAL: node n1: alarm quarantine\n"),
        "{said}"
    );
    cluster.run(0, "alter table item drop constraint small").await;
    until("all is well again", async || {
        run(&cluster, 0, &["status", "--check"]).await.0 == 0
    })
    .await;

    // A link that is down for longer than it may be.
    cluster.partition(&[0], &[1]);
    until_sample(address, "anabranch_link_up{peer=\"n2\"}", 0.0).await;
    until("it is down for too long", async || {
        run(&cluster, 0, &["status", "--check", "--max-down", "1"])
            .await
            .0
            == 2
    })
    .await;
    let (code, said) = run(&cluster, 0, &["status", "--check", "--max-down", "3600"]).await;
    assert_eq!(code, 0, "{said}");
    assert!(scrape(address).await["anabranch_link_down_seconds{peer=\"n2\"}"] > 1.0);
    cluster.heal();
    until_sample(address, "anabranch_link_up{peer=\"n2\"}", 1.0).await;

    // Without the server the endpoint is there, and says so.
    cluster.nodes[0].server.kill();
    until_sample(address, "anabranch_running", 0.0).await;
    assert_eq!(scrape(address).await.get("anabranch_alarms"), None);
    assert_eq!(run(&cluster, 0, &["status", "--check"]).await.0, 2);
    cluster.nodes[0].server.start().await;
    until_sample(address, "anabranch_running", 1.0).await;

    cluster.nodes[0].daemon.stop();
    assert_eq!(scrape(address).await, BTreeMap::new());
    let (code, said) = run(&cluster, 0, &["status", "--check"]).await;
    assert_eq!(code, 2, "{said}");
    assert!(said.starts_with("CRITICAL: node n1: daemon\n"), "{said}");
    let nowhere = anabranch(&["status", "--check", "--config", "/nonexistent.toml"]).await;
    assert_eq!(nowhere.status.code(), Some(3));
}

/// The statement of `docs/monitoring.md` that has these words.
fn of_the_page(words: &str) -> &'static str {
    const PAGE: &str = include_str!("../../docs/monitoring.md");
    let mut found = PAGE
        .lines()
        .filter(|line| line.starts_with("    ") && line.contains(words));
    let statement = found
        .next()
        .unwrap_or_else(|| panic!("no statement has `{words}`"));
    assert_eq!(found.next(), None, "two statements have `{words}`");
    statement.trim()
}

#[tokio::test]
async fn a_session_that_moves_waits_until_it_sees_what_it_saw() {
    let mut cluster = Cluster::of([15, 18])
        .schema("create table item (id int primary key)")
        .start()
        .await;
    cluster.converge().await;
    let here = cluster.session(0).await;
    let there = cluster.session(1).await;
    let seen = async || there.number("select max(id) from item").await;
    // What a session takes along when it moves, such as `1:0/19D2920`.
    let token_of = of_the_page("pg_current_wal_insert_lsn()");
    let lsn_of = |token: &str| token.strip_prefix("1:").expect("timeline 1").to_owned();
    for id in 1..=10 {
        here.run(&format!("insert into item values ({id})")).await;
        // What the node has committed by now, for which it is asked.
        let (code, said) = run(&cluster, 1, &["wait", "--node", "n1", "--timeout", "60"]).await;
        assert_eq!(code, 0, "{said}");
        assert_eq!(seen().await, id, "{said}");
    }
    for id in 11..=15 {
        here.run(&format!("insert into item values ({id})")).await;
        let token = here.value(token_of).await;
        // An LSN alone is of the timeline that is known.
        let position = if id % 2 == 0 { lsn_of(&token) } else { token };
        let (code, said) = run(&cluster, 1, &["wait", "--node", "1", "--position", &position]).await;
        assert_eq!(code, 0, "{said}");
        assert_eq!(seen().await, id, "{said}");
    }

    // By SQL alone.
    here.run("insert into item values (16)").await;
    let token = here.value(token_of).await;
    let sql = of_the_page("(epoch, lsn) >=").replace("0/19D2920", &lsn_of(&token));
    let daemons = cluster.admin(1).await;
    until("progress is there", async || daemons.value(&sql).await == "t").await;
    assert_eq!(seen().await, 16);

    // What cannot come in time, and what nobody can tell.
    cluster.set_lines(&[0], &[1], Mode::Stall);
    here.run("insert into item values (17)").await;
    let token = here.value(token_of).await;
    let wait = ["wait", "--node", "n1", "--position", &token];
    let (code, said) = run(&cluster, 1, &[&wait[..], &["--timeout", "1"]].concat()).await;
    assert_eq!(code, 1, "{said}");
    assert!(said.contains(&token) && said.contains("within 1 s"), "{said}");
    let (code, _) = run(&cluster, 1, &["wait", "--node", "n1", "--timeout", "1"]).await;
    assert_eq!(code, 2);
    cluster.heal();
    let (code, said) = run(&cluster, 1, &wait).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(seen().await, 17);
    for wrong in [
        ["--node", "n7", "--timeout", "1"],
        ["--node", "7", "--position", "0/1"],
        ["--node", "n1", "--position", "7"],
    ] {
        assert_eq!(
            run(&cluster, 1, &[&["wait"], &wrong[..]].concat()).await.0,
            2,
            "{wrong:?}"
        );
    }
    cluster.nodes[1].daemon.stop();
    assert_eq!(run(&cluster, 1, &wait).await.0, 2);
    // What waits is not known either, which is not that nothing waits.
    let (code, said) = run(&cluster, 1, &["ddl", "--output", "json"]).await;
    let said: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!((code, said.get("waiting")), (0, Some(&serde_json::Value::Null)));
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn decoding_that_waits_for_a_standby_that_is_away_is_an_alarm() {
    let mut cluster = Cluster::of([18, 15])
        .schema("create table item (id int primary key, n int)")
        .start()
        .await;
    let admin = cluster.admin(0).await;
    admin
        .run("select pg_create_physical_replication_slot('away', true)")
        .await;
    let server = &mut cluster.nodes[0].server;
    server.set_conf(&["synchronized_standby_slots = 'away'"]);
    server.reload().await;
    cluster.run(0, "insert into item values (1, 1)").await;
    let patience = Duration::from_secs(120);
    let text = until_ok("there is an alarm", patience, async || {
        let status = cluster.status(0).await;
        let alarms = status["alarms"].as_array().cloned().unwrap_or_default();
        let found = alarms.iter().find(|alarm| alarm["name"] == "decoding_stands");
        found.map(|alarm| alarm["text"].to_string()).ok_or(status)
    })
    .await;
    assert!(
        text.contains("WaitForStandbyConfirmation") && text.contains("synchronized_standby_slots"),
        "{text}"
    );
    // What nobody has heard of yet is a lag, although nothing waits to be sent.
    let (code, said) = run(&cluster, 0, &["status", "--check", "--max-lag", "10"]).await;
    assert!(code == 2 && said.contains("decoding_stands"), "{said}");
    let lag = cluster.status(0).await["peers"][0]["lag_seconds"].as_f64();
    assert!(lag.is_some_and(|lag| lag > 20.0), "{lag:?}");
    assert_eq!(cluster.value(1, "select count(*) from item").await, "0");

    let server = &mut cluster.nodes[0].server;
    server.set_conf(&["synchronized_standby_slots = ''"]);
    server.reload().await;
    cluster.converge().await;
    until("it is over", async || {
        cluster.status(0).await["alarms"] == serde_json::json!([])
    })
    .await;
}

#[tokio::test]
async fn a_wait_that_is_pending_does_not_keep_the_daemon_from_beginning_anew() {
    let mut cluster = Cluster::of([15, 15])
        .schema("create table item (id int primary key)")
        .start()
        .await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let waiting = tokio::spawn(async move {
        let wait = ["wait", "--node", "n2", "--position", "1:FF/0", "--timeout", "600"];
        anabranch(&[&wait[..], &["--config", &config]].concat()).await
    });
    // The name that the socket was made under.
    let socket = cluster.nodes[0].data_dir.join("admin.new");
    until("it waits", async || open_connections(&socket) > 0).await;
    cluster.nodes[0].server.kill();
    cluster.nodes[0].server.start().await;
    cluster.run(0, "insert into item values (1)").await;
    cluster.run(1, "insert into item values (2)").await;
    cluster.converge().await;
    assert!(
        cluster.nodes[0].daemon.runs(),
        "{}",
        cluster.nodes[0].daemon.log()
    );
    // It hears that nobody can tell, and need not wait for it.
    let output = waiting.await.expect("the command ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("begins anew"), "{said}");
}

/// How many connections there are to a Unix socket, beside the one that listens.
fn open_connections(socket: &std::path::Path) -> usize {
    let name = socket.display().to_string();
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    // State 03 is connected.
    let of_ours = sockets.lines().filter(|line| line.ends_with(&name));
    of_ours
        .filter(|line| line.split_whitespace().nth(5) == Some("03"))
        .count()
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_trigger_that_fires_for_what_is_applied_is_an_alarm_unless_it_cannot_write_or_shall_stay_here() {
    let cluster = Cluster::of([15, 18])
        .schema("create table item (id int primary key); create table note (id int primary key)")
        .start()
        .await;
    let has_alarm = async || {
        cluster.status(1).await["alarms"]
            .to_string()
            .contains("trigger keep on public.item")
    };
    assert!(!has_alarm().await);
    cluster
        .run(
            1,
            "create function keep() returns trigger language plpgsql as $$ begin insert into public.note values (new.id); return new; end $$;
             create trigger keep after insert on item for each row execute function keep();
             alter table item enable always trigger keep",
        )
        .await;
    until("there is an alarm", has_alarm).await;
    // As it says.
    cluster.run(0, "insert into item values (1)").await;
    cluster.wait_value(1, "select count(*) from note", "1").await;
    cluster.run(1, "insert into note values (2)").await;
    cluster.wait_value(0, "select max(id) from note", "2").await;
    assert_eq!(cluster.value(0, "select count(*) from note").await, "1");
    // It is looked at every ten seconds.
    for (is_over, sql) in [
        (
            true,
            "comment on trigger keep on item is 'audit; anabranch: local'",
        ),
        (
            false,
            "comment on trigger keep on item is null; alter table item enable replica trigger keep",
        ),
        (true, "alter function keep() stable"),
    ] {
        cluster.run(1, sql).await;
        until(sql, async || has_alarm().await != is_over).await;
    }
}
