//! The rows: one a family.

use super::{Family, deepseek, gemma, gpt_oss, llama, qwen};
use crate::names::hugging_face::{COMMON, GPT_OSS, MIXTRAL, POST_NORMS, SANDWICH, SHARED_EXPERT};

pub(super) static TABLE: &[Family] = &[
    Family {
        model_types: &["llama"],
        architecture: "LlamaForCausalLM",
        spec: llama::llama,
        rules: &[COMMON],
    },
    Family {
        model_types: &["mistral"],
        architecture: "MistralForCausalLM",
        spec: llama::mistral,
        rules: &[COMMON],
    },
    Family {
        model_types: &["mixtral"],
        architecture: "MixtralForCausalLM",
        spec: llama::mixtral,
        rules: &[MIXTRAL, COMMON],
    },
    Family {
        model_types: &["granite"],
        architecture: "GraniteForCausalLM",
        spec: llama::granite,
        rules: &[COMMON],
    },
    Family {
        model_types: &["smollm3"],
        architecture: "SmolLM3ForCausalLM",
        spec: llama::smollm3,
        rules: &[COMMON],
    },
    Family {
        model_types: &["phi3"],
        architecture: "Phi3ForCausalLM",
        spec: llama::phi3,
        rules: &[COMMON],
    },
    Family {
        model_types: &["olmo2"],
        architecture: "Olmo2ForCausalLM",
        spec: llama::olmo2,
        rules: &[POST_NORMS, COMMON],
    },
    Family {
        model_types: &["olmo3"],
        architecture: "Olmo3ForCausalLM",
        spec: llama::olmo3,
        rules: &[POST_NORMS, COMMON],
    },
    Family {
        model_types: &["qwen2"],
        architecture: "Qwen2ForCausalLM",
        spec: qwen::qwen2,
        rules: &[COMMON],
    },
    Family {
        model_types: &["qwen2_moe"],
        architecture: "Qwen2MoeForCausalLM",
        spec: qwen::qwen2_moe,
        rules: &[SHARED_EXPERT, COMMON],
    },
    Family {
        model_types: &["qwen3"],
        architecture: "Qwen3ForCausalLM",
        spec: qwen::qwen3,
        rules: &[COMMON],
    },
    Family {
        model_types: &["qwen3_moe"],
        architecture: "Qwen3MoeForCausalLM",
        spec: qwen::qwen3_moe,
        rules: &[COMMON],
    },
    Family {
        model_types: &["gemma2"],
        architecture: "Gemma2ForCausalLM",
        spec: gemma::gemma2,
        rules: &[SANDWICH, COMMON],
    },
    Family {
        model_types: &["gemma3_text"],
        architecture: "Gemma3ForCausalLM",
        spec: gemma::gemma3,
        rules: &[SANDWICH, COMMON],
    },
    Family {
        model_types: &["gemma3"],
        architecture: "Gemma3ForConditionalGeneration",
        spec: gemma::gemma3_text_of,
        rules: &[SANDWICH, COMMON],
    },
    Family {
        model_types: &["gpt_oss"],
        architecture: "GptOssForCausalLM",
        spec: gpt_oss::gpt_oss,
        rules: &[GPT_OSS, COMMON],
    },
    Family {
        model_types: &["deepseek_v2"],
        architecture: "DeepseekV2ForCausalLM",
        spec: deepseek::deepseek_v2,
        rules: &[COMMON],
    },
    Family {
        model_types: &["deepseek_v3", "kimi_k2"],
        architecture: "DeepseekV3ForCausalLM",
        spec: deepseek::deepseek_v3,
        rules: &[COMMON],
    },
    Family {
        model_types: &["glm4_moe"],
        architecture: "Glm4MoeForCausalLM",
        spec: deepseek::glm4_moe,
        rules: &[COMMON],
    },
    Family {
        model_types: &["minicpm3"],
        architecture: "MiniCPM3ForCausalLM",
        spec: deepseek::minicpm3,
        rules: &[COMMON],
    },
];
