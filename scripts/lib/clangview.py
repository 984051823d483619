#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What the functions of C sources do with the fields of structures, as clang's parser sees it. Runs in the build root.

Usage: clangview.py REQUEST, a JSON file: {"sources": [path...], "flags": [...], "directories": [...], "records": [...]}.
Without records, those of all structures that have a name are looked at. Functions whose definition is in none of the directories are left out. Prints JSON:

    {source: {"errors": [...], "functions": {name: {"file": path, "global": bool, "uses": {"record.field": "rwa"},
                                                    "names": [functions that it calls or whose address it takes]}}}}

Of the letters, `r` is a read, `w` a store, and `a` that an address goes somewhere else, which may be both. A store to a
part of a field, or to a field of a structure that is a field, is a store to the field, too; what stands behind a pointer
is not. What is not evaluated (typeof, sizeof, the controlling expression of a generic selection) does not count.

libclang is what bindgen needs in any case; of its interface only the few functions below are used.
"""

import ctypes
import json
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.setrecursionlimit(20000)

# Kinds of cursors (clang-c/Index.h).
STRUCT, UNION, FIELD, FUNCTION, VARIABLE = 2, 3, 6, 8, 9
MEMBER_REF, UNEXPOSED, DECL_REF, MEMBER_REF_EXPR = 47, 100, 101, 102
PAREN, UNARY, SUBSCRIPT, BINARY, COMPOUND_ASSIGN, CAST = 111, 112, 113, 114, 115, 117
GENERIC, SIZEOF, ASM, STATIC_ASSERT = 122, 136, 215, 602
UNEVALUATED = {SIZEOF, STATIC_ASSERT}
# Kinds of operators and types.
ASSIGN = 22
INCREMENTS, ADDRESS_OF, DEREFERENCE = {1, 2, 3, 4}, 5, 6
POINTER, ARRAYS = 101, {112, 114, 115, 116}
INTERNAL_LINKAGE = 2
SEVERITY_ERROR = 3


class Cursor(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("xdata", ctypes.c_int), ("data", ctypes.c_void_p * 3)]


class Type(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("data", ctypes.c_void_p * 2)]


class String(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("flags", ctypes.c_uint)]


class Location(ctypes.Structure):
    _fields_ = [("pointers", ctypes.c_void_p * 2), ("number", ctypes.c_uint)]


VISITOR = ctypes.CFUNCTYPE(ctypes.c_int, Cursor, Cursor, ctypes.c_void_p)
POINTER_TO = ctypes.POINTER
PROTOTYPES = {
    "clang_createIndex": (ctypes.c_void_p, [ctypes.c_int, ctypes.c_int]),
    "clang_parseTranslationUnit": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p, POINTER_TO(ctypes.c_char_p),
                                                     ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]),
    "clang_disposeTranslationUnit": (None, [ctypes.c_void_p]),
    "clang_getNumDiagnostics": (ctypes.c_uint, [ctypes.c_void_p]),
    "clang_getDiagnostic": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_uint]),
    "clang_getDiagnosticSeverity": (ctypes.c_int, [ctypes.c_void_p]),
    "clang_formatDiagnostic": (String, [ctypes.c_void_p, ctypes.c_uint]),
    "clang_defaultDiagnosticDisplayOptions": (ctypes.c_uint, []),
    "clang_getTranslationUnitCursor": (Cursor, [ctypes.c_void_p]),
    "clang_visitChildren": (ctypes.c_uint, [Cursor, VISITOR, ctypes.c_void_p]),
    "clang_getCursorReferenced": (Cursor, [Cursor]),
    "clang_getCursorSemanticParent": (Cursor, [Cursor]),
    "clang_getCursorSpelling": (String, [Cursor]),
    "clang_getCursorLocation": (Location, [Cursor]),
    "clang_getCursorLinkage": (ctypes.c_int, [Cursor]),
    "clang_getFileLocation": (None, [Location, POINTER_TO(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_void_p,
                                     ctypes.c_void_p]),
    "clang_Cursor_isFunctionInlined": (ctypes.c_uint, [Cursor]),
    "clang_getFileName": (String, [ctypes.c_void_p]),
    "clang_isCursorDefinition": (ctypes.c_uint, [Cursor]),
    "clang_isDeclaration": (ctypes.c_uint, [ctypes.c_int]),
    "clang_getCursorType": (Type, [Cursor]),
    "clang_getCanonicalType": (Type, [Type]),
    "clang_getCursorBinaryOperatorKind": (ctypes.c_int, [Cursor]),
    "clang_getCursorUnaryOperatorKind": (ctypes.c_int, [Cursor]),
    "clang_Cursor_getVarDeclInitializer": (Cursor, [Cursor]),
    "clang_Cursor_isNull": (ctypes.c_int, [Cursor]),
    "clang_getCString": (ctypes.c_char_p, [String]),
    "clang_disposeString": (None, [String]),
}


def load():
    """libclang, with the prototypes of what is used."""
    libraries = sorted(Path("/usr/lib").glob("*/libclang-[0-9]*.so*")) + sorted(Path("/usr/lib").glob("llvm-*/lib/libclang.so*"))
    if not libraries:
        sys.exit("clangview: the root has no libclang")
    library = ctypes.CDLL(str(libraries[0]))
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Unit:
    """A source that is parsed, and what its functions do."""

    def __init__(self, library, source, flags, directories, records):
        self.clang = library
        # Made once: making one takes longer than a visit.
        self.found, self.visitor = [], VISITOR(self._visit)
        self.directories, self.records = tuple(directories), set(records or [])
        arguments = [flag.encode() for flag in flags]
        index = library.clang_createIndex(0, 0)
        self.handle = library.clang_parseTranslationUnit(
            index, str(source).encode(), (ctypes.c_char_p * len(arguments))(*arguments), len(arguments), None, 0, 0)
        if not self.handle:
            sys.exit(f"clangview: {source} cannot be parsed")
        self.errors = list(self._errors())
        self.field_names = {}
        self.functions = {}
        tops = [cursor for cursor in self.children(library.clang_getTranslationUnitCursor(self.handle))
                if cursor.kind == VARIABLE or cursor.kind == FUNCTION and library.clang_isCursorDefinition(cursor)]
        inline, self.uses, self.names = {}, {}, set()
        for cursor in tops:
            path = self._file(cursor)
            if not path.startswith(self.directories):
                continue
            if cursor.kind == VARIABLE:
                # A table, whose initialiser names functions and fields.
                self.expression(cursor, "r")
            else:
                inline[self._text(library.clang_getCursorSpelling(cursor))] = (cursor, path)
        tables = self.uses, self.names
        # What others can call, and what that calls. Most inline functions of headers are for other sources.
        ahead = [name for name, (cursor, path) in inline.items()
                 if path == str(source) or not library.clang_Cursor_isFunctionInlined(cursor)] + sorted(tables[1])
        while ahead:
            name = ahead.pop()
            if name in inline and name not in self.functions:
                self._function(name, *inline[name])
                ahead += self.functions[name]["names"]
        self.uses, self.names = tables
        self.functions["(tables)"] = {"file": str(source), "global": True, "uses": self.uses, "names": sorted(self.names)}
        library.clang_disposeTranslationUnit(self.handle)

    def _errors(self):
        for number in range(self.clang.clang_getNumDiagnostics(self.handle)):
            diagnostic = self.clang.clang_getDiagnostic(self.handle, number)
            if self.clang.clang_getDiagnosticSeverity(diagnostic) >= SEVERITY_ERROR:
                yield self._text(self.clang.clang_formatDiagnostic(
                    diagnostic, self.clang.clang_defaultDiagnosticDisplayOptions()))

    def _text(self, string):
        text = (self.clang.clang_getCString(string) or b"").decode(errors="replace")
        self.clang.clang_disposeString(string)
        return text

    def _visit(self, child, _parent, _data):
        self.found.append(Cursor.from_buffer_copy(child))
        return 1  # to the next one, not into this one

    def children(self, cursor):
        self.found = []
        self.clang.clang_visitChildren(cursor, self.visitor, None)
        return self.found

    def _file(self, cursor):
        handle = ctypes.c_void_p()
        self.clang.clang_getFileLocation(self.clang.clang_getCursorLocation(cursor), ctypes.byref(handle), None, None, None)
        return self._text(self.clang.clang_getFileName(handle)) if handle.value else ""

    def _function(self, name, cursor, path):
        self.uses, self.names = {}, set()
        for child in self.children(cursor):
            # Parameters and the result need no look; the body is the one statement.
            if not self.clang.clang_isDeclaration(child.kind):
                self.expression(child, "r")
        self.functions[name] = {"file": path, "uses": self.uses, "names": sorted(self.names),
                                "global": self.clang.clang_getCursorLinkage(cursor) != INTERNAL_LINKAGE}

    def field(self, cursor):
        """`record.field` of a field's declaration; None for what has no name, or is no field of a record asked for."""
        key = (cursor.data[0], cursor.data[1], cursor.data[2])
        if key not in self.field_names:
            name = self._text(self.clang.clang_getCursorSpelling(cursor))
            parent = self.clang.clang_getCursorSemanticParent(cursor)
            record = self._text(self.clang.clang_getCursorSpelling(parent))
            while parent.kind in (STRUCT, UNION) and not re.fullmatch(r"\w+", record):
                parent = self.clang.clang_getCursorSemanticParent(parent)
                record = self._text(self.clang.clang_getCursorSpelling(parent))
            known = record in self.records if self.records else re.fullmatch(r"\w+", record)
            named = re.fullmatch(r"\w+", name) and known
            self.field_names[key] = f"{record}.{name}" if named else None
        return self.field_names[key]

    def note(self, cursor, how):
        declared = self.clang.clang_getCursorReferenced(cursor)
        if declared.kind == FIELD and (name := self.field(declared)):
            self.uses[name] = "".join(sorted(set(self.uses.get(name, "")) | set(how)))

    def type_kind(self, cursor):
        return self.clang.clang_getCanonicalType(self.clang.clang_getCursorType(cursor)).kind

    def plain(self, cursor):
        """Without parentheses and casts, those that the compiler adds included."""
        while cursor.kind in (PAREN, CAST, UNEXPOSED):
            inner = self.children(cursor)
            if not inner:
                break
            cursor = inner[-1]
        return cursor

    def expression(self, cursor, how):
        """Notes what a statement or an expression, that is used `how`, does."""
        kind = cursor.kind
        if kind in UNEVALUATED:
            return
        if kind == VARIABLE:
            value = self.clang.clang_Cursor_getVarDeclInitializer(cursor)
            if not self.clang.clang_Cursor_isNull(value):
                self.expression(value, "r")
            return
        inner = self.children(cursor)
        if kind == DECL_REF:
            declared = self.clang.clang_getCursorReferenced(cursor)
            if declared.kind == FUNCTION:
                self.names.add(self._text(self.clang.clang_getCursorSpelling(declared)))
        elif kind == MEMBER_REF:
            # offsetof(), or a designated initialiser.
            self.note(cursor, "a")
        elif kind == MEMBER_REF_EXPR:
            self.note(cursor, how)
            for base in inner[:1]:
                self.expression(base, "r" if self.type_kind(base) == POINTER else how)
        elif kind == CAST and inner:
            self.expression(inner[-1], how)
        elif kind == GENERIC:
            for child in inner[1:]:
                self.expression(child, how)
        elif kind == UNEXPOSED and len(inner) == 1:
            decays = self.type_kind(cursor) == POINTER and self.type_kind(inner[0]) in ARRAYS
            self.expression(inner[0], "a" if decays else how)
        elif kind == PAREN and inner:
            self.expression(inner[0], how)
        elif kind == UNARY and inner:
            self.unary(cursor, inner[0], how)
        elif kind == SUBSCRIPT and len(inner) == 2:
            array = self.plain(inner[0])
            self.expression(array if self.type_kind(array) in ARRAYS else inner[0],
                            how if self.type_kind(array) in ARRAYS else "r")
            self.expression(inner[1], "r")
        elif kind == BINARY and len(inner) == 2 and self.clang.clang_getCursorBinaryOperatorKind(cursor) == ASSIGN:
            self.expression(inner[0], "w")
            self.expression(inner[1], "r")
        elif kind == COMPOUND_ASSIGN and len(inner) == 2:
            self.expression(inner[0], "rw")
            self.expression(inner[1], "r")
        elif kind == ASM:
            for child in inner:
                self.expression(child, "a")
        else:
            for child in inner:
                self.expression(child, "r")

    def unary(self, cursor, operand, how):
        operator = self.clang.clang_getCursorUnaryOperatorKind(cursor)
        if operator in INCREMENTS:
            return self.expression(operand, "rw")
        if operator == ADDRESS_OF:
            return self.expression(operand, "a")
        if operator == DEREFERENCE:
            # READ_ONCE() and WRITE_ONCE() go through the address of what they read or write.
            place = self.plain(operand)
            if place.kind == UNARY and self.clang.clang_getCursorUnaryOperatorKind(place) == ADDRESS_OF:
                return self.expression(self.children(place)[0], how)
        return self.expression(operand, "r")


_request = None


def _init(request):
    global _request
    _request = (load(), request)


def _parse(source):
    library, request = _request
    unit = Unit(library, source, request["flags"], request["directories"], request["records"])
    return source, {"errors": unit.errors, "functions": unit.functions}


def main():
    request = json.loads(Path(sys.argv[1]).read_text())
    # The compiler's own headers are clang's.
    resources = subprocess.run(["clang", "-print-resource-dir"], capture_output=True, text=True, check=True).stdout.strip()
    request["flags"] += ["-resource-dir", resources, "-ferror-limit=0", "-w"]
    with ProcessPoolExecutor(initializer=_init, initargs=(request,)) as pool:
        json.dump(dict(pool.map(_parse, request["sources"])), sys.stdout)


if __name__ == "__main__":
    main()
