//! Columns of sets, documents and lists: what all add is there, what is taken out is gone, and nothing of it is logged as lost.

use anabranch_tests::Cluster;
use anabranch_tests::daemon::{anabranch, anabranch_ok, anabranch_refuses};
use anabranch_tests::wait::PATIENCE;
use serde_json::json;

const SCHEMA: &str = "create table item (id int primary key, title text, tags text[] not null default '{}', doc jsonb, \
    log text not null default '', seen int[], events jsonb, plain text)";

const POLICY: &str = r#"
    [[table]]
    name = "public.item"
    [table.columns]
    tags = "set_union"
    doc = "jsonb_merge"
    log = "append"
    seen = "append"
    events = "append"
"#;

/// Three nodes with one row.
async fn start() -> Cluster {
    let cluster = Cluster::of([15, 15, 18])
        .schema(SCHEMA)
        .policy(POLICY)
        .start()
        .await;
    cluster
        .run(
            0,
            r#"insert into item values (1, 'lamp', '{c,a,b}', '{"a": {"x": 1, "y": 1}, "b": 1}', 'made. ', '{0}', '[]')"#,
        )
        .await;
    cluster.converge().await;
    cluster
}

const TAGS: &str = "select tags::text from item";
const DOC: &str = "select doc::text from item";
const LISTS: &str = "select concat(log, seen, ' ', events) from item";

#[tokio::test]
async fn what_concurrent_writers_add_to_a_set_stays_and_what_they_take_out_goes() {
    let cluster = start().await;
    cluster
        .apart(&[
            (0, "update item set tags = tags || '{z}'"),
            (1, "update item set tags = array_remove(tags, 'a')"),
            (2, "update item set tags = array_remove(tags, 'b') || '{d,NULL}'"),
        ])
        .await;
    cluster.expect(TAGS, "{c,d,z,NULL}").await;
    // Who takes an element out takes out what it has seen: not the same element that another adds meanwhile.
    cluster
        .apart(&[
            (0, "update item set tags = tags || '{new}'"),
            (1, "update item set tags = tags || '{new}'"),
            (1, "update item set tags = array_remove(tags, 'new')"),
            (1, "update item set tags = array_remove(tags, 'd')"),
        ])
        .await;
    cluster.expect(TAGS, "{c,new,z,NULL}").await;
    // Who has seen it all does take it out; a row made everywhere holds what each put into it.
    cluster
        .run(2, "update item set tags = array_remove(tags, 'new')")
        .await;
    cluster.converge().await;
    cluster.expect(TAGS, "{c,z,NULL}").await;
    cluster
        .apart(&[
            (0, "update item set tags = '{c}'"),
            (1, "update item set tags = '{}'"),
            (2, "update item set tags = '{c,z,NULL,q}'"),
        ])
        .await;
    cluster.expect(TAGS, "{q}").await;
    assert_eq!(cluster.conflicts().await.len(), 0, "nothing was lost");
}

#[tokio::test]
async fn each_key_of_a_document_is_its_own_last_writers() {
    let cluster = start().await;
    cluster
        .apart(&[
            (0, r#"update item set doc = jsonb_set(doc, '{a,x}', '2.50')"#),
            (1, r#"update item set doc = doc #- '{a,y}'"#),
            (
                2,
                r#"update item set doc = doc || '{"long \"name\"": [1, {"k": null}]}'"#,
            ),
        ])
        .await;
    cluster
        .expect(
            DOC,
            r#"{"a": {"x": 2.50}, "b": 1, "long \"name\"": [1, {"k": null}]}"#,
        )
        .await;
    assert_eq!(cluster.conflicts().await.len(), 0, "nothing was lost");
    cluster
        .apart(&[
            (0, r#"update item set doc = doc || '{"b": 10}'"#),
            (1, r#"update item set doc = doc || '{"b": 11, "c": 3}'"#),
        ])
        .await;
    cluster
        .expect(
            DOC,
            r#"{"a": {"x": 2.50}, "b": 11, "c": 3, "long \"name\"": [1, {"k": null}]}"#,
        )
        .await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1, "{log:#?}");
    assert_eq!(log[0].0["lost_columns"], json!(["doc"]), "{log:#?}");
    assert_eq!(log[0].0["conflict_resolution"], "merge", "{log:#?}");
}

#[tokio::test]
async fn what_all_append_is_there_once_in_the_order_of_their_stamps() {
    let cluster = start().await;
    let append = |number: i32| {
        format!(
            "update item set log = log || '{number}. ', seen = seen || {number}, events = events || '[{{\"n\": {number}}}]'"
        )
    };
    let texts: Vec<String> = (1..=4).map(append).collect();
    let writes: Vec<(usize, &str)> = texts
        .iter()
        .enumerate()
        .map(|(at, text)| (at % 3, &text[..]))
        .collect();
    cluster.apart(&writes).await;
    let all = r#"made. 1. 2. 3. 4. {0,1,2,3,4} [{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}]"#;
    cluster.expect(LISTS, all).await;
    assert_eq!(cluster.conflicts().await.len(), 0, "nothing was lost");
    // What is no append is the last writer's, with what is appended above it.
    cluster
        .apart(&[
            (0, "update item set log = log || 'lost'"),
            (1, "update item set log = 'anew. '"),
            (2, "update item set log = log || 'kept. '"),
        ])
        .await;
    cluster.expect("select log from item", "anew. kept. ").await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1, "{log:#?}");
    assert_eq!(log[0].0["lost_columns"], json!(["log"]), "{log:#?}");
    assert!(log[0].everything().contains("4. lost"), "{log:#?}");
}

#[tokio::test]
async fn a_set_a_document_or_a_list_is_written_again_by_force_alone() {
    let cluster = start().await;
    // An array of several dimensions is no set.
    cluster
        .apart(&[
            (
                0,
                r#"update item set title = 'earlier', tags = tags || '{z}', doc = doc || '{"b": 10}', log = log || 'lost'"#,
            ),
            (
                1,
                r#"update item set title = 'later', tags = '{{p},{q}}', doc = doc || '{"b": 11, "c": 3}', log = 'anew'"#,
            ),
        ])
        .await;
    let row = "select concat_ws(' ', title, tags, doc, log) from item";
    let merged = r#"{{p},{q}} {"a": {"x": 1, "y": 1}, "b": 11, "c": 3} anew"#;
    cluster.expect(row, &format!("later {merged}")).await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1, "{log:#?}");
    assert_eq!(
        log[0].0["lost_columns"],
        json!(["title", "tags", "doc", "log"]),
        "{log:#?}"
    );
    let id = log[0].0["conflict_id"].as_str().expect("an id");
    let config = cluster.nodes[2].daemon.config_arg();
    let replay = ["conflicts", "--config", config, "replay", id];
    let said = anabranch_refuses(&replay).await;
    for part in [
        "column(s) tags (set_union), doc (jsonb_merge), log (append)",
        "--columns title writes the others",
    ] {
        assert!(said.contains(part), "`{part}` is not in {said}");
    }
    anabranch_ok(&[&replay[..], &["--columns", "title"]].concat()).await;
    cluster.converge().await;
    cluster.expect(row, &format!("earlier {merged}")).await;
    anabranch_ok(&[&replay[..], &["--force"]].concat()).await;
    cluster.converge().await;
    let alone = r#"earlier {c,a,b,z} {"a": {"x": 1, "y": 1}, "b": 10} made. lost"#;
    cluster.expect(row, alone).await;
}

#[tokio::test]
async fn nothing_that_is_added_apart_is_lost_through_killed_daemons() {
    let mut cluster = start().await;
    let write = |node: usize, round: usize| {
        format!(
            "update item set seen = seen || {0}, tags = array_remove(tags, 'was{0}') || array['n{0}', 'was{1}'], \
             doc = doc || jsonb_build_object('k{node}', {round})",
            round * 10 + node,
            round * 10 + 10 + node,
        )
    };
    for round in 1..4 {
        cluster.isolate_all();
        for node in 0..3 {
            cluster.run(node, &write(node, round * 2)).await;
        }
        cluster.kill_daemons();
        for node in 0..3 {
            cluster.run(node, &write(node, round * 2 + 1)).await;
        }
        cluster.heal();
        cluster.start_daemons();
        cluster.converge().await;
        let (rounds, seen) = (round * 2 + 2, 1 + round * 6);
        let counted = "select cardinality(seen) || ' ' || (select count(distinct n) from unnest(seen) n) || ' ' || \
            (select count(*) from unnest(tags) t where t like 'n%') || ' ' || \
            (select string_agg(t, ' ' order by t) from unnest(tags) t where t like 'was%') || ' ' || (doc - 'a') from item";
        let was: Vec<String> = (0..3).map(|node| format!("was{}", rounds * 10 + node)).collect();
        let last = rounds - 1;
        cluster
            .expect(
                counted,
                &format!(
                    "{seen} {seen} {} {} {{\"b\": 1, \"k0\": {last}, \"k1\": {last}, \"k2\": {last}}}",
                    seen - 1,
                    was.join(" ")
                ),
            )
            .await;
    }
    assert_eq!(cluster.conflicts().await.len(), 0, "nothing was lost");
}

#[tokio::test]
async fn a_rule_for_a_column_of_another_type_is_refused_with_the_types_that_it_is_for() {
    let mut cluster = Cluster::of([15, 18])
        .schema(&format!(
            "{SCHEMA}; alter table item add check (cardinality(tags) < 9)"
        ))
        .policy("")
        .without_daemons()
        .start()
        .await;
    let wrong = POLICY.replace(
        "doc = \"jsonb_merge\"",
        "doc = \"set_union\"\nplain = \"jsonb_merge\"\nid = \"append\"",
    );
    let path = cluster.nodes[0].data_dir.with_file_name("policy.toml");
    std::fs::write(path, wrong).expect("write the policy");
    let daemon = &mut cluster.nodes[0].daemon;
    let said = anabranch(&["doctor", "--config", daemon.config_arg()]).await;
    assert!(!said.status.success());
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    daemon.start();
    assert!(!daemon.wait_exit(PATIENCE).expect("it ends").success());
    for text in [said, daemon.log()] {
        for part in [
            "column `doc` is of type jsonb, and set_union is for arrays",
            "column `plain` is of type text, and jsonb_merge is for jsonb",
            "column `id` is part of the primary key",
            "column `tags` is merged by set_union and has a CHECK",
        ] {
            assert!(text.contains(part), "`{part}` is not in {text}");
        }
    }
}
