//! The book in docs/: built with mdBook, and checked.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use portcullis_harness::cargo::run;
use portcullis_harness::output::say;
use portcullis_harness::paths;

use crate::tools;

/// Documents beside the book.
const DOCUMENTS: [&str; 3] = ["README.md", "CONTRIBUTING.md", "SECURITY.md"];
/// Longest line of prose, in characters.
const COLUMNS: usize = 100;
/// What the names of source files end with.
const SOURCES: [&str; 8] = [".rs", ".toml", ".yaml", ".yml", ".json", ".sql", ".sh", ".md"];

/// Builds the book into target/book.
pub(crate) fn build() -> Result<()> {
    let mut mdbook = Command::new(tools::mdbook()?);
    mdbook.arg("build").arg(paths::workspace().join("docs"));
    run(mdbook)?;
    say(&format!("the book: {}", paths::target().join("book/index.html").display()));
    Ok(())
}

/// Checks links, anchors, paths of source files and the width of prose, on every page.
pub(crate) fn check() -> Result<()> {
    let book = paths::workspace().join("docs/src");
    let mut pages = paths::markdown_below(&book)?;
    pages.extend(DOCUMENTS.map(|name| paths::workspace().join(name)));
    let contents = std::fs::read_to_string(book.join("SUMMARY.md"))?;
    let mut faults = Vec::new();
    for page in &pages {
        let name = page.strip_prefix(paths::workspace()).unwrap_or(page).display();
        let text = std::fs::read_to_string(page).with_context(|| format!("cannot read {name}"))?;
        faults.extend(faults_of(page, &text).into_iter().map(|fault| format!("{name}:{fault}")));
        let listed = page.strip_prefix(&book).is_ok_and(|inside| contents.contains(&format!("({})", inside.display())));
        if page.starts_with(&book) && !page.ends_with("SUMMARY.md") && !listed {
            faults.push(format!("{name}: add the page to SUMMARY.md"));
        }
    }
    ensure!(faults.is_empty(), "{} faults in the documents:\n{}", faults.len(), faults.join("\n"));
    say(&format!("{} pages: links, anchors, paths and widths are right", pages.len()));
    Ok(())
}

/// What is wrong with a page, each fault after the number of its line.
fn faults_of(page: &Path, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    for (number, line) in prose(text) {
        let breakable = line.trim().contains(' ') && !line.trim_start().starts_with(['|', '[']);
        if breakable && line.chars().count() > COLUMNS {
            faults.push(format!("{number}: more than {COLUMNS} columns"));
        }
        for target in line.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target) {
            if let Err(why) = follow(page, target) {
                faults.push(format!("{number}: {why}"));
            }
        }
        // Code stands between the first and second backtick, the third and fourth, and so on.
        for code in line.split('`').skip(1).step_by(2).filter(|code| names_a_source(code)) {
            if !paths::workspace().join(code).exists() {
                faults.push(format!("{number}: there is no {code}"));
            }
        }
    }
    faults
}

/// The lines outside of fences, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    (1..).zip(text.lines()).filter(move |(_, line)| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    })
}

fn follow(page: &Path, target: &str) -> Result<(), String> {
    if target.starts_with("https://") || target.starts_with("http://") {
        return Ok(());
    }
    let (file, anchor) = target.split_once('#').map_or((target, None), |(file, anchor)| (file, Some(anchor)));
    let file = if file.is_empty() { page.to_owned() } else { page.with_file_name(file) };
    if !file.is_file() {
        return Err(format!("{target} leads to no file"));
    }
    let Some(anchor) = anchor else { return Ok(()) };
    let text = std::fs::read_to_string(&file).map_err(|error| format!("{target}: {error}"))?;
    let found = anchors(&text).contains(anchor);
    if found { Ok(()) } else { Err(format!("{target} leads to no heading")) }
}

/// The ids of the headings, as mdBook and GitHub make them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = prose(text).filter_map(|(_, line)| line.strip_prefix('#')).map(|line| line.trim_start_matches('#'));
    let id = |heading: &str| -> String {
        let kept = heading.trim().chars().filter(|char| char.is_alphanumeric() || " _-".contains(*char));
        kept.flat_map(char::to_lowercase).map(|char| if char == ' ' { '-' } else { char }).collect()
    };
    headings.map(id).collect()
}

/// Whether a piece of code in the text names a file or directory of the source code.
fn names_a_source(code: &str) -> bool {
    let plain = |char: char| char.is_ascii_alphanumeric() || "_-./".contains(char);
    let Some((first, _)) = code.split_once('/').filter(|(first, _)| !first.is_empty() && *first != "target") else {
        return false;
    };
    let known = code.ends_with('/') || SOURCES.iter().any(|ending| code.ends_with(ending));
    code.chars().all(plain) && (known || paths::workspace().join(first).is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_links_anchors_paths_and_widths_are_found_and_right_ones_are_not() {
        let page = paths::find_workspace().unwrap().join("docs/src/introduction.md");
        let faults = |text: &str| faults_of(&page, text);
        let right = "[a](#when-to-choose-it) [b](concepts.md#policies) `docs/book.toml`, \
                     `application/json`, <https://example.com>\n```sh\n`docs/none.rs`\n```\n";
        assert_eq!(faults(right), [""; 0]);
        assert!(anchors("## A heading, `x_y`\n").contains("a-heading-x_y"));
        assert_eq!(faults("[a](none.md)\n"), ["1: none.md leads to no file"]);
        assert_eq!(faults("\n[a](#none)\n"), ["2: #none leads to no heading"]);
        assert_eq!(
            faults("`docs/none` and `none/none.rs`"),
            ["1: there is no docs/none", "1: there is no none/none.rs"]
        );
        assert_eq!(faults(&"word ".repeat(21)), ["1: more than 100 columns"]);
    }
}
