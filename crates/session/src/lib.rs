//! The library behind the `lathe` command: find a model, open it on a device, talk with it, measure
//! it. A server, a Python module or a planner stands on it too. It knows nothing of terminals or of
//! HTTP.
//!
//! The way in: [`Catalogue`] turns a name into files, [`open()`] opens them,
//! [`Opened::prepare`] lays the weights out for a device, [`Session::into_engine`] gives an engine,
//! and [`generate()`] streams one answer. [`measure`] holds what `inspect` and `bench` do.
//!
//! ```
//! use lathe_session::{Catalogue, Device, Environment, Need, Options, SamplingChoice};
//! use lathe_session::{SessionError, Silent, encode_raw, generate, open};
//!
//! # fn main() -> Result<(), SessionError> {
//! let catalogue = Catalogue { environment: &Environment::from_process(), reporter: &Silent };
//! let opened = open(&catalogue, "tiny", &Default::default())?;
//! let prompt = encode_raw(&opened.model, "Once upon a time")?;
//! let choice = SamplingChoice { max_tokens: Some(8), ..SamplingChoice::default() };
//! let request = choice.request(prompt, &opened.model.generation);
//! let options = Options { device: Device::Cpu, ..Options::default() };
//! let need = Need { context: 64, sequences: 1, rows_max: None };
//! let (mut engine, model) = opened.prepare(&options, need)?.into_engine(true, 1)?;
//! let decoder = model.tokenizer.as_ref().map(lathe_session::decoder);
//! let show = |text: &str| -> Result<(), SessionError> { print!("{text}"); Ok(()) };
//! let answer = generate(&mut engine, request, decoder, || false, show)?;
//! assert!(answer.tokens.len() <= 8);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

pub mod catalogue;
mod conversation;
mod drafting;
mod error;
mod finite;
mod generate;
pub mod measure;
pub mod memory;
mod open;
mod options;
mod progress;
mod prompt;
mod ranks;
mod sampling;
mod startup;
mod text;
mod units;

pub use catalogue::{Catalogue, CatalogueError, Environment};
pub use conversation::{Conversation, Prompt};
pub use drafting::{DraftChoice, DraftEngine, DraftSource};
pub use error::{RanksReason, SessionError};
pub use generate::{Generation, generate};
pub use open::{
    Need, Opened, Session, bytes_under, check_memory, context_that_fits, describe_adapter, largest,
    open, prepare_program, program_for,
};
pub use options::{Device, Options, backend, check_format, instruction_set};
pub use progress::{Progress, Reporter, Silent};
pub use prompt::{Bos, encode_chat, encode_raw, encode_text, question, text_beginning};
pub use ranks::{Ranks, has_experts};
pub use sampling::{ANSWER_TOKENS, SamplingChoice};
pub use startup::{Startup, milliseconds};
pub use text::{decoder, template_of, tokenizer_of};
pub use units::human_bytes;
