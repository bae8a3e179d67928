//! `anabranch status`: what the running daemon says of itself.

mod check;

use std::path::Path;
use std::process::ExitCode;

use anabranch_node::admin;
use anabranch_node::config::Config;
use anabranch_node::join;
use anabranch_node::names::Names;
use anabranch_node::status::{PeerStatus, Status};

use crate::args;
use crate::failure::Failure;
use crate::output::{self, Format, say_plainly, table};

pub(crate) async fn run(path: &Path, verb: &args::Status, format: Format) -> Result<ExitCode, Failure> {
    if verb.check {
        return check::run(path, verb, format).await;
    }
    let config = super::load(path)?;
    let document = ask(&config).await?;
    match format {
        Format::Json => output::json(&document)?,
        Format::Table => {
            let status = serde_json::from_value(document).map_err(|error| {
                Failure::Refused(format!(
                    "the daemon is of another release: {error}; use --output json"
                ))
            })?;
            say_plainly(&render(&status))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The document of the daemon that runs.
pub(crate) async fn ask(config: &Config) -> Result<serde_json::Value, Failure> {
    let socket = config.node.data_dir.join(admin::SOCKET);
    let text = admin::status(&socket)
        .await
        .map_err(|error| unanswered(error, &socket))?;
    serde_json::from_str(&text)
        .map_err(|error| Failure::Refused(format!("the daemon's answer is not JSON: {error}")))
}

/// Why the daemon did not answer, for people.
pub(crate) fn unanswered(error: admin::Error, socket: &Path) -> Failure {
    match error {
        admin::Error::Transport { .. } => {
            let joins = socket.parent().and_then(join::stage);
            Failure::Refused(match joins {
                Some(stage) => format!("no daemon answers at {}: {stage}", socket.display()),
                None => format!(
                    "no daemon answers at {}; is it running, does it wait for its server (its log says so), and are you its user or root? \
                     ({error})",
                    socket.display()
                ),
            })
        }
        error => error.into(),
    }
}

/// The same, understood.
pub(crate) async fn read(config: &Config) -> Result<Status, Failure> {
    serde_json::from_value(ask(config).await?)
        .map_err(|error| Failure::Refused(format!("the daemon is of another release: {error}")))
}

fn render(status: &Status) -> String {
    let node = &status.node;
    let mut out = format!(
        "node {} ({}) of cluster {}: {}, since {}\n\n",
        node.name, node.id, node.cluster, node.state, node.started_at
    );
    for alarm in &status.alarms {
        out.push_str(&format!(
            "ALARM since {}: {}: {}\n",
            alarm.since, alarm.name, alarm.text
        ));
    }
    let names = Names::from(status.names.clone());
    if !status.peers.is_empty() {
        out.push_str(&peers(&status.peers, &names));
    }
    for peer in &status.peers {
        if let Some(refusal) = &peer.refusal {
            out.push_str(&format!("{} refused: {refusal}\n", peer.name));
        } else if let Some(error) = peer.last_error.as_ref().filter(|_| !peer.connected) {
            out.push_str(&format!("{}: {error}\n", peer.name));
        }
    }
    // An alarm says the same.
    let is_said = |text: &str| status.alarms.iter().any(|alarm| alarm.text.ends_with(text));
    for stuck in status.ddl.iter().filter(|stuck| !is_said(&stuck.text)) {
        out.push_str(&format!("DDL waits since {}: {}\n", stuck.since, stuck.text));
    }
    if let Some(change) = &status.policy.change {
        out.push_str(&format!("change of the policy: {}\n", change.text));
    }
    if let Some(leaving) = &status.leaving {
        out.push_str(&format!("leaving: {}\n", leaving.text));
    }
    for drop in &status.dropping {
        let verb = if drop.leaves { "leaves" } else { "is being dropped" };
        out.push_str(&format!("{} {verb}: {}\n", drop.name, drop.text));
    }
    let mut nodes: Vec<u16> = status
        .positions
        .applied
        .keys()
        .chain(status.positions.stable.keys())
        .copied()
        .collect();
    nodes.sort_unstable();
    nodes.dedup();
    if !nodes.is_empty() {
        let shown = |position: Option<&anabranch_proto::Position>| {
            position.map_or("-".to_owned(), ToString::to_string)
        };
        out.push_str(&table(
            ["origin", "applied here", "applied everywhere"],
            nodes.iter().map(|node| {
                [
                    names.with_id(*node),
                    shown(status.positions.applied.get(node)),
                    shown(status.positions.stable.get(node)),
                ]
            }),
        ));
    }
    out.push_str(&numbers(status));
    for (table, count) in status.apply.passed_over.iter().filter(|(_, count)| **count > 0) {
        out.push_str(&format!(
            "passed over {count} change(s) of {table}, which is not replicated here\n"
        ));
    }
    out
}

fn peers(peers: &[PeerStatus], names: &Names) -> String {
    let state = |peer: &PeerStatus| match (&peer.refusal, peer.connected, peer.relayed_by) {
        (Some(_), ..) => "refused".to_owned(),
        (None, true, None) => "connected".to_owned(),
        (None, true, Some(by)) => format!("connected, via {}", names.of(Some(by.0))),
        (None, false, Some(by)) => format!("away, via {}", names.of(Some(by.0))),
        (None, false, None) => "away".to_owned(),
    };
    table(
        [
            "peer",
            "id",
            "state",
            "sent_lsn",
            "write_lsn",
            "flush_lsn",
            "replay_lsn",
            "lag bytes",
            "lag s",
            "clock ms",
            "rtt ms",
        ],
        peers.iter().map(|peer| {
            [
                peer.name.clone(),
                peer.id.to_string(),
                state(peer),
                peer.sent_lsn.to_string(),
                peer.write_lsn.to_string(),
                peer.flush_lsn.to_string(),
                peer.replay_lsn.to_string(),
                peer.lag_bytes.to_string(),
                format!("{:.3}", peer.lag_seconds),
                peer.clock_offset_us.map_or("-".to_owned(), |us| {
                    ms(us.unsigned_abs(), if us < 0 { "-" } else { "+" })
                }),
                peer.rtt_us.map_or("-".to_owned(), |us| ms(us, "")),
            ]
        }),
    )
}

fn ms(us: u64, sign: &str) -> String {
    format!("{sign}{}.{:03}", us / 1000, us % 1000)
}

fn numbers(status: &Status) -> String {
    let (journal, apply, index) = (&status.journal, &status.apply, &status.index);
    let mut out = format!(
        "decoded   {}, journalled {}\n\
         journal   {} in {} segment(s){}\n\
         applied   {} transaction(s), {} row(s) in {} batch(es); {} on the slow path, {} repaired\n\
         conflicts {}{}, quarantined rows {}{}\n\
         index     {} row(s), {}{}\n",
        status.positions.decoded_lsn,
        status.positions.journaled,
        output::bytes(journal.bytes),
        journal.segments,
        journal
            .stalled
            .as_ref()
            .map_or(String::new(), |why| format!("; STALLED: {why}")),
        apply.txns,
        apply.rows,
        apply.batches,
        apply.slow_path_rows,
        apply.repairs,
        apply.conflicts,
        if apply.conflicts_counted > 0 {
            format!(" and {} more only counted", apply.conflicts_counted)
        } else {
            String::new()
        },
        apply.quarantined,
        if apply.drifted_rows > 0 {
            format!(", drifted rows {}", apply.drifted_rows)
        } else {
            String::new()
        },
        index.entries,
        output::bytes(index.bytes),
        if index.overflowed {
            ", overflowed to disk"
        } else {
            ""
        },
    );
    for (word, text) in [
        ("waiting  ", &apply.waiting_for),
        ("last error", &apply.last_error),
    ] {
        if let Some(text) = text {
            out.push_str(&format!("{word} {text}\n"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use anabranch_node::status::Alarm;
    use anabranch_proto::{Lsn, NodeId, Position};

    use super::*;

    #[test]
    fn status_shows_links_positions_and_alarms() {
        let mut status = Status::default();
        status.node.name = "a".to_owned();
        status.node.id = 1;
        status.node.cluster = "c".to_owned();
        status.node.state = "running".to_owned();
        status.alarms.push(Alarm {
            name: "server_clock".to_owned(),
            since: "2026-11-24T00:00:00Z".to_owned(),
            text: "clock of b is ahead".to_owned(),
        });
        status.peers.push(PeerStatus {
            id: 2,
            name: "b".to_owned(),
            connected: true,
            sent_lsn: Lsn(0x1_0000_0010),
            lag_seconds: 0.25,
            clock_offset_us: Some(-1500),
            rtt_us: Some(321),
            ..PeerStatus::default()
        });
        status.peers.push(PeerStatus {
            id: 3,
            name: "c".to_owned(),
            refusal: Some("other cluster".to_owned()),
            relayed_by: Some(NodeId(2)),
            ..PeerStatus::default()
        });
        status.names.insert(2, "b".to_owned());
        status.positions.applied.insert(2, Position::new(1, 0x20));
        status.positions.applied.insert(9, Position::new(1, 0x10));
        insta::assert_snapshot!(render(&status));
    }
}
