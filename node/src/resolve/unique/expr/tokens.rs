//! The words and signs of an expression as the server writes it.
//!
//! Must never: take a text that it does not know whole; then there are no tokens

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    /// A keyword, a function, or a column whose name needs no quotes.
    Word(String),
    /// A quoted name.
    Name(String),
    Text(String),
    Number(String),
    Sign(String),
}

#[derive(Debug, Clone)]
pub(super) struct Tokens {
    all: Vec<Token>,
    at: usize,
}

impl Tokens {
    pub(super) fn of(text: &str) -> Option<Self> {
        let mut all = Vec::new();
        let mut rest = text;
        while let Some(first) = rest.trim_start().chars().next() {
            rest = rest.trim_start();
            let len = match first {
                '\'' | '"' => {
                    let quoted = quoted(rest, first)?;
                    let len = quoted.len() + 2 + quoted.matches(first).count();
                    all.push(match first {
                        '"' => Token::Name(quoted),
                        _ => Token::Text(quoted),
                    });
                    len
                }
                '0'..='9' => {
                    let len = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
                    if rest.get(len..)?.starts_with(['.', 'e', 'E']) {
                        return None;
                    }
                    all.push(Token::Number(rest.get(..len)?.to_owned()));
                    len
                }
                _ if first.is_alphabetic() || first == '_' => {
                    let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == '$';
                    let len = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
                    let word = rest.get(..len)?;
                    // E'...': a text with backslashes.
                    if rest.get(len..)?.starts_with('\'') {
                        return None;
                    }
                    all.push(Token::Word(word.to_owned()));
                    len
                }
                '(' | ')' | ',' | '[' | ']' | '.' => {
                    all.push(Token::Sign(first.to_string()));
                    1
                }
                _ => {
                    let is_part = |c: char| ":=<>!-+*/%^~|&#?@`".contains(c);
                    let len = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
                    if len == 0 {
                        return None;
                    }
                    all.push(Token::Sign(rest.get(..len)?.to_owned()));
                    len
                }
            };
            rest = rest.get(len..)?;
        }
        Some(Self { all, at: 0 })
    }

    pub(super) fn next(&mut self) -> Option<Token> {
        let token = self.all.get(self.at).cloned();
        self.at += 1;
        // The end is one more token, so that whoever looked can go back.
        Some(token.unwrap_or_else(|| Token::Sign(String::new())))
    }

    pub(super) const fn back(&mut self) {
        self.at = self.at.saturating_sub(1);
    }

    pub(super) fn is_next(&self, what: &str) -> bool {
        matches!(self.all.get(self.at), Some(Token::Word(word) | Token::Sign(word)) if word == what)
    }

    pub(super) fn take(&mut self, what: &str) -> bool {
        let is_next = self.is_next(what);
        self.at += usize::from(is_next);
        is_next
    }

    /// Does an operator come, so that what was in parentheses was an operand?
    pub(super) fn goes_on(&self) -> bool {
        match self.all.get(self.at) {
            Some(Token::Sign(sign)) => sign != ")",
            Some(Token::Word(word)) => {
                word == "IS"
                    && !matches!(self.all.get(self.at + 1), Some(Token::Word(next)) if next != "NULL")
            }
            _ => false,
        }
    }

    pub(super) fn truth(&mut self) -> Option<bool> {
        if self.take("TRUE") {
            return Some(true);
        }
        self.take("FALSE").then_some(false)
    }

    pub(super) fn end(&self) -> Option<()> {
        (self.at >= self.all.len()).then_some(())
    }

    /// A type's name, without its schema and its length.
    pub(super) fn type_name(&mut self) -> Option<String> {
        let mut name = match self.next()? {
            Token::Word(word) | Token::Name(word) => word,
            _ => return None,
        };
        while self.take(".") {
            name = match self.next()? {
                Token::Word(word) | Token::Name(word) => word,
                _ => return None,
            };
        }
        if name == "character" && self.take("varying") {
            name = "character varying".to_owned();
        }
        // character varying(5) cuts; whoever casts so is not understood. Neither are types of two words.
        (!self.is_next("(")).then_some(name)
    }
}

/// What stands between quotes, of which two are one.
fn quoted(text: &str, quote: char) -> Option<String> {
    let mut out = String::new();
    let mut letters = text.chars().skip(1).peekable();
    while let Some(letter) = letters.next() {
        if letter != quote {
            out.push(letter);
        } else if letters.next_if_eq(&quote).is_some() {
            out.push(quote);
        } else {
            return Some(out);
        }
    }
    None
}
