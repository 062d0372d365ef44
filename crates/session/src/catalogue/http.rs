//! Requests to the Hub. Redirects are followed here, so that the token goes to the Hub's own host
//! only, and so that a caller can read the headers of a redirect.

use std::time::Duration;

use ureq::http::{Response, Uri};
use ureq::tls::{PemItem, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::CatalogueError;

const REDIRECTS_MAX: usize = 10;

/// A client for one Hub.
#[derive(Debug, Clone)]
pub(super) struct Client {
    agent: Agent,
    endpoint: Uri,
    token: Option<String>,
}

/// Which redirects a request follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Follow {
    /// All.
    All,
    /// Redirects to the same host (a renamed repository). For a large file the Hub redirects to its
    /// storage; a caller reads the headers of that redirect and does not follow it.
    SameHost,
}

impl Client {
    /// A client for the Hub at `endpoint`.
    pub(super) fn new(endpoint: &str, token: Option<&str>) -> Result<Self, CatalogueError> {
        let uri = parse(endpoint)?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.authority().is_none() {
            let reference = format!("HF_ENDPOINT={endpoint}");
            let reason = "expected an address that starts with https:// or http://".to_owned();
            return Err(CatalogueError::Unknown { reference, reason });
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("lathe/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_resolve(Some(Duration::from_secs(10)))
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(Duration::from_secs(30)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .tls_config(TlsConfig::builder().root_certs(root_certificates()).build())
            .build();
        Ok(Self { agent: config.new_agent(), endpoint: uri, token: token.map(str::to_owned) })
    }

    /// `HEAD url`.
    pub(super) fn head(&self, url: &str, follow: Follow) -> Result<Response<Body>, CatalogueError> {
        self.request("HEAD", url, None, follow).map(|(response, _)| response)
    }

    /// `GET url` from byte `offset` on.
    pub(super) fn get(&self, url: &str, offset: u64) -> Result<Response<Body>, CatalogueError> {
        let range = (offset > 0).then(|| format!("bytes={offset}-"));
        self.request("GET", url, range.as_deref(), Follow::All).map(|(response, _)| response)
    }

    fn request(
        &self,
        method: &str,
        url: &str,
        range: Option<&str>,
        follow: Follow,
    ) -> Result<(Response<Body>, String), CatalogueError> {
        let mut url = url.to_owned();
        for _ in 0..=REDIRECTS_MAX {
            let uri = parse(&url)?;
            let mut request = match method {
                "HEAD" => self.agent.head(&url),
                _ => self.agent.get(&url),
            };
            if let (Some(token), true) = (&self.token, same_origin(&uri, &self.endpoint)) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if let Some(range) = range {
                request = request.header("Range", range);
            }
            let response = request.call().map_err(|error| http_error(&url, error))?;
            let Some(location) = redirect(&response) else { return Ok((response, url)) };
            let next = join(&uri, &location);
            if follow == Follow::SameHost && !same_origin(&parse(&next)?, &uri) {
                return Ok((response, url));
            }
            url = next;
        }
        let reason = format!("more than {REDIRECTS_MAX} redirects");
        Err(CatalogueError::Http { url, reason })
    }
}

/// The value of a header, if present and text.
pub(super) fn header<'a>(response: &'a Response<Body>, name: &str) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

fn redirect(response: &Response<Body>) -> Option<String> {
    match response.status().as_u16() {
        301 | 302 | 303 | 307 | 308 => header(response, "location").map(str::to_owned),
        _ => None,
    }
}

fn parse(url: &str) -> Result<Uri, CatalogueError> {
    url.parse::<Uri>().map_err(|error| CatalogueError::Http {
        url: url.to_owned(),
        reason: format!("not an address: {error}"),
    })
}

fn same_origin(left: &Uri, right: &Uri) -> bool {
    left.scheme() == right.scheme() && left.authority() == right.authority()
}

/// Resolves a `Location` against the address of its response (RFC 3986, section 5.2). Dot segments
/// are not supported, because servers do not send them.
fn join(base: &Uri, location: &str) -> String {
    let scheme = base.scheme_str().unwrap_or("https");
    let authority = base.authority().map(|a| a.as_str()).unwrap_or_default();
    if location.contains("://") {
        location.to_owned()
    } else if let Some(rest) = location.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    }
}

fn http_error(url: &str, error: ureq::Error) -> CatalogueError {
    CatalogueError::Http { url: url.to_owned(), reason: error.to_string() }
}

/// The built-in certificates, or those of the file that `SSL_CERT_FILE` or `REQUESTS_CA_BUNDLE`
/// names, as in Python's client. Networks with a proxy of their own need this.
fn root_certificates() -> RootCerts {
    let named = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"].iter().find_map(|name| {
        let bytes = std::fs::read(std::env::var_os(name)?).ok()?;
        let certificates: Vec<_> = ureq::tls::parse_pem(&bytes)
            .filter_map(|item| match item {
                Ok(PemItem::Certificate(certificate)) => Some(certificate),
                _ => None,
            })
            .collect();
        (!certificates.is_empty()).then_some(certificates)
    });
    match named {
        Some(certificates) => RootCerts::new_with_certs(&certificates),
        None => RootCerts::WebPki,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations() {
        let base: Uri = "http://h:1/a/b?c".parse().expect("an address");
        assert_eq!(join(&base, "https://x/y"), "https://x/y");
        assert_eq!(join(&base, "//x/y"), "http://x/y");
        assert_eq!(join(&base, "/y?z"), "http://h:1/y?z");
        assert_eq!(join(&base, "y"), "http://h:1/a/y");
    }
}
