"""Configs from a user's side: what may be typed, what is refused and how, what survives a file."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from xattn import config as configs
from xattn.config import (
    RESUMABLE,
    UsageError,
    cache_dir,
    check_config,
    check_keys,
    check_options,
    check_variant,
    config_hash,
    config_names,
    config_path,
    differing_keys,
    from_json,
    load_config,
    lookup,
    parse_config,
    to_json,
)

SOURCE = """
from ml_collections import ConfigDict
from xattn.config import check_variant


def get_config(arg=""):
    check_variant(arg, ("smoke", "large"))
    width = ConfigDict(dict(width=8)).get_ref("width")
    return ConfigDict(
        dict(
            num_steps=3 if arg == "smoke" else 300,
            rate=1e-3,
            name="plain",
            shuffle=True,
            widths=(32, 64),
            sinkhorn=(0.05, 20),
            betas=(0.9, 0.99),
            nothing=None,
            empty={},
            model=dict(name="m", width=width, double=2 * width, inner=dict(drop=0.5)),
        )
    )
"""


@pytest.fixture
def config_file(tmp_path) -> str:
    path = tmp_path / "toy.py"
    path.write_text(SOURCE)
    return str(path)


@pytest.fixture
def parse(config_file):
    return lambda *overrides: parse_config([f"--config={config_file}", *overrides])[1]


class Encoder(nn.Module):
    num_heads: int
    dropout_rate: float = 0.0


def positional_first(model, /, learning_rate, *, clip=0.0, **rest):
    del model, learning_rate, clip, rest


# Keys and names.


def test_check_keys_accepts_what_the_constructor_takes():
    check_keys(["num_heads", "dropout_rate"], Encoder, "model")
    check_keys(["learning_rate", "clip"], positional_first, "optimizer")
    check_keys(["more"], positional_first, "optimizer", also=["more"])


@pytest.mark.parametrize(
    ("key", "constructor", "sentence"),
    [
        ("num_head", Encoder, "model.encoder has no key 'num_head': did you mean 'num_heads'?"),
        ("xyz", Encoder, "model.encoder has no key 'xyz': choose from num_heads, dropout_rate."),
        # Flax's own fields and what the program passes itself are no keys of a config.
        ("parent", Encoder, "model.encoder has no key 'parent': choose from num_heads, dropout_rate."),
        ("name", Encoder, "model.encoder has no key 'name': choose from num_heads, dropout_rate."),
        ("model", positional_first, "model.encoder has no key 'model': choose from learning_rate, clip."),
        ("rest", positional_first, "model.encoder has no key 'rest': choose from learning_rate, clip."),
    ],
)
def test_check_keys_names_the_nearest(key, constructor, sentence):
    with pytest.raises(UsageError) as error:
        check_keys(["dropout_rate", key] if constructor is Encoder else [key], constructor, "model.encoder")
    assert str(error.value) == sentence


def test_lookup_finds_or_names_the_nearest():
    table = {"qsformer": 1, "protonet": 2}
    assert lookup(table, "protonet", "model") == 2
    with pytest.raises(UsageError, match="^there is no model 'qsfromer': did you mean 'qsformer'\\?$"):
        lookup(table, "qsfromer", "model")
    with pytest.raises(UsageError, match="^there is no model 'zzz': choose from qsformer, protonet\\.$"):
        lookup(table, "zzz", "model")


def test_a_usage_error_is_a_value_error():
    assert issubclass(UsageError, ValueError)


# The command line.


def test_parse_config_splits_the_command_line(config_file):
    name, config, rest = parse_config(
        [f"--config={config_file}:smoke", "--workdir=runs/a", "--config.rate=2", "--verbose", "--configs=no"]
    )
    assert name == f"{config_file}:smoke"
    assert (config.num_steps, config.rate) == (3, 2.0)
    assert rest == ["--workdir=runs/a", "--verbose", "--configs=no"]


def test_the_config_and_its_overrides_may_be_separate_words(config_file):
    name, config, rest = parse_config(
        ["--config", config_file, "--config.num_steps", "30", "--config.rate", "-1", "--config.shuffle", "false", "x"]
    )
    assert name == config_file
    assert (config.num_steps, config.rate, config.shuffle) == (30, -1.0, False)
    assert rest == ["x"]


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("rate=1", "rate", 1.0),
        ("rate=2e-4", "rate", 2e-4),
        ("num_steps=30", "num_steps", 30),
        ("name=a=b", "name", "a=b"),
        ("name=", "name", ""),
        ("shuffle=false", "shuffle", False),
        ("shuffle=0", "shuffle", False),
        ("widths=4,5,6", "widths", (4, 5, 6)),
        ("widths=(4,)", "widths", (4,)),
        ("sinkhorn=1,2", "sinkhorn", (1, 2)),
        ("betas=0,0.5", "betas", (0, 0.5)),
        ("model.inner.drop=0", "model.inner.drop", 0.0),
    ],
)
def test_overrides_take_the_type_of_the_default(parse, override, path, value):
    result = parse(f"--config.{override}")
    for key in path.split("."):
        result = result[key]
    assert result == value
    assert type(result) is type(value)


def test_a_derived_value_follows_and_the_last_override_wins(parse):
    config = parse("--config.model.width=1", "--config.model.width=10")
    assert (config.model.width, config.model.double) == (10, 20)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        # unknown keys, at any depth
        ("nmu_steps=1", ["config has no key 'nmu_steps'", "did you mean 'num_steps'?"]),
        ("model.widht=1", ["config.model has no key 'widht'", "did you mean 'width'?"]),
        ("model.inner.dorp=1", ["config.model.inner has no key 'dorp'", "did you mean 'drop'?"]),
        ("model.width.x=1", ["config.model.width has no key 'x'"]),
        ("empty.x=1", ["config.empty has no key 'x'"]),
        ("widths[9]=1", ["widths[9]"]),
        # wrong types
        ("rate=fast", ["config.rate", "fast"]),
        ("num_steps=1.5", ["config.num_steps", "1.5"]),
        ("num_steps=", ["config.num_steps"]),
        ("shuffle=maybe", ["config.shuffle", "maybe"]),
        ("widths=4,wide", ["config.widths", "wide", "int"]),
        ("widths=4,0.5", ["config.widths", "0.5", "int"]),
        ("sinkhorn=often,3", ["config.sinkhorn", "often", "float or int"]),
        ("model=3", ["config.model", "3"]),
        ("nothing=3", ["config.nothing", "None"]),
    ],
)
def test_a_wrong_override_is_one_sentence_that_names_it(parse, override, words):
    with pytest.raises(UsageError) as error:
        parse("--config.rate=0.5", f"--config.{override}")
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("arguments", [["--config.shuffle"], ["--config.shuffle", "--verbose"], ["--config.num_steps"]])
def test_an_override_without_a_value_is_an_error(parse, arguments):
    with pytest.raises(UsageError, match=f"^{arguments[0]} has no value"):
        parse(*arguments)


@pytest.mark.parametrize("arguments", [[], ["--workdir=x"], ["--config="], ["--config=", "--workdir=x"], ["--config"]])
def test_a_missing_config_says_what_to_give(arguments):
    with pytest.raises(UsageError, match="^give --config=NAME"):
        parse_config(arguments)


def test_an_unknown_config_or_variant_names_the_nearest(config_file):
    with pytest.raises(UsageError, match="no config 'qsformer/glyhps': did you mean 'qsformer/glyphs'"):
        parse_config(["--config=qsformer/glyhps"])
    with pytest.raises(UsageError, match="no config '/nowhere/toy.py'"):
        parse_config(["--config=/nowhere/toy.py"])
    with pytest.raises(UsageError, match="no variant 'smokee': did you mean 'smoke'"):
        parse_config([f"--config={config_file}:smokee"])
    with pytest.raises(UsageError, match="no variant 'tiny': choose from smoke, large"):
        parse_config([f"--config={config_file}:tiny"])


def test_check_variant_returns_what_it_allows():
    assert check_variant("", ("smoke",)) == ""
    assert check_variant("smoke", ("smoke",)) == "smoke"


def test_a_loaded_config_has_fixed_keys(config_file):
    config = load_config(config_file)
    with pytest.raises(AttributeError):
        config.model.depth = 3


def constructor(
    given,
    *,
    count: int,
    rate: float = 0.5,
    on: bool = False,
    sizes: tuple[int, ...] = (1,),
    pair: tuple[int, float] | None = None,
    parts: Mapping[str, str] = {},
    anything: Any = None,
) -> None: ...


def test_options_of_the_annotated_types_are_allowed():
    for options in (
        dict(count=3),
        dict(count=-3, rate=1, on=True, sizes=(), pair=(1, 2), parts=dict(a="b"), anything=object()),
        dict(count=0, rate=1e-3, sizes=[4, 5], pair=None),
    ):
        check_options(options, constructor, "config.x", ("given",))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(), "config.x has no 'count', which it needs: give a whole number."),
        (dict(count=1, given=2), "config.x has no key 'given': the program sets it."),
        (dict(count=1, rates=2), "config.x has no key 'rates': did you mean 'rate'?"),
        (dict(count=1.0), "config.x.count is 1.0: give a whole number."),
        (dict(count=True), "config.x.count is True: give a whole number."),
        (dict(count=2**31), "config.x.count is 2147483648: give a whole number."),
        (dict(count=1, rate=float("inf")), "config.x.rate is inf: give a number."),
        (dict(count=1, rate="fast"), "config.x.rate is 'fast': give a number."),
        (dict(count=1, on=1), "config.x.on is 1: give True or False."),
        (dict(count=1, sizes=(1, "a")), "config.x.sizes is (1, 'a'): give (some of: a whole number)."),
        (dict(count=1, sizes=3), "config.x.sizes is 3: give (some of: a whole number)."),
        (dict(count=1, pair=(1,)), "config.x.pair is (1,): give (2 of: a whole number, a number) or None."),
        (dict(count=1, parts=dict(a=1)), "config.x.parts is a mapping: give a mapping of text."),
    ],
)
def test_other_options_are_one_sentence(options, sentence):
    with pytest.raises(UsageError) as error:
        check_options(options, constructor, "config.x", ("given",))
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_steps=-1), "config.num_steps is -1: give a number at least 1"),
        (dict(log_every=0), "config.log_every is 0: give a number at least 1"),
        (dict(ema_decay=1.5), "config.ema_decay is 1.5: give a number from 0 to 1"),
        (dict(checkpoint=dict(every=1)), "config.checkpoint has no 'keep'"),
        (dict(checkpoint=dict(every=0, keep=1)), "config.checkpoint.every is 0"),
        (dict(validation=dict(every=2)), "config.validation has no 'metric'"),
        (dict(pipeline=dict()), "config.pipeline has no 'batch_size'"),
        (dict(dtype="float8"), "there is no config.dtype 'float8'"),
        (dict(optimiser=dict()), "config has no key 'optimiser': did you mean 'optimizer'?"),
    ],
)
def test_a_runs_own_keys_are_checked(changes, words):
    config = load_config("protonet/glyphs:smoke")
    check_config(config)
    with pytest.raises(UsageError, match=re.escape(words)):
        check_config(ConfigDict(config.to_dict() | changes))


# The configs that are there.


def test_config_names_are_the_files_in_the_configs_folder():
    root = Path(__file__).parents[1] / "configs"
    names = config_names()
    assert "qsformer/glyphs" in names
    assert {root / f"{name}.py" for name in names} == set(root.glob("**/*.py"))
    for name in names:
        assert config_path(name).samefile(root / f"{name}.py")


def test_configs_inside_an_installed_package_come_first(tmp_path, monkeypatch):
    package = tmp_path / "xattn"
    (package / "configs" / "inside").mkdir(parents=True)
    (package / "configs" / "inside" / "a.py").touch()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "beside.py").touch()
    monkeypatch.setattr(configs, "__file__", str(package / "config.py"))
    assert config_names() == ["inside/a"]
    (package / "configs" / "inside" / "a.py").unlink()
    (package / "configs" / "inside").rmdir()
    (package / "configs").rmdir()
    assert config_names() == ["beside"]


@pytest.mark.parametrize("name", config_names())
def test_every_config_has_smoke_refuses_other_variants_and_survives_json(name):
    for variant in ("", ":smoke"):
        config = load_config(name + variant)
        assert config.is_locked
        assert to_json(from_json(to_json(config))) == to_json(config)
    assert load_config(f"{name}:smoke").num_steps <= 10
    with pytest.raises(UsageError, match="has no variant 'nonsense'"):
        load_config(f"{name}:nonsense")


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XATTN_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("XATTN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "xattn"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == Path.home() / ".cache" / "xattn"


# JSON, hash, differences.


def test_json_round_trip_keeps_values_and_types():
    config = ConfigDict(
        dict(a=1, b=1.0, c=True, d=None, e="x", f=(1, (2.5, "y")), g={}, h=dict(i=(dict(j=1),)), k=[3, 4], l=())
    )
    back = from_json(to_json(config))
    expected = dict(a=1, b=1.0, c=True, d=None, e="x", f=(1, (2.5, "y")), g={}, h=dict(i=(dict(j=1),)), k=(3, 4), l=())
    assert back.to_dict() == expected
    assert {key: type(value) for key, value in back.to_dict().items()} == {
        key: type(value) for key, value in expected.items()
    }
    assert back.h.i[0]["j"] == 1
    assert config_hash(back) == config_hash(config)


def test_json_holds_resolved_references(parse):
    assert from_json(to_json(parse("--config.model.width=3"))).model.double == 6


def test_hash_depends_on_values_not_on_order():
    one = ConfigDict(dict(a=1, model=dict(x=2, y=3)))
    same = ConfigDict(dict(model=dict(y=3, x=2), a=1))
    assert config_hash(one) == config_hash(same)
    assert len(config_hash(one)) == 12
    int(config_hash(one), 16)
    for other in (dict(a=1, model=dict(x=3, y=2)), dict(a=1, model=dict(x=2)), dict(a=1.5, model=dict(x=2, y=3))):
        assert config_hash(ConfigDict(other)) != config_hash(one)


def test_differing_keys_ignores_what_a_continued_run_may_change_and_nothing_else():
    old = load_config("qsformer/glyphs")
    allowed = {"num_steps", "mesh", "mode", "evals", "validation", "log_every", "checkpoint", "preempt_exit_code"}
    allowed |= {"watchdog_seconds"}
    assert set(RESUMABLE) == allowed

    def changed(node):
        if isinstance(node, dict):
            return {key: changed(value) for key, value in node.items()}
        return f"not {node}"

    for key in old:
        with old.ignore_type():
            new = old.copy_and_resolve_references()
            new.unlock()
            new[key] = changed(old.to_dict()[key])
        found = differing_keys(old, new)
        if key in allowed:
            assert found == []
        else:
            assert found
            assert all(name == key or name.startswith(f"{key}.") for name in found)


def test_differing_keys_names_changed_missing_and_new_ones_by_path():
    old = ConfigDict(dict(a=1, model=dict(x=(1, 2), steps=dict(num_steps=3), gone=0), num_steps=5))
    new = ConfigDict(dict(a=1, model=dict(x=(1, 3), steps=dict(num_steps=4), fresh=None), num_steps=9))
    assert differing_keys(old, new) == ["model.fresh", "model.gone", "model.steps.num_steps", "model.x"]
    assert differing_keys(from_json(to_json(old)), old) == []
