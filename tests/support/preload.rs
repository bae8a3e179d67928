//! Small libraries that are preloaded into a server or a daemon, made from C where they are wanted.

use std::io::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// A program into which this is preloaded ends before it begins.
const ENDS: &str =
    "#include <unistd.h>\n__attribute__((constructor)) static void begin(void) { _exit(42); }\n";

/// Why there can be none here. That there is a compiler does not say that it has what it needs, nor that anything is preloaded: one is made
/// and preloaded, once for this process.
pub fn impossible() -> Option<String> {
    static WHY: OnceLock<Option<String>> = OnceLock::new();
    WHY.get_or_init(|| match Command::new("cc").arg("--version").output() {
        Ok(output) if output.status.success() => tried().err().map(|error| error.to_string()),
        _ => Some("there is no C compiler `cc`".to_owned()),
    })
    .clone()
}

fn tried() -> Result<()> {
    let dir = crate::postgres::open_dir("anabranch-preload-");
    let library = library(dir.path(), "ends", ENDS)?;
    let status = Command::new("true").env("LD_PRELOAD", library).status()?;
    match status.code() {
        Some(42) => Ok(()),
        _ => Err(Error::other("what LD_PRELOAD names is not preloaded")),
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
