//! A volume in memory that answers from a thread of its own, out of order, and can stop answering.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
};

use bytes::Bytes;
use relevo_export::{AlignedBuf, BlockRequest, BlockTarget, Completion, Errno};

/// What was asked, counted.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) flushes: AtomicU64,
    pub(crate) zeroes: AtomicU64,
    pub(crate) largest_write: AtomicU64,
    pub(crate) unaligned: AtomicU64,
}

pub(crate) struct Memory {
    size: u64,
    content: Arc<Mutex<Vec<u8>>>,
    pub(crate) counters: Arc<Counters>,
    /// Requests are kept and not answered while this is set.
    stalled: AtomicBool,
    kept: Mutex<Vec<(BlockRequest, Completion)>>,
    worker: mpsc::Sender<(BlockRequest, Completion)>,
}

impl Memory {
    pub(crate) fn new(size: usize) -> Arc<Self> {
        let content = Arc::new(Mutex::new(vec![0; size]));
        let counters = Arc::new(Counters::default());
        let (worker, requests) = mpsc::channel::<(BlockRequest, Completion)>();
        let state = (Arc::clone(&content), Arc::clone(&counters));
        thread::spawn(move || {
            while let Ok(first) = requests.recv() {
                let mut batch = vec![first];
                batch.extend(requests.try_iter());
                // Newest first: exports must not count on any order.
                for (request, done) in batch.into_iter().rev() {
                    let result = serve(&mut state.0.lock().unwrap(), &state.1, request);
                    done(result);
                }
            }
        });
        Arc::new(Self {
            size: size as u64,
            content,
            counters,
            stalled: AtomicBool::new(false),
            kept: Mutex::default(),
            worker,
        })
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        self.content.lock().unwrap().clone()
    }

    pub(crate) fn stall(&self) {
        self.stalled.store(true, Ordering::SeqCst);
    }

    pub(crate) fn kept(&self) -> usize {
        self.kept.lock().unwrap().len()
    }

    pub(crate) fn kept_is(&self, test: impl Fn(&BlockRequest) -> bool) -> bool {
        self.kept
            .lock()
            .unwrap()
            .iter()
            .all(|(request, _)| test(request))
    }
}

impl BlockTarget for Memory {
    fn submit(&self, request: BlockRequest, done: Completion) {
        if self.stalled.load(Ordering::SeqCst) {
            self.kept.lock().unwrap().push((request, done));
        } else {
            self.worker.send((request, done)).unwrap();
        }
    }

    fn size(&self) -> u64 {
        self.size
    }
}

fn serve(content: &mut [u8], counters: &Counters, request: BlockRequest) -> Result<Bytes, Errno> {
    let range = request.range();
    let (start, end) = (range.offset as usize, range.end() as usize);
    let area = content.get_mut(start..end).ok_or(Errno::Invalid)?;
    match request {
        BlockRequest::Read { .. } => return Ok(AlignedBuf::copy_from(area).freeze()),
        BlockRequest::Write { data, .. } => {
            counters
                .largest_write
                .fetch_max(data.len() as u64, Ordering::Relaxed);
            if data.as_ptr().addr() % 4096 != 0 {
                counters.unaligned.fetch_add(1, Ordering::Relaxed);
            }
            area.copy_from_slice(&data);
        }
        BlockRequest::Flush => {
            counters.flushes.fetch_add(1, Ordering::Relaxed);
        }
        BlockRequest::Zero { .. } | BlockRequest::Discard { .. } => {
            counters.zeroes.fetch_add(1, Ordering::Relaxed);
            area.fill(0);
        }
        BlockRequest::Status { .. } => {}
    }
    Ok(Bytes::new())
}
