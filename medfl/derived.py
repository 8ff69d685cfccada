"""Studies that follow from another, as trees of the configuration.

Of a fine-tuning, which a site makes again to check the server's; and under differential privacy.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

Tree = dict[str, Any]
SHARED = ("steps", "batch_size", "optimizer", "schedule", "warmup")  # of `finetune`, in place of those of `training`
MOST_OUTPUTS = 1000
WITHOUT_BATCHES = {"norm": "layer", "norm_layer": "group"}  # in place of batch norm
ALONE = {"codebook": "refresh", "queue": "clear", "gram": "never"}  # of `rounds`


def derive_tree(study: Tree, sizes: Mapping[str, int], *, freeze: bool, fraction: float) -> Tree:
    """The configuration of a fine-tuning: the task takes the method's place.

    Args:
        sizes: of the task's outputs that its configuration leaves open (null), such as {"classes": 3}.
        freeze: only the head is trained.
        fraction: of the labelled patients.
    """
    tree = copy.deepcopy(study)
    plan, method = tree["finetune"], dict(tree["task"])
    method["freeze"] = freeze
    method |= {name: size for name, size in sizes.items() if name in method and method[name] is None}
    tree["method"], tree["views"] = method, plan["views"]
    tree["training"] |= {name: plan[name] for name in SHARED} | {"label_fraction": fraction, "synthetic": 0.0}
    tree["rounds"] |= {"count": plan["rounds"], "blend": "none", "keep_checkpoints": 1}
    tree["evaluation"]["protocols"] = ["segmentation" if "labels" in method else "classifier"]
    return tree


def follows(received: Tree, approved: Tree) -> bool:
    """Whether a configuration is the approved one, or that of one of its fine-tunings."""
    if received == approved:
        return True
    method, training = received.get("method"), received.get("training")
    if "finetune" not in approved["stages"] or not isinstance(method, dict) or not isinstance(training, dict):
        return False
    left_open = [name for name, value in approved["task"].items() if value is None]
    sizes = {name: method[name] for name in left_open if type(method.get(name)) is int}
    fraction = training.get("label_fraction")
    if not isinstance(fraction, int | float) or fraction not in approved["finetune"]["fractions"]:
        return False
    if any(not 0 <= size <= MOST_OUTPUTS for size in sizes.values()):
        return False
    return any(derive_tree(approved, sizes, freeze=freeze, fraction=fraction) == received for freeze in (False, True))


def converted(study: Tree) -> Tree:
    """The configuration under differential privacy: no norm, queue or sum in it mixes patients; else as it is.

    Encoders get group norm, heads layer norm. It changes the network, so a comparison without privacy needs the same.
    """
    if study["privacy"].get("mechanism") in (None, "none"):
        return study
    tree: Tree = _unmixed(study)
    tree["rounds"] |= ALONE
    return tree


def unconverted(study: Tree) -> str:
    """The first key of a study that `converted` would change; "" if there is none."""
    return next(_changes(study, converted(study), ""), "")


def _changes(one: Tree, other: Tree, at: str) -> Iterator[str]:
    for key, value in one.items():
        if isinstance(value, dict):
            yield from _changes(value, other[key], f"{at}{key}.")
        elif value != other[key]:
            yield f"{at}{key}"


def _unmixed(value: Any) -> Any:
    if isinstance(value, list):
        return [_unmixed(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _unmixed(item) for key, item in value.items()}
    encoder = str(value.get("_target_", "")).startswith("medfl.models.encoders.")
    names = {"norm": "group"} if encoder else WITHOUT_BATCHES
    return found | {name: kind for name, kind in names.items() if found.get(name) == "batch"}
