"""Parameters, FLOPs, activations and training memory of a detector by module.

They are measured in one inference and one training step; FLOPs are those of torch.utils.flop_counter.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def _count_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def count_outputs(model: nn.Module, run: Callable[[], Any]) -> dict[str, tuple[int, int]]:
    """Return the elements and bytes that each leaf module returns during `run()`."""
    outputs: dict[str, tuple[int, int]] = {}

    def hook(module, inputs, output, name):
        tensors = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
        elements, size = outputs.get(name, (0, 0))
        outputs[name] = (elements + sum(t.numel() for t in tensors), size + _count_bytes(tensors))

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(partial(hook, name=name)) for name, module in leaves]
    run()
    for handle in handles:
        handle.remove()
    return outputs


def count_flops(model: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """Return the FLOPs of each module during `run()`, "" for the whole model."""
    counter = FlopCounterMode(display=False)
    root = type(model).__name__
    with counter:
        run()
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    total = flops.pop("Global", 0)
    return {"": total} | {n.removeprefix(root + "."): v for n, v in flops.items() if n != root}


def count_saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes that autograd saves in the forward pass `run()`, without parameters and buffers."""
    model_storages = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in model_storages:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    # The result keeps the saved tensors alive, so that their addresses are unique.
    del result
    return sum(saved.values())


def _get_module_flops(name, module, flops):
    """Return the FLOPs of a module, or the sum of its children if it is never called, as a ModuleList."""
    if name in flops:
        return flops[name]
    prefix = f"{name}." if name else ""
    return sum(_get_module_flops(prefix + child, m, flops) for child, m in module.named_children())


def compute_module_costs(
    model: nn.Module, depth: int, flops: dict[str, int], outputs: dict[str, tuple[int, int]]
) -> list[dict[str, Any]]:
    """Return the costs of modules down to a depth, including their submodules; the whole model is first.

    `flops` and `outputs` are the results of `count_flops` and `count_outputs`.
    """
    costs = []
    for name, module in model.named_modules():
        if name and name.count(".") >= depth:
            continue
        total = sum(p.numel() for p in module.parameters())
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
        module_outputs = [v for n, v in outputs.items() if not name or f"{n}.".startswith(f"{name}.")]
        costs.append(
            {
                "name": name,
                "type": type(module).__name__,
                "parameters": total,
                "trainable": trainable,
                "frozen": total - trainable,
                "flops": _get_module_flops(name, module, flops),
                "activations": sum(elements for elements, _ in module_outputs),
                "activation_bytes": sum(size for _, size in module_outputs),
            }
        )
    return costs


def estimate_training_memory(
    model: nn.Module, saved_bytes: int, num_states: int, averaged: bool
) -> dict[str, int]:
    """Estimate the bytes of a training step on one device, by use.

    `num_states` is the number of optimizer states per parameter, `averaged` whether there is an EMA model.
    """
    weights = _count_bytes([*model.parameters(), *model.buffers()])
    trainable = _count_bytes(p for p in model.parameters() if p.requires_grad)
    memory = {
        "weights": weights,
        "gradients": trainable,
        "optimizer": num_states * trainable,
        "averaged": weights * averaged,
        "activations": saved_bytes,
    }
    return memory | {"total": sum(memory.values())}


def analyze_model(
    model: nn.Module,
    samples: list[dict[str, Any]],
    *,
    depth: int = 2,
    num_states: int = 1,
    averaged: bool = False,
) -> dict[str, Any]:
    """Measure one inference and one training step of a model.

    Returns:
        {"modules": `compute_module_costs` of the inference, "flops": {inference, training_forward,
        training_step}, "memory": `estimate_training_memory`}
    """
    model.eval()
    outputs = {}
    with torch.no_grad():
        flops = count_flops(model, lambda: outputs.update(count_outputs(model, lambda: model(samples))))
    model.train()
    losses = []
    forward = count_flops(model, lambda: losses.append(sum(model(samples).values())))[""]
    backward = count_flops(model, lambda: losses[0].backward())[""]
    saved = count_saved_bytes(model, lambda: model(samples))
    return {
        "modules": compute_module_costs(model, depth, flops, outputs),
        "flops": {"inference": flops[""], "training_forward": forward, "training_step": forward + backward},
        "memory": estimate_training_memory(model, saved, num_states, averaged),
    }
