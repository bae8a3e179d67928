//! One line of the log as JSON: the losing version and what it met, with redacted columns left out.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use anabranch_conflict::clock::{Shifted, shifted};
use anabranch_conflict::record::{foreign_key_id, refused_fold_id};
use anabranch_conflict::{ConflictType, Kind, Version, conflict_id};
use anabranch_proto::stamp::Stamp;
use anabranch_proto::{NodeId, Position};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::super::failure::Failure;
use super::super::loss::{Loser, Loss};
use super::super::write::Writer;
use super::render::Shown;
use crate::config::ConflictLog;
use crate::recent::TxnInfo;
use crate::resolve::Folding;
use crate::review::Unread;
use crate::shared::lock;

/// A row's columns; their values stay the text that the server made.
type Columns = BTreeMap<String, Box<RawValue>>;

/// A line's id, and the stamp that its time is taken from. `is_refused_fold`: see [`Writer::is_refused_fold`].
pub(super) fn name(loss: &Loss, is_refused_fold: bool) -> (Uuid, Stamp) {
    let foreign_key = loss.foreign_key();
    let losing = match (loss.losing(), loss.winning(), foreign_key) {
        (Some(losing), ..) => losing.stamp,
        // Which version the row has is not known everywhere: see `super::super::orphans`.
        (None, Some(removal), Some(_)) => removal.stamp,
        _ => Stamp::ZERO,
    };
    let (schema, table, canonical) = (&loss.table.schema, &loss.table.name, loss.key.canonical());
    let id = match foreign_key {
        Some(constraint) => foreign_key_id(schema, table, constraint, canonical, losing),
        None if is_refused_fold => refused_fold_id(schema, table, canonical, losing),
        None => conflict_id(schema, table, canonical, losing),
    };
    (id, losing)
}

impl Writer<'_> {
    /// Is it about a row whose columns may be of several versions, and that the server refuses? The one that names it may have lost columns to
    /// another, and has a line for that.
    pub(super) fn is_refused_fold(&self, loss: &Loss) -> bool {
        let merging = || lock(&self.shared.resolver).merging(loss.key.table());
        loss.keeps_row_out() && matches!(merging(), Some(Folding::Columns(_)))
    }

    pub(super) fn line(
        &self,
        out: &mut String,
        loss: &Loss,
        shown: Shown,
        config: &ConflictLog,
    ) -> Result<(), Failure> {
        let (id, losing) = name(loss, self.is_refused_fold(loss));
        let (schema, table, foreign_key) = (&loss.table.schema, &loss.table.name, loss.foreign_key());
        let columns =
            |json: Option<String>| json.and_then(|json| serde_json::from_str::<Columns>(&json).ok());
        let (mut key, mut local, mut remote) = (
            columns(Some(shown.key)).unwrap_or_default(),
            columns(shown.local),
            columns(shown.remote),
        );
        let mut left = columns(shown.left);
        let is_folded = loss.left().is_some();
        // What is left at `key` itself: two rows that claim one unique value have different keys.
        let applied = match (loss.kind, loss.refusal.is_some(), loss.loser) {
            _ if is_folded => None,
            (ConflictType::MultipleUniqueConflicts, ..) => None,
            // The row is there, without its parent.
            (ConflictType::ForeignKeyMissing, _, Loser::Local) => Some("local"),
            (ConflictType::ForeignKeyMissing, _, Loser::Remote) => Some("remote"),
            (_, true, _) | (_, false, Loser::Remote) => Some("local"),
            (_, false, Loser::Local) => Some("remote"),
        };
        let changed = match foreign_key {
            Some(_) => Vec::new(),
            None => differing(local.as_ref(), remote.as_ref()),
        };
        let lost = match if loss.loser == Loser::Local {
            &local
        } else {
            &remote
        } {
            Some(losing) => match loss.lost_columns.as_ref().and_then(|lost| lost.columns.clone()) {
                Some(columns) => columns,
                None => {
                    let applied = match applied {
                        Some("local") => local.as_ref(),
                        Some(_) => remote.as_ref(),
                        None => left.as_ref(),
                    };
                    differing(Some(losing), applied)
                }
            },
            None => Vec::new(),
        };
        let redacted: Vec<&str> = config.redacted(schema, table).collect();
        let shown = [Some(&mut key), local.as_mut(), remote.as_mut(), left.as_mut()];
        for columns in shown.into_iter().flatten() {
            columns.retain(|name, _| !redacted.contains(&name.as_str()));
        }
        let types = &loss.table.columns;
        let type_of = |name: &str| {
            let column = types.iter().find(|column| column.name == name);
            column.map(|column| column.type_name.as_str()).unwrap_or_default()
        };
        shorten([&mut local, &mut remote, &mut left], &type_of);
        let mut object = Object::begin(out);
        object.text("conflict_id", &id.to_string());
        object.raw("lost_us", &losing.unix_us().to_string());
        object.text("node", self.node_name);
        object.raw("node_id", &self.shared.node.0.to_string());
        object.text("schema_name", schema);
        object.text("table_name", table);
        object.json("key", &key);
        let clock = self.clock_error(loss)?;
        let kind = clock.as_ref().map_or(loss.kind, |_| ConflictType::ClockDrift);
        object.text("conflict_type", kind.as_str());
        let (policy, version) = lock(&self.shared.resolver).policy_in_words(&loss.table, &loss.key);
        object.text("policy", &policy);
        object.text("policy_version", &version);
        object.text("conflict_resolution", loss.resolution.as_str());
        object.text(
            "loser",
            if loss.loser == Loser::Local {
                "local"
            } else {
                "remote"
            },
        );
        if loss.keeps_row_out() {
            object.raw("kept_out", "true");
        }
        if let (true, Some(version)) = (loss.is_decoded, loss.local) {
            let decoded = match version.kind {
                Kind::Put => "row",
                Kind::Delete => "gone",
            };
            object.text("decoded", decoded);
        }
        let tuples = [
            ("local_tuple", &local),
            ("remote_tuple", &remote),
            ("applied_tuple", &left),
        ];
        for (name, tuple) in tuples {
            if let Some(tuple) = tuple {
                object.json(name, tuple);
            }
        }
        if let Some(applied) = applied {
            object.text("applied", applied);
        }
        object.json("changed_columns", &changed);
        object.json("lost_columns", &lost);
        if !redacted.is_empty() {
            object.json("redacted_columns", &redacted);
        }
        self.side(&mut object, "local", loss.local, loss.remote)?;
        self.side(&mut object, "remote", loss.remote, loss.local)?;
        if losing != Stamp::ZERO && !loss.is_unheard() {
            object.text("transaction_group", &losing.to_string());
        }
        object.raw("apply_xid", &self.xid.to_string());
        if let Some(refusal) = loss.refusal.as_ref().or(loss.reason.as_ref()) {
            // The server's words may repeat any value of the row.
            let shown = |text: Option<&String>| match (text, redacted.is_empty()) {
                (Some(text), true) => Some(text.clone()),
                (Some(_), false) => Some("(not shown: columns of this table are redacted)".to_owned()),
                (None, _) => None,
            };
            let parents = refusal.parents.as_ref();
            let error = Error {
                sqlstate: Some(&refusal.sqlstate),
                message: shown(Some(&refusal.message)),
                detail: shown(refusal.detail.as_ref()),
                context: shown(refusal.context.as_ref()),
                conflict_type: None,
                parents: parents.filter(|parents| may_be_shown(parents, config)),
            };
            object.json("error", &error);
            if let Some(constraint) = &refusal.constraint {
                object.text("constraint_name", constraint);
            }
        } else if let Some(message) = clock {
            let error = Error {
                message: Some(message),
                conflict_type: Some(loss.kind.as_str()),
                ..Error::default()
            };
            object.json("error", &error);
        }
        object.end();
        Ok(())
    }

    /// Of two versions between which the time decided: which of them have another one than that of their commit, and what met what. From the
    /// headers alone, so all nodes say the same.
    fn clock_error(&self, loss: &Loss) -> Result<Option<String>, Failure> {
        let decided = loss.refusal.is_none() && loss.reason.is_none() && loss.kind.is_of_two_versions();
        let kinds = [loss.local, loss.remote].map(|version| version.map(|version| version.kind));
        let of_delete = kinds.contains(&Some(Kind::Delete)) && kinds.contains(&Some(Kind::Put));
        if !decided || !lock(&self.shared.resolver).goes_by_time(&loss.table, &loss.key, of_delete) {
            return Ok(None);
        }
        let mut said = Vec::new();
        for version in [loss.local, loss.remote].into_iter().flatten() {
            let info = self.info(version)?;
            let shifted = info.and_then(|info| shifted(version.stamp, info.commit_us));
            said.extend(shifted.map(|shifted| in_words(version.origin(), shifted)));
        }
        said.dedup();
        Ok((!said.is_empty()).then(|| {
            let said = said.join("; ");
            format!(
                "{}, and not the times of the commits decided it: {said}",
                loss.kind
            )
        }))
    }

    /// The transaction of a version. After a restart it is among the recent ones only if it was met again since; what is not stable
    /// is in the journal.
    fn info(&self, version: Version) -> Result<Option<TxnInfo>, Failure> {
        if version.origin() == NodeId(0) || version.position == Position::ZERO {
            return Ok(None);
        }
        if let Some(info) = lock(&self.shared.recent).get(version.stamp) {
            return Ok(Some(info));
        }
        Ok(self.lookup.header(version)?.map(|header| TxnInfo {
            xid: header.xid,
            commit_us: header.commit_us,
            lsn: header.position.lsn,
            deps: Arc::new(header.deps),
        }))
    }

    fn side(
        &self,
        object: &mut Object<'_>,
        side: &str,
        version: Option<Version>,
        other: Option<Version>,
    ) -> Result<(), Failure> {
        // What is nobody's version has none.
        let Some(version) = version.filter(|version| version.origin() != NodeId(0)) else {
            return Ok(());
        };
        object.raw(&format!("{side}_origin"), &version.origin().0.to_string());
        object.text(&format!("{side}_stamp"), &version.stamp.to_string());
        let info = self.info(version)?;
        let lsn = info.as_ref().map_or(version.position.lsn, |info| info.lsn);
        object.text(&format!("{side}_lsn"), &lsn.to_string());
        if let Some(info) = info {
            object.raw(&format!("{side}_xid"), &info.xid.to_string());
            object.raw(&format!("{side}_us"), &info.commit_us.to_string());
            if let Some(other) = other {
                let saw = info.deps.get(other.origin()).lsn;
                object.text(&format!("{side}_saw"), &saw.to_string());
            }
        }
        Ok(())
    }
}

/// The column `error` of a line.
#[derive(Default, serde::Serialize)]
struct Error<'a> {
    sqlstate: Option<&'a str>,
    message: Option<String>,
    detail: Option<String>,
    context: Option<String>,
    /// Of `clock_drift`: what it is but for the times.
    #[serde(skip_serializing_if = "Option::is_none")]
    conflict_type: Option<&'static str>,
    /// Rows that a parent is made of again, as the text of JSON that the server wrote: it stays as it is to the last digit, and
    /// `jsonb` need not take its values.
    #[serde(skip_serializing_if = "Option::is_none")]
    parents: Option<&'a String>,
}

/// Is nothing of these rows to be kept out of the log?
fn may_be_shown(parents: &str, config: &ConflictLog) -> bool {
    #[derive(serde::Deserialize)]
    struct Parent {
        schema: String,
        table: String,
    }
    let parents: Vec<Parent> = serde_json::from_str(parents).unwrap_or_default();
    let is_redacted = |of: &Parent| config.redacted(&of.schema, &of.table).next().is_some();
    !parents.iter().any(is_redacted)
}

fn in_words(node: NodeId, shifted: Shifted) -> String {
    let seconds = |us: i64| (us.saturating_add(999_999)) / 1_000_000;
    match shifted {
        Shifted::Earlier(us) => format!(
            "the write of node {node} counts as {} s earlier than its server says: the clock there was ahead of the members', or its daemon \
             was not running, or it was written again",
            seconds(us)
        ),
        Shifted::Later(us) => format!(
            "the write of node {node} counts as {} s later than its server says: the clock there was behind, or was set back",
            seconds(us)
        ),
    }
}

/// The rows of one line may have this many bytes of JSON together; the server takes 256 MiB as one value.
const ROWS_BYTES_MAX: usize = 192 << 20;

/// A value that is shortened in a line which would be longer than that has more bytes of JSON than this.
const VALUE_BYTES_MIN: usize = 1 << 20;

/// Says of large values only how large they were, where the line would be too long for the server: marked, so that nobody takes it for
/// the value. `type_of` names a column's type.
fn shorten<'t>(rows: [&mut Option<Columns>; 3], type_of: &dyn Fn(&str) -> &'t str) {
    let values = rows.iter().filter_map(|row| (**row).as_ref());
    let values = values.flat_map(BTreeMap::values);
    let bytes: usize = values.map(|value| value.get().len()).sum();
    if bytes <= ROWS_BYTES_MAX {
        return;
    }
    for (name, value) in rows.into_iter().flatten().flat_map(BTreeMap::iter_mut) {
        let len = value.get().len();
        if len > VALUE_BYTES_MIN {
            *value = Unread::too_long(type_of(name), len as u64).to_json();
        }
    }
}

/// Names of the columns in which the two rows differ: all, where one has no row.
fn differing(a: Option<&Columns>, b: Option<&Columns>) -> Vec<String> {
    let value =
        |row: Option<&Columns>, name: &str| row.and_then(|row| row.get(name)).map(|raw| raw.get().to_owned());
    let mut names: Vec<&String> = a.into_iter().chain(b).flat_map(BTreeMap::keys).collect();
    names.sort_unstable();
    names.dedup();
    let differ = names.into_iter().filter(|name| value(a, name) != value(b, name));
    differ.cloned().collect()
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

    fn json(&mut self, name: &str, value: &impl serde::Serialize) {
        let text = serde_json::to_string(value).unwrap_or_else(|_| "null".to_owned());
        self.raw(name, &text);
    }

    fn text(&mut self, name: &str, text: &str) {
        self.raw(name, &serde_json::Value::from(text).to_string());
    }

    fn end(self) {
        self.out.push('}');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(json: &str) -> Columns {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn columns_differ_by_the_text_of_their_values_and_all_of_them_where_a_row_is_missing() {
        let a = row(r#"{"id": 1, "n": 12345678901234567890.1, "v": "x"}"#);
        let b = row(r#"{"id": 1, "n": 12345678901234567890.2, "w": null}"#);
        assert_eq!(differing(Some(&a), Some(&b)), ["n", "v", "w"]);
        assert_eq!(differing(Some(&a), Some(&a)), Vec::<String>::new());
        assert_eq!(differing(Some(&a), None), ["id", "n", "v"]);
        assert_eq!(differing(None, None), Vec::<String>::new());
    }

    #[test]
    fn a_line_that_the_server_could_not_take_says_how_long_its_values_were() {
        let of = |bytes: usize| Some(row(&format!(r#"{{"id": 1, "v": "{}"}}"#, "x".repeat(bytes))));
        let (mut local, mut remote) = (of(90 << 20), of(90 << 20));
        let type_of = |_: &str| "text";
        shorten([&mut local, &mut remote, &mut None], &type_of);
        assert_eq!(local.as_ref().unwrap()["v"].get().len(), (90 << 20) + 2);
        let mut remote = of(110 << 20);
        shorten([&mut local, &mut remote, &mut None], &type_of);
        let said = Unread::too_long("text", 94_371_842);
        assert_eq!(Unread::of(&local.unwrap()["v"]), Some(said));
        assert_eq!(remote.unwrap()["id"].get(), "1");
    }
}
