//! `anabranch-jepsen`: runs real clusters under load and faults, writes down what happened, and tries to prove
//! from it that a promise was broken.
//!
//! One role, one place: [`workload`] (tables and checks), [`generator`] (what next), [`client`] (runs it), [`nemesis`]
//! (faults), [`checker`] (questions), [`report`] (answers for people). [`run`] puts them together; [`history`] is
//! what they leave.

mod args;
mod checker;
mod client;
mod clock;
mod export;
mod generator;
mod history;
mod nemesis;
mod policy;
mod record;
mod report;
mod run;
mod shim;
mod suite;
mod system;
mod truth;
mod wal;
mod workload;

/// Why the harness itself could not go on.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
/// With the harness's own errors.
pub type Result<T> = std::result::Result<T, Error>;

fn main() -> std::process::ExitCode {
    let code = match args::main() {
        Ok(outcome) => outcome.code(),
        Err(error) => {
            eprintln!("anabranch-jepsen: {error}");
            checker::Outcome::Unknown.code()
        }
    };
    std::process::ExitCode::from(code)
}
