//! `conflicts export`: every line, as it comes from the server, in a format of choice.

use std::fs::File;
use std::io::{BufWriter, Write};

use anabranch_node::config::Config;
use anabranch_node::review::{self, Line};
use serde_json::{Map, Value};
use tokio_postgres::Client;

use super::filter;
use crate::args::{Export, ExportFormat};
use crate::failure::Failure;

pub(super) async fn run(config: &Config, client: &Client, options: &Export) -> Result<(), Failure> {
    let filter = filter::read(config, &options.filters, 1)?;
    let failed = |error| match &options.file {
        Some(path) => Failure::io(format!("write {}", path.display()), error),
        None => Failure::io("print", error),
    };
    let out: Box<dyn Write> = match &options.file {
        Some(path) => Box::new(File::create(path).map_err(failed)?),
        None => Box::new(std::io::stdout()),
    };
    let mut out = Sink::new(options.format, BufWriter::new(out));
    let written = review::each(client, &filter, |line| out.line(&line).map_err(End)).await;
    let finished = match written {
        Ok(()) => out.finish(),
        Err(End(Ended::Io(error))) => Err(error),
        Err(End(Ended::Log(error))) => return Err(error.into()),
    };
    match finished {
        // A reader that went away (`| head`) is no failure of ours.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(()) => {
            let counted = review::storm_count(client, &filter).await?;
            if counted > 0 {
                eprintln!(
                    "anabranch: not in the export: {counted} losing write(s) that were only counted, in anabranch.conflict_storm"
                );
            }
            Ok(())
        }
    }
}

enum Ended {
    Io(std::io::Error),
    Log(review::Error),
}

struct End(Ended);

impl From<review::Error> for End {
    fn from(error: review::Error) -> Self {
        Self(Ended::Log(error))
    }
}

impl From<std::io::Error> for Ended {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

enum Sink<W: Write> {
    Csv { out: Box<csv::Writer<W>>, header: bool },
    Json { out: W, first: bool },
    Ndjson(W),
}

impl<W: Write> Sink<W> {
    fn new(format: ExportFormat, out: W) -> Self {
        match format {
            ExportFormat::Csv => Self::Csv {
                out: Box::new(csv::Writer::from_writer(out)),
                header: false,
            },
            ExportFormat::Json => Self::Json { out, first: true },
            ExportFormat::Ndjson => Self::Ndjson(out),
        }
    }

    fn line(&mut self, line: &Line) -> Result<(), Ended> {
        let json = serde_json::to_string(line).map_err(|error| Ended::Log(error.into()))?;
        match self {
            Self::Ndjson(out) => writeln!(out, "{json}")?,
            Self::Json { out, first } => {
                let before = if std::mem::take(first) { "[\n" } else { ",\n" };
                write!(out, "{before}{json}")?;
            }
            Self::Csv { out, header } => {
                let columns = columns(&json)?;
                if !std::mem::replace(header, true) {
                    out.write_record(columns.iter().map(|(name, _)| name))
                        .map_err(std::io::Error::from)?;
                }
                out.write_record(columns.iter().map(|(_, value)| value))
                    .map_err(std::io::Error::from)?;
            }
        }
        Ok(())
    }

    fn finish(self) -> std::io::Result<()> {
        match self {
            Self::Csv { mut out, .. } => out.flush(),
            Self::Json { mut out, first } => {
                out.write_all(if first { b"[]\n" } else { b"\n]\n" })?;
                out.flush()
            }
            Self::Ndjson(mut out) => out.flush(),
        }
    }
}

/// Columns sorted by name; rows and lists as JSON, NULL as nothing.
fn columns(json: &str) -> Result<Vec<(String, String)>, Ended> {
    let parsed: Map<String, Value> = serde_json::from_str(json).map_err(|error| Ended::Log(error.into()))?;
    let raw: std::collections::BTreeMap<String, Box<serde_json::value::RawValue>> =
        serde_json::from_str(json).map_err(|error| Ended::Log(error.into()))?;
    let text = |name: &str, value: &Value| match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        // As the server wrote it: a number of many digits stays as it is.
        _ => raw.get(name).map_or_else(String::new, |raw| raw.get().to_owned()),
    };
    Ok(parsed
        .iter()
        .map(|(name, value)| (name.clone(), text(name, value)))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_keeps_every_digit_and_quotes_what_must_be() {
        let columns = columns(r#"{"a": null, "b": "x,\"y\"", "c": {"n": 12345678901234567890.10}}"#)
            .map_err(|_| "unreadable")
            .unwrap();
        let mut out = csv::Writer::from_writer(Vec::new());
        out.write_record(columns.iter().map(|(_, value)| value)).unwrap();
        let text = String::from_utf8(out.into_inner().unwrap()).unwrap();
        assert_eq!(
            text,
            ",\"x,\"\"y\"\"\",\"{\"\"n\"\": 12345678901234567890.10}\"\n"
        );
    }
}
