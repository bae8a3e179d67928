//! The `anabranch` command.
//!
//! Exit codes: 0 done, 1 failed or a precondition is not met, 2 wrong usage. `verify` and `repair` answer a question, so
//! theirs are `diff`'s: 0 equal, 1 different, 2 could not tell; `tables add`, `wait` and `status --check` have their own, too.
//!
//! [`args`] – what can be asked for; [`command`] – one verb a file; [`output`] – tables and JSON from the same values.

mod args;
mod command;
mod failure;
mod output;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Args, Cluster, Verb};
use crate::failure::Failure;
use crate::output::Format;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let args = Args::parse();
    let format = args.output;
    match dispatch(args) {
        Ok(code) => code,
        Err(failure) => report(&failure, format),
    }
}

fn dispatch(args: Args) -> Result<ExitCode, Failure> {
    if let Verb::Completion { shell } = args.verb {
        return command::completion::run(shell);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|source| Failure::io("start", source))?;
    // Boxed: the future of a command holds connections and whole catalogs.
    runtime.block_on(Box::pin(run(args)))
}

async fn run(args: Args) -> Result<ExitCode, Failure> {
    let (config, format) = (args.config, args.output);
    match args.verb {
        Verb::Init(verb) => command::init::run(&config, &verb, format).await,
        Verb::Cluster {
            verb: Cluster::Create(verb),
        } => command::init::create(&config, &verb, format).await,
        Verb::Doctor => command::doctor::run(&config, format).await,
        Verb::Run(verb) => command::run::run(&config, &verb).await,
        Verb::Status(verb) => command::status::run(&config, &verb, format).await,
        Verb::Wait(verb) => Ok(command::wait::run(&config, &verb, format).await),
        Verb::Conflicts(review) => command::conflicts::run(&config, &review, format).await,
        Verb::Policy { verb } => Box::pin(command::policy::run(&config, &verb, format)).await,
        Verb::Grants(verb) => command::grants::run(&config, &verb, format).await,
        Verb::Remove(verb) => command::remove::run(&config, &verb, format).await,
        Verb::Join(verb) => command::join::run(&config, &verb, format).await,
        Verb::Leave(verb) => command::leave::run(&config, &verb, format).await,
        Verb::Node { verb } => command::node::run(&config, &verb, format).await,
        Verb::Verify(verb) => Ok(command::verify::verify(&config, &verb, format).await),
        Verb::Repair(verb) => Ok(command::verify::repair(&config, &verb, format).await),
        Verb::Heal(verb) => command::heal::run(&config, &verb, format).await,
        Verb::Ddl(verb) => command::ddl::run(&config, &verb, format).await,
        Verb::Sequences { verb } => command::sequences::run(&config, &verb, format).await,
        Verb::Tables { verb } => command::tables::run(&config, &verb, format).await,
        Verb::Config => command::config::run(&config, format),
        Verb::Demo(verb) => command::demo::run(&verb, format).await,
        Verb::Completion { shell } => command::completion::run(shell),
    }
}

pub(crate) fn report(failure: &Failure, format: Format) -> ExitCode {
    match format {
        Format::Table => output::remark(output::plain(&format!("anabranch: {failure}"))),
        Format::Json => output::remark(serde_json::json!({ "error": failure.to_string() })),
    }
    failure.code()
}
