//! Exact arithmetic and order on values in PostgreSQL's binary form (`int2send` ..., `numeric_send`, `float8send`).
//!
//! Invariants: no result is ever rounded, and none that its type cannot hold is given
//! Not here: which values are added, and in what order (the parent module)

use std::cmp::Ordering;

/// A type whose values can be compared, and, but for floating point, added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Signed, big-endian, this many bytes: 2, 4 or 8. Integers; for comparing also dates and times.
    Integer(u8),
    /// `numeric(p, s)`: at most this many digits before the point; `None` for any number of them.
    Numeric(Option<u32>),
    /// IEEE 754, 4 or 8 bytes; NaN above all, as PostgreSQL orders them. Not for adding.
    Float(u8),
}

impl Kind {
    /// Of a column of the built-in type `type_oid` with the modifier `type_mod`.
    #[must_use]
    pub fn of(type_oid: u32, type_mod: i32) -> Option<Self> {
        Some(match type_oid {
            21 => Self::Integer(2),
            // date
            23 | 1082 => Self::Integer(4),
            // time, timestamp, timestamptz
            20 | 1083 | 1114 | 1184 => Self::Integer(8),
            1700 => Self::Numeric(digits_before_point(type_mod)),
            FLOAT4 => Self::Float(4),
            FLOAT8 => Self::Float(8),
            _ => return None,
        })
    }

    /// Can its values be added without rounding?
    #[must_use]
    pub const fn of_sums(type_oid: u32) -> bool {
        matches!(type_oid, 20 | 21 | 23 | 1700)
    }
}

/// What `numeric(p, s)` leaves before the point (`numerictypmodin`: 16 bits of precision, 11 of scale, plus 4).
fn digits_before_point(type_mod: i32) -> Option<u32> {
    let packed = type_mod.checked_sub(4).filter(|packed| *packed >= 0)?;
    let (precision, scale) = (packed >> 16 & 0xFFFF, packed & 0x7FF);
    let scale = (scale ^ 1024) - 1024;
    Some(u32::try_from(precision - scale).unwrap_or(0))
}

/// Why there is no sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoSum {
    /// It is outside the type's range.
    OutOfRange,
    /// A value is no number (NaN, an infinity, a form that is not known).
    NotANumber,
}

/// `base + (new - old)`.
///
/// # Errors
/// When the type cannot hold it.
pub fn shifted(kind: Kind, base: &[u8], old: &[u8], new: &[u8]) -> Result<Vec<u8>, NoSum> {
    match kind {
        Kind::Integer(width) => {
            let read = |bytes| integer(width, bytes).ok_or(NoSum::NotANumber);
            let sum = i128::from(read(base)?) + i128::from(read(new)?) - i128::from(read(old)?);
            let bits = u32::from(width) * 8 - 1;
            if sum < -(1i128 << bits) || sum >= 1i128 << bits {
                return Err(NoSum::OutOfRange);
            }
            let bytes = sum.to_be_bytes();
            let low = 16 - usize::from(width.min(16));
            Ok(bytes.get(low..).unwrap_or_default().to_vec())
        }
        Kind::Numeric(before_point) => {
            let read = |bytes| Numeric::read(bytes).ok_or(NoSum::NotANumber);
            let sum = Numeric::sum(&[(1, &read(base)?), (1, &read(new)?), (-1, &read(old)?)]);
            if before_point.is_some_and(|most| sum.digits_before_point() > most) {
                return Err(NoSum::OutOfRange);
            }
            sum.write().ok_or(NoSum::OutOfRange)
        }
        Kind::Float(_) => Err(NoSum::NotANumber),
    }
}

/// Zero, as a value of the type.
#[must_use]
pub fn zero(kind: Kind) -> Vec<u8> {
    match kind {
        Kind::Integer(width) | Kind::Float(width) => vec![0; usize::from(width)],
        Kind::Numeric(_) => vec![0; 8],
    }
}

/// Which is greater; `None` when one of them cannot be read.
#[must_use]
pub fn compare(kind: Kind, a: &[u8], b: &[u8]) -> Option<Ordering> {
    Some(match kind {
        Kind::Integer(width) => integer(width, a)?.cmp(&integer(width, b)?),
        Kind::Float(width) => {
            let (a, b) = (float(width, a)?, float(width, b)?);
            match (a.is_nan(), b.is_nan()) {
                (false, false) => a.partial_cmp(&b)?,
                (a, b) => a.cmp(&b),
            }
        }
        Kind::Numeric(_) => {
            // -Infinity, numbers, Infinity, NaN.
            let rank = |bytes: &[u8]| match bytes.get(4..6) {
                Some([0xF0, 0]) => 0,
                Some([0xD0, 0]) => 2,
                Some([0xC0, 0]) => 3,
                _ => 1,
            };
            let (of_a, of_b) = (rank(a), rank(b));
            if of_a != 1 || of_b != 1 {
                return Some(of_a.cmp(&of_b));
            }
            let difference = Numeric::sum(&[(1, &Numeric::read(a)?), (-1, &Numeric::read(b)?)]);
            match (difference.digits.is_empty(), difference.negative) {
                (true, _) => Ordering::Equal,
                (false, true) => Ordering::Less,
                (false, false) => Ordering::Greater,
            }
        }
    })
}

/// [`compare`], and of equal values that look different (1.0 and 1.00, 0 and -0) the one with the greater bytes is the greater: which of
/// them is kept must not depend on which of them is met first.
#[must_use]
pub fn compare_exactly(kind: Kind, a: &[u8], b: &[u8]) -> Option<Ordering> {
    compare(kind, a, b).map(|order| order.then_with(|| a.cmp(b)))
}

fn integer(width: u8, bytes: &[u8]) -> Option<i64> {
    Some(match width {
        2 => i64::from(i16::from_be_bytes(bytes.try_into().ok()?)),
        4 => i64::from(i32::from_be_bytes(bytes.try_into().ok()?)),
        8 => i64::from_be_bytes(bytes.try_into().ok()?),
        _ => return None,
    })
}

fn float(width: u8, bytes: &[u8]) -> Option<f64> {
    Some(match width {
        4 => f64::from(f32::from_be_bytes(bytes.try_into().ok()?)),
        8 => f64::from_be_bytes(bytes.try_into().ok()?),
        _ => return None,
    })
}

/// A number of the built-in type `from` as one of `to`, where that is a matter of its width alone; `None` where it is not, or where it does not
/// fit.
#[must_use]
pub fn resized(value: &[u8], from: u32, to: u32) -> Option<Vec<u8>> {
    if let (FLOAT4, FLOAT8) = (from, to) {
        return Some(float(4, value)?.to_be_bytes().to_vec());
    }
    let width = |type_oid| match type_oid {
        20 => Some(8u8),
        21 => Some(2),
        23 => Some(4),
        _ => None,
    };
    let (from, to) = (width(from)?, width(to)?);
    let number = integer(from, value)?;
    let bits = u32::from(to) * 8 - 1;
    let fits = (-(1i128 << bits)..1i128 << bits).contains(&i128::from(number));
    let bytes = number.to_be_bytes();
    let low = bytes.len().checked_sub(usize::from(to)).filter(|_| fits)?;
    Some(bytes.get(low..)?.to_vec())
}

const FLOAT4: u32 = 700;
const FLOAT8: u32 = 701;

/// Brings all digits, times `sign`, into the range of a digit. Gives what is left above the highest.
fn carried(columns: &mut [i64], sign: i64) -> i64 {
    let mut carry = 0;
    for digit in columns {
        let value = sign * *digit + carry;
        *digit = value.rem_euclid(BASE);
        carry = value.div_euclid(BASE);
    }
    carry
}

/// A finite `numeric`: digits of base 10,000, the first of weight `10000^weight`; no zeros at either end.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Numeric {
    negative: bool,
    weight: i64,
    /// Decimal digits after the point that are shown.
    scale: u16,
    digits: Vec<u16>,
}

const BASE: i64 = 10_000;

impl Numeric {
    fn read(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let (count, weight, sign, scale) = (word(0)?, word(2)?, word(4)?, word(6)?);
        let negative = match sign {
            0 => false,
            0x4000 => true,
            _ => return None,
        };
        if bytes.len() != 8 + usize::from(count) * 2 {
            return None;
        }
        let digits: Option<Vec<u16>> = (0..usize::from(count))
            .map(|at| word(8 + at * 2).filter(|digit| *digit < 10_000))
            .collect();
        let weight = i64::from(i16::from_be_bytes(weight.to_be_bytes()));
        Some(Self {
            negative,
            weight,
            scale,
            digits: digits?,
        })
    }

    /// The sum of signed numbers.
    fn sum(parts: &[(i64, &Self)]) -> Self {
        let scale = parts.iter().map(|(_, part)| part.scale).max().unwrap_or(0);
        let lowest = |part: &Self| part.weight - i64::try_from(part.digits.len()).unwrap_or(0) + 1;
        let there = || {
            parts
                .iter()
                .map(|(_, part)| *part)
                .filter(|part| !part.digits.is_empty())
        };
        let low = there().map(lowest).min().unwrap_or(0);
        let high = there().map(|part| part.weight).max().unwrap_or(0);
        // Lowest first; two more for what is carried.
        let mut columns = vec![0i64; usize::try_from(high - low + 3).unwrap_or(0)];
        for (sign, part) in parts {
            let sign = if part.negative { -sign } else { *sign };
            for (at, digit) in (0i64..).zip(&part.digits) {
                let slot = usize::try_from(part.weight - at - low)
                    .ok()
                    .and_then(|at| columns.get_mut(at));
                if let Some(slot) = slot {
                    *slot += sign * i64::from(*digit);
                }
            }
        }
        // What is left above all columns tells the sign: that of the highest digit alone does not, before carrying.
        let negative = carried(&mut columns.clone(), 1) < 0;
        carried(&mut columns, if negative { -1 } else { 1 });
        let first = columns.iter().rposition(|digit| *digit != 0);
        let last = columns.iter().position(|digit| *digit != 0);
        let (Some(first), Some(last)) = (first, last) else {
            let (negative, weight, digits) = (false, 0, Vec::new());
            return Self {
                negative,
                weight,
                scale,
                digits,
            };
        };
        let kept = columns.get(last..=first).unwrap_or_default();
        Self {
            negative,
            weight: low + i64::try_from(first).unwrap_or(0),
            scale,
            digits: kept
                .iter()
                .rev()
                .map(|digit| u16::try_from(*digit).unwrap_or(0))
                .collect(),
        }
    }

    fn digits_before_point(&self) -> u32 {
        let Some(first) = self.digits.first() else {
            return 0;
        };
        let of_first = first.checked_ilog10().map_or(0, |log| i64::from(log) + 1);
        u32::try_from(self.weight * 4 + of_first).unwrap_or(0)
    }

    /// `None` where `numeric` has no place for it.
    fn write(&self) -> Option<Vec<u8>> {
        let mut out = Vec::with_capacity(8 + self.digits.len() * 2);
        out.extend_from_slice(&u16::try_from(self.digits.len()).ok()?.to_be_bytes());
        out.extend_from_slice(&i16::try_from(self.weight).ok()?.to_be_bytes());
        out.extend_from_slice(&(if self.negative { 0x4000u16 } else { 0 }).to_be_bytes());
        out.extend_from_slice(&self.scale.to_be_bytes());
        for digit in &self.digits {
            out.extend_from_slice(&digit.to_be_bytes());
        }
        Some(out)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As `numeric_send` writes `units / 10^scale`.
    fn numeric(units: i128, scale: u16) -> Vec<u8> {
        let padded = usize::from(scale).div_ceil(4) * 4;
        let mut left = units.unsigned_abs() * 10u128.pow(u32::try_from(padded).unwrap() - u32::from(scale));
        let mut digits = Vec::new();
        while left > 0 {
            digits.insert(0, u16::try_from(left % 10_000).unwrap());
            left /= 10_000;
        }
        let weight = i64::try_from(digits.len()).unwrap() - 1 - i64::try_from(padded).unwrap() / 4;
        while digits.last() == Some(&0) {
            digits.pop();
        }
        let weight = if digits.is_empty() { 0 } else { weight };
        let negative = units < 0;
        Numeric {
            negative,
            weight,
            scale,
            digits,
        }
        .write()
        .unwrap()
    }

    #[test]
    fn integers_shift_up_to_their_range_and_no_further() {
        let int4 = |value: i32| value.to_be_bytes().to_vec();
        let kind = Kind::Integer(4);
        assert_eq!(shifted(kind, &int4(-5), &int4(100), &int4(90)), Ok(int4(-15)));
        assert_eq!(
            shifted(kind, &int4(i32::MAX - 1), &int4(0), &int4(1)),
            Ok(int4(i32::MAX))
        );
        assert_eq!(
            shifted(kind, &int4(i32::MAX), &int4(0), &int4(1)),
            Err(NoSum::OutOfRange)
        );
        assert_eq!(
            shifted(kind, &int4(i32::MIN), &int4(1), &int4(0)),
            Err(NoSum::OutOfRange)
        );
        let big = |value: i64| value.to_be_bytes().to_vec();
        let most = shifted(Kind::Integer(8), &big(i64::MAX), &big(i64::MIN), &big(i64::MIN));
        assert_eq!(most, Ok(big(i64::MAX)));
        assert_eq!(
            shifted(kind, &int4(1)[..2], &int4(0), &int4(1)),
            Err(NoSum::NotANumber)
        );
    }

    #[test]
    fn numerics_have_the_range_of_their_column() {
        // numeric(5, 2)
        let kind = Kind::of(1700, (5 << 16 | 2) + 4).unwrap();
        assert_eq!(kind, Kind::Numeric(Some(3)));
        let at = |units| numeric(units, 2);
        assert_eq!(shifted(kind, &at(99_998), &at(0), &at(1)), Ok(at(99_999)));
        assert_eq!(shifted(kind, &at(99_999), &at(0), &at(1)), Err(NoSum::OutOfRange));
        assert_eq!(
            shifted(kind, &at(-99_999), &at(1), &at(0)),
            Err(NoSum::OutOfRange)
        );
        let nan = [0, 0, 0, 0, 0xC0, 0, 0, 0];
        assert_eq!(shifted(kind, &at(1), &at(1), &nan), Err(NoSum::NotANumber));
        assert_eq!(compare(kind, &nan, &at(99_999)), Some(Ordering::Greater));
        // numeric(2, 5): below 0.001
        assert_eq!(Kind::of(1700, (2 << 16 | 5) + 4), Some(Kind::Numeric(Some(0))));
    }

    #[test]
    fn numbers_change_their_width_and_nothing_else() {
        let (small, int, big) = (21, 23, 20);
        assert_eq!(
            resized(&(-7i32).to_be_bytes(), int, big),
            Some((-7i64).to_be_bytes().to_vec())
        );
        assert_eq!(resized(&7i64.to_be_bytes(), big, small), Some(vec![0, 7]));
        assert_eq!(resized(&i64::MIN.to_be_bytes(), big, int), None);
        assert_eq!(resized(&32_768i32.to_be_bytes(), int, small), None);
        assert_eq!(
            resized(&1.5f32.to_be_bytes(), 700, 701),
            Some(1.5f64.to_be_bytes().to_vec())
        );
        for (from, to) in [(701, 700), (int, 1700), (int, 700), (1082, int)] {
            assert_eq!(resized(&[0; 4], from, to), None);
        }
        assert_eq!(resized(&[0; 3], int, big), None);
    }

    #[test]
    fn floats_are_ordered_as_postgres_orders_them() {
        let float = |value: f64| value.to_be_bytes();
        let order = |a: f64, b: f64| compare(Kind::Float(8), &float(a), &float(b)).unwrap();
        assert_eq!(order(-0.0, 0.0), Ordering::Equal);
        assert_eq!(order(f64::NAN, f64::INFINITY), Ordering::Greater);
        assert_eq!(order(f64::NAN, f64::NAN), Ordering::Equal);
        assert_eq!(order(1.0, 2.0), Ordering::Less);
    }

    proptest! {
        #[test]
        fn numerics_add_as_whole_numbers_do(
            base in -(1i128 << 90)..1i128 << 90,
            old in -(1i128 << 90)..1i128 << 90,
            new in -(1i128 << 90)..1i128 << 90,
            scale in 0u16..9,
        ) {
            let at = |units| numeric(units, scale);
            let kind = Kind::Numeric(None);
            prop_assert_eq!(shifted(kind, &at(base), &at(old), &at(new)), Ok(at(base + new - old)));
            prop_assert_eq!(compare(kind, &at(base), &at(old)), Some(base.cmp(&old)));
        }

        #[test]
        fn small_numerics_of_any_scale_add_as_whole_numbers_do(
            base in -30_000i128..30_000, old in -30_000i128..30_000, new in -30_000i128..30_000, scale in 0u16..9,
        ) {
            let at = |units| numeric(units, scale);
            prop_assert_eq!(shifted(Kind::Numeric(None), &at(base), &at(old), &at(new)), Ok(at(base + new - old)));
        }

        #[test]
        fn of_equal_numerics_one_is_the_greater_if_they_look_different(
            a in -3i128..3, b in -3i128..3, scales in (0u16..3, 0u16..3),
        ) {
            let at = |units: i128, scale: u16| numeric(units * 10i128.pow(u32::from(scale)), scale);
            let (one, other) = (at(a, scales.0), at(b, scales.1));
            let kind = Kind::Numeric(None);
            let order = compare_exactly(kind, &one, &other).unwrap();
            prop_assert_eq!(compare(kind, &one, &other), Some(a.cmp(&b)));
            prop_assert_eq!(order, a.cmp(&b).then(scales.0.cmp(&scales.1)));
            prop_assert_eq!(compare_exactly(kind, &other, &one), Some(order.reverse()));
            prop_assert_eq!(order == Ordering::Equal, one == other);
        }

        #[test]
        fn damaged_values_give_errors_and_no_panic(a: Vec<u8>, b: Vec<u8>) {
            for kind in [Kind::Integer(2), Kind::Integer(8), Kind::Numeric(Some(3)), Kind::Numeric(None), Kind::Float(4)] {
                let _ = shifted(kind, &a, &b, &a);
                let _ = compare(kind, &a, &b);
            }
        }
    }
}
