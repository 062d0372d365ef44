//! A Hub on the loopback interface that misbehaves as told.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use sha2::{Digest, Sha256};

/// The commit that the fake repository is at.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the Hub misbehaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    /// It works.
    Well,
    /// Every connection that brings a large file ends after this many bytes.
    CutAfter(usize),
    /// As `CutAfter`, but it does not understand `Range`.
    CutOnceWithoutRange(usize),
    /// Everything asks for a token.
    NeedsToken,
    /// Nothing is there.
    Empty,
    /// The repository was renamed: everything goes to another path by a relative redirect.
    Renamed,
    /// The bytes are not those that the ETag names.
    Corrupt,
    /// Large files lie on another host.
    OtherHost,
}

#[derive(Debug, Clone)]
struct Request {
    method: String,
    path: String,
    headers: HashMap<String, String>,
}

/// A Hub that holds one repository, `org/name`.
pub(crate) struct Hub {
    /// For `HF_ENDPOINT`.
    pub endpoint: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

struct Server {
    mood: Mood,
    files: Vec<(String, Vec<u8>)>,
    requests: Arc<Mutex<Vec<Request>>>,
    cuts: Mutex<usize>,
    storage: Option<String>,
}

impl Hub {
    /// Starts one; it lives as long as the test.
    pub(crate) fn start(mood: Mood, files: &[(&str, &[u8])]) -> Self {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let files: Vec<_> = files.iter().map(|(n, b)| ((*n).to_owned(), b.to_vec())).collect();
        let serve = |mood, storage| {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
            let server = Arc::new(Server {
                mood,
                files: files.clone(),
                requests: Arc::clone(&requests),
                cuts: Mutex::new(0),
                storage,
            });
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let server = Arc::clone(&server);
                    thread::spawn(move || server.talk(stream));
                }
            });
            endpoint
        };
        let storage = (mood == Mood::OtherHost).then(|| serve(Mood::Well, None));
        let endpoint = serve(mood, storage);
        Self { endpoint, requests }
    }

    /// `METHOD path range=... token=...` of each request.
    pub(crate) fn requests(&self) -> Vec<String> {
        let requests = self.requests.lock().expect("requests");
        let line = |request: &Request| {
            let header = |name: &str| request.headers.get(name).cloned().unwrap_or_default();
            let (range, token) = (header("range"), header("authorization"));
            format!("{} {} range={range} token={token}", request.method, request.path)
        };
        requests.iter().map(line).collect()
    }
}

/// The Hub names large files by their SHA-256 and small ones by their git hash; both kinds are
/// told apart by length alone.
pub(crate) fn etag(bytes: &[u8]) -> String {
    let digest: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    if is_large(bytes) { digest } else { digest[..40].to_owned() }
}

fn is_large(bytes: &[u8]) -> bool {
    bytes.len() > 1000
}

impl Server {
    fn talk(&self, stream: TcpStream) {
        let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
        let mut out = stream;
        while let Some(request) = read_request(&mut reader) {
            self.requests.lock().expect("requests").push(request.clone());
            if !self.answer(&request, &mut out) {
                let _ = out.shutdown(std::net::Shutdown::Both);
                return;
            }
        }
    }

    /// Answers; false ends the connection.
    fn answer(&self, request: &Request, out: &mut TcpStream) -> bool {
        if self.mood == Mood::NeedsToken
            && request.headers.get("authorization").map(String::as_str) != Some("Bearer secret")
        {
            return reply(out, "401 Unauthorized", &[], b"no");
        }
        let path = match (self.mood, request.path.strip_prefix("/org/name/resolve/")) {
            (Mood::Empty, _) => return reply(out, "404 Not Found", &[], b""),
            (Mood::Renamed, Some(rest)) => {
                let location = format!("/org/renamed/resolve/{rest}");
                return reply(out, "307 Temporary Redirect", &[("Location", &location)], b"");
            }
            _ => request.path.replace("/org/renamed/", "/org/name/"),
        };
        if path == "/api/models/org/name/revision/main"
            || path == format!("/api/models/org/name/revision/{COMMIT}")
        {
            let names: Vec<_> =
                self.files.iter().map(|(n, _)| serde_json::json!({"rfilename": n})).collect();
            let body =
                serde_json::json!({"id": "org/name", "sha": COMMIT, "siblings": names}).to_string();
            return reply(out, "200 OK", &[], body.as_bytes());
        }
        if path.starts_with(&format!("/api/models/org/name/tree/{COMMIT}")) {
            let body = serde_json::Value::from_iter(self.files.iter().map(tree_entry)).to_string();
            return reply(out, "200 OK", &[("Content-Type", "application/json")], body.as_bytes());
        }
        let prefix = format!("/org/name/resolve/{COMMIT}/");
        let file = path.strip_prefix(&prefix).or_else(|| path.strip_prefix("/storage/"));
        let found = file.and_then(|file| self.files.iter().find(|(name, _)| name == file));
        match found {
            Some((name, bytes)) => self.file(request, name, bytes, out),
            None => reply(out, "404 Not Found", &[], b""),
        }
    }

    fn file(&self, request: &Request, name: &str, bytes: &[u8], out: &mut TcpStream) -> bool {
        let etag = format!("\"{}\"", etag(bytes));
        let length = bytes.len().to_string();
        if let (Some(storage), true) = (&self.storage, is_large(bytes)) {
            let location = format!("{storage}/storage/{name}");
            let headers = [
                ("Location", location.as_str()),
                ("X-Linked-Etag", &etag),
                ("X-Linked-Size", &length),
                ("X-Repo-Commit", COMMIT),
            ];
            return reply(out, "302 Found", &headers, b"");
        }
        let mut bytes = bytes.to_vec();
        if request.method == "HEAD" {
            let head = format!(
                "HTTP/1.1 200 OK\r\nETag: {etag}\r\nX-Repo-Commit: {COMMIT}\r\nContent-Length: {length}\r\n\r\n"
            );
            return out.write_all(head.as_bytes()).is_ok();
        }
        if self.mood == Mood::Corrupt && is_large(&bytes) {
            bytes[500] ^= 1;
        }
        let range = request
            .headers
            .get("range")
            .filter(|_| !matches!(self.mood, Mood::CutOnceWithoutRange(_)));
        let start = range.and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        let start: usize = start.unwrap_or(0);
        let body = &bytes[start.min(bytes.len())..];
        let status = if start > 0 { "206 Partial Content" } else { "200 OK" };
        let content_range = format!("bytes {start}-{}/{}", bytes.len().max(1) - 1, bytes.len());
        let headers = [("ETag", etag.as_str()), ("Content-Range", &content_range)];
        let keep = self.keep(body.len());
        reply_cut(out, status, &headers[..1 + usize::from(start > 0)], body, keep)
            && keep == body.len()
    }

    /// How many of the next body's bytes the mood lets through.
    fn keep(&self, length: usize) -> usize {
        let mut cuts = self.cuts.lock().expect("cuts");
        match self.mood {
            Mood::CutAfter(most) if length > 1000 => length.min(most),
            Mood::CutOnceWithoutRange(most) if length > 1000 && *cuts == 0 => {
                *cuts += 1;
                length.min(most)
            }
            _ => length,
        }
    }
}

/// A file as the Hub lists it to Python's client.
fn tree_entry((name, bytes): &(String, Vec<u8>)) -> serde_json::Value {
    let (size, oid) = (bytes.len(), etag(bytes));
    let mut entry = serde_json::json!({
        "type": "file", "path": name, "size": size, "oid": oid[..40],
    });
    if is_large(bytes) {
        entry["lfs"] = serde_json::json!({"oid": oid, "size": size, "pointerSize": 130});
    }
    entry
}

fn read_request(reader: &mut impl BufRead) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|count| *count > 0)?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    Some(Request { method, path, headers })
}

fn reply(out: &mut TcpStream, status: &str, headers: &[(&str, &str)], body: &[u8]) -> bool {
    reply_cut(out, status, headers, body, body.len())
}

/// Promises all of `body` and sends the first `keep` bytes.
fn reply_cut(
    out: &mut TcpStream,
    status: &str,
    headers: &[(&str, &str)],
    body: &[u8],
    keep: usize,
) -> bool {
    let mut head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    out.write_all(head.as_bytes()).is_ok() && out.write_all(&body[..keep]).is_ok()
}
