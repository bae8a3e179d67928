//! Asking what may be refused within a transaction that goes on.

use tokio_postgres::{Error, GenericClient};

use super::is_transient;

/// Asks within a savepoint of the open transaction: where the server refuses, all that was done in it is undone, and the inner error says why.
///
/// # Errors
/// What ends the transaction: an error that is over with time, and those of the savepoint itself.
pub(crate) async fn attempt<T>(
    client: &(impl GenericClient + Sync),
    asked: impl Future<Output = Result<T, Error>>,
) -> Result<Result<T, Error>, Error> {
    client.batch_execute("SAVEPOINT attempt").await?;
    match asked.await {
        Ok(found) => {
            client.batch_execute("RELEASE SAVEPOINT attempt").await?;
            Ok(Ok(found))
        }
        Err(error) if is_transient(&error) => Err(error),
        Err(error) => {
            let undo = "ROLLBACK TO SAVEPOINT attempt; RELEASE SAVEPOINT attempt";
            client.batch_execute(undo).await?;
            Ok(Err(error))
        }
    }
}
