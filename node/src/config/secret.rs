//! Connection strings without their passwords.

use serde::Serializer;

/// `dsn` with every password replaced by `***`; whatever is not plainly `key=value` or a URL is not shown at all,
/// since nobody knows where its password would be.
#[must_use]
pub fn redact(dsn: &str) -> String {
    match dsn
        .strip_prefix("postgresql://")
        .or_else(|| dsn.strip_prefix("postgres://"))
    {
        Some(rest) => redact_url(rest),
        None => redact_pairs(dsn),
    }
}

/// A password may stand between user and host, and among the parameters. Where an `@` or `?` of its own makes it unclear
/// which part is which, nothing is shown.
fn redact_url(rest: &str) -> String {
    let (user, host) = rest
        .rsplit_once('@')
        .map_or((None, rest), |(user, host)| (Some(user), host));
    if user.is_some_and(|user| user.contains(['@', '?', '/'])) {
        return "postgresql://***".to_owned();
    }
    let user = user.map_or(String::new(), |user| match user.split_once(':') {
        Some((user, _)) => format!("{user}:***@"),
        None => format!("{user}@"),
    });
    let (host, parameters) = host
        .split_once('?')
        .map_or((host, None), |(host, rest)| (host, Some(rest)));
    let parameters = parameters.map_or(String::new(), |parameters| {
        let each: Vec<String> = parameters
            .split('&')
            .map(|pair| match pair.split_once('=') {
                Some((key, _)) if is_secret(key) => format!("{key}=***"),
                _ => pair.to_owned(),
            })
            .collect();
        format!("?{}", each.join("&"))
    });
    format!("postgresql://{user}{host}{parameters}")
}

/// `key = value`, values perhaps in single quotes with backslash escapes.
fn redact_pairs(dsn: &str) -> String {
    let mut out = String::new();
    let mut rest = dsn.trim_start();
    while let Some((key, after)) = rest.split_once('=') {
        let key = key.trim();
        if key.contains(char::is_whitespace) {
            return "***".to_owned();
        }
        let after = after.trim_start();
        let end = value_end(after);
        let value = after.get(..end).unwrap_or(after);
        if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(key);
        out.push('=');
        out.push_str(if is_secret(key) { "***" } else { value });
        rest = after.get(end..).unwrap_or("").trim_start();
    }
    if rest.is_empty() { out } else { "***".to_owned() }
}

fn value_end(text: &str) -> usize {
    let quoted = text.starts_with('\'');
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(usize::from(quoted)) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '\'' if quoted => return at + 1,
            c if !quoted && c.is_whitespace() => return at,
            _ => {}
        }
    }
    text.len()
}

fn is_secret(key: &str) -> bool {
    matches!(key, "password" | "sslpassword" | "passfile")
}

pub(super) fn serialize<S: Serializer>(dsn: &str, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&redact(dsn))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_form_of_a_password_is_shown() {
        for dsn in [
            "host=db password=hunter2 user=a",
            "host=db password='hunter2 \\' hunter2' user=a",
            "host=db password = hunter2  user=a",
            "postgres://a:hunter2@db/x",
            "postgresql://a@db/x?password=hunter2&application_name=y",
            "host=db hunter2",
            "host=db hunter2 user=x",
            "postgres://a:hun?ter2@db/x",
            "postgres://a:hun@ter2@db/x",
            "postgres://a@db/x?password=hun@ter2",
        ] {
            let shown = redact(dsn);
            assert!(
                !shown.contains("hun") && !shown.contains("ter2"),
                "{dsn} became {shown}"
            );
        }
        assert_eq!(redact("host=db password=x user=a"), "host=db password=*** user=a");
        assert_eq!(
            redact("user=a sslmode=verify-full password=x"),
            "user=a sslmode=verify-full password=***"
        );
        assert_eq!(redact("postgres://a:x@db/y"), "postgresql://a:***@db/y");
    }
}
