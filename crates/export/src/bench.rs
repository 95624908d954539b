//! Measures an NBD server from outside: 4 KiB random writes and 1 MiB sequential ones.
//!
//! `relevo bench` opens one [`Bench`] per server and runs them in turns, a slice of time each: on a
//! machine that does other things too only the ratio of interleaved measurements means anything.

use std::{collections::HashMap, time::Duration};

use rustix::time::{ClockId, clock_gettime};

use crate::nbd::{ClientError, NbdAddr, Op, Pipeline};

/// What is measured. Everything writes: the content of the volume is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pattern {
    /// 4 KiB at random places, so many under way at once.
    RandomWrite4K {
        /// Queue depth, 1 or more.
        depth: usize,
    },
    /// 1 MiB after 1 MiB, [`SEQUENTIAL_DEPTH`] under way at once.
    SequentialWrite1M,
}

/// Sequential writes under way at once: one on its way while one is worked on, and some slack.
pub const SEQUENTIAL_DEPTH: usize = 4;

impl Pattern {
    const fn len(self) -> usize {
        match self {
            Self::RandomWrite4K { .. } => 4 << 10,
            Self::SequentialWrite1M => 1 << 20,
        }
    }

    fn depth(self) -> usize {
        match self {
            Self::RandomWrite4K { depth } => depth.max(1),
            Self::SequentialWrite1M => SEQUENTIAL_DEPTH,
        }
    }

    /// `4 KiB random write, queue depth 32`.
    #[must_use]
    pub fn title(self) -> String {
        match self {
            Self::RandomWrite4K { depth } => format!("4 KiB random write, queue depth {depth}"),
            Self::SequentialWrite1M => "1 MiB sequential write".to_owned(),
        }
    }
}

/// What came out.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Measured {
    /// Requests answered.
    pub requests: u64,
    /// Requests a second.
    pub iops: f64,
    /// MiB a second.
    pub mib_s: f64,
    /// Median time of a request in microseconds.
    pub p50_us: f64,
    /// The time in microseconds that 99 of 100 requests stay under.
    pub p99_us: f64,
}

/// Why a measurement ended.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The connection or a request failed.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The volume is smaller than one request.
    #[error("the export has {size} bytes, one request takes {needed}")]
    TooSmall {
        /// The export's size.
        size: u64,
        /// What is needed.
        needed: usize,
    },
}

/// A measurement of one server, in one or more slices.
#[derive(Debug)]
pub struct Bench {
    pipeline: Pipeline,
    pattern: Pattern,
    slots: u64,
    next_slot: u64,
    random: u64,
    payload: Vec<u8>,
    latencies: Histogram,
    elapsed: Duration,
}

impl Bench {
    /// Connects. `timeout` bounds every wait for the server.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn open(
        address: &NbdAddr,
        export: &str,
        pattern: Pattern,
        timeout: Duration,
    ) -> Result<Self, BenchError> {
        let pipeline = Pipeline::connect(address, export, Some(timeout))?;
        let size = pipeline.size();
        let needed = pattern.len();
        let slots = size / needed as u64;
        if slots == 0 {
            return Err(BenchError::TooSmall { size, needed });
        }
        let mut bench = Self {
            pipeline,
            pattern,
            slots,
            next_slot: 0,
            random: 0x9e37_79b9_7f4a_7c15,
            payload: vec![0; needed],
            latencies: Histogram::default(),
            elapsed: Duration::ZERO,
        };
        // Incompressible, so that nobody below gets away with less.
        for at in (0..needed).step_by(8) {
            let bytes = bench.next_random().to_le_bytes();
            bench.payload[at..at + 8].copy_from_slice(&bytes);
        }
        Ok(bench)
    }

    /// Runs for a while and waits for what is under way; repeat at will.
    ///
    /// # Errors
    /// See [`BenchError`]; the measurement is over then.
    pub fn run(&mut self, slice: Duration) -> Result<(), BenchError> {
        let start = now();
        let end = start + slice;
        let mut started = HashMap::with_capacity(self.pattern.depth());
        loop {
            let time = now();
            let goes_on = time < end;
            while goes_on && started.len() < self.pattern.depth() {
                let offset = self.next_offset();
                // A stamp per request shows at the far end whether bytes were mixed up.
                self.payload[..8].copy_from_slice(&offset.to_le_bytes());
                let op = Op::Write {
                    offset,
                    data: &self.payload,
                    fua: false,
                };
                let begun = now();
                started.insert(self.pipeline.submit(op)?, begun);
            }
            if started.is_empty() {
                break;
            }
            let done = self.pipeline.complete()?;
            done.result.map_err(ClientError::from)?;
            if let Some(begun) = started.remove(&done.cookie) {
                self.latencies.add(now().saturating_sub(begun));
            }
        }
        self.elapsed += now() - start;
        Ok(())
    }

    /// Forgets what came out so far: a warm-up does not count.
    pub fn forget(&mut self) {
        self.latencies = Histogram::default();
        self.elapsed = Duration::ZERO;
    }

    /// What came out so far.
    #[must_use]
    pub fn measured(&self) -> Measured {
        let seconds = self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
        let requests = self.latencies.count;
        let iops = requests as f64 / seconds;
        Measured {
            requests,
            iops,
            mib_s: iops * self.pattern.len() as f64 / f64::from(1 << 20),
            p50_us: self.latencies.quantile(0.5),
            p99_us: self.latencies.quantile(0.99),
        }
    }

    /// Closes the connection and tells what came out.
    ///
    /// # Errors
    /// The connection's.
    pub fn finish(self) -> Result<Measured, BenchError> {
        let measured = self.measured();
        self.pipeline.disconnect()?;
        Ok(measured)
    }

    fn next_offset(&mut self) -> u64 {
        let slot = match self.pattern {
            Pattern::RandomWrite4K { .. } => self.next_random() % self.slots,
            Pattern::SequentialWrite1M => self.next_slot % self.slots,
        };
        self.next_slot += 1;
        slot * self.pattern.len() as u64
    }

    /// Marsaglia's xorshift with a multiplication: good enough to spread requests.
    const fn next_random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// One measurement in one go.
///
/// # Errors
/// See [`BenchError`].
pub fn nbd_bench(
    address: &NbdAddr,
    export: &str,
    pattern: Pattern,
    length: Duration,
) -> Result<Measured, BenchError> {
    /// Longer than any takeover: a write may wait for one.
    const TIMEOUT: Duration = Duration::from_secs(30);

    let mut bench = Bench::open(address, export, pattern, TIMEOUT)?;
    bench.run(length)?;
    bench.finish()
}

fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::try_from(time).unwrap_or_default()
}

/// Sub-buckets per power of two: an error of at most 1.6 %.
const SUB_BITS: u32 = 6;

/// Times in nanoseconds in buckets that grow with them; bounded, however long it runs.
#[derive(Clone, Debug, Default)]
struct Histogram {
    buckets: Vec<u64>,
    count: u64,
}

impl Histogram {
    fn add(&mut self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let bucket = Self::bucket(nanos);
        if self.buckets.len() <= bucket {
            self.buckets.resize(bucket + 1, 0);
        }
        self.buckets[bucket] += 1;
        self.count += 1;
    }

    /// The power of two above [`SUB_BITS`], then the bits that follow the highest.
    const fn bucket(nanos: u64) -> usize {
        let exponent = (nanos | ((1 << SUB_BITS) - 1)).ilog2() + 1 - SUB_BITS;
        let shifted = nanos >> exponent;
        ((exponent as usize) << SUB_BITS) + shifted as usize
    }

    /// The middle of a bucket in nanoseconds.
    fn value(bucket: usize) -> f64 {
        let exponent = (bucket >> SUB_BITS) as i32;
        let shifted = (bucket & ((1 << SUB_BITS) - 1)) as f64;
        (shifted + 0.5) * f64::powi(2.0, exponent)
    }

    /// In microseconds; 0 without any.
    fn quantile(&self, share: f64) -> f64 {
        let wanted = share * self.count as f64;
        let mut seen = 0;
        for (bucket, &count) in self.buckets.iter().enumerate() {
            seen += count;
            if count > 0 && seen as f64 >= wanted {
                return Self::value(bucket) / 1000.0;
            }
        }
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_near() {
        let mut histogram = Histogram::default();
        for micros in 1..=1000 {
            histogram.add(Duration::from_micros(micros));
        }
        for (share, expected) in [(0.5, 500.0), (0.99, 990.0), (1.0, 1000.0)] {
            let found = histogram.quantile(share);
            assert!((found / expected - 1.0).abs() < 0.02, "{share}: {found}");
        }
        assert_eq!(Histogram::default().quantile(0.5), 0.0);
    }

    #[test]
    fn buckets_grow_with_their_values() {
        let mut last = 0;
        for nanos in (0..100_000).chain([1 << 40, u64::MAX]) {
            let bucket = Histogram::bucket(nanos);
            assert!(bucket >= last, "{nanos}");
            last = bucket;
            let error = Histogram::value(bucket) - nanos as f64;
            assert!(error.abs() <= 1.0 + nanos as f64 / 32.0, "{nanos}: {error}");
        }
    }
}
