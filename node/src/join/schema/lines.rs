//! The lines of a dump, and which of them are the program's own: those that begin outside of every text, name, body and comment.
//!
//! Whoever owns an object of the donor's writes the rest, and what is made of a dump is run by a superuser.

/// A line, without its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Line<'a> {
    pub(super) text: &'a str,
    /// Does it begin outside?
    pub(super) is_outside: bool,
}

/// All lines of a dump. Like the server, it reads plain texts as `standard_conforming_strings` says, which is on unless the dump sets it.
pub(super) fn lines(dump: &str) -> impl Iterator<Item = Line<'_>> {
    let mut lexer = Lexer::default();
    dump.split_terminator('\n').map(move |text| {
        let is_outside = lexer.within == Within::Nothing;
        if is_outside && text == "SET standard_conforming_strings = off;" {
            lexer.plain_backslashes = true;
        }
        lexer.line(text);
        Line { text, is_outside }
    })
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
enum Within {
    #[default]
    Nothing,
    /// `'…'`; in `E'…'` a backslash takes the next letter with it.
    Text { backslashes: bool },
    /// `"…"`
    Name,
    /// `$tag$…$tag$`, with both dollar signs.
    Body(String),
    /// `/* … */`, which nest.
    Comment { depth: usize },
}

#[derive(Debug, Default)]
struct Lexer {
    within: Within,
    plain_backslashes: bool,
    /// Is nothing but space behind an `E'…'`? Then a text that follows on another line is a part of it.
    goes_on: bool,
}

impl Lexer {
    fn line(&mut self, text: &str) {
        let mut rest = text;
        // What stands in front of the rest: a name or a number, as far as it goes back.
        let mut word = "";
        while !rest.is_empty() {
            let (taken, next_word) = match &mut self.within {
                Within::Nothing => self.outside(rest, word),
                Within::Text { backslashes } => {
                    let backslashes = *backslashes;
                    (self.text(rest, backslashes), "")
                }
                Within::Name => {
                    let end = rest.find('"');
                    if end.is_some() {
                        // Two in a row: the next begins a name again.
                        self.within = Within::Nothing;
                    }
                    (end.map_or(rest.len(), |at| at + 1), "")
                }
                Within::Body(tag) => match rest.find(tag.as_str()) {
                    Some(at) => {
                        let taken = at + tag.len();
                        self.within = Within::Nothing;
                        (taken, "")
                    }
                    None => return,
                },
                Within::Comment { depth } => {
                    let open = rest.find("/*").unwrap_or(rest.len());
                    let close = rest.find("*/").unwrap_or(rest.len());
                    if open < close {
                        *depth += 1;
                    } else if close < rest.len() {
                        *depth -= 1;
                        if *depth == 0 {
                            self.within = Within::Nothing;
                        }
                    }
                    ((open.min(close) + 2).min(rest.len()), "")
                }
            };
            rest = rest.get(taken..).unwrap_or_default();
            word = next_word;
        }
    }

    /// How much of the rest is one piece, and the word that it is, if it is one. `word` stands right before it.
    fn outside<'a>(&mut self, rest: &'a str, word: &str) -> (usize, &'a str) {
        let goes_on = std::mem::take(&mut self.goes_on);
        if rest.starts_with("--") {
            self.goes_on = goes_on;
            return (rest.find('\r').unwrap_or(rest.len()), "");
        }
        if rest.starts_with("/*") {
            self.within = Within::Comment { depth: 1 };
            return (2, "");
        }
        match rest.chars().next().unwrap_or_default() {
            '\'' => {
                let backslashes = goes_on || self.plain_backslashes || word.eq_ignore_ascii_case("e");
                self.within = Within::Text { backslashes };
                (1, "")
            }
            '"' => {
                self.within = Within::Name;
                (1, "")
            }
            '$' => {
                let tag = tag(rest).unwrap_or("$");
                if tag.len() > 1 {
                    self.within = Within::Body(tag.to_owned());
                }
                (tag.len(), "")
            }
            first if is_part(first) => {
                // A body may follow a number at once, and no name.
                let is_name = !first.is_ascii_digit();
                let len = rest.find(|c| !(is_part(c) || is_name && c == '$'));
                let word = len.map_or(rest, |len| rest.split_at(len).0);
                (word.len(), word)
            }
            first => {
                self.goes_on = goes_on && first.is_ascii_whitespace();
                (first.len_utf8(), "")
            }
        }
    }

    /// How much of the rest is text, with the quote that ends it.
    fn text(&mut self, rest: &str, backslashes: bool) -> usize {
        let mut letters = rest.char_indices().peekable();
        while let Some((at, letter)) = letters.next() {
            if letter == '\\' && backslashes {
                // Perhaps the end of the line, which is no quote.
                letters.next();
            } else if letter == '\'' && letters.next_if(|(_, next)| *next == '\'').is_none() {
                self.within = Within::Nothing;
                self.goes_on = backslashes;
                return at + 1;
            }
        }
        rest.len()
    }
}

/// Letters of names and numbers; the server counts every letter beyond ASCII among them.
const fn is_part(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || letter == '_' || !letter.is_ascii()
}

/// The `$tag$` that a text begins with.
fn tag(text: &str) -> Option<&str> {
    let inner = text.get(1..)?.split_once('$')?.0;
    let is_tag = inner.chars().all(is_part) && !inner.starts_with(|c: char| c.is_ascii_digit());
    is_tag.then(|| text.get(..inner.len() + 2)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines that begin outside.
    fn outside(dump: &str) -> Vec<&str> {
        lines(dump)
            .filter(|line| line.is_outside)
            .map(|line| line.text)
            .collect()
    }

    #[test]
    fn a_line_within_something_is_not_outside() {
        for held in [
            "'a\nIN\n'",
            "'a''\nIN\n'''",
            "'a\\''\nIN\n'",
            "E'a\\'\nIN\n'",
            "e'a\\\\''\nIN\n'",
            "E'a\\\n\\'IN\n'",
            "E'a'\n'b\\'\nIN\n'",
            "\"a\nIN\n\"",
            "\"a\"\"\nIN\n\"",
            "\"a'\nIN\n\"",
            "$$'\nIN\n$$",
            "$a$ $$ $b$\nIN\n$a$",
            "$ä_1$ $\nIN\n$ä_1$",
            "/* ' /* */\nIN\n*/",
            "U&'\\'\n'a\nIN\n'",
            "fe'\\' || '\nIN\n'",
        ] {
            let dump = format!("SELECT {held};\nOUT");
            let found = outside(&dump);
            assert!(!found.contains(&"IN"), "{held}: {found:?}");
            assert_eq!(found.last(), Some(&"OUT"), "{held}: {found:?}");
        }
    }

    #[test]
    fn a_line_behind_something_is_outside() {
        for passed in [
            "'it''s'",
            "'a\\'",
            "E'a\\\\'",
            "E'\\''",
            "\"it's\"",
            "-- it's",
            "$$it's$$",
            "a$b$c",
            "$1",
            "$1$",
            "1$$'$$",
            "-- it's\r",
            "1 /* it's /* x */ */",
            "E'a' || 'b\\'",
            "a--b'",
            "''",
            "E''",
            "\"\"",
            "E'a''' || '\\'",
        ] {
            let dump = format!("SELECT {passed}\nOUT");
            assert_eq!(outside(&dump).last(), Some(&"OUT"), "{passed}");
        }
    }

    #[test]
    fn plain_texts_are_read_as_the_dump_says() {
        let dump = "SET standard_conforming_strings = off;\nSELECT 'a\\'\nIN\n';\nOUT";
        assert_eq!(outside(dump).len(), 3);
        let dump = dump.replace("off", "on");
        assert!(outside(&dump).contains(&"IN"));
    }

    #[test]
    fn lines_keep_all_but_their_ends() {
        let texts: Vec<&str> = lines("a\r\n\nb\n").map(|line| line.text).collect();
        assert_eq!(texts, ["a\r", "", "b"]);
    }
}
