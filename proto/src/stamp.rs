//! Stamps: the total order in which concurrent writes are arbitrated.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
pub use uhlc::NTP64;

use crate::ids::NodeId;

/// Length of an encoded stamp, bytes.
pub const STAMP_LEN: usize = 10;

/// A hybrid-logical-clock stamp (Kulkarni et al., "Logical Physical Clocks", 2014): an NTP64 time, ties
/// broken by node id. Two transactions of a cluster never share one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp {
    /// Seconds since the Unix epoch in the upper 32 bits, fraction in the lower.
    pub time: NTP64,
    /// The node that made it.
    pub node: NodeId,
}

impl Default for Stamp {
    fn default() -> Self {
        Self::ZERO
    }
}

impl Stamp {
    /// Below every stamp that a node makes.
    pub const ZERO: Self = Self {
        time: NTP64(0),
        node: NodeId(0),
    };

    /// Ten bytes whose `memcmp` order is the order of stamps.
    #[must_use]
    pub fn to_bytes(self) -> [u8; STAMP_LEN] {
        let mut out = [0; STAMP_LEN];
        let (time, node) = out.split_at_mut(8);
        time.copy_from_slice(&self.time.as_u64().to_be_bytes());
        node.copy_from_slice(&self.node.0.to_be_bytes());
        out
    }

    /// The inverse of [`Self::to_bytes`].
    #[must_use]
    pub fn from_bytes(bytes: [u8; STAMP_LEN]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j] = bytes;
        Self {
            time: NTP64(u64::from_be_bytes([a, b, c, d, e, f, g, h])),
            node: NodeId(u16::from_be_bytes([i, j])),
        }
    }

    /// Microseconds since the Unix epoch, rounded down.
    #[must_use]
    pub fn unix_us(self) -> i64 {
        ntp_to_unix_us(self.time)
    }

    /// The same stamp as uhlc's own type (its ids compare as little-endian bytes, so ours goes in big-endian).
    #[must_use]
    pub fn to_uhlc(self) -> Option<uhlc::Timestamp> {
        let id = uhlc::ID::try_from(self.node.0.to_be_bytes().as_slice()).ok()?;
        Some(uhlc::Timestamp::new(self.time, id))
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}.{}", self.time.as_u64(), self.node)
    }
}

impl fmt::Debug for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Stamp {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Stamp {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let bad = || serde::de::Error::custom(format!("`{text}` is not a stamp"));
        let (time, node) = text.split_once('.').ok_or_else(bad)?;
        Ok(Self {
            time: NTP64(u64::from_str_radix(time, 16).map_err(|_| bad())?),
            node: NodeId(node.parse().map_err(|_| bad())?),
        })
    }
}

/// NTP64 of a time given in microseconds since the Unix epoch; times before it become zero, times past
/// 2106 the largest.
#[must_use]
pub fn unix_us_to_ntp(unix_us: i64) -> NTP64 {
    let Ok(us) = u64::try_from(unix_us) else {
        return NTP64(0);
    };
    if us / 1_000_000 > u64::from(u32::MAX) {
        return NTP64(u64::MAX >> 1 << 1);
    }
    NTP64::from(Duration::from_micros(us))
}

/// Microseconds since the Unix epoch of an NTP64 time, rounded down.
#[must_use]
pub fn ntp_to_unix_us(time: NTP64) -> i64 {
    let raw = time.as_u64();
    let seconds = raw >> 32;
    // Rounded up by half a unit, so that a time made from microseconds reads back as the same microsecond.
    let us = (((raw & 0xFFFF_FFFF) + 1) * 1_000_000) >> 32;
    i64::try_from(seconds * 1_000_000 + us).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn encoded_stamps_sort_as_stamps(a: u64, b: u64, m: u16, n: u16) {
            let (x, y) = (Stamp { time: NTP64(a), node: NodeId(m) }, Stamp { time: NTP64(b), node: NodeId(n) });
            prop_assert_eq!(x.to_bytes().cmp(&y.to_bytes()), x.cmp(&y));
            prop_assert_eq!(Stamp::from_bytes(x.to_bytes()), x);
        }

        #[test]
        fn uhlc_orders_stamps_as_we_do(a: u64, b: u64, m in 1u16.., n in 1u16..) {
            let (x, y) = (Stamp { time: NTP64(a), node: NodeId(m) }, Stamp { time: NTP64(b), node: NodeId(n) });
            prop_assert_eq!(x.to_uhlc().unwrap().cmp(&y.to_uhlc().unwrap()), x.cmp(&y));
        }

        #[test]
        fn microseconds_survive(us in 0i64..4_000_000_000_000_000) {
            prop_assert_eq!(ntp_to_unix_us(unix_us_to_ntp(us)), us);
        }
    }
}
