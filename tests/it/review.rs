//! The conflict log as people use it: all nodes' logs as one, lost values written again, redaction, a storm.

use std::time::{Duration, Instant};

use anabranch_tests::Cluster;
use anabranch_tests::daemon::{anabranch, anabranch_ok, anabranch_refuses};
use serde_json::Value;

const ITEMS: &str = "create table item (id int primary key, v text, w text)";

/// `anabranch conflicts ..` at one node.
async fn conflicts(cluster: &Cluster, node: usize, args: &[&str]) -> String {
    let config = cluster.nodes[node].daemon.config_arg();
    anabranch_ok(&[&["conflicts", "--config", config], args].concat()).await
}

async fn json(cluster: &Cluster, node: usize, args: &[&str]) -> Value {
    let text = conflicts(cluster, node, &[args, &["--output", "json"]].concat()).await;
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?} gave no JSON ({error}): {text}"))
}

#[tokio::test]
async fn any_node_lists_the_logs_of_all_and_names_the_one_that_is_away() {
    let mut cluster = Cluster::of([15, 15, 18]).schema(ITEMS).tls().start().await;
    cluster
        .run(0, "insert into item values (1, 'base', 'base')")
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "update item set v = 'earlier'"),
            (1, "update item set v = 'later'"),
        ])
        .await;
    cluster.conflicts().await;
    for node in cluster.all() {
        let joined = json(&cluster, node, &["list", "--all-nodes"]).await;
        let found = joined["conflicts"].as_array().unwrap();
        assert_eq!(found.len(), 1, "{joined:#}");
        let at: Vec<&String> = found[0]["at"].as_object().unwrap().keys().collect();
        assert_eq!(at, ["n1", "n2", "n3"]);
    }
    // A mark is of one node's line; the list of all shows the furthest.
    let id = json(&cluster, 1, &["list"]).await[0]["conflict_id"]
        .as_str()
        .unwrap()
        .to_owned();
    conflicts(&cluster, 1, &["ack", &id]).await;
    let joined = json(&cluster, 0, &["list", "--all-nodes"]).await;
    assert_eq!(joined["conflicts"][0]["status"], "acknowledged", "{joined:#}");
    assert_eq!(joined["conflicts"][0]["at"]["n1"], "new", "{joined:#}");
    // So it is not among the new ones, though other nodes' lines of it are.
    for (status, count) in [("new", 0), ("acknowledged", 1), ("replayed", 0)] {
        let joined = json(&cluster, 0, &["list", "--all-nodes", "--status", status]).await;
        assert_eq!(
            joined["conflicts"].as_array().unwrap().len(),
            count,
            "{status}: {joined:#}"
        );
    }

    found_late_at_the_third(&cluster).await;

    cluster.nodes[2].daemon.kill();
    let joined = json(&cluster, 0, &["list", "--all-nodes"]).await;
    assert_eq!(joined["conflicts"].as_array().unwrap().len(), 2, "{joined:#}");
    let away = joined["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|node| node["answered"] == false);
    let away: Vec<&Value> = away.map(|node| &node["name"]).collect();
    assert_eq!(away, ["n3"], "{joined:#}");
    let text = conflicts(&cluster, 0, &["list", "--all-nodes"]).await;
    assert!(
        text.contains("NOT COMPLETE: the log of node n3 (3) is missing here"),
        "{text}"
    );
}

/// A second conflict; and the third node has found the first one after it, as if it had been away.
async fn found_late_at_the_third(cluster: &Cluster) {
    cluster
        .run(0, "insert into item values (2, 'base', 'base')")
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "update item set w = 'earlier' where id = 2"),
            (1, "update item set w = 'later' where id = 2"),
        ])
        .await;
    cluster.conflicts().await;
    let late = "with late as (update anabranch.conflict_history set detected_at = clock_timestamp() + interval '1 hour' \
                where key = '{\"id\": 1}' returning 1) select count(*) from late";
    assert_eq!(cluster.admin(2).await.value(late).await, "1");
    let joined = json(cluster, 2, &["list", "--all-nodes", "--limit", "1"]).await;
    let found = joined["conflicts"].as_array().unwrap();
    assert_eq!(found.len(), 1, "{joined:#}");
    assert_eq!(found[0]["line"]["key"]["id"], 2, "{joined:#}");
    let at: Vec<&String> = found[0]["at"].as_object().unwrap().keys().collect();
    assert_eq!(at, ["n1", "n2", "n3"], "{joined:#}");
    let joined = json(cluster, 2, &["list", "--all-nodes", "--limit", "2"]).await;
    let late = &joined["conflicts"][1];
    assert_eq!(
        (&late["line"]["key"]["id"], &late["status"]),
        (&1.into(), &"acknowledged".into()),
        "{joined:#}"
    );
}

#[tokio::test]
async fn lost_values_that_are_replayed_win_at_every_node_and_make_no_new_conflict() {
    let cluster = Cluster::of([15, 15, 15]).schema(ITEMS).start().await;
    cluster
        .run(
            0,
            "insert into item values (1, 'base', 'base'), (2, 'base', 'base')",
        )
        .await;
    cluster.converge().await;
    // One transaction loses both its rows.
    cluster
        .apart(&[
            (0, "update item set v = 'earlier', w = 'w'"),
            (1, "update item set v = 'later', w = 'w'"),
        ])
        .await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 2, "{log:#?}");
    for node in cluster.all() {
        for line in cluster.conflicts_at(node).await {
            assert_eq!(line.0["transaction_group"], log[0].0["transaction_group"]);
            assert_eq!(line.0["lost_columns"], serde_json::json!(["v"]), "{line:#?}");
            assert_eq!(line.0["changed_columns"], serde_json::json!(["v"]), "{line:#?}");
            assert_eq!(line.0["status"], "new");
        }
    }
    let lines = json(&cluster, 2, &["list", "--key", "id=1"]).await;
    let id = lines[0]["conflict_id"].as_str().unwrap();
    let said = conflicts(&cluster, 2, &["explain", id]).await;
    for part in [
        "n1 did not know it",
        "n2 did not know it",
        "the higher stamp wins",
    ] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    conflicts(&cluster, 2, &["replay", id]).await;
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(id || v || w, ' ' order by id) from item",
            "1earlierw 2laterw",
        )
        .await;
    assert_eq!(cluster.conflicts().await.len(), 2);

    // Somebody changed the other row since: nothing is written, and nobody else hears of it.
    cluster.run(1, "update item set w = 'since' where id = 2").await;
    cluster.converge().await;
    let lines = json(&cluster, 0, &["list", "--key", "id=2"]).await;
    let id = lines[0]["conflict_id"].as_str().unwrap();
    let config = cluster.nodes[0].daemon.config_arg();
    let said = anabranch_refuses(&["conflicts", "replay", id, "--config", config]).await;
    assert!(said.contains("w was w and is since"), "{said}");
    conflicts(&cluster, 0, &["replay", id, "--force"]).await;
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(id || v || w, ' ' order by id) from item",
            "1earlierw 2earliersince",
        )
        .await;
}

/// Two nodes apart, with one conflict of each kind: a counter, a counter and a text, a set, a delete, two inserts.
async fn stock_apart(policy: &str) -> Cluster {
    let cluster = Cluster::of([15, 18])
        .schema("create table stock (id int primary key, n int not null default 0, tags text[] not null default '{}', t text)")
        .policy(policy)
        .start()
        .await;
    cluster
        .run(0, "insert into stock select n from generate_series(1, 4) n")
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "update stock set n = n + 1 where id in (1, 2)"),
            (0, "update stock set tags = tags || '{red}' where id = 3"),
            (0, "delete from stock where id = 4"),
            (0, "insert into stock (id, t) values (5, 'here')"),
            (1, "update stock set n = n + 5 where id = 1"),
            (1, "update stock set t = 'counted' where id = 2"),
            (1, "update stock set tags = tags || '{blue}' where id = 3"),
            (1, "update stock set t = 'kept' where id = 4"),
            (1, "insert into stock (id, t) values (5, 'there')"),
        ])
        .await;
    cluster
}

#[tokio::test]
async fn the_policy_that_would_have_lost_least_is_suggested_and_loses_no_more_than_was_said() {
    let cluster = stock_apart("").await;
    assert_eq!(cluster.conflicts().await.len(), 5);
    let said = json(&cluster, 1, &["suggest", "stock"]).await;
    assert_eq!(said["conflicts"], 5, "{said:#}");
    let outcome = |policy: &str| {
        let all = said["policies"].as_array().unwrap();
        let found = all.iter().find(|outcome| outcome["policy"] == policy);
        let found = found.unwrap_or_else(|| panic!("no {policy} in {said:#}"));
        ["kept", "lost", "unknown"].map(|what| found[what].as_u64().unwrap())
    };
    assert_eq!(outcome("last_update_wins"), [0, 5, 0]);
    assert_eq!(outcome("column_merge"), [0, 2, 3]);
    assert_eq!(outcome("column_merge, n delta, tags set_union"), [2, 2, 1]);
    assert_eq!(said["deletes"]["lost"], 1, "{said:#}");
    let text = conflicts(&cluster, 0, &["suggest", "public.stock"]).await;
    assert!(text.contains("does not tell whether one"), "{text}");
    let policy = said["policy_file"].as_str().expect("a policy file");
    assert!(text.ends_with(policy), "{text}");
    assert!(
        conflicts(&cluster, 0, &["suggest", "nothing"])
            .await
            .contains("no conflicts of nothing")
    );
    // The same writes under it: what could not be known turns out well, what would be lost is.
    let cluster = stock_apart(policy).await;
    let rows = "select string_agg(concat_ws(' ', id, n, tags, t), ', ' order by id) from stock";
    cluster
        .expect(
            rows,
            "1 6 {}, 2 1 {} counted, 3 0 {blue,red}, 4 0 {} kept, 5 0 {} there",
        )
        .await;
    assert_eq!(cluster.conflicts().await.len(), 2);
}

/// A row as JSON shows it as it shows NULL.
#[tokio::test]
async fn a_null_of_json_that_was_lost_is_told_from_no_value_and_written_again_as_it_was() {
    let cluster = Cluster::of([15, 18])
        .schema(
            "create table note (id int primary key, doc jsonb not null, j json, n int, \
             twice int generated always as (n * 2) stored, seq int generated always as identity)",
        )
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into note (id, doc, j, n) select i, '{}', '{}', 1 from generate_series(1, 2) i",
        )
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (
                0,
                "update note set doc = 'null', j = ' null ', n = 2 where id = 1",
            ),
            (0, "update note set doc = 'null' where id = 2"),
            (
                1,
                "update note set doc = '{\"a\": 1}', j = null, n = 3 where id = 1",
            ),
            (1, "delete from note where id = 2"),
        ])
        .await;
    assert_eq!(cluster.conflicts().await.len(), 2);
    let null = serde_json::json!({ "unread_text": "null", "type": "pg_catalog.jsonb" });
    for node in cluster.all() {
        let lines = json(&cluster, node, &["list", "--key", "id=1"]).await;
        // Each node computes the generated column by itself: it is no part of what was lost.
        let lost = serde_json::json!(["doc", "j", "n"]);
        assert_eq!(lines[0]["lost_columns"], lost, "{lines:#}");
        assert_eq!(lines[0]["changed_columns"], lost, "{lines:#}");
        let side = format!("{}_tuple", lines[0]["loser"].as_str().unwrap());
        assert_eq!(lines[0][&side]["doc"], null, "{lines:#}");
        assert_eq!(lines[0]["applied_tuple"]["j"], Value::Null, "{lines:#}");
    }
    for (node, key) in [(0, "id=1"), (1, "id=2")] {
        let lines = json(&cluster, node, &["list", "--key", key]).await;
        conflicts(
            &cluster,
            node,
            &["replay", lines[0]["conflict_id"].as_str().unwrap()],
        )
        .await;
    }
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(concat_ws(' ', id, jsonb_typeof(doc), json_typeof(j), n, twice), ', ' order by id) from note",
            "1 null null 2 4, 2 null object 1 2",
        )
        .await;
}

#[tokio::test]
async fn an_identity_that_no_update_can_set_is_named_and_the_rest_is_replayed() {
    let cluster = Cluster::of([15, 15])
        .schema("create table part (id int primary key, seq int generated always as identity, v text)")
        .start()
        .await;
    cluster
        .run(0, "insert into part (id, v) values (2, 'other')")
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "insert into part (id, v) values (1, 'earlier')"),
            (1, "insert into part (id, v) values (1, 'later')"),
        ])
        .await;
    let lines = json(&cluster, 0, &["list"]).await;
    assert_eq!(
        lines[0]["lost_columns"],
        serde_json::json!(["seq", "v"]),
        "{lines:#}"
    );
    let id = lines[0]["conflict_id"].as_str().unwrap();
    let config = cluster.nodes[0].daemon.config_arg();
    let said = anabranch_refuses(&["conflicts", "replay", id, "--config", config]).await;
    assert!(said.contains("--columns v writes the others"), "{said}");
    conflicts(&cluster, 0, &["replay", id, "--columns", "v"]).await;
    cluster.converge().await;
    cluster.expect("select v from part where id = 1", "earlier").await;
}

#[tokio::test]
async fn a_delete_that_is_replayed_is_of_the_row_and_of_no_table_that_inherits() {
    let schema = format!("{ITEMS}; create table heir (primary key (id)) inherits (item)");
    let cluster = Cluster::of([15, 15]).schema(&schema).start().await;
    cluster
        .run(
            0,
            "insert into item values (1, 'own', 'w'); insert into heir values (1, 'heir', 'w')",
        )
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "delete from only item where id = 1"),
            (1, "update only item set v = 'later' where id = 1"),
        ])
        .await;
    let lines = json(&cluster, 0, &["list"]).await;
    assert_eq!(lines.as_array().map(Vec::len), Some(1), "{lines:#}");
    let id = lines[0]["conflict_id"].as_str().unwrap();
    conflicts(&cluster, 0, &["replay", id]).await;
    cluster.converge().await;
    cluster
        .expect("select string_agg(v, ' ') from item", "heir")
        .await;
}

#[tokio::test]
async fn a_replay_fires_triggers_of_roles_that_policies_bind() {
    let cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    cluster
        .run(0, "insert into item values (1, 'base', 'base')")
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "update item set v = 'earlier'"),
            (1, "update item set v = 'later'"),
        ])
        .await;
    let audit = "alter role anabranch bypassrls; create role auditor; create schema audit; grant usage on schema audit to auditor;
             create table audit.word (v text); insert into audit.word values ('shown'), ('hidden');
             grant select on audit.word to auditor; alter table audit.word enable row level security;
             create policy shown on audit.word using (v = 'shown');
             create function audit.look() returns trigger language plpgsql security definer as $$ begin
                 new.w := (select string_agg(v, ',') from audit.word);
                 return new;
             end $$;
             alter function audit.look() owner to auditor;
             create trigger look before update on item for each row execute function audit.look()";
    for node in cluster.all() {
        cluster.admin(node).await.run(audit).await;
    }
    let lines = json(&cluster, 0, &["list"]).await;
    let id = lines[0]["conflict_id"].as_str().unwrap();
    conflicts(&cluster, 0, &["replay", id]).await;
    cluster.converge().await;
    cluster
        .expect("select v || ' ' || w from item", "earlier shown")
        .await;
}

#[tokio::test]
async fn conflicts_are_found_by_a_partitioned_table_and_what_is_said_of_that_alone_is_warned_of() {
    let cluster = Cluster::of([15, 15])
        .schema(
            "create table visit (id int, region text, v text, primary key (id, region)) partition by list (region);
             create table visit_eu partition of visit for values in ('eu');
             create table visit_us partition of visit for values in ('us')",
        )
        .policy("[[table]]\nname = \"public.visit\"\npolicy = \"first_update_wins\"\n")
        .config("[conflict_log]\nredact = [\"public.visit.v\"]")
        .start()
        .await;
    cluster
        .run(0, "insert into visit values (1, 'eu', 'base'), (2, 'us', 'base')")
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "update visit set v = 'earlier' where region = 'eu'"),
            (1, "update visit set v = 'later' where region = 'eu'"),
        ])
        .await;
    for table in ["public.visit", "visit", "public.visit_eu"] {
        let lines = json(&cluster, 0, &["list", "--table", table]).await;
        assert_eq!(lines[0]["table_name"], "visit_eu", "{table}: {lines:#}");
        let joined = json(&cluster, 0, &["list", "--all-nodes", "--table", table]).await;
        assert_eq!(
            joined["conflicts"].as_array().map(Vec::len),
            Some(1),
            "{table}: {joined:#}"
        );
        let stats = json(&cluster, 0, &["stats", "--table", table]).await;
        assert_eq!(stats["total"], 1, "{table}: {stats:#}");
        let said = json(&cluster, 0, &["suggest", table]).await;
        assert_eq!(said["conflicts"], 1, "{table}: {said:#}");
    }
    let lines = json(&cluster, 0, &["list", "--table", "public.visit_us"]).await;
    assert_eq!(lines, serde_json::json!([]));
    // Rows are those of the partition, under its name.
    let config = cluster.nodes[0].daemon.config_arg();
    let said = anabranch(&["doctor", "--output", "json", "--config", config]).await;
    let said = String::from_utf8_lossy(&said.stdout);
    for part in [
        " is last_update_wins, and not first_update_wins",
        "is of a partitioned table, whose rows the log has under the names of its partitions",
    ] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
}

#[tokio::test]
async fn a_redacted_column_is_in_no_line() {
    let cluster = Cluster::of([15, 15])
        .schema("create table item (id int primary key, v text check (v <> 'secret of n1'), w text)")
        .config("[conflict_log]\nredact = [\"public.item.v\"]")
        .start()
        .await;
    cluster
        .run(0, "insert into item values (1, 'base', 'base')")
        .await;
    cluster.converge().await;
    cluster
        .run(1, "alter table item add check (v <> 'secret refused')")
        .await;
    cluster
        .apart(&[
            (0, "update item set v = 'secret 1', w = 'x'"),
            (1, "update item set v = 'secret 2', w = 'y'"),
        ])
        .await;
    // A row that one server refuses, with the row in its words.
    cluster
        .run(0, "insert into item values (2, 'secret refused', 'z')")
        .await;
    let logged = "select count(*) from anabranch.conflict_history where conflict_type = 'check_violation'";
    cluster.wait_value(1, logged, "1").await;
    for node in cluster.all() {
        for line in cluster.conflicts_at(node).await {
            assert!(!line.everything().contains("secret"), "{line:#?}");
            assert_eq!(line.0["redacted_columns"], serde_json::json!(["v"]));
        }
    }
    let lines = json(&cluster, 0, &["list", "--type", "update_origin_differs"]).await;
    assert_eq!(
        lines[0]["lost_columns"],
        serde_json::json!(["v", "w"]),
        "{lines:#}"
    );
    let id = lines[0]["conflict_id"].as_str().unwrap();
    assert!(conflicts(&cluster, 0, &["show", id]).await.contains("[redacted]"));
    let config = cluster.nodes[0].daemon.config_arg();
    let said = anabranch_refuses(&["conflicts", "replay", id, "--config", config]).await;
    assert!(said.contains("redacted"), "{said}");
    conflicts(&cluster, 0, &["replay", id, "--columns", "w"]).await;
    cluster
        .wait_value(1, "select v || w from item where id = 1", "secret 2x")
        .await;
}

#[tokio::test]
async fn a_storm_is_kept_within_its_bound_counted_whole_and_said_aloud() {
    let cluster = Cluster::of([15, 15])
        .schema(ITEMS)
        .config("[conflict_log]\nlines_per_second = 10\nburst_lines = 200")
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into item select n, 'base', 'base' from generate_series(1, 3000) n",
        )
        .await;
    cluster.converge().await;
    let began = Instant::now();
    cluster
        .apart(&[
            (0, "update item set v = 'earlier'"),
            (1, "update item set v = 'later'"),
        ])
        .await;
    for node in cluster.all() {
        let all = "select (select count(*) from anabranch.conflict_history) + (select coalesce(sum(count), 0) from anabranch.conflict_storm)";
        cluster.wait_value(node, all, "3000").await;
        let lines: u64 = cluster
            .value(node, "select count(*) from anabranch.conflict_history")
            .await
            .parse()
            .unwrap();
        let most = 200 + 10 * (began.elapsed().as_secs() + 1);
        assert!(
            (1..=most).contains(&lines),
            "{lines} lines where {most} are allowed"
        );
        anabranch_tests::wait::until("its status tells how many were only counted", async || {
            cluster.status(node).await["apply"]["conflicts_counted"] == 3000 - lines
        })
        .await;
        let stats = json(&cluster, node, &["stats"]).await;
        assert_eq!(stats["total"], 3000, "{stats:#}");
        assert!(
            conflicts(&cluster, node, &["list"])
                .await
                .contains("only counted")
        );
    }
    anabranch_tests::wait::until("the storm is an alarm", async || {
        cluster.status(0).await["alarms"]
            .to_string()
            .contains("conflict_storm")
    })
    .await;
}

/// Prints what the log takes while conflicts come as fast as they can be applied.
#[tokio::test]
#[ignore = "takes minutes; a measurement"]
async fn a_storm_of_a_hundred_thousand_conflicts_is_measured() {
    for (limits, name) in [
        ("lines_per_second = 0", "no limit"),
        (
            "lines_per_second = 2000\nburst_lines = 2000",
            "2,000 lines/s, no burst",
        ),
    ] {
        let config = format!("[conflict_log]\n{limits}");
        let cluster = Cluster::of([15, 15]).schema(ITEMS).config(&config).start().await;
        cluster
            .run(
                0,
                "insert into item select n, 'base', 'base' from generate_series(1, 100000) n",
            )
            .await;
        cluster.converge_within(Duration::from_secs(240)).await;
        cluster.isolate_all();
        cluster.run(0, "update item set v = 'earlier'").await;
        cluster.run(1, "update item set v = 'later'").await;
        let size = "select pg_total_relation_size('anabranch.conflict_history_rest') + coalesce(sum(pg_total_relation_size(inhrelid)), 0) from pg_inherits where inhparent = 'anabranch.conflict_history'::regclass";
        let began = Instant::now();
        cluster.heal();
        let all = "select (select count(*) from anabranch.conflict_history) + (select coalesce(sum(count), 0) from anabranch.conflict_storm)";
        for node in cluster.all() {
            let session = cluster.admin(node).await;
            anabranch_tests::wait::until_ok(
                "every conflict is logged or counted",
                Duration::from_secs(300),
                async || {
                    let value = session.value(all).await;
                    if value == "100000" { Ok(()) } else { Err(value) }
                },
            )
            .await;
            let took = began.elapsed().as_secs_f64();
            let lines = session
                .value("select count(*) from anabranch.conflict_history")
                .await;
            let bytes: f64 = session.value(size).await.parse().unwrap();
            println!(
                "{name}: n{}: 100000 conflicts within {took:.1} s ({:.0}/s), {lines} lines, {:.1} MiB of log",
                node + 1,
                100_000.0 / took,
                bytes / 1048576.0
            );
        }
    }
}
