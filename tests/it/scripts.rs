//! Tables where a script chooses: the row that it chooses is everywhere, and where it fails the last update wins, everywhere,
//! with a line that says so.

use std::fs;

use anabranch_tests::Cluster;
use anabranch_tests::daemon::anabranch_refuses;

const SCHEMA: &str = "create type mood as enum ('calm', 'urgent');
    create table ticket (id int primary key, v text, weight numeric(30, 10), mood mood, at timestamptz default now());
    create table other (id int primary key, v text)";

const POLICY: &str = r#"
    [[table]]
    name = "public.ticket"
    policy = "script"
    script = "ticket.rhai"
"#;

/// The heaviest row; an urgent one weighs most; a delete nothing. Of equals the later.
const SCRIPT: &str = r#"
    fn weight(version) {
        if version.deleted { return 0; }
        let row = version.row;
        if row.v == "loop" { loop {} }
        if row.mood == "urgent" { return 1000; }
        if row.weight == () { 0 } else { row.weight }
    }

    fn resolve(versions) {
        let best = 0;
        for i in 1..versions.len() {
            if weight(versions[i]) >= weight(versions[best]) { best = i; }
        }
        best
    }
"#;

/// Three nodes; every row from 1 to 4 is `base`.
async fn start() -> Cluster {
    let cluster = Cluster::of([15, 15, 18])
        .schema(SCHEMA)
        .policy(POLICY)
        .script("ticket.rhai", SCRIPT)
        .start()
        .await;
    let rows = "insert into ticket select n, 'base', 1, 'calm' from generate_series(1, 4) n; insert into other values (1, 'base')";
    cluster.run(0, rows).await;
    cluster.converge().await;
    cluster
}

const ALL: &str = "select coalesce(string_agg(id || '=' || v, ' ' order by id), 'none') from ticket";

fn set(id: u32, v: &str, weight: &str) -> String {
    format!("update ticket set v = '{v}', weight = {weight} where id = {id}")
}

#[tokio::test]
async fn the_row_that_a_script_chooses_is_everywhere() {
    let cluster = start().await;
    cluster
        .apart(&[
            // By a tenth of a billionth, beyond what a float holds.
            (0, &set(1, "heaviest", "12345678901234.0000000002")),
            (1, &set(1, "middle", "12345678901234.0000000001")),
            (2, &set(1, "latest", "null")),
            (1, "update ticket set mood = 'urgent', v = 'urgent' where id = 2"),
            (0, "delete from ticket where id = 2"),
            (2, &set(3, "lighter than nothing", "-1")),
            (0, "delete from ticket where id = 3"),
            (2, &set(4, "equal", "7")),
            (1, &set(4, "equal and later", "7.000")),
        ])
        .await;
    cluster.expect(ALL, "1=heaviest 2=urgent 4=equal and later").await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 5, "{log:#?}");
    for line in &log {
        let policy = line.0["policy"].as_str().unwrap_or_default();
        assert!(policy.starts_with("script ticket.rhai ("), "{line:#?}");
        assert!(line.0["error"].is_null(), "{line:#?}");
    }
    for lost in ["middle", "latest", "lighter than nothing"] {
        assert!(
            log.iter().any(|line| line.everything().contains(lost)),
            "{lost}: {log:#?}"
        );
    }
    // What comes after is no conflict, and wins.
    cluster.run(2, &set(1, "after", "0")).await;
    cluster.converge().await;
    cluster.expect(ALL, "1=after 2=urgent 4=equal and later").await;
    assert_eq!(cluster.conflicts().await.len(), 5);
}

/// The row whose text has most lines; of equals the one with the greatest amount.
const OWN_TYPES: &str = r#"
    fn weight(version) {
        let row = version.row;
        let lines = row.v.split("\n").len();
        lines * 1000000 + row.amount
    }

    fn resolve(versions) {
        let best = 0;
        for i in 1..versions.len() {
            if weight(versions[i]) > weight(versions[best]) { best = i; }
        }
        best
    }
"#;

#[tokio::test]
async fn a_script_sees_a_domain_as_its_base_type_and_citext_as_text() {
    let schema = "create extension citext; create domain amount as int check (value >= 0); create domain total as amount;
        create table ticket (id int primary key, v citext, amount total)";
    let cluster = Cluster::of([15, 18])
        .schema(schema)
        .policy(POLICY)
        .script("ticket.rhai", OWN_TYPES)
        .start()
        .await;
    cluster
        .run(0, "insert into ticket values (1, 'base', 1), (2, 'base', 1)")
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            // As bytes the lesser one is text, and the greater none.
            (0, "update ticket set v = 'greater', amount = 65536 where id = 1"),
            (1, "update ticket set v = 'later', amount = 16705 where id = 1"),
            (0, "update ticket set v = E'two\nLines', amount = 0 where id = 2"),
            (1, "update ticket set v = 'one line', amount = 99 where id = 2"),
        ])
        .await;
    cluster.expect(ALL, "1=greater 2=two\nLines").await;
    let log = cluster.conflicts().await;
    assert!(
        log.len() == 2 && log.iter().all(|line| line.0["error"].is_null()),
        "{log:#?}"
    );
}

#[tokio::test]
async fn where_a_script_fails_the_last_update_wins_with_a_line_and_the_stream_goes_on() {
    let cluster = start().await;
    cluster
        .apart(&[
            (0, &set(1, "loop", "9")),
            (1, &set(1, "later", "1")),
            (2, &set(1, "last", "2")),
            // Another row of the same table, and another table.
            (1, &set(2, "heavier", "3")),
            (0, &set(2, "lighter", "2")),
            (0, "update other set v = 'passed'"),
        ])
        .await;
    cluster.expect(ALL, "1=last 2=heavier 3=base 4=base").await;
    cluster.expect("select v from other", "passed").await;
    for node in cluster.all() {
        let log = cluster.conflicts_at(node).await;
        let failed: Vec<_> = log.iter().filter(|line| !line.0["error"].is_null()).collect();
        assert!(
            failed.iter().any(|line| line.everything().contains("\"loop\"")),
            "n{}: {log:#?}",
            node + 1
        );
        for line in failed {
            let error = &line.0["error"];
            assert_eq!(error["sqlstate"], "54001", "{line:#?}");
            let message = error["message"].as_str().unwrap_or_default();
            assert!(
                message.contains("operations") && message.contains("last update wins"),
                "{message}"
            );
        }
    }
    cluster.run(0, &set(1, "after", "0")).await;
    cluster.converge().await;
    cluster.expect(ALL, "1=after 2=heavier 3=base 4=base").await;
}

#[tokio::test]
async fn choices_survive_killed_daemons() {
    let mut cluster = start().await;
    for round in 0..3 {
        cluster.isolate_all();
        cluster.run(0, &set(1, &format!("heaviest {round}"), "9")).await;
        cluster.run(1, &set(1, &format!("later {round}"), "8")).await;
        cluster.run(1, &set(2, &format!("put {round}"), "3")).await;
        cluster.run(2, "delete from ticket where id = 2").await;
        cluster.kill_daemons();
        cluster.heal();
        cluster.start_daemons();
        cluster.converge().await;
        let expected = format!("1=heaviest {round} 2=put {round} 3=base 4=base");
        cluster.expect(ALL, &expected).await;
    }
    assert_eq!(cluster.conflicts().await.len(), 6);
}

#[tokio::test]
async fn a_script_that_is_another_or_does_not_compile_is_refused() {
    let mut cluster = start().await;
    let path = cluster.nodes[0].data_dir.with_file_name("ticket.rhai");
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let daemon = ["run", "--config", &config];
    // A write that the others have not got: the former policy has something to decide.
    cluster.isolate_all();
    cluster.run(0, &set(1, "open", "1")).await;
    cluster.journalled(0).await;
    cluster.nodes[0].daemon.stop();
    fs::write(&path, SCRIPT.replace("1000", "999")).expect("write the script");
    let refused = anabranch_refuses(&daemon).await;
    assert!(refused.contains("put the former policy back"), "{refused}");
    fs::write(&path, SCRIPT.replace("let best = 0;", "let best = ;")).expect("write the script");
    for command in [&["run"][..], &["doctor", "--output", "json"]] {
        let refused = anabranch_refuses(&[command, &["--config", &config]].concat()).await;
        assert!(refused.contains("ticket.rhai: line 11, column 20"), "{refused}");
    }
    fs::write(&path, SCRIPT).expect("write the script");
    cluster.nodes[0].daemon.start();
    cluster.heal();
    cluster.converge().await;
    cluster.expect(ALL, "1=open 2=base 3=base 4=base").await;
}
