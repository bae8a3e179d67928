//! Appending, reading and trimming on a real disk.

use std::fs;
use std::future::Future;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::*;

pub(super) fn poll_once<F: Future>(future: F) -> Poll<F::Output> {
    std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop()))
}

#[tokio::test]
async fn what_is_appended_is_read_back_per_origin_and_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let mut origins = [Origin::new(1), Origin::new(2), Origin::new(3)];
    let mut appended = Vec::new();
    {
        let (journal, recovered) = open(dir.path());
        assert_eq!((recovered.next_seq, recovered.frames), (0, 0));
        for step in 0..600usize {
            let frame = origins[step % 3].whole(step * 7 % 900);
            assert_eq!(journal.append(frame.clone()).await.unwrap(), step as u64);
            appended.push(frame);
        }
        journal.wait_durable(599).await.unwrap();
        assert_eq!(journal.durable_vector(), journal.written_vector());
        assert!(journal.stats().segments > 3);
        journal.close().await.unwrap();
        assert!(matches!(
            journal.append(origins[0].clone().whole(1)).await,
            Err(Error::Closed)
        ));
    }
    let (journal, recovered) = open(dir.path());
    assert_eq!(
        (recovered.first_seq, recovered.next_seq, recovered.frames),
        (0, 600, 600)
    );
    for origin in &origins {
        assert_eq!(recovered.last.get(origin.id), at(origin.last));
        let read = read_all(&journal, origin.id, Position::ZERO).unwrap();
        assert_eq!(read.len(), 200);
        for located in read {
            assert!(same(&located.frame, &appended[located.seq as usize]));
        }
        // In the middle of the stream, and in the middle of a frame.
        for after in [1000, 1005] {
            let read = read_all(&journal, origin.id, at(after)).unwrap();
            assert_eq!(read.len(), 100);
            assert_eq!(read[0].frame.meta.prev, at(1000));
        }
        assert!(read_all(&journal, origin.id, at(origin.last)).unwrap().is_empty());
    }
    assert_eq!(journal.append(origins[1].whole(5)).await.unwrap(), 600);
}

#[tokio::test]
async fn frames_survive_in_space_that_was_prepared() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        segment_bytes: 1 << 20,
        ..options(dir.path())
    };
    let mut origin = Origin::new(2);
    let frames: Vec<_> = (0..40).map(|_| origin.whole(30_000)).collect();
    let (journal, _) = Journal::open(options.clone(), Arc::new(RealDisk)).unwrap();
    for frame in &frames {
        // Each is a group, and some come to space that is not prepared; one to the next file.
        let seq = journal.append(frame.clone()).await.unwrap();
        journal.wait_durable(seq).await.unwrap();
    }
    assert_eq!(journal.stats().segments, 2);
    journal.close().await.unwrap();
    let (journal, recovered) = Journal::open(options, Arc::new(RealDisk)).unwrap();
    assert_eq!(recovered.frames, 40);
    let read = read_all(&journal, NodeId(2), Position::ZERO).unwrap();
    let is_same = |(located, frame): (&Located, &Frame)| same(&located.frame, frame);
    assert!(read.len() == 40 && read.iter().zip(&frames).all(is_same));
}

#[tokio::test]
async fn a_frame_wakes_readers_of_its_kind_alone_and_the_end_wakes_all() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    let (mut own, mut other) = (Origin::new(1), Origin::new(2));
    let mut of_others = journal.appended_of_others();
    let mut cursors = [own.id, other.id].map(|id| journal.cursor(id, Position::ZERO).unwrap());
    journal.append(own.whole(5)).await.unwrap();
    assert!(!of_others.has_changed().unwrap());
    journal.append(other.whole(5)).await.unwrap();
    assert!(of_others.has_changed().unwrap());
    of_others.mark_unchanged();
    for cursor in &mut cursors {
        cursor.next().await.unwrap();
    }
    let [mut of_own, mut of_other] = cursors;
    let waiting = tokio::spawn(async move { (of_own.next().await.is_ok(), of_own.next().await.is_err()) });
    let ended = tokio::spawn(async move { of_other.next().await.is_err() });
    tokio::task::yield_now().await;
    journal.append(own.whole(5)).await.unwrap();
    assert!(!of_others.has_changed().unwrap());
    tokio::task::yield_now().await;
    journal.close().await.unwrap();
    assert_eq!(waiting.await.unwrap(), (true, true));
    assert!(ended.await.unwrap());
}

#[tokio::test]
async fn frames_larger_than_a_segment_and_than_the_window_survive() {
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::new(2);
    let frames: Vec<_> = [0, 1_000_000, 3, 300_000, 65_536, 65_537, 0, 10]
        .map(|len| origin.whole(len))
        .into();
    let (journal, _) = open(dir.path());
    for frame in &frames {
        journal.append(frame.clone()).await.unwrap();
    }
    journal.close().await.unwrap();
    let (journal, recovered) = open(dir.path());
    assert_eq!(recovered.frames, 8);
    let read = read_all(&journal, NodeId(2), Position::ZERO).unwrap();
    assert_eq!(read.len(), frames.len());
    assert!(
        read.iter()
            .zip(&frames)
            .all(|(located, frame)| same(&located.frame, frame))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_follows_the_writer_across_segments() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    let mut cursor = journal.cursor(NodeId(7), Position::ZERO).unwrap();
    let reader = tokio::spawn(async move {
        let mut frames = Vec::new();
        while frames.len() < 2_000 {
            frames.push(cursor.next().await.unwrap());
        }
        frames
    });
    let (mut seven, mut eight) = (Origin::new(7), Origin::new(8));
    let (mut appended, mut last) = (Vec::new(), 0);
    for step in 0..2_000usize {
        let frame = seven.whole(step % 300);
        journal.append(frame.clone()).await.unwrap();
        appended.push(frame);
        last = journal.append(eight.whole(100)).await.unwrap();
    }
    let read = reader.await.unwrap();
    // It reads from memory what is not written yet.
    journal.wait_durable(last).await.unwrap();
    assert!(
        read.iter()
            .zip(&appended)
            .all(|(located, frame)| same(&located.frame, frame))
    );
    assert!(journal.stats().segments > 5);
}

#[tokio::test]
async fn a_dropped_wait_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    let mut origin = Origin::new(1);
    let mut cursor = journal.cursor(NodeId(1), Position::ZERO).unwrap();
    assert!(poll_once(cursor.next()).is_pending());
    for step in 0..3 {
        let seq = journal.append(origin.whole(10)).await.unwrap();
        journal.wait_durable(seq).await.unwrap();
        assert_eq!(cursor.next().await.unwrap().seq, step);
        assert!(poll_once(cursor.next()).is_pending());
    }
}

#[tokio::test]
async fn a_frame_that_does_not_continue_its_origin_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    let mut origin = Origin::new(1);
    // A first frame may begin anywhere: a joining node begins at its snapshot.
    origin.last = 500;
    let first = origin.whole(10);
    journal.append(first.clone()).await.unwrap();
    assert!(matches!(journal.append(first).await, Err(Error::OutOfOrder { have, .. }) if have == at(510)));
    let mut ahead = origin.clone();
    ahead.last += 1;
    assert!(matches!(
        journal.append(ahead.whole(1)).await,
        Err(Error::OutOfOrder { .. })
    ));
    let mut backwards = origin.clone().whole(1);
    backwards.meta.last = backwards.meta.prev;
    assert!(matches!(
        journal.append(backwards).await,
        Err(Error::BadFrame { .. })
    ));
    origin.run += 1;
    assert!(matches!(
        journal.append(origin.part(1, 10)).await,
        Err(Error::BadFrame { .. })
    ));
    journal.append(origin.part(0, 10)).await.unwrap();
    assert!(matches!(
        journal.append(origin.part(2, 10)).await,
        Err(Error::BadFrame { .. })
    ));
    // Sent again from its beginning, as after a lost connection.
    origin.run -= 1;
    journal.append(origin.part(0, 10)).await.unwrap();
    journal.append(origin.end(1, 10)).await.unwrap();
    assert_eq!(journal.append(origin.whole(1)).await.unwrap(), 4);
}

#[tokio::test]
async fn a_large_transaction_is_skimmed_and_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    let (mut one, mut two) = (Origin::new(1), Origin::new(2));
    journal.append(one.whole(10)).await.unwrap();
    for part in 0..20 {
        journal.append(one.part(part, 9_000)).await.unwrap();
        journal.append(two.whole(50)).await.unwrap();
    }
    journal.append(one.end(20, 77)).await.unwrap();
    let seq = journal.append(one.whole(10)).await.unwrap();
    journal.wait_durable(seq).await.unwrap();

    let mut cursor = journal.cursor(one.id, at(10)).unwrap();
    let place = cursor.save();
    let mut skimmed = Vec::new();
    while let Some((meta, _)) = cursor.try_skim().unwrap() {
        skimmed.push(meta);
    }
    assert_eq!(skimmed.len(), 22);
    assert_eq!((skimmed[20].kind, skimmed[20].last), (FrameKind::End, at(20)));
    let mut again = journal.cursor_at(place).unwrap();
    for meta in skimmed {
        assert_eq!(again.next().await.unwrap().frame.meta, meta);
    }
    // One who has the transaction gets none of its parts, one who has not gets all of them.
    assert_eq!(read_all(&journal, one.id, at(20)).unwrap().len(), 1);
    assert_eq!(read_all(&journal, one.id, at(10)).unwrap().len(), 22);
    assert_eq!(read_all(&journal, one.id, Position::ZERO).unwrap().len(), 23);
    // One who looks for the transaction gets all of its parts, and one who looks for the next only that.
    let frames_from = |position| {
        let mut cursor = journal.cursor_on(one.id, position).unwrap();
        std::iter::from_fn(move || cursor.try_next().unwrap()).count()
    };
    assert_eq!([at(10), at(20), at(30), at(40)].map(frames_from), [23, 22, 1, 0]);
}

#[tokio::test]
async fn stable_segments_go_and_a_reader_that_still_needs_them_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    let (mut one, mut two) = (Origin::new(1), Origin::new(2));
    let mut behind = journal.cursor(one.id, Position::ZERO).unwrap();
    let mut idle = journal.cursor(NodeId(9), Position::ZERO).unwrap();
    let mut seq = 0;
    for _ in 0..500 {
        journal.append(one.whole(500)).await.unwrap();
        seq = journal.append(two.whole(500)).await.unwrap();
    }
    journal.wait_durable(seq).await.unwrap();
    assert_eq!(behind.next().await.unwrap().seq, 0);
    let before = journal.stats();

    // Nothing goes as long as one origin is not stable.
    assert_eq!(
        journal
            .retain(&[(one.id, at(one.last))].into_iter().collect())
            .unwrap(),
        Reclaimed::default()
    );
    let half: Vector = [(one.id, at(2_500)), (two.id, at(2_500))].into_iter().collect();
    let reclaimed = journal.retain(&half).unwrap();
    assert!(reclaimed.segments >= 3);
    assert_eq!(
        journal.stats().segments,
        before.segments - reclaimed.segments as usize
    );
    assert_eq!(
        journal.stats().bytes_on_disk,
        before.bytes_on_disk - reclaimed.bytes
    );
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        journal.stats().segments
    );

    assert!(matches!(behind.try_next(), Err(Error::Trimmed { .. })));
    assert!(matches!(
        journal.cursor(one.id, at(10)),
        Err(Error::Trimmed { .. })
    ));
    assert_eq!(read_all(&journal, one.id, at(2_500)).unwrap().len(), 250);
    // A reader of an origin without frames needed nothing of what went.
    assert!(idle.try_next().unwrap().is_none());
    let mut nine = Origin::new(9);
    let seq = journal.append(nine.whole(5)).await.unwrap();
    assert_eq!(idle.next().await.unwrap().seq, seq);

    journal.close().await.unwrap();
}

#[tokio::test]
async fn a_stable_active_segment_goes_too_and_every_end_is_still_known() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    let (mut one, mut two) = (Origin::new(1), Origin::new(2));
    for _ in 0..20 {
        journal.append(one.whole(1_000)).await.unwrap();
        journal.append(two.whole(1_000)).await.unwrap();
    }
    assert_eq!(journal.appended_vector().get(two.id), at(two.last));
    journal.wait_durable(39).await.unwrap();
    assert_eq!(journal.stats().segments, 1);
    let mut cursor = journal.cursor(one.id, at(one.last)).unwrap();
    let all: Vector = [&one, &two]
        .iter()
        .map(|origin| (origin.id, at(origin.last)))
        .collect();
    // The writer seals it, and a later call deletes it.
    while journal.stats().frames > 0 {
        journal.retain(&all).unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!((journal.stats().segments, journal.stats().oldest_seq), (1, 40));
    // An empty active segment stays.
    assert_eq!(journal.retain(&all).unwrap(), Reclaimed::default());
    journal.close().await.unwrap();

    let (journal, recovered) = open(dir.path());
    assert_eq!(recovered.last, all);
    assert_eq!(
        (recovered.first_seq, recovered.next_seq, recovered.frames),
        (40, 40, 0)
    );
    assert!(
        matches!(journal.cursor(one.id, at(10)), Err(Error::Trimmed { oldest, .. }) if oldest == at(one.last))
    );
    let seq = journal.append(one.whole(10)).await.unwrap();
    journal.wait_durable(seq).await.unwrap();
    assert_eq!(read_all(&journal, one.id, at(200)).unwrap().len(), 1);
    assert!(matches!(cursor.next().await, Err(Error::Closed)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_writer_and_trimming_do_not_disturb_each_other() {
    const FRAMES: usize = 4_000;
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    let mut readers = Vec::new();
    let reached: Vec<_> = (1..=4u16)
        .map(|reader| {
            (
                NodeId(1 + reader % 2),
                tokio::sync::watch::Sender::new(Position::ZERO),
            )
        })
        .collect();
    for (origin, sender) in reached.clone() {
        let mut cursor = journal.cursor(origin, Position::ZERO).unwrap();
        readers.push(tokio::spawn(async move {
            for step in 1..=FRAMES as u64 {
                let located = cursor.next().await.unwrap();
                let meta = located.frame.meta;
                assert_eq!((meta.origin, meta.last), (origin, at(step * 10)));
                assert_eq!(located.frame.payload, payload(&meta, located.frame.payload.len()));
                sender.send_replace(meta.last);
            }
        }));
    }
    let trimmer = tokio::spawn({
        let journal = journal.clone();
        async move {
            loop {
                let least = |id| {
                    reached
                        .iter()
                        .filter(|it| it.0 == id)
                        .map(|it| *it.1.borrow())
                        .min()
                        .unwrap()
                };
                let stable: Vector = [NodeId(1), NodeId(2)]
                    .map(|id| (id, least(id)))
                    .into_iter()
                    .collect();
                journal.retain(&stable).unwrap();
                if stable.iter().filter(|it| it.1 == at(FRAMES as u64 * 10)).count() == 2 {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
    });
    let mut origins = [Origin::new(1), Origin::new(2)];
    for step in 0..FRAMES * 2 {
        journal
            .append(origins[step % 2].whole(step * 31 % 700))
            .await
            .unwrap();
    }
    for reader in readers {
        reader.await.unwrap();
    }
    trimmer.await.unwrap();
    // All was read, some of it before it was written: what came to a file only then goes now.
    let last = FRAMES as u64 * 2 - 1;
    journal.wait_durable(last).await.unwrap();
    let all: Vector = [NodeId(1), NodeId(2)]
        .map(|id| (id, at(FRAMES as u64 * 10)))
        .into_iter()
        .collect();
    journal.retain(&all).unwrap();
    assert!(journal.stats().oldest_seq > FRAMES as u64);
}

#[tokio::test]
async fn parts_stay_until_their_end_is_stable() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    let (mut one, mut two) = (Origin::new(1), Origin::new(2));
    for part in 0..20 {
        journal.append(one.part(part, 10_000)).await.unwrap();
    }
    let seq = journal.append(two.whole(10)).await.unwrap();
    journal.wait_durable(seq).await.unwrap();
    let far: Vector = [(one.id, at(1_000)), (two.id, at(1_000))].into_iter().collect();
    assert_eq!(journal.retain(&far).unwrap(), Reclaimed::default());
    let seq = journal.append(one.end(20, 10)).await.unwrap();
    journal.wait_durable(seq).await.unwrap();
    let before_it: Vector = [(one.id, at(9)), (two.id, at(1_000))].into_iter().collect();
    assert_eq!(journal.retain(&before_it).unwrap(), Reclaimed::default());
    assert_eq!(read_all(&journal, one.id, Position::ZERO).unwrap().len(), 21);

    // The same must be known after opening again.
    journal.close().await.unwrap();
    drop(journal);
    let (journal, _) = open(dir.path());
    assert_eq!(journal.retain(&before_it).unwrap(), Reclaimed::default());
    assert!(journal.retain(&far).unwrap().segments >= 3);
    assert!(matches!(
        journal.cursor(one.id, Position::ZERO),
        Err(Error::Trimmed { .. })
    ));
}

#[tokio::test]
async fn parts_whose_writing_was_given_up_go_with_what_came_in_their_place() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    let mut one = Origin::new(1);
    for part in 0..10 {
        journal.append(one.part(part, 10_000)).await.unwrap();
    }
    for _ in 0..10 {
        journal.append(one.whole(10_000)).await.unwrap();
    }
    let seq = journal.append(one.whole(10)).await.unwrap();
    journal.wait_durable(seq).await.unwrap();
    assert_eq!(
        journal
            .retain(&[(one.id, at(9))].into_iter().collect())
            .unwrap()
            .segments,
        0
    );
    assert!(
        journal
            .retain(&[(one.id, at(10))].into_iter().collect())
            .unwrap()
            .segments
            >= 1
    );
}

#[tokio::test]
async fn another_process_node_or_cluster_is_kept_out() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    assert!(matches!(
        Journal::open(options(dir.path()), Arc::new(RealDisk)),
        Err(Error::Locked { .. })
    ));
    journal.close().await.unwrap();
    let other = Options {
        node: NodeId(2),
        ..options(dir.path())
    };
    assert!(matches!(
        Journal::open(other, Arc::new(RealDisk)),
        Err(Error::Foreign { .. })
    ));
    let other = Options {
        cluster: "other".into(),
        ..options(dir.path())
    };
    assert!(matches!(
        Journal::open(other, Arc::new(RealDisk)),
        Err(Error::Foreign { .. })
    ));
    open(dir.path());
}

#[tokio::test]
async fn at_its_limit_the_journal_says_so_and_takes_what_comes_until_something_is_stable() {
    const LIMIT: u64 = 4 * 64 * 1024;
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        max_bytes: LIMIT,
        ..options(dir.path())
    };
    let (journal, _) = Journal::open(options.clone(), Arc::new(RealDisk)).unwrap();
    let mut origin = Origin::new(1);
    let mut appended = 0;
    while journal.full().is_none() {
        let seq = journal.append(origin.whole(10_000)).await.unwrap();
        journal.wait_durable(seq).await.unwrap();
        appended += 1;
    }
    assert!(journal.full().unwrap().contains("max_size_mib"));
    let bytes = journal.stats().bytes_on_disk;
    assert!((LIMIT - 64 * 1024..=LIMIT).contains(&bytes), "{bytes}");
    for _ in 0..2 * appended {
        let seq = journal.append(origin.whole(10_000)).await.unwrap();
        journal.wait_durable(seq).await.unwrap();
    }
    assert!(journal.stats().bytes_on_disk > 2 * LIMIT);
    assert_eq!(journal.stats().stalled, None);
    // Opened again it is what it was.
    journal.close().await.unwrap();
    drop(journal);
    let (journal, recovered) = Journal::open(options, Arc::new(RealDisk)).unwrap();
    assert_eq!(recovered.frames, 3 * appended);
    assert!(journal.full().is_some());
    let stable = [(origin.id, Position::new(1, origin.last))].into_iter().collect();
    while journal.full().is_some() {
        // Again and again, as the daemon does: what is sealed only now can go only now.
        journal.retain(&stable).unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(journal.stats().bytes_on_disk <= 2 * 64 * 1024);
}

#[tokio::test]
async fn what_nobody_waits_for_is_written_at_once_and_shares_a_sync() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        sync_within: Duration::from_secs(3_600),
        ..options(dir.path())
    };
    let (journal, _) = Journal::open(options.clone(), Arc::new(RealDisk)).unwrap();
    let mut origin = Origin::new(1);
    let mut written = journal.written();
    let durable = journal.durable();
    for seq in 0..3 {
        journal.append_unhurried(origin.whole(100)).await.unwrap();
        written.wait_for(|&written| written == seq + 1).await.unwrap();
    }
    assert_eq!(*durable.borrow(), 0);
    // One that is waited for takes those before it along.
    let seq = journal.append(origin.whole(100)).await.unwrap();
    journal.wait_durable(seq).await.unwrap();
    assert_eq!(*durable.borrow(), 4);
    // So does the waiting itself.
    let seq = journal.append_unhurried(origin.whole(100)).await.unwrap();
    written.wait_for(|&written| written == seq + 1).await.unwrap();
    assert_eq!(*durable.borrow(), 4);
    journal.wait_durable(seq).await.unwrap();
    // And the end.
    journal.append_unhurried(origin.whole(100)).await.unwrap();
    journal.close().await.unwrap();
    assert_eq!(*durable.borrow(), 6);
    let (_, recovered) = Journal::open(options, Arc::new(RealDisk)).unwrap();
    assert_eq!(recovered.next_seq, 6);
}

#[tokio::test]
async fn what_nobody_waits_for_is_durable_soon() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    let mut origin = Origin::new(1);
    let mut durable = journal.durable();
    for seq in 0..3 {
        journal.append_unhurried(origin.whole(100)).await.unwrap();
        durable.wait_for(|&durable| durable == seq + 1).await.unwrap();
    }
}

#[tokio::test]
async fn a_file_is_full_of_frames_that_nobody_waits_for() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        segment_bytes: 4096,
        sync_within: Duration::from_secs(3_600),
        ..options(dir.path())
    };
    let (journal, _) = Journal::open(options.clone(), Arc::new(RealDisk)).unwrap();
    let mut origin = Origin::new(1);
    for _ in 0..20 {
        journal.append_unhurried(origin.whole(1_000)).await.unwrap();
    }
    // The last file's are not durable yet; a sealed one is.
    journal
        .written()
        .wait_for(|&written| written == 20)
        .await
        .unwrap();
    let durable = *journal.durable().borrow();
    assert!((1..20).contains(&durable), "{durable}");
    journal.close().await.unwrap();
    let (journal, recovered) = Journal::open(options, Arc::new(RealDisk)).unwrap();
    assert_eq!(recovered.next_seq, 20);
    assert_eq!(read_all(&journal, origin.id, at(0)).unwrap().len(), 20);
}
