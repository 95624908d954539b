//! Helpers for the state directory: private directories and the socket.

use std::{
    fs,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::Path,
};

/// Makes a directory that only this user can enter, or keeps one that is there.
///
/// # Errors
/// The system's.
pub(crate) fn private_dir(path: &Path) -> std::io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

/// Listens on a Unix socket for this user only, in place of one that was left over. Only for
/// paths in a locked state directory: its lock says that the old socket has no owner.
///
/// # Errors
/// The system's.
pub(crate) fn listen(path: &Path) -> std::io::Result<std::os::unix::net::UnixListener> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        Ok(()) | Err(_) => {}
    }
    // The directory is private, so nobody can connect between these two lines.
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_left_over_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(listen(&path).unwrap());
        let _second = listen(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }
}
