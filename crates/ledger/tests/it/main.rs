//! The ledger as its users see it: over HTTP, across restarts.

mod volume;

use std::{collections::BTreeSet, net::SocketAddr, path::Path, time::Duration};

use relevo_ledger::{
    ClientConfig, ClientError, Entry, Journal, Ledger, LedgerClient, LedgerConfig, LedgerError,
    Storage, Stored, longest_gap, missing, run_client,
};
use relevo_types::Time;

fn config(directory: &Path, listen: &str) -> LedgerConfig {
    LedgerConfig {
        listen: vec![listen.parse().unwrap()],
        storage: Storage::Directory(directory.to_owned()),
    }
}

async fn start(directory: &Path) -> (Ledger, String) {
    let ledger = Ledger::start(config(directory, "127.0.0.1:0"))
        .await
        .unwrap();
    let target = format!("http://{}", ledger.addresses()[0]);
    (ledger, target)
}

fn entry(number: u64, text: &str) -> Entry {
    Entry {
        number,
        text: text.to_owned(),
    }
}

#[tokio::test]
async fn entries_are_stored_once_and_survive_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let (ledger, target) = start(directory.path()).await;
    let mut client = LedgerClient::new(&target).unwrap();
    client.health().await.unwrap();
    assert_eq!(client.post(&entry(2, "b")).await.unwrap(), Stored::Stored);
    assert_eq!(client.post(&entry(1, "a")).await.unwrap(), Stored::Stored);
    assert_eq!(client.post(&entry(2, "b")).await.unwrap(), Stored::Known);
    let conflict = client.post(&entry(2, "other")).await.unwrap_err();
    assert!(
        matches!(conflict, ClientError::Refused { status: 409, .. }),
        "{conflict}"
    );
    let long = client.post(&entry(3, &"x".repeat(4000))).await.unwrap_err();
    assert!(
        matches!(long, ClientError::Refused { status: 400, .. }),
        "{long}"
    );
    ledger.stop().await;

    let (_ledger, target) = start(directory.path()).await;
    let mut client = LedgerClient::new(&target).unwrap();
    assert_eq!(client.numbers().await.unwrap(), BTreeSet::from([1, 2]));
}

#[tokio::test]
async fn many_clients_at_once_lose_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (_ledger, target) = start(directory.path()).await;
    let clients = (0..16u64).map(|who| {
        let target = target.clone();
        tokio::spawn(async move {
            let mut client = LedgerClient::new(&target).unwrap();
            for number in 0..20 {
                // A slow disk must not fail the test: asked again as a real client would.
                while client.post(&entry(who * 1000 + number, "x")).await.is_err() {}
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    let numbers = LedgerClient::new(&target).unwrap().numbers().await.unwrap();
    assert_eq!(numbers.len(), 16 * 20);
}

#[tokio::test]
async fn the_client_rides_through_an_outage() {
    let directory = tempfile::tempdir().unwrap();
    let journal = directory.path().join("journal");
    let (ledger, target) = start(directory.path()).await;
    let address: SocketAddr = ledger.addresses()[0];
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let client = tokio::spawn(run_client(
        ClientConfig::new(&target, &journal),
        async move { drop(ended.await) },
    ));
    let at_least = async |count: usize| {
        while Journal::read(&journal).map_or(0, |entries| entries.len()) < count {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Journal::read(&journal).unwrap().len()
    };
    let before = at_least(5).await;
    ledger.stop().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let _ledger = Ledger::start(config(directory.path(), &address.to_string()))
        .await
        .unwrap();
    at_least(before + 20).await;
    drop(end);
    client.await.unwrap().unwrap();

    let entries = Journal::read(&journal).unwrap();
    let (first, last) = (
        entries[0].acknowledged,
        entries[entries.len() - 1].acknowledged,
    );
    let gap = longest_gap(&entries, first, last);
    assert!(
        gap.length() >= Duration::from_millis(300),
        "{:?}",
        gap.length()
    );
    assert!(gap.length() < Duration::from_secs(10), "{:?}", gap.length());
    let mut reader = LedgerClient::new(&target).unwrap();
    let present = reader.numbers().await.unwrap();
    assert_eq!(missing(&entries, &present), [0u64; 0]);
    let notes = std::fs::read_to_string(&journal).unwrap();
    assert!(notes.contains("# "), "the trouble is noted: {notes}");
    assert!(longest_gap(&entries, last, Time(last.0 + 5)).length() < gap.length());
}

#[tokio::test]
async fn a_volume_keeps_the_entries_and_its_failure_ends_the_ledger() {
    let volume = volume::Volume::new(4096 * 64);
    let config = LedgerConfig {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        storage: Storage::Nbd {
            address: relevo_export::nbd::client::NbdAddr::Unix(volume.socket.clone()),
            export: "ledger".into(),
        },
    };
    let ledger = Ledger::start(config.clone()).await.unwrap();
    let mut client = LedgerClient::new(&format!("http://{}", ledger.addresses()[0])).unwrap();
    for number in 1..=10 {
        client.post(&entry(number, "on a volume")).await.unwrap();
    }
    ledger.stop().await;

    let ledger = Ledger::start(config.clone()).await.unwrap();
    let mut client = LedgerClient::new(&format!("http://{}", ledger.addresses()[0])).unwrap();
    assert_eq!(client.numbers().await.unwrap(), (1..=10).collect());
    assert_eq!(
        client.post(&entry(10, "on a volume")).await.unwrap(),
        Stored::Known
    );
    volume.fail();
    let error = client.post(&entry(11, "lost")).await.unwrap_err();
    assert!(
        matches!(error, ClientError::Refused { status: 503, .. }),
        "{error}"
    );
    let error = client.health().await.unwrap_err().to_string();
    assert!(error.contains("storage failed"), "{error}");
    assert_eq!(client.numbers().await.unwrap().len(), 10);
    ledger.stop().await;

    let nobody = Storage::Nbd {
        address: "/nonexistent/socket".parse().unwrap(),
        export: "ledger".into(),
    };
    let error = Ledger::start(LedgerConfig {
        storage: nobody,
        ..config
    })
    .await
    .unwrap_err();
    assert!(error.to_string().contains("/nonexistent/socket"), "{error}");
}

#[tokio::test]
async fn an_address_that_is_not_here_yet_is_fine_and_one_in_use_is_not() {
    let directory = tempfile::tempdir().unwrap();
    // TEST-NET-1: no machine has it.
    let ledger = Ledger::start(config(directory.path(), "192.0.2.7:0"))
        .await
        .unwrap();
    let second = tempfile::tempdir().unwrap();
    let taken = ledger.addresses()[0].to_string();
    let error = Ledger::start(config(second.path(), &taken))
        .await
        .unwrap_err();
    assert!(matches!(error, LedgerError::Listen { .. }), "{error}");
    assert!(error.to_string().contains(&taken), "{error}");
}

#[test]
fn targets_are_checked() {
    for nonsense in ["", "10.0.0.1:80", "http://nowhere", "http://a:1/path"] {
        assert!(LedgerClient::new(nonsense).is_err(), "{nonsense}");
    }
    assert!(LedgerClient::new("http://[fd00::1]:80/").is_ok());
}
