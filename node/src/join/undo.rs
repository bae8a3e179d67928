//! Giving a join up: nothing of it stays.

use anabranch_proto::NodeId;
use tokio_postgres::Client;

use super::{Error, Options, Report, connect_admin, identity, io, say, sql, state, waiting};
use crate::config::{self, Config};
use crate::donor::UNKNOWN_JOIN;
use crate::link::{Identity, JoinError, JoinStep, Joining};
use crate::membership::{self, Membership};
use crate::pg::SEARCH_PATH;
use crate::policy_change::Body;
use crate::setup::sql::ident;

/// What is in a database and would be made by a dump, by its place in the catalogs, in an order to drop it in: event triggers first,
/// which could forbid the rest. Not what is an extension's, what goes with something else, and what is our own. Schema `public` stays,
/// but not what is in it.
macro_rules! own {
    () => {
        "SELECT o.classid, o.objid
         FROM (
             SELECT 1 AS place, 'pg_event_trigger'::regclass::oid AS classid, oid AS objid FROM pg_event_trigger
             UNION ALL
             SELECT 2, 'pg_namespace'::regclass::oid, oid FROM pg_namespace
             WHERE nspname !~ '^pg_'
               AND nspname NOT IN ('information_schema', 'public', 'anabranch', 'anabranch_ddl', 'anabranch_join')
             UNION ALL
             SELECT DISTINCT 3, d.classid, d.objid
             FROM pg_depend d JOIN pg_namespace n ON d.refclassid = 'pg_namespace'::regclass AND d.refobjid = n.oid
             WHERE d.objsubid = 0 AND d.deptype = 'n'
               -- (Not what only names a schema, such as a default of type regnamespace, or an extension.)
               AND d.classid IN (
                   'pg_class'::regclass, 'pg_proc'::regclass, 'pg_type'::regclass, 'pg_operator'::regclass, 'pg_opclass'::regclass,
                   'pg_opfamily'::regclass, 'pg_collation'::regclass, 'pg_conversion'::regclass, 'pg_statistic_ext'::regclass,
                   'pg_ts_config'::regclass, 'pg_ts_dict'::regclass, 'pg_ts_parser'::regclass, 'pg_ts_template'::regclass)
               AND n.nspname !~ '^pg_'
               AND n.nspname NOT IN ('information_schema', 'anabranch', 'anabranch_ddl', 'anabranch_join')
             UNION ALL
             SELECT 4, 'pg_foreign_server'::regclass::oid, oid FROM pg_foreign_server
             UNION ALL
             SELECT 5, 'pg_foreign_data_wrapper'::regclass::oid, oid FROM pg_foreign_data_wrapper
             -- (Those below 16384 come with the server.)
             UNION ALL
             SELECT 6, 'pg_cast'::regclass::oid, oid FROM pg_cast WHERE oid >= 16384
             UNION ALL
             SELECT 6, 'pg_transform'::regclass::oid, oid FROM pg_transform WHERE oid >= 16384
             UNION ALL
             SELECT 7, 'pg_am'::regclass::oid, oid FROM pg_am WHERE oid >= 16384
             UNION ALL
             SELECT 7, 'pg_language'::regclass::oid, oid FROM pg_language WHERE oid >= 16384
         ) o
         WHERE NOT EXISTS (
             SELECT FROM pg_depend d
             WHERE d.classid = o.classid AND d.objid = o.objid AND d.objsubid = 0 AND d.deptype IN ('e', 'i'))
         ORDER BY o.place"
    };
}

/// What keeps a database from being empty, in words: all of it is dropped when a join has to begin anew.
pub(super) const OWN: &str = concat!(
    "SELECT pg_describe_object(own.classid, own.objid, 0) FROM (",
    own!(),
    ") own ORDER BY 1"
);

/// (What has gone along with something before has no identity any more. A procedure needs the modes of its arguments: without them
/// those of OUT arguments alone can be meant as well as others. Only collation C gives the words of a kind their capitals in every database.)
const CLEAR: &str = concat!(
    "
DO $$
DECLARE
    own record;
    it record;
BEGIN
    FOR own IN ",
    own!(),
    " LOOP
        SELECT CASE type WHEN 'aggregate' THEN 'ROUTINE'
                         WHEN 'statistics object' THEN 'STATISTICS' WHEN 'foreign-data wrapper' THEN 'FOREIGN DATA WRAPPER'
                         ELSE upper(type COLLATE \"C\") END AS kind,
               CASE type WHEN 'transform' THEN replace(identity, ' on language ', ' language ')
                         WHEN 'procedure' THEN (
                             SELECT format('%I.%I(%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid))
                             FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE p.oid = own.objid)
                         ELSE identity END AS identity
        INTO it FROM pg_identify_object(own.classid, own.objid, 0);
        IF it.identity IS NOT NULL THEN
            EXECUTE format('DROP %s %s CASCADE', it.kind, it.identity);
        END IF;
    END LOOP;
END $$"
);

/// Extensions and default privileges that were not there when the join began (of one that an older release has begun that is not known). Default
/// privileges cannot be dropped: they are gone when they are what the server has without them, for all schemas all of the owner's, and some
/// of everybody's; in one schema none.
const CLEAR_MORE: &str = "
DO $$
DECLARE
    it record;
    place text;
    kind text;
    grantee text;
BEGIN
    IF to_regclass('anabranch_join.was_there') IS NULL THEN
        RETURN;
    END IF;
    FOR it IN
        SELECT extname FROM pg_extension e
        WHERE NOT EXISTS (SELECT FROM anabranch_join.was_there w WHERE (w.classid, w.objid) = (e.tableoid, e.oid))
    LOOP
        EXECUTE format('DROP EXTENSION IF EXISTS %I CASCADE', it.extname);
    END LOOP;
    FOR it IN
        SELECT d.defaclrole::regrole::text AS role, n.nspname, d.defaclobjtype::text AS type, d.defaclacl
        FROM pg_default_acl d LEFT JOIN pg_namespace n ON n.oid = d.defaclnamespace
        WHERE NOT EXISTS (SELECT FROM anabranch_join.was_there w WHERE (w.classid, w.objid) = (d.tableoid, d.oid))
    LOOP
        place := format('ALTER DEFAULT PRIVILEGES FOR ROLE %s', it.role);
        IF it.nspname IS NOT NULL THEN
            place := place || format(' IN SCHEMA %I', it.nspname);
        END IF;
        kind := CASE it.type WHEN 'r' THEN 'TABLES' WHEN 'S' THEN 'SEQUENCES' WHEN 'f' THEN 'FUNCTIONS' WHEN 'T' THEN 'TYPES'
                             WHEN 'n' THEN 'SCHEMAS' WHEN 'L' THEN 'LARGE OBJECTS' END;
        FOR grantee IN
            SELECT DISTINCT CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE g.grantee::regrole::text END FROM aclexplode(it.defaclacl) g
        LOOP
            EXECUTE format('%s REVOKE ALL ON %s FROM %s', place, kind, grantee);
        END LOOP;
        IF it.nspname IS NULL THEN
            EXECUTE format('%s GRANT ALL ON %s TO %s', place, kind, it.role);
            IF it.type IN ('f', 'T') THEN
                EXECUTE format('%s GRANT ALL ON %s TO PUBLIC', place, kind);
            END IF;
        END IF;
    END LOOP;
END $$";

/// Empties a database that was empty when the join began.
pub(super) async fn clear(admin: &Client) -> Result<(), Error> {
    let slots = admin
        .query(
            "SELECT slot_name::text FROM pg_replication_slots s JOIN anabranch.node n ON s.slot_name = n.slot
             WHERE NOT s.active AND s.database = current_database()",
            &[],
        )
        .await
        .unwrap_or_default();
    for row in slots {
        let name: String = row.try_get(0).map_err(sql("find the slot"))?;
        admin
            .execute("SELECT pg_drop_replication_slot($1)", &[&name])
            .await
            .map_err(sql("drop the slot"))?;
    }
    admin
        .batch_execute(&format!("SET search_path = {SEARCH_PATH}; {CLEAR}; {CLEAR_MORE}"))
        .await
        .map_err(sql("empty the database"))?;
    let publications = admin
        .query("SELECT publication FROM anabranch.node", &[])
        .await
        .unwrap_or_default();
    for row in publications {
        let name: String = row.try_get(0).map_err(sql("find the publication"))?;
        admin
            .batch_execute(&format!("DROP PUBLICATION IF EXISTS {}", ident(&name)))
            .await
            .map_err(sql("drop the publication"))?;
    }
    admin
        .batch_execute("DROP SCHEMA IF EXISTS anabranch, anabranch_ddl CASCADE")
        .await
        .map_err(sql("empty the database"))
}

/// Has the members forget this node. One that knows of it is enough: it says so in its stream, and the others hear it. Where the one that is
/// asked does not, those that were asked to take this node in are asked, too: each of them may have said that it is a member, where the
/// others cannot hear it yet. Then everybody would keep journals for a node that there is not.
async fn tell(
    config: &Config,
    options: &Options,
    (state, members): (&state::State, &Membership),
    identity: &Identity,
    report: &Report,
) -> Result<(), Error> {
    say(report, "tell the donor");
    if is_forgotten(config, &options.donor, identity).await? {
        return Ok(());
    }
    let mut silent = Vec::new();
    let dropped = members.dropped();
    for id in state.asked.iter().copied().map(NodeId) {
        // (Of a member that was dropped all that there is has arrived.)
        if id == options.donor.id || dropped.contains_key(&id) {
            continue;
        }
        let peer = config.peers.iter().find(|peer| peer.id == id).cloned();
        let peer = peer.or_else(|| {
            members
                .peers(config.node.id, &[])
                .into_iter()
                .find(|peer| peer.id == id)
        });
        let Some(peer) = peer else {
            silent.push(format!(
                "node {id}, which `peers` of the configuration does not name"
            ));
            continue;
        };
        say(
            report,
            &format!(
                "`{}` does not know of this join: ask `{}`",
                options.donor.name, peer.name
            ),
        );
        match is_forgotten(config, &peer, identity).await {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => silent.push(format!("`{}` ({error})", peer.name)),
        }
    }
    if silent.is_empty() {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "nothing is given up: `{}` does not know of this join, and it was begun through {}, too, which may know of it and cannot be asked. Once \
         the others hear of it, all would wait for a node that there is not. Run this again when it answers; if it is lost for good, run \
         `anabranch node drop` for it at another member first",
        options.donor.name,
        silent.join(" and ")
    )))
}

/// Has a member said that this node is none? It may not know that it ever was.
async fn is_forgotten(config: &Config, member: &config::Peer, identity: &Identity) -> Result<bool, Error> {
    let mut tries = 0;
    loop {
        let asked = match Joining::connect(config, member, identity).await {
            Ok(mut member) => member.ask(JoinStep::Abandon).await,
            Err(error) => Err(error),
        };
        match asked {
            Ok(_) => return Ok(true),
            Err(refused) if refused.refusal_code() == Some(UNKNOWN_JOIN) => return Ok(false),
            // Its daemon may be beginning anew with us at this moment.
            Err(JoinError::Call { .. } | JoinError::Link(_)) if tries < 20 => tries += 1,
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
}

/// Without `join.json` nobody knows whether this was the attempt that a member of its name came from: the members would not believe it, and wait
/// for it for ever.
fn refuse_unknown_attempt(config: &Config, members: &Membership) -> Result<(), Error> {
    let id = config.node.id;
    let is_joining = members.live().contains(&id) && !members.ready().contains(&id);
    match members.entry(id) {
        Some(fact) if is_joining && fact.name == config.node.name => Err(Error::Refused(format!(
            "nothing is given up: there is no join.json in node.data_dir, which tells this join from others, and `{}` (id {id}) is one of \
             the members, who wait for it. Put the file back; or, if no other database joins under that name, run `anabranch node drop {}` at a \
             member, then this again",
            fact.name, fact.name
        ))),
        _ => Ok(()),
    }
}

/// Gives an unfinished join up: at the donor, in the database, in the daemon's folder.
///
/// # Errors
/// When the donor or the database cannot be asked; what is done stays done.
pub async fn abandon(config: &Config, options: &Options, report: &Report) -> Result<(), Error> {
    let admin = connect_admin(&options.admin_dsn, "join").await?;
    let row = admin
        .query_one("SELECT to_regnamespace('anabranch_join') IS NOT NULL", &[])
        .await
        .map_err(sql("look for an unfinished join"))?;
    let unfinished: bool = row.try_get(0).map_err(sql("look for an unfinished join"))?;
    if !unfinished {
        return Err(Error::Refused(
            "no unfinished join is found in this database; a node that has joined is taken out with `anabranch leave`, or where it is lost \
             with `anabranch node drop` at another member"
                .to_owned(),
        ));
    }
    let begun = state::State::begun(config)?;
    let foreign = state::foreign_node(&admin, begun.as_ref()).await;
    if let Some(found) = foreign.map_err(sql("look whose database it is"))? {
        return Err(Error::Refused(format!(
            "nothing is given up: this database {found}; {}",
            state::FOREIGN_NODE
        )));
    }
    let members = async {
        let options = options.settled().await?;
        let donor = waiting::connect_donor(&options.donor_dsn).await?;
        membership::read(&donor)
            .await
            .map_err(sql("read the donor's members"))
    };
    // A donor whose server is away may answer all the same: then `peers` must have the names.
    let members = members.await.unwrap_or_default();
    if begun.is_none() {
        refuse_unknown_attempt(config, &members)?;
    }
    let state = state::State::open(config)?;
    let (_, identity) = identity(config, &state, &Body::names(&members))?;
    tell(config, options, (&state, &members), &identity, report).await?;
    say(report, "empty the database");
    clear(&admin).await?;
    admin
        .batch_execute(
            "DROP SCHEMA IF EXISTS anabranch_join CASCADE;
             DO $$ BEGIN
                 EXECUTE format('ALTER DATABASE %I RESET default_transaction_read_only', current_database());
             END $$",
        )
        .await
        .map_err(sql("open the database again"))?;
    let dir = &config.node.data_dir;
    for name in ["journal", "index"] {
        match std::fs::remove_dir_all(dir.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(io(format!("remove {name} in node.data_dir"))(error));
            }
            _ => {}
        }
    }
    for name in ["checkpoint.json", "settled.json", "policy.txt"] {
        let _ = std::fs::remove_file(dir.join(name));
    }
    state.remove()
}

#[cfg(test)]
mod tests {
    use anabranch_proto::Position;

    use super::*;
    use crate::membership::{Fact, FactKind};

    #[test]
    fn a_join_without_its_file_is_not_given_up_while_the_members_wait_for_a_node_of_its_name() {
        let config = Config::example();
        let fact = |kind, name: &str| Fact {
            node: config.node.id,
            kind,
            name: name.to_owned(),
            address: String::new(),
            incarnation: String::new(),
            position: Position::ZERO,
            by: NodeId(9),
        };
        let refused = |members: &Membership| refuse_unknown_attempt(&config, members).is_err();
        let mut members = Membership::default();
        assert!(!refused(&members));
        members.add(fact(FactKind::Joined, &config.node.name));
        assert!(refused(&members));
        let another: Membership = [fact(FactKind::Joined, "another")].into_iter().collect();
        assert!(!refused(&another));
        members.add(fact(FactKind::Dropped, &config.node.name));
        assert!(!refused(&members));
    }
}
