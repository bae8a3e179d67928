//! Quoting for SQL that is printed as well as run, so it cannot use parameters.

/// A quoted identifier; names that need no quotes keep none, so that printed SQL reads well.
#[must_use]
pub fn ident(name: &str) -> String {
    let plain = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        && !KEYWORDS.split_whitespace().any(|word| word == name);
    if plain {
        name.to_owned()
    } else {
        format!("\"{}\"", name.replace('"', "\"\""))
    }
}

/// `schema.name`, both quoted.
#[must_use]
pub fn qualified(schema: &str, name: &str) -> String {
    format!("{}.{}", ident(schema), ident(name))
}

/// A string literal that reads the same under every `standard_conforming_strings`.
#[must_use]
pub fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') {
        format!("E'{}'", quoted.replace('\\', "\\\\"))
    } else {
        format!("'{quoted}'")
    }
}

/// Dollar quotes for SQL with these texts in it: `$f$`, or one with a number where one of them has the like.
#[must_use]
pub fn dollar_quote(inside: &[&str]) -> String {
    let mut begin = "$f".to_owned();
    let mut number = 0_u32;
    while inside.iter().any(|text| text.contains(&begin)) {
        number += 1;
        begin = format!("$f{number}");
    }
    begin + "$"
}

/// `template` with texts in its places, and `$f$` in it as [`dollar_quote`] has it. What stands in a text is no place.
#[must_use]
pub fn fill(template: &str, places: &[(&str, &str)]) -> String {
    let texts: Vec<&str> = places.iter().map(|(_, text)| *text).collect();
    let template = template.replace("$f$", &dollar_quote(&texts));
    let (mut filled, mut rest) = (String::new(), template.as_str());
    while let Some(((before, behind), text)) = places
        .iter()
        .filter_map(|(place, text)| Some((rest.split_once(place)?, *text)))
        .min_by_key(|((before, _), _)| before.len())
    {
        filled.push_str(before);
        filled.push_str(text);
        rest = behind;
    }
    filled + rest
}

/// Reserved words of PostgreSQL 15 to 18: those that cannot name a table, column or role unquoted.
const KEYWORDS: &str = " \
    all analyse analyze and any array as asc asymmetric authorization between bigint binary bit boolean \
    both case cast char character check coalesce collate collation column concurrently constraint create \
    cross current_catalog current_date current_role current_schema current_time current_timestamp \
    current_user dec decimal default deferrable desc distinct do else end except exists extract false \
    fetch float for foreign freeze from full grant greatest group grouping having ilike in initially \
    inner inout int integer intersect interval into is isnull join lateral leading least left like limit \
    localtime localtimestamp merge_action national natural nchar none normalize not notnull null nullif \
    numeric offset on only or order out outer overlaps overlay placing position precision primary real \
    references returning right row select session_user setof similar smallint some substring symmetric \
    system_user table tablesample then time timestamp to trailing treat trim true union unique user \
    using values varchar variadic verbose when where window with xmlattributes xmlconcat xmlelement \
    xmlexists xmlforest xmlnamespaces xmlparse xmlpi xmlroot xmlserialize xmltable \
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_when_they_must_be() {
        assert_eq!(ident("orders_2"), "orders_2");
        assert_eq!(ident("Orders"), "\"Orders\"");
        assert_eq!(ident("user"), "\"user\"");
        assert_eq!(ident("2x"), "\"2x\"");
        assert_eq!(ident("a\"b"), "\"a\"\"b\"");
        assert_eq!(qualified("public", "order"), "public.\"order\"");
    }

    #[test]
    fn literals_cannot_be_left() {
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal(r"a\'b"), r"E'a\\''b'");
    }

    #[test]
    fn dollar_quotes_end_where_they_are_to() {
        assert_eq!(dollar_quote(&[]), "$f$");
        assert_eq!(dollar_quote(&["a$", "$b$"]), "$f$");
        assert_eq!(dollar_quote(&["a", "it$f$"]), "$f1$");
        assert_eq!(dollar_quote(&["$f1$", "$f"]), "$f2$");
        let places = [("@A@", "'@B@ $f$'"), ("@B@", "b")];
        assert_eq!(
            fill("AS $f$ @B@ @A@ @B@ $f$;", &places),
            "AS $f1$ b '@B@ $f$' b $f1$;"
        );
        assert_eq!(fill("AS $f$ a $f$;", &[]), "AS $f$ a $f$;");
    }
}
