//! What happens in a run, written down while it happens, outside of the run: so it is there, too, when the run is given up.
//!
//! In:   a header, [`Event`]s        Out: a [`History`], whole or as far as it went

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::history::{Event, Header, History};

/// What was written down so far. Clones are the same record.
#[derive(Debug, Clone, Default)]
pub struct Record(Arc<Mutex<Recorded>>);

#[derive(Debug, Default)]
struct Recorded {
    /// None before the load: until then nothing happens of which anybody could judge.
    header: Option<Header>,
    events: Vec<Event>,
}

impl Record {
    fn open(&self) -> MutexGuard<'_, Recorded> {
        // Whoever panicked had not begun to write, or was through.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The load begins.
    pub fn begin(&self, header: Header) {
        self.open().header = Some(header);
    }

    /// One thing more happened.
    pub fn tell(&self, event: Event) {
        self.open().events.push(event);
    }

    /// Several more, in this order.
    pub fn tell_all(&self, events: impl IntoIterator<Item = Event>) {
        self.open().events.extend(events);
    }

    /// All of it; none if the load never began.
    pub fn take(&self) -> Option<History> {
        let mut recorded = self.open();
        let header = recorded.header.take()?;
        let events = std::mem::take(&mut recorded.events);
        Some(History { header, events })
    }
}

/// What a panic said.
pub fn said(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it did not say why").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Fault;

    fn fault(at_us: i64) -> Event {
        Event::Fault(Fault {
            at_us,
            name: "a fault".to_owned(),
            phase: "start".to_owned(),
            detail: String::new(),
        })
    }

    #[test]
    fn what_was_told_before_a_panic_is_there_after_it() {
        let record = Record::default();
        record.tell(fault(1));
        assert_eq!(record.take(), None, "the load never began");
        record.begin(Header::default());
        let teller = record.clone();
        let panic = std::thread::spawn(move || {
            teller.tell_all([fault(2), fault(3)]);
            panic!("{} went wrong", "it");
        });
        assert_eq!(said(&*panic.join().unwrap_err()), "it went wrong");
        let history = record.take().unwrap();
        assert_eq!(history.events, [fault(1), fault(2), fault(3)]);
    }
}
