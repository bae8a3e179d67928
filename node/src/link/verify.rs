//! Conversations about rows with other members, over the links' port: see `crate::verify`.
//!
//! In:   a peer's questions, or ours            Out: answers
//! Holds: nothing; a connection for each conversation
//! Not here: what is asked and answered (`crate::verify`)

use std::sync::Arc;

use anabranch_proto::{NodeId, link as pb};
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::client::{connect, describe};
use super::limits::HELLO_TIMEOUT;
use super::peer::Peer;
use super::shared::Shared;
use super::{Links, chain};
use crate::verify::Talk;

impl Links {
    /// A conversation with every peer; for those that cannot be talked to, why.
    pub async fn talks(&self) -> (Vec<Talk>, Vec<String>) {
        let shared = &self.shared;
        let all = shared
            .peers
            .iter()
            .map(|peer| open_in_time(Arc::clone(shared), Arc::clone(peer)));
        let (mut talks, mut absent) = (Vec::new(), Vec::new());
        for talk in futures_util::future::join_all(all).await {
            match talk {
                Ok(talk) => talks.push(talk),
                Err(why) => absent.push(why),
            }
        }
        (talks, absent)
    }
}

impl Links {
    /// A conversation with one peer.
    ///
    /// # Errors
    /// Why there is none, in words.
    pub async fn talk(&self, node: NodeId) -> Result<Talk, String> {
        let Some(peer) = self.shared.peers.get(node) else {
            return Err(format!("no other member has the id {node}"));
        };
        let talk = tokio::time::timeout(HELLO_TIMEOUT, open(&self.shared, peer)).await;
        let talk = talk.unwrap_or_else(|_| Err(format!("no answer within {} s", HELLO_TIMEOUT.as_secs())));
        talk.map_err(|why| format!("node {} cannot be asked: {why}", peer.config.name))
    }
}

async fn open_in_time(shared: Arc<Shared>, peer: Arc<Peer>) -> Result<Talk, String> {
    let talk = tokio::time::timeout(HELLO_TIMEOUT, open(&shared, &peer)).await;
    let talk = talk.unwrap_or_else(|_| Err(format!("no answer within {} s", HELLO_TIMEOUT.as_secs())));
    let (name, id) = (&peer.config.name, peer.config.id);
    talk.map_err(|why| format!("node {name} ({id}) is not compared: {why}"))
}

async fn open(shared: &Shared, peer: &Peer) -> Result<Talk, String> {
    let mut client = connect(&shared.config, &peer.config)
        .await
        .map_err(|error| chain(&error))?;
    let (ask, questions) = mpsc::channel(1);
    let hello = pb::VerifyRequest {
        hello: Some(shared.hello()),
        ask: None,
    };
    // The channel is empty: there is room.
    let _ = ask.try_send(hello);
    let answers = client
        .verify(ReceiverStream::new(questions))
        .await
        .map_err(|status| describe(&status))?
        .into_inner();
    Ok(Talk::new(
        peer.config.id,
        peer.config.name.clone(),
        ask,
        answers.boxed(),
    ))
}

/// Answers a peer that was let in.
pub(super) fn serve(
    shared: &Shared,
    questions: Streaming<pb::VerifyRequest>,
) -> Result<ReceiverStream<Result<pb::VerifyResponse, Status>>, Status> {
    let Some(seat) = shared.verify.clone() else {
        return Err(Status::unimplemented("this daemon has no database"));
    };
    let (out, answers) = mpsc::channel(1);
    shared.spawn(seat.converse(questions, out));
    Ok(ReceiverStream::new(answers))
}
