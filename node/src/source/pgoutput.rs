//! Reads pgoutput messages (PostgreSQL docs, "Logical Replication Message Formats"), protocol 1 to 4 without
//! streaming.
//!
//! In:   one frame's bytes            Out: a [`Message`] whose tuples are slices of them
//! Holds: nothing
//! Invariants: any bytes give a message or an error, never a panic
//! Not here: what a relation id stands for (`relation`)

use anabranch_proto::Lsn;
use anabranch_proto::row::RowImage;
use anabranch_proto::wire::{Malformed, Reader};
use bytes::Bytes;

use super::walsender::POSTGRES_EPOCH_US;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A transaction begins.
    Begin {
        /// Start of the commit record.
        commit_start: Lsn,
        /// Commit time, microseconds since the Unix epoch.
        commit_us: i64,
        /// Top-level transaction id.
        xid: u32,
    },
    /// A transaction ends.
    Commit {
        /// Start of the commit record.
        commit_start: Lsn,
        /// End of the commit record.
        commit_end: Lsn,
        /// Commit time, microseconds since the Unix epoch.
        commit_us: i64,
    },
    /// The transaction was replicated from elsewhere.
    Origin,
    /// A table, described before its first change.
    Relation(Relation),
    /// A type, described before its first table.
    Type {
        /// Its OID.
        oid: u32,
        /// Schema of its base type.
        schema: String,
        /// Name of its base type.
        name: String,
    },
    /// A new row.
    Insert {
        /// Table OID.
        relation: u32,
        /// The row.
        new: Tuple,
    },
    /// A changed row.
    Update {
        /// Table OID.
        relation: u32,
        /// What it was, as far as the replica identity tells.
        old: Option<OldTuple>,
        /// What it is.
        new: Tuple,
    },
    /// A row that is gone.
    Delete {
        /// Table OID.
        relation: u32,
        /// What it was, as far as the replica identity tells.
        old: OldTuple,
    },
    /// Emptied tables.
    Truncate {
        /// Table OIDs.
        relations: Vec<u32>,
        /// CASCADE
        cascade: bool,
        /// RESTART IDENTITY
        restart_identity: bool,
    },
    /// `pg_logical_emit_message`.
    Logical {
        /// Belongs to the transaction around it.
        transactional: bool,
        /// Where it was written.
        lsn: Lsn,
        /// Prefix.
        prefix: String,
        /// Content.
        content: Bytes,
    },
    /// Something that was not asked for (streaming, two-phase commit).
    Unasked(u8),
}

/// A table, as of the transaction around it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    /// Table OID.
    pub oid: u32,
    /// Schema name.
    pub schema: String,
    /// Table name.
    pub name: String,
    /// `pg_class.relreplident`
    pub identity: u8,
    /// Published columns.
    pub columns: Vec<RelationColumn>,
}

/// A published column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelationColumn {
    /// Part of the replica identity.
    pub identity: bool,
    /// Name.
    pub name: String,
    /// Type OID.
    pub type_oid: u32,
    /// Type modifier, -1 for none.
    pub type_mod: i32,
}

/// A row, `TupleData`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tuple {
    /// Its image, of as many columns as came: how many there should be is not known here.
    pub image: RowImage,
    /// It lacks a value that is stored out of line and was not touched.
    pub has_unchanged: bool,
}

/// The former row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OldTuple {
    /// Only the replica identity's columns have values; all others read NULL.
    Key(Tuple),
    /// The whole row.
    Full(Tuple),
}

impl Message {
    /// Reads one frame.
    ///
    /// # Errors
    /// When it is not a pgoutput message.
    pub fn parse(frame: &Bytes) -> Result<Self, Malformed> {
        let mut from = Reader::new(frame);
        let message = match from.u8()? {
            b'B' => Self::Begin {
                commit_start: Lsn(from.u64()?),
                commit_us: unix_us(&mut from)?,
                xid: from.u32()?,
            },
            b'C' => {
                from.u8()?;
                Self::Commit {
                    commit_start: Lsn(from.u64()?),
                    commit_end: Lsn(from.u64()?),
                    commit_us: unix_us(&mut from)?,
                }
            }
            b'O' => {
                from.u64()?;
                c_string(&mut from)?;
                Self::Origin
            }
            b'R' => Self::Relation(relation(&mut from)?),
            b'Y' => Self::Type {
                oid: from.u32()?,
                schema: namespace(&mut from)?,
                name: c_string(&mut from)?,
            },
            b'I' => {
                let relation = from.u32()?;
                new_mark(&mut from)?;
                Self::Insert {
                    relation,
                    new: tuple(frame, &mut from)?,
                }
            }
            b'U' => {
                let relation = from.u32()?;
                let old = match from.rest().first() {
                    Some(b'N') => None,
                    _ => Some(old_tuple(frame, &mut from)?),
                };
                new_mark(&mut from)?;
                Self::Update {
                    relation,
                    old,
                    new: tuple(frame, &mut from)?,
                }
            }
            b'D' => Self::Delete {
                relation: from.u32()?,
                old: old_tuple(frame, &mut from)?,
            },
            b'T' => truncate(&mut from)?,
            b'M' => {
                let (flags, lsn) = (from.u8()?, Lsn(from.u64()?));
                let prefix = c_string(&mut from)?;
                let content = frame.slice_ref(from.bytes()?);
                Self::Logical {
                    transactional: flags & 1 != 0,
                    lsn,
                    prefix,
                    content,
                }
            }
            tag => return Ok(Self::Unasked(tag)),
        };
        from.done()?;
        Ok(message)
    }
}

fn unix_us(from: &mut Reader<'_>) -> Result<i64, Malformed> {
    Ok(from.i64()?.saturating_add(POSTGRES_EPOCH_US))
}

fn c_string(from: &mut Reader<'_>) -> Result<String, Malformed> {
    let rest = from.rest();
    let len = rest
        .iter()
        .position(|&byte| byte == 0)
        .ok_or(Malformed("a string without an end"))?;
    let text = from.take(len)?;
    from.u8()?;
    std::str::from_utf8(text)
        .map(str::to_owned)
        .map_err(|_| Malformed("text that is not UTF-8"))
}

/// A schema name; pgoutput writes `pg_catalog` as the empty string.
fn namespace(from: &mut Reader<'_>) -> Result<String, Malformed> {
    let name = c_string(from)?;
    Ok(if name.is_empty() {
        "pg_catalog".to_owned()
    } else {
        name
    })
}

fn relation(from: &mut Reader<'_>) -> Result<Relation, Malformed> {
    let (oid, schema, name) = (from.u32()?, namespace(from)?, c_string(from)?);
    let (identity, count) = (from.u8()?, from.u16()?);
    let mut columns = Vec::with_capacity(usize::from(count).min(1_600));
    for _ in 0..count {
        columns.push(RelationColumn {
            identity: from.u8()? & 1 != 0,
            name: c_string(from)?,
            type_oid: from.u32()?,
            type_mod: from.i32()?,
        });
    }
    Ok(Relation {
        oid,
        schema,
        name,
        identity,
        columns,
    })
}

fn truncate(from: &mut Reader<'_>) -> Result<Message, Malformed> {
    let (count, flags) = (from.u32()?, from.u8()?);
    let mut relations = Vec::new();
    for _ in 0..count {
        relations.push(from.u32()?);
    }
    Ok(Message::Truncate {
        relations,
        cascade: flags & 1 != 0,
        restart_identity: flags & 2 != 0,
    })
}

fn new_mark(from: &mut Reader<'_>) -> Result<(), Malformed> {
    match from.u8()? {
        b'N' => Ok(()),
        _ => Err(Malformed("a change without its new row")),
    }
}

fn old_tuple(frame: &Bytes, from: &mut Reader<'_>) -> Result<OldTuple, Malformed> {
    match from.u8()? {
        b'K' => Ok(OldTuple::Key(tuple(frame, from)?)),
        b'O' => Ok(OldTuple::Full(tuple(frame, from)?)),
        _ => Err(Malformed("a former row of unknown kind")),
    }
}

fn tuple(frame: &Bytes, from: &mut Reader<'_>) -> Result<Tuple, Malformed> {
    let (image, has_unchanged) = RowImage::read(frame, from)?;
    Ok(Tuple { image, has_unchanged })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What PostgreSQL 15.18 sent (protocol 3, binary, messages) for a replicated transaction on
    /// `t (id int PRIMARY KEY, v text STORAGE EXTERNAL, m mood)`.
    const CAPTURED: [&str; 11] = [
        "42000000000152d230000303fb9249e584000002d9",
        "4f00000000000000006f00",
        "59000040017075626c6963006d6f6f6400",
        "52000040037075626c69630074006400030169640000000017ffffffff00760000000019ffffffff006d0000004001ffffffff",
        "49000040034e00036200000004000000026200000002c3a96200000003736164",
        "55000040034e0003620000000400000001756200000003736164",
        "55000040034b00036200000004000000026e6e4e00036200000004000000036200000002c3a96200000003736164",
        "44000040034b00036200000004000000036e6e",
        "4d01000000000152c6a07072650000000004626f6479",
        "54000000010200004003",
        "4300000000000152d230000000000152d3b0000303fb9249e584",
    ];

    fn captured(at: usize) -> Bytes {
        Bytes::from(hex::decode(CAPTURED[at]).unwrap())
    }

    fn tuple_of(frame: &Bytes, range: std::ops::Range<usize>, has_unchanged: bool) -> Tuple {
        Tuple {
            image: RowImage::parse(frame.slice(range), 3).unwrap(),
            has_unchanged,
        }
    }

    #[test]
    fn a_captured_transaction_reads_as_what_was_done() {
        let commit_us = 0x0003_03fb_9249_e584 + POSTGRES_EPOCH_US;
        let (start, end) = (Lsn(0x0152_d230), Lsn(0x0152_d3b0));
        let column = |identity, name: &str, type_oid| RelationColumn {
            identity,
            name: name.to_owned(),
            type_oid,
            type_mod: -1,
        };
        let frames = (0..CAPTURED.len()).map(captured).collect::<Vec<_>>();
        let wanted = [
            Message::Begin {
                commit_start: start,
                commit_us,
                xid: 729,
            },
            Message::Origin,
            Message::Type {
                oid: 0x4001,
                schema: "public".to_owned(),
                name: "mood".to_owned(),
            },
            Message::Relation(Relation {
                oid: 0x4003,
                schema: "public".to_owned(),
                name: "t".to_owned(),
                identity: b'd',
                columns: vec![
                    column(true, "id", 23),
                    column(false, "v", 25),
                    column(false, "m", 0x4001),
                ],
            }),
            Message::Insert {
                relation: 0x4003,
                new: tuple_of(&frames[4], 6..32, false),
            },
            Message::Update {
                relation: 0x4003,
                old: None,
                new: tuple_of(&frames[5], 6..26, true),
            },
            Message::Update {
                relation: 0x4003,
                old: Some(OldTuple::Key(tuple_of(&frames[6], 6..19, false))),
                new: tuple_of(&frames[6], 20..46, false),
            },
            Message::Delete {
                relation: 0x4003,
                old: OldTuple::Key(tuple_of(&frames[7], 6..19, false)),
            },
            Message::Logical {
                transactional: true,
                lsn: Lsn(0x0152_c6a0),
                prefix: "pre".to_owned(),
                content: Bytes::from_static(b"body"),
            },
            Message::Truncate {
                relations: vec![0x4003],
                cascade: false,
                restart_identity: true,
            },
            Message::Commit {
                commit_start: start,
                commit_end: end,
                commit_us,
            },
        ];
        for (frame, wanted) in frames.iter().zip(wanted) {
            assert_eq!(Message::parse(frame), Ok(wanted));
        }
    }

    #[test]
    fn tuples_are_slices_of_their_frame() {
        let frame = captured(4);
        let Ok(Message::Insert { new, .. }) = Message::parse(&frame) else {
            panic!("no insert")
        };
        assert_eq!(new.image.as_bytes().as_ptr(), frame[6..].as_ptr());
    }

    #[test]
    fn what_was_not_asked_for_is_told_apart() {
        for tag in *b"SEcAbPKrp" {
            assert_eq!(
                Message::parse(&Bytes::from(vec![tag, 0])),
                Ok(Message::Unasked(tag))
            );
        }
    }

    #[test]
    fn cut_and_padded_messages_are_refused() {
        for at in 0..CAPTURED.len() {
            let frame = captured(at);
            for len in 0..frame.len() {
                assert!(Message::parse(&frame.slice(..len)).is_err(), "{at} cut to {len}");
            }
            let padded = Bytes::from([&frame[..], &[0]].concat());
            assert!(Message::parse(&padded).is_err(), "{at} padded");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_message_or_an_error(bytes: Vec<u8>, tag in "[BCORYIUDTMS]") {
            let _ = Message::parse(&Bytes::from(bytes.clone()));
            let tagged = [tag.as_bytes(), &bytes].concat();
            let _ = Message::parse(&Bytes::from(tagged));
        }

        #[test]
        fn damaged_messages_give_a_message_or_an_error(
            at in 0..CAPTURED.len(),
            damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut bytes = captured(at).to_vec();
            for (place, value) in damage {
                let place = place.index(bytes.len());
                bytes[place] = value;
            }
            let _ = Message::parse(&Bytes::from(bytes));
        }
    }
}
