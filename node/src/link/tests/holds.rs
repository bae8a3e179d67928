//! What is accepted, whatever the links bring.

use proptest::prelude::*;

use super::super::holds::{Holds, LinkToken, Verdict};
use super::*;

struct Bench {
    holds: Holds,
    journal: Journal,
    _dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let members = [NodeId(1), NodeId(2), NodeId(3)];
        let journal = open_journal(dir.path(), NodeId(1), Arc::new(journal::RealDisk));
        Self {
            holds: Holds::new(NodeId(1), &members, &Vector::new()),
            journal,
            _dir: dir,
        }
    }

    async fn offer(&self, link: &LinkToken, frame: Frame) -> Verdict {
        self.holds.accept(frame, link, &self.journal).await.unwrap()
    }

    async fn accepts(&self, link: &LinkToken, frame: Frame) {
        let verdict = self.offer(link, frame).await;
        assert!(matches!(verdict, Verdict::Accepted(_)), "{verdict:?}");
    }
}

#[tokio::test]
async fn duplicates_are_dropped_and_gaps_are_asked_for() {
    let (bench, link) = (Bench::new(), LinkToken::new());
    bench.accepts(&link, whole(2, 0, "x")).await;
    assert_eq!(bench.offer(&link, whole(2, 0, "x")).await, Verdict::Duplicate);
    assert_eq!(bench.offer(&link, whole(2, 20, "x")).await, Verdict::Gap);
    bench.accepts(&link, whole(2, 10, "x")).await;
    bench.accepts(&link, whole(2, 20, "x")).await;
    assert_eq!(bench.holds.position(NodeId(2)), position(30));
    assert_eq!(bench.offer(&link, whole(1, 0, "ours")).await, Verdict::NotWanted);
    assert_eq!(
        bench.offer(&link, whole(9, 0, "no member")).await,
        Verdict::NotWanted
    );
}

#[tokio::test]
async fn pieces_come_in_order_from_any_links_that_carry_the_same_writing() {
    let (bench, one, two) = (Bench::new(), LinkToken::new(), LinkToken::new());
    assert_eq!(bench.offer(&one, piece(2, 0, 7, 1, false)).await, Verdict::Gap);
    bench.accepts(&one, piece(2, 0, 7, 0, false)).await;
    assert_eq!(
        bench.offer(&two, piece(2, 0, 7, 0, false)).await,
        Verdict::Duplicate
    );
    bench.accepts(&two, piece(2, 0, 7, 1, false)).await;
    assert_eq!(bench.offer(&one, piece(2, 0, 7, 3, true)).await, Verdict::Gap);
    bench.accepts(&one, piece(2, 0, 7, 2, false)).await;
    bench.accepts(&two, piece(2, 0, 7, 3, true)).await;
    assert_eq!(
        bench.offer(&one, piece(2, 0, 7, 3, true)).await,
        Verdict::Duplicate
    );
    assert_eq!(
        bench.offer(&one, piece(2, 0, 8, 0, false)).await,
        Verdict::Duplicate
    );
    bench.accepts(&one, whole(2, 10, "next")).await;
}

#[tokio::test]
async fn another_writing_of_a_large_transaction_waits_while_the_first_ones_link_lives() {
    let (bench, one, two) = (Bench::new(), LinkToken::new(), LinkToken::new());
    bench.accepts(&one, piece(2, 0, 7, 0, false)).await;
    assert_eq!(
        bench.offer(&two, piece(2, 0, 8, 0, false)).await,
        Verdict::PassedOver
    );
    assert_eq!(
        bench.offer(&two, piece(2, 0, 8, 1, true)).await,
        Verdict::PassedOver
    );
    assert!(bench.holds.brought_by_other(NodeId(2), &two).await);
    assert!(!bench.holds.brought_by_other(NodeId(2), &one).await);
    drop(one);
    assert!(!bench.holds.brought_by_other(NodeId(2), &two).await);
    assert_eq!(bench.offer(&two, piece(2, 0, 8, 1, true)).await, Verdict::Gap);
    bench.accepts(&two, piece(2, 0, 8, 0, false)).await;
    bench.accepts(&two, piece(2, 0, 8, 1, true)).await;
    assert_eq!(bench.holds.position(NodeId(2)), position(10));
}

#[tokio::test]
async fn a_link_that_gives_up_an_origin_gives_up_its_large_transaction() {
    let (bench, one, two) = (Bench::new(), LinkToken::new(), LinkToken::new());
    bench.accepts(&one, piece(2, 0, 7, 0, false)).await;
    bench.holds.release(NodeId(2), &two).await;
    assert!(bench.holds.brought_by_other(NodeId(2), &two).await);
    bench.holds.release(NodeId(2), &one).await;
    assert!(!bench.holds.brought_by_other(NodeId(2), &two).await);
    bench.accepts(&two, piece(2, 0, 8, 0, true)).await;
}

/// An origin's stream: plain transactions, and large ones in several pieces.
fn stream(shape: &[u8], run: u64) -> Vec<Frame> {
    let mut frames = Vec::new();
    for (at, &pieces) in shape.iter().enumerate() {
        let prev = u64::try_from(at).unwrap() * TXN_BYTES;
        if pieces == 0 {
            frames.push(whole(2, prev, "w"));
            continue;
        }
        let run = run * 1_000 + prev;
        frames.extend(
            (0..u32::from(pieces)).map(|part| piece(2, prev, run, part, part + 1 == u32::from(pieces))),
        );
    }
    frames
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Two links carry the same stream, each written in its own way, and are cut and resumed at random.
    #[test]
    fn the_journal_gets_every_transaction_once_and_in_order(
        shape in prop::collection::vec(0u8..4, 1..12),
        steps in prop::collection::vec((0usize..2, 0u8..10), 0..200),
        same_writing: bool,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let bench = Bench::new();
            let sources = [stream(&shape, 1), stream(&shape, if same_writing { 1 } else { 2 })];
            let mut links = [LinkToken::new(), LinkToken::new()];
            let mut at = [0, 0];
            let resume = |source: &[Frame], held: Position| {
                source.iter().position(|frame| match frame.meta.kind {
                    FrameKind::Part => frame.meta.prev >= held,
                    FrameKind::Whole | FrameKind::End => frame.meta.last > held,
                }).unwrap_or(source.len())
            };
            // Random cuts first, then both links to their ends, as often as it takes.
            let steps = steps.into_iter().chain((0..2_000).map(|n| (n / 50 % 2, 5)));
            for (link, action) in steps {
                if action == 0 {
                    links[link] = LinkToken::new();
                    at[link] = resume(&sources[link], bench.holds.position(NodeId(2)));
                    continue;
                }
                let Some(frame) = sources[link].get(at[link]) else { continue };
                match bench.offer(&links[link], frame.clone()).await {
                    Verdict::Accepted(_) | Verdict::Duplicate => at[link] += 1,
                    Verdict::Gap => at[link] = resume(&sources[link], bench.holds.position(NodeId(2))),
                    Verdict::PassedOver if bench.holds.brought_by_other(NodeId(2), &links[link]).await => {}
                    other => panic!("{other:?}"),
                }
            }
            let end = u64::try_from(shape.len()).unwrap() * TXN_BYTES;
            assert_eq!(bench.holds.position(NodeId(2)), position(end));
            let mut cursor = bench.journal.cursor(NodeId(2), Position::ZERO).unwrap();
            let (mut held, mut run) = (Position::ZERO, None);
            while bench.journal.written_vector().get(NodeId(2)) < position(end) {
                tokio::task::yield_now().await;
            }
            while let Some(found) = cursor.try_next().unwrap() {
                let meta = found.frame.meta;
                assert_eq!(meta.prev, held);
                if meta.kind != FrameKind::Whole {
                    let continues = run == Some((meta.part_run, meta.part));
                    assert!(meta.part == 0 || continues, "piece {} without its predecessor", meta.part);
                    run = Some((meta.part_run, meta.part + 1));
                }
                held = meta.last;
            }
            assert_eq!(held, position(end));
        });
    }
}
