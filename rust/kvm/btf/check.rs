// SPDX-License-Identifier: GPL-2.0

//! Compares the running kernel with the one that this module was compiled for.
//!
//! A check is one pass over each blob. What is wanted is compared by hash first, because a kernel has a hundred
//! thousand types and we care for a hundred.

// A mismatch carries a prototype that was read, and there is no allocator here to put it elsewhere.
#![allow(clippy::result_large_err, clippy::large_enum_variant)]

use super::{components, Btf, Kind, Malformed, Record, Result, Text};
use core::fmt;

/// A field as it was compiled.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name, or names joined by dots.
    pub path: &'static str,
    /// Its offset in bytes.
    pub offset: usize,
    /// Its size in bytes.
    pub size: usize,
}

/// A bitfield of a struct of at most eight bytes.
#[derive(Clone, Copy, Debug)]
pub struct Bits {
    /// Its name.
    pub name: &'static str,
    /// The struct with all bits of the field set, and no others.
    pub mask: fn() -> u64,
}

impl Bits {
    /// The first bit, and the number of bits.
    fn place(&self) -> (u32, u32) {
        let mask = (self.mask)();
        (mask.trailing_zeros(), mask.count_ones())
    }
}

/// A struct or union as it was compiled.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Its name, without `struct`.
    pub name: &'static str,
    /// Its size in bytes.
    pub size: usize,
    /// The fields that matter to us.
    pub fields: &'static [Field],
    /// The bitfields that matter to us.
    pub bits: &'static [Bits],
}

/// Something that the kernel must have.
#[derive(Clone, Copy, Debug)]
pub enum Expected<'e> {
    /// A struct or union of this layout.
    Layout(&'e Layout),
    /// A function of this name and prototype, e.g. `int(struct kvm_vcpu *, gpa_t, u64, void *, int)`.
    Function(&'e str, &'e str),
}

impl<'e> Expected<'e> {
    fn name(&self) -> &'e str {
        match self {
            Self::Layout(layout) => layout.name,
            Self::Function(name, _) => name,
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    NotSeen,
    Matches,
    Differs(u32),
}

/// An expectation, and what became of it.
#[derive(Clone, Copy)]
pub struct Wanted<'e> {
    expected: Expected<'e>,
    hash: u32,
    state: State,
    /// An earlier blob had it: later ones are not asked.
    settled: bool,
}

impl<'e> Wanted<'e> {
    /// Wants something.
    pub fn new(expected: Expected<'e>) -> Self {
        let hash = expected.name().bytes().fold(HASH_START, hash_step);
        Self {
            expected,
            hash,
            state: State::NotSeen,
            settled: false,
        }
    }

    fn is_kind(&self, kind: Kind) -> bool {
        matches!(self.expected, Expected::Function(..)) == (kind == Kind::Function)
    }

    /// What differs between the expectation and a type of its name.
    fn compare(&self, btf: &Btf<'_>, record: &Record<'_>) -> Result<Option<Mismatch<'e>>> {
        match self.expected {
            Expected::Function(name, expected) => {
                let found = btf.prototype(record)?;
                Ok((found.as_str() != expected).then_some(Mismatch::Prototype {
                    name,
                    expected,
                    found,
                }))
            }
            Expected::Layout(layout) => {
                for field in layout.fields {
                    if let Some(mismatch) = compare_field(btf, record, layout.name, field)? {
                        return Ok(Some(mismatch));
                    }
                }
                for bits in layout.bits {
                    let (first, width) = bits.place();
                    let found = btf.field(*record, bits.name)?;
                    if found.as_ref().map(|found| (found.bits, found.width)) != Some((first, width))
                    {
                        return Ok(Some(Mismatch::Bits {
                            name: layout.name,
                            field: bits.name,
                            first,
                            width,
                        }));
                    }
                }
                Ok(
                    (record.value as usize != layout.size).then_some(Mismatch::Size {
                        name: layout.name,
                        expected: layout.size,
                        found: record.value,
                    }),
                )
            }
        }
    }
}

fn compare_field<'e>(
    btf: &Btf<'_>,
    record: &Record<'_>,
    name: &'e str,
    field: &'static Field,
) -> Result<Option<Mismatch<'e>>> {
    let Some(place) = btf.field(*record, field.path)? else {
        return Ok(Some(Mismatch::NoField { name, field }));
    };
    if field.offset.checked_mul(8) != Some(place.bits as usize) {
        return Ok(Some(Mismatch::Offset {
            name,
            field,
            found_bits: place.bits,
        }));
    }
    if place.width != 0 {
        return Ok(None);
    }
    let found = btf.size(place.id)?;
    Ok((found as usize != field.size).then_some(Mismatch::FieldSize { name, field, found }))
}

const HASH_START: u32 = 0x811c_9dc5;

fn hash_step(hash: u32, byte: u8) -> u32 {
    (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
}

/// Checks all expectations against a module's BTF and the kernel's, and returns the first that fails.
///
/// What a module's BTF has, the kernel's is not asked for: a type is in a module's BTF only if the kernel's lacks it
/// or has a different one. Of functions of one name one must match, of structs all.
pub fn check<'e>(
    wanted: &mut [Wanted<'e>],
    module: Option<&Btf<'_>>,
    kernel: &Btf<'_>,
) -> core::result::Result<(), Mismatch<'e>> {
    for btf in module.into_iter().chain([kernel]) {
        match_names(wanted, btf)?;
        for want in wanted.iter_mut() {
            want.settled = want.state != State::NotSeen;
            if let State::Differs(id) = want.state {
                let record = btf.record(id)?.ok_or(Malformed)?;
                return Err(want.compare(btf, &record)?.unwrap_or(Mismatch::Malformed));
            }
        }
    }
    match wanted.iter().find(|want| want.state == State::NotSeen) {
        Some(Wanted {
            expected: Expected::Layout(layout),
            ..
        }) => Err(Mismatch::NoStruct { name: layout.name }),
        Some(Wanted {
            expected: Expected::Function(name, _),
            ..
        }) => Err(Mismatch::NoFunction { name }),
        None => Ok(()),
    }
}

/// Compares what is still not seen with the types of one blob.
fn match_names(wanted: &mut [Wanted<'_>], btf: &Btf<'_>) -> Result<()> {
    // Few names pass this filter that are not wanted.
    let mut filter = [0u64; 64];
    let place = |hash: u32| ((hash >> 6) as usize & 63, 1u64 << (hash & 63));
    for want in wanted.iter().filter(|want| !want.settled) {
        let (word, bit) = place(want.hash);
        if let Some(word) = filter.get_mut(word) {
            *word |= bit;
        }
    }
    btf.each(|id, record| {
        let name = btf
            .name_and_more(record.name)?
            .iter()
            .take_while(|&&byte| byte != 0);
        let hash = name.fold(HASH_START, |hash, &byte| hash_step(hash, byte));
        let (word, bit) = place(hash);
        if filter.get(word).is_none_or(|word| word & bit == 0) {
            return Ok(());
        }
        for want in wanted
            .iter_mut()
            .filter(|want| want.hash == hash && want.is_kind(record.kind))
        {
            if want.settled || btf.name(record.name)? != want.expected.name().as_bytes() {
                continue;
            }
            let decisive = match want.expected {
                Expected::Function(..) => State::Matches,
                Expected::Layout(_) => State::Differs(id),
            };
            let outcome = if want.compare(btf, record)?.is_none() {
                State::Matches
            } else {
                State::Differs(id)
            };
            if want.state == State::NotSeen || outcome == decisive {
                want.state = outcome;
            }
        }
        Ok(())
    })
}

/// How the running kernel differs from the one that the module was compiled for.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // The names of the fields say it, and `Display` says it in words.
pub enum Mismatch<'e> {
    NoStruct {
        name: &'e str,
    },
    NoFunction {
        name: &'e str,
    },
    NoField {
        name: &'e str,
        field: &'static Field,
    },
    Size {
        name: &'e str,
        expected: usize,
        found: u32,
    },
    Offset {
        name: &'e str,
        field: &'static Field,
        found_bits: u32,
    },
    FieldSize {
        name: &'e str,
        field: &'static Field,
        found: u32,
    },
    Bits {
        name: &'e str,
        field: &'static str,
        first: u32,
        width: u32,
    },
    Prototype {
        name: &'e str,
        expected: &'e str,
        found: Text,
    },
    Malformed,
}

impl PartialEq for Field {
    fn eq(&self, other: &Self) -> bool {
        self.path == other.path && self.offset == other.offset && self.size == other.size
    }
}

impl From<Malformed> for Mismatch<'_> {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

/// A path without the names that bindgen made up.
struct Path(&'static str);

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, name) in components(self.0).enumerate() {
            f.write_str(if place > 0 { "." } else { "" })?;
            f.write_str(name)?;
        }
        Ok(())
    }
}

impl fmt::Display for Mismatch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoStruct { name } => write!(f, "the running kernel's BTF has no struct {name}"),
            Self::NoFunction { name } => write!(f, "the running kernel's BTF has no function {name}"),
            Self::NoField { name, field } => {
                write!(f, "struct {name} of the running kernel has no field {}", Path(field.path))
            }
            Self::Size { name, expected, found } => {
                write!(f, "struct {name} has {found} bytes in the running kernel, and {expected} in the one built for")
            }
            Self::Offset { name, field, found_bits } => write!(
                f,
                "struct {name}: field {} is at byte {} (bit {}) in the running kernel, and at byte {} in the one built for",
                Path(field.path),
                found_bits / 8,
                found_bits % 8,
                field.offset
            ),
            Self::FieldSize { name, field, found } => write!(
                f,
                "struct {name}: field {} has {found} bytes in the running kernel, and {} in the one built for",
                Path(field.path),
                field.size
            ),
            Self::Bits { name, field, first, width } => write!(
                f,
                "struct {name} of the running kernel has no bitfield {field} of {width} bits at bit {first}, as the one built for"
            ),
            Self::Prototype { name, expected, found } => {
                write!(f, "function {name} is '{}' in the running kernel, expected '{expected}'", found.as_str())
            }
            Self::Malformed => f.write_str("the running kernel's BTF cannot be read"),
        }
    }
}
