// SPDX-License-Identifier: GPL-2.0

//! The formats KVM uses, on machines with 36 to 52 bits of physical address.

use rmmu_engine::mmu::{types::ACC_ALL, Gfn, Level, Role, SpteFormat};

const ADDR: u64 = ((1 << 52) - 1) & !0xfff;
/// Bits of a physical address, unless a test asks for something else.
const BITS: u32 = 46;

const fn bits(from: u32, to: u32) -> u64 {
    (u64::MAX >> (63 - to)) & (u64::MAX << from)
}

/// The bits of a physical address on a machine whose entries look so.
pub fn physical_bits(format: &SpteFormat) -> u32 {
    (format.rsvd[0][0] | 1 << 52).trailing_zeros()
}

/// Nested page tables of AMD.
pub fn npt() -> SpteFormat {
    npt_of(BITS)
}

/// The same, on a machine with so many bits of physical address.
pub fn npt_of(physical: u32) -> SpteFormat {
    let high = (1 << 52) - (1 << physical);
    // A bit that is reserved makes an access to MMIO known; with 52 there is none.
    let mmio = if physical < 52 { 1 << 51 | 1 } else { 0 };
    SpteFormat {
        present: 1,
        accessed: 1 << 5,
        dirty: 1 << 6,
        nx: 1 << 63,
        user: 1 << 2,
        xs: 0,
        xu: 0,
        acc_track: 0,
        host_writable: 1 << 9,
        mmu_writable: 1 << 10,
        me_value: 0,
        me_mask: 0,
        mmio_value: mmio,
        mmio_mask: mmio,
        mmio_access_mask: 0b110,
        nonpresent_or_rsvd: 0,
        nonpresent_or_rsvd_lower_gfn: bits(12, physical - 1),
        base_addr_mask: ADDR,
        rsvd: [
            [high, high, high, high | bits(7, 8), high | bits(7, 8)],
            [
                high,
                high | bits(13, 20),
                high | bits(13, 29),
                high | bits(7, 8),
                high | bits(7, 8),
            ],
        ],
        bad_mt_xwr: 0,
        ad_enabled: true,
        mmio_caching: mmio != 0,
        max_gfn: Gfn((1 << (physical - 12)) - 1),
    }
}

/// Extended page tables of Intel, with or without accessed and dirty bits.
pub fn ept(ad_enabled: bool) -> SpteFormat {
    ept_of(BITS, ad_enabled)
}

/// The same, on a machine with so many bits of physical address.
pub fn ept_of(physical: u32, ad_enabled: bool) -> SpteFormat {
    let high = (1 << 52) - (1 << physical);
    // Five bits, which address no memory that is cached, keep entries that are not
    // present from it.
    let mitigated = physical < 47;
    let lower = if mitigated { physical - 5 } else { physical };
    SpteFormat {
        present: 1 << 63,
        accessed: 1 << 8,
        dirty: 1 << 9,
        nx: 0,
        user: 0,
        xs: 1 << 2,
        xu: 1 << 10,
        acc_track: 0b111 | 1 << 10,
        host_writable: 1 << 53,
        mmu_writable: 1 << 55,
        me_value: 0,
        me_mask: 0,
        mmio_value: 0b110,
        mmio_mask: 0b111 | 1 << 63,
        mmio_access_mask: 0,
        nonpresent_or_rsvd: if mitigated {
            bits(lower, physical - 1)
        } else {
            0
        },
        nonpresent_or_rsvd_lower_gfn: bits(12, lower - 1),
        base_addr_mask: ADDR,
        rsvd: [
            [
                high,
                high | bits(3, 6),
                high | bits(3, 6),
                high | bits(3, 7),
                high | bits(3, 7),
            ],
            [
                high,
                high | bits(12, 20),
                high | bits(12, 29),
                high | bits(3, 7),
                high | bits(3, 7),
            ],
        ],
        // Memory types 2, 3 and 7 do not exist, nor write without read, nor
        // execute without read.
        bad_mt_xwr: 0xff << 16
            | 0xff << 24
            | 0xff << 56
            | 0x0404_0404_0404_0404
            | 0x4040_4040_4040_4040
            | 0x1010_1010_1010_1010,
        ad_enabled,
        mmio_caching: true,
        max_gfn: Gfn((1 << (physical - 12)) - 1),
    }
}

/// The role of a four-level root for this format.
pub fn root_role(format: &SpteFormat, smm: bool) -> Role {
    Role {
        word: 0x784 | u32::from(smm) << 24,
        level: Level::L512G,
        smm,
        guest_mode: false,
        ad_disabled: !format.ad_enabled,
        access: ACC_ALL,
    }
}

/// The memory type of RAM in entries of this format.
pub fn write_back(format: &SpteFormat) -> u64 {
    if format.xs != 0 {
        6 << 3 | 1 << 6
    } else {
        0
    }
}
