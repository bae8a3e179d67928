//! The power goes at every single operation of random workloads.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::basic::poll_once;
use super::fake::FakeDisk;
use super::*;

/// What must be in the journal, whatever happened.
struct Model {
    /// All frames that may be there, by number.
    appended: Vec<Frame>,
    /// Frames with a smaller number were called durable.
    durable: u64,
    /// The largest vector that was given to `retain`.
    stable: Vector,
    origins: Vec<Origin>,
}

fn small(dir: &str) -> Options {
    Options {
        dir: dir.into(),
        segment_bytes: 4096,
        max_bytes: 1 << 20,
        sync_within: Duration::from_micros(200),
        node: NodeId(1),
        cluster: "test".into(),
    }
}

impl Model {
    fn new() -> Self {
        let origins = (1..=3).map(Origin::new).collect();
        Self {
            appended: Vec::new(),
            durable: 0,
            stable: Vector::new(),
            origins,
        }
    }

    /// Compares what was recovered with what must and may be there, and goes on from it.
    fn check(&mut self, journal: &Journal, recovered: &Recovered, context: &str) {
        let next = recovered.next_seq as usize;
        assert!(
            recovered.next_seq >= self.durable,
            "{context}: {} of {} durable",
            next,
            self.durable
        );
        assert!(
            next <= self.appended.len(),
            "{context}: {next} frames, {} appended",
            self.appended.len()
        );
        self.appended.truncate(next);
        self.durable = recovered.next_seq;
        for origin in &mut self.origins {
            let complete = self
                .appended
                .iter()
                .filter(|it| it.meta.origin == origin.id && it.meta.kind != FrameKind::Part);
            origin.last = complete.last().map_or(0, |frame| frame.meta.last.lsn.0);
            assert_eq!(recovered.last.get(origin.id), at(origin.last), "{context}");
            let after = self.stable.get(origin.id);
            let expected: Vec<_> = (0..)
                .zip(&self.appended)
                .filter(|(_, it)| it.meta.origin == origin.id && concerns(it, after))
                .collect();
            let read =
                read_all(journal, origin.id, after).unwrap_or_else(|error| panic!("{context}: {error}"));
            assert_eq!(read.len(), expected.len(), "{context}: {}", origin.id);
            for (located, (seq, frame)) in read.iter().zip(expected) {
                assert!(
                    located.seq == seq && same(&located.frame, frame),
                    "{context}: frame {seq}"
                );
            }
        }
    }

    /// Appends and trims until the steps are done or the power goes. True if it went.
    async fn work(&mut self, journal: &Journal, rng: &mut StdRng, steps: usize) -> bool {
        let mut open_parts = [None::<u32>; 3];
        for _ in 0..steps {
            let which = rng.random_range(0..3);
            // Few lengths, so that old frames behind a torn tail would fit behind new ones.
            let len = match rng.random_range(0..20) {
                0 => rng.random_range(0..9000),
                1..4 => rng.random_range(0..600),
                _ => 40,
            };
            let origin = &mut self.origins[which];
            let frame = match (open_parts[which], rng.random_range(0..10)) {
                (None, 0..8) => origin.whole(len),
                (None, _) => {
                    open_parts[which] = Some(1);
                    origin.part(0, len)
                }
                (Some(part), 0..6) => {
                    open_parts[which] = Some(part + 1);
                    origin.part(part, len)
                }
                // Given up: whole transactions come in the place of the parts.
                (Some(_), 6) => {
                    open_parts[which] = None;
                    origin.whole(len)
                }
                (Some(part), _) => {
                    open_parts[which] = None;
                    origin.end(part, len)
                }
            };
            let appended = match rng.random() {
                true => journal.append(frame.clone()).await,
                false => journal.append_unhurried(frame.clone()).await,
            };
            let Ok(seq) = appended else {
                return true;
            };
            assert_eq!(seq as usize, self.appended.len());
            self.appended.push(frame);
            if rng.random_range(0..5) == 0 && journal.wait_durable(seq).await.is_err() {
                return true;
            }
            if rng.random_range(0..15) == 0 {
                // Somewhere behind what is durable.
                let durable = journal.durable_vector();
                let stable = durable.iter().map(|(id, position)| {
                    let back = rng.random_range(0..3) * 10;
                    (id, at(position.lsn.0.saturating_sub(back)))
                });
                self.stable.join(&stable.collect());
                if journal.retain(&self.stable).is_err() {
                    return true;
                }
            }
        }
        false
    }
}

fn concerns(frame: &Frame, after: Position) -> bool {
    if frame.meta.kind == FrameKind::Part {
        frame.meta.prev >= after
    } else {
        frame.meta.last > after
    }
}

/// One life after another on one disk, each ending with a crash at a chosen or random operation.
async fn live_and_crash(seed: u64, first_crash: u64) -> bool {
    let mut rng = StdRng::seed_from_u64(seed * 1_000_003 + first_crash);
    let mut model = Model::new();
    let mut disk = FakeDisk::default();
    let mut first_crashed = false;
    for life in 0..6u64 {
        let crash_in = if life == 0 {
            first_crash
        } else {
            rng.random_range(1..60)
        };
        disk.crash_in(crash_in);
        let context = format!("seed {seed}, first crash {first_crash}, life {life}");
        match Journal::open(small("/j"), Arc::new(disk.clone())) {
            Ok((journal, recovered)) => {
                model.check(&journal, &recovered, &context);
                model.work(&journal, &mut rng, 120).await;
                let outcome = journal.close().await;
                assert_eq!(outcome.is_err(), journal.stats().poisoned.is_some());
                model.durable = model.durable.max(journal.stats().durable_seq);
                if outcome.is_ok() {
                    assert_eq!(model.durable as usize, model.appended.len(), "{context}");
                }
            }
            Err(error) => assert!(disk.is_crashed(), "{context}: {error}"),
        }
        first_crashed |= life == 0 && disk.is_crashed();
        disk = if rng.random_range(0..4) == 0 {
            disk.after_kill()
        } else {
            disk.after_crash(&mut rng)
        };
    }
    let (journal, recovered) = Journal::open(small("/j"), Arc::new(disk)).unwrap();
    model.check(
        &journal,
        &recovered,
        &format!("seed {seed}, first crash {first_crash}, at last"),
    );
    first_crashed
}

#[tokio::test]
async fn nothing_durable_is_lost_and_nothing_invented_whenever_the_power_goes() {
    for seed in 0..4 {
        let mut crash = 1;
        // Until the workload ends before the power goes.
        while live_and_crash(seed, crash).await {
            crash += 1;
        }
        assert!(crash > 50, "the workload had only {crash} operations");
    }
}

#[tokio::test]
async fn a_failed_sync_stops_the_journal_for_good() {
    let disk = FakeDisk::default();
    let (journal, _) = Journal::open(small("/j"), Arc::new(disk.clone())).unwrap();
    let mut origin = Origin::new(1);
    let first = journal.append(origin.whole(100)).await.unwrap();
    journal.wait_durable(first).await.unwrap();
    let mut cursor = journal.cursor(origin.id, at(origin.last)).unwrap();
    disk.fail_next_sync();
    let seq = journal.append(origin.whole(100)).await.unwrap();
    assert!(matches!(
        journal.wait_durable(seq).await,
        Err(Error::Poisoned { .. })
    ));
    assert!(matches!(journal.poisoned().await, Error::Poisoned { .. }));
    assert!(matches!(
        journal.append(origin.whole(100)).await,
        Err(Error::Poisoned { .. })
    ));
    assert!(matches!(cursor.next().await, Err(Error::Poisoned { .. })));
    assert!(matches!(
        journal.cursor(origin.id, Position::ZERO),
        Err(Error::Poisoned { .. })
    ));
    assert!(matches!(
        journal.retain(&Vector::new()),
        Err(Error::Poisoned { .. })
    ));
    assert!(matches!(journal.close().await, Err(Error::Poisoned { .. })));
    assert_eq!(journal.stats().durable_seq, 1);
    assert_eq!(journal.durable_vector().get(origin.id), at(10));

    // The page cache still shows the second frame; after the power went it is gone.
    let mut rng = StdRng::seed_from_u64(1);
    let (_, recovered) = Journal::open(small("/j"), Arc::new(disk.after_crash(&mut rng))).unwrap();
    assert_eq!(recovered.next_seq, 1);
}

#[tokio::test]
async fn space_is_prepared_a_piece_at_a_time_and_behind_small_groups_only() {
    let disk = FakeDisk::default();
    let options = Options {
        segment_bytes: 1 << 20,
        max_bytes: 1 << 30,
        ..small("/j")
    };
    let (journal, _) = Journal::open(options, Arc::new(disk.clone())).unwrap();
    let mut origin = Origin::new(1);
    // (length of a frame, how many, pieces then): each frame is a group. The disk itself sees to it that zeros come over nothing.
    let steps = [
        (100, 1, 1),
        (1_000, 10, 1),
        (30_000, 8, 1),
        (30_000, 1, 2),
        (300_000, 1, 2),
        (100, 1, 3),
    ];
    for (len, count, pieces) in steps {
        for _ in 0..count {
            let seq = journal.append(origin.whole(len)).await.unwrap();
            journal.wait_durable(seq).await.unwrap();
        }
        assert_eq!(disk.prepared(), pieces, "{count} of {len}");
    }
    assert_eq!(journal.stats().segments, 1);
    journal.close().await.unwrap();
}

#[tokio::test]
async fn a_full_disk_stalls_the_journal_and_loses_nothing() {
    for sparse in [false, true] {
        let disk = FakeDisk::default();
        if sparse {
            disk.set_sparse();
        }
        disk.set_space(Some(20_000));
        let (journal, _) = Journal::open(small("/j"), Arc::new(disk.clone())).unwrap();
        let mut origin = Origin::new(1);
        let mut seq = 0;
        while journal.stats().stalled.is_none() {
            seq = journal.append(origin.whole(700)).await.unwrap();
            while journal.stats().durable_seq <= seq && journal.stats().stalled.is_none() {
                tokio::task::yield_now().await;
            }
        }
        assert!(journal.stats().stalled.unwrap().contains("free disk space"));
        assert!(journal.stats().durable_seq <= seq);
        for _ in 0..10 {
            seq = journal.append(origin.whole(300)).await.unwrap();
        }
        // Backpressure: the queue is full at some point, and `append` waits.
        let room = u64::from(ROOM_BYTES);
        while poll_once(journal.append(origin.clone().whole(ROOM_BYTES as usize / 16))).is_ready() {
            origin.last += 10;
            seq += 1;
        }
        assert!(journal.stats().queued_bytes > room - room / 8);
        disk.set_space(None);
        journal.wait_durable(seq).await.unwrap();
        assert_eq!(journal.stats().stalled, None);
        journal.close().await.unwrap();
        let (journal, recovered) = Journal::open(small("/j"), Arc::new(disk)).unwrap();
        assert_eq!(recovered.next_seq, seq + 1);
        let read = read_all(&journal, origin.id, Position::ZERO).unwrap();
        assert_eq!(read.len() as u64, seq + 1);
        assert!(
            read.iter()
                .all(|it| it.frame.payload == payload(&it.frame.meta, it.frame.payload.len()))
        );
    }
}
