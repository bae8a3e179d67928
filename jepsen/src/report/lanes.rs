//! What every client was doing at each moment: a lane each, with the faults behind them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::{HEIGHT, Timeline, WIDTH};
use crate::client::client_of;
use crate::history::{History, Op, Stage};

/// A transaction that takes this long is a bar of its own, microseconds; so is one of which nobody knows what became of it.
const LONG_US: i64 = 200_000;

/// Shorter ones are strokes, and one where no more than this is between two, units of SVG.
const APART: f64 = 0.5;

/// Bars at most: a page must stay light.
const BARS: usize = 3_000;

/// A transaction, from its beginning to its end.
struct Bar<'a> {
    from_us: i64,
    to_us: i64,
    stage: Stage,
    op: &'a Op,
}

/// Per client its transactions, in order; one that nobody saw end lasts as long as the history.
fn of_clients(history: &History, length_us: i64) -> BTreeMap<u64, Vec<Bar<'_>>> {
    let clients = u64::try_from(history.header.clients * history.header.servers.len()).unwrap_or(0);
    let mut begun: BTreeMap<i64, &Op> = BTreeMap::new();
    let mut bars = Vec::new();
    for op in history.ops() {
        if op.stage == Stage::Invoke {
            begun.insert(op.txn, op);
            continue;
        }
        bars.push(Bar {
            from_us: begun.remove(&op.txn).map_or(op.at_us, |begun| begun.at_us),
            to_us: op.at_us,
            stage: op.stage,
            op,
        });
    }
    bars.extend(begun.into_values().map(|op| Bar {
        from_us: op.at_us,
        to_us: length_us,
        stage: Stage::Info,
        op,
    }));
    let mut lanes: BTreeMap<u64, Vec<Bar>> = BTreeMap::new();
    for bar in bars {
        let client = client_of(bar.op.process, clients);
        lanes.entry(client).or_default().push(bar);
    }
    lanes
}

/// Short transactions of a lane, as one path.
struct Strokes {
    path: String,
    /// Where the last one ends.
    end: f64,
}

impl Strokes {
    fn new() -> Self {
        Self {
            path: String::new(),
            end: f64::NEG_INFINITY,
        }
    }

    fn add(&mut self, from: f64, to: f64, y: f64) {
        if from - self.end > APART {
            let _ = write!(self.path, "M{from:.1} {y:.1}");
        }
        // One without any length is not drawn.
        self.end = to.max(from + 0.2);
        let _ = write!(self.path, "H{:.1}", self.end);
    }

    fn draw(&self, out: &mut String, color: &str, tall: f64) {
        let path = &self.path;
        if path.is_empty() {
            return;
        }
        let _ = write!(
            out,
            "<path d='{path}' stroke='{color}' stroke-width='{tall:.1}' fill='none'/>"
        );
    }
}

/// The picture.
pub(super) fn draw(out: &mut String, history: &History, timeline: &Timeline) {
    let lanes = of_clients(history, timeline.length_us);
    if lanes.is_empty() {
        return;
    }
    let _ = write!(
        out,
        "<p class=note>What each client was doing: a lane for each, named by the node where it began. Blue acknowledged, orange refused; dark, \
         or red where nobody knows, what took {} ms or longer (point at it for the transaction).</p>\
         <svg viewBox='0 0 {WIDTH} {HEIGHT}'>{}",
        LONG_US / 1_000,
        timeline.backdrop()
    );
    let lane_height = HEIGHT / lanes.len() as f64;
    let tall = lane_height * 0.7;
    let mut count = 0;
    for (lane, bars) in lanes.values().enumerate() {
        let y = (lane as f64 + 0.5) * lane_height;
        let (mut done, mut refused) = (Strokes::new(), Strokes::new());
        let mut long = String::new();
        for bar in bars {
            let (from, to) = (timeline.x(bar.from_us), timeline.x(bar.to_us));
            let took_us = bar.to_us - bar.from_us;
            let is_short = took_us < LONG_US && bar.stage != Stage::Info;
            if is_short || count >= BARS {
                let strokes = if bar.stage == Stage::Ok {
                    &mut done
                } else {
                    &mut refused
                };
                strokes.add(from, to, y);
                continue;
            }
            count += 1;
            let (color, word) = match bar.stage {
                Stage::Ok => ("#0b3d70", "acknowledged"),
                Stage::Info => ("#cc0000", "unknown"),
                _ => ("#a86200", "refused"),
            };
            let _ = write!(
                long,
                "<rect x='{from:.1}' y='{:.1}' width='{:.1}' height='{tall:.1}' fill='{color}'><title>n{}, session {}, transaction {}: \
                 {word} after {:.3} s</title></rect>",
                y - tall / 2.0,
                (to - from).max(1.0),
                bar.op.node,
                bar.op.process,
                bar.op.txn,
                took_us as f64 / 1e6
            );
        }
        done.draw(out, "#7fa9d1", tall);
        refused.draw(out, "#e69500", tall);
        out.push_str(&long);
        if let Some(first) = bars.first() {
            let _ = write!(
                out,
                "<text x='2' y='{:.1}' font-size='{:.1}'>n{}</text>",
                y + tall / 3.0,
                tall.min(11.0),
                first.op.node
            );
        }
    }
    out.push_str("</svg>");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{Event, Header};

    /// An operation of the client of this number, of two, at its own node.
    fn op(client: u16, txn: i64, stage: Stage, at_us: i64) -> Event {
        Event::Op(Op {
            at_us,
            stage,
            process: u64::from(client + 1) * 100_000 + u64::from(client),
            node: client + 1,
            txn,
            steps: Vec::new(),
            error: None,
        })
    }

    #[test]
    fn each_client_has_a_lane_in_which_what_took_long_or_never_ended_is_named() {
        let header = Header {
            servers: vec![15, 15],
            clients: 1,
            ..Header::default()
        };
        let events = vec![
            op(0, 1, Stage::Invoke, 0),
            op(0, 1, Stage::Ok, 10_000),
            op(0, 2, Stage::Invoke, 10_001),
            op(0, 2, Stage::Ok, 20_000),
            op(0, 3, Stage::Invoke, 500_000),
            op(1, 4, Stage::Invoke, 600_000),
            op(0, 3, Stage::Ok, 900_000),
            op(1, 4, Stage::Fail, 910_000),
            op(1, 5, Stage::Invoke, 1_000_000),
            op(0, 6, Stage::Invoke, 9_000_000),
            op(0, 6, Stage::Fail, 10_000_000),
        ];
        let history = History { header, events };
        let mut page = String::new();
        draw(&mut page, &history, &Timeline::of(&history));
        // The first two are one stroke.
        assert!(
            page.contains("<path d='M0.0 55.0H1.0H2.0' stroke='#7fa9d1'"),
            "{page}"
        );
        assert_eq!(page.matches("<text").count(), 2, "{page}");
        for wanted in [
            "n1, session 100000, transaction 3: acknowledged after 0.400 s",
            "n2, session 200001, transaction 4: refused after 0.310 s",
            "n2, session 200001, transaction 5: unknown after 9.000 s",
            "n1, session 100000, transaction 6: refused after 1.000 s",
        ] {
            assert!(page.contains(wanted), "{wanted}: {page}");
        }
        assert_eq!(page.matches("<rect").count(), 4, "{page}");
    }
}
