//! The conflict log: lines into `anabranch.conflict_history`, in the apply transaction.
//!
//! In:   [`Loss`]es, their standing rows read        Out: rows of the log, one per losing version
//! Invariants: a line's id is made of table, key and losing version, so it is the same on every node, and a
//!        line that is there already stays as it is
//! Not here: deciding who lost ([`super::batch`], `crate::resolve`)

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use anabranch_conflict::{Version, conflict_id};
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::stamp::Stamp;

use super::failure::Failure;
use super::lookup;
use super::loss::{KeyFrom, Loser, Loss, Tuple};
use super::plan::Source;
use super::write::{Mode, Writer, parameters, references};
use crate::journal::Journal;
use crate::shared::{Counters, lock};

const INSERT: &str = "INSERT INTO anabranch.conflict_history (conflict_id, node, node_id, schema_name, table_name, \
    key, conflict_type, policy, conflict_resolution, loser, local_tuple, remote_tuple, applied_tuple, \
    local_origin, local_xid, local_lsn, local_commit_time, local_stamp, \
    remote_origin, remote_xid, remote_lsn, remote_commit_time, remote_stamp, apply_xid, error) \
    SELECT r.conflict_id, r.node, r.node_id, r.schema_name, r.table_name, r.key, r.conflict_type, r.policy, \
    r.conflict_resolution, r.loser, r.local_tuple, r.remote_tuple, r.applied_tuple, \
    r.local_origin, r.local_xid, r.local_lsn, to_timestamp(r.local_us / 1000000.0), r.local_stamp, \
    r.remote_origin, r.remote_xid, r.remote_lsn, to_timestamp(r.remote_us / 1000000.0), r.remote_stamp, \
    r.apply_xid, r.error \
    FROM jsonb_to_recordset($1::text::jsonb) AS r(conflict_id uuid, node text, node_id int, schema_name text, \
    table_name text, key jsonb, conflict_type text, policy text, conflict_resolution text, loser text, \
    local_tuple jsonb, remote_tuple jsonb, applied_tuple jsonb, local_origin int, local_xid int8, \
    local_lsn pg_lsn, local_us numeric, local_stamp text, remote_origin int, remote_xid int8, remote_lsn pg_lsn, \
    remote_us numeric, remote_stamp text, apply_xid int8, error jsonb) \
    ON CONFLICT (conflict_id) DO NOTHING";

/// An image's key columns and whole row, as JSON.
type Rendered = (String, String);

impl Writer<'_> {
    /// Writes the lines of `losses`.
    pub(crate) async fn record(&mut self, losses: &mut Vec<Loss>, journal: &Journal) -> Result<(), Failure> {
        // Several writes of one row by one transaction lost together: the last is what the row would have been.
        let mut seen = std::collections::HashSet::new();
        let mut last: Vec<Loss> = std::mem::take(losses)
            .into_iter()
            .rev()
            .filter(|loss| seen.insert((loss.key.clone(), loss.losing().map(|version| version.stamp))))
            .collect();
        last.reverse();
        *losses = last;
        for chunk in losses.chunks_mut(256) {
            self.record_some(chunk, journal).await?;
        }
        losses.clear();
        Ok(())
    }

    async fn record_some(&mut self, losses: &mut [Loss], journal: &Journal) -> Result<(), Failure> {
        let mut json = String::from("[");
        let mut rendered = self.render(losses, journal).await?.into_iter();
        for loss in losses.iter() {
            let Some((key, local, remote)) = rendered.next() else {
                break;
            };
            if json.len() > 1 {
                json.push(',');
            }
            self.line(&mut json, loss, &key, local.as_deref(), remote.as_deref());
        }
        json.push(']');
        let statement = self.session.prepare(INSERT).await?;
        let written = self.session.client.execute(&statement, &[&json]).await?;
        Counters::add(&self.shared.counters.conflicts, written);
        Ok(())
    }

    /// Per loss: key, local row, remote row as JSON.
    async fn render(
        &mut self,
        losses: &mut [Loss],
        journal: &Journal,
    ) -> Result<Vec<(String, Option<String>, Option<String>)>, Failure> {
        let mut out = Vec::with_capacity(losses.len());
        for loss in losses {
            for tuple in [&mut loss.local_tuple, &mut loss.remote_tuple] {
                if let Tuple::Journal(version) = *tuple {
                    let found = lookup::row(journal, version, &loss.table, &loss.key)?;
                    // A write decoded a moment ago may be on its way into the journal.
                    if found.is_none() && journal.written_vector().get(version.origin()) < version.position {
                        return Err(Failure::Raced);
                    }
                    *tuple = found.map_or(Tuple::None, |(table, row)| Tuple::Image(table, row));
                }
            }
            let key = match &loss.key_from {
                KeyFrom::Row(row) => self.render_one(&loss.table, &Source::Row(row)).await?.0,
                KeyFrom::Key(key) => self.render_one(&loss.table, &Source::Key(key)).await?.0,
                KeyFrom::Canonical => {
                    let key = loss.table.image_of_canonical(loss.key.canonical())?;
                    self.render_one(&loss.table, &Source::Key(&key)).await?.0
                }
            };
            let local = self.render_tuple(&loss.local_tuple).await?;
            let remote = self.render_tuple(&loss.remote_tuple).await?;
            out.push((key, local, remote));
        }
        Ok(out)
    }

    /// A key image as JSON.
    pub(crate) async fn render_key(
        &mut self,
        table: &Arc<TableDesc>,
        key: &RowImage,
    ) -> Result<String, Failure> {
        Ok(self.render_one(table, &Source::Key(key)).await?.0)
    }

    async fn render_tuple(&mut self, tuple: &Tuple) -> Result<Option<String>, Failure> {
        Ok(match tuple {
            Tuple::None | Tuple::Standing(_) | Tuple::Journal(_) => None,
            Tuple::Json(json) => Some(json.clone()),
            Tuple::Image(table, row) => Some(self.render_one(table, &Source::Row(row)).await?.1),
        })
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
                Ok((row.try_get(0)?, row.try_get(1)?))
            }
        }
    }

    fn line(&self, out: &mut String, loss: &Loss, key: &str, local: Option<&str>, remote: Option<&str>) {
        let losing = loss.losing().map_or(Stamp::ZERO, |version| version.stamp);
        let id = conflict_id(&loss.table.schema, &loss.table.name, loss.key.canonical(), losing);
        let applied = match (loss.refusal.is_some(), loss.loser) {
            (true, _) | (false, Loser::Remote) => local,
            (false, Loser::Local) => remote,
        };
        let mut object = Object::begin(out);
        object.text("conflict_id", &id.to_string());
        object.text("node", self.node_name);
        object.raw("node_id", &self.shared.node.0.to_string());
        object.text("schema_name", &loss.table.schema);
        object.text("table_name", &loss.table.name);
        object.raw("key", key);
        object.text("conflict_type", loss.kind.as_str());
        object.text("policy", "last_update_wins");
        object.text("conflict_resolution", loss.resolution.as_str());
        object.text(
            "loser",
            if loss.loser == Loser::Local {
                "local"
            } else {
                "remote"
            },
        );
        for (name, tuple) in [
            ("local_tuple", local),
            ("remote_tuple", remote),
            ("applied_tuple", applied),
        ] {
            object.raw(name, tuple.unwrap_or("null"));
        }
        self.side(&mut object, "local", loss.local);
        self.side(&mut object, "remote", loss.remote);
        object.raw("apply_xid", &self.xid.to_string());
        if let Some(refusal) = &loss.refusal {
            let error = serde_json::json!({
                "sqlstate": refusal.sqlstate, "message": refusal.message, "detail": refusal.detail,
            });
            object.raw("error", &error.to_string());
        }
        object.end();
    }

    fn side(&self, object: &mut Object<'_>, side: &str, version: Option<Version>) {
        let Some(version) = version else { return };
        object.raw(&format!("{side}_origin"), &version.origin().0.to_string());
        object.text(&format!("{side}_stamp"), &version.stamp.to_string());
        let info = lock(&self.shared.recent).get(version.stamp);
        let lsn = info.map_or(version.position.lsn, |info| info.lsn);
        object.text(&format!("{side}_lsn"), &lsn.to_string());
        if let Some(info) = info {
            object.raw(&format!("{side}_xid"), &info.xid.to_string());
            object.raw(&format!("{side}_us"), &info.commit_us.to_string());
        }
    }
}

/// Writes a JSON object whose values may be JSON already: tuples come from the server and stay as they are.
struct Object<'a> {
    out: &'a mut String,
    first: bool,
}

impl<'a> Object<'a> {
    fn begin(out: &'a mut String) -> Self {
        out.push('{');
        Self { out, first: true }
    }

    fn raw(&mut self, name: &str, json: &str) {
        let comma = if self.first { "" } else { "," };
        self.first = false;
        let _ = write!(self.out, "{comma}\"{name}\":{json}");
    }

    fn text(&mut self, name: &str, text: &str) {
        self.raw(name, &serde_json::Value::from(text).to_string());
    }

    fn end(self) {
        self.out.push('}');
    }
}

/// Names and values of an image that no table here can read: text as text, binary in hexadecimal.
fn raw_json(table: &TableDesc, source: &Source<'_>) -> Rendered {
    use anabranch_proto::row::Cell;
    let object = |names: Vec<&str>, image: &RowImage| {
        let values = image.cells().map(|cell| match cell {
            Cell::Null | Cell::Unchanged => serde_json::Value::Null,
            Cell::Text(text) => String::from_utf8_lossy(text).into_owned().into(),
            Cell::Binary(bytes) => format!("\\x{}", hex::encode(bytes)).into(),
        });
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
