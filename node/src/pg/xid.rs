//! Transaction ids, of which decoding and rows tell the lower half.
//!
//! In:   32 bits of an id      Out: SQL that asks about the transaction
//! Not here: whose transactions these are

/// A snapshot `x.s`, of now, and its end `x.max`: in what follows [`visible`].
pub const SNAPSHOT: &str =
    "(SELECT s, pg_snapshot_xmax(s)::text::int8 AS max FROM pg_current_snapshot() AS s) AS x";

/// SQL: has the transaction with this id (a `bigint`, of 32 bits) ended before snapshot `x.s`?
///
/// Of all ids with these lower bits it is the one that is next to the snapshot's end, on either side: one that runs may be
/// above the end, when nothing above it has ended yet.
#[must_use]
pub fn visible(xid: &str) -> String {
    format!(
        "pg_visible_in_snapshot((x.max + ((({xid} - x.max) & 4294967295) # 2147483648) - 2147483648)::text::xid8, x.s)"
    )
}

/// SQL: those of the transactions in `$1` (`bigint[]`) that are not visible yet.
#[must_use]
pub fn hidden() -> String {
    format!(
        "SELECT xid FROM unnest($1::int8[]) AS xid, {SNAPSHOT} WHERE NOT {}",
        visible("xid")
    )
}
