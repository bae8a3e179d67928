//! A value as its type's binary form, of whatever type.

use tokio_postgres::types::{FromSql, Type};

/// The bytes that the type's `send` function made, none for NULL.
pub(crate) struct Image<'a>(pub(crate) Option<&'a [u8]>);

impl<'a> FromSql<'a> for Image<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(Some(raw)))
    }

    fn from_sql_null(_: &Type) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(None))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}
