//! Sequences that a promoted or restored server has set back are lifted above what its lost tail had handed out.
//!
//! In:   the tables as they are, keys that the tail wrote            Out: sequences that are past all of that; [`Lifted`]
//! Holds: what the catalog says of sequences
//! Invariants: a sequence only goes up, also under applications that draw from it meanwhile
//! On crash: run again; what is past already is left
//! Not here: how ids are divided among the nodes (`crate::setup::ids`)
//!
//! A sequence is lifted above every value in its columns that it would itself hand out again, and no further: values of other
//! nodes' shares do not count, unless it counts by one and so would give those, too.

use std::collections::BTreeMap;

use anabranch_proto::NodeId;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio_postgres::Client;

use super::Error;
use super::described::query;
use crate::apply::plan::Source;
use crate::config::{Config, Method};
use crate::setup::sequence::{self, Column, Depth, Sequence};
use crate::setup::snowflake;
use crate::setup::sql::literal;
use crate::verify::table::Compared;

/// So many values are drawn one by one; a sequence that is further behind is set.
const DRAWN_MAX: i128 = 1 << 20;
/// Keys that are read at once.
const KEYS_AT_ONCE: usize = 20_000;

/// A sequence that was lifted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lifted {
    /// `schema.name`, quoted as needed.
    pub sequence: String,
    /// It hands out nothing any more up to here. An id, where it makes snowflake ids.
    pub above: i64,
}

/// Sequences, and what of them is behind.
pub(super) struct Behind {
    all: sequence::Sequences,
    node: NodeId,
    /// Those that this role may not lift.
    foreign: Vec<String>,
}

impl Behind {
    /// What the sequences and the columns that they feed show.
    pub(super) async fn read(client: &Client, config: &Config) -> Result<Self, Error> {
        let tables = sequence::published(client, &config.postgres.publication).await?;
        let mut all = sequence::read(client, &tables, Depth::Values).await?;
        for each in &mut all.all {
            let base = base_ahead(each, &all.said, config.node.id);
            if let Some(column) = each.columns.first_mut() {
                column.ahead = column.ahead.max(base);
            }
        }
        Ok(Self {
            all,
            node: config.node.id,
            foreign: Vec::new(),
        })
    }

    /// Values in keys that the tail wrote count although their rows may be gone again.
    pub(super) async fn note_keys(
        &mut self,
        client: &Client,
        compared: &Compared,
        keys: &BTreeMap<Vec<u8>, bool>,
    ) -> Result<(), Error> {
        let (schema, name) = (&compared.desc.schema, &compared.desc.name);
        let is_of = |column: &Column| column.schema == *schema && column.table == *name;
        if !self.all.columns().any(is_of) {
            return Ok(());
        }
        let keys: Vec<&Vec<u8>> = keys.keys().collect();
        for some in keys.chunks(KEYS_AT_ONCE) {
            let images = some.iter().map(|key| compared.image_of_canonical(key));
            let images = images.collect::<Result<Vec<_>, _>>()?;
            let mut array = compared.plan.rows();
            for image in &images {
                array.push(&Source::Key(image))?;
            }
            for told in query(client, &compared.keys_sql(), array.finish()).await? {
                let key: Value = serde_json::from_str(&told.try_get::<_, String>(1)?).unwrap_or_default();
                self.note(schema, name, &key);
            }
        }
        Ok(())
    }

    fn note(&mut self, schema: &str, table: &str, key: &Value) {
        let value = |column: &Column| {
            let is_here = column.schema == schema && column.table == table;
            key.get(&column.name).filter(|_| is_here).and_then(Value::as_i64)
        };
        for sequence in &mut self.all.all {
            let (next, increment, max) = (sequence.next(), sequence.increment, sequence.max);
            for column in &mut sequence.columns {
                let found = value(column).filter(|value| comes(next, increment, max, *value));
                column.ahead = column.ahead.max(found);
            }
        }
        let (last, node) = (self.all.function.last, self.node);
        for column in &mut self.all.snowflakes {
            let found = value(column).filter(|&value| {
                let is_own = (value >> 12) & i64::from(snowflake::MAX_NODE) == i64::from(node.0);
                is_own
                    && value >= snowflake::LOWEST
                    && last.is_some_and(|last| snowflake::id(last, node) < value)
            });
            column.ahead = column.ahead.max(found);
        }
    }

    /// Lifts what is behind, as far as this role may.
    pub(super) async fn lift(&mut self, client: &Client) -> Result<Vec<Lifted>, Error> {
        let mut lifted = Vec::new();
        for sequence in &self.all.all {
            let ahead = sequence.columns.iter().filter_map(|column| column.ahead).max();
            if let (Some(next), Some(ahead)) = (sequence.next(), ahead) {
                if !may_lift(client, &sequence.sql_name()).await? {
                    self.foreign.push(sequence.sql_name());
                    continue;
                }
                lift(client, sequence, next, ahead).await?;
                lifted.push(Lifted {
                    sequence: sequence.sql_name(),
                    above: ahead,
                });
            }
        }
        if let (Some(step), Some((_, ahead))) = (snowflake::lift(&self.all), snowflake::ahead(&self.all)) {
            let name = "anabranch.snowflake_seq".to_owned();
            if may_lift(client, &name).await? && may_lift(client, "anabranch.snowflake_lift").await? {
                client.batch_execute(&step.sql).await?;
                lifted.push(Lifted {
                    sequence: name,
                    above: ahead,
                });
            } else {
                self.foreign.push(name);
            }
        }
        Ok(lifted)
    }

    /// Sequences of which it is not known whether they are behind, or that are not divided any more as this node has said: for
    /// people, where the server has gone back.
    pub(super) fn doubts(&self) -> Vec<String> {
        let used = self
            .all
            .all
            .iter()
            .filter(|sequence| !sequence.columns.is_empty());
        let foreign = self.foreign.iter().map(|name| not_let(name));
        let doubts = used.filter_map(|sequence| {
            let name = sequence.sql_name();
            let said = self.all.said.get(&(sequence.schema.clone(), sequence.name.clone()));
            let own = said.and_then(|said| said.get(&self.node));
            if own.is_some_and(|own| !own.is_kept_by(sequence)) {
                Some(format!(
                    "{name} is not divided any more as this node has told the others: run `anabranch sequences apply` here"
                ))
            } else {
                sequence.value.is_none().then(|| not_let(&name))
            }
        });
        foreign.chain(doubts).collect()
    }
}

fn not_let(name: &str) -> String {
    format!(
        "{name} may hand out again what rows have that were put back: the daemon's role may not read and lift it. Run \
         `anabranch sequences apply` here, and `anabranch init`, which grants that"
    )
}

async fn may_lift(client: &Client, name: &str) -> Result<bool, Error> {
    let row = client
        .query_one("SELECT has_sequence_privilege($1, 'UPDATE')", &[&name])
        .await?;
    Ok(row.try_get(0)?)
}

/// Would a sequence still hand this value out?
fn comes(next: Option<i128>, increment: i64, max: i64, value: i64) -> bool {
    let Some(next) = next.filter(|_| increment > 0) else {
        return false;
    };
    let value = i128::from(value);
    (next..=i128::from(max)).contains(&value) && (value - next).rem_euclid(i128::from(increment)) == 0
}

/// The highest value up to which other members may have counted by another rule, of those that an interleaved sequence would still
/// hand out.
fn base_ahead(
    sequence: &Sequence,
    said: &BTreeMap<(String, String), BTreeMap<NodeId, sequence::Said>>,
    node: NodeId,
) -> Option<i64> {
    let said = said.get(&(sequence.schema.clone(), sequence.name.clone()))?;
    let own = said.get(&node)?;
    let next = sequence.next()?;
    if own.method != Method::Interleave || own.increment != sequence.increment || sequence.increment <= 0 {
        return None;
    }
    let base = said
        .values()
        .filter_map(|said| said.base)
        .max()?
        .min(sequence.max);
    let base = i128::from(base);
    (base >= next)
        .then(|| base - (base - next).rem_euclid(i128::from(sequence.increment)))
        .and_then(|ahead: i128| i64::try_from(ahead).ok())
}

/// Draws values up to `ahead`, which whoever else draws cannot undo. Where that would take long the sequence is set at once: nobody
/// draws so many values between the look at it and the setting, which are one statement.
async fn lift(client: &Client, sequence: &Sequence, next: i128, ahead: i64) -> Result<(), Error> {
    let (name, ahead) = (sequence.sql_name(), i128::from(ahead));
    let count = (ahead - next) / i128::from(sequence.increment.max(1)) + 1;
    let text = literal(&name);
    if count <= DRAWN_MAX {
        let sql = format!("SELECT count(nextval({text})) FROM generate_series(1, {count})");
        client.query_one(&sql, &[]).await?;
    } else {
        let sql = format!("SELECT setval({text}, {ahead}, true) FROM {name} WHERE last_value < {ahead}");
        client.query_opt(&sql, &[]).await?;
    }
    Ok(())
}
