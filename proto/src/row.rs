//! Row images and canonical row keys.
//!
//! A row image is pgoutput's `TupleData` as it came from the server (PostgreSQL docs, "Logical Replication
//! Message Formats"): a 16-bit column count, then per column `n` (null), `u` (unchanged TOAST), or `t` / `b`
//! (text / binary) with a 32-bit length and the value.

use bytes::Bytes;

use crate::schema::{ColumnDesc, TableDesc};
use crate::wire::{Malformed, Reader};

/// One column's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cell<'a> {
    /// SQL NULL.
    Null,
    /// A TOASTed value that the statement did not touch. Never leaves the origin: see [`RowImage::parse`].
    Unchanged,
    /// The type's text output.
    Text(&'a [u8]),
    /// The type's binary `send` output.
    Binary(&'a [u8]),
}

/// A validated row image, shared without copying.
#[derive(Clone, PartialEq, Eq)]
pub struct RowImage(Bytes);

impl RowImage {
    /// Checks that `bytes` are exactly one well-formed image of `columns` columns.
    ///
    /// # Errors
    /// When they are not.
    pub fn parse(bytes: Bytes, columns: usize) -> Result<Self, Malformed> {
        let mut cells = Cells::new(&bytes)?;
        if usize::from(cells.left) != columns {
            return Err(Malformed("a row whose column count is not its table's"));
        }
        while cells.step()?.is_some() {}
        cells.from.done()?;
        Ok(Self(bytes))
    }

    /// Reads an image at the front of what `from` has left, which are bytes of `whole`: a slice of that, of however many columns, and whether it
    /// has a [`Cell::Unchanged`].
    ///
    /// # Errors
    /// When there is none.
    pub fn read(whole: &Bytes, from: &mut Reader<'_>) -> Result<(Self, bool), Malformed> {
        let start = from.rest();
        let mut cells = Cells::new(start)?;
        let mut has_unchanged = false;
        while let Some(cell) = cells.step()? {
            has_unchanged |= cell == Cell::Unchanged;
        }
        let len = start.len() - cells.from.rest().len();
        Ok((Self(whole.slice_ref(from.take(len)?)), has_unchanged))
    }

    /// Makes an image of `cells`.
    #[must_use]
    pub fn build<'a>(cells: impl ExactSizeIterator<Item = Cell<'a>>) -> Self {
        let mut out = Vec::with_capacity(64);
        out.extend_from_slice(&u16::try_from(cells.len()).unwrap_or(u16::MAX).to_be_bytes());
        for cell in cells {
            match cell {
                Cell::Null => out.push(b'n'),
                Cell::Unchanged => out.push(b'u'),
                Cell::Text(value) => {
                    out.push(b't');
                    crate::wire::put_bytes(&mut out, value);
                }
                Cell::Binary(value) => {
                    out.push(b'b');
                    crate::wire::put_bytes(&mut out, value);
                }
            }
        }
        Self(Bytes::from(out))
    }

    /// The image's bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &Bytes {
        &self.0
    }

    /// The same in memory of its own: a slice keeps all that it was read with.
    #[must_use]
    pub fn detached(&self) -> Self {
        Self(Bytes::copy_from_slice(&self.0))
    }

    /// The cells, in column order.
    #[must_use]
    pub fn cells(&self) -> Cells<'_> {
        Cells::new(&self.0).unwrap_or(Cells {
            from: Reader::new(&[]),
            left: 0,
        })
    }
}

impl std::fmt::Debug for RowImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.cells()).finish()
    }
}

/// The cells of an image, in column order.
#[derive(Debug, Clone)]
pub struct Cells<'a> {
    from: Reader<'a>,
    left: u16,
}

impl<'a> Cells<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut from = Reader::new(bytes);
        let left = from.u16()?;
        Ok(Self { from, left })
    }

    fn step(&mut self) -> Result<Option<Cell<'a>>, Malformed> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        Ok(Some(match self.from.u8()? {
            b'n' => Cell::Null,
            b'u' => Cell::Unchanged,
            b't' => Cell::Text(self.from.bytes()?),
            b'b' => Cell::Binary(self.from.bytes()?),
            _ => return Err(Malformed("a column of unknown kind")),
        }))
    }
}

impl<'a> Iterator for Cells<'a> {
    type Item = Cell<'a>;

    fn next(&mut self) -> Option<Cell<'a>> {
        // Images are validated when made, so an error cannot come here; it would end the row.
        self.step().ok().flatten()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (usize::from(self.left), Some(usize::from(self.left)))
    }
}

impl ExactSizeIterator for Cells<'_> {}

/// Built-in types whose equal values have several images.
mod oid {
    pub(super) const BPCHAR: u32 = 1042;
    pub(super) const FLOAT4: u32 = 700;
    pub(super) const FLOAT8: u32 = 701;
    pub(super) const NUMERIC: u32 = 1700;
}

/// Appends the canonical form of one key value: equal values of the type give equal bytes at every node.
fn put_canonical(out: &mut Vec<u8>, type_oid: u32, cell: Cell<'_>) -> Result<(), Malformed> {
    let (value, binary) = match cell {
        Cell::Binary(value) => (value, true),
        Cell::Text(value) => (value, false),
        Cell::Null | Cell::Unchanged => return Err(Malformed("a key column without a value")),
    };
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    match (type_oid, binary) {
        // numeric_send: ndigits, weight, sign, dscale, digits. 1.0 and 1.00 differ in dscale alone.
        (oid::NUMERIC, true) if value.len() >= 8 => {
            let (head, rest) = value.split_at(6);
            out.extend_from_slice(head);
            out.extend_from_slice(rest.get(2..).unwrap_or_default());
        }
        (oid::BPCHAR, _) => {
            let len = value
                .iter()
                .rposition(|&byte| byte != b' ')
                .map_or(0, |at| at + 1);
            out.extend_from_slice(value.get(..len).unwrap_or_default());
        }
        // -0 equals 0.
        (oid::FLOAT4, true) if value == (-0.0f32).to_be_bytes() => out.extend_from_slice(&[0; 4]),
        (oid::FLOAT8, true) if value == (-0.0f64).to_be_bytes() => out.extend_from_slice(&[0; 8]),
        _ => out.extend_from_slice(value),
    }
    let len = u32::try_from(out.len() - start - 4).map_err(|_| Malformed("a key value of over 4 GiB"))?;
    if let Some(slot) = out.get_mut(start..start + 4) {
        slot.copy_from_slice(&len.to_be_bytes());
    }
    Ok(())
}

impl ColumnDesc {
    /// Appends the canonical form of a value of this column, with its length: equal values give equal bytes at every node.
    ///
    /// # Errors
    /// When there is no value.
    pub fn put_canonical(&self, out: &mut Vec<u8>, cell: Cell<'_>) -> Result<(), Malformed> {
        put_canonical(out, self.base_oid(), cell)
    }
}

impl TableDesc {
    /// Appends the canonical key of a whole row.
    ///
    /// # Errors
    /// When a key column has no value.
    pub fn canonical_key(&self, row: &RowImage, out: &mut Vec<u8>) -> Result<(), Malformed> {
        // Nearly every key is the first column or columns in order: walk once for those.
        let mut cells = row.cells();
        let mut at = 0u16;
        for &wanted in &self.key {
            if wanted < at {
                cells = row.cells();
                at = 0;
            }
            let cell = cells
                .nth(usize::from(wanted - at))
                .ok_or(Malformed("a row without its key column"))?;
            at = wanted + 1;
            let type_oid = self
                .columns
                .get(usize::from(wanted))
                .map_or(0, ColumnDesc::base_oid);
            put_canonical(out, type_oid, cell)?;
        }
        Ok(())
    }

    /// Appends the canonical key of a key image (see [`Self::key_image`]).
    ///
    /// # Errors
    /// When a key column has no value.
    pub fn canonical_key_of_image(&self, key: &RowImage, out: &mut Vec<u8>) -> Result<(), Malformed> {
        let mut cells = key.cells();
        for column in self.key_columns() {
            let cell = cells.next().ok_or(Malformed("a key without its column"))?;
            put_canonical(out, column.base_oid(), cell)?;
        }
        Ok(())
    }

    /// Have two whole rows the same bytes in all columns of the key? Then they have the same canonical key. Rows that have not may have it,
    /// too, in other forms of the same values.
    #[must_use]
    pub fn has_same_key_bytes(&self, one: &RowImage, other: &RowImage) -> bool {
        self.key.iter().all(|&at| {
            let at = usize::from(at);
            match (one.cells().nth(at), other.cells().nth(at)) {
                (Some(cell @ (Cell::Text(_) | Cell::Binary(_))), Some(other)) => cell == other,
                _ => false,
            }
        })
    }

    /// A key image with the values of a canonical key. Forms that canonical keys leave out (a numeric's trailing
    /// zeros, padding) are gone; the values are equal.
    ///
    /// # Errors
    /// When the bytes are not a canonical key of this table.
    pub fn image_of_canonical(&self, canonical: &[u8]) -> Result<RowImage, Malformed> {
        let mut from = Reader::new(canonical);
        let mut values = Vec::with_capacity(self.key.len());
        for column in self.key_columns() {
            let value = from.bytes()?;
            values.push(match (column.base_oid(), value.split_at_checked(6)) {
                (oid::NUMERIC, Some((head, digits))) => {
                    let mut numeric = head.to_vec();
                    let weight = Reader::new(head.get(2..4).unwrap_or_default()).i16()?;
                    let below_point = i32::try_from(digits.len() / 2).unwrap_or(0) - i32::from(weight) - 1;
                    let scale = u16::try_from(below_point.max(0) * 4).unwrap_or(0);
                    numeric.extend_from_slice(&scale.to_be_bytes());
                    numeric.extend_from_slice(digits);
                    numeric
                }
                _ => value.to_vec(),
            });
        }
        from.done()?;
        Ok(RowImage::build(values.iter().map(|value| Cell::Binary(value))))
    }

    /// The image of the key's columns alone, in the key's order.
    ///
    /// # Errors
    /// When the row has no value for one.
    pub fn key_image(&self, row: &RowImage) -> Result<RowImage, Malformed> {
        let mut cells = Vec::with_capacity(self.key.len());
        for &at in &self.key {
            match row.cells().nth(usize::from(at)) {
                Some(cell @ (Cell::Text(_) | Cell::Binary(_))) => cells.push(cell),
                _ => return Err(Malformed("a key column without a value")),
            }
        }
        Ok(RowImage::build(cells.into_iter()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(type_oid: u32) -> TableDesc {
        let column = |name: &str, type_oid| ColumnDesc {
            name: name.to_owned(),
            type_oid,
            type_mod: -1,
            type_name: String::new(),
        };
        TableDesc {
            schema: "s".to_owned(),
            name: "t".to_owned(),
            columns: vec![column("a", 23), column("k", type_oid)],
            key: vec![1],
            identity_full: false,
        }
    }

    fn key(type_oid: u32, value: &[u8]) -> Vec<u8> {
        let row = RowImage::build([Cell::Null, Cell::Binary(value)].into_iter());
        let mut whole = Vec::new();
        table(type_oid).canonical_key(&row, &mut whole).unwrap();
        let image = table(type_oid).key_image(&row).unwrap();
        let mut from_image = Vec::new();
        table(type_oid)
            .canonical_key_of_image(&image, &mut from_image)
            .unwrap();
        assert_eq!(whole, from_image);
        whole
    }

    #[test]
    fn equal_values_have_equal_keys() {
        assert_eq!(
            key(oid::NUMERIC, &[0, 1, 0, 0, 0, 0, 0, 1, 0, 1]),
            key(oid::NUMERIC, &[0, 1, 0, 0, 0, 0, 0, 2, 0, 1])
        );
        assert_ne!(
            key(oid::NUMERIC, &[0, 1, 0, 0, 0, 0, 0, 1, 0, 1]),
            key(oid::NUMERIC, &[0, 1, 0, 0, 0, 0, 0, 1, 0, 2])
        );
        assert_eq!(key(oid::BPCHAR, b"ab  "), key(oid::BPCHAR, b"ab"));
        assert_eq!(
            key(oid::FLOAT8, &(-0.0f64).to_be_bytes()),
            key(oid::FLOAT8, &0.0f64.to_be_bytes())
        );
        assert_ne!(key(25, b"ab "), key(25, b"ab"));
    }

    #[test]
    fn keys_of_the_same_bytes_are_told_without_their_canonical_form() {
        fn row(first: Cell<'_>, second: &[u8]) -> RowImage {
            RowImage::build([first, Cell::Binary(second)].into_iter())
        }
        let mut table = table(oid::NUMERIC);
        table.key = vec![1, 0];
        let same = |one: &RowImage, other: &RowImage| {
            let (mut before, mut after) = (Vec::new(), Vec::new());
            table.canonical_key(one, &mut before).unwrap();
            table.canonical_key(other, &mut after).unwrap();
            (table.has_same_key_bytes(one, other), before == after)
        };
        let (short, long) = ([0, 1, 0, 0, 0, 0, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0, 0, 2, 0, 1]);
        let (a, b) = (Cell::Binary(b"a"), Cell::Binary(b"b"));
        assert_eq!(same(&row(a, &short), &row(a, &short)), (true, true));
        assert_eq!(same(&row(a, &short), &row(a, &long)), (false, true));
        assert_eq!(same(&row(a, &short), &row(b, &short)), (false, false));
        // What has no value is an error of the canonical key, and not the same.
        let without = row(Cell::Null, &short);
        assert!(!table.has_same_key_bytes(&without, &without));
        assert!(table.canonical_key(&without, &mut Vec::new()).is_err());
    }

    #[test]
    fn a_domain_has_the_keys_of_the_type_that_it_is_over() {
        let key = |over: u32, value: &[u8]| {
            let mut table = table(16_500);
            table.columns[1].type_mod = ColumnDesc::domain_over(over);
            let row = RowImage::build([Cell::Null, Cell::Binary(value)].into_iter());
            let mut whole = Vec::new();
            table.canonical_key(&row, &mut whole).unwrap();
            let image = table.image_of_canonical(&whole).unwrap();
            let mut again = Vec::new();
            table.canonical_key_of_image(&image, &mut again).unwrap();
            assert_eq!(whole, again);
            let mut column = Vec::new();
            table.columns[1]
                .put_canonical(&mut column, Cell::Binary(value))
                .unwrap();
            assert_eq!(whole, column);
            whole
        };
        let (one, longer) = ([0, 1, 0, 0, 0, 0, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0, 0, 2, 0, 1]);
        assert_eq!(key(oid::NUMERIC, &one), key(oid::NUMERIC, &longer));
        assert_eq!(key(oid::BPCHAR, b"ab  "), key(oid::BPCHAR, b"ab"));
        assert_ne!(key(25, b"ab "), key(25, b"ab"));
    }

    #[test]
    fn an_image_is_read_where_it_stands() {
        let rows = [
            [Cell::Null, Cell::Text(b"x"), Cell::Unchanged],
            [Cell::Binary(b""), Cell::Null, Cell::Text(b"yz")],
        ];
        let images = rows.map(|row| RowImage::build(row.into_iter()));
        let parts: [&[u8]; 4] = [b"head", images[0].as_bytes(), images[1].as_bytes(), b"tail"];
        let whole = Bytes::from(parts.concat());
        let mut from = Reader::new(&whole);
        from.take(4).unwrap();
        assert_eq!(RowImage::read(&whole, &mut from), Ok((images[0].clone(), true)));
        let (second, has_unchanged) = RowImage::read(&whole, &mut from).unwrap();
        assert_eq!((&second, has_unchanged), (&images[1], false));
        assert!(whole.as_ptr_range().contains(&second.as_bytes().as_ptr()));
        assert_eq!(from.rest(), b"tail");
        assert!(RowImage::read(&whole, &mut from).is_err());
    }

    #[test]
    fn images_that_are_cut_or_padded_are_refused() {
        let whole = RowImage::build([Cell::Null, Cell::Text(b"x"), Cell::Unchanged].into_iter());
        assert!(RowImage::parse(whole.as_bytes().clone(), 3).is_ok());
        assert!(RowImage::parse(whole.as_bytes().clone(), 2).is_err());
        for cut in 0..whole.as_bytes().len() {
            assert!(RowImage::parse(whole.as_bytes().slice(..cut), 3).is_err());
        }
        let mut longer = whole.as_bytes().to_vec();
        longer.push(0);
        assert!(RowImage::parse(Bytes::from(longer), 3).is_err());
    }
}
