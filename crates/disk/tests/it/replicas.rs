//! Creating and removing replicas: what is somebody's is never overwritten.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path, process::Command};

use relevo_disk::{
    Backing, CreateError, NewReplica, OpenOptions, RemoveError, create_replica, remove_replica,
};
use relevo_format::{Identity, Layout, Replica, identify};
use relevo_types::{ClusterId, LineageId, NodeId, ReplicaSlot, VolumeId};

use crate::support::dir;

const SIZE: u64 = 8 << 20;

fn replica(volume: u32) -> Replica {
    Replica {
        identity: Identity {
            cluster: ClusterId([7; 16]),
            volume: VolumeId(volume),
            node: NodeId(1),
        },
        slot: ReplicaSlot(0),
        lineage: LineageId(9),
    }
}

fn create(path: &Path, volume: u32, force: bool) -> Result<(), CreateError> {
    create_replica(&NewReplica {
        path,
        replica: replica(volume),
        start: relevo_format::Start::Zeroes,
        data_size: SIZE,
        force,
    })
}

/// Whose the replica is, and whether its data area is all zeroes.
fn look(path: &Path) -> (u32, bool) {
    let bytes = fs::read(path).unwrap();
    let range = Layout::superblocks(bytes.len() as u64).unwrap();
    match identify(&bytes[range.offset as usize..range.end() as usize]) {
        relevo_format::Backing::Ours(superblock) => (
            superblock.replica.identity.volume.0,
            bytes[..SIZE as usize].iter().all(|byte| *byte == 0),
        ),
        other => panic!("{other:?}"),
    }
}

fn names(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap();
    names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn a_new_file_is_sparse_ours_and_can_be_removed() {
    let dir = dir();
    let path = dir.path().join("mail");
    create(&path, 1, false).unwrap();
    assert_eq!(look(&path), (1, true));
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.len(), Layout::new(SIZE).unwrap().backing_size());
    assert!(metadata.blocks() * 512 < 1 << 20, "{}", metadata.blocks());
    assert_eq!(metadata.mode() & 0o777, 0o600);
    assert_eq!(names(dir.path()), ["mail"]);
    // Again, as after a crash before the node reported it.
    create(&path, 1, false).unwrap();

    let other = remove_replica(&path, &replica(2).identity).unwrap_err();
    assert!(matches!(other, RemoveError::NotOurs { .. }), "{other}");
    let open = Backing::open(&path, &OpenOptions::default()).unwrap();
    assert!(matches!(
        remove_replica(&path, &replica(1).identity),
        Err(RemoveError::Open(_))
    ));
    assert!(matches!(create(&path, 1, true), Err(CreateError::Open(_))));
    drop(open);
    remove_replica(&path, &replica(1).identity).unwrap();
    assert!(!path.exists());
    remove_replica(&path, &replica(1).identity).unwrap();
}

#[test]
fn what_is_there_is_refused_by_name_unless_forced() {
    let dir = dir();
    let path = dir.path().join("mail");
    let len = Layout::new(SIZE).unwrap().backing_size() as usize;
    let mut foreign = vec![0; len];
    foreign[1080..1082].copy_from_slice(&[0x53, 0xef]);
    for (content, found) in [
        (foreign, "ext2/3/4"),
        (vec![3; len], "unknown kind"),
        (
            {
                let mut tail = vec![0; len];
                tail[len - 20000] = 1;
                tail
            },
            "near its end",
        ),
    ] {
        fs::write(&path, &content).unwrap();
        let error = create(&path, 1, false).unwrap_err().to_string();
        assert!(
            error.contains(found) && error.contains("--force"),
            "{error}"
        );
        assert!(fs::read(&path).unwrap() == content, "untouched");
        create(&path, 1, true).unwrap();
        assert_eq!(look(&path), (1, true), "and zeroed");
    }
    let error = create(&path, 2, false).unwrap_err().to_string();
    assert!(error.contains("replica of volume v1"), "{error}");
    assert_eq!(look(&path).0, 1);
    create(&path, 2, true).unwrap();
    assert_eq!(look(&path), (2, true));
    // Both superblocks damaged.
    let mut bytes = fs::read(&path).unwrap();
    let at = len - 8192 + 50;
    bytes[at] ^= 1;
    bytes[at + 4096] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = create(&path, 2, false).unwrap_err().to_string();
    assert!(error.contains("damaged"), "{error}");
}

#[test]
fn sizes_that_cannot_be_are_refused_with_numbers() {
    let dir = dir();
    let path = dir.path().join("mail");
    let size = |data_size| {
        let new = NewReplica {
            path: &path,
            replica: replica(1),
            start: relevo_format::Start::Zeroes,
            data_size,
            force: false,
        };
        create_replica(&new).unwrap_err().to_string()
    };
    assert!(size(0).contains("more than 0"), "{}", size(0));
    let huge = size(1 << 49);
    assert!(huge.contains("512 TiB") && huge.contains("free"), "{huge}");
    assert_eq!(names(dir.path()), Vec::<String>::new());
    fs::write(&path, vec![0; 4 << 20]).unwrap();
    let small = create(&path, 1, false).unwrap_err().to_string();
    assert!(small.contains("larger backing"), "{small}");
}

/// A loop device, detached when dropped.
struct Loop(String);

impl Loop {
    fn attach(file: &Path) -> Result<Self, String> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
            .map_err(|error| error.to_string())?;
        if output.status.success() {
            Ok(Self(
                String::from_utf8_lossy(&output.stdout).trim().to_owned(),
            ))
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("-d").arg(&self.0).status();
        assert!(detached.is_ok_and(|status| status.success()));
    }
}

#[test]
fn a_device_is_zeroed_used_exclusively_and_wiped() {
    let dir = dir();
    let file = dir.path().join("disk");
    let mut content = vec![0; (SIZE + (4 << 20)) as usize];
    content[(5 << 20)..(6 << 20)].fill(5); // Beyond what is looked at.
    fs::write(&file, content).unwrap();
    let device = match Loop::attach(&file) {
        Ok(device) => device,
        Err(why) => return said::skip("a_device_is_zeroed_used_exclusively_and_wiped", &why),
    };
    let path = Path::new(&device.0);
    create(path, 1, false).unwrap();
    assert_eq!(look(path), (1, true));
    let backing = Backing::open(path, &OpenOptions::default()).unwrap();
    assert!(backing.is_device());
    assert_eq!(backing.size(), SIZE + (4 << 20));
    assert!(Backing::open(path, &OpenOptions::default()).is_err());
    drop(backing);
    remove_replica(path, &replica(1).identity).unwrap();
    remove_replica(path, &replica(1).identity).unwrap();
    create(path, 2, false).unwrap();
    assert_eq!(look(path), (2, true));
}
