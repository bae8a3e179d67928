//! Unique keys, as the daemon reads them: what a server calls equal is equal, whatever its locale.

use std::collections::HashMap;

use anabranch_node::apply::unique_keys;
use anabranch_node::resolve::unique::{UniqueKey, fold, places};
use anabranch_node::source::Event;
use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::Change;

use crate::server::{Decoded, next};

const COLUMNS: &str = "id int PRIMARY KEY, email text, name varchar(20), code char(4), ci citext, state order_state, gone bool, \
    kind int, big bigint, tenant uuid, gone_at timestamptz, price numeric";

/// Each with what it is on: parts for SQL that compares two rows, and the predicate.
const KEYS: [(&str, &str); 18] = [
    ("lower(email)", "true"),
    ("upper(name)", "true"),
    ("lower(trim(email))", "true"),
    ("ci", "true"),
    ("code", "true"),
    ("lower(code)", "true"),
    ("coalesce(kind, -1)", "true"),
    ("coalesce(name, 'None')", "true"),
    ("coalesce(lower(name), '')", "true"),
    ("email", "gone_at IS NULL"),
    ("email", "NOT gone"),
    ("email", "gone IS NOT TRUE AND kind > 0"),
    ("kind", "state = 'open'"),
    ("kind", "state IN ('open', 'held') OR name = 'a'"),
    ("price", "name <> 'a' AND code = 'ab'"),
    ("tenant", "big NOT IN (1, -2, 3)"),
    ("big", "(gone OR kind = 1) IS TRUE"),
    (
        "email",
        "tenant = 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11' AND kind <= 2",
    ),
];

/// What must not be taken for something that the daemon knows.
const UNKNOWN: [&str; 6] = [
    "((md5(email)))",
    "((email || name))",
    "(lower(email) COLLATE \"numeric\")",
    "(email) WHERE gone_at > '2020-01-01'",
    "(email) WHERE lower(name) = 'a'",
    "(kind) WHERE kind % 2 = 0",
];

/// The row's value in the key, if it has one.
fn value(key: &UniqueKey, table: &TableDesc, row: &RowImage) -> Option<Vec<u8>> {
    let cells: Vec<Cell<'_>> = row.cells().collect();
    let places = places(key, table).expect("all columns");
    let mut out = Vec::new();
    key.put_value(&mut out, (table, &cells, &places))
        .expect("a value that can be read")
        .then_some(out)
}

#[tokio::test]
async fn values_that_a_server_calls_equal_are_equal() {
    let mut schema = format!(
        "CREATE EXTENSION citext; CREATE TYPE order_state AS ENUM ('open', 'held', 'closed'); \
         CREATE COLLATION \"numeric\" (provider = icu, locale = 'en-u-kn-true', deterministic = false); \
         CREATE TABLE v ({COLUMNS}); CREATE TABLE u ({COLUMNS}); CREATE TABLE x ({COLUMNS});"
    );
    for (at, (part, predicate)) in KEYS.iter().enumerate() {
        schema += &format!("CREATE UNIQUE INDEX k{at} ON u (({part})) WHERE {predicate};");
    }
    for on in UNKNOWN {
        schema += &format!("CREATE UNIQUE INDEX ON x {on};");
    }
    let decoded = Decoded::new(&schema).await;
    let keys = unique_keys(&decoded.sql).await.unwrap();
    assert!(
        !keys.contains_key(&("public".to_owned(), "x".to_owned())),
        "{keys:?}"
    );
    let keys = &keys[&("public".to_owned(), "u".to_owned())];
    assert_eq!(keys.len(), KEYS.len(), "{keys:?}");
    let mut source = decoded.source().await;
    decoded
        .run(
            "SELECT setseed(0.5); INSERT INTO v SELECT id, (array['a', 'A', ' a ', 'Ä', 'ä', 'ß', 'SS', '', NULL])[1 + random() * 8], \
             (array['a', 'A', 'None', 'NONE', '', NULL])[1 + random() * 5], (array['ab', 'AB', 'ab  ', 'cd', NULL])[1 + random() * 4], \
             (array['x', 'X', 'Ö', 'ö', NULL])[1 + random() * 4], (array['open', 'held', 'closed', NULL]::order_state[])[1 + random() * 3], \
             (array[true, false, NULL])[1 + random() * 2], (array[-1, 0, 1, 2, 3, NULL])[1 + random() * 5], \
             (array[-2, 1, 2, 3, 9000000000, NULL])[1 + random() * 5], \
             (array['a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', 'b0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', NULL]::uuid[])[1 + random() * 2], \
             (array[now(), NULL])[1 + random()], (array[1.0, 1.00, 2, NULL])[1 + random() * 3] FROM generate_series(1, 300) id",
        )
        .await;
    let mut rows = HashMap::new();
    let mut table = None;
    while rows.len() < 300 {
        if let Event::Change(Change::Put { table: of, row, .. }) = next(&mut source).await.unwrap() {
            rows.insert(rows.len() + 1, row);
            table = Some(of);
        }
    }
    let table = table.unwrap();
    for (at, (part, predicate)) in KEYS.iter().enumerate() {
        let name = format!("k{at}");
        let key = keys.iter().find(|key| *key.name == *name).unwrap();
        let ours: HashMap<usize, Option<Vec<u8>>> = rows
            .iter()
            .map(|(id, row)| (*id, value(key, &table, row)))
            .collect();
        // Rows of one value have one number.
        let numbered = decoded
            .user
            .query(
                &format!("SELECT id, dense_rank() OVER (ORDER BY ({part})) FROM v WHERE ({predicate}) AND ({part}) IS NOT NULL"),
                &[],
            )
            .await
            .unwrap();
        let theirs: HashMap<usize, i64> = numbered
            .iter()
            .map(|row| (usize::try_from(row.get::<_, i32>(0)).unwrap(), row.get(1)))
            .collect();
        assert!(
            theirs.len() > 10,
            "{part} WHERE {predicate}: {} rows",
            theirs.len()
        );
        let mut values: HashMap<i64, &Vec<u8>> = HashMap::new();
        for (id, mine) in &ours {
            assert_eq!(
                mine.is_some(),
                theirs.contains_key(id),
                "{part} WHERE {predicate}: {:?}",
                rows[id]
            );
            let Some(mine) = mine else { continue };
            let known = values.entry(theirs[id]).or_insert(mine);
            assert_eq!(*known, mine, "{part}: {:?}", rows[id]);
        }
        // Only what folds may take for one what the server does not.
        let distinct: std::collections::HashSet<&&Vec<u8>> = values.values().collect();
        let folds = part.contains("lower") || part.contains("upper") || *part == "ci";
        assert!(
            folds || distinct.len() == values.len(),
            "{part} WHERE {predicate}"
        );
        assert!(distinct.len() > 1, "{part} WHERE {predicate}");
    }
}

#[tokio::test]
async fn what_any_locale_folds_is_folded() {
    let decoded = Decoded::new("CREATE TABLE t (id int PRIMARY KEY)").await;
    let collations = decoded
        .user
        .query(
            "SELECT collname::text FROM pg_collation WHERE collname IN ('C', 'POSIX', 'C.utf8', 'en_US.utf8', 'en-x-icu', 'und-x-icu', \
             'tr-x-icu', 'az-x-icu', 'de-x-icu', 'nl-x-icu')",
            &[],
        )
        .await
        .unwrap();
    assert!(collations.len() >= 8, "{}", collations.len());
    for collation in collations {
        let collation: String = collation.get(0);
        for function in ["lower", "upper"] {
            // The others are folded to themselves.
            let rows = decoded
                .user
                .query(
                    &format!(
                        "SELECT letter, folded FROM (SELECT chr(c) AS letter, {function}(chr(c) COLLATE \"{collation}\") AS folded \
                         FROM generate_series(1, 130000) c WHERE c NOT BETWEEN 55296 AND 57343) t \
                         WHERE folded COLLATE \"C\" <> letter"
                    ),
                    &[],
                )
                .await
                .unwrap();
            assert!(rows.len() >= 26, "{function} under {collation}: {}", rows.len());
            for row in rows {
                let (letter, to): (String, String) = (row.get(0), row.get(1));
                assert_eq!(
                    fold(&letter),
                    fold(&to),
                    "{function}({letter:?}) is {to:?} under {collation}"
                );
            }
        }
    }
}
