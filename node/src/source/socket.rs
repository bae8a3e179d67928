//! The byte stream under a replication connection: TCP, TLS over TCP, or a Unix socket.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use rustix::net::sockopt;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UnixStream, lookup_host};
use tokio::time::timeout;
use tokio_postgres::config::{Config, Host, SslMode, SslNegotiation};
use tokio_rustls::TlsConnector;

use super::Error;
use super::paced::Paced;
use crate::pg::{Dsn, server_end_point};

/// `SSLRequest`: length 8, code 80877103.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Anything that carries the protocol.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// A connected stream.
pub(super) struct Socket {
    pub(super) stream: Box<dyn Stream>,
    /// The server certificate's channel binding, when there is TLS and it has one.
    pub(super) end_point: Option<Vec<u8>>,
    /// `host:port`, for messages.
    pub(super) host: String,
}

/// Time for one host, connecting and logging in.
pub(super) fn host_timeout(dsn: &Dsn) -> Duration {
    dsn.config()
        .get_connect_timeout()
        .copied()
        .unwrap_or(DEFAULT_TIMEOUT)
}

/// Connects to the host of the connection string, with TLS as `sslmode` says.
pub(super) async fn dial(dsn: &Dsn) -> Result<Socket, Error> {
    let port = dsn.port(0);
    match dsn.config().get_hosts().first() {
        Some(Host::Unix(folder)) => {
            let path = folder.join(format!(".s.PGSQL.{port}"));
            let host = path.display().to_string();
            match UnixStream::connect(path).await.and_then(Paced::new) {
                Ok(stream) => Ok(Socket {
                    stream: Box::new(stream),
                    end_point: None,
                    host,
                }),
                Err(source) => Err(Error::Reach { host, source }),
            }
        }
        Some(Host::Tcp(name)) => {
            let host = format!("{name}:{port}");
            let address = dsn.config().get_hostaddrs().first().copied();
            match connect_tcp(name, address, port, dsn).await {
                Ok(stream) => secure(stream, name, host, dsn).await,
                Err(source) => Err(Error::Reach { host, source }),
            }
        }
        None => Err(Error::Reach {
            host: dsn.hosts(),
            source: io::ErrorKind::NotFound.into(),
        }),
    }
}

async fn connect_tcp(name: &str, address: Option<IpAddr>, port: u16, dsn: &Dsn) -> io::Result<TcpStream> {
    let addresses = match address {
        Some(address) => vec![(address, port).into()],
        None => lookup_host((name, port)).await?.collect::<Vec<_>>(),
    };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        set_patience(&socket, dsn.config())?;
        match timeout(host_timeout(dsn), socket.connect(address)).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

/// How long a network that lets nothing through is not noticed: as the connection string says, and as it is for all other sessions.
fn set_patience(socket: &TcpSocket, config: &Config) -> io::Result<()> {
    socket.set_keepalive(config.get_keepalives())?;
    if config.get_keepalives() {
        sockopt::set_tcp_keepidle(socket, config.get_keepalives_idle())?;
        if let Some(interval) = config.get_keepalives_interval() {
            sockopt::set_tcp_keepintvl(socket, interval)?;
        }
        if let Some(retries) = config.get_keepalives_retries() {
            sockopt::set_tcp_keepcnt(socket, retries)?;
        }
    }
    if let Some(patience) = config.get_tcp_user_timeout() {
        sockopt::set_tcp_user_timeout(socket, u32::try_from(patience.as_millis()).unwrap_or(u32::MAX))?;
    }
    Ok(())
}

async fn secure(mut stream: TcpStream, name: &str, host: String, dsn: &Dsn) -> Result<Socket, Error> {
    let config = dsn.config();
    let plain = |stream: TcpStream, host| Socket {
        stream: Box::new(stream),
        end_point: None,
        host,
    };
    if config.get_ssl_mode() == SslMode::Disable {
        return Ok(plain(stream, host));
    }
    if config.get_ssl_negotiation() == SslNegotiation::Postgres {
        // Exactly one byte is read: whatever follows must already be TLS (CVE-2021-23222).
        let mut asked = async || {
            stream.write_all(&SSL_REQUEST).await?;
            stream.read_u8().await
        };
        match asked().await {
            Ok(b'S') => {}
            Ok(_) if config.get_ssl_mode() == SslMode::Require => return Err(Error::NoTls { host }),
            Ok(_) => return Ok(plain(stream, host)),
            Err(source) => return Err(Error::Reach { host, source }),
        }
    }
    let tls = match ServerName::try_from(name.to_owned()) {
        Ok(name) => TlsConnector::from(dsn.tls().clone()).connect(name, stream).await,
        Err(error) => Err(io::Error::new(io::ErrorKind::InvalidInput, error)),
    };
    let stream = match tls {
        Ok(stream) => stream,
        Err(source) => return Err(Error::Reach { host, source }),
    };
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let end_point = certificates.first().and_then(|first| server_end_point(first));
    Ok(Socket {
        stream: Box::new(stream),
        end_point,
        host,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_socket_has_the_patience_that_the_connection_string_names() {
        let text = "host=x user=x keepalives_idle=11 keepalives_interval=7 keepalives_retries=3 tcp_user_timeout=9000";
        let socket = TcpSocket::new_v4().unwrap();
        set_patience(&socket, Dsn::new(text, None).unwrap().config()).unwrap();
        assert!(socket.keepalive().unwrap());
        assert_eq!(sockopt::tcp_keepidle(&socket).unwrap().as_secs(), 11);
        assert_eq!(sockopt::tcp_keepintvl(&socket).unwrap().as_secs(), 7);
        assert_eq!(sockopt::tcp_keepcnt(&socket).unwrap(), 3);
        assert_eq!(sockopt::tcp_user_timeout(&socket).unwrap(), 9_000);
        let socket = TcpSocket::new_v4().unwrap();
        set_patience(&socket, &"host=x user=x keepalives=0".parse().unwrap()).unwrap();
        assert!(!socket.keepalive().unwrap());
    }
}
