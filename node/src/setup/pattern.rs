//! Which tables are replicated: the patterns of `postgres.tables`.
//!
//! `schema.table`, with `*` for any run of characters in either part; `!` in front excludes; a part may be in double quotes, as a schema with a dot must. A name that no pattern
//! includes is not replicated; an exclusion wins over every inclusion.

use anabranch_proto::schema::{full_name, name_fits, split_name};

/// A pattern that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` does not name tables; write `schema.table`, `schema.*` or `!schema.table` to exclude")]
pub struct BadPattern(pub String);

/// One pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    /// Part before the dot.
    pub schema: String,
    /// Part after it.
    pub table: String,
    /// Does it exclude?
    pub exclude: bool,
}

impl Pattern {
    /// Reads one pattern.
    ///
    /// # Errors
    /// When there is no dot, or a part is empty.
    pub fn parse(text: &str) -> Result<Self, BadPattern> {
        let (exclude, rest) = text.strip_prefix('!').map_or((false, text), |rest| (true, rest));
        match split_name(rest) {
            (Some(schema), table) if !schema.is_empty() && !table.is_empty() => Ok(Self {
                schema,
                table,
                exclude,
            }),
            _ => Err(BadPattern(text.to_owned())),
        }
    }

    /// Does the pattern name one table rather than many?
    #[must_use]
    pub fn is_exact(&self) -> bool {
        !self.schema.contains('*') && !self.table.contains('*')
    }

    /// Does it speak of `schema.table`?
    #[must_use]
    pub fn covers(&self, schema: &str, table: &str) -> bool {
        name_fits(&self.schema, schema) && name_fits(&self.table, table)
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let not = if self.exclude { "!" } else { "" };
        write!(out, "{not}{}", full_name(&self.schema, &self.table))
    }
}

/// How a name fares under all patterns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// No pattern includes it, or one excludes it.
    Out,
    /// A pattern with `*` includes it.
    ByWildcard,
    /// A pattern names it.
    ByName,
}

/// All patterns of a configuration.
#[derive(Debug, Clone, Default)]
pub struct Patterns(Vec<Pattern>);

impl Patterns {
    /// Reads all patterns.
    ///
    /// # Errors
    /// The first that cannot be read.
    pub fn parse(texts: &[String]) -> Result<Self, BadPattern> {
        texts
            .iter()
            .map(|text| Pattern::parse(text))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Is `schema.table` replicated, and why?
    #[must_use]
    pub fn choose(&self, schema: &str, table: &str) -> Choice {
        let mut choice = Choice::Out;
        for pattern in self.0.iter().filter(|pattern| pattern.covers(schema, table)) {
            match (pattern.exclude, pattern.is_exact()) {
                (true, _) => return Choice::Out,
                (false, true) => choice = Choice::ByName,
                (false, false) if choice == Choice::Out => choice = Choice::ByWildcard,
                (false, false) => {}
            }
        }
        choice
    }

    /// Does a pattern exclude `schema.table`?
    #[must_use]
    pub fn excludes(&self, schema: &str, table: &str) -> bool {
        self.0
            .iter()
            .any(|pattern| pattern.exclude && pattern.covers(schema, table))
    }

    /// The pattern that decides of `schema.table`: one that excludes it, else one that names it, else one that includes it.
    #[must_use]
    pub fn deciding(&self, schema: &str, table: &str) -> Option<&Pattern> {
        let covering = self.0.iter().filter(|pattern| pattern.covers(schema, table));
        covering.min_by_key(|pattern| (!pattern.exclude, !pattern.is_exact()))
    }

    /// The patterns themselves.
    pub fn iter(&self) -> impl Iterator<Item = &Pattern> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exclusion_wins_and_a_name_beats_a_wildcard() {
        let texts = ["public.*", "app_*.orders", "public.audit", "!public.tmp_*"].map(str::to_owned);
        let patterns = Patterns::parse(&texts).unwrap();
        assert_eq!(patterns.choose("public", "a"), Choice::ByWildcard);
        assert_eq!(patterns.choose("public", "audit"), Choice::ByName);
        assert_eq!(patterns.choose("public", "tmp_x"), Choice::Out);
        assert_eq!(patterns.choose("app_eu", "orders"), Choice::ByWildcard);
        assert_eq!(patterns.choose("app_eu", "orders2"), Choice::Out);
        assert_eq!(patterns.choose("other", "a"), Choice::Out);
    }

    #[test]
    fn the_pattern_that_decides_is_named() {
        let texts = ["public.*", "public.audit", "!public.tmp_*", "public.tmp_x"].map(str::to_owned);
        let patterns = Patterns::parse(&texts).unwrap();
        let deciding = |table| patterns.deciding("public", table).map(Pattern::to_string);
        assert_eq!(deciding("a").as_deref(), Some("public.*"));
        assert_eq!(deciding("audit").as_deref(), Some("public.audit"));
        assert_eq!(deciding("tmp_x").as_deref(), Some("!public.tmp_*"));
        assert_eq!(patterns.deciding("other", "a"), None);
    }

    #[test]
    fn a_schema_with_a_dot_is_named_in_quotes() {
        let texts = ["\"my.schema\".*", "!\"my.schema\".\"log\""].map(str::to_owned);
        let patterns = Patterns::parse(&texts).unwrap();
        assert_eq!(patterns.choose("my.schema", "t"), Choice::ByWildcard);
        assert_eq!(patterns.choose("my.schema", "log"), Choice::Out);
        assert_eq!(patterns.choose("my", "schema.t"), Choice::Out);
        let shown: Vec<String> = patterns.iter().map(Pattern::to_string).collect();
        assert_eq!(shown, ["\"my.schema\".*", "!\"my.schema\".log"]);
    }

    #[test]
    fn a_pattern_without_a_schema_is_refused() {
        for text in ["orders", ".x", "x.", "!", "*", "\"a.b\"", "\"\".x"] {
            assert!(Pattern::parse(text).is_err(), "{text}");
        }
    }
}
