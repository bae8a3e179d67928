//! Giving a join up: nothing of it stays.

use tokio_postgres::Client;

use super::{Error, Options, Report, connect_admin, identity, io, say, sql, state};
use crate::config::Config;
use crate::link::{JoinError, JoinStep, Joining};
use crate::setup::sql::ident;

/// Everything that a dump makes; the schemas' own extensions stay.
const CLEAR: &str = r"
DO $$
DECLARE
    name record;
BEGIN
    FOR name IN
        SELECT nspname FROM pg_namespace n
        WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'anabranch', 'anabranch_join', 'public')
          AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_namespace'::regclass AND d.objid = n.oid AND d.deptype = 'e')
    LOOP
        EXECUTE format('DROP SCHEMA %I CASCADE', name.nspname);
    END LOOP;
    FOR name IN
        SELECT c.relname, CASE c.relkind WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW' WHEN 'S' THEN 'SEQUENCE'
                                         WHEN 'f' THEN 'FOREIGN TABLE' ELSE 'TABLE' END AS kind
        FROM pg_class c
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
          -- (The columns of a partition key depend on their table so, too.)
          AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.objsubid = 0 AND d.deptype IN ('e', 'i'))
    LOOP
        EXECUTE format('DROP %s IF EXISTS public.%I CASCADE', name.kind, name.relname);
    END LOOP;
    FOR name IN
        SELECT p.oid::regprocedure AS signature FROM pg_proc p
        WHERE p.pronamespace = 'public'::regnamespace
          AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e')
    LOOP
        EXECUTE format('DROP ROUTINE IF EXISTS %s CASCADE', name.signature);
    END LOOP;
    FOR name IN
        SELECT t.typname FROM pg_type t
        WHERE t.typnamespace = 'public'::regnamespace AND t.typtype IN ('e', 'd', 'c', 'r') AND t.typrelid = 0
          AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e')
        UNION ALL
        SELECT c.relname FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'c'
          AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
    LOOP
        EXECUTE format('DROP TYPE IF EXISTS public.%I CASCADE', name.typname);
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
        .batch_execute(&format!(
            "SET search_path = pg_catalog; DROP SCHEMA IF EXISTS anabranch CASCADE; {CLEAR}"
        ))
        .await
        .map_err(sql("empty the database"))
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
            "no unfinished join is found in this database; a node that has joined is taken out with `anabranch node drop`"
                .to_owned(),
        ));
    }
    let state = state::State::open(config)?;
    say(report, "tell the donor");
    let mut tries = 0;
    loop {
        let asked = match Joining::connect(config, &options.donor, &identity(config, &state)?).await {
            Ok(mut donor) => donor.ask(JoinStep::Abandon).await,
            Err(error) => Err(error),
        };
        match asked {
            Ok(_) => break,
            // Its daemon may be beginning anew with us at this moment.
            Err(JoinError::Call { .. } | JoinError::Link(_)) if tries < 20 => tries += 1,
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
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
