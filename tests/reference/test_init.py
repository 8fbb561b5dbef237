import math

import numpy as np
import pytest

from reference.config import GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

TINY = GPTConfig(vocab_size=61, context_length=13, emb_dim=24, n_layers=2, n_heads=3)

# The 124M model as the book builds it after torch.manual_seed(123), context length 256: the first and the last three
# elements, their sum and the sum of their squares in float64.
FINGERPRINTS = {
    "tok_emb.weight": ((0.3373701870441437, -0.1777772158384323, -0.3035275936126709),
                       (-0.3244338631629944, 0.2605539560317993, 0.5888524055480957),
                       2627.5139681208097, 38605819.075298846),
    "pos_emb.weight": ((0.8768733143806458, 0.25502535700798035, 0.8441239595413208),
                       (1.895558476448059, -0.9677063822746277, -0.12359128892421722),
                       -430.4379474184731, 195909.57200000982),
    "blocks.0.attn.query.weight": ((0.02834736742079258, -0.03321906924247742, 0.01250658929347992),
                                   (0.022126726806163788, -0.020311079919338226, -0.01660541072487831),
                                   4.245040002216765, 255.50805474848525),
    "blocks.0.attn.out.bias": ((0.02000182494521141, -0.023741455748677254, -0.0297764390707016),
                               (-0.01324830949306488, -0.03445908799767494, 0.022692175582051277),
                               0.6684405215819424, 0.3349828573744392),
    "blocks.0.mlp.down.weight": ((0.009019146673381329, -0.006656375713646412, -0.00025542223011143506),
                                 (-0.007360381074249744, -0.0014268733793869615, 0.0012637568870559335),
                                 2.547011298210208, 256.0364316594625),
    "blocks.11.attn.key.weight": ((0.009079478681087494, -0.0291186161339283, -0.02914424054324627),
                                  (-0.017493754625320435, -0.02104857936501503, -0.013466060161590576),
                                  16.746585201421464, 256.3002916550754),
    "blocks.11.mlp.down.bias": ((0.017015952616930008, -0.0034246565774083138, 0.010292422957718372),
                                (0.010551934130489826, 0.0011243980843573809, 0.004287590738385916),
                                0.14531680290838267, 0.0830151648616117),
    "head.weight": ((-0.028531109914183617, -0.0213463231921196, -0.0034006601199507713),
                    (0.006327942479401827, -0.01850740797817707, 0.012361320666968822),
                    217.1032686720274, 16750.558146360403),
}  # fmt: skip


def test_the_books_124m_model():
    params = initialize(GPTConfig(50257, 256, 768, n_layers=12, n_heads=12), Generator(123))
    for name, (first, last, total, squares) in FINGERPRINTS.items():
        flat = params[name].reshape(-1)
        assert tuple(flat[:3].tolist()) == first, name
        assert tuple(flat[-3:].tolist()) == last, name
        assert np.sum(flat, dtype=np.float64) == pytest.approx(total, rel=0, abs=1e-6), name
        assert np.einsum("i,i->", flat, flat, dtype=np.float64) == pytest.approx(squares, rel=1e-11), name


def torch_modules(torch, config):
    """The book's modules, built in its order: name -> module. Its norms draw nothing."""
    nn = torch.nn
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    modules = {
        "tok_emb": nn.Embedding(config.vocab_size, config.emb_dim),
        "pos_emb": nn.Embedding(config.context_length, config.emb_dim),
    }
    for i in range(config.n_layers):
        for name, d_out in (("query", q_dim), ("key", kv_dim), ("value", kv_dim)):
            modules[f"blocks.{i}.attn.{name}"] = nn.Linear(config.emb_dim, d_out, bias=config.qkv_bias)
        modules[f"blocks.{i}.attn.out"] = nn.Linear(q_dim, config.emb_dim, bias=config.bias)
        modules[f"blocks.{i}.mlp.up"] = nn.Linear(config.emb_dim, config.mlp_dim, bias=config.bias)
        modules[f"blocks.{i}.mlp.down"] = nn.Linear(config.mlp_dim, config.emb_dim, bias=config.bias)
    if not config.tie_embeddings:
        modules["head"] = nn.Linear(config.emb_dim, config.vocab_size, bias=config.head_bias)
    return modules


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": True, "head_bias": True},
        {"tie_embeddings": True},
        {"bias": False},
        {"n_kv_heads": 1, "head_dim": 5, "mlp_dim": 34},
    ],
)
def test_book_scheme_gives_the_bits_of_torch_modules(changes):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    config = TINY.replace(**changes)
    torch.manual_seed(123)
    expected = {
        f"{name}.{kind}": parameter.detach().numpy()
        for name, module in torch_modules(torch, config).items()
        for kind, parameter in module.named_parameters()
    }
    generator = Generator(123)
    params = initialize(config, generator)
    assert {name for name in params if "norm" not in name} == set(expected)
    exact = torch.backends.cpu.get_cpu_capability() in (
        "AVX2",
        "AVX512",
    )  # elsewhere PyTorch rounds normals differently
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, rtol=0, atol=0 if exact or "emb" not in name else 5e-7)
    assert generator.randint64() == torch.empty((), dtype=torch.int64).random_().item()


@pytest.mark.parametrize("scheme", ["book", "gpt2"])
def test_names_shapes_dtype_and_norms(scheme):
    config = TINY.replace(qkv_bias=True, head_bias=True)
    params = initialize(config, Generator(1), scheme)
    assert {name: value.shape for name, value in params.items()} == config.parameter_shapes()
    assert list(params) == list(config.parameter_shapes())
    for name, value in params.items():
        assert value.dtype == np.float32
        if "norm" in name:
            assert np.all(value == (1 if name.endswith("weight") else 0))


def test_gpt2_scheme():
    config = TINY.replace(vocab_size=997, qkv_bias=True, head_bias=True, n_layers=3)
    generator, again = Generator(1), Generator(1)
    params = initialize(config, generator, "gpt2")
    for name, value in params.items():
        if "norm" in name:
            continue
        if name.endswith("bias"):
            assert not value.any()
            continue
        residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
        std = 0.02 / math.sqrt(2 * 3) if residual else 0.02
        np.testing.assert_array_equal(value, again.normal(value.shape, 0.0, std))  # drawn in forward order
        assert abs(value.std() / std - 1) < 5 / math.sqrt(value.size)
    assert generator.randint64() == again.randint64()


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="^scheme: expected one of book"):
        initialize(TINY, Generator(0), "xavier")
