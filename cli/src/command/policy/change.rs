//! `anabranch policy change`: another policy for a cluster that runs.
//!
//! The daemons do it. Here it is asked for, watched, and called off.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anabranch_conflict::change::{Asked, Changes, Phase, Said, Vote};
use anabranch_conflict::policy::Policies;
use anabranch_node::config::Config;
use anabranch_node::membership::{self, Membership};
use anabranch_node::policy_change::{self, Body, ChangeId, Known, Source, fit, force};
use anabranch_node::setup;
use anabranch_node::status::{PolicyChange, Status};
use anabranch_proto::NodeId;
use serde_json::json;
use tokio_postgres::Client;

use crate::command::{admin_dsn, status};
use crate::failure::Failure;
use crate::output::{self, Format, Waiting, say};

/// Between two looks at how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// So many looks in a row a daemon that begins anew may not answer.
const SILENT_LOOKS: u32 = 20;

pub(crate) async fn run(config: &Config, file: &Path, format: Format) -> Result<ExitCode, Failure> {
    let client = connect(config).await?;
    let (members, known) = read(&client).await?;
    let next_source = source(config, Some(file))?;
    let next = next_source
        .parse(&policy_change::ids(&Body::names(&members)))
        .map_err(|faults| Failure::Refused(format!("policy file {}: {faults}", file.display())))?;
    let hash = next.hash();
    if let Some((id, change)) = known.changes.unfinished(&members.live()) {
        // Asked for the same once more: it is watched.
        if change.next == hash && change.by == Some(config.node.id) {
            return wait(config, &client, id, format).await;
        }
        return Err(Failure::Refused(format!(
            "another change of the policy is under way, asked for by `{}`: wait for its end (`anabranch status`)",
            change.by.map(|by| members.name(by)).unwrap_or_default()
        )));
    }
    let asked = ask_for(config, &client, (&members, &known), (next_source, &next)).await?;
    match asked {
        Some(id) => wait(config, &client, id, format).await,
        None => {
            match format {
                Format::Table => say("nothing to change: this policy is in force\n")?,
                Format::Json => output::line(&json!({ "event": "unchanged", "hash": hash }))?,
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn connect(config: &Config) -> Result<Client, Failure> {
    Ok(setup::connect(&admin_dsn(config, None).await?).await?)
}

async fn read(client: &Client) -> Result<(Membership, Known), Failure> {
    let members = membership::read(client)
        .await
        .map_err(Failure::query("who is a member"))?;
    let known = policy_change::read(client)
        .await
        .map_err(Failure::query("which changes of the policy there are"))?;
    Ok((members, known))
}

/// What stands in a file; without one, the empty policy.
fn source(config: &Config, file: Option<&Path>) -> Result<Source, Failure> {
    Ok(match file {
        Some(path) => Source::of_file(config, path)?,
        None => Source::default(),
    })
}

/// Asks for it, unless it is in force already.
async fn ask_for(
    config: &Config,
    client: &Client,
    (members, known): (&Membership, &Known),
    (next_source, next): (Source, &Policies),
) -> Result<Option<ChangeId>, Failure> {
    let own = config.node.id;
    // Without its daemon nothing would happen.
    let status = daemon(config).await?;
    let file = config.policies_among(&Body::names(members))?;
    let in_force = force::find(config, &file, client, members)
        .await
        .map_err(|error| Failure::Refused(error.to_string()))?;
    let former = in_force.policies;
    if former.hash() != status.policy.hash {
        return Err(Failure::Refused(format!(
            "the policy file of this node is not the one that its daemon runs with (hash {}): put that back into its place, and give \
             the new one as another file",
            status.policy.hash
        )));
    }
    if former.hash() == next.hash() {
        return Ok(None);
    }
    check_members(members, own)?;
    let found = fit::obstacles(client, &config.postgres.publication, &former, next)
        .await
        .map_err(Failure::query("whether the tables are fit"))?;
    if !found.is_empty() {
        return Err(Failure::Refused(format!(
            "the policy cannot be changed so while the cluster runs:\n{}",
            found.join("\n")
        )));
    }
    let body = Body {
        former: match in_force.source {
            Some(source) => source,
            None => source(config, config.cluster.policy.as_deref())?,
        },
        former_hash: former.hash(),
        next: next_source,
        next_hash: next.hash(),
        nodes: Body::names(members),
    };
    // What all members will make of it.
    force::both(&body).map_err(Failure::Refused)?;
    let said = Said::Asked {
        former: body.former_hash.clone(),
        next: body.next_hash.clone(),
        number: known.changes.next_number(),
    };
    let id = policy_change::new_id();
    policy_change::say(client, (id, own, own), &said, Some(&body))
        .await
        .map_err(Failure::query(
            "whether a change can be asked for (older schemas lack what it needs: run `anabranch init` again at every node)",
        ))?;
    Ok(Some(id))
}

/// What the daemon says, which may begin anew just now.
async fn daemon(config: &Config) -> Result<Status, Failure> {
    for _ in 0..SILENT_LOOKS {
        if let Ok(status) = status::read(config).await {
            return Ok(status);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    status::read(config).await
}

/// Nobody comes or goes meanwhile.
fn check_members(members: &Membership, own: NodeId) -> Result<(), Failure> {
    let live = members.live();
    if !members.survivors().contains(&own) {
        return Err(Failure::Refused(
            "this node is no member any more, or is being dropped: run this at one that stays".to_owned(),
        ));
    }
    let joining: Vec<String> = live
        .difference(&members.ready())
        .map(|&node| members.name(node))
        .collect();
    if !joining.is_empty() {
        return Err(Failure::Refused(format!(
            "{} joins: wait until that is over",
            joining.join(", ")
        )));
    }
    Ok(())
}

/// Waits until it is over everywhere, or off, and says what for whenever that changes.
async fn wait(config: &Config, client: &Client, id: ChangeId, format: Format) -> Result<ExitCode, Failure> {
    let mut waiting = Waiting::new(format);
    let mut silent = 0;
    loop {
        let (members, known) = read(client).await?;
        let live = members.live();
        let Some(change) = known.changes.get(id) else {
            return Err(Failure::Refused("the change is not there any more".to_owned()));
        };
        match change.phase(&live) {
            Phase::Off => return off(change, format),
            Phase::Ended => return end(config, change, format),
            Phase::Asking | Phase::Made | Phase::Over => {}
        }
        let now = match status::read(config).await {
            Ok(status) => {
                silent = 0;
                status.policy.change
            }
            // It begins anew now and then.
            Err(_) if silent < SILENT_LOOKS => {
                silent += 1;
                None
            }
            Err(error) => Some(PolicyChange {
                text: format!("waits for the daemon of this node: {error}"),
                ..PolicyChange::default()
            }),
        };
        if let Some(now) = now {
            let event = json!({
                "event": "waiting", "id": id.to_string(), "phase": now.phase, "for": now.waits_for, "text": now.text,
            });
            waiting.tell(format!("change of the policy: {}", now.text), event)?;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn off(change: &Asked, format: Format) -> Result<ExitCode, Failure> {
    let by = change.by.and_then(|by| change.votes.get(&by));
    let why = match by {
        Some(Vote::Refused(why)) => why.clone(),
        _ => "the node that asked for it is gone".to_owned(),
    };
    match format {
        Format::Table => Err(Failure::Refused(format!(
            "the policy is not changed, all nodes go on with the former one: {why}"
        ))),
        Format::Json => {
            output::line(&json!({ "event": "off", "why": why }))?;
            Ok(ExitCode::FAILURE)
        }
    }
}

fn end(config: &Config, change: &Asked, format: Format) -> Result<ExitCode, Failure> {
    let file = config.node.data_dir.join(force::AGREED);
    match format {
        Format::Table => say(&format!(
            "all nodes run with the new policy, hash {}. Put it where cluster.policy names it, at every node: it is in {} there\n",
            change.next,
            file.display()
        ))?,
        Format::Json => {
            output::line(&json!({ "event": "changed", "hash": change.next, "agreed": file }))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Calls it off, as long as it is not made.
pub(crate) async fn cancel(config: &Config, format: Format) -> Result<ExitCode, Failure> {
    let client = connect(config).await?;
    let (members, known) = read(&client).await?;
    let live = members.live();
    let Some((id, change)) = known.changes.unfinished(&live) else {
        return Err(Failure::Refused(
            "no change of the policy is under way".to_owned(),
        ));
    };
    let own = config.node.id;
    if change.by != Some(own) {
        return Err(Failure::Refused(format!(
            "`{}` asked for it: run this there",
            change.by.map(|by| members.name(by)).unwrap_or_default()
        )));
    }
    let vote = Said::Voted(Vote::Refused("cancelled".to_owned()));
    policy_change::say(&client, (id, own, own), &vote, None)
        .await
        .map_err(Failure::query("whether it can be called off"))?;
    let changes: Changes = read(&client).await?.1.changes;
    let phase = changes.get(id).map(|change| change.phase(&live));
    if phase != Some(Phase::Off) {
        return Err(Failure::Refused(
            "it is too late: the change is made, and new writes are decided by the new policy".to_owned(),
        ));
    }
    match format {
        Format::Table => say("the change is called off: all nodes go on with the former policy\n")?,
        Format::Json => output::line(&json!({ "event": "off", "why": "cancelled" }))?,
    }
    Ok(ExitCode::SUCCESS)
}
