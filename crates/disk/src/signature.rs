//! Recognising what is on a disk, so that a refusal can say what would have been overwritten.

/// How much of each end of a backing is looked at: covers every signature below, partition tables
/// and their copies at the end.
pub const LOOK_LEN: u64 = 1 << 20;

/// A known start of a disk.
struct Signature {
    offset: usize,
    magic: &'static [u8],
    name: &'static str,
}

const fn at(offset: usize, magic: &'static [u8], name: &'static str) -> Signature {
    Signature {
        offset,
        magic,
        name,
    }
}

/// Offsets and magics from the formats' own definitions (the same that `blkid` uses). Most
/// specific first: a boot sector signature says least.
const SIGNATURES: &[Signature] = &[
    at(1080, &[0x53, 0xef], "an ext2/3/4 filesystem"),
    at(0, b"XFSB", "an XFS filesystem"),
    at(0x10040, b"_BHRfS_M", "a Btrfs filesystem"),
    at(1024, &[0x10, 0x20, 0xf5, 0xf2], "an F2FS filesystem"),
    at(0, b"hsqs", "a SquashFS filesystem"),
    at(32769, b"CD001", "an ISO 9660 filesystem"),
    at(3, b"NTFS    ", "an NTFS filesystem"),
    at(82, b"FAT32", "a FAT filesystem"),
    at(54, b"FAT1", "a FAT filesystem"),
    at(512, b"LABELONE", "an LVM physical volume"),
    at(0, b"LUKS\xba\xbe", "a LUKS encrypted volume"),
    at(4096, &[0xfc, 0x4e, 0x2b, 0xa9], "a member of a Linux RAID"),
    at(4086, b"SWAPSPACE2", "a swap area"),
    at(0, b"QFI\xfb", "a QCOW2 disk image"),
    at(512, b"EFI PART", "a GPT partition table"),
    at(510, &[0x55, 0xaa], "a partition table or boot sector"),
];

/// What the two ends of a backing hold, in words; `None` when both are all zeroes.
#[must_use]
pub fn recognise(head: &[u8], tail: &[u8]) -> Option<String> {
    let known = SIGNATURES.iter().find(|signature| {
        head.get(signature.offset..)
            .is_some_and(|rest| rest.starts_with(signature.magic))
    });
    if let Some(known) = known {
        return Some(known.name.to_owned());
    }
    let nonzero = |bytes: &[u8]| bytes.iter().position(|byte| *byte != 0);
    if let Some(at) = nonzero(head) {
        return Some(format!("data of an unknown kind (from byte {at})"));
    }
    nonzero(tail).map(|_| "data of an unknown kind near its end".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signature_is_recognised_and_zeroes_are_nothing() {
        let blank = vec![0; 1 << 17];
        assert_eq!(recognise(&blank, &blank), None);
        for signature in SIGNATURES {
            let mut head = blank.clone();
            head[signature.offset..][..signature.magic.len()].copy_from_slice(signature.magic);
            assert_eq!(recognise(&head, &blank).as_deref(), Some(signature.name));
        }
        let mut other = blank.clone();
        other[77] = 1;
        assert!(recognise(&other, &blank).unwrap().contains("byte 77"));
        assert!(recognise(&blank, &other).unwrap().contains("end"));
        assert!(recognise(b"abc", &[]).is_some());
    }
}
