//! What the admin socket answers from the running stages.
//!
//! In:   the status document, links, what compares rows            Out: a served socket, until told to stop
//! Must never: keep the links of a life that has ended
//! Not here: the socket (`crate::admin`), the document (`report`), waiting for a position (`visible`)

use std::path::Path;
use std::sync::Arc;

use tokio::sync::watch;

use super::{publication_watch, report};
use crate::link::Links;
use crate::{admin, verify};

/// Until `halted` turns true.
pub(super) async fn serve_admin(
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
pub(super) fn verifier(
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
