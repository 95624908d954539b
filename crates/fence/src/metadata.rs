//! What a fence agent says of itself: its parameters and its actions.
//!
//! The format is that of the [fence agent API]; it is close to OCF's. Agents are programs of others, so
//! nothing here trusts the text: it is bounded, and what is odd is left out instead of refused.
//!
//! [fence agent API]: https://github.com/ClusterLabs/fence-agents/blob/main/doc/FenceAgentAPI.md

use std::collections::{BTreeMap, BTreeSet};

use relevo_types::cluster::FenceValue;
use roxmltree::{Document, Node, ParsingOptions};

/// The longest metadata: the longest of Debian's 84 agents is 12 KiB.
pub const METADATA_MAX: usize = 1 << 20;

/// Elements, texts and comments: those 84 have less than 1000 each.
const NODES_MAX: u32 = 50_000;

/// The longest text that is kept of a description, in characters.
const TEXT_MAX: usize = 1000;

/// An agent as it describes itself.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Metadata {
    /// Its name. Links to one agent have names of their own and the same metadata.
    pub name: String,
    /// What it is, in a line.
    pub shortdesc: String,
    /// What it is, at length.
    pub longdesc: String,
    /// What it can be told.
    pub parameters: Vec<Parameter>,
    /// What it can do: `off`, `on`, `reboot`, `status`, `monitor` ...
    pub actions: BTreeSet<String>,
}

/// A parameter of an agent.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// The agent does nothing without it.
    pub required: bool,
    /// What it is when it is not given.
    pub default: Option<String>,
    /// `string`, `integer`, `second`, `boolean`, `select` ...; empty: not said.
    pub kind: String,
    /// The values that can be chosen; empty: any.
    pub choices: Vec<String>,
    /// An old name, which still works.
    pub deprecated: bool,
    /// The old name that this one replaces.
    pub obsoletes: Option<String>,
    /// What it is, in a line.
    pub shortdesc: String,
}

/// What is wrong with parameters, or worth knowing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Findings {
    /// With these the agent will not work; a sentence each, with what to do.
    pub errors: Vec<String>,
    /// It works all the same; a sentence each.
    pub remarks: Vec<String>,
}

impl Metadata {
    /// Reads what an agent printed.
    ///
    /// # Errors
    /// It is no metadata; the text says why.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.len() > METADATA_MAX {
            return Err(format!(
                "it is {} bytes long; {METADATA_MAX} are the most",
                text.len()
            ));
        }
        // Some agents put a line of log before it, or a byte order mark.
        let begin = text
            .find('<')
            .ok_or("it is no XML: there is no `<` in it")?;
        let options = ParsingOptions {
            // Some agents name OCF's DTD. Entities are bounded by the library, and none is fetched.
            allow_dtd: true,
            nodes_limit: NODES_MAX,
            ..ParsingOptions::default()
        };
        let document = Document::parse_with_options(&text[begin..], options)
            .map_err(|e| format!("it is no XML: {}", clean(&e.to_string())))?;
        let root = document.root_element();
        if root.tag_name().name() != "resource-agent" {
            return Err(format!(
                "it is XML about `{}`, not about a resource agent",
                clean(root.tag_name().name())
            ));
        }
        let mut metadata = Self {
            name: clean(root.attribute("name").unwrap_or("")),
            shortdesc: clean(root.attribute("shortdesc").unwrap_or("")),
            longdesc: description(root, "longdesc"),
            ..Self::default()
        };
        if metadata.shortdesc.is_empty() {
            metadata.shortdesc = description(root, "shortdesc");
        }
        for list in root.children() {
            match list.tag_name().name() {
                "parameters" => metadata
                    .parameters
                    .extend(children(list, "parameter").filter_map(parameter)),
                "actions" => metadata.actions.extend(
                    children(list, "action")
                        .filter_map(|action| action.attribute("name"))
                        .map(clean),
                ),
                _ => {}
            }
        }
        Ok(metadata)
    }

    /// Whether it can do that.
    #[must_use]
    pub fn can(&self, action: &str) -> bool {
        self.actions.contains(action)
    }

    /// The parameter of that name.
    #[must_use]
    pub fn parameter(&self, name: &str) -> Option<&Parameter> {
        self.parameters.iter().find(|it| it.name == name)
    }

    /// The parameter that names the plug, if it has plugs.
    #[must_use]
    pub fn plug_parameter(&self) -> Option<&'static str> {
        ["plug", "port"]
            .into_iter()
            .find(|name| self.parameter(name).is_some())
    }

    /// Looks whether a device can work with these parameters, and with a plug for each node or without.
    #[must_use]
    pub fn check(&self, given: &BTreeMap<String, FenceValue>, with_plug: bool) -> Findings {
        let mut findings = Findings::default();
        for (name, value) in given {
            match self.parameter(name) {
                None => findings.errors.push(self.unknown(name)),
                Some(parameter) => {
                    if parameter.deprecated {
                        findings.remarks.push(self.outdated(name));
                    }
                    let choices = &parameter.choices;
                    if let FenceValue::Plain(text) = value
                        && !choices.is_empty()
                        && !choices.contains(text)
                    {
                        findings.errors.push(format!(
                            "`{text}` is no value for parameter `{name}`; it takes: {}",
                            choices.join(", ")
                        ));
                    }
                }
            }
        }
        if with_plug && self.plug_parameter().is_none() {
            findings.errors.push(
                "the agent has no plugs, and one is given; write --node NODE without `=`"
                    .to_owned(),
            );
        }
        for parameter in &self.parameters {
            let name = parameter.name.as_str();
            let replaced = self
                .parameters
                .iter()
                .any(|other| other.obsoletes.as_deref() == Some(name));
            if !parameter.required || parameter.default.is_some() || replaced {
                continue;
            }
            let is_plug = matches!(name, "plug" | "port");
            if is_plug && !with_plug {
                findings.errors.push(
                    "the agent needs the plug (slot, virtual machine ...) of each node; write --node NODE=PLUG"
                        .to_owned(),
                );
            }
            let old = parameter.obsoletes.as_deref();
            let set = given.contains_key(name) || old.is_some_and(|old| given.contains_key(old));
            if !set && !is_plug && !matches!(name, "action" | "option" | "nodename") {
                findings.errors.push(format!(
                    "parameter `{name}` ({}) is required; give it with --set {name}=VALUE",
                    parameter.shortdesc
                ));
            }
        }
        findings
    }

    fn unknown(&self, name: &str) -> String {
        let meant = nearest(name, self.parameters.iter().map(|it| it.name.as_str()));
        let next = match meant {
            Some(meant) => format!("perhaps `{meant}` is meant"),
            None => "`relevo fence agent NAME` lists its parameters".to_owned(),
        };
        format!("the agent has no parameter `{name}`; {next}")
    }

    fn outdated(&self, name: &str) -> String {
        let new = self
            .parameters
            .iter()
            .find(|it| it.obsoletes.as_deref() == Some(name));
        match new {
            Some(new) => format!(
                "parameter `{name}` is deprecated; it works, and `{}` is its new name",
                new.name
            ),
            None => format!("parameter `{name}` is deprecated; it still works"),
        }
    }

    /// Whether the value of this parameter is a secret, by its name or by what the agent says of it.
    #[must_use]
    pub fn is_secret(&self, name: &str) -> bool {
        let parameter = self.parameter(name);
        parameter.is_none_or(|it| it.kind != "boolean")
            && is_secret(name, parameter.map_or("", |it| it.shortdesc.as_str()))
    }
}

/// Whether the value of a parameter is a secret, by its name and its description. A script or a file that
/// has the secret is none.
#[must_use]
pub fn is_secret(name: &str, description: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let pointer = ["script", "file", "path", "prompt", "timeout", "url"]
        .iter()
        .any(|word| name.contains(word));
    if pointer {
        return false;
    }
    let named = [
        "passw",
        "secret",
        "token",
        "apikey",
        "api_key",
        "api-key",
        "access_key",
    ]
    .iter()
    .any(|word| name.contains(word));
    let description = description.to_ascii_lowercase();
    let described = [
        "password",
        "passphrase",
        "secret",
        "api key",
        "token",
        "kg key",
    ]
    .iter()
    .any(|word| description.contains(word))
        && !["script", "file", "method", "type"]
            .iter()
            .any(|word| description.contains(word));
    named || described || matches!(name.as_str(), "community" | "hexadecimal_kg" | "kg")
}

fn parameter(node: Node<'_, '_>) -> Option<Parameter> {
    let name = clean(node.attribute("name")?);
    if name.is_empty() {
        return None;
    }
    let content = children(node, "content").next();
    let attribute = |name: &str| content.and_then(|content| content.attribute(name));
    let yes = |name: &str| matches!(node.attribute(name), Some("1" | "true" | "yes"));
    Some(Parameter {
        required: yes("required"),
        default: attribute("default")
            .or_else(|| node.attribute("default"))
            .map(clean),
        kind: clean(attribute("type").unwrap_or("")),
        choices: content
            .into_iter()
            .flat_map(|content| children(content, "option"))
            .filter_map(|option| option.attribute("value"))
            .map(clean)
            .collect(),
        deprecated: yes("deprecated"),
        obsoletes: node.attribute("obsoletes").map(clean),
        shortdesc: description(node, "shortdesc"),
        name,
    })
}

fn children<'a, 'input: 'a>(
    node: Node<'a, 'input>,
    name: &'static str,
) -> impl Iterator<Item = Node<'a, 'input>> {
    node.children()
        .filter(move |child| child.tag_name().name() == name)
}

/// In English, if there is a choice.
fn description(node: Node<'_, '_>, name: &'static str) -> String {
    let english = children(node, name).find(|child| {
        child
            .attribute("lang")
            .is_none_or(|lang| lang.starts_with("en"))
    });
    english
        .or_else(|| children(node, name).next())
        .and_then(|child| child.text())
        .map_or_else(String::new, clean)
}

/// A text of others as it may be shown: one line, bounded, nothing that a terminal obeys.
#[must_use]
pub fn clean(text: &str) -> String {
    let words = text
        .split_whitespace()
        .map(|word| word.chars().filter(|c| !c.is_control()).collect::<String>());
    let mut line = words.collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = line.char_indices().nth(TEXT_MAX) {
        line.truncate(end);
        line.push_str(" ...");
    }
    line
}

/// The name that was most likely meant: few letters wrong for its length.
fn nearest<'a>(typed: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let bound = 1 + typed.chars().count() / 4;
    names
        .map(|name| (distance(typed, name), name))
        .filter(|(distance, name)| {
            *distance <= bound || (typed.len() >= 4 && name.starts_with(typed))
        })
        .min()
        .map(|(_, name)| name)
}

/// How many letters must be changed, added or removed (Levenshtein).
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().take(100).collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.chars().take(100).enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in other.iter().enumerate() {
            let changed = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SAMPLE: &str = r#"<?xml version="1.0" ?>
<resource-agent name="fence_x" shortdesc="Fence agent for X" >
<longdesc>Long
text.</longdesc>
<parameters>
	<parameter name="action" unique="0" required="1">
		<content type="string" default="reboot"  />
		<shortdesc lang="en">Fencing action</shortdesc>
	</parameter>
	<parameter name="ip" unique="0" required="1" obsoletes="ipaddr">
		<content type="string"  />
		<shortdesc lang="de">Adresse</shortdesc>
		<shortdesc lang="en">IP address</shortdesc>
	</parameter>
	<parameter name="ipaddr" unique="0" required="1" deprecated="1">
		<content type="string"  />
	</parameter>
	<parameter name="plug" required="1" obsoletes="port"><content type="string"/></parameter>
	<parameter name="port" required="1" deprecated="1"><content type="string"/></parameter>
	<parameter name="auth"><content type="select"><option value="md5"/><option value="none"/></content></parameter>
	<parameter name="password"><shortdesc>Login password or passphrase</shortdesc></parameter>
	<parameter><shortdesc>no name</shortdesc></parameter>
</parameters>
<actions>
	<action name="on" automatic="0"/>
	<action name="off" />
	<action />
</actions>
<odd/>
</resource-agent>"#;

    fn given(pairs: &[(&str, &str)]) -> BTreeMap<String, FenceValue> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), FenceValue::Plain((*value).to_owned())))
            .collect()
    }

    #[test]
    fn an_agent_is_read() {
        let agent = Metadata::parse(SAMPLE).unwrap();
        assert_eq!(agent.shortdesc, "Fence agent for X");
        assert_eq!(agent.longdesc, "Long text.");
        assert!(agent.can("off") && !agent.can("status"));
        assert_eq!(agent.plug_parameter(), Some("plug"));
        let ip = agent.parameter("ip").unwrap();
        assert_eq!(ip.shortdesc, "IP address");
        assert!(ip.required && !ip.deprecated);
        assert_eq!(ip.obsoletes.as_deref(), Some("ipaddr"));
        assert_eq!(agent.parameter("auth").unwrap().choices, ["md5", "none"]);
        assert_eq!(agent.parameters.len(), 7, "one without a name is left out");
    }

    #[test]
    fn parameters_are_checked() {
        let agent = Metadata::parse(SAMPLE).unwrap();
        let good = agent.check(&given(&[("ip", "::1"), ("auth", "md5")]), true);
        assert_eq!(good, Findings::default());
        let old = agent.check(&given(&[("ipaddr", "::1")]), true);
        assert_eq!(old.errors, [""; 0]);
        assert!(old.remarks[0].contains("`ip` is its new name"), "{old:?}");
        let none = agent.check(&given(&[]), false).errors;
        assert_eq!(none.len(), 2, "{none:?}");
        assert!(
            none[0].contains("`ip` (IP address) is required"),
            "{none:?}"
        );
        assert!(none[1].contains("--node NODE=PLUG"), "{none:?}");
        let typed = agent.check(
            &given(&[("ip", "x"), ("pasword", "x"), ("auth", "md4")]),
            true,
        );
        assert!(
            typed
                .errors
                .iter()
                .any(|it| it.contains("perhaps `password`"))
        );
        assert!(typed.errors.iter().any(|it| it.contains("md5, none")));
        let far = agent.check(&given(&[("ip", "x"), ("zzzzzz", "x")]), true);
        assert!(far.errors[0].contains("relevo fence agent"), "{far:?}");
        let no_plugs = Metadata::parse("<resource-agent/>").unwrap();
        assert!(no_plugs.check(&given(&[]), true).errors[0].contains("no plugs"));
    }

    #[test]
    fn secrets_are_known() {
        for name in [
            "password",
            "passwd",
            "snmp_priv_passwd",
            "snmp-auth-passwd",
            "token",
            "api_key",
            "community",
            "secret_key",
        ] {
            assert!(is_secret(name, ""), "{name}");
        }
        for name in [
            "passwd_script",
            "password_script",
            "identity_file",
            "ip",
            "login",
            "plug",
            "login_timeout",
        ] {
            assert!(!is_secret(name, ""), "{name}");
        }
        assert!(is_secret("pin", "Secret of the user's card"));
        assert!(!is_secret(
            "auth",
            "IPMI Lan Auth type (md5, password, none)"
        ));
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        for (text, why) in [
            ("", "no `<`"),
            ("usage: fence_x", "no `<`"),
            ("<html></html>", "about `html`"),
            ("<resource-agent>", "no XML"),
            ("<a/><b/>", "no XML"),
        ] {
            let error = Metadata::parse(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
        let long = format!("<resource-agent>{}", " ".repeat(METADATA_MAX));
        assert!(Metadata::parse(&long).unwrap_err().contains("bytes long"));
    }

    /// A log line before, a DTD, entities that multiply, depth: none may cost more than a bounded time.
    #[test]
    fn odd_and_hostile_texts() {
        let odd = format!("WARNING:root:no config\n{SAMPLE}").replace(
            "<resource-agent",
            "<!DOCTYPE resource-agent SYSTEM \"ra-api-1.dtd\"><resource-agent",
        );
        let odd = odd.replace("<?xml version=\"1.0\" ?>\n", "");
        assert!(Metadata::parse(&odd).unwrap().can("off"));
        let mut laughs = "<!DOCTYPE resource-agent [<!ENTITY a0 \"ha\">".to_owned();
        for i in 1..30 {
            let more = format!("&a{};", i - 1).repeat(10);
            laughs.push_str(&format!("<!ENTITY a{i} \"{more}\">"));
        }
        laughs.push_str("]><resource-agent><longdesc>&a29;</longdesc></resource-agent>");
        assert!(Metadata::parse(&laughs).is_err());
        let deep = format!("<resource-agent>{}", "<a>".repeat(300_000));
        assert!(Metadata::parse(&deep).is_err());
        let escape = "<resource-agent shortdesc=\"a&#x9b;31m\u{85}\u{202e}b\"/>";
        let shown = Metadata::parse(escape).unwrap().shortdesc;
        assert!(!shown.chars().any(char::is_control), "{shown:?}");
    }

    /// What Debian has: agents are read, and have what an attempt needs.
    #[test]
    fn installed_agents_are_read() {
        let directory = std::path::Path::new("/usr/sbin");
        let installed = crate::agent::Agents::new(directory).installed();
        if installed.len() < 10 {
            said::skip(
                "installed_agents_are_read",
                "package fence-agents is not installed",
            );
            return;
        }
        let mut can_switch = 0;
        for name in [
            "fence_dummy",
            "fence_ipmilan",
            "fence_virsh",
            "fence_apc_snmp",
            "fence_kdump",
        ] {
            let output = std::process::Command::new(directory.join(name))
                .args(["-o", "metadata"])
                .output()
                .unwrap();
            let agent = Metadata::parse(&String::from_utf8_lossy(&output.stdout)).unwrap();
            assert!(
                !agent.parameters.is_empty() && !agent.shortdesc.is_empty(),
                "{name}"
            );
            can_switch += usize::from(agent.can("off") && agent.can("status"));
            let names = agent.parameters.iter().map(|it| it.name.as_str());
            let secrets: Vec<&str> = names.filter(|it| agent.is_secret(it)).collect();
            if name == "fence_ipmilan" {
                assert_eq!(secrets, ["hexadecimal_kg", "passwd", "password"], "{name}");
            }
        }
        assert_eq!(can_switch, 4, "all but fence_kdump");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_text_panics(text in ".{0,300}") {
            drop(Metadata::parse(&text));
        }

        /// Cut, doubled and changed at random, as a broken or hostile agent may print it.
        #[test]
        fn no_changed_metadata_panics(
            cuts in proptest::collection::vec((any::<prop::sample::Index>(), any::<char>(), 0..3u8), 1..20)
        ) {
            let mut text: Vec<char> = SAMPLE.chars().collect();
            for (place, letter, how) in cuts {
                let at = place.index(text.len());
                match how {
                    0 => text[at] = letter,
                    1 => { text.remove(at); }
                    _ => { let half: Vec<char> = text[at..].to_vec(); text.extend(half); text.truncate(20_000); }
                }
            }
            let text: String = text.into_iter().collect();
            if let Ok(agent) = Metadata::parse(&text) {
                drop(agent.check(&given(&[("ip", "x"), ("zz", "y")]), true));
            }
        }
    }
}
