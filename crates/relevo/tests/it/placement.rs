//! Where services run: rules, holding, and why, with three real daemons.

use std::time::Duration;

use crate::daemons::{Daemon, Site, eventually};

const SOON: Duration = Duration::from_secs(5);

fn create(daemon: &Daemon, name: &str, rules: &[&str]) -> String {
    let command = ["service", "create", name, "--exec", "/bin/sleep 1000"];
    daemon.ok(&[&command, rules].concat())
}

fn runs_on(asked: &Daemon, service: &str, node: &str) -> bool {
    let service = asked.find("services", service);
    service["state"] == "running" && service["node"] == node
}

#[test]
fn rules_are_kept_and_explained() {
    let site = Site::new();
    let [alfa, mut beta, wit] = site.cluster();
    let out = create(&alfa, "db", &["--prefer", "beta,alfa"]);
    assert!(out.contains("runs on beta"), "{out}");
    let out = create(&alfa, "web", &["--with", "db", "--after", "db"]);
    assert!(out.contains("runs on beta"), "{out}");
    let out = create(&alfa, "dns", &["--apart", "db"]);
    assert!(out.contains("runs on alfa"), "{out}");

    let why = wit.ok(&["why", "web"]);
    assert!(why.contains("web  running on beta"), "{why}");
    assert!(why.contains("rules   with db; after db"), "{why}");
    assert!(why.contains("alfa  does not run `db`"), "{why}");
    assert!(why.contains("beta  has it, and can run it"), "{why}");
    assert!(why.contains("is a witness"), "{why}");
    let why = wit.ok(&["why", "dns", "on", "beta"]);
    assert!(why.contains("runs `db`, from which it is kept"), "{why}");
    assert!(!why.contains("alfa  "), "{why}");
    let err = wit.refused(&["why", "dns", "on", "gamma"]);
    assert!(err.contains("there is no node `gamma`"), "{err}");

    // It follows.
    alfa.ok(&["service", "place", "dns", "--apart", "none"]);
    alfa.ok(&["service", "move", "db", "alfa"]);
    eventually(SOON, "web followed db", || runs_on(&beta, "web", "alfa"));

    let err = alfa.refused(&["service", "place", "db", "--after", "web"]);
    assert!(err.contains("would wait for each other"), "{err}");
    let err = alfa.refused(&["service", "place", "db", "--only", "wit"]);
    assert!(err.contains("is a witness"), "{err}");
    let err = alfa.refused(&["service", "place", "db"]);
    assert!(err.contains("no rule was given"), "{err}");
    alfa.ok(&["service", "stop", "db"]);
    let err = alfa.refused(&["service", "remove", "db"]);
    assert!(err.contains("service `web` names it"), "{err}");
    alfa.ok(&["service", "start", "db"]);

    let out = wit.ok(&["what-if", "alfa", "dies"]);
    assert!(out.contains("db  from alfa to beta"), "{out}");
    assert!(out.contains("web  from alfa to beta"), "{out}");
    assert!(out.contains("alfa was silent for 1.0 s"), "{out}");
    assert!(out.contains("without one more of beta and wit"), "{out}");
    let out = wit.ok(&["what-if", "beta", "standby"]);
    assert!(out.contains("No service would move."), "{out}");

    // It returns.
    let out = alfa.ok(&["service", "place", "db", "--failback", "1s"]);
    assert!(out.contains("prefer beta alfa; failback 1s"), "{out}");
    eventually(SOON, "db and web are back", || {
        runs_on(&alfa, "db", "beta") && runs_on(&alfa, "web", "beta")
    });
    let err = alfa.refused(&["service", "place", "db", "--failback", "soon"]);
    assert!(err.contains("30s, 5min or 1h"), "{err}");

    // Heavier than any machine.
    alfa.ok(&["service", "stop", "dns"]);
    let out = alfa.ok(&["service", "place", "dns", "--memory", "900TiB"]);
    assert!(out.contains("memory 943718400MiB"), "{out}");
    let mut start = alfa.begin(&["service", "start", "dns"]);
    eventually(SOON, "it is said that there is no room", || {
        let why = alfa.find("services", "dns")["wait"]["why"].to_string();
        why.contains("MiB of memory left of") && why.contains("and it needs 943718400")
    });
    alfa.ok(&[
        "service", "place", "dns", "--memory", "none", "--only", "beta",
    ]);
    eventually(SOON, "dns runs", || runs_on(&alfa, "dns", "beta"));
    assert!(start.wait().unwrap().success());

    // Held: its node dies, and it stays away until that ends.
    let out = alfa.ok(&["service", "hold", "dns", "--reason", "moving its disk"]);
    assert!(out.contains("relevo service unhold dns"), "{out}");
    alfa.ok(&["service", "place", "dns", "--only", "none"]);
    beta.kill();
    eventually(SOON, "it is said why nobody has it", || {
        let service = alfa.find("services", "dns");
        service["node"].is_null()
            && service["wait"]["why"]
                .to_string()
                .contains("moving its disk")
    });
    let status = alfa.run(&["status"]).out;
    assert!(
        status.contains("held where it is: moving its disk"),
        "{status}"
    );
    alfa.ok(&["service", "unhold", "dns"]);
    eventually(SOON, "alfa has it", || runs_on(&alfa, "dns", "alfa"));
}

#[test]
fn rules_in_a_file() {
    let site = Site::new();
    let [alfa, _beta, _wit] = site.cluster();
    let file = site.path().join("web.toml");
    let text = "name = \"web\"\nplacement = { prefer = [\"beta\"], never = [\"alfa\"], memory = \"1MiB\" }\n\n\
                [[parts]]\nprocess = { command = [\"/bin/sleep\", \"1000\"] }\n";
    std::fs::write(&file, text).unwrap();
    let path = file.to_str().unwrap();
    let out = alfa.ok(&["service", "create", "--file", path]);
    assert!(out.contains("runs on beta"), "{out}");
    assert_eq!(
        alfa.find("services", "web")["placement"],
        serde_json::json!(["prefer beta", "never alfa", "memory 1MiB"])
    );
    std::fs::write(&file, text.replace("never", "nevr")).unwrap();
    let err = alfa.refused(&["service", "create", "--file", path]);
    assert!(
        err.contains("web.toml:2:") && err.contains("unknown field `nevr`"),
        "{err}"
    );
}
