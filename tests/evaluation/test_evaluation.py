"""Metrics against scikit-learn, scipy and values worked by hand."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics

from eupmu_jax import evaluation


def softmax_sample(seed, n=200, classes=4, sharpness=1.0):
    rng = np.random.default_rng(seed)
    return scipy.special.softmax(sharpness * rng.normal(size=(n, classes)), -1), rng.integers(0, classes, n)


def test_accuracy_equals_scikit_learn():
    p, y = softmax_sample(0)
    assert evaluation.accuracy(p, y) == 100 * sklearn.metrics.accuracy_score(y, p.argmax(-1))


def test_kl_equals_scipy():
    (q, _), (p, _) = softmax_sample(0), softmax_sample(1)
    np.testing.assert_allclose(evaluation.kl_divergence(q, p), scipy.stats.entropy(q, p, axis=-1).mean())
    assert evaluation.kl_divergence(q, q) == 0
    assert evaluation.kl_divergence([[1.0, 0.0]], [[0.0, 1.0]]) == np.inf
    assert evaluation.kl_divergence([[1.0, 0.0]], [[1.0, 0.0]]) == 0


def test_features_by_hand():
    features = evaluation.membership_features([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]], [0, 1])
    np.testing.assert_array_equal(features["correctness"], [[1], [0]])
    np.testing.assert_array_equal(features["confidence"], [[0.7], [0.2]])
    entropy = scipy.stats.entropy([0.7, 0.2, 0.1])
    np.testing.assert_allclose(features["entropy"], [[entropy], [entropy]])
    first = -0.3 * np.log(0.7) - 0.2 * np.log(0.8) - 0.1 * np.log(0.9)
    second = -0.8 * np.log(0.2) - 0.7 * np.log(0.3) - 0.1 * np.log(0.9)
    np.testing.assert_allclose(features["modified_entropy"], [[first], [second]])
    np.testing.assert_array_equal(features["probability"], [[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]])


def test_features_of_certainty_are_finite_and_modified_entropy_knows_the_label():
    """Entropy cannot tell a certain right answer from a certain wrong one; modified entropy can."""
    features = evaluation.membership_features([[1.0, 0.0], [1.0, 0.0]], [0, 1])
    assert all(np.all(np.isfinite(feature)) for feature in features.values())
    np.testing.assert_array_equal(features["entropy"], 0)
    assert features["modified_entropy"][0] == 0
    assert features["modified_entropy"][1] > 100


def test_attack_tells_apart_what_is_apart():
    p_sure, p_unsure = np.tile([0.98, 0.01, 0.01], (60, 1)), np.tile([0.4, 0.35, 0.25], (60, 1))
    labels = np.zeros(60, int)
    sure, unsure = (p_sure, labels), (p_unsure, labels)
    remembered = evaluation.membership_attack(sure, sure, unsure)
    forgotten = evaluation.membership_attack(unsure, sure, unsure)
    for name in ("confidence", "entropy", "modified_entropy", "probability"):
        assert (remembered[name], forgotten[name]) == (0, 100)
    assert (remembered["auc"], forgotten["auc"]) == (1.0, 0.5)


def test_attack_is_the_protocols_svc():
    forget, members, others = (
        softmax_sample(0, 50),
        softmax_sample(1, 300, sharpness=3.0),
        softmax_sample(2, 120),
    )
    confidence = lambda part: part[0][np.arange(len(part[1])), part[1]][:, None]
    seen = np.concatenate([confidence(members)[:120], confidence(others)])
    svc = sklearn.svm.SVC(C=3, gamma="auto").fit(seen, [1] * 120 + [0] * 120)
    expected = 100 * np.mean(svc.predict(confidence(forget)) == 0)
    result = evaluation.membership_attack(forget, members, others)
    assert result["confidence"] == pytest.approx(expected)
    scores = np.concatenate([confidence(forget), confidence(others)])
    auc = sklearn.metrics.roc_auc_score([1] * 50 + [0] * 120, scores)
    assert result["auc"] == pytest.approx(auc)
    assert result.keys() == evaluation.membership_features(*forget).keys() | {"auc"}


def test_scores_by_hand():
    zero = lambda labels: (np.tile([0.9, 0.1], (len(labels), 1)), np.array(labels))
    scores = evaluation.classification_scores(zero([0, 1]), zero([0, 1, 1, 0]), zero([1, 1]))
    assert (scores["UA"], scores["RA"], scores["TA"]) == (50, 50, 0)
    retrain = {"UA": 60, "RA": 40, "TA": 4, "MIA": scores["MIA"]}
    assert evaluation.average_gap(scores, retrain) == 6
    assert evaluation.tug_of_war(scores, retrain) == pytest.approx(0.9 * 0.9 * 0.96)
    assert evaluation.tug_of_war(retrain, retrain) == 1


def test_a_diverged_network_scores_nothing():
    part = np.full((3, 2), np.nan), np.array([0, 1, 0])
    scores = evaluation.classification_scores(part, part, part)
    assert list(scores) == ["UA", "RA", "TA", "MIA"]
    assert all(np.isnan(score) for score in scores.values())


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((10.0, 20.0), False),
        ((15.0, 25.0), False),
        ((15.5, 20.0), True),
        ((10.0, 25.5), True),
        ((0.0, 25.5), True),
        ((0.0, 0.0), False),
    ],
)
def test_is_over_forgetting(scores, expected):
    """Beyond Retrain by more than 5 points in either figure; what one lacks does not make up for it."""
    retrain = {"UA": 10.0, "MIA": 20.0}
    got = evaluation.is_over_forgetting(dict(zip(("UA", "MIA"), scores, strict=True)), retrain)
    assert got is expected


def test_is_over_forgetting_by_another_margin():
    assert evaluation.is_over_forgetting({"UA": 11.0, "MIA": 20.0}, {"UA": 10.0, "MIA": 20.0}, margin=0.5)
    assert not evaluation.is_over_forgetting({"UA": 19.0, "MIA": 20.0}, {"UA": 10.0, "MIA": 20.0}, margin=10)


@pytest.mark.parametrize("name", ["UA", "MIA"])
def test_is_over_forgetting_of_a_diverged_network(name):
    retrain = {"UA": 10.0, "MIA": 20.0}
    for pair in [(retrain | {name: np.nan}, retrain), (retrain, retrain | {name: np.nan})]:
        with pytest.raises(ValueError, match=f"{name} must not be NaN"):
            evaluation.is_over_forgetting(*pair)
    other = "MIA" if name == "UA" else "UA"
    with pytest.raises(ValueError, match=name):
        evaluation.is_over_forgetting({name: np.nan, other: 100.0}, retrain)
    with pytest.raises(KeyError):
        evaluation.is_over_forgetting({name: 1.0}, retrain)


@pytest.mark.parametrize(
    ("probabilities", "labels", "match"),
    [
        ([0.5, 0.5], [0], r"shape \[n, classes\]"),
        (np.zeros((0, 2)), np.zeros(0, int), "n >= 1"),
        ([[2.0, -1.0]], [0], "softmax"),
        ([[3.0, 4.0]], [0], "softmax"),
        ([[np.nan, 1.0]], [0], "softmax"),
        ([[0.5, 0.5]], [0, 1], "labels must be integers of shape"),
        ([[0.5, 0.5]], [0.0], "labels must be integers"),
        ([[0.5, 0.5]], [2], r"labels must lie in \[0, 2\)"),
        ([[0.5, 0.5]], [-1], "labels must lie in"),
    ],
)
def test_bad_predictions(probabilities, labels, match):
    for metric in (evaluation.accuracy, evaluation.membership_features):
        with pytest.raises(ValueError, match=match):
            metric(probabilities, labels)


def test_kl_of_other_shapes():
    with pytest.raises(ValueError, match="one shape"):
        evaluation.kl_divergence([[0.5, 0.5]], [[0.5, 0.25, 0.25]])
