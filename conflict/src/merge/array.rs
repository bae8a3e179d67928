//! One-dimensional arrays in PostgreSQL's binary form (`array_send`).
//!
//! Invariants: what is written reads back the same; damage gives `None`
//! Not here: what is done with the elements (`super::set`, `super::list`)

use bytes::{BufMut, Bytes, BytesMut};

/// An element in its type's binary form; `None` is NULL.
pub(super) type Element = Option<Bytes>;

/// The elements of an array of the type `element`; `None`: it has more than one dimension, or is damaged.
pub(super) fn read(value: &Bytes, element: u32) -> Option<Vec<Element>> {
    let word = |at: usize| {
        Some(i32::from_be_bytes(
            value.get(at..at.checked_add(4)?)?.try_into().ok()?,
        ))
    };
    if u32::from_be_bytes(word(8)?.to_be_bytes()) != element {
        return None;
    }
    match word(0)? {
        0 => return (value.len() == 12).then(Vec::new),
        1 => {}
        _ => return None,
    }
    let count = usize::try_from(word(12)?).ok()?;
    let mut at = 20;
    // Each takes four bytes at least: a count that lies asks for no memory.
    let mut elements = Vec::with_capacity(count.min(value.len() / 4));
    for _ in 0..count {
        let len = word(at)?;
        at += 4;
        if len == -1 {
            elements.push(None);
            continue;
        }
        let end = at.checked_add(usize::try_from(len).ok()?)?;
        elements.push(Some(value.slice_ref(value.get(at..end)?)));
        at = end;
    }
    (at == value.len()).then_some(elements)
}

/// The array of these elements, counted from 1.
pub(super) fn write<'a>(element: u32, elements: impl ExactSizeIterator<Item = &'a Element> + Clone) -> Bytes {
    let len: usize = elements
        .clone()
        .map(|one| 4 + one.as_ref().map_or(0, Bytes::len))
        .sum();
    let mut out = BytesMut::with_capacity(20 + len);
    let count = i32::try_from(elements.len()).unwrap_or(i32::MAX);
    out.put_i32(i32::from(count > 0));
    out.put_i32(i32::from(elements.clone().any(Option::is_none)));
    out.put_u32(element);
    if count > 0 {
        out.put_i32(count);
        out.put_i32(1);
    }
    for one in elements {
        match one {
            Some(bytes) => {
                out.put_i32(i32::try_from(bytes.len()).unwrap_or(i32::MAX));
                out.put_slice(bytes);
            }
            None => out.put_i32(-1),
        }
    }
    out.freeze()
}

/// The type of the elements of the built-in array types whose equal elements have equal binary forms.
pub(crate) const fn of_equal_bytes(array: u32) -> Option<u32> {
    Some(match array {
        1000 => 16,   // bool
        1001 => 17,   // bytea
        1002 => 18,   // "char"
        1003 => 19,   // name
        1016 => 20,   // bigint
        1005 => 21,   // smallint
        1007 => 23,   // integer
        1009 => 25,   // text
        1028 => 26,   // oid
        651 => 650,   // cidr
        1041 => 869,  // inet
        1040 => 829,  // macaddr
        1015 => 1043, // varchar
        1182 => 1082, // date
        1183 => 1083, // time
        1115 => 1114, // timestamp
        1185 => 1184, // timestamptz
        2951 => 2950, // uuid
        _ => return None,
    })
}

/// The type of the elements of the built-in array types.
pub(crate) const fn of_any(array: u32) -> Option<u32> {
    Some(match array {
        199 => 114,   // json
        1021 => 700,  // real
        1022 => 701,  // double precision
        1014 => 1042, // char
        1187 => 1186, // interval
        1270 => 1266, // timetz
        1231 => 1700, // numeric
        3807 => 3802, // jsonb
        _ => return of_equal_bytes(array),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn arrays_are_written_as_postgres_writes_them() {
        // array_send('{1,NULL}'::int4[])
        let sent = b"\0\0\0\x01\0\0\0\x01\0\0\0\x17\0\0\0\x02\0\0\0\x01\0\0\0\x04\0\0\0\x01\xff\xff\xff\xff";
        let elements = [Some(Bytes::from_static(b"\0\0\0\x01")), None];
        assert_eq!(write(23, elements.iter()), sent[..]);
        assert_eq!(read(&Bytes::from_static(sent), 23), Some(elements.to_vec()));
        assert_eq!(read(&Bytes::from_static(sent), 25), None);
        // array_send('{}'::int4[])
        assert_eq!(write(23, [].iter()), b"\0\0\0\0\0\0\0\0\0\0\0\x17"[..]);
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(elements: Vec<Option<Vec<u8>>>) {
            let elements: Vec<Element> = elements.into_iter().map(|one| one.map(Bytes::from)).collect();
            prop_assert_eq!(read(&write(25, elements.iter()), 25), Some(elements));
        }

        #[test]
        fn damage_gives_nothing_and_no_panic(bytes: Vec<u8>, cut in 0usize..60) {
            let _ = read(&Bytes::from(bytes), 0);
            let whole = write(25, [Some(Bytes::from_static(b"abc")), None].iter());
            let _ = read(&whole.slice(..cut.min(whole.len())), 25);
        }
    }
}
