"""The scripts on CUDA without a GPU: tensors on device "cuda" have a shape and a dtype, and no values."""

import collections
import contextlib
import sys

import pytest
import torch
from test_cuda import AUGMENTATIONS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import common

FAKE = FakeTensorMode()  # one for all: tables that a function keeps are of this mode
aten = torch.ops.aten


class EndOfEpoch(Exception):
    """Three batches are through."""


class Watch(TorchDispatchMode):
    """Tensors on CUDA are fake, those on the CPU real. In a step raises what the host would wait for.

    uploads: whether a step may copy tensors to the GPU, as constants. counts: {part of the step: operations started,
    without views}; the parts are "forward", "optimiser" and whatever somebody sets `part` to.
    """

    def __init__(self):
        super().__init__()
        self.in_step, self.uploads, self.part, self.counts = False, False, "forward", collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:
            return args[0].fake_device
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        real = [value for value in tensors if not isinstance(value, FakeTensor)]
        if len(real) == len(tensors) and "cuda" not in str(kwargs.get("device")):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if function is aten._local_scalar_dense.default and not self.in_step:
            return 0
        if real:
            args, kwargs = tree_map_only(torch.Tensor, FAKE.from_tensor, (args, kwargs))
        result = function(*args, **kwargs)
        if function in (aten._to_copy.default, aten.copy_.default):
            waits = result.fake_device.type == "cpu" or real and not self.uploads
        else:
            waits = any(value.dim() for value in real)
        if self.in_step and waits:
            raise AssertionError(f"{function} is given or gives a tensor of the CPU")
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


def load_data(args, device):
    """Images of 32 pixels; photographs have 64."""
    count, side = 1024, 64 if common.is_photographs(args.dataset) else 32
    images = torch.zeros(count, 3, side, side, dtype=torch.uint8, device=device)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    return common.Dataset(images, labels, images[:, :, :32, :32], labels, common.SHAPES_CLASSES, labels)


def load_teacher(args, device, data, labels, arch, dropout=0.0, **recipe):
    teacher = common.build_model(arch, len(data.classes), dropout, amp=args.amp).to(device)
    return teacher.eval().requires_grad_(False), {}


@contextlib.contextmanager
def fake_cuda():
    """Within, `epoch` runs a script on fake tensors. Gives the Watch."""
    batches = common.Run.batches
    with pytest.MonkeyPatch.context() as patch, FAKE, Watch() as watch:

        def three_batches(run, *args):
            for step, index in enumerate(batches(run, *args)):
                watch.in_step, watch.part = 0 < step < 3, "forward"  # the first makes tables that are kept
                if step == 3:
                    raise EndOfEpoch
                watch.counts.clear()
                yield index

        def backward(loss):  # autograd's engine wants a real device
            nodes, watch.part = graph(loss), None
            for node in nodes:
                if hasattr(node, "variable"):
                    node.variable.grad = torch.empty_like(node.variable)
            watch.counts["backward"], watch.part = len(nodes), "optimiser"
            del watch.counts[None]

        def augmentation(function):
            def counted(*args, **options):
                watch.part, before = "augmentation", watch.part
                result = function(*args, **options)
                watch.part = before
                return result

            return counted

        for name in AUGMENTATIONS:
            patch.setattr(common, name, augmentation(getattr(common, name)))
        patch.setattr(common.Run, "batches", three_batches)
        patch.setattr(common, "setup", lambda args: torch.device("cuda"))
        patch.setattr(common, "multiplies_bfloat16", lambda device: False)
        patch.setattr(common, "load_data", load_data)
        patch.setattr(common, "load_teacher", load_teacher)
        patch.setattr(common, "corrupt_labels", lambda labels, *args, **kwargs: labels)
        patch.setattr(common, "channel_stats", lambda data: ((0, 0, 0), (1, 1, 1)))
        patch.setattr(sys.modules["torch.optim.optimizer"], "_foreach_supported_types", [FakeTensor])
        patch.setattr(torch.nn.Module, "_apply", assign)
        patch.setattr(FakeTensor, "__deepcopy__", copied, raising=False)
        patch.setattr(torch.Tensor, "backward", backward)
        patch.setattr(torch.autograd, "grad", lambda loss, x: (torch.empty_like(x),))
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
        yield watch


def epoch(script, *flags):
    """Three batches of a script in an epoch, on device "cuda"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, "--device", "cuda", *map(str, flags)])
        args = script.parse_args()
    args.seed = 0
    with pytest.raises(EndOfEpoch):
        script.main(args)
