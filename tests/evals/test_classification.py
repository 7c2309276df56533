"""Top-1 and top-5 accuracy of a model whose logits are the pixels."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from tests.evals.toys import config, toy
from xattn import data, evals
from xattn.config import UsageError
from xattn.evals.fewshot import half_width
from xattn.parallel.mesh import make_mesh, use_mesh


class Pixels(nn.Module):
    """Its logits are the pixels, times `scale`, of the first `classes`."""

    scale: float = 1.0
    classes: int = 7

    def __call__(self, images, *, train=False):
        return self.scale * images.reshape(len(images), -1)[:, : self.classes]


@pytest.fixture(autouse=True)
def source(monkeypatch):
    # Of seven classes, class c has rank 6 - c: it is the largest for label 6, among the five largest from label 2 on.
    images = np.tile(np.arange(0, 70, 10, dtype=np.uint8), (5, 1)).reshape(5, 1, 7, 1)
    labels = np.array([6, 2, 1, 6, 4], np.int32)
    source = toy(test={"image": images, "label": labels})
    source.class_names = list("abcdefg")
    monkeypatch.setitem(data.SOURCES, "toy", source)


def run(model=None, **options):
    return evals.run(dict(name="classification", **options), model or Pixels(), {}, config("classification"))


def test_ranks_are_counted():
    result = run()
    assert result["per_example"] == [1, 0, 0, 1, 0]
    assert result["accuracy"] == pytest.approx(0.4) and result["top5"] == pytest.approx(0.8)
    assert result["ci95"] == pytest.approx(half_width(np.array([1, 0, 0, 1, 0.0])))
    assert result["metric"] == "accuracy"


def test_logits_that_say_nothing_are_not_right():
    """Equal logits stand for the first class, as argmax has it; logits that are no numbers for none."""
    assert run(Pixels(scale=0.0))["accuracy"] == 0 and run(Pixels(scale=0.0))["top5"] == pytest.approx(3 / 5)
    assert run(Pixels(scale=np.nan))["top5"] == 0


def test_a_model_with_too_few_outputs_is_refused():
    with pytest.raises(UsageError, match="the model has 6 outputs, but toy has 7 classes"):
        run(Pixels(classes=6))


def test_examples_in_a_call_do_not_change_the_result():
    assert run(batch_size=2) == run(batch_size=5) == run(batch_size=64)


def test_replicas_share_the_examples_and_count_each_once():
    """Five examples on eight devices: the batch is filled up, and what fills it is not counted."""
    seen = []

    class Watched(Pixels):
        def __call__(self, images, *, train=False):
            jax.debug.inspect_array_sharding(images, callback=lambda sharding: seen.append(sharding.num_devices))
            return super().__call__(images)

    with use_mesh(make_mesh()):
        assert run(Watched()) == run()
    assert seen == [8]


def test_results_on_fewer_examples_are_another_set():
    result = run(num_examples=3)
    assert result["per_example"] == [1, 0, 1]
    assert result["examples"] != run()["examples"]
    assert result["examples"]["num_examples"] == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(num_examples=6), "num_examples is 6, but the split 'test' has 5"),
        (dict(batch_size=0), "batch_size of the evaluation 'classification' is 0"),
        (dict(top=5), "somewhere has no key 'top'"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        evals.check(dict(name="classification", **options), Pixels(), config("classification"), "somewhere")


def test_another_task_is_refused():
    with pytest.raises(UsageError, match="'classification' is for the task 'classification', but this is 'fewshot'"):
        evals.check(dict(name="classification"), Pixels(), config("fewshot"), "config.evals")
