"""The state of training, to a checkpoint's bytes and back: bit-identical for every optimizer."""

import copy
import math

import pytest
import torch
from safetensors.torch import load as safetensors_load
from torch import nn

from fnet_dist.checkpoint.state import TrainState, check_model_state, encode, restore_state, snapshot_state
from fnet_dist.checkpoint.storage import read_checkpoint, save_checkpoint
from fnet_dist.config.schema import OptimConfig
from fnet_dist.errors import ConfigError, NonFiniteError
from fnet_dist.optim import build_optimizer
from fnet_dist.run.run_dir import RunDir

OPTIMIZERS = [
    OptimConfig(name="adam"),
    OptimConfig(name="adamw"),
    OptimConfig(name="radam"),
    OptimConfig(name="nadam"),
    OptimConfig(name="sgd", lr=0.1),
    OptimConfig(name="sgd", lr=0.1, momentum=0.9),
    OptimConfig(name="adagrad"),
    OptimConfig(name="adadelta"),
    OptimConfig(name="lbfgs", lr=0.5),
]
EVERY = pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda optim: f"{optim.name}-{optim.momentum}")
STEPS_PER_EPOCH = 4


def new_state(optim=OPTIMIZERS[0], seed=0, width=5):
    """Return a model with weights and a buffer, and its optimizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 2))
    return TrainState(model, build_optimizer(optim, model))


def train(state, steps):
    """Train `steps` steps from `state`, each on data of its own."""
    for _ in range(steps):
        state.step += 1
        data = torch.Generator().manual_seed(state.step)
        inputs, targets = torch.randn(16, 3, generator=data), torch.randn(16, 2, generator=data)

        def closure(inputs=inputs, targets=targets):
            state.optimizer.zero_grad()
            loss = (state.model(inputs) - targets).square().mean()
            loss.backward()
            return loss

        loss = state.optimizer.step(closure)
        state.epoch_steps += 1
        state.samples, state.epoch_samples = state.samples + 16, state.epoch_samples + 16
        state.epoch_loss_sum += loss.item()


def saved(state):
    return encode(snapshot_state(state, "abc", STEPS_PER_EPOCH))


def flat(value):
    """Return everything in a state as an ordered list: tensors as dtype, shape and bytes, so that -0 is not 0."""
    if isinstance(value, torch.Tensor):
        return [(value.dtype, tuple(value.shape), value.detach().resolve_neg().numpy().tobytes())]
    if isinstance(value, dict):
        return [one for key in value for one in (key, *flat(value[key]))]
    if isinstance(value, list | tuple):
        return [type(value), *(one for item in value for one in flat(item))]
    return [(type(value), value)]


def whole(state):
    counters = {
        name: value for name, value in vars(state).items() if name not in ("model", "optimizer", "window_steps")
    }
    return flat([state.model.state_dict(), state.optimizer.state_dict(), counters])


@EVERY
def test_resumed_training_gives_the_same_bits(optim, tmp_path):
    undisturbed = new_state(optim)
    train(undisturbed, 6)

    before = new_state(optim)
    train(before, 3)
    run = RunDir(tmp_path)
    save_checkpoint(run, saved(before), 1, lambda: None)
    after = new_state(optim, seed=1)
    restore_state(after, read_checkpoint(run.checkpoint(3), "abc"), STEPS_PER_EPOCH)
    assert whole(after) == whole(before)
    train(after, 3)
    assert whole(after) == whole(undisturbed)


@EVERY
def test_a_restored_state_is_saved_as_the_same_bytes(optim):
    before, after = new_state(optim), new_state(optim, seed=1)
    train(before, 3)
    restore_state(after, saved(before), STEPS_PER_EPOCH)
    assert saved(after) == saved(before)


@EVERY
def test_a_state_before_the_first_step_can_be_saved_too(optim):
    before, after = new_state(optim), new_state(optim, seed=1)
    restore_state(after, saved(before), STEPS_PER_EPOCH)
    train(before, 2)
    train(after, 2)
    assert whole(after) == whole(before)


@EVERY
def test_a_snapshot_does_not_change_while_training_continues(optim):
    """Saving runs in a thread during training."""
    state = new_state(optim)
    train(state, 2)
    taken, at_once = snapshot_state(state, "abc", STEPS_PER_EPOCH), saved(state)
    values = copy.deepcopy(taken.values)
    train(state, 2)
    assert encode(taken) == at_once
    assert taken.values == values
    assert saved(state) != at_once


def test_every_counter_and_sum_is_restored_exactly():
    before, after = new_state(), new_state(seed=1)
    before.epoch, before.step, before.samples, before.epoch_steps, before.epoch_samples = 3, 10_007, 640_448, 2, 128
    before.epoch_loss_sum, before.epoch_seconds, before.window_steps = 0.1 + 0.2, math.pi / 3, 77
    content = saved(before)
    assert [*content.values] == [
        "epoch",
        "step",
        "samples",
        "epoch_steps",
        "epoch_loss_sum",
        "epoch_samples",
        "epoch_seconds",
        "evaluated_step",
        "best_step",
        "best_value",
        "not_better",
        "run_id",
        "steps_per_epoch",
        "optimizer",
        "optimizer_parameters",
        "optimizer_state",
    ], "a new counter is saved; whatever a random stream needs is derived from these"
    restore_state(after, content, STEPS_PER_EPOCH)
    assert whole(after) == whole(before)
    assert after.epoch_loss_sum == 0.30000000000000004
    assert after.window_steps == 1, "how long a window is, the machine says that runs now"


def test_weights_that_are_not_finite_are_never_written():
    for value in (math.nan, math.inf, -math.inf):
        state = new_state()
        state.step = 7
        with torch.no_grad():
            state.model[3].weight[1, 2] = value
        with pytest.raises(NonFiniteError, match=r"^3\.weight is not finite after step 7; no checkpoint was written"):
            saved(state)


def test_an_infinite_buffer_is_saved():
    state = new_state()
    state.model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    saved(state)


def test_integer_tensors_are_saved():
    state = new_state()
    train(state, 1)
    assert state.model[1].num_batches_tracked.dtype == torch.int64
    saved(state)


def test_an_unsupported_type_in_the_optimizer_is_named():
    state = new_state(OptimConfig(name="sgd", momentum=0.9))
    train(state, 1)
    parameter = next(iter(state.optimizer.state))
    state.optimizer.state[parameter]["seen"] = {3}
    with pytest.raises(
        TypeError, match=r"the optimizer's state holds a set at 0\.weight\.seen, which no checkpoint can"
    ):
        saved(state)


def with_tensors(**tensors):
    """Return a model with these parameters and buffers beside one of its own."""
    model = nn.Linear(3, 2)
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            model.register_parameter(name, tensor)
        else:
            model.register_buffer(name, tensor)
    return model


def tied():
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7))
    model[1].weight = model[0].weight
    return model


SHARING = {
    "tied weights": tied,
    "parameters that overlap": lambda: (lambda x: with_tensors(a=nn.Parameter(x[:6]), b=nn.Parameter(x[4:])))(
        torch.randn(9)
    ),
    "buffers that overlap": lambda: (lambda x: with_tensors(a=x[:6], b=x[4:], c=x))(torch.randn(9)),
    "views of a parameter": lambda: (lambda x: with_tensors(a=nn.Parameter(x), b=x[2]))(torch.randn(3, 4)),
    "other strides": lambda: with_tensors(a=nn.Parameter(torch.randn(3, 4).t()), b=torch.randn(2, 9)[:, ::3]),
    "bits that are flipped when read": lambda: with_tensors(b=torch.randn(4, dtype=torch.complex64).conj().imag),
}


@pytest.mark.parametrize("build", SHARING.values(), ids=SHARING)
def test_tensors_that_share_memory_or_are_not_contiguous_are_saved_whole_under_each_name(build):
    torch.manual_seed(0)
    before, after, loaded = build(), build(), build()
    expected = flat(before.state_dict())
    check_model_state(before)
    assert flat(before.state_dict()) == expected
    content = saved(TrainState(before, build_optimizer(OPTIMIZERS[0], before)))
    restore_state(TrainState(after, build_optimizer(OPTIMIZERS[0], after)), content, STEPS_PER_EPOCH)
    loaded.load_state_dict(safetensors_load(content.model))
    assert flat(after.state_dict()) == flat(loaded.state_dict()) == expected


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"scale": 1.0}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (with_tensors(a=torch.zeros(1).expand(4, 5)), "a is strided float32 (4, 5), which .*refers to a single memory"),
        (with_tensors(a=torch.eye(3).to_sparse()), "a is sparse_coo float32 (3, 3), which .*"),
        (with_tensors(a=torch.zeros(3, dtype=torch.complex128)), "a is strided complex128 (3,), which .*complex128"),
        (WithExtraState(3, 2), "_extra_state is dict, which .*no attribute 'detach'"),
    ],
)
def test_what_no_checkpoint_can_save_and_restore_is_named_before_training(model, said):
    with pytest.raises(ConfigError, match="^the model's " + said.replace("(", r"\(").replace(")", r"\)")) as caught:
        check_model_state(model)
    assert "\n" not in str(caught.value)


# Checkpoints of another model or optimizer ----------------------------------------------------------------------------


def refusal(state, content, steps_per_epoch=STEPS_PER_EPOCH):
    with pytest.raises(ConfigError) as caught:
        restore_state(state, content, steps_per_epoch)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_optimizer_is_refused():
    text = refusal(new_state(OptimConfig(name="sgd")), saved(new_state(OptimConfig(name="adamw"))))
    assert text == "the checkpoint's optimizer is AdamW, the settings' SGD; fix: --optim.name"


def test_another_model_is_refused_with_the_mismatch():
    text = refusal(new_state(width=6), saved(new_state()))
    assert text.startswith("0.weight is float32 (5, 3) in the checkpoint, and float32 (6, 3) in the model; undo")


class Named(nn.Module):
    """Two layers of one shape, which an edit may put into another order."""

    def __init__(self, *names: str, frozen: str = "") -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(3, 3).requires_grad_(name != frozen))


def named_state(*names: str, frozen: str = "") -> TrainState:
    model = Named(*names, frozen=frozen)
    state = TrainState(model, build_optimizer(OptimConfig(), model))
    for number, each in enumerate(parameter for parameter in model.parameters() if parameter.requires_grad):
        each.grad = torch.full_like(each, number + 1.0)
    state.optimizer.step()
    return state


def test_after_an_edit_that_reorders_layers_each_keeps_its_own_averages():
    before, after = named_state("first", "second"), named_state("second", "first")
    restore_state(after, saved(before), STEPS_PER_EPOCH)
    for name in ("first", "second"):
        mine, theirs = (state.model.get_submodule(name).weight for state in (before, after))
        assert torch.equal(mine, theirs)
        averages = [state.optimizer.state[each]["exp_avg"] for state, each in ((before, mine), (after, theirs))]
        assert torch.equal(*averages)


def test_the_first_layer_that_is_missing_new_or_trained_by_now_is_named():
    content = saved(named_state("first", "second"))
    text = refusal(named_state("first", "third"), content)
    assert text.startswith("third.weight is missing in the checkpoint, and float32 (3, 3) in the model; ")
    text = refusal(named_state("first"), content)
    assert text.startswith("second.bias is float32 (3,) in the checkpoint, and missing in the model; ")
    text = refusal(named_state("first", "second", frozen="first"), content)
    assert text.startswith("first.weight was trained when the checkpoint was written, and is not trained now; ")
    assert "--checkpoint.resume new" in text


def test_frozen_parameters_are_not_in_the_optimizers_part():
    content = saved(named_state("first", "second", frozen="first"))
    assert content.values["optimizer_parameters"] == ["second.weight", "second.bias"]
    assert all(name.startswith("second.") for name in safetensors_load(content.optimizer))


def test_another_epoch_length_is_refused_in_the_middle_of_an_epoch():
    before = new_state()
    train(before, 3)
    text = refusal(new_state(seed=1), saved(before), steps_per_epoch=5)
    assert "is of step 3 of an epoch of 4 steps, and now an epoch has 5" in text


@pytest.mark.parametrize(("steps", "epoch_steps"), [(0, 0), (4, 5)])
def test_the_epoch_length_may_change_at_an_epochs_end(steps, epoch_steps):
    """The counter at an epoch's end becomes the new length: the epoch stays complete."""
    before, after = new_state(), new_state(seed=1)
    train(before, steps)
    restore_state(after, saved(before), steps_per_epoch=5)
    assert (after.step, after.epoch_steps) == (steps, epoch_steps)


def test_the_next_epoch_starts_with_zero_sums():
    state = new_state()
    train(state, 4)
    state.epoch_seconds = 1.5
    state.next_epoch()
    assert (state.epoch, state.step, state.samples) == (2, 4, 64)
    assert (state.epoch_steps, state.epoch_loss_sum, state.epoch_samples, state.epoch_seconds) == (0, 0.0, 0, 0.0)
