//! How this library reports downloads and notices. The caller owns the terminal.

/// Hears what happens while a model is found, fetched and opened.
pub trait Reporter: Sync {
    /// A line for the user.
    fn line(&self, text: &str);
    /// The transfer of `name` begins. `bytes` is its whole length, if known; `have` of them are
    /// there already.
    fn start(&self, name: &str, bytes: Option<u64>, have: u64) -> Box<dyn Progress>;
}

/// The transfer of one file.
pub trait Progress {
    /// `have` bytes are there now.
    fn set(&self, have: u64);
    /// All bytes are there.
    fn finish(&self);
    /// The transfer ended early.
    fn abandon(&self);
}

/// A reporter that does nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Reporter for Silent {
    fn line(&self, _text: &str) {}

    fn start(&self, _name: &str, _bytes: Option<u64>, _have: u64) -> Box<dyn Progress> {
        Box::new(Silent)
    }
}

impl Progress for Silent {
    fn set(&self, _have: u64) {}
    fn finish(&self) {}
    fn abandon(&self) {}
}
