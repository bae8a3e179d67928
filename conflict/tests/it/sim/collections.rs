//! Columns of collections: `int4[]` as a set, `int4[]` that is appended to, and a document in `jsonb`.
//!
//! A [`super::Value`] holds their numbers: a value's bytes are kept beside the run, so equal numbers are equal bytes.
//! What must come of them is said twice, by a fold of its own and for rows that were never removed without any; no code is
//! shared with the crate.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use anabranch_conflict::merge::{Field, List, Rule};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use serde_json::{Map, Value as Json, json};

use super::Value;

const INT4: u32 = 23;

/// The right rules.
pub(crate) const RULES: [Rule; 4] = [
    Rule::Unit(0),
    Rule::Set(INT4),
    Rule::Append(List::Array(INT4)),
    Rule::Json,
];

/// A value, read.
#[derive(Debug)]
enum Plain {
    Null,
    List(Vec<i32>),
    Document(Json),
}

#[derive(Default)]
struct Known {
    ids: BTreeMap<Vec<u8>, i64>,
    values: Vec<(Field, Rc<Plain>)>,
}

thread_local! {
    static KNOWN: RefCell<Known> = RefCell::default();
}

/// Another run begins.
pub(crate) fn forget() {
    KNOWN.take();
}

pub(crate) fn id_of(field: &Field) -> i64 {
    let bytes = match field {
        Field::Null => Vec::new(),
        Field::Binary(bytes) => bytes.to_vec(),
        Field::Text(_) | Field::Absent => panic!("{field:?}"),
    };
    KNOWN.with_borrow_mut(|known| {
        if let Some(id) = known.ids.get(&bytes) {
            return *id;
        }
        let id = known.values.len() as i64;
        known.values.push((field.clone(), Rc::new(read(&bytes))));
        known.ids.insert(bytes, id);
        id
    })
}

fn read(bytes: &[u8]) -> Plain {
    let word = |at: usize| i32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    match bytes.first() {
        None => Plain::Null,
        Some(1) => Plain::Document(serde_json::from_slice(&bytes[1..]).unwrap()),
        Some(_) if word(0) == 0 => Plain::List(Vec::new()),
        Some(_) => Plain::List((0..word(12) as usize).map(|at| word(24 + at * 8)).collect()),
    }
}

pub(crate) fn field(id: i64) -> Field {
    KNOWN.with_borrow(|known| known.values[id as usize].0.clone())
}

fn plain(id: i64) -> Rc<Plain> {
    KNOWN.with_borrow(|known| Rc::clone(&known.values[id as usize].1))
}

fn list(id: i64) -> Vec<i32> {
    match &*plain(id) {
        Plain::List(list) => list.clone(),
        _ => Vec::new(),
    }
}

fn set(id: i64) -> BTreeSet<i32> {
    list(id).into_iter().collect()
}

fn document(id: i64) -> Option<Json> {
    match &*plain(id) {
        Plain::Document(document) => Some(document.clone()),
        _ => None,
    }
}

/// As `array_send` writes it.
fn of_list(list: &[i32]) -> i64 {
    let count = list.len() as i32;
    let head = if list.is_empty() {
        vec![0, 0, 23]
    } else {
        vec![1, 0, 23, count, 1]
    };
    let words = head.into_iter().chain(list.iter().flat_map(|one| [4, *one]));
    let bytes: Vec<u8> = words.flat_map(i32::to_be_bytes).collect();
    id_of(&Field::Binary(bytes.into()))
}

/// As `jsonb_out` writes it; all keys here have one letter.
fn text_of(json: &Json) -> String {
    match json {
        Json::Object(keys) => {
            let keys: BTreeMap<_, _> = keys.iter().collect();
            let keys: Vec<String> = keys
                .iter()
                .map(|(key, value)| format!("\"{key}\": {}", text_of(value)))
                .collect();
            format!("{{{}}}", keys.join(", "))
        }
        other => other.to_string(),
    }
}

fn of_document(document: Option<&Json>) -> i64 {
    id_of(&document.map_or(Field::Null, |json| {
        Field::Binary(format!("\u{1}{}", text_of(json)).into())
    }))
}

/// How the sessions of a run write.
#[derive(Debug, Default)]
pub(crate) struct Habits {
    /// Of updates of a list, those that do not append.
    rewrite_ratio: f64,
    /// Of updates of a document, those that put something else for an object, or remove it.
    replace_ratio: f64,
}

impl Habits {
    pub(crate) fn of(rng: &mut StdRng) -> Self {
        Self {
            rewrite_ratio: *[0.0, 0.0, 0.2].choose(rng).unwrap(),
            replace_ratio: *[0.0, 0.2].choose(rng).unwrap(),
        }
    }

    /// What an insert or an update writes.
    pub(crate) fn next(&self, rng: &mut StdRng, fresh: i64, before: Option<Value>) -> Value {
        let number = fresh as i32;
        let Some(mut value) = before else {
            let null = id_of(&Field::Null);
            let elements: Vec<i32> = (0..5).filter(|_| rng.random_bool(0.3)).collect();
            let document = json!({"b": fresh, "a": {"x": fresh}});
            return [
                fresh,
                if elements.is_empty() {
                    null
                } else {
                    of_list(&elements)
                },
                if rng.random_bool(0.3) {
                    null
                } else {
                    of_list(&[number])
                },
                if rng.random_bool(0.3) {
                    null
                } else {
                    of_document(Some(&document))
                },
            ];
        };
        if rng.random_bool(0.2) {
            value[0] = fresh;
        }
        if rng.random_bool(0.6) {
            let mut elements = list(value[1]);
            for _ in 0..rng.random_range(0..3) {
                let one = rng.random_range(0..5);
                if elements.contains(&one) {
                    elements.retain(|other| *other != one);
                } else {
                    elements.push(one);
                }
            }
            // The order of a set is its writer's.
            if rng.random_bool(0.3) {
                elements.shuffle(rng);
            }
            value[1] = of_list(&elements);
        }
        if rng.random_bool(0.4) {
            let mut items = list(value[2]);
            if rng.random_bool(self.rewrite_ratio) {
                items.drain(..items.len().min(1));
            }
            items.push(number);
            value[2] = of_list(&items);
        }
        if rng.random_bool(0.5) {
            value[3] = of_document(self.edit(rng, fresh, document(value[3])).as_ref());
        }
        value
    }

    fn edit(&self, rng: &mut StdRng, fresh: i64, document: Option<Json>) -> Option<Json> {
        if rng.random_bool(self.replace_ratio) {
            return match rng.random_range(0..4) {
                0 => None,
                1 => Some(json!([fresh])),
                2 => Some(json!({"a": fresh})),
                _ => Some(json!({"b": fresh, "a": {"y": fresh}})),
            };
        }
        let Some(Json::Object(mut keys)) = document else {
            return Some(json!({"b": fresh}));
        };
        match (rng.random_range(0..3), keys.get_mut("a")) {
            (0, Some(Json::Object(below))) => write_key(rng, fresh, below, &["x", "y"]),
            (0, _) => drop(keys.insert("a".to_owned(), json!({"x": fresh}))),
            _ => write_key(rng, fresh, &mut keys, &["b", "c"]),
        }
        Some(Json::Object(keys))
    }
}

fn write_key(rng: &mut StdRng, fresh: i64, keys: &mut Map<String, Json>, names: &[&str]) {
    let name = *names.choose(rng).unwrap();
    if rng.random_bool(0.2) {
        keys.remove(name);
    } else {
        keys.insert(name.to_owned(), json!(fresh));
    }
}

/// Wrong: a column of a row that is there, changed from `old` to `new` as the update arrives.
pub(crate) fn arrive(at: usize, here: i64, old: i64, new: i64) -> i64 {
    if old == new {
        return here;
    }
    match at {
        1 => {
            let (mut elements, old, new) = (set(here), set(old), set(new));
            elements.retain(|one| !old.contains(one) || new.contains(one));
            elements.extend(new.difference(&old));
            of_list(&elements.into_iter().collect::<Vec<_>>())
        }
        2 => appended(here, old, new),
        3 => of_document(edited(document(here), document(old), document(new)).as_ref()),
        _ => unreachable!(),
    }
}

fn appended(here: i64, old: i64, new: i64) -> i64 {
    let (mut items, was) = (list(here), list(old));
    match list(new).strip_prefix(&was[..]) {
        Some(tail) => {
            items.extend(tail);
            if items == list(new) { new } else { of_list(&items) }
        }
        None => new,
    }
}

fn edited(here: Option<Json>, old: Option<Json>, new: Option<Json>) -> Option<Json> {
    if old == new {
        return here;
    }
    let was = match old {
        None => Map::new(),
        Some(Json::Object(was)) => was,
        Some(_) => return new,
    };
    match (here, new) {
        (Some(Json::Object(mut here)), Some(Json::Object(new))) => {
            let names: BTreeSet<String> = was.keys().chain(new.keys()).cloned().collect();
            for name in names {
                let value = edited(
                    here.remove(&name),
                    was.get(&name).cloned(),
                    new.get(&name).cloned(),
                );
                value.map(|value| here.insert(name, value));
            }
            Some(Json::Object(here))
        }
        (_, new) => new,
    }
}

/// A row, folded by the oracle.
#[derive(Debug, Clone)]
pub(crate) struct Folded {
    pub(crate) value: Value,
    inserted: bool,
    /// Which writes put an element where others may not have seen it.
    adds: BTreeMap<i32, BTreeSet<usize>>,
}

/// A write: which of the history, its old and new values, and who has seen whom.
pub(crate) struct Write<'a> {
    pub(crate) number: usize,
    pub(crate) old: Option<&'a Value>,
    pub(crate) new: &'a Value,
    pub(crate) covers: &'a dyn Fn(usize) -> bool,
}

impl Write<'_> {
    fn added(&self) -> Vec<i32> {
        let was = self.old.map_or_else(BTreeSet::new, |old| set(old[1]));
        set(self.new[1]).difference(&was).copied().collect()
    }

    fn removed(&self) -> Vec<i32> {
        let was = self.old.map_or_else(BTreeSet::new, |old| set(old[1]));
        was.difference(&set(self.new[1])).copied().collect()
    }

    fn changes(&self, at: usize) -> bool {
        self.old.is_none_or(|old| old[at] != self.new[at])
    }

    fn appends(&self) -> bool {
        self.old
            .is_none_or(|old| list(self.new[2]).starts_with(&list(old[2])))
    }
}

/// One step of the fold.
pub(crate) fn fold_one(here: Option<Folded>, covers_all: bool, write: &Write<'_>) -> Folded {
    let new = write.new;
    let mut folded = match here {
        Some(here) if !covers_all => here,
        here => {
            let inserted = here.as_ref().map_or(write.old.is_none(), |here| here.inserted);
            let mut adds = here.map(|here| here.adds).unwrap_or_default();
            let wanted = set(new[1]);
            let added = write.added();
            adds.retain(|one, _| wanted.contains(one) && !added.contains(one));
            adds.extend(added.into_iter().map(|one| (one, BTreeSet::from([write.number]))));
            return Folded {
                value: *new,
                inserted,
                adds,
            };
        }
    };
    let null = id_of(&Field::Null);
    let old = write.old.copied().unwrap_or([-1, null, null, null]);
    let value = &mut folded.value;
    if write.changes(0) {
        value[0] = new[0];
    }
    if write.changes(1) {
        let mut elements = set(value[1]);
        for one in write.removed() {
            let adds = folded.adds.entry(one).or_default();
            adds.retain(|add| !(write.covers)(*add));
            if adds.is_empty() {
                elements.remove(&one);
                folded.adds.remove(&one);
            }
        }
        for one in write.added() {
            elements.insert(one);
            folded.adds.entry(one).or_default().insert(write.number);
        }
        value[1] = if elements == set(new[1]) {
            new[1]
        } else {
            of_list(&elements.into_iter().collect::<Vec<_>>())
        };
    }
    if write.changes(2) {
        value[2] = if write.old.is_some() || folded.inserted {
            appended(value[2], old[2], new[2])
        } else {
            new[2]
        };
    }
    if write.changes(3) {
        value[3] = of_document(edited(document(value[3]), document(old[3]), document(new[3])).as_ref());
    }
    folded.inserted |= write.old.is_none();
    folded
}

/// Does the later write take something from the other, neither having seen the other, both with rows?
pub(crate) fn is_lost(low: &Write<'_>, high: &Write<'_>) -> bool {
    let both = |at: usize| low.changes(at) && high.changes(at) && low.new[at] != high.new[at];
    let replaces = match (low.old, high.old) {
        (_, Some(_)) => !high.appends(),
        (old, None) => old.is_some(),
    };
    both(0)
        || both(2) && replaces
        || both(3)
            && clash(
                (low.old.and_then(|old| document(old[3])), document(low.new[3])),
                (high.old.and_then(|old| document(old[3])), document(high.new[3])),
            )
}

fn clash(low: (Option<Json>, Option<Json>), high: (Option<Json>, Option<Json>)) -> bool {
    if low.0 == low.1 || high.0 == high.1 || low.1 == high.1 {
        return false;
    }
    let below = |value: &Option<Json>| value.as_ref().is_none_or(Json::is_object);
    match (&low.1, &high.1) {
        (Some(Json::Object(a)), Some(Json::Object(b))) if below(&low.0) && below(&high.0) => {
            let of =
                |value: &Option<Json>, name: &str| value.as_ref().and_then(|value| value.get(name)).cloned();
            let former = [&low.0, &high.0]
                .into_iter()
                .flatten()
                .filter_map(Json::as_object);
            let names: BTreeSet<String> = former.chain([a, b]).flat_map(Map::keys).cloned().collect();
            names.iter().any(|name| {
                clash(
                    (of(&low.0, name), of(&low.1, name)),
                    (of(&high.0, name), of(&high.1, name)),
                )
            })
        }
        _ => true,
    }
}

/// What the columns are for, of a row that was made once and never removed; `writes` in stamp order. Gives what is wrong.
pub(crate) fn check_meaning(value: Value, writes: &[Write<'_>]) -> Result<(), String> {
    // Each element is there as long as there is an add that nobody who had seen it took back.
    let stays = |one: i32| {
        writes.iter().any(|add| {
            let took = |other: &Write<'_>| other.removed().contains(&one) && (other.covers)(add.number);
            add.added().contains(&one) && !writes.iter().any(took)
        })
    };
    let wanted: BTreeSet<i32> = (0..5).filter(|one| stays(*one)).collect();
    if set(value[1]) != wanted {
        return Err(format!("the set is {:?}, must be {wanted:?}", list(value[1])));
    }
    // Everything that was appended, once, in stamp order.
    if writes.iter().all(Write::appends) {
        let tails = writes.iter().flat_map(|write| {
            let from = write.old.map_or(0, |old| list(old[2]).len());
            list(write.new[2]).split_off(from)
        });
        let wanted: Vec<i32> = tails.collect();
        if list(value[2]) != wanted {
            return Err(format!("the list is {:?}, must be {wanted:?}", list(value[2])));
        }
    }
    // Where a document is an object in all writes, each key is what its last writer wrote.
    let objects = |value: &Value| document(value[3]).is_none_or(|document| document.is_object());
    let was_null = writes.iter().any(|write| {
        write
            .old
            .is_some_and(|old| document(old[3]).is_some() && document(write.new[3]).is_none())
    });
    if was_null || !writes.iter().all(|write| objects(write.new)) {
        return Ok(());
    }
    for name in ["b", "c"] {
        let of = |value: &Value| document(value[3]).and_then(|document| document.get(name).cloned());
        let mut writers = writes
            .iter()
            .filter(|write| write.old.and_then(&of) != of(write.new));
        let wanted = writers.next_back().and_then(|write| of(write.new));
        if of(&value) != wanted {
            return Err(format!("key {name} is {:?}, must be {wanted:?}", of(&value)));
        }
    }
    Ok(())
}
