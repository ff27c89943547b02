"""A training on the GPU of a Mac, pretended: it has no float64, and mixes with no tensor of the CPU."""

import pytest
import pytorch_lightning as pl
import torch
from torch.overrides import TorchFunctionMode

import finetune as ft
from finetune.compute import exact

MPS, CPU = torch.device("mps:0"), torch.device("cpu")
TO = {torch.Tensor.to, torch.Tensor.cpu}
TAKES_BOTH = {
    torch.Tensor.copy_, torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.data.__set__,
    torch.Tensor.grad.__set__, torch._has_compatible_shallow_copy_type,
}  # fmt: skip


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def on_gpu(tensor):
    return getattr(tensor, "_is_on_gpu", False)


class PretendedGpu(TorchFunctionMode):
    """Computes on the CPU, and marks the tensors that would lie on the GPU; refuses what the GPU of a Mac would."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return MPS if on_gpu(args[0]) else func(*args)
        if func in TO:
            return self._move(func, args, kwargs)
        if func is torch.Tensor.numpy or func is torch.Tensor.__array__:
            assert not on_gpu(args[0]), "can't convert a tensor of the GPU to numpy"
        given = list(tensors_in([args, kwargs]))
        is_made_there = torch.device(kwargs.get("device") or "cpu").type == "mps" or any(map(on_gpu, given))
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "mps":
            kwargs["device"] = CPU
        if is_made_there and func not in TAKES_BOTH:
            strangers = [
                one for one in given if not on_gpu(one) and one.ndim and not isinstance(one, torch.nn.Parameter)
            ]
            assert not strangers, f"{func} is given tensors of both devices: {[tuple(one.shape) for one in given]}"
        answer = func(*args, **kwargs)
        if func == torch.Tensor.data.__set__:
            args[0]._is_on_gpu = on_gpu(args[1])
        elif func is torch.Tensor.copy_:
            return answer
        elif is_made_there:
            self.calls += 1
            for one in tensors_in(answer):
                self._mark(one, func)
        return answer

    def _move(self, func, args, kwargs):
        tensor, *rest = args
        if func is torch.Tensor.cpu:
            target, dtype = CPU, None
        elif rest and isinstance(rest[0], torch.Tensor):
            target, dtype = (MPS if on_gpu(rest[0]) else CPU), rest[0].dtype
        else:
            target, dtype, _, layout = torch._C._nn._parse_to(*rest, **kwargs)
            if target is None:
                target = MPS if on_gpu(tensor) else CPU
            if layout is not None:
                tensor_ = func(tensor, memory_format=layout)
                tensor_._is_on_gpu = on_gpu(tensor)
                tensor = tensor_
        if dtype is not None and dtype != tensor.dtype:
            moved = func(tensor, dtype)
        elif (target.type == "mps") != on_gpu(tensor):
            moved = tensor.clone() if not isinstance(tensor, torch.nn.Parameter) else tensor.detach().clone()
        else:
            return tensor
        moved._is_on_gpu = False
        if target.type == "mps":
            self._mark(moved, func)
        return moved

    def _mark(self, tensor, func):
        if tensor.dtype == torch.float64:
            raise TypeError(f"{func}: the GPU of a Mac has no float64")
        tensor._is_on_gpu = True


@pytest.fixture
def gpu(monkeypatch):
    """What a Mac offers, and a place to compute in that is as strict as its GPU."""
    from lightning_fabric.accelerators.mps import MPSAccelerator as Fabric

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: True)
    for name in ("synchronize", "empty_cache", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.mps, name, lambda *rest: torch.zeros(1))
    for accelerator in (Fabric, pl.accelerators.MPSAccelerator):
        monkeypatch.setattr(accelerator, "is_available", staticmethod(lambda: True))
        monkeypatch.setattr(accelerator, "auto_device_count", staticmethod(lambda: 1))
    monkeypatch.setattr("lightning_fabric.accelerators.mps._get_all_available_mps_gpus", lambda: [0])
    with PretendedGpu() as place:
        yield place


def quiet(text):
    pass


def test_the_pretended_gpu_is_as_strict_as_one(gpu):
    there = torch.ones(3, 2).to("mps")
    assert there.device == MPS and (there @ there.T).device == MPS and torch.zeros(2, device="mps").device == MPS
    assert there.cpu().device == CPU and there.to("cpu").double().dtype == torch.float64
    with pytest.raises(TypeError, match="no float64"):
        there.double()
    with pytest.raises(TypeError, match="no float64"):
        torch.nn.BatchNorm1d(2).double().to("mps")
    with pytest.raises(AssertionError, match="both devices"):
        there + torch.ones(3, 2)
    with pytest.raises(AssertionError, match="to numpy"):
        there.numpy()
    assert exact(there).device == CPU and exact(there).dtype == torch.float64


TRAINED = [
    "train.strategy=full", "train.averaging.kind=ema", "regularization.l2_sp=0.01", "augment.mixup=0.2",
    "augment.cutmix=1", "head.dropout=0.2", "evaluate.mc_samples=3", "evaluate.views=five", "train.batch_norm=train",
    "train.averaging.snapshots=2", "train.schedule.name=cyclic", "train.epochs=2",
]  # fmt: skip
MORE = [
    ["train.strategy=full", "train.averaging.wise_ft=0.5", "train.epochs=1", "train.optimizer.name=sgd"],
    ["train.strategy=surgical", "train.epochs=1", "train.averaging.kind=swa", "train.averaging.batch_norm=exact",
     "train.batch_norm=train"],
    ["train.strategy=norm_only", "train.epochs=1", "train.imbalance.kind=focal"],
    ["train.strategy=probe"],
]  # fmt: skip


def run_on_a_mac(shapes, runs, wishes):
    recipe = ["backbone=tiny_resnet18.cifar10", "tracking.enabled=false", *wishes]
    run = ft.train(str(shapes), recipe, runs=runs, say=quiet)
    assert (run.plan.hardware.devices, run.plan.hardware.precision) == ("mps", "32")
    return run


@pytest.mark.slow
def test_a_plan_is_measured_where_there_is_no_float64(gpu, shapes):
    facts, plan = ft.plan(str(shapes), ["backbone=tiny_resnet18.cifar10"], say=quiet)
    assert facts.machine.device == plan.hardware.devices == "mps"
    assert facts.similarity.shift and facts.similarity.control and facts.timing
    assert gpu.calls > 1000


@pytest.mark.slow
def test_a_training_needs_no_float64_on_its_device(gpu, shapes, tmp_path):
    run = run_on_a_mac(shapes, tmp_path, TRAINED)
    assert gpu.calls > 10_000
    assert ft.predict(run, shapes / "disc" / "00.png")[0].label in run.classes
    assert next(run.model.parameters()).device == CPU
    joined = ft.ensemble([run], members="snapshots", runs=tmp_path, say=quiet)
    assert joined.scores.test.n == run.scores.test.n


@pytest.mark.slow
@pytest.mark.parametrize("wishes", MORE, ids=lambda wishes: wishes[0])
def test_other_trainings_need_no_float64_on_their_device(gpu, shapes, tmp_path, wishes):
    run_on_a_mac(shapes, tmp_path, wishes)
