"""The scripts on CUDA without a GPU: tensors on device "cuda" have a shape and a dtype, and no values.

Where the host reads a number, it is four. A truth value is true. A mask chooses everything. Nothing is NaN.
"""

import collections
import contextlib
import functools
import itertools
import sys

import pytest
import torch
from test_cuda import AUGMENTATIONS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import common

FAKE = FakeTensorMode()  # one for all: tables that a function keeps are of this mode
LOAD = torch.load
LOAD_DATASET = common.load_dataset
draw_shapes = functools.cache(common.draw_shapes)
aten = torch.ops.aten
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
MEASURES = (aten.bincount.default, aten.equal.default, aten.allclose.default)
SUMS = (aten.any.default, aten.any.dim, aten.sum.default, aten.sum.dim_IntList)
PRODUCTS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
)


class EndOfEpoch(Exception):
    """An epoch is through, and its checkpoint about to be written."""


class Generator(torch._C.Generator):
    """Of any device, and in truth of the CPU. A dispatch mode gets another object, of the same `_cdata`."""

    made = {}  # {_cdata: generator}; they are kept, so that no other one gets the same

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self.named = torch.device(device)
        self.made[self._cdata] = self

    @property
    def device(self):
        return self.named


def device_of(value):
    """The type of its device, "cpu" or "cuda"; None of what has none."""
    if isinstance(value, FakeTensor):
        return value.fake_device.type
    if isinstance(value, torch._C.Generator):
        value = Generator.made.get(value._cdata, value)
    return value.device.type if hasattr(value, "device") else None


def refuse(function, args, kwargs):
    """Raise where a GPU would, and a fake tensor does not."""
    values = tree_leaves((args, kwargs))
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    device = kwargs.get("device") or next(map(device_of, tensors), "cpu")
    for value in values:
        if isinstance(value, torch._C.Generator) and device_of(value) != torch.device(device).type:
            raise RuntimeError(f"{function} on {device} is given a generator of {device_of(value)}")
    if function in INDEXED and device_of(args[0]) == "cpu" and "cuda" in map(device_of, tensors):
        raise RuntimeError(f"{function} of a tensor of the CPU is given an index of cuda")
    if function in MEASURES and {"cpu", "cuda"} <= set(map(device_of, tensors)):
        raise RuntimeError(f"{function} is given tensors of two devices")
    if function in PRODUCTS and len({tensor.dtype for tensor in tensors}) > 1:
        raise RuntimeError(f"{function} is given {' and '.join(str(tensor.dtype) for tensor in tensors)}")


def read(x, dtype=None, device="cuda", **_):
    """A copy on the host, of fours; None where the copy is none on the host."""
    dtype = dtype or x.dtype
    if torch.device(device).type == "cpu":
        with unset_fake_temporarily():
            return torch.full(x.shape, 4).to(dtype)


def bincount(x, weights=None, minlength=0):
    return torch.empty(minlength, dtype=torch.int64 if weights is None else weights.dtype, device=x.device)


def index(x, indices):
    """With places instead of masks; None where there is no mask."""
    places = []
    for given in indices:
        if given is not None and given.dtype == torch.bool:
            places += [torch.empty(given.numel(), dtype=torch.int64, device=given.device)] * given.dim()
        else:
            places.append(given)
    if any(place is not given for place, given in itertools.zip_longest(places, indices)):
        return aten.index.Tensor(x, places)


WAITED_FOR = {  # outside the steps, in place of what has no values
    aten._local_scalar_dense.default: lambda x: not hasattr(x, "is_nought") and (x.dtype == torch.bool or 4),
    aten.equal.default: lambda *_: True,
    aten.allclose.default: lambda *_, **__: True,
    aten._to_copy.default: read,
    aten.nonzero.default: lambda x: torch.empty(x.numel(), x.dim(), dtype=torch.int64, device=x.device),
    aten.bincount.default: bincount,
    aten.index.Tensor: index,
}


class Watch(TorchDispatchMode):
    """Tensors on CUDA are fake, those on the CPU real. In a step raises what the host would wait for.

    uploads: whether a step may copy tensors to the GPU, as constants. waits: whether steps may wait.
    memory: bytes of the GPU. counts: {part of the last step: operations started, without views}; the parts
    are "forward", "augmentation", "backward" and "optimiser".
    """

    def __init__(self):
        super().__init__()
        self.in_step = False
        self.uploads = False
        self.waits = False
        self.memory = 2**40
        self.part = None
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:
            return args[0].fake_device
        refuse(function, args, kwargs)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        real = [value for value in tensors if not isinstance(value, FakeTensor)]
        if len(real) == len(tensors) and "cuda" not in str(kwargs.get("device")):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if real:
            args, kwargs = tree_map_only(torch.Tensor, FAKE.from_tensor, (args, kwargs))
        args, kwargs = tree_map_only(torch._C.Generator, lambda _: None, (args, kwargs))
        result = None if self.in_step else WAITED_FOR.get(function, lambda *_, **__: None)(*args, **kwargs)
        if result is not None:
            return result
        result = function(*args, **kwargs)
        if function is aten.isnan.default or function in SUMS and hasattr(args[0], "is_nought"):
            result.is_nought = True
        if function in (aten._to_copy.default, aten.copy_.default):
            waits = result.fake_device.type == "cpu" or real and not self.uploads
        else:
            waits = any(value.dim() for value in real)
        if self.in_step and waits:
            raise AssertionError(f"{function} is given or gives a tensor of the CPU")
        if self.part:
            self.counts[self.part] += function.namespace == "aten" and not function.is_view
        return result


def graph(loss):
    """The nodes of a backward pass."""
    found, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions if following]
    return found


def copied(tensor, memo):
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def assign(module, function):
    """nn.Module._apply, which cannot put one fake tensor in the place of another."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(function(value.detach()), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = function(value)
    return module


def load_dataset(name, *where, **options):
    """Shapes, whatever the name; photographs have twice their size in training."""
    data = LOAD_DATASET("shapes", *where, **options)
    if common.is_photographs(name):
        data = data._replace(train_images=data.train_images.repeat(1, 1, 2, 2))
    return data


def load(*args, **options):
    with unset_fake_temporarily():  # else torch.load makes tensors without values
        return LOAD(*args, **options)


def load_teacher(args, device, data, labels, arch, dropout=0.0, **recipe):
    """One that is not trained."""
    teacher = common.build_model(arch, len(data.classes), dropout, amp=args.amp).to(device)
    return teacher.eval().requires_grad_(False), {}


@contextlib.contextmanager
def fake_cuda():
    """Within, `epoch` runs a script on fake tensors. Gives the Watch."""
    batches = common.Run.batches
    with pytest.MonkeyPatch.context() as patch, FAKE, Watch() as watch:

        def steps(run, *args):
            for step, rows in enumerate(batches(run, *args)):
                watch.in_step = step > 0 and not watch.waits  # the first makes tables that are kept
                watch.part = "forward"
                watch.counts.clear()
                yield rows
                watch.in_step, watch.part = False, None

        def backward(loss):  # autograd's engine wants a real device
            nodes, watch.part = graph(loss), None
            for node in nodes:
                if hasattr(node, "variable"):
                    node.variable.grad = torch.empty_like(node.variable)
            watch.counts["backward"], watch.part = len(nodes), "optimiser"

        def save(*_):
            raise EndOfEpoch

        def augmentation(function):
            def counted(*args, **options):
                watch.part, before = watch.part and "augmentation", watch.part
                result = function(*args, **options)
                watch.part = before
                return result

            return counted

        for name in AUGMENTATIONS:
            patch.setattr(common, name, augmentation(getattr(common, name)))
        patch.setattr(common.Run, "batches", steps)
        patch.setattr(common, "load_dataset", load_dataset)
        patch.setattr(common, "draw_shapes", draw_shapes)
        patch.setattr(common, "load_teacher", load_teacher)
        patch.setattr(sys.modules["torch.optim.optimizer"], "_foreach_supported_types", [FakeTensor])
        patch.setattr(torch.nn.Module, "_apply", assign)
        patch.setattr(FakeTensor, "__deepcopy__", copied, raising=False)
        patch.setattr(torch.Tensor, "backward", backward)
        patch.setattr(torch.autograd, "grad", lambda loss, x: (torch.empty_like(x),))
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "load", load)
        patch.setattr(torch, "save", save)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        gpu = {
            "is_available": True,
            "device_count": 1,
            "is_bf16_supported": True,
            "get_device_capability": (7, 5),
        }
        gpu |= {"set_device": None, "synchronize": None, "get_rng_state": torch.empty(16)}
        for name, value in gpu.items():
            patch.setattr(torch.cuda, name, lambda *_, value=value: value)
        memory = property(lambda _: watch.memory)
        properties = type("Properties", (), {"total_memory": memory})()
        patch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        yield watch


def epoch(script, *flags):
    """An epoch of a script on device "cuda", up to its checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, "--device", "cuda", *map(str, flags)])
        args = script.parse_args()
    args.seed = 0
    with pytest.raises(EndOfEpoch):
        script.main(args)
