//! Values that are appended to: text, arrays, lists in `jsonb`.
//!
//! In:   old and new values of a write      Out: the value
//! Invariants: what a write put behind what it had read is put behind what is there, once. A write that changes more than
//!        that is no append, and is written as it is
//! Not here: the order of the writes, which is that of their stamps (the parent module)

use bytes::Bytes;

use super::array::{self, Element};
use super::{Effect, Field, json};

/// What values are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum List {
    /// `text` or `varchar`, by bytes.
    Text,
    /// A one-dimensional array, its elements of this type.
    Array(u32),
    /// An array in `jsonb`.
    Jsonb,
}

/// A value in its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Parts {
    Bytes(Bytes),
    Elements(Vec<Element>),
}

impl Parts {
    /// What stands behind `head`.
    fn behind(&self, head: &Self) -> Option<Self> {
        Some(match (self, head) {
            (Self::Bytes(all), Self::Bytes(head)) => Self::Bytes(all.slice_ref(all.strip_prefix(&head[..])?)),
            (Self::Elements(all), Self::Elements(head)) => {
                Self::Elements(all.strip_prefix(&head[..])?.to_vec())
            }
            _ => return None,
        })
    }

    /// What stands before `tail`.
    fn before(&self, tail: &Self) -> Option<Self> {
        Some(match (self, tail) {
            (Self::Bytes(all), Self::Bytes(tail)) => Self::Bytes(all.slice_ref(all.strip_suffix(&tail[..])?)),
            (Self::Elements(all), Self::Elements(tail)) => {
                Self::Elements(all.strip_suffix(&tail[..])?.to_vec())
            }
            _ => return None,
        })
    }

    fn then(self, tail: Self) -> Option<Self> {
        Some(match (self, tail) {
            (Self::Bytes(all), Self::Bytes(tail)) => Self::Bytes([all, tail].concat().into()),
            (Self::Elements(mut all), Self::Elements(tail)) => {
                all.extend(tail);
                Self::Elements(all)
            }
            _ => return None,
        })
    }
}

impl List {
    /// NULL is empty. `None`: no list.
    fn read(self, field: &Field) -> Option<Parts> {
        match (self, field) {
            (Self::Text, Field::Null) => Some(Parts::Bytes(Bytes::new())),
            (_, Field::Null) => Some(Parts::Elements(Vec::new())),
            (Self::Text, Field::Binary(value)) => Some(Parts::Bytes(value.clone())),
            (Self::Array(element), Field::Binary(value)) => array::read(value, element).map(Parts::Elements),
            (Self::Jsonb, Field::Binary(value)) => {
                let elements = json::elements(value)?;
                Some(Parts::Elements(elements.into_iter().map(Some).collect()))
            }
            (_, Field::Text(_) | Field::Absent) => None,
        }
    }

    fn write(self, parts: &Parts) -> Field {
        Field::Binary(match (self, parts) {
            (_, Parts::Bytes(value)) => value.clone(),
            (Self::Array(element), Parts::Elements(elements)) => array::write(element, elements.iter()),
            (_, Parts::Elements(elements)) => json::list(elements.iter().flatten()),
        })
    }

    /// What an update from `old` to `new` appends; `None`: it does something else.
    fn tail(self, old: &Field, new: &Field) -> Option<Parts> {
        self.read(new)?.behind(&self.read(old)?)
    }

    /// `here`, once an update from `old` to `new` comes over it.
    pub(super) fn change(self, here: &Field, old: &Field, new: &Field) -> Field {
        let whole = self.tail(old, new).and_then(|tail| self.read(here)?.then(tail));
        match whole {
            Some(whole) if self.read(new).as_ref() != Some(&whole) => self.write(&whole),
            _ => new.clone(),
        }
    }

    /// What `here` was before an update from `old` to `new` came over it; `None`: that cannot be told from it.
    pub(super) fn undo(self, here: &Field, old: &Field, new: &Field) -> Option<Field> {
        let tail = self.tail(old, new)?;
        Some(self.write(&self.read(here)?.before(&tail)?))
    }

    /// Does the later write `higher` of the column `at` take away what `lower` wrote?
    pub(super) fn is_lost(self, at: usize, lower: &Effect, higher: &Effect) -> bool {
        let (Some(low), Some(high)) = (lower.row(), higher.row()) else {
            return false;
        };
        let (Some(low), Some(high)) = (low.get(at), high.get(at)) else {
            return false;
        };
        let appends = match higher.seen(at) {
            Some(old) => self.tail(old, high).is_some(),
            // Both began from nothing.
            None => matches!(lower, Effect::Put(_) | Effect::Replace(_)),
        };
        lower.changes(at) && higher.changes(at) && low != high && !appends
    }
}
