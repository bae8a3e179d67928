//! What an apply transaction says first: how far it brings each origin, in `anabranch.progress`.
//!
//! In:   its transactions' headers      Out: the statement, and the transaction's xid from the answer
//! Invariants: 1. a transaction whose first statement wrote no row is never committed: the decoder would take it for a user's; 2. no
//!        row that policies hide from the daemon's role is read or written behind that statement: the server refuses it
//! Not here: what else the transaction writes

use anabranch_proto::stamp::Stamp;
use anabranch_proto::{NodeId, Position};
use tokio_postgres::types::{PgLsn, ToSql};
use tokio_postgres::{Row, Statement};

use super::Work;
use crate::apply::failure::Failure;
use crate::apply::session::{BEGIN, Session};
use crate::pg::xid::Snapshot;

/// What the statement answers: the transaction's xid, and, last, what was visible then. And it puts `row_security` right for what
/// follows in the transaction, where the role has lost BYPASSRLS since the session began, or got it (`pg::ROW_SECURITY_OF_OTHERS`):
/// rows that nobody shows us any more would pass for rows that are gone.
macro_rules! answer {
    () => {
        " RETURNING (pg_current_xact_id()::text::int8 & 4294967295), \
         (SELECT set_config('row_security', r.wanted, true) FROM (SELECT CASE WHEN rolsuper OR rolbypassrls THEN 'on' ELSE 'off' END \
             AS wanted FROM pg_roles WHERE rolname = current_user) r WHERE r.wanted <> current_setting('row_security')), \
         pg_current_snapshot()::text"
    };
}

const OF_SEVERAL: &str = concat!(
    "INSERT INTO anabranch.progress AS p (origin, epoch, lsn, stamp) \
     SELECT v.o, v.e, v.l, v.s FROM unnest($1::int4[], $2::int8[], $3::pg_lsn[], $4::bytea[]) AS v(o, e, l, s) \
     ON CONFLICT (origin) DO UPDATE SET epoch = excluded.epoch, lsn = excluded.lsn, stamp = excluded.stamp",
    answer!()
);
/// The same for one origin whose row is there: half of the work, and the whole is much of what a small transaction costs.
const OF_ONE: &str = concat!(
    "UPDATE anabranch.progress SET epoch = $2, lsn = $3, stamp = $4 WHERE origin = $1",
    answer!()
);

/// What the table will say: a row an origin.
pub(super) struct Reached {
    origins: Vec<i32>,
    epochs: Vec<i64>,
    lsns: Vec<PgLsn>,
    stamps: Vec<Vec<u8>>,
    sql: &'static str,
}

impl Reached {
    /// The parameters of its statement.
    pub(super) fn params(&self) -> Vec<&(dyn ToSql + Sync)> {
        if let ([origin], [epoch], [lsn], [stamp]) = (
            self.origins.as_slice(),
            self.epochs.as_slice(),
            self.lsns.as_slice(),
            self.stamps.as_slice(),
        ) && self.sql == OF_ONE
        {
            return vec![origin, epoch, lsn, stamp];
        }
        vec![&self.origins, &self.epochs, &self.lsns, &self.stamps]
    }

    /// Its statement, if it is prepared.
    pub(super) fn prepared(&self, session: &Session) -> Option<Statement> {
        session.prepared(self.sql)
    }
}

impl Work {
    /// Begins the transaction: progress first, which names it as the daemon's own. Gives its xid, 32 bits.
    pub(crate) async fn begin(&self, session: &mut Session, node: NodeId) -> Result<u32, Failure> {
        let reached = self.reached(session, node);
        let statement = session.prepare(reached.sql).await?;
        let params = reached.params();
        let (begun, progress) = tokio::join!(
            session.client.batch_execute(BEGIN),
            session.client.query(&statement, &params)
        );
        begun?;
        xid_of(&progress?, session)
    }

    /// What `anabranch.progress` will say.
    pub(super) fn reached(&self, session: &Session, node: NodeId) -> Reached {
        let mut rows: Vec<(NodeId, Position, Stamp)> = Vec::new();
        for header in &self.headers {
            match rows.iter_mut().find(|row| row.0 == header.origin()) {
                Some(row) => *row = (row.0, header.position, header.stamp.max(row.2)),
                None => rows.push((header.origin(), header.position, header.stamp)),
            }
        }
        if rows.is_empty() {
            rows.push((node, Position::ZERO, Stamp::ZERO));
        }
        let sql = match rows.as_slice() {
            [(origin, ..)] if session.has_progress(*origin) => OF_ONE,
            _ => OF_SEVERAL,
        };
        Reached {
            origins: rows.iter().map(|row| i32::from(row.0.0)).collect(),
            epochs: rows.iter().map(|row| i64::from(row.1.epoch)).collect(),
            lsns: rows.iter().map(|row| PgLsn::from(row.1.lsn.0)).collect(),
            stamps: rows.iter().map(|row| row.2.to_bytes().to_vec()).collect(),
            sql,
        }
    }
}

/// What the statement answers. No answer: the row that was there is gone, and nothing says whose the transaction is.
pub(super) fn xid_of(rows: &[Row], session: &mut Session) -> Result<u32, Failure> {
    let Some(row) = rows.first() else {
        session.forget_progress();
        return Err(Failure::Raced);
    };
    let xid: i64 = row.try_get(0)?;
    session.snapshot = Snapshot::parse(row.try_get(2)?);
    Ok(u32::try_from(xid).unwrap_or(0))
}
