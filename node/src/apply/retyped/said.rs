//! Which types the text of DDL gives to a column; and what it makes only if it is not there.
//!
//! In:   a text that was run as DDL      Out: what it says of one column, in its order; what stands behind `IF NOT EXISTS`
//! Must never: take one thing for another; a text that is not understood to its end says nothing at all
//! Not here: which texts there are, and what follows from them ([`super`])

use std::borrow::Cow;

/// A type that a statement gave to a column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    /// As it is written there.
    pub(super) to: String,
    /// The statement has an expression for what becomes of values, of this column or another one.
    pub(super) has_using: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token<'t> {
    /// As it stands for a name, or a keyword: in lower case.
    Word(Cow<'t, str>),
    /// In quotes.
    Name(String),
    Sign(char),
    /// A string or a number.
    Other,
}

/// A token, and where it stands.
struct Placed<'t> {
    token: Token<'t>,
    from: usize,
    to: usize,
}

/// The types that `text` gives to `column` of tables of which `is_meant` says yes to their schema, if it is said, and name; `None` where the text
/// cannot be read.
pub(super) fn changes(
    text: &str,
    column: &str,
    is_meant: impl Fn(Option<&str>, &str) -> bool,
) -> Option<Vec<Change>> {
    let all = tokens(text)?;
    let statements = all.split(|placed| placed.token == Token::Sign(';'));
    let mut out = Vec::new();
    for statement in statements {
        let mut from = Statement {
            text,
            tokens: statement,
            at: 0,
        };
        out.extend(from.changes(column, &is_meant));
    }
    Some(out)
}

/// A relation, or a column of one, that a statement makes if it is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::apply) struct Wanted {
    schema: Option<String>,
    relation: String,
    column: Option<String>,
    /// All of its statement, written in one way.
    pub(in crate::apply) statement: String,
}

impl Wanted {
    /// Is it this one? `named`: schema and relation, of a column that as well.
    pub(in crate::apply) fn is(&self, named: &[String]) -> bool {
        let (schema, relation, column) = match named {
            [schema, relation] => (schema, relation, None),
            [schema, relation, column] => (schema, relation, Some(column)),
            _ => return false,
        };
        *relation == self.relation
            && column == self.column.as_ref()
            && self.schema.as_ref().is_none_or(|said| said == schema)
    }
}

/// What `text` makes only if it is not there; nothing where the text cannot be read.
pub(in crate::apply) fn unless_there(text: &str) -> Vec<Wanted> {
    let all = tokens(text).unwrap_or_default();
    let statements = all.split(|placed| placed.token == Token::Sign(';'));
    let of_one = |tokens| Statement { text, tokens, at: 0 }.unless_there();
    statements.flat_map(of_one).collect()
}

/// Names that `text` gives to tables, each with its schema where that is said; nothing where the text cannot be read.
pub(in crate::apply) fn names_given(text: &str) -> Vec<(Option<String>, String)> {
    let all = tokens(text).unwrap_or_default();
    let statements = all.split(|placed| placed.token == Token::Sign(';'));
    let of_one = |tokens| Statement { text, tokens, at: 0 }.name_given();
    statements.filter_map(of_one).collect()
}

/// The statements of a text, as in [`Wanted::statement`]; none where it cannot be read.
pub(in crate::apply) fn statements(text: &str) -> Vec<String> {
    let all = tokens(text).unwrap_or_default();
    let statements = all.split(|placed| placed.token == Token::Sign(';'));
    statements
        .map(|tokens| Statement { text, tokens, at: 0 }.whole())
        .collect()
}

/// What stands between the parentheses of a type, without blanks.
pub(super) fn lengths(type_name: &str) -> String {
    let inner = type_name
        .split_once('(')
        .and_then(|(_, rest)| rest.split_once(')'));
    let inner = inner.map_or("", |(inner, _)| inner);
    inner.chars().filter(|c| !c.is_whitespace()).collect()
}

struct Statement<'t> {
    text: &'t str,
    tokens: &'t [Placed<'t>],
    at: usize,
}

impl Statement<'_> {
    /// `ALTER TABLE name`: the schema, if it is said, and the name.
    fn altered(&mut self) -> Option<(Option<String>, String)> {
        (self.take("alter") && self.take("table")).then_some(())?;
        if self.is_word(0, "if") && self.is_word(1, "exists") {
            self.at += 2;
        }
        self.take("only");
        let named = self.qualified()?;
        self.take_sign('*');
        Some(named)
    }

    fn qualified(&mut self) -> Option<(Option<String>, String)> {
        let mut name = self.name()?;
        let mut schema = None;
        while self.take_sign('.') {
            let next = self.name()?;
            schema = Some(std::mem::replace(&mut name, next));
        }
        Some((schema, name))
    }

    fn unless_there(&mut self) -> Vec<Wanted> {
        let mut out = Vec::new();
        let statement = self.whole();
        if let Some((schema, relation)) = self.altered() {
            while self.at < self.tokens.len() {
                if self.take("add") {
                    self.take("column");
                    let column = if self.take_if_not_exists() {
                        self.name()
                    } else {
                        None
                    };
                    out.extend(column.map(|column| Wanted {
                        schema: schema.clone(),
                        relation: relation.clone(),
                        column: Some(column),
                        statement: statement.clone(),
                    }));
                }
                // To the next action.
                self.skip(|_| false);
                self.at += 1;
            }
            return out;
        }
        self.at = 0;
        if !self.take("create") {
            return out;
        }
        let mut is_relation = false;
        while let Some(placed) = self.tokens.get(self.at) {
            if self.take_if_not_exists() {
                let named = self.qualified().filter(|_| is_relation);
                out.extend(named.map(|(schema, relation)| Wanted {
                    schema,
                    relation,
                    column: None,
                    statement,
                }));
                return out;
            }
            if !matches!(placed.token, Token::Word(_)) {
                return out;
            }
            let mut kinds = ["table", "index", "sequence", "view"].into_iter();
            is_relation |= kinds.any(|kind| is_word(placed, kind));
            self.at += 1;
        }
        out
    }

    /// Of `CREATE TABLE`, and of `ALTER TABLE .. RENAME TO` and `.. SET SCHEMA`.
    fn name_given(&mut self) -> Option<(Option<String>, String)> {
        if self.take("create") {
            self.take("unlogged");
            (self.take("table") && !self.take_if_not_exists()).then_some(())?;
            return self.qualified();
        }
        let (schema, name) = self.altered()?;
        if self.take("rename") {
            self.take("to").then_some(())?;
            return Some((schema, self.name()?));
        }
        (self.take("set") && self.take("schema")).then_some(())?;
        Some((Some(self.name()?), name))
    }

    /// Its tokens, with a blank between.
    fn whole(&self) -> String {
        let of_one = |placed: &Placed<'_>| match &placed.token {
            Token::Word(word) => word.clone().into_owned(),
            _ => self
                .text
                .get(placed.from..placed.to)
                .unwrap_or_default()
                .to_owned(),
        };
        self.tokens.iter().map(of_one).collect::<Vec<_>>().join(" ")
    }

    fn changes(&mut self, column: &str, is_meant: &impl Fn(Option<&str>, &str) -> bool) -> Vec<Change> {
        let mut out = Vec::new();
        let Some((schema, name)) = self.altered() else {
            return out;
        };
        if !is_meant(schema.as_deref(), &name) {
            return out;
        }
        let has_using = self.tokens.iter().any(|placed| is_word(placed, "using"));
        while self.at < self.tokens.len() {
            if let Some(to) = self.new_type(column) {
                out.push(Change { to, has_using });
            }
            // To the next action.
            self.skip(|_| false);
            self.at += 1;
        }
        out
    }

    /// `ALTER [COLUMN] name [SET DATA] TYPE type ..`
    fn new_type(&mut self, column: &str) -> Option<String> {
        self.take("alter").then_some(())?;
        self.take("column");
        let name = self.name()?;
        if self.take("set") {
            self.take("data").then_some(())?;
        }
        self.take("type").then_some(())?;
        let from = self.tokens.get(self.at)?.from;
        self.skip(|placed| is_word(placed, "collate") || is_word(placed, "using"));
        let to = self.tokens.get(self.at.checked_sub(1)?)?.to;
        (name == column).then_some(())?;
        self.text.get(from..to).map(str::to_owned)
    }

    /// Goes to the end of an action, or to what ends it, outside of all parentheses.
    fn skip(&mut self, is_end: impl Fn(&Placed<'_>) -> bool) {
        let mut depth = 0usize;
        while let Some(placed) = self.tokens.get(self.at) {
            match placed.token {
                Token::Sign('(' | '[') => depth += 1,
                Token::Sign(')' | ']') => depth = depth.saturating_sub(1),
                Token::Sign(',') if depth == 0 => return,
                _ if depth == 0 && is_end(placed) => return,
                _ => {}
            }
            self.at += 1;
        }
    }

    fn is_word(&self, ahead: usize, word: &str) -> bool {
        self.tokens
            .get(self.at + ahead)
            .is_some_and(|placed| is_word(placed, word))
    }

    fn take(&mut self, word: &str) -> bool {
        let is_next = self.is_word(0, word);
        self.at += usize::from(is_next);
        is_next
    }

    fn take_if_not_exists(&mut self) -> bool {
        let is_next = self.is_word(0, "if") && self.is_word(1, "not") && self.is_word(2, "exists");
        self.at += 3 * usize::from(is_next);
        is_next
    }

    fn take_sign(&mut self, sign: char) -> bool {
        let next = self.tokens.get(self.at);
        let is_next = next.is_some_and(|placed| placed.token == Token::Sign(sign));
        self.at += usize::from(is_next);
        is_next
    }

    fn name(&mut self) -> Option<String> {
        let name = match &self.tokens.get(self.at)?.token {
            Token::Word(word) => word.clone().into_owned(),
            Token::Name(name) => name.clone(),
            Token::Sign(_) | Token::Other => return None,
        };
        self.at += 1;
        Some(name)
    }
}

fn is_word(placed: &Placed<'_>, word: &str) -> bool {
    matches!(&placed.token, Token::Word(known) if known == word)
}

fn tokens(text: &str) -> Option<Vec<Placed<'_>>> {
    let mut out = Vec::new();
    let mut at = 0;
    while let Some(first) = text.get(at..)?.chars().next() {
        let rest = text.get(at..)?;
        let (len, token) = match first {
            _ if first.is_whitespace() => (first.len_utf8(), None),
            _ if rest.starts_with("--") => (rest.find(['\n', '\r']).unwrap_or(rest.len()), None),
            _ if rest.starts_with("/*") => (comment(rest)?, None),
            // What a backslash is depends on a setting.
            '\'' => {
                let len = quoted(rest, '\'')?;
                (!rest.get(..len)?.contains('\\')).then_some(())?;
                (len, Some(Token::Other))
            }
            '"' => {
                let len = quoted(rest, '"')?;
                let name = rest.get(1..len - 1)?.replace("\"\"", "\"");
                (len, Some(Token::Name(name)))
            }
            '$' => match dollar_quoted(rest) {
                Some(len) => (len?, Some(Token::Other)),
                None => (1, Some(Token::Sign('$'))),
            },
            '0'..='9' => {
                let is_part = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '_';
                let len = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
                (len, Some(Token::Other))
            }
            _ if first.is_ascii_alphabetic() || first == '_' || !first.is_ascii() => {
                let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '$' || !c.is_ascii();
                let len = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
                let (word, behind) = (rest.get(..len)?, rest.get(len..)?);
                // E'..', a string with escapes; U&"..", a name with such.
                if word.eq_ignore_ascii_case("e") && behind.starts_with('\'') {
                    (len + escaped(behind)?, Some(Token::Other))
                } else if word.eq_ignore_ascii_case("u") && behind.starts_with("&\"") {
                    return None;
                } else {
                    (len, Some(Token::Word(lower(word))))
                }
            }
            _ => (first.len_utf8(), Some(Token::Sign(first))),
        };
        out.extend(token.map(|token| Placed {
            token,
            from: at,
            to: at + len,
        }));
        at += len;
    }
    Some(out)
}

/// As the server does in UTF-8: other letters stay as they are.
fn lower(word: &str) -> Cow<'_, str> {
    if word.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Cow::Owned(word.to_ascii_lowercase())
    } else {
        Cow::Borrowed(word)
    }
}

/// The length of what stands in quotes at the begin, with them; two quotes within are one.
fn quoted(rest: &str, quote: char) -> Option<usize> {
    let mut letters = rest.char_indices().skip(1).peekable();
    while let Some((at, letter)) = letters.next() {
        if letter == quote && letters.next_if(|next| next.1 == quote).is_none() {
            return Some(at + 1);
        }
    }
    None
}

/// The same where a backslash takes the meaning from what comes behind it.
fn escaped(rest: &str) -> Option<usize> {
    let mut letters = rest.char_indices().skip(1).peekable();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '\\' => {
                letters.next()?;
            }
            '\'' if letters.next_if(|next| next.1 == '\'').is_none() => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// The length of `$tag$ .. $tag$` at the begin; `Some(None)` where it does not end, `None` where there is none.
fn dollar_quoted(rest: &str) -> Option<Option<usize>> {
    let (tag, behind) = rest.strip_prefix('$')?.split_once('$')?;
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_' || !c.is_ascii();
    if !tag.chars().all(is_part) || tag.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let end = behind.find(&format!("${tag}$"));
    Some(end.map(|end| 2 * (tag.len() + 2) + end))
}

/// The length of the comment at the begin: they nest.
fn comment(rest: &str) -> Option<usize> {
    let (mut depth, mut at) = (0usize, 0);
    loop {
        let here = rest.get(at..)?;
        if here.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if here.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return Some(at);
            }
        } else {
            at += here.chars().next()?.len_utf8();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Option<Vec<String>> {
        let is_meant = |schema: Option<&str>, name: &str| {
            schema.is_none_or(|schema| schema == "Shop.x") && name == "orders"
        };
        let changes = changes(text, "amount", is_meant)?;
        let texts = changes.into_iter().map(|change| match change.has_using {
            true => format!("{} using", change.to),
            false => change.to,
        });
        Some(texts.collect())
    }

    #[test]
    fn a_type_is_read_however_its_statement_is_written() {
        for (text, expected) in [
            ("alter table orders alter amount type bigint", "bigint"),
            (
                "SET LOCAL timezone = 'it''s'; ALTER TABLE IF EXISTS ONLY \"Shop.x\".Orders * ALTER COLUMN \"amount\" SET DATA TYPE\n\
                 numeric (12, 2) COLLATE \"C\";",
                "numeric (12, 2)",
            ),
            (
                "/* a /* nested */ ; ' */ alter table orders add column n int default (1, 2), -- ;\n alter other type text, \
                 alter amount type timestamp(3) with time zone, alter more type int[]",
                "timestamp(3) with time zone",
            ),
            (
                "create function f() returns text language sql as $a$ select '; $$ \\' $a$; alter table orders alter amount type text",
                "text",
            ),
            (
                "comment on table a is e'it\\'s; \\\\'; alter table orders alter amount type text",
                "text",
            ),
        ] {
            assert_eq!(said(text), Some(vec![expected.to_owned()]), "{text}");
        }
    }

    #[test]
    fn an_expression_anywhere_in_the_statement_counts_and_one_of_another_does_not() {
        for text in [
            "alter table orders alter amount type numeric using amount / 100.0",
            "alter table orders alter amount type numeric, alter other type text using lower(other)",
        ] {
            assert_eq!(said(text), Some(vec!["numeric using".to_owned()]), "{text}");
        }
        assert_eq!(
            said("create index on orders using hash (amount); alter table orders alter amount type text"),
            Some(vec!["text".to_owned()])
        );
    }

    #[test]
    fn what_is_no_change_of_the_columns_type_is_none() {
        for text in [
            "",
            "alter table orders",
            "alter table orders alter amount set default 1, alter amount set not null",
            "alter table orders alter other type bigint",
            "alter table orders_old alter amount type bigint",
            "alter table shop.orders alter amount type bigint",
            "alter table orders alter \"Amount\" type bigint",
            "alter type orders alter attribute amount type bigint",
            "comment on table orders is 'alter table orders alter amount type bigint'",
            "alter table orders alter amount type",
            "alter table orders add constraint type check (amount > 0)",
        ] {
            assert_eq!(said(text), Some(Vec::new()), "{text}");
        }
    }

    #[test]
    fn a_text_that_cannot_be_read_says_nothing() {
        for text in [
            "alter table orders alter amount type bigint; comment on table a is 'it\\'s'",
            "alter table orders alter amount type bigint /* ",
            "alter table orders alter amount type bigint; select $a$ $b$",
            "alter table u&\"orders\" alter amount type bigint",
            "alter table \"orders alter amount type bigint",
        ] {
            assert_eq!(said(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_made_only_if_it_is_not_there_is_read() {
        let wanted = |text: &str| -> Vec<(Option<String>, String, Option<String>)> {
            let all = unless_there(text).into_iter();
            all.map(|it| (it.schema, it.relation, it.column)).collect()
        };
        let named = |schema: Option<&str>, relation: &str, column: Option<&str>| {
            (
                schema.map(str::to_owned),
                relation.to_owned(),
                column.map(str::to_owned),
            )
        };
        for (text, expected) in [
            (
                "ALTER TABLE Shop.orders ADD COLUMN IF NOT EXISTS a int DEFAULT f(1, 2), add if not exists \"B\" text, add column c int",
                vec![
                    named(Some("shop"), "orders", Some("a")),
                    named(Some("shop"), "orders", Some("B")),
                ],
            ),
            (
                "set local timezone = 'utc'; create unlogged table if not exists x (a int); create unique index if not exists shop.i on x (a)",
                vec![named(None, "x", None), named(Some("shop"), "i", None)],
            ),
            (
                "create schema if not exists s; create table y (a text default 'if not exists z'); drop table if exists x; \
                 create function f() returns int as 'create table if not exists x (a int)' language sql",
                vec![],
            ),
        ] {
            assert_eq!(wanted(text), expected, "{text}");
        }
        let text = "alter table  Orders\n add column if not exists a int";
        let all = unless_there(text);
        let is = |names: &[&str]| all[0].is(&names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>());
        assert!(is(&["shop", "orders", "a"]));
        assert!(!is(&["shop", "orders", "b"]) && !is(&["shop", "item", "a"]) && !is(&["shop", "orders"]));
        assert_eq!(
            statements("select 1; ALTER TABLE orders ADD COLUMN IF NOT EXISTS a int -- as well")[1],
            all[0].statement
        );
    }

    #[test]
    fn the_names_that_tables_are_given_are_read() {
        let text = "create table a.\"B\" (id int); create table if not exists c (id int); create view d as select 1; \
             alter table e rename to f; alter table s.e rename to f; alter table e rename column x to y; alter table e rename x to y; \
             alter table a.g set schema h; drop table i; create table j as select 1";
        let given = names_given(text).into_iter();
        let given: Vec<String> = given
            .map(|(schema, name)| format!("{} {name}", schema.unwrap_or_default()))
            .collect();
        assert_eq!(given, ["a B", " f", "s f", "h g", " j"]);
    }

    #[test]
    fn lengths_are_told_apart() {
        assert_eq!(lengths("numeric ( 12, 2 )"), "12,2");
        assert_eq!(lengths("timestamp(3) with time zone"), "3");
        assert_eq!(lengths("text"), "");
    }
}
