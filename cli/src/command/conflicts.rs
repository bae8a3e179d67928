//! `anabranch conflicts`: the conflict log, straight from SQL.

use std::path::Path;
use std::process::ExitCode;

use anabranch_node::config::Config;
use anabranch_node::pg;
use anabranch_node::setup;
use jiff::{Span, Timestamp, Zoned};
use serde_json::{Map, Value, json};
use tokio_postgres::types::ToSql;

use crate::args::{Conflicts, List};
use crate::failure::Failure;
use crate::output::{self, Format, say, table};

pub(crate) async fn run(path: &Path, verb: &Conflicts, format: Format) -> Result<ExitCode, Failure> {
    let config = super::load(path)?;
    match verb {
        Conflicts::List(filter) => list(&config, filter, format).await,
        Conflicts::Show { id } => show(&config, id, format).await,
    }
}

async fn list(config: &Config, filter: &List, format: Format) -> Result<ExitCode, Failure> {
    let query = Query::from_filter(config, filter)?;
    let rows = query.rows(config).await?;
    if format == Format::Json {
        output::json(&Value::Array(rows))?;
    } else if rows.is_empty() {
        say("no conflicts\n")?;
    } else {
        say(&listing(config, &rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn listing(config: &Config, rows: &[Value]) -> String {
    table(
        [
            "detected",
            "id",
            "table",
            "key",
            "type",
            "resolution",
            "winner",
            "loser",
        ],
        rows.iter().map(|row| {
            let origin = |side: &str| name_of(config, row.get(format!("{side}_origin")));
            let loser = text(row, "loser");
            let (won, lost) = match loser.as_str() {
                "local" => (origin("remote"), origin("local")),
                "remote" => (origin("local"), origin("remote")),
                _ => ("-".to_owned(), "both".to_owned()),
            };
            [
                short_time(&text(row, "detected_at")),
                text(row, "conflict_id").chars().take(8).collect(),
                format!("{}.{}", text(row, "schema_name"), text(row, "table_name")),
                row.get("key").map_or(String::new(), key_text),
                text(row, "conflict_type"),
                text(row, "conflict_resolution"),
                won,
                lost,
            ]
        }),
    )
}

/// `id=7, part=2`.
fn key_text(key: &Value) -> String {
    match key {
        Value::Object(columns) => columns
            .iter()
            .map(|(name, value)| format!("{name}={}", cell(value)))
            .collect::<Vec<_>>()
            .join(", "),
        other => other.to_string(),
    }
}

fn cell(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "NULL".to_owned(),
        other => other.to_string(),
    }
}

/// A column of the log as text; empty for NULL.
fn text(row: &Value, column: &str) -> String {
    row.get(column)
        .filter(|value| !value.is_null())
        .map_or(String::new(), cell)
}

/// To the millisecond, in UTC.
fn short_time(text: &str) -> String {
    match text.parse::<Timestamp>() {
        Ok(time) => format!("{time:.3}"),
        Err(_) => text.to_owned(),
    }
}

fn name_of(config: &Config, id: Option<&Value>) -> String {
    let Some(id) = id.and_then(Value::as_u64) else {
        return "?".to_owned();
    };
    let own = (config.node.id, &config.node.name);
    let mut members = std::iter::once(own).chain(config.peers.iter().map(|peer| (peer.id, &peer.name)));
    members
        .find(|(member, _)| u64::from(member.0) == id)
        .map_or_else(|| id.to_string(), |(_, name)| name.clone())
}

/// Conditions on the log with their parameters, all as text: the server casts them.
#[derive(Debug, Default)]
struct Query {
    conditions: Vec<String>,
    parameters: Vec<String>,
    limit: i64,
}

impl Query {
    fn from_filter(config: &Config, filter: &List) -> Result<Self, Failure> {
        let mut query = Self {
            limit: filter.limit,
            ..Self::default()
        };
        let now = Zoned::now();
        if let Some(since) = &filter.since {
            query.push("detected_at >= ?::timestamptz", [time(since, &now)?.to_string()]);
        }
        if let Some(until) = &filter.until {
            query.push("detected_at < ?::timestamptz", [time(until, &now)?.to_string()]);
        }
        if let Some(table) = &filter.table {
            if let Some((schema, table)) = table.split_once('.') {
                query.push(
                    "schema_name = ? AND table_name = ?",
                    [schema.to_owned(), table.to_owned()],
                );
            } else {
                query.push("table_name = ?", [table.clone()]);
            }
        }
        if let Some(kind) = &filter.kind {
            query.push("conflict_type = ?", [kind.clone()]);
        }
        if let Some(key) = &filter.key {
            query.push("(key @> ?::jsonb OR key @> ?::jsonb)", key_patterns(key)?);
        }
        if let Some(node) = &filter.node {
            query.push(
                "?::int IN (local_origin, remote_origin)",
                [node_id(config, node)?.to_string()],
            );
        }
        Ok(query)
    }

    /// Each `?` stands for one of `parameters`.
    fn push<const N: usize>(&mut self, condition: &str, parameters: [String; N]) {
        let mut condition = condition.to_owned();
        for parameter in parameters {
            self.parameters.push(parameter);
            // Through text, so that every parameter has one type on the wire.
            condition = condition.replacen('?', &format!("${}::text", self.parameters.len()), 1);
        }
        self.conditions.push(condition);
    }

    async fn rows(&self, config: &Config) -> Result<Vec<Value>, Failure> {
        let client = setup::connect(&pg::dsn(&config.postgres)?).await?;
        let filter = if self.conditions.is_empty() {
            "true".to_owned()
        } else {
            self.conditions.join(" AND ")
        };
        let sql = format!(
            "SELECT to_jsonb(h)::text FROM anabranch.conflict_history h WHERE {filter}
             ORDER BY detected_at DESC, conflict_id LIMIT {}",
            self.limit
        );
        let parameters: Vec<&(dyn ToSql + Sync)> = self
            .parameters
            .iter()
            .map(|parameter| parameter as &(dyn ToSql + Sync))
            .collect();
        let failed = Failure::query("the conflict log (is this database set up? see `anabranch doctor`)");
        let rows = client.query(&sql, &parameters).await.map_err(&failed)?;
        rows.iter()
            .map(|row| {
                let text: String = row.try_get(0).map_err(&failed)?;
                serde_json::from_str(&text)
                    .map_err(|error| Failure::Refused(format!("the conflict log: {error}")))
            })
            .collect()
    }
}

/// `--key` as two JSON patterns: values read as JSON where they can be, and all as text.
fn key_patterns(key: &str) -> Result<[String; 2], Failure> {
    if key.trim_start().starts_with('{') {
        let value: Value = serde_json::from_str(key)
            .map_err(|error| Failure::Usage(format!("--key {key} is not JSON: {error}")))?;
        return Ok([value.to_string(), value.to_string()]);
    }
    let (mut typed, mut plain) = (Map::new(), Map::new());
    for pair in key.split(',') {
        let (name, value) = pair.split_once('=').ok_or_else(|| {
            Failure::Usage(format!(
                "--key {key}: write column=value, or JSON such as {{\"id\": 7}}"
            ))
        })?;
        let (name, value) = (name.trim().to_owned(), value.trim());
        let json = serde_json::from_str(value).unwrap_or_else(|_| json!(value));
        typed.insert(name.clone(), json);
        plain.insert(name, json!(value));
    }
    Ok([Value::Object(typed).to_string(), Value::Object(plain).to_string()])
}

fn node_id(config: &Config, node: &str) -> Result<u16, Failure> {
    if let Ok(id) = node.parse() {
        return Ok(id);
    }
    if config.node.name == node {
        return Ok(config.node.id.0);
    }
    let peer = config
        .peers
        .iter()
        .find(|peer| peer.name == node)
        .map(|peer| peer.id.0);
    peer.ok_or_else(|| {
        Failure::Usage(format!(
            "--node {node} is neither an id nor a name in the configuration"
        ))
    })
}

/// RFC 3339, a date (midnight here), or a span back from now.
fn time(text: &str, now: &Zoned) -> Result<Timestamp, Failure> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    if let Ok(date) = text.parse::<jiff::civil::DateTime>()
        && let Ok(zoned) = date.to_zoned(now.time_zone().clone())
    {
        return Ok(zoned.timestamp());
    }
    let back = text
        .parse::<Span>()
        .ok()
        // Both `2h` and `2h ago` mean two hours back.
        .and_then(|span| now.checked_sub(span.abs()).ok())
        .map(|zoned| zoned.timestamp());
    back.ok_or_else(|| {
        Failure::Usage(format!(
            "`{text}` is not a time; write 2026-11-24T10:00:00Z, 2026-11-24, 2h or \"3 days ago\""
        ))
    })
}

async fn show(config: &Config, id: &str, format: Format) -> Result<ExitCode, Failure> {
    if id.is_empty() || !id.chars().all(|c| c.is_ascii_hexdigit() || c == '-') {
        return Err(Failure::Usage(format!(
            "`{id}` is not a conflict id; see `anabranch conflicts list`"
        )));
    }
    let mut query = Query {
        limit: 2,
        ..Query::default()
    };
    query.push("starts_with(conflict_id::text, ?)", [id.to_ascii_lowercase()]);
    let rows = query.rows(config).await?;
    match rows.as_slice() {
        [] => Err(Failure::Refused(format!("no conflict has the id {id} here"))),
        [row] => {
            match format {
                Format::Json => output::json(row)?,
                Format::Table => say(&render(config, row))?,
            }
            Ok(ExitCode::SUCCESS)
        }
        _ => Err(Failure::Refused(format!(
            "more than one conflict begins with {id}; give more of it"
        ))),
    }
}

fn render(config: &Config, row: &Value) -> String {
    let mut out = format!(
        "conflict   {}\ndetected   {} at node {}\ntable      {}.{}\nkey        {}\n\
         type       {}, policy {}\nresolution {} (lost: {})\n",
        text(row, "conflict_id"),
        text(row, "detected_at"),
        text(row, "node"),
        text(row, "schema_name"),
        text(row, "table_name"),
        row.get("key").map_or(String::new(), key_text),
        text(row, "conflict_type"),
        text(row, "policy"),
        text(row, "conflict_resolution"),
        text(row, "loser"),
    );
    if !text(row, "apply_xid").is_empty() {
        out.push_str(&format!("applied in transaction {}\n", text(row, "apply_xid")));
    }
    out.push_str(&table(
        ["", "local", "remote"],
        [
            ("origin", "origin"),
            ("commit time", "commit_time"),
            ("stamp", "stamp"),
            ("xid", "xid"),
            ("LSN", "lsn"),
        ]
        .map(|(label, column)| {
            let side = |side: &str| match column {
                "origin" => name_of(config, row.get(format!("{side}_origin"))),
                _ => text(row, &format!("{side}_{column}")),
            };
            [label.to_owned(), side("local"), side("remote")]
        }),
    ));
    out.push_str(&tuples(row));
    if let Some(error) = row.get("error").filter(|error| !error.is_null()) {
        out.push_str(&format!(
            "error {}: {} {}\n",
            text(error, "sqlstate"),
            text(error, "message"),
            text(error, "detail")
        ));
    }
    out
}

/// The three rows, one line a column; columns in which they differ are marked.
fn tuples(row: &Value) -> String {
    let sides =
        ["local_tuple", "remote_tuple", "applied_tuple"].map(|side| row.get(side).and_then(Value::as_object));
    let mut names: Vec<&String> = Vec::new();
    for name in sides.iter().flatten().flat_map(|columns| columns.keys()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let lines = names.into_iter().map(|name| {
        let values = sides.map(|side| side.and_then(|columns| columns.get(name)));
        let present: Vec<&Value> = values.iter().copied().flatten().collect();
        let differs = present.windows(2).any(|pair| pair.first() != pair.last());
        let [local, remote, applied] = values.map(|value| value.map_or(String::new(), cell));
        [
            if differs { "*" } else { "" }.to_owned(),
            name.clone(),
            local,
            remote,
            applied,
        ]
    });
    let mut out = table(["", "column", "local", "remote", "applied"], lines);
    for (side, columns) in ["local", "remote", "applied"].into_iter().zip(sides) {
        if columns.is_none() {
            out.push_str(&format!("{side}: no row\n"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter() -> List {
        List {
            since: None,
            until: None,
            table: None,
            kind: None,
            key: None,
            node: None,
            limit: 50,
        }
    }

    #[test]
    fn times_are_read_in_every_promised_form() {
        let now: Zoned = "2026-11-24T12:00:00+00:00[UTC]".parse().unwrap();
        for (text, expected) in [
            ("2026-11-24T10:00:00Z", "2026-11-24T10:00:00Z"),
            ("2026-11-24T10:00:00+02:00", "2026-11-24T08:00:00Z"),
            ("2026-11-23", "2026-11-23T00:00:00Z"),
            ("2h", "2026-11-24T10:00:00Z"),
            ("2h ago", "2026-11-24T10:00:00Z"),
            ("3 days ago", "2026-11-21T12:00:00Z"),
        ] {
            assert_eq!(time(text, &now).unwrap().to_string(), expected, "{text}");
        }
        assert!(matches!(time("yesterday-ish", &now), Err(Failure::Usage(_))));
    }

    #[test]
    fn conditions_and_parameters_stay_in_step() {
        let config = Config::example();
        let query = Query::from_filter(
            &config,
            &List {
                table: Some("public.t".to_owned()),
                key: Some("id=7, name=x".to_owned()),
                node: Some("beta".to_owned()),
                ..filter()
            },
        )
        .unwrap();
        assert_eq!(
            query.conditions,
            [
                "schema_name = $1::text AND table_name = $2::text",
                "(key @> $3::text::jsonb OR key @> $4::text::jsonb)",
                "$5::text::int IN (local_origin, remote_origin)",
            ]
        );
        assert_eq!(
            query.parameters,
            [
                "public",
                "t",
                r#"{"id":7,"name":"x"}"#,
                r#"{"id":"7","name":"x"}"#,
                "2"
            ]
        );
        assert!(
            Query::from_filter(
                &config,
                &List {
                    node: Some("nobody".to_owned()),
                    ..filter()
                }
            )
            .is_err()
        );
        assert!(
            Query::from_filter(
                &config,
                &List {
                    key: Some("7".to_owned()),
                    ..filter()
                }
            )
            .is_err()
        );
    }

    #[test]
    fn a_conflict_is_shown_side_by_side() {
        let row = json!({
            "conflict_id": "6f0d1a52-8a39-5a53-9f5e-000000000001", "detected_at": "2026-11-24T10:00:00.123456+00:00",
            "node": "alpha", "node_id": 1, "schema_name": "public", "table_name": "t", "key": {"id": 7},
            "conflict_type": "update_origin_differs", "policy": "last_update_wins", "conflict_resolution": "apply_remote",
            "loser": "local", "local_origin": 1, "remote_origin": 2, "local_stamp": "0000000000000001.1",
            "remote_stamp": "0000000000000002.2", "local_tuple": {"id": 7, "v": "here"},
            "remote_tuple": {"id": 7, "v": "there"}, "applied_tuple": {"id": 7, "v": "there"},
        });
        insta::assert_snapshot!(render(&Config::example(), &row));
        insta::assert_snapshot!(listing(&Config::example(), &[row]));
    }
}
