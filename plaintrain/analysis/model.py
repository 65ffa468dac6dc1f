"""What a detector is made of and what it costs: parameters, FLOPs, activations and memory, by module.

One inference and one training step are run, on random images with a few objects each. FLOPs are those that
torch.utils.flop_counter counts.
"""

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


def random_samples(size, batch, num_classes, num_keypoints=0, seed=0):
    """Samples of random pixels with random objects, as a model takes them in training.

    Args:
        size: (height, width), pixels, at least 32 each.
        batch: number of images.
        num_classes: labels are 0 to one less.
        num_keypoints: of an object.
        seed: another gives others.

    Raises:
        UserError: a side that is too small, or no image.
    """
    height, width = size
    if min(size) < 32 or batch < 1:
        raise UserError(
            f"an image needs sides of 32 pixels or more, and a batch one image: not {height}x{width} "
            f"and {batch}"
        )
    generator, samples = torch.Generator().manual_seed(seed), []
    for index in range(batch):
        start = torch.rand(_OBJECTS, 2, generator=generator) * 0.5
        side = 0.1 + 0.4 * torch.rand(_OBJECTS, 2, generator=generator)
        boxes = torch.cat([start, start + side], dim=1) * torch.tensor([width, height, width, height])
        masks = torch.zeros(_OBJECTS, height, width, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        points = boxes[:, None, :2] + (boxes[:, None, 2:] - boxes[:, None, :2]) * 0.5
        points = torch.nn.functional.pad(points.expand(-1, num_keypoints, -1), (0, 1), value=2.0)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, num_classes, (_OBJECTS,), generator=generator)
        target = {"boxes": boxes, "labels": labels, "masks": masks, "keypoints": points}
        samples.append({"image": image, "target": target, "height": height, "width": width})
        samples[-1] |= {"image_id": index, "file_name": f"random {index}"}
    return samples


def _bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def watch_outputs(model, run):
    """What the modules without children give while `run()` runs: {name: [numbers, bytes]}, over all calls."""
    found, hooks = {}, []

    def hook(name):
        def count(module, inputs, output):
            seen = found.setdefault(name, [0, 0])
            tensors = [value for value in tree_leaves(output) if isinstance(value, torch.Tensor)]
            seen[0] += sum(tensor.numel() for tensor in tensors)
            seen[1] += _bytes(tensors)

        return count

    for name, module in model.named_modules():
        if not list(module.children()):
            hooks.append(module.register_forward_hook(hook(name)))
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    return found


def count_flops(model, run):
    """{name of a module, "" for the whole: FLOPs} of what `run()` runs."""
    counter, root = FlopCounterMode(display=False), type(model).__name__
    with counter:
        run()
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    whole = flops.pop("Global", 0)
    return {"": whole} | {n.removeprefix(root + "."): v for n, v in flops.items() if n != root}


def saved_bytes(model, run):
    """Bytes that the forward pass `run()` keeps for the backward pass, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    # Until here nothing is freed: no two tensors have one address.
    del result
    return sum(seen.values())


def _flops_of(name, module, flops):
    """Those of a module; a list of modules, which is never called, has those of its members."""
    if name in flops:
        return flops[name]
    prefix = f"{name}." if name else ""
    return sum(_flops_of(prefix + child, part, flops) for child, part in module.named_children())


def module_rows(model, depth, flops, outputs):
    """Of each module down to a depth what it and those in it have, in order, the whole model first.

    Args:
        model: the detector.
        depth: 0 for the whole model only.
        flops, outputs: what `count_flops` and `watch_outputs` return.

    Returns:
        list of {name, kind, parameters, trainable, frozen, flops, activations, activation_bytes}.
    """
    rows = []
    for name, module in model.named_modules():
        if name and name.count(".") >= depth:
            continue
        parameters = list(module.parameters())
        total = sum(p.numel() for p in parameters)
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        below = [v for n, v in outputs.items() if not name or n == name or n.startswith(name + ".")]
        rows.append(
            {
                "name": name,
                "kind": type(module).__name__,
                "parameters": total,
                "trainable": trainable,
                "frozen": total - trainable,
                "flops": _flops_of(name, module, flops),
                "activations": sum(numbers for numbers, _ in below),
                "activation_bytes": sum(size for _, size in below),
            }
        )
    return rows


def optimizer_copies(optimizer, momentum):
    """How many numbers an optimizer keeps for each that it trains: AdamW 2, SGD 1, or 0 without momentum."""
    return 2 if optimizer == "AdamW" else int(bool(momentum))


def training_memory(model, saved, copies, averaged):
    """Bytes of a training step on one device, by what they are for.

    Args:
        model: the detector.
        saved: what `saved_bytes` returns, of the batch of one device.
        copies: what `optimizer_copies` returns.
        averaged: whether a second, averaged model is kept.
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


def analyze(model, samples, *, depth=2, copies=1, averaged=False):
    """All that this file counts, of a model and a batch.

    Args:
        model: the detector; a training step changes the statistics of its batch norms.
        samples: list of samples with targets.
        depth, copies, averaged: see `module_rows` and `training_memory`.

    Returns:
        {"modules": rows, "flops": {inference, training_forward, training_step}, "memory": bytes}, the FLOPs
        and activations of "modules" those of an inference.
    """
    model.eval()
    outputs, flops = {}, {}

    def infer():
        with torch.no_grad():
            outputs.update(watch_outputs(model, lambda: model(samples)))

    flops = count_flops(model, infer)
    model.train()
    losses = []
    forward = count_flops(model, lambda: losses.append(sum(model(samples).values())))[""]
    backward = count_flops(model, lambda: losses[0].backward())[""]
    saved = saved_bytes(model, lambda: model(samples))
    return {
        "modules": module_rows(model, depth, flops, outputs),
        "flops": {"inference": flops[""], "training_forward": forward, "training_step": forward + backward},
        "memory": training_memory(model, saved, copies, averaged),
    }
