//! What a database has applied, as its `anabranch.progress` says.

use anabranch_proto::stamp::STAMP_LEN;
use anabranch_proto::{NodeId, Position, Stamp, Vector};
use tokio_postgres::Client;

/// What a database has applied of others than `own`, whose it is, and the highest stamp among that.
///
/// # Errors
/// When the table cannot be read.
pub(crate) async fn read(client: &Client, own: NodeId) -> Result<(Vector, Stamp), tokio_postgres::Error> {
    const SQL: &str =
        "SELECT origin, epoch, (lsn - '0/0')::int8, stamp FROM anabranch.progress WHERE lsn > '0/0'";
    let (mut vector, mut highest) = (Vector::new(), Stamp::ZERO);
    for row in client.query(SQL, &[]).await? {
        let (origin, epoch, lsn): (i32, i64, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let stamp: Vec<u8> = row.try_get(3)?;
        if let (Ok(origin), Ok(epoch), Ok(lsn)) =
            (u16::try_from(origin), u32::try_from(epoch), u64::try_from(lsn))
            && NodeId(origin) != own
        {
            vector.raise(NodeId(origin), Position::new(epoch, lsn));
            if let Ok(stamp) = <[u8; STAMP_LEN]>::try_from(stamp) {
                highest = highest.max(Stamp::from_bytes(stamp));
            }
        }
    }
    Ok((vector, highest))
}
