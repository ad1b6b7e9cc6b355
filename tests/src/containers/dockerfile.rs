//! Parser of a Dockerfile and a .dockerignore, as far as this project uses them: stages, their
//! copies and their commands.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dockerfile {
    pub stages: Vec<Stage>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stage {
    pub name: String,
    /// The image or the stage that it starts from.
    pub base: String,
    pub copies: Vec<Copy>,
    pub runs: Vec<String>,
}

/// One COPY.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// The stage or image that the sources are in; without one, the build context.
    pub from: Option<String>,
    pub sources: Vec<String>,
}

impl Dockerfile {
    pub fn parse(text: &str) -> Result<Self> {
        let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
        let joined = lines.collect::<Vec<_>>().join("\n").replace("\\\n", " ");
        let mut stages = Vec::<Stage>::new();
        for line in joined.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (instruction, rest) = line.split_once(' ').unwrap_or((line, ""));
            if instruction == "FROM" {
                let words: Vec<&str> = rest.split_whitespace().collect();
                let [base, "AS", name] = words[..] else { bail!("Dockerfile: not FROM image AS name: {line}") };
                stages.push(Stage { name: name.into(), base: base.into(), ..Stage::default() });
                continue;
            }
            let stage = stages.last_mut().with_context(|| format!("Dockerfile: before the first FROM: {line}"))?;
            match instruction {
                "COPY" => stage.copies.push(Copy::parse(rest).with_context(|| format!("Dockerfile: {line}"))?),
                "RUN" => stage.runs.push(rest.to_owned()),
                "ARG" | "CMD" | "ENTRYPOINT" | "EXPOSE" | "USER" | "WORKDIR" => {}
                _ => bail!("Dockerfile: unexpected instruction: {line}"),
            }
        }
        Ok(Self { stages })
    }

    pub fn stage(&self, name: &str) -> Option<&Stage> {
        self.stages.iter().find(|stage| stage.name == name)
    }

    /// The image that a stage starts from in the end.
    pub fn image(&self, stage: &Stage) -> String {
        let mut base = &stage.base;
        // No chain is longer than the file.
        for _ in &self.stages {
            base = self.stage(base).map_or(base, |stage| &stage.base);
        }
        base.clone()
    }

    /// Sources that a build would not find.
    pub fn faults(&self, context: &Path, ignored: &Ignored) -> Vec<String> {
        let mut faults = Vec::new();
        for (index, stage) in self.stages.iter().enumerate() {
            for Copy { from, sources } in &stage.copies {
                let named = from.as_ref().map(|from| (from, self.stages[..index].iter().find(|s| s.name == *from)));
                for source in sources {
                    let fault = match named {
                        Some((from, None)) => Some(format!("there is no stage {from} before it")),
                        Some((from, Some(other))) => (!other.makes(source))
                            .then(|| format!("nothing that the stage {from} runs makes this path")),
                        None if !context.join(source).exists() => Some("it is not in the build context".into()),
                        None if ignored.matches(source) => Some(".dockerignore leaves it out".into()),
                        None => None,
                    };
                    faults
                        .extend(fault.map(|fault| format!("Dockerfile: stage {}: COPY {source}: {fault}", stage.name)));
                }
            }
        }
        faults
    }
}

impl Stage {
    /// Whether something that it runs names this absolute path.
    fn makes(&self, path: &str) -> bool {
        path.starts_with('/') && self.runs.iter().any(|run| run.split_whitespace().any(|word| word == path))
    }
}

impl Copy {
    fn parse(rest: &str) -> Result<Self> {
        let (flags, mut paths): (Vec<&str>, Vec<&str>) =
            rest.split_whitespace().partition(|word| word.starts_with("--"));
        paths.pop();
        ensure!(!paths.is_empty(), "COPY needs a source and a destination");
        let from = flags.iter().find_map(|flag| flag.strip_prefix("--from=")).map(ToOwned::to_owned);
        Ok(Self { from, sources: paths.into_iter().map(ToOwned::to_owned).collect() })
    }
}

/// The patterns of a .dockerignore that leaves everything out but what it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ignored {
    kept: Vec<String>,
}

impl Ignored {
    pub fn parse(text: &str) -> Self {
        Self { kept: text.lines().filter_map(|line| line.strip_prefix('!')).map(ToOwned::to_owned).collect() }
    }

    /// Whether it leaves this path out of the build context.
    pub fn matches(&self, path: &str) -> bool {
        let first = path.split('/').next().unwrap_or_default();
        first != "." && !self.kept.iter().any(|kept| kept == first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paths;

    fn faults(text: &str) -> Vec<String> {
        let ignored = Ignored::parse("*\n!envoy\n!Cargo.toml\n");
        Dockerfile::parse(text).unwrap().faults(paths::workspace(), &ignored)
    }

    #[test]
    fn a_source_is_looked_for_in_the_stage_that_it_is_copied_from() {
        let build = "FROM rust AS build\nRUN a \\\n && cp x /out/filter.wasm\n";
        let with = |copy: &str| faults(&format!("{build}FROM envoy AS envoy\n{copy}\n"));
        assert_eq!(with("COPY --from=build /out/filter.wasm ./\nCOPY envoy/minimal.yaml Cargo.toml ./"), [""; 0]);
        assert_eq!(
            with("COPY --from=build /out/filter.wasm envoy/minimal.yaml ./"),
            ["Dockerfile: stage envoy: COPY envoy/minimal.yaml: nothing that the stage build runs makes this path"]
        );
        assert_eq!(
            with("COPY --from=later /out/x ./"),
            ["Dockerfile: stage envoy: COPY /out/x: there is no stage later before it"]
        );
        assert_eq!(
            with("COPY envoy/none.yaml ./"),
            ["Dockerfile: stage envoy: COPY envoy/none.yaml: it is not in the build context"]
        );
        assert_eq!(
            with("COPY Cargo.lock ./"),
            ["Dockerfile: stage envoy: COPY Cargo.lock: .dockerignore leaves it out"]
        );
    }

    #[test]
    fn a_stage_has_the_image_of_the_stage_that_it_starts_from() {
        let dockerfile = Dockerfile::parse("FROM rust:1 AS a\nFROM a AS b\n# c\nFROM debian AS c\n").unwrap();
        assert_eq!(dockerfile.image(dockerfile.stage("b").unwrap()), "rust:1");
        assert_eq!(dockerfile.image(dockerfile.stage("c").unwrap()), "debian");
        assert!(Dockerfile::parse("FROM rust\n").is_err());
        assert!(Dockerfile::parse("FROM rust AS a\nADD x y\n").is_err());
        assert!(Dockerfile::parse("FROM rust AS a\nCOPY x\n").is_err());
    }
}
