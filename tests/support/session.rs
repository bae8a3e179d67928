//! One connection to a server: SQL in, text out.

use std::fmt;

use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

/// A connection. Dropping it ends it.
pub struct Session {
    client: Client,
    label: String,
}

/// What the server said no to.
#[derive(Debug)]
pub struct Refused {
    /// SQLSTATE, or empty when the connection itself failed.
    pub code: String,
    message: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Refused {
    /// Did the connection break, or the server with it (58: its disk failed, and under COMMIT that ends it), so that nobody knows whether
    /// the statement took effect?
    pub fn is_disconnect(&self) -> bool {
        let code = &self.code;
        code.is_empty() || ["57P", "08", "58"].iter().any(|class| code.starts_with(class))
    }
}

impl From<tokio_postgres::Error> for Refused {
    fn from(error: tokio_postgres::Error) -> Self {
        match error.as_db_error() {
            Some(db) => Self {
                code: db.code().code().to_owned(),
                message: format!(
                    "{}: {} {}",
                    db.code().code(),
                    db.message(),
                    db.detail().unwrap_or_default()
                ),
            },
            None => Self {
                code: String::new(),
                message: format!("connection: {error:?}"),
            },
        }
    }
}

impl Session {
    /// Connects.
    pub async fn connect(config: &Config, label: &str) -> Result<Self, Refused> {
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(Self {
            client,
            label: label.to_owned(),
        })
    }

    /// Runs statements; the last one's rows, each value as text, NULL as `None`.
    pub async fn try_rows(&self, sql: &str) -> Result<Vec<Vec<Option<String>>>, Refused> {
        let mut rows = Vec::new();
        for message in self.client.simple_query(sql).await? {
            match message {
                SimpleQueryMessage::RowDescription(_) => rows.clear(),
                SimpleQueryMessage::Row(row) => {
                    rows.push((0..row.len()).map(|at| row.get(at).map(str::to_owned)).collect());
                }
                _ => {}
            }
        }
        Ok(rows)
    }

    /// [`Self::try_rows`], panicking on an error.
    pub async fn rows(&self, sql: &str) -> Vec<Vec<Option<String>>> {
        match self.try_rows(sql).await {
            Ok(rows) => rows,
            Err(error) => panic!(
                "{}: {error}\n  in: {}",
                self.label,
                sql.chars().take(600).collect::<String>()
            ),
        }
    }

    /// Runs statements and expects them to succeed.
    pub async fn run(&self, sql: &str) {
        self.rows(sql).await;
    }

    /// Runs statements that may fail.
    pub async fn try_run(&self, sql: &str) -> Result<(), Refused> {
        self.try_rows(sql).await.map(drop)
    }

    /// Runs one statement that may fail, by the extended protocol, as most drivers do.
    pub async fn try_extended(&self, sql: &str) -> Result<(), Refused> {
        Ok(self.client.execute(sql, &[]).await.map(drop)?)
    }

    /// The first column of every row; NULL as `∅`.
    pub async fn column(&self, sql: &str) -> Vec<String> {
        let rows = self.rows(sql).await;
        rows.into_iter()
            .map(|row| row.into_iter().next().flatten().unwrap_or_else(|| "∅".to_owned()))
            .collect()
    }

    /// The only value; `∅` for NULL and for no row.
    pub async fn value(&self, sql: &str) -> String {
        self.column(sql)
            .await
            .into_iter()
            .next()
            .unwrap_or_else(|| "∅".to_owned())
    }

    /// The only value as a number; zero for NULL and for no row.
    pub async fn number(&self, sql: &str) -> i64 {
        let value = self.value(sql).await;
        if value == "∅" {
            0
        } else {
            value
                .parse()
                .unwrap_or_else(|_| panic!("`{value}` is no number; from {sql}"))
        }
    }

    /// Writes text lines into `COPY ... FROM STDIN`.
    pub async fn copy_in(&self, sql: &str, lines: String) {
        use std::pin::pin;
        let sink = self
            .client
            .copy_in(sql)
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        let mut sink = pin!(sink);
        let send = async {
            futures_util::SinkExt::send(&mut sink, bytes::Bytes::from(lines)).await?;
            sink.as_mut().finish().await
        };
        send.await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// Process id of the backend.
    pub async fn backend_pid(&self) -> u32 {
        u32::try_from(self.number("select pg_backend_pid()").await).expect("a pid")
    }
}
