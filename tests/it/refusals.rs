//! What must be refused, and that the refusal says what to do.

use std::time::Duration;

use anabranch_proto::link::link_client::LinkClient;
use anabranch_proto::link::{Hello, PullRequest};
use anabranch_tests::certs::Authority;
use anabranch_tests::cluster::{grant, initialise};
use anabranch_tests::daemon::{Daemon, anabranch, anabranch_ok, anabranch_refuses};
use anabranch_tests::wait::{PATIENCE, until, until_ok};
use anabranch_tests::{Cluster, cluster};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::transport::{Channel, Endpoint};

const ITEMS: &str = "create table item (id int primary key, v text)";

/// Asserts that a text names all of these, whatever their case.
fn names(text: &str, words: &[&str]) {
    let lower = text.to_lowercase();
    for word in words {
        assert!(
            lower.contains(&word.to_lowercase()),
            "`{word}` is not named in:\n{text}"
        );
    }
}

/// Waits until a daemon, whether it goes on or ends, has said all of these.
async fn says(daemon: &Daemon, words: &[&str]) {
    until_ok(&format!("the daemon says {words:?}"), PATIENCE, async || {
        let log = daemon.log();
        let lower = log.to_lowercase();
        if words.iter().all(|word| lower.contains(&word.to_lowercase())) {
            Ok(())
        } else {
            Err(anabranch_tests::postgres::tail(&log, 15))
        }
    })
    .await;
}

#[tokio::test]
async fn a_second_daemon_on_one_server_is_refused() {
    let mut cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    let second_config = cluster.dir().join("second.toml");
    let second_dir = cluster.dir().join("second");
    std::fs::create_dir(&second_dir).expect("create the second's folder");
    let node = &cluster.nodes[0];
    let text = std::fs::read_to_string(node.daemon.config()).expect("read the configuration");
    let text = text
        .replace(
            node.data_dir.to_str().expect("UTF-8"),
            second_dir.to_str().expect("UTF-8"),
        )
        .replace(
            &format!("127.0.0.1:{}", node.port),
            &format!("127.0.0.1:{}", anabranch_tests::postgres::free_port()),
        );
    std::fs::write(&second_config, text).expect("write the second's configuration");
    let mut second = Daemon::new(&second_config);
    second.start();
    let status = second.wait_exit(PATIENCE).expect("the second daemon ends");
    assert!(!status.success());
    names(&second.log(), &["another", "daemon"]);
    // The first one never noticed.
    assert!(cluster.nodes[0].daemon.runs());
    cluster.run(0, "insert into item values (1, 'x')").await;
    cluster.converge().await;
}

#[tokio::test]
async fn a_second_daemon_on_one_folder_is_refused() {
    let mut cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    let mut second = Daemon::new(cluster.nodes[0].daemon.config());
    second.start();
    let status = second.wait_exit(PATIENCE).expect("the second daemon ends");
    assert!(!status.success());
    assert!(cluster.nodes[0].daemon.runs());
    cluster.run(0, "insert into item values (1, 'x')").await;
    cluster.converge().await;
}

#[tokio::test]
async fn a_restored_copy_of_a_nodes_server_is_refused_with_what_to_do() {
    let mut cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    cluster
        .run(0, "insert into item values (1, 'in the backup')")
        .await;
    cluster.converge().await;
    // A backup of the server's files, taken while nothing runs...
    let backup = cluster.back_up(0).await;
    cluster
        .run(0, "insert into item values (2, 'after the backup')")
        .await;
    cluster.converge().await;
    // ...and restored over the server, which has lost what the peers know of it.
    cluster.put_back(0, &backup);
    cluster.nodes[0].server.start().await;
    cluster
        .run(0, "insert into item values (3, 'after the restore')")
        .await;
    cluster.nodes[0].daemon.start();
    says(
        &cluster.nodes[0].daemon,
        &["restored", "docs/errors/the-server-went-back.md"],
    )
    .await;
    // Nothing of it reaches the other.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(
        cluster
            .value(1, "select string_agg(id::text, ',' order by id) from item")
            .await,
        "1,2"
    );
}

#[tokio::test]
async fn a_restored_copy_with_a_new_daemon_folder_is_refused_too() {
    let mut cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    cluster
        .run(0, "insert into item values (1, 'in the backup')")
        .await;
    cluster.converge().await;
    let backup = cluster.back_up(0).await;
    cluster
        .run(0, "insert into item values (2, 'after the backup')")
        .await;
    cluster.converge().await;
    cluster.put_back(0, &backup);
    std::fs::remove_dir_all(&cluster.nodes[0].data_dir).expect("remove the daemon's folder");
    std::fs::create_dir(&cluster.nodes[0].data_dir).expect("make it anew");
    cluster.nodes[0].server.start().await;
    cluster
        .run(0, "insert into item values (3, 'after the restore')")
        .await;
    cluster.nodes[0].daemon.start();
    // Only its peers know better: they have seen positions that this server has not reached.
    let (first, second) = (&cluster.nodes[0].daemon, &cluster.nodes[1].daemon);
    until("someone says that it was restored", async || {
        (first.log() + &second.log()).to_lowercase().contains("restored")
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(
        cluster
            .value(1, "select string_agg(id::text, ',' order by id) from item")
            .await,
        "1,2"
    );
}

#[tokio::test]
async fn a_copied_server_under_another_name_is_refused() {
    let mut cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    cluster.nodes[0].daemon.stop();
    cluster.nodes[0].server.stop();
    let twin_dir = cluster.dir().join("twin");
    let mut twin = cluster.nodes[0].server.copy(&twin_dir);
    cluster.nodes[0].server.start().await;
    cluster.nodes[0].daemon.start();
    twin.start().await;
    // Configured as a new node, on a database that is node 1.
    let config = cluster.dir().join("twin.toml");
    let home = cluster.dir().join("twin-daemon");
    std::fs::create_dir(&home).expect("create the twin's folder");
    let text = std::fs::read_to_string(cluster.nodes[0].daemon.config()).expect("read the configuration");
    let text = text
        .replace(
            &cluster.nodes[0].server.dsn("anabranch", "app"),
            &twin.dsn("anabranch", "app"),
        )
        .replace(
            cluster.nodes[0].data_dir.to_str().expect("UTF-8"),
            home.to_str().expect("UTF-8"),
        )
        .replace("name = \"n1\"\nid = 1\n", "name = \"n9\"\nid = 9\n")
        .replace(
            &format!("127.0.0.1:{}", cluster.nodes[0].port),
            &format!("127.0.0.1:{}", anabranch_tests::postgres::free_port()),
        );
    std::fs::write(&config, text).expect("write the twin's configuration");
    let mut daemon = Daemon::new(&config);
    daemon.start();
    let status = daemon.wait_exit(PATIENCE).expect("it ends");
    assert!(!status.success());
    names(&daemon.log(), &["prepared as 1", "node.id"]);
    cluster.run(0, "insert into item values (1, 'unharmed')").await;
    cluster.converge().await;
}

#[tokio::test]
async fn another_cluster_id_is_refused_and_both_are_told() {
    let cluster = Cluster::of([15, 15])
        .schema(ITEMS)
        .without_daemons()
        .start()
        .await;
    let mut cluster = cluster;
    cluster.nodes[1]
        .daemon
        .edit_config(|text| text.replace("[cluster]\nid = \"it\"", "[cluster]\nid = \"other\""));
    let output = anabranch(&[
        "init",
        "--config",
        cluster.nodes[1].daemon.config_arg(),
        "--admin-dsn",
        &cluster.nodes[1].server.dsn("postgres", "app"),
    ])
    .await;
    if !output.status.success() {
        // `init` remembers the first cluster: start over, as the message must say.
        let said =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        names(&said, &["cluster", "remove"]);
        let admin = cluster.nodes[1].server.dsn("postgres", "app");
        anabranch_ok(&[
            "remove",
            "--config",
            cluster.nodes[1].daemon.config_arg(),
            "--admin-dsn",
            &admin,
            "--yes",
        ])
        .await;
        initialise(&cluster.nodes[1]).await;
    }
    cluster.start_daemons();
    for (daemon, other) in [
        (&cluster.nodes[0].daemon, "other"),
        (&cluster.nodes[1].daemon, "it"),
    ] {
        says(daemon, &["cluster", other]).await;
    }
    cluster.run(0, "insert into item values (1, 'stays here')").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(cluster.value(1, "select count(*) from item").await, "0");
}

/// Reaches a daemon as a peer would.
async fn dial(port: u16) -> LinkClient<Channel> {
    let address = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).expect("an address");
    LinkClient::new(address.connect().await.expect("connect"))
}

/// What a well-meaning peer of node 1 would say.
fn hello(version: u32) -> Hello {
    Hello {
        protocol_version: version,
        cluster_id: "it".to_owned(),
        node_id: 2,
        node_name: "n2".to_owned(),
        ..Hello::default()
    }
}

#[tokio::test]
async fn another_protocol_version_is_refused_with_both_versions() {
    let cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    let mut client = dial(cluster.nodes[0].port).await;
    let welcome = client.greet(hello(999)).await.expect("an answer").into_inner();
    names(&welcome.refusal, &["999", "version"]);
    assert!(!welcome.refusal_code.is_empty());
    // And nothing is sent to someone who does not introduce themselves.
    for first in [
        PullRequest::default(),
        PullRequest {
            hello: Some(hello(999)),
            ..PullRequest::default()
        },
    ] {
        let requests = tonic::codegen::tokio_stream::once(first);
        if let Ok(answers) = client.pull(requests).await {
            let mut answers = answers.into_inner();
            while let Ok(Some(answer)) = answers.message().await {
                assert!(answer.frames.is_empty(), "data for a stranger");
            }
        }
    }
    cluster.converge().await;
}

#[tokio::test]
async fn garbage_on_the_link_port_harms_nothing() {
    let mut cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    let address = ("127.0.0.1", cluster.nodes[0].port);
    let noise: Vec<u8> = (0..200_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let mut headers = greeting.clone();
    headers.extend([0xff; 4096]);
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &noise,
        &greeting,
        &headers,
        b"",
        b"\x16\x03\x01\x02\x00\x01",
    ] {
        let mut stream = tokio::net::TcpStream::connect(address).await.expect("connect");
        let _ = stream.write_all(garbage).await;
        let mut answer = [0; 1024];
        let _ = tokio::time::timeout(Duration::from_millis(200), stream.read(&mut answer)).await;
    }
    // Many at once, held open.
    let mut open = Vec::new();
    for _ in 0..200 {
        open.push(tokio::net::TcpStream::connect(address).await.expect("connect"));
    }
    // gRPC of the right kind with senseless contents.
    let mut client = dial(cluster.nodes[0].port).await;
    let senseless = Hello {
        node_id: u32::MAX,
        node_name: "\0".repeat(10_000),
        incarnation: "x".to_owned(),
        ..Hello::default()
    };
    if let Ok(welcome) = client.greet(senseless).await {
        assert!(!welcome.into_inner().refusal.is_empty());
    }
    cluster.run(0, "insert into item values (1, 'x')").await;
    cluster.converge().await;
    assert!(cluster.nodes[0].daemon.runs());
}

#[tokio::test]
async fn a_certificate_of_another_authority_or_name_is_refused() {
    let mut cluster = Cluster::of([15, 15, 15])
        .schema(ITEMS)
        .tls()
        .without_daemons()
        .start()
        .await;
    let stranger = Authority::create(&cluster.dir().join("stranger")).issue("n2");
    let ours = cluster.nodes[0].daemon.config().with_file_name("anabranch.toml");
    let ca = std::fs::read_to_string(ours)
        .expect("read")
        .lines()
        .find(|line| line.starts_with("ca = "))
        .expect("a ca")
        .to_owned();
    // n2: signed by nobody we know. n3: signed, but as n1.
    cluster.nodes[1].daemon.edit_config(|text| {
        with_lines(
            text,
            &[
                ("cert = ", stranger.cert.to_str().expect("UTF-8")),
                ("key = ", stranger.key.to_str().expect("UTF-8")),
            ],
        )
    });
    let n1 = |what: &str| {
        cluster
            .dir()
            .join("ca")
            .join(format!("n1.{what}"))
            .display()
            .to_string()
    };
    cluster.nodes[2]
        .daemon
        .edit_config(|text| with_lines(text, &[("cert = ", &n1("pem")), ("key = ", &n1("key"))]));
    assert!(ca.contains("ca.pem"));
    cluster.start_daemons();
    says(&cluster.nodes[0].daemon, &["certificate"]).await;
    cluster
        .run(0, "insert into item values (1, 'for members only')")
        .await;
    cluster
        .run(1, "insert into item values (2, 'by a stranger')")
        .await;
    cluster
        .run(2, "insert into item values (3, 'by an impostor')")
        .await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let ids = "select string_agg(id::text, ',') from item";
    assert_eq!(cluster.values(ids).await, ["1", "2", "3"]);
}

fn with_lines(text: &str, replaced: &[(&str, &str)]) -> String {
    let line = |line: &str| match replaced.iter().find(|(start, _)| line.starts_with(start)) {
        Some((start, value)) => format!("{start}\"{value}\"\n"),
        None => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}

#[tokio::test]
async fn plaintext_on_an_outside_address_needs_a_word() {
    let mut cluster = Cluster::of([15, 15])
        .schema(ITEMS)
        .without_daemons()
        .start()
        .await;
    let port = cluster.nodes[0].port;
    cluster.nodes[0]
        .daemon
        .edit_config(|text| text.replace(&format!("\"127.0.0.1:{port}\""), &format!("\"0.0.0.0:{port}\"")));
    cluster.nodes[0].daemon.start();
    let status = cluster.nodes[0].daemon.wait_exit(PATIENCE).expect("it ends");
    assert!(!status.success());
    names(&cluster.nodes[0].daemon.log(), &["insecure", "tls"]);
}

#[tokio::test]
async fn an_unknown_configuration_key_is_named() {
    let cluster = Cluster::of([15]).without_daemons().start().await;
    let daemon = &cluster.nodes[0].daemon;
    daemon.edit_config(|text| format!("{text}\n[journal]\nmaximum_size = 5\n"));
    for command in ["run", "status", "doctor", "grants"] {
        names(
            &anabranch_refuses(&[command, "--config", daemon.config_arg()]).await,
            &["maximum_size"],
        );
    }
}

/// What `init` says on a database with this schema and settings.
async fn init_refuses(schema: &str, conf: &str) -> String {
    let dir = anabranch_tests::postgres::open_dir("it-");
    let options = anabranch_tests::postgres::Options {
        version: 15,
        member: 0,
        conf: vec![conf.to_owned()],
        clock: None,
        tcp_port: None,
    };
    let mut server = anabranch_tests::Postgres::create(&dir.path().join("server"), options);
    server.start().await;
    cluster::prepare_database(&server, &[schema]).await;
    let config = dir.path().join("anabranch.toml");
    let text = format!(
        "[node]\nname = \"n1\"\nid = 1\ndata_dir = \"{}\"\n[cluster]\nid = \"it\"\n[postgres]\ndsn = \"{}\"\n\
         [listen]\naddress = \"127.0.0.1:{}\"\n",
        dir.path().join("daemon").display(),
        server.dsn("anabranch", "app"),
        anabranch_tests::postgres::free_port(),
    );
    std::fs::write(&config, text).expect("write the configuration");
    let config = config.to_str().expect("UTF-8");
    grant(&server, config).await;
    anabranch_refuses(&[
        "init",
        "--config",
        config,
        "--admin-dsn",
        &server.dsn("postgres", "app"),
    ])
    .await
}

#[tokio::test]
async fn wal_level_is_named_with_its_remedy() {
    names(
        &init_refuses(ITEMS, "wal_level = replica").await,
        &["wal_level", "logical", "restart"],
    );
}

#[tokio::test]
async fn a_table_without_a_primary_key_is_named_with_its_remedy() {
    names(
        &init_refuses("create table keyless (a int)", "").await,
        &["keyless", "primary key"],
    );
}

#[tokio::test]
async fn columns_whose_values_cannot_be_brought_elsewhere_are_named_with_their_remedies() {
    let said = init_refuses(
        "create domain email as text not null;
         create domain grants as aclitem check (value is not null);
         create table odd (id int primary key, r regclass, rs regrole[], a aclitem[], d grants default '=r/app',
            e email generated always as (id::text || '@') stored);
         create table mixed (id int primary key, a aclitem, n int[]);
         create table even (id int primary key, e email default '@', q tsquery, o oid, n int[],
            t tsvector generated always as (to_tsvector('pg_catalog.simple'::regconfig, 'a')) stored);
         create table even_odder (id int primary key, a aclitem, q tsquery, v int2vector)",
        "",
    )
    .await;
    let words = [
        "column r of type regclass, whose values are numbers",
        "column rs of type regrole[], whose values are numbers",
        "ALTER TABLE public.odd ALTER COLUMN r TYPE text;",
        "ALTER TABLE public.odd ALTER COLUMN rs TYPE text[];",
        "column a of type aclitem[], which is made of a type without a binary form",
        "column d of the domain public.grants, which refuses NULL",
        "column e of the domain public.email, which refuses NULL",
        "column n of type integer[], an array or a domain, beside a column of a type without a binary form",
        "\"!public.odd\"",
    ];
    names(&said, &words);
    assert!(!said.contains("public.even"), "{said}");
}

#[tokio::test]
async fn too_few_replication_slots_are_named_with_their_remedy() {
    names(
        &init_refuses(ITEMS, "max_replication_slots = 0").await,
        &["max_replication_slots"],
    );
}

#[tokio::test]
async fn a_missing_privilege_is_named_with_its_remedy() {
    let mut cluster = Cluster::of([15, 15])
        .schema(ITEMS)
        .config("[apply]\nquarantine_retry_ms = 500\n")
        .without_daemons()
        .start()
        .await;
    cluster
        .admin(0)
        .await
        .run("revoke update on item from anabranch")
        .await;
    let said = anabranch(&["doctor", "--config", cluster.nodes[0].daemon.config_arg()]).await;
    let said = String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr);
    names(&said, &["update", "item", "grant"]);
    // A daemon that is running loses no change over it: the rows wait until the privilege is back.
    cluster.start_daemons();
    cluster.run(1, "insert into item values (1, 'x'), (2, 'y')").await;
    cluster.wait_value(0, "select count(*) from item", "2").await;
    cluster.run(1, "update item set v = 'z' where id = 1").await;
    says(&cluster.nodes[0].daemon, &["permission denied for table item"]).await;
    cluster.run(0, "grant update on item to anabranch").await;
    cluster.converge().await;
    cluster
        .expect("select string_agg(v, '' order by id) from item", "zy")
        .await;
}

#[tokio::test]
async fn row_level_security_that_binds_the_daemon_is_named_and_no_row_is_taken_for_absent() {
    let cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    cluster
        .run(0, "insert into item values (1, 'x'), (2, 'y'), (3, 'z')")
        .await;
    cluster.converge().await;
    cluster
        .admin(1)
        .await
        .run("alter table item enable row level security")
        .await;
    cluster
        .run(
            0,
            "update item set v = 'changed' where id = 1; delete from item where id = 2",
        )
        .await;
    hidden_rows_wait(&cluster).await;
}

/// Rows that policies hide from the daemon of the second node wait, with an alarm that says what to do, and are not taken for absent: once
/// it sees them they are written.
async fn hidden_rows_wait(cluster: &Cluster) {
    until("alarms say that nothing is applied, and what to do", async || {
        let alarms = cluster.status_or_null(1).await["alarms"].to_string();
        alarms.contains("\"apply\"") && alarms.contains("BYPASSRLS")
    })
    .await;
    assert_eq!(
        cluster
            .value(1, "select count(*) from anabranch.quarantine")
            .await,
        "0"
    );
    cluster.admin(1).await.run("alter role anabranch bypassrls").await;
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(id || v, ',' order by id) from item",
            "1changed,3z",
        )
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn a_role_that_loses_bypassrls_while_it_runs_takes_no_row_for_absent() {
    let mut cluster = Cluster::of([15, 15])
        .schema(ITEMS)
        .without_daemons()
        .start()
        .await;
    let admin = cluster.admin(1).await;
    admin
        .run("alter role anabranch bypassrls; alter table item enable row level security")
        .await;
    cluster.start_daemons();
    cluster
        .run(
            0,
            "insert into item values (1, 'x'), (2, 'y'), (3, 'z'), (4, 'w')",
        )
        .await;
    // The statements are prepared, and the session is one that policies did not bind when it began.
    cluster.run(0, "update item set v = 'u' where id = 4").await;
    cluster.run(0, "delete from item where id = 4").await;
    cluster.converge().await;
    admin.run("alter role anabranch nobypassrls").await;
    cluster.run(0, "update item set v = 'changed' where id = 1").await;
    cluster.run(0, "delete from item where id = 2").await;
    hidden_rows_wait(&cluster).await;
    cluster.expect_no_drift();
}

#[tokio::test]
async fn a_privilege_that_is_taken_away_is_an_alarm_before_a_row_needs_it() {
    let cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    let admin = cluster.admin(1).await;
    let alarm = async |wanted: &[&str]| {
        let what = format!("the alarm says {wanted:?}");
        until(&what, async || {
            let status = cluster.status_or_null(1).await;
            let alarms = status["alarms"].as_array().cloned().unwrap_or_default();
            let alarm = alarms.iter().find(|alarm| alarm["name"] == "privileges");
            let text = alarm.map(|alarm| alarm["text"].to_string());
            match text {
                Some(text) => !wanted.is_empty() && wanted.iter().all(|part| text.contains(part)),
                None => wanted.is_empty(),
            }
        })
        .await;
    };
    admin
        .run(
            "revoke update on item from anabranch; revoke insert on anabranch.conflict_history from anabranch;
             alter role anabranch noreplication; alter table item enable row level security",
        )
        .await;
    alarm(&[
        "GRANT UPDATE ON TABLE public.item",
        "anabranch.conflict_history",
        "BYPASSRLS",
        "REPLICATION",
    ])
    .await;
    admin
        .run(
            "grant update on item to anabranch; grant insert on anabranch.conflict_history to anabranch;
             alter role anabranch replication bypassrls",
        )
        .await;
    alarm(&[]).await;
    cluster.run(0, "insert into item values (1, 'x')").await;
    cluster.converge().await;
}

#[tokio::test]
async fn a_role_without_replication_is_told_what_to_grant() {
    let mut cluster = Cluster::of([15]).schema(ITEMS).without_daemons().start().await;
    cluster
        .admin(0)
        .await
        .run("alter role anabranch noreplication")
        .await;
    cluster.nodes[0].daemon.start();
    says(&cluster.nodes[0].daemon, &["replication", "alter role"]).await;
}

#[tokio::test]
async fn run_before_init_says_so() {
    let mut cluster = Cluster::of([15]).schema(ITEMS).without_daemons().start().await;
    let admin = cluster.nodes[0].server.dsn("postgres", "app");
    anabranch_ok(&[
        "remove",
        "--config",
        cluster.nodes[0].daemon.config_arg(),
        "--admin-dsn",
        &admin,
        "--yes",
    ])
    .await;
    cluster.nodes[0].daemon.start();
    let status = cluster.nodes[0].daemon.wait_exit(PATIENCE).expect("it ends");
    assert!(!status.success());
    names(&cluster.nodes[0].daemon.log(), &["init"]);
}

#[tokio::test]
async fn the_schema_of_another_release_is_refused_by_its_number_and_init_mends_an_older_one() {
    let mut cluster = Cluster::of([15, 15])
        .schema(ITEMS)
        .without_daemons()
        .start()
        .await;
    let layout = |format: u32| format!("update anabranch.node set format = {format}");
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let admin = cluster.nodes[0].server.dsn("postgres", "app");
    for (format, remedy) in [(7, "release of anabranch that made it"), (0, "anabranch init")] {
        cluster.admin(0).await.run(&layout(format)).await;
        let daemon = &mut cluster.nodes[0].daemon;
        daemon.start();
        let status = daemon.wait_exit(PATIENCE).expect("it ends");
        assert!(!status.success());
        let log = daemon.log();
        names(
            &log,
            &[&format!("has layout {format}, this release knows"), remedy],
        );
    }
    // Not what this release cannot know.
    cluster.admin(0).await.run(&layout(7)).await;
    let init = ["init", "--config", &config, "--admin-dsn", &admin];
    names(
        &anabranch_refuses(&init).await,
        &["has layout 7", "release of anabranch that made it"],
    );
    // As the first release made it.
    let column = "alter table anabranch.ddl drop column epoch; drop table anabranch.added_column";
    cluster.admin(0).await.run(column).await;
    cluster.admin(0).await.run(&layout(1)).await;
    anabranch_ok(&init).await;
    let mended = "select format || ' ' || (select count(*) from information_schema.columns \
        where table_schema = 'anabranch' and table_name = 'ddl' and column_name = 'epoch') || ' ' || to_regclass('anabranch.added_column') from anabranch.node";
    assert_eq!(cluster.value(0, mended).await, "3 1 anabranch.added_column");
    cluster.start_daemons();
    cluster.run(0, "insert into item values (1, 'x')").await;
    cluster.converge().await;
}

#[tokio::test]
async fn a_node_with_the_schema_of_an_unfinished_join_is_not_emptied() {
    let mut cluster = Cluster::of([15, 15])
        .schema(ITEMS)
        .without_daemons()
        .start()
        .await;
    cluster.run(1, "insert into item values (1, 'x')").await;
    cluster.admin(1).await.run("create schema anabranch_join").await;
    cluster.nodes[1].daemon.start();
    let status = cluster.nodes[1].daemon.wait_exit(PATIENCE).expect("it ends");
    assert!(!status.success());
    names(&cluster.nodes[1].daemon.log(), &["empties the database"]);
    let admin = cluster.nodes[1].server.dsn("postgres", "app");
    let config = cluster.nodes[1].daemon.config_arg().to_owned();
    let said = anabranch_refuses(&["init", "--config", &config, "--admin-dsn", &admin]).await;
    names(&said, &["a join was begun in this database"]);
    let join = cluster.join_command(1, 0);
    let mut join: Vec<&str> = join.iter().map(String::as_str).collect();
    join.push("--abandon");
    let said = anabranch_refuses(&join).await;
    names(&said, &["nothing is given up", "drop schema anabranch_join"]);
    assert_eq!(cluster.value(1, "select v from item").await, "x");
}

#[tokio::test]
async fn a_dry_run_of_init_changes_nothing() {
    let cluster = Cluster::of([15]).schema(ITEMS).without_daemons().start().await;
    let config = cluster.nodes[0].daemon.config_arg();
    let admin = cluster.nodes[0].server.dsn("postgres", "app");
    anabranch_ok(&["remove", "--config", config, "--admin-dsn", &admin, "--yes"]).await;
    let sql = anabranch_ok(&["init", "--config", config, "--admin-dsn", &admin, "--dry-run"]).await;
    names(&sql, &["create schema", "create publication"]);
    assert_eq!(
        cluster
            .value(0, "select count(*) from pg_namespace where nspname = 'anabranch'")
            .await,
        "0"
    );
    assert_eq!(
        cluster
            .value(0, "select count(*) from pg_replication_slots")
            .await,
        "0"
    );
}

#[tokio::test]
async fn a_wrong_password_is_told_and_never_printed() {
    let mut cluster = Cluster::of([15])
        .schema(ITEMS)
        .tcp(0)
        .without_daemons()
        .start()
        .await;
    cluster
        .admin(0)
        .await
        .run("alter role anabranch password 'right'")
        .await;
    let port = cluster.nodes[0].server.port();
    let dsn = cluster.nodes[0].server.dsn("anabranch", "app");
    let tcp = format!("host=127.0.0.1 port={port} user=anabranch dbname=app password=hunter2");
    cluster.nodes[0]
        .daemon
        .edit_config(|text| text.replace(&dsn, &tcp));
    cluster.nodes[0].daemon.start();
    says(&cluster.nodes[0].daemon, &["password"]).await;
    assert!(
        !cluster.nodes[0].daemon.log().contains("hunter2"),
        "the password is in the log"
    );
    if let Some(pid) = cluster.nodes[0].daemon.pid() {
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).expect("read the arguments");
        assert!(
            !String::from_utf8_lossy(&arguments).contains("hunter2"),
            "the password is in the process list"
        );
    }
}

#[tokio::test]
async fn doctor_finds_nothing_wrong_with_a_good_setup() {
    let cluster = Cluster::of([15, 18])
        .schema(ITEMS)
        .without_daemons()
        .start()
        .await;
    for node in &cluster.nodes {
        anabranch_ok(&["doctor", "--config", node.daemon.config_arg()]).await;
    }
}

#[tokio::test]
async fn init_may_be_repeated() {
    let cluster = Cluster::of([15, 18]).schema(ITEMS).start().await;
    for node in &cluster.nodes {
        initialise(node).await;
    }
    cluster.run(0, "insert into item values (1, 'x')").await;
    cluster.converge().await;
}
