//! The handshake and the options, up to the choice of an export.

use std::sync::Arc;

use super::{
    output::Output,
    proto::{
        BASE_ALLOCATION, BASE_ALLOCATION_ID, IHAVEOPT, MAX_REQUEST, MAX_STRING, NBDMAGIC,
        OPTION_REPLY_MAGIC, Reader, flag, handshake, info, opt, rep,
    },
    session::{CloseReason, Export, Staging, Step},
    transmit::Replies,
};

/// The longest option in bytes that is looked at: two of the longest strings and some lists.
/// Longer ones are skipped and answered with "too big".
pub(super) const MAX_OPTION: usize = 16 << 10;

/// Options on one connection. Real clients need under ten; one that goes on negotiating for ever
/// is sent away.
const MAX_OPTIONS: u32 = 256;

/// What clients may ask for best: a block of ours, and a size at which system calls hardly count.
const PREFERRED_BLOCK: u32 = 64 << 10;

/// The negotiation of one connection.
#[derive(Debug)]
pub(super) struct Negotiation {
    exports: Arc<[Export]>,
    stage: Stage,
    options: u32,
    no_zeroes: bool,
    structured: bool,
    /// The export for which `base:allocation` was agreed on.
    context_for: Option<String>,
}

#[derive(Debug)]
enum Stage {
    ClientFlags,
    OptionHead,
    OptionData { option: u32, len: usize },
    OptionSkip { option: u32, left: usize },
}

/// What an option led to.
enum Outcome {
    Next,
    Open(Export),
    Close(CloseReason),
}

impl Negotiation {
    pub(super) fn new(exports: Arc<[Export]>) -> Self {
        Self {
            exports,
            stage: Stage::ClientFlags,
            options: 0,
            no_zeroes: false,
            structured: false,
            context_for: None,
        }
    }

    /// The server speaks first.
    pub(super) fn greet(output: &mut Output) {
        output.put(&NBDMAGIC.to_be_bytes());
        output.put(&IHAVEOPT.to_be_bytes());
        output.put(&(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
    }

    pub(super) fn set_exports(&mut self, exports: Arc<[Export]>) {
        self.exports = exports;
    }

    /// Understands the next part of what was received.
    pub(super) fn step(&mut self, staging: &mut Staging, output: &mut Output) -> Step {
        match self.stage {
            Stage::ClientFlags => staging.take::<4>().map_or(Step::Wait, |bytes| {
                self.client_flags(u32::from_be_bytes(bytes))
            }),
            Stage::OptionHead => staging
                .take::<16>()
                .map_or(Step::Wait, |bytes| self.option_head(&bytes)),
            Stage::OptionData { option, len } => {
                let Some(data) = staging.bytes().get(..len) else {
                    return Step::Wait;
                };
                let outcome = self.option(option, data, output);
                staging.consume(len);
                self.stage = Stage::OptionHead;
                match outcome {
                    Outcome::Next => Step::Again,
                    Outcome::Close(reason) => Step::Close(reason),
                    Outcome::Open(export) => {
                        let context = self.context_for.as_ref() == Some(&export.name);
                        let replies = Replies {
                            structured: self.structured,
                            allocation_context: self.structured && context,
                        };
                        Step::Open { export, replies }
                    }
                }
            }
            Stage::OptionSkip { option, left } => {
                let count = staging.bytes().len().min(left);
                staging.consume(count);
                if count < left {
                    let left = left - count;
                    self.stage = Stage::OptionSkip { option, left };
                    return Step::Wait;
                }
                self.stage = Stage::OptionHead;
                error(output, option, rep::ERR_TOO_BIG, "the option is too long");
                Step::Again
            }
        }
    }

    fn client_flags(&mut self, flags: u32) -> Step {
        let known = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
        if flags & !u32::from(known) != 0 {
            return Step::Close(CloseReason::Malformed("the client set unknown flags"));
        }
        if flags & u32::from(handshake::FIXED_NEWSTYLE) == 0 {
            return Step::Close(CloseReason::Malformed(
                "the client doesn't speak the fixed newstyle protocol",
            ));
        }
        self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
        self.stage = Stage::OptionHead;
        Step::Again
    }

    fn option_head(&mut self, bytes: &[u8; 16]) -> Step {
        let mut reader = Reader(bytes);
        let (Some(IHAVEOPT), Some(option), Some(len)) = (reader.u64(), reader.u32(), reader.u32())
        else {
            return Step::Close(CloseReason::Malformed(
                "an option doesn't start with its magic number",
            ));
        };
        self.options += 1;
        if self.options > MAX_OPTIONS {
            return Step::Close(CloseReason::Malformed("the client negotiates without end"));
        }
        let len = len as usize;
        if len <= MAX_OPTION {
            self.stage = Stage::OptionData { option, len };
        } else if option == opt::EXPORT_NAME {
            // This option has no error reply.
            return Step::Close(CloseReason::Malformed("an export name is too long"));
        } else {
            self.stage = Stage::OptionSkip { option, left: len };
        }
        Step::Again
    }

    fn option(&mut self, option: u32, data: &[u8], output: &mut Output) -> Outcome {
        match option {
            opt::EXPORT_NAME => return self.export_name(data, output),
            opt::ABORT => {
                reply(output, option, rep::ACK, &[]);
                return Outcome::Close(CloseReason::Disconnected);
            }
            opt::INFO | opt::GO => return self.info_or_go(option, data, output),
            opt::LIST if data.is_empty() => self.list(output),
            opt::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                reply(output, option, rep::ACK, &[]);
            }
            opt::LIST | opt::STRUCTURED_REPLY => {
                error(
                    output,
                    option,
                    rep::ERR_INVALID,
                    "this option carries no data",
                );
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => {
                self.meta_context(option, data, output);
            }
            // Among them STARTTLS: this listener is a Unix socket or a network of the cluster.
            _ => error(
                output,
                option,
                rep::ERR_UNSUP,
                "this server doesn't know the option",
            ),
        }
        Outcome::Next
    }

    /// Finds an export by name; no name means the only one.
    fn find(&self, name: &str) -> Result<&Export, (u32, String)> {
        let found = match (name, &*self.exports) {
            ("", [only]) => Some(only),
            _ => self.exports.iter().find(|export| export.name == name),
        };
        let Some(export) = found else {
            let why = if name.is_empty() {
                "name a volume to open".to_owned()
            } else {
                format!("there is no volume `{name}`")
            };
            return Err((rep::ERR_UNKNOWN, why));
        };
        match &export.unavailable {
            Some(why) => Err((rep::ERR_POLICY, why.clone())),
            None => Ok(export),
        }
    }

    fn export_name(&self, data: &[u8], output: &mut Output) -> Outcome {
        let Ok(name) = std::str::from_utf8(data) else {
            return Outcome::Close(CloseReason::Malformed("an export name is not UTF-8"));
        };
        match self.find(name) {
            Ok(export) => {
                output.put(&export.size.to_be_bytes());
                output.put(&transmission_flags(export, self.structured).to_be_bytes());
                if !self.no_zeroes {
                    output.put(&[0; 124]);
                }
                Outcome::Open(export.clone())
            }
            Err((_, why)) => Outcome::Close(CloseReason::NoExport {
                name: name.to_owned(),
                why,
            }),
        }
    }

    /// What can be opened here. Clients ask for the details of all that is listed and give up at the
    /// first refusal, so the others are left out; asked for by name they are refused with the reason.
    fn list(&self, output: &mut Output) {
        for export in self.exports.iter().filter(|one| one.unavailable.is_none()) {
            let mut data = string(&export.name);
            data.extend_from_slice(cut(&export.description).as_bytes());
            reply(output, opt::LIST, rep::SERVER, &data);
        }
        reply(output, opt::LIST, rep::ACK, &[]);
    }

    fn info_or_go(&self, option: u32, data: &[u8], output: &mut Output) -> Outcome {
        let Some((name, wanted)) = parse_info(data) else {
            error(
                output,
                option,
                rep::ERR_INVALID,
                "the option's data is malformed",
            );
            return Outcome::Next;
        };
        let export = match self.find(name) {
            Ok(export) => export,
            Err((code, why)) => {
                error(output, option, code, &why);
                return Outcome::Next;
            }
        };
        let mut item = info::EXPORT.to_be_bytes().to_vec();
        item.extend_from_slice(&export.size.to_be_bytes());
        item.extend_from_slice(&transmission_flags(export, self.structured).to_be_bytes());
        reply(output, option, rep::INFO, &item);

        let mut item = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [export.min_block, PREFERRED_BLOCK, MAX_REQUEST] {
            item.extend_from_slice(&size.to_be_bytes());
        }
        reply(output, option, rep::INFO, &item);

        for (kind, text) in [
            (info::NAME, &export.name),
            (info::DESCRIPTION, &export.description),
        ] {
            if wanted.contains(&kind) {
                let mut item = kind.to_be_bytes().to_vec();
                item.extend_from_slice(cut(text).as_bytes());
                reply(output, option, rep::INFO, &item);
            }
        }
        reply(output, option, rep::ACK, &[]);
        if option == opt::GO {
            Outcome::Open(export.clone())
        } else {
            Outcome::Next
        }
    }

    fn meta_context(&mut self, option: u32, data: &[u8], output: &mut Output) {
        let setting = option == opt::SET_META_CONTEXT;
        if setting {
            // Whatever comes of this one, the choice before it is void.
            self.context_for = None;
            if !self.structured {
                let text = "ask for structured replies first";
                return error(output, option, rep::ERR_INVALID, text);
            }
        }
        let Some((name, queries)) = parse_contexts(data) else {
            let text = "the option's data is malformed";
            return error(output, option, rep::ERR_INVALID, text);
        };
        let export = match self.find(name) {
            Ok(export) => export.name.clone(),
            Err((code, why)) => return error(output, option, code, &why),
        };
        let asked = if setting {
            queries.contains(&BASE_ALLOCATION)
        } else {
            queries.is_empty() || queries.contains(&BASE_ALLOCATION) || queries.contains(&"base:")
        };
        if asked {
            let id = if setting { BASE_ALLOCATION_ID } else { 0 };
            let mut item = id.to_be_bytes().to_vec();
            item.extend_from_slice(BASE_ALLOCATION.as_bytes());
            reply(output, option, rep::META_CONTEXT, &item);
        }
        if setting && asked {
            self.context_for = Some(export);
        }
        reply(output, option, rep::ACK, &[]);
    }
}

/// Flags of an export. Several connections are fine: a flush covers the writes of all of them.
fn transmission_flags(export: &Export, structured: bool) -> u16 {
    let mut flags = flag::HAS_FLAGS
        | flag::SEND_FLUSH
        | flag::SEND_FUA
        | flag::SEND_TRIM
        | flag::SEND_WRITE_ZEROES
        | flag::CAN_MULTI_CONN;
    if export.read_only {
        flags |= flag::READ_ONLY;
    }
    if structured {
        flags |= flag::SEND_DF;
    }
    flags
}

/// `INFO` and `GO`: the name and what is wanted. `None` when malformed.
fn parse_info(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut reader = Reader(data);
    let name = reader.string()?;
    let count = usize::from(reader.u16()?);
    if reader.0.len() != count * 2 {
        return None;
    }
    let wanted = (0..count).map_while(|_| reader.u16()).collect();
    Some((name, wanted))
}

/// The meta context options: the export's name and the queries. `None` when malformed.
fn parse_contexts(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut reader = Reader(data);
    let name = reader.string()?;
    let count = reader.u32()?;
    let mut queries = Vec::new();
    // Bounded by the data, not by the count: each query takes 4 bytes at least.
    for _ in 0..count {
        queries.push(reader.string()?);
    }
    reader.0.is_empty().then_some((name, queries))
}

/// A string with its length before it.
fn string(text: &str) -> Vec<u8> {
    let text = cut(text);
    let len = u32::try_from(text.len()).unwrap_or(0);
    let mut bytes = len.to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// Cut to what the protocol allows for a string.
fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_STRING)]
}

fn error(output: &mut Output, option: u32, code: u32, text: &str) {
    reply(output, option, code, cut(text).as_bytes());
}

fn reply(output: &mut Output, option: u32, kind: u32, data: &[u8]) {
    // Everything that is sent was cut to some kilobytes.
    let len = u32::try_from(data.len()).unwrap_or(0);
    output.put(&OPTION_REPLY_MAGIC.to_be_bytes());
    output.put(&option.to_be_bytes());
    output.put(&kind.to_be_bytes());
    output.put(&len.to_be_bytes());
    output.put(data);
}
