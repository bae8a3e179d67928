//! A cluster grows: an empty server becomes a member with a copy of another's rows, while everybody writes.

use std::time::Duration;

use anabranch_tests::Cluster;
use anabranch_tests::cluster::create_cluster;
use anabranch_tests::daemon::{anabranch, anabranch_ok, anabranch_refuses};
use anabranch_tests::load::{self, Load};
use anabranch_tests::postgres::{DATABASE, bin_dir, dump_dir};
use anabranch_tests::process::peak_memory_mib;
use anabranch_tests::session::Session;
use anabranch_tests::wait::{PATIENCE, until, until_ok};

const SCHEMA: &str = "
    create type mood as enum ('sad', 'glad');
    create table item (id int primary key, v text, m mood, tags text[], moods mood[]);
    create index item_v on item (v);
    create table part (id bigserial primary key, item int references item, n int not null check (n >= 0), unique (item, n));
    create table place (region text, id int, primary key (region, id)) partition by list (region);
    create table place_north partition of place for values in ('north');
    create view glad as select id from item where m = 'glad'";

const ROWS: &str = "
    insert into item select i, 'v' || i, case when i % 2 = 0 then 'glad' else 'sad' end::mood, array['a', 'b' || i],
        array['sad']::mood[] from generate_series(1, 5000) i;
    insert into part (item, n) select i, i from generate_series(1, 5000) i";

#[tokio::test]
async fn a_server_joins_with_a_copy_and_replicates_both_ways() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    cluster.join(node, 0).await;
    let read_only = "show default_transaction_read_only";
    assert_eq!(cluster.session(node).await.value(read_only).await, "on");
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    assert_eq!(
        cluster
            .value(node, "select count(*) from part join item on item.id = part.item")
            .await,
        "5000"
    );
    for node in cluster.all() {
        cluster
            .run(
                node,
                &format!("update item set v = 'by {node}' where id = {node} + 1"),
            )
            .await;
    }
    cluster.converge().await;
    cluster
        .expect("select count(*) from item where v like 'by %'", "3")
        .await;
    cluster
        .expect(
            "select count(*) from pg_indexes where schemaname = 'public' and tablename in ('item', 'part')",
            "4",
        )
        .await;
    cluster.expect("select count(*) from glad", "2500").await;
    // What is to be put back is what the donor's tables had before it was set up.
    let identities = "select string_agg(table_name || ' ' || identity, ',' order by table_name) from anabranch.identity_before";
    let before = cluster.value(0, identities).await;
    assert!(before.contains("item d"), "{before}");
    assert_eq!(cluster.value(node, identities).await, before);
    // The sequence goes on after the donor's.
    cluster
        .run(node, "insert into part (item, n) values (1, 9999)")
        .await;
    cluster.converge().await;
    cluster.expect_no_conflict().await;
    // The donor lets the snapshot go.
    cluster
        .wait_value(
            0,
            "select count(*) from pg_replication_slots where temporary",
            "0",
        )
        .await;
}

/// Waits until the first member knows again what is applied everywhere: it waits for no node that was given up.
async fn members_forget(cluster: &Cluster) {
    until("the members forget without it", async || {
        let positions = cluster.status(0).await["positions"].clone();
        ["applied", "stable"]
            .iter()
            .all(|what| positions[what]["1"]["lsn"].is_string())
    })
    .await;
}

#[tokio::test]
async fn one_server_with_data_becomes_a_cluster_and_others_join_it() {
    let mut cluster = Cluster::of([15]).bare().schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    create_cluster(&cluster.nodes[0]).await;
    cluster.nodes[0].daemon.start();
    // The second one from the one that has just joined.
    for (version, donor) in [(15, 0), (18, 1)] {
        let node = cluster.add_server(version).await;
        cluster.join(node, donor).await;
        cluster.nodes[node].daemon.start();
        cluster.wait_writable(node).await;
        let sql = format!("update item set v = 'by {node}' where id = {node}");
        cluster.run(node, &sql).await;
    }
    cluster
        .run(0, "insert into part (item, n) values (1, 9001)")
        .await;
    cluster.converge().await;
    cluster
        .expect(
            "select count(*) from part join item on item.id = part.item",
            "5001",
        )
        .await;
    cluster
        .expect(
            "select string_agg(v, ', ' order by id) from item where v like 'by %'",
            "by 1, by 2",
        )
        .await;
    cluster.expect_no_conflict().await;
    // One that has peers is no beginning.
    let config = cluster.nodes[1].daemon.config_arg().to_owned();
    let said = anabranch_refuses(&["cluster", "create", "--config", &config]).await;
    assert!(said.contains("anabranch join"), "{said}");
    // Nor has one that has joined anything to give up.
    let mut args = cluster.join_command(1, 0);
    args.push("--abandon".to_owned());
    let said = anabranch_refuses(&args.iter().map(String::as_str).collect::<Vec<_>>()).await;
    assert!(said.contains("`anabranch leave`"), "{said}");
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_copy_of_hundreds_of_megabytes_needs_room_for_a_few_rows() {
    let mut cluster = Cluster::of([15])
        .bare()
        .schema(
            "create table wide (id int primary key, v text); alter table wide alter v set storage external",
        )
        .start()
        .await;
    let rows = "insert into wide select i, repeat('x', 1000000) from generate_series(1, 400) i";
    cluster.run(0, rows).await;
    create_cluster(&cluster.nodes[0]).await;
    cluster.nodes[0].daemon.start();
    let node = cluster.add_server(15).await;
    let mut join = cluster.spawn_join(node, 0);
    let mut peak = 0;
    let ended = loop {
        peak = peak.max(peak_memory_mib(join.id()));
        if let Some(ended) = join.try_wait().expect("look at the join") {
            break ended;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(ended.success(), "{ended}");
    assert!((1..200).contains(&peak), "{peak} MiB");
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    let all = "select count(*) || ' ' || min(length(v)) from wide";
    cluster.expect(all, "400 1000000").await;
}

#[tokio::test]
async fn a_server_joins_under_load_at_every_other_node() {
    let mut cluster = Cluster::of([15, 18, 15]).schema(load::SCHEMA).start().await;
    let node = cluster.add_server(18).await;
    let load = Load::start(
        &cluster,
        &[0, 1, 2],
        load::Options {
            delete_one_in: 10,
            ..load::Options::default()
        },
    );
    tokio::time::sleep(Duration::from_secs(2)).await;
    cluster.join(node, 0).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let ledger = load.stop().await;
    cluster.converge_within(Duration::from_secs(120)).await;
    ledger.account(&cluster).await;
}

/// What versions write differently into a dump, or keep differently in their catalogs.
const VARIED: &str = "
    create type mood as enum ('sad', 'glad');
    create domain amount as numeric(12, 2) not null check (value >= 0);
    create table item (id serial primary key, name text not null, m mood not null default 'glad', price amount default 1,
        taxed numeric generated always as (price * 1.2) stored, tags text[],
        constraint item_name unique nulls not distinct (name), constraint item_named check (name <> ''));
    create index item_cheap on item (lower(name) collate \"C\", price desc) include (m) where price < 10;
    create table part (id bigint generated always as identity primary key,
        item int not null constraint of_item references item on delete cascade deferrable, n int not null);
    create index part_item on part (item);
    create table place (region text, id bigint generated by default as identity, v text constraint place_v not null,
        primary key (region, id)) partition by list (region);
    create table place_north partition of place for values in ('north');
    create table place_else partition of place default;
    create index place_v_idx on place (v);
    comment on constraint item_named on item is 'it''s
SET transaction_timeout = 0;
not empty';
    create function doubled(n int) returns int language sql immutable begin atomic select 2 * n; end;
    create function noted() returns trigger language plpgsql as 'begin new.v := lower(new.v); return new; end';
    create trigger noted before insert on place for each row execute function noted();
    create view cheap as select id, name, doubled(id) as twice from item where price < 10;
    create materialized view moods as select m, count(*) as n from item group by m;
    create unique index moods_m on moods (m);
    create statistics item_stat on name, m from item;
    grant select on item to public";

const VARIED_ROWS: &str = "
    insert into item (name, m, price, tags) select 'item ' || i, case when i % 3 = 0 then 'sad' else 'glad' end::mood, i % 20,
        array['a', 'b' || i] from generate_series(1, 600) i;
    insert into part (item, n) select id, id from item;
    insert into place (region, v) select case when i % 2 = 0 then 'north' else 'r' || i end, 'Place ' || i from generate_series(1, 200) i;
    refresh materialized view moods";

/// What the catalogs say of it, as far as versions say the same. (From 17 on partitions have an identity themselves; from 18 on NOT NULL
/// is a constraint.)
const VARIED_SHAPE: &str = "
    select string_agg(line, E'\n' order by line) from (
        select indexdef from pg_indexes where schemaname = 'public'
        union all select concat_ws(' ', conrelid::regclass, conname, pg_get_constraintdef(oid), obj_description(oid, 'pg_constraint'))
            from pg_constraint where connamespace = 'public'::regnamespace and contype <> 'n' and conrelid <> 0
        union all select concat_ws(' ', attrelid::regclass, attname, format_type(atttypid, atttypmod), attnotnull, attgenerated,
                case when not relispartition then attidentity end, pg_get_expr(adbin, adrelid))
            from pg_attribute a join pg_class c on c.oid = attrelid left join pg_attrdef d on (adrelid, adnum) = (attrelid, attnum)
            where relnamespace = 'public'::regnamespace and relkind in ('r', 'p', 'm', 'v') and attnum > 0 and not attisdropped
        union all select concat_ws(' ', oid::regclass, relkind, relispartition, pg_get_expr(relpartbound, oid)) from pg_class
            where relnamespace = 'public'::regnamespace
        union all select format('%s %s', oid::regprocedure, pg_get_functiondef(oid)) from pg_proc where pronamespace = 'public'::regnamespace
        union all select pg_get_triggerdef(oid) from pg_trigger where not tgisinternal
        union all select pg_get_statisticsobjdef(oid) from pg_statistic_ext
    ) x (line)";

/// A cluster of one server with all that, whose sequences are divided.
async fn one_with_varied(version: u32) -> Cluster {
    let mut cluster = Cluster::of([version])
        .bare()
        .schema(load::SCHEMA)
        .schema(VARIED)
        .start()
        .await;
    cluster.run(0, VARIED_ROWS).await;
    create_cluster(&cluster.nodes[0]).await;
    cluster.nodes[0].daemon.start();
    let config = cluster.nodes[0].daemon.config_arg();
    let admin = cluster.nodes[0].server.dsn("postgres", DATABASE);
    anabranch_ok(&["sequences", "apply", "--config", config, "--admin-dsn", &admin]).await;
    cluster
}

/// A server that was added joins while the donor is written to. Returns what the command says.
async fn join_while_one_writes(cluster: &mut Cluster, node: usize, donor: usize) -> String {
    let options = load::Options {
        clients: 1,
        pause: Duration::from_millis(20),
        delete_one_in: 10,
        seed: node as u64,
        ..load::Options::default()
    };
    let load = Load::start(cluster, &[donor], options);
    let said = cluster.join(node, donor).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    let ledger = load.stop().await;
    cluster.converge().await;
    ledger.account(cluster).await;
    said
}

/// All nodes have the same rows and the same schema, and each goes on with ids of its own.
async fn expect_varied(cluster: &Cluster) {
    let shapes = cluster.values(VARIED_SHAPE).await;
    for shape in &shapes {
        assert_eq!(*shape, shapes[0]);
    }
    let moods = "select string_agg(m || ' ' || n, ', ' order by m) from moods";
    cluster.expect(moods, "sad 200, glad 400").await;
    for node in cluster.all() {
        let write = format!(
            "with made as (insert into item (name, price) values ('by {node}', {node}) returning id)
                 insert into part (item, n) select id, {node} from made;
             insert into place (region, v) values ('north', 'By {node}'), ('east', 'By {node}');
             update item set price = price + 1 where id = {node} + 1"
        );
        cluster.run(node, &write).await;
    }
    cluster.converge().await;
    let count = cluster.all().len();
    cluster
        .expect(
            "select count(*) from part join item on item.id = part.item where taxed = price * 1.2",
            &(600 + count).to_string(),
        )
        .await;
    cluster
        .expect(
            "select count(*) from place where v like 'by %'",
            &(2 * count).to_string(),
        )
        .await;
    cluster.expect_no_conflict().await;
    // Its own foreign keys hold.
    let last = cluster.session(count - 1).await;
    assert!(
        last.try_run("insert into part (item, n) values (-1, 1)")
            .await
            .is_err()
    );
}

/// Runs a join with these arguments, which ends by itself. Was all well, and what does it say?
async fn try_join(command: &[String]) -> (bool, String) {
    let output = anabranch(&command.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.success(), said)
}

/// Said before a join begins where not all versions are the same.
const TRIED: &str = "all of the donor's can be made here, as pg_dump 18 writes it";

#[tokio::test]
async fn newer_servers_join_an_older_one_and_one_another() {
    let mut cluster = one_with_varied(15).await;
    for donor in [0, 1] {
        let node = cluster.add_server(18).await;
        let said = join_while_one_writes(&mut cluster, node, donor).await;
        assert_eq!(said.contains(TRIED), donor == 0, "{said}");
    }
    expect_varied(&cluster).await;
}

#[tokio::test]
async fn an_older_server_joins_a_newer_one_unless_that_has_what_it_does_not_know() {
    let mut cluster = one_with_varied(18).await;
    let of_18 = "
        alter table part add column twice int generated always as (n * 2) virtual;
        create view ids as select uuidv7() as id";
    cluster.run(0, of_18).await;
    let node = cluster.add_server(15).await;
    let mut command = cluster.join_command(node, 0);
    let (is_done, said) = try_join(&command).await;
    assert!(!is_done, "{said}");
    for word in [
        "\"TABLE public.part\"",
        "at `\\\"twice\\\" integer GENERATED ALWAYS AS",
        "\"VIEW public.ids\"",
        "join with a server of PostgreSQL 18, or change it at the members",
    ] {
        assert!(said.contains(word), "{word}: {said}");
    }
    // Nobody has heard of it, and nothing of it is left.
    let known = "select count(*) from anabranch.member where node_id = 2";
    assert_eq!(cluster.value(0, known).await, "0");
    let made = "select count(*) from pg_namespace n left join pg_class c on c.relnamespace = n.oid \
        where nspname like 'anabranch%' or nspname = 'public' and c.oid is not null";
    assert_eq!(cluster.value(node, made).await, "0");
    // The programs of 15 cannot read it at all.
    let folder = command.last_mut().expect("the folder of pg_dump");
    *folder = bin_dir(15).to_str().expect("a path in UTF-8").to_owned();
    let (is_done, said) = try_join(&command).await;
    assert!(
        !is_done && said.contains("the client programs of the donor's version"),
        "{said}"
    );
    cluster
        .run(0, "drop view ids; alter table part drop column twice")
        .await;
    let said = join_while_one_writes(&mut cluster, node, 0).await;
    assert!(said.contains(TRIED), "{said}");
    expect_varied(&cluster).await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn servers_of_all_versions_join_from_one_another() {
    let mut cluster = one_with_varied(16).await;
    for (donor, version) in [18, 17, 15, 16].into_iter().enumerate() {
        let node = cluster.add_server(version).await;
        let said = join_while_one_writes(&mut cluster, node, donor).await;
        assert!(said.contains(TRIED), "{said}");
    }
    // And from one of the same version, by a newer pg_dump.
    let node = cluster.add_server(15).await;
    let mut command = cluster.join_command(node, 3);
    let folder = command.last_mut().expect("the folder of pg_dump");
    *folder = dump_dir(18).to_str().expect("a path in UTF-8").to_owned();
    let (is_done, said) = try_join(&command).await;
    assert!(is_done && said.contains(TRIED), "{said}");
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    expect_varied(&cluster).await;
}

#[tokio::test]
async fn a_server_joins_while_a_member_is_down_and_takes_writes_when_that_is_back() {
    let mut cluster = Cluster::of([15, 15, 15]).schema(SCHEMA).start().await;
    cluster
        .run(2, "insert into item values (1, 'from the one that goes down')")
        .await;
    cluster.converge().await;
    cluster.nodes[2].daemon.stop();
    cluster
        .run(0, "insert into item values (2, 'while it is down')")
        .await;
    let node = cluster.add_server(15).await;
    cluster.join(node, 0).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_value(node, "select count(*) from item", "2").await;
    cluster
        .run(1, "insert into item values (3, 'after the copy')")
        .await;
    cluster.wait_value(node, "select count(*) from item", "3").await;
    until("the joiner says for whom it waits", async || {
        cluster.status(node).await["node"]["state"]
            .as_str()
            .is_some_and(|state| state.contains("node n3 (3)"))
    })
    .await;
    let refused = cluster
        .session(node)
        .await
        .try_run("insert into item values (4)")
        .await;
    assert!(
        refused.is_err(),
        "the joiner takes a write before every member knows it"
    );
    // What the member wrote while it was alone is concurrent with all of it.
    cluster.run(2, "insert into item values (5, 'alone')").await;
    cluster.nodes[2].daemon.start();
    cluster.wait_writable(node).await;
    cluster
        .run(node, "insert into item values (6, 'by the joiner')")
        .await;
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(id::text, ',' order by id) from item",
            "1,2,3,5,6",
        )
        .await;
}

#[tokio::test]
async fn a_joiner_without_a_share_of_the_sequences_is_told_before_anything_is_copied() {
    let mut cluster = Cluster::of([15, 15])
        .schema(SCHEMA)
        .config("[sequences]\nincrement = 2\n")
        .start()
        .await;
    for member in cluster.all() {
        let config = cluster.nodes[member].daemon.config_arg().to_owned();
        let admin = cluster.nodes[member].server.dsn("postgres", DATABASE);
        anabranch_ok(&["sequences", "apply", "--config", &config, "--admin-dsn", &admin]).await;
    }
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    // By three here, and by two at the members, which have no room for a third.
    cluster.nodes[node]
        .daemon
        .edit_config(|text| format!("{text}\n[sequences]\nincrement = 3\n"));
    let command = cluster.join_command(node, 0);
    let output = anabranch(&command.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!output.status.success(), "{said}");
    assert!(
        said.contains("is 3, and the members divide their sequences by 2")
            && said.contains("sequences apply"),
        "{said}"
    );
    let known = "select count(*) from anabranch.member where node_id = 3";
    assert_eq!(cluster.value(0, known).await, "0");
    // As it is told.
    for member in [0, 1] {
        cluster.nodes[member]
            .daemon
            .edit_config(|text| text.replace("increment = 2", "increment = 3"));
        let config = cluster.nodes[member].daemon.config_arg().to_owned();
        let admin = cluster.nodes[member].server.dsn("postgres", DATABASE);
        anabranch_ok(&["sequences", "apply", "--config", &config, "--admin-dsn", &admin]).await;
    }
    cluster.converge_among(&[0, 1], PATIENCE).await;
    cluster.join(node, 0).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    for of in cluster.all() {
        cluster
            .run(
                of,
                "insert into item select 100, 'for parts' where not exists (select from item where id = 100)",
            )
            .await;
        cluster.converge().await;
        cluster
            .run(
                of,
                &format!(
                    "insert into part (item, n) select 100, {of} * 1000 + i from generate_series(1, 20) i"
                ),
            )
            .await;
    }
    cluster.converge().await;
    cluster.expect("select count(*) from part", "60").await;
    cluster.expect_no_conflict().await;
}

/// `ddl.roles` as the members have it.
const DDL: &str = "[ddl]\nroles = [\"app\"]\n";

const MANY: &str = "
    create table item (id int primary key, v text);
    create table place (region text, id int, n int not null, primary key (region, id)) partition by list (region);
    create table place_north partition of place for values in ('north');
    create table place_south partition of place for values in ('south');
    create table tiny (id int primary key, n int)";

const ROWS_OF_MANY: &str = "
    insert into item select i, 'v' || i from generate_series(1, 20000) i;
    insert into place select r, i, i from unnest(array['north', 'south']) r, generate_series(1, 9000) i;
    insert into tiny select i, i from generate_series(1, 10) i";

/// A join will run `what` at the end of steps that are named so (a pattern of SIMILAR TO), before it commits them. The session is an
/// administrator's.
async fn stop_before_commit(cluster: &Cluster, node: usize, steps: &str, what: &str) -> Session {
    let admin = cluster.admin(node).await;
    admin
        .run(&format!(
            "create schema anabranch_join;
             create table anabranch_join.done (what text primary key);
             create function anabranch_join.stop() returns trigger language plpgsql as
                 'begin perform {what}; return new; end';
             create trigger stop before insert on anabranch_join.done for each row
                 when (new.what similar to '{steps}') execute function anabranch_join.stop();
             alter table anabranch_join.done enable always trigger stop"
        ))
        .await;
    admin
}

/// A join of which no piece is committed while the session that is returned holds its lock.
async fn held_join(cluster: &Cluster, node: usize) -> (std::process::Child, Session) {
    let admin = stop_before_commit(cluster, node, "copy %", "pg_advisory_xact_lock_shared(42)").await;
    admin.run("select pg_advisory_lock(42)").await;
    let join = cluster.spawn_join(node, 0);
    cluster
        .wait_value(
            node,
            "select (count(*) > 0)::text from pg_locks where locktype = 'advisory' and objid = 42 and not granted",
            "true",
        )
        .await;
    (join, admin)
}

/// One more server, which knows `ddl.roles` as the others do.
async fn add_server_with_ddl(cluster: &mut Cluster, version: u32) -> usize {
    let node = cluster.add_server(version).await;
    cluster.nodes[node]
        .daemon
        .edit_config(|text| text.to_owned() + DDL);
    node
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_server_joins_while_a_table_is_rewritten_and_one_is_made() {
    let mut cluster = Cluster::of([15, 18]).schema(MANY).config(DDL).start().await;
    cluster.run(0, ROWS_OF_MANY).await;
    cluster.converge().await;
    let node = add_server_with_ddl(&mut cluster, 15).await;
    let (mut join, held) = held_join(&cluster, node).await;
    // A rewrite at the other member, which comes to the donor before its rows of then are copied.
    cluster
        .run(
            1,
            "begin; select anabranch.replicate_ddl('alter table tiny alter column n type text using ''n'' || n::text'); \
             insert into tiny values (11, 'new'); commit",
        )
        .await;
    cluster
        .run(
            1,
            "begin; select anabranch.replicate_ddl('create table fresh (id int primary key, v text)'); \
             insert into fresh values (1, 'fresh'); commit",
        )
        .await;
    cluster
        .wait_value(
            0,
            "select count(*) from pg_attribute where attrelid = to_regclass('fresh') and attname = 'v'",
            "1",
        )
        .await;
    cluster
        .run(0, "insert into item values (30000, 'at the donor')")
        .await;
    cluster
        .wait_value(1, "select count(*) from item where id = 30000", "1")
        .await;
    held.run("select pg_advisory_unlock(42)").await;
    let ended = tokio::task::spawn_blocking(move || join.wait())
        .await
        .expect("no panic");
    assert!(ended.expect("wait for the join").success());
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster
        .run(node, "insert into fresh values (2, 'by the joiner')")
        .await;
    cluster
        .run(node, "update place set n = 0 where region = 'south' and id = 7")
        .await;
    cluster
        .run(
            node,
            "select anabranch.replicate_ddl('alter table fresh add column more int')",
        )
        .await;
    cluster.run(node, "update fresh set more = 3 where id = 1").await;
    cluster.converge().await;
    cluster
        .expect("select count(*) || min(n) || max(n) from tiny", "11n1new")
        .await;
    cluster
        .expect(
            "select string_agg(id || v || coalesce(more, 0), ',' order by id) from fresh",
            "1fresh3,2by the joiner0",
        )
        .await;
    cluster.expect("select count(*) from place", "18000").await;
    cluster.expect("select count(*) from item", "20001").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn a_statement_that_was_done_by_hand_at_the_donor_is_passed_over_by_the_joiner_too() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).config(DDL).start().await;
    cluster
        .run(1, "insert into item values (1, 'from the one that goes down')")
        .await;
    cluster.converge().await;
    cluster.nodes[1].daemon.stop();
    let add = "alter table item add column note text";
    let app = cluster.session(1).await;
    let id = app
        .value(&format!("select anabranch.replicate_ddl('{add}')::text"))
        .await;
    cluster.run(0, add).await;
    cluster.nodes[0].daemon.stop();
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    anabranch_ok(&["ddl", "--done", &id, "--config", &config]).await;
    cluster.nodes[0].daemon.start();
    let node = add_server_with_ddl(&mut cluster, 15).await;
    cluster.join(node, 0).await;
    cluster.nodes[node].daemon.start();
    cluster.run(1, "update item set note = 'behind it'").await;
    cluster.nodes[1].daemon.start();
    cluster.wait_writable(node).await;
    cluster
        .wait_value(node, "select note from item", "behind it")
        .await;
    cluster.converge().await;
}

/// A join that had its snapshot and nothing else, killed; whatever kept it from getting on is gone.
async fn join_that_only_cut(cluster: &Cluster, node: usize) {
    let (mut join, held) = held_join(cluster, node).await;
    join.kill().expect("kill the join");
    let _ = join.wait();
    held.run("select pg_advisory_unlock(42)").await;
    cluster
        .wait_value(
            0,
            "select count(*) from pg_stat_activity where application_name = 'anabranch:join'",
            "0",
        )
        .await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_table_that_was_rewritten_since_the_snapshot_is_not_copied_as_if_it_were_empty() {
    let mut cluster = Cluster::of([15, 15]).schema(MANY).start().await;
    cluster.run(0, ROWS_OF_MANY).await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    join_that_only_cut(&cluster, node).await;
    // By hand, at every member.
    for member in [0, 1] {
        cluster
            .admin(member)
            .await
            .run("alter table tiny alter column n type bigint using n + 1000000")
            .await;
    }
    let said = cluster.join(node, 0).await;
    assert!(
        said.contains("public.tiny was rewritten or dropped at the donor since the snapshot was cut"),
        "nothing was said of it:\n{said}"
    );
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    cluster
        .expect(
            "select count(*) || pg_typeof(min(n))::text || min(n) from tiny",
            "10bigint1000001",
        )
        .await;
    cluster.expect("select count(*) from place", "18000").await;
}

/// A join that was killed with the tables made and no row of them committed.
async fn join_without_rows(cluster: &Cluster, node: usize) {
    let (join, held) = held_join(cluster, node).await;
    killed(cluster, node, join).await;
    held.run("select pg_advisory_unlock(42)").await;
    let copied = "select count(*) from anabranch_join.done where what like 'copy %'";
    assert_eq!(cluster.value(node, copied).await, "0");
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn tables_that_were_renamed_or_altered_before_they_are_copied_cost_another_snapshot() {
    let mut cluster = Cluster::of([15, 15]).schema(MANY).start().await;
    cluster.run(0, ROWS_OF_MANY).await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    join_without_rows(&cluster, node).await;
    // By hand, at every member.
    for member in [0, 1] {
        cluster
            .admin(member)
            .await
            .run("alter table tiny rename column n to named; alter table item rename to thing")
            .await;
    }
    let said = cluster.join(node, 0).await;
    assert!(
        said.contains(
            "public.item, public.tiny was renamed or altered at the donor since the snapshot was cut"
        ),
        "nothing was said of it:\n{said}"
    );
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    cluster.expect("select count(named) from tiny", "10").await;
    cluster.expect("select count(*) from thing", "20000").await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn tables_and_columns_whose_names_others_have_before_they_are_copied_cost_another_snapshot() {
    let mut cluster = Cluster::of([15, 15])
        .schema(MANY)
        .schema(
            "create table one (id int primary key, a int, b int);
             create table other (like one including all);
             create table pair (like one including all)",
        )
        .start()
        .await;
    cluster.run(0, ROWS_OF_MANY).await;
    cluster
        .run(
            0,
            "insert into one values (1, 10, 20); insert into other values (1, 30, 40); insert into pair values (1, 50, 60)",
        )
        .await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    join_without_rows(&cluster, node).await;
    // By hand, at every member. Whoever asks by a name of before finds something.
    for member in [0, 1] {
        cluster
            .admin(member)
            .await
            .run(
                "alter table one rename to third; alter table other rename to one; alter table third rename to other;
                 alter table pair rename column a to c; alter table pair rename column b to a; alter table pair rename column c to b",
            )
            .await;
    }
    let said = cluster.join(node, 0).await;
    assert!(
        said.contains(
            "public.one, public.other, public.pair was renamed or altered at the donor since the snapshot was cut"
        ),
        "nothing was said of it:\n{said}"
    );
    for (table, row) in [("one", "30,40"), ("other", "10,20"), ("pair", "60,50")] {
        let row_of = format!("select a || ',' || b from {table}");
        assert_eq!(cluster.value(node, &row_of).await, row, "{table}");
    }
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_type_that_was_changed_before_its_rows_are_copied_costs_another_snapshot() {
    let mut cluster = Cluster::of([15, 15])
        .schema(MANY)
        .schema(
            "create type pair as (a int, b int);
             create table paired (id int primary key, p pair)",
        )
        .start()
        .await;
    cluster.run(0, ROWS_OF_MANY).await;
    cluster.run(0, "insert into paired values (1, (1, 2))").await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    join_without_rows(&cluster, node).await;
    // By hand, at every member. No table has changed by it.
    for member in [0, 1] {
        cluster
            .admin(member)
            .await
            .run("alter type pair add attribute c int")
            .await;
    }
    let said = cluster.join(node, 0).await;
    assert!(said.contains("another snapshot is cut"), "{said}");
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    cluster.expect("select p from paired", "(1,2,)").await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_sequence_that_was_widened_since_the_snapshot_costs_another() {
    let mut cluster = Cluster::of([15, 15])
        .schema(SCHEMA)
        .schema("create sequence small maxvalue 10")
        .start()
        .await;
    let node = cluster.add_server(15).await;
    join_without_rows(&cluster, node).await;
    let wider = "alter sequence small maxvalue 1000; select setval('small', 500)";
    cluster.admin(0).await.run(wider).await;
    let said = cluster.join(node, 0).await;
    assert!(said.contains("another snapshot is cut"), "{said}");
    assert_eq!(cluster.value(node, "select last_value from small").await, "500");
}

#[tokio::test]
async fn a_table_that_left_the_donors_publication_since_the_snapshot_is_copied() {
    let mut cluster = Cluster::of([15, 15]).schema(MANY).start().await;
    cluster.run(0, ROWS_OF_MANY).await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    join_without_rows(&cluster, node).await;
    let publication = cluster.value(0, "select publication from anabranch.node").await;
    let leave = format!("alter publication {publication} drop table tiny");
    cluster.admin(0).await.run(&leave).await;
    cluster.join(node, 0).await;
    assert_eq!(cluster.value(node, "select count(*) from tiny").await, "10");
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn tables_that_were_emptied_or_moved_since_the_snapshot_need_no_other_snapshot() {
    let mut cluster = Cluster::of([15, 18]).schema(MANY).start().await;
    cluster.run(0, ROWS_OF_MANY).await;
    cluster.converge().await;
    let node = cluster.add_server(18).await;
    join_that_only_cut(&cluster, node).await;
    cluster
        .run(0, "truncate tiny; insert into tiny values (5, 55), (12, 12)")
        .await;
    cluster.run(0, "delete from place where id <= 8000").await;
    cluster.admin(0).await.run("vacuum full place_north").await;
    let said = cluster.join(node, 0).await;
    assert!(!said.contains("copied anew"), "it was not needed:\n{said}");
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.run(node, "update tiny set n = 13 where id = 12").await;
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(id || ':' || n, ',' order by id) from tiny",
            "5:55,12:13",
        )
        .await;
    cluster
        .expect("select count(*) || ':' || min(id) from place", "2000:8001")
        .await;
    cluster.expect("select count(*) from item", "20000").await;
    cluster.expect_no_conflict().await;
}

/// A join that does not get on once it is about to commit the steps of this pattern, in as many sessions as `count` says.
async fn stuck_at(
    cluster: &Cluster,
    node: usize,
    (steps, count): (&str, &str),
    more: &[&str],
) -> std::process::Child {
    stop_before_commit(cluster, node, steps, "pg_sleep(600)").await;
    let join = cluster.spawn_join_args(node, 0, more);
    cluster
        .wait_value(
            node,
            "select count(*) from pg_stat_activity where application_name = 'anabranch:join' and wait_event = 'PgSleep'",
            count,
        )
        .await;
    join
}

/// A join that does not get on once it has copied `part` and is about to commit it.
async fn stuck_join(cluster: &Cluster, node: usize) -> std::process::Child {
    stuck_at(cluster, node, ("copy public.part%", "1"), &[]).await
}

/// A cluster of two, and a third node whose join is stuck so.
async fn stuck_joiner() -> (Cluster, usize, std::process::Child) {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    let join = stuck_join(&cluster, node).await;
    (cluster, node, join)
}

/// What made it stuck is gone.
async fn free(cluster: &Cluster, node: usize) {
    let admin = cluster.admin(node).await;
    admin.run("set default_transaction_read_only = off").await;
    admin
        .run("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'anabranch:join'")
        .await;
    admin.run("drop trigger stop on anabranch_join.done").await;
}

#[tokio::test]
async fn status_says_how_far_a_join_is_that_copies_or_was_killed() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    let status = ["status", "--config", cluster.nodes[node].daemon.config_arg()].map(str::to_owned);
    let status = status.each_ref().map(String::as_str);
    let mut join = stuck_join(&cluster, node).await;
    let said = anabranch_refuses(&status).await;
    assert!(
        said.contains("`anabranch join` is at work: copy the rows"),
        "{said}"
    );
    join.kill().expect("kill the join");
    let _ = join.wait();
    let said = anabranch_refuses(&status).await;
    assert!(
        said.contains("nobody is at it") && said.contains("copy the rows") && said.contains("MiB are copied"),
        "{said}"
    );
    free(&cluster, node).await;
    cluster.join(node, 0).await;
    let said = anabranch_refuses(&status).await;
    assert!(said.contains("is it running") && !said.contains("join"), "{said}");
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
}

#[tokio::test]
async fn a_join_that_is_killed_goes_on_where_it_was() {
    let (mut cluster, node, mut join) = stuck_joiner().await;
    cluster
        .wait_value(
            node,
            "select count(*) from anabranch_join.done where what like 'copy public.item%'",
            "1",
        )
        .await;
    join.kill().expect("kill the join");
    let _ = join.wait();
    free(&cluster, node).await;
    cluster
        .run(0, "insert into item values (9001, 'meanwhile')")
        .await;
    let said = cluster.join(node, 0).await;
    assert!(
        said.lines()
            .any(|line| line.contains("public.item") && line.contains("\"before\":true")),
        "the finished table was copied again:\n{said}"
    );
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    cluster.expect("select count(*) from part", "5000").await;
    cluster.expect("select count(*) from item", "5001").await;
}

#[tokio::test]
async fn a_join_whose_own_server_is_killed_in_the_middle_goes_on_where_it_was() {
    let (mut cluster, node, mut join) = stuck_joiner().await;
    let done = "select count(*) from anabranch_join.done where what like 'copy public.item%'";
    cluster.wait_value(node, done, "1").await;
    // A copy does not wait for the disk: what is committed and not written may be gone, and is copied again then.
    let written = cluster.value(node, "select pg_current_wal_insert_lsn()").await;
    let flushed = format!("select (pg_current_wal_flush_lsn() >= '{written}')::text");
    cluster.wait_value(node, &flushed, "true").await;
    cluster.nodes[node].server.kill();
    let ended = tokio::task::spawn_blocking(move || join.wait())
        .await
        .expect("no panic");
    assert!(!ended.expect("wait for the join").success());
    cluster.nodes[node].server.start().await;
    assert_eq!(cluster.value(node, "select count(*) from part").await, "0");
    free(&cluster, node).await;
    cluster
        .run(0, "insert into item values (9001, 'meanwhile')")
        .await;
    let said = cluster.join(node, 0).await;
    assert!(!said.contains("another snapshot"), "{said}");
    assert!(
        said.lines()
            .any(|line| line.contains("public.item") && line.contains("\"before\":true")),
        "the finished table was copied again:\n{said}"
    );
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    cluster.expect("select count(*) from part", "5000").await;
    cluster.expect("select count(*) from item", "5001").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn a_piece_whose_commit_outlives_the_join_that_sent_it_is_not_copied_twice() {
    let mut cluster = Cluster::of([15, 15])
        .schema("create table part (n int primary key)")
        .start()
        .await;
    cluster
        .run(0, "insert into part select generate_series(1, 5000)")
        .await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    let join = stuck_join(&cluster, node).await;
    killed(&cluster, node, join).await;
    // What the join has sent last, in the middle of being carried out.
    let oid = cluster.value(0, "select 'part'::regclass::oid").await;
    let late = cluster.admin(node).await;
    late.run("set default_transaction_read_only = off").await;
    late.run(&format!(
        "begin; insert into part select generate_series(1, 5000); \
         insert into anabranch_join.done values ('copy public.part {oid} 0')"
    ))
    .await;
    let mut join = cluster.spawn_join(node, 0);
    cluster
        .wait_value(
            node,
            "select count(*) from pg_stat_activity where application_name = 'anabranch:join' and wait_event_type = 'Lock'",
            "1",
        )
        .await;
    late.run("commit").await;
    let ended = tokio::task::spawn_blocking(move || join.wait())
        .await
        .expect("no panic");
    assert!(ended.expect("wait for the join").success());
    assert_eq!(cluster.value(node, "select count(*) from part").await, "5000");
}

/// It is killed, and what made it stuck is gone.
async fn killed(cluster: &Cluster, node: usize, mut join: std::process::Child) {
    join.kill().expect("kill the join");
    let _ = join.wait();
    free(cluster, node).await;
    cluster
        .wait_value(
            0,
            "select count(*) from pg_stat_activity where application_name = 'anabranch:join'",
            "0",
        )
        .await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_table_that_grew_or_shrank_between_two_runs_is_copied_in_the_pieces_it_was_begun_in() {
    let mut cluster = Cluster::of([15, 15])
        .schema(
            "create table grows (id int primary key, v text) with (autovacuum_enabled = off);
             create table shrinks (id int primary key, v text) with (autovacuum_enabled = off)",
        )
        .start()
        .await;
    // Seven rows in a block: five pieces of 128 blocks, and of the second table the rows end in the fourth.
    for table in ["grows", "shrinks"] {
        let rows = format!("insert into {table} select i, repeat('x', 1000) from generate_series(1, 5000) i");
        cluster.run(0, &rows).await;
    }
    cluster.run(0, "delete from shrinks where id > 3300").await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    let steps = ("copy public.(grows % 0|shrinks % 384)", "2");
    let join = stuck_at(&cluster, node, steps, &["--piece", "1"]).await;
    for table in ["grows", "shrinks"] {
        let others =
            format!("select count(*) from anabranch_join.done where what like 'copy public.{table} %'");
        cluster.wait_value(node, &others, "4").await;
    }
    killed(&cluster, node, join).await;
    cluster
        .run(
            0,
            "insert into grows select i, repeat('y', 1000) from generate_series(5001, 8000) i",
        )
        .await;
    cluster.admin(0).await.run("vacuum (truncate) shrinks").await;
    let cut_off = "select (pg_relation_size('shrinks') / 8192 < 512)::text";
    assert_eq!(cluster.value(0, cut_off).await, "true");
    // What the command says now of pieces does not count either.
    let said = cluster.join_args(node, 0, &["--piece", "2"]).await;
    assert!(said.contains("\"before\":true"), "all was copied again:\n{said}");
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    cluster
        .expect(
            "select count(*) || ':' || count(distinct id) from grows",
            "8000:8000",
        )
        .await;
    cluster
        .expect("select count(*) || ':' || max(id) from shrinks", "3300:3300")
        .await;
}

#[tokio::test]
async fn objects_of_equal_names_in_two_schemas_are_all_made() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    for schema in ["a", "b"] {
        let sql = "create schema a;
            create table a.item (id int primary key, v text);
            create index item_v on a.item (v);
            comment on index a.item_v is 'of a';
            create table a.part (id int primary key, item int references a.item, n int, unique (item, n));
            create function a.touch() returns trigger language plpgsql as 'begin return new; end';
            create trigger touch before update on a.part for each row execute function a.touch();
            create policy seen on a.part using (true);
            create view a.items as select * from a.item;
            create rule refused as on insert to a.items do instead nothing";
        let sql = sql
            .replace(" a.", &format!(" {schema}."))
            .replace("schema a;", &format!("schema {schema};"));
        cluster.admin(0).await.run(&sql).await;
    }
    let node = cluster.add_server(15).await;
    cluster.join(node, 0).await;
    let all = "select string_agg(what, ', ' order by what) from (
        select 'index ' || schemaname || '.' || indexname as what from pg_indexes
        union all select 'constraint ' || conrelid::regclass::text || ' ' || conname from pg_constraint where conrelid <> 0
        union all select 'trigger ' || tgrelid::regclass::text || ' ' || tgname from pg_trigger where not tgisinternal
        union all select 'policy ' || schemaname || '.' || tablename || ' ' || policyname from pg_policies
        union all select 'rule ' || schemaname || '.' || tablename || ' ' || rulename from pg_rules
        union all select 'comment ' || objoid::regclass::text || ' ' || description from pg_description
            where classoid = 'pg_class'::regclass
        ) x where what ~ ' [ab][.]'";
    let (theirs, ours) = (cluster.value(0, all).await, cluster.value(node, all).await);
    assert_eq!(ours, theirs);
    for part in [
        "b.item item_pkey",
        "b.part part_item_fkey",
        "b.part touch",
        "b.part seen",
    ] {
        assert!(theirs.contains(part), "{part}: {theirs}");
    }
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
}

#[tokio::test]
async fn rows_without_their_parents_end_no_join_and_their_key_is_made_without_looking_at_them() {
    let mut cluster = Cluster::of([15, 15])
        .schema(SCHEMA)
        .schema(
            "create table visit (id int primary key, item int references item) partition by range (id);
             create table visit_1 partition of visit for values from (0) to (1000);
             comment on constraint visit_item_fkey on visit is 'whose visit'",
        )
        .start()
        .await;
    cluster.run(0, ROWS).await;
    let admin = cluster.admin(0).await;
    admin
        .run(
            "set session_replication_role = replica; insert into part (item, n) values (77777, 1); \
             insert into visit values (1, 77777)",
        )
        .await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    let said = cluster.join(node, 0).await;
    let noted = |words: [&str; 2]| {
        let mut notes = said.lines().filter(|line| line.contains("\"note\""));
        notes.any(|line| words.iter().all(|word| line.contains(word)))
    };
    assert!(noted(["part_item_fkey", "VALIDATE CONSTRAINT"]), "{said}");
    assert!(noted(["visit_item_fkey", "LEFT OUT HERE"]), "{said}");
    let keys = "select string_agg(conname || ' ' || convalidated, ', ' order by conname) from pg_constraint \
        where contype = 'f' and conname like '%item_fkey'";
    assert_eq!(cluster.value(node, keys).await, "part_item_fkey false");
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    let refused = cluster
        .session(node)
        .await
        .try_run("insert into part (item, n) values (88888, 1)")
        .await;
    assert!(refused.is_err(), "the key is not there");
    cluster.converge().await;
    cluster.expect("select count(*) from part", "5001").await;
    cluster.expect("select count(*) from visit", "1").await;
}

#[tokio::test]
async fn materialised_views_are_filled_here_as_they_were_at_the_donor() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    cluster
        .run(
            0,
            "create materialized view few as select id from item where id <= 3 with no data;
             create materialized view fewer as select id from few where id <= 2 with no data;
             create materialized view empty as select id from item with no data;
             create materialized view broken as select 1 / (id - id) as n from item with no data;
             refresh materialized view few; refresh materialized view fewer",
        )
        .await;
    // Filled there, from rows that cannot be asked again.
    cluster
        .admin(0)
        .await
        .run("update pg_class set relispopulated = true where relname = 'broken'")
        .await;
    let node = cluster.add_server(15).await;
    let said = cluster.join(node, 0).await;
    assert_eq!(cluster.value(node, "select count(*) from fewer").await, "2");
    let filled = "select string_agg(relname, ',' order by relname) from pg_class where relkind = 'm' and relispopulated";
    assert_eq!(cluster.value(node, filled).await, "few,fewer");
    let mut notes = said.lines().filter(|line| line.contains("\"note\""));
    assert!(
        notes.any(|line| line.contains("REFRESH MATERIALIZED VIEW public.broken")),
        "{said}"
    );
}

#[tokio::test]
async fn what_depends_on_a_key_and_values_without_a_binary_form_come_with_a_join() {
    let mut cluster = Cluster::of([15])
        .schema(
            "create table item (id int primary key, v text);
             create table odd (id int primary key, a aclitem, q tsquery, l aclitem default '=r/postgres');
             insert into item values (1, 'one'), (2, 'two');
             insert into odd values (1, 'postgres=r/postgres', ''), (2, null, 'a & b');
             create function label(n int) returns text immutable begin atomic select v from item where id = n group by id; end;
             create index odd_label on odd (label(id));
             create materialized view counted as select id, v, count(*) from item group by id;
             create unique index counted_id on counted (id)",
        )
        .start()
        .await;
    let node = cluster.add_server(18).await;
    cluster.join(node, 0).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster
        .run(
            node,
            "insert into odd values (3, '=w/app', ''), (4, '=r/app', '')",
        )
        .await;
    cluster.converge().await;
    cluster
        .run(
            0,
            "update odd set q = 'c', a = '=rw/app' where id = 3; delete from odd where id = 4",
        )
        .await;
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(concat_ws(' ', id, a, q), ', ' order by id) from odd",
            "1 postgres=r/postgres , 2 'a' & 'b', 3 =rw/app 'c'",
        )
        .await;
    cluster
        .expect("select string_agg(v, ' ' order by id) from counted", "one two")
        .await;
    let indexes = "select string_agg(indexname, ' ' order by indexname) from pg_indexes where indexname in ('odd_label', 'counted_id')";
    cluster.expect(indexes, "counted_id odd_label").await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn the_donor_keeps_nothing_while_materialised_views_are_filled() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    cluster
        .run(
            0,
            "create materialized view few as select id from item where id <= 3",
        )
        .await;
    let node = cluster.add_server(15).await;
    let join = stuck_at(&cluster, node, ("fill %", "1"), &[]).await;
    for of_the_copy in [
        "select count(*) from pg_replication_slots where temporary",
        "select count(*) from pg_stat_activity where application_name = 'anabranch:join' and backend_xmin is not null",
    ] {
        cluster.wait_value(0, of_the_copy, "0").await;
    }
    // All is copied: it goes on with the views alone.
    killed(&cluster, node, join).await;
    let said = cluster.join(node, 0).await;
    assert!(!said.contains("copy the schema"), "{said}");
    assert_eq!(cluster.value(node, "select count(*) from few").await, "3");
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
}

/// What nobody replicates.
const OUTSIDE: &str = "create schema outside; create table outside.note (id serial primary key, v text);
    create index note_v on outside.note (v); create sequence outside.lone";

#[tokio::test]
async fn what_is_dropped_at_the_donor_while_rows_are_copied_ends_no_join() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    cluster.admin(0).await.run(OUTSIDE).await;
    let node = cluster.add_server(15).await;
    let (mut join, held) = held_join(&cluster, node).await;
    cluster.admin(0).await.run("drop schema outside cascade").await;
    held.run("select pg_advisory_unlock(42)").await;
    let ended = tokio::task::spawn_blocking(move || join.wait())
        .await
        .expect("no panic");
    assert!(ended.expect("wait for the join").success());
    // Here it is as it was at the cut, with all that belongs to it.
    let there = "select count(*) from pg_indexes where schemaname = 'outside'";
    assert_eq!(cluster.admin(node).await.value(there).await, "2");
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.admin(node).await.run("drop schema outside cascade").await;
    cluster
        .run(node, "insert into part (item, n) values (1, 9999)")
        .await;
    cluster.converge().await;
    cluster.expect("select count(*) from part", "5001").await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn what_is_dropped_at_the_donor_before_the_schema_is_read_costs_another_snapshot() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    cluster.admin(0).await.run(OUTSIDE).await;
    let node = cluster.add_server(15).await;
    // The join is held when it writes down its first cut.
    let held = cluster.admin(node).await;
    held.run(
        "create schema anabranch_join;
         create table anabranch_join.cut (snapshot text, epoch bigint, lsn text);
         create function anabranch_join.stop() returns trigger language plpgsql as
             'begin perform pg_advisory_xact_lock_shared(42); return new; end';
         create trigger stop before insert on anabranch_join.cut for each row execute function anabranch_join.stop();
         select pg_advisory_lock(42)",
    )
    .await;
    let join = Told::spawn(&cluster, node);
    cluster
        .wait_value(
            node,
            "select (count(*) > 0)::text from pg_locks where locktype = 'advisory' and objid = 42 and not granted",
            "true",
        )
        .await;
    cluster.admin(0).await.run("drop schema outside cascade").await;
    held.run("select pg_advisory_unlock(42)").await;
    let said = join.done().await;
    assert!(said.contains("pg_dump failed"), "{said}");
    assert!(said.contains("another snapshot is cut"), "{said}");
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    cluster.expect("select count(*) from item", "5000").await;
}

#[tokio::test]
async fn a_join_that_is_killed_while_it_sets_the_node_up_or_as_its_last_step_goes_on() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    let join = stuck_at(&cluster, node, ("own tables", "1"), &[]).await;
    killed(&cluster, node, join).await;
    cluster.join(node, 0).await;
    // All is done, but the file that says that a join was begun is there.
    let incarnation = "select incarnation::text from anabranch.node";
    let incarnation = cluster.admin(node).await.value(incarnation).await;
    let file = cluster.nodes[node].data_dir.join("join.json");
    std::fs::write(&file, format!("{{\"incarnation\": \"{incarnation}\"}}")).expect("write the file");
    let said = cluster.join(node, 0).await;
    assert!(said.contains("the join is complete"), "{said}");
    assert!(!file.exists());
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    cluster.expect("select count(*) from part", "5000").await;
}

#[tokio::test]
async fn a_daemon_does_not_run_on_a_database_whose_join_is_not_finished() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    let held = stop_before_commit(&cluster, node, "own tables", "pg_advisory_xact_lock_shared(42)").await;
    held.run("select pg_advisory_lock(42)").await;
    let mut join = cluster.spawn_join(node, 0);
    cluster
        .wait_value(
            node,
            "select count(*) from pg_locks where locktype = 'advisory' and objid = 42 and not granted",
            "1",
        )
        .await;
    // Its last statement is to wait: all else is there then, the slot, too.
    held.run("begin; lock table anabranch_join.pieces in access share mode")
        .await;
    held.run("select pg_advisory_unlock(42)").await;
    cluster
        .wait_value(
            node,
            "select count(*) from pg_stat_activity where query like 'DROP SCHEMA anabranch_join%' and wait_event_type = 'Lock'",
            "1",
        )
        .await;
    join.kill().expect("kill the join");
    let _ = join.wait();
    free(&cluster, node).await;
    cluster
        .wait_value(
            node,
            "select count(*) from pg_stat_activity where application_name = 'anabranch:join'",
            "0",
        )
        .await;
    held.run("rollback").await;
    // As if it had been killed a moment before.
    std::fs::remove_file(cluster.nodes[node].data_dir.join("checkpoint.json")).expect("it was written");
    cluster.nodes[node].daemon.start();
    let ended = cluster.nodes[node].daemon.wait_exit(PATIENCE);
    let log = cluster.nodes[node].daemon.log();
    assert!(ended.is_some_and(|status| !status.success()), "it runs:\n{log}");
    assert!(log.contains("run `anabranch join` again"), "{log}");
    cluster.join(node, 0).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster
        .run(1, "update item set v = 'meanwhile' where id = 1")
        .await;
    cluster.converge().await;
    cluster.expect("select count(*) from item", "5000").await;
    cluster.expect_no_conflict().await;
}

/// One of each kind of object that a dump makes beside tables.
const MUCH: &str = "
    create schema much;
    create table much.noted (a int primary key, b int);
    create statistics public.pairs on a, b from much.noted;
    create collation public.plain (locale = 'C');
    create text search dictionary public.words (template = simple);
    create text search configuration public.tongue (copy = simple);
    create function public.same(int, int) returns boolean language sql immutable as 'select $1 = $2';
    create operator public.=== (leftarg = int, rightarg = int, function = public.same);
    create operator family public.alike using hash;
    create aggregate public.total (int) (sfunc = int4pl, stype = int, initcond = '0');
    create procedure public.nothing(inout n int) language plpgsql as 'begin end';
    create procedure public.given(n int) language plpgsql as 'begin end';
    create procedure public.given(out n int) language plpgsql as 'begin n := 1; end';
    create procedure public.given(n bigint, out t text) language plpgsql as 'begin t := 1; end';
    create procedure public.given(out n int, t text) language plpgsql as 'begin n := 1; end';
    create domain public.small as int check (value < 10);
    create type public.span as range (subtype = int);
    create type public.pair as (a int, b small);
    create cast (public.pair as text) with inout;
    create view public.called as select 'public'::regnamespace as r;
    create foreign data wrapper far;
    create server away foreign data wrapper far;
    create function public.watch() returns event_trigger language plpgsql as 'begin end';
    create event trigger watch on ddl_command_end execute function public.watch()";

/// How many of these there are.
const HOW_MUCH: &str = "select count(*) from (
    select oid from pg_namespace where nspname = 'much'
    union all select oid from pg_statistic_ext
    union all select oid from pg_collation where oid >= 16384
    union all select oid from pg_ts_dict where oid >= 16384
    union all select oid from pg_ts_config where oid >= 16384
    union all select oid from pg_operator where oid >= 16384
    union all select oid from pg_opfamily where oid >= 16384
    union all select oid from pg_cast where oid >= 16384
    union all select oid from pg_proc where pronamespace = 'public'::regnamespace
    union all select oid from pg_type where typnamespace = 'public'::regnamespace and typname in ('small', 'span', 'pair', 'called')
    union all select oid from pg_foreign_data_wrapper
    union all select oid from pg_foreign_server
    union all select oid from pg_event_trigger) x";

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn objects_of_every_kind_are_thrown_away_with_a_copy() {
    let mut cluster = Cluster::of([15, 18]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    cluster.admin(0).await.run(MUCH).await;
    let much = cluster.value(0, HOW_MUCH).await;
    let given_up = cluster.add_server(15).await;
    let join = stuck_at(&cluster, given_up, ("own tables", "1"), &[]).await;
    killed(&cluster, given_up, join).await;
    assert_eq!(cluster.value(given_up, HOW_MUCH).await, much);
    cluster.join_args(given_up, 0, &["--abandon"]).await;
    assert_eq!(cluster.value(given_up, HOW_MUCH).await, "0");
    let node = cluster.add_server(18).await;
    let join = stuck_at(&cluster, node, ("own tables", "1"), &[]).await;
    killed(&cluster, node, join).await;
    // The snapshot goes with it.
    cluster.nodes[0].daemon.kill();
    cluster.nodes[0].daemon.start();
    let said = cluster.join(node, 0).await;
    assert!(said.contains("another snapshot"), "{said}");
    assert_eq!(cluster.value(node, HOW_MUCH).await, much);
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    for of in [0, node] {
        cluster.admin(of).await.run("drop schema much cascade").await;
    }
    cluster.converge_among(&[0, 1, node], PATIENCE).await;
}

#[tokio::test]
async fn a_join_that_is_given_up_leaves_nothing_behind() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster
        .admin(0)
        .await
        .run(
            "create extension citext; alter default privileges for role app grant select on tables to public; \
             alter default privileges for role app in schema public grant usage on sequences to public; \
             alter default privileges for role app revoke execute on functions from public",
        )
        .await;
    let node = cluster.add_server(15).await;
    cluster.admin(node).await.run("create extension hstore").await;
    let mut join = stuck_join(&cluster, node).await;
    join.kill().expect("kill the join");
    let _ = join.wait();
    free(&cluster, node).await;
    // As an older release left it: what is there is neither gone on with nor thrown away unasked.
    let admin = cluster.admin(node).await;
    admin.run("set default_transaction_read_only = off").await;
    admin.run("update anabranch_join.cut set form = null").await;
    let command = cluster.join_command(node, 0);
    let output = anabranch(&command.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("--abandon"), "{said}");
    let stays = "select count(*) from pg_tables where tablename in ('item', 'part')";
    assert_eq!(cluster.value(node, stays).await, "2");
    cluster.join_args(node, 0, &["--abandon"]).await;
    // What was there before stays.
    let extensions = "select string_agg(extname, ',' order by extname) from pg_extension";
    assert_eq!(cluster.value(node, extensions).await, "hstore,plpgsql");
    let defaults = "select count(*) from pg_default_acl";
    assert_eq!(cluster.value(node, defaults).await, "0");
    let left = "select count(*) from pg_class c join pg_namespace n on n.oid = relnamespace \
        where nspname !~ '^pg_' and nspname <> 'information_schema'";
    assert_eq!(cluster.value(node, left).await, "0");
    assert_eq!(
        cluster
            .value(node, "select count(*) from pg_replication_slots")
            .await,
        "0"
    );
    assert_eq!(
        cluster
            .session(node)
            .await
            .value("show default_transaction_read_only")
            .await,
        "off"
    );
    cluster
        .wait_value(
            0,
            "select count(*) from pg_replication_slots where temporary",
            "0",
        )
        .await;
    // The members forget it: what they write becomes stable without it.
    for member in [0, 1] {
        cluster
            .wait_value(
                member,
                "select count(*) from anabranch.member where node_id = 3 and fact = 'dropped'",
                "1",
            )
            .await;
    }
    cluster.converge_among(&[0, 1], PATIENCE).await;
    members_forget(&cluster).await;
}

#[tokio::test]
async fn a_join_that_only_a_member_beyond_a_cut_line_knows_is_given_up_there_too() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    cluster.partition(&[0], &[1]);
    let node = cluster.add_server(15).await;
    let mut join = stuck_join(&cluster, node).await;
    join.kill().expect("kill the join");
    let _ = join.wait();
    free(&cluster, node).await;
    let known = "select count(*) from anabranch.member where node_id = 3 and fact = 'joined'";
    assert_eq!(cluster.value(0, known).await, "1");
    assert_eq!(cluster.value(1, known).await, "0");
    cluster.nodes[0].daemon.kill();
    // The other member knows nothing of it, and whoever does cannot be asked.
    let mut command = cluster.join_command(node, 1);
    command.push("--abandon".to_owned());
    let output = anabranch(&command.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains("nothing is given up") && said.contains("`n1`"),
        "{said}"
    );
    let there = "select (to_regnamespace('anabranch_join') is not null)::text";
    assert_eq!(cluster.value(node, there).await, "true");
    cluster.nodes[0].daemon.start();
    // It can be reached from here, though not from the other member.
    cluster.join_args(node, 1, &["--abandon"]).await;
    assert_eq!(cluster.value(node, there).await, "false");
    let dropped = "select count(*) from anabranch.member where node_id = 3 and fact = 'dropped'";
    cluster.wait_value(0, dropped, "1").await;
    cluster.heal();
    cluster.wait_value(1, dropped, "1").await;
    cluster.converge_among(&[0, 1], PATIENCE).await;
    members_forget(&cluster).await;
}

#[tokio::test]
async fn a_joiner_whose_peers_name_one_that_is_to_join_later_goes_on_when_it_is_ready() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    let node = cluster.add_server(15).await;
    cluster.nodes[node].daemon.edit_config(|text| {
        format!("{text}\n[[peers]]\nname = \"later\"\nid = 9\naddress = \"127.0.0.1:1\"\n")
    });
    let said = cluster.join(node, 0).await;
    assert!(said.contains("no member is called later (id 9)"), "{said}");
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.run(node, "insert into item values (1, 'ready')").await;
    cluster.converge().await;
    cluster.expect("select v from item", "ready").await;
}

#[tokio::test]
async fn a_join_ends_when_its_node_is_dropped_in_the_middle_of_the_copy() {
    let (cluster, node, mut join) = stuck_joiner().await;
    let known = "select count(*) > 0 from anabranch.member where node_id = 3";
    cluster.wait_value(1, known, "t").await;
    let config = cluster.nodes[1].daemon.config_arg().to_owned();
    anabranch_ok(&["node", "drop", "n3", "--config", &config]).await;
    until("the join ends", async || {
        join.try_wait().expect("look at the join").is_some()
    })
    .await;
    assert!(!join.wait().expect("it has ended").success());
    free(&cluster, node).await;
    cluster.join_args(node, 0, &["--abandon"]).await;
    let there = "select (to_regnamespace('anabranch_join') is not null)::text";
    assert_eq!(cluster.value(node, there).await, "false");
}

#[tokio::test]
async fn a_join_whose_file_is_lost_is_given_up_once_the_members_have_dropped_it() {
    let (cluster, node, mut join) = stuck_joiner().await;
    join.kill().expect("kill the join");
    let _ = join.wait();
    free(&cluster, node).await;
    std::fs::remove_file(cluster.nodes[node].data_dir.join("join.json")).expect("it was written");
    let mut command = cluster.join_command(node, 0);
    command.push("--abandon".to_owned());
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    // It says so again, too.
    for _ in 0..2 {
        let output = anabranch(&command).await;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && said.contains("anabranch node drop n3"),
            "{said}"
        );
    }
    let config = cluster.nodes[1].daemon.config_arg().to_owned();
    let known = "select count(*) > 0 from anabranch.member where node_id = 3";
    cluster.wait_value(1, known, "t").await;
    anabranch_ok(&["node", "drop", "n3", "--config", &config]).await;
    let dropped = "select count(*) from anabranch.member where node_id = 3 and fact = 'dropped'";
    cluster.wait_value(0, dropped, "1").await;
    cluster.join_args(node, 0, &["--abandon"]).await;
    let there = "select (to_regnamespace('anabranch_join') is not null)::text";
    assert_eq!(cluster.value(node, there).await, "false");
}

#[tokio::test]
async fn a_joiner_that_is_lost_in_the_middle_of_the_copy_and_dropped_leaves_no_snapshot_at_its_donor() {
    let (mut cluster, node, mut join) = stuck_joiner().await;
    join.kill().expect("kill the join");
    let _ = join.wait();
    cluster.nodes[node].server.kill();
    let kept = "select count(*) from pg_replication_slots where temporary";
    assert_eq!(cluster.value(0, kept).await, "1");
    // The donor's stages began anew for the joiner: the other member may hear of it a moment later.
    let known = "select count(*) > 0 from anabranch.member where node_id = 3";
    cluster.wait_value(1, known, "t").await;
    let config = cluster.nodes[1].daemon.config_arg().to_owned();
    anabranch_ok(&["node", "drop", "n3", "--config", &config]).await;
    cluster.wait_value(0, kept, "0").await;
    cluster.converge_among(&[0, 1], PATIENCE).await;
}

#[tokio::test]
async fn nobody_joins_through_a_member_that_leaves() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    let node = cluster.add_server(15).await;
    // Keeps it from being through.
    let writer = cluster.session(0).await;
    writer.run("insert into item values (1, 'before')").await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let admin = cluster.nodes[0].server.dsn("postgres", DATABASE);
    let leave = {
        let (config, admin) = (config.clone(), admin.clone());
        tokio::spawn(async move { anabranch(&["leave", "--config", &config, "--admin-dsn", &admin]).await })
    };
    until("the session is waited for", async || {
        let leaving = cluster.status_or_null(0).await["leaving"].clone();
        leaving["text"].to_string().contains("of app")
    })
    .await;
    let args = cluster.join_command(node, 0);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let output = anabranch(&args).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("join through another member"), "{said}");
    let known = "select count(*) from anabranch.member where node_id = 3";
    assert_eq!(cluster.value(0, known).await, "0");
    anabranch_ok(&["leave", "--cancel", "--config", &config, "--admin-dsn", &admin]).await;
    let _ = leave.await;
    until("its status says that it stays", async || {
        cluster.status_or_null(0).await["leaving"].is_null()
    })
    .await;
    drop(writer);
    cluster.join(node, 0).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
}

#[tokio::test]
async fn a_join_that_cannot_be_is_refused_with_what_to_do() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    let node = cluster.add_server(15).await;
    cluster
        .admin(node)
        .await
        .run("create table public.mine (i int)")
        .await;
    let args = cluster.join_command(node, 0);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let output = anabranch(&args).await;
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("join with an empty database"), "{said}");
    // No table, and in the way all the same.
    cluster
        .admin(node)
        .await
        .run("drop table public.mine; create collation public.my_own (locale = 'C')")
        .await;
    let output = anabranch(&args).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        said.contains("my_own") && said.contains("join with an empty database"),
        "{said}"
    );
    cluster
        .admin(node)
        .await
        .run("drop collation public.my_own")
        .await;
    // Other tables than the donor's, in both directions.
    let tables = |from: &'static str, to: &'static str| move |text: &str| text.replace(from, to);
    cluster
        .admin(0)
        .await
        .run("create table public.till (id int primary key)")
        .await;
    let (all, some) = (
        "tables = [\"public.*\"]",
        "tables = [\"public.*\", \"!public.part\"]",
    );
    cluster.nodes[node].daemon.edit_config(tables(all, some));
    let output = anabranch(&args).await;
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    for word in [
        "does not choose what the donor replicates: public.part",
        "no row is copied of: public.till",
    ] {
        assert!(said.contains(word), "{word}: {said}");
    }
    cluster.nodes[node].daemon.edit_config(tables(some, all));
    cluster.admin(0).await.run("drop table public.till").await;
    // The database of another member than the one whose daemon is asked.
    let dsn = |node: usize| cluster.nodes[node].server.dsn("postgres", DATABASE);
    let mixed: Vec<String> = args
        .iter()
        .map(|arg| if *arg == dsn(0) { dsn(1) } else { (*arg).to_owned() })
        .collect();
    let (done, said) = try_join(&mixed).await;
    assert!(!done && said.contains("is node n2's (id 2), not n1's"), "{said}");
    // The name of another member.
    cluster.nodes[node].daemon.edit_config(|text| {
        let peer = text.find("[[peers]]\nname = \"n2\"").expect("n2 is a peer");
        text[..peer].replace("name = \"n3\"", "name = \"n2\"")
    });
    let output = anabranch(&args).await;
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("choose another `node.name`"), "{said}");
}

#[tokio::test]
async fn row_level_security_that_would_keep_rows_from_the_copy_is_told_before_it_begins() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    cluster
        .admin(0)
        .await
        .run(
            "alter role anabranch bypassrls; alter table item enable row level security;
             create policy few on item using (id < 10);
             create role reader login; grant usage on schema public, anabranch to reader;
             grant select on all tables in schema public, anabranch to reader",
        )
        .await;
    let node = cluster.add_server(15).await;
    let mut args = cluster.join_command(node, 0);
    let from = args
        .iter()
        .position(|arg| arg == "--from-dsn")
        .expect("it is given")
        + 1;
    args[from] = cluster.nodes[0].server.dsn("reader", DATABASE);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let output = anabranch(&args).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("keeps rows from the role of --from-dsn"), "{said}");
    // The daemon's role here would be bound, too.
    assert!(said.contains("ALTER ROLE anabranch BYPASSRLS"), "{said}");
    cluster
        .admin(node)
        .await
        .run("create role reader; alter role anabranch bypassrls")
        .await;
    cluster.join(node, 0).await;
    assert_eq!(cluster.value(node, "select count(*) from item").await, "5000");
}

/// A join whose events go to a file, which is read for one in which a word waits for whom.
struct Told {
    join: std::process::Child,
    events: std::path::PathBuf,
}

impl Told {
    fn spawn(cluster: &Cluster, node: usize) -> Self {
        let events = cluster.dir().join("join.ndjson");
        let file = std::fs::File::create(&events).expect("make a file");
        let join = cluster.spawn_join_to(node, 0, file.into());
        Self { join, events }
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.events).expect("read the events")
    }

    async fn waits_for(&mut self, what: &str) {
        until(&format!("it waits for {what}"), async || {
            let ended = self.join.try_wait().expect("look at the join");
            assert!(ended.is_none(), "it gave up: {}", self.said());
            let said = self.said();
            let mut waits = said.lines().filter(|line| line.contains("\"waiting\""));
            waits.any(|line| line.contains(what))
        })
        .await;
    }

    async fn done(mut self) -> String {
        // The donor may have to come up first, and all be copied anew.
        until_ok("the join ends", 3 * PATIENCE, async || {
            match self.join.try_wait().expect("look at the join") {
                Some(_) => Ok(()),
                None => Err(self.said()),
            }
        })
        .await;
        let said = self.said();
        assert!(said.contains("\"joined\""), "{said}");
        said
    }
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_donor_that_is_long_in_starting_is_waited_for_by_name() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    // Its server first, then its daemon.
    cluster.nodes[0].daemon.stop();
    cluster.nodes[0].server.stop();
    let mut join = Told::spawn(&cluster, node);
    join.waits_for("donor `n1`: cannot connect to PostgreSQL").await;
    cluster.nodes[0].server.start().await;
    join.waits_for("donor `n1`: cannot connect to peer").await;
    cluster.nodes[0].daemon.start();
    join.done().await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster
        .run(node, "insert into item values (9001, 'by the joiner')")
        .await;
    cluster.converge().await;
    cluster.expect("select count(*) from item", "5001").await;
    cluster.expect("select count(*) from part", "5000").await;
    // Who does not want to wait is told at once.
    let other = cluster.add_server(15).await;
    cluster.nodes[0].daemon.stop();
    let mut args = cluster.join_command(other, 0);
    args.extend(["--wait".to_owned(), "0".to_owned()]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let output = anabranch(&args).await;
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("cannot connect to peer `n1`"), "{said}");
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_donor_whose_server_is_killed_in_the_middle_is_waited_for_and_all_is_copied_anew() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    let admin = stop_before_commit(
        &cluster,
        node,
        "copy public.part%",
        "pg_advisory_xact_lock_shared(42)",
    )
    .await;
    admin.run("select pg_advisory_lock(42)").await;
    let mut join = Told::spawn(&cluster, node);
    cluster
        .wait_value(
            node,
            "select count(*) from anabranch_join.done where what like 'copy public.item%'",
            "1",
        )
        .await;
    // A piece that waits for its commit is copied already: what is lost is the snapshot, and with it all.
    cluster.nodes[0].server.kill();
    admin.run("select pg_advisory_unlock(42)").await;
    join.waits_for("donor `n1`: ").await;
    cluster.nodes[0].server.start().await;
    cluster
        .run(1, "insert into item values (9001, 'meanwhile')")
        .await;
    let said = join.done().await;
    assert!(said.contains("another snapshot"), "{said}");
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    cluster.expect("select count(*) from item", "5001").await;
    cluster.expect("select count(*) from part", "5000").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_donor_whose_daemon_is_killed_in_the_middle_costs_no_more_than_another_copy() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    let admin = stop_before_commit(&cluster, node, "copy %", "pg_advisory_xact_lock_shared(42)").await;
    admin.run("select pg_advisory_lock(42)").await;
    let mut join = Told::spawn(&cluster, node);
    cluster
        .wait_value(
            node,
            "select (count(*) > 0)::text from pg_locks where locktype = 'advisory' and objid = 42 and not granted",
            "true",
        )
        .await;
    cluster.nodes[0].daemon.kill();
    cluster
        .run(1, "insert into item values (9001, 'meanwhile')")
        .await;
    admin.run("select pg_advisory_unlock(42)").await;
    join.waits_for("donor `n1`: ").await;
    cluster.nodes[0].daemon.start();
    join.done().await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    cluster.expect("select count(*) from item", "5001").await;
    cluster.expect_no_conflict().await;
}

/// Pieces that were copied in this run.
fn copied<'a>(said: &'a str, table: &str) -> Vec<&'a str> {
    let of = |line: &&str| line.contains("\"copied\"") && line.contains(&format!("\"{table}\""));
    said.lines()
        .filter(of)
        .filter(|line| line.contains("\"before\":false"))
        .collect()
}

/// The donor's daemon holds a joiner's snapshot that another one has cut.
const TAKEN_OVER: &str = "select count(*) from pg_stat_activity where application_name = 'anabranch:donor' \
    and backend_type = 'client backend' and state = 'idle in transaction'";

/// A join of which one piece of `part` waits for its commit while the session that is returned holds its lock, and all else is copied.
async fn half_copied(cluster: &Cluster, node: usize) -> (Told, Session) {
    let admin = stop_before_commit(
        cluster,
        node,
        "copy public.part%",
        "pg_advisory_xact_lock_shared(42)",
    )
    .await;
    admin.run("select pg_advisory_lock(42)").await;
    let join = Told::spawn(cluster, node);
    let tables =
        "select count(*) from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace";
    let tables: i64 = cluster.value(0, tables).await.parse().expect("a number");
    cluster
        .wait_value(
            node,
            "select count(*) from anabranch_join.done where what like 'copy %'",
            // All but `part`.
            &(tables - 1).to_string(),
        )
        .await;
    (join, admin)
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_donor_whose_daemon_is_killed_in_the_middle_under_load_costs_no_finished_table() {
    let mut cluster = Cluster::of([15, 15])
        .schema(SCHEMA)
        .schema(load::SCHEMA)
        .start()
        .await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    let load = Load::start(&cluster, &[0, 1], load::Options::default());
    let (mut join, admin) = half_copied(&cluster, node).await;
    cluster.nodes[0].daemon.kill();
    // Nothing that was begun with the daemon's own snapshot is left.
    cluster
        .admin(0)
        .await
        .run("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'anabranch:join'")
        .await;
    join.waits_for("donor `n1`: ").await;
    // Both members write on what the other does not hear of, from before the cut to after it.
    tokio::time::sleep(Duration::from_secs(1)).await;
    admin.run("select pg_advisory_unlock(42)").await;
    cluster.nodes[0].daemon.start();
    let said = join.done().await;
    assert!(!said.contains("throw away"), "all is copied again:\n{said}");
    for table in ["public.item", "public.kv", "public.part"] {
        assert_eq!(copied(&said, table).len(), 1, "{table} is copied again:\n{said}");
    }
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    let ledger = load.stop().await;
    cluster.converge_within(Duration::from_secs(120)).await;
    cluster.expect("select count(*) from part", "5000").await;
    // A write that lost is in the log of every node, the joiner's too.
    ledger.account(&cluster).await;
}

/// Two writes of one row, of which neither knows the other; the donor's daemon is killed for that.
async fn concurrently(cluster: &mut Cluster, id: u32) {
    cluster.nodes[0].daemon.kill();
    for member in [0, 1] {
        let write = format!("update item set v = 'by {member}' where id = {id}");
        cluster.run(member, &write).await;
    }
}

#[tokio::test]
async fn kills_of_a_join_and_of_its_donor_in_turn_cost_no_finished_table() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    concurrently(&mut cluster, 7).await;
    cluster.nodes[0].daemon.start();
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    let (join, admin) = half_copied(&cluster, node).await;
    concurrently(&mut cluster, 8).await;
    cluster
        .run(1, "insert into item values (9001, 'meanwhile')")
        .await;
    cluster.nodes[0].daemon.start();
    cluster.wait_value(0, TAKEN_OVER, "1").await;
    cluster
        .run(0, "insert into item values (9002, 'behind the cut')")
        .await;
    killed(&cluster, node, join.join).await;
    admin.run("select pg_advisory_unlock(42)").await;
    let mut second = Told::spawn(&cluster, node);
    // The daemon that took the snapshot over is killed, too, as soon as the join holds it itself.
    until("the join goes on", async || {
        second.said().contains("\"before\":true") || second.join.try_wait().expect("look").is_some()
    })
    .await;
    cluster.nodes[0].daemon.kill();
    cluster.nodes[0].daemon.start();
    let said = second.done().await;
    assert!(!said.contains("throw away"), "all is copied again:\n{said}");
    assert!(copied(&said, "public.item").is_empty(), "{said}");
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster
        .run(node, "insert into item values (9003, 'by the joiner')")
        .await;
    cluster.converge().await;
    cluster.expect("select count(*) from item", "5003").await;
    cluster.expect("select count(*) from part", "5000").await;
    // One before the cut, and one behind it.
    assert_eq!(cluster.conflicts().await.len(), 2);
    // Nobody holds it any more.
    cluster.wait_value(0, TAKEN_OVER, "0").await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_join_that_was_down_together_with_its_donors_daemon_says_that_all_is_copied_anew() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    cluster.run(0, ROWS).await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    let (join, admin) = half_copied(&cluster, node).await;
    killed(&cluster, node, join.join).await;
    admin.run("select pg_advisory_unlock(42)").await;
    cluster.nodes[0].daemon.kill();
    cluster.nodes[0].daemon.start();
    let said = cluster.join(node, 0).await;
    assert!(
        said.contains("what was copied before is of a snapshot that is gone"),
        "it does not say why:\n{said}"
    );
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    cluster.expect("select count(*) from item", "5000").await;
    cluster.expect("select count(*) from part", "5000").await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_joiner_takes_what_it_must_though_that_is_more_than_its_journals_limit() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    // Several MiB also when it is compressed.
    cluster
        .run(
            0,
            "insert into item select i, (select string_agg(md5(random()::text || i || j), '') from generate_series(1, 64) j)
                 from generate_series(1, 6000) i",
        )
        .await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    let small = "[journal]\nmax_size_mib = 2\nsegment_mib = 1\n";
    cluster.nodes[node]
        .daemon
        .edit_config(|text| text.to_owned() + small);
    cluster.join(node, 0).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    cluster.expect("select count(*) from item", "6000").await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn two_servers_join_at_once_from_two_donors_while_all_write() {
    let mut cluster = Cluster::of([15, 15]).schema(load::SCHEMA).start().await;
    let nodes = [cluster.add_server(15).await, cluster.add_server(18).await];
    let load = Load::start(&cluster, &[0, 1], load::Options::default());
    tokio::time::sleep(Duration::from_secs(1)).await;
    tokio::join!(cluster.join(nodes[0], 0), cluster.join(nodes[1], 1));
    for node in nodes {
        cluster.nodes[node].daemon.start();
    }
    for node in nodes {
        cluster.wait_writable(node).await;
    }
    let later = Load::start(
        &cluster,
        &nodes,
        load::Options {
            seed: 2,
            ..load::Options::default()
        },
    );
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (ledger, later) = (load.stop().await, later.stop().await);
    cluster.converge_within(Duration::from_secs(120)).await;
    ledger.account(&cluster).await;
    later.account(&cluster).await;
}

#[tokio::test]
async fn open_and_prepared_transactions_that_a_snapshot_waits_for_are_named() {
    let mut cluster = Cluster::of([15, 15]).schema(SCHEMA).start().await;
    let node = cluster.add_server(15).await;
    let open = cluster.session(0).await;
    let pid = open.number("select pg_backend_pid()").await;
    open.run("begin; insert into item values (1, 'open')").await;
    let prepared = cluster.session(0).await;
    prepared
        .run("begin; insert into item values (2, 'forgotten'); prepare transaction 'forgotten'")
        .await;
    let mut join = Told::spawn(&cluster, node);
    join.waits_for(&format!("session {pid} of app")).await;
    // Its backend goes on waiting.
    cluster.nodes[0].daemon.kill();
    cluster.nodes[0].daemon.start();
    join.waits_for("a slot of before, which waits for").await;
    open.run("commit").await;
    join.waits_for("prepared transaction 'forgotten'").await;
    prepared.run("commit prepared 'forgotten'").await;
    join.done().await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    cluster.expect("select count(*) from item", "2").await;
}

#[tokio::test]
async fn what_a_joiners_server_lacks_is_said_at_once_with_what_to_do_and_nothing_is_changed() {
    let mut cluster = Cluster::of([15]).schema(SCHEMA).start().await;
    let donor = cluster.admin(0).await;
    donor
        .run("create role clerk; create table public.till (id int primary key); alter table public.till owner to clerk")
        .await;
    let node = cluster.add_server(15).await;
    let server = &cluster.nodes[node].server;
    let maintenance = server.try_session("postgres", "postgres").await.expect("connect");
    // The sessions of before may still be ending.
    maintenance
        .run(&format!("drop database {DATABASE} with (force)"))
        .await;
    maintenance
        .run(&format!(
            "create database {DATABASE} owner app encoding 'LATIN1' lc_collate 'C' lc_ctype 'C' template template0"
        ))
        .await;
    let server = &mut cluster.nodes[node].server;
    server.stop();
    server.set_conf(&["max_replication_slots = 0"]);
    server.start().await;
    cluster
        .admin(node)
        .await
        .run("alter role anabranch noreplication")
        .await;
    let mut args = cluster.join_command(node, 0);
    *args.last_mut().expect("the folder of pg_dump") = "/nowhere".to_owned();
    args.push("--dry-run".to_owned());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let output = anabranch(&args).await;
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    for word in [
        "make the database with encoding UTF8",
        "CREATE ROLE clerk",
        "raise max_replication_slots",
        "ALTER ROLE anabranch REPLICATION",
        "install the client programs",
    ] {
        assert!(said.contains(word), "{word}: {said}");
    }
    let made = "select count(*) from pg_namespace where nspname like 'anabranch%'";
    assert_eq!(cluster.admin(node).await.value(made).await, "0");
    assert_eq!(
        donor
            .value("select count(*) from anabranch.member where node_id = 2")
            .await,
        "0"
    );
}
