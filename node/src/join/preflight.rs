//! What must be true before a join begins, each with what to do about it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;

use anabranch_proto::NodeId;
use tokio_postgres::Client;
use tokio_postgres::config::Host;

use super::state::{self, State};
use super::waiting::connect_donor;
use super::{Error, Options, sql, undo};
use super::{finish, schema};
use crate::config::{Config, Method};
use crate::membership::{self, Membership};
use crate::pg::Dsn;
use crate::setup::objects::FORMAT;
use crate::setup::pattern::{Choice, Patterns};
use crate::setup::sequence::{self, Depth, Sequences};
use crate::setup::snowflake::MAX_NODE;
use crate::setup::{Finding, Level, check, connect, ids, worst};

/// A server, as far as a copy depends on it.
struct Server {
    major: i32,
    encoding: String,
    collate: String,
    ctype: String,
    provider: String,
    /// Of ICU, or the server's own; empty where the C library has it.
    locale: String,
    collation_version: String,
    roles: BTreeSet<String>,
    /// Those that can be made, each with the version that it would have, or has.
    extensions: BTreeMap<String, String>,
    slots_free: i64,
    senders_free: i64,
    bytes: i64,
    wal_level: String,
    system_identifier: String,
    /// Its data folder, where the role may know it.
    folder: Option<PathBuf>,
}

/// (The column of the locale has another name from 17 on, and rules came with 16.)
const SERVER: &str = "
    SELECT current_setting('server_version_num')::int / 10000, pg_encoding_to_char(encoding)::text, datcollate::text,
           datctype::text, datlocprovider::text, coalesce(pg_database_collation_actual_version(d.oid), '')::text,
           current_setting('max_replication_slots')::int8 - (SELECT count(*) FROM pg_replication_slots),
           current_setting('max_wal_senders')::int8 - (SELECT count(*) FROM pg_stat_replication),
           pg_database_size(d.oid), current_setting('wal_level')::text,
           (SELECT system_identifier::text FROM pg_control_system()),
           (SELECT setting FROM pg_settings WHERE name = 'data_directory'),
           concat_ws(' ', coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale'), to_jsonb(d) ->> 'daticurules')
    FROM pg_database d WHERE datname = current_database()";

async fn server(client: &Client) -> Result<Server, tokio_postgres::Error> {
    let row = client.query_one(SERVER, &[]).await?;
    let names = async |text: &str| -> Result<BTreeSet<String>, tokio_postgres::Error> {
        let rows = client.query(text, &[]).await?;
        rows.iter().map(|row| row.try_get(0)).collect()
    };
    let extensions = client
        .query(
            "SELECT name::text, coalesce(installed_version, default_version, '')::text FROM pg_available_extensions",
            &[],
        )
        .await?;
    let extensions = extensions
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect::<Result<_, tokio_postgres::Error>>()?;
    Ok(Server {
        major: row.try_get(0)?,
        encoding: row.try_get(1)?,
        collate: row.try_get(2)?,
        ctype: row.try_get(3)?,
        provider: row.try_get(4)?,
        collation_version: row.try_get(5)?,
        slots_free: row.try_get(6)?,
        senders_free: row.try_get(7)?,
        bytes: row.try_get(8)?,
        wal_level: row.try_get(9)?,
        system_identifier: row.try_get(10)?,
        folder: row.try_get::<_, Option<String>>(11)?.map(PathBuf::from),
        roles: names("SELECT rolname::text FROM pg_roles").await?,
        locale: row.try_get(12)?,
        extensions,
    })
}

/// Compares the donor with this node's server. Nothing is changed.
///
/// # Errors
/// When one of both cannot be asked.
pub(super) async fn preflight(config: &Config, options: &Options) -> Result<Vec<Finding>, Error> {
    let donor = connect_donor(&options.donor_dsn).await?;
    let mut here = connect(&options.admin_dsn).await?;
    let begun = State::begun(config)?;
    if let Some(begun) = &begun
        && begun
            .is_complete(&here)
            .await
            .map_err(sql("look into this node's database"))?
    {
        return Ok(vec![Finding::ok(
            "database",
            "the join is complete: the daemon may be started",
        )]);
    }
    let theirs = server(&donor).await.map_err(sql("ask the donor's server"))?;
    let ours = server(&here).await.map_err(sql("ask this node's server"))?;
    let mut out = servers(&theirs, &ours);
    out.push(schema::readable(options, theirs.major).await);
    out.extend(roles(config, options, &mut here).await?);
    let folder = ours.folder.as_deref().filter(|_| is_here(&options.admin_dsn));
    let free = folder.and_then(|folder| rustix::fs::statvfs(folder).ok());
    out.push(size(
        u64::try_from(theirs.bytes).unwrap_or(0),
        u64::try_from(ours.bytes).unwrap_or(0),
        free.map(|space| space.f_bavail.saturating_mul(space.f_frsize)),
    ));
    out.extend(
        needed(&donor, &ours)
            .await
            .map_err(sql("ask the donor's database"))?,
    );
    out.extend(
        empty(config, &here)
            .await
            .map_err(sql("look into this node's database"))?,
    );
    let foreign = state::foreign_node(&here, begun.as_ref())
        .await
        .map_err(sql("look whose database it is"))?;
    out.extend(foreign.map(|found| Finding::fail("database", found, state::FOREIGN_NODE)));
    // The others know nothing else of where it is.
    out.extend(check::advertised(config).map(|finding| Finding {
        level: Level::Fail,
        ..finding
    }));
    out.extend(
        donor_role(options, &donor)
            .await
            .map_err(sql("ask for privileges at the donor"))?,
    );
    out.extend(
        layout(&donor)
            .await
            .map_err(sql("ask for the layout of the donor's schema anabranch"))?,
    );
    out.extend(
        selection(config, &donor, &here)
            .await
            .map_err(sql("compare the tables that are replicated"))?,
    );
    out.extend(
        own_role(options, &donor, &here)
            .await
            .map_err(sql("ask for tables with row-level security"))?,
    );
    out.extend(
        snowflakes(config, &donor)
            .await
            .map_err(sql("ask for the donor's defaults"))?,
    );
    if is_of_this_release(&donor)
        .await
        .map_err(sql("ask for the layout of the donor's schema anabranch"))?
    {
        out.extend(sequences(config, &donor).await?);
        let members = membership::read(&donor).await;
        let members = members.map_err(sql("ask for the members"))?;
        out.extend(strangers(config, &members));
    }
    // What is in the way already would be in its way, too; and of a join that goes on the schema is here.
    if worst(&out) != Level::Fail && !goes_on(&here).await.map_err(sql("look for an unfinished join"))? {
        out.extend(Box::pin(schema::tried(config, options, theirs.major, ours.major)).await?);
    }
    Ok(out)
}

/// Does `peers` name who is no member? Once this node has joined, its daemon does not start with that.
fn strangers(config: &Config, members: &Membership) -> Option<Finding> {
    let strangers = config
        .peers
        .iter()
        .filter(|peer| members.entry(peer.id).is_none());
    let strangers: Vec<String> = strangers
        .map(|peer| format!("{} (id {})", peer.name, peer.id))
        .collect();
    (!strangers.is_empty()).then(|| {
        Finding::warn(
            "peers",
            format!("no member is called {}", strangers.join(", ")),
            "let it join before the daemon of this node is started a second time, or take it out of peers",
        )
    })
}

/// Was a join begun in this database, and is not over?
async fn goes_on(here: &Client) -> Result<bool, tokio_postgres::Error> {
    here.query_one("SELECT to_regnamespace('anabranch_join') IS NOT NULL", &[])
        .await?
        .try_get(0)
}

fn servers(theirs: &Server, ours: &Server) -> Vec<Finding> {
    let mut out = Vec::new();
    if theirs.system_identifier == ours.system_identifier {
        out.push(Finding::fail(
            "server",
            "donor and joiner are the same server, or copies of one",
            "make the joiner's server with initdb",
        ));
    }
    out.push(if (15..=18).contains(&ours.major) {
        Finding::ok(
            "version",
            format!("{} here, {} at the donor", ours.major, theirs.major),
        )
    } else {
        Finding::fail(
            "version",
            format!("{} here", ours.major),
            "use PostgreSQL 15 to 18",
        )
    });
    let same = |check: &str, theirs: &str, ours: &str, level: fn(String, String, String) -> Finding| {
        if theirs == ours {
            Finding::ok(check, ours.to_owned())
        } else {
            level(
                check.to_owned(),
                format!("{ours} here, {theirs} at the donor"),
                format!("make the database with {check} {theirs}"),
            )
        }
    };
    out.push(same("encoding", &theirs.encoding, &ours.encoding, Finding::fail));
    out.push(same("lc_collate", &theirs.collate, &ours.collate, Finding::fail));
    out.push(same("lc_ctype", &theirs.ctype, &ours.ctype, Finding::fail));
    out.push(same(
        "locale provider",
        provider(&theirs.provider),
        provider(&ours.provider),
        Finding::fail,
    ));
    if !theirs.locale.is_empty() || !ours.locale.is_empty() {
        // Versions write one locale in more than one way, and a server that was upgraded still has that of before.
        let is_old = |locale: &str| locale.contains('@');
        let may_be_same = theirs.major != ours.major || is_old(&theirs.locale) || is_old(&ours.locale);
        let level: fn(String, String, String) -> Finding =
            if may_be_same { Finding::warn } else { Finding::fail };
        let plain = |locale: &str| locale.to_lowercase().replace('_', "-");
        let is_same = plain(&theirs.locale) == plain(&ours.locale);
        let shown = if is_same { &ours.locale } else { &theirs.locale };
        out.push(same("locale", shown, &ours.locale, level));
    }
    if theirs.collation_version != ours.collation_version {
        out.push(Finding::warn(
            "collation version",
            format!(
                "{} here, {} at the donor",
                ours.collation_version, theirs.collation_version
            ),
            "unique indexes on text may disagree; use the same C library or ICU on all servers",
        ));
    }
    if ours.wal_level != "logical" {
        out.push(Finding::fail(
            "wal_level",
            ours.wal_level.clone(),
            "set wal_level = logical and restart this node's server",
        ));
    }
    let free = |check: &str, place: &str, free: i64, setting: &str| {
        if free >= 1 {
            Finding::ok(format!("{check} {place}"), format!("{free} free"))
        } else {
            Finding::fail(
                format!("{check} {place}"),
                "none is free",
                format!("raise {setting} and restart the server"),
            )
        }
    };
    out.push(free(
        "replication slots",
        "at the donor",
        theirs.slots_free,
        "max_replication_slots",
    ));
    out.push(free(
        "WAL senders",
        "at the donor",
        theirs.senders_free,
        "max_wal_senders",
    ));
    out.push(free(
        "replication slots",
        "here",
        ours.slots_free,
        "max_replication_slots",
    ));
    out.push(free("WAL senders", "here", ours.senders_free, "max_wal_senders"));
    out
}

/// The word of CREATE DATABASE for what the catalog has a letter for.
fn provider(letter: &str) -> &str {
    match letter {
        "b" => "builtin",
        "c" => "libc",
        "i" => "icu",
        other => other,
    }
}

/// What `init` would refuse at the end, after hours of copying: the daemon's role, and that of `--admin-dsn`.
async fn roles(config: &Config, options: &Options, here: &mut Client) -> Result<Vec<Finding>, Error> {
    let facts = finish::facts(config, options, here).await?;
    let mut out = check::session(&facts, &[]);
    out.extend(check::role(&facts, &[]));
    let may_copy: bool = here
        .query_one(
            "SELECT has_parameter_privilege('session_replication_role', 'SET')",
            &[],
        )
        .await
        .and_then(|row| row.try_get(0))
        .map_err(sql("ask for privileges here"))?;
    if !may_copy {
        out.push(Finding::fail(
            "admin role",
            format!(
                "{} may not write rows without firing triggers",
                facts.server.session_role
            ),
            "connect as a superuser with --admin-dsn",
        ));
    }
    Ok(out)
}

/// Does the server run on this machine?
fn is_here(dsn: &Dsn) -> bool {
    let is_local = |host: &Host| match host {
        Host::Unix(_) => true,
        Host::Tcp(name) => {
            name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
        }
    };
    dsn.config().get_hosts().iter().all(is_local)
}

/// `theirs`: bytes of the donor's database; `ours`: of this one, which an unfinished join may have filled in part; `free`: bytes on the
/// file system of the data folder, where that is this machine's. A copy has no dead rows: it may need less than the donor has.
fn size(theirs: u64, ours: u64, free: Option<u64>) -> Finding {
    let needed = theirs.saturating_sub(ours);
    let found = format!(
        "the donor's database has {} MiB; the server here needs as much and its indexes' sorting",
        theirs >> 20
    );
    let Some(free) = free else {
        return Finding::ok("size", found);
    };
    let found = format!("{found}; {} MiB are free", free >> 20);
    let remedy = "give the server a larger disk, or remove dead rows at the donor (VACUUM FULL)";
    match free {
        free if free < needed / 2 => Finding::fail("size", found, remedy),
        free if free < needed.saturating_add(needed / 4) => Finding::warn("size", found, remedy),
        _ => Finding::ok("size", found),
    }
}

/// Roles and extensions that the donor's schema names.
async fn needed(donor: &Client, ours: &Server) -> Result<Vec<Finding>, tokio_postgres::Error> {
    let roles = donor
        .query(
            "SELECT DISTINCT pg_get_userbyid(o)::text FROM (
                 SELECT relowner AS o FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
                     WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'anabranch', 'anabranch_ddl')
                 UNION SELECT proowner FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
                     WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'anabranch', 'anabranch_ddl')
                 UNION SELECT nspowner FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname NOT IN ('anabranch', 'anabranch_ddl')
                 UNION SELECT (aclexplode(relacl)).grantee FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
                     WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'anabranch', 'anabranch_ddl')
             ) x WHERE o <> 0",
            &[],
        )
        .await?;
    let extensions = donor
        .query(
            "SELECT extname::text, extversion FROM pg_extension ORDER BY 1",
            &[],
        )
        .await?;
    let mut out = Vec::new();
    for row in roles {
        let role: String = row.try_get(0)?;
        if !ours.roles.contains(&role) {
            out.push(Finding::fail(
                format!("role {role}"),
                "owns objects at the donor or has privileges on them, and is not here",
                format!("CREATE ROLE {}", crate::setup::sql::ident(&role)),
            ));
        }
    }
    for row in extensions {
        let (name, version): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        out.extend(extension(&name, &version, ours));
    }
    Ok(out)
}

/// An extension of the donor's database. (A dump makes it here without naming a version.)
fn extension(name: &str, version: &str, ours: &Server) -> Option<Finding> {
    let check = format!("extension {name}");
    match ours.extensions.get(name) {
        None => Some(Finding::fail(
            check,
            "is used at the donor and not installed on this machine",
            "install its package here",
        )),
        Some(here) if here != version => Some(Finding::warn(
            check,
            format!("is of version {here} here, and of {version} at the donor"),
            "its types and functions may differ: install the same version of its package, or ALTER EXTENSION ... UPDATE at the members",
        )),
        Some(_) => None,
    }
}

/// So many of the things that are in the way are named.
const NAMED: usize = 5;

/// The database here must have nothing in it, unless an earlier run of this join made it: whatever is in it goes when a join begins anew.
async fn empty(config: &Config, here: &Client) -> Result<Vec<Finding>, tokio_postgres::Error> {
    let row = here
        .query_one(
            "SELECT to_regnamespace('anabranch_join') IS NOT NULL, to_regnamespace('anabranch') IS NOT NULL",
            &[],
        )
        .await?;
    let (unfinished, ours): (bool, bool) = (row.try_get(0)?, row.try_get(1)?);
    let own = here.query(undo::OWN, &[]).await?;
    let some: Result<Vec<String>, _> = own.iter().take(NAMED).map(|row| row.try_get(0)).collect();
    Ok(vec![if unfinished {
        Finding::ok("database", "an unfinished join goes on")
    } else if ours {
        Finding::fail(
            "database",
            "is a node already",
            "run `anabranch remove` and empty the database, or join with another one",
        )
    } else if !own.is_empty() {
        let more = if own.len() > NAMED { ", ..." } else { "" };
        Finding::fail(
            "database",
            format!("has {} objects of its own: {}{more}", own.len(), some?.join(", ")),
            format!(
                "join with an empty database; postgres.dsn of node {} names this one",
                config.node.name
            ),
        )
    } else {
        Finding::ok("database", "is empty")
    }])
}

/// Could this node make the ids that the donor's tables have as defaults?
async fn snowflakes(config: &Config, donor: &Client) -> Result<Option<Finding>, tokio_postgres::Error> {
    if config.node.id.0 <= MAX_NODE {
        return Ok(None);
    }
    let used: bool = donor
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_attrdef'::regclass
                 AND refclassid = 'pg_proc'::regclass AND refobjid = to_regprocedure('anabranch.snowflake()'))",
            &[],
        )
        .await?
        .try_get(0)?;
    Ok(used.then(|| {
        Finding::fail(
            "node.id",
            format!(
                "is {}, and the donor's tables have snowflake ids, with ten bits for the node",
                config.node.id
            ),
            format!("join with an id that was never used, up to {MAX_NODE}"),
        )
    }))
}

/// Is there a share for this node in each sequence that the members divide? It would find out when all is copied, and without one it
/// gives ids that a member gives.
async fn sequences(config: &Config, donor: &Client) -> Result<Vec<Finding>, Error> {
    let failed = sql("ask for the donor's sequences");
    let publication: String = match donor
        .query_one("SELECT publication FROM anabranch.node", &[])
        .await
    {
        Ok(row) => row.try_get(0).map_err(failed)?,
        Err(error) => return Err(failed(error)),
    };
    let tables = sequence::published(donor, &publication)
        .await
        .map_err(sql("ask for the donor's publication"))?;
    let mut all = sequence::read(donor, &tables, Depth::Columns).await?;
    // Here they are made by the role of --admin-dsn. (Which ids the donor itself has still to lift is the donor's.)
    for sequence in &mut all.all {
        sequence.may_alter = true;
        for column in &mut sequence.columns {
            column.ahead = None;
        }
    }
    for column in &mut all.snowflakes {
        column.ahead = None;
    }
    let members = membership::read(donor)
        .await
        .map_err(sql("ask for the members"))?;
    let used = members.iter().map(|fact| fact.node).collect();
    Ok(shares(config, &all, &used))
}

/// `used`: all node ids that ever were.
fn shares(config: &Config, all: &Sequences, used: &BTreeSet<NodeId>) -> Vec<Finding> {
    let plan = ids::plan_of_joiner(all, config);
    let mut out = Vec::new();
    if !plan.is_allowed() {
        out.extend(no_room(config, all, used));
    }
    let is_of_room = |finding: &Finding| !out.is_empty() && finding.check == "sequences.increment";
    // Without a remedy: which member is to take its own share yet.
    let mut told: Vec<Finding> = plan
        .findings
        .into_iter()
        .filter(|finding| finding.level != Level::Ok && !finding.remedy.is_empty() && !is_of_room(finding))
        .collect();
    told.sort_by_key(|finding| std::cmp::Reverse(finding.level));
    if told.len() > NAMED {
        let more = told.len() - NAMED;
        let level = told.get(NAMED).map_or(Level::Ok, |finding| finding.level);
        told.truncate(NAMED);
        told.push(Finding {
            level,
            ..Finding::ok("sequences", format!("{more} more like these"))
        });
    }
    out.extend(told);
    if out.is_empty() {
        let found = format!(
            "there is a share for node {} wherever the members have one",
            config.node.id
        );
        out.push(Finding::ok("sequences", found));
    }
    out
}

/// An id that the increment has no room for, here or at a member; with one that there is room for.
fn no_room(config: &Config, all: &Sequences, used: &BTreeSet<NodeId>) -> Option<Finding> {
    let own = config.node.id;
    let said = all.said.values().flatten();
    let room = said
        .filter(|(node, said)| {
            all.members.contains_key(node) && **node != own && said.method == Method::Interleave
        })
        .filter_map(|(_, said)| u16::try_from(said.increment).ok())
        .min()?;
    if own.0 <= room {
        return None;
    }
    let free = (1..=room).map(NodeId).find(|id| !used.contains(id));
    let raise = format!(
        "set sequences.increment to {own} or more, with room for more nodes, in the configuration of every member and here, and run \
         `anabranch sequences apply` at every member, then this again"
    );
    Some(Finding::fail(
        "node.id",
        format!("is {own}, and the members divide their sequences by {room}: there is no share for it"),
        match free {
            Some(free) => format!("take an id that was never used, up to {room}, such as {free}; or {raise}"),
            None => raise,
        },
    ))
}

/// Is the donor's DSN that of the donor, and may its role read everything that is copied?
async fn donor_role(options: &Options, donor: &Client) -> Result<Vec<Finding>, tokio_postgres::Error> {
    let prepared: bool = donor
        .query_one("SELECT to_regclass('anabranch.member') IS NOT NULL", &[])
        .await?
        .try_get(0)?;
    if !prepared {
        return Ok(vec![Finding::fail(
            "donor",
            format!("{} is no node's database", options.donor_dsn.hosts()),
            "name the donor's database in --from-dsn",
        )]);
    }
    let mut out = Vec::new();
    let whose = donor
        .query_opt("SELECT node_id, name FROM anabranch.node", &[])
        .await?;
    if let Some(row) = whose {
        let (id, name): (i32, String) = (row.try_get(0)?, row.try_get(1)?);
        if id != i32::from(options.donor.id.0) {
            out.push(Finding::fail(
                "donor",
                format!(
                    "the database of --from-dsn is node {name}'s (id {id}), not {}'s",
                    options.donor.name
                ),
                "let --from and --from-dsn mean one member: its daemon takes the snapshot that is read there",
            ));
        }
    }
    let rows = donor
        .query(
            "SELECT format('%I.%I', n.nspname, c.relname)::text, has_table_privilege(c.oid, 'SELECT'), row_security_active(c.oid)
             FROM pg_publication_tables p
             JOIN pg_namespace n ON n.nspname = p.schemaname
             JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
             WHERE p.pubname = (SELECT publication FROM anabranch.node)",
            &[],
        )
        .await?;
    for row in rows {
        let (table, reads, filtered): (String, bool, bool) =
            (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let found = match (reads, filtered) {
            (false, _) => "cannot be read by the role of --from-dsn",
            (true, true) => "has row-level security, which keeps rows from the role of --from-dsn",
            (true, false) => continue,
        };
        out.push(Finding::fail(
            format!("table {table}"),
            found,
            "use the donor's superuser or its daemon's role",
        ));
    }
    Ok(out)
}

/// Are the donor's tables of our own such as are made here? Their rows are copied as they are.
async fn layout(donor: &Client) -> Result<Option<Finding>, tokio_postgres::Error> {
    let is_node: bool = donor
        .query_one("SELECT to_regclass('anabranch.node') IS NOT NULL", &[])
        .await?
        .try_get(0)?;
    if !is_node {
        // Said by itself.
        return Ok(None);
    }
    let row = donor.query_opt("SELECT format FROM anabranch.node", &[]).await?;
    let format = row.map(|row| row.try_get(0)).transpose()?;
    Ok(format.and_then(other_release))
}

/// Else it is said by itself.
async fn is_of_this_release(donor: &Client) -> Result<bool, tokio_postgres::Error> {
    let there: bool = donor
        .query_one("SELECT to_regclass('anabranch.node') IS NOT NULL", &[])
        .await?
        .try_get(0)?;
    Ok(there && layout(donor).await?.is_none())
}

fn other_release(format: i32) -> Option<Finding> {
    let remedy = match format {
        FORMAT => return None,
        ..FORMAT => "run the same release at the donor, and `anabranch init` of it there; then join",
        _ => "install the donor's release of Anabranch here",
    };
    let found = format!("has layout {format} at the donor, this release knows {FORMAT}");
    Some(Finding::fail("schema anabranch", found, remedy))
}

/// A table or partitioned table of the donor's.
struct Candidate {
    oid: u32,
    schema: String,
    name: String,
    /// Has it rows of its own?
    is_leaf: bool,
    of_extension: bool,
    /// The partitioned tables above it.
    ancestors: Vec<u32>,
    is_published: bool,
}

/// Partitions are published with their table.
const CANDIDATES: &str = "
    WITH RECURSIVE published AS (
        SELECT r.prrelid AS oid FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
        WHERE p.pubname = (SELECT publication FROM anabranch.node)
        UNION SELECT i.inhrelid FROM pg_inherits i JOIN published ON i.inhparent = published.oid
        JOIN pg_class part ON part.oid = i.inhrelid AND part.relispartition)
    SELECT c.oid, n.nspname::text, c.relname::text, c.relkind::text = 'r',
           EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'),
           ARRAY(SELECT relid::oid FROM pg_partition_ancestors(c.oid) WHERE relid <> c.oid),
           EXISTS (SELECT FROM published WHERE published.oid = c.oid)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p') AND n.nspname !~ '^pg_'
      AND n.nspname NOT IN ('information_schema', 'anabranch', 'anabranch_ddl', 'anabranch_join')
    ORDER BY 2, 3";

/// Does `postgres.tables` here choose what the donor publishes? Rows of what it publishes alone are copied, but changes here would not
/// travel; of what is chosen here alone no row is copied.
async fn selection(
    config: &Config,
    donor: &Client,
    here: &Client,
) -> Result<Vec<Finding>, tokio_postgres::Error> {
    let is_node: bool = donor
        .query_one("SELECT to_regclass('anabranch.node') IS NOT NULL", &[])
        .await?
        .try_get(0)?;
    let Ok(patterns) = Patterns::parse(&config.postgres.tables) else {
        return Ok(vec![Finding::fail(
            "postgres.tables",
            "cannot be read",
            "put the patterns right: `schema.table`, `schema.*`, `!schema.table`",
        )]);
    };
    if !is_node {
        // Said by itself.
        return Ok(Vec::new());
    }
    let mut all = Vec::new();
    for row in donor.query(CANDIDATES, &[]).await? {
        all.push(Candidate {
            oid: row.try_get(0)?,
            schema: row.try_get(1)?,
            name: row.try_get(2)?,
            is_leaf: row.try_get(3)?,
            of_extension: row.try_get(4)?,
            ancestors: row.try_get(5)?,
            is_published: row.try_get(6)?,
        });
    }
    // What is copied by a join that goes on is settled.
    let goes_on = goes_on(here).await?;
    let (missing, more) = differences(&patterns, &all);
    let mut out = Vec::new();
    if !missing.is_empty() {
        out.push(Finding::fail(
            "postgres.tables",
            format!("does not choose what the donor replicates: {}", some_of(&missing)),
            "choose the same tables in postgres.tables here as the donor does",
        ));
    }
    if !more.is_empty() {
        let finding: fn(&'static str, String, &'static str) -> Finding =
            if goes_on { Finding::warn } else { Finding::fail };
        out.push(finding(
            "postgres.tables",
            format!(
                "chooses what the donor does not replicate, and no row is copied of: {}",
                some_of(&more)
            ),
            "exclude it in postgres.tables here (\"!schema.table\"), or let the members replicate it first (`anabranch init` or `anabranch \
             tables add` there)",
        ));
    }
    Ok(out)
}

/// Tables that the donor publishes and the patterns do not choose; and the other way round.
fn differences(patterns: &Patterns, all: &[Candidate]) -> (Vec<String>, Vec<String>) {
    let chosen: BTreeSet<u32> = all
        .iter()
        .filter(|table| match patterns.choose(&table.schema, &table.name) {
            Choice::Out => false,
            Choice::ByName => true,
            Choice::ByWildcard => !table.of_extension,
        })
        .map(|table| table.oid)
        .collect();
    let (mut missing, mut more) = (Vec::new(), Vec::new());
    for table in all.iter().filter(|table| table.is_leaf) {
        let is_chosen = chosen.contains(&table.oid) || table.ancestors.iter().any(|oid| chosen.contains(oid));
        match (table.is_published, is_chosen) {
            (true, false) => missing.push(format!("{}.{}", table.schema, table.name)),
            (false, true) => more.push(format!("{}.{}", table.schema, table.name)),
            _ => {}
        }
    }
    (missing, more)
}

/// The first few.
fn some_of(names: &[String]) -> String {
    let some: Vec<&str> = names.iter().take(NAMED).map(String::as_str).collect();
    let more = if names.len() > NAMED { ", ..." } else { "" };
    format!("{}{more}", some.join(", "))
}

/// Will row-level security, which comes with the donor's tables, keep rows from the daemon's role here? (`init` asks for the same, but
/// here all would be copied by then.)
async fn own_role(
    options: &Options,
    donor: &Client,
    here: &Client,
) -> Result<Option<Finding>, tokio_postgres::Error> {
    let bound = here
        .query_opt(
            "SELECT FROM pg_roles WHERE rolname = $1 AND NOT rolsuper AND NOT rolbypassrls",
            &[&options.role],
        )
        .await?;
    if bound.is_none() {
        return Ok(None);
    }
    let table = donor
        .query_opt(
            "SELECT format('%I.%I', n.nspname, c.relname)::text FROM pg_publication_tables p
             JOIN pg_namespace n ON n.nspname = p.schemaname
             JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
             WHERE p.pubname = (SELECT publication FROM anabranch.node) AND c.relrowsecurity ORDER BY 1 LIMIT 1",
            &[],
        )
        .await?;
    table
        .map(|row| {
            let table: String = row.try_get(0)?;
            Ok(Finding::fail(
                format!("role {}", options.role),
                format!("is bound here by row-level security, which {table} has"),
                format!("ALTER ROLE {} BYPASSRLS", crate::setup::sql::ident(&options.role)),
            ))
        })
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setup::sequence::{Function, Said, Sequence, Value};

    fn server(major: i32, locale: &str) -> Server {
        Server {
            major,
            encoding: "UTF8".to_owned(),
            collate: "C".to_owned(),
            ctype: "C".to_owned(),
            provider: "i".to_owned(),
            locale: locale.to_owned(),
            collation_version: String::new(),
            roles: BTreeSet::new(),
            extensions: BTreeMap::from([("hstore".to_owned(), "1.8".to_owned())]),
            slots_free: 5,
            senders_free: 5,
            bytes: 0,
            wal_level: "logical".to_owned(),
            system_identifier: format!("{major} {locale}"),
            folder: None,
        }
    }

    #[test]
    fn what_a_joiners_server_has_otherwise_is_refused_with_what_to_do() {
        let theirs = server(15, "de");
        assert!(
            servers(&theirs, &server(16, "de"))
                .iter()
                .all(|finding| finding.level == Level::Ok)
        );
        let ours = Server {
            major: 14,
            encoding: "LATIN1".to_owned(),
            collate: "sv_SE".to_owned(),
            ctype: "sv_SE".to_owned(),
            provider: "c".to_owned(),
            collation_version: "2.36".to_owned(),
            slots_free: 0,
            senders_free: 0,
            wal_level: "replica".to_owned(),
            ..server(15, "de")
        };
        let found = servers(&theirs, &ours);
        for (check, remedy) in [
            ("server", "initdb"),
            ("version", "15 to 18"),
            ("encoding", "encoding UTF8"),
            ("lc_collate", "lc_collate C"),
            ("lc_ctype", "lc_ctype C"),
            ("locale provider", "locale provider icu"),
            ("wal_level", "wal_level = logical"),
            ("replication slots here", "max_replication_slots"),
            ("WAL senders here", "max_wal_senders"),
        ] {
            let is_it = |finding: &&Finding| finding.check == check && finding.level == Level::Fail;
            let told = found.iter().find(is_it).map(|finding| &finding.remedy);
            assert!(
                told.is_some_and(|told| told.contains(remedy)),
                "{check}: {found:?}"
            );
        }
        let collation = found.iter().find(|finding| finding.check == "collation version");
        assert!(
            collation.is_some_and(|finding| finding.level == Level::Warn),
            "{found:?}"
        );
    }

    #[test]
    fn databases_of_other_locales_and_extensions_of_other_versions_are_told() {
        let level = |theirs: (i32, &str), ours: (i32, &str)| {
            let found = servers(&server(theirs.0, theirs.1), &server(ours.0, ours.1));
            let locale = found.into_iter().find(|finding| finding.check == "locale");
            locale.expect("it is compared").level
        };
        assert_eq!(level((15, "de"), (15, "de")), Level::Ok);
        assert_eq!(level((15, "de"), (15, "sv")), Level::Fail);
        assert_eq!(level((15, "en_US"), (17, "en-US")), Level::Ok);
        // Might be two spellings.
        assert_eq!(
            level((15, "de@collation=phonebook"), (17, "de-u-co-phonebk")),
            Level::Warn
        );
        assert_eq!(
            level((17, "de@collation=phonebook"), (17, "de-u-co-phonebk")),
            Level::Warn
        );
        let ours = server(15, "de");
        let level = |name, version| extension(name, version, &ours).map(|finding| finding.level);
        assert_eq!(level("hstore", "1.8"), None);
        assert_eq!(level("hstore", "1.9"), Some(Level::Warn));
        assert_eq!(level("postgis", "3.0"), Some(Level::Fail));
    }

    #[test]
    fn an_id_that_has_no_share_is_told_with_one_that_has() {
        let said = Said {
            method: Method::Interleave,
            increment: 4,
            base: None,
        };
        let mut all = Sequences {
            all: vec![Sequence {
                increment: 4,
                value: Some(Value {
                    last: 101,
                    called: true,
                }),
                ..Sequence::example()
            }],
            snowflakes: Vec::new(),
            function: Function::default(),
            said: [(
                ("public".to_owned(), "s".to_owned()),
                [(NodeId(1), said), (NodeId(2), said)].into(),
            )]
            .into(),
            members: [(NodeId(1), "n1".to_owned()), (NodeId(2), "n2".to_owned())].into(),
            highest_id: NodeId(2),
        };
        let mut config = Config::example();
        config.sequences.increment = 4;
        let used: BTreeSet<NodeId> = [1, 2].map(NodeId).into();
        let mut told = |id: u16, all: &Sequences| {
            config.node.id = NodeId(id);
            shares(&config, all, &used)
        };
        assert_eq!(
            told(3, &all).iter().map(|finding| finding.level).max(),
            Some(Level::Ok)
        );
        let found = told(5, &all);
        let (first, rest) = found.split_first().unwrap();
        assert!(
            first.check == "node.id" && first.level == Level::Fail,
            "{found:?}"
        );
        assert!(first.remedy.contains("such as 3"), "{first:?}");
        assert!(
            rest.iter().all(|finding| finding.check != "sequences.increment"),
            "{found:?}"
        );
        // No room in the column.
        all.all[0].columns[0].type_max = Some(102);
        let found = told(3, &all);
        assert!(
            found[0].level == Level::Fail && found[0].remedy.contains("TYPE bigint"),
            "{found:?}"
        );
    }

    #[test]
    fn a_donor_whose_schema_is_of_another_release_is_told_and_what_to_do() {
        assert_eq!(other_release(FORMAT), None);
        let older = other_release(FORMAT - 1).unwrap();
        assert!(
            older.level == Level::Fail && older.remedy.contains("anabranch init"),
            "{older:?}"
        );
        let newer = other_release(FORMAT + 1).unwrap();
        assert!(newer.remedy.contains("here"), "{newer:?}");
    }

    #[test]
    fn tables_that_one_side_alone_replicates_are_named() {
        let table = |oid: u32, name: &str, is_published: bool| Candidate {
            oid,
            schema: "public".to_owned(),
            name: name.to_owned(),
            is_leaf: true,
            of_extension: false,
            ancestors: Vec::new(),
            is_published,
        };
        let all = [
            table(1, "item", true),
            table(2, "part", true),
            table(3, "note", false),
            Candidate {
                is_leaf: false,
                ..table(4, "place", true)
            },
            Candidate {
                ancestors: vec![4],
                ..table(5, "place_north", true)
            },
            Candidate {
                of_extension: true,
                ..table(6, "of_extension", false)
            },
        ];
        let differences = |patterns: &[&str]| {
            let patterns: Vec<String> = patterns.iter().map(|&text| text.to_owned()).collect();
            super::differences(&Patterns::parse(&patterns).unwrap(), &all)
        };
        let named = |names: &[&str]| {
            names
                .iter()
                .map(|name| format!("public.{name}"))
                .collect::<Vec<_>>()
        };
        assert_eq!(differences(&["public.*"]), (named(&[]), named(&["note"])));
        let not = ["public.*", "!public.note"];
        assert_eq!(differences(&not), (named(&[]), named(&[])));
        let some = ["public.item", "public.place"];
        assert_eq!(differences(&some), (named(&["part"]), named(&[])));
    }

    #[test]
    fn a_disk_that_cannot_hold_the_copy_is_told_before_it_is_full() {
        let gib = 1 << 30;
        let level = |theirs, ours, free| size(theirs, ours, free).level;
        assert_eq!(level(100 * gib, 0, Some(40 * gib)), Level::Fail);
        assert_eq!(level(100 * gib, 0, Some(110 * gib)), Level::Warn);
        assert_eq!(level(100 * gib, 0, Some(130 * gib)), Level::Ok);
        // Most of it is here already.
        assert_eq!(level(100 * gib, 90 * gib, Some(40 * gib)), Level::Ok);
        assert_eq!(level(100 * gib, 0, None), Level::Ok);
    }
}
