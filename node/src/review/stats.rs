//! How many conflicts: by table, by type, by pair of nodes, by hour. What was only counted counts.

use serde::Serialize;
use tokio_postgres::Client;

use super::{Error, Filter, filter};

/// A name and how often.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Of what.
    pub name: String,
    /// How many.
    pub count: i64,
}

/// Counts of the lines that pass a filter.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// All of them.
    pub total: i64,
    /// Of these, counted only: see `anabranch.conflict_storm`.
    pub only_counted: i64,
    /// Not of these: counted only in the time, and of the tables, types and nodes asked for, of which nobody knows whether they pass, as
    /// something else is asked for, too ([`Filter::is_of_lines_alone`]).
    pub unknown: i64,
    /// By `schema.table`.
    pub by_table: Vec<Count>,
    /// By conflict type.
    pub by_type: Vec<Count>,
    /// By losing and winning node id, `1 > 2`: 1 lost to 2.
    pub by_nodes: Vec<Count>,
    /// By review status, `counted` among them.
    pub by_status: Vec<Count>,
    /// By hour, in order of time, hours without any included; the last 7 x 24 at most.
    pub by_hour: Vec<Count>,
}

/// Lines and counts as (labels.., status, at, count).
fn all(filter: &Filter) -> (String, filter::Query) {
    let query = filter.query();
    let mut sql = format!(
        "WITH a AS (SELECT h.schema_name, h.table_name, h.conflict_type, h.losing_origin, h.winning_origin, h.status, \
         h.detected_at, 1::bigint AS count FROM {} WHERE {}",
        filter::LINES,
        query.of_lines()
    );
    if !filter.is_of_lines_alone() {
        sql.push_str(&format!(
            " UNION ALL SELECT h.schema_name, h.table_name, h.conflict_type, h.losing_origin, h.winning_origin, \
             'counted', h.detected_at, h.count FROM {} WHERE {}",
            filter::STORMS,
            query.of_storms()
        ));
    }
    sql.push(')');
    (sql, query)
}

/// Counts.
///
/// # Errors
/// When the server refuses.
pub async fn stats(client: &Client, filter: &Filter) -> Result<Stats, Error> {
    let (with, query) = all(filter);
    let counted = async |label: &str, order: &str| -> Result<Vec<Count>, Error> {
        let sql = format!(
            "{with} SELECT {label}, sum(count)::bigint FROM a GROUP BY 1 ORDER BY {order} LIMIT 1000"
        );
        let rows = client.query(&sql, &query.parameters()).await?;
        let each = rows.iter().map(|row| {
            Ok(Count {
                name: row.try_get(0)?,
                count: row.try_get(1)?,
            })
        });
        each.collect()
    };
    let often = "2 DESC, 1";
    let by_status = counted("status", often).await?;
    let hours = format!(
        "{with}, b AS (SELECT date_trunc('hour', detected_at) AS hour, sum(count)::bigint AS count FROM a GROUP BY 1)
         SELECT to_char(s AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:00\"Z\"'), coalesce(b.count, 0)
         FROM (SELECT greatest(min(hour), max(hour) - interval '167 hours') AS first, max(hour) AS last FROM b) AS x,
             generate_series(x.first, x.last, interval '1 hour') AS s LEFT JOIN b ON b.hour = s ORDER BY s"
    );
    let rows = client.query(&hours, &query.parameters()).await?;
    let by_hour = rows.iter().map(|row| {
        Ok::<_, Error>(Count {
            name: row.try_get(0)?,
            count: row.try_get(1)?,
        })
    });
    Ok(Stats {
        total: by_status.iter().map(|each| each.count).sum(),
        only_counted: by_status
            .iter()
            .filter(|each| each.name == "counted")
            .map(|each| each.count)
            .sum(),
        unknown: match filter.is_of_lines_alone() {
            true => storm_count(client, filter).await?,
            false => 0,
        },
        by_hour: by_hour.collect::<Result<_, _>>()?,
        by_table: counted("schema_name || '.' || table_name", often).await?,
        by_type: counted("conflict_type", often).await?,
        by_nodes: counted(
            "coalesce(losing_origin::text, '?') || ' > ' || coalesce(winning_origin::text, '?')",
            often,
        )
        .await?,
        by_status,
    })
}

/// How many losing writes that pass the filter were only counted. What is not known of them they pass: where the filter
/// [is of lines alone](Filter::is_of_lines_alone), so many may pass.
///
/// # Errors
/// When the server refuses.
pub async fn storm_count(client: &Client, filter: &Filter) -> Result<i64, Error> {
    let query = filter.query();
    let sql = format!(
        "SELECT coalesce(sum(h.count), 0)::bigint FROM {} WHERE {}",
        filter::STORMS,
        query.of_storms()
    );
    let row = client.query_one(&sql, &query.parameters_of_storms()).await?;
    Ok(row.try_get(0)?)
}
