//! The history of the server's timelines: which of its WAL, and so which of this node's positions, it has.
//!
//! In:   the server's `TIMELINE_HISTORY`            Out: what timeline a place in its WAL is of; whether it has a position
//! Invariants: a position is the same whenever its WAL is decoded: its epoch is the timeline that it was written on, not the
//!        one that the server is on now
//! On crash: asked again
//! Not here: what to do when it lacks something (`crate::daemon`, `crate::heal`)

use anabranch_proto::{Lsn, Position};

use super::{Error, Identity, Walsender};

/// The timelines that a server's WAL runs through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timelines {
    current: u32,
    /// Those left, the oldest first, each with the place where it was left.
    past: Vec<(u32, Lsn)>,
}

impl Timelines {
    /// Asks the server.
    ///
    /// # Errors
    /// When the connection fails.
    pub async fn read(walsender: &mut Walsender, identity: &Identity) -> Result<Self, Error> {
        if identity.timeline <= 1 {
            return Ok(Self::of(identity.timeline, ""));
        }
        let command = format!("TIMELINE_HISTORY {}", identity.timeline);
        let rows = walsender.query(&command).await?;
        let content = rows.into_iter().flatten().flatten().nth(1).unwrap_or_default();
        Ok(Self::of(identity.timeline, &content))
    }

    /// `TLI <tab> LSN <tab> reason`, a line for each timeline that was left, the oldest first.
    pub(crate) fn of(current: u32, history: &str) -> Self {
        let left = |line: &str| {
            let mut words = line.split_whitespace();
            let timeline: u32 = words.next()?.parse().ok()?;
            Some((timeline, words.next()?.parse().ok()?))
        };
        Self {
            current,
            past: history.lines().filter_map(left).collect(),
        }
    }

    /// The one that the server is on.
    #[must_use]
    pub const fn current(&self) -> u32 {
        self.current
    }

    /// Where that one began; zero for the first.
    #[must_use]
    pub fn began(&self) -> Lsn {
        self.past.last().map_or(Lsn(0), |(_, left)| *left)
    }

    /// On which timeline WAL was written that ends here.
    #[must_use]
    pub fn at(&self, end: Lsn) -> u32 {
        let mut past = self.past.iter();
        past.find(|(_, left)| end <= *left)
            .map_or(self.current, |(timeline, _)| *timeline)
    }

    /// The position of what ends here.
    #[must_use]
    pub fn position(&self, end: Lsn) -> Position {
        Position {
            epoch: self.at(end),
            lsn: end,
        }
    }

    /// Where a timeline was left; none if it is the current one, or no part of the history.
    #[must_use]
    pub fn left(&self, timeline: u32) -> Option<Lsn> {
        let mut past = self.past.iter();
        past.find(|(it, _)| *it == timeline).map(|(_, left)| *left)
    }

    /// Is this place in the server's history? On the current timeline all is, whatever it has written.
    #[must_use]
    pub fn holds(&self, position: Position) -> bool {
        position == Position::ZERO
            || position.epoch == self.current
            || self.left(position.epoch).is_some_and(|left| position.lsn <= left)
    }
}

/// Who the server of this connection string is, and its history.
///
/// # Errors
/// When it cannot be reached, or refuses.
pub async fn identify(dsn: &crate::pg::Dsn, purpose: &str) -> Result<(Identity, Timelines), Error> {
    let mut walsender = Walsender::connect(dsn, purpose).await?;
    let identity = walsender.identify().await?;
    let timelines = Timelines::read(&mut walsender, &identity).await?;
    Ok((identity, timelines))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_tells_what_the_server_has_and_what_timeline_its_wal_is_of() {
        let history = "1\t0/3000158\tno recovery target specified\n\n2\t1/A0\tno recovery target specified\n";
        let timelines = Timelines::of(4, history);
        let (first, second) = (Lsn(0x0300_0158), Lsn(0x1_0000_00A0));
        assert_eq!(timelines.left(1), Some(first));
        assert_eq!(timelines.left(2), Some(second));
        assert_eq!((timelines.left(3), timelines.left(4)), (None, None));
        assert_eq!(
            (timelines.began(), Timelines::of(1, "").began()),
            (second, Lsn(0))
        );
        assert_eq!(timelines.at(first), 1);
        assert_eq!(timelines.at(Lsn(first.0 + 1)), 2);
        assert_eq!(timelines.at(second), 2);
        assert_eq!(timelines.at(Lsn(second.0 + 1)), 4);
        let holds = |epoch, lsn| timelines.holds(Position::new(epoch, lsn));
        assert!(holds(1, first.0) && !holds(1, first.0 + 1));
        assert!(holds(2, second.0) && !holds(2, second.0 + 1));
        assert!(!holds(3, 1) && holds(4, u64::MAX) && holds(0, 0));
        assert!(Timelines::of(1, "").holds(Position::new(1, 7)));
    }
}
