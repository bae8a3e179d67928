//! `conflicts export`: every line, as it comes from the server, in a format of choice.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use anabranch_node::names::Names;
use anabranch_node::review::{self, Line};
use anabranch_node::small_file;
use serde_json::value::RawValue;
use tokio_postgres::Client;

use super::filter;
use crate::args::{Export, ExportFormat};
use crate::failure::Failure;
use crate::output::{Format, remark};

pub(super) async fn run(
    names: &Names,
    client: &Client,
    options: &Export,
    output: Format,
) -> Result<(), Failure> {
    let format = options.format.unwrap_or(match output {
        Format::Json => ExportFormat::Json,
        Format::Table => ExportFormat::Ndjson,
    });
    let mut filter = filter::read(names, &options.filters, 1)?;
    filter.partitions = review::partitions(client, &filter).await?;
    let failed = |error| match &options.file {
        Some(path) => Failure::io(format!("write {}", path.display()), error),
        None => Failure::io("print", error),
    };
    let out: Box<dyn Write> = match &options.file {
        Some(path) => Box::new(create(path).map_err(failed)?),
        None => Box::new(std::io::stdout()),
    };
    let mut out = Sink::new(format, BufWriter::new(out)).map_err(failed)?;
    let written = review::each(client, &filter, |line| out.line(&line).map_err(End)).await;
    let finished = match written {
        Ok(()) => out.finish(),
        Err(End(Ended::Io(error))) => Err(error),
        Err(End(Ended::Log(error))) => {
            // What is there can be read; that it is not all is said by the error.
            let _ = out.finish();
            return Err(error.into());
        }
    };
    match finished {
        // A reader that went away (`| head`) is no failure of ours.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(()) => {
            let counted = review::storm_count(client, &filter).await?;
            if counted > 0 {
                let whose = match filter.is_of_lines_alone() {
                    true => " (not known: how many of them are asked for)",
                    false => "",
                };
                remark(format_args!(
                    "anabranch: not in the export: {counted} losing write(s) that were only counted, in anabranch.conflict_storm{whose}"
                ));
            }
            Ok(())
        }
    }
}

/// An empty file that nobody else may read, also where there was one that others may: it is to hold rows. What is no file, such as
/// `/dev/stdout`, stays as it is.
fn create(path: &Path) -> std::io::Result<File> {
    let mut open = OpenOptions::new();
    open.write(true)
        .create(true)
        .truncate(false)
        .mode(small_file::MODE_FILE);
    let file = open.open(path)?;
    if file.metadata()?.is_file() {
        file.set_permissions(Permissions::from_mode(small_file::MODE_FILE))?;
        file.set_len(0)?;
    }
    Ok(file)
}

/// Those of a line, sorted: an export without lines has them, too.
const COLUMNS: [&str; 39] = [
    "applied_tuple",
    "apply_xid",
    "changed_columns",
    "conflict_id",
    "conflict_resolution",
    "conflict_type",
    "constraint_name",
    "detected_at",
    "error",
    "key",
    "local_commit_time",
    "local_lsn",
    "local_origin",
    "local_saw",
    "local_stamp",
    "local_tuple",
    "local_xid",
    "loser",
    "lost_at",
    "lost_columns",
    "node",
    "node_id",
    "note",
    "policy",
    "policy_version",
    "redacted_columns",
    "remote_commit_time",
    "remote_lsn",
    "remote_origin",
    "remote_saw",
    "remote_stamp",
    "remote_tuple",
    "remote_xid",
    "reviewed_at",
    "reviewed_by",
    "schema_name",
    "status",
    "table_name",
    "transaction_group",
];

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
    Csv(Box<csv::Writer<W>>),
    Json { out: W, first: bool },
    Ndjson(W),
}

impl<W: Write> Sink<W> {
    fn new(format: ExportFormat, out: W) -> std::io::Result<Self> {
        Ok(match format {
            ExportFormat::Csv => {
                let mut out = csv::Writer::from_writer(out);
                out.write_record(COLUMNS)?;
                Self::Csv(Box::new(out))
            }
            ExportFormat::Json => Self::Json { out, first: true },
            ExportFormat::Ndjson => Self::Ndjson(out),
        })
    }

    fn line(&mut self, line: &Line) -> Result<(), Ended> {
        let json = serde_json::to_string(line).map_err(|error| Ended::Log(error.into()))?;
        match self {
            Self::Ndjson(out) => writeln!(out, "{json}")?,
            Self::Json { out, first } => {
                let before = if std::mem::take(first) { "[\n" } else { ",\n" };
                write!(out, "{before}{json}")?;
            }
            Self::Csv(out) => {
                let columns = columns(&json)?;
                out.write_record(columns.iter().map(|(_, value)| value))
                    .map_err(std::io::Error::from)?;
            }
        }
        Ok(())
    }

    fn finish(self) -> std::io::Result<()> {
        match self {
            Self::Csv(mut out) => out.flush(),
            Self::Json { mut out, first } => {
                out.write_all(if first { b"[]\n" } else { b"\n]\n" })?;
                out.flush()
            }
            Self::Ndjson(mut out) => out.flush(),
        }
    }
}

/// Columns sorted by name; rows and lists as JSON, NULL as nothing. As the server wrote it: a number of many digits stays as it is, and a
/// document may be as deep as it likes.
fn columns(json: &str) -> Result<Vec<(String, String)>, Ended> {
    let unreadable = |error: serde_json::Error| Ended::Log(error.into());
    let raw: BTreeMap<String, Box<RawValue>> = serde_json::from_str(json).map_err(unreadable)?;
    raw.into_iter()
        .map(|(name, value)| {
            let text = match value.get() {
                "null" => String::new(),
                text if text.starts_with('"') => serde_json::from_str(text).map_err(unreadable)?,
                text => text.to_owned(),
            };
            Ok((name, text))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_others_could_read_is_emptied_and_closed_to_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "of before").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        create(&path).unwrap().write_all(b"row").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"row");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn the_header_is_that_of_a_line() {
        let line: Line = serde_json::from_str(
            r#"{"conflict_id": "", "detected_at": "", "lost_at": "", "node": "", "node_id": 1, "schema_name": "", "table_name": "",
                "key": {}, "conflict_type": "", "policy": "", "conflict_resolution": "", "loser": "", "status": "new"}"#,
        )
        .unwrap();
        let json = serde_json::to_string(&line).unwrap();
        let columns = columns(&json).map_err(|_| "unreadable").unwrap();
        let names: Vec<&str> = columns.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, COLUMNS);
    }

    #[test]
    fn a_deep_document_ends_no_export() {
        let deep = format!("{}{}", "[".repeat(1_000), "]".repeat(1_000));
        let columns = columns(&format!(r#"{{"a": {deep}}}"#));
        assert_eq!(
            columns.map_err(|_| "unreadable").unwrap(),
            [("a".to_owned(), deep)]
        );
    }

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
