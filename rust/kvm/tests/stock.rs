// SPDX-License-Identifier: GPL-2.0

//! The reader against a real kernel's BTF: the files that RMMU_BTF_VMLINUX and RMMU_BTF_KVM name.

use rmmu_btf::{check, Btf, Expected, Field, Layout, Mismatch, Wanted};

fn blob(variable: &str) -> Vec<u8> {
    let path = std::env::var_os(variable)
        .unwrap_or_else(|| panic!("{variable} is not set: run scripts/host-test"));
    std::fs::read(path).unwrap()
}

fn with_btf(test: impl Fn(&Btf<'_>, &Btf<'_>)) {
    let (vmlinux, kvm) = (blob("RMMU_BTF_VMLINUX"), blob("RMMU_BTF_KVM"));
    let mut marks = vec![0; Btf::marks_needed(&vmlinux).unwrap()];
    let vmlinux = Btf::new(&vmlinux, None, &mut marks).unwrap();
    let mut marks = vec![0; Btf::marks_needed(&kvm).unwrap()];
    let kvm = Btf::new(&kvm, Some(&vmlinux), &mut marks).unwrap();
    test(&vmlinux, &kvm);
}

/// The functions of a table, from its C source.
fn table<'a>(text: &'a str, word: &str) -> Vec<(&'a str, &'a str)> {
    text.lines()
        .filter_map(|line| line.strip_prefix(word)?.strip_prefix('('))
        .map(|line| {
            (
                line.split(',').next().unwrap(),
                line.split('"').nth(1).unwrap(),
            )
        })
        .collect()
}

#[test]
fn every_hooked_and_called_function_has_the_prototype_of_the_tables() {
    with_btf(|vmlinux, kvm| {
        // What rust/kvm/walk.h defines.
        let walk = match kvm.locate("kvm_pagewalk", "fmt.") {
            Ok(Some(_)) => "struct kvm_pagewalk",
            _ => "struct kvm_mmu",
        };
        let hooks = include_str!("../../hook/entry_points.h").replace("\" RMMU_WALK \"", walk);
        let mut functions = table(&hooks, "RMMU_HOOK");
        functions.extend(table(include_str!("../callees.h"), "RMMU_CALL"));
        functions.extend(table(include_str!("../calls.c"), "\tRMMU_CORE"));
        assert!(functions.len() > 50);
        let mut wanted: Vec<_> = functions
            .iter()
            .map(|f| Wanted::new(Expected::Function(f.0, f.1)))
            .collect();
        assert_eq!(check(&mut wanted, Some(kvm), vmlinux), Ok(()));
    });
}

#[test]
fn a_changed_prototype_is_named() {
    with_btf(|vmlinux, kvm| {
        let mut wanted = [Wanted::new(Expected::Function(
            "kvm_mmu_load",
            "void(struct kvm_vcpu *)",
        ))];
        let mismatch = check(&mut wanted, Some(kvm), vmlinux).unwrap_err();
        assert_eq!(
            mismatch.to_string(),
            "function kvm_mmu_load is 'int(struct kvm_vcpu *)' in the running kernel, expected 'void(struct kvm_vcpu *)'"
        );
    });
}

#[test]
fn fields_are_found_through_nested_and_nameless_members() {
    with_btf(|vmlinux, kvm| {
        let (lock, size) = kvm
            .locate("kvm", "mmu_lock")
            .unwrap()
            .or(vmlinux.locate("kvm", "mmu_lock").unwrap())
            .unwrap();
        assert!(size > 0);
        let at = |path| {
            kvm.locate("kvm", path)
                .unwrap()
                .or(vmlinux.locate("kvm", path).unwrap())
        };
        let (arch, _) = at("arch").unwrap();
        let (roots, size) = at("arch.tdp_mmu_roots").unwrap();
        let (next, _) = at("arch.tdp_mmu_roots.next").unwrap();
        assert!(roots > arch && arch > lock && roots == next);
        assert_eq!(size, 16);
        assert_eq!(at("arch.no_such_field"), None);
        assert_eq!(vmlinux.locate("btf", "data").unwrap(), Some((0, 8)));
    });
}

#[test]
fn a_struct_of_another_size_is_named() {
    static FIELDS: [Field; 1] = [Field {
        path: "role.",
        offset: 0,
        size: 4,
    }];
    static LAYOUT: Layout = Layout {
        name: "kvm_mmu_page",
        size: 1,
        fields: &[],
        bits: &[],
    };
    static MOVED: Layout = Layout {
        name: "kvm_mmu_page",
        size: 1,
        fields: &FIELDS,
        bits: &[],
    };
    with_btf(|vmlinux, kvm| {
        let found = check(
            &mut [Wanted::new(Expected::Layout(&LAYOUT))],
            Some(kvm),
            vmlinux,
        );
        assert!(
            matches!(found, Err(Mismatch::Size { name: "kvm_mmu_page", expected: 1, found }) if found > 64)
        );
        let found = check(
            &mut [Wanted::new(Expected::Layout(&MOVED))],
            Some(kvm),
            vmlinux,
        );
        assert!(matches!(found, Err(Mismatch::Offset { field, .. }) if field.path == "role."));
    });
}
