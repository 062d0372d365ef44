//! SentencePiece's BPE: of all neighbouring symbols whose concatenation is a piece, the pair whose
//! piece has the highest score merges first; at equal scores the leftmost.
//!
//! This is not quite rank-ordered BPE, in which every *way* to form a piece has its own rank, so it
//! has its own small model here. Reference: Kudo & Richardson 2018, and `bpe_model.cc` of
//! SentencePiece; llama.cpp's `llm_tokenizer_spm` merges by the same order.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use tokenizers::Token;

/// Pieces with scores. Control and byte pieces have ids, but text never merges into them.
#[derive(Debug)]
pub(super) struct ScoredMerges {
    ids: HashMap<String, u32>,
    /// By id: the piece's text, its score, and whether text may merge into it.
    pieces: Vec<(String, f32, bool)>,
    /// Ids of `<0x00>`..`<0xFF>`.
    bytes: Box<[Option<u32>; 256]>,
    unknown: Option<u32>,
}

/// A neighbouring pair that may merge, as the queue orders it.
struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    /// Byte length of the pair: a stale candidate no longer adds up to it.
    bytes: usize,
    id: u32,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

/// A run of text between merges: a doubly linked list by index. Length 0 means merged away.
struct Symbol {
    start: usize,
    bytes: usize,
    previous: Option<usize>,
    next: Option<usize>,
    id: Option<u32>,
}

impl ScoredMerges {
    /// `pieces` by id: text, score, whether text may merge into it. `bytes` are the ids of the byte
    /// pieces, `unknown` is emitted for a character that has neither a piece nor byte pieces.
    pub(super) fn new(
        pieces: Vec<(String, f32, bool)>,
        bytes: Box<[Option<u32>; 256]>,
        unknown: Option<u32>,
    ) -> Self {
        let mut ids = HashMap::with_capacity(pieces.len());
        for (id, (text, _, _)) in pieces.iter().enumerate() {
            ids.entry(text.clone()).or_insert(id as u32);
        }
        Self { ids, pieces, bytes, unknown }
    }

    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    pub(super) fn token(&self, id: u32) -> Option<&str> {
        self.pieces.get(id as usize).map(|piece| piece.0.as_str())
    }

    pub(super) fn vocabulary(&self) -> HashMap<String, u32> {
        self.ids.clone()
    }

    pub(super) fn len(&self) -> usize {
        self.pieces.len()
    }

    fn mergeable(&self, text: &str) -> Option<u32> {
        self.id(text).filter(|id| self.pieces[*id as usize].2)
    }

    /// Splits `text` into pieces.
    pub(super) fn tokenize(&self, text: &str) -> Vec<Token> {
        let mut symbols = self.characters(text);
        let mut queue = BinaryHeap::new();
        for right in 1..symbols.len() {
            self.propose(text, &symbols, Some(right - 1), Some(right), &mut queue);
        }
        while let Some(candidate) = queue.pop() {
            let (left, right) = (candidate.left, candidate.right);
            let stale = symbols[left].bytes == 0
                || symbols[right].bytes == 0
                || symbols[left].bytes + symbols[right].bytes != candidate.bytes;
            if stale {
                continue;
            }
            symbols[left].bytes = candidate.bytes;
            symbols[left].id = Some(candidate.id);
            symbols[right].bytes = 0;
            symbols[left].next = symbols[right].next;
            if let Some(next) = symbols[left].next {
                symbols[next].previous = Some(left);
            }
            self.propose(text, &symbols, symbols[left].previous, Some(left), &mut queue);
            self.propose(text, &symbols, Some(left), symbols[left].next, &mut queue);
        }
        self.emit(text, &symbols)
    }

    fn characters(&self, text: &str) -> Vec<Symbol> {
        let count = text.chars().count();
        text.char_indices()
            .enumerate()
            .map(|(index, (start, character))| {
                let bytes = character.len_utf8();
                Symbol {
                    start,
                    bytes,
                    previous: index.checked_sub(1),
                    next: (index + 1 < count).then_some(index + 1),
                    id: self.mergeable(&text[start..start + bytes]),
                }
            })
            .collect()
    }

    fn propose(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: Option<usize>,
        right: Option<usize>,
        queue: &mut BinaryHeap<Candidate>,
    ) {
        let (Some(left), Some(right)) = (left, right) else { return };
        let bytes = symbols[left].bytes + symbols[right].bytes;
        let start = symbols[left].start;
        if let Some(id) = self.mergeable(&text[start..start + bytes]) {
            queue.push(Candidate { score: self.pieces[id as usize].1, left, right, bytes, id });
        }
    }

    fn emit(&self, text: &str, symbols: &[Symbol]) -> Vec<Token> {
        let mut tokens = Vec::new();
        let mut index = (!symbols.is_empty()).then_some(0);
        while let Some(current) = index {
            let symbol = &symbols[current];
            let span = (symbol.start, symbol.start + symbol.bytes);
            let piece = &text[span.0..span.1];
            if let Some(id) = symbol.id {
                tokens.push(Token::new(id, piece.to_owned(), span));
            } else {
                self.emit_unknown(piece, span, &mut tokens);
            }
            index = symbol.next;
        }
        tokens
    }

    fn emit_unknown(&self, piece: &str, span: (usize, usize), tokens: &mut Vec<Token>) {
        let bytes: Option<Vec<u32>> =
            piece.bytes().map(|byte| self.bytes[usize::from(byte)]).collect();
        let ids = bytes.or_else(|| self.unknown.map(|id| vec![id])).unwrap_or_default();
        for id in ids {
            tokens.push(Token::new(id, self.pieces[id as usize].0.clone(), span));
        }
    }
}
