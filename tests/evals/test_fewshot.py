"""The few-shot protocol: intervals, pairing, and that embedding once changes nothing."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn import data, evals, models, tasks
from xattn.config import UsageError, load_config
from xattn.evals.episode_picture import _weights, draw_episode
from xattn.evals.fewshot import fewshot, half_width, nearest_centroid, untrained
from xattn.evals.report import compare_workdirs, evaluate_workdir
from xattn.train import train

FEW = dict(split="test", ways=5, shots=1, queries=3, num_episodes=6)


class Oracle(nn.Module):
    """Knows nothing ("constant"), or compares images pixel by pixel ("pixels")."""

    kind: str

    def features(self, images, *, train=False):
        return images

    def classify(self, support, query, *, train=False):
        scores = nearest_centroid(support, query)
        return scores if self.kind == "pixels" else jax.tree.map(jnp.zeros_like, scores)


@pytest.fixture(scope="module")
def config():
    return load_config("qsformer/glyphs:smoke")


def test_a_constant_model_is_right_once_in_n(config):
    result = fewshot(Oracle("constant"), {}, config, **FEW)
    assert result["accuracy"] == pytest.approx(1 / 5)
    assert result["ci95"] == pytest.approx(0, abs=1e-9)


def test_a_model_of_pixels_equals_the_pixel_baseline(config):
    model = fewshot(Oracle("pixels"), {}, config, **FEW)
    baseline = fewshot(Oracle("constant"), {}, config, **FEW, method="pixel_centroid")
    assert model["per_example"] == baseline["per_example"]
    assert 0.2 < model["accuracy"] < 1


def test_episodes_in_a_call_do_not_change_the_result(config):
    results = [fewshot(Oracle("pixels"), {}, config, **FEW, batch_size=size) for size in (1, 4, 6)]
    assert results[0] == results[1] == results[2]


def test_half_width_is_that_of_the_published_protocol():
    values = np.array([0.2, 0.4, 0.9, 1.0])
    assert half_width(values) == pytest.approx(1.96 * np.sqrt(np.mean((values - 0.625) ** 2)) / 2)


def test_prototypes_are_the_means_of_the_shots():
    support = jnp.array([[[0.0], [2.0]], [[5.0], [7.0]]]).reshape(2, 2, 1, 1, 1)
    query = jnp.array([1.5, 6.5]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(nearest_centroid(support, query)["logits"], [[-0.25, -20.25], [-30.25, -0.25]])


def test_embedding_once_equals_whole_episodes(config, monkeypatch):
    """An encoder that sees images one by one gives the same answers both ways, on every branch."""
    model = models.build(config.model.to_dict(), dtype="float32")
    variables = untrained(model, tasks.build(config.task.to_dict()), data.build(config.data.to_dict(), split="test"))
    once = fewshot(model, variables, config, **FEW)
    monkeypatch.setattr(type(model), "independent_features", False)
    whole = fewshot(model, variables, config, **FEW)
    assert {"accuracy_global", "accuracy_local"} <= once.keys()
    for branch in ("accuracy", "accuracy_global", "accuracy_local"):
        assert once[branch] == pytest.approx(whole[branch], abs=1e-9)
    assert once["per_example"] == whole["per_example"]


def test_the_setting_is_stated_and_overrides_change_it(config):
    model = models.build(config.model.to_dict(), dtype="float32")
    variables = untrained(model, tasks.build(config.task.to_dict()), data.build(config.data.to_dict(), split="test"))
    assert fewshot(model, variables, config, **FEW)["transductive"]
    assert not fewshot(model, variables, config, **FEW, overrides={"query_self_attn": "diagonal"})["transductive"]
    assert not fewshot(model, variables, config, **FEW, method="pixel_centroid")["transductive"]


def test_unknown_method_and_evaluation_and_key_are_named(config):
    with pytest.raises(UsageError, match="no few-shot method 'pixels': did you mean 'pixel_centroid'"):
        fewshot(Oracle("constant"), {}, config, **FEW, method="pixels")
    with pytest.raises(UsageError, match="no evaluation 'fewshots': did you mean 'fewshot'"):
        evals.run({"name": "fewshots"}, Oracle("constant"), {}, config)
    with pytest.raises(UsageError, match="config.evals has no key 'shot': did you mean 'shots'"):
        evals.run({"name": "fewshot", "shot": 1}, Oracle("constant"), {}, config)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, scale in (("a", 10.0), ("b", 3.0)):
        config = load_config("protonet/glyphs:smoke")
        config.unlock()
        config.num_steps, config.model.scale, config.validation = 2, scale, {}
        train(config, folder / name)
    return folder


def test_results_are_kept_and_read_again(two_runs, capsys, monkeypatch):
    first = evaluate_workdir(two_runs / "a")
    kept = json.loads((two_runs / "a" / "evals" / "2" / "5way_1shot.json").read_text())
    assert kept == first["5way_1shot"]
    monkeypatch.setattr(evals.report, "run", lambda *args: pytest.fail("computed again"))
    assert evaluate_workdir(two_runs / "a") == first
    assert "5way_1shot" in capsys.readouterr().out


def test_runs_are_compared_on_the_same_episodes(two_runs, capsys):
    rows = compare_workdirs(two_runs / "a", two_runs / "b")
    a, b = (evaluate_workdir(two_runs / name)["5way_1shot"] for name in ("a", "b"))
    gaps = np.subtract(a["per_example"], b["per_example"])
    assert rows["5way_1shot"]["difference"] == pytest.approx(a["accuracy"] - b["accuracy"], abs=1e-6)
    assert rows["5way_1shot"]["ci95"] == pytest.approx(1.96 * gaps.std() / np.sqrt(len(gaps)), abs=1e-6)
    assert compare_workdirs(two_runs / "a", two_runs / "a")["5way_1shot"] == {"difference": 0.0, "ci95": 0.0}
    assert "pair by pair" in capsys.readouterr().out


def test_the_picture_shows_the_attention_of_the_episode(two_runs, config, tmp_path):
    model = models.build(config.model.to_dict(), dtype="float32")
    task = tasks.build(config.task.to_dict())
    source = data.build(config.data.to_dict(), split="test")
    variables = untrained(model, task, source)
    path = draw_episode(model, variables, config, tmp_path / "plots" / "episode.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    batch = {"support": source.images(np.zeros((3, 1), int)), "query": source.images(np.arange(4))}
    apply = jax.jit(lambda batch: model.apply(variables, *task.inputs(batch), mutable=["intermediates"]))
    outputs, captured = apply(batch)
    weights, title = _weights(outputs, captured["intermediates"])
    np.testing.assert_allclose(weights * model.num_blocks, outputs["global_scores"], rtol=1e-6)
    assert "attention" in title
    assert "logits" in _weights({"logits": outputs["logits"]}, {})[1]
