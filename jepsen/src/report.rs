//! Verdicts for people.

use comfy_table::{ContentArrangement, LineStyle, Table, TableStyle};

use crate::checker::{Answer, Verdict};
use crate::history::History;

/// The page of one run.
pub fn html(_history: &History, _verdicts: &[Verdict]) -> String {
    String::new()
}

/// A table of checks.
pub fn table(verdicts: &[Verdict]) -> String {
    let mut table = Table::new();
    table
        .load_style(TableStyle::new().header_separator(LineStyle::new('─', '─', '─', '─')))
        .set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["check", "verdict", "looked at / found"]);
    for verdict in verdicts {
        let (word, found) = match &verdict.answer {
            Answer::Holds { looked_at } => ("holds", looked_at.to_string()),
            Answer::Violated { count, findings } => {
                let first: String = findings
                    .first()
                    .map_or("", String::as_str)
                    .chars()
                    .take(90)
                    .collect();
                ("VIOLATED", format!("{count}: {first}..."))
            }
            Answer::Unknown { why } => ("could not tell", why.clone()),
        };
        table.add_row([verdict.check.name(), word.to_owned(), found]);
    }
    table.to_string()
}
