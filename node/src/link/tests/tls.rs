//! Mutual TLS with certificates made by the `openssl` program.

use std::process::{Command, Stdio};

use super::*;

/// A certificate authority in a folder.
struct Authority {
    dir: TempDir,
}

fn openssl(dir: &Path, args: &[&str]) {
    let done = Command::new("openssl")
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        done.status.success(),
        "openssl {args:?}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
}

impl Authority {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let curve = [
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
        ];
        let args = [
            "-keyout",
            "ca.key",
            "-out",
            "ca.pem",
            "-days",
            "2",
            "-subj",
            "/CN=test authority",
        ];
        openssl(dir.path(), &[&["req", "-x509"][..], &curve, &args].concat());
        Self { dir }
    }

    /// A certificate for `name`, with the configuration that uses it.
    fn issue(&self, name: &str) -> config::Tls {
        let dir = self.dir.path();
        let (key, csr, pem, ext) = (
            format!("{name}.key"),
            format!("{name}.csr"),
            format!("{name}.pem"),
            format!("{name}.ext"),
        );
        std::fs::write(dir.join(&ext), format!("subjectAltName = DNS:{name}\n")).unwrap();
        let curve = [
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
        ];
        let subject = format!("/CN={name}");
        openssl(
            dir,
            &[
                &["req", "-new"][..],
                &curve,
                &["-keyout", &key, "-out", &csr, "-subj", &subject],
            ]
            .concat(),
        );
        let sign = [
            "x509",
            "-req",
            "-in",
            &csr,
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
        ];
        openssl(
            dir,
            &[&sign[..], &["-out", &pem, "-days", "2", "-extfile", &ext]].concat(),
        );
        config::Tls {
            ca: dir.join("ca.pem"),
            cert: dir.join(pem),
            key: dir.join(key),
        }
    }
}

fn with(tls: config::Tls) -> impl FnOnce(&mut Setup) {
    move |setup| setup.config.tls = Some(tls)
}

#[tokio::test(flavor = "multi_thread")]
async fn members_with_certificates_of_the_authority_exchange() {
    let (authority, cluster) = (Authority::new(), Cluster::new(2).await);
    let a = cluster.start(1, with(authority.issue("a"))).await;
    let b = cluster.start(2, with(authority.issue("b"))).await;
    a.write(20).await;
    b.write(20).await;
    a.reaches(2, 200).await;
    b.reaches(1, 200).await;
    // Plaintext gets nothing out of a TLS port.
    let endpoint =
        tonic::transport::Endpoint::from_shared(format!("http://{}", a.links().local_addr())).unwrap();
    let plain = match endpoint.connect().await {
        Ok(channel) => LinkClient::new(channel).greet(hello_of(2)).await.is_ok(),
        Err(_) => false,
    };
    assert!(!plain);
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_another_authority_is_refused() {
    let (authority, stranger, cluster) = (Authority::new(), Authority::new(), Cluster::new(2).await);
    let a = cluster.start(1, with(authority.issue("a"))).await;
    let b = cluster.start(2, with(stranger.issue("b"))).await;
    a.write(1).await;
    eventually("both say so", || {
        a.status(2).last_error.is_some() && b.status(1).last_error.is_some()
    })
    .await;
    let text = b.status(1).last_error.unwrap();
    assert!(text.contains("invalid peer certificate"), "{text}");
    assert!(!a.is_connected(2) && !b.is_connected(1));
    assert_eq!(b.links().held().get(NodeId(1)), Position::ZERO);
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_must_show_a_certificate_for_the_name_that_is_dialled() {
    let (authority, cluster) = (Authority::new(), Cluster::new(3).await);
    let c = cluster.start(3, with(authority.issue("c"))).await;
    cluster.proxy(1, 2).lead_to(c.links().local_addr());
    let a = Node::start(
        1,
        cluster.dir(1),
        &cluster.peers_of(1),
        with(authority.issue("a")),
    )
    .await;
    eventually("a says so", || {
        a.status(2)
            .last_error
            .is_some_and(|text| text.contains("not valid for name"))
    })
    .await;
    eventually("the right one is fine", || a.is_connected(3)).await;
    assert!(!a.is_connected(2));
    a.close().await;
    c.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_must_show_a_certificate_for_the_name_that_it_says() {
    let (authority, dir) = (Authority::new(), tempfile::tempdir().unwrap());
    let nobody = Proxy::start().await.address;
    let a = Node::start(1, dir.path(), &[(2, nobody)], with(authority.issue("a"))).await;
    let connect = async |name: &str| {
        let tls = authority.issue(name);
        let address = a.links().local_addr();
        let settings = super::super::tls::client(Some(&tls), false, name, "a", address)
            .unwrap()
            .unwrap();
        let endpoint = tonic::transport::Endpoint::from_shared(format!("https://{address}")).unwrap();
        LinkClient::new(endpoint.tls_config(settings).unwrap().connect().await.unwrap())
    };
    let mut thief = connect("z").await;
    let first = pb::PullRequest {
        hello: Some(hello_of(2)),
        ..pb::PullRequest::default()
    };
    let mut responses = thief
        .pull(tokio_stream::iter([first]))
        .await
        .unwrap()
        .into_inner();
    let welcome = responses.message().await.unwrap().unwrap().welcome.unwrap();
    assert_eq!(welcome.refusal_code, "certificate_name");
    assert!(
        welcome.refusal.contains("issue one with the DNS name `b`"),
        "{}",
        welcome.refusal
    );
    assert_eq!(
        thief.greet(hello_of(2)).await.unwrap().into_inner().refusal_code,
        "certificate_name"
    );
    let mut owner = connect("b").await;
    assert_eq!(
        owner.greet(hello_of(2)).await.unwrap().into_inner().refusal_code,
        ""
    );
    a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_own_certificate_is_for_another_name_does_not_start() {
    let (authority, dir) = (Authority::new(), tempfile::tempdir().unwrap());
    let Err(error) = Node::try_start(1, dir.path(), &[], with(authority.issue("b"))).await else {
        panic!("it starts")
    };
    assert!(
        error.to_string().contains("issue one with the DNS name `a`"),
        "{error}"
    );
}
