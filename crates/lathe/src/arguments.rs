//! The command line as data. Doc comments of arguments are the text of `--help`.

use std::convert::Infallible;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::Error;
use clap::{Args, Parser, Subcommand, ValueEnum};
use lathe_model::OpenOptions;
use lathe_model::adapter::AdapterChoice;
use lathe_model::export::Reader;
use lathe_program::KvFormat;
use lathe_quant::technique;
use lathe_session::{Bos, Options, Ranks, SamplingChoice};
use lathe_tensor::suggest::one_of;

use crate::output::bad_input;

const EXAMPLES: &str = "\
Examples:
  lathe run smollm2-135m \"Why is the sky blue?\"
  echo \"Translate to French: good morning\" | lathe run smollm2-135m --max-tokens 40
  lathe chat smollm2-135m
  lathe run organisation/model-GGUF:Q4_K_M \"Hello\"     (a model of the Hub)
  lathe score tiny --text poem.txt --json
  lathe eval smollm2-135m --text wikitext2-test.txt --context 1024
  lathe inspect smollm2-135m --context 4096 --batch 8
  lathe bench smollm2-135m --prompt 512 --generate 128 --json
  lathe convert ./my-model my-model.gguf --to gguf --format q4_0
  lathe run smollm2-135m --adapter ./my-lora \"Hello\"
  lathe quantize smollm2-135m ./small --format w4a16 --group 64 --method awq --calibration text.txt

MODEL is a folder in Hugging Face layout, a .gguf file, a catalogue name (smollm2-135m, tiny) or a
Hub id (organisation/name, organisation/name:QUANTIZATION). Fetched models go to the cache that
Python's huggingface_hub uses; HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are
honoured.

Exit codes: 0 success, 2 bad usage or bad input, 1 failure, 130 stopped by Ctrl-C.";

/// Runs open-weight language models, and tells what they cost.
#[derive(Debug, Parser)]
#[command(name = "lathe", version, about, after_help = EXAMPLES, max_term_width = 100)]
#[command(subcommand_required = true, arg_required_else_help = false)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Print one JSON object on stdout and everything else on stderr
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub json: bool,
    /// What computes
    #[arg(long, global = true, value_enum, default_value = "auto", help_heading = "Everywhere")]
    pub device: Device,
    /// No activation quantization, f32 accumulation, f32 cache unless --kv-format says otherwise
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub exact: bool,
    /// Worker threads, 1 to 1024; every core that this process may use if not given
    #[arg(long, global = true, value_name = "N", help_heading = "Everywhere",
          value_parser = parse_threads)]
    pub threads: Option<NonZeroUsize>,
    /// How keys and values are kept: f32, f16, bf16, int16, fp8, int8 or int4; the device's own
    /// choice if not given (cpu int16, reference and --exact f32)
    #[arg(long, global = true, value_name = "F", help_heading = "Everywhere",
          value_parser = parse_kv_format)]
    pub kv_format: Option<KvFormat>,
    /// A folder with a LoRA adapter (PEFT's layout) that MODEL is used with, in place of the one
    /// that its own folder may hold in `adapter/`; `none` leaves that one out
    #[arg(long, global = true, value_name = "DIR|none", help_heading = "Everywhere",
          value_parser = parse_adapter)]
    pub adapter: Option<AdapterChoice>,
    /// Ignore this field of config.json, which would be refused because the model's class reads it;
    /// may be repeated
    #[arg(long, global = true, value_name = "FIELD", help_heading = "Everywhere")]
    pub allow_unknown: Vec<String>,
}

impl Global {
    /// The options to run a model with.
    pub(crate) fn options(&self) -> Options {
        Options {
            device: self.device.into(),
            exact: self.exact,
            threads: self.threads,
            kv_format: self.kv_format,
        }
    }

    /// The options to open MODEL with.
    pub(crate) fn open_options(&self) -> OpenOptions {
        OpenOptions {
            adapter: self.adapter.clone().unwrap_or_default(),
            allow_unknown: self.allow_unknown.clone(),
            context: None,
        }
    }

    /// As [`Self::open_options`], with `context` positions if it is given.
    pub(crate) fn open_options_for(&self, context: Option<usize>) -> OpenOptions {
        OpenOptions { context, ..self.open_options() }
    }
}

/// No adapter, or the one in a folder.
fn parse_adapter(text: &str) -> Result<AdapterChoice, Infallible> {
    Ok(match text {
        "none" => AdapterChoice::None,
        folder => AdapterChoice::Folder(folder.into()),
    })
}

/// The most worker threads: twice the cores of the largest machines.
const THREADS_MAX: usize = 1024;

fn parse_threads(text: &str) -> Result<NonZeroUsize, String> {
    let threads = text.parse().ok().filter(|threads: &NonZeroUsize| threads.get() <= THREADS_MAX);
    threads.ok_or_else(|| format!("found {text}, expected 1 to {THREADS_MAX}"))
}

/// The format called `name`. The error lists all names.
fn parse_kv_format(name: &str) -> Result<KvFormat, String> {
    KvFormat::parse(name).ok_or_else(|| {
        let known = one_of(name, &KvFormat::ALL.map(KvFormat::name));
        format!("found {name}, expected {known}")
    })
}

/// Whether a text begins with the token that begins a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BosChoice {
    /// As the tokenizer does it by itself (`add_bos_token`)
    Auto,
    /// Begin with it
    Yes,
    /// Do not
    No,
}

impl From<BosChoice> for Bos {
    fn from(choice: BosChoice) -> Self {
        match choice {
            BosChoice::Auto => Bos::Auto,
            BosChoice::Yes => Bos::Yes,
            BosChoice::No => Bos::No,
        }
    }
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// Scalar f32, slow, what every other device is compared with
    Reference,
    /// SIMD and threads
    Cpu,
    #[cfg_attr(feature = "cuda", doc = "NVIDIA GPU")]
    #[cfg_attr(not(feature = "cuda"), doc = "NVIDIA GPU; not in this version")]
    Cuda,
    /// The best that this machine and build have
    Auto,
}

impl From<Device> for lathe_session::Device {
    fn from(device: Device) -> Self {
        match device {
            Device::Reference => Self::Reference,
            Device::Cpu => Self::Cpu,
            Device::Cuda => Self::Cuda,
            Device::Auto => Self::Auto,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answer one prompt, streaming the text
    Run(RunArguments),
    /// Talk with a model over several turns
    Chat(ChatArguments),
    /// Log-probability of each token of a text, given those before it
    Score(ScoreArguments),
    /// Perplexity of a text, and distance to another model
    Eval(EvalArguments),
    /// What a model is, what it needs, and what a step of it costs on this machine
    Inspect(InspectArguments),
    /// Measure prefill and decoding
    Bench(BenchArguments),
    /// Write a model in another file layout or number format
    Convert(ConvertArguments),
    /// Write a model in fewer bits, with the technique that loses least
    Quantize(QuantizeArguments),
    /// Fetch a model into the cache
    Pull(PullArguments),
}

/// How tokens are chosen.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct SamplingArguments {
    /// Tokens to generate at most
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// 0 chooses the likeliest token always. Not given: what the model's generation_config.json
    /// says if it asks for sampling; else 1 if --top-p, --top-k or --min-p is given; else 0
    #[arg(long, value_name = "T", help_heading = "Sampling")]
    pub temperature: Option<f32>,
    /// Choose among the likeliest tokens that together have probability P
    #[arg(long, value_name = "P", help_heading = "Sampling")]
    pub top_p: Option<f32>,
    /// Choose among the K likeliest tokens (0: all)
    #[arg(long, value_name = "K", help_heading = "Sampling")]
    pub top_k: Option<usize>,
    /// Choose among tokens at least P times as probable as the likeliest
    #[arg(long, value_name = "P", help_heading = "Sampling")]
    pub min_p: Option<f32>,
    /// Divide the logits of tokens that occurred (multiply if negative); 1 is none
    #[arg(long, value_name = "R", help_heading = "Sampling")]
    pub repetition_penalty: Option<f32>,
    /// Subtract from the logits of generated tokens
    #[arg(long, value_name = "X", allow_negative_numbers = true, help_heading = "Sampling")]
    pub presence_penalty: Option<f32>,
    /// Subtract from the logits of generated tokens, for each time
    #[arg(long, value_name = "X", allow_negative_numbers = true, help_heading = "Sampling")]
    pub frequency_penalty: Option<f32>,
    /// Add to a token's logit: ID=X, may be repeated
    #[arg(long, value_name = "ID=X", allow_hyphen_values = true, help_heading = "Sampling")]
    pub logit_bias: Vec<String>,
    /// The same seed gives the same text; not given: a different one each time
    #[arg(long, value_name = "S", help_heading = "Sampling")]
    pub seed: Option<u64>,
    /// Stop before this text, may be repeated
    #[arg(long, value_name = "TEXT", help_heading = "Sampling")]
    pub stop: Vec<String>,
    /// Go on when the model says that it is done
    #[arg(long, help_heading = "Sampling")]
    pub ignore_eos: bool,
}

impl SamplingArguments {
    /// The same as a type of the library.
    pub(crate) fn choice(&self) -> Result<SamplingChoice, Error> {
        Ok(SamplingChoice {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.iter().map(|text| bias(text)).collect::<Result<_, _>>()?,
            seed: self.seed,
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
        })
    }
}

/// `ID=NUMBER`.
fn bias(text: &str) -> Result<(u32, f32), Error> {
    let parts = text
        .split_once('=')
        .and_then(|(token, value)| Some((token.trim().parse().ok()?, value.trim().parse().ok()?)));
    parts.ok_or_else(|| bad_input(format!("--logit-bias {text}: expected ID=NUMBER")))
}

/// How a model is divided over ranks, which are threads of this process.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct ParallelArguments {
    /// Divide the model over N ranks: heads, hidden elements and the vocabulary. On the CPU a rank
    /// has an equal share of --threads, at least one: with fewer threads than ranks there is one a
    /// rank, and they take turns on the cores
    #[arg(long, value_name = "N", default_value = "1", help_heading = "Ranks")]
    pub tensor_parallel: NonZeroUsize,
    /// Give each rank some experts whole, not some columns of each; needs --tensor-parallel
    #[arg(long, help_heading = "Ranks")]
    pub expert_parallel: bool,
}

impl ParallelArguments {
    /// The same as a type of the library.
    pub(crate) fn ranks(&self) -> Ranks {
        Ranks { count: self.tensor_parallel, by_expert: self.expert_parallel }
    }
}

/// The ranks to predict for, and what they are like.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct RankArguments {
    #[command(flatten)]
    pub parallel: ParallelArguments,
    /// What a rank can send, in 10^9 bytes a second: 25 is what PCIe 4.0 x16 brings across
    #[arg(long, value_name = "X", default_value_t = 25.0, help_heading = "Ranks")]
    pub link_gb_s: f64,
    /// What each collective takes however little it carries, in microseconds
    #[arg(long, value_name = "X", default_value_t = 5.0, help_heading = "Ranks")]
    pub link_us: f64,
    /// Memory bandwidth of one rank, in 10^9 bytes a second; an equal part of what this machine
    /// was measured to have if not given, as ranks on its threads share it
    #[arg(long, value_name = "X", help_heading = "Ranks")]
    pub rank_read_gb_s: Option<f64>,
    /// Arithmetic of one rank, in 10^9 operations a second; likewise
    #[arg(long, value_name = "X", help_heading = "Ranks")]
    pub rank_gflop_s: Option<f64>,
}

#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    /// Folder, .gguf file, catalogue name or Hub id
    pub model: String,
    /// What to answer; stdin is read if there is neither this nor --prompt-ids
    #[arg(conflicts_with = "prompt_ids")]
    pub prompt: Option<String>,
    /// Token ids in place of a text, as they are (no chat template): 1,2,3
    #[arg(long, value_name = "IDS")]
    pub prompt_ids: Option<String>,
    /// Continue the text itself: no chat template
    #[arg(long)]
    pub raw: bool,
    /// A system message before the prompt
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["raw", "prompt_ids"])]
    pub system: Option<String>,
    #[command(flatten)]
    pub sampling: SamplingArguments,
    /// Tokens that prompt and answer may have together, in place of what the model's files say
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// Recompute everything at each token, to see what the KV cache saves
    #[arg(long)]
    pub no_kv_cache: bool,
    #[command(flatten)]
    pub drafts: DraftArguments,
    #[command(flatten)]
    pub parallel: ParallelArguments,
}

#[derive(Debug, Args)]
pub(crate) struct ChatArguments {
    /// Folder, .gguf file, catalogue name or Hub id
    pub model: String,
    /// A system message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Tokens that the conversation may grow to, in place of what the model's files say; if not
    /// given, what memory allows of those
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    #[command(flatten)]
    pub sampling: SamplingArguments,
    #[command(flatten)]
    pub drafts: DraftArguments,
    #[command(flatten)]
    pub parallel: ParallelArguments,
}

/// Who drafts, and how much.
#[derive(Debug, Args)]
pub(crate) struct DraftArguments {
    /// Draft tokens ahead and verify them, which changes no text: `ngram` looks up what followed
    /// the same words before, MODEL is a smaller model with the same tokenizer or a folder with an
    /// EAGLE head. Of a list each is asked where those before it have nothing
    #[arg(long, value_name = "none|ngram|MODEL,..", value_delimiter = ',')]
    pub draft: Vec<String>,
    /// Tokens of a draft at most; as many as pay, as measured, if absent
    #[arg(long, value_name = "N")]
    pub draft_budget: Option<NonZeroUsize>,
}

#[derive(Debug, Args)]
pub(crate) struct ScoreArguments {
    /// Folder, .gguf file, catalogue name or Hub id
    pub model: String,
    /// A file with a JSON array of token ids
    #[arg(long, value_name = "FILE", required_unless_present = "text")]
    pub tokens: Option<PathBuf>,
    /// A text file; no special token is added but that of --bos
    #[arg(long, value_name = "FILE", conflicts_with = "tokens")]
    pub text: Option<PathBuf>,
    /// Whether the text begins with the token that begins a sequence; auto: if the tokenizer adds
    /// it by itself
    #[arg(long, value_enum, value_name = "auto|yes|no", default_value_t = BosChoice::Auto)]
    pub bos: BosChoice,
    /// Tokens that a text may have, in place of what the model's files say
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// How many of the last position's logits to show
    #[arg(long, value_name = "K", default_value_t = 10)]
    pub top_k: usize,
    #[command(flatten)]
    pub parallel: ParallelArguments,
}

#[derive(Debug, Args)]
pub(crate) struct EvalArguments {
    /// Folder, .gguf file, catalogue name or Hub id
    pub model: String,
    /// A text file, tokenized once; no special token is added but that of --bos
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Whether each window begins with the token that begins a sequence, which is not scored; auto:
    /// if the tokenizer adds it by itself
    #[arg(long, value_enum, value_name = "auto|yes|no", default_value_t = BosChoice::Auto)]
    pub bos: BosChoice,
    /// A model with the same tokenizer to compare with, token by token
    #[arg(long, value_name = "MODEL")]
    pub base: Option<String>,
    /// The base's --kv-format, if it is to be another: with MODEL as --base, what a cache costs
    #[arg(long, value_name = "F", requires = "base", value_parser = parse_kv_format)]
    pub base_kv_format: Option<KvFormat>,
    /// The base's --adapter, which concerns MODEL alone: with MODEL as --base and `none`, what an
    /// adapter changes
    #[arg(long, value_name = "DIR|none", requires = "base", value_parser = parse_adapter)]
    pub base_adapter: Option<AdapterChoice>,
    /// Tokens in a window; 2048 or what the model allows if not given
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// Tokens from a window's start to the next's; a whole window if not given. Tokens that an
    /// earlier window scored are context only
    #[arg(long, value_name = "N")]
    pub stride: Option<usize>,
    #[command(flatten)]
    pub parallel: ParallelArguments,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArguments {
    /// Folder, .gguf file, catalogue name or Hub id; a folder may have config.json alone
    pub model: String,
    /// Tokens that each sequence holds
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub context: usize,
    /// Sequences in a step
    #[arg(long, value_name = "B", default_value_t = 1)]
    pub batch: usize,
    /// Memory to fit into, in bytes (suffixes k, M, G); what is available now if not given
    #[arg(long, value_name = "BYTES")]
    pub memory: Option<String>,
    /// The number format to assume if there are no weights
    #[arg(long, value_name = "F")]
    pub format: Option<String>,
    /// Also run this text, or what this file holds (text, or a JSON array of token ids), and tell
    /// how many of its tokens each expert of each layer had
    #[arg(long, value_name = "TEXT_OR_FILE")]
    pub experts: Option<String>,
    /// Do not measure this machine: no floor_ms, bound or intensity of the machine
    #[arg(long)]
    pub no_measure: bool,
    #[command(flatten)]
    pub ranks: RankArguments,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArguments {
    /// Folder, .gguf file, catalogue name or Hub id; with --dummy-weights a folder with config.json
    pub model: String,
    /// Random weights in the shape of the model's configuration
    #[arg(long)]
    pub dummy_weights: bool,
    /// The number format of dummy weights
    #[arg(long, value_name = "F", requires = "dummy_weights")]
    pub format: Option<String>,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub prompt: usize,
    /// Tokens to decode
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub generate: usize,
    /// Sequences at once; of a list all are measured, and JSON has them under `batches`
    #[arg(long, value_name = "B,..", default_value = "1", value_delimiter = ',')]
    pub batch: Vec<usize>,
    /// Also measure steps of one sequence that compute so many tokens at once, as the verification
    /// of drafted tokens does
    #[arg(long, value_name = "T,..", value_delimiter = ',')]
    pub step_tokens: Vec<usize>,
    /// Times to measure; medians are reported
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub repeat: usize,
    /// Recompute everything at each token, next to a run with the cache, and show how both grow
    #[arg(long)]
    pub no_kv_cache: bool,
    /// With --no-kv-cache: draw both curves
    #[arg(long, value_name = "FILE.svg", requires = "no_kv_cache")]
    pub plot: Option<PathBuf>,
    #[command(flatten)]
    pub parallel: ParallelArguments,
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArguments {
    /// Folder, .gguf file, catalogue name or Hub id
    pub model: String,
    /// A folder (safetensors) or a .gguf file; must not exist
    pub out: PathBuf,
    /// The layout to write
    #[arg(long, value_enum)]
    pub to: OutputLayout,
    /// The number format of the matrices; as they are if not given (safetensors: bf16 in place of
    /// GGUF's block formats, which that layout cannot hold)
    #[arg(long, value_name = "F")]
    pub format: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputLayout {
    /// A Hugging Face folder
    Safetensors,
    /// One GGUF file
    Gguf,
}

/// Tokens of calibration if the caller gives no number.
const CALIBRATION_TOKENS: usize = 16 * 1024;
/// Tokens that errors are measured on if the caller gives no number.
pub(crate) const EXPLAIN_TOKENS: usize = 512;

#[derive(Debug, Args)]
#[command(after_help = technique::help())]
pub(crate) struct QuantizeArguments {
    /// Folder of plain floats, .gguf file, catalogue name or Hub id
    pub model: String,
    /// A folder (compressed-tensors; MXFP4 experts as gpt-oss has them), a .gguf file, or with
    /// --explain a .html file for the report alone; must not exist
    pub out: PathBuf,
    /// A TOML file that lists techniques, their parameters and the tensors that they are for
    #[arg(long, value_name = "FILE", required_unless_present = "format",
          conflicts_with_all = ["format", "method"])]
    pub recipe: Option<PathBuf>,
    /// w4a16, w8a16, fp8, fp8_block, mxfp4, nvfp4, q4_0, q4_k, ... or a format's own name such as
    /// int4-g64-bf16-asym
    #[arg(long, value_name = "F")]
    pub format: Option<String>,
    /// Techniques joined by +: rtn, clip, gptq, awq, awq+gptq, imatrix, gptq+low-rank
    #[arg(long, value_name = "M", default_value = "rtn")]
    pub method: String,
    /// A text, a JSON array of token ids, or a .jsonl file whose lines have `text` or `messages`,
    /// on which inputs of layers are measured
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,
    /// Whether each window of a text begins with the token that begins a sequence; auto: if the
    /// tokenizer adds it by itself
    #[arg(long, value_enum, value_name = "auto|yes|no", default_value_t = BosChoice::Auto)]
    pub bos: BosChoice,
    /// Tokens of it to use at most, from its start, in windows of 512
    #[arg(long, value_name = "N", default_value_t = CALIBRATION_TOKENS, requires = "calibration")]
    pub calibration_tokens: usize,
    /// What inputs of quantized matrices are rounded to while the model runs: int4-token,
    /// int8-token, fp8-token, mxfp8, mxfp4 or nvfp4
    #[arg(long, value_name = "F", conflicts_with = "recipe")]
    pub activations: Option<String>,
    /// Weights that share a scale, in place of the format's own number
    #[arg(long, value_name = "N")]
    pub group: Option<u32>,
    /// Refuse, before anything is computed, what this program could not run
    #[arg(long = "for", value_name = "PROGRAM", value_enum)]
    pub reader: Option<ReaderName>,
    /// Quantize a model whose matrices are quantized already, which rounds them twice
    #[arg(long)]
    pub allow_requantize: bool,
    /// Measure where errors come from and what each layer costs, on text of --calibration that is
    /// not calibrated with: report.html and report.json beside the weights
    #[arg(long, requires = "calibration")]
    pub explain: bool,
    /// Tokens to measure on, after those of the calibration, in windows of 512
    #[arg(long, value_name = "N", default_value_t = EXPLAIN_TOKENS, requires = "explain")]
    pub explain_tokens: usize,
}

/// A program that the result of `lathe quantize` is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReaderName {
    /// Hugging Face transformers
    Transformers,
    /// vLLM
    Vllm,
    /// llama.cpp
    #[value(name = "llama.cpp")]
    LlamaCpp,
}

impl From<ReaderName> for Reader {
    fn from(name: ReaderName) -> Self {
        match name {
            ReaderName::Transformers => Reader::Transformers,
            ReaderName::Vllm => Reader::Vllm,
            ReaderName::LlamaCpp => Reader::LlamaCpp,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct PullArguments {
    /// A catalogue name or Hub id
    pub name: String,
}

/// The ids of `1,2,3`.
pub(crate) fn parse_ids(text: &str) -> Result<Vec<u32>, Error> {
    let parts = text.split(',').map(str::trim);
    let ids: Result<Vec<u32>, Error> = parts
        .map(|part| {
            part.parse().map_err(|_| {
                bad_input(format!("--prompt-ids: {part:?} found, expected token ids as in 1,2,3"))
            })
        })
        .collect();
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn biases() {
        assert_eq!(bias("5=-2.5").expect("a bias"), (5, -2.5));
        for bad in ["x", "5", "5=", "=1", "a=1"] {
            assert!(bias(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ids() {
        assert_eq!(parse_ids("1, 2,3").expect("ids"), [1, 2, 3]);
        for bad in ["", "1,", "a", "-1", "4294967296", "1.5"] {
            assert!(parse_ids(bad).is_err(), "{bad}");
        }
    }
}
