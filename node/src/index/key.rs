//! Names of rows in the index.

use std::hash::{Hash, Hasher};

use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::wire::Malformed;

/// A table, as numbered by this process ([`super::TableIds`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId(pub u32);

const INLINE: usize = 22;

/// A row's table and canonical key: 24 bytes, with the key inside when it is short.
#[derive(Clone)]
pub struct RowKey(Bytes24);

#[derive(Clone)]
enum Bytes24 {
    Inline(u8, [u8; INLINE]),
    Heap(Box<[u8]>),
}

impl RowKey {
    /// The key of a whole row; `scratch` saves an allocation a row.
    ///
    /// # Errors
    /// When a key column has no value.
    pub fn of_row(
        id: TableId,
        table: &TableDesc,
        row: &RowImage,
        scratch: &mut Vec<u8>,
    ) -> Result<Self, Malformed> {
        scratch.clear();
        table.canonical_key(row, scratch)?;
        Ok(Self::from_canonical(id, scratch))
    }

    /// The key of a key image.
    ///
    /// # Errors
    /// When a key column has no value.
    pub fn of_image(
        id: TableId,
        table: &TableDesc,
        key: &RowImage,
        scratch: &mut Vec<u8>,
    ) -> Result<Self, Malformed> {
        scratch.clear();
        table.canonical_key_of_image(key, scratch)?;
        Ok(Self::from_canonical(id, scratch))
    }

    /// The key with the canonical bytes `canonical` in table `id`.
    #[must_use]
    pub fn from_canonical(id: TableId, canonical: &[u8]) -> Self {
        Self::of_parts(&id.0.to_be_bytes(), canonical)
    }

    /// The key as bytes: the table's number, then the canonical key.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Bytes24::Inline(len, bytes) => bytes.get(..usize::from(*len)).unwrap_or_default(),
            Bytes24::Heap(bytes) => bytes,
        }
    }

    /// The key from what [`Self::as_bytes`] gave.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self::of_parts(bytes, &[])
    }

    /// The key whose bytes are `head`, then `tail`. One a row: short ones allocate nothing.
    fn of_parts(head: &[u8], tail: &[u8]) -> Self {
        let len = head.len() + tail.len();
        let mut inline = [0; INLINE];
        let parts = inline
            .get_mut(..len)
            .and_then(|slot| slot.split_at_mut_checked(head.len()));
        match (parts, u8::try_from(len)) {
            (Some((first, rest)), Ok(len)) => {
                first.copy_from_slice(head);
                rest.copy_from_slice(tail);
                Self(Bytes24::Inline(len, inline))
            }
            _ => Self(Bytes24::Heap([head, tail].concat().into())),
        }
    }

    /// The row's table.
    #[must_use]
    pub fn table(&self) -> TableId {
        TableId(
            self.as_bytes()
                .first_chunk()
                .map_or(0, |id| u32::from_be_bytes(*id)),
        )
    }

    /// The canonical key, without the table.
    #[must_use]
    pub fn canonical(&self) -> &[u8] {
        self.as_bytes().get(4..).unwrap_or_default()
    }

    /// Memory outside the value itself, bytes.
    #[must_use]
    pub fn heap_len(&self) -> usize {
        match &self.0 {
            Bytes24::Inline(..) => 0,
            Bytes24::Heap(bytes) => bytes.len() + 16,
        }
    }
}

impl PartialEq for RowKey {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for RowKey {}

impl Ord for RowKey {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.as_bytes().cmp(other.as_bytes())
    }
}

impl PartialOrd for RowKey {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Hash for RowKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(self.as_bytes());
    }
}

impl std::fmt::Debug for RowKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.table().0, hex::encode(self.canonical()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_keys_read_back_and_sort_by_bytes() {
        assert_eq!(size_of::<RowKey>(), 24);
        for len in [0, 1, 17, 18, 19, 200] {
            let canonical = vec![7; len];
            let key = RowKey::from_canonical(TableId(3), &canonical);
            assert_eq!(key.canonical(), canonical);
            assert_eq!(key.table(), TableId(3));
            assert_eq!(RowKey::from_bytes(key.as_bytes()), key);
            assert!(key < RowKey::from_canonical(TableId(4), &canonical));
        }
    }
}
