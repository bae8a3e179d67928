//! Whether the peers will take this node's certificate: its name, its authority, what it may be used for, when it ends.
//!
//! In:   `[tls]`, the node's name, a time            Out: [`Finding`]s
//! Not here: whether the files can be read and belong together ([`super::machine`]), the links' own checks (`crate::link`)

use std::sync::Arc;
use std::time::Duration;

use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use x509_cert::der::Decode as _;

use crate::config::Tls;
use crate::setup::Finding;

/// Somebody must begin to renew it. Days.
const SOON_DAYS: u64 = 30;
const DAY: u64 = 24 * 60 * 60;

const CHECK: &str = "tls.cert";
const REMEDY: &str = "issue one with the DNS name of this node, for serverAuth and clientAuth (docs/security.md, Certificates)";

/// Nothing where the files cannot be read: that is said elsewhere.
pub(super) fn examine(tls: &Tls, node: &str, now: UnixTime) -> Vec<Finding> {
    let (Some(authorities), Some(chain)) = (certificates(&tls.ca), certificates(&tls.cert)) else {
        return Vec::new();
    };
    let Some((leaf, between)) = chain.split_first() else {
        return Vec::new();
    };
    if let Err(why) = verify(&authorities, leaf, between, node, now) {
        return vec![Finding::fail(
            CHECK,
            format!("every peer would refuse {}: {why}", tls.cert.display()),
            REMEDY,
        )];
    }
    let Some(left) = left(leaf, now) else {
        return Vec::new();
    };
    let days = left.as_secs() / DAY;
    let found = format!("is for {node}, of an authority in tls.ca, and ends in {days} days");
    vec![if days < SOON_DAYS {
        Finding::warn(
            CHECK,
            found,
            "renew it, and start the daemon again (docs/security.md, Certificates)",
        )
    } else {
        Finding::ok(CHECK, found)
    }]
}

fn certificates(path: &std::path::Path) -> Option<Vec<CertificateDer<'static>>> {
    let pem = std::fs::read(path).ok()?;
    rustls_pemfile::certs(&mut pem.as_slice())
        .collect::<Result<Vec<_>, _>>()
        .ok()
}

/// As a peer verifies it that we dial, and one that dials us.
fn verify(
    authorities: &[CertificateDer<'static>],
    leaf: &CertificateDer<'_>,
    between: &[CertificateDer<'_>],
    node: &str,
    now: UnixTime,
) -> Result<(), String> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(authorities.iter().cloned());
    let roots = Arc::new(roots);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let name = ServerName::try_from(node).map_err(|error| format!("`{node}`: {error}"))?;
    let words = |error: rustls::Error| error.to_string();
    let server = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
    let server = server.build().map_err(|error| error.to_string())?;
    server
        .verify_server_cert(leaf, between, &name, &[], now)
        .map_err(words)?;
    let client = WebPkiClientVerifier::builder_with_provider(roots, provider);
    let client = client.build().map_err(|error| error.to_string())?;
    client
        .verify_client_cert(leaf, between, now)
        .map(drop)
        .map_err(words)
}

/// For how long it is still good.
fn left(leaf: &CertificateDer<'_>, now: UnixTime) -> Option<Duration> {
    let certificate = x509_cert::Certificate::from_der(leaf).ok()?;
    let end = certificate.tbs_certificate.validity.not_after.to_unix_duration();
    Some(end.saturating_sub(Duration::from_secs(now.as_secs())))
}

#[cfg(test)]
mod tests {
    use anabranch_tests::certs::{Authority, Certificate};

    use super::*;
    use crate::setup::Level;

    fn tls(certificate: &Certificate, ca: &Certificate) -> Tls {
        Tls {
            ca: ca.ca.clone(),
            cert: certificate.cert.clone(),
            key: certificate.key.clone(),
        }
    }

    fn found(tls: &Tls, node: &str, in_days: u64) -> (Level, String) {
        let now = Duration::from_secs(UnixTime::now().as_secs() + in_days * DAY);
        let mut findings = examine(tls, node, UnixTime::since_unix_epoch(now));
        assert_eq!(findings.len(), 1, "{findings:?}");
        let finding = findings.remove(0);
        (finding.level, finding.found)
    }

    #[test]
    fn a_certificate_that_every_peer_would_refuse_fails_and_one_that_ends_soon_is_warned_of() {
        let folder = tempfile::tempdir().unwrap();
        let (ours, theirs) = (
            Authority::create(&folder.path().join("ours")),
            Authority::create(&folder.path().join("theirs")),
        );
        let (a, other) = (ours.issue("a"), theirs.issue("a"));
        let (level, text) = found(&tls(&a, &a), "a", 0);
        assert_eq!(level, Level::Warn, "{text}");
        assert!(
            text.contains("ends in 1 days") || text.contains("ends in 2 days"),
            "{text}"
        );
        for (tls, node, in_days) in [
            (tls(&a, &a), "b", 0),
            (tls(&a, &other), "a", 0),
            (tls(&a, &a), "a", 3),
        ] {
            let (level, text) = found(&tls, node, in_days);
            assert_eq!(level, Level::Fail, "{text}");
            assert!(text.contains("every peer would refuse"), "{text}");
        }
    }
}
