//! TLS of the page, and who a browser's certificate is for.
//!
//! In:   connections            Out: encrypted ones, each with the name in the certificate that it showed
//! Holds: the server's certificate, as it was when the daemon started; handshakes under way, a bounded number
//! Invariants: 1. where an authority for reviewers is configured no request is read of a connection without a certificate of it;
//!        2. a handshake that does not end holds up no other
//! Not here: sessions ([`super::session`]); links between daemons (`crate::link`)

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use x509_cert::der::Decode;
use x509_cert::der::oid::ObjectIdentifier;

use crate::config::WebTls;
use crate::connections::Bounded;

/// A handshake may take so long.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// So many at once.
const HANDSHAKES_MAX: usize = 64;
/// Between two tries of a listener that fails.
const AGAIN: Duration = Duration::from_secs(1);

const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("web.tls.{key} {path} cannot be read: {source}")]
    Read {
        key: &'static str,
        path: String,
        source: io::Error,
    },
    #[error("web.tls.{key} {path} holds no {wanted} in PEM form")]
    Empty {
        key: &'static str,
        path: String,
        wanted: &'static str,
    },
    #[error("web.tls cannot be used: {0}")]
    Refused(String),
}

/// The other end of a connection.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    /// The common name in its certificate, which an authority of ours has signed.
    pub(super) name: Option<String>,
    /// Is the connection encrypted?
    pub(super) encrypted: bool,
}

impl Connected<IncomingStream<'_, Bounded<TcpListener>>> for Peer {
    fn connect_info(_: IncomingStream<'_, Bounded<TcpListener>>) -> Self {
        Self {
            name: None,
            encrypted: false,
        }
    }
}

impl Connected<IncomingStream<'_, Bounded<Listener>>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Bounded<Listener>>) -> Self {
        let chain = stream.io().get_ref().get_ref().1.peer_certificates();
        let shown = chain.and_then(<[CertificateDer<'_>]>::first);
        Self {
            name: shown.map(|der| common_name(der).unwrap_or_else(|| "certificate".to_owned())),
            encrypted: true,
        }
    }
}

/// The common name of whom a certificate is for.
fn common_name(der: &[u8]) -> Option<String> {
    let certificate = x509_cert::Certificate::from_der(der).ok()?;
    let mut parts = certificate
        .tbs_certificate
        .subject
        .0
        .iter()
        .flat_map(|part| part.0.iter());
    let name = parts.find(|part| part.oid == COMMON_NAME)?;
    let text = std::str::from_utf8(name.value.value()).ok()?.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Waits for connections, and takes them once they are encrypted.
pub(super) struct Listener {
    ready: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
    address: SocketAddr,
    /// Ends with this.
    _accepting: JoinSet<()>,
}

impl Listener {
    pub(super) fn new(tcp: TcpListener, tls: &WebTls) -> Result<Self, Error> {
        let acceptor = TlsAcceptor::from(Arc::new(settings(tls)?));
        let address = tcp
            .local_addr()
            .map_err(|error| Error::Refused(error.to_string()))?;
        let (sender, ready) = mpsc::channel(1);
        let mut accepting = JoinSet::new();
        accepting.spawn(accept_all(tcp, acceptor, sender));
        Ok(Self {
            ready,
            address,
            _accepting: accepting,
        })
    }
}

impl axum::serve::Listener for Listener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(connection) => connection,
            // The task that accepts never ends before this.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(self.address)
    }
}

async fn accept_all(
    tcp: TcpListener,
    acceptor: TlsAcceptor,
    ready: mpsc::Sender<(TlsStream<TcpStream>, SocketAddr)>,
) {
    let mut handshakes = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = handshakes.join_next() => {}
            connection = tcp.accept(), if handshakes.len() < HANDSHAKES_MAX => match connection {
                Ok((stream, from)) => {
                    let (acceptor, ready) = (acceptor.clone(), ready.clone());
                    handshakes.spawn(async move {
                        match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                            Ok(Ok(stream)) => {
                                let _ = ready.send((stream, from)).await;
                            }
                            Ok(Err(error)) => tracing::info!(%from, %error, "the page refused a connection"),
                            Err(_) => tracing::info!(%from, "a handshake with the page took too long"),
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "the page cannot accept connections");
                    tokio::time::sleep(AGAIN).await;
                }
            },
        }
    }
}

fn settings(tls: &WebTls) -> Result<ServerConfig, Error> {
    let refused = |error: &dyn std::fmt::Display| Error::Refused(error.to_string());
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| refused(&error))?;
    let builder = match &tls.client_ca {
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates("client_ca", path)? {
                roots.add(certificate).map_err(|error| refused(&error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            builder.with_client_cert_verifier(verifier.build().map_err(|error| refused(&error))?)
        }
        None => builder.with_no_client_auth(),
    };
    let chain = certificates("cert", &tls.cert)?;
    let mut settings = builder
        .with_single_cert(chain, private_key(&tls.key)?)
        .map_err(|error| refused(&error))?;
    settings.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(settings)
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::Read {
        key,
        path: path.display().to_string(),
        source,
    })
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let pem = read(key, path)?;
    let found: Vec<_> = rustls_pemfile::certs(&mut pem.as_slice())
        .filter_map(Result::ok)
        .collect();
    if found.is_empty() {
        return Err(Error::Empty {
            key,
            path: path.display().to_string(),
            wanted: "certificate",
        });
    }
    Ok(found)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    let pem = read("key", path)?;
    match rustls_pemfile::private_key(&mut pem.as_slice()) {
        Ok(Some(key)) => Ok(key),
        _ => Err(Error::Empty {
            key: "key",
            path: path.display().to_string(),
            wanted: "private key",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_cannot_be_used_are_named_with_their_key() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty.pem");
        std::fs::write(&empty, b"nothing").unwrap();
        let tls = WebTls {
            cert: empty.clone(),
            key: dir.path().join("gone.key"),
            client_ca: Some(empty),
        };
        let error = settings(&tls).unwrap_err().to_string();
        assert!(
            error.contains("web.tls.client_ca") && error.contains("no certificate"),
            "{error}"
        );
        let error = settings(&WebTls {
            client_ca: None,
            ..tls.clone()
        })
        .unwrap_err()
        .to_string();
        assert!(error.contains("web.tls.cert"), "{error}");
        let error = private_key(&tls.key).unwrap_err().to_string();
        assert!(
            error.contains("web.tls.key") && error.contains("cannot be read"),
            "{error}"
        );
    }

    #[test]
    fn what_is_no_certificate_has_no_name() {
        assert_eq!(common_name(b"garbage"), None);
    }
}
