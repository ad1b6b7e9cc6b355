//! A short form of fuzzing, on stable: every entry point with its corpus, with a damaged corpus, and with random bytes.

#[path = "../../../tests/fuzz/src/lib.rs"]
mod entrances;

use entrances::ENTRANCES;
use portcullis_tests::paths;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};

/// Cases for each entry point and kind; some seconds in all. `PROPTEST_CASES` asks for more.
const CASES: u32 = 2_000;

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let home = paths::workspace().join("tests/fuzz/corpus").join(name);
    let files = std::fs::read_dir(&home).unwrap_or_else(|error| panic!("{}: {error}", home.display()));
    files.map(|file| std::fs::read(file.unwrap().path()).unwrap()).collect()
}

fn runner() -> TestRunner {
    let cases = Config::default().cases.max(CASES);
    TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() })
}

#[test]
fn every_entry_point_takes_its_corpus() {
    for (name, entrance) in ENTRANCES {
        let corpus = corpus(name);
        assert!(corpus.len() >= 3, "{name} has no corpus to speak of");
        corpus.iter().for_each(|bytes| entrance(bytes));
    }
}

#[test]
fn every_entry_point_takes_whatever_chance_brings() {
    for (name, entrance) in ENTRANCES {
        let bytes = runner().run(&vec(any::<u8>(), 0..300), |bytes| {
            entrance(&bytes);
            Ok(())
        });
        bytes.unwrap_or_else(|error| panic!("{name}: {error}"));
        let text = runner().run(&"\\PC{0,120}", |text| {
            entrance(text.as_bytes());
            Ok(())
        });
        text.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn every_entry_point_takes_its_corpus_damaged() {
    for (name, entrance) in ENTRANCES {
        let corpus = corpus(name);
        let damage = (any::<Index>(), vec((any::<Index>(), any::<u8>(), 0_u8..4), 1..6));
        let run = runner().run(&damage, |(which, damages)| {
            let mut bytes = corpus[which.index(corpus.len())].clone();
            for (place, byte, kind) in damages {
                let at = place.index(bytes.len() + 1);
                match kind {
                    0 => bytes.insert(at, byte),
                    1 => bytes.truncate(at),
                    2 => bytes.extend_from_within(at..),
                    _ => bytes.iter_mut().skip(at).take(1).for_each(|old| *old ^= byte),
                }
            }
            entrance(&bytes);
            Ok(())
        });
        run.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}
