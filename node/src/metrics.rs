//! What monitoring systems scrape: the status document as Prometheus reads it, by HTTP. Off unless `[metrics]` is configured.
//!
//! In:   the status document of whichever life of the stages runs            Out: `GET /metrics`
//! Holds: a listener, for as long as the process: it answers, too, while the server is waited for
//! Invariants: 1. numbers, names of nodes and of tables; no row, no key, no error text. 2. it changes nothing.
//! On crash: nothing is kept
//! Not here: what is measured (`crate::status`), the text ([`text`])

mod text;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::config::{Config, Metrics};
use crate::connections::Bounded;
use crate::shared::{Shared, lock, now_us};
use crate::status::Status;

/// The form that Prometheus and those that speak like it read.
const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Between two attempts to take the address.
const TRY_EVERY: Duration = Duration::from_secs(5);
/// The alarm while the address cannot be taken.
const ALARM: &str = "metrics";

/// Makes the status document.
pub type Provider = Arc<dyn Fn() -> Status + Send + Sync>;

/// Who is asked.
#[derive(Default)]
struct Asked {
    /// The stages that run, if they do.
    life: Option<(Provider, Arc<Shared>)>,
    /// Why nothing is served.
    failed: Option<String>,
}

struct Inner {
    config: Config,
    started_us: i64,
    asked: Mutex<Asked>,
}

/// The endpoint of one process.
pub struct Endpoint {
    inner: Arc<Inner>,
    /// Ends with it.
    _server: JoinSet<()>,
}

impl Endpoint {
    /// Begins to serve, where it is configured. An address that cannot be taken is an alarm, and tried again.
    #[must_use]
    pub fn start(config: &Config) -> Self {
        let inner = Arc::new(Inner {
            config: config.clone(),
            started_us: now_us(),
            asked: Mutex::default(),
        });
        let mut server = JoinSet::new();
        if let Some(metrics) = config.metrics.clone() {
            server.spawn(serve(metrics, Arc::clone(&inner)));
        }
        Self {
            inner,
            _server: server,
        }
    }

    /// From now on this is asked, until the guard is dropped.
    #[must_use]
    pub fn ask(&self, provider: Provider, shared: &Arc<Shared>) -> Life {
        let mut asked = lock(&self.inner.asked);
        if let Some(text) = &asked.failed {
            shared.alarms.raise(ALARM, text.clone());
        }
        asked.life = Some((provider, Arc::clone(shared)));
        Life(Arc::clone(&self.inner))
    }
}

/// One life of the stages: once this is dropped nothing of it is held here.
pub struct Life(Arc<Inner>);

impl Drop for Life {
    fn drop(&mut self) {
        lock(&self.0.asked).life = None;
    }
}

impl Inner {
    fn failed(&self, text: String) {
        let mut asked = lock(&self.asked);
        match &asked.life {
            Some((_, shared)) => shared.alarms.raise(ALARM, text.clone()),
            None if asked.failed.is_none() => tracing::error!("{text}"),
            None => {}
        }
        asked.failed = Some(text);
    }

    fn served(&self) {
        let mut asked = lock(&self.asked);
        asked.failed = None;
        if let Some((_, shared)) = &asked.life {
            shared.alarms.clear(ALARM);
        }
    }

    fn page(&self) -> String {
        // Asked under the lock: a life that ends waits for the moment that this takes, and is held by nobody after.
        let status = lock(&self.asked).life.as_ref().map(|(provider, _)| provider());
        text::render(&self.config, self.started_us, status.as_ref())
    }
}

async fn serve(metrics: Metrics, inner: Arc<Inner>) {
    let address = metrics.listen;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                inner.served();
                tracing::info!(%address, "metrics are served");
                let router = Router::new()
                    .route("/metrics", get(page))
                    .with_state(Arc::clone(&inner));
                if let Err(error) = axum::serve(Bounded::new(listener), router).await {
                    inner.failed(format!("metrics.listen {address}: {error}"));
                }
            }
            Err(error) => inner.failed(format!(
                "metrics.listen {address} cannot be used: {error}; choose another address"
            )),
        }
        tokio::time::sleep(TRY_EVERY).await;
    }
}

async fn page(State(inner): State<Arc<Inner>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], inner.page())
}
