//! Why this side won, in words: the stamps, what each transaction had seen, the policy.

use super::Line;

/// One sentence a fact. `name` turns a node id into a name.
#[must_use]
pub fn explain(line: &Line, name: &dyn Fn(u16) -> String) -> Vec<String> {
    let mut out = Vec::new();
    let named = |origin: Option<u16>| origin.map_or_else(|| "an unknown node".to_owned(), name);
    let (local, remote) = (named(line.local_origin), named(line.remote_origin));
    if line.conflict_resolution == "skip" {
        out.push(format!("The write of {remote} was refused by the server here."));
        if let Some(error) = &line.error {
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            out.push(format!(
                "It said: {} ({}).",
                text(&error.message),
                text(&error.sqlstate)
            ));
        }
        let since = match line.reviewed_by.as_deref() {
            Some("anabranch") => "The row, or a later version of it, was written since.",
            _ => "The row is in anabranch.quarantine and is tried again; no other write was preferred to it.",
        };
        out.push(since.to_owned());
        return out;
    }
    if line.is_orphan() {
        orphan(line, &local, &remote, &mut out);
        return out;
    }
    concurrency(line, &local, &remote, &mut out);
    policy(line, &local, &remote, &mut out);
    if line.conflict_type == "clock_drift"
        && let Some(message) = line.error.as_ref().and_then(|error| error.message.as_ref())
    {
        out.push(format!("The times are not to be trusted: {message}."));
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
        detail.unwrap_or_default()
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

fn policy(line: &Line, local: &str, remote: &str, out: &mut Vec<String>) {
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
    match (line.policy.as_str(), winning, losing) {
        ("last_update_wins", Some(winning), Some(losing)) => {
            let by = match winning.split('.').next() == losing.split('.').next() {
                true => "the times are equal and the node id decides",
                false => "the time decides",
            };
            out.push(format!(
                "Policy last_update_wins{version}: the higher stamp wins; {winning} of {winner} is above {losing} of {loser}: {by}."
            ));
        }
        (policy, ..) if policy.starts_with("script ") && line.error.is_some() => out.push(format!(
            "Policy {policy}{version} did not choose (the line's error says why), so the higher stamp wins: {winner} before {loser}."
        )),
        (policy, ..) => out.push(format!("Policy {policy}{version} preferred {winner} to {loser}.")),
    }
    if let (Some(a), Some(b)) = (&line.local_commit_time, &line.remote_commit_time) {
        out.push(format!(
            "By their servers' clocks {local} committed at {a} and {remote} at {b}. A stamp is that time, raised above everything its \
             transaction had seen and held near the clock that the members agree on."
        ));
    }
}
