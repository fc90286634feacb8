//! Streaming detokenisation: text comes out as soon as it is whole, and never half a UTF-8 character.
//!
//! A token may hold part of a character, and a decoder may treat the first token of a text specially (a leading space).
//! So each piece is the difference of two decodings that share a context: tokens `start .. end`, with and without the new
//! ones. While the longer text ends in U+FFFD, the decoder's mark for an unfinished character, nothing is shown.

use crate::error::Result;

/// Longest UTF-8 character in bytes, and so in tokens.
const UNFINISHED: usize = 4;

/// Turns a growing list of tokens into pieces of text. `decode` gives the text of a list of tokens.
pub struct TextStream<F> {
    decode: F,
    tokens: Vec<u32>,
    /// First token of the context.
    start: usize,
    /// Tokens before this one have been shown.
    shown: usize,
}

impl<F: Fn(&[u32]) -> Result<String>> TextStream<F> {
    pub fn new(decode: F) -> Self {
        Self { decode, tokens: vec![], start: 0, shown: 0 }
    }

    /// Adds a token; gives the text that became whole (often empty).
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.tokens.push(token);
        self.piece(false)
    }

    /// The rest, whole or not.
    pub fn finish(&mut self) -> Result<String> {
        self.piece(true)
    }

    fn piece(&mut self, last: bool) -> Result<String> {
        let before = (self.decode)(&self.tokens[self.start..self.shown])?;
        let after = (self.decode)(&self.tokens[self.start..])?;
        // A text that holds a real U+FFFD must not wait forever.
        let waiting = after.ends_with('\u{FFFD}') && self.tokens.len() - self.shown < UNFINISHED;
        if waiting && !last {
            return Ok(String::new());
        }
        let Some(piece) = after.strip_prefix(&before) else {
            // The decoder changed its mind about shown text (clean-up of spaces): go on from here.
            let common = before.bytes().zip(after.bytes()).take_while(|(a, b)| a == b).count();
            let at = (0..=common).rev().find(|&i| after.is_char_boundary(i)).unwrap_or(0);
            (self.start, self.shown) = (self.shown, self.tokens.len());
            return Ok(after[at..].to_string());
        };
        let piece = piece.to_string();
        if !piece.is_empty() {
            (self.start, self.shown) = (self.shown, self.tokens.len());
        }
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as tokens, decoded as byte-level tokenizers do; a leading space is dropped as SentencePiece does.
    fn decode(tokens: &[u32]) -> Result<String> {
        let bytes: Vec<u8> = tokens.iter().map(|&t| t as u8).collect();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Ok(text.strip_prefix(' ').map_or(text.clone(), str::to_string))
    }

    fn pieces(bytes: &[u8]) -> Vec<String> {
        let mut s = TextStream::new(decode);
        let mut all: Vec<String> = bytes.iter().map(|&b| s.push(u32::from(b)).unwrap()).collect();
        all.push(s.finish().unwrap());
        all
    }

    #[test]
    fn pieces_join_to_the_whole_and_hold_whole_characters() {
        let text = "a é 漢字 🦀 end";
        let found = pieces(text.as_bytes());
        assert_eq!(found.concat(), text);
        assert!(found.iter().all(|p| !p.contains('\u{FFFD}')), "{found:?}");
        assert_eq!(found.iter().filter(|p| p.contains('🦀')).count(), 1);
    }

    #[test]
    fn spaces_inside_stay() {
        assert_eq!(pieces(b" one two  three").concat(), "one two  three");
    }

    #[test]
    fn an_unfinished_character_at_the_end_is_shown_as_the_decoder_shows_it() {
        assert_eq!(pieces(&"ab🦀".as_bytes()[..4]).concat(), "ab\u{FFFD}");
    }

    #[test]
    fn a_real_replacement_character_does_not_block() {
        let found = pieces("x\u{FFFD}\u{FFFD}yz".as_bytes());
        assert_eq!(found.concat(), "x\u{FFFD}\u{FFFD}yz");
    }
}
