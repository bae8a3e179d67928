//! The status document in Prometheus' text form. Every name here is in `docs/monitoring.md`.

use std::fmt::Write;

use crate::config::Config;
use crate::status::{PeerStatus, Status};

/// What a number is.
#[derive(Clone, Copy)]
enum Kind {
    /// It may go up and down.
    Gauge,
    /// It only grows, until the stages start again.
    Counter,
}

/// The page as far as it is written.
#[derive(Default)]
struct Page(String);

impl Page {
    /// One name with its samples: labels (name, value) and a number each. Without samples it is left out.
    fn family<'a, L>(
        &mut self,
        name: &str,
        kind: Kind,
        help: &str,
        samples: impl IntoIterator<Item = (L, f64)>,
    ) where
        L: IntoIterator<Item = (&'a str, String)>,
    {
        let kind = match kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
        };
        let mut begun = false;
        for (labels, value) in samples {
            // Writing into a string does not fail.
            if !std::mem::replace(&mut begun, true) {
                let _ = writeln!(
                    self.0,
                    "# HELP anabranch_{name} {help}\n# TYPE anabranch_{name} {kind}"
                );
            }
            let labels: Vec<String> = labels
                .into_iter()
                .map(|(label, value)| format!("{label}=\"{}\"", escape(&value)))
                .collect();
            let _ = match labels.as_slice() {
                [] => writeln!(self.0, "anabranch_{name} {value}"),
                labels => writeln!(self.0, "anabranch_{name}{{{}}} {value}", labels.join(",")),
            };
        }
    }

    fn one(&mut self, name: &str, kind: Kind, help: &str, value: f64) {
        self.family(name, kind, help, [(std::iter::empty(), value)]);
    }
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// As a number that a float can hold: past 2^53 it is rounded.
const fn number(count: u64) -> f64 {
    count as f64
}

fn flag(is_so: bool) -> f64 {
    f64::from(u8::from(is_so))
}

/// Microseconds as seconds; exact for 285 years.
fn seconds(us: i64) -> f64 {
    us as f64 / 1e6
}

/// The whole page; without `status` the stages do not run, since the server is waited for.
pub(super) fn render(config: &Config, started_us: i64, status: Option<&Status>) -> String {
    let mut page = Page::default();
    let labels = [
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("cluster", config.cluster.id.clone()),
        ("node", config.node.name.clone()),
        ("id", config.node.id.to_string()),
    ];
    page.family("info", Kind::Gauge, "Always 1; who this is.", [(labels, 1.0)]);
    page.one(
        "start_time_seconds",
        Kind::Gauge,
        "When the daemon was started, Unix time.",
        seconds(started_us),
    );
    page.one(
        "running",
        Kind::Gauge,
        "1 while the stages run, 0 while the server is waited for.",
        flag(status.is_some()),
    );
    if let Some(status) = status {
        alarms(&mut page, status);
        links(&mut page, &status.peers);
        positions(&mut page, status);
        journal(&mut page, status);
        apply(&mut page, status);
    }
    page.0
}

fn alarms(page: &mut Page, status: &Status) {
    page.one(
        "alarms",
        Kind::Gauge,
        "Alarms that stand.",
        number(status.alarms.len() as u64),
    );
    let each = status.alarms.iter();
    page.family(
        "alarm",
        Kind::Gauge,
        "1 for each alarm that stands.",
        each.map(|alarm| ([("name", alarm.name.clone())], 1.0)),
    );
    page.one(
        "stuck_ddl",
        Kind::Gauge,
        "DDL statements of other nodes that wait here.",
        number(status.ddl.len() as u64),
    );
    page.one(
        "leaving",
        Kind::Gauge,
        "1 while this node leaves its cluster.",
        flag(status.leaving.is_some()),
    );
    page.one(
        "dropping_members",
        Kind::Gauge,
        "Members that are being dropped or leave.",
        number(status.dropping.len() as u64),
    );
}

fn links(page: &mut Page, peers: &[PeerStatus]) {
    let mut each = |name, help, value: &dyn Fn(&PeerStatus) -> Option<f64>| {
        let samples = peers
            .iter()
            .filter_map(|peer| Some(([("peer", peer.name.clone())], value(peer)?)));
        page.family(name, Kind::Gauge, help, samples);
    };
    each(
        "link_up",
        "1 while both directions to the peer are open.",
        &|peer| Some(flag(peer.connected)),
    );
    each(
        "link_down_seconds",
        "For how long a direction to the peer has been closed; 0 while both are open.",
        &|peer| Some(peer.down_for().unwrap_or(0.0)),
    );
    each("link_refused", "1 while one side refuses the other.", &|peer| {
        Some(flag(peer.refusal.is_some()))
    });
    each(
        "replication_lag_seconds",
        "Age of the oldest commit of this node that the peer has not applied.",
        &|peer| Some(peer.lag_seconds),
    );
    each(
        "replication_lag_bytes",
        "WAL between this node's newest commit and what the peer has applied.",
        &|peer| Some(number(peer.lag_bytes)),
    );
    each(
        "clock_offset_seconds",
        "The peer's clock minus this machine's.",
        &|peer| peer.clock_offset_us.map(seconds),
    );
    each("link_round_trip_seconds", "Time there and back.", &|peer| {
        peer.rtt_us.map(|us| number(us) / 1e6)
    });
}

fn positions(page: &mut Page, status: &Status) {
    let positions = &status.positions;
    page.one(
        "decoded_lsn_bytes",
        Kind::Gauge,
        "End of what was decoded of the server's WAL, as bytes since 0/0.",
        number(positions.decoded_lsn.0),
    );
    page.one(
        "journaled_lsn_bytes",
        Kind::Gauge,
        "End of this node's transactions that are durable in its journal.",
        number(positions.journaled.0),
    );
    let of = |positions: &std::collections::BTreeMap<u16, anabranch_proto::Position>| {
        let each = positions.iter();
        each.map(|(origin, position)| ([("origin", origin.to_string())], number(position.lsn.0)))
            .collect::<Vec<_>>()
    };
    page.family(
        "applied_lsn_bytes",
        Kind::Gauge,
        "Up to where an origin's transactions are applied here, by its LSN.",
        of(&positions.applied),
    );
    page.family(
        "stable_lsn_bytes",
        Kind::Gauge,
        "Up to where an origin's transactions are known to be applied at every member.",
        of(&positions.stable),
    );
}

fn journal(page: &mut Page, status: &Status) {
    let (journal, index) = (&status.journal, &status.index);
    for (name, help, value) in [
        ("journal_bytes", "Size of the journal.", number(journal.bytes)),
        (
            "journal_max_bytes",
            "Size past which this node's transactions may wait.",
            number(journal.max_bytes),
        ),
        ("journal_segments", "Its files.", number(journal.segments)),
        (
            "journal_stalled",
            "1 while it takes nothing more, or nothing more of this node's.",
            flag(journal.stalled.is_some()),
        ),
        ("index_rows", "Rows in the row index.", number(index.entries)),
        ("index_bytes", "Memory of the row index.", number(index.bytes)),
        (
            "index_overflowed",
            "1 while part of the row index is on disk.",
            flag(index.overflowed),
        ),
    ] {
        page.one(name, Kind::Gauge, help, value);
    }
}

fn apply(page: &mut Page, status: &Status) {
    let apply = &status.apply;
    for (name, help, value) in [
        (
            "local_transactions_total",
            "Transactions of this node taken into the stream.",
            apply.local_txns,
        ),
        (
            "applied_transactions_total",
            "Transactions of other nodes applied here.",
            apply.txns,
        ),
        ("applied_rows_total", "Rows in them.", apply.rows),
        ("apply_batches_total", "Apply transactions.", apply.batches),
        (
            "apply_retries_total",
            "Apply transactions that had to start again.",
            apply.retries,
        ),
        (
            "apply_slow_rows_total",
            "Rows that took the slow path.",
            apply.slow_path_rows,
        ),
        (
            "apply_repairs_total",
            "Rows put right when a local write of them was decoded.",
            apply.repairs,
        ),
        (
            "conflicts_total",
            "Lines written to the conflict log.",
            apply.conflicts,
        ),
        (
            "conflicts_counted_total",
            "Losing writes that were only counted.",
            apply.conflicts_counted,
        ),
        (
            "drifted_rows_total",
            "Rows that were not as the stream says.",
            apply.drifted_rows,
        ),
    ] {
        page.one(name, Kind::Counter, help, number(value));
    }
    let passed_over = apply.passed_over.iter();
    page.family(
        "passed_over_changes_total",
        Kind::Counter,
        "Changes of tables that are not replicated here.",
        passed_over.map(|(table, count)| ([("table", table.clone())], number(*count))),
    );
    page.one(
        "quarantined_rows",
        Kind::Gauge,
        "Rows in quarantine.",
        number(apply.quarantined),
    );
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use anabranch_proto::Position;

    use super::*;
    use crate::status::Alarm;

    const PAGE: &str = include_str!("../../../docs/monitoring.md");

    /// A document in which nothing is left out.
    fn full() -> Status {
        let mut status = Status::default();
        status.alarms.push(Alarm {
            name: "ddl_2".to_owned(),
            ..Alarm::default()
        });
        status.peers.push(PeerStatus {
            id: 2,
            name: "b\"\\".to_owned(),
            lag_seconds: 0.25,
            clock_offset_us: Some(-1500),
            rtt_us: Some(321),
            down_since: Some("2026-11-24T00:00:00Z".to_owned()),
            ..PeerStatus::default()
        });
        status.positions.applied.insert(2, Position::new(1, 0x20));
        status.positions.stable.insert(2, Position::new(1, 0x10));
        status.apply.passed_over.insert("public.t".to_owned(), 3);
        status.apply.quarantined = 4;
        status
    }

    fn names(page: &str) -> BTreeSet<&str> {
        let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        types.filter_map(|rest| rest.split(' ').next()).collect()
    }

    #[test]
    fn numbers_are_written_as_prometheus_reads_them() {
        let page = render(&Config::example(), 1_500_000, Some(&full()));
        for line in [
            "anabranch_start_time_seconds 1.5",
            "anabranch_running 1",
            "anabranch_alarm{name=\"ddl_2\"} 1",
            "anabranch_link_up{peer=\"b\\\"\\\\\"} 0",
            "anabranch_replication_lag_seconds{peer=\"b\\\"\\\\\"} 0.25",
            "anabranch_clock_offset_seconds{peer=\"b\\\"\\\\\"} -0.0015",
            "anabranch_applied_lsn_bytes{origin=\"2\"} 32",
            "anabranch_passed_over_changes_total{table=\"public.t\"} 3",
            "anabranch_quarantined_rows 4",
        ] {
            assert!(page.lines().any(|found| found == line), "{line}\n{page}");
        }
        let down = page
            .lines()
            .find(|line| line.starts_with("anabranch_link_down_seconds"));
        assert!(!down.unwrap().ends_with(" 0"), "{down:?}");
    }

    #[test]
    fn while_the_server_is_waited_for_only_that_is_said() {
        let page = render(&Config::example(), 0, None);
        let expected = [
            "anabranch_info",
            "anabranch_running",
            "anabranch_start_time_seconds",
        ];
        assert_eq!(names(&page), BTreeSet::from(expected));
        assert!(page.contains("anabranch_running 0"), "{page}");
    }

    #[test]
    fn every_metric_is_in_the_documentation_and_no_other() {
        let page = render(&Config::example(), 0, Some(&full()));
        let rows = PAGE.lines().filter_map(|line| line.strip_prefix("| `anabranch_"));
        let documented: BTreeSet<String> = rows
            .filter_map(|rest| rest.split(['`', '{']).next())
            .map(|name| format!("anabranch_{name}"))
            .collect();
        let served: BTreeSet<String> = names(&page).into_iter().map(str::to_owned).collect();
        assert_eq!(served, documented);
    }
}
