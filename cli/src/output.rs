//! Printing: tables for people, JSON for programs, both from the same values.

use std::borrow::Cow;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anabranch_node::review::visible_but;
use anabranch_node::setup::{Finding, Level};
use comfy_table::{ContentArrangement, LineStyle, Table, TableStyle};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::failure::Failure;

/// `--output`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// Has a write found that nobody reads standard output any more?
static IS_UNREAD: AtomicBool = AtomicBool::new(false);

/// Writes to standard output; a reader that went away (`| head`) is no failure of ours. Who goes on for ever asks [`unread`].
pub(crate) fn say(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            IS_UNREAD.store(true, Ordering::Relaxed);
            Ok(())
        }
        Err(error) => Err(Failure::io("print", error)),
        Ok(()) => Ok(()),
    }
}

/// As [`say`], for people, of what others have written: see [`plain`].
pub(crate) fn say_plainly(text: &str) -> Result<(), Failure> {
    say(&plain(text))
}

/// Text without what steers a terminal: whoever may write a row, or a note, could have put an escape sequence into it.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    visible_but(text, &['\n', '\t'])
}

/// Writes a line to standard error. Where that takes nothing any more (`2>&1 | head`, a disk that is full) there is nobody left to be told,
/// and what is under way goes on.
pub(crate) fn remark(text: impl std::fmt::Display) {
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// Ends once nobody reads standard output any more: of a pipe or a socket when its reader goes, of anything else when something was written
/// in vain. It looks once a second.
pub(crate) async fn unread() {
    while !IS_UNREAD.load(Ordering::Relaxed) && !has_no_reader() {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Does standard output say that its other end is gone? (A file has none.)
fn has_no_reader() -> bool {
    let out = std::io::stdout();
    let mut watched = PollFd::new(&out, PollFlags::empty());
    let gone = PollFlags::ERR | PollFlags::HUP;
    let looked = poll(std::slice::from_mut(&mut watched), Some(&Timespec::default()));
    looked.is_ok() && watched.revents().intersects(gone)
}

/// One JSON document on its own line(s).
pub(crate) fn json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Failure::io("print", error.into()))?;
    say(&format!("{text}\n"))
}

/// A table with a header; the last columns wrap to the terminal's width.
pub(crate) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    let style = TableStyle::new().header_separator(LineStyle::new('─', '─', '─', '─'));
    table
        .load_style(style)
        .set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(header);
    for row in rows {
        table.add_row(row.map(|cell| plain(&cell).into_owned()));
    }
    // Padding at the end of a line only makes it wrap.
    table
        .to_string()
        .lines()
        .map(|line| format!("{}\n", line.trim_end()))
        .collect()
}

/// Findings as a table; what is fine comes last and short.
pub(crate) fn findings(findings: &[Finding]) -> String {
    let mut sorted: Vec<&Finding> = findings.iter().collect();
    sorted.sort_by_key(|finding| std::cmp::Reverse(finding.level));
    table(
        ["check", "", "found", "remedy"],
        sorted.into_iter().map(|finding| {
            [
                finding.check.clone(),
                word(finding.level).to_owned(),
                finding.found.clone(),
                finding.remedy.clone(),
            ]
        }),
    )
}

/// A level as one word.
pub(crate) fn word(level: Level) -> &'static str {
    match level {
        Level::Ok => "ok",
        Level::Warn => "warn",
        Level::Fail => "FAIL",
    }
}

/// One JSON document in one line: a stream of events is read line by line.
pub(crate) fn line(value: &serde_json::Value) -> Result<(), Failure> {
    say(&format!("{value}\n"))
}

/// Tells what a long command waits for, whenever that changes: on a terminal beside a spinner, elsewhere as lines on standard
/// error, for programs as events.
pub(crate) struct Waiting {
    format: Format,
    bar: indicatif::ProgressBar,
    said: Option<serde_json::Value>,
}

impl Waiting {
    /// Nothing was said yet.
    pub(crate) fn new(format: Format) -> Self {
        Self {
            format,
            bar: spinner(),
            said: None,
        }
    }

    /// Says it: as `text`, or as `event`, which changes whenever there is something new.
    pub(crate) fn tell(&mut self, text: String, event: serde_json::Value) -> Result<(), Failure> {
        if self.said.as_ref() == Some(&event) {
            return Ok(());
        }
        match self.format {
            Format::Json => line(&event)?,
            Format::Table if self.bar.is_hidden() => remark(text),
            Format::Table => self.bar.set_message(text),
        }
        self.said = Some(event);
        Ok(())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A spinner on a terminal, nothing elsewhere.
pub(crate) fn spinner() -> indicatif::ProgressBar {
    if !std::io::stderr().is_terminal() {
        return indicatif::ProgressBar::hidden();
    }
    let bar = indicatif::ProgressBar::new_spinner();
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// 12.3 MiB.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_wrote_does_not_steer_the_terminal() {
        let written = "\u{1b}]0;owned\u{7}\u{9b}2J\r\tx\n";
        let shown = "\\u{1b}]0;owned\\u{7}\\u{9b}2J\\r\tx\n";
        assert_eq!(plain(written), shown);
        assert!(matches!(plain("Zürich 東京\n"), Cow::Borrowed(_)));
        let shown = table(["value"], [["a\u{1b}[2Jb".to_owned()]]);
        assert!(shown.contains("a\\u{1b}[2Jb"), "{shown}");
    }
}
