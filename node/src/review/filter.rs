//! Which lines of the log: conditions with their parameters, all as text, which the server casts.

use std::collections::BTreeMap;

use anabranch_proto::schema::split_name;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

use super::{Columns, Error};

/// Lines with the two origins named by what became of their writes.
pub(super) const LINES: &str = "(SELECT c.*, \
    CASE c.loser WHEN 'local' THEN c.local_origin WHEN 'remote' THEN c.remote_origin END AS losing_origin, \
    CASE c.loser WHEN 'local' THEN c.remote_origin WHEN 'remote' THEN c.local_origin END AS winning_origin \
    FROM anabranch.conflict_history AS c) AS h";

/// What was only counted, under the same names; detected at some time from `detected_at` on and before `detected_before`.
pub(super) const STORMS: &str = "(SELECT s.schema_name, s.table_name, s.conflict_type, s.minute AS detected_at, \
    s.minute + interval '1 minute' AS detected_before, s.count, nullif(s.losing_origin, 0) AS losing_origin, nullif(s.winning_origin, 0) AS winning_origin \
    FROM anabranch.conflict_storm AS s) AS h";

/// A line's place in the order of [`super::list`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// As the server wrote it.
    pub detected_at: String,
    /// Among those detected at once.
    pub conflict_id: String,
}

/// Digits of an id.
const ID_DIGITS: usize = 32;

/// The first and the last id that begin so, whatever dashes are in it; none where no id does. As values, an index gives what lies between
/// them; no index gives the beginning of a text.
fn ids_of(beginning: &str) -> Option<[String; 2]> {
    let digits: String = beginning.chars().filter(|c| *c != '-').collect();
    let is_one =
        !digits.is_empty() && digits.len() <= ID_DIGITS && digits.bytes().all(|c| c.is_ascii_hexdigit());
    let lacking = ID_DIGITS.saturating_sub(digits.len());
    is_one.then(|| ["0", "f"].map(|rest| format!("{digits}{}", rest.repeat(lacking))))
}

/// Tables that hold the rows of a partitioned one.
const PARTITIONS: &str = "SELECT pn.nspname::text, p.relname::text \
    FROM pg_catalog.pg_class AS r JOIN pg_catalog.pg_namespace AS rn ON rn.oid = r.relnamespace \
    CROSS JOIN LATERAL pg_catalog.pg_partition_tree(r.oid) AS t \
    JOIN pg_catalog.pg_class AS p ON p.oid = t.relid JOIN pg_catalog.pg_namespace AS pn ON pn.oid = p.relnamespace \
    WHERE r.relkind = 'p' AND t.isleaf AND r.relname::text = $2::text AND rn.nspname::text = coalesce($1::text, rn.nspname::text) \
    ORDER BY 1, 2";

/// The partitions of the table that is asked for, for [`Filter::partitions`]: those that it has here and now.
///
/// # Errors
/// When the server refuses.
pub async fn partitions(client: &Client, filter: &Filter) -> Result<Vec<(String, String)>, Error> {
    let Some(table) = &filter.table else {
        return Ok(Vec::new());
    };
    let (schema, name) = split_name(table);
    let rows = client.query(PARTITIONS, &[&schema, &name]).await?;
    rows.iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect()
}

/// Forms of one key that are looked for at once.
const KEYS_MAX: usize = 64;

/// A key as a person writes it, `id=7, code=x` or JSON, as [`Filter::keys`]. What reads as JSON may be a text in the table all the same,
/// each column by itself: both are looked for.
///
/// # Errors
/// In words, when it is no key.
pub fn keys_of(text: &str) -> Result<Vec<String>, String> {
    if text.trim_start().starts_with('{') {
        // Raw, here and below: no number loses a digit.
        let json = serde_json::from_str::<Box<RawValue>>(text);
        let json = json.map_err(|error| format!("the key {text} is not JSON: {error}"))?;
        return Ok(vec![json.get().to_owned()]);
    }
    let mut keys: Vec<Columns> = vec![BTreeMap::new()];
    for pair in text.split(',') {
        let (name, value) = pair.split_once('=').ok_or_else(|| {
            format!(
                "{text} is not a key: write column=value (several with commas), or JSON such as {{\"id\": 7}}"
            )
        })?;
        let (name, value) = (name.trim(), value.trim());
        let typed = serde_json::from_str::<Box<RawValue>>(value).ok();
        let plain = to_raw_value(value).ok();
        let mut more = Vec::new();
        for form in typed.iter().chain(&plain) {
            for key in &keys {
                let mut key = key.clone();
                key.insert(name.to_owned(), form.clone());
                more.push(key);
            }
        }
        keys = more;
        if keys.len() > KEYS_MAX {
            return Err(format!(
                "{text}: too many columns may be of numbers or of text; write JSON such as {{\"id\": 7, \"code\": \"7\"}}"
            ));
        }
    }
    let keys = keys.iter().map(serde_json::to_string);
    keys.collect::<Result<Vec<String>, serde_json::Error>>()
        .map_err(|error| format!("{text} is not a key: {error}"))
}

/// Which lines. Every condition that is given must hold. Travels between daemons as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Filter {
    /// Beginning of the id.
    pub id: Option<String>,
    /// Whole ids, one of which it is; empty: any.
    pub ids: Vec<String>,
    /// Only what [`super::list`] gives behind this line.
    pub behind: Option<Place>,
    /// Detected at or after, RFC 3339.
    pub since: Option<String>,
    /// Detected before, RFC 3339.
    pub until: Option<String>,
    /// `schema.table`, or a table in any schema.
    pub table: Option<String>,
    /// Schemas and names of its partitions, under which rows of a partitioned table are logged: [`partitions`].
    pub partitions: Vec<(String, String)>,
    /// Conflict type.
    pub kind: Option<String>,
    /// JSON objects, one of which the key contains.
    pub keys: Vec<String>,
    /// Node id that made either side.
    pub node: Option<u16>,
    /// Node id that made the winning side.
    pub winner: Option<u16>,
    /// Review status.
    pub status: Option<String>,
    /// Transaction group.
    pub group: Option<String>,
    /// At most so many lines.
    pub limit: u32,
}

impl Default for Filter {
    fn default() -> Self {
        Self {
            id: None,
            ids: Vec::new(),
            behind: None,
            since: None,
            until: None,
            table: None,
            partitions: Vec::new(),
            kind: None,
            keys: Vec::new(),
            node: None,
            winner: None,
            status: None,
            group: None,
            limit: 50,
        }
    }
}

/// A filter as SQL.
#[derive(Debug, Default)]
pub(super) struct Query {
    /// Of lines and of counts.
    common: Vec<String>,
    /// The same for either: a count is of a whole minute.
    since: Option<Since>,
    /// Of lines alone.
    lines: Vec<String>,
    parameters: Vec<String>,
    /// So many of them, the first, are those of counts.
    common_parameters: usize,
}

#[derive(Debug)]
struct Since {
    of_lines: String,
    of_storms: String,
}

impl Query {
    pub(super) fn of_lines(&self) -> String {
        let since = self.since.iter().map(|since| &since.of_lines);
        join(since.chain(&self.common).chain(&self.lines))
    }

    /// The conditions that counts can be asked for; with [`Self::parameters_of_storms`].
    pub(super) fn of_storms(&self) -> String {
        let since = self.since.iter().map(|since| &since.of_storms);
        join(since.chain(&self.common))
    }

    pub(super) fn parameters(&self) -> Vec<&(dyn ToSql + Sync)> {
        as_sql(&self.parameters)
    }

    pub(super) fn parameters_of_storms(&self) -> Vec<&(dyn ToSql + Sync)> {
        as_sql(self.parameters.get(..self.common_parameters).unwrap_or_default())
    }

    /// Each `?` of `condition` stands for one of `parameters`; through text, so that all have one type on the wire.
    fn condition(&mut self, condition: &str, parameters: &[&str]) -> String {
        let mut condition = condition.to_owned();
        for parameter in parameters {
            self.parameters.push((*parameter).to_owned());
            condition = condition.replacen('?', &format!("${}::text", self.parameters.len()), 1);
        }
        condition
    }
}

fn as_sql(parameters: &[String]) -> Vec<&(dyn ToSql + Sync)> {
    let each = parameters.iter();
    each.map(|parameter| parameter as &(dyn ToSql + Sync)).collect()
}

fn join<'a>(conditions: impl Iterator<Item = &'a String>) -> String {
    let all: Vec<&str> = conditions.map(String::as_str).collect();
    if all.is_empty() {
        "true".to_owned()
    } else {
        all.join(" AND ")
    }
}

impl Filter {
    /// Is it asked for a few lines by what an index has of them, so that they are to be found by it before anything is sorted? (The index on
    /// the time would give them in order, and look at every line for that. The planner, which does not know how few they are, takes
    /// it where a limit is set.)
    pub(super) const fn is_of_few(&self) -> bool {
        self.id.is_some() || self.group.is_some()
    }

    /// Is something asked for that is not known of losing writes that were only counted?
    #[must_use]
    pub const fn is_of_lines_alone(&self) -> bool {
        self.id.is_some()
            || self.status.is_some()
            || self.group.is_some()
            || self.behind.is_some()
            || !self.ids.is_empty()
            || !self.keys.is_empty()
    }

    pub(super) fn query(&self) -> Query {
        let mut query = Query::default();
        if let Some(since) = &self.since {
            let time = query.condition("?::timestamptz", &[since]);
            query.since = Some(Since {
                of_lines: format!("h.detected_at >= {time}"),
                of_storms: format!("h.detected_before > {time}"),
            });
        }
        let mut common = Vec::new();
        for (condition, value) in [
            ("h.detected_at < ?::timestamptz", self.until.clone()),
            ("h.conflict_type = ?", self.kind.clone()),
            (
                "?::int IN (h.losing_origin, h.winning_origin)",
                self.node.map(|id| id.to_string()),
            ),
            ("h.winning_origin = ?::int", self.winner.map(|id| id.to_string())),
        ] {
            if let Some(value) = value {
                common.push(query.condition(condition, &[&value]));
            }
        }
        if let Some(table) = &self.table {
            const NAMED: &str = "h.schema_name = ? AND h.table_name = ?";
            let named = match split_name(table) {
                (Some(schema), table) => query.condition(NAMED, &[&schema, &table]),
                (None, table) => query.condition("h.table_name = ?", &[&table]),
            };
            let mut any = vec![named];
            for (schema, name) in &self.partitions {
                any.push(query.condition(NAMED, &[schema, name]));
            }
            common.push(match any.len() {
                1 => any.concat(),
                _ => format!("({})", any.join(" OR ")),
            });
        }
        query.common_parameters = query.parameters.len();
        let mut lines = Vec::new();
        if let Some(id) = &self.id {
            lines.push(match ids_of(id) {
                Some([first, last]) => {
                    query.condition("h.conflict_id BETWEEN ?::uuid AND ?::uuid", &[&first, &last])
                }
                None => "false".to_owned(),
            });
        }
        for (condition, value) in [
            ("h.status = ?", &self.status),
            ("h.transaction_group = ?", &self.group),
        ] {
            if let Some(value) = value {
                lines.push(query.condition(condition, &[value]));
            }
        }
        if !self.ids.is_empty() {
            // Ids are of digits and dashes.
            let ids = self.ids.join(",");
            lines.push(query.condition("h.conflict_id = ANY (string_to_array(?, ',')::uuid[])", &[&ids]));
        }
        if let Some(Place {
            detected_at,
            conflict_id,
        }) = &self.behind
        {
            // The first half is for the index.
            lines.push(query.condition(
                "h.detected_at <= ?::timestamptz AND (h.detected_at < ?::timestamptz OR h.conflict_id > ?::uuid)",
                &[detected_at, detected_at, conflict_id],
            ));
        }
        if !self.keys.is_empty() {
            let any: Vec<String> = self
                .keys
                .iter()
                .map(|key| query.condition("h.key @> ?::jsonb", &[key]))
                .collect();
            lines.push(format!("({})", any.join(" OR ")));
        }
        (query.common, query.lines) = (common, lines);
        query
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_and_parameters_stay_in_step() {
        let filter = Filter {
            table: Some("public.t".to_owned()),
            keys: vec![r#"{"id":7}"#.to_owned(), r#"{"id":"7"}"#.to_owned()],
            node: Some(2),
            ..Filter::default()
        };
        let query = filter.query();
        assert_eq!(
            query.of_lines(),
            "$1::text::int IN (h.losing_origin, h.winning_origin) AND h.schema_name = $2::text AND h.table_name = $3::text \
             AND (h.key @> $4::text::jsonb OR h.key @> $5::text::jsonb)"
        );
        assert_eq!(
            query.parameters,
            ["2", "public", "t", r#"{"id":7}"#, r#"{"id":"7"}"#]
        );
        assert_eq!(
            query.of_storms(),
            "$1::text::int IN (h.losing_origin, h.winning_origin) AND h.schema_name = $2::text AND h.table_name = $3::text"
        );
        assert_eq!(query.parameters_of_storms().len(), 3);
        assert!(filter.is_of_lines_alone());
        assert_eq!(Filter::default().query().of_storms(), "true");
        assert!(!Filter::default().is_of_lines_alone());
    }

    #[test]
    fn of_a_partitioned_table_each_partition_passes() {
        let mut filter = Filter {
            table: Some("public.t".to_owned()),
            kind: Some("insert_exists".to_owned()),
            ..Filter::default()
        };
        let alone = filter.query().of_lines();
        assert!(!alone.contains(" OR "), "{alone}");
        filter.partitions = vec![
            ("public".to_owned(), "t_eu".to_owned()),
            ("us".to_owned(), "t".to_owned()),
        ];
        let query = filter.query();
        assert_eq!(
            query.of_storms(),
            "h.conflict_type = $1::text AND (h.schema_name = $2::text AND h.table_name = $3::text OR h.schema_name = $4::text AND \
             h.table_name = $5::text OR h.schema_name = $6::text AND h.table_name = $7::text)"
        );
        assert_eq!(
            query.parameters[1..],
            ["public", "t", "public", "t_eu", "us", "t"]
        );
        assert_eq!(query.parameters_of_storms().len(), 7);
    }

    #[test]
    fn each_column_of_a_key_may_be_a_number_or_a_text() {
        assert_eq!(
            keys_of("id=7, name=x").unwrap(),
            [r#"{"id":7,"name":"x"}"#, r#"{"id":"7","name":"x"}"#]
        );
        let two = keys_of("id=7,code=12").unwrap();
        assert!(two.contains(&r#"{"code":"12","id":7}"#.to_owned()), "{two:?}");
        assert_eq!(two.len(), 4);
        // As it is written, to the last digit.
        let long = keys_of("n=12345678901234567890123.10").unwrap();
        assert_eq!(long[0], r#"{"n":12345678901234567890123.10}"#);
        assert_eq!(keys_of(r#"{"n": 1e30}"#).unwrap(), [r#"{"n": 1e30}"#]);
        assert_eq!(keys_of("code=007").unwrap(), [r#"{"code":"007"}"#]);
        for wrong in ["id", "", "{", "id=7,x", "a=1,b=1,c=1,d=1,e=1,f=1,g=1"] {
            assert!(keys_of(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_beginning_of_an_id_is_a_range_of_ids() {
        let range = |beginning: &str| ids_of(beginning).map(|ids| ids.join(" "));
        let all = "00000000000000000000000000000000";
        assert_eq!(
            range("1f421beb-2"),
            Some(format!("1f421beb2{0} 1f421beb2{1}", &all[9..], "f".repeat(23)))
        );
        let whole = "1f421beb-2ac8-598b-b7b7-9d9cae3705f1";
        let digits = whole.replace('-', "");
        assert_eq!(range(whole), Some(format!("{digits} {digits}")));
        for none in ["", "-", "xyz", "1f421beb'", &format!("{whole}0")] {
            assert_eq!(range(none), None, "{none}");
        }
        let filter = Filter {
            id: Some("0g".to_owned()),
            ..Filter::default()
        };
        assert_eq!(filter.query().of_lines(), "false");
    }

    #[test]
    fn a_minute_that_reaches_into_the_time_asked_for_counts() {
        let filter = Filter {
            since: Some("2026-11-24T10:00:30Z".to_owned()),
            until: Some("2026-11-24T11:00:00Z".to_owned()),
            status: Some("new".to_owned()),
            ..Filter::default()
        };
        let query = filter.query();
        assert_eq!(
            query.of_lines(),
            "h.detected_at >= $1::text::timestamptz AND h.detected_at < $2::text::timestamptz AND h.status = $3::text"
        );
        assert_eq!(
            query.of_storms(),
            "h.detected_before > $1::text::timestamptz AND h.detected_at < $2::text::timestamptz"
        );
        assert_eq!(query.parameters_of_storms().len(), 2);
    }
}
