//! Groups of copies in one process, joined by a network that can be cut.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::{Mutex, RwLock},
};

use openraft::{
    StorageError, StorageIOError,
    testing::{StoreBuilder, Suite},
};
use relevo_types::{
    ClusterId, Sensitivity,
    cluster::{JoinToken, NodeKind, NodePath, NodeSpec, Ports},
};
use tempfile::TempDir;

use super::*;

const BOUND: Duration = Duration::from_secs(10);

/// Copies by node, and which nodes are cut off.
#[derive(Default)]
struct Wire {
    copies: RwLock<BTreeMap<NodeId, Arc<RaftControl>>>,
    cut: Mutex<BTreeSet<NodeId>>,
}

struct Way {
    from: NodeId,
    wire: Arc<Wire>,
}

impl Way {
    fn reach(&self, target: NodeId) -> Result<Arc<RaftControl>, String> {
        let cut = self.wire.cut.lock().unwrap();
        if cut.contains(&self.from) || cut.contains(&target) {
            return Err("the cable is cut".to_owned());
        }
        let copies = self.wire.copies.read().unwrap();
        copies
            .get(&target)
            .cloned()
            .ok_or_else(|| "it does not run".to_owned())
    }
}

#[async_trait]
impl Peers for Way {
    async fn raft(&self, target: NodeId, request: Vec<u8>) -> Result<Vec<u8>, String> {
        self.reach(target)?.handle_raft(&request).await
    }

    async fn propose(&self, target: NodeId, request: Vec<u8>) -> Result<Vec<u8>, String> {
        self.reach(target)?.handle_propose(&request).await
    }
}

struct Group {
    wire: Arc<Wire>,
    directories: BTreeMap<NodeId, TempDir>,
}

fn spec(name: &str) -> NodeSpec {
    NodeSpec {
        name: name.to_owned(),
        kind: NodeKind::Data,
        paths: vec![NodePath {
            name: "lan".to_owned(),
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            replication: false,
        }],
        streams: Vec::new(),
        ports: Ports::default(),
    }
}

fn init() -> Command {
    Command::Init {
        cluster: ClusterId([1; 16]),
        name: "test".to_owned(),
        sensitivity: Sensitivity::Normal,
        node: spec("n1"),
    }
}

impl Group {
    async fn of(count: u32) -> Self {
        let mut group = Self {
            wire: Arc::default(),
            directories: BTreeMap::new(),
        };
        for number in 1..=count {
            group
                .directories
                .insert(NodeId(number), tempfile::tempdir().unwrap());
            group.start(number).await;
        }
        assert_eq!(
            group.copy(1).bootstrap(init()).await,
            Ok(Outcome::Node(NodeId(1)))
        );
        for number in 2..=count {
            let name = format!("n{number}");
            let token = JoinToken {
                kind: None,
                expires_unix_s: 10,
            };
            let create = Command::CreateToken {
                hash: name.clone(),
                token,
            };
            group.copy(1).propose(create).await.unwrap();
            let join = Command::Join {
                hash: name.clone(),
                now_unix_s: 1,
                node: spec(&name),
            };
            group.copy(1).propose(join).await.unwrap();
        }
        for number in 1..=count {
            group
                .sees(number, |state| state.voters().count() == count as usize)
                .await;
        }
        group
    }

    async fn start(&self, number: u32) {
        let me = NodeId(number);
        let config = RaftControlConfig {
            directory: self.directories[&me].path().to_path_buf(),
            me,
            timing: Sensitivity::Normal.timing(),
            settled: watch::channel(u64::MAX).1,
        };
        let way = Arc::new(Way {
            from: me,
            wire: self.wire.clone(),
        });
        let copy = RaftControl::open(config, way).await.unwrap();
        self.wire.copies.write().unwrap().insert(me, Arc::new(copy));
    }

    async fn stop(&self, number: u32) {
        let copy = self
            .wire
            .copies
            .write()
            .unwrap()
            .remove(&NodeId(number))
            .unwrap();
        copy.shutdown().await;
    }

    fn copy(&self, number: u32) -> Arc<RaftControl> {
        self.wire.copies.read().unwrap()[&NodeId(number)].clone()
    }

    async fn sees(&self, number: u32, what: impl Fn(&ClusterState) -> bool) {
        let mut state = self.copy(number).state();
        let seen = timeout(BOUND, state.wait_for(|state| what(state))).await;
        assert!(
            matches!(seen, Ok(Ok(_))),
            "n{number} sees {:?}",
            self.copy(number).state()
        );
    }

    async fn leader(&self, number: u32) -> NodeId {
        let mut leader = self.copy(number).leader();
        let found = timeout(BOUND, leader.wait_for(Option::is_some)).await;
        found
            .expect("a leader in time")
            .expect("runs")
            .expect("some")
    }
}

fn standby(node: u32, standby: bool) -> Command {
    Command::SetStandby {
        node: NodeId(node),
        standby,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_agree_whoever_proposes() {
    let group = Group::of(3).await;
    for number in 1..=3 {
        let proposed = group.copy(number).propose(standby(number, true)).await;
        assert_eq!(proposed, Ok(Outcome::Done));
        assert!(group.copy(number).state().borrow().nodes[&NodeId(number)].standby);
    }
    for number in 1..=3 {
        group
            .sees(number, |state| {
                state.nodes.values().all(|node| node.standby)
            })
            .await;
    }
    let rejected = group
        .copy(2)
        .propose(Command::RemoveNode {
            node: NodeId(9),
            expect: 3,
        })
        .await;
    assert_eq!(
        rejected,
        Err(ProposeError::Rejected(Rejection::NoNode {
            node: NodeId(9)
        }))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_leader_is_replaced_within_the_dead_time_and_a_half() {
    let group = Group::of(3).await;
    let dead = group.leader(1).await;
    let other = if dead == NodeId(1) { 2 } else { 1 };
    let begin = Instant::now();
    group.stop(dead.0).await;
    let mut leader = group.copy(other).leader();
    let changed = leader.wait_for(|leader| leader.is_some_and(|leader| leader != dead));
    timeout(BOUND, changed).await.unwrap().unwrap();
    let took = begin.elapsed();
    assert_eq!(
        group.copy(other).propose(standby(other, true)).await,
        Ok(Outcome::Done)
    );
    // 0.5 to 0.8 s of silence, and one more round if two stood for election at once. The bound is
    // wide because test machines are loaded; the demo measures the real time.
    assert!(took < Duration::from_secs(4), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minority_decides_nothing_and_says_so() {
    let group = Group::of(3).await;
    let leader = group.leader(1).await;
    group.wire.cut.lock().unwrap().insert(leader);
    let words = group
        .copy(leader.0)
        .propose(standby(1, true))
        .await
        .unwrap_err()
        .to_string();
    assert!(words.contains("2 of its 3 voters"), "{words}");
    let other = if leader == NodeId(1) { 2 } else { 1 };
    assert_eq!(
        group.copy(other).propose(standby(2, true)).await,
        Ok(Outcome::Done)
    );
    group.wire.cut.lock().unwrap().clear();
    group
        .sees(leader.0, |state| state.nodes[&NodeId(2)].standby)
        .await;
    // What the minority's leader had taken and could not commit is gone.
    assert!(!group.copy(leader.0).state().borrow().nodes[&NodeId(1)].standby);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_forgets_nothing() {
    let group = Group::of(3).await;
    group.copy(1).propose(standby(2, true)).await.unwrap();
    group.sees(3, |state| state.nodes[&NodeId(2)].standby).await;
    for number in 1..=3 {
        group.stop(number).await;
    }
    for number in 1..=3 {
        group.start(number).await;
    }
    group.sees(3, |state| state.nodes[&NodeId(2)].standby).await;
    assert_eq!(
        group.copy(2).propose(standby(2, false)).await,
        Ok(Outcome::Done)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lagging_node_catches_up_by_snapshot() {
    let group = Group::of(3).await;
    let leader = group.leader(1).await;
    let lagging = if leader == NodeId(3) { 2 } else { 3 };
    group.stop(lagging).await;
    for round in 0..(SNAPSHOT_EVERY + LOG_KEPT + 200) {
        let proposed = group
            .copy(leader.0)
            .propose(standby(1, round % 2 == 0))
            .await;
        assert_eq!(proposed, Ok(Outcome::Done));
    }
    let revision = group.copy(leader.0).state().borrow().revision;
    group.start(lagging).await;
    group
        .sees(lagging, |state| state.revision >= revision)
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_left_leaves_the_group() {
    let group = Group::of(3).await;
    group
        .copy(1)
        .propose(Command::RemoveNode {
            node: NodeId(3),
            expect: 3,
        })
        .await
        .unwrap();
    let raft = group.copy(1).raft.clone();
    let left = raft
        .wait(Some(BOUND))
        .metrics(
            |metrics| metrics.membership_config.voter_ids().count() == 2,
            "two voters",
        )
        .await;
    assert!(left.is_ok(), "{left:?}");
    group.stop(3).await;
    assert_eq!(
        group.copy(1).propose(standby(1, true)).await,
        Ok(Outcome::Done)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joiner_that_never_comes_takes_no_majority_away() {
    let group = Group::of(1).await;
    let token = JoinToken {
        kind: None,
        expires_unix_s: 10,
    };
    let create = Command::CreateToken {
        hash: "h".to_owned(),
        token,
    };
    group.copy(1).propose(create).await.unwrap();
    let join = Command::Join {
        hash: "h".to_owned(),
        now_unix_s: 1,
        node: spec("n2"),
    };
    group.copy(1).propose(join).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(
        group.copy(1).propose(standby(1, true)).await,
        Ok(Outcome::Done)
    );
    assert_eq!(group.copy(1).state().borrow().majority(), 1);
}

/// The library's own conformance tests of a store.
struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateMachine), StorageError<u64>> {
        let failed = |error: io::Error| StorageError::from(StorageIOError::read(&error));
        let directory = tempfile::tempdir().map_err(failed)?;
        let store = LogStore::open(&directory.path().join("log")).map_err(failed)?;
        let (machine, _) =
            StateMachine::open(&directory.path().join("snapshot")).map_err(failed)?;
        Ok((directory, store, machine))
    }
}

#[test]
fn the_store_conforms() {
    Suite::test_all(Builder).unwrap();
}
