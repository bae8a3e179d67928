//! Reading bytes that someone else wrote: every length is checked, nothing panics.

use bytes::{Buf, Bytes};

/// Bytes that are not what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed data: {0}")]
pub struct Malformed(pub &'static str);

const SHORT: Malformed = Malformed("it ends too early");

/// A cursor over borrowed bytes; integers are big-endian.
#[derive(Debug, Clone)]
pub struct Reader<'a>(&'a [u8]);

macro_rules! integers {
    ($($name:ident -> $type:ty),*) => {$(
        /// The next integer.
        ///
        /// # Errors
        /// When the bytes end before it does.
        pub fn $name(&mut self) -> Result<$type, Malformed> {
            let (head, tail) = self.0.split_first_chunk().ok_or(SHORT)?;
            self.0 = tail;
            Ok(<$type>::from_be_bytes(*head))
        }
    )*};
}

impl<'a> Reader<'a> {
    /// Reads `bytes` from the start.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    integers! { u8 -> u8, u16 -> u16, i16 -> i16, u32 -> u32, i32 -> i32, u64 -> u64, i64 -> i64 }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(SHORT)?;
        self.0 = tail;
        Ok(head)
    }

    /// Bytes behind a `u32` length.
    ///
    /// # Errors
    /// When the bytes end before they do.
    pub fn bytes(&mut self) -> Result<&'a [u8], Malformed> {
        let len = self.u32()?;
        self.take(usize::try_from(len).map_err(|_| SHORT)?)
    }

    /// UTF-8 text behind a `u32` length.
    ///
    /// # Errors
    /// When the bytes end too early or are not UTF-8.
    pub fn text(&mut self) -> Result<String, Malformed> {
        let bytes = self.bytes()?;
        std::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|_| Malformed("text that is not UTF-8"))
    }

    /// What is left.
    #[must_use]
    pub const fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// Asserts that nothing is left.
    ///
    /// # Errors
    /// When something is.
    pub const fn done(&self) -> Result<(), Malformed> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Malformed("it goes on after its end"))
        }
    }
}

/// Appends `bytes` behind their `u32` length.
pub fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    // Lengths come from PostgreSQL values, which are below 1 GiB.
    out.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(bytes);
}

/// Splits `len` bytes off the front without copying.
pub(crate) fn split(from: &mut Bytes, len: usize) -> Result<Bytes, Malformed> {
    if from.len() < len {
        return Err(SHORT);
    }
    Ok(from.split_to(len))
}

/// Splits bytes behind a `u32` length off the front without copying.
pub(crate) fn split_bytes(from: &mut Bytes) -> Result<Bytes, Malformed> {
    if from.len() < 4 {
        return Err(SHORT);
    }
    let len = from.get_u32();
    split(from, usize::try_from(len).map_err(|_| SHORT)?)
}
