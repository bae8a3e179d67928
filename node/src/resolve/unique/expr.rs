//! Expressions and predicates of indexes, as `pg_get_indexdef` and `pg_get_expr` write them, that the daemon can judge by itself.
//!
//! In:   their text, the table's columns      Out: [`Term`]s and [`Cond`]s, or `None` for what is not among these:
//!
//! - columns, `lower`, `upper`, `trim` of texts, `COALESCE` with a constant;
//! - of predicates: `IS [NOT] NULL`, booleans, `IS [NOT] TRUE | FALSE`, comparisons with a constant for equality (integers: for order, too),
//!   `= ANY (ARRAY[...])`, `<> ALL (ARRAY[...])`, and all of these under NOT, AND, OR.
//!
//! Must never: take one thing for another; what is not known for sure is not understood
//! Not here: the values of rows ([`super`]), words and signs ([`tokens`])

mod tokens;

use self::tokens::{Token, Tokens};
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

#[cfg(test)]
mod tests;
