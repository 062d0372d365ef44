//! Strings that remember which of their bytes came with the conversation.
//!
//! **Invariant**: every operation on text keeps this. So the output says of each byte whether the
//! template wrote it or a user typed it, and no value looks different to the template for it.

use std::fmt;
use std::ops::Range;
use std::rc::Rc;

use super::error::Outcome;
use super::limits::Meter;

/// A string that does not change, cheap to clone.
#[derive(Clone)]
pub(super) struct Text(Rc<Inner>);

struct Inner {
    string: String,
    /// Bytes that came with the conversation: sorted, apart from each other, not empty.
    typed: Vec<Range<usize>>,
    /// Whether it is Jinja's `Markup`: already escaped for HTML.
    safe: bool,
    meter: Rc<Meter>,
    bytes: usize,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.meter.release(self.bytes);
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0.string, out)
    }
}

impl Text {
    pub(super) fn literal(meter: &Rc<Meter>, string: &str) -> Outcome<Self> {
        let mut text = Builder::new(meter);
        text.push(string, false)?;
        Ok(text.finish())
    }

    pub(super) fn typed(meter: &Rc<Meter>, string: &str) -> Outcome<Self> {
        let mut text = Builder::new(meter);
        text.push(string, true)?;
        Ok(text.finish())
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0.string
    }

    pub(super) fn meter(&self) -> &Rc<Meter> {
        &self.0.meter
    }

    pub(super) fn is_safe(&self) -> bool {
        self.0.safe
    }

    /// The same text, marked as escaped or not.
    pub(super) fn with_safe(&self, safe: bool) -> Outcome<Self> {
        if self.0.safe == safe {
            return Ok(self.clone());
        }
        let mut text = Builder::new(self.meter());
        text.push_text(self)?;
        text.safe = safe;
        Ok(text.finish())
    }

    /// The bytes in `range`, which lies between characters.
    pub(super) fn slice(&self, range: Range<usize>) -> Outcome<Self> {
        if range == (0..self.as_str().len()) {
            return Ok(self.clone());
        }
        let mut text = Builder::new(self.meter());
        text.push_slice(self, range)?;
        text.safe = self.0.safe;
        Ok(text.finish())
    }

    /// The part of this text that `part`, a piece of its string, is.
    pub(super) fn part(&self, part: &str) -> Outcome<Self> {
        let start = part.as_ptr() as usize - self.as_str().as_ptr() as usize;
        self.slice(start..start + part.len())
    }

    /// Whether the byte at `at` came with the conversation.
    pub(super) fn is_typed(&self, at: usize) -> bool {
        let next = self.0.typed.partition_point(|range| range.end <= at);
        self.0.typed.get(next).is_some_and(|range| range.start <= at)
    }

    /// Every character becomes the string that `change` makes of it.
    pub(super) fn map(&self, change: impl Fn(char, &mut String)) -> Outcome<Self> {
        let mut text = Builder::new(self.meter());
        let mut buffer = String::new();
        for (at, character) in self.as_str().char_indices() {
            buffer.clear();
            change(character, &mut buffer);
            text.push(&buffer, self.is_typed(at))?;
        }
        text.safe = self.0.safe;
        Ok(text.finish())
    }

    /// Every match of `old` (at most `most`) becomes `new`.
    pub(super) fn replace(&self, old: &str, new: &Text, most: usize) -> Outcome<Self> {
        let mut text = Builder::new(self.meter());
        let mut end = 0;
        for (start, found) in self.as_str().match_indices(old).take(most) {
            text.push_slice(self, end..start)?;
            text.push_text(new)?;
            end = start + found.len();
        }
        text.push_slice(self, end..self.as_str().len())?;
        text.safe = self.0.safe;
        Ok(text.finish())
    }

    /// `times` copies in a row.
    pub(super) fn repeat(&self, times: usize) -> Outcome<Self> {
        self.meter().foresee(self.as_str().len().saturating_mul(times))?;
        let mut text = Builder::new(self.meter());
        let uniform = match self.0.typed.as_slice() {
            [] => Some(false),
            [range] if *range == (0..self.as_str().len()) => Some(true),
            _ => None,
        };
        match uniform {
            Some(typed) => text.push(&self.as_str().repeat(times), typed)?,
            None => (0..times).try_for_each(|_| text.push_text(self))?,
        }
        text.safe = self.0.safe;
        Ok(text.finish())
    }
}

/// Text in the making.
pub(super) struct Builder {
    string: String,
    typed: Vec<Range<usize>>,
    pub(super) safe: bool,
    meter: Rc<Meter>,
    bytes: usize,
}

impl Builder {
    pub(super) fn new(meter: &Rc<Meter>) -> Self {
        let meter = Rc::clone(meter);
        Self { string: String::new(), typed: Vec::new(), safe: false, meter, bytes: 0 }
    }

    pub(super) fn meter(&self) -> &Rc<Meter> {
        &self.meter
    }

    pub(super) fn as_str(&self) -> &str {
        &self.string
    }

    fn take(&mut self, bytes: usize) -> Outcome<()> {
        self.meter.take(bytes)?;
        self.bytes += bytes;
        Ok(())
    }

    pub(super) fn push(&mut self, string: &str, typed: bool) -> Outcome<()> {
        self.take(string.len())?;
        let start = self.string.len();
        self.string.push_str(string);
        if typed {
            self.mark(start..start + string.len())?;
        }
        Ok(())
    }

    pub(super) fn push_text(&mut self, text: &Text) -> Outcome<()> {
        self.push_slice(text, 0..text.as_str().len())
    }

    pub(super) fn push_slice(&mut self, text: &Text, range: Range<usize>) -> Outcome<()> {
        let start = self.string.len();
        self.push(&text.as_str()[range.clone()], false)?;
        let first = text.0.typed.partition_point(|typed| typed.end <= range.start);
        for typed in text.0.typed[first..].iter().take_while(|typed| typed.start < range.end) {
            let begin = typed.start.max(range.start) - range.start;
            let end = typed.end.min(range.end) - range.start;
            self.mark(start + begin..start + end)?;
        }
        Ok(())
    }

    /// Marks the range, which begins behind all marks, as typed.
    fn mark(&mut self, range: Range<usize>) -> Outcome<()> {
        if range.is_empty() {
            return Ok(());
        }
        if let Some(last) = self.typed.last_mut().filter(|last| last.end == range.start) {
            last.end = range.end;
            return Ok(());
        }
        self.take(size_of::<Range<usize>>())?;
        self.typed.push(range);
        Ok(())
    }

    pub(super) fn finish(mut self) -> Text {
        self.meter.hold(size_of::<Inner>());
        self.bytes += size_of::<Inner>();
        Text(Rc::new(Inner {
            string: std::mem::take(&mut self.string),
            typed: std::mem::take(&mut self.typed),
            safe: self.safe,
            meter: Rc::clone(&self.meter),
            bytes: std::mem::take(&mut self.bytes),
        }))
    }

    /// The string, and the ranges of its bytes that came with the conversation.
    pub(super) fn into_parts(mut self) -> (String, Vec<Range<usize>>) {
        (std::mem::take(&mut self.string), std::mem::take(&mut self.typed))
    }
}

impl Drop for Builder {
    fn drop(&mut self) {
        self.meter.release(self.bytes);
    }
}
