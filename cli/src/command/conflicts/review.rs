//! `conflicts ack`, `dismiss` and `replay`: what a person decides.

use anabranch_node::config::Config;
use anabranch_node::review::{self, Status};
use serde_json::json;
use tokio_postgres::Client;

use super::{filter, render};
use crate::args::{Mark, Replay};
use crate::failure::Failure;
use crate::output::{self, Format, say};

/// Most lines that one `--all` marks.
const ALL_MAX: u32 = 100_000;

pub(super) async fn mark(
    config: &Config,
    client: &Client,
    mark: &Mark,
    status: Status,
    format: Format,
) -> Result<(), Failure> {
    let mut ids = Vec::new();
    if mark.all {
        let filter = filter::read(config, &mark.filters, ALL_MAX)?;
        let lines = review::unreviewed(client, &filter).await?;
        ids.extend(lines.into_iter().map(|line| line.conflict_id));
    } else {
        for id in &mark.ids {
            let line = review::find(client, id).await?;
            if line.status == Status::Replayed {
                return Err(Failure::Refused(format!(
                    "conflict {} was replayed; that stays its status",
                    render::short_id(&line.conflict_id)
                )));
            }
            ids.push(line.conflict_id);
        }
    }
    let by = &mark.reviewer;
    let marked = review::mark(client, &ids, status, &by.by, by.note.as_deref()).await?;
    match format {
        Format::Json => output::json(&json!({ "status": status, "marked": marked, "ids": ids })),
        Format::Table => say(&format!("{marked} conflict(s) {status}\n")),
    }
}

pub(super) async fn replay(client: &mut Client, options: &Replay, format: Format) -> Result<(), Failure> {
    let how = review::Replay {
        force: options.force,
        columns: options.columns.clone(),
        who: options.reviewer.by.clone(),
        note: options.reviewer.note.clone(),
    };
    let replayed = review::replay(client, &options.id, &how).await?;
    match format {
        Format::Json => output::json(&replayed),
        Format::Table if replayed.columns.is_empty() => say(&format!(
            "{}: row {}\n",
            render::short_id(&replayed.conflict_id),
            replayed.did
        )),
        Format::Table => say(&format!(
            "{}: row {}, column(s) {}\n",
            render::short_id(&replayed.conflict_id),
            replayed.did,
            replayed.columns.join(", ")
        )),
    }
}
