"""The released QSFormer: outputs of its code on synthetic weights, and its state dicts there and back.

The numbers were printed by the released code in float64 with an exact transport solver, on weights and images that a
formula fills (`wave`, `IMAGES`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from xattn import interop
from xattn.config import UsageError
from xattn.ops import emd

BLOCKS = {"miniimagenet": 3, "fc100": 4, "cub": 2}
MINI = dict(dataset="miniimagenet", N=3, head=10, head_metric=1, head_enc=8, dp1=0.5, dp2=0.5, dp3=0.5, dp4=0.1)
MINI |= dict(lamda=0.1, lamda1=0.3, lamda2=0.9, tau=0.7, temperature=12.5, temperature2=1.0, way=5, shot=1)
FC100 = dict(dataset="fc100", N=4, head=8, head_metric=1, head_enc=1, dp1=0.5, dp2=0.5, dp3=0.5, dp4=0.1)
FC100 |= dict(lamda=0.4, lamda1=0.7, lamda2=0.05, tau=0.15, temperature=12.5, temperature2=0.5, way=5, shot=1)
CONFIGS = {"miniimagenet": MINI, "fc100": FC100}


def official_shapes(blocks):
    """Names and shapes of `QSFormer(args, mode="meta").state_dict()`."""
    d, f = 640, 2048
    shapes = {}

    def norm(name, size, running=False):
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})
        if running:
            shapes.update({f"{name}.running_mean": (size,), f"{name}.running_var": (size,)})
            shapes[f"{name}.num_batches_tracked"] = ()

    def attention(name):
        shapes.update({f"{name}.in_proj_weight": (3 * d, d), f"{name}.in_proj_bias": (3 * d,)})
        shapes.update({f"{name}.out_proj.weight": (d, d), f"{name}.out_proj.bias": (d,)})

    def layer(name, attentions, norms):
        for part in attentions:
            attention(f"{name}.{part}")
        shapes.update({f"{name}.linear1.weight": (f, d), f"{name}.linear1.bias": (f,)})
        shapes.update({f"{name}.linear2.weight": (d, f), f"{name}.linear2.bias": (d,)})
        for i in range(norms):
            norm(f"{name}.norm{i + 1}", d)

    for s, (inputs, width) in enumerate([(3, 64), (64, 160), (160, 320), (320, 640)], start=1):
        block = f"encoder.layer{s}.0"
        for i in (1, 2, 3):
            shapes[f"{block}.conv{i}.weight"] = (width, inputs if i == 1 else width, 3, 3)
            norm(f"{block}.bn{i}", width, running=True)
        shapes[f"{block}.downsample.0.weight"] = (width, inputs, 1, 1)
        norm(f"{block}.downsample.1", width, running=True)
    shapes.update({"encoder.conv_3.weight": (640, 320, 4, 4), "encoder.conv_3.bias": (640,)})
    layer("encoder.encoder_layer_3", ["self_attn"], 2)
    layer("encoder.decoder_layer_3", ["self_attn", "multihead_attn"], 3)
    for i in range(blocks):
        layer(f"trans.{i}.encoder_layer", ["self_attn"], 2)
        attention(f"trans.{i}.sa")
        projection = f"trans.{i}.transformer_decoder.qkv"
        shapes.update({f"{projection}.weight": (d, d), f"{projection}.bias": (d,)})
        norm(f"trans.{i}.transformer_decoder.norm", d)
        norm(f"trans.{i}.norm", d)
    attention("patchFormer")
    return shapes


def wave(name, shape):
    """The value that fills an official tensor, float64."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith(("running_mean", "running_var")):
        return np.full(shape, float(name.endswith("var")))
    n = np.arange(np.prod(shape, dtype=int))
    values = np.sin(0.7 * n + 0.01 * (n % 1009) ** 2 + sum(name.encode()) % 1000).reshape(shape)
    if len(shape) >= 2:
        return 2 / np.sqrt(values.size / shape[0]) * values
    return 1 + 0.1 * values if name.endswith(".weight") else 0.1 * values


@functools.cache
def filled(blocks):
    tensors = {name: wave(name, shape) for name, shape in official_shapes(blocks).items()}
    return {name: x if x.dtype == np.int64 else x.astype(np.float32) for name, x in tensors.items()}


def cheap(blocks):
    """A state dict of zeros that takes no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in official_shapes(blocks).items()}


_i, _row, _col, _c = np.indices((10, 84, 84, 3))
IMAGES = jnp.asarray(np.sin(0.05 * _row * (_c + 1) + 0.08 * _col * (1 + _i % 5) + 0.3 * _i), jnp.float32)


def matrix(text):
    return np.array([line.split() for line in text.strip().splitlines()], float)


GOLDEN = {
    ("miniimagenet", "batch"): dict(
        features=[
            [8.471713, 3.219759, -0.248461, -0.102429],
            [0.824359, 3.536043, 9.089191, -0.470265],
            [10.382031, 2.107650, 6.278015, -0.497302],
        ],
        features_sum=454911.281030,
        patch_support=[-6.144701, 6.736898, -7.962402, -0.429212],
        patch_sums=(407364.604625, 402020.967157),
        w1=[1.002508, 0.979605, 0.991614, 0.989672],
        w2=[1.010414, 0.999457, 0.999558, 0.976500],
        similarity=[0.911940, 0.918922, 0.919425, 0.924019],
        blocks="""0.968848 0.031087 0.000065 0.000000 0.000000
            0.000032 0.004280 0.823570 0.159229 0.012888
            0.217673 0.052459 0.573146 0.059721 0.097001""",
        global_scores="""1.186553 0.087826 1.396781 0.218950 0.109890
            0.752846 0.274056 1.402020 0.333386 0.237692
            0.348323 0.599953 1.020145 0.555184 0.476396
            0.211828 0.632440 0.457043 0.814650 0.884039
            0.173601 0.652533 0.274224 0.610523 1.289120""",
        local_logits="""11.492132 11.488336 11.226593 11.101111 11.138690
            11.121485 11.529047 11.505123 11.303991 11.304622
            11.212801 11.422745 11.667964 11.610998 11.580965
            11.046297 11.315536 11.634894 11.958797 11.669763
            11.100653 11.270484 11.455730 11.636189 11.684368""",
        logits=[10.461574, 10.348285, 10.243612, 10.012895, 10.035810],
    ),
    ("miniimagenet", "tokens"): dict(
        features=[
            [8.372386, 3.193617, -0.270067, 0.027546],
            [0.894179, 3.410041, 9.172352, -0.461339],
            [10.384569, 2.123233, 6.251322, -0.552623],
        ],
        features_sum=455168.870863,
        patch_support=[-6.605296, 6.944319, -8.201648, -0.738542],
        patch_sums=(407694.962246, 402359.555332),
        w1=[1.002192, 0.985043, 0.994028, 0.994795],
        w2=[1.009204, 1.000473, 1.000972, 0.978190],
        similarity=[0.911587, 0.919269, 0.919619, 0.925309],
        global_scores="""1.197418 0.058495 0.982355 0.604392 0.157340
            0.915715 0.110695 0.931326 0.727552 0.314711
            0.648997 0.317786 0.540263 0.899078 0.593876
            0.463686 0.407957 0.231317 0.955804 0.941237
            0.401758 0.444984 0.171537 0.732585 1.249136""",
        local_logits="""11.496062 11.505069 11.202882 11.092962 11.112590
            11.116831 11.527195 11.469423 11.293572 11.297796
            11.204864 11.408200 11.647523 11.606182 11.570189
            11.052864 11.314496 11.628013 11.972743 11.658066
            11.103053 11.269686 11.420111 11.616833 11.655390""",
        logits=[10.466198, 10.360411, 10.180830, 10.044105, 10.017065],
    ),
    ("fc100", "batch"): dict(
        features=[
            [8.468958, 3.208281, -0.258252, -0.121122],
            [0.790433, 3.537095, 9.097928, -0.458341],
            [10.403890, 2.124436, 6.224246, -0.505294],
        ],
        features_sum=454946.169196,
        patch_support=[0.306933, 3.807802, -3.674830, -0.252688],
        patch_sums=(245967.530123, 243698.214368),
        w1=[0.974968, 0.860621, 0.921579, 0.874164],
        w2=[0.918260, 0.903688, 0.896439, 0.931828],
        similarity=[0.845054, 0.864067, 0.843517, 0.812445],
        blocks="""0.201381 0.200893 0.200083 0.199240 0.198403
            0.199406 0.200165 0.200553 0.200117 0.199759
            0.199465 0.199520 0.200107 0.200103 0.200805
            0.201467 0.200480 0.199682 0.199142 0.199229""",
        global_scores="""0.801719 0.801059 0.800425 0.798602 0.798195
            0.799950 0.800701 0.800924 0.799345 0.799080
            0.798186 0.799865 0.801406 0.800358 0.800185
            0.797148 0.799175 0.801241 0.801186 0.801250
            0.796637 0.798870 0.801045 0.801376 0.802072""",
        local_logits="""11.061317 11.234715 11.304063 10.733002 10.792659
            10.839728 11.476714 11.260004 10.879269 10.797973
            10.693760 11.181417 11.473695 11.509944 11.274005
            10.404111 10.941675 11.437164 11.985880 11.579095
            10.594298 10.972705 11.205228 11.358743 11.481276""",
        logits=[6.797134, 6.901041, 6.942523, 6.599522, 6.635235],
    ),
    ("fc100", "tokens"): dict(
        features=[
            [8.324269, 3.168381, -0.334734, 0.055262],
            [0.955897, 3.408431, 9.108517, -0.511917],
            [10.396482, 2.115708, 6.230135, -0.429466],
        ],
        features_sum=455067.193335,
        patch_support=[0.134289, 3.812145, -3.807872, -0.081248],
        patch_sums=(245980.472625, 243922.971491),
        w1=[0.974804, 0.861973, 0.921154, 0.873497],
        w2=[0.918531, 0.903452, 0.895505, 0.930712],
        similarity=[0.844874, 0.864045, 0.843590, 0.812261],
        global_scores="""0.801801 0.800866 0.800344 0.798629 0.798361
            0.800039 0.800541 0.800847 0.799376 0.799197
            0.798253 0.799679 0.801324 0.800420 0.800324
            0.797210 0.798980 0.801162 0.801259 0.801389
            0.796713 0.798684 0.800974 0.801441 0.802188""",
        local_logits="""11.059816 11.236771 11.305946 10.735385 10.792661
            10.828435 11.467389 11.260126 10.868657 10.798677
            10.686952 11.197706 11.468854 11.504791 11.283828
            10.396721 10.957279 11.434633 11.985451 11.596877
            10.557146 10.959427 11.185550 11.355769 11.468066""",
        logits=[6.796250, 6.902236, 6.943636, 6.600957, 6.635269],
    ),
}
STAGE_SUMS = (754397.414929, 733053.426285, 573231.623544, 453193.060666)
CONV_3_SUM = 321498.939010


def test_fill_formula():
    state = filled(3)
    np.testing.assert_allclose(np.abs(wave("patchFormer.in_proj_weight", (1920, 640))).sum(), 61843.247402, rtol=1e-9)
    kernel = state["encoder.layer1.0.conv1.weight"].ravel()
    np.testing.assert_allclose(kernel[:4], [0.370036, 0.211570, -0.056766, -0.301029], atol=1e-6)
    np.testing.assert_allclose(IMAGES[7, 3, 5], [-0.303542, -0.442520, -0.571561], atol=1e-6)
    np.testing.assert_allclose(jnp.abs(IMAGES).sum(), 134767.906713, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dataset, axis", GOLDEN)
def test_outputs_are_those_of_the_released_code(dataset, axis):
    golden = GOLDEN[dataset, axis]
    config = CONFIGS[dataset] | dict(solver="opencv")
    model, variables = interop.from_torch("qsformer", config, filled(BLOCKS[dataset]), attn_axis=axis)

    def inside(module, name):
        return name == "__call__" and module.name in ("backbone", "conv_3", "encoder")

    @jax.jit
    def forward(variables):
        return model.apply(
            variables, IMAGES[:5, None], IMAGES[5:], capture_intermediates=inside, mutable=["intermediates"]
        )

    out, state = forward(variables)
    inner = state["intermediates"]
    for stage, total in zip(inner["encoder"]["backbone"]["__call__"][0], STAGE_SUMS, strict=True):
        np.testing.assert_allclose(jnp.abs(stage).sum(), total, rtol=1e-5)
    np.testing.assert_allclose(jnp.abs(inner["encoder"]["conv_3"]["__call__"][0]).sum(), CONV_3_SUM, rtol=1e-5)
    features = inner["encoder"]["__call__"][0][-1]
    picked = [features[0, 0, 0, :4], features[7, 2, 3, 100:104], features[9, 4, 4, 636:]]
    np.testing.assert_allclose(picked, golden["features"], atol=2e-4)
    np.testing.assert_allclose(jnp.abs(features).sum(), golden["features_sum"], rtol=1e-5)

    support, query = out["patch_support"], out["patch_query"]
    np.testing.assert_allclose(support[0, 0, 0, :4], golden["patch_support"], atol=3e-4)
    sums = [jnp.abs(support).sum(), jnp.abs(query).sum()]
    np.testing.assert_allclose(sums, golden["patch_sums"], rtol=1e-5)
    query, support = query.reshape(5, 25, 640), support.reshape(5, 25, 640)
    w1, w2 = emd.node_weights(query, support)
    np.testing.assert_allclose(w1[0, 0, :4], golden["w1"], atol=1e-4)
    np.testing.assert_allclose(w2[0, 0, :4], golden["w2"], atol=1e-4)
    np.testing.assert_allclose(emd.pearson_similarity(query, support)[0, 0, 0, :4], golden["similarity"], atol=2e-5)

    # Scores before the softmax are sums of 640 products: in the hundreds without the L2 norm, at most 1 with it.
    atol = 5e-4 if dataset == "miniimagenet" else 5e-6
    np.testing.assert_allclose(out["global_scores"], matrix(golden["global_scores"]), atol=atol)
    if "blocks" in golden:
        blocks = [inner[f"block_{i}"]["attention_weights"][0][0, 0] for i in range(BLOCKS[dataset])]
        np.testing.assert_allclose(blocks, matrix(golden["blocks"]), atol=atol)
    np.testing.assert_allclose(out["local_logits"], matrix(golden["local_logits"]), atol=2e-5)
    np.testing.assert_allclose(out["logits"][0], golden["logits"], atol=1e-4)


def assert_same(got, expected):
    assert set(got) == set(expected)
    for name, x in expected.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape, name
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_state_dict_survives_bit_by_bit():
    """Unused tensors too: those that differ from what a new model holds are kept, the others made again."""
    state = dict(filled(2))
    state["encoder.layer2.0.bn1.num_batches_tracked"] = np.array(4321, np.int64)
    state["trans.1.norm.weight"] = np.ones(640, np.float32)
    config = dict(dataset="cub")
    model, variables = interop.from_torch("qsformer", config, state)
    assert set(variables) == {"params", "batch_stats", "released"}
    assert "trans.1.norm.weight" not in variables["released"]
    assert_same(interop.to_torch("qsformer", config, variables), state)

    untouched = {
        name: np.full_like(x, name.endswith("weight")) if ".norm." in name and "decoder" not in name else x
        for name, x in filled(2).items()
    }
    model, variables = interop.from_torch("qsformer", config, untouched)
    assert set(variables) == {"params", "batch_stats"}
    assert_same(interop.to_torch("qsformer", config, variables), untouched)
    episode = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 1, 84, 84, 3), (1, 84, 84, 3)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *episode)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda x: x.shape, meta.unbox(shapes))


def test_fc100_leaves_out_the_second_norm_and_brings_it_back():
    config = dict(dataset="fc100", N=2)
    model, variables = interop.from_torch("qsformer", config, filled(2))
    assert model.projection_norm == "l2" and "norm" not in variables["params"]["block_0"]
    assert len([name for name in variables["released"] if "transformer_decoder.norm" in name]) == 4
    assert_same(interop.to_torch("qsformer", config, variables), filled(2))


def test_encoder_files_with_and_without_prefixes():
    """A pre-training file has no `encoder.`, a data-parallel one `module.`; both may hold a classifier."""
    encoder = {name: x for name, x in filled(2).items() if name.startswith("encoder.")}
    bare = {name.removeprefix("encoder."): x for name, x in encoder.items()} | {"fc.weight": np.zeros((64, 640))}
    wrapped = {f"module.{name}": x for name, x in filled(2).items()} | {"module.fc.bias": np.zeros(64)}
    for state in (bare, wrapped):
        model, variables = interop.from_torch("qsformer-encoder", MINI, state)
        assert model.num_heads == 10 and model.attn_axis == "batch"
        assert_same(interop.to_torch("qsformer-encoder", MINI, variables), encoder)
    with pytest.raises(UsageError, match="holds an image encoder alone.*qsformer-encoder"):
        interop.from_torch("qsformer", MINI, bare)
    model, _ = interop.from_torch("qsformer", dict(dataset="cub"), wrapped)
    assert model.num_blocks == 2


def test_released_behaviour_and_what_overrides_it():
    state = cheap(3)
    model, _ = interop.from_torch("qsformer", MINI, state)
    assert (model.encoder.attn_axis, model.prototypes, model.solver) == ("batch", "sfc", "sinkhorn")
    assert (model.projection_norm, model.query_residual, model.patch_mix) == ("layer", 0.9, 0.3)
    assert model.transductive and not model.independent_features
    model, _ = interop.from_torch("qsformer", MINI | dict(attn_axis="tokens", solver="opencv"), state)
    assert (model.encoder.attn_axis, model.solver) == ("tokens", "exact")
    overrides = dict(attn_axis="tokens", query_self_attn="diagonal", prototypes="mean", dtype="bfloat16")
    model, _ = interop.from_torch("qsformer", MINI, state, **overrides)
    assert model.encoder.attn_axis == "tokens" and not model.transductive
    assert (model.prototypes, model.dtype) == ("mean", "bfloat16")
    with pytest.raises(UsageError, match="overrides has no key 'num_block'.*'num_blocks'"):
        interop.from_torch("qsformer", MINI, state, num_block=3)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(N=4), "config N is 4, but the state dict has 3 blocks.*set N to 3"),
        (dict(head=7), "config head is 7, which does not divide the width 640"),
        (dict(head_enc=9), "config head_enc is 9, which does not divide the width 640"),
        (dict(head_metric=3), "config head_metric is 3, which does not divide the width 640"),
        (dict(dataset="fc-100"), "dataset 'fc-100'.*fc100"),
        (dict(lambda1=0.3), "'lambda1'.*'lamda1'"),
        (dict(solver="qpth"), "solver 'qpth'"),
        (dict(deepemd="grid"), "config deepemd is 'grid': only 'fcn'"),
        (dict(feature_pyramid="2,3"), "config feature_pyramid is '2,3'"),
        (dict(metric="l2"), "config metric is 'l2'"),
    ],
)
def test_config_errors_name_the_key(changes, message):
    with pytest.raises(UsageError, match=message):
        interop.from_torch("qsformer", MINI | changes, cheap(3))


def test_arguments_of_training_are_ignored():
    shipped = dict(lr=5e-4, alpha=0.7, metric="cosine", norm="center", deepemd="fcn", feature_pyramid=None, sfc_bs=4)
    model, _ = interop.from_torch("qsformer", MINI | shipped, cheap(3))
    assert model == interop.from_torch("qsformer", MINI, cheap(3))[0]


def test_overrides_reach_every_module():
    model, _ = interop.from_torch("qsformer", MINI, cheap(3), dtype="bfloat16", attn_axis="tokens")
    assert model.dtype == model.encoder.dtype == model.encoder.backbone.dtype == "bfloat16"
    assert model.encoder.attn_axis == "tokens"


def test_every_tensor_that_does_not_fit_is_named():
    state = cheap(3)
    del state["trans.1.sa.in_proj_bias"], state["encoder.layer3.0.bn2.running_var"]
    state["trans.0.extra"] = np.zeros(3)
    state["patchFormer.out_proj.weight"] = np.zeros((640, 64))
    with pytest.raises(UsageError) as error:
        interop.from_torch("qsformer", MINI, state)
    for part in (
        "4 tensors",
        "missing trans.1.sa.in_proj_bias",
        "missing encoder.layer3.0.bn2.running_var",
        "surplus trans.0.extra",
        "patchFormer.out_proj.weight has shape [640, 64] instead of [640, 640]",
    ):
        assert part in str(error.value)


def test_unknown_kind_is_named():
    with pytest.raises(UsageError, match="kind of weights 'qsfomer'.*qsformer"):
        interop.from_torch("qsfomer", {}, {})


def test_unused_parameters_are_told_by_name():
    config = dict(name="qsformer", num_blocks=2, encoder=dict(name="cife", backbone=dict(name="resnet12")))
    expected = {f"trans.{i}.norm.{part}": 640 for i in range(2) for part in ("weight", "bias")}
    assert interop.unused_released(config) == expected
    small = config | dict(encoder=dict(name="cife", backbone=dict(name="conv4")))
    assert interop.unused_released(small) == {}
    assert interop.unused_released(dict(name="conv4")) == {}
