//! Rows as an earlier time, or another node, has described them, taken to the server in one statement for each description.
//!
//! In:   what writes of the journal made of rows      Out: those of each description, with its plan; their hashes
//! Invariants: a value that no column here takes ends nothing: it equals none that is here
//! Not here: what is compared with them ([`super::gap`], [`super::tail`])

use std::sync::Arc;

use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use bytes::Bytes;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Row};

use super::Error;
use crate::apply::plan::{Plan, Source};
use crate::apply::write::{parameters, references};
use crate::pg;
use crate::verify::newest::Newest;
use crate::verify::table::Compared;

/// Rows of one description, with their places in what was asked.
pub(super) struct Described<'a> {
    /// How they are read here, or why they cannot be.
    pub(super) plan: Result<Plan, String>,
    pub(super) rows: Vec<(usize, &'a RowImage)>,
    desc: &'a Arc<TableDesc>,
}

/// The places of rows that one description fits, and how they are read here.
pub(super) fn by_description<'a>(
    compared: &Compared,
    images: impl Iterator<Item = (usize, Option<&'a (Arc<TableDesc>, RowImage)>)>,
) -> Vec<Described<'a>> {
    let mut out: Vec<Described<'a>> = Vec::new();
    for (at, image) in images {
        let Some((desc, row)) = image else { continue };
        match out
            .iter_mut()
            .find(|known| Arc::ptr_eq(known.desc, desc) || known.desc == desc)
        {
            Some(known) => known.rows.push((at, row)),
            None => out.push(Described {
                desc,
                plan: compared.plan_of(desc).map_err(|error| error.to_string()),
                rows: vec![(at, row)],
            }),
        }
    }
    out
}

/// Hashes of what writes made of rows; none where they left none, or cannot be compared.
pub(super) async fn hashes(
    client: &Client,
    compared: &Compared,
    writes: &[Option<&Newest>],
) -> Result<Vec<Option<i64>>, Error> {
    let images = writes
        .iter()
        .map(|write| write.and_then(|write| write.image.as_ref()));
    hashes_of(client, compared, &images.collect::<Vec<_>>()).await
}

/// The same of images. In a transaction, which goes on.
pub(super) async fn hashes_of(
    client: &Client,
    compared: &Compared,
    images: &[Option<&(Arc<TableDesc>, RowImage)>],
) -> Result<Vec<Option<i64>>, Error> {
    let mut out = vec![None; images.len()];
    for of in by_description(compared, images.iter().copied().enumerate()) {
        let Ok(plan) = &of.plan else { continue };
        let Some(sql) = Compared::hash_sql(plan, of.desc, &compared.columns()) else {
            continue;
        };
        let mut parts = vec![of.rows.as_slice()];
        while let Some(part) = parts.pop() {
            // A single one that is no value here has none.
            if !hash(client, (plan, &sql), part, &mut out).await? && part.len() > 1 {
                let (some, others) = part.split_at(part.len() / 2);
                parts.extend([some, others]);
            }
        }
    }
    Ok(out)
}

/// Puts the hashes of rows of one description in their places; of none where the columns here do not take all of them.
async fn hash(
    client: &Client,
    (plan, sql): (&Plan, &str),
    rows: &[(usize, &RowImage)],
    out: &mut [Option<i64>],
) -> Result<bool, Error> {
    let mut array = plan.rows();
    for (_, row) in rows {
        if array.push(&Source::Row(row)).is_err() {
            return Ok(false);
        }
    }
    let asked = query(client, sql, array.finish());
    let told = match pg::attempt(client, asked).await? {
        Ok(told) => told,
        Err(error) if is_of_a_row(&error) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    for row in told {
        let at = rows.get(place(&row)?).map(|row| row.0);
        if let Some(slot) = at.and_then(|at| out.get_mut(at)) {
            *slot = Some(row.try_get(1)?);
        }
    }
    Ok(true)
}

/// Data exceptions and constraints: SQLSTATE classes 22 and 23.
pub(super) fn is_of_a_row(error: &tokio_postgres::Error) -> bool {
    let code = error.code().map(SqlState::code);
    code.is_some_and(|code| code.starts_with("22") || code.starts_with("23"))
}

/// A statement over an array of rows ([`Plan`]).
pub(super) async fn query(
    client: &Client,
    sql: &str,
    (array, text): (Bytes, Vec<Bytes>),
) -> Result<Vec<Row>, tokio_postgres::Error> {
    let params = parameters(array, None, text);
    client.query(sql, &references(&params)).await
}

/// `v.ord` of a row, from 0.
pub(super) fn place(row: &Row) -> Result<usize, Error> {
    let ord: i64 = row.try_get(0)?;
    Ok(usize::try_from(ord).unwrap_or(0).saturating_sub(1))
}
