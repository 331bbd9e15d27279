"""kNN, probes and features of frozen networks."""

import pytest
import timm
import torch
from torch import nn

from mimkit.data.sources import open_labeled
from mimkit.data.transforms import Normalize
from mimkit.errors import UserError
from mimkit.evaluation.features import Features, extract_parts
from mimkit.evaluation.knn import knn
from mimkit.evaluation.probes import fit_path, linear_probe


def clouds(n, seed=0, noise=1.0, classes=4, d=16):
    centers = torch.randn(classes, d, generator=torch.Generator().manual_seed(7)) * 2
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    return Features(centers[y] + noise * torch.randn(n, d, generator=generator), y)


def slow_knn(train, test, k):
    """Compute the accuracy image by image."""
    correct = 0
    for query, y in zip(test.x, test.y, strict=True):
        similarity = nn.functional.cosine_similarity(train.x, query[None])
        votes = torch.zeros(10)
        for i in similarity.argsort(descending=True)[:k]:
            votes[train.y[i]] += (similarity[i] / 0.07).exp()
        correct += int(votes.argmax() == y)
    return 100 * correct / len(test.y)


def test_knn_is_its_definition():
    train, test = clouds(200, noise=3), clouds(600, 1, noise=3)
    found = knn(train, test)
    assert found.keys() == {10, 20}
    for k, accuracy in found.items():
        assert accuracy == pytest.approx(slow_knn(train, test, k))
        assert 40 < accuracy < 95
    with pytest.raises(UserError, match="at least 10"):
        knn(clouds(5), test)


def test_probe_learns_and_test_labels_have_no_part_in_its_choice():
    train, test = clouds(400), clouds(300, 1)
    probe = linear_probe(train, test)
    assert probe.accuracy > 95
    shuffled = test._replace(y=test.y[torch.randperm(len(test.y))])
    again = linear_probe(train, shuffled)
    assert (again.weight_decay, again.validation) == (probe.weight_decay, probe.validation)
    assert again.accuracy < 50
    noise = linear_probe(train._replace(x=torch.randn(400, 16)), test)
    assert noise.accuracy < 50
    with pytest.raises(UserError, match="2 classes"):
        linear_probe(train._replace(y=torch.zeros(400, dtype=torch.long)), test)


def test_probe_does_not_depend_on_the_scale_of_features():
    train, test = clouds(400), clouds(300, 1)
    scaled = [part._replace(x=part.x * torch.logspace(-3, 3, 16) + 5) for part in (train, test)]
    plain = linear_probe(train, test)
    assert linear_probe(*scaled).accuracy == pytest.approx(plain.accuracy, abs=1)


def optimum(x, y, classes, decay):
    """Minimize mean cross entropy + decay / 2 * |weight|^2 by Newton's method with halved steps. Return the minimum."""

    def loss(flat):
        head = flat.view(classes, -1)  # weights, then the bias
        scores = x.double() @ head[:, :-1].T + head[:, -1]
        return nn.functional.cross_entropy(scores, y) + decay / 2 * head[:, :-1].square().sum()

    flat = torch.zeros(classes * (x.shape[1] + 1), dtype=torch.double)
    for _ in range(30):
        direction = torch.linalg.pinv(torch.func.hessian(loss)(flat)) @ torch.func.grad(loss)(flat)
        flat = min((flat - direction / 2**i for i in range(8)), key=loss)
    assert torch.func.grad(loss)(flat).norm() < 1e-8
    return float(loss(flat))


def test_fit_is_the_optimum_for_each_decay_of_ill_conditioned_features():
    train = clouds(200, noise=3)
    x = train.x @ torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).matrix_power(3)
    train = train._replace(x=(x - x.mean(0)) / x.std(0))
    assert torch.linalg.cond(train.x) > 100

    def loss(head, decay):
        scores = train.x.double() @ head.weight.double().T + head.bias.double()
        return float(nn.functional.cross_entropy(scores, train.y) + decay / 2 * head.weight.square().sum())

    losses, norms = {}, []
    for decay, head in fit_path(train, 4, (1e-4, 1e-2, 1e-3)):
        losses[decay] = loss(head, decay)
        norms.append(float(head.weight.norm()))
    assert norms == sorted(norms)
    assert list(losses) == [1e-2, 1e-3, 1e-4]
    for decay, found in losses.items():
        assert found < optimum(train.x, train.y, 4, decay) + 1e-4


def test_features_of_any_timm_model_restore_its_mode():
    parts = open_labeled("sample")
    for name, size in (("hivit_nano", (32, 32)), ("resnet18", (32, 32))):
        model = timm.create_model(name, num_classes=3, img_size=32) if "hivit" in name else timm.create_model(name)
        model.train()
        train, test = extract_parts(model, parts, size, Normalize([0.5] * 3, [0.5] * 3), images=(20, 10))
        assert train.x.shape == (20, model.num_features)
        assert (train.y >= 0).all()
        assert len(test.y) == 10
        assert model.training
