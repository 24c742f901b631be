"""The main path on a simulated GPU: tensors carry a label, and those of two devices do not mix.

It sees no kernel and no memory; it sees a tensor that was made on the CPU and meets one of the
model's, which on a real GPU is an error.
"""
from copy import deepcopy

import pytest
import torch
from checkpoints import ONE_OF_EACH, load
from samples import QUESTIONS, images
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import information
from tokprune import METHODS, Decoding, prefill, prune, together

GPU = torch.device("cuda:0")
CPU = torch.device("cpu")
INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
WAITING = {torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.nonzero,
           torch.Tensor.__bool__, torch.Tensor.__index__}


def on_gpu(value) -> bool:
    return isinstance(value, torch.Tensor) and getattr(value, "on_gpu", False)


class SimulatedGPU(TorchFunctionMode):
    """Where a device is asked for, the CPU is given, and what is made there is labelled. waits: how
    often a value of the device was asked for."""
    waits = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if func == torch.Tensor.device.__get__:
            return GPU if on_gpu(args[0]) else CPU
        assert func is not torch.Tensor.numpy or not on_gpu(args[0]), "numpy of a GPU's tensor"
        by_mask = func in INDEXING and any(getattr(leaf, "dtype", None) == torch.bool
                                           for leaf in leaves[1:])
        self.waits += on_gpu(args[0] if args else None) and (func in WAITING or by_mask)
        wanted = None
        for leaf in leaves:
            if isinstance(leaf, torch.device) or isinstance(leaf, str) and leaf == "cpu":
                wanted = torch.device(leaf)
        if func is torch.Tensor.cpu:
            wanted = CPU
        if wanted is None and func not in INDEXING and func is not torch.Tensor.copy_:
            # a number of the CPU, without a dimension, may meet any tensor, and so may an index;
            # a CausalBias is made where it is used
            tensors = [leaf for leaf in leaves if type(leaf) in (torch.Tensor, torch.nn.Parameter)]
            devices = {on_gpu(tensor) for tensor in tensors if tensor.dim() > 0 or on_gpu(tensor)}
            assert len(devices) < 2, f"{func.__name__}: tensors of two devices"
        if wanted:
            args, kwargs = tree_map(lambda leaf: CPU if isinstance(leaf, torch.device) else leaf,
                                    (args, kwargs))
        out = func(*args, **kwargs)
        label = wanted == GPU if wanted else any(map(on_gpu, leaves))
        if isinstance(out, torch.Tensor):
            return labelled(out, label)
        return tree_map(lambda leaf: labelled(leaf, label), out)


def labelled(value, label: bool):
    if not isinstance(value, torch.Tensor) or on_gpu(value) == label:
        return value
    value = value.detach()                              # the original keeps its label
    value.on_gpu = label
    return value


@pytest.fixture(params=ONE_OF_EACH)
def model(request):
    """Its weights lie on the simulated GPU."""
    model = load(request.param)
    weights = [*model.parameters(), *model.buffers()]
    for weight in weights:
        weight.on_gpu = True
    yield model
    for weight in weights:
        del weight.on_gpu


def main_path(model):
    """Every kind of work that a run does, and what comes of it."""
    streams = [model.begin(images()["wide"], QUESTIONS[0]) for _ in range(2)]
    info = information.measure_beforehand(model, {0: together(streams)},
                                          {method: {1} for method in METHODS},
                                          lambda method: ["Yes", "No"])
    methods = [name for name, method in METHODS.items() if not method.keeps_none]
    pruned = prefill(model, together(streams), [(1, methods * 2, 3)], list(range(2 * len(methods))),
                     info)
    found = [pruned.origin.tolist(), model.decode(pruned, 2, 1.5)]
    found.append(model.decode(prefill(model, streams[0], [(1, "grid", 0.5), (2, "none", 0)]), 2))
    for mode in information.MODES:
        maps = information.token_information(model, streams[0], "Yes", [0, 2], 3, mode, "each")
        found.append(maps.tolist())
    found.append(information.answers_without_image(model, streams[0], Decoding(2)))
    found.append(information.tokens_without_image(model, streams[0], "Yes"))
    return found


def test_the_main_path_never_mixes_devices(model):
    """Red if `keep` loses its first line, which every test on a CPU passes without."""
    with SimulatedGPU():
        assert model.begin(images()["wide"], QUESTIONS[0]).x.device == GPU
        found = main_path(model)
    assert found == main_path(model)


@pytest.mark.parametrize("method", METHODS)
def test_a_selection_waits_for_the_device_no_more_often_for_more_tokens(model, method):
    """Each of take_turns' picks, and each of SparseVLM's cluster means, waited for the device."""
    with SimulatedGPU() as device:
        start = model.begin(images()["wide"], QUESTIONS[0])
        reached = model.run(start, stop=1)
        info = information.measure_beforehand(model, {0: start}, {method: {1}}, lambda _: ["Yes"])
        waits = []
        for n in (6, start.N - 2):
            before = device.waits
            prune(model, reached, method, n, 0, info.get(1))
            waits.append(device.waits - before)
    assert waits[0] == waits[1] <= 5


def test_many_variants_wait_for_the_device_as_often_as_one(model):
    """Whether the hidden states are finite was asked for each."""
    with SimulatedGPU() as device:
        reached = model.run(model.begin(images()["wide"], QUESTIONS[0]), stop=1)
        waits = []
        for seeds in ([0], list(range(5))):
            before = device.waits
            prune(model, reached, "random", 6, seeds)
            waits.append(device.waits - before)
    assert waits[0] == waits[1] == 1


def test_qwens_tower_is_widened_by_zeros_on_a_gpu_alone():
    """load_state_dict calls the hook, so that bench.py's random weights are widened, too."""
    mlp = deepcopy(load("qwen_untied", torch.float64).visual.blocks[0].mlp)
    weights = {name: weight.clone() for name, weight in mlp.state_dict().items()}
    x = torch.randn(3, mlp.gate_proj.in_features, dtype=torch.float64)
    mlp.load_state_dict(weights)
    on_cpu = mlp(x)
    assert len(mlp.gate_proj.weight) == 44
    for weight in mlp.parameters():
        weight.on_gpu = True
    with SimulatedGPU():
        mlp.load_state_dict(weights)
    shapes = [list(linear.weight.shape) for linear in mlp.children()]
    assert shapes == [[48, 32], [48, 32], [32, 48]]
    torch.testing.assert_close(mlp(x), on_cpu, rtol=0, atol=1e-12)      # another order of sums


@pytest.mark.parametrize("mistake", [
    lambda x: x + torch.ones(2), lambda x: x @ torch.ones(2, 2), lambda x: x.cpu() + x,
    lambda x: torch.cat([x, torch.zeros(1)]), lambda x: x.numpy(),
    lambda x: x.gather(0, torch.zeros(1, dtype=torch.long)),
    lambda x: x.masked_fill(torch.ones(2, dtype=torch.bool), 0)])
def test_the_simulation_notices_a_tensor_of_another_device(mistake):
    with SimulatedGPU():
        x = torch.zeros(2, device=GPU)
        assert (x * 2 + x[torch.tensor([0])] + torch.tensor(1.0)).device == GPU
        with pytest.raises(AssertionError):
            mistake(x)
