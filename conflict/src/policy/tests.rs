use anabranch_proto::schema::{ColumnDesc, TableDesc};

use super::*;
use crate::merge;

fn members() -> BTreeMap<String, NodeId> {
    [("berlin".to_owned(), NodeId(1)), ("oslo".to_owned(), NodeId(2))].into()
}

fn parse(text: &str) -> Result<Policies, String> {
    let read = |name: &str| match name {
        "late.rhai" => Ok(LATE.to_owned()),
        "early.rhai" => Ok(LATE.replace("versions.len() - 1", "0")),
        "wrong.rhai" => Ok("fn resolve(versions) {\n let = 1 }".to_owned()),
        _ => Err("no such file".to_owned()),
    };
    Policies::parse(text, &members(), read).map_err(|faults| faults.to_string())
}

const LATE: &str = "// late\nfn resolve(versions) {\n    versions.len() - 1\n}\n";

#[test]
fn a_scripts_text_is_part_of_what_decides() {
    let rule = |rest: &str| parse(&format!("[[table]]\nname = \"a.b\"\npolicy = \"script\"\n{rest}"));
    let (late, early) = (
        rule("script = \"late.rhai\"").unwrap(),
        rule("script = \"early.rhai\"").unwrap(),
    );
    assert_eq!(late.of("a", "b").name(), Name::Script);
    assert!(!late.of("a", "b").is_last_writer() && late.of("a", "c").is_last_writer());
    assert!(
        late.of("a", "b").to_string().starts_with("script late.rhai ("),
        "{}",
        late.of("a", "b")
    );
    let canonical = late.canonical();
    let end = ":\n    // late\n    fn resolve(versions) {\n        versions.len() - 1\n    }\n    \n";
    assert!(canonical.ends_with(end), "{canonical}");
    assert_ne!(late.hash(), early.hash());
    assert_eq!(
        late.hash(),
        rule("script = \"late.rhai\"\ndeletes = \"by_stamp\"")
            .unwrap()
            .hash()
    );
    // One file for two tables: its text is there once.
    let twice = parse(
        "[[table]]\nname = \"a.b\"\npolicy = \"script\"\nscript = \"late.rhai\"\n\
         [[table]]\nname = \"a.c\"\npolicy = \"script\"\nscript = \"late.rhai\"",
    );
    assert_eq!(twice.unwrap().canonical().matches("// late").count(), 1);
    for (rest, said) in [
        ("", "no script"),
        (
            "script = \"none.rhai\"",
            "`a.b`: cannot read the script none.rhai: no such file",
        ),
        (
            "script = \"wrong.rhai\"",
            "`a.b`: script wrong.rhai: line 2, column 6: ",
        ),
        (
            "script = \"late.rhai\"\ndeletes = \"delete_wins\"",
            "decides alone",
        ),
        (
            "script = \"late.rhai\"\n[table.columns]\nn = \"delta\"",
            "decides alone",
        ),
        ("script = \"late.rhai\"\npriority = [\"berlin\"]", "priority list"),
    ] {
        let refused = rule(rest).unwrap_err();
        assert!(refused.contains(said), "{rest}: {refused}");
    }
    let idle = parse("[[table]]\nname = \"a.b\"\nscript = \"late.rhai\"").unwrap_err();
    assert!(idle.contains("only policy = \"script\" calls"), "{idle}");
}

const THREE: &str = r#"
    [[table]]
    name = "public.order"
    policy = "origin_priority"
    priority = ["oslo", "berlin"]
    [[table]]
    name = "public.order_*"
    policy = "first_update_wins"
    deletes = "delete_wins"
    [[table]]
    name = "shop.*"
    deletes = "update_wins"
"#;

#[test]
fn the_first_rule_that_fits_is_the_tables() {
    let policies = parse(THREE).unwrap();
    let of = |schema, table| policies.of(schema, table).to_string();
    assert_eq!(of("public", "order"), "origin_priority 2 1");
    assert_eq!(of("public", "order_line"), "first_update_wins, delete_wins");
    assert_eq!(of("shop", "anything"), "last_update_wins, update_wins");
    assert_eq!(of("public", "customer"), "last_update_wins");
    assert!(policies.of("public", "customer").policy.is_last_writer());
    assert!(!policies.of("shop", "anything").policy.is_last_writer());
}

#[test]
fn what_becomes_of_rows_without_a_parent_is_the_tables_too() {
    let of = |rule: &str| parse(&format!("[[table]]\nname = \"a.b\"\nforeign_keys = \"{rule}\""));
    let words = |rule: &str| of(rule).unwrap().of("a", "b").to_string();
    assert_eq!(words("keep"), "last_update_wins");
    assert_eq!(words("delete_child"), "last_update_wins, delete_child");
    // As if it were not written: nodes with and without it agree.
    let without = parse("[[table]]\nname = \"a.b\"").unwrap();
    assert_eq!(of("keep").unwrap().hash(), without.hash());
    for rule in ["delete_child", "restore_parent"] {
        assert!(of(rule).unwrap().mends_orphans() && of(rule).unwrap().hash() != without.hash());
    }
    assert!(!without.mends_orphans());
    assert_eq!(words("restore_parent"), "last_update_wins, restore_parent");
    let error = of("cascade").unwrap_err();
    assert!(
        error.contains("cascade") && error.contains("`delete_child`, `restore_parent`"),
        "{error}"
    );
}

#[test]
fn that_merged_rows_may_wait_for_a_check_is_said_by_the_table_and_only_where_columns_have_rules() {
    let rule = |rest: &str| format!("[[table]]\nname = \"a.b\"\n{rest}");
    let summed = |checks: &str| parse(&rule(&format!("{checks}\ncolumns = {{ n = \"delta\" }}"))).unwrap();
    let (without, refused) = (summed(""), summed("check_constraints = \"refuse\""));
    let accepted = summed("check_constraints = \"quarantine\"");
    assert!(!without.of("a", "b").quarantines_checked());
    assert!(accepted.of("a", "b").quarantines_checked());
    assert!(!accepted.of("a", "c").quarantines_checked());
    // As if it were not written: nodes with and without it agree.
    assert_eq!(refused.hash(), without.hash());
    assert_ne!(accepted.hash(), without.hash());
    assert_eq!(
        accepted.of("a", "b").to_string(),
        "last_update_wins, n delta, checks quarantined"
    );
    for rest in [
        "check_constraints = \"quarantine\"",
        "policy = \"column_merge\"\ncheck_constraints = \"quarantine\"",
    ] {
        let faults = parse(&rule(rest)).unwrap_err();
        assert!(
            faults.contains("no column with a rule") && faults.contains("add [table.columns]"),
            "{faults}"
        );
    }
    assert!(parse(&rule("check_constraints = \"refuse\"")).is_ok());
    let faults = parse(&rule("check_constraints = \"keep\"")).unwrap_err();
    assert!(faults.contains("`refuse` or `quarantine`"), "{faults}");
}

#[test]
fn that_a_table_has_unique_keys_which_nodes_may_decide_otherwise_is_said_by_the_table() {
    let of = |rest: &str| {
        parse(&format!(
            "[[table]]\nname = \"a.b\"\npolicy = \"first_update_wins\"\n{rest}"
        ))
    };
    let (without, refused) = (of("").unwrap(), of("unique_keys = \"refuse\"").unwrap());
    let accepted = of("unique_keys = \"pairwise\"").unwrap();
    assert!(!without.of("a", "b").decides_pairwise());
    assert!(accepted.of("a", "b").decides_pairwise());
    assert!(!accepted.of("a", "c").decides_pairwise());
    // As if it were not written: nodes with and without it agree.
    assert_eq!(refused.hash(), without.hash());
    assert_ne!(accepted.hash(), without.hash());
    assert_eq!(
        accepted.of("a", "b").to_string(),
        "first_update_wins, unique keys pairwise"
    );
    // Also under last update wins there are keys whose values nobody can compare.
    assert!(parse("[[table]]\nname = \"a.b\"\nunique_keys = \"pairwise\"").is_ok());
    let faults = of("unique_keys = \"keep\"").unwrap_err();
    assert!(faults.contains("`refuse` or `pairwise`"), "{faults}");
}

#[test]
fn the_hash_is_of_what_decides_and_of_nothing_else() {
    let hash = |text: &str| parse(text).unwrap().hash();
    let reordered =
        "# a comment\n[[table]]\ndeletes = \"by_stamp\"\npolicy = \"first_update_wins\"\nname = \"a.b\"";
    assert_eq!(
        hash("[[table]]\nname = \"a.b\"\npolicy = \"first_update_wins\""),
        hash(reordered)
    );
    assert_eq!(hash(""), Policies::default().hash());
    let texts = [
        "",
        THREE,
        "[[table]]\nname = \"a.b\"\ndeletes = \"delete_wins\"",
        "[[table]]\nname = \"a.c\"\ndeletes = \"delete_wins\"",
        "[[table]]\nname = \"a.b\"\npolicy = \"origin_priority\"\npriority = [\"oslo\"]",
        "[[table]]\nname = \"a.b\"\npolicy = \"column_merge\"",
        "[[table]]\nname = \"a.b\"\nforeign_keys = \"delete_child\"",
        "[[table]]\nname = \"a.b\"\nforeign_keys = \"restore_parent\"",
        "[[table]]\nname = \"a.b\"\nexclusion_constraints = \"quarantine\"",
        "[[table]]\nname = \"a.b\"\nunique_keys = \"pairwise\"",
        "[[table]]\nname = \"a.b\"\ncolumns = { n = \"delta\" }",
        "[[table]]\nname = \"a.b\"\ncheck_constraints = \"quarantine\"\ncolumns = { n = \"delta\" }",
        "[[table]]\nname = \"a.b\"\ncolumns = { n = \"max\" }",
        "[[table]]\nname = \"a.b\"\ncolumns = { n = \"set_union\" }",
        "[[table]]\nname = \"a.b\"\ncolumns = { n = \"jsonb_merge\" }",
        "[[table]]\nname = \"a.b\"\ncolumns = { n = \"append\" }",
        "[[table]]\nname = \"a.b\"\npolicy = \"column_merge\"\ncolumns = { n = \"max\" }",
        "[[table]]\nname = \"a.b\"\npolicy = \"column_merge\"\ngroups = [[\"n\", \"max\"]]",
        "[[table]]\nname = \"a.b\"\npolicy = \"column_merge\"\ngroups = [[\"n\", \"max\"], [\"c\", \"d\"]]",
        "[[table]]\nname = \"a.b\"\npolicy = \"column_merge\"\ngroups = [[\"n\", \"max\", \"c\", \"d\"]]",
        "[[table]]\nname = \"a.b\"\npolicy = \"origin_priority\"\npriority = [\"berlin\"]",
    ];
    let distinct: std::collections::BTreeSet<_> = texts.iter().map(|text| hash(text)).collect();
    assert_eq!(distinct.len(), texts.len());
    let grouped = |groups: &str| {
        hash(&format!(
            "[[table]]\nname = \"a.b\"\npolicy = \"column_merge\"\ngroups = [{groups}]"
        ))
    };
    let overlapping = grouped("[\"c\", \"d\"], [\"x\", \"y\"], [\"a\", \"c\"]");
    assert_eq!(overlapping, grouped("[\"y\", \"x\"], [\"d\", \"a\", \"c\"]"));
    assert_eq!(
        grouped(""),
        hash("[[table]]\nname = \"a.b\"\npolicy = \"column_merge\"")
    );
}

#[test]
fn everything_that_is_wrong_is_said_with_its_remedy() {
    let refused = |text: &str, part: &str| {
        let faults = parse(text).unwrap_err();
        assert!(faults.contains(part), "{faults}");
    };
    refused(
        "[[table]]\nname = \"a.b\"\npolice = \"x\"",
        "line 3: unknown field `police`",
    );
    refused(
        "[[table]]\nname = \"a.b\"\npolicy = \"newest\"",
        "unknown variant `newest`",
    );
    refused("[[table]]\npolicy = \"last_update_wins\"", "missing field `name`");
    refused("[[table]]\nname = \"b\"", "`b` names no table");
    refused(
        "[[table]]\nname = \"a.b\"\npolicy = \"origin_priority\"",
        "add priority",
    );
    refused(
        "[[table]]\nname = \"a.b\"\npriority = [\"oslo\"]",
        "only policy = \"origin_priority\"",
    );
    let list =
        |list: &str| format!("[[table]]\nname = \"a.b\"\npolicy = \"origin_priority\"\npriority = [{list}]");
    refused(
        &list("\"rome\""),
        "no node is called `rome`; the members are berlin, oslo",
    );
    refused(&list("\"oslo\", \"oslo\""), "in the list twice");
    let groups = |rest: &str| format!("[[table]]\nname = \"a.b\"\n{rest}");
    refused(
        &groups("groups = [[\"x\", \"y\"]]"),
        "only policy = \"column_merge\" reads",
    );
    refused(
        &groups("policy = \"column_merge\"\ngroups = [[\"x\", \"x\"]]"),
        "[\"x\", \"x\"] has not",
    );
    refused(
        &groups("policy = \"column_merge\"\ngroups = [[]]"),
        "has two columns or more, and [] has not",
    );
    refused(
        &groups("policy = \"column_merge\"\ngroups = [[\"x\", \"y\"]]\ncolumns = { y = \"max\" }"),
        "column `y` is in a group",
    );
    for rest in [
        "policy = \"first_update_wins\"\ncolumns = { x = \"delta\" }",
        "policy = \"origin_priority\"\npriority = [\"oslo\"]\ncolumns = { x = \"max\" }",
        "policy = \"column_merge\"\ndeletes = \"delete_wins\"",
        "deletes = \"update_wins\"\ncolumns = { x = \"append\" }",
    ] {
        refused(&groups(rest), "`a.b` merges columns, which goes with");
    }
    let hidden = "[[table]]\nname = \"a.*\"\n[[table]]\nname = \"a.b*\"";
    refused(hidden, "`a.*` before it takes the same tables");
    refused(
        "[[table]]\nname = \"a.b\"\n[[table]]\nname = \"a.b\"",
        "never used",
    );
    refused("table = 3", "line 1");
}

#[test]
fn a_columns_rule_is_known_from_the_words_in_a_log_too() {
    let merged = "[[table]]\nname = \"a.b\"\npolicy = \"column_merge\"\ngroups = [[\"x\", \"y\"]]\n\
        check_constraints = \"quarantine\"\nunique_keys = \"pairwise\"\nforeign_keys = \"delete_child\"\n[table.columns]\n\
        n = \"delta\"\ngroups = \"max\"\n'we\"ird, n min' = \"append\"\n'a b' = \"set_union\"\ndoc = \"jsonb_merge\"\nlow = \"min\"";
    let policies = parse(merged).unwrap();
    let policy = policies.of("a", "b");
    let words = policy.to_string();
    for column in ["n", "groups", "we\"ird, n min", "a b", "doc", "low"] {
        let rule = TablePolicy::rule_in(&words, column);
        assert!(rule.is_some(), "{column} in {words}");
        assert_eq!(rule, policy.rule_of(column), "{column} in {words}");
    }
    for column in [
        "x",
        "y",
        "b",
        "checks",
        "unique",
        "delete_child",
        "column_merge",
        "ird",
        "o",
        "",
    ] {
        assert_eq!(TablePolicy::rule_in(&words, column), None, "{column} in {words}");
        assert_eq!(policy.rule_of(column), None);
    }
    for words in [
        "last_update_wins",
        "origin_priority 2 1, delete_wins",
        "script n delta.rhai (1f0a93b2)",
        "",
    ] {
        assert_eq!(TablePolicy::rule_in(words, "n"), None, "{words}");
    }
    assert_eq!(
        TablePolicy::rule_in("last_update_wins, n delta", "n"),
        Some(ColumnRule::Delta)
    );
}

fn table(columns: &[(&str, u32, i32, &str)]) -> TableDesc {
    let columns = columns
        .iter()
        .map(|&(name, type_oid, type_mod, type_name)| ColumnDesc {
            name: name.to_owned(),
            type_oid,
            type_mod,
            type_name: type_name.to_owned(),
        });
    TableDesc {
        schema: "public".to_owned(),
        name: "t".to_owned(),
        columns: columns.collect(),
        key: vec![0],
        identity_full: true,
    }
}

#[test]
fn columns_of_a_group_are_one_unit_and_each_other_is_its_own() {
    let columns = |rest: &str| {
        let policies = parse(&format!("[[table]]\nname = \"public.t\"\n{rest}")).unwrap();
        policies.of("public", "t").columns.clone().unwrap()
    };
    let table =
        table(&["id", "low", "street", "note", "high", "zip", "n"].map(|name| (name, 23, -1, "integer")));
    let units = |columns: &Columns| -> Vec<Option<u16>> {
        let unit = |rule: &merge::Rule| match rule {
            merge::Rule::Unit(unit) => Some(*unit),
            _ => None,
        };
        columns.of(&table).iter().map(unit).collect()
    };
    let merged = columns(
        "policy = \"column_merge\"\ngroups = [[\"zip\", \"street\"], [\"high\", \"low\"]]\ncolumns = { n = \"delta\" }",
    );
    let wanted = [0, 1, 2, 3, 1, 2].map(Some);
    assert_eq!(units(&merged), [&wanted[..], &[None]].concat());
    assert!(merged.misfits(&table).is_empty());
    assert!(merged.keeps_together(&["low", "high"]) && merged.keeps_together(&["note"]));
    assert!(merged.keeps_together(&["n"]) && merged.keeps_together(&[]));
    assert!(!merged.keeps_together(&["low", "zip"]) && !merged.keeps_together(&["note", "low"]));
    assert!(!merged.keeps_together(&["n", "low"]) && !merged.keeps_together(&["low", "n"]));
    let whole = columns("columns = { n = \"delta\" }");
    assert_eq!(units(&whole), [&[Some(0); 6][..], &[None]].concat());
    assert!(whole.keeps_together(&["low", "note"]) && !whole.keeps_together(&["low", "n"]));
    let wrong = columns("policy = \"column_merge\"\ngroups = [[\"low\", \"id\", \"hihg\"]]");
    let said: Vec<String> = wrong.misfits(&table).iter().map(ToString::to_string).collect();
    assert_eq!(
        said,
        [
            "has no column `hihg`",
            "column `id` is part of the primary key, which is not merged"
        ]
    );
}

#[test]
fn columns_of_other_types_are_refused_with_those_that_fit() {
    let table = table(&[
        ("id", 23, -1, "integer"),
        ("tags", 1009, -1, "text[]"),
        ("sizes", 1231, -1, "numeric[]"),
        ("doc", 3802, -1, "jsonb"),
        ("raw", 114, -1, "json"),
        ("note", 1043, 14, "character varying(10)"),
    ]);
    let said = |column: &str, rule: &str| {
        let text = format!("[[table]]\nname = \"public.t\"\ncolumns = {{ {column} = \"{rule}\" }}");
        let policies = parse(&text).unwrap();
        let misfits = policies
            .of("public", "t")
            .columns
            .clone()
            .unwrap()
            .misfits(&table);
        misfits.iter().map(ToString::to_string).collect::<String>()
    };
    for (column, rule) in [
        ("tags", "set_union"),
        ("tags", "append"),
        ("sizes", "append"),
        ("doc", "jsonb_merge"),
        ("doc", "append"),
    ] {
        assert_eq!(said(column, rule), "", "{column} {rule}");
    }
    assert!(
        said("sizes", "set_union")
            .starts_with("column `sizes` is of type numeric[], and set_union is for arrays of")
    );
    assert_eq!(
        said("raw", "jsonb_merge"),
        "column `raw` is of type json, and jsonb_merge is for jsonb"
    );
    assert_eq!(
        said("note", "append"),
        "column `note` is of type character varying(10), and append is for text, varchar without a length, arrays and jsonb"
    );
    assert!(said("id", "append").contains("part of the primary key"));
    assert!(said("tags", "delta").contains("delta is for smallint"));
}
