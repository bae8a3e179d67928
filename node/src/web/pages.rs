//! The pages: the list, one conflict, the nodes, logging in.

use std::sync::Arc;
use std::time::Duration;

use anabranch_conflict::ConflictType;
use askama::Template;
use axum::extract::{ConnectInfo, Extension, Form, Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse, Redirect, Response};
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use serde::Deserialize;

use super::Page;
use super::session::{Session, same_origin};
use super::tls::Peer;
use crate::names::Names;
use crate::review::{self, Filter, Line, Replay, Status};
use crate::shared::lock;
use crate::status;

/// Lines on one page.
const LIMIT: u32 = 200;
/// A wrong token costs this much time.
const WRONG_TOKEN: Duration = Duration::from_millis(500);

type Shown = Result<Response, Failed>;

/// A page that says what went wrong.
pub(super) struct Failed(StatusCode, String);

impl From<review::Error> for Failed {
    fn from(error: review::Error) -> Self {
        let code = match &error {
            review::Error::NotFound(_) | review::Error::NotAnId(_) => StatusCode::NOT_FOUND,
            review::Error::Refused(_) | review::Error::Ambiguous(_) => StatusCode::CONFLICT,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self(code, error.to_string())
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let page = Message { text: &self.1 };
        (self.0, render(&page)).into_response()
    }
}

fn render(page: &impl Template) -> Response {
    match page.render() {
        Ok(html) => Html(html).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[derive(Template)]
#[template(path = "message.html")]
struct Message<'a> {
    text: &'a str,
}

#[derive(Template)]
#[template(path = "login.html")]
struct Login<'a> {
    node: &'a str,
    wrong: bool,
}

pub(super) async fn login_form(State(page): State<Arc<Page>>) -> Response {
    if !page.sessions.asks_for_a_token() {
        return Redirect::to("/").into_response();
    }
    render(&Login {
        node: &page.config.node.name,
        wrong: false,
    })
}

#[derive(Deserialize)]
pub(super) struct Credentials {
    token: String,
    name: String,
}

pub(super) async fn login(
    State(page): State<Arc<Page>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    headers: HeaderMap,
    Form(given): Form<Credentials>,
) -> Response {
    // Who has a certificate is called as it says.
    let name = peer.name.as_deref().unwrap_or(given.name.trim());
    let name = if name.is_empty() { "web" } else { name };
    let cookie = page
        .sessions
        .log_in(&given.token, name, peer.encrypted)
        .filter(|_| same_origin(&headers));
    match cookie {
        Some(cookie) => ([(header::SET_COOKIE, cookie)], Redirect::to("/")).into_response(),
        None => {
            tokio::time::sleep(WRONG_TOKEN).await;
            let form = Login {
                node: &page.config.node.name,
                wrong: true,
            };
            (StatusCode::FORBIDDEN, render(&form)).into_response()
        }
    }
}

/// What every form sends.
#[derive(Deserialize)]
pub(super) struct Sent {
    secret: String,
    note: Option<String>,
    columns: Option<String>,
    force: Option<String>,
}

/// Only a form that this session was given.
fn check(session: &Session, headers: &HeaderMap, sent: &Sent) -> Result<(), Failed> {
    if sent.secret == session.secret && same_origin(headers) {
        return Ok(());
    }
    let text = "this form is not of your session: go back, load the page again and send it from there";
    Err(Failed(StatusCode::FORBIDDEN, text.to_owned()))
}

pub(super) async fn logout(
    State(page): State<Arc<Page>>,
    Extension(session): Extension<Session>,
    headers: HeaderMap,
    Form(sent): Form<Sent>,
) -> Shown {
    check(&session, &headers, &sent)?;
    page.sessions.log_out(&session);
    Ok(Redirect::to("/login").into_response())
}

/// The list's form; every field may be empty.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Asked {
    table: String,
    kind: String,
    status: String,
    node: String,
    winner: String,
    key: String,
    hours: String,
    /// Detected at or after; stands before `hours`.
    since: String,
    /// Detected before; also where a page of older ones begins.
    until: String,
    all: String,
}

impl Asked {
    fn filter(&self, names: &Names) -> Result<Filter, Failed> {
        let given = |text: &str| (!text.trim().is_empty()).then(|| text.trim().to_owned());
        let wrong = |what: String| Failed(StatusCode::BAD_REQUEST, what);
        let hours = given(&self.hours).map(|hours| hours.parse::<i64>()).transpose();
        let hours = hours.map_err(|_| wrong(format!("{} is not a number of hours", self.hours)))?;
        let some_hours_ago = hours.and_then(|hours| {
            Timestamp::now()
                .checked_sub(hours.clamp(0, 1_000_000).hours())
                .ok()
        });
        let time = |text: &str| {
            let time =
                given(text).map(|text| time(&text).ok_or_else(|| wrong(format!("{text} is not a time"))));
            time.transpose()
        };
        let since = time(&self.since)?.or(some_hours_ago);
        let until = time(&self.until)?;
        let id = |name: &str| {
            let id = given(name).map(|name| {
                let id = names.id_of(&name);
                id.ok_or_else(|| wrong(format!("{name} is no node of this cluster")))
            });
            id.transpose()
        };
        // What is called otherwise would be looked for and not found.
        let kind = given(&self.kind);
        if let Some(kind) = &kind {
            kind.parse::<ConflictType>()
                .map_err(|error| wrong(error.to_string()))?;
        }
        let status = given(&self.status);
        if let Some(status) = &status {
            status.parse::<Status>().map_err(wrong)?;
        }
        let keys = given(&self.key).map_or(Ok(Vec::new()), |key| review::keys_of(&key).map_err(wrong))?;
        Ok(Filter {
            since: since.map(|since| since.to_string()),
            until: until.map(|until| until.to_string()),
            table: given(&self.table),
            kind,
            status,
            node: id(&self.node)?,
            winner: id(&self.winner)?,
            keys,
            // One more than is shown tells whether there are more.
            limit: LIMIT + 1,
            ..Filter::default()
        })
    }
}

struct Row {
    id: String,
    here: bool,
    detected: String,
    table: String,
    key: String,
    kind: String,
    winner: String,
    loser: String,
    lost: String,
    status: Status,
    at: String,
}

#[derive(Template)]
#[template(path = "list.html")]
struct List<'a> {
    node: &'a str,
    session: &'a Session,
    nodes: Vec<&'a str>,
    asked: &'a Asked,
    missing: Vec<String>,
    counted: i64,
    /// It is not known how many of them are asked for.
    counted_unknown: bool,
    rows: Vec<Row>,
    /// Where the page of older ones begins; empty where there are none.
    older: String,
}

/// As a person writes it, or a link of ours: RFC 3339, or in UTC without an offset, or a date.
fn time(text: &str) -> Option<Timestamp> {
    let in_utc = || text.parse::<DateTime>().ok()?.to_zoned(TimeZone::UTC).ok();
    let time = text.parse::<Timestamp>().ok();
    time.or_else(|| in_utc().map(|zoned| zoned.timestamp()))
}

fn short_time(text: &str) -> String {
    text.parse::<Timestamp>().map_or_else(
        |_| text.to_owned(),
        |time| format!("{time:.0}").replace('T', " ").replace('Z', ""),
    )
}

fn row((page, names): (&Page, &Names), line: &Line, status: Status, at: Vec<&str>) -> Row {
    let lost = match &line.lost_columns {
        Some(columns) if !columns.is_empty() => columns.join(", "),
        _ if line.lost_a_delete() => "(delete)".to_owned(),
        _ => String::new(),
    };
    Row {
        id: line.conflict_id.clone(),
        here: at.is_empty() || at.contains(&page.config.node.name.as_str()),
        detected: short_time(&line.detected_at),
        table: line.table(),
        key: line.key_text(),
        kind: line.conflict_type.clone(),
        winner: names.of(line.winning_origin()),
        loser: names.of(line.losing_origin()),
        lost,
        status,
        at: at.join(", "),
    }
}

pub(super) async fn list(
    State(page): State<Arc<Page>>,
    Extension(session): Extension<Session>,
    Query(asked): Query<Asked>,
) -> Shown {
    let names = page.names();
    let mut filter = asked.filter(&names)?;
    if filter.table.is_some() {
        let sql = page.sql().await?;
        filter.partitions = review::partitions(&sql, &filter).await?;
    }
    let counted_unknown = filter.is_of_lines_alone();
    let (mut missing, counted, rows);
    let shown = LIMIT as usize;
    // Of the last that is shown, if there are more.
    let until = |last: Option<&Line>, all: usize| match last {
        Some(last) if all > shown => last.until(),
        _ => String::new(),
    };
    let older;
    if asked.all.is_empty() {
        let sql = page.sql().await?;
        let lines = review::list(&sql, &filter).await?;
        counted = review::storm_count(&sql, &filter).await?;
        let some = lines.iter().take(shown);
        older = until(some.clone().next_back(), lines.len());
        rows = some
            .map(|line| row((&page, &names), line, line.status, Vec::new()))
            .collect();
        missing = Vec::new();
    } else {
        let joined = (page.conflicts)(filter).await;
        missing = joined.missing();
        missing.sort();
        counted = joined
            .nodes
            .iter()
            .map(|node| node.only_counted)
            .max()
            .unwrap_or(0);
        let some = joined.conflicts.iter().take(shown);
        older = until(
            some.clone().next_back().map(|conflict| &conflict.line),
            joined.conflicts.len(),
        );
        let each = some.map(|conflict| {
            let at = conflict.at.keys().map(String::as_str).collect();
            row((&page, &names), &conflict.line, conflict.status, at)
        });
        rows = each.collect();
    }
    Ok(render(&List {
        node: &page.config.node.name,
        session: &session,
        nodes: names.all().collect(),
        asked: &asked,
        missing,
        counted,
        counted_unknown,
        rows,
        older,
    }))
}

struct Cell {
    name: String,
    lost: bool,
    differs: bool,
    local: String,
    remote: String,
    applied: String,
}

struct Side {
    label: &'static str,
    local: String,
    remote: String,
}

#[derive(Template)]
#[template(path = "one.html")]
struct One<'a> {
    node: &'a str,
    session: &'a Session,
    line: &'a Line,
    winner: String,
    loser: String,
    local: String,
    remote: String,
    sides: Vec<Side>,
    cells: Vec<Cell>,
    explanation: Vec<String>,
    others: Vec<Row>,
    said: &'a str,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Said {
    said: String,
}

pub(super) async fn one(
    State(page): State<Arc<Page>>,
    Extension(session): Extension<Session>,
    Path(id): Path<String>,
    Query(said): Query<Said>,
) -> Shown {
    let names = page.names();
    let (line, others) = {
        let sql = page.sql().await?;
        let line = review::find(&sql, &id).await?;
        let others = review::group(&sql, &line).await?;
        (line, others)
    };
    let optional = |text: &Option<String>| text.clone().unwrap_or_default();
    let number = |number: Option<u64>| number.map_or_else(String::new, |number| number.to_string());
    let side = |label, local, remote| Side { label, local, remote };
    let cells = line.columns().into_iter().map(|name| Cell {
        name: name.to_owned(),
        lost: line.is_lost(name),
        differs: line.is_changed(name),
        local: line.shown(line.local_tuple.as_ref(), name),
        remote: line.shown(line.remote_tuple.as_ref(), name),
        applied: line.shown(line.applied_tuple.as_ref(), name),
    });
    // What may be said comes from our own redirects, and nothing else is shown.
    let said = match said.said.as_str() {
        "acknowledged" => "Acknowledged.",
        "dismissed" => "Dismissed.",
        "replayed" => "The lost values were written again.",
        _ => "",
    };
    Ok(render(&One {
        node: &page.config.node.name,
        session: &session,
        winner: names.of(line.winning_origin()),
        loser: names.of(line.losing_origin()),
        local: names.of(line.local_origin),
        remote: names.of(line.remote_origin),
        sides: vec![
            side(
                "commit time",
                optional(&line.local_commit_time),
                optional(&line.remote_commit_time),
            ),
            side("stamp", optional(&line.local_stamp), optional(&line.remote_stamp)),
            side("transaction id", number(line.local_xid), number(line.remote_xid)),
            side("LSN", optional(&line.local_lsn), optional(&line.remote_lsn)),
            side(
                "had seen of the other",
                optional(&line.local_saw),
                optional(&line.remote_saw),
            ),
        ],
        cells: cells.collect(),
        explanation: review::explain(&line, &|id| names.of(Some(id))),
        others: others
            .iter()
            .map(|other| row((&page, &names), other, other.status, Vec::new()))
            .collect(),
        said,
        line: &line,
    }))
}

pub(super) async fn act(
    State(page): State<Arc<Page>>,
    Extension(session): Extension<Session>,
    Path((id, verb)): Path<(String, String)>,
    headers: HeaderMap,
    Form(sent): Form<Sent>,
) -> Shown {
    check(&session, &headers, &sent)?;
    let note = sent.note.filter(|note| !note.trim().is_empty());
    let mut sql = page.sql().await?;
    let line = review::find(&sql, &id).await?;
    let said = match verb.as_str() {
        "ack" | "dismiss" => {
            let status = if verb == "ack" {
                Status::Acknowledged
            } else {
                Status::Dismissed
            };
            let ids = [line.conflict_id.clone()];
            if review::mark(&sql, &ids, status, &session.name, note.as_deref()).await? == 0 {
                let text = "this conflict was replayed; that stays its status";
                return Err(Failed(StatusCode::CONFLICT, text.to_owned()));
            }
            status
        }
        "replay" => {
            let columns = sent.columns.filter(|columns| !columns.trim().is_empty());
            let how = Replay {
                force: sent.force.is_some(),
                columns: columns
                    .map(|columns| columns.split(',').map(|name| name.trim().to_owned()).collect()),
                who: session.name.clone(),
                note,
                policies: Some(lock(&page.shared.resolver).policies().clone()),
            };
            review::replay(&mut sql, &line.conflict_id, &how).await?;
            Status::Replayed
        }
        _ => {
            return Err(Failed(
                StatusCode::NOT_FOUND,
                format!("nothing is called {verb} here"),
            ));
        }
    };
    let back = format!("/conflict/{}?said={said}", line.conflict_id);
    Ok(Redirect::to(&back).into_response())
}

#[derive(Template)]
#[template(path = "nodes.html")]
struct Nodes<'a> {
    node: &'a str,
    session: &'a Session,
    status: status::Status,
}

pub(super) async fn nodes(State(page): State<Arc<Page>>, Extension(session): Extension<Session>) -> Shown {
    let status = serde_json::from_value((page.status)()).unwrap_or_default();
    Ok(render(&Nodes {
        node: &page.config.node.name,
        session: &session,
        status,
    }))
}
