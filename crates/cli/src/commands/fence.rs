//! `fence`: devices, switching nodes off, words of persons, agents.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::SystemTime,
};

use clap::{ArgGroup, Args, Subcommand};
use relevo_server::api::{
    AddFenceDeviceRequest, ApiError, ErrorKind, FenceKindRequest, FenceRequest, FenceWordRequest,
};
use relevo_types::cluster::FenceAction;

use super::{
    Context,
    confirm::{Subject, ask},
};
use crate::{CliError, render};

/// `relevo fence`
#[derive(Subcommand, Debug)]
pub enum FenceVerb {
    /// What can switch nodes off
    #[command(subcommand)]
    Device(DeviceVerb),
    /// Switch a node off, and know that it is
    Off(NodeArgs),
    /// Switch a node off, know that it is, and switch it on again
    Reboot(NodeArgs),
    /// Ask a node's fence devices whether it has power; exit code 0 on, 2 off, 1 unknown
    Status {
        /// Name of the node
        node: String,
    },
    /// Say that a node is off because you looked: the proof where no device can tell. Nobody checks it, and
    /// data may be lost if it is not so
    Confirm(NodeArgs),
    /// End the attempt to fence a node that is under way
    Cancel {
        /// Name of the node
        node: String,
    },
    /// Show what was done: attempts and their proofs
    History,
    /// List the fence agents that are installed on this node
    Agents,
    /// Show what an agent can do and be told
    Agent {
        /// Its name: fence_ipmilan, ...
        name: String,
    },
}

/// A node, and its name once more.
#[derive(Args, Debug)]
pub struct NodeArgs {
    /// Name of the node
    node: String,
    /// The node's name again, where there is no terminal to ask on
    #[arg(long, value_name = "NODE")]
    confirm: Option<String>,
}

/// `relevo fence device`
#[derive(Subcommand, Debug)]
pub enum DeviceVerb {
    /// Add a device, or change one with --replace: an agent of the distribution, any command, or a person
    Add(Box<AddArgs>),
    /// Remove a device
    Remove {
        /// Name of the device
        name: String,
    },
    /// List the devices, with what their last check found
    List,
    /// Show all of a device but its secrets
    Show {
        /// Name of the device
        name: String,
    },
    /// Look whether a device would work from this node; nothing is switched
    Test {
        /// Name of the device
        name: String,
    },
}

/// `relevo fence device add`
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("kind").required(true).args(["agent", "command", "person"])))]
pub struct AddArgs {
    /// Name of the device: letters, digits, `-`, `_`, `.`
    name: String,
    /// A fence agent: fence_ipmilan, fence_virsh, ...; `relevo fence agents` lists them
    #[arg(long)]
    agent: Option<String>,
    /// Any program (absolute path) with its arguments, in which {node}, {plug} and {action} are replaced;
    /// actions are off, on and status, which ends with 0 for on, and with 2 and a line `off` for off
    #[arg(long, value_name = "COMMAND")]
    command: Option<String>,
    /// A person, who is asked to look and answers with `relevo fence confirm`
    #[arg(long)]
    person: bool,
    /// Node that the device switches off, with its plug where the device has plugs; repeat for each
    #[arg(long = "node", value_name = "NODE[=PLUG]", required = true, value_parser = parse_node)]
    nodes: Vec<(String, Option<String>)>,
    /// A parameter; `relevo fence agent NAME` lists them. What is known for a secret (password, token ...) is
    /// never shown; other programs of this machine may see this command line, though: see --set-secret
    #[arg(long = "set", value_name = "PARAMETER=VALUE", value_parser = parse_pair)]
    parameters: Vec<(String, String)>,
    /// A parameter whose value is a secret: it is read from standard input, a line for each
    #[arg(long = "set-secret", value_name = "PARAMETER")]
    secrets: Vec<String>,
    /// A parameter with a file, on each node that uses the device, whose first line is the value
    #[arg(long = "set-file", value_name = "PARAMETER=FILE", value_parser = parse_pair)]
    files: Vec<(String, String)>,
    /// Level: level 1 is tried first, all devices of a level must succeed, then the next one is tried
    #[arg(long, default_value_t = 1)]
    level: u8,
    /// Seconds to wait before these nodes are fenced: two nodes that fence each other need different ones
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    delay: u64,
    /// Node that may use the device (default: every data node); repeat for each
    #[arg(long, value_name = "NODE")]
    from: Vec<String>,
    /// Seconds that one action may take
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u32,
    /// Seconds that the power may still be on after `off` ended well
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    verify: u32,
    /// Seconds between two checks whether the device would work
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    check_every: u32,
    /// Where the device can't be asked whether the power is off: take its exit code for proof
    #[arg(long)]
    trust_exit_code: bool,
    /// Don't ask the agent whether the parameters fit
    #[arg(long)]
    unchecked: bool,
    /// Change a device that is there: it becomes what is given here, all of it, secrets too
    #[arg(long)]
    replace: bool,
}

pub(super) async fn run(context: &Context, verb: FenceVerb) -> Result<ExitCode, CliError> {
    match verb {
        FenceVerb::Device(verb) => device(context, verb).await,
        FenceVerb::Off(args) => fence(context, args, FenceAction::Off).await,
        FenceVerb::Reboot(args) => fence(context, args, FenceAction::Reboot).await,
        FenceVerb::Status { node } => status(context, &node).await,
        FenceVerb::Confirm(args) => {
            let outlook = context.client.fence_outlook(&args.node).await?;
            let known = format!(
                "{}  ! what {} had is given to others on your word: be sure that it is off, and stays so\n",
                render::fence_outlook(&outlook),
                args.node
            );
            let subject = Subject {
                kind: "node",
                name: &args.node,
                risk: "what the node had is given to others by it",
            };
            let request = FenceWordRequest {
                confirm: ask(context, &known, subject, args.confirm)?,
                who: who(),
            };
            let done = context.client.confirm_fence(&args.node, &request).await?;
            context.print_done(&done)
        }
        FenceVerb::Cancel { node } => {
            let request = FenceWordRequest {
                confirm: node.clone(),
                who: who(),
            };
            let done = context.client.cancel_fence(&node, &request).await?;
            context.print_done(&done)
        }
        FenceVerb::History => {
            let history = context.client.fence_history().await?;
            let now = unix_ms();
            context.print(&history, |history| render::fence_history(history, now))?;
            Ok(ExitCode::SUCCESS)
        }
        FenceVerb::Agents => {
            let agents = context.client.fence_agents().await?;
            context.print(&agents, |agents| render::fence_agents(agents))?;
            Ok(ExitCode::SUCCESS)
        }
        FenceVerb::Agent { name } => {
            let agent = context.client.fence_agent(&name).await?;
            context.print(&agent, render::fence_agent)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn device(context: &Context, verb: DeviceVerb) -> Result<ExitCode, CliError> {
    match verb {
        DeviceVerb::Add(args) => {
            let request = request(*args)?;
            let done = context.client.add_fence_device(&request).await?;
            context.print_done(&done)
        }
        DeviceVerb::Remove { name } => {
            let done = context.client.remove_fence_device(&name).await?;
            context.print_done(&done)
        }
        DeviceVerb::List => {
            let devices = context.client.fence_devices().await?;
            context.print(&devices, |devices| render::fence_devices(devices))?;
            Ok(ExitCode::SUCCESS)
        }
        DeviceVerb::Show { name } => {
            let devices = context.client.fence_devices().await?;
            let device = devices.into_iter().find(|it| it.name == name);
            let device = device.ok_or_else(|| {
                CliError::Api(ApiError::new(
                    ErrorKind::NotFound,
                    "nothing is shown",
                    format!("there is no fence device `{name}`"),
                    "`relevo fence device list` lists them",
                ))
            })?;
            let now = unix_ms();
            context.print(&device, |device| render::fence_device(device, now))?;
            Ok(ExitCode::SUCCESS)
        }
        DeviceVerb::Test { name } => {
            let done = context.client.test_fence_device(&name).await?;
            context.print_done(&done)
        }
    }
}

async fn fence(
    context: &Context,
    args: NodeArgs,
    action: FenceAction,
) -> Result<ExitCode, CliError> {
    let outlook = context.client.fence_outlook(&args.node).await?;
    let subject = Subject {
        kind: "node",
        name: &args.node,
        risk: "the node is switched off by it",
    };
    let request = FenceRequest {
        action,
        confirm: ask(
            context,
            &render::fence_outlook(&outlook),
            subject,
            args.confirm,
        )?,
        who: who(),
    };
    let done = context.client.fence(&args.node, &request).await?;
    context.print_done(&done)
}

async fn status(context: &Context, node: &str) -> Result<ExitCode, CliError> {
    let power = context.client.fence_power(node).await?;
    context.print(&power, |power| render::fence_power(power))?;
    let all = |word: &str| power.iter().all(|it| it.power == word);
    Ok(if all("off") {
        ExitCode::from(2)
    } else if power.iter().any(|it| it.power == "on") {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    })
}

fn request(args: AddArgs) -> Result<AddFenceDeviceRequest, CliError> {
    let kind = match (args.agent, args.command) {
        (Some(agent), _) => FenceKindRequest::Agent(agent),
        (None, Some(command)) => {
            FenceKindRequest::Command(command.split_whitespace().map(str::to_owned).collect())
        }
        (None, None) => FenceKindRequest::Person,
    };
    let mut parameters = BTreeMap::new();
    let secrets = read_secrets(&args.secrets)?;
    for (name, value) in args.parameters.into_iter().chain(secrets) {
        if parameters.insert(name.clone(), value).is_some() {
            return Err(CliError::Input(format!(
                "nothing was done: parameter `{name}` is given twice"
            )));
        }
    }
    Ok(AddFenceDeviceRequest {
        name: args.name,
        kind,
        parameters,
        secrets: args.secrets,
        files: args
            .files
            .into_iter()
            .map(|(name, path)| (name, PathBuf::from(path)))
            .collect(),
        nodes: args.nodes,
        level: args.level,
        delay_ms: args.delay.saturating_mul(1000),
        from: (!args.from.is_empty()).then_some(args.from),
        action_limit_s: args.timeout,
        verify_limit_s: args.verify,
        check_every_s: args.check_every,
        trust_exit_code: args.trust_exit_code,
        unchecked: args.unchecked,
        replace: args.replace,
    })
}

/// The values of secret parameters, from standard input.
fn read_secrets(names: &[String]) -> Result<Vec<(String, String)>, CliError> {
    let mut input = std::io::stdin().lock();
    let mut secrets = Vec::new();
    for name in names {
        if input.is_terminal() {
            // Not to standard output, which is for the answer.
            write!(
                std::io::stderr(),
                "Value of {name} (it is shown as you type it): "
            )?;
        }
        let mut line = String::new();
        input.read_line(&mut line)?;
        let value = line.trim_end_matches(['\r', '\n']).to_owned();
        if value.is_empty() {
            return Err(CliError::Input(format!(
                "nothing was done: standard input has no line with the value of `{name}`"
            )));
        }
        secrets.push((name.clone(), value));
    }
    Ok(secrets)
}

/// Who asks, for the record: nobody is let in by it.
fn who() -> String {
    ["SUDO_USER", "LOGNAME", "USER"]
        .into_iter()
        .find_map(|name| std::env::var(name).ok().filter(|it| !it.is_empty()))
        .unwrap_or_default()
}

fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
}

fn parse_node(text: &str) -> Result<(String, Option<String>), String> {
    let (node, plug) = match text.split_once('=') {
        None => (text, None),
        Some((node, plug)) => (node, Some(plug.to_owned())),
    };
    if node.is_empty() || plug.as_ref().is_some_and(String::is_empty) {
        return Err("write NODE or NODE=PLUG".to_owned());
    }
    Ok((node.to_owned(), plug))
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    // Not with the text in the error: it may have a secret in it.
    let (name, value) = text
        .split_once('=')
        .ok_or("write PARAMETER=VALUE, ip=10.0.0.9 say")?;
    Ok((name.trim().to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_and_parameters_are_read() {
        assert_eq!(parse_node("beta"), Ok(("beta".to_owned(), None)));
        let with_plug = ("beta".to_owned(), Some("1,2".to_owned()));
        assert_eq!(parse_node("beta=1,2"), Ok(with_plug));
        assert!(parse_node("beta=").is_err() && parse_node("=3").is_err());
        let pair = parse_pair("password=a=b ").unwrap();
        assert_eq!(pair, ("password".to_owned(), "a=b ".to_owned()));
        assert!(parse_pair("password").is_err());
    }
}
