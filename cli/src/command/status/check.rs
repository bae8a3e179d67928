//! `anabranch status --check`: one line and an exit code, as Nagios and its kin read them.

use std::fmt;
use std::path::Path;
use std::process::ExitCode;

use anabranch_node::status::Status;
use serde::Serialize;

use crate::args;
use crate::failure::Failure;
use crate::output::{self, Format, say_plainly};

/// How bad it is; its number is the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Ok,
    /// Something is under way that somebody began and that is not done.
    Warning,
    /// Somebody must look.
    Critical,
    /// It cannot be told.
    Unknown,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "OK",
            Self::Warning => "WARNING",
            Self::Critical => "CRITICAL",
            Self::Unknown => "UNKNOWN",
        })
    }
}

/// One thing that is not as it should be.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Problem {
    state: State,
    /// Such as `alarm drift`.
    what: String,
    text: String,
}

impl Problem {
    fn new(state: State, what: impl Into<String>, text: impl Into<String>) -> Self {
        let (what, text) = (what.into(), text.into());
        Self { state, what, text }
    }
}

/// Never fails: what stands in the way is the answer.
pub(super) async fn run(path: &Path, verb: &args::Status, format: Format) -> Result<ExitCode, Failure> {
    let (node, problems) = match crate::command::load(path) {
        Err(failure) => (
            String::new(),
            vec![Problem::new(State::Unknown, "configuration", failure.to_string())],
        ),
        Ok(config) => match super::read(&config).await {
            Err(failure) => (
                config.node.name,
                vec![Problem::new(State::Critical, "daemon", failure.to_string())],
            ),
            Ok(status) => (config.node.name, judge(&status, verb)),
        },
    };
    let state = problems.iter().map(|problem| problem.state).max();
    let state = state.unwrap_or(State::Ok);
    match format {
        Format::Table => say_plainly(&text(state, &node, &problems))?,
        Format::Json => output::json(&serde_json::json!({
            "state": state, "node": node, "problems": problems,
        }))?,
    }
    Ok(ExitCode::from(state as u8))
}

/// The first line is the one that monitoring systems show.
fn text(state: State, node: &str, problems: &[Problem]) -> String {
    let whats: Vec<&str> = problems.iter().map(|problem| problem.what.as_str()).collect();
    let mut out = match whats.as_slice() {
        [] => format!("{state}: node {node}\n"),
        whats => format!("{state}: node {node}: {}\n", whats.join(", ")),
    };
    for problem in problems {
        out.push_str(&format!("{}: {}\n", problem.what, problem.text));
    }
    out
}

/// What is not as it should be, the worst first.
fn judge(status: &Status, limits: &args::Status) -> Vec<Problem> {
    let alarms = status.alarms.iter();
    let mut out: Vec<Problem> = alarms
        .map(|alarm| {
            let text = format!("since {}: {}", alarm.since, alarm.text);
            Problem::new(State::Critical, format!("alarm {}", alarm.name), text)
        })
        .collect();
    for peer in &status.peers {
        let what = format!("link {}", peer.name);
        let down = peer.down_for().unwrap_or(0.0);
        if let Some(refusal) = &peer.refusal {
            out.push(Problem::new(State::Critical, what, format!("refused: {refusal}")));
        } else if down > f64::from(limits.max_down) {
            let why = peer.last_error.as_deref().unwrap_or("nobody calls");
            let text = format!("down for {down:.0} s: {why}");
            out.push(Problem::new(State::Critical, what, text));
        }
        if limits
            .max_lag
            .is_some_and(|max| peer.lag_seconds > f64::from(max))
        {
            let text = format!(
                "has not applied what was committed here {:.0} s ago",
                peer.lag_seconds
            );
            out.push(Problem::new(State::Critical, format!("lag {}", peer.name), text));
        }
    }
    // Once a lock is not granted for long, or the statement fails, there is an alarm for it.
    for stuck in &status.ddl {
        out.push(Problem::new(State::Warning, "DDL waits", stuck.text.clone()));
    }
    if let Some(leaving) = &status.leaving {
        out.push(Problem::new(State::Warning, "leaving", leaving.text.clone()));
    }
    for drop in &status.dropping {
        let what = format!("dropping {}", drop.name);
        out.push(Problem::new(State::Warning, what, drop.text.clone()));
    }
    if !matches!(status.node.state.as_str(), "running" | "alarm" | "leaving") && status.leaving.is_none() {
        out.push(Problem::new(State::Warning, "state", status.node.state.clone()));
    }
    out.sort_by_key(|problem| std::cmp::Reverse(problem.state));
    out
}

#[cfg(test)]
mod tests {
    use anabranch_node::status::{Alarm, Dropping, NodeStatus, PeerStatus};

    use super::*;

    const LIMITS: args::Status = args::Status {
        check: true,
        max_down: 60,
        max_lag: Some(10),
    };

    fn running() -> Status {
        Status {
            node: NodeStatus {
                state: "running".to_owned(),
                ..NodeStatus::default()
            },
            ..Status::default()
        }
    }

    fn found(status: &Status) -> Vec<(State, String)> {
        let problems = judge(status, &LIMITS);
        problems
            .into_iter()
            .map(|problem| (problem.state, problem.what))
            .collect()
    }

    #[test]
    fn a_node_without_alarms_and_with_its_links_is_well() {
        let mut status = running();
        status.peers.push(PeerStatus {
            name: "b".to_owned(),
            connected: true,
            ..PeerStatus::default()
        });
        assert!(found(&status).is_empty());
        assert_eq!(text(State::Ok, "a", &[]), "OK: node a\n");
    }

    #[test]
    fn alarms_refusals_and_what_is_over_its_limit_are_critical_and_what_is_under_way_a_warning() {
        let mut status = running();
        status.alarms.push(Alarm {
            name: "drift".to_owned(),
            text: "rows".to_owned(),
            ..Alarm::default()
        });
        let ago = |seconds: i64| {
            let at = jiff::Timestamp::now() - jiff::SignedDuration::from_secs(seconds);
            Some(at.to_string())
        };
        for (name, down_since, lag_seconds, refusal) in [
            ("short", ago(30), 5.0, None),
            ("long", ago(90), 5.0, None),
            ("behind", None, 11.0, None),
            ("other", ago(1), 0.0, Some("other cluster".to_owned())),
        ] {
            status.peers.push(PeerStatus {
                name: name.to_owned(),
                down_since,
                lag_seconds,
                refusal,
                ..PeerStatus::default()
            });
        }
        status.dropping.push(Dropping {
            name: "gone".to_owned(),
            ..Dropping::default()
        });
        let critical = |what: &str| (State::Critical, what.to_owned());
        assert_eq!(
            found(&status),
            [
                critical("alarm drift"),
                critical("link long"),
                critical("lag behind"),
                critical("link other"),
                (State::Warning, "dropping gone".to_owned()),
            ]
        );
        let said = text(State::Critical, "a", &judge(&status, &LIMITS));
        assert!(
            said.starts_with("CRITICAL: node a: alarm drift, link long, "),
            "{said}"
        );
    }
}
