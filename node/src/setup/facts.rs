//! What the server says of itself, of the daemon's role, and of what an earlier `init` left.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use super::ddl::{self, DdlFacts, DdlRole};
use super::error::Error;
use super::plain_ddl;
use super::table::{self, Table};
use super::tables::remove::{Before, REMOVED};
use super::{conflict_log, sequence, snowflake};
use crate::membership;
use crate::policy_change::Body;

/// Everything that `init` and `doctor` judge, read in one transaction.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The server and the session.
    pub server: Server,
    /// The daemon's role.
    pub role: Role,
    /// What an earlier `init` left.
    pub ours: Ours,
    /// Every table, view and foreign table outside the system schemas.
    pub tables: Vec<Table>,
}

/// The server, and the role that asks.
#[derive(Debug, Clone, Default)]
#[allow(clippy::struct_excessive_bools)] // independent facts
pub struct Server {
    /// As `server_version_num`.
    pub version_num: i32,
    /// `server_version`.
    pub version: String,
    /// `wal_level`.
    pub wal_level: String,
    /// `max_replication_slots`.
    pub slots_max: i32,
    /// Slots in use.
    pub slots_used: i32,
    /// `max_wal_senders`.
    pub senders_max: i32,
    /// Walsenders running.
    pub senders_used: i32,
    /// `server_encoding`.
    pub encoding: String,
    /// Is it a standby?
    pub in_recovery: bool,
    /// Of `pg_control_system()`.
    pub system_identifier: String,
    /// The database.
    pub database: String,
    /// Role of this session.
    pub session_role: String,
    /// May the session's role do everything?
    pub session_superuser: bool,
    /// May the session's role make slots?
    pub session_replication: bool,
    /// May the session's role create schemas and publications here?
    pub session_may_create: bool,
    /// `max_slot_wal_keep_size`, MiB; -1 is unlimited.
    pub slot_wal_keep_mib: i64,
    /// `idle_replication_slot_timeout` (18), seconds; 0 is never.
    pub slot_idle_timeout_s: i64,
    /// `synchronous_standby_names`.
    pub synchronous_standby_names: String,
}

impl Server {
    /// 15 for 15.18.
    #[must_use]
    pub fn major(&self) -> i32 {
        self.version_num / 10_000
    }
}

/// The daemon's role.
#[derive(Debug, Clone, Default)]
#[allow(clippy::struct_excessive_bools)] // pg_roles is made of them
pub struct Role {
    /// Its name.
    pub name: String,
    /// Its oid; none when it does not exist.
    pub oid: Option<u32>,
    /// Superuser?
    pub superuser: bool,
    /// May it log in?
    pub login: bool,
    /// May it replicate?
    pub replication: bool,
    /// Does row-level security not bind it?
    pub bypass_rls: bool,
    /// May it set `session_replication_role`?
    pub may_set_replication_role: bool,
    /// May it read the statistics of other roles' sessions?
    pub reads_all_stats: bool,
    /// May it connect to the database?
    pub may_connect: bool,
    /// Privileges in schema `anabranch` that it lacks, as the statements that give them.
    pub lacks_in_ours: Vec<(String, String)>,
    /// Sequences on which it lacks something that this session may grant.
    pub lacks_sequences: Vec<LackedSequence>,
}

/// A sequence that a column takes its values from, and that the daemon's role may not read or lift.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LackedSequence {
    /// Schema.
    pub schema: String,
    /// Name.
    pub name: String,
    /// Oid of the column's table.
    pub table_oid: u32,
    /// What it lacks of SELECT and UPDATE.
    pub lacks: Vec<String>,
}

/// What an earlier `init` left in the database.
#[derive(Debug, Clone, Default)]
pub struct Ours {
    /// Is there a schema `anabranch`?
    pub schema: bool,
    /// Tables and views in it.
    pub tables: Vec<String>,
    /// Is there a schema `anabranch_join`, as an unfinished join has it?
    pub join: bool,
    /// Is there a conflict log of the layout before it had partitions? It is not among `tables`.
    pub plain_history: bool,
    /// The row of `anabranch.node`.
    pub node: Option<NodeRow>,
    /// Origins with a progress row.
    pub progress: Vec<i32>,
    /// Nodes with a clock row.
    pub clock: Vec<i32>,
    /// (node id, fact) of `anabranch.member`.
    pub members: Vec<(i32, String)>,
    /// What every node is called that ever was a member, as [`Body::names`] gives it.
    pub names: BTreeMap<String, u16>,
    /// The publication of the configured name.
    pub publication: Option<Publication>,
    /// The slot of the configured name.
    pub slot: Option<Slot>,
    /// `anabranch.identity_before`.
    pub identities: Vec<Before>,
    /// (schema, name) of tables that were taken out of replication here: what others send of them is passed over.
    pub removed: Vec<(String, String)>,
    /// Does `anabranch.sequence` say by which method? (An older release's does not.)
    pub sequence_method: bool,
    /// Does `anabranch.ddl` say on which timeline? (An older release's does not.)
    pub ddl_epoch: bool,
    /// Is there an index on the conflict log by transaction? (An older release's has none.)
    pub group_index: bool,
    /// Does `anabranch.conflict_upkeep()` take temporary tables for the server's? (An older release's does.)
    pub open_upkeep: bool,
    /// Is `anabranch.conflict_upkeep()` as this release makes it?
    pub upkeep_as_made: bool,
    /// Lack reviewers `anabranch.member`, which an older release did not let them read?
    pub reviewer_lacks: bool,
    /// Comment of `anabranch.snowflake()`; none where it does not exist.
    pub snowflake: Option<String>,
    /// What lets DDL travel.
    pub ddl: super::ddl::DdlFacts,
}

/// `anabranch.node`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeRow {
    /// Node id.
    pub node_id: i32,
    /// Name.
    pub name: String,
    /// Cluster.
    pub cluster_id: String,
    /// Made once by `init`.
    pub incarnation: String,
    /// Server it was made on.
    pub system_identifier: String,
    /// Its slot.
    pub slot: String,
    /// Its publication.
    pub publication: String,
    /// Where the slot began, as `pg_lsn` text.
    pub slot_start: Option<String>,
    /// Version of our tables.
    pub format: i32,
}

/// `pg_publication`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Publication {
    /// Oids of its tables, as listed (a partitioned root stands for its partitions).
    pub tables: Vec<u32>,
    /// Names of our own tables among them.
    pub own: Vec<String>,
    /// Names of those with a column list or a row filter.
    pub filtered: Vec<String>,
    /// FOR ALL TABLES or FOR TABLES IN SCHEMA?
    pub open_ended: bool,
    /// `publish_via_partition_root`.
    pub via_root: bool,
    /// Inserts, updates, deletes and truncates all published?
    pub all_operations: bool,
    /// `publish_generated_columns = stored` (18).
    pub generated_stored: bool,
}

/// `pg_replication_slots`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Slot {
    /// Output plugin.
    pub plugin: String,
    /// Its database.
    pub database: String,
    /// Pid of the walsender that holds it.
    pub active_pid: Option<i32>,
    /// `wal_status`.
    pub wal_status: String,
    /// WAL it keeps, bytes.
    pub retained_bytes: i64,
    /// `confirmed_flush_lsn`.
    pub confirmed_flush: Option<String>,
}

/// Reads everything. `role` is the daemon's role, `slot` and `publication` the configured names.
///
/// # Errors
/// When the server answers a catalog query with an error.
pub async fn read(client: &mut Client, role: &str, slot: &str, publication: &str) -> Result<Facts, Error> {
    let read = |what| move |source| Error::Read { what, source };
    let transaction = client
        .build_transaction()
        .read_only(true)
        .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
        .start()
        .await
        .map_err(read("the catalog"))?;
    let client = transaction.client();
    let server = server(client).await.map_err(read("the server's settings"))?;
    let mut ours = ours(client, slot, publication)
        .await
        .map_err(read("schema anabranch"))?;
    ours.tables.sort();
    let role = role_facts(client, role, &ours)
        .await
        .map_err(read("the daemon's role"))?;
    let tables = table::read(client, role.oid).await.map_err(read("the tables"))?;
    transaction.commit().await.map_err(read("the catalog"))?;
    Ok(Facts {
        server,
        role,
        ours,
        tables,
    })
}

async fn server(client: &Client) -> Result<Server, tokio_postgres::Error> {
    let row = client
        .query_one(
            "SELECT current_setting('server_version_num')::int, current_setting('server_version'),
                    current_setting('wal_level'), current_setting('max_replication_slots')::int,
                    (SELECT count(*)::int FROM pg_replication_slots), current_setting('max_wal_senders')::int,
                    (SELECT count(*)::int FROM pg_stat_replication), current_setting('server_encoding'),
                    pg_is_in_recovery(), (SELECT system_identifier::text FROM pg_control_system()),
                    current_database()::text, current_user::text,
                    r.rolsuper, r.rolreplication,
                    (SELECT setting::bigint FROM pg_settings WHERE name = 'max_slot_wal_keep_size'),
                    coalesce((SELECT setting::bigint FROM pg_settings WHERE name = 'idle_replication_slot_timeout'), 0),
                    current_setting('synchronous_standby_names'),
                    has_database_privilege(current_database(), 'CREATE')
             FROM pg_roles r WHERE r.rolname = current_user",
            &[],
        )
        .await?;
    Ok(Server {
        version_num: row.try_get(0)?,
        version: row.try_get(1)?,
        wal_level: row.try_get(2)?,
        slots_max: row.try_get(3)?,
        slots_used: row.try_get(4)?,
        senders_max: row.try_get(5)?,
        senders_used: row.try_get(6)?,
        encoding: row.try_get(7)?,
        in_recovery: row.try_get(8)?,
        system_identifier: row.try_get(9)?,
        database: row.try_get(10)?,
        session_role: row.try_get(11)?,
        session_superuser: row.try_get(12)?,
        session_replication: row.try_get(13)?,
        slot_wal_keep_mib: row.try_get(14)?,
        slot_idle_timeout_s: row.try_get(15)?,
        synchronous_standby_names: row.try_get(16)?,
        session_may_create: row.try_get(17)?,
    })
}

async fn role_facts(client: &Client, name: &str, ours: &Ours) -> Result<Role, tokio_postgres::Error> {
    let row = client
        .query_opt(
            "SELECT oid, rolsuper, rolcanlogin, rolreplication, rolbypassrls,
                    has_parameter_privilege(oid, 'session_replication_role', 'SET'),
                    pg_has_role(oid, 'pg_read_all_stats', 'USAGE'),
                    has_database_privilege(oid, current_database(), 'CONNECT')
             FROM pg_roles WHERE rolname = $1",
            &[&name],
        )
        .await?;
    let Some(row) = row else {
        return Ok(Role {
            name: name.to_owned(),
            ..Role::default()
        });
    };
    let oid: u32 = row.try_get(0)?;
    let mut role = Role {
        name: name.to_owned(),
        oid: Some(oid),
        superuser: row.try_get(1)?,
        login: row.try_get(2)?,
        replication: row.try_get(3)?,
        bypass_rls: row.try_get(4)?,
        may_set_replication_role: row.try_get(5)?,
        reads_all_stats: row.try_get(6)?,
        may_connect: row.try_get(7)?,
        lacks_in_ours: Vec::new(),
        lacks_sequences: lacked_sequences(client, oid).await?,
    };
    for object in super::objects::OBJECTS {
        // A table that is not there yet lacks everything: its grant belongs to the same plan.
        let has = if ours.tables.iter().any(|table| table == object.name) {
            let each = object
                .privileges
                .split(", ")
                .map(str::to_owned)
                .collect::<Vec<_>>();
            client
                .query_one(
                    "SELECT bool_and(has_table_privilege($1::oid, format('anabranch.%I', $2::text), p))
                     FROM unnest($3::text[]) p",
                    &[&oid, &object.name, &each],
                )
                .await?
                .try_get(0)?
        } else {
            false
        };
        if !has {
            role.lacks_in_ours
                .push((object.name.to_owned(), object.privileges.to_owned()));
        }
    }
    for name in snowflake::SEQUENCES {
        let lacks: bool = client
            .query_one(
                "SELECT NOT bool_and(has_sequence_privilege($1::oid, s, p))
                 FROM (SELECT to_regclass('anabranch.' || $2::text)::oid AS s) x, unnest(ARRAY['SELECT', 'UPDATE']) p",
                &[&oid, &name],
            )
            .await?
            .try_get::<_, Option<bool>>(0)?
            .unwrap_or(false);
        if lacks {
            role.lacks_in_ours
                .push((name.to_owned(), snowflake::PRIVILEGES.to_owned()));
        }
    }
    let usage: bool = if ours.schema {
        client
            .query_one(
                "SELECT has_schema_privilege($1::oid, 'anabranch', 'USAGE')",
                &[&oid],
            )
            .await?
            .try_get(0)?
    } else {
        false
    };
    if !usage {
        role.lacks_in_ours.push((String::new(), "USAGE".to_owned()));
    }
    Ok(role)
}

async fn lacked_sequences(client: &Client, role: u32) -> Result<Vec<LackedSequence>, tokio_postgres::Error> {
    let rows = client
        .query(
            &format!(
                "SELECT DISTINCT n.nspname::text, c.relname::text, u.rel, x.lacks
                 FROM ({}) u JOIN pg_class c ON c.oid = u.seq AND c.relkind = 'S' JOIN pg_namespace n ON n.oid = c.relnamespace
                 CROSS JOIN LATERAL (SELECT ARRAY(SELECT p FROM unnest(ARRAY['SELECT', 'UPDATE']) p
                     WHERE NOT has_sequence_privilege($1::oid, c.oid, p)) AS lacks) x
                 WHERE x.lacks <> '{{}}' AND pg_has_role(c.relowner, 'USAGE') AND n.nspname <> 'anabranch'
                 ORDER BY 1, 2",
                sequence::USES
            ),
            &[&role],
        )
        .await?;
    rows.iter()
        .map(|row| {
            Ok(LackedSequence {
                schema: row.try_get(0)?,
                name: row.try_get(1)?,
                table_oid: row.try_get(2)?,
                lacks: row.try_get(3)?,
            })
        })
        .collect()
}

async fn ours(client: &Client, slot: &str, publication: &str) -> Result<Ours, tokio_postgres::Error> {
    let mut ours = Ours {
        schema: client
            .query_one("SELECT to_regnamespace('anabranch') IS NOT NULL", &[])
            .await?
            .try_get(0)?,
        publication: read_publication(client, publication).await?,
        slot: read_slot(client, slot).await?,
        ..Ours::default()
    };
    let tables = client
        .query(
            "SELECT relname::text, relkind = 'r' AND relname = 'conflict_history' FROM pg_class
             WHERE relnamespace = to_regnamespace('anabranch') AND relkind IN ('r', 'p', 'v')",
            &[],
        )
        .await?;
    for row in tables {
        if row.try_get(1)? {
            ours.plain_history = true;
        } else {
            ours.tables.push(row.try_get(0)?);
        }
    }
    let has = |name: &str| ours.tables.iter().any(|table| table == name);
    if has("node") {
        ours.node = read_node(client).await?;
    }
    if has("progress") {
        let rows = client
            .query("SELECT origin FROM anabranch.progress ORDER BY 1", &[])
            .await?;
        ours.progress = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    }
    if has("clock") {
        let rows = client
            .query("SELECT node_id FROM anabranch.clock ORDER BY 1", &[])
            .await?;
        ours.clock = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    }
    if has("member") {
        let rows = client
            .query("SELECT node_id, fact FROM anabranch.member ORDER BY 1, 2", &[])
            .await?;
        ours.members = rows
            .iter()
            .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
            .collect::<Result<_, tokio_postgres::Error>>()?;
        ours.names = Body::names(&membership::read(client).await?);
    }
    if has("identity_before") {
        let rows = client
            .query(
                "SELECT schema_name, table_name, identity, index_name FROM anabranch.identity_before ORDER BY 1, 2",
                &[],
            )
            .await?;
        ours.identities = rows
            .iter()
            .map(|row| {
                Ok(Before {
                    schema: row.try_get(0)?,
                    name: row.try_get(1)?,
                    identity: row.try_get(2)?,
                    index: row.try_get(3)?,
                })
            })
            .collect::<Result<_, tokio_postgres::Error>>()?;
    }
    if has(REMOVED) {
        let rows = client
            .query("SELECT schema_name, table_name FROM anabranch.removed_table", &[])
            .await?;
        ours.removed = rows
            .iter()
            .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
            .collect::<Result<_, tokio_postgres::Error>>()?;
    }
    if ours.schema {
        let row = client
            .query_one(
                "SELECT obj_description(to_regprocedure('anabranch.snowflake()'), 'pg_proc'),
                        EXISTS (SELECT FROM pg_attribute
                                WHERE attrelid = to_regclass('anabranch.sequence') AND attname = 'method'),
                        EXISTS (SELECT FROM pg_attribute
                                WHERE attrelid = to_regclass('anabranch.ddl') AND attname = 'epoch'),
                        to_regclass('anabranch.' || $1::text) IS NOT NULL,
                        EXISTS (SELECT FROM pg_proc WHERE oid = to_regprocedure('anabranch.conflict_upkeep(timestamptz, interval)')
                                AND 'search_path=pg_catalog, pg_temp' <> ALL (coalesce(proconfig, '{}'))),
                        EXISTS (SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
                                WHERE n.nspname = 'anabranch' AND p.proname = 'conflict_upkeep' AND p.prosrc = $2::text)",
                &[&conflict_log::GROUP_INDEX, &conflict_log::UPKEEP_BODY],
            )
            .await?;
        (ours.snowflake, ours.sequence_method) = (row.try_get(0)?, row.try_get(1)?);
        (ours.ddl_epoch, ours.group_index) = (row.try_get(2)?, row.try_get(3)?);
        (ours.open_upkeep, ours.upkeep_as_made) = (row.try_get(4)?, row.try_get(5)?);
    }
    if has("member") && has("conflict_open") {
        let lacks = "SELECT coalesce((SELECT NOT has_table_privilege(oid, 'anabranch.member', 'SELECT') FROM pg_roles WHERE rolname = $1), false)";
        let row = client.query_one(lacks, &[&conflict_log::REVIEWER]).await?;
        ours.reviewer_lacks = row.try_get(0)?;
    }
    ours.join = client
        .query_one("SELECT to_regnamespace('anabranch_join') IS NOT NULL", &[])
        .await?
        .try_get(0)?;
    ours.ddl = read_ddl(client).await?;
    Ok(ours)
}

async fn read_ddl(client: &Client) -> Result<DdlFacts, tokio_postgres::Error> {
    let rows = client
        .query(
            "SELECT rolname::text, rolsuper FROM pg_roles WHERE rolname !~ '^pg_'",
            &[],
        )
        .await?;
    let roles = rows
        .iter()
        .map(|row| {
            Ok(DdlRole {
                name: row.try_get(0)?,
                superuser: row.try_get(1)?,
            })
        })
        .collect::<Result<_, tokio_postgres::Error>>()?;
    let made_from = client
        .query_one(
            "SELECT obj_description(to_regnamespace($1), 'pg_namespace')",
            &[&ddl::SCHEMA],
        )
        .await?
        .try_get(0)?;
    let triggers = client
        .query(
            "SELECT evtname::text, evtenabled::text FROM pg_event_trigger WHERE evtname = ANY ($1)",
            &[&plain_ddl::TRIGGERS.as_slice()],
        )
        .await?;
    let capture = triggers
        .iter()
        .map(|row| {
            Ok(plain_ddl::Trigger {
                name: row.try_get(0)?,
                enabled: row.try_get::<_, String>(1)?,
            })
        })
        .collect::<Result<_, tokio_postgres::Error>>()?;
    Ok(DdlFacts {
        roles,
        made_from,
        capture,
    })
}

async fn read_node(client: &Client) -> Result<Option<NodeRow>, tokio_postgres::Error> {
    let row = client
        .query_opt(
            "SELECT node_id, name, cluster_id, incarnation::text, system_identifier, slot, publication,
                    slot_start::text, format
             FROM anabranch.node",
            &[],
        )
        .await?;
    row.map(|row| {
        Ok(NodeRow {
            node_id: row.try_get(0)?,
            name: row.try_get(1)?,
            cluster_id: row.try_get(2)?,
            incarnation: row.try_get(3)?,
            system_identifier: row.try_get(4)?,
            slot: row.try_get(5)?,
            publication: row.try_get(6)?,
            slot_start: row.try_get(7)?,
            format: row.try_get(8)?,
        })
    })
    .transpose()
}

async fn read_publication(client: &Client, name: &str) -> Result<Option<Publication>, tokio_postgres::Error> {
    let row = client
        .query_opt(
            // pubgencols exists from 18 on, hence the way through jsonb.
            "SELECT ARRAY(SELECT prrelid FROM pg_publication_rel WHERE prpubid = p.oid),
                    ARRAY(SELECT prrelid::regclass::text FROM pg_publication_rel
                          WHERE prpubid = p.oid AND (prattrs IS NOT NULL OR prqual IS NOT NULL)),
                    puballtables OR EXISTS (SELECT FROM pg_publication_namespace WHERE pnpubid = p.oid),
                    pubviaroot, pubinsert AND pubupdate AND pubdelete AND pubtruncate,
                    coalesce(to_jsonb(p) ->> 'pubgencols' = 's', false),
                    ARRAY(SELECT c.relname::text FROM pg_publication_rel r JOIN pg_class c ON c.oid = r.prrelid
                          WHERE r.prpubid = p.oid AND c.relnamespace = to_regnamespace('anabranch'))
             FROM pg_publication p WHERE pubname = $1",
            &[&name],
        )
        .await?;
    row.map(|row| {
        Ok(Publication {
            tables: row.try_get(0)?,
            filtered: row.try_get(1)?,
            open_ended: row.try_get(2)?,
            via_root: row.try_get(3)?,
            all_operations: row.try_get(4)?,
            generated_stored: row.try_get(5)?,
            own: row.try_get(6)?,
        })
    })
    .transpose()
}

async fn read_slot(client: &Client, name: &str) -> Result<Option<Slot>, tokio_postgres::Error> {
    let row = client
        .query_opt(
            "SELECT coalesce(plugin, '')::text, coalesce(database, '')::text, active_pid,
                    coalesce(wal_status, 'unknown'),
                    coalesce(pg_current_wal_lsn() - restart_lsn, 0)::bigint, confirmed_flush_lsn::text
             FROM pg_replication_slots WHERE slot_name = $1",
            &[&name],
        )
        .await?;
    row.map(|row| {
        Ok(Slot {
            plugin: row.try_get(0)?,
            database: row.try_get(1)?,
            active_pid: row.try_get(2)?,
            wal_status: row.try_get(3)?,
            retained_bytes: row.try_get(4)?,
            confirmed_flush: row.try_get(5)?,
        })
    })
    .transpose()
}
