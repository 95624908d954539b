//! Parts of services on a real kernel.

mod addresses;
mod runner;

use said::need;
