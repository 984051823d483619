// SPDX-License-Identifier: GPL-2.0

//! The reader against small blobs made here: layouts that changed, names in both blobs, and bytes that are broken.

#![allow(clippy::result_large_err)] // As in the library.

use rmmu_btf::{check, Bits, Btf, Expected, Field, Layout, Malformed, Mismatch, Wanted};

const INT: u32 = 1;
const POINTER: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const TYPEDEF: u32 = 8;
const CONST: u32 = 10;
const FUNCTION: u32 = 12;
const PROTOTYPE: u32 = 13;
const FLAG: u32 = 1 << 31;

/// Writes a blob; types get the numbers `first`, `first + 1`, ...
struct Writer {
    types: Vec<u8>,
    names: Vec<u8>,
    first_name: u32,
    next: u32,
}

impl Writer {
    fn kernel() -> Self {
        Self {
            types: vec![],
            names: vec![0],
            first_name: 0,
            next: 1,
        }
    }

    fn module(base: &Self) -> Self {
        Self {
            types: vec![],
            names: vec![],
            first_name: base.names.len() as u32,
            next: base.next,
        }
    }

    fn name(&mut self, name: &str) -> u32 {
        if name.is_empty() {
            return 0;
        }
        let at = self.first_name + self.names.len() as u32;
        self.names.extend(name.bytes().chain([0]));
        at
    }

    fn record(&mut self, name: &str, info: u32, value: u32, tail: &[u32]) -> u32 {
        let name = self.name(name);
        for word in [name, info, value].iter().chain(tail) {
            self.types.extend(word.to_le_bytes());
        }
        self.next += 1;
        self.next - 1
    }

    fn int(&mut self, name: &str, size: u32) -> u32 {
        self.record(name, INT << 24, size, &[size * 8])
    }

    /// A type that refers to another one.
    fn refer(&mut self, kind: u32, name: &str, to: u32) -> u32 {
        self.record(name, kind << 24, to, &[])
    }

    fn composite(&mut self, kind: u32, name: &str, size: u32, members: &[(&str, u32, u32)]) -> u32 {
        let tail: Vec<u32> = members
            .iter()
            .flat_map(|&(name, id, bits)| [self.name(name), id, bits])
            .collect();
        self.record(name, (kind << 24) | members.len() as u32, size, &tail)
    }

    fn function(&mut self, name: &str, returns: u32, parameters: &[u32]) -> u32 {
        let tail: Vec<u32> = parameters.iter().flat_map(|&id| [0, id]).collect();
        let prototype = self.record(
            "",
            (PROTOTYPE << 24) | parameters.len() as u32,
            returns,
            &tail,
        );
        self.refer(FUNCTION, name, prototype)
    }

    fn blob(&self) -> Vec<u8> {
        let mut blob = vec![0x9f, 0xeb, 1, 0];
        let (types, names) = (self.types.len() as u32, self.names.len() as u32);
        for word in [24, 0, types, types, names] {
            blob.extend(word.to_le_bytes());
        }
        blob.extend(&self.types);
        blob.extend(&self.names);
        blob
    }
}

/// Checks against a kernel's blob and a module's.
fn run<'e>(
    kernel: &Writer,
    module: Option<&Writer>,
    wanted: &[Expected<'e>],
) -> Result<(), Mismatch<'e>> {
    let (kernel, module) = (kernel.blob(), module.map(Writer::blob));
    run_blobs(&kernel, module.as_deref(), wanted)
}

fn run_blobs<'e>(
    kernel: &[u8],
    module: Option<&[u8]>,
    wanted: &[Expected<'e>],
) -> Result<(), Mismatch<'e>> {
    let mut wanted: Vec<_> = wanted
        .iter()
        .map(|&expected| Wanted::new(expected))
        .collect();
    let mut marks = vec![0; Btf::marks_needed(kernel)?];
    let kernel = Btf::new(kernel, None, &mut marks)?;
    let mut marks = vec![0; module.map_or(Ok(0), Btf::marks_needed)?];
    let module = match module {
        Some(module) => Some(Btf::new(module, Some(&kernel), &mut marks)?),
        None => None,
    };
    check(&mut wanted, module.as_ref(), &kernel)
}

static LOCK: Field = Field {
    path: "lock.",
    offset: 8,
    size: 4,
};
static ROOT: Field = Field {
    path: "arch.__bindgen_anon_1.root.",
    offset: 24,
    size: 8,
};
static VM: Layout = Layout {
    name: "vm",
    size: 32,
    fields: &[LOCK, ROOT],
    bits: &[],
};

/// A kernel with `struct vm { u64 id; int lock; struct arch { u64 gen; union { u64 root; int half; }; } arch; }`.
fn vm(lock_bits: u32, root_type_size: u32, vm_size: u32) -> Writer {
    let mut kernel = Writer::kernel();
    let int = kernel.int("int", 4);
    let long = kernel.int("long", root_type_size);
    let id = kernel.int("u64", 8);
    let either = kernel.composite(UNION, "", 8, &[("root", long, 0), ("half", int, 0)]);
    let arch = kernel.composite(STRUCT, "arch", 16, &[("gen", id, 0), ("", either, 64)]);
    let fixed = kernel.refer(CONST, "", arch);
    kernel.composite(
        STRUCT,
        "vm",
        vm_size,
        &[
            ("id", id, 0),
            ("lock", int, lock_bits),
            ("arch", fixed, 128),
        ],
    );
    kernel
}

#[test]
fn the_layout_that_was_compiled_for_passes() {
    assert_eq!(run(&vm(64, 8, 32), None, &[Expected::Layout(&VM)]), Ok(()));
}

#[test]
fn a_moved_field_is_named() {
    let mismatch = run(&vm(96, 8, 32), None, &[Expected::Layout(&VM)]).unwrap_err();
    assert_eq!(
        mismatch.to_string(),
        "struct vm: field lock is at byte 12 (bit 0) in the running kernel, and at byte 8 in the one built for"
    );
}

#[test]
fn a_field_of_another_size_is_named_without_bindgens_names() {
    let mismatch = run(&vm(64, 4, 32), None, &[Expected::Layout(&VM)]).unwrap_err();
    assert_eq!(
        mismatch.to_string(),
        "struct vm: field arch.root has 4 bytes in the running kernel, and 8 in the one built for"
    );
}

#[test]
fn a_struct_that_grew_is_named() {
    let mismatch = run(&vm(64, 8, 40), None, &[Expected::Layout(&VM)]).unwrap_err();
    assert_eq!(
        mismatch,
        Mismatch::Size {
            name: "vm",
            expected: 32,
            found: 40
        }
    );
}

#[test]
fn what_is_absent_is_told_from_what_differs() {
    static GONE: Layout = Layout {
        name: "gone",
        size: 1,
        fields: &[],
        bits: &[],
    };
    static NO_FIELD: Field = Field {
        path: "arch.none.",
        offset: 0,
        size: 1,
    };
    static LESS: Layout = Layout {
        name: "vm",
        size: 32,
        fields: &[NO_FIELD],
        bits: &[],
    };
    let kernel = vm(64, 8, 32);
    assert_eq!(
        run(&kernel, None, &[Expected::Layout(&GONE)]),
        Err(Mismatch::NoStruct { name: "gone" })
    );
    assert_eq!(
        run(&kernel, None, &[Expected::Layout(&LESS)]),
        Err(Mismatch::NoField {
            name: "vm",
            field: &NO_FIELD
        })
    );
    assert_eq!(
        run(&kernel, None, &[Expected::Function("f", "")]),
        Err(Mismatch::NoFunction { name: "f" })
    );
    // A struct is not a function of its name, nor the other way round.
    assert_eq!(
        run(&kernel, None, &[Expected::Function("vm", "")]),
        Err(Mismatch::NoFunction { name: "vm" })
    );
}

#[test]
fn prototypes_are_written_as_in_c() {
    let mut kernel = vm(64, 8, 32);
    let int = 1;
    let byte = kernel.int("char", 1);
    let gpa = kernel.refer(TYPEDEF, "gpa_t", 3);
    let vm = kernel.next - 3;
    let vm_pointer = kernel.refer(POINTER, "", vm);
    let fixed = kernel.refer(CONST, "", byte);
    let text = kernel.refer(POINTER, "", fixed);
    let texts = kernel.refer(POINTER, "", text);
    let pinned = kernel.refer(CONST, "", texts);
    kernel.function("fault", int, &[vm_pointer, gpa, text, pinned, 0]);
    kernel.function("nothing", 0, &[]);
    let expected = [
        Expected::Function(
            "fault",
            "int(struct vm *, gpa_t, const char *, const char ** const, ...)",
        ),
        Expected::Function("nothing", "void(void)"),
    ];
    assert_eq!(run(&kernel, None, &expected), Ok(()));
}

#[test]
fn a_kernel_that_clang_compiled_has_the_same_prototypes() {
    for (clang, gcc) in [
        ("short", "short int"),
        ("unsigned short", "short unsigned int"),
        ("long", "long int"),
        ("unsigned long", "long unsigned int"),
        ("long long", "long long int"),
        ("unsigned long long", "long long unsigned int"),
        ("unsigned int", "unsigned int"),
        ("_Bool", "_Bool"),
    ] {
        for name in [clang, gcc] {
            let mut kernel = Writer::kernel();
            let number = kernel.int(name, 8);
            let pointer = kernel.refer(POINTER, "", number);
            kernel.function("count", number, &[pointer]);
            let expected = format!("{gcc}({gcc} *)");
            assert_eq!(
                run(&kernel, None, &[Expected::Function("count", &expected)]),
                Ok(())
            );
        }
    }
    // A type of somebody's own keeps its name.
    let mut kernel = Writer::kernel();
    let number = kernel.int("int", 8);
    let named = kernel.refer(TYPEDEF, "long", number);
    kernel.function("count", named, &[]);
    assert_eq!(
        run(&kernel, None, &[Expected::Function("count", "long(void)")]),
        Ok(())
    );
}

#[test]
fn a_function_with_one_more_parameter_is_named() {
    let mut kernel = Writer::kernel();
    let int = kernel.int("int", 4);
    kernel.function("load", int, &[int, int]);
    let mismatch = run(&kernel, None, &[Expected::Function("load", "int(int)")]).unwrap_err();
    assert_eq!(
        mismatch.to_string(),
        "function load is 'int(int, int)' in the running kernel, expected 'int(int)'"
    );
}

#[test]
fn a_prototype_that_does_not_fit_the_buffer_never_passes() {
    let mut kernel = Writer::kernel();
    let long = kernel.int(&"n".repeat(200), 4);
    kernel.function("many", long, &[long, long]);
    let cut = "n".repeat(160);
    let whole = format!("{0}({0}, {0})", "n".repeat(200));
    for expected in [&cut, &whole] {
        let mismatch = run(&kernel, None, &[Expected::Function("many", expected)]).unwrap_err();
        assert!(
            matches!(mismatch, Mismatch::Prototype { found, .. } if found.as_str().ends_with('~'))
        );
    }
}

#[test]
fn a_modules_types_are_read_on_top_of_the_kernels() {
    let kernel = vm(64, 8, 32);
    let mut module = Writer::module(&kernel);
    let pointer = module.refer(POINTER, "", 7);
    module.function("unload", 0, &[pointer]);
    let expected = [
        Expected::Function("unload", "void(struct vm *)"),
        Expected::Layout(&VM),
    ];
    assert_eq!(run(&kernel, Some(&module), &expected), Ok(()));
}

#[test]
fn the_modules_own_struct_decides_over_the_kernels() {
    let (good, bad) = (vm(64, 8, 32), vm(96, 8, 32));
    let add = |kernel: &Writer, lock| {
        let mut module = Writer::module(kernel);
        module.composite(
            STRUCT,
            "vm",
            32,
            &[("id", 3, 0), ("lock", 1, lock), ("arch", 6, 128)],
        );
        module
    };
    assert_eq!(
        run(&bad, Some(&add(&bad, 64)), &[Expected::Layout(&VM)]),
        Ok(())
    );
    let mismatch = run(&good, Some(&add(&good, 96)), &[Expected::Layout(&VM)]);
    assert!(matches!(
        mismatch,
        Err(Mismatch::Offset { found_bits: 96, .. })
    ));
}

#[test]
fn of_static_functions_of_one_name_one_must_match() {
    let mut kernel = Writer::kernel();
    let int = kernel.int("int", 4);
    kernel.function("show", 0, &[int]);
    kernel.function("show", int, &[int]);
    kernel.function("show", 0, &[]);
    assert_eq!(
        run(&kernel, None, &[Expected::Function("show", "int(int)")]),
        Ok(())
    );
    let mismatch = run(&kernel, None, &[Expected::Function("show", "int(void)")]);
    assert!(matches!(
        mismatch,
        Err(Mismatch::Prototype { name: "show", .. })
    ));
}

#[test]
fn of_structs_of_one_name_all_must_match() {
    let mut kernel = vm(64, 8, 32);
    kernel.composite(STRUCT, "vm", 8, &[]);
    assert!(run(&kernel, None, &[Expected::Layout(&VM)]).is_err());
}

#[test]
fn arrays_and_bitfields_have_their_place() {
    static FIELDS: [Field; 2] = [
        Field {
            path: "pages.",
            offset: 4,
            size: 24,
        },
        Field {
            path: "role.",
            offset: 28,
            size: 9,
        },
    ];
    static TABLE: Layout = Layout {
        name: "table",
        size: 32,
        fields: &FIELDS,
        bits: &[],
    };
    let mut kernel = Writer::kernel();
    let int = kernel.int("int", 4);
    let row = kernel.record("", ARRAY << 24, 0, &[int, int, 2]);
    let rows = kernel.record("", ARRAY << 24, 0, &[row, int, 3]);
    let members: Vec<u32> = [
        ("n", int, 0),
        ("pages", rows, 32),
        ("role", int, (7 << 24) | (28 * 8)),
    ]
    .iter()
    .flat_map(|&(name, id, bits)| [kernel.name(name), id, bits])
    .collect();
    kernel.record("table", FLAG | (STRUCT << 24) | 3, 32, &members);
    // A bitfield has no size in bytes: only its offset counts.
    assert_eq!(run(&kernel, None, &[Expected::Layout(&TABLE)]), Ok(()));
}

/// A kernel with `union role { u32 word; struct { u32 level : 4; u32 access : 3; }; }`, but for the place of `access`.
fn role(access: u32) -> Writer {
    let mut kernel = Writer::kernel();
    let int = kernel.int("u32", 4);
    let members: Vec<u32> = [("level", int, 4 << 24), ("access", int, access)]
        .iter()
        .flat_map(|&(name, id, bits)| [kernel.name(name), id, bits])
        .collect();
    let bits = kernel.record("", FLAG | (STRUCT << 24) | 2, 4, &members);
    kernel.composite(UNION, "role", 4, &[("word", int, 0), ("", bits, 0)]);
    kernel
}

#[test]
fn a_bitfield_that_moved_or_grew_is_named() {
    static ROLE: Layout = Layout {
        name: "role",
        size: 4,
        fields: &[],
        bits: &[
            Bits {
                name: "level",
                mask: || 0xf,
            },
            Bits {
                name: "access",
                mask: || 7 << 4,
            },
        ],
    };
    let expected = [Expected::Layout(&ROLE)];
    assert_eq!(run(&role(3 << 24 | 4), None, &expected), Ok(()));
    let mismatch = Err(Mismatch::Bits {
        name: "role",
        field: "access",
        first: 4,
        width: 3,
    });
    assert_eq!(run(&role(3 << 24 | 5), None, &expected), mismatch);
    assert_eq!(run(&role(4 << 24 | 4), None, &expected), mismatch);
    // No bitfield any more.
    assert_eq!(run(&role(4), None, &expected), mismatch);
}

#[test]
fn types_far_from_a_mark_are_found() {
    let mut kernel = Writer::kernel();
    let int = kernel.int("int", 4);
    let functions: Vec<String> = (0..100).map(|number| format!("f{number}")).collect();
    for name in &functions {
        kernel.function(name, int, &[]);
    }
    let expected: Vec<_> = functions
        .iter()
        .map(|name| Expected::Function(name, "int(void)"))
        .collect();
    assert_eq!(run(&kernel, None, &expected), Ok(()));
}

#[test]
fn a_blob_cut_short_is_refused_wherever_it_is_cut() {
    let blob = vm(64, 8, 32).blob();
    for len in 0..blob.len() {
        let found = run_blobs(&blob[..len], None, &[Expected::Layout(&VM)]);
        assert_eq!(
            found,
            Err(Mismatch::Malformed),
            "{len} of {} bytes",
            blob.len()
        );
    }
    assert_eq!(Btf::marks_needed(b"\x7fELF"), Err(Malformed));
}

#[test]
fn any_changed_byte_neither_panics_nor_hangs() {
    let mut kernel = vm(64, 8, 32);
    kernel.function("load", 1, &[1, 7]);
    let blob = kernel.blob();
    for at in 0..blob.len() {
        for value in [0, 1, 7, 0x7f, 0xff] {
            let mut changed = blob.clone();
            changed[at] = value;
            let _ = run_blobs(
                &changed,
                None,
                &[
                    Expected::Layout(&VM),
                    Expected::Function("load", "int(int, vm)"),
                ],
            );
        }
    }
}

#[test]
fn types_that_refer_to_themselves_are_refused() {
    let mut kernel = Writer::kernel();
    let own = kernel.refer(TYPEDEF, "own", 1);
    let pointer = kernel.refer(POINTER, "", 2);
    kernel.function("f", pointer, &[]);
    kernel.composite(STRUCT, "vm", 32, &[("lock", own, 64)]);
    assert_eq!(
        run(&kernel, None, &[Expected::Layout(&VM)]),
        Err(Mismatch::Malformed)
    );
    assert_eq!(
        run(&kernel, None, &[Expected::Function("f", "x")]),
        Err(Mismatch::Malformed)
    );
}
