"""Deliberate defects for mutation_check.py: below each file `text => text in its place`.

What does not fit into a line has its replacement below it, line by line. Those of `PLANTED` are under the
test file whose properties must catch them.
"""


def read_defects(text):
    """Return {file: [(text, text in its place)]}."""
    defects = {}
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            changes = defects.setdefault(line, [])
        elif line.startswith("    =>"):
            changes[-1][1].append(line[7:])
        else:
            old, arrow, new = line[4:].replace("\\n", "\n").partition(" =>")
            changes.append((old, [new[1:]] if arrow else []))
    return {file: [(old, "\n".join(new)) for old, new in changes] for file, changes in defects.items()}


MUTATIONS = read_defects(r"""
plaintrain/solver/accumulation.py
    (end - start) / len(samples), end => 1 / steps, end
    for name, value in loss_dict.items() if "loss" in name] => for name, value in loss_dict.items()]
plaintrain/checkpoint/resume_check.py
    class_names, strict=True) => class_names, strict=False)
plaintrain/checkpoint/checkpointer.py
            self.last_name = name\n =>
    state.load_rng_states(data.pop("rng_states")) => data.pop("rng_states")
    state.average_norm_buffers(weights)  # all ranks => pass
plaintrain/config/config.py
    if type(old) is not type(value): => if not isinstance(value, type(old)):
    if not node.is_new_allowed() or key in vars(node): => if key in vars(node):
    return value\n    raise ConfigError(f"{name} in {source} must be a plain
    => return str(value)
    =>     raise ConfigError(f"{name} in {source} must be a plain
plaintrain/visualization/curves.py
    average / total if total => average if total
plaintrain/data/cache.py
    [str(image_root), list(classes or ()), Image => [str(image_root), Image
plaintrain/data/catalog.py
    return list(selected) => return [name for name in available if name in selected]
    if other != classes: => if set(other) != set(classes):
plaintrain/data/datasets/coco.py
    ["keypoints"] = shift_keypoints(keypoints, 0.5) => ["keypoints"] = list(keypoints)
    return sorted(categories, key=lambda category: category["id"]) => return categories
    detection["score"] >= score_thresh => detection["score"] > score_thresh
plaintrain/data/transforms/copy_paste.py
    tensors["visibility"].clamp(max=1) => tensors["visibility"].clamp(max=0)
plaintrain/data/transforms/crops.py
    crop(select_instances(tensors, inside), top => crop(tensors, top
plaintrain/data/image_files.py
    (width, height, orientation) if orientation >= 5 else  =>
plaintrain/data/keypoints.py
    compute_hflip_indices(names, metadata.get("keypoint_flip_map")) => compute_hflip_indices(names)
plaintrain/data/build.py
    is_train=True, augmentations=build_augmentation(cfg, is_train=False) => is_train=True
    -(-side // _STRIDE) * _STRIDE => side // _STRIDE * _STRIDE
    1 <= steps <= per_rank => 1 <= steps <= batch_size
plaintrain/data/dataset_mapper.py
    as_subclass(torch.Tensor) * (visibility > 0) => as_subclass(torch.Tensor)
    = [a for a in record["annotations"] if not a.get("iscrowd", 0)] => = record["annotations"]
    (tensors, has_extent(tensors)) => (tensors, tensors["labels"] >= 0)
plaintrain/data/transforms/photometric.py
    h = round(math.sqrt(area * ratio)) => h = round(math.sqrt(area / ratio))
plaintrain/data/records.py
    problems["empty_box"] | problems["outside_box"] => problems["empty_box"]
    table.keypoints * objects => table.keypoints
    enumerate(record["annotations"], start) => enumerate(record["annotations"])
    os.path.basename(path) not in list_folder => not list_folder
plaintrain/data/validation.py
    is_whole(label) and 0 <= label < num_classes => is_whole(label) and 0 <= label <= num_classes
plaintrain/data/samplers.py
    head = min((position - epoch * self.size) % batch_size, self.size) => head = 0
    , self.get_position(iteration), self => , iteration * self.batch_size, self
    + rank * num_images => + rank
    np.bincount(labels) / len(records) => np.bincount(labels) / len(labels)
    .repeat([factors[name] for name in names] => .repeat([factors[name] for name in sorted(names)]
plaintrain/data/datasets/shapes.py
    for other in shapes[index + 1 :]) => for other in shapes[:index])
plaintrain/analysis/dataset.py
    np.digitize(area, (_MEDIUM, _LARGE)) => np.digitize(area, (_LARGE, 2 * _LARGE))
plaintrain/data/transforms/tensors.py
    value.canvas_size[1 - axis] - points => value.canvas_size[1 - axis] - 1 - points
    for name in ("keypoints", "visibility")} => for name in ("keypoints",)}
    InterpolationMode.NEAREST_EXACT => InterpolationMode.NEAREST
    fill=fill if isinstance(value, tv_tensors.Image) else 0 => fill=fill
    torch.tensor([width, height]) => torch.tensor([height, width])
    keep &= tensors["masks"].as_subclass(Tensor).flatten(1).any(dim=1).bool() => keep &= keep
plaintrain/data/loader.py
    while waiting:\n            yield [sample.result() for sample in waiting.popleft()]
    => while waiting:
    =>             yield [sample.result() for sample in waiting.pop()]
    np.random.default_rng((self.seed, position))) => np.random.default_rng((self.seed, index)))
    np.random.default_rng((self.seed, position, 0)) => np.random.default_rng()
            np.random.set_state(before[1])\n =>
plaintrain/data/transforms/geometric.py
    int(size[0] + 0.5)), max(1, int(size[1] + 0.5)) => int(size[0])), max(1, int(size[1]))
    rng.integers(low, high + 1) => rng.integers(low, max(high, low + 1))
plaintrain/data/datasets/voc.py
    (start - 1 if start else start for start in (x0, y0)) => (x0, y0)
    if "<!DOCTYPE" not in text: => if text:
plaintrain/data/datasets/write.py
    shift_keypoints(annotation["keypoints"], -0.5) => list(annotation["keypoints"])
    "iscrowd": int(annotation.get("iscrowd", 0)) => "iscrowd": 0
plaintrain/data/datasets/yolo.py
    names = [names[class_id] for class_id in ids] => names = list(names.values())
    path.rsplit( => path.split(
plaintrain/engine/early_stopping.py
    "loss" in name.rpartition("/")[2].partition("-")[0] => "loss" in name
    0 < self._patience <= self.num_waited => 0 < self._patience < self.num_waited
    sign = -1 if => sign = 1 if
    self.num_waited = state_dict["num_waited"] => self.num_waited = 0
    iteration <= self._last_iter: => iteration < self._last_iter:
plaintrain/solver/ema.py
    use_buffers=True => use_buffers=False
    decay = min(decay, (1 + self => decay = max(decay, (1 + self
plaintrain/engine/setup.py
    seed_all_rng(cfg.SEED + comm.get_rank()) => seed_all_rng(cfg.SEED)
    None if resume else move_old_run(folder) => move_old_run(folder)
                    lock_folder(folder)\n =>
    seed = load_chain(saved)[-1][1].get("SEED", -1) => seed = -1
plaintrain/analysis/analyze.py
    len(boxes.objects["crowd"]) - crowds => len(boxes.objects["crowd"])
        wrong = wrong[objects["state"][detections["object"][wrong]] != "detected"]\n =>
plaintrain/analysis/breakdown.py
    (objects["labels"][real], detected_as[real]) => (detected_as[real], objects["labels"][real])
    (ends + 1 + count) => (ends + count)
    (first != second) & (iou >= OVERLAP_IOU) => iou >= OVERLAP_IOU
plaintrain/evaluation/coco.py
    ious[:limit, (areas => ious[:, (areas
    precision[..., i, -1] for i, size in => precision[..., i - 1, -1] for i, size in
    sorted(image_ids[detections.seen].tolist()) => sorted(image_ids.tolist())
plaintrain/evaluation/coco_backend.py
    setattr(evaluation.params, name, value) => pass
plaintrain/evaluation/coco_gt.py
    np.argsort(np.argsort(ids)) + 1 => np.argsort(ids) + 1
    "id": len(annotations) + 1 => "id": len(annotations)
plaintrain/analysis/errors.py
    _rank_in_class(detections) >= MAX_DETECTIONS => _rank_in_class(detections) > MAX_DETECTIONS
    (own[1] >= BACKGROUND_IOU) & (own[1] < iou_threshold) => own[1] >= BACKGROUND_IOU
    kind="stable")[::-1] => kind="stable")
plaintrain/evaluation/detections.py
    objects["crowd"][o0:o1].astype(np.uint8) => np.zeros(o1 - o0, dtype=np.uint8)
    np.argsort(table[:, 0], kind="stable") => np.arange(len(table))
    (table[:, 5] >= len(self.classes)) => (table[:, 5] > len(self.classes))
    comm.gather(collected) if self._distributed else [collected] => [collected]
plaintrain/evaluation/evaluator.py
    pending.popleft().result() => pending.popleft()
    not abs(actual - expected) <= tolerance => abs(actual - expected) > tolerance
    module.training = training => module.training = True
plaintrain/evaluation/predictions.py
    , parse_constant=lambda name: None) => )
    key=lambda result: index[result["image_id"]] => key=lambda result: -index[result["image_id"]]
plaintrain/evaluation/val_loss.py
    value.float() * len(samples) => value.float()
    not isinstance(module, _AS_IN_EVALUATION) => True
plaintrain/evaluation/voc.py
    precision[recall >= t] => precision[recall > t]
    ~difficult & np.isin => np.isin
    above = ious > iou / 100 => above = ious >= iou / 100
    bool(a.get("difficult") or a.get("iscrowd")) => bool(a.get("difficult"))
plaintrain/export/export.py
    .masked_fill(detections["labels"][:, None] != expected["labels"], float("inf")) =>
plaintrain/engine/distributed_env.py
    [int(count)] * int(times or 1) => [int(count)]
plaintrain/engine/launch.py
    job["first_rank"] + local_rank => local_rank
    code = 128 + received[0] if received else 1 => code = 1
plaintrain/modeling/backbones.py
    norm.bias - norm.running_mean * scale => norm.bias + norm.running_mean * scale
    for stage in stages[:freeze_at]: => for stage in stages[: max(0, freeze_at - 1)]:
    stage[0].conv2.stride = (1, 1) => stage[0].conv2.stride = (2, 2)
plaintrain/modeling/detector.py
    ["width"] / width, sample["height"] / height => ["height"] / height, sample["width"] / width
    backbone.strides, offset) => backbone.strides)
    (boxes[:, 2:] <= boxes[:, :2]) => (boxes[:, 2:] < boxes[:, :2])
plaintrain/modeling/fcos.py
    < radius * strides => < 1.5 * strides
    1e8 - (x1 - x0) * (y1 - y0) => 1e8 + (x1 - x0) * (y1 - y0)
plaintrain/export/graph.py
    images.flip(1) if transform.bgr else images => images
plaintrain/modeling/losses.py
    -math.log((1 - probability) / probability) => math.log((1 - probability) / probability)
    .mul_(gamma).add_(p).mul_(factor) => .mul_(gamma).mul_(factor)
    return box_loss.weight * losses => return losses
    anchors, box_coder.weights).view_as => anchors, (1.0, 1.0, 1.0, 1.0)).view_as
plaintrain/modeling/matching.py
    ((iou == iou.amax(dim=2, keepdim=True)) & valid) => (iou == iou.amax(dim=2, keepdim=True))
    .clamp(max=box_coder.bbox_xform_clip) =>
    (keys + 2 * foreground) => keys
plaintrain/modeling/poolers.py
    torch.log2(relative + 1e-8) => torch.log2(relative + 1e-8) - 1
    [1 / stride for stride in strides] => [1 / strides[0] for stride in strides]
plaintrain/modeling/postprocess.py
    torch.full_like(idxs[-1], i) => torch.full_like(idxs[-1], 0)
    batched_nms(b, s, k, nms_thresh) => batched_nms(b, s, torch.zeros_like(k), nms_thresh)
plaintrain/modeling/retinanet.py
    loss.masked_fill(~(foreground | background), 0).sum(dim=1) => loss.sum(dim=1)
plaintrain/modeling/roi_heads.py
    deltas, boxes, gt_boxes, labels > 0) => deltas, boxes, gt_boxes, labels >= 0)
    [label + 1 for label in labels] => labels
    loss * self.keypoint_loss_weight => loss
    .masked_fill(~foreground, 0).masked_fill(~valid, _IGNORED) => .masked_fill(~foreground, 0)
plaintrain/modeling/rpn.py
    weight = self.loss_weight / normalizer => weight = 1 / normalizer
    batch_size_per_image * len(valid) => batch_size_per_image
    (1, 1, 1, 1), value=num_locations) => (1, 1, 1, 1), value=0)
plaintrain/modeling/tta.py
    detection["keypoints"][:, list(order)] => detection["keypoints"]
    m.flip(-1) if s["flipped"] else m for m => m for m
plaintrain/engine/nonfinite.py
            comm.copy_tensors(self._before, self._buffers)\n =>
    if comm.any_rank(bool(bad)): => if bad:
            self.num_in_row = 0\n        self._remember =>         self._remember
    register_load_state_dict_post_hook(self._remember_buffers) => modules()
    check_norm=not self._scaler.is_enabled() => check_norm=True
plaintrain/predict.py
    averaged = cfg.MODEL.EMA.ENABLED and cfg.MODEL.EMA.EVALUATE == "averaged" => averaged = False
plaintrain/engine/preflight.py
    not (test.BEST_METRIC and (test.EVAL_PERIOD or is_loss)) => not test.BEST_METRIC
plaintrain/report/detections.py
     - 2 * classes.diagonal() =>
    for key in ("score", "precision")) => for key in ("precision", "score"))
plaintrain/report/build.py
    autoescape=True => autoescape=False
plaintrain/report/runs.py
    np.diff(iterations, prepend=-1) * times => times
    100 * data / seconds => 100 * data / (seconds + data)
plaintrain/checkpoint/training_checkpointer.py
            self._delete_temporary()\n        if not every =>         if not every
    if error is None or isinstance(error, Stopped): => if error is None:
    averaged = cfg.MODEL.EMA.ENABLED and cfg.MODEL.EMA.EVALUATE == "averaged" => averaged = False
plaintrain/analysis/run_folder.py
    max(0, state.max_iter - state.iteration - 1) => state.max_iter
    re.sub(r"\d+(\.\d+)?", "#", text) => text
plaintrain/solver/schedule.py
    for key in ("SOLVER.BASE_LR", "SOLVER.BASE_LR_END"): => for key in ("SOLVER.BASE_LR",):
    max(round(count * factor), 1) if count > 0 else count => round(count * factor)
        "TEST.EVAL_START",\n =>
plaintrain/solver/lr_scheduler.py
    (0.0 if self.rescale_interval else self.warmup_length) => (0.0)
    bisect.bisect_right(steps, round( => bisect.bisect_left(steps, round(
            self._set_momentum(self.base_momentum)\n =>
plaintrain/solver/build.py
    nn.GroupNorm,  =>
    clip.NORM_TYPE if clip.ENABLED else 2.0 => 2.0
plaintrain/structures.py
    return coco_mask.merge(polygons) => return polygons[0]
    len(polygon) >= 6 => len(polygon) >= 4
    (side, side), aligned=aligned) => (side, side), aligned=False)
plaintrain/engine/dry_run.py
    equal_nan=True => equal_nan=False
        set_value(cfg, "DATASETS.TEST", (name,))\n =>
plaintrain/checkpoint/async_writer.py
            self.wait()\n        return copy_to_host =>         return copy_to_host
            previous.result()\n =>         pass\n
plaintrain/checkpoint/files.py
    with atomic_write(path, "wb") as f: => with open(path, "wb") as f:
            with atomic_write(path, "wb") as f:\n
    =>         if last:
    =>             write_last_checkpoint(os.path.dirname(path), os.path.basename(path))
    =>         with atomic_write(path, "wb") as f:
    =>
    map_location="cpu", weights_only=True => map_location="cpu", weights_only=False
    if match else "model")] => if match else "model")[::-1]]
    _(\d{{7,}}|final) => _(\d{{7}}|final)
    max(0, len(others) - max_to_keep + 1) => max(0, len(others) - max_to_keep + 2)
plaintrain/utils/comm.py
    names = sorted(input_dict) => names = list(input_dict)
            values /= get_world_size()\n =>         values /= 1\n
    names = ("running_mean", "running_var") => names = ("running_mean",)
    return broadcast(int.from_bytes( => return (int.from_bytes(
            copy_tensors(own, buffers) =>         pass
plaintrain/utils/writers.py
    event.step < start_iter: => event.step <= start_iter:
    Event(step=iteration, summary=Summary(value => Event(step=iteration + 1, summary=Summary(value
    (self._read_scalars().items()) if i < start_iter} => (self._read_scalars().items())}
    _replace_nonfinite({"iteration": iteration, **row}), allow_nan=False => {"iteration": iteration, **row}
    set().union(*scalars.values()) <= set(self._columns) => bool(self._columns)
plaintrain/utils/events.py
    self._max_iter - storage.iter - 1 => self._max_iter
plaintrain/utils/files.py
                    os.fsync(f.fileno())\n =>
                os.unlink(temporary)\n =>             pass\n
    os.path.join(os.path.abspath(folder), "") => os.path.abspath(folder)
plaintrain/utils/heartbeat.py
    _Heartbeat.limit + extra => _Heartbeat.limit
    seconds or math.inf => seconds
plaintrain/utils/lock.py
    fcntl.LOCK_EX | fcntl.LOCK_NB => fcntl.LOCK_SH | fcntl.LOCK_NB
        _HELD[folder] = fd\n =>
    return False if f" on {socket.gethostname()}, " in owner else None => return False
plaintrain/utils/memory.py
    (2**20 if sys.platform == "darwin" else 2**10) => 2**20
plaintrain/checkpoint/state.py
            group.update(own)\n =>         pass\n
    saved[comm.get_rank()] => saved[0]
    "storage"] = {"iteration": data.get("iteration", -1),  => "storage"] = {"iteration": 0, 
plaintrain/utils/storage.py
    ("loss" in name or name == "grad_norm") => "loss" in name
    iteration = min(bad)[0] => iteration = max(bad)[0]
plaintrain/engine/watchdog.py
                time.sleep(_CONNECTION_SECONDS)\n =>
                    heartbeat.forgive(gap)\n =>                 pass\n
plaintrain/config/rules.py
    type(value) in (int, float) and is_in_range => isinstance(value, int | float) and is_in_range
    number("above 0", lambda value: value > 0) => number("above 0", lambda value: value >= 0)
plaintrain/config/schema.py
    str(get_value(cfg, switch)) not in values => str(get_value(cfg, switch)) in values
plaintrain/config/yaml.py
    os.path.join(os.path.dirname(path), os.path.expanduser(base)) => os.path.expanduser(base)
    loaded += load_chain(base, (*chain, path)) => loaded = load_chain(base, (*chain, path)) + loaded
                    seen.add(key.value)\n =>
plaintrain/visualization/drawing.py
    [(a - 1, b - 1) for a, b in metadata => [(a, b) for a, b in metadata
    .tensor([size[1] / width, size[0] / height]) => .tensor([size[0] / height, size[1] / width])
plaintrain/checkpoint/weight_checks.py
    ALIGNED": ("roi_heads.mask_head.", True, False) => ALIGNED": ("roi_heads.mask_head.", True, True)
plaintrain/checkpoint/torchvision.py
    torch.tensor([file_names.index(name) for name in class_names])
    => torch.tensor(sorted(file_names.index(name) for name in class_names))
plaintrain/checkpoint/detectron2.py
    anchors.transpose(0, 1).flatten(0, 2) => anchors.flatten(0, 2)
    1 if to_torchvision else -1, 0 => -1 if to_torchvision else 1, 0
plaintrain/checkpoint/pretrained.py
    (module|model|_orig_mod) => (module|model)
    raise UserError(f"it imports {module}.{name}, which could run code")
    => return super().find_class(module, name)
    digest[1] if digest else "" => ""
scripts/convert_dataset.py
    [min(max(value, 0), 1) for value in unclipped] => unclipped
scripts/epoch_train_net.py
    is_end and validates_after(cfg, epoch) => validates_after(cfg, epoch)
    or (is_end and epoch >= 0) => or False
    .EVAL_START) for i in iterations) => .EVAL_START) for i in [iteration])
scripts/plain_train_net.py
        amp.scaler.unscale_(optimizer)\n =>
        optimizer.zero_grad()\n =>
    .get("iteration", -1) + 1 => .get("iteration", 0)
    metrics |= do_validate(cfg, eval_model) => do_validate(cfg, eval_model)
    comm.reduce_dict(losses) => dict(losses)
    return Due(save=True, stop=True) => return Due(stop=True)
            if start_iter > 0:\n =>         if start_iter < 0:\n
    (cfg.TEST.EVAL_PERIOD, iteration, start=cfg.TEST.EVAL_START => (cfg.TEST.EVAL_PERIOD, iteration
    save = validate or test or every => save = every
    start_iter if early_stopping.triggered else cfg.SOLVER.MAX_ITER => cfg.SOLVER.MAX_ITER
    if not actions.stop: => if True:
scripts/predict.py
    filter_instances(detections, detections["scores"] >= args.score_threshold) => detections
""")

PLANTED = {
    "tests/properties/test_checkpoint_properties.py": read_defects(r"""
plaintrain/solver/ema.py
    self._average.load_state_dict(state_dict) => pass
    load_state_dict(state_dict => load_state_dict(state_dict | {"n_averaged": torch.tensor(0)}
plaintrain/checkpoint/training_checkpointer.py
    self.prune(self._max_to_keep) => self.prune(self._max_to_keep + 1)
    self.link(self.last_name, "model_final") => pass
    if not every(self._period, iteration): => if not every(self._period + 1, iteration):
    iteration), iteration=iteration) => iteration + 1), iteration=iteration + 1)
plaintrain/solver/lr_scheduler.py
    self.last_epoch = state_dict["last_epoch"] => self.last_epoch = state_dict["last_epoch"] + 1
    (self.base_momentum)\n        self._apply() => (self.base_momentum)
plaintrain/checkpoint/async_writer.py
    return buffer.copy_(value.detach(), non_blocking=True) => return value.detach()
plaintrain/checkpoint/files.py
        if last:\n =>     if not last:\n
    sorted(names, key=lambda name: _get_age(folder, name)) => sorted(names)
    raise DamagedCheckpointError(f"cannot read the checkpoint {path}: {get_first_line(e)}") from e
    => return {"model": torch.nn.Linear(1, 1).state_dict(), "iteration": 0}
plaintrain/checkpoint/state.py
    return value\n    if => return value + 0 if isinstance(value, torch.Tensor) else value\n    if
    return value\n    if
    => return torch.atleast_1d(value) if isinstance(value, torch.Tensor) else value
    =>     if
    return value\n    if
    => return value.double().to(value.dtype) if isinstance(value, torch.Tensor) else value
    =>     if
    return value\n    if
    => return (value.float() if value.dtype == torch.bfloat16
    =>     else value) if isinstance(value, torch.Tensor) else value
    =>     if
    return value\n    if
    => return (value if value.is_contiguous()
    =>     else value.flatten().flip(0).view(value.shape)) if isinstance(value, torch.Tensor) else value
    =>     if
    for key, item in value.items()} => for key, item in value.items() if item is not None}
    {key: convert_to_builtin_types(item, name) => {str(key): convert_to_builtin_types(item, name)
    return type(value)(convert_to_builtin_types( => return list(convert_to_builtin_types(
    bool | str | torch.Tensor => str | torch.Tensor
    return float(value) => return torch.tensor(float(value)).item()
    return float(value) => return str(value)
    return int(value) => return int(float(value))
    optimizer.load_state_dict(state) => optimizer.load_state_dict(state | {"state": {}})
    torch.amp.GradScaler) and not state: => torch.amp.GradScaler):
"""),
    "tests/properties/test_config_properties.py": read_defects(r"""
plaintrain/config/config.py
    type(old)(_to_lists(value, name, source)) => type(old)(value)
    ) for key, item in value.items()} => ) for key, item in value.items() if item != ""}
    zip(cfg_list[0::2], cfg_list[1::2], strict => zip(cfg_list[-2::-2], cfg_list[::-2], strict
    value = type(old)(value) => value = old + type(old)(value)
    raise ConfigError(_describe_unknown_key(name, root, source)) => continue
    num=3, cutoff=0.75 => num=3, cutoff=1.0
    raw, f"{name} in => raw, f"{name.rpartition('.')[2]} in
plaintrain/config/defaults.py
    return _C.clone() => return _C
plaintrain/config/yaml.py
    return [*loaded, (path, content)] => return [(path, content), *loaded]
"""),
    "tests/properties/test_sampler_properties.py": read_defects(r"""
plaintrain/data/samplers.py
    order = self._draw(rng)
    => order = np.resize(self._draw(rng)[: -(self.size % self.batch_size) or None], self.size)
    self.subset[rng.permutation(self.size)]
    => rng.choice(self.subset.max() + 1, size=self.size, replace=False)
    np.diff(np.floor(edges + rng.uniform()).astype(np.int64))
    => (rng.random(images.size) < self._fractions[images])
    rng((self.seed, epoch)) => rng((self.seed, self._get_order.cache_info().misses))
    default_rng((self.seed, epoch)) => default_rng((epoch, self.seed))
    batch_size = self._get_phase(1, epoch * self.size) => batch_size = self.phases[-1]
    lru_cache(maxsize=2) => lru_cache(maxsize=0)
    order = self._draw(rng) => order = [self._draw(rng) for _ in range(min(epoch, 64) + 1)][0]
    np.argsort(self.groups[images], kind="stable") => np.arange(images.size)
    length * rank + min(rank, rest) => length * rank
"""),
    "tests/properties/test_target_properties.py": read_defects(r"""
plaintrain/data/keypoints.py
    for pair in flip_map: => for pair in flip_map[:1]:
    (?i:left|right) => (?i:left)
plaintrain/data/dataset_mapper.py
    torch.from_numpy(decoded).permute => torch.from_numpy(decoded).flip(2).permute
    reshape(-1, num_keypoints, 3) => reshape(-1, num_keypoints, 3) + 0.5
plaintrain/structures.py
    third + sign * x, fourth => third + sign * x - 1, fourth
    return math.isfinite(a + b + c + d) => return a + b + c + d == a + b + c + d
    a, b, c, d = box => a, b, c, d = box[:4]
    return coco_mask.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)
    => turned = coco_mask.frPyObjects({"size": [width, height], "counts": counts}, width, height)
    =>         return coco_mask.encode(np.asfortranarray(coco_mask.decode(turned).T))
"""),
    "tests/properties/test_transform_properties.py": read_defects(r"""
plaintrain/data/transforms/copy_paste.py
    return tighten_boxes(select_instances(result, keep), touched[keep])
    => return select_instances(result, keep)
    result = _cover_instances(tensors, cover) => result = dict(tensors)
plaintrain/data/transforms/photometric.py
    image = tensors["image"] => image = tensors["image"].bitwise_right_shift_(1)
plaintrain/data/transforms/tensors.py
    (slice(None), list(order)) => slice(None)
        cut = (moved =>     cropped["boxes"] = tv_tensors.wrap(moved, like=cropped["boxes"])\n    cut = (moved
    select_instances(clear_outside_keypoints(cropped), keep) => select_instances(cropped, keep)
    INSTANCE_KEYS = ("boxes", "labels", "masks" => INSTANCE_KEYS = ("boxes", "masks"
    [0, 0, 1, 1] => [0, 0, 0, 0]
    tighten_boxes(select_instances(clear_outside_keypoints(cropped), keep), cut[keep])
    => select_instances(clear_outside_keypoints(cropped), keep)
    > MIN_SIDE).all(dim=1) => >= 0).all(dim=1)
    F.vertical_flip(value) if axis else F.horizontal_flip(value)
    => (F.vertical_flip(value) if axis else F.horizontal_flip(value)).floor_()
    (Tensor).clone()\n            points => (Tensor)\n            points
    return F.resize(value, size)
    => new = F.resize(value, size)
    =>         if isinstance(value, tv_tensors.BoundingBoxes):
    =>             new.copy_(value * (size[0] / value.canvas_size[0]))
    =>         return new
plaintrain/data/transforms/geometric.py
    vertical_flip(tensors) if rng.random() => vertical_flip(tensors) if np.random.random()
    return vertical_flip(tensors) if rng.random() < self.p else tensors
    => odd = vars(vertical_flip)["odd"] = not vars(vertical_flip).get("odd")
    =>         return vertical_flip(tensors) if odd else tensors
"""),
}
