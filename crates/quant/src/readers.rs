//! A table for the documentation: which programs can run the result of each preset.

use lathe_model::export::{Contents, Reader};
use lathe_tensor::Format;

use crate::recipe::PRESETS;

/// The table in Markdown, followed by a list of the reasons for each "no".
pub fn table() -> String {
    let mut reasons: Vec<String> = Vec::new();
    let mut text = String::from(
        "| preset | weights | inputs | transformers | vLLM | its experts in transformers | in vLLM | \
         llama.cpp |\n|---|---|---|---|---|---|---|---|\n",
    );
    for preset in &PRESETS {
        let contents = |experts| match Format::parse(preset.format) {
            Ok(Format::Scaled(format)) => {
                Contents::of_one_format(format, preset.activations, experts)
            }
            _ => Some(Contents::Gguf),
        };
        let (layers, experts) = (contents(false), contents(true));
        let mut cell = |reader: Reader, contents: &Option<Contents>| {
            let Some(contents) = contents else { return "-".to_owned() };
            let Some(reason) = reader.refusal(contents) else { return "yes".to_owned() };
            let known = reasons.iter().position(|it| *it == reason);
            let number = known.unwrap_or_else(|| {
                reasons.push(reason);
                reasons.len() - 1
            });
            format!("no: {}", number + 1)
        };
        // Mixtures of experts cannot be written to GGUF.
        let experts = experts.filter(|contents| *contents != Contents::Gguf);
        let cells = [
            cell(Reader::Transformers, &layers),
            cell(Reader::Vllm, &layers),
            cell(Reader::Transformers, &experts),
            cell(Reader::Vllm, &experts),
            cell(Reader::LlamaCpp, &layers),
        ];
        let inputs = preset.activations.map_or("-", |format| format.name());
        let head = format!("| `{}` | {} | {inputs} |", preset.name, preset.format);
        text.push_str(&format!("{head} {} |\n", cells.join(" | ")));
    }
    text.push('\n');
    for (index, reason) in reasons.iter().enumerate() {
        text.push_str(&format!("{}. {reason}\n", index + 1));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_documentation_has_the_table() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/quantization.md");
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains(&table()), "docs/quantization.md lacks this table:\n{}", table());
    }
}
