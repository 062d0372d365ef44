//! From tokens to text deltas: whole characters only, and nothing that may yet turn out to be
//! the start of a stop string. Does not know how a vocabulary spells its tokens.

/// Turns the tokens of one text into characters.
pub trait TextDecoder: Send {
    /// Takes the next token; returns text that is now certain. Never half a character.
    fn push(&mut self, token: u32) -> Option<String>;
    /// What is left at the end, incomplete characters replaced.
    fn flush(&mut self) -> Option<String>;
}

impl TextDecoder for lathe_model::tokenizer::DecodeStream {
    fn push(&mut self, token: u32) -> Option<String> {
        self.push(token)
    }

    fn flush(&mut self) -> Option<String> {
        self.flush()
    }
}

/// One request's text: a decoder, and the stop strings to watch for.
pub struct TextOutput {
    decoder: Option<Box<dyn TextDecoder>>,
    stops: Vec<String>,
    /// Decoded, but possibly the start of a stop string.
    held: String,
}

impl TextOutput {
    /// Without a decoder all deltas are empty. `stops` are not empty strings.
    pub fn new(decoder: Option<Box<dyn TextDecoder>>, stops: Vec<String>) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()));
        TextOutput { decoder, stops, held: String::new() }
    }

    /// Takes a token. Returns the text that may be shown now and whether a stop string ended it;
    /// after a stop nothing is held back, and the caller stops pushing.
    pub fn push(&mut self, token: u32) -> (String, bool) {
        if let Some(text) = self.decoder.as_mut().and_then(|decoder| decoder.push(token)) {
            self.held.push_str(&text);
        }
        self.release()
    }

    /// Ends the text: what was held back, now that no stop string can complete it any more.
    /// The decoder's last characters may still complete one.
    pub fn finish(&mut self) -> (String, bool) {
        if let Some(text) = self.decoder.as_mut().and_then(|decoder| decoder.flush()) {
            self.held.push_str(&text);
        }
        let (mut text, stopped) = self.release();
        text.push_str(&std::mem::take(&mut self.held));
        (text, stopped)
    }

    fn release(&mut self) -> (String, bool) {
        // The stop string that starts first wins, whatever their order in the request.
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop)).min();
        if let Some(start) = found {
            self.held.truncate(start);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }
}

/// Bytes of the longest suffix of `text` that is a proper prefix of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    let (text, stop) = (text.as_bytes(), stop.as_bytes());
    (1..=longest).rev().find(|&n| text[text.len() - n..] == stop[..n]).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};

    use super::*;

    /// Each token is one of a few strings.
    struct Pieces(Vec<&'static str>);

    impl TextDecoder for Pieces {
        fn push(&mut self, token: u32) -> Option<String> {
            Some(self.0[token as usize].to_string())
        }
        fn flush(&mut self) -> Option<String> {
            None
        }
    }

    fn run(pieces: &[&'static str], stops: &[&str]) -> (Vec<String>, bool) {
        let decoder = Box::new(Pieces(pieces.to_vec()));
        let stops = stops.iter().map(|s| s.to_string()).collect();
        let mut output = TextOutput::new(Some(decoder), stops);
        let mut deltas = Vec::new();
        for token in 0..pieces.len() as u32 {
            let (text, stopped) = output.push(token);
            deltas.push(text);
            if stopped {
                return (deltas, true);
            }
        }
        let (text, stopped) = output.finish();
        deltas.push(text);
        (deltas, stopped)
    }

    #[test]
    fn stop_string_may_straddle_tokens() {
        let (deltas, stopped) = run(&["ab", "c<", "en", "d>x"], &["<end>"]);
        assert_eq!((deltas.concat().as_str(), stopped), ("abc", true));
        assert_eq!(deltas, ["ab", "c", "", ""]);
    }

    #[test]
    fn false_start_is_released() {
        let (deltas, stopped) = run(&["a<", "e", "nx", "<e"], &["<end>"]);
        assert_eq!(deltas, ["a", "", "<enx", "", "<e"]);
        assert!(!stopped);
    }

    #[test]
    fn earliest_stop_wins_and_overlaps_are_seen() {
        assert_eq!(run(&["xxabab", "c"], &["ababc", "abc"]).0.concat(), "xx");
        assert_eq!(run(&["aa", "ab"], &["aab"]).0.concat(), "a");
        assert_eq!(run(&["1\n", "\n2"], &["\n\n"]).0.concat(), "1");
    }

    /// Random pieces over few characters against a search in all text so far, which needs no
    /// holding back.
    #[test]
    fn random_pieces_against_a_search_in_the_whole_text() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(4);
        let pieces = ["a", "b", "é", "ab", "ba", "éa", "aab", "", "bé"];
        let strings = ["aba", "bb", "éa", "aaaa", "abéab", "b"];
        for round in 0..5000 {
            let stops: Vec<&str> = (0..random.random_range(0..3))
                .map(|_| strings[random.random_range(0..6)])
                .collect();
            let count = random.random_range(0..12);
            let text: Vec<&'static str> =
                (0..count).map(|_| pieces[random.random_range(0..pieces.len())]).collect();
            let so_far = |tokens: usize| text[..tokens].concat();
            let start = |text: &str| stops.iter().filter_map(|stop| text.find(stop)).min();
            let first = (1..=text.len()).find(|&tokens| start(&so_far(tokens)).is_some());
            let all = so_far(first.unwrap_or(text.len()));
            let expected = &all[..start(&all).unwrap_or(all.len())];
            let (deltas, stopped) = run(&text, &stops);
            assert_eq!(deltas.concat(), expected, "round {round}: {text:?} until {stops:?}");
            assert_eq!(stopped, first.is_some());
            // Nothing is held back longer than it may become a stop string.
            let longest = stops.iter().map(|stop| stop.len() - 1).max().unwrap_or(0);
            for tokens in 1..first.unwrap_or(count + 1) {
                assert!(so_far(tokens).len() - deltas[..tokens].concat().len() <= longest);
            }
        }
    }

    #[test]
    fn characters_stay_whole() {
        let (deltas, _) = run(&["é", "ê", "日本"], &["êx", "本x"]);
        assert_eq!(deltas, ["é", "", "ê日", "本"]);
    }
}
