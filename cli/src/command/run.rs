//! `anabranch run`: the daemon in the foreground, as systemd and containers want it.

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

use anabranch_node::config::Config;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::args::{LogFormat, Run};
use crate::failure::Failure;

pub(crate) async fn run(path: &Path, verb: &Run) -> Result<ExitCode, Failure> {
    log(verb.log_format, "info");
    let config = super::load(path)?;
    let mut terminate =
        signal(SignalKind::terminate()).map_err(|error| Failure::io("handle SIGTERM", error))?;
    let mut interrupt =
        signal(SignalKind::interrupt()).map_err(|error| Failure::io("handle SIGINT", error))?;
    let shutdown = async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!(signal = name, "draining");
    };
    tracing::info!(node = config.node.name, id = %config.node.id, version = env!("CARGO_PKG_VERSION"), "starting");
    daemon(config, shutdown).await?;
    tracing::info!("stopped");
    Ok(ExitCode::SUCCESS)
}

/// Log lines on standard error, filtered by `ANABRANCH_LOG` (else `RUST_LOG`, else `level`).
pub(super) fn log(format: LogFormat, level: &str) {
    let (filter, unread) = ["ANABRANCH_LOG", "RUST_LOG"]
        .into_iter()
        .find_map(|name| Some((name, std::env::var_os(name)?)))
        .map_or_else(
            || (EnvFilter::new(level), None),
            |(name, text)| filter(name, &text, level),
        );
    let ansi = std::env::var_os("NO_COLOR").is_none() && std::io::IsTerminal::is_terminal(&std::io::stderr());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // What cannot be written would be told of on standard error, which panics where that takes nothing: the daemon does not end for
        // its log (a disk that is full, a reader that is gone).
        .log_internal_errors(false);
    match format {
        LogFormat::Text => builder.with_ansi(ansi).init(),
        LogFormat::Json => builder.json().init(),
    }
    if let Some(text) = unread {
        tracing::warn!("{text}");
    }
}

/// What the variable `name` says; where that cannot be read `level`, and a warning.
fn filter(name: &str, text: &OsStr, level: &str) -> (EnvFilter, Option<String>) {
    let text = text.to_string_lossy();
    match EnvFilter::try_new(&text) {
        Ok(filter) => (filter, None),
        Err(error) => {
            let warning = format!(
                "{name} is `{text}`, which cannot be read ({error}), so log lines are filtered by `{level}`; write such as `info` or \
                 `anabranch_node::apply=debug`"
            );
            (EnvFilter::new(level), Some(warning))
        }
    }
}

/// Runs the daemon until `shutdown` is done and everything under way is finished.
async fn daemon(config: Config, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), Failure> {
    anabranch_node::small_file::make_folder(&config.node.data_dir)
        .map_err(|error| Failure::io(format!("make {}", config.node.data_dir.display()), error))?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    tokio::spawn(async move {
        shutdown.await;
        stop.send_replace(true);
        // Keeps the channel: a closed one would look like a change.
        std::future::pending::<()>().await;
    });
    Ok(Box::pin(anabranch_node::daemon::run(config, stopped)).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_cannot_be_read_is_warned_of() {
        let of = |text: &str| filter("ANABRANCH_LOG", OsStr::new(text), "info");
        let (read, warning) = of("anabranch_node::apply=debug");
        assert_eq!(
            (read.to_string().as_str(), warning),
            ("anabranch_node::apply=debug", None)
        );
        let (read, warning) = of("anabranch_node=loud");
        assert_eq!(read.to_string(), "info");
        assert!(
            warning
                .unwrap()
                .starts_with("ANABRANCH_LOG is `anabranch_node=loud`")
        );
    }
}
