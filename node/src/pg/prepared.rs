//! Statements that are prepared when they are wanted first: of what is asked many times a second, parsing and planning is most.

use tokio::sync::OnceCell;
use tokio_postgres::{Client, Error, Statement};

/// One of them. It belongs to the session that it was first asked of.
#[derive(Default)]
pub(crate) struct Prepared(OnceCell<Statement>);

impl Prepared {
    /// The statement, for the session and the text that it is always asked with.
    ///
    /// # Errors
    /// When the server does not prepare it, or is gone: the next call tries again.
    pub(crate) async fn of(&self, client: &Client, sql: &str) -> Result<&Statement, Error> {
        self.0.get_or_try_init(|| client.prepare(sql)).await
    }
}
