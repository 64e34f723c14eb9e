//! `vsctl doctor`

use anyhow::Result;
use serde::Serialize;

use super::output::{self, Paint};
use crate::doctor::{Finding, Verdict, host, remains};
use crate::failure::Exit;
use crate::site::Site;

/// Say what this host lacks and what was left behind; exit 0 when it is healthy or all was mended.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Mend what was left behind.
    #[arg(long)]
    fix: bool,
    /// Print what --fix would mend, and change nothing.
    #[arg(long, conflicts_with = "fix")]
    plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Told<'a> {
    healthy: bool,
    host: &'a [Finding],
    remains: &'a [Finding],
}

/// Runs the command.
///
/// # Errors
/// When the site's directories cannot be read.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let host = if args.plan { Vec::new() } else { host::examine(site) };
    let remains = remains::examine(site, args.fix)?;
    let healthy = !host.iter().chain(&remains).any(|finding| finding.verdict.is_bad());
    if args.json {
        output::json(&Told { healthy, host: &host, remains: &remains })?;
    } else if args.plan {
        let mend = |finding: &Finding| format!("mend {}: {}", finding.subject, finding.detail);
        output::sentences(&remains.iter().map(mend).collect::<Vec<_>>(), false)?;
        return Ok(0);
    } else {
        output::text(&render(&host, &remains, Paint::of_output()))?;
    }
    Ok(if healthy || args.plan { 0 } else { Exit::Failed as i32 })
}

fn render(host: &[Finding], remains: &[Finding], paint: Paint) -> String {
    let mut text = String::new();
    let all = || host.iter().chain(remains);
    let width = all().map(|finding| finding.subject.len()).max().unwrap_or(0).min(40);
    for finding in all() {
        // Padded before it is painted: colours have no width.
        let word = format!("{:<7}", finding.verdict.as_str());
        let word = match finding.verdict {
            Verdict::Ok | Verdict::Mended => paint.green(&word),
            Verdict::Warning => paint.yellow(&word),
            Verdict::Missing | Verdict::Left => paint.red(&word),
        };
        let line = format!("{word}  {:<width$}  {}", finding.subject, output::plain(&finding.detail));
        text.push_str(&format!("{}\n", line.trim_end()));
        if let Some(remedy) = &finding.remedy {
            text.push_str(&format!("{:7}  hint: {}\n", "", output::plain(remedy)));
        }
    }
    let count = |verdict: Verdict| all().filter(|finding| finding.verdict == verdict).count();
    let (missing, left, warnings) = (count(Verdict::Missing), count(Verdict::Left), count(Verdict::Warning));
    text.push_str(&match (missing, left) {
        (0, 0) if remains.is_empty() => format!("\nhealthy; nothing was left behind, {warnings} warnings\n"),
        (0, 0) => format!("\nhealthy; {} things were mended, {warnings} warnings\n", count(Verdict::Mended)),
        _ => format!("\nnot healthy: {missing} missing, {left} left behind, {warnings} warnings\n"),
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_lines_with_their_remedy() {
        let finding = |verdict, subject: &str, remedy: Option<&str>| Finding {
            verdict,
            subject: subject.into(),
            detail: "seen".into(),
            remedy: remedy.map(Into::into),
        };
        let host = [finding(Verdict::Ok, "kernel", None), finding(Verdict::Missing, "nft", Some("install it"))];
        let expected = "ok       kernel  seen\n\
                        missing  nft     seen\n         hint: install it\n\n\
                        not healthy: 1 missing, 0 left behind, 0 warnings\n";
        assert_eq!(render(&host, &[], Paint::none()), expected);
        let mended = [finding(Verdict::Mended, "link vs-7", None)];
        let text = render(&[], &mended, Paint::none());
        assert_eq!(text, "mended   link vs-7  seen\n\nhealthy; 1 things were mended, 0 warnings\n");
    }
}
