//! Logging in to a walsender: startup message, and whatever proof the server asks for.

use std::path::Path;

use bytes::{Bytes, BytesMut};
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::frontend;
use tokio_postgres::config::ChannelBinding;

use super::Error;
use super::error::ServerError;
use super::walsender::Wire;
use crate::pg::Dsn;
use anabranch_proto::wire::Reader;

/// What the server said of itself while logging in.
#[derive(Debug, Default)]
pub(super) struct Greeting {
    /// `server_version`.
    pub(super) version: String,
}

/// Codes of `Authentication` messages (PostgreSQL docs, "Message Formats").
mod code {
    pub(super) const OK: u32 = 0;
    pub(super) const CLEARTEXT: u32 = 3;
    pub(super) const MD5: u32 = 5;
    pub(super) const SASL: u32 = 10;
    pub(super) const SASL_CONTINUE: u32 = 11;
    pub(super) const SASL_FINAL: u32 = 12;
}

/// Logs in over `wire`, up to the first `ReadyForQuery`.
pub(super) async fn login(
    wire: &mut Wire,
    end_point: Option<Vec<u8>>,
    dsn: &Dsn,
    purpose: &str,
) -> Result<Greeting, Error> {
    let config = dsn.config();
    let user = config.get_user().unwrap_or_default();
    let name = format!("anabranch:{purpose}");
    let parameters = [
        ("user", user),
        ("database", config.get_dbname().unwrap_or(user)),
        ("replication", "database"),
        ("client_encoding", "UTF8"),
        ("application_name", name.as_str()),
        // Whatever is set for the role: a warning may say that nothing is decoded any more.
        ("client_min_messages", "warning"),
        ("options", config.get_options().unwrap_or_default()),
    ];
    wire.send(|out| frontend::startup_message(parameters, out))
        .await?;
    authenticate(wire, end_point, dsn, user).await?;
    let mut greeting = Greeting::default();
    loop {
        let (tag, body) = wire.message().await?;
        match tag {
            b'S' => {
                let mut fields = body.split(|&byte| byte == 0);
                if fields.next() == Some(b"server_version") {
                    let value = fields.next().unwrap_or_default();
                    greeting.version = String::from_utf8_lossy(value).into_owned();
                }
            }
            b'K' | b'N' | b'v' => {}
            b'Z' => return Ok(greeting),
            b'E' => return Err(refusal(&body, user)),
            tag => {
                return Err(Error::Unexpected {
                    what: format!("message {:?} after login", char::from(tag)),
                });
            }
        }
    }
}

/// A startup error, as an error that says what to do.
fn refusal(body: &[u8], user: &str) -> Error {
    let source = ServerError::parse(body);
    let user = user.to_owned();
    match source.code.as_str() {
        // invalid_authorization_specification, invalid_password
        "28000" | "28P01" => Error::Login { user, source },
        "42501" => Error::NotReplicationRole { user, source },
        _ => Error::Server {
            during: "the login",
            source,
        },
    }
}

/// The next `Authentication` message: its code and the rest.
async fn request(wire: &mut Wire, user: &str) -> Result<(u32, Bytes), Error> {
    loop {
        let (tag, body) = wire.message().await?;
        match tag {
            b'R' => {
                let code = Reader::new(&body).u32()?;
                return Ok((code, body.slice(4..)));
            }
            b'E' => return Err(refusal(&body, user)),
            b'N' | b'v' => {}
            tag => {
                return Err(Error::Unexpected {
                    what: format!("message {:?} during login", char::from(tag)),
                });
            }
        }
    }
}

async fn authenticate(
    wire: &mut Wire,
    end_point: Option<Vec<u8>>,
    dsn: &Dsn,
    user: &str,
) -> Result<(), Error> {
    let config = dsn.config();
    let password = || {
        config.get_password().ok_or_else(|| Error::NoPassword {
            user: user.to_owned(),
            unread: dsn.unread().map(Path::to_path_buf),
        })
    };
    let (code, body) = request(wire, user).await?;
    let needs_binding = config.get_channel_binding() == ChannelBinding::Require;
    if code != code::SASL && needs_binding {
        return Err(no_binding());
    }
    match code {
        code::OK => return Ok(()),
        code::CLEARTEXT => {
            let password = password()?;
            wire.send(|out| frontend::password_message(password, out)).await?;
        }
        code::MD5 => {
            let salt = Reader::new(&body).u32()?.to_be_bytes();
            let hash = md5_hash(user.as_bytes(), password()?, salt);
            wire.send(|out| frontend::password_message(hash.as_bytes(), out))
                .await?;
        }
        code::SASL => scram(wire, &body, end_point, dsn, password()?, user).await?,
        other => {
            return Err(Error::Authentication {
                problem: format!(
                    "the server asks for authentication method {other}; use scram-sha-256 in pg_hba.conf"
                ),
            });
        }
    }
    match request(wire, user).await? {
        (code::OK, _) => Ok(()),
        (other, _) => Err(Error::Unexpected {
            what: format!("authentication request {other}"),
        }),
    }
}

fn no_binding() -> Error {
    Error::Authentication {
        problem:
            "channel_binding=require needs TLS, scram-sha-256 and a certificate with a usable signature hash"
                .to_owned(),
    }
}

/// SCRAM-SHA-256, bound to the TLS channel where both sides can (RFC 5802, RFC 7677, RFC 5929).
async fn scram(
    wire: &mut Wire,
    mechanisms: &[u8],
    end_point: Option<Vec<u8>>,
    dsn: &Dsn,
    password: &[u8],
    user: &str,
) -> Result<(), Error> {
    let wanted = dsn.config().get_channel_binding();
    let offers = |name: &str| {
        mechanisms
            .split(|&byte| byte == 0)
            .any(|offered| offered == name.as_bytes())
    };
    let end_point = end_point.filter(|_| wanted != ChannelBinding::Disable);
    let (binding, mechanism) = match end_point {
        Some(hash) if offers(sasl::SCRAM_SHA_256_PLUS) => (
            sasl::ChannelBinding::tls_server_end_point(hash),
            sasl::SCRAM_SHA_256_PLUS,
        ),
        _ if wanted == ChannelBinding::Require => return Err(no_binding()),
        // Says "could, but you did not offer it": the server notices a downgrade.
        Some(_) => (sasl::ChannelBinding::unrequested(), sasl::SCRAM_SHA_256),
        None => (sasl::ChannelBinding::unsupported(), sasl::SCRAM_SHA_256),
    };
    if !offers(mechanism) {
        return Err(Error::Authentication {
            problem: format!("the server does not offer {mechanism}"),
        });
    }
    let broken = |error: std::io::Error| Error::Authentication {
        problem: error.to_string(),
    };
    let mut scram = sasl::ScramSha256::new(password, binding);
    wire.send(|out| frontend::sasl_initial_response(mechanism, scram.message(), out))
        .await?;
    scram
        .update(&expect(wire, code::SASL_CONTINUE, user).await?)
        .map_err(broken)?;
    wire.send(|out: &mut BytesMut| frontend::sasl_response(scram.message(), out))
        .await?;
    scram
        .finish(&expect(wire, code::SASL_FINAL, user).await?)
        .map_err(broken)
}

async fn expect(wire: &mut Wire, wanted: u32, user: &str) -> Result<Bytes, Error> {
    match request(wire, user).await? {
        (code, body) if code == wanted => Ok(body),
        (code, _) => Err(Error::Unexpected {
            what: format!("authentication request {code}"),
        }),
    }
}
