//! The listening side: takes connections, decides who is welcome, hands the welcome ones to a [`Session`].
//!
//! In:   connections of peers, and of anything else that finds the port        Out: sessions
//! Holds: nothing but the listener
//! Invariants: 1. no work is done for a stream before its hello is accepted; 2. what is not gRPC, not TLS or not a
//!             peer costs its own connection and nothing else.
//! On crash: peers connect again.
//! Not here: sending frames (`session.rs`).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::link as pb;
use anabranch_proto::link::link_server::{Link, LinkServer};
use anabranch_proto::{Lsn, NodeId};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use super::clock::unix_us;
use super::handshake::{self, Refusal};
use super::limits::{
    CONNECTION_STREAMS_MAX, CONNECTION_WINDOW_BYTES, HELLO_TIMEOUT, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT,
    REQUEST_BYTES_MAX, RESPONSE_BYTES_MAX, STREAM_WINDOW_BYTES,
};
use super::peer::Direction;
use super::session::Session;
use super::shared::{LinkEvent, Shared};
use super::{Error, accept, chain, join, log, tls, verify, wire};

/// Pause before listening again after the accept loop failed.
const LISTEN_RETRY: Duration = Duration::from_secs(1);

/// Binds and serves until the links stop. Returns the bound address.
pub(super) async fn start(shared: &Arc<Shared>, tasks: &mut JoinSet<()>) -> Result<SocketAddr, Error> {
    let config = &shared.config;
    let tls = tls::server(config.tls.as_ref(), &config.listen, &shared.identity.name)?;
    let fail = |source| Error::Bind {
        address: config.listen.address,
        source,
    };
    let listener = TcpListener::bind(config.listen.address).await.map_err(fail)?;
    let address = listener.local_addr().map_err(fail)?;
    // Settings that tonic refuses shall stop the start, not the first connection.
    let server = builder(tls.clone())?;
    tasks.spawn(serve(Arc::clone(shared), server, tls, listener, address));
    tracing::info!(%address, tls = config.tls.is_some(), "listening for peers");
    Ok(address)
}

fn builder(tls: Option<ServerTlsConfig>) -> Result<Server, Error> {
    let server = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(CONNECTION_STREAMS_MAX);
    match tls {
        Some(tls) => server.tls_config(tls).map_err(|error| Error::Server {
            reason: chain(&error),
        }),
        None => Ok(server),
    }
}

async fn serve(
    shared: Arc<Shared>,
    mut server: Server,
    tls: Option<ServerTlsConfig>,
    listener: TcpListener,
    address: SocketAddr,
) {
    let mut listener = Some(listener);
    while !*shared.stop.borrow() {
        if let Some(listener) = listener.take() {
            let incoming = accept::connections(listener);
            let service = LinkServer::new(Service {
                shared: Arc::clone(&shared),
            })
            .max_decoding_message_size(REQUEST_BYTES_MAX)
            .max_encoding_message_size(RESPONSE_BYTES_MAX);
            let done = server
                .add_service(service)
                .serve_with_incoming_shutdown(incoming, shared.stopped())
                .await;
            match done {
                Ok(()) => return,
                Err(error) => {
                    tracing::error!(error = chain(&error), "listening for peers failed, trying again")
                }
            }
        }
        tokio::select! {
            () = shared.stopped() => return,
            () = tokio::time::sleep(LISTEN_RETRY) => {}
        }
        match (TcpListener::bind(address).await, builder(tls.clone())) {
            (Ok(bound), Ok(built)) => (listener, server) = (Some(bound), built),
            (Err(error), _) => tracing::error!(%error, %address, "cannot listen for peers, trying again"),
            (_, Err(error)) => tracing::error!(%error, "cannot listen for peers, trying again"),
        }
    }
}

struct Service {
    shared: Arc<Shared>,
}

impl Service {
    /// With TLS on, the certificate must be for the name in the hello.
    fn check_certificate<T>(
        &self,
        request: &Request<T>,
    ) -> impl Fn(&pb::Hello) -> Result<(), Refusal> + use<T> {
        let wanted = self.shared.config.tls.is_some();
        let certificates = request.peer_certs();
        move |hello| {
            if !wanted {
                return Ok(());
            }
            let own = certificates
                .as_ref()
                .and_then(|chain| chain.first())
                .map(|der| der.as_ref());
            tls::check_client_name(own, &hello.node_name)
        }
    }

    fn refuse(&self, hello: &pb::Hello, refusal: Refusal) -> pb::Welcome {
        if let Some(peer) = wire::node_id(hello.node_id).and_then(|id| self.shared.peers.get(id)) {
            if peer.complain(&format!("refused: {refusal}")) {
                tracing::warn!(
                    peer = hello.node_name,
                    code = refusal.code,
                    "refused a peer: {}",
                    refusal.text
                );
            }
            self.shared.send(LinkEvent::Refused {
                peer: peer.config.id,
                refusal: refusal.clone(),
            });
        } else {
            tracing::warn!(
                peer = hello.node_name,
                code = refusal.code,
                "refused a stranger: {}",
                refusal.text
            );
        }
        pb::Welcome {
            hello: Some(self.shared.hello()),
            refusal: refusal.text,
            refusal_code: refusal.code,
        }
    }
}

#[tonic::async_trait]
impl Link for Service {
    /// Would this daemon be welcome? Registers and remembers nothing: for checks by an operator.
    async fn greet(&self, request: Request<pb::Hello>) -> Result<Response<pb::Welcome>, Status> {
        let check_certificate = self.check_certificate(&request);
        let hello = request.into_inner();
        let checked = check_certificate(&hello).and_then(|()| {
            handshake::check(&self.shared.identity, &self.shared.config.peers, &hello).map(drop)
        });
        Ok(Response::new(match checked {
            Ok(()) => pb::Welcome {
                hello: Some(self.shared.hello()),
                ..pb::Welcome::default()
            },
            Err(refusal) => pb::Welcome {
                hello: Some(self.shared.hello()),
                refusal: refusal.text,
                refusal_code: refusal.code,
            },
        }))
    }

    /// The log of this node, for a member that would be welcome.
    async fn conflicts(
        &self,
        request: Request<pb::ConflictsRequest>,
    ) -> Result<Response<pb::ConflictsResponse>, Status> {
        let check_certificate = self.check_certificate(&request);
        let request = request.into_inner();
        let hello = request.hello.unwrap_or_default();
        check_certificate(&hello)
            .and_then(|()| {
                handshake::check(&self.shared.identity, &self.shared.config.peers, &hello).map(drop)
            })
            .map_err(|refusal| Status::permission_denied(refusal.text))?;
        let filter = serde_json::from_str(&request.filter)
            .map_err(|error| Status::invalid_argument(format!("the filter cannot be read: {error}")))?;
        let answer = log::own_answer(&self.shared.config, &filter)
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?;
        log::response(&answer).map(Response::new)
    }

    async fn join(&self, request: Request<pb::JoinRequest>) -> Result<Response<pb::JoinResponse>, Status> {
        let check_certificate = self.check_certificate(&request);
        let request = request.into_inner();
        if let Err(refusal) = check_certificate(&request.hello.clone().unwrap_or_default()) {
            return Ok(Response::new(pb::JoinResponse {
                refusal: refusal.text,
                refusal_code: refusal.code,
                ..pb::JoinResponse::default()
            }));
        }
        join::answer(&self.shared, request).await.map(Response::new)
    }

    type SeedStream = ReceiverStream<Result<pb::SeedResponse, Status>>;

    async fn seed(&self, request: Request<pb::SeedRequest>) -> Result<Response<Self::SeedStream>, Status> {
        let check_certificate = self.check_certificate(&request);
        let request = request.into_inner();
        let hello = request.hello.clone().unwrap_or_default();
        let known = check_certificate(&hello)
            .and_then(|()| handshake::check(&self.shared.identity, &self.shared.config.peers, &hello));
        if let Err(refusal) = known {
            return Err(Status::failed_precondition(refusal.to_string()));
        }
        let (out, outbound) = mpsc::channel(1);
        let holds = wire::vector_from_wire(&request.holds);
        let joiner = NodeId(u16::try_from(hello.node_id).unwrap_or(0));
        self.shared.spawn(join::seed(
            Arc::clone(&self.shared),
            (joiner, Lsn(request.cut)),
            holds,
            out,
        ));
        Ok(Response::new(ReceiverStream::new(outbound)))
    }

    type VerifyStream = ReceiverStream<Result<pb::VerifyResponse, Status>>;

    async fn verify(
        &self,
        request: Request<Streaming<pb::VerifyRequest>>,
    ) -> Result<Response<Self::VerifyStream>, Status> {
        let check_certificate = self.check_certificate(&request);
        let mut questions = request.into_inner();
        let first = tokio::time::timeout(HELLO_TIMEOUT, questions.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no hello in time"))??
            .ok_or_else(|| Status::invalid_argument("the stream ended before the hello"))?;
        let hello = first.hello.unwrap_or_default();
        check_certificate(&hello)
            .and_then(|()| {
                handshake::check(&self.shared.identity, &self.shared.config.peers, &hello).map(drop)
            })
            .map_err(|refusal| Status::permission_denied(refusal.text))?;
        verify::serve(&self.shared, questions).map(Response::new)
    }

    type PullStream = ReceiverStream<Result<pb::PullResponse, Status>>;

    async fn pull(
        &self,
        request: Request<Streaming<pb::PullRequest>>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let check_certificate = self.check_certificate(&request);
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(HELLO_TIMEOUT, inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no hello in time"))??
            .ok_or_else(|| Status::invalid_argument("the stream ended before the hello"))?;
        let hello = first.hello.clone().unwrap_or_default();
        let admitted = check_certificate(&hello)
            .map_err(Error::from)
            .and_then(|()| self.shared.admit(&hello, Direction::Inbound));
        // One message waits here, one in the codec: what is under way is bounded by the credit, not by this.
        let (out, outbound) = mpsc::channel(1);
        let refused = match admitted {
            Ok((peer, live)) => {
                let shared = Arc::clone(&self.shared);
                self.shared
                    .spawn(Session::new(shared, peer, live, out.clone()).run(first, inbound));
                None
            }
            Err(Error::Refused(refusal)) => Some(self.refuse(&hello, refusal)),
            Err(error @ Error::Broken { .. }) => return Err(Status::unavailable(chain(&error))),
            Err(other) => {
                tracing::error!(error = chain(&other), "cannot admit a peer");
                return Err(Status::unavailable(chain(&other)));
            }
        };
        if let Some(welcome) = refused {
            let answer = pb::PullResponse {
                welcome: Some(welcome),
                clock_us: unix_us(),
                ..pb::PullResponse::default()
            };
            // The receiver is still in our hands: there is room.
            let _ = out.try_send(Ok(answer));
        }
        Ok(Response::new(ReceiverStream::new(outbound)))
    }
}
