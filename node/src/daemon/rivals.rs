//! While the daemon runs on one of several hosts, or addresses of a name: does another one take writes, too?
//!
//! In:   all hosts of `postgres.dsn`, every few seconds      Out: an alarm; an error that ends this life, when its own server is
//!       silent and another was promoted
//! Must never: go to another server by itself while its own one answers: that is what a restart's checks are for
//! On crash: asked again

use std::time::Duration;

use crate::config;
use crate::pg::{self, Dsn, Seen};
use crate::shared::Shared;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A connection to a machine that lost its power can stay for many minutes. After so many looks without an answer it is given up,
/// if there is another server to go to.
const SILENT_MAX: u32 = 3;
const ALARM: &str = "two_primaries";

/// What follows from one look.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Nobody else takes writes.
    Alone,
    /// These do.
    Rivals(String),
    /// Our own is silent, and these are on a later timeline of it.
    Promoted(String),
}

/// Ends when the server of this life is gone and another was promoted; never where there can be no other.
pub(super) async fn watch(hosts: &Dsn, postgres: &config::Postgres, shared: &Shared) -> super::Error {
    let Some(pin) = postgres.pin.as_ref().filter(|_| hosts.may_be_several()) else {
        return std::future::pending().await;
    };
    let mut silent = 0;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let seen = pg::look(hosts, Some(pin)).await;
        match judge(&seen, pin) {
            Verdict::Alone => {
                silent = 0;
                shared.alarms.clear(ALARM);
            }
            Verdict::Rivals(who) => {
                silent = 0;
                let text = format!(
                    "{who}, and this node's server is {}: what is written elsewhere goes nowhere. Stop the one that is not to be \
                     this node's (docs/errors/the-server-went-back.md)",
                    pin.host()
                );
                shared.alarms.raise(ALARM, text);
            }
            Verdict::Promoted(who) => {
                silent += 1;
                if silent >= SILENT_MAX {
                    return super::Error::Moved(who);
                }
            }
        }
    }
}

fn judge(seen: &[Seen], pin: &pg::Pin) -> Verdict {
    let others: Vec<&Seen> = seen
        .iter()
        .filter(|seen| seen.primary().is_some_and(|(id, _)| id != pin.id()))
        .collect();
    let is_there = seen.iter().any(|seen| seen.has(pin));
    let text = |of: &[&Seen]| of.iter().map(|seen| seen.text()).collect::<Vec<_>>().join("; ");
    let promoted: Vec<&Seen> = others
        .iter()
        .copied()
        .filter(|seen| {
            let mut primary = seen.primary().into_iter();
            primary.any(|(id, timeline)| id.is_kin(pin.id()) && timeline > pin.timeline())
        })
        .collect();
    match (is_there, promoted.is_empty(), others.is_empty()) {
        (_, _, true) => Verdict::Alone,
        (false, false, _) => Verdict::Promoted(text(&promoted)),
        _ => Verdict::Rivals(text(&others)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::made::{away, busy, pin, seen};

    #[test]
    fn a_server_is_left_only_while_it_is_silent_and_another_was_promoted() {
        let here = pin(0, 1, 1);
        let promoted = || seen(1, 2, Some(2));
        for left in [
            vec![away(0), promoted()],
            // Somebody else's answer is not its own.
            vec![away(0), promoted(), busy(2)],
            // In its place is another run: what was connected to it is not any more.
            vec![seen(0, 9, None), promoted()],
        ] {
            assert!(matches!(judge(&left, &here), Verdict::Promoted(_)), "{left:?}");
        }
        for (stayed, verdict) in [
            (vec![seen(0, 1, Some(1)), promoted()], "Rivals"),
            (vec![busy(0), promoted()], "Rivals"),
            // A copy that nobody promoted.
            (vec![away(0), seen(1, 2, Some(1))], "Rivals"),
            (vec![seen(0, 1, Some(1)), seen(1, 2, None)], "Alone"),
            (vec![busy(0), seen(1, 2, None)], "Alone"),
            (vec![away(0), away(1)], "Alone"),
            // Two names of one.
            (vec![seen(0, 1, Some(1)), seen(1, 1, Some(1))], "Alone"),
        ] {
            let said = format!("{:?}", judge(&stayed, &here));
            assert!(said.starts_with(verdict), "{said} of {stayed:?}");
        }
    }
}
