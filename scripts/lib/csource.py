# SPDX-License-Identifier: GPL-2.0
"""Cuts C sources into their functions, types and macros, and takes a fingerprint of each.

clang's lexer, through libclang, makes the tokens; comments and white space are none, so that a fingerprint changes with
the code alone. What belongs together is found in the tokens themselves, not in a parsed unit: a source need not be
configured, its includes need not be there, and branches of #ifdef that some configuration leaves out count as well.
Nothing of a file is outside of the pieces: a change anywhere in it changes at least one of them.
"""

import ctypes
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import clangview

# Kinds of tokens (clang-c/Index.h).
KEYWORD, IDENTIFIER, COMMENT = 1, 2, 4
# Do not complain about includes that are missing; look at no body.
INCOMPLETE, SKIP_BODIES = 0x02, 0x40
OPEN, CLOSE = "([{", ")]}"
RECORDS = ("struct", "union", "enum")
DIGITS = 16


class Unbalanced(Exception):
    """A source whose braces do not pair."""


class _Token(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint * 4), ("pointer", ctypes.c_void_p)]


class _Range(ctypes.Structure):
    _fields_ = [("pointers", ctypes.c_void_p * 2), ("begin", ctypes.c_uint), ("end", ctypes.c_uint)]


_POINTER = ctypes.POINTER
_PROTOTYPES = {
    "clang_getTokenKind": (ctypes.c_int, [_Token]),
    "clang_getTokenSpelling": (clangview.String, [ctypes.c_void_p, _Token]),
    "clang_getTokenLocation": (clangview.Location, [ctypes.c_void_p, _Token]),
    "clang_getFile": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "clang_getLocationForOffset": (clangview.Location, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]),
    "clang_getRange": (_Range, [clangview.Location, clangview.Location]),
    "clang_tokenize": (None, [ctypes.c_void_p, _Range, _POINTER(_POINTER(_Token)), _POINTER(ctypes.c_uint)]),
    "clang_disposeTokens": (None, [ctypes.c_void_p, _POINTER(_Token), ctypes.c_uint]),
    "clang_disposeIndex": (None, [ctypes.c_void_p]),
    "clang_getFileLocation": (None, [clangview.Location, ctypes.c_void_p, _POINTER(ctypes.c_uint), ctypes.c_void_p,
                                     _POINTER(ctypes.c_uint)]),
}
_library = None


def _clang():
    global _library
    if _library is None:
        _library = clangview.load()
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(_library, name)
            function.restype, function.argtypes = result, arguments
    return _library


@dataclass
class Token:
    text: str
    kind: int
    line: int
    begin: int


@dataclass
class Piece:
    """A function, a type, a macro, or what is left of a file. It may have several definitions, one a configuration."""
    name: str
    tokens: list = field(default_factory=list)
    # First and last line of each definition, from 1.
    lines: list = field(default_factory=list)

    @property
    def fingerprint(self):
        return hashlib.sha256("\n".join(token.text for token in self.tokens).encode()).hexdigest()[:DIGITS]


def tokens(path):
    """The tokens of a file, without comments."""
    clang, data = _clang(), Path(path).read_bytes()
    arguments = (ctypes.c_char_p * 4)(b"-xc", b"-nostdinc", b"-ferror-limit=1", b"-w")
    index = clang.clang_createIndex(0, 0)
    unit = clang.clang_parseTranslationUnit(index, str(path).encode(), arguments, 4, None, 0, INCOMPLETE | SKIP_BODIES)
    if not unit:
        raise OSError(f"libclang cannot read {path}")
    handle = clang.clang_getFile(unit, str(path).encode())
    ends = [clang.clang_getLocationForOffset(unit, handle, offset) for offset in (0, len(data))]
    array, count = _POINTER(_Token)(), ctypes.c_uint()
    clang.clang_tokenize(unit, clang.clang_getRange(*ends), ctypes.byref(array), ctypes.byref(count))
    found, line, offset = [], ctypes.c_uint(), ctypes.c_uint()
    for number in range(count.value):
        kind = clang.clang_getTokenKind(array[number])
        if kind == COMMENT:
            continue
        spelling = clang.clang_getTokenSpelling(unit, array[number])
        text = clang.clang_getCString(spelling).decode(errors="replace")
        clang.clang_disposeString(spelling)
        clang.clang_getFileLocation(clang.clang_getTokenLocation(unit, array[number]), None, ctypes.byref(line), None,
                                    ctypes.byref(offset))
        # A line that is continued inside of a token is the same token.
        found.append(Token(text.replace("\\\n", ""), kind, line.value, offset.value))
    clang.clang_disposeTokens(unit, array, count)
    clang.clang_disposeTranslationUnit(unit)
    clang.clang_disposeIndex(index)
    return found


def _continued(data):
    """For each line of a file, from 0, the last one of those that backslashes join to it."""
    lines = data.split("\n")
    last = list(range(len(lines)))
    for number in range(len(lines) - 2, -1, -1):
        if lines[number].endswith("\\"):
            last[number] = last[number + 1]
    return last


class _Cutter:
    def __init__(self, path):
        text = Path(path).read_text(errors="replace")
        self.last = _continued(text)
        self.tokens = tokens(path)
        self.pieces, self.path = {}, path

    def add(self, name, part):
        piece = self.pieces.setdefault(name, Piece(name))
        piece.tokens += part
        piece.lines.append((part[0].line, self.last[part[-1].line - 1] + 1))

    def directive(self, start):
        """The end of the preprocessor's line that begins with this token."""
        last = self.last[self.tokens[start].line - 1] + 1
        end = start
        while end < len(self.tokens) and self.tokens[end].line <= last:
            end += 1
        return end

    def cut(self):
        number, chunk, conditions, brackets = 0, [], [], []
        previous = 0
        while number < len(self.tokens):
            token = self.tokens[number]
            if token.text == "#" and token.line != previous:
                end = self.directive(number)
                part = self.tokens[number:end]
                previous, number = self.last[token.line - 1] + 1, end
                if chunk:
                    chunk += part
                elif len(part) > 2 and part[1].text == "define":
                    self.add(f"#define {part[2].text}", part)
                else:
                    conditions += part
                continue
            previous = token.line
            number += 1
            chunk.append(token)
            if token.text in OPEN:
                brackets.append((token, len(chunk)))
            elif token.text in CLOSE:
                if not brackets or OPEN.index(brackets[-1][0].text) != CLOSE.index(token.text):
                    raise Unbalanced(f"{self.path}:{token.line}: this bracket closes none")
                first, place = brackets.pop()
                # A function's body ends it. A type's, or a table's, is followed by a semicolon.
                if not brackets and token.text == "}" and _is_body(chunk, place):
                    self.add(_name(chunk), chunk)
                    chunk = []
            elif token.text == ";" and not brackets:
                self.add(_name(chunk), chunk)
                chunk = []
        if brackets:
            raise Unbalanced(f"{self.path}:{brackets[-1][0].line}: this bracket is never closed")
        if chunk:
            self.add(_name(chunk), chunk)
        if conditions:
            self.add("(conditions and includes)", conditions)
        return self.pieces


def _is_body(chunk, place):
    """Whether the brace that chunk[place - 1] is begins the body of a function."""
    depth, parameters = 0, False
    for token in chunk[:place - 1]:
        if token.text == "=" and not depth or token.text in RECORDS and not depth and not parameters \
                and not any(other.text == "(" for other in chunk[:place - 1]):
            return False
        depth += (token.text in OPEN) - (token.text in CLOSE)
        parameters |= token.text == "("
    return parameters


def _name(chunk):
    """What a piece is called: the function, the type, or the macro that makes it."""
    head, depth, words = [], 0, []
    for token in chunk:
        if token.text == "=" and not depth:
            break
        if token.text == "{" and not depth:
            words.append(token)
            break
        if token.text in OPEN:
            depth += 1
            if depth == 1:
                words.append(token)
                continue
        elif token.text in CLOSE:
            depth -= 1
            if depth == 0:
                words.append(token)
                continue
        (words if depth == 0 else head).append(token)
    for number, token in enumerate(words[:-1]):
        called = token.kind == IDENTIFIER and words[number + 1].text == "("
        if called and not token.text.startswith("__attribute") and token.text not in ("__printf", "__aligned"):
            # FNAME(walk_addr)(parameters), or a macro that defines something by the name in it.
            doubled = [other.text for other in words[number + 1:number + 4]] == ["(", ")", "("]
            if doubled or chunk[-1].text == ";" and token.text.isupper():
                start = next(place for place, other in enumerate(chunk) if other is token)
                inner = [other.text for other in chunk[start + 2:start + 5] if other.kind == IDENTIFIER][:1 + (not doubled)]
                return f"{token.text}({', '.join(inner)})"
            return token.text
    identifiers = [token.text for token in words if token.kind == IDENTIFIER]
    records = [words[number + 1].text for number, token in enumerate(words[:-1])
               if token.text in RECORDS and words[number + 1].kind == IDENTIFIER]
    if records and chunk[-2].text == "}" and "=" not in [token.text for token in chunk[:len(words) + 2]]:
        return f"{next(token.text for token in words if token.text in RECORDS)} {records[0]}"
    return identifiers[-1] if identifiers else "(declarations)"


def pieces(path):
    """The pieces of a C source: {name: Piece}."""
    return _Cutter(path).cut()
