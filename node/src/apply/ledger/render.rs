//! Rows of log lines as JSON, made by the server, many at once.
//!
//! In:   images of losses            Out: the text of `to_jsonb` for each
//! Invariants: an image that no table here can take is shown as what it is, and ends nothing

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::TableDesc;
use serde_json::value::{RawValue, to_raw_value};

use super::super::failure::Failure;
use super::super::loss::{KeyFrom, Loss, Tuple};
use super::super::plan::{Plan, Source};
use super::super::write::{Mode, Writer, parameters, references};

/// An image's key columns and whole row, as JSON.
type Rendered = (String, String);

/// What a line shows of the rows.
pub(super) struct Shown {
    pub(super) key: String,
    pub(super) local: Option<String>,
    pub(super) remote: Option<String>,
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
    /// Reads a loss's rows back from the journal, where they are only named.
    pub(super) fn read_rows(&self, loss: &mut Loss) -> Result<(), Failure> {
        for tuple in [&mut loss.local_tuple, &mut loss.remote_tuple] {
            let (version, key) = match &*tuple {
                Tuple::Journal(version) => (*version, loss.key.clone()),
                Tuple::JournalOf(version, key) => (*version, key.clone()),
                _ => continue,
            };
            let found = self.lookup.row(version, &loss.table, &key)?;
            // A write decoded a moment ago may be on its way into the journal.
            if found.is_none()
                && self.lookup.journal().written_vector().get(version.origin()) < version.position
            {
                return Err(Failure::Raced);
            }
            *tuple = found.map_or(Tuple::None, |(table, row)| Tuple::Image(table, row));
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
            places.push((key, local, remote));
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
            .map(|(loss, (key, local, remote))| Shown {
                key: rendered
                    .get(key)
                    .map_or_else(|| "{}".to_owned(), |(key, _)| key.clone()),
                local: row(local, &loss.local_tuple),
                remote: row(remote, &loss.remote_tuple),
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
        let Ok(plan) = self.session.plan(&first.table).await else {
            return Ok(None);
        };
        let mut rows = plan.rows();
        for image in images {
            if rows.push(&image.source()).is_err() {
                return Ok(None);
            }
        }
        let (array, _) = rows.finish();
        let statement = self.session.prepare(&plan.render).await?;
        let params = parameters(array, None, Vec::new());
        // An image that the server refused as a row it refuses here as well.
        if self.mode == Mode::Cautious {
            self.session.client.batch_execute("SAVEPOINT render").await?;
        }
        let rendered = self.session.client.query(&statement, &references(&params)).await;
        let rows = match rendered.map_err(Failure::from) {
            Ok(rows) => rows,
            Err(failure) if self.mode == Mode::Cautious && !failure.is_transient() => {
                let undo = "ROLLBACK TO SAVEPOINT render; RELEASE SAVEPOINT render";
                self.session.client.batch_execute(undo).await?;
                return Ok(None);
            }
            Err(failure) => return Err(failure),
        };
        if self.mode == Mode::Cautious {
            self.session
                .client
                .batch_execute("RELEASE SAVEPOINT render")
                .await?;
        }
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
    /// table here cannot take is shown as what it is: names and bytes.
    async fn render_one(&mut self, table: &Arc<TableDesc>, source: &Source<'_>) -> Result<Rendered, Failure> {
        let plan = match self.session.plan(table).await {
            Ok(plan) => plan,
            Err(error) => {
                let failure = Failure::from(error);
                return if failure.is_transient() {
                    Err(failure)
                } else {
                    Ok(raw_json(table, source))
                };
            }
        };
        let mut rows = plan.rows();
        if rows.push(source).is_err() {
            return Ok(raw_json(table, source));
        }
        let (array, _) = rows.finish();
        let statement = self.session.prepare(&plan.render).await?;
        let params = parameters(array, None, Vec::new());
        // An image that the server refused as a row it refuses here as well.
        let cautious = self.mode == Mode::Cautious;
        if cautious {
            self.session.client.batch_execute("SAVEPOINT render").await?;
        }
        let rendered = self
            .session
            .client
            .query_one(&statement, &references(&params))
            .await;
        match rendered.map_err(Failure::from) {
            Err(failure) if cautious && !failure.is_transient() => {
                let undo = "ROLLBACK TO SAVEPOINT render; RELEASE SAVEPOINT render";
                self.session.client.batch_execute(undo).await?;
                Ok(raw_json(table, source))
            }
            Err(failure) => Err(failure),
            Ok(row) => {
                if cautious {
                    self.session
                        .client
                        .batch_execute("RELEASE SAVEPOINT render")
                        .await?;
                }
                let shown = with_missing(&plan, table, source, row.try_get(1)?);
                Ok((row.try_get(0)?, shown))
            }
        }
    }
}

/// Adds the values of columns that the table here does not have, as names and bytes.
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
        if let Ok(value) = to_raw_value(&raw_value(cell)) {
            columns.insert(column.name.clone(), value);
        }
    }
    serde_json::to_string(&columns).unwrap_or(shown)
}

/// Text as text, binary in hexadecimal.
fn raw_value(cell: Cell<'_>) -> serde_json::Value {
    match cell {
        Cell::Null | Cell::Unchanged => serde_json::Value::Null,
        Cell::Text(text) => String::from_utf8_lossy(text).into_owned().into(),
        Cell::Binary(bytes) => format!("\\x{}", hex::encode(bytes)).into(),
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

/// Names and values of an image that no table here can read: text as text, binary in hexadecimal.
fn raw_json(table: &TableDesc, source: &Source<'_>) -> Rendered {
    let object = |names: Vec<&str>, image: &RowImage| {
        let values = image.cells().map(raw_value);
        let map: BTreeMap<&str, serde_json::Value> = names.into_iter().zip(values).collect();
        serde_json::json!(map).to_string()
    };
    let key_names: Vec<&str> = table.key_columns().map(|column| column.name.as_str()).collect();
    match source {
        Source::Key(key) => {
            let json = object(key_names, key);
            (json.clone(), json)
        }
        Source::Row(row) => {
            let names = table.columns.iter().map(|column| column.name.as_str()).collect();
            let key = table
                .key_image(row)
                .map_or_else(|_| "{}".to_owned(), |key| object(key_names, &key));
            (key, object(names, row))
        }
    }
}
