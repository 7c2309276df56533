"""QSFormer against the same model built from torch's own layers, under the names of the released state dict."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn import interop
from xattn.interop.qsformer import _layer
from xattn.interop.tensors import read
from xattn.layers.transformer import DecoderLayer, EncoderLayer
from xattn.models.qsformer import fit_prototypes

pytestmark = pytest.mark.parity


def build(config, axis):
    """The released module tree; `axis` "batch" leaves `batch_first` unset in the encoder, as released."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Stage(nn.Module):
        def __init__(self, inputs, width):
            super().__init__()
            for i in (1, 2, 3):
                conv = nn.Conv2d(inputs if i == 1 else width, width, 3, padding=1, bias=False)
                self.add_module(f"conv{i}", conv)
                self.add_module(f"bn{i}", nn.BatchNorm2d(width))
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width))

        def forward(self, x):
            y = F.leaky_relu(self.bn1(self.conv1(x)), 0.1)
            y = F.leaky_relu(self.bn2(self.conv2(y)), 0.1)
            y = self.bn3(self.conv3(y)) + self.downsample(x)
            return F.max_pool2d(F.leaky_relu(y, 0.1), 2)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            for i, (inputs, width) in enumerate([(3, 64), (64, 160), (160, 320), (320, 640)], start=1):
                self.add_module(f"layer{i}", nn.Sequential(Stage(inputs, width)))
            self.conv_3 = nn.Conv2d(320, 640, 4, stride=2, padding=1)
            batch_first = axis == "tokens"
            self.encoder_layer_3 = nn.TransformerEncoderLayer(640, config["head"], batch_first=batch_first)
            self.decoder_layer_3 = nn.TransformerDecoderLayer(640, config["head"], batch_first=batch_first)

        def forward(self, x):
            x3 = self.layer3(self.layer2(self.layer1(x)))
            x4 = self.layer4(x3)
            memory = self.encoder_layer_3(self.conv_3(x3).flatten(2).transpose(1, 2))
            tokens = self.decoder_layer_3(x4.flatten(2).transpose(1, 2), memory)
            return x4 + 0.1 * tokens.transpose(1, 2).reshape(x4.shape)

    class Projection(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(640, 640)
            self.norm = nn.LayerNorm(640)

        def forward(self, x):
            if config["dataset"] == "fc100":
                return F.normalize(self.qkv(x), dim=-1)
            return self.qkv(self.norm(x))

    class SampleFormer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(640)
            self.encoder_layer = nn.TransformerEncoderLayer(640, config["head_metric"])
            self.transformer_decoder = Projection()
            self.sa = nn.MultiheadAttention(640, config["head_metric"])

        def forward(self, support, query):
            support = self.transformer_decoder(self.encoder_layer(support))
            query = self.transformer_decoder(self.sa(query, query, query)[0] + query)
            scores = torch.softmax(query @ support.T, dim=-1)
            return scores, scores @ support

    class QSFormer(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = Encoder()
            self.trans = nn.ModuleList([SampleFormer() for _ in range(config["N"])])
            self.patchFormer = nn.MultiheadAttention(640, config["head_enc"])

        def forward(self, images, ways):
            features = self.encoder(images)
            pooled = features.mean((2, 3))
            support, query, total = pooled[:ways], pooled[ways:], 0
            for block in self.trans:
                scores, gathered = block(support, query)
                total = total + scores
                query = query + config["lamda2"] * gathered
            tokens = features.flatten(2).permute(2, 0, 1)
            mixed = self.patchFormer(tokens, tokens, tokens)[0].permute(1, 2, 0).reshape(features.shape)
            return features, total, config["lamda1"] * features + (1 - config["lamda1"]) * mixed

    return QSFormer()


@pytest.mark.parametrize("axis", ["batch", "tokens"])
@pytest.mark.parametrize("dataset", ["miniimagenet", "fc100"])
def test_random_weights_give_the_outputs_of_torch(dataset, axis):
    import torch

    config = dict(dataset=dataset, N=2, lamda=0.3, lamda1=0.4, lamda2=0.7, temperature2=0.8, solver="opencv")
    config |= dict(head=10, head_metric=2, head_enc=8 if dataset == "miniimagenet" else 1)
    torch.manual_seed(0)
    reference = build(config, axis).double().eval()
    for name, tensor in reference.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif tensor.ndim == 1:  # nothing is left at its initial 0 or 1
            tensor.add_(0.1 * torch.randn_like(tensor))
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    model, variables = interop.from_torch("qsformer", config, state, attn_axis=axis)

    ways, images = 3, np.random.default_rng(0).normal(size=(7, 84, 84, 3))
    with torch.no_grad():
        features, scores, patches = reference(torch.tensor(images).permute(0, 3, 1, 2), ways)
    features, patches = (np.moveaxis(x.numpy(), 1, -1) for x in (features, patches))

    images = jnp.asarray(images, jnp.float32)
    out = jax.jit(model.apply)(variables, images[:ways, None], images[ways:])
    embedded = jax.jit(functools.partial(model.apply, method="features"))(variables, images)
    np.testing.assert_allclose(embedded, features, atol=1e-4)
    np.testing.assert_allclose(jnp.concatenate([out["patch_support"], out["patch_query"]]), patches, atol=1e-4)
    np.testing.assert_allclose(out["global_scores"], scores.numpy(), atol=1e-4)
    local = transport_scores(patches[ways:].reshape(-1, 25, 640), patches[:ways].reshape(-1, 25, 640))
    np.testing.assert_allclose(out["local_logits"], local, atol=1e-3)
    np.testing.assert_allclose(out["logits"], 0.7 * local + 0.3 * 0.8 * scores.numpy(), atol=1e-3)


def transport_scores(query, support):
    """DeepEMD's score of every pair, one linear programme after another."""
    from scipy.optimize import linprog

    n = query.shape[1]
    rows, columns = np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))
    scores = np.zeros((len(query), len(support)))
    for i, q in enumerate(query):
        for j, s in enumerate(support):
            masses = [np.maximum(a @ b.mean(0), 0) + 1e-3 + 1e-5 for a, b in ((q, s), (s, q))]
            similarity = np.corrcoef(q, s)[:n, n:]
            plan = linprog(
                1 - similarity.ravel(),
                A_eq=np.concatenate([rows, columns]),
                b_eq=np.concatenate([n * w / w.sum() for w in masses]),
            ).x
            scores[i, j] = 12.5 / n * similarity.ravel() @ plan
    return scores


@pytest.mark.parametrize("memory", [False, True])
def test_layers_are_torchs(memory):
    import torch
    from torch import nn

    torch.manual_seed(0)
    kind = nn.TransformerDecoderLayer if memory else nn.TransformerEncoderLayer
    reference = kind(16, 4, dim_feedforward=24, batch_first=True).double().eval()
    for tensor in reference.state_dict().values():
        tensor.add_(0.1 * torch.randn_like(tensor))
    inputs = [torch.randn(2, n, 16, dtype=torch.float64) for n in ((5, 7) if memory else (5,))]
    state = {f"layer.{name}": tensor.numpy() for name, tensor in reference.state_dict().items()}
    params = read(_layer("layer", "layer", 16, 4, 24, memory=memory), state)["params"]["layer"]
    layer = DecoderLayer(4, 24) if memory else EncoderLayer(4, 24)
    out = layer.apply({"params": params}, *(jnp.asarray(x.numpy(), jnp.float32) for x in inputs))
    with torch.no_grad():
        np.testing.assert_allclose(out, reference(*inputs).numpy(), atol=1e-5)


def test_prototypes_are_fitted_by_torchs_sgd():
    import torch
    from torch.nn import functional as F

    support = np.random.default_rng(0).normal(size=(3, 2, 4, 8))
    rows = torch.tensor(support.reshape(6, 4, 8))
    prototypes = torch.nn.Parameter(torch.tensor(support.mean(1)))
    optimizer = torch.optim.SGD([prototypes], lr=0.1, momentum=0.9, dampening=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        logits = -(rows[:, None] - prototypes[None]).square().mean((-2, -1))
        F.cross_entropy(logits, torch.tensor([0, 0, 1, 1, 2, 2])).backward()
        optimizer.step()

    def scores(images, prototypes):
        return -jnp.square(images[..., :, None, :, :] - prototypes[..., None, :, :, :]).mean((-2, -1))

    support = jnp.asarray(support, jnp.float32)
    fitted = fit_prototypes(support, jax.random.key(0), scores, epochs=5, batch_size=6)
    np.testing.assert_allclose(fitted, prototypes.detach().numpy(), atol=1e-6)
