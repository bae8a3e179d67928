//! The conflict logs of all members, over the links.
//!
//! In:   a filter            Out: the logs as one, and of each member that does not answer why
//! Holds: nothing; connections for as long as it is read
//! Not here: what is asked, and joining the answers (`crate::review::cluster`)

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::link as pb;
use anabranch_proto::link::link_client::LinkClient;
use futures_util::future::join_all;
use tokio::time::Instant;
use tonic::Status;
use tonic::transport::Channel;

use super::client::{connect, describe};
use super::peer::Peer;
use super::shared::Shared;
use super::{Links, chain};
use crate::config::Config;
use crate::pg;
use crate::review::cluster::{self, Answer, Answered, Joined, Question, Reading};
use crate::review::{self, Filter};

/// A member that does not answer in this time is away.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// No new round begins after this: a status that no conflict has is looked for in whole logs.
const READING_MAX: Duration = Duration::from_secs(60);

/// Who is asked.
enum Door {
    /// This node.
    Own,
    /// A peer, and the connection once there is one.
    Peer(Arc<Peer>, Option<LinkClient<Channel>>),
}

impl Links {
    /// Asks every member, this one included, and joins their logs.
    pub async fn conflicts(&self, filter: &Filter) -> Joined {
        let shared = &self.shared;
        let mut members = vec![(shared.identity.id.0, shared.identity.name.clone())];
        let mut doors = vec![Door::Own];
        for peer in shared.peers.iter().map(Arc::clone) {
            members.push((peer.config.id.0, peer.config.name.clone()));
            doors.push(Door::Peer(peer, None));
        }
        let mut reading = Reading::new(filter, members);
        let until = Instant::now() + READING_MAX;
        loop {
            let pages = reading.pages();
            if pages.is_empty() || Instant::now() >= until {
                return reading.end();
            }
            reading.paged(ask_all(shared, &mut doors, pages).await);
            let others = reading.others();
            reading.heard(ask_all(shared, &mut doors, others).await);
        }
    }
}

/// Each question to the one that it is for, all at once.
async fn ask_all(shared: &Shared, doors: &mut [Door], questions: Vec<Question>) -> Vec<Answered> {
    let mut of: Vec<Option<Filter>> = doors.iter().map(|_| None).collect();
    for (at, filter) in questions {
        if let Some(slot) = of.get_mut(at) {
            *slot = Some(filter);
        }
    }
    let doors = doors.iter_mut().zip(of).enumerate();
    let asked = doors.filter_map(|(at, (door, filter))| Some((at, door, filter?)));
    join_all(asked.map(async |(at, door, filter)| {
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, ask(shared, door, &filter)).await;
        let late = || Err(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()));
        (at, answer.unwrap_or_else(|_| late()))
    }))
    .await
}

async fn ask(shared: &Shared, door: &mut Door, filter: &Filter) -> Result<Answer, String> {
    match door {
        Door::Own => {
            let own = own_answer(&shared.config, filter).await;
            own.map_err(|error| error.to_string())
        }
        Door::Peer(peer, client) => {
            let client = match client {
                Some(client) => client,
                None => client.insert(
                    connect(&shared.config, &peer.config)
                        .await
                        .map_err(|error| chain(&error))?,
                ),
            };
            ask_peer(shared, client, filter).await
        }
    }
}

async fn ask_peer(
    shared: &Shared,
    client: &mut LinkClient<Channel>,
    filter: &Filter,
) -> Result<Answer, String> {
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
