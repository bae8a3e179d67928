//! Small libraries that are preloaded into a server or a daemon, made from C where they are wanted.

use std::io::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Why there can be none here.
pub fn impossible() -> Option<String> {
    match Command::new("cc").arg("--version").output() {
        Ok(output) if output.status.success() => None,
        _ => Some("there is no C compiler `cc`".to_owned()),
    }
}

/// Makes `name.so` of C text in `dir`, which must be open to whoever preloads it.
///
/// # Errors
/// When the folder cannot be written, there is no compiler, or what it says.
pub fn library(dir: &Path, name: &str, source: &str) -> Result<PathBuf> {
    let (text, library) = (
        dir.join(name).with_extension("c"),
        dir.join(name).with_extension("so"),
    );
    std::fs::write(&text, source)?;
    let output = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-Wall", "-o"])
        .args([&library, &text])
        .arg("-ldl")
        .output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Error::other(format!("cc: {said}")));
    }
    Ok(library)
}
