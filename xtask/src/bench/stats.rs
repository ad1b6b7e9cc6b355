//! Samples come in, figures that other users of the machine disturb little go out: lower quartile, median, and the range
//! in which they would lie if the run were made again.

/// Samples of one thing, one a round.
#[derive(Clone, Debug, Default)]
pub(super) struct Samples(Vec<f64>);

impl Samples {
    pub(super) fn push(&mut self, sample: f64) {
        self.0.push(sample);
    }

    pub(super) fn of(samples: impl IntoIterator<Item = f64>) -> Self {
        Self(samples.into_iter().collect())
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The value below which this share of the samples lies, between two of them where it falls between.
    pub(super) fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        #[expect(clippy::cast_precision_loss, reason = "there are few samples")]
        let place = share * sorted.len().saturating_sub(1) as f64;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place within the samples")]
        let low = place.floor() as usize;
        let Some(&value) = sorted.get(low) else { return f64::NAN };
        let next = sorted.get(low + 1).copied().unwrap_or(value);
        value + (next - value) * place.fract()
    }

    pub(super) fn lower_quartile(&self) -> f64 {
        self.quantile(0.25)
    }

    pub(super) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The samples of these rounds.
    fn drawn(&self, rounds: &[usize]) -> Self {
        Self(rounds.iter().filter_map(|round| self.0.get(*round).copied()).collect())
    }
}

/// A figure that is computed from several samples of the same rounds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Estimate {
    /// From lower quartiles. Whatever disturbs a round makes it slower, so this is what counts.
    pub(super) lower_quartile: f64,
    /// From medians.
    pub(super) median: f64,
    /// Within these lies the figure from lower quartiles for nine of ten choices of rounds (bootstrap).
    pub(super) low: f64,
    /// See `low`.
    pub(super) high: f64,
}

const DRAWS: usize = 1_000;

impl Estimate {
    /// Computes `figure` from one number of each of the samples.
    pub(super) fn of<const N: usize>(samples: [&Samples; N], figure: impl Fn([f64; N]) -> f64) -> Self {
        let rounds = samples.iter().map(|samples| samples.len()).min().unwrap_or_default();
        let mut random = Random::new(rounds as u64);
        let mut drawn = Samples::default();
        for _ in 0..DRAWS {
            let choice: Vec<usize> = (0..rounds).map(|_| random.below(rounds)).collect();
            drawn.push(figure(samples.map(|samples| samples.drawn(&choice).lower_quartile())));
        }
        Self {
            lower_quartile: figure(samples.map(Samples::lower_quartile)),
            median: figure(samples.map(Samples::median)),
            low: drawn.quantile(0.05),
            high: drawn.quantile(0.95),
        }
    }

    /// One number that was measured once.
    pub(super) const fn once(value: f64) -> Self {
        Self { lower_quartile: value, median: value, low: value, high: value }
    }
}

/// Random enough to shuffle with, and the same in every run (SplitMix64).
pub(super) struct Random(u64);

impl Random {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound.max(1) as u64).unwrap_or_default()
    }

    pub(super) fn shuffle<T>(&mut self, all: &mut [T]) {
        for place in (1..all.len()).rev() {
            all.swap(place, self.below(place + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!((ratio.lower_quartile, ratio.median, ratio.low, ratio.high), (2.0, 2.0, 2.0, 2.0));
    }

    #[test]
    fn a_shuffle_keeps_everything() {
        let mut all: Vec<usize> = (0..100).collect();
        Random::new(7).shuffle(&mut all);
        assert_ne!(all, (0..100).collect::<Vec<_>>());
        all.sort_unstable();
        assert_eq!(all, (0..100).collect::<Vec<_>>());
    }
}
