//! What a table looks like at the node that wrote to it.

use std::sync::Arc;

use crate::wire::{Malformed, Reader, put_bytes};

/// A column as published by its origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnDesc {
    /// Column name.
    pub name: String,
    /// The origin's type OID: the same everywhere only for built-in types (below 16384).
    pub type_oid: u32,
    /// The origin's type modifier, -1 for none. Domains have none: of one over a built-in type it says which ([`Self::base_oid`]).
    pub type_mod: i32,
    /// Schema-qualified type name, quoted where SQL wants it: `pg_catalog.int4`, `public.mood`, `public."Mood"`.
    pub type_name: String,
}

impl ColumnDesc {
    /// The modifier of a domain's column: it is over the built-in type `base_oid`.
    #[must_use]
    pub fn domain_over(base_oid: u32) -> i32 {
        i32::try_from(base_oid).map_or(-1, |oid| (-1i32).saturating_sub(oid))
    }

    /// The type whose form the values have: the column's own; of a domain the one that it is over, if that is a built-in type and was
    /// said.
    #[must_use]
    pub fn base_oid(&self) -> u32 {
        match self.type_mod.checked_add(1) {
            Some(over) if over < 0 => over.unsigned_abs(),
            _ => self.type_oid,
        }
    }
}

/// A table as published by its origin: its columns in the order of row images, and its primary key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableDesc {
    /// Schema name.
    pub schema: String,
    /// Table name.
    pub name: String,
    /// Published columns, in the order of row images.
    pub columns: Vec<ColumnDesc>,
    /// Indices into `columns` of the primary key's columns, in the key's order. Never empty.
    pub key: Vec<u16>,
    /// `REPLICA IDENTITY FULL`.
    pub identity_full: bool,
}

impl TableDesc {
    /// Is this one of the daemon's own tables?
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.schema == OWN_SCHEMA
    }

    /// Is it of the same table, by its name?
    #[must_use]
    pub fn is_of(&self, other: &Self) -> bool {
        self.name == other.name && self.schema == other.schema
    }

    /// The key's columns, in the key's order.
    pub fn key_columns(&self) -> impl Iterator<Item = &ColumnDesc> {
        self.key
            .iter()
            .filter_map(|&at| self.columns.get(usize::from(at)))
    }

    /// The table without its other columns, as far as its key is concerned: what is a key's image of one is one of the other.
    #[must_use]
    pub fn key_alone(&self) -> Self {
        Self {
            columns: self.key_columns().cloned().collect(),
            key: (0..len_u16(self.key.len())).collect(),
            ..self.clone()
        }
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        put_bytes(out, self.schema.as_bytes());
        put_bytes(out, self.name.as_bytes());
        out.push(u8::from(self.identity_full));
        out.extend_from_slice(&len_u16(self.columns.len()).to_be_bytes());
        for column in &self.columns {
            put_bytes(out, column.name.as_bytes());
            put_bytes(out, column.type_name.as_bytes());
            out.extend_from_slice(&column.type_oid.to_be_bytes());
            out.extend_from_slice(&column.type_mod.to_be_bytes());
        }
        out.extend_from_slice(&len_u16(self.key.len()).to_be_bytes());
        for at in &self.key {
            out.extend_from_slice(&at.to_be_bytes());
        }
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Arc<Self>, Malformed> {
        let mut from = Reader::new(bytes);
        let schema = from.text()?;
        let name = from.text()?;
        let identity_full = from.u8()? != 0;
        let column_count = usize::from(from.u16()?);
        let mut columns = Vec::with_capacity(column_count.min(2_000));
        for _ in 0..column_count {
            let name = from.text()?;
            let type_name = from.text()?;
            columns.push(ColumnDesc {
                name,
                type_name,
                type_oid: from.u32()?,
                type_mod: from.i32()?,
            });
        }
        let key_count = usize::from(from.u16()?);
        let mut key = Vec::with_capacity(key_count.min(64));
        for _ in 0..key_count {
            let at = from.u16()?;
            if usize::from(at) >= column_count {
                return Err(Malformed("a key column that the table does not have"));
            }
            key.push(at);
        }
        if key.is_empty() {
            return Err(Malformed("a table without a key"));
        }
        from.done()?;
        Ok(Arc::new(Self {
            schema,
            name,
            columns,
            key,
            identity_full,
        }))
    }
}

/// The schema of the daemon's own tables.
pub const OWN_SCHEMA: &str = "anabranch";

fn len_u16(len: usize) -> u16 {
    // PostgreSQL allows 1,600 columns a table.
    u16::try_from(len).unwrap_or(u16::MAX)
}

/// `schema.name`, with quotes where [`split_name`] would read another name: schemas may have dots in theirs.
#[must_use]
pub fn full_name(schema: &str, name: &str) -> String {
    let part = |part: &str, is_unclear: bool| {
        if is_unclear || part.starts_with('"') {
            format!("\"{}\"", part.replace('"', "\"\""))
        } else {
            part.to_owned()
        }
    };
    format!("{}.{}", part(schema, schema.contains('.')), part(name, false))
}

/// Schema, if there is one, and name of a text `schema.name`; either may be in double quotes, of which two stand for one. Without quotes the
/// schema ends at the first dot.
#[must_use]
pub fn split_name(text: &str) -> (Option<String>, String) {
    let parts = match quoted(text) {
        Some((name, "")) => return (None, name),
        Some((schema, rest)) => rest.strip_prefix('.').map(|name| (schema, name)),
        None => None,
    };
    let unquoted = || {
        text.split_once('.')
            .map(|(schema, name)| (schema.to_owned(), name))
    };
    match parts.or_else(unquoted) {
        None => (None, text.to_owned()),
        Some((schema, name)) => match quoted(name) {
            Some((name, "")) => (Some(schema), name),
            _ => (Some(schema), name.to_owned()),
        },
    }
}

/// The name in quotes that a text begins with, and what follows.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut rest = text.strip_prefix('"')?;
    let mut name = String::new();
    loop {
        let (head, tail) = rest.split_once('"')?;
        name.push_str(head);
        let Some(more) = tail.strip_prefix('"') else {
            return Some((name, tail));
        };
        name.push('"');
        rest = more;
    }
}

/// Does a name fit a pattern, in which `*` stands for any run of characters?
#[must_use]
pub fn name_fits(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, tail)) => {
            let Some(rest) = name.strip_prefix(head) else {
                return false;
            };
            (0..=rest.len())
                .filter_map(|at| rest.get(at..))
                .any(|rest| name_fits(tail, rest))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_name_is_read_as_what_it_was_made_of() {
        for schema in ["public", "my.schema", "a\"b", "\"a\"", "a b", "Ä.\"."] {
            for name in ["t", "t.u", "\"t\"", "t\"u", "\"t"] {
                let text = full_name(schema, name);
                assert_eq!(
                    split_name(&text),
                    (Some(schema.to_owned()), name.to_owned()),
                    "{text}"
                );
            }
        }
        assert_eq!(full_name("public", "t.u"), "public.t.u");
        assert_eq!(full_name("my.schema", "t"), "\"my.schema\".t");
    }

    #[test]
    fn quotes_are_read_where_they_are_and_not_asked_for() {
        let split = |text| {
            let (schema, name) = split_name(text);
            (schema.unwrap_or_default(), name)
        };
        for (text, schema, name) in [
            ("t", "", "t"),
            ("\"a.b\"", "", "a.b"),
            ("\"public\".\"t\"", "public", "t"),
            ("a.\"b\"\"c\"", "a", "b\"c"),
            ("\"a.b", "\"a", "b"),
            ("\"a\"b.c", "\"a\"b", "c"),
        ] {
            assert_eq!(split(text), (schema.to_owned(), name.to_owned()), "{text}");
        }
    }
}
