"""The training loop: cadence, accumulation, clipping, evaluation, dropout, errors."""

import math

import numpy as np
import pytest

from gpt.engine import IGNORE, Batch, NonFiniteError, OptimizerConfig
from gpt.errors import UserError
from gpt.train.config import TrainConfig
from gpt.train.log import read_log
from gpt.train.progress import Progress
from gpt.train.trainer import Trainer, evaluate, measured
from reference.torch_rng import Generator

ENGINES = ["numpy", "torch"]


@pytest.fixture(params=ENGINES)
def engine(request):
    if request.param == "torch":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    return request.param


class Heard(Progress):
    def __init__(self):
        self.lines, self.rows = [], []

    def step(self, row):
        self.rows.append(row)

    def line(self, text):
        self.lines.append(text)


class Batches:
    """A loader of the same given batches each pass."""

    def __init__(self, *batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)

    epoch = __iter__

    def state(self):
        return {}


def test_learns(make_trainer, engine):
    result = make_trainer(engine, epochs=25, schedule="constant", run_dir=None).run()
    assert result.train_loss < 1.2  # of ln 29 = 3.37; every second next token is a coin toss, ln 2 = 0.69
    assert result.best_loss < 1.8


def test_overfits_a_batch_it_sees_again_and_again(make_trainer, engine):
    trainer = make_trainer(engine, epochs=150, run_dir=None, eval_every=0)
    batch = next(trainer.train_loader.epoch())
    trainer = Trainer(trainer.engine, trainer.config, Batches(batch), lr=1e-2)
    trainer.run()
    assert trainer.engine.loss(batch) < 0.5


def test_engines_follow_each_other(make_trainer):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    for source in ("philox", "torch"):
        logs = []
        for name in ENGINES:
            heard = Heard()
            make_trainer(name, None, "float64", epochs=3, accumulation=2, dropout_source=source, progress=heard).run()
            logs.append(np.array([[row.loss, row.norm, row.train_loss, row.val_loss] for row in heard.rows]))
        np.testing.assert_allclose(*logs, rtol=1e-9)


@pytest.mark.parametrize("first_eval, evaluated", [("zero", [0, 5, 10, 15, 20]), ("one", [5, 10, 15, 20])])
def test_evaluations_fall_on_multiples(make_trainer, tmp_path, first_eval, evaluated):
    make_trainer(epochs=2, first_eval=first_eval).run()
    log = read_log(tmp_path / "run")
    assert log["step"][~np.isnan(log["train_loss"])].tolist() == evaluated
    assert log["step"][~np.isnan(log["val_loss"])].tolist() == evaluated
    assert log["step"][0] == (0 if first_eval == "zero" else 1)


def test_counts_every_input_token(make_trainer, tmp_path):
    trainer = make_trainer(epochs=2)
    result = trainer.run()
    assert len(trainer.train_loader) == 12
    assert result.tokens == 2 * 12 * 4 * 8
    assert read_log(tmp_path / "run")["tokens"].tolist() == [32 * (i + 1) for i in range(24)]


def test_log_has_the_learning_rates(make_trainer, tmp_path):
    trainer = make_trainer(steps=30, warmup_steps=10, initial_lr=1e-3, min_lr=1e-4)
    trainer.run()
    lrs = read_log(tmp_path / "run")["lr"]
    assert lrs.tolist() == [trainer.learning_rate(step) for step in range(30)]
    assert lrs[0] == 1e-3
    assert lrs[10] == lrs.max() == 1e-2
    assert 1e-4 < lrs[-1] < 3e-4


def test_steps_cross_epochs(make_trainer, tmp_path):
    assert make_trainer(steps=30).run().step == 30
    assert read_log(tmp_path / "run")["epoch"].tolist() == [(i + 1) / 12 for i in range(30)]


def test_accumulation_equals_one_big_batch(make_trainer):
    """Micro-batches of unequal counts give the gradient of the mean over all counted tokens, dropout included."""
    rng = np.random.default_rng(1)
    inputs, targets = rng.integers(0, 29, (2, 6, 8))
    targets[0, :7] = targets[3] = targets[5, 2:] = -100  # 1 + 8 + 8, 0 + 8 + 2 counted
    whole = [Batch(inputs, targets)]
    parts = [Batch(inputs[i:j], targets[i:j]) for i, j in ((0, 1), (1, 3), (3, 4), (4, 6))]
    finals = []
    for batches in (whole, parts):
        model = make_trainer(dtype="float64").engine
        heard = Heard()
        config = TrainConfig(epochs=3, accumulation=len(batches), eval_every=0)
        Trainer(model, config, Batches(*batches), lr=1e-2, progress=heard).run()
        finals.append((model.parameters(), heard.rows))
    for name, array in finals[0][0].items():
        if not name.endswith("key.bias"):  # true gradient 0: AdamW amplifies its rounding
            np.testing.assert_allclose(finals[1][0][name], array, rtol=0, atol=1e-12, err_msg=name)
    for one, other in zip(finals[0][1], finals[1][1], strict=True):
        assert math.isclose(one.loss, other.loss, rel_tol=1e-12)
        assert math.isclose(one.norm, other.norm, rel_tol=1e-12)
        assert one.tokens == other.tokens


def test_last_step_of_an_epoch_takes_what_is_left(make_trainer, tmp_path):
    trainer = make_trainer(epochs=2, accumulation=5)
    assert trainer.run().step == 2 * 3  # 5 + 5 + 2 of 12 micro-batches
    assert np.diff(read_log(tmp_path / "run")["tokens"], prepend=0).tolist() == [160, 160, 64] * 2


class Recorder:
    """An engine that notes how it is driven."""

    name, config = "recorder", None

    def __init__(self):
        self.steps, self.noises, self.lasts = [], [], []

    def loss(self, batch):
        return 1.0

    def accumulate(self, batch, weight, noise, last):
        self.noises.append((noise.step, noise.first_example))
        self.lasts.append(last)
        return 1.0

    def step(self, lr, max_norm):
        self.steps.append((lr, max_norm))
        return 1.0


def test_clips_from_the_first_step_or_later():
    batch = Batch(np.zeros((3, 4), int), np.zeros((3, 4), int))
    for start, norms in ((0, [1.0] * 4), (2, [None, None, 1.0, 1.0])):
        model = Recorder()
        Trainer(model, TrainConfig(clip_from_step=start), Batches(*[batch] * 4), lr=1).run()
        assert [max_norm for _, max_norm in model.steps] == norms
    Trainer(model := Recorder(), TrainConfig(max_norm=None), Batches(batch), lr=1).run()
    assert model.steps == [(1.0, None)]


def test_dropout_is_told_step_and_example():
    sizes = (3, 2, 3, 1)
    batches = [Batch(np.zeros((n, 4), int), np.zeros((n, 4), int)) for n in sizes]
    model = Recorder()
    Trainer(model, TrainConfig(epochs=2, accumulation=3), Batches(*batches), lr=1).run()
    assert model.noises == [(0, 0), (0, 3), (0, 5), (1, 0), (2, 0), (2, 3), (2, 5), (3, 0)]
    assert model.lasts == [False, False, True, True, False, False, True, True]


def test_clipping_scales_a_gradient_of_norm_5_to_1():
    """The appendix's G = [[1, 2], [2, 4]], as PyTorch clips it."""
    from reference.optim import clip_scale, global_norm

    gradient = np.array([[1.0, 2.0], [2.0, 4.0]])
    assert global_norm({"w": gradient}) == 5
    clipped = gradient * clip_scale(5.0, max_norm=1.0)
    np.testing.assert_allclose(clipped, [[0.2, 0.4], [0.4, 0.8]], atol=1e-6)


def test_evaluation_changes_nothing(make_trainer, engine):
    trainer = make_trainer(engine, run_dir=None)
    model = trainer.engine
    batch = next(trainer.train_loader.epoch())
    model.accumulate(batch)
    before = [{k: v.copy() for k, v in arrays.items()} for arrays in (model.parameters(), model.gradients())]
    losses = [evaluate(model, trainer.validation_loader) for _ in range(2)]
    assert losses[0] == losses[1]  # no dropout
    for arrays, old in zip((model.parameters(), model.gradients()), before, strict=True):
        assert all((arrays[name] == array).all() for name, array in old.items())


class Losses(Recorder):
    """The loss of a batch is its first input."""

    def loss(self, batch):
        return float(batch.inputs[0, 0])


def losses(*values, counted=()):
    """A loader of such batches, of which so many targets count."""
    counts = counted or [1] * len(values)
    rows = [
        (np.full((1, 3), value), np.where(np.arange(3) < n, 0, IGNORE)[None])
        for value, n in zip(values, counts, strict=True)
    ]
    return Batches(*(Batch(*row) for row in rows))


def test_evaluate_means_over_batches():
    assert evaluate(Losses(), losses(1, 2, 6)) == 3
    assert evaluate(Losses(), losses(1, 2, 6), batches=2) == 1.5
    assert evaluate(Losses(), losses(1, 2, 6), batches=100) == 3
    assert math.isnan(evaluate(Losses(), losses()))


def test_each_batch_counts_the_same_in_the_loss_and_each_counted_target_in_other_metrics():
    def measure(engine, batch):
        return {"loss": engine.loss(batch), "accuracy": float(batch.inputs[0, 0] == 6)}

    found = measured(Losses(), losses(1, 2, 6, counted=[1, 1, 3]), None, measure)
    assert found == {"loss": 3, "accuracy": 3 / 5}
    assert math.isnan(measured(Losses(), losses(1, counted=[0]), None, measure)["accuracy"])


def test_evaluation_draws_from_the_stream_as_the_book(make_trainer):
    """Two int64 for the shuffled loader, one for the other; without evaluation one pass draws two."""
    trainer = make_trainer(steps=1, eval_every=1, run_dir=None, eval_batches=1)
    ours = Generator(0)
    ours.set_state(trainer.generator.state())
    trainer.run()
    for _ in range(2 + 2 + 1):
        ours.randint64()
    assert trainer.generator.state() == ours.state()


def test_one_sample_an_epoch_or_every_n_steps(make_trainer):
    for settings, count in (({}, 2), ({"sample_every": 8}, 3), ({"sample_every": 0}, 0)):
        heard = Heard()
        make_trainer(epochs=2, run_dir=None, sample=lambda engine: engine.name, progress=heard, **settings).run()
        assert heard.lines == ["numpy"] * count


def test_non_finite_loss_names_step_tensor_and_checkpoint(make_trainer, engine, tmp_path):
    class Poison(Progress):
        def step(self, row):
            if row.step == 13:
                params = {name: array.copy() for name, array in trainer.engine.parameters().items()}
                params["blocks.1.mlp.up.weight"][3, 2] = np.nan
                trainer.engine.load_parameters(params)

    trainer = make_trainer(engine, epochs=2, progress=Poison())
    with pytest.raises(NonFiniteError, match=r"step 14: .*blocks\.1\.mlp\.up\.weight.*run/last-00000012"):
        trainer.run()
    assert (tmp_path / "run" / "last-00000012").is_dir()


def test_non_finite_loss_without_a_checkpoint(make_trainer):
    trainer = make_trainer(epochs=1, run_dir=None, optimizer=OptimizerConfig(lr=1e38), schedule="constant")
    with pytest.raises(NonFiniteError, match=r"^step \d+: .*no checkpoint"), np.errstate(all="ignore"):
        trainer.run()


def test_refuses_what_it_cannot_train_on():
    with pytest.raises(UserError, match="no batches"):
        Trainer(Recorder(), TrainConfig(), Batches(), lr=1)
    with pytest.raises(UserError, match="dropout_source"):
        Trainer(Recorder(), TrainConfig(dropout_source="torch"), Batches(1), lr=1)
