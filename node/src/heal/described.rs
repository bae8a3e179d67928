//! Rows as an earlier time, or another node, has described them, taken to the server in one statement for each description.
//!
//! In:   what writes of the journal made of rows      Out: those of each description, with its plan; their hashes
//! Not here: what is compared with them ([`super::gap`], [`super::tail`])

use std::sync::Arc;

use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use bytes::Bytes;
use tokio_postgres::{Client, Row};

use super::Error;
use crate::apply::plan::{Plan, Source};
use crate::apply::write::{parameters, references};
use crate::verify::newest::Newest;
use crate::verify::table::Compared;

/// Rows of one description, with their places in what was asked.
pub(super) struct Described<'a> {
    pub(super) plan: Plan,
    pub(super) rows: Vec<(usize, &'a RowImage)>,
    desc: &'a Arc<TableDesc>,
}

/// The places of rows that one description fits, and how they are read here.
pub(super) fn by_description<'a>(
    compared: &Compared,
    images: impl Iterator<Item = (usize, Option<&'a (Arc<TableDesc>, RowImage)>)>,
) -> Result<Vec<Described<'a>>, Error> {
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
                plan: compared.plan_of(desc)?,
                rows: vec![(at, row)],
            }),
        }
    }
    Ok(out)
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

/// The same of images.
pub(super) async fn hashes_of(
    client: &Client,
    compared: &Compared,
    images: &[Option<&(Arc<TableDesc>, RowImage)>],
) -> Result<Vec<Option<i64>>, Error> {
    let mut out = vec![None; images.len()];
    for of in by_description(compared, images.iter().copied().enumerate())? {
        let Some(sql) = Compared::hash_sql(&of.plan, of.desc, &compared.columns()) else {
            continue;
        };
        let mut array = of.plan.rows();
        for (_, row) in &of.rows {
            array.push(&Source::Row(row))?;
        }
        for row in query(client, &sql, array.finish()).await? {
            let at = of.rows.get(place(&row)?).map(|row| row.0);
            if let Some(slot) = at.and_then(|at| out.get_mut(at)) {
                *slot = Some(row.try_get(1)?);
            }
        }
    }
    Ok(out)
}

/// A statement over an array of rows ([`Plan`]).
pub(super) async fn query(
    client: &Client,
    sql: &str,
    (array, text): (Bytes, Vec<Bytes>),
) -> Result<Vec<Row>, Error> {
    let params = parameters(array, None, text);
    Ok(client.query(sql, &references(&params)).await?)
}

/// `v.ord` of a row, from 0.
pub(super) fn place(row: &Row) -> Result<usize, Error> {
    let ord: i64 = row.try_get(0)?;
    Ok(usize::try_from(ord).unwrap_or(0).saturating_sub(1))
}
