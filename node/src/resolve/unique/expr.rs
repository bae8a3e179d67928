//! Expressions and predicates of indexes, as `pg_get_indexdef` and `pg_get_expr` write them, that the daemon can judge by itself.
//!
//! In:   their text, the table's columns      Out: [`Term`]s and [`Cond`]s, or `None` for what is not among these:
//!
//! - columns, `lower`, `upper`, `trim` of texts, `COALESCE` with a constant;
//! - of predicates: `IS [NOT] NULL`, booleans, `IS [NOT] TRUE | FALSE`, comparisons with a constant for equality (integers: for order, too),
//!   `= ANY (ARRAY[...])`, `<> ALL (ARRAY[...])`, and all of these under NOT, AND, OR.
//!
//! Must never: take one thing for another; what is not known for sure is not understood
//! Not here: the values of rows ([`super`])

use super::{Class, Compare, Cond, Side, Term};

/// A column, as expressions see it.
#[derive(Debug, Clone)]
pub(crate) struct Column {
    pub(crate) name: String,
    pub(crate) class: Class,
}

/// Reads expressions over the columns of one table, and notes which they use.
pub(crate) struct Reader<'a> {
    table: &'a [Column],
    /// Names of the columns met, each once.
    pub(crate) used: Vec<String>,
}

/// A term with what its values are; constants take theirs from what they stand beside.
enum Typed {
    Term(Term, Class),
    Literal(String),
    Null,
}

impl<'a> Reader<'a> {
    pub(crate) const fn new(table: &'a [Column]) -> Self {
        let used = Vec::new();
        Self { table, used }
    }

    /// The place of a column among those used.
    pub(crate) fn place(&mut self, name: &str) -> usize {
        match self.used.iter().position(|used| used == name) {
            Some(at) => at,
            None => {
                self.used.push(name.to_owned());
                self.used.len() - 1
            }
        }
    }

    /// A part of a key: a value that is equal to another one's where the server says so.
    pub(crate) fn part(&mut self, text: &str) -> Option<Term> {
        let mut from = Tokens::of(text)?;
        let Typed::Term(term, class) = self.term(&mut from)? else {
            return None;
        };
        from.end()?;
        match class {
            Class::Bool
            | Class::Int
            | Class::Text
            | Class::Padded
            | Class::Enum
            | Class::Uuid
            | Class::Folded => Some(term),
            Class::Citext => Some(Term::Fold(Box::new(term))),
            Class::Other => None,
        }
    }

    /// The predicate of a partial index.
    pub(crate) fn predicate(&mut self, text: &str) -> Option<Cond> {
        let mut from = Tokens::of(text)?;
        let cond = self.cond(&mut from)?;
        from.end()?;
        Some(cond)
    }

    /// `a AND b AND c`, or with OR: the server puts parentheses where both meet.
    fn cond(&mut self, from: &mut Tokens) -> Option<Cond> {
        let first = self.simple(from)?;
        for (word, all) in [("AND", true), ("OR", false)] {
            if !from.is_next(word) {
                continue;
            }
            let mut conds = vec![first];
            while from.take(word) {
                conds.push(self.simple(from)?);
            }
            if from.is_next("AND") || from.is_next("OR") {
                return None;
            }
            return Some(if all { Cond::All(conds) } else { Cond::Any(conds) });
        }
        Some(first)
    }

    fn simple(&mut self, from: &mut Tokens) -> Option<Cond> {
        if from.take("NOT") {
            return Some(Cond::Not(Box::new(self.simple(from)?)));
        }
        // A parenthesis is around a condition, or around an operand of one.
        if from.is_next("(") {
            let (mut inner, used) = (from.clone(), self.used.clone());
            inner.take("(");
            if let Some(cond) = self.cond(&mut inner).filter(|_| inner.take(")"))
                && !inner.goes_on()
            {
                *from = inner;
                return self.is(cond, from);
            }
            self.used = used;
        }
        self.comparison(from)
    }

    fn comparison(&mut self, from: &mut Tokens) -> Option<Cond> {
        let left = self.term(from)?;
        let compare = match from.next()? {
            Token::Word(word) if word == "IS" => {
                let Typed::Term(term, class) = left else {
                    return None;
                };
                let not = from.take("NOT");
                let cond = if from.take("NULL") {
                    Cond::IsNull(term)
                } else if class == Class::Bool {
                    Cond::Is(Box::new(Cond::Value(term)), from.truth()?)
                } else {
                    return None;
                };
                return Some(if not { Cond::Not(Box::new(cond)) } else { cond });
            }
            Token::Sign(sign) => match sign.as_str() {
                "=" => Compare::Equal,
                "<>" => Compare::NotEqual,
                "<" => Compare::Less,
                "<=" => Compare::LessOrEqual,
                ">" => Compare::Greater,
                ">=" => Compare::GreaterOrEqual,
                _ => {
                    from.back();
                    return truth_of(left);
                }
            },
            _ => {
                from.back();
                return truth_of(left);
            }
        };
        let Typed::Term(term, class) = left else {
            return None;
        };
        let is_comparable = match class {
            Class::Int => true,
            Class::Bool | Class::Text | Class::Padded | Class::Enum | Class::Uuid => {
                matches!(compare, Compare::Equal | Compare::NotEqual)
            }
            Class::Citext | Class::Folded | Class::Other => false,
        };
        if !is_comparable {
            return None;
        }
        let any = from.take("ANY");
        if any || from.take("ALL") {
            // = ANY is one of, <> ALL is none of; the others are not how anybody writes a list.
            if any != (compare == Compare::Equal) || !any && compare != Compare::NotEqual {
                return None;
            }
            let conds = self
                .list(from)?
                .iter()
                .map(|text| {
                    Some(Cond::Compare(
                        term.clone(),
                        compare,
                        class.of_text(text.as_bytes())?.into_owned(),
                    ))
                })
                .collect::<Option<Vec<Cond>>>()?;
            return Some(if any { Cond::Any(conds) } else { Cond::All(conds) });
        }
        let Typed::Literal(text) = self.term(from)? else {
            return None;
        };
        Some(Cond::Compare(
            term,
            compare,
            class.of_text(text.as_bytes())?.into_owned(),
        ))
    }

    /// `(ARRAY['a'::text, 'b'::text])`, also with a cast around it.
    fn list(&mut self, from: &mut Tokens) -> Option<Vec<String>> {
        let mut open = 0;
        while from.take("(") {
            open += 1;
        }
        (from.take("ARRAY") && from.take("[")).then_some(())?;
        let mut out = Vec::new();
        loop {
            let Typed::Literal(text) = self.term(from)? else {
                return None;
            };
            out.push(text);
            if from.take("]") {
                break;
            }
            from.take(",").then_some(())?;
        }
        while open > 0 {
            if from.take("::") {
                from.type_name()?;
                (from.take("[") && from.take("]")).then_some(())?;
            }
            from.take(")").then_some(())?;
            open -= 1;
        }
        Some(out)
    }

    /// `(cond) IS [NOT] TRUE | FALSE`, or the condition itself.
    fn is(&self, cond: Cond, from: &mut Tokens) -> Option<Cond> {
        if !from.take("IS") {
            return Some(cond);
        }
        let not = from.take("NOT");
        let is = Cond::Is(Box::new(cond), from.truth()?);
        Some(if not { Cond::Not(Box::new(is)) } else { is })
    }

    fn term(&mut self, from: &mut Tokens) -> Option<Typed> {
        let mut term = match from.next()? {
            Token::Sign(sign) if sign == "(" => {
                let inner = self.term(from)?;
                from.take(")").then_some(inner)?
            }
            Token::Sign(sign) if sign == "-" => match from.next()? {
                Token::Number(number) => Typed::Literal(format!("-{number}")),
                _ => return None,
            },
            Token::Number(number) => Typed::Literal(number),
            Token::Text(text) => Typed::Literal(text),
            Token::Name(name) => self.column(&name)?,
            Token::Word(word) => match word.as_str() {
                "NULL" => Typed::Null,
                "true" | "false" => Typed::Literal(word),
                "COALESCE" => self.coalesce(from)?,
                "TRIM" => self.trim(from)?,
                "lower" | "upper" if from.is_next("(") => self.fold(from)?,
                "btrim" if from.is_next("(") => self.trimmed(Side::Both, from)?,
                "ltrim" if from.is_next("(") => self.trimmed(Side::Leading, from)?,
                "rtrim" if from.is_next("(") => self.trimmed(Side::Trailing, from)?,
                _ if from.is_next("(") => return None,
                name => self.column(name)?,
            },
            Token::Sign(_) => return None,
        };
        while from.take("::") {
            let to = from.type_name()?;
            term = cast(term, &to)?;
        }
        Some(term)
    }

    fn column(&mut self, name: &str) -> Option<Typed> {
        let class = self.table.iter().find(|column| column.name == name)?.class;
        Some(Typed::Term(Term::Column(self.place(name), class), class))
    }

    /// `lower(x)` and `upper(x)`
    fn fold(&mut self, from: &mut Tokens) -> Option<Typed> {
        from.take("(").then_some(())?;
        let Typed::Term(text, Class::Text | Class::Folded) = self.term(from)? else {
            return None;
        };
        from.take(")").then_some(())?;
        Some(Typed::Term(Term::Fold(Box::new(text)), Class::Folded))
    }

    /// `btrim(x)`
    fn trimmed(&mut self, side: Side, from: &mut Tokens) -> Option<Typed> {
        from.take("(").then_some(())?;
        self.trim_rest(side, from)
    }

    /// `TRIM(BOTH FROM x)`
    fn trim(&mut self, from: &mut Tokens) -> Option<Typed> {
        from.take("(").then_some(())?;
        let side = match from.next()? {
            Token::Word(word) if word == "BOTH" => Side::Both,
            Token::Word(word) if word == "LEADING" => Side::Leading,
            Token::Word(word) if word == "TRAILING" => Side::Trailing,
            _ => return None,
        };
        from.take("FROM").then_some(())?;
        self.trim_rest(side, from)
    }

    fn trim_rest(&mut self, side: Side, from: &mut Tokens) -> Option<Typed> {
        let Typed::Term(text, class @ (Class::Text | Class::Folded)) = self.term(from)? else {
            return None;
        };
        from.take(")").then_some(())?;
        Some(Typed::Term(Term::Trim(side, Box::new(text)), class))
    }

    fn coalesce(&mut self, from: &mut Tokens) -> Option<Typed> {
        from.take("(").then_some(())?;
        let (mut terms, mut of) = (Vec::new(), None);
        loop {
            match self.term(from)? {
                Typed::Term(term, class) if of.is_none_or(|of| of == class) => {
                    of = Some(class);
                    terms.push(term);
                }
                Typed::Literal(text) => {
                    terms.push(Term::Constant(of?.of_text(text.as_bytes())?.into_owned()))
                }
                Typed::Term(..) | Typed::Null => return None,
            }
            if from.take(")") {
                break;
            }
            from.take(",").then_some(())?;
        }
        Some(Typed::Term(
            Term::Coalesce(terms),
            of.filter(|of| *of != Class::Other)?,
        ))
    }
}

fn truth_of(typed: Typed) -> Option<Cond> {
    match typed {
        Typed::Term(term, Class::Bool) => Some(Cond::Value(term)),
        _ => None,
    }
}

/// A cast that leaves a value as it is, or makes a text of it.
fn cast(typed: Typed, to: &str) -> Option<Typed> {
    let is_text = matches!(to, "text" | "character varying");
    Some(match typed {
        // What the constant stands beside says what it is; the server has put a cast to that type here.
        Typed::Literal(text) => Typed::Literal(text),
        Typed::Null => Typed::Null,
        Typed::Term(term, Class::Text | Class::Enum | Class::Padded | Class::Citext) if is_text => {
            Typed::Term(term, Class::Text)
        }
        Typed::Term(term, Class::Folded) if is_text => Typed::Term(term, Class::Folded),
        Typed::Term(term, Class::Int) if matches!(to, "smallint" | "integer" | "bigint") => {
            Typed::Term(term, Class::Int)
        }
        Typed::Term(..) => return None,
    })
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    /// A keyword, a function, or a column whose name needs no quotes.
    Word(String),
    /// A quoted name.
    Name(String),
    Text(String),
    Number(String),
    Sign(String),
}

#[derive(Debug, Clone)]
struct Tokens {
    all: Vec<Token>,
    at: usize,
}

impl Tokens {
    fn of(text: &str) -> Option<Self> {
        let mut all = Vec::new();
        let mut rest = text;
        while let Some(first) = rest.trim_start().chars().next() {
            rest = rest.trim_start();
            let len = match first {
                '\'' | '"' => {
                    let quoted = quoted(rest, first)?;
                    let len = quoted.len() + 2 + quoted.matches(first).count();
                    all.push(match first {
                        '"' => Token::Name(quoted),
                        _ => Token::Text(quoted),
                    });
                    len
                }
                '0'..='9' => {
                    let len = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
                    if rest.get(len..)?.starts_with(['.', 'e', 'E']) {
                        return None;
                    }
                    all.push(Token::Number(rest.get(..len)?.to_owned()));
                    len
                }
                _ if first.is_alphabetic() || first == '_' => {
                    let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == '$';
                    let len = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
                    let word = rest.get(..len)?;
                    // E'...': a text with backslashes.
                    if rest.get(len..)?.starts_with('\'') {
                        return None;
                    }
                    all.push(Token::Word(word.to_owned()));
                    len
                }
                '(' | ')' | ',' | '[' | ']' | '.' => {
                    all.push(Token::Sign(first.to_string()));
                    1
                }
                _ => {
                    let is_part = |c: char| ":=<>!-+*/%^~|&#?@`".contains(c);
                    let len = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
                    if len == 0 {
                        return None;
                    }
                    all.push(Token::Sign(rest.get(..len)?.to_owned()));
                    len
                }
            };
            rest = rest.get(len..)?;
        }
        Some(Self { all, at: 0 })
    }

    fn next(&mut self) -> Option<Token> {
        let token = self.all.get(self.at).cloned();
        self.at += 1;
        // The end is one more token, so that whoever looked can go back.
        Some(token.unwrap_or_else(|| Token::Sign(String::new())))
    }

    const fn back(&mut self) {
        self.at = self.at.saturating_sub(1);
    }

    fn is_next(&self, what: &str) -> bool {
        matches!(self.all.get(self.at), Some(Token::Word(word) | Token::Sign(word)) if word == what)
    }

    fn take(&mut self, what: &str) -> bool {
        let is_next = self.is_next(what);
        self.at += usize::from(is_next);
        is_next
    }

    /// Does an operator come, so that what was in parentheses was an operand?
    fn goes_on(&self) -> bool {
        match self.all.get(self.at) {
            Some(Token::Sign(sign)) => sign != ")",
            Some(Token::Word(word)) => {
                word == "IS"
                    && !matches!(self.all.get(self.at + 1), Some(Token::Word(next)) if next != "NULL")
            }
            _ => false,
        }
    }

    fn truth(&mut self) -> Option<bool> {
        if self.take("TRUE") {
            return Some(true);
        }
        self.take("FALSE").then_some(false)
    }

    fn end(&self) -> Option<()> {
        (self.at >= self.all.len()).then_some(())
    }

    /// A type's name, without its schema and its length.
    fn type_name(&mut self) -> Option<String> {
        let mut name = match self.next()? {
            Token::Word(word) | Token::Name(word) => word,
            _ => return None,
        };
        while self.take(".") {
            name = match self.next()? {
                Token::Word(word) | Token::Name(word) => word,
                _ => return None,
            };
        }
        if name == "character" && self.take("varying") {
            name = "character varying".to_owned();
        }
        // character varying(5) cuts; whoever casts so is not understood. Neither are types of two words.
        (!self.is_next("(")).then_some(name)
    }
}

/// What stands between quotes, of which two are one.
fn quoted(text: &str, quote: char) -> Option<String> {
    let mut out = String::new();
    let mut letters = text.chars().skip(1).peekable();
    while let Some(letter) = letters.next() {
        if letter != quote {
            out.push(letter);
        } else if letters.next_if_eq(&quote).is_some() {
            out.push(quote);
        } else {
            return Some(out);
        }
    }
    None
}

#[cfg(test)]
mod tests {
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
}
