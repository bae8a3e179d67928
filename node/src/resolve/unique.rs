//! Unique keys, and the values that a row has in them.
//!
//! In:   a key as the catalog spells it, rows as their origin wrote them       Out: bytes that are equal where the key's values are
//! Invariants: 1. two values that the server calls equal give equal bytes at every node, whatever its locale: letters that differ in
//!       case alone are one where a key folds case by any rule ([`fold`]). 2. a row is in a partial index here where it is there.
//! Must never: ask the server; a key that cannot be judged from the row alone is none ([`expr`] says which can)
//! Not here: who has a value ([`super::claims`])

pub(crate) mod expr;

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use anabranch_proto::row::Cell;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::wire::Malformed;

/// A unique key beside the primary one, whose values the daemon can compare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UniqueKey {
    /// Name of its index.
    pub name: Arc<str>,
    /// What it is on, in SQL. Keys of one table that are on the same are one.
    pub definition: String,
    /// The columns that it is made of, those of its predicate included.
    pub columns: Vec<String>,
    /// What it consists of.
    pub parts: Vec<Part>,
    /// Which rows are in it, of a partial one.
    pub predicate: Option<Cond>,
    /// Is a row with a NULL in it equal to none (`NULLS DISTINCT`)?
    pub nulls_distinct: bool,
}

/// The unique keys of each table here, by schema and name.
pub type UniqueKeys = HashMap<(String, String), Vec<UniqueKey>>;

/// One part of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// A column, by its place in [`UniqueKey::columns`], whose equal values have equal canonical forms.
    Column(usize),
    /// An expression.
    Term(Term),
}

/// How values of a column are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// `boolean`
    Bool,
    /// `smallint`, `integer`, `bigint`
    Int,
    /// `text` and `varchar` of a deterministic collation
    Text,
    /// `character(n)`: blanks at its end say nothing
    Padded,
    /// `citext`
    Citext,
    /// An enum: its label
    Enum,
    /// `uuid`
    Uuid,
    /// A text after [`fold`], which no column is
    Folded,
    /// Anything else, which is NULL or not
    Other,
}

/// Which end of a text `trim` takes blanks from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `ltrim`
    Leading,
    /// `rtrim`
    Trailing,
    /// `btrim`
    Both,
}

/// An expression over a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Term {
    /// A column, by its place in [`UniqueKey::columns`].
    Column(usize, Class),
    /// A constant, in the form of [`Term::Column`]'s values.
    Constant(Vec<u8>),
    /// `lower` or `upper`: equal where either of both is ([`fold`]).
    Fold(Box<Term>),
    /// Without blanks at its ends.
    Trim(Side, Box<Term>),
    /// The first that is not NULL.
    Coalesce(Vec<Term>),
}

/// A comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Compare {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// A predicate, which is true, false or NULL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cond {
    /// `IS NULL`
    IsNull(Term),
    /// `IS TRUE` or `IS FALSE`
    Is(Box<Cond>, bool),
    /// A boolean.
    Value(Term),
    /// Against a constant. Those that order are of integers only.
    Compare(Term, Compare, Vec<u8>),
    /// `NOT`
    Not(Box<Cond>),
    /// `AND`
    All(Vec<Cond>),
    /// `OR`
    Any(Vec<Cond>),
}

/// The row does not have what is asked for: a value out of line that its writer left alone, or a column that is not there.
struct Absent;

type Value<'a> = Option<Cow<'a, [u8]>>;

/// The columns of a key in rows of one description of the table; `None` where these do not have them all.
#[must_use]
pub fn places(key: &UniqueKey, table: &TableDesc) -> Option<Vec<usize>> {
    let place = |name: &String| table.columns.iter().position(|column| column.name == *name);
    key.columns.iter().map(place).collect()
}

impl UniqueKey {
    /// One over columns whose equal values have equal canonical forms.
    #[must_use]
    pub fn of_columns(name: &str, columns: Vec<String>, nulls_distinct: bool) -> Self {
        Self {
            name: name.into(),
            definition: columns.join("\0"),
            parts: (0..columns.len()).map(Part::Column).collect(),
            columns,
            predicate: None,
            nulls_distinct,
        }
    }

    /// Appends the row's value in the key; `places` are those of its columns among `cells`. False where the row has none: it
    /// is not in the index, or its value is equal to no other.
    ///
    /// # Errors
    /// When a column's value cannot be read.
    pub fn put_value(
        &self,
        out: &mut Vec<u8>,
        (table, cells, places): (&TableDesc, &[Cell<'_>], &[usize]),
    ) -> Result<bool, Malformed> {
        let row = Row { cells, places };
        if let Some(predicate) = &self.predicate
            && !matches!(predicate.holds(row), Ok(Some(true)))
        {
            return Ok(false);
        }
        for part in &self.parts {
            let is_null = match part {
                Part::Column(at) => {
                    let column = places.get(*at).and_then(|at| table.columns.get(*at));
                    match (row.cell(*at), column) {
                        (Some(Cell::Null), _) => true,
                        (Some(cell @ (Cell::Binary(_) | Cell::Text(_))), Some(column)) => {
                            out.push(1);
                            column.put_canonical(out, cell)?;
                            false
                        }
                        _ => return Ok(false),
                    }
                }
                Part::Term(term) => match term.value(row) {
                    Err(Absent) => return Ok(false),
                    Ok(None) => true,
                    Ok(Some(value)) => {
                        out.push(1);
                        out.extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_be_bytes());
                        out.extend_from_slice(&value);
                        false
                    }
                },
            };
            match (is_null, self.nulls_distinct) {
                (false, _) => {}
                (true, true) => return Ok(false),
                (true, false) => out.push(0),
            }
        }
        Ok(true)
    }
}

/// A row, as a key looks at it.
#[derive(Clone, Copy)]
struct Row<'a> {
    cells: &'a [Cell<'a>],
    places: &'a [usize],
}

impl<'a> Row<'a> {
    fn cell(self, column: usize) -> Option<Cell<'a>> {
        self.places
            .get(column)
            .and_then(|at| self.cells.get(*at))
            .copied()
    }
}

impl Term {
    fn value<'a>(&'a self, row: Row<'a>) -> Result<Value<'a>, Absent> {
        Ok(match self {
            Self::Column(at, class) => match row.cell(*at) {
                Some(Cell::Null) => None,
                Some(Cell::Binary(value)) => Some(class.of_binary(value)?),
                Some(Cell::Text(value)) => Some(class.of_text(value).ok_or(Absent)?),
                Some(Cell::Unchanged) | None => return Err(Absent),
            },
            Self::Constant(value) => Some(Cow::Borrowed(value)),
            Self::Fold(term) => match term.value(row)? {
                Some(value) => Some(Cow::Owned(fold(std::str::from_utf8(&value).map_err(|_| Absent)?))),
                None => None,
            },
            Self::Trim(side, term) => term.value(row)?.map(|value| trim(value, *side)),
            Self::Coalesce(terms) => {
                for term in terms {
                    if let Some(value) = term.value(row)? {
                        return Ok(Some(value));
                    }
                }
                None
            }
        })
    }
}

impl Cond {
    fn holds(&self, row: Row<'_>) -> Result<Option<bool>, Absent> {
        Ok(match self {
            Self::IsNull(term) => Some(term.is_null(row)?),
            Self::Is(cond, wanted) => Some(cond.holds(row)? == Some(*wanted)),
            Self::Value(term) => term.value(row)?.map(|value| *value == [1]),
            Self::Compare(term, how, constant) => term
                .value(row)?
                .map(|value| how.holds(value.as_ref().cmp(constant))),
            Self::Not(cond) => cond.holds(row)?.map(|holds| !holds),
            Self::All(conds) => Self::first(conds, row, false)?,
            Self::Any(conds) => Self::first(conds, row, true)?,
        })
    }

    /// AND ends where one is false, OR where one is true; else NULL where one is NULL.
    fn first(conds: &[Self], row: Row<'_>, ends: bool) -> Result<Option<bool>, Absent> {
        let mut result = Some(!ends);
        for cond in conds {
            match cond.holds(row)? {
                Some(holds) if holds == ends => return Ok(Some(ends)),
                Some(_) => {}
                None => result = None,
            }
        }
        Ok(result)
    }
}

impl Term {
    /// A value that cannot be read is not NULL either.
    fn is_null(&self, row: Row<'_>) -> Result<bool, Absent> {
        match self {
            Self::Column(at, _) => match row.cell(*at) {
                Some(Cell::Null) => Ok(true),
                Some(Cell::Binary(_) | Cell::Text(_)) => Ok(false),
                // Unchanged is out of line, so it is there.
                Some(Cell::Unchanged) => Ok(false),
                None => Err(Absent),
            },
            _ => Ok(self.value(row)?.is_none()),
        }
    }
}

impl Compare {
    fn holds(self, order: std::cmp::Ordering) -> bool {
        match self {
            Self::Equal => order.is_eq(),
            Self::NotEqual => order.is_ne(),
            Self::Less => order.is_lt(),
            Self::LessOrEqual => order.is_le(),
            Self::Greater => order.is_gt(),
            Self::GreaterOrEqual => order.is_ge(),
        }
    }
}

impl Class {
    fn of_binary(self, value: &[u8]) -> Result<Cow<'_, [u8]>, Absent> {
        Ok(match self {
            Self::Bool | Self::Text | Self::Citext | Self::Enum | Self::Uuid => Cow::Borrowed(value),
            Self::Padded => trim(Cow::Borrowed(value), Side::Trailing),
            Self::Int => Cow::Owned(match *value {
                [a, b] => int(i64::from(i16::from_be_bytes([a, b]))),
                [a, b, c, d] => int(i64::from(i32::from_be_bytes([a, b, c, d]))),
                _ => int(i64::from_be_bytes(value.try_into().map_err(|_| Absent)?)),
            }),
            Self::Folded | Self::Other => return Err(Absent),
        })
    }

    /// From the type's text form, as a constant in a predicate has it.
    fn of_text(self, value: &[u8]) -> Option<Cow<'_, [u8]>> {
        Some(match self {
            Self::Text | Self::Citext | Self::Enum => Cow::Borrowed(value),
            Self::Padded => trim(Cow::Borrowed(value), Side::Trailing),
            Self::Bool => Cow::Borrowed(match value {
                b"t" | b"true" => &[1],
                b"f" | b"false" => &[0],
                _ => return None,
            }),
            Self::Int => Cow::Owned(int(std::str::from_utf8(value).ok()?.parse().ok()?)),
            Self::Uuid => {
                let text = std::str::from_utf8(value).ok()?;
                Cow::Owned(uuid::Uuid::parse_str(text).ok()?.as_bytes().to_vec())
            }
            Self::Folded => Cow::Owned(fold(std::str::from_utf8(value).ok()?)),
            Self::Other => return None,
        })
    }
}

/// So that bytes are in the order of the numbers.
fn int(value: i64) -> Vec<u8> {
    (value.cast_unsigned() ^ (1 << 63)).to_be_bytes().to_vec()
}

fn trim(value: Cow<'_, [u8]>, side: Side) -> Cow<'_, [u8]> {
    let is_blank = |byte: &u8| *byte == b' ';
    let from = match side {
        Side::Trailing => 0,
        Side::Leading | Side::Both => value.iter().take_while(|byte| is_blank(byte)).count(),
    };
    let to = match side {
        Side::Leading => value.len(),
        Side::Trailing | Side::Both => {
            value.len() - value.iter().rev().take_while(|byte| is_blank(byte)).count()
        }
    };
    match (from, to) {
        (0, to) if to == value.len() => value,
        _ => Cow::Owned(value.get(from..to).unwrap_or_default().to_vec()),
    }
}

/// One form of all texts that some server's `lower` or `upper` makes the same.
///
/// What these do depends on the locale's provider, its version and, for the Turkic i, its language; nodes must agree without.
/// So this is coarser than any of them: it takes for one what the full mappings of Unicode (chapter 3.13) to lower, then upper, then
/// lower case make equal, and every i, with a dot or without.
#[must_use]
pub fn fold(text: &str) -> Vec<u8> {
    if text.is_ascii() {
        return text.to_ascii_lowercase().into_bytes();
    }
    const DOT_ABOVE: char = '\u{307}';
    let folded = text.to_lowercase().to_uppercase().to_lowercase();
    let mut out = String::with_capacity(folded.len());
    let mut before = '\0';
    for letter in folded.chars() {
        if letter == DOT_ABOVE && before == 'i' {
            continue;
        }
        before = letter;
        out.push(letter);
    }
    out.into_bytes()
}
