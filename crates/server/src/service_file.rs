//! A service as a TOML file: `relevo service create --file`.
//!
//! Strict: an unknown key, a wrong type, a missing value is refused with file, line, column and
//! the place in the text. The content is the same as of the API call
//! ([`CreateServiceRequest`]):
//!
//! ```toml
//! name = "mail"
//! on = "alfa"
//!
//! [[parts]]
//! volume = { name = "mail" }
//!
//! [[parts]]
//! mount = { volume = "mail", at = "/srv/mail" }
//!
//! [[parts]]
//! address = { address = "192.168.1.1/24" }
//!
//! [[parts]]
//! process = { command = ["/usr/sbin/maild", "--foreground"], ready = "192.168.1.1:25" }
//! ```

use std::{fs, ops::Range, path::Path};

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};

use crate::api::CreateServiceRequest;

/// The longest file that is read; a service is a page of text.
const FILE_MAX: u64 = 1 << 20;

/// Reads a service from a file.
///
/// # Errors
/// The complete text for a terminal: what is wrong, where, and what is accepted.
pub fn read(file: &Path) -> Result<CreateServiceRequest, String> {
    let failed = |why: String| format!("the service file {} was not read: {why}", file.display());
    let length = fs::metadata(file).map_err(|e| failed(e.to_string()))?.len();
    if length > FILE_MAX {
        return Err(failed(format!(
            "it has {length} bytes; a service is at most {FILE_MAX}"
        )));
    }
    let text = fs::read_to_string(file).map_err(|e| failed(e.to_string()))?;
    parse(&file.display().to_string(), &text)
}

/// Reads a service from text; `name` is the file's name for messages.
///
/// # Errors
/// As [`read`].
pub fn parse(name: &str, text: &str) -> Result<CreateServiceRequest, String> {
    toml::from_str(text).map_err(|error| {
        let span = error.span().unwrap_or(0..0);
        point_at(name, text, span, error.message())
    })
}

/// An error with the place it is about: file, line, column, the line itself and a caret.
fn point_at(name: &str, text: &str, span: Range<usize>, message: &str) -> String {
    let (title, label) = match message.split_once(", expected ") {
        Some((title, expected)) => (title, format!("expected {expected}")),
        None => (message, String::new()),
    };
    // A caret needs something to point at, also at the end of the text.
    let start = span.start.min(text.len());
    let end = span.end.clamp(start, text.len());
    let snippet = Snippet::source(text)
        .path(name)
        .line_start(1)
        .annotation(AnnotationKind::Primary.span(start..end).label(&label));
    let group = Level::ERROR.primary_title(title).element(snippet);
    Renderer::plain().render(&[group])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::PartRequest;

    const GOOD: &str = r#"
name = "mail"
on = "alfa"

[[parts]]
volume = { name = "mail" }

[[parts]]
mount = { volume = "mail", at = "/srv/mail" }

[[parts]]
address = { address = "192.168.1.1/24", interface = "eth0" }

[[parts]]
[parts.process]
command = ["/usr/sbin/maild", "-f"]
ready = "192.168.1.1:25"
environment = { LANG = "C" }
"#;

    #[test]
    fn a_good_file() {
        let service = parse("mail.toml", GOOD).unwrap();
        assert_eq!(service.name, "mail");
        assert_eq!(service.on.as_deref(), Some("alfa"));
        assert_eq!(service.parts.len(), 4);
        let PartRequest::Volume(volume) = &service.parts[0] else {
            panic!("{:?}", service.parts[0])
        };
        assert!(volume.device);
        let PartRequest::Mount(mount) = &service.parts[1] else {
            panic!("{:?}", service.parts[1])
        };
        assert_eq!(mount.filesystem, "ext4");
        assert!(mount.make);
    }

    #[test]
    fn an_unknown_key_is_pointed_at() {
        let text = GOOD.replace("interface =", "interfaces =");
        let error = parse("mail.toml", &text).unwrap_err();
        assert!(error.contains("unknown field `interfaces`"), "{error}");
        assert!(
            error.contains("expected `address` or `interface`"),
            "{error}"
        );
        assert!(error.contains("mail.toml:12:41"), "{error}");
        assert!(error.contains("^^^^^^^^^^"), "{error}");
    }

    #[test]
    fn a_wrong_type_is_pointed_at() {
        let text = GOOD.replace("[\"/usr/sbin/maild\", \"-f\"]", "\"/usr/sbin/maild\"");
        let error = parse("mail.toml", &text).unwrap_err();
        assert!(error.contains("invalid type: string"), "{error}");
        assert!(error.contains("expected a sequence"), "{error}");
        assert!(error.contains("mail.toml:16:11"), "{error}");
    }

    #[test]
    fn what_is_no_toml_is_pointed_at() {
        let error = parse("mail.toml", "name = \n").unwrap_err();
        assert!(error.contains("mail.toml:1:"), "{error}");
        let error = parse("mail.toml", "").unwrap_err();
        assert!(error.contains("missing field `name`"), "{error}");
    }

    #[test]
    fn an_unknown_part_is_refused() {
        let text = GOOD.replace("volume = {", "volumes = {");
        let error = parse("mail.toml", &text).unwrap_err();
        assert!(error.contains("unknown variant `volumes`"), "{error}");
    }

    #[test]
    fn a_file_that_is_not_there() {
        let error = read(Path::new("/nonexistent/mail.toml")).unwrap_err();
        assert!(error.contains("/nonexistent/mail.toml"), "{error}");
    }
}
