//! How often drafts were right.

/// How often a drafted token was accepted, where all before it were.
#[derive(Debug, Clone, Copy)]
pub(super) struct Acceptance {
    accepted: f64,
    tried: f64,
}

impl Default for Acceptance {
    fn default() -> Self {
        Self { accepted: 1.5, tried: 2.5 }
    }
}

impl Acceptance {
    /// How much a token still counts after one more.
    const KEPT: f64 = 0.95;

    /// 0 to 1.
    pub(super) fn rate(self) -> f64 {
        self.accepted / self.tried
    }

    /// Takes note of `tried` tokens, of which the first `accepted` were accepted.
    pub(super) fn observe(&mut self, accepted: usize, tried: usize) {
        for token in 0..tried {
            self.accepted = self.accepted * Self::KEPT + f64::from(u8::from(token < accepted));
            self.tried = self.tried * Self::KEPT + 1.0;
        }
    }
}
