//! HTTP as a browser speaks it, a connection for each request.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::certs::Certificate;
use crate::wait::PATIENCE;

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// Such as 200.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// The document.
    pub body: String,
}

impl Answer {
    /// A header's value, empty when it was not sent.
    pub fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(header, _)| header == name);
        found.map_or("", |(_, value)| value)
    }
}

/// Sends a request; `headers` beside Host, Content-Length and Connection.
pub async fn request(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> std::io::Result<Answer> {
    let text = written(address, method, path, headers, body);
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(text.as_bytes()).await?;
    let mut bytes = Vec::new();
    // Some servers keep the connection, whatever they are asked for.
    while !is_whole(&bytes) && stream.read_buf(&mut bytes).await? > 0 {}
    Ok(read(&bytes))
}

/// As [`request`], by HTTPS with the program `openssl`: the server shows a certificate of the authority `ca` for `name`, the client
/// `certificate`, if there is one. What went wrong is what openssl said.
pub async fn request_tls(
    address: SocketAddr,
    (ca, name, certificate): (&Path, &str, Option<&Certificate>),
    (method, path): (&str, &str),
    headers: &[(&str, &str)],
    body: &str,
) -> Result<Answer, String> {
    let mut openssl = tokio::process::Command::new("openssl");
    openssl.args([
        "s_client",
        "-quiet",
        "-ign_eof",
        "-verify_return_error",
        "-verify_hostname",
        name,
    ]);
    openssl
        .args(["-servername", name, "-connect", &address.to_string()])
        .arg("-CAfile")
        .arg(ca);
    if let Some(Certificate { cert, key, .. }) = certificate {
        openssl.arg("-cert").arg(cert).arg("-key").arg(key);
    }
    let pipes = openssl
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut client = pipes.kill_on_drop(true).spawn().expect("openssl");
    let text = written(address, method, path, headers, body);
    let mut stdin = client.stdin.take().expect("a pipe");
    // Refused, it ends before it has read all.
    let _ = stdin.write_all(text.as_bytes()).await;
    let done = client.wait_with_output();
    let done = tokio::time::timeout(PATIENCE, done)
        .await
        .expect("openssl ends")
        .expect("openssl");
    drop(stdin);
    if done.stdout.starts_with(b"HTTP/") {
        return Ok(read(&done.stdout));
    }
    Err(String::from_utf8_lossy(&done.stderr).into_owned())
}

fn written(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> String {
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
    text
}

fn read(bytes: &[u8]) -> Answer {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok());
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let chunked = headers
        .iter()
        .any(|(name, value)| name == "transfer-encoding" && value == "chunked");
    assert!(!chunked, "answers are sent whole");
    Answer {
        status: status.unwrap_or(0),
        headers,
        body: body.to_owned(),
    }
}

fn is_whole(bytes: &[u8]) -> bool {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        return false;
    };
    let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    length
        .and_then(|length| length.trim().parse::<usize>().ok())
        .is_some_and(|length| bytes.len() >= end + 4 + length)
}

/// A value in a form or a query.
pub fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}
