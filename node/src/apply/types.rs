//! Type trees: where images of values carry type OIDs.
//!
//! Binary images of arrays and composites name the types inside by OID (`array_send`, `record_send` in
//! PostgreSQL's sources). Built-in types have the same OID everywhere, others have a node's own: their images
//! are rewritten for the local server before they are applied.

use anabranch_proto::wire::{Malformed, Reader};

/// How an image of a type is built, as far as OIDs in it go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TypeTree {
    /// No OID of a user-defined type inside.
    Plain,
    /// An array whose element type is user-defined.
    Array {
        /// OID of the element type here.
        element_oid: u32,
        /// The element.
        element: Box<TypeTree>,
    },
    /// A composite type: OID here and tree of each field.
    Composite(Vec<(u32, TypeTree)>),
    /// A range over such a type.
    Range(Box<TypeTree>),
    /// A multirange over such a type.
    Multirange(Box<TypeTree>),
}

const BAD: Malformed = Malformed("a value that does not fit its type here");

/// Appends `image` to `out`, with the OIDs of this server.
pub(crate) fn adapt(tree: &TypeTree, image: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
    match tree {
        TypeTree::Plain => out.extend_from_slice(image),
        TypeTree::Array { element_oid, element } => adapt_array(*element_oid, element, image, out)?,
        TypeTree::Composite(fields) => adapt_composite(fields, image, out)?,
        TypeTree::Range(bound) => {
            let mut from = Reader::new(image);
            out.push(from.u8()?);
            while !from.rest().is_empty() {
                adapt_sized(bound, &mut from, out)?;
            }
        }
        TypeTree::Multirange(bound) => {
            let mut from = Reader::new(image);
            let count = from.u32()?;
            out.extend_from_slice(&count.to_be_bytes());
            let range = TypeTree::Range(bound.clone());
            for _ in 0..count {
                adapt_sized(&range, &mut from, out)?;
            }
            from.done()?;
        }
    }
    Ok(())
}

fn adapt_array(
    element_oid: u32,
    element: &TypeTree,
    image: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), Malformed> {
    let mut from = Reader::new(image);
    let (dimensions, flags, _) = (from.u32()?, from.u32()?, from.u32()?);
    if dimensions > 6 {
        return Err(BAD);
    }
    for part in [dimensions, flags, element_oid] {
        out.extend_from_slice(&part.to_be_bytes());
    }
    let bounds = usize::try_from(dimensions).map_err(|_| BAD)? * 8;
    out.extend_from_slice(from.take(bounds)?);
    while !from.rest().is_empty() {
        adapt_sized(element, &mut from, out)?;
    }
    Ok(())
}

fn adapt_composite(fields: &[(u32, TypeTree)], image: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
    let mut from = Reader::new(image);
    let count = from.u32()?;
    if usize::try_from(count) != Ok(fields.len()) {
        return Err(BAD);
    }
    out.extend_from_slice(&count.to_be_bytes());
    for (oid, tree) in fields {
        from.u32()?;
        out.extend_from_slice(&oid.to_be_bytes());
        adapt_sized(tree, &mut from, out)?;
    }
    from.done()
}

/// A value behind its 32-bit length, -1 for NULL.
fn adapt_sized(tree: &TypeTree, from: &mut Reader<'_>, out: &mut Vec<u8>) -> Result<(), Malformed> {
    let len = from.i32()?;
    let Ok(len) = usize::try_from(len) else {
        out.extend_from_slice(&(-1i32).to_be_bytes());
        return Ok(());
    };
    let value = from.take(len)?;
    put_sized(out, |out| adapt(tree, value, out))
}

/// Appends what `write` appends, behind its 32-bit length.
pub(crate) fn put_sized(
    out: &mut Vec<u8>,
    write: impl FnOnce(&mut Vec<u8>) -> Result<(), Malformed>,
) -> Result<(), Malformed> {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    write(out)?;
    let len = i32::try_from(out.len() - start - 4).map_err(|_| Malformed("a value of over 2 GiB"))?;
    if let Some(slot) = out.get_mut(start..start + 4) {
        slot.copy_from_slice(&len.to_be_bytes());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oids_inside_arrays_of_composites_become_local() {
        // '{ROW(7)}' of a composite (int4) with type OID 50000 elsewhere and 60000 here.
        let image = |oid: u32| {
            let mut out = Vec::new();
            for part in [1u32, 0, oid, 1, 1, 16, 1, 23, 4, 7] {
                out.extend_from_slice(&part.to_be_bytes());
            }
            out
        };
        let composite = TypeTree::Composite(vec![(23, TypeTree::Plain)]);
        let tree = TypeTree::Array {
            element_oid: 60_000,
            element: Box::new(composite),
        };
        let mut out = Vec::new();
        adapt(&tree, &image(50_000), &mut out).unwrap();
        assert_eq!(out, image(60_000));
        for cut in 1..out.len() {
            let mut ignored = Vec::new();
            let _ = adapt(&tree, &out[..cut], &mut ignored);
        }
    }
}
