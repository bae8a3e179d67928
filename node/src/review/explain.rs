//! Why this side won, in words: the stamps, what each transaction had seen, the policy.

use std::cmp::Ordering;

use anabranch_conflict::policy::{ColumnRule, TablePolicy};

use super::{Line, Status, visible};

/// The sqlstate of what a sum lost, since its type cannot hold it.
const OUT_OF_RANGE: &str = "22003";

/// One sentence a fact. `name` turns a node id into a name.
#[must_use]
pub fn explain(line: &Line, name: &dyn Fn(u16) -> String) -> Vec<String> {
    let mut out = Vec::new();
    let named = |origin: Option<u16>| origin.map_or_else(|| "an unknown node".to_owned(), name);
    let (local, remote) = (named(line.local_origin), named(line.remote_origin));
    if line.conflict_resolution == "skip" {
        let without = is_written_without(line);
        out.push(match without {
            true => format!(
                "The row of {remote} was written here without the column(s) {}, which the table here did not have. It does not wait \
                 for them; here this line alone has the values.",
                line.lost_columns.as_deref().unwrap_or_default().join(", ")
            ),
            false => format!("The write of {remote} was refused by the server here."),
        });
        if let Some(error) = &line.error {
            let text = |text: &Option<String>| text.as_deref().map(visible).unwrap_or_default();
            out.push(format!(
                "It said: {} ({}).",
                text(&error.message),
                text(&error.sqlstate)
            ));
        }
        let since = match (line.reviewed_by.as_deref(), line.status) {
            _ if without => return out,
            (Some("anabranch"), _) => "The row, or a later version of it, was written since.",
            (_, Status::New) => {
                "The row is in anabranch.quarantine and is tried again; no other write was preferred to it."
            }
            // Only open lines are closed once the row is written.
            _ => {
                "The row was put into anabranch.quarantine, to be tried again; no other write was preferred to it. Since the line was \
                 reviewed it does not say whether the row waits there still."
            }
        };
        out.push(since.to_owned());
        return out;
    }
    if line.is_orphan() {
        orphan(line, &local, &remote, &mut out);
        return out;
    }
    if line.is_of_nobody() {
        out.push(format!(
            "The row that was here no replicated write had made: it is from before the table was replicated, or somebody wrote past the \
             replication. {remote} wrote a row of that key, and this took its place; no policy was asked."
        ));
        return out;
    }
    if line.is_unheard_delete() {
        out.push(format!(
            "The row was deleted at {local} after its server had been promoted, and before `anabranch heal` put back what this lacked. The \
             delete had not met the write of {remote}, which the other nodes had, and none of them has heard of it: the row came back, and \
             no policy was asked. `conflicts replay` deletes it everywhere."
        ));
        return out;
    }
    concurrency(line, &local, &remote, &mut out);
    let is_by_time = policy(line, &local, &remote, &mut out);
    if line.conflict_type == "clock_drift"
        && let Some(message) = line.error.as_ref().and_then(|error| error.message.as_ref())
    {
        out.push(match is_by_time {
            true => format!("The times are not to be trusted: {message}."),
            // The type goes by the two writes, and not by what was lost.
            false => "It is called clock_drift since the time of one of them is not that of its commit; nothing was lost by that.".to_owned(),
        });
    }
    if let Some(constraint) = &line.constraint_name {
        out.push(format!(
            "They met in constraint {constraint}, not in their primary key: both rows claim one value, and one row can have it."
        ));
    }
    if let Some(group) = &line.transaction_group {
        out.push(format!(
            "The losing write is of the transaction stamped {group}; `conflicts list --group {group}` shows what else of it lost."
        ));
    }
    out
}

/// Was the row written, but for columns that its table does not have here?
fn is_written_without(line: &Line) -> bool {
    let lost = line.lost_columns.as_deref().unwrap_or_default();
    let mut row = line.remote_tuple.iter().flatten();
    !lost.is_empty() && row.any(|(name, _)| !lost.contains(name))
}

/// A row without its parent.
fn orphan(line: &Line, local: &str, remote: &str, out: &mut Vec<String>) {
    let (child, parent, origin) = match line.local_lost() {
        true => (local, remote, line.remote_origin),
        false => (remote, local, line.local_origin),
    };
    let constraint = line.constraint_name.as_deref().unwrap_or("?");
    let detail = line.error.as_ref().and_then(|error| error.detail.clone());
    out.push(format!(
        "The row, written at {child}, refers by {constraint} to a row that is gone. {}",
        visible(&detail.unwrap_or_default())
    ));
    out.push(match origin {
        Some(_) => format!(
            "A transaction of {parent} removed that row, and neither that one nor the transaction of {child} had seen the other: each kept the foreign key at its own node."
        ),
        None => "Who removed that row is not known: it lost a value of a unique key to another row, or it is referred to by another key than its primary one."
            .to_owned(),
    });
    let own = if line.local_lost() {
        line.local_origin
    } else {
        line.remote_origin
    };
    let who = if own.is_some() { child } else { parent };
    out.push(match line.conflict_resolution.as_str() {
        "delete_child" => format!(
            "By the policy of its table it is deleted, as a write of {who}, unless it has a parent by then; where that was done the line has a note."
        ),
        "restore_parent" => format!(
            "By the policy of its table what it refers to is inserted again, as a write of {who} and as it was last seen there, unless it is there by then; where that was done the line has a note."
        ),
        _ => "It stays as it is; delete it, or insert what it refers to.".to_owned(),
    });
}

/// Neither saw the other.
fn concurrency(line: &Line, local: &str, remote: &str, out: &mut Vec<String>) {
    let sides = [
        (remote, local, &line.remote_saw, &line.local_lsn),
        (local, remote, &line.local_saw, &line.remote_lsn),
    ];
    for (one, other, saw, lsn) in sides {
        match (saw, lsn) {
            (Some(saw), Some(lsn)) if one != other => {
                let saw = if saw == "0/0" {
                    format!("nothing of {other}")
                } else {
                    format!("{other} up to {saw}")
                };
                out.push(format!(
                    "The transaction of {one} had seen {saw}; the write of {other} ends at {lsn}: {one} did not know it."
                ));
            }
            _ => out.push(format!(
                "What the transaction of {one} had seen is not in the log; it was found not to cover the write of {other}."
            )),
        }
    }
    out.push(
        "So neither write replaced the other knowingly: they are concurrent, which is what a conflict is."
            .to_owned(),
    );
}

/// Gives whether the time may have decided something.
fn policy(line: &Line, local: &str, remote: &str, out: &mut Vec<String>) -> bool {
    let mut is_by_time = true;
    let (winner, loser) = if line.local_lost() {
        (remote, local)
    } else {
        (local, remote)
    };
    let (winning, losing) = if line.local_lost() {
        (&line.remote_stamp, &line.local_stamp)
    } else {
        (&line.local_stamp, &line.remote_stamp)
    };
    let version = line
        .policy_version
        .as_ref()
        .map_or_else(String::new, |version| format!(" (version {version})"));
    let policy = format!("{}{version}", line.policy);
    // What else a policy says of deletes, parents or columns follows its name.
    let name = line.policy.split([',', ' ']).next().unwrap_or_default();
    let order = match (winning, losing) {
        (Some(winning), Some(losing)) => Some((stamp(winning).cmp(&stamp(losing)), winning, losing)),
        _ => None,
    };
    match (name, order) {
        (_, order) if line.conflict_resolution == "merge" && line.lost_columns.is_some() => {
            is_by_time = merged(line, &policy, (winner, loser), order, out);
        }
        ("last_update_wins", Some((Ordering::Greater, winning, losing))) => out.push(format!(
            "Policy {policy}: the higher stamp wins; {winning} of {winner} is above {losing} of {loser}: {}.",
            decides(winning, losing)
        )),
        ("first_update_wins", Some((Ordering::Less, winning, losing))) => out.push(format!(
            "Policy {policy}: the lower stamp wins; {winning} of {winner} is below {losing} of {loser}: {}.",
            decides(winning, losing)
        )),
        (_, order) => {
            out.push(match name {
                "script" if line.error.is_some() => format!(
                    "Policy {policy} did not choose (the line's error says why), so the higher stamp wins: {winner} before {loser}."
                ),
                _ => format!("Policy {policy} preferred {winner} to {loser}."),
            });
            if let Some((_, winning, losing)) = order {
                out.push(format!("The stamps: {winning} of {winner}, {losing} of {loser}."));
            }
        }
    }
    if let (Some(a), Some(b)) = (&line.local_commit_time, &line.remote_commit_time) {
        out.push(format!(
            "By their servers' clocks {local} committed at {a} and {remote} at {b}. A stamp is that time, raised above everything its \
             transaction had seen and held near the clock that the members agree on."
        ));
    }
    is_by_time
}

/// What of two stamps decides which is the higher.
fn decides(winning: &str, losing: &str) -> &'static str {
    match stamp(winning).0 == stamp(losing).0 {
        true => "the times are equal and the node id decides",
        false => "the time decides",
    }
}

/// Of a write that lost some columns, by the rule of each. `order` is that of the stamps, with those of winner and loser. Gives whether the
/// stamps decided of any.
fn merged(
    line: &Line,
    policy: &str,
    (winner, loser): (&str, &str),
    order: Option<(Ordering, &String, &String)>,
    out: &mut Vec<String>,
) -> bool {
    let sqlstate = line.error.as_ref().and_then(|error| error.sqlstate.as_deref());
    let (mut left_out, mut gone_back, mut later) = (Vec::new(), Vec::new(), Vec::new());
    for column in line.lost_columns.iter().flatten() {
        match TablePolicy::rule_in(&line.policy, column) {
            Some(ColumnRule::Delta) if sqlstate == Some(OUT_OF_RANGE) => left_out.push(column.as_str()),
            Some(ColumnRule::Max | ColumnRule::Min) => gone_back.push(column.as_str()),
            _ => later.push(column.as_str()),
        }
    }
    out.push(format!(
        "Policy {policy}: columns are merged, and what {loser} wrote of the others is in the row."
    ));
    if !left_out.is_empty() {
        out.push(format!(
            "Of {} the sum is out of its range with what others added ({OUT_OF_RANGE}). Going by stamps the write that would leave the \
             range adds nothing: that of {loser}.",
            left_out.join(", ")
        ));
    }
    if !gone_back.is_empty() {
        out.push(format!(
            "Of {} the rule decides, and not the time: {loser} went back from a value that they had seen, while another one had gone \
             further, and that stays.",
            gone_back.join(", ")
        ));
    }
    match order {
        Some((Ordering::Greater, winning, losing)) if !later.is_empty() => out.push(format!(
            "Of {} the last write counts: {winning} of {winner} is above {losing} of {loser}: {}.",
            later.join(", "),
            decides(winning, losing)
        )),
        order => {
            if !later.is_empty() {
                out.push(format!("Of {} a later write counts.", later.join(", ")));
            }
            if let Some((_, winning, losing)) = order {
                out.push(format!("The stamps: {winning} of {winner}, {losing} of {loser}."));
            }
        }
    }
    gone_back.is_empty() || !left_out.is_empty() || !later.is_empty()
}

/// A stamp's time, which is hexadecimal, and node, as they are compared.
fn stamp(text: &str) -> (u64, u16) {
    let (time, node) = text.split_once('.').unwrap_or((text, ""));
    (
        u64::from_str_radix(time, 16).unwrap_or(0),
        node.parse().unwrap_or(0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a line under this policy: the remote write, stamped so, won over the local one at `100.1`.
    fn said(policy: &str, remote: &str) -> String {
        let line: Line = serde_json::from_value(serde_json::json!({
            "conflict_id": "x", "detected_at": "t", "lost_at": "t", "node": "n1", "node_id": 1, "schema_name": "s", "table_name": "t",
            "key": {}, "conflict_type": "update_origin_differs", "policy": policy, "policy_version": "7",
            "conflict_resolution": "apply_remote", "loser": "local", "status": "new", "local_origin": 1, "remote_origin": 2,
            "local_stamp": "100.1", "remote_stamp": remote,
        }))
        .unwrap();
        explain(&line, &|id| format!("n{id}")).join(" ")
    }

    #[test]
    fn columns_that_were_lost_are_explained_by_their_rules() {
        let said = |lost: &[&str], error: Option<&str>, winner: &str| {
            let line: Line = serde_json::from_value(serde_json::json!({
                "conflict_id": "x", "detected_at": "t", "lost_at": "t", "node": "n1", "node_id": 1, "schema_name": "s", "table_name": "t",
                "key": {}, "conflict_type": "update_origin_differs", "policy": "last_update_wins, best max, least min, n delta",
                "policy_version": "7", "conflict_resolution": "merge", "loser": "remote", "status": "new", "lost_columns": lost,
                "local_origin": 1, "remote_origin": 2, "local_stamp": winner, "remote_stamp": "200.2",
                "error": error.map(|state| serde_json::json!({ "sqlstate": state, "message": "m" })),
            }))
            .unwrap();
            explain(&line, &|id| format!("n{id}")).join(" ")
        };
        let (out, back, last) = (
            "Of n the sum is out of its range",
            "the rule decides, and not the time: n2 went back",
            "the last write counts: 300.1 of n1 is above 200.2 of n2: the time decides",
        );
        for (lost, error, winner, parts, others) in [
            (
                &["n"][..],
                Some("22003"),
                "100.1",
                &[out, "The stamps: 100.1 of n1"][..],
                &[back, "the time decides"][..],
            ),
            (
                &["best"],
                None,
                "300.1",
                &["Of best the rule decides", back],
                &[out, "the time decides", " wins"],
            ),
            (
                &["least", "t"],
                None,
                "300.1",
                &["Of least", back, "Of t the last write", last],
                &[out],
            ),
            (
                &["n", "t"],
                Some("22003"),
                "300.1",
                &[out, "Of t the last write", last],
                &[back],
            ),
            // An insert that came later.
            (
                &["n"],
                None,
                "300.1",
                &["Of n the last write", last],
                &[out, back],
            ),
            (
                &["t"],
                None,
                "100.1",
                &["Of t a later write counts."],
                &[out, back, "the time decides"],
            ),
        ] {
            let said = said(lost, error, winner);
            for part in parts {
                assert!(said.contains(part), "`{part}` is not in {said}");
            }
            for part in others {
                assert!(!said.contains(part), "`{part}` is in {said}");
            }
        }
    }

    #[test]
    fn a_drifted_time_is_not_told_to_have_decided_where_a_rule_did() {
        for (lost, is_by_time) in [(&["best"][..], false), (&["best", "t"], true), (&["n"], true)] {
            let line: Line = serde_json::from_value(serde_json::json!({
                "conflict_id": "x", "detected_at": "t", "lost_at": "t", "node": "n1", "node_id": 1, "schema_name": "s", "table_name": "t",
                "key": {}, "conflict_type": "clock_drift", "policy": "last_update_wins, best max, n delta", "policy_version": "7",
                "conflict_resolution": "merge", "loser": "remote", "status": "new", "lost_columns": lost, "local_origin": 1,
                "remote_origin": 2, "local_stamp": "300.1", "remote_stamp": "200.2", "error": { "message": "n2 is late" },
            }))
            .unwrap();
            let said = explain(&line, &|id| format!("n{id}")).join(" ");
            assert_eq!(
                said.contains("not to be trusted: n2 is late"),
                is_by_time,
                "{said}"
            );
            assert_eq!(said.contains("nothing was lost by that"), !is_by_time, "{said}");
        }
    }

    #[test]
    fn a_row_of_nobody_is_not_said_to_be_a_write_that_was_weighed() {
        let line: Line = serde_json::from_value(serde_json::json!({
            "conflict_id": "x", "detected_at": "t", "lost_at": "t", "node": "n1", "node_id": 1, "schema_name": "s", "table_name": "t",
            "key": {}, "conflict_type": "insert_exists", "policy": "last_update_wins", "conflict_resolution": "apply_remote",
            "loser": "local", "status": "new", "remote_origin": 2, "remote_stamp": "100.2",
        }))
        .unwrap();
        let said = explain(&line, &|id| format!("n{id}")).join(" ");
        assert!(said.contains("n2 wrote a row of that key"), "{said}");
        assert!(
            !said.contains("concurrent") && !said.contains("preferred"),
            "{said}"
        );
    }

    #[test]
    fn a_delete_that_nobody_has_heard_of_is_not_said_to_have_been_weighed() {
        let line: Line = serde_json::from_value(serde_json::json!({
            "conflict_id": "x", "detected_at": "t", "lost_at": "t", "node": "n1", "node_id": 1, "schema_name": "s", "table_name": "t",
            "key": {}, "conflict_type": "update_deleted", "policy": "last_update_wins", "conflict_resolution": "apply_remote",
            "loser": "local", "status": "new", "local_origin": 1, "remote_origin": 1, "remote_stamp": "100.1",
        }))
        .unwrap();
        assert!(line.lost_a_delete());
        let said = explain(&line, &|id| format!("n{id}")).join(" ");
        assert!(
            said.contains("deleted at n1 after its server had been promoted"),
            "{said}"
        );
        assert!(
            !said.contains("concurrent") && !said.contains("preferred"),
            "{said}"
        );
    }

    #[test]
    fn a_row_that_was_refused_is_told_from_one_that_was_written_without_columns() {
        let said = |lost: &[&str], status: &str, by: Option<&str>| {
            let line: Line = serde_json::from_value(serde_json::json!({
                "conflict_id": "x", "detected_at": "t", "lost_at": "t", "node": "n1", "node_id": 1, "schema_name": "s", "table_name": "t",
                "key": {}, "conflict_type": "column_missing", "policy": "last_update_wins", "conflict_resolution": "skip",
                "loser": "remote", "status": status, "reviewed_by": by, "remote_origin": 2, "lost_columns": lost,
                "error": { "sqlstate": "42703", "message": "no column" },
            }))
            .unwrap();
            let row = r#"{"id": 1, "b": {"unread_bytes": "\\x01", "type": "int4"}}"#;
            let line = Line {
                remote_tuple: serde_json::from_str(row).unwrap(),
                ..line
            };
            explain(&line, &|id| format!("n{id}")).join(" ")
        };
        let without = said(&["b"], "new", None);
        assert!(
            without.contains("written here without the column(s) b"),
            "{without}"
        );
        assert!(without.contains("no column (42703)"), "{without}");
        assert!(!without.contains("quarantine"), "{without}");
        let whole = ["b", "id"];
        assert!(said(&whole, "new", None).contains("is in anabranch.quarantine"));
        assert!(said(&whole, "acknowledged", Some("anabranch")).contains("was written since"));
        let reviewed = said(&whole, "acknowledged", Some("kim"));
        assert!(
            reviewed.contains("does not say whether the row waits there still"),
            "{reviewed}"
        );
    }

    #[test]
    fn every_policy_is_explained_with_both_stamps() {
        for (policy, remote, part) in [
            (
                "last_update_wins",
                "1000.2",
                "the higher stamp wins; 1000.2 of n2 is above 100.1 of n1: the time decides",
            ),
            (
                "last_update_wins, restore_parent",
                "100.2",
                "restore_parent (version 7): the higher stamp wins; 100.2 of n2 is above 100.1 of n1: the times are equal",
            ),
            // A delete that wins though it is the earlier.
            (
                "last_update_wins, delete_wins",
                "99.2",
                "The stamps: 99.2 of n2, 100.1 of n1.",
            ),
            (
                "first_update_wins, delete_wins",
                "99.2",
                "the lower stamp wins; 99.2 of n2 is below 100.1 of n1: the time decides",
            ),
            (
                "origin_priority 2 1",
                "99.2",
                "preferred n2 to n1. The stamps: 99.2 of n2, 100.1 of n1.",
            ),
            ("script resolve.rhai (1f0a93b2)", "99.2", "The stamps: 99.2 of n2"),
        ] {
            let said = said(policy, remote);
            assert!(said.contains(part), "{policy}: {said}");
        }
    }
}
