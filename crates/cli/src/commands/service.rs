//! `service create`, `list`, `remove`, `start`, `stop`, `move`.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::{ArgGroup, Args, Subcommand};
use relevo_server::{
    api::{
        AddressRequest, CreateServiceRequest, HoldRequest, MountRequest, MoveServiceRequest,
        PartRequest, PlacementRequest, ProcessRequest, VolumePartRequest,
    },
    service_file,
};

use super::Context;
use crate::{CliError, render};

/// `relevo service`
#[derive(Subcommand, Debug)]
pub enum ServiceVerb {
    /// Create a service from options or from a file, and start it
    Create(Box<CreateArgs>),
    /// List the services
    List,
    /// Stop a service and forget it; its volume stays
    Remove {
        /// Name of the service
        name: String,
    },
    /// Start a service, forgetting its earlier failures
    Start {
        /// Name of the service
        name: String,
    },
    /// Stop a service; it stays stopped until it is started
    Stop {
        /// Name of the service
        name: String,
    },
    /// Say where a service may and shall run; rules that are not given stay, `none` takes one back
    Place {
        /// Name of the service
        name: String,
        #[command(flatten)]
        rules: PlacementArgs,
    },
    /// Leave a service where it is: nothing moves it, also not the death of its node
    Hold {
        /// Name of the service
        name: String,
        /// Why, for those who look at the status
        #[arg(long, default_value = "by hand")]
        reason: String,
    },
    /// Let the cluster move a service again
    Unhold {
        /// Name of the service
        name: String,
    },
    /// Move a service to another node (switchover)
    Move {
        /// Name of the service
        name: String,
        /// Name of the node
        #[arg(required_unless_present = "anywhere")]
        to: Option<String>,
        /// Take an earlier wish back: the service may stay where it is
        #[arg(long, conflicts_with = "to")]
        anywhere: bool,
    },
}

/// Rules of where a service runs
#[derive(Args, Debug, Default)]
pub struct PlacementArgs {
    /// Nodes that are preferred, the first one first: alfa,beta
    #[arg(long, value_name = "NODES", value_delimiter = ',')]
    prefer: Option<Vec<String>>,
    /// The only nodes that may have it
    #[arg(long, value_name = "NODES", value_delimiter = ',')]
    only: Option<Vec<String>>,
    /// Nodes that may not have it
    #[arg(long, value_name = "NODES", value_delimiter = ',')]
    never: Option<Vec<String>>,
    /// Services on whose node it runs: it follows them
    #[arg(long, value_name = "SERVICES", value_delimiter = ',')]
    with: Option<Vec<String>>,
    /// Services that never run on its node
    #[arg(long, value_name = "SERVICES", value_delimiter = ',')]
    apart: Option<Vec<String>>,
    /// Services that have to run, anywhere, before it starts
    #[arg(long, value_name = "SERVICES", value_delimiter = ',')]
    after: Option<Vec<String>>,
    /// Memory that it needs, 4GiB say: the services of a node need no more together than it has
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// Return to a node that it prefers once that could have had it for so long: 30s, 5min, 1h
    #[arg(long, value_name = "DELAY")]
    failback: Option<String>,
}

impl PlacementArgs {
    fn into_request(self) -> PlacementRequest {
        // No node and no service is called that: a rule is taken back.
        let names = |given: Option<Vec<String>>| {
            given.map(|names| if names == ["none"] { Vec::new() } else { names })
        };
        let or = |given: Option<String>, nothing: &str| {
            given.map(|word| {
                if word == "none" {
                    nothing.to_owned()
                } else {
                    word
                }
            })
        };
        PlacementRequest {
            prefer: names(self.prefer),
            only: names(self.only),
            never: names(self.never),
            with: names(self.with),
            apart: names(self.apart),
            after: names(self.after),
            memory: or(self.memory, "0"),
            failback: or(self.failback, "never"),
        }
    }
}

/// `relevo service create`
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("source").required(true).args(["name", "file"])))]
pub struct CreateArgs {
    /// Name of the service
    name: Option<String>,
    /// Read the whole service from a TOML file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["volume", "mount", "ip", "exec", "PlacementArgs"])]
    file: Option<PathBuf>,
    /// Volume that the service uses
    #[arg(long, value_name = "VOLUME")]
    volume: Option<String>,
    /// Mount the volume here
    #[arg(
        long,
        value_name = "DIR",
        requires = "volume",
        conflicts_with = "no_device"
    )]
    mount: Option<PathBuf>,
    /// File system of the volume; made when the volume is blank
    #[arg(long, value_name = "TYPE", default_value = "ext4", requires = "mount")]
    fs: String,
    /// Mount options, comma separated
    #[arg(long, value_name = "OPTIONS", default_value = "", requires = "mount")]
    mount_options: String,
    /// Virtual address with its prefix: 192.168.1.1/24; repeat for more
    #[arg(long, value_name = "ADDRESS/PREFIX")]
    ip: Vec<String>,
    /// Interface of the addresses (default: the one that has an address of the same network)
    #[arg(long, value_name = "NAME", requires = "ip")]
    interface: Option<String>,
    /// Take the addresses after the processes are ready instead of before they start
    #[arg(long, requires = "ip")]
    ip_last: bool,
    /// Process to supervise: absolute program and arguments, split at spaces; quotes group
    #[arg(long, value_name = "COMMAND")]
    exec: Option<String>,
    /// Environment variable of the process; repeat for more
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable, requires = "exec")]
    env: Vec<(String, String)>,
    /// Directory in which the process runs
    #[arg(long, value_name = "DIR", requires = "exec")]
    directory: Option<PathBuf>,
    /// The process is ready when this TCP address accepts
    #[arg(long, value_name = "ADDRESS:PORT", requires = "exec")]
    ready: Option<SocketAddr>,
    /// Make no block device of the volume; the service reaches it over NBD
    #[arg(long, requires = "volume")]
    no_device: bool,
    /// Node where it shall run first
    #[arg(long, value_name = "NODE")]
    on: Option<String>,
    #[command(flatten)]
    rules: PlacementArgs,
}

pub(super) async fn run(context: &Context, verb: ServiceVerb) -> Result<ExitCode, CliError> {
    let client = &context.client;
    let done = match verb {
        ServiceVerb::Create(args) => {
            let request = match &args.file {
                Some(file) => service_file::read(file).map_err(CliError::Input)?,
                None => args.into_request()?,
            };
            client.create_service(&request).await?
        }
        ServiceVerb::List => {
            let services = client.services().await?;
            context.print(&services, |services| render::service_list(services))?;
            return Ok(ExitCode::SUCCESS);
        }
        ServiceVerb::Remove { name } => client.remove_service(&name).await?,
        ServiceVerb::Start { name } => client.start_service(&name).await?,
        ServiceVerb::Stop { name } => client.stop_service(&name).await?,
        ServiceVerb::Place { name, rules } => {
            let request = rules.into_request();
            if request == PlacementRequest::default() {
                return Err(CliError::Input(
                    "no rule was given: `relevo service place --help` lists them, `relevo why` shows those in force"
                        .to_owned(),
                ));
            }
            client.place_service(&name, &request).await?
        }
        ServiceVerb::Hold { name, reason } => {
            let reason = Some(reason);
            client.hold_service(&name, &HoldRequest { reason }).await?
        }
        ServiceVerb::Unhold { name } => {
            let request = HoldRequest { reason: None };
            client.hold_service(&name, &request).await?
        }
        ServiceVerb::Move { name, to, .. } => {
            client
                .move_service(&name, &MoveServiceRequest { to })
                .await?
        }
    };
    context.print_done(&done)
}

impl CreateArgs {
    /// The parts in the order in which they start: volume, mount, addresses, process; with
    /// `--ip-last` the addresses come after the process, so that clients reach it only once it is
    /// ready.
    fn into_request(self) -> Result<CreateServiceRequest, CliError> {
        let mut parts = Vec::new();
        if let Some(volume) = &self.volume {
            parts.push(PartRequest::Volume(VolumePartRequest {
                name: volume.clone(),
                device: !self.no_device,
            }));
        }
        if let (Some(at), Some(volume)) = (self.mount, self.volume) {
            parts.push(PartRequest::Mount(MountRequest {
                volume,
                at,
                filesystem: self.fs,
                make: true,
                options: self.mount_options,
            }));
        }
        let interface = self.interface;
        let addresses = self.ip.into_iter().map(|address| {
            PartRequest::Address(AddressRequest {
                address,
                interface: interface.clone(),
            })
        });
        let process = match self.exec {
            Some(line) => Some(PartRequest::Process(ProcessRequest {
                command: split_command(&line)
                    .map_err(|why| CliError::Input(format!("--exec `{line}`: {why}")))?,
                environment: self.env.into_iter().collect::<BTreeMap<_, _>>(),
                directory: self.directory,
                ready: self.ready,
            })),
            None => None,
        };
        if self.ip_last {
            parts.extend(process);
            parts.extend(addresses);
        } else {
            parts.extend(addresses);
            parts.extend(process);
        }
        Ok(CreateServiceRequest {
            name: self.name.unwrap_or_default(),
            on: self.on,
            placement: self.rules.into_request(),
            parts,
        })
    }
}

fn parse_variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` is no NAME=VALUE")),
    }
}

/// Splits a command line at spaces; single and double quotes group, a backslash takes the next
/// character as it is (not within single quotes). No variables, no globs: there is no shell.
fn split_command(line: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote: Option<char> = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            (c, Some(open)) if c == open => quote = None,
            ('\\', None | Some('"')) => {
                let next = chars.next().ok_or("it ends with a backslash")?;
                word.get_or_insert_default().push(next);
            }
            (c, Some(_)) => word.get_or_insert_default().push(c),
            ('\'' | '"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (c, None) if c.is_whitespace() => words.extend(word.take()),
            (c, None) => word.get_or_insert_default().push(c),
        }
    }
    if let Some(open) = quote {
        return Err(format!("the quote {open} is not closed"));
    }
    words.extend(word);
    match words.first() {
        None => Err("there is no program in it".to_owned()),
        Some(program) if !program.starts_with('/') => Err(format!(
            "`{program}` is no absolute path; a service starts without a search path"
        )),
        Some(_) => Ok(words),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_split() {
        assert_eq!(
            split_command(r#"/bin/sh -c 'echo "a b"' x\ y "" "q\"r""#).unwrap(),
            ["/bin/sh", "-c", r#"echo "a b""#, "x y", "", r#"q"r"#]
        );
        assert!(split_command("  ").unwrap_err().contains("no program"));
        assert!(split_command("sleep 1").unwrap_err().contains("absolute"));
        assert!(split_command("/bin/sh 'x").unwrap_err().contains("closed"));
        assert!(
            split_command("/bin/sh \\")
                .unwrap_err()
                .contains("backslash")
        );
    }
}
