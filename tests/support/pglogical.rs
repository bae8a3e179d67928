//! pglogical, beside which others are measured and judged.

use crate::session::Session;
use crate::wait::{PATIENCE, until_ok};

/// Waits until a subscription of the session's database replicates.
///
/// # Panics
/// When it does not in time.
pub async fn until_replicating(session: &Session, subscription: &str) {
    until_ok("pglogical replicates", PATIENCE, async || {
        let status = session
            .value(&format!(
                "select status from pglogical.show_subscription_status('{subscription}')"
            ))
            .await;
        if status == "replicating" {
            Ok(())
        } else {
            Err(status)
        }
    })
    .await;
}
