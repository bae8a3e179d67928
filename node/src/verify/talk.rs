//! The asking side of a conversation with one node.
//!
//! In:   questions of [`super::run`]            Out: the node's answers, checked for their kind
//! Holds: the two ends of the conversation; dropping them ends it
//! Not here: the answering side ([`super::seat`]), how it travels (`crate::link`)

use std::time::Duration;

use anabranch_proto::link as pb;
use anabranch_proto::{NodeId, Vector};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use pb::verify_request::Ask;
use pb::verify_response::Answer;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::Event;
use super::blocks::Blocks;
use super::seat::Seat;
use crate::link::{vector_from_wire, vector_to_wire};

/// The outcome of a mend that was left alone for a write.
pub(super) const MOVED: &str = "moved";
/// A node that says nothing for so long is away. A piece of a scan may wait for a lock, and read a million rows.
const SILENCE_MAX: Duration = Duration::from_secs(300);
/// Whoever asked is told this often of a node that says nothing. (A daemon that stands still is known by then: it has not answered the pings
/// of its connection, `crate::link`.)
const SILENCE_TOLD: Duration = Duration::from_secs(20);

/// A node does not answer as it should.
#[derive(Debug, Clone, thiserror::Error)]
#[error("node {node}: {text}")]
pub(super) struct Error {
    node: String,
    text: String,
    /// The conversation goes on.
    pub(super) passing: bool,
}

/// A conversation with one node.
pub struct Talk {
    /// Its id.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    ask: mpsc::Sender<pb::VerifyRequest>,
    /// Never locked: a lock makes it shareable, which a stream alone is not.
    answers: tokio::sync::Mutex<BoxStream<'static, Result<pb::VerifyResponse, Status>>>,
    /// Where it is told that the node says nothing.
    events: Option<mpsc::Sender<Event>>,
}

/// What a scan shall read.
#[derive(Debug, Clone)]
pub(super) struct Scan {
    pub(super) schema: String,
    pub(super) name: String,
    pub(super) columns: Vec<String>,
    pub(super) bits: u32,
    pub(super) rate: u64,
}

/// What a scan says.
pub(super) enum Scanned {
    /// So many rows are read.
    Progress(u64),
    /// Rows of wanted blocks: canonical key, hash.
    Rows(Vec<(Bytes, i64)>),
    /// It has stopped after so many rows as were asked for: how many are read, and the page to go on from.
    Stopped(u64, u64),
    /// Blocks from this number on.
    Blocks(u32, Blocks),
    /// The end.
    End,
}

impl Talk {
    /// A conversation over these ends.
    #[must_use]
    pub fn new(
        id: NodeId,
        name: String,
        ask: mpsc::Sender<pb::VerifyRequest>,
        answers: BoxStream<'static, Result<pb::VerifyResponse, Status>>,
    ) -> Self {
        Self {
            id,
            name,
            ask,
            answers: tokio::sync::Mutex::new(answers),
            events: None,
        }
    }

    /// Tells there when the node says nothing for long.
    pub(super) fn tell(&mut self, events: mpsc::Sender<Event>) {
        self.events = Some(events);
    }

    /// A conversation with this daemon itself.
    #[must_use]
    pub fn with_self(seat: Seat) -> Self {
        let (ask, questions) = mpsc::channel(1);
        let (out, answers) = mpsc::channel(1);
        let (id, name) = (seat.config.node.id, seat.config.node.name.clone());
        let questions = ReceiverStream::new(questions).map(Ok);
        tokio::spawn(seat.converse(questions, out));
        Self::new(id, name, ask, ReceiverStream::new(answers).boxed())
    }

    pub(super) fn error(&self, text: impl Into<String>) -> Error {
        Error {
            node: self.name.clone(),
            text: text.into(),
            passing: false,
        }
    }

    async fn say(&mut self, ask: Ask) -> Result<(), Error> {
        let request = pb::VerifyRequest {
            hello: None,
            ask: Some(ask),
        };
        let said = self.ask.send(request).await;
        said.map_err(|_| self.error("the conversation has ended"))
    }

    async fn hear(&mut self) -> Result<Answer, Error> {
        self.hear_within(SILENCE_TOLD, SILENCE_MAX).await
    }

    async fn hear_within(&mut self, told: Duration, silence_max: Duration) -> Result<Answer, Error> {
        let began = Instant::now();
        let heard = loop {
            let next = tokio::time::timeout(told, self.answers.get_mut().next()).await;
            match next {
                Ok(heard) => break Some(heard),
                Err(_) => self.tell_silence(began.elapsed()),
            }
            if began.elapsed() >= silence_max {
                break None;
            }
        };
        let text = match heard {
            None => format!("no answer within {} s", silence_max.as_secs()),
            Some(None) => "the conversation has ended".to_owned(),
            // The connection broke, perhaps because its pings were not answered.
            Some(Some(Err(status))) if std::error::Error::source(&status).is_some() => format!(
                "the connection to its daemon broke off: it ended, stands still, or cannot be reached ({})",
                crate::link::describe(&status)
            ),
            Some(Some(Err(status))) => crate::link::describe(&status),
            Some(Some(Ok(pb::VerifyResponse { answer: None }))) => "an empty answer".to_owned(),
            Some(Some(Ok(pb::VerifyResponse {
                answer: Some(Answer::Failed(text)),
            }))) => {
                let passing = true;
                return Err(Error {
                    passing,
                    ..self.error(text)
                });
            }
            Some(Some(Ok(pb::VerifyResponse { answer: Some(answer) }))) => return Ok(answer),
        };
        Err(self.error(text))
    }

    fn tell_silence(&self, silence: Duration) {
        let Some(events) = &self.events else { return };
        let on = format!(
            "node {}: its daemon answers, and has said nothing for {} s; its server may be busy, or wait for a lock",
            self.name,
            silence.as_secs()
        );
        // Where nothing is taken there is nobody to tell now.
        let _ = events.try_send(Event::Waiting { on: vec![on] });
    }

    fn unexpected(&self) -> Error {
        self.error("an answer to another question")
    }

    /// What there is to compare; `also` may not be replicated.
    pub(super) async fn open(&mut self, also: &[(String, String)]) -> Result<pb::VerifyOpened, Error> {
        self.say(Ask::Open(pb::VerifyOpen { also: names(also) })).await?;
        match self.hear().await? {
            Answer::Opened(opened) => Ok(opened),
            _ => Err(self.unexpected()),
        }
    }

    /// Rows of these tables are being brought; `wait` for who wrote them until now.
    pub(super) async fn adding(&mut self, tables: &[(String, String)], wait: bool) -> Result<(), Error> {
        let tables = names(tables);
        self.say(Ask::Adding(pb::VerifyAdding { tables, wait })).await?;
        match self.hear().await? {
            Answer::Done(_) => Ok(()),
            _ => Err(self.unexpected()),
        }
    }

    pub(super) async fn snapshot(&mut self, schema: &str, name: &str) -> Result<(), Error> {
        let of = pb::VerifySnapshot {
            schema: schema.to_owned(),
            name: name.to_owned(),
        };
        self.say(Ask::Snapshot(of)).await?;
        match self.hear().await? {
            Answer::Done(_) => Ok(()),
            _ => Err(self.unexpected()),
        }
    }

    /// Begins a scan; [`Self::scanned`] gives what comes of it, to the end.
    pub(super) async fn scan(&mut self, scan: &Scan, wanted: Bytes) -> Result<(), Error> {
        self.scan_part(scan, wanted, (0, 0)).await
    }

    /// The same from a page on, and no further than there are so many rows; 0: to the end.
    pub(super) async fn scan_part(
        &mut self,
        scan: &Scan,
        wanted: Bytes,
        (first_page, rows_max): (u64, u64),
    ) -> Result<(), Error> {
        self.say(Ask::Scan(pb::VerifyScan {
            schema: scan.schema.clone(),
            name: scan.name.clone(),
            columns: scan.columns.clone(),
            bits: scan.bits,
            rate: scan.rate,
            wanted,
            first_page,
            rows_max,
        }))
        .await
    }

    /// What a scan says next.
    pub(super) async fn scanned(&mut self) -> Result<Scanned, Error> {
        Ok(match self.hear().await? {
            Answer::Progress(progress) if progress.next_page > 0 => {
                Scanned::Stopped(progress.rows, progress.next_page)
            }
            Answer::Progress(progress) => Scanned::Progress(progress.rows),
            Answer::Rows(rows) => {
                Scanned::Rows(rows.rows.into_iter().map(|row| (row.key, row.hash)).collect())
            }
            Answer::Blocks(some) => {
                Scanned::Blocks(some.first, some.counts.into_iter().zip(some.hashes).collect())
            }
            Answer::Done(_) => Scanned::End,
            _ => return Err(self.unexpected()),
        })
    }

    pub(super) async fn watch(
        &mut self,
        schema: &str,
        name: &str,
        keys: Vec<Bytes>,
    ) -> Result<Vector, Error> {
        self.say(Ask::Watch(pb::VerifyWatch {
            schema: schema.to_owned(),
            name: name.to_owned(),
            keys,
        }))
        .await?;
        match self.hear().await? {
            Answer::Watched(watched) => Ok(vector_from_wire(&watched.vector)),
            _ => Err(self.unexpected()),
        }
    }

    /// How far the node is: its own stream, and what it had applied of others.
    ///
    /// # Errors
    /// Why it does not say so, in words.
    pub async fn position(&mut self) -> Result<Vector, String> {
        let words = |error: Error| error.to_string();
        let ask = Ask::Position(pb::VerifyPosition {});
        self.say(ask).await.map_err(words)?;
        match self.hear().await.map_err(words)? {
            Answer::Watched(watched) => Ok(vector_from_wire(&watched.vector)),
            _ => Err(self.unexpected().to_string()),
        }
    }

    pub(super) async fn look(
        &mut self,
        upto: &Vector,
        columns: &[String],
        patience: Duration,
        whole: bool,
    ) -> Result<Vec<pb::VerifyState>, Error> {
        self.say(Ask::Look(pb::VerifyLook {
            upto: vector_to_wire(upto),
            columns: columns.to_vec(),
            patience_ms: u32::try_from(patience.as_millis()).unwrap_or(u32::MAX),
            details: true,
            whole,
        }))
        .await?;
        match self.hear().await? {
            Answer::Looked(looked) => Ok(looked.states),
            _ => Err(self.unexpected()),
        }
    }

    /// What the newest writes made of the watched rows.
    pub(super) async fn newest(
        &mut self,
        upto: &Vector,
        columns: &[String],
    ) -> Result<Vec<pb::VerifyState>, Error> {
        self.say(Ask::Newest(pb::VerifyNewest {
            upto: vector_to_wire(upto),
            columns: columns.to_vec(),
        }))
        .await?;
        match self.hear().await? {
            Answer::Looked(looked) => Ok(looked.states),
            _ => Err(self.unexpected()),
        }
    }

    /// Mends watched rows; why not, for each that was not mended.
    pub(super) async fn mend(
        &mut self,
        rows: Vec<pb::VerifyMendRow>,
    ) -> Result<Vec<pb::VerifyOutcome>, Error> {
        self.say(Ask::Mend(pb::VerifyMend { rows })).await?;
        match self.hear().await? {
            Answer::Mended(mended) => Ok(mended.outcomes),
            _ => Err(self.unexpected()),
        }
    }
}

fn names(tables: &[(String, String)]) -> Vec<pb::VerifyName> {
    let names = tables.iter().cloned();
    names
        .map(|(schema, name)| pb::VerifyName { schema, name })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_node_that_says_nothing_is_told_of_and_given_up() {
        let (ask, _questions) = mpsc::channel(1);
        let silent: BoxStream<'static, Result<pb::VerifyResponse, Status>> =
            futures_util::stream::pending().boxed();
        let mut talk = Talk::new(NodeId(2), "n2".to_owned(), ask, silent);
        let (events, mut told) = mpsc::channel(8);
        talk.tell(events);
        let (each, most) = (Duration::from_millis(20), Duration::from_millis(100));
        let error = talk.hear_within(each, most).await.map(drop).unwrap_err();
        assert!(error.to_string().contains("node n2: no answer within"), "{error}");
        let Some(Event::Waiting { on }) = told.recv().await else {
            panic!("nothing was told")
        };
        assert!(on[0].starts_with("node n2: "), "{on:?}");
    }
}
