//! `anabranch leave`: takes this node out of its cluster, without losing anything of it.
//!
//! The daemon does it. Here it is begun, watched, and called off.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anabranch_node::config::Config;
use anabranch_node::membership::{self, Membership};
use anabranch_node::pg;
use anabranch_node::setup;
use anabranch_node::setup::sql::{ident, literal};
use anabranch_node::status::{self, Leaving};
use anabranch_proto::NodeId;
use serde_json::json;
use tokio_postgres::Client;

use crate::args::Leave;
use crate::failure::Failure;
use crate::output::{self, Format, Waiting, say};

/// Between two looks at how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(500);

pub(crate) async fn run(path: &Path, verb: &Leave, format: Format) -> Result<ExitCode, Failure> {
    let config = super::load(path)?;
    let client = setup::connect(&super::admin_dsn(&config, verb.admin.admin_dsn.as_deref()).await?).await?;
    let state = State::read(&client).await?;
    let node = setup::facts::read_node(&client).await;
    let node = node.map_err(Failure::query("which node this database is"))?;
    setup::check::same_node(node.as_ref(), &config)?;
    if verb.cancel {
        return cancel(&config, &client, &state, format).await;
    }
    if state.left {
        return end(&config, format);
    }
    let members = membership::read(&client).await.map_err(unreadable())?;
    check(&config, &members).await?;
    if state.since.is_none() && !members.said_goodbye(config.node.id) {
        begin(&config, &client).await?;
    }
    match wait(&config, &client, verb.end_sessions, format).await? {
        Ended::Left => end(&config, format),
        Ended::Alone => alone(&config, format),
    }
}

/// How it went.
enum Ended {
    /// It is no member any more.
    Left,
    /// All others were gone before it: there is nobody to leave.
    Alone,
}

/// For `map_err`.
fn unreadable() -> impl Fn(tokio_postgres::Error) -> Failure {
    Failure::query("how far this node is with leaving")
}

/// The row of `anabranch.leaving`.
struct State {
    /// Since when the database is read only by default; none while the node stays.
    since: Option<SystemTime>,
    /// Is it no member any more?
    left: bool,
}

impl State {
    async fn read(client: &Client) -> Result<Self, Failure> {
        let row = client
            .query_opt("SELECT since, left_at IS NOT NULL FROM anabranch.leaving", &[])
            .await
            .map_err(unreadable())?;
        let Some(row) = row else {
            return Ok(Self {
                since: None,
                left: false,
            });
        };
        Ok(Self {
            since: Some(row.try_get(0).map_err(unreadable())?),
            left: row.try_get(1).map_err(unreadable())?,
        })
    }
}

/// Can this node leave?
async fn check(config: &Config, members: &Membership) -> Result<(), Failure> {
    let (own, live) = (config.node.id, members.live());
    is_kept(members, own)?;
    if live.len() == 1 {
        return Err(Failure::Refused(
            "this node is the only member, there is nobody to leave: stop its daemon and run `anabranch remove`, which takes \
             Anabranch out of the database and leaves the rows"
                .to_owned(),
        ));
    }
    if !members.ready().contains(&own) {
        return Err(Failure::Refused(
            "this node still joins: wait until it takes writes (`anabranch status` says for whom it waits), then let it leave"
                .to_owned(),
        ));
    }
    // Without its daemon nothing would happen.
    super::status::read(config).await.map(drop)
}

/// Who is dropped by the others does not leave. (Whoever has said goodbye, does.)
fn is_kept(members: &Membership, own: NodeId) -> Result<(), Failure> {
    let text = if members.said_goodbye(own) {
        return Ok(());
    } else if !members.live().contains(&own) {
        "this node is no member any more, it was dropped: `anabranch remove` takes away what is left"
    } else if members.dropping().contains(&own) {
        "the others are dropping this node (`anabranch node drop`): they do not wait for what it has still to send"
    } else {
        return Ok(());
    };
    Err(Failure::Refused(text.to_owned()))
}

/// From here on new sessions write only if they insist, and the daemon drains.
async fn begin(config: &Config, client: &Client) -> Result<(), Failure> {
    // Not before the begin of any session that is there: where the clock was set back since, one that may write would pass for a new one.
    let note = format!(
        "INSERT INTO anabranch.leaving (since) \
         SELECT greatest(clock_timestamp(), max(backend_start) + interval '1 microsecond') FROM pg_stat_activity \
         WHERE datname = current_database() AND pid <> pg_backend_pid() AND NOT {} ON CONFLICT DO NOTHING",
        pg::own_session(&literal(&super::role(config)?))
    );
    let failed = |source: tokio_postgres::Error| {
        Failure::Refused(format!(
            "the database cannot be made read only: {}; use --admin-dsn with a superuser",
            setup::error::chain(&source)
        ))
    };
    let row = client
        .query_one("SELECT current_database()::text", &[])
        .await
        .map_err(failed)?;
    let database: String = row.try_get(0).map_err(failed)?;
    // Tried first: who may do the other alone would leave a database that is read only, and nobody who knows of it.
    client
        .batch_execute(&format!("BEGIN READ WRITE; {note}; ROLLBACK"))
        .await
        .map_err(failed)?;
    client
        .batch_execute(&format!(
            "ALTER DATABASE {} SET default_transaction_read_only = on",
            ident(&database)
        ))
        .await
        .map_err(failed)?;
    client
        .batch_execute(&format!("BEGIN READ WRITE; {note}; COMMIT"))
        .await
        .map_err(failed)
}

/// Calls it off, unless the others have been told.
async fn cancel(
    config: &Config,
    client: &Client,
    state: &State,
    format: Format,
) -> Result<ExitCode, Failure> {
    if state.since.is_none() {
        return Err(Failure::Refused(
            "this node is not leaving, there is nothing to cancel".to_owned(),
        ));
    }
    // The daemon says goodbye under a lock on the row: whoever is second sees what the first did.
    let stays = format!(
        "BEGIN READ WRITE; DELETE FROM anabranch.leaving; \
         DO $$ BEGIN \
             IF EXISTS (SELECT FROM anabranch.member WHERE node_id = {id} AND fact = 'dropping' AND said_by = {id}) THEN \
                 RAISE EXCEPTION 'goodbye was said' USING ERRCODE = 'AB001'; \
             END IF; \
             EXECUTE format('ALTER DATABASE %I RESET default_transaction_read_only', current_database()); \
         END $$; COMMIT",
        id = config.node.id
    );
    if let Err(error) = client.batch_execute(&stays).await {
        let too_late = error.code().is_some_and(|code| code.code() == "AB001");
        return Err(if too_late {
            Failure::Refused(
                "it is too late: everything is drained and the others have been told that this node leaves"
                    .to_owned(),
            )
        } else {
            Failure::query("whether the node can stay")(error)
        });
    }
    let name = &config.node.name;
    match format {
        Format::Table => say(&format!("node `{name}` stays; new sessions may write again\n"))?,
        Format::Json => output::line(&json!({ "event": "stays", "node": name }))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits until the node has left, and says what for whenever that changes.
async fn wait(
    config: &Config,
    client: &Client,
    end_sessions: bool,
    format: Format,
) -> Result<Ended, Failure> {
    let mut waiting = Waiting::new(format);
    let name = &config.node.name;
    loop {
        let state = State::read(client).await?;
        if state.left {
            return Ok(Ended::Left);
        }
        let Some(since) = state.since else {
            return Err(Failure::Refused(
                "leaving was cancelled meanwhile: the node stays".to_owned(),
            ));
        };
        // Meanwhile; then its daemon ends, or what it waits for does not come.
        is_kept(
            &membership::read(client).await.map_err(unreadable())?,
            config.node.id,
        )?;
        if end_sessions {
            end_old_sessions(config, client, since).await?;
        }
        let now = match super::status::read(config).await {
            Ok(status) => status.leaving,
            // It begins anew when the members change; else it is to be started again.
            Err(error) => Some(Leaving {
                text: format!("waits for the daemon of this node: {error}"),
                ..Leaving::default()
            }),
        };
        if now.as_ref().is_some_and(|now| now.phase == status::ALONE) {
            return Ok(Ended::Alone);
        }
        if let Some(now) = now {
            let event = json!({
                "event": "waiting", "node": name, "phase": now.phase, "for": now.waits_for, "text": now.text,
            });
            waiting.tell(format!("`{name}` leaves: {}", now.text), event)?;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn end_old_sessions(config: &Config, client: &Client, since: SystemTime) -> Result<(), Failure> {
    let (role, own) = (super::role(config)?, pg::own_session("$2::text"));
    client
        .execute(
            &format!(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() \
                 AND backend_start < $1 AND backend_type = 'client backend' AND pid <> pg_backend_pid() AND NOT {own}"
            ),
            &[&since, &role],
        )
        .await
        .map(drop)
        .map_err(Failure::query("which sessions are to be ended"))
}

fn alone(config: &Config, format: Format) -> Result<ExitCode, Failure> {
    let (name, id) = (&config.node.name, config.node.id);
    match format {
        Format::Table => say(&format!(
            "node `{name}` (id {id}) is the only member now, there is nobody to leave. New sessions cannot write \
             (default_transaction_read_only) until its daemon is stopped and `anabranch remove` is run, which takes Anabranch out of the \
             database, opens it for writes and leaves the rows. Or let the node stay, as a cluster that others \
             may join: `anabranch leave --cancel`\n"
        ))?,
        Format::Json => output::line(&json!({ "event": "alone", "node": name, "id": id }))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn end(config: &Config, format: Format) -> Result<ExitCode, Failure> {
    let (name, id) = (&config.node.name, config.node.id);
    match format {
        Format::Table => say(&format!(
            "node `{name}` (id {id}) has left: every other member has all that it wrote, and its slot is gone. Its database \
             stays read only by default; stop its daemon and run `anabranch remove`, which opens it. Its id is not used again\n"
        ))?,
        Format::Json => output::line(&json!({ "event": "left", "node": name, "id": id }))?,
    }
    Ok(ExitCode::SUCCESS)
}
