//! Who may talk in the open, and whose certificate is whose.
//!
//! In:   `[tls]` and `[listen]` of the configuration     Out: tonic's TLS settings, or what to correct
//! Holds: nothing; files are read anew for every connection that we open, so a renewed certificate is taken up
//! Invariants: 1. without TLS nothing leaves or enters by an address that is not loopback, unless `listen.insecure`;
//!             2. a server shows a certificate for the name we dial, a client one for the name that it says.
//! Not here: which names exist (`handshake.rs`).

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use tonic::transport::{Certificate, ClientTlsConfig, Identity as TlsIdentity, ServerTlsConfig};
use x509_cert::der::Decode;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

use super::handshake::{Refusal, RefusalCode};
use super::limits::CONNECT_TIMEOUT;
use crate::config;

/// The configuration of certificates or addresses cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file of `[tls]` cannot be read.
    #[error("cannot read {what} from {}; correct `tls.{what}` or the file's permissions", path.display())]
    Read {
        /// The key in `[tls]`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of `[tls]` holds no PEM section of the right kind.
    #[error("{} holds no {section} in PEM form; correct `tls.{what}`", path.display())]
    Pem {
        /// The key in `[tls]`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What it should hold.
        section: &'static str,
    },
    /// Our own certificate would be refused by every peer.
    #[error(
        "the certificate {} is for {names:?}, not for node `{node}`; issue one with the DNS name `{node}` in its subject \
         alternative names", path.display()
    )]
    OwnName {
        /// The file.
        path: PathBuf,
        /// The DNS names in it.
        names: Vec<String>,
        /// Our node name.
        node: String,
    },
    /// Plaintext listener on a reachable address.
    #[error(
        "refusing to listen in plaintext on {0}, which is not a loopback address; configure `[tls]`, or set \
         `listen.insecure = true` on a network that you trust"
    )]
    InsecureListen(SocketAddr),
    /// Plaintext connection to a reachable address.
    #[error(
        "refusing a plaintext link to {0}, which is not a loopback address; configure `[tls]`, or set \
         `listen.insecure = true` on a network that you trust"
    )]
    InsecurePeer(SocketAddr),
}

/// The three files, read and looked at.
struct Material {
    ca: Certificate,
    identity: TlsIdentity,
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read {
        what,
        path: path.to_owned(),
        source,
    })
}

fn certificates(what: &'static str, path: &Path, pem: &[u8]) -> Result<Vec<Vec<u8>>, TlsError> {
    let found: Vec<Vec<u8>> = rustls_pemfile::certs(&mut &*pem)
        .filter_map(Result::ok)
        .map(|der| der.as_ref().to_vec())
        .collect();
    if found.is_empty() {
        return Err(TlsError::Pem {
            what,
            path: path.to_owned(),
            section: "certificate",
        });
    }
    Ok(found)
}

fn load(tls: &config::Tls, node: &str) -> Result<Material, TlsError> {
    let (ca, cert, key) = (
        read("ca", &tls.ca)?,
        read("cert", &tls.cert)?,
        read("key", &tls.key)?,
    );
    certificates("ca", &tls.ca, &ca)?;
    let chain = certificates("cert", &tls.cert, &cert)?;
    if !matches!(rustls_pemfile::private_key(&mut &*key), Ok(Some(_))) {
        return Err(TlsError::Pem {
            what: "key",
            path: tls.key.clone(),
            section: "private key",
        });
    }
    let names = chain.first().map(|der| dns_names(der)).unwrap_or_default();
    if !names_match(&names, node) {
        return Err(TlsError::OwnName {
            path: tls.cert.clone(),
            names,
            node: node.to_owned(),
        });
    }
    Ok(Material {
        ca: Certificate::from_pem(ca),
        identity: TlsIdentity::from_pem(cert, key),
    })
}

/// TLS settings of our server: it asks every client for a certificate of the authority. None means plaintext.
///
/// # Errors
/// When the files cannot be used, or plaintext is not allowed on the address.
pub(super) fn server(
    tls: Option<&config::Tls>,
    listen: &config::Listen,
    node: &str,
) -> Result<Option<ServerTlsConfig>, TlsError> {
    let Some(tls) = tls else {
        if listen.insecure || listen.address.ip().is_loopback() {
            return Ok(None);
        }
        return Err(TlsError::InsecureListen(listen.address));
    };
    let material = load(tls, node)?;
    let settings = ServerTlsConfig::new()
        .identity(material.identity)
        .client_ca_root(material.ca)
        .timeout(CONNECT_TIMEOUT);
    Ok(Some(settings))
}

/// TLS settings for a connection to `peer`: it must show a certificate for its node name. None means plaintext.
///
/// # Errors
/// When the files cannot be used, or plaintext is not allowed to the address.
pub(super) fn client(
    tls: Option<&config::Tls>,
    insecure: bool,
    node: &str,
    peer: &str,
    address: SocketAddr,
) -> Result<Option<ClientTlsConfig>, TlsError> {
    let Some(tls) = tls else {
        if insecure || address.ip().is_loopback() {
            return Ok(None);
        }
        return Err(TlsError::InsecurePeer(address));
    };
    let material = load(tls, node)?;
    let settings = ClientTlsConfig::new()
        .ca_certificate(material.ca)
        .identity(material.identity)
        .domain_name(peer)
        .timeout(CONNECT_TIMEOUT);
    Ok(Some(settings))
}

/// Checks that a certificate that TLS has verified belongs to the node name said in the hello.
///
/// # Errors
/// When it is for other names.
pub(super) fn check_client_name(certificate: Option<&[u8]>, node: &str) -> Result<(), Refusal> {
    let names = certificate.map(dns_names).unwrap_or_default();
    if names_match(&names, node) {
        return Ok(());
    }
    Err(Refusal::new(
        RefusalCode::CertificateName,
        format!(
            "node `{node}` shows a certificate for {names:?}: issue one with the DNS name `{node}` in its subject \
             alternative names, or correct `node.name`"
        ),
    ))
}

fn names_match(names: &[String], node: &str) -> bool {
    names.iter().any(|name| name.eq_ignore_ascii_case(node))
}

/// DNS names among a certificate's subject alternative names; none when it cannot be read.
fn dns_names(der: &[u8]) -> Vec<String> {
    let Ok(certificate) = x509_cert::Certificate::from_der(der) else {
        return Vec::new();
    };
    let Ok(Some((_, SubjectAltName(names)))) = certificate.tbs_certificate.get::<SubjectAltName>() else {
        return Vec::new();
    };
    names
        .into_iter()
        .filter_map(|name| match name {
            GeneralName::DnsName(name) => Some(name.to_string()),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listen(address: &str, insecure: bool) -> config::Listen {
        config::Listen {
            advertise: None,
            address: address.parse().unwrap(),
            insecure,
        }
    }

    #[test]
    fn plaintext_stays_on_loopback_unless_it_is_asked_for() {
        assert!(matches!(
            server(None, &listen("127.0.0.1:0", false), "a"),
            Ok(None)
        ));
        assert!(matches!(server(None, &listen("[::1]:0", false), "a"), Ok(None)));
        assert!(matches!(server(None, &listen("0.0.0.0:0", true), "a"), Ok(None)));
        let error = server(None, &listen("0.0.0.0:0", false), "a").unwrap_err();
        assert!(error.to_string().contains("listen.insecure = true"), "{error}");
        let far: SocketAddr = "192.0.2.1:1".parse().unwrap();
        assert!(matches!(client(None, true, "a", "b", far), Ok(None)));
        let error = client(None, false, "a", "b", far).unwrap_err();
        assert!(error.to_string().contains("configure `[tls]`"), "{error}");
    }

    #[test]
    fn files_that_cannot_be_used_are_named_with_their_key() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty.pem");
        fs::write(&empty, b"nothing").unwrap();
        let tls = config::Tls {
            ca: empty.clone(),
            cert: empty.clone(),
            key: empty,
        };
        let error = server(Some(&tls), &listen("127.0.0.1:0", false), "a").unwrap_err();
        assert!(error.to_string().contains("correct `tls.ca`"), "{error}");
        let missing = config::Tls {
            key: dir.path().join("gone.pem"),
            ..tls
        };
        let error = server(Some(&missing), &listen("127.0.0.1:0", false), "a").unwrap_err();
        assert!(error.to_string().contains("cannot read key"), "{error}");
    }

    #[test]
    fn a_client_without_the_certificate_of_its_name_is_refused() {
        assert_eq!(check_client_name(None, "b").unwrap_err().code, "certificate_name");
        assert_eq!(
            check_client_name(Some(b"garbage"), "b").unwrap_err().code,
            "certificate_name"
        );
    }
}
