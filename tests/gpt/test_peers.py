"""The whole model against an implementation that nobody here wrote: Hugging Face's GPT-2, with the same weights."""

import numpy as np
import pytest

from gpt.engine import Batch, create_engine
from reference.config import GPTConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIG = GPTConfig(101, 23, 36, n_layers=2, n_heads=3, qkv_bias=True, tie_embeddings=True)


def hugging_face_names(params):
    """Our parameters under Hugging Face's names: query, key and value in one, projections stored (in, out)."""
    names = {"tok_emb.weight": "wte.weight", "pos_emb.weight": "wpe.weight"}
    named = {theirs: params[ours] for ours, theirs in names.items()}
    for kind in ("weight", "bias"):
        named[f"ln_f.{kind}"] = params[f"final_norm.{kind}"]
        for i in range(CONFIG.n_layers):
            ours, theirs = f"blocks.{i}", f"h.{i}"
            qkv = [params[f"{ours}.attn.{part}.{kind}"] for part in ("query", "key", "value")]
            named[f"{theirs}.attn.c_attn.{kind}"] = np.concatenate(qkv).T
            named[f"{theirs}.attn.c_proj.{kind}"] = params[f"{ours}.attn.out.{kind}"].T
            named[f"{theirs}.mlp.c_fc.{kind}"] = params[f"{ours}.mlp.up.{kind}"].T
            named[f"{theirs}.mlp.c_proj.{kind}"] = params[f"{ours}.mlp.down.{kind}"].T
            named[f"{theirs}.ln_1.{kind}"] = params[f"{ours}.norm1.{kind}"]
            named[f"{theirs}.ln_2.{kind}"] = params[f"{ours}.norm2.{kind}"]
    return {f"transformer.{name}": array for name, array in named.items()}


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(0.1, 0.5, shape) for name, shape in CONFIG.parameter_shapes().items()}
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=CONFIG.vocab_size, n_positions=CONFIG.context_length, n_embd=CONFIG.emb_dim,
            n_layer=CONFIG.n_layers, n_head=CONFIG.n_heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
            attn_implementation="eager", bos_token_id=0, eos_token_id=0,
        )
    ).double()  # fmt: skip
    state = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in hugging_face_names(params).items()}
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied to wte
    tokens = rng.integers(0, CONFIG.vocab_size, (3, CONFIG.context_length + 1))
    return params, peer, Batch(tokens[:, :-1], tokens[:, 1:])


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_loss_and_every_gradient_are_those_of_hugging_face(problem, engine):
    params, peer, batch = problem
    logits = peer(torch.from_numpy(batch.inputs)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten())
    peer.zero_grad()
    loss.backward()

    ours = create_engine(engine, CONFIG, params, dtype="float64")
    assert ours.accumulate(batch) == pytest.approx(loss.item(), rel=1e-12)
    theirs = {name: p.grad.numpy() for name, p in peer.named_parameters()}
    for name, gradient in hugging_face_names(ours.gradients()).items():
        np.testing.assert_allclose(
            gradient, theirs[name], rtol=0, atol=1e-11 * np.abs(theirs[name]).max(), err_msg=name
        )


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_next_token_logits_are_those_of_hugging_face(problem, engine):
    params, peer, batch = problem
    with torch.no_grad():
        theirs = peer(torch.from_numpy(batch.inputs)).logits[:, -1].numpy()
    ours = create_engine(engine, CONFIG, params, dtype="float64").logits(batch.inputs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11 * np.abs(theirs).max())
