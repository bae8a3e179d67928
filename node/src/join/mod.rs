//! Joining: an empty database becomes a member, with a copy of a donor's rows cut at one place of its stream.
//!
//! In:   the configuration, a donor's daemon and database        Out: a database, a journal and a checkpoint to run from;
//!       [`Event`]s to whoever watches
//! Holds: a session that keeps the donor's snapshot ([`keeper`]); else nothing between steps: what is done is written in the database
//!        (`anabranch_join.done`), with what was done
//! Invariants: 1. everything copied is of one snapshot, also after a new beginning: with another snapshot all of it is
//!        thrown away first; 2. the slot is made last, so nothing of the copy is in this node's stream; 3. the database
//!        is read only by default from the first step until every member knows the node (`crate::daemon`)
//! On crash: asked again, it goes on after what is done
//! Not here: the donor's part (`crate::donor`), catching up (the daemon itself)
//!
//! Reading order: [`preflight`], [`schema`], [`copy`], [`moved`], [`finish`], [`views`]; [`waiting`] for the donor; [`state`] what a second run knows
//! of the first; [`stage()`] what others are told.

pub mod copy;
mod finish;
mod keeper;
mod moved;
mod preflight;
mod schema;
mod stage;
mod state;
mod undo;
mod views;
mod waiting;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anabranch_conflict::policy::Policies;
use anabranch_proto::{NodeId, Vector};
use serde::Serialize;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::config::{self, Config};
use crate::donor::{Cut, ID_TAKEN, NAME_TAKEN};
use crate::link::{Asked, Identity, JoinError, JoinStep, Joining, RefusalCode};
use crate::membership;
use crate::pg::{self, Dsn, snapshot};
use crate::policy_change::Body;
use crate::setup::{self, Finding};

use keeper::Keeper;
pub use stage::stage;
pub use undo::abandon;
use waiting::Patience;

/// How to join.
#[derive(Debug, Clone)]
pub struct Options {
    /// Whom to copy from: its daemon, one of the configured peers.
    pub donor: config::Peer,
    /// And its database, as a role that may read all tables. Of several hosts the one that takes writes is found at each try.
    pub donor_dsn: Dsn,
    /// This node's database, as a superuser or the owner of everything that is to be made.
    pub admin_dsn: Dsn,
    /// Name of the daemon's role here.
    pub role: String,
    /// Folder of `pg_dump`; none for the newest that is found.
    pub pg_bin: Option<PathBuf>,
    /// Connections that copy and build indexes at once.
    pub jobs: usize,
    /// Blocks of a table that are copied by one COPY. A join that goes on keeps what it began with.
    pub piece_blocks: u32,
    /// How long the donor is waited for while its daemon or its server does not answer, seconds.
    pub wait_s: u32,
}

impl Options {
    /// With the one of the donor's servers that takes writes.
    async fn settled(&self) -> Result<Self, Error> {
        let donor_dsn = pg::settle(self.donor_dsn.clone(), None).await;
        Ok(Self {
            donor_dsn: donor_dsn.map_err(Error::DonorServer)?,
            ..self.clone()
        })
    }
}

/// What happens, for whoever watches.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A step begins.
    Step {
        /// In words.
        what: String,
    },
    /// Not getting on: what for.
    Waiting {
        /// In words.
        on: String,
    },
    /// How much there is to copy.
    Size {
        /// Tables.
        tables: usize,
        /// Their size at the donor, bytes.
        bytes: u64,
    },
    /// A piece of a table is copied and committed.
    Copied {
        /// `schema.table`
        table: String,
        /// Rows of the piece.
        rows: u64,
        /// Share of the donor's bytes that it stands for.
        bytes: u64,
        /// Done by an earlier run.
        before: bool,
    },
    /// An index, a constraint or another object after the data.
    Built {
        /// As `pg_dump` names it.
        what: String,
    },
    /// Something to know.
    Note {
        /// In words.
        text: String,
    },
}

/// Takes events; called from many tasks.
pub type Report = std::sync::Arc<dyn Fn(Event) + Send + Sync>;

/// A join does not get on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No connection.
    #[error("{}", crate::error::chain(.0))]
    Connect(#[from] pg::Error),
    /// No connection to the donor's server.
    #[error("{}", crate::error::chain(.0))]
    DonorServer(#[source] pg::Error),
    /// The donor.
    #[error(transparent)]
    Donor(#[from] JoinError),
    /// The snapshot is not there any more.
    #[error("the donor's snapshot is gone ({0}): neither its daemon nor this command holds it")]
    Snapshot(String),
    /// A statement failed.
    #[error("cannot {what}: {}", crate::error::sql(.source))]
    Sql {
        /// For what.
        what: String,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// Setting up failed.
    #[error(transparent)]
    Setup(#[from] setup::Error),
    /// `pg_dump` failed, with its words; it does when what the snapshot shows was dropped since.
    #[error("pg_dump failed: {0}")]
    Dump(String),
    /// Rows or a sequence's value do not fit what was made here: a type was changed at the donor since its schema was read.
    #[error("{0}")]
    Unfit(String),
    /// Others have its name, or its columns', since the snapshot was cut: what was read may be theirs.
    #[error(
        "{0} was renamed at the donor while it was copied: run the same command again, which goes on from here"
    )]
    Renamed(String),
    /// A file or a program.
    #[error("cannot {what}: {source}")]
    Io {
        /// For what.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// The journal.
    #[error(transparent)]
    Journal(#[from] crate::journal::Error),
    /// Something does not fit; what to do is in the text.
    #[error("{0}")]
    Refused(String),
}

impl Error {
    /// Does the donor not take this node in for its id, or its name?
    fn is_of_id(&self) -> bool {
        let Self::Donor(refused) = self else {
            return false;
        };
        let own_id = RefusalCode::OwnId.as_str();
        let code = refused.refusal_code();
        code.is_some_and(|code| [ID_TAKEN, NAME_TAKEN, own_id].contains(&code))
    }

    /// Is it that a statement named something that is not there, or is something else by now?
    fn is_of_names(&self) -> bool {
        match self {
            Self::Renamed(_) => true,
            Self::Sql { source, .. } => matches!(
                source.code(),
                Some(&SqlState::UNDEFINED_TABLE | &SqlState::UNDEFINED_COLUMN)
            ),
            _ => false,
        }
    }
}

/// What came of the donor's rows, if it is that they do not fit (class 22: a value that its type does not take).
fn unfit(failed: Error) -> Error {
    let Error::Sql { source, .. } = &failed else {
        return failed;
    };
    let is_unfit = source.code().is_some_and(|code| {
        code.code().starts_with("22")
            || matches!(*code, SqlState::DATATYPE_MISMATCH | SqlState::UNDEFINED_OBJECT)
    });
    if is_unfit {
        Error::Unfit(failed.to_string())
    } else {
        failed
    }
}

pub(crate) fn sql(what: impl Into<String>) -> impl FnOnce(tokio_postgres::Error) -> Error {
    let what = what.into();
    move |source| Error::Sql { what, source }
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
    let what = what.into();
    move |source| Error::Io { what, source }
}

/// So often may the donor be lost in the middle.
const LOST_MAX: u32 = 20;
/// So often is another snapshot cut because `pg_dump` failed on one, when nothing is copied. Because rows do not fit what it said one is
/// cut once: what fails again was no change of a type meanwhile.
const DUMPS_MAX: u32 = 3;

/// What must be true before a join begins, each with what to do about it. Waits for the donor's server.
///
/// # Errors
/// When one of both servers cannot be asked.
pub async fn preflight(config: &Config, options: &Options, report: &Report) -> Result<Vec<Finding>, Error> {
    let mut patience = Patience::new(options, report);
    loop {
        let looked = async {
            let options = options.settled().await?;
            Box::pin(preflight::preflight(config, &options)).await
        };
        match looked.await {
            Ok(found) => return Ok(found),
            Err(error) => patience.wait(error).await?,
        }
    }
}

/// Makes this node's database a copy of the donor's, ready for the daemon. Waits for a donor that is away, and goes on, or begins
/// anew with another snapshot, when it is back.
///
/// # Errors
/// When a step fails; run again, it goes on from there.
pub async fn run(config: &Config, options: &Options, report: &Report) -> Result<(), Error> {
    let report = &stage::kept(&config.node.data_dir, report);
    let mut patience = Patience::new(options, report);
    let mut lost = 0;
    // Outlives what fails: the next attempt goes on with its snapshot.
    let mut keeper = None;
    loop {
        let tried = async {
            let options = options.settled().await?;
            Box::pin(attempt(config, &options, (&mut patience, &mut keeper), report)).await
        };
        let failed = match tried.await {
            Ok(()) => return Ok(()),
            Err(failed) => failed,
        };
        if failed.is_of_snapshot() {
            keeper = None;
        }
        if failed.is_of_id() {
            state::State::open(config)?.was_refused()?;
        }
        lost += 1;
        if lost > LOST_MAX {
            return Err(failed);
        }
        let failed = if failed.is_of_donor() {
            failed
        } else {
            waiting::away(options).await.ok_or(failed)?
        };
        patience.wait(failed).await?;
    }
}

async fn attempt(
    config: &Config,
    options: &Options,
    (patience, keeper): (&mut Patience<'_>, &mut Option<Keeper>),
    report: &Report,
) -> Result<(), Error> {
    let mut state = state::State::open(config)?;
    let admin = connect_admin(&options.admin_dsn, "join").await?;
    let complete = state.is_complete(&admin).await;
    let is_complete = complete.map_err(sql("look whether the join is complete"))?;
    if is_complete || state.is_copied(config, &admin).await? {
        *keeper = None;
        // This database has the donor's facts by now; the donor's may be away.
        let (_, identity) = identity(config, &state, &names(&admin).await?)?;
        let donor = Joining::connect(config, &options.donor, &identity).await;
        tell_copied(config, options, &identity, donor, report).await;
        return if is_complete {
            state.remove()
        } else {
            end(&admin, &state, report).await
        };
    }
    let names = donor_names(options, patience).await?;
    let (policies, identity) = identity(config, &state, &names)?;
    state::prepare(&admin).await?;
    say(report, "become a member, and wait for a snapshot");
    state.will_ask(options.donor.id, config.node.id)?;
    let mut donor = connect(config, options, &identity, patience).await?;
    let watch = keeper::Watch {
        config,
        options,
        identity: &identity,
        report,
    };
    let (mut dumps_failed, mut was_unfit, mut gave_up) = (0, false, false);
    let (cut, held, from) = loop {
        let told = wait_for_cut(watch, &mut donor, keeper, patience).await?;
        if state::begin(&admin, &told).await? {
            if !gave_up {
                report(Event::Note {
                    text: SNAPSHOT_LOST.to_owned(),
                });
            }
            say(report, "throw away what was copied of another snapshot");
            undo::clear(&admin).await?;
            state::remember_cut(&admin, &told).await?;
        }
        let held = match keeper.take() {
            Some(kept) if kept.cut().is_same_place(&told) => kept,
            _ => Keeper::open(options, &told).await?,
        };
        let held = keeper.insert(held);
        let cut = held.cut().clone();
        let from = Source::open(&options.donor_dsn, &cut).await?;
        let moved = moved::Moved::open(options, &cut, &from).await?;
        let copied = copy_all(config, options, &cut, &from, &moved, &admin, report);
        let useless = match watch.during(held, Some("the copy goes on"), copied).await {
            Ok(useless) => useless,
            Err(failed) => match (moved.useless().await?, failed) {
                // A table that is not there any more, or has other columns: what failed is not the reason.
                (Some(useless), _) => Some(useless),
                (None, failed @ Error::Dump(_)) if dumps_failed < DUMPS_MAX => {
                    dumps_failed += 1;
                    Some(failed.to_string())
                }
                (None, failed @ Error::Unfit(_)) if !was_unfit => {
                    was_unfit = true;
                    Some(failed.to_string())
                }
                (None, failed) if failed.is_of_names() => Some(moved.altered().await?.ok_or(failed)?),
                (None, failed) => return Err(failed),
            },
        };
        let Some(useless) = useless else {
            break (cut, held, from);
        };
        report(Event::Note {
            text: format!("{useless}: another snapshot is cut, and all is copied anew"),
        });
        drop((moved, from));
        *keeper = None;
        gave_up = true;
        // What failed may have left its transaction open.
        admin.batch_execute("ROLLBACK").await.map_err(sql("begin anew"))?;
        donor.ask(JoinStep::Copied).await?;
    };
    crate::daemon::keep_policy(&config.node.data_dir, &policies)
        .map_err(|error| Error::Refused(error.to_string()))?;
    let whole = finish::Whole {
        config,
        options,
        state: &state,
        identity: &identity,
        names: &names,
        report,
    };
    let finished = whole.finish(&cut, &from, &mut donor, patience);
    Box::pin(watch.during(held, None, finished)).await?;
    drop(from);
    *keeper = None;
    tell_copied(config, options, &identity, Ok(donor), report).await;
    let admin = connect_admin(&options.admin_dsn, "join").await?;
    end(&admin, &state, report).await
}

/// What needs nothing of the donor, nor lets it keep anything.
async fn end(admin: &Client, state: &state::State, report: &Report) -> Result<(), Error> {
    views::refresh(admin, report).await?;
    admin
        .batch_execute("DROP SCHEMA anabranch_join CASCADE")
        .await
        .map_err(sql("remove schema anabranch_join"))?;
    // The last thing: whoever finds it knows that this may be left to do.
    state.remove()
}

/// The daemon of the donor, once it answers.
async fn connect(
    config: &Config,
    options: &Options,
    identity: &Identity,
    patience: &mut Patience<'_>,
) -> Result<Joining, Error> {
    loop {
        match Joining::connect(config, &options.donor, identity).await {
            Ok(donor) => return Ok(donor),
            Err(error) => patience.wait(error.into()).await?,
        }
    }
}

/// The donor lets its snapshot go. All that needs it is done: what fails is only said.
async fn tell_copied(
    config: &Config,
    options: &Options,
    identity: &Identity,
    mut donor: Result<Joining, JoinError>,
    report: &Report,
) {
    let mut failed = None;
    for _ in 0..20 {
        let told = match &mut donor {
            Ok(donor) => donor.ask(JoinStep::Copied).await.map(drop).err(),
            Err(_) => None,
        };
        match (told, donor) {
            (None, Ok(_)) => return,
            (Some(error), _) | (None, Err(error)) => failed = Some(error),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        donor = Joining::connect(config, &options.donor, identity).await;
    }
    if let Some(error) = failed {
        let text = format!(
            "the donor could not be told that all is copied ({error}): it keeps the snapshot until this node is ready, or its daemon is restarted"
        );
        report(Event::Note { text });
    }
}

/// The schema, the rows, and what is made of them, as the snapshot shows them. Says what makes the snapshot useless, if anything does.
async fn copy_all(
    config: &Config,
    options: &Options,
    cut: &Cut,
    from: &Source,
    moved: &moved::Moved<'_>,
    admin: &Client,
    report: &Report,
) -> Result<Option<String>, Error> {
    say(report, "copy the schema");
    let dump = schema::Dump::open(admin, options, cut, from).await?;
    // Defaults of the donor's tables may name it; here it gives this node's ids.
    if let Some(snowflake) = setup::snowflake::sql(config.node.id) {
        admin
            .batch_execute(&format!("BEGIN; {}\n{snowflake} COMMIT", setup::objects::SCHEMA))
            .await
            .map_err(sql("make anabranch.snowflake()"))?;
    }
    schema::before_data(admin, &dump).await?;
    let tables = copy::tables_of(&from.client, &moved.tables()).await?;
    copy::copy(options, cut, tables, admin, report)
        .await
        .map_err(unfit)?;
    let useless = moved.settle(admin).await.map_err(unfit)?;
    if useless.is_none() {
        say(report, "build indexes and constraints");
        schema::after_data(options, &dump, report).await?;
        copy::sequences(options, admin, from).await.map_err(unfit)?;
        views::remember(admin, from).await?;
    }
    Ok(useless)
}

fn say(report: &Report, what: &str) {
    report(Event::Step {
        what: what.to_owned(),
    });
}

/// A session that may write although the database is read only by default.
pub(crate) async fn connect_admin(dsn: &Dsn, purpose: &str) -> Result<Client, Error> {
    let (client, _driver) = pg::connect_dsn(dsn, purpose).await?;
    client
        .batch_execute("SET default_transaction_read_only = off")
        .await
        .map_err(sql("make the session writable"))?;
    client
        .batch_execute(pg::ROW_SECURITY_OF_OTHERS)
        .await
        .map_err(sql("set row_security"))?;
    Ok(client)
}

/// What all that ever were members are called, as a database with the cluster's facts says.
async fn names(client: &Client) -> Result<BTreeMap<String, u16>, Error> {
    let members = membership::read(client).await;
    Ok(Body::names(&members.map_err(sql("read anabranch.member"))?))
}

/// The same of the donor's database, once its server answers.
async fn donor_names(options: &Options, patience: &mut Patience<'_>) -> Result<BTreeMap<String, u16>, Error> {
    loop {
        let asked = async { names(&waiting::connect_donor(&options.donor_dsn).await?).await };
        match asked.await {
            Ok(names) => return Ok(names),
            Err(error) => patience.wait(error).await?,
        }
    }
}

/// The policies that this node comes with, and what it says of itself: the donor refuses others than its own.
fn identity(
    config: &Config,
    state: &state::State,
    names: &BTreeMap<String, u16>,
) -> Result<(Policies, Identity), Error> {
    let policies = config
        .policies_among(names)
        .map_err(|error| Error::Refused(error.to_string()))?;
    let identity = Identity::of(config, &state.incarnation, policies.hash());
    Ok((policies, identity))
}

/// Asks until there is a cut. The donor's daemon begins anew once it takes us in: the call may break meanwhile.
/// What is held here already is gone on with, if the donor stands by it.
async fn wait_for_cut(
    watch: keeper::Watch<'_>,
    donor: &mut Joining,
    keeper: &mut Option<Keeper>,
    patience: &mut Patience<'_>,
) -> Result<Cut, Error> {
    let keeper::Watch {
        config,
        options,
        identity,
        report,
    } = watch;
    let mut said = String::new();
    loop {
        keeper.take_if(|keeper| keeper.is_lost());
        let asked = match keeper {
            Some(keeper) => donor.hold(keeper.cut()).await,
            None => donor.ask(JoinStep::Cut).await,
        };
        match asked {
            // The next question is for another cut.
            Err(refused) if keeper.is_some() && waiting::is_of_snapshot(&refused) => *keeper = None,
            Ok(Asked::Cut(cut)) => {
                patience.answered();
                return Ok(cut);
            }
            Ok(Asked::Waiting(on)) => {
                patience.answered();
                if on != said {
                    report(Event::Waiting { on: on.clone() });
                    said = on;
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            Err(error) => {
                patience.wait(error.into()).await?;
                said.clear();
                *donor = connect(config, options, identity, patience).await?;
            }
        }
    }
}

/// Why all is copied anew.
const SNAPSHOT_LOST: &str = "what was copied before is of a snapshot that is gone: the donor's server was restarted, or its daemon and this \
     command were both down at one time. All is copied anew";

/// The donor's database, as it is in the snapshot.
pub(crate) struct Source {
    /// In a transaction on the snapshot.
    pub(crate) client: Client,
    /// Major version.
    pub(crate) major: i32,
    /// The donor's node id.
    pub(crate) node: NodeId,
    /// Its publication.
    pub(crate) publication: String,
    /// What it had applied of others there.
    pub(crate) applied: Vector,
}

impl Source {
    async fn open(dsn: &Dsn, cut: &Cut) -> Result<Self, Error> {
        let client = waiting::connect_donor(dsn).await?;
        on_snapshot(&client, cut).await?;
        let row = client
            .query_one(
                "SELECT node_id, publication, current_setting('server_version_num')::int / 10000 FROM anabranch.node",
                &[],
            )
            .await
            .map_err(sql("read the donor's anabranch.node"))?;
        let read = sql("read the donor's anabranch.node");
        let values = || -> Result<(i32, String, i32), tokio_postgres::Error> {
            Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))
        };
        let (node, publication, major) = values().map_err(read)?;
        let node = NodeId(u16::try_from(node).unwrap_or(0));
        let applied = finish::progress(&client, node).await?.0;
        Ok(Self {
            client,
            major,
            node,
            publication,
            applied,
        })
    }
}

/// Begins a transaction that sees exactly what the cut holds. Returns what that is, see [`Cut::sees`].
pub(crate) async fn on_snapshot(client: &Client, cut: &Cut) -> Result<String, Error> {
    let begun = snapshot::begin(client, &cut.snapshot, &cut.sees).await;
    begun.map_err(|unusable| match unusable {
        snapshot::Unusable::Gone(why) => Error::Snapshot(why),
        snapshot::Unusable::Failed(source) => sql("use the donor's snapshot")(source),
    })
}
