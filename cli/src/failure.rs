//! Why a command did not do what it was asked.

use std::process::ExitCode;

use anabranch_node::config::{ConfigError, PolicyError};
use anabranch_node::setup;

/// The end of a command that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Policy(#[from] PolicyError),
    #[error(transparent)]
    Setup(#[from] setup::Error),
    #[error("{}", setup::error::chain(.0))]
    Postgres(#[from] anabranch_node::pg::Error),
    #[error(transparent)]
    Admin(#[from] anabranch_node::admin::Error),
    #[error("{}", setup::error::chain(.0.as_ref()))]
    Daemon(Box<anabranch_node::daemon::Error>),
    #[error(transparent)]
    Join(Box<anabranch_node::join::Error>),
    #[error(transparent)]
    Heal(Box<anabranch_node::heal::Error>),
    #[error("cannot {what}: {source}")]
    Io { what: String, source: std::io::Error },
    #[error(transparent)]
    Review(#[from] anabranch_node::review::Error),
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Refused(String),
}

impl From<anabranch_node::daemon::Error> for Failure {
    fn from(error: anabranch_node::daemon::Error) -> Self {
        Self::Daemon(Box::new(error))
    }
}

impl From<anabranch_node::join::Error> for Failure {
    fn from(error: anabranch_node::join::Error) -> Self {
        Self::Join(Box::new(error))
    }
}

impl From<anabranch_node::heal::Error> for Failure {
    fn from(error: anabranch_node::heal::Error) -> Self {
        Self::Heal(Box::new(error))
    }
}

impl Failure {
    pub(crate) fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io {
            what: what.into(),
            source,
        }
    }

    pub(crate) fn query(what: &'static str) -> impl Fn(tokio_postgres::Error) -> Self {
        move |source| Self::Setup(setup::Error::Read { what, source })
    }

    pub(crate) fn code(&self) -> ExitCode {
        use anabranch_node::review::Error::NotAnId;
        let usage = matches!(self, Self::Usage(_) | Self::Review(NotAnId(_)));
        ExitCode::from(if usage { 2 } else { 1 })
    }
}
