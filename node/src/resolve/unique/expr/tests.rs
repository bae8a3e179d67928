use super::*;

fn columns() -> Vec<Column> {
    [
        ("email", Class::Text),
        ("Odd \"name", Class::Text),
        ("code", Class::Padded),
        ("ci", Class::Citext),
        ("state", Class::Enum),
        ("deleted", Class::Bool),
        ("kind", Class::Int),
        ("tenant", Class::Uuid),
        ("gone_at", Class::Other),
    ]
    .map(|(name, class)| Column {
        name: name.to_owned(),
        class,
    })
    .to_vec()
}

fn part(text: &str) -> Option<Term> {
    Reader::new(&columns()).part(text)
}

fn predicate(text: &str) -> Option<Cond> {
    Reader::new(&columns()).predicate(text)
}

#[test]
fn parts_of_keys_are_understood() {
    let email = || Box::new(Term::Column(0, Class::Text));
    assert_eq!(part("lower(email)"), Some(Term::Fold(email())));
    assert_eq!(part("lower((email)::text)"), Some(Term::Fold(email())));
    assert_eq!(
        part("upper(TRIM(BOTH FROM email))"),
        Some(Term::Fold(Box::new(Term::Trim(Side::Both, email()))))
    );
    assert_eq!(
        part("COALESCE(email, ''::text)"),
        Some(Term::Coalesce(vec![*email(), Term::Constant(Vec::new())]))
    );
    assert_eq!(
        part("COALESCE(kind, '-1'::integer)"),
        Some(Term::Coalesce(vec![
            Term::Column(0, Class::Int),
            Term::Constant(super::super::int(-1))
        ]))
    );
    assert_eq!(
        part("ci"),
        Some(Term::Fold(Box::new(Term::Column(0, Class::Citext))))
    );
    let mut odd = Reader::new(&[]);
    assert!(odd.part("email").is_none());
    let table = columns();
    let mut odd = Reader::new(&table);
    assert!(odd.part("lower(\"Odd \"\"name\")").is_some());
    assert_eq!(odd.used, ["Odd \"name"]);
}

#[test]
fn predicates_are_understood() {
    for text in [
        "(gone_at IS NULL)",
        "((gone_at IS NULL) AND (email IS NOT NULL))",
        "deleted",
        "(NOT deleted)",
        "(deleted = false)",
        "(deleted IS NOT TRUE)",
        "(kind > 0)",
        "(kind = '-1'::integer)",
        "(kind <> ALL (ARRAY[1, 2, '-3'::integer]))",
        "(kind <> ALL (ARRAY[(1)::bigint, ('-2'::integer)::bigint]))",
        "((code)::text = 'ab'::text)",
        "(code = 'ab'::bpchar)",
        "((email)::text = ANY ((ARRAY['a'::character varying, 'b'::character varying])::text[]))",
        "(state = 'open'::public.order_state)",
        "(state = ANY (ARRAY['open'::order_state, 'held'::order_state]))",
        "((gone_at IS NULL) OR ((kind = 1) AND (NOT (deleted AND (kind <= 5)))))",
        "(tenant = 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid)",
        "((deleted OR (kind = 1)) IS TRUE)",
    ] {
        assert!(predicate(text).is_some(), "{text}");
    }
    assert_eq!(
        predicate("((kind = 1) OR deleted)"),
        Some(Cond::Any(vec![
            Cond::Compare(Term::Column(0, Class::Int), Compare::Equal, super::super::int(1)),
            Cond::Value(Term::Column(1, Class::Bool)),
        ]))
    );
}

#[test]
fn what_is_not_surely_understood_is_nothing() {
    for text in [
        "",
        "md5(email)",
        "lower(ci)",
        "lower(email, email)",
        "lower(email) || 'x'::text",
        "((email || 'x'::text))",
        "(email)::character varying(3)",
        "lower(email) COLLATE \"tr-x-icu\"",
        "gone_at",
        "COALESCE(gone_at, 'infinity'::timestamp with time zone)",
        "COALESCE(email, NULL::text)",
        "(kind + 1)",
        "nobody",
        "lower(email",
        "E'a'",
    ] {
        assert_eq!(part(text), None, "{text}");
    }
    for text in [
        "(email > 'a'::text)",
        "(ci = 'a'::citext)",
        "(gone_at > '2020-01-01'::date)",
        "((kind % 2) = 0)",
        "(lower(email) ~ 'x'::text)",
        "(lower(email) = 'x'::text)",
        "(kind = email)",
        "(kind = ANY (ARRAY[1, NULL::integer]))",
        "(kind < ANY (ARRAY[1, 2]))",
        "(kind = 99999999999999999999)",
        "(deleted AND kind = 1 OR deleted)",
        "(email = 'a'::text COLLATE \"C\")",
    ] {
        assert_eq!(predicate(text), None, "{text}");
    }
}
