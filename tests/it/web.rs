//! The page for reviewing conflicts: by HTTP here, in a real browser by name.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use anabranch_tests::Cluster;
use anabranch_tests::certs::{Authority, Certificate};
use anabranch_tests::http::{Answer, encode, request, request_tls};
use anabranch_tests::postgres::free_port;
use anabranch_tests::wait::until;
use serde_json::{Value, json};

const TOKEN: &str = "a-token-for-the-tests";
const EVIL: &str = "<script>alert(1)</script>\"'&";

/// Two nodes with one conflict, the page at the first; the lost value is [`EVIL`].
async fn with_a_page() -> (Cluster, SocketAddr, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, format!("{TOKEN}\n")).unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let web = format!(
        "[web]\nlisten = \"{address}\"\ntoken_file = \"{}\"\n",
        token.display()
    );
    let cluster = with_a_conflict(&web).await;
    until("the page answers", async || {
        request(address, "GET", "/login", &[], "").await.is_ok()
    })
    .await;
    (cluster, address, folder)
}

/// The first node has this in its configuration.
async fn with_a_conflict(web: &str) -> Cluster {
    let cluster = Cluster::of([15, 15])
        .schema("create table item (id int primary key, v text)")
        .config_of(0, web)
        .start()
        .await;
    cluster
        .run(0, "insert into item values (1, 'base'), (2, 'base')")
        .await;
    cluster.converge().await;
    cluster.isolate_all();
    cluster
        .run(
            0,
            &format!("update item set v = '{}' where id = 1", EVIL.replace('\'', "''")),
        )
        .await;
    cluster.run(1, "update item set v = 'later' where id = 1").await;
    cluster.heal();
    cluster.converge().await;
    cluster.conflicts().await;
    cluster
}

async fn get(address: SocketAddr, path: &str, cookie: &str) -> Answer {
    request(address, "GET", path, &[("Cookie", cookie)], "")
        .await
        .unwrap()
}

async fn post(address: SocketAddr, path: &str, cookie: &str, origin: &str, form: &str) -> Answer {
    let headers = [
        ("Cookie", cookie),
        ("Origin", origin),
        ("Content-Type", "application/x-www-form-urlencoded"),
    ];
    request(address, "POST", path, &headers, form).await.unwrap()
}

async fn log_in(address: SocketAddr) -> String {
    let here = format!("http://{address}");
    let form = format!("token={TOKEN}&name=kim");
    let answer = post(address, "/login", "", &here, &form).await;
    answer.header("set-cookie").split(';').next().unwrap().to_owned()
}

#[tokio::test]
async fn a_replay_that_waits_for_a_row_holds_up_no_other_request_and_does_not_wait_for_ever() {
    let (cluster, address, _folder) = with_a_page().await;
    let cookie = log_in(address).await;
    let id = cluster
        .value(0, "select conflict_id from anabranch.conflict_history")
        .await;
    let path = format!("/conflict/{id}");
    let page = get(address, &path, &cookie).await.body;
    let form = format!("secret={}", secret_of(&page));
    let holder = cluster.session(0).await;
    holder.run("begin").await;
    holder.run("select * from item where id = 1 for update").await;
    let replay = {
        let (cookie, path) = (cookie.clone(), format!("{path}/replay"));
        tokio::spawn(async move { post(address, &path, &cookie, &format!("http://{address}"), &form).await })
    };
    let waits = "select count(*) > 0 from pg_stat_activity where application_name = 'anabranch:web' and wait_event_type = 'Lock'";
    cluster.wait_value(0, waits, "t").await;
    for path in ["/", path.as_str()] {
        let answer = tokio::time::timeout(Duration::from_secs(10), get(address, path, &cookie)).await;
        assert_eq!(answer.expect("nobody holds it up").status, 200, "{path}");
    }
    assert!(!replay.is_finished(), "it still waits");
    let answer = tokio::time::timeout(Duration::from_secs(60), replay).await;
    let answer = answer.expect("it ends").unwrap();
    assert!([409, 503].contains(&answer.status), "{}", answer.body);
    holder.run("rollback").await;
    let status = "select status from anabranch.conflict_history";
    assert_eq!(cluster.value(0, status).await, "new");
}

#[tokio::test]
async fn the_page_lists_shows_and_replays_for_whom_has_the_token_and_escapes_what_it_shows() {
    let (cluster, address, _folder) = with_a_page().await;
    let here = format!("http://{address}");
    for path in ["/", "/nodes", "/conflict/00"] {
        let answer = get(address, path, "").await;
        assert_eq!(
            (answer.status, answer.header("location")),
            (303, "/login"),
            "{path}"
        );
    }
    assert_eq!(
        post(address, "/login", "", &here, "token=wrong&name=kim")
            .await
            .status,
        403
    );
    let form = format!("token={TOKEN}&name=kim");
    assert_eq!(
        post(address, "/login", "", "http://evil.example", &form)
            .await
            .status,
        403
    );
    let answer = post(address, "/login", "", &here, &form).await;
    assert_eq!(answer.status, 303);
    let cookie = answer.header("set-cookie").split(';').next().unwrap().to_owned();

    let page = get(address, "/", &cookie).await;
    assert_eq!(page.status, 200);
    assert!(
        page.header("content-security-policy")
            .contains("default-src 'none'")
    );
    assert!(
        page.body.contains("public.item") && page.body.contains("update_origin_differs"),
        "{}",
        page.body
    );
    assert!(
        get(address, "/?table=other", &cookie)
            .await
            .body
            .contains("No conflicts.")
    );
    assert!(
        !get(address, "/?key=id%3D1&status=new&node=n2&hours=1", &cookie)
            .await
            .body
            .contains("No conflicts.")
    );
    for (query, is_there) in [
        ("winner=n2&since=2026-01-01+09%3A30&hours=1", true),
        ("winner=n1", false),
        ("since=2100-01-01", false),
        ("until=2001-02-03T04:05:06Z", false),
        ("until=2100-01-01", true),
    ] {
        let body = get(address, &format!("/?{query}"), &cookie).await.body;
        assert_eq!(!body.contains("No conflicts."), is_there, "{query}: {body}");
    }
    for query in [
        "node=nobody",
        "winner=nobody",
        "since=soon",
        "kind=update_exits",
        "status=open",
        "key=id",
    ] {
        assert_eq!(
            get(address, &format!("/?{query}"), &cookie).await.status,
            400,
            "{query}"
        );
    }
    let reflected = get(address, &format!("/?table={}", encode(EVIL)), &cookie)
        .await
        .body;
    assert!(
        !reflected.contains("<script>") && reflected.contains("&#60;script&#62;"),
        "{reflected}"
    );
    assert!(get(address, "/?all=1", &cookie).await.body.contains("n1, n2"));
    assert!(get(address, "/nodes", &cookie).await.body.contains("connected"));

    let id = cluster
        .value(0, "select conflict_id from anabranch.conflict_history")
        .await;
    let path = format!("/conflict/{id}");
    let page = get(address, &path, &cookie).await.body;
    assert!(
        !page.contains("<script>") && page.contains("&#60;script&#62;"),
        "{page}"
    );
    let secret = secret_of(&page);
    let good = format!("secret={secret}&note=by+hand");
    for (origin, form) in [
        (here.as_str(), "secret=x"),
        ("http://evil.example", good.as_str()),
        ("null", good.as_str()),
    ] {
        for verb in ["ack", "dismiss", "replay"] {
            let answer = post(address, &format!("{path}/{verb}"), &cookie, origin, form).await;
            assert_eq!(answer.status, 403, "{verb} {origin} {form}");
        }
    }
    let status = "select concat_ws(' ', status, reviewed_by, note) from anabranch.conflict_history";
    assert_eq!(cluster.value(0, status).await, "new");
    assert_eq!(
        post(address, &format!("{path}/ack"), &cookie, &here, &good)
            .await
            .status,
        303
    );
    assert_eq!(cluster.value(0, status).await, "acknowledged kim by hand");
    let form = format!("secret={secret}&note=no+concern");
    let answer = post(address, &format!("{path}/dismiss"), &cookie, &here, &form).await;
    assert_eq!(
        (answer.status, answer.header("location")),
        (303, format!("{path}?said=dismissed").as_str())
    );
    assert_eq!(cluster.value(0, status).await, "dismissed kim no concern");
    let page = get(address, answer.header("location"), &cookie).await.body;
    assert!(
        page.contains("Dismissed.")
            && page.contains("<strong id=\"status\">dismissed</strong> by kim: no concern"),
        "{page}"
    );
    // Nothing of the row is written.
    cluster.expect("select v from item where id = 1", "later").await;

    cluster.run(0, "update item set v = 'since' where id = 1").await;
    let answer = post(address, &format!("{path}/replay"), &cookie, &here, &good).await;
    assert_eq!(answer.status, 409);
    assert!(answer.body.contains("changed since"), "{}", answer.body);
    let forced = format!("{good}&force=1");
    assert_eq!(
        post(address, &format!("{path}/replay"), &cookie, &here, &forced)
            .await
            .status,
        303
    );
    assert_eq!(cluster.value(0, status).await, "replayed kim by hand");
    for verb in ["ack", "dismiss"] {
        let answer = post(address, &format!("{path}/{verb}"), &cookie, &here, &good).await;
        assert_eq!(answer.status, 409, "{verb}");
    }
    cluster.converge().await;
    cluster.expect("select v from item where id = 1", EVIL).await;
    assert_eq!(post(address, "/logout", &cookie, &here, &good).await.status, 303);
    assert_eq!(get(address, "/", &cookie).await.status, 303);
}

#[tokio::test]
async fn what_is_not_on_the_page_is_on_the_next_one_under_the_same_filter() {
    let (cluster, address, _folder) = with_a_page().await;
    let cookie = log_in(address).await;
    let page = get(address, "/", &cookie).await.body;
    assert!(!page.contains("id=\"older\""), "{page}");
    cluster
        .admin(0)
        .await
        .run(
            "insert into anabranch.conflict_history (conflict_id, lost_at, detected_at, node, node_id, schema_name, table_name, key, \
                 conflict_type, policy, conflict_resolution, loser) \
             select md5(n::text)::uuid, now(), now() - interval '1 hour' - n * interval '1 s', 'n1', 1, 'public', 'many', \
                 jsonb_build_object('id', n), 'insert_exists', 'p', 'keep_local', 'remote' from generate_series(1, 450) n",
        )
        .await;
    for all in ["", "1"] {
        let mut path = format!("/?table=many&status=new&all={all}");
        let mut seen = std::collections::BTreeSet::new();
        for page in 1.. {
            let body = get(address, &path, &cookie).await.body;
            let keys = body.split("<td>id=").skip(1);
            let keys: Vec<String> = keys
                .map(|rest| rest.split('<').next().unwrap().to_owned())
                .collect();
            assert!(keys.len() <= 200, "{}", keys.len());
            seen.extend(keys);
            assert_eq!(body.contains("The newest"), page > 1, "{body}");
            let Some(older) = body.split("id=\"older\" href=\"").nth(1) else {
                assert_eq!(page, 3, "{body}");
                break;
            };
            path = older.split('"').next().unwrap().replace("&amp;", "&");
            assert!(
                path.contains("table=many") && path.contains("status=new"),
                "{path}"
            );
        }
        assert_eq!(seen.len(), 450);
    }
    assert_eq!(get(address, "/?until=soon", &cookie).await.status, 400);
}

fn secret_of(page: &str) -> String {
    let behind = page.split("name=\"secret\" value=\"").nth(1);
    behind.expect("a form").split('"').next().unwrap_or("").to_owned()
}

#[tokio::test]
async fn with_certificates_the_page_is_for_whom_the_authority_knows_and_reviews_under_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::create(&folder.path().join("ca"));
    let stranger = Authority::create(&folder.path().join("other")).issue("mallory");
    let (own, kim, lee) = (
        authority.issue("page"),
        authority.issue("kim"),
        authority.issue("lee"),
    );
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let cluster = with_a_conflict(&format!(
        "[web]\nlisten = \"{address}\"\n[web.tls]\ncert = {:?}\nkey = {:?}\nclient_ca = {:?}\n",
        own.cert, own.key, own.ca
    ))
    .await;
    let here = format!("https://{address}");
    let ask = async |who: Option<&Certificate>, what: (&str, &str), headers: &[(&str, &str)], body: &str| {
        request_tls(address, (&own.ca, "page", who), what, headers, body).await
    };
    until("the page answers", async || {
        ask(Some(&kim), ("GET", "/style.css"), &[], "").await.is_ok()
    })
    .await;
    // Without a certificate of the authority there is no answer, to nothing.
    for who in [None, Some(&stranger)] {
        for path in ["/", "/login", "/style.css"] {
            let refused = ask(who, ("GET", path), &[], "").await.unwrap_err();
            assert!(refused.contains("alert"), "{refused}");
        }
    }
    assert!(
        request(address, "GET", "/", &[], "")
            .await
            .map_or(0, |answer| answer.status)
            != 200,
        "the page answers in plain HTTP"
    );

    let id = cluster
        .value(0, "select conflict_id from anabranch.conflict_history")
        .await;
    let path = format!("/conflict/{id}");
    let page = ask(Some(&kim), ("GET", &path), &[], "").await.unwrap();
    assert_eq!(page.status, 200);
    let cookie = page.header("set-cookie").to_owned();
    assert!(
        cookie.contains("; Secure") && cookie.contains("HttpOnly"),
        "{cookie}"
    );
    let cookie = cookie.split(';').next().unwrap();
    let form = format!("secret={}&note=seen", secret_of(&page.body));
    let headers = [
        ("Cookie", cookie),
        ("Origin", here.as_str()),
        ("Content-Type", "application/x-www-form-urlencoded"),
    ];
    let ack = format!("{path}/ack");
    // Somebody else's certificate does not take a session over, and another site does not get a form through.
    assert_eq!(
        ask(Some(&lee), ("POST", &ack), &headers, &form)
            .await
            .unwrap()
            .status,
        403
    );
    let elsewhere = [headers[0], ("Origin", "https://evil.example"), headers[2]];
    assert_eq!(
        ask(Some(&kim), ("POST", &ack), &elsewhere, &form)
            .await
            .unwrap()
            .status,
        403
    );
    assert_eq!(
        ask(Some(&kim), ("POST", &ack), &headers, &form)
            .await
            .unwrap()
            .status,
        303
    );
    let status = "select concat_ws(' ', status, reviewed_by, note) from anabranch.conflict_history";
    assert_eq!(cluster.value(0, status).await, "acknowledged kim seen");
}

#[tokio::test]
async fn with_a_token_and_certificates_both_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::create(&folder.path().join("ca"));
    let (own, kim) = (authority.issue("page"), authority.issue("kim"));
    let token = folder.path().join("token");
    std::fs::write(&token, TOKEN).unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let _cluster = with_a_conflict(&format!(
        "[web]\nlisten = \"{address}\"\ntoken_file = {token:?}\n[web.tls]\ncert = {:?}\nkey = {:?}\nclient_ca = {:?}\n",
        own.cert, own.key, own.ca
    ))
    .await;
    let ask = async |what: (&str, &str), headers: &[(&str, &str)], body: &str| {
        request_tls(address, (&own.ca, "page", Some(&kim)), what, headers, body).await
    };
    until("the page answers", async || {
        ask(("GET", "/style.css"), &[], "").await.is_ok()
    })
    .await;
    let answer = ask(("GET", "/"), &[], "").await.unwrap();
    assert_eq!((answer.status, answer.header("location")), (303, "/login"));
    let form = [("Content-Type", "application/x-www-form-urlencoded")];
    let wrong = ask(("POST", "/login"), &form, "token=wrong&name=lee")
        .await
        .unwrap();
    assert_eq!(wrong.status, 403);
    let given = format!("token={TOKEN}&name=lee");
    let answer = ask(("POST", "/login"), &form, &given).await.unwrap();
    assert_eq!(answer.status, 303);
    let cookie = answer.header("set-cookie").split(';').next().unwrap().to_owned();
    let page = ask(("GET", "/"), &[("Cookie", &cookie)], "").await.unwrap();
    // Who it is is what the certificate says.
    assert!(
        page.status == 200 && page.body.contains("kim") && !page.body.contains("lee"),
        "{}",
        page.body
    );
}

/// A browser that a test steers, by the WebDriver protocol.
struct Browser {
    address: SocketAddr,
    session: String,
    driver: std::process::Child,
}

impl Browser {
    async fn start() -> Self {
        let port = free_port();
        let driver = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromedriver: apt-get install chromium chromium-driver");
        let mut browser = Self {
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            session: String::new(),
            driver,
        };
        let address = browser.address;
        until("chromedriver answers", async || {
            request(address, "GET", "/status", &[], "")
                .await
                .is_ok_and(|answer| answer.status == 200)
        })
        .await;
        let options = json!({"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900", "--disable-dev-shm-usage"]});
        let wanted = json!({"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}});
        let answer = browser.call("POST", "/session", wanted).await;
        browser.session = answer["sessionId"].as_str().expect("a session").to_owned();
        browser
    }

    async fn call(&self, method: &str, path: &str, body: Value) -> Value {
        let body = if method == "GET" {
            String::new()
        } else {
            body.to_string()
        };
        let answer = request(
            self.address,
            method,
            path,
            &[("Content-Type", "application/json")],
            &body,
        )
        .await
        .expect("chromedriver answers");
        let document: Value = serde_json::from_str(&answer.body).unwrap_or_default();
        assert_eq!(answer.status, 200, "{method} {path}: {document:#}");
        document["value"].clone()
    }

    async fn of_session(&self, method: &str, path: &str, body: Value) -> Value {
        self.call(method, &format!("/session/{}{path}", self.session), body)
            .await
    }

    async fn open(&self, url: &str) {
        self.of_session("POST", "/url", json!({ "url": url })).await;
    }

    async fn find(&self, css: &str) -> String {
        let found = self
            .of_session("POST", "/element", json!({"using": "css selector", "value": css}))
            .await;
        found
            .as_object()
            .and_then(|found| found.values().next())
            .and_then(Value::as_str)
            .expect("an element")
            .to_owned()
    }

    async fn click(&self, css: &str) {
        let element = self.find(css).await;
        self.of_session("POST", &format!("/element/{element}/click"), json!({}))
            .await;
    }

    async fn enter(&self, css: &str, text: &str) {
        let element = self.find(css).await;
        self.of_session(
            "POST",
            &format!("/element/{element}/value"),
            json!({ "text": text }),
        )
        .await;
    }

    async fn text(&self, css: &str) -> String {
        let element = self.find(css).await;
        let text = self
            .of_session("GET", &format!("/element/{element}/text"), Value::Null)
            .await;
        text.as_str().unwrap_or("").to_owned()
    }

    /// Writes a picture of the page.
    async fn screenshot(&self, path: &str) {
        let picture = self.of_session("GET", "/screenshot", Value::Null).await;
        let encoded = format!("{path}.base64");
        std::fs::write(&encoded, picture.as_str().unwrap_or("")).unwrap();
        let decoded = Command::new("base64").args(["-d", &encoded]).output().unwrap();
        std::fs::write(path, decoded.stdout).unwrap();
        std::fs::remove_file(encoded).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

#[tokio::test]
#[ignore = "needs chromium and chromium-driver"]
async fn in_a_browser_conflicts_are_listed_filtered_opened_and_replayed() {
    let (cluster, address, folder) = with_a_page().await;
    let pictures = std::env::var("IT_PICTURES").unwrap_or_else(|_| folder.path().display().to_string());
    let browser = Browser::start().await;
    browser.open(&format!("http://{address}/")).await;
    browser.enter("input[name=token]", TOKEN).await;
    browser.enter("input[name=name]", "kim").await;
    browser.click("button").await;
    assert!(browser.text("table.list").await.contains("public.item"));
    browser.screenshot(&format!("{pictures}/list.png")).await;

    browser.enter(".filters input[name=table]", "nothing").await;
    browser.click(".filters button").await;
    assert_eq!(browser.text(".empty").await, "No conflicts.");
    browser.open(&format!("http://{address}/?table=item&all=1")).await;
    browser.click("table.list tbody a").await;
    let sides = browser.text("table.sides").await;
    assert!(sides.contains(EVIL) && sides.contains("later"), "{sides}");
    browser.screenshot(&format!("{pictures}/one.png")).await;
    browser.click("#replay").await;
    assert_eq!(browser.text("#status").await, "replayed");
    browser.screenshot(&format!("{pictures}/replayed.png")).await;
    cluster.converge().await;
    cluster.expect("select v from item where id = 1", EVIL).await;
    browser.open(&format!("http://{address}/nodes")).await;
    assert!(browser.text("table.list").await.contains("connected"));
    browser.screenshot(&format!("{pictures}/nodes.png")).await;
    browser.of_session("DELETE", "", json!({})).await;
    drop(browser);
}
