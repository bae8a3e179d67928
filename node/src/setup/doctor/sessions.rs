//! Is there room for the daemon's sessions, and are they its own?
//!
//! In:   a session, the configuration            Out: [`Finding`]s
//! Not here: walsenders and slots (`super::super::check`)

use anabranch_conflict::policy::Policies;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};

use super::super::error::Error;
use super::super::finding::Finding;
use super::super::sql::ident;
use crate::config::Config;
use crate::pg::{Dsn, Error as PgError, own_session};

/// Sessions that every daemon has all the time: control, apply, fence, clock, conflict log, publication watch, policy, lock watch, key
/// watch, removed tables, trigger watch.
const ALWAYS: i32 = 11;

/// Sessions that may come and go at once: `verify`, lists of all nodes' conflicts, more requests of the page at once, a member that
/// joins, commands.
const AT_TIMES: i32 = 12;

/// Walsenders are no connections of the server's limit, but of the role's: the decoder, and one for a member that joins.
const WALSENDERS: i32 = 2;

/// Other sessions than the daemon's: of all, of its role, in its database. Without the right to see what others' sessions are, all
/// that have a database count.
fn limits() -> String {
    let is_other = format!("NOT coalesce({}, false)", own_session("r.rolname"));
    format!(
        "SELECT current_setting('max_connections')::int, \
         CASE WHEN r.rolsuper THEN 0 ELSE current_setting('superuser_reserved_connections')::int + CASE WHEN \
             coalesce((SELECT pg_has_role(r.oid, g.oid, 'USAGE') FROM pg_roles g WHERE g.rolname = 'pg_use_reserved_connections'), true) \
             THEN 0 ELSE coalesce(current_setting('reserved_connections', true), '0')::int END END, \
         CASE WHEN r.rolsuper THEN -1 ELSE r.rolconnlimit END, CASE WHEN r.rolsuper THEN -1 ELSE d.datconnlimit END, \
         (SELECT count(*)::int FROM pg_stat_activity a WHERE coalesce(a.backend_type, 'client backend') = 'client backend' \
             AND a.datid IS NOT NULL AND {is_other}), \
         (SELECT count(*)::int FROM pg_stat_activity a WHERE a.usesysid = r.oid AND {is_other}), \
         (SELECT count(*)::int FROM pg_stat_activity a WHERE a.datid = d.oid AND {is_other}), \
         r.rolname::text, d.datname::text \
         FROM pg_roles r, pg_database d WHERE r.rolname = current_user AND d.datname = current_database()"
    )
}

/// What the session is like: the process that serves it, and settings that it asked for when it began.
const SESSION: &str = "SELECT pg_backend_pid(), current_setting('search_path'), current_setting('extra_float_digits'), \
    current_setting('statement_timeout')";

const POOLER: &str = "let postgres.dsn lead to the server itself, not to a connection pooler: the daemon's sessions must be its own \
    (docs/operation.md, Connections and poolers)";

/// How many sessions the daemon of this configuration has all the time.
fn always(config: &Config, policies: Option<&Policies>) -> i32 {
    let more = [
        policies.is_some_and(Policies::mends_orphans),
        policies.is_some_and(Policies::merges_columns),
        config.web.is_some(),
    ];
    more.into_iter().fold(ALWAYS, |count, one| count + i32::from(one))
}

/// Is there room below each limit?
pub(super) async fn room(
    client: &Client,
    config: &Config,
    policies: Option<&Policies>,
) -> Result<Vec<Finding>, tokio_postgres::Error> {
    let row = client.query_one(&limits(), &[]).await?;
    let number = |at: usize| row.try_get::<_, i32>(at);
    let (role, database): (String, String) = (row.try_get(7)?, row.try_get(8)?);
    let needed = always(config, policies);
    let (max, reserved) = (number(0)?, number(1)?);
    let mut out = vec![judge(
        "max_connections",
        &Limit {
            max,
            // Reserved ones are not the daemon's either.
            others: number(4)? + reserved,
            needed,
        },
        |max| {
            format!(
                "ALTER SYSTEM SET max_connections = {max}; and restart the server, or let applications use fewer"
            )
        },
    )];
    let limits = [
        (
            number(2)?,
            number(5)?,
            format!("ALTER ROLE {}", ident(&role)),
            "connection limit of the role",
        ),
        (
            number(3)?,
            number(6)?,
            format!("ALTER DATABASE {}", ident(&database)),
            "connection limit of the database",
        ),
    ];
    for (max, others, alter, check) in limits {
        // Negative: none.
        if max >= 0 {
            let needed = needed + WALSENDERS;
            let limit = Limit { max, others, needed };
            out.push(judge(check, &limit, |max| {
                format!("{alter} CONNECTION LIMIT {max}")
            }));
        }
    }
    Ok(out)
}

struct Limit {
    max: i32,
    /// Of these so many are not the daemon's.
    others: i32,
    /// It needs so many all the time.
    needed: i32,
}

fn judge(check: &str, limit: &Limit, remedy: impl Fn(i32) -> String) -> Finding {
    let Limit { max, others, needed } = *limit;
    let (left, wanted) = (max.saturating_sub(others), needed + AT_TIMES);
    let found = format!(
        "of {max} {left} are left for the daemon, which needs {needed} all the time and up to {wanted} at times"
    );
    // Not to the last one: applications have more at other times.
    let remedy = remedy(others.saturating_add(wanted).saturating_add(10));
    if left < needed {
        Finding::fail(check, found, remedy)
    } else if left < wanted {
        Finding::warn(check, found, remedy)
    } else {
        Finding::ok(check, found)
    }
}

/// Is the session one with the server, and its own? Nothing has been set in it yet.
pub(super) async fn own(client: &Client, dsn: &Dsn) -> Option<Finding> {
    let fail = |found: String| Some(Finding::fail("connection pooler", found, POOLER));
    let seen = match look(client, dsn).await {
        Ok(seen) => seen,
        // That is what `room` tells of.
        Err(error) if is_full(&error) => return None,
        // Statements of one session that meet another one's are refused in many ways.
        Err(error) => {
            let found = format!("could not be looked for: {}", super::super::error::chain(&error));
            return Some(Finding::warn("connection pooler", found, POOLER));
        }
    };
    let [first, other, again] = &seen;
    if first.is_settled_otherwise() {
        return fail(format!(
            "the session has not the settings that it began with (search_path is `{}`): something between takes them away",
            first.search_path
        ));
    }
    if first.pid == other.pid || first.pid != again.pid {
        return fail("two sessions are served by one process of the server in turn".to_owned());
    }
    None
}

/// Is there no room for one session more?
fn is_full(error: &Error) -> bool {
    let Error::Connect(PgError::Connect { source, .. } | PgError::Asked { source, .. }) = error else {
        return false;
    };
    source.code() == Some(&SqlState::TOO_MANY_CONNECTIONS)
}

/// A session of the pooler's refuses what sessions of the daemon begin with.
pub(super) fn refused_at_start(said: &str) -> Option<&'static str> {
    said.contains("startup parameter").then_some(POOLER)
}

#[derive(Debug)]
struct Seen {
    pid: String,
    search_path: String,
    float_digits: String,
    timeout: String,
}

impl Seen {
    fn of(row: &SimpleQueryRow) -> Self {
        let text = |at: usize| row.get(at).unwrap_or_default().to_owned();
        Self {
            pid: text(0),
            search_path: text(1),
            float_digits: text(2),
            timeout: text(3),
        }
    }

    /// See [`crate::pg::PINNED_OPTIONS`].
    fn is_settled_otherwise(&self) -> bool {
        (
            self.search_path.as_str(),
            self.float_digits.as_str(),
            self.timeout.as_str(),
        ) != (crate::pg::SEARCH_PATH, "3", "0")
    }
}

/// A session, another one that is in a transaction meanwhile, and the first again.
async fn look(client: &Client, dsn: &Dsn) -> Result<[Seen; 3], Error> {
    let first = ask(client, SESSION).await?;
    let second = super::super::connect(dsn).await?;
    ask(&second, "BEGIN").await?;
    let other = ask(&second, SESSION).await?;
    let again = ask(client, SESSION).await;
    ask(&second, "ROLLBACK").await?;
    Ok([first, other, again?])
}

async fn ask(client: &Client, sql: &str) -> Result<Seen, Error> {
    let read = |source| Error::Read {
        what: "the session",
        source,
    };
    let messages = client.simple_query(sql).await.map_err(read)?;
    let row = messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(Seen::of(row)),
        _ => None,
    });
    Ok(row.unwrap_or_else(|| Seen {
        pid: String::new(),
        search_path: String::new(),
        float_digits: String::new(),
        timeout: String::new(),
    }))
}

#[cfg(test)]
mod tests {
    use super::super::super::finding::Level;
    use super::*;

    #[test]
    fn a_limit_fails_where_the_daemon_cannot_run_and_warns_where_it_cannot_do_all() {
        let level = |max: i32, others: i32| {
            let limit = Limit {
                max,
                others,
                needed: 12,
            };
            let finding = judge("max_connections", &limit, |max| max.to_string());
            (finding.level, finding.remedy)
        };
        assert_eq!(level(100, 76).0, Level::Ok);
        assert_eq!(level(100, 77), (Level::Warn, "111".to_owned()));
        assert_eq!(level(100, 88).0, Level::Warn);
        assert_eq!(level(100, 89).0, Level::Fail);
        assert_eq!(level(10, 200).0, Level::Fail);
    }

    #[test]
    fn what_a_pooler_says_to_the_settings_of_a_session_is_known() {
        assert!(refused_at_start("FATAL: unsupported startup parameter in options: datestyle").is_some());
        assert!(refused_at_start("FATAL: no pg_hba.conf entry for host").is_none());
    }
}
