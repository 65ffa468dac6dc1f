"""Errors for names that cannot be imported, which say what replaces those of Detectron2."""

from typing import Any

_LOOP = "the loop of scripts/plain_train_net.py"
# What to use: names, or packages for their other names.
_REPLACED = {
    _LOOP: "DefaultTrainer SimpleTrainer AMPTrainer TrainerBase train_loop defaults",
    f"a line in {_LOOP}": "HookBase hooks",
    "plaintrain.predict.Predictor": "DefaultPredictor",
    "a config in YAML": "LazyConfig LazyCall instantiate lazy",
    "arguments of __init__": "configurable",
    "a config of version 2": "upgrade_config downgrade_config",
    "TEST.AUG.ENABLED True": "GeneralizedRCNNWithTTA DatasetMapperTTA",
    "plaintrain.modeling.build_model, or your own model in the script": "modeling",
    "torch.nn and torchvision.ops": "layers",
    "plain tensors and torchvision.ops": "structures",
    "a file in configs/Detectron2, and MODEL.WEIGHTS detectron2://...": "model_zoo",
    "COCOEvaluator, or your own DatasetEvaluator": "evaluation",
    "build_detection_train_loader(cfg, mapper=..., dataset=...)": "data",
}
_HINTS = {name: hint for hint, names in _REPLACED.items() for name in names.split()}


class UnsupportedNames:
    """Last finder of the import system: Python asks it for a missing module, or name of a package."""

    @staticmethod
    def find_spec(name: str, *args: Any) -> None:
        package, _, missing = name.rpartition(".")
        if name.startswith("plaintrain."):
            hint = next((f"; use {_HINTS[key]}" for key in name.split(".")[::-1] if key in _HINTS), "")
            see = "docs/FROM_DETECTRON2.md lists what replaces Detectron2's names"
            raise ImportError(f"cannot import {missing} from {package}{hint}; {see}", name=name)
