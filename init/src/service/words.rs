//! A command line without a shell: an array, or a string that is split into words.

use serde::Deserialize;

/// Program and arguments; never empty, and no word holds a NUL.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
pub struct Words(Vec<String>);

/// As it stands in the file.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or an array of strings")]
enum Written {
    Text(String),
    List(Vec<String>),
}

impl Words {
    /// The program, as written.
    pub fn program(&self) -> &str {
        &self.0[0]
    }

    /// The program and its arguments.
    pub fn as_slice(&self) -> &[String] {
        &self.0
    }
}

impl TryFrom<Written> for Words {
    type Error = &'static str;

    fn try_from(written: Written) -> Result<Self, Self::Error> {
        let words = match written {
            Written::Text(text) => split(&text)?,
            Written::List(list) => list,
        };
        match words.first() {
            None => Err("the command is empty"),
            Some(program) if program.is_empty() => Err("the program's name is empty"),
            _ if words.iter().any(|word| word.contains('\0')) => Err("a word holds a NUL"),
            _ => Ok(Words(words)),
        }
    }
}

/// Splits at blanks; single and double quotes keep blanks, nothing is expanded.
fn split(text: &str) -> Result<Vec<String>, &'static str> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for letter in text.chars() {
        match quote {
            Some(open) if letter == open => quote = None,
            None if letter == '"' || letter == '\'' => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            None if letter.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(letter),
        }
    }
    if quote.is_some() {
        return Err("a quote is not closed");
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitting() {
        let check = |text, expected: &[&str]| assert_eq!(split(text).unwrap(), expected, "{text}");
        check("", &[]);
        check("  /bin/true  ", &["/bin/true"]);
        check("sh -c 'echo  hi; exit 1'", &["sh", "-c", "echo  hi; exit 1"]);
        check("a \"it's\" ''", &["a", "it's", ""]);
        check("--name='x y'z", &["--name=x yz"]);
        check("$HOME *.c a\\ b", &["$HOME", "*.c", "a\\", "b"]);
        assert!(split("echo 'open").is_err());
    }
}
