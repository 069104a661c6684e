"""k-NN against the definition, computed image by image; against scikit-learn; and the same whatever searched.

``test_knn_search.py`` has the searches by themselves.
"""

import math
from collections import defaultdict

import faiss
import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from downstream.evaluate import load_protocol
from downstream.knn import KNN, KNN_TASK, KNNProtocol, evaluate_knn
from downstream.task import Split
from mte_bench.errors import UserError
from mte_bench.knn_bank import normalise
from mte_bench.knn_vote import vote

K = (1, 10, 20, 60)


def clusters(n, width=24, classes=7, spread=1.0, seed=0):
    """Overlapping classes, so that neighbours disagree."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=n)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    return (centres[labels] + spread * 2 * generator.normal(size=(n, width))).astype(np.float32), labels


def unit(features):
    rows = torch.from_numpy(features)
    return (rows / rows.norm(dim=1, keepdim=True)).double().numpy()


def nearest_by_definition(bank, queries, k):
    """Similarity and bank index of the nearest ``k`` for each query: a matrix product and a sort, in float64 and plain Python."""
    found = []
    for row in unit(queries) @ unit(bank).T:
        rounded = [round(float(value), 10) for value in row]
        found.append([(rounded[i], i) for i in sorted(range(len(rounded)), key=lambda i: (-rounded[i], i))[:k]])
    return found


def by_definition(bank, labels, queries, k, temperature=0.07, nearest=None):
    """Classes by votes for each query: a sum and a sort."""
    ranked = []
    for row in nearest or nearest_by_definition(bank, queries, k):
        votes = defaultdict(float)
        for similarity, i in row[:k]:
            votes[int(labels[i])] += math.exp(similarity / temperature)
        found = sorted(votes, key=lambda c: (-votes[c], c))[:5]
        ranked.append(found + [-1] * (5 - len(found)))
    return np.array(ranked)


def duplicates():
    """A bank in which every image is there several times, under different labels."""
    bank, labels = clusters(150)
    order = np.random.default_rng(1).permutation(600)
    return np.tile(bank, (4, 1))[order], ((np.tile(labels, 4) + np.repeat([0, 1, 0, 2], 150)) % 7)[order], bank[::2]


def near_duplicates():
    """Neighbours closer to each other than float32 similarities can tell."""
    generator = np.random.default_rng(2)
    centres = generator.normal(size=(30, 24))
    bank = np.repeat(centres, 20, axis=0) + 3e-6 * generator.normal(size=(600, 24))
    return bank.astype(np.float32), generator.integers(7, size=600), centres.astype(np.float32)


def collapsed():
    """An encoder that says the same of every image."""
    labels = np.random.default_rng(3).integers(7, size=600)
    return np.ones((600, 24), np.float32), labels, np.ones((20, 24), np.float32)


CASES = {  # bank, labels, queries
    "clusters": (*clusters(900), clusters(300, seed=5)[0]),
    "duplicates": duplicates(),
    "near duplicates": near_duplicates(),
    "collapsed": collapsed(),
}


@pytest.mark.parametrize("case", CASES)
def test_every_prediction_is_that_of_a_plain_matrix_product_with_the_same_vote(case):
    bank, labels, queries = CASES[case]
    nearest = nearest_by_definition(bank, queries, max(K))
    for library in ("tiles", "torch", "faiss"):
        found = KNN(k=K, temperature=(0.07, 0.5), library=library).fit(bank, labels).predict(queries)
        assert list(found) == [(k, temperature) for k in K for temperature in (0.07, 0.5)]
        for k, temperature in found:
            expected = by_definition(bank, labels, queries, k, temperature, nearest)
            assert np.array_equal(found[k, temperature], expected), library


def test_float32_alone_would_get_near_duplicates_wrong():
    """The case above is one that needs the care that is taken of it."""
    bank, _, queries = near_duplicates()
    plain = faiss.knn(
        normalise(torch.from_numpy(queries)).numpy(), normalise(torch.from_numpy(bank)).numpy(), 10, faiss.METRIC_INNER_PRODUCT
    )
    exact = KNN(k=(10,)).fit(bank, np.arange(600)).neighbours(queries)[1]
    assert (plain[1] != exact.numpy()).any()


def test_whole_bank_as_neighbours():
    bank, labels = clusters(50)
    assert np.array_equal(KNN(k=(50,)).fit(bank, labels).predict(bank)[50, 0.07], by_definition(bank, labels, bank, 50))


def test_scikit_learn_agrees():
    bank, labels = clusters(900)
    queries = clusters(300, seed=5)[0]
    peer = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    expected = peer.fit(bank.astype(np.float64), labels).predict(queries.astype(np.float64))
    assert np.array_equal(KNN(k=(20,)).fit(bank, labels).predict(queries)[20, 0.07][:, 0], expected)


def test_an_image_of_the_bank_is_its_own_nearest_neighbour():
    bank, labels = clusters(200)
    knn = KNN(k=(1,)).fit(bank * np.random.default_rng(0).uniform(0.1, 9, (200, 1)).astype(np.float32), labels)
    similarities, indices = knn.neighbours(bank)
    assert torch.equal(indices[:, 0], torch.arange(200)) and torch.allclose(similarities, torch.ones(200, 1).double())


def test_temperature_decides_between_few_near_and_many_far():
    similarities, labels = torch.tensor([[0.9, 0.5, 0.5, 0.5]]), torch.tensor([[3, 1, 1, 1]])
    assert vote(similarities, labels, 4, [4], temperature=0.07)[4][0].tolist() == [3, 1, -1, -1]
    assert vote(similarities, labels, 4, [4], temperature=1.0)[4][0].tolist() == [1, 3, -1, -1]


def test_equal_votes_go_by_class_and_classes_without_a_vote_are_not_ranked():
    similarities, labels = torch.full((1, 4), 0.5), torch.tensor([[6, 2, 6, 2]])
    assert vote(similarities, labels, 9, [1, 4], 0.07)[4][0].tolist() == [2, 6, -1, -1, -1]
    assert vote(similarities, labels, 9, [1, 4], 0.07)[1][0].tolist() == [6, -1, -1, -1, -1]


def test_more_neighbours_than_images_are_refused_by_the_classifier():
    with pytest.raises(UserError, match="k 60 is more than the 50 images"):
        KNN(k=K).fit(*clusters(50))


def evaluate(k, bank=50):
    features, labels = clusters(bank)
    queries, truth = clusters(40, seed=5)
    classes = tuple("abcdefg")
    protocol = KNNProtocol(task="knn", version=1, feature="global", image_size=None, resize=None, k=k, temperature=(0.07,))
    return evaluate_knn(protocol, Split(features, labels, classes), Split(queries, truth, classes), torch.device("cpu"))


def test_the_evaluation_leaves_out_k_larger_than_the_bank_and_says_so(capsys):
    outcome = evaluate(K)
    assert list(outcome.metrics) == ["top1_k1", "top5_k1", "top1_k10", "top5_k10", "top1_k20", "top5_k20"]
    assert outcome.details == {"k_larger_than_bank": [60], "searched_by": "faiss or tiles"}
    assert "k = 60 left out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"50 images, fewer than the smallest k.*--set k=50"):
        evaluate((60, 70))


def test_top_5_counts_where_the_label_is_among_the_five():
    queries, truth = clusters(40, seed=5)
    ranked = KNN(k=(20,)).fit(*clusters(50)).predict(queries)[20, 0.07]
    outcome = evaluate((20,))
    assert outcome.metrics["top5_k20"].correct.mean() == np.mean([label in row for row, label in zip(ranked, truth, strict=True)])
    assert outcome.metrics["top1_k20"].correct.mean() == np.mean(ranked[:, 0] == truth)


def test_the_protocol_states_the_defaults_of_the_classifier():
    _, protocol = load_protocol(KNN_TASK, "knn")
    assert (protocol.k, protocol.temperature) == (KNN().k, KNN().temperature)
