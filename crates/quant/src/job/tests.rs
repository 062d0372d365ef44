//! Jobs on the tiny checkpoints: folds change no logits, calibration sees the right inputs, and
//! impossible recipes are refused by name.

use std::path::Path;
use std::sync::Arc;

use lathe_model::Model;
use lathe_model::lower::{LowerOptions, lower};
use lathe_program::reference::ReferenceBackend;
use lathe_program::{
    Backend, BackendError, Choice, Executor, ExecutorOptions, KvFormat, Op, Program, WeightSource,
};

use super::*;
use crate::calibrate;
use crate::matrix::{Group, Matrix, Outcome};
use crate::statistics::Statistics;

pub(super) const TOKENS: [u32; 24] =
    [3, 60, 17, 5, 5, 42, 9, 33, 21, 8, 1, 2, 30, 31, 44, 50, 12, 7, 19, 28, 4, 40, 11, 6];

pub(super) fn open(name: &str) -> (Model, Arc<Program>) {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny"));
    let model = Model::open(&root.join(name)).expect(name);
    let program = Arc::new(lower(&model.spec, &LowerOptions::new(64)).expect(name));
    (model, program)
}

pub(super) fn executor(program: &Arc<Program>, weights: &dyn WeightSource) -> Box<dyn Executor> {
    let options = ExecutorOptions {
        kv_blocks: program.kv.groups.len() * 2,
        kv_format: Some(KvFormat::F32),
        rows_max: 24,
        threads: None,
        exact: true,
    };
    ReferenceBackend::new().prepare(Arc::clone(program), weights, &options).expect("prepares")
}

/// The text in two windows on the reference.
pub(super) fn calibration<'a>(backend: &'a ReferenceBackend, tokens: &'a [u32]) -> Calibration<'a> {
    Calibration { backend, tokens, window: 12, threads: None, exact: true, kv_format: None }
}

/// All weights of a job before anything is rounded.
struct Prepared(Vec<Tensor>);

impl Prepared {
    fn of(job: &Job<'_>) -> Self {
        let one = |index: usize| match job.ledger.norms.get(&Weight(index as u32)) {
            Some(norm) => norm.clone(),
            None => {
                let (shape, values) = job.load(Weight(index as u32)).expect("loads");
                Tensor::from_f32_vec(shape, values)
            }
        };
        Prepared((0..job.plan.program.weights.len()).map(one).collect())
    }
}

impl WeightSource for Prepared {
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError> {
        Ok(self.0[weight.0 as usize].clone())
    }
}

/// The values that a run of the text makes, by value.
fn seen(program: &Arc<Program>, weights: &dyn WeightSource, values: &[Value]) -> Vec<Vec<f32>> {
    let mut tapped = Program::clone(program);
    let taps = values.iter().zip(0..).map(|(input, tap)| Op::Capture { input: *input, tap });
    tapped.ops.extend(taps);
    let tapped = Arc::new(tapped);
    let mut executor = executor(&tapped, weights);
    let step = calibrate::step_of(&tapped, &TOKENS, executor.expanded_until(24), 2);
    let captures = executor.run(&step).expect("runs").captures;
    captures.into_iter().map(<[f32]>::to_vec).collect()
}

/// The input of the head, for every row.
fn last_hidden(program: &Arc<Program>, weights: &dyn WeightSource) -> Vec<f32> {
    let head = program.ops.iter().find(|op| matches!(op, Op::Logits { .. })).expect("a head");
    let input: Vec<Value> = head.inputs().collect();
    seen(program, weights, &input).remove(0)
}

#[test]
fn folded_scales_change_no_output() {
    // Plain norms, norms with an offset or a bias, tied heads, and both kinds of gated activation.
    for (name, format) in [
        ("llama", "int4-g16-f32"),
        ("llama-tied", "int4-g16-f32"),
        ("qwen3", "int4-g16-f32"),
        ("gemma", "int4-g16-f32"),
        ("gemma3", "int4-g16-f32"),
        ("cohere", "int4-g16-f32"),
    ] {
        let (model, program) = open(name);
        let weights = model.weights(&program).unwrap();
        let recipe = Recipe::simple(Format::parse(format).unwrap(), "awq+rtn").unwrap();
        let mut job = Job::new(&weights, &recipe, true, |_| ()).expect(name);
        let backend = ReferenceBackend::new();
        job.calibrate(&model.spec, &calibration(&backend, &TOKENS)).expect(name);
        let scaled =
            job.reports().prepared.iter().filter(|it| it.scales.is_some_and(|[a, b]| a < b));
        let layers = model.spec.layers.len();
        let scaled = scaled.count();
        assert!(
            scaled >= layers,
            "{name}: {scaled} of {layers} layers: {:?}",
            job.reports().prepared
        );
        let outputs =
            job.reports().prepared.iter().filter(|it| it.tensors[0].ends_with("attention.output"));
        assert!(outputs.clone().count() == layers && outputs.clone().all(|it| it.scales.is_some()));
        let expected = last_hidden(&program, &weights);
        let found = last_hidden(&program, &Prepared::of(&job));
        let most = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-5 * most, "{name}: {found} {expected}");
        }
    }
}

/// Layers that run one by one, each with the stream of those before it, equal the whole model. This
/// holds for every kind of layer, attention and router.
#[test]
fn sections_are_the_program_in_pieces() {
    for name in ["llama", "gemma3", "cohere", "gpt-oss", "deepseek-v3", "qwen3-moe", "olmo2"] {
        let (model, program) = open(name);
        let weights = model.weights(&program).unwrap();
        let inputs = program.ops.iter().filter_map(|op| match op {
            Op::Linear { input, .. } => Some(*input),
            _ => None,
        });
        let inputs: Vec<Value> = inputs.collect::<BTreeSet<Value>>().into_iter().collect();
        let whole = seen(&program, &weights, &inputs);
        let whole: BTreeMap<Value, Vec<f32>> = inputs.into_iter().zip(whole).collect();

        let options = LowerOptions {
            captures: (0..=model.spec.layers.len()).collect(),
            ..LowerOptions::new(64)
        };
        let layers = Layers::new(&program, &lower(&model.spec, &options).unwrap());
        let backend = ReferenceBackend::new();
        let calibration = Calibration { window: 24, ..calibration(&backend, &TOKENS) };
        let mut weight = |weight| Ok(weights.load(weight)?);
        let mut sections = vec![(layers.before, layers.stream)];
        sections.extend(layers.layers);
        let (mut stream, mut compared): (Option<Stream>, BTreeSet<Value>) = Default::default();
        for (range, out) in sections {
            let read = program.ops[range.clone()].iter().filter_map(|op| match op {
                Op::Linear { input, .. } => Some(*input),
                _ => None,
            });
            let mut taps: Vec<Value> = read.collect();
            taps.sort_unstable();
            taps.dedup();
            taps.push(out);
            let section = Section::new(&program, range, &taps).expect(name);
            section.program.validate().expect(name);
            let mut made = Vec::new();
            calibration
                .run(&section, stream.as_ref(), &mut weight, &mut |window| {
                    made = window.taps.iter().map(|rows| rows.to_vec()).collect();
                })
                .expect(name);
            for (value, found) in taps.iter().zip(&made) {
                let Some(expected) = whole.get(value) else { continue };
                let most = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
                let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * most;
                assert!(found.iter().zip(expected).all(near), "{name}: {value:?}");
                compared.insert(*value);
            }
            let values = made.pop().expect("the stream");
            stream = Some(Stream { width: program.value_width(out), values: values.into() });
        }
        assert_eq!(compared.len(), whole.len(), "{name}: every input of every linear op");
    }
}

/// The logits of the last row.
fn logits(program: &Arc<Program>, weights: &dyn WeightSource) -> Vec<f32> {
    let mut executor = executor(program, weights);
    let mut step = calibrate::step_of(program, &TOKENS, executor.expanded_until(24), 2);
    step.choices = vec![Choice::logits_of(23)];
    executor.run(&step).expect("runs").logits.to_vec()
}

/// Every tiny family: a rotation changes no logits, or is refused for a known reason.
#[test]
fn rotations_change_no_logits() {
    // Layer norms subtract a mean, and norms after a branch scale what is added to the stream. Both
    // stop a rotation.
    let layer_norms = ["cohere", "cohere2", "olmo", "stablelm", "starcoder2"];
    let post_norms = ["exaone4", "flex-olmo", "gemma2", "gemma3", "glm4", "olmo2", "olmo3"];
    let mut refused = [&layer_norms[..], &post_norms].concat();
    refused.sort_unstable();
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny"));
    let (mut turned, mut named) = (0, Vec::new());
    let mut folders: Vec<_> =
        std::fs::read_dir(root).unwrap().map(|it| it.unwrap().path()).collect();
    folders.sort();
    for folder in folders {
        let name = folder.file_name().unwrap().to_str().unwrap();
        let (model, program) = open(name);
        let weights = model.weights(&program).unwrap();
        let expected = logits(&program, &weights);
        let most = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        for kind in ["random_hadamard", "hadamard", "random"] {
            let text = format!(
                "format = \"int8-channel-f32\"\n[[technique]]\nuse = \"rotate\"\n\
                 kind = \"{kind}\"\n[[technique]]\nuse = \"rtn\""
            );
            let recipe = Recipe::parse(&text, None).unwrap();
            let job = match Job::new(&weights, &recipe, false, |_| ()) {
                Ok(job) => job,
                Err(error) => {
                    assert!(error.to_string().starts_with("rotate of tensor"), "{name}: {error}");
                    named.push(name.to_owned());
                    break;
                }
            };
            let found = logits(&program, &Prepared::of(&job));
            for (found, expected) in found.iter().zip(&expected) {
                assert!(
                    (found - expected).abs() < 1e-5 * most,
                    "{name} {kind}: {found} {expected}"
                );
            }
            turned += 1;
        }
    }
    assert_eq!(named, refused);
    assert!(turned >= 3 * 30, "{turned}");
}

/// Every tiny family: rotations of inputs change no logits, because the matrices contain the
/// inverses. Alone, and after a rotation of the stream and the values.
#[test]
fn rotations_of_inputs_change_no_logits() {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny"));
    let mut checked = 0;
    for folder in std::fs::read_dir(root).unwrap().map(|it| it.unwrap().path()) {
        let name = folder.file_name().unwrap().to_str().unwrap();
        let (model, program) = open(name);
        let expected = logits(&program, &model.weights(&program).unwrap());
        let most = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        for (rotate, block, inputs) in
            [(false, 8, "all"), (false, 0, "down"), (true, 4, "all"), (true, 0, "down")]
        {
            let rotate = if rotate { "[[technique]]\nuse = \"rotate\"\n" } else { "" };
            let text = format!(
                "format = \"int8-channel-f32\"\ntensors = [\"layers.*\"]\n{rotate}\
                 [[technique]]\nuse = \"hadamard\"\nblock = {block}\ninputs = \"{inputs}\"\n\
                 [[technique]]\nuse = \"rtn\""
            );
            let recipe = Recipe::parse(&text, None).unwrap();
            let spec = match crate::inputs::with_inputs(&model.spec, &recipe) {
                Ok(spec) => spec,
                Err(error) => {
                    let text = error.to_string();
                    assert!(
                        text.contains("Hadamard matrix") || text.contains("multiple"),
                        "{name}: {text}"
                    );
                    continue;
                }
            };
            let program = Arc::new(lower(&spec, &LowerOptions::new(64)).unwrap());
            let transforms = program.ops.iter().filter(|op| op.kind() == "transform").count();
            let experts = |op: &Op| match op {
                Op::Experts { spec, .. } => !spec.hidden_transform.is_nothing(),
                _ => false,
            };
            assert!(transforms > 0 || program.ops.iter().any(experts), "{name}");
            let weights = model.weights(&program).unwrap();
            let job = match Job::new(&weights, &recipe, false, |_| ()) {
                Ok(job) => job,
                Err(error) => {
                    assert!(error.to_string().starts_with("rotate of tensor"), "{name}: {error}");
                    continue;
                }
            };
            let found = logits(&program, &Prepared::of(&job));
            for (found, expected) in found.iter().zip(&expected) {
                let close = (found - expected).abs() < 1e-5 * most;
                assert!(close, "{name} {block} {inputs}: {found} {expected}");
            }
            checked += 1;
        }
    }
    assert!(checked >= 120, "{checked}");
}

/// GPTQ of a matrix with rounded inputs sees the rounded rows.
#[test]
fn calibration_sees_inputs_as_they_are_rounded() {
    let (model, _) = open("llama");
    let text = "format = \"int8-channel-f32\"\nactivations = \"int4-token\"\nprefix = \"float\"\n\
                [[technique]]\nuse = \"gptq\"";
    let recipe = Recipe::parse(text, None).unwrap();
    let spec = crate::inputs::with_inputs(&model.spec, &recipe).unwrap();
    let program = Arc::new(lower(&spec, &LowerOptions::new(64)).unwrap());
    let linear = program.ops.iter().position(|op| op.kind() == "linear").unwrap();
    let Op::Linear { input, .. } = program.ops[linear] else { unreachable!() };
    assert!(
        program
            .ops
            .iter()
            .any(|op| matches!(op, Op::Transform { out, transform, .. } if *out == input
            && transform.format == Some(lathe_tensor::ActivationFormat::Int4Token)))
    );
    let weights = model.weights(&program).unwrap();
    let mut job = Job::new(&weights, &recipe, true, |_| ()).unwrap();
    let backend = ReferenceBackend::new();
    job.calibrate(&spec, &calibration(&backend, &TOKENS)).unwrap();
    assert!(job.reports().tensors.iter().all(|it| it.report.output_error.is_some()));
}

#[test]
fn tokens_that_cannot_be_used_are_named() {
    let (model, program) = open("llama");
    let weights = model.weights(&program).unwrap();
    let recipe = Recipe::simple(Format::parse("int4-g16-f32").unwrap(), "gptq").unwrap();
    let backend = ReferenceBackend::new();
    for (tokens, expected) in [
        (&[][..], "no tokens"),
        (&[1][..], "1 token, expected a text"),
        (&[1, 1 << 30][..], "token 1073741824"),
    ] {
        let mut job = Job::new(&weights, &recipe, true, |_| ()).unwrap();
        let error = job.calibrate(&model.spec, &calibration(&backend, tokens)).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

/// A later layer sees the output of the quantized layers before it, unless the recipe says
/// otherwise.
#[test]
fn the_prefix_is_what_the_recipe_says() {
    let (model, program) = open("llama");
    let weights = model.weights(&program).unwrap();
    let last = model.spec.layers.len() - 1;
    let quantized = |prefix: &str, first: bool| -> Tensor {
        let tensors = if first { "layers.*".to_owned() } else { format!("layers.{last}.*") };
        let text = format!(
            "format = \"int4-g16-f32\"\ntensors = [\"{tensors}\"]\nprefix = \"{prefix}\"\n\
             [[technique]]\nuse = \"gptq\""
        );
        let recipe = Recipe::parse(&text, None).unwrap();
        let mut job = Job::new(&weights, &recipe, true, |_| ()).unwrap();
        let backend = ReferenceBackend::new();
        job.calibrate(&model.spec, &calibration(&backend, &TOKENS)).unwrap();
        let weight = program.weight_named(&format!("layers.{last}.ffn.down")).unwrap();
        Replacement::tensor(&mut job, weight).unwrap()
    };
    let same = |a: &Tensor, b: &Tensor| a.to_f32() == b.to_f32();
    assert!(same(&quantized("float", true), &quantized("float", false)));
    assert!(same(&quantized("quantized", false), &quantized("float", false)));
    assert!(!same(&quantized("quantized", true), &quantized("float", true)));
}

#[test]
fn what_cannot_be_quantized_is_named() {
    let (model, program) = open("llama");
    let weights = model.weights(&program).unwrap();
    let backend = ReferenceBackend::new();
    let refused = |text: &str, calibrated: bool| {
        let recipe = Recipe::parse(text, None).unwrap();
        let job = Job::new(&weights, &recipe, calibrated, |_| ());
        let outcome =
            job.and_then(|mut job| job.calibrate(&model.spec, &calibration(&backend, &TOKENS)));
        outcome.unwrap_err().to_string()
    };
    let rtn = "[[technique]]\nuse = \"rtn\"";
    for (head, expected) in [
        // ffn.down has 48 columns.
        ("format = \"int4-g32-bf16\"", ["layers.0.ffn.down", "48"]),
        ("format = \"q4_0\"", ["layers.0.ffn.down", "48"]),
        ("format = \"q4_0\"\ntensors = [\"layers.9.*\"]", ["no tensor is called", "layers.9.*"]),
        ("format = \"q4_0\"\ntensors = [\"embedding\"]", ["embedding", "cannot be quantized"]),
        ("format = \"q4_0\"\ntensors = [\"final_norm\"]", ["final_norm", "cannot be quantized"]),
        ("format = \"q4_0\"\nkeep = [\"*\"]", ["quantizes no tensor", ""]),
    ] {
        let error = refused(&format!("{head}\n{rtn}"), false);
        assert!(expected.iter().all(|it| error.contains(it)), "{head}: {error}");
    }
    let gptq = "format = \"int4-g16-bf16\"\n[[technique]]\nuse = \"gptq\"";
    let error = refused(gptq, false);
    assert!(error.contains("layers.0.attention.query needs calibration"), "{error}");
    let half = "format = \"int4-g16-bf16\"\n[[technique]]\nuse = \"rtn\"\ntensors = [\"*.down\"]";
    let error = refused(half, false);
    assert!(error.contains("no technique rounds tensor layers.0.attention"), "{error}");
}

/// A norm that feeds two groups takes the scales of neither.
#[test]
fn scales_that_nothing_takes_are_refused_where_a_recipe_asks_for_them() {
    let (model, program) = open("cohere");
    let weights = model.weights(&program).unwrap();
    let text = "format = \"int4-g16-bf16\"\n[[technique]]\nuse = \"awq\"\n\
                tensors = [\"*.ffn.gate\", \"*.ffn.up\"]\n[[technique]]\nuse = \"rtn\"";
    let recipe = Recipe::parse(text, None).unwrap();
    let mut job = Job::new(&weights, &recipe, true, |_| ()).unwrap();
    let backend = ReferenceBackend::new();
    let error = job.calibrate(&model.spec, &calibration(&backend, &TOKENS)).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("ffn.gate") && error.contains("linear reads the same input"), "{error}");
}

/// The first layer has the float model's input, so there GPTAQ equals GPTQ. Behind it they differ.
#[test]
fn gptaq_makes_up_for_quantized_layers() {
    let (model, program) = open("llama");
    let weights = model.weights(&program).unwrap();
    let backend = ReferenceBackend::new();
    let made = |method: &str| {
        let recipe = Recipe::simple(Format::parse("int3-g16-f32").unwrap(), method).unwrap();
        let mut job = Job::new(&weights, &recipe, true, |_| ()).unwrap();
        job.calibrate(&model.spec, &calibration(&backend, &TOKENS)).unwrap();
        job.ledger.finished
    };
    let (gptq, gptaq) = (made("gptq"), made("gptaq"));
    for (weight, tensor) in &gptq {
        let name = &program.weight(*weight).name;
        let same = tensor.codes[..] == gptaq[weight].codes[..];
        assert_eq!(same, name.starts_with("layers.0."), "{name}");
    }
}

/// Every expert sees every token, through its own matrices. The expectation is computed here.
#[test]
fn experts_are_calibrated_by_all_tokens() {
    let (model, program) = open("mixtral");
    let weights = model.weights(&program).unwrap();
    let text = "format = \"int4-g16-f32\"\ntensors = [\"layers.0.ffn.experts.*\"]\n\
                [[technique]]\nuse = \"gptq\"";
    let recipe = Recipe::parse(text, None).unwrap();
    let mut job = Job::new(&weights, &recipe, true, |_| ()).unwrap();
    let backend = ReferenceBackend::new();
    let calibration = calibration(&backend, &TOKENS);
    job.calibrate(&model.spec, &calibration).unwrap();

    let found = |index: usize| match &program.ops[index] {
        Op::Experts { input, spec, .. } => Some((*input, spec.clone())),
        _ => None,
    };
    let (input, spec) = (0..program.ops.len()).find_map(found).unwrap();
    let end = program.ops.iter().position(|op| op.inputs().any(|it| it == input)).unwrap();
    let section = Section::new(&program, 0..end, &[input]).unwrap();
    let (mut x, mut load) = (Vec::new(), |weight| Ok(weights.load(weight)?));
    calibration
        .run(&section, None, &mut load, &mut |window| x.extend_from_slice(window.taps[0]))
        .unwrap();
    let width = program.value_width(input);
    let values = |weight: Weight| weights.load(weight).unwrap().to_f32();
    let (gate, up, down) = (values(spec.gate), values(spec.up), values(spec.down));
    let made = Replacement::tensor(&mut job, spec.down).unwrap();
    assert_eq!(made.shape, [spec.experts, width, spec.hidden]);
    let technique = crate::technique::find("gptq").unwrap();
    for expert in 0..spec.experts {
        let part =
            |all: &[f32]| all[expert * spec.hidden * width..][..spec.hidden * width].to_vec();
        let (gate, up, down) = (part(&gate), part(&up), part(&down));
        let mut hidden = Vec::new();
        for row in x.chunks(width) {
            for (gate, up) in gate.chunks(width).zip(up.chunks(width)) {
                let dot = |w: &[f32]| w.iter().zip(row).map(|(w, x)| w * x).sum::<f32>();
                let gate = dot(gate);
                hidden.push(gate / (1.0 + (-gate).exp()) * dot(up));
            }
        }
        let mut statistics = Statistics::new(spec.hidden);
        statistics.add(&hidden);
        let matrix = Matrix {
            name: "down",
            rows: width,
            columns: spec.hidden,
            values: &down,
            fused_largest: None,
        };
        let group = Group {
            matrices: vec![matrix],
            statistics: Some(&statistics),
            asymmetry: None,
            tied: None,
        };
        let parameters = &recipe.steps[0].parameters;
        let Ok(Outcome::Quantized(list)) = (technique.group())(&group, recipe.format, parameters)
        else {
            panic!("it rounds")
        };
        let found = made.slice_rows(expert * width..(expert + 1) * width).unwrap().to_f32();
        let expected = list[0].tensor.to_f32();
        let same = found.iter().zip(&expected).filter(|(a, b)| (*a - *b).abs() < 1e-5).count();
        assert!(same * 100 >= 98 * found.len(), "{expert}: {same} of {}", found.len());
    }
    // Each token was sent to two experts.
    assert_eq!(job.reports().coverage[0].router, "layers.0.ffn.router");
    assert_eq!(job.reports().coverage[0].tokens.iter().sum::<u64>(), 48);
}

/// GPTAQ of experts compensates the error of their input. The first layer has none, so it equals
/// GPTQ there and differs behind it.
#[test]
fn gptaq_of_experts_knows_the_float_models_hidden_values() {
    let (model, program) = open("mixtral");
    let weights = model.weights(&program).unwrap();
    let backend = ReferenceBackend::new();
    let made = |technique: &str| -> Vec<Tensor> {
        let text = format!("format = \"int4-g8-f32\"\n[[technique]]\nuse = \"{technique}\"");
        let recipe = Recipe::parse(&text, None).unwrap();
        let mut job = Job::new(&weights, &recipe, true, |_| ()).unwrap();
        job.calibrate(&model.spec, &calibration(&backend, &TOKENS)).unwrap();
        let names = ["layers.0.ffn.experts.down", "layers.1.ffn.experts.down"];
        let all = names.map(|name| program.weight_named(name).unwrap());
        all.map(|weight| Replacement::tensor(&mut job, weight).unwrap()).into()
    };
    let (gptq, gptaq) = (made("gptq"), made("gptaq"));
    assert_eq!(gptq[0].to_f32(), gptaq[0].to_f32());
    assert!(gptq[1].to_f32() != gptaq[1].to_f32());
}
