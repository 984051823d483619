// SPDX-License-Identifier: GPL-2.0

//! Reads BTF, the kernel's own description of its types and functions, and checks this module against it.
//!
//! BTF is a list of type records, numbered from 1, and a table of the names in it. A module's BTF continues the
//! numbers and the name offsets of the kernel's own ("split" BTF). Records differ in length, so a record is found
//! by its number through marks that the caller keeps: the offset of one record in every [`STEP`].
//!
//! Nothing here allocates, panics or trusts the bytes. A blob that does not add up is [`Malformed`].

use core::fmt;

#[path = "btf/check.rs"]
mod check;
pub use check::{check, Bits, Expected, Field, Layout, Mismatch, Wanted};

/// How many records lie between two marks.
const STEP: u32 = 32;
/// How deep types may nest before we give up on them.
const DEPTH: u32 = 24;
const POINTER_SIZE: u32 = 8;

/// The blob is not BTF, or not a kind of it that we can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

type Result<T> = core::result::Result<T, Malformed>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Int,
    Pointer,
    Array,
    Struct,
    Union,
    Enum,
    Forward,
    Typedef,
    Volatile,
    Const,
    Restrict,
    Function,
    Prototype,
    Variable,
    Section,
    Float,
    DeclTag,
    TypeTag,
}

impl Kind {
    /// The kind of a record, and the bytes that follow it: so many, and so many for each of its elements.
    fn of(number: u32) -> Result<(Self, usize, usize)> {
        Ok(match number {
            1 => (Self::Int, 4, 0),
            2 => (Self::Pointer, 0, 0),
            3 => (Self::Array, 12, 0),
            4 => (Self::Struct, 0, 12),
            5 => (Self::Union, 0, 12),
            6 => (Self::Enum, 0, 8),
            7 => (Self::Forward, 0, 0),
            8 => (Self::Typedef, 0, 0),
            9 => (Self::Volatile, 0, 0),
            10 => (Self::Const, 0, 0),
            11 => (Self::Restrict, 0, 0),
            12 => (Self::Function, 0, 0),
            13 => (Self::Prototype, 0, 8),
            14 => (Self::Variable, 4, 0),
            15 => (Self::Section, 0, 12),
            16 => (Self::Float, 0, 0),
            17 => (Self::DeclTag, 4, 0),
            18 => (Self::TypeTag, 0, 0),
            19 => (Self::Enum, 0, 12),
            _ => return Err(Malformed),
        })
    }
}

/// One type.
#[derive(Clone, Copy)]
struct Record<'a> {
    kind: Kind,
    flag: bool,
    name: u32,
    /// The size of the type, or the number of the type it refers to.
    value: u32,
    elements: &'a [u8],
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let bytes = bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .ok_or(Malformed)?;
    Ok(u32::from_le_bytes(*bytes))
}

fn part(bytes: &[u8], at: u32, len: u32) -> Result<&[u8]> {
    bytes
        .get(at as usize..)
        .and_then(|rest| rest.get(..len as usize))
        .ok_or(Malformed)
}

/// The record at the start of `bytes`, and what follows it.
fn split_record(bytes: &[u8]) -> Result<(Record<'_>, &[u8])> {
    let info = word(bytes, 4)?;
    let (kind, fixed, each) = Kind::of((info >> 24) & 0x7f)?;
    let len = each
        .checked_mul((info & 0xff_ffff) as usize)
        .and_then(|len| len.checked_add(fixed))
        .ok_or(Malformed)?;
    let rest = bytes.get(12..).ok_or(Malformed)?;
    let elements = rest.get(..len).ok_or(Malformed)?;
    let record = Record {
        kind,
        flag: info >> 31 != 0,
        name: word(bytes, 0)?,
        value: word(bytes, 8)?,
        elements,
    };
    Ok((record, rest.get(len..).ok_or(Malformed)?))
}

/// The type records and the names of a blob.
fn sections(raw: &[u8]) -> Result<(&[u8], &[u8])> {
    const MAGIC_AND_VERSION: u32 = 0x01_eb9f;
    if word(raw, 0)? & 0xff_ffff != MAGIC_AND_VERSION {
        return Err(Malformed);
    }
    let body = raw.get(word(raw, 4)? as usize..).ok_or(Malformed)?;
    Ok((
        part(body, word(raw, 8)?, word(raw, 12)?)?,
        part(body, word(raw, 16)?, word(raw, 20)?)?,
    ))
}

/// The BTF of the kernel, or of a module on top of the kernel's.
#[derive(Clone, Copy)]
pub struct Btf<'a> {
    base: Option<&'a Btf<'a>>,
    types: &'a [u8],
    names: &'a [u8],
    first_id: u32,
    end_id: u32,
    first_name: u32,
    marks: &'a [u32],
}

impl<'a> Btf<'a> {
    /// How many marks [`Btf::new`] needs for a blob.
    pub fn marks_needed(raw: &[u8]) -> Result<usize> {
        let (mut types, _) = sections(raw)?;
        let mut count = 0usize;
        while !types.is_empty() {
            types = split_record(types)?.1;
            count = count.checked_add(1).ok_or(Malformed)?;
        }
        Ok(count.div_ceil(STEP as usize))
    }

    /// Reads a blob: the kernel's, or with the kernel's as `base` a module's.
    pub fn new(raw: &'a [u8], base: Option<&'a Btf<'a>>, marks: &'a mut [u32]) -> Result<Self> {
        let (types, names) = sections(raw)?;
        // Number 0 is `void`, which has no record.
        let first_id = base.map_or(1, |base| base.end_id);
        let first_name = match base {
            Some(base) => base.end_name()?,
            None => 0,
        };
        let mut rest = types;
        let mut free = marks.iter_mut();
        let mut count = 0u32;
        while !rest.is_empty() {
            // rustc 1.85 has no stable is_multiple_of().
            #[allow(clippy::manual_is_multiple_of)]
            if count % STEP == 0 {
                let at = types.len().checked_sub(rest.len()).ok_or(Malformed)?;
                *free.next().ok_or(Malformed)? = u32::try_from(at).map_err(|_| Malformed)?;
            }
            rest = split_record(rest)?.1;
            count = count.checked_add(1).ok_or(Malformed)?;
        }
        let end_id = first_id.checked_add(count).ok_or(Malformed)?;
        Ok(Self {
            base,
            types,
            names,
            first_id,
            end_id,
            first_name,
            marks,
        })
    }

    fn end_name(&self) -> Result<u32> {
        u32::try_from(self.names.len())
            .ok()
            .and_then(|len| self.first_name.checked_add(len))
            .ok_or(Malformed)
    }

    /// The type of a number; `None` is `void`.
    fn record(&self, id: u32) -> Result<Option<Record<'a>>> {
        if id == 0 {
            return Ok(None);
        }
        let Some(place) = id.checked_sub(self.first_id) else {
            return self.base.ok_or(Malformed)?.record(id);
        };
        let mark = *self.marks.get((place / STEP) as usize).ok_or(Malformed)?;
        let mut rest = self.types.get(mark as usize..).ok_or(Malformed)?;
        for _ in 0..place % STEP {
            rest = split_record(rest)?.1;
        }
        Ok(Some(split_record(rest)?.0))
    }

    /// The bytes of a name and all that follows it.
    fn name_and_more(&self, offset: u32) -> Result<&'a [u8]> {
        match offset.checked_sub(self.first_name) {
            Some(at) => self.names.get(at as usize..).ok_or(Malformed),
            None => self.base.ok_or(Malformed)?.name_and_more(offset),
        }
    }

    fn name(&self, offset: u32) -> Result<&'a [u8]> {
        let bytes = self.name_and_more(offset)?;
        let end = bytes.iter().position(|&byte| byte == 0).ok_or(Malformed)?;
        bytes.get(..end).ok_or(Malformed)
    }

    /// The same type without qualifiers and other names of it.
    fn resolve(&self, mut id: u32) -> Result<Option<Record<'a>>> {
        for _ in 0..DEPTH {
            match self.record(id)? {
                Some(Record {
                    kind:
                        Kind::Typedef | Kind::Volatile | Kind::Const | Kind::Restrict | Kind::TypeTag,
                    value,
                    ..
                }) => {
                    id = value;
                }
                found => return Ok(found),
            }
        }
        Err(Malformed)
    }

    fn size(&self, id: u32) -> Result<u32> {
        let mut id = id;
        let mut times = 1u32;
        for _ in 0..DEPTH {
            let record = self.resolve(id)?.ok_or(Malformed)?;
            let size = match record.kind {
                Kind::Pointer => POINTER_SIZE,
                Kind::Array => {
                    id = word(record.elements, 0)?;
                    times = times
                        .checked_mul(word(record.elements, 8)?)
                        .ok_or(Malformed)?;
                    continue;
                }
                Kind::Int | Kind::Struct | Kind::Union | Kind::Enum | Kind::Float => record.value,
                _ => return Err(Malformed),
            };
            return times.checked_mul(size).ok_or(Malformed);
        }
        Err(Malformed)
    }

    /// Where in a struct a field is: a name, or names joined by dots. Members that have no name are looked into.
    fn field(&self, mut record: Record<'a>, path: &str) -> Result<Option<Place>> {
        let mut place = None;
        for name in components(path) {
            let outer = match place {
                None => 0,
                Some(Place { bits, id, .. }) => {
                    match self.resolve(id)? {
                        Some(inner) => record = inner,
                        None => return Ok(None),
                    }
                    bits
                }
            };
            let Some(mut found) = self.member(&record, name.as_bytes(), DEPTH)? else {
                return Ok(None);
            };
            found.bits = found.bits.checked_add(outer).ok_or(Malformed)?;
            place = Some(found);
        }
        Ok(place)
    }

    fn member(&self, record: &Record<'a>, wanted: &[u8], depth: u32) -> Result<Option<Place>> {
        let depth = depth.checked_sub(1).ok_or(Malformed)?;
        if !matches!(record.kind, Kind::Struct | Kind::Union) {
            return Ok(None);
        }
        for member in record.elements.chunks_exact(12) {
            let (name, id, offset) = (
                self.name(word(member, 0)?)?,
                word(member, 4)?,
                word(member, 8)?,
            );
            // With the flag set, the upper byte is the width of a bitfield, or zero.
            let (bits, width) = if record.flag {
                (offset & 0xff_ffff, offset >> 24)
            } else {
                (offset, 0)
            };
            if name == wanted {
                return Ok(Some(Place { bits, width, id }));
            }
            if name.is_empty() {
                if let Some(inner) = self.resolve(id)? {
                    if let Some(mut found) = self.member(&inner, wanted, depth)? {
                        found.bits = found.bits.checked_add(bits).ok_or(Malformed)?;
                        return Ok(Some(found));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Writes a type as C does, with `long unsigned int` and the like as gcc calls them.
    fn write_type(&self, id: u32, out: &mut Text, depth: u32) -> Result<()> {
        let depth = depth.checked_sub(1).ok_or(Malformed)?;
        let Some(record) = self.record(id)? else {
            out.push(b"void");
            return Ok(());
        };
        let (before, after): (&[u8], &[u8]) = match record.kind {
            Kind::Pointer => {
                self.write_type(record.value, out, depth)?;
                if !out.ends_with(b'*') {
                    out.push(b" ");
                }
                out.push(b"*");
                return Ok(());
            }
            Kind::Prototype => return self.write_prototype(&record, out, depth),
            Kind::Array => {
                self.write_type(word(record.elements, 0)?, out, depth)?;
                out.push(b"[]");
                return Ok(());
            }
            Kind::Volatile => (b"volatile ", b" volatile"),
            Kind::Const => (b"const ", b" const"),
            Kind::Restrict => (b"restrict ", b" restrict"),
            Kind::TypeTag => return self.write_type(record.value, out, depth),
            Kind::Struct => (b"struct ", b""),
            Kind::Union => (b"union ", b""),
            Kind::Forward if record.flag => (b"union ", b""),
            Kind::Forward => (b"struct ", b""),
            Kind::Enum => (b"enum ", b""),
            Kind::Int => {
                out.push(gcc_name(self.name(record.name)?));
                return Ok(());
            }
            Kind::Typedef | Kind::Float => (b"", b""),
            _ => return Err(Malformed),
        };
        if matches!(record.kind, Kind::Volatile | Kind::Const | Kind::Restrict) {
            // A qualified pointer has its qualifier behind the star.
            let is_pointer = matches!(
                self.record(record.value)?,
                Some(Record {
                    kind: Kind::Pointer,
                    ..
                })
            );
            if !is_pointer {
                out.push(before);
            }
            self.write_type(record.value, out, depth)?;
            if is_pointer {
                out.push(after);
            }
            return Ok(());
        }
        out.push(before);
        out.push(self.name(record.name)?);
        Ok(())
    }

    fn write_prototype(&self, record: &Record<'a>, out: &mut Text, depth: u32) -> Result<()> {
        self.write_type(record.value, out, depth)?;
        out.push(b"(");
        for (place, parameter) in record.elements.chunks_exact(8).enumerate() {
            if place > 0 {
                out.push(b", ");
            }
            match (word(parameter, 0)?, word(parameter, 4)?) {
                (0, 0) => out.push(b"..."),
                (_, id) => self.write_type(id, out, depth)?,
            }
        }
        out.push(if record.elements.is_empty() {
            b"void)"
        } else {
            b")"
        });
        Ok(())
    }

    /// The prototype of a function, in the words that [`Expected::Function`] has it in.
    fn prototype(&self, function: &Record<'a>) -> Result<Text> {
        let mut text = Text::new();
        match self.record(function.value)? {
            Some(record) if record.kind == Kind::Prototype => {
                self.write_prototype(&record, &mut text, DEPTH)?
            }
            _ => return Err(Malformed),
        }
        Ok(text)
    }

    /// Calls `visit` with every struct, union and function of this blob, not of its base.
    fn each(&self, mut visit: impl FnMut(u32, &Record<'a>) -> Result<()>) -> Result<()> {
        let mut rest = self.types;
        for id in self.first_id..self.end_id {
            let (record, more) = split_record(rest)?;
            if matches!(record.kind, Kind::Struct | Kind::Union | Kind::Function) {
                visit(id, &record)?;
            }
            rest = more;
        }
        Ok(())
    }

    /// The offset and size in bytes of a field of a struct that was not compiled with us.
    pub fn locate(&self, name: &str, path: &str) -> Result<Option<(u32, u32)>> {
        let mut found = None;
        self.each(|_, record| {
            if found.is_none()
                && record.kind == Kind::Struct
                && self.name(record.name)? == name.as_bytes()
            {
                if let Some(place) = self.field(*record, path)? {
                    found = Some((place.bits / 8, self.size(place.id)?));
                }
            }
            Ok(())
        })?;
        Ok(found)
    }
}

/// What gcc calls an integer type that clang may have named.
fn gcc_name(name: &[u8]) -> &[u8] {
    match name {
        b"short" => b"short int",
        b"unsigned short" => b"short unsigned int",
        b"long" => b"long int",
        b"unsigned long" => b"long unsigned int",
        b"long long" => b"long long int",
        b"unsigned long long" => b"long long unsigned int",
        name => name,
    }
}

/// A field in a struct.
#[derive(Clone, Copy)]
struct Place {
    bits: u32,
    /// Of a bitfield, in bits.
    width: u32,
    id: u32,
}

/// The names of a path. bindgen makes up names for members that have none in C; BTF knows nothing of those.
fn components(path: &str) -> impl Iterator<Item = &str> {
    path.split('.')
        .filter(|name| !name.is_empty() && !name.starts_with("__bindgen_anon_"))
}

/// A short text without an allocation; what does not fit is cut off, visibly.
#[derive(Clone, Copy)]
pub struct Text {
    bytes: [u8; Self::CAPACITY],
    len: usize,
}

impl Text {
    const CAPACITY: usize = 160;
    const CUT: u8 = b'~';

    const fn new() -> Self {
        Self {
            bytes: [0; Self::CAPACITY],
            len: 0,
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match self.bytes.get_mut(self.len) {
                Some(free) => {
                    *free = byte;
                    self.len = self.len.wrapping_add(1);
                }
                None => {
                    if let Some(last) = self.bytes.last_mut() {
                        *last = Self::CUT;
                    }
                }
            }
        }
    }

    fn ends_with(&self, byte: u8) -> bool {
        self.as_str().as_bytes().last() == Some(&byte)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        self.bytes
            .get(..self.len)
            .and_then(|bytes| core::str::from_utf8(bytes).ok())
            .unwrap_or("?")
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl PartialEq for Text {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}
