//! The daemon: wires the stages, in the order of the flow, and starts them again when the server was away.
//!
//! In:   configuration            Out: running stages until told to stop
//! Holds: what outlasts a life of the stages: alarms of what happened once, the members met, which server it is
//! On crash: everything is rebuilt from the journal, the slot and `anabranch.progress`
//! Not here: what any stage does

mod agreed;
mod answers;
mod decode_watch;
mod dropping;
mod ending;
mod error;
mod gate;
mod identity;
mod key_watch;
mod leaving;
mod left;
mod link_seat;
mod lock_watch;
mod log_upkeep;
mod maintenance;
mod merge_watch;
mod orphans;
mod own_journal;
mod own_limit;
mod policy;
mod policy_watch;
mod privilege_watch;
mod publication_watch;
mod removed_watch;
mod report;
mod rivals;
mod said;
mod sequence_watch;
mod server;
mod trigger_watch;
mod trim;
mod visible;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anabranch_proto::{Lsn, NodeId, Position, Stamp, Vector};
use tokio::sync::watch;

use crate::apply::{self, Applier, Seat};
use crate::capture::{self, Capture, Replay};
use crate::config::{Config, PolicyFile};
use crate::donor::{self, Donor};
use crate::index::RowIndex;
use crate::link::{self, Links};
use crate::membership::Membership;
use crate::resolve::Resolver;
use crate::shared::{Lasting, Shared, lock};
use crate::source::{self, Source, SourceOptions};
use crate::{admin, heal, metrics, pg, policy_change, verify, web};

use answers::{serve_admin, verifier};
use ending::{changed, fatal_event, poisoned, stage, wind_up};
use link_seat::link_options;
use own_journal::{close_journal, open_journal};
use policy::fit_for_policies;
use server::pinned;

pub use error::Error;
pub(crate) use error::left_at;
pub use identity::IdentityError;
pub(crate) use identity::{check as check_identity, check_server, members as read_members};
pub(crate) use own_journal::journal_options;
pub(crate) use policy::begin as keep_policy;
pub(crate) use server::{check_branch, server_of};
pub(crate) use trim::write as keep_settled;

/// Runs until `stop` turns true. A server that is away is waited for, also one that has not answered yet.
///
/// # Errors
/// When something must be mended by people first; what and how is in the error's text.
pub async fn run(config: Config, mut stop: watch::Receiver<bool>) -> Result<(), Error> {
    let config = Arc::new(config);
    // Once: a file that is being changed must not be taken up in the middle of a life, when members or the server come and go. Only the
    // database knows who is meant by the names in it.
    let policies = config.policy_file()?;
    let boot_id = uuid::Uuid::new_v4().to_string();
    let metrics = metrics::Endpoint::start(&config);
    let mut pause = Duration::from_millis(200);
    let mut said = said::Said::default();
    let mut came_up = false;
    let mut known = Membership::default();
    let lasting = Arc::new(Lasting::default());
    let donor = Arc::new(Donor::default());
    // Which server this process is on: it stays there until that is gone.
    let mut here = None;
    loop {
        let started = tokio::time::Instant::now();
        let error = match Box::pin(run_once(
            (&config, &policies),
            (&boot_id, &metrics, &lasting),
            stop.clone(),
            &mut here,
            &mut known,
            &donor,
        ))
        .await
        {
            Ok(()) => return Ok(()),
            Err(Error::Left | Error::Identity(identity::IdentityError::Left)) => {
                return left::stay(&config, &lasting, stop).await;
            }
            Err(Error::Members) => {
                tracing::info!("the members or the policy have changed: beginning anew");
                continue;
            }
            Err(error) => error,
        };
        publication_watch::mark(&config, &error);
        came_up |= here.is_some();
        // The writer of the life before, at a disk that takes seconds for a sync.
        let is_ours = lasting.had_journal.load(Ordering::Relaxed)
            && matches!(error, Error::Journal(crate::journal::Error::Locked { .. }));
        if !(error.is_transient() || is_ours) || (!came_up && error.needs_a_choice()) {
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

/// One life of all stages.
async fn run_once(
    (config, file): (&Arc<Config>, &PolicyFile),
    (boot_id, metrics, lasting): (&str, &metrics::Endpoint, &Arc<Lasting>),
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
    let met = match known.live().is_empty() {
        true => identity::members(config, &sql).await?,
        false => identity::known_members(config, &sql).await?,
    };
    known.join(met);
    let file = file.policies(&config.names(&policy_change::Body::names(known)))?;
    let in_force = policy_change::force::find(config, &file, &sql, known)
        .await
        .map_err(Box::new)?;
    in_force.keep(&config.node.data_dir).map_err(Error::PolicyFile)?;
    let policies = &in_force.policies;
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
    lasting.had_journal.store(true, Ordering::Relaxed);
    let of = (policies, config.postgres.publication.as_str());
    let place = (config.node.id, &recovered.last, members.as_slice());
    fit_for_policies(&sql, of, &config.node.data_dir, place).await?;
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
    let mut checkpoint = capture::begin_checkpoint(
        kept,
        &journal,
        config.node.id,
        own,
        (slot.confirmed_flush, node_row.slot_start),
        &timelines,
    )?;
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
    let shared = Arc::new(Shared::new(config.node.id, resolver, known.clone(), lasting));
    shared.timeline.store(timelines.current(), Ordering::Relaxed);
    let running = gate::begin(&sql, &shared).await?;
    // What dropped nodes wrote may be unsettled still.
    let dropped = known.dropped().into_keys();
    let origins: Vec<NodeId> = members.iter().copied().chain(dropped).collect();
    let gone = capture::gone(&journal, &origins, &settled)?;
    *lock(&shared.settled) = settled;
    *lock(&shared.low) = low;
    apply::load_quarantine(&sql, &shared).await?;
    lock(&shared.resolver).begin_rebuild(gone, low);
    *lock(&shared.checkpoint) = checkpoint.fold.vector().clone();
    let began = tokio::time::Instant::now();
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
    lock(&shared.resolver)
        .restore_loaded(false)
        .map_err(capture::Error::from)?;
    if in_force.is_by_change() {
        lock(&shared.resolver)
            .forget_settled()
            .map_err(capture::Error::from)?;
    }
    let joins = !known.ready().contains(&config.node.id);
    // Until upkeep can say for whom it waits: it may have been killed in the middle, and takes no writes yet.
    *lock(&shared.joining) = joins.then(|| "joining: begins, and looks through its copy".to_owned());
    let goes_back = policy::goes_back(&config.node.data_dir, policies, place, slot.confirmed_flush)
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

    // It may be long, and once there is a stream its server wants to hear from us.
    let marks = if own != Position::ZERO && timelines.holds(own) {
        let slot_at = timelines.position(slot.confirmed_flush);
        let marks = capture::Marks::read(&journal, config.node.id, slot_at.min(own), &timelines)?;
        Some(marks)
    } else {
        None
    };
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
    // Past the journal's end its WAL may be, and another.
    if let Some(marks) = marks
        && let Err(lacks) = marks.missing(&sql, config.node.id, &seat.progress).await?
    {
        return Err(capture::Error::OtherWal {
            journaled: own,
            lacks,
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
        let mut said = tokio::time::Instant::now();
        while apply::fence::wait_decoded(&shared, seat.upto, Duration::from_secs(1))
            .await
            .is_err()
        {
            // As upkeep does later: that decoding stands still is to be noticed here, too.
            shared.progress.asks();
            // A commit of ours flushes what the fence waits for.
            let _ = seat.fence().pass(&shared).await;
            if let Ok(found) = seat.fence().horizon().await {
                shared.progress.answered(found.flushed, *shared.decoded.borrow());
                // However much is decoded again: what is visible by now waits for nothing.
                if let Some(snapshot) = &found.snapshot {
                    gate::let_go_decoded(&shared, snapshot);
                }
            }
            if said.elapsed() > Duration::from_secs(30) {
                said = tokio::time::Instant::now();
                let at = Lsn(*shared.decoded.borrow());
                tracing::info!(%at, upto = %Lsn(seat.upto), "nothing is sent or applied before what the server has is decoded");
            }
        }
        // Decoded is not in a frame: peers that hold what our journal lost with a crash would take it for an older copy.
        let mut framed = shared.framed.subscribe();
        let reached = apply::fence::reportable(seat.upto);
        let _ = framed.wait_for(|&framed| framed >= reached).await;
    };
    tokio::select! {
        ended = &mut capture => return stage("capture", ended),
        () = caught_up => {}
        // Nobody can ask for its alarms yet, but the log has them.
        error = decode_watch::watch(config, &shared, &journal) => {
            capture.abort();
            close_journal(&journal).await;
            return Err(error);
        }
        _ = stop.changed() => {
            halt.send_replace(true);
            // It may stand before a journal that is full.
            let ended = tokio::time::timeout(Duration::from_secs(5), &mut capture).await;
            capture.abort();
            close_journal(&journal).await;
            return ended.map_or(Ok(()), |ended| stage("capture", ended));
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
    shared
        .passed_over
        .read(&sql, &apply::passed_over::Rule::of(config))
        .await?;
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
    watches.spawn(key_watch::run(
        Arc::clone(config),
        Arc::clone(&shared),
        policies.clone(),
    ));
    watches.spawn(removed_watch::run(Arc::clone(config), Arc::clone(&shared)));
    watches.spawn(sequence_watch::run(Arc::clone(config), Arc::clone(&shared)));
    watches.spawn(privilege_watch::run(Arc::clone(config), Arc::clone(&shared)));
    watches.spawn(trigger_watch::run(Arc::clone(config), Arc::clone(&shared)));
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
        visible::provider(&links, &seat_of_verify, &halted),
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
        error = decode_watch::watch(config, &shared, &journal) => Err(error),
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
    links.shutdown().await;
    close_journal(&journal).await;
    outcome
}
