//! Rows of one table at the server: how they are, and writing them as the tail had them.
//!
//! In:   keys, or rows as the journal has them            Out: what is there; what is refused; lines of the record
//! Not here: what a row is to become ([`super`])

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use tokio_postgres::Client;

use super::super::described::{by_description, is_of_a_row, place, query};
use super::super::state::{Line, Record};
use super::super::{Error, io, refused};
use super::{BACK_AGAIN, KEPT, ROWS_MAX, Row, table_name};
use crate::apply::plan::{Plan, Source};
use crate::apply::raw_json;
use crate::pg;
use crate::verify::table::Compared;

/// The keys of all rows that are there, and `keys`.
pub(super) async fn all_keys(
    client: &Client,
    compared: &Compared,
    keys: Vec<Vec<u8>>,
) -> Result<Vec<Vec<u8>>, Error> {
    let mut all: BTreeSet<Vec<u8>> = keys.into_iter().collect();
    let (columns, table) = (
        compared.images(compared.desc.key_columns()),
        &compared.plan.table_sql,
    );
    for row in client
        .query(&format!("SELECT {columns} FROM ONLY {table} AS t"), &[])
        .await?
    {
        let mut key = Vec::new();
        compared
            .desc
            .canonical_key_of_image(&compared.key_image(&row, 0)?, &mut key)?;
        all.insert(key);
        if all.len() > ROWS_MAX {
            return refused(format!(
                "the server lacks a TRUNCATE of {}, which has more than {ROWS_MAX} rows: truncate it by hand, then run this again",
                table_name(compared)
            ));
        }
    }
    Ok(all.into_iter().collect())
}

/// xmin and hash of those rows that are there, by their place.
pub(super) async fn now_of(
    client: &Client,
    compared: &Compared,
    rows: &[Row],
) -> Result<HashMap<usize, (u32, i64)>, Error> {
    let what = format!("t.xmin::text::int8, {}", Compared::hash(&compared.columns()));
    let mut array = compared.plan.rows();
    for row in rows {
        array.push(&Source::Key(&row.image))?;
    }
    let mut now = HashMap::new();
    for row in query(client, &compared.plan.read(&what), array.finish()).await? {
        let xmin = u32::try_from(row.try_get::<_, i64>(1)?).unwrap_or(0);
        now.insert(place(&row)?, (xmin, row.try_get(2)?));
    }
    Ok(now)
}

pub(super) async fn delete(client: &Client, compared: &Compared, keys: &[RowImage]) -> Result<(), Error> {
    if keys.is_empty() {
        return Ok(());
    }
    let mut array = compared.plan.rows();
    for key in keys {
        array.push(&Source::Key(key))?;
    }
    query(client, &compared.plan.delete_unguarded, array.finish()).await?;
    Ok(())
}

/// Inserts the rows at these places; gives those that are refused.
pub(super) async fn insert(
    client: &Client,
    compared: &Compared,
    rows: &[Row],
    places: Vec<usize>,
) -> Result<Vec<(usize, String)>, Error> {
    let images = places
        .into_iter()
        .filter_map(|at| Some((at, rows.get(at)?.after.image.as_ref())));
    let mut refused = Vec::new();
    for of in by_description(compared, images) {
        let plan = match &of.plan {
            Ok(plan) => plan,
            // No row of it would come in: nothing is put back before the table is mended.
            Err(why) => return Err(Error::Refused(why.clone())),
        };
        if insert_some(client, plan, &of.rows).await?.is_none() {
            continue;
        }
        for row in &of.rows {
            if let Some(why) = insert_some(client, plan, std::slice::from_ref(row)).await? {
                refused.push((row.0, why));
            }
        }
    }
    Ok(refused)
}

/// Why they are refused, if they are; then none is there.
async fn insert_some(
    client: &Client,
    plan: &Plan,
    rows: &[(usize, &RowImage)],
) -> Result<Option<String>, Error> {
    let mut array = plan.rows();
    for (_, row) in rows {
        if let Err(error) = array.push(&Source::Row(row)) {
            return Ok(Some(error.to_string()));
        }
    }
    client.batch_execute("SAVEPOINT part").await?;
    match query(client, &plan.insert, array.finish()).await {
        Ok(_) => {
            client.batch_execute("RELEASE part").await?;
            Ok(None)
        }
        Err(error) if is_of_a_row(&error) => {
            client.batch_execute("ROLLBACK TO part; RELEASE part").await?;
            Ok(Some(crate::error::sql(&error)))
        }
        Err(error) => Err(error.into()),
    }
}

/// Writes down what was done to each row; how many were written or deleted.
pub(super) async fn say(
    client: &Client,
    compared: &Compared,
    rows: &[Row],
    record: &mut Record,
) -> Result<u64, Error> {
    let mut array = compared.plan.rows();
    for row in rows {
        array.push(&Source::Key(&row.image))?;
    }
    let mut lines = Vec::new();
    let mut count = 0;
    for told in query(client, &compared.keys_sql(), array.finish()).await? {
        let Some(row) = rows.get(place(&told)?) else {
            continue;
        };
        let Some(did) = row.did else { continue };
        let mut line = Line::of(did, &table_name(compared)).with_json("key", told.try_get(1)?);
        if did == KEPT {
            let was = json_of(client, compared, row.after.image.as_ref()).await?;
            line = line.with_json("was", &was);
        } else {
            count += 1;
        }
        if did == BACK_AGAIN {
            let back = json_of(client, compared, row.after.image.as_ref()).await?;
            line = line.with_json("row", &back);
        }
        lines.push(line);
    }
    // Before the commit: rather told twice than not at all.
    record.add(&lines).map_err(io("write the record"))?;
    Ok(count)
}

/// A row for people, as JSON; null for none.
pub(super) async fn json_of(
    client: &Client,
    compared: &Compared,
    image: Option<&(Arc<TableDesc>, RowImage)>,
) -> Result<String, Error> {
    match image {
        Some(image) => Ok(shown(client, compared, image).await?.1),
        None => Ok("null".to_owned()),
    }
}

/// A row's key and all of it, as JSON; as they were sent, where the table here does not take them.
pub(super) async fn shown(
    client: &Client,
    compared: &Compared,
    (desc, row): &(Arc<TableDesc>, RowImage),
) -> Result<(String, String), Error> {
    let source = Source::Row(row);
    if let Ok(plan) = compared.plan_of(desc) {
        // What `jsonb` does not take, `json` does.
        for sql in [&plan.render, &plan.render_json] {
            let mut array = plan.rows();
            if array.push(&source).is_err() {
                break;
            }
            let asked = query(client, sql, array.finish_rendering());
            match pg::attempt(client, asked).await? {
                Ok(told) => {
                    if let Some(told) = told.first() {
                        return Ok((told.try_get(0)?, told.try_get(1)?));
                    }
                }
                Err(error) if is_of_a_row(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(raw_json(desc, &source))
}
