//! Who is logged in, and whose form it is.
//!
//! Holds: at most [`SESSIONS_MAX`] sessions, in memory
//! Invariants: 1. a session's id is in a cookie that scripts and other sites do not get; 2. its second secret is only in
//!        the page's own forms

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Redirect, Response};
use rand::Rng;
use sha2::{Digest, Sha256};

use super::Page;
use super::tls::Peer;
use crate::shared::lock;

const COOKIE: &str = "anabranch_session";
const SESSIONS_MAX: usize = 1_000;
/// A session ends after so long.
const SESSION_AGE: Duration = Duration::from_secs(12 * 3_600);

/// A reviewer who gave the token, or has a certificate.
#[derive(Debug, Clone)]
pub(super) struct Session {
    /// Who, in their own words.
    pub(super) name: String,
    /// In every form of theirs.
    pub(super) secret: String,
    id: String,
    began: Instant,
}

#[derive(Default)]
pub(super) struct Sessions {
    /// Without one nobody logs in: who has a certificate is in.
    token: Option<[u8; 32]>,
    open: Mutex<HashMap<String, Session>>,
}

impl Sessions {
    pub(super) fn new(token: &str) -> Self {
        Self {
            token: Some(Sha256::digest(token).into()),
            open: Mutex::default(),
        }
    }

    /// Of whoever shows a certificate.
    pub(super) fn of_certificates() -> Self {
        Self::default()
    }

    /// Does anybody have to log in?
    pub(super) const fn asks_for_a_token(&self) -> bool {
        self.token.is_some()
    }

    /// The cookie of a new session, if the token is right. Digests are compared: their timing says nothing.
    pub(super) fn log_in(&self, token: &str, name: &str, encrypted: bool) -> Option<String> {
        let given: [u8; 32] = Sha256::digest(token.trim()).into();
        (self.token == Some(given)).then(|| self.begin(name, encrypted).1)
    }

    /// A new session, and its cookie.
    fn begin(&self, name: &str, encrypted: bool) -> (Session, String) {
        let session = Session {
            name: name.to_owned(),
            secret: random(),
            id: random(),
            began: Instant::now(),
        };
        let secure = if encrypted { "; Secure" } else { "" };
        let cookie = format!(
            "{COOKIE}={}; Path=/; HttpOnly; SameSite=Strict{secure}",
            session.id
        );
        let mut open = lock(&self.open);
        open.retain(|_, session| session.began.elapsed() < SESSION_AGE);
        if open.len() >= SESSIONS_MAX
            && let Some(oldest) = open.values().min_by_key(|session| session.began)
        {
            let id = oldest.id.clone();
            open.remove(&id);
        }
        open.insert(session.id.clone(), session.clone());
        (session, cookie)
    }

    pub(super) fn log_out(&self, session: &Session) {
        lock(&self.open).remove(&session.id);
    }

    fn find(&self, headers: &HeaderMap) -> Option<Session> {
        let cookies = headers.get_all(header::COOKIE).iter();
        let mut pairs = cookies
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(';'))
            .filter_map(|pair| pair.trim().split_once('='));
        let (_, id) = pairs.find(|(name, _)| *name == COOKIE)?;
        let session = lock(&self.open).get(id).cloned()?;
        (session.began.elapsed() < SESSION_AGE).then_some(session)
    }
}

/// 32 hexadecimal digits from the system's generator.
fn random() -> String {
    let bytes: [u8; 16] = rand::rng().random();
    hex::encode(bytes)
}

/// Lets only sessions through; a certificate begins one where no token is asked for.
pub(super) async fn require(
    State(page): State<Arc<Page>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    mut request: Request,
    next: Next,
) -> Response {
    // A cookie goes with the certificate that it was given to.
    let of_peer = |session: &Session| peer.name.as_ref().is_none_or(|name| *name == session.name);
    let found = page.sessions.find(request.headers()).filter(of_peer);
    if let Some(session) = found {
        request.extensions_mut().insert(session);
        return next.run(request).await;
    }
    let (None, Some(name)) = (page.sessions.token, &peer.name) else {
        return Redirect::to("/login").into_response();
    };
    let (session, cookie) = page.sessions.begin(name, peer.encrypted);
    request.extensions_mut().insert(session);
    let mut response = next.run(request).await;
    if let Ok(cookie) = HeaderValue::from_str(&cookie) {
        response.headers_mut().append(header::SET_COOKIE, cookie);
    }
    response
}

/// Does the request come from a page of this address? A browser says where a form was.
pub(super) fn same_origin(headers: &HeaderMap) -> bool {
    let text = |name| {
        headers
            .get(name)
            .and_then(|value: &axum::http::HeaderValue| value.to_str().ok())
    };
    match (text(header::ORIGIN), text(header::HOST)) {
        (None, _) => true,
        (Some(origin), Some(host)) => origin.split_once("://").is_some_and(|(_, from)| from == host),
        (Some(_), None) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.clone(), value.parse().unwrap()))
            .collect()
    }

    #[test]
    fn only_the_token_opens_a_session_and_only_its_cookie_finds_it() {
        let sessions = Sessions::new("0123456789abcdef");
        assert!(sessions.log_in("0123456789abcdeF", "kim", false).is_none());
        let cookie = sessions.log_in(" 0123456789abcdef\n", "kim", false).unwrap();
        assert!(
            cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"),
            "{cookie}"
        );
        let pair = cookie.split(';').next().unwrap();
        let sent = format!("other=1; {pair}");
        let found = sessions.find(&headers(&[(header::COOKIE, &sent)])).unwrap();
        assert_eq!(found.name, "kim");
        assert_ne!(found.secret, found.id);
        assert!(
            sessions
                .find(&headers(&[(header::COOKIE, "anabranch_session=")]))
                .is_none()
        );
        assert!(!cookie.contains("Secure"), "{cookie}");
        let encrypted = sessions.log_in("0123456789abcdef", "kim", true).unwrap();
        assert!(encrypted.ends_with("; Secure"), "{encrypted}");
        assert!(Sessions::of_certificates().log_in("", "kim", true).is_none());
        sessions.log_out(&found);
        assert!(sessions.find(&headers(&[(header::COOKIE, &sent)])).is_none());
    }

    #[test]
    fn a_form_of_another_site_is_known_by_its_origin() {
        let host = (header::HOST, "127.0.0.1:7480");
        assert!(same_origin(&headers(std::slice::from_ref(&host))));
        assert!(same_origin(&headers(&[
            host.clone(),
            (header::ORIGIN, "http://127.0.0.1:7480")
        ])));
        assert!(!same_origin(&headers(&[
            host.clone(),
            (header::ORIGIN, "http://evil.example")
        ])));
        assert!(!same_origin(&headers(&[host, (header::ORIGIN, "null")])));
    }
}
