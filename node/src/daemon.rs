//! The daemon: wires the stages, in the order of the flow, and starts them again when the server was away.
//!
//! In:   configuration            Out: running stages until told to stop
//! Holds: nothing of its own
//! On crash: everything is rebuilt from the journal, the slot and `anabranch.progress`
//! Not here: what any stage does

mod dropping;
mod gate;
mod identity;
mod key_watch;
mod leaving;
mod left;
mod lock_watch;
mod log_upkeep;
mod maintenance;
mod merge_watch;
mod orphans;
mod policy;
mod policy_watch;
mod publication_watch;
mod removed_watch;
mod report;
mod rivals;
mod said;
mod sequence_watch;
mod trim;
mod visible;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anabranch_conflict::policy::Policies;
use anabranch_proto::{Lsn, NodeId, Position, Stamp, Vector};
use tokio::sync::watch;

use crate::apply::{self, Applier, Seat};
use crate::capture::{self, Capture, Replay};
use crate::config::Config;
use crate::donor::{self, Donor};
use crate::index::{self, RowIndex};
use crate::journal::{self, Journal, RealDisk};
use crate::link::{self, LinkEvent, LinkOptions, Links};
use crate::membership::Membership;
use crate::resolve::Resolver;
use crate::shared::{Shared, Visibility, lock};
use crate::source::{self, Source, SourceOptions};
use crate::{admin, heal, metrics, pg, policy_change, verify, web};

pub use identity::IdentityError;
pub(crate) use identity::{check as check_identity, check_server, members as read_members};
pub(crate) use policy::begin as keep_policy;
pub(crate) use trim::write as keep_settled;

/// The daemon cannot run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server cannot be reached.
    #[error(transparent)]
    Connect(#[from] pg::Error),
    /// This database, folder and configuration do not belong together.
    #[error(transparent)]
    Identity(#[from] identity::IdentityError),
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] journal::Error),
    /// The row index cannot be made.
    #[error(transparent)]
    Index(#[from] index::Error),
    /// The slot cannot be decoded.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// Capture failed.
    #[error(transparent)]
    Capture(#[from] capture::Error),
    /// Apply failed.
    #[error(transparent)]
    Apply(#[from] apply::Error),
    /// Links failed.
    #[error("{}", crate::error::chain(.0))]
    Link(#[from] link::Error),
    /// The admin socket failed.
    #[error(transparent)]
    Admin(#[from] admin::Error),
    /// A statement failed.
    #[error("{}", crate::error::sql(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// Our server is older than what a peer has of it.
    #[error("{0}")]
    WentBack(String),
    /// A standby was promoted that lacks the end of our stream.
    #[error(
        "the journal holds this node's transactions up to {journaled}, but in this server's history timeline {} is {}: a \
         standby was promoted that lacks the end of it. Run `anabranch heal`, which puts back what it lacks \
         (docs/errors/the-server-went-back.md)", journaled.epoch, left_at(*left)
    )]
    Lacks {
        /// The journal's last own position.
        journaled: Position,
        /// Where the server's history left that timeline.
        left: Option<Lsn>,
    },
    /// The journal took no more of what peers sent.
    #[error("the journal takes no more frames: {0}")]
    LinkJournal(String),
    /// There is another set of live members, or another policy: the stages begin anew with it.
    #[error("the members or the policy have changed")]
    Members,
    /// The others have closed this node's stream, as it had asked.
    #[error("this node has left its cluster")]
    Left,
    /// The policy file.
    #[error(transparent)]
    Policy(#[from] crate::config::PolicyError),
    /// Which policy is in force.
    #[error(transparent)]
    InForce(#[from] Box<policy_change::force::Error>),
    /// Another policy than before, too early.
    #[error(
        "the policy is not the one that this node ran with, and there are writes that are not yet known to be applied at \
         every node: put the former policy back at all nodes (node.data_dir/policy.txt shows it) and start them, then change it by \
         `anabranch policy change` while they run; or stop all writes, wait until `anabranch status` shows no lag anywhere for a few \
         seconds, stop all daemons, and change the file at all nodes (docs/policies.md)"
    )]
    PolicyInUse,
    /// The policy of before cannot be read, or this one not kept.
    #[error(
        "policy.txt in node.data_dir cannot be read or written: {0}; free disk space or correct its permissions"
    )]
    PolicyFile(std::io::Error),
    /// A table is not fit for what it says.
    #[error("the policy does not fit the tables here:\n{0}")]
    Unfit(String),
    /// What was settled.
    #[error("settled.json in node.data_dir cannot be read: {0}; correct its permissions, or restore it")]
    Settled(std::io::Error),
    /// The journal cannot be read.
    #[error("reading the journal: {0}")]
    Unreadable(String),
    /// The slot is new, and what came before it is not written again yet.
    #[error(
        "a heal was begun here and is not finished, so rows that nobody has heard of could be overwritten: run `anabranch \
         heal` again"
    )]
    Healing,
    /// What is known of a heal.
    #[error("heal.json in node.data_dir cannot be read: {0}; correct its permissions, or restore it")]
    HealFile(std::io::Error),
    /// The server's timeline has the number of the one that this node ran on, and is another.
    #[error(
        "timeline {timeline} of this server begins at {found}, but the timeline of that number that this node has run on began at \
         {known}: two standbys were promoted apart, and this is the other one. Use the one that the node has run on; if that is \
         gone, the node is lost (docs/errors/when-a-node-is-lost.md)"
    )]
    OtherBranch {
        /// The number.
        timeline: u32,
        /// Where this one begins.
        found: Lsn,
        /// Where that of before began.
        known: Lsn,
    },
    /// What is known of the server.
    #[error(
        "server.json in node.data_dir cannot be read or written: {0}; correct its permissions, or free disk space"
    )]
    ServerFile(std::io::Error),
    /// The publication is not what it was.
    #[error(
        "publication {publication} {why}: what is written here meanwhile is not in the stream, and does not come into it by itself. \
         Run `anabranch init`, which mends the publication, then `anabranch heal`, which sends what was written \
         (docs/errors/the-publication-was-changed.md)"
    )]
    Publication {
        /// Its name.
        publication: String,
        /// What is wrong with it, or was.
        why: String,
    },
    /// What is known of the publication.
    #[error(
        "publication.json in node.data_dir cannot be read or written: {0}; correct its permissions, or free disk space"
    )]
    PublicationFile(std::io::Error),
    /// The server does not answer, and another was promoted.
    #[error("the server does not answer any more, and another one was promoted: {0}")]
    Moved(String),
    /// A stage ended by itself.
    #[error("{0} ended unexpectedly")]
    Ended(&'static str),
}

impl Error {
    /// May it pass by itself, such as a server that restarts?
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Moved(_) => true,
            Self::Connect(error) => error.is_transient(),
            Self::Source(error) => error.is_transient(),
            Self::Capture(error) => error.is_transient(),
            Self::Sql(error) | Self::Identity(identity::IdentityError::Away(error)) => {
                pg::is_transient(error)
            }
            Self::InForce(error) => match error.as_ref() {
                policy_change::force::Error::Sql(error) => pg::is_transient(error),
                _ => false,
            },
            Self::Apply(apply::Error::Session(apply::SessionError::Connect(error))) => error.is_transient(),
            Self::Apply(
                apply::Error::Session(apply::SessionError::Sql(error)) | apply::Error::Sql(error),
            ) => pg::is_transient(error),
            Self::Apply(apply::Error::Fence(apply::fence::Error::Connect(error))) => error.is_transient(),
            Self::Apply(apply::Error::Fence(_) | apply::Error::Forgotten) => true,
            _ => false,
        }
    }

    /// Does somebody have to say which server it is? One that is simply not up yet, as after a reboot, comes up by itself.
    fn needs_a_choice(&self) -> bool {
        matches!(
            self,
            Self::Connect(pg::Error::SeveralPrimaries { .. } | pg::Error::Outdated { .. })
        )
    }

    /// The error of decoding, if a place of the stream cannot be passed, whatever is mended now.
    const fn for_good(&self) -> Option<&source::Error> {
        match self {
            Self::Source(error) | Self::Capture(capture::Error::Source(error)) if error.is_for_good() => {
                Some(error)
            }
            _ => None,
        }
    }
}

/// Where a timeline was left, for people.
pub(crate) fn left_at(left: Option<Lsn>) -> String {
    left.map_or_else(|| "not there".to_owned(), |left| format!("left at {left}"))
}

/// Runs until `stop` turns true. A server that is away is waited for, also one that has not answered yet.
///
/// # Errors
/// When something must be mended by people first; what and how is in the error's text.
pub async fn run(config: Config, mut stop: watch::Receiver<bool>) -> Result<(), Error> {
    let config = Arc::new(config);
    // Once: a file that is being changed must not be taken up in the middle of a life, when members or the server come and go.
    let policies = config.policies()?;
    let boot_id = uuid::Uuid::new_v4().to_string();
    let metrics = metrics::Endpoint::start(&config);
    let mut pause = Duration::from_millis(200);
    let mut said = said::Said::default();
    let mut came_up = false;
    let mut known = Membership::default();
    let donor = Arc::new(Donor::default());
    // Which server this process is on: it stays there until that is gone.
    let mut here = None;
    loop {
        let started = tokio::time::Instant::now();
        let error = match Box::pin(run_once(
            (&config, &policies),
            (&boot_id, &metrics),
            stop.clone(),
            &mut here,
            &mut known,
            &donor,
        ))
        .await
        {
            Ok(()) => return Ok(()),
            Err(Error::Left | Error::Identity(identity::IdentityError::Left)) => {
                return left::stay(&config, stop).await;
            }
            Err(Error::Members) => {
                tracing::info!("the members or the policy have changed: beginning anew");
                continue;
            }
            Err(error) => error,
        };
        publication_watch::mark(&config, &error);
        came_up |= here.is_some();
        if !error.is_transient() || (!came_up && error.needs_a_choice()) {
            return Err(error);
        }
        if matches!(error, Error::Moved(_)) {
            here = None;
        }
        said.say(&error);
        if started.elapsed() > Duration::from_secs(30) {
            pause = Duration::from_millis(200);
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = stop.changed() => {}
        }
        if *stop.borrow() {
            return Ok(());
        }
        pause = (pause * 2).min(Duration::from_secs(5));
    }
}

/// Are the tables fit for their policies? A node that has run with this policy runs on with constraints that came and columns that
/// went since, with an alarm (`merge_watch`): the policy can be changed only once all that is open is closed, which takes a daemon.
async fn fit_for_policies(
    sql: &tokio_postgres::Client,
    (policies, publication): (&Policies, &str),
    dir: &Path,
) -> Result<(), Error> {
    // Updates that do not tell the row before would be taken for more than they are: that waits for nobody.
    let unfit = crate::setup::merged::unfit(sql, policies).await?;
    let mut findings = unfit.identity;
    if !policy::is_unchanged(dir, policies).map_err(Error::PolicyFile)? {
        findings.extend(unfit.columns);
        findings.extend(crate::setup::together::examine(sql, policies).await?);
    }
    if policy::is_new(dir, policies).map_err(Error::PolicyFile)? {
        findings.extend(crate::setup::exclusion::examine(sql, publication, policies).await?);
    }
    if findings.is_empty() {
        return Ok(());
    }
    let lines = findings
        .iter()
        .map(|finding| format!("  {}: {}; {}", finding.check, finding.found, finding.remedy));
    Err(Error::Unfit(lines.collect::<Vec<_>>().join("\n")))
}

/// One life of all stages.
async fn run_once(
    (config, file): (&Arc<Config>, &Policies),
    (boot_id, metrics): (&str, &metrics::Endpoint),
    mut stop: watch::Receiver<bool>,
    here: &mut Option<pg::ServerId>,
    known: &mut Membership,
    donor: &Arc<Donor>,
) -> Result<(), Error> {
    let hosts = pg::dsn(&config.postgres)?;
    let config = &pinned(config, &hosts, here).await?;
    let (sql, _driver) = pg::connect(&config.postgres, "control").await?;
    let node_row = identity::check(config, &sql).await?;
    // What was decoded may be visible a moment later only.
    known.join(identity::members(config, &sql).await?);
    let in_force = policy_change::force::find(config, file, &sql, known)
        .await
        .map_err(Box::new)?;
    in_force.keep(&config.node.data_dir).map_err(Error::PolicyFile)?;
    let policies = &in_force.policies;
    let of = (policies, config.postgres.publication.as_str());
    fit_for_policies(&sql, of, &config.node.data_dir).await?;
    let sql = Arc::new(sql);
    let config = &Arc::new(Config {
        peers: known.peers(config.node.id, &config.peers),
        ..config.as_ref().clone()
    });
    let members: Vec<NodeId> = [config.node.id]
        .into_iter()
        .chain(config.peers.iter().map(|peer| peer.id))
        .collect();

    let (journal, recovered) = open_journal(config).await?;
    if recovered.last.is_empty() {
        policy::begin(&config.node.data_dir, policies)?;
    }
    let healed = heal::State::read(&config.node.data_dir).map_err(Error::HealFile)?;
    if healed
        .as_ref()
        .is_some_and(|state| state.phase == heal::Phase::Begun)
    {
        return Err(Error::Healing);
    }
    let seat = Seat::take(config).await?;
    let slot = source::slot::require(&sql, &config.postgres.slot).await?;
    let own = recovered.last.get(config.node.id);
    let (identity, timelines) = source::identify(&pg::dsn(&config.postgres)?, "control").await?;
    let server = server_of(&identity, &timelines);
    check_branch(config, &server)?;
    let is_healed = healed
        .as_ref()
        .is_some_and(|state| state.timeline == timelines.current());
    if !is_healed && !timelines.holds(own) {
        return Err(Error::Lacks {
            journaled: own,
            left: timelines.left(own.epoch),
        });
    }
    let kept = capture::read_checkpoint(&config.node.data_dir, slot.confirmed_flush, &timelines);
    // It is written when all that it has seen is durable in the journal.
    if kept
        .as_ref()
        .is_some_and(|(_, fold)| fold.vector().get(config.node.id) > own)
    {
        return Err(capture::Error::JournalLost {
            confirmed: slot.confirmed_flush,
        }
        .into());
    }
    let mut checkpoint = match kept {
        Some(fold) => capture::Checkpoint {
            start: fold.0,
            fold: fold.1,
            journaled: own,
        },
        None => capture::find_checkpoint(
            &journal,
            config.node.id,
            own,
            (slot.confirmed_flush, node_row.slot_start),
            &timelines,
        )?,
    };
    if checkpoint.fold.witness_us().is_none() {
        checkpoint.fold.witness(identity::first_witness(&sql).await?);
    }

    let index_dir = config.node.data_dir.join("index");
    let index = RowIndex::new(&index_dir, config.apply.index_memory_mib << 20)?;
    let (settled, low) = if recovered.last.is_empty() {
        (Vector::new(), Stamp::ZERO)
    } else {
        trim::read(&config.node.data_dir).map_err(Error::Settled)?
    };
    let mut resolver = Resolver::new(config.node.id, index, policies.clone());
    resolver.settle(settled.clone());
    if let Some(id) = in_force.change {
        resolver.begin_change(id, in_force.point);
    }
    resolver.set_unique_keys(crate::apply::catalog::unique_keys(&sql).await?);
    let shared = Arc::new(Shared::new(config.node.id, resolver, known.clone()));
    shared.timeline.store(timelines.current(), Ordering::Relaxed);
    let running = gate::begin(&sql, &shared).await?;
    *lock(&shared.settled) = settled;
    *lock(&shared.low) = low;
    apply::load_quarantine(&sql, &shared).await?;
    lock(&shared.resolver).begin_rebuild(journal.stats().oldest, low);
    *lock(&shared.checkpoint) = checkpoint.fold.vector().clone();
    let began = tokio::time::Instant::now();
    // What dropped nodes wrote may be unsettled still.
    let gone: Vec<NodeId> = known.dropped().into_keys().collect();
    let origins: Vec<NodeId> = members.iter().chain(&gone).copied().collect();
    // Until the slot has moved, which it does not past what was found.
    let lost = healed
        .as_ref()
        .and_then(|state| {
            Some(Position {
                epoch: state.timeline,
                lsn: state.slot_at?,
            })
        })
        .filter(|at| slot.confirmed_flush <= at.lsn);
    if let Some(told_at) = healed.as_ref().and_then(|state| state.told_at) {
        shared.states_until.store(told_at.0, Ordering::Relaxed);
    }
    if let Some(state) = healed.filter(|state| state.phase == heal::Phase::Written) {
        *lock(&shared.heal_record) = Some(state.record(&config.node.data_dir));
    }
    let vector = checkpoint.fold.vector();
    let (rows, tables) = capture::rebuild(&journal, &shared, vector, &origins, lost, running.as_ref())?;
    lock(&shared.resolver).rebuilt();
    if in_force.is_by_change() {
        lock(&shared.resolver)
            .forget_settled()
            .map_err(capture::Error::from)?;
    }
    let joins = !known.ready().contains(&config.node.id);
    let goes_back = policy::goes_back(
        &config.node.data_dir,
        policies,
        (config.node.id, &recovered.last, &members),
        slot.confirmed_flush,
    )
    .map_err(Error::PolicyFile)?;
    if joins || lost.is_some() || goes_back {
        lock(&shared.resolver)
            .distrust(&tables, checkpoint.start, goes_back)
            .map_err(capture::Error::from)?;
    }
    tracing::info!(rows, ms = began.elapsed().as_millis() as u64, from = %checkpoint.start, "row index rebuilt");
    shared.echoed.send_replace(checkpoint.fold.vector().clone());
    lock(&shared.stability).observe(config.node.id, checkpoint.fold.vector());
    shared.hear([Stamp {
        time: checkpoint.fold.clock(),
        node: config.node.id,
    }]);

    let source = Source::connect(
        SourceOptions {
            dsn: pg::dsn(&config.postgres)?,
            slot: config.postgres.slot.clone(),
            publication: config.postgres.publication.clone(),
            start: checkpoint.start,
            policies: Arc::new(policies.clone()),
        },
        Arc::clone(&sql),
    )
    .await?;
    identity::check_server(config, &node_row, source.identity())?;
    if source.identity().timeline != identity.timeline {
        // Another host of the connection string, or promoted a moment ago.
        return Err(source::Error::Closed.into());
    }
    if own.lsn > source.identity().written && own.epoch >= source.identity().timeline {
        let written = source.identity().written;
        return Err(capture::Error::WentBack {
            journaled: own.lsn,
            written,
        }
        .into());
    }
    server.keep(&config.node.data_dir).map_err(Error::ServerFile)?;
    // What it says is written down, so it must be this node's server.
    let publication = publication_watch::begin(config, &sql).await?;
    let others: Vec<NodeId> = origins.into_iter().filter(|&id| id != config.node.id).collect();
    let replay = Replay::new(&journal, &others, checkpoint.fold.vector(), seat.upto)?;
    let capture = Capture::new(
        Arc::clone(config),
        Arc::clone(&shared),
        journal.clone(),
        (source, timelines),
        checkpoint,
        replay,
    );
    let members_changed = shared.members_changed.subscribe();
    let (halt, halted) = watch::channel(false);
    let mut capture = tokio::spawn(capture.run(halted.clone()));
    // Peers may hold what our crashed server forgot to tell us: nothing is applied before the WAL of earlier
    // runs is decoded, so that findings are complete.
    let caught_up = async {
        while apply::fence::wait_decoded(&shared, seat.upto, Duration::from_secs(1))
            .await
            .is_err()
        {
            // A commit of ours flushes what the fence waits for.
            let _ = seat.fence().pass(&shared).await;
        }
    };
    tokio::select! {
        ended = &mut capture => return stage("capture", ended),
        () = caught_up => {}
        _ = stop.changed() => {
            halt.send_replace(true);
            return stage("capture", capture.await);
        }
    }
    policy::admit(
        &config.node.data_dir,
        (policies, goes_back),
        &shared,
        &journal,
        &recovered.last,
        &seat.progress,
    )?;
    let seat_of_donor = donor::Seat {
        donor: Arc::clone(donor),
        sql: Arc::clone(&sql),
        shared: Arc::clone(&shared),
        config: Arc::clone(config),
    };
    donor.end_useless(known);
    shared.passed_over.read(&sql).await?;
    let under_way = link::PoliciesUnderWay::default();
    let policy_watch = policy_watch::PolicyWatch::new(config, &shared, &in_force, under_way.clone());
    policy_watch.begin(&sql).await?;
    let identity = (policies.hash(), under_way);
    let mut options = link_options(config, &node_row, boot_id, identity, &journal, &shared);
    options.donor = Some(seat_of_donor);
    let seat_of_verify = verify::Seat {
        config: Arc::clone(config),
        shared: Arc::clone(&shared),
        journal: journal.clone(),
    };
    options.verify = Some(seat_of_verify.clone());
    let links = Links::start(options).await?;
    let links = Arc::new(links);
    let events = links.events();
    let applier = Applier::new(Arc::clone(config), Arc::clone(&shared), journal.clone(), &seat)?;
    let mut applier = tokio::spawn(applier.run(seat, halted.clone()));
    let context = maintenance::Context {
        config: Arc::clone(config),
        shared: Arc::clone(&shared),
        journal: journal.clone(),
        links: Arc::clone(&links),
        donor: Arc::clone(donor),
    };
    let mut upkeep = tokio::spawn(maintenance::run(context, halted.clone()));
    // End with this life.
    let mut watches = tokio::task::JoinSet::new();
    watches.spawn(lock_watch::run(Arc::clone(config)));
    watches.spawn(policy_watch.run(Arc::downgrade(&links)));
    watches.spawn(key_watch::run(Arc::clone(config), Arc::clone(&shared)));
    watches.spawn(removed_watch::run(Arc::clone(config), Arc::clone(&shared)));
    watches.spawn(sequence_watch::run(Arc::clone(config), Arc::clone(&shared)));
    if policies.merges_columns() {
        watches.spawn(merge_watch::run(
            Arc::clone(config),
            Arc::clone(&shared),
            policies.clone(),
        ));
    }
    if policies.mends_orphans() {
        watches.spawn(orphans::run(Arc::clone(config), Arc::clone(&shared)));
    }
    let report = report::Reporter::new(config, &shared, &journal, &links, &node_row.incarnation, boot_id);
    let report = Arc::new(report);
    let asked = {
        let report = Arc::clone(&report);
        metrics.ask(Arc::new(move || report.status()), &shared)
    };
    let conflicts = report.conflicts();
    let mut web = tokio::task::JoinSet::new();
    if config.web.is_some() {
        let status: admin::StatusProvider = {
            let report = Arc::clone(&report);
            Arc::new(move || report.document())
        };
        let page = web::Page::new(
            Arc::clone(config),
            Arc::clone(&shared),
            status,
            Arc::clone(&conflicts),
        );
        web.spawn(page.serve());
    }
    let verified = Arc::new(publication_watch::Verified::default());
    let mut admin = tokio::spawn(serve_admin(
        config.node.data_dir.join(admin::SOCKET),
        report,
        visible::provider(&links, &seat_of_verify),
        conflicts,
        verifier(&links, seat_of_verify, &verified),
        halted.clone(),
    ));
    tracing::info!(node = %config.node.name, listen = %links.local_addr(), "running");

    let outcome = tokio::select! {
        ended = &mut capture => stage("capture", ended),
        ended = &mut applier => stage("apply", ended),
        ended = &mut upkeep => stage("upkeep", ended),
        ended = &mut admin => stage("admin", ended),
        error = fatal_event(events, &shared) => Err(error),
        error = rivals::watch(&hosts, &config.postgres, &shared) => Err(error),
        error = publication.run(&shared, &verified) => Err(error),
        reason = poisoned(&journal) => Err(reason),
        () = changed(members_changed) => Err(Error::Members),
        _ = stop.changed() => Ok(()),
    };
    tracing::info!("stopping");
    known.join(lock(&shared.members).clone());
    halt.send_replace(true);
    wind_up(&mut applier, Duration::from_secs(10)).await;
    wind_up(&mut capture, Duration::from_secs(5)).await;
    wind_up(&mut upkeep, Duration::from_secs(2)).await;
    wind_up(&mut admin, Duration::from_secs(2)).await;
    web.shutdown().await;
    drop(asked);
    if let Ok(links) = Arc::try_unwrap(links).map_err(drop) {
        links.shutdown().await;
    }
    outcome
}

/// The configuration with its server chosen: every connection of this life is to that one, or fails.
async fn pinned(
    config: &Arc<Config>,
    hosts: &pg::Dsn,
    here: &mut Option<pg::ServerId>,
) -> Result<Arc<Config>, Error> {
    let known = pg::Known {
        last: pg::LastServer::read(&config.node.data_dir).map_err(Error::ServerFile)?,
        here: *here,
    };
    let pin = pg::choose(hosts, &known).await?;
    tracing::info!(
        host = pin.host(),
        timeline = pin.timeline(),
        "the server of this node"
    );
    *here = Some(pin.id());
    let mut config = config.as_ref().clone();
    config.postgres.pin = Some(pin);
    Ok(Arc::new(config))
}

/// What is to be remembered of a server.
pub(crate) fn server_of(identity: &source::Identity, timelines: &source::Timelines) -> pg::LastServer {
    pg::LastServer {
        system_identifier: identity.system_id,
        timeline: timelines.current(),
        began: timelines.began().0,
    }
}

/// Is its timeline the one that this node ran on, if the number is?
pub(crate) fn check_branch(config: &Config, server: &pg::LastServer) -> Result<(), Error> {
    let last = pg::LastServer::read(&config.node.data_dir).map_err(Error::ServerFile)?;
    match last {
        Some(last)
            if last.system_identifier == server.system_identifier
                && last.timeline == server.timeline
                && last.began != server.began =>
        {
            Err(Error::OtherBranch {
                timeline: server.timeline,
                found: Lsn(server.began),
                known: Lsn(last.began),
            })
        }
        _ => Ok(()),
    }
}

/// Waits a while for a stage that was told to stop, then cuts it.
async fn wind_up<T>(task: &mut tokio::task::JoinHandle<T>, patience: Duration) {
    // A finished handle may have been asked already, and must not be asked twice.
    if !task.is_finished() && tokio::time::timeout(patience, &mut *task).await.is_err() {
        task.abort();
    }
}

/// What a stage's end means; a stage that was told to stop ends well.
fn stage<E: Into<Error>>(
    name: &'static str,
    ended: Result<Result<(), E>, tokio::task::JoinError>,
) -> Result<(), Error> {
    match ended {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(Error::Ended(name)),
    }
}

/// Where this node's journal is.
pub(crate) fn journal_options(config: &Config) -> journal::Options {
    journal::Options {
        dir: config.node.data_dir.join("journal"),
        segment_bytes: config.journal.segment_mib << 20,
        max_bytes: config.journal.max_size_mib << 20,
        node: config.node.id,
        cluster: config.cluster.id.clone(),
    }
}

async fn open_journal(config: &Arc<Config>) -> Result<(Journal, journal::Recovered), Error> {
    let options = journal_options(config);
    // The writer of an earlier life may take a moment to let go of the folder.
    let mut attempt = 0;
    loop {
        let options = options.clone();
        let opened = tokio::task::spawn_blocking(move || Journal::open(options, Arc::new(RealDisk))).await;
        match opened {
            Ok(Err(journal::Error::Locked { .. })) if attempt < 20 => {
                attempt += 1;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Ok(opened) => return Ok(opened?),
            Err(_) => return Err(Error::Ended("opening the journal")),
        }
    }
}

fn link_options(
    config: &Arc<Config>,
    node_row: &identity::NodeRow,
    boot_id: &str,
    (policy_hash, policies_under_way): (String, link::PoliciesUnderWay),
    journal: &Journal,
    shared: &Arc<Shared>,
) -> LinkOptions {
    let (changed, positions_changed) = watch::channel(());
    let known = lock(&shared.members).clone();
    let (of_journal, of_shared) = (journal.clone(), Arc::clone(shared));
    let mut echoed = shared.echoed.subscribe();
    let mut held = shared.held_by_waiting_commit.subscribe();
    let mut durable = journal.durable();
    tokio::spawn(async move {
        loop {
            let is_held = *held.borrow();
            let news = tokio::select! {
                news = echoed.changed() => news,
                news = held.changed() => news,
                news = durable.changed(), if is_held => news,
            };
            if news.is_err() || changed.send(()).is_err() {
                return;
            }
        }
    });
    LinkOptions {
        config: config.as_ref().clone(),
        identity: link::Identity {
            boot_id: boot_id.to_owned(),
            policies_under_way,
            // Those that the stages run with.
            members: config
                .peers
                .iter()
                .map(|peer| peer.id)
                .chain([config.node.id])
                .collect(),
            ..link::Identity::of(config, &node_row.incarnation, policy_hash).knowing(&known)
        },
        journal: journal.clone(),
        shunned: known.shunned(),
        donor: None,
        verify: None,
        gate: shared.sendable.subscribe(),
        positions: Arc::new(move || link::Positions {
            journaled: of_journal.durable_vector(),
            applied: of_shared.acknowledged(&of_journal),
            own: *of_shared.own.borrow(),
            caught_up: true,
            commits_wait: *of_shared.visibility.borrow() == Visibility::BeforeDependents,
        }),
        positions_changed,
    }
}

async fn fatal_event(events: Option<tokio::sync::mpsc::Receiver<LinkEvent>>, shared: &Shared) -> Error {
    let Some(mut events) = events else {
        return std::future::pending().await;
    };
    while let Some(event) = events.recv().await {
        match event {
            LinkEvent::WentBack(back) => return Error::WentBack(back.to_string()),
            LinkEvent::JournalFailed { reason } => return Error::LinkJournal(reason),
            // Peers tell it: the fact itself need not have arrived here.
            LinkEvent::Refused { refusal, .. }
                if refusal.is(link::RefusalCode::Left) && lock(&shared.members).said_goodbye(shared.node) =>
            {
                return Error::Left;
            }
            LinkEvent::Refused { refusal, .. } if refusal.is(link::RefusalCode::Dropped) => {
                shared.alarms.raise("dropped", refusal.text);
            }
            _ => {}
        }
    }
    std::future::pending().await
}

/// Waits until the value is true.
async fn changed(mut value: watch::Receiver<bool>) {
    if value.wait_for(|&value| value).await.is_err() {
        std::future::pending().await
    }
}

async fn poisoned(journal: &Journal) -> Error {
    journal.poisoned().await.into()
}

async fn serve_admin(
    path: impl AsRef<Path>,
    report: Arc<report::Reporter>,
    waiter: admin::WaitForProvider,
    conflicts: admin::ConflictsProvider,
    verify: admin::VerifyProvider,
    mut halted: watch::Receiver<bool>,
) -> Result<(), admin::Error> {
    let stop = async move {
        while halted.changed().await.is_ok() {
            if *halted.borrow() {
                return;
            }
        }
    };
    let status = Arc::new(move || report.document());
    admin::serve(path.as_ref(), status, waiter, conflicts, verify, stop).await
}

/// Compares the rows of all nodes, and says what was found equal.
fn verifier(
    links: &Arc<Links>,
    seat: verify::Seat,
    verified: &Arc<publication_watch::Verified>,
) -> admin::VerifyProvider {
    // Weak: what still compares when the links end shall not keep them.
    let links = Arc::downgrade(links);
    let verified = Arc::clone(verified);
    Arc::new(move |options, events| {
        let (links, seat, verified) = (links.clone(), seat.clone(), Arc::clone(&verified));
        Box::pin(async move {
            let Some(links) = links.upgrade() else { return };
            let began = tokio::time::Instant::now();
            let (mut talks, absent) = links.talks().await;
            drop(links);
            talks.insert(0, verify::Talk::with_self(seat));
            talks.sort_by_key(|talk| talk.id);
            let (told, mut heard) = tokio::sync::mpsc::channel(1);
            let pass_on = async move {
                while let Some(event) = heard.recv().await {
                    if let verify::Event::Report(report) = &event {
                        verified.note(report, began);
                    }
                    if events.send(event).await.is_err() {
                        return;
                    }
                }
            };
            tokio::join!(verify::run(talks, absent, options, told), pass_on);
        })
    })
}

/// The LSN of a position, for people.
fn lsn_of(position: Position) -> Lsn {
    position.lsn
}

/// Keeps the resolver's lock out of async code.
fn index_stats(shared: &Shared) -> index::Stats {
    lock(&shared.resolver).stats()
}
