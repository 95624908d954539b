//! Orders that may lose data are confirmed with the volume's name.

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
    // Not to standard output: with --json that is for the answer alone.
    let mut terminal = std::io::stderr().lock();
    if !context.json {
        write!(terminal, "{}", render::loss(loss))?;
    }
    let name = &loss.volume;
    let confirm = match given {
        Some(given) => given,
        None if std::io::stdin().is_terminal() => {
            write!(terminal, "Type the name of the volume to go on: ")?;
            terminal.flush()?;
            let mut line = String::new();
            std::io::stdin().lock().read_line(&mut line)?;
            line.trim().to_owned()
        }
        None => {
            return Err(CliError::Input(format!(
                "nothing was done: data may be lost by it, and there is no terminal to ask on; if that is what you want: --confirm {name}"
            )));
        }
    };
    check(name, confirm)
}

fn check(name: &str, confirm: String) -> Result<ConfirmRequest, CliError> {
    if confirm == name {
        return Ok(ConfirmRequest { confirm });
    }
    Err(CliError::Input(format!(
        "nothing was done: `{confirm}` is not the name of the volume, which is `{name}`"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_name_confirms() {
        assert_eq!(check("mail", "mail".to_owned()).unwrap().confirm, "mail");
        for wrong in ["", "yes", "Mail", "mail "] {
            let error = check("mail", wrong.to_owned()).unwrap_err();
            assert!(error.to_string().contains("nothing was done"), "{error}");
        }
    }
}
