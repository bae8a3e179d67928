//! The daemon's admin socket: what `anabranch status` and waiting clients talk to.
//!
//! In:   a function that makes the status document, one that waits for a position            Out: gRPC on a Unix socket
//! Holds: the socket file, mode 0600: who may read the daemon's folder may ask
//! Invariants: the socket is never reachable with wider rights, also not while it is made.
//! On crash: the file stays behind; the next start replaces it
//! Not here: the document itself (`status`)

use std::fs::Permissions;
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::admin::admin_client::AdminClient;
use anabranch_proto::admin::admin_server::{Admin, AdminServer};
use anabranch_proto::admin::{
    ConflictsRequest, ConflictsResponse, StatusRequest, StatusResponse, VerifyEvent, VerifyRequest,
    WaitForRequest, WaitForResponse,
};
use anabranch_proto::{NodeId, Position};
use futures_util::StreamExt;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response};

use crate::review::Filter;
use crate::review::cluster::Joined;
use crate::verify::{Event, Options};

/// Name of the socket in the daemon's folder.
pub const SOCKET: &str = "admin.sock";

/// A Unix socket's path must fit its address structure (`unix(7)`), bytes.
const PATH_LEN_MAX: usize = 107;
/// And so must that of the folder that it is in.
pub const DATA_DIR_LEN_MAX: usize = PATH_LEN_MAX - SOCKET.len() - 1;
/// A daemon that has not answered in this time does not: what it says of itself is in its memory.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// The same where it asks all nodes for their logs, for a minute at most.
const LOGS_MAX: Duration = Duration::from_secs(120);
/// A daemon that compares, and has told nothing for so long, is asked whether it is there. Longer than a healthy one is silent over a node
/// that does not answer it (`crate::verify`).
const QUIET: Duration = Duration::from_secs(25);
/// Longest wait that one request may ask for.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// Makes the status document.
pub type StatusProvider = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;
/// What was waited for, and whether it is here; or why it cannot be told.
pub type Waited = Result<(bool, Position), String>;

/// Waits until a position of a node, or without one what it has committed by now, is applied and visible here, at most so long.
pub type WaitForProvider = Arc<
    dyn Fn(NodeId, Option<Position>, Duration) -> Pin<Box<dyn Future<Output = Waited> + Send>> + Send + Sync,
>;

/// Asks all nodes for their conflict logs.
pub type ConflictsProvider =
    Arc<dyn Fn(Filter) -> Pin<Box<dyn Future<Output = Joined> + Send>> + Send + Sync>;

/// Compares the rows of all nodes; ends early when nobody takes the events.
pub type VerifyProvider =
    Arc<dyn Fn(Options, mpsc::Sender<Event>) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// Longest document about conflicts, bytes.
const CONFLICTS_BYTES_MAX: usize = 64 << 20;

/// Why the socket cannot be served or asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The path is too long for a socket.
    #[error("{} is too long for a socket ({PATH_LEN_MAX} bytes at most); choose a shorter node.data_dir", .0.display())]
    Path(PathBuf),
    /// The file cannot be made.
    #[error("cannot make the admin socket {}: {source}", path.display())]
    Bind {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The server or the connection failed.
    #[error("admin socket {}: {}", path.display(), crate::setup::error::chain(source))]
    Transport {
        /// Which.
        path: PathBuf,
        /// Why.
        source: tonic::transport::Error,
    },
    /// Somebody has the socket and says nothing.
    #[error(
        "the daemon at {} does not answer: it stands still (stopped, frozen), or waits for its disk",
        path.display()
    )]
    Silent {
        /// Which.
        path: PathBuf,
    },
    /// The daemon answered with an error.
    #[error("the daemon answered: {}", .0.message())]
    Answer(#[from] Box<tonic::Status>),
}

/// Serves until `shutdown` is done.
///
/// # Errors
/// When the socket cannot be made, or the server fails.
pub async fn serve(
    path: &Path,
    status: StatusProvider,
    wait_for: WaitForProvider,
    conflicts: ConflictsProvider,
    verify: VerifyProvider,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
    let listener = bind(path)?;
    let served = Server::builder()
        .add_service(
            AdminServer::new(Service {
                status,
                wait_for,
                conflicts,
                verify,
            })
            .max_encoding_message_size(CONFLICTS_BYTES_MAX),
        )
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown)
        .await;
    // Whoever asks next learns at once that nobody is there.
    let _ = std::fs::remove_file(path);
    served.map_err(|source| Error::Transport {
        path: path.to_owned(),
        source,
    })
}

fn fits(path: &Path) -> bool {
    path.as_os_str().len() <= PATH_LEN_MAX
}

/// Can the socket of such a folder be connected to?
#[must_use]
pub fn fits_in(data_dir: &Path) -> bool {
    fits(&data_dir.join(SOCKET))
}

/// Made under another name, so that nobody sees it before its mode is set, nor a moment without it.
fn bind(path: &Path) -> Result<UnixListener, Error> {
    let unfinished = path.with_extension("new");
    if !fits(path) || !fits(&unfinished) {
        return Err(Error::Path(path.to_owned()));
    }
    let failed = |source| Error::Bind {
        path: path.to_owned(),
        source,
    };
    match std::fs::remove_file(&unfinished) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&unfinished).map_err(failed)?;
    std::fs::set_permissions(&unfinished, Permissions::from_mode(0o600)).map_err(failed)?;
    std::fs::rename(&unfinished, path).map_err(failed)?;
    Ok(listener)
}

struct Service {
    status: StatusProvider,
    wait_for: WaitForProvider,
    conflicts: ConflictsProvider,
    verify: VerifyProvider,
}

#[async_trait::async_trait]
impl Admin for Service {
    async fn status(
        &self,
        _request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, tonic::Status> {
        Ok(Response::new(StatusResponse {
            json: (self.status)().to_string(),
        }))
    }

    async fn wait_for(
        &self,
        request: Request<WaitForRequest>,
    ) -> Result<Response<WaitForResponse>, tonic::Status> {
        let request = request.into_inner();
        let node = u16::try_from(request.node_id)
            .ok()
            .filter(|id| *id > 0)
            .ok_or_else(|| {
                tonic::Status::invalid_argument(format!("{} is not a node id", request.node_id))
            })?;
        let timeout = Duration::from_millis(request.timeout_ms).min(WAIT_MAX);
        let position = (request.lsn > 0).then(|| Position::new(request.epoch, request.lsn));
        let (reached, position) = (self.wait_for)(NodeId(node), position, timeout)
            .await
            .map_err(tonic::Status::unavailable)?;
        Ok(Response::new(WaitForResponse {
            reached,
            epoch: position.epoch,
            lsn: position.lsn.0,
        }))
    }

    async fn conflicts(
        &self,
        request: Request<ConflictsRequest>,
    ) -> Result<Response<ConflictsResponse>, tonic::Status> {
        let filter = serde_json::from_str(&request.into_inner().filter).map_err(|error| {
            tonic::Status::invalid_argument(format!("the filter cannot be read: {error}"))
        })?;
        let joined = (self.conflicts)(filter).await;
        let json =
            serde_json::to_string(&joined).map_err(|error| tonic::Status::internal(error.to_string()))?;
        Ok(Response::new(ConflictsResponse { json }))
    }

    type VerifyStream = Pin<Box<dyn futures_util::Stream<Item = Result<VerifyEvent, tonic::Status>> + Send>>;

    async fn verify(
        &self,
        request: Request<VerifyRequest>,
    ) -> Result<Response<Self::VerifyStream>, tonic::Status> {
        let options = serde_json::from_str(&request.into_inner().options).map_err(|error| {
            tonic::Status::invalid_argument(format!("the options cannot be read: {error}"))
        })?;
        let (events, received) = mpsc::channel(16);
        let verifying = (self.verify)(options, events.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = verifying => {}
                // Interrupted: nobody waits for the report.
                () = events.closed() => {}
            }
        });
        let events = ReceiverStream::new(received).map(|event| {
            let json = serde_json::to_string(&event);
            let json = json.map_err(|error| tonic::Status::internal(error.to_string()))?;
            Ok(VerifyEvent { json })
        });
        Ok(Response::new(Box::pin(events)))
    }
}

/// A connection to the daemon whose socket is `path`.
///
/// # Errors
/// When nobody answers there.
pub async fn connect(path: &Path) -> Result<AdminClient<Channel>, Error> {
    let failed = |source| Error::Transport {
        path: path.to_owned(),
        source,
    };
    let endpoint = Endpoint::from_shared(format!("unix://{}", path.display())).map_err(failed)?;
    let channel = endpoint
        .connect_timeout(Duration::from_secs(5))
        .connect()
        .await
        .map_err(failed)?;
    Ok(AdminClient::new(channel))
}

/// The status document of the daemon whose socket is `path`.
///
/// # Errors
/// When nobody answers there.
pub async fn status(path: &Path) -> Result<String, Error> {
    status_within(path, ANSWER_MAX).await
}

async fn status_within(path: &Path, patience: Duration) -> Result<String, Error> {
    let asked = Box::pin(async {
        let mut client = connect(path).await?;
        let answer = client.status(StatusRequest {}).await.map_err(Box::new)?;
        Ok::<_, Error>(answer.into_inner().json)
    });
    within(path, patience, asked).await
}

/// Does a daemon have this socket? One that is frozen has it, too.
pub async fn is_running(path: &Path) -> bool {
    matches!(status(path).await, Ok(_) | Err(Error::Silent { .. }))
}

/// What is asked of the daemon whose socket is `path`, unless that takes too long. (Boxed by who asks: a connection and a request are large.)
async fn within<T>(
    path: &Path,
    patience: Duration,
    asked: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let answered = tokio::time::timeout(patience, asked).await;
    answered.map_err(|_| Error::Silent {
        path: path.to_owned(),
    })?
}

/// Has the daemon whose socket is `path` wait until `position` of `node` (without one: what it has committed by now) is visible
/// here, at most `timeout`. Whether it is here, and what was waited for.
///
/// # Errors
/// When nobody answers there, or the node does not say how far it is.
pub async fn wait_for(
    path: &Path,
    node: NodeId,
    position: Option<Position>,
    timeout: Duration,
) -> Result<(bool, Position), Error> {
    let position = position.unwrap_or(Position::ZERO);
    let request = WaitForRequest {
        node_id: u32::from(node.0),
        epoch: position.epoch,
        lsn: position.lsn.0,
        timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
    };
    let asked = Box::pin(async {
        let mut client = connect(path).await?;
        let answer = client.wait_for(request).await.map_err(Box::new)?.into_inner();
        Ok::<_, Error>((answer.reached, Position::new(answer.epoch, answer.lsn)))
    });
    within(path, timeout.saturating_add(ANSWER_MAX), asked).await
}

/// The conflict logs of all nodes, as the daemon whose socket is `path` gathers them.
///
/// # Errors
/// When nobody answers there.
pub async fn conflicts(path: &Path, filter: &Filter) -> Result<Joined, Error> {
    let unreadable = |error: serde_json::Error| Box::new(tonic::Status::internal(error.to_string()));
    let filter = serde_json::to_string(filter).map_err(unreadable)?;
    let asked = Box::pin(async {
        let mut client = connect(path)
            .await?
            .max_decoding_message_size(CONFLICTS_BYTES_MAX);
        let answer = client
            .conflicts(ConflictsRequest { filter })
            .await
            .map_err(Box::new)?;
        Ok::<Joined, Error>(serde_json::from_str(&answer.into_inner().json).map_err(unreadable)?)
    });
    within(path, LOGS_MAX, asked).await
}

/// Has the daemon whose socket is `path` compare the rows of all nodes; `each` is told what happens. The last event is the
/// report; without one the daemon went away. However long it works, it is waited for; one that stands still is not.
///
/// # Errors
/// When nobody answers there.
pub async fn verify(path: &Path, options: &Options, each: impl FnMut(Event)) -> Result<(), Error> {
    verify_within(path, options, (QUIET, ANSWER_MAX), each).await
}

async fn verify_within(
    path: &Path,
    options: &Options,
    patience: (Duration, Duration),
    mut each: impl FnMut(Event),
) -> Result<(), Error> {
    let unreadable = |error: serde_json::Error| Box::new(tonic::Status::internal(error.to_string()));
    let options = serde_json::to_string(options).map_err(unreadable)?;
    let mut client = within(path, patience.1, Box::pin(connect(path)))
        .await?
        .max_decoding_message_size(CONFLICTS_BYTES_MAX);
    let begun = Box::pin(client.verify(VerifyRequest { options }));
    let begun = heard(path, patience, &mut each, begun).await?;
    let mut events = begun.map_err(Box::new)?.into_inner();
    loop {
        let next = Box::pin(events.message());
        let next = heard(path, patience, &mut each, next).await?;
        let Some(event) = next.map_err(Box::new)? else {
            return Ok(());
        };
        each(serde_json::from_str(&event.json).map_err(unreadable)?);
    }
}

/// What the daemon whose socket is `path` says next. Where that is nothing for `quiet` it is asked for its status, which one that works
/// answers from its memory, and one that stands still does not: it is told of, and is waited for no longer once `patience` is over.
async fn heard<T>(
    path: &Path,
    (quiet, patience): (Duration, Duration),
    each: &mut impl FnMut(Event),
    mut next: impl Future<Output = T> + Unpin,
) -> Result<T, Error> {
    loop {
        if let Ok(said) = tokio::time::timeout(quiet, &mut next).await {
            return Ok(said);
        }
        let asked = async {
            let mut asked = Box::pin(status_within(path, patience));
            // One that works has answered by then.
            match tokio::time::timeout(patience / 10, &mut asked).await {
                Ok(answered) => answered,
                Err(_) => {
                    let on = format!("the daemon at {}, which does not answer", path.display());
                    each(Event::Waiting { on: vec![on] });
                    asked.await
                }
            }
        };
        tokio::select! {
            biased;
            said = &mut next => return Ok(said),
            // Any other error: it ends, or begins anew, and so does the conversation.
            answered = asked => if let Err(silent @ Error::Silent { .. }) = answered {
                return Err(silent);
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_daemon_that_is_frozen_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SOCKET);
        // Connections are taken, as those of a process that is stopped are by the kernel, and nobody speaks.
        let _frozen = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let asked = status_within(&path, Duration::from_millis(200)).await;
        assert!(matches!(asked, Err(Error::Silent { .. })), "{asked:?}");
    }

    #[tokio::test]
    async fn a_daemon_that_is_frozen_is_not_waited_for_where_rows_are_compared() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SOCKET);
        let _frozen = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let mut said = Vec::new();
        // Long enough that a machine that stands still for a moment does not have all of it pass at once.
        let patience = (Duration::from_millis(20), Duration::from_secs(1));
        let asked = verify_within(&path, &Options::default(), patience, |event| said.push(event)).await;
        assert!(matches!(asked, Err(Error::Silent { .. })), "{asked:?}");
        // And for whom it was waited.
        let [Event::Waiting { on }] = said.as_slice() else {
            panic!("{said:?}")
        };
        assert!(on[0].contains("which does not answer"), "{on:?}");
    }

    #[tokio::test]
    async fn a_daemon_that_works_for_long_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SOCKET);
        let served = {
            let path = path.clone();
            tokio::spawn(async move {
                let status: StatusProvider = Arc::new(|| serde_json::json!({}));
                let wait: WaitForProvider =
                    Arc::new(|_, position, _| Box::pin(async move { Ok((true, position.unwrap())) }));
                let conflicts: ConflictsProvider = Arc::new(|_| Box::pin(async { Joined::default() }));
                let verify: VerifyProvider = Arc::new(|_, events| {
                    Box::pin(async move {
                        // Many times as long as it may be silent before it is asked.
                        tokio::time::sleep(Duration::from_millis(500)).await;
                        let on = vec!["node n2".to_owned()];
                        events.send(Event::Waiting { on }).await.unwrap();
                    })
                });
                serve(&path, status, wait, conflicts, verify, std::future::pending()).await
            })
        };
        while status(&path).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut said = Vec::new();
        let patience = (Duration::from_millis(20), Duration::from_secs(60));
        verify_within(&path, &Options::default(), patience, |event| said.push(event))
            .await
            .unwrap();
        let told = |event: &Event| matches!(event, Event::Waiting { on } if on[0] == "node n2");
        assert!(said.iter().any(told), "{said:?}");
        served.abort();
    }

    #[tokio::test]
    async fn the_socket_answers_is_private_and_goes_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SOCKET);
        std::fs::write(&path, "left by a crash").unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let served = {
            let path = path.clone();
            tokio::spawn(async move {
                let status: StatusProvider = Arc::new(|| serde_json::json!({"node": {"name": "a"}}));
                let wait: WaitForProvider = Arc::new(|node, position, _| {
                    Box::pin(async move {
                        let position = position.ok_or("nobody answers".to_owned())?;
                        Ok((node.0 == 2 && position.lsn.0 == 7, position))
                    })
                });
                let conflicts: ConflictsProvider = Arc::new(|_| Box::pin(async { Joined::default() }));
                let verify: VerifyProvider = Arc::new(|_, _| Box::pin(async {}));
                serve(&path, status, wait, conflicts, verify, async {
                    let _ = stopped.await;
                })
                .await
            })
        };
        let mut client = loop {
            match connect(&path).await {
                Ok(client) => break client,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(status(&path).await.unwrap(), r#"{"node":{"name":"a"}}"#);
        let ask = |node_id, lsn| WaitForRequest {
            node_id,
            epoch: 1,
            lsn,
            timeout_ms: 10,
        };
        assert!(client.wait_for(ask(2, 7)).await.unwrap().into_inner().reached);
        assert!(!client.wait_for(ask(2, 8)).await.unwrap().into_inner().reached);
        assert!(client.wait_for(ask(0, 8)).await.is_err());
        assert_eq!(
            client.wait_for(ask(2, 0)).await.unwrap_err().message(),
            "nobody answers"
        );
        drop(client);
        stop.send(()).unwrap();
        served.await.unwrap().unwrap();
        assert!(!path.exists());
        assert!(status(&path).await.is_err());
    }

    #[tokio::test]
    async fn a_path_too_long_for_a_socket_is_said_to_be() {
        let path = PathBuf::from(format!("/tmp/{}/admin.sock", "x".repeat(120)));
        let error = bind(&path).unwrap_err().to_string();
        assert!(error.contains("shorter node.data_dir"), "{error}");
    }

    #[tokio::test]
    async fn a_socket_that_is_made_can_be_connected_to() {
        let parent = tempfile::tempdir().unwrap();
        for (len, is_made) in [(DATA_DIR_LEN_MAX, true), (DATA_DIR_LEN_MAX + 1, false)] {
            let name = "x".repeat(len - parent.path().as_os_str().len() - 1);
            let folder = parent.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            let path = folder.join(SOCKET);
            let listener = bind(&path);
            assert_eq!((listener.is_ok(), fits_in(&folder)), (is_made, is_made));
            assert_eq!(tokio::net::UnixStream::connect(&path).await.is_ok(), is_made);
        }
    }
}
