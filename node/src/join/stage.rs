//! How far a join is, for `anabranch status`: while it copies no daemon of this node answers, and where the command was killed nobody does.
//!
//! In:   the join's [`Event`]s            Out: `join_stage.json` in the daemon's folder; words for people
//! On crash: the file says how far the join was, and by which process

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Event, Report, state};

const FILE: &str = "join_stage.json";
/// How often it is written down how much is copied.
const WRITE_EVERY: Duration = Duration::from_secs(1);

/// What the command said last.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Stage {
    pid: u32,
    step: String,
    /// When the step began.
    since: String,
    /// What it waits for.
    waiting: Option<String>,
    /// The last thing that somebody should know, such as why all is copied anew.
    note: Option<String>,
    /// Of the donor's tables, bytes.
    copied: u64,
    size: u64,
}

impl Stage {
    /// Takes an event in. Tells whether it is to be written down at once.
    fn take(&mut self, event: &Event, now: String) -> bool {
        match event {
            Event::Step { what } => {
                (self.step, self.since) = (what.clone(), now);
                self.waiting = None;
            }
            Event::Waiting { on } => self.waiting = Some(on.clone()),
            Event::Size { bytes, .. } => {
                "copy the rows".clone_into(&mut self.step);
                (self.since, self.copied, self.size) = (now, 0, *bytes);
                self.waiting = None;
            }
            Event::Copied { bytes, .. } => {
                self.copied = self.copied.saturating_add(*bytes);
                self.waiting = None;
                return false;
            }
            Event::Built { .. } => return false,
            Event::Note { text } => self.note = Some(text.clone()),
        }
        true
    }

    fn text(&self, runs: bool) -> String {
        let mib = |bytes: u64| bytes >> 20;
        let mut out = match runs {
            true => format!("`anabranch join` is at work: {}, since {}", self.step, self.since),
            false => format!(
                "a join is unfinished, and nobody is at it (run `anabranch join` again, which goes on with it): it came to {}, at {}",
                self.step, self.since
            ),
        };
        if self.size > 0 {
            out.push_str(&format!(
                "; {} of {} MiB are copied",
                mib(self.copied),
                mib(self.size)
            ));
        }
        if let Some(on) = self.waiting.as_ref().filter(|_| runs) {
            out.push_str(&format!("; waits for {on}"));
        }
        if let Some(note) = &self.note {
            out.push_str(&format!("; {note}"));
        }
        out
    }
}

/// What is reported is kept in the folder, too. That a file cannot be written ends no join.
pub(super) fn kept(data_dir: &Path, report: &Report) -> Report {
    let (path, report) = (data_dir.join(FILE), Arc::clone(report));
    let begun = Stage {
        pid: std::process::id(),
        ..Stage::default()
    };
    let kept = Mutex::new((begun, Instant::now()));
    Arc::new(move |event: Event| {
        {
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            let (stage, written) = &mut *kept;
            if stage.take(&event, jiff::Timestamp::now().to_string()) || written.elapsed() >= WRITE_EVERY {
                *written = Instant::now();
                let text = serde_json::to_vec_pretty(stage).unwrap_or_default();
                if let Err(error) = crate::small_file::replace(&path, &text) {
                    tracing::debug!(%error, "cannot write {FILE} in node.data_dir");
                }
            }
        }
        report(event);
    })
}

/// Nothing is left to tell.
pub(super) fn forget(data_dir: &Path) {
    let _ = std::fs::remove_file(data_dir.join(FILE));
}

/// How far the unfinished join of a node is, in words; none where there is none. Needs neither a daemon nor a database.
#[must_use]
pub fn stage(data_dir: &Path) -> Option<String> {
    if !state::is_begun(data_dir) {
        return None;
    }
    let read = std::fs::read(data_dir.join(FILE)).ok();
    let stage = read.and_then(|text| serde_json::from_slice::<Stage>(&text).ok());
    Some(stage.map_or_else(
        || "a join is unfinished: run `anabranch join` again, which goes on with it".to_owned(),
        |stage| stage.text(is_alive(stage.pid)),
    ))
}

/// Is there such a process, whosever it is?
fn is_alive(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_the_step_and_why_it_began_anew() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(stage(dir.path()), None);
        std::fs::write(dir.path().join("join.json"), b"{}").unwrap();
        assert!(stage(dir.path()).unwrap().contains("unfinished"));
        let silent: Report = Arc::new(|_| {});
        let report = kept(dir.path(), &silent);
        let say = |event| {
            report(event);
            stage(dir.path()).unwrap()
        };
        let text = "what was copied before is of a snapshot that is gone".to_owned();
        say(Event::Note { text });
        let size = Event::Size {
            tables: 1,
            bytes: 8 << 20,
        };
        let said = say(size);
        assert!(said.contains("at work: copy the rows"), "{said}");
        assert!(
            said.contains("0 of 8 MiB") && said.contains("snapshot that is gone"),
            "{said}"
        );
        report(Event::Copied {
            table: "public.item".to_owned(),
            rows: 1,
            bytes: 3 << 20,
            before: false,
        });
        let said = say(Event::Waiting {
            on: "donor `n1`".to_owned(),
        });
        assert!(
            said.contains("3 of 8 MiB") && said.contains("waits for donor `n1`"),
            "{said}"
        );
        // Killed: no process has that number.
        let killed = Stage {
            pid: u32::MAX,
            step: "copy the rows".to_owned(),
            ..Stage::default()
        };
        std::fs::write(dir.path().join(FILE), serde_json::to_vec(&killed).unwrap()).unwrap();
        let said = stage(dir.path()).unwrap();
        assert!(
            said.contains("nobody is at it") && said.contains("copy the rows"),
            "{said}"
        );
    }
}
