//! A daemon that is started: before its server, with a role for which much is set, and whose its files are.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use anabranch_tests::Cluster;
use anabranch_tests::daemon::anabranch_ok;
use anabranch_tests::wait::until;

const ITEMS: &str = "create table item (id int primary key, v text)";

/// How often the first daemon has said that it waits, in all its runs.
fn said_to_wait(cluster: &Cluster) -> usize {
    let log = cluster.nodes[0].daemon.log();
    log.matches("waiting for the server").count()
}

#[tokio::test]
async fn a_daemon_that_is_started_before_its_server_waits_for_it() {
    let mut cluster = Cluster::of([15, 18])
        .schema(ITEMS)
        .without_daemons()
        .start()
        .await;
    cluster.nodes[1].daemon.start();
    // One that was set up and never ran, and then one that has.
    for round in 1..=2 {
        cluster.nodes[0].server.stop();
        // A server that was starting up is other news, which it may have told in the round before.
        let before = said_to_wait(&cluster);
        cluster.nodes[0].daemon.start();
        until("it says that it waits", async || {
            said_to_wait(&cluster) == before + 1
        })
        .await;
        // Longer than its pauses: it is still there, and has said so once.
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert!(
            cluster.nodes[0].daemon.runs(),
            "{}",
            cluster.nodes[0].daemon.log()
        );
        assert_eq!(said_to_wait(&cluster), before + 1);
        cluster.nodes[0].server.start().await;
        cluster
            .run(0, &format!("insert into item values ({round}, 'x')"))
            .await;
        cluster.converge().await;
        cluster.nodes[0].daemon.stop();
    }
    // It waits until it is told to end, too.
    cluster.nodes[0].server.stop();
    let before = said_to_wait(&cluster);
    cluster.nodes[0].daemon.start();
    until("it waits", async || said_to_wait(&cluster) == before + 1).await;
    assert!(cluster.nodes[0].daemon.stop().success());
}

#[tokio::test]
async fn what_is_set_for_the_daemons_role_changes_nothing() {
    let mut cluster = Cluster::of([15, 18])
        .schema(
            r#"create type mood as enum ('sad', 'glad');
            create table odd ("k\'y" int primary key, at timestamptz, took interval, n float8, b bytea, x xml, mood mood)"#,
        )
        .start()
        .await;
    let settings = [
        "datestyle = 'SQL, DMY'",
        "intervalstyle = 'sql_standard'",
        "timezone = 'Asia/Tokyo'",
        "extra_float_digits = 0",
        "bytea_output = 'escape'",
        "xmloption = 'document'",
        "quote_all_identifiers = on",
        "standard_conforming_strings = off",
        "search_path = public",
        "default_transaction_isolation = 'serializable'",
        "lock_timeout = '1ms'",
        "statement_timeout = '1ms'",
        "idle_in_transaction_session_timeout = '1ms'",
        "idle_session_timeout = '1ms'",
        "session_replication_role = 'replica'",
        "plan_cache_mode = 'force_custom_plan'",
    ];
    let all: String = settings
        .iter()
        .map(|setting| format!("alter role anabranch set {setting};"))
        .collect();
    cluster.admin(1).await.run(&all).await;
    cluster.nodes[1].daemon.stop();
    cluster.nodes[1].daemon.start();
    let row = r"'2026-01-02 03:04:05.6+00', '1 day 2 hours', 0.1::float8 + 0.2, '\x00ff', 'a<b/>c', 'glad'";
    cluster
        .run(
            0,
            &format!("insert into odd values (1, {row}), (2, {row}), (3, {row})"),
        )
        .await;
    cluster.converge().await;
    cluster
        .run(
            1,
            r#"delete from odd where "k\'y" = 2; update odd set "k\'y" = 4 where "k\'y" = 3"#,
        )
        .await;
    cluster
        .apart(&[
            (
                0,
                r#"update odd set mood = 'sad', x = '<a/><b/>' where "k\'y" = 1"#,
            ),
            (
                1,
                r#"update odd set mood = null, took = '-3 hours' where "k\'y" = 1"#,
            ),
        ])
        .await;
    let conflicts = cluster.conflicts().await;
    let keys: Vec<_> = conflicts.iter().map(|line| &line.0["key"]).collect();
    assert_eq!(keys, [&serde_json::json!({ "k\\'y": 1 })]);
    anabranch_ok(&["verify", "--config", cluster.nodes[0].daemon.config_arg()]).await;
}

fn modes(folder: &Path, into: &mut Vec<(String, u32)>) {
    for entry in std::fs::read_dir(folder).expect("read the folder") {
        let path = entry.expect("read the folder").path();
        let data = match path.symlink_metadata() {
            // What the daemon writes anew has another name at first.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            data => data.expect("look at the file"),
        };
        into.push((path.display().to_string(), data.mode() & 0o777));
        // The row index has files of its own making, in a folder that nobody else may enter.
        if data.is_dir() && !path.ends_with("index") {
            modes(&path, into);
        }
    }
}

#[tokio::test]
async fn what_the_daemon_makes_is_its_own_users_alone() {
    let mut cluster = Cluster::of([15, 15])
        .schema(ITEMS)
        .without_daemons()
        .start()
        .await;
    let dir = cluster.nodes[0].data_dir.clone();
    std::fs::remove_dir(&dir).expect("it is empty");
    cluster.start_daemons();
    cluster.run(0, "insert into item values (1, 'x')").await;
    cluster.converge().await;
    let mode = std::fs::metadata(&dir).expect("the folder").mode() & 0o777;
    assert_eq!(mode, 0o700, "{mode:o}");
    let mut all = Vec::new();
    modes(&dir, &mut all);
    assert!(
        all.iter().any(|(path, _)| path.ends_with("publication.json")),
        "{all:?}"
    );
    for (path, mode) in all {
        assert!(mode & 0o077 == 0 || path.ends_with("/index"), "{path}: {mode:o}");
    }
}
