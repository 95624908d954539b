//! Real processes on a real kernel, broken while fio writes and verifies: daemons killed and
//! stopped, cables and ports cut, disks failing. `chaos::Stage` has the cluster, the load and the
//! verdict: replicas in sync and equal byte by byte, fio content, nothing acknowledged lost.
//!
//! `RELEVO_CHAOS_SECONDS` repeats each test's round for that long.

mod disks;
mod kills;
mod mixed;
mod networks;
mod paths;
mod replicas;
mod split;
mod stops;
mod verify;

use std::time::Duration;

use chaos::Plan;

use crate::daemons::PROGRAM;

/// Longer than the dead time (1 s), the votes of the others and the commit after it.
const DEAD: Duration = Duration::from_millis(2500);

/// Two data nodes and a witness.
const fn pair(test: &'static str) -> Plan {
    Plan {
        test,
        program: PROGRAM,
        data_nodes: &["alfa", "beta"],
        faulty_disks: false,
    }
}

/// Three data nodes.
const fn trio(test: &'static str) -> Plan {
    Plan {
        data_nodes: &["alfa", "beta", "gamma"],
        ..pair(test)
    }
}

/// Two data nodes whose disks fail on demand, and a witness.
const fn pair_with_faulty_disks(test: &'static str) -> Plan {
    Plan {
        faulty_disks: true,
        ..pair(test)
    }
}

/// Three data nodes whose disks fail on demand.
const fn trio_with_faulty_disks(test: &'static str) -> Plan {
    Plan {
        faulty_disks: true,
        ..trio(test)
    }
}
