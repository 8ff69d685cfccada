"""The study of a fine-tuning, as a tree of its configuration; a site makes it again to check the server's."""

import copy
from collections.abc import Mapping
from typing import Any

Tree = dict[str, Any]
SHARED = ("steps", "batch_size", "optimizer", "schedule", "warmup")  # of `finetune`, in place of those of `training`
MOST_OUTPUTS = 1000


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
