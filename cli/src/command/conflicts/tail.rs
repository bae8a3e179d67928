//! `conflicts tail`: the newest, and with `--follow` everything that comes, however much at once; a server that is away is waited for. It
//! goes on until it is interrupted, or nobody reads what it says.

use std::collections::HashMap;
use std::pin::pin;
use std::time::Duration;

use anabranch_node::names::Names;
use anabranch_node::review::{self, Filter, Line};
use jiff::Timestamp;
use tokio_postgres::Client;

use super::{Local, filter, render};
use crate::args::Tail;
use crate::failure::Failure;
use crate::output::{self, Format, say, say_plainly};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// A line is seen only after its transaction commits, by then others may be newer: each look goes back so far.
const OVERLAP_US: i64 = 120_000_000;
/// Lines that are read, and held, at once.
const READ_MAX: usize = 1_000;

pub(super) async fn run(
    (config, mut names): (&Local, Names),
    mut client: Client,
    dsn: Option<&str>,
    options: &Tail,
    format: Format,
) -> Result<(), Failure> {
    let mut filter = filter::read(&names, &options.filters, options.lines.max(1))?;
    filter.partitions = review::partitions(&client, &filter).await?;
    let mut newest = now(&client).await?;
    // First what is there already, also below the lines shown: what comes from here on is new.
    let mut seen: HashMap<String, i64> = HashMap::new();
    if options.follow {
        let _ = unseen(&client, &mut filter.clone(), &mut newest, &mut seen).await?;
    }
    let mut lines = review::list(&client, &filter).await?;
    lines.reverse();
    if options.lines > 0 {
        seen.extend(lines.iter().map(|line| (line.conflict_id.clone(), newest)));
        print((config, &client, &mut names), &lines, format).await?;
    }
    super::tell_of_counted(&filter, review::storm_count(&client, &filter).await?);
    if !options.follow {
        return Ok(());
    }
    let ended = async {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            () = output::unread() => {}
        }
    };
    let mut ended = pin!(ended);
    loop {
        let look = look(
            (config, &client, &mut names),
            &mut filter,
            (&mut newest, &mut seen),
            format,
        );
        let looked = tokio::select! {
            looked = look => looked,
            () = &mut ended => return Ok(()),
        };
        // A session that was ended by the server is closed a moment after it says so.
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = &mut ended => return Ok(()),
        }
        match looked {
            Ok(()) => {}
            Err(failure) if client.is_closed() => {
                output::remark(format_args!("anabranch: {failure}; connecting again"));
                client = tokio::select! {
                    client = connect(config, dsn) => client,
                    () = &mut ended => return Ok(()),
                };
            }
            Err(failure) => return Err(failure),
        }
    }
}

/// Tries until there is a session.
async fn connect(config: &Local, dsn: Option<&str>) -> Client {
    loop {
        if let Ok(client) = super::connect(config, dsn).await {
            return client;
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// Prints what was not there before.
async fn look(
    (config, client, names): (&Local, &Client, &mut Names),
    filter: &mut Filter,
    (newest, seen): (&mut i64, &mut HashMap<String, i64>),
    format: Format,
) -> Result<(), Failure> {
    let before = *newest;
    let unseen = unseen(client, filter, newest, seen).await?;
    let mut shown = 0;
    for ids in unseen.chunks(READ_MAX) {
        let printed = match review::these(client, ids).await {
            Ok(lines) => print((config, client, &mut *names), &lines, format).await,
            Err(error) => Err(error.into()),
        };
        if let Err(failure) = printed {
            // The next look shows what this one did not.
            *newest = before;
            for id in unseen.iter().skip(shown) {
                seen.remove(id);
            }
            return Err(failure);
        }
        shown += ids.len();
    }
    Ok(())
}

/// Ids of lines that were not there before, the oldest first. From now on they were.
async fn unseen(
    client: &Client,
    filter: &mut Filter,
    newest: &mut i64,
    seen: &mut HashMap<String, i64>,
) -> Result<Vec<String>, Failure> {
    let from = newest.saturating_sub(OVERLAP_US);
    // A table may get further ones.
    filter.partitions = review::partitions(client, filter).await?;
    filter.since = Some(time(from)?.to_string());
    let mut lines = review::ids(client, filter).await?;
    lines.retain(|(id, _)| !seen.contains_key(id));
    lines.sort_by(|a, b| (a.1, &a.0).cmp(&(b.1, &b.0)));
    for (id, at) in &lines {
        *newest = *at.max(newest);
        seen.insert(id.clone(), *at);
    }
    seen.retain(|_, at| *at >= from);
    Ok(lines.into_iter().map(|(id, _)| id).collect())
}

fn time(us: i64) -> Result<Timestamp, Failure> {
    Timestamp::from_microsecond(us)
        .map_err(|error| Failure::Refused(format!("the server's time cannot be read: {error}")))
}

/// The server's time, which stamps the lines: microseconds since the Unix epoch.
async fn now(client: &Client) -> Result<i64, Failure> {
    let failed = Failure::query("the server's time");
    let row = client
        .query_one(
            "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::int8",
            &[],
        )
        .await
        .map_err(&failed)?;
    row.try_get(0).map_err(&failed)
}

async fn print(
    (config, client, names): (&Local, &Client, &mut Names),
    lines: &[Line],
    format: Format,
) -> Result<(), Failure> {
    let origins = lines
        .iter()
        .flat_map(|line| [line.local_origin, line.remote_origin]);
    // It has joined meanwhile.
    if origins.flatten().any(|origin| !names.knows(origin)) {
        *names = super::names(config, client).await;
    }
    for line in lines {
        match format {
            Format::Json => {
                let json = serde_json::to_string(line).map_err(anabranch_node::review::Error::from)?;
                say(&format!("{json}\n"))?;
            }
            Format::Table => {
                let [at, id, table, key, kind, winner, loser, lost, _] = render::cells(names, line);
                let lost = if lost.is_empty() {
                    String::new()
                } else {
                    format!(", lost {lost}")
                };
                say_plainly(&format!(
                    "{at}  {id}  {table} {key}: {kind}, {winner} over {loser}{lost}\n"
                ))?;
            }
        }
    }
    Ok(())
}
