//! Saying that the server is away, and not the same again and again: it may be for hours.

use std::time::Duration;

use tokio::time::Instant;

use super::Error;

/// The same is said again after this.
const AGAIN: Duration = Duration::from_secs(60);

/// What was said of a server that is waited for: the same is said again after a while only.
#[derive(Default)]
pub(super) struct Said {
    text: String,
    at: Option<Instant>,
}

impl Said {
    pub(super) fn say(&mut self, error: &Error) {
        let text = crate::error::chain(error);
        let is_news = text != self.text || self.at.is_none_or(|at| at.elapsed() > AGAIN);
        if !is_news {
            tracing::debug!(error = %text, "starting again");
            return;
        }
        let is_away = matches!(error, Error::Connect(_));
        if is_away {
            tracing::warn!(error = %text, "waiting for the server; it is asked again every few seconds");
        } else {
            tracing::warn!(error = %text, "starting again");
        }
        *self = Self {
            text,
            at: Some(Instant::now()),
        };
    }
}
