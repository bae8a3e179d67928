//! `jsonb` values, as `jsonb_send` writes them: objects merged key by key, at every depth; lists in their elements.
//!
//! In:   old and new values of a write      Out: the value
//! Invariants:
//! 1. Each key of each object is a register of its own, and the last writer's. A write is what it changed in what it had
//!    read: keys it set, keys it removed. Who changes a key below an object that is none any more writes that whole
//!    object, as it left it (as an update brings back a deleted row).
//! 2. What is written is in the form in which the server would write it: keys by length, then bytes.
//!
//! Everything that is no object (lists, numbers, ...) is one value. Nothing is read as a number, and so nothing rounded.
//!
//! Not here: the order of the writes (the parent module)

use std::collections::BTreeMap;

use bytes::{BufMut, Bytes, BytesMut};

use super::{Effect, Field};

/// Objects deeper than this are one value: what reads and writes them calls itself.
const DEPTH: usize = 64;

/// A key as it is ordered, and as it is written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    len: usize,
    bytes: Vec<u8>,
    written: Bytes,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Json {
    Object(BTreeMap<Key, Json>),
    /// Anything else, as it is written.
    Value(Bytes),
}

/// Where reading is.
struct Reader<'a> {
    all: &'a Bytes,
    at: usize,
}

impl Reader<'_> {
    fn peek(&mut self) -> Option<u8> {
        while self.all.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        self.all.get(self.at).copied()
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        (self.peek()? == byte).then(|| self.at += 1)
    }

    fn since(&self, start: usize) -> Option<Bytes> {
        Some(self.all.slice_ref(self.all.get(start..self.at)?))
    }

    fn string(&mut self) -> Option<Bytes> {
        self.expect(b'"')?;
        let start = self.at - 1;
        loop {
            match self.all.get(self.at)? {
                b'"' => break,
                b'\\' => self.at += 2,
                _ => self.at += 1,
            }
        }
        self.at += 1;
        self.since(start)
    }

    /// Any value, unread.
    fn skip(&mut self) -> Option<Bytes> {
        self.peek()?;
        let (start, mut depth) = (self.at, 0usize);
        loop {
            match self.all.get(self.at) {
                Some(b'"') => drop(self.string()?),
                Some(b'{' | b'[') => (depth, self.at) = (depth + 1, self.at + 1),
                Some(b'}' | b']') if depth > 0 => (depth, self.at) = (depth - 1, self.at + 1),
                Some(b',' | b'}' | b']' | b' ' | b'\t' | b'\n' | b'\r') | None if depth == 0 => break,
                Some(_) => self.at += 1,
                None => return None,
            }
        }
        (self.at > start).then(|| self.since(start)).flatten()
    }

    fn value(&mut self, depth: usize) -> Option<Json> {
        if self.peek()? != b'{' || depth == DEPTH {
            return self.skip().map(Json::Value);
        }
        self.at += 1;
        let mut object = BTreeMap::new();
        if self.peek()? == b'}' {
            self.at += 1;
            return Some(Json::Object(object));
        }
        loop {
            self.peek()?;
            let key = self.string()?;
            self.expect(b':')?;
            let value = self.value(depth + 1)?;
            object.insert(Key::of(key)?, value);
            if self.expect(b',').is_none() {
                self.expect(b'}')?;
                return Some(Json::Object(object));
            }
        }
    }

    fn is_at_end(&mut self) -> bool {
        self.peek().is_none()
    }
}

impl Key {
    /// Of a key in its quotes.
    fn of(written: Bytes) -> Option<Self> {
        let inner = written.get(1..written.len().checked_sub(1)?)?;
        let mut bytes = Vec::with_capacity(inner.len());
        let mut rest = inner.iter().copied();
        while let Some(byte) = rest.next() {
            if byte != b'\\' {
                bytes.push(byte);
                continue;
            }
            bytes.push(match rest.next()? {
                b'b' => 8,
                b'f' => 12,
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                // The server writes only control characters so.
                b'u' => {
                    let digits: Vec<u8> = rest.by_ref().take(4).collect();
                    u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
                }
                other => other,
            });
        }
        let len = bytes.len();
        Some(Self { len, bytes, written })
    }
}

/// What follows the number of the format.
fn text(value: &Bytes) -> Option<Bytes> {
    (value.first() == Some(&1)).then(|| value.slice(1..))
}

/// `Some(None)` is NULL, `None` nothing that can be read.
fn read(field: &Field) -> Option<Option<Json>> {
    match field {
        Field::Null => Some(None),
        Field::Binary(value) => {
            let all = text(value)?;
            let mut reader = Reader { all: &all, at: 0 };
            let json = reader.value(0)?;
            reader.is_at_end().then_some(Some(json))
        }
        Field::Text(_) | Field::Absent => None,
    }
}

impl Json {
    const fn keys(&self) -> Option<&BTreeMap<Key, Self>> {
        match self {
            Self::Object(keys) => Some(keys),
            Self::Value(_) => None,
        }
    }

    fn write_to(&self, out: &mut BytesMut) {
        match self {
            Self::Value(written) => out.put_slice(written),
            Self::Object(object) => {
                out.put_u8(b'{');
                for (at, (key, value)) in object.iter().enumerate() {
                    if at > 0 {
                        out.put_slice(b", ");
                    }
                    out.put_slice(&key.written);
                    out.put_slice(b": ");
                    value.write_to(out);
                }
                out.put_u8(b'}');
            }
        }
    }
}

fn write(json: Option<&Json>) -> Field {
    let Some(json) = json else { return Field::Null };
    let mut out = BytesMut::new();
    out.put_u8(1);
    json.write_to(&mut out);
    Field::Binary(out.freeze())
}

/// `here` as an update from `old` to `new` leaves it.
fn merged(here: Option<&Json>, old: Option<&Json>, new: Option<&Json>) -> Option<Json> {
    if old == new {
        return here.cloned();
    }
    let (Some(Json::Object(keys)), None | Some(Json::Object(_)), Some(Json::Object(wanted))) =
        (here, old, new)
    else {
        return new.cloned();
    };
    let none = BTreeMap::new();
    let former = match old {
        Some(Json::Object(former)) => former,
        _ => &none,
    };
    let mut keys = keys.clone();
    for key in former
        .keys()
        .chain(wanted.keys().filter(|key| !former.contains_key(key)))
    {
        match merged(keys.get(key), former.get(key), wanted.get(key)) {
            Some(value) => drop(keys.insert(key.clone(), value)),
            None => drop(keys.remove(key)),
        }
    }
    Some(Json::Object(keys))
}

/// `here`, once an update from `old` to `new` comes over it; with NULL for `old` an insert.
pub(super) fn change(here: &Field, old: &Field, new: &Field) -> Field {
    match (read(here), read(old), read(new)) {
        (Some(here), Some(old), Some(new)) => {
            write(merged(here.as_ref(), old.as_ref(), new.as_ref()).as_ref())
        }
        _ => new.clone(),
    }
}

type Written<'a> = (Option<&'a Json>, Option<&'a Json>);

/// Does the later write take away what the other wrote to any key? Each from its first to its second value.
fn takes<'a>(lower: Written<'a>, higher: Written<'a>) -> bool {
    if lower.0 == lower.1 || higher.0 == higher.1 || lower.1 == higher.1 {
        return false;
    }
    let is_merged =
        |write: Written<'_>| write.0.is_none() || write.0.is_some_and(|value| value.keys().is_some());
    let keys = |value: Option<&'a Json>| value.and_then(Json::keys);
    let (Some(low), Some(high)) = (keys(lower.1), keys(higher.1)) else {
        return true;
    };
    if !is_merged(lower) || !is_merged(higher) {
        return true;
    }
    let all = [keys(lower.0), Some(low), keys(higher.0), Some(high)];
    all.into_iter().flatten().flat_map(BTreeMap::keys).any(|key| {
        let former = |write: Written<'a>| write.0?.keys()?.get(key);
        takes((former(lower), low.get(key)), (former(higher), high.get(key)))
    })
}

/// Does the later write `higher` of the column `at` take away what `lower` wrote?
pub(super) fn is_lost(at: usize, lower: &Effect, higher: &Effect) -> bool {
    let written = |effect: &Effect| {
        let old = effect.seen(at).map_or(Some(None), read)?;
        Some((old, read(effect.row()?.get(at)?)?))
    };
    match (written(lower), written(higher)) {
        (Some(low), Some(high)) => takes(
            (low.0.as_ref(), low.1.as_ref()),
            (high.0.as_ref(), high.1.as_ref()),
        ),
        _ => lower.changes(at) && higher.changes(at),
    }
}

/// The elements of a list, as they are written; `None`: no list.
pub(super) fn elements(value: &Bytes) -> Option<Vec<Bytes>> {
    let all = text(value)?;
    let mut reader = Reader { all: &all, at: 0 };
    reader.expect(b'[')?;
    let mut elements = Vec::new();
    if reader.peek()? == b']' {
        reader.at += 1;
    } else {
        loop {
            elements.push(reader.skip()?);
            if reader.expect(b',').is_none() {
                reader.expect(b']')?;
                break;
            }
        }
    }
    reader.is_at_end().then_some(elements)
}

/// The list of these elements.
pub(super) fn list<'a>(elements: impl Iterator<Item = &'a Bytes>) -> Bytes {
    let mut out = BytesMut::new();
    out.put_slice(b"\x01[");
    for (at, element) in elements.enumerate() {
        if at > 0 {
            out.put_slice(b", ");
        }
        out.put_slice(element);
    }
    out.put_u8(b']');
    out.freeze()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn field(text: &str) -> Field {
        Field::Binary(format!("\u{1}{text}").into())
    }

    fn merge(here: &str, old: &str, new: &str) -> String {
        match change(&field(here), &field(old), &field(new)) {
            Field::Binary(value) => String::from_utf8(value[1..].to_vec()).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_key_is_its_own_last_writers_at_every_depth() {
        assert_eq!(
            merge(r#"{"a": 2}"#, r#"{"a": 1}"#, r#"{"a": 1, "b": 3}"#),
            r#"{"a": 2, "b": 3}"#
        );
        assert_eq!(
            merge(
                r#"{"a": {"x": 2, "y": 1}}"#,
                r#"{"a": {"x": 1, "y": 1}}"#,
                r#"{"a": {"x": 1}}"#
            ),
            r#"{"a": {"x": 2}}"#
        );
        // Below what is no object any more the whole object is written.
        assert_eq!(
            merge(r#"{"a": 5}"#, r#"{"a": {"x": 1}}"#, r#"{"a": {"x": 1, "y": 2}}"#),
            r#"{"a": {"x": 1, "y": 2}}"#
        );
        // Two made one object.
        assert_eq!(
            merge(r#"{"s": {"x": 1}}"#, "{}", r#"{"s": {"y": 2}}"#),
            r#"{"s": {"x": 1, "y": 2}}"#
        );
        assert_eq!(merge("[1, 2]", "{}", r#"{"a": [1, "]"]}"#), r#"{"a": [1, "]"]}"#);
    }

    #[test]
    fn keys_are_in_the_servers_order_and_numbers_as_they_were() {
        // select '{"bb": 1.10, "\u00e9": 2, "\"": 3, "c": 4}'::jsonb
        let new = "{\"\\\"\": 3, \"c\": 4, \"bb\": 1.10, \"é\": 2}";
        assert_eq!(
            merge(r#"{"bc": 1, "d": 0.0}"#, "{}", new),
            "{\"\\\"\": 3, \"c\": 4, \"d\": 0.0, \"bb\": 1.10, \"bc\": 1, \"é\": 2}"
        );
        assert_eq!(merge(r#"{"z": 1}"#, "{}", r#"{"\n": 2}"#), r#"{"\n": 2, "z": 1}"#);
    }

    #[test]
    fn lists_come_apart_at_their_own_commas() {
        let value = Bytes::from_static(br#" [1, "a, ]\"", [2, 3], {"k": [4, 5]}]"#);
        let value = Bytes::from([b"\x01", &value[..]].concat());
        let found = elements(&value).unwrap();
        assert_eq!(found, ["1", r#""a, ]\"""#, "[2, 3]", r#"{"k": [4, 5]}"#]);
        assert_eq!(elements(&list(found.iter())), Some(found));
        assert_eq!(elements(&Bytes::from_static(b"\x01[]")), Some(vec![]));
        assert_eq!(elements(&Bytes::from_static(b"\x01{}")), None);
    }

    #[test]
    fn objects_of_any_depth_are_read() {
        let deep = format!("{}1{}", "{\"a\": ".repeat(100_000), "}".repeat(100_000));
        assert_eq!(merge("{}", "{}", &deep), deep);
        let damaged = "{\"a\": ".repeat(100_000);
        assert_eq!(merge("{}", "{}", &damaged), damaged);
    }

    proptest! {
        #[test]
        fn damage_gives_no_panic(text in r#"[\[\]{}",:\\a1 u]{0,24}"#) {
            let _ = change(&field(&text), &field("{}"), &field(r#"{"a": 1}"#));
            let _ = change(&field("{}"), &field(&text), &field(&text));
            let _ = elements(&Bytes::from(format!("\u{1}{text}")));
        }
    }
}
