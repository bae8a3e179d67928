//! A table's own resolver: a script that chooses one of the concurrent versions of a row.
//!
//! In:   the text of a script; the frontier of a row with its images      Out: the version that the row becomes
//! Holds: the compiled script
//! Invariants: 1. the choice is a function of the *set* of versions: they are sorted by stamp before the script sees them;
//!        2. it is the same on every machine, its failures included: operations and sizes are counted, never time, and a
//!        script reaches no clock, chance, file or other state; 3. whatever a script does, there is a choice ([`Outcome`])
//!
//! Only a choice, and no row that the script makes up: each version was accepted by a server once, with all its types and
//! constraints; a made-up row would first be checked when every node writes it, and one that is refused goes to quarantine,
//! with whatever each node showed before left in the table.
//!
//! On crash: nothing is lost here
//! Not here: which versions are the frontier ([`crate::merge::History`], [`crate::frontier`]), reading the file and the
//! images (node), what is written in the log of a script that failed (node: apply)

mod trial;
mod value;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use anabranch_proto::Stamp;
use rhai::packages::{
    ArithmeticPackage, BasicArrayPackage, BasicFnPackage, BasicIteratorPackage, BasicMapPackage,
    BasicMathPackage, BasicStringPackage, BitFieldPackage, LanguageCorePackage, LogicPackage,
    MoreStringPackage, Package as _,
};
use rhai::{
    AST, CallFnOptions, Dynamic, Engine, EvalAltResult, ImmutableString, OptimizationLevel, Position, Scope,
};
use uuid::Uuid;

pub use trial::Trial;
pub use value::Value;

/// The function that a script must have.
const FUNCTION: &str = "resolve";

/// Part of every policy's hash that has a script: nodes whose engine or limits differ may fail where others choose. To be
/// raised whenever either changes; the crates' versions are pinned for that.
pub const REVISION: &str = "rhai 1.27.0, rust_decimal 1.43.0, revision 3";

/// Steps of one choice.
const OPERATIONS_MAX: u64 = 50_000;
/// Calls within calls.
const CALLS_MAX: usize = 16;
/// Expressions within expressions.
const DEPTH_MAX: usize = 32;
/// Bytes of all texts in one value, and so of all rows of a conflict together.
const TEXT_MAX: usize = 512 << 10;
/// Elements of one array, and entries of one map, with all that is in them. The engine drops and measures them by recursion: so
/// many within each other must fit on a thread's stack.
const ELEMENTS_MAX: usize = 1_000;
const VARIABLES_MAX: usize = 128;
const FUNCTIONS_MAX: usize = 128;
/// Bytes of a script.
const SCRIPT_MAX: usize = 64 << 10;

const NAMESPACE: Uuid = Uuid::from_u128(0x2f8d_3c1b_5a90_4e67_b1f4_96c2_08d7_e35a);

/// A version of a row, as a script sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Names it, and is its place among the others.
    pub stamp: Stamp,
    /// The name of the node that wrote it: the same at every node.
    pub origin: String,
    /// Its columns by name; `None` for a delete.
    pub row: Option<BTreeMap<String, Value>>,
}

/// What kind of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// The script's own: an error that it met or threw.
    Error,
    /// It did more than it may.
    Limit,
    /// It ended, and what it returned is no choice.
    Choice,
}

/// A script did not choose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What kind.
    pub kind: FailureKind,
    /// What happened, without the place.
    pub message: String,
    /// Line and column, counted from 1, where they are known.
    pub place: Option<(usize, usize)>,
}

impl Failure {
    /// As PostgreSQL would call it: `external_routine_exception`, `statement_too_complex`,
    /// `invalid_parameter_value`.
    #[must_use]
    pub const fn sqlstate(&self) -> &'static str {
        match self.kind {
            FailureKind::Error => "38000",
            FailureKind::Limit => "54001",
            FailureKind::Choice => "22023",
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match self.place {
            Some((line, column)) => write!(f, " (line {line}, column {column})"),
            None => Ok(()),
        }
    }
}

/// Why a script is refused before it has decided anything.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It cannot be read.
    #[error("line {line}, column {column}: {text}")]
    Syntax {
        /// Counted from 1.
        line: usize,
        /// Counted from 1.
        column: usize,
        /// What the reader says.
        text: String,
    },
    /// Nothing to call.
    #[error("it has no `fn resolve(versions)`, with one parameter, which is what is called")]
    NoFunction,
    /// Too long.
    #[error("it is longer than {} KiB", SCRIPT_MAX >> 10)]
    TooLong,
    /// It returned something else than the index of one of the versions, in a conflict that was made up to try it.
    #[error("in a conflict of {versions} versions that was made up to try it: {failure}")]
    NoChoice {
        /// Of the made-up conflict.
        versions: usize,
        /// What it did.
        failure: Failure,
    },
}

/// A compiled script.
pub struct Script {
    name: String,
    text: String,
    engine: Engine,
    ast: AST,
    trial: Trial,
}

impl Script {
    /// Compiles a script and tries it with made-up conflicts. `name` is what it is called: its file.
    ///
    /// # Errors
    /// When it cannot be compiled, has no `resolve`, or chooses what there is not.
    pub fn new(name: &str, text: &str) -> Result<Self, Refusal> {
        if text.len() > SCRIPT_MAX {
            return Err(Refusal::TooLong);
        }
        let engine = engine();
        let ast = engine.compile(text).map_err(|error| {
            let (line, column) = place(error.position()).unwrap_or((1, 1));
            Refusal::Syntax {
                line,
                column,
                text: error.err_type().to_string(),
            }
        })?;
        if !ast
            .iter_functions()
            .any(|function| function.name == FUNCTION && function.params.len() == 1)
        {
            return Err(Refusal::NoFunction);
        }
        let mut script = Self {
            name: name.to_owned(),
            text: text.to_owned(),
            engine,
            ast,
            trial: Trial::default(),
        };
        script.trial = trial::run(&script)?;
        Ok(script)
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What came of trying it.
    #[must_use]
    pub const fn trial(&self) -> &Trial {
        &self.trial
    }

    /// Eight hexadecimal digits that tell its text from others.
    #[must_use]
    pub fn short_hash(&self) -> String {
        let mut hash = Uuid::new_v5(&NAMESPACE, self.text.as_bytes())
            .simple()
            .to_string();
        hash.truncate(8);
        hash
    }

    /// Chooses among versions that do not cover each other, given in any order.
    #[must_use]
    pub fn choose(&self, candidates: &[Candidate]) -> Outcome {
        let mut sorted: Vec<&Candidate> = candidates.iter().collect();
        sorted.sort_by_key(|candidate| candidate.stamp);
        let stamp =
            |candidate: Option<&&Candidate>| candidate.map_or(Stamp::ZERO, |candidate| candidate.stamp);
        let (chosen, failure) = match self.call(&sorted) {
            Ok(index) => (sorted.get(index), None),
            Err(failure) => (sorted.last(), Some(failure)),
        };
        Outcome {
            chosen: stamp(chosen),
            failure,
        }
    }

    fn call(&self, sorted: &[&Candidate]) -> Result<usize, Failure> {
        let versions: rhai::Array = sorted.iter().map(|candidate| shown(candidate)).collect();
        let texts: usize = sorted.iter().map(|candidate| text_len(candidate)).sum();
        if texts > TEXT_MAX {
            return Err(Failure {
                kind: FailureKind::Limit,
                message: format!("the rows hold {texts} bytes of text, and a script takes {TEXT_MAX}"),
                place: None,
            });
        }
        let options = CallFnOptions::new().eval_ast(false);
        let call = || {
            let mut scope = Scope::new();
            self.engine.call_fn_with_options::<Dynamic>(
                options,
                &mut scope,
                &self.ast,
                FUNCTION,
                (Dynamic::from_array(versions),),
            )
        };
        // A panic would be a fault of the engine, and the same at every node.
        let returned = match catch_unwind(AssertUnwindSafe(call)) {
            Ok(returned) => returned.map_err(|error| failure(&error))?,
            Err(_) => {
                return Err(Failure {
                    kind: FailureKind::Error,
                    message: "the script engine failed".to_owned(),
                    place: None,
                });
            }
        };
        let index = returned
            .as_int()
            .ok()
            .and_then(|index| usize::try_from(index).ok());
        index.filter(|index| *index < sorted.len()).ok_or_else(|| {
            let what = match returned.as_int() {
                Ok(index) => index.to_string(),
                Err(type_name) => format!("a value of type {type_name}"),
            };
            let last = sorted.len().saturating_sub(1);
            Failure {
                kind: FailureKind::Choice,
                message: format!(
                    "the script returned {what}, and not the index of one of the versions, from 0 to {last}"
                ),
                place: None,
            }
        })
    }
}

/// What was chosen: of a script that failed, by the default policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The version that the row becomes. If the script failed, the one with the highest stamp, at every node.
    pub chosen: Stamp,
    /// Why the script did not choose.
    pub failure: Option<Failure>,
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Script")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl PartialEq for Script {
    fn eq(&self, other: &Self) -> bool {
        (&self.name, &self.text) == (&other.name, &other.text)
    }
}

impl Eq for Script {}

/// As in logs: the file's name, and a hash of what is in it.
impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "script {} ({})", self.name, self.short_hash())
    }
}

fn engine() -> Engine {
    let mut engine = Engine::new_raw();
    LanguageCorePackage::new().register_into_engine(&mut engine);
    ArithmeticPackage::new().register_into_engine(&mut engine);
    BasicStringPackage::new().register_into_engine(&mut engine);
    BasicIteratorPackage::new().register_into_engine(&mut engine);
    BasicFnPackage::new().register_into_engine(&mut engine);
    LogicPackage::new().register_into_engine(&mut engine);
    BitFieldPackage::new().register_into_engine(&mut engine);
    BasicMathPackage::new().register_into_engine(&mut engine);
    BasicArrayPackage::new().register_into_engine(&mut engine);
    BasicMapPackage::new().register_into_engine(&mut engine);
    MoreStringPackage::new().register_into_engine(&mut engine);
    // The core package has it, whatever features the crate is built with.
    engine.register_fn("sleep", |_: i64| -> Result<(), Box<EvalAltResult>> {
        Err("a script cannot sleep".into())
    });
    // The package's own make the whole result before anybody looks at its size.
    engine.register_fn("replace", |text: &mut ImmutableString, find: &str, with: &str| {
        replace(text, find, with)
    });
    engine.register_fn("replace", |text: &mut ImmutableString, find: char, with: &str| {
        replace(text, find.encode_utf8(&mut [0; 4]), with)
    });
    for symbol in ["eval", "print", "debug"] {
        engine.disable_symbol(symbol);
    }
    engine.on_print(|_| {});
    engine.on_debug(|_, _, _| {});
    engine
        .set_optimization_level(OptimizationLevel::None)
        .set_fail_on_invalid_map_property(true)
        .set_strict_variables(true)
        .set_max_operations(OPERATIONS_MAX)
        .set_max_call_levels(CALLS_MAX)
        .set_max_expr_depths(DEPTH_MAX, DEPTH_MAX)
        .set_max_string_size(TEXT_MAX)
        .set_max_array_size(ELEMENTS_MAX)
        .set_max_map_size(ELEMENTS_MAX)
        .set_max_variables(VARIABLES_MAX)
        .set_max_functions(FUNCTIONS_MAX);
    engine
}

/// `text.replace(find, with)`, if the result is not longer than a text may be.
fn replace(text: &mut ImmutableString, find: &str, with: &str) -> Result<(), Box<EvalAltResult>> {
    if text.is_empty() {
        return Ok(());
    }
    let count = text.matches(find).count();
    let left = text.len().saturating_sub(count.saturating_mul(find.len()));
    if left.saturating_add(count.saturating_mul(with.len())) > TEXT_MAX {
        let what = "Length of string".to_owned();
        return Err(EvalAltResult::ErrorDataTooLarge(what, Position::NONE).into());
    }
    *text = text.replace(find, with).into();
    Ok(())
}

fn shown(candidate: &Candidate) -> Dynamic {
    let mut map = rhai::Map::new();
    map.insert("origin".into(), candidate.origin.clone().into());
    map.insert("deleted".into(), candidate.row.is_none().into());
    let row = candidate.row.as_ref().map_or(Dynamic::UNIT, |row| {
        let columns = row
            .iter()
            .map(|(name, value)| (name.as_str().into(), value.to_dynamic()));
        Dynamic::from_map(columns.collect())
    });
    map.insert("row".into(), row);
    Dynamic::from_map(map)
}

fn text_len(candidate: &Candidate) -> usize {
    candidate
        .row
        .iter()
        .flatten()
        .map(|(_, value)| value.text_len())
        .sum()
}

fn place(position: Position) -> Option<(usize, usize)> {
    Some((position.line()?, position.position().unwrap_or(1)))
}

fn failure(error: &EvalAltResult) -> Failure {
    let inner = error.unwrap_inner();
    let kind = match inner {
        EvalAltResult::ErrorTooManyOperations(_)
        | EvalAltResult::ErrorTooManyVariables(_)
        | EvalAltResult::ErrorStackOverflow(_)
        | EvalAltResult::ErrorDataTooLarge(..) => FailureKind::Limit,
        _ => FailureKind::Error,
    };
    let place = place(inner.position()).or_else(|| place(error.position()));
    let message = match inner {
        EvalAltResult::ErrorTooManyOperations(_) => {
            format!("the script does more than {OPERATIONS_MAX} operations")
        }
        EvalAltResult::ErrorStackOverflow(_) => format!("more than {CALLS_MAX} calls within each other"),
        // Its text ends with the place, which is told apart.
        other => {
            let text = other.to_string();
            let tail = format!(" ({})", other.position());
            text.strip_suffix(&tail).unwrap_or(&text).to_owned()
        }
    };
    Failure { kind, message, place }
}

#[cfg(test)]
mod tests;
