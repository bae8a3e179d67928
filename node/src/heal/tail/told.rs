//! Lines of the conflict log for deletes that what is put back has come over: somebody deleted a row on the new primary, and what the
//! lost tail had made of it is back.
//!
//! In:   rows of which that is known            Out: lines of `anabranch.conflict_history`, in the transaction that puts them back
//! Holds: JSON of some lines
//! Invariants: each of these rows has its line, however many they are: the delete is nowhere else
//! Not here: which rows these are ([`super`])
//!
//! They are this node's alone. The delete has no stamp and no place in any stream, so no other node has ever heard of it, and none has a
//! conflict.

use std::collections::BTreeMap;

use anabranch_conflict::policy::Policies;
use serde::Serialize;
use serde_json::json;
use serde_json::value::RawValue;
use tokio_postgres::Client;

use super::super::Error;
use super::rows::shown;
use super::{BACK_AGAIN, Row};
use crate::config::Config;
use crate::review::as_jsonb;
use crate::verify::table::Compared;

/// When the row was deleted nobody knows: the time of the line is that of the heal.
const INSERT: &str = "INSERT INTO anabranch.conflict_history (conflict_id, node, node_id, schema_name, table_name, key, \
    conflict_type, policy, policy_version, conflict_resolution, loser, remote_tuple, applied_tuple, changed_columns, \
    lost_columns, redacted_columns, local_origin, remote_origin, remote_lsn, remote_stamp, error) \
    SELECT gen_random_uuid(), $1::text, $2::int4, $3::text, $4::text, r.key, 'update_deleted', $5::text, $6::text, \
    'apply_remote', 'local', r.tuple, r.tuple, r.changed, '{}'::text[], nullif($7::text[], '{}'), $2::int4, r.origin, r.lsn, r.stamp, \
    $8::text::jsonb FROM jsonb_to_recordset($9::text::jsonb) \
    AS r(key jsonb, tuple jsonb, changed text[], origin int, lsn pg_lsn, stamp text)";

const WHY: &str = "the delete was made on this server since it was promoted, before `anabranch heal` had put back what it lacked: it \
    had not met the write that is back, which the other nodes had, and nobody else has heard of it";

/// Bytes of JSON that are inserted at once, but for one line.
const LINES_BYTES: usize = 8 << 20;
/// A row of more bytes of JSON is in the record alone: the server takes 256 MiB as one value.
const ROW_BYTES_MAX: usize = 192 << 20;

/// A row's columns; their values stay the text that the server made.
type Columns = BTreeMap<String, Box<RawValue>>;

#[derive(Serialize)]
struct Line {
    key: Columns,
    #[serde(skip_serializing_if = "Option::is_none")]
    tuple: Option<Columns>,
    changed: Vec<String>,
    origin: u16,
    lsn: String,
    stamp: String,
}

/// Writes the lines of those of `rows` that had been deleted. Their values are not in the log where they are to be redacted.
pub(super) async fn tell(
    client: &Client,
    (config, policies): (&Config, &Policies),
    compared: &Compared,
    rows: &[Row],
) -> Result<(), Error> {
    let (schema, name) = (&compared.desc.schema, &compared.desc.name);
    let redacted: Vec<&str> = config.conflict_log.redacted(schema, name).collect();
    let node = i32::from(config.node.id.0);
    let (policy, version) = (policies.of(schema, name).to_string(), policies.hash());
    let error = json!({ "sqlstate": null, "message": WHY, "detail": null }).to_string();
    let mut deleted = rows.iter().filter(|row| row.did == Some(BACK_AGAIN)).peekable();
    let mut lines = String::new();
    while let Some(row) = deleted.next() {
        if let Some(line) = line(client, compared, row, &redacted).await? {
            lines.push(if lines.is_empty() { '[' } else { ',' });
            lines.push_str(&line);
        }
        if lines.is_empty() || lines.len() < LINES_BYTES && deleted.peek().is_some() {
            continue;
        }
        lines.push(']');
        client
            .execute(
                INSERT,
                &[
                    &config.node.name,
                    &node,
                    schema,
                    name,
                    &policy,
                    &version,
                    &redacted,
                    &error,
                    &std::mem::take(&mut lines),
                ],
            )
            .await?;
    }
    Ok(())
}

async fn line(
    client: &Client,
    compared: &Compared,
    row: &Row,
    redacted: &[&str],
) -> Result<Option<String>, Error> {
    let Some(image) = &row.after.image else {
        return Ok(None);
    };
    let (key, tuple) = shown(client, compared, image).await?;
    let type_of = |name: &str| compared.plan.type_of(name).to_owned();
    let tuple = match tuple.len() > ROW_BYTES_MAX {
        true => None,
        false => as_jsonb(client, &tuple, &type_of).await?,
    };
    let columns = |json: &str| serde_json::from_str::<Columns>(json).ok();
    let mut key = columns(&key).unwrap_or_default();
    let mut tuple = tuple.and_then(|tuple| columns(&compared.plan.without_generated(tuple)));
    let changed = tuple.iter().flat_map(BTreeMap::keys).cloned().collect();
    for columns in [Some(&mut key), tuple.as_mut()].into_iter().flatten() {
        columns.retain(|name, _| !redacted.contains(&name.as_str()));
    }
    let stamp = row.after.stamp;
    let line = Line {
        key,
        tuple,
        changed,
        origin: stamp.node.0,
        lsn: row.after.knows.get(stamp.node).lsn.to_string(),
        stamp: stamp.to_string(),
    };
    let text = serde_json::to_string(&line).map_err(|error| Error::Unreadable(error.to_string()))?;
    Ok(Some(text))
}
