//! Rows that wait in quarantine while the world goes on: truncates, later versions, other rows with their values.

use std::time::Duration;

use anabranch_tests::Cluster;

const WAITING: &str = "select count(*) from anabranch.quarantine";
const IDS: &str = "select coalesce(string_agg(id::text, ' ' order by id), '') from t";
const RETRY: &str = "[apply]\nquarantine_retry_ms = 500\n";
const PATIENCE: Duration = Duration::from_secs(60);

/// Until what all nodes have is known to all and forgotten, and the quarantine was tried again since.
const FORGOTTEN: Duration = Duration::from_secs(6);

#[tokio::test]
async fn a_row_that_waits_is_gone_with_a_truncate() {
    let cluster = Cluster::of([15, 15, 18])
        .schema("create table t (id int primary key, v int)")
        .schema_of(2, "alter table t add constraint small check (v < 100)")
        .config(RETRY)
        .start()
        .await;
    for (id, truncater) in [(1, 0), (2, 2)] {
        cluster
            .run(0, &format!("insert into t values ({id}, 1000)"))
            .await;
        cluster.wait_value(2, WAITING, "1").await;
        cluster.run(truncater, "truncate t").await;
        cluster.wait_value(2, WAITING, "0").await;
    }
    cluster.run(0, "insert into t values (3, 1000)").await;
    cluster.wait_value(2, WAITING, "1").await;
    cluster.arrive_among(&[0, 1, 2], PATIENCE).await;
    tokio::time::sleep(FORGOTTEN).await;
    cluster.run(2, "alter table t drop constraint small").await;
    cluster.wait_value(2, WAITING, "0").await;
    cluster.converge().await;
    cluster.expect(IDS, "3").await;
}

#[tokio::test]
async fn a_truncate_empties_a_table_that_lacks_a_column() {
    let cluster = Cluster::of([15, 15])
        .schema("create table t (id int primary key, v int)")
        .config(RETRY)
        .start()
        .await;
    cluster.run(0, "insert into t values (1, 1)").await;
    cluster.converge().await;
    cluster.run(0, "alter table t add column w int").await;
    cluster.run(0, "insert into t values (2, 2, 2)").await;
    cluster.wait_value(1, WAITING, "1").await;
    cluster.run(0, "truncate t").await;
    cluster.wait_value(1, IDS, "").await;
    cluster.wait_value(1, WAITING, "0").await;
    cluster.run(1, "alter table t add column w int").await;
    cluster.run(0, "insert into t values (3, 3, 3)").await;
    cluster.converge().await;
    cluster.expect(IDS, "3").await;
}

#[tokio::test]
async fn a_row_that_waited_does_not_take_a_value_from_one_that_came_later() {
    let cluster = Cluster::of([15, 15])
        .schema("create table t (id int primary key, email text unique, v int)")
        .schema_of(1, "alter table t add constraint small check (v < 100)")
        .config(RETRY)
        .start()
        .await;
    cluster.run(0, "insert into t values (1, 'x', 1000)").await;
    cluster.wait_value(1, WAITING, "1").await;
    cluster.run(1, "insert into t values (2, 'x', 1)").await;
    cluster.wait_value(0, IDS, "2").await;
    tokio::time::sleep(FORGOTTEN).await;
    cluster.run(1, "alter table t drop constraint small").await;
    cluster.wait_value(1, WAITING, "0").await;
    cluster.converge().await;
    cluster.expect(IDS, "2").await;
    // What was taken out has its line at both.
    cluster
        .expect(
            "select string_agg(key->>'id' || ' ' || conflict_type, ',') from anabranch.conflict_history",
            "1 multiple_unique_conflicts",
        )
        .await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn many_rows_that_wait_hold_up_nobody_and_are_overtaken_after_a_restart() {
    let mut cluster = Cluster::of([15, 15])
        .schema("create table t (id int primary key, v int)")
        .schema_of(1, "alter table t add constraint small check (v < 100)")
        .config("[apply]\nquarantine_retry_ms = 100\n")
        .start()
        .await;
    cluster
        .run(0, "insert into t select i, 1000 from generate_series(1, 1500) i")
        .await;
    cluster.wait_value(1, WAITING, "1500").await;
    cluster.nodes[1].daemon.kill();
    cluster.nodes[1].daemon.start();
    // Beyond the first ones that are read of the quarantine, which are tried again all the time.
    cluster.run(0, "update t set v = 1 where id = 1499").await;
    cluster.wait_value(1, IDS, "1499").await;
    cluster.wait_value(1, WAITING, "1499").await;
    for i in 0..20 {
        cluster.run(0, &format!("insert into t values ({}, 1)", -i)).await;
    }
    cluster.wait_value(1, "select count(*) from t", "21").await;
    cluster.run(0, "delete from t where v = 1000").await;
    cluster.wait_value(1, WAITING, "0").await;
    cluster.converge().await;
    cluster.expect("select count(*) from t", "21").await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_row_that_was_overtaken_before_a_kill_does_not_come_back() {
    let mut cluster = Cluster::of([15, 15])
        .schema("create table t (id int primary key, v int); create table u (id int primary key, v int)")
        .schema_of(1, "alter table t add constraint small check (v < 100)")
        .config("[apply]\nquarantine_retry_ms = 100\n")
        .start()
        .await;
    // So many that the last one is not looked at soon after a start.
    cluster
        .run(0, "insert into t select i, 1000 from generate_series(1, 2000) i")
        .await;
    cluster.run(0, "insert into u values (1, 1)").await;
    cluster.wait_value(1, WAITING, "2000").await;
    cluster.wait_value(1, "select count(*) from u", "1").await;
    // The applier waits for a lock while a local write overtakes a row, and the slot moves past it.
    let holder = cluster.session(1).await;
    holder.run("begin; update u set v = 2").await;
    cluster.run(0, "update u set v = 3").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    cluster.run(1, "insert into t values (2000, 5)").await;
    let place = cluster.value(1, "select pg_current_wal_insert_lsn()").await;
    cluster
        .wait_value(0, "select v from t where id = 2000", "5")
        .await;
    let passed = format!("select bool_and(confirmed_flush_lsn >= '{place}') from pg_replication_slots");
    cluster.wait_value(1, &passed, "t").await;
    assert_eq!(cluster.value(1, WAITING).await, "2000");
    cluster.nodes[1].daemon.kill();
    holder.run("rollback").await;
    cluster.nodes[1].daemon.start();
    cluster.wait_value(1, "select v from u", "3").await;
    tokio::time::sleep(FORGOTTEN).await;
    let last = "select count(*) from anabranch.quarantine where key = '{\"id\": 2000}'";
    cluster.run(1, "alter table t drop constraint small").await;
    cluster.wait_value(1, last, "0").await;
    assert_eq!(cluster.value(1, "select v from t where id = 2000").await, "5");
    cluster.run(0, "delete from t where v = 1000").await;
    cluster.wait_value(1, WAITING, "0").await;
    cluster.converge().await;
    cluster.expect(IDS, "2000").await;
}

#[tokio::test]
async fn a_row_that_waits_is_not_overtaken_by_what_it_has_seen_when_that_is_decoded_again() {
    for policy in [
        "",
        "[[table]]\nname = \"public.t\"\npolicy = \"first_update_wins\"\n",
        "[[table]]\nname = \"public.t\"\npolicy = \"column_merge\"\n",
    ] {
        let mut cluster = Cluster::of([15, 15])
            .schema("create table t (id int primary key, v int)")
            .schema_of(0, "alter table t add constraint small check (v < 100)")
            .config(RETRY);
        if !policy.is_empty() {
            cluster = cluster.policy(policy);
        }
        let mut cluster = cluster.start().await;
        cluster.run(0, "insert into t values (1, 1)").await;
        cluster.converge().await;
        cluster.run(1, "update t set v = 1000").await;
        cluster.wait_value(0, WAITING, "1").await;
        // Flushed with it is what is in quarantine. The server forgets how far its slot was confirmed.
        cluster.run(0, "insert into t values (2, 2)").await;
        cluster.nodes[0].server.kill();
        cluster.nodes[0].server.start().await;
        cluster.run(1, "insert into t values (3, 3)").await;
        cluster.wait_value(0, IDS, "1 2 3").await;
        cluster.wait_value(0, WAITING, "1").await;
        cluster.run(0, "alter table t drop constraint small").await;
        cluster.wait_value(0, WAITING, "0").await;
        cluster.converge().await;
        let rows = "select string_agg(id || '=' || v, ' ' order by id) from t";
        cluster.expect(rows, "1=1000 2=2 3=3").await;
    }
}

#[tokio::test]
async fn a_trigger_that_lets_no_row_go_stops_nothing() {
    let cluster = Cluster::of([15, 15])
        .schema("create table t (id int primary key, email text unique)")
        .schema_of(
            1,
            "create function stay() returns trigger language plpgsql as $$ begin raise 'stay'; end $$;
             create trigger stay before delete on t for each row execute function stay();
             alter table t enable always trigger stay",
        )
        .config(RETRY)
        .start()
        .await;
    cluster.partition(&[0], &[1]);
    cluster.run(1, "insert into t values (2, 'x')").await;
    cluster.run(0, "insert into t values (1, 'x')").await;
    cluster.heal();
    cluster.wait_value(0, IDS, "1").await;
    // The row that should go is there, and what waits for that is in quarantine.
    cluster
        .wait_value(1, "select count(*) > 0 from anabranch.quarantine", "t")
        .await;
    cluster.run(0, "insert into t values (3, 'z')").await;
    cluster.wait_value(1, IDS, "2 3").await;
    cluster.run(1, "alter table t disable trigger stay").await;
    cluster.wait_value(1, WAITING, "0").await;
    cluster.converge().await;
    cluster.expect(IDS, "1 3").await;
}

/// On the second node the daemon's role is one that policies do not bind, on the third one that they do.
#[tokio::test]
async fn a_trigger_of_a_role_that_policies_bind_sees_what_they_show_it_and_stops_nothing() {
    let mut cluster = Cluster::of([15, 18, 15])
        .schema("create table t (id int primary key, v text); create table u (id int primary key)")
        .config(RETRY)
        .without_daemons()
        .start()
        .await;
    for node in cluster.all() {
        let admin = cluster.admin(node).await;
        admin
            .run(
                "create role auditor; create schema audit; grant usage on schema audit to auditor;
                 create table audit.word (v text); insert into audit.word values ('shown'), ('hidden');
                 grant select on audit.word to auditor; alter table audit.word enable row level security;
                 create policy few on audit.word using (v = 'shown');
                 create function audit.look() returns trigger language plpgsql security definer as $$ begin
                     new.v := (select string_agg(v, ',') from audit.word);
                     return new;
                 end $$;
                 alter function audit.look() owner to auditor",
            )
            .await;
    }
    for node in [1, 2] {
        let always = "create trigger look before insert on t for each row execute function audit.look();
            alter table t enable always trigger look";
        cluster.admin(node).await.run(always).await;
    }
    cluster.admin(1).await.run("alter role anabranch bypassrls").await;
    cluster.start_daemons();
    cluster.run(0, "insert into t values (1, 'shown')").await;
    cluster.run(0, "insert into u values (1)").await;
    for node in [1, 2] {
        cluster.wait_value(node, "select count(*) from u", "1").await;
    }
    assert_eq!(
        cluster.value(1, "select string_agg(v, ' ') from t").await,
        "shown"
    );
    assert_eq!(cluster.value(1, WAITING).await, "0");
    // Of this row alone, and behind it all goes on.
    cluster.wait_value(2, WAITING, "1").await;
    cluster.run(2, "alter table t disable trigger look").await;
    cluster.wait_value(2, WAITING, "0").await;
    cluster.converge().await;
    cluster.expect("select string_agg(v, ' ') from t", "shown").await;
}

#[tokio::test]
async fn rows_that_a_trigger_leaves_out_without_a_word_are_in_quarantine() {
    let cluster = Cluster::of([15, 18])
        .schema("create table t (id int primary key, v text); create table u (id int primary key)")
        .schema_of(
            1,
            "create function leave_out() returns trigger language plpgsql as $$ begin
                 if tg_op = 'DELETE' then return case when old.v = 'stays' then null else old end; end if;
                 return case when new.v = 'out' then null else new end;
             end $$;
             create trigger leave_out before insert or update or delete on t for each row execute function leave_out();
             alter table t enable always trigger leave_out",
        )
        .config(RETRY)
        .start()
        .await;
    cluster
        .run(0, "insert into t select i, 'old' from generate_series(1, 400) i; insert into t values (500, 'stays')")
        .await;
    cluster.converge().await;
    // One that is not there, one that is, many at once, and one that is to go.
    cluster.run(0, "insert into t values (0, 'out')").await;
    cluster.run(0, "update t set v = 'out' where id = 1").await;
    cluster
        .run(0, "insert into t select i, case when i % 100 = 0 then 'out' else 'new' end from generate_series(1001, 1400) i")
        .await;
    cluster.run(0, "delete from t where id = 500").await;
    cluster.run(0, "insert into u values (1)").await;
    cluster.wait_value(1, "select count(*) from u", "1").await;
    cluster.wait_value(1, WAITING, "7").await;
    let rows = "select count(*) || ' ' || count(*) filter (where v = 'out') || ' ' || count(*) filter (where id = 500) from t";
    assert_eq!(cluster.value(1, rows).await, "797 0 1");
    let why = "select distinct sqlstate from anabranch.quarantine";
    assert_eq!(cluster.value(1, why).await, "09000");
    cluster.run(1, "alter table t disable trigger leave_out").await;
    cluster.wait_value(1, WAITING, "0").await;
    cluster.converge().await;
    cluster.expect(rows, "801 6 0").await;
}

#[tokio::test]
async fn what_a_server_refuses_for_a_reason_without_a_name_is_an_apply_error_with_its_words() {
    let cluster = Cluster::of([15, 18])
        .schema("create table t (id int primary key, v text)")
        .schema_of(
            1,
            "create function refuse() returns trigger language plpgsql as $$ begin
                 if new.v = 'wrong' then raise exception 'not at this node' using errcode = 'P0007', detail = 'ask its owner'; end if;
                 return new;
             end $$;
             create trigger refuse before insert or update on t for each row execute function refuse();
             alter table t enable always trigger refuse",
        )
        .config(RETRY)
        .start()
        .await;
    cluster
        .run(0, "insert into t values (1, 'wrong'), (2, 'right')")
        .await;
    cluster.wait_value(1, WAITING, "1").await;
    cluster.wait_value(1, IDS, "2").await;
    let line = "select concat_ws('|', conflict_type, conflict_resolution, key->>'id', remote_tuple->>'v', \
                error->>'sqlstate', error->>'message', error->>'detail', status) from anabranch.conflict_history";
    let words = "apply_error|skip|1|wrong|P0007|not at this node|ask its owner";
    assert_eq!(cluster.value(1, line).await, format!("{words}|new"));
    assert_eq!(cluster.conflicts_at(0).await.len(), 0);
    cluster.run(1, "alter table t disable trigger refuse").await;
    cluster.wait_value(1, WAITING, "0").await;
    cluster.converge().await;
    cluster.expect(IDS, "1 2").await;
    assert_eq!(cluster.value(1, line).await, format!("{words}|acknowledged"));
}

#[tokio::test]
async fn updates_that_a_trigger_passes_over_since_they_change_nothing_are_made() {
    let cluster = Cluster::of([15, 18])
        .schema("create table t (id int primary key, v text, doc json)")
        .schema_of(
            1,
            "create trigger same before update on t for each row execute function suppress_redundant_updates_trigger();
             alter table t enable always trigger same",
        )
        .config(RETRY)
        .start()
        .await;
    cluster
        .run(0, "insert into t select i, 'a', '{\"a\": 1}' from generate_series(1, 100) i; insert into t values (0)")
        .await;
    cluster.converge().await;
    // Changes nothing; and again, of rows whose last write left no mark; and along with rows that change.
    cluster.run(0, "update t set v = v").await;
    cluster.run(0, "update t set doc = doc").await;
    cluster
        .run(0, "update t set v = case when id % 2 = 0 then 'b' else v end")
        .await;
    cluster.run(0, "insert into t values (101)").await;
    cluster.wait_value(1, "select count(*) from t", "102").await;
    assert_eq!(cluster.value(1, WAITING).await, "0");
    cluster.converge().await;
    cluster.expect("select count(*) from t where v = 'b'", "51").await;
}

#[tokio::test]
async fn rows_of_tables_that_inherit_are_theirs() {
    let cluster = Cluster::of([15, 18])
        .schema(
            "create table t (id int primary key, v text);
             create table kind (primary key (id)) inherits (t)",
        )
        .start()
        .await;
    cluster
        .run(0, "insert into t select i, 'old' from generate_series(1, 3) i")
        .await;
    cluster.converge().await;
    // As rows are moved into tables of their own.
    cluster
        .run(
            0,
            "begin; insert into kind select * from only t; truncate only t; commit",
        )
        .await;
    cluster.converge().await;
    let both = "select (select count(*) from only t) || ' ' || (select count(*) from kind)";
    cluster.expect(both, "0 3").await;
    // One key in both.
    cluster.run(1, "insert into t values (1, 'new')").await;
    cluster.run(1, "update only t set v = 'newer' where id = 1").await;
    cluster.converge().await;
    let values = "select string_agg(v, ' ' order by tableoid::regclass::text) from t where id = 1";
    cluster.expect(values, "old newer").await;
    cluster.run(0, "delete from only t where id = 1").await;
    cluster.converge().await;
    cluster.expect(both, "0 3").await;
    cluster.expect_no_conflict().await;
}
