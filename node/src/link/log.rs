//! The conflict logs of all members, over the links.
//!
//! In:   a filter            Out: the answer of each member, or why there is none
//! Holds: nothing; a connection for each question
//! Not here: joining the answers (`crate::review::cluster`)

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::link as pb;
use futures_util::future::join_all;
use tonic::Status;

use super::client::{connect, describe};
use super::peer::Peer;
use super::shared::Shared;
use super::{Links, chain};
use crate::config::Config;
use crate::pg;
use crate::review::cluster::{self, Answer, Joined};
use crate::review::{self, Filter};

/// A member that does not answer in this time is away.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

impl Links {
    /// Asks every member, this one included, and joins their logs.
    pub async fn conflicts(&self, filter: &Filter) -> Joined {
        let shared = &self.shared;
        let own = own_answer(&shared.config, filter).await;
        let own = (
            shared.identity.id.0,
            shared.identity.name.clone(),
            own.map_err(|error| error.to_string()),
        );
        let peers: Vec<Arc<Peer>> = shared.peers.iter().map(Arc::clone).collect();
        let others = peers.iter().map(async |peer| {
            let answer = match tokio::time::timeout(ANSWER_TIMEOUT, ask(shared, peer, filter)).await {
                Ok(answer) => answer,
                Err(_) => Err(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs())),
            };
            (peer.config.id.0, peer.config.name.clone(), answer)
        });
        let mut answers = vec![own];
        answers.extend(join_all(others).await);
        cluster::join(answers, filter.limit)
    }
}

async fn ask(shared: &Shared, peer: &Peer, filter: &Filter) -> Result<Answer, String> {
    let mut client = connect(&shared.config, &peer.config)
        .await
        .map_err(|error| chain(&error))?;
    let request = pb::ConflictsRequest {
        hello: Some(shared.hello()),
        filter: serde_json::to_string(filter).map_err(|error| error.to_string())?,
    };
    let response = client
        .conflicts(request)
        .await
        .map_err(|status| describe(&status))?
        .into_inner();
    let lines = response.lines.iter().map(|line| serde_json::from_str(line));
    Ok(Answer {
        lines: lines
            .collect::<Result<_, _>>()
            .map_err(|error| format!("its answer cannot be read: {error}"))?,
        only_counted: response.only_counted,
    })
}

pub(super) async fn own_answer(config: &Config, filter: &Filter) -> Result<Answer, review::Error> {
    let (client, _driver) = pg::connect(&config.postgres, "conflicts").await?;
    cluster::answer(&client, filter).await
}

#[allow(clippy::result_large_err)] // tonic's own error, where tonic wants it
pub(super) fn response(answer: &Answer) -> Result<pb::ConflictsResponse, Status> {
    let lines = answer.lines.iter().map(serde_json::to_string);
    Ok(pb::ConflictsResponse {
        lines: lines
            .collect::<Result<_, _>>()
            .map_err(|error| Status::internal(error.to_string()))?,
        only_counted: answer.only_counted,
    })
}
