//! What a stream does with a peer that behaves in every possible way.

use std::sync::Mutex;

use anabranch_proto::link::link_server::{Link, LinkServer};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use super::*;

/// Asks for all that is held of nodes 1 and 2.
async fn want_of_both(raw: &RawPeer) {
    let request = pb::PullRequest {
        has_want: true,
        want: [1, 2]
            .map(|id| wire::entry_to_wire(NodeId(id), Position::ZERO))
            .to_vec(),
        want_generation: 1,
        ..pb::PullRequest::default()
    };
    raw.requests.send(request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_consumes_nothing_gets_no_more_than_the_credit() {
    let dir = tempfile::tempdir().unwrap();
    let a = lonely(dir.path()).await;
    let payload = Bytes::from(vec![7; 300_000]);
    for at in 0..60 {
        a.append(whole(1, at * TXN_BYTES, payload.clone())).await;
    }
    let mut raw = RawPeer::greet(a.links().local_addr(), hello_of(2)).await;
    raw.want(1, Position::ZERO, 1).await;
    let (mut bytes, mut frames) = (0, 0);
    let mut consumed = 0;
    while frames < 60 {
        let response = raw.next().await;
        assert!(
            response
                .frames
                .iter()
                .map(|frame| frame.payload.len())
                .sum::<usize>()
                <= 1 << 20
        );
        frames += response.frames.len();
        bytes += response
            .frames
            .iter()
            .map(|frame| frame.payload.len() as u64 + 64)
            .sum::<u64>();
        assert!(
            bytes - consumed <= limits::CREDIT_BYTES,
            "{bytes} sent, {consumed} consumed"
        );
        // An empty message is the pulse of a sender that has nothing to send, or must not.
        if response.frames.is_empty() && bytes > consumed {
            assert!(bytes - consumed > limits::CREDIT_BYTES - 300_064 || frames == 60);
            consumed = bytes;
            let request = pb::PullRequest {
                consumed_bytes: consumed,
                ..pb::PullRequest::default()
            };
            raw.requests.send(request).await.unwrap();
        }
    }
    assert!(consumed > 0, "the credit was never reached");
    a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_larger_than_the_credit_goes_alone() {
    let dir = tempfile::tempdir().unwrap();
    let a = lonely(dir.path()).await;
    a.append(whole(1, 0, vec![1; 12 << 20])).await;
    a.append(whole(1, 10, "small")).await;
    let mut raw = RawPeer::greet(a.links().local_addr(), hello_of(2)).await;
    raw.want(1, Position::ZERO, 1).await;
    let large = loop {
        let response = raw.next().await;
        if !response.frames.is_empty() {
            break response;
        }
    };
    assert_eq!(large.frames.len(), 1);
    let idle = raw.next().await;
    assert!(idle.frames.is_empty(), "nothing more without credit");
    // A peer that claims to have consumed more than it got gains nothing by it.
    let request = pb::PullRequest {
        consumed_bytes: u64::MAX,
        ..pb::PullRequest::default()
    };
    raw.requests.send(request).await.unwrap();
    loop {
        let response = raw.next().await;
        if let [frame] = response.frames.as_slice() {
            assert_eq!(frame.payload.as_ref(), b"small");
            break;
        }
    }
    a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn origins_take_turns() {
    let dir = tempfile::tempdir().unwrap();
    let a = lonely(dir.path()).await;
    for at in 0..200 {
        a.append(whole(1, at * TXN_BYTES, vec![1; 50_000])).await;
    }
    for at in 0..20 {
        a.journal
            .append(whole(2, at * TXN_BYTES, vec![2; 50_000]))
            .await
            .unwrap();
    }
    eventually("it is written", || {
        a.journal.written_vector().get(NodeId(2)) == position(200)
    })
    .await;
    let mut raw = RawPeer::greet(a.links().local_addr(), hello_of(2)).await;
    want_of_both(&raw).await;
    let mut order = Vec::new();
    while order.iter().filter(|&&origin| origin == 2).count() < 20 {
        order.extend(raw.next().await.frames.into_iter().map(|frame| frame.origin));
    }
    let last = order.iter().rposition(|&origin| origin == 2).unwrap();
    assert!(last < 50, "origin 2 had to wait for origin 1: {order:?}");
    a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_larger_than_the_credit_does_not_wait_for_another_origin_to_fall_silent() {
    let dir = tempfile::tempdir().unwrap();
    let a = lonely(dir.path()).await;
    for at in 0..200 {
        a.append(whole(1, at * TXN_BYTES, vec![1; 50_000])).await;
    }
    a.journal.append(whole(2, 0, "small")).await.unwrap();
    a.journal.append(whole(2, 10, vec![2; 12 << 20])).await.unwrap();
    eventually("it is written", || {
        a.journal.written_vector().get(NodeId(2)) == position(20)
    })
    .await;
    let mut raw = RawPeer::greet(a.links().local_addr(), hello_of(2)).await;
    want_of_both(&raw).await;
    let (mut bytes, mut before, mut got) = (0, 0, Vec::new());
    while got.len() < 202 {
        let response = raw.next().await;
        let lens = response
            .frames
            .iter()
            .map(|frame| frame.payload.len() as u64 + 64);
        bytes += lens.sum::<u64>();
        let is_idle = response.frames.is_empty();
        got.extend(
            response
                .frames
                .into_iter()
                .map(|frame| (frame.origin, frame.payload.len())),
        );
        // As long as something comes, something is under way; without that, all is consumed.
        let request = pb::PullRequest {
            consumed_bytes: if is_idle { bytes } else { before },
            ..pb::PullRequest::default()
        };
        before = bytes;
        raw.requests.send(request).await.unwrap();
    }
    let large = got.iter().position(|&(_, len)| len == 12 << 20).unwrap();
    assert!(large < 100, "it came as number {large} of {}", got.len());
    a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_all_of_whose_frames_are_larger_than_the_credit_takes_turns_with_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let a = lonely(dir.path()).await;
    for at in 0..10 {
        a.append(whole(1, at * TXN_BYTES, "small")).await;
    }
    for at in 0..5 {
        let large = whole(2, at * TXN_BYTES, vec![2; 5 << 20]);
        a.journal.append(large).await.unwrap();
    }
    eventually("it is written", || {
        a.journal.written_vector().get(NodeId(2)) == position(50)
    })
    .await;
    let mut raw = RawPeer::greet(a.links().local_addr(), hello_of(2)).await;
    want_of_both(&raw).await;
    let (mut consumed_bytes, mut order) = (0, Vec::new());
    while order.len() < 15 {
        for frame in raw.next().await.frames {
            consumed_bytes += frame.payload.len() as u64 + 64;
            order.push(frame.origin);
        }
        let request = pb::PullRequest {
            consumed_bytes,
            ..pb::PullRequest::default()
        };
        raw.requests.send(request).await.unwrap();
    }
    let last = order.iter().rposition(|&origin| origin == 2).unwrap();
    let small = order.iter().take(last).filter(|&&origin| origin == 1).count();
    assert!(small >= 4, "origin 1 had to wait for all of origin 2: {order:?}");
    a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_lacks_credit_keeps_its_turn_though_smaller_ones_of_another_origin_have_enough() {
    let dir = tempfile::tempdir().unwrap();
    let a = lonely(dir.path()).await;
    for at in 0..400 {
        a.append(whole(1, at * TXN_BYTES, vec![1; 50_000])).await;
    }
    for at in 0..100 {
        let small = whole(2, at * TXN_BYTES, vec![2; 50_000]);
        a.journal.append(small).await.unwrap();
    }
    let large = whole(2, 1_000, vec![2; 3 << 20]);
    a.journal.append(large).await.unwrap();
    eventually("it is written", || {
        a.journal.written_vector().get(NodeId(2)) == position(1_010)
    })
    .await;
    let mut raw = RawPeer::greet(a.links().local_addr(), hello_of(2)).await;
    want_of_both(&raw).await;
    let (mut bytes, mut lens) = (0_u64, Vec::new());
    while lens.len() < 501 {
        let response = raw.next().await;
        let is_idle = response.frames.is_empty();
        for frame in response.frames {
            bytes += frame.payload.len() as u64 + 64;
            lens.push(frame.payload.len());
        }
        // As long as something comes, half of the credit is under way.
        let request = pb::PullRequest {
            consumed_bytes: if is_idle {
                bytes
            } else {
                bytes.saturating_sub(2 << 20)
            },
            ..pb::PullRequest::default()
        };
        raw.requests.send(request).await.unwrap();
    }
    let large = lens.iter().position(|&len| len == 3 << 20).unwrap();
    assert!(large < 250, "it came as number {large} of {}", lens.len());
    a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_want_replaces_the_old_and_leaves_what_flows_alone() {
    let dir = tempfile::tempdir().unwrap();
    let a = lonely(dir.path()).await;
    a.write(3).await;
    let mut raw = RawPeer::greet(a.links().local_addr(), hello_of(2)).await;
    raw.want(1, Position::ZERO, 1).await;
    let mut got = Vec::new();
    while got.len() < 3 {
        got.extend(raw.next().await.frames);
    }
    // Not named for repositioning: it goes on from where it is.
    let mut request = pb::PullRequest {
        has_want: true,
        want: vec![wire::entry_to_wire(NodeId(1), Position::ZERO)],
        want_generation: 2,
        ..pb::PullRequest::default()
    };
    raw.requests.send(request.clone()).await.unwrap();
    a.write(1).await;
    while got.len() < 4 {
        got.extend(raw.next().await.frames);
    }
    assert_eq!(got.last().unwrap().prev_lsn, 30);
    (request.reposition, request.want_generation) = (vec![1], 3);
    raw.requests.send(request.clone()).await.unwrap();
    let again = loop {
        let response = raw.next().await;
        if !response.frames.is_empty() {
            break response;
        }
    };
    assert_eq!((again.want_generation, again.frames[0].prev_lsn), (3, 0));
    (request.want, request.want_generation) = (Vec::new(), 4);
    raw.requests.send(request).await.unwrap();
    while raw.next().await.want_generation != 4 {}
    a.write(1).await;
    let idle = raw.next().await;
    assert!(idle.frames.is_empty());
    a.close().await;
}

/// A server that does what the test says.
struct Scripted {
    hello: pb::Hello,
    /// Taken by the first Pull.
    script: Mutex<Option<mpsc::Receiver<pb::PullResponse>>>,
    requests: mpsc::UnboundedSender<pb::PullRequest>,
}

#[tonic::async_trait]
impl Link for Scripted {
    async fn greet(&self, _: Request<pb::Hello>) -> Result<Response<pb::Welcome>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn conflicts(
        &self,
        _: Request<pb::ConflictsRequest>,
    ) -> Result<Response<pb::ConflictsResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn join(&self, _: Request<pb::JoinRequest>) -> Result<Response<pb::JoinResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    type SeedStream = ReceiverStream<Result<pb::SeedResponse, Status>>;

    async fn seed(&self, _: Request<pb::SeedRequest>) -> Result<Response<Self::SeedStream>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    type VerifyStream = ReceiverStream<Result<pb::VerifyResponse, Status>>;

    async fn verify(
        &self,
        _: Request<Streaming<pb::VerifyRequest>>,
    ) -> Result<Response<Self::VerifyStream>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    type PullStream = ReceiverStream<Result<pb::PullResponse, Status>>;

    async fn pull(
        &self,
        request: Request<Streaming<pb::PullRequest>>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let mut script = self
            .script
            .lock()
            .unwrap()
            .take()
            .ok_or_else(|| Status::unavailable("scripted once"))?;
        let mut inbound = request.into_inner();
        let (requests, (out, outbound)) = (self.requests.clone(), mpsc::channel(4));
        let welcome = pb::Welcome {
            hello: Some(self.hello.clone()),
            ..pb::Welcome::default()
        };
        out.send(Ok(pb::PullResponse {
            welcome: Some(welcome),
            ..pb::PullResponse::default()
        }))
        .await
        .unwrap();
        tokio::spawn(async move {
            while let Ok(Some(request)) = inbound.message().await {
                let _ = requests.send(request);
            }
        });
        tokio::spawn(async move {
            while let Some(response) = script.recv().await {
                if out.send(Ok(response)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(outbound)))
    }
}

/// A node `a` that receives from a scripted `b`.
struct Stage {
    a: Node,
    script: mpsc::Sender<pb::PullResponse>,
    requests: mpsc::UnboundedReceiver<pb::PullRequest>,
    _dir: TempDir,
}

impl Stage {
    async fn set() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (script, scripted) = mpsc::channel(64);
        let (seen, requests) = mpsc::unbounded_channel();
        let server = Scripted {
            hello: hello_of(2),
            script: Mutex::new(Some(scripted)),
            requests: seen,
        };
        let service = LinkServer::new(server).max_encoding_message_size(limits::RESPONSE_BYTES_MAX);
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpIncoming::from(listener)),
        );
        let dir = tempfile::tempdir().unwrap();
        let a = Node::start(1, dir.path(), &[(2, address)], |_| {}).await;
        Self {
            a,
            script,
            requests,
            _dir: dir,
        }
    }

    /// The next request that says what is wanted.
    async fn want(&mut self) -> pb::PullRequest {
        loop {
            let request = tokio::time::timeout(Duration::from_secs(30), self.requests.recv())
                .await
                .unwrap()
                .unwrap();
            if request.has_want {
                return request;
            }
        }
    }

    async fn send(&self, generation: u64, frames: impl IntoIterator<Item = Frame>) {
        let frames = frames.into_iter().map(wire::frame_to_wire).collect();
        self.send_raw(pb::PullResponse {
            want_generation: generation,
            frames,
            ..pb::PullResponse::default()
        })
        .await;
    }

    async fn send_raw(&self, response: pb::PullResponse) {
        self.script.send(response).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_is_asked_for_again_and_what_was_under_way_is_not_looked_at() {
    let mut stage = Stage::set().await;
    let want = stage.want().await;
    assert_eq!((want.want_generation, want.reposition.clone()), (1, vec![2]));
    assert_eq!(want.want, vec![wire::entry_to_wire(NodeId(2), Position::ZERO)]);
    stage
        .send(1, [whole(2, 0, "x"), whole(2, 0, "x"), whole(2, 10, "x")])
        .await;
    stage
        .send(
            1,
            [whole(2, 40, "x"), whole(2, 20, "under way before the new want")],
        )
        .await;
    let want = stage.want().await;
    assert_eq!((want.want_generation, want.reposition.clone()), (2, vec![2]));
    assert_eq!(want.want, vec![wire::entry_to_wire(NodeId(2), position(20))]);
    stage.send(1, [whole(2, 20, "still under way")]).await;
    stage
        .send(2, [whole(2, 20, "x"), whole(2, 30, "x"), whole(2, 40, "x")])
        .await;
    stage.a.reaches(2, 50).await;
    stage.a.assert_seamless(2, 5).await;
    assert_eq!(stage.a.journaled(2).await.len(), 5);
    stage.a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_lacks_what_we_need_is_asked_only_now_and_then() {
    let mut stage = Stage::set().await;
    let mut events = stage.a.links().events().unwrap();
    stage.want().await;
    stage.send(1, [whole(2, 500, "x")]).await;
    assert_eq!(stage.want().await.want_generation, 2);
    stage.send(2, [whole(2, 500, "x")]).await;
    let text = loop {
        if let LinkEvent::Unavailable {
            origin, held, text, ..
        } = events.recv().await.unwrap()
        {
            assert_eq!((origin, held), (NodeId(2), Position::ZERO));
            break text;
        }
    };
    assert!(
        text.contains("nothing of node 2 between 0:0/0 and 1:0/1F4"),
        "{text}"
    );
    // Asked for once more after a while, not at once.
    stage.send(2, (0..20).map(|_| whole(2, 500, "x"))).await;
    assert_eq!(stage.want().await.want_generation, 3);
    assert_eq!(stage.a.links().held().get(NodeId(2)), Position::ZERO);
    stage.a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_cannot_be_served_is_shown_and_asked_for_again() {
    let mut stage = Stage::set().await;
    stage.want().await;
    let unavailable = pb::Unavailable {
        node_id: 2,
        code: "trimmed".to_owned(),
        text: "the journal begins later".to_owned(),
    };
    stage
        .send_raw(pb::PullResponse {
            unavailable: vec![unavailable],
            want_generation: 1,
            ..pb::PullResponse::default()
        })
        .await;
    let a = &stage.a;
    eventually("it is shown", || {
        a.status(2)
            .last_error
            .is_some_and(|text| text.contains("begins later"))
    })
    .await;
    assert!(a.is_connected(2));
    let want = stage.want().await;
    assert_eq!(want.reposition, vec![2]);
    stage.send(want.want_generation, [whole(2, 0, "x")]).await;
    stage.a.reaches(2, 10).await;
    stage.a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_frame_ends_the_link_and_spoils_nothing() {
    let mut stage = Stage::set().await;
    stage.want().await;
    let mut bad = wire::frame_to_wire(whole(2, 10, "x"));
    bad.raw_len = u32::MAX;
    let frames = vec![
        wire::frame_to_wire(whole(2, 0, "x")),
        bad,
        wire::frame_to_wire(whole(2, 10, "x")),
    ];
    stage
        .send_raw(pb::PullResponse {
            want_generation: 1,
            frames,
            ..pb::PullResponse::default()
        })
        .await;
    let a = &stage.a;
    a.reaches(2, 10).await;
    let mut events = a.links().events().unwrap();
    let reason = loop {
        if let LinkEvent::Disconnected { reason, .. } = events.recv().await.unwrap() {
            break reason;
        }
    };
    assert!(reason.contains("larger than any frame may be"), "{reason}");
    assert_eq!(a.links().held().get(NodeId(2)), position(10));
    stage.a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn our_own_frames_and_those_nobody_asked_for_are_dropped() {
    let mut stage = Stage::set().await;
    stage.want().await;
    stage
        .send(
            1,
            [whole(1, 0, "ours"), whole(9, 0, "a stranger's"), whole(2, 0, "x")],
        )
        .await;
    stage.a.reaches(2, 10).await;
    assert!(stage.a.journaled(1).await.is_empty());
    assert!(stage.a.journaled(9).await.is_empty());
    stage.a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_consumed_is_reported_and_pings_are_sent() {
    let mut stage = Stage::set().await;
    stage.want().await;
    stage
        .send(1, (0..30).map(|at| whole(2, at * TXN_BYTES, vec![3; 100_000])))
        .await;
    let (mut consumed, mut pinged) = (0, false);
    while consumed < 30 * 100_064 || !pinged {
        let request = tokio::time::timeout(Duration::from_secs(30), stage.requests.recv())
            .await
            .unwrap()
            .unwrap();
        assert!(request.consumed_bytes >= consumed);
        consumed = request.consumed_bytes;
        pinged |= request.clock_us != 0;
    }
    assert_eq!(consumed, 30 * 100_064);
    stage.a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_peer_is_given_up() {
    let mut stage = Stage::set().await;
    stage.want().await;
    let mut events = stage.a.links().events().unwrap();
    let reason = loop {
        if let LinkEvent::Disconnected { reason, .. } = events.recv().await.unwrap() {
            break reason;
        }
    };
    assert!(reason.contains("stalled: no message for"), "{reason}");
    stage.a.close().await;
}
