//! Orders that may lose data, or switch a node off, are confirmed with the name of what they are about.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use relevo_server::api::{ConfirmRequest, LossStatus};

use super::Context;
use crate::{CliError, render};

/// Shows what may be lost and asks for the volume's name; `given` answers for whoever has no terminal.
pub(super) fn confirm(
    context: &Context,
    loss: &LossStatus,
    given: Option<String>,
) -> Result<ConfirmRequest, CliError> {
    let confirm = ask(
        context,
        &render::loss(loss),
        Subject {
            kind: "volume",
            name: &loss.volume,
            risk: "data may be lost by it",
        },
        given,
    )?;
    Ok(ConfirmRequest { confirm })
}

/// What an order is about.
pub(super) struct Subject<'a> {
    /// `volume`, `node`.
    pub(super) kind: &'static str,
    /// Its name, which confirms.
    pub(super) name: &'a str,
    /// Why it has to be confirmed.
    pub(super) risk: &'static str,
}

/// Shows what is known and asks for the name; `given` answers for whoever has no terminal.
pub(super) fn ask(
    context: &Context,
    known: &str,
    subject: Subject<'_>,
    given: Option<String>,
) -> Result<String, CliError> {
    // Not to standard output: with --json that is for the answer alone.
    let mut terminal = std::io::stderr().lock();
    if !context.json {
        write!(terminal, "{known}")?;
    }
    let Subject { kind, name, risk } = subject;
    let confirm = match given {
        Some(given) => given,
        None if std::io::stdin().is_terminal() => {
            write!(terminal, "Type the name of the {kind} to go on: ")?;
            terminal.flush()?;
            let mut line = String::new();
            std::io::stdin().lock().read_line(&mut line)?;
            line.trim().to_owned()
        }
        None => {
            return Err(CliError::Input(format!(
                "nothing was done: {risk}, and there is no terminal to ask on; if that is what you want: --confirm {name}"
            )));
        }
    };
    check(kind, name, confirm)
}

fn check(kind: &str, name: &str, confirm: String) -> Result<String, CliError> {
    if confirm == name {
        return Ok(confirm);
    }
    Err(CliError::Input(format!(
        "nothing was done: `{confirm}` is not the name of the {kind}, which is `{name}`"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_name_confirms() {
        assert_eq!(check("volume", "mail", "mail".to_owned()).unwrap(), "mail");
        for wrong in ["", "yes", "Mail", "mail "] {
            let error = check("volume", "mail", wrong.to_owned()).unwrap_err();
            assert!(error.to_string().contains("nothing was done"), "{error}");
        }
    }
}
