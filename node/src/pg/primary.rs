//! Which server a connection string means: of its hosts the one that takes writes, and that one for every connection.
//!
//! In:   the hosts, what is known of the node's server      Out: a [`Pin`], or why there is none
//! Holds: nothing
//! Invariants: 1. of two servers that take writes none is taken, unless the other one is known to be from before a promotion;
//!             2. what is pinned reaches that very server, or nothing: never a standby of it, nor what was promoted since
//! On crash: asked again
//! Not here: what the server must have of this node's WAL (`crate::daemon`, `crate::heal`)
//!
//! Why so strict: a daemon that decodes one server and writes to another makes rows that no journal knows of.

use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::lookup_host;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_postgres::Row;
use tokio_postgres::config::Host;
use tokio_postgres::error::SqlState;

use super::{Dsn, Error};
use crate::small_file;

/// Once a server that takes writes has answered, how long the other hosts are waited for. One that is slower than that is
/// looked at while the daemon runs.
const OTHERS_WAIT: Duration = Duration::from_secs(2);
/// In `node.data_dir`.
const FILE: &str = "server.json";

/// Who a server is, for [`who`]. The timeline by the name of the file that it writes: the control file is late.
pub(crate) const WHO: &str = "SELECT (SELECT system_identifier::text FROM pg_control_system()), \
    (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::int8::text, \
    CASE WHEN pg_is_in_recovery() THEN '' ELSE pg_walfile_name(pg_current_wal_insert_lsn()) END";

/// One run of one server: the same from its start to its end, and no other's. A standby has its primary's system identifier
/// and another start; whoever becomes a standby starts anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerId {
    /// The cluster's system identifier, the same on its physical standbys.
    system_id: u64,
    /// When the postmaster started, microseconds since the Unix epoch by its clock.
    started_us: i64,
}

/// What a server said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Who {
    pub(crate) id: ServerId,
    /// The timeline that it writes; none if it is a standby.
    pub(crate) timeline: Option<u32>,
}

/// The server that was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    /// Which host of the connection string.
    pub(super) at: usize,
    /// Which address of it.
    pub(super) address: Option<IpAddr>,
    pub(super) id: ServerId,
    timeline: u32,
    host: String,
}

impl Pin {
    /// `host:port`, for people.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The timeline that it was on when it was chosen; it has no other while it runs.
    #[must_use]
    pub const fn timeline(&self) -> u32 {
        self.timeline
    }

    /// This run of this server.
    pub(crate) const fn id(&self) -> ServerId {
        self.id
    }
}

/// The server that this node has run on, in `node.data_dir`: written down before anything that it wrote is journalled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LastServer {
    pub(crate) system_identifier: u64,
    pub(crate) timeline: u32,
    /// Where that timeline began: two standbys that are promoted apart can give it one number.
    pub(crate) began: u64,
}

impl LastServer {
    /// None where no daemon has run.
    pub(crate) fn read(dir: &Path) -> io::Result<Option<Self>> {
        match std::fs::read(dir.join(FILE)) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn keep(&self, dir: &Path) -> io::Result<()> {
        if Self::read(dir)? == Some(*self) {
            return Ok(());
        }
        small_file::replace(&dir.join(FILE), &serde_json::to_vec_pretty(self)?)
    }
}

/// What is known of the node's server before it is looked for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Known {
    /// From the data folder.
    pub(crate) last: Option<LastServer>,
    /// Where this process has been, and would stay.
    pub(crate) here: Option<ServerId>,
}

/// One host, at one address of it, and what is there.
#[derive(Debug)]
pub(crate) struct Seen {
    at: usize,
    address: Option<IpAddr>,
    host: String,
    what: Result<Who, Error>,
    /// A server runs there, whether it has let us in or not.
    is_up: bool,
}

impl Seen {
    fn new(at: usize, address: Option<IpAddr>, host: String, what: Result<Who, Error>) -> Self {
        let is_up = match &what {
            Ok(_) => true,
            Err(Error::Connect { source, .. } | Error::Asked { source, .. }) => {
                source.code().is_some_and(is_up)
            }
            Err(_) => false,
        };
        Self {
            at,
            address,
            host,
            what,
            is_up,
        }
    }

    /// Is the chosen server there? One that runs in its place and has let nobody in, such as for too many connections, is
    /// taken for it: sessions that it has may work.
    pub(crate) fn has(&self, pin: &Pin) -> bool {
        match &self.what {
            Ok(who) => who.id == pin.id && who.timeline.is_some(),
            Err(_) => self.is_up && (self.at, self.address) == (pin.at, pin.address),
        }
    }

    /// The server, if it takes writes, and its timeline.
    pub(crate) fn primary(&self) -> Option<(ServerId, u32)> {
        let who = self.what.as_ref().ok()?;
        Some((who.id, who.timeline?))
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let host = &self.host;
        match &self.what {
            Ok(Who {
                timeline: Some(timeline),
                ..
            }) => format!("{host} takes writes on timeline {timeline}"),
            Ok(_) => format!("{host} is a standby"),
            Err(error) => format!("{host}: {}", crate::error::chain(error)),
        }
    }
}

impl ServerId {
    /// Are they one server and a copy of it, such as a standby?
    pub(crate) const fn is_kin(self, other: Self) -> bool {
        self.system_id == other.system_id
    }
}

/// Does the server run that says this instead of letting us in? Not one that starts, stops or has crashed.
fn is_up(state: &SqlState) -> bool {
    !state.code().starts_with("57P0")
}

/// Reads the row of [`WHO`].
pub(super) fn who(row: &Row) -> Result<Who, tokio_postgres::Error> {
    Ok(of_texts(row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))
}

/// The same, of texts. What is no number is no server's: it equals nothing that was seen before.
pub(crate) fn of_texts(system_id: &str, started_us: &str, wal_file: &str) -> Who {
    Who {
        id: ServerId {
            system_id: system_id.parse().unwrap_or(0),
            started_us: started_us.parse().unwrap_or(0),
        },
        timeline: wal_file
            .get(..8)
            .and_then(|digits| u32::from_str_radix(digits, 16).ok()),
    }
}

/// The connection string of the one server that takes writes, for everything that one command does. One that names a single
/// host, and wants nothing of it, is as it is. `dir`: the node's data folder, if the server is its own.
///
/// # Errors
/// When no host is, or more than one, or none can be reached.
pub async fn settle(dsn: Dsn, dir: Option<&Path>) -> Result<Dsn, Error> {
    if dsn.is_settled() {
        return Ok(dsn);
    }
    // Whoever may not read the folder goes without.
    let last = dir.and_then(|dir| LastServer::read(dir).ok().flatten());
    let pin = choose(&dsn, &Known { last, here: None }).await?;
    dsn.pinned(&pin)
        .ok_or_else(|| Error::OtherServer { host: dsn.hosts() })
}

/// Looks for the node's server.
pub(crate) async fn choose(dsn: &Dsn, known: &Known) -> Result<Pin, Error> {
    judge(look(dsn, None).await, known)
}

/// Looks at every host, all at once. After one that takes writes the others are waited for a moment only. `here`: the server
/// that was chosen, which is looked at where it was then.
pub(crate) async fn look(dsn: &Dsn, here: Option<&Pin>) -> Vec<Seen> {
    let (told, mut answers) = mpsc::channel(16);
    // Whoever is still asked when the look ends is asked no more.
    let mut asked = JoinSet::new();
    for at in 0..dsn.count() {
        let here = here.filter(|pin| pin.at == at).and_then(|pin| pin.address);
        asked.spawn(look_at(dsn.clone(), at, here, told.clone()));
    }
    drop(told);
    let mut seen: Vec<Seen> = Vec::new();
    let mut until: Option<Instant> = None;
    loop {
        let rest = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            answer = answers.recv() => match answer {
                Some(answer) => seen.push(answer),
                None => break,
            },
            () = rest => break,
        }
        if until.is_none() && seen.iter().any(|seen| seen.primary().is_some()) {
            until = Some(Instant::now() + OTHERS_WAIT);
        }
    }
    for at in 0..dsn.count() {
        if !seen.iter().any(|seen| seen.at == at)
            && let Some(only) = dsn.only(at, None)
        {
            seen.push(silent(at, None, only.hosts()));
        }
    }
    // Stable: addresses of one host stay in the order in which they answered.
    seen.sort_by_key(|seen| seen.at);
    seen
}

fn silent(at: usize, address: Option<IpAddr>, host: String) -> Seen {
    Seen::new(at, address, host.clone(), Err(Error::Silent { host }))
}

/// What is behind one host: a name can have several addresses.
async fn look_at(dsn: Dsn, at: usize, here: Option<IpAddr>, told: mpsc::Sender<Seen>) {
    let Some(only) = dsn.only(at, None) else { return };
    let mut asked = JoinSet::new();
    // The name may lead elsewhere by now, or nowhere.
    if here.is_some() {
        asked.spawn(tell(dsn.clone(), at, here, only.hosts(), told.clone()));
    }
    let mut addresses = vec![None];
    if let ([Host::Tcp(name)], []) = (only.config().get_hosts(), only.config().get_hostaddrs())
        && let Ok(found) = lookup_host((name.as_str(), only.port(0))).await
    {
        let mut found: Vec<Option<IpAddr>> = found.map(|address| Some(address.ip())).collect();
        found.dedup();
        if !found.is_empty() {
            addresses = found;
        }
    }
    for address in addresses {
        if address.is_none() || address != here {
            asked.spawn(tell(dsn.clone(), at, address, only.hosts(), told.clone()));
        }
    }
    asked.join_all().await;
}

/// Tells what is at one address.
async fn tell(dsn: Dsn, at: usize, address: Option<IpAddr>, host: String, told: mpsc::Sender<Seen>) {
    let answer = match dsn.only(at, address) {
        Some(only) => Seen::new(at, address, host, ask(&only).await),
        None => silent(at, address, host),
    };
    // The look may be over.
    let _ = told.send(answer).await;
}

/// Asks one server what it is.
async fn ask(only: &Dsn) -> Result<Who, Error> {
    let asked = async {
        let (client, _driver) = super::connect_host(only, "hosts").await?;
        let row = client.query_one(WHO, &[]).await;
        row.and_then(|row| who(&row)).map_err(Error::asked(&only.hosts()))
    };
    // A server that is stopped in its tracks still accepts connections.
    let patience = only
        .config()
        .get_connect_timeout()
        .copied()
        .unwrap_or(OTHERS_WAIT);
    let answer = timeout(patience, asked).await;
    answer.unwrap_or_else(|_| Err(Error::Silent { host: only.hosts() }))
}

/// Which of these is the node's server.
fn judge(seen: Vec<Seen>, known: &Known) -> Result<Pin, Error> {
    let text = || seen.iter().map(Seen::text).collect::<Vec<_>>().join("; ");
    let mut found: Vec<(&Seen, ServerId, u32)> = Vec::new();
    for it in &seen {
        if let Some((id, timeline)) = it.primary()
            // Two names of one server.
            && !found.iter().any(|(_, other, _)| *other == id)
        {
            found.push((it, id, timeline));
        }
    }
    let is_of_before = |id: ServerId, timeline: u32| {
        let last = known.last.filter(|last| last.system_identifier == id.system_id);
        last.map(|last| last.timeline).filter(|known| timeline < *known)
    };
    let older = found
        .iter()
        .find_map(|(_, id, timeline)| is_of_before(*id, *timeline));
    let current: Vec<_> = found
        .iter()
        .filter(|(_, id, timeline)| is_of_before(*id, *timeline).is_none())
        .collect();
    let here = current.iter().find(|(_, id, _)| Some(*id) == known.here);
    let chosen = match (here, current.as_slice(), older) {
        (Some(here), ..) => *here,
        (None, [only], _) => *only,
        (None, [], Some(known)) => return Err(Error::Outdated { seen: text(), known }),
        (None, [], None) => {
            let text = text();
            let passes = seen.iter().any(|it| match &it.what {
                Ok(_) => true,
                Err(error) => error.is_transient(),
            });
            let is_one = seen.iter().all(|it| it.at == 0);
            return Err(match seen.into_iter().next() {
                // One host: what is wrong with it, in its own words.
                Some(Seen { what: Err(error), .. }) if is_one => error,
                _ => Error::NoPrimary { seen: text, passes },
            });
        }
        (None, ..) => return Err(Error::SeveralPrimaries { seen: text() }),
    };
    let &(it, id, timeline) = chosen;
    Ok(Pin {
        at: it.at,
        address: it.address,
        id,
        timeline,
        host: it.host.clone(),
    })
}

/// Looks, for the tests of whoever judges them: hosts `db0`, `db1`.. and runs of one server and its standbys.
#[cfg(test)]
pub(crate) mod made {
    use super::*;

    fn id(started_us: i64) -> ServerId {
        ServerId {
            system_id: 7,
            started_us,
        }
    }

    pub(crate) fn seen(at: usize, started_us: i64, timeline: Option<u32>) -> Seen {
        let id = id(started_us);
        Seen::new(at, None, format!("db{at}:5432"), Ok(Who { id, timeline }))
    }

    pub(crate) fn away(at: usize) -> Seen {
        silent(at, None, format!("db{at}:5432"))
    }

    /// It runs, and has let nobody in.
    pub(crate) fn busy(at: usize) -> Seen {
        Seen {
            is_up: true,
            ..away(at)
        }
    }

    pub(crate) fn pin(at: usize, started_us: i64, timeline: u32) -> Pin {
        Pin {
            at,
            address: None,
            id: id(started_us),
            timeline,
            host: format!("db{at}:5432"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::made::{away, seen};
    use super::*;

    fn on(timeline: u32) -> Known {
        Known {
            last: Some(LastServer {
                system_identifier: 7,
                timeline,
                began: 0,
            }),
            here: None,
        }
    }

    #[test]
    fn the_one_that_takes_writes_is_taken_wherever_it_stands() {
        let new = Known::default();
        assert_eq!(
            judge(vec![seen(0, 1, Some(1)), seen(1, 2, None)], &new)
                .unwrap()
                .at,
            0
        );
        assert_eq!(
            judge(vec![seen(0, 2, None), seen(1, 1, Some(1))], &new)
                .unwrap()
                .at,
            1
        );
        assert_eq!(judge(vec![away(0), seen(1, 1, Some(2))], &on(1)).unwrap().at, 1);
        // Two names of one.
        assert_eq!(
            judge(vec![seen(0, 1, Some(1)), seen(1, 1, Some(1))], &new)
                .unwrap()
                .at,
            0
        );
    }

    #[test]
    fn of_two_that_take_writes_only_the_one_that_is_known_is_taken() {
        let both = || vec![seen(0, 1, Some(1)), seen(1, 2, Some(2))];
        for known in [Known::default(), on(1)] {
            assert!(matches!(
                judge(both(), &known),
                Err(Error::SeveralPrimaries { .. })
            ));
        }
        assert_eq!(judge(both(), &on(2)).unwrap().at, 1);
        // Copies of one server that run at once.
        let twins = vec![seen(0, 1, Some(2)), seen(1, 2, Some(2))];
        assert!(matches!(
            judge(twins, &on(2)),
            Err(Error::SeveralPrimaries { .. })
        ));
        // Where the process is, it stays.
        let here = Known {
            here: seen(0, 1, Some(1)).primary().map(|(id, _)| id),
            ..on(1)
        };
        assert_eq!(judge(both(), &here).unwrap().at, 0);
        // But a server that was started anew is not where it was.
        let again = vec![seen(0, 9, Some(1)), seen(1, 2, Some(2))];
        assert!(matches!(judge(again, &here), Err(Error::SeveralPrimaries { .. })));
    }

    #[test]
    fn a_server_of_before_a_promotion_is_not_taken_though_it_is_alone() {
        let error = judge(vec![seen(0, 1, Some(1)), away(1)], &on(2)).unwrap_err();
        assert!(matches!(error, Error::Outdated { known: 2, .. }), "{error}");
        assert!(
            error.to_string().contains("db0:5432 takes writes on timeline 1"),
            "{error}"
        );
        assert!(error.is_transient());
        assert!(matches!(
            judge(vec![seen(0, 1, Some(1))], &on(2)),
            Err(Error::Outdated { .. })
        ));
    }

    #[test]
    fn without_one_each_host_is_named() {
        let error = judge(vec![seen(0, 1, None), away(1)], &Known::default()).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("db0:5432 is a standby; ") && text.contains("db1:5432"),
            "{text}"
        );
        assert!(error.is_transient());
        assert!(matches!(judge(vec![away(0)], &on(2)), Err(Error::Silent { .. })));
    }

    #[test]
    fn a_server_that_lets_nobody_in_runs() {
        for code in ["53300", "28000", "28P01", "3D000", "42501"] {
            assert!(is_up(&SqlState::from_code(code)), "{code}");
        }
        for code in ["57P01", "57P02", "57P03"] {
            assert!(!is_up(&SqlState::from_code(code)), "{code}");
        }
    }

    #[test]
    fn the_timeline_is_in_the_name_of_the_wal_file() {
        assert_eq!(of_texts("7", "1", "0000000A0000000100000002").timeline, Some(10));
        assert_eq!(of_texts("7", "1", "").timeline, None);
    }
}
