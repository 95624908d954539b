//! `init`, `join`, `token`, `leave`.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use relevo_server::api::{
    InitAnswer, InitRequest, JoinAnswer, JoinRequest, NodeRequest, PathRequest, TokenAnswer,
    TokenRequest,
};
use relevo_types::{
    Sensitivity,
    cluster::{NodeKind, PathAddress, Ports},
};

use super::Context;
use crate::{CliError, render::duration_words};

/// `relevo init`
#[derive(Args, Debug)]
pub struct InitArgs {
    /// Name of the new cluster
    #[arg(long, value_name = "NAME")]
    name: String,
    /// How fast a silent machine is taken for dead: fast 400 ms, normal 1 s, patient 10 s
    #[arg(long, value_enum, default_value_t = SensitivityArg::Normal)]
    sensitivity: SensitivityArg,
    #[command(flatten)]
    node: NodeArgs,
}

/// `relevo join`
#[derive(Args, Debug)]
pub struct JoinArgs {
    /// The token that `relevo init` or `relevo token` printed on a node of the cluster
    token: String,
    /// Only vote: hold no data, run no services
    #[arg(long)]
    witness: bool,
    #[command(flatten)]
    node: NodeArgs,
}

/// `relevo token`
#[derive(Args, Debug)]
pub struct TokenArgs {
    /// Only for a witness
    #[arg(long, conflicts_with = "data")]
    witness: bool,
    /// Only for a data node
    #[arg(long)]
    data: bool,
    /// How long it is good: 90s, 30m, 24h
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_seconds)]
    valid: u64,
}

/// How this machine appears in the cluster.
#[derive(Args, Debug)]
struct NodeArgs {
    /// Name of this node (default: the host name)
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// A path and this node's address on it: an IP address, or a byte stream to one other node that carries
    /// heartbeats only, serial:DEVICE:BAUD or unix:SOCKET; repeat for more paths. Paths of two nodes
    /// belong together by name. `,replication` marks the network that replication prefers (default:
    /// `lan` with the address of the default route's interface)
    #[arg(long = "path", value_name = "NAME=ADDRESS[,replication]", value_parser = parse_path)]
    paths: Vec<PathRequest>,
    /// First of three ports: control (TCP), heartbeat (UDP), data (TCP)
    #[arg(long, value_name = "BASE", default_value_t = Ports::default().control,
          value_parser = clap::value_parser!(u16).range(1..=65533))]
    ports: u16,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SensitivityArg {
    Fast,
    Normal,
    Patient,
}

impl NodeArgs {
    fn into_request(self) -> NodeRequest {
        NodeRequest {
            name: self.node,
            paths: self.paths,
            ports: Ports {
                control: self.ports,
                heartbeat: self.ports + 1,
                data: self.ports + 2,
            },
        }
    }
}

pub(super) async fn init(context: &Context, args: InitArgs) -> Result<ExitCode, CliError> {
    let request = InitRequest {
        cluster: args.name,
        sensitivity: match args.sensitivity {
            SensitivityArg::Fast => Sensitivity::Fast,
            SensitivityArg::Normal => Sensitivity::Normal,
            SensitivityArg::Patient => Sensitivity::Patient,
        },
        node: args.node.into_request(),
    };
    let answer = context.client.init(&request).await?;
    context.print(&answer, init_text)?;
    Ok(ExitCode::SUCCESS)
}

fn init_text(answer: &InitAnswer) -> String {
    format!(
        "Cluster {} is up with this machine as node {}.\n\
         \n\
         To add a machine, start its daemon and run there (the token is good once, for 24 h):\n\
         \n  relevo join {}\n\
         \n\
         or, for a machine that only votes:\n\
         \n  relevo join --witness TOKEN\n\
         \n\
         `relevo token` makes further tokens.\n",
        answer.cluster, answer.node, answer.token.token
    )
}

pub(super) async fn join(context: &Context, args: JoinArgs) -> Result<ExitCode, CliError> {
    let request = JoinRequest {
        token: args.token,
        kind: if args.witness {
            NodeKind::Witness
        } else {
            NodeKind::Data
        },
        node: args.node.into_request(),
    };
    let answer = context.client.join(&request).await?;
    context.print(&answer, join_text)?;
    Ok(ExitCode::SUCCESS)
}

fn join_text(answer: &JoinAnswer) -> String {
    format!(
        "This machine is node {} of cluster {} now, with {}.\n",
        answer.node,
        answer.cluster,
        answer.members.join(", ")
    )
}

pub(super) async fn token(context: &Context, args: TokenArgs) -> Result<ExitCode, CliError> {
    let kind = match (args.witness, args.data) {
        (true, _) => Some(NodeKind::Witness),
        (false, true) => Some(NodeKind::Data),
        (false, false) => None,
    };
    let request = TokenRequest {
        kind,
        valid_s: args.valid,
    };
    let answer = context.client.create_token(&request).await?;
    context.print(&answer, |answer| token_text(answer, kind, args.valid))?;
    Ok(ExitCode::SUCCESS)
}

fn token_text(answer: &TokenAnswer, kind: Option<NodeKind>, valid_s: u64) -> String {
    let witness = if kind == Some(NodeKind::Witness) {
        "--witness "
    } else {
        ""
    };
    format!(
        "Good once, for {}. On the new machine:\n\n  relevo join {witness}{}\n",
        duration_words(valid_s * 1000),
        answer.token
    )
}

pub(super) async fn leave(context: &Context) -> Result<ExitCode, CliError> {
    let done = context.client.leave().await?;
    context.print_done(&done)
}

fn parse_path(text: &str) -> Result<PathRequest, String> {
    let explain = |what: &str| format!("{what}; write NAME=IP or NAME=IP,replication");
    let (name, rest) = text
        .split_once('=')
        .ok_or_else(|| explain("there is no `=`"))?;
    if name.is_empty() {
        return Err(explain("the path has no name"));
    }
    let (address, replication) = parse_address(rest).map_err(|what| explain(&what))?;
    Ok(PathRequest {
        name: name.to_owned(),
        address,
        replication,
    })
}

/// An address, and whether replication prefers it.
pub(super) fn parse_address(text: &str) -> Result<(PathAddress, bool), String> {
    let (address, replication) = match text.rsplit_once(',') {
        None => (text, false),
        Some((address, "replication")) => (address, true),
        Some((_, other)) => return Err(format!("`{other}` is not known")),
    };
    Ok((address.parse()?, replication))
}

fn parse_seconds(text: &str) -> Result<u64, String> {
    let explain = || format!("`{text}` is no time; write for example 90s, 30m or 24h");
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| explain())?;
    let factor = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(explain()),
    };
    number.checked_mul(factor).ok_or_else(explain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read() {
        let path = parse_path("repl=10.0.0.1,replication").unwrap();
        assert_eq!(path.name, "repl");
        assert_eq!(path.address, "10.0.0.1".parse().unwrap());
        assert!(path.replication);
        assert!(!parse_path("lan=fe80::1").unwrap().replication);
        let path = parse_path("ser=serial:/dev/ttyS0:9600").unwrap();
        assert_eq!(path.address.to_string(), "serial:/dev/ttyS0:9600");
        assert!(parse_path("10.0.0.1").unwrap_err().contains("NAME=IP"));
        assert!(parse_path("lan=host").unwrap_err().contains("`host`"));
        assert!(
            parse_path("lan=10.0.0.1,fast")
                .unwrap_err()
                .contains("`fast`")
        );
        assert!(parse_path("=10.0.0.1").unwrap_err().contains("no name"));
    }

    #[test]
    fn times_are_read() {
        assert_eq!(parse_seconds("90"), Ok(90));
        assert_eq!(parse_seconds("30m"), Ok(1800));
        assert_eq!(parse_seconds("2d"), Ok(172_800));
        assert!(parse_seconds("soon").unwrap_err().contains("24h"));
        assert!(parse_seconds("99999999999999999999h").is_err());
    }
}
