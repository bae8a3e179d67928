//! Frames that are read from memory: before they are written, while they are written, and after they have left it.

use proptest::prelude::*;

use super::fake::FakeDisk;
use super::*;

/// Number and description of the frames that a cursor gives now.
fn rest(cursor: &mut Cursor) -> Vec<Located> {
    std::iter::from_fn(|| cursor.try_next().unwrap()).collect()
}

#[tokio::test]
async fn frames_are_read_before_they_are_written() {
    let disk = FakeDisk::default();
    let (journal, _) = Journal::open(options(Path::new("/journal")), Arc::new(disk.clone())).unwrap();
    let (mut one, mut two) = (Origin::new(1), Origin::new(2));
    let mut early = journal.cursor(one.id, Position::ZERO).unwrap();
    assert!(early.try_next().unwrap().is_none());
    // While the first frame is being made durable the others are nowhere but in memory.
    disk.hold_syncs(true);
    let mut appended = vec![one.whole(300)];
    journal.append(appended[0].clone()).await.unwrap();
    journal.written().wait_for(|&written| written == 1).await.unwrap();
    for _ in 0..3 {
        journal.append(two.whole(10)).await.unwrap();
        appended.push(one.whole(300));
        journal.append(appended.last().unwrap().clone()).await.unwrap();
    }
    assert_eq!(*journal.written().borrow(), 1);
    let late = journal.cursor(one.id, at(10)).unwrap();
    for (mut cursor, from) in [(early, 0), (late, 1)] {
        for frame in &appended[from..] {
            assert!(same(&cursor.next().await.unwrap().frame, frame));
        }
        assert!(cursor.try_next().unwrap().is_none());
    }
    disk.hold_syncs(false);
    journal.close().await.unwrap();
}

#[tokio::test]
async fn a_reader_that_falls_behind_goes_on_in_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    let (mut one, mut two) = (Origin::new(1), Origin::new(2));
    let mut behind = journal.cursor(one.id, Position::ZERO).unwrap();
    assert!(behind.try_next().unwrap().is_none());
    let at_the_start = behind.save();
    let mut appended = Vec::new();
    let mut in_a_transaction = None;
    // Some four MiB in segments of 64 KiB: most has left the memory at the end.
    for step in 0..400u32 {
        let frames = match step % 10 {
            0 => vec![one.part(0, 7_000), one.part(1, 7_000), one.end(2, 7_000)],
            _ => vec![one.whole(9_000)],
        };
        for frame in frames {
            journal.append(frame.clone()).await.unwrap();
            journal.append(two.whole(1_000)).await.unwrap();
            appended.push(frame);
            if appended.len() == 8 {
                // Between the parts of a transaction.
                assert_eq!(appended[0].meta.kind, FrameKind::Part);
                let mut cursor = journal.cursor_at(at_the_start).unwrap();
                cursor.next().await.unwrap();
                in_a_transaction = Some(cursor.save());
            }
        }
    }
    let seq = journal.append(two.whole(1)).await.unwrap();
    journal.wait_durable(seq).await.unwrap();
    let again = journal.cursor_at(at_the_start).unwrap();
    let parts = journal.cursor_at(in_a_transaction.unwrap()).unwrap();
    for (mut cursor, from) in [(behind, 0), (again, 0), (parts, 1)] {
        let read = rest(&mut cursor);
        assert_eq!(read.len(), appended.len() - from);
        for (located, frame) in read.iter().zip(&appended[from..]) {
            assert!(same(&located.frame, frame));
        }
    }
    // Where a reader in memory stood, after what it stood at has left.
    let mut cursor = journal.cursor(one.id, at(one.last)).unwrap();
    assert!(cursor.try_next().unwrap().is_none());
    let stood = cursor.save();
    let frames: Vec<Frame> = (0..400).map(|_| one.whole(9_000)).collect();
    for frame in &frames {
        journal.append(frame.clone()).await.unwrap();
    }
    let read = rest(&mut journal.cursor_at(stood).unwrap());
    assert_eq!(read.len(), 400);
    assert!(
        read.iter()
            .zip(&frames)
            .all(|(located, frame)| same(&located.frame, frame))
    );
}

/// What a reader does between two appends.
#[derive(Debug, Clone)]
enum Act {
    Append { origin: bool, kind: u8, len: usize },
    Read(usize),
    Reopen,
    Wait,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => (any::<bool>(), 0u8..4, 0usize..60_000)
            .prop_map(|(origin, kind, len)| Act::Append { origin, kind, len }),
        3 => (1usize..6).prop_map(Act::Read),
        1 => Just(Act::Reopen),
        1 => Just(Act::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn a_reader_gets_each_frame_once_and_in_order_wherever_it_is(acts in prop::collection::vec(act(), 1..250)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let (journal, _) = open(dir.path());
            let mut origins = [Origin::new(1), Origin::new(2)];
            let mut parts = [0u32; 2];
            let mut last = None;
            let mut appended: Vec<FrameMeta> = Vec::new();
            let mut read: Vec<FrameMeta> = Vec::new();
            let mut cursor = journal.cursor(NodeId(1), Position::ZERO).unwrap();
            for act in acts {
                match act {
                    Act::Append { origin, kind, len } => {
                        let at = usize::from(origin);
                        let (origin, part) = (&mut origins[at], &mut parts[at]);
                        // A transaction that was begun is gone on with, or ended.
                        let frame = match (*part, kind) {
                            (0, 0) => {
                                *part = 1;
                                origin.part(0, len)
                            }
                            (0, _) => origin.whole(len),
                            (_, 0 | 1) => {
                                *part += 1;
                                origin.part(*part - 1, len)
                            }
                            _ => origin.end(std::mem::take(part), len),
                        };
                        if at == 0 {
                            appended.push(frame.meta);
                        }
                        last = Some(journal.append(frame).await.unwrap());
                    }
                    Act::Read(count) => {
                        for _ in 0..count {
                            let Some(located) = cursor.try_next().unwrap() else { break };
                            assert_eq!(located.frame.payload, payload(&located.frame.meta, located.frame.payload.len()));
                            read.push(located.frame.meta);
                        }
                    }
                    Act::Reopen => cursor = journal.cursor_at(cursor.save()).unwrap(),
                    Act::Wait => {
                        if let Some(last) = last {
                            journal.wait_durable(last).await.unwrap();
                        }
                    }
                }
            }
            read.extend(rest(&mut cursor).iter().map(|located| located.frame.meta));
            assert_eq!(read, appended);
        });
    }
}
