//! Logging in, by every way that a server may ask for, on both kinds of connection.

use std::path::Path;
use std::process::Command;

use anabranch_node::pg;
use anabranch_node::source::{Error, Walsender};

use crate::server::{Server, config, run};

const ROLES: &str = "
    CREATE ROLE scram LOGIN REPLICATION PASSWORD 'correct horse';
    CREATE ROLE tls_only LOGIN REPLICATION PASSWORD 'correct horse';
    CREATE ROLE clear LOGIN REPLICATION PASSWORD 'correct horse';
    CREATE ROLE modest LOGIN PASSWORD 'p';
    SET password_encryption = md5;
    CREATE ROLE hashed LOGIN REPLICATION PASSWORD 'correct horse';";

async fn walsender(dsn: &str) -> Result<Walsender, Error> {
    Walsender::connect(&pg::dsn(&config(dsn))?, "test").await
}

/// The whole chain of an error, as an operator sees it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

async fn refused(dsn: &str) -> Error {
    match walsender(dsn).await {
        Err(error) => error,
        Ok(_) => panic!("{dsn} was let in"),
    }
}

#[tokio::test]
async fn every_password_method_logs_in_over_tcp() {
    let server = Server::start("");
    server.user("postgres").await.batch_execute(ROLES).await.unwrap();
    for user in ["scram", "hashed", "clear"] {
        let dsn = server.tcp(&format!("user={user} password='correct horse'"));
        let mut walsender = walsender(&dsn).await.unwrap();
        assert_eq!(walsender.identify().await.unwrap().database, "postgres", "{user}");
        let (sql, _) = pg::connect(&config(&dsn), "test").await.unwrap();
        let row = sql.query_one("SELECT current_user::text", &[]).await.unwrap();
        assert_eq!(row.get::<_, &str>(0), user);
    }
}

#[tokio::test]
async fn a_wrong_or_missing_password_is_said_plainly_and_not_repeated() {
    let server = Server::start("");
    server.user("postgres").await.batch_execute(ROLES).await.unwrap();
    for user in ["scram", "hashed", "clear"] {
        let error = refused(&server.tcp(&format!("user={user} password=hunter2"))).await;
        assert!(
            matches!(&error, Error::Login { user: named, .. } if named == user),
            "{error:?}"
        );
        assert!(!error.is_transient(), "{error:?}");
        assert!(error.to_string().contains("check the password"), "{error}");
        assert!(!format!("{error:?} {}", chain(&error)).contains("hunter2"));
        let error = pg::connect(
            &config(&server.tcp(&format!("user={user} password=hunter2"))),
            "test",
        )
        .await;
        let error = error.map(drop).unwrap_err();
        assert!(!error.is_transient(), "{error:?}");
        assert!(
            chain(&error).contains("password authentication failed"),
            "{}",
            chain(&error)
        );
    }
}

#[tokio::test]
async fn a_role_that_may_not_replicate_is_told_how_it_may() {
    let server = Server::start("");
    server.user("postgres").await.batch_execute(ROLES).await.unwrap();
    let error = refused(&server.tcp("user=modest password=p")).await;
    assert!(
        error.to_string().contains("ALTER ROLE modest REPLICATION"),
        "{}",
        chain(&error)
    );
}

#[tokio::test]
async fn the_unix_socket_needs_no_password_and_tells_who_the_server_is() {
    let server = Server::start("");
    let user = server.user("postgres").await;
    let identity = walsender(&server.dsn("postgres"))
        .await
        .unwrap()
        .identify()
        .await
        .unwrap();
    let row = user
        .query_one(
            "SELECT system_identifier::text, timeline_id FROM pg_control_system(), pg_control_checkpoint()",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(identity.system_id.to_string(), row.get::<_, String>(0));
    assert_eq!(identity.timeline, u32::try_from(row.get::<_, i32>(1)).unwrap());
    assert!(identity.written.0 > 0);
    assert_eq!(identity.database, "postgres");
}

#[tokio::test]
async fn hosts_are_tried_in_turn() {
    let server = Server::start("");
    let user = server.user("postgres").await;
    let port = server.port;
    let dsn = format!("host=/nonexistent,127.0.0.1 port={port} user=postgres");
    walsender(&dsn).await.unwrap();
    pg::connect(&config(&dsn), "test").await.unwrap();
    let error = refused("host=/nonexistent user=postgres").await;
    assert!(
        error.is_transient() && error.to_string().contains("/nonexistent"),
        "{error}"
    );
    user.batch_execute(
        "CREATE ROLE reader LOGIN REPLICATION; ALTER ROLE reader SET default_transaction_read_only = on",
    )
    .await
    .unwrap();
    // A database that joins or leaves is read only for others; the server takes writes all the same.
    let dsn = format!("{} target_session_attrs=read-write", server.tcp("user=reader"));
    walsender(&dsn).await.unwrap();
    pg::connect(&config(&dsn), "test").await.unwrap();
}

#[tokio::test]
async fn a_server_that_was_chosen_is_the_only_one_that_is_reached() {
    let mut server = Server::start("");
    server.user("postgres").await;
    let host = server.folder().display().to_string();
    let text = |host: &str| {
        format!(
            "host=/nonexistent,{host} port={} user=postgres dbname=postgres",
            server.port
        )
    };
    let whole = pg::dsn(&config(&text(&host))).unwrap();
    let pinned = pg::settle(whole, None).await.unwrap();
    assert!(pinned.hosts().starts_with(&host), "{}", pinned.hosts());
    pg::connect_dsn(&pinned, "test").await.unwrap();
    Walsender::connect(&pinned, "test").await.unwrap();
    // Two servers that take writes.
    let other = Server::start("");
    other.user("postgres").await;
    let both = format!(
        "host={host},{} port={},{} user=postgres dbname=postgres",
        other.folder().display(),
        server.port,
        other.port
    );
    let error = pg::settle(pg::dsn(&config(&both)).unwrap(), None)
        .await
        .unwrap_err();
    assert!(matches!(error, pg::Error::SeveralPrimaries { .. }), "{error}");
    // Whatever is behind the same address later is another one.
    server.restart();
    server.user("postgres").await;
    let error = pg::connect_dsn(&pinned, "test").await.map(drop).unwrap_err();
    assert!(matches!(error, pg::Error::OtherServer { .. }), "{error}");
    let error = Walsender::connect(&pinned, "test").await.map(drop).unwrap_err();
    assert!(
        matches!(error, Error::Pg(pg::Error::OtherServer { .. })),
        "{error}"
    );
    assert!(error.is_transient());
}

/// Makes an authority, and a certificate for `localhost` that it signed.
fn certificates(data: &Path) {
    let openssl = |args: &str| run(Command::new("openssl").current_dir(data).args(args.split(' ')));
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(&format!(
        "req -x509 -days 2 {key} -keyout ca.key -out ca.crt -subj /CN=authority"
    ));
    openssl(&format!(
        "req {key} -keyout server.key -out server.csr -subj /CN=localhost"
    ));
    std::fs::write(
        data.join("ext"),
        "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n",
    )
    .unwrap();
    openssl(
        "x509 -req -days 2 -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -extfile ext -out server.crt",
    );
    openssl(&format!(
        "req -x509 -days 2 {key} -keyout other.key -out other.crt -subj /CN=other"
    ));
    for file in ["server.key", "server.crt"] {
        Server::own(&data.join(file));
    }
}

#[tokio::test]
async fn tls_is_used_bound_and_verified_as_sslmode_says() {
    let server = Server::start_with("ssl = on", certificates);
    let user = server.user("postgres").await;
    user.batch_execute(ROLES).await.unwrap();
    let file = |name: &str| server.folder().join("data").join(name).display().to_string();
    let (ca, other, own) = (file("ca.crt"), file("other.crt"), file("server.crt"));
    let base = format!(
        "hostaddr=127.0.0.1 port={} dbname=postgres user=tls_only password='correct horse'",
        server.port
    );
    // The certificate is for localhost, so another host name fails verify-full and nothing else.
    for good in [
        "host=localhost sslmode=prefer".to_owned(),
        "host=localhost sslmode=require channel_binding=require".to_owned(),
        "host=localhost sslmode=require channel_binding=disable".to_owned(),
        format!("host=localhost sslmode=verify-full sslrootcert={ca}"),
        format!("host=localhost sslmode=verify-full sslrootcert={own}"),
        format!("host=db.example sslmode=verify-ca sslrootcert={ca}"),
        format!("host=db.example sslmode=require sslrootcert={ca}"),
        "host=db.example sslmode=require".to_owned(),
    ] {
        let dsn = format!("{base} {good}");
        let mut connected = walsender(&dsn)
            .await
            .unwrap_or_else(|error| panic!("{good}: {}", chain(&error)));
        let query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
        assert_eq!(
            connected.query(query).await.unwrap(),
            [[Some("t".to_owned())]],
            "{good}"
        );
        let (sql, _) = pg::connect(&config(&dsn), "test")
            .await
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert!(
            sql.query_one(query, &[]).await.unwrap().get::<_, bool>(0),
            "{good}"
        );
    }
    for bad in [
        format!("host=db.example sslmode=verify-full sslrootcert={ca}"),
        format!("host=db.example sslmode=verify-full sslrootcert={own}"),
        format!("host=localhost sslmode=verify-ca sslrootcert={other}"),
        format!("host=localhost sslmode=require sslrootcert={other}"),
        "host=localhost sslmode=disable".to_owned(),
    ] {
        let dsn = format!("{base} {bad}");
        let error = refused(&dsn).await;
        assert!(!error.is_transient(), "{bad}: {error:?}");
        let error = pg::connect(&config(&dsn), "test").await.map(drop).unwrap_err();
        assert!(!error.is_transient(), "{bad}: {error:?}");
    }
}

#[tokio::test]
async fn a_server_without_tls_is_refused_where_tls_is_required() {
    let server = Server::start("");
    server.user("postgres").await;
    let error = refused(&server.tcp("user=postgres sslmode=require")).await;
    assert!(matches!(error, Error::NoTls { .. }), "{error:?}");
    walsender(&server.tcp("user=postgres sslmode=prefer"))
        .await
        .unwrap();
    let error = refused(&server.tcp("user=postgres channel_binding=require")).await;
    assert!(matches!(error, Error::Authentication { .. }), "{error:?}");
}

#[tokio::test]
async fn a_session_is_pinned_whatever_the_role_sets() {
    let server = Server::start("");
    let user = server.user("postgres").await;
    user.batch_execute(
        "CREATE ROLE odd LOGIN REPLICATION; ALTER ROLE odd SET datestyle = 'SQL, DMY'; \
         ALTER ROLE odd SET timezone = 'Asia/Tokyo'; ALTER ROLE odd SET extra_float_digits = 0; \
         ALTER ROLE odd SET bytea_output = 'escape'; ALTER ROLE odd SET search_path = public; \
         ALTER ROLE odd SET intervalstyle = 'sql_standard'; ALTER ROLE odd SET statement_timeout = '1ms'; \
         ALTER ROLE odd SET idle_session_timeout = '1ms'",
    )
    .await
    .unwrap();
    let dsn = server.tcp("user=odd options='-c work_mem=123MB'");
    let query = "SELECT concat_ws(' ', '2001-02-03 04:05:06+00'::timestamptz, 0.1::float8 + 0.2, '\\x00ff'::bytea, \
        '1 day 2 hours'::interval, current_setting('search_path'), current_setting('client_encoding'), \
        current_setting('work_mem'), current_setting('application_name'))";
    let wanted = "2001-02-03 04:05:06+00 0.30000000000000004 \\x00ff 1 day 02:00:00 pg_catalog,pg_temp UTF8 123MB anabranch:test";
    let (sql, driver) = pg::connect(&config(&dsn), "test").await.unwrap();
    assert_eq!(
        sql.query_one(query, &[]).await.unwrap().get::<_, String>(0),
        wanted
    );
    let mut walsender = walsender(&dsn).await.unwrap();
    assert_eq!(walsender.query(query).await.unwrap(), [[Some(wanted.to_owned())]]);
    drop(sql);
    driver.await.unwrap().unwrap();
}

#[tokio::test]
async fn errors_that_pass_are_told_from_those_that_stay() {
    let server = Server::start("");
    let user = server.user("postgres").await;
    let (sql, _) = pg::connect(&config(&server.dsn("postgres")), "test")
        .await
        .unwrap();
    let error = sql.batch_execute("SELECT 1/0").await.unwrap_err();
    assert!(!pg::is_transient(&error), "{error:?}");
    user.batch_execute("CREATE TABLE locked ()").await.unwrap();
    user.batch_execute("BEGIN; LOCK locked").await.unwrap();
    let error = sql
        .batch_execute("SET lock_timeout = 1; SELECT FROM public.locked")
        .await
        .unwrap_err();
    assert!(pg::is_transient(&error), "{error:?}");
    user.batch_execute(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name = 'anabranch:test'",
    )
    .await
    .unwrap();
    for _ in 0..2 {
        let error = sql.batch_execute("SELECT 1").await.unwrap_err();
        assert!(pg::is_transient(&error), "{error:?}");
    }
    let error = pg::connect(&config("host=/nonexistent user=u"), "test")
        .await
        .map(drop)
        .unwrap_err();
    assert!(error.is_transient(), "{error:?}");
}
