//! Who is let in, and what the others are told.

use super::super::handshake::tests::Case;
use super::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test(flavor = "multi_thread")]
async fn every_stranger_is_refused_over_the_wire_with_code_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let a = lonely(dir.path()).await;
    let cases: [Case; 11] = [
        (
            |h| (h.protocol_version, h.protocol_newest) = (2, 3),
            "protocol_version",
            "run versions of anabranch",
        ),
        (|h| h.cluster_id = "lake".into(), "cluster_id", "`cluster.id`"),
        (
            |h| *h = pb::Hello::default(),
            "protocol_version",
            "run versions of anabranch",
        ),
        (
            |h| h.boot_id.clear(),
            "malformed",
            "check that the peer's address",
        ),
        (|h| h.node_id = 1, "own_id", "an id of its own"),
        (
            |h| h.node_id = 7,
            "unknown_node",
            "let it join with `anabranch join`",
        ),
        (|h| h.node_id = 8, "left", "run `anabranch remove`"),
        (|h| h.node_id = 9, "dropped", "give it an id that was never used"),
        (|h| h.node_name = "z".into(), "name_mismatch", "`peers.name`"),
        (|h| h.policy_hash = "p2".into(), "policy_hash", "same policy file"),
        (|h| h.founders = vec![1, 2, 3], "members", "name the same nodes"),
    ];
    for (change, code, remedy) in cases {
        let mut hello = hello_of(2);
        change(&mut hello);
        let mut raw = RawPeer::greet(a.links().local_addr(), hello.clone()).await;
        assert_eq!(raw.welcome.refusal_code, code);
        assert!(raw.welcome.refusal.contains(remedy), "{}", raw.welcome.refusal);
        assert!(
            raw.responses.message().await.unwrap().is_none(),
            "nothing follows a refusal"
        );
        let welcome = raw_client(a.links().local_addr())
            .await
            .greet(hello)
            .await
            .unwrap()
            .into_inner();
        assert_eq!(welcome.refusal_code, code);
    }
    let welcome = raw_client(a.links().local_addr())
        .await
        .greet(hello_of(2))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(welcome.refusal_code, "");
    assert_eq!(welcome.hello.unwrap().node_name, "a");
    // One that is newer and speaks ours as well.
    let mut newer = hello_of(2);
    newer.protocol_newest = 7;
    let raw = RawPeer::greet(a.links().local_addr(), newer).await;
    assert_eq!(raw.welcome.refusal, "");
    drop(raw);
    a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_incarnation_is_refused_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let a = lonely(dir.path()).await;
    let raw = RawPeer::greet(a.links().local_addr(), hello_of(2)).await;
    assert_eq!(raw.welcome.refusal, "");
    drop(raw);
    a.close().await;
    let a = lonely(dir.path()).await;
    let mut hello = hello_of(2);
    hello.incarnation = "a copy".to_owned();
    let raw = RawPeer::greet(a.links().local_addr(), hello).await;
    assert_eq!(raw.welcome.refusal_code, "incarnation");
    assert!(
        raw.welcome.refusal.contains("restored copy"),
        "{}",
        raw.welcome.refusal
    );
    let raw = RawPeer::greet(a.links().local_addr(), hello_of(2)).await;
    assert_eq!(raw.welcome.refusal, "");
    a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_under_the_same_node_id_is_refused_while_the_first_is_connected() {
    let dir = tempfile::tempdir().unwrap();
    let a = lonely(dir.path()).await;
    let first = RawPeer::greet(a.links().local_addr(), hello_of(2)).await;
    assert_eq!(first.welcome.refusal, "");
    let mut hello = hello_of(2);
    hello.boot_id = "another start".to_owned();
    let second = RawPeer::greet(a.links().local_addr(), hello.clone()).await;
    assert_eq!(second.welcome.refusal_code, "duplicate_node");
    assert!(
        a.status(2)
            .last_error
            .unwrap()
            .contains("stop one of the two daemons")
    );
    drop(first);
    eventually("the first is gone", || !a.status(2).inbound.connected).await;
    let second = RawPeer::greet(a.links().local_addr(), hello).await;
    assert_eq!(second.welcome.refusal, "");
    a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_node_says_so_in_its_status_and_is_welcome_once_it_agrees() {
    let cluster = Cluster::new(2).await;
    let a = cluster.start(1, |_| {}).await;
    let b = cluster
        .start(2, |setup| setup.identity.policy_hash = "other".to_owned())
        .await;
    let mut events = b.links().events().unwrap();
    assert!(b.links().events().is_none());
    a.write(3).await;
    eventually("both know", || {
        a.status(2).refusal.is_some() && b.status(1).refusal.is_some()
    })
    .await;
    assert_eq!(b.status(1).refusal.unwrap().code, "policy_hash");
    assert!(
        a.status(2)
            .refusal
            .unwrap()
            .text
            .contains("install the same policy file")
    );
    assert!(matches!(
        events.recv().await,
        Some(LinkEvent::Refused { peer: NodeId(1), .. })
    ));
    assert_eq!(b.links().held().get(NodeId(1)), Position::ZERO);
    b.close().await;
    let b = cluster.start(2, |_| {}).await;
    b.reaches(1, 30).await;
    assert_eq!(b.status(1).refusal, None);
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_leads_to_another_node_is_named() {
    let cluster = Cluster::new(3).await;
    let c = cluster.start(3, |_| {}).await;
    cluster.proxy(1, 2).lead_to(c.links().local_addr());
    let a = Node::start(1, cluster.dir(1), &cluster.peers_of(1), |_| {}).await;
    eventually("a says so", || a.status(2).refusal.is_some()).await;
    let refusal = a.status(2).refusal.unwrap();
    assert_eq!(refusal.code, "wrong_peer");
    assert!(refusal.text.contains("node `c` (id 3) answers"), "{refusal}");
    a.close().await;
    c.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_holds_more_of_us_than_we_have_stops_everything_once_we_have_caught_up() {
    let cluster = Cluster::new(2).await;
    let (a, b) = (cluster.start(1, |_| {}).await, cluster.start(2, |_| {}).await);
    a.write(10).await;
    b.reaches(1, 100).await;
    a.close().await;
    // The same database from an older copy, with an empty folder but the same name and id.
    let empty = tempfile::tempdir().unwrap();
    let a = Node::start(1, empty.path(), &cluster.peers_of(1), |_| {}).await;
    cluster.lead_to(&a);
    let mut events = a.links().events().unwrap();
    eventually("they are connected: decoding may bring the rest", || {
        a.is_connected(2) && b.is_connected(1)
    })
    .await;
    a.caught_up.store(true, Ordering::SeqCst);
    let found = loop {
        match events.recv().await.unwrap() {
            LinkEvent::WentBack(found) => break found,
            LinkEvent::Connected { .. } => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        (found.peer.as_str(), found.peer_holds, found.own),
        ("b", position(100), Position::ZERO)
    );
    eventually("b is told", || {
        b.status(1)
            .refusal
            .is_some_and(|refusal| refusal.code == "went_back")
    })
    .await;
    a.write(1).await;
    assert_eq!(b.links().held().get(NodeId(1)), position(100));
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_stray_copy_of_a_peer_says_that_it_holds_ends_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let a = lonely(dir.path()).await;
    a.write(3).await;
    a.caught_up.store(true, Ordering::SeqCst);
    let mut events = a.links().events().unwrap();
    let proper = RawPeer::greet(a.links().local_addr(), hello_of(2)).await;
    assert_eq!(proper.welcome.refusal, "");
    let mut beside = hello_of(2);
    beside.holds = vec![wire::entry_to_wire(NodeId(1), position(500))];
    beside.boot_id = "another start".to_owned();
    let mut copy = beside.clone();
    copy.incarnation = "a copy".to_owned();
    for (stray, code) in [(beside.clone(), "duplicate_node"), (copy, "incarnation")] {
        let raw = RawPeer::greet(a.links().local_addr(), stray).await;
        assert_eq!(raw.welcome.refusal_code, code);
    }
    while let Ok(event) = events.try_recv() {
        assert!(!matches!(event, LinkEvent::WentBack(_)), "{event:?}");
    }
    // The member itself is believed.
    drop(proper);
    eventually("it is gone", || !a.status(2).inbound.connected).await;
    let raw = RawPeer::greet(a.links().local_addr(), beside).await;
    assert_eq!(raw.welcome.refusal_code, "went_back");
    eventually("it does not count as connected", || {
        !a.status(2).inbound.connected
    })
    .await;
    a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_port_disturbs_nobody() {
    let cluster = Cluster::new(2).await;
    let (a, b) = (cluster.start(1, |_| {}).await, cluster.start(2, |_| {}).await);
    a.write(5).await;
    b.reaches(1, 50).await;
    let address = a.links().local_addr();
    let since = b.status(1).outbound.since_us;
    let mut silent = Vec::new();
    for garbage in [
        &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        &[0; 4096],
        &[0xff; 70_000],
    ] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // The other side may close before it has read everything.
        let _ = stream.write_all(garbage).await;
        let _ = stream.shutdown().await;
        let _ = stream.read_to_end(&mut Vec::new()).await;
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let wrong = raw_client(address)
        .await
        .pull(tokio_stream::iter([pb::PullRequest::default()]))
        .await;
    assert_eq!(
        wrong
            .unwrap()
            .into_inner()
            .message()
            .await
            .unwrap()
            .unwrap()
            .welcome
            .unwrap()
            .refusal_code,
        "protocol_version"
    );
    let empty = raw_client(address).await.pull(tokio_stream::empty()).await;
    assert_eq!(empty.unwrap_err().code(), tonic::Code::InvalidArgument);
    a.write(5).await;
    b.reaches(1, 100).await;
    assert_eq!(b.status(1).outbound.since_us, since, "the link never broke");
    drop(silent);
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_beyond_loopback_is_refused_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let open = |setup: &mut Setup| setup.config.listen.address = "0.0.0.0:0".parse().unwrap();
    let Err(error) = Node::try_start(1, dir.path(), &[], open).await else {
        panic!("it listens")
    };
    assert!(error.to_string().contains("listen.insecure = true"), "{error}");
    // 192.0.2.0/24 is for documentation: nothing is sent there, the refusal comes first.
    let dir = tempfile::tempdir().unwrap();
    let a = Node::start(1, dir.path(), &[(2, "192.0.2.1:9".parse().unwrap())], |_| {}).await;
    eventually("a says so", || a.status(2).last_error.is_some()).await;
    assert!(
        a.status(2)
            .last_error
            .unwrap()
            .contains("refusing a plaintext link to 192.0.2.1:9")
    );
    a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_member_may_ask_about_rows() {
    let dir = tempfile::tempdir().unwrap();
    let a = lonely(dir.path()).await;
    let ask = async |hello: pb::Hello| {
        let first = pb::VerifyRequest {
            hello: Some(hello),
            ask: None,
        };
        let mut client = raw_client(a.links().local_addr()).await;
        client.verify(tokio_stream::iter([first])).await.unwrap_err()
    };
    let mut stranger = hello_of(2);
    stranger.cluster_id = "lake".into();
    let refused = ask(stranger).await;
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
    assert!(refused.message().contains("`cluster.id`"), "{refused}");
    let refused = ask(pb::Hello::default()).await;
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
    // These links have no database behind them; who asks is let through to there.
    let welcome = ask(hello_of(2)).await;
    assert_eq!(welcome.code(), tonic::Code::Unimplemented, "{welcome}");
}
