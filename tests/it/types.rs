//! Every kind of value and table: what one server shows, the others show.

use anabranch_tests::Cluster;
use anabranch_tests::daemon::{anabranch_ok, anabranch_refuses};
use anabranch_tests::wait::until;
use serde_json::json;

use crate::verify::plant;

/// Column types with values as SQL literals; two values each, for an insert and an update.
const BUILT_IN: &[(&str, &str, &str)] = &[
    ("boolean", "true", "false"),
    ("smallint", "-32768", "32767"),
    ("integer", "-2147483648", "2147483647"),
    ("bigint", "-9223372036854775808", "9223372036854775807"),
    ("real", "'1.1'", "'-Infinity'"),
    ("double precision", "'0.1'", "'NaN'"),
    ("numeric", "123456789012345678901234567890.000100", "'-Infinity'"),
    ("numeric(12,4)", "'NaN'", "12345678.1234"),
    ("money", "'12.34'", "'-1.00'"),
    (
        "text",
        "E'tab\\t newline\\n quote'' backslash\\\\ ünïcode 🐘'",
        "''",
    ),
    ("varchar(10)", "'ten chars.'", "''"),
    ("char(5)", "'ab'", "'abcde'"),
    ("\"char\"", "'x'", "''"),
    ("name", "'a name'", "''"),
    ("bytea", "'\\x00ff5c27'", "''"),
    ("date", "'0044-03-15 BC'", "'infinity'"),
    ("time", "'23:59:59.999999'", "'00:00'"),
    ("timetz", "'12:00:00.5+05:30'", "'00:00-08'"),
    ("timestamp", "'2026-02-28 12:34:56.789012'", "'-infinity'"),
    ("timestamptz", "'1999-12-31 23:59:59.999999+09'", "'infinity'"),
    (
        "interval",
        "'-1 year -2 mons +3 days -04:05:06.789'",
        "'178000000 years'",
    ),
    (
        "uuid",
        "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'",
        "'00000000-0000-0000-0000-000000000000'",
    ),
    ("json", "'{\"b\": 1,  \"a\": [1.0, null]}'", "'null'"),
    ("jsonb", "'{\"b\": 1.000, \"a\": [1e400, \"\\u00e9\"]}'", "'[]'"),
    ("jsonpath", "'$.a[*] ? (@ > 1)'", "'lax $'"),
    ("xml", "'<a b=\"c\">d</a>'", "''"),
    ("inet", "'192.168.1.5/24'", "'::1'"),
    ("cidr", "'10.0.0.0/8'", "'2001:db8::/32'"),
    ("macaddr", "'08:00:2b:01:02:03'", "'ff:ff:ff:ff:ff:ff'"),
    (
        "macaddr8",
        "'08:00:2b:01:02:03:04:05'",
        "'00:00:00:00:00:00:00:00'",
    ),
    ("bit(5)", "B'10110'", "B'00000'"),
    ("varbit", "B'1'", "B''"),
    ("point", "'(1.5,-2.25)'", "'(NaN,Infinity)'"),
    ("line", "'{1,-2,3}'", "'{0,1,0}'"),
    ("lseg", "'[(0,0),(1,1)]'", "'[(1,2),(3,4)]'"),
    ("box", "'(2,2),(0,0)'", "'(1,1),(1,1)'"),
    ("path", "'[(0,0),(1,1),(2,0)]'", "'((0,0),(1,1))'"),
    ("polygon", "'((0,0),(1,1),(2,0))'", "'((0,0))'"),
    ("circle", "'<(1,2),3>'", "'<(0,0),0>'"),
    ("tsvector", "to_tsvector('simple', 'a fat cat sat')", "''"),
    ("tsquery", "to_tsquery('simple', 'fat & (rat | !cat)')", "''"),
    ("int4range", "'[1,10)'", "'empty'"),
    ("int8range", "'(,5]'", "'(,)'"),
    ("numrange", "'[1.10,2.20]'", "'empty'"),
    (
        "daterange",
        "'[2026-01-01,2026-02-01)'",
        "'[2026-01-01,infinity]'",
    ),
    ("tsrange", "'[2026-01-01 00:00,2026-01-02 00:00)'", "'empty'"),
    ("tstzrange", "'[2026-01-01 00:00+00,)'", "'empty'"),
    ("int4multirange", "'{[1,3),[5,9)}'", "'{}'"),
    (
        "tstzmultirange",
        "'{[2026-01-01 00:00+00,2026-01-02 00:00+00)}'",
        "'{}'",
    ),
    ("nummultirange", "'{[1.5,2.5],(7,)}'", "'{}'"),
    ("int8multirange", "'{[-9223372036854775808,0),[5,)}'", "'{}'"),
    (
        "datemultirange",
        "'{[2026-01-01,2026-02-01),[2026-03-01,)}'",
        "'{}'",
    ),
    ("tsmultirange", "'{[2026-01-01 00:00,2026-01-02 00:00)}'", "'{}'"),
    ("refcursor", "'a cursor'", "''"),
    ("pg_lsn", "'16/B374D848'", "'0/0'"),
    ("txid_snapshot", "'10:20:10,14,15'", "'1:1:'"),
    ("pg_snapshot", "'10:20:10,14,15'", "'1:1:'"),
    ("xid8", "'18446744073709551615'", "'0'"),
    ("oid", "4294967295", "0"),
    ("tid", "'(4294967295,65535)'", "'(0,1)'"),
    ("xid", "'4294967295'", "'3'"),
    ("cid", "'7'", "'0'"),
    ("int2vector", "'1 2 3'", "'4'"),
    ("oidvector", "'1 2 3'", "'4'"),
    ("smallint[]", "'{1,NULL,-3}'", "'{}'"),
    ("integer[]", "'[2:3][-1:0]={{1,2},{3,NULL}}'", "'{{1}}'"),
    ("bigint[]", "'{9223372036854775807}'", "NULL"),
    ("numeric[]", "'{1.10,NaN,NULL}'", "'{}'"),
    ("real[]", "'{1.5,-Infinity}'", "'{0}'"),
    ("boolean[]", "'{t,f,NULL}'", "'{}'"),
    (
        "text[]",
        "array['a,b', '', null, '\"q\"', E'\\\\', '{}', 'NULL']",
        "'{}'",
    ),
    ("varchar(3)[]", "'{abc,d}'", "'{}'"),
    ("bytea[]", "array['\\x00'::bytea, '']", "'{}'"),
    ("uuid[]", "'{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}'", "'{}'"),
    ("date[]", "'{infinity,2026-01-01}'", "'{}'"),
    ("timestamptz[]", "'{\"2026-01-01 00:00:00.000001+00\"}'", "'{}'"),
    ("interval[]", "'{1 day,-00:00:01}'", "'{}'"),
    ("jsonb[]", "array['{\"a\": 1}'::jsonb, null]", "'{}'"),
    ("inet[]", "'{10.0.0.1,::1/64}'", "'{}'"),
    ("point[]", "array['(1,2)'::point]", "'{}'"),
    ("box[]", "array['(2,2),(0,0)'::box, '(1,1),(0,0)']", "'{}'"),
    ("int4range[]", "array['[1,3)'::int4range, 'empty']", "'{}'"),
    ("tsvector[]", "array['a b'::tsvector]", "'{}'"),
];

/// Types of the server that no column of `t` has, but those that `init` refuses, that have no binary form, or that no
/// statement can give a value.
const LEFT_OUT: &str = "select coalesce(string_agg(typname::text, ' '), '') from pg_type \
    where typnamespace = 'pg_catalog'::regnamespace and typtype in ('b', 'r', 'm') and typcategory <> 'A' \
    and typname !~ '^(reg[a-z]+|aclitem|gtsvector|pg_(node_tree|ndistinct|dependencies|mcv_list|brin_.*))$' \
    and oid not in (select atttypid from pg_attribute where attrelid = 't'::regclass)";

async fn every_built_in_type_arrives_as_it_was(versions: [u32; 2]) {
    let columns: Vec<String> = BUILT_IN
        .iter()
        .enumerate()
        .map(|(at, (kind, ..))| format!("c{at} {kind}"))
        .collect();
    let cluster = Cluster::of(versions)
        .schema(&format!(
            "create table t (id int primary key, {})",
            columns.join(", ")
        ))
        .start()
        .await;
    cluster.expect(LEFT_OUT, "").await;
    let insert: Vec<&str> = BUILT_IN.iter().map(|(_, value, _)| *value).collect();
    let update: Vec<String> = BUILT_IN
        .iter()
        .enumerate()
        .map(|(at, (.., value))| format!("c{at} = {value}"))
        .collect();
    cluster
        .run(0, &format!("insert into t values (1, {})", insert.join(", ")))
        .await;
    cluster
        .run(1, &format!("insert into t values (2, {})", insert.join(", ")))
        .await;
    cluster.run(0, "insert into t (id) values (3)").await;
    cluster.converge().await;
    // `to_jsonb` rounds no number, but it may hide differences between texts; so every column as text too.
    let texts: Vec<String> = (0..BUILT_IN.len()).map(|at| format!("c{at}::text")).collect();
    let texts = format!(
        "select string_agg(md5(row({})::text), ' ' order by id) from t",
        texts.join(", ")
    );
    let after_insert = cluster.values(&texts).await;
    assert_eq!(after_insert[0], after_insert[1]);
    cluster
        .run(
            1,
            &format!("update t set {} where id in (1, 3)", update.join(", ")),
        )
        .await;
    cluster.converge().await;
    let after_update = cluster.values(&texts).await;
    assert_eq!(after_update[0], after_update[1]);
    assert_ne!(after_update, after_insert);

    // As a conflict's images too: the log is JSON, and must hold them all.
    cluster.isolate_all();
    cluster.run(0, "update t set c9 = 'one' where id = 1").await;
    cluster.run(1, "update t set c9 = 'two' where id = 1").await;
    cluster.heal();
    cluster.converge().await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1, "{log:#?}");
    assert_eq!(
        log[0].applied().as_object().map(serde_json::Map::len),
        Some(BUILT_IN.len() + 1)
    );
}

#[tokio::test]
async fn every_built_in_type_arrives_as_it_was_between_15_and_15() {
    every_built_in_type_arrives_as_it_was([15, 15]).await;
}

#[tokio::test]
async fn every_built_in_type_arrives_as_it_was_between_15_and_18() {
    every_built_in_type_arrives_as_it_was([15, 18]).await;
}

/// Types of the application's own, whose OIDs differ between the servers.
const OWN_TYPES: &str = "
    create type mood as enum ('sad', 'ok', 'happy');
    create domain positive as int check (value > 0);
    create domain words as text[];
    create type pair as (a int, b text);
    create type nested as (p pair, m mood, r int4range);
    create type floatrange as range (subtype = float8);
    create table t (
        id int primary key, e mood, ea mood[], d positive, da positive[], w words, p pair, pa pair[], n nested,
        fr floatrange, fm floatmultirange, er mood default 'sad'
    )";

#[tokio::test]
async fn enums_domains_composites_and_ranges_of_ones_own_arrive() {
    let cluster = Cluster::of([15, 18, 15])
        .schema_of(
            1,
            &format!("create type shifts_oids as enum ('x'); create type more as (a int); {OWN_TYPES}"),
        )
        .schema_of(0, OWN_TYPES)
        .schema_of(
            2,
            &format!("create type pushes_oids as range (subtype = int4); {OWN_TYPES}"),
        )
        .start()
        .await;
    let row = |id: u32| {
        format!(
            "insert into t values ({id}, 'happy', '{{sad,NULL,ok}}', 5, '{{1,2}}', '{{a,\"b c\"}}', '(1,\"x, y\")', \
             array[row(1, 'a')::pair, null, row(null, null)::pair], row(row(7, 'in'), 'ok', '[1,3)'), \
             '[1.5,2.5)', '{{[1,2),[3,4)}}')"
        )
    };
    for node in cluster.all() {
        cluster.run(node, &row(node as u32 + 1)).await;
    }
    cluster.converge().await;
    cluster.run(1, "update t set e = 'sad', ea = '{happy}', p = null, pa = pa || row(3, 'c')::pair, n.m = 'sad' where id = 1").await;
    cluster
        .run(
            2,
            "update t set d = 6, w = '{z}', fr = 'empty', fm = '{}' where id = 2",
        )
        .await;
    cluster.converge().await;
    cluster.expect("select count(distinct t::text) from t", "3").await;
    cluster
        .expect(
            "select e || ' ' || ea::text || ' ' || (n).m from t where id = 1",
            "sad {happy} sad",
        )
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn types_whose_names_need_quotes_arrive() {
    let schemas = "create schema \"Sales\"; create schema \"order\"";
    let role = "create type \"Sales\".\"UserRole\" as enum ('Admin', 'Guest')";
    let email = "create domain \"Sales\".\"Email\" as text check (value like '%@%')";
    let line = "create type \"order\".\"Line Item\" as (n int, \"Of\" \"Sales\".\"UserRole\")";
    let table = "create table t (id int primary key, r \"Sales\".\"UserRole\" default 'Guest', ra \"Sales\".\"UserRole\"[], \
        e \"Sales\".\"Email\", l \"order\".\"Line Item\", la \"order\".\"Line Item\"[])";
    let cluster = Cluster::of([15, 18])
        .schema_of(0, &format!("{schemas}; {role}; {email}; {line}; {table}"))
        .schema_of(
            1,
            &format!("{schemas}; {email}; create type shifts_oids as enum ('x'); {role}; {line}; {table}"),
        )
        .start()
        .await;
    let oids = "select '\"Sales\".\"UserRole\"'::regtype::oid";
    let oids = cluster.values(oids).await;
    assert_ne!(oids[0], oids[1]);
    for node in cluster.all() {
        cluster
            .run(
                node,
                &format!(
                    "insert into t values ({node}, 'Admin', '{{Guest,Admin}}', 'a@b', row(1, 'Admin'), \
                     array[row(2, 'Guest')::\"order\".\"Line Item\", null])"
                ),
            )
            .await;
    }
    cluster.converge().await;
    cluster
        .run(1, "update t set r = 'Guest', la = la || la where id = 0")
        .await;
    cluster
        .run(0, "update t set e = 'c@d', l.n = 3 where id = 1")
        .await;
    cluster.converge().await;
    cluster
        .expect("select count(*) from anabranch.quarantine", "0")
        .await;
    cluster.expect_no_conflict().await;
    cluster.expect("select count(distinct t::text) from t", "2").await;

    // What lost is written again.
    cluster
        .apart(&[
            (
                0,
                "update t set ra = '{Admin}', e = 'lost@x', l = row(7, 'Guest') where id = 0",
            ),
            (
                1,
                "update t set ra = '{Guest}', e = 'won@x', l = row(8, 'Admin') where id = 0",
            ),
        ])
        .await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1, "{log:#?}");
    assert_eq!(log[0].applied()["l"], json!({"n": 8, "Of": "Admin"}), "{log:#?}");
    let config = cluster.nodes[1].daemon.config_arg();
    let id = log[0].0["conflict_id"].as_str().unwrap();
    anabranch_ok(&["conflicts", "replay", id, "--config", config]).await;
    cluster.converge().await;
    cluster
        .expect(
            "select concat_ws(' ', ra, e, (l).n, (l).\"Of\") from t where id = 0",
            "{Admin} lost@x 7 Guest",
        )
        .await;
    for node in cluster.all() {
        let config = cluster.nodes[node].daemon.config_arg();
        anabranch_ok(&["verify", "--config", config]).await;
    }
}

#[tokio::test]
async fn an_own_row_that_comes_back_fits_a_type_that_was_renamed_since() {
    let cluster = Cluster::of([15, 15])
        .schema("create type mood as enum ('sad', 'glad'); create table felt (id int primary key, m mood); create table later (id int primary key)")
        .policy("[[table]]\nname = \"public.felt\"\npolicy = \"first_update_wins\"\n")
        .start()
        .await;
    let rename = "alter type mood rename to feeling";
    cluster.partition(&[0], &[1]);
    // Earlier than the row here, so it wins; and emptied before that, so this comes back.
    cluster.admin(1).await.run(rename).await;
    cluster.run(1, "insert into felt values (1, 'sad')").await;
    cluster.run(1, "truncate felt").await;
    cluster.run(0, "insert into felt values (1, 'glad')").await;
    let end = cluster.value(0, "select pg_current_wal_insert_lsn()").await;
    let decoded = format!(
        "select confirmed_flush_lsn >= '{end}' from pg_replication_slots where slot_name = 'anabranch'"
    );
    cluster.wait_value(0, &decoded, "t").await;
    cluster.admin(0).await.run(rename).await;
    cluster.heal();
    // What comes behind it is here.
    cluster.run(1, "insert into later values (1)").await;
    cluster.wait_value(0, "select count(*) from later", "1").await;
    assert_eq!(
        cluster
            .value(0, "select string_agg(id || ' ' || m, ',') from felt")
            .await,
        "1 glad"
    );
    assert_eq!(
        cluster
            .value(0, "select count(*) from anabranch.quarantine")
            .await,
        "0"
    );
}

#[tokio::test]
async fn domains_over_ones_own_types_are_copied_to_a_server_that_joins() {
    let mut cluster = Cluster::of([15, 15])
        .schema(
            "do $$ begin for i in 1..300 loop create type gone as enum ('x'); drop type gone; end loop; end $$;
             create type mood as enum ('sad', 'ok');
             create domain moods as mood[];
             create type pair as (m mood, n int);
             create domain good_pair as pair check ((value).n > 0);
             create table t (id int primary key, l moods, p good_pair)",
        )
        .start()
        .await;
    cluster
        .run(0, "insert into t values (1, '{sad,ok}', row('ok', 1)::pair)")
        .await;
    cluster.converge().await;
    let node = cluster.add_server(15).await;
    cluster.join(node, 0).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster
        .run(node, "insert into t values (2, '{ok}', row('sad', 2)::pair)")
        .await;
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(concat_ws(' ', id, l, p), ', ' order by id) from t",
            "1 {sad,ok} (ok,1), 2 {ok} (sad,2)",
        )
        .await;
    // An array's image has the number of its elements' type.
    let oids = cluster.values("select 'mood'::regtype::oid").await;
    assert_ne!(oids[0], oids[node]);
}

/// Beside each key a column that refuses NULL, by its type.
const SOLID: &str = "
    create domain email as text not null;
    create domain age as int check (value is not null);
    create domain search as tsquery;
    create domain price as numeric;
    create domain code as char(4);
    create table person (id int primary key, badge int unique, mail email default '@', age age default 0, q search);
    create table note (id int primary key, badge int references person (badge), mail email default '@');
    create table visit (id int primary key, person int references person, mail email default '@');
    create index on visit (person);
    create table priced (p price, c code, v text, mail email default '@', primary key (p, c))";

#[tokio::test]
async fn keys_beside_domains_that_refuse_null_and_keys_of_domains_are_as_any_others() {
    let cluster = Cluster::of([15, 18])
        .schema(SOLID)
        .policy(
            "[[table]]\nname = \"public.visit\"\nforeign_keys = \"restore_parent\"\n\
             [[table]]\nname = \"public.note\"\nforeign_keys = \"delete_child\"\n",
        )
        .config("[apply]\nquarantine_retry_ms = 500\n")
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into person select g, g * 10, g || '@x', g, '' from generate_series(1, 6) g;
             insert into priced values (1.0, 'ab', 'x'), (2.50, 'cd', 'y')",
        )
        .await;
    cluster.converge().await;
    cluster
        .run(
            1,
            "delete from person where id = 6; update person set age = 11, q = 'a & b' where id = 1; delete from priced where p = 1",
        )
        .await;
    cluster.converge().await;
    let waiting = "select count(*) from anabranch.quarantine";
    cluster.expect(waiting, "0").await;
    cluster
        .expect(
            "select string_agg(concat_ws(' ', id, age, q), ',' order by id) from person",
            "1 11 'a' & 'b',2 2 ,3 3 ,4 4 ,5 5 ",
        )
        .await;
    cluster.expect_no_conflict().await;

    // One key, written in two ways; a delete that is later; rows that a truncate does not take.
    cluster
        .apart(&[
            (0, "insert into priced values (7.0, 'z', 'first')"),
            (1, "insert into priced values (7.00, 'z   ', 'second')"),
            (0, "update person set age = 55 where id = 2"),
            (1, "delete from person where id = 2"),
            (0, "delete from priced where v = 'y'"),
        ])
        .await;
    cluster
        .expect("select string_agg(p || v, ',') from priced", "7.00second")
        .await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 2, "{log:#?}");
    let lost = log.iter().find(|line| line.0["table_name"] == "person").unwrap();
    assert_eq!(*lost.key(), json!({"id": 2}), "{log:#?}");
    cluster
        .apart(&[
            (0, "truncate priced"),
            (1, "insert into priced values (9, 'n', 'stays')"),
        ])
        .await;
    cluster
        .expect("select string_agg(v, ',') from priced", "stays")
        .await;
    let config = cluster.nodes[0].daemon.config_arg();
    anabranch_ok(&[
        "conflicts",
        "replay",
        lost.0["conflict_id"].as_str().unwrap(),
        "--config",
        config,
    ])
    .await;
    cluster.converge().await;
    cluster
        .expect("select age || mail from person where id = 2", "552@x")
        .await;

    // Rows without their parents, by the primary key and by another one.
    cluster
        .apart(&[
            (
                0,
                "delete from person where id = 3; update person set badge = 41 where id = 4",
            ),
            (
                1,
                "insert into visit values (10, 3); insert into note values (1, 40)",
            ),
        ])
        .await;
    for node in cluster.all() {
        let mended = "select concat_ws(' ', (select count(*) from note), (select string_agg(p.mail, '') from visit v join person p on p.id = v.person))";
        cluster.wait_value(node, mended, "0 3@x").await;
    }
    cluster.converge().await;

    // What is refused waits by its key, and goes by it.
    cluster
        .run(1, "alter table person add constraint young check (age < 100)")
        .await;
    cluster
        .run(0, "insert into person values (60, 600, '@', 150)")
        .await;
    cluster
        .wait_value(
            1,
            "select string_agg(key::text, ',') from anabranch.quarantine",
            "{\"id\": 60}",
        )
        .await;
    cluster.run(0, "delete from person where id = 60").await;
    cluster.wait_value(1, waiting, "0").await;
    cluster.converge().await;

    // A row that one node alone has is found and removed.
    plant(&cluster, 1, "insert into person values (70, 700)").await;
    anabranch_ok(&["repair", "--from", "n1", "--config", config]).await;
    cluster.converge().await;
    cluster
        .expect("select count(*) from person where id = 70", "0")
        .await;
}

#[tokio::test]
async fn rows_of_a_table_that_came_to_have_an_array_beside_a_column_without_a_binary_form_go_all_the_same() {
    let cluster = Cluster::of([15, 18])
        .schema("create table odd (id int primary key, a aclitem)")
        .config("[apply]\nquarantine_retry_ms = 500\n")
        .start()
        .await;
    cluster
        .run(0, "insert into odd values (1, '=r/app'), (2, '=w/app')")
        .await;
    cluster.converge().await;
    for node in cluster.all() {
        cluster.run(node, "alter table odd add n int[]").await;
    }
    cluster
        .run(
            0,
            "delete from odd where id = 1; update odd set n = '{1}' where id = 2",
        )
        .await;
    let waiting = "select count(*) from anabranch.quarantine";
    cluster.wait_value(1, waiting, "1").await;
    cluster
        .wait_value(1, "select string_agg(id::text, ',') from odd", "2")
        .await;
    // Nor does it stop what empties the table.
    cluster.run(0, "truncate odd").await;
    cluster.wait_value(1, "select count(*) from odd", "0").await;
    cluster.wait_value(1, waiting, "0").await;
    cluster.converge().await;
}

#[tokio::test]
async fn generated_and_identity_columns_arrive() {
    for versions in [[15, 15], [15, 18]] {
        let cluster = Cluster::of(versions)
            .schema(
                "create table t (
                    id int generated by default as identity primary key,
                    v int not null,
                    doubled int generated always as (v * 2) stored,
                    serial_number int generated always as identity,
                    big text)",
            )
            .start()
            .await;
        cluster
            .run(0, "insert into t (id, v, big) values (1, 10, 'x')")
            .await;
        cluster
            .run(1, "insert into t (id, v, big) values (2, 20, 'y')")
            .await;
        cluster.converge().await;
        cluster.run(1, "update t set v = 11 where id = 1").await;
        cluster.run(0, "update t set v = 21 where id = 2").await;
        cluster.converge().await;
        cluster
            .expect(
                "select string_agg(id || ':' || v || ':' || doubled, ' ' order by id) from t",
                "1:11:22 2:21:42",
            )
            .await;
        // A row that is made anew has another number, which no UPDATE can set.
        cluster
            .run(
                0,
                "begin; delete from t where id = 1; insert into t (id, v, big) values (1, 12, 'z'); commit",
            )
            .await;
        cluster.converge().await;
        cluster.expect_no_conflict().await;
        // And so have two that are made at once, of which one stays.
        cluster.partition(&[0], &[1]);
        cluster.run(0, "insert into t (id, v) values (9, 1)").await;
        cluster
            .run(
                1,
                "insert into t (id, v) select 8 + i, i from generate_series(0, 1) i",
            )
            .await;
        cluster.heal();
        cluster.converge().await;
    }
}

#[tokio::test]
async fn partitioned_tables_arrive_in_their_partitions() {
    let cluster = Cluster::of([15, 15, 18])
        .schema(
            "create table t (id int, region text, v text, primary key (id, region)) partition by list (region);
             create table t_eu partition of t for values in ('eu');
             create table t_us partition of t for values in ('us');
             create table t_other partition of t default partition by hash (id);
             create table t_other_0 partition of t_other for values with (modulus 2, remainder 0);
             create table t_other_1 partition of t_other for values with (modulus 2, remainder 1)",
        )
        .start()
        .await;
    cluster.run(0, "insert into t select i, (array['eu', 'us', 'asia'])[i % 3 + 1], 'new' from generate_series(1, 30) i").await;
    cluster.converge().await;
    // A row that moves to another partition, a write to a partition by its own name, a detached key.
    cluster.run(1, "update t set region = 'us' where id = 3").await;
    cluster.run(2, "update t_us set v = 'direct' where id = 4").await;
    cluster.run(0, "delete from t_other where id = 5").await;
    cluster.converge().await;
    let by_partition =
        "select string_agg(tableoid::regclass || ':' || id || ':' || v, ' ' order by id) from t";
    let values = cluster.values(by_partition).await;
    assert!(values.iter().all(|value| *value == values[0]), "{values:#?}");
    assert!(
        values[0].contains("t_us:3:new") && values[0].contains("t_us:4:direct"),
        "{}",
        values[0]
    );
    cluster.expect_no_conflict().await;

    // A truncate of one partition, and of the whole.
    cluster.run(1, "truncate t_eu").await;
    cluster.converge().await;
    cluster.expect("select count(*) from t_eu", "0").await;
    cluster.expect("select count(*) > 10 from t", "t").await;
    cluster.run(2, "truncate t").await;
    cluster.converge().await;
    cluster.expect("select count(*) from t", "0").await;
}

#[tokio::test]
async fn columns_may_stand_in_another_order_at_each_node() {
    let cluster = Cluster::of([15, 18, 15])
        .schema_of(0, "create table t (id int primary key, a text, b int, c timestamptz)")
        .schema_of(1, "create table t (c timestamptz, b int, id int primary key, a text)")
        .schema_of(2, "create table t (gone int, a text, id int primary key, gone_too text, c timestamptz, b int); alter table t drop column gone, drop column gone_too")
        .start()
        .await;
    for node in cluster.all() {
        cluster
            .run(
                node,
                &format!("insert into t (id, a, b, c) values ({node}, 'a', {node}, '2026-01-01 00:00+00')"),
            )
            .await;
    }
    cluster.converge().await;
    for node in cluster.all() {
        cluster
            .run(
                node,
                &format!(
                    "update t set a = 'from n{}' where id = {}",
                    node + 1,
                    (node + 1) % 3
                ),
            )
            .await;
    }
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(id || a || b, ' ' order by id) from t",
            "0from n30 1from n11 2from n22",
        )
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn servers_may_differ_in_datestyle_time_zone_and_interval_style() {
    let cluster = Cluster::of([15, 15, 18])
        .schema(
            "create table t (id int primary key, d date, z timestamptz, s timestamp, i interval, f float8, b bytea, \
             za timestamptz[], ia interval[], r tstzrange, m money)",
        )
        .conf(0, "datestyle = 'German, DMY'")
        .conf(0, "timezone = 'Asia/Kolkata'")
        .conf(0, "intervalstyle = 'sql_standard'")
        .conf(0, "bytea_output = 'escape'")
        .conf(1, "datestyle = 'SQL, MDY'")
        .conf(1, "timezone = 'America/St_Johns'")
        .conf(1, "intervalstyle = 'iso_8601'")
        .conf(1, "extra_float_digits = -10")
        .conf(2, "datestyle = 'Postgres, DMY'")
        .conf(2, "intervalstyle = 'postgres_verbose'")
        .start()
        .await;
    let values = "date '2026-02-03', timestamptz '2026-02-03 04:05:06.789+02', timestamp '2026-03-04 01:02:03', \
         make_interval(years => -1, months => 2, days => -3, secs => 14706.7), 0.1::float8 + 0.2::float8, '\\x5c00ff'::bytea, \
         array[timestamptz '2026-02-03 04:05:06.789+02'], array[make_interval(days => -1, hours => 2)], \
         tstzrange('2026-02-03 00:00+00', null), 1234.5::numeric::money";
    for node in cluster.all() {
        cluster
            .run(node, &format!("insert into t select {node}, {values}"))
            .await;
    }
    cluster.converge().await;
    let equal = format!(
        "select count(*) from t where (d, z, s, i, f, b, za, ia, r, m) is not distinct from row({values})"
    );
    cluster.expect(&equal, "3").await;

    // A conflict's images do not depend on the server they were logged at.
    cluster.isolate_all();
    cluster.run(0, "update t set d = d + 1 where id = 0").await;
    cluster.run(1, "update t set d = d + 2 where id = 0").await;
    cluster.heal();
    cluster.converge().await;
    cluster.conflicts().await;
    let images = join(
        &cluster,
        "select coalesce(applied_tuple::text, '') from anabranch.conflict_history",
    )
    .await;
    assert!(
        images
            .iter()
            .all(|image| *image == images[0] && image.contains("2026-02-05")),
        "{images:#?}"
    );
}

async fn join(cluster: &Cluster, sql: &str) -> Vec<String> {
    cluster.values(sql).await
}

/// A value that is stored out of line, so that an update of another column does not carry it.
fn long(seed: &str) -> String {
    format!("(select string_agg(md5('{seed}' || i), '') from generate_series(1, 400) i)")
}

const DOCUMENTS: &str = "create table doc (id int primary key, title text, body text); alter table doc alter body set storage external";

#[tokio::test]
async fn a_long_value_that_an_update_leaves_alone_stays_on_two_nodes() {
    for versions in [[15, 15], [15, 18]] {
        let cluster = Cluster::of(versions).schema(DOCUMENTS).start().await;
        cluster
            .run(0, &format!("insert into doc values (1, 'title', {})", long("a")))
            .await;
        cluster.converge().await;
        let body = cluster.value(0, "select md5(body) from doc").await;
        cluster.run(1, "update doc set title = 'new title'").await;
        cluster.converge().await;
        cluster
            .expect("select md5(body) from doc where title = 'new title'", &body)
            .await;
        // A key change carries it too.
        cluster.run(0, "update doc set id = 2").await;
        cluster.converge().await;
        cluster
            .expect("select md5(body) from doc where id = 2", &body)
            .await;
        cluster.expect_no_conflict().await;
    }
}

#[tokio::test]
async fn a_long_value_that_the_winner_left_alone_is_the_winners_on_three_nodes() {
    let cluster = Cluster::of([15, 15, 15]).schema(DOCUMENTS).start().await;
    cluster
        .run(0, &format!("insert into doc values (1, 'title', {})", long("a")))
        .await;
    cluster.converge().await;
    let body = cluster.value(0, "select md5(body) from doc").await;
    // One node changes the long value; another, later and not knowing it, only the title. Every node must
    // end with the winner's whole row, whichever of the two it saw first.
    cluster.isolate_all();
    cluster
        .run(0, &format!("update doc set body = {}", long("b")))
        .await;
    cluster.run(1, "update doc set title = 'winner'").await;
    cluster.set_lines(&[0], &[2], anabranch_tests::proxy::Mode::Pass);
    cluster
        .wait_value(2, &format!("select body = {} from doc", long("b")), "t")
        .await;
    cluster.heal();
    cluster.converge().await;
    cluster
        .expect(
            "select title || ' ' || md5(body) from doc",
            &format!("winner {body}"),
        )
        .await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1);
    // The loser's long value is in the log, not lost.
    let lost = cluster.value(0, &format!("select md5({})", long("b"))).await;
    for node in cluster.all() {
        let side = "case loser when 'local' then local_tuple else remote_tuple end ->> 'body'";
        assert_eq!(
            cluster
                .value(
                    node,
                    &format!("select md5({side}) from anabranch.conflict_history")
                )
                .await,
            lost
        );
    }
}

#[tokio::test]
async fn keys_of_many_types_name_the_same_row_everywhere() {
    let cluster = Cluster::of([15, 18])
        .schema(
            "create table by_text (k text primary key, v text);
             create table by_uuid (k uuid primary key, v text);
             create table by_time (k timestamptz, n bigint, v text, primary key (n, k));
             create table by_numeric (k numeric primary key, v text);
             create table by_bytes (a bytea, b varchar(20), v text, primary key (a, b));
             create table by_char (k char(8) primary key, v text);
             create type color as enum ('red', 'green');
             create table by_enum (k color, v text, d date, primary key (k, d));
             create table only_key (a int, b int, primary key (a, b))",
        )
        .start()
        .await;
    let tables = [
        ("by_text", "k", "'Ünï 🐘 ''q'''"),
        ("by_uuid", "k", "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'"),
        ("by_time", "k, n", "'2026-01-01 00:00:00.000001+03', -5"),
        ("by_numeric", "k", "1.0"),
        ("by_bytes", "a, b", "'\\x00', ''"),
        ("by_char", "k", "'ab'"),
        ("by_enum", "k, d", "'green', '2026-01-01'"),
    ];
    cluster.isolate_all();
    for node in [0, 1] {
        for (table, columns, key) in tables {
            // One key in two spellings.
            let key = if table == "by_numeric" && node == 1 {
                "1.00"
            } else {
                key
            };
            cluster
                .run(
                    node,
                    &format!(
                        "insert into {table} ({columns}, v) values ({key}, 'n{}')",
                        node + 1
                    ),
                )
                .await;
        }
        cluster.run(node, "insert into only_key values (1, 2)").await;
    }
    cluster.heal();
    cluster.converge().await;
    for (table, ..) in tables {
        cluster
            .expect(&format!("select string_agg(v, ',') from {table}"), "n2")
            .await;
    }
    cluster.expect("select count(*) from only_key", "1").await;
    assert_eq!(cluster.conflicts().await.len(), tables.len() + 1);
    cluster.run_everywhere("select 1").await;
    cluster
        .run(
            0,
            "update by_enum set d = '2027-01-01'; delete from by_time; update by_text set k = 'other'",
        )
        .await;
    cluster.converge().await;
    cluster.expect("select count(*) from by_time", "0").await;
    cluster.expect("select k from by_text", "other").await;
}

#[tokio::test]
async fn names_may_hold_anything() {
    let cluster = Cluster::of([15, 15])
        .schema(
            "create table \"Order \"\"Lines\"\"\" (\"select\" int primary key, \"it's\" text, \"größe \" numeric, \"a.b\" int);
             create table \"table\" (\"user\" text, \"Key\" int, primary key (\"Key\", \"user\"))",
        )
        .start()
        .await;
    cluster.run(0, "insert into \"Order \"\"Lines\"\"\" values (1, 'x', 1.5, 2); insert into \"table\" values ('me', 1)").await;
    cluster.converge().await;
    cluster.run(1, "update \"Order \"\"Lines\"\"\" set \"it's\" = 'y', \"größe \" = 2; update \"table\" set \"Key\" = 2").await;
    cluster.converge().await;
    cluster
        .expect("select \"it's\" || \"größe \" from \"Order \"\"Lines\"\"\"", "y2")
        .await;
    cluster.expect("select \"Key\" from \"table\"", "2").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn wide_rows_and_large_values_arrive() {
    let columns: Vec<String> = (0..500).map(|at| format!("c{at} int default {at}")).collect();
    let cluster = Cluster::of([15, 15])
        .schema(&format!(
            "create table wide (id int primary key, {}); create table large (id int primary key, v bytea)",
            columns.join(", ")
        ))
        .start()
        .await;
    cluster
        .run(0, "insert into wide select i from generate_series(1, 200) i")
        .await;
    cluster
        .run(1, "insert into large select i, decode(string_agg(md5(i::text || j), ''), 'hex') from generate_series(1, 3) i, generate_series(1, 500000) j group by i")
        .await;
    cluster.converge().await;
    cluster
        .run(1, "update wide set c0 = -1, c499 = -2 where id % 2 = 0")
        .await;
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(length(v)::text, ' ') from large",
            "8000000 8000000 8000000",
        )
        .await;
    cluster
        .expect("select sum(c499 - c0) from wide", &(100 * 499 - 100).to_string())
        .await;
}

/// `anabranch conflicts replay` at one node.
fn replay<'a>(cluster: &'a Cluster, node: usize, id: &'a str) -> Vec<&'a str> {
    let config = cluster.nodes[node].daemon.config_arg();
    vec!["conflicts", "--config", config, "replay", id]
}

async fn no_alarm_stands(cluster: &Cluster) {
    for node in cluster.all() {
        until("no alarm stands", async || {
            cluster.status_or_null(node).await["alarms"] == json!([])
        })
        .await;
    }
}

/// Values of `json` that `jsonb` does not take: the conflict log holds `jsonb`.
async fn json_that_jsonb_does_not_take_stops_nothing(versions: [u32; 2]) {
    let odd = [r#"{"a": "\u0000"}"#, r#""\ud83d""#, "1e999999"];
    let cluster = Cluster::of(versions)
        .schema("create table doc (id int primary key, v text, n numeric, j json)")
        .schema_of(1, "alter table doc add constraint short check (length(v) < 10)")
        .config("[apply]\nquarantine_retry_ms = 500\n")
        .start()
        .await;
    for (id, value) in odd.iter().enumerate() {
        cluster
            .run(
                0,
                &format!("insert into doc values ({id}, 'base', 1.5, '{value}')"),
            )
            .await;
    }
    cluster
        .run(0, "insert into doc values (8, 'base', 1.5, '{\"a\": 1}')")
        .await;
    cluster.converge().await;

    // A row that conflicts. Of row 8 the value is what was lost.
    cluster
        .apart(&[
            (0, "update doc set v = 'earlier' where id < 8"),
            (0, r#"update doc set v = 'earlier', j = '"\u0000"' where id = 8"#),
            (1, "update doc set v = 'later'"),
        ])
        .await;
    cluster
        .expect("select string_agg(v, ' ') from doc", "later later later later")
        .await;
    assert_eq!(cluster.conflicts().await.len(), 4);
    for node in cluster.all() {
        for line in cluster.conflicts_at(node).await {
            let id = line.key()["id"].as_u64().expect("a number") as usize;
            let (value, lost) = match odd.get(id) {
                Some(value) => (*value, json!(["v"])),
                None => (r#""\u0000""#, json!(["j", "v"])),
            };
            let unread = json!({ "unread_text": value, "type": "pg_catalog.json" });
            let loser = match line.0["loser"].as_str() {
                Some("local") => line.local(),
                _ => line.remote(),
            };
            assert_eq!(
                *loser,
                json!({ "id": id, "v": "earlier", "n": 1.5, "j": unread }),
                "{line:#?}"
            );
            assert_eq!(line.0["lost_columns"], lost, "{line:#?}");
        }
    }
    no_alarm_stands(&cluster).await;
    for line in cluster.conflicts_at(1).await {
        let id = line.0["conflict_id"].as_str().expect("an id");
        let args = replay(&cluster, 1, id);
        if line.key()["id"] == 8 {
            let said = anabranch_refuses(&[&args[..], &["--force"]].concat()).await;
            assert!(said.contains("not as values"), "{said}");
            anabranch_ok(&[&args[..], &["--columns", "v"]].concat()).await;
        } else {
            anabranch_ok(&args).await;
        }
    }
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(v, ' ') from doc",
            "earlier earlier earlier earlier",
        )
        .await;

    // A row that is refused.
    cluster
        .run(0, r#"insert into doc values (9, 'much too long', 2, '"\u0000"')"#)
        .await;
    let waiting = "select count(*) from anabranch.quarantine";
    cluster.wait_value(1, waiting, "1").await;
    let lines = cluster.conflicts_at(1).await;
    let line = lines.iter().find(|line| line.kind() == "check_violation");
    let line = line.expect("the refused row has a line");
    let unread = json!({ "unread_text": r#""\u0000""#, "type": "pg_catalog.json" });
    assert_eq!(
        *line.remote(),
        json!({ "id": 9, "v": "much too long", "n": 2, "j": unread })
    );
    cluster.run(1, "alter table doc drop constraint short").await;
    cluster.wait_value(1, waiting, "0").await;
    cluster.converge().await;
    no_alarm_stands(&cluster).await;
    cluster.run(1, "update doc set v = 'since' where id = 9").await;
    cluster.converge().await;
    let args = replay(&cluster, 1, line.0["conflict_id"].as_str().expect("an id"));
    let said = anabranch_refuses(&args).await;
    assert!(said.contains("not as values"), "{said}");
    let args = [&args[..], &["--columns", "v"]].concat();
    let said = anabranch_refuses(&args).await;
    assert!(said.contains("does not say what stood in its place"), "{said}");
    anabranch_ok(&[&args[..], &["--force"]].concat()).await;
    cluster.converge().await;
    cluster
        .expect("select v || j from doc where id = 9", r#"much too long"\u0000""#)
        .await;
}

#[tokio::test]
async fn json_that_jsonb_does_not_take_stops_nothing_on_15() {
    json_that_jsonb_does_not_take_stops_nothing([15, 15]).await;
}

#[tokio::test]
async fn json_that_jsonb_does_not_take_stops_nothing_on_18() {
    json_that_jsonb_does_not_take_stops_nothing([18, 18]).await;
}
