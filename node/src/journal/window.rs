//! A read-ahead window over one file, for walking frames: small after a jump, growing while reading on.
//!
//! Holds: one buffer of at most [`WINDOW_LEN_MAX`] bytes. Not here: what the bytes mean (`frame.rs`).

use std::io;

use bytes::Bytes;

use super::disk::DiskFile;

/// Largest read-ahead, bytes.
const WINDOW_LEN_MAX: usize = 256 * 1024;
/// Read-ahead after a jump, bytes.
const WINDOW_LEN_MIN: usize = 8 * 1024;

/// A window over the bytes of one file at a time.
#[derive(Debug, Default)]
pub(super) struct Window {
    bytes: Vec<u8>,
    start: u64,
    want: usize,
}

impl Window {
    /// Forgets what was read; for changing to another file.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.want = 0;
    }

    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// The bytes of the window from `offset` on; empty if it is outside.
    fn from(&self, offset: u64) -> &[u8] {
        offset
            .checked_sub(self.start)
            .and_then(|skip| usize::try_from(skip).ok())
            .and_then(|skip| self.bytes.get(skip..))
            .unwrap_or_default()
    }

    /// `len` bytes at `offset` of `file`, never reading at or past `limit`. `None` if there are not that many.
    pub(super) fn view(
        &mut self,
        file: &dyn DiskFile,
        offset: u64,
        len: usize,
        limit: u64,
    ) -> io::Result<Option<&[u8]>> {
        if self.from(offset).len() < len {
            self.fill(file, offset, len, limit)?;
        }
        Ok(self.from(offset).get(..len))
    }

    /// All that is in the window from `offset` on, at least one byte, or `None` at `limit` or the end of the file.
    pub(super) fn chunk(
        &mut self,
        file: &dyn DiskFile,
        offset: u64,
        limit: u64,
    ) -> io::Result<Option<&[u8]>> {
        if self.from(offset).is_empty() {
            self.fill(file, offset, 1, limit)?;
        }
        Ok(Some(self.from(offset)).filter(|bytes| !bytes.is_empty()))
    }

    fn fill(&mut self, file: &dyn DiskFile, offset: u64, len: usize, limit: u64) -> io::Result<()> {
        let reads_on = !self.bytes.is_empty() && (self.start..=self.end()).contains(&offset);
        self.want = if reads_on {
            (self.want * 2).min(WINDOW_LEN_MAX)
        } else {
            WINDOW_LEN_MIN
        };
        let left = usize::try_from(limit.saturating_sub(offset)).unwrap_or(usize::MAX);
        self.bytes.resize(self.want.max(len).min(left), 0);
        self.start = offset;
        // An error must not leave bytes here that were never read.
        let count = file
            .read_at(&mut self.bytes, offset)
            .inspect_err(|_| self.bytes.clear())?;
        self.bytes.truncate(count);
        Ok(())
    }

    /// A copy of `len` bytes at `offset`. `None` if there are not that many below `limit`.
    ///
    /// A copy, because a slice would keep the whole window in memory for as long as a reader keeps one frame.
    pub(super) fn take(
        &mut self,
        file: &dyn DiskFile,
        offset: u64,
        len: usize,
        limit: u64,
    ) -> io::Result<Option<Bytes>> {
        if limit.saturating_sub(offset) < len as u64 {
            return Ok(None);
        }
        if len <= WINDOW_LEN_MIN || self.from(offset).len() >= len {
            return Ok(self.view(file, offset, len, limit)?.map(Bytes::copy_from_slice));
        }
        // Longer than what is read: what is missing goes straight to its place.
        let mut bytes = vec![0; len];
        let have = self.from(offset);
        let (front, back) = bytes.split_at_mut_checked(have.len()).unwrap_or_default();
        front.copy_from_slice(have);
        let missing = back.len();
        if file.read_at(back, offset + have.len() as u64)? < missing {
            return Ok(None);
        }
        Ok(Some(Bytes::from(bytes)))
    }
}
