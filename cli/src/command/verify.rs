//! `anabranch verify` and `anabranch repair`: the daemon asks every node; here its events become bars, tables, JSON.
//!
//! Exit codes are those of `diff`: 0 equal, 1 different, 2 could not tell, whatever the reason.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

use anabranch_node::admin;
use anabranch_node::verify::{self, Difference, Event, Options, Report, TableReport, Verdict};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::args;
use crate::failure::Failure;
use crate::output::{self, Format, say_plainly};

/// Rows that a table lists for people; JSON has all.
const SHOWN_MAX: usize = 50;

pub(crate) async fn verify(path: &Path, verb: &args::Verify, format: Format) -> ExitCode {
    end(ask(path, options(verb, None), format).await, format)
}

pub(crate) async fn repair(path: &Path, verb: &args::Repair, format: Format) -> ExitCode {
    let repair = verify::Repair {
        from: verb.from.clone(),
        dry_run: verb.dry_run,
        absent_at: None,
    };
    end(
        ask(path, options(&verb.verify, Some(repair)), format).await,
        format,
    )
}

fn options(verb: &args::Verify, repair: Option<verify::Repair>) -> Options {
    Options {
        tables: verb.tables.clone(),
        rate: verb.rate,
        rows_max: verb.limit,
        patience_s: verb.patience,
        repair,
        add: None,
    }
}

fn end(verdict: Result<Verdict, Failure>, format: Format) -> ExitCode {
    match verdict {
        Ok(Verdict::Equal) => ExitCode::SUCCESS,
        Ok(Verdict::Different) => ExitCode::from(1),
        Ok(Verdict::Unknown) => ExitCode::from(2),
        Err(failure) => {
            let _ = crate::report(&failure, format);
            ExitCode::from(2)
        }
    }
}

async fn ask(path: &Path, options: Options, format: Format) -> Result<Verdict, Failure> {
    let config = super::load(path)?;
    let dry_run = options.repair.as_ref().is_some_and(|repair| repair.dry_run);
    let mut progress = Progress::new(format);
    let mut report = None;
    let socket = config.node.data_dir.join(admin::SOCKET);
    let asked = admin::verify(&socket, &options, |event| match event {
        Event::Report(last) => report = Some(last),
        event => progress.show(&event),
    })
    .await;
    progress.end();
    asked?;
    let report = report.ok_or_else(|| {
        Failure::Refused("the daemon went away before all was compared; run this again".to_owned())
    })?;
    match format {
        Format::Json => {
            let report = Event::Report(report.clone());
            output::line(&serde_json::to_value(&report).unwrap_or_default())?;
        }
        Format::Table => say_plainly(&words(&report, dry_run))?,
    }
    Ok(report.verdict)
}

/// A bar for each node on a terminal, lines of JSON for programs, a line for each step elsewhere.
pub(crate) struct Progress {
    format: Format,
    bars: Option<indicatif::MultiProgress>,
    nodes: BTreeMap<String, ProgressBar>,
    line: ProgressBar,
}

impl Progress {
    pub(crate) fn new(format: Format) -> Self {
        let shown = format == Format::Table && std::io::stderr().is_terminal();
        let bars = shown.then(|| indicatif::MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        let line = bars
            .as_ref()
            .map_or_else(ProgressBar::hidden, |bars| bars.add(ProgressBar::new_spinner()));
        Self {
            format,
            bars,
            nodes: BTreeMap::new(),
            line,
        }
    }

    pub(crate) fn show(&mut self, event: &Event) {
        if self.format == Format::Json {
            // Who reads the events went away: the report's line fails in the same way.
            let _ = output::line(&serde_json::to_value(event).unwrap_or_default());
            return;
        }
        match event {
            Event::Started { nodes, .. } => {
                let Some(bars) = &self.bars else { return };
                for node in nodes {
                    let bar = bars.add(ProgressBar::new(0));
                    let style = ProgressStyle::with_template(
                        "{prefix:>12} {wide_bar} {human_pos}/{human_len} rows {per_sec} {eta}",
                    );
                    if let Ok(style) = style {
                        bar.set_style(style);
                    }
                    bar.set_prefix(node.clone());
                    self.nodes.insert(node.clone(), bar);
                }
            }
            Event::Step { table, what, rows } => {
                self.line.set_message(format!("{table}: {what}"));
                let each = rows / (self.nodes.len().max(1) as u64);
                for bar in self.nodes.values().filter(|_| *rows > 0) {
                    bar.reset();
                    bar.set_length(each);
                }
                if self.bars.is_none() {
                    output::remark(format_args!("{table}: {what}"));
                }
            }
            Event::Read { node, rows, .. } => {
                if let Some(bar) = self.nodes.get(node) {
                    bar.inc(*rows);
                }
            }
            Event::Waiting { on } => {
                let text = output::plain(&format!("waiting for {}", on.join("; "))).into_owned();
                match &self.bars {
                    // What cannot be told is told nobody else.
                    Some(bars) => drop(bars.println(text)),
                    None => output::remark(text),
                }
            }
            Event::Brought { rows, .. } => {
                // As many as were counted for all nodes together.
                for bar in self.nodes.values() {
                    bar.inc(*rows);
                }
            }
            Event::Report(_) => {}
        }
        self.line.tick();
    }

    pub(crate) fn end(&self) {
        self.line.finish_and_clear();
        for bar in self.nodes.values() {
            bar.finish_and_clear();
        }
    }
}

pub(crate) fn words(report: &Report, dry_run: bool) -> String {
    let mut out = String::new();
    if !report.tables.is_empty() {
        let rows = report.tables.iter().map(|table| {
            let counts: Vec<String> = table
                .rows
                .iter()
                .map(|(node, rows)| format!("{node} {rows}"))
                .collect();
            [
                table.table.clone(),
                counts.join(", "),
                format!("{} of {}", table.blocks_read, table.blocks),
                result(table),
            ]
        });
        out.push_str(&output::table(["table", "rows", "blocks read", "result"], rows));
    }
    for table in &report.tables {
        details(&mut out, table, dry_run);
    }
    for problem in &report.problems {
        out.push_str(&format!("NOT COMPLETE: {problem}\n"));
    }
    out.push_str(match report.verdict {
        Verdict::Equal => "equal\n",
        Verdict::Different => "DIFFERENT\n",
        Verdict::Unknown => "could not tell\n",
    });
    out
}

fn result(table: &TableReport) -> String {
    let mut parts = Vec::new();
    let open = table.differences.iter().filter(|row| !row.mended).count();
    let mended = table.differences.len() - open;
    let more = if table.more { " and more" } else { "" };
    if !(table.shape.is_empty() && table.types.is_empty()) {
        parts.push("other tables".to_owned());
    }
    if open > 0 || table.more {
        parts.push(format!("{open}{more} differ"));
    }
    if mended > 0 {
        parts.push(format!("{mended} mended"));
    }
    if !table.quarantined.is_empty() {
        parts.push(format!("{} in quarantine", table.quarantined.len()));
    }
    if !table.undecided.is_empty() {
        parts.push(format!("{} undecided", table.undecided.len()));
    }
    let brought = table
        .brought
        .iter()
        .map(|(node, rows)| format!("{rows} brought to {node}"));
    if parts.is_empty() {
        parts.push("equal".to_owned());
    }
    parts.extend(brought);
    parts.join(", ")
}

fn details(out: &mut String, table: &TableReport, dry_run: bool) {
    let name = &table.table;
    for said in table.shape.iter().chain(&table.types) {
        out.push_str(&format!("{name}: {said}\n"));
    }
    let mut listed = |rows: &[Difference], what: &str| {
        for row in rows.iter().take(SHOWN_MAX) {
            out.push_str(&format!(
                "{name} {}: {what}{}\n",
                row.key,
                row_words(row, dry_run)
            ));
        }
        if rows.len() > SHOWN_MAX {
            let rest = rows.len() - SHOWN_MAX;
            out.push_str(&format!("{name}: {rest} more; --output json has all\n"));
        }
    };
    listed(&table.differences, "");
    listed(&table.quarantined, "in quarantine, so ");
    for key in table.undecided.iter().take(SHOWN_MAX) {
        out.push_str(&format!(
            "{name} {key}: written all the time; --patience waits longer for a quiet moment\n"
        ));
    }
    if table.more {
        out.push_str(&format!(
            "{name}: there is more that differs; --limit looks further\n"
        ));
    }
}

/// `n1 and n3 have one row, n2 another (v, w)`.
fn row_words(row: &Difference, dry_run: bool) -> String {
    let mut by_image: BTreeMap<Option<u32>, Vec<&str>> = BTreeMap::new();
    for (node, image) in &row.images {
        by_image.entry(*image).or_default().push(node);
    }
    let groups = by_image.iter().map(|(image, nodes)| {
        let nodes = nodes.join(", ");
        match image {
            None => format!("no row at {nodes}"),
            Some(1) => format!("one row at {nodes}"),
            Some(_) => format!("another at {nodes}"),
        }
    });
    let mut text = groups.collect::<Vec<_>>().join("; ");
    if !row.columns.is_empty() {
        text.push_str(&format!(" ({})", row.columns.join(", ")));
    }
    for action in &row.actions {
        let (node, what) = (&action.node, &action.what);
        text.push_str(&match (&action.refused, dry_run, row.mended) {
            (Some(why), ..) => format!("; {what} at {node} REFUSED: {why}"),
            (None, true, _) => format!("; would {what} at {node}"),
            (None, false, true) => format!("; {what} at {node} done"),
            (None, false, false) => format!("; {what} at {node} not done"),
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use anabranch_node::verify::Action;

    use super::*;

    #[test]
    fn a_row_is_described_by_who_has_what() {
        let images = [("n1", Some(1)), ("n2", Some(2)), ("n3", None)];
        let row = Difference {
            images: images
                .into_iter()
                .map(|(node, image)| (node.to_owned(), image))
                .collect(),
            columns: vec!["v".to_owned()],
            actions: vec![Action {
                node: "n2".to_owned(),
                what: "update".to_owned(),
                refused: None,
            }],
            ..Difference::default()
        };
        assert_eq!(
            row_words(&row, true),
            "no row at n3; one row at n1; another at n2 (v); would update at n2"
        );
    }
}
