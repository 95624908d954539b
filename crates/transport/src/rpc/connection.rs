//! Reading and writing frames on one connection; used by client and server.

use std::io;

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::mpsc,
};

use super::Frame;

/// Frames that wait to be written on one connection; a writer that finds the queue full waits. As
/// many as can be under way on it.
pub(super) const QUEUE_FRAMES: usize = 256;

/// Frames written with one call at most, in bytes: enough to batch acknowledgements.
const BATCH_BYTES: usize = 64 << 10;

/// Reads one frame; `None` at a clean end. Not cancel-safe: run it in a loop of its own.
pub(super) async fn read_frame(
    reader: &mut (impl AsyncRead + Unpin),
    max_bytes: usize,
) -> io::Result<Option<Frame>> {
    let mut prefix = [0; 4];
    match reader.read_exact(&mut prefix).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    };
    let len = u32::from_le_bytes(prefix) as usize;
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    if len == 0 || len > max_bytes {
        return Err(invalid(format!(
            "a frame of {len} bytes is not allowed (1 to {max_bytes})"
        )));
    }
    let mut body = vec![0; len];
    reader.read_exact(&mut body).await?;
    postcard::from_bytes(&body)
        .map(Some)
        .map_err(|error| invalid(format!("a frame can't be read: {error}")))
}

/// Writes what comes through the queue until it is closed.
pub(super) async fn write_frames(
    writer: &mut (impl AsyncWrite + Unpin),
    mut queue: mpsc::Receiver<Vec<u8>>,
) -> io::Result<()> {
    while let Some(mut batch) = queue.recv().await {
        while batch.len() < BATCH_BYTES {
            let Ok(next) = queue.try_recv() else { break };
            batch.extend_from_slice(&next);
        }
        writer.write_all(&batch).await?;
        writer.flush().await?;
    }
    writer.shutdown().await
}
