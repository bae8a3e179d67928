//! Lines of the log for people.

use anabranch_node::names::Names;
use anabranch_node::review::cluster::Joined;
use anabranch_node::review::{Filter, Line, visible};
use jiff::Timestamp;

use crate::output::table;

/// To the millisecond, in UTC.
pub(super) fn short_time(text: &str) -> String {
    match text.parse::<Timestamp>() {
        Ok(time) => format!("{time:.3}"),
        Err(_) => text.to_owned(),
    }
}

/// The first eight digits name a line, as long as no other begins so.
pub(super) fn short_id(id: &str) -> String {
    id.chars().take(8).collect()
}

/// A line's cells in [`listing`].
pub(super) fn cells(names: &Names, line: &Line) -> [String; 9] {
    [
        short_time(&line.detected_at),
        short_id(&line.conflict_id),
        line.table(),
        line.key_text(),
        line.conflict_type.clone(),
        names.of(line.winning_origin()),
        names.of(line.losing_origin()),
        match &line.lost_columns {
            Some(columns) if !columns.is_empty() => columns.join(", "),
            _ if line.lost_a_delete() => "(delete)".to_owned(),
            _ => String::new(),
        },
        line.status.to_string(),
    ]
}

pub(super) fn listing(names: &Names, lines: &[Line]) -> String {
    table(
        [
            "detected", "id", "table", "key", "type", "winner", "loser", "lost", "status",
        ],
        lines.iter().map(|line| cells(names, line)),
    )
}

/// The logs of all nodes; first of all what is missing of them.
pub(super) fn joined(names: &Names, filter: &Filter, joined: &Joined) -> String {
    let mut out: String = joined
        .missing()
        .into_iter()
        .map(|sentence| format!("NOT COMPLETE: {sentence}\n"))
        .collect();
    if joined.conflicts.is_empty() {
        out.push_str("no conflicts\n");
    } else {
        out.push_str(&table(
            [
                "detected",
                "id",
                "table",
                "key",
                "type",
                "winner",
                "loser",
                "lost",
                "status",
                "logged at",
            ],
            joined.conflicts.iter().map(|conflict| {
                let [detected, id, table, key, kind, winner, loser, lost, _] = cells(names, &conflict.line);
                let at: Vec<&str> = conflict.at.keys().map(String::as_str).collect();
                let status = conflict.status.to_string();
                [
                    detected,
                    id,
                    table,
                    key,
                    kind,
                    winner,
                    loser,
                    lost,
                    status,
                    at.join(", "),
                ]
            }),
        ));
    }
    for node in joined.nodes.iter().filter(|node| node.only_counted > 0) {
        out.push_str(&format!(
            "node {} counted {} more losing write(s) without keeping them{}\n",
            node.name,
            node.only_counted,
            if filter.is_of_lines_alone() {
                "; whether any of them is asked for is not known"
            } else {
                ""
            }
        ));
    }
    out
}

/// How many more losing writes were only counted.
pub(super) fn counted(filter: &Filter, count: i64) -> String {
    let see = "that came too fast and were only counted: see anabranch.conflict_storm";
    match (count, filter.is_of_lines_alone()) {
        (0, _) => String::new(),
        (_, false) => format!("and {count} losing write(s) {see}\n"),
        (_, true) => format!("{}, {see}\n", unknown(count)),
    }
}

/// Of what is only counted neither key nor transaction is kept, and it has no status.
pub(super) fn unknown(count: i64) -> String {
    format!("not known: how many are asked for of {count} more losing write(s) in that time")
}

/// One line, its rows side by side, and what else its transaction lost.
pub(super) fn one(names: &Names, line: &Line, others: &[Line]) -> String {
    let optional = |text: &Option<String>| text.clone().unwrap_or_default();
    let mut out = format!(
        "conflict   {}\ndetected   {} at node {}\ntable      {}\nkey        {}\n\
         type       {}, policy {}\nresolution {} ({}: {}, the write of {})\nstatus     {}\n",
        line.conflict_id,
        line.detected_at,
        line.node,
        line.table(),
        line.key_text(),
        line.conflict_type,
        line.policy,
        line.conflict_resolution,
        if line.is_orphan() {
            "without its parent"
        } else {
            "lost"
        },
        line.loser,
        names.of(line.losing_origin()),
        status(line),
    );
    let number = |number: Option<u64>| number.map_or_else(String::new, |number| number.to_string());
    if let Some(xid) = line.apply_xid {
        out.push_str(&format!("applied in transaction {xid}\n"));
    }
    let row = |label: &str, local: String, remote: String| [label.to_owned(), local, remote];
    out.push_str(&table(
        ["", "local", "remote"],
        [
            row(
                "origin",
                names.of(line.local_origin),
                names.of(line.remote_origin),
            ),
            row(
                "commit time",
                optional(&line.local_commit_time),
                optional(&line.remote_commit_time),
            ),
            row("stamp", optional(&line.local_stamp), optional(&line.remote_stamp)),
            row("xid", number(line.local_xid), number(line.remote_xid)),
            row("LSN", optional(&line.local_lsn), optional(&line.remote_lsn)),
            row(
                "had seen of the other",
                optional(&line.local_saw),
                optional(&line.remote_saw),
            ),
        ],
    ));
    out.push_str(&tuples(line));
    if let Some(error) = &line.error {
        // The server's words may repeat any value of the row.
        out.push_str(&format!(
            "error {}: {} {}\n",
            optional(&error.sqlstate),
            visible(&optional(&error.message)),
            visible(&optional(&error.detail))
        ));
        if let Some(context) = &error.context {
            let lines: Vec<String> = context.lines().map(visible).collect();
            out.push_str(&format!("  context: {}\n", lines.join("\n")));
        }
    }
    if let Some(constraint) = &line.constraint_name {
        out.push_str(&format!("constraint {constraint}\n"));
    }
    if !others.is_empty() {
        let each: Vec<String> = others
            .iter()
            .map(|other| {
                format!(
                    "{} ({} {})",
                    short_id(&other.conflict_id),
                    other.table(),
                    other.key_text()
                )
            })
            .collect();
        out.push_str(&format!("the losing transaction lost also {}\n", each.join("; ")));
    }
    out
}

fn status(line: &Line) -> String {
    let mut out = line.status.to_string();
    if let (Some(by), Some(at)) = (&line.reviewed_by, &line.reviewed_at) {
        out.push_str(&format!(" by {by} at {}", short_time(at)));
    }
    if let Some(note) = &line.note {
        out.push_str(&format!(": {note}"));
    }
    out
}

/// The three rows, one line a column. `*` where the two sides differ, `lost` where the loser's value is gone.
fn tuples(line: &Line) -> String {
    let rows = line.columns().into_iter().map(|column| {
        let mark = match (line.is_lost(column), line.is_changed(column)) {
            (true, _) => "* lost",
            (false, true) => "*",
            (false, false) => "",
        };
        [
            mark.to_owned(),
            column.to_owned(),
            line.shown(line.local_tuple.as_ref(), column),
            line.shown(line.remote_tuple.as_ref(), column),
            line.shown(line.applied_tuple.as_ref(), column),
        ]
    });
    let mut out = table(["", "column", "local", "remote", "applied"], rows);
    for (side, tuple) in [
        ("local", &line.local_tuple),
        ("remote", &line.remote_tuple),
        ("applied", &line.applied_tuple),
    ] {
        if tuple.is_none() {
            out.push_str(&format!("{side}: no row\n"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use anabranch_node::config::Config;

    use super::*;

    #[test]
    fn a_conflict_is_shown_side_by_side() {
        let line: Line = serde_json::from_str(
            r#"{"conflict_id": "0b5f0b8e-0000-4000-8000-000000000000", "detected_at": "2026-11-24T10:00:00.123456+00:00",
            "lost_at": "2026-11-24T09:59:59.5+00:00", "node": "alpha", "node_id": 1, "schema_name": "public",
            "table_name": "t", "key": {"id": 7}, "conflict_type": "update_origin_differs", "policy": "last_update_wins",
            "conflict_resolution": "apply_remote", "loser": "local", "local_origin": 1, "remote_origin": 2,
            "local_tuple": {"id": 7, "v": "here", "n": 12345678901234567890.10},
            "remote_tuple": {"id": 7, "v": "there", "n": 12345678901234567890.10},
            "applied_tuple": {"id": 7, "v": "there", "n": 12345678901234567890.10},
            "changed_columns": ["v"], "lost_columns": ["v"], "local_saw": "0/0", "remote_saw": "0/100",
            "transaction_group": "6592008000000000.1", "status": "acknowledged", "reviewed_by": "kim",
            "reviewed_at": "2026-11-24T11:00:00+00:00", "note": "told the shop"}"#,
        )
        .unwrap();
        let names = Names::configured(&Config::example());
        insta::assert_snapshot!(one(&names, &line, std::slice::from_ref(&line)));
        insta::assert_snapshot!(listing(&names, &[line]));
    }
}
