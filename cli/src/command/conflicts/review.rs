//! `conflicts ack`, `dismiss` and `replay`: what a person decides.

use anabranch_conflict::policy::Policies;
use anabranch_node::names::Names;
use anabranch_node::review::{self, Status};
use serde_json::json;
use tokio_postgres::Client;

use super::{filter, render};
use crate::args::{Filters, Mark, Replay};
use crate::failure::Failure;
use crate::output::{self, Format, say};

pub(super) async fn mark(
    names: &Names,
    client: &Client,
    mark: &Mark,
    status: Status,
    format: Format,
) -> Result<(), Failure> {
    let by = &mark.reviewer;
    let (mut ids, mut marked) = (Vec::new(), 0);
    if mark.all {
        let mut filter = filter::read(names, &mark.filters, 1)?;
        filter.partitions = review::partitions(client, &filter).await?;
        let how = (status, by.by.as_str(), by.note.as_deref());
        let told = review::mark_new(client, &filter, how, |some| {
            marked += some.len() as u64;
            ids.extend(some);
            Ok(())
        });
        let told = told.await;
        told.map_err(|failed: Failure| match marked {
            0 => failed,
            marked => Failure::Refused(format!("only {marked} conflict(s) {status}: {failed}")),
        })?;
    } else if mark.filters != Filters::default() {
        return Err(Failure::Usage(
            "filters go with --all; an id names its conflict by itself".to_owned(),
        ));
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
        marked = review::mark(client, &ids, status, &by.by, by.note.as_deref()).await?;
    }
    match format {
        Format::Json => output::json(&json!({ "status": status, "marked": marked, "ids": ids })),
        Format::Table => say(&format!("{marked} conflict(s) {status}\n")),
    }
}

/// `policies`: those in force, as far as it is known here.
pub(super) async fn replay(
    client: &mut Client,
    policies: Option<Policies>,
    options: &Replay,
    format: Format,
) -> Result<(), Failure> {
    let how = review::Replay {
        force: options.force,
        columns: options.columns.clone(),
        who: options.reviewer.by.clone(),
        note: options.reviewer.note.clone(),
        policies,
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
