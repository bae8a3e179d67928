//! Reviewing the conflict log from the command line, on lines written by hand.

use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio_postgres::Client;

use crate::server::value;
use crate::{Node, both};

/// A node with a table and a row; what the row was before somebody else's write won is in the log.
async fn with_a_conflict() -> (Node, Client) {
    let node = Node::new().await;
    let admin = node.server.admin().await;
    admin
        .batch_execute(
            "CREATE TABLE item (id int PRIMARY KEY, v text, n numeric, d text GENERATED ALWAYS AS (v || '!') STORED);
             INSERT INTO item VALUES (7, 'there', 12345678901234567890.10)",
        )
        .await
        .unwrap();
    node.set_up().await;
    line(
        &admin,
        1,
        "{\"id\": 7}",
        "update_origin_differs",
        r#"{"id": 7, "v": "here", "n": 12345678901234567890.20, "d": "here!"}"#,
        r#"{"id": 7, "v": "there", "n": 12345678901234567890.10, "d": "there!"}"#,
        "{v,n,d}",
    )
    .await;
    (node, admin)
}

/// Writes a line in which the local write lost.
async fn line(admin: &Client, n: u32, key: &str, kind: &str, local: &str, remote: &str, lost: &str) {
    admin
        .batch_execute(&format!(
            "INSERT INTO anabranch.conflict_history (conflict_id, node, node_id, schema_name, table_name, key, conflict_type,
                 policy, policy_version, conflict_resolution, loser, local_tuple, remote_tuple, applied_tuple, changed_columns,
                 lost_columns, local_origin, remote_origin, local_stamp, remote_stamp, local_lsn, remote_lsn, local_saw,
                 remote_saw, transaction_group)
             VALUES ('{n:08x}-0000-5000-8000-000000000000', 'a', 1, 'public', 'item', '{key}', '{kind}', 'last_update_wins',
                 '1', 'apply_remote', 'local', {local}, {remote}, {remote}, '{lost}', '{lost}', 1, 2, '6592008000000000.1',
                 '6592008000000001.2', '0/200', '0/300', '0/0', '0/100', '6592008000000000.1')",
            local = literal(local),
            remote = literal(remote),
        ))
        .await
        .unwrap();
}

/// Writes lines of these numbers that differ in nothing else.
async fn lines(admin: &Client, numbers: std::ops::Range<u32>) {
    for n in numbers {
        line(
            admin,
            n,
            &format!("{{\"id\": {n}}}"),
            "insert_exists",
            "{\"id\": 1}",
            "{\"id\": 1}",
            "{}",
        )
        .await;
    }
}

fn literal(json: &str) -> String {
    if json.is_empty() {
        "NULL".to_owned()
    } else {
        format!("'{json}'")
    }
}

const ROW: &str = "SELECT coalesce((SELECT to_jsonb(item)::text FROM item WHERE id = 7), 'none')";

#[tokio::test]
async fn lost_values_are_written_again_once_and_only_over_the_row_that_the_resolution_left() {
    let (node, admin) = with_a_conflict().await;
    admin.batch_execute("UPDATE item SET v = 'newer'").await.unwrap();
    let said = node.refused(&["conflicts", "replay", "00000001"], 1);
    assert!(
        said.contains("v was there and is newer") && said.contains("--force"),
        "{said}"
    );
    assert!(value(&admin, ROW).await.contains("newer"));

    admin.batch_execute("UPDATE item SET v = 'there'").await.unwrap();
    node.ok(&[
        "conflicts",
        "replay",
        "00000001",
        "--by",
        "kim",
        "--note",
        "asked by the shop",
    ]);
    assert_eq!(
        value(&admin, ROW).await,
        r#"{"d": "here!", "n": 12345678901234567890.20, "v": "here", "id": 7}"#
    );
    let marked = "SELECT concat_ws(' ', status, reviewed_by, note, reviewed_at IS NOT NULL) FROM anabranch.conflict_history";
    assert_eq!(value(&admin, marked).await, "replayed kim asked by the shop t");
    let said = node.refused(&["conflicts", "replay", "00000001"], 1);
    assert!(said.contains("replayed already, by kim"), "{said}");
    let said = node.refused(&["conflicts", "dismiss", "00000001"], 1);
    assert!(said.contains("was replayed"), "{said}");
}

#[tokio::test]
async fn some_columns_are_replayed_alone_and_force_writes_over_what_came_since() {
    let (node, admin) = with_a_conflict().await;
    let said = node.refused(&["conflicts", "replay", "00000001", "--columns", "v,d"], 1);
    assert!(said.contains("column d is no column"), "{said}");
    let answer = node.ok(&[
        "conflicts",
        "replay",
        "00000001",
        "--columns",
        "n",
        "--output",
        "json",
    ]);
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer["did"], "updated");
    assert_eq!(answer["columns"], serde_json::json!(["n"]));
    assert_eq!(
        value(&admin, ROW).await,
        r#"{"d": "there!", "n": 12345678901234567890.20, "v": "there", "id": 7}"#
    );
    admin.batch_execute("DELETE FROM item").await.unwrap();
    node.ok(&["conflicts", "replay", "00000001", "--force"]);
    assert_eq!(
        value(&admin, ROW).await,
        r#"{"d": "here!", "n": 12345678901234567890.20, "v": "here", "id": 7}"#
    );
}

#[tokio::test]
async fn a_column_that_is_merged_by_the_lines_policy_or_todays_is_written_again_by_force_alone() {
    let (node, admin) = with_a_conflict().await;
    let replay = ["conflicts", "replay", "00000001"];
    let refused = |rule: &str| {
        let said = node.refused(&replay, 1);
        for part in [rule, "Write by hand", "--force", "--columns v writes the others"] {
            assert!(said.contains(part), "`{part}` is not in {said}");
        }
    };
    let decided_by = async |policy: &str| {
        let sql = format!("UPDATE anabranch.conflict_history SET policy = '{policy}'");
        admin.batch_execute(&sql).await.unwrap();
    };
    decided_by("last_update_wins, n delta").await;
    refused("n (delta)");
    // Alone there is nothing else to write.
    let said = node.refused(&[&replay[..], &["--columns", "n"]].concat(), 1);
    assert!(
        said.contains("n (delta)") && !said.contains("--columns"),
        "{said}"
    );

    decided_by("last_update_wins").await;
    let rule = "[[table]]\nname = \"public.item\"\ncolumns = { n = \"max\" }\n";
    std::fs::write(node.folder.path().join("policy.toml"), rule).unwrap();
    let config = std::fs::read_to_string(node.config()).unwrap();
    let named = config.replace("[cluster]\n", "[cluster]\npolicy = \"policy.toml\"\n");
    std::fs::write(node.config(), named).unwrap();
    refused("n (max)");
    node.ok(&[&replay[..], &["--columns", "v"]].concat());
    assert_eq!(
        value(&admin, ROW).await,
        r#"{"d": "here!", "n": 12345678901234567890.10, "v": "here", "id": 7}"#
    );
    node.ok(&[&replay[..], &["--force"]].concat());
    assert_eq!(
        value(&admin, ROW).await,
        r#"{"d": "here!", "n": 12345678901234567890.20, "v": "here", "id": 7}"#
    );
    // A row that is gone has nothing in it that anybody else wrote.
    admin.batch_execute("DELETE FROM item").await.unwrap();
    let lost = r#"{"id": 7, "v": "x", "n": 1, "d": "x!"}"#;
    line(
        &admin,
        2,
        "{\"id\": 7}",
        "delete_origin_differs",
        lost,
        "",
        "{id,v,n,d}",
    )
    .await;
    node.ok(&["conflicts", "replay", "00000002"]);
    assert!(value(&admin, ROW).await.contains("\"x!\""));
    // Nor has one that was written without the column, since it was not there.
    let came = r#"{"id": 7, "v": "x", "n": 5, "d": "x!"}"#;
    line(&admin, 3, "{\"id\": 7}", "column_missing", "", came, "{n}").await;
    let skipped = "UPDATE anabranch.conflict_history SET conflict_resolution = 'skip', loser = 'remote' \
                   WHERE conflict_type = 'column_missing'";
    admin.batch_execute(skipped).await.unwrap();
    node.ok(&["conflicts", "replay", "00000003"]);
    assert!(value(&admin, ROW).await.contains("\"n\": 5"));
}

#[tokio::test]
async fn a_lost_delete_is_replayed_as_a_delete_and_a_lost_row_as_an_insert() {
    let (node, admin) = with_a_conflict().await;
    let remote = r#"{"id": 7, "v": "there", "n": 12345678901234567890.10, "d": "there!"}"#;
    line(&admin, 2, "{\"id\": 7}", "update_deleted", "", remote, "{}").await;
    assert!(node.ok(&["conflicts", "list"]).contains("(delete)"));
    let said = node.refused(&["conflicts", "replay", "00000002", "--columns", "v"], 1);
    assert!(said.contains("it has no columns"), "{said}");
    assert!(
        node.ok(&["conflicts", "replay", "00000002"])
            .contains("row deleted")
    );
    assert_eq!(value(&admin, ROW).await, "none");

    let lost = r#"{"id": 8, "v": "x", "n": 1, "d": "x!"}"#;
    line(
        &admin,
        3,
        "{\"id\": 8}",
        "delete_origin_differs",
        lost,
        "",
        "{id,v,n,d}",
    )
    .await;
    let said = node.refused(&["conflicts", "replay", "00000003", "--columns", "v"], 1);
    assert!(said.contains("it is inserted whole"), "{said}");
    assert!(
        node.ok(&["conflicts", "replay", "00000003"])
            .contains("row inserted")
    );
    assert_eq!(value(&admin, "SELECT v FROM item WHERE id = 8").await, "x");
    // Values that this node does not have cannot be written.
    line(&admin, 4, "{\"id\": 7}", "update_origin_differs", "", "", "{}").await;
    let said = node.refused(&["conflicts", "replay", "00000004"], 1);
    assert!(said.contains("not in the log of node a"), "{said}");
    // Nor what it has as bytes, whoever says so.
    let key = r#"{"id": {"type": "integer", "unread_bytes": "\\x00000007"}}"#;
    let bytes = r#"{"id": 7, "v": {"type": "text", "unread_bytes": "\\x78"}, "n": 1}"#;
    line(&admin, 5, key, "update_origin_differs", lost, "", "{v}").await;
    line(
        &admin,
        6,
        "{\"id\": 7}",
        "update_origin_differs",
        bytes,
        "",
        "{id,v,n}",
    )
    .await;
    // Nor that of which it only says how long it was, also as earlier releases said it.
    let said = "(94371842 bytes of JSON: too long for the conflict log)";
    let long = r#"{"id": 7, "v": {"type": "text", "too_long": 94371842}, "n": 1}"#;
    let long_before = format!("{{\"id\": 7, \"v\": \"{said}\", \"n\": 1}}");
    for (n, row) in [(7, long), (8, &long_before)] {
        line(
            &admin,
            n,
            "{\"id\": 7}",
            "update_origin_differs",
            row,
            "",
            "{id,v,n}",
        )
        .await;
    }
    // Nor of a row that lost nothing, or of one that nobody can name.
    for (n, key, lost_columns) in [(9, "{\"id\": 8}", "{}"), (10, "{}", "{v}")] {
        line(&admin, n, key, "update_origin_differs", lost, lost, lost_columns).await;
    }
    for (id, why) in [
        ("00000009", "nothing of it was lost"),
        ("0000000a", "the row's key is redacted"),
        ("00000005", "the row's key as bytes"),
        ("00000006", "column(s) v not as values"),
        ("00000007", "column(s) v were too long"),
        ("00000008", "column(s) v were too long"),
    ] {
        let said = node.refused(&["conflicts", "replay", id, "--force"], 1);
        assert!(said.contains(why), "{said}");
    }
    assert!(
        node.ok(&["conflicts", "show", "00000006"])
            .contains("\\x78 (bytes of text)")
    );
    for id in ["00000007", "00000008"] {
        let shown = node.ok(&["conflicts", "show", id]);
        assert!(shown.contains(said) && !shown.contains("too_long"), "{shown}");
    }
    assert_eq!(value(&admin, ROW).await, "none");
    admin
        .batch_execute("ALTER TABLE item RENAME TO former")
        .await
        .unwrap();
    let said = node.refused(&["conflicts", "replay", "00000006"], 1);
    assert!(said.contains("public.item is not here any more"), "{said}");
}

#[tokio::test]
async fn a_row_of_which_the_log_has_no_room_for_a_value_is_only_written_by_force() {
    let (node, admin) = with_a_conflict().await;
    // The value that stands is long, and its column is not asked for.
    let local = r#"{"id": 7, "v": {"type": "text", "too_long": 94371842}, "n": 5}"#;
    let remote = r#"{"id": 7, "v": {"type": "text", "too_long": 104857602}, "n": 12345678901234567890.10}"#;
    line(
        &admin,
        2,
        "{\"id\": 7}",
        "update_origin_differs",
        local,
        remote,
        "{v,n}",
    )
    .await;
    let replay = ["conflicts", "replay", "00000002", "--columns", "n"];
    let said = node.refused(&replay, 1);
    assert!(
        said.contains("v was too long") && said.contains("--force"),
        "{said}"
    );
    node.ok(&[&replay[..], &["--force"]].concat());
    assert_eq!(
        value(&admin, ROW).await,
        r#"{"d": "there!", "n": 5, "v": "there", "id": 7}"#
    );
}

#[tokio::test]
async fn lines_are_marked_counted_explained_and_exported() {
    let (node, admin) = with_a_conflict().await;
    lines(&admin, 2..6).await;
    admin
        .batch_execute(
            "INSERT INTO anabranch.conflict_storm VALUES (now(), 'public', 'item', 'insert_exists', 2, 1, 1000)",
        )
        .await
        .unwrap();
    for verb in ["list", "tail"] {
        let said = node.run(&["conflicts", verb, "--output", "json"]);
        let said = String::from_utf8(said.stderr).unwrap();
        assert!(said.contains("1000 losing write(s)"), "{verb}: {said}");
    }
    node.ok(&["conflicts", "ack", "00000002", "00000003", "--by", "kim"]);
    node.ok(&[
        "conflicts",
        "dismiss",
        "--all",
        "--type",
        "insert_exists",
        "--note",
        "a test",
    ]);
    let of = |status: &str| {
        let text = node.ok(&["conflicts", "list", "--status", status, "--output", "json"]);
        let lines: Value = serde_json::from_str(&text).unwrap();
        let ids = lines.as_array().unwrap().iter();
        let mut ids: Vec<String> = ids
            .map(|line| {
                line["conflict_id"].as_str().unwrap()[..8]
                    .trim_start_matches('0')
                    .to_owned()
            })
            .collect();
        ids.sort();
        ids.concat()
    };
    assert_eq!(
        of("new") + "|" + &of("acknowledged") + "|" + &of("dismissed"),
        "1|23|45"
    );
    node.refused(&["conflicts", "list", "--status", "seen"], 2);
    node.refused(&["conflicts", "ack"], 2);
    node.refused(&["conflicts", "ack", "not-an-id"], 2);
    let said = node.refused(&["conflicts", "ack", "00000001", "--table", "other"], 2);
    assert!(said.contains("filters go with --all"), "{said}");

    let stats: Value = serde_json::from_str(&node.ok(&["conflicts", "stats", "--output", "json"])).unwrap();
    assert_eq!(
        (&stats["total"], &stats["only_counted"]),
        (&1005.into(), &1000.into())
    );
    assert_eq!(
        stats["by_nodes"][0],
        serde_json::json!({"name": "2 > 1", "count": 1000})
    );
    let text = node.ok(&["conflicts", "stats"]);
    assert!(
        text.contains("1000 of them only counted") && text.contains('█') && text.contains("b > a"),
        "{text}"
    );
    let listed = node.ok(&["conflicts", "list"]);
    assert!(listed.contains("and 1000 losing write(s)"), "{listed}");
    // What is only counted has no status and no key; and a minute that has begun before may reach into the time.
    for more in [["--status", "new"], ["--key", "id=70"], ["--group", "1.1"]] {
        let listed = node.ok(&[&["conflicts", "list"], &more[..]].concat());
        assert!(
            listed.contains("not known: how many are asked for of 1000"),
            "{more:?}: {listed}"
        );
        let stats = node.ok(&[&["conflicts", "stats", "--output", "json"], &more[..]].concat());
        let stats: Value = serde_json::from_str(&stats).unwrap();
        assert_eq!(
            (&stats["only_counted"], &stats["unknown"]),
            (&0.into(), &1000.into())
        );
    }
    let times = "SELECT concat_ws(' ', to_char(m + interval '20 s' * n, 'YYYY-MM-DD\"T\"HH24:MI:SSOF\":00\"')) \
                 FROM (SELECT minute AS m FROM anabranch.conflict_storm) s, generate_series(1, 4, 3) n ORDER BY n";
    let times = admin.query(times, &[]).await.unwrap();
    for (row, is_there) in times.iter().zip([true, false]) {
        let since: String = row.get(0);
        let listed = node.ok(&["conflicts", "list", "--since", &since]);
        assert_eq!(
            listed.contains("1000 losing write(s)"),
            is_there,
            "{since}: {listed}"
        );
    }
    assert_eq!(
        value(&admin, "SELECT sum(count)::text FROM anabranch.conflict_summary").await,
        "1005"
    );
    assert_eq!(
        value(&admin, "SELECT lost_values::text FROM anabranch.conflict_open").await,
        r#"{"d": "here!", "n": 12345678901234567890.20, "v": "here"}"#
    );

    let said = node.ok(&["conflicts", "explain", "00000001"]);
    for part in [
        "a did not know it",
        "b did not know it",
        "6592008000000001.2 of b is above",
        "--group 6592008000000000.1",
    ] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    let shown = node.ok(&["conflicts", "show", "00000001"]);
    assert!(
        shown.contains("the losing transaction lost also") && shown.contains("00000002"),
        "{shown}"
    );
    exported(&node);
}

#[tokio::test]
async fn a_list_that_is_not_all_says_so_and_how_to_go_on() {
    let (node, admin) = with_a_conflict().await;
    lines(&admin, 2..8).await;
    // Several detected at once lie on both sides of an end.
    admin
        .batch_execute(
            "UPDATE anabranch.conflict_history SET detected_at = '2026-01-02 03:04:05.123456+00' WHERE conflict_id::text ~ '^0000000[345]'",
        )
        .await
        .unwrap();
    let mut seen = std::collections::BTreeSet::new();
    let mut until: Option<String> = None;
    for round in 0.. {
        assert!(round < 7, "it does not come to an end");
        let mut args = vec!["conflicts", "list", "--limit", "4"];
        args.extend(until.iter().flat_map(|until| ["--until", until]));
        let table = node.run(&args);
        let json = node.run(&[&args[..], &["--output", "json"]].concat());
        let lines: Vec<Value> = serde_json::from_slice(&json.stdout).unwrap();
        assert!(!lines.is_empty() && lines.len() <= 4, "{lines:#?}");
        seen.extend(lines.iter().map(|line| line["conflict_id"].to_string()));
        let said = String::from_utf8(json.stderr).unwrap();
        assert_eq!(String::from_utf8(table.stderr).unwrap(), said);
        until = said
            .split("--until ")
            .nth(1)
            .map(|rest| rest.split(' ').next().unwrap().to_owned());
        if until.is_none() {
            assert_eq!(said, "");
            break;
        }
        assert!(said.contains("there are more"), "{said}");
    }
    assert_eq!(seen.len(), 7);
    let whole = node.run(&["conflicts", "list", "--limit", "7"]);
    assert_eq!(String::from_utf8(whole.stderr).unwrap(), "");
}

#[tokio::test]
async fn all_that_pass_are_marked_however_many() {
    let (node, admin) = with_a_conflict().await;
    admin
        .batch_execute(
            "INSERT INTO anabranch.conflict_history (conflict_id, lost_at, node, node_id, schema_name, table_name, key, conflict_type,
                 policy, conflict_resolution, loser, status)
             SELECT (lpad(to_hex(n + 65536), 8, '0') || '-0000-4000-8000-000000000000')::uuid, now(), 'a', 1, 'public', 'item', '{}',
                 'insert_exists', 'last_update_wins', 'apply_remote', 'local', CASE WHEN n <= 7 THEN 'dismissed' ELSE 'new' END
             FROM generate_series(1, 20507) AS n",
        )
        .await
        .unwrap();
    let said = node.ok(&[
        "conflicts",
        "ack",
        "--all",
        "--type",
        "insert_exists",
        "--by",
        "kim",
    ]);
    assert_eq!(said, "20500 conflict(s) acknowledged\n");
    let by_status = "SELECT string_agg(s, ' ' ORDER BY s) FROM (SELECT concat(status, ':', count(*), ':', max(reviewed_by)) AS s \
                     FROM anabranch.conflict_history GROUP BY status) AS c";
    assert_eq!(
        value(&admin, by_status).await,
        "acknowledged:20500:kim dismissed:7: new:1:"
    );
    let said = node.ok(&["conflicts", "ack", "--all", "--type", "insert_exists"]);
    assert_eq!(said, "0 conflict(s) acknowledged\n");
}

#[tokio::test]
async fn nodes_that_joined_or_are_gone_are_called_by_their_names() {
    let (node, admin) = with_a_conflict().await;
    line(
        &admin,
        2,
        "{\"id\": 8}",
        "update_origin_differs",
        "{\"id\": 8}",
        "{\"id\": 8}",
        "{}",
    )
    .await;
    admin
        .batch_execute(
            "INSERT INTO anabranch.member (node_id, fact, name, address, said_by) VALUES
                 (4, 'joined', 'delta', 'x:1', 1), (4, 'dropping', 'delta', 'x:1', 2), (4, 'dropped', 'delta', 'x:1', 2);
             UPDATE anabranch.conflict_history SET remote_origin = 4 WHERE conflict_id::text LIKE '00000002%';
             CREATE ROLE kim LOGIN; GRANT anabranch_reviewer TO kim",
        )
        .await
        .unwrap();
    let kim = node.server.dsn("kim");
    for who in [&[][..], &["--dsn", &kim]] {
        for (args, expected) in [
            (&["list", "--node", "delta"][..], "delta    a"),
            (&["list", "--winner", "delta"], "00000002"),
            (&["show", "00000002"], "delta"),
            (&["explain", "00000002"], "of delta is above"),
            (&["stats"], "a > delta"),
            (&["tail"], "delta over a"),
        ] {
            let said = node.ok(&[&["conflicts"], args, who].concat());
            assert!(said.contains(expected), "{args:?}: {said}");
        }
        for filter in ["--node", "--winner"] {
            let said = node.ok(&[&["conflicts", "list", filter, "delta"], who].concat());
            assert!(!said.contains("00000001"), "{filter}: {said}");
        }
        // It wrote nothing that lost.
        let said = node.ok(&[&["conflicts", "list", "--winner", "a"], who].concat());
        assert!(!said.contains("0000000"), "{said}");
    }
    let said = node.refused(&["conflicts", "list", "--node", "nobody"], 2);
    assert!(said.contains("a, b, delta"), "{said}");
    // A reviewer's machine has no configuration: the connection string does, and names are those that the database knows.
    let elsewhere = |args: &[&str]| {
        let mut command = crate::program();
        command
            .args(["--config", "/nowhere/anabranch.toml", "conflicts"])
            .args(args);
        let output = command.output().unwrap();
        (output.status.success(), both(&output))
    };
    let (ok, said) = elsewhere(&["list", "--node", "delta", "--dsn", &kim]);
    assert!(ok && said.contains("delta"), "{said}");
    let (ok, said) = elsewhere(&["list", "--all-nodes", "--dsn", &kim]);
    assert!(!ok && said.contains("--all-nodes asks the daemon"), "{said}");
    let (ok, said) = elsewhere(&["list"]);
    assert!(!ok && said.contains("/nowhere/anabranch.toml"), "{said}");
    // By an older release's grants a reviewer does not read who is a member: there are the names of the configuration.
    admin
        .batch_execute("REVOKE SELECT ON anabranch.member FROM anabranch_reviewer")
        .await
        .unwrap();
    let said = node.ok(&["conflicts", "stats", "--dsn", &kim]);
    assert!(said.contains("a > 4") && said.contains("a > b"), "{said}");
    let done = node.ok(&["init"]);
    assert!(done.contains("let reviewers read the conflict log"), "{done}");
    assert!(
        node.ok(&["conflicts", "stats", "--dsn", &kim])
            .contains("a > delta")
    );
    assert!(node.ok(&["init"]).contains("nothing to do"));
}

#[tokio::test]
async fn one_line_is_found_by_an_index_however_many_there_are() {
    let (node, admin) = with_a_conflict().await;
    // The newest of all, so that by the time it would be found last; and never analysed, so that nobody knows how few they are.
    admin
        .batch_execute(
            "ALTER TABLE anabranch.conflict_history_rest SET (autovacuum_enabled = off);
             INSERT INTO anabranch.conflict_history (conflict_id, lost_at, detected_at, node, node_id, schema_name, table_name, key,
                 conflict_type, policy, conflict_resolution, loser, transaction_group)
             SELECT md5(n::text)::uuid, now() - interval '99 days', now() + interval '1 day', 'a', 1, 'public', 'item', '{}',
                 'insert_exists', 'last_update_wins', 'apply_remote', 'local', to_hex(n) || '.1'
             FROM generate_series(1, 50000) AS n",
        )
        .await
        .unwrap();
    // What was read of the log without an index, or by the index on the time.
    const READ: &str = "SELECT (SELECT sum(seq_tup_read)::text FROM pg_stat_user_tables WHERE relname LIKE 'conflict_history%') || ' ' ||
        (SELECT sum(idx_tup_read)::text FROM pg_stat_user_indexes WHERE relname LIKE 'conflict_history%' AND indexrelname LIKE '%detected_at%')";
    const BY_INDEX: &str = "SELECT sum(idx_scan)::text FROM pg_stat_user_indexes WHERE relname LIKE 'conflict_history%' AND indexrelname NOT LIKE '%detected_at%'";
    let number = |text: &str| text.parse::<u64>().unwrap();
    let read = async || {
        let text = value(&admin, READ).await;
        text.split(' ').map(number).sum::<u64>()
    };
    let settled = async || {
        admin
            .batch_execute("SELECT pg_stat_force_next_flush()")
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    settled().await;
    for command in [
        &["conflicts", "show", "00000001"][..],
        &["conflicts", "explain", "00000001-0000-5000"],
        &["conflicts", "list", "--group", "6592008000000000.1"],
        &["conflicts", "ack", "00000001"],
        &["conflicts", "replay", "00000001"],
    ] {
        let before = (read().await, number(&value(&admin, BY_INDEX).await));
        node.ok(command);
        // A session's numbers come with its end.
        let ended = tokio::time::Instant::now() + Duration::from_secs(30);
        while number(&value(&admin, BY_INDEX).await) == before.1 {
            assert!(tokio::time::Instant::now() < ended, "{command:?} uses no index");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let read = read().await - before.0;
        assert!(read < 1_000, "{command:?} reads {read} lines");
    }
    // A beginning that several have is told so without reading all of them; one that none has, too.
    let said = node.refused(&["conflicts", "show", "0"], 1);
    assert!(said.contains("more than one conflict begins with 0"), "{said}");
    let said = node.refused(&["conflicts", "show", "00000001-0000-5000-8000-0000000000001"], 1);
    assert!(said.contains("no conflict has the id"), "{said}");
}

#[tokio::test]
async fn init_makes_an_index_that_an_older_release_did_not_make() {
    let (node, admin) = with_a_conflict().await;
    admin
        .batch_execute(
            "DROP INDEX anabranch.conflict_history_group;
             CREATE OR REPLACE FUNCTION anabranch.conflict_upkeep(at timestamptz, retention interval) RETURNS text[]
                 LANGUAGE sql AS $$ SELECT '{}'::text[] $$",
        )
        .await
        .unwrap();
    let log = |findings: Vec<Value>| {
        findings
            .into_iter()
            .find(|finding| finding["check"] == "conflict log")
    };
    let warned = log(node.doctor()).expect("a warning");
    assert_eq!(warned["level"], "warn", "{warned}");
    // Nothing but the time depends on it.
    assert!(node.ok(&["conflicts", "list"]).contains("00000001"));
    let said = node.ok(&["init"]);
    assert!(said.contains("be found by their transaction"), "{said}");
    // Nor was there what keeps lines of rows that are still to be mended.
    assert!(said.contains("make the upkeep of the conflict log"), "{said}");
    assert_eq!(log(node.doctor()), None);
    assert!(node.ok(&["init"]).contains("nothing to do"));
    // Partitions have it as well, those to come included.
    let without = "SELECT count(*)::text FROM pg_inherits p WHERE inhparent = 'anabranch.conflict_history'::regclass AND NOT EXISTS (
        SELECT FROM pg_inherits i JOIN pg_index x ON x.indexrelid = i.inhrelid
        WHERE i.inhparent = 'anabranch.conflict_history_group'::regclass AND x.indrelid = p.inhrelid)";
    admin
        .batch_execute("SELECT anabranch.conflict_upkeep(now() + interval '70 days', '100 years')")
        .await
        .unwrap();
    assert_eq!(value(&admin, without).await, "0");
}

#[tokio::test]
async fn a_replay_fires_triggers_whatever_is_set_for_its_role() {
    let (node, admin) = with_a_conflict().await;
    admin
        .batch_execute(
            "CREATE TABLE fired (id int);
             GRANT INSERT ON fired TO anabranch;
             CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.fired VALUES (new.id); RETURN NULL; END $$;
             CREATE TRIGGER note AFTER UPDATE ON item FOR EACH ROW EXECUTE FUNCTION note();
             ALTER ROLE anabranch SET session_replication_role = replica",
        )
        .await
        .unwrap();
    node.ok(&["conflicts", "replay", "00000001"]);
    assert_eq!(
        value(&admin, "SELECT string_agg(id::text, ',') FROM fired").await,
        "7"
    );
    // One that leaves the row out leaves nothing to be called replayed.
    admin
        .batch_execute(
            "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
             CREATE TRIGGER hold BEFORE UPDATE ON item FOR EACH ROW EXECUTE FUNCTION hold();
             UPDATE anabranch.conflict_history SET status = 'new'",
        )
        .await
        .unwrap();
    let said = node.refused(&["conflicts", "replay", "00000001", "--force"], 1);
    assert!(said.contains("0 row(s) were written instead of one"), "{said}");
    assert_eq!(
        value(&admin, "SELECT status FROM anabranch.conflict_history").await,
        "new"
    );
}

#[tokio::test]
async fn what_is_temporary_in_the_daemons_session_gets_no_rights_of_upkeep() {
    let (node, admin) = with_a_conflict().await;
    let daemon = node.server.session("anabranch").await;
    daemon
        .batch_execute(
            "CREATE FUNCTION pg_temp.taken() RETURNS oid LANGUAGE plpgsql AS $$ BEGIN RAISE 'runs as %', current_user; END $$;
             CREATE TEMP VIEW pg_inherits AS SELECT pg_temp.taken() AS inhrelid, pg_temp.taken() AS inhparent;
             CREATE TEMP VIEW pg_class AS SELECT pg_temp.taken() AS oid, pg_temp.taken()::text::name AS relname",
        )
        .await
        .unwrap();
    let upkeep = "SELECT anabranch.conflict_upkeep(now(), '100 years')";
    daemon.batch_execute(upkeep).await.unwrap();
    // As an older release has made it.
    admin
        .batch_execute(
            "ALTER FUNCTION anabranch.conflict_upkeep(timestamptz, interval) SET search_path = pg_catalog",
        )
        .await
        .unwrap();
    let error = daemon.batch_execute(upkeep).await.expect_err("it is run");
    let said = error.as_db_error().map_or("", |error| error.message());
    assert_eq!(said, "runs as postgres", "{error:?}");
    let warned = |findings: Vec<Value>| {
        findings
            .iter()
            .any(|finding| finding["check"] == "conflict log" && finding["level"] == "warn")
    };
    assert!(warned(node.doctor()));
    let said = node.ok(&["init"]);
    assert!(said.contains("make the upkeep of the conflict log"), "{said}");
    daemon.batch_execute(upkeep).await.unwrap();
    assert!(!warned(node.doctor()));
    assert!(node.ok(&["init"]).contains("nothing to do"));
}

fn exported(node: &Node) {
    let csv = node.ok(&["conflicts", "export", "--format", "csv", "--key", "id=7"]);
    assert_eq!(csv.lines().count(), 2, "{csv}");
    assert!(csv.contains("12345678901234567890.20"), "{csv}");
    let json: Value = serde_json::from_str(&node.ok(&["conflicts", "export", "--format", "json"])).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 5);
    let json: Value = serde_json::from_str(&node.ok(&["conflicts", "export", "-o", "json"])).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 5);
    let nothing = node.ok(&["conflicts", "export", "--format", "csv", "--key", "id=70"]);
    assert_eq!(nothing.lines().next(), csv.lines().next(), "{nothing}");
    assert_eq!(nothing.lines().count(), 1, "{nothing}");
    let said = node.refused(&["conflicts", "list", "--type", "update_exits"], 2);
    assert!(said.contains("update_exists"), "{said}");
    let file = node.config().with_file_name("out.ndjson");
    node.ok(&["conflicts", "export", "--file", file.to_str().unwrap()]);
    let written = std::fs::read_to_string(file).unwrap();
    assert_eq!(written.lines().count(), 5);
    for line in written.lines() {
        serde_json::from_str::<Value>(line).unwrap();
    }
}

#[tokio::test]
async fn a_tail_shows_what_comes_and_nothing_twice() {
    let (node, admin) = with_a_conflict().await;
    let mut child = node
        .command(&["conflicts", "tail", "-f", "--output", "json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = std::io::BufReader::new(child.stdout.take().unwrap());
    let (send, mut lines) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::BufRead::lines(out) {
            let line: Value = serde_json::from_str(&line.unwrap()).unwrap();
            let _ = send.send(line["conflict_id"].as_str().unwrap()[..8].to_owned());
        }
    });
    let mut next = async || {
        tokio::time::timeout(Duration::from_secs(60), lines.recv())
            .await
            .unwrap()
            .unwrap()
    };
    assert_eq!(next().await, "00000001");
    for n in 2..5 {
        line(
            &admin,
            n,
            "{\"id\": 1}",
            "insert_exists",
            "{\"id\": 1}",
            "{\"id\": 1}",
            "{}",
        )
        .await;
        assert_eq!(next().await, format!("0000000{n}"));
    }
    // More at once than any one look should hold, and then a server that ends the session.
    admin
        .batch_execute(
            "INSERT INTO anabranch.conflict_history SELECT (jsonb_populate_record(h, jsonb_build_object( \
                 'conflict_id', to_hex(x'10000000'::int + n) || '-0000-4000-8000-000000000000', \
                 'lost_at', clock_timestamp(), 'detected_at', clock_timestamp()))).* \
             FROM anabranch.conflict_history h, generate_series(1, 4000) n WHERE h.conflict_id::text LIKE '00000001%'",
        )
        .await
        .unwrap();
    let mut burst = std::collections::BTreeSet::new();
    for _ in 0..4_000 {
        assert!(burst.insert(next().await), "a line was shown twice");
    }
    assert!(burst.contains("10000001") && burst.contains("10000fa0"));
    admin
        .batch_execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()",
        )
        .await
        .unwrap();
    line(
        &admin,
        9,
        "{\"id\": 1}",
        "insert_exists",
        "{\"id\": 1}",
        "{\"id\": 1}",
        "{}",
    )
    .await;
    assert_eq!(next().await, "00000009");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn a_tail_that_nobody_reads_any_more_ends() {
    let (node, _) = with_a_conflict().await;
    let mut child = node
        .command(&["conflicts", "tail", "-f"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // As `| head -1` does. Nothing more is logged.
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut first = String::new();
    std::io::BufRead::read_line(&mut out, &mut first).unwrap();
    assert!(first.contains("00000001"), "{first}");
    let ends = async |child: &mut std::process::Child| {
        let patience = tokio::time::Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status.code();
            }
            if tokio::time::Instant::now() > patience {
                child.kill().unwrap();
                panic!("it goes on");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    // With a reader it goes on.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(child.try_wait().unwrap(), None);
    drop(out);
    assert_eq!(ends(&mut child).await, Some(0));

    // The same of a socket, by which a remote shell may read.
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut child = node
        .command(&["conflicts", "tail", "-f"])
        .stdout(std::os::fd::OwnedFd::from(theirs))
        .spawn()
        .unwrap();
    let mut ours = std::io::BufReader::new(ours);
    std::io::BufRead::read_line(&mut ours, &mut first).unwrap();
    drop(ours);
    assert_eq!(ends(&mut child).await, Some(0));
}

#[tokio::test]
async fn a_reviewer_reads_the_log_and_changes_nothing_but_the_review() {
    let (node, admin) = with_a_conflict().await;
    admin
        .batch_execute("CREATE ROLE kim LOGIN; GRANT anabranch_reviewer TO kim; CREATE ROLE stranger LOGIN")
        .await
        .unwrap();
    let kim = node.server.session("kim").await;
    for allowed in [
        "SELECT * FROM anabranch.conflict_history",
        "SELECT * FROM anabranch.conflict_open",
        "SELECT * FROM anabranch.conflict_summary",
        "UPDATE anabranch.conflict_history SET status = 'acknowledged', reviewed_by = 'kim', reviewed_at = now(), note = 'x'",
    ] {
        kim.batch_execute(allowed)
            .await
            .unwrap_or_else(|error| panic!("{allowed}: {error:?}"));
    }
    // What README says for psql.
    let readme = include_str!("../../../README.md");
    let queries: String = readme
        .lines()
        .skip_while(|line| !line.contains("from anabranch.conflict_open;"))
        .take_while(|line| line.is_empty() || line.starts_with("    "))
        .flat_map(|line| [line, "\n"])
        .collect();
    assert!(
        queries.contains("transaction_group =") && queries.contains("'dismissed'"),
        "{queries}"
    );
    kim.batch_execute(&queries)
        .await
        .unwrap_or_else(|error| panic!("{queries}: {error:?}"));
    for denied in [
        "UPDATE anabranch.conflict_history SET loser = 'remote'",
        "DELETE FROM anabranch.conflict_history",
        "INSERT INTO anabranch.conflict_history SELECT * FROM anabranch.conflict_history",
        "SELECT * FROM anabranch.quarantine",
        "UPDATE anabranch.progress SET epoch = 9",
        "SELECT anabranch.conflict_upkeep(now(), '1 second')",
        "SELECT * FROM item",
    ] {
        let error = kim.batch_execute(denied).await.expect_err(denied);
        assert_eq!(
            error.code().map(|code| code.code()),
            Some("42501"),
            "{denied}: {error:?}"
        );
    }
    let dsn = node.server.dsn("kim");
    node.ok(&["conflicts", "dismiss", "00000001", "--by", "kim", "--dsn", &dsn]);
    // Writing lost values again needs rights on the table itself.
    let said = node.refused(&["conflicts", "replay", "00000001", "--dsn", &dsn], 1);
    assert!(said.contains("permission denied for table item"), "{said}");
    admin
        .batch_execute("GRANT SELECT, UPDATE ON item TO kim")
        .await
        .unwrap();
    // Nor does whoever may make functions have any of them run by a replay.
    for (name, arguments, returns) in [
        ("to_jsonb", "item", "jsonb"),
        ("to_jsonb", "anabranch.conflict_history", "jsonb"),
        ("row_to_json", "item", "json"),
        ("jsonb_populate_record", "item, jsonb", "item"),
    ] {
        let taking = format!(
            "CREATE FUNCTION public.{name}({arguments}) RETURNS {returns} LANGUAGE plpgsql AS $$ BEGIN RAISE 'taken over'; END $$"
        );
        admin.batch_execute(&taking).await.unwrap();
    }
    node.ok(&["conflicts", "replay", "00000001", "--dsn", &dsn]);
    let stranger = node.server.dsn("stranger");
    node.refused(&["conflicts", "list", "--dsn", &stranger], 1);
}

#[tokio::test]
async fn lines_go_by_week_once_the_retention_has_passed() {
    let (node, admin) = with_a_conflict().await;
    let insert = |n: u32, lost: &str, detected: &str| {
        format!(
            "INSERT INTO anabranch.conflict_history (conflict_id, lost_at, detected_at, node, node_id, schema_name, table_name,
                 key, conflict_type, policy, conflict_resolution, loser)
             VALUES ('{n:08x}-0000-5000-8000-000000000001', now() - interval '{lost}', now() - interval '{detected}', 'a', 1,
                 'public', 'item', '{{}}', 'insert_exists', 'p', 'skip', 'remote');"
        )
    };
    // Outside every partition: in the one for the rest.
    admin
        .batch_execute(
            &(insert(11, "100 days", "100 days")
                + &insert(12, "100 days", "1 day")
                + &insert(13, "50 days", "50 days")
                + &insert(15, "100 days", "100 days")),
        )
        .await
        .unwrap();
    // By this one the node is still to delete a row.
    let to_do = "UPDATE anabranch.conflict_history SET conflict_type = 'foreign_key_missing', conflict_resolution = 'delete_child', \
                 remote_origin = (SELECT node_id FROM anabranch.node) WHERE conflict_id::text LIKE '0000000f%'";
    admin.batch_execute(to_do).await.unwrap();
    let daemon = node.server.session("anabranch").await;
    let upkeep = async |at: &str| {
        let sql = format!("SELECT array_to_string(anabranch.conflict_upkeep({at}, '90 days'), ', ')");
        value(&daemon, &sql).await
    };
    let left = "SELECT string_agg(right(left(conflict_id::text, 8), 2), ' ' ORDER BY conflict_id) FROM anabranch.conflict_history";
    upkeep("now()").await;
    assert_eq!(value(&admin, left).await, "01 0c 0d 0f");
    // Partitions of the time of the line make themselves of what is in the rest.
    let made = upkeep("now() - interval '50 days'").await;
    assert!(made.contains("made conflict_history_p"), "{made}");
    assert_eq!(
        value(
            &admin,
            "SELECT count(*)::text FROM anabranch.conflict_history_rest"
        )
        .await,
        "2"
    );
    // In two months: the week of line 13 is over, lines of which one was detected lately stay.
    admin
        .batch_execute(&insert(14, "50 days", "-20 days"))
        .await
        .unwrap();
    let did = upkeep("now() + interval '60 days'").await;
    assert!(did.contains("dropped conflict_history_p"), "{did}");
    assert_eq!(value(&admin, left).await, "01 0c 0e 0f");
    // It is done now.
    let done = "UPDATE anabranch.conflict_history SET note = 'deleted here' WHERE conflict_id::text LIKE '0000000f%'";
    admin.batch_execute(done).await.unwrap();
    assert_eq!(upkeep("now() + interval '60 days'").await, "");
    assert_eq!(value(&admin, left).await, "01 0c 0e");
    // One losing write has one line, in whichever partition it lies.
    let again = "INSERT INTO anabranch.conflict_history SELECT * FROM anabranch.conflict_history ON CONFLICT DO NOTHING";
    assert_eq!(admin.execute(again, &[]).await.unwrap(), 0);
}

#[tokio::test]
async fn init_brings_a_log_of_the_older_layout_over() {
    let node = Node::new().await;
    let admin = node.server.admin().await;
    admin
        .batch_execute("CREATE TABLE item (id int PRIMARY KEY)")
        .await
        .unwrap();
    node.set_up().await;
    admin
        .batch_execute(
            "DROP VIEW anabranch.conflict_open, anabranch.conflict_summary; DROP TABLE anabranch.conflict_history;
             CREATE TABLE anabranch.conflict_history (conflict_id uuid PRIMARY KEY,
                 detected_at timestamptz NOT NULL DEFAULT clock_timestamp(), node text NOT NULL, node_id int NOT NULL,
                 schema_name text NOT NULL, table_name text NOT NULL, key jsonb NOT NULL, conflict_type text NOT NULL,
                 policy text NOT NULL, conflict_resolution text NOT NULL, loser text NOT NULL, local_tuple jsonb,
                 remote_tuple jsonb, applied_tuple jsonb, local_origin int, local_xid bigint, local_lsn pg_lsn,
                 local_commit_time timestamptz, local_stamp text, remote_origin int, remote_xid bigint, remote_lsn pg_lsn,
                 remote_commit_time timestamptz, remote_stamp text, apply_xid bigint, error jsonb);
             CREATE INDEX conflict_history_time ON anabranch.conflict_history (detected_at);
             CREATE INDEX conflict_history_key ON anabranch.conflict_history USING gin (key jsonb_path_ops);
             INSERT INTO anabranch.conflict_history (conflict_id, node, node_id, schema_name, table_name, key, conflict_type,
                 policy, conflict_resolution, loser, local_stamp, remote_stamp)
             VALUES (gen_random_uuid(), 'a', 1, 'public', 'item', '{}', 'insert_exists', 'last_update_wins', 'apply_remote',
                 'local', '6592008080000000.3', '6592008090000000.3')",
        )
        .await
        .unwrap();
    let said = node.refused(&["conflicts", "list"], 1);
    assert!(said.contains("run `anabranch init`"), "{said}");
    let output = node.run(&["run"]);
    assert!(both(&output).contains("older layout"), "{}", both(&output));
    let said = node.ok(&["init"]);
    assert!(said.contains("bring its lines into the new one"), "{said}");
    let line = "SELECT concat_ws(' ', lost_at AT TIME ZONE 'UTC', transaction_group, status) FROM anabranch.conflict_history";
    assert_eq!(
        value(&admin, line).await,
        "2024-01-01 00:00:00.5 6592008080000000.3 new"
    );
    assert!(node.ok(&["init"]).contains("nothing to do") || node.run(&["init"]).status.success());
    assert!(node.doctor().iter().all(|finding| finding["level"] != "fail"));
}
