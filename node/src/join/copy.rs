//! The rows: COPY from the donor's snapshot into this database, several connections at once, large tables in pieces.
//!
//! Each piece is one transaction here, with the note that it is done. Images are binary; a table with columns whose
//! binary form carries numbers of user-defined types (arrays, composites, ranges of them, domains over these) goes as text, and so does one
//! with columns of types that have no binary form, or whose binary form not every value has: `tsquery` does not read its empty one.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use futures_util::{SinkExt, StreamExt, pin_mut};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::state::{done_once, is_done};
use super::waiting::connect_donor;
use super::{Error, Event, Options, Report, Source, connect_admin, on_snapshot, sql};
use crate::donor::Cut;
use crate::setup::sql::{ident, literal, qualified};
use crate::setup::table::BASE_TYPES;
use crate::shared::lock;

/// A table that is copied.
#[derive(Debug, Clone)]
pub(super) struct Table {
    /// The donor's number for it.
    pub(super) oid: u32,
    schema: String,
    name: String,
    /// As it is now, whatever the session's snapshot.
    blocks: i64,
    bytes: u64,
    columns: Vec<String>,
    binary: bool,
}

/// Part of a table: its blocks from `from` up to `to`, or to the end.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    from: i64,
    to: Option<i64>,
}

/// How a table is divided, from the first run since the cut to the end of the join: a piece that is done is known by where it
/// begins, and where it ends follows from this. (Tables grow meanwhile, and VACUUM cuts off an empty end.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Division {
    /// The table's, when it was divided.
    blocks: i64,
    /// Blocks of one piece.
    piece: i64,
}

impl Division {
    /// The pieces; the last one is open, whatever the table has grown to.
    fn pieces(self) -> Vec<Piece> {
        let size = self.piece.max(1);
        let count = (self.blocks / size).max(1);
        (0..count)
            .map(|at| Piece {
                from: at * size,
                to: (at + 1 < count).then(|| (at + 1) * size),
            })
            .collect()
    }
}

/// How each of the tables is divided, by its number; those that no run has divided yet, now.
async fn divide(
    options: &Options,
    tables: &[Table],
    admin: &Client,
) -> Result<HashMap<u32, Division>, Error> {
    let oids: Vec<u32> = tables.iter().map(|table| table.oid).collect();
    let blocks: Vec<i64> = tables.iter().map(|table| table.blocks).collect();
    admin
        .execute(
            "INSERT INTO anabranch_join.pieces (relation, blocks, piece)
             SELECT relation, blocks, $3::int8 FROM unnest($1::oid[], $2::int8[]) AS t (relation, blocks) ON CONFLICT DO NOTHING",
            &[&oids, &blocks, &i64::from(options.piece_blocks)],
        )
        .await
        .map_err(sql("write down how the tables are divided"))?;
    let rows = admin
        .query("SELECT relation, blocks, piece FROM anabranch_join.pieces", &[])
        .await
        .map_err(sql("read how the tables are divided"))?;
    rows.iter()
        .map(|row| {
            let division = Division {
                blocks: row.try_get(1)?,
                piece: row.try_get(2)?,
            };
            Ok((row.try_get(0)?, division))
        })
        .collect::<Result<_, tokio_postgres::Error>>()
        .map_err(sql("read how the tables are divided"))
}

impl Table {
    /// `schema.table`, for people.
    pub(super) fn label(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    /// For SQL.
    pub(super) fn qualified(&self) -> String {
        qualified(&self.schema, &self.name)
    }

    fn columns(&self) -> String {
        let columns: Vec<String> = self.columns.iter().map(|column| ident(column)).collect();
        columns.join(", ")
    }

    fn format(&self) -> &'static str {
        if self.binary { "binary" } else { "text" }
    }

    fn out(&self, piece: &Piece) -> String {
        let table = self.qualified();
        let mut bounds = Vec::new();
        if piece.from > 0 {
            bounds.push(format!("ctid >= '({},0)'::tid", piece.from));
        }
        if let Some(to) = piece.to {
            bounds.push(format!("ctid < '({to},0)'::tid"));
        }
        let bounds = if bounds.is_empty() {
            String::new()
        } else {
            format!(" WHERE {}", bounds.join(" AND "))
        };
        format!(
            "COPY (SELECT {} FROM ONLY {table}{bounds}) TO STDOUT (FORMAT {})",
            self.columns(),
            self.format()
        )
    }

    fn into(&self) -> String {
        format!(
            "COPY {} ({}) FROM STDIN (FORMAT {})",
            self.qualified(),
            self.columns(),
            self.format()
        )
    }
}

/// Behind [`BASE_TYPES`].
const TABLES: &str = "
    SELECT n.nspname::text, c.relname::text,
           pg_relation_size(c.oid) / current_setting('block_size')::int8, pg_table_size(c.oid),
           array_agg(a.attname::text ORDER BY a.attnum) FILTER (WHERE a.attgenerated = ''),
           NOT bool_or(coalesce(element.oid, t.oid) >= 16384
               AND (element.oid IS NOT NULL OR t.typtype IN ('c', 'r', 'm'))
               OR coalesce(element.oid, t.oid) = 'pg_catalog.tsquery'::regtype
               OR coalesce(element.typsend, t.typsend) = 0 OR coalesce(element.typreceive, t.typreceive) = 0),
           c.oid
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    JOIN base b ON b.typ = a.atttypid AND b.typtype <> 'd' JOIN pg_type t ON t.oid = b.base
    LEFT JOIN pg_type element ON element.oid = t.typelem AND t.typcategory = 'A'
    WHERE c.oid = ANY ($1)
    GROUP BY 1, 2, 3, 4, c.oid ORDER BY 4 DESC";

/// Has a table, or one of its columns, another name by now than in the session's snapshot? (The catalog's tables show what was, its
/// functions what is.)
const IS_RENAMED: &str = "
    SELECT EXISTS (
        SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.oid = $1
          AND (pg_identify_object('pg_class'::regclass, c.oid, a.attnum)).identity
              IS DISTINCT FROM format('%I.%I.%I', n.nspname, c.relname, a.attname))";

/// The tables with these numbers, the largest first.
pub(super) async fn tables_of(donor: &Client, oids: &[u32]) -> Result<Vec<Table>, Error> {
    let rows = donor
        .query(&format!("{BASE_TYPES}{TABLES}"), &[&oids])
        .await
        .map_err(sql("list the donor's tables"))?;
    rows.iter()
        .map(|row| {
            let bytes: i64 = row.try_get(3)?;
            Ok(Table {
                oid: row.try_get(6)?,
                schema: row.try_get(0)?,
                name: row.try_get(1)?,
                blocks: row.try_get(2)?,
                bytes: u64::try_from(bytes).unwrap_or(0),
                columns: row.try_get::<_, Option<Vec<String>>>(4)?.unwrap_or_default(),
                binary: row.try_get(5)?,
            })
        })
        .collect::<Result<_, tokio_postgres::Error>>()
        .map_err(sql("list the donor's tables"))
}

/// Copies these tables.
pub(super) async fn copy(
    options: &Options,
    cut: &Cut,
    tables: Vec<Table>,
    admin: &Client,
    report: &Report,
) -> Result<(), Error> {
    let divisions = divide(options, &tables, admin).await?;
    report(Event::Size {
        tables: tables.len(),
        bytes: tables.iter().map(|table| table.bytes).sum(),
    });
    let queue: VecDeque<(Arc<Table>, Piece, u64)> = tables
        .into_iter()
        .flat_map(|table| {
            let now = Division {
                blocks: table.blocks,
                piece: options.piece_blocks.into(),
            };
            let pieces = divisions.get(&table.oid).unwrap_or(&now).pieces();
            let share = table.bytes / (pieces.len() as u64).max(1);
            let table = Arc::new(table);
            pieces
                .into_iter()
                .map(move |piece| (Arc::clone(&table), piece, share))
        })
        .collect();
    let queue = Arc::new(Mutex::new(queue));
    let mut tasks = tokio::task::JoinSet::<Result<(), Error>>::new();
    for _ in 0..options.jobs.max(1) {
        let (queue, report, cut) = (Arc::clone(&queue), Arc::clone(report), cut.clone());
        let (donor, admin) = (options.donor_dsn.clone(), options.admin_dsn.clone());
        tasks.spawn(async move {
            let donor = connect_donor(&donor).await?;
            on_snapshot(&donor, &cut).await?;
            let admin = connect_admin(&admin, "join").await?;
            admin
                .batch_execute("SET session_replication_role = replica; SET synchronous_commit = off")
                .await
                .map_err(sql("switch triggers off while copying"))?;
            loop {
                let Some((table, piece, share)) = lock(&queue).pop_front() else {
                    return Ok(());
                };
                copy_piece(&donor, &admin, &table, &piece, share, &report).await?;
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(|error| Error::Refused(error.to_string()))??;
    }
    Ok(())
}

async fn copy_piece(
    donor: &Client,
    admin: &Client,
    table: &Table,
    piece: &Piece,
    share: u64,
    report: &Report,
) -> Result<(), Error> {
    let name = table.label();
    // The number, since names with points in them can look the same.
    let what = format!("copy {name} {} {}", table.oid, piece.from);
    let copied = match is_done(admin, &what).await? {
        true => None,
        false => commit_piece(donor, admin, table, piece, &what).await?,
    };
    report(Event::Copied {
        table: name,
        rows: copied.unwrap_or(0),
        bytes: share,
        before: copied.is_none(),
    });
    Ok(())
}

/// Copies a piece, and writes down that `what` is done. Returns its rows; none when an earlier run's commit of it came first.
async fn commit_piece(
    donor: &Client,
    admin: &Client,
    table: &Table,
    piece: &Piece,
    what: &str,
) -> Result<Option<u64>, Error> {
    let name = table.label();
    admin.batch_execute("BEGIN").await.map_err(sql("begin"))?;
    let rows = pass(donor, admin, &table.out(piece), &table.into())
        .await
        .map_err(sql(format!("copy {name}")))?;
    expect_its_names(donor, table).await?;
    // By itself: whatever else could be a duplicate shall not be taken for this.
    match admin.batch_execute(&done_once(what)).await {
        Ok(()) => {}
        Err(error) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => {
            let undone = admin.batch_execute("ROLLBACK").await;
            undone.map_err(sql(format!("undo the second copy of {name}")))?;
            return Ok(None);
        }
        Err(error) => return Err(sql(format!("write down that {name} is copied"))(error)),
    }
    admin
        .batch_execute("COMMIT")
        .await
        .map_err(sql(format!("commit the copy of {name}")))?;
    Ok(Some(rows))
}

/// A COPY finds its table and columns by the names of now, whatever its snapshot. Where others have taken these names since the cut it reads
/// those, a table that was made since as an empty one, and says nothing. To be asked behind it: its lock keeps what it has read from being renamed.
async fn expect_its_names(donor: &Client, table: &Table) -> Result<(), Error> {
    let look = || sql(format!("look whether {} was renamed", table.label()));
    let row = donor.query_one(IS_RENAMED, &[&table.oid]).await.map_err(look())?;
    match row.try_get::<_, bool>(0).map_err(look())? {
        true => Err(Error::Renamed(table.label())),
        false => Ok(()),
    }
}

/// All rows of a table by one COPY. Returns how many.
pub(super) async fn whole(donor: &Client, admin: &Client, table: &Table) -> Result<u64, Error> {
    let all = Piece { from: 0, to: None };
    let rows = pass(donor, admin, &table.out(&all), &table.into())
        .await
        .map_err(sql(format!("copy {} again", table.label())))?;
    expect_its_names(donor, table).await?;
    Ok(rows)
}

/// One COPY into another, a message at a time. Returns the rows.
pub(super) async fn pass(
    donor: &Client,
    admin: &Client,
    out: &str,
    into: &str,
) -> Result<u64, tokio_postgres::Error> {
    let (from, to) = tokio::try_join!(donor.copy_out(out), admin.copy_in::<_, bytes::Bytes>(into))?;
    pin_mut!(from, to);
    while let Some(data) = from.next().await {
        to.feed(data?).await?;
    }
    to.finish().await
}

/// Sequences go on where the donor's are. (No snapshot shows what they were: they are in no transaction.) One that was dropped since
/// the cut stays as it was made, until its DROP comes with the stream or is given by hand as at the others.
pub(super) async fn sequences(options: &Options, admin: &Client, from: &Source) -> Result<(), Error> {
    const LIST: &str = "list the donor's sequences";
    let rows = from
        .client
        .query(
            "SELECT c.oid, n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind = 'S' AND n.nspname !~ '^pg_'
               AND n.nspname NOT IN ('anabranch', 'anabranch_ddl', 'anabranch_join', 'information_schema')",
            &[],
        )
        .await
        .map_err(sql(LIST))?;
    // Not on the snapshot: a sequence that is gone would end that transaction.
    let donor = connect_donor(&options.donor_dsn).await?;
    for row in rows {
        let values = || -> Result<(u32, String, String), tokio_postgres::Error> {
            Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))
        };
        let (oid, schema, name) = values().map_err(sql(LIST))?;
        let name = qualified(&schema, &name);
        let value = value_of(&donor, oid)
            .await
            .map_err(sql(format!("read sequence {name}")))?;
        let Some((last, called)) = value else { continue };
        admin
            .batch_execute(&format!("SELECT setval({}, {last}, {called})", literal(&name)))
            .await
            .map_err(sql(format!("set sequence {name}")))?;
    }
    Ok(())
}

/// Last value of a sequence, whatever its name is by now, and whether that was given out; none when it is gone.
async fn value_of(donor: &Client, oid: u32) -> Result<Option<(i64, bool)>, tokio_postgres::Error> {
    loop {
        let named = donor
            .query_opt(
                "SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                 WHERE c.oid = $1 AND c.relkind = 'S'",
                &[&oid],
            )
            .await?;
        let Some(named) = named else { return Ok(None) };
        let name = qualified(named.try_get(0)?, named.try_get(1)?);
        let text = format!("SELECT last_value, is_called FROM {name}");
        match donor.query_one(&text, &[]).await {
            Ok(row) => return Ok(Some((row.try_get(0)?, row.try_get(1)?))),
            // Dropped or renamed between the two.
            Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pieces_of_a_table_leave_nothing_out() {
        let pieces = |blocks| Division { blocks, piece: 128 }.pieces();
        assert_eq!(pieces(0), [Piece { from: 0, to: None }]);
        assert_eq!(pieces(128), [Piece { from: 0, to: None }]);
        let three = pieces(128 * 3 + 5);
        assert_eq!(three.len(), 3);
        for pair in three.windows(2) {
            assert_eq!(pair[0].to, Some(pair[1].from));
        }
        assert_eq!(three[2].to, None);
    }
}
