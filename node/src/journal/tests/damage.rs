//! Bytes that changed after they were durable.

use proptest::prelude::*;

use super::fake::FakeDisk;
use super::*;

fn small() -> Options {
    Options {
        dir: "/j".into(),
        segment_bytes: 4096,
        max_bytes: 1 << 20,
        sync_within: Duration::from_micros(200),
        node: NodeId(1),
        cluster: "test".into(),
    }
}

fn reopen(disk: &FakeDisk) -> Result<(Journal, Recovered), Error> {
    Journal::open(small(), Arc::new(disk.clone()))
}

/// A closed journal of several files, each frame a group of its own, and its frames.
async fn written(frames: usize) -> (FakeDisk, Vec<Frame>) {
    let disk = FakeDisk::default();
    let (journal, _) = reopen(&disk).unwrap();
    let mut origins = [Origin::new(1), Origin::new(2)];
    let mut appended = Vec::new();
    for step in 0..frames {
        let frame = origins[step % 2].whole(300);
        let seq = journal.append(frame.clone()).await.unwrap();
        journal.wait_durable(seq).await.unwrap();
        appended.push(frame);
    }
    journal.close().await.unwrap();
    (disk, appended)
}

/// Length on disk of one of those frames, bytes.
const FRAME_LEN: usize = 80 + 304;
/// Length of the first segment's header, bytes.
const HEADER_LEN: usize = 48;

#[tokio::test]
async fn a_torn_tail_is_cut() {
    let (disk, _) = written(5).await;
    for keep in [0, 1, 79, 80, 200, FRAME_LEN - 5] {
        let disk = disk.copy();
        let last = HEADER_LEN + 4 * FRAME_LEN;
        disk.damage(0, |bytes| bytes[last + keep..].fill(0));
        let (journal, recovered) = reopen(&disk).unwrap();
        assert_eq!((recovered.next_seq, recovered.last.get(NodeId(1))), (4, at(20)));
        // And written again in its place.
        let mut origin = Origin::new(1);
        origin.last = 20;
        assert_eq!(journal.append(origin.whole(10)).await.unwrap(), 4);
        journal.close().await.unwrap();
        let (journal, recovered) = reopen(&disk).unwrap();
        assert_eq!(recovered.next_seq, 5);
        assert_eq!(
            read_all(&journal, NodeId(1), at(20)).unwrap()[0]
                .frame
                .payload
                .len(),
            10
        );
    }
}

#[tokio::test]
async fn frames_behind_a_torn_place_never_come_back() {
    let disk = FakeDisk::default();
    let (journal, _) = reopen(&disk).unwrap();
    let mut origin = Origin::new(1);
    // While the first frame is being made durable, three gather to one group.
    disk.hold_syncs(true);
    journal.append(origin.whole(300)).await.unwrap();
    journal.written().wait_for(|&written| written == 1).await.unwrap();
    for _ in 0..3 {
        journal.append(origin.whole(300)).await.unwrap();
    }
    disk.hold_syncs(false);
    journal.close().await.unwrap();
    // Of that group the second and third frame reached the disk.
    disk.damage(0, |bytes| {
        bytes[HEADER_LEN + FRAME_LEN..HEADER_LEN + 2 * FRAME_LEN].fill(0)
    });

    let (journal, recovered) = reopen(&disk).unwrap();
    assert_eq!((recovered.next_seq, recovered.last.get(origin.id)), (1, at(10)));
    origin.last = 10;
    journal.append(origin.whole(300)).await.unwrap();
    journal.close().await.unwrap();
    let (_, recovered) = reopen(&disk).unwrap();
    assert_eq!((recovered.next_seq, recovered.last.get(origin.id)), (2, at(20)));
}

#[tokio::test]
async fn a_group_that_was_written_bit_by_bit_may_be_torn_anywhere() {
    let disk = FakeDisk::default();
    let options = Options {
        sync_within: Duration::from_secs(3_600),
        ..small()
    };
    let (journal, _) = Journal::open(options, Arc::new(disk.clone())).unwrap();
    let mut origin = Origin::new(1);
    for seq in 0..4 {
        journal.append_unhurried(origin.whole(300)).await.unwrap();
        journal
            .written()
            .wait_for(|&written| written == seq + 1)
            .await
            .unwrap();
    }
    journal.close().await.unwrap();
    // The second did not reach the disk, those behind it did.
    disk.damage(0, |bytes| {
        bytes[HEADER_LEN + FRAME_LEN..HEADER_LEN + 2 * FRAME_LEN].fill(0)
    });
    let (_, recovered) = reopen(&disk).unwrap();
    assert_eq!((recovered.next_seq, recovered.last.get(origin.id)), (1, at(10)));
}

#[tokio::test]
async fn damage_before_a_durable_frame_is_refused_with_its_place() {
    let (disk, _) = written(5).await;
    // A header's and a payload's byte, and a whole frame of zeros.
    for (from, to) in [(3, 4), (100, 101), (0, FRAME_LEN)] {
        let disk = disk.copy();
        let start = HEADER_LEN + 2 * FRAME_LEN;
        disk.damage(0, |bytes| {
            bytes[start + from..start + to]
                .iter_mut()
                .for_each(|byte| *byte = !*byte & 1)
        });
        let error = reopen(&disk).unwrap_err();
        assert!(
            matches!(&error, Error::Corrupt { offset, .. } if *offset == start as u64),
            "{error}"
        );
        assert!(
            error
                .to_string()
                .contains("00000000000000000000.seg is damaged at byte 816"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_damaged_or_missing_older_file_is_refused() {
    let (disk, appended) = written(40).await;
    assert!(disk.names().len() > 3);

    let header = disk.copy();
    header.damage(1, |bytes| bytes[40] ^= 1);
    assert!(matches!(reopen(&header), Err(Error::Corrupt { offset: 0, .. })));

    let frame = disk.copy();
    frame.damage(0, |bytes| bytes[HEADER_LEN + FRAME_LEN + 20] ^= 1);
    assert!(matches!(reopen(&frame), Err(Error::Corrupt { .. })));

    let short = disk.copy();
    short.damage(1, |bytes| bytes.truncate(bytes.len() - 8));
    assert!(matches!(reopen(&short), Err(Error::Corrupt { .. })));

    let long = disk.copy();
    long.damage(1, |bytes| bytes.extend([0; 64]));
    assert!(matches!(reopen(&long), Err(Error::Corrupt { .. })));

    let missing = disk.copy();
    missing.remove(&missing.names()[1]).unwrap();
    assert!(matches!(reopen(&missing), Err(Error::Corrupt { .. })));

    // A payload of an older file is checked when it is read.
    let payload = disk.copy();
    payload.damage(0, |bytes| bytes[HEADER_LEN + 2 * FRAME_LEN + 200] ^= 1);
    let (journal, _) = reopen(&payload).unwrap();
    let mut cursor = journal.cursor(NodeId(1), Position::ZERO).unwrap();
    assert!(same(&cursor.next().await.unwrap().frame, &appended[0]));
    assert!(matches!(cursor.next().await, Err(Error::Corrupt { .. })));
    assert_eq!(read_all(&journal, NodeId(2), Position::ZERO).unwrap().len(), 20);
}

#[tokio::test]
async fn another_format_is_not_touched() {
    let (disk, _) = written(2).await;
    disk.damage(0, |bytes| {
        let mut header = bytes[..HEADER_LEN].to_vec();
        header[8] = 9;
        let checksum = crc32c::crc32c_append(crc32c::crc32c(&header[..16]), &header[20..]);
        header[16..20].copy_from_slice(&checksum.to_le_bytes());
        bytes[..HEADER_LEN].copy_from_slice(&header);
    });
    assert!(matches!(reopen(&disk), Err(Error::Version { found: 9, .. })));
}

#[derive(Debug, Clone)]
enum Damage {
    Flip(usize, prop::sample::Index, u8),
    Fill(usize, prop::sample::Index, usize, u8),
    Copy(usize, prop::sample::Index, prop::sample::Index, usize),
    Cut(usize, prop::sample::Index),
    Garbage(usize, Vec<u8>),
    Remove(usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let (file, index) = (0usize..5, any::<prop::sample::Index>);
    prop_oneof![
        4 => (file.clone(), index(), any::<u8>()).prop_map(|(file, at, bits)| Damage::Flip(file, at, bits)),
        2 => (file.clone(), index(), 1usize..1000, any::<u8>()).prop_map(|(file, at, len, byte)| Damage::Fill(file, at, len, byte)),
        2 => (file.clone(), index(), index(), 1usize..1000).prop_map(|(file, from, to, len)| Damage::Copy(file, from, to, len)),
        1 => (file.clone(), index()).prop_map(|(file, at)| Damage::Cut(file, at)),
        1 => (file.clone(), proptest::collection::vec(any::<u8>(), 0..300)).prop_map(|(file, bytes)| Damage::Garbage(file, bytes)),
        1 => file.prop_map(Damage::Remove),
    ]
}

fn inflict(disk: &FakeDisk, damage: &Damage) {
    match damage.clone() {
        Damage::Flip(file, at, bits) => disk.damage(file, |bytes| {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] ^= bits;
            }
        }),
        Damage::Fill(file, at, len, byte) => disk.damage(file, |bytes| {
            let at = at.index(bytes.len() + 1);
            let end = bytes.len().min(at + len);
            bytes[at..end].fill(byte);
        }),
        Damage::Copy(file, from, to, len) => disk.damage(file, |bytes| {
            let (from, to) = (from.index(bytes.len() + 1), to.index(bytes.len() + 1));
            let len = len.min(bytes.len() - from.max(to));
            bytes.copy_within(from..from + len, to);
        }),
        Damage::Cut(file, at) => disk.damage(file, |bytes| bytes.truncate(at.index(bytes.len() + 1))),
        Damage::Garbage(file, garbage) => disk.damage(file, |bytes| *bytes = garbage),
        Damage::Remove(file) => {
            if let Some(path) = disk.names().get(file) {
                disk.remove(path).unwrap();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whatever_happens_to_the_files_no_frame_is_invented(damages in proptest::collection::vec(damage(), 1..4)) {
        static WRITTEN: std::sync::LazyLock<(FakeDisk, Vec<Frame>)> = std::sync::LazyLock::new(|| {
            tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(written(36))
        });
        let (disk, appended) = (WRITTEN.0.copy(), &WRITTEN.1);
        damages.iter().for_each(|damage| inflict(&disk, damage));
        let Ok((journal, recovered)) = reopen(&disk) else { return Ok(()) };
        prop_assert!(recovered.next_seq <= appended.len() as u64);
        for origin in [NodeId(1), NodeId(2)] {
            let Ok(mut cursor) = journal.cursor(origin, journal.stats().oldest.get(origin)) else { continue };
            while let Ok(Some(located)) = cursor.try_next() {
                prop_assert!(same(&located.frame, &appended[located.seq as usize]));
            }
        }
    }
}
