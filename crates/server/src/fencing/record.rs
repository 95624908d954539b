//! What came of attempts goes into the control log, when it can.

use std::{sync::Arc, time::Duration};

use relevo_control::{ControlLog as _, ProposeError, RaftControl};
use relevo_types::cluster::{Command, FenceCommand, FenceRecord};
use tokio::sync::mpsc;

/// Without a majority nothing is recorded; then this often it is tried again.
const PAUSE: Duration = Duration::from_secs(2);

/// Records one after the other, each until it is committed.
pub(super) async fn run(control: Arc<RaftControl>, mut records: mpsc::Receiver<FenceRecord>) {
    while let Some(record) = records.recv().await {
        let command = Command::from(FenceCommand::Record(record));
        loop {
            match control.propose(command.clone()).await {
                Ok(_) => break,
                Err(ProposeError::Rejected(rejection)) => {
                    tracing::error!(%rejection, "an attempt to fence a node was not recorded");
                    break;
                }
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }
}
