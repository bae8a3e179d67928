//! TLS towards the server, with libpq's meaning of `sslmode`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore, SignatureScheme,
};
use sha2::{Digest, Sha256, Sha384, Sha512};
use x509_cert::Certificate;
use x509_cert::der::Decode;

use super::Error;

/// How much of the server's certificate is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verify {
    /// Nothing: TLS only encrypts (`prefer`, and `require` without `sslrootcert`).
    Nothing,
    /// That a known authority signed it (`verify-ca`, and `require` with `sslrootcert`).
    Authority,
    /// The authority and the host's name (`verify-full`).
    AuthorityAndName,
}

/// Files that the connection string names.
#[derive(Debug, Clone, Default)]
pub(super) struct Files {
    /// `sslrootcert`
    pub(super) root: Option<PathBuf>,
    /// `sslcert`
    pub(super) cert: Option<PathBuf>,
    /// `sslkey`
    pub(super) key: Option<PathBuf>,
}

/// A rustls configuration that checks what `verify` says.
pub(super) fn client_config(verify: Verify, files: &Files) -> Result<ClientConfig, Error> {
    let provider = Arc::new(ring::default_provider());
    let verifier = Verifier::new(verify, files.root.as_deref(), Arc::clone(&provider))?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(Error::Tls)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let Some(cert) = &files.cert else {
        return Ok(builder.with_no_client_auth());
    };
    let key = files.key.as_ref().ok_or_else(|| Error::Parameter {
        parameter: "sslcert",
        value: cert.display().to_string(),
        remedy: "name its private key with sslkey=... too",
    })?;
    builder
        .with_client_auth_cert(certificates("sslcert", cert)?, private_key(key)?)
        .map_err(Error::Tls)
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::File {
        what,
        path: path.to_owned(),
        source,
    })
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let pem = read(what, path)?;
    let found = rustls_pemfile::certs(&mut pem.as_slice())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| Error::File {
            what,
            path: path.to_owned(),
            source,
        })?;
    if found.is_empty() {
        return Err(Error::BadFile {
            what,
            path: path.to_owned(),
            problem: "no PEM certificate".to_owned(),
        });
    }
    Ok(found)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    let what = "sslkey";
    let pem = read(what, path)?;
    rustls_pemfile::private_key(&mut pem.as_slice())
        .map_err(|source| Error::File {
            what,
            path: path.to_owned(),
            source,
        })?
        .ok_or_else(|| Error::BadFile {
            what,
            path: path.to_owned(),
            problem: "no unencrypted PEM private key".to_owned(),
        })
}

/// Checks a server's certificate as libpq would.
#[derive(Debug)]
struct Verifier {
    verify: Verify,
    /// `None` exactly when nothing is verified.
    chain: Option<Arc<WebPkiServerVerifier>>,
    roots: Vec<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(verify: Verify, root: Option<&Path>, provider: Arc<CryptoProvider>) -> Result<Self, Error> {
        let mut roots = Vec::new();
        let mut chain = None;
        if verify != Verify::Nothing {
            let path = root.ok_or(Error::Parameter {
                parameter: "sslmode",
                value: "verify-ca or verify-full".to_owned(),
                remedy: "name the authority's PEM file with sslrootcert=...",
            })?;
            roots = certificates("sslrootcert", path)?;
            let mut store = RootCertStore::empty();
            for root in &roots {
                store.add(root.clone()).map_err(Error::Tls)?;
            }
            let built = WebPkiServerVerifier::builder_with_provider(Arc::new(store), Arc::clone(&provider))
                .build()
                .map_err(|error| Error::BadFile {
                    what: "sslrootcert",
                    path: path.to_owned(),
                    problem: error.to_string(),
                })?;
            chain = Some(built);
        }
        Ok(Self {
            verify,
            chain,
            roots,
            provider,
        })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let Some(chain) = &self.chain else {
            return Ok(ServerCertVerified::assertion());
        };
        // A self-signed server certificate that is named as the root itself is trusted, as libpq does;
        // webpki refuses an authority's certificate in a server's role.
        if !self.roots.iter().any(|root| root == end_entity) {
            match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
                Ok(verified) => return Ok(verified),
                // The name is checked after the chain, so the chain is good here.
                Err(TlsError::InvalidCertificate(
                    CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
                )) if self.verify == Verify::Authority => return Ok(ServerCertVerified::assertion()),
                Err(error) => return Err(error),
            }
        }
        if self.verify == Verify::AuthorityAndName {
            verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// The `tls-server-end-point` channel binding of a server's certificate (RFC 5929, section 4.1): its hash by
/// the hash of its signature, SHA-256 in place of MD5 and SHA-1. `None` when the signature has no single hash.
pub(crate) fn server_end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    let parsed = Certificate::from_der(certificate).ok()?;
    match parsed.signature_algorithm.oid.to_string().as_str() {
        // md5, sha1, sha256 with RSA; ECDSA with sha1, sha256.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2" => Some(Sha256::digest(certificate).to_vec()),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => Some(Sha384::digest(certificate).to_vec()),
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => Some(Sha512::digest(certificate).to_vec()),
        _ => None,
    }
}
