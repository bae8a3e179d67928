//! Dividing sequences between the nodes, at one node: what is planned is done, once, and what cannot be is refused.

use serde_json::Value;
use tokio_postgres::Client;

use crate::Node;
use crate::server::value;

const SCHEMA: &str = "
    CREATE TABLE a (id serial PRIMARY KEY, v text);
    CREATE TABLE \"B b\" (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY);
    CREATE SEQUENCE shared;
    CREATE TABLE c (id bigint PRIMARY KEY DEFAULT nextval('shared'));
    CREATE TABLE d (id bigint PRIMARY KEY DEFAULT nextval('shared'));
    CREATE SEQUENCE spare;
    INSERT INTO a (v) SELECT 'x' FROM generate_series(1, 20);
    INSERT INTO c VALUES (1000);
    INSERT INTO d VALUES (2000)";

/// A node, id 1, of two; the other, id 2, is not there.
async fn with(schema: &str) -> (Node, Client) {
    let node = Node::new().await;
    let admin = node.server.admin().await;
    admin.batch_execute(schema).await.unwrap();
    node.set_up().await;
    (node, admin)
}

/// Every sequence as it is, and what was said of it.
async fn state(admin: &Client) -> String {
    let sequences = "SELECT string_agg(s::text, '; ' ORDER BY schemaname, sequencename) FROM pg_sequences s
         WHERE schemaname = 'public'";
    let said = "SELECT coalesce(string_agg(concat_ws(' ', sequence_name, node_id, increment, base), '; '
                                           ORDER BY sequence_name, node_id), '') FROM anabranch.sequence";
    value(admin, sequences).await + "\n" + &value(admin, said).await
}

async fn next(admin: &Client, sequence: &str) -> i64 {
    let text = format!("SELECT nextval('{sequence}')::text");
    value(admin, &text).await.parse().unwrap()
}

/// What node 2 would say.
async fn other_says(admin: &Client, increment: i64, base: Option<i64>) {
    let base = base.map_or("NULL".to_owned(), |base| base.to_string());
    admin
        .batch_execute(&format!(
            "INSERT INTO anabranch.sequence SELECT schema_name, sequence_name, 2, {increment}, {base}
             FROM anabranch.sequence WHERE node_id = 1
             ON CONFLICT (schema_name, sequence_name, node_id) DO UPDATE SET increment = {increment}, base = {base}"
        ))
        .await
        .unwrap();
}

fn status(node: &Node, code: i32) -> Value {
    let output = node.run(&["sequences", "status", "--output", "json"]);
    assert_eq!(output.status.code(), Some(code), "{}", crate::both(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test]
async fn what_is_planned_is_done_once() {
    let (node, admin) = with(SCHEMA).await;
    let before = state(&admin).await;
    let plan = node.ok(&["sequences", "plan"]);
    assert!(
        plan.contains("-- interleave public.a_id_seq by 16, offset 1 (is INCREMENT BY 1, not 16)"),
        "{plan}"
    );
    assert!(
        plan.contains("sequence public.spare: is no column's default; left out"),
        "{plan}"
    );
    assert!(!plan.contains("ALTER SEQUENCE public.spare"), "{plan}");
    assert_eq!(state(&admin).await, before, "a plan changed the database");

    let done = node.ok(&["sequences", "apply"]);
    assert!(
        done.contains("done: interleave public.\"B b_id_seq\" by 16"),
        "{done}"
    );
    assert!(done.contains("b (id 2) has not taken its share yet"), "{done}");
    let after = state(&admin).await;
    assert!(
        node.ok(&["sequences", "apply"])
            .contains("nothing to do: 3 sequence(s)")
    );
    assert!(node.ok(&["sequences", "plan"]).contains("-- nothing to do"));
    assert_eq!(state(&admin).await, after, "a second apply changed the database");

    // Above the sequence, above the columns of all tables that use it, and its own by the remainder.
    for (sequence, first) in [
        ("a_id_seq", 33),
        ("\"B b_id_seq\"", 1),
        ("shared", 2001),
        ("spare", 1),
    ] {
        assert_eq!(next(&admin, sequence).await, first, "{sequence}");
    }
    assert_eq!(next(&admin, "a_id_seq").await, 49);
    assert_eq!(next(&admin, "spare").await, 2);
    admin.batch_execute("TRUNCATE a RESTART IDENTITY").await.unwrap();
    assert_eq!(next(&admin, "a_id_seq").await, 1);

    let done = node.ok(&["sequences", "apply", "--sequence", "public.spare"]);
    assert!(done.contains("interleave public.spare"), "{done}");
    assert_eq!(next(&admin, "spare").await, 17);
    // From then on without being named.
    assert!(node.ok(&["sequences", "plan"]).contains("public.spare: b (id 2)"));
}

#[tokio::test]
async fn status_says_what_is_not_safe_and_apply_lifts_what_is_behind() {
    let (node, admin) = with(SCHEMA).await;
    let report = status(&node, 1);
    assert_eq!(report["sequences"][0]["reasons"][0], "is INCREMENT BY 1, not 16");
    let warned = |node: &Node| {
        let findings = node.doctor();
        let about = findings
            .iter()
            .filter(|finding| finding["found"].as_str().unwrap().contains("takes values from"));
        about
            .map(|finding| format!("{} {}", finding["level"], finding["check"]))
            .collect::<Vec<_>>()
    };
    assert!(
        warned(&node).contains(&"\"warn\" \"table public.a\"".to_owned()),
        "{:?}",
        warned(&node)
    );
    node.ok(&["sequences", "apply"]);
    let report = status(&node, 1);
    let reason = report["sequences"][1]["reasons"][0].as_str().unwrap();
    assert!(
        reason.contains("b (id 2) has not taken its share yet"),
        "{reason}"
    );
    assert!(!warned(&node).is_empty());

    other_says(&admin, 16, None).await;
    assert_eq!(status(&node, 0)["safe"], true);
    assert_eq!(warned(&node), Vec::<String>::new());
    other_says(&admin, 16, Some(5000)).await;
    let text = node.refused(&["sequences", "status"], 1);
    assert!(text.contains("5000"), "{text}");
    assert!(
        node.ok(&["sequences", "plan"])
            .contains("-- lift public.a_id_seq")
    );
    node.ok(&["sequences", "apply"]);
    assert_eq!(next(&admin, "a_id_seq").await, 5009);
    status(&node, 0);
    // Put back by hand to a value that is another's.
    admin
        .batch_execute("SELECT setval('a_id_seq', 6000)")
        .await
        .unwrap();
    let text = node.refused(&["sequences", "status"], 1);
    assert!(text.contains("6016"), "{text}");
    node.ok(&["sequences", "apply"]);
    assert_eq!(next(&admin, "a_id_seq").await, 6001);
    other_says(&admin, 32, None).await;
    let report = status(&node, 1);
    let reason = report["sequences"][0]["reasons"][0].as_str().unwrap();
    assert!(reason.contains("divides it by 32"), "{reason}");
}

#[tokio::test]
async fn what_cannot_be_divided_is_refused_and_nothing_is_changed() {
    let (node, admin) = with(
        "CREATE TABLE cycling (id bigserial PRIMARY KEY);
         ALTER SEQUENCE cycling_id_seq CYCLE;
         CREATE TABLE small (id smallserial PRIMARY KEY);
         INSERT INTO small VALUES (32760);
         CREATE TABLE fine (id bigserial PRIMARY KEY)",
    )
    .await;
    let before = state(&admin).await;
    for verb in ["plan", "apply"] {
        let said = node.refused(&["sequences", verb, "--output", "json"], 1);
        assert!(
            said.contains("ALTER SEQUENCE public.cycling_id_seq NO CYCLE"),
            "{said}"
        );
        assert!(said.contains("this node's next value would be 32769"), "{said}");
        assert!(said.contains("ALTER COLUMN id TYPE bigint"), "{said}");
    }
    let said = node.refused(&["sequences", "apply", "--sequence", "public.none"], 1);
    assert!(said.contains("does not exist"), "{said}");
    // The daemon's role owns nothing.
    let output = node
        .command(&["sequences", "apply", "--output", "json"])
        .env_remove("ANABRANCH_ADMIN_DSN")
        .output()
        .unwrap();
    let said = crate::both(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("belongs to postgres") && said.contains("--admin-dsn"),
        "{said}"
    );
    node.configure("[sequences]\nincrement = 1");
    let said = node.refused(&["sequences", "plan"], 1);
    assert!(
        said.contains("sequences.increment") && said.contains("node 2"),
        "{said}"
    );
    node.configure("");
    assert_eq!(state(&admin).await, before, "something was changed");

    let skip = [
        "sequences",
        "apply",
        "--skip",
        "public.cycling_id_seq",
        "--skip",
        "public.small_id_seq",
    ];
    assert!(node.ok(&skip).contains("done: interleave public.fine_id_seq"));
    assert_eq!(next(&admin, "fine_id_seq").await, 1);
    assert_eq!(next(&admin, "fine_id_seq").await, 17);
    assert_eq!(next(&admin, "small_id_seq").await, 1);
}

#[tokio::test]
async fn values_in_open_transactions_are_waited_for_and_left_below() {
    let (node, admin) = with("CREATE TABLE a (id bigserial PRIMARY KEY)").await;
    admin
        .batch_execute("BEGIN; INSERT INTO a DEFAULT VALUES; INSERT INTO a DEFAULT VALUES")
        .await
        .unwrap();
    let mut apply = node
        .command(&["sequences", "apply"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let waits = "SELECT count(*)::text FROM pg_locks WHERE NOT granted AND relation = 'a_id_seq'::regclass";
    while value(&admin, waits).await == "0" {
        assert!(apply.try_wait().unwrap().is_none(), "it did not wait");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    admin
        .batch_execute("INSERT INTO a SELECT FROM generate_series(1, 30); COMMIT")
        .await
        .unwrap();
    let output = apply.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", crate::both(&output));
    assert_eq!(next(&admin, "a_id_seq").await, 33);
    assert_eq!(
        value(&admin, "SELECT base::text FROM anabranch.sequence").await,
        "32"
    );
}

const WIDE: &str = "
    CREATE TABLE a (id bigserial PRIMARY KEY, v text);
    CREATE TABLE b (id bigint GENERATED ALWAYS AS IDENTITY (START WITH 5) PRIMARY KEY, v text);
    CREATE TABLE c (id serial PRIMARY KEY);
    CREATE TABLE d (id bigint PRIMARY KEY);
    INSERT INTO a (v) SELECT 'x' FROM generate_series(1, 20);
    INSERT INTO b (v) SELECT 'x' FROM generate_series(1, 20)";
const RULES: &str = "[[sequences.rule]]\ncolumn = \"public.a.id\"\nmethod = \"snowflake\"\n\
    [[sequences.rule]]\ncolumn = \"public.b.id\"\nmethod = \"snowflake\"\n";
/// Below every snowflake id.
const LOWEST: i64 = (366 * 86_400_000) << 22;

#[tokio::test]
async fn columns_are_given_snowflake_ids_and_get_back_what_they_had() {
    let (node, admin) = with(WIDE).await;
    let defaults =
        "SELECT string_agg(concat_ws(' ', attrelid::regclass, attidentity, pg_get_expr(adbin, adrelid)), '; '
                                      ORDER BY attrelid::regclass::text)
         FROM pg_attribute LEFT JOIN pg_attrdef ON (adrelid, adnum) = (attrelid, attnum)
         WHERE attname = 'id' AND attrelid::regclass::text IN ('a', 'b', 'c', 'd')";
    let before = value(&admin, defaults).await;
    // Who may insert may do so afterwards, and nothing else.
    admin
        .batch_execute("CREATE ROLE clerk; GRANT INSERT, SELECT ON a, b, d TO clerk")
        .await
        .unwrap();
    node.configure(RULES);
    let plan = node.ok(&["sequences", "plan"]);
    assert!(
        plan.contains("ALTER TABLE public.a ALTER COLUMN id SET DEFAULT anabranch.snowflake();"),
        "{plan}"
    );
    assert!(
        plan.contains("ALTER TABLE public.b ALTER COLUMN id DROP IDENTITY;"),
        "{plan}"
    );
    assert!(plan.contains("-- interleave public.c_id_seq by 16"), "{plan}");
    assert!(!plan.contains("ALTER SEQUENCE public.a_id_seq"), "{plan}");
    assert_eq!(
        value(&admin, defaults).await,
        before,
        "a plan changed the database"
    );
    let done = node.ok(&["sequences", "apply"]);
    assert!(
        done.contains("done: give public.b.id snowflake ids (was an identity by public.b_id_seq)"),
        "{done}"
    );
    assert!(
        node.ok(&["sequences", "apply"])
            .contains("nothing to do: 3 sequence(s)")
    );
    admin
        .batch_execute(
            "ALTER TABLE d ALTER id SET DEFAULT anabranch.snowflake(); SET ROLE clerk;
             INSERT INTO a (v) VALUES ('by a clerk'); INSERT INTO b (v) VALUES ('by a clerk'); INSERT INTO d DEFAULT VALUES;
             RESET ROLE",
        )
        .await
        .unwrap();
    let bits = format!(
        "SELECT string_agg(((id >> 12) & 1023)::text, ' ')
         FROM (SELECT id FROM a UNION ALL SELECT id FROM b UNION ALL SELECT id FROM d) x WHERE id >= {LOWEST}"
    );
    assert_eq!(value(&admin, &bits).await, "1 1 1");
    // The other node has said nothing, and cannot collide with these; with the interleaved one it can.
    let report = status(&node, 1);
    let safe: Vec<(&str, bool)> = report["sequences"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|each| each["managed"] == true)
        .map(|each| (each["columns"][0].as_str().unwrap(), each["safe"] == true))
        .collect();
    assert_eq!(
        safe,
        [
            ("public.c.id", false),
            ("public.a.id", true),
            ("public.b.id", true),
            ("public.d.id", true)
        ]
    );

    let done = node.ok(&["remove", "--yes"]);
    assert!(
        done.contains("give public.a.id the ids of its sequence again")
            && done.contains("take the default anabranch.snowflake() from public.d.id"),
        "{done}"
    );
    assert_eq!(value(&admin, defaults).await, before);
    assert_eq!(next(&admin, "a_id_seq").await, 21);
    assert_eq!(next(&admin, "b_id_seq").await, 25);
}

#[tokio::test]
async fn what_cannot_have_snowflake_ids_is_refused_and_nothing_is_changed() {
    let (node, admin) = with(
        "CREATE TABLE narrow (id serial PRIMARY KEY); CREATE TABLE taken (id bigserial PRIMARY KEY);
         CREATE TABLE fine (id bigserial PRIMARY KEY)",
    )
    .await;
    admin
        .batch_execute(&format!("INSERT INTO taken VALUES ({LOWEST})"))
        .await
        .unwrap();
    let before = state(&admin).await;
    node.configure("[sequences]\nmethod = \"snowflake\"");
    for verb in ["plan", "apply"] {
        let said = node.refused(&["sequences", verb, "--output", "json"], 1);
        assert!(
            said.contains("ALTER TABLE public.narrow ALTER COLUMN id TYPE bigint"),
            "{said}"
        );
        assert!(
            said.contains("public.taken.id") && said.contains("has values up to"),
            "{said}"
        );
    }
    assert_eq!(state(&admin).await, before, "something was changed");
    node.configure(
        "[sequences]\nmethod = \"snowflake\"\n[[sequences.rule]]\ncolumn = \"public.taken.id\"\nmethod = \"interleave\"\n\
         [[sequences.rule]]\ncolumn = \"public.narrow.id\"\nmethod = \"interleave\"",
    );
    node.ok(&["sequences", "apply"]);
    let first = "INSERT INTO fine DEFAULT VALUES RETURNING id::text";
    assert!(value(&admin, first).await.parse::<i64>().unwrap() > LOWEST);
    // An id of this node that its sequence does not know: a server that went back.
    let ahead = (((1_i64 << 40) << 22) | (1 << 12)) + 7;
    admin
        .batch_execute(&format!("INSERT INTO fine VALUES ({ahead}), ({ahead} + 5000)"))
        .await
        .unwrap();
    let report = status(&node, 1).to_string();
    assert!(report.contains(&format!("still to hand out {ahead}")), "{report}");
    node.ok(&["sequences", "apply"]);
    assert_eq!(value(&admin, first).await, (ahead + 1).to_string());
    node.configure("[[sequences.rule]]\ncolumn = \"public.fine.id\"\nmethod = \"interleave\"");
    let said = node.refused(&["sequences", "plan"], 1);
    assert!(said.contains("is not taken back to its sequence"), "{said}");
    node.configure("[[sequences.rule]]\ncolumn = \"public.fine.id\"\nmethod = \"snowflakes\"");
    let said = node.refused(&["sequences", "plan"], 1);
    assert!(said.contains("is no method"), "{said}");
}

#[tokio::test]
async fn a_sequence_is_confined_to_its_range_and_ends_with_it() {
    let (node, admin) = with(
        "CREATE TABLE a (id bigserial PRIMARY KEY, v text);
         CREATE TABLE narrow (id serial PRIMARY KEY);
         INSERT INTO a (v) SELECT 'x' FROM generate_series(1, 20)",
    )
    .await;
    let range = "[sequences]\nmethod = \"range\"\nrange_size = 1000";
    node.configure("[sequences]\nmethod = \"range\"");
    let said = node.refused(&["sequences", "plan"], 1);
    assert!(
        said.contains(
            "this node's range would be 1099511627776 to 2199023255551, and at most 2147483647 fits"
        ),
        "{said}"
    );
    node.configure(range);
    let plan = node.ok(&["sequences", "plan"]);
    assert!(
        plan.contains("-- confine public.a_id_seq to 1000 to 1999"),
        "{plan}"
    );
    node.ok(&["sequences", "apply"]);
    assert!(
        node.ok(&["sequences", "apply"])
            .contains("nothing to do: 2 sequence(s)")
    );
    assert_eq!(next(&admin, "a_id_seq").await, 1000);
    let base = "SELECT concat_ws(' ', method, increment, base) FROM anabranch.sequence
                WHERE node_id = 1 AND sequence_name = 'a_id_seq'";
    assert_eq!(value(&admin, base).await, "range 1000 20");
    let report = status(&node, 1);
    assert_eq!(report["sequences"][0]["left"], 999);
    assert_eq!(report["sequences"][0]["method"], "range");
    let others = "INSERT INTO anabranch.sequence (schema_name, sequence_name, node_id, method, increment, base)
                  SELECT schema_name, sequence_name, 2, 'range', 1000, NULL FROM anabranch.sequence WHERE node_id = 1";
    admin.batch_execute(others).await.unwrap();
    status(&node, 0);

    // A row of its own that it does not know of, and one of the other's.
    admin
        .batch_execute("INSERT INTO a VALUES (1950, ''), (2500, '')")
        .await
        .unwrap();
    let text = node.refused(&["sequences", "status"], 1);
    assert!(text.contains("still to hand out 1950"), "{text}");
    node.ok(&["sequences", "apply"]);
    assert_eq!(next(&admin, "a_id_seq").await, 1951);
    let report = status(&node, 0);
    let warning = report["sequences"][0]["warnings"][0].as_str().unwrap();
    assert!(warning.contains("has only 48 values left"), "{warning}");
    admin
        .batch_execute("SELECT nextval('a_id_seq') FROM generate_series(1952, 1999)")
        .await
        .unwrap();
    let end = admin.batch_execute("SELECT nextval('a_id_seq')").await;
    let end = end.unwrap_err();
    assert_eq!(end.code().unwrap().code(), "2200H", "{end}");
    let text = node.refused(&["sequences", "status"], 1);
    assert!(text.contains("no value is left to this node"), "{text}");

    // By another method only when the other hands out of its range no more.
    node.configure("");
    let said = node.refused(&["sequences", "plan"], 1);
    assert!(
        said.contains("in the range of 1000 values that node 2 still hands out")
            && said.contains("give this node the method range, too"),
        "{said}"
    );
    admin
        .batch_execute("UPDATE anabranch.sequence SET method = 'interleave', increment = 16, base = 2500 WHERE node_id = 2")
        .await
        .unwrap();
    node.ok(&["sequences", "apply"]);
    assert_eq!(next(&admin, "a_id_seq").await, 2513);
    status(&node, 0);
    node.configure(range);
    let said = node.refused(&["sequences", "plan"], 1);
    assert!(
        said.contains("values up to 2513 were handed out by another rule"),
        "{said}"
    );
}

#[tokio::test]
async fn a_row_with_the_last_value_of_a_range_ends_it_and_keeps_no_other_sequence_back() {
    let (node, admin) =
        with("CREATE TABLE a (id bigserial PRIMARY KEY); CREATE TABLE b (id bigserial PRIMARY KEY)").await;
    node.configure("[sequences]\nmethod = \"range\"\nrange_size = 1000");
    node.ok(&["sequences", "apply"]);
    admin
        .batch_execute("INSERT INTO a VALUES (1999); INSERT INTO b VALUES (1950)")
        .await
        .unwrap();
    let done = node.ok(&["sequences", "apply"]);
    assert!(
        done.contains("this node's range is used up: 1999, its last value, is in public.a.id already"),
        "{done}"
    );
    assert_eq!(next(&admin, "b_id_seq").await, 1951);
    let end = admin
        .batch_execute("SELECT nextval('a_id_seq')")
        .await
        .unwrap_err();
    assert_eq!(end.code().unwrap().code(), "2200H", "{end}");
    let report = status(&node, 1);
    assert_eq!(report["sequences"][0]["left"], 0, "{report}");
    let reasons = report["sequences"][0]["reasons"].to_string();
    assert!(reasons.contains("no value is left to this node"), "{reasons}");
    let done = node.ok(&["sequences", "apply"]);
    assert!(done.contains("is used up") && !done.contains("done: "), "{done}");
}
