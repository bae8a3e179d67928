//! `conflicts tail`: the newest, and with `--follow` what comes.

use std::collections::HashMap;
use std::time::Duration;

use anabranch_node::config::Config;
use anabranch_node::review::{self, Filter, Line};
use jiff::{SignedDuration, Timestamp};
use tokio_postgres::Client;

use super::{filter, render};
use crate::args::Tail;
use crate::failure::Failure;
use crate::output::{Format, say};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// A line is seen only after its transaction commits, by then others may be newer: each look goes back so far.
const OVERLAP: SignedDuration = SignedDuration::from_secs(120);
/// Most lines in one look.
const LOOK_MAX: u32 = 10_000;

pub(super) async fn run(
    config: &Config,
    client: &Client,
    options: &Tail,
    format: Format,
) -> Result<(), Failure> {
    let mut filter = filter::read(config, &options.filters, options.lines.max(1))?;
    let mut newest = now(client).await?;
    // First what is there already, also below the lines shown: what comes from here on is new.
    let mut seen: HashMap<String, Timestamp> = HashMap::new();
    if options.follow {
        let mut filter = filter.clone();
        let _ = unseen(client, &mut filter, &mut newest, &mut seen).await?;
    }
    let mut lines = review::list(client, &filter).await?;
    lines.reverse();
    if options.lines > 0 {
        seen.extend(lines.iter().map(|line| (line.conflict_id.clone(), newest)));
        print(config, &lines, format)?;
    }
    if !options.follow {
        return Ok(());
    }
    loop {
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
        let lines = unseen(client, &mut filter, &mut newest, &mut seen).await?;
        print(config, &lines, format)?;
    }
}

/// Lines that were not there before, oldest first.
async fn unseen(
    client: &Client,
    filter: &mut Filter,
    newest: &mut Timestamp,
    seen: &mut HashMap<String, Timestamp>,
) -> Result<Vec<Line>, Failure> {
    let from = newest.saturating_sub(OVERLAP).unwrap_or(*newest);
    filter.since = Some(from.to_string());
    filter.limit = LOOK_MAX;
    let mut lines = review::list(client, filter).await?;
    lines.reverse();
    lines.retain(|line| !seen.contains_key(&line.conflict_id));
    for line in &lines {
        let at = line.detected_at.parse::<Timestamp>().unwrap_or(*newest);
        *newest = at.max(*newest);
        seen.insert(line.conflict_id.clone(), at);
    }
    seen.retain(|_, at| *at >= from);
    Ok(lines)
}

/// The server's time: it stamps the lines.
async fn now(client: &Client) -> Result<Timestamp, Failure> {
    let failed = Failure::query("the server's time");
    let row = client
        .query_one(
            "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::int8",
            &[],
        )
        .await
        .map_err(&failed)?;
    let us: i64 = row.try_get(0).map_err(&failed)?;
    Timestamp::from_microsecond(us)
        .map_err(|error| Failure::Refused(format!("the server's time cannot be read: {error}")))
}

fn print(config: &Config, lines: &[Line], format: Format) -> Result<(), Failure> {
    for line in lines {
        match format {
            Format::Json => {
                let json = serde_json::to_string(line).map_err(anabranch_node::review::Error::from)?;
                say(&format!("{json}\n"))?;
            }
            Format::Table => {
                let [at, id, table, key, kind, winner, loser, lost, _] = render::cells(config, line);
                let lost = if lost.is_empty() {
                    String::new()
                } else {
                    format!(", lost {lost}")
                };
                say(&format!(
                    "{at}  {id}  {table} {key}: {kind}, {winner} over {loser}{lost}\n"
                ))?;
            }
        }
    }
    Ok(())
}
