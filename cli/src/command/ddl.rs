//! `anabranch ddl`: changes the schema of all nodes, at one place of this node's stream.

use std::path::Path;
use std::process::ExitCode;

use anabranch_node::config::Config;
use anabranch_node::membership;
use anabranch_node::names::Names;
use anabranch_node::policy_change::Body;
use anabranch_node::setup::{self, ddl};
use anabranch_node::status::StuckDdl;
use serde_json::json;
use tokio_postgres::Client;

use crate::args::Ddl;
use crate::failure::Failure;
use crate::output::{self, Format, say, say_plainly, table};

pub(crate) async fn run(path: &Path, verb: &Ddl, format: Format) -> Result<ExitCode, Failure> {
    let config = super::load(path)?;
    let mut client = setup::connect(&super::admin_dsn(&config, None).await?).await?;
    match (&verb.statement, &verb.done) {
        (Some(statement), _) => run_statement(&config, &mut client, verb, statement, format).await,
        (None, Some(id)) => done(&config, &client, id, format).await,
        (None, None) => list(&config, &client, format).await,
    }
}

async fn run_statement(
    config: &Config,
    client: &mut Client,
    verb: &Ddl,
    statement: &str,
    format: Format,
) -> Result<ExitCode, Failure> {
    let role = match (&verb.role, config.ddl.roles.as_slice()) {
        (Some(role), _) => role,
        (None, [role]) => role,
        (None, []) => {
            return Err(Failure::Refused(
                "no role's DDL is replicated: name the owners of the tables in ddl.roles, at every node, and run `anabranch \
                 init` there"
                    .to_owned(),
            ));
        }
        (None, roles) => {
            return Err(Failure::Usage(format!(
                "say as whom with --role; ddl.roles are {}",
                roles.join(", ")
            )));
        }
    };
    let members = membership::read(client)
        .await
        .map_err(Failure::query("who is a member"))?;
    let policies = config.policies_among(&Body::names(&members))?;
    let ddl::Said { id, sequences } = ddl::say(
        client,
        role,
        statement,
        &verb.search_path,
        u64::from(verb.lock_timeout) * 1_000,
        &policies,
    )
    .await
    .map_err(|error| Failure::Refused(format!("nothing was changed: {error}")))?;
    match format {
        Format::Table => say(&format!(
            "done here; it runs at the other nodes when they come to it ({id}). A node that cannot says so in `anabranch \
             status`, and waits\n"
        ))?,
        Format::Json => output::json(&json!({ "id": id, "role": role, "sequences": sequences }))?,
    }
    if !sequences.is_empty() && format == Format::Table {
        say(&format!(
            "values of {} would collide between the nodes: run `anabranch sequences apply` at each of them, once it has run there\n",
            sequences.join(", ")
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What waits here was done by hand. Without the daemon too: it reads at its next start what was.
async fn done(config: &Config, client: &Client, id: &str, format: Format) -> Result<ExitCode, Failure> {
    let named = match super::status::read(config).await {
        Ok(status) => Named::among(&status.ddl, id)?,
        Err(unasked) => Named::unasked(client, id, &unasked).await?,
    };
    client
        .execute(
            "WITH s AS (SELECT set_config('synchronous_commit', 'local', true)) \
             INSERT INTO anabranch.ddl_done (id) SELECT $1::text::uuid FROM s ON CONFLICT DO NOTHING",
            &[&named.id],
        )
        .await
        .map_err(Failure::query("what was done by hand"))?;
    match format {
        Format::Table => say(&match named.node {
            Some(node) => format!(
                "{} counts as done at this node; the transactions of node {node} go on\n",
                named.id
            ),
            None => format!(
                "{} counts as done at this node: the daemon passes it over when it comes to it\n",
                named.id
            ),
        })?,
        Format::Json => output::json(&json!({ "done": named.id, "node": named.node }))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A statement that shall count as done here.
struct Named {
    id: String,
    /// Who said it, as far as is known.
    node: Option<u16>,
}

impl Named {
    /// The one of those that wait whose id begins so. Nothing is no beginning: a variable that was not set names no statement.
    fn among(stuck: &[StuckDdl], id: &str) -> Result<Self, Failure> {
        let is_named = |stuck: &&StuckDdl| !id.is_empty() && stuck.id.starts_with(id);
        let found: Vec<_> = stuck.iter().filter(is_named).collect();
        let [stuck] = found.as_slice() else {
            let waiting: Vec<&str> = stuck.iter().map(|stuck| stuck.id.as_str()).collect();
            return Err(Failure::Usage(if waiting.is_empty() {
                "no statement waits at this node".to_owned()
            } else {
                format!(
                    "`{id}` does not name one of those that wait here: {}",
                    waiting.join(", ")
                )
            }));
        };
        Ok(Self {
            id: stuck.id.clone(),
            node: Some(stuck.node),
        })
    }

    /// By its id alone: without a daemon nobody knows what waits, but what has run is in the table.
    async fn unasked(client: &Client, id: &str, unasked: &Failure) -> Result<Self, Failure> {
        if !is_whole(id) {
            return Err(Failure::Usage(format!(
                "what waits here is not known ({unasked}): without the daemon give the whole id, which its log has, and `anabranch ddl` at \
                 the node that ran the statement"
            )));
        }
        let row = client
            .query_one(
                "SELECT EXISTS (SELECT FROM anabranch.ddl WHERE id = $1::text::uuid)",
                &[&id],
            )
            .await
            .map_err(Failure::query("the statements that have travelled"))?;
        if row
            .try_get(0)
            .map_err(Failure::query("the statements that have travelled"))?
        {
            return Err(Failure::Refused(format!(
                "{id} has run at this node: it waits no more"
            )));
        }
        Ok(Self {
            id: id.to_ascii_lowercase(),
            node: None,
        })
    }
}

/// Is this an id from beginning to end, as the daemon writes it?
fn is_whole(id: &str) -> bool {
    let parts: Vec<&str> = id.split('-').collect();
    let is_hex = |part: &&str| part.bytes().all(|byte| byte.is_ascii_hexdigit());
    parts.iter().map(|part| part.len()).eq([8, 4, 4, 4, 12]) && parts.iter().all(is_hex)
}

/// The newest statements known here, and those that wait.
async fn list(config: &Config, client: &Client, format: Format) -> Result<ExitCode, Failure> {
    let failed = Failure::query("the statements that have travelled");
    let rows = client
        .query(
            "SELECT d.id::text, d.node_id, d.role, d.command, to_char(d.said_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), \
                 EXISTS (SELECT FROM anabranch.ddl_done o WHERE o.id = d.id) \
             FROM anabranch.ddl d ORDER BY d.said_at DESC LIMIT 50",
            &[],
        )
        .await
        .map_err(&failed)?;
    let known: Vec<(String, i32, String, String, String, bool)> = rows
        .iter()
        .map(|row| {
            Ok((
                row.try_get(0)?,
                row.try_get(1)?,
                row.try_get(2)?,
                row.try_get(3)?,
                row.try_get(4)?,
                row.try_get(5)?,
            ))
        })
        .collect::<Result<_, _>>()
        .map_err(&failed)?;
    // Without the daemon what was run is still told, but not that nothing waits.
    let (stuck, unasked) = match super::status::read(config).await {
        Ok(status) => (Some(status.ddl), None),
        Err(failure) => (None, Some(failure)),
    };
    let names = Names::read(config, client).await;
    let how = |by_hand: bool| if by_hand { "by hand" } else { "run" };
    match format {
        Format::Json => {
            let run: Vec<_> = known
                .iter()
                .map(|(id, node, role, command, at, by_hand)| {
                    let name = u16::try_from(*node).ok().map(|node| names.of(Some(node)));
                    json!({ "id": id, "node": node, "node_name": name, "role": role, "command": command, "at": at, "here": how(*by_hand) })
                })
                .collect();
            output::json(&json!({ "run": run, "waiting": stuck }))?;
        }
        Format::Table => {
            let stuck = stuck.unwrap_or_default();
            let waiting = stuck.iter().map(|stuck| {
                let since = stuck.since.clone();
                [
                    stuck.id.clone(),
                    names.with_id(stuck.node),
                    since,
                    "WAITS".to_owned(),
                    stuck.command.clone(),
                ]
            });
            let run = known.into_iter().map(|(id, node, _, command, at, by_hand)| {
                let node = u16::try_from(node).map_or_else(|_| node.to_string(), |node| names.with_id(node));
                [id, node, at, how(by_hand).to_owned(), command]
            });
            say(&table(
                ["id", "node", "at", "here", "statement"],
                waiting.chain(run),
            ))?;
            for stuck in &stuck {
                say_plainly(&format!("{}: {}\n", stuck.id, stuck.text))?;
            }
        }
    }
    if let Some(failure) = unasked {
        output::remark(format_args!("anabranch: what waits here is not known: {failure}"));
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_is_empty_names_nothing() {
        let id = "0c7be1f6-4f0c-4f8e-9d52-3b1a5d1f7a10";
        let only = [StuckDdl {
            id: id.to_owned(),
            ..StuckDdl::default()
        }];
        assert!(Named::among(&only, "0c7b").is_ok_and(|named| named.id == id));
        let Err(Failure::Usage(said)) = Named::among(&only, "") else {
            panic!("it named one")
        };
        assert!(said.contains(id), "{said}");
    }

    #[test]
    fn only_a_whole_id_is_one_without_a_daemon() {
        assert!(is_whole("0c7be1f6-4f0c-4f8e-9d52-3b1a5d1f7a10"));
        assert!(is_whole("0C7BE1F6-4F0C-4F8E-9D52-3B1A5D1F7A10"));
        for part in [
            "",
            "0c7b",
            "0c7be1f6-4f0c-4f8e-9d52-3b1a5d1f7a1",
            "0c7be1f6-4f0c-4f8e-9d52-3b1a5d1f7a1x",
            "{0c7be1f6-4f0c-4f8e-9d52-3b1a5d1f7a10}",
        ] {
            assert!(!is_whole(part), "{part}");
        }
    }
}
