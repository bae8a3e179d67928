//! The calling side: keeps one stream open to one peer, for as long as the daemon runs.
//!
//! In:   the peer's configured address           Out: a welcomed stream, handed to `receive.rs`
//! Holds: nothing between attempts but the delay
//! Invariants: 1. the address is looked up anew at each attempt; 2. a refused peer is asked every few seconds, an
//!             unreachable one more and more slowly, with jitter; 3. one message per new reason in the log.
//! On crash: connects again.
//! Not here: what is done with frames (`receive.rs`).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::link as pb;
use anabranch_proto::link::link_client::LinkClient;
use rand::Rng;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use super::handshake::{Refusal, malformed};
use super::limits::{
    BACKOFF_MAX, BACKOFF_MIN, CONNECT_TIMEOUT, CONNECTION_WINDOW_BYTES, HELLO_TIMEOUT, KEEPALIVE_INTERVAL,
    KEEPALIVE_TIMEOUT, REFUSED_RETRY, REQUEST_BYTES_MAX, RESPONSE_BYTES_MAX, STREAM_WINDOW_BYTES,
};
use super::peer::{Direction, Live, Peer};
use super::receive::Receiver;
use super::shared::{LinkEvent, Shared};
use super::{Error, chain, tls};
use crate::config::{self, Config};

/// Requests waiting to be taken by the transport. They are cumulative, so few are enough.
const REQUESTS_MAX: usize = 4;

/// Keeps receiving from `peer` until the links stop.
pub(super) async fn run(shared: Arc<Shared>, peer: Arc<Peer>) {
    let mut backoff = BACKOFF_MIN;
    loop {
        let mut welcomed = false;
        let end = tokio::select! {
            () = shared.stopped() => return,
            opened = open(&shared, &peer) => match opened {
                Ok(stream) => {
                    welcomed = true;
                    backoff = BACKOFF_MIN;
                    receive(&shared, &peer, stream).await
                }
                Err(error) => Err(error),
            },
        };
        // Not cancelled by the branch above: a frame under way into the journal must arrive there.
        let Err(error) = end else { return };
        let delay = match &error {
            Error::Refused(refusal) => {
                note_refusal(&shared, &peer, refusal);
                REFUSED_RETRY
            }
            other => {
                let text = chain(other);
                if peer.failed(&text) {
                    tracing::warn!(peer = peer.config.name, "{text}; trying again");
                }
                jittered(&mut backoff)
            }
        };
        if welcomed {
            shared.send(LinkEvent::Disconnected {
                peer: peer.config.id,
                reason: chain(&error),
            });
        }
        tokio::select! {
            () = shared.stopped() => return,
            () = tokio::time::sleep(delay) => {}
        }
    }
}

fn note_refusal(shared: &Shared, peer: &Peer, refusal: &Refusal) {
    if peer.refused(refusal) {
        tracing::error!(
            peer = peer.config.name,
            code = refusal.code,
            "refused: {}; trying again slowly",
            refusal.text
        );
        shared.send(LinkEvent::Refused {
            peer: peer.config.id,
            refusal: refusal.clone(),
        });
    }
}

/// The delay of this time, somewhere in the upper half of the backoff; the backoff doubles.
fn jittered(backoff: &mut Duration) -> Duration {
    let delay = backoff.mul_f64(rand::rng().random_range(0.5..1.0));
    *backoff = backoff.saturating_mul(2).min(BACKOFF_MAX);
    delay
}

/// A welcomed stream.
struct Opened {
    requests: mpsc::Sender<pb::PullRequest>,
    responses: Streaming<pb::PullResponse>,
    first: pb::PullResponse,
    live: Live,
}

async fn receive(shared: &Arc<Shared>, peer: &Arc<Peer>, opened: Opened) -> Result<(), Error> {
    let Opened {
        requests,
        responses,
        first,
        live,
    } = opened;
    tracing::info!(peer = peer.config.name, protocol = live.protocol, "receiving");
    shared.send(LinkEvent::Connected { peer: peer.config.id });
    let end = Receiver::new(Arc::clone(shared), Arc::clone(peer), requests)
        .run(first, responses)
        .await;
    drop(live);
    end
}

async fn open(shared: &Shared, peer: &Arc<Peer>) -> Result<Opened, Error> {
    // Not even asked: were it to refuse us, nobody would pass its stream on to us, and its drop would wait for us for ever.
    shared.check_shunned(peer)?;
    let mut client = connect(&shared.config, &peer.config).await?;
    let broken = |reason: String| Error::Broken {
        peer: peer.config.name.clone(),
        reason,
    };
    let (requests, stream) = mpsc::channel(REQUESTS_MAX);
    let hello = pb::PullRequest {
        hello: Some(shared.hello()),
        ..pb::PullRequest::default()
    };
    requests
        .try_send(hello)
        .map_err(|_| broken("cannot send the hello".to_owned()))?;
    let answer = async {
        let mut responses = client.pull(ReceiverStream::new(stream)).await?.into_inner();
        let first = responses.message().await?;
        Ok::<_, tonic::Status>((responses, first))
    };
    let (responses, first) = tokio::time::timeout(HELLO_TIMEOUT, answer)
        .await
        .map_err(|_| Error::Stalled {
            peer: peer.config.name.clone(),
            seconds: HELLO_TIMEOUT.as_secs(),
        })?
        .map_err(|status| broken(describe(&status)))?;
    let first = first.ok_or_else(|| broken("it ended before the welcome".to_owned()))?;
    let live = check_welcome(shared, peer, &first)?;
    Ok(Opened {
        requests,
        responses,
        first,
        live,
    })
}

/// Is it the peer that we dialled, does it welcome us, and do we agree to exchange with it?
fn check_welcome(shared: &Shared, peer: &Peer, first: &pb::PullResponse) -> Result<Live, Error> {
    let Some(welcome) = &first.welcome else {
        return Err(malformed("its first message is no welcome").into());
    };
    if !welcome.refusal_code.is_empty() || !welcome.refusal.is_empty() {
        return Err(Refusal {
            code: welcome.refusal_code.clone(),
            text: welcome.refusal.clone(),
        }
        .into());
    }
    let hello = welcome.hello.clone().unwrap_or_default();
    if hello.node_id != u32::from(peer.config.id.0) && hello.node_id != u32::from(shared.identity.id.0) {
        return Err(Refusal::new(
            super::RefusalCode::WrongPeer,
            format!(
                "node `{}` (id {}) answers at {}, where node `{}` (id {}) is configured: correct `peers.address`",
                hello.node_name, hello.node_id, peer.config.address, peer.config.name, peer.config.id
            ),
        )
        .into());
    }
    let (_, live) = shared.admit(&hello, Direction::Outbound)?;
    Ok(live)
}

/// What a failed call says, without tonic's decoration.
pub(crate) fn describe(status: &tonic::Status) -> String {
    let text = if status.message().is_empty() {
        status.code().description()
    } else {
        status.message()
    };
    match std::error::Error::source(status) {
        Some(source) => format!("{text}: {}", chain(source)),
        None => text.to_owned(),
    }
}

/// Connects to the first address of a peer that answers, as the node that `config` describes.
pub(super) async fn connect(config: &Config, peer: &config::Peer) -> Result<LinkClient<Channel>, Error> {
    let (name, address) = (&peer.name, &peer.address);
    let resolve = |source| Error::Resolve {
        peer: name.clone(),
        address: address.clone(),
        source,
    };
    let looked_up = tokio::time::timeout(CONNECT_TIMEOUT, tokio::net::lookup_host(address.as_str()))
        .await
        .map_err(|_| resolve(std::io::Error::from(std::io::ErrorKind::TimedOut)))?
        .map_err(resolve)?;
    let mut last = resolve(std::io::Error::other("the name has no addresses"));
    for candidate in looked_up {
        match dial(config, name, candidate).await {
            Ok(channel) => {
                return Ok(LinkClient::new(channel)
                    .max_decoding_message_size(RESPONSE_BYTES_MAX)
                    .max_encoding_message_size(REQUEST_BYTES_MAX));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn dial(config: &Config, name: &str, address: SocketAddr) -> Result<Channel, Error> {
    let tls = tls::client(
        config.tls.as_ref(),
        config.listen.insecure,
        &config.node.name,
        name,
        address,
    )?;
    let scheme = if tls.is_some() { "https" } else { "http" };
    let fail = |error: tonic::transport::Error| Error::Connect {
        peer: name.to_owned(),
        address,
        reason: chain(&error),
    };
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
        .map_err(fail)?
        .tcp_nodelay(true)
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    if let Some(tls) = tls {
        endpoint = endpoint.tls_config(tls).map_err(fail)?;
    }
    let timed_out = || Error::Connect {
        peer: name.to_owned(),
        address,
        reason: "no answer in time; is the port open?".to_owned(),
    };
    tokio::time::timeout(CONNECT_TIMEOUT.saturating_mul(2), endpoint.connect())
        .await
        .map_err(|_| timed_out())?
        .map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_doubles_up_to_its_bound_and_is_never_the_same_for_everyone() {
        let mut backoff = BACKOFF_MIN;
        let mut bound = BACKOFF_MIN;
        for _ in 0..12 {
            let delay = jittered(&mut backoff);
            assert!(delay >= bound / 2 && delay <= bound, "{delay:?} of {bound:?}");
            bound = (bound * 2).min(BACKOFF_MAX);
        }
        assert_eq!(backoff, BACKOFF_MAX);
    }
}
