//! Byte-level BPE: of all neighbouring symbols that are a merge, the one of the lowest rank merges
//! first; at equal ranks the leftmost (Sennrich et al. 2016, section 3.2).
//!
//! The `tokenizers` crate has the same model, and a test compares the two. Building that one takes
//! half a million strings and hashes of them, longer than reading the weights of a small model;
//! this one keeps each token once and hashes into a table of ids.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use ahash::RandomState;
use hashbrown::HashTable;
use rayon::prelude::*;
use tokenizers::Token;

use super::TokenizerError;

/// Tokens and the merges between them.
#[derive(Debug)]
pub(super) struct RankedMerges {
    /// By id.
    tokens: Arc<Vec<String>>,
    /// Ids by the hash of their tokens.
    ids: HashTable<u32>,
    hasher: RandomState,
    merges: hashbrown::HashMap<(u32, u32), Merge, RandomState>,
    /// Whether a whole word that is a token is that token, whatever merges would make of it.
    whole_words: bool,
}

/// What a pair of tokens becomes.
#[derive(Clone, Copy, Debug)]
struct Merge {
    rank: u32,
    id: u32,
}

/// A run of text between merges: a doubly linked list by index. Length 0 means merged away.
#[derive(Clone, Copy)]
struct Symbol {
    id: u32,
    bytes: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

/// A merge of the symbol at `left` with the one after it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    rank: u32,
    left: usize,
    id: u32,
}

impl RankedMerges {
    /// The model of `tokens` by id and of `merges` by rank, which are two tokens with a space
    /// between.
    ///
    /// # Errors
    /// If a token comes twice, or a merge is not two tokens whose concatenation is a third.
    pub(super) fn new<S: AsRef<str> + Sync>(
        tokens: Arc<Vec<String>>,
        merges: &[S],
        whole_words: bool,
    ) -> Result<Self, TokenizerError> {
        let hasher = RandomState::new();
        let mut ids = HashTable::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            let hash = hasher.hash_one(token.as_str());
            if ids.find(hash, |&other: &u32| tokens[other as usize] == *token).is_some() {
                return Err(TokenizerError::DuplicateToken { token: token.clone(), id });
            }
            let rehash = |&other: &u32| hasher.hash_one(tokens[other as usize].as_str());
            ids.insert_unique(hash, id as u32, rehash);
        }
        let by_pair =
            hashbrown::HashMap::with_capacity_and_hasher(merges.len(), RandomState::new());
        let mut model = Self { tokens, ids, hasher, merges: by_pair, whole_words };
        let known: Vec<Result<[u32; 3], TokenizerError>> = merges
            .par_iter()
            .enumerate()
            .map_init(String::new, |merged, (rank, merge)| {
                model.resolve(rank, merge.as_ref(), merged)
            })
            .collect();
        for (rank, merge) in known.into_iter().enumerate() {
            let [left, right, id] = merge?;
            model.merges.insert((left, right), Merge { rank: rank as u32, id });
        }
        Ok(model)
    }

    /// The ids of a merge's two tokens and of what they become; `merged` is scratch.
    fn resolve(
        &self,
        index: usize,
        merge: &str,
        merged: &mut String,
    ) -> Result<[u32; 3], TokenizerError> {
        // The first token is never empty, but it may be a space in odd vocabularies.
        let space = merge.char_indices().skip(1).find(|(_, character)| *character == ' ');
        let Some((at, _)) = space else {
            return Err(TokenizerError::BadMerge { index, found: merge.to_owned() });
        };
        let (left, right) = (&merge[..at], &merge[at + 1..]);
        merged.clear();
        merged.push_str(left);
        merged.push_str(right);
        let id = |token: &str| {
            self.id(token).ok_or_else(|| TokenizerError::Vocabulary {
                reason: format!("merge {index} needs {token:?}, which is not a token"),
            })
        };
        Ok([id(left)?, id(right)?, id(merged)?])
    }

    pub(super) fn id(&self, token: &str) -> Option<u32> {
        let hash = self.hasher.hash_one(token);
        self.ids.find(hash, |&id| self.tokens[id as usize] == token).copied()
    }

    pub(super) fn token(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(String::as_str)
    }

    pub(super) fn vocabulary(&self) -> HashMap<String, u32> {
        self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Splits `text` into tokens. A character that is no token is dropped, which a byte-level
    /// vocabulary, with its 256 characters, has no use for.
    pub(super) fn tokenize(&self, text: &str) -> Vec<Token> {
        if let Some(id) = self.id(text).filter(|_| self.whole_words) {
            return vec![Token::new(id, text.to_owned(), (0, text.len()))];
        }
        let mut symbols = self.characters(text);
        let mut queue = BinaryHeap::with_capacity(symbols.len());
        for left in 0..symbols.len() {
            self.propose(&symbols, Some(left), &mut queue);
        }
        while let Some(Reverse(candidate)) = queue.pop() {
            let left = candidate.left;
            let Some(right) = symbols[left].next else { continue };
            let now = self.merges.get(&(symbols[left].id, symbols[right].id));
            if symbols[left].bytes == 0 || now.is_none_or(|merge| merge.id != candidate.id) {
                continue;
            }
            symbols[left].id = candidate.id;
            symbols[left].bytes += symbols[right].bytes;
            symbols[right].bytes = 0;
            symbols[left].next = symbols[right].next;
            if let Some(next) = symbols[left].next {
                symbols[next].previous = Some(left);
            }
            self.propose(&symbols, symbols[left].previous, &mut queue);
            self.propose(&symbols, Some(left), &mut queue);
        }
        let mut end = 0;
        let left = symbols.iter().filter(|symbol| symbol.bytes > 0);
        left.map(|symbol| {
            let start = end;
            end += symbol.bytes;
            Token::new(symbol.id, self.tokens[symbol.id as usize].clone(), (start, end))
        })
        .collect()
    }

    fn characters(&self, text: &str) -> Vec<Symbol> {
        let mut symbols = Vec::with_capacity(text.len());
        let mut utf8 = [0; 4];
        for character in text.chars() {
            let Some(id) = self.id(character.encode_utf8(&mut utf8)) else { continue };
            let index = symbols.len();
            let (previous, next) = (index.checked_sub(1), Some(index + 1));
            symbols.push(Symbol { id, bytes: character.len_utf8(), previous, next });
        }
        if let Some(last) = symbols.last_mut() {
            last.next = None;
        }
        symbols
    }

    /// Queues the merge of the symbol at `left` with the next one, if it is one.
    fn propose(
        &self,
        symbols: &[Symbol],
        left: Option<usize>,
        queue: &mut BinaryHeap<Reverse<Candidate>>,
    ) {
        let Some(left) = left else { return };
        let Some(right) = symbols[left].next else { return };
        if let Some(merge) = self.merges.get(&(symbols[left].id, symbols[right].id)) {
            queue.push(Reverse(Candidate { rank: merge.rank, left, id: merge.id }));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::Model;
    use tokenizers::models::bpe::{BPE, Vocab};

    use super::*;

    /// Tokens of the letters a to d, and merges of earlier ones in a random order, some twice.
    fn vocabulary(picks: &[(usize, usize)], order: usize) -> (Vec<String>, Vec<String>) {
        let mut tokens: Vec<String> = ["a", "b", "c", "d"].map(str::to_owned).into();
        let mut merges = Vec::new();
        for (left, right) in picks {
            let (left, right) = (&tokens[left % tokens.len()], &tokens[right % tokens.len()]);
            merges.push(format!("{left} {right}"));
            let merged = format!("{left}{right}");
            if !tokens.contains(&merged) {
                tokens.push(merged);
            }
        }
        let middle = order % merges.len().max(1);
        merges.rotate_left(middle);
        (tokens, merges)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn the_library_splits_alike(
            picks in prop::collection::vec((0usize..1000, 0usize..1000), 1..40),
            order in 0usize..1000,
            text in "[abcdx]{0,40}",
            whole_words in any::<bool>(),
        ) {
            let (tokens, merges) = vocabulary(&picks, order);
            let ids: Vocab = tokens.iter().cloned().zip(0..).collect();
            let pairs = merges.iter().map(|merge| {
                let (left, right) = merge.split_once(' ').expect("two tokens");
                (left.to_owned(), right.to_owned())
            });
            let builder = BPE::builder().vocab_and_merges(ids, pairs.collect());
            let library = builder.ignore_merges(whole_words).build().expect("a vocabulary");
            let tokens = Arc::new(tokens);
            let model = RankedMerges::new(tokens, &merges, whole_words).expect("a vocabulary");
            let expected = library.tokenize(&text).expect("tokens");
            prop_assert_eq!(model.tokenize(&text), expected, "{:?}", merges);
        }
    }

    #[test]
    fn bad_vocabularies_are_refused() {
        let tokens =
            |list: &[&str]| Arc::new(list.iter().map(|token| (*token).to_owned()).collect());
        let model = |list: &[&str], merge: &str| RankedMerges::new(tokens(list), &[merge], false);
        assert!(model(&["a", "b", "ab"], "a b").is_ok());
        let found = model(&["a", "b", "a"], "a b").unwrap_err();
        assert!(matches!(found, TokenizerError::DuplicateToken { id: 2, .. }), "{found}");
        let found = model(&["a", "b", "ab"], "ab").unwrap_err();
        assert!(matches!(found, TokenizerError::BadMerge { index: 0, .. }), "{found}");
        for (merge, missing) in [("a c", "\"c\""), ("c a", "\"c\""), ("b a", "\"ba\"")] {
            let found = model(&["a", "b", "ab"], merge).unwrap_err();
            assert!(matches!(found, TokenizerError::Vocabulary { .. }), "{found}");
            assert!(found.to_string().contains(missing), "{found}");
        }
    }
}
