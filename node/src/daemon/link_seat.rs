//! What the links are given of this node: who it is, its journal, and the positions that peers are told.
//!
//! In:   shared positions, the journal            Out: the options of the links
//! Must never: call applied what a crash of the server could take back
//! Not here: the links (`crate::link`), what may be sent (`gate`)

use std::sync::Arc;

use tokio::sync::watch;

use super::identity;
use crate::config::Config;
use crate::journal::Journal;
use crate::link::{self, LinkOptions};
use crate::shared::{Shared, Visibility, lock};

/// For [`crate::link::Links::start`].
pub(super) fn link_options(
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
    let mut held = shared.held_by_waiting_commit.subscribe();
    let mut durable = journal.durable();
    tokio::spawn(async move {
        loop {
            let is_held = *held.borrow();
            let news = tokio::select! {
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
        applied: shared.echoed.subscribe(),
        positions: Arc::new(move || link::Positions {
            journaled: of_journal.durable_vector(),
            applied: of_shared.acknowledged(&of_journal),
            own: *of_shared.own.borrow(),
            caught_up: true,
            is_full: of_journal.full().is_some(),
            commits_wait: *of_shared.visibility.borrow() == Visibility::BeforeDependents,
        }),
        positions_changed,
    }
}
