//! What a check saw, in words an operator can act on.

use serde::Serialize;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Works, but somebody should know.
    Warn,
    /// Does not work; `init` refuses, `doctor` fails.
    Fail,
}

/// One row of `doctor`, one line of `init`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, such as `wal_level` or `table public.orders`.
    pub check: String,
    /// How bad it is.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What to do about it; empty when nothing is to be done.
    pub remedy: String,
}

impl Finding {
    /// As it should be.
    #[must_use]
    pub fn ok(check: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            check: check.into(),
            level: Level::Ok,
            found: found.into(),
            remedy: String::new(),
        }
    }

    /// Works, but somebody should know.
    #[must_use]
    pub fn warn(check: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            check: check.into(),
            level: Level::Warn,
            found: found.into(),
            remedy: remedy.into(),
        }
    }

    /// Does not work.
    #[must_use]
    pub fn fail(check: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            check: check.into(),
            level: Level::Fail,
            found: found.into(),
            remedy: remedy.into(),
        }
    }

    /// The same, where it is in the way of nothing.
    #[must_use]
    pub(super) fn told(self) -> Self {
        Self {
            level: Level::Warn,
            ..self
        }
    }
}

/// The worst level among `findings`; `Ok` when there are none.
#[must_use]
pub fn worst(findings: &[Finding]) -> Level {
    findings
        .iter()
        .map(|finding| finding.level)
        .max()
        .unwrap_or(Level::Ok)
}
