//! `lathe quantize`: what it writes opens in the other commands, and what cannot be is refused
//! with the tensor's name before anything is written.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};

use support::{lathe, run_error, run_json};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny/llama");

fn command(home: &Path, words: &[&str]) -> Command {
    let mut command = lathe(home);
    command.args(words).stdin(Stdio::null());
    command
}

#[test]
fn what_is_written_opens_and_is_near_the_model() {
    let home = tempfile::tempdir().expect("a folder");
    let path = |name: &str| home.path().join(name).display().to_string();
    let tokens = path("tokens.json");
    let ids: Vec<String> = (0..200).map(|i| (i * 7 % 60).to_string()).collect();
    std::fs::write(&tokens, format!("[{}]", ids.join(","))).expect("writes");
    let scored = path("scored.json");
    std::fs::write(&scored, format!("[{}]", ids[..60].join(","))).expect("writes");
    let score = |model: &str| {
        let words = ["score", model, "--tokens", &scored, "--json", "--exact"];
        run_json(&mut command(home.path(), &words))["mean_nll"].as_f64().expect("a number")
    };
    let expected = score(MODEL);
    for method in ["rtn", "clip", "gptq", "awq", "awq+gptq"] {
        let out = path(method);
        let words = ["quantize", MODEL, &out, "--format", "w8a16", "--method"];
        let words = [&words[..], &[method, "--calibration", &tokens, "--json"]].concat();
        let report = run_json(&mut command(home.path(), &words));
        assert_eq!(report["format"], "int8-channel-bf16");
        assert_eq!(report["calibration_tokens"], 200);
        let found = score(&out);
        assert!((found - expected).abs() < 0.02, "{method}: {found} {expected}");
        let folder = Path::new(&out);
        let recipe = folder.join("recipe.toml");
        assert!(folder.join("provenance.json").is_file() && recipe.is_file());
        let config = std::fs::read_to_string(folder.join("config.json")).expect("reads");
        assert!(config.contains("pack-quantized") && !config.contains("provenance"));
        // The recorded recipe is a recipe, and gives the same files.
        let again = path(&format!("{method}-again"));
        let recipe = recipe.display().to_string();
        let words = ["quantize", MODEL, &again, "--recipe", &recipe, "--calibration", &tokens];
        run_json(&mut command(home.path(), &[&words[..], &["--json"]].concat()));
        let weights = |folder: &str| {
            std::fs::read(Path::new(folder).join("model.safetensors")).expect("reads")
        };
        assert!(weights(&out) == weights(&again), "{method}: another result from its recipe");
    }
}

/// A rotation makes embedding and head two matrices, which were one here: other readers are told.
#[test]
fn a_rotated_model_with_a_tied_head_is_the_same_model() {
    let home = tempfile::tempdir().expect("a folder");
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny/llama-tied");
    let path = |name: &str| home.path().join(name).display().to_string();
    let (out, tokens, recipe) = (path("out"), path("tokens.json"), path("recipe.toml"));
    std::fs::write(&tokens, "[1, 5, 9, 33, 2, 40, 17, 3, 3, 8]").expect("writes");
    let text = "format = \"int8-channel-f32\"\n[[technique]]\nuse = \"rotate\"\n[[technique]]\nuse = \"rtn\"";
    std::fs::write(&recipe, text).expect("writes");
    run_json(&mut command(home.path(), &["quantize", model, &out, "--recipe", &recipe, "--json"]));
    let config = std::fs::read_to_string(Path::new(&out).join("config.json")).expect("reads");
    let config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    assert_eq!(config["tie_word_embeddings"], false);
    let score = |model: &str| {
        let words = ["score", model, "--tokens", &tokens, "--json", "--exact"];
        run_json(&mut command(home.path(), &words))["mean_nll"].as_f64().expect("a number")
    };
    let (found, expected) = (score(&out), score(model));
    assert!((found - expected).abs() < 0.02, "{found} {expected}");
}

/// Experts that are tensors of their own are quantized where a recipe names them.
#[test]
fn experts_are_quantized_where_a_recipe_says_so() {
    let home = tempfile::tempdir().expect("a folder");
    let tiny =
        |name: &str| format!("{}/../../tests/fixtures/tiny/{name}", env!("CARGO_MANIFEST_DIR"));
    let path = |name: &str| home.path().join(name).display().to_string();
    let (tokens, recipe) = (path("tokens.json"), path("recipe.toml"));
    let ids: Vec<String> = (0..100).map(|i| (i * 7 % 60).to_string()).collect();
    std::fs::write(&tokens, format!("[{}]", ids.join(","))).expect("writes");
    let scored = path("scored.json");
    std::fs::write(&scored, format!("[{}]", ids[..60].join(","))).expect("writes");
    let text = "format = \"w8a16\"\ntensors = [\"*.ffn.*\"]\n[[technique]]\nuse = \"gptq\"";
    std::fs::write(&recipe, text).expect("writes");
    for name in ["mixtral", "deepseek-v3"] {
        let (model, out) = (tiny(name), path(name));
        let words = ["quantize", &model, &out, "--recipe", &recipe, "--calibration", &tokens];
        let report = run_json(&mut command(home.path(), &[&words[..], &["--json"]].concat()));
        let chosen = report["expert_tokens"][0]["tokens"].as_array().expect("experts");
        assert!(chosen.iter().filter_map(serde_json::Value::as_u64).sum::<u64>() >= 100);
        let tensors = report["tensors"].as_array().expect("tensors");
        let expert = |it: &&serde_json::Value| {
            it["tensor"].as_str().is_some_and(|it| it.contains("ffn.experts.down["))
        };
        assert!(tensors.iter().any(|it| expert(&it)));
        let score = |model: &str| {
            let words = ["score", model, "--tokens", &scored, "--json", "--exact"];
            run_json(&mut command(home.path(), &words))["mean_nll"].as_f64().expect("a number")
        };
        let (found, expected) = (score(&out), score(&model));
        // A token that goes to another expert for a last bit makes more of a difference than codes.
        assert!((found - expected).abs() < 0.1, "{name}: {found} {expected}");
    }
    // One tensor that holds all experts is replaced as that family does it, or not at all.
    let (model, out) = (tiny("gpt-oss"), path("gpt-oss"));
    let words = ["quantize", &model, &out, "--recipe", &recipe, "--calibration", &tokens];
    let reason = run_error(&mut command(home.path(), &words), 2);
    assert!(reason.contains("ffn.experts") && reason.contains("only mxfp4"), "{reason}");
    let text = "format = \"mxfp4\"\ntensors = [\"*.experts.*\"]\n[[technique]]\nuse = \"rtn\"";
    std::fs::write(&recipe, text).expect("writes");
    let words = ["quantize", &model, &out, "--recipe", &recipe, "--json"];
    run_json(&mut command(home.path(), &words));
    let found =
        run_json(&mut command(home.path(), &["score", &out, "--tokens", &scored, "--json"]));
    assert!(found["mean_nll"].as_f64().is_some_and(f64::is_finite), "{found}");
}

/// The header of a safetensors file, and how many bytes of numbers are behind it.
fn header_of(file: &[u8]) -> (serde_json::Value, usize) {
    let length = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    (serde_json::from_slice(&file[8..8 + length]).expect("JSON"), file.len() - 8 - length)
}

/// What corrects a folder's matrices is a PEFT adapter in it, and both reports count it.
#[test]
fn corrections_are_an_adapter_in_the_folder() {
    let home = tempfile::tempdir().expect("a folder");
    let path = |name: &str| home.path().join(name).display().to_string();
    let (tokens, recipe) = (path("tokens.json"), path("recipe.toml"));
    let ids: Vec<String> = (0..200).map(|i| (i * 7 % 60).to_string()).collect();
    std::fs::write(&tokens, format!("[{}]", ids.join(","))).expect("writes");
    let ends = ["", "weighting = \"none\"\ntensors = [\"*.ffn.*\", \"*.query\"]\nrank = 40"];
    for (name, end) in ["all", "some"].into_iter().zip(ends) {
        let text = format!(
            "format = \"w8a16\"\n[[technique]]\nuse = \"rtn\"\n[[technique]]\nuse = \"low-rank\"\n{end}"
        );
        std::fs::write(&recipe, text).expect("writes");
        let out = path(name);
        let words = ["quantize", MODEL, &out, "--recipe", &recipe, "--json"];
        let seen: &[&str] = if end.is_empty() { &["--calibration", &tokens] } else { &[] };
        let words = [&words[..], seen].concat();
        let report = run_json(&mut command(home.path(), &words));
        let read = |name: &str| std::fs::read(Path::new(&out).join(name)).expect("reads");
        let json =
            |name: &str| serde_json::from_slice::<serde_json::Value>(&read(name)).expect("JSON");
        assert_eq!(json("provenance.json")["tensors"], report["tensors"]);
        let reports = report["tensors"].as_array().expect("tensors");
        let corrected = reports.iter().filter(|it| !it["correction"].is_null());
        let bytes = corrected.clone().map(|it| it["correction"]["bytes"].as_u64().expect("bytes"));
        let config = json("adapter/adapter_config.json");
        assert_eq!(
            (&config["peft_type"], &config["base_model_name_or_path"]),
            (&"LORA".into(), &out.as_str().into())
        );
        assert_eq!((&config["r"], &config["lora_alpha"]), (&32.into(), &32.into()));
        let (header, stored) = header_of(&read("adapter/adapter_model.safetensors"));
        assert_eq!(stored, bytes.sum::<u64>() as usize);
        let shape = |name: &str| {
            header[format!("base_model.model.model.layers.1.{name}.weight")]["shape"].clone()
        };
        let sizes = |rank: usize, rows: usize, columns: usize| {
            [serde_json::json!([rank, columns]), serde_json::json!([rows, rank])]
        };
        let of = |module: &str| ["lora_A", "lora_B"].map(|kind| shape(&format!("{module}.{kind}")));
        assert_eq!(of("mlp.down_proj"), sizes(32, 32, 48));
        let [a, _] = of("self_attn.o_proj");
        let targets = config["target_modules"].as_array().expect("names").len();
        let tensors = header.as_object().expect("an object").len() - 1;
        match name {
            // Keys and values have fewer rows than the rank.
            "all" => {
                assert_eq!(
                    (targets, corrected.count(), tensors),
                    (7, reports.len(), 2 * reports.len())
                );
                assert!(
                    !a.is_null() && !config["rank_pattern"].as_object().expect("ranks").is_empty()
                );
            }
            _ => {
                assert_eq!(
                    (targets, corrected.count(), tensors / 2),
                    (4, reports.len() / 7 * 4, reports.len() / 7 * 4)
                );
                assert!(a.is_null());
            }
        }
        for report in reports.iter().filter(|it| !it["correction"].is_null()) {
            let codes = &report["correction"]["uncorrected"]["sqnr_db"];
            assert!(report["sqnr_db"].as_f64() > codes.as_f64(), "{report}");
        }
        assert!(report["bits_per_weight"].as_f64().is_some_and(|bits| bits > 12.0), "{report}");
        assert!(!Path::new(&format!("{}.partial", path(name))).exists());
    }
}

/// Scores a folder and the floats that its codes stand for, on tokens that it leaves in
/// `tokens.json`.
fn runs_as_its_floats(home: &Path, folder: &str) {
    let path = |name: &str| home.join(name).display().to_string();
    let (tokens, plain) = (path("tokens.json"), format!("{folder}-plain"));
    std::fs::write(&tokens, "[1, 5, 9, 33, 2, 40, 17, 3, 3, 8, 50, 21, 12, 4]").expect("writes");
    let words = ["convert", folder, &plain, "--to", "safetensors", "--format", "f32", "--json"];
    run_json(&mut command(home, &words));
    let [found, expected] = [folder, &plain].map(|model| {
        let words = ["score", model, "--tokens", &tokens, "--json", "--exact"];
        run_json(&mut command(home, &words))["mean_nll"].as_f64().expect("a number")
    });
    assert!((found - expected).abs() < 1e-4, "{folder}: {found} {expected}");
}

/// Every format that a folder holds runs on the CPU as the floats that it stands for do.
#[test]
fn formats_of_folders_run() {
    let home = tempfile::tempdir().expect("a folder");
    let path = |name: &str| home.path().join(name).display().to_string();
    let recipe = path("recipe.toml");
    for (format, encoding) in [
        ("fp8", "float-quantized"),
        ("fp8_tensor", "float-quantized"),
        ("fp8_block", "float-quantized"),
        ("mxfp8", "mxfp8-quantized"),
        ("mxfp6", "mxfp6-pack-quantized"),
        ("mxfp4", "mxfp4-pack-quantized"),
        ("nvfp4", "nvfp4-pack-quantized"),
        ("int8", "pack-quantized"),
    ] {
        let out = path(format);
        // Rows of `down` are no whole number of groups of 32 here.
        let keep = if format.starts_with("mx") { "keep = [\"*.ffn.down\"]" } else { "" };
        let text = format!("format = \"{format}\"\n{keep}\n[[technique]]\nuse = \"rtn\"");
        std::fs::write(&recipe, text).expect("writes");
        let words = ["quantize", MODEL, &out, "--recipe", &recipe, "--json"];
        run_json(&mut command(home.path(), &words));
        let config = std::fs::read_to_string(Path::new(&out).join("config.json")).expect("reads");
        assert!(config.contains(encoding), "{format}: {config}");
        runs_as_its_floats(home.path(), &out);
    }
}

/// Layers in formats of their own are one folder, and one that runs as the floats that it stands
/// for.
#[test]
fn formats_of_tensors_are_mixed() {
    let home = tempfile::tempdir().expect("a folder");
    let path = |name: &str| home.path().join(name).display().to_string();
    let (recipe, out) = (path("recipe.toml"), path("mixed"));
    let text = "format = \"w8a16\"\n[formats]\n\"layers.0.*\" = \"int4-channel-bf16\"\n\
                [[technique]]\nuse = \"rtn\"";
    std::fs::write(&recipe, text).expect("writes");
    run_json(&mut command(home.path(), &["quantize", MODEL, &out, "--recipe", &recipe, "--json"]));
    let config = std::fs::read_to_string(Path::new(&out).join("config.json")).expect("reads");
    assert!(config.contains("group_1"), "{config}");
    runs_as_its_floats(home.path(), &out);
    // Groups that name modules come before those of a class, for inputs as for weights.
    std::fs::write(&recipe, text.replace("w8a16", "w8a8")).expect("writes");
    let out = path("mixed-inputs");
    run_json(&mut command(home.path(), &["quantize", MODEL, &out, "--recipe", &recipe, "--json"]));
    let tokens = path("tokens.json");
    let words = ["score", &out, "--tokens", &tokens, "--json"];
    let found = run_json(&mut command(home.path(), &words));
    assert!(found["mean_nll"].as_f64().is_some_and(f64::is_finite), "{found}");
}

/// What is done to inputs is in the folder's config, and both devices do it.
#[test]
fn inputs_are_rotated_and_rounded_as_the_folder_says() {
    let home = tempfile::tempdir().expect("a folder");
    let path = |name: &str| home.path().join(name).display().to_string();
    let (tokens, recipe) = (path("tokens.json"), path("recipe.toml"));
    let ids: Vec<String> = (0..60).map(|i| (i * 7 % 60).to_string()).collect();
    std::fs::write(&tokens, format!("[{}]", ids.join(","))).expect("writes");
    let score = |model: &str, device: &str| {
        let words = ["score", model, "--tokens", &tokens, "--json", "--device", device];
        run_json(&mut command(home.path(), &words))["mean_nll"].as_f64().expect("a number")
    };
    let expected = score(MODEL, "reference");
    let text = "format = \"w8a8\"\n[[technique]]\nuse = \"hadamard\"\nblock = 0\n\
                inputs = \"down\"\n[[technique]]\nuse = \"rtn\"";
    std::fs::write(&recipe, text).expect("writes");
    let out = path("w8a8");
    run_json(&mut command(home.path(), &["quantize", MODEL, &out, "--recipe", &recipe, "--json"]));
    let config = std::fs::read_to_string(Path::new(&out).join("config.json")).expect("reads");
    let config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    let config = &config["quantization_config"];
    assert_eq!(config["format"], "int-quantized");
    let inputs = &config["config_groups"]["group_0"]["input_activations"];
    assert_eq!((&inputs["num_bits"], &inputs["strategy"]), (&8.into(), &"token".into()));
    let rotation = &config["transform_config"]["config_groups"]["hadamard_48"];
    assert_eq!(rotation["head_dim"], 48);
    assert_eq!(rotation["apply"][0]["targets"][0], "model.layers.0.mlp.down_proj");
    for device in ["reference", "cpu"] {
        let found = score(&out, device);
        assert!((found - expected).abs() < 0.02, "{device}: {found} {expected}");
        assert!(found != score(MODEL, device));
    }
    let (rotated, out) = (out, path("nvfp4"));
    let words = ["quantize", MODEL, &out, "--format", "nvfp4-a4", "--json"];
    run_json(&mut command(home.path(), &words));
    let (reference, cpu) = (score(&out, "reference"), score(&out, "cpu"));
    // A code of four bits that falls to the other side of a tie moves what is behind it.
    assert!((reference - cpu).abs() < 0.2 && (cpu - expected).abs() < 1.0, "{reference} {cpu}");
    // Plain floats without the rotation would be another model.
    for (to, path) in [("safetensors", path("floats")), ("gguf", path("floats.gguf"))] {
        let words = ["convert", &rotated, &path, "--to", to];
        let reason = run_error(&mut command(home.path(), &words), 2);
        assert!(reason.contains("rotated while"), "{reason}");
    }
    // Both need a folder.
    std::fs::write(&recipe, text.replace("w8a8", "q8_0")).expect("writes");
    let (gguf, out) = (path("out.gguf"), path("again"));
    let reason =
        run_error(&mut command(home.path(), &["quantize", MODEL, &gguf, "--recipe", &recipe]), 2);
    assert!(reason.contains("GGUF"), "{reason}");
    let again = ["quantize", &path("w8a8"), &out, "--format", "w8a16"];
    let reason = run_error(&mut command(home.path(), &again), 2);
    assert!(reason.contains("transformed already"), "{reason}");
}

/// Calibration finds the scale of NVFP4's inputs, and the folder stores it as other readers want
/// it.
#[test]
fn scales_of_inputs_are_found_and_stored() {
    let home = tempfile::tempdir().expect("a folder");
    let path = |name: &str| home.path().join(name).display().to_string();
    let tokens = path("tokens.json");
    let ids: Vec<String> = (0..60).map(|i| (i * 7 % 60).to_string()).collect();
    std::fs::write(&tokens, format!("[{}]", ids.join(","))).expect("writes");
    for (name, reader) in [("llama-tied", "transformers"), ("mixtral", "vllm"), ("deepseek-v3", "")]
    {
        let (model, out, recipe) = (fixture(name), path(name), path("recipe.toml"));
        // Rows of 24 and 12 are no whole groups of 16.
        let keep = if name == "deepseek-v3" { "keep = [\"*.query_up\", \"*.down\"]" } else { "" };
        let text = format!("format = \"nvfp4-a4\"\n{keep}\n[[technique]]\nuse = \"rtn\"");
        std::fs::write(&recipe, text).expect("writes");
        let words = ["quantize", &model, &out, "--recipe", &recipe, "--json"];
        let report = run_json(&mut command(home.path(), &words));
        let refusal = &report["readers"]["vllm"];
        assert!(refusal.as_str().is_some_and(|it| it.contains("stored scales")), "{report}");
        std::fs::remove_dir_all(&out).expect("is removed");
        let reader = if reader.is_empty() { vec![] } else { vec!["--for", reader] };
        let words = [&words[..], &["--calibration", &tokens], &reader].concat();
        run_json(&mut command(home.path(), &words));
        let config = std::fs::read_to_string(Path::new(&out).join("config.json")).expect("reads");
        let config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
        let group = &config["quantization_config"]["config_groups"]["group_0"];
        assert_eq!(group["input_activations"]["dynamic"], "local", "{name}");
        let file = std::fs::read(Path::new(&out).join("model.safetensors")).expect("reads");
        let (header, numbers) = header_of(&file);
        let (header, start) = (header.as_object().expect("an object"), file.len() - numbers);
        let scale = |tensor: &str| {
            let at = header[tensor]["data_offsets"][0].as_u64().expect("an offset") as usize;
            f32::from_le_bytes(file[start + at..][..4].try_into().expect("four bytes"))
        };
        let packed = header.keys().filter_map(|it| it.strip_suffix("weight_packed"));
        let scales: Vec<(&str, f32)> =
            packed.map(|it| (it, scale(&format!("{it}input_global_scale")))).collect();
        assert!(scales.iter().all(|(_, scale)| scale.is_normal() && *scale > 0.0), "{scales:?}");
        // What one input feeds has one scale, of all experts too.
        let of = |ending: &str| -> Vec<f32> {
            let ours = scales.iter().filter(|(name, _)| name.contains(ending));
            ours.map(|(_, scale)| *scale).collect()
        };
        let (one, other) = match name {
            "llama-tied" => ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"),
            "mixtral" => {
                ("layers.1.block_sparse_moe.experts.0.w1", "layers.1.block_sparse_moe.experts.7.w3")
            }
            _ => ("layers.1.mlp.experts.0.gate_proj", "layers.1.mlp.experts.7.up_proj"),
        };
        assert!(!of(one).is_empty() && of(one) == of(other), "{scales:?}");
        let score = |device: &str| {
            let words = ["score", &out, "--tokens", &tokens, "--json", "--device", device];
            run_json(&mut command(home.path(), &words))["mean_nll"].as_f64().expect("a number")
        };
        let (reference, cpu) = (score("reference"), score("cpu"));
        assert!((reference - cpu).abs() < 0.2, "{name}: {reference} {cpu}");
    }
}

/// Groups of 16 have no kernels on the CPU: who says that the reference is to run them gets them.
#[test]
fn groups_that_only_the_reference_runs_are_written_for_it() {
    let home = tempfile::tempdir().expect("a folder");
    let out = home.path().join("out").display().to_string();
    let words = ["quantize", MODEL, &out, "--format", "w4a16", "--group", "16"];
    let report = run_json(&mut command(
        home.path(),
        &[&words[..], &["--device", "reference", "--json"]].concat(),
    ));
    assert_eq!(report["format"], "int4-g16-bf16");
    let tokens = home.path().join("tokens.json");
    std::fs::write(&tokens, "[1, 5, 9, 33, 2]").expect("writes");
    let tokens = tokens.display().to_string();
    let words = ["score", &out, "--tokens", &tokens, "--json"];
    let found =
        run_json(&mut command(home.path(), &[&words[..], &["--device", "reference"]].concat()));
    assert!(found["mean_nll"].as_f64().is_some_and(f64::is_finite), "{found}");
    let reason = run_error(&mut command(home.path(), &words), 1);
    assert!(reason.contains("groups of this size"), "{reason}");
}

/// A page that needs no other file, the same numbers for programs, and no weights if nobody wants
/// them.
#[test]
fn errors_are_explained() {
    let home = tempfile::tempdir().expect("a folder");
    let path = |name: &str| home.path().join(name).display().to_string();
    let tokens = path("tokens.json");
    let ids: Vec<String> = (0..200).map(|i| (i * i % 59).to_string()).collect();
    std::fs::write(&tokens, format!("[{}]", ids.join(","))).expect("writes");
    let (out, page) = (path("out"), path("page.html"));
    let run = |out: &str, words: &[&str]| {
        let all = [&["quantize", MODEL, out, "--calibration", &tokens], words].concat();
        run_json(&mut command(home.path(), &[&all[..], &["--json"]].concat()))
    };
    let words =
        ["--format", "w8a16", "--method", "rotate+gptq", "--explain", "--explain-tokens", "48"];
    let report = run(&out, &words);
    assert_eq!(report["calibration_tokens"], 152);
    let explanation = &report["explanation"];
    assert_eq!((&explanation["tokens"], &explanation["window"]), (&48.into(), &48.into()));
    let layers = explanation["layers"].as_array().expect("layers");
    let kl = |it: &serde_json::Value| it["kl"]["mean"].as_f64().expect("a number");
    assert!(!layers.is_empty() && layers.iter().all(|it| kl(it) > 0.0 && kl(it) < 0.1));
    let read = |path: &Path| std::fs::read_to_string(path).expect("reads");
    let folder = Path::new(&out);
    let numbers: serde_json::Value =
        serde_json::from_str(&read(&folder.join("report.json"))).expect("JSON");
    assert_eq!(numbers["layers"], explanation["layers"]);
    let html = read(&folder.join("report.html"));
    assert!(html.starts_with("<!doctype html>") && html.trim_end().ends_with("</html>"));
    assert_eq!(html.matches("<svg").count(), 5);
    for tensor in layers[0]["tensors"].as_array().expect("tensors") {
        assert!(html.contains(tensor["tensor"].as_str().expect("a name")));
    }
    assert!(!html.contains("src=") && !html.contains("href="), "it needs no other file");
    let provenance = read(&folder.join("provenance.json"));
    assert!(!provenance.contains("\"explanation\""));
    assert!(!Path::new(&format!("{out}.quantizing")).exists());
    // A format that no file can hold is measured all the same; what exists is kept.
    let words = [
        "--format",
        "f8e4m3-channel-f32",
        "--device",
        "reference",
        "--explain",
        "--explain-tokens",
        "40",
    ];
    let error = {
        let all = [&["quantize", MODEL, &out, "--calibration", &tokens], &words[..]].concat();
        run_error(&mut command(home.path(), &all), 2)
    };
    assert!(error.contains("exists already"), "{error}");
    let report = run(&page, &words);
    assert_eq!(
        (&report["layout"], report["bytes"].as_u64()),
        (&"none".into(), Some(read(Path::new(&page)).len() as u64))
    );
    assert!(Path::new(&path("page.json")).is_file());
}

#[test]
fn what_cannot_be_explained_or_gone_on_from_is_refused() {
    let home = tempfile::tempdir().expect("a folder");
    let path = |name: &str| home.path().join(name).display().to_string();
    let (tokens, new, state) = (path("tokens.json"), path("new"), path("new.quantizing"));
    let ids: Vec<String> = (0..200).map(|i| (i * i % 59).to_string()).collect();
    std::fs::write(&tokens, format!("[{}]", ids.join(","))).expect("writes");
    let refused = |words: &[&str], expected: &[&str]| {
        let all = [&["quantize", MODEL], words].concat();
        let reason = run_error(&mut command(home.path(), &all), 2);
        assert!(expected.iter().all(|it| reason.contains(it)), "{words:?}: {reason}");
    };
    let plain = [new.as_str(), "--format", "w8a16", "--calibration", &tokens];
    let explain = |count| [&plain[..], &["--explain", "--explain-tokens", count]].concat();
    refused(&explain("200"), &["200 tokens, expected more"]);
    refused(&explain("1"), &["--explain-tokens is 1"]);
    refused(&[&path("x.html"), "--format", "w8a16"], &["x.html", "--explain"]);
    std::fs::create_dir(&state).expect("a folder");
    std::fs::write(Path::new(&state).join("state.json"), "{}").expect("writes");
    refused(&plain, &["new.quantizing", "state.json"]);
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    let home = tempfile::tempdir().expect("a folder");
    let out = home.path().join("out").display().to_string();
    let gguf = home.path().join("out.gguf").display().to_string();
    let recipe = home.path().join("bad.toml");
    std::fs::write(&recipe, "format = \"w8a16\"\nfromat = 3\n").expect("writes");
    let recipe = recipe.display().to_string();
    let cases: [(&[&str], [&str; 2]); 13] = [
        (&[&out, "--format", "w4a16"], ["layers.0.attention.query", "128"]),
        (&[&out, "--format", "w4a16", "--group", "32"], ["layers.0.ffn.down", "48"]),
        (
            &[&out, "--format", "w4a16", "--group", "16"],
            ["groups of this size", "--device reference"],
        ),
        (&[&out, "--format", "q8_0"], ["q8_0", ".gguf"]),
        (&[&gguf, "--format", "w8a16"], ["int8-channel-bf16", "GGUF"]),
        (&[&out, "--format", "f8e5m2-channel-bf16"], ["cannot be written", "attention.query"]),
        (&[&out, "--format", "bf16"], ["bf16", "lathe convert"]),
        (&[&out, "--format", "w8a16", "--method", "gptq"], ["--calibration", ""]),
        (&[&out, "--format", "w8a16", "--method", "magic"], ["magic", "gptq"]),
        (&[&out, "--format", "w8a16", "--activations", "int3"], ["int3", "int4-token"]),
        (&[&gguf, "--format", "q8_0", "--activations", "mxfp4"], ["activations", "q8_0"]),
        (&[&gguf, "--format", "q8_0", "--method", "rtn+low-rank"], ["low-rank", "adapter"]),
        (&[&out, "--recipe", &recipe], ["bad.toml", "fromat"]),
    ];
    for (words, expected) in cases {
        let words = [&["quantize", MODEL], words].concat();
        let reason = run_error(&mut command(home.path(), &words), 2);
        assert!(expected.iter().all(|it| reason.contains(it)), "{words:?}: {reason}");
    }
    assert!(!Path::new(&out).exists() && !Path::new(&gguf).exists());
    assert!(!home.path().join("out.partial").exists());
}

fn fixture(name: &str) -> String {
    format!("{}/../../tests/fixtures/tiny/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// The summary says who else runs the result, and `--for` refuses what its program would not run.
#[test]
fn who_runs_the_result_is_told_and_asked_for() {
    let home = tempfile::tempdir().expect("a folder");
    let path = |name: &str| home.path().join(name).display().to_string();
    let recipe = path("recipe.toml");
    let text = "format = \"w8a16\"\n[[technique]]\nuse = \"hadamard\"\nblock = 16\n\
                inputs = \"all\"\n[[technique]]\nuse = \"rtn\"";
    std::fs::write(&recipe, text).expect("writes");
    let (llama, mixtral) = (fixture("llama-tied"), fixture("mixtral"));
    // Rows of 48 are no whole groups of 32.
    let (six, four, eight) = (path("six.toml"), path("four.toml"), path("eight.toml"));
    for (path, format) in [(&six, "mxfp6"), (&four, "nvfp4"), (&eight, "q8_0")] {
        let down = if format == "nvfp4" { "" } else { "keep = [\"*.ffn.down\"]" };
        let text = format!("format = \"{format}\"\n{down}\n[[technique]]\nuse = \"rtn\"");
        std::fs::write(path, text).expect("writes");
    }
    let refused: [(&str, &[&str], &str, &str); 9] = [
        (&llama, &["--recipe", &recipe], "transformers", "`transform_config`"),
        (MODEL, &["--recipe", &recipe], "vllm", "with a bias"),
        (&llama, &["--format", "w8a16"], "llama.cpp", "GGUF"),
        (&llama, &["--recipe", &six], "vllm", "no scheme for linear layers"),
        (&llama, &["--format", "int8-tensor-bf16"], "vllm", "no scheme"),
        (&mixtral, &["--format", "w8a8"], "transformers", "in words, not in bytes"),
        (&mixtral, &["--recipe", &four], "transformers", "global scales"),
        (&mixtral, &["--format", "fp8"], "vllm", "no scheme for experts"),
        (&mixtral, &["--format", "int8-channel-bf16-asym"], "transformers", "no zero points"),
    ];
    let out = path("out");
    for (model, words, reader, reason) in refused {
        let for_reader = ["quantize", model, &out, "--for", reader];
        let found = run_error(&mut command(home.path(), &[&for_reader[..], words].concat()), 2);
        assert!(found.contains(reader) && found.contains(reason), "{words:?}: {found}");
        assert!(!Path::new(&out).exists());
        let words = [&["quantize", model, &out, "--json"], words].concat();
        let report = run_json(&mut command(home.path(), &words));
        let told = report["readers"][reader].as_str().expect("a reason");
        assert!(told.contains(reason), "{told}");
        std::fs::remove_dir_all(&out).expect("is removed");
    }
    let gguf = path("out.gguf");
    for (model, out, words, reader) in [
        (&llama, &out, ["--format", "w8a16"], "transformers"),
        (&llama, &out, ["--format", "w8a8"], "vllm"),
        (&mixtral, &out, ["--format", "w8a16"], "vllm"),
        (&mixtral, &out, ["--format", "fp8"], "transformers"),
        (&llama, &gguf, ["--recipe", &eight], "llama.cpp"),
        (&llama, &gguf, ["--recipe", &eight], "transformers"),
    ] {
        let words = [&["quantize", model, out, "--for", reader, "--json"], &words[..]].concat();
        let report = run_json(&mut command(home.path(), &words));
        assert!(report["readers"][reader].is_null(), "{report}");
        let _ = std::fs::remove_dir_all(out);
        for name in ["out.gguf", "out.recipe.toml", "out.provenance.json"] {
            let _ = std::fs::remove_file(path(name));
        }
    }
    let words = ["quantize", &mixtral, &out, "--format", "w8a8"];
    let done = command(home.path(), &words).output().expect("runs");
    let told = String::from_utf8(done.stdout).expect("text");
    assert!(told.contains("runs in lathe, vllm\n"), "{told}");
    assert!(told.contains("not in transformers: it looks for experts"), "{told}");
}

/// A recipe that names no tensors takes experts too, and what the layout has no place for stays.
#[test]
fn most_of_a_mixture_is_quantized_by_default() {
    let home = tempfile::tempdir().expect("a folder");
    let path = |name: &str| home.path().join(name).display().to_string();
    let quantize = |model: &str, format: &str, out: &str| {
        let model = fixture(model);
        let words = ["quantize", &model, out, "--format", format, "--json"];
        let done = command(home.path(), &words).output().expect("runs");
        let told = String::from_utf8(done.stderr).expect("text");
        let report: serde_json::Value =
            serde_json::from_slice(&done.stdout).unwrap_or_else(|error| panic!("{error}: {told}"));
        (report, told)
    };
    let names = |report: &serde_json::Value| -> String {
        report["tensors"]
            .as_array()
            .expect("tensors")
            .iter()
            .map(|it| it["tensor"].to_string())
            .collect()
    };
    for name in ["mixtral", "deepseek-v3", "qwen3-moe"] {
        let (report, _) = quantize(name, "w8a16", &path(name));
        assert!(names(&report).contains("experts.down[7]"), "{name}");
        let share = report["quantized_share"].as_f64().expect("a number");
        assert!(share > 0.8 && share < 1.0, "{name}: {share}");
        runs_as_its_floats(home.path(), &path(name));
    }
    // Techniques that need to see inputs see those of experts; an adapter is for modules alone.
    let tokens = path("tokens.json");
    let ids: Vec<String> = (0..60).map(|i| (i * 7 % 60).to_string()).collect();
    std::fs::write(&tokens, format!("[{}]", ids.join(","))).expect("writes");
    for method in ["gptaq", "awq+gptq", "gptq+low-rank"] {
        for name in ["mixtral", "deepseek-v3"] {
            let (model, out) = (fixture(name), path(&format!("{name}-{method}")));
            let words = ["quantize", &model, &out, "--format", "w8a16", "--method", method];
            let words = [&words[..], &["--calibration", &tokens, "--json"]].concat();
            let report = run_json(&mut command(home.path(), &words));
            let tensors = report["tensors"].as_array().expect("tensors");
            let corrected = |part: &str| {
                let ours = tensors.iter().filter(|it| it["tensor"].to_string().contains(part));
                ours.filter(|it| it["correction"].is_object()).count()
            };
            let corrects = method.ends_with("low-rank");
            assert!((corrected("attention.output") > 0) == corrects && corrected("experts") == 0);
            if !corrects {
                runs_as_its_floats(home.path(), &out);
            }
        }
    }
    // All rows of a fused tensor have one scale: its matrices, and what runs beside them, stay.
    let (report, told) = quantize("deepseek-v3", "fp8_tensor", &path("tensor"));
    assert!(!names(&report).contains("kv_down") && !names(&report).contains("query_down"));
    assert!(names(&report).contains("query_up") && names(&report).contains("experts.up[0]"));
    assert!(told.contains("kept as it is: layers.*.attention.kv_down"), "{told}");
    assert!(told.contains("query_down (run as one with"), "{told}");
    // gpt-oss has experts in one tensor, which only MXFP4 has a place for.
    let (report, told) = quantize("gpt-oss", "w8a16", &path("attention"));
    assert!(names(&report).contains("attention.query") && !names(&report).contains("experts"));
    assert!(told.contains("kept as it is: layers.*.ffn.experts.down"), "{told}");
    let (report, told) = quantize("gpt-oss", "mxfp4", &path("experts"));
    assert!(!names(&report).contains("attention.query") && names(&report).contains("experts"));
    assert!(told.contains("kept as it is: layers.*.attention.query"), "{told}");
}

/// Matrices that engines run as one are not stored in two formats.
#[test]
fn pairs_that_engines_fuse_are_refused_in_two_formats() {
    let home = tempfile::tempdir().expect("a folder");
    let (recipe, out) = (home.path().join("recipe.toml"), home.path().join("out"));
    let text = "format = \"w8a16\"\nkeep = [\"*.attention.key\"]\n[[technique]]\nuse = \"rtn\"";
    std::fs::write(&recipe, text).expect("writes");
    let (recipe, out) = (recipe.display().to_string(), out.display().to_string());
    let words = ["quantize", MODEL, &out, "--recipe", &recipe];
    let reason = run_error(&mut command(home.path(), &words), 2);
    assert!(
        reason.contains("layers.0.attention.query") && reason.contains("key is kept"),
        "{reason}"
    );
    // llama.cpp runs them apart.
    let gguf = home.path().join("out.gguf").display().to_string();
    let text = text.replace("w8a16", "q8_0").replace("key\"", "key\", \"*.ffn.down\"");
    std::fs::write(&recipe, text).expect("writes");
    run_json(&mut command(home.path(), &["quantize", MODEL, &gguf, "--recipe", &recipe, "--json"]));
}

/// Numbers that were rounded once are not rounded again without a word.
#[test]
fn quantized_models_are_quantized_again_only_when_asked() {
    let home = tempfile::tempdir().expect("a folder");
    let path = |name: &str| home.path().join(name).display().to_string();
    let (first, second, folder) = (path("first.gguf"), path("second.gguf"), path("folder"));
    let model = fixture("llama-tied");
    // Rows of `down` are no whole blocks.
    let recipe = |format: &str| {
        let (path, keep) = (path(&format!("{format}.toml")), "keep = [\"*.ffn.down\"]");
        let text = format!("format = \"{format}\"\n{keep}\n[[technique]]\nuse = \"rtn\"");
        std::fs::write(&path, text).expect("writes");
        path
    };
    let (q8_0, q4_0) = (recipe("q8_0"), recipe("q4_0"));
    let words = ["quantize", &model, &first, "--recipe", &q8_0, "--json"];
    run_json(&mut command(home.path(), &words));
    run_json(&mut command(
        home.path(),
        &["quantize", &model, &folder, "--format", "w8a16", "--json"],
    ));
    for source in [&first, &folder] {
        let words = ["quantize", source, &second, "--recipe", &q4_0];
        let reason = run_error(&mut command(home.path(), &words), 2);
        assert!(reason.contains("quantized already, to"), "{reason}");
        assert!(reason.contains("--allow-requantize") && !Path::new(&second).exists());
        let words = [&words[..], &["--allow-requantize"]].concat();
        let done = command(home.path(), &words).output().expect("runs");
        let told = String::from_utf8(done.stderr).expect("text");
        assert!(done.status.success() && told.contains("a second time"), "{told}");
        std::fs::remove_file(&second).expect("was written");
        for beside in ["second.recipe.toml", "second.provenance.json"] {
            std::fs::remove_file(path(beside)).expect("was written");
        }
    }
    // Floats in GGUF are floats.
    let plain = path("plain.gguf");
    run_json(&mut command(home.path(), &["convert", &model, &plain, "--to", "gguf", "--json"]));
    run_json(&mut command(
        home.path(),
        &["quantize", &plain, &second, "--recipe", &q4_0, "--json"],
    ));
}

/// Records are read by their text or messages, and too little text is told or refused.
#[test]
fn calibration_reads_records_and_wants_text() {
    let home = tempfile::tempdir().expect("a folder");
    let path = |name: &str| home.path().join(name).display().to_string();
    let model = path("model");
    std::fs::create_dir(&model).expect("a folder");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(Path::new(MODEL).join(name), Path::new(&model).join(name)).expect("copies");
    }
    let words = ["<unk>", "<s>", "</s>", "user", "assistant", "one", "two", "three", "{", "}"];
    let vocabulary: serde_json::Map<String, serde_json::Value> =
        words.iter().enumerate().map(|(id, word)| ((*word).to_owned(), id.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
        "decoder": {"type": "Fuse"}, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}});
    let template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}";
    let settings = serde_json::json!({"chat_template": template});
    let write = |name: &str, text: &str| std::fs::write(path(name), text).expect("writes");
    write("model/tokenizer.json", &tokenizer.to_string());
    write("model/tokenizer_config.json", &settings.to_string());
    let mut count = 0;
    let mut run = |name: &str, text: &str| {
        count += 1;
        write(name, text);
        let (text, out) = (path(name), path(&format!("out{count}")));
        let words = ["quantize", &model, &out, "--format", "w8a16", "--method", "clip", "--json"];
        command(home.path(), &[&words[..], &["--calibration", &text]].concat())
            .output()
            .expect("runs")
    };
    let records = "{\"text\": \"one two three\", \"id\": 3}\n\n\
                   {\"messages\": [{\"role\": \"user\", \"content\": \"one\"}, \
                   {\"role\": \"assistant\", \"content\": \"two three\"}]}\n";
    let done = run("records.jsonl", records);
    let told = String::from_utf8(done.stderr).expect("text");
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).expect(&told);
    // Three words of text; two names and three words of messages.
    assert_eq!(report["calibration_tokens"], 8, "{told}");
    assert!(told.contains("8 tokens of calibration; fewer than 4096"), "{told}");
    let done = run("plenty.txt", &"one two three ".repeat(1400));
    let told = String::from_utf8(done.stderr).expect("text");
    assert!(done.status.success() && !told.contains("fewer than"), "{told}");
    for (name, text, expected) in [
        ("one.txt", "one", "1 token, expected a text of at least 2"),
        (
            "bad.jsonl",
            "{\"text\": \"one\"}\n{\"prompt\": \"one\", \"id\": 1}",
            "bad.jsonl:2: the fields",
        ),
        ("array.jsonl", "[1, 2]", "array.jsonl:1: no object"),
        ("broken.jsonl", "{\"text\": ", "broken.jsonl:1: "),
        ("empty.jsonl", "\n", "0 tokens"),
    ] {
        let done = run(name, text);
        let told = String::from_utf8(done.stderr).expect("text");
        assert!(done.status.code() == Some(2) && told.contains(expected), "{name}: {told}");
    }
}
