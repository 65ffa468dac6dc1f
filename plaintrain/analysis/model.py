"""The cost of a detector by module: parameters, FLOPs, activations, and memory of a training step.

One inference and one training step are run, on random images with a few objects each. FLOPs are those that
torch.utils.flop_counter counts.
"""

from functools import partial

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from plaintrain.utils.errors import UserError

# Of each random image.
_OBJECTS = 5
NOT_COUNTED = (
    "Counted are convolutions and matrix products, a multiplication and an addition as two FLOPs; not "
    "counted are norms, activation functions, resizing, RoIAlign, NMS, the arithmetic of boxes, and losses."
)


def make_random_samples(size, batch, num_classes, num_keypoints=0):
    """Return training samples of random pixels, of a size (height, width), with random objects."""
    height, width = size
    if min(size) < 32 or batch < 1:
        raise UserError(
            f"an image needs sides of 32 pixels or more, and a batch one image: not {height}x{width} "
            f"and {batch}"
        )
    generator, samples = torch.Generator().manual_seed(0), []
    for index in range(batch):
        start = torch.rand(_OBJECTS, 2, generator=generator) * 0.5
        side = 0.1 + 0.4 * torch.rand(_OBJECTS, 2, generator=generator)
        boxes = torch.cat([start, start + side], dim=1) * torch.tensor([width, height, width, height])
        masks = torch.zeros(_OBJECTS, height, width, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        centres = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
        points = torch.nn.functional.pad(centres.expand(-1, num_keypoints, -1), (0, 1), value=2.0)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, num_classes, (_OBJECTS,), generator=generator)
        target = {"boxes": boxes, "labels": labels, "masks": masks, "keypoints": points}
        sample = {"image": image, "target": target, "height": height, "width": width}
        samples.append({**sample, "image_id": index, "file_name": f"random {index}"})
    return samples


def _bytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def count_outputs(model, run):
    """Return {module without children: [elements, bytes] of its outputs} of all its calls during `run()`."""
    outputs = {}

    def hook(module, inputs, output, name):
        tensors = [value for value in tree_leaves(output) if isinstance(value, torch.Tensor)]
        elements, size = outputs.get(name, (0, 0))
        outputs[name] = [elements + sum(tensor.numel() for tensor in tensors), size + _bytes(tensors)]

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(partial(hook, name=name)) for name, module in leaves]
    run()
    for handle in hooks:
        handle.remove()
    return outputs


def count_flops(model, run):
    """Return {name of a module, "" for the whole: FLOPs} of what `run()` runs."""
    counter, root = FlopCounterMode(display=False), type(model).__name__
    with counter:
        run()
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    total = flops.pop("Global", 0)
    return {"": total} | {n.removeprefix(root + "."): v for n, v in flops.items() if n != root}


def count_saved_bytes(model, run):
    """Return the bytes that the forward pass `run()` keeps for the backward pass, without the parameters."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    # Until here nothing is freed: no two tensors have one address.
    del result
    return sum(saved.values())


def _module_flops(name, module, flops):
    """Return the FLOPs of a module; a list of modules, which is never called, has those of its members."""
    if name in flops:
        return flops[name]
    prefix = f"{name}." if name else ""
    return sum(_module_flops(prefix + child, part, flops) for child, part in module.named_children())


def compute_module_costs(model, depth, flops, outputs):
    """Return the cost of each module with those in it, the whole model first, down to a depth (0: only that).

    `flops` and `outputs` are what `count_flops` and `count_outputs` return.
    """
    rows = []
    for name, module in model.named_modules():
        if name and name.count(".") >= depth:
            continue
        total = sum(p.numel() for p in module.parameters())
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
        below = [v for n, v in outputs.items() if not name or f"{n}.".startswith(f"{name}.")]
        rows.append(
            {
                "name": name,
                "kind": type(module).__name__,
                "parameters": total,
                "trainable": trainable,
                "frozen": total - trainable,
                "flops": _module_flops(name, module, flops),
                "activations": sum(elements for elements, _ in below),
                "activation_bytes": sum(size for _, size in below),
            }
        )
    return rows


def estimate_training_memory(model, saved, copies, averaged):
    """Return the bytes of a training step on one device, by what they are for.

    `saved` is what `count_saved_bytes` returns, `copies` the number of values that the optimizer keeps for
    each that it trains; `averaged` says whether a second, averaged model is kept.
    """
    weights = _bytes([*model.parameters(), *model.buffers()])
    trainable = _bytes(p for p in model.parameters() if p.requires_grad)
    parts = {
        "weights": weights,
        "gradients": trainable,
        "optimizer": copies * trainable,
        "averaged": weights * averaged,
        "activations": saved,
    }
    return parts | {"total": sum(parts.values())}


def analyze_model(model, samples, *, depth=2, copies=1, averaged=False):
    """Run one inference and one training step of a model on samples with targets, and count what they cost.

    Returns:
        {"modules": `module_rows` of the inference, "flops": {inference, training_forward, training_step},
        "memory": `training_memory`}
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
        "memory": estimate_training_memory(model, saved, copies, averaged),
    }
