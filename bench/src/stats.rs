//! Statistics that are robust against other users of the machine: lower quartile, median, and a
//! bootstrap interval.

use portcullis_harness::dice::Dice;

/// Samples of one quantity, one for each round, in a group for each process or in one group. A process may be faster than
/// another in all of its rounds, so groups have equal weight.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<Vec<f64>>);

impl Samples {
    /// Adds one to the only group.
    pub(crate) fn push(&mut self, sample: f64) {
        match self.0.last_mut() {
            Some(group) => group.push(sample),
            None => self.0.push(vec![sample]),
        }
    }

    pub(crate) fn in_groups(groups: impl IntoIterator<Item = Vec<f64>>) -> Self {
        Self(groups.into_iter().collect())
    }

    /// The quantile of each group, interpolated between samples; the mean over the groups.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let groups = self.0.len() as f64;
        self.0.iter().map(|group| Self::quantile_of(group, share)).sum::<f64>() / groups
    }

    fn quantile_of(group: &[f64], share: f64) -> f64 {
        let mut sorted = group.to_vec();
        sorted.sort_by(f64::total_cmp);
        let place = share * sorted.len().saturating_sub(1) as f64;
        let low = place.floor() as usize;
        let Some(&value) = sorted.get(low) else { return f64::NAN };
        let next = sorted.get(low + 1).copied().unwrap_or(value);
        value + (next - value) * place.fract()
    }

    pub(crate) fn lower_quartile(&self) -> f64 {
        self.quantile(0.25)
    }

    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// A resample: these rounds of these groups.
    fn drawn(&self, choice: &[(usize, Vec<usize>)]) -> Self {
        let of = |(group, rounds): &(usize, Vec<usize>)| {
            let group = self.0.get(*group)?;
            Some(rounds.iter().filter_map(|round| group.get(*round).copied()).collect())
        };
        Self(choice.iter().filter_map(of).collect())
    }
}

/// A figure computed from several samples of the same rounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Estimate {
    /// The figure for verdicts. From lower quartiles, since disturbances make rounds slower. Samples are therefore times, not
    /// rates, whose lower quartile comes from disturbed rounds. For ratios by round, the median; for a p99 or a worst case,
    /// that value.
    pub(crate) judged: f64,
    /// The figure from medians. For a p99, the median of the resamples' p99.
    pub(crate) median: f64,
    /// Lower bound of a 90 % bootstrap interval of `judged`, over groups, or over rounds if there is one group. For a worst case,
    /// the best and the worst sample. NaN for a single sample.
    pub(crate) low: f64,
    /// Upper bound, see `low`.
    pub(crate) high: f64,
}

const DRAWS: usize = 1_000;

impl Estimate {
    /// Computes `figure` from one number of each of the samples.
    pub(crate) fn of<const N: usize>(samples: [&Samples; N], figure: impl Fn([f64; N]) -> f64) -> Self {
        let groups = samples.iter().map(|samples| samples.0.len()).min().unwrap_or_default();
        let rounds = |group: usize| samples.iter().map(|samples| samples.0.get(group).map_or(0, Vec::len)).min();
        let rounds: Vec<usize> = (0..groups).filter_map(rounds).collect();
        let mut random = Dice::new(rounds.iter().sum::<usize>() as u64);
        let mut drawn = Samples::default();
        for _ in 0..DRAWS {
            let mut choice: Vec<(usize, Vec<usize>)> = Vec::new();
            for _ in 0..groups {
                let group = random.below(groups);
                let rounds = rounds.get(group).copied().unwrap_or_default();
                // Groups differ more than their rounds, and resampling a few rounds would change their lower quartile.
                let of_rounds = |round| if groups > 1 { round } else { random.below(rounds) };
                choice.push((group, (0..rounds).map(of_rounds).collect()));
            }
            drawn.push(figure(samples.map(|samples| samples.drawn(&choice).lower_quartile())));
        }
        let (judged, median) = (figure(samples.map(Samples::lower_quartile)), figure(samples.map(Samples::median)));
        Self { judged, median, ..Self::NOTHING }.within(&drawn, rounds.iter().sum())
    }

    pub(crate) fn plain(samples: &Samples) -> Self {
        Self::of([samples], |[sample]| sample)
    }

    /// The ratio of two quantities that were measured one after the other in each round, so that a slow machine affects both.
    /// A round may be disturbed in either, so the median counts.
    pub(crate) fn by_the_round(over: &Samples, under: &Samples) -> Self {
        let rounds = over.0.iter().flatten().zip(under.0.iter().flatten());
        let ratios = Samples::in_groups([rounds.map(|(over, under)| over / under).collect()]);
        let found = Self::at(&ratios, 0.5);
        Self { median: found.judged, ..found }
    }

    /// A quantile of all samples.
    pub(crate) fn at(samples: &Samples, share: f64) -> Self {
        let all: Vec<f64> = samples.0.iter().flatten().copied().collect();
        let mut random = Dice::new(all.len() as u64);
        let mut drawn = Samples::default();
        for _ in 0..DRAWS {
            let choice = all.iter().filter_map(|_| all.get(random.below(all.len())).copied());
            drawn.push(Samples::quantile_of(&choice.collect::<Vec<_>>(), share));
        }
        let judged = Samples::quantile_of(&all, share);
        Self { judged, median: drawn.median(), ..Self::NOTHING }.within(&drawn, all.len())
    }

    /// The largest sample. Resampling cannot estimate a larger one.
    pub(crate) fn worst(samples: &Samples) -> Self {
        let all: Vec<f64> = samples.0.iter().flatten().copied().collect();
        let found =
            Self { judged: Samples::quantile_of(&all, 1.0), median: Samples::quantile_of(&all, 0.5), ..Self::NOTHING };
        if all.len() > 1 { Self { low: Samples::quantile_of(&all, 0.0), high: found.judged, ..found } } else { found }
    }

    /// A figure that was counted once, without a range.
    pub(crate) const fn exact(figure: f64) -> Self {
        Self { judged: figure, median: figure, ..Self::NOTHING }
    }

    /// Adds the interval of the resamples.
    fn within(self, drawn: &Samples, samples: usize) -> Self {
        if samples > 1 { Self { low: drawn.quantile(0.05), high: drawn.quantile(0.95), ..self } } else { self }
    }

    /// A figure that could not be measured.
    pub(crate) const NOTHING: Self = Self { judged: f64::NAN, median: f64::NAN, low: f64::NAN, high: f64::NAN };
}

/// Sides of a comparison.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Side {
    Ours,
    Theirs,
}

impl Side {
    /// Both, in random order.
    pub(crate) fn both(dice: &mut Dice) -> [Self; 2] {
        let mut sides = [Self::Ours, Self::Theirs];
        dice.shuffle(&mut sides);
        sides
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Samples {
        fn of(samples: impl IntoIterator<Item = f64>) -> Self {
            Self::in_groups([samples.into_iter().collect()])
        }
    }

    #[test]
    fn quantiles_lie_between_samples() {
        let samples = Samples::of([4.0, 1.0, 3.0, 2.0, 5.0]);
        assert_eq!((samples.lower_quartile(), samples.median(), samples.quantile(1.0)), (2.0, 3.0, 5.0));
        assert_eq!(Samples::of([1.0, 2.0]).median(), 1.5);
        assert!(Samples::default().median().is_nan());
    }

    #[test]
    fn a_ratio_of_steady_samples_is_certain() {
        let (one, two) = (Samples::of([2.0; 9]), Samples::of([4.0; 9]));
        let ratio = Estimate::of([&two, &one], |[two, one]| two / one);
        assert_eq!((ratio.judged, ratio.median, ratio.low, ratio.high), (2.0, 2.0, 2.0, 2.0));
    }

    #[test]
    fn a_lucky_process_counts_no_more_than_the_others() {
        let groups = Samples::in_groups([vec![1.0; 4], vec![3.0; 4], vec![8.0; 4]]);
        assert_eq!((groups.lower_quartile(), groups.median()), (4.0, 4.0));
        assert!(Samples::in_groups([vec![1.0], Vec::new()]).median().is_nan());
    }

    #[test]
    fn the_range_tells_of_processes_that_differ() {
        let pooled = Samples::of([1.0, 3.0, 8.0].into_iter().flat_map(|sample| [sample; 40]));
        let apart = Samples::in_groups([vec![1.0; 40], vec![3.0; 40], vec![8.0; 40]]);
        let range = |samples: &Samples| {
            let found = Estimate::plain(samples);
            (found.low, found.judged, found.high)
        };
        assert_eq!(range(&pooled), (1.0, 1.0, 1.0));
        let (low, found, high) = range(&apart);
        assert_eq!(found, 4.0);
        assert!(low < 2.0 && high > 6.0, "{low} … {high}");
    }

    #[test]
    fn a_rate_is_of_the_undisturbed_rounds() {
        let times = Samples::of([0.5, 0.5, 0.5, 0.5, 4.0, 5.0]);
        let rate = Estimate::of([&times], |[time]| 1.0 / time);
        assert_eq!((rate.judged, rate.median, rate.high), (2.0, 2.0, 2.0));
        assert!(rate.low < 2.0);
    }

    #[test]
    fn a_ratio_by_the_round_is_not_of_rounds_that_differ() {
        // The machine was slow in the last three rounds, and once in the middle of one.
        let (over, under) = (Samples::of([1.0, 1.0, 1.0, 3.0, 3.0, 3.0]), Samples::of([2.0, 2.0, 2.0, 6.0, 6.0, 2.0]));
        let ratio = Estimate::by_the_round(&over, &under);
        assert_eq!((ratio.judged, ratio.median, ratio.low), (0.5, 0.5, 0.5));
        assert!(Estimate::by_the_round(&Samples::default(), &under).judged.is_nan());
    }

    #[test]
    fn a_worst_and_a_p99_have_a_range_too() {
        let waits = Samples::of((1..=1_000).map(f64::from));
        let p99 = Estimate::at(&waits, 0.99);
        assert!((p99.judged - 990.0).abs() < 0.1 && (p99.median - 990.0).abs() < 2.0);
        assert!(p99.low < 988.0 && p99.low > 980.0 && p99.high > 992.0 && p99.high < 999.0, "{p99:?}");
        let worst = Estimate::worst(&Samples::of([3.0, 9.0, 4.0, 5.0]));
        assert_eq!((worst.judged, worst.median, worst.low, worst.high), (9.0, 4.5, 3.0, 9.0));
    }

    #[test]
    fn one_sample_tells_of_no_spread() {
        let one = Samples::of([7.0]);
        let (plain, ratio) = (Estimate::plain(&one), Estimate::by_the_round(&one, &one));
        for found in [plain, ratio, Estimate::at(&one, 0.99), Estimate::worst(&one)] {
            assert!(found.judged.is_finite() && found.low.is_nan() && found.high.is_nan(), "{found:?}");
        }
    }
}
