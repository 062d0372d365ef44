//! The environment variables of the Hub and its cache, with the names and defaults of Python's
//! `huggingface_hub`.

use std::env;
use std::fmt;
use std::fs;
use std::path::PathBuf;

use super::cache::Cache;

/// Where to look for models.
#[derive(Clone)]
pub struct Environment {
    /// The cache.
    pub cache: Cache,
    /// The Hub's address, without a slash at the end.
    pub endpoint: String,
    /// Sent as a bearer token to the Hub and to no other host.
    pub token: Option<String>,
    /// Whether requests to the Hub are forbidden.
    pub offline: bool,
}

/// Omits secrets: the token, and a password in the address.
impl fmt::Debug for Environment {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.endpoint.rsplit('@').next().unwrap_or_default();
        out.debug_struct("Environment")
            .field("cache", &self.cache)
            .field("endpoint", &host)
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("offline", &self.offline)
            .finish()
    }
}

impl Environment {
    /// Reads `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HF_ENDPOINT`, `HF_TOKEN`,
    /// `HF_TOKEN_PATH` and `HF_HUB_OFFLINE`.
    pub fn from_process() -> Self {
        let home = home();
        let root = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .unwrap_or_else(|| home.join("hub"));
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Self {
            cache: Cache::new(root),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token(&home),
            offline: is_true("HF_HUB_OFFLINE") || is_true("TRANSFORMERS_OFFLINE"),
        }
    }
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn path(name: &str) -> Option<PathBuf> {
    let value = variable(name)?;
    match value.strip_prefix("~/") {
        Some(rest) => Some(env::home_dir()?.join(rest)),
        None => Some(PathBuf::from(value)),
    }
}

fn is_true(name: &str) -> bool {
    variable(name)
        .is_some_and(|value| matches!(value.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
}

fn home() -> PathBuf {
    path("HF_HOME").unwrap_or_else(|| {
        let caches = path("XDG_CACHE_HOME")
            .or_else(|| Some(env::home_dir()?.join(".cache")))
            .unwrap_or_else(env::temp_dir);
        caches.join("huggingface")
    })
}

fn token(home: &std::path::Path) -> Option<String> {
    let clean = |text: String| {
        let text: String = text.chars().filter(|c| !matches!(c, '\r' | '\n')).collect();
        let text = text.trim().to_owned();
        (!text.is_empty()).then_some(text)
    };
    if is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
        return None;
    }
    variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN")).and_then(clean).or_else(
        || {
            let file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
            fs::read_to_string(file).ok().and_then(clean)
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_printed() {
        let environment = Environment {
            cache: Cache::new(PathBuf::from("/cache")),
            endpoint: "https://me:password@hub.example".into(),
            token: Some("hf_secret".into()),
            offline: false,
        };
        let text = format!("{environment:?}");
        assert!(text.contains("hub.example"), "{text}");
        assert!(!text.contains("secret") && !text.contains("password"), "{text}");
    }
}
