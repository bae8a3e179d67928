//! Rows of log lines as JSON, made by the server, many at once.
//!
//! In:   images of losses            Out: the text of `to_jsonb` for each
//! Invariants: an image that no table here can take is shown as what it is, said to be that ([`Unread`]), and ends nothing

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_conflict::record::classify;
use anabranch_conflict::{ConflictType, Kind};
use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::{ColumnDesc, TableDesc};
use serde_json::value::{RawValue, to_raw_value};
use tokio_postgres::types::ToSql;

use super::super::failure::Failure;
use super::super::loss::{KeyFrom, Loss, Tuple};
use super::super::plan::{Plan, Source};
use super::super::write::{Mode, Writer, parameters, references};
use crate::review::Unread;

/// An image's key columns and whole row, as JSON.
type Rendered = (String, String);

/// What a line shows of the rows.
pub(super) struct Shown {
    pub(super) key: String,
    pub(super) local: Option<String>,
    pub(super) remote: Option<String>,
    /// The row as it is folded of all versions, where there is one.
    pub(super) left: Option<String>,
}

impl Shown {
    /// Have both rows the same values in the columns of `table`?
    pub(super) fn is_same(&self, table: &TableDesc) -> bool {
        type Row = BTreeMap<String, Box<serde_json::value::RawValue>>;
        let read = |json: &Option<String>| serde_json::from_str::<Row>(json.as_deref()?).ok();
        let (Some(local), Some(remote)) = (read(&self.local), read(&self.remote)) else {
            return false;
        };
        let value = |row: &Row, name: &str| row.get(name).map(|raw| raw.get().to_owned());
        let mut columns = table.columns.iter();
        columns.all(|column| value(&local, &column.name) == value(&remote, &column.name))
    }
}

/// An image to render.
struct Image {
    table: Arc<TableDesc>,
    row: RowImage,
    whole: bool,
}

impl Image {
    fn source(&self) -> Source<'_> {
        if self.whole {
            Source::Row(&self.row)
        } else {
            Source::Key(&self.row)
        }
    }

    fn is(&self, table: &Arc<TableDesc>, row: &RowImage) -> bool {
        self.whole && Arc::ptr_eq(&self.table, table) && self.row.as_bytes() == row.as_bytes()
    }
}

impl Writer<'_> {
    /// Reads a loss's rows back from the journal, where they are only named; and with them what was said at their origin, which
    /// a version does not tell: that an INSERT met a row is called so, whichever of the two was decoded first.
    pub(super) fn read_rows(&self, loss: &mut Loss) -> Result<(), Failure> {
        let mut came = None;
        for (is_remote, tuple) in [(false, &mut loss.local_tuple), (true, &mut loss.remote_tuple)] {
            let (version, key) = match &*tuple {
                Tuple::Journal(version) => (*version, loss.key.clone()),
                Tuple::JournalOf(version, key) => (*version, key.clone()),
                _ => continue,
            };
            let appended = self.lookup.journal().appended_of(version.origin());
            let found = self.lookup.put(version, &loss.table, &key)?;
            // A write decoded a moment ago may be on its way into the journal.
            if found.is_none() && appended < version.position {
                return Err(Failure::Raced);
            }
            if is_remote {
                came = found.as_ref().map(|put| put.op);
            }
            *tuple = found.map_or(Tuple::None, |put| Tuple::Image(put.table, put.row));
        }
        // (Where columns are merged it is those of an update that were lost.)
        if loss.kind == ConflictType::UpdateOriginDiffers && loss.lost_columns.is_none() {
            loss.kind = came.map_or(loss.kind, |op| classify(op, Kind::Put));
        }
        Ok(())
    }

    /// What each line shows, in order. Their rows are at hand: see [`Self::read_rows`].
    pub(super) async fn render(&mut self, losses: &[Loss]) -> Result<Vec<Shown>, Failure> {
        let mut images: Vec<Image> = Vec::with_capacity(losses.len() * 2);
        let mut places = Vec::with_capacity(losses.len());
        for loss in losses {
            let [local, remote] = [&loss.local_tuple, &loss.remote_tuple].map(|tuple| match tuple {
                Tuple::Image(table, row) => Some(push(&mut images, table, row.clone(), true)),
                _ => None,
            });
            let left = match loss.left() {
                Some(Tuple::Image(table, row)) => Some(push(&mut images, table, row.clone(), true)),
                _ => None,
            };
            let shown = [local, remote].into_iter().flatten();
            let key = match &loss.key_from {
                KeyFrom::Row(row) => {
                    let same = shown
                        .into_iter()
                        .find(|at| images.get(*at).is_some_and(|image| image.is(&loss.table, row)));
                    same.unwrap_or_else(|| push(&mut images, &loss.table, row.clone(), true))
                }
                KeyFrom::Key(key) => push(&mut images, &loss.table, key.clone(), false),
                KeyFrom::Canonical => {
                    let key = loss.table.image_of_canonical(loss.key.canonical())?;
                    push(&mut images, &loss.table, key, false)
                }
            };
            places.push((key, local, remote, left));
        }
        let rendered = self.render_all(&images).await?;
        let row = |at: Option<usize>, tuple: &Tuple| match (at, tuple) {
            (Some(at), _) => rendered.get(at).map(|(_, row)| row.clone()),
            (None, Tuple::Json(json)) => Some(json.clone()),
            (None, _) => None,
        };
        Ok(losses
            .iter()
            .zip(places)
            .map(|(loss, (key, local, remote, left))| Shown {
                key: rendered
                    .get(key)
                    .map_or_else(|| "{}".to_owned(), |(key, _)| key.clone()),
                local: row(local, &loss.local_tuple),
                remote: row(remote, &loss.remote_tuple),
                left: row(left, &Tuple::None),
            })
            .collect())
    }

    /// One statement for all images of a table; one for each image where that is refused.
    async fn render_all(&mut self, images: &[Image]) -> Result<Vec<Rendered>, Failure> {
        let mut tables: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (at, image) in images.iter().enumerate() {
            let table = Arc::as_ptr(&image.table) as usize;
            tables.entry(table).or_default().push(at);
        }
        let mut out = vec![Rendered::default(); images.len()];
        for places in tables.into_values() {
            let some: Vec<&Image> = places.iter().filter_map(|&at| images.get(at)).collect();
            let rendered = match self.render_table(&some).await? {
                Some(rendered) if rendered.len() == some.len() => rendered,
                _ => {
                    let mut each = Vec::with_capacity(some.len());
                    for image in some {
                        each.push(self.render_one(&image.table, &image.source()).await?);
                    }
                    each
                }
            };
            for (at, text) in places.into_iter().zip(rendered) {
                if let Some(slot) = out.get_mut(at) {
                    *slot = text;
                }
            }
        }
        Ok(out)
    }

    /// None when they cannot be rendered together.
    async fn render_table(&mut self, images: &[&Image]) -> Result<Option<Vec<Rendered>>, Failure> {
        let Some(first) = images.first() else {
            return Ok(None);
        };
        let Some(plan) = self.session.plan_if_fit(&first.table).await? else {
            return Ok(None);
        };
        let mut rows = plan.rows();
        for image in images {
            if rows.push(&image.source()).is_err() {
                return Ok(None);
            }
        }
        let (array, beside) = rows.finish_rendering();
        let params = parameters(array, None, beside);
        // An image that the server refused as a row it refuses here as well.
        let guarded = self.mode == Mode::Cautious;
        let rendered = self
            .try_query(&plan.render, &references(&params), guarded)
            .await?;
        let Some(rows) = rendered else {
            return Ok(None);
        };
        let rendered = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
        let rendered = rendered.collect::<Result<Vec<Rendered>, tokio_postgres::Error>>()?;
        let whole = rendered.into_iter().zip(images).map(|((key, row), image)| {
            let row = with_missing(&plan, &image.table, &image.source(), row);
            (key, row)
        });
        Ok(Some(whole.collect()))
    }

    /// A key image as JSON.
    pub(crate) async fn render_key(
        &mut self,
        table: &Arc<TableDesc>,
        key: &RowImage,
    ) -> Result<String, Failure> {
        Ok(self.render_one(table, &Source::Key(key)).await?.0)
    }

    /// The server turns the image into JSON, so that it reads as the row itself would. An image that the
    /// table here cannot take is shown as what it is: names, and bytes that are marked as such.
    async fn render_one(&mut self, table: &Arc<TableDesc>, source: &Source<'_>) -> Result<Rendered, Failure> {
        let plan = match self.session.plan(table).await {
            Ok(plan) => plan,
            Err(error) => {
                let failure = Failure::from(error);
                if failure.is_transient() {
                    return Err(failure);
                }
                if let Source::Row(row) = source
                    && let Some((table, row)) = self.shown_as_here(table, row).await?
                {
                    return Box::pin(self.render_one(&table, &Source::Row(&row))).await;
                }
                return Ok(raw_json(table, source));
            }
        };
        let mut rows = plan.rows();
        if rows.push(source).is_err() {
            return Ok(raw_json(table, source));
        }
        let (array, beside) = rows.finish_rendering();
        let params = parameters(array, None, beside);
        let params = references(&params);
        // An image that the server refused as a row it refuses here as well.
        let guarded = self.mode == Mode::Cautious;
        let rendered = self.try_query(&plan.render, &params, guarded).await?;
        let (key, shown) = match rendered.as_deref() {
            Some([row]) => (row.try_get(0)?, row.try_get(1)?),
            Some(_) => return Ok(raw_json(table, source)),
            // It may be a value that only `jsonb` does not take.
            None => match self.render_any(&plan, &params).await? {
                Some(rendered) => rendered,
                None => return Ok(raw_json(table, source)),
            },
        };
        Ok((key, with_missing(&plan, table, source, shown)))
    }

    /// As [`Self::render_one`], of values that `jsonb` does not take. None where it is the table that does not take them.
    async fn render_any(
        &mut self,
        plan: &Plan,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Rendered>, Failure> {
        let rendered = self.try_query(&plan.render_json, params, true).await?;
        let Some(row) = rendered.as_ref().and_then(|rows| rows.first()) else {
            return Ok(None);
        };
        let shown = self.as_jsonb(plan, row.try_get(1)?).await?;
        let key: String = row.try_get(0)?;
        Ok(shown.map(|shown| (key, shown)))
    }
}

/// Adds the values of columns that the table here does not have, as what they were sent as.
fn with_missing(plan: &Plan, table: &TableDesc, source: &Source<'_>, shown: String) -> String {
    let Source::Row(row) = source else { return shown };
    if plan.missing.is_empty() {
        return shown;
    }
    // Raw: numbers of any length stay as they are.
    let Ok(mut columns) = serde_json::from_str::<BTreeMap<String, Box<RawValue>>>(&shown) else {
        return shown;
    };
    let described = table.columns.iter().zip(row.cells()).enumerate();
    for (_, (column, cell)) in described.filter(|(at, _)| plan.missing.contains(at)) {
        columns.insert(column.name.clone(), raw_value(cell, column));
    }
    serde_json::to_string(&columns).unwrap_or(shown)
}

/// Text as text, which is what reads as the value; a binary form as bytes, which nothing here reads.
fn raw_value(cell: Cell<'_>, column: &ColumnDesc) -> Box<RawValue> {
    match cell {
        Cell::Null | Cell::Unchanged => Box::default(),
        Cell::Text(text) => to_raw_value(&String::from_utf8_lossy(text)).unwrap_or_default(),
        Cell::Binary(bytes) => Unread::bytes(&column.type_name, bytes).to_json(),
    }
}

fn push(images: &mut Vec<Image>, table: &Arc<TableDesc>, row: RowImage, whole: bool) -> usize {
    images.push(Image {
        table: Arc::clone(table),
        row,
        whole,
    });
    images.len() - 1
}

/// Names and values of an image that no table here can read.
pub(crate) fn raw_json(table: &TableDesc, source: &Source<'_>) -> Rendered {
    match source {
        Source::Key(key) => {
            let json = raw_object(table.key_columns(), key);
            (json.clone(), json)
        }
        Source::Row(row) => {
            let key = table
                .key_image(row)
                .map_or_else(|_| "{}".to_owned(), |key| raw_object(table.key_columns(), &key));
            (key, raw_object(table.columns.iter(), row))
        }
    }
}

fn raw_object<'c>(columns: impl Iterator<Item = &'c ColumnDesc>, image: &RowImage) -> String {
    let values = columns.zip(image.cells());
    let map: BTreeMap<&str, Box<RawValue>> = values
        .map(|(column, cell)| (column.name.as_str(), raw_value(cell, column)))
        .collect();
    serde_json::to_string(&map).unwrap_or_else(|_| "{}".to_owned())
}
