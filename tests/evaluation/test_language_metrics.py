"""What language models are judged by, against brute force, scipy, scikit-learn and values worked by hand."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from eupmu_jax import evaluation


def random_rows(seed, n=200, length=9):
    """Hits and a mask with holes, in which something counts in each row."""
    rng = np.random.default_rng(seed)
    mask = rng.random((n, length)) < rng.choice([0.2, 0.7, 1.0], (n, 1))
    mask[np.arange(n), rng.integers(length, size=n)] = True
    return rng.random((n, length)) < rng.choice([0.3, 0.9, 1.0], (n, 1)), mask


# Extraction


def test_extraction_by_brute_force():
    """Token by token, with the suffixes of open-unlearning tried one after the other."""
    hits, mask = random_rows(0)
    shares = [function(hits, mask) for function in (
        evaluation.exact_memorisation, evaluation.verbatim_prefix, evaluation.extraction_strength,
    )]  # fmt: skip
    for row in range(len(hits)):
        answer = [bool(hit) for hit, counts in zip(hits[row], mask[row], strict=True) if counts]
        n = len(answer)
        prefix = next(k for k in range(n, -1, -1) if all(answer[:k]))
        suffix = next(n - k for k in range(n + 1) if all(answer[k:]))
        assert [share[row] for share in shares] == [sum(answer) / n, prefix / n, suffix / n]


def test_extraction_by_hand():
    hits = np.array([[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]], bool)
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1]], bool)
    assert evaluation.exact_memorisation(hits, mask).tolist() == [0.75, 1, 1, 0]
    assert evaluation.verbatim_prefix(hits, mask).tolist() == [0.5, 1, 1, 0]
    assert evaluation.extraction_strength(hits, mask).tolist() == [0.25, 1, 1, 0]


def test_prompt_and_padding_say_nothing():
    hits, mask = random_rows(1)
    for function in (
        evaluation.exact_memorisation,
        evaluation.verbatim_prefix,
        evaluation.extraction_strength,
    ):
        np.testing.assert_array_equal(function(hits & mask, mask), function(hits | ~mask, mask))
        assert function(hits, mask).dtype == np.float64


@pytest.mark.parametrize(
    ("hits", "mask", "error", "match"),
    [
        (np.ones((1, 2)), np.ones((1, 2), bool), TypeError, "hits must be boolean, got float64"),
        (np.ones((1, 2), bool), np.ones((1, 2), int), TypeError, "mask must be boolean"),
        (np.ones((1, 2), bool), np.ones((1, 3), bool), ValueError, r"one shape \[N, T\]"),
        (np.ones(2, bool), np.ones(2, bool), ValueError, r"one shape \[N, T\]"),
        (np.ones((2, 2), bool), np.array([[1, 0], [0, 0]], bool), ValueError, "not in row 1: leave it out"),
    ],
)
def test_bad_hits(hits, mask, error, match):
    for function in (
        evaluation.exact_memorisation,
        evaluation.verbatim_prefix,
        evaluation.extraction_strength,
    ):
        with pytest.raises(error, match=match):
            function(hits, mask)


# TOFU


def random_answers(seed, n=50, wrong=5):
    rng = np.random.default_rng(seed)
    lengths, wrong_lengths = rng.integers(1, 40, n), rng.integers(1, 40, (n, wrong))
    return -rng.gamma(2, lengths), lengths, -rng.gamma(2, wrong_lengths), wrong_lengths


def test_truth_ratio_is_the_papers_equation():
    right, lengths, wrong, wrong_lengths = random_answers(0)
    expected = np.mean(np.exp(wrong) ** (1 / wrong_lengths), -1) / np.exp(right) ** (1 / lengths)
    np.testing.assert_allclose(evaluation.truth_ratio(right, lengths, wrong, wrong_lengths), expected)


def test_truth_ratio_is_that_of_the_code():
    """Its 1 / exp(mean perturbed loss - paraphrased loss)."""
    right, lengths, wrong, wrong_lengths = random_answers(1)
    expected = 1 / np.exp(np.mean(-wrong / wrong_lengths, -1) - -right / lengths)
    got = evaluation.truth_ratio(right, lengths, wrong, wrong_lengths, mean="geometric")
    np.testing.assert_allclose(got, expected)
    assert np.all(got <= evaluation.truth_ratio(right, lengths, wrong, wrong_lengths))


def test_truth_ratio_of_a_ruined_model_is_no_overflow():
    """Probabilities that are 0 in float64 still have a ratio; infinite only where it is."""
    ratio = evaluation.truth_ratio(
        [-1e4, -1e6, -np.inf], [1, 1, 1], [[-1e4], [-1.0], [-1.0]], [[1], [1], [1]]
    )
    assert ratio.tolist() == [1, np.inf, np.inf]
    assert evaluation.forget_truth_ratio(ratio) == 1 / 3
    assert evaluation.utility_truth_ratio(ratio) == 0
    assert evaluation.forget_quality(ratio, ratio) == 1


def test_truth_ratio_scores_by_hand():
    ratios = [0.25, 1.0, 2.0, 0.0]
    assert evaluation.forget_truth_ratio(ratios) == (0.25 + 1 + 0.5 + 0) / 4
    assert evaluation.utility_truth_ratio(ratios) == (0.75 + 0 + 0 + 1) / 4


def test_forget_quality_by_counting_all_arrangements():
    """The exact p-value: the share of the ways to deal 9 values to two groups that are as far apart."""
    rng = np.random.default_rng(2)
    for shift in (0.0, 0.8, 5.0):
        unlearned, retrained = np.exp(rng.normal(size=4)), np.exp(rng.normal(shift, size=5))
        pool = np.concatenate([unlearned, retrained])

        def distance(chosen, pool=pool):
            is_first = np.isin(np.arange(9), chosen)
            order = is_first[np.argsort(pool)]
            return np.max(np.abs(np.cumsum(order) / 4 - np.cumsum(~order) / 5))

        observed = distance(range(4))
        ways = [distance(chosen) >= observed - 1e-12 for chosen in itertools.combinations(range(9), 4)]
        assert evaluation.forget_quality(unlearned, retrained) == pytest.approx(np.mean(ways))


@pytest.mark.parametrize("size", [40, 400])
def test_forget_quality_of_sets_that_share_nothing(size):
    """Two of all ways to deal them out are as far apart, down to 1e-239 for TOFU's forget10."""
    got = evaluation.forget_quality(np.linspace(0, 0.5, size), np.linspace(0.6, 2, size))
    assert got == pytest.approx(2 / math.comb(2 * size, size), rel=1e-6)


def test_forget_quality_does_not_ask_which_way_round_the_ratio_is():
    """TOFU's code compares the inverse of the paper's ratio."""
    rng = np.random.default_rng(3)
    a, b = np.exp(rng.normal(size=60)), np.exp(rng.normal(0.4, size=70))
    assert evaluation.forget_quality(a, b) == pytest.approx(evaluation.forget_quality(1 / a, 1 / b))
    assert evaluation.forget_quality(a, b) == evaluation.forget_quality(b, a)


@hypothesis.given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=12))
def test_model_utility_is_the_harmonic_mean(values):
    scores = {str(number): value for number, value in enumerate(values)}
    assert evaluation.model_utility(scores) == pytest.approx(scipy.stats.hmean(values))


def test_model_utility_of_what_is_lost():
    assert evaluation.model_utility({"a": 0.0, "b": 1.0}) == 0


def test_a_diverged_model_scores_nan():
    nan = np.nan
    ratio = evaluation.truth_ratio([nan, -1.0, -1.0], [1, 1, 1], [[-1.0], [nan], [-1.0]], [[1], [1], [1]])
    np.testing.assert_array_equal(ratio, [nan, nan, 1])
    assert math.isnan(evaluation.forget_truth_ratio(ratio))
    assert math.isnan(evaluation.utility_truth_ratio(ratio))
    assert math.isnan(evaluation.forget_quality(ratio, [1.0]))
    assert math.isnan(evaluation.forget_quality([1.0], ratio))
    assert math.isnan(evaluation.model_utility({"a": nan, "b": 1.0}))
    mask = np.array([[True, True, True], [True, True, False]])
    log_p = np.array([[-1.0, nan, -2.0], [-1.0, -2.0, nan]])
    np.testing.assert_array_equal(evaluation.min_k_log_probability(log_p, mask), [nan, -2])
    assert math.isnan(evaluation.priv_leak(([nan], [1.0]), ([1.0], [2.0])))
    assert math.isnan(evaluation.priv_leak(([1.0], [1.0]), ([1.0], [nan])))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([3.0], [2], [[-1.0]], [[1]]), "paraphrased_log_probability must be <= 0, got 3: pass log-prob"),
        (([-3.0], [2], [[1.0]], [[1]]), "perturbed_log_probability must be <= 0"),
        (([-3.0], [0], [[-1.0]], [[1]]), "paraphrased_length must be >= 1, got 0"),
        (([-3.0], [2], [[-1.0, -1.0]], [[1, 0]]), "perturbed_length must be >= 1"),
        (([-3.0], [2, 2], [[-1.0]], [[1]]), r"one shape \[N\], none of it 0; got \(1,\) and \(2,\)"),
        (([-3.0], [2], [-1.0], [1]), r"perturbed_log_probability and .* one shape \[N, A\]"),
        (([-3.0], [2], np.zeros((1, 0)), np.zeros((1, 0))), "none of it 0"),
        (([-3.0], [2], [[-1.0], [-1.0]], [[1], [1]]), "the same N, got 1 paraphrased and 2 perturbed"),
        (([-3.0], [2], [[-1.0]], [[1]], "median"), "mean must be"),
    ],
)
def test_bad_answers(arguments, match):
    with pytest.raises(ValueError, match=match):
        evaluation.truth_ratio(*arguments)


def test_bad_ratios_and_scores():
    for function in (evaluation.forget_truth_ratio, evaluation.utility_truth_ratio):
        with pytest.raises(
            ValueError, match="truth_ratios must be >= 0, got -1: pass what truth_ratio returns"
        ):
            function([1.0, -1.0])
        with pytest.raises(ValueError, match=r"shape \[N\]"):
            function([[1.0]])
    with pytest.raises(ValueError, match="unlearned must have the shape"):
        evaluation.forget_quality([], [1.0])
    with pytest.raises(ValueError, match="retrained must be >= 0"):
        evaluation.forget_quality([1.0], [-1.0])
    with pytest.raises(ValueError, match="at least one"):
        evaluation.model_utility({})
    for score in (57.0, -0.1):
        with pytest.raises(ValueError, match=r"in \[0, 1\], got .* for 'ROUGE'"):
            evaluation.model_utility({"truth": 0.5, "ROUGE": score})


# MUSE


def test_min_k_is_that_of_the_code():
    rng = np.random.default_rng(4)
    log_p, mask = -rng.gamma(1, 2, (40, 30)), random_rows(5, 40, 30)[1]
    for k in (0.05, 0.2, 0.4, 1.0):
        got = evaluation.min_k_log_probability(log_p, mask, k)
        for row in range(40):
            counted = log_p[row][mask[row]]
            lowest = np.sort(counted)[: max(1, int(len(counted) * k))]
            assert got[row] == pytest.approx(np.mean(lowest))
    whole = np.sum(log_p, -1, where=mask) / mask.sum(-1)
    np.testing.assert_allclose(evaluation.min_k_log_probability(log_p, mask, 1.0), whole)


def test_priv_leak_is_that_of_the_code():
    """Its area with hold-out texts as positives and minus the loss as score, by scikit-learn."""
    rng = np.random.default_rng(6)
    unlearned = rng.normal(-2, 1, 30).round(1), rng.normal(-3, 1, 50).round(1)
    retrained = rng.normal(-3, 1, 30).round(1), rng.normal(-3, 1, 50).round(1)
    truth = [0] * 30 + [1] * 50
    a, b = (sklearn.metrics.roc_auc_score(truth, np.concatenate(pair)) for pair in (unlearned, retrained))
    got = evaluation.priv_leak(unlearned, retrained)
    assert got == pytest.approx(100 * (a - b) / b)
    assert got < 0, "it still looks like training data"
    assert evaluation.priv_leak(retrained, retrained) == 0


def test_bad_memberships():
    ones = np.ones((1, 2), bool)
    for k in (0.0, 1.1, -1.0, 40, np.nan):
        with pytest.raises(ValueError, match=r"k must be in \(0, 1\]"):
            evaluation.min_k_log_probability([[-1.0, -2.0]], ones, k)
    with pytest.raises(ValueError, match="log_probabilities must be <= 0, got 2"):
        evaluation.min_k_log_probability([[1.0, 2.0]], ones)
    with pytest.raises(TypeError, match="mask must be boolean"):
        evaluation.min_k_log_probability([[-1.0, -2.0]], [[1, 1]])
    with pytest.raises(ValueError, match=r"one shape \[N, T\]"):
        evaluation.min_k_log_probability([-1.0, -2.0], ones)
    with pytest.raises(ValueError, match="row 0: leave it out"):
        evaluation.min_k_log_probability([[-1.0, -2.0]], ~ones)
    with pytest.raises(ValueError, match=r"unlearned must be \(forget \[n\], hold-out \[m\]\)"):
        evaluation.priv_leak(([], [1.0]), ([1.0], [1.0]))
    with pytest.raises(ValueError, match="retrained must be"):
        evaluation.priv_leak(([1.0], [1.0]), ([[1.0]], [1.0]))
    with pytest.raises(ValueError, match="hold-out texts of the same kind"):
        evaluation.priv_leak(([1.0], [2.0]), ([2.0], [1.0]))


# ROUGE-L


@pytest.mark.parametrize(
    ("reference", "candidate", "recall", "f1"),
    [
        ("police killed the gunman", "police kill the gunman", 3 / 4, 3 / 4),
        ("police killed the gunman", "the gunman kill police", 2 / 4, 2 / 4),
        ("It's 12 Mallow Row.", "12, mallow-row", 3 / 5, 6 / 8),
        ("the the the", "the", 1 / 3, 2 / 4),
        ("Née à Zürich", "nee a zurich", 0, 0),
        ("", "word", 0, 0),
        ("word", "...", 0, 0),
    ],
)
def test_rouge_l_by_hand(reference, candidate, recall, f1):
    """The first two are Lin's examples (2004); letters outside a-z end a word, as in rouge_score."""
    assert evaluation.rouge_l(reference, candidate) == (pytest.approx(recall), pytest.approx(f1))


words = st.lists(st.sampled_from("abc"), min_size=1, max_size=7)


@hypothesis.given(words, words)
def test_rouge_l_by_trying_all_subsequences(reference, candidate):
    subsequences = lambda text: {
        chosen for size in range(len(text) + 1) for chosen in itertools.combinations(text, size)
    }
    longest = max(map(len, subsequences(reference) & subsequences(candidate)))
    score = evaluation.rouge_l(" ".join(reference), " ".join(candidate))
    assert score.recall == longest / len(reference)
    precision = longest / len(candidate)
    harmonic = 2 * precision * score.recall / (precision + score.recall) if longest else 0
    assert score.f1 == pytest.approx(harmonic)
    assert score.f1 == evaluation.rouge_l(" ".join(candidate), " ".join(reference)).f1
