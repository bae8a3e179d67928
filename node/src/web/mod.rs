//! The page for reviewing conflicts, served by the daemon. Off unless `[web]` is configured.
//!
//! In:   requests of a browser            Out: pages; marks and replays in the database
//! Holds: sessions of reviewers; an SQL session for each request that needs one, a few at once
//! Invariants: 1. nothing is shown before the token was given, or a certificate that `web.tls.client_ca` has signed; 2. nothing is changed but by a form of this page, which
//!        carries its session's secret; 3. every value is escaped by the templates; 4. no request holds up another: what waits in the
//!        database is ended
//! On crash: reviewers log in again
//! Not here: what a review does (`crate::review`)

mod pages;
mod session;
mod tls;

use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_postgres::Client;

use crate::admin::{ConflictsProvider, StatusProvider};
use crate::config::{Config, Web};
use crate::connections::Bounded;
use crate::names::Names;
use crate::pg;
use crate::review;
use crate::shared::Shared;
use session::Sessions;

/// A form is small.
const FORM_BYTES_MAX: usize = 64 << 10;
/// A token that could be guessed is none.
const TOKEN_LEN_MIN: usize = 16;

/// So many SQL sessions at once.
const SQL_MAX: usize = 4;
/// A request waits so long for one of them.
const SQL_WAIT: Duration = Duration::from_secs(20);
/// A statement, such as one that waits for a row that somebody has locked, is ended after this.
const SQL_SETTINGS: &str = "SET statement_timeout = '15s'";

/// Sent with every answer: no script, nothing from elsewhere, no frame, nothing kept.
const HEADERS: [(HeaderName, &str); 5] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "same-origin"),
    (header::CACHE_CONTROL, "no-store"),
    (header::X_FRAME_OPTIONS, "DENY"),
];

/// Everything that a page is made of.
pub struct Page {
    config: Arc<Config>,
    shared: Arc<Shared>,
    status: StatusProvider,
    conflicts: ConflictsProvider,
    sessions: Sessions,
    sql: Arc<Semaphore>,
}

/// An SQL session of one request.
struct Sql {
    client: Client,
    _place: OwnedSemaphorePermit,
}

impl Deref for Sql {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for Sql {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

/// The page cannot be served; the daemon goes on without.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("web.token_file {path} cannot be read: {source}")]
    Token { path: String, source: std::io::Error },
    #[error(
        "web.token_file {0} holds a token of less than {TOKEN_LEN_MIN} characters: `openssl rand -hex 24` makes a good one"
    )]
    Weak(String),
    #[error("web.listen {address} cannot be used: {source}")]
    Listen {
        address: std::net::SocketAddr,
        source: std::io::Error,
    },
    #[error(transparent)]
    Tls(#[from] tls::Error),
}

/// How the page is reached.
enum Open {
    Plainly(Bounded<TcpListener>),
    Encrypted(Bounded<tls::Listener>),
}

impl Page {
    /// A page that is not served yet.
    #[must_use]
    pub fn new(
        config: Arc<Config>,
        shared: Arc<Shared>,
        status: StatusProvider,
        conflicts: ConflictsProvider,
    ) -> Self {
        Self {
            config,
            shared,
            status,
            conflicts,
            sessions: Sessions::default(),
            sql: Arc::new(Semaphore::new(SQL_MAX)),
        }
    }

    /// Serves until the task is ended. What stands in the way becomes an alarm.
    pub async fn serve(self) {
        let Some(web) = self.config.web.clone() else {
            return;
        };
        let shared = Arc::clone(&self.shared);
        match self.listen(&web).await {
            Ok((listener, router)) => {
                shared.alarms.clear("web");
                tracing::info!(address = %web.listen, "the page for reviewing conflicts is served");
                let service = router.into_make_service_with_connect_info::<tls::Peer>();
                let served = match listener {
                    Open::Plainly(listener) => axum::serve(listener, service).await,
                    Open::Encrypted(listener) => axum::serve(listener, service).await,
                };
                if let Err(error) = served {
                    shared.alarms.raise("web", error.to_string());
                }
            }
            Err(error) => {
                tracing::error!(%error, "no page for reviewing conflicts");
                shared.alarms.raise("web", error.to_string());
            }
        }
    }

    async fn listen(mut self, web: &Web) -> Result<(Open, Router), Error> {
        self.sessions = match &web.token_file {
            Some(path) => Sessions::new(&token(path)?),
            None => Sessions::of_certificates(),
        };
        let address = web.listen;
        let listener = TcpListener::bind(address).await;
        let listener = listener.map_err(|source| Error::Listen { address, source })?;
        let open = match &web.tls {
            Some(tls) => Open::Encrypted(Bounded::new(tls::Listener::new(listener, tls)?)),
            None => Open::Plainly(Bounded::new(listener)),
        };
        Ok((open, router(Arc::new(self))))
    }

    /// A session of the daemon's role, for one request.
    async fn sql(&self) -> Result<Sql, review::Error> {
        let place = tokio::time::timeout(SQL_WAIT, Arc::clone(&self.sql).acquire_owned()).await;
        let Ok(Ok(place)) = place else {
            return Err(review::Error::Busy);
        };
        let (client, _driver) = pg::connect(&self.config.postgres, "web").await?;
        client.batch_execute(SQL_SETTINGS).await?;
        Ok(Sql {
            client,
            _place: place,
        })
    }

    /// Also of nodes that are gone: lines of the log name them.
    fn names(&self) -> Names {
        Names::known(&self.config, &self.shared)
    }
}

/// The first line of a file.
fn token(file: &Path) -> Result<String, Error> {
    let path = file.display().to_string();
    let text = std::fs::read_to_string(file);
    let text = text.map_err(|source| Error::Token {
        path: path.clone(),
        source,
    })?;
    let token = text.lines().next().unwrap_or("").trim();
    if token.len() < TOKEN_LEN_MIN {
        return Err(Error::Weak(path));
    }
    Ok(token.to_owned())
}

fn router(page: Arc<Page>) -> Router {
    let inside = Router::new()
        .route("/", get(pages::list))
        .route("/conflict/{id}", get(pages::one))
        .route("/conflict/{id}/{verb}", post(pages::act))
        .route("/nodes", get(pages::nodes))
        .route("/logout", post(pages::logout))
        .route_layer(middleware::from_fn_with_state(
            Arc::clone(&page),
            session::require,
        ));
    Router::new()
        .route("/login", get(pages::login_form).post(pages::login))
        .route("/style.css", get(style))
        .merge(inside)
        .layer(DefaultBodyLimit::max(FORM_BYTES_MAX))
        .layer(middleware::from_fn_with_state(Arc::clone(&page), guarded))
        .with_state(page)
}

/// The headers of every answer.
async fn guarded(State(_): State<Arc<Page>>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    for (name, value) in HEADERS {
        response
            .headers_mut()
            .insert(name, HeaderValue::from_static(value));
    }
    response
}

async fn style() -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "text/css; charset=utf-8")],
        include_str!("../../templates/style.css"),
    )
}
