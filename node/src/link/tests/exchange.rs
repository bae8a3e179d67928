//! Nodes exchange, restart, are cut off and heal.

use std::ffi::OsString;
use std::io;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_hold_what_either_writes() {
    let cluster = Cluster::new(2).await;
    let (a, b) = (cluster.start(1, |_| {}).await, cluster.start(2, |_| {}).await);
    a.write(50).await;
    b.write(70).await;
    a.reaches(2, 700).await;
    b.reaches(1, 500).await;
    a.assert_seamless(2, 70).await;
    b.assert_seamless(1, 50).await;
    a.write(1).await;
    b.reaches(1, 510).await;
    assert_eq!(b.links().held().get(NodeId(1)), position(510));
    assert_eq!(b.status(1).received.get(NodeId(1)), position(510));
    assert!(b.status(1).bytes_in > 0);
    eventually("a has counted what it sent", || {
        a.status(2).bytes_out >= b.status(1).bytes_in
    })
    .await;
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_hold_what_any_writes_and_know_what_the_others_hold() {
    let cluster = Cluster::new(3).await;
    let nodes = [
        cluster.start(1, |_| {}).await,
        cluster.start(2, |_| {}).await,
        cluster.start(3, |_| {}).await,
    ];
    for node in &nodes {
        node.write(20).await;
    }
    for node in &nodes {
        for origin in 1..=3 {
            node.reaches(origin, 200).await;
            node.assert_seamless(origin, 20).await;
        }
    }
    let [a, ..] = &nodes;
    let reports = a.links().reports();
    eventually("a hears that b and c hold everything", || {
        let reports = reports.borrow();
        [2, 3].iter().all(|id| {
            let journaled = reports
                .get(&NodeId(*id))
                .map(|reported| reported.journaled.clone())
                .unwrap_or_default();
            (1..=3).all(|origin| journaled.covers(NodeId(origin), position(200)))
        })
    })
    .await;
    eventually("a has seen the clocks of b and c", || {
        a.links().clocks().len() == 2
    })
    .await;
    for (_, clock) in a.links().clocks() {
        assert!(
            clock.offset_us.unsigned_abs() <= clock.rtt_us / 2 + 1_000,
            "same machine, same clock: {clock:?}"
        );
    }
    let json = serde_json::to_value(a.links().status()).unwrap();
    assert_eq!(json[0]["name"], "b");
    assert_eq!(json[1]["outbound"]["connected"], true);
    for node in nodes {
        node.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_node_goes_on_from_its_journal() {
    let cluster = Cluster::new(2).await;
    let (a, b) = (cluster.start(1, |_| {}).await, cluster.start(2, |_| {}).await);
    a.write(30).await;
    b.reaches(1, 300).await;
    b.close().await;
    a.write(30).await;
    let b = cluster.start(2, |_| {}).await;
    b.reaches(1, 600).await;
    b.assert_seamless(1, 60).await;
    // And the other way round: the one that serves comes back.
    a.close().await;
    let a = cluster.start(1, |_| {}).await;
    a.write(10).await;
    b.reaches(1, 700).await;
    b.assert_seamless(1, 70).await;
    a.close().await;
    b.close().await;
}

/// Three nodes, of which the first has what the third has written.
async fn three(cluster: &Cluster) -> (Node, Node, Node) {
    let (a, b, c) = (
        cluster.start(1, |_| {}).await,
        cluster.start(2, |_| {}).await,
        cluster.start(3, |_| {}).await,
    );
    c.write(10).await;
    a.reaches(3, 100).await;
    (a, b, c)
}

/// The line from `a` to `c`, whose writes had come by way of another, is as it should be: they go over it again, and over it alone.
async fn relay_ends(cluster: &Cluster, a: &Node, c: &Node) {
    cluster.proxy(1, 3).lead_to(c.links().local_addr());
    c.write(10).await;
    a.reaches(3, 300).await;
    eventually("the relay is dropped", || {
        a.is_connected(3) && a.status(2).relaying.is_empty()
    })
    .await;
    c.write(10).await;
    a.reaches(3, 400).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn others_relay_while_a_link_is_cut_and_stop_when_it_is_back() {
    let cluster = Cluster::new(3).await;
    let (a, b, c) = three(&cluster).await;
    cluster.proxy(1, 3).cut();
    // What is written before that may still get through.
    eventually("the cut is noticed", || !a.is_connected(3)).await;
    c.write(10).await;
    a.reaches(3, 200).await;
    assert!(!a.is_connected(3));
    assert_eq!(a.status(2).relaying, [NodeId(3)]);
    assert!(a.status(3).relayed);
    relay_ends(&cluster, &a, &c).await;
    b.reaches(3, 400).await;
    a.assert_seamless(3, 40).await;
    b.assert_seamless(3, 40).await;
    for node in [a, b, c] {
        node.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn others_relay_while_a_link_is_open_and_silent() {
    let cluster = Cluster::new(3).await;
    let (a, b, c) = three(&cluster).await;
    cluster.proxy(1, 3).silence();
    // Long before the silent link is given up.
    eventually("b relays while the link is open", || {
        a.is_connected(3) && a.status(3).relayed && a.status(2).relaying == [NodeId(3)]
    })
    .await;
    c.write(10).await;
    a.reaches(3, 200).await;
    relay_ends(&cluster, &a, &c).await;
    a.assert_seamless(3, 40).await;
    for node in [a, b, c] {
        node.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lost_node_had_given_to_one_reaches_the_other() {
    let cluster = Cluster::new(3).await;
    cluster.proxy(1, 3).cut();
    let (b, c) = (cluster.start(2, |_| {}).await, cluster.start(3, |_| {}).await);
    c.write(25).await;
    b.reaches(3, 250).await;
    c.close().await;
    let a = cluster.start(1, |_| {}).await;
    a.reaches(3, 250).await;
    a.assert_seamless(3, 25).await;
    assert_eq!(a.status(2).received.get(NodeId(3)), position(250));
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_node_that_is_being_dropped_had_given_to_one_reaches_the_other_though_it_refuses_both() {
    let cluster = Cluster::new(3).await;
    let (b, c) = (cluster.start(2, |_| {}).await, cluster.start(3, |_| {}).await);
    c.write(25).await;
    b.reaches(3, 250).await;
    c.close().await;
    let c = cluster
        .start(3, |setup| setup.identity.policy_hash = "other".to_owned())
        .await;
    let a = cluster.start(1, |_| {}).await;
    eventually("it is refused", || {
        a.status(3).refusal.is_some() && a.is_connected(2)
    })
    .await;
    a.links().shun([NodeId(3)].into());
    a.reaches(3, 250).await;
    a.assert_seamless(3, 25).await;
    assert_eq!(a.status(2).received.get(NodeId(3)), position(250));
    for node in [a, b, c] {
        node.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_transaction_survives_a_cut_in_its_middle() {
    let cluster = Cluster::new(2).await;
    let (a, b) = (cluster.start(1, |_| {}).await, cluster.start(2, |_| {}).await);
    a.write(1).await;
    for part in 0..5 {
        a.append(piece(1, 10, 7, part, false)).await;
    }
    b.reaches(1, 10).await;
    eventually("b has five pieces", || b.status(1).bytes_in >= 5 * 12).await;
    cluster.proxy(2, 1).cut();
    eventually("the link is down", || !b.is_connected(1)).await;
    for part in 5..9 {
        a.append(piece(1, 10, 7, part, false)).await;
    }
    a.append(piece(1, 10, 7, 9, true)).await;
    a.write(1).await;
    cluster.proxy(2, 1).lead_to(a.links().local_addr());
    b.reaches(1, 30).await;
    let parts: Vec<_> = b
        .journaled(1)
        .await
        .iter()
        .map(|meta| (meta.kind, meta.part))
        .collect();
    let mut expected = vec![(FrameKind::Whole, 0)];
    expected.extend((0..9).map(|part| (FrameKind::Part, part)));
    expected.extend([(FrameKind::End, 9), (FrameKind::Whole, 0)]);
    assert_eq!(parts, expected);
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_transaction_starts_again_when_the_receiver_restarts_in_its_middle() {
    let cluster = Cluster::new(2).await;
    let (a, b) = (cluster.start(1, |_| {}).await, cluster.start(2, |_| {}).await);
    for part in 0..3 {
        a.append(piece(1, 0, 7, part, false)).await;
    }
    eventually("b has three pieces", || b.status(1).bytes_in >= 3 * 12).await;
    b.close().await;
    let b = cluster.start(2, |_| {}).await;
    a.append(piece(1, 0, 7, 3, true)).await;
    b.reaches(1, 10).await;
    let parts: Vec<u32> = b.journaled(1).await.iter().map(|meta| meta.part).collect();
    assert!(parts.ends_with(&[0, 1, 2, 3]), "{parts:?}");
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn own_frames_wait_for_the_gate_and_others_do_not() {
    let cluster = Cluster::new(3).await;
    let (open, gate) = watch::channel(position(30));
    let a = cluster.start(1, |setup| setup.gate = gate).await;
    let (b, c) = (cluster.start(2, |_| {}).await, cluster.start(3, |_| {}).await);
    a.write(10).await;
    b.reaches(1, 30).await;
    // The frames of another origin, relayed by the gated node, pass it.
    cluster.proxy(2, 3).cut();
    c.write(5).await;
    b.reaches(3, 50).await;
    assert_eq!(b.links().held().get(NodeId(1)), position(30));
    open.send_replace(position(70));
    b.reaches(1, 70).await;
    c.reaches(1, 70).await;
    assert_eq!(b.links().held().get(NodeId(1)), position(70));
    open.send_replace(position(u64::MAX));
    b.reaches(1, 100).await;
    for node in [a, b, c] {
        node.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_over_the_journal_is_told_no_more_of_it_than_the_gate_lets_go() {
    let dir = tempfile::tempdir().unwrap();
    let nobody = Proxy::start().await.address;
    let (open, gate) = watch::channel(position(30));
    let a = Node::start(1, dir.path(), &[(2, nobody)], |setup| setup.gate = gate).await;
    a.write(3).await;
    a.append(piece(1, 30, 7, 0, false)).await;
    a.append(piece(1, 30, 7, 1, true)).await;
    a.write(1).await;
    a.journal.append(whole(2, 0, "of another")).await.unwrap();
    let mut client = raw_client(a.links().local_addr()).await;
    for (upto, expected) in [
        (30, vec![(1, 10), (1, 20), (1, 30), (2, 10)]),
        // With the piece of it.
        (40, vec![(1, 10), (1, 20), (1, 30), (1, 30), (1, 40), (2, 10)]),
    ] {
        open.send_replace(position(upto));
        let request = pb::SeedRequest {
            hello: Some(hello_of(2)),
            ..pb::SeedRequest::default()
        };
        let mut stream = client.seed(request).await.unwrap().into_inner();
        let mut got = Vec::new();
        while let Some(message) = stream.message().await.unwrap() {
            for frame in message.frames {
                let meta = wire::frame_from_wire(frame).unwrap().meta;
                got.push((meta.origin.0, meta.last.lsn.0));
            }
        }
        assert_eq!(got, expected);
    }
    a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_origin_is_not_accepted_until_it_is_resumed() {
    let cluster = Cluster::new(2).await;
    let (a, b) = (cluster.start(1, |_| {}).await, cluster.start(2, |_| {}).await);
    a.write(5).await;
    b.reaches(1, 50).await;
    assert!(b.links().pause_origin(NodeId(1), "its clock runs an hour ahead"));
    assert!(!b.links().pause_origin(NodeId(2), "ourselves"));
    a.write(5).await;
    assert_eq!(
        b.status(1).paused.as_deref(),
        Some("its clock runs an hour ahead")
    );
    // What b reports after a wrote is younger than the frames would have been.
    b.write(1).await;
    a.reaches(2, 10).await;
    assert_eq!(b.links().held().get(NodeId(1)), position(50));
    assert!(b.links().resume_origin(NodeId(1)));
    assert!(!b.links().resume_origin(NodeId(1)));
    b.reaches(1, 100).await;
    b.assert_seamless(1, 10).await;
    a.close().await;
    b.close().await;
}

/// A disk with room for four files.
#[derive(Debug)]
struct SmallDisk;

impl journal::Disk for SmallDisk {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        journal::RealDisk.create_dir(dir)
    }

    fn lock_dir(&self, dir: &Path) -> io::Result<Option<journal::DirLock>> {
        journal::RealDisk.lock_dir(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        journal::RealDisk.list(dir)
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn journal::DiskFile>> {
        if self.list(path.parent().unwrap())?.len() >= 4 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        journal::RealDisk.create(path)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn journal::DiskFile>> {
        journal::RealDisk.open(path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        journal::RealDisk.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        journal::RealDisk.sync_dir(dir)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_journal_holds_the_sender_back_and_the_link_up() {
    let cluster = Cluster::new(2).await;
    let a = cluster.start(1, |_| {}).await;
    let b = cluster.start(2, |setup| setup.disk = Arc::new(SmallDisk)).await;
    // Connected before it is held back, so that a second connection would be noticed.
    a.write(1).await;
    b.reaches(1, 10).await;
    let since = b.status(1).outbound.since_us;
    for at in 1..161 {
        a.append(whole(1, at * TXN_BYTES, vec![5; 300_000])).await;
    }
    eventually("b's journal is full", || b.journal.stats().stalled.is_some()).await;
    // Longer than the silence after which a link is given up.
    tokio::time::sleep(limits::STALL_TIMEOUT + Duration::from_secs(1)).await;
    let queue = 16 << 20;
    let bound = (4 << 20) + queue + limits::CREDIT_BYTES + (1 << 20);
    let sent = a.status(2).bytes_out;
    assert!(sent <= bound, "{sent} bytes sent, {bound} allowed");
    assert!(b.is_connected(1));
    let mut held = Position::ZERO;
    while held < position(1610) {
        held = b.links().held().get(NodeId(1));
        b.journal
            .retain(&[(NodeId(1), held)].into_iter().collect())
            .unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(b.status(1).outbound.since_us, since, "the link never broke");
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_needs_what_its_peer_has_deleted_is_told() {
    let cluster = Cluster::new(2).await;
    let a = cluster.start(1, |_| {}).await;
    for at in 0..40 {
        a.append(whole(1, at * TXN_BYTES, vec![5; 100_000])).await;
    }
    eventually("it is written", || {
        a.journal.written_vector().get(NodeId(1)) == position(400)
    })
    .await;
    let reclaimed = a
        .journal
        .retain(&[(NodeId(1), position(400))].into_iter().collect())
        .unwrap();
    assert!(reclaimed.bytes > 0);
    let b = cluster.start(2, |_| {}).await;
    eventually("b says so", || {
        b.status(1)
            .last_error
            .is_some_and(|text| text.contains("no longer holds"))
    })
    .await;
    assert!(b.is_connected(1), "what b writes still reaches a");
    b.write(1).await;
    a.reaches(2, 10).await;
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_that_their_origin_packed_anew_after_a_crash_go_on_where_the_peer_stands() {
    let cluster = Cluster::new(2).await;
    let (a, b) = (cluster.start(1, |_| {}).await, cluster.start(2, |_| {}).await);
    a.write(3).await;
    b.reaches(1, 30).await;
    a.close().await;
    // The crash took the unsynced end of a's journal; decoding again gives the same transactions in other frames.
    let emptied = tempfile::tempdir().unwrap();
    let a = Node::start(1, emptied.path(), &cluster.peers_of(1), |_| {}).await;
    cluster.lead_to(&a);
    let mut larger = whole(1, 0, "five transactions");
    (larger.meta.last, larger.meta.txn_count) = (position(50), 5);
    a.append(larger).await;
    b.reaches(1, 50).await;
    a.caught_up.store(true, Ordering::SeqCst);
    a.write(1).await;
    b.reaches(1, 60).await;
    let ends: Vec<_> = b.journaled(1).await.iter().map(|meta| meta.last.lsn.0).collect();
    assert_eq!(ends, [10, 20, 30, 50, 60]);
    a.close().await;
    // And it is served on from there, also after a restart.
    b.close().await;
    let b = cluster.start(2, |_| {}).await;
    let mut raw = RawPeer::greet(b.links().local_addr(), hello_of(1)).await;
    raw.want(1, position(40), 1).await;
    let mut got = Vec::new();
    while got.len() < 2 {
        got.extend(
            raw.next()
                .await
                .frames
                .into_iter()
                .map(|frame| (frame.prev_lsn, frame.last_lsn)),
        );
    }
    assert_eq!(got, [(0, 50), (50, 60)]);
    b.close().await;
}

/// Changes a byte of the oldest file, in the second of the frames of 100,000 bytes that it holds.
fn damage_oldest(dir: &Path) {
    let folder = dir.join("journal");
    let names = std::fs::read_dir(&folder).unwrap();
    let mut files: Vec<_> = names.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|ext| ext == "seg"));
    files.sort();
    let mut bytes = std::fs::read(&files[0]).unwrap();
    bytes[150_000] ^= 1;
    std::fs::write(&files[0], bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_origin_cannot_read_of_its_own_comes_from_others() {
    let cluster = Cluster::new(3).await;
    let (a, c) = (cluster.start(1, |_| {}).await, cluster.start(3, |_| {}).await);
    for at in 0..40 {
        a.append(whole(1, at * TXN_BYTES, vec![5; 100_000])).await;
    }
    c.reaches(1, 400).await;
    damage_oldest(cluster.dir(1));
    let mut events = a.links().events().unwrap();
    let b = cluster.start(2, |_| {}).await;
    b.reaches(1, 400).await;
    b.assert_seamless(1, 40).await;
    assert!(b.is_connected(1), "the direct link is there all the while");
    let text = loop {
        if let LinkEvent::Unreadable { origin, text } = events.recv().await.unwrap() {
            assert_eq!(origin, NodeId(1));
            break text;
        }
    };
    assert!(text.contains("is damaged at byte"), "{text}");
    // What comes behind it, the origin gives again, once it is asked again.
    let mut written = 400;
    while b.status(1).relayed || !b.status(3).relaying.is_empty() {
        assert!(written < 4_000, "still relayed");
        a.write(1).await;
        written += TXN_BYTES;
        b.reaches(1, written).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    a.write(1).await;
    b.reaches(1, written + TXN_BYTES).await;
    for node in [a, b, c] {
        node.close().await;
    }
}
