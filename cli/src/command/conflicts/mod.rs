//! `anabranch conflicts`: reviewing the conflict log.
//!
//! [`filter`] – options to a filter; [`render`] – for people; [`stats`], [`export`], [`tail`], [`review`], [`suggest`] – a verb each.

mod export;
mod filter;
mod render;
mod review;
mod stats;
mod suggest;
mod tail;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anabranch_conflict::policy::Policies;
use anabranch_node::admin;
use anabranch_node::config::{Config, ConfigError};
use anabranch_node::names::Names;
use anabranch_node::pg;
use anabranch_node::review::{Filter, Line, cluster};
use anabranch_node::{review as log, setup};
use tokio_postgres::Client;

use crate::args::{Conflicts, List, Review};
use crate::failure::Failure;
use crate::output::{self, Format, say, say_plainly};

/// This node's configuration, or why there is none: a reviewer may have a connection string alone.
type Local = Result<Config, Failure>;

pub(crate) async fn run(path: &Path, review: &Review, format: Format) -> Result<ExitCode, Failure> {
    let config = local(path, review.dsn.is_some())?;
    let mut client = connect(&config, review.dsn.as_deref()).await?;
    let names = names(&config, &client).await;
    match &review.verb {
        Conflicts::List(options) => list((&config, &names), &client, options, format).await?,
        Conflicts::Show { id } => show(&names, &client, id, format).await?,
        Conflicts::Stats(filters) => stats::run(&names, &client, filters, format).await?,
        Conflicts::Tail(options) => {
            tail::run((&config, names), client, review.dsn.as_deref(), options, format).await?;
        }
        Conflicts::Export(options) => export::run(&names, &client, options, format).await?,
        Conflicts::Ack(mark) => {
            review::mark(&names, &client, mark, log::Status::Acknowledged, format).await?
        }
        Conflicts::Dismiss(mark) => {
            review::mark(&names, &client, mark, log::Status::Dismissed, format).await?
        }
        Conflicts::Replay(options) => {
            let policies = config.as_ref().ok().and_then(|config| policies(config, &names));
            review::replay(&mut client, policies, options, format).await?;
        }
        Conflicts::Suggest { table } => suggest::run(&client, table, format).await?,
        Conflicts::Explain { id } => explain(&names, &client, id, format).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads the configuration. With `--dsn` it is not needed: then one that cannot be read is none. One that is wrong is said to be.
fn local(path: &Path, has_dsn: bool) -> Result<Local, Failure> {
    match super::load(path) {
        Ok(config) => Ok(Ok(config)),
        Err(unread @ Failure::Config(ConfigError::Read { .. })) if has_dsn => Ok(Err(unread)),
        Err(failure) => Err(failure),
    }
}

async fn names(config: &Local, client: &Client) -> Names {
    let configured = config.as_ref().map(Names::configured).unwrap_or_default();
    configured.and_those_of(client).await
}

async fn connect(config: &Local, dsn: Option<&str>) -> Result<Client, Failure> {
    let dsn = match (config, dsn) {
        (Ok(config), dsn) => super::settled(config, "--dsn", dsn).await?,
        (Err(_), Some(dsn)) => pg::settle(super::dsn_of("--dsn", dsn)?, None).await?,
        (Err(unread), None) => return Err(Failure::Refused(unread.to_string())),
    };
    let client = setup::connect(&dsn).await?;
    let there = client
        .query_one("SELECT to_regclass('anabranch.conflict_open') IS NOT NULL", &[])
        .await
        .and_then(|row| row.try_get(0));
    match there.map_err(Failure::query("whether this database is set up"))? {
        true => Ok(client),
        false => Err(Failure::Refused(
            "there is no conflict log here, or one of an older layout: run `anabranch init`".to_owned(),
        )),
    }
}

/// What the policy file of this node says, if it can be read by whom the command runs as.
fn policies(config: &Config, names: &Names) -> Option<Policies> {
    let names: BTreeMap<u16, String> = names.clone().into();
    let ids = names.into_iter().map(|(id, name)| (name, id)).collect();
    config.policies_among(&ids).ok()
}

async fn list(
    (config, names): (&Local, &Names),
    client: &Client,
    options: &List,
    format: Format,
) -> Result<(), Failure> {
    // One more than is shown tells whether there are more.
    let mut filter = filter::read(names, &options.filters, options.limit.saturating_add(1))?;
    filter.partitions = log::partitions(client, &filter).await?;
    let limit = options.limit as usize;
    if options.all_nodes {
        let config = config.as_ref().map_err(|unread| {
            Failure::Refused(format!(
                "--all-nodes asks the daemon of this machine, and which that is says the configuration: {unread}"
            ))
        })?;
        let socket = config.node.data_dir.join(admin::SOCKET);
        let mut joined = admin::conflicts(&socket, &filter)
            .await
            .map_err(|error| match error {
                admin::Error::Transport { .. } => Failure::Refused(format!(
                    "no daemon answers at {}; it is what asks the other nodes ({error})",
                    socket.display()
                )),
                error => error.into(),
            })?;
        // So many are read of each log at most.
        let is_more = joined.conflicts.len() > limit.min(cluster::LINES_MAX as usize - 1);
        joined.conflicts.truncate(limit);
        match format {
            Format::Json => output::json(&joined)?,
            Format::Table => say_plainly(&render::joined(names, &filter, &joined))?,
        }
        let last = joined.conflicts.last().map(|conflict| &conflict.line);
        tell_of_more(last.filter(|_| is_more), limit);
        return Ok(());
    }
    let mut lines = log::list(client, &filter).await?;
    let is_more = lines.len() > limit;
    lines.truncate(limit);
    let counted = log::storm_count(client, &filter).await?;
    if format == Format::Json {
        output::json(&lines)?;
        tell_of_counted(&filter, counted);
        tell_of_more(lines.last().filter(|_| is_more), limit);
        return Ok(());
    }
    if lines.is_empty() && counted == 0 {
        return say("no conflicts\n");
    }
    say(&render::listing(names, &lines))?;
    say(&render::counted(&filter, counted))?;
    tell_of_more(lines.last().filter(|_| is_more), limit);
    Ok(())
}

/// What the lines that were shown lack, on standard error.
fn tell_of_counted(filter: &Filter, counted: i64) {
    let said = render::counted(filter, counted);
    if !said.is_empty() {
        output::remark(format_args!("anabranch: {}", said.trim_end()));
    }
}

/// How to see what comes behind the last line that was shown, if there is more. On standard error: nothing of the log, and JSON stays what it
/// is.
fn tell_of_more(last: Option<&Line>, limit: usize) {
    if let Some(last) = last {
        output::remark(format_args!(
            "anabranch: there are more: --until {} shows those before, --limit more than {limit} at once",
            last.until()
        ));
    }
}

async fn show(names: &Names, client: &Client, id: &str, format: Format) -> Result<(), Failure> {
    let line = log::find(client, id).await?;
    match format {
        Format::Json => output::json(&line),
        Format::Table => {
            let others = log::group(client, &line).await?;
            say_plainly(&render::one(names, &line, &others))
        }
    }
}

async fn explain(names: &Names, client: &Client, id: &str, format: Format) -> Result<(), Failure> {
    let line = log::find(client, id).await?;
    let sentences = log::explain(&line, &|id| names.of(Some(id)));
    match format {
        Format::Json => output::json(&serde_json::json!({
            "conflict_id": line.conflict_id, "explanation": sentences,
        })),
        Format::Table => say_plainly(&format!("{}\n", sentences.join("\n"))),
    }
}
